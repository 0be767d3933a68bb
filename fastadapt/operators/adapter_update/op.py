"""`fastadapt::adapter_update` and its backward."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..arithmetic import sum_dtype
from ..registry import operator
from . import eager
from .parameters import Grads, Outputs, Saved, Update, Wants


def _outline(y: Tensor, x: Tensor, update: Update, y_dropped: Tensor | None, keep_u: bool, backend: str) -> Any:
    return Outputs._make(((*y.shape, y.dtype), (x.shape[0], update.A.shape[0], x.dtype) if keep_u else None))


@operator(_outline)
def adapter_update(
    y: Tensor, x: Tensor, update: Update, y_dropped: Tensor | None, keep_u: bool, backend: str
) -> Outputs:
    """y' [M, N], and u where keep_u. There is no kernel: the backend is "eager"."""
    out, u = eager.adapter_update(y, x, update, y_dropped)
    return Outputs(out, u if keep_u else None)


def _backward_outline(dy: Tensor, like: Tensor, update: Update, saved: Saved, wants: Wants, backend: str) -> Any:
    (r, k), n, dtype = update.A.shape, dy.shape[1], sum_dtype(dy)
    scales = update.base_scale is not None
    return Grads._make(
        (
            (dy.shape[0], k, like.dtype) if wants.x else None,
            (*dy.shape, dy.dtype) if wants.y and scales else None,
            (*dy.shape, dy.dtype) if wants.y_dropped and scales else None,
            None if saved.x is None else (r, k, dtype),
            None if saved.u is None else (n, r, dtype),
            None if saved.z is None else (n, dtype),
            (n, dtype) if wants.shift else None,
        )
    )


@operator(_backward_outline)
def adapter_update_backward(
    dy: Tensor, like: Tensor, update: Update, saved: Saved, wants: Wants, backend: str
) -> Grads:
    """The gradients that are wanted, dA where x is saved, P where u is, dg where z is. like: of the products' dtype."""
    return eager.adapter_update_backward(dy, update, saved, wants, like.dtype)
