"""Many adapters in one batch: to every token of base products, in place, what its own adapter makes of it.

The tokens come sorted by factor group and cut into tiles of one group each, so that a program sees one pair (A, B) and
reads as much of it as its true rank. What differs by adapter within a group (VeRA) are vectors, and those are read
token by token. Layers that read one x are members of one launch. No launch depends on who is in the batch: the table of
tiles has room for every way to cut M tokens into runs, and programs without work leave at once.

A program begins with three loads that wait for each other: its tile, then what is entered there for tokens and group,
then the data. Loops over ranks and features load no table that their next load waits for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .group import strides
from .group import vectors as vectors_of
from .launch import prepared
from .tiles import count_tiles, load_member_vector, load_tile, locate, partial_buffer, pick, store_tile

# Rank rows of a factor that lie together.
_PAGE_RANKS = tl.constexpr(8)

# How far ahead a loop without a matrix unit loads: the compiler's own choice is for products.
_STAGES = tl.constexpr(3)

# The expand kernel adds up so many parts of u at most, all of them loaded at once.
_MOST_SPLITS = 16


@triton.jit
def _tile_places(
    tile,
    tiles,  # [T, 3]
    stride,
    M,
    BLOCK_M: tl.constexpr,
):
    """(places [BLOCK_M], group) of a tile: M for what lies beyond its run; M and -1 of a tile beyond all runs."""
    first = tl.load(tiles + stride * tile)
    end = tl.load(tiles + stride * tile + 1)
    group = tl.load(tiles + stride * tile + 2)
    places = first + tl.arange(0, BLOCK_M)
    return tl.where(places < end, places, M), group


@triton.jit
def _load_page_starts(
    page_starts,  # [P], of one group
    ranks,
    P,
    group,
):
    """The first element of each rank's page. It does not wait for how many ranks there are: pages beyond them are
    entered with any number, of which no use is made."""
    pages = ranks // _PAGE_RANKS
    return tl.load(page_starts + pages, mask=pages < tl.where(group >= 0, P, 0), other=0)


@triton.jit
def _rank_rows(starts, stride, ranks, ITEMS: tl.constexpr):
    """Where rank rows begin, in elements of the pages. All are known to be multiples of ITEMS, and the compiler is told
    by the multiplication, so that a thread loads as many items at once."""
    return (starts // ITEMS + ranks % _PAGE_RANKS * (stride // ITEMS)) * ITEMS


@triton.jit
def _accumulate(acc, left, right, BLOCK_M: tl.constexpr):
    """acc + left right. The product of one row has no use for a matrix unit: it is summed over acc's rows later."""
    if BLOCK_M == 1:
        return acc + tl.trans(left).to(tl.float32) * right.to(tl.float32)
    else:
        return tl.dot(left, right, acc, input_precision="ieee")


@triton.jit
def _accumulated(acc, BLOCK_M: tl.constexpr):
    """What _accumulate has summed up, [BLOCK_M, columns]."""
    if BLOCK_M == 1:
        return tl.sum(acc, 0)[None, :]
    else:
        return acc


@triton.jit
def _has(tables, member):
    """Whether the member has a table of these."""
    found = member < 0
    for i in tl.static_range(len(tables)):
        if tables[i] is not None:
            found |= member == i
    return found


@triton.jit
def _vector_starts(tables, member, adapters):
    """The first element of each token's vector in the member, [BLOCK_M]; -1 for none."""
    pointer = None
    for i in tl.static_range(len(tables)):
        if tables[i] is not None:
            pointer = tables[i] if pointer is None else tl.where(member == i, tables[i], pointer)
    return tl.load(pointer + adapters, mask=tl.where(_has(tables, member), adapters, -1) >= 0, other=-1)


@triton.jit
def _load_vectors(vectors, starts, index, count, neutral):
    """Entries of each token's vector of ``count``, [BLOCK_M, len(index)]; neutral outside it, and where it has none."""
    inside = (starts >= 0)[:, None] & (index < count)[None, :]
    return tl.load(vectors + starts[:, None] + index[None, :], mask=inside, other=neutral)


