"""Honest ratios on a noisy machine: interleaved variants, medians over rounds, and peaks in processes of their own."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bench.tunables import TUNABLES
from fastadapt.progress import progress_bar


class Timing(NamedTuple):
    """One step: seconds on the wall, and seconds of processor time over all threads."""

    wall: float
    cpu: float


class Parts(dict[str, Timing]):
    """What a variant gives back that takes its own times: of the parts of what it does, by their names."""


class Ratio(NamedTuple):
    """A median of ratios with its 95% bootstrap interval."""

    median: float
    low: float
    high: float


def interleave(
    variants: Mapping[str, Callable[[], object]], rounds: int, seed: int = 0, *, warm: bool = False, wanted: bool = True
) -> list[dict[str, Timing]]:
    """Run every variant once a round, in an order shuffled for each round; returns the timings of each round.

    A round before the first warms up and is not counted, unless all is warm. Sequential timings drift with the
    machine's clock and load by more than the differences that are looked for; within a round the drift is common to all
    variants. A variant that gives back Parts has a timing for each of them, called "variant part". wanted: a bar.
    """
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    order = list(variants)
    shuffler = random.Random(seed)
    results: list[dict[str, Timing]] = []
    with progress_bar("rounds", (rounds + (not warm)) * len(order), wanted=wanted) as update:
        for index in range(warm, rounds + 1):
            shuffler.shuffle(order)
            timings: dict[str, Timing] = {}
            for name in order:
                update(description=f"round {index}/{rounds} {name}")
                wall, cpu = time.perf_counter(), time.process_time()
                found = variants[name]()
                whole = Timing(time.perf_counter() - wall, time.process_time() - cpu)
                parts = found.items() if isinstance(found, Parts) else ()
                timings |= {f"{name} {part}": timing for part, timing in parts} or {name: whole}
                update(advance=1)
            if index:
                results.append(timings)
    return results


def repeated(call: Callable[[], object], times: int) -> Callable[[], None]:
    """So many calls as one, for those that are shorter than a clock is good for."""

    def run() -> None:
        for _ in range(times):
            call()

    return run


def median_ratio(samples: list[float], seed: int = 0, resamples: int = 2000) -> Ratio:
    """The median of per-round ratios, and the percentile bootstrap interval of that median."""
    values = np.asarray(samples)
    picks = np.random.default_rng(seed).integers(0, len(values), size=(resamples, len(values)))
    low, high = np.quantile(np.median(values[picks], axis=1), [0.025, 0.975])
    return Ratio(float(np.median(values)), float(low), float(high))


def compare(rounds: list[dict[str, Timing]], variant: str, baselines: Sequence[str]) -> tuple[Ratio, Ratio]:
    """How many times the baseline of the same round the variant took: on the wall, and in processor time.

    The baseline of a round is the median of its several runs: its noise would be in every ratio.
    """
    wall = [t[variant].wall / statistics.median(t[name].wall for name in baselines) for t in rounds]
    cpu = [t[variant].cpu / statistics.median(t[name].cpu for name in baselines) for t in rounds]
    return median_ratio(wall), median_ratio(cpu)


def best_ratio(rounds: list[dict[str, Timing]], variant: str, baselines: Sequence[str]) -> float:
    """The variant's fastest step over the baseline's fastest: what is left where other load disturbs most rounds."""
    return min(t[variant].wall for t in rounds) / min(t[name].wall for t in rounds for name in baselines)


def peak_mb() -> float:
    """The largest resident set that this process has had, in MB of 10^6 bytes."""
    status = Path("/proc/self/status")
    if status.exists():
        # Not getrusage: its maximum is inherited from the process that started this one.
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024 / 1e6
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def forget_peak() -> None:
    """Gives back what is free, so that `peak_mb` has what comes from here on; where the system can."""
    gc.collect()
    reset = Path("/proc/self/clear_refs")
    if reset.exists():
        with contextlib.suppress(AttributeError, OSError):  # another C library than glibc, another owner
            ctypes.CDLL(None).malloc_trim(0)
            reset.write_text("5")


def run_apart(module: str, arguments: Mapping[str, Any]) -> Any:
    """Run ``python -m module`` with the arguments as JSON in a fresh process, and return the JSON of its last line.

    Memory peaks are taken so: inside one process the allocator keeps what earlier variants took.
    """
    environment = {**os.environ, "GLIBC_TUNABLES": TUNABLES, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-m", module, json.dumps(dict(arguments))]
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{module} {dict(arguments)} failed with code {done.returncode}:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])
