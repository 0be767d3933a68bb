"""`fastadapt::multi_adapter_linear`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..backends import kernels
from ..registry import operator, sees_operators
from . import eager, plan
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
        eager.multi_adapter_linear(x, weight, bias, plan.runs_of(table, tokens, (weight.shape[0], weight.shape[1])))
        for weight, bias, table in zip(weights, biases, tables, strict=True)
    ]


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
        return [
            eager.multi_adapter_linear(x, weight, bias, plan.plan(batch, layer.forms, x.dtype))
            for weight, bias, layer in zip(weights, biases, layers, strict=True)
        ]
    tables = [layer.tables for layer in layers]
    max_rank = max(layer.max_rank for layer in layers)
    return multi_adapter_linear(x, weights, biases, tables, batch.sorted(x.device), max_rank, backend)
