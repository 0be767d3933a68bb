"""`bottleneck` and its gradients."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...reference import bottleneck_reference
from ..arithmetic import cast, sum_dtype
from ..backends import resolve_backend
from ..calls import (
    applied,
    autocast_dtype,
    compute_dtype,
    in_widest,
    once_differentiable,
    rows_of,
    with_leading,
    without_autocast,
)
from ..dropout import draw_dropout, keep_probability
from ..masks import Dropout, dropout_mask
from . import op
from .checks import check_bottleneck
from .parameters import BottleneckLayer, Wants

# The kernels' own limit (fastadapt_kernels.configs), which is not imported where there is no Triton.
_MOST_HIDDEN = 128


def bottleneck(
    v: Tensor,
    down: Tensor,
    up: Tensor,
    *,
    down_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    residual: Tensor | None = None,
    scaling: float = 1.0,
    activation: str = "relu",
    groups: int = 1,
    dropout: float = 0.0,
    training: bool = False,
    backend: str = "auto",
) -> Tensor:
    """A bottleneck on a stream of tokens: out = z + s · (U dropout(φ(D v + a)) + c).

    The dropout acts on the hidden features while `training`; its mask follows torch.manual_seed and gradient
    checkpointing. With groups > 1, U is block-diagonal: the g-th slice of the hidden features feeds the g-th slice of
    the output. The residual z may be v itself, which is cheapest, another tensor, or absent.

    Shapes: v [..., K]; down D [H, K]; up U [N, H / groups]; down_bias a [H]; up_bias c [N]; residual [..., N]; out
    [..., N]. activation φ: "identity", "relu", "gelu" or "quick_gelu" (x · sigmoid(1.702 x)).
    Dtypes: the products have v's, or autocast's; the parameters may be fp32 beside it, and so may the residual, whose
    dtype is the result's.
    Gradients flow to v, the residual and all parameters. Once differentiable.
    backend: "auto", "triton" (up to 128 hidden features), "eager" or "reference".
    Raises ValueError on mismatched shapes, devices, groups, an unknown activation, a dropout outside [0, 1), a backend
    that cannot run; TypeError on dtypes that cannot be mixed.
    Source: Chen et al. 2022, arXiv:2205.13535, section 3.2; Luo et al. 2023, arXiv:2302.08106, section 3.3; Zhang et
    al. 2022, arXiv:2206.04673, section 3.

    >>> v, down, up = torch.randn(5, 16), torch.randn(4, 16), torch.randn(16, 4)
    >>> bottleneck(v, down, up, residual=v, scaling=0.1, activation="gelu").shape
    torch.Size([5, 16])
    """
    layer = BottleneckLayer(down, up, down_bias, up_bias, scaling, activation, groups)
    check_bottleneck(v, layer, residual, dropout)
    residual = _beside(residual, v)
    backend = _resolved(backend, v, layer)
    active = Dropout()
    if training and dropout > 0.0:
        with torch.no_grad():
            hidden = v.new_empty(()).expand(v.numel() // v.shape[-1], down.shape[0])
            drop = draw_dropout(hidden, dropout, "eager" if backend == "reference" else backend)
        active = Dropout(drop, dropout)
    if backend == "reference":
        return _reference(v, layer, residual, active)
    # Its gradient is then part of v's, and nothing has to add the two.
    adds_v = residual is v and v.dtype == compute_dtype(v)
    call = _Call(layer[_TENSORS:], active.p, adds_v, backend)
    # Otherwise it is a tensor of its own, also where both are v: a Function that is compiled takes none twice.
    other = None if adds_v or residual is None else residual.view_as(residual) if residual is v else residual
    out: Tensor = applied(BottleneckFunction, v, other, active.drop, call, *layer[:_TENSORS])
    return out


# How many fields of a BottleneckLayer are tensors: autograd has to see these one by one.
_TENSORS = 4


class _Call(NamedTuple):
    """What the Function has to know beside tensors: a layer's plain values, and how it runs."""

    plain: tuple[Any, ...]
    p: float
    adds_v: bool
    backend: str


