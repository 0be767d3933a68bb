"""What an adapter's forms are in the arena: pages of rank rows in the pool's dtype, and fp32 vectors."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from ..model.untrusted import AdapterError
from ..operators.multi_adapter_linear.batch import PAGE_RANKS, FormEntry, added_bias
from ..operators.multi_adapter_linear.pages import part_cuts, rank_rows
from ..reference import AdapterForm
from .arena import Arena
from .entries import Content, Taken

_VECTOR_BYTES = 4  # scales and biases are fp32, whatever the factors are: in bf16 a g near 1 would be 1


class Shelf:
    """Puts contents into an arena and takes them out. dtype: of the factors. Not thread-safe: its owner has the lock.

    Shapes: pages and vectors [elements], the arena's memory in the factors' dtype and in fp32.
    """

    @torch.inference_mode(False)  # its views are written in any mode
    def __init__(self, arena: Arena, dtype: torch.dtype) -> None:
        self.arena, self.dtype = arena, dtype
        self.pages = arena.memory.view(dtype)
        self.vectors = arena.memory.view(torch.float32)

    def content(
        self, name: str, form: AdapterForm, base_bias: Tensor | None, *, shared: bool, page_ranks: int = PAGE_RANKS
    ) -> Content:
        """What an adapter's form for one layer puts into the arena. Raises AdapterError for what it cannot hold."""
        mid, factors = form.mid_scale, list[Tensor]()
        if not shared:
            down, up = form.A, form.B.T
            if mid is not None:  # d goes into A, and what it switches off stays out
                used = mid != 0
                down, up, mid = down[used] * mid[used, None], up[used], None
            factors = self.rows((down, up), name)
        scaling, out_scale = form.scaling, form.out_scale
        if not isinstance(out_scale, Tensor) or out_scale.dim() == 0:
            scaling *= float(out_scale)
        h = out_scale if isinstance(out_scale, Tensor) and out_scale.dim() else None
        tied = h is not None and h is form.base_scale
        vectors = (mid, None if tied else h, form.base_scale, added_bias(form.bias, base_bias))
        cast = (None if vector is None else _cast(vector, torch.float32, name) for vector in vectors)
        return Content(factors, list(cast), scaling, tied, page_ranks)

    def rows(self, factors: Sequence[Tensor], name: str) -> list[Tensor]:
        """Rank rows [R, width] in the arena's dtype. Raises AdapterError for values that this cannot hold."""
        return [_cast(rows, self.dtype, name) for rows in factors]

    def put(self, content: Content, pair: FormEntry | None, taken: Taken) -> FormEntry:
        """One layer's content in the arena, where its pair is if it shares one."""
        if pair is None:
            pair = self.put_pair(content.factors, taken, content.page_ranks)
        mid, h, g, added = (-1 if vector is None else self._put_vector(vector, taken) for vector in content.vectors)
        return pair._replace(
            scaling=content.scaling,
            mid_scale=mid,
            out_scale=g if content.tied else h,
            base_scale=g,
            added_bias=added,
        )

    def put_pair(self, pair: Sequence[Tensor], taken: Taken, page_ranks: int = PAGE_RANKS) -> FormEntry:
        """Factors A [R, K] and Bᵀ [R, N] in the arena, without scales."""
        A, B = pair
        A_pages, B_pages = (self._put_rows(rows, taken, page_ranks) for rows in (A, B))
        return FormEntry(A.shape[0], A_pages, B_pages, A.shape[1], B.shape[1])

    def give_back(self, taken: Taken) -> None:
        for size, offsets in taken.items():
            self.arena.give_back(size, offsets)
        taken.clear()

    def pair_sizes(self, pair: Sequence[Tensor]) -> list[tuple[int, int]]:
        """(bytes, count) of the pages of a pair that adapters share."""
        return [self._pages_of(rows, PAGE_RANKS) for rows in pair]

    def sizes(self, contents: Sequence[Content]) -> list[tuple[int, int]]:
        """(bytes, count) of the pages and vectors of contents, in the order in which they are taken."""
        found = []
        for content in contents:
            found += [self._pages_of(rows, content.page_ranks) for rows in content.factors]
            found += [(vector.nbytes, 1) for vector in content.vectors if vector is not None]
        return found

    def _pages_of(self, rows: Tensor, page_ranks: int) -> tuple[int, int]:
        return page_ranks * rows.shape[1] * self.dtype.itemsize, -(-rows.shape[0] // page_ranks)

    def _put_rows(self, rows: Tensor, taken: Taken, page_ranks: int) -> array[int]:
        """The first element of every page of rank rows [R, width]."""
        rank, width = rows.shape
        itemsize = self.dtype.itemsize
        pages = array("q", (offset // itemsize for offset in self._take(*self._pages_of(rows, page_ranks), taken)))
        cuts = part_cuts(rank, (pages, width), page_ranks=page_ranks)
        parts = rank_rows(self.pages, cuts, pages, width, width, page_ranks)
        for part, (first, last) in zip(parts, pairwise(cuts), strict=True):
            part.copy_(rows[first:last])
        return pages

    def _put_vector(self, vector: Tensor, taken: Taken) -> int:
        """The first element of a vector."""
        (offset,) = self._take(vector.nbytes, 1, taken)
        start = offset // _VECTOR_BYTES
        self.vectors[start : start + vector.numel()].copy_(vector)
        return start

    def _take(self, size: int, count: int, taken: Taken) -> list[int]:
        offsets = self.arena.take(size, count)
        taken.setdefault(size, array("q")).extend(offsets)
        return offsets


def _cast(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    result = tensor.detach().to(dtype)
    if not torch.isfinite(result).all():
        raise AdapterError(name, f"it has values that {dtype} cannot hold: give the pool a wider dtype")
    return result
