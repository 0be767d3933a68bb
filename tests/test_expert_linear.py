"""Adapters on experts: values and every gradient, both ways of multiplying, what is kept, and what is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from helpers import assert_follows, guarded, layout_is_told
from torch import Tensor

from fastadapt import ExpertForm, ExpertProjection
from fastadapt.functional import expert_block, expert_linear
from fastadapt.operators.dropout import draw_dropout, keep_probability
from fastadapt.operators.expert_linear import op, segments
from fastadapt.operators.expert_linear.function import experts_of
from fastadapt.operators.expert_linear.parameters import Keep, Saved, Wants
from fastadapt.operators.masks import dropout_mask
from fastadapt.reference import expert_linear_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ("eager", "triton")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Values = dict[str, Tensor]
# What a form can have beside A and B. "shared": one pair for all experts; "dora": the norm is made.
FORMS: dict[str, tuple[str, ...]] = {
    "LoRA": (),
    "LoRA with a bias": ("bias",),
    "VeRA": ("mid_scale", "out_scale", "shared"),
    "DoRA": ("base_scale", "bias", "dora", "on_base"),
    "given norms": ("base_scale", "bias", "tied", "on_base"),
    "every part": ("mid_scale", "out_scale", "base_scale", "bias"),
    "every part, dropped before the base": ("mid_scale", "out_scale", "base_scale", "bias", "on_base"),
}
# The rows of each expert: none, some and all of them.
SPLITS: dict[str, list[int]] = {
    "some": [3, 0, 5, 1],
    "the first and the last are empty": [0, 4, 5, 0],
    "all at one": [0, 0, 9, 0],
    "no rows": [0, 0, 0, 0],
}


def operands(split: list[int], k: int, n: int, r: int, dtype: torch.dtype, factors: torch.dtype) -> Values:
    """g of 0 and 1e-3, h of 0, a bias that is large beside y."""
    generator = torch.Generator().manual_seed(k + n + r)
    count = len(split)

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=generator) * std

    values = {
        "x": normal(sum(split), k).to(dtype),
        "weight": normal(count, n, k, std=k**-0.5).to(dtype),
        "A": normal(count, r, k, std=k**-0.5).to(factors),
        "B": normal(count, r, n).to(factors),
        "mid_scale": normal(count, r).to(factors),
        "out_scale": normal(count, n).to(factors),
        "base_scale": normal(count, n).to(factors),
        "bias": normal(count, n, std=20.0).to(factors),
    }
    values["base_scale"][:, :2] = torch.tensor([0.0, 1e-3])
    values["out_scale"][:, 2] = 0.0
    return {name: value.to(DEVICE) for name, value in values.items()}


def ends(split: list[int]) -> Tensor:
    return torch.tensor(split, device=DEVICE).cumsum(0)


def form_of(values: Values, parts: tuple[str, ...]) -> ExpertForm:
    g = values["base_scale"] if "base_scale" in parts else None
    tied = "tied" in parts or "dora" in parts
    first = slice(1) if "shared" in parts else slice(None)
    weight = values["weight"].detach()
    squares = weight.to(torch.promote_types(weight.dtype, torch.float32)).square().sum(2) if "dora" in parts else None
    return ExpertForm(
        values["A"][first],
        values["B"][first],
        values["mid_scale"] if "mid_scale" in parts else None,
        g if tied and g is not None else values["out_scale"] if "out_scale" in parts else 1.0,
        g,
        values["bias"] if "bias" in parts else None,
        "on_base" in parts,
        0.5,
        squares,
    )


def wanted(parts: tuple[str, ...]) -> list[str]:
    return ["x", "A", "B", *[part for part in parts if part in ("mid_scale", "out_scale", "base_scale", "bias")]]


def results(call: Callable[[Values], Tensor], values: Values, parts: tuple[str, ...], dy: Tensor) -> Values:
    leaves = {name: value.detach().clone().requires_grad_(name != "weight") for name, value in values.items()}
    y = call(leaves)
    y.backward(dy.to(y.dtype))
    found = {"y": y.detach()}
    for name in wanted(parts):
        grad = leaves[name].grad
        assert grad is not None, name
        assert grad.dtype == leaves[name].dtype
        found[name] = grad
    return found


@contextmanager
def without_grouped_mm() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(segments, "takes_grouped_mm", lambda *_: False)
        yield


def check(
    split: list[int],
    sizes: tuple[int, int, int],
    name: str,
    dtype: torch.dtype,
    factors: torch.dtype,
    p: float,
    backend: str,
) -> None:
    values, parts = operands(split, *sizes, dtype, factors), FORMS[name]
    dy = torch.randn(sum(split), sizes[1], generator=torch.Generator().manual_seed(9)).to(DEVICE, dtype)
    torch.manual_seed(3)
    mask = dropout_mask(draw_dropout(values["x"], p, "eager"), values["x"].shape) if p else None

    def ours(leaves: Values) -> Tensor:
        torch.manual_seed(3)
        form = form_of(leaves, parts)
        return expert_linear(leaves["x"], leaves["weight"], form, ends(split), dropout=p, backend=backend)

    def formula(dtype: torch.dtype) -> Values:
        cast = {key: value.to(dtype) for key, value in values.items()}
        q = 1.0 - keep_probability(p, "eager") if p else 0.0

        def run(leaves: Values) -> Tensor:
            form = form_of(leaves, parts)
            return expert_linear_reference(leaves["x"], leaves["weight"], form, ends(split).tolist(), mask=mask, p=q)

        return results(run, cast, parts, dy.to(dtype))

    assert_follows(results(ours, values, parts, dy), formula, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("p", [0.0, 0.4])
def test_values_and_gradients(split: str, name: str, p: float, backend: str) -> None:
    check(SPLITS[split], (16, 12, 4), name, torch.float32, torch.float32, p, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("sizes", [(20, 12, 3), (33, 7, 1), (64, 48, 16)])
def test_dtypes_and_sizes(dtype: torch.dtype, name: str, sizes: tuple[int, int, int], backend: str) -> None:
    """Odd ones, of which rows are not aligned, beside those that grouped_mm takes; fp32 factors beside 16 bits."""
    check(SPLITS["some"], sizes, name, dtype, torch.float32, 0.0, backend)


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("p", [0.0, 0.4])
def test_both_ways_of_multiplying_agree(name: str, p: float) -> None:
    split = SPLITS["some"]
    values, parts = operands(split, 32, 24, 8, torch.float32, torch.float32), FORMS[name]
    if hasattr(torch.nn.functional, "grouped_mm"):  # else there is one way alone
        assert segments.takes_grouped_mm(values["x"], values["weight"].mT)
    dy = torch.randn(sum(split), 24, device=DEVICE)

    def run(leaves: Values) -> Tensor:
        torch.manual_seed(3)
        form = form_of(leaves, parts)
        return expert_linear(leaves["x"], leaves["weight"], form, ends(split), dropout=p, backend="eager")

    ours = results(run, values, parts, dy)
    with without_grouped_mm():
        other = results(run, values, parts, dy)
    for key, value in ours.items():
        torch.testing.assert_close(value, other[key], msg=key)


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("p", [0.0, 0.4])
def test_gradcheck(name: str, p: float) -> None:
    split, parts = [2, 0, 3], FORMS[name]
    values = operands(split, 6, 5, 3, torch.float64, torch.float64)
    names = wanted(tuple(part for part in parts if part != "dora"))
    # DoRA's norm is a constant for the gradient, and no finite difference is.
    parts = tuple("tied" if part == "dora" else part for part in parts)
    leaves = [values[key].requires_grad_() for key in names]

    def function(*tensors: Tensor) -> Tensor:
        torch.manual_seed(3)
        leaves = {**values, **dict(zip(names, tensors, strict=True))}
        return expert_linear(leaves["x"], leaves["weight"], form_of(leaves, parts), ends(split), dropout=p)

    assert torch.autograd.gradcheck(function, leaves)


def test_transposed_weights_are_views() -> None:
    split = SPLITS["some"]
    values = operands(split, 16, 12, 4, torch.float32, torch.float32)
    form = form_of(values, ())
    stored = values["weight"].mT.contiguous()
    y = expert_linear(values["x"], values["weight"], form, ends(split))
    torch.testing.assert_close(expert_linear(values["x"], stored.mT, form, ends(split)), y)


def test_without_a_form_it_is_the_layer() -> None:
    split = SPLITS["some"]
    values = operands(split, 16, 12, 4, torch.float32, torch.float32)
    y = expert_linear(values["x"], values["weight"], None, ends(split), bias=values["bias"])
    for e, (part, rows) in enumerate(zip(values["x"].split(split), y.split(split), strict=True)):
        torch.testing.assert_close(rows, part @ values["weight"][e].T + values["bias"][e])


def test_what_lies_around_the_operands_is_not_read() -> None:
    split = SPLITS["some"]
    values, parts = operands(split, 16, 12, 4, torch.float32, torch.float32), FORMS["every part"]
    inside = {name: guarded(value) for name, value in values.items()}
    dy = torch.randn(sum(split), 12, device=DEVICE)

    def run(leaves: Values) -> Tensor:
        return expert_linear(leaves["x"], leaves["weight"], form_of(leaves, parts), ends(split))

    def straight(leaves: Values) -> Values:
        y = run(leaves)
        return {"y": y, **dict(zip("xAB", torch.autograd.grad(y, [leaves[n] for n in "xAB"], dy), strict=True))}

    for name in "xAB":
        values[name].requires_grad_()
        inside[name].requires_grad_()
    other = straight(values)
    for name, value in straight(inside).items():
        torch.testing.assert_close(value, other[name], msg=name)


class Block:
    """Operands of a block of experts with adapters on both products, in gpt-oss's layout or in Mixtral's."""

    def __init__(self, dtype: torch.dtype, *, tokens: int = 7, kind: str = "LoRA", k: int = 16, n: int = 8) -> None:
        generator = torch.Generator().manual_seed(0)
        self.count, self.top, self.n, r = 5, 2, n, 4

        def normal(*shape: int, std: float = 1.0) -> Tensor:
            return (torch.randn(*shape, generator=generator) * std).to(DEVICE, dtype)

        count = self.count
        self.weights = normal(count, 2 * n, k, std=k**-0.5), normal(count, k, n, std=n**-0.5)
        # Of five experts one gets no token.
        self.experts = torch.rand(tokens, count - 1, generator=generator).argsort(1)[:, : self.top].to(DEVICE)
        self.leaves = {"x": normal(tokens, k), "routing": normal(tokens, self.top).abs()}
        self.kind = kind
        for side, weight in zip(("up", "down"), self.weights, strict=True):
            _, out, features = weight.shape
            self.leaves |= {
                f"{side}_A": normal(count, r, features, std=0.3),
                f"{side}_B": normal(count, r, out, std=0.3),
                f"{side}_bias": normal(count, out),
                f"{side}_m": weight.norm(dim=2) * 1.1,
            }

    def names(self) -> list[str]:
        parts = ["A", "B", "bias"] + (["m"] if self.kind == "DoRA" else [])
        return ["x", "routing", *[f"{side}_{part}" for side in ("up", "down") for part in parts]]

    def sides(self, leaves: Values, p: float) -> tuple[ExpertProjection, ExpertProjection]:
        found = []
        for side, weight in zip(("up", "down"), self.weights, strict=True):
            A, B, bias, m = (leaves[f"{side}_{part}"] for part in ("A", "B", "bias", "m"))
            form = ExpertForm(A, B, bias=bias, scaling=0.5)
            if self.kind == "DoRA":
                squares = weight.square().sum(2)
                form = form._replace(out_scale=m, base_scale=m, dropout_on_base=True, base_squared=squares)
            found.append(ExpertProjection(weight, form, None, p))
        return found[0], found[1]

    def gate(self, h: Tensor) -> Tensor:
        gate, up = h[..., : self.n], h[..., self.n :]
        return torch.nn.functional.silu(gate) * up

    def __call__(self, leaves: Values, p: float = 0.0, backend: str = "auto", **options: Any) -> Tensor:
        torch.manual_seed(5)
        return self.run(leaves, p, backend, **options)

    def run(self, leaves: Values, p: float = 0.0, backend: str = "auto", **options: Any) -> Tensor:
        up, down = self.sides(leaves, p)
        x, routing = leaves["x"], leaves["routing"]
        return expert_block(x, self.experts, routing, up, self.gate, down, backend=backend, **options)

    def grads(self, p: float = 0.0, backend: str = "auto") -> Values:
        leaves = {name: value.detach().clone().requires_grad_() for name, value in self.leaves.items()}
        y = self(leaves, p, backend)
        names = self.names()
        found = torch.autograd.grad(y.sin().sum(), [leaves[name] for name in names])
        return {"y": y.detach(), **dict(zip(names, found, strict=True))}


@pytest.mark.parametrize("kind", ["LoRA", "DoRA"])
@pytest.mark.parametrize("tokens", [0, 1, 7])
def test_a_block_is_its_formula(kind: str, tokens: int) -> None:
    block = Block(torch.float64, kind=kind, tokens=tokens)
    if not tokens:
        assert block(block.leaves).shape == (0, 16)
        return
    expected = block.grads(backend="reference")
    for name, value in block.grads().items():
        torch.testing.assert_close(value, expected[name], msg=name)


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_gradcheck_of_a_block(p: float) -> None:
    block = Block(torch.float64, tokens=3, k=4, n=3)
    names = block.names()

    def function(*tensors: Tensor) -> Tensor:
        return block(dict(zip(names, tensors, strict=True)) | {"up_m": block.leaves["up_m"], "down_m": tensors[0]}, p)

    assert torch.autograd.gradcheck(function, [block.leaves[name].requires_grad_() for name in names])


@pytest.mark.parametrize("kind", ["LoRA", "DoRA"])
def test_a_block_under_dropout_is_right_to_first_order(kind: str) -> None:
    """DoRA's norm is a constant, so a step along the gradient of m and x alone tells whether the gradient is right."""
    block = Block(torch.float64, kind=kind)
    found = block.grads(p=0.4)
    step = 1e-6
    for name in ("x", "routing", "up_bias", "down_bias", *(("up_m", "down_m") if kind == "DoRA" else ())):
        direction = torch.randn_like(block.leaves[name])
        sides = [
            block({**block.leaves, name: block.leaves[name] + sign * step * direction}, p=0.4).sin().sum()
            for sign in (1, -1)
        ]
        slope = (sides[0] - sides[1]) / (2 * step)
        torch.testing.assert_close((found[name] * direction).sum(), slope, rtol=1e-5, atol=1e-7, msg=name)


