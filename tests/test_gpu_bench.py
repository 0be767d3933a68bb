"""The operator registry and the microbenchmarks on a CPU: results, rows and pictures."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import microbench, operators, plots
from bench.__main__ import main
from bench.cases import SAVED_CASES, AdapterCase
from bench.operators import LLAMA_8B, SMALL, OperatorCase, check, judge, make_operands, prepare, providers
from bench.plots import draw_microbench, read
from fastadapt.commands import doctor
from fastadapt.commands.report import new_figure
from fastadapt.operators.adapter_linear import function, plan, tuner
from fastadapt.operators.adapter_linear.strategies import STRATEGIES

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _own_cache_and_one_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Threads of several test processes would wait for each other in products this small."""
    monkeypatch.setenv("FASTADAPT_CACHE", str(tmp_path / "cache"))
    tuner.forget()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    tuner.forget()


def small_cases() -> list[OperatorCase]:
    cases = []
    for adapter, layers, dtype in itertools.product(SAVED_CASES.values(), SMALL, ("fp32", "bf16")):
        smaller = dataclasses.replace(adapter, r=min(adapter.r, 24))
        if not adapter.dropout:
            cases.append(OperatorCase("forward", smaller, layers, 37, dtype))
        cases.append(OperatorCase("step", smaller, layers, 37, dtype))
    cases += [OperatorCase("weight_norm", SAVED_CASES["dora"], SMALL[0], 0, dtype) for dtype in ("fp32", "bf16")]
    return cases


@pytest.mark.parametrize("case", small_cases(), ids=lambda case: case.label)
def test_every_provider_computes_the_formula(case: OperatorCase) -> None:
    checked = 0
    for provider in providers(case, CPU):
        if provider in ("linear", "compile") or (case.dropout and provider not in STRATEGIES):
            continue
        try:
            verdict = check(case, provider, CPU)
        except ValueError as problem:
            if provider not in ("recompose", "expand") or operators.refusal(problem) is None:
                raise
            continue
        assert not verdict.failed, (provider, verdict.failed)
        checked += 1
    assert checked >= (1 if case.dropout else 3)


@pytest.mark.parametrize("adapter", ["lora_dropout", "dora_dropout", "vera"])
@pytest.mark.parametrize("strategy", ["split", "fused"])
def test_what_a_gpu_checks_holds_in_the_interpreter(strategy: str, adapter: str) -> None:
    device = torch.device("cuda") if torch.cuda.is_available() else CPU
    smaller = dataclasses.replace(SAVED_CASES[adapter], r=24)
    verdict = check(OperatorCase("step", smaller, SMALL[0], 37, "bf16"), strategy, device)
    assert not verdict.failed, verdict.failed


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")  # inductor's own
def test_the_compiled_formula_is_the_formula() -> None:
    case = OperatorCase("step", SAVED_CASES["lora"], SMALL[0], 37, "fp32")
    assert not check(case, "compile", CPU).failed


def test_a_step_returns_all_gradients_and_dropout_is_drawn_anew() -> None:
    case = OperatorCase("step", SAVED_CASES["dora_dropout"], SMALL[0], 37, "fp32")
    operands = make_operands(case, CPU)
    names = {f"y{i}" for i in range(3)} | {f"d{name}{i}" for name in ("A", "B", "m") for i in range(3)} | {"dx"}
    for provider in ("ours", "reference", "peft"):
        run = prepare(case, provider, operands)
        first, second = run(), run()
        assert set(first) == names, provider
        assert not torch.equal(first["y0"], second["y0"]), provider
    assert set(prepare(case, "linear", operands)()) == {"y0", "y1", "y2", "dx"}


@pytest.mark.parametrize("case", operators.PLAIN_CASES, ids=lambda case: f"{case.operator} {case.name}")
def test_a_plain_operator_computes_the_formula(case: doctor.Case) -> None:
    values = {
        name: value.to(CPU) for name, value in doctor.values_of(case, torch.float32, doctor.Sizes(7, 24, 20, 4)).items()
    }
    doubles = {name: value.double() for name, value in values.items()}
    exact, plain = (operators.prepare_plain(case, "reference", own)() for own in (doubles, values))
    found = operators.prepare_plain(case, "eager", values)()
    assert found.keys() == exact.keys() == {"y0"} | {f"d{name}" for name in values if case.trains(name)}
    assert not judge(found, exact, plain).failed


