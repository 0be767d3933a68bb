"""`hadamard_linear` and its gradients."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...reference import hadamard_linear_reference
from ..arithmetic import cast
from ..backends import resolve_backend
from ..calls import (
    applied,
    check_same_dtype,
    compute_dtype,
    in_widest,
    once_differentiable,
    requires_grad,
    rows_of,
    with_leading,
    without_autocast,
)
from . import op
from .checks import check_hadamard_linear
from .parameters import HadamardLayer, Wants


def hadamard_linear(
    x: Tensor,
    weight: Tensor,
    U: Tensor,
    V: Tensor,
    *,
    A: Tensor | None = None,
    B: Tensor | None = None,
    bias: Tensor | None = None,
    base: bool = True,
    backend: str = "auto",
) -> Tensor:
    """A frozen linear layer each of whose weights is scaled by itself, and a low-rank path beside it:

        y = ((W0 or 0) + W0 ⊙ (U V)) x + B (A x) + β

    W0 ⊙ (U V) has full rank in general; it is rebuilt block by block, and never in memory as a whole, forward or
    backward. base: whether W0 x is part of y.
    Shapes: x [..., K]; weight [N, K], any strides; U [N, q]; V [q, K], q at least 1; A [r, K] and B [N, r], both or
    neither; bias [N]; y [..., N].
    Dtypes: weight has x's dtype, or autocast's takes the place of both; the others may be fp32 beside 16-bit x. In 16
    bits W0 x and (W0 ⊙ (U V)) x are two products: W0 (1 + U V) would lose a U V below half an ulp of 1.
    Gradients flow to x, U, V, A, B and bias; weight is frozen. Once differentiable.
    Raises ValueError on mismatched shapes or devices, a weight that requires grad, a backend that cannot run; TypeError
    on dtypes that cannot be mixed.
    Source: Huang et al., HiRA, ICLR 2025, section 3; Chavan et al. 2023, arXiv:2306.07967, section 3.

    >>> x, weight = torch.randn(5, 16), torch.randn(8, 16)
    >>> hadamard_linear(x, weight, U=torch.randn(8, 2), V=torch.randn(2, 16)).shape
    torch.Size([5, 8])
    """
    layer = HadamardLayer(weight, U, V, A, B, bias, base)
    check_hadamard_linear(x, layer)
    check_same_dtype(x, weight)
    backend = resolve_backend(backend, x, weight)
    if backend == "reference":
        return in_widest(hadamard_linear_reference, x, *layer)
    tensors = layer[:_TENSORS]
    if torch.is_grad_enabled() and any([requires_grad(tensor) for tensor in (x, *tensors)]):
        y: Tensor = applied(HadamardLinearFunction, x, _Call(base, compute_dtype(x), backend), *tensors)
        return y
    dtype = compute_dtype(x)
    with without_autocast(x):
        layer = layer._replace(weight=cast(weight, dtype))
        return with_leading(op.hadamard_linear(cast(rows_of(x), dtype), layer, False, backend).y, x.shape)


# How many fields of a HadamardLayer are tensors: autograd has to see these one by one.
_TENSORS = 6


class _Call(NamedTuple):
    """What the Function has to know beside tensors."""

    base: bool
    dtype: torch.dtype
    backend: str


class HadamardLinearFunction(torch.autograd.Function):
    """y = ((W0 or 0) + W0 ⊙ (U V)) x + B (A x) + β, from which nothing of size [N, K] is kept, or made at once.

    Kept for the backward: x only where U, V or A trains, u = A x only where B does. Once differentiable. Algebra: with
    W = (W0 or 0) + W0 ⊙ (U V), G = dyᵀ x and q = dy B,

        dx = dy W + q A     dU = (G ⊙ W0) Vᵀ     dV = Uᵀ (G ⊙ W0)     dA = qᵀ x     dB = dyᵀ u     dβ = Σ dy
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, call: _Call, *tensors: Any) -> Tensor:
        needs_x, _, _, needs_U, needs_V, needs_A, needs_B, needs_bias = ctx.needs_input_grad
        layer = HadamardLayer._make((*tensors, call.base))
        with without_autocast(x):
            rows = cast(rows_of(x), call.dtype)
            layer = layer._replace(weight=cast(layer.weight, call.dtype))
            y, u = op.hadamard_linear(rows, layer, needs_B, call.backend)
        ctx.save_for_backward(rows if needs_U or needs_V or needs_A else None, u, *tensors[:-1])  # β is added, no more
        ctx.x_shape, ctx.call, ctx.wants = x.shape, call, Wants(needs_x, needs_U or needs_V, needs_A, needs_bias)
        return with_leading(y, x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        rows, u, *tensors = ctx.saved_tensors
        _, _, _, needs_U, needs_V, *_ = ctx.needs_input_grad
        call, layer = ctx.call, HadamardLayer._make((*tensors, None, ctx.call.base))
        with without_autocast(dy):
            layer = layer._replace(weight=cast(layer.weight, call.dtype))
            grads = op.hadamard_linear_backward(rows_of(dy), layer, rows, u, ctx.wants, call.backend)
        dx = None if grads.x is None else grads.x.view(ctx.x_shape)
        # U and V come together.
        dU, dV = grads.U if needs_U else None, grads.V if needs_V else None
        return dx, None, None, dU, dV, grads.A, grads.B, grads.bias
