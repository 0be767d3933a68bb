"""One JSON for every bench, and the same rows as a table."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

Row = dict[str, Any]


def machine() -> dict[str, Any]:
    """Where the numbers come from, as far as they depend on it."""
    model = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    return {
        "system": platform.system(),
        "cpu": model,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "glibc_tunables": os.environ.get("GLIBC_TUNABLES", ""),
        "load_average": [round(load, 2) for load in os.getloadavg()],
    }


def versions() -> dict[str, str | None]:
    """Python and the packages that decide the numbers; None where one is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("fastadapt", "transformers", "peft", "triton", "numpy"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def commit() -> str:
    """The commit of the code that ran, with "+changes" where the working tree differs from it."""

    def git(*arguments: str) -> str:
        root = Path(__file__).resolve().parent.parent
        return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True).stdout.strip()

    try:
        head = git("rev-parse", "--verify", "--quiet", "HEAD")
        return (head or "none") + ("+changes" if git("status", "--porcelain") else "")
    except FileNotFoundError:
        return "unknown"


def write_report(path: Path, name: str, rows: Sequence[Row]) -> None:
    """Write {"name", "machine", "versions", "commit", "rows"}; a reader never sees half a file."""
    report = {"name": name, "machine": machine(), "versions": versions(), "commit": commit(), "rows": list(rows)}
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        draft.write_text(json.dumps(report, indent=1) + "\n")
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def print_table(title: str, rows: Sequence[Row], columns: Mapping[str, str]) -> None:
    """Print the columns {key: heading} of the rows."""
    table = Table(title=title)
    for heading in columns.values():
        table.add_column(heading, justify="left" if heading == next(iter(columns.values())) else "right")
    for row in rows:
        table.add_row(*(shown(row.get(key)) for key in columns))
    console = Console()
    # A pipe has no width of its own, and a table folded to 80 columns is not legible.
    (console if console.is_terminal else Console(width=150)).print(table)


def shown(value: Any) -> str:
    """A cell: three significant decimals for a ratio, whole numbers for large ones."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.3f}" if abs(value) < 100 else f"{value:.0f}"
    return str(value)
