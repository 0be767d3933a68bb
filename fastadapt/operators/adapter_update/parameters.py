"""What travels through adapter_update: from the public function to the implementation, and back from the backward."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Update(NamedTuple):
    """g ⊙ y + h ⊙ (B (d ⊙ (A x̃))) + c: tensors first, then plain values.

    h = scaling · out_scale; of a tied update, which has no out_scale, scaling · base_scale. An absent scale is 1.
    Shapes: A [R, K]; B [N, R]; mid_scale d [R]; out_scale, base_scale g and shift c = β − g ⊙ b0 [N].
    """

    A: Tensor
    B: Tensor
    mid_scale: Tensor | None
    out_scale: Tensor | None
    base_scale: Tensor | None
    shift: Tensor | None
    scaling: float
    tied: bool

    @property
    def vector(self) -> Tensor | None:
        """The vector part of h."""
        return self.base_scale if self.tied else self.out_scale


class Outputs(NamedTuple):
    """y' [M, N], and u = A x̃ [M, R] where it is to be kept."""

    y: Tensor
    u: Tensor | None


class Saved(NamedTuple):
    """What a backward has of its forward: x̃ where A trains, u where B, d or h does, what g multiplies where g does."""

    x: Tensor | None
    u: Tensor | None
    z: Tensor | None


class Wants(NamedTuple):
    """What a backward must give beside what is saved for: dx̃, dy and dy_dropped where g scales them, dc."""

    x: bool
    y: bool
    y_dropped: bool
    shift: bool


class Grads(NamedTuple):
    """Those that were wanted, else None; the sums over tokens in fp32. P [N, R] = scaling · dyᵀ u."""

    x: Tensor | None
    y: Tensor | None
    y_dropped: Tensor | None
    A: Tensor | None
    P: Tensor | None
    base_scale: Tensor | None
    shift: Tensor | None
