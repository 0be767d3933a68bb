"""`adapter_linear`, alone and in groups, and its gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...reference import AdapterForm, adapter_linear_reference
from ..arithmetic import cast, columns_of, factor_grads
from ..calls import (
    AS_IT_IS,
    applied,
    in_widest,
    of_members_with_a_loss,
    once_differentiable,
    rows_of,
    with_leading,
    without_autocast,
)
from ..dropout import draw_dropout, keep_probability
from ..hadamard_linear.function import hadamard_linear
from ..masks import dropout_mask
from .member import Outputs, Saved, Wants
from .plain import plain_lora, plain_lora_group
from .plan import TENSORS, Plan, form_tensors, plan_of
from .strategies import STRATEGIES


def adapter_linear(
    x: Tensor,
    weight: Tensor,
    form: AdapterForm,
    *,
    dropout: float = 0.0,
    training: bool = False,
    backend: str = "auto",
    strategy: str = "auto",
) -> Tensor:
    """The adapter form on a frozen linear layer: y = g ⊙ (W0 x) + h ⊙ (B (d ⊙ (A x̃))) + β.

    x̃ = dropout(x) while `training`, on the low-rank path only; with form.dropout_on_base also on the part of the base
    path that g adds (see AdapterForm). The mask follows torch.manual_seed and gradient checkpointing.

    Shapes: x [..., K]; weight [N, K]; form as AdapterForm states, r may be 0; y [..., N].
    Dtypes: weight has x's dtype, or autocast's takes the place of both; the form's tensors may be fp32 beside 16-bit x.
    Gradients flow to x and to every tensor of the form; weight is frozen. Once differentiable.
    A form with U and V adds (W0 ⊙ (U V)) x̃: it runs as `hadamard_linear`, whatever the strategy on its backend.
    strategy: "auto", "tune", or by name "split", "fused", "library", "recompose" or "expand" (see strategies.py).
    Raises ValueError on mismatched shapes, devices, a dropout outside [0, 1), a weight that requires grad, a backend
    or strategy that cannot run; TypeError on dtypes that cannot be mixed.
    Source: Hu et al. 2021, arXiv:2106.09685, section 4.1; Liu et al. 2024, arXiv:2402.09353; Kopiczko et al. 2023,
    arXiv:2310.11454.

    >>> x, weight = torch.randn(2, 5, 16), torch.randn(8, 16)
    >>> form = AdapterForm(A=torch.randn(4, 16), B=torch.randn(8, 4), out_scale=0.5, bias=torch.randn(8))
    >>> adapter_linear(x, weight, form).shape
    torch.Size([2, 5, 8])
    """
    weights, forms = (weight,), (form,)
    plan = plan_of(x, weights, forms, dropout, training, backend, strategy, _trial)
    if plan.plain is not None:
        return plain_lora(x, plan.plain, weight, form.A, form.B, form.bias)
    return _run(x, weights, forms, plan, backend, strategy)[0]


def adapter_linear_group(
    x: Tensor,
    weights: Sequence[Tensor],
    forms: Sequence[AdapterForm],
    *,
    dropout: float = 0.0,
    training: bool = False,
    backend: str = "auto",
    strategy: str = "auto",
) -> tuple[Tensor, ...]:
    """`adapter_linear` of several layers that read the same x (q, k and v; gate and up): (y of each).

    Their A are applied to x as one product, their dA are one, and dx is accumulated over all of them; members whose A
    is the same tensor (VeRA) share u = A x̃. One dropout mask serves all, otherwise each y is what `adapter_linear`
    gives. Ranks, widths and forms may differ; forms with U and V run one by one, and share a mask among themselves.
    Raises what `adapter_linear` raises, and ValueError for no layers.

    >>> x, weights = torch.randn(5, 16), [torch.randn(8, 16), torch.randn(4, 16)]
    >>> forms = [AdapterForm(torch.randn(2, 16), torch.randn(len(weight), 2)) for weight in weights]
    >>> [tuple(y.shape) for y in adapter_linear_group(x, weights, forms)]
    [(5, 8), (5, 4)]
    """
    if not weights or len(weights) != len(forms):
        raise ValueError(
            f"a group needs at least one weight and a form for each, got {len(weights)} weights and {len(forms)} forms"
        )
    plan = plan_of(x, weights, forms, dropout, training, backend, strategy, _trial)
    if plan.plain is not None and len(forms) > 1:
        As, Bs, biases = [form.A for form in forms], [form.B for form in forms], [form.bias for form in forms]
        return plain_lora_group(x, plan.plain, (*weights, *As, *Bs, *biases))
    return _run(x, weights, forms, plan, backend, strategy)


def _run(
    x: Tensor, weights: Sequence[Tensor], forms: Sequence[AdapterForm], plan: Plan, backend: str, strategy: str
) -> tuple[Tensor, ...]:
    if plan.strategy == "reference":
        return _reference(x, weights, forms, plan.p)
    if plan.strategy == "recomposed":
        return _with_recomposed(x, weights, forms, plan.p, backend, strategy)
    drop = None
    if plan.p > 0.0:
        with torch.no_grad():
            drop = draw_dropout(rows_of(x), plan.p, STRATEGIES[plan.strategy])
    tensors = [tensor for weight, form in zip(weights, forms, strict=True) for tensor in (weight, *form_tensors(form))]
    if plan.trains:
        ys: tuple[Tensor, ...] = applied(AdapterLinearFunction, x, drop, plan, *tensors)
        return ys
    return _with_leading(_outputs(x, drop, plan, tensors)[1].y, x)


def _outputs(x: Tensor, drop: Tensor | None, plan: Plan, tensors: Sequence[Any]) -> tuple[Tensor, Outputs]:
    """(x as rows in the dtype of the products, what the forward makes of them)."""
    with without_autocast(x) if plan.autocast else AS_IT_IS:
        rows = cast(rows_of(x), plan.dtype)
        return rows, plan.forward(rows, plan.group(tensors, drop), None, plan.keep, plan.strategy)


def _with_leading(ys: Sequence[Tensor], x: Tensor) -> tuple[Tensor, ...]:
    return tuple(ys) if x.dim() == 2 else tuple([with_leading(y, x.shape) for y in ys])


class AdapterLinearFunction(torch.autograd.Function):
    """y = g ⊙ (W0 x) + h ⊙ (B (d ⊙ (A x̃))) + β of every layer of a group, with the smallest set of saved tensors.

    Kept for the backward: x only where an A trains, u [M, ΣR] only where a B, d or h does, z = W0 x only where g does,
    and what makes the dropout mask; x, u and that once for the group. Gradients are once differentiable. Algebra: with
    q = (h ⊙ dy) B, P = dyᵀ u,

        dx = Σ (g ⊙ dy) W0 + mask ⊙ ((d ⊙ q) A)     dA = (d ⊙ q)ᵀ x̃     dB = h ⊙ P ⊙ d     dβ = Σ dy
        dh = rowsum(B ⊙ P ⊙ d)     dd = colsum(h ⊙ B ⊙ P)     dg = Σ dy ⊙ z
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, drop: Tensor | None, plan: Plan, *tensors: Any) -> tuple[Tensor, ...]:
        rows, (ys, u, z, made) = _outputs(x, drop, plan, tensors)
        needs = plan.needs
        ctx.save_for_backward(rows if needs.A else None, u, drop if needs.x or needs.A else None, *tensors, *z, *made)
        ctx.x_shape, ctx.plan = x.shape, plan
        if len(ys) > 1:  # members without a loss get no gradient, in the place of zeros
            ctx.set_materialize_grads(False)
        return _with_leading(ys, x)

    @staticmethod
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor | None, ...]:
        ctx.consumed = True  # what others keep of this call's outputs has no graph any more
        return _differentiated_once(ctx, *dys) if torch.is_grad_enabled() else _called_backward(ctx, *dys)


