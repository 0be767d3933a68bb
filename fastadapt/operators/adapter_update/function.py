"""`adapter_update`, the adapter form on what any base layer has given, and its gradients."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...reference import AdapterForm, adapter_update_reference
from ..arithmetic import cast, factor_grads, sum_dtype
from ..backends import check_backend
from ..calls import (
    applied,
    compute_dtype,
    in_widest,
    once_differentiable,
    rows_of,
    with_leading,
    without_autocast,
)
from . import op
from .checks import check_adapter_update
from .parameters import Saved, Update, Wants


def adapter_update(
    y: Tensor,
    x: Tensor,
    form: AdapterForm,
    *,
    base_bias: Tensor | None = None,
    y_dropped: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """The adapter form on a base layer that has been run: y' = g ⊙ (y − b0) + h ⊙ (B (d ⊙ (A x̃))) + β.

    y = base(x), whatever that layer does: scales, fakes quantisation, runs hooks, fetches its weights. y' is a new
    tensor, y is not written. With y_dropped = base(x̃), a second call of the layer for a form with dropout_on_base under
    active dropout, g scales what came of the dropped input: y' = (y − b0) + (g − 1) ⊙ (y_dropped − b0) + h ⊙ … + β.
    A form that adds nothing gives y to the bit: h ⊙ B zero, g one and β the base layer's.

    Shapes: y and y_dropped [..., N]; x̃ [..., K], which the caller has dropped where dropout is active; base_bias b0
    [N], what `form.bias`, the whole β, has of the layer's own; form as AdapterForm states, r may be 0; y' [..., N].
    Dtypes: y' has y's. The low-rank products are in x's dtype or autocast's; the form's tensors and y may have others.
    Gradients flow to y, y_dropped, x, base_bias and every tensor of the form. Once differentiable.
    Raises ValueError on mismatched shapes or devices, a form with U and V, which need W0 itself, a backend "triton",
    which has no kernel for it; TypeError on dtypes that are not floating.
    Source: Hu et al. 2021, arXiv:2106.09685, section 4.1; Liu et al. 2024, arXiv:2402.09353.

    >>> base, x = torch.nn.Linear(16, 8), torch.randn(5, 16)
    >>> form = AdapterForm(torch.randn(4, 16), torch.zeros(8, 4), bias=base.bias)
    >>> torch.equal(adapter_update(base(x), x, form, base_bias=base.bias), base(x))
    True
    """
    check_adapter_update(y, x, form, base_bias, y_dropped)
    check_backend(backend)
    if backend == "triton":
        raise ValueError('backend "triton" has no kernel of adapter_update: take backend="auto" or "eager"')
    if form.base_scale is None or not form.dropout_on_base:
        y_dropped = None
    if backend == "reference":
        with without_autocast(y):  # which leaves y's dtype to y'
            return in_widest(adapter_update_reference, y, x, form, base_bias=base_bias, y_dropped=y_dropped)
    scaling, vector = form.settled(form.B.shape[0])
    tied = vector is not None and vector is form.base_scale
    update = Update(
        form.A,
        form.B,
        form.mid_scale,
        None if tied else vector,
        form.base_scale,
        shift(form, base_bias, sum_dtype(y)),
        scaling,
        tied,
    )
    call = _Call(update[_TENSORS:], y_dropped is not None, torch.is_grad_enabled())
    updated: Tensor = applied(AdapterUpdateFunction, y, x, y_dropped, call, *update[:_TENSORS])
    return updated


def shift(form: AdapterForm, base_bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """c = β − g ⊙ b0, in `dtype`, so that y' = g ⊙ y + … + c; None where it is nothing."""
    if base_bias is None:
        return form.bias
    g = form.base_scale
    if g is None and form.bias is base_bias:
        return None
    base = cast(base_bias, dtype)
    base = base if g is None else g * base
    return -base if form.bias is None else form.bias - base


# How many fields of an Update are tensors: autograd has to see these one by one, behind y, x, y_dropped and the call.
_TENSORS, _FIRST = 6, 4


class _Call(NamedTuple):
    """What the Function has to know beside tensors: an update's plain values, and whether a backward can follow.

    drops: whether there is a y_dropped, which g multiplies then.
    """

    plain: tuple[Any, ...]
    drops: bool
    backward: bool


class AdapterUpdateFunction(torch.autograd.Function):
    """y' = g ⊙ y + h ⊙ (B (d ⊙ (A x̃))) + c, with the smallest set of saved tensors.

    Kept for the backward: x̃ only where A trains, u = A x̃ only where B, d or h does, and y (y_dropped where there is
    one) only where g does. Once differentiable. With q = (h ⊙ dy') B and P = dy'ᵀ u,

        dy = g ⊙ dy'     dx̃ = (d ⊙ q) A     dA = (d ⊙ q)ᵀ x̃     dB = h ⊙ P ⊙ d     dh = rowsum(B ⊙ P ⊙ d)
        dd = colsum(h ⊙ B ⊙ P)     dg = Σ dy' ⊙ y     dc = Σ dy'

    With y_dropped dy = dy' and dy_dropped = (g − 1) ⊙ dy'.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, y_dropped: Tensor | None, call: _Call, *tensors: Any) -> Tensor:
        needs = Update._make((*ctx.needs_input_grad[_FIRST:], *call.plain))
        update, dtype = Update._make((*tensors, *call.plain)), compute_dtype(x)
        # needs_input_grad does not know of no_grad, where nothing needs to be kept.
        through_u = needs.B or needs.mid_scale or needs.out_scale or (needs.base_scale and update.tied)
        keep_u = call.backward and bool(through_u)
        with without_autocast(x):
            rows, before = cast(rows_of(x), dtype), rows_of(y)
            dropped = None if y_dropped is None else rows_of(y_dropped)
            out, u = op.adapter_update(before, rows, update, dropped, keep_u, "eager")
        if call.backward:
            z = before if dropped is None else dropped
            saved = rows if needs.A else None, u, z if needs.base_scale else None
            ctx.save_for_backward(*saved, *tensors[:-1])  # c is added, no more
            ctx.x_shape, ctx.y_shape, ctx.dtype, ctx.call = x.shape, y.shape, dtype, call
        return with_leading(out, y.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        rows, u, z, *tensors = ctx.saved_tensors
        needs_y, needs_x, needs_dropped, _, *needed = ctx.needs_input_grad
        call, update = ctx.call, Update._make((*tensors, None, *ctx.call.plain))
        needs = Update._make((*needed, *call.plain))
        scales_y = update.base_scale is not None and not call.drops
        wants = Wants(needs_x, needs_y and scales_y, needs_dropped, bool(needs.shift))
        with without_autocast(dy):
            like = dy.new_empty(0, dtype=ctx.dtype)
            found = op.adapter_update_backward(rows_of(dy), like, update, Saved(rows, u, z), wants, "eager")
            dB = dmid = dout = None
            if found.P is not None:
                wanted = bool(needs.B), bool(needs.mid_scale), bool(needs.out_scale or update.tied)
                dB, dmid, dout = factor_grads(found.P, update.B, update.mid_scale, update.vector, *wanted)
        dg = found.base_scale
        if dg is not None and update.tied:  # what h's part adds
            dg, dout = dg if dout is None else dg + dout, None
        # The sums are in fp32: autograd casts them.
        return (
            (found.y.view(ctx.y_shape) if found.y is not None else dy) if needs_y else None,
            None if found.x is None else found.x.view(ctx.x_shape),
            None if found.y_dropped is None else found.y_dropped.view(ctx.y_shape),
            None,
            found.A,
            dB,
            dmid,
            dout,
            dg,
            found.shift,
        )
