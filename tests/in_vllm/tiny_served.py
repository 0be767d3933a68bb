"""Tiny models and PEFT adapters for them, with the tokens that transformers gives with each adapter merged."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

# Before vLLM is imported: one process, a small cache, nothing sent anywhere.
os.environ.update(
    {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
    }
)

import peft
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast, Qwen2Config
from transformers.utils.logging import disable_progress_bar

disable_progress_bar()

SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
VOCABULARY, TOKENS = 192, 8
# Whether adapters lie as on a GPU, where an engine's max_lora_rank bounds them all.
PAGED = os.environ.get("FASTADAPT_VLLM_GPU") == "1"
MAX_RANK = 64 if PAGED else 8
PROMPTS = [[5, 9, 20, 7, 33], [150, 100, 50, 3], [1, 2, 3, 4, 5, 6, 7, 8, 9], [42], [17, 18]]

# A CPU's attention in vLLM takes heads of 32 and more.
SIZES: dict[str, Any] = {
    "hidden_size": 192,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 128,
    "initializer_range": 0.1,
}
MODELS = {
    "llama": LlamaConfig(**SIZES, tie_word_embeddings=False),
    # Biases on q, k and v, and one head of keys and values.
    "qwen2": Qwen2Config(**SIZES | {"num_key_value_heads": 1}, tie_word_embeddings=True),
}

ADAPTERS: dict[str, Any] = {
    "lora": peft.LoraConfig(r=8, target_modules=SEVEN),
    "rslora": peft.LoraConfig(r=20, use_rslora=True, rank_pattern={"v_proj": 3}, target_modules=["q_proj", "v_proj"]),
    "dora": peft.LoraConfig(r=5, use_dora=True, target_modules=SEVEN),
    "vera": peft.VeraConfig(r=64, target_modules=["q_proj", "o_proj", "up_proj"]),
    "vera of the same key": peft.VeraConfig(r=64, target_modules=["q_proj", "o_proj", "up_proj"]),
    "a bias of B": peft.LoraConfig(r=4, lora_bias=True, target_modules=["k_proj", "o_proj", "down_proj"]),
    "a bias of its own": peft.LoraConfig(r=4, bias="lora_only", target_modules=["q_proj", "gate_proj"]),
}


class Served(NamedTuple):
    """A saved model, and for each adapter's name, "" for none, its directory and the tokens that follow each prompt."""

    model: Path
    directories: dict[str, Path]
    tokens: dict[str, list[list[int]]]


def greedy(model: Any, prompt: list[int]) -> list[int]:
    with torch.no_grad():
        found = model.generate(
            input_ids=torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=TOKENS,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
    tokens: list[int] = found[0, len(prompt) :].tolist()
    return tokens


def adapted(model: Path, config: Any, seed: int, size: float = 0.15) -> Any:
    """A PEFT model whose adapter does something, the more so the larger the size."""
    found = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(model).eval(), config)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in found.named_parameters():
            if parameter.requires_grad:
                # A magnitude keeps its size, a bias of its own moves visibly.
                parameter.add_(torch.randn_like(parameter), alpha=0.5 if "bias" in name or "vera" in name else size)
    return found


def save(directory: Path, kind: str, adapters: dict[str, Any]) -> Served:
    """Writes the model of that kind with these adapters, and asks transformers for their tokens."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(MODELS[kind]).eval()
    for name, parameter in base.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    model = directory / "model"
    base.save_pretrained(model)
    return served_by(model, directory / "adapters", adapters)


def served_by(
    model: Path, root: Path, adapters: dict[str, Any], prompts: list[list[int]] = PROMPTS, size: float = 0.15
) -> Served:
    """Writes these adapters for a saved model, and asks transformers for the tokens behind the prompts."""
    base = AutoModelForCausalLM.from_pretrained(model).eval()
    served = Served(model, {}, {"": [greedy(base, prompt) for prompt in prompts]})
    for seed, (name, config) in enumerate(adapters.items(), 1):
        served.directories[name] = root / name
        found = adapted(model, config, seed, size)
        found.save_pretrained(served.directories[name])
        # PEFT merges no bias of B into a layer without a bias.
        merged = found if getattr(config, "lora_bias", False) else found.merge_and_unload()
        served.tokens[name] = [greedy(merged, prompt) for prompt in prompts]
    return served


def save_tokenizer(model: Path) -> None:
    """A tokenizer whose words are the tokens' numbers: what a server takes and gives is read off."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({f"t{token}": token for token in range(VOCABULARY)}, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.WordPiece()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="t0", pad_token="t0").save_pretrained(model)


def smollm2() -> Path:
    """The directory of SmolLM2-135M-Instruct."""
    from fastadapt.commands.demo.assets import load_model

    model, _ = load_model(None, lambda text: None)
    return Path(model.name_or_path)