@triton.jit
def _shrink_tile(
    x,  # [M, K]
    A_rows,  # where rank rows begin
    tokens,
    ranks,
    M,
    K,
    R,
    first,
    last,
    stride_xm,
    stride_xk,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """x Aᵀ over features first to last."""
    acc = tl.zeros((BLOCK_K if BLOCK_M == 1 else BLOCK_M, BLOCK_R), dtype=tl.float32)
    for start in tl.range(first, last, BLOCK_K, num_stages=_STAGES if BLOCK_M == 1 else None):
        columns = start + tl.arange(0, BLOCK_K)
        x_tile = load_tile(x, tokens, columns, M, K, stride_xm, stride_xk)  # [BLOCK_M, BLOCK_K]
        A_inside = (columns < K)[:, None] & (ranks < R)[None, :]
        A_tile = tl.load(A_rows[None, :] + columns[:, None], mask=A_inside, other=0.0)  # [BLOCK_K, BLOCK_R]
        acc = _accumulate(acc, x_tile, A_tile.to(x_tile.dtype), BLOCK_M)
    return _accumulated(acc, BLOCK_M)


@triton.jit(do_not_specialize=["M", "splits"])
def _multi_shrink_kernel(
    x,  # [M, K]
    u,  # [splits, members, M, width], by place
    pages,
    vectors,
    ranks,  # [groups] of each member
    A_pages,  # [groups, P] of each member
    A_strides,  # [groups] of each member
    mid_scales,  # [adapters] or None of each member; or None
    order,  # [M]
    adapters,  # [M]
    tiles,  # [T, 3]
    M,
    K,
    width,
    splits,
    stride_xm,
    stride_xk,
    stride_ag,
    stride_tile,
    MEMBERS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    ITEMS: tl.constexpr = 128 // pages[0].dtype.element_ty.primitive_bitwidth
    tiles_r = tl.cdiv(width, BLOCK_R)
    program = tl.program_id(0)
    split = tl.program_id(1)
    member = program // tiles_r % MEMBERS
    places, group = _tile_places(program // (tiles_r * MEMBERS), tiles, stride_tile, M, BLOCK_M)
    first_rank = program % tiles_r * BLOCK_R
    tile_ranks = first_rank + tl.arange(0, BLOCK_R)
    P = pick(stride_ag, member)

    # What hangs on the tile alone is asked for before the first of it is looked at.
    R = tl.load(pick(ranks, member) + group, mask=group >= 0, other=0)
    stride_ar = tl.load(pick(A_strides, member) + group, mask=group >= 0, other=0)
    starts = _load_page_starts(pick(A_pages, member) + group.to(tl.int64) * P, tile_ranks, P, group)
    tokens = tl.load(order + places, mask=places < M, other=M)
    if first_rank >= R:
        return

    steps_per_split = tl.cdiv(tl.cdiv(K, BLOCK_K), splits)
    first = split * steps_per_split * BLOCK_K
    last = tl.minimum(first + steps_per_split * BLOCK_K, K)
    memory = pick(pages, member)
    if stride_ar % ITEMS == 0:
        A_rows = memory + _rank_rows(starts, stride_ar, tile_ranks, ITEMS)
        acc = _shrink_tile(
            x, A_rows, tokens, tile_ranks, M, K, R, first, last, stride_xm, stride_xk, BLOCK_M, BLOCK_K, BLOCK_R
        )
    else:
        A_rows = memory + _rank_rows(starts, stride_ar, tile_ranks, 1)
        acc = _shrink_tile(
            x, A_rows, tokens, tile_ranks, M, K, R, first, last, stride_xm, stride_xk, BLOCK_M, BLOCK_K, BLOCK_R
        )
    if mid_scales is not None:
        own = tl.load(adapters + places, mask=places < M, other=-1)
        acc *= _load_vectors(pick(vectors, member), _vector_starts(mid_scales, member, own), tile_ranks, R, 1.0)
    part = u + (split * MEMBERS + member).to(tl.int64) * M * width
    store_tile(part, acc, places, tile_ranks, M, R, width, 1)


@triton.jit
def _expand_tile(
    u,  # [members, M, width], from the member on
    partials,  # [SPLITS, members, M, width] likewise, or None
    stride_part,
    pages,
    page_starts,  # [P], of B
    places,
    columns,
    M,
    N,
    R,
    P,
    group,
    width,
    stride_br,
    SPLITS: tl.constexpr,
    ITEMS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """u Bᵀ, walking r in steps, so that no tile is r wide. Where the next step's rows begin is loaded a step ahead."""
    acc = tl.zeros((BLOCK_R if BLOCK_M == 1 else BLOCK_M, BLOCK_N), dtype=tl.float32)
    starts = _load_page_starts(page_starts, tl.arange(0, BLOCK_R), P, group)
    for start in range(0, R, BLOCK_R):
        ranks = start + tl.arange(0, BLOCK_R)
        next_starts = _load_page_starts(page_starts, ranks + BLOCK_R, P, group)
        if partials is None:
            u_tile = load_tile(u, places, ranks, M, R, width, 1)  # [BLOCK_M, BLOCK_R]
        else:
            # In a fixed order; all parts are loaded before the first is needed.
            total = load_tile(partials, places, ranks, M, R, width, 1)
            for part in tl.static_range(1, SPLITS):
                total += load_tile(partials + part * stride_part, places, ranks, M, R, width, 1)
            u_tile = total.to(u.dtype.element_ty)
        B_rows = pages + _rank_rows(starts, stride_br, ranks, ITEMS)
        B_inside = (ranks < R)[:, None] & (columns < N)[None, :]
        B_tile = tl.load(B_rows[:, None] + columns[None, :], mask=B_inside, other=0.0)  # [BLOCK_R, BLOCK_N]
        acc = _accumulate(acc, u_tile, B_tile.to(u_tile.dtype), BLOCK_M)
        starts = next_starts
    return _accumulated(acc, BLOCK_M)


@triton.jit(do_not_specialize=["M"])
def _multi_expand_kernel(
    u,  # [members, M, width] by place, or None where no group has a rank
    partials,  # [SPLITS, members, M, width] or None
    y,  # [M, N] of each member, rows contiguous: the base products, overwritten
    bias,  # [N] or None of each member, where its base product still lacks it; or None
    pages,
    vectors,
    ranks,  # [groups] of each member
    B_pages,  # [groups, P] of each member
    B_strides,  # [groups] of each member
    scalings,  # [adapters] of each member
    out_scales,  # [adapters] or None of each member; or None
    base_scales,  # likewise
    added_biases,  # likewise
    order,  # [M]
    adapters,  # [M]
    tiles,  # [T, 3]
    M,
    Ns,
    width,
    stride_bg,
    stride_ym,
    stride_tile,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    ITEMS: tl.constexpr = 128 // pages[0].dtype.element_ty.primitive_bitwidth
    tiles_n = count_tiles(Ns, BLOCK_N)
    program = tl.program_id(0)
    member, tile_n = locate(program % tiles_n, Ns, BLOCK_N)
    N = pick(Ns, member)
    places, group = _tile_places(program // tiles_n, tiles, stride_tile, M, BLOCK_M)
    R = tl.load(pick(ranks, member) + group, mask=group >= 0, other=0)
    own = tl.load(adapters + places, mask=places < M, other=-1)
    tokens = tl.load(order + places, mask=places < M, other=M)
    works = R > 0
    if base_scales is not None:
        g_starts = _vector_starts(base_scales, member, own)
        works |= tl.max(g_starts, 0) >= 0
    if added_biases is not None:
        beta_starts = _vector_starts(added_biases, member, own)
        works |= tl.max(beta_starts, 0) >= 0
    if bias is not None:
        works |= _has(bias, member) & (tl.min(places, 0) < M)
    if not works:
        return
    columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    out = pick(y, member)
    stride_y = pick(stride_ym, member)
    memory = pick(vectors, member)

    acc = load_tile(out, tokens, columns, M, N, stride_y, 1).to(tl.float32)  # [BLOCK_M, BLOCK_N]
    if base_scales is not None:
        acc *= _load_vectors(memory, g_starts, columns, N, 1.0)
    if u is not None:
        P = pick(stride_bg, member)
        page_starts = pick(B_pages, member) + group.to(tl.int64) * P
        stride_br = tl.load(pick(B_strides, member) + group, mask=group >= 0, other=0)
        own_u = u + member.to(tl.int64) * M * width
        own_partials = None if partials is None else partials + member.to(tl.int64) * M * width
        stride_part = tl.cast(M, tl.int64) * width * len(y)
        if stride_br % ITEMS == 0:
            low_rank = _expand_tile(
                own_u, own_partials, stride_part, pick(pages, member), page_starts, places, columns, M, N, R, P, group,
                width, stride_br, SPLITS, ITEMS, BLOCK_M, BLOCK_N, BLOCK_R,
            )  # fmt: skip
        else:
            low_rank = _expand_tile(
                own_u, own_partials, stride_part, pick(pages, member), page_starts, places, columns, M, N, R, P, group,
                width, stride_br, SPLITS, 1, BLOCK_M, BLOCK_N, BLOCK_R,
            )  # fmt: skip
        low_rank *= tl.load(pick(scalings, member) + own, mask=own >= 0, other=0.0)[:, None]
        if out_scales is not None:
            low_rank *= _load_vectors(memory, _vector_starts(out_scales, member, own), columns, N, 1.0)
        acc += low_rank
    if added_biases is not None:
        acc += _load_vectors(memory, beta_starts, columns, N, 0.0)
    if bias is not None:
        acc += load_member_vector(bias, member, columns, N, 0.0)[None, :]
    store_tile(out, acc, tokens, columns, M, N, stride_y, 1)


def multi_adapter_linear(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    tables: Sequence[Any],
    tokens: Any,
    max_rank: int,
) -> list[Tensor]:
    """y of x in each of the layers that read it, each token t through the form of its adapter a with the factors of its
    group k, in two launches for all layers:

        y_t = g[a] ⊙ (W0 x_t) + scaling[a] · h[a] ⊙ (B[k] (d[a] ⊙ (A[k] x_t))) + added_bias[a] + b0

    The base products are the library's and base tokens keep them bit for bit, but where a layer has a bias and some
    adapter a base_scale: b0 is then added with the update, because g must scale the product alone.
    Shapes: x [M, K], any strides; weights [N, K]; biases b0 [N]; y [M, N] in x's dtype; the rest as in the update.
    """
    late = [bias if table.base_scales is not None else None for bias, table in zip(biases, tables, strict=True)]
    ys = [
        F.linear(x, weight, None if bias is None or later is not None else bias.to(x.dtype))
        for weight, bias, later in zip(weights, biases, late, strict=True)
    ]
    multi_adapter_update(ys, x, late, tables, tokens, max_rank)
    return ys


def multi_adapter_update(
    ys: Sequence[Tensor],
    x: Tensor,
    biases: Sequence[Tensor | None],
    tables: Sequence[Any],
    tokens: Any,
    max_rank: int,
) -> None:
    """In place on y, what layers that read x gave, each token t through the form of its adapter a with the factors of
    its group k, in two launches for all layers:

        y_t <- g[a] ⊙ y_t + scaling[a] · h[a] ⊙ (B[k] (d[a] ⊙ (A[k] x_t))) + added_bias[a] + b0

    It is summed up in fp32 and rounded once. b0 is what y still lacks of the layer's bias, None for nothing.
    Shapes: y [M, N], its rows contiguous, as column slices of one product are; x [M, K], any strides; biases b0 [N].
    max_rank bounds the ranks; u [layers, M, max_rank] holds d ⊙ (A x) by place, of which only the columns of the true
    rank are written and read.
    tables, of each layer: pages and vectors [elements], the factors in their dtype, which is one for all layers, and
    the vectors in fp32. By factor group: ranks [groups] int32; A_pages and B_pages [groups, P] int64, the first element
    of every page of 8 rank rows of A and of Bᵀ, on a multiple of 16 bytes; A_strides and B_strides [groups] int32, from
    one rank row to the next. By adapter: scalings [adapters] fp32; mid_scales (d), out_scales (h), base_scales (g) and
    added_biases [adapters] int64, the vector's first element, -1 for none, or None where nobody has any.
    tokens, int32: order [M], the token at each place; adapters [M], of each place, -1 and first for the base model;
    tiles [T, 3], of each tile of `block` places the first, the end of its run and its group, M, M and -1 of those that
    are not needed.
    """
    M = x.shape[0]
    works = max_rank > 0 or any(bias is not None for bias in biases)
    works = works or any(table.base_scales is not None or table.added_biases is not None for table in tables)
    if M == 0 or all(y.numel() == 0 for y in ys) or not works:
        return
    # What lies in one memory is told by which tensors are the same ones, and that is no part of an outline.
    pages = _distinct([table.pages for table in tables])
    vectors = _distinct([table.vectors for table in tables])
    _add_adapters(x, ys, biases, pages, vectors, tables, tokens, max_rank)


@prepared
def _add_adapters(
    x: Tensor,
    ys: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    pages: tuple[Tensor, ...],
    vectors: tuple[Tensor, ...],
    tables: Sequence[Any],
    tokens: Any,
    max_rank: int,
) -> None:
    """What multi_adapter_update does."""
    M, K = x.shape
    shared = {
        "pages": pages,
        "vectors": vectors,
        "ranks": tuple([table.ranks for table in tables]),
        "order": tokens.order,
        "adapters": tokens.adapters,
        "tiles": tokens.tiles,
        "stride_tile": tokens.tiles.stride(0),
        "M": M,
        "width": max_rank,
    }
    u = partials = None
    if max_rank > 0:
        u = torch.empty(len(ys), M, max_rank, dtype=x.dtype, device=x.device)
        config, splits = configs.multi_shrink(x, tokens.block, max_rank)
        splits = _fewer(splits, len(ys))
        partials = partial_buffer(u, splits)
        arguments = {
            **shared,
            "x": x,
            "u": partials,
            "A_pages": tuple([table.A_pages for table in tables]),
            "A_strides": tuple([table.A_strides for table in tables]),
            "mid_scales": _optional([table.mid_scales for table in tables]),
            "K": K,
            "splits": splits,
            "stride_xm": x.stride(0),
            "stride_xk": x.stride(1),
            "stride_ag": strides([table.A_pages for table in tables], 0),
            "MEMBERS": len(ys),
        }
        grid = tokens.tiles.shape[0] * len(ys) * triton.cdiv(max_rank, config["BLOCK_R"])
        configs.launch(_multi_shrink_kernel, (grid, splits), arguments, config)
        partials = partials if splits > 1 else None
    config = configs.multi_expand(ys[0], tokens.block)
    arguments = {
        **shared,
        "u": u,
        "partials": partials,
        "y": tuple(ys),
        "bias": vectors_of(biases),
        "B_pages": tuple([table.B_pages for table in tables]),
        "B_strides": tuple([table.B_strides for table in tables]),
        "scalings": tuple([table.scalings for table in tables]),
        "out_scales": _optional([table.out_scales for table in tables]),
        "base_scales": _optional([table.base_scales for table in tables]),
        "added_biases": _optional([table.added_biases for table in tables]),
        "Ns": tuple([y.shape[1] for y in ys]),
        "stride_bg": strides([table.B_pages for table in tables], 0),
        "stride_ym": strides(ys, 0),
        "SPLITS": 1 if partials is None else partials.shape[0],
    }
    grid = tokens.tiles.shape[0] * sum(triton.cdiv(y.shape[1], config["BLOCK_N"]) for y in ys)
    configs.launch(_multi_expand_kernel, (grid,), arguments, config)


def _distinct(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The tensors by member, or one for all of them: what lies in one memory is not chosen among."""
    return tuple(tensors[:1]) if all(tensor is tensors[0] for tensor in tensors) else tuple(tensors)


def _optional(tables: Sequence[Tensor | None]) -> tuple[Tensor | None, ...] | None:
    """The tables by member, or None where no member has one."""
    return None if all(table is None for table in tables) else tuple(tables)


def _fewer(splits: int, members: int) -> int:
    """Splits of K for each of several members: a power of two, for which the expand kernel is compiled."""
    return 1 << (max(1, min(_MOST_SPLITS, splits // members)).bit_length() - 1)
