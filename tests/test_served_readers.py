"""Served layers that read one x: their kernels run as one, and each layer's answer is still its own."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fastadapt_kernels import configs
from test_serving import alone, close, inputs, save_all
from tiny_models import llama
from torch import Tensor, nn

from fastadapt import LoRAConfig, inject, load_adapter, save_adapter
from fastadapt.serving import MultiAdapterModel, linear
from fastadapt.serving.linear import MultiAdapterLinear, Readers

WANTED = ["lora", "part", "dora", "vera"]
LARGE = 166_912

NAMES = ["lora", "dora", None]
X = torch.randn(3, 4, 16, generator=torch.Generator().manual_seed(0))


class Pair(nn.Module):
    """Two projections with the names of siblings, each of what `split` makes of x for it."""

    def __init__(self, split: Callable[[Tensor], tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.split = split
        self.gate_proj, self.up_proj = nn.Linear(16, 24), nn.Linear(16, 24)

    def forward(self, inputs_embeds: Tensor) -> Tensor:
        first, second = self.split(inputs_embeds)
        gate = self.gate_proj(first)
        return gate * self.up_proj(second)


@pytest.fixture
def directories(tmp_path: Path) -> dict[str, Path]:
    return save_all(llama(), tmp_path, WANTED)


def serve(base: nn.Module, directories: dict[str, Path]) -> MultiAdapterModel:
    served = MultiAdapterModel(copy.deepcopy(base), budget=4 << 20, backend="triton")
    for directory in directories.values():
        served.load(directory)
    return served


@pytest.fixture
def rounds(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many layers each call of the group ran."""
    found: list[int] = []
    real = linear.multi_adapter_linear_group

    def counted(x: Tensor, weights: Any, *args: Any, **kwargs: Any) -> list[Tensor]:
        found.append(len(weights))
        return real(x, weights, *args, **kwargs)

    monkeypatch.setattr(linear, "multi_adapter_linear_group", counted)
    return found


def test_a_decoder_layer_takes_eight_launches(directories: dict[str, Path]) -> None:
    base = llama()
    served = serve(base, directories)
    with configs.recorded_launches(LARGE) as launches:
        served(**inputs(3), adapter_ids=["lora", "dora", None])
    assert len(launches) == 8 * len(base.model.layers)  # and none for the head, which nobody in the batch adapts


def test_layers_that_nobody_in_the_batch_adapts_launch_nothing(tmp_path: Path, rounds: list[int]) -> None:
    """Nor do they wait in their siblings' group for somebody to fetch what it made of them."""
    torch.manual_seed(0)
    base = Pair(lambda x: (x, x)).eval()
    directories = {"gate": tmp_path / "gate", "both": tmp_path / "both"}
    for name, targets in (("gate", ["gate_proj"]), ("both", ["gate_proj", "up_proj"])):
        model = inject(copy.deepcopy(base), LoRAConfig(r=2, target_modules=targets, init_lora_weights=False))
        save_adapter(model, directories[name])
    served = serve(base, directories)
    with configs.recorded_launches(LARGE) as launches, served.running(["gate", None, None], (), {"inputs_embeds": X}):
        for _ in range(4):
            served.model(X)
    assert len(launches) == 4 * 2
    rounds.clear()
    for _ in range(4):  # the guess that the layers share x was not given up
        served(inputs_embeds=X, adapter_ids=["gate", None, "both"])
    assert rounds == [2] * 4


def test_every_row_is_its_adapters(directories: dict[str, Path], rounds: list[int]) -> None:
    base = llama()
    names = [*WANTED, None]
    batch = inputs(len(names))
    logits = serve(base, directories)(**batch, adapter_ids=names).logits
    assert rounds == [3, 2] * len(base.model.layers)
    for row, name in enumerate(names):
        expected = alone(base, None if name is None else directories[name], batch)
        assert close(logits[row], expected[row]), name


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Pair, dict[str, Path], Tensor]:
    """A pair whose second layer reads another x, two adapters of it, and what rows of both and of none answer."""
    torch.manual_seed(0)
    base = Pair(lambda x: (x, x * 2)).eval()
    directories = save_all(base, tmp_path, ["lora", "dora"])
    expected = []
    for row, name in enumerate(NAMES):
        model = copy.deepcopy(base)
        if name is not None:
            load_adapter(model, directories[name])
        expected.append(model.eval()(X[row : row + 1]).detach()[0])
    return base, directories, torch.stack(expected)


def test_after_two_misses_each_runs_by_itself(pair: tuple[Pair, dict[str, Path], Tensor], rounds: list[int]) -> None:
    base, directories, expected = pair
    served = serve(base, directories)
    with served.running(NAMES, (), {"inputs_embeds": X}):
        for _ in range(4):
            assert close(served.model(X), expected)
    assert rounds == [2, 2, 2]
    assert close(served(inputs_embeds=X, adapter_ids=NAMES), expected)
    assert len(rounds) == 3


def test_an_x_that_is_written_between_is_another(pair: tuple[Pair, dict[str, Path], Tensor], rounds: list[int]) -> None:
    base, directories, expected = pair
    served = serve(base, directories)
    served.model.split = lambda x: (x, x)
    served.model.gate_proj.register_forward_hook(lambda module, args, output: (args[0].mul_(2), None)[1])
    assert close(served(inputs_embeds=X.clone(), adapter_ids=NAMES), expected)
    assert rounds == [2, 2]


def test_the_layers_of_a_model_know_each_other(directories: dict[str, Path]) -> None:
    served = serve(llama(), directories)
    layers = {path: part for path, part in served.model.named_modules() if isinstance(part, MultiAdapterLinear)}
    for path, layer in layers.items():
        names = {"self_attn.q_proj": 3, "self_attn.k_proj": 3, "self_attn.v_proj": 3, "gate_proj": 2, "up_proj": 2}
        expected = next((count for name, count in names.items() if path.endswith(name)), None)
        assert (isinstance(layer.readers, Readers) and len(layer.readers.layers)) == (expected or False), path
