"""`multi_adapter_update` of one packed product, with all found beforehand that a batch and its adapters decide.

An engine calls a layer hundreds of times a second for one and the same batch. Looking at the arguments and for the
steps then takes as long as the products of a few rows do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .batch import AdapterBatch
from .eager import Step, apply_all
from .groups import outline, stacked_steps
from .stacks import FormStacks


class Columns(NamedTuple):
    """A layer of a packed product: its columns start to stop of y, and its adapters."""

    start: int
    stop: int
    stacks: FormStacks


class PackedUpdate:
    """What `functional.multi_adapter_update` does to the layers of one packed product (q, k and v; gate and up), for
    one batch; in place:

        y_t <- g[a] ⊙ y_t + h[a] ⊙ (B[k] (d[a] ⊙ (A[k] x_t))) + β[a]

    It holds as long as the adapters of the batch stay in these layers as they are. Eager, for inference, on tensors of
    `dtype` outside of autocast. `scales`: whether a g of the batch scales the product, which must come without the
    layer's bias b0 then. `idle`: whether nobody in the batch has an adapter here, and nothing is to be done.

    >>> layer, forms = torch.nn.Linear(16, 12, bias=False), FormStacks((8, 16), torch.float32)
    >>> forms.write(0, AdapterForm(torch.randn(4, 16), torch.randn(8, 4)))
    >>> x, batch = torch.randn(3, 16), AdapterBatch([0, -1, 0])
    >>> y, expected = layer(x).detach(), layer(x).detach()
    >>> PackedUpdate(batch, [Columns(0, 8, forms)], torch.float32)(y, x)
    >>> multi_adapter_update([expected[:, :8]], x, [None], batch, [forms.layer])
    >>> torch.equal(y, expected)
    True
    """

    def __init__(self, batch: AdapterBatch, layers: Sequence[Columns], dtype: torch.dtype) -> None:
        self.tokens = len(batch)
        self._parts: list[tuple[int, int, Sequence[Step]]] = []
        self.scales = False
        for start, stop, stacks in layers:
            if steps := stacked_steps(batch, stacks.forms, dtype):
                self._parts.append((start, stop, steps))
                self.scales |= outline(batch, stacks.forms, dtype).scales

    @property
    def idle(self) -> bool:
        return not self._parts

    def __call__(self, y: Tensor, x: Tensor, bias: Tensor | None = None) -> None:
        """Shapes: y [M, N] and x [M, K] of the batch's tokens, or of more, which are nobody's; bias b0 [N], which all
        rows get at the end. Raises ValueError for fewer tokens."""
        tokens = self.tokens
        rows = y
        if x.shape[0] != tokens:
            if x.shape[0] < tokens:
                raise ValueError(f"x has {x.shape[0]} tokens {tuple(x.shape)} but the batch has {tokens}")
            rows, x = y[:tokens], x[:tokens]
        memory: dict[Any, Tensor] = {}
        for start, stop, steps in self._parts:
            apply_all(rows if stop - start == y.shape[1] else rows[:, start:stop], x, None, steps, memory)
        if bias is not None:
            y.add_(bias)
