"""What weight_norm asks of its arguments."""

from __future__ import annotations

from torch import Tensor

from ...checks import check_device, check_floating, shape_error


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


def check_products(base_squared: Tensor, base_products: Tensor, lora_A: Tensor, lora_B: Tensor) -> None:
    """Raises ValueError or TypeError that names the first of what weight_norm_squared was given that does not fit."""
    if lora_A.dim() != 2:
        raise shape_error("lora_A", "[r, in]", lora_A)
    if lora_B.dim() != 2 or lora_B.shape[1] != lora_A.shape[0]:
        raise shape_error("lora_B", f"[out, {lora_A.shape[0]}]", lora_B)
    n = lora_B.shape[0]
    if base_squared.shape != (n,):
        raise shape_error("base_squared", f"[{n}]", base_squared)
    if base_products.shape != lora_B.shape:
        raise shape_error("base_products", f"{list(lora_B.shape)}", base_products)
    values = {"base_squared": base_squared, "base_products": base_products, "lora_A": lora_A, "lora_B": lora_B}
    for name, value in values.items():
        check_floating(name, value)
        check_device(name, value, lora_A.device, "lora_A")
