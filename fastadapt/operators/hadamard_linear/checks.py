"""What hadamard_linear asks of its arguments."""

from __future__ import annotations

from torch import Tensor

from ...checks import check_device, check_floating, check_frozen, check_pair, check_vector, shape_error
from .parameters import HadamardLayer


def check_hadamard_factors(prefix: str, U: Tensor | None, V: Tensor | None, weight: Tensor) -> None:
    """Raises ValueError or TypeError unless U [out, q] and V [q, in] are both there and fit the weight, or neither."""
    check_pair((f"{prefix}U", f"{prefix}V"), U, V)
    if U is None or V is None:
        return
    n, k = weight.shape
    if U.dim() != 2 or U.shape[0] != n or U.shape[1] == 0:
        raise shape_error(f"{prefix}U", f"[{n}, q] with q at least 1", U)
    if V.shape != (U.shape[1], k):
        raise shape_error(f"{prefix}V", f"[{U.shape[1]}, {k}]", V)
    for name, value in ((f"{prefix}U", U), (f"{prefix}V", V)):
        check_device(name, value, weight.device)
        check_floating(name, value)


def check_hadamard_linear(x: Tensor, layer: HadamardLayer) -> None:
    """Raises ValueError or TypeError that names the first argument which does not fit ((W0 or 0) + W0 ⊙ (U V)) x."""
    weight, U, V, A, B, bias, _ = layer
    if weight.dim() != 2:
        raise shape_error("weight", "[out, in]", weight)
    n, k = weight.shape
    if x.dim() == 0 or x.shape[-1] != k:
        raise shape_error("x", f"[..., {k}] to go with weight {tuple(weight.shape)}", x)
    check_hadamard_factors("", U, V, weight)
    check_pair(("A", "B"), A, B)
    if A is not None and B is not None:
        if A.dim() != 2 or A.shape[1] != k:
            raise shape_error("A", f"[r, {k}]", A)
        if B.shape != (n, A.shape[0]):
            raise shape_error("B", f"[{n}, {A.shape[0]}]", B)
    for name, value in (("weight", weight), ("A", A), ("B", B)):
        if value is not None:
            check_device(name, value, x.device)
            check_floating(name, value)
    check_floating("x", x)
    check_vector("bias", bias, n, x.device)
    check_frozen(weight)
