"""Every sum over tokens of the backward pass: one pass over the dy of a group, one over its x."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .group import Member, matrices, offsets, strides, uniform, vectors
from .tiles import (
    drop_threshold,
    keep_probability,
    kept_elements,
    load_member_vector,
    load_tile,
    locate,
    partial_buffer,
    pick,
    store_tile,
    sum_block,
    sum_partials,
)


@triton.jit
def _output_grads_kernel(
    dys,  # [M, N]; this and what follows in the plural: by member
    u,  # [M, u_width] or None
    zs,  # [M, N] or None
    Bs,  # [N, R] where q is wanted, or None
    q,  # [tiles, M, q_width] or None: a tile's part of (h ⊙ dy) B
    sums,  # [splits, total]
    scaled_dys,  # [M, N], contiguous, or None: (g - base_shift) ⊙ dy
    out_scales,  # [N] or None
    base_scales,  # [N] or None: g
    base_shifts,
    M,
    Ns,
    Rs,
    u_offsets,
    q_offsets,
    z_rows,
    scaled_rows,
    P_offsets,
    bias_offsets,
    base_offsets,
    u_width,
    q_width,
    total,
    tiles_r,
    strides_dm,
    strides_dn,
    strides_zm,
    strides_zn,
    strides_bn,
    strides_br,
    scalings,
    steps_per_split,
    WANT_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    # A program owns columns of one dy and walks down some of its rows. Tiles along r are neighbours: those that share
    # columns of dy find them in L2.
    program = tl.program_id(0)
    split = tl.program_id(1)
    member, tile_n = locate(program // tiles_r, Ns, BLOCK_N)
    tile_r = program % tiles_r
    dy = pick(dys, member)
    N = pick(Ns, member)
    R = pick(Rs, member)
    stride_dm = pick(strides_dm, member)
    stride_dn = pick(strides_dn, member)
    columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    ranks = tile_r * BLOCK_R + tl.arange(0, BLOCK_R)
    sums += split.to(tl.int64) * total

    if Bs is not None:
        stride_bn = pick(strides_bn, member)
        stride_br = pick(strides_br, member)
        B_tile = load_tile(pick(Bs, member), columns, ranks, N, R, stride_bn, stride_br).to(tl.float32)
        B_tile *= pick(scalings, member)
        if out_scales is not None:
            # On the small operand and in fp32: one rounding, and dy goes to the dot as it was loaded.
            B_tile *= load_member_vector(out_scales, member, columns, N, 1.0)[:, None]
        hB = B_tile.to(dy.dtype.element_ty)  # [BLOCK_N, BLOCK_R]
        q += tile_n.to(tl.int64) * M * q_width + pick(q_offsets, member)
    if u is not None:
        u += pick(u_offsets, member)
    if zs is not None:
        z = pick(zs, member)
        z_M = pick(z_rows, member)
        stride_zm = pick(strides_zm, member)
        stride_zn = pick(strides_zn, member)

    if scaled_dys is not None:
        scaled_dy = pick(scaled_dys, member)
        scaled_M = tl.where(tile_r == 0, pick(scaled_rows, member), 0)
        base_scale = load_member_vector(base_scales, member, columns, N, 1.0) - pick(base_shifts, member)

    # Transposed: the large tile then goes to the dot as it was loaded.
    P = tl.zeros((BLOCK_R, BLOCK_N), dtype=tl.float32)
    # Two-dimensional until the loop is over: a reduction across threads in every step would cost more than it saves.
    bias_acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    base_acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    first = split * steps_per_split * BLOCK_M
    last = tl.minimum(first + steps_per_split * BLOCK_M, M)
    for start in range(first, last, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        dy_tile = load_tile(dy, rows, columns, M, N, stride_dm, stride_dn)  # [BLOCK_M, BLOCK_N]
        if scaled_dys is not None:
            store_tile(scaled_dy, dy_tile.to(tl.float32) * base_scale[None, :], rows, columns, scaled_M, N, N, 1)
        if WANT_BIAS:
            bias_acc += dy_tile.to(tl.float32)
        if zs is not None:
            z_tile = load_tile(z, rows, columns, z_M, N, stride_zm, stride_zn)
            base_acc += dy_tile.to(tl.float32) * z_tile.to(tl.float32)
        if Bs is not None:
            q_tile = tl.dot(dy_tile, hB, input_precision="ieee")  # [BLOCK_M, BLOCK_R]
            store_tile(q, q_tile, rows, ranks, M, R, q_width, 1)
        if u is not None:
            u_tile = load_tile(u, rows, ranks, M, R, u_width, 1)  # [BLOCK_M, BLOCK_R]
            P = tl.dot(tl.trans(u_tile), dy_tile, P, input_precision="ieee")

    if u is not None:
        scaled = P * pick(scalings, member)
        store_tile(sums + pick(P_offsets, member), scaled, ranks, columns, R, N, 1, R)
    # The vectors do not depend on r: the first tile along r writes them.
    if WANT_BIAS:
        own = tl.where(tile_r == 0, N, 0)
        tl.store(sums + pick(bias_offsets, member) + columns, tl.sum(bias_acc, axis=0), mask=columns < own)
    if zs is not None:
        own = tl.where((tile_r == 0) & (z_M > 0), N, 0)
        tl.store(sums + pick(base_offsets, member) + columns, tl.sum(base_acc, axis=0), mask=columns < own)


class OutputGrads(NamedTuple):
    """What one pass over dy gives: views by member of the flat fp32 ``total``, and q or what adds up to it.

    Where ``partials`` [splits, total] is there, total is still empty. Where ``q_partials`` is there, q [M, width] is:
    its member i is the sum of the first q_splits[i] parts. ``scaled`` has what dx multiplies with W0 instead of dy.
    """

    P: list[Tensor] | None
    dbias: list[Tensor] | None
    dbase: list[Tensor | None]
    total: Tensor
    partials: Tensor | None
    q: Tensor | None
    q_partials: Tensor | None
    q_splits: list[int]
    scaled: list[Tensor | None]


def output_grads(
    dys: Sequence[Tensor],
    members: Sequence[Member],
    u: Tensor | None,
    u_offsets: Sequence[int],
    zs: Sequence[Tensor | None] | None,
    *,
    want_bias: bool,
    want_q: bool,
    base_shifts: Sequence[float] | None = None,
) -> OutputGrads:
    """P_i = scaling · dy_iᵀ u_i given u, Σ dy_i, Σ dy_i ⊙ z_i where z_i is given, and with want_q (h ⊙ dy_i) B_i.

    Given base_shifts, also (g_i - shift_i) ⊙ dy_i of each member that has g: dx then finds its operand as it needs it.
    want_q is a wish: without any of the others, q is left out.
    """
    M, device = dys[0].shape[0], dys[0].device
    Ns = [dy.shape[1] for dy in dys]
    ranks = [member.B.shape[1] for member in members]
    zs = [None] * len(dys) if zs is None else zs
    sizes = [N * R if u is not None else 0 for N, R in zip(Ns, ranks, strict=True)]
    sizes += [N if want_bias else 0 for N in Ns]
    sizes += [0 if z is None else z.shape[1] for z in zs]
    starts = offsets(sizes)
    P_offsets, bias_offsets, base_offsets = (starts[i : i + len(dys)] for i in range(0, len(starts), len(dys)))
    total = torch.empty(sum(sizes), dtype=torch.float32, device=device)
    P = dbias = None
    if u is not None:
        P = [total.narrow(0, start, N * R).view(N, R) for start, N, R in zip(P_offsets, Ns, ranks, strict=True)]
    if want_bias:
        dbias = [total.narrow(0, start, N) for start, N in zip(bias_offsets, Ns, strict=True)]
    dbase = [None if z is None else total.narrow(0, start, N) for start, N, z in zip(base_offsets, Ns, zs, strict=True)]
    scales = vectors([member.base_scale for member in members]) if base_shifts is not None else None
    scaled: list[Tensor | None] = [
        None if scale is None else torch.empty(dy.shape, dtype=dy.dtype, device=device)
        for dy, scale in zip(dys, scales or [None] * len(dys), strict=True)
    ]
    nothing = OutputGrads(P, dbias, dbase, total, None, None, None, [1] * len(dys), scaled)
    if M == 0 or (total.numel() == 0 and scales is None):
        total.zero_()
        return nothing

    u = u if u is None or max(ranks) == 0 else u.contiguous()
    given_zs = [z for z in zs if z is not None]
    # A member without z has no rows of it.
    known_zs = [given_zs[0] if z is None else z for z in zs] if given_zs else []
    given_scaled = [dy for dy in scaled if dy is not None]
    Bs = matrices([member.B for member in members])
    vector_sums = want_bias or bool(given_zs)
    config, splits, steps_per_split = configs.output_grads(
        dys, max(ranks) if u is not None or want_q else 0, want_q=want_q, vector_sums=vector_sums
    )
    partials = partial_buffer(total, splits)
    q = q_parts = None
    q_splits = [triton.cdiv(N, config["BLOCK_N"]) for N in Ns]
    if want_q:
        q = torch.empty(M, sum(ranks), dtype=dys[0].dtype, device=device)
        q_parts = partial_buffer(q, max(q_splits))
    tiles_r = max(triton.cdiv(max(ranks), config["BLOCK_R"]), 1) if u is not None else 1
    arguments = {
        "dys": tuple(dys),
        "u": u,
        "zs": tuple(known_zs) or None,
        "Bs": Bs if want_q else None,
        "q": q_parts,
        "sums": partials,
        # A member without g has no rows of it.
        "scaled_dys": tuple(given_scaled[0] if dy is None else dy for dy in scaled) if given_scaled else None,
        "out_scales": vectors([member.out_scale for member in members]) if want_q else None,
        "base_scales": scales,
        "base_shifts": tuple(base_shifts) if scales is not None and base_shifts is not None else (),
        "M": M,
        "Ns": tuple(Ns),
        "Rs": uniform(ranks),
        "u_offsets": uniform(u_offsets),
        "q_offsets": uniform(offsets(ranks)),
        "z_rows": uniform([0 if z is None else M for z in zs]),
        "scaled_rows": uniform([0 if dy is None else M for dy in scaled]),
        "P_offsets": tuple(P_offsets),
        "bias_offsets": tuple(bias_offsets),
        "base_offsets": tuple(base_offsets),
        "u_width": 0 if u is None else u.shape[1],
        "q_width": sum(ranks),
        "total": total.numel(),
        "tiles_r": tiles_r,
        "strides_dm": strides(dys, 0),
        "strides_dn": strides(dys, 1),
        "strides_zm": strides(known_zs, 0),
        "strides_zn": strides(known_zs, 1),
        "strides_bn": strides(Bs, 0),
        "strides_br": strides(Bs, 1),
        "scalings": tuple(float(member.scaling) for member in members),
        "steps_per_split": steps_per_split,
        "WANT_BIAS": want_bias,
    }
    tiles = sum(triton.cdiv(N, config["BLOCK_N"]) for N in Ns) * tiles_r
    configs.launch(_output_grads_kernel, (tiles, splits), arguments, config)
    return nothing._replace(
        partials=partials if splits > 1 else None,
        q=q,
        q_partials=q_parts if max(q_splits) > 1 else None,
        q_splits=q_splits,
    )


@triton.jit(do_not_specialize=["threshold"])
def _input_grads_kernel(
    x,  # [M, K]
    q,  # [M, width]
    dA,  # [splits, width, K]
    mid_scales,  # [R] by member or None
    partials,  # [sum_splits, total] or None: sums over dy to complete
    sums,  # [total] or None
    seed,  # [1] or None
    M,
    K,
    width,
    q_offsets,
    Rs,
    stride_xm,
    stride_xk,
    threshold,
    inverse_keep,
    splits,
    total,
    dA_splits,
    steps_per_split,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # A program walks down rows for a few columns of x: all of them, so that dA needs no second stage, but where columns
    # are too few to keep a GPU busy. Tiles along r are neighbours: those that share columns of x find them in L2.
    tiles_r = tl.cdiv(width, BLOCK_R)
    tiles = tl.cdiv(K, BLOCK_K) * tiles_r * dA_splits
    program = tl.program_id(0)
    if program < tiles:
        split = program % dA_splits
        tile = program // dA_splits
        tile_k = tile // tiles_r
        columns = tile_k * BLOCK_K + tl.arange(0, BLOCK_K)
        ranks = tile % tiles_r * BLOCK_R + tl.arange(0, BLOCK_R)
        acc = tl.zeros((BLOCK_R, BLOCK_K), dtype=tl.float32)
        first = split * steps_per_split * BLOCK_M
        last = tl.minimum(first + steps_per_split * BLOCK_M, M)
        for start in range(first, last, BLOCK_M):
            rows = start + tl.arange(0, BLOCK_M)
            x_tile = load_tile(x, rows, columns, M, K, stride_xm, stride_xk)  # [BLOCK_M, BLOCK_K]
            if seed is not None:
                x_tile = tl.where(kept_elements(seed, rows, tile_k * BLOCK_K, threshold, BLOCK_K), x_tile, 0.0)
            q_tile = load_tile(q, rows, ranks, M, width, width, 1)  # [BLOCK_M, BLOCK_R]
            acc = tl.dot(tl.trans(q_tile), x_tile, acc, input_precision="ieee")
        acc *= inverse_keep
        if mid_scales is not None:
            for i in tl.static_range(len(mid_scales)):
                if mid_scales[i] is not None:
                    own = ranks - q_offsets[i]
                    inside = (own >= 0) & (own < Rs[i])
                    scale = tl.load(mid_scales[i] + own, mask=inside, other=0.0).to(tl.float32)
                    acc *= tl.where(inside, scale, 1.0)[:, None]
        dA += split.to(tl.int64) * width * K
        store_tile(dA, acc, ranks, columns, width, K, K, 1)
    else:
        if partials is not None:
            sum_block(partials, sums, program - tiles, splits, total, BLOCK)


def input_grads(
    x: Tensor,
    q: Tensor | None,
    members: Sequence[Member],
    q_offsets: Sequence[int],
    sums: OutputGrads,
    *,
    seed: Tensor | None,
    p: float,
) -> list[Tensor]:
    """dA_i = (d_i ⊙ q_i)ᵀ x̃ [R_i, K] in fp32, with the dropout mask that made u; the same launch completes ``sums``.

    Shapes: x [M, K], any strides; q [M, Σ R_i], None without ranks; seed [1] int64.
    """
    M, K = x.shape
    ranks = [member.A.shape[0] for member in members]
    width = sum(ranks)
    dA = torch.empty(width, K, dtype=torch.float32, device=x.device)
    by_member = list(dA.split(ranks))
    if q is None or q.numel() == 0 or K == 0:
        dA.zero_()
        if sums.partials is not None:
            sum_partials(sums.partials, sums.total)
        return by_member
    config, splits, steps_per_split = configs.input_grads(x, width)
    dA_parts = partial_buffer(dA, splits)
    total = 0 if sums.partials is None else sums.total.numel()
    arguments = {
        "x": x,
        "q": q,
        "dA": dA_parts,
        "mid_scales": vectors([member.mid_scale for member in members]),
        "partials": sums.partials,
        "sums": None if sums.partials is None else sums.total,
        "seed": seed,
        "M": M,
        "K": K,
        "width": width,
        "q_offsets": tuple(q_offsets),
        "Rs": tuple(ranks),
        "stride_xm": x.stride(0),
        "stride_xk": x.stride(1),
        "threshold": drop_threshold(p),
        "inverse_keep": 1.0 if seed is None else 1.0 / keep_probability(p),
        "splits": 1 if sums.partials is None else sums.partials.shape[0],
        "total": total,
        "dA_splits": splits,
        "steps_per_split": steps_per_split,
    }
    tiles = triton.cdiv(K, config["BLOCK_K"]) * triton.cdiv(width, config["BLOCK_R"]) * splits
    configs.launch(_input_grads_kernel, (tiles + triton.cdiv(total, config["BLOCK"]),), arguments, config)
    sum_partials(dA_parts, dA)
    return by_member
