"""Weights of experts in configs and files: by the names that their layers had, in older layouts, and their ranks.

PEFT has a rule for configs and files of older transformers. Up to transformers 4 every expert was a module of linear
layers, and the router was one; from 5 on the weights of all experts are two stacked parameters, gate and up together in
one of them.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..layers.experts import AdapterExperts, ExpertsAdapter, experts_per_token
from ..layers.kinds import AdapterParameter
from ..layers.layer import AdapterLayer
from ..layers.linear import AdapterLinear
from ..methods import AdapterConfig, LoRAConfig, patterns
from ..methods.config import pattern_value
from ..methods.experts import ExpertLoRA
from .adapted import PREFIX, Injection
from .targets import base_modules, ends_of, is_excluded, is_listed, layer_indices, parameter_targets, saved_whole
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


class Old(NamedTuple):
    """What one of the old names stands for at one place of a model.

    key: of the parameter, with the path of its module. paths: as it is spelled now and was, those of the layer that has
    become a part of it, for experts without the number. experts: how many of these there were, 0 for a router.
    """

    name: str
    key: str
    paths: Sequence[str]
    experts: int

    def layers(self) -> Iterator[str]:
        """The paths of all layers that it stands for. PEFT asks an expression for that without a number."""
        yield from self.paths
        for stem in [path.rpartition(".")[0] for path in self.paths] if self.experts else ():
            yield from (f"{stem}.{e}.{self.name}" for e in range(self.experts))


def with_experts(
    model: nn.Module, config: AdapterConfig, modules: Mapping[str, nn.Module] | None = None
) -> AdapterConfig:
    """The config with target_parameters in the place of the old names of experts and routers: PEFT's rule.

    "all-linear" stands for all of them, a list or an expression for those that it names, and a name with a path before
    it for those there alone: of shared experts and other linear layers that are called so nothing changes, nor is
    taken what exclude_modules, layers_to_transform or modules_to_save leave out. gate and up, which are one product
    now, have twice the rank and lora_alpha in it, so that each has its own of both; rank_pattern and alpha_pattern may
    name all by their old names. modules: the model's by path as they were before any was wrapped; by default
    `base_modules`. Raises ValueError where one of these two is taken without the other, or has another rank.
    """
    bare, names = inside(model), names_in_layers(model)
    if not names or not isinstance(config, LoRAConfig) or AdapterExperts not in config.layer_kinds:
        return config
    modules = base_modules(bare) if modules is None else modules
    everything = list(old_layers(names, modules))
    found = _named(everything, config, modules)
    if not found:
        return config
    fused = [old for old in names if names[old] == FUSED]
    given = {key: [old.name for old in found if old.key == key] for key in dict.fromkeys(old.key for old in found)}
    for key, olds in given.items():
        if key.endswith(f".{FUSED}") and olds != fused:
            missing = ", ".join(old for old in fused if old not in olds)
            raise ValueError(
                f"target_modules names {', '.join(olds)} without {missing}, and both are one weight of the experts, "
                f"{key}: name both, or none"
            )
    taken = set()
    for new in {names[old.name] for old in found}:
        keys = {old.key for old in everything if names[old.name] == new}
        taken |= {new} if keys <= given.keys() else keys & given.keys()
    targets: list[str] | str | None = config.target_modules
    if not isinstance(targets, str):
        known, gone = {end for path in modules for end in ends_of(path)}, {old.name for old in found}
        targets = [t for t in targets or () if t in known or t.rpartition(".")[2] not in gone]
    elif targets.lower() != "all-linear":
        named = any(patterns.fullmatch("target_modules", targets, path) for path in modules)
        targets = targets if named else []
    ranks, alphas = _old_ranks(found, config)
    if any(old.name in fused for old in found):
        ranks.setdefault(rf".*\.{FUSED}", len(fused) * config.r)
        alphas.setdefault(rf".*\.{FUSED}", len(fused) * config.lora_alpha)
    return replace(
        config,
        target_parameters=sorted({*(config.target_parameters or ()), *taken}),
        target_modules=targets,
        rank_pattern=ranks,
        alpha_pattern=alphas,
    )


def old_path(path: str, names: Mapping[str, str]) -> str:
    """The path that a module had: Mixtral's blocks were called so."""
    return path.replace(".mlp.", ".block_sparse_moe.") if "w1" in names else path


def old_layers(names: Mapping[str, str], modules: Mapping[str, nn.Module]) -> Iterator[Old]:
    """All that the old names stand for in a model: weights of experts, and routers that are no linear layers."""
    for path, module in modules.items():
        base = getattr(module, "base_layer", module)
        if isinstance(base, nn.Linear):
            continue
        for old, new in names.items():
            holder, _, leaf = f".{new}".rpartition(".")
            weight = base._parameters.get(leaf)
            if weight is None or not f".{path}".endswith(holder):
                continue
            end, count = ("", 0) if holder else (f".{old}", len(weight))
            spelled = dict.fromkeys((path, old_path(path, names)))
            yield Old(old, f"{path}.{leaf}", [path + end for path in spelled], count)


