"""What several kernels share: tile order, bounded tile access, the dropout mask, the second stage of a split sum."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs

# Philox4x32 is free of known statistical defects from 7 rounds on (Salmon et al., SC 2011, section 4); more rounds only
# cost time in kernels that are otherwise bound by memory.
_PHILOX_ROUNDS = tl.constexpr(7)

# The mask compares 31 random bits with an integer, so that the threshold is an int32 for every p.
_THRESHOLD_RANGE = 2**31


def drop_threshold(p: float) -> int:
    """The integer t such that an element is dropped when its 31 random bits are below t; p in [0, 1)."""
    return min(round(p * _THRESHOLD_RANGE), _THRESHOLD_RANGE - 1)


def keep_probability(p: float) -> float:
    """The probability with which the integer threshold for drop probability p really keeps an element."""
    return 1.0 - drop_threshold(p) / _THRESHOLD_RANGE


@triton.jit
def grouped_tile(program, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """(row tile, column tile) of a program: GROUP_M row tiles walk the columns together, so that L2 serves them."""
    group = program // (GROUP_M * tiles_n)
    first_m = group * GROUP_M
    group_rows = tl.minimum(tiles_m - first_m, GROUP_M)
    within = program - group * GROUP_M * tiles_n
    return first_m + within % group_rows, within // group_rows


@triton.jit
def pick(values, index):
    """values[index] for an index known only at run time: a scalar, or a tensor of them. One value stands for all."""
    chosen = values[0]
    for i in tl.static_range(1, len(values)):
        chosen = tl.where(index == i, values[i], chosen)
    return chosen


@triton.jit
def count_tiles(sizes, BLOCK: tl.constexpr):
    """Tiles of all members, of which member i has cdiv(sizes[i], BLOCK)."""
    count = tl.cdiv(sizes[0], BLOCK)
    for i in tl.static_range(1, len(sizes)):
        count += tl.cdiv(sizes[i], BLOCK)
    return count


@triton.jit
def locate(tile, sizes, BLOCK: tl.constexpr):
    """(member, tile within it) of one of count_tiles' tiles."""
    member = tile * 0
    first = tile * 0
    end = tl.cdiv(sizes[0], BLOCK)
    for i in tl.static_range(1, len(sizes)):
        beyond = tile >= end
        member = tl.where(beyond, i, member)
        first = tl.where(beyond, end, first)
        end += tl.cdiv(sizes[i], BLOCK)
    return member, tile - first


@triton.jit
def tile_pointers(base, rows, columns, stride_row, stride_column):
    """Pointers [len(rows), len(columns)]; in int64, because rows * stride may pass 2^31."""
    return base + rows.to(tl.int64)[:, None] * stride_row + columns.to(tl.int64)[None, :] * stride_column


@triton.jit
def load_tile(base, rows, columns, row_count, column_count, stride_row, stride_column):
    """Tile [len(rows), len(columns)] of a [row_count, column_count] tensor, 0 outside it."""
    inside = (rows < row_count)[:, None] & (columns < column_count)[None, :]
    return tl.load(tile_pointers(base, rows, columns, stride_row, stride_column), mask=inside, other=0.0)


@triton.jit
def store_tile(base, tile, rows, columns, row_count, column_count, stride_row, stride_column):
    """Write the part of a tile that lies inside a [row_count, column_count] tensor, in that tensor's dtype."""
    inside = (rows < row_count)[:, None] & (columns < column_count)[None, :]
    pointers = tile_pointers(base, rows, columns, stride_row, stride_column)
    tl.store(pointers, tile.to(base.dtype.element_ty), mask=inside)


@triton.jit
def load_scale(base, index, count):
    """Entries of a contiguous [count] vector in fp32, 0 outside it."""
    return tl.load(base + index, mask=index < count, other=0.0).to(tl.float32)


@triton.jit
def load_member_vector(vectors, member, index, count, neutral):
    """Entries of the member's vector of ``count`` in fp32; neutral outside it, and where the member has none."""
    pointer = None
    own_count = 0
    for i in tl.static_range(len(vectors)):
        if vectors[i] is not None:
            own_count = tl.where(member == i, count, own_count)
            pointer = vectors[i] if pointer is None else tl.where(member == i, vectors[i], pointer)
    return tl.load(pointer + index, mask=index < own_count, other=neutral).to(tl.float32)


@triton.jit
def load_low_rank(
    u,  # [M, width]
    partials,  # [splits, M, width] or None
    offset,
    rows,
    ranks,
    M,
    R,
    splits,
    width,
):
    """Tile of columns offset + ranks of u; where its sum over K is still in parts, adds them up in a fixed order."""
    if partials is None:
        return load_tile(u + offset, rows, ranks, M, R, width, 1)
    else:
        part = partials + offset
        tile = load_tile(part, rows, ranks, M, R, width, 1)
        for _ in range(1, splits):
            part += tl.cast(M, tl.int64) * width
            tile += load_tile(part, rows, ranks, M, R, width, 1)
        return tile.to(u.dtype.element_ty)


@triton.jit
def kept_elements(seed, rows, first_column, threshold, COLUMNS: tl.constexpr):
    """Dropout mask [len(rows), COLUMNS], true where kept: a pure function of (seed, row, column).

    Row and column are separate counter words, so no product of them can overflow, and one Philox call serves four
    neighbouring columns. first_column must be a multiple of 4.
    """
    keep0, keep1, keep2, keep3 = _kept_quads(seed, rows, first_column, threshold, COLUMNS)
    return tl.interleave(tl.interleave(keep0, keep2), tl.interleave(keep1, keep3))


