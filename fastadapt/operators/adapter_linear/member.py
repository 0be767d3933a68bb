"""What travels through adapter_linear: from the public function to the launcher, and back from the backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from ..masks import Dropout


class Member(NamedTuple):
    """One linear layer of a group and the adapter form on it: y = g ⊙ (W0 x) + h ⊙ (B (d ⊙ (A x̃))) + β.

    h = scaling · out_scale; of a tied member, which has no out_scale, scaling · base_scale: that multiplies the sum of
    both paths. An absent scale is 1. Tensors first, then plain values.
    Shapes: weight [N, K]; A [R, K]; B [N, R]; mid_scale d [R]; out_scale, base_scale g and bias β [N].
    """

    weight: Tensor
    A: Tensor
    B: Tensor
    mid_scale: Tensor | None
    out_scale: Tensor | None
    base_scale: Tensor | None
    bias: Tensor | None
    scaling: float
    dropout_on_base: bool
    tied: bool

    @property
    def vector(self) -> Tensor | None:
        """The vector part of h."""
        return self.base_scale if self.tied else self.out_scale


class Group(NamedTuple):
    """Layers that read one x: under one dropout, with one u = A x̃ for all where they share A."""

    members: Sequence[Member]
    dropout: Dropout
    shared_A: bool

    @property
    def down_ranks(self) -> list[int]:
        """The ranks that are stacked in u [M, ΣR]: the members' own, or one for all where they share A."""
        return [member.A.shape[0] for member in (self.members[:1] if self.shared_A else self.members)]


class Needs(NamedTuple):
    """Whether x needs a gradient, and of which kinds some member's tensors do, in their order."""

    x: bool = False
    A: bool = False
    B: bool = False
    mid_scale: bool = False
    out_scale: bool = False
    base_scale: bool = False
    bias: bool = False


class Keep(NamedTuple):
    """What the forward keeps for the backward: u; what each base_scale multiplies; what a strategy makes (Outputs)."""

    u: bool
    base: bool
    made: bool


class Outputs(NamedTuple):
    """y of each member, and what was to be kept: u [M, ΣR] where it was not given, z [M, N] of each member with a
    base_scale; what the strategy makes of each member: its recomposed weight [N, K], or (d ⊙ u) Bᵀ [M, N]."""

    y: list[Tensor]
    u: Tensor | None
    z: list[Tensor | None]
    made: list[Tensor]


class Saved(NamedTuple):
    """What a backward has of its forward. x is there where an A trains, u where a B, d or h does."""

    x: Tensor | None
    u: Tensor | None
    z: Sequence[Tensor | None]
    made: Sequence[Tensor]


class Wants(NamedTuple):
    """What a backward must give beside what is saved for: dx and dβ."""

    x: bool
    bias: bool


class Grads(NamedTuple):
    """dx, and of each member dA [R, K], P [N, R] = scaling · dyᵀ u, dβ [N] = Σ dy and dg [N] in fp32.

    Of a tied member P = scaling · (g ⊙ dy)ᵀ u. The strategy "expand" gives dd [R] and dh [N] in the place of P.
    None and empty where they are not wanted.
    """

    x: Tensor | None
    A: list[Tensor]
    P: list[Tensor]
    bias: list[Tensor]
    base_scale: list[Tensor | None]
    mid_scale: list[Tensor]
    out_scale: list[Tensor]
