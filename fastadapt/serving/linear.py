"""The layer that serves: a base layer and, for the batch that is running, each row's adapter."""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from ..layers.linear import plain_forward
from ..layers.ways import is_plain
from ..layers.wrapper import BaseLayerWrapper
from ..operators.backends import resolve_backend
from ..operators.calls import autocast_dtype
from ..operators.multi_adapter_linear import eager, plan
from ..operators.multi_adapter_linear.batch import AdapterBatch
from ..operators.multi_adapter_linear.function import multi_adapter_linear
from .called import updated
from .pool import AdapterPool, Holding


class Running:
    """The adapters of the rows of the batch that is running, and what each layer does for every shape that it sees.

    While it runs its adapters are held, so that nothing of this can change. `direct`: whether layers may call the eager
    implementation themselves, which saves a third of its time in decoding.
    """

    def __init__(self, holding: Holding, *, direct: bool = False) -> None:
        self.holding = holding
        self.rows = len(holding.slots)
        self.base_only = all(slot < 0 for slot in holding.slots)
        self.direct = direct
        self._batches: dict[tuple[int, int], AdapterBatch] = {}
        self._memory: dict[Any, Tensor] = {}
        self._seen: tuple[Tensor, int] | None = None

    def batch(self, x: Tensor) -> AdapterBatch:
        """The batch for x [rows, ..., K]; beams and returned sequences stand side by side, as transformers has them.

        Raises ValueError where the rows of x are no multiple of the rows of the request.
        """
        rows = x.shape[0]
        tokens = x.numel() // max(1, rows * x.shape[-1])
        found = self._batches.get((rows, tokens))
        if found is None:
            if rows % self.rows:
                raise ValueError(
                    f"a layer was called with {rows} rows but adapter_ids has {self.rows}: models that regroup tokens "
                    "(mixtures of experts) can be served only one adapter at a time"
                )
            found = self._batches[rows, tokens] = self.holding.batch(tokens, rows // self.rows)
        return found

    def memory(self, x: Tensor) -> dict[Any, Tensor] | None:
        """What layers that are called with the same x one after another (q, k and v; gate and up) know of it."""
        if x.is_inference():  # nothing would tell that it was written
            return None
        if self._seen is None or self._seen[0] is not x or self._seen[1] != x._version:
            self._seen, self._memory = (x, x._version), {}
        return self._memory


def runs_directly(model: nn.Module, backend: str) -> bool:
    """Whether the layers of a model run the eager implementation on plain tensors of their weights' dtype."""
    first = next(model.parameters())
    eager = resolve_backend(backend, first) == "eager"
    return eager and not torch.compiler.is_compiling() and autocast_dtype(first) is None


running: ContextVar[Running | None] = ContextVar("running", default=None)


class MultiAdapterLinear(BaseLayerWrapper):
    """A linear layer in which each row of a batch goes through the adapter that the running request gave it.

    Without a request, or for one of base rows alone, it is its base layer.
    Shapes: x [rows, ..., in]; y [rows, ..., out].
    """

    def __init__(self, base_layer: nn.Module, pool: AdapterPool, path: str, backend: str = "auto") -> None:
        super().__init__()
        self.base_layer = base_layer
        self._plain = plain_forward(base_layer)
        self.backend = backend
        self.path = path
        self._pool = pool
        self._forms = pool.forms(path)

    def forward(self, x: Tensor) -> Any:
        now = running.get()
        if now is None or now.base_only:
            return self.base_layer(x)
        base: Any = self._modules["base_layer"]
        if not is_plain(base, self._plain):
            return updated(base, x, now.batch(x), self._forms) if self._forms else base(x)
        weight, bias = base._parameters["weight"], base._parameters["bias"]
        if not isinstance(base, nn.Linear):
            weight = weight.T
        batch = now.batch(x)
        if now.direct and type(x) is Tensor and x.dtype == weight.dtype and not x.requires_grad:
            steps = plan.plan(batch, self._forms, x.dtype)
            y = eager.multi_adapter_linear(x.reshape(-1, x.shape[-1]), weight, bias, steps, now.memory(x))
            return y.view(*x.shape[:-1], y.shape[-1])
        return multi_adapter_linear(x, weight, bias, batch, self._pool.layer(self.path), backend=self.backend)
