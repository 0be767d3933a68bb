"""LoRA-drop's second half: measure the probe, choose the layers, rebuild the adapter."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..methods.lora_drop import LoRADropConfig, output_energy
from ..model.adapted import adapter_configs, check_known, check_unmerged, present
from ..model.inject import in_mode, rebuild
from .batches import on_device


def select_layers(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    adapter_name: str = "default",
    *,
    forward: Callable[[nn.Module, Mapping[str, Any]], Any] | None = None,
) -> dict[str, float]:
    """Ends LoRA-drop's probe: measures how much each layer's adapter puts out, and lets the weak ones share one pair.

    Runs `model` over `batches` (keyword arguments of its forward; padding by attention_mask does not count) without
    gradients and in eval mode, takes I_l = Σ ‖s B A x‖² of each layer and gives the adapter the layers that
    LoRADropConfig.select keeps. Its parameters are new: make the optimizer afterwards. `forward(model, batch)` stands
    for model(**batch). Returns {path: I_l}. Raises ValueError for an adapter that is no LoRA-drop or
    has been selected already, no batches, or a probe that puts out nothing, TypeError for batches that are no mappings;
    the model is then as it was.
    """
    check_known(model, adapter_name)
    config = adapter_configs(model)[adapter_name]
    if not isinstance(config, LoRADropConfig):
        raise ValueError(
            f"adapter {adapter_name!r} must have a LoRADropConfig to select layers, got {type(config).__name__}"
        )
    if config.kept is not None:
        raise ValueError(f"the layers of adapter {adapter_name!r} are selected already")
    injection = present(model, adapter_name)
    check_unmerged(injection.layers.values(), "select_layers")
    real: list[Tensor | None] = [None]
    device = next(model.parameters()).device
    count = 0
    energies = output_energy(injection.layers, adapter_name, lambda: real[0])
    with torch.no_grad(), in_mode(model, training=False), energies as found:
        for batch in batches:
            batch = on_device(batch, device)
            mask = batch.get("attention_mask")
            real[0] = None if mask is None else mask.bool()
            if forward is None:
                model(**batch)
            else:
                forward(model, batch)
            count += 1
    if not count:
        raise ValueError("batches must hold at least one batch, got none")
    energy = {path: float(value) for path, value in found.items()}
    rebuilt = replace(config, kept=config.select(energy, injection.adapters))
    new = rebuild(model, adapter_name, rebuilt)
    if not config.fresh:
        _go_on(new, injection.adapters, energy, rebuilt.kept or [])
    return energy


@torch.no_grad()
def _go_on(new: Mapping[str, Any], old: Mapping[str, Any], energy: Mapping[str, float], kept: list[str]) -> None:
    """Copies what was probed; weakest first, so that a shared pair ends as the strongest of those that it replaces."""
    for path in sorted(new, key=lambda path: (path in kept, energy[path])):
        for name in old[path].checkpoint_names:
            getattr(new[path], name).copy_(getattr(old[path], name))
