"""Batches on the device that they are for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def on_device(batch: object, device: torch.device) -> dict[str, Any]:
    """A batch, the keyword arguments of a model, on its device. Raises TypeError for what is no mapping."""
    if not isinstance(batch, Mapping):
        raise TypeError(
            "batches must hold mappings of the model's keyword arguments, such as input_ids, got "
            f"{type(batch).__name__}"
        )
    return {name: _moved(value, device) for name, value in batch.items()}


def _moved(value: Any, device: torch.device) -> Any:
    """Tensors, in mappings, lists and tuples too, moved to the device; anything else as it is."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {name: _moved(item, device) for name, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_moved(item, device) for item in value)
    return value
