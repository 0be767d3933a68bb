"""Files of experts in the layout that PEFT had before 0.19.1: A and B in each other's places."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_experts import TOKENS, gpt_oss, logits, mixtral, quiet, qwen3_moe, theirs
from torch import Tensor

import fastadapt
from fastadapt import DoRAConfig, LoRAConfig, VeRAConfig
from fastadapt.serving import AdapterError, MultiAdapterModel

peft = pytest.importorskip("peft", minversion="0.21")
pytest.importorskip("transformers", minversion="5.5")

assert quiet  # the fixture of test_experts, which is in force here as well


def square() -> Any:
    """Experts whose second matrix is square: its shapes tell nothing."""
    return qwen3_moe(moe_intermediate_size=32)


def old_file(make: Callable[[], Any], names: list[str], directory: Path, turned: bool = True, **changes: Any) -> Tensor:
    """Writes a file with A and B turned, or not, and returns what the adapter computes: PEFT's sum onto the weights.

    PEFT has A read the first of a weight's two dimensions, or the second; that of the experts' input is the second one
    where they are not transposed.
    """
    model, r, alpha = make(), 3, 6
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for index, layer in enumerate(model.model.layers):
        experts = layer.mlp.experts
        for depth, name in enumerate(sorted(names)):  # down_proj outermost
            weight = experts._parameters[name]
            count, *sizes = weight.shape
            reads_first = turned != experts.is_transposed
            k, n = sizes if reads_first else reversed(sizes)
            A = torch.randn(r * count, k, generator=generator) * 0.1
            B = torch.randn(n, r * count, generator=generator) * 0.1
            stem = f"base_model.model.model.layers.{index}.mlp.experts.{'base_layer.' * depth}lora"
            tensors |= {f"{stem}_A.weight": A, f"{stem}_B.weight": B}
            equation = "ore,eri->eio" if reads_first else "ore,eri->eoi"
            weight.data += alpha / r * torch.einsum(equation, B.view(n, r, count), A.view(count, r, k))
    save_file(tensors, directory / "adapter_model.safetensors")
    fields: dict[str, Any] = {"peft_type": "LORA", "r": r, "lora_alpha": alpha, "target_modules": []}
    fields |= {"target_parameters": [f"experts.{name}" for name in names], "auto_mapping": None, **changes}
    (directory / "adapter_config.json").write_text(json.dumps(fields))
    return logits(model)


@pytest.mark.parametrize("names", [["gate_up_proj", "down_proj"], ["gate_up_proj"], ["down_proj"]], ids="-".join)
@pytest.mark.parametrize(
    ("make", "version"), [(qwen3_moe, {}), (mixtral, {"peft_version": "0.18.1"}), (gpt_oss, {"peft_version": "0.19.0"})]
)
def test_shapes_tell_that_a_and_b_are_turned(
    make: Callable[[], Any], version: dict[str, str], names: list[str], tmp_path: Path
) -> None:
    expected = old_file(make, names, tmp_path, **version)
    assert (expected - logits(make())).abs().max() > 1e-3
    ours = fastadapt.load_adapter(make(), tmp_path)
    torch.testing.assert_close(logits(ours), expected, rtol=1e-4, atol=1e-5)
    fastadapt.save_adapter(ours, tmp_path / "new")
    back = peft.PeftModel.from_pretrained(make(), tmp_path / "new").eval()
    torch.testing.assert_close(logits(back), expected, rtol=1e-4, atol=1e-5)
    served = MultiAdapterModel(make())
    served.load(tmp_path, "old")
    given = served(input_ids=TOKENS, adapter_ids="old").logits
    torch.testing.assert_close(given, expected, rtol=1e-4, atol=1e-5)


def test_a_file_that_is_right_is_taken_as_it_is(tmp_path: Path) -> None:
    expected = old_file(qwen3_moe, ["gate_up_proj", "down_proj"], tmp_path, turned=False)
    torch.testing.assert_close(logits(fastadapt.load_adapter(qwen3_moe(), tmp_path)), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("turned", [False, True])
def test_one_weight_that_tells_tells_for_a_square_one(turned: bool, tmp_path: Path) -> None:
    expected = old_file(square, ["gate_up_proj", "down_proj"], tmp_path, turned, peft_version="0.18.0")
    torch.testing.assert_close(logits(fastadapt.load_adapter(square(), tmp_path)), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "version", [{}, {"peft_version": None}, {"peft_version": "0.18.1"}, {"peft_version": "0.19.0"}]
)
def test_square_matrices_of_an_old_peft_have_to_be_told(version: dict[str, Any], tmp_path: Path) -> None:
    expected = {}
    for turned in (True, False):
        expected[turned] = old_file(square, ["down_proj"], tmp_path, turned, **version)
        with pytest.raises(ValueError, match=r"lora_A.weight is of experts with square .*swapped_experts=True"):
            fastadapt.load_adapter(square(), tmp_path)
        loaded = fastadapt.load_adapter(square(), tmp_path, swapped_experts=turned)
        torch.testing.assert_close(logits(loaded), expected[turned], rtol=1e-4, atol=1e-5)
        with pytest.raises(AdapterError, match=r"lora_A.weight is of experts with square"):
            MultiAdapterModel(square()).load(tmp_path)
    assert (expected[True] - expected[False]).abs().max() > 1e-3


@pytest.mark.parametrize("version", ["0.19.1", "0.21.2", "0.22.0.dev0@main"])
def test_a_new_pefts_square_matrices_are_right(version: str, tmp_path: Path) -> None:
    expected = old_file(square, ["down_proj"], tmp_path, False, peft_version=version)
    torch.testing.assert_close(logits(fastadapt.load_adapter(square(), tmp_path)), expected, rtol=1e-4, atol=1e-5)


def test_ours_and_pefts_own_of_square_matrices_are_right(tmp_path: Path) -> None:
    names = ["experts.down_proj"]
    model = fastadapt.inject(square(), LoRAConfig(r=3, target_parameters=names, init_lora_weights=False))
    fastadapt.save_adapter(model, tmp_path / "ours")
    torch.testing.assert_close(logits(fastadapt.load_adapter(square(), tmp_path / "ours")), logits(model))
    peft_model = theirs(square, target_parameters=names, target_modules=[])
    peft_model.save_pretrained(tmp_path / "theirs")
    ours = fastadapt.load_adapter(square(), tmp_path / "theirs")
    torch.testing.assert_close(logits(ours), logits(peft_model), rtol=1e-5, atol=1e-6)


def test_what_fits_in_neither_way_is_refused(tmp_path: Path) -> None:
    old_file(qwen3_moe, ["gate_up_proj"], tmp_path)
    for told in (None, True, False):
        with pytest.raises(ValueError, match=r"must have shape \(12, 32\)"):
            fastadapt.load_adapter(qwen3_moe(moe_intermediate_size=24), tmp_path, swapped_experts=told)


@pytest.mark.parametrize("turned", [False, True])
def test_what_is_told_against_the_shapes_is_refused(turned: bool, tmp_path: Path) -> None:
    """The square one would be turned alone, and nothing else tell of it."""
    old_file(square, ["gate_up_proj", "down_proj"], tmp_path, turned)
    model = square()
    said = rf"swapped_experts={not turned}, and by its shape .*base_layer.lora_A.weight is {'not ' * turned}where"
    with pytest.raises(ValueError, match=said):
        fastadapt.load_adapter(model, tmp_path, swapped_experts=not turned)
    assert torch.equal(logits(model), logits(square()))
    told = fastadapt.load_adapter(model, tmp_path, swapped_experts=turned)
    torch.testing.assert_close(logits(told), logits(fastadapt.load_adapter(square(), tmp_path)))


# A LoRA for every expert's layers, as older libraries have it.


EXPORTED: dict[str, Any] = {
    "LoRA": LoRAConfig(r=4, lora_alpha=6, target_modules="all-linear", init_lora_weights=False),
    "VeRA": VeRAConfig(r=6, target_modules=["q_proj"], target_parameters=["experts.down_proj"], init_weights=False),
}


@pytest.mark.parametrize("kind", EXPORTED)
@pytest.mark.parametrize("make", [mixtral, qwen3_moe])
def test_experts_are_exported_as_linear_layers(make: Callable[[], Any], kind: str, tmp_path: Path) -> None:
    model = fastadapt.inject(make(), EXPORTED[kind])
    expected = logits(model)
    assert (expected - logits(make())).abs().max() > 0.01
    fastadapt.export_lora(model, tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    old = {mixtral: ("block_sparse_moe", "w1", "w3", "w2"), qwen3_moe: ("mlp", "gate_proj", "up_proj", "down_proj")}
    block, *names = old[make]
    names = names if kind == "LoRA" else names[2:]
    for name in names:
        for e in range(4):
            stem = f"base_model.model.model.layers.1.{block}.experts.{e}.{name}.lora"
            assert (
                tensors[f"{stem}_A.weight"].shape[0] == tensors[f"{stem}_B.weight"].shape[1] == (8, 6)[kind == "VeRA"]
            )
    # Ours and PEFT's stack them again.
    torch.testing.assert_close(logits(fastadapt.load_adapter(make(), tmp_path)), expected, rtol=1e-4, atol=1e-5)
    back = peft.PeftModel.from_pretrained(make(), tmp_path).eval()
    torch.testing.assert_close(logits(back), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", [mixtral, qwen3_moe])
def test_an_adapter_of_some_blocks_is_exported_for_all(make: Callable[[], Any], tmp_path: Path) -> None:
    """A reader takes a name for that of all blocks: those without the adapter have zeros."""
    whole = {"modules_to_save": ["lm_head"], "init_lora_weights": False}
    for fields in (
        {"target_parameters": ["1.mlp.experts.gate_up_proj", "0.mlp.experts.down_proj", "0.mlp.gate.weight"]},
        {"target_modules": ["o_proj"], "target_parameters": ["0.mlp.experts.gate_up_proj"], **whole},
        {"target_modules": "all-linear", "exclude_modules": r".*layers\.0\.mlp.*"},
    ):
        model = fastadapt.inject(make(), LoRAConfig(r=4, lora_alpha=6, **{"init_lora_weights": False, **fields}))
        fastadapt.export_lora(model, tmp_path)
        found = logits(fastadapt.load_adapter(make(), tmp_path))
        torch.testing.assert_close(found, logits(model), rtol=1e-4, atol=1e-5)
        back = peft.PeftModel.from_pretrained(make(), tmp_path).eval()
        torch.testing.assert_close(logits(back), logits(model), rtol=1e-4, atol=1e-5)
    whole = {"target_modules": "all-linear", "modules_to_save": ["0.mlp"]}
    model = fastadapt.inject(make(), LoRAConfig(r=4, init_lora_weights=False, **whole))
    fastadapt.export_lora(model, tmp_path)
    torch.testing.assert_close(logits(fastadapt.load_adapter(make(), tmp_path)), logits(model), rtol=1e-4, atol=1e-5)


def test_what_is_no_lora_of_layers_is_not_exported(tmp_path: Path) -> None:
    both = ["experts.gate_up_proj", "experts.down_proj"]
    for make, config, why in (
        (gpt_oss, LoRAConfig, "in models of type gpt_oss their layers have no names of their own: .*save_adapter"),
        (qwen3_moe, DoRAConfig, r"layers.0.mlp.experts: it scales the base weights \(DoRA\)"),
    ):
        model = fastadapt.inject(make(), config(target_parameters=both))
        with pytest.raises(ValueError, match=why):
            fastadapt.export_lora(model, tmp_path / "out")
        assert not (tmp_path / "out").exists()
    model = fastadapt.inject(qwen3_moe(), LoRAConfig(target_parameters=both, target_modules=["embed_tokens"]))
    with pytest.raises(ValueError, match=r"embed_tokens: Embedding is no linear layer"):
        fastadapt.export_lora(model, tmp_path / "out")
