"""What all layouts come down to: the name of a tensor says a component, a module in it, and a role there."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from torch import Tensor

from ...checks import shown
from ...methods.config import pattern_of
from ..adapted import PREFIX
from ..untrusted import one_line

# What a tensor can be to its module, as an error calls it.
ROLES = {
    "A": "A (lora_A, down)",
    "B": "B (lora_B, up)",
    "embedding_A": "an embedding's A",
    "embedding_B": "an embedding's B",
    "alpha": "alpha",
    "magnitude": "DoRA's scale",
    "bias": "a bias of B",
}

# The tensors of an adapter by their role, as PEFT ends their names.
SUFFIXES = {
    "A": "lora_A.weight",
    "B": "lora_B.weight",
    "embedding_A": "lora_embedding_A",
    "embedding_B": "lora_embedding_B",
    "magnitude": "lora_magnitude_vector",
    "bias": "lora_B.bias",
}


class Named(NamedTuple):
    """What a tensor's name says. component: of a pipeline ("unet"), "" where the file says none. module: as the file
    spells it. role: one of ROLES."""

    component: str
    module: str
    role: str


class Given(NamedTuple):
    """A tensor of a file, by the name that it has there."""

    name: str
    tensor: Tensor


# The tensors of one module by their roles, and those of a component by its modules.
Layer = dict[str, Given]
Component = dict[str, Layer]


class Layout(NamedTuple):
    """How a library names the tensors of an adapter.

    title: whose it is. mark: what tells a name of it from those of the layouts before it. named: what a name says, None
    for one that says nothing in this layout. foreign: why a name that says nothing is refused, by what is in it. flat:
    whether modules have underscores for dots there.
    """

    title: str
    mark: re.Pattern[str]
    named: Callable[[str], Named | None]
    foreign: Mapping[str, str] = MappingProxyType({})
    flat: bool = False


class Spelled(NamedTuple):
    """An adapter in PEFT's spelling: the fields of adapter_config.json and the tensors by PEFT's names."""

    fields: dict[str, Any]
    tensors: dict[str, Tensor]


def components_of(layout: Layout, tensors: Mapping[str, Tensor], source: Path) -> dict[str, Component]:
    """The tensors of a file by component, module and role.

    Raises ValueError for a name that the layout does not have, one that is there in two spellings, and a module whose
    tensors are no whole adapter.
    """
    found: dict[str, Component] = {}
    for name, tensor in tensors.items():
        said = layout.named(name)
        if said is None:
            why = next((why for part, why in layout.foreign.items() if part in name), "it belongs to no LoRA there")
            raise ValueError(f"{source}: tensor {shown(name)} cannot be read in the layout of {layout.title}: {why}")
        layer = found.setdefault(said.component, {}).setdefault(said.module, {})
        if said.role in layer:
            raise ValueError(
                f"{source}: {shown(layer[said.role].name)} and {shown(name)} are both {ROLES[said.role]} of one "
                "module: take one of them out"
            )
        layer[said.role] = Given(name, tensor)
    for layers in found.values():
        for layer in layers.values():
            _check_whole(layer, source)
    return found


def _check_whole(layer: Layer, source: Path) -> None:
    """Raises ValueError unless these are the tensors of one module's LoRA or DoRA, in shapes that go together."""
    first = next(iter(layer.values())).name
    down, up = factors = ("embedding_A", "embedding_B") if {"embedding_A", "embedding_B"} & {*layer} else ("A", "B")
    for role in factors:
        if role not in layer:
            raise ValueError(
                f"{source}: {shown(first)} must have {ROLES[role]} of its module beside it, and the file has none: the "
                "adapter is damaged, save it again"
            )
    others = {*layer} - {*factors, "alpha", *(("magnitude", "bias") if down == "A" else ())}
    if others:
        raise ValueError(
            f"{source}: {shown(layer[min(others)].name)} cannot be {ROLES[min(others)]} of an embedding's adapter: "
            "take it out"
        )
    A, B = layer[down].tensor, layer[up].tensor
    if A.dim() not in ((2,) if down != "A" else (2, 4)) or not A.shape[0]:
        raise ValueError(
            f"{source}: {shown(layer[down].name)} must have shape [r, in], or [r, in, height, width] of a convolution, "
            f"got {tuple(A.shape)}"
        )
    if B.dim() != A.dim() or B.shape[1] != A.shape[0] or any(size != 1 for size in B.shape[2:]):
        ones = ", 1, 1" if A.dim() == 4 else ""
        raise ValueError(
            f"{source}: {shown(layer[up].name)} must have shape [out, {A.shape[0]}{ones}] beside "
            f"{shown(layer[down].name)}, got {tuple(B.shape)}"
        )
    if "alpha" in layer:
        alpha_of(layer, source)
    if "magnitude" in layer:
        name, scale = layer["magnitude"]
        if scale.numel() != B.shape[0] or scale.shape[:1] != B.shape[:1]:
            raise ValueError(
                f"{source}: {shown(name)} must have shape [{B.shape[0]}] or [{B.shape[0]}, 1], a magnitude for each "
                f"output, got {tuple(scale.shape)}: one for each input (wd_on_out=False) is not DoRA's; merge the "
                "adapter with the library that wrote it"
            )
    if "bias" in layer and layer["bias"].tensor.shape != B.shape[:1]:
        name, bias = layer["bias"]
        raise ValueError(f"{source}: {shown(name)} must have shape [{B.shape[0]}], got {tuple(bias.shape)}")


