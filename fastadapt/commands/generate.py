"""The command `fastadapt generate`: rows of prompts, each with the adapter that answers it, in mixed batches."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch

from ..serving.loader import AdapterError, adapter_directory
from ..serving.model import MultiAdapterModel
from ..serving.pool import PoolFullError
from .base_model import Base, load_base
from .batches import left_padded

SPARE_BYTES = 64 << 20


@dataclass
class Options:
    """What the command was asked for. budget: MiB for resident adapters; by default as many as `adapters` holds.

    Raises ValueError for a value outside its range, by its flag.
    """

    model: str
    adapters: Path
    data: Path
    max_new_tokens: int = 128
    batch_size: int = 8
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    device: str = "cpu"
    dtype: str = "float32"
    budget: int | None = None

    def __post_init__(self) -> None:
        for flag, value in (("--max-new-tokens", self.max_new_tokens), ("--batch-size", self.batch_size)):
            if value < 1:
                raise ValueError(f"{flag} must be at least 1, got {value}")
        if self.temperature < 0:
            raise ValueError(f"--temperature must be 0 (greedy) or more, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"--top-p must be in (0, 1], got {self.top_p}")
        if self.budget is not None and self.budget < 1:
            raise ValueError(f"--budget must be at least 1 MiB, got {self.budget}")
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"--dtype must be float32 or bfloat16, got {self.dtype!r}")
        if not self.adapters.is_dir():
            raise ValueError(f"{self.adapters} is no directory: ADAPTERS must hold a directory for each adapter")
        if not self.data.is_file():
            raise ValueError(f"{self.data} is not a file: DATA must be a .jsonl file of prompts")


class Prompt(NamedTuple):
    """One row: its line in the file, the adapter's name, the tokens of the prompt."""

    line: int
    adapter: str | None
    ids: list[int]


class RowError(ValueError):
    """What is wrong with one row of the file."""


def read_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(number, line) of the lines that are not blank."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, line


