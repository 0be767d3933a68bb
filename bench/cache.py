"""What the benches keep between runs: real data and small trained models, in fastadapt's cache directory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from fastadapt.files import cache_directory, written_whole


def cached(name: str, make: Callable[[Path], None]) -> Path:
    """The path in the cache that `make` fills, whole or not at all."""
    target = cache_directory() / name
    if not target.exists():
        with written_whole(target) as draft:
            make(draft)
    return target
