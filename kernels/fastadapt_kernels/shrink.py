"""Down to rank r: u = x̃ Aᵀ in the forward pass and its twin q = (h ⊙ dy) B in the backward pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .group import matrices, offsets, strides, vectors
from .tiles import (
    count_tiles,
    drop_threshold,
    keep_probability,
    kept_elements,
    kept_words,
    load_member_vector,
    load_tile,
    locate,
    partial_buffer,
    pick,
    store_tile,
    sum_partials,
)


@triton.jit(do_not_specialize=["threshold"])
def _shrink_kernel(
    xs,  # one x [M, K] for all A, or one for each
    As,  # [R_i, K_i]
    u,  # [splits, M, width]
    in_scales,  # [K_i] or None
    seed,  # [1] or None
    kept,  # [M, words] int32 or None: the mask of one x in bits, to write
    M,
    Ks,
    sizes,
    starts,
    A_starts,
    width,
    words,
    strides_xm,
    strides_xk,
    strides_ar,
    strides_ak,
    scalings,
    threshold,
    splits,
    EXACT_A: tl.constexpr,
    ALIGNED_A: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    # u's columns are cut into segments, each of one x, and those into tiles. Tiles along r are neighbours: those that
    # share rows of x find them in L2.
    tiles_r = count_tiles(sizes, BLOCK_R)
    program = tl.program_id(0)
    split = tl.program_id(1)
    segment, tile_r = locate(program % tiles_r, sizes, BLOCK_R)
    x = pick(xs, segment)
    K = pick(Ks, segment)
    stride_xm = pick(strides_xm, segment)
    stride_xk = pick(strides_xk, segment)
    rows = program // tiles_r * BLOCK_M + tl.arange(0, BLOCK_M)
    ranks = tile_r * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = ranks < pick(sizes, segment)
    if len(xs) == 1:
        # A tile may hold rows of several A: each lane points to its own.
        owner = ranks * 0
        for i in tl.static_range(1, len(A_starts)):
            owner = tl.where(ranks >= A_starts[i], i, owner)
        A_rows = pick(As, owner) + (ranks - pick(A_starts, owner)).to(tl.int64) * pick(strides_ar, owner)
        stride_ak = pick(strides_ak, owner[None, :])
    else:
        A_rows = pick(As, segment) + ranks.to(tl.int64) * pick(strides_ar, segment)
        stride_ak = pick(strides_ak, segment)
    if ALIGNED_A:
        A_rows = tl.multiple_of(A_rows, 16)

    acc = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    steps_per_split = tl.cdiv(tl.cdiv(K, BLOCK_K), splits)
    first = split * steps_per_split * BLOCK_K
    last = tl.minimum(first + steps_per_split * BLOCK_K, K)
    for start in range(first, last, BLOCK_K):
        columns = start + tl.arange(0, BLOCK_K)
        x_tile = load_tile(x, rows, columns, M, K, stride_xm, stride_xk)  # [BLOCK_M, BLOCK_K]
        if kept is not None:
            mask, bits = kept_words(seed, rows, start, threshold, BLOCK_K)
            x_tile = tl.where(mask, x_tile, 0.0)
            own_words = start // 32 + tl.arange(0, BLOCK_K // 32)
            store_tile(kept, bits, rows, own_words, tl.where(tile_r == 0, M, 0), words, words, 1)
        elif seed is not None:
            x_tile = tl.where(kept_elements(seed, rows, start, threshold, BLOCK_K), x_tile, 0.0)
        A_pointers = A_rows[None, :] + columns.to(tl.int64)[:, None] * stride_ak
        A_tile = tl.load(A_pointers, mask=(columns < K)[:, None] & inside[None, :], other=0.0)  # [BLOCK_K, BLOCK_R]
        if in_scales is not None:
            # On the small operand and in fp32: one rounding, and x goes to the dot as it was loaded.
            A_tile = A_tile.to(tl.float32) * load_member_vector(in_scales, segment, columns, K, 1.0)[:, None]
        A_rounded = A_tile.to(x_tile.dtype)
        acc = tl.dot(x_tile, A_rounded, acc, input_precision="ieee")
        if EXACT_A:
            A_rest = (A_tile - A_rounded.to(tl.float32)).to(x_tile.dtype)
            acc = tl.dot(x_tile, A_rest, acc, input_precision="ieee")

    u += split.to(tl.int64) * M * width + pick(starts, segment)
    store_tile(u, acc * pick(scalings, segment), rows, ranks, M, pick(sizes, segment), width, 1)


def kept_bits(x: Tensor) -> Tensor:
    """Room for the dropout mask of x [M, K] in bits: int32 [M, K / 32 rounded up to a multiple of 4], empty."""
    return torch.empty(x.shape[0], 4 * triton.cdiv(x.shape[1], 128), dtype=torch.int32, device=x.device)


def shrink(
    xs: Sequence[Tensor],
    As: Sequence[Tensor],
    *,
    out_dtype: torch.dtype,
    in_scales: Sequence[Tensor | None] = (None,),
    scalings: Sequence[float] = (1.0,),
    seed: Tensor | None = None,
    p: float = 0.0,
    kept: Tensor | None = None,
    exact_A: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """(u, partials): column block i of u is scalings_i · x̃_i (in_scales_i ⊙ A_i)ᵀ, in one launch.

    One x serves every A, then with one scale, or each A has its own. Where the sum over K was split, u is still empty
    and partials [splits, M, width] in fp32 add up to it: load_low_rank does that where u is read first. exact_A keeps
    an fp32 A whole beside a 16-bit x, as two 16-bit parts and two dots. Into kept, of kept_bits, goes the mask of the
    one x.
    Shapes: xs_i [M, K_i]; As_i [R_i, K_i]; in_scales_i [K_i]; seed [1] int64; u [M, width = Σ R_i]. Any strides.
    """
    M = xs[0].shape[0]
    ranks = [A.shape[0] for A in As]
    width = sum(ranks)
    u = torch.empty(M, width, dtype=out_dtype, device=xs[0].device)
    if u.numel() == 0:
        return u, None
    # Without rows there is nothing to point to.
    ranked = [i for i, R in enumerate(ranks) if R > 0]
    As, ranks = matrices([As[i] for i in ranked]), [ranks[i] for i in ranked]
    if len(xs) == 1:
        sizes = [width]
    else:
        xs = [xs[i] for i in ranked]
        in_scales, scalings = [in_scales[i] for i in ranked], [scalings[i] for i in ranked]
        sizes = ranks
    config, splits = configs.shrink(xs, sizes, masked=seed is not None)
    partials = partial_buffer(u, splits)
    tiles = triton.cdiv(M, config["BLOCK_M"]) * sum(triton.cdiv(size, config["BLOCK_R"]) for size in sizes)
    keep = 1.0 if seed is None else keep_probability(p)
    arguments = {
        "xs": tuple(xs),
        "As": As,
        "u": partials,
        "in_scales": vectors(in_scales),
        "seed": seed,
        "kept": kept,
        "M": M,
        "Ks": tuple(x.shape[1] for x in xs),
        "sizes": tuple(sizes),
        "starts": tuple(offsets(sizes)),
        "A_starts": tuple(offsets(ranks)),
        "width": width,
        "words": 0 if kept is None else kept.shape[1],
        "strides_xm": strides(xs, 0),
        "strides_xk": strides(xs, 1),
        "strides_ar": strides(As, 0),
        "strides_ak": strides(As, 1),
        "scalings": tuple(scaling / keep for scaling in scalings),
        "threshold": drop_threshold(p),
        "splits": splits,
        "EXACT_A": exact_A and As[0].dtype == torch.float32 and xs[0].dtype != torch.float32,
        "ALIGNED_A": all(A.data_ptr() % 16 == 0 and A.stride(0) * A.element_size() % 16 == 0 for A in As),
    }
    configs.launch(_shrink_kernel, (tiles, splits), arguments, config)
    return u, partials if splits > 1 else None


def contract(x: Tensor, A: Tensor, *, out_dtype: torch.dtype, exact_A: bool = False) -> Tensor:
    """x Aᵀ, complete. Shapes: x [M, K]; A [R, K]; result [M, R]."""
    product, partials = shrink([x], [A], out_dtype=out_dtype, exact_A=exact_A)
    if partials is not None:
        sum_partials(partials, product)
    return product
