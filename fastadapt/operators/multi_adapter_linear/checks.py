"""What multi_adapter_linear asks of its arguments."""

from __future__ import annotations

import torch
from torch import Tensor

from ...checks import check_device, check_floating, check_vector, shape_error


def check_multi_adapter_linear(x: Tensor, weight: Tensor, bias: Tensor | None, tokens: int) -> None:
    """Raises ValueError or TypeError that names the first argument which does not fit a batch of `tokens` tokens."""
    if weight.dim() != 2:
        raise shape_error("weight", "[out, in]", weight)
    n, k = weight.shape
    if x.dim() == 0 or x.shape[-1] != k:
        raise shape_error("x", f"[..., {k}] to go with weight {tuple(weight.shape)}", x)
    if x.numel() // max(1, k) != tokens:
        raise ValueError(f"x has {x.numel() // max(1, k)} tokens {tuple(x.shape)} but the batch has {tokens}")
    check_floating("x", x)
    check_floating("weight", weight)
    check_device("weight", weight, x.device)
    check_vector("bias", bias, n, x.device)
    if torch.is_grad_enabled() and x.requires_grad:
        raise ValueError(
            "x requires grad, but many adapters in one batch are for inference: call under torch.no_grad()"
        )
