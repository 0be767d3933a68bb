"""Each operator as PyTorch sees it: schema, fake and implementation agree, and the whole compiles in one graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import layout_is_told
from torch import Tensor

from fastadapt import AdapterForm, functional, ops

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ("eager", "triton")
M, K, N, R = 9, 20, 12, 3


def tensor(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(DEVICE)


def cases(strategy: str) -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """A call of every operator, with and without what is optional."""
    registered = torch.ops.fastadapt
    linear, backward = registered.adapter_linear.default, registered.adapter_linear_backward.default
    x, weight, u, dy, z = tensor(M, K), tensor(N, K), tensor(M, R), tensor(M, N), tensor(M, N)
    A, B, d, h, g, b = tensor(R, K), tensor(N, R), tensor(R), tensor(N), tensor(N), tensor(N)
    drop = ops.draw_dropout(x, 0.3, ops.STRATEGIES[strategy])
    none = [None]
    plain = ([weight], [A], [B], none, none, [0.5], none, none, [False])
    full = ([weight], [A], [B], [d], [h], [0.5], [g], [b], [True])
    scaled = ([weight], [A], [B], [d], [h], [0.5], none, [b], [False])
    # Mixed ranks and forms.
    pair = ([weight, weight[:4]], [A, A[:0]], [B, B[:4, :0]], [d, None], [h, None], [0.5, 1.0], [g, g[:4]], [b, None])
    pair = (*pair, [False, False])
    same = ([weight, weight], [A, A], [B, B], [d, d], [h, h], [1.0, 0.5], [None, None], [None, None], [False, False])
    recompose = strategy == "recompose"
    drops: dict[str, tuple[Any, tuple[Any, ...]]] = {}
    if not recompose:
        drops = {
            "forward in full": (linear, (x, *full, None, drop, 0.3, False, True, True, False)),
            "forward of a group": (linear, (x, *pair, None, drop, 0.3, False, True, True, False)),
            "backward in full": (backward, ([dy], *full, x, u, [z], [], drop, 0.3, False, True, True)),
            "backward of a group": (
                backward,
                ([dy, dy[:, :4]], *pair, x, u, [z, None], [], None, 0.0, False, True, True),
            ),
        }
    return {
        **drops,
        "forward": (linear, (x, *plain, None, None, 0.0, False, True, False, False)),
        "forward with u": (linear, (x, *scaled, u, None, 0.0, False, False, False, recompose)),
        "forward of a shared A": (linear, (x, *same, None, None, 0.0, True, True, False, recompose)),
        "backward": (backward, ([dy], *plain, x, u, none, [], None, 0.0, False, True, False)),
        "backward of a frozen A": (backward, ([dy], *scaled, None, u, none, [], None, 0.0, False, True, True)),
        "backward to the adapter alone": (backward, ([dy], *scaled, x, u, none, [], None, 0.0, False, False, False)),
        "backward of a shared A": (backward, ([dy, dy], *same, None, u, none * 2, [], None, 0.0, True, True, False)),
    }


@pytest.mark.parametrize("strategy", ops.STRATEGIES)
@pytest.mark.parametrize("name", cases("library"))
def test_opcheck(name: str, strategy: str) -> None:
    if name not in cases(strategy):
        pytest.skip("a recomposed weight has no dropout and no trained base_scale")
    operator, args = cases(strategy)[name]
    torch.library.opcheck(operator, (*args, strategy))


@pytest.mark.parametrize("strategy", ops.STRATEGIES)
@pytest.mark.parametrize("name", cases("library"))
def test_the_fake_tells_the_layout(name: str, strategy: str) -> None:
    """Compiled code trusts the fake's strides."""
    if name in cases(strategy):
        operator, args = cases(strategy)[name]
        layout_is_told(operator, (*args, strategy))


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_norms_operators(backend: str) -> None:
    weight, A, B = tensor(N, K), tensor(R, K), tensor(N, R)
    for operator, args in (
        (torch.ops.fastadapt.weight_norm.default, (weight, A, B, 0.5, weight.square().sum(1), backend)),
        (torch.ops.fastadapt.row_squares.default, (weight, backend)),
    ):
        torch.library.opcheck(operator, args)
        layout_is_told(operator, args)


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
