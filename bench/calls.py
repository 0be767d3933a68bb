"""What one call of a small layer costs in microseconds: the price of Python, checks and bookkeeping, not of products.

Layers of one model (64 -> 64 features at 8 tokens, or SmolLM2's q, k and v at 8 tokens), adapted by each method, beside
the frozen layers, the formula in plain torch operations under autograd, and PEFT. A round times every variant
`repeats` times over, in a shuffled order; what is reported are medians over the rounds, of microseconds and of ratios
within a round. "cold": a large product runs before each call, so that caches hold nothing of it; the call alone is
timed. Python calls are counted by a profile; instructions by callgrind, where --instructions asks for them.
"""

from __future__ import annotations

import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
import typer
from torch import Tensor, nn

import fastadapt
from bench import measure, page, report
from bench.cases import chosen
from bench.plots import Document
from bench.road import walked
from fastadapt.commands.report import write_json

Phase = Literal["forward", "both"]
PHASES: tuple[Phase, ...] = ("forward", "both")
SIDES = ("frozen", "ops", "ours", "peft")
TOKENS = 8
QKV = ("q_proj", "k_proj", "v_proj")
SMALL, SMOLLM2 = (64, (64,)), (576, (576, 192, 192))


class Projections(nn.Module):
    """Linear layers over one x: one, or q, k and v."""

    def __init__(self, k: int, outputs: Sequence[int]) -> None:
        super().__init__()
        self.names = QKV[: len(outputs)]
        for name, n in zip(self.names, outputs, strict=True):
            setattr(self, name, nn.Linear(k, n, bias=False))

    def forward(self, x: Tensor) -> list[Tensor]:
        return [getattr(self, name)(x) for name in self.names]


class PlainLoRA(nn.Module):
    """LoRA or DoRA as one would write it: a few torch operations, differentiated by autograd."""

    def __init__(self, base: nn.Linear, r: int, *, dora: bool) -> None:
        super().__init__()
        self.base = base
        self.A = nn.Parameter(torch.randn(r, base.in_features) / 8)
        self.B = nn.Parameter(torch.randn(base.out_features, r) / 8)
        self.m = nn.Parameter(base.weight.detach().norm(dim=1)) if dora else None

    def forward(self, x: Tensor) -> Tensor:
        W = self.base.weight
        y: Tensor = F.linear(x, W, self.base.bias) + F.linear(F.linear(x, self.A), self.B) * 2.0
        if self.m is None:
            return y
        norm = (W + 2.0 * (self.B @ self.A)).norm(dim=1).detach()
        scaled: Tensor = (self.m / norm) * y
        return scaled


@dataclass(frozen=True)
class CallCase:
    """One adapter on one set of layers; `kind` names the config of ours and of PEFT's."""

    name: str
    kind: str
    layers: tuple[int, tuple[int, ...]] = SMALL
    r: int = 8
    dtype: torch.dtype = torch.float32
    autocast: bool = False

    @property
    def sides(self) -> list[str]:
        known = {"ops": self.kind in ("lora", "dora"), "peft": self.kind in _PEFT}
        return [side for side in SIDES if known.get(side, True)]


_OURS = {
    "lora": "LoRAConfig",
    "dora": "DoRAConfig",
    "vera": "VeRAConfig",
    "adalora": "AdaLoRAConfig",
    "hira": "HiRAConfig",
    "ssf": "SSFConfig",
}
_PEFT = {"lora": "LoraConfig", "dora": "LoraConfig", "vera": "VeraConfig", "adalora": "AdaLoraConfig"}

CASES = {
    case.name: case
    for case in (
        *[CallCase(kind, kind) for kind in _OURS],
        CallCase("qkv", "lora", (64, (64, 64, 64))),
        CallCase("qkv_dora", "dora", (64, (64, 64, 64))),
        CallCase("smollm2_qkv", "lora", SMOLLM2, r=16),
        CallCase("lora_bf16", "lora", dtype=torch.bfloat16),
        CallCase("dora_bf16", "dora", dtype=torch.bfloat16),
        CallCase("lora_autocast", "lora", autocast=True),
    )
}


def model_of(case: CallCase, side: str) -> nn.Module:
    """The case's layers with an adapter of a side."""
    torch.manual_seed(0)
    k, outputs = case.layers
    model = Projections(k, outputs).to(case.dtype).requires_grad_(False)
    targets = list(model.names)
    if side == "ops":
        for name in targets:
            dora = case.kind == "dora"
            setattr(model, name, PlainLoRA(getattr(model, name), case.r, dora=dora).to(case.dtype))
    elif side == "ours":
        fields: dict[str, Any] = {"target_modules": targets}
        if case.kind == "adalora":
            fields |= {"init_r": case.r, "total_step": 1000}
        elif case.kind != "ssf":
            fields["r"] = case.r
        return fastadapt.inject(model, getattr(fastadapt, _OURS[case.kind])(**fields))
    elif side == "peft":
        return _peft(model, case, targets)
    return model


def _peft(model: nn.Module, case: CallCase, targets: list[str]) -> nn.Module:
    import peft

    fields: dict[str, Any] = {"target_modules": targets}
    if case.kind == "adalora":
        fields |= {"init_r": case.r, "total_step": 1000}
    else:
        fields["r"] = case.r
    if case.kind == "dora":
        fields["use_dora"] = True
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns of fields that a bare module does not have
        wrapped = peft.get_peft_model(model, getattr(peft, _PEFT[case.kind])(**fields))
    adapted: nn.Module = wrapped.base_model.model
    return adapted


