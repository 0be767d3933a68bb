"""Every launcher against its formula in fp64, in each dtype: on a GPU, or through Triton's interpreter without one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import triton
import triton.language as tl
from fastadapt_kernels import adapter_grads, adapter_linear, shrink, tiles, weight_norm
from helpers import assert_close, guarded, guarded_outputs, margins_intact
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
P = 0.3


def seed_tensor(value: int = 2**40 + 7) -> Tensor:
    return torch.tensor([value], dtype=torch.int64, device=DEVICE)


class Layer(NamedTuple):
    """A linear layer, its adapter, an input and a gradient, with values that break careless algebra."""

    x: Tensor  # [M, K]
    dy: Tensor  # [M, N]
    weight: Tensor  # [N, K]
    A: Tensor  # [R, K]
    B: Tensor  # [N, R]
    mid_scale: Tensor  # [R]
    out_scale: Tensor  # [N]
    base_scale: Tensor  # [N]
    bias: Tensor  # [N]


def make_layer(
    M: int, K: int, N: int, R: int, dtype: torch.dtype, parameter_dtype: torch.dtype = torch.float32
) -> Layer:
    generator = torch.Generator().manual_seed(M + 1000 * K + N + R)

    def normal(*shape: int, std: float = 1.0, dtype: torch.dtype = parameter_dtype) -> Tensor:
        return (torch.randn(*shape, generator=generator) * std).to(DEVICE, dtype)

    base_scale = 1 + normal(N, std=2e-3, dtype=torch.float32)
    base_scale[0], base_scale[N // 2], base_scale[-1] = 0.0, 1e-3, -1.0
    out_scale = normal(N)
    out_scale[N // 3] = 0.0
    return Layer(
        x=normal(M, K, dtype=dtype),
        dy=normal(M, N, dtype=dtype),
        weight=normal(N, K, std=K**-0.5, dtype=dtype),
        A=normal(R, K, std=K**-0.5),
        B=normal(N, R),
        mid_scale=normal(R),
        out_scale=out_scale,
        base_scale=base_scale,
        bias=normal(N, std=20.0),
    )


def in_dtype(dtype: torch.dtype, formula: Callable[..., Any], *operands: Tensor | None) -> Any:
    """A formula run in one dtype: fp64 for what is exact, the activation's for what may be expected."""
    return formula(*(None if operand is None else operand.to(dtype) for operand in operands))


def check(actual: Tensor, formula: Callable[..., Tensor], *operands: Tensor | None, dtype: torch.dtype) -> None:
    """Hold a result to the error that its formula makes in ``dtype``, which need not be the dtype of the operands."""
    assert_close(actual, in_dtype(torch.float64, formula, *operands), in_dtype(dtype, formula, *operands))


# The formulas, with every scale and the mask as an argument (mask: 1 / keep probability where kept, 0 elsewhere).


def shrink_formula(x: Tensor, A: Tensor, mask: Tensor | None) -> Tensor:
    return (x if mask is None else x * mask) @ A.T


def shrink_grad_formula(dy: Tensor, B: Tensor, h: Tensor | None) -> Tensor:
    return (dy if h is None else h * dy) @ B


def linear_formula(
    x: Tensor,
    weight: Tensor,
    u: Tensor,
    B: Tensor,
    d: Tensor | None,
    h: Tensor | None,
    g: Tensor | None,
    bias: Tensor | None,
    mask_on_base: Tensor | None,
) -> Tensor:
    y = x @ weight.T
    if g is not None:
        y = g * y if mask_on_base is None else y + (g - 1) * ((x * mask_on_base) @ weight.T)
    low_rank = (u if d is None else d * u) @ B.T
    y = y + (low_rank if h is None else h * low_rank)
    return y if bias is None else y + bias


def dx_formula(
    dy: Tensor,
    weight: Tensor,
    q: Tensor,
    A: Tensor,
    d: Tensor | None,
    g: Tensor | None,
    mask: Tensor | None,
    mask_on_base: Tensor | None,
) -> Tensor:
    low_rank = (q if d is None else d * q) @ A
    if mask_on_base is not None and g is not None:
        return dy @ weight + mask_on_base * (((g - 1) * dy) @ weight + low_rank)
    base = (dy if g is None else g * dy) @ weight
    return base + (low_rank if mask is None else mask * low_rank)


def input_grads_formula(x: Tensor, q: Tensor, d: Tensor | None, mask: Tensor | None) -> Tensor:
    return (q if d is None else d * q).T @ (x if mask is None else x * mask)


