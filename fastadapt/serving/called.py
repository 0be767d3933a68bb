"""What serves rows of many adapters on a base layer that can only be called: hooks, a forward of its own, no weight."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..layers.ways import bias_of
from ..operators.adapter_update.function import adapter_update
from ..operators.multi_adapter_linear.batch import AdapterBatch, SlotForm
from ..reference import AdapterForm


def updated(base: nn.Module, x: Tensor, batch: AdapterBatch, forms: Mapping[int, SlotForm]) -> Any:
    """The layer's own result, in which the rows of an adapter that it has in `forms` have that form on it.

    Shapes: x [rows, ..., in]; y [rows, ..., out], which is what the layer gave where no row has such an adapter.
    """
    y = base(x)
    runs = [run for run in batch.runs if run.slot in forms]
    if not runs:
        return y
    if not isinstance(y, Tensor):
        raise ValueError(f"a {type(base).__name__} gives a {type(y).__name__}: no adapter can be served on it")
    bias = bias_of(base)
    rows, out = x.reshape(-1, x.shape[-1]).to(y.device), y.reshape(-1, y.shape[-1]).clone()
    for start, stop, slot in runs:
        form = _adapter_form(forms[slot], bias)
        out[start:stop] = adapter_update(out[start:stop], rows[start:stop], form, base_bias=bias)
    return out.view(y.shape)


def _adapter_form(form: SlotForm, base_bias: Tensor | None) -> AdapterForm:
    """The form as an AdapterForm; β is the base layer's bias and what the adapter adds to it."""
    beta = base_bias
    if form.added_bias is not None:
        beta = form.added_bias if base_bias is None else base_bias + form.added_bias
    return AdapterForm(
        torch.cat(form.A),
        torch.cat(form.B).T,
        form.mid_scale,
        1.0 if form.out_scale is None else form.out_scale,
        form.base_scale,
        beta,
        scaling=form.scaling,
    )
