"""Microbenchmarks that can be believed: all providers of a case in turn in one process, shuffled in each round.

A bar is the median over the rounds of a provider's time as a multiple of its baseline's in the same round: the frozen
layers alone (`linear`) where there are any, else the formula in PyTorch (`reference`). The machine's drift and load are
common to both, and the median's 95% interval says how far the number can be trusted. On a CPU the time is processor
time of one thread, which whatever else runs there disturbs least, on SmolLM2-135M's layers in fp32; on a GPU it is that
on the wall, on Llama-8B's in bf16. A call is repeated until a sample is long enough for the clock.
"""

from __future__ import annotations

import itertools
import json
import math
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer

from bench import coverage, measure, page, report
from bench.cases import SAVED_CASES
from bench.operators import (
    COVERS,
    DTYPES,
    LLAMA_8B,
    PLAIN_CASES,
    SMOLLM2,
    OperatorCase,
    Run,
    make_operands,
    prepare,
    prepare_plain,
    providers,
    refusal,
)
from bench.plots import Document, draw_microbench, read
from fastadapt.commands.case import Case, Sizes
from fastadapt.commands.doctor import values_of
from fastadapt.commands.report import write_json
from fastadapt.environment import commit, machine, versions
from fastadapt.files import written_whole
from fastadapt.operators.backends import HAS_TRITON

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LAYERS, TOKENS, DTYPE = (LLAMA_8B, 2048, "bf16") if DEVICE.type == "cuda" else (SMOLLM2, 512, "fp32")
# A square layer as wide as the model, for the operators beside the adapter form.
SIZES = Sizes(TOKENS, LAYERS[1].in_features, LAYERS[1].out_features[0], 16)
BACKENDS = ("triton", "eager", "reference") if DEVICE.type == "cuda" and HAS_TRITON else ("eager", "reference")
BASELINES = ("linear", "reference")
CLOCK: Literal["cpu", "wall"] = "cpu" if DEVICE.type == "cpu" else "wall"


@dataclass(frozen=True)
class Problem:
    """One case with everybody who can be asked for it. columns: what says in a row which case it is."""

    label: str
    columns: Mapping[str, Any]
    providers: tuple[str, ...]
    prepare: Callable[[str], Run]


def _cases() -> Iterator[OperatorCase]:
    """One layer with every method, groups without dropout, and DoRA's norm."""
    by_name = {layers.name: layers for layers in LAYERS}
    without_dropout = [case for case in SAVED_CASES.values() if not case.dropout]
    for adapter in without_dropout:
        yield OperatorCase("forward", adapter, by_name["down"], TOKENS, DTYPE)
    for adapter in SAVED_CASES.values():
        yield OperatorCase("step", adapter, by_name["down"], TOKENS, DTYPE)
    for name, adapter in itertools.product(("qkv", "gate_up"), without_dropout):
        yield OperatorCase("forward", adapter, by_name[name], TOKENS, DTYPE)
        yield OperatorCase("step", adapter, by_name[name], TOKENS, DTYPE)
    for name in ("o", "down"):
        yield OperatorCase("weight_norm", SAVED_CASES["dora"], by_name[name], 0, DTYPE)


def problems() -> Iterator[Problem]:
    """Every operator of the registry."""
    for case in _cases():
        # Compilation takes longer than all the rest: `python -m bench gpu` has it.
        names = tuple(name for name in providers(case, DEVICE) if name != "compile")
        yield Problem(case.label, case.describe(), names, partial(_operator, case))
    for plain in PLAIN_CASES:
        columns: dict[str, Any] = {"operator": plain.operator, "case": plain.name, "layers": LAYERS[1].name}
        columns |= dict(zip("MKNr", SIZES, strict=True)) | {"dtype": DTYPE}
        label = f"{plain.operator} {plain.name} M{TOKENS} {DTYPE}"
        yield Problem(label, columns, BACKENDS, partial(_plain, plain))


def _operator(case: OperatorCase, provider: str) -> Run:
    return prepare(case, provider, make_operands(case, DEVICE))


def _plain(case: Case, provider: str) -> Run:
    values = {name: value.to(DEVICE) for name, value in values_of(case, DTYPES[DTYPE], SIZES).items()}
    return prepare_plain(case, provider, values)


def finished(run: Run) -> Callable[[], None]:
    """The work to its end, also where a GPU does it."""

    def call() -> None:
        run()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    return call


def ready(problem: Problem, provider: str) -> Callable[[], None] | None:
    """The provider's work, done once; None where it says that the case is not for it."""
    try:
        call = finished(problem.prepare(provider))
        call()
    except Exception as error:
        if refusal(error) is None:
            raise
        return None
    return call


def _calls(call: Callable[[], None], seconds: float) -> int:
    """How many calls make a sample of so many seconds."""
    started = time.perf_counter()
    call()
    return max(1, math.ceil(seconds / max(time.perf_counter() - started, 1e-7)))


def _repeated(call: Callable[[], None], times: int) -> Callable[[], None]:
    def sample() -> None:
        for _ in range(times):
            call()

    return sample


