"""Weights that are not at hand: made when somebody asks, of a quantised layer, or read off what a layer gives."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from torch import Tensor

from .ways import shape_alone

_NAME = "_fastadapt_promise"


class Promise(NamedTuple):
    """What stands behind a weight W0 [out, in] without values.

    sources: the tensors that it is made of, which tell when they are written. make: W0. products: A [r, in] ↦ W0 Aᵀ
    without making it, None where that is no cheaper.
    """

    sources: tuple[Tensor, ...]
    make: Callable[[], Tensor]
    products: Callable[[Tensor], Tensor] | None = None


def promised(rows: int, columns: int, like: Tensor, promise: Promise) -> Tensor:
    """A weight by its shape, device and dtype, which `promise_of` finds the values of."""
    weight = shape_alone(rows, columns, like)
    setattr(weight, _NAME, promise)
    return weight


def promise_of(weight: Tensor) -> Promise:
    """What makes the values of a weight; one that has them is its own."""
    found: Promise | None = getattr(weight, _NAME, None)
    return Promise((weight.detach(),), weight.detach) if found is None else found


def stored(tensors: Iterable[Tensor]) -> Iterator[Tensor]:
    """The tensors that have memory of their own: those inside of wrappers, in the place of these."""
    for tensor in tensors:
        inner: Any = getattr(tensor, "__tensor_flatten__", None)
        if inner is None:
            yield tensor.detach()
        else:
            yield from stored(getattr(tensor, name) for name in inner()[0])
