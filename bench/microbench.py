"""Keeps what the microbenchmarks of test_operators.py measured, and draws it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from bench import report
from bench.plots import draw_microbench, read
from fastadapt.report import write_json

ROOT = Path(__file__).resolve().parent.parent


def compact(raw: dict[str, Any]) -> list[report.Row]:
    """pytest-benchmark's document as one flat row for each benchmark: medians and quartiles, in milliseconds."""
    rows = []
    for entry in raw["benchmarks"]:
        stats = entry["stats"]
        times = {
            f"{name}_ms": round(stats[key] * 1e3, 4) for name, key in (("median", "median"), ("q1", "q1"), ("q3", "q3"))
        }
        rows.append({**entry["extra_info"], **times, "rounds": stats["rounds"]})
    return sorted(rows, key=lambda row: row.pop("index"))


def measure(target: Path) -> None:
    """Runs the microbenchmarks in a process of its own, pytest-benchmark's JSON to `target`."""
    command = [sys.executable, "-m", "pytest", "bench", "--benchmark-only", f"--benchmark-json={target}", "-q"]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": ""})
    if done.returncode:
        raise typer.Exit(done.returncode)


def main(
    raw: Annotated[
        Path | None, typer.Argument(help="What `pytest bench --benchmark-json` wrote; measured now without.")
    ] = None,
    json_file: Annotated[Path, typer.Option("--json", help="Write the rows there and a PNG beside it.")] = (
        ROOT / "bench" / "results" / "microbench.json"
    ),
) -> None:
    """The microbenchmarks of the operators as compact rows and a plot."""
    with tempfile.TemporaryDirectory() as scratch:
        if raw is None:
            raw = Path(scratch) / "raw.json"
            measure(raw)
        rows = compact(json.loads(raw.read_text(encoding="utf-8")))
    write_json(json_file, "microbench", rows)
    draw_microbench(read(json_file), json_file.with_suffix(".png"))
