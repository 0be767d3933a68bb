"""Checkpoints of a training run: OUTPUT/checkpoint-<step>, each there whole or not at all.

A checkpoint is any nest of dicts, lists, tuples, plain values and tensors, as JSON and safetensors, so that loading one
runs no code. It is built in a hidden directory, written through to the disk and renamed; only then do older ones go.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ...files import DRAFTS, sha256_of, written_whole
from ...training.state import pack, unpack

PREFIX = "checkpoint-"
FORMAT = 1
STATE_FILE, TENSOR_FILE, SUM_FILE = "state.json", "state.safetensors", "sha256"
# Of what a state holds, that which its readers take apart before anything else could tell that it is none.
_KINDS = {"settings": dict, "config": dict, "step": int, "steps": int}

# A killed process may hold its lock for as long as the system takes to clear it away, and that of a GPU takes a while.
LOCK_SECONDS = 10.0
# What a killed process may leave.
_REMOVING = ".removing-"


def checkpoints(output: Path) -> dict[int, Path]:
    """The checkpoint directories of a run by step, in its order."""
    found = {path.name.removeprefix(PREFIX): path for path in output.glob(f"{PREFIX}*") if path.is_dir()}
    return {int(step): found[step] for step in sorted(filter(str.isdecimal, found), key=int)}


def remove(path: Path) -> None:
    """Removes a directory; a kill halfway leaves nothing under its name."""
    hidden = path.with_name(f"{_REMOVING}{path.name}")
    _clear(hidden)
    path.rename(hidden)
    _clear(hidden)


def _clear(path: Path) -> None:
    """Removes whatever is there, a link and not what it leads to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def save(output: Path, step: int, state: dict[str, Any], keep: int = 1) -> Path:
    """Writes checkpoint-<step> and then removes all but the last `keep`, and any of later steps than this.

    Raises OSError where it cannot be written; the checkpoints that were there are then there still.
    """
    target = output / f"{PREFIX}{step}"
    with written_whole(target) as draft:
        draft.mkdir()
        tensors: dict[str, Tensor] = {}
        text = json.dumps({"format": FORMAT, "state": pack(state, tensors)})
        try:
            save_file(tensors, draft / TENSOR_FILE)
        except SafetensorError as error:
            raise OSError(f"{target} could not be written, earlier checkpoints are unchanged: {error}") from error
        (draft / STATE_FILE).write_text(text, encoding="utf-8")
        # In the format of `sha256sum -c`.
        sums = "".join(f"{sha256_of(draft / name)}  {name}\n" for name in (STATE_FILE, TENSOR_FILE))
        (draft / SUM_FILE).write_text(sums, encoding="utf-8")
    found = checkpoints(output)
    kept = [number for number in found if number <= step][-keep:]
    for number, path in found.items():
        if number not in kept:
            remove(path)
    return target


def load(checkpoint: Path) -> dict[str, Any]:
    """The state in a checkpoint directory. Raises ValueError, without the cure, where it is damaged."""
    try:
        sums = dict(line.split("  ", 1)[::-1] for line in (checkpoint / SUM_FILE).read_text("utf-8").splitlines())
        for name in (STATE_FILE, TENSOR_FILE):
            if sha256_of(checkpoint / name) != sums.get(name):
                raise ValueError(f"{name} is not what was written")
        document = json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))
        if document["format"] != FORMAT:
            raise ValueError(f"its format is {document['format']}, and this version of fastadapt has {FORMAT}")
        state: dict[str, Any] = unpack(document["state"], load_file(checkpoint / TENSOR_FILE))
        if not isinstance(state, dict):
            raise ValueError(f"its state must be an object, got {type(state).__name__}")
        for name, kind in _KINDS.items():
            if name in state and not isinstance(state[name], kind):
                raise ValueError(f"{name} must be {kind.__name__}, got {type(state[name]).__name__}")
    except FileNotFoundError as error:
        raise ValueError(f"{checkpoint} cannot be used: {Path(error.filename).name} is missing") from None
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError, SafetensorError) as error:
        raise ValueError(f"{checkpoint} cannot be used: {error}") from None
    return state


def load_last(output: Path, report: Callable[[str], None]) -> dict[str, Any] | None:
    """The state in the last whole checkpoint, None where there are no checkpoints; damaged ones are reported.

    Raises ValueError where all are damaged.
    """
    damage = ""
    for path in reversed(checkpoints(output).values()):
        try:
            return load(path)
        except ValueError as error:
            damage = str(error)
            report(f"{damage}; looking for the one before")
    if damage:
        raise ValueError(f"{damage}, and there is no whole one to go on from: start anew with --overwrite")
    return None


@contextlib.contextmanager
def owned(output: Path) -> Iterator[None]:
    """Keeps other runs out of `output` while the block lasts, and clears away what a killed one left half written.

    Waits a moment for a run that was killed just now. Raises BlockingIOError where another one has it. The lock goes
    with its process, however that ends.
    """
    output.mkdir(parents=True, exist_ok=True)
    handle = os.open(output, os.O_RDONLY)
    try:
        deadline = time.monotonic() + LOCK_SECONDS
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise BlockingIOError(
                        f"another run is writing to {output}: wait for it, or choose another place"
                    ) from None
                time.sleep(0.05)
        for path in output.iterdir():
            if path.name.startswith((DRAFTS, _REMOVING)):
                _clear(path)
        yield
    finally:
        os.close(handle)
