"""LoRA-drop: what is measured, what is kept, what is shared, and what a file of it says."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from peft import PeftModel
from test_peft_parity import quiet_peft
from tiny_models import randomise, tokens
from torch import nn

import fastadapt
from fastadapt import LoRAConfig, LoRADropConfig, select_layers
from fastadapt.model.adapted import adapter_configs, adapter_layers
from fastadapt.training.recipes import RECIPES

PATHS = [f"model.layers.{i}.self_attn.{name}" for i in range(4) for name in ("q_proj", "v_proj")]


def llama() -> Any:
    return tiny_models.llama(num_hidden_layers=4)


def probed(model: Any = None, **changes: Any) -> Any:
    """An adapter whose energies differ widely: B of layer i grows with i."""
    config = LoRADropConfig(**{"r": 3, "target_modules": ["q_proj", "v_proj"], **changes})
    model = fastadapt.inject(model or llama(), config)
    for index, layer in enumerate(adapter_layers(model).values()):
        randomise([layer.adapters["default"].lora_B], index)
        with torch.no_grad():
            layer.adapters["default"].lora_B.mul_(4.0 ** (index // 2))
    return model


def batches(padded: bool = False) -> list[dict[str, torch.Tensor]]:
    found = [{"input_ids": tokens(2, 5 + i)} for i in range(3)]
    if padded:
        for batch in found:
            mask = torch.ones_like(batch["input_ids"])
            mask[1, 3:] = 0
            batch["attention_mask"] = mask
    return found


def energies(model: Any, data: list[dict[str, torch.Tensor]]) -> dict[str, float]:
    """Σ ‖ΔW x‖² by forming ΔW x."""
    found = dict.fromkeys(PATHS, 0.0)
    handles = []
    for path, layer in adapter_layers(model).items():

        def add(module: nn.Module, arguments: Any, path: str = path, layer: Any = layer) -> None:
            adapter = layer.adapters["default"]
            out = adapter.scaling * arguments[0] @ (adapter.lora_B @ adapter.lora_A).T
            mask = current.get("attention_mask", torch.ones(out.shape[:2]))
            found[path] += float((out.square().sum(-1) * mask).sum())

        handles.append(layer.register_forward_pre_hook(add))
    for current in data:
        model(**current)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("padded", [False, True])
def test_importance_is_the_energy_of_the_outputs(padded: bool) -> None:
    model = probed()
    with torch.no_grad():
        expected = energies(model, batches(padded))
    found = select_layers(model, batches(padded))
    assert list(found) == PATHS
    torch.testing.assert_close(
        torch.tensor(list(found.values())), torch.tensor(list(expected.values())), rtol=1e-4, atol=0
    )


def test_the_fewest_layers_that_reach_the_threshold_are_kept() -> None:
    model = probed(threshold=0.8)
    found = select_layers(model, batches())
    config: Any = adapter_configs(model)["default"]
    for name in ("q_proj", "v_proj"):
        own = {path: energy for path, energy in found.items() if path.endswith(name)}
        ordered = sorted(own, key=lambda path: -own[path])
        kept = [path for path in ordered if path in config.kept]
        assert kept == ordered[: len(kept)]
        assert sum(own[path] for path in kept) >= 0.8 * sum(own.values())
        assert sum(own[path] for path in kept[:-1]) < 0.8 * sum(own.values())


def test_the_rest_share_one_pair_that_trains() -> None:
    model = probed(top_n=1)
    before = fastadapt.trainable_parameters(model).trainable
    select_layers(model, batches())
    config: Any = adapter_configs(model)["default"]
    assert config.kept == PATHS[6:]  # the strongest of each name
    layers = adapter_layers(model)
    shared = {id(layers[path].adapters["default"].lora_A) for path in PATHS[:6]}
    assert len(shared) == 2  # one for q_proj, one for v_proj: their shapes differ
    # Two pairs of each kind where there were four.
    assert fastadapt.trainable_parameters(model).trainable == before // 2
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.01)
    for _ in range(2):
        model(input_ids=tokens(), labels=tokens()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    summed = layers[PATHS[0]].adapters["default"].lora_B.grad
    single = torch.zeros_like(summed)
    for path in PATHS[:6:2]:  # each layer's share of the gradient, with a pair of its own
        alone = llama()
        fastadapt.inject(alone, LoRAConfig(r=3, target_modules=["q_proj", "v_proj"]))
        for other, layer in adapter_layers(alone).items():
            adapter = layer.adapters["default"]
            with torch.no_grad():
                adapter.lora_A.copy_(layers[other].adapters["default"].lora_A)
                adapter.lora_B.copy_(layers[other].adapters["default"].lora_B)
        alone(input_ids=tokens(), labels=tokens()).loss.backward()
        single += adapter_layers(alone)[path].adapters["default"].lora_B.grad  # type: ignore[operator]
    torch.testing.assert_close(summed, single, rtol=1e-4, atol=1e-6)


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({name: nn.Linear(768, 768, bias=False, device="meta") for name in ("query", "value")})
            for _ in range(12)
        )


def test_published_count_of_roberta() -> None:
    """Five of twelve layers kept, and one pair for the rest of each of query and value, of rank 8."""
    kept = [f"layers.{i}.{name}" for i in range(5) for name in ("query", "value")]
    model = fastadapt.inject(Blocks(), LoRADropConfig(r=8, target_modules=["query", "value"], kept=kept))
    assert fastadapt.trainable_parameters(model).trainable == 147_456


def test_freezing_and_going_on_from_the_probe() -> None:
    model = probed(top_n=2, fresh=False, freeze_shared=True)
    old = {path: layer.adapters["default"].lora_B.clone() for path, layer in adapter_layers(model).items()}
    select_layers(model, batches())
    layers = adapter_layers(model)
    for path in PATHS[4:]:
        assert torch.equal(layers[path].adapters["default"].lora_B, old[path])
        assert layers[path].adapters["default"].lora_B.requires_grad
    for path, strongest in ((PATHS[0], PATHS[2]), (PATHS[1], PATHS[3])):
        assert torch.equal(layers[path].adapters["default"].lora_B, old[strongest])
        assert not layers[path].adapters["default"].lora_B.requires_grad
    assert fastadapt.trainable_parameters(model).trainable == 2 * 3 * (32 + 32) + 2 * 3 * (32 + 16)


def test_files(tmp_path: Path) -> None:
    model = probed(top_n=1, fresh=False)
    select_layers(model, batches())
    expected = model(tokens()).logits
    fastadapt.save_adapter(model, tmp_path / "own")
    fields = json.loads((tmp_path / "own" / "adapter_config.json").read_text())
    assert fields["peft_type"] == "LORA_DROP"
    fastadapt.export_lora(model, tmp_path / "lora")
    with quiet_peft():
        theirs = PeftModel.from_pretrained(llama(), tmp_path / "lora").eval()
    torch.testing.assert_close(theirs(tokens()).logits, expected, rtol=1e-5, atol=1e-5)
    for directory in ("own", "lora"):  # the second is recognised by its equal pairs
        loaded = fastadapt.load_adapter(llama(), tmp_path / directory, trainable=True)
        torch.testing.assert_close(loaded(tokens()).logits, expected, rtol=1e-6, atol=1e-6)
        assert fastadapt.trainable_parameters(loaded) == fastadapt.trainable_parameters(model)
        assert adapter_configs(loaded)["default"].kept == PATHS[6:]  # type: ignore[attr-defined]
    from safetensors.torch import load_file, save_file

    tensors = load_file(tmp_path / "own" / "adapter_model.safetensors")
    tensors[f"base_model.model.{PATHS[2]}.lora_A.weight"] += 1
    save_file(tensors, tmp_path / "own" / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="must be equal: their layers share one tensor"):
        fastadapt.load_adapter(llama(), tmp_path / "own")


def test_an_ordinary_lora_is_not_taken_for_one(tmp_path: Path) -> None:
    model = fastadapt.inject(llama(), LoRAConfig(r=3, target_modules=["q_proj", "v_proj"]))
    fastadapt.save_adapter(model, tmp_path)
    loaded = fastadapt.load_adapter(llama(), tmp_path)
    assert type(adapter_configs(loaded)["default"]) is LoRAConfig


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: LoRADropConfig(threshold=0.0), r"threshold must be in \(0, 1\], got 0.0"),
        (lambda: LoRADropConfig(top_n=-1), "top_n must be at least 0"),
        (lambda: select_layers(probed(), []), "batches must hold at least one batch"),
        (
            lambda: select_layers(fastadapt.inject(llama(), LoRADropConfig(target_modules=["q_proj"])), batches()),
            "train the probe for a few steps first",
        ),
        (
            lambda: select_layers(fastadapt.inject(llama(), LoRAConfig(target_modules=["q_proj"])), batches()),
            "must have a LoRADropConfig to select layers, got LoRAConfig",
        ),
        (
            lambda: fastadapt.inject(tiny_models.mixed(), LoRADropConfig(target_modules=["embed"])),
            "embed: Embedding cannot take an adapter of LoRADropConfig: only Linear can; name only those",
        ),
    ],
)
def test_it_refuses(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_selecting_twice_is_refused() -> None:
    model = probed(top_n=1)
    select_layers(model, batches())
    with pytest.raises(ValueError, match="are selected already"):
        select_layers(model, batches())


def test_pruned_layers_are_not_taken_for_a_shared_pair(tmp_path: Path) -> None:
    model = fastadapt.inject(llama(), LoRAConfig(r=3, target_modules=["q_proj"]))
    with torch.no_grad():
        for layer in list(adapter_layers(model).values())[:2]:
            for tensor in layer.adapters["default"].checkpoint_tensors().values():
                tensor.zero_()
    fastadapt.save_adapter(model, tmp_path)
    assert type(adapter_configs(fastadapt.load_adapter(llama(), tmp_path))["default"]) is LoRAConfig


def test_what_is_no_pair_goes_on_from_the_probe_too() -> None:
    for changes in ({"lora_bias": True}, {"bias": "lora_only"}, {"use_dora": True}):
        model = probed(
            tiny_models.llama(num_hidden_layers=4, attention_bias=True), threshold=1.0, fresh=False, **changes
        )
        randomise([p for p in model.parameters() if p.requires_grad], 3)
        expected = model(tokens()).logits
        select_layers(model, batches())
        torch.testing.assert_close(model(tokens()).logits, expected)


def test_a_probe_that_found_nothing_is_refused() -> None:
    for value in (0.0, float("nan")):
        for changes in ({"top_n": 2}, {}):
            model = probed(**changes)
            with torch.no_grad():
                for layer in adapter_layers(model).values():
                    layer.adapters["default"].lora_B.fill_(value)
            with pytest.raises(ValueError, match=r"put out (nothing|NaN or infinite values)"):
                select_layers(model, batches())
            assert adapter_configs(model)["default"].kept is None  # type: ignore[attr-defined]


def test_a_frozen_pair_is_one_tensor_and_no_fresh_one() -> None:
    model = probed(top_n=1, fresh=False, freeze_shared=True)
    select_layers(model, batches())
    layers = adapter_layers(model)
    assert len({id(layers[path].adapters["default"].lora_A) for path in PATHS[:6]}) == 2
    with pytest.raises(ValueError, match="freeze_shared goes with fresh=False"):
        LoRADropConfig(freeze_shared=True)
    with pytest.raises(ValueError, match=r"'q_proj' is none: give the whole path"):
        fastadapt.inject(llama(), LoRADropConfig(target_modules=["q_proj"], kept=["q_proj"]))


def test_modes_and_merged_models_are_respected() -> None:
    model = probed(top_n=1)
    model.train()
    model.model.layers[0].eval()
    select_layers(model, batches())
    assert model.training
    assert not model.model.layers[0].training
    merged = probed()
    fastadapt.merge(merged)
    with pytest.raises(ValueError, match=r"call unmerge\(model\) before select_layers"):
        select_layers(merged, batches())


def test_eva_comes_before_the_selection() -> None:
    model = probed(top_n=1, init_lora_weights="eva")
    select_layers(model, batches())
    with pytest.raises(ValueError, match="call initialize_eva before select_layers"):
        fastadapt.initialize_eva(model, batches())


@pytest.mark.parametrize(("there", "taken"), [(2, 2), (20, 4), (70, 7), (1000, 16)])
def test_the_probe_takes_a_tenth_of_the_batches(there: int, taken: int) -> None:
    """It costs little beside the training that it comes before, and does not read more than it needs."""
    read = [0]

    class Epoch:
        def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
            for index in range(there):
                read[0] += 1
                ids = tokens(1, 4 + index % 3)
                yield {"input_ids": ids, "labels": ids}

    model = fastadapt.inject(llama(), LoRADropConfig(r=2, target_modules=["q_proj", "v_proj"]))
    passes = []
    model.register_forward_pre_hook(lambda module, arguments: passes.append(module.training))
    RECIPES["lora-drop"].prepare(model, Epoch(), "default")
    assert passes == [True] * taken + [False] * taken
    assert read[0] <= min(there, 160) + taken + 1
    assert adapter_configs(model)["default"].kept