def test_the_criterion() -> None:
    exact = {"y": torch.tensor([1.0, 2.0], dtype=torch.float64)}
    plain = {"y": torch.tensor([1.0, 2.0 + 1e-3])}
    assert not judge({"y": torch.tensor([1.0, 2.0 + 1.9e-3])}, exact, plain).failed
    assert judge({"y": torch.tensor([1.0, 2.0 + 2.1e-3])}, exact, plain).failed == ["y: error 2.10e-03 > 2.00e-03"]
    for bad in (math.nan, math.inf):
        verdict = judge({"y": torch.tensor([1.0, bad])}, exact, plain)
        assert verdict.failed
        assert verdict.worst == math.inf
    empty = {"y": torch.empty(0, dtype=torch.float64)}
    assert judge(empty, empty, empty) == (0.0, [])


def test_compulsory_bytes_are_those_of_the_design_notes() -> None:
    lora = SAVED_CASES["lora"]
    minimum = {
        layers.name: OperatorCase("step", lora, layers, 8192, "bf16").minimum_bytes / 2**20 for layers in LLAMA_8B[:2]
    }
    assert minimum["o"] == pytest.approx(385, abs=2)
    assert minimum["qkv"] == pytest.approx(480, abs=4)


def test_flops_are_counted_as_products() -> None:
    m, k, n, r = 8192, 4096, 4096, 16
    lora = OperatorCase("step", SAVED_CASES["lora"], LLAMA_8B[1], m, "bf16")
    assert lora.flops == 2 * m * (2 * k * n + 3 * r * (k + n))
    forward = OperatorCase("forward", SAVED_CASES["vera"], LLAMA_8B[2], m, "bf16")
    assert forward.flops == 2 * m * (k * 28672 + 256 * (k + 28672))  # one u for both


