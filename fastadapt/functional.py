"""The public functions and the autograd Functions behind them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import eager, ops, tuner
from .batch import AdapterBatch, LayerForms
from .checks import (
    check_adapter_linear,
    check_bottleneck,
    check_hadamard_linear,
    check_multi_adapter_linear,
    check_weight_norm,
)
from .cost import Workload, keeps_recomposed
from .eager import Member, cast, sum_dtype
from .ops import STRATEGIES
from .reference import (
    AdapterForm,
    adapter_linear_reference,
    bottleneck_reference,
    hadamard_linear_reference,
    merged_weight_reference,
    weight_norm_reference,
)
from .strategies import (
    candidates,
    cheapest,
    check_explicit,
    check_strategy,
    resolve_backend,
    resolve_bottleneck_backend,
)


def merged_weight(weight: Tensor, form: AdapterForm) -> Tensor:
    """W' = diag(g) W0 + W0 ⊙ (U V) + diag(h) B diag(d) A: the merge rule of every adapter form, in at least fp32.

    Shapes: weight and W' [N, K]. The result has the dtype of `weight`; F.linear(x, W', β) equals the form.
    """
    dtype = torch.promote_types(weight.dtype, torch.float32)
    tensors: dict[str, Any] = {name: v.to(dtype) for name, v in form._asdict().items() if isinstance(v, Tensor)}
    with without_autocast(weight):
        return merged_weight_reference(weight.to(dtype), form._replace(**tensors)).to(weight.dtype)


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1]) if x.dim() != 2 else x


def _with_leading(y: Tensor, x_shape: torch.Size) -> Tensor:
    """y [M, N] with the leading dimensions of x: [..., N].

    Autograd must not take it for a view: what a Function returns as a view cannot be written in place, which modules
    behind a layer do (ReLU(inplace=True), a residual that is added with +=).
    """
    return y if len(x_shape) == 2 else torch.ops.aten._unsafe_view(y, [*x_shape[:-1], y.shape[1]])


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype of the products: autocast's where it is on for x's device, else x's own."""
    kind = x.device.type
    if _autocasts(kind) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return x.dtype


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Autocast off for x's device inside the `with` block: for products whose dtype is chosen already."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if _autocasts(kind) else nullcontext()


def _autocasts(kind: str) -> bool:
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


# How many tensors of each member are among the arguments of AdapterLinearFunction: weight, A, B, mid_scale, out_scale,
# base_scale, bias.
_KINDS = 7


def _group(
    tensors: Sequence[Tensor | None],
    scalings: Sequence[float],
    on_base: Sequence[bool],
    tied: Sequence[bool],
    dtype: torch.dtype,
) -> list[Member]:
    """The members of a group from their tensors in a flat list, base weights cast to the dtype of the products.

    The out_scale of a tied member is its base_scale.
    """
    members = []
    for index, (scaling, dropped) in enumerate(zip(scalings, on_base, strict=True)):
        weight, A, B, mid, out, base, bias = tensors[_KINDS * index : _KINDS * (index + 1)]
        assert weight is not None
        assert A is not None
        assert B is not None
        out = base if tied[index] else out
        members.append(Member(cast(weight, dtype), A, B, mid, out, scaling, base, bias, dropped))
    return members


