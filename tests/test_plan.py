"""The plan of a call: kept by the outline of what it depends on, so that no change of that leaves a stale one."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import pytest
import torch
from helpers import assert_follows
from torch import Tensor, nn

import fastadapt
from bench.calls import CASES, call_of
from bench.road import room_of
from fastadapt import AdapterForm
from fastadapt.functional import adapter_linear, adapter_linear_group
from fastadapt.methods import row_norm
from fastadapt.operators.adapter_linear import plan
from fastadapt.reference import adapter_linear_reference


@pytest.fixture(autouse=True)
def no_plans() -> Iterator[None]:
    plan.forget()
    yield
    plan.forget()


class Call:
    """Everything that a call is made of, each to be changed by a test."""

    def __init__(self, n: int = 6, k: int = 10, r: int = 3, m: int = 5) -> None:
        torch.manual_seed(0)
        self.x = torch.randn(m, k).requires_grad_()
        self.weight = torch.randn(n, k)
        self.A, self.B = torch.randn(r, k).requires_grad_(), torch.randn(n, r).requires_grad_()
        self.more: dict[str, Any] = {"bias": torch.randn(n), "out_scale": 2.0}
        self.options: dict[str, Any] = {}
        self.autocast = False
        self.grad = True

    def __call__(self) -> list[Tensor | None]:
        """The output and the gradients."""
        form = AdapterForm(self.A, self.B, **self.more)
        torch.manual_seed(1)
        with torch.set_grad_enabled(self.grad), torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            y = adapter_linear(self.x, self.weight, form, **self.options)
        leaves = [self.x, self.A, self.B, *[v for v in self.more.values() if isinstance(v, Tensor)]]
        trained = [leaf for leaf in leaves if leaf.requires_grad]
        if not (self.grad and trained):
            return [y]
        return [y, *torch.autograd.grad(y, trained, torch.ones_like(y))]


def replaced(name: str, value: Callable[[Tensor], Tensor]) -> Callable[[Call], None]:
    def change(call: Call) -> None:  # behind the back of whoever knows a tensor by its identity
        tensor = getattr(call, name)
        tensor.data = value(tensor.data)

    return change


def trained(name: str, value: bool) -> Callable[[Call], None]:
    def change(call: Call) -> None:
        (call.more[name] if name in call.more else getattr(call, name)).requires_grad_(value)

    return change


def all_in(dtype: torch.dtype) -> Callable[[Call], None]:
    def change(call: Call) -> None:
        for name in ("x", "weight", "A", "B"):
            replaced(name, lambda value: value.to(dtype))(call)
        call.more["bias"] = call.more["bias"].to(dtype)

    return change


def with_rank(call: Call) -> None:
    replaced("A", lambda value: torch.cat([value, value]))(call)
    replaced("B", lambda value: torch.cat([value, value], 1))(call)


# What a plan depends on: one change of each, made to a call whose plan is kept.
CHANGES: dict[str, Callable[[Call], None]] = {
    "tokens": replaced("x", lambda value: torch.cat([value] * 9)),
    "many tokens": replaced("x", lambda value: torch.cat([value] * 200)),
    "dimensions of x": replaced("x", lambda value: value[None]),
    "dtype": all_in(torch.float64),
    "dtype of the base": all_in(torch.bfloat16),
    "dtype of a factor": replaced("A", lambda value: value.double()),
    "rank": with_rank,
    "autocast": lambda call: setattr(call, "autocast", True),
    "no grad": lambda call: setattr(call, "grad", False),
    "x trains": trained("x", False),
    "A trains": trained("A", False),
    "B trains": trained("B", False),
    "bias trains": trained("bias", True),
    "bias": lambda call: call.more.update(bias=None),
    "scalar h": lambda call: call.more.update(out_scale=3.0),
    "vector h": lambda call: call.more.update(out_scale=torch.full((6,), 3.0)),
    "0-d h": lambda call: call.more.update(out_scale=torch.tensor(3.0)),
    "scaling": lambda call: call.more.update(scaling=0.5),
    "mid scale": lambda call: call.more.update(mid_scale=torch.tensor([1.0, 2.0, 3.0])),
    "base scale": lambda call: call.more.update(base_scale=torch.full((6,), 0.5)),
    "U and V": lambda call: call.more.update(U=torch.ones(6, 1), V=torch.ones(1, 10)),
    "dropout": lambda call: call.options.update(dropout=0.5, training=True),
    "strategy": lambda call: call.options.update(strategy="recompose"),
    "backend": lambda call: call.options.update(backend="reference"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_of_what_a_plan_depends_on_is_seen(name: str) -> None:
    call = Call()
    call()
    CHANGES[name](call)
    found = call()
    plan.forget()
    for got, expected in zip(found, call(), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_equal_factors_of_a_group_are_told_from_shared_ones() -> None:
    x, weights = torch.randn(4, 10), [torch.randn(6, 10), torch.randn(6, 10)]
    A = torch.randn(3, 10)
    for second in (A, A.clone() * 2, A):
        forms = [AdapterForm(A, torch.randn(6, 3)), AdapterForm(second, torch.randn(6, 3))]
        for y, weight, form in zip(adapter_linear_group(x, weights, forms), weights, forms, strict=True):
            torch.testing.assert_close(y, adapter_linear_reference(x, weight, form))


def test_a_tied_scale_is_told_from_an_equal_one() -> None:
    call, g = Call(), torch.rand(6).requires_grad_()
    for h in (g, g.detach().clone().requires_grad_()):
        call.more |= {"out_scale": h, "base_scale": g}
        form = AdapterForm(call.A, call.B, **call.more)
        y = adapter_linear(call.x, call.weight, form)
        expected = adapter_linear_reference(call.x, call.weight, form)
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(
            torch.autograd.grad(y.sum(), g)[0], torch.autograd.grad(expected.sum(), g)[0], rtol=1e-4, atol=1e-5
        )


def test_values_may_change_without_a_new_plan() -> None:
    call = Call()
    call()
    kept = dict(plan._plans)
    with torch.no_grad():
        call.A.add_(1.0)
    form = AdapterForm(call.A, call.B, **call.more)
    torch.testing.assert_close(call()[0], adapter_linear_reference(call.x, call.weight, form))
    assert plan._plans == kept


def test_a_call_that_does_not_fit_is_refused_after_one_that_did() -> None:
    call = Call()
    call()
    replaced("B", lambda value: value[:, :2])(call)
    with pytest.raises(ValueError, match=r"form.B must have shape \[6, 3\]"):
        call()
    call = Call()
    call.weight.requires_grad_()
    with pytest.raises(ValueError, match="weight"):
        call()


def test_a_scaling_that_is_a_tensor_is_read_anew() -> None:
    call = Call()
    for value in (1.0, 3.0):
        call.more["scaling"] = torch.tensor(value)
        form = AdapterForm(call.A, call.B, **call.more)
        torch.testing.assert_close(call()[0], adapter_linear_reference(call.x, call.weight, form))


def test_plans_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "_MOST", 4)
    for tokens in range(1, 12):
        adapter_linear(torch.randn(tokens, 10), torch.randn(6, 10), AdapterForm(torch.randn(3, 10), torch.randn(6, 3)))
        assert len(plan._plans) <= 4


@pytest.mark.parametrize("shape", [(7, 10), (2, 3, 10), (10,), (0, 10)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("biased", [False, True])
def test_lora_by_itself_meets_the_criterion(shape: tuple[int, ...], dtype: torch.dtype, biased: bool) -> None:
    """Alone and as a group: the outputs, and every gradient."""
    torch.manual_seed(0)
    members = [(torch.randn(n, 10), torch.randn(r, 10), torch.randn(n, r), torch.randn(n)) for n, r in ((6, 3), (4, 5))]
    x = torch.randn(shape)

    def run(function: Callable[..., Any], to: torch.dtype) -> dict[str, Tensor]:
        leaf = x.to(to).requires_grad_()
        forms = [
            AdapterForm(
                A.to(to, copy=True).requires_grad_(),
                B.to(to, copy=True).requires_grad_(),
                scaling=0.7,
                bias=b.to(to, copy=True).requires_grad_() if biased else None,
            )
            for _, A, B, b in members
        ]
        ys = function(leaf, [weight.to(to) for weight, *_ in members], forms)
        trained = [leaf, *[t for form in forms for t in (form.A, form.B, form.bias) if t is not None]]
        grads = torch.autograd.grad(ys, trained, [torch.ones_like(y) for y in ys])
        return {str(index): value.detach() for index, value in enumerate((*ys, *grads))}

    def one_by_one(function: Callable[..., Tensor]) -> Callable[..., list[Tensor]]:
        return lambda x, weights, forms: [function(x, *pair) for pair in zip(weights, forms, strict=True)]

    for function in (adapter_linear_group, one_by_one(adapter_linear)):
        found = run(function, dtype)
        assert {value.dtype for value in found.values()} == {dtype}
        assert_follows(found, lambda to: run(one_by_one(adapter_linear_reference), to), dtype)


def test_a_double_backward_is_refused() -> None:
    call = Call()
    y = adapter_linear(call.x, call.weight, AdapterForm(call.A, call.B))
    (dx,) = torch.autograd.grad(y.square().sum(), call.x, create_graph=True)
    with pytest.raises(ValueError, match="not be differentiated again"):
        dx.sum().backward()


def dora() -> Any:
    torch.manual_seed(0)
    model = fastadapt.inject(nn.Sequential(nn.Linear(10, 6)), fastadapt.DoRAConfig(r=3, target_modules=["0"]))
    adapter = model[0].adapters["default"]
    with torch.no_grad():
        adapter.lora_B.normal_()
    return model.train(), adapter


def norms_made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    made: list[int] = []
    run = row_norm.weight_norm
    monkeypatch.setattr(row_norm, "weight_norm", lambda *args, **named: made.append(1) or run(*args, **named))
    return made


def test_a_norm_is_kept_while_gradients_accumulate(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = dora()
    made = norms_made(monkeypatch)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, fused=True)
    for step in range(3):
        for _ in range(4):
            x = torch.randn(5, 10)
            model(x).sum().backward()
        assert len(made) == step + 1
        optimizer.step()
        optimizer.zero_grad()


def test_a_norm_is_kept_when_a_checkpoint_runs_again(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.utils.checkpoint import checkpoint

    model, _ = dora()
    made = norms_made(monkeypatch)
    checkpoint(model, torch.randn(5, 10), use_reentrant=False).sum().backward()
    assert len(made) == 1


WRITES: dict[str, Callable[[Any], None]] = {
    "in place": lambda adapter: adapter.lora_B.data.add_(1.0),
    "by NumPy": lambda adapter: adapter.lora_A.detach().numpy().__iadd__(1.0),
    "a new tensor": lambda adapter: setattr(adapter.lora_B, "data", adapter.lora_B.data + 1.0),
    "a new parameter": lambda adapter: setattr(adapter, "lora_A", nn.Parameter(adapter.lora_A.detach() + 1.0)),
    "the scaling": lambda adapter: setattr(adapter, "scaling", adapter.scaling * 2),
}


@pytest.mark.parametrize("name", WRITES)
def test_no_write_to_a_factor_leaves_an_old_norm_in_training(name: str) -> None:
    model, adapter = dora()
    x = torch.randn(5, 10)
    model(x).sum().backward()
    WRITES[name](adapter)
    with torch.no_grad():
        found = model(x)
        form = model[0].form()
        weight = model[0].base_layer.weight
        norm = (weight.double() + adapter.scaling * adapter.lora_B.double() @ adapter.lora_A.double()).norm(dim=1)
    torch.testing.assert_close(form.base_scale.double(), adapter.lora_magnitude_vector.double() / norm)
    torch.testing.assert_close(found, adapter_linear_reference(x, weight, form))


def calls_in_package(run: Callable[[], object]) -> int:
    """How many of the package's own functions a run calls."""
    count = 0

    def watch(frame: FrameType, event: str, _: Any) -> None:
        nonlocal count
        count += event == "call" and room_of(frame) is not None

    sys.setprofile(watch)
    try:
        run()
    finally:
        sys.setprofile(None)
    return count


