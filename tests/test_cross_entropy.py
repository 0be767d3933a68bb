"""A head's loss in chunks: that of all logits at once, its gradients too, and never more than a chunk of logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_follows
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastadapt.functional import linear_cross_entropy
from fastadapt.operators import cross_entropy
from fastadapt.reference import AdapterForm, adapter_linear_reference

M, K, V, R = 13, 10, 31, 3
CHUNK = 4 * 8 * V  # four rows of fp64 logits, eight of fp32

FORMS: dict[str, Callable[..., AdapterForm]] = {
    "LoRA": lambda A, B, d, h, g, b: AdapterForm(A, B, out_scale=0.7, bias=b),
    "rsLoRA without a bias": lambda A, B, d, h, g, b: AdapterForm(A, B, out_scale=2 / R**0.5),
    "DoRA": lambda A, B, d, h, g, b: AdapterForm(A, B, None, g, g, b, dropout_on_base=True, scaling=0.7),
    "VeRA": lambda A, B, d, h, g, b: AdapterForm(A, B, d, h, bias=b),
    "all scales": lambda A, B, d, h, g, b: AdapterForm(A, B, d, h, g, b),
}
AFTER: dict[str, dict[str, Any]] = {
    "as they are": {},
    "scaled": {"scale": 0.3},
    "softcap": {"softcap": 1.5},
    "scaled softcap, smoothed": {"scale": 2.0, "softcap": 2.5, "label_smoothing": 0.2},
}


def operands(dtype: torch.dtype = torch.float64, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"x": (M, K), "weight": (V, K), "A": (R, K), "B": (V, R), "d": (R,), "h": (V,), "g": (V,), "b": (V,)}
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for name, shape in shapes.items()
    }


def targets() -> Tensor:
    labels = torch.randint(V, (M,), generator=torch.Generator().manual_seed(1))
    labels[[0, 5, 6, 12]] = -100
    return labels


def form_of(name: str, given: dict[str, Tensor]) -> AdapterForm:
    return FORMS[name](*[given[key] for key in "ABdhgb"])


def whole(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    form: AdapterForm | None = None,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    num_items: float | None = None,
    **options: Any,
) -> Tensor:
    """The loss of all logits at once."""
    y = F.linear(x, weight, bias) if form is None else adapter_linear_reference(x, weight, form)
    z = scale * y.to(torch.promote_types(y.dtype, torch.float32))
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    if num_items is not None:
        return F.cross_entropy(z, labels, reduction="sum", **options) / num_items
    return F.cross_entropy(z, labels, **options)


def results(
    loss: Callable[..., Tensor], given: dict[str, Tensor], form: str | None, **options: Any
) -> dict[str, Tensor]:
    """The loss and the gradients of all that it depends on, by name."""
    own = {name: tensor.detach().clone().requires_grad_() for name, tensor in given.items()}
    if form is None:
        value = loss(own["x"], own["weight"], targets(), bias=own["b"], **options)
    else:
        own["weight"].requires_grad_(False)
        value = loss(own["x"], own["weight"], targets(), form=form_of(form, own), **options)
    (value * torch.linspace(1, 2, value.numel()).view(value.shape).to(value.dtype)).sum().backward()
    return {"loss": value.detach(), **{name: t.grad for name, t in own.items() if t.grad is not None}}


@pytest.mark.parametrize("after", AFTER)
@pytest.mark.parametrize("form", [None, *FORMS])
def test_it_is_the_loss_of_all_logits(form: str | None, after: str) -> None:
    given = operands()
    for reduction in ({}, {"reduction": "sum"}, {"reduction": "none"}, {"num_items": 5}):
        options: dict[str, Any] = {**AFTER[after], **reduction}
        ours, wanted = (results(one, given, form, **options) for one in (in_chunks, whole))
        assert ours.keys() == wanted.keys()
        for name, value in wanted.items():
            torch.testing.assert_close(ours[name], value, msg=lambda text, n=name, o=options: f"{n} {o}: {text}")


def in_chunks(*args: Any, **options: Any) -> Tensor:
    return linear_cross_entropy(*args, chunk_bytes=CHUNK, **options)


@pytest.mark.parametrize("form", [None, *FORMS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_its_error_is_that_of_the_formula(form: str | None, dtype: torch.dtype) -> None:
    given = operands(dtype)
    formula = lambda kind: results(whole, {name: t.to(kind) for name, t in given.items()}, form)  # noqa: E731
    assert_follows(results(in_chunks, given, form), formula, dtype)


@pytest.mark.parametrize("form", [None, "LoRA", "DoRA"])
def test_autocast_and_factors_in_fp32(form: str | None) -> None:
    given = operands(torch.float32)

    def run(**options: Any) -> dict[str, Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            return results(linear_cross_entropy, given, form, **options)

    found = run(chunk_bytes=CHUNK)
    assert all(tensor.dtype is torch.float32 for tensor in found.values())
    exact = results(whole, operands(), form)
    for name, value in run(backend="reference").items():  # as far from the exact ones as chunks may be
        error = (value - exact[name]).abs().max()
        assert (found[name] - exact[name]).abs().max() <= 2 * error + 2**-8 * exact[name].abs().max(), name


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("form", FORMS)
def test_gradients_are_those_of_the_forward_s_own_mask(form: str, reduction: str) -> None:
    given = operands()
    names = [name for name in given if name != "weight"]

    def loss(*tensors: Tensor) -> Tensor:
        own = dict(zip(names, tensors, strict=True))
        torch.manual_seed(7)
        options: dict[str, Any] = {"dropout": 0.4, "training": True, "reduction": reduction, "softcap": 3.0}
        return in_chunks(own["x"], given["weight"], targets(), form=form_of(form, own), **options)

    inputs = [given[name].requires_grad_() for name in names]
    assert torch.autograd.gradcheck(loss, inputs)
    torch.manual_seed(7)
    dropped = loss(*inputs)
    assert not torch.allclose(
        dropped, in_chunks(given["x"], given["weight"], targets(), form=form_of(form, given), reduction=reduction)
    )


class Largest(TorchDispatchMode):
    """Inside, notes the largest tensor that an operation makes with as many columns as there are logits."""

    rows = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for tensor in found if isinstance(found, (tuple, list)) else [found]:
            if isinstance(tensor, Tensor) and tensor.dim() == 2 and tensor.shape[1] == V:
                self.rows = max(self.rows, tensor.shape[0])
        return found


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("form", [None, "LoRA", "DoRA"])
def test_no_more_than_a_chunk_of_logits_is_ever_there(form: str | None, reduction: str) -> None:
    given, rows = operands(torch.float32), 11  # the weight turned round has K = 10
    given["x"], labels = torch.randn(40, K), torch.arange(40) % V
    saved: list[Tensor] = []

    def chunks(x: Tensor, weight: Tensor, _: Tensor, **options: Any) -> Tensor:
        return linear_cross_entropy(x, weight, labels, chunk_bytes=rows * V * 4, **options)

    def at_once(x: Tensor, weight: Tensor, _: Tensor, **options: Any) -> Tensor:
        return whole(x, weight, labels, **options)

    for loss, most in ((chunks, range(1, rows + 1)), (at_once, [40])):
        saved.clear()
        with Largest() as largest, torch.autograd.graph.saved_tensors_hooks(note(saved), lambda t: t):
            results(loss, given, form, softcap=2.0, reduction=reduction)
        assert largest.rows in most
        assert any(tensor.shape == (40, V) for tensor in saved) == (loss is at_once)
    with Largest() as largest, torch.no_grad():
        chunks(given["x"], given["weight"], labels, form=form_of("DoRA", given), reduction=reduction)
    assert largest.rows in range(1, rows + 1)


def note(saved: list[Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda tensor: (saved.append(tensor), tensor)[1]


def test_an_ignored_token_is_not_projected() -> None:
    given = operands()
    given["x"][[0, 5, 6, 12]] = float("nan")
    found = results(in_chunks, given, "DoRA")
    assert all(torch.isfinite(value).all() for value in found.values())
    assert not found["x"][[0, 5, 6, 12]].any()


def test_where_every_label_is_ignored() -> None:
    given = operands()
    x, A = given["x"].requires_grad_(), given["A"].requires_grad_()
    form = form_of("LoRA", given)
    labels = torch.full((M,), -100)
    assert in_chunks(x, given["weight"], labels, form=form).isnan()
    total = in_chunks(x, given["weight"], labels, form=form, reduction="sum")
    total.backward()
    assert total.item() == 0.0
    assert not x.grad.any()  # type: ignore[union-attr]
    assert not A.grad.any()  # type: ignore[union-attr]


def test_leading_dimensions_and_another_ignored_label() -> None:
    given = operands()
    x, labels = given["x"][:12].view(3, 4, K), torch.arange(12).view(3, 4)
    wanted = F.cross_entropy((x @ given["weight"].T).flatten(0, 1), labels.flatten(), ignore_index=3, reduction="none")
    found = in_chunks(x, given["weight"], labels, ignore_index=3, reduction="none")
    torch.testing.assert_close(found, wanted.view(3, 4))
    assert found[0, 3] == 0


def test_a_backward_can_run_again_but_not_be_differentiated() -> None:
    given = operands()
    x = given["x"].requires_grad_()
    loss = in_chunks(x, given["weight"], targets())
    first, second = (torch.autograd.grad(loss, x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(ValueError, match="can be taken once"):
        gradient.sum().backward()


def test_compiled_code_gives_the_same() -> None:
    given = operands(torch.float32)
    run = torch.compile(lambda *args, **options: linear_cross_entropy(*args, **options), backend="aot_eager")
    ours, wanted = (results(one, given, "DoRA", softcap=2.0) for one in (run, whole))
    for name, value in wanted.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=1e-5)


WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "labels": ({"labels": torch.zeros(M - 1, dtype=torch.int64)}, ValueError, r"labels must have shape \[13\]"),
    "probabilities": ({"labels": torch.zeros(M)}, TypeError, "labels must be of torch.int64"),
    "a label above": ({"labels": torch.full((M,), V)}, ValueError, r"labels must lie in \[0, 31\) .* got 31"),
    "a label below": ({"labels": torch.full((M,), -1)}, ValueError, r"labels must lie in \[0, 31\) .* got -1"),
    "x": ({"x": torch.zeros(M, K + 1, dtype=torch.float64)}, ValueError, r"x must have shape \[\.\.\., 10\]"),
    "a dtype": ({"x": torch.zeros(M, K)}, TypeError, "weight must have x's dtype"),
    "a bias": ({"bias": torch.zeros(V - 1)}, ValueError, r"bias must have shape \[31\]"),
    "a bias beside a form": ({"bias": torch.zeros(V), "form": "LoRA"}, ValueError, "give it as form.bias"),
    "a weight that trains": ({"form": "LoRA", "trains": True}, ValueError, "weight must be frozen"),
    "a form": ({"form": "short"}, ValueError, "form.A must have shape"),
    "a reduction": ({"reduction": "max"}, ValueError, "reduction must be one of mean, sum, none"),
    "num_items": ({"num_items": 3, "reduction": "sum"}, ValueError, "num_items is what"),
    "smoothing": ({"label_smoothing": 1.5}, ValueError, r"label_smoothing must be in \[0, 1\]"),
    "softcap": ({"softcap": 0.0}, ValueError, "softcap must be above 0"),
    "chunk_bytes": ({"chunk_bytes": 0}, ValueError, "chunk_bytes must be at least 1"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_fit_is_named(case: str) -> None:
    options, kind, words = WRONG[case]
    given = operands()
    given["short"] = given["A"][:, 1:]
    arguments: dict[str, Any] = {"x": given["x"], "weight": given["weight"], "labels": targets(), **options}
    if arguments.pop("trains", False):
        arguments["weight"].requires_grad_()
    if arguments.get("form") == "LoRA":
        arguments["form"] = form_of("LoRA", given)
    elif "form" in arguments:
        arguments["form"] = AdapterForm(given["short"], given["B"])
    with pytest.raises(kind, match=words):
        linear_cross_entropy(**arguments)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("weight_trains", [False, True])
def test_liger_s_kernel(weight_trains: bool, bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it takes over on a GPU, its own code run by the interpreter: the same loss and gradients."""
    pytest.importorskip("liger_kernel")
    if torch.cuda.is_available():
        pytest.skip("on a GPU every other test here has run it")
    torch.manual_seed(0)
    x, weight, labels = torch.randn(3, 5, 16), torch.randn(40, 16), torch.randint(40, (3, 5))
    labels[0, :2] = -100
    tensors = [x.requires_grad_(), weight.requires_grad_(weight_trains)]
    if bias:
        tensors.append(torch.randn(40, requires_grad=weight_trains))

    def results() -> list[Tensor]:
        loss = linear_cross_entropy(x, weight, labels, bias=tensors[2] if bias else None, num_items=7)
        return [loss, *torch.autograd.grad(loss, [tensor for tensor in tensors if tensor.requires_grad])]

    wanted = results()
    taken: list[Any] = []
    monkeypatch.setattr(cross_entropy._Head, "is_liger_s", lambda head, rows: taken.append(rows) or True)
    for found, value in zip(results(), wanted, strict=True):
        torch.testing.assert_close(found, value)
    assert len(taken) == 1
