"""What the pool remembers of an adapter: where it comes from, where it lies, who holds it."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from ..operators.multi_adapter_linear.batch import PAGE_RANKS, FormEntry
from .loader import LoadedAdapter

# The offsets in the arena of pages that were taken, by their size: thousands of adapters have hundreds each.
Taken = dict[int, "array[int]"]


def pair_key(A: Tensor, B: Tensor) -> tuple[object, ...]:
    """Equal for pairs of equal content. Shapes: A [r, in]; B [out, r]."""
    return (*A.shape, B.shape[0], _digest(A), _digest(B))


def _digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.detach().float().cpu().contiguous().numpy().tobytes()).hexdigest()


@dataclass
class Factors:
    """A pair (A, B) that several adapters share, each layer taking its own slice."""

    group: int
    pair: FormEntry
    taken: Taken
    users: int = 0


class Content(NamedTuple):
    """What one layer of an adapter puts into the arena, in the arena's dtypes.

    Shapes: factors A [R, K] and Bᵀ [R, N], or none where they are shared; vectors d [R], h, g and β − b0 [N], None for
    what it has not, and for an h that is g (`tied`). Of weights of experts R is that of all of them, and so is N in the
    vectors. page_ranks: rank rows of a page.
    """

    factors: Sequence[Tensor]
    vectors: Sequence[Tensor | None]
    scaling: float
    tied: bool
    page_ranks: int = PAGE_RANKS

    @property
    def bytes(self) -> int:
        return sum(tensor.nbytes for tensor in (*self.factors, *self.vectors) if tensor is not None)


class Arrival(NamedTuple):
    """What an adapter puts into the arena. Shapes: the pair that it shares, if it does, A [R, K] and Bᵀ [R, N]."""

    layers: dict[str, Content]
    pair: Sequence[Tensor]
    key: tuple[object, ...] | None  # of its pair


@dataclass
class Entry:
    """A registered adapter, and where it lies while it is resident."""

    name: str
    identity: str
    source: Path | None
    root: Path | None  # where the source must lie, then and now
    loaded: LoadedAdapter | None  # kept where there is no directory to read it from again
    true_bytes: int = 0
    slot: int = -1
    group: int = -1
    shared_key: tuple[object, ...] | None = None
    taken: Taken = field(default_factory=dict)
    paths: tuple[str, ...] = ()  # of the layers that it adapts; the same object for all that adapt the same
    kept: tuple[str, ...] = ()  # the paths of weights of experts and of routers that it adapts
    holders: int = 0
    pinned: bool = False
    retired: bool = False
    used_at: int = 0

    @property
    def resident(self) -> bool:
        return self.slot >= 0


class AdapterInfo(NamedTuple):
    """What the pool knows of an adapter. bytes: of its tensors in the pool's dtypes, without what others share."""

    name: str
    identity: str
    bytes: int
    resident: bool
    pinned: bool
    in_use: bool
