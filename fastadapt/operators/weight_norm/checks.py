"""What weight_norm asks of its arguments."""

from __future__ import annotations

from torch import Tensor

from ...checks import check_floating, shape_error


def check_weight_norm(weight: Tensor, lora_A: Tensor, lora_B: Tensor) -> None:
    """Raises ValueError or TypeError that names the first argument which does not fit W0 + s·B·A."""
    if weight.dim() != 2:
        raise shape_error("weight", "[out, in]", weight)
    n, k = weight.shape
    if lora_A.dim() != 2 or lora_A.shape[1] != k:
        raise shape_error("lora_A", f"[r, {k}]", lora_A)
    if lora_B.shape != (n, lora_A.shape[0]):
        raise shape_error("lora_B", f"[{n}, {lora_A.shape[0]}]", lora_B)
    for name, value in (("weight", weight), ("lora_A", lora_A), ("lora_B", lora_B)):
        check_floating(name, value)
        if value.device != weight.device:
            raise ValueError(
                f"{name} is on {value.device} but weight is on {weight.device}: move one of them with .to()"
            )
