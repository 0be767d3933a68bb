"""Forms out of forms: several adapters as one, and any adapter that is low-rank alone as a plain LoRA."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .operators.calls import without_autocast
from .reference import AdapterForm, ExpertForm, merged_weight_reference


def merged_weight(weight: Tensor, form: AdapterForm) -> Tensor:
    """W' = diag(g) W0 + W0 ⊙ (U V) + diag(h) B diag(d) A: the merge rule of every adapter form, in at least fp32.

    Shapes: weight and W' [N, K]. The result has the dtype of `weight`; F.linear(x, W', β) equals the form.
    """
    dtype = torch.promote_types(weight.dtype, torch.float32)
    tensors: dict[str, Any] = {name: v.to(dtype) for name, v in form._asdict().items() if isinstance(v, Tensor)}
    with without_autocast(weight):
        return merged_weight_reference(weight.to(dtype), form._replace(**tensors)).to(weight.dtype)


class PlainLoRA(NamedTuple):
    """ΔW = scaling · B A. Shapes: A [r, in]; B [out, r]."""

    A: Tensor
    B: Tensor
    scaling: float


def plain_lora(form: AdapterForm) -> PlainLoRA:
    """The form's low-rank path as a plain LoRA: A' = diag(d) A, B' = diag(h) B, the scalar part of h as its scaling.

    Exact; what d switches off (AdaLoRA's pruned triplets) is left out. Shapes: A' [r, in]; B' [out, r]. Raises
    ValueError for a form that scales the base path (DoRA) or every weight (HiRA): that is no low-rank addition.
    """
    if form.base_scale is not None:
        raise ValueError("it scales the base weight, which no low-rank addition can do")
    if form.U is not None:
        raise ValueError("it scales every weight by itself, which adds a matrix of full rank: merge it instead")
    scaling, vector = form.settled(form.B.shape[0])
    A, B = form.A, form.B
    if form.mid_scale is not None:
        used = form.mid_scale != 0
        A, B = A[used] * form.mid_scale[used, None], B[:, used]
    if vector is not None:
        B = B * vector[:, None]
    return PlainLoRA(A, B, scaling)


def stacked(forms: Sequence[AdapterForm], bias: Tensor | None) -> AdapterForm:
    """Adapters that are active together as one form: what each adds to the base layer, added.

        y = W0 x + b0 + Σ ((gᵢ − 1) ⊙ (W0 x) + hᵢ ⊙ (Bᵢ (dᵢ ⊙ (Aᵢ x̃))) + βᵢ − b0)

    that is g = 1 + Σ (gᵢ − 1), A and B stacked along r with hᵢ and dᵢ inside Bᵢ, and β = b0 + Σ (βᵢ − b0); U and V are
    stacked along q: Σ W0 ⊙ (Uᵢ Vᵢ) = W0 ⊙ (U V). One dropout mask serves all. Shapes: A [Σ rᵢ, in]; B [out, Σ rᵢ];
    bias b0 [out]. Raises ValueError where some but not all of those that scale the base path drop its input.
    """
    if len(forms) == 1:
        return forms[0]
    scaling = [form for form in forms if form.base_scale is not None]
    if len({form.dropout_on_base for form in scaling}) > 1:
        raise ValueError("adapters that are active together must agree on dropout_on_base")
    ups = [form.whole_up() for form in forms]
    dtype = reduce(torch.promote_types, [up.dtype for up in ups])
    base_scale: Tensor | None = None
    for form in scaling:
        # The first counts whole, each further one what it differs from 1.
        base_scale = form.base_scale if base_scale is None else base_scale + (form.base_scale - 1)  # type: ignore[operator]
    beta = bias
    for form in forms:
        if form.bias is not None and form.bias is not bias:
            added = form.bias if bias is None else form.bias - bias
            beta = added if beta is None else beta + added
    factors = [(form.U, form.V) for form in forms if form.U is not None and form.V is not None]
    return AdapterForm(
        torch.cat([form.A.to(dtype) for form in forms]),
        torch.cat([up.to(dtype) for up in ups], dim=1),
        base_scale=base_scale,
        bias=beta,
        dropout_on_base=any(form.dropout_on_base for form in scaling),
        U=torch.cat([U.to(dtype) for U, _ in factors], dim=1) if factors else None,
        V=torch.cat([V.to(dtype) for _, V in factors]) if factors else None,
    )


def stacked_experts(forms: Sequence[ExpertForm], bias: Tensor | None) -> ExpertForm:
    """Adapters that are active together on experts as one form, by the rule of `stacked`, expert by expert.

    bias: the layer's own [E, out]. Raises ValueError where more than one form makes a norm, which each would make of
    the other's weight too.
    """
    if len(forms) == 1:
        return forms[0]
    if any(form.base_scale is not None for form in forms):
        raise ValueError(
            "adapters that scale the weights of experts (DoRA) cannot be active together with others there: activate "
            "one, or merge it first"
        )
    ups, downs, beta = [], [], bias
    for form in forms:
        B = form.B * form.scaling if form.mid_scale is None else form.B * (form.mid_scale * form.scaling)[:, :, None]
        B = B * (form.out_scale[:, None] if isinstance(form.out_scale, Tensor) else form.out_scale)
        ups.append(B)
        downs.append(form.A)
        if form.bias is not None and form.bias is not bias:
            added = form.bias if bias is None else form.bias - bias
            beta = added if beta is None else beta + added
    dtype = reduce(torch.promote_types, [up.dtype for up in ups])
    count = max(len(factor) for factor in (*ups, *downs))
    return ExpertForm(
        torch.cat([A.to(dtype).expand(count, -1, -1) for A in downs], 1),
        torch.cat([B.to(dtype).expand(count, -1, -1) for B in ups], 1),
        bias=beta,
    )