@triton.jit
def kept_words(seed, rows, first_column, threshold, COLUMNS: tl.constexpr):
    """(the mask of kept_elements, its bits): int32 [len(rows), COLUMNS // 32], the lowest bit for the first column."""
    keep0, keep1, keep2, keep3 = _kept_quads(seed, rows, first_column, threshold, COLUMNS)
    quads = keep0.to(tl.int32) | keep1.to(tl.int32) << 1 | keep2.to(tl.int32) << 2 | keep3.to(tl.int32) << 3
    shifts = 4 * (tl.arange(0, COLUMNS // 4) % 8)
    parts = tl.reshape(quads << shifts[None, :], (quads.shape[0], COLUMNS // 32, 8))
    kept = tl.interleave(tl.interleave(keep0, keep2), tl.interleave(keep1, keep3))
    # No two parts of a word have a bit in common.
    return kept, tl.sum(parts, axis=2)


@triton.jit
def _kept_quads(seed, rows, first_column, threshold, COLUMNS: tl.constexpr):
    """Columns 0, 1, 2 and 3 of every four of the mask: [len(rows), COLUMNS // 4] each."""
    quads = first_column // 4 + tl.arange(0, COLUMNS // 4)
    word0, word1, word2, word3 = tl.philox(tl.load(seed), quads[None, :], rows[:, None], 0, 0, _PHILOX_ROUNDS)
    keep0 = (word0 >> 1).to(tl.int32) >= threshold
    keep1 = (word1 >> 1).to(tl.int32) >= threshold
    keep2 = (word2 >> 1).to(tl.int32) >= threshold
    keep3 = (word3 >> 1).to(tl.int32) >= threshold
    return keep0, keep1, keep2, keep3


@triton.jit
def load_kept(words, rows, first_column, row_count, stride_row, COLUMNS: tl.constexpr):
    """The mask [len(rows), COLUMNS] of kept_words' bits; first_column and COLUMNS are multiples of 32."""
    columns = tl.arange(0, COLUMNS)
    bits = tl.full((COLUMNS,), 1, tl.int32) << columns % 32
    pointers = words + rows.to(tl.int64) * stride_row + first_column // 32
    inside = rows < row_count
    chosen = tl.load(pointers, mask=inside, other=0)[:, None]
    for i in tl.static_range(1, COLUMNS // 32):
        word = tl.load(pointers + i, mask=inside, other=0)[:, None]
        chosen = tl.where(columns[None, :] >= 32 * i, word, chosen)
    return (chosen & bits[None, :]) != 0


@triton.jit(do_not_specialize=["threshold"])
def _dropout_mask_kernel(
    seed,  # [1]
    mask,  # [M, K] uint8
    M,
    K,
    threshold,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tile_m, tile_k = grouped_tile(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(K, BLOCK_K), 1)
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tile_k * BLOCK_K + tl.arange(0, BLOCK_K)
    kept = kept_elements(seed, rows, tile_k * BLOCK_K, threshold, BLOCK_K)  # [BLOCK_M, BLOCK_K]
    store_tile(mask, kept, rows, columns, M, K, K, 1)


def dropout_mask(seed: Tensor, rows: int, cols: int, p: float) -> Tensor:
    """The mask that every kernel derives from this seed: bool [rows, cols], true where an element is kept.

    The kernels never store it; this launcher is for tests and for looking.
    Shapes: seed [1] int64. p is the drop probability; survivors are scaled by 1 / keep_probability(p).
    """
    mask = torch.empty(rows, cols, dtype=torch.uint8, device=seed.device)
    if mask.numel() > 0:
        config = configs.dropout_mask()
        grid = triton.cdiv(rows, config["BLOCK_M"]) * triton.cdiv(cols, config["BLOCK_K"])
        arguments = {"seed": seed, "mask": mask, "M": rows, "K": cols, "threshold": drop_threshold(p)}
        configs.launch(_dropout_mask_kernel, (grid,), arguments, config)
    return mask.bool()


@triton.jit
def sum_block(
    partials,  # [splits, count], contiguous
    total,  # [count], contiguous
    block,
    splits,
    count,
    BLOCK: tl.constexpr,
):
    """Second stage of a split sum, for one block of its results; always in the same order, so that they repeat."""
    index = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < count
    acc = tl.zeros((BLOCK,), dtype=tl.float32)
    offset = index
    for _ in range(0, splits):
        acc += tl.load(partials + offset, mask=inside, other=0.0)
        offset += count
    tl.store(total + index, acc.to(total.dtype.element_ty), mask=inside)


@triton.jit
def _sum_partials_kernel(
    partials,  # [splits, count], contiguous
    total,  # [count], contiguous
    splits,
    count,
    BLOCK: tl.constexpr,
):
    sum_block(partials, total, tl.program_id(0), splits, count, BLOCK)


def partial_buffer(total: Tensor, splits: int) -> Tensor:
    """[splits, *total.shape]: where the first stage of a split sum writes. One split writes the total itself."""
    if splits == 1:
        return total.unsqueeze(0)
    return torch.empty((splits, *total.shape), dtype=torch.float32, device=total.device)


def sum_partials(partials: Tensor, total: Tensor) -> None:
    """total = Σ_split partials[split], in a launch of its own."""
    splits = partials.shape[0]
    if splits == 1:
        return
    config = configs.sum_partials()
    arguments = {"partials": partials, "total": total, "splits": splits, "count": total.numel()}
    configs.launch(_sum_partials_kernel, (triton.cdiv(total.numel(), config["BLOCK"]),), arguments, config)
