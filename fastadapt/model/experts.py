"""Weights of experts in configs and files: by the names that their layers had, in older layouts, and their ranks.

PEFT has a rule for configs and files of older transformers. Up to transformers 4 every expert was a module of linear
layers, and the router was one; from 5 on the weights of all experts are two stacked parameters, gate and up together in
one of them.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..layers.experts import AdapterExperts, ExpertsAdapter, experts_per_token
from ..layers.linear import AdapterLinear
from ..methods import AdapterConfig, LoRAConfig
from ..methods.config import pattern_value
from ..methods.experts import ExpertLoRA
from .adapted import PREFIX, Injection
from .targets import base_modules, parameter_targets
from .wrappers import inside

# The parameter that each of the old names has become a part of, by the family of models, and the families' models by
# transformers' model_type. Models that are in none of them have no rule in PEFT either.
_NAMES: dict[str, dict[str, str]] = {
    "mixtral": {"gate": "gate.weight", "w1": "gate_up_proj", "w3": "gate_up_proj", "w2": "down_proj"},
    "qwen2_moe": {
        "gate": "gate.weight",
        "gate_proj": "gate_up_proj",
        "up_proj": "gate_up_proj",
        "down_proj": "down_proj",
    },
}
_FAMILIES: dict[str, str] = {
    **dict.fromkeys(("mixtral", "minimax", "minimax_m2"), "mixtral"),
    **dict.fromkeys(
        (
            *("afmoe", "beam", "cohere2_moe", "deepseek_v2", "deepseek_v3", "deepseek_v32", "dots1", "ernie4_5_moe"),
            *("exaone_moe", "flex_olmo", "glm4_moe", "glm4_moe_lite", "glm4v_moe", "glm_moe_dsa", "hunyuan_v1_moe"),
            *("longcat_flash", "mellum", "olmoe", "qwen3_moe", "qwen3_next", "qwen3_omni_moe"),
            *("qwen3_omni_moe_text", "qwen3_omni_moe_thinker", "solar_open"),
        ),
        "qwen2_moe",
    ),
}
# The two that are one now, in the order in which they lie in it.
FUSED = "gate_up_proj"


def names_in_layers(model: nn.Module) -> dict[str, str]:
    """The parameter of experts, or of their router, that each of the old names has become a part of; empty for models
    without a rule."""
    kind = getattr(getattr(inside(model), "config", None), "model_type", "")
    return _NAMES.get(_FAMILIES.get(kind, ""), {})


def lost_in_peft(model: nn.Module, injection: Injection) -> list[str]:
    """The linear layers that PEFT leaves out where it reads the adapter: in models with a rule it takes every target
    that ends in one of the old names for that of experts."""
    names = names_in_layers(model) if injection.config.peft_type == LoRAConfig.peft_type else {}
    return [
        path
        for path, layer in injection.layers.items()
        if path.rpartition(".")[2] in names and isinstance(layer, AdapterLinear)
    ]


def with_experts(
    model: nn.Module, config: AdapterConfig, modules: Mapping[str, nn.Module] | None = None
) -> AdapterConfig:
    """The config with target_parameters in the place of the old names of experts and routers: PEFT's rule.

    "all-linear" stands for all of them, and a list for those that it names; of other linear layers that are called so
    nothing changes. gate and up, which are one product now, have twice the rank and lora_alpha in it, so that each has
    its own of both. modules: the model's by path as they were before any was wrapped; by default `base_modules`. Raises
    ValueError where one of these two is named without the other.
    """
    bare, names = inside(model), names_in_layers(model)
    if not names or not isinstance(config, LoRAConfig) or AdapterExperts not in config.layer_kinds:
        return config
    targets = config.target_modules
    if isinstance(targets, str):
        found = list(names) if targets.lower() == "all-linear" else []
    else:
        found = [old for old in names if any(t == old or t.endswith(f".{old}") for t in targets or ())]
    modules = base_modules(bare) if modules is None else modules
    keys = [f".{path}.{name}" for path, module in modules.items() for name in module._parameters]
    found = [
        old for old in found if any(key.endswith(f".{names[old]}") for key in keys) and _takes(names[old], modules)
    ]
    if not found:
        return config
    fused = [old for old in names if names[old] == FUSED]
    given = [old for old in fused if old in found]
    if given and given != fused:
        missing = ", ".join(old for old in fused if old not in given)
        raise ValueError(
            f"target_modules names {', '.join(given)} without {missing}, and both are one weight of the experts, "
            f"{FUSED}: name both, or none"
        )
    changes: dict[str, Any] = {"target_parameters": sorted({*(config.target_parameters or ()), *map(names.get, found)})}
    if not isinstance(targets, str):
        known = {end for path in modules for end in _ends(path)}
        changes["target_modules"] = [t for t in targets or () if t in known or t.rpartition(".")[2] not in found]
    if given:
        key = rf".*\.{FUSED}"
        changes["rank_pattern"] = {**config.rank_pattern, key: len(fused) * config.r}
        changes["alpha_pattern"] = {**config.alpha_pattern, key: len(fused) * config.lora_alpha}
    return replace(config, **changes)


def with_shared_ranks(model: nn.Module, config: AdapterConfig, own: AdapterConfig) -> AdapterConfig:
    """The config with the ranks that share_rank means for weights of experts in its rank_pattern.

    own: the config as the user gave it, whose rank_pattern goes before. Raises ValueError where target_parameters names
    no weights of experts, or their model does not say how many of them a token goes to.
    """
    if not isinstance(config, LoRAConfig) or not isinstance(own, LoRAConfig) or not config.share_rank:
        return config
    modules = base_modules(inside(model))
    experts = {
        f"{path}.{name}": module
        for path, names in parameter_targets(modules, config, every_name=False).items()
        for module in [getattr(modules[path], "base_layer", modules[path])]
        for name in names
        if module.get_parameter(name).dim() == 3
    }
    if not experts:
        raise ValueError(
            f"share_rank is for weights of experts, and target_parameters, {config.target_parameters!r}, names none: "
            "name them there, or leave share_rank out"
        )
    ranks = {
        key: max(1, config.rank(key) // experts_per_token(module))
        for key, module in experts.items()
        if not pattern_value("rank_pattern", own.rank_pattern, key, 0)
    }
    return replace(config, rank_pattern={**ranks, **config.rank_pattern})


def _ends(path: str) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[index:]) for index in range(len(parts))]


def _takes(name: str, modules: Mapping[str, nn.Module]) -> bool:
    """Whether a parameter of that name is a router's weight, which is no linear layer's, or experts'."""
    path, _, leaf = f".{name}".rpartition(".")
    return any(
        f".{where}".endswith(path) and not isinstance(module, nn.Linear)
        for where, module in modules.items()
        if module._parameters.get(leaf) is not None
    )


