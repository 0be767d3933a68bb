"""The measured choice of a strategy: which was the fastest for a problem on this device, kept between processes.

Measurements live in one JSON file for each environment (device, driver, torch, triton, fastadapt, format of the file)
in `files.cache_directory`. The cache only ever saves time: a file that is
absent, damaged, foreign or not writable costs a line in the log and a measurement, never an error.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import re
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ...environment import processor, versions
from ...files import cache_directory, written_whole
from .stopwatch import sampled
from .strategies import STRATEGIES
from .workload import Workload

# Counted up where the text of a key, what it stands for, or what is timed, changes.
FORMAT = 3

NVIDIA_RELEASE = Path("/proc/driver/nvidia/version")

# A call takes less than an hour: larger numbers in a file are damage.
_LONGEST = 3600.0
_LOCK_SECONDS = 1.0

_log = logging.getLogger(__name__)

Times = dict[str, float]


class Key(NamedTuple):
    """What a measurement holds for: a device, and the workload with its rows rounded up to a power of two.

    Every field of the workload is part of it, also those that the cost model leaves aside: a trained bias is one more
    pass over dy in one strategy and rides on another's, so that two calls that differ in it must not share a time.
    """

    device: torch.device
    workload: Workload

    @classmethod
    def of(cls, workload: Workload, device: torch.device) -> Key:
        """The key under which the measurements of a call are kept."""
        return cls(device, workload._replace(M=row_bucket(workload.M)))

    @property
    def features(self) -> tuple[str, ...]:
        """The flags of the workload that are on."""
        return tuple([name for name, value in self.workload._asdict().items() if value is True])

    def __str__(self) -> str:
        """The name in the file, which belongs to a device already."""
        w = self.workload
        n, r = (",".join(map(str, sizes)) for sizes in (w.outputs, w.ranks))
        return f"m{w.M} k{w.K} n{n} r{r} {w.dtype} {'+'.join(self.features) or 'plain'}"


def row_bucket(rows: int) -> int:
    """The power of two that a number of rows is measured as."""
    return 1 << max(rows - 1, 0).bit_length()


def kept_in() -> Path | None:
    """Where measurements are kept; None, in memory alone, for a user without a home directory."""
    try:
        return cache_directory()
    except FileNotFoundError:
        return None


def environment(device: torch.device) -> dict[str, Any]:
    """Everything that a measurement depends on besides its key."""
    found = versions()
    common = {"format": FORMAT, **{name: found[name] for name in ("torch", "triton", "fastadapt")}}
    if device.type == "cuda":
        return {**common, "device": torch.cuda.get_device_name(device), "driver": driver()}
    return {**common, "device": f"{device.type}: {processor()}", "driver": f"{torch.get_num_threads()} threads"}


def driver() -> str:
    """The version of the GPU driver as far as it can be told: NVIDIA's release, else what the runtime reports."""
    with contextlib.suppress(OSError):
        if release := re.search(r"\d{3,}\.[\d.]+", NVIDIA_RELEASE.read_text(encoding="utf-8")):
            return release[0]
    if torch.version.hip is not None:
        return f"hip {torch.version.hip}"
    return f"cuda {getattr(torch._C, '_cuda_getDriverVersion', lambda: 'unknown')()}"


def valid_times(times: object) -> bool:
    """Whether `times` maps names of strategies, at least one, to plausible seconds."""
    return (
        isinstance(times, dict)
        and bool(times)
        and all(name in STRATEGIES for name in times)
        # NaN fails both comparisons.
        and all(isinstance(t, (int, float)) and not isinstance(t, bool) and 0 < t < _LONGEST for t in times.values())
    )