class _Part(NamedTuple):
    """What a backward reads of its context, of some members of a group."""

    x_shape: torch.Size
    plan: Plan
    saved_tensors: Sequence[Tensor | None]
    needs_input_grad: Sequence[bool]


def _part(ctx: Any, called: Sequence[int]) -> tuple[_Part, Sequence[int]]:
    (rows, u, drop, *tensors), plan, needed = ctx.saved_tensors, ctx.plan, ctx.needs_input_grad
    n = len(plan.values)
    if u is not None and not plan.shared_A:
        u = columns_of(u, [len(tensors[index * TENSORS + 1]) for index in range(n)], called)
    slots = [index * TENSORS + kind for index in called for kind in range(TENSORS)]
    kept = tensors[n * TENSORS :]
    part = _Part(
        ctx.x_shape,
        plan._replace(values=tuple([plan.values[index] for index in called])),
        [rows, u, drop, *[tensors[slot] for slot in slots], *[kept[index] for index in called if kept]],
        [*needed[:3], *[needed[3 + slot] for slot in slots]],
    )
    return part, slots


def _backward(ctx: Any, *dys: Tensor) -> tuple[Tensor | None, ...]:
    plan, count = ctx.plan, len(dys) * TENSORS
    # Of what trains a caller may ask for a part.
    needs_x, _, _, *needed = ctx.needs_input_grad
    rows, u, drop, *tensors = ctx.saved_tensors
    kept = tensors[count:]
    saved = Saved(rows, u, kept, []) if plan.keep.base else Saved(rows, u, [], kept)
    wants = Wants(needs_x, plan.needs.bias and True in needed[TENSORS - 1 :: TENSORS])
    with without_autocast(dys[0]):
        group = plan.group(tensors[:count], drop)
        dys = dys if len(ctx.x_shape) == 2 else tuple([rows_of(dy) for dy in dys])
        dx, dA, Ps, dbias, dbase, dmids, douts = plan.backward(dys, group, saved, wants, plan.strategy)
        grads: list[Tensor | None] = []
        for index, member in enumerate(group.members):
            # What one member needs is made for all: each gets what it needs itself.
            start = index * TENSORS
            _, needs_A, needs_B, needs_mid, needs_out, needs_base, needs_bias = needed[start : start + TENSORS]
            dB = dmid = dout = None
            if Ps:  # a tied g is in it
                scales = member.mid_scale, member.out_scale
                dB, dmid, dout = factor_grads(Ps[index], member.B, *scales, needs_B, needs_mid, needs_out)
            elif douts:
                dmid, dout = dmids[index] if needs_mid else None, douts[index] if needs_out else None
            grads += (
                None,
                dA[index] if dA and needs_A else None,
                dB,
                dmid,
                dout,
                dbase[index] if dbase and needs_base else None,
                dbias[index] if dbias and needs_bias else None,
            )
    if dx is not None and len(ctx.x_shape) != 2:
        dx = dx.view(ctx.x_shape)
    # In other dtypes than their tensors' the gradients are sums in fp32: autograd casts them.
    return dx, None, None, *grads


