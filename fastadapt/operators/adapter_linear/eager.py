"""The eager implementations: PyTorch's own products, in the cheapest association, with few passes over memory.

This is what CPUs, MPS and the strategies "library", "recompose" and "expand" run. A group is the layers that read one
x: their down-projections are one product, and so are the gradients of those, and dx is added up over them in place.
Nothing of size [tokens, out] is made beside y (and z, which the gradient of a trained base_scale needs).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..arithmetic import (
    BLOCK_ROWS,
    add_product,
    add_scaled,
    cast,
    column_dots,
    column_sums,
    factor_products,
    linear,
    product,
    row_blocks,
    scaled,
    scaled_rows,
    sum_dtype,
    thin_dtype,
)
from ..masks import dropped, zero_dropped
from .member import Grads, Group, Keep, Member, Outputs, Saved, Wants


def _parts(u: Tensor, group: Group) -> Sequence[Tensor]:
    """Each member's own columns of u."""
    count = len(group.members)
    if group.shared_A or count == 1:
        return [u] * count
    return torch.split_with_sizes(u, group.down_ranks, 1)


def _down(group: Group, dtype: torch.dtype) -> Tensor:
    """The A of the members stacked along r, in `dtype`."""
    members = group.members
    if group.shared_A or len(members) == 1:
        return cast(members[0].A, dtype)
    return torch.cat([cast(member.A, dtype) for member in members])


def _up(member: Member, dtype: torch.dtype) -> Tensor:
    """The vector part of h ⊙ B in `dtype`; the scalar part rides on the products as alpha, for nothing."""
    return cast(scaled_rows(member.B, member.vector), dtype)


def _low_rank(u: Tensor, member: Member, up: Tensor, bias: Tensor | None) -> Tensor:
    """scaling · up (d ⊙ u) + bias: [M, N] in new memory, to which the base product is then added.

    In this order, because a large product hides the reading of what it is added to, and a thin one does not.
    """
    d = member.mid_scale
    if d is not None:
        u = u * cast(d, u.dtype)
    if bias is None:
        return product(u, up.t(), member.scaling)
    return torch.addmm(cast(bias, u.dtype), u, up.t(), alpha=member.scaling)


def _base_and_low_rank(
    x: Tensor, x_dropped: Tensor, x_rest: Tensor | None, u: Tensor, member: Member, keep_base: bool
) -> tuple[Tensor, Tensor | None]:
    """(y, z) of one member; z, what its base_scale multiplies, is None unless it is to be kept. x_rest = x − x̃.

    They are in u's dtype, which may be wider than x's.
    """
    weight, g, dtype = member.weight, member.base_scale, u.dtype
    if g is None:
        if u.shape[1] == 0:
            return linear(x, weight, member.bias), None
        return add_product(_low_rank(u, member, _up(member, dtype), member.bias), x, weight.t()), None
    x_base = x_dropped if member.dropout_on_base else x
    if member.tied and dtype is torch.float16 and not keep_base:
        # The sum of both paths may be beyond fp16 before g takes it back.
        y = _low_rank(u, member, _up(member, dtype), member.bias)
        add_scaled(y, F.linear(x_base, weight), g)
        return (y if x_base is x or x_rest is None else add_product(y, x_rest, weight.t())), None
    if member.tied:
        v = add_product(_low_rank(u, member, cast(member.B, dtype), None), x_base, weight.t())
        y = scaled(v, g, member.bias, keep_base)
        if x_base is not x and x_rest is not None:
            add_product(y, x_rest, weight.t())
        return y, v if keep_base else None
    y = _low_rank(u, member, _up(member, dtype), member.bias)
    z = F.linear(x_base, weight)
    if x_base is x:
        add_scaled(y, z, g)
    else:
        add_scaled(add_product(y, x, weight.t()), z, g - 1)
    return y, z if keep_base else None


def _expanded(u: Tensor, member: Member) -> Tensor:
    """(d ⊙ u) Bᵀ: [M, N]."""
    d = member.mid_scale
    return torch.mm(u if d is None else u * cast(d, u.dtype), cast(member.B, u.dtype).t())


def _base_and_expanded(x: Tensor, expanded: Tensor, member: Member) -> Tensor:
    """y of one member from (d ⊙ u) Bᵀ."""
    y = linear(x, member.weight, member.bias)
    h = member.out_scale
    if h is None:
        return y.add_(expanded, alpha=member.scaling)
    return add_scaled(y, expanded, h if member.scaling == 1.0 else h * member.scaling)