def time_problem(problem: Problem, rounds: int, seconds: float) -> tuple[list[report.Row], dict[str, list[float]]]:
    """A row for each provider of a case, and the seconds of a call in every round."""
    calls = {name: call for name in problem.providers if (call := ready(problem, name)) is not None}
    counts = {name: _calls(call, seconds) for name, call in calls.items()}
    variants = {name: _repeated(call, counts[name]) for name, call in calls.items()}
    timings = measure.interleave(variants, rounds, wanted=False)
    baseline = next(name for name in BASELINES if name in calls)
    rows, samples = [], {}
    for name in calls:
        samples[name] = [getattr(timing[name], CLOCK) / counts[name] for timing in timings]
        each = measure.median_ratio([1e3 * seconds for seconds in samples[name]])
        wall, cpu = measure.compare(timings, name, [baseline])
        x = measure.Ratio(*(value * counts[baseline] / counts[name] for value in (cpu if CLOCK == "cpu" else wall)))
        rows.append(
            {
                **problem.columns,
                "provider": name,
                "device": DEVICE.type,
                "median_ms": each.median,
                "low_ms": each.low,
                "high_ms": each.high,
                "baseline": baseline,
                "x": x.median,
                "x_low": x.low,
                "x_high": x.high,
                "clock": CLOCK,
                "rounds": rounds,
                "calls": counts[name],
            }
        )
    return rows, samples


def as_pytest_benchmark(samples: Mapping[tuple[str, str], list[float]], rows: list[report.Row]) -> Document:
    """What `pytest --benchmark-json` writes, so that `pytest-benchmark compare` reads it: one group for each case."""
    benchmarks = []
    for ((group, provider), seconds), row in zip(samples.items(), rows, strict=True):
        q1, _, q3 = statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else seconds * 3
        mean = statistics.fmean(seconds)
        spread = statistics.pstdev(seconds)
        outside = sum(not q1 - 1.5 * (q3 - q1) <= value <= q3 + 1.5 * (q3 - q1) for value in seconds)
        beyond = sum(abs(value - mean) > spread for value in seconds)
        stats = {
            "min": min(seconds),
            "max": max(seconds),
            "mean": mean,
            "stddev": spread,
            "rounds": len(seconds),
            "median": statistics.median(seconds),
            "iqr": q3 - q1,
            "q1": q1,
            "q3": q3,
            "iqr_outliers": outside,
            "stddev_outliers": beyond,
            "outliers": f"{beyond};{outside}",
            "ld15iqr": min(seconds),
            "hd15iqr": max(seconds),
            "ops": 1 / mean,
            "total": sum(seconds),
            "data": seconds,
            "iterations": row["calls"],
        }
        name = f"{group} {provider}"
        benchmarks.append(
            {
                "group": group,
                "name": provider,
                "fullname": name,
                "params": None,
                "param": None,
                "extra_info": row,
                "options": {
                    "timer": "process_time" if CLOCK == "cpu" else "perf_counter",
                    "warmup": True,
                    "min_rounds": len(seconds),
                },
                "stats": stats,
            }
        )
    now = datetime.now(timezone.utc).isoformat()
    return {
        "machine_info": {"node": platform.node(), "machine": platform.machine(), "cpu": machine()["cpu"], **versions()},
        "commit_info": {"id": commit() or "unversioned", "time": now, "dirty": "+changes" in (commit() or "")},
        "benchmarks": benchmarks,
        "datetime": now,
        "version": "4.0.0",
    }


def main(
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the rows there, and a PNG beside it.")] = None,
    benchmark_json: Annotated[
        Path | None, typer.Option("--benchmark-json", help="Write pytest-benchmark's JSON there, for its `compare`.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Counted rounds.")] = 25,
    sample: Annotated[float, typer.Option(min=0.0, help="Milliseconds that a sample takes at least.")] = 20.0,
    only: Annotated[str, typer.Option(help="A part of the names of the cases to take.")] = "",
    threads: Annotated[int, typer.Option(help="On a CPU; others disturb one thread less than two.")] = 1,
) -> None:
    """Every operator beside PEFT, the formula and the frozen layers, interleaved: medians with 95% intervals."""
    torch.set_num_threads(threads)
    chosen = [problem for problem in problems() if only in problem.label]
    if not chosen:
        raise ValueError(f"no case has {only!r} in its name: {', '.join(problem.label for problem in problems())}")
    rows: list[report.Row] = []
    samples: dict[tuple[str, str], list[float]] = {}
    for problem in report.tracked(chosen, "cases"):
        found, seconds = time_problem(problem, rounds, sample / 1e3)
        rows += found
        samples |= {(problem.label, name): values for name, values in seconds.items()}
    columns = {"provider": "", "median_ms": "ms", "x": "x", "x_low": "95% from", "x_high": "to"}
    for label, group in itertools.groupby(zip(samples, rows, strict=True), key=lambda pair: pair[0][0]):
        of_case = [row for _, row in group]
        report.print_table(f"{label}, x {of_case[0]['baseline']}", of_case, columns)
    covers = [*COVERS.values(), *(case.covers for case in PLAIN_CASES)]
    missing = coverage.not_covered("microbench", itertools.chain(*covers))
    if json_file is not None:
        write_json(json_file, "microbench", rows, not_covered=missing)
        draw_microbench(read(json_file), json_file.with_suffix(".png"))
    if benchmark_json is not None:
        with written_whole(benchmark_json) as draft:
            draft.write_text(json.dumps(as_pytest_benchmark(samples, rows), indent=1) + "\n", encoding="utf-8")


@page.section("microbench", "Microbenchmarks")
def section(document: Document) -> str:
    first = document["rows"][0]
    # A baseline is its own multiple, exactly.
    bars = [row for row in document["rows"] if row["provider"] != row["baseline"]]
    widths = sorted((row["x_high"] - row["x_low"]) / row["x"] for row in bars)
    return (
        f"Every operator by provider, all providers of a case in turn in one process, {first['rounds']} rounds, "
        f"{_CLOCKS[first['clock']]}: medians as multiples of the frozen layers alone, or of the formula in PyTorch "
        "where there are none. Nine of ten "
        f"intervals are narrower than {widths[int(0.9 * (len(widths) - 1))]:.0%} of their bar."
    )


_CLOCKS = {"cpu": "processor time", "wall": "time on the wall"}
