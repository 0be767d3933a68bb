"""Products of rows that are sorted by expert, with the matrix of each expert: a segment of rows to one matrix.

Two ways that give the same: PyTorch's grouped_mm, and one product a segment. `takes_grouped_mm` is what chooses.
"""

from __future__ import annotations

from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from ..arithmetic import product

# Where the factors of every row's expert have at most so many elements together they are gathered, and one product
# serves all rows: a step of decoding would spend its time on calls.
_GATHERED = 1 << 20

# What grouped_mm wants every row of its operands to begin at a multiple of.
_ALIGNMENT = 16


def takes_grouped_mm(*operands: Tensor) -> bool:
    """Whether F.grouped_mm computes with these operands: there since torch 2.10, without fp64, aligned rows only.

    On a GPU it is one kernel, without a word to the host, in bf16 alone; in other dtypes it would be the loop over
    segments that is here as well.
    """
    first = operands[0]
    if not hasattr(F, "grouped_mm") or first.shape[-2] == 0 or 0 in first.shape:
        return False
    if first.is_cuda:
        if first.dtype != torch.bfloat16 or torch.cuda.get_device_capability(first.device) < (8, 0):
            return False
    elif not first.is_cpu or first.dtype not in (torch.float32, torch.bfloat16):
        return False
    return all([_is_aligned(operand) for operand in operands])


def _is_aligned(operand: Tensor) -> bool:
    unit = _ALIGNMENT // operand.element_size()
    *batch, rows, columns = operand.stride()
    if columns == 1 and rows >= operand.shape[-1]:
        step = rows
    elif rows == 1 and columns >= operand.shape[-2]:
        step = columns
    else:
        return False
    return step % unit == 0 and not any([size % unit for size in batch]) and operand.data_ptr() % _ALIGNMENT == 0


