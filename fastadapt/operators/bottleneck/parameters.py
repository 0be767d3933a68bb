"""What travels through a bottleneck: from the public function to the launcher, and back from the backward."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class BottleneckLayer(NamedTuple):
    """s · (U dropout(φ(D v + a)) + c): tensors first, then plain values.

    With groups > 1, U has `groups` blocks on its diagonal, and `up` is these one below the other.
    Shapes: down D [H, K]; up U [N, H / groups]; down_bias a [H]; up_bias c [N].
    """

    down: Tensor
    up: Tensor
    down_bias: Tensor | None
    up_bias: Tensor | None
    scaling: float
    activation: str
    groups: int


class Wants(NamedTuple):
    """Which gradients a backward must give; all but the last need v."""

    v: bool
    down: bool
    up: bool
    down_bias: bool
    up_bias: bool


class Grads(NamedTuple):
    """Those that were wanted, else None. All but v's are sums in fp32."""

    v: Tensor | None
    down: Tensor | None
    up: Tensor | None
    down_bias: Tensor | None
    up_bias: Tensor | None
