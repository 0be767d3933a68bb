"""The requests that run on one model: which adapter each row of what a layer is called with goes through."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

from torch import Tensor

from ..operators.multi_adapter_linear.batch import AdapterBatch
from .pool import Holding

# How the rows of a request lie in what a layer is called with. "rows": as its first dimension. "tokens": as equal parts
# of its tokens, one behind the other. "regrouped": in an order of the model's own, as the experts of a mixture see
# them. "unseen": the trace did not come by.
Layout = Literal["rows", "tokens", "regrouped", "unseen"]


# In the path of what is one of a mixture's experts by itself, not of what is all of them.
_EXPERT = re.compile(r"experts?[._]?\d", re.IGNORECASE)


class Place:
    """Where a layer is in its model, the forms there by slot, and how the rows of a request lie there."""

    def __init__(self, path: str, forms: Mapping[int, object]) -> None:
        self.path = path
        self.in_expert = _EXPERT.search(path) is not None
        self.forms = forms
        self.lie("unseen")

    def lie(self, layout: Layout) -> None:
        """Takes in how rows lie there."""
        self.layout = layout
        self.ended = ""  # what a trace ended in that did not come by
        # Layers with the same key go through the same batch.
        self.key = layout if layout in ("rows", "tokens") else self.path


class Repeats(NamedTuple):
    """What generate makes of each row. expand: beams or returned sequences, side by side, as transformers has them.

    guided: whether a model may put all rows once more behind all rows, for classifier-free guidance. own: whether the
    loop is the model's own, which may go on with some of the rows, as long audio ends sooner in one than in another.
    """

    expand: int = 1
    guided: bool = False
    own: bool = False

    def rows(self, rows: int, called: int) -> list[int] | None:
        """The row of the request that each of the `called` rows of a layer belongs to; None where nothing tells."""
        times, rest = divmod(called, max(1, rows))
        if rest:
            return None
        if self.expand > 1 and (self.own or (self.guided and times == 2)):
            return None  # some rows with their beams may be as many as all without, or guidance as two beams
        if times in (0, 1, self.expand):
            return [row for row in range(rows) for _ in range(times)]
        if self.guided and times == 2 * self.expand:
            return [row for row in range(rows) for _ in range(self.expand)] * 2
        return None


class Running:
    """The adapters of the rows of a request that is running, and what each layer does for every shape that it sees.

    While it runs its adapters are held, so that nothing of this can change. `direct`: whether layers may call the eager
    implementation themselves, which saves a third of its time in decoding. even: whether what the trace has not seen, a
    vision tower, has equally much of every row, one behind the other; a mixture's experts never do.
    """

    def __init__(
        self, holding: Holding, *, direct: bool = False, repeats: Repeats | None = None, even: bool = False
    ) -> None:
        self.holding = holding
        self.rows = len(holding.slots)
        self.slots = set(holding.slots)
        self.base_only = all(slot < 0 for slot in holding.slots)
        self.direct = direct
        self.repeats = repeats or Repeats()
        self.even = even
        self._batches: dict[tuple[int, int, str], AdapterBatch] = {}
        self.led: dict[Any, dict[Any, Tensor]] = {}  # by Readers, where the outputs of their last round wait
        self._seen: tuple[Tensor, int, dict[Any, Tensor]] | None = None

    def batch(self, x: Tensor, place: Place) -> AdapterBatch:
        """The batch for x [rows, ..., K] of a place.

        Raises ValueError where several adapters are in the request and nothing tells whose a token of x is.
        """
        rows = x.shape[0]
        tokens = x.numel() // max(1, rows * x.shape[-1])
        found = self._batches.get((rows, tokens, place.key))
        if found is None:
            found = self._batches[rows, tokens, place.key] = self._batch(x, rows, tokens, place)
        return found

    def _batch(self, x: Tensor, rows: int, tokens: int, place: Place) -> AdapterBatch:
        holding, total = self.holding, rows * tokens
        if len(self.slots) == 1:  # one adapter is right for all, whatever the model does with its rows
            return holding.of([0] * rows, tokens)
        follows = place.layout == "unseen" and self.even and not place.in_expert
        layout = "tokens" if follows else place.layout
        if layout == "rows" and (order := self.repeats.rows(self.rows, rows)) is not None:
            return holding.of(order, tokens)
        if layout == "tokens" and total % self.rows == 0 and not (self.repeats.guided or self.repeats.own):
            return holding.of(range(self.rows), total // self.rows)
        if not any(slot in place.forms for slot in self.slots):  # it is the base layer for all of them
            return AdapterBatch([-1] * rows, tokens)
        ended = place.ended if layout == "unseen" else ""
        raise ValueError(
            f"{place.path} was called with a tensor {tuple(x.shape)}, and nothing tells which of the {self.rows} rows "
            f"of adapter_ids its {total} tokens belong to: {_WHY[layout]}{ended}; ask for one adapter at a time, "
            "adapter_ids = its name, or for adapters that leave this layer alone"
        )

    def memory(self, x: Tensor) -> dict[Any, Tensor] | None:
        """What layers that are called with the same x one after another (q, k and v; gate and up) know of it."""
        if x.is_inference():  # nothing would tell that it was written
            return None
        # Read and replaced as one: several threads may run parts of a request.
        seen = self._seen
        if seen is None or seen[0] is not x or seen[1] != x._version:
            seen = self._seen = (x, x._version, {})
        return seen[2]


_WHY: dict[str, str] = {
    "rows": "the model has other rows there than generate makes of its beams and returned sequences",
    "tokens": "they are no equal parts of the rows",
    "regrouped": "the model regroups its rows before this layer, as a mixture of experts does",
    "unseen": "the rows of its input could not be followed to this layer, as with several images a row",
}


class OtherRequestsError(ValueError):
    """Several requests run on a model, and nothing tells which of them a thread works for."""


class _Own(threading.local):
    now: Running | None = None


class Requests:
    """The requests of one model. `own.now` is the one of the calling thread, if it has one."""

    def __init__(self) -> None:
        self.own = _Own()
        self._all: list[Running] = []

    @contextmanager
    def running(self, request: Running) -> Iterator[Running]:
        """Inside, the request is this thread's. They may lie in each other."""
        before = self.own.now
        self.own.now = request
        self._all.append(request)
        try:
            yield request
        finally:
            # Not by equality, nor the last: other threads come and go.
            self._all[:] = [other for other in self._all if other is not request]
            self.own.now = before

    def now(self) -> Running | None:
        """The request that what this thread calls belongs to. Raises OtherRequestsError."""
        return self.own.now or self.lent()

    def lent(self) -> Running | None:
        """The request for a thread without one, to which a model hands its work: the only one that runs, if any does.

        Raises OtherRequestsError where several do.
        """
        others = tuple(self._all)
        if len(others) > 1:
            raise OtherRequestsError(
                f"a layer was called in a thread without a request of its own while {len(others)} requests run on this "
                "model, and nothing tells whose it is: call forward or generate of the MultiAdapterModel in that "
                "thread, or run models that hand work to threads one request at a time"
            )
        return others[0] if others else None
