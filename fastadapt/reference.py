"""The specification: every operator's formula in plain PyTorch, in any dtype.

The kernels and the eager implementation are tested against this file. It computes what the formulas say, in the dtype
of its arguments and with PyTorch's own autograd, and spends no thought on speed or memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class AdapterForm(NamedTuple):
    """What an adapter adds to a linear layer, in the terms that all methods share.

        y = g ⊙ (W0 x) + h ⊙ (B (d ⊙ (A x̃))) + β        x̃ = dropout(x), on the low-rank path only

    With ``dropout_on_base`` (DoRA's published rule) and active dropout the base path sees the dropped input as well:

        y = W0 x + (g − 1) ⊙ (W0 x̃) + h ⊙ (B (d ⊙ (A x̃))) + β

    With U and V (GLoRA, HiRA) every weight is scaled by itself, which adds (W0 ⊙ (U V)) x̃ to y: a matrix of full rank
    in general, for which there is no low-rank path.

    Shapes: A [r, in], B [out, r], mid_scale d [r], out_scale scalar or [out], base_scale g [out], bias β [out],
    U [out, q], V [q, in]; r may be 0. h = scaling · out_scale. An absent scale is 1. ``bias`` is the whole β: the base
    layer's own bias is part of it. Where out_scale is the very tensor base_scale (DoRA), g scales the sum of both
    paths, which costs less.
    """

    A: Tensor
    B: Tensor
    mid_scale: Tensor | None = None
    out_scale: Tensor | float = 1.0
    base_scale: Tensor | None = None
    bias: Tensor | None = None
    dropout_on_base: bool = False
    scaling: float = 1.0
    U: Tensor | None = None
    V: Tensor | None = None

    def settled(self, n: int) -> tuple[float, Tensor | None]:
        """h = scaling · out_scale as a number and a vector [n], which is None where it would be ones."""
        if not isinstance(self.out_scale, Tensor):
            return self.scaling * self.out_scale, None
        return self.scaling, self.out_scale if self.out_scale.dim() else self.out_scale.expand(n)

    def whole_up(self) -> Tensor:
        """h ⊙ B ⊙ d [out, r], so that the low-rank path is whole_up() (A x̃)."""
        scaling, vector = self.settled(self.B.shape[0])
        B = self.B if self.mid_scale is None else self.B * self.mid_scale
        return scaling * (B if vector is None else B * vector[:, None])


def dropped(x: Tensor, mask: Tensor | None, p: float) -> Tensor:
    """x̃ = mask ⊙ x / (1 − p). Shapes: x and mask [..., K]; mask is true where an element is kept."""
    return x if mask is None else x * mask / (1.0 - p)


def adapter_linear_reference(
    x: Tensor, weight: Tensor, form: AdapterForm, *, mask: Tensor | None = None, p: float = 0.0
) -> Tensor:
    """The adapter form, as AdapterForm states it.

    Shapes: x [..., K]; weight [N, K]; mask [..., K] bool, true where kept, drawn with drop probability p; y [..., N].
    """
    x_dropped = dropped(x, mask, p)
    y = x @ weight.T
    if form.base_scale is not None:
        if form.dropout_on_base and mask is not None:
            y = y + (form.base_scale - 1) * (x_dropped @ weight.T)
        else:
            y = form.base_scale * y
    if form.U is not None and form.V is not None:
        y = y + x_dropped @ (weight * (form.U @ form.V)).T
    u = x_dropped @ form.A.T
    if form.mid_scale is not None:
        u = form.mid_scale * u
    y = y + form.scaling * form.out_scale * (u @ form.B.T)
    return y if form.bias is None else y + form.bias


def adapter_update_reference(
    y: Tensor,
    x: Tensor,
    form: AdapterForm,
    *,
    base_bias: Tensor | None = None,
    y_dropped: Tensor | None = None,
) -> Tensor:
    """The adapter form on what a base layer has given: y' = g ⊙ (y − b0) + h ⊙ (B (d ⊙ (A x̃))) + β.

    With y_dropped, y' = (y − b0) + (g − 1) ⊙ (y_dropped − b0) + h ⊙ (B (d ⊙ (A x̃))) + β.
    Shapes: y and y_dropped [..., N]; x̃ [..., K]; base_bias b0 [N].
    """
    shift = 0 if base_bias is None else base_bias
    base = y - shift
    if form.base_scale is not None:
        g = form.base_scale
        base = g * base if y_dropped is None else base + (g - 1) * (y_dropped - shift)
    u = x @ form.A.T
    if form.mid_scale is not None:
        u = form.mid_scale * u
    updated: Tensor = base + form.scaling * form.out_scale * (u @ form.B.T)
    return updated if form.bias is None else updated + form.bias


def merged_weight_reference(weight: Tensor, form: AdapterForm) -> Tensor:
    """W' = diag(g) W0 + W0 ⊙ (U V) + diag(h) B diag(d) A, so that F.linear(x, W', β) is the form without dropout.

    Shapes: weight and W' [N, K].
    """
    base = weight if form.base_scale is None else form.base_scale[:, None] * weight
    if form.U is not None and form.V is not None:
        base = base + weight * (form.U @ form.V)
    return base + form.whole_up() @ form.A


def hadamard_linear_reference(
    x: Tensor,
    weight: Tensor,
    U: Tensor,
    V: Tensor,
    A: Tensor | None = None,
    B: Tensor | None = None,
    bias: Tensor | None = None,
    base: bool = True,
) -> Tensor:
    """y = ((W0 or 0) + W0 ⊙ (U V)) x + B (A x) + β.

    Shapes: x [..., K]; weight [N, K]; U [N, q]; V [q, K]; A [r, K]; B [N, r]; bias [N]; y [..., N].
    Source: Huang et al., HiRA, ICLR 2025, section 3; Chavan et al. 2023, arXiv:2306.07967, section 3.
    """
    y = x @ (weight * (U @ V)).T
    if base:
        y = x @ weight.T + y
    if A is not None and B is not None:
        y = y + (x @ A.T) @ B.T
    return y if bias is None else y + bias


def row_squares_reference(weight: Tensor) -> Tensor:
    """‖W0‖² by rows. Shapes: weight [N, K]; result [N]."""
    return weight.square().sum(1)


def weight_norm_reference(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """Row norms n_j = ‖(W0 + s·B·A)_j‖₂.

    Shapes: weight [N, K]; lora_A [r, K]; lora_B [N, r]; n [N].
    Source: Liu et al. 2024, arXiv:2402.09353, eq. 5, with one magnitude for each output feature.
    """
    n: Tensor = (weight + scaling * (lora_B @ lora_A)).norm(dim=1)
    return n


def multi_adapter_linear_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, forms: Sequence[AdapterForm], adapter_ids: Sequence[int]
) -> Tensor:
    """Each row of x through the form that its id names, or through the base layer for -1:

        y_t = g[a] ⊙ (W0 x_t) + h[a] ⊙ (B[a] (d[a] ⊙ (A[a] x_t))) + β[a],  a = adapter_ids[t]

    Shapes: x [rows, ..., K]; weight [N, K]; bias [N], the base layer's; adapter_ids [rows]; y [rows, ..., N].
    """
    rows = []
    for row, adapter in zip(x, adapter_ids, strict=True):
        if adapter < 0:
            base = row @ weight.T
            rows.append(base if bias is None else base + bias)
        else:
            rows.append(adapter_linear_reference(row, weight, forms[adapter]))
    return torch.stack(rows) if rows else x.new_zeros(*x.shape[:-1], weight.shape[0])


class ExpertForm(NamedTuple):
    """What an adapter adds to the linear layers of experts, e being the expert of a row:

        y = g[e] ⊙ (W0[e] x) + h[e] ⊙ (B[e] (d[e] ⊙ (A[e] x̃))) + β[e]        x̃ = dropout(x), on the low-rank path only

    With base_squared (DoRA, whose norm is to be made of A and B as they are now) base_scale holds the magnitude m, and

        g[e] = m[e] / n[e],  n[e] = ‖W0[e] + scaling · B[e] A[e]‖ by rows, a constant for the gradient

    dropout_on_base and an out_scale that is the very tensor base_scale mean what they do in AdapterForm.
    Shapes: A [E, r, in], B [E, r, out], the transpose of B[e] for each expert; or [1, r, in], [1, r, out] for one pair
    that all experts share; mid_scale d [E, r], out_scale a number or [E, out], base_scale, bias β and base_squared
    ‖W0[e]‖² by rows [E, out]. h = scaling · out_scale. An absent scale is 1.
    """

    A: Tensor
    B: Tensor
    mid_scale: Tensor | None = None
    out_scale: Tensor | float = 1.0
    base_scale: Tensor | None = None
    bias: Tensor | None = None
    dropout_on_base: bool = False
    scaling: float = 1.0
    base_squared: Tensor | None = None

    def of(self, expert: int, weight: Tensor) -> AdapterForm:
        """The adapter form of one expert, whose weight [out, in] DoRA's norm needs."""
        A, B = (factor[expert if len(factor) > 1 else 0] for factor in (self.A, self.B))
        mid_scale, base_scale, bias = (
            None if value is None else value[expert] for value in (self.mid_scale, self.base_scale, self.bias)
        )
        if self.base_squared is not None and base_scale is not None:
            base_scale = base_scale / weight_norm_reference(weight, A, B.T, self.scaling).detach()
        out_scale = self.out_scale
        if out_scale is self.base_scale and base_scale is not None:
            out_scale = base_scale
        elif isinstance(out_scale, Tensor):
            out_scale = out_scale[expert]
        on_base = self.dropout_on_base
        return AdapterForm(A, B.T, mid_scale, out_scale, base_scale, bias, on_base, self.scaling)