_OF_ONE = re.compile(r"(?P<outer>.*)\.experts\.(?P<expert>\d+)\.(?P<name>\w+)\.lora_(?P<side>[AB])\.weight")


def stack_experts(tensors: dict[str, Tensor], wanted: Collection[str]) -> None:
    """Puts the factors of single experts, as older files have them, into the stacks that the adapter has, in place.

    gate and up become one product: A of both above each other, B's in blocks. What does not make whole stacks stays as
    it is, for the check of names to tell. wanted: the names of the adapter's own tensors.
    """
    found: dict[tuple[str, str, str], dict[int, str]] = {}
    for name in tensors:
        if (match := _OF_ONE.fullmatch(name)) and name not in wanted:
            key = match["outer"], match["name"], match["side"]
            found.setdefault(key, {})[int(match["expert"])] = name
    for names in _NAMES.values():
        fused = [old for old, new in names.items() if new == FUSED]
        (down,) = [old for old, new in names.items() if new == "down_proj"]
        for outer in {key[0] for key in found}:
            # The last of the wrappers is down_proj's, where both are adapted.
            place = f"{_spelled(outer, wanted)}.experts."
            inner = "base_layer." if (outer, down, "A") in found else ""
            for parts, prefix in ((fused, inner), ([down], "")):
                _stack(tensors, found, outer, parts, f"{place}{prefix}lora_", wanted)
    for name in [name for name in tensors if name not in wanted and name.endswith(("lora_A.weight", "lora_B.weight"))]:
        place, _, rest = name.rpartition(".gate.")
        spelled = f"{_spelled(place, wanted)}.gate.{rest}"
        if place and spelled in wanted:
            tensors[spelled] = tensors.pop(name)


def _spelled(outer: str, wanted: Collection[str]) -> str:
    """The path of a block of experts as the model has it: Mixtral's was called block_sparse_moe."""
    renamed = outer.replace("block_sparse_moe", "mlp")
    return outer if any(name.startswith(f"{outer}.") for name in wanted) else renamed


