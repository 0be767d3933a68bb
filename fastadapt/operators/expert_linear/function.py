"""`expert_linear`, the adapter form on rows that are sorted by expert, and its gradients."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...reference import ExpertForm, expert_linear_reference
from ..arithmetic import cast
from ..backends import resolve_backend
from ..calls import applied, check_same_dtype, compute_dtype, in_widest, once_differentiable, without_autocast
from ..dropout import draw_dropout, keep_probability
from ..masks import dropout_mask, dropped, zero_dropped
from . import op
from .checks import check_expert_linear
from .parameters import TENSORS, Experts, Keep, Saved, Wants


def expert_linear(
    x: Tensor,
    weight: Tensor,
    form: ExpertForm | None,
    offsets: Tensor,
    *,
    bias: Tensor | None = None,
    dropout: float = 0.0,
    training: bool = True,
    backend: str = "auto",
) -> Tensor:
    """The frozen linear layers of experts with an adapter, on rows that are sorted by expert:

        y_s = g[e] ⊙ (W0[e] x_s) + h[e] ⊙ (B[e] (d[e] ⊙ (A[e] x̃_s))) + β[e],  offsets[e − 1] ≤ s < offsets[e]

    form as ExpertForm states it; None for W0[e] x_s + bias[e] alone. Nothing of the size of W0 is made or kept. Weights
    that are stored as [E, K, N] go in as weight.mT, a view. dropout, while training, drops elements of x on the
    low-rank path.
    Triton kernels on a GPU, without a word to the host; else eager PyTorch: F.grouped_mm where it computes in these
    dtypes and strides, one product an expert elsewhere. The mask of dropout is PyTorch's for both, and x̃ a tensor
    of its own.
    Shapes: x [S, K]; weight [E, N, K], any strides; offsets [E] of integers, the last of them S; bias [E, N];
    y [S, N].
    Dtypes: weight has x's dtype, or autocast's takes the place of both; the form's tensors may be fp32 beside 16 bits.
    Gradients flow to x and to every tensor of the form but base_squared; weight is frozen. Once differentiable.
    Raises ValueError on mismatched shapes or devices, a weight that requires grad, a backend that cannot run; TypeError
    on dtypes that cannot be mixed.
    Source: Hu et al. 2021, arXiv:2106.09685, section 4.1, for each expert of Shazeer et al. 2017, arXiv:1701.06538.

    >>> x, weight = torch.randn(5, 16), torch.randn(3, 8, 16)
    >>> form = ExpertForm(torch.randn(3, 4, 16), torch.zeros(3, 4, 8))
    >>> expert_linear(x, weight, form, torch.tensor([2, 2, 5])).shape
    torch.Size([5, 8])
    """
    check_expert_linear(x, weight, form, offsets, bias, dropout)
    check_same_dtype(x, weight)
    backend = resolve_backend(backend, x, weight)
    dropping = form is not None and training and dropout > 0.0
    if backend == "reference":
        mask = dropout_mask(draw_dropout(x, dropout, "eager"), x.shape) if dropping else None
        p = 1.0 - keep_probability(dropout, "eager")
        return in_widest(expert_linear_reference, x, weight, form, offsets.tolist(), bias=bias, mask=mask, p=p)
    experts = experts_of(weight, form, bias)
    drop = draw_dropout(x, dropout, "eager") if dropping else None
    call = _Call(experts[TENSORS:], dropout if dropping else 0.0, compute_dtype(x), torch.is_grad_enabled(), backend)
    y: Tensor = applied(ExpertLinearFunction, x, cast(offsets, torch.int32), drop, call, *experts[:TENSORS])
    return y


def experts_of(weight: Tensor, form: ExpertForm | None, bias: Tensor | None) -> Experts:
    """A weight with its form as what travels."""
    if form is None:
        return Experts(weight, None, None, None, None, None, bias, None, 1.0, False, False)
    out_scale: Tensor | None = None
    scaling = form.scaling
    if isinstance(form.out_scale, Tensor):
        out_scale = form.out_scale
    else:
        scaling = scaling * form.out_scale
    tied = out_scale is not None and out_scale is form.base_scale
    return Experts(
        weight,
        form.A,
        form.B,
        form.mid_scale,
        None if tied else out_scale,
        form.base_scale,
        form.bias,
        form.base_squared,
        scaling,
        tied,
        form.dropout_on_base,
    )


class _Call(NamedTuple):
    """What the Function has to know beside tensors: plain values, the drop probability, the dtype of the products,
    whether a backward can follow, and what runs it.
    """

    plain: tuple[Any, ...]
    p: float
    dtype: torch.dtype
    backward: bool
    backend: str


def keep_for(experts: Experts, needs: Experts) -> Keep:
    """What the gradients that are needed need of a forward."""
    u = experts.A is not None and bool(needs.B or needs.mid_scale or needs.out_scale)
    return Keep(u, bool(needs.base_scale))


class ExpertLinearFunction(torch.autograd.Function):
    """y = g[e] ⊙ (W0[e] x) + h[e] ⊙ (B[e] (d[e] ⊙ (A[e] x̃))) + β[e], with the smallest set of saved tensors.

    Kept for the backward: x only where A trains, u = A x̃ only where B, d or h does, what g multiplies only where it
    does, and what draws the mask. Once differentiable. With q = (h ⊙ dy) B, sums over the rows of an expert each:

        dx = (g ⊙ dy) W0 + mask ⊙ ((d ⊙ q) A)     dA = Σ (d ⊙ q) x̃ᵀ     dB = Σ (d ⊙ u) (h ⊙ dy)ᵀ
        dd = Σ q ⊙ u     dh = Σ dy ⊙ (B (d ⊙ u))     dg = Σ dy ⊙ z     dm = dg / n     dβ = Σ dy
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, offsets: Tensor, drop: Tensor | None, call: _Call, *tensors: Any) -> Tensor:
        experts = Experts._make((*tensors, *call.plain))
        needs = Experts._make((*ctx.needs_input_grad[4:], *call.plain))
        with without_autocast(x):
            rows = cast(x, call.dtype)
            experts = experts._replace(weight=cast(experts.weight, call.dtype))
            low = None if drop is None else dropped(rows, drop, 1.0 / keep_probability(call.p, "eager"))
            # needs_input_grad does not know of no_grad, where nothing needs to be kept.
            keep = keep_for(experts, needs) if call.backward else Keep(False, False)
            y, u, z, norm = op.expert_linear(rows, low, offsets, experts, keep, call.backend)
        if call.backward:
            ctx.save_for_backward(rows if needs.A else None, u, z, norm, offsets, drop, *without_shift(tensors))
            ctx.call = call
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, u, z, norm, offsets, drop, *tensors = ctx.saved_tensors
        call = ctx.call
        needs = Experts._make((*ctx.needs_input_grad[4:], *call.plain))
        experts = Experts._make((*tensors, *call.plain))
        factor = 1.0 / keep_probability(call.p, "eager")
        with without_autocast(dy):
            experts = normed(experts._replace(weight=cast(experts.weight, call.dtype)), norm)
            low = dropped(x, drop, factor) if drop is not None and x is not None else x
            wants = wants_of(needs, ctx.needs_input_grad[0], drop is not None)
            saved = Saved(low, u, z, None)
            grads = op.expert_linear_backward(
                cast(dy, call.dtype).contiguous(), offsets, experts, saved, wants, call.backend
            )
            dx = grads.x
            if grads.x_dropped is not None and dx is not None:
                dx += zero_dropped(grads.x_dropped, drop).mul_(factor)
        scale = by_norm(grads.base_scale, norm)
        factors = grads.A, grads.B, grads.mid_scale, grads.out_scale
        return dx, None, None, None, None, *factors, scale, grads.bias, None


def without_shift(tensors: tuple[Any, ...]) -> list[Any]:
    """The tensors of experts that a backward reads: β is added, no more, and ‖W0‖² is in the norm that was made."""
    kept = Experts._make((*tensors, 1.0, False, False))._replace(bias=None, base_squared=None)
    return list(kept[:TENSORS])


def wants_of(needs: Experts, needs_x: bool, drops: bool) -> Wants:
    """The gradients that a backward has to give, where autograd needs these."""
    return Wants(needs_x, drops, *[bool(need) for need in needs[1 : TENSORS - 1]])


def normed(experts: Experts, norm: Tensor | None) -> Experts:
    """The experts with g = m / n in the place of m, where n was made."""
    return experts if norm is None else experts._replace(base_scale=by_norm(experts.base_scale, norm))


def by_norm(value: Tensor | None, norm: Tensor | None) -> Tensor | None:
    """m / n = g, and dg / n = dm."""
    return value if value is None or norm is None else value / norm