def recomposed_weight(member: Member) -> Tensor:
    """g ⊙ W0 + diag(h) B diag(d) A in one product, for weights of 32 bits and more."""
    weight = member.weight
    down, up = cast(member.A, weight.dtype), _up(member, weight.dtype)
    if member.mid_scale is not None:  # on the smaller factor
        if weight.shape[1] < weight.shape[0]:
            down = down * cast(member.mid_scale, down.dtype)[:, None]
        else:
            up = up * cast(member.mid_scale, up.dtype)
    base = weight if member.base_scale is None else weight * cast(member.base_scale, weight.dtype)[:, None]
    return torch.addmm(base, up, down, alpha=member.scaling)


def adapter_linear(x: Tensor, group: Group, u: Tensor | None, keep: Keep, strategy: str) -> Outputs:
    """y of each member and what is to be kept; a given u is not computed again."""
    members, dropout, _ = group
    drop = dropout.drop
    x_dropped = x if drop is None else dropped(x, drop, 1.0 / dropout.keep)
    dtype, thin = x.dtype, thin_dtype(x.shape[0], x.dtype, x.is_cpu)
    made = None
    if u is None and (keep.u or strategy != "recompose"):
        u = made = F.linear(x_dropped if thin is dtype else x_dropped.to(thin), _down(group, thin))
    kept = made if keep.u else None
    if strategy == "recompose":
        weights = [recomposed_weight(member) for member in members]
        ys = [linear(x, weight, member.bias) for member, weight in zip(members, weights, strict=True)]
        return Outputs(ys, kept, [], weights if keep.made else [])
    assert u is not None
    if u.dtype is not thin:
        u = u.to(thin)
    if strategy == "expand":
        expanded = [_expanded(part, member) for member, part in zip(members, _parts(u, group), strict=True)]
        ys = [_base_and_expanded(x, low, member) for member, low in zip(members, expanded, strict=True)]
        return Outputs(ys, kept, [], expanded if keep.made else [])
    rests = x_dropped is not x and any([member.tied and member.dropout_on_base for member in members])
    x_rest = x - x_dropped if rests else None
    ys, zs = [], []
    for member, part in zip(members, _parts(u, group), strict=True):
        y, z = _base_and_low_rank(x, x_dropped, x_rest, part, member, keep.base)
        ys.append(y)
        zs.append(z)
    if thin is not dtype:
        kept = None if kept is None else kept.to(dtype)
        ys, zs = [y.to(dtype) for y in ys], [None if z is None else z.to(dtype) for z in zs]
    return Outputs(ys, kept, zs if keep.base else [], [])


def _add_base_grad(dx: Tensor, dy: Tensor, weight: Tensor, scale: Tensor | None) -> None:
    """dx += (scale ⊙ dy) W0, with the scale on whichever is smaller; a scaled dy is made in blocks of rows."""
    if dx.dtype is not weight.dtype:
        dx.add_(torch.mm(cast(dy if scale is None else dy * scale, weight.dtype), weight))
    elif scale is None:
        dx.addmm_(dy, weight)
    elif dy.shape[0] <= BLOCK_ROWS:
        dx.addmm_(cast(dy * scale, dy.dtype), weight)
    elif 2 * weight.shape[1] < dy.shape[0] and scale.dtype == weight.dtype:
        dx.addmm_(dy, weight * scale[:, None])
    else:
        for rows in row_blocks(*dy.shape):
            dx[rows].addmm_(cast(dy[rows] * scale, dy.dtype), weight)


def _down_grads(dys: Sequence[Tensor], members: Sequence[Member], factor: float) -> Tensor:
    """d ⊙ q = d ⊙ (h ⊙ dy) B of all members, stacked: [M, ΣR]; times a factor."""
    first = dys[0]
    if len(members) == 1:
        member = members[0]
        stacked = product(first, _up(member, first.dtype), member.scaling * factor)
        return stacked if member.mid_scale is None else stacked.mul_(cast(member.mid_scale, stacked.dtype))
    ranks = [member.A.shape[0] for member in members]
    stacked = torch.empty(first.shape[0], sum(ranks), dtype=first.dtype, device=first.device)
    for dy, member, part in zip(dys, members, torch.split_with_sizes(stacked, ranks, 1), strict=True):
        product(dy, _up(member, dy.dtype), member.scaling * factor, out=part)
        if member.mid_scale is not None:
            part.mul_(cast(member.mid_scale, part.dtype))
    return stacked


