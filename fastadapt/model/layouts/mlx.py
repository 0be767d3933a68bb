"""MLX's layout: adapters.safetensors, whose factors are PEFT's turned round, and an adapter_config.json of its own.

    <path>.lora_a [in, r], <path>.lora_b [r, out], <path>.m [out] of DoRA; y = W0 x + scale · lora_bᵀ (lora_aᵀ x)

The scale stands in the config, the same for all modules. Source: ml-explore/mlx-lm `tuner/utils.py`, `tuner/lora.py`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...checks import shown
from .layout import Component, Given, Layer, Layout, Named, rank_of

FILE = "adapters.safetensors"

_ROLES = {"lora_a": "A", "lora_b": "B", "m": "magnitude"}


def _named(name: str) -> Named | None:
    module, _, leaf = name.rpartition(".")
    return Named("", module, _ROLES[leaf]) if module and leaf in _ROLES else None


MLX = Layout("MLX", re.compile(r"\.lora_[ab]$"), _named)


def turned(tensors: Mapping[str, Tensor], source: Path) -> dict[str, Tensor]:
    """The tensors with PEFT's shapes, A [r, in] and B [out, r]. Raises ValueError for factors of stacked experts."""
    found = {}
    for name, tensor in tensors.items():
        factor = name.endswith((".lora_a", ".lora_b"))
        if factor and tensor.dim() != 2:
            raise ValueError(
                f"{source}: {shown(name)} must have two dimensions, got {tuple(tensor.shape)}: adapters of experts, "
                "which MLX stacks in one tensor, are not supported"
            )
        found[name] = tensor.T.contiguous() if factor else tensor
    return found


def with_scale(layers: Component, fields: Mapping[str, Any], source: Path) -> Component:
    """The layers with the scale that MLX's config says, as the alpha of each. Raises ValueError for no scale."""
    kind = fields.get("fine_tune_type", "lora")
    if kind not in ("lora", "dora"):
        raise ValueError(f"{source}: fine_tune_type must be lora or dora, got {shown(kind)}")
    said = fields.get("lora_parameters")
    scale = said.get("scale") if isinstance(said, dict) else None
    if isinstance(said, dict) and "alpha" in said:
        raise ValueError(
            f"{source}: lora_parameters must have no alpha beside the scale, which versions of MLX multiply and others "
            f"do not, got {shown(said['alpha'])}: write the scale that it was trained with, and take alpha out"
        )
    if not isinstance(scale, (int, float)) or isinstance(scale, bool) or not scale:
        raise ValueError(f"{source}: lora_parameters must have a scale, a number other than 0, got {shown(scale)}")
    has_magnitudes = any("magnitude" in layer for layer in layers.values())
    if has_magnitudes != (kind == "dora"):
        raise ValueError(f"{source}: fine_tune_type must be dora where the file has magnitudes (.m), got {shown(kind)}")
    return {
        path: {
            **layer,
            "alpha": Given("lora_parameters.scale", torch.tensor(scale * rank_of(layer), dtype=torch.float64)),
        }
        for path, layer in layers.items()
    }


def as_embedding(layer: Layer) -> Layer:
    """A layer over nn.Embedding: PEFT calls its factors otherwise."""
    names = {"A": "embedding_A", "B": "embedding_B"}
    return {names.get(role, role): given for role, given in layer.items()}
