"""What a layer of vLLM's model is called in the model that adapters were trained on."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

Shape = TypeVar("Shape")

# How the models that vLLM takes from transformers spell "gpt_neox.X is model.X": ^gpt_neox\.(.+) to model.\1
_PREFIX = re.compile(r"\^(\w+)\\\.\(\.\+\)")


def naming_of(paths: Iterable[str], mapper: Any) -> Iterator[dict[str, str]]:
    """The ways to name these layers of vLLM's model as checkpoints do: {theirs: vLLM's}, one after the other.

    mapper: vLLM's hf_to_vllm_mapper, None where the names are the same. Several of a checkpoint's prefixes may lead to
    one of vLLM's: an adapter uses one of them.
    """
    paths = list(paths)
    prefixes: Mapping[str, str | None] = {} if mapper is None else _prefixes(mapper)
    names = []
    for path in paths:
        found = [path, *(old + path[len(new) :] for old, new in prefixes.items() if new and path.startswith(new))]
        found = [name for name in dict.fromkeys(found) if mapper is None or mapper._map_name(name) == path]
        names.append(found or [path])
    for way in range(max(map(len, names), default=0)):
        yield {found[min(way, len(found) - 1)]: path for found, path in zip(names, paths, strict=True)}


def _prefixes(mapper: Any) -> dict[str, str | None]:
    """The prefixes that the mapper replaces, {theirs: vLLM's}, also those that it has as regular expressions."""
    found: dict[str, str | None] = dict(mapper.orig_to_new_prefix)
    for pattern, new in getattr(mapper, "orig_to_new_regex", {}).items():
        old = _PREFIX.fullmatch(pattern.pattern)
        if old is not None and new is not None and new.endswith(r"\1"):
            found[f"{old[1]}."] = new.removesuffix(r"\1")
    return found


def elsewhere(shapes: Mapping[str, Shape], missing: Iterable[str]) -> dict[str, Shape]:
    """The layers that other stages of a pipeline have, with the shapes of their namesakes among those that are here.

    missing: paths of the blocks that are not here, such as "model.layers.3", beside others. Blocks are taken to be
    alike: an adapter that fits no such block is refused.
    """
    found: dict[str, Shape] = {}
    for block in missing:
        parent, _, number = block.rpartition(".")
        for path, shape in shapes.items():
            here, _, name = path.removeprefix(f"{parent}.").partition(".")
            if number.isdecimal() and here.isdecimal() and path.startswith(f"{parent}."):
                found.setdefault(f"{block}.{name}", shape)
    return found
