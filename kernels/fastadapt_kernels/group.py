"""Groups: layers that read the same x run in one launch, as tuples of operands, one entry a member."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

from torch import Tensor


class Member(NamedTuple):
    """One linear layer of a group and its adapter: y = g ⊙ (x W0ᵀ) + h ⊙ ((d ⊙ u) Bᵀ) + β with u = x̃ Aᵀ.

    Shapes: weight [N, K]; A [R, K]; B [N, R]; mid_scale d [R]; out_scale [N], and h = scaling · out_scale; base_scale g
    and bias β [N]. An absent scale is 1. weight has x's dtype, the rest that or fp32. Any strides; R may be 0.
    dropout_on_base: under dropout, y = x W0ᵀ + (g - 1) ⊙ (x̃ W0ᵀ) + h ⊙ ((d ⊙ u) Bᵀ) + β.
    """

    weight: Tensor
    A: Tensor
    B: Tensor
    mid_scale: Tensor | None
    out_scale: Tensor | None
    scaling: float
    base_scale: Tensor | None
    bias: Tensor | None
    dropout_on_base: bool = False


def uniform(values: Sequence[int]) -> tuple[int, ...]:
    """The values by member, or one value for all of them: a stride of 1 is then known when the kernel is compiled."""
    return tuple(values[:1]) if len(set(values)) <= 1 else tuple(values)


def strides(tensors: Sequence[Tensor], dim: int) -> tuple[int, ...]:
    return uniform([tensor.stride(dim) for tensor in tensors])


def matrices(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The tensors in one dtype: kernels choose among their pointers."""
    if len({tensor.dtype for tensor in tensors}) > 1:
        return tuple(tensor.float() for tensor in tensors)
    return tuple(tensors)


def vectors(tensors: Sequence[Tensor | None]) -> tuple[Tensor | None, ...] | None:
    """The vectors by member, contiguous and in one dtype, or None where no member has one."""
    if all(tensor is None for tensor in tensors):
        return None
    present = iter(matrices([tensor.contiguous() for tensor in tensors if tensor is not None]))
    return tuple(None if tensor is None else next(present) for tensor in tensors)


def offsets(sizes: Sequence[int]) -> list[int]:
    """Where each member begins when the members lie behind one another."""
    return [0, *accumulate(sizes)][:-1]
