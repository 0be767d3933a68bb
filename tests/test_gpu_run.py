"""`python -m bench gpu` on a CPU: its jobs, its order and budget, and that no job can take another's results along."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
import toy_jobs
import typer
from rich.console import Console
from torch import Tensor

from bench import measured, page
from bench.__main__ import main
from bench.cases import SAVED_CASES
from bench.gpu import command, conductor, counters, needs, timed
from bench.gpu.conductor import Plan, conduct
from bench.gpu.crew import Answer, StartError, Worker
from bench.gpu.job import GUESSED, Desk, DeviceLostError, Job, Rates, require_alive
from bench.gpu.journal import Journal, shares
from bench.gpu.program import BatchTimes, compiled, program, step
from bench.gpu.timed import LayerTimes, Timed
from bench.operators import LLAMA_8B, SMALL, Layers, OperatorCase, prepare
from bench.plots import draw_gpu, read
from fastadapt.operators.adapter_linear import stopwatch, tuner
from fastadapt.operators.adapter_linear.strategies import STRATEGIES
from fastadapt.operators.registry import OPERATORS

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
DESK = Desk(CPU, seconds=0.0)


def plan_of(jobs: list[Job], program_name: str = "", **options: Any) -> Plan:
    return Plan(jobs, f"toy_jobs.{program_name}", "cpu", **{"seconds": 60.0, "timing": 0.0, **options})


def jobs_of(journal: Journal) -> dict[str, str]:
    return {entry["job"]: entry["status"] for entry in journal.document["jobs"]}


# The jobs themselves, in this process


def chosen() -> list[Job]:
    """Of the CPU's program one job of each kind."""
    found: dict[tuple[str, ...], Job] = {}
    for job in program("cpu"):
        if not job.label.endswith(("compiled", "bf16")) and "M512" not in job.label:
            kind = tuple(job.label.split()[:3])
            found.setdefault(kind, job)
    return list(found.values())


@pytest.mark.parametrize("job", chosen(), ids=lambda job: job.label)
def test_a_job_gives_rows_that_are_right(job: Job) -> None:
    rows = job.run(DESK)
    assert json.loads(json.dumps(rows)) == rows
    assert rows
    assert 0 < job.expected(GUESSED["cpu"]) < 10
    for row in rows:
        if job.part == "ceilings":
            assert row["rate"] > 0
        elif job.part == "counters":
            assert row["note"] == "there is no GPU"
        else:
            assert row["status"] == "ok", row["note"]
            # Nothing is let off with a mere time: what is held to no formula is a baseline, or draws its own mask.
            free = row["provider"] in ("linear", "reference") or job.part == "checks"
            free = free or (row["case"].endswith("_dropout") and row["provider"] not in STRATEGIES)
            assert free == (row["x_allowed"] is None) or job.part == "checks"
        if job.part == "rows":
            assert 0 < row["low_ms"] <= row["ms"] <= row["high_ms"]
            assert (row["clock"], row["host_us"]) == ("wall", None)
            assert row["provider"] != row["baseline"] or row["x"] == 1


def test_every_operator_is_checked_before_anything_is_timed() -> None:
    jobs = program("cuda")
    first = next(index for index, job in enumerate(jobs) if job.part == "ceilings")
    assert {job.part for job in jobs[:first]} == {"checks"}
    assert {name for job in jobs[:first] for name in job.covers} == set(OPERATORS)
    assert len({job.label for job in jobs}) == len(jobs)
    assert [job.label.endswith("compiled") for job in jobs[-6:]] == [True] * 6
    assert not any("compile" in job.asked for job in jobs[:-6] if isinstance(job, LayerTimes))


