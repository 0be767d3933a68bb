"""Layers that read the same x run together: q, k and v; gate and up."""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .operators.adapter_linear.function import adapter_linear_group
from .operators.calls import compute_dtype
from .versions import optimizer_steps, version

if TYPE_CHECKING:
    from .layers import Adapter, AdapterLinear

# Names of sibling projections that read the same input.
SIBLINGS = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q_lin", "k_lin", "v_lin"),
    ("to_q", "to_k", "to_v"),
    ("q", "k", "v"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("wi_0", "wi_1"),
)

# In modules of these names the queries read another input than keys and values.
CROSS_ATTENTION = re.compile(r"cross|encoder_?attn|encdec|attn2", re.IGNORECASE)


def readers_of_one_input(parent: str) -> Iterator[tuple[str, ...]]:
    """The names of layers that read one and the same input in the module at the path `parent`, set by set."""
    cross = CROSS_ATTENTION.search(parent)
    for names in SIBLINGS:
        yield names[1:] if cross and len(names) == 3 else names


def siblings(path: str) -> tuple[str, ...]:
    """The names, the last parts of their paths, of the layers that read what the layer at `path` reads, its own too."""
    parent, _, name = path.rpartition(".")
    return next((names for names in readers_of_one_input(parent) if name in names), (name,))


# After so many rounds in which a layer did not come for its output, the guess that the layers share x was wrong.
_MISSES = 2


def circumstances(x: Tensor, adapters: Sequence[Adapter], *tensors: Tensor | None) -> tuple[Any, ...]:
    """What a result for x depends on beside x itself: equal as long as the result would come out the same.

    adapters: those that it is made by; tensors: what else, a base weight and its bias.
    """
    if torch.compiler.is_compiling():  # tensors have no versions while they are traced
        return ()
    found: list[Any] = [version(x), torch.is_grad_enabled(), compute_dtype(x), optimizer_steps()]
    for adapter in adapters:
        found += (id(adapter), adapter.training, adapter.scaling, adapter.variant)
        tensors = (*tensors, *adapter._parameters.values(), *adapter._buffers.values())
    for tensor in tensors:
        if tensor is not None:
            found += (id(tensor), version(tensor))
    return tuple(found)


class MadeOf:
    """What was made of one x for several layers. It does not keep x alive, and `forget` is called when x is gone."""

    def __init__(self, x: Tensor, made: Any, forget: Callable[[MadeOf], None]) -> None:
        # While x is traced it outlives what is made of it.
        self._x = (lambda: x) if torch.compiler.is_compiling() else weakref.ref(x, lambda _: forget(self))
        self.made = made

    def of(self, x: Tensor) -> bool:
        return self._x() is x


class ProjectionGroup:
    """Linear layers that are expected to read the same x, run as one when the first of them is called.

    That one computes the outputs of all (`adapter_linear_group`); the others find theirs when they are called with the
    very same tensor, unwritten since, in the same grad and autocast mode and with the same parameters. Otherwise a
    layer runs by itself, and after two rounds with outputs that nobody fetched so does every layer from then on.
    Layers without an active adapter, merged, in another mode, of another dtype or on another device stay out. Under
    dropout the layers of a group share one mask.
    """

    def __init__(self, layers: Sequence[AdapterLinear]) -> None:
        self.layers = list(layers)
        self._round: MadeOf | None = None  # of the outputs that were not fetched yet, by id of their layer
        self._misses = 0

    def __getstate__(self) -> dict[str, Any]:  # copies and pickles start empty
        return {"layers": self.layers, "_round": None, "_misses": 0}

    def output(self, layer: AdapterLinear, x: Tensor) -> Tensor | None:
        """y of `layer` for x, or None where it has to run by itself."""
        if self._misses >= _MISSES or torch.compiler.is_compiling() or x.is_inference():
            return None
        current = self._round
        if current is not None:
            if current.of(x):
                y, state = current.made.pop(id(layer), (None, None))
                if not current.made:
                    self._round = None
                if y is not None and state == _state(x, layer):
                    fetched: Tensor = y
                    return fetched
            else:
                self.drop(current)
        return self._lead(layer, x) if self._misses < _MISSES else None

    def forget(self) -> None:
        """Drops outputs that were not fetched."""
        self._round = None

    def drop(self, old: MadeOf) -> None:
        """Forgets a round; outputs that were not fetched count as a miss.

        Not in a backward pass: there a checkpointed forward runs again, and stops as soon as it has what it needs.
        """
        if old is self._round:
            self._round = None
            if torch._C._current_graph_task_id() == -1:
                self._misses += 1

    def _lead(self, layer: AdapterLinear, x: Tensor) -> Tensor | None:
        members = [other for other in self.layers if other is layer or _joins(other, layer, x)]
        if len(members) < 2 or not any(member is layer for member in members):
            return None
        weights = [member.weight_matrix for member in members]
        forms = [member.form() for member in members]
        ys = adapter_linear_group(
            x,
            weights,
            forms,
            dropout=layer.dropout,
            training=layer.training,
            backend=layer.backend,
            strategy=layer.strategy,
        )
        found = dict(zip(members, ys, strict=True))
        y = found.pop(layer)
        waiting = {id(member): (other, _state(x, member)) for member, other in found.items()}
        self._round = MadeOf(x, waiting, self.drop)
        return y


def _joins(other: AdapterLinear, leader: AdapterLinear, x: Tensor) -> bool:
    """Whether a layer can run together with the one that was called."""
    if not other.active or other.merged or other.on_stream or other.dropout != leader.dropout:
        return False
    weight, own = other.weight_matrix, leader.weight_matrix
    return (
        # A sharded or offloaded weight is not what it seems to be until its own layer is called.
        type(weight) is type(own)
        and weight.dim() == 2
        and weight.shape[1] == x.shape[-1]
        and weight.dtype == own.dtype
        and weight.device == x.device
        and not weight.requires_grad
        and (other.training, other.backend, other.strategy) == (leader.training, leader.backend, leader.strategy)
    )


def _state(x: Tensor, layer: AdapterLinear) -> tuple[Any, ...]:
    base: Any = layer._modules["base_layer"]
    own = base._parameters
    # A weight that is made anew at each access is never the same: its layer runs by itself.
    tensors = own.values() if "weight" in own else (base.weight, base.bias)
    return layer.training, *circumstances(x, layer.active_adapters, *tensors)
