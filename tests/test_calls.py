"""What every operator does around its formula: mixed dtypes, and what PyTorch cannot do with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastadapt.functional import adapter_linear, adapter_update, bottleneck, hadamard_linear, weight_norm
from fastadapt.reference import AdapterForm

K, N, R = 12, 8, 3


def operands(half: torch.dtype, wide: torch.dtype, seed: int = 0) -> dict[str, Tensor]:
    """x and weight in one dtype, factors in another that trains."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"x": (5, K), "weight": (N, K), "A": (R, K), "B": (N, R), "g": (N,), "up": (K, R)}
    found = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return {
        name: value.to(half if name in ("x", "weight") else wide).requires_grad_(name != "weight")
        for name, value in found.items()
    }


def _adapter(t: dict[str, Tensor], backend: str) -> Tensor:
    form = AdapterForm(t["A"], t["B"], out_scale=t["g"], base_scale=t["g"], scaling=0.5)
    return adapter_linear(t["x"], t["weight"], form, backend=backend)


def _update(t: dict[str, Tensor], backend: str) -> Tensor:
    form = AdapterForm(t["A"], t["B"], out_scale=t["g"], base_scale=t["g"], scaling=0.5)
    return adapter_update(t["x"] @ t["weight"].T, t["x"], form, backend=backend)


CALLS: dict[str, Callable[[dict[str, Tensor], str], Tensor]] = {
    "adapter_linear": _adapter,
    "adapter_update": _update,
    "hadamard_linear": lambda t, b: hadamard_linear(t["x"], t["weight"], U=t["B"], V=t["A"], backend=b),
    "bottleneck": lambda t, b: bottleneck(t["x"], t["A"], t["up"], backend=b),
    "weight_norm": lambda t, b: weight_norm(t["weight"], t["A"], t["B"], 0.5, backend=b),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16, torch.float32])
def test_the_reference_takes_the_dtypes_that_the_operator_takes(name: str, half: torch.dtype) -> None:
    tensors = operands(half, torch.float32)
    y, expected = CALLS[name](tensors, "reference"), CALLS[name](tensors, "eager")
    assert y.dtype == expected.dtype
    torch.testing.assert_close(y, expected, rtol=2e-2, atol=2e-2)
    y.float().sum().backward()
    for trained in ["A"] if name == "weight_norm" else ["A", "x"]:
        grad = tensors[trained].grad
        assert grad is not None
        assert grad.dtype == tensors[trained].dtype


@pytest.mark.parametrize("name", CALLS)
def test_the_reference_under_autocast_gives_autocasts_dtype(name: str) -> None:
    tensors = operands(torch.float32, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert CALLS[name](tensors, "reference").dtype == CALLS[name](tensors, "eager").dtype


@pytest.mark.parametrize("name", CALLS)
def test_what_cannot_be_differentiated_twice_says_so(name: str) -> None:
    tensors = operands(torch.float64, torch.float64)
    (grad,) = torch.autograd.grad(CALLS[name](tensors, "eager").sum(), tensors["A"], create_graph=True)
    with pytest.raises(ValueError, match=r"taken once.*reference"):
        grad.square().sum().backward()
    # Asked for with others, and not used, it hurts nobody.
    other = torch.ones((), requires_grad=True)
    loss = CALLS[name](tensors, "eager").sum() * other
    (once,) = torch.autograd.grad(loss, other, create_graph=True)
    assert once.requires_grad
    (grad,) = torch.autograd.grad(CALLS[name](tensors, "reference").square().sum(), tensors["A"], create_graph=True)
    grad.square().sum().backward()
    assert tensors["A"].grad is not None


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("transform", ["grad", "vmap"])
def test_what_torch_func_cannot_look_into_says_so(name: str, transform: str) -> None:
    tensors = operands(torch.float32, torch.float32)

    def summed(A: Tensor, backend: str) -> Tensor:
        return CALLS[name](tensors | {"A": A}, backend).sum()

    def run(backend: str) -> Any:
        if transform == "grad":
            return torch.func.grad(lambda A: summed(A, backend))(tensors["A"].detach())
        return torch.func.vmap(lambda A: summed(A, backend))(torch.stack([tensors["A"].detach()] * 2))

    with pytest.raises(ValueError, match=r"torch\.func's transforms.*reference"):
        run("eager")
    assert torch.isfinite(run("reference")).all()


@pytest.mark.parametrize("trains", [False, True])
def test_dora_in_fp16_does_not_overflow_before_its_scale(trains: bool) -> None:
    """A large s · B A x, which m / n takes back to what a layer gives."""
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(4, K, generator=generator), torch.randn(N, K, generator=generator)
    A, B = (100 * torch.randn(shape, generator=generator) for shape in ((R, K), (N, R)))
    scaling = 16.0
    g = 3.0 / (weight + scaling * B @ A).norm(dim=1)
    assert (scaling * x @ (B @ A).T).abs().max() > 1e5  # what fp16 cannot hold
    form = AdapterForm(A.requires_grad_(trains), B, out_scale=g, base_scale=g, scaling=scaling)
    y = adapter_linear(x.half(), weight.half(), form, backend="eager")
    expected = g * (x @ weight.T + scaling * x @ (B @ A).T)
    torch.testing.assert_close(y.float(), expected, rtol=2e-2, atol=2e-2)
