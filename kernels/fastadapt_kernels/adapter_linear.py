"""The adapter form on one accumulator: base product, low-rank product, scales and bias; dx is the same kernel."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .tiles import drop_threshold, grouped_tile, keep_probability, kept_elements, load_scale, load_tile, store_tile


@triton.jit
def _add_low_rank(
    acc,  # [BLOCK_M, BLOCK_N]
    u,  # [M, R]
    B,  # [N, R]
    mid_scale,  # [R] or None
    out_scale,  # [N] or None
    scaling,
    rows,  # [BLOCK_M]
    columns,  # [BLOCK_N]
    M,
    N,
    R,
    stride_um,
    stride_ur,
    stride_bn,
    stride_br,
    BLOCK_R: tl.constexpr,
):
    """acc + u (scaling · out_scale ⊙ B ⊙ mid_scale)ᵀ, walking r in steps, so that no tile is r wide."""
    for start in range(0, R, BLOCK_R):
        ranks = start + tl.arange(0, BLOCK_R)
        u_tile = load_tile(u, rows, ranks, M, R, stride_um, stride_ur)  # [BLOCK_M, BLOCK_R]
        # All scales go to the small operand in fp32, before its one rounding to the dtype of the dot.
        B_tile = load_tile(B, ranks, columns, R, N, stride_br, stride_bn).to(tl.float32) * scaling  # [BLOCK_R, BLOCK_N]
        if mid_scale is not None:
            B_tile *= load_scale(mid_scale, ranks, R)[:, None]
        if out_scale is not None:
            B_tile *= load_scale(out_scale, columns, N)[None, :]
        acc = tl.dot(u_tile, B_tile.to(u_tile.dtype), acc, input_precision="ieee")
    return acc


@triton.jit(do_not_specialize=["threshold"])
def _adapter_linear_kernel(
    x,  # [M, K]
    weight,  # [N, K]
    u,  # [M, R] or None
    B,  # [N, R] or None
    y,  # [M, N]
    z,  # [M, N] or None
    mid_scale,  # [R] or None
    out_scale,  # [N] or None
    base_scale,  # [N], or [K] in BACKWARD, or None
    bias,  # [N] or None
    seed,  # [1] or None
    M,
    N,
    K,
    R,
    stride_xm,
    stride_xk,
    stride_wn,
    stride_wk,
    stride_um,
    stride_ur,
    stride_bn,
    stride_br,
    stride_ym,
    stride_yn,
    stride_zm,
    stride_zn,
    scaling,
    threshold,
    inverse_keep,
    BACKWARD: tl.constexpr,
    DROPOUT_ON_BASE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    # In BACKWARD x is dy, weight is W0ᵀ, u is q, B is Aᵀ, y is dx: N and K are the layer's in and out features. The
    # mask then belongs to the output tile, and base_scale to the contraction.
    tile_m, tile_n = grouped_tile(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    dropped = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)

    # The output mask hits the low-rank product but not dy W0: the low-rank product goes first.
    if BACKWARD and u is not None:
        low_rank = _add_low_rank(
            tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32),
            u, B, mid_scale, out_scale, scaling, rows, columns, M, N, R,
            stride_um, stride_ur, stride_bn, stride_br, BLOCK_R,
        )  # fmt: skip
        if DROPOUT_ON_BASE:
            dropped = low_rank
        elif seed is not None:
            kept = kept_elements(seed, rows, tile_n * BLOCK_N, threshold, BLOCK_N)
            acc = tl.where(kept, low_rank * inverse_keep, 0.0)
        else:
            acc = low_rank

    for start in range(0, K, BLOCK_K):
        inner = start + tl.arange(0, BLOCK_K)
        x_tile = load_tile(x, rows, inner, M, K, stride_xm, stride_xk)  # [BLOCK_M, BLOCK_K]
        w_tile = load_tile(weight, inner, columns, K, N, stride_wk, stride_wn)  # [BLOCK_K, BLOCK_N]
        if DROPOUT_ON_BASE:
            acc = tl.dot(x_tile, w_tile, acc, input_precision="ieee")
            if BACKWARD:
                # g - 1 in fp32: in 16 bits it would be lost beside 1.
                offset = load_scale(base_scale, inner, K) - 1.0
                x_tile = (x_tile.to(tl.float32) * offset[None, :]).to(x_tile.dtype)
            else:
                x_tile = tl.where(kept_elements(seed, rows, start, threshold, BLOCK_K), x_tile, 0.0)
            dropped = tl.dot(x_tile, w_tile, dropped, input_precision="ieee")
        else:
            if BACKWARD and base_scale is not None:
                # On the left operand: Hopper's matrix unit takes that one from registers, the right one it does not.
                x_tile = (x_tile.to(tl.float32) * load_scale(base_scale, inner, K)[None, :]).to(x_tile.dtype)
            acc = tl.dot(x_tile, w_tile, acc, input_precision="ieee")

    if BACKWARD:
        if DROPOUT_ON_BASE:
            kept = kept_elements(seed, rows, tile_n * BLOCK_N, threshold, BLOCK_N)
            acc += tl.where(kept, dropped * inverse_keep, 0.0)
    else:
        if DROPOUT_ON_BASE:
            dropped *= inverse_keep
            if z is not None:
                store_tile(z, dropped, rows, columns, M, N, stride_zm, stride_zn)
            acc += (load_scale(base_scale, columns, N) - 1.0)[None, :] * dropped
        else:
            if z is not None:
                store_tile(z, acc, rows, columns, M, N, stride_zm, stride_zn)
            if base_scale is not None:
                acc *= load_scale(base_scale, columns, N)[None, :]
        if u is not None:
            acc = _add_low_rank(
                acc, u, B, mid_scale, out_scale, scaling, rows, columns, M, N, R,
                stride_um, stride_ur, stride_bn, stride_br, BLOCK_R,
            )  # fmt: skip
        if bias is not None:
            acc += load_scale(bias, columns, N)[None, :]

    store_tile(y, acc, rows, columns, M, N, stride_ym, stride_yn)


def _launch(
    x: Tensor,
    weight: Tensor,
    u: Tensor,
    B: Tensor,
    *,
    backward: bool,
    mid_scale: Tensor | None,
    out_scale: Tensor | None,
    scaling: float,
    base_scale: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    p: float,
    dropout_on_base: bool,
    keep_base: bool,
) -> tuple[Tensor, Tensor | None]:
    M, K = x.shape
    N = weight.shape[0]
    R = u.shape[1]
    y = torch.empty(M, N, dtype=x.dtype, device=x.device)
    z = torch.empty_like(y) if keep_base else None
    if y.numel() == 0:
        return y, z
    two_products = dropout_on_base and seed is not None and base_scale is not None
    # In the forward pass the mask is already in u, unless the base path is dropped as well.
    seed = seed if backward or two_products else None
    plain = all(operand is None for operand in (mid_scale, out_scale, base_scale, bias, z, seed))
    config = configs.adapter_linear(x, weight, R, two_products=two_products, plain=plain)
    mid_scale, out_scale, base_scale, bias = (
        None if vector is None else vector.contiguous() for vector in (mid_scale, out_scale, base_scale, bias)
    )
    arguments = {
        "x": x,
        "weight": weight,
        "u": u if R > 0 else None,
        "B": B if R > 0 else None,
        "y": y,
        "z": z,
        "mid_scale": mid_scale,
        "out_scale": out_scale,
        "base_scale": base_scale,
        "bias": bias,
        "seed": seed,
        "M": M,
        "N": N,
        "K": K,
        "R": R,
        "stride_xm": x.stride(0),
        "stride_xk": x.stride(1),
        "stride_wn": weight.stride(0),
        "stride_wk": weight.stride(1),
        "stride_um": u.stride(0),
        "stride_ur": u.stride(1),
        "stride_bn": B.stride(0),
        "stride_br": B.stride(1),
        "stride_ym": y.stride(0),
        "stride_yn": y.stride(1),
        "stride_zm": y.stride(0),
        "stride_zn": y.stride(1),
        "scaling": scaling,
        "threshold": drop_threshold(p),
        "inverse_keep": 1.0 / keep_probability(p),
        "BACKWARD": backward,
        "DROPOUT_ON_BASE": two_products,
    }
    tiles = triton.cdiv(M, config["BLOCK_M"]) * triton.cdiv(N, config["BLOCK_N"])
    configs.launch(_adapter_linear_kernel, (tiles,), arguments, config)
    return y, z


def adapter_linear(
    x: Tensor,
    weight: Tensor,
    u: Tensor,
    B: Tensor,
    *,
    mid_scale: Tensor | None = None,
    out_scale: Tensor | None = None,
    scaling: float = 1.0,
    base_scale: Tensor | None = None,
    bias: Tensor | None = None,
    seed: Tensor | None = None,
    p: float = 0.0,
    dropout_on_base: bool = False,
    keep_base: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """y = g ⊙ z + h ⊙ ((d ⊙ u) Bᵀ) + β with z = x W0ᵀ, h = scaling · out_scale, d = mid_scale, g = base_scale.

    With dropout_on_base, a seed and a base_scale, z = x̃ W0ᵀ and y = x W0ᵀ + (g - 1) ⊙ z + h ⊙ ((d ⊙ u) Bᵀ) + β, where
    x̃ is x under the dropout that made u. With keep_base the result is (y, z).
    Shapes: x [M, K]; weight [N, K]; u [M, R]; B [N, R]; mid_scale [R]; out_scale, base_scale, bias [N]; seed [1] int64;
    y and z [M, N] in x's dtype. weight and u have x's dtype; B and the vectors that or fp32. Any strides; R may be 0.
    """
    y, z = _launch(
        x,
        weight,
        u,
        B,
        backward=False,
        mid_scale=mid_scale,
        out_scale=out_scale,
        scaling=scaling,
        base_scale=base_scale,
        bias=bias,
        seed=seed,
        p=p,
        dropout_on_base=dropout_on_base,
        keep_base=keep_base,
    )
    return y if z is None else (y, z)


def adapter_linear_dx(
    dy: Tensor,
    weight: Tensor,
    q: Tensor,
    A: Tensor,
    *,
    mid_scale: Tensor | None = None,
    base_scale: Tensor | None = None,
    seed: Tensor | None = None,
    p: float = 0.0,
    dropout_on_base: bool = False,
) -> Tensor:
    """dx = (g ⊙ dy) W0 + mask ⊙ ((d ⊙ q) A) / (1 - p), with q = (h ⊙ dy) B from shrink_grad.

    With dropout_on_base, a seed and a base_scale: dx = dy W0 + mask ⊙ (((g - 1) ⊙ dy) W0 + (d ⊙ q) A) / (1 - p).
    Shapes: dy [M, N]; weight [N, K]; q [M, R]; A [R, K]; mid_scale [R]; base_scale [N]; seed [1] int64; dx [M, K] in
    dy's dtype. weight and q have dy's dtype; A and the vectors that or fp32. Any strides; R may be 0.
    """
    dx, _ = _launch(
        dy,
        weight.T,
        q,
        A.T,
        backward=True,
        mid_scale=mid_scale,
        out_scale=None,
        scaling=1.0,
        base_scale=base_scale,
        bias=None,
        seed=seed,
        p=p,
        dropout_on_base=dropout_on_base,
        keep_base=False,
    )
    return dx
