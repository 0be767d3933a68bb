"""`fastadapt::bottleneck` and its backward."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..arithmetic import sum_dtype
from ..backends import kernels
from ..masks import Dropout
from ..registry import operator
from . import eager
from .parameters import BottleneckLayer, Grads, Wants


def _outline(v: Tensor, layer: BottleneckLayer, residual: Tensor | None, dropout: Dropout, backend: str) -> Any:
    return v.shape[0], layer.up.shape[0], v.dtype if residual is None else residual.dtype


@operator(_outline)
def bottleneck(v: Tensor, layer: BottleneckLayer, residual: Tensor | None, dropout: Dropout, backend: str) -> Tensor:
    """z + s · (U dropout(φ(D v + a)) + c): [M, N] in the residual's dtype, which is v's where there is none."""
    if backend == "eager":
        return eager.bottleneck(v, layer, residual, dropout)
    out: Tensor = kernels("bottleneck").bottleneck(v, layer, residual, *dropout)
    return out


def _backward_outline(
    dy: Tensor, v: Tensor | None, layer: BottleneckLayer, dropout: Dropout, adds_dy: bool, wants: Wants, backend: str
) -> Any:
    (down, up, *_), dtype = layer, sum_dtype(dy)
    h, n = down.shape[0], up.shape[0]
    sums = [(*down.shape, dtype), (*up.shape, dtype), (h, dtype), (n, dtype)]
    dv = (*v.shape, v.dtype) if wants.v and v is not None else None
    return Grads._make((dv, *[leaf if wanted else None for leaf, wanted in zip(sums, wants[1:], strict=True)]))


@operator(_backward_outline)
def bottleneck_backward(
    dy: Tensor, v: Tensor | None, layer: BottleneckLayer, dropout: Dropout, adds_dy: bool, wants: Wants, backend: str
) -> Grads:
    """The gradients that are wanted; all but up_bias's need v. adds_dy: the residual was v itself, whose gradient then
    has dy in it."""
    if backend == "eager":
        return eager.bottleneck_backward(dy, v, layer, dropout, adds_dy, wants)
    return Grads(*kernels("bottleneck").bottleneck_backward(dy, v, layer, *dropout, adds_dy, wants))
