"""Times of an operator beside others, each held to the formula in fp64 on the very operands on which it is timed."""

from __future__ import annotations

import gc
import math
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from bench.gpu.clock import Timing, timed
from bench.gpu.job import Desk, Job, Rates, reason, require_alive
from bench.gpu.unsloth import ManualLoRA
from bench.operators import (
    COVERS,
    DTYPES,
    SCALING,
    Operands,
    OperatorCase,
    Outputs,
    Run,
    Verdict,
    formula,
    judge,
    make_operands,
    prepare,
    prepare_plain,
    refusal,
    tuner_key,
)
from bench.report import Row
from fastadapt.commands.case import Case, Sizes
from fastadapt.commands.doctor import values_of
from fastadapt.operators.adapter_linear import tuner
from fastadapt.operators.adapter_linear.strategies import STRATEGIES

# Ours, which must run on a GPU: a refusal there is a failure. Others may lack what they need.
OURS = (*(name for name, backend in STRATEGIES.items() if backend == "triton"), "library", "ours", "ungrouped")
OURS += ("triton", "eager")

_MOST_COPIES = 8
# What a job takes beside its runs: operands, allocations, captures.
_BASE_SECONDS = 0.3
_COMPILER_SECONDS = {"cuda": 40.0, "cpu": 30.0}
_TIMING_SECONDS = {"cuda": 0.2, "cpu": 0.02}

Exact = tuple[Outputs, Outputs]


class Prepared(NamedTuple):
    """What of a job's providers can be timed: a run for each set of operands; their verdicts; why others cannot."""

    runs: dict[str, list[Run]]
    verdicts: dict[str, Verdict]
    notes: dict[str, str]
    failed: set[str]


