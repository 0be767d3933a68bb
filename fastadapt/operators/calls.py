"""What every public function does around its operator: rows, dtypes under autocast, what needs a gradient."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def rows_of(x: Tensor) -> Tensor:
    """x [..., K] as [M, K]."""
    return x.reshape(-1, x.shape[-1]) if x.dim() != 2 else x


def with_leading(y: Tensor, x_shape: torch.Size) -> Tensor:
    """y [M, N] with the leading dimensions of x: [..., N].

    Autograd must not take it for a view: what a Function returns as a view cannot be written in place, which modules
    behind a layer do (ReLU(inplace=True), a residual that is added with +=).
    """
    return y if len(x_shape) == 2 else torch.ops.aten._unsafe_view(y, [*x_shape[:-1], y.shape[1]])


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype of the products: autocast's where it is on for x's device, else x's own."""
    dtype = autocast_dtype(x)
    return x.dtype if dtype is None or x.dtype == torch.float64 else dtype


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Autocast off for x's device inside the `with` block: for products whose dtype is chosen already."""
    return AS_IT_IS if autocast_dtype(x) is None else torch.autocast(x.device.type, enabled=False)


AS_IT_IS = nullcontext()


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype of autocast on x's device, None where it is off."""
    # A device's `type` is a string that is made at each access.
    kind = "cpu" if x.is_cpu else "cuda" if x.is_cuda else x.device.type
    if kind not in ("cpu", "cuda") and not torch.amp.is_autocast_available(kind):
        return None
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def check_same_dtype(x: Tensor, weight: Tensor) -> None:
    # Autocast takes both to its own dtype, but leaves float64 alone.
    mixes = autocast_dtype(x) is not None and torch.float64 not in (x.dtype, weight.dtype)
    if x.dtype != weight.dtype and not mixes:
        raise TypeError(
            f"weight must have x's dtype {x.dtype}, got {weight.dtype}: cast one of them or use torch.autocast"
        )


def requires_grad(value: Tensor | float | None) -> bool:
    return isinstance(value, Tensor) and value.requires_grad
