"""Names of projections that read the same input."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import TypeVar

from torch import nn

LayerType = TypeVar("LayerType", bound=nn.Module)

# Names of sibling projections that read the same input.
SIBLINGS = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q_lin", "k_lin", "v_lin"),
    ("to_q", "to_k", "to_v"),
    ("q", "k", "v"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("wi_0", "wi_1"),
)


# In modules of these names the queries read another input than keys and values.
CROSS_ATTENTION = re.compile(r"cross|encoder_?attn|encdec|attn2", re.IGNORECASE)


def readers_of_one_input(parent: str) -> Iterator[tuple[str, ...]]:
    """The names of layers that read one and the same input in the module at the path `parent`, set by set."""
    cross = CROSS_ATTENTION.search(parent)
    for names in SIBLINGS:
        yield names[1:] if cross and len(names) == 3 else names


def siblings(path: str) -> tuple[str, ...]:
    """The names, the last parts of their paths, of the layers that read what the layer at `path` reads, its own too."""
    parent, _, name = path.rpartition(".")
    return next((names for names in readers_of_one_input(parent) if name in names), (name,))


def groups(modules: Iterable[tuple[str, nn.Module]], kind: type[LayerType]) -> list[list[LayerType]]:
    """The layers of a kind that read the same input, as the names of siblings in these modules tell: two and more.

    A group checks that at run time.
    """
    found = []
    for path, parent in modules:
        for names in readers_of_one_input(path):
            children = [getattr(parent, name, None) for name in names]
            layers = [child for child in children if isinstance(child, kind)]
            if len(layers) > 1:
                found.append(layers)
    return found
