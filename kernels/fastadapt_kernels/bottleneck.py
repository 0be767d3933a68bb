"""A bottleneck on a stream of tokens: the forward pass in one kernel, and a backward that computes the hidden again."""

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


@triton.jit
def _activated(pre, ACTIVATION: tl.constexpr):
    """φ(pre), in fp32."""
    if ACTIVATION == "relu":
        value = tl.where(pre <= 0.0, 0.0, pre)  # unlike a maximum, it keeps NaN
    elif ACTIVATION == "gelu":
        value = 0.5 * pre * (1.0 + tl.erf(pre * 0.7071067811865476))
    elif ACTIVATION == "quick_gelu":
        value = pre * tl.sigmoid(1.702 * pre)
    else:
        value = pre
    return value


@triton.jit
def _slope(pre, ACTIVATION: tl.constexpr):
    """φ'(pre), in fp32."""
    if ACTIVATION == "relu":
        slope = tl.where(pre > 0.0, 1.0, 0.0)
    elif ACTIVATION == "gelu":
        density = 0.3989422804014327 * tl.exp(-0.5 * pre * pre)
        slope = 0.5 * (1.0 + tl.erf(pre * 0.7071067811865476)) + pre * density
    elif ACTIVATION == "quick_gelu":
        gate = tl.sigmoid(1.702 * pre)
        slope = gate * (1.0 + 1.702 * pre * (1.0 - gate))
    else:
        slope = tl.full(pre.shape, 1.0, tl.float32)
    return slope


