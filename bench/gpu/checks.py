"""Checks: every operator against its formula in fp64, at sizes that no tile divides."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from bench.gpu.job import Desk, Job, Rates, reason, require_alive
from bench.operators import COVERS, DTYPES, OperatorCase, check, refusal, runnable_strategies
from bench.report import Row
from fastadapt.commands import doctor
from fastadapt.commands.case import Case
from fastadapt.operators.adapter_linear.strategies import STRATEGIES

# Seconds of a small check, most of which are launches and copies.
_EACH = 0.15


@dataclass(frozen=True)
class DoctorCheck(Job):
    """One of doctor's cases: on Triton on a GPU, eagerly where there is no kernel or no GPU."""

    part = "checks"
    case: Case
    dtype: str

    @property
    def label(self) -> str:
        return f"check {self.case.operator} {self.case.name} {self.dtype}"

    @property
    def covers(self) -> tuple[str, ...]:
        return self.case.covers

    def run(self, desk: Desk) -> list[Row]:
        backend = "triton" if desk.on_gpu and self.case.kernels else "eager"
        desk.at(backend)
        verdict = doctor.check(self.case, desk.device, backend, DTYPES[self.dtype])
        if verdict.failed:
            require_alive(desk, RuntimeError("; ".join(verdict.failed)))
        columns = {"operator": self.case.operator, "case": self.case.name, "layers": "", "M": None, "dtype": self.dtype}
        return [columns | {"provider": backend} | outcome(verdict.failed, None)]

    def expected(self, rates: Rates) -> float:
        return _EACH


@dataclass(frozen=True)
class GroupCheck(Job):
    """A layer or a group under every strategy, and as fastadapt chooses by itself."""

    part = "checks"
    case: OperatorCase

    @property
    def label(self) -> str:
        return f"check {self.case.label}"

    @property
    def covers(self) -> tuple[str, ...]:
        return COVERS[self.case.operator]

    def run(self, desk: Desk) -> list[Row]:
        names = self.providers(desk.device.type)
        return [self._row(name, desk) for name in names if name not in desk.left_out] + [
            self._columns(name) | outcome([note], None) for name, note in desk.left_out.items()
        ]

    def providers(self, device_type: str) -> list[str]:
        """The strategies that do not refuse the case, and "ours" where the mask that it draws is known."""
        adapter, wide = self.case.adapter, self.case.dtype == "fp32"
        trains_scales = wide and adapter.method == "vera" and self.case.operator == "step"
        refusing = ["fused"] * (adapter.r > 64) + ["recompose"] * (not wide) + ["expand"] * (not trains_scales)
        names = [name for name in runnable_strategies(torch.device(device_type)) if name not in refusing]
        return names + ([] if self.case.dropout else ["ours"])

    def _columns(self, provider: str) -> Row:
        return {**self.case.describe(), "provider": provider}

    def _row(self, provider: str, desk: Desk) -> Row:
        desk.at(provider)
        try:
            verdict = check(self.case, provider, desk.device)
            desk.finish()
        except Exception as problem:  # whatever breaks is a row, and the run goes on
            refused = refusal(problem)
            # A GPU runs what Triton has.
            must = isinstance(problem, ImportError) or (desk.on_gpu and STRATEGIES.get(provider) == "triton")
            if refused is None or must:
                require_alive(desk, problem)
                return self._columns(provider) | outcome([reason(problem)], None)
            return self._columns(provider) | {"status": "skipped", "x_allowed": None, "note": refused}
        return self._columns(provider) | outcome(verdict.failed, verdict.worst)

    def expected(self, rates: Rates) -> float:
        return 4 * _EACH


def outcome(failed: list[str], worst: float | None) -> Row:
    """The last columns of a check: the largest error as a share of what is allowed, and what exceeds it."""
    known = worst is not None and math.isfinite(worst)
    return {"status": "failed" if failed else "ok", "x_allowed": worst if known else None, "note": "; ".join(failed)}
