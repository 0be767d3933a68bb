"""`weight_norm`, DoRA's row norms, and its gradients."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...reference import weight_norm_reference
from ..arithmetic import cast, sum_dtype
from ..backends import resolve_backend
from ..calls import applied, once_differentiable, without_autocast
from . import op
from .checks import check_products, check_weight_norm


def row_squares(weight: Tensor, *, backend: str = "auto") -> Tensor:
    """‖W0‖² by rows in fp32, the constant part of the DoRA norm. Shapes: weight [N, K]; result [N]."""
    backend = resolve_backend(backend, weight)
    squares: Tensor = op.row_squares(weight, "eager" if backend == "reference" else backend)
    return squares


def weight_norm(
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
    *,
    base_squared: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Row norms of W0 + s·B·A without forming B·A, in fp32 (fp64 for an fp64 weight):

        n² = ‖W0‖²_row + 2s · rowsum(B ⊙ (W0 Aᵀ)) + s² · rowsum((B (A Aᵀ)) ⊙ B)

    Shapes: weight [N, K]; lora_A [r, K]; lora_B [N, r]; base_squared [N] = row_squares(weight), a constant that a
    caller may keep; n [N]. Gradients flow to lora_A and lora_B; weight is frozen. Once differentiable.
    Raises ValueError on mismatched shapes or devices, TypeError on dtypes without a kernel.
    Source: Liu et al. 2024, arXiv:2402.09353, eq. 5 and section 4.3.

    >>> weight, A, B = torch.randn(8, 16), torch.randn(4, 16), torch.zeros(8, 4)
    >>> torch.allclose(weight_norm(weight, A, B, 0.5), weight.norm(dim=1))
    True
    """
    check_weight_norm(weight, lora_A, lora_B)
    backend = resolve_backend(backend, weight)
    if backend == "reference":
        dtype = functools.reduce(torch.promote_types, (weight.dtype, lora_A.dtype, lora_B.dtype))
        return weight_norm_reference(cast(weight, dtype), cast(lora_A, dtype), cast(lora_B, dtype), scaling)
    with without_autocast(weight):  # in 16 bits the norm's difference from the base weight's would be rounding
        if base_squared is None:
            base_squared = op.row_squares(weight.detach(), backend)
        if not (torch.is_grad_enabled() and (lora_A.requires_grad or lora_B.requires_grad)):
            return op.weight_norm(weight, lora_A, lora_B, scaling, base_squared, backend)[0]
        norm: Tensor = applied(WeightNormFunction, weight, lora_A, lora_B, base_squared, scaling, backend)
        return norm


def weight_norm_squared(
    base_squared: Tensor | Callable[[], Tensor],
    base_products: Tensor | Callable[[Tensor], Tensor],
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float,
) -> Tensor:
    """n² of `weight_norm` where the weight is not at hand: quantised, packed, or one process's part of it. In fp32:

        n² = ‖W0‖²_row + 2s · rowsum(B ⊙ (W0 Aᵀ)) + s² · rowsum((B (A Aᵀ)) ⊙ B)

    W0 comes in by two products, each a tensor or what makes it: base_squared() = ‖W0‖² by rows, and
    base_products(lora_A) = W0 Aᵀ, A in the place of x in the base layer without its bias. Of a weight that is cut by
    columns, and A with it, each part gives a part of n²: they are summed before the root is taken. Rounding may leave
    a sum below zero where the true one is zero: clamp it, then take the root. A constant: no gradients.
    Shapes: base_squared [N]; base_products [N, r]; lora_A [r, K]; lora_B [N, r]; n² [N].
    Raises ValueError on mismatched shapes or devices, TypeError on dtypes that are not floating.
    Source: Liu et al. 2024, arXiv:2402.09353, eq. 5 and section 4.3.

    >>> W, A, B = torch.randn(8, 16), torch.randn(4, 16), torch.randn(8, 4)
    >>> n_squared = weight_norm_squared(lambda: W.square().sum(1), lambda x: W @ x.T, A, B, 0.5)
    >>> torch.allclose(n_squared.sqrt(), weight_norm(W, A, B, 0.5))
    True
    """
    with torch.no_grad(), without_autocast(lora_A):
        squares = base_squared() if callable(base_squared) else base_squared
        products = base_products(lora_A) if callable(base_products) else base_products
        check_products(squares, products, lora_A, lora_B)
        dtype = functools.reduce(torch.promote_types, map(sum_dtype, (squares, products, lora_A, lora_B)))
        A, B = cast(lora_A, dtype), cast(lora_B, dtype)
        inner = torch.addmm(cast(products, dtype), B, A @ A.T, beta=2.0 * scaling, alpha=scaling * scaling)
        return (inner * B).sum(1).add_(squares)


class WeightNormFunction(torch.autograd.Function):
    """n_j = ‖(W0 + s·B·A)_j‖ with gradients to A and B: with c = dn / n and V = W0 + s·B·A,

    dB = s · c ⊙ (V Aᵀ) = s · c ⊙ (W0Aᵀ + s·B (A Aᵀ))     dA = s · (c ⊙ B)ᵀ V = s · ((c ⊙ B)ᵀ W0 + s·(Bᵀ(c ⊙ B)) A)
    """

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, A: Tensor, B: Tensor, base_squared: Tensor, scaling: float, backend: str
    ) -> Tensor:
        n, WA = op.weight_norm(weight, A, B, scaling, base_squared, backend)
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(weight, A, B, n, WA)
            ctx.scaling = scaling
        return n

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dn: Tensor) -> tuple[Tensor | None, ...]:
        weight, A, B, n, WA = ctx.saved_tensors
        s = ctx.scaling
        down, up = A.to(n.dtype), B.to(n.dtype)
        with without_autocast(dn):
            weighted = torch.where(n > 0, dn / n, 0.0)[:, None]
            dB = s * weighted * (WA + s * (up @ (down @ down.T)))
            scaled_up = weighted * up
            dA = s * ((scaled_up.T.to(weight.dtype) @ weight).to(n.dtype) + s * (up.T @ scaled_up).T @ down)
        return None, dA.to(A.dtype), dB.to(B.dtype), None, None, None
