"""One command for whoever has a GPU: are the operators right on it, how fast are they, and how fast could they be.

Every strategy is held to the formula in fp64 on the device, the device's own ceilings are measured, and then each
strategy is timed beside PEFT, the formula in plain and in compiled PyTorch, and the frozen layers alone. It runs on a
CPU too, with what a CPU has.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from rich.console import Console

from bench import coverage, report
from bench.cases import SAVED_CASES
from bench.operators import (
    COVERS,
    DTYPES,
    LLAMA_8B,
    SMALL,
    SMOLLM2,
    Layers,
    OperatorCase,
    Run,
    check,
    make_operands,
    prepare,
    providers,
    refusal,
    runnable_strategies,
    tuner_key,
)
from fastadapt.commands.doctor import describe
from fastadapt.commands.report import write_json
from fastadapt.environment import versions
from fastadapt.operators.adapter_linear import tuner
from fastadapt.operators.adapter_linear.strategies import STRATEGIES
from fastadapt.progress import progress_bars

ADAPTERS = tuple(SAVED_CASES.values())
OURS = (*STRATEGIES, "ours", "ungrouped")


class Plan(NamedTuple):
    """What is checked and timed. Checked sizes are no multiples of a tile; dropout is timed at one number of tokens.

    large_check_tokens: rows of the steps that are checked on the timed layers as well; 0 for none.
    """

    check_layers: tuple[Layers, ...]
    check_tokens: int
    large_check_tokens: int
    layers: tuple[Layers, ...]
    tokens: tuple[int, ...]
    dropout_tokens: int
    dtype: str
    other_dtypes: tuple[str, ...]
    seconds: float
    copy_bytes: int
    product_size: int


ODD = (*SMALL, Layers("odd", 200, (328, 136)))

PLANS = {
    ("cuda", False): Plan(
        (*SMOLLM2, *ODD), 300, 500, LLAMA_8B, (64, 2048, 8192), 2048, "bf16", ("fp16", "fp32"), 1.0, 1 << 30, 8192
    ),
    ("cuda", True): Plan(ODD, 300, 0, LLAMA_8B[:2], (2048,), 2048, "bf16", (), 0.3, 1 << 30, 8192),
    ("cpu", False): Plan((*SMOLLM2[:1], *ODD), 300, 0, SMOLLM2, (512,), 512, "fp32", ("bf16",), 1.0, 1 << 28, 2048),
    ("cpu", True): Plan(SMALL, 37, 0, SMALL, (64,), 64, "fp32", (), 0.05, 1 << 25, 512),
}


class DeviceLostError(RuntimeError):
    """The device takes no more work, since a kernel broke it: nothing after that is a result."""


def checked_cases(plan: Plan) -> Iterator[OperatorCase]:
    """Every operator, method, kind of group and dtype."""
    for dtype, layers in itertools.product(DTYPES, plan.check_layers):
        for adapter in ADAPTERS:
            if not adapter.dropout:
                yield OperatorCase("forward", adapter, layers, plan.check_tokens, dtype)
            yield OperatorCase("step", adapter, layers, plan.check_tokens, dtype)
        yield OperatorCase("weight_norm", SAVED_CASES["dora"], layers, 0, dtype)
    if plan.large_check_tokens:
        for layers, adapter in itertools.product(plan.layers, ADAPTERS):
            yield OperatorCase("step", adapter, layers, plan.large_check_tokens, plan.dtype)


def timed_cases(plan: Plan) -> Iterator[OperatorCase]:
    """Every operator and method on every shape in the plan's dtype, and one layer's steps in the others."""
    for layers, tokens, adapter in itertools.product(plan.layers, plan.tokens, ADAPTERS):
        if adapter.dropout and tokens != plan.dropout_tokens:
            continue
        if not adapter.dropout:
            yield OperatorCase("forward", adapter, layers, tokens, plan.dtype)
        yield OperatorCase("step", adapter, layers, tokens, plan.dtype)
    for layers in plan.layers:
        yield OperatorCase("weight_norm", SAVED_CASES["dora"], layers, 0, plan.dtype)
    for dtype, adapter in itertools.product(plan.other_dtypes, ADAPTERS):
        if not adapter.dropout:
            yield OperatorCase("step", adapter, plan.layers[1], plan.dropout_tokens, dtype)


def reason(problem: Exception) -> str:
    """An exception in a line."""
    if isinstance(problem, torch.OutOfMemoryError):
        return "out of memory"
    lines = str(problem).strip().splitlines()
    return f"{type(problem).__name__}: {lines[0][:300] if lines else ''}"


def require_alive(device: torch.device, problem: Exception) -> None:
    """Raises DeviceLostError where an exception has left the device unusable; frees what an allocation may lack."""
    if device.type != "cuda":
        return
    try:
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
    except RuntimeError as lost:
        raise DeviceLostError(reason(problem)) from lost


def check_row(case: OperatorCase, provider: str, device: torch.device) -> report.Row:
    """One check as a row: status "ok", "failed" or "skipped", the largest error as a share of what is allowed, why."""
    row = {**case.describe(), "provider": provider, "status": "ok", "x_allowed": None, "note": ""}
    try:
        verdict = check(case, provider, device)
    except Exception as problem:  # whatever breaks is a row, and the run goes on
        refused = refusal(problem)
        if refused is None:
            require_alive(device, problem)
        return {**row, "status": "failed" if refused is None else "skipped", "note": refused or reason(problem)}
    return {
        **row,
        "status": "failed" if verdict.failed else "ok",
        "x_allowed": verdict.worst if math.isfinite(verdict.worst) else None,
        "note": "; ".join(verdict.failed),
    }


def check_providers(case: OperatorCase, device: torch.device) -> list[str]:
    """Whose results are checked. Which masks "ours" draws is known only of a strategy."""
    if case.operator == "weight_norm":
        return ["ours"]
    return runnable_strategies(device) + ([] if case.dropout else ["ours"])


def ceilings(device: torch.device, plan: Plan) -> dict[str, float]:
    """What the device reaches: bytes a second in a large copy, and operations a second in a large product, by dtype."""
    source = torch.empty(plan.copy_bytes, dtype=torch.int8, device=device).fill_(1)
    target = torch.empty_like(source)
    times = tuner.measure({"copy": functools.partial(target.copy_, source)}, device)
    found = {"bytes": 2 * plan.copy_bytes / times["copy"]}
    n = plan.product_size
    for name, dtype in DTYPES.items():
        square = torch.randn(n, n, device=device).to(dtype)
        times = tuner.measure({name: functools.partial(torch.mm, square, square)}, device, seconds=plan.seconds)
        found[name] = 2.0 * n**3 / times[name]
    return found


def time_case(
    case: OperatorCase, device: torch.device, ceiling: dict[str, float], plan: Plan, left_out: Sequence[str]
) -> list[report.Row]:
    """One row for each provider of a case, all timed interleaved."""
    notes = {name: "left out" for name in left_out}
    failed: set[str] = set()
    runs: dict[str, Run] = {}

    def failure(name: str, problem: Exception) -> None:
        refused = refusal(problem)
        notes[name] = refused or reason(problem)
        if refused is None:
            require_alive(device, problem)
            if name in OURS:  # others may lack what they need here, such as a compiler
                failed.add(name)

    times: dict[str, float] = {}
    names = providers(case, device)
    try:
        operands = make_operands(case, device)
        for name in names:
            if name in left_out:
                continue
            try:
                runs[name] = prepare(case, name, operands)
            except Exception as problem:  # as in the check
                failure(name, problem)
        times = tuner.measure(runs, device, seconds=plan.seconds * len(runs), on_failure=failure)
    except torch.OutOfMemoryError as problem:
        require_alive(device, problem)
        notes, failed = dict.fromkeys(names, "out of memory"), set(OURS)
    linear = times.get("linear")
    rows = []
    for name in names:
        row = {
            **case.describe(),
            "provider": name,
            "gflop": case.flops / 1e9,
            "minimum_mib": case.minimum_bytes / 2**20,
        }
        row["status"] = "ok" if name in times else "failed" if name in failed else "skipped"
        row["note"] = notes.get(name, "")
        row["ms"] = times[name] * 1e3 if name in times else None
        row["x_linear"] = times[name] / linear if name in times and linear else None
        # The frozen layers do less than the formula's work.
        rows.append(row | rates(case, None if name == "linear" else times.get(name), ceiling))
    return rows


def rates(case: OperatorCase, seconds: float | None, ceiling: dict[str, float]) -> report.Row:
    """The formula's work by time, absolute and of the ceilings: what a provider does beyond it shows as lost speed."""
    if seconds is None:
        return dict.fromkeys(("gbytes_s", "tflops", "of_bandwidth", "of_flops", "of_roofline"))
    of_bandwidth = case.minimum_bytes / seconds / ceiling["bytes"]
    of_flops = case.flops / seconds / ceiling[case.dtype]
    return {
        "gbytes_s": case.minimum_bytes / seconds / 1e9,
        "tflops": case.flops / seconds / 1e12,
        "of_bandwidth": of_bandwidth,
        "of_flops": of_flops,
        "of_roofline": max(of_bandwidth, of_flops),
    }


