"""Adapters that serve: registered by name, in memory while they are in use, their forms by layer and slot."""

from __future__ import annotations

import os
import threading
import warnings
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..layers.linear import AdapterLinear
from ..model.adapted import dtype_around
from ..model.targets import is_linear
from ..model.untrusted import AdapterError
from ..operators.multi_adapter_linear.batch import PAGE_RANKS, AdapterBatch, FormEntry, LayerForms, SlotForm, added_bias
from ..operators.multi_adapter_linear.plan import part_cuts, rank_rows
from ..reference import AdapterForm
from .arena import Arena, ArenaFullError, QueuedReads
from .entries import AdapterInfo, Arrival, Content, Entry, Factors, Taken, pair_key
from .loader import LoadedAdapter, read_adapter
from .tables import PoolTables

# Views of this many adapters are kept ready: of a small adapter they take as much memory as the adapter itself.
_WARM = 256

_VECTOR_BYTES = 4  # scales and biases are fp32, whatever the factors are: in bf16 a g near 1 would be 1


class PoolFullError(MemoryError):
    """The pool's budget has no room for an adapter beside those that are pinned or in use."""


class AdapterPool:
    """The adapters of one model that can be in a batch together.

    Every adapter is a form for each layer that it adapts: its own A and B on pages of PAGE_RANKS rank rows, as many as
    its rank takes, or a pair that VeRA adapters of one key share; scales and biases as fp32 vectors, DoRA's g = m / n
    among them, computed once. `budget` bytes hold all of it; when they are full, those that were not used for the
    longest time make room, except pinned ones and those in use, and are read again when they are asked for.
    An adapter is what its files hold: loaded again with other content the name has a new identity, and whoever is
    using the old one finishes with it. All methods may be called from any thread.

    modules: the model's modules by path as they were before any was wrapped to serve; `layers` are the linear ones
    (nn.Linear and Conv1D). dtype: of the factors; by default the base weights'. Raises ValueError for a model without
    linear layers, or a budget that is too small to hold anything.
    """

    def __init__(
        self,
        model: nn.Module,
        modules: Mapping[str, nn.Module],
        *,
        budget: int,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.model = model
        self.modules = dict(modules)
        self.layers = {path: module for path, module in self.modules.items() if is_linear(module)}
        if not self.layers:
            raise ValueError(f"{type(model).__name__} has no linear layers: there is nothing to adapt")
        shapes = {path: _shape(layer) for path, layer in self.layers.items()}
        first = AdapterLinear(next(iter(self.layers.values())))
        first.around = dtype_around(model)
        self.dtype = dtype or first.like.dtype
        self.device = first.like.device
        widest = max(max(shape) for shape in shapes.values())
        self.arena = Arena(budget, PAGE_RANKS * widest * self.dtype.itemsize, self.device)
        self._pages = self.arena.memory.view(self.dtype)
        self._vectors = self.arena.memory.view(torch.float32)
        self._forms: dict[str, dict[int, SlotForm]] = {path: {} for path in self.layers}
        self._warm: dict[int, Entry] = {}  # by slot, the least recently held first
        self._path_sets: dict[tuple[str, ...], tuple[str, ...]] = {}
        self._tables = PoolTables(shapes, self._pages, self._vectors)
        self._entries: dict[str, Entry] = {}
        self._leaving: list[Entry] = []  # replaced or removed while in use
        self._shared: dict[tuple[object, ...], Factors] = {}
        self._free_slots: list[int] = []
        self._slots = 0
        self._free_groups: list[int] = []
        self._groups = 0
        self._clock = 0
        self._lock = threading.RLock()
        self._reads = QueuedReads(self.device)

    # What users call

    def load(self, directory: str | Path, name: str | None = None, *, root: str | Path | None = None) -> str:
        """Registers the adapter in a PEFT directory and makes it resident. Returns its identity.

        name: by default the last part of the path as it is written, and where another directory has that, with as many
        of the parts before it as tell them apart: sql/checkpoint-500. root: where the directory must lie. Under a name
        that is taken, the same content changes nothing, and other content replaces it for whoever asks from now on;
        that of another directory with a warning. Raises AdapterError for a bad adapter, PoolFullError where it does not
        fit; the pool is then as it was.
        """
        source = Path(directory)
        loaded = read_adapter(self.model, source, root=root, modules=self.modules)
        with self._lock:
            return self.add(name or self._name_for(source), loaded, source, root=root)

    def _name_for(self, source: Path) -> str:
        parts = Path(os.path.abspath(source)).parts
        names = ("/".join(parts[-count:]) for count in range(1, len(parts) + 1))
        return next((name for name in names if self._is_from(name, source)), str(source))

    def _is_from(self, name: str, source: Path) -> bool:
        """Whether a name is free, or an adapter's of this directory."""
        entry = self._entries.get(name)
        there = None if entry is None else entry.source
        return entry is None or (there is not None and os.path.abspath(there) == os.path.abspath(source))

    def add(
        self, name: str, loaded: LoadedAdapter, source: Path | None = None, *, root: str | Path | None = None
    ) -> str:
        """Registers an adapter that has been read, as `load` does.

        source, root: where it can be read again once evicted; without a source it is kept as it was given.
        """
        if not isinstance(name, str) or not name:
            raise AdapterError(str(name), "its name must be a string that is not empty")
        with self._lock:
            old = self._entries.get(name)
            if old is not None and old.identity == loaded.identity:
                if not old.resident:
                    self._settle(old, loaded)
                old.source, old.root = source, None if root is None else Path(root)
                old.loaded = None if source is not None else loaded
                return old.identity
            if source is not None and not self._is_from(name, source):
                before = "an adapter without a directory" if old is None or old.source is None else old.source
                warnings.warn(f"adapter {name!r} is {source} from now on, and was {before}", stacklevel=3)
            kept = None if source is not None else loaded
            entry = Entry(name, loaded.identity, source, None if root is None else Path(root), kept)
            entry.used_at = self._tick()
            self._settle(entry, loaded)
            if old is not None:
                entry.pinned = old.pinned
                self._retire(old)
            self._entries[name] = entry
        return entry.identity

    def remove(self, name: str) -> None:
        """Forgets an adapter; whoever is using it finishes first. Raises KeyError for an unknown name."""
        with self._lock:
            self._retire(self._entry(name))
            del self._entries[name]

    def evict(self, name: str) -> None:
        """Gives back the memory of an adapter, which stays registered.

        Raises KeyError for an unknown name, ValueError for one that is in use or pinned.
        """
        with self._lock:
            entry = self._entry(name)
            if entry.holders or entry.pinned:
                raise ValueError(f"adapter {name!r} is {'in use' if entry.holders else 'pinned'}: it cannot be evicted")
            self._vacate(entry)

    def pin(self, name: str) -> None:
        """Keeps an adapter resident until `unpin`. Raises KeyError, AdapterError or PoolFullError."""
        with self.hold([name]), self._lock:
            self._entry(name).pinned = True

    def unpin(self, name: str) -> None:
        """Lets an adapter be evicted again. Raises KeyError for an unknown name."""
        with self._lock:
            self._entry(name).pinned = False

    def info(self, name: str) -> AdapterInfo:
        """Raises KeyError for an unknown name."""
        with self._lock:
            entry = self._entry(name)
            return AdapterInfo(name, entry.identity, entry.true_bytes, entry.resident, entry.pinned, entry.holders > 0)

    @property
    def names(self) -> list[str]:
        """The registered adapters, in the order in which they came."""
        with self._lock:
            return list(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def used_bytes(self) -> int:
        """Pages in use."""
        return self.arena.used_bytes

    @property
    def held_bytes(self) -> int:
        """Pages in use and the free ones beside them, in whole slabs of the arena."""
        return self.arena.held_bytes

    @contextmanager
    def hold(self, names: Sequence[str | None]) -> Iterator[Holding]:
        """The adapters of these names, None for the base model, resident and unchanged inside the `with` block.

        Raises KeyError for an unknown name, AdapterError for one that cannot be read again, PoolFullError where they
        do not fit together.
        """
        held: list[Entry] = []
        try:
            by_name = self._held(dict.fromkeys(name for name in names if name is not None), held)
            entries = [None if name is None else by_name[name] for name in names]
            yield Holding(
                [-1 if entry is None else entry.slot for entry in entries],
                [-1 if entry is None else entry.group for entry in entries],
            )
        finally:
            with self._lock:
                self._reads.note()
                for entry in held:
                    entry.holders -= 1
                    if entry.retired and not entry.holders:
                        self._vacate(entry)
                        self._leaving.remove(entry)

    def layer(self, path: str) -> LayerForms:
        """What the layer at this module path computes for each slot."""
        return LayerForms(self._forms[path], self._tables.layer(path), self._tables.max_rank)

    def forms(self, path: str) -> Mapping[int, SlotForm]:
        """The forms of the layer at this module path by slot, of adapters that were held not long ago."""
        return self._forms[path]

    # Making room

    def _held(self, names: Mapping[str, None], held: list[Entry]) -> dict[str, Entry]:
        """Resident entries of these names, each counted in as held and appended to `held`."""
        found: dict[str, Entry] = {}
        with self._lock:
            for name in names:  # those that are here already first, so that none makes room for another
                if self._entry(name).resident:
                    found[name] = self._take_hold(self._entry(name), held)
        for name in names:
            while name not in found:
                with self._lock:
                    entry = self._entry(name)
                    if entry.resident or entry.loaded is not None:
                        if not entry.resident and entry.loaded is not None:
                            self._settle(entry, entry.loaded)
                        found[name] = self._take_hold(entry, held)
                        break
                    source, root = entry.source, entry.root
                assert source is not None
                # Without the lock: others go on.
                loaded = read_adapter(self.model, source, root=root, modules=self.modules)
                with self._lock:
                    if self._entries.get(name) is not entry or entry.resident:
                        continue
                    if loaded.identity != entry.identity:
                        raise AdapterError(name, f"{source} has changed since it was loaded: load it again")
                    self._settle(entry, loaded)
        return found

    def _take_hold(self, entry: Entry, held: list[Entry]) -> Entry:
        entry.holders += 1
        entry.used_at = self._tick()
        held.append(entry)
        self._warm.pop(entry.slot, None)
        self._warm[entry.slot] = entry
        if entry.paths and entry.slot not in self._forms[entry.paths[0]]:
            for path, form in self._tables.forms(entry.slot, entry.group, entry.paths):
                self._forms[path][entry.slot] = form
        if len(self._warm) > _WARM:
            idle = next((other for other in self._warm.values() if not other.holders), None)
            if idle is not None:
                self._cool(idle)
        return entry

    def _cool(self, entry: Entry) -> None:
        """Forgets the views of an adapter that nobody uses: the tables say where it lies."""
        if self._warm.pop(entry.slot, None) is not None:
            for path in entry.paths:
                self._forms[path].pop(entry.slot, None)

    def _settle(self, entry: Entry, loaded: LoadedAdapter) -> None:
        """Makes an adapter resident, evicting others where there is no room. On any error the pool is as it was."""
        with torch.no_grad():
            arrival = self._arrival(entry.name, loaded)
            try:
                self._enter(entry, arrival)
            except ArenaFullError as error:
                for other in self._in_the_way(entry, arrival, error):
                    self._vacate(other)
                self._enter(entry, arrival)

    def _in_the_way(self, entry: Entry, arrival: Arrival, error: ArenaFullError) -> list[Entry]:
        """Whom to evict so that an adapter fits, the least recently used first; nobody is evicted yet.

        Raises PoolFullError where it does not fit beside those that are pinned or in use.
        """
        idle = [other for other in self._entries.values() if other.resident and not (other.holders or other.pinned)]
        idle.sort(key=lambda other: other.used_at)
        users: dict[object, int] = {key: factors.users for key, factors in self._shared.items()}
        contents = arrival.layers.values()
        own = [size for content in contents for size in self._sizes(content.factors, content.vectors)]
        trial = self.arena.books()
        for count, other in enumerate(idle, start=1):
            leaving = [other.taken]
            if other.shared_key is not None:
                users[other.shared_key] -= 1
                if not users[other.shared_key]:
                    leaving.append(self._shared[other.shared_key].taken)
            for taken in leaving:
                for size, offsets in taken.items():
                    trial.give_back(size, offsets)
            if trial.has_room([*self._sizes(() if users.get(arrival.key) else arrival.pair), *own]):
                return idle[:count]
        pages = [*self._sizes(() if users.get(arrival.key) else arrival.pair), *own]
        needed = sum([size * count for size, count in pages])
        raise PoolFullError(
            f"adapter {entry.name!r} does not fit: it needs {needed:,} bytes, in slabs of {trial.slab_bytes:,} for "
            f"pages of one size each; {trial.used_bytes:,} of {trial.budget:,} are pinned or in use: raise the budget, "
            "or have fewer adapters in a batch"
        ) from error

    def _retire(self, entry: Entry) -> None:
        """Gives back an entry's memory, at once or when its last user is done."""
        entry.retired = True
        if entry.holders:
            self._leaving.append(entry)
        else:
            self._vacate(entry)

    def _vacate(self, entry: Entry) -> None:
        if not entry.resident:
            return
        self._cool(entry)
        self._tables.clear_slot(entry.slot)
        self._free_slots.append(entry.slot)
        self._give_back(entry)
        entry.slot = entry.group = -1

    def _give_back(self, entry: Entry) -> None:
        self._give_pages_back(entry.taken)
        if entry.shared_key is None:
            if entry.group >= 0:
                self._free_group(entry.group)
            return
        factors = self._shared[entry.shared_key]
        factors.users -= 1
        if not factors.users:
            del self._shared[entry.shared_key]
            self._give_pages_back(factors.taken)
            self._free_group(factors.group)
        entry.shared_key = None

    def _give_pages_back(self, taken: Taken) -> None:
        for size, offsets in taken.items():
            self.arena.give_back(size, offsets)
        taken.clear()

    def _free_group(self, group: int) -> None:
        self._tables.clear_group(group)
        self._free_groups.append(group)

    # Writing an adapter's form into the arena

    def _enter(self, entry: Entry, arrival: Arrival) -> None:
        self._reads.wait()
        slot = self._free_slots.pop() if self._free_slots else self._new_slot()
        found: dict[str, FormEntry] = {}
        shared = None
        try:
            if arrival.key is None:
                entry.group = self._free_groups.pop() if self._free_groups else self._new_group()
            else:
                factors = self._share(arrival.pair, arrival.key)
                entry.group, entry.shared_key, shared = factors.group, arrival.key, factors.pair
            for path, content in arrival.layers.items():
                found[path] = self._place(content, shared, entry.taken)
        except BaseException:
            self._free_slots.append(slot)
            self._give_back(entry)
            entry.group = -1
            raise
        entry.slot, entry.true_bytes = slot, sum(content.bytes for content in arrival.layers.values())
        entry.paths = self._path_sets.setdefault(tuple(found), tuple(found))
        self._tables.enter(slot, entry.group, found, shared=shared is not None)

    def _new_slot(self) -> int:
        self._slots += 1
        return self._slots - 1

    def _new_group(self) -> int:
        self._groups += 1
        return self._groups - 1

    def _share(self, pair: Sequence[Tensor], key: tuple[object, ...]) -> Factors:
        """A shared pair, which comes into the arena with its first user."""
        factors = self._shared.get(key)
        if factors is None:
            taken: Taken = {}
            try:
                placed = self._put_pair(pair, taken)
            except BaseException:
                self._give_pages_back(taken)
                raise
            group = self._free_groups.pop() if self._free_groups else self._new_group()
            factors = self._shared[key] = Factors(group, placed, taken)
        factors.users += 1
        return factors

    def _arrival(self, name: str, loaded: LoadedAdapter) -> Arrival:
        """What an adapter puts into the arena. Raises AdapterError for what the pool's dtypes cannot hold."""
        pair, key = list[Tensor](), None
        if loaded.shared is not None:
            A, B = loaded.shared
            key = pair_key(A, B)
            pair = [self._cast(rows, self.dtype, name) for rows in (A, B.T)]
        layers = {path: self._content(name, path, form, shared=key is not None) for path, form in loaded.forms.items()}
        return Arrival(layers, pair, key)

    def _content(self, name: str, path: str, form: AdapterForm, *, shared: bool) -> Content:
        """What an adapter's form for one layer puts into the arena. Raises AdapterError for what it cannot hold."""
        mid, factors = form.mid_scale, list[Tensor]()
        if not shared:
            down, up = form.A, form.B.T
            if mid is not None:  # d goes into A, and what it switches off stays out
                used = mid != 0
                down, up, mid = down[used] * mid[used, None], up[used], None
            factors = [self._cast(rows, self.dtype, name) for rows in (down, up)]
        scaling, out_scale = form.scaling, form.out_scale
        if not isinstance(out_scale, Tensor) or out_scale.dim() == 0:
            scaling *= float(out_scale)
        h = out_scale if isinstance(out_scale, Tensor) and out_scale.dim() else None
        base_bias = getattr(self.layers[path], "bias", None)
        tied = h is not None and h is form.base_scale
        vectors = (mid, None if tied else h, form.base_scale, added_bias(form.bias, base_bias))
        cast = (None if vector is None else self._cast(vector, torch.float32, name) for vector in vectors)
        return Content(factors, list(cast), scaling, tied)

    def _place(self, content: Content, pair: FormEntry | None, taken: Taken) -> FormEntry:
        """One layer's content in the arena, where its pair is if it shares one."""
        if pair is None:
            pair = self._put_pair(content.factors, taken)
        mid, h, g, added = (-1 if vector is None else self._put_vector(vector, taken) for vector in content.vectors)
        return pair._replace(
            scaling=content.scaling,
            mid_scale=mid,
            out_scale=g if content.tied else h,
            base_scale=g,
            added_bias=added,
        )

    def _put_pair(self, pair: Sequence[Tensor], taken: Taken) -> FormEntry:
        """Factors A [R, K] and Bᵀ [R, N] in the arena, without scales."""
        A, B = pair
        return FormEntry(A.shape[0], self._put_rows(A, taken), self._put_rows(B, taken), A.shape[1], B.shape[1])

    def _put_rows(self, rows: Tensor, taken: Taken) -> array[int]:
        """The first element of every page of rank rows [R, width]."""
        rank, width = rows.shape
        itemsize = self.dtype.itemsize
        pages = array("q", (offset // itemsize for offset in self._take(*self._sizes([rows])[0], taken)))
        cuts = part_cuts(rank, (pages, width))
        parts = rank_rows(self._pages, cuts, pages, width, width)
        for part, (first, last) in zip(parts, pairwise(cuts), strict=True):
            part.copy_(rows[first:last])
        return pages

    def _put_vector(self, vector: Tensor, taken: Taken) -> int:
        """The first element of a vector."""
        (offset,) = self._take(vector.nbytes, 1, taken)
        start = offset // _VECTOR_BYTES
        self._vectors[start : start + vector.numel()].copy_(vector)
        return start

    def _take(self, size: int, count: int, taken: Taken) -> list[int]:
        offsets = self.arena.take(size, count)
        taken.setdefault(size, array("q")).extend(offsets)
        return offsets

    def _sizes(self, factors: Iterable[Tensor], vectors: Iterable[Tensor | None] = ()) -> list[tuple[int, int]]:
        """(bytes, count) of the pages of rank rows [R, width] and of vectors, in the order in which they are taken."""
        itemsize = self.dtype.itemsize
        pages = [(PAGE_RANKS * rows.shape[1] * itemsize, -(-rows.shape[0] // PAGE_RANKS)) for rows in factors]
        return pages + [(vector.nbytes, 1) for vector in vectors if vector is not None]

    @staticmethod
    def _cast(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
        result = tensor.detach().to(dtype)
        if not torch.isfinite(result).all():
            raise AdapterError(name, f"it has values that {dtype} cannot hold: give the pool a wider dtype")
        return result

    def _entry(self, name: str) -> Entry:
        entry = self._entries.get(name)
        if entry is None:
            known = ", ".join(map(repr, list(self._entries)[:20])) or "none"
            raise KeyError(f"adapter {name!r} is not in the pool; it has {known}")
        return entry

    def _tick(self) -> int:
        self._clock += 1
        return self._clock


class Holding(NamedTuple):
    """Slots and factor groups of held adapters, in the order of their names; -1 for the base model."""

    slots: list[int]
    groups: list[int]

    def batch(self, tokens: int) -> AdapterBatch:
        """The batch in which each row has `tokens` tokens, one behind the other."""
        return AdapterBatch(self.slots, tokens, self.groups)

    def of(self, rows: Iterable[int], tokens: int) -> AdapterBatch:
        """The batch of these rows, in this order, of `tokens` tokens each."""
        rows = list(rows)
        return AdapterBatch([self.slots[row] for row in rows], tokens, [self.groups[row] for row in rows])


def _shape(layer: nn.Module) -> tuple[int, int]:
    """(out, in) of a base layer, however its weight is stored, and wherever."""
    if isinstance(layer, nn.Linear):
        return layer.out_features, layer.in_features
    weight: Tensor = layer.weight  # type: ignore[assignment]
    return weight.shape[1], weight.shape[0]
