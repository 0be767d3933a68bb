"""What is made of one x for several layers, and when it may be used again."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..operators.calls import autocast_dtype
from ..staleness import optimizer_steps, version
from .layer import Adapter

# The hooks that checkpoints and their recomputation save tensors through; torch 2.7 does not tell them.
_saving_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", lambda _: None)


def circumstances(x: Tensor) -> tuple[Any, ...]:
    """What a result for x depends on beside x itself and what makes it (`makers`)."""
    if torch.compiler.is_compiling():  # tensors have no versions while they are traced
        return ()
    # A checkpoint runs its part again, and must then make the very tensors that it made before: its hooks count.
    modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), autocast_dtype(x)
    return version(x), *modes, optimizer_steps(), _saving_hooks(True)


def makers(adapters: Sequence[Adapter], *tensors: Tensor | None) -> list[Any]:
    """What a result is made by: equal as long as it would come out the same for the same x in the same circumstances.

    tensors: what there is beside the adapters, a base weight and its bias.
    """
    found: list[Any] = []
    if torch.compiler.is_compiling():
        return found
    for adapter in adapters:
        found += (id(adapter), adapter.training, adapter.scaling, adapter.dropout, adapter.variant)
        tensors = (*tensors, *adapter._parameters.values(), *adapter._buffers.values())
    for tensor in tensors:
        if tensor is not None:
            found += (id(tensor), 0 if tensor.is_inference() else tensor._version, tensor.requires_grad)
    return found


def is_consumed(y: Tensor) -> bool:
    """Whether a backward has run through the call that made y, which others may still wait for."""
    return not torch.compiler.is_compiling() and getattr(y.grad_fn, "consumed", False)


class MadeOf:
    """What was made of one x for several layers; `forget` is called when x is gone.

    It does not keep x alive itself. The graph of what was made can, until a backward has run through it.
    """

    def __init__(self, x: Tensor, made: Any, forget: Callable[[MadeOf], None]) -> None:
        self.made = made
        self._x: Callable[[], Tensor | None]
        if torch.compiler.is_compiling():  # while x is traced it outlives what is made of it
            self._x = lambda: x
        else:
            # Not by `self`: in a circle what was made, and the x that its graph keeps, would wait for the collector.
            own = weakref.ref(self)
            self._x = weakref.ref(x, lambda _: None if (made_of := own()) is None else forget(made_of))

    def of(self, x: Tensor) -> bool:
        return self._x() is x