# Python functions of ours in a forward, and in a forward and backward: what a call costs on a CPU, and on a GPU where
# it waits for the host. Lower them where a change earns it.
MOST_CALLS = {"lora": (35, 47), "qkv": (167, 196), "dora": (65, 105), "vera": (49, 82)}


@pytest.mark.parametrize("name", MOST_CALLS)
def test_a_call_takes_few_steps(name: str) -> None:
    for phase, most in zip(("forward", "both"), MOST_CALLS[name], strict=True):
        call = call_of(CASES[name], "ours", phase)  # type: ignore[arg-type]
        for _ in range(3):
            call()
        assert calls_in_package(call) <= most, phase


@pytest.mark.parametrize("scale", [None, "mid"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_few_rows_of_16_bits_are_rounded_once(dtype: torch.dtype, scale: str | None) -> None:
    """Thin products of few rows run in fp32: beside an empty base all that rounds is the result and dx."""
    torch.manual_seed(0)
    x, dy = torch.randn(8, 64).to(dtype).requires_grad_(), torch.randn(8, 48).to(dtype)
    A, B = torch.randn(4, 64, requires_grad=True), torch.randn(48, 4, requires_grad=True)
    d = None if scale is None else torch.rand(4)
    weight = torch.zeros(48, 64, dtype=dtype)
    y = adapter_linear(x, weight, AdapterForm(A, B, d, 2.0))
    grads = torch.autograd.grad(y, (x, A, B), dy)

    own = [tensor.detach().float().requires_grad_() for tensor in (x, A, B)]
    u = own[0] @ own[1].T
    exact = 2.0 * ((u if d is None else u * d) @ own[2].T)
    for got, expected in zip((y, *grads), (exact, *torch.autograd.grad(exact, own, dy.float())), strict=True):
        # What is kept for the backward, u for dB, is in x's dtype unless the form is LoRA by itself.
        eps = torch.finfo(dtype if d is not None and got is grads[2] else got.dtype).eps
        assert (got - expected).abs().max() <= 2 * eps * expected.abs().max()
