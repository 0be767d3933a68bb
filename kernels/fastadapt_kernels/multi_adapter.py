"""Many adapters in one batch: to every token of one base product, in place, what its own adapter makes of it.

The tokens come sorted by factor group, so that a program sees one pair (A, B) and reads as much of it as its true rank.
What differs by adapter within a group (VeRA) are vectors, and those are read token by token. No launch depends on who
is in the batch: the grid has room for every way to cut M tokens into runs, and programs without work leave at once.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .tiles import load_low_rank, load_scale, load_tile, partial_buffer, store_tile

# Rank rows of a factor that lie together.
_PAGE_RANKS = tl.constexpr(8)


@triton.jit
def _places_of(
    tile,
    starts,  # [rows + 1]
    groups,  # [M]
    M,
    rows,
    BLOCK_M: tl.constexpr,
    SEGMENTS: tl.constexpr,
):
    """(first place, places [BLOCK_M], group) of a tile: M, M and -1 for what lies beyond its run, or beyond them all.

    A run of L places has cdiv(L, BLOCK_M) tiles; runs are counted SEGMENTS at a time.
    """
    if BLOCK_M == 1:
        first = tile
        end = tile + 1
    else:
        run = 0  # of this tile: as many as end before it
        tiles_before = 0  # of those runs
        tiles = 0  # of all runs counted so far
        for start in range(0, rows, SEGMENTS):
            runs = start + tl.arange(0, SEGMENTS)
            begins = tl.load(starts + runs, mask=runs < rows, other=M)
            ends = tl.load(starts + runs + 1, mask=runs < rows, other=M)
            count = tl.cdiv(ends - begins, BLOCK_M)
            before = tiles + tl.cumsum(count, 0) <= tile
            run += tl.sum(before.to(tl.int32), 0)
            tiles_before += tl.sum(tl.where(before, count, 0), 0)
            tiles += tl.sum(count, 0)
        first = tl.load(starts + tl.minimum(run, rows)) + (tile - tiles_before) * BLOCK_M
        end = tl.load(starts + tl.minimum(run + 1, rows))
    places = first + tl.arange(0, BLOCK_M)
    return first, tl.where(places < end, places, M), tl.load(groups + first, mask=first < M, other=-1)


@triton.jit
def _rank_rows(
    page_starts,  # [P], of one group
    stride,
    ranks,
    R,
    ITEMS: tl.constexpr,
):
    """Where rank rows begin, in elements of the pages. All are known to be multiples of ITEMS, and the compiler is told
    by the multiplication, so that a thread loads as many items at once."""
    starts = tl.load(page_starts + ranks // _PAGE_RANKS, mask=ranks < R, other=0)
    return (starts // ITEMS + ranks % _PAGE_RANKS * (stride // ITEMS)) * ITEMS


@triton.jit
def _begin_on_multiples(page_starts, stride, R, ITEMS: tl.constexpr, PAGES: tl.constexpr):
    """Whether all R rank rows begin on multiples of ITEMS."""
    pages = tl.arange(0, PAGES)
    starts = tl.load(page_starts + pages, mask=pages * _PAGE_RANKS < R, other=0)
    return (tl.max(starts % ITEMS, 0) == 0) & (stride % ITEMS == 0)


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
def _vector_starts(table, adapters):
    """The first element of each token's vector, [BLOCK_M]; -1 for none."""
    return tl.load(table + adapters, mask=adapters >= 0, other=-1)


@triton.jit
def _load_vectors(vectors, starts, index, count, neutral):
    """Entries of each token's vector of ``count``, [BLOCK_M, len(index)]; neutral outside it, and where it has none."""
    inside = (starts >= 0)[:, None] & (index < count)[None, :]
    return tl.load(vectors + starts[:, None] + index[None, :], mask=inside, other=neutral)


