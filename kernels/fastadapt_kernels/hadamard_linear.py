"""The recomposed weight W0 ⊙ (1 + U V): products with it and gradients of its factors. It lives in registers alone."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .adapter_grads import input_grads, output_grads
from .group import Member
from .launch import prepared
from .shrink import shrink
from .tiles import grouped_tile, load_low_rank, load_scale, load_tile, partial_buffer, store_tile, sum_partials


@triton.jit
def _hadamard_linear_kernel(
    x,  # [M, K]
    weight,  # [N, K]
    U,  # [N, Q]
    V,  # [Q, K]
    u,  # [M, R] or None
    partials,  # [splits, M, R] or None
    B,  # [N, R], or None without u
    bias,  # [N] or None
    y,  # [M, N], contiguous
    M,
    N,
    K,
    Q,
    R,
    splits,
    stride_xm,
    stride_xk,
    stride_wn,
    stride_wk,
    stride_un,
    stride_uq,
    stride_vq,
    stride_vk,
    stride_bn,
    stride_br,
    BASE: tl.constexpr,
    Q_STEPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    tile_m, tile_n = grouped_tile(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    ranks = tl.arange(0, BLOCK_Q)
    U_tile = load_tile(U, columns, ranks, N, Q, stride_un, stride_uq).to(x.dtype.element_ty)  # [BLOCK_N, BLOCK_Q]
    # yᵀ: Hopper's matrix unit takes the left operand from registers, where the rebuilt tile is.
    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)

    for start in range(0, K, BLOCK_K):
        inner = start + tl.arange(0, BLOCK_K)
        x_tile = load_tile(x, inner, rows, K, M, stride_xk, stride_xm)  # [BLOCK_K, BLOCK_M]
        w_tile = load_tile(weight, columns, inner, N, K, stride_wn, stride_wk)  # [BLOCK_N, BLOCK_K]
        V_tile = load_tile(V, ranks, inner, Q, K, stride_vq, stride_vk).to(x_tile.dtype)  # [BLOCK_Q, BLOCK_K]
        rebuilt = tl.dot(U_tile, V_tile, input_precision="ieee")
        for step in tl.static_range(1, Q_STEPS):
            more = step * BLOCK_Q + ranks
            U_more = load_tile(U, columns, more, N, Q, stride_un, stride_uq).to(x_tile.dtype)
            V_more = load_tile(V, more, inner, Q, K, stride_vq, stride_vk).to(x_tile.dtype)
            rebuilt = tl.dot(U_more, V_more, rebuilt, input_precision="ieee")
        rebuilt *= w_tile.to(tl.float32)
        if BASE:
            if x.dtype.element_ty == tl.float32:
                rebuilt += w_tile
            else:
                # In 16 bits W0 (1 + U V) would be rounded to W0 wherever U V is below half an ulp of 1.
                acc = tl.dot(w_tile, x_tile, acc, input_precision="ieee")
        acc = tl.dot(rebuilt.to(x_tile.dtype), x_tile, acc, input_precision="ieee")

    if u is not None:
        for start in range(0, R, BLOCK_R):
            low = start + tl.arange(0, BLOCK_R)
            u_tile = load_low_rank(u, partials, 0, rows, low, M, R, splits, R)  # [BLOCK_M, BLOCK_R]
            if partials is not None:
                store_tile(u, u_tile, rows, low, tl.where(tile_n == 0, M, 0), R, R, 1)
            B_tile = load_tile(B, columns, low, N, R, stride_bn, stride_br).to(u_tile.dtype)  # [BLOCK_N, BLOCK_R]
            acc = tl.dot(B_tile, tl.trans(u_tile), acc, input_precision="ieee")
    if bias is not None:
        acc += load_scale(bias, columns, N)[:, None]
    store_tile(y, acc, columns, rows, N, M, 1, N)


@triton.jit
def _hadamard_grads_kernel(
    x,  # [M, K]
    dy,  # [M, N]
    weight,  # [N, K]
    U,  # [N, Q]
    V,  # [Q, K]
    dU,  # [tiles_k, N, Q]
    dV,  # [tiles_n, Q, K]
    M,
    N,
    K,
    Q,
    stride_xm,
    stride_xk,
    stride_dm,
    stride_dn,
    stride_wn,
    stride_wk,
    stride_un,
    stride_uq,
    stride_vq,
    stride_vk,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    GROUP_N: tl.constexpr,
):
    tile_n, tile_k = grouped_tile(tl.program_id(0), tl.cdiv(N, BLOCK_N), tl.cdiv(K, BLOCK_K), GROUP_N)
    columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    inner = tile_k * BLOCK_K + tl.arange(0, BLOCK_K)
    grad = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
    for start in range(0, M, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        dy_tile = load_tile(dy, columns, rows, N, M, stride_dn, stride_dm)  # [BLOCK_N, BLOCK_M]
        x_tile = load_tile(x, rows, inner, M, K, stride_xm, stride_xk)  # [BLOCK_M, BLOCK_K]
        grad = tl.dot(dy_tile, x_tile, grad, input_precision="ieee")

    # The gradient of U V, contracted with both factors while it is in registers.
    w_tile = load_tile(weight, columns, inner, N, K, stride_wn, stride_wk)
    grad_tile = (grad * w_tile.to(tl.float32)).to(x.dtype.element_ty)
    dU += tile_k.to(tl.int64) * N * Q
    dV += tile_n.to(tl.int64) * Q * K
    for start in range(0, Q, BLOCK_Q):
        ranks = start + tl.arange(0, BLOCK_Q)
        V_tile = load_tile(V, inner, ranks, K, Q, stride_vk, stride_vq).to(grad_tile.dtype)  # [BLOCK_K, BLOCK_Q]
        store_tile(dU, tl.dot(grad_tile, V_tile, input_precision="ieee"), columns, ranks, N, Q, Q, 1)
        U_tile = load_tile(U, ranks, columns, Q, N, stride_uq, stride_un).to(grad_tile.dtype)  # [BLOCK_Q, BLOCK_N]
        store_tile(dV, tl.dot(U_tile, grad_tile, input_precision="ieee"), ranks, inner, Q, K, K, 1)


def _product(
    x: Tensor,
    weight: Tensor,
    U: Tensor,
    V: Tensor,
    u: Tensor | None,
    partials: Tensor | None,
    B: Tensor | None,
    bias: Tensor | None,
    base: bool,
) -> Tensor:
    """x ((W0 or 0) + W0 ⊙ (U V))ᵀ + u Bᵀ + bias; where u is still in partials, the launch completes it."""
    M, K = x.shape
    N, Q = U.shape
    y = torch.empty(M, N, dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    R = 0 if u is None else u.shape[1]
    config = configs.hadamard_linear(x, [x, weight], N, Q)
    arguments = {
        "x": x,
        "weight": weight,
        "U": U,
        "V": V,
        "u": u,
        "partials": partials,
        "B": B,
        "bias": None if bias is None else bias.contiguous(),
        "y": y,
        "M": M,
        "N": N,
        "K": K,
        "Q": Q,
        "R": R,
        "splits": 1 if partials is None else partials.shape[0],
        "stride_xm": x.stride(0),
        "stride_xk": x.stride(1),
        "stride_wn": weight.stride(0),
        "stride_wk": weight.stride(1),
        "stride_un": U.stride(0),
        "stride_uq": U.stride(1),
        "stride_vq": V.stride(0),
        "stride_vk": V.stride(1),
        "stride_bn": 0 if B is None else B.stride(0),
        "stride_br": 0 if B is None else B.stride(1),
        "BASE": base,
        "Q_STEPS": triton.cdiv(Q, config["BLOCK_Q"]),
    }
    tiles = triton.cdiv(M, config["BLOCK_M"]) * triton.cdiv(N, config["BLOCK_N"])
    configs.launch(_hadamard_linear_kernel, (tiles,), arguments, config)
    return y


class HadamardLayer(NamedTuple):
    """((W0 or 0) + W0 ⊙ (U V)) x + B (A x) + β; base: whether W0 x is part of it.

    Shapes: weight [N, K]; U [N, q]; V [q, K], q at least 1; A [R, K]; B [N, R]; bias [N]; any strides. weight has x's
    dtype, the factors that or fp32.
    """

    weight: Tensor
    U: Tensor
    V: Tensor
    A: Tensor | None = None
    B: Tensor | None = None
    bias: Tensor | None = None
    base: bool = True


@prepared
def hadamard_linear(x: Tensor, layer: HadamardLayer) -> tuple[Tensor, Tensor | None]:
    """(y, u): y = ((W0 or 0) + W0 ⊙ (U V)) x + B u + β with u = A x, None without A.

    Shapes: x [M, K], any strides; u [M, R]; y [M, N].
    """
    weight, U, V, A, B, bias, base = layer
    u = partials = None
    if A is not None:
        u, partials = shrink([x], [A], out_dtype=x.dtype)
    return _product(x, weight, U, V, u, partials, B, bias, base), u


class Wants(NamedTuple):
    """Which gradients hadamard_linear_backward must give: dx; dU and dV; dA; dβ. dB it gives where there is a u."""

    x: bool = True
    factors: bool = True
    A: bool = True
    bias: bool = False


class Grads(NamedTuple):
    """What hadamard_linear_backward was asked for; all but dx are in fp32."""

    dx: Tensor | None
    dU: Tensor | None
    dV: Tensor | None
    dA: Tensor | None
    dB: Tensor | None
    dbias: Tensor | None


def _factor_grads(dy: Tensor, x: Tensor, weight: Tensor, U: Tensor, V: Tensor) -> tuple[Tensor, Tensor]:
    """dU = (G ⊙ W0) Vᵀ and dV = Uᵀ (G ⊙ W0) with G = dyᵀ x, in fp32; sums over tiles in a fixed order."""
    M, K = x.shape
    N, Q = U.shape
    dU = torch.empty(N, Q, dtype=torch.float32, device=x.device)
    dV = torch.empty(Q, K, dtype=torch.float32, device=x.device)
    if M == 0 or N == 0 or K == 0:
        return dU.zero_(), dV.zero_()
    config = configs.hadamard_grads(x, [x, dy, weight])
    tiles_n, tiles_k = triton.cdiv(N, config["BLOCK_N"]), triton.cdiv(K, config["BLOCK_K"])
    dU_parts, dV_parts = partial_buffer(dU, tiles_k), partial_buffer(dV, tiles_n)
    arguments = {
        "x": x,
        "dy": dy,
        "weight": weight,
        "U": U,
        "V": V,
        "dU": dU_parts,
        "dV": dV_parts,
        "M": M,
        "N": N,
        "K": K,
        "Q": Q,
        "stride_xm": x.stride(0),
        "stride_xk": x.stride(1),
        "stride_dm": dy.stride(0),
        "stride_dn": dy.stride(1),
        "stride_wn": weight.stride(0),
        "stride_wk": weight.stride(1),
        "stride_un": U.stride(0),
        "stride_uq": U.stride(1),
        "stride_vq": V.stride(0),
        "stride_vk": V.stride(1),
    }
    configs.launch(_hadamard_grads_kernel, (tiles_n * tiles_k,), arguments, config)
    sum_partials(dU_parts, dU)
    sum_partials(dV_parts, dV)
    return dU, dV


@prepared
def hadamard_linear_backward(
    dy: Tensor, layer: HadamardLayer, x: Tensor | None, u: Tensor | None, wants: Wants
) -> Grads:
    """The gradients of hadamard_linear, those that are asked for, from dy.

    With W = (W0 or 0) + W0 ⊙ (U V), G = dyᵀ x and q = dy B: dx = dy W + q A; given x, dU = (G ⊙ W0) Vᵀ and
    dV = Uᵀ (G ⊙ W0), and where there is an A dA = qᵀ x; dB = dyᵀ u given u; dbias = Σ_m dy. Neither W nor G reaches
    memory. Every sum is in fp32 and in a fixed order.
    Shapes: dy [M, N], any strides; x [M, K]; u as hadamard_linear gave it; dx [M, K] in dy's dtype; the rest in fp32.
    """
    weight, U, V, A, B, _, base = layer
    # What depends on the low-rank path and the bias alone is the adapter form's.
    down, up = (weight[:0], weight[:, :0]) if A is None or B is None else (A, B)
    member = Member(weight, down, up, None, None, 1.0, None, None)
    sums = output_grads([dy], [member], u, [0], None, want_bias=wants.bias, want_q=False)
    want_A = wants.A and A is not None and x is not None
    q = q_partials = None
    if A is not None and (wants.x or want_A):
        q, q_partials = shrink([dy], [up.T], out_dtype=dy.dtype)
        if q_partials is not None and not wants.x:
            sum_partials(q_partials, q)
    dx = dU = dV = dA = None
    if wants.x:
        low_rank = None if A is None else A.T
        dx = _product(dy, weight.T, V.T, U.T, q, q_partials, low_rank, None, base)
    if x is not None and wants.factors:
        dU, dV = _factor_grads(dy, x, weight, U, V)
    if x is not None and want_A:
        (dA,) = input_grads(x, q, [member], [0], sums, seed=None, p=0.0)
    elif sums.partials is not None:
        sum_partials(sums.partials, sums.total)
    return Grads(
        dx,
        dU,
        dV,
        dA,
        None if sums.P is None else sums.P[0],
        None if sums.dbias is None else sums.dbias[0],
    )
