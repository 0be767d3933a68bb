"""`expert_block`, a gated block of experts with adapters on both of its products, and its gradients."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...reference import ExpertForm, adapter_linear_reference, expert_block_reference
from ..arithmetic import cast
from ..backends import resolve_backend
from ..calls import applied, once_differentiable, without_autocast
from ..dropout import draw_dropout, keep_probability
from ..masks import dropped, zero_dropped
from . import op
from .checks import check_expert_block, check_expert_weight
from .function import (
    by_norm,
    expert_linear,
    experts_of,
    keep_for,
    normed,
    wants_of,
    without_shift,
)
from .parameters import TENSORS, Experts, Grads, Keep, Saved
from .segments import Segments

Gate = Callable[[Tensor], Tensor]


class ExpertProjection(NamedTuple):
    """The linear layers of experts: weight [E, N, K], the form of an adapter or their bias [E, N], its dropout."""

    weight: Tensor
    form: ExpertForm | None = None
    bias: Tensor | None = None
    dropout: float = 0.0


class Dispatch(NamedTuple):
    """Tokens sorted by expert. order [S]: the place among tokens times top that a sorted row comes from; back [S]: the
    row of each place; tokens [S]: the token of a row; offsets [E]: where the rows of each expert end."""

    order: Tensor
    back: Tensor
    tokens: Tensor
    offsets: Tensor


def dispatch(experts: Tensor, count: int) -> Dispatch:
    """The rows of each of `count` experts. Shapes: experts [T, top]. It asks the host for nothing."""
    ids, order = torch.sort(experts.reshape(-1), stable=True)
    ends = torch.arange(count, device=ids.device, dtype=ids.dtype)
    offsets = torch.searchsorted(ids, ends, right=True, out_int32=True)
    places = torch.arange(len(order), device=order.device)
    back = torch.zeros_like(order).index_copy_(0, order, places)
    return Dispatch(order, back, order // experts.shape[1], offsets)


def expert_block(
    x: Tensor,
    experts: Tensor,
    routing: Tensor,
    up: ExpertProjection,
    gate: Gate,
    down: ExpertProjection,
    *,
    training: bool = True,
    backend: str = "auto",
) -> Tensor:
    """A gated block of experts, as transformers has it, with adapters on both of its products:

        y_t = Σ_j routing[t, j] · down_e(gate(up_e(x_t))),  e = experts[t, j]

    up_e and down_e are linear layers in the form of `expert_linear`. gate: any function of rows without parameters,
    such as g, u = rows.chunk(2, -1), silu(g) · u. Of all rows only what up gives is kept for the backward, and u = A x̃
    of each adapter: x is gathered again and the gate is run again. Dropout on up's low-rank path draws one mask a
    token, that on down's one a row. Compiled code draws both a row, and keeps what its compiler chooses.
    Shapes: x and y [T, K]; experts [T, top] of integers from 0 up to E − 1; routing [T, top]; up [E, N, K]; the gate
    takes [S, N] to [S, I]; down [E, K, I].
    Dtypes: products are in up's weight's dtype, as transformers has it; y has x's. Backends: as for `expert_linear`.
    Gradients flow to x, routing and every tensor of the forms but base_squared. Once differentiable.
    Raises ValueError on mismatched shapes or devices, a weight that requires grad, a backend that cannot run; TypeError
    on dtypes that cannot be mixed. An expert that is none of the E is not looked for, which would wait for the device.

    >>> up, down = ExpertProjection(torch.randn(3, 8, 16)), ExpertProjection(torch.randn(3, 16, 4))
    >>> experts, routing = torch.tensor([[0, 2], [2, 1]]), torch.ones(2, 2)
    >>> expert_block(torch.randn(2, 16), experts, routing, up, lambda h: h[:, :4] * h[:, 4:], down).shape
    torch.Size([2, 16])
    """
    for name, side in (("up.", up), ("down.", down)):
        check_expert_weight(side.weight, side.bias, side.form, name)
    check_expert_block(x, experts, routing, up.weight, down.weight, (up.dropout, down.dropout))
    if down.weight.dtype != up.weight.dtype:
        raise TypeError(f"down.weight must have up.weight's dtype {up.weight.dtype}, got {down.weight.dtype}: cast one")
    backend = resolve_backend(backend, x, up.weight)
    if not training:
        up, down = up._replace(dropout=0.0), down._replace(dropout=0.0)
    if backend == "reference":
        return _reference(x, experts, routing, up, gate, down)
    found = dispatch(experts, len(up.weight))
    if torch.compiler.is_compiling():  # which cannot trace a gate that is run again
        linears = [partial(_projected, offsets=found.offsets, side=side, backend=backend) for side in (up, down)]
        return composed(x, routing, found, up.weight.dtype, linears[0], gate, linears[1])
    drops = [None if side.form is None or not side.dropout else side.dropout for side in (up, down)]
    drop_up = None if drops[0] is None else draw_dropout(x, drops[0], "eager")
    rows = x.new_empty((), dtype=torch.bool).expand(len(found.order), down.weight.shape[2])
    drop_down = None if drops[1] is None else draw_dropout(rows, drops[1], "eager")
    sides = [experts_of(side.weight, side.form, side.bias) for side in (up, down)]
    plain = sides[0][TENSORS:], sides[1][TENSORS:]
    call = _Call(plain, (drops[0] or 0.0, drops[1] or 0.0), gate, torch.is_grad_enabled(), backend)
    tensors = *sides[0][:TENSORS], *sides[1][:TENSORS]
    y: Tensor = applied(ExpertBlockFunction, x, routing, *found, drop_up, drop_down, call, *tensors)
    return y


def _reference(
    x: Tensor, experts: Tensor, routing: Tensor, up: ExpertProjection, gate: Gate, down: ExpertProjection
) -> Tensor:
    if up.dropout or down.dropout:
        raise ValueError('backend "reference" has no dropout here: take training=False, or backend="eager"')

    def linear(side: ExpertProjection) -> Callable[[Tensor, int], Tensor]:
        def run(row: Tensor, e: int) -> Tensor:
            weight = side.weight[e]
            if side.form is not None:
                return adapter_linear_reference(row, weight, side.form.of(e, weight))
            return row @ weight.T if side.bias is None else row @ weight.T + side.bias[e]

        return run

    rows = cast(x, up.weight.dtype)
    return cast(expert_block_reference(rows, experts, routing, linear(up), gate, linear(down)), x.dtype)


def _projected(rows: Tensor, offsets: Tensor, side: ExpertProjection, backend: str) -> Tensor:
    weight, form, bias, dropout = side
    return expert_linear(rows, weight, form, offsets, bias=bias, dropout=dropout, backend=backend)


def composed(
    x: Tensor, routing: Tensor, found: Dispatch, dtype: torch.dtype, up: Gate, gate: Gate, down: Gate
) -> Tensor:
    """The block of its parts, all three functions of rows in the order of `found`, with what each of them keeps.

    dtype: of the rows that up is given.
    """
    with without_autocast(x):
        rows = down(gate(up(cast(x, dtype)[found.tokens])))
        weighted = rows * routing.reshape(-1)[found.order][:, None]
        return cast(weighted[found.back].unflatten(0, routing.shape).sum(1), x.dtype)


class _Call(NamedTuple):
    """What the Function has to know beside tensors, of up and of down; whether a backward can follow; what runs it."""

    plain: tuple[tuple[Any, ...], tuple[Any, ...]]
    p: tuple[float, float]
    gate: Gate
    backward: bool
    backend: str

    def sides(self, tensors: Any) -> tuple[Experts, Experts]:
        """What travels of up and of down, from the tensors of both."""
        up, down = self.plain
        return Experts._make((*tensors[:TENSORS], *up)), Experts._make((*tensors[TENSORS:], *down))

    @property
    def factors(self) -> tuple[float, float]:
        up, down = self.p
        return 1.0 / keep_probability(up, "eager"), 1.0 / keep_probability(down, "eager")


class ExpertBlockFunction(torch.autograd.Function):
    """y_t = Σ_j w_tj · down_e(gate(up_e(x_t))), of whose rows only what up gives is kept, beside u of each adapter.

    With D down's linear map, dropout in it, and G a row's dy: da = w · Dᵀ G; dw = ⟨G, D a⟩ = ⟨Dᵀ G, a⟩ + ⟨G, β⟩, which
    needs no product of down again. The weight of a row goes onto its thin factors for dA and dB. Once differentiable.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        routing: Tensor,
        order: Tensor,
        back: Tensor,
        tokens: Tensor,
        offsets: Tensor,
        drop_up: Tensor | None,
        drop_down: Tensor | None,
        call: _Call,
        *tensors: Any,
    ) -> Tensor:
        up, down = call.sides(tensors)
        need_up, need_down = call.sides(ctx.needs_input_grad[_FIRST:])
        keep_up, keep_down = Keep(False, False), Keep(False, False)
        if call.backward:
            keep_up, keep_down = keep_for(up, need_up), keep_for(down, need_down)
        with without_autocast(x):
            rows = cast(x, up.weight.dtype)
            low = None if drop_up is None else dropped(rows, drop_up, call.factors[0]).index_select(0, tokens)
            h: Tensor | None
            h, u_up, z_up, norm_up = op.expert_linear(
                rows.index_select(0, tokens), low, offsets, up, keep_up, call.backend
            )
            a = call.gate(h)
            if z_up is not None and _rebuilds(up, drop_up):
                h = None
            low = None if drop_down is None else dropped(a, drop_down, call.factors[1])
            y, u_down, z_down, norm_down = op.expert_linear(a, low, offsets, down, keep_down, call.backend)
            weights = routing.reshape(-1).index_select(0, order)[:, None]
            y = y.mul_(weights) if weights.dtype == y.dtype else y * weights
            out = cast(_combined(y, back, routing.shape), x.dtype)
        if call.backward:
            made = h, u_up, z_up, norm_up, u_down, z_down, norm_down
            both = *without_shift(tensors[:TENSORS]), *without_shift(tensors[TENSORS:])
            # A frozen β of down is in the gradient of the routing, and that of up in what is made of z again.
            kept = [*both[:_BIAS], up.bias, *both[_BIAS + 1 : TENSORS + _BIAS], down.bias, *both[TENSORS + _BIAS + 1 :]]
            ctx.save_for_backward(
                x if need_up.A else None, routing, order, back, tokens, offsets, drop_up, drop_down, *made, *kept
            )
            ctx.call, ctx.x_dtype = call, x.dtype
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, routing, order, back, tokens, offsets, drop_up, drop_down, *rest = ctx.saved_tensors
        h, u_up, z_up, norm_up, u_down, z_down, norm_down, *tensors = rest
        call: _Call = ctx.call
        needs_x, needs_routing = ctx.needs_input_grad[:2]
        up, down = call.sides(tensors)
        need_up, need_down = call.sides(ctx.needs_input_grad[_FIRST:])
        up, down = normed(up, norm_up), normed(down, norm_down)
        factor_up, factor_down = call.factors
        dtype = up.weight.dtype
        with without_autocast(dy):
            if h is None:
                h = _rebuilt(up, z_up, offsets)
            with torch.enable_grad():
                leaf = h.detach().requires_grad_()
                gated = call.gate(leaf)
            a = gated.detach()
            weights = routing.reshape(-1).index_select(0, order)
            rows = cast(dy, dtype).index_select(0, tokens)
            low = a
            if drop_down is not None and need_down.A:
                low = dropped(a, drop_down, factor_down)
            wants = wants_of(need_down, True, drop_down is not None)
            saved = Saved(low if need_down.A else None, u_down, z_down, weights)
            grads_down = op.expert_linear_backward(rows, offsets, down, saved, wants, call.backend)
            da = _whole(grads_down, drop_down, factor_down)
            d_routing = None
            if needs_routing:
                dots = (da * a).sum(1, dtype=routing.dtype)
                if down.bias is not None:
                    dots += (rows * Segments(offsets, len(rows)).spread(down.bias)).sum(1, dtype=routing.dtype)
                d_routing = dots.index_select(0, back).view(routing.shape)
            del rows
            da = da.mul_(weights[:, None]) if weights.dtype == dtype else cast(da * weights[:, None], dtype)
            (dh,) = torch.autograd.grad(gated, leaf, da)
            del gated, leaf, a, low, da, h
            gathered = None
            if need_up.A:
                whole = cast(x, dtype)
                whole = whole if drop_up is None else dropped(whole, drop_up, factor_up)
                gathered = whole.index_select(0, tokens)
            wants = wants_of(need_up, needs_x, drop_up is not None)
            saved = Saved(gathered, u_up, z_up, None)
            grads_up = op.expert_linear_backward(dh, offsets, up, saved, wants, call.backend)
            dx = None
            if grads_up.x is not None:
                dx = _combined(grads_up.x, back, routing.shape)
            if grads_up.x_dropped is not None and dx is not None:
                dx += zero_dropped(_combined(grads_up.x_dropped, back, routing.shape), drop_up).mul_(factor_up)
        found = *_tensor_grads(grads_up, norm_up), *_tensor_grads(grads_down, norm_down)
        nothing = (None,) * (_FIRST - 2)
        return None if dx is None else cast(dx, ctx.x_dtype), d_routing, *nothing, *found