def scaled_mask(seed: Tensor, rows: int, cols: int) -> Tensor:
    return tiles.dropout_mask(seed, rows, cols, P).double() / tiles.keep_probability(P)


def check_all(layer: Layer, *, scaled: bool, dropout: bool, on_base: bool) -> None:
    """Every launcher that sees tokens, on one layer: with or without scales, dropout, and dropout on the base path."""
    x, dy, weight, A, B = layer.x, layer.dy, layer.weight, layer.A, layer.B
    d, h, g, bias = (layer.mid_scale, layer.out_scale, layer.base_scale, layer.bias) if scaled else (None,) * 4
    dtype = x.dtype
    drop: dict[str, Any] = {"seed": seed_tensor(), "p": P} if dropout else {}
    mask = scaled_mask(seed_tensor(), *x.shape) if dropout else None
    mask_on_base = mask if on_base else None

    u = shrink.shrink(x, A, **drop)
    check(u, shrink_formula, x, A, mask, dtype=dtype)
    both: dict[str, Any] = {"mid_scale": d, "base_scale": g, "dropout_on_base": on_base, **drop}
    result = adapter_linear.adapter_linear(x, weight, u, B, out_scale=h, bias=bias, keep_base=True, **both)
    assert isinstance(result, tuple)
    y, z = result
    check(y, linear_formula, x, weight, u, B, d, h, g, bias, mask_on_base, dtype=dtype)
    check(z, shrink_formula, x, weight, mask_on_base if g is not None else None, dtype=dtype)

    q = shrink.shrink_grad(dy, B, out_scale=h)
    check(q, shrink_grad_formula, dy, B, h, dtype=dtype)
    dx = adapter_linear.adapter_linear_dx(dy, weight, q, A, **both)
    check(dx, dx_formula, dy, weight, q, A, d, g, mask, mask_on_base, dtype=dtype)

    # Sums over tokens are in fp32, whatever the dtype of what is summed: they are judged in fp32.
    P_, dbias, dscale = adapter_grads.output_grads(dy, u, z, want_bias=True)
    assert P_ is not None
    assert dbias is not None
    assert dscale is not None
    check(P_, lambda dy, u: dy.T @ u, dy, u, dtype=torch.float32)
    check(dbias, lambda dy: dy.sum(0), dy, dtype=torch.float32)
    check(dscale, lambda dy, z: (dy * z).sum(0), dy, z, dtype=torch.float32)
    dA = adapter_grads.input_grads(x, q, mid_scale=d, **drop)
    assert dA.is_contiguous()
    check(dA, input_grads_formula, x, q, d, mask, dtype=torch.float32)


