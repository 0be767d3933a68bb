"""What a case of `fastadapt doctor`'s self-test is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from torch import Tensor

Values = dict[str, Tensor]
Normal = Callable[..., Tensor]


class Sizes(NamedTuple):
    """Tokens, features in and out, and ranks of a test: the first three are no multiples of a tile."""

    M: int
    K: int
    N: int
    R: int


@dataclass(frozen=True)
class Case(ABC):
    """A filling of an operator's arguments: how they are made, and what the operator and its formula make of them.

    covers: the operators of the registry that run in it. kernels: what they launch on Triton, by the names of their
    launchers; a kernel is called _name_kernel; none where there is only the eager implementation. limits: where "auto"
    takes another backend on a GPU than Triton.
    in_dtype: the arguments that have the tested dtype; the others are in fp32.
    draws_in_kernels: whether Triton has a dropout mask of its own.
    frozen: the arguments that take no gradient, beside the weight.
    """

    operator: ClassVar[str]
    covers: ClassVar[tuple[str, ...]]
    kernels: ClassVar[tuple[str, ...]]
    limits: ClassVar[str] = ""
    in_dtype: ClassVar[tuple[str, ...]] = ("x", "weight")
    has_gradients: ClassVar[bool] = True
    draws_in_kernels: ClassVar[bool] = True

    name: str
    frozen: tuple[str, ...] = ()
    dropout: float = 0.0

    @abstractmethod
    def values(self, normal: Normal, sizes: Sizes) -> Values:
        """The arguments. normal(*shape, std=1.0, mean=0.0) draws values that the tested dtype can hold."""

    def trains(self, name: str) -> bool:
        """Whether an argument takes a gradient."""
        return self.has_gradients and name != "weight" and name not in self.frozen

    def dropped(self, values: Values) -> Tensor:
        """A tensor of the shape that dropout acts on."""
        return values["x"]

    @abstractmethod
    def ours(self, values: Values, backend: str) -> Tensor:
        """What the operator makes of them."""

    @abstractmethod
    def reference(self, values: Values, mask: Tensor | None, p: float) -> Tensor:
        """What the formula makes of them with a dropout mask."""
