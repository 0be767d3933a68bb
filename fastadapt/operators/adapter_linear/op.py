"""`fastadapt::adapter_linear` and its backward, for a group of layers that read one x."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..arithmetic import factor_grads, scaled_rows, sum_dtype
from ..backends import kernels
from ..registry import operator
from . import eager
from .member import Grads, Group, Keep, Member, Outputs, Saved, Wants
from .strategies import STRATEGIES


def _outline(x: Tensor, group: Group, u: Tensor | None, keep: Keep, strategy: str) -> Any:
    m, dtype, members = x.shape[0], x.dtype, group.members
    ys = [(m, member.weight.shape[0], dtype) for member in members]
    made = (m, sum(group.down_ranks), dtype) if keep.u and u is None else None
    z = [None if member.base_scale is None else y for y, member in zip(ys, members, strict=True)]
    own = ys if strategy == "expand" else [(*member.weight.shape, dtype) for member in members]
    return Outputs._make((ys, made, z if keep.base else [], own if keep.made else []))


@operator(_outline)
def adapter_linear(x: Tensor, group: Group, u: Tensor | None, keep: Keep, strategy: str) -> Outputs:
    """y of each member and what is to be kept: see Outputs. "recompose" and "expand" make something, and no z."""
    if STRATEGIES[strategy] == "eager":
        return eager.adapter_linear(x, group, u, keep, strategy)
    ys, made, zs = kernels("adapter_linear").adapter_linear(
        x, _untied(group.members), u=u, keep_base=keep.base, strategy=strategy, **_options(group)
    )
    return Outputs(ys, made if keep.u and u is None else None, zs if keep.base else [], [])


def _backward_outline(dy: Sequence[Tensor], group: Group, saved: Saved, wants: Wants, strategy: str) -> Any:
    members, k, dtype = group.members, group.members[0].weight.shape[1], sum_dtype(dy[0])
    dx = (dy[0].shape[0], k, dy[0].dtype) if wants.x else None
    dA = [] if saved.x is None else [(member.A.shape[0], k, dtype) for member in members]
    expanded = strategy == "expand"
    P = [] if saved.u is None or expanded else [(*member.B.shape, dtype) for member in members]
    dbias = [(len(member.weight), dtype) for member in members] if wants.bias else []
    dbase = [None if z is None else (z.shape[1], dtype) for z in saved.z]
    dmid = [(member.A.shape[0], dtype) for member in members] if expanded else []
    dout = [(len(member.weight), dtype) for member in members] if expanded else []
    return Grads._make((dx, dA, P, dbias, dbase, dmid, dout))


@operator(_backward_outline)
def adapter_linear_backward(dy: Sequence[Tensor], group: Group, saved: Saved, wants: Wants, strategy: str) -> Grads:
    """dx and dβ where wanted, dA where x is saved, P where u is, dg of the members whose z is."""
    if STRATEGIES[strategy] == "eager":
        return eager.adapter_linear_backward(dy, group, saved, wants, strategy)
    found = kernels("adapter_linear").adapter_linear_backward(
        dy,
        _untied(group.members),
        x=saved.x,
        u=saved.u,
        zs=saved.z or [None] * len(dy),
        want_dx=wants.x,
        want_bias=wants.bias,
        **_options(group),
    )
    P = found.P or []
    dbase = found.dbase if saved.z else []
    for index, member in enumerate(group.members):
        if member.tied and P:
            if dbase and dbase[index] is not None:
                *_, dh = factor_grads(P[index], member.B, member.mid_scale, None, False, False, True)
                # The kernels' z is W0 x alone: what h's part adds to g's gradient is in P.
                dbase[index] = dbase[index] + dh
            P[index] = scaled_rows(P[index], member.vector)
    return Grads(found.dx, found.dA or [], P, found.dbias or [], dbase, [], [])


def _untied(members: Sequence[Member]) -> list[Member]:
    """The members with h beside g, as the kernels take them."""
    return [member._replace(out_scale=member.vector) if member.tied else member for member in members]


def _options(group: Group) -> dict[str, Any]:
    return {"seed": group.dropout.drop, "p": group.dropout.p, "shared_A": group.shared_A}
