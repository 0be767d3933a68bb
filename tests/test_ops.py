"""Each operator as PyTorch sees it: schema, fake and implementation agree, and the whole compiles in one graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import layout_is_told
from torch import Tensor

from fastadapt import AdapterForm, functional
from fastadapt.operators.adapter_linear import op
from fastadapt.operators.adapter_linear.member import Group, Keep, Member, Saved, Wants
from fastadapt.operators.adapter_linear.strategies import STRATEGIES
from fastadapt.operators.dropout import draw_dropout
from fastadapt.operators.masks import Dropout
from fastadapt.operators.registry import Operator, _filled, _tensors
from fastadapt.operators.weight_norm import op as norm

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ("eager", "triton")
M, K, N, R = 9, 20, 12, 3


def tensor(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(DEVICE)


NONE = Dropout()


def cases(strategy: str) -> dict[str, tuple[Operator[Any], tuple[Any, ...]]]:
    """A call of every operator, with and without what is optional."""
    linear, backward = op.adapter_linear, op.adapter_linear_backward
    x, weight, u, dy, z = tensor(M, K), tensor(N, K), tensor(M, R), tensor(M, N), tensor(M, N)
    A, B, d, h, g, b = tensor(R, K), tensor(N, R), tensor(R), tensor(N), tensor(N), tensor(N)
    drop = Dropout(draw_dropout(x, 0.3, STRATEGIES[strategy]), 0.3)
    nothing = (None, None, None, None)
    plain = Group([Member(weight, A, B, *nothing, 0.5, False, False)], NONE, False)
    full = Group([Member(weight, A, B, d, h, g, b, 0.5, True, False)], drop, False)
    tied = Group([Member(weight, A, B, d, None, g, b, 0.5, True, True)], drop, False)
    scaled = Group([Member(weight, A, B, d, h, None, b, 0.5, False, False)], NONE, False)
    # Mixed ranks and forms.
    other = Member(weight[:4], A[:0], B[:4, :0], None, None, g[:4], None, 1.0, False, False)
    pair = Group([Member(weight, A, B, d, h, g, b, 0.5, False, False), other], drop, False)
    one = Member(weight, A, B, d, h, None, None, 1.0, False, False)
    same = Group([one, one._replace(scaling=0.5)], NONE, True)
    recompose = strategy == "recompose"
    both, only_x, neither = Wants(True, True), Wants(True, False), Wants(False, False)
    if strategy == "expand":
        keep = Keep(True, False, True)
        return {
            "forward": (linear, (x, scaled, None, keep)),
            "forward of a shared A": (linear, (x, same, None, keep)),
            "backward of a frozen A": (backward, ([dy], scaled, Saved(None, u, [], [z]), both)),
            "backward to the adapter alone": (backward, ([dy], scaled, Saved(None, u, [], [z]), neither)),
            "backward of a shared A": (backward, ([dy, dy], same, Saved(None, u, [], [z, z]), only_x)),
        }
    drops: dict[str, tuple[Operator[Any], tuple[Any, ...]]] = {}
    if not recompose:
        drops = {
            "forward in full": (linear, (x, full, None, Keep(True, True, False))),
            "forward of a tied scale": (linear, (x, tied, None, Keep(True, True, False))),
            "forward of a group": (linear, (x, pair, None, Keep(True, True, False))),
            "backward in full": (backward, ([dy], full, Saved(x, u, [z], []), both)),
            "backward of a tied scale": (backward, ([dy], tied, Saved(x, u, [z], []), both)),
            "backward of a group": (
                backward,
                ([dy, dy[:, :4]], pair._replace(dropout=NONE), Saved(x, u, [z, None], []), both),
            ),
        }
    return {
        **drops,
        "forward": (linear, (x, plain, None, Keep(True, False, False))),
        "forward with u": (linear, (x, scaled, u, Keep(False, False, recompose))),
        "forward of a shared A": (linear, (x, same, None, Keep(True, False, recompose))),
        "backward": (backward, ([dy], plain, Saved(x, u, [], []), only_x)),
        "backward of a frozen A": (backward, ([dy], scaled, Saved(None, u, [], []), both)),
        "backward to the adapter alone": (backward, ([dy], scaled, Saved(x, u, [], []), neither)),
        "backward of a shared A": (backward, ([dy, dy], same, Saved(None, u, [], []), only_x)),
    }


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", cases("library"))
def test_opcheck(name: str, strategy: str) -> None:
    if name not in cases(strategy):
        pytest.skip("of a strategy that has no dropout, no trained base_scale or no trained factor")
    operator, args = cases(strategy)[name]
    torch.library.opcheck(operator.registered, operator.flat(*args, strategy))


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", cases("library"))
def test_the_fake_tells_the_layout(name: str, strategy: str) -> None:
    """Compiled code trusts the fake's strides."""
    if name in cases(strategy):
        operator, args = cases(strategy)[name]
        layout_is_told(operator.registered, operator.flat(*args, strategy))


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_norms_operators(backend: str) -> None:
    weight, A, B = tensor(N, K), tensor(R, K), tensor(N, R)
    for operator, args in (
        (norm.weight_norm, (weight, A, B, 0.5, weight.square().sum(1), backend)),
        (norm.row_squares, (weight, backend)),
    ):
        torch.library.opcheck(operator.registered, operator.flat(*args))
        layout_is_told(operator.registered, operator.flat(*args))


def test_results_are_the_same_through_the_dispatcher() -> None:
    """Taken apart for the dispatcher and put together again: records in, records out, None where nothing is wanted."""
    for strategy in STRATEGIES:
        for operator, args in cases(strategy).values():
            direct = operator.run(*args, strategy)
            flat = operator.registered(*operator.flat(*args, strategy))
            through = _filled(operator.outline(*args, strategy), iter(flat))
            assert type(direct) is type(through)
            for mine, other in zip(_tensors(direct), _tensors(through), strict=True):
                torch.testing.assert_close(mine, other)
            assert [part is None for part in direct] == [part is None for part in through]


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