# The Function's inputs before the tensors of up and down; the place of β among those of one of them.
_FIRST, _BIAS = 9, 6


def _rebuilds(up: Experts, drop: Tensor | None) -> bool:
    """Whether y is g ⊙ z + β alone, so that z is all of it that has to be kept."""
    return up.tied and drop is None


def _rebuilt(up: Experts, z: Tensor, offsets: Tensor) -> Tensor:
    segments = Segments(offsets, z.shape[0])
    assert up.base_scale is not None
    h = segments.scaled(z, up.base_scale)
    return h if up.bias is None else segments.shifted(h, up.bias)


def _combined(rows: Tensor, back: Tensor, shape: torch.Size) -> Tensor:
    """The sums over each token's rows [T, K], always in the same order."""
    found: Tensor = rows.index_select(0, back).unflatten(0, shape).sum(1)
    return found


def _whole(grads: Grads, drop: Tensor | None, factor: float) -> Tensor:
    """The gradient of x, what came through the mask with it."""
    dx = grads.x
    assert dx is not None
    if grads.x_dropped is not None and drop is not None:
        dx += zero_dropped(grads.x_dropped, drop).mul_(factor)
    return dx


def _tensor_grads(grads: Grads, norm: Tensor | None) -> tuple[Tensor | None, ...]:
    """The gradients in the order of Experts' tensors."""
    factors = grads.A, grads.B, grads.mid_scale, grads.out_scale
    return None, *factors, by_norm(grads.base_scale, norm), grads.bias, None