def rank_of(layer: Layer) -> int:
    """The rank of one module's adapter."""
    return (layer["A"] if "A" in layer else layer["embedding_A"]).tensor.shape[0]


def alpha_of(layer: Layer, source: Path) -> float:
    """The lora_alpha that a file has for a module: the scale is alpha / r. What the file has as a whole number is an
    int, all else a float. Raises ValueError for no single number.
    """
    name, alpha = layer["alpha"]
    if alpha.numel() != 1 or alpha.dim() > 1:
        raise ValueError(f"{source}: {shown(name)} must be one number, got a tensor of shape {tuple(alpha.shape)}")
    value: float = alpha.item()
    if not value or not math.isfinite(value):
        raise ValueError(
            f"{source}: {shown(name)} must be a number other than 0, which some readers take for the rank and others "
            f"for no adapter, got {value!r}"
        )
    return value


def lora_fields(layers: Component, source: Path, selection: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a LoRA's or a DoRA's adapter_config.json.

    Ranks are those of the shapes, and alpha is r where none is said. layers: by the paths that the model has for its
    modules. selection: fields that select these. Raises ValueError where some modules have a magnitude, or a bias
    behind B, and others none: a config says that of all.
    """
    for role in ("magnitude", "bias"):
        having = [path for path, layer in layers.items() if role in layer]
        lacking = [path for path, layer in layers.items() if role not in layer]
        if having and lacking:
            raise ValueError(
                f"{source}: all modules must have {ROLES[role]} or none, got one for {shown(having[0])} and none for "
                f"{shown(lacking[0])}"
            )
    ranks = {path: rank_of(layer) for path, layer in layers.items()}
    alphas = {path: alpha_of(layer, source) if "alpha" in layer else ranks[path] for path, layer in layers.items()}
    r, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    first = next(iter(layers.values()))
    return {
        "peft_type": "LORA",
        "r": r,
        "lora_alpha": alpha,
        "rank_pattern": pattern_of(ranks, int(r)),
        "alpha_pattern": pattern_of(alphas, alpha),
        "use_dora": "magnitude" in first,
        "lora_bias": "bias" in first,
        "inference_mode": True,
        **selection,
    }


def peft_tensors(layers: Component) -> dict[str, Tensor]:
    """The tensors by their names in PEFT's file; layers by module path."""
    return {
        f"{PREFIX}model.{path}.{SUFFIXES[role]}": given.tensor.flatten() if role == "magnitude" else given.tensor
        for path, layer in layers.items()
        for role, given in layer.items()
        if role in SUFFIXES
    }


def layers_of_peft(spelled: Spelled, source: Path, target: str) -> Component:
    """The layers of a PEFT adapter by module path, for a layout that holds LoRA and DoRA alone: the target.

    Raises ValueError for any other method, and for tensors that are no part of it.
    """
    kind = spelled.fields.get("peft_type")
    if kind != "LORA":
        raise ValueError(
            f"{source}: peft_type must be LORA to be written in the layout of {target}, which holds no other, got "
            f"{shown(kind)}: make a LoRA of it first, with --to lora"
        )
    layers: Component = {}
    for name, tensor in spelled.tensors.items():
        path = name.removeprefix(f"{PREFIX}model.")
        role = next((role for role, suffix in SUFFIXES.items() if path.endswith(f".{suffix}")), None)
        if role is None or path == name:
            raise ValueError(
                f"{source}: tensor {one_line(name, 200)} has no place in the layout of {target}, which holds the "
                "factors of LoRA and DoRA's magnitude alone: merge the adapter into its model instead"
            )
        layers.setdefault(path.removesuffix(f".{SUFFIXES[role]}"), {})[role] = Given(name, tensor)
    if not layers:
        raise ValueError(f"{source}: the adapter must have tensors to be written in the layout of {target}, got none")
    for layer in layers.values():
        _check_whole(layer, source)
    return layers


def listed(names: Iterable[str]) -> str:
    """Names as an error lists them."""
    return one_line(", ".join(shown(name) for name in names), 300)
