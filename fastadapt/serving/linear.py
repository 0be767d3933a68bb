"""The layer that serves: a base layer and, for the batch that is running, each row's adapter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..layers.linear import plain_forward
from ..layers.ways import is_plain
from ..operators.backends import resolve_backend
from ..operators.calls import autocast_dtype
from ..operators.multi_adapter_linear import eager, plan
from ..operators.multi_adapter_linear.batch import AdapterBatch, LayerForms
from ..operators.multi_adapter_linear.function import multi_adapter_linear, multi_adapter_linear_group
from .called import updated
from .pool import AdapterPool
from .requests import Requests, Running
from .served import ServedLayer
from .trace import Trace

# After so many rounds in which a layer did not come for its output, the guess that the layers share x was wrong.
_MISSES = 2


class Readers:
    """Served layers that are expected to read the same x, whose kernels run as one when the first of them is called.

    The others find their outputs when they are called with the very same tensor, unwritten since. Otherwise a layer
    runs by itself, and after two rounds with outputs that nobody fetched so does every layer from then on.
    """

    def __init__(self, layers: Sequence[MultiAdapterLinear]) -> None:
        self.layers = list(layers)
        self._misses = 0

    def output(self, layer: MultiAdapterLinear, x: Tensor, batch: AdapterBatch, now: Running) -> Tensor | None:
        """y of `layer` for x, or None where it has to run by itself."""
        known = None if self._misses >= _MISSES else now.memory(x)
        if known is None:
            return None
        y = known.pop(layer, None)
        if y is None:
            before = now.led.get(self, {})
            self._misses += any([other in before for other in self.layers])
            members = [other for other in self.layers if other is layer or other.joins(layer, x, now)]
            weights, biases = zip(*[member.operands() for member in members], strict=True)
            forms = [member.forms() for member in members]
            ys = multi_adapter_linear_group(x, weights, biases, batch, forms, backend=layer.backend)
            known.update(zip(members, ys, strict=True))
            now.led[self] = known
            y = known.pop(layer)
        return y


def runs_directly(model: nn.Module, backend: str) -> bool:
    """Whether the layers of a model run the eager implementation on plain tensors of their weights' dtype."""
    first = next(model.parameters())
    eager = resolve_backend(backend, first) == "eager"
    return eager and not torch.compiler.is_compiling() and autocast_dtype(first) is None


class MultiAdapterLinear(ServedLayer):
    """A linear layer in which each row of a batch goes through the adapter that the running request gave it.

    Without a request, or for one of base rows alone, it is its base layer.
    Shapes: x [rows, ..., in]; y [rows, ..., out].
    """

    def __init__(
        self, base_layer: nn.Module, pool: AdapterPool, path: str, requests: Requests, backend: str = "auto"
    ) -> None:
        super().__init__(base_layer, pool, path, pool.forms(path), requests, backend)
        self._plain = plain_forward(base_layer)
        self._forms = pool.forms(path)
        self.readers: Readers | None = None

    def serve(self, x: Tensor) -> Any:
        now = self._requests.own.now or self._requests.lent()
        if now is None or now.base_only:
            if isinstance(now, Trace):
                now.see(self.place, x)
                return self.base_layer.forward(x)  # past the hooks of people who look on
            return self.base_layer(x)
        base: Any = self._modules["base_layer"]
        if not self.adapts(now, x):
            return base(x)
        if not is_plain(base, self._plain):
            return updated(base, x, now.batch(x, self.place), self._forms)
        weight, bias = self.operands()
        batch = now.batch(x, self.place)
        if now.direct and type(x) is Tensor and x.dtype == weight.dtype and not x.requires_grad:
            steps = plan.plan(batch, self._forms, x.dtype)
            y = eager.multi_adapter_linear(x.reshape(-1, x.shape[-1]), weight, bias, steps, now.memory(x))
            return y.view(*x.shape[:-1], y.shape[-1])
        if self.readers is not None and resolve_backend(self.backend, x, weight) == "triton":
            found = self.readers.output(self, x, batch, now)
            if found is not None:
                return found
        return multi_adapter_linear(x, weight, bias, batch, self.forms(), backend=self.backend)

    def operands(self) -> tuple[Tensor, Tensor | None]:
        """The base layer's weight [out, in] and bias."""
        base: Any = self._modules["base_layer"]
        weight, bias = base._parameters["weight"], base._parameters["bias"]
        return (weight if isinstance(base, nn.Linear) else weight.T), bias

    def forms(self) -> LayerForms:
        return self._pool.layer(self.place.path)

    def joins(self, leader: MultiAdapterLinear, x: Tensor, now: Running) -> bool:
        """Whether it can run with another layer that is called with x: as a plain layer with adapters, on the same
        rows."""
        plain = is_plain(self.base_layer, self._plain) and self.adapts(now, x)
        if not plain or self.place.key != leader.place.key:
            return False
        weight, other = self.operands()[0], leader.operands()[0]
        return (weight.shape[1], weight.dtype, weight.device) == (other.shape[1], other.dtype, other.device)
