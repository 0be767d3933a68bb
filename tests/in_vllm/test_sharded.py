"""Packed layers shared out among processes: each holds its rows, or its columns and a part of every sum."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("vllm.lora", reason="vLLM has an environment of its own: tests/in_vllm/environment.py")

import torch
import torch.multiprocessing as processes
from packed_model import METHODS, check, engine_process, manager_of, save_adapters


def run(rank: int, count: int, store: Path, directories: dict[str, Path]) -> None:
    with engine_process(rank, count, store) as config:
        manager = manager_of(config)
        for name in METHODS:
            check(manager, ["", name, ""], directories)
        check(manager, ["LoRA", "", "DoRA", "VeRA", "LoRA"], directories)
        # Few tokens in 16 bits, which are sums of rows of each one's part of the pair.
        halves = manager_of(config, torch.bfloat16)
        for names in (["", "VeRA", ""], ["LoRA", "", "DoRA", "VeRA", "LoRA"]):
            check(halves, names, directories)


# With four each head of keys and values is there twice.
@pytest.mark.parametrize("count", [2, 4])
def test_all_methods_among_processes(count: int, tmp_path: Path) -> None:
    directories = save_adapters(tmp_path)
    processes.start_processes(
        run, args=(count, tmp_path / f"of_{count}", directories), nprocs=count, start_method="fork"
    )
