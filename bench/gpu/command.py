"""The command: `python -m bench gpu --seconds 480 --json FILE`."""

from __future__ import annotations

import itertools
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from bench import coverage, page
from bench.gpu import section
from bench.gpu.conductor import Plan, conduct
from bench.gpu.crew import StartError
from bench.gpu.job import GUESSED, Job
from bench.gpu.journal import Journal, case_of
from bench.gpu.needs import there
from bench.gpu.program import program
from bench.operators import DTYPES
from bench.plots import Document
from bench.report import Row
from fastadapt.environment import describe, versions
from fastadapt.operators.adapter_linear import tuner
from fastadapt.operators.adapter_linear.strategies import STRATEGIES

PROGRAM = "bench.gpu.program.program"
TIMING = {"cuda": 0.2, "cpu": 0.02}


def device_facts(device: torch.device) -> dict[str, Any]:
    """The device in words, and the versions that its numbers depend on."""
    facts: dict[str, Any] = {"name": describe(device), "type": device.type}
    if device.type == "cuda":
        facts |= {"driver": tuner.driver(), "runtime": torch.version.cuda or torch.version.hip}
    return facts


def chosen_device(name: str) -> torch.device:
    """The device of that name, by its index; a GPU if there is one, where none is named.

    Raises typer.BadParameter for one that is not here, and for a GPU without Triton.
    """
    device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type not in ("cuda", "cpu"):
        raise typer.BadParameter(f"--device must be cuda or cpu, got {name}")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise typer.BadParameter("--device cuda needs a GPU that PyTorch sees: take --device cpu")
        if not there("triton"):
            raise typer.BadParameter("--device cuda needs Triton, which is what is measured: pip install triton")
        device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
    return device


def main(
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the document there, a PNG beside it.")] = None,
    device_name: Annotated[str, typer.Option("--device", help="cuda or cpu; a GPU if there is one.")] = "",
    seconds: Annotated[float, typer.Option(min=1.0, help="The budget, from here to the end.")] = 480.0,
    tune: Annotated[bool, typer.Option(help='Keep the times for strategy="auto" on this machine.')] = False,
    listed: Annotated[bool, typer.Option("--list", help="Only say what would run, in order.")] = False,
) -> None:
    """Check every operator on a GPU, measure its ceilings, time strategies beside others: all within a budget.

    What matters most comes first, and the file is whole after every job. Leaves with exit code 1 if a check fails, a
    job breaks or a kernel does not run.
    """
    console = Console()
    if listed:
        kind = torch.device(device_name or "cuda").type
        print_list(console, program(kind), kind, seconds)
        return
    device = chosen_device(device_name)
    jobs = program(device.type)
    plan = Plan(jobs, PROGRAM, str(device), seconds, timing=TIMING[device.type], tune=tune)
    plan.workers = os.cpu_count() or 1 if device.type == "cuda" else 0
    facts = device_facts(device)
    for name, value in {**facts, **versions()}.items():
        console.print(f"{name:<12} {value or 'not installed'}", highlight=False, markup=False)
    left_out = coverage.not_covered("gpu", itertools.chain.from_iterable(job.covers for job in jobs))
    journal = Journal(json_file, device=facts, budget=seconds, not_covered=left_out)
    perform(plan, journal, console)


def perform(plan: Plan, journal: Journal, console: Console) -> None:
    """Does the jobs of a plan and prints what came out; a signal to end leaves the journal whole.

    Raises typer.Exit(1) where something failed, or where a worker cannot even begin.
    """
    before = signal.signal(signal.SIGTERM, _terminated)
    try:
        conduct(plan, journal)
    except StartError as problem:
        console.print(f"a worker cannot begin, and nothing was measured: {problem}", style="red", markup=False)
        raise typer.Exit(1) from problem
    finally:
        signal.signal(signal.SIGTERM, before)
        journal.document["seconds"] = time.monotonic() - plan.started
        journal.write()
    if journal.path is not None:
        draw(journal.document, journal.path.with_suffix(".png"), console)
    print_results(console, journal.document)
    failures = journal.failures()
    for failure in failures:
        console.print(f"FAILED {failure}", style="red", markup=False, highlight=False)
    if plan.tune:
        console.print(f"the tuner's measurements are in {tuner.kept_in() or 'memory alone'}")
    if failures:
        raise typer.Exit(1)


def _terminated(*_: Any) -> None:
    raise SystemExit(128 + signal.SIGTERM)


