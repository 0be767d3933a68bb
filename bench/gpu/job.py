"""A job: what the worker is asked for at a time, and what it has to work with."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import torch

from bench.report import Row


class DeviceLostError(RuntimeError):
    """The device takes no more work, since a kernel broke it: nothing after that is a result."""


class Rates(NamedTuple):
    """What a device reaches: bytes a second in a copy, operations a second in a product by dtype (fp64 among them)."""

    device_type: str
    bytes: float
    flops: Mapping[str, float]

    @classmethod
    def of(cls, device_type: str, ceilings: Mapping[str, float]) -> Rates:
        return cls(device_type, ceilings["bytes"], {name: ceilings[name] for name in ceilings if name != "bytes"})


# Until they are measured: an H200, and one core of a server's CPU.
GUESSED = {
    "cuda": Rates("cuda", 4.3e12, {"bf16": 780e12, "fp16": 780e12, "fp32": 50e12, "fp64": 50e12}),
    "cpu": Rates("cpu", 10e9, {"bf16": 20e9, "fp16": 5e9, "fp32": 60e9, "fp64": 30e9}),
}


def nothing(_: str) -> None:
    """Nobody listens."""


@dataclass(frozen=True)
class Desk:
    """What a job works with. seconds: of timing for each provider. at: told what is done next, before it can break.

    left_out: provider -> why it is not run. wrong: strategies that failed a check, whose times are not for the tuner.
    """

    device: torch.device
    seconds: float = 0.2
    at: Callable[[str], None] = nothing
    left_out: Mapping[str, str] = field(default_factory=dict)
    tune: bool = False
    wrong: frozenset[str] = frozenset()

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def finish(self) -> None:
        """Waits for the device, so that what breaks is told where it broke. Raises RuntimeError for what broke."""
        if self.on_gpu:
            torch.cuda.synchronize(self.device)


class Job(ABC):
    """part: the list of the document that its rows go to."""

    part: ClassVar[str]

    @property
    def covers(self) -> tuple[str, ...]:
        """The operators of the registry that run in it."""
        return ()

    @property
    @abstractmethod
    def label(self) -> str:
        """Its name, unlike any other's."""

    @abstractmethod
    def run(self, desk: Desk) -> list[Row]:
        """Does it. What a provider cannot do is a row; raises DeviceLostError where nothing can be done any more."""

    @abstractmethod
    def expected(self, rates: Rates) -> float:
        """Seconds that it will take at these rates, with everything compiled."""

    def providers(self, device_type: str) -> list[str]:
        """Who is asked, by the names that `Desk.at` is told; without one that broke the worker the job is done anew."""
        return []

    def to_compile(self, device_type: str) -> list[str]:
        """The providers whose kernels `compile` brings into Triton's cache."""
        return []

    def compile(self, provider: str, desk: Desk) -> None:
        """Runs a provider of `to_compile` once."""
        raise ValueError(f"{self.label} has nothing to compile, got {provider!r}: ask for one of to_compile()")


def reason(problem: BaseException) -> str:
    """An exception in a line."""
    if isinstance(problem, torch.OutOfMemoryError):
        return "out of memory"
    lines = str(problem).strip().splitlines()
    return f"{type(problem).__name__}: {lines[0][:300] if lines else ''}"


def require_alive(desk: Desk, problem: Exception) -> None:
    """Raises DeviceLostError where an exception has left the device unusable; frees what an allocation may lack."""
    if not desk.on_gpu:
        return
    try:
        torch.cuda.synchronize(desk.device)
        torch.cuda.empty_cache()
    except RuntimeError as lost:
        raise DeviceLostError(reason(problem)) from lost
