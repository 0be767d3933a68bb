"""What a measurement depends on: machine, versions, commit."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

__version__ = "0.1.0"

PACKAGES = ("triton", "transformers", "peft", "numpy", "safetensors")


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


def devices() -> list[torch.device]:
    """The CPU and every accelerator that PyTorch sees."""
    found = [torch.device("cpu")]
    found += [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    return [*found, torch.device("mps")] if torch.backends.mps.is_available() else found


def describe(device: torch.device) -> str:
    """The device in words."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        memory = properties.total_memory / 2**30
        return f"{properties.name}, {memory:.0f} GiB, capability {properties.major}.{properties.minor}"
    if device.type == "cpu":
        return f"{processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    return "Apple GPU"


def versions() -> dict[str, str | None]:
    """fastadapt, Python, torch and the packages that matter here; None for one that is not installed."""
    found: dict[str, str | None] = {
        "fastadapt": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
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