def draw(document: Document, path: Path, console: Console) -> None:
    """The picture of a document that has ceilings and times, where matplotlib is installed."""
    if "bytes" not in document["ceilings"] or not any(row["ms"] for row in document["rows"]):
        return
    try:
        from bench.plots import draw_gpu

        draw_gpu(document, path)
    except ModuleNotFoundError as problem:
        console.print(f"no picture: {problem}", markup=False)


# Others than our strategies, as they are called in a line.
_OTHERS = {
    "ours": "automatic",
    "peft_fp32": "PEFT",
    "peft": "PEFT bf16",
    "unsloth": "by hand",
    "compile": "compiled",
    "punica": "punica",
    "loop": "loop",
    "reference": "formula",
}


def lines(rows: Sequence[Row]) -> list[str]:
    """A line for each case: our fastest, and it and others as multiples of the case's baseline."""
    found = []
    for (operator, *_), each in itertools.groupby(rows, key=case_of):
        group = {row["provider"]: row for row in each if row["ms"]}
        first = next(iter(group.values()), None)
        if first is None:
            continue
        name = " ".join(str(part) for part in (operator, first["case"], first["layers"], first["M"]) if part)
        ours = [row for key, row in group.items() if key in (*STRATEGIES, "ours", "triton", "eager")]
        parts = [f"{_OTHERS[key]} {row['x']:.2f}" for key, row in group.items() if key in _OTHERS and row["x"]]
        if ours:
            best = min(ours, key=lambda row: row["ms"])
            parts.insert(0, f"{best['provider']} {best['ms']:.4g} ms = {best['x'] or 0:.2f} x {best['baseline']}")
            parts += [f"host {best['host_us']:.0f} µs"] if best["host_us"] else []
            parts += [f"{best['of_roofline']:.0%} of the roofline"] if best["of_roofline"] else []
        found.append(f"{name}: {', '.join(parts)}")
    return found


def print_results(console: Console, document: Document) -> None:
    """The times, the ceilings, the counters, and what was not run."""
    for line in lines(document["rows"]):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    if found := document["ceilings"]:
        rates = ", ".join(f"{name} {found[name] / 1e12:.3g}" for name in (*DTYPES, "fp64") if name in found)
        console.print(f"ceilings: {found.get('bytes', 0) / 1e9:.4g} GB/s in a copy; TFLOP/s in a product: {rates}")
    for row in document["counters"]:
        shown = row["note"] or (
            f"{row['us']:.0f} µs, {row['read_mib'] or 0:.0f} + {row['written_mib'] or 0:.0f} MiB (counted: "
            f"{row['counted_mib'] or 0:.0f}), tensor pipe {row['tensor_percent'] or 0:.0f}%"
        )
        console.print(f"counters: {row['kernel'] or ''} {shown}", markup=False, highlight=False)
    if compiling := document.get("compiling"):
        console.print(
            f"compiling: {compiling['seconds']:.0f} s by {compiling['workers']} workers; kernels in the cache: "
            f"{compiling['cached_before']} before, {compiling['cached_after']} after"
        )
    counts: dict[str, int] = {}
    for row in document["checks"]:
        counts[row["status"]] = counts.get(row["status"], 0) + 1
    console.print("checks: " + ", ".join(f"{count} {status}" for status, count in counts.items()))
    left = [entry["job"] for entry in document["jobs"] if entry["status"] in ("not run", "out of time")]
    console.print(
        f"jobs: {len(document['jobs']) - len(left)} of {len(document['jobs'])} in {document['seconds']:.0f} s"
    )
    for label in left:
        console.print(f"not run: {label}", markup=False, highlight=False)


# Seconds before the first time: imports, workers; checks and kernels by as many of them as an H200's machine has cores.
_BEGINNING, _EACH_KERNELS, _CORES = 15.0, 2.5, 16


def print_list(console: Console, jobs: Sequence[Job], kind: str, seconds: float) -> None:
    """The jobs in order and when each is expected to end, at the rates of an H200 (or of a core)."""
    ends = _BEGINNING
    if kind == "cuda":
        checks = sum(job.part == "checks" for job in jobs)
        ends += _EACH_KERNELS * (checks + sum(len(job.to_compile(kind)) for job in jobs)) / _CORES
    for job in jobs:
        took = 0.0 if kind == "cuda" and job.part == "checks" else job.expected(GUESSED[kind])
        ends += took
        mark = "" if ends <= seconds else "  beyond the budget"
        console.print(f"{ends:6.1f} s  {took:5.1f}  {job.label}{mark}", markup=False, highlight=False)


@page.section("gpu", "On a GPU", "python -m bench gpu --json FILE")
def results(document: Document) -> str:
    return section.text(document)
