"""Tensors that are cut into pieces: DTensors, as FSDP2 makes them, are gathered whole and filled again."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..checks import partition_error


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor."""
    return hasattr(tensor, "full_tensor")


def whole(name: str, tensor: Tensor) -> Tensor:
    """The tensor with all of its pieces; every rank has to ask. Raises ValueError for what ZeRO-3 has cut."""
    if error := partition_error(name, tensor):
        raise error
    full: Any = getattr(tensor, "full_tensor", None)
    return tensor if full is None else full()


@torch.no_grad()
def fill(tensor: Tensor, value: Tensor) -> None:
    """Copies a whole tensor, the same on every rank, into one that may be in pieces."""
    if is_sharded(tensor):
        from torch.distributed.tensor import distribute_tensor

        sharded: Any = tensor
        value = value.to(sharded.device, sharded.dtype)
        value = distribute_tensor(value, sharded.device_mesh, sharded.placements, src_data_rank=None)
    tensor.copy_(value)


def is_first() -> bool:
    """Whether this process is the one that writes for all."""
    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0
