"""`fastadapt::multi_adapter_linear`."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..backends import kernels
from ..registry import operator, sees_operators
from . import eager, plan
from .batch import AdapterBatch, FormTables, LayerForms, SortedTokens


def _outline(x: Tensor, weight: Tensor, *_: Any) -> Any:
    return x.shape[0], weight.shape[0], x.dtype


@operator(_outline)
def multi_adapter_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    tables: FormTables,
    tokens: SortedTokens,
    max_rank: int,
    backend: str,
) -> Tensor:
    """y [M, N] of x [M, K], each token through the form of its adapter, or the base layer."""
    if backend == "triton":
        y: Tensor = kernels("multi_adapter").multi_adapter_linear(x, weight, bias, tables, tokens, max_rank)
        return y
    runs = plan.runs_of(tables, tokens, (weight.shape[0], weight.shape[1]))
    return eager.multi_adapter_linear(x, weight, bias, runs)


def run(x: Tensor, weight: Tensor, bias: Tensor | None, batch: AdapterBatch, layer: LayerForms, backend: str) -> Tensor:
    """The operator on what a batch and a layer say; eagerly, where nobody watches, from their views at once."""
    if backend == "eager" and not sees_operators(x):
        return eager.multi_adapter_linear(x, weight, bias, plan.plan(batch, layer.forms, x.dtype))
    return multi_adapter_linear(x, weight, bias, layer.tables, batch.sorted(x.device), layer.max_rank, backend)
