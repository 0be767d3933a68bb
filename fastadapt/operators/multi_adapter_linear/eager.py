"""The eager multi-adapter product: the base product of all tokens, then each run of tokens through its own adapter.

Runs are views: no token and no factor is copied. What the base product gave the base model's tokens stays as it is.
In decoding, where a run is one token and a call takes longer than its product, runs go together: see plan.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..arithmetic import add_scaled, cast, linear, product, scaled, thin_dtype
from .batch import SlotForm


class FormRun(NamedTuple):
    """Tokens start to stop and the form that they go through."""

    start: int
    stop: int
    form: SlotForm


class PlainRun(NamedTuple):
    """Tokens start to stop of an adapter with factors of its own, and scaling, d and h in them.

    Shapes: A [K, R]; B [R, N]; base_scale and added_bias [N].
    """

    start: int
    stop: int
    A: Tensor
    B: Tensor
    base_scale: Tensor | None
    added_bias: Tensor | None


class StackedRuns(NamedTuple):
    """Few tokens each of adapters with factors of their own: two batched products instead of two for each.

    `key` is equal for layers that ask for the same tokens of the same x in the same order and dtype.
    Shapes: tokens a slice, or an index [T]; A [S, K, R] and B [S, R, N] with scaling and h in it, padded with zeros to
    the largest rank; base_scale and added_bias [T, N], 1 and 0 for adapters without. The T tokens are those of the S
    adapters in their order, or lie at `places` [T] of S equal parts, which are the tokens `source`.
    """

    tokens: slice | Tensor
    A: Tensor
    B: Tensor
    base_scale: Tensor | None
    added_bias: Tensor | None
    key: tuple[object, ...]
    places: Tensor | None = None
    source: Tensor | None = None


class SharedRuns(NamedTuple):
    """Rows of tokens whose adapters share one pair (VeRA): two products for all of them.

    `key` is equal for layers that ask for the same A x of the same tokens: q, k and v, gate and up.
    Shapes: tokens a slice of S rows of equal length, or an index of S tokens; A [R, K]; B [R, N]; mid_scale [S, R];
    out_scale [S, N], with the scalings in it; base_scale and added_bias [S, N], 1 and 0 for adapters without.
    """

    tokens: slice | Tensor
    A: Tensor
    B: Tensor
    mid_scale: Tensor
    out_scale: Tensor
    key: tuple[object, ...]
    base_scale: Tensor | None = None
    added_bias: Tensor | None = None


class Bags(NamedTuple):
    """Which rows of a table are summed up to each row of a result, as `torch.embedding_bag` takes it.

    Shapes: rows [sum of their numbers] int32; starts [T] int32, where each one's begin.
    """

    rows: Tensor
    starts: Tensor


class BagRuns(NamedTuple):
    """Few tokens in 16 bits, each of any adapter of a stack, or of a pair: both products are weighted sums of rows.

    A CPU's products of single rows are slow in 16 bits. These read as much a second as those in fp32 do, so that half
    the bytes take half the time, and the tokens need no order.
    `key` is equal for layers that read the same tokens of the same x; `shared`, of a pair alone, for those that ask for
    the same A x of them.
    Shapes: tokens a slice, or an index [T]; tables A [parts · K, R] and B [parts · R, N], contiguous, with scaling and
    h in B unless it is a pair's; down of K rows each and up of R; of a pair mid_scale [T, R] and out_scale [T, N], with
    the scalings in it; base_scale and added_bias [T, N], 1 and 0 for adapters without.
    """

    tokens: slice | Tensor
    A: Tensor
    B: Tensor
    down: Bags
    up: Bags
    key: tuple[object, ...]
    shared: tuple[object, ...] | None = None
    mid_scale: Tensor | None = None
    out_scale: Tensor | None = None
    base_scale: Tensor | None = None
    added_bias: Tensor | None = None


Step = FormRun | PlainRun | StackedRuns | SharedRuns | BagRuns


def multi_adapter_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, steps: Sequence[Step], memory: dict[Any, Tensor] | None = None
) -> Tensor:
    """y [M, N] of x [M, K]: F.linear(x, weight, bias), and what the forms make of it in their runs.

    memory: what layers that are called with this very x share, empty for the first of them.
    """
    y = linear(x, weight, bias)
    apply_all(y, x, None if bias is None else (weight, bias), steps, memory)
    return y


def multi_adapter_update(
    y: Tensor, x: Tensor, bias: Tensor | None, steps: Sequence[Step], memory: dict[Any, Tensor] | None = None
) -> None:
    """The same on y = x W0ᵀ [M, N] of any strides, in place, which then gets its bias [N]."""
    apply_all(y, x, None, steps, memory)
    if bias is not None:
        y.add_(bias)


def apply_all(
    y: Tensor,
    x: Tensor,
    biased: tuple[Tensor | None, Tensor] | None,
    steps: Sequence[Step],
    memory: dict[Any, Tensor] | None = None,
) -> None:
    """What the steps make of y [M, N], in place.

    biased: the weight, None where nobody can read it, and the bias of a layer whose y has its bias already, which no g
    must scale.
    """
    if memory is None:
        memory = {}
    for step in steps:
        if isinstance(step, PlainRun):
            _apply_plain(y, x, biased, step)
        elif isinstance(step, StackedRuns):
            _apply_stacked(y, x, biased, step, memory)
        elif isinstance(step, SharedRuns):
            _apply_shared(y, x, biased, step, memory)
        elif isinstance(step, BagRuns):
            _apply_bags(y, x, biased, step, memory)
        else:
            start, stop, form = step
            whole = stop - start == x.shape[0]
            rows, own = (y, x) if whole else (y[start:stop], x[start:stop])
            _apply(rows, own, _thin(own, step, memory), biased, form)


def _apply_plain(y: Tensor, x: Tensor, biased: tuple[Tensor | None, Tensor] | None, run: PlainRun) -> None:
    start, stop, A, B, g, beta = run
    if stop - start < x.shape[0]:
        y, x = y[start:stop], x[start:stop]
    if g is not None:
        if biased is not None:
            bias = _take_off_bias(y, x, *biased)
            beta = bias if beta is None else beta + bias
        scaled(y, g, None, keep=False)
    u = torch.mm(cast(x, A.dtype), A)
    # What is summed up in y itself is rounded at y's size each time: a product of one row with every term.
    if stop - start > 1 and y.dtype == B.dtype:
        y.addmm_(u, B)
    else:
        y.add_(torch.mm(u, B))
    if beta is not None:
        y.add_(beta)


def _thin(x: Tensor, run: FormRun, memory: dict[Any, Tensor]) -> Tensor:
    """x of the run as products with its factors take it: cast for all layers at once where that is not its dtype."""
    A = run.form.A
    if not A or A[0].dtype == x.dtype:
        return x
    dtype = thin_dtype(x.shape[0], x.dtype, x.is_cpu)
    if dtype == x.dtype:
        return x
    key = (run.start, run.stop, dtype)
    if key not in memory:
        memory[key] = x.to(dtype)
    return memory[key]


def rows_at(tensor: Tensor, rows: slice | Tensor) -> Tensor:
    """The rows: a slice is a view, an index a copy."""
    if isinstance(rows, slice):
        return tensor if rows.stop - rows.start == tensor.shape[0] else tensor[rows]
    return tensor.index_select(0, rows)


def _apply_stacked(
    y: Tensor, x: Tensor, biased: tuple[Tensor | None, Tensor] | None, run: StackedRuns, memory: dict[Any, Tensor]
) -> None:
    parts = memory.get(run.key)
    if parts is None:
        parts = cast(rows_at(x, run.tokens if run.source is None else run.source), run.A.dtype)
        parts = memory[run.key] = parts.view(run.A.shape[0], -1, x.shape[1])
    # Not baddbmm_: a product of one row is summed up in what it is added to, and rounded at its size with every term.
    low_rank = torch.bmm(torch.bmm(parts, run.A), run.B).view(-1, y.shape[1])
    if run.places is not None:
        low_rank = low_rank.index_select(0, run.places)
    _add(y, x, biased, run, low_rank, None, run.base_scale, run.added_bias)


def _apply_bags(
    y: Tensor, x: Tensor, biased: tuple[Tensor | None, Tensor] | None, run: BagRuns, memory: dict[Any, Tensor]
) -> None:
    u = None if run.shared is None else memory.get(run.shared)
    if u is None:
        weights = memory.get(run.key)
        if weights is None:
            weights = memory[run.key] = cast(rows_at(x, run.tokens), run.A.dtype).reshape(-1)
        u = _summed(run.A, run.down, weights)
        if run.shared is not None:
            memory[run.shared] = u
    if run.mid_scale is not None:
        u = torch.mul(u, run.mid_scale)
    low_rank = _summed(run.B, run.up, u.view(-1))
    _add(y, x, biased, run, low_rank, run.out_scale, run.base_scale, run.added_bias)


def _summed(table: Tensor, bags: Bags, weights: Tensor) -> Tensor:
    """Of each bag the sum of its rows of the table, weighted, in fp32 and then rounded."""
    return torch.embedding_bag(table, bags.rows, bags.starts, False, 0, False, weights)[0]  # mode 0: sums


def _add(
    y: Tensor,
    x: Tensor,
    biased: tuple[Tensor | None, Tensor] | None,
    run: StackedRuns | SharedRuns | BagRuns,
    low_rank: Tensor,
    h: Tensor | None,
    g: Tensor | None,
    beta: Tensor | None,
) -> None:
    """Makes of the base layer's y the adapters' at the run's tokens, in place.

    Shapes: low_rank [T, N] and the vectors [T, N], or [S, tokens, N] and [S, 1, N] of S rows of tokens.
    """
    own = rows_at(y, run.tokens)
    rows = own if low_rank.dim() == 2 else own.view(low_rank.shape)
    if g is not None:
        bias = None if biased is None else _take_off_bias(own, rows_at(x, run.tokens), *biased)
        rows.mul_(g)
        if bias is not None:
            rows.add_(bias)
    if h is None:
        rows.add_(low_rank)
    elif h.dtype == rows.dtype:
        rows.addcmul_(low_rank, h)
    else:
        rows.add_(low_rank.mul_(h))
    if beta is not None:
        rows.add_(beta)
    if not isinstance(run.tokens, slice):
        y.index_copy_(0, run.tokens, own)


def _take_off_bias(y: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor) -> Tensor:
    """Makes of y the product alone; the bias that it had."""
    if weight is None:
        y.sub_(bias)
    else:  # taking a large bias off again would leave its rounding
        torch.mm(x, weight.T, out=y)
    return bias


def _apply_shared(
    y: Tensor, x: Tensor, biased: tuple[Tensor | None, Tensor] | None, run: SharedRuns, memory: dict[Any, Tensor]
) -> None:
    u = memory.get(run.key)
    if u is None:
        u = memory[run.key] = F.linear(rows_at(x, run.tokens), run.A)
    rows, single = run.mid_scale.shape[0], run.mid_scale.shape[0] == u.shape[0]
    mid, out, g, beta = run.mid_scale, run.out_scale, run.base_scale, run.added_bias
    if not single:  # of rows of tokens
        u, mid, out = u.view(rows, -1, u.shape[1]), mid[:, None], out[:, None]
        g, beta = (None if vector is None else vector[:, None] for vector in (g, beta))
    t = cast(torch.mul(u, mid), x.dtype)
    low_rank = torch.mm(t.view(-1, t.shape[-1]), run.B)
    if g is None and beta is None and not isinstance(run.tokens, slice):
        y.index_add_(0, run.tokens, low_rank.mul_(run.out_scale))
        return
    _add(y, x, biased, run, low_rank if single else low_rank.view(rows, -1, y.shape[1]), out, g, beta)


def _apply(y: Tensor, x: Tensor, thin: Tensor, biased: tuple[Tensor | None, Tensor] | None, form: SlotForm) -> None:
    """Makes of the base layer's y the adapter's, in place. thin: x as products with the factors take it."""
    if form.out_scale is not None and x.dtype is torch.float16:
        # What h takes back may be beyond fp16 before that.
        up = tuple([cast(part * form.out_scale, x.dtype) for part in form.B])
        form = form._replace(B=up, out_scale=None)
    g, h = form.base_scale, form.out_scale
    beta = form.added_bias
    if g is not None and biased is not None:
        bias = _take_off_bias(y, x, *biased)
        beta = bias if beta is None else beta + bias
    tied = form.tied
    if g is not None and not tied:
        scaled(y, g, None, keep=False)
    x = thin
    # What is summed up in y itself is rounded at y's size each time: a product of one row with every term, one in parts
    # with every part.
    if y.shape[0] > 1 and len(form.A) == 1 and x.dtype == y.dtype and (h is None or tied):
        ((u, B),) = _down(x, form)
        y.addmm_(u, cast(B, x.dtype), alpha=form.scaling)
    else:
        low_rank: Tensor | None = None
        for u, B in _down(x, form):
            B = cast(B, x.dtype)
            low_rank = product(u, B, form.scaling) if low_rank is None else low_rank.addmm_(u, B, alpha=form.scaling)
        if low_rank is not None and h is not None and not tied:
            add_scaled(y, low_rank, h)
        elif low_rank is not None:
            y.add_(low_rank)
    if tied and g is not None:
        scaled(y, g, None, keep=False)
    if beta is not None:
        y.add_(beta)


def _down(x: Tensor, form: SlotForm) -> Sequence[tuple[Tensor, Tensor]]:
    """(d ⊙ (A x), B) of each part."""
    found, first = [], 0
    for A, B in zip(form.A, form.B, strict=True):
        u = F.linear(x, cast(A, x.dtype))
        if form.mid_scale is not None:
            u.mul_(form.mid_scale[first : first + A.shape[0]])
            first += A.shape[0]
        found.append((u, B))
    return found
