"""How each method is trained: its config, its optimizer and what comes before the first step.

The methods differ in these three and in nothing else, so one training loop serves all of them: `fastadapt train`, the
demo and `bench methods` run the same recipes.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn

from ..methods import (
    METHODS,
    AdaLoRAConfig,
    AdapterConfig,
    DeltaLoRAConfig,
    DoRAConfig,
    GLoRAConfig,
    LoRAConfig,
    LoRADropConfig,
    VeRAConfig,
)
from ..model.inject import in_mode
from .eva import initialize_eva
from .optim import LoRAFAAdamW, parameter_groups
from .selection import select_layers

Batch = Mapping[str, Any]


def adamw(model: nn.Module, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """AdamW on what requires grad."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay)


def loraplus(model: nn.Module, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """AdamW on LoRA+'s groups, with the rate of B; A's is a sixteenth of it."""
    return torch.optim.AdamW(parameter_groups(model, lr / 16, 16, weight_decay=weight_decay))


def lora_fa(model: nn.Module, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """AdamW with LoRA-FA's corrected gradient."""
    return LoRAFAAdamW(model, lr, weight_decay=weight_decay)


# The paper takes a tenth of the data. The probe has to find an order, not to learn the task: it may cost little beside
# what comes after it, and more than so many batches tell nothing new.
_FEWEST, _MOST = 4, 16


def probe(model: nn.Module, batches: Iterable[Batch], adapter_name: str) -> None:
    """LoRA-drop's first half: plain LoRA trained on a tenth of the batches, 4 to 16, then the selection on the same."""
    known = sum(1 for _ in itertools.islice(batches, 10 * _MOST))
    some = list(itertools.islice(batches, max(_FEWEST, known // 10)))
    optimizer = adamw(model, 5e-4, 0.0)
    with in_mode(model, training=True):
        for batch in some:
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    select_layers(model, some, adapter_name)


def eva(model: nn.Module, batches: Iterable[Batch], adapter_name: str) -> None:
    """A and the ranks from the activations of the data."""
    initialize_eva(model, batches, adapter_name)


def nothing(model: nn.Module, batches: Iterable[Batch], adapter_name: str) -> None:
    """Most methods start as they were drawn."""


@dataclass(frozen=True)
class Recipe:
    """One method: `config` makes its config, `optimizer(model, lr, weight_decay)` its optimizer.

    prepare(model, batches, adapter_name) runs once, after `inject` and before the optimizer is made; `batches` gives
    the same batches (keyword arguments of the model, labels among them) each time it is iterated. rank, learning_rate:
    where to start, relative to each other as the papers have them.
    """

    title: str
    config: Callable[..., AdapterConfig]
    learning_rate: float
    rank: int = 16
    optimizer: Callable[[nn.Module, float, float], torch.optim.Optimizer] = adamw
    prepare: Callable[[nn.Module, Iterable[Batch], str], None] = nothing


def _lora(kind: type[LoRAConfig] = LoRAConfig, **fixed: Any) -> Callable[..., AdapterConfig]:
    """LoRA's config, or that of a method that has its fields, with some of them fixed."""

    def config(r: int, alpha: float, dropout: float, steps: int, **common: Any) -> AdapterConfig:
        return kind(r=r, lora_alpha=alpha, lora_dropout=dropout, **fixed, **common)

    return config


def _plain(kind: type[AdapterConfig], **fixed: Any) -> Callable[..., AdapterConfig]:
    """The config of a method that has alpha and dropout where it has fields whose names end so, some fields fixed."""
    endings = ("alpha", "dropout")
    names = {end: next((f.name for f in fields(kind) if f"_{f.name}".endswith(f"_{end}")), None) for end in endings}

    def config(r: int, alpha: float, dropout: float, steps: int, **common: Any) -> AdapterConfig:
        if not kind.uses_r and r != kind.r:
            raise ValueError(f"{kind.title} has no r, got {r}: leave it {kind.r}")
        chosen: dict[str, Any] = {}
        for end, value, neutral in (("alpha", alpha, 2 * r), ("dropout", dropout, 0.0)):
            name = names[end]
            if name is not None:
                chosen[name] = value
            elif value != neutral:
                raise ValueError(f"{kind.title} has no {end}, got {value:g}: leave it {neutral:g}")
        return kind(r=r, **chosen, **fixed, **common)

    return config


def _delta_lora(r: int, alpha: float, dropout: float, steps: int, **common: Any) -> AdapterConfig:
    # The weight moves once a tenth of the steps has settled A and B. Dropout is refused.
    config = _lora(DeltaLoRAConfig, delta_lambda=0.5, start_step=steps // 10)
    return config(r, alpha, dropout, steps, **common)


def _adalora(r: int, alpha: float, dropout: float, steps: int, **common: Any) -> AdapterConfig:
    # The paper's proportions: half as much again to start with, a tenth of the steps before and a fifth after pruning.
    return AdaLoRAConfig(
        target_r=r,
        init_r=r + r // 2,
        lora_alpha=alpha,
        lora_dropout=dropout,
        total_step=steps,
        tinit=steps // 10,
        tfinal=steps // 5,
        orth_reg_weight=0.1,
        **common,
    )


# The name on the command line -> the recipe. A config takes (r, alpha, dropout, steps, **fields of all methods).
# Another package's method that is trained in a way of its own puts its recipe here too, where its config is defined.
RECIPES: dict[str, Recipe] = {
    "lora": Recipe("LoRA", _lora(), 5e-4),
    "lora+": Recipe("LoRA+", _lora(), 5e-3, optimizer=loraplus),
    "lora-fa": Recipe("LoRA-FA", _lora(freeze_A=True), 5e-4, optimizer=lora_fa),
    "lora-drop": Recipe("LoRA-drop", _lora(LoRADropConfig), 5e-4, prepare=probe),
    "adalora": Recipe("AdaLoRA", _adalora, 2e-3),
    "delta-lora": Recipe("Delta-LoRA", _delta_lora, 5e-4),
    "eva": Recipe("EVA", _lora(init_lora_weights="eva"), 5e-4, prepare=eva),
    "rslora": Recipe("rsLoRA", _lora(use_rslora=True), 2e-4),
    "dora": Recipe("DoRA", _lora(DoRAConfig), 5e-4),
    "vera": Recipe("VeRA", _plain(VeRAConfig), 1e-2, rank=256),
    "dvora": Recipe("DVoRA", _plain(VeRAConfig, use_dora=True), 1e-2, rank=256),
    "glora": Recipe("GLoRA", _plain(GLoRAConfig, config_D_E="vector"), 5e-4, rank=8),
}


def recipes() -> dict[str, Recipe]:
    """Every method that can be trained by name, as of now: RECIPES, and a plain recipe of each other form in METHODS.

    Such a one is called by its title in lower case, "-" for spaces, and has the method's own default rank and LoRA's
    optimizer and rate. Its config takes alpha and dropout where the method has a field that ends so; where it has none,
    an alpha other than 2r or a dropout other than 0 raises ValueError, and so does an r that would mean nothing.
    """
    found = dict(RECIPES)
    for method in METHODS.values():
        name = method.title.lower().replace(" ", "-")
        if method.has_forms and name not in found:
            found[name] = Recipe(method.title, _plain(method), RECIPES["lora"].learning_rate, rank=method.r)
    return found
