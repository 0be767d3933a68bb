"""ensure_weight_tying: an embedding and the head that is tied to it have one adapter, as in PEFT."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import llama, output, randomise, tokens
from torch import Tensor

from fastadapt import LoRAConfig, inject, load_adapter, merge, save_adapter, unload
from fastadapt.model.adapted import adapter_layers, saved_modules
from fastadapt.model.peft_files import CONFIG_FILE, TENSOR_FILE

# PEFT's of transformers, and of PEFT for its own copy of a tied layer.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning", "ignore:.*embedding layer")

NAMED: dict[str, dict[str, Any]] = {
    "the embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "the head": {"target_modules": ["q_proj", "lm_head"]},
    "both": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    "an expression": {"target_modules": r"(.*\.)?(q_proj|embed_tokens)"},
    "the embedding, whole": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "the head, whole": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "both, whole": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
}


def tied() -> Any:
    return llama(tie_word_embeddings=True)


def adapted(case: str, **fields: Any) -> Any:
    model = inject(tied(), LoRAConfig(r=2, lora_alpha=3, ensure_weight_tying=True, **NAMED[case], **fields))
    randomise([parameter for parameter in model.parameters() if parameter.requires_grad])
    return model.eval()


def ends(model: Any) -> tuple[Tensor, Tensor]:
    """What the adapter adds to the embedding's weight, and to the head's; or the weights of its copies."""
    saved = saved_modules(model)
    if saved:
        assert set(saved) == {"model.embed_tokens", "lm_head"}
        first, second = (saved[path].copies["default"].weight for path in ("model.embed_tokens", "lm_head"))
        assert first is second
        return first, second
    layers = adapter_layers(model)
    found = []
    for path in ("model.embed_tokens", "lm_head"):
        form = layers[path].form()
        found.append(form.whole_up() @ form.A)
    return found[0].T, found[1]


@pytest.mark.parametrize("case", NAMED)
def test_both_ends_stay_one_in_training(case: str) -> None:
    model = adapted(case).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    before = ends(model)[0].detach().clone()
    for _ in range(2):
        optimizer.zero_grad()
        model(tokens(), labels=tokens()).loss.backward()
        optimizer.step()
    first, second = ends(model)
    assert torch.equal(first, second) or torch.allclose(first, second, atol=1e-6)
    assert not torch.allclose(first, before)


@pytest.mark.parametrize("case", NAMED)
def test_peft_reads_what_is_saved_and_the_other_way_round(case: str, tmp_path: Path) -> None:
    model = adapted(case)
    want = output(model, tokens())
    save_adapter(model, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(tied(), tmp_path / "ours").eval()
    torch.testing.assert_close(output(theirs, tokens()), want)
    torch.testing.assert_close(output(load_adapter(tied(), tmp_path / "ours"), tokens()), want)

    config = peft.LoraConfig(r=2, lora_alpha=3, ensure_weight_tying=True, **NAMED[case])
    theirs = peft.get_peft_model(tied(), config).eval()
    randomise([parameter for parameter in theirs.parameters() if parameter.requires_grad])
    theirs.save_pretrained(tmp_path / "theirs")
    for trainable in (False, True):
        other = load_adapter(tied(), tmp_path / "theirs", trainable=trainable)
        torch.testing.assert_close(output(other, tokens()), output(theirs, tokens()))
    other.train()(tokens(), labels=tokens()).loss.backward()
    with torch.no_grad():
        for parameter in other.parameters():
            if parameter.grad is not None:
                parameter.sub_(parameter.grad)
    torch.testing.assert_close(*ends(other))


@pytest.mark.parametrize("case", ["both", "both, whole"])
def test_copies_and_merged_models_keep_it(case: str, tmp_path: Path) -> None:
    model = adapted(case)
    want = output(model, tokens())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(output(other, tokens()), want)
        with torch.no_grad():
            for parameter in other.parameters():
                if parameter.requires_grad:
                    parameter.mul_(2)
        torch.testing.assert_close(*ends(other))
        assert not torch.allclose(output(other, tokens()), want)
        other.load_state_dict(model.state_dict())
        torch.testing.assert_close(output(other, tokens()), want)
    merge(model)
    torch.testing.assert_close(output(model, tokens()), want, atol=1e-4, rtol=1e-4)
    model.save_pretrained(tmp_path)
    read = type(model).from_pretrained(tmp_path).eval()
    torch.testing.assert_close(output(read, tokens()), want, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(output(unload(model), tokens()), want, atol=1e-4, rtol=1e-4)


def test_what_cannot_be_one_is_named(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="the model has no tied embeddings"):
        inject(llama(), LoRAConfig(r=2, target_modules=["embed_tokens"], ensure_weight_tying=True))
    with pytest.warns(UserWarning, match="none of them is in target_modules or modules_to_save"):
        inject(tied(), LoRAConfig(r=2, target_modules=["q_proj"], ensure_weight_tying=True))
    for pattern in ({"rank_pattern": {"lm_head": 3}}, {"alpha_pattern": {"lm_head": 7.0}}):
        with pytest.raises(ValueError, match=r"needs one rank and lora_alpha for model\.embed_tokens and lm_head"):
            adapted("both", **pattern)
    save_adapter(adapted("both"), tmp_path)
    tensors = load_file(tmp_path / TENSOR_FILE)
    tensors["base_model.model.lm_head.lora_A.weight"].add_(1)
    save_file(tensors, tmp_path / TENSOR_FILE)
    load_adapter(tied(), tmp_path)
    with pytest.raises(ValueError, match="must be equal to be trained as one"):
        load_adapter(tied(), tmp_path, trainable=True)


def test_the_field_is_in_the_file(tmp_path: Path) -> None:
    save_adapter(adapted("the embedding"), tmp_path)
    assert json.loads((tmp_path / CONFIG_FILE).read_text())["ensure_weight_tying"] is True
    save_adapter(inject(tied(), LoRAConfig(r=2, target_modules=["q_proj"])), tmp_path)
    assert json.loads((tmp_path / CONFIG_FILE).read_text())["ensure_weight_tying"] is False
