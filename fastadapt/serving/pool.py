"""Adapters that serve: registered by name, in memory while they are in use, their forms by layer and slot."""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..layers.experts import projections, routers_of, stacked_bias, stacked_weight, why_no_experts
from ..layers.linear import AdapterLinear
from ..model.adapted import dtype_around
from ..model.targets import is_linear
from ..model.untrusted import AdapterError
from ..operators.multi_adapter_linear.batch import PAGE_RANKS, AdapterBatch, FormEntry, LayerForms, SlotForm
from ..operators.multi_adapter_linear.experts import ExpertPart
from ..operators.multi_adapter_linear.pages import slot_form
from .arena import Arena, ArenaFullError, QueuedReads
from .entries import AdapterInfo, Arrival, Content, Entry, Factors, Taken, pair_key
from .expert_forms import content_of, parts_of
from .loader import LoadedAdapter, read_adapter
from .shelf import Shelf
from .tables import PoolTables

# Views of this many adapters are kept ready: of a small adapter they take as much memory as the adapter itself.
_WARM = 256


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
    (nn.Linear and Conv1D), `experts` those whose weights are stacked, `routers` theirs. dtype: of the factors; by
    default the base weights'. backend: "triton" takes no forms of experts, which it has no kernel for. Raises
    ValueError for a model without linear layers, or a budget that is too small to hold anything.
    """

    def __init__(
        self,
        model: nn.Module,
        modules: Mapping[str, nn.Module],
        *,
        budget: int,
        dtype: torch.dtype | None = None,
        backend: str = "auto",
    ) -> None:
        self.model = model
        self.backend = backend
        self.modules = dict(modules)
        self.layers = {path: module for path, module in self.modules.items() if is_linear(module)}
        if not self.layers:
            raise ValueError(f"{type(model).__name__} has no linear layers: there is nothing to adapt")
        self.routers = {path: part for path, part in routers_of(self.modules).items() if path not in self.layers}
        shapes = {path: _shape(layer) for path, layer in self.layers.items()}
        first = AdapterLinear(next(iter(self.layers.values())))
        first.around = dtype_around(model)
        self.dtype = dtype or first.like.dtype
        self.device = first.like.device
        self.experts = {path: module for path, module in self.modules.items() if not why_no_experts(module)}
        self._stacked: dict[str, tuple[nn.Module, str]] = {
            f"{path}.{name}": (module, name) for path, module in self.experts.items() for name in projections(module)
        }
        others = [stacked_weight(module, name).shape[1:] for module, name in self._stacked.values()]
        others += [router.get_parameter("weight").shape for router in self.routers.values()]
        widest = max(max(shape) for shape in (*shapes.values(), *others))
        self.arena = Arena(budget, PAGE_RANKS * widest * self.dtype.itemsize, self.device)
        self._shelf = Shelf(self.arena, self.dtype)
        self._forms: dict[str, dict[int, SlotForm]] = {path: {} for path in shapes}
        # Of experts and routers, which no table is about: parts of forms and forms of all resident adapters.
        self._kept: dict[str, dict[int, Any]] = {path: {} for path in (*self._stacked, *self.routers)}
        self._warm: dict[int, Entry] = {}  # by slot, the least recently held first
        self._path_sets: dict[tuple[str, ...], tuple[str, ...]] = {}
        self._tables = PoolTables(shapes, self._shelf.pages, self._shelf.vectors)
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
        """The forms of the layer at this module path by slot, of adapters that were held not long ago; of a router, of
        all resident ones."""
        return self._kept[path] if path in self.routers else self._forms[path]

    def parts(self, path: str) -> Mapping[int, tuple[ExpertPart, ...]]:
        """The forms by slot of the weight of experts at this path of a parameter, of all resident adapters."""
        return self._kept[path]

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
        own = self._shelf.sizes(list(arrival.layers.values()))
        pair = self._shelf.pair_sizes(arrival.pair)
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
            if trial.has_room([*(() if users.get(arrival.key) else pair), *own]):
                return idle[:count]
        pages = [*(() if users.get(arrival.key) else pair), *own]
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
        for path in entry.kept:
            del self._kept[path][entry.slot]
        entry.kept = ()
        self._tables.clear_slot(entry.slot)
        self._free_slots.append(entry.slot)
        self._give_back(entry)
        entry.slot = entry.group = -1

    def _give_back(self, entry: Entry) -> None:
        self._shelf.give_back(entry.taken)
        if entry.shared_key is None:
            if entry.group >= 0:
                self._free_group(entry.group)
            return
        factors = self._shared[entry.shared_key]
        factors.users -= 1
        if not factors.users:
            del self._shared[entry.shared_key]
            self._shelf.give_back(factors.taken)
            self._free_group(factors.group)
        entry.shared_key = None

    def _free_group(self, group: int) -> None:
        self._tables.clear_group(group)
        self._free_groups.append(group)

    # Writing an adapter's form into the arena

    def _enter(self, entry: Entry, arrival: Arrival) -> None:
        self._reads.wait()
        slot = self._free_slots.pop() if self._free_slots else self._new_slot()
        found: dict[str, FormEntry] = {}
        kept: dict[str, Any] = {}
        shared = None
        try:
            if arrival.key is None:
                entry.group = self._free_groups.pop() if self._free_groups else self._new_group()
            else:
                factors = self._share(arrival.pair, arrival.key)
                entry.group, entry.shared_key, shared = factors.group, arrival.key, factors.pair
            for path, content in arrival.layers.items():
                placed = self._shelf.put(content, shared, entry.taken)
                if path in self._stacked:
                    weight = stacked_weight(*self._stacked[path])
                    kept[path] = parts_of(self._shelf, placed, content, weight, shared=shared is not None)
                elif path in self.routers:
                    n, k = self.routers[path].get_parameter("weight").shape
                    kept[path] = slot_form(self._shelf.pages, self._shelf.vectors, (n, k), placed)
                else:
                    found[path] = placed
            self._tables.enter(slot, entry.group, found, shared=shared is not None)
        except BaseException:
            self._tables.clear_slot(slot)
            self._free_slots.append(slot)
            self._give_back(entry)
            entry.group = -1
            raise
        entry.slot, entry.true_bytes = slot, sum(content.bytes for content in arrival.layers.values())
        entry.paths = self._path_sets.setdefault(tuple(found), tuple(found))
        entry.kept = tuple(kept)
        for path, own in kept.items():
            self._kept[path][slot] = own

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
                placed = self._shelf.put_pair(pair, taken)
            except BaseException:
                self._shelf.give_back(taken)
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
            pair = self._shelf.rows((A, B.T), name)
        shared = key is not None
        layers: dict[str, Content] = {}
        for path, form in loaded.forms.items():
            bias = getattr(self.modules[path], "bias", None)
            layers[path] = self._shelf.content(name, form, bias, shared=shared)
        if loaded.experts and self.backend == "triton":
            raise AdapterError(name, 'backend "triton" has no kernel for weights of experts: take "auto" or "eager"')
        for path, stack in loaded.experts.items():
            bias = stacked_bias(*self._stacked[path])
            layers[path] = content_of(self._shelf, name, stack, bias, shared=shared)
        return Arrival(layers, pair, key)

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
