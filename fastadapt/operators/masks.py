"""Dropout masks of the eager implementations: how one is drawn, kept and applied."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

_DROPOUT_LEVELS = 1 << 16

# The p up to which positions, 4·p bytes an element, take no more memory than a mask of one byte.
_POSITIONS_UP_TO = 0.25


class Dropout(NamedTuple):
    """Active dropout: its probability p, and what makes the mask. Without `drop` nothing is dropped.

    drop: for the eager implementations what `draw_dropout` says; for Triton a seed [1] of int64, from which every
    kernel draws the same mask.
    """

    drop: Tensor | None = None
    p: float = 0.0

    @property
    def keep(self) -> float:
        """The probability with which the eager implementations keep an element: 1 where nothing is dropped."""
        return 1.0 if self.drop is None else keep_probability(self.p)


def keep_probability(p: float) -> float:
    """The probability that an element is kept: 1 − p, or what the threshold of the random integers makes of it."""
    return 1.0 - p if p <= _POSITIONS_UP_TO else 1.0 - round(p * _DROPOUT_LEVELS) / _DROPOUT_LEVELS


def draw_dropout(x: Tensor, p: float) -> Tensor:
    """What makes the dropout mask of x [M, K], from PyTorch's generator: positions of dropped elements, or a mask.

    On a CPU a small p takes the positions, from the geometric gaps between them: their number is what drawing and
    applying costs, a fifth of a mask's time at p = 0.05.
    """
    if torch.compiler.is_compiling():  # neither the count of positions nor the view of a draw can be traced
        return torch.rand(x.shape, device=x.device) >= 1.0 - keep_probability(p)
    if x.device.type == "cpu" and p <= _POSITIONS_UP_TO:
        return _draw_positions(x.numel(), p)
    # Four 16-bit integers from each 64-bit draw compared with a threshold: a fifth of the time of `bernoulli_`.
    count = x.numel()
    words = torch.empty((count + 3) // 4, dtype=torch.int64, device=x.device).random_(
        torch.iinfo(torch.int64).min, None
    )
    threshold = round(p * _DROPOUT_LEVELS) - _DROPOUT_LEVELS // 2
    return (words.view(torch.int16)[:count] >= threshold).view(x.shape)


def _draw_positions(count: int, p: float) -> Tensor:
    """Which of `count` elements independent draws of probability p would take, in order; int32 where that suffices."""
    expected = count * p
    size = int(expected + 8 * math.sqrt(expected) + 16)  # eight standard deviations: the loop below ends at once
    drawn, end = [], -1
    while end < count:
        gaps = torch.rand(size).neg_().log1p_().mul_(1.0 / math.log1p(-p)).floor_().to(torch.int64).add_(1)
        drawn.append(gaps.cumsum_(0).add_(end))
        end = int(drawn[-1][-1])
    positions = torch.cat(drawn) if len(drawn) > 1 else drawn[0]
    inside = positions[: int(torch.searchsorted(positions, count))]
    return inside.to(torch.int32 if count < 1 << 31 else torch.int64, copy=True)


def dropout_mask(drop: Tensor, shape: torch.Size) -> Tensor:
    """The mask, true where an element is kept, that `drop` stands for."""
    return zero_dropped(torch.ones(shape, dtype=torch.bool, device=drop.device), drop)


def zero_dropped(x: Tensor, drop: Tensor) -> Tensor:
    """Sets the dropped elements of a contiguous x to zero, in place."""
    if drop.dtype == torch.bool:
        return x.mul_(drop.view(x.shape))  # a mask is drawn for rows
    x.view(-1).index_fill_(0, drop.long(), 0)
    return x


def dropped(x: Tensor, drop: Tensor, factor: float) -> Tensor:
    """mask ⊙ x · factor, in new memory."""
    return zero_dropped((x * factor).contiguous(), drop)
