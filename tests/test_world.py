"""`fastadapt train` in two processes: what one does with twice the rows a step, and exactly so after a stop."""

from __future__ import annotations

import json
import os
import shutil
import socket
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from rich.console import Console
from safetensors.torch import load_file
from test_train import answers, base, digest, no_picture, options

from fastadapt.commands.train import command as train
from fastadapt.commands.train.options import differences
from fastadapt.commands.train.world import World, processes

__all__ = ["base", "no_picture"]

WORLD = 2
METHODS = ("lora", "vera", "adalora")
pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed")


def both(model: Path, data: Path, output: Path, method: str, **changes: Any) -> Any:
    return options(model, data, output, **{"method": method, "dropout": 0.0, "keep": 9, "save_every": 1, **changes})


def work(rank: int, folder: str, model: str, port: int) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "LOCAL_RANK": rank}
    os.environ |= {name: str(value) for name, value in {**address, "RANK": rank, "WORLD_SIZE": WORLD}.items()}
    train.draw = lambda losses, evaluations, unit, path: path.write_bytes(b"")  # type: ignore[assignment]
    dist.init_process_group("gloo")
    place, out, base = Path(folder), Console(quiet=True), Path(model)
    data = place / "data.jsonl"
    for method in METHODS:
        row = train.run(both(base, data, place / method, method), out)
        (place / f"{method} {rank}.json").write_text(json.dumps(row))
    # With dropout, whose masks are each process's own, stopped after two of four steps.
    train.run(both(base, data, place / "whole", "lora", dropout=0.2), out)
    dist.barrier()
    if rank == 0:
        shutil.copytree(place / "whole", place / "again")
        for path in (place / "again").iterdir():
            if path.is_file():
                path.unlink()
            elif path.name in ("checkpoint-3", "checkpoint-4"):
                shutil.rmtree(path)
    dist.barrier()
    train.run(both(base, data, place / "again", "lora", dropout=0.2), out)
    # What the first process alone sees is said in all.
    for changes in ({"lr": 0.5}, {"device": "cuda:0"}):
        try:
            train.run(both(base, data, place / "whole", "lora", dropout=0.2, **changes), out)
        except ValueError as error:
            (place / f"{next(iter(changes))} {rank}.txt").write_text(str(error))
    dist.barrier()
    os._exit(0)


def test_two_processes_train_what_one_does(base: Path, tmp_path: Path) -> None:
    data = answers(tmp_path / "data.jsonl", 15)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(work, (str(tmp_path), str(base), port), WORLD)
    for method in METHODS:
        alone = both(base, data, tmp_path / f"{method} alone", method, batch_size=4)
        row = train.run(alone, Console(quiet=True))
        rows = [json.loads((tmp_path / f"{method} {rank}.json").read_text()) for rank in range(WORLD)]
        assert rows[0] == rows[1]
        assert (rows[0]["steps"], rows[0]["tokens"]) == (row["steps"], row["tokens"])
        curves = [json.loads((tmp_path / n / "train.json").read_text())["curve"] for n in (method, f"{method} alone")]
        torch.testing.assert_close(*[torch.tensor(curve["train"]) for curve in curves], rtol=1e-5, atol=1e-6)
        losses = [torch.tensor([found["loss"] for found in curve["eval"]]) for curve in curves]
        torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-6)
        ours, theirs = (load_file(place / "adapter_model.safetensors") for place in (tmp_path / method, alone.output))
        for name, tensor in theirs.items():
            torch.testing.assert_close(ours[name], tensor, rtol=1e-3, atol=1e-4)
    assert digest(tmp_path / "again") == digest(tmp_path / "whole")
    for rank in range(WORLD):
        assert "--lr 0.5, then" in (tmp_path / f"lr {rank}.txt").read_text()
        assert "--device must be cpu or cuda" in (tmp_path / f"device {rank}.txt").read_text()
    with pytest.raises(ValueError, match="1 processes, then 2: start torchrun with as many"):
        train.run(both(base, data, tmp_path / "whole", "lora", dropout=0.2), Console(quiet=True))


def test_a_gpu_for_each_process_or_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match="process 1 of this machine needs a GPU of its own, and there are 1"):
        processes("cuda").__enter__()
    monkeypatch.setattr(dist, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"WORLD_SIZE is 2, and this torch has no torch\.distributed"):
        processes("cpu").__enter__()


def test_alone_everything_is_as_it_is_given() -> None:
    world, parameter = World(), torch.nn.Parameter(torch.ones(2))
    world.sum_gradients([parameter])
    assert parameter.grad is None
    assert (world.sum([1.5], torch.device("cpu")), world.gathered(3), world.decided(lambda: 4)) == ([1.5], [3], 4)
    assert differences({}, {"processes": 2}) == ["1 processes, then 2: start torchrun with as many"]
