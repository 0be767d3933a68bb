"""Sums over the rows of each expert: outer products with thin rows, products with other rows, the rows themselves."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .experts import expert_rows, strides_of_factors, table
from .tiles import load_scale, load_tile, partial_buffer, store_tile, sum_partials


@triton.jit(do_not_specialize=["S"])
def _expert_grads_kernel(
    wide,  # [S, N]
    thin,  # [S, R], contiguous, or None
    other,  # [S, N], contiguous, or None
    row_scale,  # [S] or None
    factors,  # [E, R, N], or [1, R, N] and stride_fe is 0; None without low_rank_dots
    mid_scales,  # [E, R] or None; these tables are contiguous
    out_scales,  # [E, N] or None
    base_scales,  # [E, N] or None
    outer,  # [E, R, N] or None
    low_rank_dots,  # [tiles_r, E, N] or None
    dots,  # [E, N], or None without other
    sums,  # [E, N] or None
    scaled,  # [S, N], contiguous, or None without base_scales
    offsets,  # [E]
    S,
    E,
    N,
    R,
    tiles_r,
    stride_vm,
    stride_vn,
    stride_fe,
    stride_fr,
    stride_fn,
    scaling,
    base_shift,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    # A program owns columns of wide and walks down the rows of one expert. Tiles along r are neighbours: those that
    # share columns find them in L2.
    program = tl.program_id(0)
    e = tl.program_id(1).to(tl.int64)
    tile_r = program % tiles_r
    columns = program // tiles_r * BLOCK_N + tl.arange(0, BLOCK_N)
    ranks = tile_r * BLOCK_R + tl.arange(0, BLOCK_R)
    # What does not depend on r is the first tile's to write.
    own_columns = tl.where(tile_r == 0, N, 0)
    first, end = expert_rows(offsets, e, S)
    if base_scales is not None:
        base_scale = load_scale(base_scales + e * N, columns, N) - base_shift
    # Transposed: the large tile then goes to the dot as it was loaded.
    product = tl.zeros((BLOCK_R, BLOCK_N), dtype=tl.float32)
    # Two-dimensional until the loop is over: a reduction across threads in every step costs more than it saves.
    sum_acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    dot_acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(first, end, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        tile = load_tile(wide, rows, columns, end, N, stride_vm, stride_vn)  # [BLOCK_M, BLOCK_N]
        if base_scales is not None:
            scaled_tile = tile.to(tl.float32) * base_scale[None, :]
            store_tile(scaled, scaled_tile, rows, columns, end, own_columns, N, 1)
        if row_scale is not None:
            weight = tl.load(row_scale + rows, mask=rows < end, other=0.0).to(tl.float32)[:, None]
        if thin is not None:
            thin_tile = load_tile(thin, rows, ranks, end, R, R, 1)  # [BLOCK_M, BLOCK_R]
            if row_scale is not None:
                thin_tile = (thin_tile.to(tl.float32) * weight).to(tile.dtype)
            product = tl.dot(tl.trans(thin_tile), tile, product, input_precision="ieee")
        if sums is not None:
            value = tile.to(tl.float32)
            if row_scale is not None:
                value *= weight
            sum_acc += value
        if other is not None:
            value = tile.to(tl.float32) * load_tile(other, rows, columns, end, N, N, 1).to(tl.float32)
            if row_scale is not None:
                value *= weight
            dot_acc += value

    if sums is not None:
        tl.store(sums + e * N + columns, tl.sum(sum_acc, axis=0), mask=columns < own_columns)
    if other is not None:
        tl.store(dots + e * N + columns, tl.sum(dot_acc, axis=0), mask=columns < own_columns)
    if thin is not None:
        product *= scaling
        if mid_scales is not None:
            product *= load_scale(mid_scales + e * R, ranks, R)[:, None]
        if low_rank_dots is not None:
            factor_tile = load_tile(factors + e * stride_fe, ranks, columns, R, N, stride_fr, stride_fn)
            part = low_rank_dots + tile_r.to(tl.int64) * E * N + e * N
            tl.store(part + columns, tl.sum(product * factor_tile.to(tl.float32), axis=0), mask=columns < N)
        if outer is not None:
            if out_scales is not None:
                product *= load_scale(out_scales + e * N, columns, N)[None, :]
            store_tile(outer + e * R * N, product, ranks, columns, R, N, N, 1)


class ExpertSums(NamedTuple):
    """What expert_grads gives, each None where it was not asked for."""

    outer: Tensor | None
    low_rank_dots: Tensor | None
    dots: Tensor | None
    sums: Tensor | None
    scaled: Tensor | None


def expert_grads(
    wide: Tensor,
    offsets: Tensor,
    *,
    thin: Tensor | None = None,
    other: Tensor | None = None,
    row_scale: Tensor | None = None,
    factors: Tensor | None = None,
    mid_scales: Tensor | None = None,
    out_scales: Tensor | None = None,
    base_scales: Tensor | None = None,
    base_shift: float = 0.0,
    scaling: float = 1.0,
    shared: bool = False,
    want_outer: bool = False,
    want_sums: bool = False,
) -> ExpertSums:
    """Sums over the rows of each expert, in one pass over wide v, with c = row_scale, t = thin and s = scaling:

        outer = s · Σ c (d ⊙ t) (h ⊙ v)ᵀ, with want_outer and t; shared: over all experts together
        low_rank_dots = s · Σ c v ⊙ (factorsᵀ (d ⊙ t)), given factors and t
        dots = Σ c v ⊙ other, given other     sums = Σ c v, with want_sums     scaled = (base_scales − base_shift) ⊙ v

    d, h: mid_scales, out_scales; what is None is one. Every sum is in fp32 and in a fixed order; that of a shared pair
    takes a part for each expert, E times the memory of the pair, for as long as it is made.
    Shapes: wide, other and scaled [S, N]; thin [S, R]; row_scale [S]; factors [E or 1, R, N]; mid_scales [E, R];
    out_scales and base_scales [E, N]; outer [E, R, N], of a shared pair [1, R, N]; the other sums [E, N].
    """
    S, N = wide.shape
    E, R = offsets.shape[0], 0 if thin is None else thin.shape[1]

    def room(*shape: int) -> Tensor:
        return torch.empty(*shape, dtype=torch.float32, device=wide.device)

    found = ExpertSums(
        room(1 if shared else E, R, N) if want_outer and thin is not None else None,
        room(E, N) if factors is not None and thin is not None else None,
        room(E, N) if other is not None else None,
        room(E, N) if want_sums else None,
        torch.empty(S, N, dtype=wide.dtype, device=wide.device) if base_scales is not None else None,
    )
    if S == 0:
        for value in found:
            if value is not None:
                value.zero_()
    if S == 0 or all([value is None or value.numel() == 0 for value in found]):
        return found
    outer, low_rank_dots, *_ = found
    if R == 0:
        # Without ranks there is nothing to point to.
        thin = factors = outer = low_rank_dots = None
        if found.low_rank_dots is not None:
            found.low_rank_dots.zero_()
    config = configs.expert_grads(wide, R, vector_sums=other is not None or want_sums)
    tiles_r = max(triton.cdiv(R, config["BLOCK_R"]), 1)
    outer_parts = partial_buffer(outer[0], E) if shared and outer is not None else outer
    dot_parts = None if low_rank_dots is None else partial_buffer(low_rank_dots, tiles_r)
    arguments = {
        "wide": wide,
        "thin": thin,
        "other": table(other),
        "row_scale": table(row_scale),
        "factors": factors,
        "mid_scales": table(mid_scales),
        "out_scales": table(out_scales),
        "base_scales": table(base_scales),
        "outer": outer_parts,
        "low_rank_dots": dot_parts,
        "dots": found.dots,
        "sums": found.sums,
        "scaled": found.scaled,
        "offsets": offsets,
        "S": S,
        "E": E,
        "N": N,
        "R": R,
        "tiles_r": tiles_r,
        "stride_vm": wide.stride(0),
        "stride_vn": wide.stride(1),
        **strides_of_factors(factors),
        "scaling": scaling,
        "base_shift": base_shift,
    }
    grid = triton.cdiv(N, config["BLOCK_N"]) * tiles_r
    configs.launch(_expert_grads_kernel, (grid, E), arguments, config)
    if shared and outer is not None and outer_parts is not None:
        sum_partials(outer_parts, outer[0])
    if dot_parts is not None and low_rank_dots is not None:
        sum_partials(dot_parts, low_rank_dots)
    return found
