"""LoRA with a backward written by hand and nothing kept but x, as Unsloth has it (fast_lora.py), of library products.

The sequence of operations is that of `bench.peers.unsloth`: addmm_ into y and into dx, u and q made again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


class ManualLoRA(torch.autograd.Function):
    """y_i = W_i x + s B_i A_i x of layers that read one x [M, K]: (x, s, W_0, A_0, B_0, W_1, ...) -> (y_0, ...)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scaling: float, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x, *tensors)
        ctx.scaling = scaling
        ys = []
        for weight, A, B in _layers(tensors):
            y = F.linear(x, weight)
            ys.append(y.addmm_(x @ A.t(), B.t(), alpha=scaling))
        return tuple(ys)

    @staticmethod
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor | None, ...]:
        x, *tensors = ctx.saved_tensors
        scaling, layers = ctx.scaling, _layers(tensors)
        grads: list[Tensor | None] = []
        for dy, (_, A, B) in zip(dys, layers, strict=True):
            dA = (x.t() @ (dy @ B)).mul_(scaling).t()
            dB = ((A @ x.t()) @ dy).mul_(scaling).t()
            grads += [None, dA, dB]
        dx = dys[0] @ layers[0][0]
        for dy, (weight, _, _) in zip(dys[1:], layers[1:], strict=True):
            dx.addmm_(dy, weight)
        for dy, (_, A, B) in zip(dys, layers, strict=True):
            dx.addmm_(dy @ B, A, alpha=scaling)
        return dx, None, *grads


def _layers(tensors: Sequence[Tensor]) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(W, A, B) of each."""
    return list(zip(tensors[::3], tensors[1::3], tensors[2::3], strict=True))
