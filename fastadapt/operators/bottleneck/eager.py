"""The eager bottleneck: two thin products and what lies between them, which the backward computes again.

Nothing of size [tokens, out] is made beside the output; with groups, each block of U is a product of its own. What has
the hidden's size is small: of the passes over tensors only those of v, the residual and the output count.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..arithmetic import cast, column_sums, factor_products, linear, product, sum_dtype
from ..masks import Dropout, zero_dropped
from .parameters import BottleneckLayer, Grads, Wants

_QUICK = 1.702


def _activated(pre: Tensor, activation: str) -> Tensor:
    """φ(pre): in pre's memory where φ' can be told from φ, or is 1."""
    if activation == "relu":
        return pre.relu_()
    if activation == "gelu":
        return F.gelu(pre)
    if activation == "quick_gelu":
        return torch.sigmoid(_QUICK * pre).mul_(pre)
    return pre


def _through_activation(grad: Tensor, pre: Tensor, activation: str) -> Tensor:
    """grad ⊙ φ'(pre); for relu, pre may be relu(pre) as well, whatever positive numbers that is multiplied by."""
    backward: Tensor
    if activation == "relu":
        backward = torch.ops.aten.threshold_backward.default(grad, pre, 0)
        return backward
    if activation == "gelu":
        backward = torch.ops.aten.gelu_backward.default(grad, pre)
        return backward
    if activation == "quick_gelu":
        gate = torch.sigmoid(_QUICK * pre)
        return grad * (gate * (1 + _QUICK * pre * (1 - gate)))
    return grad


def _hidden(v: Tensor, layer: BottleneckLayer, drop: Tensor | None) -> tuple[Tensor, Tensor]:
    """(D v + a or what _through_activation takes for it, mask ⊙ φ(D v + a)), [M, H] each."""
    pre = linear(v, cast(layer.down, v.dtype), layer.down_bias)
    activated = _activated(pre, layer.activation)
    return pre, activated if drop is None else zero_dropped(activated, drop)


def bottleneck(v: Tensor, layer: BottleneckLayer, residual: Tensor | None, dropout: Dropout) -> Tensor:
    """z + s · (U dropout(φ(D v + a)) + c): [M, N] in the residual's dtype, which is v's where there is none."""
    dtype = v.dtype if residual is None else residual.dtype
    up, up_bias, scaling, groups = cast(layer.up, dtype), layer.up_bias, layer.scaling, layer.groups
    hidden = cast(_hidden(v, layer, dropout.drop)[1], dtype)
    out = torch.empty(v.shape[0], up.shape[0], dtype=dtype, device=v.device)
    # The products add to what is there: that takes no more passes than a copy of the residual alone.
    if residual is not None and up_bias is not None:
        torch.add(residual, cast(up_bias, dtype), alpha=scaling, out=out)
    elif residual is not None:
        out.copy_(residual)
    elif up_bias is not None:
        out.copy_(scaling * up_bias)
    beta = 0.0 if residual is up_bias is None else 1.0
    for columns, part, block in zip(out.chunk(groups, 1), hidden.chunk(groups, 1), up.chunk(groups), strict=True):
        # What dropout scales by rides on a product instead of on a tensor.
        columns.addmm_(part, block.T, beta=beta, alpha=scaling / dropout.keep)
    return out


def _hidden_grad(dy: Tensor, pre: Tensor, layer: BottleneckLayer, dropout: Dropout) -> Tensor:
    """e = s · mask ⊙ (Uᵀ dy) / (1 − p) ⊙ φ'(D v + a): [M, H] in the dtype of `pre`, what _hidden gave of it."""
    groups, up = layer.groups, cast(layer.up, dy.dtype)
    q = torch.empty(pre.shape, dtype=dy.dtype, device=dy.device)
    for part, columns, block in zip(q.chunk(groups, 1), dy.chunk(groups, 1), up.chunk(groups), strict=True):
        product(columns, block, layer.scaling / dropout.keep, out=part)
    q = cast(q if dropout.drop is None else zero_dropped(q, dropout.drop), pre.dtype)
    return _through_activation(q, pre, layer.activation)


def _up_grad(dy: Tensor, hidden: Tensor, layer: BottleneckLayer, dropout: Dropout) -> Tensor:
    """dU = s · dyᵀ h̃, block by block."""
    alpha, groups = layer.scaling / dropout.keep, layer.groups
    pairs = zip(dy.chunk(groups, 1), cast(hidden, dy.dtype).chunk(groups, 1), strict=True)
    blocks = [factor_products(columns, part, alpha) for columns, part in pairs]
    return blocks[0] if groups == 1 else torch.cat(blocks)


def bottleneck_backward(
    dy: Tensor, v: Tensor | None, layer: BottleneckLayer, dropout: Dropout, adds_dy: bool, wants: Wants
) -> Grads:
    """The gradients that are wanted. With adds_dy, v's is that of a residual that is v itself as well."""
    dv = ddown = dup = ddown_bias = None
    if v is not None:
        pre, hidden = _hidden(v, layer, dropout.drop)
        if wants.v or wants.down or wants.down_bias:
            e = _hidden_grad(dy, pre, layer, dropout)
            if wants.v:
                down = cast(layer.down, v.dtype)
                dv = torch.addmm(dy, e, down) if adds_dy else e @ down
            ddown = cast(e.T @ v, sum_dtype(v)) if wants.down else None
            ddown_bias = column_sums(e) if wants.down_bias else None
        dup = _up_grad(dy, hidden, layer, dropout) if wants.up else None
    dup_bias = column_sums(dy).mul_(layer.scaling) if wants.up_bias else None
    return Grads(dv, ddown, dup, ddown_bias, dup_bias)