def test_a_gpu_is_asked_for_every_method_layer_and_number_of_tokens() -> None:
    times = [job for job in program("cuda") if isinstance(job, LayerTimes) and "linear" in job.asked]
    asked = {(job.case.operator, job.case.adapter.name, job.case.layers.name, job.case.tokens) for job in times}
    for layers in LLAMA_8B:
        assert {("step", name, layers.name, m) for name in SAVED_CASES for m in (8192, 2048)} <= asked
        assert {("forward", name, layers.name, m) for name in ("lora", "dora", "vera") for m in (1, 8, 64)} <= asked
    providers = {name for job in times for name in job.providers("cuda")}
    assert providers >= {"split", "fused", "library", "ours", "peft", "peft_fp32", "unsloth", "compile", "linear"}
    batches = [job for job in program("cuda") if isinstance(job, BatchTimes)]
    assert {job.adapters for job in batches} == {8, 64, 256}
    assert all("punica" in job.providers("cuda") for job in batches)


def test_an_h200_is_expected_to_hold_all_of_it_in_eight_minutes() -> None:
    assert 120 < sum(job.expected(GUESSED["cuda"]) for job in program("cuda")) < 440


def test_what_is_wrong_has_no_time_and_is_not_for_the_tuner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTADAPT_CACHE", str(tmp_path))
    tuner.forget()

    def off(case: OperatorCase, provider: str, operands: Any) -> Any:
        run = prepare(case, provider, operands)
        return (lambda: {name: value * 1.1 for name, value in run().items()}) if provider == "library" else run

    monkeypatch.setattr(timed, "prepare", off)
    job = LayerTimes(OperatorCase("step", SAVED_CASES["vera"], SMALL[0], 16, "fp32"), ("library", "recompose"))
    rows = {row["provider"]: row for row in job.run(Desk(CPU, seconds=0.0, tune=True))}
    assert (rows["library"]["status"], rows["library"]["ms"]) == ("failed", None)
    assert "error" in rows["library"]["note"]
    assert rows["recompose"]["ms"] > 0
    (file,) = tmp_path.glob("*.json")
    assert [set(times) for times in json.loads(file.read_text())["entries"].values()] == [{"recompose"}]
    # One that failed elsewhere has a time here, which is not kept.
    file.unlink()
    tuner.forget()
    job.run(Desk(CPU, seconds=0.0, tune=True, wrong=frozenset({"library", "recompose"})))
    assert list(tmp_path.glob("*.json")) == []
    journal = Journal(None)
    journal.add("rows", list(rows.values()))
    assert journal.wrong == {"library"}
    assert len(journal.failures()) == 1
    tuner.forget()


def test_the_tuner_gets_the_times_of_a_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTADAPT_CACHE", str(tmp_path))
    tuner.forget()
    job = LayerTimes(OperatorCase("step", SAVED_CASES["vera"], SMALL[0], 16, "fp32"), ("library", "recompose"))
    times = {row["provider"]: row["ms"] for row in job.run(Desk(CPU, seconds=0.0, tune=True))}
    key = timed.tuner_key(job.case, job.operands(CPU, 0))
    assert tuner.lookup(key) == min(times, key=lambda name: times[name])
    tuner.forget()


def test_what_others_lack_is_a_row_and_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)  # as if it were not installed
    rows = {row["provider"]: row for row in step(SAVED_CASES["lora"], SMALL[1], 8, "fp32").run(DESK)}
    assert {rows[name]["status"] for name in ("peft", "peft_fp32")} == {"skipped"}
    assert "peft" in rows["peft"]["note"]
    assert {rows[name]["status"] for name in ("library", "ours", "unsloth", "linear")} == {"ok"}


def test_where_memory_is_short_ours_have_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    def short(*_: Any) -> Any:
        raise torch.OutOfMemoryError("Tried to allocate 3 TiB\nmore")

    monkeypatch.setattr(timed, "make_operands", short)
    rows = step(SAVED_CASES["lora"], SMALL[1], 8, "fp32").run(DESK)
    assert {row["note"] for row in rows} == {"out of memory"}
    assert {row["provider"] for row in rows if row["status"] == "failed"} == {"library", "ours"}


class OnGpu(Timed):
    """A job whose kernels are not there, as a GPU would see it."""

    label = "toy"
    amounts = (1.0, 1.0)

    def columns(self) -> dict[str, Any]:
        return {"operator": "toy", "case": "", "layers": "", "M": 1, "dtype": "fp32"}

    def providers(self, device_type: str) -> list[str]:
        return ["split", "peft"]

    def operands(self, device: torch.device, seed: int) -> None:
        return None

    def prepare(self, provider: str, operands: Any) -> Any:
        raise ImportError(f"No module named 'for {provider}'")

    def standard(self, provider: str, operands: Any) -> None:
        return None


