"""The eager update of a layer's output: the low-rank product is added as it is made, in one pass over y."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..arithmetic import (
    add_scaled,
    cast,
    column_dots,
    column_sums,
    factor_products,
    product,
    scaled,
    scaled_rows,
    sum_dtype,
)
from .parameters import Grads, Outputs, Saved, Update, Wants


def _up(update: Update, dtype: torch.dtype) -> Tensor:
    """The vector part of h ⊙ B in `dtype`; the scalar part rides on the products as alpha."""
    return cast(scaled_rows(update.B, update.vector), dtype)


def adapter_update(y: Tensor, x: Tensor, update: Update, y_dropped: Tensor | None) -> Outputs:
    """y' in new memory, and u = A x̃: every term is added to y in its own dtype."""
    dtype, g = x.dtype, update.base_scale
    u = F.linear(x, cast(update.A, dtype))
    t = u if update.mid_scale is None else u * cast(update.mid_scale, dtype)
    up = _up(update, dtype)
    if g is None and y.dtype == dtype:
        out = torch.addmm(y, t, up.T, alpha=update.scaling)
    else:
        out = cast(product(t, up.T, update.scaling), y.dtype)
        if g is None:
            out += y
        elif y_dropped is None:
            add_scaled(out, y, g)
        else:
            out += y
            add_scaled(out, y_dropped, g - 1)
    if update.shift is not None:
        out += update.shift
    return Outputs(out, u)


def adapter_update_backward(dy: Tensor, update: Update, saved: Saved, wants: Wants, dtype: torch.dtype) -> Grads:
    """The gradients that are wanted, dA where x is saved, P where u is, dg where z is; products are in `dtype`."""
    g, rows = update.base_scale, cast(dy, dtype)
    dq = None
    if wants.x or saved.x is not None:
        dq = product(rows, _up(update, dtype), update.scaling)
        if update.mid_scale is not None:
            dq *= cast(update.mid_scale, dtype)
    # Without g the gradient of y is dy itself, which the caller has.
    through = g - 1 if g is not None and wants.y_dropped else None
    return Grads(
        dq @ cast(update.A, dtype) if wants.x and dq is not None else None,
        scaled(dy, g, None, True) if wants.y and g is not None else None,
        scaled(dy, through, None, True) if through is not None else None,
        cast(dq.T @ saved.x, sum_dtype(dy)) if dq is not None and saved.x is not None else None,
        factor_products(rows, saved.u, update.scaling) if saved.u is not None else None,
        column_dots(dy, saved.z) if saved.z is not None else None,
        column_sums(dy) if wants.shift else None,
    )
