"""An engine without a server, and what it gets wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tiny_served import MAX_RANK, PROMPTS, TOKENS, Served  # first: it sets the environment
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

GREEDY = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True, detokenize=False)
SLOTS = 5


def engine(model: Path, **fields: Any) -> LLM:
    return LLM(
        str(model),
        skip_tokenizer_init=True,
        dtype="float32",
        enforce_eager=True,
        enable_lora=True,
        **{"max_loras": SLOTS, "max_lora_rank": MAX_RANK, "max_model_len": 64, "max_num_seqs": 64} | fields,
    )


def request(served: Served, name: str) -> LoRARequest | None:
    known = list(served.directories)
    return LoRARequest(name, 1 + known.index(name), str(served.directories[name])) if name else None


def answers(llm: LLM, served: Served, rows: list[tuple[str, list[int]]]) -> list[list[int]]:
    prompts = [{"prompt_token_ids": prompt} for _, prompt in rows]
    found = llm.generate(prompts, GREEDY, lora_request=[request(served, name) for name, _ in rows], use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in found]


def wrong(llm: LLM, served: Served, names: list[str]) -> list[tuple[str, list[int], list[int], list[int]]]:
    """(adapter, prompt, tokens, transformers' tokens) where these differ, of every prompt with every adapter."""
    rows = [(name, prompt) for prompt in PROMPTS for name in names]
    expected = [served.tokens[name][PROMPTS.index(prompt)] for name, prompt in rows]
    found = zip(rows, answers(llm, served, rows), expected, strict=True)
    return [(name, prompt, tokens, true) for (name, prompt), tokens, true in found if tokens != true]
