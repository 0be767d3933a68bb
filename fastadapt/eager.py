"""The eager implementations: PyTorch's own products, in the cheapest association, with few passes over memory.

This is what CPUs, MPS and the strategies "library" and "recompose" run. A group is the layers that read one x: their
down-projections are one product, and so are the gradients of those, and dx is accumulated over all of them in place.
Nothing of size [tokens, out] is made beside y (and z, which the gradient of a trained base_scale needs).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Elementwise passes over [M, N] run in blocks of rows: that bounds their temporaries, in 16 bit also the fp32 ones that
# PyTorch makes when it multiplies by an fp32 scale.
_BLOCK_ELEMENTS = 1 << 20
# Products of fewer rows than this lose time to reading the weight again.
_BLOCK_ROWS = 512

# Rows whose fp32 copy stays in the cache.
_SUMMED_ROWS = 256

_DROPOUT_LEVELS = 1 << 16

# The p up to which positions, 4·p bytes an element, take no more memory than a mask of one byte.
_POSITIONS_UP_TO = 0.25


class Member(NamedTuple):
    """One linear layer of a group and the adapter form on it, h = scaling · out_scale.

    Where out_scale is base_scale itself, that multiplies the sum of both paths, and z is that sum.
    Shapes: weight [N, K]; A [R, K]; B [N, R]; mid_scale [R]; out_scale, base_scale and bias [N].
    """

    weight: Tensor
    A: Tensor
    B: Tensor
    mid_scale: Tensor | None
    out_scale: Tensor | None
    scaling: float
    base_scale: Tensor | None
    bias: Tensor | None
    dropout_on_base: bool


def keep_probability(p: float) -> float:
    """The probability that an element is kept: 1 − p, or what the threshold of the random integers makes of it."""
    return 1.0 - p if p <= _POSITIONS_UP_TO else 1.0 - round(p * _DROPOUT_LEVELS) / _DROPOUT_LEVELS


def draw_dropout(x: Tensor, p: float) -> Tensor:
    """What makes the dropout mask of x [M, K], from PyTorch's generator: positions of dropped elements, or a mask.

    On a CPU a small p takes the positions, from the geometric gaps between them: their number is what drawing and
    applying costs, a fifth of a mask's time at p = 0.05.
    """
    if torch.compiler.is_compiling():  # neither the count of positions nor the view of a draw can be traced
        return torch.rand(x.shape, device=x.device) >= 1.0 - keep_probability(p)
    if x.device.type == "cpu" and p <= _POSITIONS_UP_TO:
        return _draw_positions(x.numel(), p)
    # Four 16-bit integers from each 64-bit draw compared with a threshold: a fifth of the time of `bernoulli_`.
    count = x.numel()
    words = torch.empty((count + 3) // 4, dtype=torch.int64, device=x.device).random_(
        torch.iinfo(torch.int64).min, None
    )
    threshold = round(p * _DROPOUT_LEVELS) - _DROPOUT_LEVELS // 2
    return (words.view(torch.int16)[:count] >= threshold).view(x.shape)


def _draw_positions(count: int, p: float) -> Tensor:
    """Which of `count` elements independent draws of probability p would take, in order; int32 where that suffices."""
    expected = count * p
    size = int(expected + 8 * math.sqrt(expected) + 16)  # eight standard deviations: the loop below ends at once
    drawn, end = [], -1
    while end < count:
        gaps = torch.rand(size).neg_().log1p_().mul_(1.0 / math.log1p(-p)).floor_().to(torch.int64).add_(1)
        drawn.append(gaps.cumsum_(0).add_(end))
        end = int(drawn[-1][-1])
    positions = torch.cat(drawn) if len(drawn) > 1 else drawn[0]
    inside = positions[: int(torch.searchsorted(positions, count))]
    return inside.to(torch.int32 if count < 1 << 31 else torch.int64, copy=True)


def dropout_mask(drop: Tensor, shape: torch.Size) -> Tensor:
    """The mask, true where an element is kept, that `drop` stands for."""
    return zero_dropped(torch.ones(shape, dtype=torch.bool, device=drop.device), drop)


def zero_dropped(x: Tensor, drop: Tensor) -> Tensor:
    """Sets the dropped elements of a contiguous x to zero, in place."""
    if drop.dtype == torch.bool:
        return x.mul_(drop.view(x.shape))  # a mask is drawn for rows
    x.view(-1).index_fill_(0, drop.long(), 0)
    return x


def _dropped(x: Tensor, drop: Tensor, factor: float) -> Tensor:
    """mask ⊙ x · factor, in new memory."""
    return zero_dropped(torch.mul(x, factor, out=torch.empty(x.shape, dtype=x.dtype, device=x.device)), drop)


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """tensor.to(dtype), sooner where there is nothing to do: a layer's step asks for a dozen such casts."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def sum_dtype(x: Tensor) -> torch.dtype:
    """The dtype of sums over tokens or features of x."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def down_ranks(members: Sequence[Member], shared_A: bool) -> list[int]:
    """The ranks that are stacked in u [M, ΣR]: the members' own, or one for all where they share A."""
    return [member.A.shape[0] for member in (members[:1] if shared_A else members)]