def call_of(case: CallCase, side: str, phase: Phase) -> Callable[[], object]:
    """A forward in eval mode without gradients, or a forward and a backward in training; x is new in each call."""
    model = model_of(case, side)
    x = torch.randn(TOKENS, case.layers[0], dtype=case.dtype)

    def forward() -> None:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=case.autocast):
            model(x.view_as(x))

    if phase == "forward":
        model.eval()
        return forward
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    out = torch.bfloat16 if case.autocast else case.dtype
    dys = [torch.randn(TOKENS, n, dtype=out) for n in case.layers[1]]

    def both() -> None:
        leaf = x.detach().requires_grad_()
        if case.autocast:
            with torch.autocast("cpu", torch.bfloat16):
                ys = model(leaf)
        else:
            ys = model(leaf)
        torch.autograd.backward(ys, dys)
        for parameter in trained:
            parameter.grad = None

    return both


@cache
def _wiper() -> tuple[Tensor, Tensor]:
    return torch.randn(512, 1024), torch.randn(1024, 1024)


def _cold(call: Callable[[], object]) -> float:
    """Seconds of one call right behind a large product."""
    a, b = _wiper()
    torch.mm(a, b)
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def instructions(case: CallCase, side: str, phase: Phase, number: int = 50) -> float:
    """Instructions of one call, by callgrind (valgrind must be installed); takes a minute."""
    from torch.utils.benchmark import Timer

    setup = (
        f"import torch; torch.set_num_threads(1); from bench.calls import CASES, call_of; "
        f"call = call_of(CASES[{case.name!r}], {side!r}, {phase!r}); [call() for _ in range(20)]"
    )
    timer: Any = Timer("call()", setup)
    counted = timer.collect_callgrind(number=number, collect_baseline=False)
    return float(counted.counts(denoise=False)) / number


def run(
    cases: Sequence[CallCase], rounds: int, repeats: int, *, peft: bool = True, cold: bool = True, counts: bool = False
) -> list[report.Row]:
    """Measure; one row a case, phase and side."""
    rows: list[report.Row] = []
    for case in report.tracked(list(cases), "cases"):
        for phase in PHASES:
            calls = {side: call_of(case, side, phase) for side in case.sides if peft or side != "peft"}
            for call in calls.values():
                for _ in range(20):
                    call()
            repeated = {side: measure.repeated(call, repeats) for side, call in calls.items()}
            results = measure.interleave(repeated, rounds)
            chilled: dict[str, list[float]] = {side: [] for side in calls}
            for _ in range(10 * rounds if cold else 0):
                for side, call in calls.items():
                    chilled[side].append(_cold(call))
            for side, call in calls.items():
                row: report.Row = {"case": case.name, "phase": phase, "side": side}
                row["us"] = statistics.median(t[side].wall for t in results) / repeats * 1e6
                row["us_cpu"] = statistics.median(t[side].cpu for t in results) / repeats * 1e6
                for other in calls:
                    ratio = measure.compare(results, side, [other])[0]
                    row |= {f"x_{other}": ratio.median, f"x_{other}_low": ratio.low, f"x_{other}_high": ratio.high}
                if cold:
                    row["us_cold"] = statistics.median(chilled[side]) * 1e6
                row["python_calls"] = walked(call)[2]
                if counts:
                    row["instructions"] = instructions(case, side, phase)
                rows.append(row | {"rounds": rounds, "repeats": repeats, "threads": torch.get_num_threads()})
    return rows


@page.section("calls", "Microseconds of a call")
def _section(document: Document) -> str:
    """One row a case and phase: microseconds by side, and ours over plain operations and PEFT."""
    found: dict[tuple[str, str], dict[str, report.Row]] = {}
    for row in document["rows"]:
        found.setdefault((row["case"], row["phase"]), {})[row["side"]] = row
    rows = []
    for (case, phase), sides in found.items():
        times = [page.number(sides.get(side, {}).get("us"), 1) for side in SIDES]
        ours = sides["ours"]
        ratios = [page.span(ours, f"x_{other}", f"x_{other}_low", f"x_{other}_high") for other in ("ops", "peft")]
        what = "forward" if phase == "forward" else "forward + backward"
        rows.append(" | ".join([f"{case}, {what}", *times, *ratios]))
    return page.table("µs a call | frozen | plain torch | ours | PEFT | ours / plain torch | ours / PEFT", rows)


def main(
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the rows there.")] = None,
    rounds: Annotated[int, typer.Option(help="Counted rounds.")] = 30,
    repeats: Annotated[int, typer.Option(help="Calls in a round.")] = 50,
    cases: Annotated[str, typer.Option(help=f"Comma-separated, of {', '.join(CASES)}; all by default.")] = "",
    threads: int = 1,
    peft: Annotated[bool, typer.Option(help="Measure PEFT beside.")] = True,
    cold: Annotated[bool, typer.Option(help="Also with caches wiped before each call.")] = True,
    count: Annotated[bool, typer.Option("--instructions", help="Count instructions too, by callgrind.")] = False,
) -> None:
    """Microseconds of one call of a small layer: frozen, plain torch operations, ours by method, PEFT's."""
    torch.set_num_threads(threads)
    rows = run(chosen(CASES, cases), rounds, repeats, peft=peft, cold=cold, counts=count)
    columns = {
        "case": "case",
        "phase": "phase",
        "side": "side",
        "us": "us",
        "us_cold": "us cold",
        "x_frozen": "x frozen",
        "x_ops": "x ops",
        "x_peft": "x PEFT",
        "x_peft_low": "95% from",
        "x_peft_high": "to",
        "python_calls": "calls",
    }
    report.print_table(f"A call, {threads} threads, {rounds} rounds of {repeats}, {sys.platform}", rows, columns)
    if json_file is not None:
        write_json(json_file, "calls", rows)
