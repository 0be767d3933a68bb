"""Memory of a fixed size, in pages of several sizes: where resident adapters lie."""

from __future__ import annotations

from bisect import insort
from collections.abc import Sequence
from copy import copy

import torch

# Pages begin where a GPU can load 16 bytes at once.
_ALIGNMENT = 16

# A slab holds this many of the largest pages, so that what does not divide it is a twentieth at most; fewer where the
# budget is small, since each size of page needs a slab of its own.
_PAGES_IN_SLAB = 20
_FEWEST_SLABS = 64


class ArenaFullError(MemoryError):
    """The arena has no room for as many pages as were asked for."""


class Arena:
    """`budget` bytes that are taken and given back in pages.

    The memory is cut into slabs, and a slab into pages of one size for as long as one of them is in use: pages of any
    size come from the same budget, and what is given back serves any other size again once its slab is empty. Nothing
    ever moves. Not thread-safe: its owner has the lock.
    Raises ValueError for a budget that does not hold a slab.
    """

    def __init__(self, budget: int, largest_page: int, device: torch.device | str = "cpu") -> None:
        largest = page_bytes(largest_page)
        self.slab_bytes = largest * max(1, min(_PAGES_IN_SLAB, budget // (_FEWEST_SLABS * largest)))
        slabs = budget // self.slab_bytes
        if slabs < 1:
            raise ValueError(
                f"budget must be at least {self.slab_bytes:,} bytes for the widest layer of this model, got {budget:,}"
            )
        with torch.inference_mode(False):  # it is written in any mode
            self.memory = torch.empty(slabs * self.slab_bytes, dtype=torch.uint8, device=device)
        self.used_bytes = 0
        self._empty = list(range(slabs))[::-1]
        self._free: dict[int, list[int]] = {}  # by page size, sorted offsets
        self._in_use: dict[int, int] = {}  # pages in use of every slab that is cut

    @property
    def held_bytes(self) -> int:
        """The slabs that are cut into pages, whether those are in use or not."""
        return len(self._in_use) * self.slab_bytes

    @property
    def budget(self) -> int:
        return self.memory.numel()

    def take(self, size: int, count: int) -> list[int]:
        """Byte offsets of `count` pages of `size` bytes, one behind the other where that is possible.

        Raises ArenaFullError; nothing is taken then.
        """
        size = page_bytes(size)
        per_slab = self.slab_bytes // size
        free = self._free.setdefault(size, [])
        taken = _run(free, size, count)
        if taken is None:
            # New slabs keep the pages together; where they do not suffice, what is free anywhere helps out.
            new = next((n for n in (count, count - len(free)) if self._slabs(n, per_slab) <= len(self._empty)), None)
            if new is None or per_slab == 0:
                raise ArenaFullError(f"{count} pages of {size:,} bytes do not fit into what is free of {self.budget:,}")
            cut = [self._cut(size, per_slab) for _ in range(self._slabs(new, per_slab))]
            taken = _run(free, size, count) or free[:count]
        else:
            cut = []
        for offset in taken:
            free.remove(offset)
            self._in_use[offset // self.slab_bytes] += 1
        for slab in cut:
            self._uncut_if_unused(slab, free)
        self.used_bytes += size * count
        return taken

    def give_back(self, size: int, offsets: Sequence[int]) -> None:
        """Returns pages that `take` gave for that size."""
        size = page_bytes(size)
        free = self._free[size]
        for offset in offsets:
            insort(free, offset)
            slab = offset // self.slab_bytes
            self._in_use[slab] -= 1
            self._uncut_if_unused(slab, free)
        self.used_bytes -= size * len(offsets)

    def books(self) -> Arena:
        """An arena in which the same pages are taken, to try out what is taken or given back next: not to write to."""
        found = copy(self)
        found._empty, found._in_use = self._empty[:], self._in_use.copy()
        found._free = {size: free[:] for size, free in self._free.items()}
        return found

    def has_room(self, pages: Sequence[tuple[int, int]]) -> bool:
        """Whether pages of these (size, count) can be taken one after another."""
        if sum(page_bytes(size) * count for size, count in pages) > self.budget - self.used_bytes:
            return False
        trial = self.books()
        try:
            for size, count in pages:
                trial.take(size, count)
        except ArenaFullError:
            return False
        return True

    @staticmethod
    def _slabs(pages: int, per_slab: int) -> int:
        return -(-pages // max(1, per_slab))

    def _cut(self, size: int, per_slab: int) -> int:
        slab = self._empty.pop()
        self._in_use[slab] = 0
        free, first = self._free[size], slab * self.slab_bytes
        free.extend(range(first, first + per_slab * size, size))
        free.sort()
        return slab

    def _uncut_if_unused(self, slab: int, free: list[int]) -> None:
        if not self._in_use[slab]:
            del self._in_use[slab]
            first, end = slab * self.slab_bytes, (slab + 1) * self.slab_bytes
            free[:] = [page for page in free if not first <= page < end]
            self._empty.append(slab)


class QueuedReads:
    """Kernels that may still be queued and read what lies in an arena: who overwrites it has to wait for them.

    One event for each stream, whose work is in order, however many requests there were. On a CPU nothing is queued. Not
    thread-safe: its owner has the lock.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._events: dict[torch.cuda.Stream, torch.cuda.Event] = {}

    def note(self) -> None:
        """What the current stream has got so far reads."""
        if self.device.type == "cuda":
            stream = torch.cuda.current_stream(self.device)
            if stream not in self._events:
                self._events[stream] = torch.cuda.Event()
            self._events[stream].record(stream)

    def wait(self) -> None:
        """What the current stream gets from now on comes after all that read."""
        for event in self._events.values():
            event.wait(torch.cuda.current_stream(self.device))


def page_bytes(size: int) -> int:
    """What a page of `size` bytes takes."""
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _run(free: Sequence[int], size: int, count: int) -> list[int] | None:
    """The first `count` of the sorted offsets that lie one behind the other."""
    start = 0
    for index in range(len(free)):
        if index and free[index] != free[index - 1] + size:
            start = index
        if index - start + 1 == count:
            return list(free[start : index + 1])
    return None
