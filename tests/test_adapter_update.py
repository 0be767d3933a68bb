"""The form on what a base layer has given: values and every gradient, memory, dtypes, and what is refused."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import assert_follows, layout_is_told
from torch import Tensor, nn

from fastadapt import AdapterForm
from fastadapt.functional import adapter_update
from fastadapt.operators.adapter_update import op
from fastadapt.operators.adapter_update.parameters import Saved, Update, Wants
from fastadapt.reference import adapter_linear_reference, adapter_update_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Values = dict[str, Tensor]
# What a form can have beside A and B.
FORMS: dict[str, tuple[str, ...]] = {
    "LoRA": (),
    "LoRA with a bias": ("bias",),
    "VeRA": ("mid_scale", "out_scale"),
    "DoRA": ("base_scale", "bias", "tied"),
    "DoRA, dropout": ("base_scale", "bias", "tied", "y_dropped"),
    "every part": ("mid_scale", "out_scale", "base_scale", "bias"),
    "every part, dropout": ("mid_scale", "out_scale", "base_scale", "bias", "y_dropped"),
}


def operands(m: int, k: int, n: int, r: int, dtype: torch.dtype, factors: torch.dtype) -> Values:
    """What a layer gave, with a bias that is large beside it; g of 0 and 1e-3, h of 0."""
    generator = torch.Generator().manual_seed(m + k + n + r)

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=generator) * std

    bias = normal(n, std=20.0)
    values = {
        "y": (normal(m, n) + bias).to(dtype),
        "y_dropped": (normal(m, n) + bias).to(dtype),
        "x": normal(m, k).to(dtype),
        "base_bias": bias.to(dtype),
        "A": normal(r, k, std=k**-0.5).to(factors),
        "B": normal(n, r).to(factors),
        "mid_scale": normal(r).to(factors),
        "out_scale": normal(n).to(factors),
        "base_scale": normal(n).to(factors),
        "bias": normal(n, std=20.0).to(factors),
    }
    values["base_scale"][:2] = torch.tensor([0.0, 1e-3])
    values["out_scale"][2] = 0.0
    return {name: value.to(DEVICE) for name, value in values.items()}


def run(function: Callable[..., Tensor], values: Values, parts: tuple[str, ...]) -> Tensor:
    g = values["base_scale"] if "base_scale" in parts else None
    form = AdapterForm(
        values["A"],
        values["B"],
        values["mid_scale"] if "mid_scale" in parts else None,
        g if "tied" in parts and g is not None else values["out_scale"] if "out_scale" in parts else 1.0,
        g,
        values["bias"] if "bias" in parts else None,
        "y_dropped" in parts,
        0.5,
    )
    y_dropped = values["y_dropped"] if "y_dropped" in parts else None
    return function(values["y"], values["x"], form, base_bias=values["base_bias"], y_dropped=y_dropped)


def wanted(parts: tuple[str, ...]) -> list[str]:
    return ["y", "x", "base_bias", "A", "B", *[part for part in parts if part != "tied"]]


def results(function: Callable[..., Tensor], values: Values, parts: tuple[str, ...], dy: Tensor) -> Values:
    leaves = {name: value.detach().clone().requires_grad_() for name, value in values.items()}
    y = run(function, leaves, parts)
    y.backward(dy.to(y.dtype))
    found = {"out": y.detach()}
    for name in wanted(parts):
        grad = leaves[name].grad
        assert grad is not None, name
        assert grad.dtype == leaves[name].dtype
        found[name] = grad
    return found


@pytest.mark.parametrize("shape", [(7, 20, 12, 3), (0, 8, 5, 2), (1, 192, 100, 16), (127, 36, 50, 0)])
@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("narrow", [False, True])
def test_values_and_gradients(shape: tuple[int, int, int, int], name: str, dtype: torch.dtype, narrow: bool) -> None:
    """With fp32 factors beside 16 bits, as they train, and with factors of the layer's own dtype."""
    values, parts = operands(*shape, dtype, dtype if narrow else torch.float32), FORMS[name]
    dy = torch.randn(shape[0], shape[2], generator=torch.Generator().manual_seed(9)).to(DEVICE, dtype)

    def formula(dtype: torch.dtype) -> Values:
        cast = {key: value.to(dtype) for key, value in values.items()}
        return results(adapter_update_reference, cast, parts, dy.to(dtype))

    assert_follows(results(adapter_update, values, parts, dy), formula, dtype)


@pytest.mark.parametrize("name", FORMS)
def test_gradcheck(name: str) -> None:
    values, parts = operands(4, 6, 5, 3, torch.float64, torch.float64), FORMS[name]
    names = wanted(parts)
    leaves = [values[key].requires_grad_() for key in names]

    def function(*tensors: Tensor) -> Tensor:
        return run(adapter_update, {**values, **dict(zip(names, tensors, strict=True))}, parts)

    assert torch.autograd.gradcheck(function, leaves)