class Timed(Job):
    """An operator on one problem, with its providers. baseline: whose time the others are multiples of."""

    part = "rows"
    baseline = "reference"

    @abstractmethod
    def columns(self) -> Row:
        """operator, case, layers, M, K, N, r, dtype."""

    @property
    @abstractmethod
    def amounts(self) -> tuple[float, float]:
        """Operations of the formula, and the bytes of its tensors, each moved once."""

    @abstractmethod
    def operands(self, device: torch.device, seed: int) -> Any:
        """Random operands."""

    @abstractmethod
    def prepare(self, provider: str, operands: Any) -> Run:
        """The work of a provider on operands, as a call that gives all that it makes."""

    @abstractmethod
    def standard(self, provider: str, operands: Any) -> tuple[str, Callable[[], Exact]] | None:
        """What a provider is held to, and a name of it: the formula in fp64 and in its dtype. None: it is not."""

    def record(self, operands: Any, times: Mapping[str, float]) -> None:
        """Gives the tuner the seconds of strategies."""

    def run(self, desk: Desk) -> list[Row]:
        names = self.providers(desk.device.type)
        prepared = Prepared({}, {}, dict(desk.left_out), {name for name in desk.left_out if name in OURS})

        def failure(name: str, problem: Exception) -> None:
            refused = refusal(problem)
            prepared.notes[name] = refused or reason(problem)
            prepared.runs.pop(name, None)
            if refused is None:
                require_alive(desk, problem)
            if name in OURS and (refused is None or desk.on_gpu):
                prepared.failed.add(name)

        sets = []
        try:
            sets = [self.operands(desk.device, seed) for seed in range(self._copies(desk))]
            self._prepare(names, sets, desk, prepared, failure)
            desk.at("timing")
            timings = timed(prepared.runs, desk, failure)
        except torch.OutOfMemoryError as problem:
            require_alive(desk, problem)
            timings = {}
            prepared.notes.update(dict.fromkeys(names, "out of memory"))
            prepared.failed.update(set(names) & set(OURS))
        if desk.tune and sets:
            right = set(timings) & set(STRATEGIES) - desk.wrong
            if right:
                self.record(sets[0], {name: timings[name].median for name in right})
        rows = [self._row(name, prepared, timings) for name in names]
        prepared.runs.clear()
        gc.collect()
        return rows

    def _copies(self, desk: Desk) -> int:
        """So many sets of operands that a cache holds them no more."""
        if not desk.on_gpu:
            return 1
        cache = getattr(torch.cuda.get_device_properties(desk.device), "L2_cache_size", 0)
        return max(1, min(_MOST_COPIES, math.ceil(2 * cache / max(1.0, self.amounts[1]))))

    def _prepare(
        self,
        names: list[str],
        sets: list[Any],
        desk: Desk,
        prepared: Prepared,
        failure: Callable[[str, Exception], None],
    ) -> None:
        """Runs and checks every provider."""
        exact: dict[str, Exact] = {}
        for name in names:
            if name in desk.left_out:
                continue
            desk.at(name)
            try:
                prepared.runs[name] = [self.prepare(name, own) for own in sets]
                verdict = self._verdict(name, prepared.runs[name][0], sets[0], exact)
                desk.finish()
            except Exception as problem:  # whatever breaks is a row, and the others go on
                failure(name, problem)
                continue
            if verdict is not None:
                prepared.verdicts[name] = verdict
                if verdict.failed:
                    prepared.notes[name] = "; ".join(verdict.failed)
                    if name in OURS:  # what is wrong has no time
                        prepared.failed.add(name)
                        del prepared.runs[name]

    def _verdict(self, name: str, run: Run, operands: Any, exact: dict[str, Exact]) -> Verdict | None:
        torch.manual_seed(0)
        actual = run()
        standard = self.standard(name, operands)
        if standard is None:
            return None
        key, make = standard
        if key not in exact:
            exact.clear()  # in fp64 one is large enough
            exact[key] = make()
        right, plain = exact[key]
        return judge(actual, {output: right[output] for output in actual}, plain)

    def _row(self, name: str, prepared: Prepared, timings: Mapping[str, Timing]) -> Row:
        operations, moved = self.amounts
        verdict, timing, base = prepared.verdicts.get(name), timings.get(name), timings.get(self.baseline)
        row = {**self.columns(), "provider": name, "status": "ok" if timing else "skipped"}
        if name in prepared.failed:
            row["status"] = "failed"
        known = verdict is not None and math.isfinite(verdict.worst)
        row |= {"note": prepared.notes.get(name, ""), "x_allowed": verdict.worst if known and verdict else None}
        row |= {
            "ms": timing and timing.median * 1e3,
            "low_ms": timing and timing.low * 1e3,
            "high_ms": timing and timing.high * 1e3,
            "rounds": timing.rounds if timing else 0,
            "clock": timing and timing.clock,
            "host_us": timing and timing.host and timing.host * 1e6,
            "baseline": self.baseline,
            "x": timing.median / base.median if timing and base else None,
        }
        return row | {"gflop": operations / 1e9, "minimum_mib": moved / 2**20}

    def expected(self, rates: Rates) -> float:
        operations, moved = self.amounts
        # A call reaches half of a ceiling, and somewhat more than the least bytes.
        call = max(operations / rates.flops[self.columns()["dtype"]], moved / rates.bytes) * 2 + 3e-5
        names = self.providers(rates.device_type)
        each = 6 * call + min(max(3 * call, _TIMING_SECONDS[rates.device_type]), 36 * call)
        compiling = _COMPILER_SECONDS[rates.device_type] if "compile" in names else 0.0
        return _BASE_SECONDS + compiling + len(names) * each + 4 * operations / rates.flops["fp64"]

    def to_compile(self, device_type: str) -> list[str]:
        return [name for name in self.providers(device_type) if name in OURS and name not in ("ours", "library")]

    def compile(self, provider: str, desk: Desk) -> None:
        desk.at(provider)
        self.prepare(provider, self.operands(desk.device, 0))()
        desk.finish()