class AdapterLinearFunction(torch.autograd.Function):
    """y = g ⊙ (W0 x) + h ⊙ (B (d ⊙ (A x̃))) + β of every layer of a group, with the smallest set of saved tensors.

    Kept for the backward: x only where an A trains, u [M, ΣR] only where a B, d or h does, z = W0 x only where g does,
    and what makes the dropout mask; x, u and that once for the group. Gradients are once differentiable. Algebra: with
    q = (h ⊙ dy) B, P = dyᵀ u,

        dx = Σ (g ⊙ dy) W0 + mask ⊙ ((d ⊙ q) A)     dA = (d ⊙ q)ᵀ x̃     dB = h ⊙ P ⊙ d     dβ = Σ dy
        dh = rowsum(B ⊙ P ⊙ d)     dd = colsum(h ⊙ B ⊙ P)     dg = Σ dy ⊙ z
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        drop: Tensor | None,
        p: float,
        scalings: tuple[float, ...],
        on_base: tuple[bool, ...],
        tied: tuple[bool, ...],
        shared_A: bool,
        strategy: str,
        keep_weight: bool,
        backward: bool,
        *tensors: Tensor | None,
    ) -> tuple[Tensor, ...]:
        dtype = compute_dtype(x)
        # needs_input_grad does not know of no_grad, where nothing needs to be kept or prepared.
        needs = _needs(ctx, len(tensors)) if backward else _Needs()
        # The kernels give g's gradient without what a tied out_scale adds to it, and that needs u.
        through_u = any(tied) and needs.base_scale and STRATEGIES[strategy] == "triton"
        needs_u = needs.B or needs.mid_scale or needs.out_scale or through_u
        backward = any(needs)
        with without_autocast(x):
            rows = cast(_rows(x), dtype)
            members = _group(tensors, scalings, on_base, tied, dtype)
            ys, u, kept = ops.adapter_linear(
                rows, members, None, drop, p, shared_A, needs_u, needs.base_scale, keep_weight, strategy
            )
        if backward:
            ctx.save_for_backward(
                rows if needs.A else None,
                u,
                drop if needs.x or needs.A else None,
                *tensors,
                *kept,  # the z of members with a base_scale, or the recomposed weights
            )
            ctx.x_shape, ctx.dtype, ctx.strategy, ctx.keep_weight = x.shape, dtype, strategy, keep_weight
            ctx.p, ctx.scalings, ctx.on_base, ctx.tied, ctx.shared_A = p, scalings, on_base, tied, shared_A
        return tuple([_with_leading(y, x.shape) for y in ys])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor | None, ...]:
        count = len(dys) * _KINDS
        needs = _needs(ctx, count)
        rows, u, drop, *saved = ctx.saved_tensors
        with without_autocast(dys[0]):
            members = _group(saved[:count], ctx.scalings, ctx.on_base, ctx.tied, ctx.dtype)
            # Either the z of the members that have a base_scale or the recomposed weights.
            weights, z = (saved[count:], []) if ctx.keep_weight else ([], saved[count:])
            scaled = [index for index in range(len(z) and len(members)) if members[index].base_scale is not None]
            found = ops.adapter_linear_backward(
                [_rows(dy) for dy in dys],
                members,
                rows,
                u,
                [z[scaled.index(index)] if index in scaled else None for index in range(len(members))],
                weights,
                drop,
                ctx.p,
                ctx.shared_A,
                needs.x,
                needs.bias,
                ctx.strategy,
            )
            grads: list[Tensor | None] = []
            for index, member in enumerate(members):
                needs_B, needs_mid, needs_out = ctx.needs_input_grad[-count:][index * _KINDS :][2:5]
                dbase = found.base_scale[scaled.index(index)] if index in scaled else None
                through_u = ctx.tied[index] and dbase is not None and STRATEGIES[ctx.strategy] == "triton"
                dB = dmid = dout = None
                if found.P:
                    wanted = (needs_B, needs_mid, needs_out or through_u)
                    dB, dmid, dout = _factor_grads(found.P[index], member, wanted)
                if through_u and dbase is not None and dout is not None:
                    dbase = dbase + dout
                dA, dbias = found.A[index] if found.A else None, found.bias[index] if found.bias else None
                grads += [None, dA, dB, dmid, dout, dbase, dbias]
        dx = None if found.x is None else found.x.view(ctx.x_shape)
        # What one member needs is made for all. In other dtypes than their tensors' the gradients are sums in fp32:
        # autograd casts them.
        needed = [grad if wanted else None for grad, wanted in zip(grads, ctx.needs_input_grad[-count:], strict=True)]
        return dx, None, None, None, None, None, None, None, None, None, *needed


class _Needs(NamedTuple):
    """Whether x needs a gradient, and of which kinds some member's tensors do."""

    x: bool = False
    A: bool = False
    B: bool = False
    mid_scale: bool = False
    out_scale: bool = False
    base_scale: bool = False
    bias: bool = False


def _needs(ctx: Any, count: int) -> _Needs:
    """What autograd asks for; `count` is the number of the members' tensors, which come last."""
    needed = ctx.needs_input_grad
    tensors = needed[-count:]
    # Of each member the first is its weight, which is frozen: there stands x.
    return _Needs(needed[0], *[True in tensors[kind::_KINDS] for kind in range(1, _KINDS)])


