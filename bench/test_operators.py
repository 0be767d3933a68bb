"""Microbenchmarks of the operators: `pytest bench --benchmark-only`, one table for each operator and problem.

Every provider of a case gets the same numbers. On a CPU SmolLM2-135M's layers in fp32, on a GPU Llama-8B's in bf16.
Providers run one after the other here; for ratios on a noisy machine see `python -m bench step` and `gpu`, which
interleave.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from bench.cases import SAVED_CASES
from bench.operators import (
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
from fastadapt.commands.case import Case, Sizes
from fastadapt.commands.doctor import values_of
from fastadapt.operators.backends import HAS_TRITON

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LAYERS, TOKENS, DTYPE = (LLAMA_8B, 2048, "bf16") if DEVICE.type == "cuda" else (SMOLLM2, 512, "fp32")


def cases() -> Iterator[OperatorCase]:
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


# Compilation takes longer than all the rest: `python -m bench gpu` has it.
PAIRS = [(case, name) for case in cases() for name in providers(case, DEVICE) if name != "compile"]


@pytest.mark.parametrize(("case", "provider"), PAIRS, ids=[f"{case.label} {name}" for case, name in PAIRS])
def test_operator(benchmark: Any, case: OperatorCase, provider: str) -> None:
    benchmark.group = case.label
    benchmark.name = provider
    index = PAIRS.index((case, provider))
    benchmark.extra_info.update({**case.describe(), "provider": provider, "device": DEVICE.type, "index": index})
    try:
        run = prepare(case, provider, make_operands(case, DEVICE))
        run()
    except Exception as problem:
        reason = refusal(problem)
        if reason is None:
            raise
        pytest.skip(reason)
    benchmark(finished(run))


# A square layer as wide as the model; the reference is the formula in PyTorch.
SIZES = Sizes(TOKENS, LAYERS[1].in_features, LAYERS[1].out_features[0], 16)
BACKENDS = ("triton", "eager", "reference") if DEVICE.type == "cuda" and HAS_TRITON else ("eager", "reference")
PLAIN = [(case, name) for case in PLAIN_CASES for name in BACKENDS if case.kernels or name != "triton"]


@pytest.mark.parametrize(
    ("case", "provider"), PLAIN, ids=[f"{case.operator} {case.name} {name}" for case, name in PLAIN]
)
def test_plain_operator(benchmark: Any, case: Case, provider: str) -> None:
    benchmark.group, benchmark.name = f"{case.operator} {case.name} M{TOKENS} {DTYPE}", provider
    benchmark.extra_info.update(
        {"operator": case.operator, "case": case.name, "layers": LAYERS[1].name}
        | dict(zip("MKNr", SIZES, strict=True))
        | {"dtype": DTYPE, "provider": provider, "device": DEVICE.type}
        | {"index": len(PAIRS) + PLAIN.index((case, provider))}
    )
    values = {name: value.to(DEVICE) for name, value in values_of(case, DTYPES[DTYPE], SIZES).items()}
    run = prepare_plain(case, provider, values)
    run()
    benchmark(finished(run))


def finished(run: Run) -> Callable[[], None]:
    """The work to its end, also where a GPU does it."""

    def call() -> None:
        run()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    return call