def _parts(u: Tensor, members: Sequence[Member], shared_A: bool) -> Sequence[Tensor]:
    """Each member's own columns of u."""
    if shared_A or len(members) == 1:
        return [u] * len(members)
    parts: Sequence[Tensor] = u.split(down_ranks(members, shared_A), dim=1)
    return parts


def _row_blocks(rows: int, columns: int) -> Iterator[slice]:
    size = max(_BLOCK_ROWS, _BLOCK_ELEMENTS // max(1, columns))
    for start in range(0, rows, size):
        yield slice(start, min(start + size, rows))


def _down(members: Sequence[Member], shared_A: bool, dtype: torch.dtype) -> Tensor:
    """The A of the members stacked along r, in `dtype`."""
    if shared_A or len(members) == 1:
        return cast(members[0].A, dtype)
    return torch.cat([cast(member.A, dtype) for member in members])


def _up(member: Member, dtype: torch.dtype) -> Tensor:
    """out_scale ⊙ B in `dtype`; the scalar part of h rides on the products as alpha, for nothing."""
    return cast(member.B if member.out_scale is None else member.B * member.out_scale[:, None], dtype)


def product(a: Tensor, b: Tensor, alpha: float, out: Tensor | None = None) -> Tensor:
    """alpha · a b. A scalar factor on a tensor would be an operator more, and a small one takes as long as its call."""
    if alpha == 1.0:
        return torch.mm(a, b, out=out)
    return torch.addmm(_ignored(a.dtype, a.device), a, b, beta=0.0, alpha=alpha, out=out)


@functools.cache
def _ignored(dtype: torch.dtype, device: torch.device) -> Tensor:
    """What addmm does not read when beta is 0."""
    return torch.zeros(1, dtype=dtype, device=device)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight, None if bias is None else cast(bias, x.dtype))


def _low_rank(u: Tensor, member: Member, up: Tensor, bias: Tensor | None) -> Tensor:
    """scaling · up (d ⊙ u) + bias: [M, N] in new memory, to which the base product is then added.

    In this order, because a large product hides the reading of what it is added to, and a thin one does not.
    """
    t = u if member.mid_scale is None else u * cast(member.mid_scale, u.dtype)
    if bias is None:
        return product(t, up.T, member.scaling)
    return torch.addmm(cast(bias, u.dtype), t, up.T, alpha=member.scaling)


def add_scaled(y: Tensor, z: Tensor, scale: Tensor) -> Tensor:
    """y + scale ⊙ z, in place. Shapes: y and z [M, N]; scale [N]."""
    if scale.dtype == y.dtype:
        return y.addcmul_(z, scale)
    for rows in _row_blocks(*y.shape):
        y[rows].add_(z[rows] * scale)
    return y


def scaled(v: Tensor, scale: Tensor, bias: Tensor | None, keep: bool) -> Tensor:
    """scale ⊙ v + bias; in v's memory unless v is to be kept. Shapes: v [M, N]; scale and bias [N]."""
    y = torch.empty_like(v) if keep else v
    if scale.dtype == v.dtype:
        return torch.mul(v, scale, out=y) if bias is None else torch.addcmul(cast(bias, v.dtype), v, scale, out=y)
    for rows in _row_blocks(*v.shape):
        block = v[rows] * scale
        y[rows] = block if bias is None else block.add_(bias)
    return y


def _base_and_low_rank(
    x: Tensor, x_dropped: Tensor | None, x_rest: Tensor | None, u: Tensor, member: Member, keep_base: bool
) -> tuple[Tensor, Tensor | None]:
    """(y, z) of one member; z, what its base_scale multiplies, is None unless it is to be kept. x_rest = x − x̃."""
    weight, g, dtype = member.weight, member.base_scale, x.dtype
    if u.shape[1] == 0 and g is None:
        return linear(x, weight, member.bias), None
    x_base = x_dropped if member.dropout_on_base and x_dropped is not None and g is not None else x
    if g is not None and member.out_scale is g:
        v = _low_rank(u, member, cast(member.B, dtype), None).addmm_(x_base, weight.T)
        y = scaled(v, g, member.bias, keep_base)
        if x_base is not x and x_rest is not None:
            y.addmm_(x_rest, weight.T)
        return y, v if keep_base else None
    y = _low_rank(u, member, _up(member, dtype), member.bias)
    if g is None:
        return y.addmm_(x, weight.T), None
    z = F.linear(x_base, weight)
    if x_base is x:
        add_scaled(y, z, g)
    else:
        add_scaled(y.addmm_(x, weight.T), z, g - 1)
    return y, z if keep_base else None


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


