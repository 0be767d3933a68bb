"""`adapter_linear`, alone and in groups, and its gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...reference import AdapterForm, adapter_linear_reference
from ..arithmetic import cast
from ..calls import (
    check_same_dtype,
    compute_dtype,
    in_widest,
    once_differentiable,
    refuse_transforms,
    rows_of,
    with_leading,
    without_autocast,
)
from ..dropout import draw_dropout, keep_probability
from ..hadamard_linear.function import hadamard_linear
from ..masks import Dropout, dropout_mask
from . import op, tuner
from .checks import check_adapter_linear
from .cost import keeps_recomposed
from .member import Group, Keep, Member, MemberGrads, Saved, Wants
from .strategies import STRATEGIES, candidates, cheapest, check_explicit, check_strategy
from .workload import Workload, workload_of


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
    strategy: "auto", "tune", or by name "split", "fused", "library" or "recompose" (see strategies.py).
    Raises ValueError on mismatched shapes, devices, a dropout outside [0, 1), a weight that requires grad, a backend
    or strategy that cannot run; TypeError on dtypes that cannot be mixed.
    Source: Hu et al. 2021, arXiv:2106.09685, section 4.1; Liu et al. 2024, arXiv:2402.09353; Kopiczko et al. 2023,
    arXiv:2310.11454.

    >>> x, weight = torch.randn(2, 5, 16), torch.randn(8, 16)
    >>> form = AdapterForm(A=torch.randn(4, 16), B=torch.randn(8, 4), out_scale=0.5, bias=torch.randn(8))
    >>> adapter_linear(x, weight, form).shape
    torch.Size([2, 5, 8])
    """
    return adapter_linear_group(
        x, (weight,), (form,), dropout=dropout, training=training, backend=backend, strategy=strategy
    )[0]


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
    for weight, form in zip(weights, forms, strict=True):
        check_adapter_linear(x, weight, form, dropout)
        check_same_dtype(x, weight)
    check_strategy(strategy, backend)
    p = dropout if training else 0.0
    if backend == "reference":
        return _reference(x, weights, forms, p)
    if any([form.U is not None for form in forms]):
        return _with_recomposed(x, weights, forms, p, backend, strategy)
    workload = workload_of(x, weights, forms, compute_dtype(x), p > 0.0)
    if strategy in STRATEGIES:
        check_explicit(strategy, workload, x, *weights)
    else:
        strategy = _choose(x, weights, forms, workload, p, backend, strategy == "tune")
    drop = None
    if p > 0.0:
        with torch.no_grad():
            drop = draw_dropout(rows_of(x), p, STRATEGIES[strategy])
    members = [_member(weight, form) for weight, form in zip(weights, forms, strict=True)]
    call = _Call(
        tuple([member[_TENSORS:] for member in members]),
        p,
        workload.shared_A,
        strategy,
        strategy == "recompose" and keeps_recomposed(workload),
        workload.backward,
    )
    tensors = [tensor for member in members for tensor in member[:_TENSORS]]
    try:
        ys: tuple[Tensor, ...] = AdapterLinearFunction.apply(x, drop, call, *tensors)
    except RuntimeError as error:
        refuse_transforms(error)
        raise
    return ys


def _member(weight: Tensor, form: AdapterForm) -> Member:
    scaling, vector = form.settled(weight.shape[0])
    tied = vector is not None and vector is form.base_scale
    out_scale = None if tied else vector
    return Member(
        weight,
        form.A,
        form.B,
        form.mid_scale,
        out_scale,
        form.base_scale,
        form.bias,
        scaling,
        form.dropout_on_base,
        tied,
    )


# How many fields of a Member are tensors: autograd has to see these one by one.
_TENSORS = 7


class _Call(NamedTuple):
    """What the Function has to know beside tensors: the members' plain values, and how the group runs."""

    plain: tuple[tuple[Any, ...], ...]
    p: float
    shared_A: bool
    strategy: str
    keep_weights: bool
    backward: bool

    def by_member(self, values: Sequence[Any]) -> list[Member]:
        """Members of their tensors, or of what goes with these, in a flat list."""
        starts = range(0, len(values), _TENSORS)
        return [Member(*values[i : i + _TENSORS], *plain) for i, plain in zip(starts, self.plain, strict=True)]

    def group(self, tensors: Sequence[Any], drop: Tensor | None, dtype: torch.dtype) -> Group:
        """The group of these tensors, base weights cast to the dtype of the products."""
        members = [member._replace(weight=cast(member.weight, dtype)) for member in self.by_member(tensors)]
        return Group(members, Dropout(drop, self.p), self.shared_A)


