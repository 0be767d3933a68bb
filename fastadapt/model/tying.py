"""Tied weights: one parameter in two places of a transformers model, by its config's tie_word_embeddings."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..layers.layer import Adapter
from ..methods.lora import LoRAAdapter, LoRAConfig, TiedLoRAAdapter
from .targets import base_modules, saved_paths, target_paths
from .wrappers import inside


def tied_ends(model: nn.Module) -> list[str]:
    """The paths of a model's input embedding and of the modules that have its weight too; none where none has."""
    get = getattr(inside(model), "get_input_embeddings", None)
    weight = getattr(get(), "weight", None) if callable(get) else None
    modules = {path: getattr(module, "base_layer", module) for path, module in base_modules(model).items()}
    ends = [
        path for path, module in modules.items() if weight is not None and getattr(module, "weight", None) is weight
    ]
    ends.sort(key=lambda path: not isinstance(modules[path], nn.Embedding))
    return ends if len(ends) > 1 else []


def with_ties(model: nn.Module, config: LoRAConfig) -> tuple[LoRAConfig, list[str]]:
    """The config with all that is tied to what it names of a model's embeddings, and the paths of these.

    Warns where there is nothing to tie.
    """
    ends = tied_ends(model)
    saved = set(saved_paths(model, config, needs_head=False)).intersection(ends)
    if saved:
        added = [path for path in ends if path not in saved]
        return replace(config, modules_to_save=[*(config.modules_to_save or []), *added]), ends
    targets = config.target_modules
    chosen = set(target_paths(model, config, every_name=False)).intersection(ends)
    if chosen:
        added = [path for path in ends if path not in chosen]
        if added and isinstance(targets, str):
            targets = "|".join([f"(?:{targets})", *map(re.escape, added)])
        elif added:
            targets = [*(targets or []), *added]
        return replace(config, target_modules=targets), ends
    what = "none of them is in target_modules or modules_to_save" if ends else "the model has no tied embeddings"
    warnings.warn(f"ensure_weight_tying has nothing to tie: {what}", stacklevel=4)
    return config, []


def tie_copies(copies: Mapping[str, nn.Module], ends: Sequence[str]) -> None:
    """Gives the copies of modules_to_save at these paths one weight."""
    found = [copies[path] for path in ends if path in copies]
    for copy in found[1:]:
        copy.weight = found[0].weight


def tie_adapters(adapters: dict[str, Adapter], ends: Sequence[str]) -> None:
    """Puts into the places of the adapters at these paths that of the first, an embedding's, turned round.

    Raises ValueError for adapters of other methods, and of other ranks or scales.
    """
    found = [adapters[path] for path in ends if path in adapters]
    for path, adapter in zip(ends[1:], found[1:], strict=False):
        first = found[0]
        if not (type(first) is type(adapter) is LoRAAdapter):
            raise ValueError("ensure_weight_tying goes with LoRA alone: leave it out, or name one end only")
        A, _ = adapter.factors
        if A.shape[0] != first.factors[0].shape[0] or adapter.scaling != first.scaling:
            raise ValueError(
                f"ensure_weight_tying needs one rank and lora_alpha for {ends[0]} and {path}: give both the same in "
                "rank_pattern and alpha_pattern"
            )
        adapters[path] = TiedLoRAAdapter(first, adapter)


def check_equal(adapters: Mapping[str, Adapter], ends: Sequence[str]) -> None:
    """Raises ValueError where the adapters at these paths have not the same numbers, so that they cannot be one."""
    factors = [adapter.factors for path in ends if isinstance(adapter := adapters.get(path), LoRAAdapter)]
    for (A, B), (other_A, other_B) in zip(factors[:1] * len(factors), factors[1:], strict=False):
        if not (torch.equal(other_A, B.T) and torch.equal(other_B, A.T)):
            raise ValueError(
                f"ensure_weight_tying: the adapters of {', '.join(ends)} must be equal to be trained as one: load with "
                "trainable=False, or take the field out of the file"
            )


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