def adapter_linear(
    x: Tensor,
    members: Sequence[Member],
    u: Tensor | None,
    drop: Tensor | None,
    p: float,
    shared_A: bool,
    keep_u: bool,
    keep_base: bool,
    keep_weight: bool,
    strategy: str,
) -> list[Tensor]:
    """y of each member; then u where it is to be kept and was not given, z of each member with a base_scale where
    keep_base, the recomposed weights where keep_weight."""
    x_dropped = None if drop is None else _dropped(x, drop, 1.0 / keep_probability(p))
    given = u is not None
    if u is None and (keep_u or strategy == "library"):
        u = F.linear(x if x_dropped is None else x_dropped, _down(members, shared_A, x.dtype))
    kept = [u] if u is not None and keep_u and not given else []
    if strategy == "recompose":
        weights = [recomposed_weight(member) for member in members]
        ys = [linear(x, weight, member.bias) for member, weight in zip(members, weights, strict=True)]
        return ys + kept + (weights if keep_weight else [])
    assert u is not None
    tied = any([member.dropout_on_base and member.out_scale is member.base_scale is not None for member in members])
    x_rest = x - x_dropped if tied and x_dropped is not None else None
    pairs = [
        _base_and_low_rank(x, x_dropped, x_rest, part, member, keep_base)
        for member, part in zip(members, _parts(u, members, shared_A), strict=True)
    ]
    return [y for y, _ in pairs] + kept + [z for _, z in pairs if z is not None]


def _add_base_grad(dx: Tensor, dy: Tensor, weight: Tensor, scale: Tensor | None) -> None:
    """dx += (scale ⊙ dy) W0, with the scale on whichever is smaller; a scaled dy is made in blocks of rows."""
    if scale is None:
        dx.addmm_(dy, weight)
    elif 2 * weight.shape[1] < dy.shape[0] and scale.dtype == weight.dtype:
        dx.addmm_(dy, weight * scale[:, None])
    else:
        for rows in _row_blocks(*dy.shape):
            dx[rows].addmm_(cast(dy[rows] * scale, dy.dtype), weight)


def _down_grads(dys: Sequence[Tensor], members: Sequence[Member], factor: float) -> Tensor:
    """d ⊙ q = d ⊙ (h ⊙ dy) B of all members, stacked: [M, ΣR]; times a factor."""
    first = dys[0]
    if len(members) == 1:
        parts = [product(first, _up(members[0], first.dtype), members[0].scaling * factor)]
        stacked = parts[0]
    else:
        ranks = [member.A.shape[0] for member in members]
        stacked = torch.empty(first.shape[0], sum(ranks), dtype=first.dtype, device=first.device)
        parts = list(stacked.split(ranks, dim=1))
        for dy, member, part in zip(dys, members, parts, strict=True):
            product(dy, _up(member, dy.dtype), member.scaling * factor, out=part)
    for member, part in zip(members, parts, strict=True):
        if member.mid_scale is not None:
            part.mul_(cast(member.mid_scale, part.dtype))
    return stacked


def _input_grad(
    dys: Sequence[Tensor],
    members: Sequence[Member],
    dq: Tensor,
    drop: Tensor | None,
    keep: float,
    shared_A: bool,
) -> Tensor:
    """dx; dq and what the mask hits besides it are multiplied by 1 / keep before the mask, where they are small."""
    if shared_A and len(members) > 1:
        dq = dq.view(dq.shape[0], len(members), -1).sum(1)
    dx = dq @ _down(members, shared_A, dq.dtype)
    if drop is not None:
        for dy, member in zip(dys, members, strict=True):
            if member.dropout_on_base and member.base_scale is not None:
                _add_base_grad(dx, dy, member.weight, (member.base_scale - 1) / keep)
        zero_dropped(dx, drop)
    for dy, member in zip(dys, members, strict=True):
        on_base = drop is not None and member.dropout_on_base
        _add_base_grad(dx, dy, member.weight, None if on_base else member.base_scale)
    return dx