def _stack(
    tensors: dict[str, Tensor],
    found: Mapping[tuple[str, str, str], Mapping[int, str]],
    outer: str,
    parts: list[str],
    place: str,
    wanted: Collection[str],
) -> None:
    sides = {side: [found.get((outer, part, side), {}) for part in parts] for side in "AB"}
    counts = {tuple(sorted(each)) for side in sides.values() for each in side}
    if len(counts) != 1 or not {f"{place}{side}.weight" for side in "AB"} <= set(wanted):
        return
    (experts,) = counts
    if not experts or experts != tuple(range(len(experts))):
        return
    stacks = {side: [[tensors[each[e]] for e in experts] for each in sides[side]] for side in "AB"}
    try:
        A = torch.cat([torch.cat([each[e] for each in stacks["A"]]) for e in experts])
        B = torch.stack([torch.block_diag(*[each[e] for each in stacks["B"]]) for e in experts])
    except RuntimeError:  # experts of several shapes are no stack
        return
    for each in (*sides["A"], *sides["B"]):
        for name in each.values():
            del tensors[name]
    tensors[f"{place}A.weight"] = A
    # [E, out, r] as [out, r·E], the rank first.
    tensors[f"{place}B.weight"] = B.permute(1, 2, 0).flatten(1)


class _Pair(NamedTuple):
    """A and B of one stack in a file by their names, and the shapes that they have to have."""

    A: str
    B: str
    experts: int
    shapes: tuple[torch.Size, torch.Size]

    def shapes_in(self, tensors: Mapping[str, Tensor]) -> tuple[torch.Size, torch.Size]:
        return tensors[self.A].shape, tensors[self.B].shape

    @property
    def turned_shapes(self) -> tuple[torch.Size, torch.Size]:
        (rows, k), (n, _) = self.shapes
        return torch.Size((rows, n)), torch.Size((k, rows))


def _pairs(injection: Injection) -> Iterator[_Pair]:
    for path, adapter in injection.adapters.items():
        if not isinstance(adapter, ExpertsAdapter):
            continue
        for name, prefix in adapter.prefixes.items():
            part = adapter.part(name)
            if isinstance(part, ExpertLoRA):
                stem = f"{PREFIX}model.{path}.{prefix}"
                A, B = part.tensor("lora_A"), part.tensor("lora_B")
                yield _Pair(f"{stem}lora_A.weight", f"{stem}lora_B.weight", part.count, (A.shape, B.shape))


# From then on PEFT has A read what experts are given.
_FIRST_RIGHT = (0, 19, 1)


def turn_experts(
    injection: Injection, tensors: dict[str, Tensor], fields: Mapping[str, Any], source: Path, told: bool | None = None
) -> None:
    """Gives A and B of experts their places, in a file in which they have those of each other, in place.

    Before 0.19.1 PEFT took the first of the two dimensions of an expert's weight for its input, whichever it is: A then
    reads what the expert gives, s·(A[e]ᵀ B[e]ᵀ) is what is added, and all that differs are the shapes. told: whether
    they are turned; None goes by the shapes, which tell for all of a file, and where each expert's matrix is square by
    the peft_version of its config. fields: that config's.
    Raises ValueError for square matrices of a PEFT whose version does not tell.
    """
    pairs = [pair for pair in _pairs(injection) if {pair.A, pair.B} <= tensors.keys()]
    fits = [[pair.shapes_in(tensors) == shapes for shapes in (pair.shapes, pair.turned_shapes)] for pair in pairs]
    told_by_shape = {turned for right, turned in fits if right != turned}
    if told is None and told_by_shape:
        told = told_by_shape == {True}
    elif told is None:
        told = False
        square = next((pair.A for pair, (right, _) in zip(pairs, fits, strict=True) if right), None)
        # Every config of PEFT's has an auto_mapping; its version since 0.18.
        if square is not None and "auto_mapping" in fields and _version(fields) < _FIRST_RIGHT:
            raise ValueError(
                f"{source}: {square} is of experts with square matrices, and PEFT before 0.19.1 had A and B of experts "
                f"in each other's places, got peft_version {fields.get('peft_version')!r}: say which it is with "
                "load_adapter(..., swapped_experts=True), or False where transformers had set them right"
            )
    for pair, (_, turned) in zip(pairs, fits, strict=True):
        if not told or not turned:  # what fits in no way is told of by the check of shapes
            continue
        out_first, in_last = tensors[pair.A], tensors[pair.B]
        # [E·r, out] and [in, r·E] as [E·r, in] and [out, r·E].
        tensors[pair.A] = in_last.T.unflatten(0, (-1, pair.experts)).transpose(0, 1).flatten(0, 1)
        tensors[pair.B] = out_first.unflatten(0, (pair.experts, -1)).permute(2, 1, 0).flatten(1)


def _version(fields: Mapping[str, Any]) -> tuple[int, ...]:
    """The numbers of the PEFT that wrote a config, none where it does not say it."""
    found = re.match(r"(\d+)\.(\d+)\.(\d+)", str(fields.get("peft_version") or ""))
    return tuple(map(int, found.groups())) if found else ()