def _factor_grads(
    P: Tensor, member: Member, needs: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dB, dd and dh from P = scaling · dyᵀ u [N, R], those that are needed: nothing larger than B is made."""
    needs_B, needs_mid, needs_out = needs
    mid_scale, out_scale = member.mid_scale, member.out_scale
    dB = dmid = dout = None
    if needs_mid or needs_out:
        PB = P * member.B
        if needs_mid:
            dmid = PB.sum(0) if out_scale is None else cast(out_scale, PB.dtype) @ PB
        if needs_out:
            dout = PB.sum(1) if mid_scale is None else PB @ cast(mid_scale, PB.dtype)
    if needs_B:
        dB = P if mid_scale is None else P * mid_scale
        if out_scale is not None:
            dB = dB * out_scale[:, None]
    return dB, dmid, dout


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
    """
    if not weights or len(weights) != len(forms):
        raise ValueError(
            f"a group needs at least one weight and a form for each, got {len(weights)} weights and {len(forms)} forms"
        )
    dtype = compute_dtype(x)
    for weight, form in zip(weights, forms, strict=True):
        check_adapter_linear(x, weight, form, dropout)
        _check_same_dtype(x, weight)
    check_strategy(strategy, backend)
    p = dropout if training else 0.0
    if backend == "reference":
        mask = None
        if p > 0.0:
            mask = eager.dropout_mask(ops.draw_dropout(_rows(x), p, "eager"), x.shape)
        p = 1.0 - ops.keep_probability(p, "eager")
        pairs = zip(weights, forms, strict=True)
        return tuple([adapter_linear_reference(x, weight, form, mask=mask, p=p) for weight, form in pairs])
    recomposed = [index for index, form in enumerate(forms) if form.U is not None]
    if recomposed:
        backend = STRATEGIES.get(strategy, backend)
        x_dropped = F.dropout(x, p) if p > 0.0 else x
        found = {index: _recomposed(x, x_dropped, weights[index], forms[index], backend) for index in recomposed}
        rest = [index for index in range(len(forms)) if index not in found]
        if rest:
            own = [weights[index] for index in rest], [forms[index] for index in rest]
            options: dict[str, Any] = {"dropout": p, "training": True, "backend": backend, "strategy": strategy}
            found |= zip(rest, adapter_linear_group(x, *own, **options), strict=True)
        return tuple([found[index] for index in range(len(forms))])
    shared_A = len(forms) > 1 and all(_same_tensor(form.A, forms[0].A) for form in forms[1:])
    workload = _workload(x, weights, forms, dtype, p > 0.0, shared_A)
    if strategy in STRATEGIES:
        check_explicit(strategy, workload, x, *weights)
    else:
        strategy = _choose(x, weights, forms, workload, p, backend, strategy == "tune")
    drop = None
    if p > 0.0:
        with torch.no_grad():
            drop = ops.draw_dropout(_rows(x), p, STRATEGIES[strategy])
    scalings: list[float] = []
    tensors: list[Tensor | None] = []
    for weight, form in zip(weights, forms, strict=True):
        scaling, out_scale = form.scaling, None
        if not isinstance(form.out_scale, Tensor):
            scaling *= form.out_scale
        elif form.out_scale is not form.base_scale:
            out_scale = form.out_scale if form.out_scale.dim() > 0 else form.out_scale.expand(weight.shape[0])
        scalings.append(scaling)
        tensors += [weight, form.A, form.B, form.mid_scale, out_scale, form.base_scale, form.bias]
    ys: tuple[Tensor, ...] = AdapterLinearFunction.apply(
        x,
        drop,
        p,
        tuple(scalings),
        tuple([form.dropout_on_base for form in forms]),
        tuple([form.base_scale is not None and form.out_scale is form.base_scale for form in forms]),
        shared_A,
        strategy,
        strategy == "recompose" and keeps_recomposed(workload),
        workload.backward,
        *tensors,
    )
    return ys


def _check_same_dtype(x: Tensor, weight: Tensor) -> None:
    # Autocast takes both to its own dtype, but leaves float64 alone.
    mixes = _autocasts(x.device.type) and torch.float64 not in (x.dtype, weight.dtype)
    if x.dtype != weight.dtype and not mixes:
        raise TypeError(
            f"weight must have x's dtype {x.dtype}, got {weight.dtype}: cast one of them or use torch.autocast"
        )


def _workload(
    x: Tensor,
    weights: Sequence[Tensor],
    forms: Sequence[AdapterForm],
    dtype: torch.dtype,
    dropout: bool,
    shared_A: bool,
) -> Workload:
    """What the cost model has to know of a call."""
    grad = torch.is_grad_enabled()
    trains_A = grad and any([form.A.requires_grad for form in forms])
    trains_base = grad and any([_requires_grad(form.base_scale) for form in forms])
    trains_up = grad and any(
        [form.B.requires_grad or _requires_grad(form.mid_scale) or _requires_grad(form.out_scale) for form in forms]
    )
    trains_bias = grad and any([_requires_grad(form.bias) for form in forms])
    wants_dx = grad and x.requires_grad
    return Workload(
        M=x.numel() // max(1, x.shape[-1]),
        K=x.shape[-1],
        outputs=tuple([weight.shape[0] for weight in weights]),
        ranks=tuple([form.A.shape[0] for form in forms]),
        dtype=str(dtype).removeprefix("torch."),
        shared_A=shared_A,
        base_scale=any([form.base_scale is not None for form in forms]),
        trains_base=trains_base,
        trains_A=trains_A,
        trains_up=trains_up,
        dropout=dropout,
        dropout_on_base=any([form.dropout_on_base for form in forms]),
        backward=wants_dx or trains_A or trains_base or trains_up or trains_bias,
        wants_dx=wants_dx,
    )


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
        key = tuner.key_of(x, weights, forms, dtype=workload.dtype, dropout=p, backward=workload.backward)
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


def _requires_grad(value: Tensor | float | None) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


def _same_tensor(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are the same memory seen alike."""
    return a is b or (
        not torch.compiler.is_compiling()
        and (a.shape, a.stride(), a.dtype, a.data_ptr()) == (b.shape, b.stride(), b.dtype, b.data_ptr())
    )


class HadamardLinearFunction(torch.autograd.Function):
    """y = ((W0 or 0) + W0 ⊙ (U V)) x + B (A x) + β, from which nothing of size [N, K] is kept, or made at once.

    Kept for the backward: x only where U, V or A trains, u = A x only where B does. Once differentiable. Algebra: with
    W = (W0 or 0) + W0 ⊙ (U V), G = dyᵀ x and q = dy B,

        dx = dy W + q A     dU = (G ⊙ W0) Vᵀ     dV = Uᵀ (G ⊙ W0)     dA = qᵀ x     dB = dyᵀ u     dβ = Σ dy
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        U: Tensor,
        V: Tensor,
        A: Tensor | None,
        B: Tensor | None,
        bias: Tensor | None,
        base: bool,
        backend: str,
    ) -> Tensor:
        _, _, needs_U, needs_V, needs_A, needs_B, _, *_ = ctx.needs_input_grad
        dtype = compute_dtype(x)
        with without_autocast(x):
            rows = cast(_rows(x), dtype)
            y, u = ops.hadamard_linear(rows, cast(weight, dtype), U, V, A, B, bias, base, needs_B, backend)
        ctx.save_for_backward(rows if needs_U or needs_V or needs_A else None, u, weight, U, V, A, B)
        ctx.x_shape, ctx.dtype, ctx.base, ctx.backend = x.shape, dtype, base, backend
        return _with_leading(y, x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        rows, u, weight, U, V, A, B = ctx.saved_tensors
        needs_x, _, needs_U, needs_V, needs_A, _, needs_bias, *_ = ctx.needs_input_grad
        with without_autocast(dy):
            wanted = needs_x, needs_U or needs_V, needs_A, needs_bias
            dx, dU, dV, dA, dB, dbias = ops.hadamard_linear_backward(
                _rows(dy), cast(weight, ctx.dtype), U, V, A, B, rows, u, ctx.base, *wanted, ctx.backend
            )
        dx = None if dx is None else dx.view(ctx.x_shape)
        return dx, None, dU if needs_U else None, dV if needs_V else None, dA, dB, dbias, None, None


def hadamard_linear(
    x: Tensor,
    weight: Tensor,
    U: Tensor,
    V: Tensor,
    *,
    A: Tensor | None = None,
    B: Tensor | None = None,
    bias: Tensor | None = None,
    base: bool = True,
    backend: str = "auto",
) -> Tensor:
    """A frozen linear layer each of whose weights is scaled by itself, and a low-rank path beside it:

        y = ((W0 or 0) + W0 ⊙ (U V)) x + B (A x) + β

    W0 ⊙ (U V) has full rank in general; it is rebuilt block by block, and never in memory as a whole, forward or
    backward. base: whether W0 x is part of y.
    Shapes: x [..., K]; weight [N, K], any strides; U [N, q]; V [q, K], q at least 1; A [r, K] and B [N, r], both or
    neither; bias [N]; y [..., N].
    Dtypes: weight has x's dtype, or autocast's takes the place of both; the others may be fp32 beside 16-bit x. In 16
    bits W0 x and (W0 ⊙ (U V)) x are two products: W0 (1 + U V) would lose a U V below half an ulp of 1.
    Gradients flow to x, U, V, A, B and bias; weight is frozen. Once differentiable.
    Raises ValueError on mismatched shapes or devices, a weight that requires grad, a backend that cannot run; TypeError
    on dtypes that cannot be mixed.
    Source: Huang et al., HiRA, ICLR 2025, section 3; Chavan et al. 2023, arXiv:2306.07967, section 3.
    """
    check_hadamard_linear(x, weight, U, V, A, B, bias)
    _check_same_dtype(x, weight)
    backend = resolve_backend(backend, x, weight)
    if backend == "reference":
        return hadamard_linear_reference(x, weight, U, V, A, B, bias, base)
    tensors = x, weight, U, V, A, B, bias
    if torch.is_grad_enabled() and any([_requires_grad(tensor) for tensor in tensors]):
        y: Tensor = HadamardLinearFunction.apply(*tensors, base, backend)
        return y
    dtype = compute_dtype(x)
    with without_autocast(x):
        rows = cast(_rows(x), dtype)
        y, _ = ops.hadamard_linear(rows, cast(weight, dtype), U, V, A, B, bias, base, False, backend)
    return y.view(*x.shape[:-1], y.shape[1])


def _recomposed(x: Tensor, x_dropped: Tensor, weight: Tensor, form: AdapterForm, backend: str) -> Tensor:
    """A form with U and V; x_dropped is x itself without dropout."""
    assert form.U is not None
    assert form.V is not None
    A, B, g = (form.A, form.B, form.base_scale) if form.A.shape[0] else (None, None, form.base_scale)
    if B is not None:
        B = B if form.mid_scale is None else B * form.mid_scale
        out_scale = form.out_scale
        B = B * (
            form.scaling * (out_scale[:, None] if isinstance(out_scale, Tensor) and out_scale.dim() else out_scale)
        )
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


class WeightNormFunction(torch.autograd.Function):
    """n_j = ‖(W0 + s·B·A)_j‖ with gradients to A and B: with c = dn / n and V = W0 + s·B·A,

    dB = s · c ⊙ (V Aᵀ) = s · c ⊙ (W0Aᵀ + s·B (A Aᵀ))     dA = s · (c ⊙ B)ᵀ V = s · ((c ⊙ B)ᵀ W0 + s·(Bᵀ(c ⊙ B)) A)
    """

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, A: Tensor, B: Tensor, base_squared: Tensor, scaling: float, backend: str
    ) -> Tensor:
        n, WA = ops.weight_norm(weight, A, B, scaling, base_squared, backend)
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(weight, A, B, n, WA)
            ctx.scaling = scaling
        return n

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dn: Tensor) -> tuple[Tensor | None, ...]:
        weight, A, B, n, WA = ctx.saved_tensors
        s = ctx.scaling
        down, up = A.to(n.dtype), B.to(n.dtype)
        with without_autocast(dn):
            weighted = torch.where(n > 0, dn / n, 0.0)[:, None]
            dB = s * weighted * (WA + s * (up @ (down @ down.T)))
            scaled_up = weighted * up
            dA = s * ((scaled_up.T.to(weight.dtype) @ weight).to(n.dtype) + s * (up.T @ scaled_up).T @ down)
        return None, dA.to(A.dtype), dB.to(B.dtype), None, None, None