class AdapterLinearFunction(torch.autograd.Function):
    """y = g ⊙ (W0 x) + h ⊙ (B (d ⊙ (A x̃))) + β of every layer of a group, with the smallest set of saved tensors.

    Kept for the backward: x only where an A trains, u [M, ΣR] only where a B, d or h does, z = W0 x only where g does,
    and what makes the dropout mask; x, u and that once for the group. Gradients are once differentiable. Algebra: with
    q = (h ⊙ dy) B, P = dyᵀ u,

        dx = Σ (g ⊙ dy) W0 + mask ⊙ ((d ⊙ q) A)     dA = (d ⊙ q)ᵀ x̃     dB = h ⊙ P ⊙ d     dβ = Σ dy
        dh = rowsum(B ⊙ P ⊙ d)     dd = colsum(h ⊙ B ⊙ P)     dg = Σ dy ⊙ z
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, drop: Tensor | None, call: _Call, *tensors: Any) -> tuple[Tensor, ...]:
        dtype = compute_dtype(x)
        # needs_input_grad does not know of no_grad, where nothing needs to be kept or prepared.
        needs = _needs(ctx.needs_input_grad) if call.backward else _Needs()
        # The kernels have a tied g's gradient from u as well.
        through_u = STRATEGIES[call.strategy] == "triton" and any([tied for *_, tied in call.plain])
        keep_u = needs.B or needs.mid_scale or needs.out_scale or (needs.base_scale and through_u)
        with without_autocast(x):
            rows = cast(rows_of(x), dtype)
            group = call.group(tensors, drop, dtype)
            keep = Keep(keep_u, needs.base_scale, call.keep_weights)
            ys, u, z, weights = op.adapter_linear(rows, group, None, keep, call.strategy)
        if any(needs):
            ctx.save_for_backward(
                rows if needs.A else None, u, drop if needs.x or needs.A else None, *tensors, *z, *weights
            )
            ctx.x_shape, ctx.dtype, ctx.call, ctx.keeps_base = x.shape, dtype, call, bool(z)
        return tuple([with_leading(y, x.shape) for y in ys])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor | None, ...]:
        ctx.consumed = True  # what others keep of this call's outputs has no graph any more
        call, needs, count = ctx.call, _needs(ctx.needs_input_grad), len(dys) * _TENSORS
        rows, u, drop, *tensors = ctx.saved_tensors
        tensors, kept = tensors[:count], tensors[count:]
        saved = Saved(rows, u, kept if ctx.keeps_base else [], [] if ctx.keeps_base else kept)
        with without_autocast(dys[0]):
            group = call.group(tensors, drop, ctx.dtype)
            found = op.adapter_linear_backward(
                [rows_of(dy) for dy in dys], group, saved, Wants(needs.x, needs.bias), call.strategy
            )
            # What one member needs is made for all: each gets what it needs itself.
            needed = call.by_member(ctx.needs_input_grad[-count:])
            members = enumerate(zip(group.members, needed, strict=True))
            grads = [grad for index, (member, own) in members for grad in _member_grads(member, found.of(index), own)]
        dx = None if found.x is None else found.x.view(ctx.x_shape)
        # In other dtypes than their tensors' the gradients are sums in fp32: autograd casts them.
        return dx, None, None, *grads


class _Needs(NamedTuple):
    """Whether x needs a gradient, and of which kinds some member's tensors do."""

    x: bool = False
    A: bool = False
    B: bool = False
    mid_scale: bool = False
    out_scale: bool = False
    base_scale: bool = False
    bias: bool = False


def _needs(needed: Sequence[bool]) -> _Needs:
    """What autograd asks for x, drop, the call and the members' tensors."""
    x, _, _, *tensors = needed
    # Of each member the first is its weight, which is frozen.
    return _Needs(x, *[True in tensors[kind::_TENSORS] for kind in range(1, _TENSORS)])


def _member_grads(member: Member, found: MemberGrads, needed: Member) -> tuple[Tensor | None, ...]:
    """The gradients of a member's tensors, in their order, of those that are needed; the weight is frozen."""
    P = found.P
    return (
        None,
        found.A if needed.A else None,
        _up_grad(P, member) if P is not None and needed.B else None,
        _mid_scale_grad(P, member) if P is not None and needed.mid_scale else None,
        op.out_scale_grad(P, member) if P is not None and needed.out_scale else None,
        found.base_scale if needed.base_scale else None,
        found.bias if needed.bias else None,
    )


def _up_grad(P: Tensor, member: Member) -> Tensor:
    """dB = h ⊙ P ⊙ d [N, R]; the scalar part of h is in P."""
    dB = P if member.mid_scale is None else P * member.mid_scale
    return dB if member.vector is None else dB * member.vector[:, None]


def _mid_scale_grad(P: Tensor, member: Member) -> Tensor:
    """dd = colsum(h ⊙ B ⊙ P) [R]."""
    PB = P * member.B
    return PB.sum(0) if member.vector is None else cast(member.vector, PB.dtype) @ PB


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


def _choose(
    x: Tensor,
    weights: Sequence[Tensor],
    forms: Sequence[AdapterForm],
    workload: Workload,
    p: float,
    backend: str,
    tune: bool,
) -> str:
    """The strategy that was measured to be the fastest here, or else the cost model's."""
    names = candidates(workload, backend, x, *weights)
    if len(names) > 1 and (tune or x.device.type == "cuda") and not torch.compiler.is_compiling():
        key = tuner.Key.of(workload, x.device)
        measured = tuner.lookup(key)
        if measured is None and tune:
            measured = tuner.best(key, lambda: {name: _trial(x, weights, forms, p, name) for name in names})
        if measured in names:
            return measured
    return cheapest(names, workload, x.device)


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
