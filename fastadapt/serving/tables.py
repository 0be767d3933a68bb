"""Where every resident form lies: tables for the kernels that are written as adapters come and go, and views of it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from ..batch import PAGE_RANKS, FormTables, SlotForm
from ..eager_plan import slot_form

_BY_GROUP = {"ranks": torch.int32, "A_strides": torch.int32, "B_strides": torch.int32}
_PAGES = ("A_pages", "B_pages")
# Of these, a layer's table is None as long as no adapter in the pool has any.
_VECTORS = {"mid_scales": "mid_scale", "out_scales": "out_scale", "base_scales": "base_scale"}
_VECTORS |= {"added_biases": "added_bias"}
_FIRST_ROWS = 8


class PoolTables:
    """The FormTables of all layers of a pool, each a row of one tensor a kind.

    The tables are kept on the host; what an adapter changes goes to the device as one column of each kind. There the
    tensors keep their addresses, so that a captured CUDA graph reads what is written later, until more slots, groups or
    pages are needed than there is room for, or the first vector of a kind comes: `version` counts that.
    shapes: (out, in) of every layer by module path.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, int]], pages: Tensor, vectors: Tensor) -> None:
        self.max_rank = 0
        self.version = 0
        self._paths = list(shapes)
        self._shapes = list(shapes.values())
        self._rows = {path: row for row, path in enumerate(self._paths)}
        self._pages, self._vectors = pages, vectors
        self._present: set[str] = set()
        self._layers: dict[str, FormTables] = {}
        groups = (len(shapes), _FIRST_ROWS)
        self._host = {name: _new(name, groups) for name in (*_BY_GROUP, "scalings", *_VECTORS)}
        self._host |= {name: _new(name, (*groups, 1)) for name in _PAGES}
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
        by_group = [self._host[name][:, group].tolist() for name in ("ranks", *_PAGES, "A_strides", "B_strides")]
        by_slot = [self._host[name][:, slot].tolist() for name in ("scalings", *_VECTORS)]
        for path in paths:
            row = self._rows[path]
            entries = [column[row] for column in (*by_group, *by_slot)]
            yield path, slot_form(self._pages, self._vectors, self._shapes[row], *entries)

    def enter(self, slot: int, group: int, forms: Mapping[str, SlotForm], *, shared: bool) -> None:
        """Writes an adapter's forms. A shared group's factors are another's too: there layers are only added."""
        rank = max((form.rank for form in forms.values()), default=0)
        self.max_rank = max(self.max_rank, rank)
        self._reserve(slot, group, -(-rank // PAGE_RANKS))
        self._see(forms.values())
        if not shared:
            for name in (*_BY_GROUP, *_PAGES):
                self._host[name][:, group] = 0
        columns: dict[str, list[float]] = {name: [] for name in (*_BY_GROUP, "scalings", *_VECTORS)}
        for form in forms.values():
            columns["ranks"].append(form.rank)
            columns["scalings"].append(form.scaling)
            for side, parts in (("A", form.A), ("B", form.B)):
                columns[f"{side}_strides"].append(int(parts[0].stride(0)) if parts else 0)
            for name, attribute in _VECTORS.items():
                vector: Tensor | None = getattr(form, attribute)
                columns[name].append(-1 if vector is None else int(vector.storage_offset()))
        rows = torch.tensor([self._rows[path] for path in forms])
        for name, column in columns.items():
            table = self._host[name]
            table[rows, slot if name == "scalings" or name in _VECTORS else group] = torch.tensor(
                column, dtype=table.dtype
            )
        for name, side in zip(_PAGES, ("A", "B"), strict=True):
            pages = [_pages(getattr(form, side)) for form in forms.values()]
            width = self._host[name].shape[2]
            padded = [[*row, *[0] * (width - len(row))] for row in pages]
            self._host[name][rows, group] = torch.tensor(padded, dtype=torch.int64).view(len(pages), width)
        self._upload(slot, group)

    def clear_slot(self, slot: int) -> None:
        """Makes a slot the base model's."""
        for name in ("scalings", *_VECTORS):
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
            index = slot if name == "scalings" or name in _VECTORS else group
            if index is not None:
                self._device[name][:, index] = table[:, index].to(self._pages.device)

    def _reserve(self, slot: int, group: int, pages: int) -> None:
        """Doubles what is too small."""
        for name, table in self._host.items():
            row = slot if name == "scalings" or name in _VECTORS else group
            shape = list(table.shape)
            while shape[1] <= row:
                shape[1] *= 2
            if name in _PAGES:
                shape[2] = max(shape[2], pages)
            if shape != list(table.shape):
                grown = _new(name, shape)
                grown[tuple(slice(size) for size in table.shape)] = table
                self._host[name] = grown
                self._device[name] = grown.to(self._pages.device)
                self._forget_layers()

    def _see(self, forms: Collection[SlotForm]) -> None:
        for name, attribute in _VECTORS.items():
            if name not in self._present and any(getattr(form, attribute) is not None for form in forms):
                self._present.add(name)
                self._forget_layers()

    def _forget_layers(self) -> None:
        self._layers = {}
        self.version += 1


def _new(name: str, shape: Sequence[int]) -> Tensor:
    dtype = torch.float32 if name == "scalings" else _BY_GROUP.get(name, torch.int64)
    return torch.full(tuple(shape), -1 if name in _VECTORS else 0, dtype=dtype)


def _pages(parts: Sequence[Tensor]) -> list[int]:
    """The first element of every page of a factor's parts."""
    return [
        int(part.storage_offset() + first * part.stride(0))
        for part in parts
        for first in range(0, part.shape[0], PAGE_RANKS)
    ]