def row_squares(weight: Tensor, *, backend: str = "auto") -> Tensor:
    """‖W0‖² by rows in fp32, the constant part of the DoRA norm. Shapes: weight [N, K]; result [N]."""
    backend = resolve_backend(backend, weight)
    squares: Tensor = ops.row_squares(weight, "eager" if backend == "reference" else backend)
    return squares


def weight_norm(
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    *,
    base_squared: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Row norms of W0 + s·B·A without forming B·A, in fp32 (fp64 for an fp64 weight):

        n² = ‖W0‖²_row + 2s · rowsum(B ⊙ (W0 Aᵀ)) + s² · rowsum((B (A Aᵀ)) ⊙ B)

    Shapes: weight [N, K]; lora_A [r, K]; lora_B [N, r]; base_squared [N] = row_squares(weight), a constant that a
    caller may keep; n [N]. Gradients flow to lora_A and lora_B; weight is frozen. Once differentiable.
    Raises ValueError on mismatched shapes or devices, TypeError on dtypes without a kernel.
    Source: Liu et al. 2024, arXiv:2402.09353, eq. 5 and section 4.3.
    """
    check_weight_norm(weight, lora_A, lora_B)
    backend = resolve_backend(backend, weight)
    if backend == "reference":
        return weight_norm_reference(weight, lora_A, lora_B, scaling)
    with without_autocast(weight):  # in 16 bits the norm's difference from the base weight's would be rounding
        if base_squared is None:
            base_squared = ops.row_squares(weight.detach(), backend)
        if not (torch.is_grad_enabled() and (lora_A.requires_grad or lora_B.requires_grad)):
            return ops.weight_norm(weight, lora_A, lora_B, scaling, base_squared, backend)[0]
        norm: Tensor = WeightNormFunction.apply(weight, lora_A, lora_B, base_squared, scaling, backend)
        return norm


def multi_adapter_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, batch: AdapterBatch, layer: LayerForms, *, backend: str = "auto"
) -> Tensor:
    """Many adapters in one batch: each token through the form of its own adapter, or through the base layer.

        y_t = g[a] ⊙ (W0 x_t) + h[a] ⊙ (B[k] (d[a] ⊙ (A[k] x_t))) + β[a]

    a is the adapter of token t, k its factor group: VeRA adapters of one key share a pair (A, B). Methods and ranks
    may be mixed. Base tokens are F.linear's on the same batch, bit for bit; on Triton they are within rounding of it
    where the layer has a bias and some adapter scales the base path. For inference: no gradients.
    Shapes: x [..., K], its tokens as many as the batch's, row by row; weight [N, K]; bias [N]; y [..., N].
    Raises ValueError on mismatched shapes, devices, another number of tokens, an x that requires grad, a backend that
    cannot run; TypeError on dtypes that cannot be mixed. backend: "auto", "triton" or "eager".
    """
    check_multi_adapter_linear(x, weight, bias, len(batch))
    _check_same_dtype(x, weight)
    resolved = resolve_backend(backend, x, weight)
    if resolved == "reference":
        raise ValueError('backend "reference" has no pages: call reference.multi_adapter_linear_reference with forms')
    with torch.no_grad(), without_autocast(x):
        dtype = compute_dtype(x)
        rows = cast(_rows(x), dtype)
        y = ops.multi_adapter_linear(rows, cast(weight, dtype), bias, batch, layer, resolved)
    return y.view(*x.shape[:-1], weight.shape[0])


class BottleneckFunction(torch.autograd.Function):
    """out = z + s · (U dropout(φ(D v + a)) + c), of which the backward computes the hidden again.

    Kept for the backward: v, the parameters and what makes the dropout mask. Once differentiable. With h̃ what U is
    applied to and e = s · mask ⊙ (Uᵀ dy) / (1 − p) ⊙ φ'(D v + a):

        dv = e D     dD = eᵀ v     da = Σ e     dU = s · dyᵀ h̃     dc = s · Σ dy     dz = dy

    adds_v: z is v itself; dv is then e D + dy, in one pass.
    """

    @staticmethod
    def forward(
        ctx: Any,
        v: Tensor,
        residual: Tensor | None,
        down: Tensor,
        down_bias: Tensor | None,
        up: Tensor,
        up_bias: Tensor | None,
        drop: Tensor | None,
        p: float,
        scaling: float,
        activation: str,
        groups: int,
        adds_v: bool,
        backend: str,
    ) -> Tensor:
        dtype = compute_dtype(v)
        with without_autocast(v):
            rows = cast(_rows(v), dtype)
            z = rows if adds_v else None if residual is None else _rows(residual)
            out = ops.bottleneck(rows, down, up, down_bias, up_bias, z, drop, p, scaling, activation, groups, backend)
        if any(ctx.needs_input_grad):
            needs_v, _, needs_down, needs_down_bias, needs_up, _ = ctx.needs_input_grad[:6]
            needs_rows = needs_v or needs_down or needs_down_bias or needs_up
            ctx.save_for_backward(rows if needs_rows else None, down, down_bias, up, drop)
            ctx.p, ctx.scaling, ctx.activation, ctx.groups = p, scaling, activation, groups
            ctx.v_shape, ctx.adds_v, ctx.backend = v.shape, adds_v, backend
        return _with_leading(out, v.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        rows, down, down_bias, up, drop = ctx.saved_tensors
        needs_v, needs_residual, *needs = ctx.needs_input_grad[:6]
        with without_autocast(dy):
            dv, *grads = ops.bottleneck_backward(
                _rows(dy),
                rows,
                down,
                up,
                down_bias,
                drop,
                ctx.p,
                ctx.scaling,
                ctx.activation,
                ctx.groups,
                ctx.adds_v,
                [needs_v, *needs],
                ctx.backend,
            )
        # The sums are in fp32: autograd casts them.
        return (
            None if dv is None else dv.view(ctx.v_shape),
            dy if needs_residual else None,
            *grads,
            *[None] * 7,
        )


def bottleneck(
    v: Tensor,
    down: Tensor,
    up: Tensor,
    *,
    down_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    residual: Tensor | None = None,
    scaling: float = 1.0,
    activation: str = "relu",
    groups: int = 1,
    dropout: float = 0.0,
    training: bool = False,
    backend: str = "auto",
) -> Tensor:
    """A bottleneck on a stream of tokens: out = z + s · (U dropout(φ(D v + a)) + c).

    The dropout acts on the hidden features while `training`; its mask follows torch.manual_seed and gradient
    checkpointing. With groups > 1, U is block-diagonal: the g-th slice of the hidden features feeds the g-th slice of
    the output. The residual z may be v itself, which is cheapest, another tensor, or absent.

    Shapes: v [..., K]; down D [H, K]; up U [N, H / groups]; down_bias a [H]; up_bias c [N]; residual [..., N]; out
    [..., N]. activation φ: "identity", "relu", "gelu" or "quick_gelu" (x · sigmoid(1.702 x)).
    Dtypes: the products have v's, or autocast's; the parameters may be fp32 beside it, and so may the residual, whose
    dtype is the result's.
    Gradients flow to v, the residual and all parameters. Once differentiable.
    backend: "auto", "triton" (up to 128 hidden features), "eager" or "reference".
    Raises ValueError on mismatched shapes, devices, groups, an unknown activation, a dropout outside [0, 1), a backend
    that cannot run; TypeError on dtypes that cannot be mixed.
    Source: Chen et al. 2022, arXiv:2205.13535, section 3.2; Luo et al. 2023, arXiv:2302.08106, section 3.3; Zhang et
    al. 2022, arXiv:2206.04673, section 3.
    """
    check_bottleneck(v, down, up, down_bias, up_bias, residual, activation, groups, dropout)
    dtype = compute_dtype(v)
    if residual is not None and residual.dtype not in (dtype, sum_dtype(v)):
        # Under autocast it may have the other dtype of 16 bits: the two add up in float32, as PyTorch's own would.
        if not _autocasts(v.device.type) or torch.promote_types(residual.dtype, dtype) != torch.float32:
            raise TypeError(
                f"residual must have the dtype of the products, {dtype}, or float32 beside 16 bits, got "
                f"{residual.dtype}: cast it"
            )
        residual = residual.float()
    backend = resolve_bottleneck_backend(backend, down.shape[0], v, down, up)
    p = dropout if training else 0.0
    drop = None
    if p > 0.0:
        with torch.no_grad():
            hidden = v.new_empty(()).expand(v.numel() // v.shape[-1], down.shape[0])
            drop = ops.draw_dropout(hidden, p, "eager" if backend == "reference" else backend)
    if backend == "reference":
        return bottleneck_reference(
            v,
            down,
            up,
            down_bias=down_bias,
            up_bias=up_bias,
            residual=residual,
            scaling=scaling,
            activation=activation,
            groups=groups,
            mask=None if drop is None else eager.dropout_mask(drop, torch.Size((*v.shape[:-1], down.shape[0]))),
            p=1.0 - ops.keep_probability(p, "eager"),
        )
    # Its gradient is then part of v's, and nothing has to add the two.
    adds_v = residual is v and v.dtype == dtype
    out: Tensor = BottleneckFunction.apply(
        v,
        None if adds_v else residual,
        down,
        down_bias,
        up,
        up_bias,
        drop,
        p,
        scaling,
        activation,
        groups,
        adds_v,
        backend,
    )
    return out
