"""What all layers that serve have in common: a base layer, its place in the model and the requests that run there."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..layers.wrapper import BaseLayerWrapper
from .pool import AdapterPool
from .requests import Place, Requests, Running


class ServedLayer(BaseLayerWrapper):
    """A layer in which each row of a batch goes through the adapter that the running request gave it.

    Without a request, or for one of base rows alone, it is its base layer. path: of the module; forms: what adapters
    have on it, by slot.
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

    def adapts(self, now: Running, x: Tensor) -> bool:
        """Whether a row of the request may have an adapter here: where none has, nothing is launched for any.

        What is recorded, by a compiler or in a CUDA graph, serves later batches with other adapters.
        """
        if torch.compiler.is_compiling() or _is_captured(x):
            return True
        return not self.place.forms.keys().isdisjoint(now.slots)


class EagerLayer(ServedLayer):
    """A layer that chooses by the adapters of the batch what it launches. As long as none is on it it is its base."""

    def adapts(self, now: Running, x: Tensor) -> bool:
        if not torch.compiler.is_compiling() and not self.place.forms:
            return False
        return super().adapts(now, x)

    def check_runs(self, x: Tensor, why_not: str) -> None:
        """Raises ValueError where something is in the way, or a CUDA graph would keep what this batch chooses."""
        if _is_captured(x):
            why_not = "a CUDA graph would keep the adapters of this batch"
        if why_not:
            raise ValueError(f"{self.place.path} cannot run with adapters: {why_not}")


def _is_captured(x: Tensor) -> bool:
    """Whether what is done with x is recorded in a CUDA graph."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()
