"""One process of vLLM's without an engine, for the files that ask for it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    from packed_model import engine_process

    with engine_process(0, 1, tmp_path_factory.mktemp("store") / "alone") as config:
        yield config


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    from packed_model import save_adapters

    return save_adapters(tmp_path_factory.mktemp("adapters"))


@pytest.fixture
def manager(alone: Any) -> Any:
    from packed_model import manager_of

    return manager_of(alone)
