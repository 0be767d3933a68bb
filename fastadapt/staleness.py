"""Whether a tensor is still what it was: for everything that is kept between calls and must never be stale."""

from __future__ import annotations

import ctypes
import zlib
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
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


def content(tensor: Tensor) -> int:
    """A fingerprint of the bytes of a tensor on a CPU: a change that no version tells shows in it."""
    flat = tensor.detach().contiguous()
    size = flat.numel() * flat.element_size()
    # Not by numpy(), after which FSDP could not free the storage any more.
    return zlib.crc32((ctypes.c_char * size).from_address(flat.data_ptr())) if size else 0


class Identity:
    """Which memory a tensor is and how often it was written, remembered without keeping that memory alive."""

    def __init__(self, tensor: Tensor) -> None:
        self._pointer, self._version = tensor.data_ptr(), version(tensor)
        self._layout = tensor.dtype, tensor.shape, tensor.stride()
        self._storage = StorageWeakRef(tensor.untyped_storage())

    def of(self, tensor: Tensor) -> bool:
        """Whether a tensor is that memory still, unwritten since, as far as its `version` tells.

        While the storage is alive no other one can have its address.
        """
        return (
            tensor.data_ptr() == self._pointer
            and tensor._version == self._version
            and (tensor.dtype, tensor.shape, tensor.stride()) == self._layout
            and not self._storage.expired()
        )


class _Entry(NamedTuple):
    sources: list[Identity]
    more: tuple[Any, ...]
    made: Any

    def is_of(self, tensors: Sequence[Tensor]) -> bool:
        pairs = zip(self.sources, tensors, strict=False)
        return len(self.sources) == len(tensors) and all([source.of(tensor) for source, tensor in pairs])


def _is_untold(tensor: Tensor) -> bool:
    """Whether a tensor does not tell when it is written, or will be differentiated."""
    return tensor.is_inference() or (tensor.requires_grad and torch.is_grad_enabled())


Made = TypeVar("Made")


class Kept:
    """What is made of tensors and kept, by name, for as long as they are what they were; the `most` latest of it.

    It is made anew where a source can have changed or will be differentiated: it is another tensor or was written, it
    requires grad while gradients are recorded, or an optimizer has stepped. What versions do not tell, a write through
    `.data` or NumPy, is seen only where `forget` is called. Threads may share it.
    """

    def __init__(self, most: int = 4) -> None:
        self.most = most
        self._entries: dict[Hashable, _Entry] = {}

    def __reduce__(self) -> tuple[Any, ...]:  # copies and pickles start empty
        return Kept, (self.most,)

    def forget(self) -> None:
        self._entries = {}

    def __call__(
        self,
        name: Hashable,
        sources: Sequence[Tensor | None],
        make: Callable[[], Made],
        *more: Any,
        trained: bool = True,
    ) -> Made:
        """What `make` gives, or gave before of these sources and of `more`, what else it depends on.

        trained: whether an optimizer may have a source; what is made of frozen tensors alone outlasts its steps.
        """
        tensors = [source for source in sources if source is not None]
        if torch.compiler.is_compiling() or any([_is_untold(tensor) for tensor in tensors]):
            self._entries.pop(name, None)
            return make()
        # What is made in inference mode cannot be part of a graph later.
        more = (*more, torch.is_inference_mode_enabled(), _optimizer_steps if trained else None)
        entry = self._entries.get(name)
        if entry is None or entry.more != more or not entry.is_of(tensors):
            entry = _Entry([Identity(tensor) for tensor in tensors], more, make())
            entries = {**self._entries, name: entry}
            for oldest in list(entries)[: -self.most]:
                del entries[oldest]
            self._entries = entries
        made: Made = entry.made
        return made
