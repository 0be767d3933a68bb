"""Where in a transformer block a module is, for methods that adapt more than linear layers."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from ..layers.layer import AdapterLayer


def block_of(path: str) -> str:
    """The path of the block that a norm is in: that of its parent."""
    return path.rpartition(".")[0]


def norm_of(path: str, norms: Iterable[str]) -> str:
    """The path of the norm whose block holds the module at `path`. Raises ValueError where there is none, or more."""
    found = [norm for norm in norms if path.startswith(block_of(norm) + ".") and block_of(norm)]
    if len(found) != 1:
        what = "has no norm" if not found else f"has the norms {', '.join(found)}"
        raise ValueError(
            f"target_modules: {path} {what} in its block among the targets: name one, the norm whose input or output "
            "the adapter needs"
        )
    return found[0]


def width(layer: AdapterLayer) -> int:
    """The features of what a module gives, as the last of its linear layers, convolutions, norms or embeddings tells.

    Raises ValueError for a module without any.
    """
    for module in reversed(list(layer.base_layer.modules())):
        for kind, size in ((nn.Linear, "out_features"), (nn.Conv2d, "out_channels"), (nn.Embedding, "embedding_dim")):
            if isinstance(module, kind):
                return int(getattr(module, size))
        if isinstance(module, nn.LayerNorm):
            return int(module.normalized_shape[-1])
        if type(module).__name__ == "Conv1D":  # transformers'
            return int(module.weight.shape[1])
    raise ValueError(f"{type(layer.base_layer).__name__} has no layer that tells how many features it gives")
