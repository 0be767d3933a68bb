"""What adapter_linear asks of its arguments."""

from __future__ import annotations

import torch
from torch import Tensor

from ...checks import check_device, check_floating, check_frozen, check_probability, check_vector, shape_error
from ...reference import AdapterForm
from ..hadamard_linear.checks import check_hadamard_factors


def check_adapter_linear(x: Tensor, weight: Tensor, form: AdapterForm, dropout: float) -> None:
    """Raises ValueError or TypeError that names the first argument which does not fit the adapter form."""
    if weight.dim() != 2:
        raise shape_error("weight", "[out, in]", weight)
    n, k = weight.shape
    if x.dim() == 0 or x.shape[-1] != k:
        raise shape_error("x", f"[..., {k}] to go with weight {tuple(weight.shape)}", x)
    if form.A.dim() != 2 or form.A.shape[1] != k:
        raise shape_error("form.A", f"[r, {k}]", form.A)
    r = form.A.shape[0]
    if form.B.shape != (n, r):
        raise shape_error("form.B", f"[{n}, {r}]", form.B)
    device = x.device
    for name, value in (("weight", weight), ("form.A", form.A), ("form.B", form.B)):
        check_device(name, value, device)
        check_floating(name, value)
    check_floating("x", x)
    if form.U is not None or form.V is not None:
        check_hadamard_factors("form.", form.U, form.V, weight)
    check_form_vectors(form, r, n, device)
    check_probability("dropout", dropout)
    check_frozen(weight)


def check_form_vectors(form: AdapterForm, r: int, n: int, device: torch.device) -> None:
    """Raises ValueError or TypeError that names the first scale or bias of a form which does not fit r and n."""
    check_vector("form.mid_scale", form.mid_scale, r, device)
    if isinstance(form.out_scale, Tensor) and form.out_scale.dim() > 0:
        check_vector("form.out_scale", form.out_scale, n, device)
    check_vector("form.base_scale", form.base_scale, n, device)
    check_vector("form.bias", form.bias, n, device)