def expert_linear_reference(
    x: Tensor,
    weight: Tensor,
    form: ExpertForm | None,
    offsets: Sequence[int],
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    p: float = 0.0,
) -> Tensor:
    """The linear layers of experts with an adapter, as ExpertForm states it, on rows that are sorted by expert.

    Expert e has the rows from offsets[e - 1] up to offsets[e]. Without a form y = W0[e] x + bias[e].
    Shapes: x [S, K]; weight [E, N, K]; bias [E, N]; mask [S, K] bool, true where kept, drawn with drop probability p;
    y [S, N].
    """
    parts, start = [], 0
    for expert, end in enumerate(offsets):
        rows = x[start:end]
        if form is None:
            y = rows @ weight[expert].T
            parts.append(y if bias is None else y + bias[expert])
        else:
            kept = None if mask is None else mask[start:end]
            one = form.of(expert, weight[expert])
            parts.append(adapter_linear_reference(rows, weight[expert], one, mask=kept, p=p))
        start = end
    return torch.cat(parts)


def expert_block_reference(
    x: Tensor,
    experts: Tensor,
    routing: Tensor,
    up: Callable[[Tensor, int], Tensor],
    gate: Callable[[Tensor], Tensor],
    down: Callable[[Tensor, int], Tensor],
) -> Tensor:
    """A gated block of experts: y_t = Σ_j routing[t, j] · down_e(gate(up_e(x_t))),  e = experts[t, j].

    up and down: the linear layer of an expert, with its adapter, of a row and the expert.
    Shapes: x [T, K]; experts [T, top] of integers; routing [T, top]; y [T, K].
    """
    rows = []
    for row, chosen, weights in zip(x, experts.tolist(), routing, strict=True):
        parts = [w * down(gate(up(row[None], e)), e)[0] for e, w in zip(chosen, weights, strict=True)]
        rows.append(torch.stack(parts).sum(0))
    return torch.stack(rows) if rows else torch.zeros_like(x)


