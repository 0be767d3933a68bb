"""The eager row norms: two products, and no copy of the whole weight in a wider dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from ..arithmetic import cast, row_blocks, sum_dtype


def weight_norm(weight: Tensor, A: Tensor, B: Tensor, scaling: float, base_squared: Tensor) -> tuple[Tensor, Tensor]:
    """(n [N], W0 Aᵀ [N, R]) in fp32; base_squared [N] = ‖W0‖² by rows."""
    dtype = sum_dtype(weight)
    A, B = cast(A, dtype), cast(B, dtype)
    if weight.dtype == dtype:
        WA = weight @ A.T
    else:  # never an fp32 copy of the whole weight
        WA = torch.empty(weight.shape[0], A.shape[0], dtype=dtype, device=weight.device)
        for rows in row_blocks(*weight.shape):
            torch.mm(weight[rows].to(dtype), A.T, out=WA[rows])
    inner = torch.addmm(WA, B, A @ A.T, beta=2.0 * scaling, alpha=scaling * scaling)
    squared = (inner * B).sum(1).add_(base_squared)
    return squared.clamp_(min=0.0).sqrt_(), WA


def row_squares(weight: Tensor) -> Tensor:
    """‖W0‖² by rows: [N] in fp32."""
    norms: Tensor = torch.linalg.vector_norm(weight, dim=1, dtype=sum_dtype(weight))
    return norms.square_()
