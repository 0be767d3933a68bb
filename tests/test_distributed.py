"""Two processes: what DDP and FSDP train is what one process trains, and shards are saved whole."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from tiny_models import llama, output, randomise, tokens
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

import fastadapt
from fastadapt.methods import AdapterConfig
from fastadapt.model.peft_files import CONFIG_FILE, TENSOR_FILE
from fastadapt.model.sharded import whole
from fastadapt.training.state import load_tensors, trained_tensors

WORLD, STEPS = 2, 3

CONFIGS: dict[str, Callable[[], AdapterConfig]] = {
    "LoRA": lambda: fastadapt.LoRAConfig(r=3, target_modules=["q_proj", "k_proj", "v_proj", "down_proj"]),
    "DoRA": lambda: fastadapt.DoRAConfig(r=3, target_modules=["q_proj", "v_proj", "up_proj"]),
    "VeRA": lambda: fastadapt.VeRAConfig(r=6, target_modules=["q_proj", "o_proj"]),
}


def adapted(name: str) -> Any:
    model = fastadapt.inject(llama(), CONFIGS[name]())
    randomise([p for p in model.parameters() if p.requires_grad])
    return model


def train(model: Any, ids: Tensor, parameters: list[nn.Parameter]) -> None:
    optimizer = torch.optim.SGD(parameters, lr=0.05)
    model.train()
    for _ in range(STEPS):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def alone(name: str) -> dict[str, Tensor]:
    """What one process makes of the whole batch."""
    model = adapted(name)
    train(model, tokens(4), trainable(model))
    return {key: value.detach() for key, value in trained_tensors(model, "default").items()}


def shard(model: Any, how: str) -> Any:
    if how == "DDP":
        return DistributedDataParallel(model)
    mesh = dist.init_device_mesh("cpu", (WORLD,))
    if how == "FSDP2, by layer":
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def part(rank: int) -> Tensor:
    return tokens(4).chunk(WORLD)[rank]


# What each process does, by the name of the test.
JOBS: dict[str, Callable[[int, Path], None]] = {}


def job(function: Callable[[int, Path], None]) -> Callable[[int, Path], None]:
    JOBS[function.__name__] = function
    return function


@job
def trains(rank: int, folder: Path) -> None:
    for name in CONFIGS:
        wanted = alone(name)
        for how in ("DDP", "FSDP2, by layer", "FSDP2"):
            model = adapted(name)
            train(shard(model, how), part(rank), trainable(model))
            place = folder / f"{name} {how}"
            if how == "DDP":
                found = trained_tensors(model, "default")
            else:
                fastadapt.save_adapter(model, place)
                model.save_pretrained(place / "by itself")
                found = {key: whole(key, t) for key, t in trained_tensors(model, "default").items()}
            for key, value in wanted.items():
                torch.testing.assert_close(found[key].detach(), value, rtol=1e-5, atol=1e-6, msg=f"{name} {how} {key}")


@job
def loads(rank: int, folder: Path) -> None:
    """Into a model that is in pieces, by the tensors of its adapter; into one that comes into pieces afterwards."""
    wanted = alone("DoRA")
    model = shard(adapted("DoRA"), "FSDP2, by layer")
    load_tensors(model, "default", wanted)
    fastadapt.save_adapter(model, folder / "filled")
    later = shard(fastadapt.load_adapter(llama(), folder / "given", trainable=True), "FSDP2, by layer")
    fastadapt.save_adapter(later, folder / "later")


@job
def refuses(rank: int, folder: Path) -> None:
    """FSDP of the first kind trains and does not save."""
    wanted = alone("LoRA")
    model = adapted("LoRA")
    wrapped = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    train(wrapped, part(rank), [p for p in wrapped.parameters() if p.requires_grad])
    with pytest.raises(ValueError, match=r"FullyShardedDataParallel: FSDP has cut"):
        fastadapt.save_adapter(wrapped, folder / "one")
    with FullyShardedDataParallel.summon_full_params(wrapped):
        fastadapt.save_adapter(wrapped.module, folder / f"inside {rank}")
        for key, value in trained_tensors(wrapped.module, "default").items():
            torch.testing.assert_close(value.detach(), wanted[key], rtol=1e-5, atol=1e-6)


CONTROLLED: dict[str, Callable[[], AdapterConfig]] = {
    "AdaLoRA compares triplets": lambda: fastadapt.AdaLoRAConfig(
        init_r=6, target_r=2, tinit=0, tfinal=1, deltaT=1, total_step=STEPS, target_modules=["q_proj", "v_proj"]
    ),
    "Delta-LoRA's anchor": lambda: fastadapt.DeltaLoRAConfig(r=3, start_step=1, target_modules=["q_proj", "v_proj"]),
}


def controlled(config: AdapterConfig, ids: Tensor, how: str = "") -> dict[str, Tensor]:
    """What a model with a method that does more between the steps is trained to."""
    model = fastadapt.inject(llama(), config)
    randomise(trainable(model))
    wrapped = shard(model, how) if how else model
    control, optimizer = fastadapt.control(model), torch.optim.SGD(trainable(model), lr=0.05)
    for _ in range(STEPS):
        (wrapped(input_ids=ids, labels=ids).loss + control.regularizer()).backward()
        optimizer.step()
        control.step()
        optimizer.zero_grad()
    return {key: value.detach() for key, value in trained_tensors(model, "default").items()}


@job
def controls(rank: int, folder: Path) -> None:
    """What a method does between the steps is done under DDP, and named under FSDP2, where it cannot be."""
    for what, config in CONTROLLED.items():
        with pytest.raises(ValueError, match=rf"is cut into pieces \(DTensor\), and {what}.*DistributedDataParallel"):
            controlled(config(), part(rank), "FSDP2, by layer")
        wanted, found = controlled(config(), tokens(4)), controlled(config(), part(rank), "DDP")
        for key, value in wanted.items():
            torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-5, msg=f"{what}: {key}")


def work(rank: int, folder: str, name: str) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=WORLD)
    JOBS[name](rank, Path(folder))
    dist.barrier()
    dist.destroy_process_group()
    # Threads of gloo's that outlive the group abort an interpreter that takes itself apart in good order.
    os._exit(0)


@pytest.fixture
def run(tmp_path: Path) -> Callable[[Callable[[int, Path], None]], Path]:
    def spawn(function: Callable[[int, Path], None]) -> Path:
        torch.multiprocessing.spawn(work, (str(tmp_path), function.__name__), WORLD)
        return tmp_path

    return spawn


pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed")


def test_two_processes_train_what_one_does_and_save_it_whole(run: Any) -> None:
    folder = run(trains)
    for name in CONFIGS:
        wanted = adapted(name)
        train(wanted, tokens(4), trainable(wanted))
        for how in ("FSDP2, by layer", "FSDP2"):
            for place in (folder / f"{name} {how}", folder / f"{name} {how}" / "by itself"):
                assert {path.name for path in place.iterdir() if path.is_file()} == {CONFIG_FILE, TENSOR_FILE}
                read = fastadapt.load_adapter(llama(), place)
                torch.testing.assert_close(output(read, tokens()), output(wanted.eval(), tokens()))


def test_an_adapter_is_loaded_into_a_sharded_model(run: Any, tmp_path: Path) -> None:
    model = adapted("DoRA")
    train(model, tokens(4), trainable(model))
    fastadapt.save_adapter(model, tmp_path / "given")
    run(loads)
    given = load_file(tmp_path / "given" / TENSOR_FILE)
    for name in ("filled", "later"):
        found = load_file(tmp_path / name / TENSOR_FILE)
        assert found.keys() == given.keys()
        for key, value in given.items():
            torch.testing.assert_close(found[key], value)


def test_the_first_fsdp_trains_and_is_refused_by_name_where_it_cannot_be_saved(run: Any) -> None:
    run(refuses)


def test_what_happens_between_steps_is_named_where_tensors_are_in_pieces(run: Any) -> None:
    run(controls)


def cut(parameter: nn.Parameter) -> None:
    """What DeepSpeed's ZeRO-3 leaves of a parameter between the calls of its module."""
    parameter.ds_shape = parameter.shape  # type: ignore[attr-defined]
    parameter.data = parameter.data.new_empty(0)


def test_zero_3_is_refused_by_name(tmp_path: Path) -> None:
    said = "DeepSpeed's ZeRO-3, which fastadapt does not gather: train with ZeRO-1"
    model = llama()
    for parameter in model.parameters():
        cut(parameter)
    with pytest.raises(ValueError, match=rf"embed_tokens\.weight is cut into pieces by {said}"):
        fastadapt.inject(model, CONFIGS["LoRA"]())
    for name in ("LoRA", "DoRA"):
        model = adapted(name)
        for parameter in trainable(model):
            cut(parameter)
        with pytest.raises(ValueError, match=said):
            fastadapt.save_adapter(model, tmp_path / "adapter")
        assert not (tmp_path / "adapter").exists()
        with pytest.raises(ValueError, match=said):
            model(tokens())
