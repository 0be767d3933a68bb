"""The operator with a weight that is scaled element by element, W0 ⊙ (1 + U V): values, gradients, and its users."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fastadapt_kernels import configs
from fastadapt_kernels import hadamard_linear as kernels
from helpers import assert_follows, guarded, guarded_outputs, margins_intact
from test_ops import layout_is_told
from torch import Tensor, nn

import fastadapt
from fastadapt import AdapterForm, DoRAConfig, HiRAConfig, LoRAConfig, forms, functional
from fastadapt.functional import adapter_linear, adapter_linear_group, hadamard_linear
from fastadapt.layers.layer import Adapter
from fastadapt.layers.wrap import adapter_layer
from fastadapt.operators.hadamard_linear import eager as eager_hadamard
from fastadapt.operators.hadamard_linear import op
from fastadapt.operators.hadamard_linear.parameters import HadamardLayer, Wants
from fastadapt.operators.registry import Operator
from fastadapt.reference import adapter_linear_reference, hadamard_linear_reference
from fastadapt.serving.loader import AdapterError, read_adapter

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ("eager", "triton")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Values = dict[str, Tensor]


def operands(
    m: int, k: int, n: int, q: int, r: int, dtype: torch.dtype, factors: torch.dtype = torch.float32
) -> Values:
    """x, weight, U, V, and with r also A and B, with a bias that is large beside them."""
    generator = torch.Generator().manual_seed(m + k + n + q)

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator) * std).to(DEVICE)

    values = {"x": normal(m, k).to(dtype), "weight": normal(n, k, std=k**-0.5).to(dtype)}
    values |= {"U": normal(n, q).to(factors), "V": normal(q, k, std=q**-0.5).to(factors)}
    if r:
        values |= {"A": normal(r, k, std=k**-0.5).to(factors), "B": normal(n, r).to(factors)}
        values["bias"] = normal(n, std=20.0).to(factors)
    return values


def output_and_grads(run: Callable[..., Tensor], values: Values, dy: Tensor) -> Values:
    leaves = {name: value.detach().requires_grad_(name != "weight") for name, value in values.items()}
    y = run(**leaves)
    y.backward(dy.to(y.dtype))
    found = {"y": y.detach()}
    for name, leaf in leaves.items():
        if name != "weight":
            assert leaf.grad is not None, name
            assert leaf.grad.dtype == leaf.dtype
            found[name] = leaf.grad
    return found


def judge(values: Values, run: Callable[..., Tensor], reference: Callable[..., Tensor]) -> None:
    """Outputs and every gradient against the fp64 reference, as exact as the reference in x's dtype twice over."""
    x, n = values["x"], values["weight"].shape[0]
    dy = torch.randn(*x.shape[:-1], n, generator=torch.Generator().manual_seed(9)).to(DEVICE, x.dtype)
    actual = output_and_grads(run, values, dy)

    def formula(to: torch.dtype) -> Values:
        return output_and_grads(reference, {name: value.to(to) for name, value in values.items()}, dy)

    assert_follows(actual, formula, x.dtype)


def judge_hadamard(values: Values, backend: str, base: bool) -> None:
    def run(x: Tensor, weight: Tensor, U: Tensor, V: Tensor, **rest: Tensor) -> Tensor:
        return hadamard_linear(x, weight, U, V, base=base, backend=backend, **rest)

    judge(values, run, lambda **leaves: hadamard_linear_reference(**leaves, base=base))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("base", [True, False])
@pytest.mark.parametrize(
    ("m", "k", "n", "q", "r"), [(33, 72, 40, 8, 8), (7, 100, 33, 24, 3), (17, 33, 29, 3, 0), (1, 36, 29, 1, 0)]
)
def test_values_and_gradients(
    m: int, k: int, n: int, q: int, r: int, base: bool, dtype: torch.dtype, backend: str
) -> None:
    judge_hadamard(operands(m, k, n, q, r, dtype), backend, base)