ACTIVATIONS = {
    "identity": lambda a: a,
    "relu": torch.relu,
    "gelu": torch.nn.functional.gelu,
    "quick_gelu": lambda a: a * torch.sigmoid(1.702 * a),
}


def bottleneck_reference(
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
    mask: Tensor | None = None,
    p: float = 0.0,
) -> Tensor:
    """A bottleneck on a stream of tokens:

        out = z + s · (U dropout(φ(D v + a)) + c)

    With groups > 1 U is block-diagonal: the g-th slice of the hidden features feeds the g-th slice of the output.

    Shapes: v [..., K]; down D [H, K]; up U [N, H / groups]; down_bias a [H]; up_bias c [N]; residual z [..., N]; mask
    [..., H] bool, true where kept, drawn with drop probability p; out [..., N].
    Source: Chen et al. 2022, arXiv:2205.13535, section 3.2; Luo et al. 2023, arXiv:2302.08106, section 3.3.
    """
    hidden = v @ down.T
    hidden = ACTIVATIONS[activation](hidden if down_bias is None else hidden + down_bias)
    hidden = dropped(hidden, mask, p)
    if groups == 1:
        out = hidden @ up.T
    else:
        parts = zip(hidden.chunk(groups, -1), up.chunk(groups), strict=True)
        out = torch.cat([part @ block.T for part, block in parts], -1)
    out = scaling * (out if up_bias is None else out + up_bias)
    return out if residual is None else residual + out
