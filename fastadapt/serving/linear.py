"""The layer that serves: a base layer and, for the batch that is running, each row's adapter."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..layers.linear import plain_forward
from ..layers.ways import is_plain
from ..layers.wrapper import BaseLayerWrapper
from ..operators.backends import resolve_backend
from ..operators.calls import autocast_dtype
from ..operators.multi_adapter_linear import eager, plan
from ..operators.multi_adapter_linear.function import multi_adapter_linear
from .called import updated
from .pool import AdapterPool
from .requests import Place, Requests
from .trace import Trace


def runs_directly(model: nn.Module, backend: str) -> bool:
    """Whether the layers of a model run the eager implementation on plain tensors of their weights' dtype."""
    first = next(model.parameters())
    eager = resolve_backend(backend, first) == "eager"
    return eager and not torch.compiler.is_compiling() and autocast_dtype(first) is None


class MultiAdapterLinear(BaseLayerWrapper):
    """A linear layer in which each row of a batch goes through the adapter that the running request gave it.

    Without a request, or for one of base rows alone, it is its base layer.
    Shapes: x [rows, ..., in]; y [rows, ..., out].
    """

    def __init__(
        self, base_layer: nn.Module, pool: AdapterPool, path: str, requests: Requests, backend: str = "auto"
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self._plain = plain_forward(base_layer)
        self.backend = backend
        self.place = Place(path, pool.forms(path))
        self._pool = pool
        self._requests = requests

    def forward(self, x: Tensor) -> Any:
        now = self._requests.own.now or self._requests.lent()
        if now is None or now.base_only:
            if isinstance(now, Trace):
                now.see(self.place, x)
                return self.base_layer.forward(x)  # past the hooks of people who look on
            return self.base_layer(x)
        base: Any = self._modules["base_layer"]
        if not is_plain(base, self._plain):
            return updated(base, x, now.batch(x, self.place), self.place.forms) if self.place.forms else base(x)
        weight, bias = base._parameters["weight"], base._parameters["bias"]
        if not isinstance(base, nn.Linear):
            weight = weight.T
        batch = now.batch(x, self.place)
        if now.direct and type(x) is Tensor and x.dtype == weight.dtype and not x.requires_grad:
            steps = plan.plan(batch, self.place.forms, x.dtype)
            y = eager.multi_adapter_linear(x.reshape(-1, x.shape[-1]), weight, bias, steps, now.memory(x))
            return y.view(*x.shape[:-1], y.shape[-1])
        return multi_adapter_linear(x, weight, bias, batch, self._pool.layer(self.place.path), backend=self.backend)
