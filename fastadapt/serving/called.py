"""What serves rows of many adapters on a base layer that can only be called: hooks, a forward of its own, no weight."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..layers.ways import bias_of
from ..operators.calls import compute_dtype, without_autocast
from ..operators.multi_adapter_linear import eager, plan
from ..operators.multi_adapter_linear.batch import AdapterBatch, SlotForm


def updated(base: nn.Module, x: Tensor, batch: AdapterBatch, forms: Mapping[int, SlotForm]) -> Any:
    """The layer's own result, in which the rows of an adapter that it has in `forms` have that form on it.

    Shapes: x [rows, ..., in]; y [rows, ..., out], which is what the layer gave where no row has such an adapter.
    """
    y = base(x)
    if not any(run.slot in forms for run in batch.runs):
        return y
    if not isinstance(y, Tensor):
        raise ValueError(f"a {type(base).__name__} gives a {type(y).__name__}: no adapter can be served on it")
    bias, dtype = bias_of(base), compute_dtype(x)
    with torch.no_grad(), without_autocast(x):
        rows, out = x.reshape(-1, x.shape[-1]).to(y.device, dtype), y.reshape(-1, y.shape[-1]).clone()
        eager.apply_all(out, rows, None if bias is None else (None, bias), plan.plan(batch, forms, dtype))
    return out.view(y.shape)