def test_a_kernel_that_is_skipped_on_a_gpu_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(L2_cache_size=50 << 20))
    monkeypatch.setattr(timed, "timed", lambda *_: {})
    rows = OnGpu().run(Desk(torch.device("cuda", 0)))
    assert [(row["provider"], row["status"]) for row in rows] == [("split", "failed"), ("peft", "skipped")]
    assert OnGpu()._copies(Desk(torch.device("cuda", 0))) == 8
    assert OnGpu()._copies(DESK) == 1


def test_a_device_that_takes_no_work_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_: Any) -> None:
        raise RuntimeError("CUDA error: unspecified launch failure")

    monkeypatch.setattr(torch.cuda, "synchronize", fails)
    with pytest.raises(DeviceLostError, match="ValueError: first"):
        require_alive(Desk(torch.device("cuda")), ValueError("first"))
    require_alive(DESK, ValueError("first"))


@pytest.mark.parametrize("tokens", [1, 40])
def test_the_pair_of_serving_kernels_computes_the_formula(tokens: int) -> None:
    device = torch.device("cuda") if torch.cuda.is_available() else CPU
    job = BatchTimes(Layers("odd", 150, (200,)), 3, tokens, 16, "fp32")
    operands = job.operands(device, 0)
    verdict = job._verdict("punica", job.prepare("punica", operands), operands, {})
    assert verdict is not None
    assert not verdict.failed


def test_shares_are_of_the_ceilings() -> None:
    row = {"ms": 2.0, "provider": "ours", "dtype": "bf16", "gflop": 100.0, "minimum_mib": 1.0}
    found = shares(row, Rates("cuda", 2**20 * 1e3, {"bf16": 1e14}))
    assert found["tflops"] == pytest.approx(50)
    assert (found["of_flops"], found["of_bandwidth"]) == pytest.approx((0.5, 0.5))
    assert set(shares({**row, "provider": "linear"}, None).values()) == {None}


# Order, budget and what breaks


class Scripted:
    """A worker that answers at once, as it is told to."""

    answers: ClassVar[dict[str, Answer]] = {}
    asked: ClassVar[list[tuple[str, float]]] = []

    def __init__(self, *_: str) -> None:
        pass

    def ask(self, request: dict[str, Any], limit: float) -> Answer:
        self.asked.append((request["job"], limit))
        return self.answers.get(request["job"], Answer("ok", [], 0.0))

    def stop(self) -> None:
        pass

    close = stop


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> type[Scripted]:
    monkeypatch.setattr(conductor, "Worker", Scripted)
    monkeypatch.setattr(Scripted, "answers", {})
    monkeypatch.setattr(Scripted, "asked", [])
    return Scripted


def test_what_does_not_fit_is_listed_and_what_fits_behind_it_runs(scripted: type[Scripted], tmp_path: Path) -> None:
    jobs = [toy_jobs.Toy("short", takes=1.0), toy_jobs.Toy("long", takes=1e3), toy_jobs.Toy("brief", takes=0.5)]
    journal = Journal(tmp_path / "gpu.json")
    conduct(plan_of(jobs), journal)
    assert jobs_of(journal) == {"short": "ok", "brief": "ok", "long": "not run"}
    assert journal.document["ended"] == "out of time"
    assert read(tmp_path / "gpu.json") == journal.document
    assert [limit for _, limit in scripted.asked] == pytest.approx([48, 46.5], abs=0.5)
    assert journal.failures() == []


def test_jobs_that_take_longer_than_expected_tell_of_those_to_come(scripted: type[Scripted]) -> None:
    scripted.answers["first"] = Answer("ok", [], 20.0)
    journal = Journal(None)
    conduct(plan_of([toy_jobs.Toy("first", takes=1.0), toy_jobs.Toy("second", takes=5.0)]), journal)
    assert jobs_of(journal)["second"] == "not run"