def record(case: OperatorCase, device: torch.device, rows: Sequence[report.Row], wrong: set[str]) -> bool:
    """Give the tuner the times of the strategies, without those that gave a wrong result in a check."""
    times = {
        row["provider"]: row["ms"] / 1e3
        for row in rows
        if row["provider"] in STRATEGIES and row["status"] == "ok" and row["provider"] not in wrong
    }
    if times:
        tuner.record(tuner_key(case, make_operands(case, device)), times)
    return bool(times)


def summary(rows: Sequence[report.Row]) -> list[report.Row]:
    """A line for each case: our fastest strategy, what is taken by itself, and the others, as multiples of F.linear."""
    lines = []
    for (operator, *_), group in itertools.groupby(rows, key=case_of):
        by_provider = {row["provider"]: row for row in group}
        timed = [row for row in by_provider.values() if row["provider"] in (*STRATEGIES, "ours") and row["ms"]]
        best = min(timed, key=lambda row: row["ms"], default=None)
        first = next(iter(by_provider.values()))
        line = {
            "case": f"{operator} {first['case']} {first['layers']}",
            "M": first["M"] or None,
            "dtype": first["dtype"],
            "strategy": best and best["provider"],
            "ms": best and best["ms"],
            "x_linear": best and best["x_linear"],
            "of_roofline": best and best["of_roofline"],
        }
        for name in ("ours", "ungrouped", "peft", "compile", "reference"):
            line[f"{name}_x"] = by_provider.get(name, {}).get("x_linear")
        lines.append(line)
    return lines


