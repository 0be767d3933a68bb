"""Which tensor of an adapter file is which of the model's, where other libraries and versions spell it otherwise."""

from __future__ import annotations

import heapq
from collections.abc import Collection, Iterable
from itertools import islice
from pathlib import Path

from torch import Tensor

from ..checks import shown

# Parts of a name that only say what a module was inside of when it was saved: prefixes of PEFT, of the place that a
# language model had in transformers before 4.52 or has beside an encoder of images, that of CLIP's text encoder before
# version 5, and of what wraps models. Of two modules that nothing else tells apart none is chosen.
_AROUND = {
    "base_model",
    "model",
    "language_model",
    "text_model",
    "module",
    "_orig_mod",
    "_fsdp_wrapped_module",
    "_checkpoint_wrapped_module",
    "weight",
}


def respell(tensors: dict[str, Tensor], known: Collection[str], stems: Collection[str]) -> None:
    """Gives the tensors of a file their names among the known ones, in place, as far as there is one way to do it.

    stems: what the names of an adapter's own tensors begin with after the module's path; PEFT has the adapter's name
    behind it while it is in a model.
    """
    others = [name for name in tensors if name not in known]
    if len(others) > len(known):  # some are of no module, however they are spelled
        return
    lost, free = _by_core(others, stems), _by_core(set(known) - tensors.keys(), stems)
    for core, names in lost.items():
        places = free.get(core, [])
        if len(names) == len(places) == 1:
            tensors[places[0]] = tensors.pop(names[0])


def _by_core(names: Iterable[str], stems: Collection[str]) -> dict[tuple[str, ...], list[str]]:
    found: dict[tuple[str, ...], list[str]] = {}
    for name in names:
        found.setdefault(core(name, stems), []).append(name)
    return found


def core(name: str, stems: Collection[str]) -> tuple[str, ...]:
    """The parts of a name that tell its module from others of a model."""
    parts = name.split(".")
    if "modules_to_save" in parts[:-1]:
        place = parts.index("modules_to_save")
        del parts[place : place + 2]
    if len(parts) > 2 and parts[-2] in stems and parts[-1] not in ("weight", "bias"):
        del parts[-1]
    elif len(parts) > 3 and parts[-3] in stems:
        del parts[-2]
    return tuple(part for part in parts if part not in _AROUND)


def check_names(tensors: Collection[str], wanted: Collection[str], source: Path) -> None:
    """Raises ValueError unless the tensors of the file at `source` have just the names that are wanted."""
    missing, surplus = sorted(set(wanted) - set(tensors)), sorted(set(tensors) - set(wanted))
    for kind, names, owner, others in (
        ("is missing", missing, "the file", surplus),
        ("does not belong to this config and model", surplus, "the model", missing or sorted(wanted)),
    ):
        if names:
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            near = f"; {owner} has {nearest(names[0], others)}" if others else ""
            raise ValueError(f"{source}: tensor {names[0]} {kind}{more}: is this adapter for another model?{near}")


def nearest(name: str, others: Iterable[str], most: int = 3) -> str:
    """Those of the other names that end most like this one, the nearest first."""
    parts = name.split(".")[::-1]

    def near(other: str) -> tuple[int, int]:
        theirs = other.split(".")[::-1]
        same = [first == second for first, second in zip(parts, theirs, strict=False)]
        return (same.index(False) if False in same else len(same)), len({*parts}.intersection(theirs))

    found = heapq.nlargest(most + 1, islice(others, 10_000), key=near)
    return ", ".join(shown(other) for other in found[:most]) + (", ..." if len(found) > most else "")
