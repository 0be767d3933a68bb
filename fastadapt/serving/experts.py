"""Experts that serve: their base layer and, for the batch that is running, each token's adapter."""

from __future__ import annotations

import inspect
from collections import ChainMap
from typing import Any

from torch import nn

from ..layers.experts import gate_of, projections, stacked_bias, stacked_weight, why_not_run
from ..operators.multi_adapter_linear.experts import ExpertForms, multi_adapter_expert_block
from .pool import AdapterPool
from .requests import Requests
from .served import EagerLayer
from .trace import Trace


class MultiAdapterExperts(EagerLayer):
    """Experts with stacked weights in which each token goes through the adapter that the running request gave its row.

    Both products, the gate and the routing are one operator, eager on every device.
    Shapes: x and y [tokens, K]; experts and routing [tokens, top]. Raises ValueError for experts that have got hooks
    since the adapters were loaded, or are shared out among processes, and where a CUDA graph is captured.
    """

    def __init__(
        self, base_layer: nn.Module, pool: AdapterPool, path: str, requests: Requests, backend: str = "auto"
    ) -> None:
        names = projections(base_layer)
        sides = [pool.parts(f"{path}.{name}") for name in names]
        super().__init__(base_layer, pool, path, ChainMap(*sides), requests, backend)  # type: ignore[arg-type]
        self._sides = list(zip(names, sides, strict=True))
        self._signature = inspect.signature(type(base_layer).forward)

    def serve(self, *args: Any, **kwargs: Any) -> Any:
        now = self._requests.own.now or self._requests.lent()
        base: Any = self._modules["base_layer"]
        x, experts, routing = self._signature.bind(base, *args, **kwargs).args[1:]
        if isinstance(now, Trace):
            now.see(self.place, x)
            return base.forward(*args, **kwargs)  # past the hooks of people who look on
        if now is None or now.base_only or not self.adapts(now, x):
            return base(*args, **kwargs)
        self.check_runs(x, why_not_run(base))
        up, down = (
            ExpertForms(stacked_weight(base, name), stacked_bias(base, name), forms) for name, forms in self._sides
        )
        batch = now.batch(x, self.place)
        return multi_adapter_expert_block(x, experts, routing, up, gate_of(base), down, batch, backend=self.backend)
