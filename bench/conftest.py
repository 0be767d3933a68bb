"""What pytest-benchmark's JSON says about the machine, as every other result of this directory does."""

from __future__ import annotations

from typing import Any

import pytest

from fastadapt.environment import commit, machine, versions


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_json(output_json: dict[str, Any]) -> None:
    output_json["fastadapt"] = {"machine": machine(), "versions": versions(), "commit": commit()}
