"""Adapter forms as views of the pages on which their factors lie."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby, pairwise

import torch
from torch import Tensor

from .batch import PAGE_RANKS, FormEntry, FormTables, SlotForm, SortedTokens
from .eager import FormRun


def runs_of(tables: FormTables, tokens: SortedTokens, shape: tuple[int, int]) -> list[FormRun]:
    """The runs that the kernels' tables describe, for compiled code: it carries tensors alone. `shape` is [N, K]."""
    slots = torch.empty_like(tokens.adapters)
    slots[tokens.order] = tokens.adapters
    groups = dict(zip(tokens.adapters.tolist(), tokens.groups.tolist(), strict=True))
    found, start = [], 0
    for slot, members in groupby(slots.tolist()):
        stop = start + sum(1 for _ in members)
        if slot >= 0:
            found.append(FormRun(start, stop, _form(tables, slot, groups[slot], shape)))
        start = stop
    return found


def _form(tables: FormTables, slot: int, group: int, shape: tuple[int, int]) -> SlotForm:
    vectors = (tables.mid_scales, tables.out_scales, tables.base_scales, tables.added_biases)
    entry = FormEntry(
        int(tables.ranks[group]),
        tables.A_pages[group].tolist(),
        tables.B_pages[group].tolist(),
        int(tables.A_strides[group]),
        int(tables.B_strides[group]),
        float(tables.scalings[slot]),
        *(-1 if vector is None else int(vector[slot]) for vector in vectors),
    )
    return slot_form(tables.pages, tables.vectors, shape, entry)


def slot_form(pages: Tensor, vectors: Tensor, shape: tuple[int, int], entry: FormEntry) -> SlotForm:
    """The form at an entry, as views. `shape` is the weight's, [N, K]."""
    n, k = shape
    rank, A_pages, B_pages, A_stride, B_stride, scaling, *places = entry
    mid, h, g, beta = (
        None if first < 0 else vectors[first : first + size]
        for first, size in zip(places, (rank, n, n, n), strict=True)
    )
    # One adapter's pages of A and of B are of different sizes and have their gaps at different ranks: what reads the
    # parts multiplies one by the other.
    cuts = part_cuts(rank, (A_pages, A_stride), (B_pages, B_stride))
    return SlotForm(
        rank_rows(pages, cuts, A_pages, A_stride, k),
        rank_rows(pages, cuts, B_pages, B_stride, n),
        scaling,
        mid,
        g if entry.out_scale == entry.base_scale else h,
        g,
        beta,
    )


def part_cuts(rank: int, *sides: tuple[Sequence[int], int], page_ranks: int = PAGE_RANKS) -> list[int]:
    """The ranks at which parts begin, and the last one's end: before each page that, on any side, has a gap before it.

    sides: (pages, stride) of each factor. page_ranks: rank rows of a page.
    """
    starts = [
        first
        for page, first in enumerate(range(0, rank, page_ranks))
        if not page or any(pages[page] - pages[page - 1] != page_ranks * stride for pages, stride in sides)
    ]
    return [*starts, rank]


def rank_rows(
    memory: Tensor, cuts: Sequence[int], pages: Sequence[int], stride: int, width: int, page_ranks: int = PAGE_RANKS
) -> tuple[Tensor, ...]:
    """Rank rows [R, width] as views of the parts between the cuts."""
    offset = memory.storage_offset()
    return tuple(
        memory.as_strided((last - first, width), (stride, 1), offset + pages[first // page_ranks])
        for first, last in pairwise(cuts)
    )
