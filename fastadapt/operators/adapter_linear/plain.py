"""LoRA by itself in eager PyTorch: the form that is called most, without the steps for what a form can have besides.

    y = W0 x + s · B (A x) + b, of one or of several layers that read one x, without dropout

The same products in the same order as the general function's; a small layer's step takes three quarters of its time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..arithmetic import add_product, cast, column_sums, columns_of, factor_products, product
from ..calls import (
    AS_IT_IS,
    applied,
    of_members_with_a_loss,
    once_differentiable,
    rows_of,
    with_leading,
    without_autocast,
)


class PlainCall(NamedTuple):
    """What is known beside tensors.

    scalings, ranks: s and r of each member. trains_A, trains_B, trains: whether dA, dB or any gradient can be wanted.
    dtype, thin: of the products with a weight and with a factor; casts: whether some tensor has another one than its
    products; autocast: whether that is on, and must be left.
    """

    scalings: tuple[float, ...]
    ranks: tuple[int, ...]
    trains_A: bool
    trains_B: bool
    trains: bool
    dtype: torch.dtype
    thin: torch.dtype
    casts: bool
    autocast: bool

    def cast(self, tensors: Sequence[Any]) -> list[Any]:
        """The weights, factors and biases in the dtypes of their products; where some tensor has another one."""
        n = len(self.ranks)
        dtypes = [self.dtype] * n + [self.thin] * (len(tensors) - n)
        return [None if t is None else cast(t, dtype) for t, dtype in zip(tensors, dtypes, strict=True)]


def plain_lora(x: Tensor, call: PlainCall, weight: Tensor, A: Tensor, B: Tensor, bias: Tensor | None) -> Tensor:
    """Shapes: x [..., K]; weight [N, K]; A [R, K]; B [N, R]; bias [N]; y [..., N]."""
    if call.trains:
        y: Tensor = applied(PlainLoRAFunction, x, call, weight, A, B, bias)
        return y
    _, _, y = _forward(x, call, weight, A, B, bias)
    return y if x.dim() == 2 else with_leading(y, x.shape)


def plain_lora_group(x: Tensor, call: PlainCall, tensors: Sequence[Any]) -> tuple[Tensor, ...]:
    """`plain_lora` of several layers; tensors: the weights, then the A, the B and the biases."""
    if call.trains:
        ys: tuple[Tensor, ...] = applied(PlainGroupFunction, x, call, *tensors)
        return ys
    _, _, found = _group_forward(x, call, tensors)
    return tuple(found) if x.dim() == 2 else tuple([with_leading(y, x.shape) for y in found])


def _added(x: Tensor, u: Tensor, weight: Tensor, B: Tensor, bias: Tensor | None, s: float) -> Tensor:
    """y [M, N] from u [M, R]; in this order because a large product hides the reading of what it is added to."""
    y = product(u, B.t(), s) if bias is None else torch.addmm(bias, u, B.t(), alpha=s)
    return y.addmm_(x, weight.t()) if u.dtype == x.dtype else torch.mm(x, weight.t()).add_(y)


def _forward(x: Tensor, call: PlainCall, *tensors: Any) -> tuple[Tensor, Tensor, Tensor]:
    """(x [M, K], u [M, R], y [M, N]), each in the dtype of its products."""
    with without_autocast(x) if call.autocast else AS_IT_IS:
        rows = cast(rows_of(x), call.dtype)
        weight, A, B, bias = call.cast(tensors) if call.casts else tensors
        u = F.linear(rows if call.thin is call.dtype else rows.to(call.thin), A)
        return rows, u, _added(rows, u, weight, B, bias, call.scalings[0])


def _group_forward(x: Tensor, call: PlainCall, tensors: Sequence[Any]) -> tuple[Tensor, Tensor, list[Tensor]]:
    """`_forward` of several layers, their u side by side: [M, ΣR]."""
    n = len(call.ranks)
    with without_autocast(x) if call.autocast else AS_IT_IS:
        rows = cast(rows_of(x), call.dtype)
        tensors = call.cast(tensors) if call.casts else tensors
        u = F.linear(cast(rows, call.thin), torch.cat(list(tensors[n : 2 * n])))
        parts = torch.split_with_sizes(u, call.ranks, 1)
        each = zip(parts, tensors, tensors[2 * n :], tensors[3 * n :], call.scalings, strict=False)
        return rows, u, [_added(rows, part, weight, B, bias, s) for part, weight, B, bias, s in each]


class PlainLoRAFunction(torch.autograd.Function):
    """y = W0 x + s · B (A x) + b of one layer, with the gradients of x, A, B and b: see AdapterLinearFunction."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, call: PlainCall, weight: Tensor, A: Tensor, B: Tensor, bias: Tensor | None
    ) -> Tensor:
        rows, u, y = _forward(x, call, weight, A, B, bias)
        ctx.save_for_backward(rows if call.trains_A else None, u if call.trains_B else None, weight, A, B)
        ctx.call = call
        return y if x.dim() == 2 else with_leading(y, x.shape)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return _once(ctx, dy) if torch.is_grad_enabled() else _backward(ctx, dy)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    call = ctx.call
    rows, u, *tensors = ctx.saved_tensors
    needs_x, _, _, needs_A, needs_B, needs_bias = ctx.needs_input_grad
    s, shape = call.scalings[0], dy.shape
    with without_autocast(dy):
        weight, A, B = call.cast(tensors) if call.casts else tensors
        dy = rows_of(dy)
        thin = dy
        if call.thin is not call.dtype:  # few rows of 16 bits
            thin, rows = dy.to(call.thin), None if rows is None else rows.to(call.thin)
        dx = q = None
        if needs_x or needs_A:
            q = product(thin, B, s)
        if needs_x and q is not None:
            dx = torch.mm(q, A)
            dx = dx.addmm_(dy, weight) if thin is dy else torch.mm(dy, weight).add_(dx)
            if len(shape) != 2:
                dx = dx.view(*shape[:-1], weight.shape[1])
        dA = torch.mm(q.t(), rows) if needs_A and q is not None else None
        dB = factor_products(thin, u, s) if needs_B else None
        return dx, None, None, dA, dB, column_sums(thin) if needs_bias else None


