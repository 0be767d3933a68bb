"""Tied weights: one parameter in two places of a transformers model, by its config's tie_word_embeddings."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def untied(model: nn.Module) -> list[Any]:
    """Those configs of `model` that say tied where all that they tie has become different weights.

    Where one of several pairs is still tied, as encoder's and decoder's embeddings are beside a head of its own, the
    config must go on saying so: from_pretrained ties what a file has once, and leaves apart what it has twice. Weights
    that are one still, but no longer that which the config ties them to, become two.
    """
    configs: dict[int, Any] = {}
    tied: dict[int, list[bool]] = {}
    apart: set[int] = set()
    for module in model.modules():
        config = getattr(module, "config", None)
        if getattr(config, "tie_word_embeddings", False):
            configs[id(config)] = config
            tied.setdefault(id(config), []).extend(_ties(module, apart))
    return [config for key, config in configs.items() if tied[key] and not any(tied[key])]


def _ties(module: Any, apart: set[int]) -> list[bool]:
    """Whether each pair of weights that the class of a transformers model ties is one weight.

    apart: the ids of those that are not, which no second place may have.
    """
    if not callable(names := getattr(module, "get_expanded_tied_weights_keys", None)):
        # Before transformers 5 a class names the head alone.
        ends: list[Any] = [getattr(module, f"get_{side}_embeddings", lambda: None)() for side in ("input", "output")]
        return [ends[0].weight is ends[1].weight] if None not in ends else []
    found = []
    for target, source in names().items():
        tensor = _tensor(module, target)
        found.append(tensor is _tensor(module, source))
        if not found[-1] and id(tensor) in apart and isinstance(tensor, nn.Parameter):
            path, _, leaf = target.rpartition(".")
            tensor = nn.Parameter(tensor.detach().clone(), requires_grad=tensor.requires_grad)
            setattr(module.get_submodule(path), leaf, tensor)
        if not found[-1]:
            apart.add(id(tensor))
    return found


def _tensor(module: nn.Module, name: str) -> Tensor:
    path, _, leaf = name.rpartition(".")
    tensor: Tensor = getattr(module.get_submodule(path), leaf)
    return tensor
