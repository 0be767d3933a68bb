"""Keeps what the microbenchmarks of test_operators.py measured, and draws it."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from bench import coverage, page, report
from bench.operators import COVERS, PLAIN_CASES
from bench.plots import Document, draw_microbench, read
from fastadapt.commands.report import write_json

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results" / "microbench.json"


def compact(raw: dict[str, Any]) -> list[report.Row]:
    """pytest-benchmark's document as one flat row for each benchmark: median and quartiles in milliseconds."""
    rows = []
    for entry in raw["benchmarks"]:
        stats = entry["stats"]
        times = {f"{name}_ms": round(stats[name] * 1e3, 4) for name in ("median", "q1", "q3")}
        rows.append({**entry["extra_info"], **times, "rounds": stats["rounds"]})
    return sorted(rows, key=lambda row: row.pop("index"))


def main(
    raw: Annotated[Path | None, typer.Argument(help="What --benchmark-json wrote; without it, measured now.")] = None,
    json_file: Annotated[Path, typer.Option("--json", help="Write the rows there, and a PNG beside it.")] = RESULTS,
) -> None:
    """The microbenchmarks (`pytest bench --benchmark-only`) as compact rows and a picture."""
    with tempfile.TemporaryDirectory() as scratch:
        if raw is None:
            raw = Path(scratch) / "raw.json"
            command = [sys.executable, "-m", "pytest", "bench", "--benchmark-only", f"--benchmark-json={raw}"]
            if code := subprocess.run(command, cwd=ROOT).returncode:
                raise typer.Exit(code)
        document = json.loads(raw.read_text(encoding="utf-8"))
    # The machine is the one that measured, whichever draws.
    covers = [*COVERS.values(), *(case.covers for case in PLAIN_CASES)]
    missing = coverage.not_covered("microbench", itertools.chain(*covers))
    write_json(json_file, "microbench", compact(document), **document["fastadapt"], not_covered=missing)
    draw_microbench(read(json_file), json_file.with_suffix(".png"))


@page.section("microbench", "Microbenchmarks")
def section(document: Document) -> str:
    return "Each operator by provider; medians."
