"""Shapes, dtypes and devices of what the public functions take: one voice for every refusal."""

from __future__ import annotations

import torch
from torch import Tensor

from .reference import ACTIVATIONS, AdapterForm

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def shown(value: object) -> str:
    """A value as an error message shows it: what comes from a file may be very long."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


def shape_error(name: str, required: str, value: Tensor) -> ValueError:
    return ValueError(f"{name} must have shape {required}, got {tuple(value.shape)}")


def check_probability(name: str, p: float) -> None:
    """Raises ValueError unless 0 <= p < 1."""
    if not 0.0 <= p < 1.0:
        raise ValueError(f"{name} must be in [0, 1), got {p}; 0 turns dropout off")


def check_device(name: str, value: Tensor, device: torch.device, beside: str = "x") -> None:
    """Raises ValueError when `value` lives on another device than x, or whatever it goes with."""
    if value.device != device:
        raise ValueError(f"{name} is on {value.device} but {beside} is on {device}: move one of them with .to()")


def check_floating(name: str, value: Tensor) -> None:
    """Raises TypeError unless the dtype is one that the operators compute in."""
    if value.dtype not in FLOATING:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {value.dtype}")


def check_vector(name: str, value: Tensor | None, length: int, device: torch.device, beside: str = "x") -> None:
    if value is None:
        return
    if value.shape != (length,):
        raise shape_error(name, f"[{length}]", value)
    check_device(name, value, device, beside)


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
    check_hadamard_factors("form.", form.U, form.V, weight)
    check_vector("form.mid_scale", form.mid_scale, r, device)
    if isinstance(form.out_scale, Tensor) and form.out_scale.dim() > 0:
        check_vector("form.out_scale", form.out_scale, n, device)
    check_vector("form.base_scale", form.base_scale, n, device)
    check_vector("form.bias", form.bias, n, device)
    check_probability("dropout", dropout)
    _check_frozen(weight)


def _check_frozen(weight: Tensor) -> None:
    if weight.requires_grad and torch.is_grad_enabled():
        raise ValueError("weight must be frozen, but it requires grad: call weight.requires_grad_(False)")


def _check_pair(names: tuple[str, str], first: Tensor | None, second: Tensor | None) -> None:
    if (first is None) != (second is None):
        given, missing = names if second is None else names[::-1]
        raise ValueError(f"{names[0]} and {names[1]} go together, got {given} without {missing}: give both or neither")


def check_hadamard_factors(prefix: str, U: Tensor | None, V: Tensor | None, weight: Tensor) -> None:
    """Raises ValueError or TypeError unless U [out, q] and V [q, in] are both there and fit the weight, or neither."""
    _check_pair((f"{prefix}U", f"{prefix}V"), U, V)
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


def check_hadamard_linear(
    x: Tensor, weight: Tensor, U: Tensor, V: Tensor, A: Tensor | None, B: Tensor | None, bias: Tensor | None
) -> None:
    """Raises ValueError or TypeError that names the first argument which does not fit ((W0 or 0) + W0 ⊙ (U V)) x."""
    if weight.dim() != 2:
        raise shape_error("weight", "[out, in]", weight)
    n, k = weight.shape
    if x.dim() == 0 or x.shape[-1] != k:
        raise shape_error("x", f"[..., {k}] to go with weight {tuple(weight.shape)}", x)
    check_hadamard_factors("", U, V, weight)
    _check_pair(("A", "B"), A, B)
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
    _check_frozen(weight)


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


def check_multi_adapter_linear(x: Tensor, weight: Tensor, bias: Tensor | None, tokens: int) -> None:
    """Raises ValueError or TypeError that names the first argument which does not fit a batch of `tokens` tokens."""
    if weight.dim() != 2:
        raise shape_error("weight", "[out, in]", weight)
    n, k = weight.shape
    if x.dim() == 0 or x.shape[-1] != k:
        raise shape_error("x", f"[..., {k}] to go with weight {tuple(weight.shape)}", x)
    if x.numel() // max(1, k) != tokens:
        raise ValueError(f"x has {x.numel() // max(1, k)} tokens {tuple(x.shape)} but the batch has {tokens}")
    check_floating("x", x)
    check_floating("weight", weight)
    check_device("weight", weight, x.device)
    check_vector("bias", bias, n, x.device)
    if torch.is_grad_enabled() and x.requires_grad:
        raise ValueError(
            "x requires grad, but many adapters in one batch are for inference: call under torch.no_grad()"
        )


def check_bottleneck(
    v: Tensor,
    down: Tensor,
    up: Tensor,
    down_bias: Tensor | None,
    up_bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
    groups: int,
    dropout: float,
) -> None:
    """Raises ValueError or TypeError that names the first argument which does not fit a bottleneck."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    if down.dim() != 2 or down.numel() == 0:
        raise shape_error("down", "[H, K], both at least 1", down)
    h, k = down.shape
    if v.dim() == 0 or v.shape[-1] != k:
        raise shape_error("v", f"[..., {k}] to go with down {tuple(down.shape)}", v)
    if groups < 1 or h % groups:
        raise ValueError(f"groups must divide the {h} hidden features of down, got {groups}")
    if up.dim() != 2 or up.shape[1] != h // groups:
        raise shape_error("up", f"[N, {h // groups}], a row of down for each of its columns and groups={groups}", up)
    n = up.shape[0]
    if n % groups:
        raise ValueError(f"groups must divide the {n} output features of up, got {groups}")
    device = v.device
    for name, value in (("down", down), ("up", up), ("residual", residual)):
        if value is not None:
            check_device(name, value, device, "v")
            check_floating(name, value)
    check_floating("v", v)
    check_vector("down_bias", down_bias, h, device, "v")
    check_vector("up_bias", up_bias, n, device, "v")
    if residual is not None and residual.shape != (*v.shape[:-1], n):
        raise shape_error("residual", str([*v.shape[:-1], n]), residual)
    check_probability("dropout", dropout)
