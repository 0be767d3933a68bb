"""Whether a tensor is still what it was: for everything that is kept between calls and must never be stale."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
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


class Kept:
    """A tensor that is made of others and kept, outside training, for as long as they are what they were."""

    def __init__(self) -> None:
        self._kept: tuple[tuple[Any, ...], Tensor] | None = None

    def __reduce__(self) -> tuple[Any, ...]:  # copies and pickles start empty
        return Kept, ()

    def __call__(self, sources: Sequence[Tensor | None], make: Callable[[], Tensor]) -> Tensor:
        """What `make` gives, or gave before of these sources; where a backward may follow it is made anew."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            self._kept = None
            return make()
        key = (*[identity(source) for source in sources if source is not None], optimizer_steps())
        if self._kept is None or self._kept[0] != key:
            self._kept = (key, make())
        return self._kept[1]
