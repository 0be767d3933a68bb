"""Down to rank r: u = x̃ Aᵀ in the forward pass and its twin q = (h ⊙ dy) B in the backward pass."""

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
def _shrink_kernel(
    x,  # [M, K]
    A,  # [R, K]
    u,  # [splits, M, R]
    in_scale,  # [K] or None
    seed,  # [1] or None
    M,
    K,
    R,
    stride_xm,
    stride_xk,
    stride_ar,
    stride_ak,
    stride_us,
    stride_um,
    stride_ur,
    scaling,
    threshold,
    steps_per_split,
    EXACT_A: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    # Tiles along r are neighbours: those that share rows of x find them in L2.
    tiles_r = tl.cdiv(R, BLOCK_R)
    program = tl.program_id(0)
    split = tl.program_id(1)
    rows = program // tiles_r * BLOCK_M + tl.arange(0, BLOCK_M)
    ranks = program % tiles_r * BLOCK_R + tl.arange(0, BLOCK_R)

    acc = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    first = split * steps_per_split * BLOCK_K
    last = tl.minimum(first + steps_per_split * BLOCK_K, K)
    for start in range(first, last, BLOCK_K):
        columns = start + tl.arange(0, BLOCK_K)
        x_tile = load_tile(x, rows, columns, M, K, stride_xm, stride_xk)  # [BLOCK_M, BLOCK_K]
        if seed is not None:
            x_tile = tl.where(kept_elements(seed, rows, start, threshold, BLOCK_K), x_tile, 0.0)
        A_tile = load_tile(A, columns, ranks, K, R, stride_ak, stride_ar)  # [BLOCK_K, BLOCK_R]
        if in_scale is not None:
            # On the small operand and in fp32: one rounding, and x goes to the dot as it was loaded.
            A_tile = A_tile.to(tl.float32) * load_scale(in_scale, columns, K)[:, None]
        A_rounded = A_tile.to(x_tile.dtype)
        acc = tl.dot(x_tile, A_rounded, acc, input_precision="ieee")
        if EXACT_A:
            A_rest = (A_tile - A_rounded.to(tl.float32)).to(x_tile.dtype)
            acc = tl.dot(x_tile, A_rest, acc, input_precision="ieee")

    store_tile(u + split.to(tl.int64) * stride_us, acc * scaling, rows, ranks, M, R, stride_um, stride_ur)


def contract(
    x: Tensor,
    A: Tensor,
    *,
    out_dtype: torch.dtype,
    in_scale: Tensor | None = None,
    scaling: float = 1.0,
    seed: Tensor | None = None,
    p: float = 0.0,
    exact_A: bool = False,
) -> Tensor:
    """scaling · x̃ (in_scale ⊙ A)ᵀ: what shrink, shrink_grad and weight_norm have in common.

    exact_A keeps an fp32 A whole beside a 16-bit x, as two 16-bit parts and two dots.
    Shapes: x [M, K]; A [R, K]; in_scale [K]; seed [1] int64; result [M, R].
    """
    M, K = x.shape
    R = A.shape[0]
    u = torch.empty(M, R, dtype=out_dtype, device=x.device)
    if u.numel() == 0:
        return u
    if K == 0:
        return u.zero_()
    config, splits, steps_per_split = configs.shrink(x, A)
    partials = partial_buffer(u, splits)
    tiles = triton.cdiv(M, config["BLOCK_M"]) * triton.cdiv(R, config["BLOCK_R"])
    arguments = {
        "x": x,
        "A": A,
        "u": partials,
        "in_scale": None if in_scale is None else in_scale.contiguous(),
        "seed": seed,
        "M": M,
        "K": K,
        "R": R,
        "stride_xm": x.stride(0),
        "stride_xk": x.stride(1),
        "stride_ar": A.stride(0),
        "stride_ak": A.stride(1),
        "stride_us": partials.stride(0),
        "stride_um": partials.stride(1),
        "stride_ur": partials.stride(2),
        "scaling": scaling if seed is None else scaling / keep_probability(p),
        "threshold": drop_threshold(p),
        "steps_per_split": steps_per_split,
        "EXACT_A": exact_A and A.dtype == torch.float32 and x.dtype != torch.float32,
    }
    configs.launch(_shrink_kernel, (tiles, splits), arguments, config)
    sum_partials(partials, u)
    return u


def shrink(x: Tensor, A: Tensor, *, seed: Tensor | None = None, p: float = 0.0) -> Tensor:
    """u = x̃ Aᵀ, where x̃ is x under dropout with probability p, or x itself without a seed.

    Shapes: x [M, K]; A [R, K], fp32 or x's dtype; seed [1] int64; u [M, R] in x's dtype. Any strides.
    """
    return contract(x, A, out_dtype=x.dtype, seed=seed, p=p)


def shrink_grad(dy: Tensor, B: Tensor, *, out_scale: Tensor | None = None, scaling: float = 1.0) -> Tensor:
    """q = (h ⊙ dy) B with h = scaling · out_scale.

    Shapes: dy [M, N]; B [N, R], fp32 or dy's dtype; out_scale [N]; q [M, R] in dy's dtype. Any strides.
    """
    return contract(dy, B.T, out_dtype=dy.dtype, in_scale=out_scale, scaling=scaling)