@pytest.mark.parametrize("adapter", SAVED_CASES.values(), ids=lambda adapter: adapter.name)
@pytest.mark.parametrize("operator", ["forward", "step"])
def test_the_tuner_is_given_times_under_the_key_that_the_operator_looks_up(
    operator: Any, adapter: AdapterCase, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = OperatorCase(operator, dataclasses.replace(adapter, r=min(adapter.r, 24)), SMALL[0], 37, "fp32")
    operands = make_operands(case, CPU)
    asked: list[tuner.Key] = []
    monkeypatch.setattr(tuner, "lookup", asked.append)
    monkeypatch.setattr(tuner, "best", lambda *_: None)
    # So that there is a choice to look up, on a CPU and under dropout as well.
    monkeypatch.setattr(plan, "candidates", lambda *_: ("library", "recompose"))
    grouped = function.adapter_linear_group
    monkeypatch.setattr(
        operators, "adapter_linear_group", lambda *args, **more: grouped(*args, **{**more, "strategy": "tune"})
    )
    prepare(case, "ours", operands)()
    assert asked == [operators.tuner_key(case, operands)]


MICRO = ["forward lora qkv", "weight_norm dora o", "hadamard_linear HiRA", "multi_adapter_linear"]


@pytest.fixture(scope="module")
def micro(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The microbenchmarks of a few cases, with two short rounds."""
    path = tmp_path_factory.mktemp("micro") / "micro.json"
    chosen = [one for one in microbench.problems() if one.label.startswith(tuple(MICRO))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(microbench, "problems", lambda: iter(chosen))
        also = str(path.with_name("theirs.json"))
        main(["microbench", "--json", str(path), "--benchmark-json", also, "--rounds", "2", "--sample", "0"])
    return path


def test_microbenchmarks_become_rows_and_a_picture(micro: Path, tmp_path: Path) -> None:
    document = read(micro)
    rows = document["rows"]
    assert {row["operator"] for row in rows} == {"forward", "weight_norm", "hadamard_linear", "multi_adapter_linear"}
    assert {"ours", "ungrouped", "reference", "peft", "linear", "eager"} <= {row["provider"] for row in rows}
    assert document["not_covered"] == {}
    for row in rows:
        assert 0 < row["x_low"] <= row["x"] <= row["x_high"]
        assert 0 < row["low_ms"] <= row["median_ms"] <= row["high_ms"]
        assert row["baseline"] == ("linear" if row["operator"] == "forward" else "reference")
        assert row["provider"] != row["baseline"] or row["x"] == pytest.approx(1)
    assert micro.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    # The picture needs nothing but the document.
    draw_microbench(document, tmp_path / "again.png")
    assert (tmp_path / "again.png").read_bytes() == micro.with_suffix(".png").read_bytes()


def test_pytest_benchmark_reads_what_the_microbenchmarks_write(micro: Path) -> None:
    theirs = micro.with_name("theirs.json")
    command = [sys.executable, "-m", "pytest_benchmark", "compare", str(theirs), "--columns=median,rounds"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=micro.parent)
    assert done.returncode == 0, done.stderr
    assert "benchmark 'forward lora qkv M512 fp32': 7 tests" in done.stdout
    stats = {entry["fullname"]: entry["stats"] for entry in json.loads(theirs.read_text())["benchmarks"]}
    row = next(row for row in read(micro)["rows"] if (row["operator"], row["provider"]) == ("forward", "ours"))
    found = stats["forward lora qkv M512 fp32 ours"]
    assert found["median"] == pytest.approx(row["median_ms"] / 1e3)
    assert (found["rounds"], found["iterations"]) == (row["rounds"], row["calls"])
    assert found["min"] <= found["q1"] <= found["median"] <= found["q3"] <= found["max"]


def test_a_bar_is_a_multiple_for_each_call_and_providers_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, order, load = [0.0], [], [1.0]

    def takes(name: str, seconds: float) -> Any:
        def run() -> dict[str, Tensor]:
            clock[0] += seconds * load[0]
            order.append(name)
            load[0] *= 1.01  # the machine slows down all the time
            return {}

        return run

    runs = {"slow": takes("slow", 3e-3), "reference": takes("reference", 1e-3)}
    for name in ("perf_counter", "process_time"):
        monkeypatch.setattr(microbench.time, name, lambda: clock[0])

    def refuse(name: str) -> Any:
        if name == "stranger":
            raise ValueError('strategy "stranger" is not for this case')
        return runs[name]

    problem = microbench.Problem("case", {}, ("slow", "reference", "stranger"), refuse)
    rows, samples = microbench.time_problem(problem, 9, 2.5e-3)
    assert {row["provider"]: row["calls"] for row in rows} == {"slow": 1, "reference": 3}
    assert rows[0]["x"] == pytest.approx(3, rel=0.05)
    assert rows[1]["x"] == 1
    assert [len(values) for values in samples.values()] == [9, 9]
    turns = [name for name, _ in itertools.groupby(order[4:])]
    assert turns.count("slow") >= 5, "not one after the other"


def test_the_microbenchmarks_by_habit_say_which_to_trust(tmp_path: Path) -> None:
    pytest.importorskip("pytest_benchmark")
    quick = ("--benchmark-max-time=0.001", "--benchmark-min-rounds=1", "-k", "norm and o")
    command = [sys.executable, "-m", "pytest", "bench", "--benchmark-only", *quick]
    # Whatever runs this test: pytest-benchmark does not measure under xdist.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    environment["OMP_NUM_THREADS"] = "1"
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "benchmark 'weight_norm dora o fp32'" in done.stdout
    assert "for ratios trust `python -m bench microbench`" in done.stdout


def test_a_bar_that_is_cut_says_so() -> None:
    axes = new_figure(4, 3).add_subplot()
    values = {"ours": [1.0, 1.1, 1.2], "peft": [1.3, None, 40.0]}
    spans = {"ours": [(0.9, 1.1), None, None], "peft": [None, None, (30.0, 50.0)]}
    plots._grouped_bars(axes, ["a", "b", "c"], values, spans=spans)
    texts = [text.get_text() for text in axes.texts]
    assert texts == ["1.00", "1.10", "1.20", "1.30", "none", "40.00 (cut)"]
    tops = [bar.get_height() for bar in axes.patches]
    assert max(tops) == pytest.approx(4 * 1.2)
    assert len(axes.lines) == 1, "an interval is drawn where the bar is whole"


def test_plain_pytest_leaves_the_microbenchmarks_alone(pytestconfig: pytest.Config) -> None:
    assert pytestconfig.getini("testpaths") == ["tests"]