class Cache:
    """The measurements of one environment: in memory, and in a file that processes share."""

    def __init__(self, environment: dict[str, Any], directory: Path | None) -> None:
        digest = hashlib.sha256(json.dumps(environment, sort_keys=True).encode()).hexdigest()[:16]
        self.environment = environment
        self.path = None if directory is None else directory / f"strategies-{digest}.json"
        self._lock = threading.Lock()
        self._entries = self._read()

    def get(self, name: str) -> Times | None:
        return self._entries.get(name)

    def put(self, name: str, times: Times) -> None:
        """Keep an entry, and write it together with what other processes have written meanwhile."""
        with self._lock:
            self._entries = {**self._entries, name: dict(times)}
            if self.path is None:
                return
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with _exclusive(self.path.with_suffix(".lock")):
                    self._entries = {**self._read(), **self._entries}
                    self._write(self.path)
            except OSError as problem:
                _log.warning("%s cannot be written (%s): measured strategies stay in memory", self.path, problem)
                self.path = None

    def _read(self) -> dict[str, Times]:
        """The valid entries of the file."""
        if self.path is None:
            return {}
        try:
            document = json.loads(self.path.read_bytes())
            if document["environment"] != self.environment:
                raise ValueError("of another environment")
            return {name: times for name, times in document["entries"].items() if valid_times(times)}
        except FileNotFoundError:
            return {}
        # RecursionError: brackets without end.
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as problem:
            _log.warning(
                "%s is left aside and will be written anew (%s: %s)", self.path, type(problem).__name__, problem
            )
            return {}

    def _write(self, path: Path) -> None:
        text = json.dumps({"environment": self.environment, "entries": self._entries}, indent=1, sort_keys=True)
        with written_whole(path) as draft:
            draft.write_text(text + "\n", encoding="utf-8")


@contextlib.contextmanager
def _exclusive(path: Path) -> Iterator[None]:
    """Keep other processes from writing between our reading and writing.

    Where there is no lock, or its holder does not let go, we go on without: the file stays whole, and at worst an entry
    is measured again.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    with open(path, "a") as file:
        deadline = time.monotonic() + _LOCK_SECONDS
        while time.monotonic() < deadline:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.005)
            except OSError:  # a file system without locks
                break
        yield


_caches: dict[torch.device, Cache] = {}
_choices: dict[Key, str | None] = {}
# Keys for which no candidate ran: they are not tried at every call.
_hopeless: set[Key] = set()
_opening, _measuring = threading.Lock(), threading.Lock()
_revision = 0


def revision() -> int:
    """A number that changes where another choice can come out: something was measured, or forgotten."""
    return _revision


def forget() -> None:
    """Drop what is in memory; files stay."""
    global _revision
    with _measuring, _opening:
        _caches.clear()
        _choices.clear()
        _hopeless.clear()
        _revision += 1


def _cache(device: torch.device) -> Cache:
    with _opening:
        if device not in _caches:
            _caches[device] = Cache(environment(device), kept_in())
        return _caches[device]


def lookup(key: Key) -> str | None:
    """The fastest strategy that was measured for the key, None if none was."""
    if key not in _choices:
        times = _cache(key.device).get(str(key))
        _choices[key] = None if times is None else min(times, key=times.__getitem__)
    return _choices[key]


def record(key: Key, times: Mapping[str, float]) -> None:
    """Keep the seconds of each strategy for the key, in memory and on disk.

    Raises ValueError for a name that is no strategy and for seconds that are not finite and positive.
    """
    kept = dict(times)
    if not valid_times(kept):
        raise ValueError(f"times must map strategies ({', '.join(STRATEGIES)}) to positive seconds, got {kept}")
    global _revision
    _cache(key.device).put(str(key), kept)
    _choices[key] = min(kept, key=kept.__getitem__)
    _revision += 1


def best(key: Key, make_candidates: Callable[[], Mapping[str, Callable[[], object]]]) -> str | None:
    """The fastest strategy for the key: from the cache, else by running the candidates now.

    None where nothing can be measured: no candidate runs, or a CUDA graph is being captured.
    """
    choice = lookup(key)
    capturing = key.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    if choice is not None or key in _hopeless or capturing:
        return choice
    with _measuring:
        choice = lookup(key)  # another thread may have been first
        if choice is None and key not in _hopeless:
            try:
                times = measure(make_candidates(), key.device)
            except torch.OutOfMemoryError:  # there is no room for the candidates' inputs
                times = {}
            if times:
                record(key, times)
                choice = lookup(key)
            else:
                _hopeless.add(key)
    return choice


def measure(
    candidates: Mapping[str, Callable[[], object]],
    device: torch.device,
    *,
    rounds: int = 20,
    seconds: float = 1.0,
    on_failure: Callable[[str, Exception], None] | None = None,
) -> Times:
    """Median seconds of a call of each candidate, as `stopwatch.sampled` takes them: on a GPU of the device alone."""
    found = sampled(candidates, device, rounds=rounds, seconds=seconds, on_failure=on_failure)
    # No less than a clock's tick: a time is positive.
    return {name: max(statistics.median(samples.seconds), 1e-9) for name, samples in found.items()}
