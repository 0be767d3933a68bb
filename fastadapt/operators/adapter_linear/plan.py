"""What a call of adapter_linear settles before it touches a number: checks, what is kept, strategy; once an outline.

A layer's step is called a million times with tensors of the same shapes. All that the checks, the needs and the choice
of a strategy depend on is the call's outline: shapes, dtypes, devices and requires_grad of its tensors, and its modes.
A plan is made of an outline and kept under it. It knows no tensor and no value but the scalars that are part of the
outline, so that it cannot be stale: whatever would change it is another outline.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...reference import AdapterForm
from ..arithmetic import cast, thin_dtype
from ..calls import autocast_dtype, check_same_dtype, compute_dtype, requires_grad
from ..masks import Dropout
from ..registry import sees_operators
from . import eager, op, tuner
from .checks import check_adapter_linear
from .cost import keeps_made
from .member import Grads, Group, Keep, Member, Needs, Outputs
from .plain import PlainCall
from .strategies import STRATEGIES, candidates, cheapest, check_explicit, check_strategy
from .workload import Workload, shares_A, workload_of

# Plans are small; a process with more outlines than this starts anew.
_MOST = 4096
_plans: dict[Any, Plan] = {}

# One run of a strategy, to be timed: of x, weights, forms, p and the strategy's name.
Trial = Callable[[Tensor, Sequence[Tensor], Sequence[AdapterForm], float, str], Callable[[], object]]

# How many fields of a Member are tensors: autograd has to see these one by one.
TENSORS = 7


class Plan(NamedTuple):
    """How a group runs.

    strategy: of strategies.py, or "reference", or "recomposed" where a form has U and V; measured: whether a
    measurement chose it. values: the plain values of each member. dtype: of the products; casts: whether a base weight
    has another one; autocast: whether that is on, and has to be left. trains: whether a backward can follow. plain:
    where all members are LoRA by itself. forward, backward: the operator, or what runs it where nobody watches.
    """

    strategy: str
    measured: bool
    values: tuple[tuple[Any, ...], ...]
    p: float
    shared_A: bool
    dtype: torch.dtype
    casts: bool
    autocast: bool
    needs: Needs
    keep: Keep
    trains: bool
    plain: PlainCall | None
    forward: Callable[..., Outputs]
    backward: Callable[..., Grads]

    def group(self, tensors: Sequence[Any], drop: Tensor | None) -> Group:
        """The group of these tensors in a flat list, base weights cast to the dtype of the products."""
        starts = range(0, len(tensors), TENSORS)
        members = [Member(*tensors[i : i + TENSORS], *values) for i, values in zip(starts, self.values, strict=True)]
        if self.casts:
            members = [member._replace(weight=cast(member.weight, self.dtype)) for member in members]
        # p as it was read with the plan: a number of a module's that is first read in here, inside a Function, is known
        # to that Function's graph alone where dynamic=True makes numbers symbols.
        return Group(members, Dropout(drop, self.p), self.shared_A)


def forget() -> None:
    """Drops all plans."""
    _plans.clear()


def plan_of(
    x: Tensor,
    weights: Sequence[Tensor],
    forms: Sequence[AdapterForm],
    dropout: float,
    training: bool,
    backend: str,
    strategy: str,
    trial: Trial,
) -> Plan:
    """The plan of a call; made now unless one of this outline is kept. Raises what `adapter_linear_group` raises."""
    if sees_operators(x):  # sizes may be symbols there, which nothing can be kept under
        return _made(x, weights, forms, dropout, training, backend, strategy, trial)
    key = (
        _rows(x),
        x.shape[-1:],
        x.dtype,
        x.device,
        x.requires_grad,
        torch.is_grad_enabled(),
        autocast_dtype(x),
        dropout,
        training,
        backend,
        strategy,
        # What was measured decides on a GPU.
        None if x.is_cpu and strategy != "tune" else tuner.revision(),
        len(forms) > 1 and shares_A(forms),
        *map(_outline, weights, forms),
    )
    plan = _plans.get(key)
    if plan is None:
        plan = _made(x, weights, forms, dropout, training, backend, strategy, trial)
        # A scalar is part of the outline, a tensor's value is not; what "tune" cannot measure now it may measure later.
        values_told = not any([isinstance(form.scaling, Tensor) for form in forms])
        if values_told and (strategy != "tune" or plan.measured):
            if len(_plans) >= _MOST:
                forget()
            _plans[key] = plan
    return plan


def _outline(weight: Tensor, form: AdapterForm) -> tuple[Any, ...]:
    """What a plan depends on of a member."""
    A, B, d, h, g, bias, on_base, scaling, U, V = form
    return (
        (weight.shape, weight.dtype, weight.device, weight.requires_grad),
        (A.shape, A.dtype, A.device, A.requires_grad),
        (B.shape, B.dtype, B.device, B.requires_grad),
        None if d is None else (d.shape, d.dtype, d.device, d.requires_grad),
        (h.shape, h.dtype, h.device, h.requires_grad, h is g) if isinstance(h, Tensor) else h,
        None if g is None else (g.shape, g.dtype, g.device, g.requires_grad),
        None if bias is None else (bias.shape, bias.dtype, bias.device, bias.requires_grad),
        on_base,
        scaling,
        None if U is None else (U.shape, U.dtype, U.device, U.requires_grad),
        None if V is None else (V.shape, V.dtype, V.device, V.requires_grad),
    )


def _rows(x: Tensor) -> int:
    """M of x [..., K], rounded up to five binary digits: nothing in a plan hangs on more."""
    rows = x.numel() // (x.shape[-1] or 1) if x.dim() else 1
    if rows < 32:
        return rows
    step = rows.bit_length() - 5
    return -(-rows >> step) << step


def _made(
    x: Tensor,
    weights: Sequence[Tensor],
    forms: Sequence[AdapterForm],
    dropout: float,
    training: bool,
    backend: str,
    strategy: str,
    trial: Trial,
) -> Plan:
    for weight, form in zip(weights, forms, strict=True):
        check_adapter_linear(x, weight, form, dropout)
        check_same_dtype(x, weight)
    check_strategy(strategy, backend)
    p = dropout if training else 0.0
    dtype = compute_dtype(x)
    workload = workload_of(x, weights, forms, dtype, p > 0.0)
    if not sees_operators(x):
        workload = workload._replace(M=_rows(x))
    chosen, measured = _chosen(x, weights, forms, workload, p, backend, strategy, trial)
    grad = torch.is_grad_enabled()
    needed = [grad and requires_grad(tensor) for form in forms for tensor in (None, *form_tensors(form))]
    needs = Needs(workload.wants_dx, *[True in needed[kind::TENSORS] for kind in range(1, TENSORS)])
    values = tuple([_values(form) for form in forms])
    # The kernels have a tied g's gradient from u as well.
    through_u = STRATEGIES.get(chosen) == "triton" and any([tied for *_, tied in values])
    keeps_u = needs.B or needs.mid_scale or needs.out_scale or (needs.base_scale and through_u)
    # A recomposed weight is kept by a rule of sizes, which compiled code does not compare.
    by_rule = chosen == "expand" or not torch.compiler.is_compiling()
    autocast = autocast_dtype(x) is not None
    plain = None
    alone = chosen == "library" and p == 0.0 and not workload.shared_A and all([_is_plain(form) for form in forms])
    if alone and not sees_operators(x):
        scalings = tuple([scaling for scaling, *_ in values])
        tensors = [tensor for form in forms for tensor in (form.A, form.B, form.bias) if tensor is not None]
        thin = thin_dtype(workload.M, dtype, x.is_cpu)
        casts = any([weight.dtype != dtype for weight in weights]) or any([tensor.dtype != thin for tensor in tensors])
        trains = needs.A, needs.B, workload.backward
        plain = PlainCall(scalings, workload.ranks, *trains, dtype, thin, casts, autocast)
    forward: Callable[..., Outputs] = op.adapter_linear
    backward: Callable[..., Grads] = op.adapter_linear_backward
    if not sees_operators(x):
        here = STRATEGIES.get(chosen) == "eager"
        forward = eager.adapter_linear if here else op.adapter_linear.run
        backward = eager.adapter_linear_backward if here else op.adapter_linear_backward.run
    return Plan(
        strategy=chosen,
        measured=measured,
        values=values,
        p=p,
        shared_A=workload.shared_A,
        dtype=dtype,
        casts=any([weight.dtype != dtype for weight in weights]),
        autocast=autocast,
        needs=needs,
        keep=Keep(keeps_u, needs.base_scale, by_rule and keeps_made(chosen, workload)),
        trains=workload.backward,
        plain=plain,
        forward=forward,
        backward=backward,
    )


def _chosen(
    x: Tensor,
    weights: Sequence[Tensor],
    forms: Sequence[AdapterForm],
    workload: Workload,
    p: float,
    backend: str,
    strategy: str,
    trial: Trial,
) -> tuple[str, bool]:
    """The strategy that was asked for or measured to be the fastest here, else the cost model's; if it was measured."""
    if backend == "reference":
        return "reference", False
    if any([form.U is not None for form in forms]):
        return "recomposed", False
    if strategy in STRATEGIES:
        check_explicit(strategy, workload, x, *weights)
        return strategy, False
    names = candidates(workload, backend, x, *weights)
    tune = strategy == "tune"
    if len(names) > 1 and (tune or x.device.type == "cuda") and not torch.compiler.is_compiling():
        key = tuner.Key.of(workload, x.device)
        measured = tuner.lookup(key)
        if measured is None and tune:
            measured = tuner.best(key, lambda: {name: trial(x, weights, forms, p, name) for name in names})
        if measured in names:
            return measured, True
    return cheapest(names, workload, x.device), False


def _is_plain(form: AdapterForm) -> bool:
    """Whether a form is LoRA by itself, of a rank above 0."""
    scaled = form.mid_scale is not None or form.base_scale is not None or isinstance(form.out_scale, Tensor)
    return not scaled and form.A.shape[0] > 0


def form_tensors(form: AdapterForm) -> tuple[Any, ...]:
    """The tensors of a form in the order of a Member's, behind the weight; a tied h is left to g."""
    h: Any = form.out_scale
    if h is form.base_scale or not isinstance(h, Tensor):
        h = None
    elif h.dim() == 0:
        h = h.expand(form.B.shape[0])
    return form.A, form.B, form.mid_scale, h, form.base_scale, form.bias


def _values(form: AdapterForm) -> tuple[Any, ...]:
    """The plain values of a Member: (scaling, dropout_on_base, tied)."""
    tied = form.base_scale is not None and form.out_scale is form.base_scale
    return form.settled(form.B.shape[0])[0], form.dropout_on_base, tied
