"""An engine of three worker processes: each has a part of every layer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("vllm.lora", reason="vLLM has an environment of its own: tests/in_vllm/environment.py")

from offline_engine import engine, wrong
from shared_memory import given_back
from tiny_served import ADAPTERS, save


@pytest.fixture(autouse=True)
def no_memory_is_left() -> Iterator[None]:
    with given_back():
        yield


def test_adapters_of_all_kinds_and_base_rows_in_one_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    served = save(tmp_path, "llama", ADAPTERS)
    llm = engine(served.model, tensor_parallel_size=3, distributed_executor_backend="mp")
    assert wrong(llm, served, ["", "lora", "rslora", "dora", "vera", "vera of the same key"]) == []
    assert wrong(llm, served, [*served.directories, ""]) == []