def _named(everything: Iterable[Old], config: LoRAConfig, modules: Mapping[str, nn.Module]) -> list[Old]:
    """Those that config.target_modules takes."""
    targets, indices = config.target_modules, layer_indices(config)
    everywhere = isinstance(targets, str) and targets.lower() == "all-linear"
    listed = set() if isinstance(targets, str) else {re.sub(r"(^|\.)\d+\.(?=\w+$)", r"\1", t) for t in targets or ()}
    whole = saved_whole(modules, config) if config.modules_to_save else set()

    def takes(old: Old) -> bool:
        if old.key.rpartition(".")[0] in whole or any(is_excluded(path, config) for path in old.paths):
            return False
        if isinstance(targets, str):
            return everywhere or any(patterns.fullmatch("target_modules", targets, path) for path in old.layers())
        return any(is_listed(path, listed, config, indices) for path in old.paths)

    return [old for old in everything if takes(old)]


def _old_ranks(found: Iterable[Old], config: LoRAConfig) -> tuple[dict[str, int], dict[str, float]]:
    """rank_pattern and alpha_pattern with what they say of layers by their old names, by the keys of today.

    Raises ValueError for layers that are one product now and would have two ranks or lora_alphas.
    """
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    parts: dict[str, list[Old]] = {}
    for old in found:
        parts.setdefault(old.key, []).append(old)
    fields: tuple[tuple[str, Any, Any, Any], ...] = (
        ("rank_pattern", config.rank_pattern, ranks, config.r),
        ("alpha_pattern", config.alpha_pattern, alphas, config.lora_alpha),
    )
    for key, olds in parts.items():
        for field, pattern, values, default in fields:
            if not pattern or pattern_value(field, pattern, key, None) is not None:
                continue
            own: list[Any] = [
                next(filter(None, [pattern_value(field, pattern, path, None) for path in old.paths]), None)
                for old in olds
            ]
            if own == [None] * len(own):
                continue
            own = [value or default for value in own]
            if len(set(own)) > 1:
                raise ValueError(
                    f"{field} gives {', '.join(f'{old.name} {value}' for old, value in zip(olds, own, strict=True))}, "
                    f"and they are one weight of the experts, {key}: give them the same"
                )
            values[key] = sum(own)
    return {**ranks, **config.rank_pattern}, {**alphas, **config.alpha_pattern}


def unused_ranks(
    model: nn.Module, config: LoRAConfig, layers: Mapping[str, AdapterLayer], modules: Mapping[str, nn.Module]
) -> dict[str, list[str]]:
    """The keys of rank_pattern and alpha_pattern that no layer of an adapter is called, by field; empty where all are.

    modules: the model's by path as they were before any was wrapped.
    """
    paths = [
        key
        for path, layer in layers.items()
        for key in ([f"{path}.{n}" for n in layer.parameter_names] if isinstance(layer, AdapterExperts) else [path])
    ]
    paths += [f"{path}.weight" for path, layer in layers.items() if isinstance(layer, AdapterParameter)]
    paths += [path for old in old_layers(names_in_layers(model), modules) for path in old.paths]
    found = {}
    for field, pattern in (("rank_pattern", config.rank_pattern), ("alpha_pattern", config.alpha_pattern)):
        if unused := [key for key in pattern if not any(pattern_value(field, {key: True}, p, False) for p in paths)]:
            found[field] = unused
    return found


def with_shared_ranks(model: nn.Module, config: AdapterConfig, own: AdapterConfig) -> AdapterConfig:
    """The config with the ranks that share_rank means for weights of experts in its rank_pattern.

    own: the config as the user gave it, whose rank_pattern goes before, by whichever names. Raises ValueError where
    target_parameters names no weights of experts, or their model does not say how many of them a token goes to.
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
        if key not in config.rank_pattern and not pattern_value("rank_pattern", own.rank_pattern, key, 0)
    }
    return replace(config, rank_pattern={**ranks, **config.rank_pattern})


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
    Raises ValueError for square matrices of a PEFT whose version does not tell, and where shapes tell otherwise.
    """
    pairs = [pair for pair in _pairs(injection) if {pair.A, pair.B} <= tensors.keys()]
    fits = [[pair.shapes_in(tensors) == shapes for shapes in (pair.shapes, pair.turned_shapes)] for pair in pairs]
    told_by_shape = {turned for right, turned in fits if right != turned}
    if told is not None and told_by_shape - {told}:
        wrong = next(
            pair.A for pair, (right, turned) in zip(pairs, fits, strict=True) if (right, turned) == (told, not told)
        )
        raise ValueError(
            f"{source}: swapped_experts={told}, and by its shape {wrong} is {'' if told else 'not '}where it belongs: "
            "leave swapped_experts out, the shapes tell"
        )
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
