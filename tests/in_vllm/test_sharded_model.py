"""A whole model among three processes, without an engine: each has a part of every layer."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("vllm.lora", reason="vLLM has an environment of its own: tests/in_vllm/environment.py")

import torch.multiprocessing as processes
from test_model import Runner, plugged_in, wrong
from tiny_served import ADAPTERS, MODELS, Served, save

COUNT = 3


def run(rank: int, store: Path, served: Served) -> None:
    with plugged_in(rank, COUNT, store):
        runner = Runner(served.model, tensor_parallel_size=COUNT, distributed_executor_backend="mp")
        assert wrong(runner, served, ["", "lora", "rslora", "dora", "vera", "vera of the same key"]) == []
        assert wrong(runner, served, ["", "a bias of B", "a bias of its own", "dora"]) == []


@pytest.mark.parametrize("kind", MODELS)
def test_adapters_of_all_kinds_and_base_rows_in_one_batch(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = save(tmp_path, kind, ADAPTERS)
    processes.start_processes(run, args=(tmp_path / f"store_of_{kind}", served), nprocs=COUNT, start_method="fork")