def kept(run: Callable[[], Tensor], without: list[Tensor]) -> int:
    """Elements that a forward keeps for its backward, without those of these tensors."""
    known, found = {tensor.untyped_storage().data_ptr() for tensor in without}, {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.is_floating_point() and tensor.untyped_storage().data_ptr() not in known:
            found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = run()
    assert y.requires_grad
    return sum(found.values())


def test_a_block_keeps_one_product_and_two_thin_ones() -> None:
    block = Block(torch.float32)
    leaves = {name: value.requires_grad_(name in block.names()) for name, value in block.leaves.items()}
    rows, r = 7 * block.top, 4
    assert kept(lambda: block(leaves), [*leaves.values(), *block.weights]) == rows * (2 * block.n + 2 * r)
    with torch.no_grad():
        assert not block(leaves).requires_grad


def test_a_frozen_block_keeps_what_its_gate_needs() -> None:
    block = Block(torch.float32)
    x = block.leaves["x"].requires_grad_()
    up, down = (ExpertProjection(weight) for weight in block.weights)

    def run() -> Tensor:
        return expert_block(x, block.experts, block.leaves["routing"], up, block.gate, down)

    assert kept(run, [x, block.leaves["routing"], *block.weights]) == 7 * block.top * 2 * block.n


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
def test_a_linear_of_experts_keeps_what_it_needs(backend: str) -> None:
    split = SPLITS["some"]
    values = operands(split, 16, 12, 4, torch.float32, torch.float32)
    for name in ("A", "B"):
        values[name].requires_grad_()
    x, weight = values["x"], values["weight"]
    own = list(values.values())
    run = lambda form: expert_linear(x, weight, form, ends(split), backend=backend)  # noqa: E731
    assert kept(lambda: run(form_of(values, ())), own) == sum(split) * 4
    values["B"].requires_grad_(False)
    assert kept(lambda: run(form_of(values, ())), own) == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_operators_tell_their_layout(backend: str) -> None:
    split, count = SPLITS["some"], 4
    values = operands(split, 16, 12, 4, torch.float32, torch.float32)
    offsets, dy = ends(split).int(), torch.randn(sum(split), 12, device=DEVICE)
    for parts in FORMS.values():
        experts = experts_of(values["weight"], form_of(values, parts), None)
        low = values["x"] * 2
        for x_dropped in (None, low):
            args: tuple[Any, ...] = (values["x"], x_dropped, offsets, experts, Keep(True, True), backend)
            layout_is_told(op.expert_linear.registered, tuple(op.expert_linear.flat(*args)))
            wants = Wants(True, x_dropped is not None, *[True] * 6)
            wants = wants._replace(out_scale="out_scale" in parts, mid_scale="mid_scale" in parts)
            made = experts._replace(base_squared=None)
            z = dy if "base_scale" in parts else None
            saved = Saved(low, torch.randn(sum(split), 4, device=DEVICE), z, None)
            args = (dy, offsets, made, saved, wants, backend)
            layout_is_told(op.expert_linear_backward.registered, tuple(op.expert_linear_backward.flat(*args)))
    assert count == len(values["weight"])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("p", [0.0, 0.4])
def test_compiled_in_one_graph(p: float, backend: str) -> None:
    """Under dropout the masks are others: that it runs and trains is what can be said."""
    block = Block(torch.float32)
    leaves = {name: value.requires_grad_(name in block.names()) for name, value in block.leaves.items()}
    compiled = torch.compile(lambda leaves: block.run(leaves, p, backend), fullgraph=True, backend="aot_eager")
    names = block.names()

    def grads(run: Callable[[Values], Tensor]) -> list[Tensor]:
        y = run(leaves)
        return [y, *torch.autograd.grad(y.sin().sum(), [leaves[name] for name in names])]

    ours = lambda leaves: block(leaves, backend=backend)  # noqa: E731
    found = grads(compiled)
    assert all([torch.isfinite(value).all() for value in found])
    if not p:
        for name, mine, other in zip(["y", *names], found, grads(ours), strict=True):
            torch.testing.assert_close(mine, other, msg=name)


def test_autocast_takes_the_weights_dtype() -> None:
    block = Block(torch.bfloat16)
    leaves = {name: value.float() if name in ("x", "routing") else value for name, value in block.leaves.items()}
    with torch.autocast(DEVICE, torch.bfloat16):
        y = block(leaves)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, block({**leaves, "x": leaves["x"].bfloat16()}).float(), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_same_bits_each_time(backend: str) -> None:
    block = Block(torch.float32, kind="DoRA")
    first, second = block.grads(backend=backend), block.grads(backend=backend)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "weight of two dimensions": ({"weight": torch.zeros(12, 16)}, r"weight must have shape \[experts, out, in\]"),
    "x": ({"x": torch.zeros(9, 3)}, r"x must have shape \[rows, 16\]"),
    "offsets": ({"offsets": torch.zeros(3, dtype=torch.int32)}, r"offsets must have shape \[4\]"),
    "offsets of floats": ({"offsets": torch.zeros(4)}, "offsets must be integers"),
    "a pair for some experts": ({"A": torch.zeros(2, 4, 16)}, r"form.A must have shape \[4, r, 16\]"),
    "B as a layer has it": ({"B": torch.zeros(4, 12, 4)}, r"form.B must have shape \[4, 4, 12\]"),
    "float64": (
        {"backend": "triton", "x": torch.zeros(9, 16).double(), "weight": torch.zeros(4, 12, 16).double()},
        "has no float64 kernels",
    ),
    "both biases": ({"bias": torch.zeros(4, 12)}, "form.bias is the whole β"),
    "dropout": ({"dropout": 1.0}, r"dropout must be in \[0, 1\)"),
    "squares alone": ({"base_squared": torch.zeros(4, 12)}, "base_squared goes with base_scale"),
    "a weight that trains": ({"trains": True}, "weight must be frozen"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    changes, message = REFUSED[name]
    values: dict[str, Any] = dict(operands(SPLITS["some"], 16, 12, 4, torch.float32, torch.float32))
    values |= {key: value.to(DEVICE) if isinstance(value, Tensor) else value for key, value in changes.items()}
    form = ExpertForm(values["A"], values["B"], base_squared=values.get("base_squared"))
    if values.get("trains"):
        values["weight"].requires_grad_()
    if "bias" not in changes:
        values["bias"] = None
    options = {name: values[name] for name in ("backend", "dropout") if name in values}
    offsets = values.get("offsets", ends(SPLITS["some"]))
    with pytest.raises((ValueError, TypeError), match=message):
        expert_linear(values["x"], values["weight"], form, offsets, bias=values["bias"], **options)


def test_a_block_refuses_what_does_not_fit() -> None:
    block = Block(torch.float32)
    up, down = block.sides(block.leaves, 0.0)
    x, routing = block.leaves["x"], block.leaves["routing"]

    def run(**changes: Any) -> Tensor:
        given = {"x": x, "experts": block.experts, "routing": routing, "up": up, "gate": block.gate, "down": down}
        return expert_block(**{**given, **changes})

    for changes, message in (
        ({"routing": routing[:, :1]}, "routing must have shape"),
        ({"experts": routing}, "experts must be integers"),
        ({"x": x[:, :3]}, "x must have shape"),
        ({"down": down._replace(weight=down.weight[:2], form=None)}, "down.weight must have shape"),
        ({"down": down._replace(weight=down.weight.double())}, "down.weight must have up.weight's dtype"),
        ({"backend": "triton", "x": x.double()}, "has no float64 kernels"),
        ({"backend": "reference", "up": up._replace(dropout=0.5)}, "has no dropout here"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            run(**changes)
