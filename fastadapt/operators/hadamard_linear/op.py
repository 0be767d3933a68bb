"""`fastadapt::hadamard_linear` and its backward."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..arithmetic import sum_dtype
from ..backends import kernels
from ..registry import operator
from . import eager
from .parameters import Grads, HadamardLayer, Outputs, Wants


def _outline(x: Tensor, layer: HadamardLayer, keep_u: bool, backend: str) -> Any:
    u = (x.shape[0], layer.A.shape[0], x.dtype) if keep_u and layer.A is not None else None
    return Outputs._make(((x.shape[0], layer.weight.shape[0], x.dtype), u))


@operator(_outline)
def hadamard_linear(x: Tensor, layer: HadamardLayer, keep_u: bool, backend: str) -> Outputs:
    """y [M, N] = ((W0 or 0) + W0 ⊙ (U V)) x + B u + β, and u where keep_u."""
    y, u = (eager if backend == "eager" else kernels("hadamard_linear")).hadamard_linear(x, layer)
    return Outputs(y, u if keep_u else None)


def _backward_outline(
    dy: Tensor, layer: HadamardLayer, x: Tensor | None, u: Tensor | None, wants: Wants, backend: str
) -> Any:
    weight, U, V, A, B, _, _ = layer
    dx = (dy.shape[0], weight.shape[1], dy.dtype) if wants.x else None
    wanted = (U, wants.factors), (V, wants.factors), (A, wants.A), (B, u is not None)
    factors = [(*factor.shape, sum_dtype(dy)) if want and factor is not None else None for factor, want in wanted]
    return Grads._make((dx, *factors, (dy.shape[1], sum_dtype(dy)) if wants.bias else None))


@operator(_backward_outline)
def hadamard_linear_backward(
    dy: Tensor, layer: HadamardLayer, x: Tensor | None, u: Tensor | None, wants: Wants, backend: str
) -> Grads:
    """The gradients that are wanted: dU, dV and dA need x, and dB is there where u is given."""
    module = eager if backend == "eager" else kernels("hadamard_linear")
    return Grads(*module.hadamard_linear_backward(dy, layer, x, u, wants))
