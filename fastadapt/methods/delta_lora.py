"""Delta-LoRA: LoRA whose products also move the base weight, told without touching it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..checks import check_in_one_piece
from ..layers.kinds import AdapterConv2d, AdapterEmbedding
from ..layers.layer import Adapter, AdapterLayer
from ..layers.linear import AdapterLinear
from ..reference import AdapterForm
from .config import Control
from .lora import LoRAAdapter, LoRAConfig


class DeltaLoRAAdapter(LoRAAdapter):
    """LoRA until it is anchored; from then on the form of rank 2r that the moved weight amounts to.

        ΔW = s ((1 + λ) B A − λ B_K A_K)      A' = [A; A_K], B' = [(1 + λ) B, −λ B_K]

    The gradient through A and B is LoRA's, of factor s and not s (1 + λ): the part of ΔW that stands for the moved
    weight passes none. Shapes: lora_A [r, in], lora_B [out, r], and the anchors lora_anchor_A and lora_anchor_B alike.
    """

    suffixes: ClassVar[Mapping[str, str]] = {
        **LoRAAdapter.suffixes,
        "lora_anchor_A": "lora_anchor_A.weight",
        "lora_anchor_B": "lora_anchor_B.weight",
    }

    lora_anchor_A: Tensor
    lora_anchor_B: Tensor

    def __init__(self, layer: AdapterLayer, config: LoRAConfig, r: int, alpha: float, dtype: torch.dtype) -> None:
        super().__init__(layer, config, r, alpha, dtype)
        assert isinstance(config, DeltaLoRAConfig)
        self.delta_lambda = float(config.delta_lambda)
        self.anchored = False
        if config.anchored:
            self.anchor()

    def anchor(self) -> None:
        """From here on B A − B_K A_K counts 1 + λ times, K being now."""
        self.anchored = True
        for name, value in zip(("lora_anchor_A", "lora_anchor_B"), self.factors, strict=True):
            self.add_tensor(name, value, value, value.dtype, frozen=True)

    def release(self) -> None:
        """LoRA again, as before it was anchored."""
        self.anchored = False
        for name in ("lora_anchor_A", "lora_anchor_B"):
            delattr(self, name)
            del self.checkpoint_names[name]

    def form(self, weight: Tensor, bias: Tensor | None) -> AdapterForm:
        form = super().form(weight, bias)
        if not self.anchored:
            return form
        gain = 1 + self.delta_lambda
        A, B = (_with_less_gradient(factor, gain) for factor in (form.A, form.B))
        return form._replace(
            A=torch.cat([A, self.lora_anchor_A]),
            B=torch.cat([gain * B, -self.delta_lambda * self.lora_anchor_B], dim=1),
        )


def _with_less_gradient(tensor: Tensor, gain: float) -> Tensor:
    """The very values of `tensor`; 1/gain of the gradient goes through."""
    constant = tensor.detach()
    return constant + (tensor - constant) / gain


@dataclass
class DeltaLoRAConfig(LoRAConfig):
    """Delta-LoRA: the weight follows the low-rank product, W ← W + λ s (B⁺A⁺ − BA) at every step after start_step.

    delta_lambda: λ, how far the weight follows (2 for GPT-2, 0.5 for RoBERTa; section 5).
    start_step: K, the optimizer steps of plain LoRA before it does, so that A and B have settled (500; Algorithm 1).
    literal: the weight is really moved, in a copy of its own in at least fp32: for comparison. Otherwise the updates,
        which telescope to λ s (B A − B_K A_K), are part of the form, the base stays untouched and merge, unload and
        files work as for any adapter.
    anchored: whether the anchors B_K and A_K are there: set by the training, kept in the file.
    lora_dropout must be 0 and use_dora is refused: dL/dW would no longer be dL/d(BA), on which the method rests.
    Files carry peft_type "DELTA_LORA" and lora_anchor_A/B.weight beside LoRA's tensors; `export_lora` writes the same
    function as a plain LoRA of rank 2r.
    Call control(model).step() after each optimizer step. Raises ValueError for a value outside its range, by name.
    Source: Zi et al. 2023, arXiv:2309.02411, Algorithm 1.
    """

    peft_type: ClassVar[str] = "DELTA_LORA"
    title: ClassVar[str] = "Delta-LoRA"
    rows: ClassVar[tuple[str, ...]] = (
        "Delta-LoRA ([2309.02411](https://arxiv.org/abs/2309.02411)) | "
        "`DeltaLoRAConfig(delta_lambda, start_step)`"
        " | 1 | 1 | α/r | b0 | A, B; stacked with their anchor, rank 2r",
    )
    adapter_classes: ClassVar[tuple[type[LoRAAdapter]]] = (DeltaLoRAAdapter,)
    layer_kinds: ClassVar[tuple[type[AdapterLayer], ...]] = (AdapterLinear, AdapterEmbedding, AdapterConv2d)

    delta_lambda: float = 2.0
    start_step: int = 500
    literal: bool = False
    anchored: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.delta_lambda < 0:
            raise ValueError(f"delta_lambda must be at least 0, got {self.delta_lambda!r}")
        if self.start_step < 0:
            raise ValueError(f"start_step must be at least 0, got {self.start_step!r}")
        if self.lora_dropout:
            raise ValueError(
                f"lora_dropout must be 0 with Delta-LoRA, got {self.lora_dropout!r}: with it the weight's gradient is "
                "not the product's"
            )
        if self.use_dora:
            raise ValueError("use_dora cannot go with Delta-LoRA: its base weight is scaled")

    def to_peft(self, paths: list[str]) -> dict[str, Any]:
        if self.literal:
            raise ValueError(
                "literal Delta-LoRA has moved the base weights themselves, which no adapter file holds: save the "
                "model, or train with literal=False, which computes the same"
            )
        return super().to_peft(paths)

    def control(self, layers: dict[str, AdapterLayer], adapters: dict[str, Adapter]) -> Control:
        return LiteralUpdate(self, layers, adapters) if self.literal else Anchor(self, adapters)


class Anchor(Control):
    """Anchors the adapters after start_step optimizer steps."""

    def __init__(self, config: DeltaLoRAConfig, adapters: dict[str, Adapter]) -> None:
        self.config = config
        self.adapters = [adapter for adapter in adapters.values() if isinstance(adapter, DeltaLoRAAdapter)]
        self.steps = 0
        self._anchor_when_due()

    def _anchor_when_due(self) -> None:
        if self.steps >= self.config.start_step and not self.config.anchored:
            for adapter in self.adapters:
                check_in_one_piece("lora_A", adapter.factors[0], "Delta-LoRA's anchor becomes a part of the model here")
            for adapter in self.adapters:
                adapter.anchor()
            self.config.anchored = True

    def step(self) -> None:
        self.steps += 1
        self._anchor_when_due()

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "anchored": self.config.anchored}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from that state. The adapters' tensors, anchors as well, are no part of it: load them after it."""
        self.steps = int(state["steps"])
        if self.config.anchored and not state.get("anchored", True):  # an earlier state
            for adapter in self.adapters:
                adapter.release()
            self.config.anchored = False
        self._anchor_when_due()