@triton.jit
def _shrink_tile(
    x,  # [M, K]
    pages,
    page_starts,  # [P], of A
    tokens,
    ranks,
    M,
    K,
    R,
    first,
    last,
    stride_xm,
    stride_xk,
    stride_ar,
    ITEMS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """x Aᵀ over features first to last."""
    acc = tl.zeros((BLOCK_K if BLOCK_M == 1 else BLOCK_M, BLOCK_R), dtype=tl.float32)
    A_rows = pages + _rank_rows(page_starts, stride_ar, ranks, R, ITEMS)
    for start in range(first, last, BLOCK_K):
        columns = start + tl.arange(0, BLOCK_K)
        x_tile = load_tile(x, tokens, columns, M, K, stride_xm, stride_xk)  # [BLOCK_M, BLOCK_K]
        A_inside = (columns < K)[:, None] & (ranks < R)[None, :]
        A_tile = tl.load(A_rows[None, :] + columns[:, None], mask=A_inside, other=0.0)  # [BLOCK_K, BLOCK_R]
        acc = _accumulate(acc, x_tile, A_tile.to(x_tile.dtype), BLOCK_M)
    return _accumulated(acc, BLOCK_M)


@triton.jit(do_not_specialize=["M", "rows", "splits"])
def _multi_shrink_kernel(
    x,  # [M, K]
    u,  # [splits, M, width], by place
    pages,
    vectors,
    ranks,  # [groups]
    A_pages,  # [groups, P]
    A_strides,  # [groups]
    mid_scales,  # [adapters] or None
    order,  # [M]
    adapters,  # [M]
    groups,  # [M]
    starts,  # [rows + 1]
    M,
    K,
    rows,
    width,
    splits,
    stride_xm,
    stride_xk,
    stride_ag,
    PAGES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    SEGMENTS: tl.constexpr,
):
    ITEMS: tl.constexpr = 128 // pages.dtype.element_ty.primitive_bitwidth
    tiles_r = tl.cdiv(width, BLOCK_R)
    program = tl.program_id(0)
    split = tl.program_id(1)
    _, places, group = _places_of(program // tiles_r, starts, groups, M, rows, BLOCK_M, SEGMENTS)
    R = tl.load(ranks + group, mask=group >= 0, other=0)
    first_rank = program % tiles_r * BLOCK_R
    if first_rank >= R:
        return
    tile_ranks = first_rank + tl.arange(0, BLOCK_R)
    tokens = tl.load(order + places, mask=places < M, other=M)
    page_starts = A_pages + group.to(tl.int64) * stride_ag
    stride_ar = tl.load(A_strides + group)

    steps_per_split = tl.cdiv(tl.cdiv(K, BLOCK_K), splits)
    first = split * steps_per_split * BLOCK_K
    last = tl.minimum(first + steps_per_split * BLOCK_K, K)
    if _begin_on_multiples(page_starts, stride_ar, R, ITEMS, PAGES):
        acc = _shrink_tile(
            x, pages, page_starts, tokens, tile_ranks, M, K, R, first, last,
            stride_xm, stride_xk, stride_ar, ITEMS, BLOCK_M, BLOCK_K, BLOCK_R,
        )  # fmt: skip
    else:
        acc = _shrink_tile(
            x, pages, page_starts, tokens, tile_ranks, M, K, R, first, last,
            stride_xm, stride_xk, stride_ar, 1, BLOCK_M, BLOCK_K, BLOCK_R,
        )  # fmt: skip
    if mid_scales is not None:
        own = tl.load(adapters + places, mask=places < M, other=-1)
        acc *= _load_vectors(vectors, _vector_starts(mid_scales, own), tile_ranks, R, 1.0)
    store_tile(u + split.to(tl.int64) * M * width, acc, places, tile_ranks, M, R, width, 1)


@triton.jit
def _expand_tile(
    u,  # [M, width]
    partials,  # [splits, M, width] or None
    pages,
    page_starts,  # [P], of B
    places,
    columns,
    M,
    N,
    R,
    splits,
    width,
    stride_br,
    ITEMS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """u Bᵀ, walking r in steps, so that no tile is r wide."""
    acc = tl.zeros((BLOCK_R if BLOCK_M == 1 else BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, R, BLOCK_R):
        ranks = start + tl.arange(0, BLOCK_R)
        u_tile = load_low_rank(u, partials, 0, places, ranks, M, R, splits, width)  # [BLOCK_M, BLOCK_R]
        B_rows = pages + _rank_rows(page_starts, stride_br, ranks, R, ITEMS)
        B_inside = (ranks < R)[:, None] & (columns < N)[None, :]
        B_tile = tl.load(B_rows[:, None] + columns[None, :], mask=B_inside, other=0.0)  # [BLOCK_R, BLOCK_N]
        acc = _accumulate(acc, u_tile, B_tile.to(u_tile.dtype), BLOCK_M)
    return _accumulated(acc, BLOCK_M)


@triton.jit(do_not_specialize=["M", "rows", "splits"])
def _multi_expand_kernel(
    u,  # [M, width] by place, or None where no group has a rank
    partials,  # [splits, M, width] or None
    y,  # [M, N], contiguous: the base product, overwritten
    bias,  # [N] where the base product still lacks it, or None
    pages,
    vectors,
    ranks,  # [groups]
    B_pages,  # [groups, P]
    B_strides,  # [groups]
    scalings,  # [adapters]
    out_scales,  # [adapters] or None
    base_scales,  # [adapters] or None
    added_biases,  # [adapters] or None
    order,  # [M]
    adapters,  # [M]
    groups,  # [M]
    starts,  # [rows + 1]
    M,
    N,
    rows,
    width,
    splits,
    stride_bg,
    PAGES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    SEGMENTS: tl.constexpr,
):
    ITEMS: tl.constexpr = 128 // pages.dtype.element_ty.primitive_bitwidth
    tiles_n = tl.cdiv(N, BLOCK_N)
    program = tl.program_id(0)
    first, places, group = _places_of(program // tiles_n, starts, groups, M, rows, BLOCK_M, SEGMENTS)
    own = tl.load(adapters + places, mask=places < M, other=-1)
    R = tl.load(ranks + group, mask=group >= 0, other=0)
    works = R > 0
    if base_scales is not None:
        g_starts = _vector_starts(base_scales, own)
        works |= tl.max(g_starts, 0) >= 0
    if added_biases is not None:
        beta_starts = _vector_starts(added_biases, own)
        works |= tl.max(beta_starts, 0) >= 0
    if bias is not None:
        works = first < M
    if not works:
        return
    columns = program % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    tokens = tl.load(order + places, mask=places < M, other=M)

    acc = load_tile(y, tokens, columns, M, N, N, 1).to(tl.float32)  # [BLOCK_M, BLOCK_N]
    if base_scales is not None:
        acc *= _load_vectors(vectors, g_starts, columns, N, 1.0)
    if u is not None:
        page_starts = B_pages + group.to(tl.int64) * stride_bg
        stride_br = tl.load(B_strides + group, mask=group >= 0, other=0)
        if _begin_on_multiples(page_starts, stride_br, R, ITEMS, PAGES):
            low_rank = _expand_tile(
                u, partials, pages, page_starts, places, columns, M, N, R, splits, width,
                stride_br, ITEMS, BLOCK_M, BLOCK_N, BLOCK_R,
            )  # fmt: skip
        else:
            low_rank = _expand_tile(
                u, partials, pages, page_starts, places, columns, M, N, R, splits, width,
                stride_br, 1, BLOCK_M, BLOCK_N, BLOCK_R,
            )  # fmt: skip
        low_rank *= tl.load(scalings + own, mask=own >= 0, other=0.0)[:, None]
        if out_scales is not None:
            low_rank *= _load_vectors(vectors, _vector_starts(out_scales, own), columns, N, 1.0)
        acc += low_rank
    if added_biases is not None:
        acc += _load_vectors(vectors, beta_starts, columns, N, 0.0)
    if bias is not None:
        acc += load_scale(bias, columns, N)[None, :]
    store_tile(y, acc, tokens, columns, M, N, N, 1)


def multi_adapter_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, tables: Any, tokens: Any, max_rank: int
) -> Tensor:
    """y of x, each token t through the form of its adapter a with the factors of its group k, in two launches:

        y_t = g[a] ⊙ (W0 x_t) + scaling[a] · h[a] ⊙ (B[k] (d[a] ⊙ (A[k] x_t))) + added_bias[a] + b0

    The base product is the library's and base tokens keep it bit for bit, but where the layer has a bias and some
    adapter a base_scale: b0 is then added here, in fp32, because g must scale the product alone.
    Shapes: x [M, K], any strides; weight [N, K]; bias b0 [N]; y [M, N] in x's dtype. max_rank bounds the ranks; u
    [M, max_rank] holds d ⊙ (A x) by place, of which only the columns of the true rank are written and read.
    tables: pages and vectors [elements], the factors in their dtype and the vectors in fp32. By factor group: ranks
    [groups] int32; A_pages and B_pages [groups, P] int64, the first element of every page of 8 rank rows of A and of
    Bᵀ; A_strides and B_strides [groups] int32, from one rank row to the next. By adapter: scalings [adapters] fp32;
    mid_scales (d), out_scales (h), base_scales (g) and added_biases [adapters] int64, the vector's first element, -1
    for none, or None where nobody has any. tokens, int32: order [M], the token at each place; adapters and groups [M],
    of each place, -1 and first for the base model; starts [rows + 1], where each run of places of one group begins,
    then M for all that is left.
    """
    M, K = x.shape
    N = weight.shape[0]
    late_bias = bias if tables.base_scales is not None else None
    y = F.linear(x, weight, None if bias is None or late_bias is not None else bias.to(x.dtype))
    if y.numel() == 0 or (max_rank == 0 and tables.base_scales is tables.added_biases is None):
        return y
    rows = tokens.starts.numel() - 1
    shared = {
        "pages": tables.pages,
        "vectors": tables.vectors,
        "ranks": tables.ranks,
        "order": tokens.order,
        "adapters": tokens.adapters,
        "groups": tokens.groups,
        "starts": tokens.starts,
        "M": M,
        "rows": rows,
        "width": max_rank,
        "PAGES": triton.next_power_of_2(max(1, triton.cdiv(max_rank, _PAGE_RANKS.value))),
    }
    u = partials = None
    if max_rank > 0:
        u = torch.empty(M, max_rank, dtype=x.dtype, device=x.device)
        config, splits = configs.multi_shrink(x, rows, max_rank)
        partials = partial_buffer(u, splits)
        arguments = {
            **shared,
            "x": x,
            "u": partials,
            "A_pages": tables.A_pages,
            "A_strides": tables.A_strides,
            "mid_scales": tables.mid_scales,
            "K": K,
            "splits": splits,
            "stride_xm": x.stride(0),
            "stride_xk": x.stride(1),
            "stride_ag": tables.A_pages.stride(0),
        }
        grid = configs.most_tiles(M, rows, config["BLOCK_M"]) * triton.cdiv(max_rank, config["BLOCK_R"])
        configs.launch(_multi_shrink_kernel, (grid, splits), arguments, config)
        partials = partials if splits > 1 else None
    config = configs.multi_expand(y, rows)
    arguments = {
        **shared,
        "u": u,
        "partials": partials,
        "y": y,
        "bias": late_bias,
        "B_pages": tables.B_pages,
        "B_strides": tables.B_strides,
        "scalings": tables.scalings,
        "out_scales": tables.out_scales,
        "base_scales": tables.base_scales,
        "added_biases": tables.added_biases,
        "N": N,
        "splits": 1 if partials is None else partials.shape[0],
        "stride_bg": tables.B_pages.stride(0),
    }
    grid = configs.most_tiles(M, rows, config["BLOCK_M"]) * triton.cdiv(N, config["BLOCK_N"])
    configs.launch(_multi_expand_kernel, (grid,), arguments, config)
    return y
