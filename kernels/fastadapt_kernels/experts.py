"""Rows that are sorted by expert: where the rows of an expert lie, and which of them a program has."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def expert_rows(
    offsets,  # [E]
    expert,
    S,
):
    """(first, end) of the rows of an expert."""
    first = tl.load(offsets + expert - 1, mask=expert > 0, other=0)
    return first, tl.minimum(tl.load(offsets + expert), S)


@triton.jit
def expert_tile(
    offsets,  # [E]
    tile,
    S,
    E,
    BLOCK_M: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """(expert, first, end) of a tile of rows, of which there are S // BLOCK_M + E: rows from first on that lie before
    end are the tile's. Where first is no such row the tile is empty.

    Expert e has the tiles from offsets[e - 1] // BLOCK_M + e on. These are enough for its rows, and so a comparison
    tells whose a tile is, without a sum over the experts before.
    """
    experts = tl.arange(0, BLOCK_E)
    last = tl.load(offsets + experts, mask=experts < E, other=0) // BLOCK_M + experts
    expert = tl.sum(((experts < E - 1) & (last < tile)).to(tl.int32), 0)
    first, end = expert_rows(offsets, expert, S)
    return expert, first + (tile - first // BLOCK_M - expert) * BLOCK_M, end


def row_tiles(rows: int, experts: int, block: int) -> int:
    """How many tiles expert_tile tells apart."""
    return rows // block + experts


def block_of_experts(offsets: Tensor) -> int:
    """BLOCK_E, which holds all experts."""
    block: int = triton.next_power_of_2(offsets.shape[0])
    return block


def table(values: Tensor | None) -> Tensor | None:
    """A table with a row for each expert as kernels read it: whole rows, one behind the other."""
    return None if values is None else values.contiguous()


def strides_of_factors(factors: Tensor | None) -> dict[str, int]:
    """The strides of factors [E, R, N], or of one pair [1, R, N] that every expert reads, by the names of arguments."""
    if factors is None:
        return {"stride_fe": 0, "stride_fr": 0, "stride_fn": 0}
    own = factors.stride(0) if factors.shape[0] > 1 else 0
    return {"stride_fe": own, "stride_fr": factors.stride(1), "stride_fn": factors.stride(2)}
