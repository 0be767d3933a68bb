"""Active dropout by backend: the probability that its threshold really has, and what makes a mask."""

from __future__ import annotations

import torch
from torch import Tensor

from . import masks
from .backends import kernels


def keep_probability(p: float, backend: str) -> float:
    """The probability that an element is kept: 1 − p, as the threshold of the random integers rounds it."""
    if backend == "triton":
        keep: float = kernels("tiles").keep_probability(p)
        return keep
    return masks.keep_probability(p)


def draw_dropout(x: Tensor, p: float, backend: str) -> Tensor:
    """What `drop` is for x [M, K], from PyTorch's generator, so that torch.manual_seed and checkpointing govern it."""
    if backend == "triton":
        return torch.randint(torch.iinfo(torch.int64).max, (1,), device=x.device)
    return masks.draw_dropout(x, p)
