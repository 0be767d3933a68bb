"""`fastadapt::multi_adapter_linear`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..backends import kernels
from ..registry import operator, sees_operators
from . import eager, pages, plan
from .batch import AdapterBatch, FormTables, LayerForms, SortedTokens


def _outline(x: Tensor, weights: Sequence[Tensor], *_: Any) -> list[Any]:
    return [(x.shape[0], weight.shape[0], x.dtype) for weight in weights]


@operator(_outline)
def multi_adapter_linear(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    tables: Sequence[FormTables],
    tokens: SortedTokens,
    max_rank: int,
    backend: str,
) -> list[Tensor]:
    """y [M, N] of x [M, K] in each layer, each token through the form of its adapter, or the base layer."""
    if backend == "triton":
        ys: list[Tensor] = kernels("multi_adapter").multi_adapter_linear(x, weights, biases, tables, tokens, max_rank)
        return ys
    return [
        eager.multi_adapter_linear(x, weight, bias, pages.runs_of(table, tokens, (weight.shape[0], weight.shape[1])))
        for weight, bias, table in zip(weights, biases, tables, strict=True)
    ]


@operator(lambda ys, *_: [(*y.shape, y.dtype) for y in ys])
def multi_adapter_update(
    ys: Sequence[Tensor],
    x: Tensor,
    biases: Sequence[Tensor | None],
    tables: Sequence[FormTables],
    tokens: SortedTokens,
    max_rank: int,
    backend: str,
) -> list[Tensor]:
    """y [M, N] of each layer, which it has made of x without its bias, each token through the form of its adapter."""
    ys = [y.clone(memory_format=torch.contiguous_format) for y in ys]
    if backend == "triton":
        kernels("multi_adapter").multi_adapter_update(ys, x, biases, tables, tokens, max_rank)
    else:
        for y, bias, table in zip(ys, biases, tables, strict=True):
            eager.multi_adapter_update(y, x, bias, pages.runs_of(table, tokens, (y.shape[1], x.shape[1])))
    return ys


def run(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    batch: AdapterBatch,
    layers: Sequence[LayerForms],
    backend: str,
) -> list[Tensor]:
    """The operator on what a batch and layers say; eagerly, where nobody watches, from their views at once."""
    if backend == "eager" and not sees_operators(x):
        memory: dict[Any, Tensor] = {}
        return [
            eager.multi_adapter_linear(x, weight, bias, plan.plan(batch, layer.forms, x.dtype), memory)
            for weight, bias, layer in zip(weights, biases, layers, strict=True)
        ]
    tables, max_rank = _tables(layers)
    return multi_adapter_linear(x, weights, biases, tables, batch.sorted(x.device), max_rank, backend)


def update(
    ys: Sequence[Tensor],
    x: Tensor,
    biases: Sequence[Tensor | None],
    batch: AdapterBatch,
    layers: Sequence[LayerForms],
    backend: str,
) -> None:
    """multi_adapter_update in place: at once where nobody watches, else by copies of what the operator gives."""
    watched = sees_operators(x)
    if backend == "eager" and not watched:
        memory: dict[Any, Tensor] = {}
        for y, bias, layer in zip(ys, biases, layers, strict=True):
            eager.multi_adapter_update(y, x, bias, plan.plan(batch, layer.forms, x.dtype), memory)
        return
    tables, max_rank = _tables(layers)
    tokens = batch.sorted(x.device)
    if watched:
        for y, new in zip(ys, multi_adapter_update(ys, x, biases, tables, tokens, max_rank, backend), strict=True):
            y.copy_(new)
    else:
        kernels("multi_adapter").multi_adapter_update(ys, x, biases, tables, tokens, max_rank)


def _tables(layers: Sequence[LayerForms]) -> tuple[list[FormTables], int]:
    """What kernels and compiled code read of layers. Raises ValueError for those of FormStacks, which have none."""
    tables = [layer.tables for layer in layers if layer.tables is not None]
    if len(tables) < len(layers):
        raise ValueError(
            "layers must be an AdapterPool's for Triton and for compiled code, which read pages; those of FormStacks "
            'are for backend "eager" outside of torch.compile'
        )
    return tables, max(layer.max_rank for layer in layers)
