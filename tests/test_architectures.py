"""Small models of many architectures of transformers: a fresh adapter is the base, the merged model the adapted one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from test_ways import randomise
from tiny_models import SIZES
from torch import Tensor

import fastadapt
from fastadapt import DoRAConfig, LoRAConfig

COMMON: dict[str, Any] = {"vocab_size": 40, "pad_token_id": 0}
LLAMA: dict[str, Any] = {**COMMON, **SIZES}
HEADS: dict[str, Any] = {**LLAMA, "head_dim": 8}
GPT: dict[str, Any] = {"vocab_size": 40, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32}
BERT: dict[str, Any] = {name: value for name, value in LLAMA.items() if name != "num_key_value_heads"}
T5: dict[str, Any] = {**COMMON, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
SEQ2SEQ: dict[str, Any] = {
    **COMMON,
    "d_model": 32,
    **dict.fromkeys(("encoder_layers", "decoder_layers"), 1),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 48),
    "max_position_embeddings": 32,
    "decoder_start_token_id": 1,
}
FALCON = ("hidden_size", "num_hidden_layers", "num_attention_heads")
# The architecture's config and model, and its sizes.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "LlamaForCausalLM": ("LlamaConfig", LLAMA),
    "MistralForCausalLM": ("MistralConfig", LLAMA),
    "Qwen2ForCausalLM": ("Qwen2Config", LLAMA),
    "Qwen3ForCausalLM": ("Qwen3Config", HEADS),
    "GemmaForCausalLM": ("GemmaConfig", HEADS),
    "Gemma2ForCausalLM": ("Gemma2Config", HEADS),
    "Gemma3ForCausalLM": ("Gemma3TextConfig", HEADS),
    "Phi3ForCausalLM": ("Phi3Config", LLAMA),
    "PhimoeForCausalLM": ("PhimoeConfig", {**LLAMA, "num_local_experts": 2}),
    "MixtralForCausalLM": ("MixtralConfig", {**LLAMA, "num_local_experts": 2}),
    "GPT2LMHeadModel": ("GPT2Config", GPT),
    "GPTNeoXForCausalLM": ("GPTNeoXConfig", BERT),
    "FalconForCausalLM": (
        "FalconConfig",
        {**COMMON, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
    ),
    "BloomForCausalLM": ("BloomConfig", {**COMMON, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "OPTForCausalLM": ("OPTConfig", {**BERT, "ffn_dim": 48, "word_embed_proj_dim": 32}),
    "StableLmForCausalLM": ("StableLmConfig", LLAMA),
    "CohereForCausalLM": ("CohereConfig", LLAMA),
    "OlmoForCausalLM": ("OlmoConfig", LLAMA),
    "MambaForCausalLM": ("MambaConfig", {**COMMON, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}),
    "BertForSequenceClassification": ("BertConfig", BERT),
    "RobertaForMaskedLM": ("RobertaConfig", BERT),
    "DebertaV2ForSequenceClassification": ("DebertaV2Config", BERT),
    "DistilBertForMaskedLM": ("DistilBertConfig", {**COMMON, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48}),
    "T5ForConditionalGeneration": ("T5Config", T5),
    "BartForConditionalGeneration": ("BartConfig", SEQ2SEQ),
    "M2M100ForConditionalGeneration": ("M2M100Config", SEQ2SEQ),
    "MarianMTModel": ("MarianConfig", SEQ2SEQ),
}


# They hand a layer a transposed x, of which ours are the products of a copy.
TRANSPOSED = {"MambaForCausalLM"}


def built(name: str) -> Any:
    config, sizes = MODELS[name]
    torch.manual_seed(0)
    return getattr(hf, name)(getattr(hf, config)(**sizes)).eval().requires_grad_(False)


def logits(model: Any) -> Tensor:
    ids = torch.randint(2, 40, (2, 7), generator=torch.Generator().manual_seed(3))
    more = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    found: Tensor = model(input_ids=ids, **more).logits
    return found


METHODS: dict[str, Callable[..., Any]] = {"LoRA": LoRAConfig, "DoRA": DoRAConfig}


@pytest.mark.filterwarnings('ignore:target_modules="all-linear" adapts no')
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", MODELS)
def test_fresh_is_the_base_and_merged_is_adapted(name: str, method: str) -> None:
    model = built(name)
    with torch.no_grad():  # where something has a gradient torch multiplies some shapes in another way
        base = logits(model)
    fastadapt.inject(model, METHODS[method](r=4, target_modules="all-linear"))
    with torch.no_grad():
        if name in TRANSPOSED:
            torch.testing.assert_close(logits(model), base)
        else:
            assert torch.equal(logits(model), base)
    randomise(model)
    want = logits(model)
    assert (want - base).abs().max() > 1e-3 * base.abs().max()
    want.square().sum().backward()
    assert [key for key, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    fastadapt.merge(model)
    torch.testing.assert_close(logits(model), want, rtol=1e-3, atol=1e-4 * want.detach().abs().max().item())
    fastadapt.unmerge(model)
    assert torch.equal(logits(model), want)
    with torch.no_grad():
        assert torch.equal(logits(fastadapt.unload(model)), base)
