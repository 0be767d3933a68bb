"""What the benches keep between runs: real data and small trained models, in fastadapt's cache directory."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from fastadapt.demo_assets import cache_directory


def cached(name: str, make: Callable[[Path], None]) -> Path:
    """The path in the cache that `make` fills, whole or not at all."""
    target = cache_directory() / name
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".download-") as scratch:
            built = Path(scratch) / "built"
            make(built)
            os.replace(built, target)
    return target
