"""Which token goes through which adapter, and where the adapters lie: what multi_adapter_linear reads.

A slot is where one resident adapter is entered; -1 stands for the base model. A factor group is a pair (A, B) on pages:
an adapter's own, or one that several adapters share (VeRA).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate, groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Rank rows of a factor that lie together.
PAGE_RANKS = 8


class Run(NamedTuple):
    """Tokens start to stop of a batch, one behind the other, of the adapter in one slot."""

    start: int
    stop: int
    slot: int


class SortedTokens(NamedTuple):
    """The tokens of a batch by factor group, then by adapter, the base model's first; all int32, their sizes fixed by
    those of the batch, so that the launches do not depend on who is in it.

    Shapes: order [M], the token at each place; adapters [M] and groups [M], its slot and its factor group, -1 for the
    base model; starts [rows + 1], where each run of places of one group begins, then M for all that is left.
    """

    order: Tensor
    adapters: Tensor
    groups: Tensor
    starts: Tensor


class AdapterBatch:
    """The adapter of each token of a batch: made once a forward pass, read by every layer.

    adapter_ids: for each row the slot of its adapter, -1 for the base model. tokens: how many tokens a row has, one
    behind the other. groups: the factor group of each row; by default each slot's own, of the same number.
    Raises ValueError for an id below -1 or as many groups as there are not rows.
    """

    def __init__(self, adapter_ids: Sequence[int], tokens: int = 1, groups: Sequence[int] | None = None) -> None:
        self.adapter_ids = tuple(adapter_ids)
        self.groups = self.adapter_ids if groups is None else tuple(groups)
        self.tokens = tokens
        if any(slot < -1 for slot in self.adapter_ids):
            raise ValueError(f"adapter_ids must be slots, or -1 for the base model, got {min(self.adapter_ids)}")
        if len(self.groups) != len(self.adapter_ids):
            raise ValueError(f"groups must have one entry a row, got {len(self.groups)} for {len(self.adapter_ids)}")
        self.plans: dict[Any, Any] = {}  # of the eager implementation, by layer
        self._sorted: dict[torch.device, SortedTokens] = {}
        self.runs: list[Run] = []
        row = 0
        for slot, members in groupby(self.adapter_ids):
            stop = row + sum(1 for _ in members)
            if slot >= 0:
                self.runs.append(Run(row * tokens, stop * tokens, slot))
            row = stop

    def __len__(self) -> int:
        """The number of tokens."""
        return len(self.adapter_ids) * self.tokens

    def sorted(self, device: torch.device) -> SortedTokens:
        """The tokens sorted for the kernels, on `device`; a copy from pinned memory, which waits for nothing."""
        if device not in self._sorted:
            self._sorted[device] = self._sort(device)
        return self._sorted[device]

    def _sort(self, device: torch.device) -> SortedTokens:
        rows = sorted(range(len(self.adapter_ids)), key=lambda row: (self.groups[row], self.adapter_ids[row]))
        groups = [self.groups[row] for row in rows]
        lengths = [sum(1 for _ in members) for _, members in groupby(groups)]
        starts = [0, *accumulate(lengths)]
        starts += [len(rows)] * (len(rows) + 1 - len(starts))
        tokens = self.tokens
        parts = [
            [row * tokens + token for row in rows for token in range(tokens)],
            [self.adapter_ids[row] for row in rows for _ in range(tokens)],
            [group for group in groups for _ in range(tokens)],
            [start * tokens for start in starts],
        ]
        packed = torch.tensor([entry for part in parts for entry in part], dtype=torch.int32)
        if device.type == "cuda":
            packed = packed.pin_memory().to(device, non_blocking=True)
        return SortedTokens(*packed.split([len(part) for part in parts]))

    def write(self, buffers: SortedTokens) -> None:
        """Takes over the buffers of another batch with as many rows and tokens: a captured CUDA graph reads those."""
        for buffer, value in zip(buffers, self._sort(buffers.order.device), strict=True):
            buffer.copy_(value, non_blocking=True)
        self._sorted[buffers.order.device] = buffers


class SlotForm(NamedTuple):
    """An adapter form in the arena: views, with the scalar part of h in `scaling` and d inside A where it can be.

    A and B come in parts of the same ranks, cut where the pages of either have a gap. `added_bias` is β − b0. Where
    out_scale is base_scale itself, that multiplies the sum of both paths. An absent scale is 1.
    Shapes: A parts [R_i, K] and B parts [R_i, N] with ΣR_i = R; mid_scale [R]; the others [N].
    """

    A: tuple[Tensor, ...]
    B: tuple[Tensor, ...]
    scaling: float = 1.0
    mid_scale: Tensor | None = None
    out_scale: Tensor | None = None
    base_scale: Tensor | None = None
    added_bias: Tensor | None = None

    @property
    def rank(self) -> int:
        return sum(part.shape[0] for part in self.A)

    @property
    def tied(self) -> bool:
        """Whether base_scale multiplies the sum of both paths."""
        return self.base_scale is not None and self.out_scale is self.base_scale


class FormTables(NamedTuple):
    """The adapter forms of one layer in the arena, as the kernels read them: tables of where everything begins.

    Shapes: pages and vectors [elements], the same memory in the factors' dtype and in fp32. By factor group: ranks
    [groups] int32; A_pages and B_pages [groups, P] int64, the first element of every page of PAGE_RANKS rank rows;
    A_strides and B_strides [groups] int32, from one rank row to the next. By slot: scalings [slots] fp32; mid_scales,
    out_scales, base_scales and added_biases [slots] int64, the vector's first element, -1 for none, or None where no
    adapter has any. A slot without an adapter in this layer has a group of rank 0.
    """

    pages: Tensor
    vectors: Tensor
    ranks: Tensor
    A_pages: Tensor
    B_pages: Tensor
    A_strides: Tensor
    B_strides: Tensor
    scalings: Tensor
    mid_scales: Tensor | None
    out_scales: Tensor | None
    base_scales: Tensor | None
    added_biases: Tensor | None


class FormEntry(NamedTuple):
    """What FormTables have of one adapter: the places of its pages and vectors, -1 for a vector that it has not."""

    rank: int
    A_pages: Sequence[int]
    B_pages: Sequence[int]
    A_stride: int
    B_stride: int
    scaling: float = 1.0
    mid_scale: int = -1
    out_scale: int = -1
    base_scale: int = -1
    added_bias: int = -1


class LayerForms(NamedTuple):
    """The resident adapter forms of one layer, twice: views by slot for the eager implementation, tables for kernels.

    max_rank bounds the ranks. A slot without an entry in `forms` is the base model's in this layer.
    """

    forms: Mapping[int, SlotForm]
    tables: FormTables
    max_rank: int