class PlainGroupFunction(torch.autograd.Function):
    """PlainLoRAFunction of several layers: one u, one dA and one dx for all."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, call: PlainCall, *tensors: Any) -> tuple[Tensor, ...]:
        rows, u, ys = _group_forward(x, call, tensors)
        own = tensors[: 3 * len(call.ranks)]
        ctx.save_for_backward(rows if call.trains_A else None, u if call.trains_B else None, *own)
        ctx.call = call
        ctx.set_materialize_grads(False)  # members without a loss get no gradient, in the place of zeros
        return tuple(ys) if x.dim() == 2 else tuple([with_leading(y, x.shape) for y in ys])

    @staticmethod
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor | None, ...]:
        ctx.consumed = True  # what others keep of this call's outputs has no graph any more
        return _group_once(ctx, *dys) if torch.is_grad_enabled() else _called_backward(ctx, *dys)


class _Part(NamedTuple):
    """What a backward reads of its context, of some members of a group."""

    call: PlainCall
    saved_tensors: Sequence[Tensor | None]
    needs_input_grad: Sequence[bool]


def _part(ctx: Any, called: Sequence[int]) -> tuple[_Part, Sequence[int]]:
    (rows, u, *tensors), call, needed = ctx.saved_tensors, ctx.call, ctx.needs_input_grad
    n = len(call.ranks)
    if u is not None:
        u = columns_of(u, call.ranks, called)
    scalings, ranks = (tuple([values[index] for index in called]) for values in (call.scalings, call.ranks))
    # The members' tensors come kind by kind.
    slots = [start + index for start in range(0, 4 * n, n) for index in called]
    part = _Part(
        call._replace(scalings=scalings, ranks=ranks),
        [rows, u, *[tensors[slot] for slot in slots if slot < 3 * n]],
        [*needed[:2], *[needed[2 + slot] for slot in slots]],
    )
    return part, slots


def _group_backward(ctx: Any, *dys: Tensor) -> tuple[Tensor | None, ...]:
    call = ctx.call
    scalings, ranks = call.scalings, call.ranks
    n = len(ranks)
    rows, u, *tensors = ctx.saved_tensors
    needs_x, _, *needed = ctx.needs_input_grad
    leading = dys[0].shape[:-1]
    if len(leading) != 1:
        dys = tuple([rows_of(dy) for dy in dys])
    dx = None
    dAs: Sequence[Tensor | None] = [None] * n
    dBs: Sequence[Tensor | None] = dAs
    with without_autocast(dys[0]):
        tensors = call.cast(tensors) if call.casts else tensors
        thins = dys if call.thin is call.dtype else [cast(dy, call.thin) for dy in dys]
        if needs_x or rows is not None:
            q = torch.empty(dys[0].shape[0], sum(ranks), dtype=call.thin, device=dys[0].device)
            each = zip(thins, tensors[2 * n :], scalings, torch.split_with_sizes(q, ranks, 1), strict=True)
            for dy, B, s, part in each:
                product(dy, B, s, out=part)
            if needs_x:
                dx = torch.mm(q, torch.cat(list(tensors[n : 2 * n])))
                for dy, weight in zip(dys, tensors, strict=False):
                    add_product(dx, dy, weight)
                if len(leading) != 1:
                    dx = dx.view(*leading, dx.shape[1])
            if rows is not None:
                dAs = torch.split_with_sizes(torch.mm(q.t(), cast(rows, call.thin)), ranks)
        if u is not None:
            parts = torch.split_with_sizes(u, ranks, 1)
            dBs = [factor_products(dy, part, s) for dy, part, s in zip(thins, parts, scalings, strict=True)]
        dbs = [column_sums(dy) if needs else None for dy, needs in zip(thins, needed[3 * n :], strict=True)]
    grads = [*dAs, *dBs, *dbs]
    if False in needed[n : 3 * n]:  # what one member needs is made for all: each gets what it needs itself
        grads = [grad if needs else None for grad, needs in zip(grads, needed[n:], strict=True)]
    return dx, None, *[None] * n, *grads


_called_backward = of_members_with_a_loss(_group_backward, _part, leading=2)

# Beside a graph of the gradients (create_graph=True) they say that they have none; elsewhere it costs time alone.
_once, _group_once = once_differentiable(_backward), once_differentiable(_called_backward)