def test_no_job_gets_more_than_what_is_left(scripted: type[Scripted], monkeypatch: pytest.MonkeyPatch) -> None:
    plan, journal = plan_of([toy_jobs.Toy("late")], seconds=9.0), Journal(None)

    def ask(self: Scripted, request: dict[str, Any], limit: float) -> Answer:
        assert limit <= 5
        plan.started -= limit  # it takes all of it
        return Answer("hung", [], limit, "no answer", "right")

    monkeypatch.setattr(scripted, "ask", ask)
    conduct(plan, journal)
    assert jobs_of(journal) == {"late": "out of time"}
    assert journal.failures() == []


def test_a_job_that_breaks_the_worker_costs_one_provider(tmp_path: Path) -> None:
    jobs = toy_jobs.breaking("cpu")
    journal = Journal(tmp_path / "gpu.json")
    conduct(plan_of(jobs, "breaking"), journal)
    assert jobs_of(journal) == {"first": "ok", "second": "ok", "third": "failed", "fourth": "ok"}
    rows = {(row["case"], row["provider"]): row for row in read(tmp_path / "gpu.json")["checks"]}
    assert {key for key, row in rows.items() if row["status"] == "ok"} == {
        ("first", "right"),
        ("second", "right"),
        ("second", "also right"),
        ("fourth", "right"),
    }
    assert rows["second", "abort"]["note"].startswith("crashed: ")
    assert f"signal {signal.SIGABRT.value}" in rows["second", "abort"]["note"]
    assert journal.failures()[1] == "third: failed: ValueError: not today"


def test_a_job_that_hangs_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toy_jobs.Toy, "providers", lambda *_: [])  # so that it is not tried again
    journal = Journal(None)
    conduct(plan_of(toy_jobs.hanging("cpu")[1:], "hanging", patience=2.0), journal)
    assert jobs_of(journal) == {"second": "ok", "third": "hung", "fourth": "ok"}
    assert journal.failures() == ["third: hung: hang: no answer in 2 s"]


def test_a_worker_that_cannot_begin_ends_the_run(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "gpu.json")
    with pytest.raises(StartError, match=r"no attribute 'absent'|exit code 1"):
        conduct(plan_of(toy_jobs.breaking("cpu"), "absent"), journal)
    assert set(jobs_of(journal).values()) == {"not run"}
    assert read(tmp_path / "gpu.json")["ended"] == "killed: StartError"


def test_kernels_are_compiled_beside_each_other_and_checks_are_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOY_COMPILED", str(tmp_path))
    journal = Journal(None)
    conduct(plan_of(toy_jobs.compiling("cpu"), "compiling", workers=2, seconds=600.0), journal)
    # Every one but that which breaks its worker; the checks are done meanwhile, the others follow in their order.
    assert {path.name for path in tmp_path.iterdir()} == {"first a", "first b", "second right"}
    assert set(list(jobs_of(journal))[:2]) == {"check", "late check"}
    assert list(jobs_of(journal))[2:] == ["first", "second"]
    (failed,) = journal.document["compiling"]["failed"]
    assert failed.startswith("first abort: crashed")
    assert journal.document["compiling"]["workers"] == 2


KILLED = """
import sys
from pathlib import Path
from rich.console import Console
import toy_jobs
from bench.gpu.command import perform
from bench.gpu.conductor import Plan
from bench.gpu.journal import Journal
plan = Plan(toy_jobs.hanging("cpu"), "toy_jobs.hanging", "cpu", 60.0)
perform(plan, Journal(Path(sys.argv[1])), Console())
"""


def test_a_run_that_is_killed_keeps_what_it_finished(tmp_path: Path) -> None:
    file, pid = tmp_path / "gpu.json", tmp_path / "pid"
    path = os.pathsep.join(filter(None, sys.path))
    environment = {**os.environ, "PYTHONPATH": path, "TOY_PID": str(pid)}
    with subprocess.Popen([sys.executable, "-c", KILLED, str(file)], cwd=ROOT, env=environment) as process:
        deadline = time.monotonic() + 120
        while not pid.exists() or not pid.read_text():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        # Before the signal: what a kill without one would leave.
        assert [entry["status"] for entry in json.loads(file.read_text())["jobs"]] == ["ok", "ok"]
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 128 + signal.SIGTERM
    document = json.loads(file.read_text())
    assert [entry["status"] for entry in document["jobs"]] == ["ok", "ok", "not run", "not run"]
    assert [row["case"] for row in document["checks"]] == ["first", "second"]
    assert document["ended"] == "killed: SystemExit"
    assert not Path(f"/proc/{pid.read_text()}").exists(), "the worker must not outlive the run"


