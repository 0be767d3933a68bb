"""QLoRA's usual script on a tiny Llama, with fastadapt in PEFT's place: it trains as with PEFT, and its files are read
again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from test_quantized import IDS, SIZES, relative
from test_trainer import arguments, rows
from tiny_models import gpt2, llama
from torch import Tensor

import fastadapt
from fastadapt import DoRAConfig, LoRAConfig
from fastadapt.layers.dequantize import is_quantized

pytest.importorskip("bitsandbytes", reason="not installed: pip install 'fastadapt[quantized]'")
pytest.importorskip("accelerate", reason="a Trainer needs accelerate: pip install 'fastadapt[clients]'")

from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Trainer

# These libraries warn of each other, and bitsandbytes at import.
pytestmark = [pytest.mark.filterwarnings(f"ignore::{kind}") for kind in ("DeprecationWarning", "FutureWarning")] + [
    pytest.mark.filterwarnings("ignore:.*pin_memory"),
    pytest.mark.filterwarnings("ignore:.*use_reentrant"),
]

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# bitsandbytes may multiply in bf16 in eval mode.
TOLERANCES = {torch.float32: 2e-2, torch.bfloat16: 5e-2}


@pytest.fixture(scope="module")
def on_disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("base")
    llama(**SIZES).save_pretrained(place)
    return place


def base(place: Path, dtype: torch.dtype = torch.float32) -> Any:
    how = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    return AutoModelForCausalLM.from_pretrained(place, quantization_config=how, dtype=dtype)


def train(model: Any, output: Path, **changes: Any) -> list[float]:
    given = arguments(output, logging_steps=1, gradient_checkpointing=True, max_grad_norm=0.3, **changes)
    trainer = Trainer(model, given, train_dataset=rows())
    trainer.train()
    trainer.save_model()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def logits(model: Any, *, training: bool = False) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.train(training)(input_ids=IDS).logits.float()
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dora", [False, True])
def test_the_script_trains_as_with_peft(dora: bool, dtype: torch.dtype, on_disk: Path, tmp_path: Path) -> None:
    model = peft.prepare_model_for_kbit_training(base(on_disk, dtype))
    torch.manual_seed(0)
    config = (DoRAConfig if dora else LoRAConfig)(r=4, target_modules=TARGETS, task_type="CAUSAL_LM")
    model = fastadapt.inject(model, config)
    fastadapt.save_adapter(model, tmp_path / "initial")
    losses = train(model, tmp_path / "trained")
    before = logits(model)
    assert losses[-1] < losses[0]
    other = peft.prepare_model_for_kbit_training(base(on_disk, dtype))
    other = peft.PeftModel.from_pretrained(other, tmp_path / "initial", is_trainable=True)
    assert losses == pytest.approx(train(other, tmp_path / "peft"), rel=1e-4 if dtype == torch.float32 else 5e-3)
    again = peft.prepare_model_for_kbit_training(base(on_disk, dtype))
    assert relative(logits(fastadapt.load_adapter(again, tmp_path / "trained")), before) <= TOLERANCES[dtype]
    theirs = peft.PeftModel.from_pretrained(base(on_disk, dtype), tmp_path / "trained")
    # PEFT's DoRA takes a weight that is packed anew in eval mode for the old one.
    assert relative(logits(theirs, training=dora), before) <= TOLERANCES[dtype]


def trained(place: Path, targets: str | list[str] = TARGETS, **changes: Any) -> Any:
    model = fastadapt.inject(base(place, **changes), LoRAConfig(r=4, target_modules=targets, init_lora_weights=False))
    return model.eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("unloaded", [False, True])
def test_a_model_that_is_merged_in_floating_point_is_saved_as_a_plain_one(
    unloaded: bool, dtype: torch.dtype, on_disk: Path, tmp_path: Path
) -> None:
    model = trained(on_disk, dtype=dtype)
    before = logits(model)
    fastadapt.merge(model, dequantize=True)
    if unloaded:
        fastadapt.unload(model)
        assert not getattr(model, "is_quantized", False)
        assert not getattr(model, "is_loaded_in_4bit", False)
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.dtype == dtype
    assert relative(logits(again), before) <= TOLERANCES[dtype]
    if not unloaded:
        assert model.is_quantized
        fastadapt.unmerge(model)
        assert relative(logits(model), before) <= TOLERANCES[dtype]


def test_a_conv1d_that_was_quantised_as_a_linear_is_saved_as_what_it_was(tmp_path: Path) -> None:
    gpt2(n_embd=64).save_pretrained(tmp_path / "base")
    model = trained(tmp_path / "base", "all-linear")
    before = logits(model)
    fastadapt.merge(model, dequantize=True)
    fastadapt.unload(model)
    assert relative(logits(model), before) <= TOLERANCES[torch.float32]
    model.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert relative(logits(again), before) <= TOLERANCES[torch.float32]


def test_a_model_that_is_merged_into_four_bits_is_saved_as_a_quantised_one(on_disk: Path, tmp_path: Path) -> None:
    model = trained(on_disk)
    fastadapt.merge(model, requantize=True)
    fastadapt.unload(model)
    assert is_quantized(model.model.layers[0].mlp.up_proj)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.is_quantized
    assert relative(logits(again), logits(model)) <= TOLERANCES[torch.float32]


def test_a_model_that_is_plain_in_some_layers_is_not_saved_in_silence(on_disk: Path, tmp_path: Path) -> None:
    model = trained(on_disk, ["q_proj", "v_proj"])
    fastadapt.merge(model, dequantize=True)
    said = r"layers\.0\.self_attn\.q_proj is plain since the merge, and model\..*\.k_proj is quantised"
    with pytest.raises(ValueError, match=said):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
    with pytest.warns(UserWarning, match=said):
        fastadapt.unload(model)
    assert model.is_quantized


def test_without_adapters_a_trainer_refuses_a_quantised_model_as_ever(on_disk: Path, tmp_path: Path) -> None:
    model = trained(on_disk)
    Trainer(model, arguments(tmp_path))
    fastadapt.unload(model)
    with pytest.raises(ValueError, match="purely quantized"):
        Trainer(model, arguments(tmp_path))
