"""`multi_adapter_expert_block`: a gated block of experts, each token through its own adapter.

The rows lie sorted by adapter, and by expert within each: so an adapter's update is a grouped product over rows that
lie together, whatever the number of adapters, and no factor is gathered for it. The base product takes all rows at
once, sorted by expert alone. Between both orders the rows are permuted, which costs less than a product for each pair
of an adapter and an expert.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ...reference import ExpertForm
from ..backends import check_backend
from ..expert_linear.block import Gate, composed, dispatch
from ..expert_linear.eager import adapted
from ..expert_linear.function import experts_of
from ..expert_linear.segments import Segments
from .batch import AdapterBatch
from .checks import check_multi_adapter_expert_block

# Why there is none of these backends.
_NOT_HERE = {
    "triton": 'has no kernel of multi_adapter_expert_block: take backend="auto" or "eager"',
    "reference": "has no slots: call reference.expert_block_reference for each token",
}


class ExpertPart(NamedTuple):
    """A form on the experts from start up to stop, whose tables have those alone.

    form: as ExpertForm states it, but its bias is β − b0, what it adds to the layer's own. An adapter has several parts
    where its factors lie apart. Those of the same experts add up, and g and the bias are the first one's.
    """

    start: int
    stop: int
    form: ExpertForm


class ExpertForms(NamedTuple):
    """One of the two products of experts, and the forms on it by slot; a slot without one is the base model's.

    Shapes: weight W0 [E, N, K], any strides; bias b0 [E, N].
    """

    weight: Tensor
    bias: Tensor | None
    forms: Mapping[int, Sequence[ExpertPart]]


def multi_adapter_expert_block(
    x: Tensor,
    experts: Tensor,
    routing: Tensor,
    up: ExpertForms,
    gate: Gate,
    down: ExpertForms,
    batch: AdapterBatch,
    *,
    backend: str = "auto",
) -> Tensor:
    """A gated block of experts, each token through the forms of its own adapter, or through the base layers:

        y_t = Σ_j routing[t, j] · down[a]_e(gate(up[a]_e(x_t))),  e = experts[t, j]
        up[a]_e(x) = g[a, e] ⊙ (W0[e] x) + h[a, e] ⊙ (B[a, e] (d[a, e] ⊙ (A[a, e] x))) + β[a, e]

    a is the adapter of token t. Methods and ranks may be mixed; the base products run once for all tokens, sorted by
    expert. Nothing of the size of W0 is made. For inference: no gradients. Eager PyTorch on every device.
    Shapes: x and y [T, K]; experts [T, top] of integers from 0 up to E − 1; routing [T, top]; up [E, N, K]; the gate
    takes [S, N] to [S, I]; down [E, K, I]; the batch has T tokens.
    Dtypes: as for `expert_block`. Raises ValueError on mismatched shapes or devices, another number of tokens, an x
    that requires grad, backend "triton" or "reference"; TypeError on dtypes that cannot be mixed.

    >>> form = ExpertForm(torch.randn(3, 2, 16), torch.randn(3, 2, 8))
    >>> up = ExpertForms(torch.randn(3, 8, 16), None, {0: [ExpertPart(0, 3, form)]})
    >>> down, gate = ExpertForms(torch.randn(3, 16, 4), None, {}), lambda h: h[:, :4] * h[:, 4:]
    >>> x, experts, routing = torch.randn(2, 16), torch.tensor([[0, 2], [2, 1]]), torch.ones(2, 2)
    >>> multi_adapter_expert_block(x, experts, routing, up, gate, down, AdapterBatch([0, -1])).shape
    torch.Size([2, 16])
    """
    check_multi_adapter_expert_block(x, experts, routing, up[:2], down[:2], len(batch))
    check_backend(backend)
    if backend in _NOT_HERE:
        raise ValueError(f'backend "{backend}" {_NOT_HERE[backend]}')
    count = len(up.weight)
    groups = _groups(batch, up, down, x.device)
    with torch.no_grad():
        found = by_expert = dispatch(experts, count)
        if groups.places is not None:
            found = dispatch(experts + count * groups.places, count * len(groups.tokens))
        runs = _runs(groups, found.offsets, experts.shape[1], count)
        orders = None if found is by_expert else (found.back[by_expert.order], by_expert.back[found.order])
        every = Segments(by_expert.offsets, len(by_expert.order))
        sides = [partial(_linear, side=side, every=every, orders=orders, runs=runs) for side in (up, down)]
        return composed(x, routing, found, up.weight.dtype, sides[0], gate, sides[1])


class _Groups(NamedTuple):
    """The tokens of each slot that has forms, and of all others, under -1. places [T, 1]: the place of each token's
    slot among them, None where there is but one."""

    tokens: dict[int, int]
    places: Tensor | None


class _Run(NamedTuple):
    """The rows of a slot, and where those of each expert are among them."""

    slot: int
    rows: slice
    segments: Segments


def _groups(batch: AdapterBatch, up: ExpertForms, down: ExpertForms, device: torch.device) -> _Groups:
    """Made once for all layers that the same adapters of a batch are on."""
    known = tuple(sorted({slot for slot in batch.adapter_ids if slot in up.forms or slot in down.forms}))
    groups: _Groups | None = batch.gathered.get(("experts", known, device))
    if groups is None:
        ids = [slot if slot in known else -1 for slot in batch.adapter_ids]
        tokens = {slot: rows * batch.tokens for slot, rows in sorted(Counter(ids).items())}
        place = {slot: number for number, slot in enumerate(tokens)}
        places = torch.tensor([place[slot] for slot in ids]).repeat_interleave(batch.tokens)[:, None].to(device)
        groups = _Groups(tokens, places if len(tokens) > 1 else None)
        batch.gathered["experts", known, device] = groups
    return groups


def _runs(groups: _Groups, offsets: Tensor, top: int, count: int) -> list[_Run]:
    runs, start = [], 0
    for place, (slot, tokens) in enumerate(groups.tokens.items()):
        stop = start + tokens * top
        ends = offsets[place * count : (place + 1) * count]
        runs.append(_Run(slot, slice(start, stop), Segments(ends - start if start else ends, stop - start)))
        start = stop
    return runs


def _linear(
    rows: Tensor, side: ExpertForms, every: Segments, orders: tuple[Tensor, Tensor] | None, runs: Sequence[_Run]
) -> Tensor:
    """The layer on rows that lie sorted by adapter. orders: where rows that are sorted by expert alone lie there, and
    the other way round; None where both are one."""
    if orders is None:
        y = every.product(rows, side.weight.mT)
    else:
        y = every.product(rows.index_select(0, orders[0]), side.weight.mT).index_select(0, orders[1])
    for run in runs:
        own, x = y[run.rows], rows[run.rows]
        for start, stop, form in side.forms.get(run.slot, ()):
            part, segments = run.segments.part(start, stop)
            updated, _, _ = adapted(own[part], x[part], experts_of(side.weight, form, None), segments)
            if form.base_scale is not None:
                own[part] = updated
        if side.bias is not None:
            run.segments.shifted(own, side.bias)
    return y
