"""What adapter_update asks of its arguments."""

from __future__ import annotations

from torch import Tensor

from ...checks import check_device, check_floating, check_vector, shape_error
from ...reference import AdapterForm
from ..adapter_linear.checks import check_form_vectors


def check_adapter_update(
    y: Tensor, x: Tensor, form: AdapterForm, base_bias: Tensor | None, y_dropped: Tensor | None
) -> None:
    """Raises ValueError or TypeError that names the first argument which does not fit the adapter form."""
    if form.U is not None or form.V is not None:
        raise ValueError(
            "form.U and form.V scale the base weight, which a layer's output does not tell: add (W0 ⊙ (U V)) x to y "
            "with hadamard_linear(..., base=False), and leave both out of the form"
        )
    if form.A.dim() != 2:
        raise shape_error("form.A", "[r, in]", form.A)
    r, k = form.A.shape
    if form.B.dim() != 2 or form.B.shape[1] != r:
        raise shape_error("form.B", f"[out, {r}]", form.B)
    n = form.B.shape[0]
    if x.dim() == 0 or x.shape[-1] != k:
        raise shape_error("x", f"[..., {k}] to go with form.A {tuple(form.A.shape)}", x)
    if y.shape != (*x.shape[:-1], n):
        raise shape_error("y", f"{[*x.shape[:-1], n]}, as x and form.B have it", y)
    if y_dropped is not None and y_dropped.shape != y.shape:
        raise shape_error("y_dropped", f"{list(y.shape)}, as y has it", y_dropped)
    device = x.device
    for name, value in (("y", y), ("y_dropped", y_dropped), ("form.A", form.A), ("form.B", form.B)):
        if value is not None:
            check_device(name, value, device)
            check_floating(name, value)
    check_floating("x", x)
    check_form_vectors(form, r, n, device)
    check_vector("base_bias", base_bias, n, device)
