"""The low-rank product on an accumulator, in registers: its small operand is scaled, and no tile is r wide."""

import triton
import triton.language as tl

from .tiles import load_low_rank, load_member_vector, load_tile, pick, store_tile


@triton.jit
def scaled_factor(
    factor,  # [R, N]: Bᵀ or A
    mid_scales,  # [R] by member or None
    column_scale,  # [BLOCK_N] or None
    member,
    ranks,
    columns,
    R,
    N,
    stride_r,
    stride_n,
    BLOCK_R: tl.constexpr,
):
    """Tile [BLOCK_R, BLOCK_N] of d ⊙ factor ⊙ column_scale in fp32: the small operand is scaled, then rounded."""
    tile = load_tile(factor, ranks, columns, R, N, stride_r, stride_n).to(tl.float32)
    if mid_scales is not None:
        tile *= load_member_vector(mid_scales, member, ranks, R, 1.0)[:, None]
    if column_scale is not None:
        tile *= column_scale[None, :]
    return tile


@triton.jit
def add_low_rank(
    acc,  # [BLOCK_M, BLOCK_N]
    u,  # [M, width]
    partials,  # [splits, M, width] or None
    factor,  # [R, N]
    mid_scales,
    column_scale,
    member,
    offset,
    writes_u,
    rows,
    columns,
    M,
    N,
    R,
    splits,
    width,
    stride_r,
    stride_n,
    BLOCK_R: tl.constexpr,
):
    """acc + u[:, offset : offset + R] (d ⊙ factor ⊙ column_scale), walking r in steps, so that no tile is r wide.

    Where u is still in parts, the programs with writes_u also write it.
    """
    for start in range(0, R, BLOCK_R):
        ranks = start + tl.arange(0, BLOCK_R)
        u_tile = load_low_rank(u, partials, offset, rows, ranks, M, R, splits, width)  # [BLOCK_M, BLOCK_R]
        if partials is not None:
            store_tile(u + offset, u_tile, rows, ranks, tl.where(writes_u, M, 0), R, width, 1)
        factor_tile = scaled_factor(
            factor, mid_scales, column_scale, member, ranks, columns, R, N, stride_r, stride_n, BLOCK_R
        )
        acc = tl.dot(u_tile, factor_tile.to(u_tile.dtype), acc, input_precision="ieee")
    return acc


@triton.jit
def add_low_ranks(
    acc,
    q,
    partials,
    As,  # by member, or None where no member has a rank
    mid_scales,
    q_offsets,
    writes_q,
    rows,
    columns,
    M,
    K,
    Rs,
    splits,
    width,
    strides_ar,
    strides_ak,
    BLOCK_R: tl.constexpr,
):
    """acc + Σ_i q_i (d_i ⊙ A_i) over the members."""
    if As is not None:
        for i in tl.static_range(len(As)):
            acc = add_low_rank(
                acc, q, partials, As[i], mid_scales, None, i, q_offsets[i], writes_q, rows, columns,
                M, K, Rs[i], splits[i], width, pick(strides_ar, i), pick(strides_ak, i), BLOCK_R,
            )  # fmt: skip
    return acc
