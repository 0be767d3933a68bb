"""`fastadapt::weight_norm` and `fastadapt::row_squares`, the constant part of it."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from ..arithmetic import sum_dtype
from ..backends import kernels
from ..registry import operator
from . import eager


class Norm(NamedTuple):
    """n [N], and W0 Aᵀ [N, R], which the gradient of n needs as well; in fp32."""

    n: Tensor
    WA: Tensor


def _outline(weight: Tensor, A: Tensor, B: Tensor, scaling: float, base_squared: Tensor, backend: str) -> Any:
    n, dtype = weight.shape[0], sum_dtype(weight)
    return Norm._make(((n, dtype), (n, A.shape[0], dtype)))


@operator(_outline)
def weight_norm(weight: Tensor, A: Tensor, B: Tensor, scaling: float, base_squared: Tensor, backend: str) -> Norm:
    """The row norms of W0 + s·B·A; base_squared [N] = ‖W0‖² by rows, a constant that its caller keeps."""
    module = eager if backend == "eager" else kernels("weight_norm")
    return Norm(*module.weight_norm(weight, A, B, scaling, base_squared))


def _squares_outline(weight: Tensor, backend: str) -> Any:
    return weight.shape[0], sum_dtype(weight)


@operator(_squares_outline)
def row_squares(weight: Tensor, backend: str) -> Tensor:
    """‖W0‖² by rows: [N] in fp32."""
    squares: Tensor = (eager if backend == "eager" else kernels("weight_norm")).row_squares(weight)
    return squares