def case_of(row: report.Row) -> tuple[Any, ...]:
    """What the rows of one case have in common."""
    return tuple(row[name] for name in ("operator", "case", "layers", "M", "dtype"))


def device_facts(device: torch.device) -> dict[str, Any]:
    """The device in words, and the versions that its numbers depend on."""
    facts: dict[str, Any] = {"name": describe(device), "type": device.type}
    if device.type == "cuda":
        facts |= {"driver": tuner.driver(), "runtime": torch.version.cuda or torch.version.hip}
    return facts


def chosen_device(name: str) -> torch.device:
    """The device of that name, by its index; a GPU if there is one, where none is named.

    Raises typer.BadParameter for one that is not here.
    """
    device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type not in ("cuda", "cpu"):
        raise typer.BadParameter(f"--device must be cuda or cpu, got {name}")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise typer.BadParameter("--device cuda needs a GPU that PyTorch sees: take --device cpu")
        device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        torch.cuda.set_device(device)
    return device


def main(
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the rows there and a PNG beside it.")] = None,
    device_name: Annotated[str, typer.Option("--device", help="cuda or cpu; a GPU if there is one.")] = "",
    quick: Annotated[bool, typer.Option(help="Few and small cases, without torch.compile.")] = False,
    tune: Annotated[bool, typer.Option(help='Keep the times for strategy="auto" on this machine.')] = False,
    compiled: Annotated[bool, typer.Option("--compile/--no-compile", help="Time torch.compile too.")] = True,
) -> None:
    """Check every operator on the device, measure its ceilings, time strategies beside PEFT and torch.compile.

    Leaves with exit code 1 if a check fails.
    """
    device = chosen_device(device_name)
    plan = PLANS[device.type, quick]
    facts = device_facts(device)
    console = Console()
    for name, value in {**facts, **versions()}.items():
        console.print(f"{name:<12} {value or 'not installed'}", highlight=False, markup=False)

    left_out = ["compile"] if quick or not compiled else []
    to_check = [(case, name) for case in checked_cases(plan) for name in check_providers(case, device)]
    to_time = list(timed_cases(plan))
    covers = [name for case in (*[case for case, _ in to_check], *to_time) for name in COVERS[case.operator]]
    missing = coverage.not_covered("gpu", covers)
    checks: list[report.Row] = []
    rows: list[report.Row] = []
    found: dict[str, float] = {}
    tuned, lost = 0, ""
    try:
        with progress_bars() as progress:
            task = progress.add_task("checks", total=len(to_check))
            for case, name in to_check:
                progress.update(task, advance=1, description=f"check {case.label} {name}")
                checks.append(check_row(case, name, device))
            wrong = {row["provider"] for row in checks if row["status"] == "failed"}
            found = ceilings(device, plan)
            task = progress.add_task("times", total=len(to_time))
            for case in to_time:
                progress.update(task, advance=1, description=f"time {case.label}")
                timed = time_case(case, device, found, plan, left_out)
                rows += timed
                if tune and case.operator != "weight_norm":
                    tuned += record(case, device, timed, wrong)
    except DeviceLostError as problem:
        lost = f"the device was lost and the run ended there: {problem}"
    finally:  # an interrupted run has results as well
        if json_file is not None:
            more = {"device": facts, "quick": quick, "lost": lost, "ceilings": found, "checks": checks}
            more |= {"not_covered": missing}
            write_json(json_file, "gpu", rows, **more)
    if json_file is not None and rows:
        from bench.plots import draw_gpu, read

        draw_gpu(read(json_file), json_file.with_suffix(".png"))
    print_results(console, rows, checks, found)
    if tune:
        console.print(f"{tuned} measurements for the tuner, in {tuner.kept_in() or 'memory alone'}")
    if lost:
        console.print(lost, style="red")
    if lost or any(row["status"] == "failed" for row in checks):
        raise typer.Exit(1)


