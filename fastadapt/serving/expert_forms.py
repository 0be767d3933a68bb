"""Forms of weights of experts in the pool: rank rows of one expert behind those of another, on pages of whole experts.

So an expert's A and B lie in one piece each, and where pages lie together so do those of all experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

from torch import Tensor

from ..operators.multi_adapter_linear.batch import PAGE_RANKS, FormEntry
from ..operators.multi_adapter_linear.experts import ExpertPart
from ..operators.multi_adapter_linear.pages import part_cuts, rank_rows
from ..reference import AdapterForm, ExpertForm
from .entries import Content
from .shelf import Shelf


def content_of(shelf: Shelf, name: str, form: ExpertForm, base_bias: Tensor | None, *, shared: bool) -> Content:
    """What a form puts into the arena. Shapes: A [E·r, K], B [E·r, N], scales of experts one behind the other.

    Raises AdapterError for what it cannot hold.
    """
    d, h, g = form.mid_scale, form.out_scale, form.base_scale
    A = form.A if shared or d is None else form.A * d[:, :, None]
    flat = None if g is None else g.flatten()
    rows = AdapterForm(
        A.flatten(0, 1),
        form.B.flatten(0, 1).T,
        d.flatten() if shared and d is not None else None,
        h if not isinstance(h, Tensor) else flat if h is g and flat is not None else h.flatten(),
        flat,
        None if form.bias is None or form.bias is base_bias else form.bias.flatten(),
        scaling=form.scaling,
    )
    r = form.A.shape[1]
    added = None if rows.bias is None or base_bias is None else base_bias.flatten()
    return shelf.content(name, rows, added, shared=shared, page_ranks=r * max(1, PAGE_RANKS // r))


def parts_of(
    shelf: Shelf, entry: FormEntry, content: Content, weight: Tensor, *, shared: bool
) -> tuple[ExpertPart, ...]:
    """The form at an entry, as views. Shapes: weight [E, N, K].

    Own factors come in parts of experts where their pages have a gap, a pair that all experts share in parts of ranks.
    """
    return tuple(_parts(shelf, entry, content, weight, shared))


def _parts(shelf: Shelf, entry: FormEntry, content: Content, weight: Tensor, shared: bool) -> Iterator[ExpertPart]:
    count, n, k = weight.shape
    page_ranks = PAGE_RANKS if shared else content.page_ranks
    sides = (entry.A_pages, entry.A_stride, k), (entry.B_pages, entry.B_stride, n)
    cuts = part_cuts(entry.rank, *[(pages, stride) for pages, stride, _ in sides], page_ranks=page_ranks)
    views = [rank_rows(shelf.pages, cuts, *side, page_ranks) for side in sides]
    places = (entry.mid_scale, entry.rank), (entry.out_scale, n), (entry.base_scale, n), (entry.added_bias, n)
    d, h, g, beta = (
        None if first < 0 else shelf.vectors[first : first + count * size].view(count, size) for first, size in places
    )
    for (first, last), A, B in zip(pairwise(cuts), *views, strict=True):
        if shared:
            start, stop, r = 0, count, last - first
            mid = None if d is None else d[:, first:last]
        else:
            r = entry.rank // count
            start, stop, mid = first // r, last // r, None
        once = not shared or first == 0
        own = None if g is None else g[start:stop]
        scale = own if content.tied else None if h is None else h[start:stop]
        yield ExpertPart(
            start,
            stop,
            ExpertForm(
                A.unflatten(0, (-1, r)),
                B.unflatten(0, (-1, r)),
                mid,
                1.0 if scale is None else scale,
                own if once else None,
                None if beta is None or not once else beta[start:stop],
                scaling=entry.scaling,
            ),
        )
