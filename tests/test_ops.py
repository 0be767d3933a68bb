"""Each operator as PyTorch sees it: schema, fake and implementation agree, and the whole compiles in one graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastadapt import AdapterForm, functional, ops

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ("eager", "triton")
M, K, N, R = 9, 20, 12, 3


def tensor(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(DEVICE)


def cases(backend: str) -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """A call of every operator, with and without what is optional."""
    registered = torch.ops.fastadapt
    x, weight, u, dy, z = tensor(M, K), tensor(N, K), tensor(M, R), tensor(M, N), tensor(M, N)
    A, B, d, h, g, b = tensor(R, K), tensor(N, R), tensor(R), tensor(N), tensor(N), tensor(N)
    drop = ops.draw_dropout(x, 0.3, backend)
    full = (x, weight, u, B, d, h, 0.5, g, b, drop, 0.3, True)
    return {
        "shrink": (registered.shrink.default, (x, A, None, 0.0)),
        "shrink with dropout": (registered.shrink.default, (x, A, drop, 0.3)),
        "shrink_grad": (registered.shrink_grad.default, (dy, B, None, 0.5)),
        "shrink_grad with a scale": (registered.shrink_grad.default, (dy, B, h, 1.0)),
        "adapter_linear": (
            registered.adapter_linear.default,
            (x, weight, u, B, None, None, 0.5, None, None, None, 0.0, False),
        ),
        "adapter_linear in full": (registered.adapter_linear.default, full),
        "adapter_linear of rank 0": (
            registered.adapter_linear.default,
            (x, weight, u[:, :0], B[:, :0], None, None, 1.0, g, b, None, 0.0, False),
        ),
        "adapter_linear_keep_base": (registered.adapter_linear_keep_base.default, full),
        "adapter_linear_dx": (registered.adapter_linear_dx.default, (dy, weight, u, A, None, None, None, 0.0, False)),
        "adapter_linear_dx in full": (registered.adapter_linear_dx.default, (dy, weight, u, A, d, g, drop, 0.3, True)),
        "output_grads": (registered.output_grads.default, (dy, u, None, False)),
        "output_grads in full": (registered.output_grads.default, (dy, u, z, True)),
        "input_grads": (registered.input_grads.default, (x, u, None, None, 0.0)),
        "input_grads in full": (registered.input_grads.default, (x, u, d, drop, 0.3)),
        "weight_norm": (registered.weight_norm.default, (weight, A, B, 0.5, weight.square().sum(1))),
        "row_squares": (registered.row_squares.default, (weight,)),
    }


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", cases("eager"))
def test_opcheck(name: str, backend: str) -> None:
    operator, args = cases(backend)[name]
    torch.library.opcheck(operator, (*args, backend))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", cases("eager"))
def test_the_fake_tells_the_layout(name: str, backend: str) -> None:
    """Compiled code trusts the fake's strides."""
    operator, args = cases(backend)[name]
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = operator(*(mode.from_tensor(a) if isinstance(a, Tensor) else a for a in args), backend)
    real = operator(*args, backend)
    for f, r in zip(*((v if isinstance(v, (tuple, list)) else [v]) for v in (fake, real)), strict=True):
        assert (f.shape, f.stride(), f.dtype) == (r.shape, r.stride(), r.dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_compiles_in_one_graph_forward_and_backward(backend: str, dora: bool, dropout: float) -> None:
    weight = tensor(N, K)
    leaves = [t.requires_grad_() for t in (tensor(M, K), tensor(R, K), tensor(N, R), tensor(N))]

    def run(x: Tensor, A: Tensor, B: Tensor, m: Tensor) -> Tensor:
        form = AdapterForm(A, B, out_scale=0.5)
        if dora:
            g = m / functional.weight_norm(weight, A.detach(), B.detach(), 0.5, backend=backend)
            form = AdapterForm(A, B, out_scale=0.5 * g, base_scale=g, dropout_on_base=True)
        return functional.adapter_linear(x, weight, form, dropout=dropout, training=True, backend=backend)

    def results(function: Any) -> list[Tensor]:
        torch.manual_seed(0)
        y = function(*leaves)
        wanted = leaves if dora else leaves[:3]
        return [y, *torch.autograd.grad(y.square().sum(), wanted)]

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    plain, traced = results(run), results(compiled)
    if dropout and backend == "eager":  # compiled, the mask is another draw of the same generator
        assert torch.equal(traced[0], results(compiled)[0])
        return
    for a, b in zip(plain, traced, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")  # inductor's own
def test_inductor_takes_the_operator() -> None:
    weight = tensor(N, K)
    leaves = [t.requires_grad_() for t in (tensor(M, K), tensor(R, K), tensor(N, R))]

    def run(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return functional.adapter_linear(x * 2, weight, AdapterForm(A, B, out_scale=0.5)).relu()

    plain = torch.autograd.grad(run(*leaves).sum(), leaves)
    compiled = torch.autograd.grad(torch.compile(run, fullgraph=True)(*leaves).sum(), leaves)
    for a, b in zip(plain, compiled, strict=True):
        torch.testing.assert_close(a, b)
