"""Memory that vLLM's processes share on a CPU, and do not all give back."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

ROOT = Path("/dev/shm")


def _of_workers() -> set[Path]:
    return set(ROOT.glob("vllm_dist_*"))


@contextmanager
def given_back() -> Iterator[None]:
    """What workers of engines that start inside leave behind is gone afterwards."""
    before = _of_workers()
    try:
        yield
    finally:
        for left in _of_workers() - before:
            left.unlink()


def held_by(group: int) -> set[Path]:
    """What the processes of a group have."""
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # of one that has just ended
            if os.getpgid(int(process.name)) == group:
                lines = (process / "maps").read_text().splitlines()
                found |= {ROOT / line.partition(f"{ROOT}/")[2] for line in lines if f"{ROOT}/" in line}
    return found
