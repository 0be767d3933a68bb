"""How long runs take, side by side: on a GPU the device's work alone, as replays of a CUDA graph.

A call of a layer takes the host longer than few tokens take the device. What is timed there as it is called is the
host, for every strategy alike: their order by such times says nothing of a model that replays graphs, or keeps the
device busy elsewhere.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch

_WARM_UP = 3
_FEWEST_ROUNDS = 3

_log = logging.getLogger(__name__)


class Samples(NamedTuple):
    """Seconds of each counted round; clock: "graph" for replays, "events" or "wall" for runs as they are called."""

    seconds: list[float]
    clock: str


def sampled(
    candidates: Mapping[str, Callable[[], object]],
    device: torch.device,
    *,
    rounds: int = 20,
    seconds: float = 1.0,
    on_failure: Callable[[str, Exception], None] | None = None,
) -> dict[str, Samples]:
    """The times of each candidate; one that raises is left out and told to `on_failure`.

    Each round runs all of them once in a new order, so that the device's drift is common to all; after three rounds
    `seconds` end it early. On a GPU events time the replays, each behind a write that pushes everything else out of the
    L2 cache. PyTorch's random state is left as it was.
    """
    found: dict[str, Samples] = {}
    ready: dict[str, Callable[[], object]] = {}
    shuffler = random.Random(0)
    end = None

    def failed(name: str, problem: Exception) -> None:
        found.pop(name, None)
        _log.debug("%s cannot run: %s", name, problem)
        if on_failure is not None:
            on_failure(name, problem)

    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        for name, run in candidates.items():
            try:
                ready[name], clock = replayed(run, device) if device.type == "cuda" else (run, "wall")
                found[name] = Samples([], clock)
            except Exception as problem:  # out of memory or shared memory, a compiler's refusal: all end its run
                failed(name, problem)
        stopwatch = _device_stopwatch(device) if device.type == "cuda" else _wall_seconds
        for index in range(-_WARM_UP, rounds):
            if index == 0:
                end = time.monotonic() + seconds
            if end is not None and index >= _FEWEST_ROUNDS and time.monotonic() > end:
                break
            for name in shuffler.sample(list(found), len(found)):
                try:
                    elapsed = stopwatch(ready[name])
                except Exception as problem:  # as above
                    failed(name, problem)
                    continue
                if index >= 0:
                    found[name].seconds.append(elapsed)
    return found


def replayed(run: Callable[[], object], device: torch.device) -> tuple[Callable[[], object], str]:
    """What does run's work on a GPU without its host: replays of a CUDA graph ("graph").

    Where it cannot be captured, since it waits for the device or there is no memory for a graph, run itself ("events").
    Raises what run raises.
    """
    stream = torch.cuda.Stream(device)
    # Left by whatever way, this gives the thread its stream back: after a failed capture torch.cuda.graph does not.
    with torch.cuda.device(device), torch.cuda.stream(torch.cuda.current_stream(device)):
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            # Kernels are compiled and libraries have their workspaces before the capture, which allows neither.
            run()
        torch.cuda.synchronize(device)
        graph = torch.cuda.CUDAGraph()
        try:
            # What other threads do meanwhile is no part of it, and no error.
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                run()
        except RuntimeError as problem:
            _log.debug("no CUDA graph, timed as it is called: %s", problem)
            return run, "events"
    return graph.replay, "graph"


def _wall_seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _device_stopwatch(device: torch.device) -> Callable[[Callable[[], object]], float]:
    """Seconds between two events around a run, after the L2 cache was filled with something else."""
    size = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0)
    flush = torch.empty(max(2 * size, 1 << 26), dtype=torch.int8, device=device)

    def seconds(run: Callable[[], object]) -> float:
        with torch.cuda.device(device):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            # It also keeps the device busy while the host issues what is timed.
            flush.zero_()
            start.record()
            run()
            end.record()
            end.synchronize()
        return float(start.elapsed_time(end)) / 1e3

    return seconds