def parse(line: int, text: bytes, base: Base, longest: int) -> Prompt:
    """The row on a line. Raises RowError that says what is required and what came."""
    try:
        fields = json.loads(text.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise RowError(f"not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise RowError(f'must be a JSON object such as {{"prompt": "…", "adapter": "…"}}, got {type(fields).__name__}')
    adapter = fields.get("adapter")
    if not (adapter is None or isinstance(adapter, str)):
        raise RowError(f"adapter must be a name, or null for the base model, got {type(adapter).__name__}")
    ids = _tokens(fields, base.tokenizer)
    if not ids:
        raise RowError("the prompt has no tokens: write at least one character")
    if len(ids) > longest:
        raise RowError(f"the prompt has {len(ids)} tokens, and the model takes {longest} beside --max-new-tokens")
    return Prompt(line, adapter, ids)


def _tokens(fields: dict[str, Any], tokenizer: Any) -> list[int]:
    prompt, messages = fields.get("prompt"), fields.get("messages")
    if isinstance(prompt, str) and messages is None:
        ids: list[int] = tokenizer(prompt)["input_ids"]
        # Some tokenizers end every text; training left that out too.
        return ids[:-1] if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id else ids
    if not isinstance(messages, list) or prompt is not None:
        raise RowError("must have a prompt (text) or messages (a list of turns), one of them")
    if not tokenizer.chat_template:
        raise RowError("the tokenizer has no chat template for messages: write a prompt")
    from jinja2 import TemplateError

    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except (TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
        raise RowError(f"the chat template refuses these messages: {error}") from None
    found: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return found


class Summary(NamedTuple):
    """What was done. tokens: generated ones, without padding; seconds: in generate alone."""

    rows: int
    failed: int
    tokens: int
    seconds: float


def run(
    options: Options, results: Callable[[], AbstractContextManager[IO[str]]], progress: Callable[[int, int], None]
) -> Summary:
    """Answers every row of the file and writes a JSON line for each, in the file's order, as soon as its batch is done.

    A line has the row's `line` and `adapter`, and `text` and `tokens` or what was wrong with it as `error`. `results`
    opens what they go to when the model is there, so that one that cannot be loaded costs no older results; what is
    answered stays, should a later batch fail. `progress(done, total)` is called after each batch. Raises ValueError for
    a model that cannot be loaded.
    """
    base = load_base(options.model, options.dtype, ())
    base.model.config.use_cache = True
    model = MultiAdapterModel(base.model.to(options.device), budget=_budget(options))
    longest = base.max_length(None) - options.max_new_tokens
    if longest < 1:
        raise ValueError(f"--max-new-tokens must be less than the model's {base.max_length(None)} positions")
    torch.manual_seed(options.seed)
    total = sum(1 for _ in read_lines(options.data))
    done = failed = tokens = 0
    seconds = 0.0
    waiting: list[tuple[int, bytes]] = []

    def flush(output: IO[str]) -> None:
        nonlocal done, failed, tokens, seconds
        answers, spent = _answer(model, base, waiting, longest, options)
        for answer in answers:
            output.write(json.dumps(answer, ensure_ascii=False) + "\n")
            failed += "error" in answer
            tokens += answer.get("tokens", 0)
        output.flush()
        done, seconds = done + len(waiting), seconds + spent
        waiting.clear()
        progress(done, total)

    with results() as output:
        for entry in read_lines(options.data):
            waiting.append(entry)
            if len(waiting) == options.batch_size:
                flush(output)
        if waiting:
            flush(output)
    return Summary(done, failed, tokens, seconds)


def _budget(options: Options) -> int:
    if options.budget is not None:
        return options.budget << 20
    # In fp32 a 16-bit file takes twice its size; what is never asked for is never loaded.
    sizes = [path.stat().st_size for path in options.adapters.glob("*/adapter_model.safetensors")]
    import psutil

    return SPARE_BYTES + min(2 * sum(sizes), int(psutil.virtual_memory().available // 2))


def _answer(
    model: MultiAdapterModel, base: Base, lines: Sequence[tuple[int, bytes]], longest: int, options: Options
) -> tuple[list[dict[str, Any]], float]:
    """A result for every line, and the seconds that generating took."""
    results: dict[int, dict[str, Any]] = {}
    ready: list[Prompt] = []
    for line, text in lines:
        adapter = None
        try:
            prompt = parse(line, text, base, longest)
            adapter = prompt.adapter
            if adapter is not None and adapter not in model.pool:
                model.load(adapter_directory(options.adapters, adapter), adapter, root=options.adapters)
            ready.append(prompt)
        except (RowError, AdapterError, PoolFullError) as error:
            results[line] = {"line": line, "adapter": adapter, "error": str(error)}
    start = time.perf_counter()
    for prompt, outcome in zip(ready, _generate(model, base, ready, options), strict=True):
        results[prompt.line] = {"line": prompt.line, "adapter": prompt.adapter, **outcome}
    return [results[line] for line, _ in lines], time.perf_counter() - start


def _generate(model: MultiAdapterModel, base: Base, rows: list[Prompt], options: Options) -> list[dict[str, Any]]:
    """What each row answers. Adapters that do not fit together run apart."""
    if not rows:
        return []
    batch = left_padded([row.ids for row in rows], base.padding, options.device)
    sampling: dict[str, Any] = {"do_sample": options.temperature > 0}
    if options.temperature > 0:
        sampling |= {"temperature": options.temperature, "top_p": options.top_p}
    try:
        outputs = model.generate(
            **batch,
            adapter_ids=[row.adapter for row in rows],
            max_new_tokens=options.max_new_tokens,
            pad_token_id=base.padding,
            **sampling,
        )
    except (AdapterError, PoolFullError) as error:
        if len(rows) == 1:
            return [{"error": str(error)}]
        half = len(rows) // 2
        return _generate(model, base, rows[:half], options) + _generate(model, base, rows[half:], options)
    ends = base.model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    found = []
    for new in outputs[:, batch["input_ids"].shape[1] :].tolist():
        length = next((index for index, token in enumerate(new) if token in ends), len(new))
        found.append({"text": base.tokenizer.decode(new[:length], skip_special_tokens=True), "tokens": length})
    return found