class LiteralUpdate(Control):
    """Moves the base weights as Algorithm 1 does: W ← W + λ s (B⁺A⁺ − BA) after every step beyond start_step.

    The weights become copies in at least fp32, for good: small updates would be lost in 16 bits.
    """

    def __init__(self, config: DeltaLoRAConfig, layers: dict[str, AdapterLayer], adapters: dict[str, Adapter]) -> None:
        self.config = config
        self.layers = layers
        self.adapters = {path: adapter for path, adapter in adapters.items() if isinstance(adapter, LoRAAdapter)}
        self.steps = 0
        self.masters: dict[str, Tensor] = {}
        for path, layer in layers.items():
            if layer.reason:
                raise ValueError(
                    f"literal Delta-LoRA writes the base weights, and {path} is called: {layer.reason}; take "
                    "literal=False, which computes the same"
                )
        for path, layer in layers.items():
            weight = layer.weight_matrix.detach()
            self.masters[path] = weight.to(torch.promote_types(weight.dtype, torch.float32), copy=True)
            layer.base_layer.weight = nn.Parameter(layer.base_layer.weight.detach().clone(), requires_grad=False)
        self.previous = self._factors()

    def _factors(self) -> dict[str, tuple[Tensor, Tensor]]:
        found = {path: adapter.factors for path, adapter in self.adapters.items()}
        return {path: (A.detach().clone(), B.detach().clone()) for path, (A, B) in found.items()}

    @torch.no_grad()
    def step(self) -> None:
        self.steps += 1
        new = self._factors()
        if self.steps > self.config.start_step:
            for path, (A, B) in new.items():
                master, (old_A, old_B) = self.masters[path], self.previous[path]
                factor = self.config.delta_lambda * self.adapters[path].scaling
                factors = [tensor.to(master.dtype) for tensor in (B, A, old_B, old_A)]
                master.addmm_(factors[0], factors[1], alpha=factor).addmm_(factors[2], factors[3], alpha=-factor)
                layer = self.layers[path]
                layer.base_layer.weight.copy_(layer.from_matrix(master))
        self.previous = new

    def state_dict(self) -> dict[str, Any]:
        return {
            "steps": self.steps,
            "masters": self.masters,
            "previous": {path: list(factors) for path, factors in self.previous.items()},
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = int(state["steps"])
        for path, master in self.masters.items():
            master.copy_(state["masters"][path])
            layer = self.layers[path]
            layer.base_layer.weight.copy_(layer.from_matrix(master))
            A, B = state["previous"][path]
            self.previous[path] = (A.clone(), B.clone())
