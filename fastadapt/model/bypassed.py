"""Layers that an adapter cannot be right on: their own forward never runs, or is not the product with one matrix."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from torch import nn

from ..layers.layer import AdapterLayer

_READS = "reads its weight and never calls it"


class _Bypass(NamedTuple):
    """Modules by the name of a class that they are of, and which of their layers they treat so."""

    kind: re.Pattern[str]
    children: tuple[str, ...]
    what: str = _READS


_BYPASSES = (
    _Bypass(re.compile("MultiheadAttention"), ("out_proj",)),
    # The slow path calls out_proj, the kernels that run where they are installed do not.
    _Bypass(re.compile(r"\w*(Mamba|Bamba|FalconH1)\w*(Mixer|Layer)\w*"), ("dt_proj", "out_proj")),
    _Bypass(re.compile("WavLMAttention"), ("q_proj", "k_proj", "v_proj", "out_proj")),
    _Bypass(re.compile("MobileBertLMPredictionHead"), ("dense", "decoder")),
    _Bypass(re.compile("LongcatFlashTopkRouter"), ("classifier",)),
)
# Subclasses of nn.Linear that give a tuple.
_TUPLES = re.compile("PhimoeTopKRouter|Llama4Router")
# And those with a block of the weight for each group of x.
_GROUPED = re.compile(r"\w*GroupedLinear")


def why_refused(path: str, modules: Mapping[str, nn.Module]) -> str:
    """Why no adapter on the module at `path` can be right, "" where nothing speaks against it.

    modules: those of the model by path, the model itself by "" where it is there.
    """
    module = modules[path]
    module = module.base_layer if isinstance(module, AdapterLayer) else module
    if _is_kind(module, _TUPLES):
        return f"a {type(module).__name__} gives a tuple, and an adapter's form goes onto one tensor"
    if _is_kind(module, _GROUPED):
        return f"a {type(module).__name__} has a matrix for each group of its input, and an adapter's form is for one"
    parent_path, _, name = path.rpartition(".")
    parent = modules.get(parent_path)
    for kind, children, what in _BYPASSES:
        if name in children and parent is not None and _is_kind(parent, kind):
            return f"the {type(parent).__name__} around it {what}: an adapter would not run"
    return ""


def _is_kind(module: nn.Module, pattern: re.Pattern[str]) -> bool:
    return any(pattern.fullmatch(kind.__name__) for kind in type(module).__mro__)


def expert_weights(modules: Mapping[str, nn.Module]) -> list[str]:
    """The paths of weights of experts that are stacked in one tensor, which are no layers."""
    return [
        f"{path}.{name}"
        for path, module in modules.items()
        for base in [getattr(module, "base_layer", module)]
        if "expert" in f"{path} {type(base).__name__}".lower()
        for name, parameter in base._parameters.items()
        if parameter is not None and parameter.dim() == 3
    ]
