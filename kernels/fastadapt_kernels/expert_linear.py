"""The adapter form of experts, on rows that are sorted by expert: forward, and with the gradients of every part."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .expert_grads import expert_grads
from .experts import block_of_experts, expert_tile, row_tiles, strides_of_factors, table
from .launch import prepared
from .low_rank import add_low_rank
from .tiles import grouped_tile, load_scale, load_tile, store_tile


@triton.jit(do_not_specialize=["S"])
def _expert_shrink_kernel(
    x,  # [S, K]
    factors,  # [E, R, K], or [1, R, K] and stride_fe is 0
    in_scales,  # [E, K], contiguous, or None
    u,  # [S, R], contiguous
    offsets,  # [E]
    S,
    E,
    K,
    R,
    stride_xm,
    stride_xk,
    stride_fe,
    stride_fr,
    stride_fn,
    scaling,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    # Tiles along r are neighbours: those that share rows of x find them in L2.
    tiles_r = tl.cdiv(R, BLOCK_R)
    program = tl.program_id(0)
    expert, first, end = expert_tile(offsets, program // tiles_r, S, E, BLOCK_M, BLOCK_E)
    if first >= end:
        return
    rows = first + tl.arange(0, BLOCK_M)
    ranks = program % tiles_r * BLOCK_R + tl.arange(0, BLOCK_R)
    factors += expert.to(tl.int64) * stride_fe
    if in_scales is not None:
        in_scales += expert.to(tl.int64) * K

    acc = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    for start in range(0, K, BLOCK_K):
        columns = start + tl.arange(0, BLOCK_K)
        x_tile = load_tile(x, rows, columns, end, K, stride_xm, stride_xk)  # [BLOCK_M, BLOCK_K]
        tile = load_tile(factors, columns, ranks, K, R, stride_fn, stride_fr)  # [BLOCK_K, BLOCK_R]
        if in_scales is not None:
            # On the small operand and in fp32: one rounding, and x goes to the dot as it was loaded.
            tile = tile.to(tl.float32) * load_scale(in_scales, columns, K)[:, None]
        acc = tl.dot(x_tile, tile.to(x_tile.dtype), acc, input_precision="ieee")
    store_tile(u, acc * scaling, rows, ranks, end, R, R, 1)


@triton.jit
def _add_expert_low_rank(
    acc,  # [BLOCK_M, BLOCK_N]
    u,  # [S, R], contiguous
    factors,  # [E, R, N]
    mid_scales,  # [E, R] or None
    out_scales,  # [E, N] or None
    scaling,
    expert,
    rows,
    columns,
    end,
    N,
    R,
    stride_fe,
    stride_fr,
    stride_fn,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """acc + scaling · u (d[e] ⊙ factors[e] ⊙ out_scale[e])."""
    e = expert.to(tl.int64)
    scale = tl.zeros((BLOCK_N,), dtype=tl.float32) + scaling
    if out_scales is not None:
        scale *= load_scale(out_scales + e * N, columns, N)
    mid_scale = None
    if mid_scales is not None:
        mid_scale = (mid_scales + e * R,)
    return add_low_rank(
        acc, u, None, factors + e * stride_fe, mid_scale, scale, 0, 0, False, rows, columns,
        end, N, R, 1, R, stride_fr, stride_fn, BLOCK_R,
    )  # fmt: skip


@triton.jit(do_not_specialize=["S"])
def _expert_product_kernel(
    x,  # [S, K]
    x_dropped,  # [S, K] where base_scales hit W0 x̃ alone, or None
    weight,  # [E, N, K], or None without a base product
    u,  # [S, R], contiguous, or None without a low-rank product
    factors,  # [E, R, N], or [1, R, N] and stride_fe is 0
    mid_scales,  # [E, R] or None; these tables are contiguous
    out_scales,  # [E, N] or None
    base_scales,  # [E, N] or None
    biases,  # [E, N] or None
    y,  # [S, N], contiguous
    z,  # [S, N], contiguous, or None
    offsets,  # [E]
    S,
    E,
    N,
    K,
    R,
    stride_xm,
    stride_xk,
    stride_dm,
    stride_dk,
    stride_we,
    stride_wn,
    stride_wk,
    stride_fe,
    stride_fr,
    stride_fn,
    scaling,
    TIED: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    # Tiles of one expert that walk the columns together share its weight in L2.
    tile_m, tile_n = grouped_tile(tl.program_id(0), S // BLOCK_M + E, tl.cdiv(N, BLOCK_N), GROUP_M)
    expert, first, end = expert_tile(offsets, tile_m, S, E, BLOCK_M, BLOCK_E)
    if first >= end:
        return
    e = expert.to(tl.int64)
    rows = first + tl.arange(0, BLOCK_M)
    columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    dropped = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)

    if weight is not None:
        weight += e * stride_we
        for start in range(0, K, BLOCK_K):
            inner = start + tl.arange(0, BLOCK_K)
            x_tile = load_tile(x, rows, inner, end, K, stride_xm, stride_xk)  # [BLOCK_M, BLOCK_K]
            w_tile = load_tile(weight, inner, columns, K, N, stride_wk, stride_wn)  # [BLOCK_K, BLOCK_N]
            acc = tl.dot(x_tile, w_tile, acc, input_precision="ieee")
            if x_dropped is not None:
                x_tile = load_tile(x_dropped, rows, inner, end, K, stride_dm, stride_dk)
                dropped = tl.dot(x_tile, w_tile, dropped, input_precision="ieee")

    # What g multiplies, and what it does not.
    scaled = acc
    if x_dropped is not None:
        acc -= dropped
        scaled = dropped
    if u is not None and TIED:
        scaled = _add_expert_low_rank(
            scaled, u, factors, mid_scales, out_scales, scaling, expert, rows, columns, end, N, R,
            stride_fe, stride_fr, stride_fn, BLOCK_N, BLOCK_R,
        )  # fmt: skip
    if z is not None:
        store_tile(z, scaled, rows, columns, end, N, N, 1)
    if base_scales is not None:
        scaled *= load_scale(base_scales + e * N, columns, N)[None, :]
    if x_dropped is not None:
        scaled += acc
    if u is not None and not TIED:
        scaled = _add_expert_low_rank(
            scaled, u, factors, mid_scales, out_scales, scaling, expert, rows, columns, end, N, R,
            stride_fe, stride_fr, stride_fn, BLOCK_N, BLOCK_R,
        )  # fmt: skip
    if biases is not None:
        scaled += load_scale(biases + e * N, columns, N)[None, :]
    store_tile(y, scaled, rows, columns, end, N, N, 1)


def _shrink(
    x: Tensor, factors: Tensor, offsets: Tensor, *, in_scales: Tensor | None = None, scaling: float = 1.0
) -> Tensor:
    """u = scaling · x[s] (in_scales[e] ⊙ factors[e])ᵀ. Shapes: x [S, K]; factors [E or 1, R, K]; u [S, R]."""
    S, K = x.shape
    E, R = offsets.shape[0], factors.shape[1]
    u = torch.empty(S, R, dtype=x.dtype, device=x.device)
    if u.numel() == 0:
        return u
    config = configs.expert_shrink(x, E, R)
    arguments = {
        "x": x,
        "factors": factors,
        "in_scales": table(in_scales),
        "u": u,
        "offsets": offsets,
        "S": S,
        "E": E,
        "K": K,
        "R": R,
        "stride_xm": x.stride(0),
        "stride_xk": x.stride(1),
        **strides_of_factors(factors),
        "scaling": scaling,
        "BLOCK_E": block_of_experts(offsets),
    }
    grid = row_tiles(S, E, config["BLOCK_M"]) * triton.cdiv(R, config["BLOCK_R"])
    configs.launch(_expert_shrink_kernel, (grid,), arguments, config)
    return u


class _Epilogue(NamedTuple):
    """What comes to a base product: its scale, the low-rank product of u [S, R] with factors [E or 1, R, N], a bias.

    tied: the low-rank product comes before base_scales [E, N], not behind them.
    """

    u: Tensor | None = None
    factors: Tensor | None = None
    mid_scales: Tensor | None = None
    out_scales: Tensor | None = None
    base_scales: Tensor | None = None
    biases: Tensor | None = None
    scaling: float = 1.0
    tied: bool = False


def _product(
    x: Tensor | None,
    weight: Tensor | None,
    offsets: Tensor,
    epilogue: _Epilogue,
    y: Tensor,
    *,
    x_dropped: Tensor | None = None,
    z: Tensor | None = None,
) -> Tensor:
    """y = x[s] W0[e]ᵀ and its epilogue, z what base_scales multiply. Without x and a weight the epilogue alone.

    Shapes: x and x_dropped [S, K]; weight [E, N, K], any strides; y, which is filled, and z [S, N].
    """
    if y.numel() == 0:
        return y
    S, N = y.shape
    E, K = offsets.shape[0], 0 if x is None else x.shape[1]
    u, factors = epilogue.u, epilogue.factors
    if factors is None or factors.shape[1] == 0:
        u = factors = None
    R = 0 if factors is None else factors.shape[1]
    operands = [tensor for tensor in (x, weight) if tensor is not None] or [y]
    config = configs.expert_product(y, operands, E, R, two_products=x_dropped is not None)
    arguments = {
        "x": x,
        "x_dropped": x_dropped,
        "weight": weight,
        "u": u,
        "factors": factors,
        "mid_scales": table(epilogue.mid_scales),
        "out_scales": table(epilogue.out_scales),
        "base_scales": table(epilogue.base_scales),
        "biases": table(epilogue.biases),
        "y": y,
        "z": z,
        "offsets": offsets,
        "S": S,
        "E": E,
        "N": N,
        "K": K,
        "R": R,
        **_strides(("xm", "xk"), x),
        **_strides(("dm", "dk"), x_dropped),
        **_strides(("we", "wn", "wk"), weight),
        **strides_of_factors(factors),
        "scaling": epilogue.scaling,
        "TIED": epilogue.tied,
        "BLOCK_E": block_of_experts(offsets),
    }
    grid = row_tiles(S, E, config["BLOCK_M"]) * triton.cdiv(N, config["BLOCK_N"])
    configs.launch(_expert_product_kernel, (grid,), arguments, config)
    return y


def _strides(names: tuple[str, ...], tensor: Tensor | None) -> dict[str, int]:
    strides = (0,) * len(names) if tensor is None else tensor.stride()
    return {f"stride_{name}": stride for name, stride in zip(names, strides, strict=True)}


@prepared
def base_products(weight: Tensor, A: Tensor) -> Tensor:
    """A[e] W0[e]ᵀ in fp32, in one launch that reads every weight once: the rows of A go through the product as rows of
    their expert. An fp32 A stays whole beside a 16-bit weight, as two 16-bit parts.

    Shapes: weight [E, N, K], any strides; A [E or 1, R, K]; result [E, R, N].
    """
    E, N, K = weight.shape
    R = A.shape[1]
    parts = [A.to(weight.dtype)]
    if A.dtype == torch.float32 and weight.dtype != torch.float32:
        parts.append((A - parts[0]).to(weight.dtype))
    rows = torch.cat(parts, 1).expand(E, -1, -1).reshape(-1, K)
    y = torch.empty(rows.shape[0], N, dtype=torch.float32, device=weight.device)
    step = R * len(parts)
    offsets = torch.arange(1, E + 1, dtype=torch.int32, device=weight.device) * step
    return _product(rows, weight, offsets, _Epilogue(), y).view(E, len(parts), R, N).sum(1)


@prepared
def expert_linear(
    x: Tensor, x_dropped: Tensor | None, offsets: Tensor, experts: Any, keep: Any
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(y, u, z) of rows that are sorted by expert, in two launches:

        y_s = g[e] ⊙ (W0[e] x_s) + h[e] ⊙ (B[e] (d[e] ⊙ (A[e] x̃_s))) + β[e],  offsets[e − 1] ≤ s < offsets[e]

    u = A x̃ and z, what g multiplies, are given where keep says so. No launch waits for the host: the grid has room for
    every way to cut S rows into segments, and programs without rows leave at once.
    experts, as fastadapt's Experts has them: weight [E, N, K], any strides; A [E, R, K] and B [E, R, N], or one pair
    for all; mid_scale d [E, R], out_scale [E, N] and h = scaling · out_scale; base_scale g and bias β [E, N]; what is
    None is one, or not there. tied: h = scaling · g. dropout_on_base: with x̃ y has (g − 1) ⊙ W0 x̃ beside W0 x.
    Shapes: x [S, K] and x_dropped x̃, x where it is None, any strides; offsets [E] int32; y and z [S, N]; u [S, R].
    """
    offsets = offsets.contiguous()
    S, N = x.shape[0], experts.weight.shape[1]
    low = x if x_dropped is None else x_dropped
    u = None if experts.A is None else _shrink(low, experts.A, offsets)
    y = torch.empty(S, N, dtype=x.dtype, device=x.device)
    z = torch.empty_like(y) if keep.z else None
    on_base = experts.dropout_on_base and experts.base_scale is not None
    _, _, B, d, h, g, bias, _, scaling, tied, _ = experts
    epilogue = _Epilogue(u, B, d, h, g, bias, scaling, tied)
    _product(x, experts.weight, offsets, epilogue, y, x_dropped=x_dropped if on_base else None, z=z)
    return y, u if keep.u else None, z


