"""Microbenchmarks of the operators by habit: `pytest bench --benchmark-only`, one table for each operator and problem.

Providers run one after the other here, so a table is no better than the machine was quiet: `python -m bench microbench`
runs the same cases interleaved, and is the one to trust.
"""

from __future__ import annotations

from typing import Any

import pytest

from bench.microbench import DEVICE, Problem, problems, ready

PAIRS = [(problem, name) for problem in problems() for name in problem.providers]


@pytest.mark.parametrize(("problem", "provider"), PAIRS, ids=[f"{one.label} {name}" for one, name in PAIRS])
def test_operator(benchmark: Any, problem: Problem, provider: str) -> None:
    benchmark.group, benchmark.name = problem.label, provider
    benchmark.extra_info.update({**problem.columns, "provider": provider, "device": DEVICE.type})
    call = ready(problem, provider)
    if call is None:
        pytest.skip(f"not for {provider}")
    benchmark(call)
