"""Where every resident form lies: tables for the kernels that are written as adapters come and go, and views of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..operators.multi_adapter_linear.batch import PAGE_RANKS, FormEntry, FormTables, SlotForm
from ..operators.multi_adapter_linear.pages import slot_form

# The tables, in the order of a FormEntry's fields.
_TABLES = FormTables._fields[2:]
_PAGES = ("A_pages", "B_pages")
# Of these, a layer's table is None as long as no adapter in the pool has any.
_VECTORS = ("mid_scales", "out_scales", "base_scales", "added_biases")
_BY_SLOT = ("scalings", *_VECTORS)
_DTYPES = {"scalings": torch.float32} | dict.fromkeys(("ranks", "A_strides", "B_strides"), torch.int32)
_FIRST_ROWS = 8

T = TypeVar("T")


class PoolTables:
    """The FormTables of all layers of a pool, each a row of one tensor a kind.

    The tables are kept on the host; what an adapter changes goes to the device as one column of each kind. There the
    tensors keep their addresses, so that a captured CUDA graph reads what is written later, until more slots, groups or
    pages are needed than there is room for, or the first vector of a kind comes: `version` counts that.
    shapes: (out, in) of every layer by module path.
    """

    @torch.inference_mode(False)  # what is written at any time must not be a tensor of inference mode
    def __init__(self, shapes: Mapping[str, tuple[int, int]], pages: Tensor, vectors: Tensor) -> None:
        self.max_rank = 0
        self.version = 0
        self._paths = list(shapes)
        self._shapes = list(shapes.values())
        self._rows = {path: row for row, path in enumerate(self._paths)}
        self._pages, self._vectors = pages, vectors
        self._present: set[str] = set()
        self._layers: dict[str, FormTables] = {}
        rows = (len(shapes), _FIRST_ROWS)
        self._host = {name: _new(name, (*rows, 1) if name in _PAGES else rows) for name in _TABLES}
        self._device = {name: table.to(pages.device) for name, table in self._host.items()}

    def layer(self, path: str) -> FormTables:
        """The tables of one layer."""
        found = self._layers.get(path)
        if found is None:
            row = self._rows[path]
            tables = {
                name: None if name in _VECTORS and name not in self._present else table[row]
                for name, table in self._device.items()
            }
            found = self._layers[path] = FormTables(pages=self._pages, vectors=self._vectors, **tables)  # type: ignore[arg-type]
        return found

    def forms(self, slot: int, group: int, paths: Sequence[str]) -> Iterator[tuple[str, SlotForm]]:
        """(path, form) of the layers at these paths for the adapter in a slot, as views."""
        columns = [self._host[name][:, _index(name, slot, group)].tolist() for name in _TABLES]
        for path in paths:
            row = self._rows[path]
            entry = FormEntry(*(column[row] for column in columns))
            yield path, slot_form(self._pages, self._vectors, self._shapes[row], entry)

    def enter(self, slot: int, group: int, entries: Mapping[str, FormEntry], *, shared: bool) -> None:
        """Writes an adapter's entries by layer. A shared group is another's too: there layers are only added."""
        rank = max((entry.rank for entry in entries.values()), default=0)
        self.max_rank = max(self.max_rank, rank)
        self._reserve(slot, group, -(-rank // PAGE_RANKS))
        rows = torch.tensor([self._rows[path] for path in entries], dtype=torch.int64)
        columns: dict[str, list[Any]] = {
            name: [entry[place] for entry in entries.values()] for place, name in enumerate(_TABLES)
        }
        self._see(columns)
        for name, column in columns.items():
            table = self._host[name]
            if name in _PAGES:
                column = [[*pages, *[0] * (table.shape[2] - len(pages))] for pages in column]
            if name not in _BY_SLOT and not shared:
                table[:, group] = 0
            new = torch.tensor(column, dtype=table.dtype).view(len(rows), *table.shape[2:])
            table[rows, _index(name, slot, group)] = new
        self._upload(slot, group)

    def clear_slot(self, slot: int) -> None:
        """Makes a slot the base model's."""
        if slot >= self._host["scalings"].shape[1]:
            return  # it never came to be entered
        for name in _BY_SLOT:
            self._host[name][:, slot] = 0 if name == "scalings" else -1
        self._upload(slot, None)

    def clear_group(self, group: int) -> None:
        if group < self._host["ranks"].shape[1]:  # else it never came to be entered
            self._host["ranks"][:, group] = 0
            self._upload(None, group)

    def _upload(self, slot: int | None, group: int | None) -> None:
        if self._pages.device.type == "cpu":
            return  # the host's tables are the device's
        for name, table in self._host.items():
            index = _index(name, slot, group)
            if index is not None:
                self._device[name][:, index] = table[:, index].to(self._pages.device)

    @torch.inference_mode(False)
    def _reserve(self, slot: int, group: int, pages: int) -> None:
        """Doubles what is too small."""
        for name, table in self._host.items():
            shape = list(table.shape)
            while shape[1] <= _index(name, slot, group):
                shape[1] *= 2
            if name in _PAGES:
                shape[2] = max(shape[2], pages)
            if shape != list(table.shape):
                grown = _new(name, shape)
                grown[tuple(slice(size) for size in table.shape)] = table
                self._host[name] = grown
                self._device[name] = grown.to(self._pages.device)
                self._forget_layers()

    def _see(self, columns: Mapping[str, Sequence[int]]) -> None:
        for name in _VECTORS:
            if name not in self._present and max(columns[name], default=-1) >= 0:
                self._present.add(name)
                self._forget_layers()

    def _forget_layers(self) -> None:
        self._layers = {}
        self.version += 1


def _new(name: str, shape: Sequence[int]) -> Tensor:
    return torch.full(tuple(shape), -1 if name in _VECTORS else 0, dtype=_DTYPES.get(name, torch.int64))


def _index(name: str, slot: T, group: T) -> T:
    return slot if name in _BY_SLOT else group
