"""The adapter form on one accumulator, forward and dx, for a group of layers that read the same x."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .adapter_grads import input_grads, output_grads
from .group import Member, matrices, offsets, strides, uniform, vectors
from .launch import prepared
from .low_rank import add_low_rank, add_low_ranks, scaled_factor
from .shrink import kept_bits, shrink
from .tiles import (
    count_tiles,
    drop_threshold,
    grouped_tile,
    keep_probability,
    kept_elements,
    load_kept,
    load_member_vector,
    load_tile,
    locate,
    pick,
    store_tile,
    sum_partials,
)

__all__ = ["Grads", "Member", "adapter_linear", "adapter_linear_backward"]


@triton.jit(do_not_specialize=["threshold"])
def _adapter_linear_kernel(
    x,  # [M, K]
    weights,  # [N, K]; this and what follows in the plural: by member
    As,  # [R, K] where u is computed here, or None
    Bs,  # [N, R], or None where no member has a rank
    u,  # [M, width]
    partials,  # [splits, M, width] or None
    ys,  # [M, N], contiguous
    zs,  # [M, N], contiguous, or None
    mid_scales,  # [R] or None
    out_scales,  # [N] or None
    base_scales,  # [N] or None
    biases,  # [N] or None
    seed,  # [1] or None
    kept,  # [M, words] int32: the mask in bits, where u was not computed here, or None
    M,
    Ns,
    K,
    Rs,
    u_offsets,
    width,
    splits,
    z_rows,
    words,
    stride_xm,
    stride_xk,
    strides_wn,
    strides_wk,
    strides_ar,
    strides_ak,
    strides_bn,
    strides_br,
    scalings,
    threshold,
    inverse_keep,
    SHARED_U: tl.constexpr,
    DROPOUT_ON_BASE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    # The column tiles of all members stand side by side, so that those that share rows of x find them in L2.
    tiles_n = count_tiles(Ns, BLOCK_N)
    tile_m, tile = grouped_tile(tl.program_id(0), tl.cdiv(M, BLOCK_M), tiles_n, GROUP_M)
    member, tile_n = locate(tile, Ns, BLOCK_N)
    N = pick(Ns, member)
    weight = pick(weights, member)
    stride_wn = pick(strides_wn, member)
    stride_wk = pick(strides_wk, member)
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    if Bs is not None:
        R = pick(Rs, member)
        offset = pick(u_offsets, member)
        writes_u = tile_n == 0
        if SHARED_U:
            writes_u = tile == 0
    if As is not None:
        A = pick(As, member)
        stride_ar = pick(strides_ar, member)
        stride_ak = pick(strides_ak, member)
        ranks = tl.arange(0, BLOCK_R)
        low_rank = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    dropped = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)

    for start in range(0, K, BLOCK_K):
        inner = start + tl.arange(0, BLOCK_K)
        x_tile = load_tile(x, rows, inner, M, K, stride_xm, stride_xk)  # [BLOCK_M, BLOCK_K]
        w_tile = load_tile(weight, inner, columns, K, N, stride_wk, stride_wn)  # [BLOCK_K, BLOCK_N]
        acc = tl.dot(x_tile, w_tile, acc, input_precision="ieee")
        if kept is not None:
            x_tile = tl.where(load_kept(kept, rows, start, M, words, BLOCK_K), x_tile, 0.0)
        elif seed is not None:
            x_tile = tl.where(kept_elements(seed, rows, start, threshold, BLOCK_K), x_tile, 0.0)
        if DROPOUT_ON_BASE:
            dropped = tl.dot(x_tile, w_tile, dropped, input_precision="ieee")
        if As is not None:
            A_tile = load_tile(A, inner, ranks, K, R, stride_ak, stride_ar)  # [BLOCK_K, BLOCK_R]
            low_rank = tl.dot(x_tile, A_tile.to(x_tile.dtype), low_rank, input_precision="ieee")

    z = acc
    if DROPOUT_ON_BASE:
        z = dropped * inverse_keep
    if zs is not None:
        store_tile(pick(zs, member), z, rows, columns, pick(z_rows, member), N, N, 1)
    if base_scales is not None:
        base_scale = load_member_vector(base_scales, member, columns, N, 1.0)
        if DROPOUT_ON_BASE:
            acc += (base_scale - 1.0)[None, :] * z
        else:
            acc *= base_scale[None, :]
    if Bs is not None:
        B = pick(Bs, member)
        stride_bn = pick(strides_bn, member)
        stride_br = pick(strides_br, member)
        column_scale = tl.zeros((BLOCK_N,), dtype=tl.float32) + pick(scalings, member)
        if out_scales is not None:
            column_scale *= load_member_vector(out_scales, member, columns, N, 1.0)
        if As is not None:
            u_tile = (low_rank * inverse_keep).to(x.dtype.element_ty)
            store_tile(u + offset, u_tile, rows, ranks, tl.where(writes_u, M, 0), R, width, 1)
            B_tile = scaled_factor(
                B, mid_scales, column_scale, member, ranks, columns, R, N, stride_br, stride_bn, BLOCK_R
            )
            acc = tl.dot(u_tile, B_tile.to(u_tile.dtype), acc, input_precision="ieee")
        else:
            acc = add_low_rank(
                acc, u, partials, B, mid_scales, column_scale, member, offset, writes_u, rows, columns,
                M, N, R, splits, width, stride_br, stride_bn, BLOCK_R,
            )  # fmt: skip
    if biases is not None:
        acc += load_member_vector(biases, member, columns, N, 0.0)[None, :]
    store_tile(pick(ys, member), acc, rows, columns, M, N, N, 1)


@triton.jit(do_not_specialize=["threshold"])
def _adapter_linear_dx_kernel(
    dys,  # [M, N], g ⊙ dy where a member has g and keeps its base path; this and the other plurals: by member
    offset_dys,  # [M, N], contiguous: (g - 1) ⊙ dy where a member drops its base path, or None
    weights,  # [N, K]
    As,  # [R, K], or None where no member has a rank
    q,  # [M, width]
    partials,  # [splits, M, width] or None
    dx,  # [M, K], contiguous
    mid_scales,  # [R] or None
    seed,  # [1] or None
    M,
    Ns,
    K,
    Rs,
    q_offsets,
    width,
    splits,
    strides_dm,
    strides_dn,
    strides_wn,
    strides_wk,
    strides_ar,
    strides_ak,
    threshold,
    inverse_keep,
    ON_BASE: tl.constexpr,  # bit i: member i drops its base path (Triton 3.3 cannot index a constant tuple)
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    # A tile of dx is BLOCK_M x BLOCK_N, and each step contracts BLOCK_K output features of a member.
    tile_m, tile_n = grouped_tile(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(K, BLOCK_N), GROUP_M)
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)

    if seed is not None and ON_BASE == 0:
        # The mask hits the low-rank product but not dy W0: the low-rank product goes first.
        acc = add_low_ranks(
            acc, q, partials, As, mid_scales, q_offsets, tile_n == 0, rows, columns,
            M, K, Rs, splits, width, strides_ar, strides_ak, BLOCK_R,
        )  # fmt: skip
        kept = kept_elements(seed, rows, tile_n * BLOCK_N, threshold, BLOCK_N)
        acc = tl.where(kept, acc * inverse_keep, 0.0)
    dropped = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)

    for i in tl.static_range(len(dys)):
        stride_dm = pick(strides_dm, i)
        stride_dn = pick(strides_dn, i)
        stride_wn = pick(strides_wn, i)
        stride_wk = pick(strides_wk, i)
        for start in range(0, Ns[i], BLOCK_K):
            inner = start + tl.arange(0, BLOCK_K)
            dy_tile = load_tile(dys[i], rows, inner, M, Ns[i], stride_dm, stride_dn)  # [BLOCK_M, BLOCK_K]
            w_tile = load_tile(weights[i], inner, columns, Ns[i], K, stride_wn, stride_wk)  # [BLOCK_K, BLOCK_N]
            acc = tl.dot(dy_tile, w_tile, acc, input_precision="ieee")
            if (ON_BASE >> i) & 1 == 1:
                offset_tile = load_tile(offset_dys[i], rows, inner, M, Ns[i], Ns[i], 1)
                dropped = tl.dot(offset_tile, w_tile, dropped, input_precision="ieee")

    if ON_BASE != 0:
        dropped = add_low_ranks(
            dropped, q, partials, As, mid_scales, q_offsets, tile_n == 0, rows, columns,
            M, K, Rs, splits, width, strides_ar, strides_ak, BLOCK_R,
        )  # fmt: skip
        kept = kept_elements(seed, rows, tile_n * BLOCK_N, threshold, BLOCK_N)
        acc += tl.where(kept, dropped * inverse_keep, 0.0)
    elif seed is None:
        # Ahead of the loop it would make ptxas wait after every product there.
        acc = add_low_ranks(
            acc, q, partials, As, mid_scales, q_offsets, tile_n == 0, rows, columns,
            M, K, Rs, splits, width, strides_ar, strides_ak, BLOCK_R,
        )  # fmt: skip
    store_tile(dx, acc, rows, columns, M, K, K, 1)


def _launch_members(
    x: Tensor,
    members: Sequence[Member],
    ys: Sequence[Tensor],
    zs: Sequence[Tensor | None],
    u: Tensor,
    partials: Tensor | None,
    u_offsets: Sequence[int],
    *,
    fused: bool,
    shared_A: bool,
    seed: Tensor | None,
    kept: Tensor | None,
    p: float,
    dropout_on_base: bool,
) -> None:
    M, K = x.shape
    weights = [member.weight for member in members]
    Ns = [weight.shape[0] for weight in weights]
    Rs = [member.B.shape[1] for member in members]
    As = matrices([member.A for member in members])
    Bs = matrices([member.B for member in members])
    # Otherwise the mask is already in u.
    seed = seed if fused or dropout_on_base else None
    kept_base = [z for z in zs if z is not None]
    mid_scales, out_scales, base_scales, biases = (
        vectors([getattr(member, name) for member in members])
        for name in ("mid_scale", "out_scale", "base_scale", "bias")
    )
    plain = mid_scales is out_scales is base_scales is biases is None
    config = configs.adapter_linear(
        x,
        weights,
        max(Rs),
        fused=fused,
        two_products=dropout_on_base,
        masked=seed is not None,
        scaled=base_scales is not None,
        plain=plain,
    )
    arguments = {
        "x": x,
        "weights": tuple(weights),
        "As": As if fused and max(Rs) > 0 else None,
        "Bs": Bs if max(Rs) > 0 else None,
        "u": u,
        "partials": partials,
        "ys": tuple(ys),
        # A member whose z is not wanted has no rows of it.
        "zs": tuple(kept_base[0] if z is None else z for z in zs) if kept_base else None,
        "mid_scales": mid_scales,
        "out_scales": out_scales,
        "base_scales": base_scales,
        "biases": biases,
        "seed": seed,
        "kept": kept,
        "M": M,
        "Ns": tuple(Ns),
        "K": K,
        "Rs": uniform(Rs),
        "words": 0 if kept is None else kept.shape[1],
        "u_offsets": uniform(u_offsets),
        "width": u.shape[1],
        "splits": 1 if partials is None else partials.shape[0],
        "z_rows": uniform([0 if z is None else M for z in zs]),
        "stride_xm": x.stride(0),
        "stride_xk": x.stride(1),
        "strides_wn": strides(weights, 0),
        "strides_wk": strides(weights, 1),
        "strides_ar": strides(As, 0),
        "strides_ak": strides(As, 1),
        "strides_bn": strides(Bs, 0),
        "strides_br": strides(Bs, 1),
        "scalings": tuple(float(member.scaling) for member in members),
        "threshold": drop_threshold(p),
        "inverse_keep": 1.0 if seed is None else 1.0 / keep_probability(p),
        "SHARED_U": shared_A,
        "DROPOUT_ON_BASE": dropout_on_base,
    }
    tiles = triton.cdiv(M, config["BLOCK_M"]) * sum(triton.cdiv(N, config["BLOCK_N"]) for N in Ns)
    configs.launch(_adapter_linear_kernel, (tiles,), arguments, config)


def _drops_base(member: Member, seed: Tensor | None) -> bool:
    return member.dropout_on_base and seed is not None and member.base_scale is not None


@prepared
def adapter_linear(
    x: Tensor,
    members: Sequence[Member],
    *,
    u: Tensor | None = None,
    seed: Tensor | None = None,
    p: float = 0.0,
    shared_A: bool = False,
    keep_base: bool = False,
    strategy: str = "split",
) -> tuple[list[Tensor], Tensor, list[Tensor | None]]:
    """(ys, u, zs): y_i of every member as Member states it, u = x̃ Aᵀ, and with keep_base what base_scale multiplies.

    x̃ is x under dropout with probability p, or x itself without a seed. u holds the members' columns one behind the
    other, or with shared_A, where all members have the same A, once; a given u is not computed again. z_i = x W0ᵀ, and
    x̃ W0ᵀ where the base path is dropped; None without keep_base or without base_scale. strategy "split" computes u in a
    launch of its own, "fused" (R up to configs.MOST_FUSED_RANKS) from the tiles of x that the base product has loaded.
    Shapes: x [M, K], any strides; seed [1] int64; u [M, Σ R_i], or [M, R]; ys and zs [M, N_i]; all in x's dtype.
    """
    M = x.shape[0]
    ranks = [member.A.shape[0] for member in members]
    u_offsets = [0] * len(members) if shared_A else offsets(ranks)
    As = [member.A for member in (members[:1] if shared_A else members)]
    on_base = [_drops_base(member, seed) for member in members]
    fused = u is None and strategy == "fused"
    if fused and max(ranks) > configs.MOST_FUSED_RANKS:
        raise ValueError(f'strategy "fused" takes ranks up to {configs.MOST_FUSED_RANKS}, got {max(ranks)}')
    partials = kept = None
    if fused:
        u = torch.empty(M, sum(A.shape[0] for A in As), dtype=x.dtype, device=x.device)
    elif u is None:
        # Two products of x want the mask in every tile of columns: drawn once, it is read there.
        kept = kept_bits(x) if any(on_base) and sum(ranks) > 0 else None
        u, partials = shrink([x], As, out_dtype=x.dtype, seed=seed, p=p, kept=kept)
    else:
        u = u.contiguous()
    ys = [torch.empty(M, member.weight.shape[0], dtype=x.dtype, device=x.device) for member in members]
    zs = [
        torch.empty_like(y) if keep_base and member.base_scale is not None else None
        for y, member in zip(ys, members, strict=True)
    ]
    if M > 0:
        # Two products of x and W0 want two accumulators: those members run by themselves.
        for both in (False, True):
            chosen = [i for i, drops in enumerate(on_base) if drops == both]
            if chosen:
                _launch_members(
                    x,
                    [members[i] for i in chosen],
                    [ys[i] for i in chosen],
                    [zs[i] for i in chosen],
                    u,
                    partials,
                    [u_offsets[i] for i in chosen],
                    fused=fused,
                    shared_A=shared_A,
                    seed=seed,
                    kept=kept if both else None,
                    p=p,
                    dropout_on_base=both,
                )
    return ys, u, zs


class Grads(NamedTuple):
    """What adapter_linear_backward was asked for; lists go by member. All but dx are in fp32."""

    dx: Tensor | None
    dA: list[Tensor] | None
    P: list[Tensor] | None
    dbias: list[Tensor] | None
    dbase: list[Tensor | None]


def _launch_dx(
    dys: Sequence[Tensor],
    scaled: Sequence[Tensor | None],
    members: Sequence[Member],
    q: Tensor | None,
    partials: Tensor | None,
    splits: Sequence[int],
    q_offsets: Sequence[int],
    seed: Tensor | None,
    p: float,
) -> Tensor:
    M, K = dys[0].shape[0], members[0].weight.shape[1]
    dx = torch.empty(M, K, dtype=dys[0].dtype, device=dys[0].device)
    if dx.numel() == 0:
        return dx
    weights = [member.weight for member in members]
    Ns = [weight.shape[0] for weight in weights]
    # A member without an adapter has no part in the low-rank sum.
    adapted = [i for i, member in enumerate(members) if member.A.shape[0] > 0]
    As = [members[i].A for i in adapted]
    Rs = [A.shape[0] for A in As]
    on_base = tuple(_drops_base(member, seed) for member in members)
    mid_scales = vectors([members[i].mid_scale for i in adapted])
    offset_dys = [dy if drops else None for dy, drops in zip(scaled, on_base, strict=True)]
    dys = [dy if own is None or drops else own for dy, own, drops in zip(dys, scaled, on_base, strict=True)]
    seed = seed if adapted or any(on_base) else None
    config = configs.adapter_linear_dx(
        dx,
        dys,
        weights,
        max(Rs, default=0),
        two_products=any(on_base),
        masked=seed is not None,
        plain=mid_scales is None,
    )
    arguments = {
        "dys": tuple(dys),
        "offset_dys": tuple(offset_dys) if any(on_base) else None,
        "weights": tuple(weights),
        "As": tuple(As) or None,
        "q": q,
        "partials": partials,
        "dx": dx,
        "mid_scales": mid_scales,
        "seed": seed,
        "M": M,
        "Ns": tuple(Ns),
        "K": K,
        "Rs": tuple(Rs),
        "q_offsets": tuple(q_offsets[i] for i in adapted),
        "width": sum(Rs),
        "splits": tuple(splits[i] for i in adapted),
        "strides_dm": strides(dys, 0),
        "strides_dn": strides(dys, 1),
        "strides_wn": strides(weights, 0),
        "strides_wk": strides(weights, 1),
        "strides_ar": strides(As, 0),
        "strides_ak": strides(As, 1),
        "threshold": drop_threshold(p),
        "inverse_keep": 1.0 / keep_probability(p),
        "ON_BASE": sum(1 << i for i, drops in enumerate(on_base) if drops),
    }
    tiles = triton.cdiv(M, config["BLOCK_M"]) * triton.cdiv(K, config["BLOCK_N"])
    configs.launch(_adapter_linear_dx_kernel, (tiles,), arguments, config)
    return dx


@prepared
def adapter_linear_backward(
    dys: Sequence[Tensor],
    members: Sequence[Member],
    *,
    x: Tensor | None = None,
    u: Tensor | None = None,
    zs: Sequence[Tensor | None] | None = None,
    seed: Tensor | None = None,
    p: float = 0.0,
    shared_A: bool = False,
    want_dx: bool = True,
    want_bias: bool = False,
) -> Grads:
    """The gradients of adapter_linear, those that are asked for, from dy_i of every member.

    With q_i = (h ⊙ dy_i) B_i: dx = Σ_i (g_i ⊙ dy_i) W_i + mask ⊙ Σ_i ((d_i ⊙ q_i) A_i) / (1 - p) with want_dx; a member
    that drops its base path adds dy_i W_i + mask ⊙ (((g_i - 1) ⊙ dy_i) W_i) / (1 - p) instead. Given x:
    dA_i = (d_i ⊙ q_i)ᵀ x̃. Given u: P_i = scaling · dy_iᵀ u_i, of which dB_i = out_scale ⊙ P_i ⊙ d,
    dout_scale = rowsum(B ⊙ P ⊙ d), dd = colsum(out_scale ⊙ B ⊙ P). With want_bias: dbias_i = Σ_m dy_i. Given z_i:
    dbase_i = Σ_m dy_i ⊙ z_i. Every sum is in fp32 and in a fixed order. All but dx are views of one tensor or two.
    Shapes: dys and zs [M, N_i], any strides; x [M, K]; u as adapter_linear gave it; dx [M, K] in dy's dtype;
    dA [R_i, K], P [N_i, R_i], dbias and dbase [N_i] in fp32.
    """
    ranks = [member.A.shape[0] for member in members]
    q_offsets = offsets(ranks)
    u_offsets = [0] * len(members) if shared_A else q_offsets
    want_q = (want_dx or x is not None) and sum(ranks) > 0
    # Partials of a wide q would outweigh a second reading of dy; and where dx does not finish them, nothing would.
    one_pass = want_q and want_dx and max(ranks) <= configs.MOST_ONE_PASS_RANKS
    # g - 1 in fp32: in 16 bits it would be lost beside 1.
    base_shifts = [float(_drops_base(member, seed)) for member in members] if want_dx else None
    sums = output_grads(dys, members, u, u_offsets, zs, want_bias=want_bias, want_q=one_pass, base_shifts=base_shifts)
    q, q_partials, splits = sums.q, sums.q_partials, sums.q_splits
    if want_q and q is None:
        q, q_partials = shrink(
            dys,
            [member.B.T for member in members],
            out_dtype=dys[0].dtype,
            in_scales=[member.out_scale for member in members],
            scalings=[float(member.scaling) for member in members],
        )
        if q_partials is not None:
            splits = [q_partials.shape[0]] * len(members)
            if not want_dx:
                sum_partials(q_partials, q)
    dx = _launch_dx(dys, sums.scaled, members, q, q_partials, splits, q_offsets, seed, p) if want_dx else None
    dA = None
    if x is not None:
        dA = input_grads(x, q, members, q_offsets, sums, seed=seed, p=p)
    elif sums.partials is not None:
        sum_partials(sums.partials, sums.total)
    return Grads(dx, dA, sums.P, sums.dbias, sums.dbase)
