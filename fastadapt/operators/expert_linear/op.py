"""`fastadapt::expert_linear` and its backward."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..arithmetic import sum_dtype
from ..backends import kernels
from ..registry import operator
from . import eager
from .parameters import Experts, Grads, Keep, Outputs, Saved, Wants


def _outline(x: Tensor, x_dropped: Tensor | None, offsets: Tensor, experts: Experts, keep: Keep, backend: str) -> Any:
    rows, (count, n, _) = x.shape[0], experts.weight.shape
    u = None if experts.A is None or not keep.u else (rows, experts.A.shape[1], x.dtype)
    made = experts.base_squared is not None and experts.base_scale is not None
    return Outputs._make(
        ((rows, n, x.dtype), u, (rows, n, x.dtype) if keep.z else None, (count, n, sum_dtype(x)) if made else None)
    )


@operator(_outline)
def expert_linear(
    x: Tensor, x_dropped: Tensor | None, offsets: Tensor, experts: Experts, keep: Keep, backend: str
) -> Outputs:
    """y [S, N] of rows sorted by expert, and what is to be kept."""
    if backend == "eager":
        return eager.expert_linear(x, x_dropped, offsets, experts, keep)
    module, norm = kernels("expert_linear"), None
    if experts.base_squared is not None and experts.base_scale is not None and experts.A is not None:
        # Of W0's size are the products alone: the norm that they are made into is small work for PyTorch.
        norm = eager.expert_norm(experts, experts.base_squared, module.base_products(experts.weight, experts.A))
        experts = experts._replace(base_scale=experts.base_scale / norm)
    y, u, z = module.expert_linear(x, x_dropped, offsets, experts, keep)
    return Outputs(y, u, z, norm)


def _backward_outline(dy: Tensor, offsets: Tensor, experts: Experts, saved: Saved, wants: Wants, backend: str) -> Any:
    rows, (count, n, k), sums = dy.shape[0], experts.weight.shape, sum_dtype(dy)
    has_low = experts.A is not None
    on_base = experts.base_scale is not None and experts.dropout_on_base
    r = 0 if experts.A is None else experts.A.shape[1]
    return Grads._make(
        (
            (rows, k, dy.dtype) if wants.x else None,
            (rows, k, dy.dtype) if wants.x and wants.dropped and (has_low or on_base) else None,
            (*experts.A.shape, sums) if wants.A and experts.A is not None and saved.x is not None else None,
            (*experts.B.shape, sums) if wants.B and experts.B is not None and saved.u is not None else None,
            (count, r, sums) if wants.mid_scale and saved.u is not None else None,
            (count, n, sums) if wants.out_scale and saved.u is not None else None,
            (count, n, sums) if wants.base_scale and saved.z is not None else None,
            (count, n, sums) if wants.bias else None,
        )
    )


@operator(_backward_outline)
def expert_linear_backward(
    dy: Tensor, offsets: Tensor, experts: Experts, saved: Saved, wants: Wants, backend: str
) -> Grads:
    """The gradients that are wanted, dA where x̃ is saved, dB, dd and dh where u is, dg where z is."""
    if backend == "eager":
        return eager.expert_linear_backward(dy, offsets, experts, saved, wants)
    return Grads(*kernels("expert_linear").expert_linear_backward(dy, offsets, experts, saved, wants))
