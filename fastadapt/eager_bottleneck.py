"""The eager bottleneck: two thin products and what lies between them, which the backward computes again.

Nothing of size [tokens, out] is made beside the output; with groups, each block of U is a product of its own. What has
the hidden's size is small: of the passes over tensors only those of v, the residual and the output count.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .eager import cast, column_sums, factor_products, keep_probability, linear, product, sum_dtype, zero_dropped

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


def _hidden(
    v: Tensor, down: Tensor, down_bias: Tensor | None, drop: Tensor | None, activation: str
) -> tuple[Tensor, Tensor]:
    """(D v + a or what _through_activation takes for it, mask ⊙ φ(D v + a)), [M, H] each."""
    pre = linear(v, cast(down, v.dtype), down_bias)
    activated = _activated(pre, activation)
    return pre, activated if drop is None else zero_dropped(activated, drop)


def _alpha(scaling: float, drop: Tensor | None, p: float) -> float:
    """s, with what dropout scales by, on a product instead of on a tensor."""
    return scaling if drop is None else scaling / keep_probability(p)


def bottleneck(
    v: Tensor,
    down: Tensor,
    up: Tensor,
    down_bias: Tensor | None,
    up_bias: Tensor | None,
    residual: Tensor | None,
    drop: Tensor | None,
    p: float,
    scaling: float,
    activation: str,
    groups: int,
) -> Tensor:
    """z + s · (U dropout(φ(D v + a)) + c): [M, N] in the residual's dtype, which is v's where there is none."""
    dtype = v.dtype if residual is None else residual.dtype
    hidden = cast(_hidden(v, down, down_bias, drop, activation)[1], dtype)
    out = torch.empty(v.shape[0], up.shape[0], dtype=dtype, device=v.device)
    # The products add to what is there: that takes no more passes than a copy of the residual alone.
    if residual is not None and up_bias is not None:
        torch.add(residual, cast(up_bias, dtype), alpha=scaling, out=out)
    elif residual is not None:
        out.copy_(residual)
    elif up_bias is not None:
        out.copy_(scaling * up_bias)
    beta = 0.0 if residual is up_bias is None else 1.0
    blocks = zip(out.chunk(groups, 1), hidden.chunk(groups, 1), cast(up, dtype).chunk(groups), strict=True)
    for columns, part, block in blocks:
        columns.addmm_(part, block.T, beta=beta, alpha=_alpha(scaling, drop, p))
    return out


def bottleneck_backward(
    dy: Tensor,
    v: Tensor | None,
    down: Tensor,
    up: Tensor,
    down_bias: Tensor | None,
    drop: Tensor | None,
    p: float,
    scaling: float,
    activation: str,
    groups: int,
    adds_dy: bool,
    wants: Sequence[bool],
) -> list[Tensor]:
    """Those of dv, dD, da, dU and dc that are wanted, in this order; v is needed for all but dc.

    All but dv are sums in fp32. With adds_dy, dv is the gradient of a residual that is v itself as well.
    """
    want_v, want_down, want_down_bias, want_up, want_up_bias = wants
    grads = []
    if v is not None:
        alpha = _alpha(scaling, drop, p)
        pre, hidden = _hidden(v, down, down_bias, drop, activation)
        columns = dy.chunk(groups, 1)
        if want_v or want_down or want_down_bias:
            q = torch.empty(hidden.shape, dtype=dy.dtype, device=dy.device)
            for part, dy_part, block in zip(q.chunk(groups, 1), columns, cast(up, dy.dtype).chunk(groups), strict=True):
                product(dy_part, block, alpha, out=part)
            dhidden = cast(q if drop is None else zero_dropped(q, drop), v.dtype)
            dhidden = _through_activation(dhidden, pre, activation)
            if want_v:
                weight = cast(down, v.dtype)
                grads.append(torch.addmm(dy, dhidden, weight) if adds_dy else dhidden @ weight)
            if want_down:
                grads.append(cast(dhidden.T @ v, sum_dtype(v)))
            if want_down_bias:
                grads.append(column_sums(dhidden))
        if want_up:
            parts = cast(hidden, dy.dtype).chunk(groups, 1)
            blocks = [factor_products(dy_part, part, alpha) for dy_part, part in zip(columns, parts, strict=True)]
            grads.append(blocks[0] if groups == 1 else torch.cat(blocks))
    if want_up_bias:
        grads.append(column_sums(dy).mul_(scaling))
    return grads