class Segments:
    """Rows sorted by expert: expert e has those from offsets[e - 1] up to offsets[e]. Shapes: offsets [E], int32.

    A matrix of expert e is matrices[e], or matrices[0] of a stack of one that all experts share.
    """

    def __init__(self, offsets: Tensor, rows: int) -> None:
        self.offsets = offsets
        self.rows = rows
        self.count = offsets.shape[0]

    @cached_property
    def sizes(self) -> list[int]:
        """How many rows each expert has. On a GPU it waits for the device."""
        ends = self.offsets.tolist()
        return [end - start for start, end in zip([0, *ends], ends, strict=False)]

    @cached_property
    def ids(self) -> Tensor:
        """The expert of each row [S]."""
        positions = torch.arange(self.rows, device=self.offsets.device, dtype=self.offsets.dtype)
        return torch.searchsorted(self.offsets, positions, right=True, out_int32=True)

    def spread(self, table: Tensor) -> Tensor:
        """What a table [E, ...] has for the expert of each row: [S, ...]."""
        return table.index_select(0, self.ids)

    def part(self, start: int, stop: int) -> tuple[slice, Segments]:
        """The rows of the experts from start up to stop, and how these are sorted: by the sizes, unless it is all."""
        if stop - start == self.count:
            return slice(0, self.rows), self
        before, own = sum(self.sizes[:start]), sum(self.sizes[start:stop])
        return slice(before, before + own), Segments(self.offsets[start:stop] - before, own)

    def product(self, x: Tensor, matrices: Tensor, *, low_rank: bool = False) -> Tensor:
        """x[s] matrices[e]; low_rank: of factors, and no weights of the base.

        Shapes: x [S, K]; matrices [E, K, N] or [1, K, N]; result [S, N].
        """
        if len(matrices) != self.count:
            return x @ matrices[0]
        if low_rank and self._gathers(matrices):
            return torch.bmm(x[:, None], self.spread(matrices))[:, 0]
        if takes_grouped_mm(x, matrices):
            return F.grouped_mm(x, matrices, offs=self.offsets).contiguous()
        y = x.new_empty(self.rows, matrices.shape[2])
        for part, matrix, out in self._parts(x, matrices, y):
            torch.mm(part, matrix, out=out)
        return y

    def add_product(self, y: Tensor, x: Tensor, matrices: Tensor, scaling: float = 1.0) -> Tensor:
        """y + scaling · x[s] matrices[e], in place. Shapes: as for `product`."""
        if len(matrices) != self.count:
            return y.addmm_(x, matrices[0], alpha=scaling)
        if self._gathers(matrices):
            torch.baddbmm(y[:, None], x[:, None], self.spread(matrices), alpha=scaling, out=y[:, None])
            return y
        if y.is_cuda and takes_grouped_mm(x, matrices):
            return y.add_(F.grouped_mm(x, matrices, offs=self.offsets), alpha=scaling)
        for part, matrix, out in self._parts(x, matrices, y):
            torch.addmm(out, part, matrix, alpha=scaling, out=out)
        return y

    def outer(self, a: Tensor, b: Tensor, scaling: float, count: int) -> Tensor:
        """scaling · Σ a[s] b[s]ᵀ over the rows of each expert, or over all rows where `count` is 1.

        Shapes: a [S, R]; b [S, K]; result [count, R, K].
        """
        if count != self.count:
            return product(a.T, b, scaling)[None]
        if a.is_cuda and takes_grouped_mm(a.T, b):
            return F.grouped_mm(a.T, b, offs=self.offsets).contiguous().mul_(scaling)
        sums = a.new_empty(count, a.shape[1], b.shape[1])
        parts = zip(a.split_with_sizes(self.sizes), b.split_with_sizes(self.sizes), sums.unbind(), strict=True)
        for left, right, out in parts:
            if len(left):
                product(left.T, right, scaling, out=out)
            else:
                out.zero_()
        return sums

    def sums(self, v: Tensor, other: Tensor | None, weights: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Σ weights[s] v[s] ⊙ other[s] over the rows of each expert, in `dtype`; what is None is one.

        Shapes: v and other [S, N]; weights [S]; result [E, N]. In a fixed order, and no product of size [S, N].
        """
        sums = v.new_zeros(self.count, v.shape[1], dtype=dtype)
        start = 0
        for size, out in zip(self.sizes, sums.unbind(), strict=True):
            if size:
                rows = slice(start, start + size)
                part = v[rows].to(dtype) if other is None else v[rows].to(dtype) * other[rows]
                if weights is None:
                    torch.sum(part, 0, out=out)
                else:
                    torch.mv(part.T, weights[rows].to(dtype), out=out)
            start += size
        return sums

    def scaled(self, v: Tensor, table: Tensor) -> Tensor:
        """table[e] ⊙ v[s], in v's dtype and new memory. Shapes: v [S, N]; table [E, N]."""
        if not v.is_cpu or self.rows <= self.count:  # a step of decoding: fewer rows than experts to go through
            return (v * self.spread(table)).to(v.dtype)
        out = torch.empty_like(v)
        for part, row, result in self._parts(v, table, out):
            torch.mul(part, row, out=result)
        return out

    def shifted(self, v: Tensor, table: Tensor) -> Tensor:
        """v[s] + table[e], in place. Shapes: as for `scaled`."""
        if not v.is_cpu or self.rows <= self.count:
            return v.add_(self.spread(table))
        for part, row, _ in self._parts(v, table, v):
            part.add_(row)
        return v

    def product_with(self, x: Tensor, factors: Tensor, matrices: Tensor) -> tuple[Tensor, Tensor]:
        """(x[s] matrices[e], factors[e] matrices[e]) of one product, which reads every matrix once.

        Shapes: x [S, K]; factors [E, R, K]; matrices [E, K, N]; results [S, N] and [E, R, N].
        """
        r = factors.shape[1]
        rows = [part for pair in zip(x.split_with_sizes(self.sizes), factors, strict=True) for part in pair]
        steps = torch.arange(1, self.count + 1, device=x.device, dtype=self.offsets.dtype)
        together = Segments(self.offsets + r * steps, len(x) + r * self.count).product(torch.cat(rows), matrices)
        parts = together.split_with_sizes([part for size in self.sizes for part in (size, r)])
        return torch.cat(parts[::2]), torch.stack(parts[1::2])

    def _gathers(self, matrices: Tensor) -> bool:
        """Whether the factors of each row's expert are few and small enough to be copied for one product of all."""
        return self.rows * matrices.shape[1] * matrices.shape[2] <= _GATHERED

    def _parts(self, x: Tensor, matrices: Tensor, y: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        """The rows, matrix or table's row, and result of each expert that has rows."""
        parts = zip(x.split_with_sizes(self.sizes), matrices.unbind(), y.split_with_sizes(self.sizes), strict=True)
        return [part for part in parts if len(part[0])]
