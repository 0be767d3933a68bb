"""What travels through hadamard_linear: from the public function to the launcher, and back from the backward."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class HadamardLayer(NamedTuple):
    """((W0 or 0) + W0 ⊙ (U V)) x + B (A x) + β: tensors first, then plain values.

    base: whether W0 x is part of it. Shapes: weight W0 [N, K]; U [N, q]; V [q, K]; A [R, K]; B [N, R]; bias β [N].
    """

    weight: Tensor
    U: Tensor
    V: Tensor
    A: Tensor | None
    B: Tensor | None
    bias: Tensor | None
    base: bool


class Outputs(NamedTuple):
    """y [M, N], and u = A x [M, R] where it is to be kept and there is an A."""

    y: Tensor
    u: Tensor | None


class Wants(NamedTuple):
    """Which gradients a backward must give: dx, dU and dV, dA, dβ. dB it gives where u is saved."""

    x: bool
    factors: bool
    A: bool
    bias: bool


class Grads(NamedTuple):
    """Those that were wanted, else None. All but x's are sums in fp32."""

    x: Tensor | None
    U: Tensor | None
    V: Tensor | None
    A: Tensor | None
    B: Tensor | None
    bias: Tensor | None
