"""The rows that `fastadapt generate` answers: what a line of the file may say, and its tokens."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ..checks import shown
from ..model.untrusted import AdapterError, contained
from ..serving.loader import adapter_directory
from .base_model import Base

FIELDS = ("prompt", "messages", "adapter", "max_new_tokens", "temperature", "top_p", "seed", "stop")

# What a tokenizer may consist of, and more bytes than any of it has.
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
_TOKENIZER_BYTES = 64 << 20

# For a chat template on one row: thousands of times what an honest one takes.
_TEMPLATE_SECONDS = 5.0


class RowError(ValueError):
    """What is wrong with one row of the file. adapter: the one that it names, where it can be read."""

    def __init__(self, reason: str, adapter: Any = None) -> None:
        self.adapter = adapter if isinstance(adapter, str) else None
        super().__init__(reason)


class Settings(NamedTuple):
    """How a row is answered. seed: of its sampling; stop: texts that end it."""

    max_new_tokens: int
    temperature: float
    top_p: float
    seed: int
    stop: tuple[str, ...] = ()


@dataclass
class Prompt:
    """One row: its line in the file, the adapter's name, the tokens of the prompt, and the tokenizer that made them."""

    line: int
    adapter: str | None
    ids: list[int]
    settings: Settings
    tokenizer: Any


def read_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(number, line) of the lines that are not blank."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, line


