"""What multi_adapter_linear asks of its arguments."""

from __future__ import annotations

import torch
from torch import Tensor

from ...checks import check_device, check_floating, check_vector, shape_error
from ..expert_linear.checks import check_expert_block, check_expert_weight


def check_multi_adapter_linear(x: Tensor, weight: Tensor, bias: Tensor | None, tokens: int) -> None:
    """Raises ValueError or TypeError that names the first argument which does not fit a batch of `tokens` tokens."""
    if weight.dim() != 2:
        raise shape_error("weight", "[out, in]", weight)
    n, k = weight.shape
    if x.dim() == 0 or x.shape[-1] != k:
        raise shape_error("x", f"[..., {k}] to go with weight {tuple(weight.shape)}", x)
    check_tokens(x, tokens)
    check_floating("x", x)
    check_floating("weight", weight)
    check_device("weight", weight, x.device)
    check_vector("bias", bias, n, x.device)
    check_inference(x, "x")


def check_tokens(x: Tensor, tokens: int) -> None:
    """Raises ValueError where x [..., K] does not have as many tokens as a batch."""
    found = x.numel() // max(1, x.shape[-1])
    if found != tokens:
        raise ValueError(f"x has {found} tokens {tuple(x.shape)} but the batch has {tokens}")


def check_inference(x: Tensor, names: str, *others: Tensor) -> None:
    if torch.is_grad_enabled() and any([tensor.requires_grad for tensor in (x, *others)]):
        raise ValueError(
            f"{names} requires grad, but many adapters in one batch are for inference: call under torch.no_grad()"
        )


def check_multi_adapter_update(y: Tensor, x: Tensor, bias: Tensor | None) -> None:
    """Raises ValueError or TypeError that names the first argument which does not fit an update of y by x, in place."""
    check_floating("x", x)
    if y.dim() < 2 or y.shape[:-1] != x.shape[:-1]:
        raise shape_error("y", f"{[*x.shape[:-1], 'out']} to go with x {tuple(x.shape)}", y)
    if y.dtype != x.dtype:
        raise TypeError(f"y must have the dtype of x, {x.dtype}, got {y.dtype}")
    check_device("y", y, x.device)
    check_vector("bias", bias, y.shape[-1], x.device)
    try:
        y.view(-1, y.shape[-1])
    except RuntimeError:
        rows = False
    else:
        rows = y.shape[-1] < 2 or y.stride(-1) == 1
    if not rows:
        raise ValueError(
            f"y must be rows [..., {y.shape[-1]}] that lie contiguously, in equal steps, got strides {y.stride()}: it "
            "is written in place"
        )
    check_inference(x, "x or y", y)


def check_multi_adapter_expert_block(
    x: Tensor,
    experts: Tensor,
    routing: Tensor,
    up: tuple[Tensor, Tensor | None],
    down: tuple[Tensor, Tensor | None],
    tokens: int,
) -> None:
    """Raises as `check_multi_adapter_linear`. up and down: weight and bias of the two products of experts."""
    for name, (weight, bias) in (("up.", up), ("down.", down)):
        check_expert_weight(weight, bias, None, name)
    check_expert_block(x, experts, routing, up[0], down[0], (0.0, 0.0))
    if down[0].dtype != up[0].dtype:
        raise TypeError(f"down.weight must have up.weight's dtype {up[0].dtype}, got {down[0].dtype}: cast one")
    check_tokens(x, tokens)
    check_inference(x, "x or routing", routing)
