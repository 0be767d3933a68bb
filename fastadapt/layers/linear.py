"""Linear layers with adapters, and the groups of them that read the same x: q, k and v; gate and up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..operators.adapter_linear.function import adapter_linear, adapter_linear_group
from .layer import AdapterLayer
from .sharing import MadeOf, circumstances, is_consumed, makers


class AdapterLinear(AdapterLayer):
    """An adapter over nn.Linear, or over a layer that stores its weight as [in, out] (transformers' Conv1D).

    y = g ⊙ (W0 x) + h ⊙ (B (d ⊙ (A x̃))) + β with the active adapters' form; the base layer's result without any.
    `group` holds the layers that are expected to read the same x: they run as one.
    Shapes: x [..., in]; y [..., out].
    """

    def __init__(self, base_layer: nn.Module, backend: str = "auto", strategy: str = "auto") -> None:
        super().__init__(base_layer, backend, strategy)
        self.fan_in_fan_out = not isinstance(base_layer, nn.Linear)
        self.group: ProjectionGroup | None = None

    @property
    def weight_matrix(self) -> Tensor:
        base: Any = self._modules["base_layer"]
        weight: Tensor | None = base._parameters.get("weight")
        if weight is None:  # made anew at each access: parametrized, pruned
            weight = base.weight
        return weight.T if self.fan_in_fan_out else weight

    def from_matrix(self, matrix: Tensor) -> Tensor:
        return matrix.T.contiguous() if self.fan_in_fan_out else matrix

    def train(self, mode: bool = True) -> AdapterLinear:
        super().train(mode)
        if self.group is not None:
            self.group.forget()
        return self

    def grouped(self, x: Tensor) -> Tensor:
        y = None if self.group is None else self.group.output(self, x)
        return self.adapted(x) if y is None else y

    def adapted(self, x: Tensor) -> Tensor:
        return adapter_linear(
            x,
            self.weight_matrix,
            self.form(),
            dropout=self.dropout,
            training=self.training,
            backend=self.backend,
            strategy=self.strategy,
        )

    def apart(self, x: Tensor) -> Tensor:
        """y for an x that no other layer reads."""
        group, self.group = self.group, None
        try:
            y: Tensor = self(x)
            return y
        finally:
            self.group = group


# After so many rounds in which a layer did not come for its output, the guess that the layers share x was wrong.
_MISSES = 2


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
                before, waiting = current.made
                y, made_by = waiting.pop(id(layer), (None, None))
                if not waiting:
                    self._round = None
                if y is not None and before == circumstances(x) and made_by == _makers(layer) and not is_consumed(y):
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
        kind = _kind(layer)
        if kind is None or kind[:3] != (x.shape[-1], x.device, False):
            return None
        others = [other for other in self.layers if other is not layer and _kind(other) == kind]
        if not others or layer not in self.layers:
            return None
        members = [layer, *others]
        forms = []
        for member in members:
            forms.append(member.form())
            if forms[-1].U is not None:  # it would run by itself, in what looks like a group
                return None
        y, *ys = adapter_linear_group(
            x,
            [member.weight_matrix for member in members],
            forms,
            dropout=layer.dropout,
            training=layer.training,
            backend=layer.backend,
            strategy=layer.strategy,
        )
        waiting = {id(member): (other, _makers(member)) for member, other in zip(others, ys, strict=True)}
        self._round = MadeOf(x, (circumstances(x), waiting), self.drop)
        return y


def _kind(layer: AdapterLinear) -> tuple[Any, ...] | None:
    """What layers that run together have in common, and x with the first of it: (in, device, trained base weight).

    None where a forward is not a form alone: nothing is active, merged, or an adapter works on the stream.
    """
    adapters = layer.active_adapters
    if layer.merged or not adapters or layer.on_stream:
        return None
    weight = layer.weight_matrix
    return (
        weight.shape[-1],
        weight.device,
        weight.requires_grad,
        weight.dim(),
        weight.dtype,
        # A sharded or offloaded weight is not what it seems to be until its own layer is called.
        type(weight),
        adapters[0].dropout if len(adapters) == 1 else layer.dropout,
        layer.training,
        layer.backend,
        layer.strategy,
    )


def _makers(layer: AdapterLinear) -> list[Any]:
    base: Any = layer._modules["base_layer"]
    own = base._parameters
    # A weight that is made anew at each access is never the same: its layer runs by itself.
    tensors = own.values() if "weight" in own else (base.weight, base.bias)
    return [layer.training, *makers(layer.active_adapters, *tensors)]
