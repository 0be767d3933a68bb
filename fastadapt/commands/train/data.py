"""What is trained on: rows of a .jsonl or .csv file, their tokens, and batches whose order a seed decides."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..batches import Row, joined, length

# The columns that make each format; the first format whose columns are all there is taken.
FORMATS: dict[str, tuple[str, ...]] = {
    "chat": ("messages",),
    "completion": ("prompt", "completion"),
    "classification": ("text", "label"),
    "text": ("text",),
}


def split(rows: list[Row], share: float, seed: int) -> tuple[list[Row], list[Row]]:
    """(rows to train on, rows held out); at least one of each unless the share is 0 or there is one row only."""
    held = min(len(rows) - 1, max(1, round(share * len(rows)))) if share else 0
    chosen = set(random.Random(f"{seed} split").sample(range(len(rows)), held))
    return (
        [row for index, row in enumerate(rows) if index not in chosen],
        [row for index, row in enumerate(rows) if index in chosen],
    )


class Record(NamedTuple):
    """One row of a file as it was read, and where: "data.csv, line 3"."""

    where: str
    fields: dict[str, Any]


def read_records(path: Path) -> list[Record]:
    """The rows of a .jsonl or .csv file, UTF-8; blank lines are none.

    Raises FileNotFoundError, or ValueError that names the file, the line and the cure.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file: DATA must be a .jsonl or .csv file")
    readers = {".jsonl": _read_jsonl, ".csv": _read_csv}
    if path.suffix.lower() not in readers:
        raise ValueError(
            f"{path} must end in .jsonl (one JSON object a line) or .csv (with a header), got {path.suffix!r}"
        )
    try:
        records = list(readers[path.suffix.lower()](path))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be UTF-8 text: {error}; save it as UTF-8") from None
    if not records:
        raise ValueError(f"{path} has no rows: write at least one")
    return records


def _read_jsonl(path: Path) -> Iterator[Record]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                fields = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{where} is not JSON ({error}): write one object a line") from None
            if not isinstance(fields, dict):
                raise ValueError(f'{where} must be a JSON object such as {{"text": "…"}}, got {type(fields).__name__}')
            yield Record(where, fields)


def _read_csv(path: Path) -> Iterator[Record]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        before = 0
        try:
            header = next(reader, [])
            while True:
                before = reader.line_num  # a quoted cell may span lines: a row is where it starts
                cells = next(reader, None)
                if cells is None:
                    return
                where = f"{path}, line {before + 1}"
                if not cells:
                    continue
                if len(cells) != len(header):
                    raise ValueError(
                        f"{where} must have {len(header)} cells as the header has, got {len(cells)}: put cells with "
                        "commas or quotes in double quotes"
                    )
                yield Record(where, dict(zip(header, cells, strict=True)))
        except csv.Error as error:
            raise ValueError(f"{path}, line {before + 1} is not CSV ({error}): quote its cells again") from None


def format_of(record: Record) -> str:
    """The format that a file's first row has the columns of. Raises ValueError where there is none."""
    for name, columns in FORMATS.items():
        if all(column in record.fields for column in columns):
            return name
    choices = "; or ".join(" and ".join(columns) for columns in FORMATS.values())
    raise ValueError(
        f"{record.where}: columns must be {choices}; got {', '.join(map(str, record.fields)) or 'none'}: rename them"
    )


def _shown(value: Any) -> str:
    return f"{type(value).__name__} {json.dumps(value, ensure_ascii=False)[:40]}"


def _cell(record: Record, column: str) -> Any:
    if column not in record.fields:
        raise ValueError(f"{record.where}, column {column!r} is missing: every row needs the columns of the first")
    return record.fields[column]


def _text(record: Record, column: str, *, may_be_empty: bool = False) -> str:
    value = _cell(record, column)
    if not isinstance(value, str):
        raise ValueError(f"{record.where}, column {column!r} must be text, got {_shown(value)}: put it in quotes")
    if not value and not may_be_empty:
        raise ValueError(f"{record.where}, column {column!r} is empty: fill it in, or delete the row")
    return value


def _label(record: Record) -> str:
    value = _cell(record, "label")
    if not isinstance(value, (str, int)) or value == "":
        raise ValueError(
            f"{record.where}, column 'label' must be the name or number of a class, got {_shown(value)}: write it as "
            "text or as an integer"
        )
    return str(value)


def label_names(records: list[Record]) -> list[str]:
    """The classes of a file in sorted order, by value where all are integers.

    Raises ValueError for a row without a label, and where there are fewer than two classes.
    """
    names = {_label(record) for record in records}
    if len(names) < 2:
        raise ValueError(
            f"{records[0].where}, column 'label': classification needs at least two classes, got {', '.join(names)} "
            "alone in the file: add rows of others, or remove the column to train on the text"
        )
    numbers = all(name.removeprefix("-").isdecimal() for name in names)
    return sorted(names, key=(lambda name: (int(name), name)) if numbers else None)


class Encoded(NamedTuple):
    """The rows of a file as tokens, and how many were cut to the greatest length or left out for theirs."""

    rows: list[Row]
    truncated: int
    dropped: int


