"""Programs of toy jobs for a worker process: what they do is in their names. Read by tests/test_gpu_run.py."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

from bench.cases import SAVED_CASES
from bench.gpu import program
from bench.gpu.ceilings import Ceilings
from bench.gpu.checks import DoctorCheck
from bench.gpu.job import Desk, Job, Rates
from bench.operators import SMALL
from bench.report import Row
from fastadapt.commands.doctor import CASES


@dataclass(frozen=True)
class Toy(Job):
    """asked: providers, of which one that is called "abort" or "hang" does so."""

    part = "checks"
    name: str
    asked: tuple[str, ...] = ("right",)
    takes: float = 0.0

    @property
    def label(self) -> str:
        return self.name

    def providers(self, device_type: str) -> list[str]:
        return list(self.asked)

    def expected(self, rates: Rates) -> float:
        return self.takes

    def run(self, desk: Desk) -> list[Row]:
        rows = []
        for provider in self.asked:
            if provider in desk.left_out:
                rows.append(self._row(provider, "failed", desk.left_out[provider]))
                continue
            desk.at(provider)
            if provider == "abort":
                os.abort()
            if provider == "hang":
                if place := os.environ.get("TOY_PID"):
                    Path(place).write_text(str(os.getpid()))
                time.sleep(600)
            if provider == "raise":
                raise ValueError("not today")
            print("a library says something on stdout")
            rows.append(self._row(provider, "ok", ""))
        return rows

    def _row(self, provider: str, status: str, note: str) -> Row:
        row = {"operator": "toy", "case": self.name, "layers": "", "M": None, "dtype": "fp32"}
        return {**row, "provider": provider, "status": status, "note": note, "x_allowed": None}

    def to_compile(self, device_type: str) -> list[str]:
        return list(self.asked)

    def compile(self, provider: str, desk: Desk) -> None:
        desk.at(provider)
        if provider == "abort":
            os.abort()
        if place := os.environ.get("TOY_COMPILED"):
            Path(place, f"{self.name} {provider}").touch()


class Compiled(Toy):
    """One whose kernels are compiled before it is done."""

    part = "counters"


def breaking(device_type: str) -> list[Job]:
    return [Toy("first"), Toy("second", ("right", "abort", "also right")), Toy("third", ("raise",)), Toy("fourth")]


def hanging(device_type: str) -> list[Job]:
    return [Toy("first"), Toy("second"), Toy("third", ("hang",)), Toy("fourth")]


def compiling(device_type: str) -> list[Job]:
    return [Toy("check"), Compiled("first", ("a", "abort", "b")), Compiled("second"), Toy("late check")]


def small(device_type: str) -> list[Job]:
    """One job of each kind that a document is drawn from, and one that no budget holds."""
    lora = SAVED_CASES["lora"]
    jobs: list[Job] = [DoctorCheck(CASES[0], "fp32"), Ceilings(1 << 16, 64), Toy("never", takes=1e6)]
    jobs += [program.step(lora, SMALL[1], 8, "fp32"), program.forward(lora, SMALL[1], 1, "fp32")]
    return [*jobs, program.BatchTimes(SMALL[1], 2, 1, 16, "fp32")]