@dataclass(frozen=True)
class LayerTimes(Timed):
    """An adapter on a layer or a group: its strategies, what fastadapt takes, and others."""

    case: OperatorCase
    asked: tuple[str, ...]

    @property
    def baseline(self) -> str:  # type: ignore[override]
        return "reference" if self.case.operator == "weight_norm" else "linear"

    @property
    def label(self) -> str:
        return f"time {self.case.label}{' compiled' if 'compile' in self.asked else ''}"

    @property
    def covers(self) -> tuple[str, ...]:
        return COVERS[self.case.operator]

    @property
    def amounts(self) -> tuple[float, float]:
        return self.case.flops, self.case.minimum_bytes

    def columns(self) -> Row:
        return self.case.describe()

    def providers(self, device_type: str) -> list[str]:
        return [name for name in self.asked if device_type == "cuda" or STRATEGIES.get(name) != "triton"]

    def operands(self, device: torch.device, seed: int) -> Operands:
        return make_operands(self.case, device, seed)

    def prepare(self, provider: str, operands: Any) -> Run:
        if provider == "unsloth":
            return _manual(self.case, operands)
        return prepare(self.case, provider, operands)

    def standard(self, provider: str, operands: Any) -> tuple[str, Callable[[], Exact]] | None:
        # Under dropout the mask must be known, which it is of a strategy.
        if provider in ("linear", "reference") or (self.case.dropout and provider not in STRATEGIES):
            return None
        backend = STRATEGIES.get(provider, "eager") if self.case.dropout else "eager"
        return backend, lambda: formula(self.case, operands, backend)

    def record(self, operands: Any, times: Mapping[str, float]) -> None:
        if self.case.operator != "weight_norm":
            tuner.record(tuner_key(self.case, operands), times)


def _manual(case: OperatorCase, operands: Operands) -> Run:
    """The step of LoRA by a backward written by hand; its adapters in the dtype of the base."""
    same = operands.to(DTYPES[case.dtype], DTYPES[case.dtype])
    x = same.x.detach().requires_grad_()
    adapters = [{name: value.detach().requires_grad_() for name, value in one.items()} for one in same.adapters]
    tensors = [t for weight, one in zip(same.weights, adapters, strict=True) for t in (weight, one["A"], one["B"])]
    leaves = {"x": x} | {f"{name}{i}": one[name] for i, one in enumerate(adapters) for name in ("A", "B")}

    def step() -> Outputs:
        ys = ManualLoRA.apply(x, SCALING, *tensors)
        grads = torch.autograd.grad(ys, list(leaves.values()), same.dys)
        outputs = {f"y{i}": y.detach() for i, y in enumerate(ys)}
        return outputs | dict(zip((f"d{name}" for name in leaves), grads, strict=True))

    return step


@dataclass(frozen=True)
class PlainTimes(Timed):
    """A case of doctor's at a size that is worth a time: on Triton or eagerly, beside the formula in PyTorch."""

    case: Case
    sizes: Sizes
    dtype: str

    @property
    def label(self) -> str:
        return f"time {self.case.operator} {self.case.name} M{self.sizes.M} {self.dtype}"

    @property
    def covers(self) -> tuple[str, ...]:
        return self.case.covers

    @property
    def amounts(self) -> tuple[float, float]:
        """Of the large product where the operator has one, and of its streams, forward and backward."""
        m, k, n, r = self.sizes
        products = {"hadamard_linear": 3 * k * n, "bottleneck": 4 * r * (k + n), "adapter_update": 3 * r * (k + n)}
        size = DTYPES[self.dtype].itemsize
        return 2.0 * m * products[self.case.operator], size * (2.0 * m * (k + n) + 2 * k * n)

    def columns(self) -> Row:
        columns = {"operator": self.case.operator, "case": self.case.name, "layers": ""}
        return columns | dict(zip("MKNr", self.sizes, strict=True)) | {"dtype": self.dtype}

    def providers(self, device_type: str) -> list[str]:
        triton = ["triton"] if device_type == "cuda" and self.case.kernels else []
        return [*triton, "eager", "reference"]

    def operands(self, device: torch.device, seed: int) -> Outputs:
        values = values_of(self.case, DTYPES[self.dtype], self.sizes)
        return {name: value.to(device) for name, value in values.items()}

    def prepare(self, provider: str, operands: Any) -> Run:
        return prepare_plain(self.case, provider, operands)

    def standard(self, provider: str, operands: Any) -> tuple[str, Callable[[], Exact]] | None:
        def exact() -> Exact:
            doubles = {name: value.double() for name, value in operands.items()}
            right, plain = (prepare_plain(self.case, "reference", own)() for own in (doubles, operands))
            return right, plain

        return None if provider == "reference" else ("", exact)