class Grads(NamedTuple):
    """What expert_linear_backward was asked for; the sums over rows are in fp32."""

    dx: Tensor | None
    dx_dropped: Tensor | None
    dA: Tensor | None
    dB: Tensor | None
    dmid: Tensor | None
    dout: Tensor | None
    dbase: Tensor | None
    dbias: Tensor | None


@prepared
def expert_linear_backward(dy: Tensor, offsets: Tensor, experts: Any, saved: Any, wants: Any) -> Grads:
    """The gradients of expert_linear, those that are asked for. With q = h ⊙ dy through Bᵀ, sums over rows of e each:

        dx = (g ⊙ dy) W0    dx̃ = (d ⊙ q) A, in dx where x̃ is x    dA = Σ (d ⊙ q) x̃ᵀ    dB = Σ (d ⊙ u) (h ⊙ dy)ᵀ
        dd = Σ q ⊙ u        dh = scaling · Σ dy ⊙ (B (d ⊙ u))      dg = Σ dy ⊙ z         dβ = Σ dy

    and with dropout_on_base dy W0 for x, ((g − 1) ⊙ dy) W0 for x̃. dA and dB of one pair for all experts are summed over
    them. saved: x̃ for dA, u for dB, dd and dh, z for dg, and row_scale [S], what every row of dy is multiplied with for
    the sums. Every sum is in fp32 and in a fixed order.
    Shapes: dy [S, N], any strides; the rest as in expert_linear, each gradient as what it is of.
    """
    offsets = offsets.contiguous()
    weight, A, B, d, h, g, _, _, scaling, tied, drops_base = experts
    out_scales = g if tied else h
    on_base = g is not None and wants.dropped and drops_base
    q = None
    if A is not None and (wants.x or wants.A or wants.mid_scale):
        q = _shrink(dy, B, offsets, in_scales=out_scales, scaling=scaling)
    has_u = saved.u is not None
    wants_B, wants_out = wants.B and has_u, wants.out_scale and has_u
    sums = expert_grads(
        dy,
        offsets,
        thin=saved.u if wants_B or wants_out else None,
        other=saved.z if wants.base_scale else None,
        row_scale=saved.row_scale,
        factors=B if wants_out else None,
        mid_scales=d,
        out_scales=out_scales,
        base_scales=g if wants.x else None,
        base_shift=float(on_base),
        scaling=scaling,
        shared=B is not None and B.shape[0] < offsets.shape[0],
        want_outer=wants_B,
        want_sums=wants.bias,
    )
    dx = dx_dropped = dA = dmid = None
    if wants.x:
        dx, dx_dropped = _input_grads(dy, sums.scaled, weight.mT, offsets, _Epilogue(q, A, d), on_base, wants.dropped)
    if A is not None and wants.A and saved.x is not None:
        dA = expert_grads(
            saved.x,
            offsets,
            thin=q,
            row_scale=saved.row_scale,
            mid_scales=d,
            shared=A.shape[0] < offsets.shape[0],
            want_outer=True,
        ).outer
    if wants.mid_scale and has_u and q is not None:
        dmid = expert_grads(q, offsets, other=saved.u, row_scale=saved.row_scale).dots
    return Grads(dx, dx_dropped, dA, sums.outer, dmid, sums.low_rank_dots, sums.dots, sums.sums)


def _input_grads(
    dy: Tensor,
    scaled: Tensor | None,
    weight: Tensor,
    offsets: Tensor,
    epilogue: _Epilogue,
    on_base: bool,
    dropped: bool,
) -> tuple[Tensor, Tensor | None]:
    """(dx, dx̃), dx̃ None where all of it is in dx. Shapes: weight [E, K, N]."""
    empty = torch.empty(dy.shape[0], weight.shape[1], dtype=dy.dtype, device=dy.device)
    through = dy if scaled is None or on_base else scaled
    if not dropped:
        return _product(through, weight, offsets, epilogue, empty), None
    dx = _product(through, weight, offsets, _Epilogue(), empty)
    if on_base:
        return dx, _product(scaled, weight, offsets, epilogue, torch.empty_like(dx))
    if epilogue.u is None:
        return dx, None
    return dx, _product(None, None, offsets, epilogue, torch.empty_like(dx))
