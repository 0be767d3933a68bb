"""A layer's adapters by slot at addresses that never change, which a captured CUDA graph goes on reading."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...reference import AdapterForm
from .batch import PAGE_RANKS, FormTables, LayerForms, SlotForm
from .stacks import entry_of

_NOBODY = SlotForm((), ())


class _Room(NamedTuple):
    """A layer's part of memory that layers share. Shapes: pages and vectors [elements], all of the memory; views of it
    A [slots, R, K], B [slots, R, N], for whole pages of ranks, and scales [slots, 3, N]: h, g and β − b0."""

    pages: Tensor
    vectors: Tensor
    A: Tensor
    B: Tensor
    scales: Tensor


class FormPages:
    """The adapter forms of one layer, or of one slice of a packed layer, by slot: `layer` is what operators read.

    Every slot has room for a form of any rank up to max_rank, as engines lay out their adapters; kernels read the ranks
    that are there alone. Where everything lies is settled once: which adapters are in, their ranks and which vectors
    they have is in tables on the device, so that graphs may be captured before the first adapter comes.
    shape: (N, K) of the layer. slots: how many. dtype: of factors, as x's; d goes into A, other vectors are fp32.
    Not thread-safe; what is written comes behind what the current stream has got to do. A write or a clear enters all
    that kernels read of its slot: engines that sleep lose what is in memory, and keep its addresses.

    >>> layer, forms = torch.nn.Linear(16, 8, bias=False), FormPages((8, 16), 4, 8, torch.float32)
    >>> forms.write(2, AdapterForm(torch.randn(4, 16), torch.randn(8, 4)))
    >>> x = torch.randn(3, 16)
    >>> y = layer(x).detach()
    >>> multi_adapter_update([y], x, [None], AdapterBatch([2, -1, 2]), [forms.layer])
    >>> torch.equal(y[1], layer(x)[1])
    True
    """

    @torch.inference_mode(False)  # it is written in any mode
    def __init__(
        self,
        shape: tuple[int, int],
        slots: int,
        max_rank: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        *,
        room: _Room | None = None,
    ) -> None:
        self.shape, self.slots, self.max_rank = shape, slots, max_rank
        if room is None:
            (room,) = _rooms([shape], slots, max_rank, dtype, device)
        self._A, self._B, self._vectors = room.A, room.B, room.scales
        # Nobody is in: what a slot's adapter has comes with it.
        pages = -(-max_rank // PAGE_RANKS)
        ranks, A_strides, B_strides = (torch.zeros(slots, dtype=torch.int32, device=device) for _ in range(3))
        A_pages, B_pages = (torch.zeros(slots, pages, dtype=torch.int64, device=device) for _ in range(2))
        absent = (torch.full((slots,), -1, device=device) for _ in range(3))
        scalings = torch.zeros(slots, device=device)
        tables = FormTables(
            room.pages, room.vectors, ranks, A_pages, B_pages, A_strides, B_strides, scalings, None, *absent
        )
        self._forms: dict[int, SlotForm] = {}
        self._layer = LayerForms(self._forms, tables, max_rank)

    @classmethod
    def packed(
        cls,
        shapes: Sequence[tuple[int, int]],
        slots: int,
        max_rank: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> list[FormPages]:
        """Those of the layers of one packed product, in one memory, so that kernels need not choose among several."""
        rooms = _rooms(shapes, slots, max_rank, dtype, device)
        return [
            cls(shape, slots, max_rank, dtype, device, room=room) for shape, room in zip(shapes, rooms, strict=True)
        ]

    @property
    def forms(self) -> Mapping[int, SlotForm]:
        """By slot."""
        return self._forms

    @property
    def layer(self) -> LayerForms:
        """The forms as they are now and will be: it need not be asked for again."""
        return self._layer

    @property
    def tables(self) -> FormTables:
        """What kernels read of them, of which no address changes."""
        tables = self._layer.tables
        assert tables is not None
        return tables

    def check(self, form: AdapterForm) -> None:
        """Raises ValueError for a form that has no room here. Ranks that d switches off take none."""
        rank = form.A.shape[0] if form.mid_scale is None else int(form.mid_scale.count_nonzero())
        if rank > self.max_rank:
            raise ValueError(f"r must be at most {self.max_rank}, which is what slots have room for, got {rank}")

    def write(self, slot: int, form: AdapterForm, *, base_bias: Tensor | None = None) -> None:
        """Enters an adapter in a slot, in the place of another that was there.

        base_bias: the layer's b0, of which the form's β = b0 + what the adapter adds has its part.
        Raises ValueError for a slot that there is not, a form with U and V, factors that do not fit or a rank above
        max_rank; nothing is changed then.
        """
        self._check_slot(slot)
        self.check(form)
        with torch.inference_mode(False), torch.no_grad():
            (A,), (B,), scaling, d, h, g, beta, *_ = entry_of(self.shape, form, base_bias)
            if d is not None:
                used = d != 0
                A, B = A[used] * d[used, None], B[used]
            rank = A.shape[0]
            factors = self._A[slot, :rank].copy_(A), self._B[slot, :rank].copy_(B)
            tied = h is not None and h is g
            own_h, own_g, own_beta = (
                None if vector is None else room.copy_(vector)
                for room, vector in zip(self._vectors[slot], (None if tied else h, g, beta), strict=True)
            )
            down, up = ((side,) if rank else () for side in factors)
            entered = SlotForm(down, up, scaling, None, own_g if tied else own_h, own_g, own_beta)
            self._forms[slot] = entered
            self._enter(slot, entered)

    def clear(self, slot: int) -> None:
        """Makes a slot the base model's. Raises ValueError for one that there is not."""
        self._check_slot(slot)
        self._forms.pop(slot, None)
        self._enter(slot, _NOBODY)

    def _check_slot(self, slot: int) -> None:
        if not 0 <= slot < self.slots:
            raise ValueError(f"slot must be 0 to {self.slots - 1}, got {slot}")

    @torch.inference_mode(False)
    def _enter(self, slot: int, form: SlotForm) -> None:
        """What the tables say of a slot: all of it, as an engine that sleeps loses what is in memory."""
        tables, vectors = self.tables, (form.out_scale, form.base_scale, form.added_bias)
        if form.rank:
            factors = ((self._A, tables.A_pages, tables.A_strides), (self._B, tables.B_pages, tables.B_strides))
            for factor, starts, strides in factors:
                first, width = int(factor[slot].storage_offset()), factor.shape[2]
                page, count = PAGE_RANKS * width, starts.shape[1]
                torch.arange(first, first + count * page, page, out=starts[slot])
                strides[slot] = width
        tables.ranks[slot] = form.rank
        tables.scalings[slot] = form.scaling
        for table, vector in zip(tables[-3:], vectors, strict=True):
            assert table is not None
            table[slot] = -1 if vector is None else int(vector.storage_offset())


@torch.inference_mode(False)
def _rooms(
    shapes: Sequence[tuple[int, int]], slots: int, max_rank: int, dtype: torch.dtype, device: torch.device | str
) -> list[_Room]:
    """One behind the other, whole pages of A and of B in each: 8 rows of any width end on a multiple of 16 bytes."""
    ranks = -(-max_rank // PAGE_RANKS) * PAGE_RANKS
    widths = [width for N, K in shapes for width in (K, N)]
    pages = torch.zeros(slots * ranks * sum(widths), dtype=dtype, device=device)
    vectors = torch.zeros(slots * 3 * sum(widths[1::2]), device=device)
    sides = _views(pages, slots, ranks, widths)
    scales = _views(vectors, slots, 3, widths[1::2])
    return [_Room(pages, vectors, *room) for room in zip(sides[::2], sides[1::2], scales, strict=True)]


def _views(memory: Tensor, slots: int, rows: int, widths: Sequence[int]) -> list[Tensor]:
    """[slots, rows, width] of each width, one behind the other."""
    parts = memory.split([slots * rows * width for width in widths])
    return [part.view(slots, rows, width) for part, width in zip(parts, widths, strict=True)]
