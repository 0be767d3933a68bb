"""Whether a tensor is still what it was: for everything that is kept between calls and must never be stale."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

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


Made = TypeVar("Made")


class Kept(Generic[Made]):
    """What is made of tensors and kept, outside training, for as long as they are what they were."""

    def __init__(self) -> None:
        self._kept: tuple[tuple[Any, ...], list[Tensor], Made] | None = None

    def __reduce__(self) -> tuple[Any, ...]:  # copies and pickles start empty
        return Kept, ()

    def forget(self) -> None:
        self._kept = None

    def __call__(self, sources: Sequence[Tensor | None], make: Callable[[], Made], *more: Any) -> Made:
        """What `make` gives, or gave before of these sources and of `more`; where a backward may follow, or a source
        does not tell when it is written, it is made anew."""
        tensors = [source.detach() for source in sources if source is not None]
        untold = torch.is_grad_enabled() or torch.compiler.is_compiling() or any([t.is_inference() for t in tensors])
        if untold:
            self.forget()
            return make()
        key = (*[identity(tensor) for tensor in tensors], optimizer_steps(), *more)
        if self._kept is None or self._kept[0] != key:
            # The tensors are held, so that no other one gets their memory meanwhile and passes for them.
            self._kept = (key, tensors, make())
        return self._kept[2]
