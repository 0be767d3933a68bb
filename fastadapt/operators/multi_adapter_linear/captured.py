"""Updates that a CUDA graph may capture: nothing of who is in a batch is in their arguments, and no address changes."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..backends import kernels, resolve_backend
from . import eager, pages
from .batch import ONE_TOKEN_ROWS, SortedTokens
from .form_pages import FormPages

# Tokens of a launch up to which tiles have so many places. One token by itself reads its own factors alone; of many,
# those of one adapter share them.
_BLOCKS = {ONE_TOKEN_ROWS: 1, 512: 16}
_LONG = 64


class TokenBuffers:
    """Who the tokens of an engine's steps belong to, where graphs and kernels find it at every step.

    tokens: the most of a step. slots: of adapters. What a launch over M tokens reads depends on M alone: see `of`.
    """

    @torch.inference_mode(False)  # it is written in any mode
    def __init__(self, tokens: int, slots: int, device: torch.device | str = "cpu") -> None:
        self.tokens, self.slots = tokens, slots
        self._sizes = {block: self._tiles(tokens, block) for block in (*_BLOCKS.values(), _LONG)}
        starts = [0, tokens, 2 * tokens]
        for size in self._sizes.values():
            starts.append(starts[-1] + 3 * size)
        self._parts = [slice(first, last) for first, last in pairwise(starts)]
        self._memory = torch.zeros(starts[-1], dtype=torch.int32, device=device)
        self._order, self._adapters, *tiles = (self._memory[part] for part in self._parts)
        self._by_block = {block: part.view(-1, 3) for block, part in zip(self._sizes, tiles, strict=True)}
        self.write(())
        # Until somebody says who is there, graphs are captured for all.
        self.idle = False

    def write(self, slots: Sequence[int]) -> None:
        """Takes in the slot of each token of a step, -1 for the base model; `idle` is whether all are.

        One copy to the device, behind what the current stream has got to do. Raises ValueError for more tokens than
        there is room for, or a slot that there is not; nothing is changed then.
        """
        count = len(slots)
        if count > self.tokens:
            raise ValueError(f"a step may have {self.tokens} tokens, got {count}")
        # In numpy, whose small calls take half the time: a step waits for them.
        ids = np.asarray(slots, dtype=np.int64)
        least, most = (int(ids.min()), int(ids.max())) if count else (-1, -1)
        if least < -1 or most >= self.slots:
            wrong = least if least < -1 else most
            raise ValueError(f"slots must be -1 for the base model to {self.slots - 1}, got {wrong}")
        host = torch.empty(self._memory.shape, dtype=torch.int32, pin_memory=self._memory.is_cuda)
        order, adapters, *tiles = (host.numpy()[part] for part in self._parts)
        order[:count] = np.argsort(ids, kind="stable")
        # A launch may have more tokens than the step: those are nobody's, and in no tile.
        order[count:] = np.arange(count, self.tokens)
        adapters[:count] = ids[order[:count]]
        adapters[count:] = -1
        # Where each run of one adapter begins and ends.
        starts = np.flatnonzero(np.diff(adapters[:count], prepend=-2))
        ends = np.append(starts, count)[1:]
        for part, block in zip(tiles, self._sizes, strict=True):
            needed = -((starts - ends) // block)
            run = np.repeat(np.arange(len(needed)), needed)
            within = np.arange(len(run)) - (needed.cumsum() - needed)[run]
            rows = part.reshape(-1, 3)
            rows[: len(run)] = np.stack([starts[run] + within * block, ends[run], adapters[starts[run]]], 1)
            # No place is in a tile that begins where it ends.
            rows[len(run) :] = 0, 0, -1
        self._memory.copy_(host, non_blocking=True)
        self.idle = most < 0

    def of(self, tokens: int) -> SortedTokens:
        """What a launch over so many tokens, those of the step or more, reads. Raises ValueError for too many."""
        if tokens > self.tokens:
            raise ValueError(f"a step may have {self.tokens} tokens, got {tokens}")
        block = next((block for most, block in _BLOCKS.items() if tokens <= most), _LONG)
        adapters = self._adapters[:tokens]
        tiles = self._by_block[block][: self._tiles(tokens, block)]
        return SortedTokens(self._order[:tokens], adapters, adapters, tiles, block)

    def _tiles(self, tokens: int, block: int) -> int:
        """The most that tokens of all slots and of the base model need."""
        return tokens if block == 1 else -(-tokens // block) + min(self.slots + 1, tokens)


class PagedColumns(NamedTuple):
    """A layer of a packed product: its columns start to stop of y, and its adapters."""

    start: int
    stop: int
    pages: FormPages


class CapturedUpdate:
    """What `functional.multi_adapter_update` does to the layers of one packed product (q, k and v; gate and up), for
    whatever step the buffers say; in place:

        y_t <- g[a] ⊙ y_t + h[a] ⊙ (B[a] (d[a] ⊙ (A[a] x_t))) + β[a] + b0

    On Triton two launches for all layers, of a size that the number of tokens decides alone. In a step without adapters
    b0 is added and nothing launched; a graph that is captured in such a step must serve such steps alone.
    backend: "auto", "triton" or "eager".
    """

    def __init__(self, layers: Sequence[PagedColumns], tokens: TokenBuffers, backend: str = "auto") -> None:
        self._layers, self._tokens, self._backend = list(layers), tokens, backend
        self._tables = [layer.pages.tables for layer in layers]
        self._max_rank = max(layer.pages.max_rank for layer in layers)

    def __call__(self, y: Tensor, x: Tensor, bias: Tensor | None = None) -> None:
        """Shapes: y [M, N] = x W0ᵀ without b0, and x [M, K], of the step's tokens, or of more, which are nobody's;
        bias b0 [N], which all tokens of the step get."""
        if self._tokens.idle:
            if bias is not None:
                y.add_(bias)
            return
        most = self._tokens.tokens
        if x.shape[0] > most:  # no step has those behind
            if bias is not None:
                y[most:].add_(bias)
            y, x = y[:most], x[:most]
        ys = [y[:, start:stop] for start, stop, _ in self._layers]
        biases = [None if bias is None else bias[start:stop] for start, stop, _ in self._layers]
        tokens = self._tokens.of(x.shape[0])
        if resolve_backend(self._backend, x, y) == "triton":
            kernels("multi_adapter").multi_adapter_update(ys, x, biases, self._tables, tokens, self._max_rank)
            return
        for own, b0, table in zip(ys, biases, self._tables, strict=True):
            eager.multi_adapter_update(own, x, b0, pages.runs_of(table, tokens, (own.shape[1], x.shape[1])))
