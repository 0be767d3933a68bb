"""What travels through expert_linear: from the public function to the implementation, and back from the backward."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Experts(NamedTuple):
    """g[e] ⊙ (W0[e] x) + h[e] ⊙ (B[e] (d[e] ⊙ (A[e] x̃))) + β[e]: tensors first, then plain values.

    h = scaling · out_scale; of tied experts, which have no out_scale, scaling · base_scale. An absent scale is 1, and
    without A and B there is no low-rank path. With base_squared, ‖W0[e]‖² by rows, base_scale is DoRA's m, and
    g = m / ‖W0[e] + scaling · B[e] A[e]‖ is made here.
    Shapes: weight W0 [E, N, K]; A [E, R, K] and B [E, R, N], or [1, R, K] and [1, R, N] for one pair that all experts
    share; mid_scale d [E, R]; out_scale, base_scale g, bias β and base_squared [E, N].
    """

    weight: Tensor
    A: Tensor | None
    B: Tensor | None
    mid_scale: Tensor | None
    out_scale: Tensor | None
    base_scale: Tensor | None
    bias: Tensor | None
    base_squared: Tensor | None
    scaling: float
    tied: bool
    dropout_on_base: bool


# How many fields of Experts are tensors: autograd has to see these one by one.
TENSORS = 8


class Keep(NamedTuple):
    """What a backward will need of a forward."""

    u: bool
    z: bool


class Outputs(NamedTuple):
    """y [S, N]; u = A x̃ [S, R] and z, what g multiplies, [S, N] where they are to be kept; DoRA's norm n [E, N] where
    it was made.

    z is W0 x, without a mask on the base path; W0 x̃ with one; of tied experts the low-rank path is in it as well.
    """

    y: Tensor
    u: Tensor | None
    z: Tensor | None
    norm: Tensor | None


class Saved(NamedTuple):
    """What the gradients of parameters are made of: x̃ for dA, u for dB, dd and dh, z for dg.

    row_scale [S]: what every row of dy is to be multiplied with first, for these gradients alone.
    """

    x: Tensor | None
    u: Tensor | None
    z: Tensor | None
    row_scale: Tensor | None


class Wants(NamedTuple):
    """Which gradients a backward must give. dropped: whether x and x̃ are two tensors, with a gradient each."""

    x: bool
    dropped: bool
    A: bool
    B: bool
    mid_scale: bool
    out_scale: bool
    base_scale: bool
    bias: bool


class Grads(NamedTuple):
    """Those that were wanted, else None. x_dropped: of x̃ where it is another tensor than x; the sums are in fp32."""

    x: Tensor | None
    x_dropped: Tensor | None
    A: Tensor | None
    B: Tensor | None
    mid_scale: Tensor | None
    out_scale: Tensor | None
    base_scale: Tensor | None
    bias: Tensor | None