def encode(records: list[Record], form: str, tokenizer: Any, max_length: int, labels: Sequence[str] = ()) -> Encoded:
    """The tokens of a file's rows, at most max_length each.

    completion: loss on the completion and the end-of-sequence token behind it; tokens do not reach across from the
        prompt. Longer rows are left out, since cut answers would teach to stop anywhere.
    chat: as the tokenizer's template writes it, loss on the assistant's turns: on the last, and on those before it that
        the template leaves as they were once more follows. What follows the last is cut off. Longer rows are left out.
    text: loss on every token and the end-of-sequence token behind them; longer rows are cut.
    classification: the text as the tokenizer writes it for the model, longer ones cut; labels are indices of `labels`.

    Raises ValueError that names the file, the line, the column and the cure; where no row is left, and for a tokenizer
    that lacks what the format needs.
    """
    if form == "completion" and tokenizer.eos_token_id is None:
        raise ValueError(
            "the tokenizer must have an end-of-sequence token to end completions with: choose another model"
        )
    if form == "chat" and not tokenizer.chat_template:
        raise ValueError(
            "the tokenizer must have a chat template for messages: choose an instruction-tuned model, or write the "
            "rows as prompt and completion"
        )
    encoders: dict[str, Callable[[Record], Row]] = {
        "chat": lambda record: _chat(record, tokenizer),
        "completion": lambda record: _completion(record, tokenizer),
        "text": lambda record: _language(record, tokenizer),
        "classification": lambda record: _classified(record, tokenizer, labels),
    }
    rows, truncated = [], 0
    for record in records:
        row = encoders[form](record)
        if length(row) > max_length:
            if form in ("chat", "completion"):
                continue
            truncated += 1
            row = _cut(row, record, tokenizer, max_length)
        rows.append(row)
    rows = [row for row in rows if row.targets and row.ids]
    if not rows:
        raise ValueError(
            f"{records[0].where} and all other rows have more than {max_length} tokens, or none to learn from: shorten "
            "them or raise --max-length"
        )
    return Encoded(rows, truncated, len(records) - len(rows))


def _completion(record: Record, tokenizer: Any) -> Row:
    prompt: list[int] = tokenizer(_text(record, "prompt", may_be_empty=True))["input_ids"]
    if prompt and prompt[-1] == tokenizer.eos_token_id:  # some tokenizers end every text
        prompt = prompt[:-1]
    completion = tokenizer(_text(record, "completion"), add_special_tokens=False)["input_ids"]
    return joined([(prompt, False), ([*completion, tokenizer.eos_token_id], True)])


def _language(record: Record, tokenizer: Any) -> Row:
    ids: list[int] = tokenizer(_text(record, "text"))["input_ids"]
    end = tokenizer.eos_token_id
    return joined([(ids if end is None or ids[-1:] == [end] else [*ids, end], True)])


def _classified(record: Record, tokenizer: Any, labels: Sequence[str]) -> Row:
    label = _label(record)
    if label not in labels:
        raise ValueError(
            f"{record.where}, column 'label': {label!r} is not a class of the training file, which has "
            f"{', '.join(labels)}: correct it, or add training rows of that class"
        )
    return Row(tokenizer(_text(record, "text"))["input_ids"], labels.index(label))


def _cut(row: Row, record: Record, tokenizer: Any, max_length: int) -> Row:
    if isinstance(row.labels, list):
        return Row(row.ids[:max_length], row.labels[:max_length])
    # The tokenizer keeps the tokens that must end a text.
    return Row(tokenizer(record.fields["text"], truncation=True, max_length=max_length)["input_ids"], row.labels)


def _messages(record: Record) -> list[dict[str, Any]]:
    """The messages up to the assistant's last turn."""
    where, messages = f"{record.where}, column 'messages'", _cell(record, "messages")
    if not isinstance(messages, list) or not messages:
        raise ValueError(
            f'{where} must be a list of {{"role": …, "content": …}}, got {_shown(messages)}: write it as JSON in a '
            ".jsonl file"
        )
    for message in messages:
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise ValueError(f"{where}: every message must have a role and a content of text, got {_shown(message)}")
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if not turns:
        raise ValueError(f"{where} has no turn of the assistant, so there is nothing to learn: add one")
    return messages[: turns[-1] + 1]


def _chat(record: Record, tokenizer: Any) -> Row:
    from jinja2 import TemplateError

    messages = _messages(record)

    def written(count: int, asking: bool) -> str:
        text: str = tokenizer.apply_chat_template(messages[:count], tokenize=False, add_generation_prompt=asking)
        return text

    try:
        whole = written(len(messages), False)
        spans: list[tuple[int, int]] = []
        for index in [index for index, message in enumerate(messages) if message["role"] == "assistant"]:
            after = written(index + 1, False)
            # A template may ask for an answer otherwise than it writes one down: then its header is learned too.
            starts = [written(index, asking) for asking in (True, False)] if index else [""]
            before = next((start for start in starts if after.startswith(start)), None)
            if before is not None and whole.startswith(after):
                spans.append((len(before), len(after)))
    except TemplateError as error:
        raise ValueError(
            f"{record.where}, column 'messages': the chat template refuses it ({error}): change the order of roles"
        ) from None
    if not spans or spans[-1][1] != len(whole):
        raise ValueError(
            f"{record.where}, column 'messages': the chat template does not show where the last answer starts: write "
            "the rows as prompt and completion"
        )
    pieces, end = [], 0
    for start, stop in spans:
        pieces += [(whole[end:start], False), (whole[start:stop], True)]
        end = stop
    return joined([(tokenizer(text, add_special_tokens=False)["input_ids"], counted) for text, counted in pieces])
