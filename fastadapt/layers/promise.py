"""Weights that are not at hand: made when somebody asks, of a quantised layer, or read off what a layer gives."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..operators.calls import AS_IT_IS
from .ways import shape_alone

# The attribute of a weight that its promise is.
PROMISE = "_fastadapt_promise"


class Promise(NamedTuple):
    """What stands behind a weight W0 [out, in] without values.

    sources: the tensors that it is made of, which tell when they are written. make: W0. products: A [r, in] ↦ W0 Aᵀ
    without making it, None where that is no cheaper. lent: whether the weight has its values for the time of a call.
    """

    sources: tuple[Tensor, ...]
    make: Callable[[], Tensor]
    products: Callable[[Tensor], Tensor] | None = None
    lent: bool = False


def lent(weight: Tensor, promise: Promise) -> Tensor:
    """A weight that has just been made and is made again for the backward, inside of `made_again`."""
    setattr(weight, PROMISE, promise._replace(lent=True))
    return weight


def made_again(*weights: Tensor) -> AbstractContextManager[Any]:
    """Inside, what autograd saves of the weights that are lent is how to make them, in the place of their memory."""
    if not hasattr(weights[0], PROMISE) or torch.compiler.is_compiling():  # where none is
        return AS_IT_IS
    promises = [(weight, getattr(weight, PROMISE, None)) for weight in weights]
    makes = {w.untyped_storage().data_ptr(): p.make for w, p in promises if p is not None and p.lent}
    return _made_again(makes) if makes else AS_IT_IS


@contextmanager
def _made_again(makes: Mapping[int, Callable[[], Tensor]]) -> Iterator[None]:
    """makes: what makes the memory at an address again."""
    # Of the hooks only the last ones are asked: a checkpoint's have to see all else that is saved.
    outer_pack, outer_unpack = _top_hooks(True) or (_as_it_is, _as_it_is)

    def pack(tensor: Tensor) -> Any:
        make = makes.get(tensor.untyped_storage().data_ptr())
        if make is None:
            return outer_pack(tensor)
        return _Again(make, tensor.shape, tensor.stride(), tensor.storage_offset())

    def unpack(packed: Any) -> Any:
        if not isinstance(packed, _Again):
            return outer_unpack(packed)
        return packed.make().as_strided(packed.shape, packed.stride, packed.offset)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


def can_be_made_again() -> bool:
    """Whether what is saved now may be something else than memory."""
    return (
        _top_hooks is not None
        and _hooks_work()
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
    )


class _Again(NamedTuple):
    make: Callable[[], Tensor]
    shape: torch.Size
    stride: tuple[int, ...]
    offset: Any


def _as_it_is(tensor: Any) -> Any:
    return tensor


# torch 2.7 does not tell which hooks there are.
_autograd: Any = torch._C._autograd
_top_hooks: Any = getattr(_autograd, "_top_saved_tensors_default_hooks", None)
_hooks_work: Any = _autograd._saved_tensors_hooks_is_enabled


def promised(rows: int, columns: int, like: Tensor, promise: Promise) -> Tensor:
    """A weight by its shape, device and dtype, whose PROMISE has the values."""
    weight = shape_alone(rows, columns, like)
    setattr(weight, PROMISE, promise)
    return weight


def stored(tensors: Iterable[Tensor]) -> Iterator[Tensor]:
    """The tensors that have memory of their own: those inside of wrappers, in the place of these."""
    for tensor in tensors:
        inner: Any = getattr(tensor, "__tensor_flatten__", None)
        if inner is None:
            yield tensor.detach()
        else:
            yield from stored(getattr(tensor, name) for name in inner()[0])
