"""`fastadapt train`: fine-tunes a transformers model on a file with any of the recipes, and goes on after any stop."""

from __future__ import annotations

import contextlib
import json
import shlex
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ...files import sha256_of, written_whole
from ...methods import PEFT_TYPES
from ...model.inject import trainable_parameters
from ...model.peft_files import CONFIG_FILE, TENSOR_FILE, read_fields
from ...model.saving import save_adapter
from ...progress import working
from ..base_model import Base, load_base
from ..batches import Row
from ..quiet import quiet_transformers
from ..report import write_json
from . import state as train_state
from .data import Encoded, Record, encode, format_of, label_names, read_records, split
from .loop import Training
from .options import Options, differences
from .report import Bar, draw, summary
from .world import World, processes

JSON_FILE, PICTURE = "train.json", "train.png"
# The base model's config with the classes that were trained.
CLASSES_FILE = "config.json"


def run(options: Options, console: Console) -> dict[str, Any]:
    """Trains, or goes on where a run with these options stopped; prints it on `console` and returns train.json's row.

    Under torchrun each process takes batch_size · accumulate rows of a step; the first one writes and prints.
    Raises ValueError or OSError for what a user can cure, Interrupted after a signal; what was saved is then there.
    """

    with processes(options.device) as world:
        return _run(options, console if world.first else Console(quiet=True), world)


def _run(options: Options, console: Console, world: World) -> dict[str, Any]:
    """`run` in one of the processes: the first one reads and writes OUTPUT, and all print but only that is shown."""

    def say(text: str) -> None:
        console.print(text, highlight=False, soft_wrap=True)

    records = read_records(options.data)
    form = format_of(records[0])
    with contextlib.ExitStack() as stack:
        world.decided(lambda: stack.enter_context(train_state.owned(options.output)))
        stack.enter_context(quiet_transformers())
        settings = world.decided(lambda: _settings(options, world))
        state = world.decided(lambda: last_state(options, settings, say))
        finished = state is not None and state["step"] == state["steps"]
        row = world.decided(lambda: _finished(options.output, form, say)) if finished else None
        if state is not None and row is not None:
            say(f"{options.output} is finished: {state['step']} steps with these options; nothing was changed")
            world.decided(lambda: _copy_json(options))
            return row
        labels = label_names(records) if form == "classification" else []
        with working(f"loading {options.model}", console):
            torch.manual_seed(options.seed)  # a new classifier starts at random
            base = load_base(options.model, options.dtype, labels, options.quantize, options.torch_device)
            if options.quantize is None:
                base.model.to(options.torch_device)
        rows, heldout = _rows(options, records, form, base, labels, say)
        training = Training(base.model, options, settings, rows, heldout, base.padding, world)
        if state is None:
            with working(f"preparing {options.recipe.title}", console):
                task = "SEQ_CLS" if labels else "CAUSAL_LM"
                training.begin(task_type=task, modules_to_save=base.new_modules or None)
        else:
            training.resume(state)
            say(f"going on from checkpoint-{training.step} of {training.steps} steps")
        counted = trainable_parameters(base.model)
        among = f", {world.size} processes" if world.size > 1 else ""
        say(f"{options.recipe.title} on {options.torch_device}{among}, {len(rows):,} rows, {counted}")
        with _threads_of(state, say), Bar(console, training.step, training.steps) as bar:
            training.run(bar)
        row = world.decided(lambda: finish(training, form))
    console.print(summary(row))
    say(f"adapter   {options.output}, {_for_peft(read_fields(options.output))}")
    say(f"results   {options.output / JSON_FILE}, {options.output / PICTURE}")
    command = shlex.join(["fastadapt", "merge", options.model, str(options.output), f"{options.output}-merged"])
    say(f"next      {command}")
    return row


def _for_peft(fields: Mapping[str, Any]) -> str:
    """What PEFT makes of an adapter file with these fields, in words."""
    if fields.get("use_dora") and fields.get("target_parameters"):
        return "not readable by PEFT, which has no DoRA on experts"
    return "readable by PEFT" if fields["peft_type"] in PEFT_TYPES else "for PEFT: load it and export_lora"


def _settings(options: Options, world: World) -> dict[str, Any]:
    """What the result depends on; how many processes there are, where there are several."""
    settings = options.settings()
    return settings if world.size == 1 else {**settings, "processes": world.size}


