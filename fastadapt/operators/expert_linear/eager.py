"""The eager products of experts: PyTorch's grouped_mm or a loop over segments, and nothing of the size of W0."""

from __future__ import annotations

import torch
from torch import Tensor

from ..arithmetic import cast, divisor, row_blocks, sum_dtype
from .parameters import Experts, Grads, Keep, Outputs, Saved, Wants
from .segments import Segments


def expert_linear(x: Tensor, x_dropped: Tensor | None, offsets: Tensor, experts: Experts, keep: Keep) -> Outputs:
    """y, and what is to be kept. x_dropped: x̃ where it is another tensor than x."""
    segments, g, norm, A = Segments(offsets, x.shape[0]), experts.base_scale, None, experts.A
    low = x if x_dropped is None else x_dropped
    if experts.base_squared is None or g is None or A is None:
        z = segments.product(x, experts.weight.mT)
    else:
        if x.is_cpu and x.dtype == sum_dtype(x) == A.dtype and len(A) == segments.count:
            z, products = segments.product_with(x, A, experts.weight.mT)
        else:
            z, products = segments.product(x, experts.weight.mT), base_products(experts.weight, A)
        norm = expert_norm(experts, experts.base_squared, products)
        g = g / norm
    rest = None
    if g is not None and x_dropped is not None and experts.dropout_on_base:
        dropped = segments.product(low, experts.weight.mT)
        z, rest = dropped, z - dropped  # W0 x − W0 x̃, to which g ⊙ z comes
    y, u, z = adapted(z, low, experts._replace(base_scale=g), segments, rest)
    return Outputs(y, u if keep.u else None, z if keep.z else None, norm)


def adapted(
    z: Tensor, x: Tensor, experts: Experts, segments: Segments, rest: Tensor | None = None
) -> tuple[Tensor, Tensor | None, Tensor]:
    """(g ⊙ z + rest + h ⊙ (B (d ⊙ u)) + β, u = A x, what g multiplies): in the memory of z where there is no g.

    Of tied experts g multiplies z + s · B u, which z has become then. Shapes: z and rest [S, N]; x [S, K]; u [S, R].
    """
    g, A, u = experts.base_scale, experts.A, None
    if A is not None:
        u = segments.product(x, cast(A, x.dtype).mT, low_rank=True)
        t = u if experts.mid_scale is None else segments.scaled(u, experts.mid_scale)
        if g is None or experts.tied:
            z = _add_up(z, t, experts, segments)
    y = z
    if g is not None:
        y = segments.scaled(z, g)
        if rest is not None:
            y.add_(rest)
        if u is not None and not experts.tied:
            y = _add_up(y, t, experts, segments)
    if experts.bias is not None:
        y = segments.shifted(y, experts.bias)
    return y, u, z


def _add_up(y: Tensor, t: Tensor, experts: Experts, segments: Segments) -> Tensor:
    """y + h ⊙ (B t), in place; of tied experts without the g of h."""
    assert experts.B is not None
    up = cast(experts.B, t.dtype)
    if experts.out_scale is None:
        return segments.add_product(y, t, up, experts.scaling)
    return y.add_(segments.scaled(segments.product(t, up, low_rank=True), experts.out_scale), alpha=experts.scaling)


def expert_norm(experts: Experts, base_squared: Tensor, products: Tensor) -> Tensor:
    """‖W0[e] + s·B[e] A[e]‖ by rows [E, N], in at least fp32: without a matrix of the size of W0[e].

    products: A[e] W0[e]ᵀ [E, R, N].
    Source: Liu et al. 2024, arXiv:2402.09353, section 4.3.
    """
    A, B, s = experts.A, experts.B, experts.scaling
    assert A is not None
    assert B is not None
    A, B = cast(A, products.dtype), cast(B, products.dtype)
    square = (A @ A.mT).expand(len(products), -1, -1)
    inner = torch.baddbmm(products, square, B.expand(len(products), -1, -1), beta=2.0 * s, alpha=s * s)
    squared = (inner * B).sum(1).add_(base_squared)
    return divisor(squared.clamp_(min=0.0).sqrt_())


def base_products(weight: Tensor, A: Tensor) -> Tensor:
    """A[e] W0[e]ᵀ [E, R, N] in at least fp32, without a wider copy of the weight."""
    dtype = sum_dtype(weight)
    A = cast(A, dtype)
    if weight.dtype == dtype:
        return A @ weight.mT
    products = A.new_empty(len(weight), A.shape[1], weight.shape[1])
    for matrix, down, out in zip(weight, A.expand(len(weight), -1, -1), products, strict=True):
        for rows in row_blocks(*matrix.shape):
            out[:, rows] = down @ matrix[rows].to(dtype).T
    return products


def expert_linear_backward(dy: Tensor, offsets: Tensor, experts: Experts, saved: Saved, wants: Wants) -> Grads:
    """The gradients that are wanted. experts.base_scale is g, whatever it was made of."""
    segments, dtype, g = Segments(offsets, dy.shape[0]), dy.dtype, experts.base_scale
    s, through, sums = experts.scaling, dy, sum_dtype(dy)
    scaled = None if g is None else segments.scaled(dy, g)
    on_base = g is not None and wants.dropped and experts.dropout_on_base
    if experts.tied and scaled is not None:
        through = scaled
    elif experts.out_scale is not None:
        through = segments.scaled(dy, experts.out_scale)
    dx = None
    if wants.x:
        dx = segments.product(dy if scaled is None or on_base else scaled, experts.weight)
    d_low = dA = dB = d_mid = d_out = q = None
    if experts.A is not None and experts.B is not None:
        down, up = cast(experts.A, dtype), cast(experts.B, dtype)
        if wants.x or wants.A or wants.mid_scale:
            q = segments.product(through, up.mT, low_rank=True)
            if s != 1.0:
                q *= s
            du = q if experts.mid_scale is None else segments.scaled(q, experts.mid_scale)
            if wants.x and not wants.dropped:
                assert dx is not None
                segments.add_product(dx, du, down)
            elif wants.x:
                d_low = segments.product(du, down, low_rank=True)
            if wants.A and saved.x is not None:
                dA = cast(segments.outer(_weighted(du, saved), saved.x, 1.0, len(down)), sums)
        if saved.u is not None:
            u = _weighted(saved.u, saved)
            t = u if experts.mid_scale is None else segments.scaled(u, experts.mid_scale)
            if wants.B:
                dB = cast(segments.outer(t, through, s, len(up)), sums)
            if wants.mid_scale and q is not None:
                d_mid = segments.sums(q, u, None, sums)
            if wants.out_scale:
                d_out = segments.sums(segments.product(t, up, low_rank=True), dy, None, sums).mul_(s)
    if on_base and wants.x and scaled is not None:
        on_dropped = segments.product(scaled - dy, experts.weight)
        d_low = on_dropped if d_low is None else d_low.add_(on_dropped)
    d_scale = d_bias = None
    if wants.base_scale and saved.z is not None:
        d_scale = segments.sums(dy, saved.z, saved.row_scale, sums)
    if wants.bias:
        d_bias = segments.sums(dy, None, saved.row_scale, sums)
    return Grads(dx, d_low, dA, dB, d_mid, d_out, d_scale, d_bias)


def _weighted(rows: Tensor, saved: Saved) -> Tensor:
    return rows if saved.row_scale is None else cast(rows * saved.row_scale[:, None], rows.dtype)
