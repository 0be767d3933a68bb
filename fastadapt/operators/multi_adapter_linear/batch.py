"""Which token goes through which adapter, and where the adapters lie: what multi_adapter_linear reads.

A slot is where one resident adapter is entered; -1 stands for the base model. A factor group is a pair (A, B) on pages:
an adapter's own, or one that several adapters share (VeRA).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
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
    """The tokens of a batch by factor group, then by adapter, the base model's first, and cut into tiles of one group
    each; all int32, their sizes fixed by those of the batch, so that the launches do not depend on who is in it.

    Shapes: order [M], the token at each place; adapters [M] and groups [M], its slot and its factor group, -1 for the
    base model; tiles [T, 3], of each tile of `block` places the first, the end of its run of one group and that group,
    then M, M and -1 of tiles that are not needed.
    """

    order: Tensor
    adapters: Tensor
    groups: Tensor
    tiles: Tensor
    block: int


# Rows of one token up to which each has tiles of its own, and tokens a row beyond which tiles are long.
ONE_TOKEN_ROWS = 32
_LONG_ROW = 32


def places_of_a_tile(rows: int, tokens: int) -> int:
    """Places of a tile of many adapters: of one token where each row has one and rows are few.

    With more rows, those that share a factor group read it once a tile; those that do not, lose little.
    """
    if tokens == 1 and rows <= ONE_TOKEN_ROWS:
        return 1
    return 16 if tokens <= _LONG_ROW else 64


def sort_tokens(rows: Tensor, tokens: int) -> SortedTokens:
    """The tokens of rows [2, rows] int32, the slot and the factor group of each, with `tokens` tokens a row.

    All of it happens on the device of `rows`: nothing is pinned, copied from the host or waited for, and no size
    depends on a value, so that a CUDA graph may capture the sort with the layers that read it.
    """
    count, M = rows.shape[1], rows.shape[1] * tokens
    order = torch.argsort(rows[1].to(torch.int64) * 2**32 + rows[0], stable=True)
    slots, groups = rows.index_select(1, order)
    device = rows.device
    within = torch.arange(tokens, device=device)
    places = (order[:, None] * tokens + within).to(torch.int32).view(-1)
    adapters, own = (of[:, None].expand(count, tokens).reshape(-1) for of in (slots, groups))
    block = places_of_a_tile(count, tokens)
    if block == 1:
        first = torch.arange(M, dtype=torch.int32, device=device)
        return SortedTokens(places, adapters, own, torch.stack([first, first + 1, groups], 1), block)
    # Of every row in its place: the first row of its run, and the row behind the run.
    begins = torch.searchsorted(groups, groups, out_int32=True)
    ends = torch.searchsorted(groups, groups, right=True, out_int32=True)
    rank = torch.arange(count, dtype=torch.int32, device=device)
    counts = torch.where(begins == rank, ((ends - begins) * tokens + block - 1) // block, 0)
    # A tile belongs to the run up to which there are more tiles than come before it.
    until = counts.cumsum(0, dtype=torch.int32)
    tile = torch.arange(-(-M // block) + count, dtype=torch.int32, device=device)
    row = torch.searchsorted(until, tile, right=True)
    needed, row = row < count, row.clamp(max=count - 1)
    first = begins[row] * tokens + (tile - until[row] + counts[row]) * block
    fields = (torch.where(needed, first, M), torch.where(needed, ends[row] * tokens, M))
    tiles = torch.stack([*fields, torch.where(needed, groups[row], -1)], 1)
    return SortedTokens(places, adapters, own, tiles, block)


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
        self.copied = 0  # bytes, by those plans
        self.gathered: dict[Any, Any] = {}  # what layers have in common, by the arrangement of their forms
        self._sorted: dict[torch.device, SortedTokens] = {}
        self.runs: list[Run] = []
        row = 0
        for slot, members in groupby(self.adapter_ids):
            stop = row + sum(1 for _ in members)
            if slot >= 0 and tokens:
                self.runs.append(Run(row * tokens, stop * tokens, slot))
            row = stop

    def __len__(self) -> int:
        """The number of tokens."""
        return len(self.adapter_ids) * self.tokens

    def rows(self, device: torch.device) -> Tensor:
        """Slot and factor group of each row, [2, rows] int32 on `device`: all that comes from the host.

        From pinned memory, so that nothing waits; for that reason not while a CUDA graph is captured, which would read
        a tensor made before, into which later batches' rows are copied.
        """
        rows = torch.tensor([self.adapter_ids, self.groups], dtype=torch.int32)
        return rows.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else rows.to(device)

    def sorted(self, device: torch.device) -> SortedTokens:
        """The tokens sorted for the kernels, on `device`; made when it is first asked for."""
        if device not in self._sorted:
            self._sorted[device] = sort_tokens(self.rows(device), self.tokens)
        return self._sorted[device]

    def write(self, buffers: SortedTokens) -> None:
        """Takes over the buffers of another batch with as many rows and tokens: a captured CUDA graph reads those."""
        device = buffers.order.device
        for buffer, value in zip(buffers, sort_tokens(self.rows(device), self.tokens), strict=True):
            if isinstance(buffer, Tensor) and isinstance(value, Tensor):
                buffer.copy_(value)
        self._sorted[device] = buffers


class FormStack(NamedTuple):
    """What adapters have in one layer, one behind the other: factors of their own with scaling, d and h in them and
    zeros beyond their ranks, or the scales of adapters that share a pair.

    Shapes: A [S, K, R], which products of single rows read half as fast again as [S, R, K], and B [S, R, N], or
    mid_scale [S, R] and out_scale [S, N] with the scalings in it; base_scale [S, N], 1 where an adapter has none, and
    added_bias [S, N], 0 there, or None where nobody has any.
    """

    A: Tensor | None = None
    B: Tensor | None = None
    mid_scale: Tensor | None = None
    out_scale: Tensor | None = None
    base_scale: Tensor | None = None
    added_bias: Tensor | None = None


class Place(NamedTuple):
    """Where a form lies in the stacks of its layer: the stack's name, which says what goes together, the part of it,
    and whether the form has a base_scale and an added_bias. Layers whose forms have the same places go the same way.
    """

    stack: object
    part: int
    scaled: bool
    biased: bool


class SlotForm(NamedTuple):
    """An adapter form in the arena: views, with the scalar part of h in `scaling` and d inside A where it can be.

    A and B come in parts of the same ranks, cut where the pages of either have a gap. `added_bias` is β − b0. Where
    out_scale is base_scale itself, that multiplies the sum of both paths. An absent scale is 1. Of a form that is part
    of a stack, `place` says which.
    Shapes: A parts [R_i, K] and B parts [R_i, N] with ΣR_i = R; mid_scale [R]; the others [N].
    """

    A: tuple[Tensor, ...]
    B: tuple[Tensor, ...]
    scaling: float = 1.0
    mid_scale: Tensor | None = None
    out_scale: Tensor | None = None
    base_scale: Tensor | None = None
    added_bias: Tensor | None = None
    stack: FormStack | None = None
    place: Place | None = None

    @property
    def rank(self) -> int:
        return sum([part.shape[0] for part in self.A])

    @property
    def tied(self) -> bool:
        """Whether base_scale multiplies the sum of both paths."""
        return self.base_scale is not None and self.out_scale is self.base_scale


class Arrangement:
    """Where the forms of a layer lie, by slot, and which of them have a g: layers that are arranged alike go the same
    way in a batch. Hashed once, as it is looked up at every step of an engine."""

    __slots__ = ("_hash", "_places")

    def __init__(self, forms: Mapping[int, SlotForm]) -> None:
        self._places = tuple([(slot, form.place, form.base_scale is None) for slot, form in sorted(forms.items())])
        self._hash = hash(self._places)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Arrangement) and self._places == other._places)


class StackedForms(dict[int, SlotForm]):
    """The forms of one layer in stacks, by slot, and their arrangement, which who changes them sees to."""

    arrangement = Arrangement({})


def added_bias(bias: Tensor | None, base_bias: Tensor | None) -> Tensor | None:
    """β − b0 of a form's whole bias β, in fp32 where both are there; None where β is that very b0, or nothing."""
    if bias is base_bias or bias is None:
        return None
    return bias if base_bias is None else bias.float() - base_bias.float()


class FormTables(NamedTuple):
    """The adapter forms of one layer in the arena, as the kernels read them: tables of where everything begins.

    Shapes: pages and vectors [elements], the same memory in the factors' dtype and in fp32. By factor group: ranks
    [groups] int32; A_pages and B_pages [groups, P] int64, the first element of every page of PAGE_RANKS rank rows, on a
    multiple of 16 bytes; A_strides and B_strides [groups] int32, from one rank row to the next. By slot: scalings
    [slots] fp32; mid_scales, out_scales, base_scales and added_biases [slots] int64, the vector's first element, -1 for
    none, or None where no adapter has any. A slot without an adapter in this layer has a group of rank 0.
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

    max_rank bounds the ranks. A slot without an entry in `forms` is the base model's in this layer. Without tables
    (FormStacks) there is the eager implementation alone.
    """

    forms: Mapping[int, SlotForm]
    tables: FormTables | None
    max_rank: int
