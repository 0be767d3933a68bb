"""No bench forgets an operator: what it does not run is told, and on purpose."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench import audit, coverage, microbench, traffic
from bench.gpu import command
from fastadapt.commands import doctor
from fastadapt.operators import registry
from fastadapt.operators.registry import OPERATORS

Patch = pytest.MonkeyPatch
ROOT = Path(__file__).parent.parent


def run_audit(path: Path, patch: Patch) -> None:
    patch.delenv("TRITON_INTERPRET", raising=False)
    patch.setattr(audit, "compile_all", lambda pairs, quick: [])
    audit.main(path)


def run_traffic(path: Path, patch: Patch) -> None:
    patch.setattr(traffic, "restart_in_interpreter", lambda: None)
    patch.setattr(traffic, "batch_row", lambda name, case: {"case": name})
    traffic.main(path, cases="many_base_decode")


def run_gpu(path: Path, patch: Patch) -> None:
    patch.setattr(command, "conduct", lambda plan, journal: None)
    command.main(path, "cpu", seconds=1.0, tune=False, listed=False)


def run_microbench(path: Path, patch: Patch) -> None:
    patch.setattr(microbench, "draw_microbench", lambda document, path: None)
    patch.setattr(microbench, "time_problem", lambda *_: ([], {}))
    microbench.main(path, threads=1)


RUNS: dict[str, Callable[[Path, Patch], None]] = {
    "audit": run_audit,
    "traffic": run_traffic,
    "gpu": run_gpu,
    "microbench": run_microbench,
}


@pytest.mark.parametrize("bench", RUNS)
def test_nothing_is_left_out_without_a_reason(bench: str, tmp_path: Path, monkeypatch: Patch) -> None:
    RUNS[bench](tmp_path / "rows.json", monkeypatch)
    missing = json.loads((tmp_path / "rows.json").read_text())["not_covered"]
    # Nor does a reason outlive what it is for.
    assert missing == coverage.LEFT_OUT[bench]
    assert all(missing.values())


@pytest.mark.parametrize("bench", RUNS)
def test_a_new_operator_is_told_by_every_bench(
    bench: str, tmp_path: Path, monkeypatch: Patch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(OPERATORS, "planted_linear", OPERATORS["row_squares"])
    RUNS[bench](tmp_path / "rows.json", monkeypatch)
    document: dict[str, Any] = json.loads((tmp_path / "rows.json").read_text())
    assert document["not_covered"] == {**coverage.LEFT_OUT[bench], "planted_linear": ""}
    assert "not covered: planted_linear, without a reason\n" in capsys.readouterr().out
    assert doctor.untested() == ["planted_linear"]


def test_every_bench_that_covers_operators_is_asked() -> None:
    assert RUNS.keys() == coverage.LEFT_OUT.keys()


def test_the_registry_is_full_where_a_bench_asks_it() -> None:
    code = "from bench import coverage; print(*coverage.registry.OPERATORS)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) == set(OPERATORS)
    assert registry.not_covered(OPERATORS) == []
