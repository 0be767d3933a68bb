"""Every sum over tokens of the backward pass: one pass over dy, one over x."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .tiles import (
    drop_threshold,
    keep_probability,
    kept_elements,
    load_scale,
    load_tile,
    partial_buffer,
    store_tile,
    sum_partials,
)


@triton.jit(do_not_specialize=["threshold"])
def _adapter_grads_kernel(
    x,  # [M, N]
    u,  # [M, R] or None
    z,  # [M, N] or None
    product,  # [splits, N, R] or None: x̃ᵀ u ⊙ mid_scale
    column_sum,  # [splits, N] or None: Σ_m x
    dot_sum,  # [splits, N] or None: Σ_m x ⊙ z
    mid_scale,  # [R] or None
    seed,  # [1] or None
    M,
    N,
    R,
    stride_xm,
    stride_xn,
    stride_um,
    stride_ur,
    stride_zm,
    stride_zn,
    stride_ps,
    stride_pn,
    stride_pr,
    threshold,
    inverse_keep,
    steps_per_split,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    # Tiles along r are neighbours: those that share columns of x find them in L2.
    tiles_r = tl.maximum(tl.cdiv(R, BLOCK_R), 1)
    program = tl.program_id(0)
    split = tl.program_id(1)
    tile_n = program // tiles_r
    tile_r = program % tiles_r
    columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    ranks = tile_r * BLOCK_R + tl.arange(0, BLOCK_R)

    product_acc = tl.zeros((BLOCK_N, BLOCK_R), dtype=tl.float32)
    # Two-dimensional until the loop is over: a reduction across threads in every step would cost more than it saves.
    sum_acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    dot_acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    first = split * steps_per_split * BLOCK_M
    last = tl.minimum(first + steps_per_split * BLOCK_M, M)
    for start in range(first, last, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        x_tile = load_tile(x, rows, columns, M, N, stride_xm, stride_xn)  # [BLOCK_M, BLOCK_N]
        if column_sum is not None:
            sum_acc += x_tile.to(tl.float32)
        if dot_sum is not None:
            z_tile = load_tile(z, rows, columns, M, N, stride_zm, stride_zn)
            dot_acc += x_tile.to(tl.float32) * z_tile.to(tl.float32)
        if product is not None:
            if seed is not None:
                x_tile = tl.where(kept_elements(seed, rows, tile_n * BLOCK_N, threshold, BLOCK_N), x_tile, 0.0)
            u_tile = load_tile(u, rows, ranks, M, R, stride_um, stride_ur)  # [BLOCK_M, BLOCK_R]
            product_acc = tl.dot(tl.trans(x_tile), u_tile, product_acc, input_precision="ieee")

    if product is not None:
        product_acc *= inverse_keep
        if mid_scale is not None:
            product_acc *= load_scale(mid_scale, ranks, R)[None, :]
        split_product = product + split.to(tl.int64) * stride_ps
        store_tile(split_product, product_acc, columns, ranks, N, R, stride_pn, stride_pr)
    # The vectors do not depend on r: the first tile along r writes them.
    if tile_r == 0:
        if column_sum is not None:
            tl.store(column_sum + split.to(tl.int64) * N + columns, tl.sum(sum_acc, axis=0), mask=columns < N)
        if dot_sum is not None:
            tl.store(dot_sum + split.to(tl.int64) * N + columns, tl.sum(dot_acc, axis=0), mask=columns < N)


def _reduce_tokens(
    x: Tensor,
    u: Tensor | None,
    z: Tensor | None,
    product: Tensor | None,
    column_sum: Tensor | None,
    dot_sum: Tensor | None,
    *,
    transposed: bool = False,
    mid_scale: Tensor | None = None,
    seed: Tensor | None = None,
    p: float = 0.0,
) -> None:
    """Fill product = (x̃ᵀ u) ⊙ mid_scale, column_sum = Σ_m x and dot_sum = Σ_m x ⊙ z, those that are given.

    Shapes: x and z [M, N]; u [M, R]; product [N, R], or [R, N] if transposed; column_sum and dot_sum [N]; mid_scale
    [R]; seed [1] int64. The three outputs are contiguous.
    """
    totals = [total for total in (product, column_sum, dot_sum) if total is not None and total.numel() > 0]
    if not totals:
        return
    M, N = x.shape
    if M == 0:
        for total in totals:
            total.zero_()
        return
    if product is None or product.numel() == 0 or u is None:
        u = product = None
    R = 0 if u is None else u.shape[1]
    config, splits, steps_per_split = configs.adapter_grads(x, R)
    product_partials = None if product is None else partial_buffer(product, splits)
    sum_partial = None if column_sum is None else partial_buffer(column_sum, splits)
    dot_partial = None if dot_sum is None else partial_buffer(dot_sum, splits)
    stride_um, stride_ur = (0, 0) if u is None else u.stride()
    stride_zm, stride_zn = (0, 0) if z is None else z.stride()
    stride_ps, stride_pn, stride_pr = (0, 0, 0) if product_partials is None else product_partials.stride()
    if transposed:
        stride_pn, stride_pr = stride_pr, stride_pn
    arguments = {
        "x": x,
        "u": u,
        "z": z,
        "product": product_partials,
        "column_sum": sum_partial,
        "dot_sum": dot_partial,
        "mid_scale": None if mid_scale is None else mid_scale.contiguous(),
        "seed": seed,
        "M": M,
        "N": N,
        "R": R,
        "stride_xm": x.stride(0),
        "stride_xn": x.stride(1),
        "stride_um": stride_um,
        "stride_ur": stride_ur,
        "stride_zm": stride_zm,
        "stride_zn": stride_zn,
        "stride_ps": stride_ps,
        "stride_pn": stride_pn,
        "stride_pr": stride_pr,
        "threshold": drop_threshold(p),
        "inverse_keep": 1.0 if seed is None else 1.0 / keep_probability(p),
        "steps_per_split": steps_per_split,
    }
    tiles = triton.cdiv(N, config["BLOCK_N"]) * max(triton.cdiv(R, config["BLOCK_R"]), 1)
    configs.launch(_adapter_grads_kernel, (tiles, splits), arguments, config)
    for partials, output in ((product_partials, product), (sum_partial, column_sum), (dot_partial, dot_sum)):
        if partials is not None and output is not None:
            sum_partials(partials, output)


def output_grads(
    dy: Tensor, u: Tensor | None = None, z: Tensor | None = None, *, want_bias: bool = False
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(P, dbias, dscale) = (dyᵀ u, Σ_m dy, Σ_m dy ⊙ z) in one pass over dy; None for what was not asked for.

    P holds the gradients of the form's B, h and d: dB = h ⊙ P ⊙ d, dh = rowsum(B ⊙ P ⊙ d), dd = colsum(h ⊙ B ⊙ P).
    Sums are in fp32 and in a fixed order.
    Shapes: dy and z [M, N]; u [M, R]; P [N, R]; dbias and dscale [N]. Any strides.
    """
    N = dy.shape[1]
    P = None if u is None else torch.empty(N, u.shape[1], dtype=torch.float32, device=dy.device)
    dbias = torch.empty(N, dtype=torch.float32, device=dy.device) if want_bias else None
    dscale = None if z is None else torch.empty(N, dtype=torch.float32, device=dy.device)
    _reduce_tokens(dy, u, z, P, dbias, dscale)
    return P, dbias, dscale


def input_grads(
    x: Tensor, q: Tensor, *, mid_scale: Tensor | None = None, seed: Tensor | None = None, p: float = 0.0
) -> Tensor:
    """dA = (d ⊙ q)ᵀ x̃, with the dropout mask that shrink used. Sums are in fp32 and in a fixed order.

    Shapes: x [M, K]; q [M, R]; mid_scale d [R]; seed [1] int64; dA [R, K] fp32. Any strides.
    """
    dA = torch.empty(q.shape[1], x.shape[1], dtype=torch.float32, device=x.device)
    _reduce_tokens(x, q, None, dA, None, None, transposed=True, mid_scale=mid_scale, seed=seed, p=p)
    return dA
