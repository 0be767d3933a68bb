"""Which module of a model a file means by a name, whole or with underscores in the place of its dots."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from typing import TypeVar

from ...checks import shown
from ..matching import core, nearest
from ..untrusted import one_line
from .sgm import sgm_names

Key = TypeVar("Key")


def flat(path: str) -> str:
    """A module path with underscores for dots, as kohya's files have it: more than one path can come to the same."""
    return path.replace(".", "_")


class Names:
    """The module paths of a model, by the ways in which files spell them.

    owner: the model, as an error calls it.
    """

    def __init__(self, paths: Iterable[str], owner: str) -> None:
        self.paths = dict.fromkeys(path for path in paths if path)
        self.owner = owner

    @cached_property
    def _parents(self) -> dict[str, None]:
        """All modules, though only the paths of layers may have been given."""
        found: dict[str, None] = {}
        for path in self.paths:
            parts = path.split(".")
            found |= dict.fromkeys(".".join(parts[:end]) for end in range(1, len(parts) + 1))
        return found

    @cached_property
    def _cores(self) -> dict[tuple[str, ...], list[str]]:
        return _grouped((core(path, ()), path) for path in self.paths)

    @cached_property
    def _flat(self) -> list[dict[str, list[str]]]:
        """Paths by their flat names: first their own, then those that other code has for the same modules."""
        other = [*sgm_names(self._parents).items()]
        other += [(path, f"text_model.{path}") for path in self.paths]
        other += [(path, path.removeprefix("text_model.")) for path in self.paths if path.startswith("text_model.")]
        own = _grouped((flat(path), path) for path in self.paths)
        return [own, _grouped((flat(name), path) for path, name in other if path in self.paths)]

    def find(self, module: str, *, flattened: bool) -> str:
        """The path of the module that a file calls so. Raises ValueError where there is none, or more than one."""
        if flattened:
            found = next((paths for by_name in self._flat if (paths := by_name.get(module))), [])
        else:
            found = [module] if module in self.paths else self._cores.get(core(module, ()), [])
        if not found:
            near = nearest(module, self.paths)
            raise ValueError(
                f"no module of {self.owner} is called {shown(module)}: is this adapter for another model?"
                + (f"; it has {near}" if near else "")
            )
        if len(found) > 1:
            raise ValueError(
                f"{shown(module)} can be {one_line(' or '.join(found), 200)} of {self.owner}: save the adapter in a "
                "layout that has whole paths, diffusers' or PEFT's"
            )
        return found[0]


def _grouped(pairs: Iterable[tuple[Key, str]]) -> dict[Key, list[str]]:
    found: dict[Key, list[str]] = {}
    for key, path in pairs:
        if path not in (paths := found.setdefault(key, [])):
            paths.append(path)
    return found
