"""Adapters whose method does something between the steps of training, and nobody does it: a warning, once."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from ..layers.layer import Adapter
from ..methods import AdapterConfig

# After so many steps without it a control was forgotten, and not made a line later.
_PATIENCE = 2


@dataclass
class _Watched:
    name: str
    config: AdapterConfig
    steps: int = 0


# By one of the adapter's layers, which goes when the model goes.
_watched: WeakKeyDictionary[Adapter, _Watched] = WeakKeyDictionary()
_hooks: list[Any] = []


def watch(name: str, config: AdapterConfig, adapters: Iterable[Adapter]) -> None:
    """Warns when optimizers have made their second step with these adapters before `unwatch` was called for them."""
    trained = next((a for a in adapters if any(p.requires_grad for p in a.parameters())), None)
    if trained is None:
        return
    _watched[trained] = _Watched(name, config)
    if not _hooks:
        _hooks.append(register_optimizer_step_post_hook(_count))


def unwatch(adapters: Iterable[Adapter]) -> None:
    """Somebody has taken over the control of these adapters."""
    for adapter in adapters:
        _watched.pop(adapter, None)


def _count(optimizer: Optimizer, *_: Any) -> None:
    if not _watched:
        return
    stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for adapter, watched in list(_watched.items()):
        if stepped.isdisjoint(map(id, adapter.parameters())):
            continue
        watched.steps += 1
        if watched.steps < _PATIENCE:
            continue
        del _watched[adapter]
        warnings.warn(
            f"adapter {watched.name!r} is trained without what {type(watched.config).title} does between the steps: "
            "call the step of fastadapt.control(model) after each, or give a Trainer "
            "callbacks=[fastadapt.integrations.AdapterCallback()]",
            stacklevel=2,
        )
