"""Whether a tensor is still what it was: for everything that is kept between calls and must never be stale."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

# Fused optimizers write parameters without raising their version counter, so the versions alone would let a stale
# result pass for a fresh one: every optimizer step in the process counts as a change.
_optimizer_steps = 0


def _count_step(*_: Any) -> None:
    global _optimizer_steps
    _optimizer_steps += 1


register_optimizer_step_post_hook(_count_step)


def optimizer_steps() -> int:
    """How many steps the optimizers of this process have made."""
    return _optimizer_steps


def version(tensor: Tensor) -> int:
    """How often a tensor was written, except by fused optimizers and through `.data`; inference tensors do not tell."""
    return 0 if tensor.is_inference() else tensor._version


def identity(tensor: Tensor) -> tuple[Any, ...]:
    """Equal as long as a tensor is the same memory and its `version` is."""
    return tensor.data_ptr(), version(tensor), tensor.dtype, tensor.device
