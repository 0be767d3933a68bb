"""The command `fastadapt generate`: rows of prompts, each with the adapter that answers it, in mixed batches."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

from ..model.peft_files import TENSOR_FILE
from ..model.untrusted import DEFAULT_LIMITS, AdapterError
from ..serving.loader import adapter_directory
from ..serving.model import MultiAdapterModel
from ..serving.pool import PoolFullError
from .base_model import load_base
from .batches import left_padded
from .prompts import Prompt, Reader, RowError, Settings, fields_of, read_lines

SPARE_BYTES = 64 << 20


@dataclass
class Options:
    """What the command was asked for.

    max_length: tokens of a prompt and its answer; by default the model's positions. chat: whether prompts go through
    the chat template. budget: MiB for resident adapters; by default as many as those of the file take.

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
    max_length: int | None = None
    chat: bool = False

    def __post_init__(self) -> None:
        for flag, value in (("--max-new-tokens", self.max_new_tokens), ("--batch-size", self.batch_size)):
            if value < 1:
                raise ValueError(f"{flag} must be at least 1, got {value}")
        if self.temperature < 0:
            raise ValueError(f"--temperature must be 0 (greedy) or more, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"--top-p must be in (0, 1], got {self.top_p}")
        if self.max_length is not None and self.max_length < 2:
            raise ValueError(f"--max-length must be at least 2, got {self.max_length}")
        if self.budget is not None and self.budget < 1:
            raise ValueError(f"--budget must be at least 1 MiB, got {self.budget}")
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"--dtype must be float32 or bfloat16, got {self.dtype!r}")
        if not self.adapters.is_dir():
            raise ValueError(f"{self.adapters} is no directory: ADAPTERS must hold a directory for each adapter")
        if not self.data.is_file():
            raise ValueError(f"{self.data} is not a file: DATA must be a .jsonl file of prompts")


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

    A line has the row's `line` and `adapter`, and `text`, `tokens` and how it `ended` ("eos", "stop" or "length"), or
    what was wrong with it as `error`. `results` opens what they go to when the model is there, so that one that cannot
    be loaded costs no older results; what is answered stays, should a later batch fail. `progress(done, total)` is
    called after each batch. Raises ValueError for a model that cannot be loaded.
    """
    base = load_base(options.model, options.dtype, ())
    base.model.config.use_cache = True
    model = MultiAdapterModel(base.model.to(options.device), budget=_budget(options))
    positions = base.positions(options.max_length)
    if positions is not None and options.max_new_tokens >= positions:
        raise ValueError(f"--max-new-tokens must be less than the {positions} positions that there are")
    settings = Settings(options.max_new_tokens, options.temperature, options.top_p, options.seed)
    reader = Reader(base, options.adapters, settings, positions, options.chat)
    total = sum(1 for _ in read_lines(options.data))
    done = failed = tokens = 0
    seconds = 0.0
    waiting: list[tuple[int, bytes]] = []

    def flush(output: IO[str]) -> None:
        nonlocal done, failed, tokens, seconds
        answers, spent = _answer(model, reader, waiting, options)
        for answer in answers:
            output.write(_json_line(answer))
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


def _json_line(answer: dict[str, Any]) -> str:
    """An answer as JSON: in plain letters where they can be written, which lone surrogates cannot."""
    text = json.dumps(answer, ensure_ascii=False)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        text = json.dumps(answer)
    return text + "\n"


def _budget(options: Options) -> int:
    """Room for all adapters that the file names, as far as the memory goes."""
    if options.budget is not None:
        return options.budget << 20
    # In fp32 a 16-bit file takes twice its size; what is never asked for is never loaded.
    import psutil

    return SPARE_BYTES + min(2 * sum(_sizes(options).values()), int(psutil.virtual_memory().available // 2))


def _sizes(options: Options) -> dict[str, int]:
    """The bytes of the adapters that the file names, by their names, as far as they can be loaded at all."""
    found: dict[str, int] = {}
    for _, line in read_lines(options.data):
        with contextlib.suppress(RowError, AdapterError, OSError):
            adapter = fields_of(line).get("adapter")
            if not isinstance(adapter, str) or adapter in found:
                continue
            status = (adapter_directory(options.adapters, adapter) / TENSOR_FILE).stat()
            if status.st_size <= DEFAULT_LIMITS.max_file_bytes:
                # What a sparse file says that it has takes no place: such a one is refused, or reads as zeros.
                found[adapter] = min(status.st_size, 512 * getattr(status, "st_blocks", status.st_size))
    return found


def _answer(
    model: MultiAdapterModel, reader: Reader, lines: Sequence[tuple[int, bytes]], options: Options
) -> tuple[list[dict[str, Any]], float]:
    """A result for every line, and the seconds that generating took."""
    results: dict[int, dict[str, Any]] = {}
    ready: list[Prompt] = []
    for line, text in lines:
        adapter = None
        try:
            prompt = reader.prompt(line, text)
            adapter = prompt.adapter
            if adapter is not None and adapter not in model.pool:
                model.load(adapter_directory(options.adapters, adapter), adapter, root=options.adapters)
            ready.append(prompt)
        except (RowError, AdapterError, PoolFullError) as error:
            # An AdapterError knows its adapter, whose name may be what is wrong with it.
            adapter = error.adapter if isinstance(error, RowError) else _named(text)
            results[line] = {"line": line, "adapter": adapter, "error": str(error)}
    start = time.perf_counter()
    for prompt, outcome in zip(ready, _generate(model, reader, ready, options), strict=True):
        results[prompt.line] = {"line": prompt.line, "adapter": prompt.adapter, **outcome}
    return [results[line] for line, _ in lines], time.perf_counter() - start


def _named(text: bytes) -> Any:
    return fields_of(text).get("adapter")


def _generate(model: MultiAdapterModel, reader: Reader, rows: list[Prompt], options: Options) -> list[dict[str, Any]]:
    """What each row answers. Rows that do not fit together, or of which one is more than the model takes, run apart."""
    if not rows:
        return []
    from .answers import Answers

    base, longest = reader.base, max(len(row.ids) for row in rows)
    batch = left_padded([row.ids for row in rows], base.padding, options.device)
    ends = base.model.generation_config.eos_token_id
    answers = Answers(rows, longest, ends if isinstance(ends, list) else [] if ends is None else [ends])
    try:
        most = longest + max(row.settings.max_new_tokens for row in rows)
        if reader.positions is not None and most > reader.positions:
            # The row of the longest prompt would have gone on, unseen, to where the model has no positions.
            raise ValueError(f"the rows of a batch may have {reader.positions} tokens together, got {most}")
        outputs = model.generate(
            **batch, adapter_ids=[row.adapter for row in rows], pad_token_id=base.padding, **answers.options()
        )
    # Which of the rows it was for, the model does not say: each gets its own answer, or its own error.
    except (ValueError, TypeError, LookupError, RuntimeError, MemoryError) as error:
        if len(rows) == 1:
            return [{"error": str(error) or type(error).__name__}]
        half = len(rows) // 2
        return _generate(model, reader, rows[:half], options) + _generate(model, reader, rows[half:], options)
    return [answers.answer(index, new) for index, new in enumerate(outputs[:, longest:].tolist())]