@pytest.mark.parametrize("backend", BACKENDS)
def test_other_layouts(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A weight stored as [in, out], factors in the activation's dtype, views of x, no tokens; several blocks."""
    monkeypatch.setattr(eager_hadamard, "_BLOCK_BYTES", 0)
    monkeypatch.setattr(eager_hadamard, "_LEAST_BLOCK", 16)
    values = operands(19, 40, 33, 5, 2, torch.bfloat16, torch.bfloat16)
    values["weight"] = values["weight"].T.contiguous().T
    judge_hadamard(values, backend, True)
    judge_hadamard(operands(19, 40, 33, 5, 2, torch.float32), backend, True)
    judge_hadamard(operands(0, 40, 33, 5, 2, torch.float32), backend, True)
    values = operands(12, 20, 14, 3, 0, torch.float32)
    for x in (torch.randn(2, 3, 20), torch.randn(20, 12).T, torch.randn(3, 4, 20).transpose(0, 1), torch.randn(20)):
        judge_hadamard({**values, "x": x.to(DEVICE)}, backend, False)


def test_it_is_r_plus_one_base_passes() -> None:
    """W0 ⊙ (U V) = Σ_k diag(U_k) W0 diag(V_k)."""
    x, weight, U, V = operands(5, 20, 14, 4, 0, torch.float64, torch.float64).values()
    passes = [U[:, i] * ((V[i] * x) @ weight.T) for i in range(4)]
    torch.testing.assert_close(hadamard_linear(x, weight, U, V, backend="eager"), x @ weight.T + sum(passes))


def test_gradcheck() -> None:
    values = operands(5, 9, 7, 2, 3, torch.float64, torch.float64)
    x, weight, U, V, A, B, bias = (value.cpu() for value in values.values())
    leaves = tuple(value.requires_grad_() for value in (x, U, V, A, B, bias))
    for base in (True, False):

        def run(x: Tensor, U: Tensor, V: Tensor, A: Tensor, B: Tensor, bias: Tensor) -> Tensor:
            return hadamard_linear(x, weight, U, V, A=A, B=B, bias=bias, base=base)  # noqa: B023

        assert torch.autograd.gradcheck(run, leaves)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_small_change_is_not_lost_in_16_bits(dtype: torch.dtype, backend: str) -> None:
    """Early in training U V is below half an ulp of 1: a weight rounded to 16 bits would not have it at all."""
    x, weight, U, V = operands(200, 64, 64, 4, 0, dtype).values()
    U = U * torch.finfo(dtype).eps / 4
    y: list[Tensor] = []
    dx: list[Tensor] = []
    for factor in (U, torch.zeros_like(U)):
        leaf = x.detach().requires_grad_()
        y.append(hadamard_linear(leaf, weight, factor, V, backend=backend))
        dx += torch.autograd.grad(y[-1], leaf, x.flip(0))
    delta = weight.double() * (U.double() @ V.double())
    effects = x.double() @ delta.T, x.flip(0).double() @ delta
    for (found, without), effect in zip((y, dx), effects, strict=True):
        share = (((found.double() - without) * effect).sum() / effect.square().sum()).item()
        assert share == pytest.approx(1, abs=0.25)


@pytest.mark.parametrize("trained", ["x", "U", "A", "B", "bias", ""])
def test_only_what_is_needed_is_kept(trained: str) -> None:
    values = operands(64, 32, 40, 2, 4, torch.float32)
    leaves = {name: value.requires_grad_(name == trained) for name, value in values.items()}
    own = {value.untyped_storage().data_ptr() for name, value in leaves.items() if name != "x"}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = hadamard_linear(**leaves)  # type: ignore[arg-type]
    expected = {"U": [64 * 32 * 4], "A": [64 * 32 * 4], "B": [64 * 4 * 4]}
    assert list(kept.values()) == expected.get(trained, [])
    assert y.requires_grad == (trained != "")


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_takes_the_place_of_both_dtypes(backend: str) -> None:
    values = operands(9, 24, 20, 3, 2, torch.float32)
    dy = torch.ones(9, 20, device=DEVICE)

    def run(x: Tensor, weight: Tensor, U: Tensor, V: Tensor, **rest: Tensor) -> Tensor:
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            y = hadamard_linear(x, weight, U, V, base=True, backend=backend, **rest)
        assert y.dtype == torch.bfloat16
        return y

    actual = output_and_grads(run, values, dy)

    def formula(to: torch.dtype) -> Values:
        return output_and_grads(hadamard_linear_reference, {name: value.to(to) for name, value in values.items()}, dy)

    assert_follows(actual, formula, torch.bfloat16)


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend: str) -> None:
    x, weight, U, V, A, B, bias = operands(9, 20, 12, 3, 2, torch.float32).values()
    dy, u = torch.ones(9, 12, device=DEVICE), x @ A.T
    layer = HadamardLayer(weight, U, V, A, B, bias, True)
    bare = HadamardLayer(weight, U, V, None, None, None, False)
    cases: list[tuple[Operator[Any], tuple[Any, ...]]] = [
        (op.hadamard_linear, (x, layer, True)),
        (op.hadamard_linear, (x, bare, False)),
        (op.hadamard_linear_backward, (dy, layer, x, u, Wants(True, True, True, True))),
        (op.hadamard_linear_backward, (dy, bare, x, None, Wants(False, True, False, False))),
    ]
    for operator, args in cases:
        torch.library.opcheck(operator.registered, operator.flat(*args, backend))
        layout_is_told(operator.registered, operator.flat(*args, backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_it_compiles_in_one_graph(backend: str) -> None:
    values = operands(9, 20, 12, 3, 2, torch.float32)
    leaves = {name: value.requires_grad_(name != "weight") for name, value in values.items()}
    trained = [leaf for name, leaf in leaves.items() if name != "weight"]

    def run(**leaves: Tensor) -> Tensor:
        return hadamard_linear(**leaves, backend=backend)  # type: ignore[arg-type]

    def results(function: Callable[..., Tensor]) -> list[Tensor]:
        y = function(**leaves)
        return [y, *torch.autograd.grad(y.square().sum(), trained)]

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for a, b in zip(results(run), results(compiled), strict=True):
        torch.testing.assert_close(a, b)


def run_launchers(values: Values, place: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> list[Tensor]:
    dy = place(values["x"].new_ones(values["x"].shape[0], values["weight"].shape[0]))
    x, weight, U, V, A, B, bias = map(place, values.values())
    layer = kernels.HadamardLayer(weight, U, V, A, B, bias)
    y, u = kernels.hadamard_linear(x, layer)
    grads = kernels.hadamard_linear_backward(dy, layer, x, u, kernels.Wants(bias=True))
    alone, _ = kernels.hadamard_linear(x, kernels.HadamardLayer(weight, U, V, base=False))
    part = kernels.hadamard_linear_backward(dy, kernels.HadamardLayer(weight, U, V), x, None, kernels.Wants(x=False))
    outputs = [y, u, *grads, alone, *part]
    return [output for output in outputs if output is not None]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_outside_the_tensors_is_read_or_written(dtype: torch.dtype) -> None:
    values = operands(18, 70, 33, 18, 3, dtype)
    expected = run_launchers(values)
    placed: list[Tensor] = []

    def place(tensor: Tensor) -> Tensor:
        placed.append(guarded(tensor))
        return placed[-1]

    with guarded_outputs() as written:
        outputs = run_launchers(values, place)
    for actual, plain in zip(outputs, expected, strict=True):
        assert torch.equal(actual, plain)
        assert torch.isfinite(actual).all()
    assert all(margins_intact(tensor) for tensor in placed + written)


def test_the_order_of_programs_does_not_matter(request: pytest.FixtureRequest) -> None:
    values = operands(33, 70, 40, 18, 3, torch.float32)
    expected = run_launchers(values)
    request.getfixturevalue("shuffled_programs")
    for actual, plain in zip(run_launchers(values), expected, strict=True):
        assert torch.equal(actual, plain)


def test_launches() -> None:
    def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    x, weight, U, V = empty(8192, 4096), empty(4096, 4096), empty(4096, 8), empty(8, 4096)
    with configs.recorded_launches(166_912) as launches:
        layer = kernels.HadamardLayer(weight, U, V)
        y, _ = kernels.hadamard_linear(x, layer)
        kernels.hadamard_linear_backward(y, layer, x, None, kernels.Wants())
    names = [item.kernel.fn.__name__.strip("_").removesuffix("_kernel") for item in launches]
    assert names == ["hadamard_linear", "hadamard_linear", "hadamard_grads", "sum_partials", "sum_partials"]


# Forms with U and V.

PARTS = ("A", "B", "mid_scale", "out_scale", "base_scale", "bias", "U", "V")


def form_values(dtype: torch.dtype = torch.float32) -> Values:
    values = operands(19, 24, 20, 3, 4, dtype)
    generator = torch.Generator().manual_seed(1)
    sizes = {"mid_scale": 4, "out_scale": 20, "base_scale": 20}
    return values | {name: torch.randn(n, generator=generator).to(DEVICE) for name, n in sizes.items()}


def form_of(values: Values, parts: tuple[str, ...], on_base: bool = False) -> AdapterForm:
    given: dict[str, Any] = {name: values[name] for name in (*parts, "U", "V")}
    if "A" not in parts:
        given |= {"A": values["x"].new_zeros(0, 24), "B": values["x"].new_zeros(20, 0)}
    return AdapterForm(**{"out_scale": 0.5, **given}, dropout_on_base=on_base, scaling=1.5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize(
    ("parts", "on_base"),
    [
        ((), False),
        (("bias",), False),
        (("A", "B", "mid_scale", "out_scale", "bias"), False),
        (("A", "B", "base_scale", "bias"), False),
        (("A", "B", "base_scale"), True),
    ],
    ids=str,
)
def test_forms_with_u_and_v(parts: tuple[str, ...], on_base: bool, p: float, backend: str) -> None:
    values = {name: value for name, value in form_values().items() if name in ("x", "weight", "U", "V", *parts)}
    torch.manual_seed(3)
    mask = torch.nn.functional.dropout(torch.ones_like(values["x"]), p) > 0 if p else None

    def run(x: Tensor, weight: Tensor, **leaves: Tensor) -> Tensor:
        torch.manual_seed(3)
        form = form_of({"x": x, **leaves}, parts, on_base)
        return adapter_linear(x, weight, form, dropout=p, training=True, backend=backend)

    def reference(x: Tensor, weight: Tensor, **leaves: Tensor) -> Tensor:
        form = form_of({"x": x, **leaves}, parts, on_base)
        return adapter_linear_reference(x, weight, form, mask=mask, p=p)

    judge(values, run, reference)


def test_a_group_runs_them_one_by_one_under_one_mask() -> None:
    values = form_values()
    x, weight = values["x"], values["weight"]
    recomposed, plain = form_of(values, ("A", "B")), AdapterForm(values["A"], values["B"])
    ys = adapter_linear_group(x, [weight] * 3, [recomposed, plain, recomposed])
    for y, form in zip(ys, (recomposed, plain, recomposed), strict=True):
        torch.testing.assert_close(y, adapter_linear_reference(x, weight, form), rtol=1e-4, atol=1e-4)
    first, other, last = adapter_linear_group(
        x, [weight] * 3, [recomposed, plain, recomposed], dropout=0.5, training=True
    )
    assert torch.equal(first, last)
    assert not torch.equal(first, ys[0])
    assert not torch.equal(other, ys[1])


def test_forms_that_are_active_together_add_up() -> None:
    values = form_values()
    x, weight, bias = values["x"], values["weight"], values["bias"]
    own = [
        form_of(values, ("A", "B")),
        form_of({**values, "U": values["U"] * 2}, ()),
        AdapterForm(values["A"], values["B"]),
    ]
    own = [form._replace(bias=bias) for form in own]
    together = forms.stacked(own, bias)
    expected = x @ weight.T + bias
    for form in own:
        expected = expected + adapter_linear_reference(x, weight, form) - (x @ weight.T + bias)
    torch.testing.assert_close(adapter_linear(x, weight, together), expected, rtol=1e-4, atol=1e-4)
    merged = functional.merged_weight(weight, together)
    torch.testing.assert_close(x @ merged.T + bias, expected, rtol=1e-4, atol=1e-4)


class Recomposing(Adapter):
    def form(self, weight: Tensor, bias: Tensor | None) -> AdapterForm:
        n, k = weight.shape
        return AdapterForm(weight[:0], weight[:, :0], U=torch.ones(n, 1), V=torch.ones(1, k))


def test_what_cannot_be_is_refused_by_name(tmp_path: Path) -> None:
    values = operands(4, 6, 5, 2, 3, torch.float32)
    x, weight, U, V, A, B, _ = values.values()
    form = AdapterForm(A, B, U=U, V=V)
    cases: list[tuple[type[Exception], str, Callable[[], Any]]] = [
        (ValueError, r"x must have shape \[\.\.\., 6\]", lambda: hadamard_linear(x[:, :3], weight, U, V)),
        (ValueError, r"U must have shape \[5, q\]", lambda: hadamard_linear(x, weight, x, V)),
        (ValueError, r"U must have shape \[5, q\]", lambda: hadamard_linear(x, weight, U[:, :0], V[:0])),
        (ValueError, r"V must have shape \[2, 6\]", lambda: hadamard_linear(x, weight, U, V[:1])),
        (ValueError, "A and B go together, got A without B", lambda: hadamard_linear(x, weight, U, V, A=A)),
        (ValueError, r"A must have shape \[r, 6\]", lambda: hadamard_linear(x, weight, U, V, A=B, B=B)),
        (ValueError, r"B must have shape \[5, 3\]", lambda: hadamard_linear(x, weight, U, V, A=A, B=A)),
        (ValueError, r"bias must have shape \[5\]", lambda: hadamard_linear(x, weight, U, V, bias=x[0])),
        (ValueError, "backend must be one of", lambda: hadamard_linear(x, weight, U, V, backend="cuda")),
        (ValueError, "is on meta", lambda: hadamard_linear(x, weight, U.to("meta"), V)),
        (ValueError, "weight must be frozen", lambda: hadamard_linear(x, weight.clone().requires_grad_(), U, V)),
        (TypeError, "U must be float16", lambda: hadamard_linear(x, weight, U.int(), V)),
        (TypeError, "weight must have x's dtype", lambda: hadamard_linear(x.bfloat16(), weight, U, V)),
        (ValueError, "form.U and form.V go together", lambda: adapter_linear(x, weight, form._replace(U=None))),
        (ValueError, r"form.V must have shape \[2, 6\]", lambda: adapter_linear(x, weight, form._replace(V=V.T))),
        (ValueError, "merge it instead", lambda: forms.plain_lora(form)),
    ]
    hira = HiRAConfig(r=2, target_modules=["0"])
    for base_layer in (nn.Embedding(7, 4), nn.Conv2d(2, 3, 2)):
        layer = adapter_layer(base_layer)
        layer.adapters["one"], layer.active = Recomposing(0.0), ("one",)
        inputs = torch.zeros(1, 2, 4, 4) if isinstance(base_layer, nn.Conv2d) else torch.zeros(3, dtype=torch.long)
        cases.append((ValueError, "only linear layers can", lambda layer=layer, inputs=inputs: layer(inputs)))  # type: ignore[misc]
        model, kind = nn.Sequential(base_layer), type(base_layer).__name__
        cases.append(
            (
                ValueError,
                f"0: {kind} cannot take an adapter of HiRAConfig",
                lambda model=model: fastadapt.inject(model, hira),
            )
        )  # type: ignore[misc]
    model = fastadapt.inject(nn.Sequential(nn.Linear(6, 5)), hira)
    fastadapt.save_adapter(model, tmp_path)
    served = nn.Sequential(nn.Linear(6, 5))
    cases += [
        (AdapterError, "HIRA scales every weight of 0 by itself", lambda: read_adapter(served, tmp_path)),
        (ValueError, "merge it instead", lambda: fastadapt.export_lora(model, tmp_path / "lora")),
        (ValueError, "hira_dropout must be in", lambda: HiRAConfig(hira_dropout=1.0)),
        (ValueError, "init_weights must be True, False or 'gaussian'", lambda: HiRAConfig(init_weights="pissa")),
        (ValueError, r"rank_pattern\['q'\] must be a positive integer", lambda: HiRAConfig(rank_pattern={"q": 0})),
    ]
    for error, message, call in cases:
        with pytest.raises(error, match=message):
            call()


@pytest.mark.parametrize("other", [LoRAConfig(r=2, target_modules=["0"]), DoRAConfig(r=2, target_modules=["0"])])
def test_hira_beside_another_adapter_merges_to_what_it_computes(other: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 9).double()).train()
    fastadapt.inject(model, HiRAConfig(r=3, target_modules=["0"], init_weights=False, hira_dropout=0.3), "one")
    fastadapt.inject(model, other, "two")
    with torch.no_grad():
        for parameter in model.get_submodule("0.adapters.two").parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    fastadapt.set_adapter(model, ["one", "two"])
    x = torch.randn(5, 12, dtype=torch.float64)
    expected = model.eval()(x)
    fastadapt.merge(model)
    torch.testing.assert_close(model(x), expected)
