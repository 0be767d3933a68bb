"""DoRA's norms from two products of a weight that is not at hand."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_follows
from torch import Tensor

from fastadapt.functional import row_squares, weight_norm_squared
from fastadapt.reference import weight_norm_reference

N, K, R, S = 13, 24, 4, 0.75


def operands(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(N, K, dtype=dtype), torch.randn(R, K), torch.randn(N, R)


def squared(weight: Tensor, A: Tensor, B: Tensor) -> Tensor:
    return weight_norm_squared(row_squares(weight), weight.float() @ A.T, A, B, S)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_two_products_give_the_norms_of_the_weight(dtype: torch.dtype) -> None:
    weight, A, B = operands(dtype)
    formula = lambda to: {"n": weight_norm_reference(weight.to(to), A.to(to), B.to(to), S).square()}  # noqa: E731
    assert_follows({"n": squared(weight, A, B)}, formula, torch.float32)


def test_fp64_stays_fp64() -> None:
    weight, A, B = (tensor.double() for tensor in operands())
    actual = weight_norm_squared(row_squares(weight), weight @ A.T, A, B, S)
    torch.testing.assert_close(actual.sqrt(), weight_norm_reference(weight, A, B, S), rtol=1e-12, atol=0)


def test_parts_of_the_columns_add_up_before_the_root() -> None:
    weight, A, B = operands()
    cuts = [slice(0, 5), slice(5, 16), slice(16, K)]
    parts = [squared(weight[:, cut], A[:, cut], B) for cut in cuts]
    torch.testing.assert_close(sum(parts), squared(weight, A, B))  # type: ignore[arg-type]


def test_parts_of_the_rows_stand_by_themselves() -> None:
    weight, A, B = operands()
    cuts = [slice(0, 6), slice(6, N)]
    torch.testing.assert_close(torch.cat([squared(weight[cut], A, B[cut]) for cut in cuts]), squared(weight, A, B))


def test_products_may_be_made_by_the_layer_itself() -> None:
    weight, A, B = operands()
    asked: list[Tensor] = []

    def products(x: Tensor) -> Tensor:
        asked.append(x)
        return weight @ x.T

    actual = weight_norm_squared(lambda: row_squares(weight), products, A, B, S)
    torch.testing.assert_close(actual, squared(weight, A, B))
    assert len(asked) == 1
    assert asked[0] is A


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base_squared": torch.ones(N + 1)}, rf"base_squared must have shape \[{N}\], got \({N + 1},\)"),
        ({"base_products": torch.ones(R, N)}, rf"base_products must have shape \[{N}, {R}\], got \({R}, {N}\)"),
        ({"lora_B": torch.ones(N, R + 1)}, rf"lora_B must have shape \[out, {R}\]"),
        ({"lora_A": torch.ones(R)}, r"lora_A must have shape \[r, in\]"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, Tensor], message: str) -> None:
    weight, A, B = operands()
    given = {"base_squared": row_squares(weight), "base_products": weight @ A.T, "lora_A": A, "lora_B": B} | change
    with pytest.raises(ValueError, match=message):
        weight_norm_squared(**given, scaling=S)


def test_a_dtype_that_is_no_number_is_named() -> None:
    weight, A, B = operands()
    with pytest.raises(TypeError, match="base_products must be float16"):
        weight_norm_squared(row_squares(weight), (weight @ A.T).int(), A, B, S)


def test_gradients_stop_here() -> None:
    weight, A, B = operands()
    A.requires_grad_()
    assert not squared(weight, A, B).requires_grad
