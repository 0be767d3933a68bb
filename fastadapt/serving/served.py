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
        if torch.compiler.is_compiling() or is_captured(x):
            return True
        return not self.place.forms.keys().isdisjoint(now.slots)


def is_captured(x: Tensor) -> bool:
    """Whether what is done with x is recorded in a CUDA graph."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()
