"""Times with their spread, of the device and of the host apart."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from bench.gpu.job import Desk
from fastadapt.operators.adapter_linear.stopwatch import sampled

_ROUNDS = 30
_HOST_CALLS = 5

Runs = Sequence[Callable[[], Any]]


class Timing(NamedTuple):
    """Median and quartiles of a call, in seconds; clock as in `stopwatch.Samples`; host: to issue a call, on a GPU."""

    median: float
    low: float
    high: float
    rounds: int
    clock: str
    host: float | None


def timed(
    runs: Mapping[str, Runs], desk: Desk, on_failure: Callable[[str, Exception], None] | None = None
) -> dict[str, Timing]:
    """The times of each provider, interleaved. It brings a run for each of several sets of operands, so many that the
    cache cannot hold them: a round goes through all, in one graph on a GPU."""
    alone = {name: _in_turn(own) for name, own in runs.items()}
    found = sampled(alone, desk.device, rounds=_ROUNDS, seconds=desk.seconds * len(runs), on_failure=on_failure)
    timings = {}
    for name, samples in found.items():
        seconds = sorted(max(value / len(runs[name]), 1e-9) for value in samples.seconds)
        low, high = (statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else seconds * 3)[::2]
        host = _host_seconds(runs[name][0], desk) if desk.on_gpu else None
        timings[name] = Timing(statistics.median(seconds), low, high, len(seconds), samples.clock, host)
    return timings


def _in_turn(runs: Runs) -> Callable[[], None]:
    def call() -> None:
        for run in runs:
            run()

    return call


def _host_seconds(run: Callable[[], Any], desk: Desk) -> float:
    """What issuing a call takes the host: a few at a time, which the device's queue has room for."""
    samples = []
    for _ in range(3):
        torch.cuda.synchronize(desk.device)
        start = time.perf_counter()
        for _ in range(_HOST_CALLS):
            run()
        samples.append((time.perf_counter() - start) / _HOST_CALLS)
    torch.cuda.synchronize(desk.device)
    return statistics.median(samples)