def test_of_a_linear_layer_it_is_adapter_linear() -> None:
    """g scales W0 x alone: what the layer adds of its own is in β."""
    values = operands(9, 20, 12, 3, torch.float64, torch.float64)
    weight = torch.randn(12, 20, dtype=torch.float64, device=DEVICE)
    form = AdapterForm(*(values[k] for k in ("A", "B", "mid_scale", "out_scale", "base_scale", "bias")))
    y = values["x"] @ weight.T + values["base_bias"]
    updated = adapter_update(y, values["x"], form, base_bias=values["base_bias"])
    torch.testing.assert_close(updated, adapter_linear_reference(values["x"], weight, form))
    x_dropped, mask = values["x"] * 2, torch.ones_like(values["x"], dtype=torch.bool)
    y_dropped = x_dropped @ weight.T + values["base_bias"]
    form = form._replace(dropout_on_base=True)
    updated = adapter_update(y, x_dropped, form, base_bias=values["base_bias"], y_dropped=y_dropped)
    torch.testing.assert_close(updated, adapter_linear_reference(values["x"], weight, form, mask=mask, p=0.5))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
def test_a_form_that_adds_nothing_gives_y_to_the_bit(dtype: torch.dtype, dropped: bool, scaled: bool) -> None:
    values = operands(37, 20, 12, 3, dtype, torch.float32)
    g = torch.ones(12, device=DEVICE) if scaled else None
    form = AdapterForm(
        values["A"],
        torch.zeros_like(values["B"]),
        out_scale=0.5 if g is None else g,
        base_scale=g,
        bias=values["base_bias"],
        dropout_on_base=dropped,
    )
    before = values["y"].clone()
    y_dropped = values["y_dropped"] if dropped else None
    updated = adapter_update(values["y"], values["x"], form, base_bias=values["base_bias"], y_dropped=y_dropped)
    assert torch.equal(updated, before)
    assert updated.dtype == dtype
    # A new tensor: what is behind the layer may write it.
    updated.zero_()
    assert torch.equal(values["y"], before)


def kept_sizes(parts: tuple[str, ...], trained: tuple[str, ...], m: int = 40) -> list[tuple[int, ...]]:
    """The shapes of what is kept for the backward that has a row for each token."""
    values = operands(m, 20, 12, 3, torch.float32, torch.float32)
    for name in trained:
        values[name].requires_grad_()
    shapes: list[tuple[int, ...]] = []

    def pack(tensor: Tensor) -> Tensor:
        shapes.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = run(adapter_update, values, parts)
    assert y.requires_grad
    return sorted(shape for shape in shapes if shape[:1] == (m,))


def test_no_more_is_kept_than_the_gradients_need() -> None:
    full = ("mid_scale", "out_scale", "base_scale", "bias")
    assert kept_sizes(full, ("y", "x")) == []
    assert kept_sizes(full, ("bias",)) == []
    assert kept_sizes(full, ("A",)) == [(40, 20)]
    assert kept_sizes(full, ("B",)) == kept_sizes(full, ("mid_scale",)) == kept_sizes(full, ("out_scale",)) == [(40, 3)]
    assert kept_sizes(full, ("base_scale",)) == [(40, 12)]
    assert kept_sizes(("base_scale", "tied"), ("base_scale",)) == [(40, 3), (40, 12)]
    with torch.no_grad():
        assert not run(adapter_update, operands(4, 20, 12, 3, torch.float32, torch.float32), full).requires_grad


def test_it_is_differentiable_once() -> None:
    values = operands(4, 6, 5, 3, torch.float64, torch.float64)
    values["A"].requires_grad_()
    (grad,) = torch.autograd.grad(run(adapter_update, values, ()).square().sum(), values["A"], create_graph=True)
    with pytest.raises(ValueError, match="not be differentiated again"):
        grad.sum().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_the_products_are_in_its_dtype(dtype: torch.dtype) -> None:
    base, x = nn.Linear(20, 12, device=DEVICE), torch.randn(5, 20, device=DEVICE)
    A = torch.randn(3, 20, device=DEVICE, requires_grad=True)
    form = AdapterForm(A, torch.randn(12, 3, device=DEVICE, requires_grad=True), bias=base.bias)
    with torch.autocast(DEVICE, dtype):
        y = adapter_update(base(x), x, form, base_bias=base.bias)
        assert y.dtype == dtype
        y.float().square().sum().backward()
    assert A.grad is not None
    assert A.grad.dtype == torch.float32
    exact = adapter_update_reference(base(x), x, form, base_bias=base.bias)
    assert (y - exact).abs().max() <= 8 * torch.finfo(dtype).eps * exact.abs().max()


def test_y_may_have_another_dtype_than_x() -> None:
    values = operands(7, 20, 12, 3, torch.float32, torch.float32)
    for one, other in itertools.permutations((torch.float32, torch.bfloat16), 2):
        mixed = {**values, "y": values["y"].to(one), "x": values["x"].to(other)}
        found = run(adapter_update, mixed, FORMS["every part"])
        assert found.dtype == one
        exact = run(adapter_update_reference, {k: v.double() for k, v in mixed.items()}, FORMS["every part"])
        assert (found - exact).abs().max() <= 0.02 * exact.abs().max()


