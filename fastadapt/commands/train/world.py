"""The processes of one training run, as torchrun starts them: replicas of the model that share out each step's rows."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

Result = TypeVar("Result")


class World:
    """This process among `size`, by its rank; alone, everything here is what it is given.

    Every process has to make the same calls in the same order: each of them waits for all.
    """

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    def decided(self, make: Callable[[], Result]) -> Result:
        """What `make` gives in the first process, which alone runs it; its ValueError or OSError is raised in all."""
        if self.size == 1:
            return make()
        found: list[Any] = [None, None]
        if self.first:
            try:
                found[0] = make()
            except (ValueError, OSError) as error:
                found[1] = error
        dist.broadcast_object_list(found)
        if found[1] is not None:
            raise found[1]
        decided: Result = found[0]
        return decided

    def gathered(self, value: Any) -> list[Any]:
        """The value of each process, by rank."""
        if self.size == 1:
            return [value]
        found = [None] * self.size
        dist.all_gather_object(found, value)
        return found

    def same(self, tensors: Sequence[Tensor]) -> None:
        """Writes the first process's values into the others' tensors."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor.detach(), 0)

    def sum(self, values: Sequence[float], device: torch.device) -> list[float]:
        """The sums over all processes, in float64."""
        if self.size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=device)
        dist.all_reduce(total)
        return [float(value) for value in total.tolist()]

    @torch.no_grad()
    def sum_gradients(self, parameters: Sequence[Tensor]) -> None:
        """Adds up the gradients of all processes, in fp32 and one message; without one anywhere there is none."""
        if self.size == 1 or not parameters:
            return
        has = [torch.full((1,), float(p.grad is not None), device=p.device) for p in parameters]
        grads = [(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1).float() for p in parameters]
        sizes = [grad.numel() for grad in grads]
        flat = torch.cat([*has, *grads])
        dist.all_reduce(flat)
        counts = flat[: len(parameters)].tolist()
        for p, count, grad in zip(parameters, counts, flat[len(parameters) :].split(sizes), strict=True):
            p.grad = grad.view_as(p).to(p.dtype) if count else None


@contextlib.contextmanager
def processes(device: str | None) -> Iterator[World]:
    """The processes that torchrun has started, gathered over gloo, on GPUs over NCCL; this one alone without torchrun.

    Each has a GPU of its own, of the number of its rank on its machine. Raises ValueError where they cannot be.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield World()
        return
    if not dist.is_available():
        raise ValueError(f"WORLD_SIZE is {size}, and this torch has no torch.distributed: run one process")
    if device not in (None, "cpu", "cuda"):
        raise ValueError(f"--device must be cpu or cuda, or left out, where {size} processes train, got {device!r}")
    name = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda":
        local, there = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if local >= there:
            raise ValueError(
                f"process {local} of this machine needs a GPU of its own, and there are {there}: start as many "
                "processes as there are GPUs, or take --device cpu"
            )
        torch.cuda.set_device(local)
    own = not dist.is_initialized()
    if own:
        dist.init_process_group("nccl" if name == "cuda" else "gloo")
    try:
        yield World(dist.get_rank(), size)
    finally:
        if own:
            dist.destroy_process_group()