def test_a_worker_ends_with_whoever_asks(tmp_path: Path) -> None:
    worker = Worker("toy_jobs.hanging", "cpu")
    worker.start()
    process = worker._process
    assert process is not None
    assert process.stdin is not None
    request = {"job": "third", "seconds": 0, "left_out": {}, "tune": False, "wrong": []}
    process.stdin.write(json.dumps(request).encode() + b"\n")
    process.stdin.close()
    assert process.wait(60) == 0
    worker.close()
    with pytest.raises(StartError, match="the run is ending"):
        worker.start()


# The command


def test_the_command_from_start_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "PROGRAM", "toy_jobs.small")
    monkeypatch.setattr(command, "program", toy_jobs.small)
    monkeypatch.setitem(command.TIMING, "cpu", 0.0)
    file = tmp_path / "gpu.json"
    main(["gpu", "--device", "cpu", "--seconds", "60", "--json", str(file)])
    document = read(file)
    assert {"name", "machine", "versions", "commit", "rows", "device", "ceilings", "checks", "jobs"} <= set(document)
    assert set(document["ceilings"]) == {"bytes", "fp32", "fp16", "bf16", "fp64"}
    assert {entry["job"]: entry["status"] for entry in document["jobs"]}["never"] == "not run"
    assert {row["operator"] for row in document["rows"]} == {"step", "forward", "multi_adapter_linear"}
    for row in document["rows"]:
        assert all(not isinstance(value, (dict, list)) for value in row.values())
        assert row["provider"] == "linear" or 0 < row["of_roofline"] == max(row["of_flops"], row["of_bandwidth"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gpu.json", "gpu.png"]
    draw_gpu(document, tmp_path / "again.png")
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "gpu.png").read_bytes()
    text = page.SECTIONS["gpu"].write(document)
    assert "1 of 6 jobs were not run" in text.replace("\n", " ")
    assert all(name in text for name in ("PEFT", "by hand", "many adapters"))
    assert command.lines(document["rows"])[0].startswith("step lora o 8: ")


def test_measured_stands_beside_predicted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    h200 = {"name": "NVIDIA H200, 140 GiB", "type": "cuda"}
    document = {"device": h200, "ceilings": {"bytes": 4.3e12, "bf16": 780e12, "fp64": 5e13}, "rows": []}
    case = {"operator": "step", "case": "lora", "layers": "qkv", "M": 8192, "K": 4096, "N": "4096+1024+1024", "r": 16}
    case["dtype"] = "bf16"
    providers = ["split", "library", "ours", "peft_fp32", "peft", "unsloth", "linear", "compile"]
    document["rows"] = [{**case, "provider": name, "ms": 1.0} for name in providers]
    device = measured.device_of(document)
    assert (device.bandwidth, device.matmul["bfloat16"], device.multiprocessors) == (4.3e12, 780e12, 132)
    rows = {row["provider"]: row for row in measured.compared(document)}
    # Of what is chosen and compiled the model says nothing.
    assert set(rows) == set(providers) - {"ours", "compile"}
    # Twice 2 M K N at 780 TFLOP/s, five launches and dx added twice.
    assert rows["linear"]["predicted_us"] == pytest.approx(2 * 2 * 8192 * 4096 * 6144 / 780e6, rel=0.15)
    for row in document["rows"]:
        row["ms"] = rows[row["provider"]]["predicted_us"] / 1e3 if row["provider"] in rows else 1.0
    assert all(row["x"] == pytest.approx(1) for row in measured.compared(document))
    assert [row["x"] for row in measured.picks(document)] == [1.0]
    for row in document["rows"]:
        row["ms"] *= 3.0 if row["provider"] == measured.picks(document)[0]["picked"] else 1.0
    (pick,) = measured.picks(document)
    assert pick["x"] > 2
    file = tmp_path / "gpu.json"
    file.write_text(json.dumps(document))
    main(["predictions", "--measured", str(file), "--json", str(tmp_path / "beside.json")])
    assert "in 0 of 1 cases" in capsys.readouterr().out
    assert len(read(tmp_path / "beside.json")["rows"]) == len(rows)


def test_a_failure_is_the_exit_code(monkeypatch: pytest.MonkeyPatch, scripted: type[Scripted]) -> None:
    scripted.answers["first"] = Answer("failed", [], 0.1, "ValueError: not today")
    with pytest.raises(typer.Exit) as left:
        command.perform(plan_of([toy_jobs.Toy("first")]), Journal(None), Console(file=io.StringIO()))
    assert left.value.exit_code == 1


def test_the_list_says_when_each_job_ends(capsys: pytest.CaptureFixture[str]) -> None:
    command.main(None, "cuda", seconds=200.0, tune=False, listed=True)
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == len(program("cuda"))
    assert not printed[0].endswith("beyond the budget")
    assert printed[-1].endswith("beyond the budget")
    assert printed[-1].split()[3] == "time"


NO_KERNELS = """
import runpy, sys
sys.modules["fastadapt_kernels"] = None  # as where kernels/ is not on the path
sys.argv = ["bench", "gpu", "--device", "cpu"]
try:
    runpy.run_module("bench", run_name="__main__")
finally:
    assert "torch" not in sys.modules, "it must not take the time to import PyTorch"
"""


def test_without_the_kernels_it_ends_at_once_with_the_cure() -> None:
    done = subprocess.run([sys.executable, "-c", NO_KERNELS], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "fastadapt_kernels: run it from the clone with PYTHONPATH=.:kernels" in done.stderr
    assert needs.missing(lambda name: name != "typer") == (
        'python -m bench gpu needs packages that cannot be imported here\n  typer: pip install "fastadapt[cli]"'
    )
    assert needs.missing() is None


def test_a_gpu_without_triton_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(command, "there", lambda name: name != "triton")
    with pytest.raises(typer.BadParameter, match="needs Triton"):
        command.chosen_device("")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_that_is_not_there_is_said() -> None:
    with pytest.raises(typer.BadParameter, match="needs a GPU"):
        command.chosen_device("cuda")
    with pytest.raises(typer.BadParameter, match="must be cuda or cpu"):
        command.chosen_device("meta")
    assert command.chosen_device("") == CPU


# Counters and clocks


def ncu_page(*kernels: tuple[str, str, str, str, str]) -> str:
    heads = ["ID", "Kernel Name", *counters._METRICS.split(","), "sm__pipe_tensor_cycles_active.avg.pct_of_peak"]
    text = io.StringIO()
    writer = csv.writer(text, quoting=csv.QUOTE_ALL, lineterminator="\n")
    writer.writerow(heads)
    writer.writerow(["", "", "byte", "byte", "nsecond", "%"])
    writer.writerows([str(index), *kernel] for index, kernel in enumerate(kernels))
    return f"==PROF== Connected to process 7\n{text.getvalue()}==PROF== Disconnected\n"


def test_what_ncu_counts_stands_beside_what_is_counted_here() -> None:
    ours = ("_adapter_linear_kernel(int)", "1,048,576", "2097152", "5000", "71.5")
    theirs = ("void at::native::fill(int)", "1", "1", "1", "0")
    job = counters.Counters(OperatorCase("step", SAVED_CASES["lora"], LLAMA_8B[1], 8192, "bf16"))
    assert {work.phase for work in job.counted()} == set(counters.PHASES.values())
    moved = {work.phase: work.bytes for work in job.counted()}
    (row,) = counters.parsed(ncu_page(ours, theirs), moved)
    assert (row["kernel"], row["us"], row["tensor_percent"]) == ("_adapter_linear_kernel", 5.0, 71.5)
    assert (row["read_mib"], row["written_mib"]) == (1.0, 2.0)
    # x, y and W once, and little else.
    assert row["counted_mib"] == pytest.approx(64 + 64 + 32, abs=2)
    assert counters.parsed("==ERROR== no permission\n", {}) == []
    assert counters.read_case(json.dumps(dataclasses.asdict(job.case))) == job.case


class FakeCuda:
    """As much of torch.cuda as the stopwatch uses: what is captured runs at each replay."""

    def __init__(self, captures: bool) -> None:
        self.captures, self.recording, self.clock = captures, False, 0.0
        self.streams: list[str] = ["theirs"]
        fake = self

        class Graph:
            def replay(self) -> None:
                fake.clock += 1.0

        class Event:
            def __init__(self, **_: Any) -> None:
                self.at = 0.0

            def record(self) -> None:
                self.at = fake.clock

            def synchronize(self) -> None:
                pass

            def elapsed_time(self, other: Event) -> float:
                return 1e3 * (other.at - self.at)

        self.CUDAGraph, self.Event = Graph, Event

    def Stream(self, _: Any) -> SimpleNamespace:  # noqa: N802
        return SimpleNamespace(name="side", wait_stream=lambda other: None)

    def current_stream(self, _: Any) -> SimpleNamespace:
        return SimpleNamespace(name=self.streams[-1])

    def stream(self, stream: SimpleNamespace) -> Any:
        fake = self

        class Context:
            def __enter__(self) -> None:
                self.before = list(fake.streams)
                fake.streams.append(stream.name)

            def __exit__(self, *_: Any) -> None:
                fake.streams[:] = self.before

        return Context()

    def device(self, _: Any) -> Any:
        return self.stream(self.current_stream(None))

    def graph(self, graph: Any, stream: SimpleNamespace, capture_error_mode: str) -> Any:
        fake = self

        class Context:
            def __enter__(self) -> None:
                fake.streams.append(stream.name)
                fake.recording = True

            def __exit__(self, *problem: Any) -> None:
                fake.recording = False
                if not fake.captures:  # as PyTorch, which leaves the thread on the other stream then
                    raise RuntimeError("operation failed due to a previous error during capture")
                fake.streams.pop()

        return Context()

    def synchronize(self, _: Any = None) -> None:
        pass

    def get_device_properties(self, _: Any) -> SimpleNamespace:
        return SimpleNamespace(L2_cache_size=16)


@pytest.mark.parametrize("captures", [True, False])
def test_a_gpu_is_timed_by_replays_of_a_graph(captures: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    fake, calls = FakeCuda(captures), []

    def run() -> None:
        calls.append(fake.recording)
        fake.clock += 5.0  # of the host

    class Fork:
        def __call__(self, **_: Any) -> Any:
            return fake.device(None)

    monkeypatch.setattr(
        stopwatch,
        "torch",
        SimpleNamespace(
            cuda=fake,
            random=SimpleNamespace(fork_rng=Fork()),
            empty=lambda *_, **__: SimpleNamespace(zero_=lambda: None),
            int8=torch.int8,
        ),
    )
    found = stopwatch.sampled({"a": run}, torch.device("cuda", 0), rounds=4)
    assert found["a"].clock == ("graph" if captures else "events")
    assert found["a"].seconds == [1.0 if captures else 5.0] * 4
    # Once to compile and once to be captured; then only where there is no graph.
    assert calls == [False, True] + ([] if captures else [False] * 7)
    assert fake.streams == ["theirs"]


def test_a_candidate_that_fails_is_told_and_the_others_go_on() -> None:
    told: list[str] = []

    def fails() -> Tensor:
        raise RuntimeError("no")

    found = stopwatch.sampled(
        {"a": fails, "b": lambda: None}, CPU, rounds=3, on_failure=lambda name, problem: told.append(name)
    )
    assert told == ["a"]
    assert list(found) == ["b"]


def test_compiled_is_held_to_the_formula_as_well() -> None:
    job = compiled(SAVED_CASES["lora"], SMALL[1], 8, "fp32")
    assert job.standard("compile", job.operands(CPU, 0)) is not None
    assert job.expected(GUESSED["cpu"]) > 20
