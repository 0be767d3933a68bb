"""The criterion that results are held to: what it allows is the rounding of the terms, and no more."""

from __future__ import annotations

import pytest
import torch
from helpers import SumsOfSizes, assert_follows
from torch import Tensor

from fastadapt import AdapterForm
from fastadapt.reference import adapter_linear_reference


def test_terms_are_summed_by_their_sizes_forward_and_backward() -> None:
    x, weight, A, B, bias = (torch.randn(shape).double() for shape in ((7, 5), (6, 5), (2, 5), (6, 2), (6,)))
    g, dy = torch.randn(6).double(), torch.randn(7, 6).double()
    with SumsOfSizes():
        leaf = x.clone().requires_grad_()
        y = adapter_linear_reference(leaf, weight, AdapterForm(A, B, out_scale=-0.5, base_scale=g, bias=bias))
        (y - dy).backward(dy)
    low_rank = 0.5 * (B.abs() @ A.abs())
    whole = g.abs()[:, None] * weight.abs() + low_rank
    torch.testing.assert_close(y.detach(), x.abs() @ whole.T + bias.abs())
    torch.testing.assert_close(leaf.grad, dy.abs() @ whole)


def test_another_order_of_summation_passes_and_a_wrong_term_does_not() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(3, 400, generator=generator), torch.randn(5, 400, generator=generator)

    def formula(to: torch.dtype) -> dict[str, Tensor]:
        return {"y": x.to(to) @ weight.to(to).T}

    one_by_one = sum(x[:, k : k + 1] * weight[:, k] for k in range(400))
    assert isinstance(one_by_one, Tensor)
    assert_follows({"y": one_by_one}, formula, torch.float32)
    with pytest.raises(AssertionError, match="y: error"):
        assert_follows({"y": one_by_one - x[:, :1] * weight[:, 0] * 0.01}, formula, torch.float32)
    with pytest.raises(AssertionError, match="not finite"):
        assert_follows({"y": one_by_one * torch.nan}, formula, torch.float32)