def last_state(options: Options, settings: dict[str, Any], say: Callable[[str], None]) -> dict[str, Any] | None:
    """The state to go on from, None to start anew; with overwrite, what cannot be gone on from is removed.

    Raises ValueError or FileExistsError where that would need overwrite.
    """
    output = options.output
    if (output / CLASSES_FILE).exists() and not (output / CONFIG_FILE).exists():
        raise FileExistsError(f"{output} is the directory of a model, got as OUTPUT: choose another place")
    try:
        state = train_state.load_last(output, say)
        if state is None:
            taken = next((name for name in _outputs("any") if (output / name).exists()), None)
            if taken is None:
                return None
            raise FileExistsError(
                f"{output} has {taken}, and no checkpoint to go on from: choose another place, or replace it with "
                "--overwrite"
            )
        changed = differences(settings, state.get("settings", {}))
        if not changed:
            return state
        raise ValueError(
            f"{output} is from a run with other options ({'; '.join(changed)}): go on with those, choose another "
            "place, or start anew with --overwrite"
        )
    except (ValueError, FileExistsError):
        if not options.overwrite:
            raise
    # Checkpoints last: as long as one is there, a run that is killed here finds what to overwrite.
    for name in (CLASSES_FILE, *_outputs("any")):
        (output / name).unlink(missing_ok=True)
    for path in train_state.checkpoints(output).values():
        train_state.remove(path)
    return None


def _finished(output: Path, form: str, say: Callable[[str], None]) -> dict[str, Any] | None:
    """The row of a finished run, None where one of its files is missing or is not what was written."""
    try:
        document = json.loads((output / JSON_FILE).read_text(encoding="utf-8"))
        row, sums = dict(document["rows"][0]), dict(document.get("files", {}))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        say(f"{output / JSON_FILE} is damaged: the run is written out again")
        return None
    for name in _outputs(form):
        path = output / name
        if not path.is_file():
            return None
        if name in sums and sha256_of(path) != sums[name]:
            say(f"{path} is not what was written: the run is written out again")
            return None
    return row


@contextlib.contextmanager
def _threads_of(state: dict[str, Any] | None, say: Callable[[str], None]) -> Iterator[None]:
    """Goes on with as many threads as a run had before: sums in another order differ in their last bits."""
    now = torch.get_num_threads()
    before = now if state is None else state.get("threads", now)
    if before != now:
        say(f"going on with {before} threads as before, and not {now}: these would change the last bits of the result")
        torch.set_num_threads(before)
    try:
        yield
    finally:
        torch.set_num_threads(now)


def _outputs(form: str) -> list[str]:
    return [TENSOR_FILE, CONFIG_FILE, PICTURE, JSON_FILE, *([CLASSES_FILE] if form == "classification" else [])]


def _rows(
    options: Options,
    records: list[Record],
    form: str,
    base: Base,
    labels: Sequence[str],
    say: Callable[[str], None],
) -> tuple[list[Row], list[Row]]:
    """(rows to train on, rows held out), with what was cut or left out said."""
    limit = base.max_length(options.max_length)

    def encoded(records: list[Record], path: Path) -> list[Row]:
        found: Encoded = encode(records, form, base.tokenizer, limit, labels)
        if found.truncated:
            say(f"{path}: {found.truncated} of {len(records)} rows were cut to {limit} tokens (--max-length)")
        if found.dropped:
            say(f"{path}: {found.dropped} of {len(records)} rows have over {limit} tokens: left out (--max-length)")
        return found.rows

    rows = encoded(records, options.data)
    if options.eval is not None:
        return rows, encoded(read_records(options.eval), options.eval)
    return split(rows, options.held_share, options.seed)


def finish(training: Training, form: str) -> dict[str, Any]:
    """Writes the adapter, the picture and, last, train.json; returns its row."""
    options, model, held = training.options, training.model, training.evaluations
    counted = trainable_parameters(model)
    first, last = (held[0], held[-1]) if held else (None, None)
    row = {
        "title": options.recipe.title,
        "method": options.method,
        "model": options.model,
        "data": str(options.data),
        "format": form,
        "rows": len(training.rows),
        "eval_rows": len(training.heldout),
        "steps": training.steps,
        "trainable": counted.trainable,
        "parameters": counted.total,
        "loss_before": first.loss if first else None,
        "loss_after": last.loss if last else None,
        "accuracy_before": first.accuracy if first else None,
        "accuracy_after": last.accuracy if last else None,
        "first_loss": training.losses[0],
        "last_loss": training.losses[-1],
        "seconds": round(training.seconds, 3),
        "tokens": training.tokens,
        "tokens_per_second": round(training.tokens / training.step_seconds, 1),
    }
    save_adapter(model, options.output)
    if form == "classification":
        with written_whole(options.output / CLASSES_FILE) as draft:
            model.config.to_json_file(draft)
    unit = {"classification": "row", "text": "token"}.get(form, "answer token")
    draw(training.losses, held, unit, options.output / PICTURE)
    curve = {"train": training.losses, "eval": [evaluation._asdict() for evaluation in held]}
    sums = {name: sha256_of(options.output / name) for name in _outputs(form) if name != JSON_FILE}
    write_json(options.output / JSON_FILE, "train", [row], settings=training.settings, curve=curve, files=sums)
    _copy_json(options)
    return row


def _copy_json(options: Options) -> None:
    if options.json is not None and options.json.resolve() != (options.output / JSON_FILE).resolve():
        with written_whole(options.json) as draft:
            shutil.copyfile(options.output / JSON_FILE, draft)
