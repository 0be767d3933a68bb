"""What a bottleneck asks of its arguments."""

from __future__ import annotations

from torch import Tensor

from ...checks import check_device, check_floating, check_probability, check_vector, shape_error
from ...reference import ACTIVATIONS
from .parameters import BottleneckLayer


def check_bottleneck(v: Tensor, layer: BottleneckLayer, residual: Tensor | None, dropout: float) -> None:
    """Raises ValueError or TypeError that names the first argument which does not fit a bottleneck."""
    down, up, down_bias, up_bias, _, activation, groups = layer
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    if down.dim() != 2 or down.numel() == 0:
        raise shape_error("down", "[H, K], both at least 1", down)
    h, k = down.shape
    if v.dim() == 0 or v.shape[-1] != k:
        raise shape_error("v", f"[..., {k}] to go with down {tuple(down.shape)}", v)
    if groups < 1 or h % groups:
        raise ValueError(f"groups must divide the {h} hidden features of down, got {groups}")
    if up.dim() != 2 or up.shape[1] != h // groups:
        raise shape_error("up", f"[N, {h // groups}], a row of down for each of its columns and groups={groups}", up)
    n = up.shape[0]
    if n % groups:
        raise ValueError(f"groups must divide the {n} output features of up, got {groups}")
    device = v.device
    for name, value in (("down", down), ("up", up), ("residual", residual)):
        if value is not None:
            check_device(name, value, device, "v")
            check_floating(name, value)
    check_floating("v", v)
    check_vector("down_bias", down_bias, h, device, "v")
    check_vector("up_bias", up_bias, n, device, "v")
    if residual is not None and residual.shape != (*v.shape[:-1], n):
        raise shape_error("residual", str([*v.shape[:-1], n]), residual)
    check_probability("dropout", dropout)
