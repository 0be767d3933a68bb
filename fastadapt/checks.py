"""Shapes, dtypes and devices of what the public functions take: one voice for every refusal."""

from __future__ import annotations

import torch
from torch import Tensor

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def shown(value: object) -> str:
    """A value as an error message shows it: what comes from a file may be very long."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


def printable(text: str) -> str:
    """Text with escapes in the place of what a terminal would obey: what comes from a file may hold anything."""
    if text.isprintable():
        return text
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


def partition_error(name: str, value: Tensor) -> ValueError | None:
    """The error for a parameter that DeepSpeed's ZeRO-3 has cut and not gathered, None for any other tensor."""
    shape = getattr(value, "ds_shape", None)
    if shape is None or tuple(shape) == tuple(value.shape):
        return None
    return ValueError(
        f"{name} is cut into pieces by DeepSpeed's ZeRO-3, which fastadapt does not gather: train with ZeRO-1 or "
        "ZeRO-2, DDP or FSDP2 (fully_shard)"
    )


def check_in_one_piece(name: str, value: Tensor, why: str) -> None:
    """Raises ValueError for a DTensor, as fully_shard makes them; why: what the tensor is needed whole for."""
    if hasattr(value, "full_tensor"):
        raise ValueError(
            f"{name} is cut into pieces (DTensor), and {why}: train it under DistributedDataParallel, or another "
            "method under fully_shard"
        )


def shape_error(name: str, required: str, value: Tensor) -> ValueError:
    return partition_error(name, value) or ValueError(f"{name} must have shape {required}, got {tuple(value.shape)}")


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


def check_frozen(weight: Tensor) -> None:
    if weight.requires_grad and torch.is_grad_enabled():
        raise ValueError("weight must be frozen, but it requires grad: call weight.requires_grad_(False)")


def check_pair(names: tuple[str, str], first: Tensor | None, second: Tensor | None) -> None:
    if (first is None) != (second is None):
        given, missing = names if second is None else names[::-1]
        raise ValueError(f"{names[0]} and {names[1]} go together, got {given} without {missing}: give both or neither")