class BottleneckFunction(torch.autograd.Function):
    """out = z + s · (U dropout(φ(D v + a)) + c), of which the backward computes the hidden again.

    Kept for the backward: v, the parameters and what makes the dropout mask. Once differentiable. With h̃ what U is
    applied to and e = s · mask ⊙ (Uᵀ dy) / (1 − p) ⊙ φ'(D v + a):

        dv = e D     dD = eᵀ v     da = Σ e     dU = s · dyᵀ h̃     dc = s · Σ dy     dz = dy

    adds_v: z is v itself; dv is then e D + dy, in one pass.
    """

    @staticmethod
    def forward(
        ctx: Any, v: Tensor, residual: Tensor | None, drop: Tensor | None, call: _Call, *tensors: Any
    ) -> Tensor:
        dtype, layer = compute_dtype(v), BottleneckLayer._make((*tensors, *call.plain))
        with without_autocast(v):
            rows = cast(rows_of(v), dtype)
            z = rows if call.adds_v else None if residual is None else rows_of(residual)
            out = op.bottleneck(rows, layer, z, Dropout(drop, call.p), call.backend)
        needs_v, _, _, _, *needs = ctx.needs_input_grad
        if any(ctx.needs_input_grad):
            needs_rows = needs_v or any(needs[:3])
            ctx.save_for_backward(rows if needs_rows else None, drop, *tensors[:-1])  # c is added, no more
            ctx.v_shape, ctx.call = v.shape, call
        return with_leading(out, v.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        ctx.consumed = True  # what others keep of this call's output has no graph any more
        rows, drop, *tensors = ctx.saved_tensors
        needs_v, needs_residual, _, _, *needs = ctx.needs_input_grad
        call, layer = ctx.call, BottleneckLayer._make((*tensors, None, *ctx.call.plain))
        with without_autocast(dy):
            grads = op.bottleneck_backward(
                rows_of(dy), rows, layer, Dropout(drop, call.p), call.adds_v, Wants(needs_v, *needs), call.backend
            )
        dv = None if grads.v is None else grads.v.view(ctx.v_shape)
        # The sums are in fp32: autograd casts them.
        return dv, dy if needs_residual else None, None, None, *grads[1:]


def _beside(residual: Tensor | None, v: Tensor) -> Tensor | None:
    """The residual in a dtype that goes with v's products. Raises TypeError for one that cannot be mixed."""
    dtype = compute_dtype(v)
    if residual is None or residual.dtype in (dtype, sum_dtype(v)):
        return residual
    # Under autocast it may have the other dtype of 16 bits: the two add up in float32, as PyTorch's own would.
    if autocast_dtype(v) is None or torch.promote_types(residual.dtype, dtype) != torch.float32:
        raise TypeError(
            f"residual must have the dtype of the products, {dtype}, or float32 beside 16 bits, got {residual.dtype}: "
            "cast it"
        )
    return residual.float()


def _resolved(backend: str, v: Tensor, layer: BottleneckLayer) -> str:
    """As `resolve_backend`, for as many hidden features as the kernels hold."""
    hidden = layer.down.shape[0]
    resolved = resolve_backend(backend, v, layer.down, layer.up)
    if resolved == "triton" and hidden > _MOST_HIDDEN:
        if backend == "triton":
            raise ValueError(
                f'backend "triton" takes up to {_MOST_HIDDEN} hidden features, got {hidden}: take backend="eager"'
            )
        return "eager"
    return resolved


def _reference(v: Tensor, layer: BottleneckLayer, residual: Tensor | None, dropout: Dropout) -> Tensor:
    mask, shape = None, torch.Size((*v.shape[:-1], layer.down.shape[0]))
    if dropout.drop is not None:
        mask = dropout_mask(dropout.drop, shape)
    p = 1.0 - keep_probability(dropout.p, "eager")
    return in_widest(bottleneck_reference, v, **layer._asdict(), residual=residual, mask=mask, p=p)