def test_leading_dimensions() -> None:
    values = operands(12, 20, 12, 3, torch.float32, torch.float32)
    flat = run(adapter_update, values, FORMS["every part"])
    shaped = {k: v.view(3, 4, -1) if k in ("x", "y", "y_dropped") else v for k, v in values.items()}
    assert torch.equal(run(adapter_update, shaped, FORMS["every part"]), flat.view(3, 4, -1))
    single = {k: v[0] if k in ("x", "y", "y_dropped") else v for k, v in values.items()}
    torch.testing.assert_close(run(adapter_update, single, FORMS["every part"]), flat[0])


def test_what_does_not_fit_is_refused_by_name() -> None:
    values = operands(4, 6, 5, 3, torch.float32, torch.float32)
    y, x, b, form = values["y"], values["x"], values["base_bias"], AdapterForm(values["A"], values["B"])
    cases: list[tuple[type[Exception], str, Callable[[], Any]]] = [
        (ValueError, "form.U and form.V scale the base weight", lambda: adapter_update(y, x, form._replace(U=b, V=b))),
        (ValueError, r"x must have shape \[..., 6\]", lambda: adapter_update(y, x[:, :5], form)),
        (ValueError, r"y must have shape \[4, 5\]", lambda: adapter_update(y[:, :4], x, form)),
        (ValueError, r"y must have shape \[4, 5\]", lambda: adapter_update(y[:3], x, form)),
        (ValueError, "y_dropped must have shape", lambda: adapter_update(y, x, form, y_dropped=y[:3])),
        (ValueError, r"form.A must have shape \[r, in\]", lambda: adapter_update(y, x, form._replace(A=b))),
        (ValueError, r"form.B must have shape \[out, 3\]", lambda: adapter_update(y, x, form._replace(B=y))),
        (ValueError, r"base_bias must have shape \[5\]", lambda: adapter_update(y, x, form, base_bias=b[:2])),
        (ValueError, r"form.base_scale must have", lambda: adapter_update(y, x, form._replace(base_scale=b[:2]))),
        (TypeError, "y must be float16", lambda: adapter_update(y.int(), x, form)),
        (ValueError, "has no kernel of adapter_update", lambda: adapter_update(y, x, form, backend="triton")),
        (ValueError, "backend must be one of", lambda: adapter_update(y, x, form, backend="cuda")),
        (ValueError, "form.A is on meta", lambda: adapter_update(y, x, form._replace(A=form.A.to("meta")))),
    ]
    for error, words, call in cases:
        with pytest.raises(error, match=words):
            call()


M, K, N, R = 9, 20, 12, 3


def calls() -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """A call of each operator, with and without what is optional."""
    t = operands(M, K, N, R, torch.float32, torch.float32)
    y, x, z, u, dy = t["y"], t["x"], t["y_dropped"], torch.randn(M, R, device=DEVICE), torch.randn(M, N, device=DEVICE)
    plain = Update(t["A"], t["B"], None, None, None, None, 0.5, False)
    full = Update(t["A"], t["B"], t["mid_scale"], t["out_scale"], t["base_scale"], t["bias"], 0.5, False)
    tied = full._replace(out_scale=None, tied=True)
    everything, nothing = Wants(True, True, True, True), Wants(False, False, False, False)
    forward, backward = op.adapter_update, op.adapter_update_backward
    return {
        "forward": (forward, (y, x, plain, None, False)),
        "forward in full": (forward, (y, x, full, z, True)),
        "forward of a tied scale": (forward, (y, x, tied, None, True)),
        "backward": (backward, (dy, x, plain, Saved(x, u, None), Wants(True, False, False, False))),
        "backward in full": (backward, (dy, x, full, Saved(x, u, z), everything)),
        "backward of a tied scale": (backward, (dy, x, tied, Saved(x, u, z), everything._replace(y_dropped=False))),
        "backward to the scales alone": (backward, (dy, x, full, Saved(None, u, None), nothing)),
    }


@pytest.mark.parametrize("name", calls())
def test_opcheck(name: str) -> None:
    operator, args = calls()[name]
    torch.library.opcheck(operator.registered, operator.flat(*args, "eager"))
    layout_is_told(operator.registered, operator.flat(*args, "eager"))


@pytest.mark.parametrize("name", ["LoRA with a bias", "DoRA, dropout", "every part"])
def test_compiles_in_one_graph_forward_and_backward(name: str) -> None:
    parts, values = FORMS[name], operands(M, K, N, R, torch.float32, torch.float32)
    names = wanted(parts)
    leaves = [values[key].requires_grad_() for key in names]

    def function(*tensors: Tensor) -> Tensor:
        return run(adapter_update, {**values, **dict(zip(names, tensors, strict=True))}, parts)

    def found(function: Any) -> list[Tensor]:
        y = function(*leaves)
        return [y, *torch.autograd.grad(y.square().sum(), leaves)]

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for one, other in zip(found(compiled), found(function), strict=True):
        torch.testing.assert_close(one, other)