def adapter_linear_backward(
    dys: Sequence[Tensor],
    members: Sequence[Member],
    x: Tensor | None,
    u: Tensor | None,
    zs: Sequence[Tensor | None],
    weights: Sequence[Tensor],
    drop: Tensor | None,
    p: float,
    shared_A: bool,
    want_dx: bool,
    want_bias: bool,
    strategy: str,
) -> list[Tensor]:
    """dx where want_dx; dA of each member where x is given; P = dyᵀ u of each where u is; dβ of each where want_bias;
    dg of each member whose z is given. All but dx are sums in fp32."""
    grads = []
    keep = 1.0 if drop is None else keep_probability(p)
    dq = None
    if x is not None or (want_dx and strategy == "library"):
        dq = _down_grads(dys, members, 1.0 / keep)
    if want_dx and strategy == "library":
        assert dq is not None
        grads.append(_input_grad(dys, members, dq, drop, keep, shared_A))
    elif want_dx:
        dx = None
        for index, (dy, member) in enumerate(zip(dys, members, strict=True)):
            weight = weights[index] if weights else recomposed_weight(member)
            dx = dy @ weight if dx is None else dx.addmm_(dy, weight)
        assert dx is not None
        grads.append(dx)
    if x is not None:
        assert dq is not None
        dA = dq.T @ (x if drop is None else _dropped(x, drop, 1.0))
        dA = cast(dA, sum_dtype(x))
        grads += [dA] if len(members) == 1 else dA.split([member.A.shape[0] for member in members])
    if u is not None:
        for dy, member, part in zip(dys, members, _parts(u, members, shared_A), strict=True):
            grads.append(factor_products(dy, part, member.scaling))
    if want_bias:
        grads += [column_sums(dy) for dy in dys]
    return grads + [_column_dots(dy, z) for dy, z in zip(dys, zs, strict=True) if z is not None]


def factor_products(dy: Tensor, u: Tensor, scaling: float) -> Tensor:
    """P = scaling · dyᵀ u [N, R]. With many more rows than columns of u, MKL is faster with the transposed product."""
    if 8 * u.shape[1] < dy.shape[0]:
        return cast(product(u.T, dy, scaling).T.contiguous(), sum_dtype(dy))
    return cast(product(dy.T, u, scaling), sum_dtype(dy))


def column_sums(dy: Tensor) -> Tensor:
    """Σ_m dy [N]."""
    dtype = sum_dtype(dy)
    if dy.device.type != "cpu" or dy.dtype == dtype:
        return dy.sum(0, dtype=dtype)
    # A CPU would make an fp32 copy of all of dy, which takes twice as long as one of a few rows after the other.
    sums = dy.new_zeros(dy.shape[1], dtype=dtype)
    for rows in dy.split(_SUMMED_ROWS):
        sums += rows.sum(0, dtype=dtype)
    return sums


def _column_dots(dy: Tensor, z: Tensor) -> Tensor:
    """Σ_m dy ⊙ z [N]."""
    dtype = sum_dtype(dy)
    if dy.device.type == "cpu" and dy.dtype == dtype and dy.shape[0] > 0:  # on one thread it adds in 16 bits
        # It is the gain's gradient of a layer norm whose mean is 0 and whose deviation is 1: PyTorch has that in one
        # pass without a product of size [M, N], in half the time of multiplying and summing.
        n = dy.shape[1]
        mean, deviation = dy.new_zeros(dy.shape[0], 1, dtype=dtype), dy.new_ones(dy.shape[0], 1, dtype=dtype)
        gain, only_gain = dy.new_ones(n, dtype=dtype), [False, True, False]
        backward = torch.ops.aten.native_layer_norm_backward
        dots: Tensor = backward(dy, z, [n], mean, deviation, gain, None, only_gain)[1]
        return dots
    dots = dy.new_zeros(dy.shape[1], dtype=dtype)
    for rows in _row_blocks(*dy.shape):
        dots += (dy[rows].to(dtype) * z[rows]).sum(0)
    return dots


def weight_norm(weight: Tensor, A: Tensor, B: Tensor, scaling: float, base_squared: Tensor) -> tuple[Tensor, Tensor]:
    """(n [N], W0 Aᵀ [N, R]) in fp32; base_squared [N] = ‖W0‖² by rows."""
    dtype = sum_dtype(weight)
    A, B = cast(A, dtype), cast(B, dtype)
    if weight.dtype == dtype:
        WA = weight @ A.T
    else:  # never an fp32 copy of the whole weight
        WA = torch.empty(weight.shape[0], A.shape[0], dtype=dtype, device=weight.device)
        for rows in _row_blocks(*weight.shape):
            torch.mm(weight[rows].to(dtype), A.T, out=WA[rows])
    inner = torch.addmm(WA, B, A @ A.T, beta=2.0 * scaling, alpha=scaling * scaling)
    squared = (inner * B).sum(1).add_(base_squared)
    return squared.clamp_(min=0.0).sqrt_(), WA


def row_squares(weight: Tensor) -> Tensor:
    """‖W0‖² by rows: [N] in fp32."""
    norms: Tensor = torch.linalg.vector_norm(weight, dim=1, dtype=sum_dtype(weight))
    return norms.square_()