def _input_grad(dys: Sequence[Tensor], group: Group, dq: Tensor) -> Tensor:
    """dx; dq and what the mask hits besides it are multiplied by 1 / keep before the mask, where they are small."""
    members, (drop, _), shared_A = group
    if shared_A and len(members) > 1:
        dq = dq.unflatten(1, (len(members), dq.shape[1] // len(members))).sum(1)
    dx = torch.mm(dq, _down(group, dq.dtype))
    if drop is not None:
        for dy, member in zip(dys, members, strict=True):
            if member.dropout_on_base and member.base_scale is not None:
                _add_base_grad(dx, dy, member.weight, (member.base_scale - 1) / group.dropout.keep)
        zero_dropped(dx, drop)
    for dy, member in zip(dys, members, strict=True):
        on_base = drop is not None and member.dropout_on_base
        _add_base_grad(dx, dy, member.weight, None if on_base else member.base_scale)
    return dx


def _recomposed_input_grad(dys: Sequence[Tensor], members: Sequence[Member], weights: Sequence[Tensor]) -> Tensor:
    """dx = Σ dy W, the weights kept or made again."""
    first, *others = zip(dys, weights or [recomposed_weight(member) for member in members], strict=True)
    dx = first[0] @ first[1]
    for dy, weight in others:
        dx.addmm_(dy, weight)
    return dx


def _down_factor_grads(dq: Tensor, x: Tensor, group: Group) -> list[Tensor]:
    """dA = (d ⊙ q)ᵀ x̃ of each member, from the stacked d ⊙ q."""
    drop = group.dropout.drop
    x = x if drop is None else dropped(x, drop, 1.0)
    dA = cast(torch.mm(dq.t(), x if x.dtype is dq.dtype else x.to(dq.dtype)), sum_dtype(x))
    if len(group.members) == 1:
        return [dA]
    return list(dA.split([member.A.shape[0] for member in group.members]))


def adapter_linear_backward(dys: Sequence[Tensor], group: Group, saved: Saved, wants: Wants, strategy: str) -> Grads:
    """dx and dβ where wanted, and of each member dA given x, P given u (see Grads), dg given its z."""
    members, dropout, _ = group
    x, u, z, made = saved
    if strategy == "expand":
        return _expanded_backward(dys, group, saved, wants)
    dtype, thin = dys[0].dtype, thin_dtype(dys[0].shape[0], dys[0].dtype, dys[0].is_cpu)
    if thin is not dtype:
        dys, u = [dy.to(thin) for dy in dys], None if u is None else u.to(thin)
    given = dys
    if dropout.drop is None and dys[0].shape[0] <= BLOCK_ROWS:
        dys, members = zip(*map(_with_scaled_grad, dys, members), strict=True)
        group = group._replace(members=members)
    dx = dq = None
    if x is not None or (wants.x and strategy == "library"):
        dq = _down_grads(dys, members, 1.0 / dropout.keep)
        if wants.x and strategy == "library":
            dx = _input_grad(dys, group, dq)
            dx = dx if thin is dtype else dx.to(dtype)
    if wants.x and dx is None:
        dx = _recomposed_input_grad(dys, members, made)
    P = []
    if u is not None:
        for dy, member, part in zip(dys, members, _parts(u, group), strict=True):
            own = factor_products(dy, part, member.scaling)
            P.append(scaled_rows(own, member.vector) if member.tied else own)
    return Grads(
        dx,
        [] if x is None or dq is None else _down_factor_grads(dq, x, group),
        P,
        [column_sums(dy) for dy in given] if wants.bias else [],
        [None if kept is None else column_dots(dy, kept) for dy, kept in zip(given, z, strict=True)] if z else [],
        [],
        [],
    )


def _expanded_backward(dys: Sequence[Tensor], group: Group, saved: Saved, wants: Wants) -> Grads:
    """The gradients where (d ⊙ u) Bᵀ was kept: dh = Σ dy ⊙ that, and dd = Σ q ⊙ u with the q that dx takes anyway."""
    members, keep = group.members, group.dropout.keep
    u = saved.u
    assert u is not None
    douts, dmids, parts = [], [], []
    for dy, member, part, expanded in zip(dys, members, _parts(u, group), saved.made, strict=True):
        h, d, s = member.out_scale, member.mid_scale, member.scaling
        douts.append(column_dots(dy, expanded).mul_(s))
        q = product(dy if h is None else cast(dy * h, dy.dtype), cast(member.B, dy.dtype), s)
        dmids.append(column_dots(q, part))
        q = q if d is None else q.mul_(cast(d, q.dtype))
        parts.append(q if keep == 1.0 else q.div_(keep))
    dx = None
    if wants.x:
        dx = _input_grad(dys, group, parts[0] if len(parts) == 1 else torch.cat(parts, 1))
    return Grads(dx, [], [], [column_sums(dy) for dy in dys] if wants.bias else [], [], dmids, douts)


def _with_scaled_grad(dy: Tensor, member: Member) -> tuple[Tensor, Member]:
    """g ⊙ dy and the member without its g, where that scales both paths: one product that spares B's and P's."""
    g = member.base_scale
    if g is None or not member.tied or g.dtype != dy.dtype:
        return dy, member
    return dy * g, member._replace(base_scale=None, tied=False)