def fields_of(text: bytes) -> dict[str, Any]:
    """What a line says. Raises RowError for what is no JSON object."""
    try:
        fields = json.loads(text.decode("utf-8-sig"), object_pairs_hook=_once)
    except RowError:
        raise
    except (ValueError, RecursionError) as error:
        raise RowError(f"not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise RowError(f'must be a JSON object such as {{"prompt": "…", "adapter": "…"}}, got {type(fields).__name__}')
    return fields


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise RowError(f"{shown(twice)} must be there once, got it twice", found.get("adapter"))
    return found


class Reader:
    """Makes prompts of lines. Each adapter's own tokenizer and chat template are read once.

    settings: those of rows that say nothing else. positions: how many tokens a prompt and its answer may have
    together, None where nothing limits them. chat: whether prompts go through the chat template too.
    """

    def __init__(self, base: Base, adapters: Path, settings: Settings, positions: int | None, chat: bool) -> None:
        self.base, self.adapters, self.settings = base, adapters, settings
        self.positions, self.chat = positions, chat
        self._tokenizers: dict[str, Any] = {}

    def prompt(self, line: int, text: bytes) -> Prompt:
        """The row on a line. Raises RowError or AdapterError that says what is required and what came."""
        fields = fields_of(text)
        adapter = fields.get("adapter")
        try:
            if not (adapter is None or isinstance(adapter, str)):
                raise RowError(f"adapter must be a name, or null for the base model, got {type(adapter).__name__}")
            unknown = [name for name in fields if name not in FIELDS]
            if unknown:
                raise RowError(f"it may have the fields {', '.join(FIELDS)}, got {', '.join(map(shown, unknown))}")
            tokenizer = self._tokenizer(adapter)
            settings = self._settings(fields, line)
            ids = self._ids(fields, tokenizer, settings)
        except RowError as error:
            raise RowError(str(error), adapter) from None
        return Prompt(line, adapter, ids, settings, tokenizer)

    def _settings(self, fields: dict[str, Any], line: int) -> Settings:
        # Every row has random numbers of its own, whatever is in its batch.
        chosen = self.settings._replace(seed=(self.settings.seed << 32 | line) % 2**63)
        given = {name: fields[name] for name in Settings._fields if fields.get(name) is not None}
        stop = given.pop("stop", ())
        stops = (stop,) if isinstance(stop, str) else stop
        if not isinstance(stops, (list, tuple)) or not all(isinstance(text, str) and text for text in stops):
            raise RowError(f"stop must be a text or a list of texts, none of them empty, got {shown(stop)}")
        chosen = chosen._replace(**given, stop=tuple(stops))
        for name in ("max_new_tokens", "seed"):
            if type(getattr(chosen, name)) is not int:
                raise RowError(f"{name} must be a whole number, got {shown(getattr(chosen, name))}")
        for name in ("temperature", "top_p"):
            if not isinstance(getattr(chosen, name), (int, float)) or isinstance(getattr(chosen, name), bool):
                raise RowError(f"{name} must be a number, got {shown(getattr(chosen, name))}")
        if chosen.max_new_tokens < 1:
            raise RowError(f"max_new_tokens must be at least 1, got {chosen.max_new_tokens}")
        if not 0 <= chosen.seed < 2**63:
            raise RowError(f"seed must be in [0, 2^63), got {chosen.seed}")
        if not chosen.temperature >= 0:
            raise RowError(f"temperature must be 0 (greedy) or more, got {chosen.temperature}")
        if not 0 < chosen.top_p <= 1:
            raise RowError(f"top_p must be in (0, 1], got {chosen.top_p}")
        return chosen._replace(temperature=float(min(chosen.temperature, math.inf)), top_p=float(chosen.top_p))

    def _ids(self, fields: dict[str, Any], tokenizer: Any, settings: Settings) -> list[int]:
        try:
            ids = self._tokens(fields, tokenizer)
        except RowError:
            raise
        except (UnicodeError, TypeError, ValueError, OverflowError, RecursionError) as error:
            raise RowError(f"the tokenizer refuses it, as it does lone surrogates: {error}") from None
        if not ids:
            raise RowError("the prompt has no tokens: write at least one character")
        known = self.base.model.get_input_embeddings().weight.shape[0]
        if max(ids) >= known:
            raise RowError(
                f"the adapter's tokenizer gives token {max(ids)}, and the model has {known}: its new tokens need the "
                "embeddings that they were trained with; merge it into such a model"
            )
        if self.positions is not None and len(ids) + settings.max_new_tokens > self.positions:
            raise RowError(
                f"the prompt has {len(ids)} tokens, and with an answer of {settings.max_new_tokens} (max_new_tokens) "
                f"it may have {self.positions}: the model's positions, or --max-length"
            )
        return ids

    def _tokens(self, fields: dict[str, Any], tokenizer: Any) -> list[int]:
        prompt, messages = fields.get("prompt"), fields.get("messages")
        if isinstance(prompt, str) and messages is None:
            if self.chat and prompt:
                return self._templated([{"role": "user", "content": prompt}], tokenizer)
            ids: list[int] = tokenizer(prompt)["input_ids"]
            # Some tokenizers end every text; training left that out too.
            return ids[:-1] if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id else ids
        if not isinstance(messages, list) or prompt is not None:
            raise RowError("must have a prompt (text) or messages (a list of turns), one of them")
        return self._templated(messages, tokenizer)

    @staticmethod
    def _templated(messages: list[Any], tokenizer: Any) -> list[int]:
        if not tokenizer.chat_template:
            raise RowError("the tokenizer has no chat template for messages: write a prompt")
        try:
            with _time_limit(_TEMPLATE_SECONDS):
                text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # templates are programs, of strangers and for what they expect
            raise RowError(f"the chat template refuses these messages: {error}") from None
        found: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        return found

    def _tokenizer(self, adapter: str | None) -> Any:
        """The tokenizer that goes with an adapter: its own where its directory has one, else the base model's."""
        if adapter is None:
            return self.base.tokenizer
        if adapter not in self._tokenizers:
            self._tokenizers[adapter] = self._own_tokenizer(adapter)
        return self._tokenizers[adapter]

    def _own_tokenizer(self, adapter: str) -> Any:
        from transformers import AutoTokenizer

        directory = adapter_directory(self.adapters, adapter)
        try:
            there = [
                contained(self.adapters, directory / name) for name in _TOKENIZER_FILES if (directory / name).exists()
            ]
            for path in there:
                if not path.is_file() or path.stat().st_size > _TOKENIZER_BYTES:
                    raise ValueError(f"{path.name} must be a file of at most {_TOKENIZER_BYTES:,} bytes")
            names = {path.name for path in there}
            if "tokenizer.json" in names:
                return AutoTokenizer.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
            template = self._own_template(directory, names)
        except Exception as error:  # what these files may hold is whatever a tokenizer of transformers reads
            raise AdapterError(adapter, f"its tokenizer cannot be read: {error}") from error
        if template is None:
            return self.base.tokenizer
        import copy

        tokenizer = copy.deepcopy(self.base.tokenizer)
        tokenizer.chat_template = template
        return tokenizer

    @staticmethod
    def _own_template(directory: Path, names: set[str]) -> Any:
        if "chat_template.jinja" in names:
            return (directory / "chat_template.jinja").read_text(encoding="utf-8")
        if "tokenizer_config.json" in names:
            return json.loads((directory / "tokenizer_config.json").read_text(encoding="utf-8")).get("chat_template")
        return None


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Ends the Python code that runs inside after that time, with a TimeoutError: loops that a template has."""
    deadline, before = time.monotonic() + seconds, sys.gettrace()

    def watch(frame: Any, event: str, arg: Any) -> Any:
        if time.monotonic() > deadline:
            raise TimeoutError(f"it takes longer than {seconds:g} s")
        return watch

    sys.settrace(watch)
    try:
        yield
    finally:
        sys.settrace(before)
