"""transformers' Trainer, and TRL's: what an adapter's method does between the steps, and its checkpoints."""

from __future__ import annotations

import json
import warnings
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainerCallback

from ..files import written_whole
from ..methods import Control
from ..model.adapted import active_adapters, adapter_configs
from ..model.inject import control as control_of
from ..model.peft_files import CONFIG_FILE
from ..model.saving import save_adapter
from ..model.sharded import whole
from ..training.state import load_tensors, pack, trained_tensors, unpack
from .trl import check_head_is_called

CONTROL_FILE = "adapter_control.safetensors"


class AdapterCallback(TrainerCallback):
    """Has a Trainer do what the active adapters' methods do between the steps: AdaLoRA's budget, Delta-LoRA's anchor.

        Trainer(model, arguments, train_dataset=data, callbacks=[fastadapt.integrations.AdapterCallback()])

    After each optimizer step it calls `fastadapt.control(model).step()`; the gradient of the method's regularizer,
    which the loss in the logs does not have, is in those that are clipped. Every checkpoint becomes an adapter
    directory, and gets a file with the control's state, by which training goes on as if it had not stopped; at the end
    the model has that of the best checkpoint where load_best_model_at_end took its weights. Methods without a control
    need no callback and lose nothing by it.
    resume_from: the checkpoint's directory where that is not OUTPUT/checkpoint-<step>.
    Raises ValueError when training goes on from a checkpoint without the control's state, or with another model's; and
    for an adapter on a head whose weight a trainer of TRL's reads in its place, so that it would never train.
    """

    def __init__(self, resume_from: str | PathLike[str] | None = None) -> None:
        self.resume_from = resume_from
        self.controls: dict[str, Control] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model = kwargs["model"]
        check_head_is_called(model)
        configs = adapter_configs(model)
        trained = [name for name in active_adapters(model) if not configs[name].inference_mode]
        self.controls = {name: control_of(model, name) for name in trained if configs[name].is_controlled}
        if state.global_step and self.controls:
            self._resume(model, self._place(args, state))

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The regularizer's gradient, to which those of the loss are added."""
        model = kwargs["model"]
        scaler = getattr(kwargs.get("optimizer"), "scaler", None)
        for name, own in self.controls.items():
            value = own.regularizer()
            if not isinstance(value, Tensor) or not value.requires_grad:
                continue
            parameters = [p for p in trained_tensors(model, name).values() if p.requires_grad]
            value = value if scaler is None else scaler.scale(value)
            # Not by backward(): that would run the hooks of DDP and the like, which wait for the loss.
            for parameter, gradient in zip(
                parameters, torch.autograd.grad(value, parameters, allow_unused=True), strict=True
            ):
                if gradient is not None:
                    parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # A scaler leaves out a step whose gradients are not finite.
        if not getattr(kwargs.get("optimizer"), "step_was_skipped", False):
            for own in self.controls.values():
                own.step()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model = kwargs["model"]
        checkpoint = Path(args.output_dir, f"checkpoint-{state.global_step}")
        if not checkpoint.is_dir():
            warnings.warn(f"there is no {checkpoint}: the adapter and its control are not saved", stacklevel=2)
            return
        if state.is_world_process_zero and not (checkpoint / CONFIG_FILE).exists():
            _save_adapters(model, checkpoint)
        if self.controls:
            self._save(model, checkpoint / CONTROL_FILE, writes=state.is_world_process_zero)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model = kwargs["model"]
        best = Path(state.best_model_checkpoint or "", CONTROL_FILE)
        if args.load_best_model_at_end and state.best_model_checkpoint and self.controls and best.is_file():
            self._restore(model, _read(best))

    def _save(self, model: nn.Module, path: Path, *, writes: bool) -> None:
        state = {
            name: {"control": own.state_dict(), "tensors": trained_tensors(model, name)}
            for name, own in self.controls.items()
        }
        tensors: dict[str, Tensor] = {}
        text = json.dumps(pack(state, tensors))
        if not writes:  # here for the pieces alone
            return
        with written_whole(path) as draft:
            save_file(tensors, draft, metadata={"state": text})

    def _place(self, args: Any, state: Any) -> Path:
        """The file of the checkpoint that the training goes on from; a Trainer does not say which that is."""
        usual = Path(args.output_dir, f"checkpoint-{state.global_step}")
        places = [Path(place) for place in (self.resume_from, args.resume_from_checkpoint, usual) if place]
        for place in places:
            if (place / CONTROL_FILE).is_file():
                return place / CONTROL_FILE
        raise ValueError(
            f"{places[0]} has no {CONTROL_FILE}, without which {', '.join(map(repr, self.controls))} cannot go on as "
            "if training had not stopped: give AdapterCallback(resume_from=...) the checkpoint where it lies "
            "elsewhere, or start anew"
        )

    def _resume(self, model: nn.Module, path: Path) -> None:
        states = _read(path)
        for name in self.controls:
            saved = states.get(name, {}).get("tensors", {})
            for key, tensor in trained_tensors(model, name).items():
                if key in saved and not torch.equal(whole(key, tensor).cpu(), saved[key]):
                    raise ValueError(
                        f"{path} is not of the checkpoint that the model was loaded from, by {key}: give "
                        "AdapterCallback(resume_from=...) that one"
                    )
        self._restore(model, states)

    def _restore(self, model: nn.Module, states: dict[str, Any]) -> None:
        if states.keys() != self.controls.keys():
            raise ValueError(
                f"the checkpoint has the control of {', '.join(map(repr, states)) or 'none'}, and the model trains "
                f"{', '.join(map(repr, self.controls))}: inject what the training began with"
            )
        for name, own in self.controls.items():
            # A control may shape its adapter's tensors by its state.
            own.load_state_dict(states[name]["control"])
            load_tensors(model, name, states[name]["tensors"])


def _read(path: Path) -> dict[str, Any]:
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        found: dict[str, Any] = unpack(json.loads(file.metadata()["state"]), tensors)
    return found


def _save_adapters(model: nn.Module, checkpoint: Path) -> None:
    """The active adapters of a model that does not save them itself: one in the checkpoint, several by name below."""
    names = active_adapters(model)
    for name in names:
        try:
            save_adapter(model, checkpoint if len(names) == 1 else checkpoint / name, name)
        except ValueError as error:
            warnings.warn(f"{checkpoint} gets no adapter: {error}", stacklevel=3)
