"""What pytest-benchmark says here besides: which machine it was, and which numbers to trust."""

from __future__ import annotations

from typing import Any

import pytest

from fastadapt.environment import commit, machine, versions

ADVICE = "providers ran one after another: for ratios trust `python -m bench microbench`, which interleaves them"


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_json(output_json: dict[str, Any]) -> None:
    output_json["fastadapt"] = {"machine": machine(), "versions": versions(), "commit": commit()}


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if terminalreporter.config.getoption("benchmark_only", default=False):
        terminalreporter.write_line(ADVICE)