@triton.jit
def _down_product(
    v,  # [M, K]
    down,  # [H, K]
    down_bias,  # [H] or None
    rows,
    hidden,
    M,
    K,
    H,
    stride_vm,
    stride_vk,
    stride_dh,
    stride_dk,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """D v + a: [BLOCK_M, BLOCK_H] in fp32."""
    acc = tl.zeros((BLOCK_M, BLOCK_H), dtype=tl.float32)
    for start in range(0, K, BLOCK_K):
        inner = start + tl.arange(0, BLOCK_K)
        v_tile = load_tile(v, rows, inner, M, K, stride_vm, stride_vk)  # [BLOCK_M, BLOCK_K]
        down_tile = load_tile(down, inner, hidden, K, H, stride_dk, stride_dh)  # [BLOCK_K, BLOCK_H]
        acc = tl.dot(v_tile, down_tile.to(v_tile.dtype), acc, input_precision="ieee")
    if down_bias is not None:
        acc += load_scale(down_bias, hidden, H)[None, :]
    return acc


@triton.jit
def _load_up(
    up,  # [N, H / GROUPS]
    hidden,
    columns,
    H,
    N,
    stride_un,
    stride_uh,
    GROUPS: tl.constexpr,
):
    """Tile [len(hidden), len(columns)] of the whole Uᵀ, of which only the blocks on the diagonal are in memory."""
    if GROUPS == 1:
        tile = load_tile(up, hidden, columns, H, N, stride_uh, stride_un)
    else:
        width = H // GROUPS
        inner = hidden[:, None] - (columns // (N // GROUPS) * width)[None, :]
        inside = (inner >= 0) & (inner < width) & (columns < N)[None, :]
        pointers = up + inner.to(tl.int64) * stride_uh + columns.to(tl.int64)[None, :] * stride_un
        tile = tl.load(pointers, mask=inside, other=0.0)
    return tile


@triton.jit(do_not_specialize=["threshold"])
def _bottleneck_kernel(
    v,  # [M, K]
    down,  # [H, K]
    up,  # [N, H / GROUPS]
    down_bias,  # [H] or None
    up_bias,  # [N] or None
    residual,  # [M, N] or None
    out,  # [M, N], contiguous
    seed,  # [1] or None
    M,
    N,
    K,
    H,
    stride_vm,
    stride_vk,
    stride_dh,
    stride_dk,
    stride_un,
    stride_uh,
    stride_zm,
    stride_zn,
    scaling,
    threshold,
    inverse_keep,
    ACTIVATION: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    # A program owns some tokens: their hidden stays in registers between the two products.
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    hidden = tl.arange(0, BLOCK_H)
    pre = _down_product(
        v, down, down_bias, rows, hidden, M, K, H, stride_vm, stride_vk, stride_dh, stride_dk, BLOCK_M, BLOCK_K, BLOCK_H
    )
    activated = _activated(pre, ACTIVATION)
    if seed is not None:
        activated = tl.where(kept_elements(seed, rows, 0, threshold, BLOCK_H), activated * inverse_keep, 0.0)
    activated = activated.to(v.dtype.element_ty)  # [BLOCK_M, BLOCK_H]
    for start in range(0, N, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        up_tile = _load_up(up, hidden, columns, H, N, stride_un, stride_uh, GROUPS)  # [BLOCK_H, BLOCK_N]
        acc = tl.dot(activated, up_tile.to(activated.dtype), input_precision="ieee")
        if up_bias is not None:
            acc += load_scale(up_bias, columns, N)[None, :]
        acc *= scaling
        if residual is not None:
            acc += load_tile(residual, rows, columns, M, N, stride_zm, stride_zn).to(tl.float32)
        store_tile(out, acc, rows, columns, M, N, N, 1)


@triton.jit(do_not_specialize=["threshold"])
def _bottleneck_backward_kernel(
    dy,  # [M, N]
    v,  # [M, K]
    down,  # [H, K]
    up,  # [N, H / GROUPS]
    down_bias,  # [H] or None
    seed,  # [1] or None
    dv,  # [M, K], contiguous, or None
    dhidden,  # [M, H], contiguous, or None: the gradient of D v + a
    dropped,  # [M, H], contiguous, or None: what U is applied to
    bias_sums,  # [tiles, H] or None: a tile's part of the sum of dhidden over tokens
    M,
    N,
    K,
    H,
    stride_ym,
    stride_yn,
    stride_vm,
    stride_vk,
    stride_dh,
    stride_dk,
    stride_un,
    stride_uh,
    scaling,
    threshold,
    inverse_keep,
    ACTIVATION: tl.constexpr,
    GROUPS: tl.constexpr,
    ADDS_DY: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    tile_m = tl.program_id(0)
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    hidden = tl.arange(0, BLOCK_H)
    pre = _down_product(
        v, down, down_bias, rows, hidden, M, K, H, stride_vm, stride_vk, stride_dh, stride_dk, BLOCK_M, BLOCK_K, BLOCK_H
    )
    # What dropout does to the hidden it does to its gradient.
    factor = tl.full((BLOCK_M, BLOCK_H), 1.0, tl.float32)
    if seed is not None:
        factor = tl.where(kept_elements(seed, rows, 0, threshold, BLOCK_H), inverse_keep, 0.0)
    if dropped is not None:
        store_tile(dropped, _activated(pre, ACTIVATION) * factor, rows, hidden, M, H, H, 1)
    # The parentheses are for Triton 3.3.
    if (dv is not None or dhidden is not None) or bias_sums is not None:
        factor *= _slope(pre, ACTIVATION)
        grad = tl.zeros((BLOCK_M, BLOCK_H), dtype=tl.float32)
        for start in range(0, N, BLOCK_N):
            columns = start + tl.arange(0, BLOCK_N)
            dy_tile = load_tile(dy, rows, columns, M, N, stride_ym, stride_yn)  # [BLOCK_M, BLOCK_N]
            up_tile = _load_up(up, hidden, columns, H, N, stride_un, stride_uh, GROUPS)  # [BLOCK_H, BLOCK_N]
            # A residual in fp32 has such a gradient, but the matrix unit wants what v has.
            dy_tile = dy_tile.to(v.dtype.element_ty)
            grad = tl.dot(dy_tile, tl.trans(up_tile.to(dy_tile.dtype)), grad, input_precision="ieee")
        grad *= scaling * factor
        if bias_sums is not None:
            tl.store(bias_sums + tile_m.to(tl.int64) * H + hidden, tl.sum(grad, axis=0), mask=hidden < H)
        rounded = grad.to(v.dtype.element_ty)
        if dhidden is not None:
            store_tile(dhidden, rounded, rows, hidden, M, H, H, 1)
        if dv is not None:
            for start in range(0, K, BLOCK_N):
                columns = start + tl.arange(0, BLOCK_N)
                down_tile = load_tile(down, hidden, columns, H, K, stride_dh, stride_dk)  # [BLOCK_H, BLOCK_N]
                acc = tl.dot(rounded, down_tile.to(rounded.dtype), input_precision="ieee")
                if ADDS_DY:
                    acc += load_tile(dy, rows, columns, M, N, stride_ym, stride_yn).to(tl.float32)
                store_tile(dv, acc, rows, columns, M, K, K, 1)


def _check_hidden(H: int) -> None:
    if H > configs.MOST_HIDDEN:
        raise ValueError(f"a bottleneck takes up to {configs.MOST_HIDDEN} hidden features, got {H}")


class BottleneckLayer(NamedTuple):
    """What a bottleneck is made of: s · (U dropout(φ(D v + a)) + c).

    With groups > 1, U has `groups` blocks on its diagonal, and `up` is these one below the other. Factors and biases
    have v's dtype or fp32. Shapes: down [H, K], H up to configs.MOST_HIDDEN; up [N, H / groups]; down_bias [H]; up_bias
    [N]. Any strides but of the vectors.
    """

    down: Tensor
    up: Tensor
    down_bias: Tensor | None
    up_bias: Tensor | None
    scaling: float
    activation: str
    groups: int


class Grads(NamedTuple):
    """What bottleneck_backward was asked for, else None; all but v's are in fp32. Wants has a flag for each."""

    v: Tensor | None
    down: Tensor | None
    up: Tensor | None
    down_bias: Tensor | None
    up_bias: Tensor | None


class Wants(NamedTuple):
    v: bool = True
    down: bool = True
    up: bool = True
    down_bias: bool = True
    up_bias: bool = True


@prepared
def bottleneck(v: Tensor, layer: BottleneckLayer, residual: Tensor | None, seed: Tensor | None, p: float) -> Tensor:
    """z + s · (U dropout(φ(D v + a)) + c), the hidden under dropout with probability p where there is a seed.

    The residual has v's dtype or fp32, and the result has its dtype, or v's where there is none.
    Shapes: v [M, K]; residual [M, N]; seed [1] int64; result [M, N]. Any strides.
    """
    down, up, down_bias, up_bias, scaling, activation, groups = layer
    (M, K), N, H = v.shape, up.shape[0], down.shape[0]
    _check_hidden(H)
    out = torch.empty(M, N, dtype=v.dtype if residual is None else residual.dtype, device=v.device)
    if M == 0:
        return out
    config = configs.bottleneck(v, down, up, residual)
    arguments = {
        "v": v,
        "down": down,
        "up": up,
        "down_bias": None if down_bias is None else down_bias.contiguous(),
        "up_bias": None if up_bias is None else up_bias.contiguous(),
        "residual": residual,
        "out": out,
        "seed": seed,
        "M": M,
        "N": N,
        "K": K,
        "H": H,
        "stride_vm": v.stride(0),
        "stride_vk": v.stride(1),
        "stride_dh": down.stride(0),
        "stride_dk": down.stride(1),
        "stride_un": up.stride(0),
        "stride_uh": up.stride(1),
        "stride_zm": 0 if residual is None else residual.stride(0),
        "stride_zn": 0 if residual is None else residual.stride(1),
        "scaling": float(scaling),
        "threshold": drop_threshold(p),
        "inverse_keep": 1.0 / keep_probability(p),
        "ACTIVATION": activation,
        "GROUPS": groups,
    }
    configs.launch(_bottleneck_kernel, (triton.cdiv(M, config["BLOCK_M"]),), arguments, config)
    return out


@prepared
def bottleneck_backward(
    dy: Tensor,
    v: Tensor | None,
    layer: BottleneckLayer,
    seed: Tensor | None,
    p: float,
    adds_dy: bool,
    wants: Wants,
) -> Grads:
    """The gradients that are wanted; v is needed for all but up_bias's.

    With h̃ what U is applied to and e = s · mask ⊙ (Uᵀ dy) / (1 − p) ⊙ φ'(D v + a): dv = e D, plus dy with adds_dy,
    where the residual is v itself; dD = eᵀ v; da = Σ e; dU = s · dyᵀ h̃; dc = s · Σ dy. Every sum is in fp32 and in a
    fixed order.
    Shapes: as `bottleneck` has them; dy [M, N] in the result's dtype, any strides; dv [M, K] in v's dtype.
    """
    down, up, down_bias, _, scaling, activation, groups = layer
    M, (H, K) = dy.shape[0], down.shape
    _check_hidden(H)
    dv = dhidden = dropped = dbias = bias_sums = None
    if v is not None:
        dv = torch.empty(M, K, dtype=v.dtype, device=v.device) if wants.v else None
        dhidden = torch.empty(M, H, dtype=v.dtype, device=v.device) if wants.down else None
        # It meets dy in a product.
        dropped = torch.empty(M, H, dtype=dy.dtype, device=v.device) if wants.up else None
        config = configs.bottleneck_backward(dy, v, down, up)
        tiles = triton.cdiv(M, config["BLOCK_M"])
        if wants.down_bias:
            dbias = torch.empty(H, dtype=torch.float32, device=v.device)
            bias_sums = partial_buffer(dbias, tiles)
        if M > 0:
            arguments = {
                "dy": dy,
                "v": v,
                "down": down,
                "up": up,
                "down_bias": None if down_bias is None else down_bias.contiguous(),
                "seed": seed,
                "dv": dv,
                "dhidden": dhidden,
                "dropped": dropped,
                "bias_sums": bias_sums,
                "M": M,
                "N": dy.shape[1],
                "K": K,
                "H": H,
                "stride_ym": dy.stride(0),
                "stride_yn": dy.stride(1),
                "stride_vm": v.stride(0),
                "stride_vk": v.stride(1),
                "stride_dh": down.stride(0),
                "stride_dk": down.stride(1),
                "stride_un": up.stride(0),
                "stride_uh": up.stride(1),
                "scaling": float(scaling),
                "threshold": drop_threshold(p),
                "inverse_keep": 1.0 / keep_probability(p),
                "ACTIVATION": activation,
                "GROUPS": groups,
                "ADDS_DY": adds_dy,
            }
            configs.launch(_bottleneck_backward_kernel, (tiles,), arguments, config)
        if dbias is not None and bias_sums is not None:
            sum_partials(bias_sums, dbias)
    # Each block of U is an up-projection that has its own columns of dy and of the hidden.
    members = [Member(block, down, block, None, None, scaling, None, None) for block in up.chunk(groups)]
    sums = output_grads(
        dy.chunk(groups, 1),
        members,
        dropped,
        [group * (H // groups) for group in range(groups)],
        None,
        want_bias=wants.up_bias,
        want_q=False,
    )
    ddown = None
    if v is not None and dhidden is not None:
        ddown = input_grads(v, dhidden, members[:1], [0], sums, seed=None, p=0.0)[0]
    elif sums.partials is not None:
        sum_partials(sums.partials, sums.total)
    # The members' sums lie one behind the other, as the blocks do in `up`.
    dup = sums.total[: up.numel()].view(up.shape) if dropped is not None else None
    dup_bias = sums.total[-up.shape[0] :] * scaling if wants.up_bias else None
    return Grads(dv, ddown, dup, dbias, dup_bias)
