"""Where measured numbers come from, and how they are written: what every JSON of fastadapt has beside its rows."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("fastadapt", "transformers", "peft", "triton", "numpy", "safetensors")


def machine() -> dict[str, Any]:
    """The machine, as far as numbers depend on it."""
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        processor = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), processor)
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": processor,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "accelerators": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
    }


def versions() -> dict[str, str | None]:
    """Python, torch and the packages that matter here; None for one that is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version(), "torch": torch.__version__}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def commit() -> str | None:
    """The commit of a checkout that this package runs from, with "+changes" if it differs; None for an installed one."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=False).stdout.strip()

    try:
        head = git("rev-parse", "--verify", "--quiet", "HEAD")
        return head + ("+changes" if git("status", "--porcelain") else "") if head else None
    except OSError:
        return None


def write_json(path: Path, name: str, rows: list[dict[str, Any]], **more: Any) -> None:
    """Writes {"name", "machine", "versions", "commit", "rows", ...} whole or not at all."""
    document = {"name": name, "machine": machine(), "versions": versions(), "commit": commit(), "rows": rows, **more}
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".writing-") as scratch:
        draft = Path(scratch) / path.name
        draft.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        draft.replace(path)