def print_results(
    console: Console, rows: Sequence[report.Row], checks: Sequence[report.Row], found: dict[str, float]
) -> None:
    """The summary, the ceilings and the failures."""
    if rows:
        heading = {
            "case": "case",
            "M": "M",
            "dtype": "dtype",
            "strategy": "our fastest",
            "ms": "ms",
            "x_linear": "x F.linear",
            "of_roofline": "of roofline",
            "ours_x": "automatic",
            "ungrouped_x": "ungrouped",
            "peft_x": "PEFT",
            "compile_x": "compiled",
            "reference_x": "formula",
        }
        report.print_table("Times as multiples of F.linear on the same layers", summary(rows), heading)
    if found:
        rates = ", ".join(f"{name} {found[name] / 1e12:.3g}" for name in DTYPES)
        console.print(f"ceilings: {found['bytes'] / 1e9:.4g} GB/s in a copy; TFLOP/s in a product: {rates}")
    for row in (*checks, *rows):
        if row["status"] == "failed":
            kind = "check" if "x_allowed" in row else "time"
            name = " ".join(str(part) for part in (*case_of(row), row["provider"]))
            console.print(f"FAILED {kind}: {name}: {row['note']}", style="red", markup=False)
    counts = {status: sum(row["status"] == status for row in checks) for status in ("ok", "failed", "skipped")}
    console.print("checks: " + ", ".join(f"{count} {status}" for status, count in counts.items()))
