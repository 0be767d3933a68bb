"""What all layers that serve have in common: a base layer, its place in the model and the requests that run there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..layers.wrapper import BaseLayerWrapper
from .pool import AdapterPool
from .requests import Place, Requests, Running


class ServedLayer(BaseLayerWrapper):
    """A layer in which each row of a batch goes through the adapter that the running request gave it.

    Without a request, or for one of base rows alone, it is its base layer. Compiled code calls it, and does not have it
    inside: what it does is the running request's affair, and the next one's is another. path: of the module; forms:
    what adapters have on it, by slot.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        pool: AdapterPool,
        path: str,
        forms: Mapping[int, object],
        requests: Requests,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.backend = backend
        self.place = Place(path, forms)
        self._pool = pool
        self._requests = requests
        self._uncompiled: Callable[..., Any] = torch.compiler.disable(_served)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        # Sooner than a decorator, which would cost each call of those who compile nothing.
        if torch.compiler.is_compiling():
            return self._uncompiled(self, *args, **kwargs)
        return self.serve(*args, **kwargs)

    def serve(self, *args: Any, **kwargs: Any) -> Any:
        """The forward."""
        raise NotImplementedError

    def adapts(self, now: Running, x: Tensor) -> bool:
        """Whether a row of the request may have an adapter here: where none has, nothing is launched for any.

        What is recorded in a CUDA graph serves later batches with other adapters.
        """
        if _is_captured(x):
            return True
        return not self.place.forms.keys().isdisjoint(now.slots)


class EagerLayer(ServedLayer):
    """A layer that chooses by the adapters of the batch what it launches. As long as none is on it it is its base."""

    def adapts(self, now: Running, x: Tensor) -> bool:
        return bool(self.place.forms) and super().adapts(now, x)

    def check_runs(self, x: Tensor, why_not: str) -> None:
        """Raises ValueError where something is in the way, or a CUDA graph would keep what this batch chooses."""
        if _is_captured(x):
            why_not = "a CUDA graph would keep the adapters of this batch"
        if why_not:
            raise ValueError(f"{self.place.path} cannot run with adapters: {why_not}")


def _served(layer: ServedLayer, *args: Any, **kwargs: Any) -> Any:
    return layer.serve(*args, **kwargs)


def _is_captured(x: Tensor) -> bool:
    """Whether what is done with x is recorded in a CUDA graph."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()
