"""What the choice of a strategy goes by: the sizes of a call, what trains in it and what follows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...reference import AdapterForm
from ..calls import requires_grad


class Workload(NamedTuple):
    """A group of adapted linear layers that read the same x: a layer by itself is a group of one.

    M tokens; K in features; outputs and ranks: N and r of each member; dtype of x and the weights. The adapters' own
    tensors are fp32. shared_A: all members have the same A, and u is computed once (VeRA).
    base_scale: g; trains_base: g trains, so that z is kept. trains_A: dA, and x is kept. trains_up: P = dyᵀu for B
    (trains_B), d or h, and u is kept. dropout is active; with dropout_on_base it also hits what g
    adds to the base path. backward: whether one follows, and what it must give. mid_scale, out_scale (a vector), bias,
    trains_bias: the cost model leaves them aside, d, h and β ride on products that are made anyway; what they cost in a
    strategy is measured.
    """

    M: int
    K: int
    outputs: tuple[int, ...]
    ranks: tuple[int, ...]
    dtype: str = "bfloat16"
    shared_A: bool = False
    base_scale: bool = False
    trains_base: bool = False
    trains_A: bool = True
    trains_B: bool = True
    trains_up: bool = True
    dropout: bool = False
    dropout_on_base: bool = False
    backward: bool = True
    wants_dx: bool = True
    mid_scale: bool = False
    out_scale: bool = False
    bias: bool = False
    trains_bias: bool = False

    @property
    def two_products(self) -> bool:
        """Whether the base path takes both x and x̃."""
        return self.dropout and self.dropout_on_base and self.base_scale


def workload_of(
    x: Tensor, weights: Sequence[Tensor], forms: Sequence[AdapterForm], dtype: torch.dtype, dropout: bool
) -> Workload:
    """What a call does; `dtype` is that of the products. Shapes: x [..., K]; weights [N_i, K]."""
    grad = torch.is_grad_enabled()
    trains_A = grad and any([form.A.requires_grad for form in forms])
    trains_base = grad and any([requires_grad(form.base_scale) for form in forms])
    trains_B = grad and any([form.B.requires_grad for form in forms])
    trains_up = trains_B or (
        grad and any([requires_grad(form.mid_scale) or requires_grad(form.out_scale) for form in forms])
    )
    trains_bias = grad and any([requires_grad(form.bias) for form in forms])
    wants_dx = grad and x.requires_grad
    return Workload(
        M=x.numel() // max(1, x.shape[-1]),
        K=x.shape[-1],
        outputs=tuple([weight.shape[0] for weight in weights]),
        ranks=tuple([form.A.shape[0] for form in forms]),
        dtype=str(dtype).removeprefix("torch."),
        shared_A=len(forms) > 1 and shares_A(forms),
        base_scale=any([form.base_scale is not None for form in forms]),
        trains_base=trains_base,
        trains_A=trains_A,
        trains_B=trains_B,
        trains_up=trains_up,
        dropout=dropout,
        dropout_on_base=dropout and any([form.dropout_on_base for form in forms]),
        backward=wants_dx or trains_A or trains_base or trains_up or trains_bias,
        wants_dx=wants_dx,
        mid_scale=any([form.mid_scale is not None for form in forms]),
        out_scale=any([isinstance(form.out_scale, Tensor) for form in forms]),
        bias=any([form.bias is not None for form in forms]),
        trains_bias=trains_bias,
    )


def shares_A(forms: Sequence[AdapterForm]) -> bool:  # noqa: N802 (A is the factor's name)
    """Whether the members of a group have the same A."""
    first = forms[0].A
    return all([_same_tensor(form.A, first) for form in forms[1:]])


def _same_tensor(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are the same memory seen alike."""
    return a is b or (
        not torch.compiler.is_compiling()
        and a.data_ptr() == b.data_ptr()
        and (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)
    )