# Pairs of conditions rather than all of them at once: each value of each axis is met in some case and some dtype.
CASES = [
    # M, K, N, R, scaled, dropout, on_base
    (1, 100, 72, 1, True, True, False),
    (7, 33, 100, 3, True, True, True),
    (37, 72, 33, 8, False, True, False),
    (70, 100, 33, 24, True, True, True),
    (37, 130, 72, 16, True, False, False),
    (7, 100, 40, 64, False, False, False),
    (37, 40, 72, 100, True, True, False),
    (7, 72, 33, 256, True, True, True),
    (0, 100, 72, 8, True, True, True),
    (37, 72, 100, 0, True, True, True),
    (37, 33, 72, 0, False, False, False),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_launchers_match_their_formulas(case: tuple[Any, ...], dtype: torch.dtype) -> None:
    M, K, N, R, scaled, dropout, on_base = case
    check_all(make_layer(M, K, N, R, dtype), scaled=scaled, dropout=dropout, on_base=on_base)


def transposed(tensor: Tensor) -> Tensor:
    return tensor.T.contiguous().T


def every_other(tensor: Tensor) -> Tensor:
    return tensor.repeat_interleave(2, dim=1)[:, ::2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", [transposed, every_other], ids=lambda layout: layout.__name__)
def test_any_strides_and_sliced_projections(layout: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
    # VeRA shares one A [r, largest in] and one B [largest out, r]: a layer sees a corner of each. And parameters here
    # have the activation's dtype.
    largest = make_layer(37, 100, 72, 16, dtype, parameter_dtype=dtype)
    layer = make_layer(37, 72, 33, 8, dtype, parameter_dtype=dtype)
    layer = layer._replace(
        x=layout(layer.x),
        dy=layout(layer.dy),
        weight=layout(layer.weight),
        A=largest.A[:8, :72],
        B=layout(largest.B)[:33, :8],
    )
    check_all(layer, scaled=True, dropout=True, on_base=True)


def test_gradient_expanded_from_a_sum() -> None:
    layer = make_layer(37, 72, 33, 8, torch.float32)
    layer = layer._replace(dy=torch.ones(1, 1, device=DEVICE).expand(37, 33))
    check_all(layer, scaled=True, dropout=False, on_base=False)


def test_scaling_multiplies_out_scale() -> None:
    layer = make_layer(7, 40, 33, 8, torch.float32)
    u = shrink.shrink(layer.x, layer.A)
    y = adapter_linear.adapter_linear(layer.x, layer.weight, u, layer.B, out_scale=layer.out_scale, scaling=2.5)
    assert isinstance(y, Tensor)
    scaled = 2.5 * layer.out_scale
    check(y, linear_formula, layer.x, layer.weight, u, layer.B, None, scaled, None, None, None, dtype=torch.float32)
    q = shrink.shrink_grad(layer.dy, layer.B, out_scale=layer.out_scale, scaling=2.5)
    check(q, shrink_grad_formula, layer.dy, layer.B, scaled, dtype=torch.float32)


@pytest.mark.parametrize("dropout", [False, True])
def test_a_base_scale_next_to_one_is_not_lost_in_bfloat16(dropout: bool) -> None:
    # |g - 1| of a trained DoRA is below half an ulp of bf16, so the error of one element cannot show whether g was
    # rounded. The share of g's exact effect that survives, over all elements, does.
    layer = make_layer(64, 64, 64, 8, torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    g = 1 + 1.5e-3 * torch.randn(64, generator=generator).to(DEVICE)
    one = torch.ones_like(g)
    u = torch.zeros(64, 8, dtype=torch.bfloat16, device=DEVICE)
    drop: dict[str, Any] = {"seed": seed_tensor(), "p": P, "dropout_on_base": True} if dropout else {}
    mask = scaled_mask(seed_tensor(), 64, 64) if dropout else None

    def survives(actual: Tensor, formula: Callable[..., Tensor], *operands: Tensor | None) -> float:
        without = in_dtype(torch.float64, formula, *operands[:-2], one, None, operands[-1])
        effect = in_dtype(torch.float64, formula, *operands[:-2], g, None, operands[-1]) - without
        return (((actual.double() - without) * effect).sum() / effect.square().sum()).item()

    y = adapter_linear.adapter_linear(layer.x, layer.weight, u, layer.B, base_scale=g, **drop)
    assert isinstance(y, Tensor)
    share = survives(y, linear_formula, layer.x, layer.weight, u, layer.B, None, None, None, mask)
    assert share == pytest.approx(1, abs=0.1)
    if dropout:
        dx = adapter_linear.adapter_linear_dx(layer.dy, layer.weight, u, layer.A, base_scale=g, **drop)
        share = survives(dx, dx_formula, layer.dy, layer.weight, u, layer.A, None, None, mask)
        assert share == pytest.approx(1, abs=0.1)


def test_output_grads_gives_only_what_is_asked_for() -> None:
    layer = make_layer(37, 72, 33, 8, torch.float32)
    dy, u = layer.dy, shrink.shrink(layer.x, layer.A)
    assert adapter_grads.output_grads(dy) == (None, None, None)
    product, dbias, dscale = adapter_grads.output_grads(dy, u)
    assert dbias is None
    assert dscale is None
    assert product is not None
    check(product, lambda dy, u: dy.T @ u, dy, u, dtype=torch.float32)
    product, dbias, dscale = adapter_grads.output_grads(dy, None, dy)
    assert product is None
    assert dbias is None
    assert dscale is not None
    check(dscale, lambda dy: (dy * dy).sum(0), dy, dtype=torch.float32)


def norm_formula(weight: Tensor, A: Tensor, B: Tensor) -> Tensor:
    return (weight + 1.5 * B @ A).norm(dim=1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("K", "N", "R"), [(100, 72, 3), (72, 33, 24), (40, 100, 100), (33, 40, 0)])
def test_weight_norm(K: int, N: int, R: int, dtype: torch.dtype) -> None:
    layer = make_layer(1, K, N, R, dtype)
    squares = weight_norm.row_squares(layer.weight)
    check(squares, lambda weight: weight.square().sum(1), layer.weight, dtype=torch.float32)
    norm, WA = weight_norm.weight_norm(layer.weight, layer.A, layer.B, 1.5, squares)
    assert norm.dtype == WA.dtype == torch.float32
    # Judged in fp32 for a 16-bit weight too: A enters the dot as two 16-bit parts there.
    check(norm, norm_formula, layer.weight, layer.A, layer.B, dtype=torch.float32)


def test_weight_norm_of_a_cancelled_row_is_not_nan() -> None:
    layer = make_layer(1, 40, 33, 8, torch.float32)
    weight = -1.5 * layer.B @ layer.A
    norm, _ = weight_norm.weight_norm(weight, layer.A, layer.B, 1.5, weight_norm.row_squares(weight))
    assert torch.isfinite(norm).all()
    assert (norm <= 1e-2 * weight.norm(dim=1)).all()


def philox_words(seed: int, quad: int, row: int) -> list[int]:
    """Philox4x32-7 as its paper states it, in Python's integers (Salmon et al. 2011, section 4.3)."""
    mask = 2**32 - 1
    c0, c1, c2, c3 = quad, row, 0, 0
    k0, k1 = seed & mask, seed >> 32
    for _ in range(7):
        high0, low0 = divmod(0xD2511F53 * c0, 2**32)
        high1, low1 = divmod(0xCD9E8D57 * c2, 2**32)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & mask, (k1 + 0xBB67AE85) & mask
    return [c0, c1, c2, c3]


def test_dropout_mask_is_philox() -> None:
    seed = 2**40 + 7
    mask = tiles.dropout_mask(seed_tensor(seed), 5, 70, P)
    for row, column in [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (4, 66), (3, 69), (2, 65)]:
        word = philox_words(seed, column // 4, row)[column % 4]
        assert bool(mask[row, column]) == (word >> 1 >= tiles.drop_threshold(P))


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.9])
def test_dropout_mask_rate(p: float) -> None:
    count = 300 * 400
    kept = tiles.dropout_mask(seed_tensor(), 300, 400, p)
    assert abs(tiles.keep_probability(p) - (1 - p)) <= 2**-31
    assert abs(kept.double().mean().item() - (1 - p)) <= 5 * (p * (1 - p) / count) ** 0.5
    # Neighbours along rows and columns are independent.
    agree = 1 - 2 * p * (1 - p)
    for first, second in ((kept[:, :-1], kept[:, 1:]), (kept[:-1], kept[1:])):
        spread = 5 * (agree * (1 - agree) / count) ** 0.5
        assert abs((first == second).double().mean().item() - agree) <= spread + 1e-12


def test_dropout_mask_depends_on_every_bit_of_the_seed_and_not_on_the_shape() -> None:
    first = tiles.dropout_mask(seed_tensor(1), 40, 100, 0.5)
    assert torch.equal(first, tiles.dropout_mask(seed_tensor(1), 40, 100, 0.5))
    assert torch.equal(first[:7, :33], tiles.dropout_mask(seed_tensor(1), 7, 33, 0.5))
    for other in (2, 1 + 2**32, 1 + 2**62):
        agreement = (first == tiles.dropout_mask(seed_tensor(other), 40, 100, 0.5)).double().mean().item()
        assert abs(agreement - 0.5) < 0.05


def test_drop_probability_next_to_one_keeps_a_finite_scale() -> None:
    assert 0 < tiles.keep_probability(1 - 1e-15) < 1e-9
    assert tiles.keep_probability(0.0) == 1.0


def run_all(layer: Layer, place: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> list[Tensor]:
    """Every launcher once, with everything on; ``place`` sees each operand first. Returns all outputs."""
    seed = place(seed_tensor())
    x, dy, weight, A, B, mid_scale, out_scale, base_scale, bias = map(place, layer)
    outputs: list[Tensor] = []
    u = place(shrink.shrink(x, A, seed=seed, p=P))
    q = place(shrink.shrink_grad(dy, B, out_scale=out_scale, scaling=0.5))
    outputs += [u, q]
    for on_base in (False, True):
        drop: dict[str, Any] = {"seed": seed, "p": P, "dropout_on_base": on_base, "base_scale": base_scale}
        scales = {"mid_scale": mid_scale, "out_scale": out_scale, "bias": bias}
        outputs += adapter_linear.adapter_linear(x, weight, u, B, keep_base=True, **scales, **drop)
        outputs.append(adapter_linear.adapter_linear_dx(dy, weight, q, A, mid_scale=mid_scale, **drop))
    outputs += [grad for grad in adapter_grads.output_grads(dy, u, dy, want_bias=True) if grad is not None]
    outputs.append(adapter_grads.input_grads(x, q, mid_scale=mid_scale, seed=seed, p=P))
    squares = place(weight_norm.row_squares(weight))
    outputs += [squares, *weight_norm.weight_norm(weight, A, B, 1.5, squares), tiles.dropout_mask(seed, 7, 33, P)]
    return outputs


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_outside_the_tensors_is_read_or_written(dtype: torch.dtype) -> None:
    layer = make_layer(37, 100, 33, 24, dtype)
    expected = run_all(layer)
    operands: list[Tensor] = []

    def place(tensor: Tensor) -> Tensor:
        operands.append(guarded(tensor))
        return operands[-1]

    with guarded_outputs() as written:
        outputs = run_all(layer, place)
    assert len(written) >= len(outputs)
    # Bit for bit: a NaN that was read from a margin would show, and strides do not change the order of any sum.
    for actual, plain in zip(outputs, expected, strict=True):
        assert torch.equal(actual, plain)
        assert actual.dtype == torch.bool or torch.isfinite(actual).all()
    for tensor in operands + written:
        assert margins_intact(tensor)


def test_the_order_of_programs_does_not_matter(request: pytest.FixtureRequest) -> None:
    layer = make_layer(70, 72, 40, 40, torch.float32)
    expected = run_all(layer)
    request.getfixturevalue("shuffled_programs")
    for actual, plain in zip(run_all(layer), expected, strict=True):
        assert torch.equal(actual, plain)


def test_margins_notice_a_stray_write() -> None:
    view = guarded(torch.zeros(3, 4))
    assert margins_intact(view)
    view.fill_(float("nan"))
    assert margins_intact(view)
    torch.as_strided(view, (1,), (1,), view.storage_offset() + 4).fill_(float("nan"))
    assert not margins_intact(view)


@triton.jit
def _bfloat16_arithmetic_kernel(
    a, b, product, total, difference, quotient, larger, negative, chosen, SIZE: tl.constexpr
):
    rows = tl.arange(0, SIZE)[:, None]
    index = rows * SIZE + tl.arange(0, SIZE)[None, :]
    a_tile = tl.load(a + index)
    b_tile = tl.load(b + index)
    tl.store(product + index, tl.dot(a_tile, b_tile))
    tl.store(total + index, a_tile + b_tile)
    tl.store(difference + index, a_tile - b_tile)
    tl.store(quotient + index, (a_tile / b_tile).to(a_tile.dtype))
    tl.store(larger + index, tl.maximum(a_tile, b_tile))
    tl.store(negative + index, -a_tile)
    tl.store(chosen + index, tl.where(a_tile < b_tile, a_tile, 2.0))


def test_bfloat16_is_computed_and_rounded_as_on_a_gpu() -> None:
    """Guards the cure in conftest: uncured, the interpreter's bf16 results are off by factors."""
    torch.manual_seed(0)
    a, b = (torch.randn(16, 16, device=DEVICE).bfloat16() for _ in range(2))
    product = torch.empty(16, 16, device=DEVICE)
    total, difference, quotient, larger, negative, chosen = (torch.empty_like(a) for _ in range(6))
    _bfloat16_arithmetic_kernel[(1,)](a, b, product, total, difference, quotient, larger, negative, chosen, SIZE=16)
    exact = a.double() @ b.double()
    assert (product - exact).abs().max() <= 1e-6 * exact.abs().max()
    # PyTorch rounds each of these once, to nearest even; so must the kernel.
    assert torch.equal(total, a + b)
    assert torch.equal(difference, a - b)
    assert torch.equal(quotient, a / b)
    assert torch.equal(larger, torch.maximum(a, b))
    assert torch.equal(negative, -a)
    assert torch.equal(chosen, torch.where(a < b, a, 2.0))


@triton.jit
def _bfloat16_cast_kernel(source, target, SIZE: tl.constexpr):
    index = tl.arange(0, SIZE)
    tl.store(target + index, tl.load(source + index).to(tl.bfloat16))


def test_bfloat16_casts_round_to_nearest_even() -> None:
    values = [1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, 255.9, -1e-40, float("inf"), float("nan"), 3.4e38]
    source = torch.tensor(values, device=DEVICE)
    target = torch.empty(8, dtype=torch.bfloat16, device=DEVICE)
    _bfloat16_cast_kernel[(1,)](source, target, SIZE=8)
    torch.testing.assert_close(target, source.bfloat16(), rtol=0, atol=0, equal_nan=True)
