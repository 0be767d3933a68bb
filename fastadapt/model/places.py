"""Modules that are registered in several places of a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

Places = Mapping[int, Sequence[tuple[nn.Module, str]]]


def shared_places(model: nn.Module) -> Places:
    """Of the modules that are registered in several places, by id, each parent and name."""
    found: dict[int, list[tuple[nn.Module, str]]] = {}
    for parent in model.modules():
        for name, child in parent._modules.items():
            if child is not None:
                found.setdefault(id(child), []).append((parent, name))
    return {key: places for key, places in found.items() if len(places) > 1}