_called_backward = of_members_with_a_loss(_backward, _part, leading=3)

# Beside a graph of the gradients (create_graph=True) it says that they have none; elsewhere it costs time alone.
_differentiated_once = once_differentiable(_called_backward)


def _reference(x: Tensor, weights: Sequence[Tensor], forms: Sequence[AdapterForm], p: float) -> tuple[Tensor, ...]:
    mask = None
    if p > 0.0:
        mask = dropout_mask(draw_dropout(rows_of(x), p, "eager"), x.shape)
    p = 1.0 - keep_probability(p, "eager")
    pairs = zip(weights, forms, strict=True)
    return tuple([in_widest(adapter_linear_reference, x, weight, form, mask=mask, p=p) for weight, form in pairs])


def _with_recomposed(
    x: Tensor, weights: Sequence[Tensor], forms: Sequence[AdapterForm], p: float, backend: str, strategy: str
) -> tuple[Tensor, ...]:
    """A group in which some forms have U and V: these run one by one and share a mask, the others as a group."""
    backend = STRATEGIES.get(strategy, backend)
    x_dropped = F.dropout(x, p) if p > 0.0 else x
    recomposed = [index for index, form in enumerate(forms) if form.U is not None]
    found = {index: _recomposed(x, x_dropped, weights[index], forms[index], backend) for index in recomposed}
    rest = [index for index in range(len(forms)) if index not in found]
    if rest:
        own = [weights[index] for index in rest], [forms[index] for index in rest]
        options: dict[str, Any] = {"dropout": p, "training": True, "backend": backend, "strategy": strategy}
        found |= zip(rest, adapter_linear_group(x, *own, **options), strict=True)
    return tuple([found[index] for index in range(len(forms))])


def _recomposed(x: Tensor, x_dropped: Tensor, weight: Tensor, form: AdapterForm, backend: str) -> Tensor:
    """A form with U and V; x_dropped is x itself without dropout."""
    assert form.U is not None
    assert form.V is not None
    A, B, g = (form.A, form.B, form.base_scale) if form.A.shape[0] else (None, None, form.base_scale)
    if B is not None:
        B = form.whole_up()
    options: dict[str, Any] = {"A": A, "B": B, "backend": backend}
    if x_dropped is x and g is None:
        return hadamard_linear(x, weight, form.U, form.V, bias=form.bias, **options)
    y = hadamard_linear(x_dropped, weight, form.U, form.V, base=False, **options)
    base_scale = None if form.dropout_on_base and x_dropped is not x else g
    none = weight.new_empty(0, weight.shape[1]), weight.new_empty(weight.shape[0], 0)
    y = y + adapter_linear(x, weight, AdapterForm(*none, base_scale=base_scale, bias=form.bias), backend=backend)
    if g is not None and base_scale is None:
        y = y + ((g - 1) * F.linear(x_dropped, weight)).to(y.dtype)
    return y


def _trial(
    x: Tensor, weights: Sequence[Tensor], forms: Sequence[AdapterForm], p: float, strategy: str
) -> Callable[[], object]:
    """One run of a strategy, to be timed, with the backward where one will follow; it leaves no trace."""

    made: dict[int, Tensor] = {}

    def leaf(value: Any) -> Any:  # the same for the same, so that what is tied stays so
        if not isinstance(value, Tensor):
            return value
        return made.setdefault(id(value), value.detach().requires_grad_(value.requires_grad))

    x, forms, grad = leaf(x), [AdapterForm(*map(leaf, form)) for form in forms], torch.is_grad_enabled()
    trained = [tensor for tensor in made.values() if tensor.requires_grad]

    def run() -> None:
        with torch.set_grad_enabled(grad):
            ys = adapter_linear_group(x, weights, forms, dropout=p, training=True, strategy=strategy)
            if grad and trained:
                torch.autograd.grad(ys, trained, [torch.ones_like(y) for y in ys])

    return run
