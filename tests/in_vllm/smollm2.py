"""SmolLM2-135M with adapters inside an engine: are its tokens those of transformers with each adapter merged?

``python tests/in_vllm/smollm2.py [PROCESSES ...]``, by default 1 and 3: for each an engine of so many processes answers
32 prompts with LoRA, rsLoRA, DoRA, VeRA and without an adapter, all in one batch, greedily in fp32; the rows without
must besides be those of an engine without LoRA. Too long for the test suite: several minutes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from shared_memory import given_back
from tiny_served import PAGED, SEVEN, TOKENS, Served, served_by, smollm2  # first: it sets the environment

ASKED = ["What is", "Write a sentence about", "How do I explain", "Give me two facts on"]
THINGS = ["the moon", "a bridge", "Paris", "sorting a list", "bread", "the number 17", "a cat at night", "DNA"]


def texts(model: Path) -> list[list[int]]:
    """32 prompts."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    return [tokenizer(f"{asked} {thing}?").input_ids for thing in THINGS for asked in ASKED]


def adapters() -> dict[str, Any]:
    import peft

    return {
        "LoRA": peft.LoraConfig(r=8, target_modules=SEVEN),
        "rsLoRA": peft.LoraConfig(r=20, use_rslora=True, target_modules=SEVEN),
        "DoRA": peft.LoraConfig(r=16, use_dora=True, target_modules=SEVEN),
        "VeRA": peft.VeraConfig(r=256, target_modules=SEVEN),
    }


def answers(given: dict[str, Any]) -> list[list[int]]:
    """In a process of its own: the tokens of an engine with these fields behind [adapter, prompt] rows."""
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    llm = LLM(skip_tokenizer_init=True, dtype="float32", enforce_eager=True, max_model_len=64, **given["fields"])
    greedy = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True, detokenize=False)
    numbers = {name: place for place, name in enumerate(given["directories"], 1)}
    requests = {name: LoRARequest(name, numbers[name], path) for name, path in given["directories"].items()}
    prompts = [{"prompt_token_ids": prompt} for _, prompt in given["rows"]]
    chosen = [requests.get(name) for name, _ in given["rows"]]
    found = llm.generate(prompts, greedy, lora_request=chosen if requests else None, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in found]


def ask(scratch: Path, **given: Any) -> list[list[int]]:
    (scratch / "given.json").write_text(json.dumps(given), encoding="utf-8")
    with (scratch / "log").open("wb") as log, given_back():
        done = subprocess.run([sys.executable, __file__, "answer", scratch], stdout=log, stderr=log, check=False)
    if done.returncode:
        raise SystemExit(f"an engine failed: {(scratch / 'log').read_text()[-3000:]}")
    found: list[list[int]] = json.loads((scratch / "found.json").read_text(encoding="utf-8"))
    return found


def compare(served: Served, prompts: list[list[int]], processes: int, scratch: Path) -> int:
    """Says how many answers of an engine of so many processes are others'; their number."""
    fields: dict[str, Any] = {"model": str(served.model)}
    if processes > 1:
        fields |= {"tensor_parallel_size": processes, "distributed_executor_backend": "mp"}
    rows = [(name, index) for index in range(len(prompts)) for name in served.tokens]
    directories = {name: str(path) for name, path in served.directories.items()}
    lora = {"enable_lora": True, "max_loras": len(directories), "max_lora_rank": 256 if PAGED else 32}
    asked = [(name, prompts[index]) for name, index in rows]
    together = ask(scratch, fields=fields | lora, directories=directories, rows=asked)
    found = dict(zip(rows, together, strict=True))
    alone = ask(scratch, fields=fields, directories={}, rows=[("", prompt) for prompt in prompts])
    faults = 0
    for name, expected in served.tokens.items():
        wrong = [index for index in range(len(prompts)) if found[name, index] != expected[index]]
        print(f"{processes} processes, {name or 'no adapter'}: {len(wrong)} of {len(prompts)} answers differ {wrong}")
        faults += len(wrong)
    wrong = [index for index in range(len(prompts)) if found["", index] != alone[index]]
    print(f"{processes} processes, no adapter beside an engine without LoRA: {len(wrong)} differ {wrong}", flush=True)
    return faults + len(wrong)


def main(counts: list[int]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        model = smollm2()
        prompts = texts(model)
        served = served_by(model, scratch / "adapters", adapters(), prompts, size=0.02)
        others = [name for name, tokens in served.tokens.items() if name and tokens != served.tokens[""]]
        print(f"{len(prompts)} prompts, {TOKENS} tokens each; {', '.join(others)} change the answers", flush=True)
        faults = sum(compare(served, prompts, count, scratch) for count in counts)
    if faults or len(others) < len(adapters()):
        raise SystemExit(1)


if __name__ == "__main__":
    if sys.argv[1:2] == ["answer"]:
        scratch = Path(sys.argv[2])
        (scratch / "found.json").write_text(json.dumps(answers(json.loads((scratch / "given.json").read_text()))))
    else:
        os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"
        main([int(count) for count in sys.argv[1:]] or [1, 3])
