"""The JSON that every measurement is kept as: what was found, and on which machine, versions and commit."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .files import written_whole

PACKAGES = ("fastadapt", "triton", "transformers", "peft", "numpy", "safetensors")


def processor() -> str:
    """The processor's name."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text(encoding="utf-8").splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    return name


def machine() -> dict[str, Any]:
    """The machine, as far as numbers depend on it."""
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "accelerators": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "glibc_tunables": os.environ.get("GLIBC_TUNABLES", ""),
        "load_average": [round(load, 2) for load in os.getloadavg()],
    }


def versions() -> dict[str, str | None]:
    """Python, torch and the packages that matter here; None for one that is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version(), "torch": torch.__version__}
    for package in PACKAGES:
        found[package] = None
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def commit() -> str | None:
    """The commit of the checkout that this package runs from, "+changes" behind it if it differs; None without one."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=False).stdout.strip()

    try:
        head = git("rev-parse", "--verify", "--quiet", "HEAD")
        return head + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "") if head else None
    except OSError:
        return None


def new_figure(width: float, height: float) -> Any:
    """A matplotlib figure of that many inches that needs no display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Any, path: Path, dpi: int = 120) -> None:
    """Writes a figure as a picture, whole or not at all."""
    with written_whole(path) as draft:
        figure.savefig(draft, dpi=dpi)


def write_json(path: Path, name: str, rows: Sequence[dict[str, Any]], **more: Any) -> None:
    """Writes {"name", "machine", "versions", "commit", "rows", ...} whole or not at all."""
    document = {
        "name": name,
        "machine": machine(),
        "versions": versions(),
        "commit": commit(),
        "rows": list(rows),
        **more,
    }
    with written_whole(path) as draft:
        draft.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
