"""The public functions against the fp64 reference: outputs and every gradient, on both backends and in every dtype."""

from __future__ import annotations

import doctest
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_follows
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import fastadapt
from fastadapt import AdapterForm, functional, serving
from fastadapt.functional import adapter_linear, adapter_linear_group, weight_norm
from fastadapt.operators import backends, masks
from fastadapt.operators.adapter_linear import strategies, tuner
from fastadapt.operators.adapter_linear.cost import keeps_made
from fastadapt.operators.adapter_linear.strategies import STRATEGIES
from fastadapt.operators.adapter_linear.workload import Workload
from fastadapt.operators.dropout import draw_dropout, keep_probability
from fastadapt.reference import adapter_linear_reference, merged_weight_reference, weight_norm_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ("eager", "triton")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NAMES = ("x", "A", "B", "mid_scale", "out_scale", "base_scale", "bias")


def operands(
    m: int,
    k: int,
    n: int,
    r: int,
    dtype: torch.dtype,
    *,
    adapter_dtype: torch.dtype = torch.float32,
    base: str | None = "spread",
    seed: int = 0,
) -> tuple[dict[str, Tensor], Tensor]:
    """Operands by name and the weight: values that break algebra (a large bias, g of 0 and 1e-3, h of 0)."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=g) * scale

    values = {
        "x": normal(m, k).to(dtype),
        "A": normal(r, k, scale=k**-0.5).to(adapter_dtype),
        "B": normal(n, r).to(adapter_dtype),
        "mid_scale": normal(r).to(adapter_dtype),
        "out_scale": normal(n).to(adapter_dtype),
        "base_scale": normal(n).to(adapter_dtype),
        "bias": normal(n, scale=20.0).to(adapter_dtype),
    }
    values["base_scale"][:2] = torch.tensor([0.0, 1e-3])
    values["out_scale"][2] = 0.0
    if base == "near one":
        values["base_scale"] = 1 + values["base_scale"] * 1.5e-3
    return {name: v.to(DEVICE) for name, v in values.items()}, normal(n, k, scale=k**-0.5).to(DEVICE, dtype)


def form_of(values: dict[str, Tensor], parts: tuple[str, ...], on_base: bool) -> AdapterForm:
    return AdapterForm(
        values["A"],
        values["B"],
        values["mid_scale"] if "mid_scale" in parts else None,
        values["base_scale"] if "tied" in parts else values["out_scale"] if "out_scale" in parts else 0.5,
        values["base_scale"] if "base_scale" in parts else None,
        values["bias"] if "bias" in parts else None,
        on_base,
        0.5 if "tied" in parts else 1.0,
    )


def outputs_and_grads(
    values: dict[str, Tensor],
    parts: tuple[str, ...],
    run: Callable[[dict[str, Tensor]], Tensor],
    dy: Tensor,
) -> dict[str, Tensor]:
    leaves = {name: v.detach().clone().requires_grad_() for name, v in values.items()}
    y = run(leaves)
    y.backward(dy.to(y.dtype))
    wanted = ("x", "A", "B", *(part for part in parts if part != "tied"))
    results = {"y": y.detach()}
    for name in wanted:
        grad = leaves[name].grad
        assert grad is not None, name
        assert grad.dtype == leaves[name].dtype
        results[name] = grad
    return results


def judge(
    m: int,
    k: int,
    n: int,
    r: int,
    dtype: torch.dtype,
    backend: str,
    parts: tuple[str, ...],
    *,
    p: float = 0.0,
    on_base: bool = False,
    adapter_dtype: torch.dtype = torch.float32,
    base: str | None = "spread",
) -> None:
    values, weight = operands(m, k, n, r, dtype, adapter_dtype=adapter_dtype, base=base)
    dy = torch.randn(m, n, generator=torch.Generator().manual_seed(9)).to(DEVICE, dtype)
    mask, keep = None, 1.0
    if p > 0:
        torch.manual_seed(3)
        drop = draw_dropout(values["x"], p, backend)
        keep = keep_probability(p, backend)
        mask = masks.dropout_mask(drop, values["x"].shape) if backend == "eager" else dropout_mask(drop, m, k, p)

    def fused(leaves: dict[str, Tensor]) -> Tensor:
        torch.manual_seed(3)
        form = form_of(leaves, parts, on_base)
        return adapter_linear(leaves["x"], weight, form, dropout=p, training=True, backend=backend)

    def plain(leaves: dict[str, Tensor], to: torch.dtype) -> Tensor:
        form = form_of({name: v.to(to) for name, v in leaves.items()}, parts, on_base)
        return adapter_linear_reference(leaves["x"].to(to), weight.to(to), form, mask=mask, p=1.0 - keep)

    def formula(to: torch.dtype) -> dict[str, Tensor]:
        cast = {name: v.to(to) for name, v in values.items()}
        return outputs_and_grads(cast, parts, lambda leaves: plain(leaves, to), dy)

    assert_follows(outputs_and_grads(values, parts, fused, dy), formula, dtype)


def dropout_mask(seed: Tensor, rows: int, columns: int, p: float) -> Tensor:
    from fastadapt_kernels.tiles import dropout_mask as launch

    mask: Tensor = launch(seed, rows, columns, p)
    return mask


FORMS: dict[str, tuple[tuple[str, ...], bool]] = {
    "lora": ((), False),
    "lora bias": (("bias",), False),
    "dora": (("tied", "base_scale", "bias"), True),
    "scales of both paths": (("out_scale", "base_scale", "bias"), True),
    "vera": (("mid_scale", "out_scale"), False),
    "all": (("mid_scale", "out_scale", "base_scale", "bias"), False),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FORMS)
def test_every_form_in_every_dtype(name: str, dtype: torch.dtype, backend: str) -> None:
    parts, on_base = FORMS[name]
    judge(33, 72, 40, 8, dtype, backend, parts, on_base=on_base)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("m", "k", "n", "r"), [(0, 24, 16, 4), (1, 100, 36, 1), (7, 36, 100, 3), (17, 33, 29, 24), (5, 24, 16, 0)]
)
def test_odd_shapes(m: int, k: int, n: int, r: int, backend: str) -> None:
    judge(m, k, n, r, torch.float32, backend, FORMS["all"][0])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("p", [0.1, 0.6])
@pytest.mark.parametrize("name", ["lora", "dora", "scales of both paths", "vera", "all"])
def test_dropout_agrees_between_forward_and_backward(name: str, p: float, dtype: torch.dtype, backend: str) -> None:
    parts, on_base = FORMS[name]
    judge(19, 40, 24, 4, dtype, backend, parts, p=p, on_base=on_base)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_near_unity_scales_of_dora(dtype: torch.dtype, backend: str) -> None:
    judge(33, 72, 40, 8, dtype, backend, FORMS["dora"][0], base="near one")


@pytest.mark.parametrize("m", [1, 6, 40, 600])
def test_high_rank_with_frozen_factors(m: int) -> None:
    """Every way to compute VeRA: the low-rank path, and the recomposed weight kept or remade."""
    values, weight = operands(m, 24, 20, 100, torch.float32)
    workload = Workload(m, 24, (20,), (100,), "float32", trains_A=False, trains_B=False)
    names = strategies.candidates(workload, "auto", torch.ones(1))
    way = strategies.cheapest(names, workload, torch.device("cpu")), keeps_made("recompose", workload)
    dy = torch.randn(m, 20, generator=torch.Generator().manual_seed(9))

    def run(leaves: dict[str, Tensor], to: torch.dtype, fused: bool) -> dict[str, Tensor]:
        x, d, h = (leaves[name].detach().to(to).requires_grad_() for name in ("x", "mid_scale", "out_scale"))
        form = AdapterForm(leaves["A"].to(to), leaves["B"].to(to), d, h)
        y = (adapter_linear if fused else adapter_linear_reference)(x, weight.to(to), form)
        y.backward(dy.to(to))
        grads = {"x": x.grad, "mid_scale": d.grad, "out_scale": h.grad}
        return {"y": y.detach(), **{name: grad for name, grad in grads.items() if grad is not None}}

    values = {name: v.detach() for name, v in values.items()}
    actual = run(values, torch.float32, True)
    assert_follows(actual, lambda to: run(values, to, False), torch.float32)
    assert way == ("expand" if m < 8 else "recompose", m < 500)


def test_gradcheck_of_the_whole_form() -> None:
    values, weight = operands(6, 9, 7, 3, torch.float64, adapter_dtype=torch.float64)
    leaves = tuple(values[name].cpu().requires_grad_() for name in NAMES)
    weight = weight.cpu()
    for on_base, p in ((False, 0.0), (True, 0.0), (False, 0.4), (True, 0.4)):

        def run(x: Tensor, A: Tensor, B: Tensor, d: Tensor, h: Tensor, g: Tensor, b: Tensor) -> Tensor:
            torch.manual_seed(1)
            form = AdapterForm(A, B, d, h, g, b, on_base)  # noqa: B023
            return adapter_linear(x, weight, form, dropout=p, training=True, backend="eager")  # noqa: B023

        assert torch.autograd.gradcheck(run, leaves)


def test_scalar_out_scale_may_be_learned() -> None:
    values, weight = operands(6, 9, 7, 3, torch.float64, adapter_dtype=torch.float64)
    scale = torch.tensor(0.7, dtype=torch.float64, device=DEVICE, requires_grad=True)

    def run(scale: Tensor) -> Tensor:
        return adapter_linear(
            values["x"], weight, AdapterForm(values["A"], values["B"], out_scale=scale), backend="eager"
        )

    assert torch.autograd.gradcheck(run, (scale,))


def test_double_backward_is_refused_plainly() -> None:
    values, weight = operands(4, 6, 5, 2, torch.float32)
    x = values["x"].requires_grad_()
    y = adapter_linear(x, weight, AdapterForm(values["A"], values["B"].requires_grad_()))
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(ValueError, match="can be taken once"):
        dx.sum().backward()


@pytest.mark.parametrize("backend", BACKENDS)
def test_views_of_x_and_a_sliced_factor(backend: str) -> None:
    values, weight = operands(12, 20, 14, 5, torch.float32)
    wide = torch.randn(5, 33, device=DEVICE)
    for x in (
        torch.randn(2, 3, 20, device=DEVICE),
        torch.randn(20, 12, device=DEVICE).T,
        torch.randn(12, 40, device=DEVICE)[:, ::2],
        torch.randn(3, 4, 20, device=DEVICE).transpose(0, 1),
        torch.randn(20, device=DEVICE),
    ):
        form = AdapterForm(wide[:, :20], values["B"], out_scale=0.5)
        y = adapter_linear(x, weight, form, backend=backend)

        def formula(to: torch.dtype) -> dict[str, Tensor]:
            cast = AdapterForm(wide[:, :20].to(to), values["B"].to(to), out_scale=0.5)
            return {"y": adapter_linear_reference(x.to(to), weight.to(to), cast)}  # noqa: B023

        assert_follows({"y": y}, formula, torch.float32)
        assert y.shape == (*x.shape[:-1], 14)


def test_a_transposed_weight_is_taken_as_it_lies() -> None:
    values, weight = operands(12, 20, 14, 5, torch.float32)
    form = AdapterForm(values["A"], values["B"])
    stored = weight.T.contiguous()
    for backend in BACKENDS:
        torch.testing.assert_close(
            adapter_linear(values["x"], stored.T, form, backend=backend),
            adapter_linear(values["x"], weight, form, backend=backend),
        )


def kept_tensors(run: Callable[[], Tensor], ignore: list[Tensor]) -> list[Tensor]:
    """What autograd keeps for the backward, one tensor a storage, without the storages of `ignore`."""
    known = {t.untyped_storage().data_ptr() for t in ignore}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in known:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = run()
    del y
    return list(kept.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_saved_tensors_are_the_fused_minimum(dtype: torch.dtype) -> None:
    m, k, n, r = 64, 32, 40, 4
    values, weight = operands(m, k, n, r, dtype)
    x = values["x"].requires_grad_()
    A, B, h, g = (values[name] for name in ("A", "B", "out_scale", "base_scale"))
    item = x.element_size()

    def kept(form: AdapterForm, **options: Any) -> list[int]:
        tensors = kept_tensors(
            lambda: adapter_linear(x, weight, form, **options), [weight, A, B, h, g, values["mid_scale"]]
        )
        return sorted(t.untyped_storage().nbytes() for t in tensors)

    u, full_x, z = m * r * item, m * k * item, m * n * item
    for tensor in (A, B):
        tensor.requires_grad_()
    assert kept(AdapterForm(A, B)) == sorted([u, full_x])
    for p in (0.1, 0.25, 0.5):  # on the CPU the dropout takes a byte an element at most
        drop = kept(AdapterForm(A, B), dropout=p, training=True)
        assert drop.pop(drop.index(u)) + drop.pop(drop.index(full_x)) == u + full_x
        assert len(drop) == 1
        assert drop[0] <= m * k * 1.1
    assert kept(AdapterForm(A, B, out_scale=h, base_scale=g.requires_grad_())) == sorted([u, full_x, z])
    assert kept(AdapterForm(A.detach(), B)) == [u]  # LoRA-FA
    g.requires_grad_(False)
    A, B = A.detach(), B.detach()
    d = values["mid_scale"].requires_grad_()
    assert kept(AdapterForm(A, B, d, h.requires_grad_())) == [u]  # VeRA
    x = x.detach()
    with torch.no_grad():
        assert kept(AdapterForm(A, B, d, h)) == []


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_checkpoint_recomputes_the_same_mask(backend: str, reentrant: bool) -> None:
    values, weight = operands(9, 12, 10, 3, torch.float32)
    x, A, B = (values[name].requires_grad_() for name in ("x", "A", "B"))

    def run(x: Tensor) -> Tensor:
        return adapter_linear(x, weight, AdapterForm(A, B), dropout=0.5, training=True, backend=backend).tanh()

    def gradients(y: Tensor) -> tuple[Tensor, ...]:
        A.grad = B.grad = None
        y.sum().backward()
        assert A.grad is not None
        assert B.grad is not None
        return A.grad, B.grad

    torch.manual_seed(5)
    plain = gradients(run(x))
    torch.manual_seed(5)
    recomputed = gradients(checkpoint(run, x, use_reentrant=reentrant))
    for a, b in zip(plain, recomputed, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_dropout_follows_manual_seed_and_only_while_training(backend: str) -> None:
    values, weight = operands(9, 12, 10, 3, torch.float32)
    form = AdapterForm(values["A"], values["B"])

    def run(seed: int, training: bool = True) -> Tensor:
        torch.manual_seed(seed)
        return adapter_linear(values["x"], weight, form, dropout=0.5, training=training, backend=backend)

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))
    assert torch.equal(run(1, training=False), run(2, training=False))


def test_the_mask_has_the_promised_rate() -> None:
    torch.manual_seed(0)
    for p in (0.05, 0.5, 0.9):
        drop = draw_dropout(torch.empty(400, 500), p, "eager")
        mask = masks.dropout_mask(drop, torch.Size((400, 500)))
        assert abs(mask.float().mean().item() - (1 - p)) < 4 * (p * (1 - p) / 200_000) ** 0.5
        assert abs(keep_probability(p, "eager") - (1 - p)) < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_takes_the_place_of_both_dtypes(backend: str) -> None:
    values, weight = operands(9, 12, 10, 3, torch.float32)
    leaves = {name: values[name].requires_grad_() for name in ("x", "A", "B")}
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        y = adapter_linear(leaves["x"], weight, AdapterForm(leaves["A"], leaves["B"]), backend=backend)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert all(leaf.grad is not None and leaf.grad.dtype == torch.float32 for leaf in leaves.values())

    def formula(to: torch.dtype) -> dict[str, Tensor]:
        x, w, A, B = (t.detach().to(to) for t in (values["x"], weight, values["A"], values["B"]))
        return {"y": adapter_linear_reference(x, w, AdapterForm(A, B))}

    assert_follows({"y": y}, formula, torch.bfloat16)


def test_merged_weight_follows_the_form() -> None:
    values, weight = operands(9, 12, 10, 3, torch.float64, adapter_dtype=torch.float64)
    form = form_of(values, FORMS["all"][0], False)
    y = values["x"] @ merged_weight_reference(weight, form).T + values["bias"]
    torch.testing.assert_close(y, adapter_linear_reference(values["x"], weight, form))
    torch.testing.assert_close(functional.merged_weight(weight, form), merged_weight_reference(weight, form))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weight_norm(dtype: torch.dtype, backend: str) -> None:
    values, weight = operands(1, 72, 40, 8, dtype)
    A, B = values["A"], values["B"] * 0.1
    actual = weight_norm(weight, A, B, 0.5, backend=backend)
    assert actual.dtype == torch.float32
    formula = lambda to: {"n": weight_norm_reference(weight.to(to), A.to(to), B.to(to), 0.5)}  # noqa: E731
    assert_follows({"n": actual}, formula, torch.float32)


def test_weight_norm_gradients() -> None:
    values, weight = operands(1, 9, 7, 3, torch.float64, adapter_dtype=torch.float64)
    A, B = (values[name].cpu().requires_grad_() for name in ("A", "B"))
    assert torch.autograd.gradcheck(lambda A, B: weight_norm(weight.cpu(), A, B, 0.7), (A, B))


def test_weight_norm_of_a_cancelled_row_is_zero_not_nan() -> None:
    weight = torch.randn(4, 6)
    A, B = torch.eye(6), -weight
    n = weight_norm(weight, A, B, 1.0)
    assert torch.isfinite(n).all()
    assert n.max() < 1e-2 * weight.norm(dim=1).max()


def test_bad_arguments_are_named() -> None:
    values, weight = operands(4, 6, 5, 2, torch.float32)
    x, form = values["x"], AdapterForm(values["A"], values["B"])
    cases: list[tuple[type[Exception], str, Callable[[], Any]]] = [
        (ValueError, r"x must have shape \[\.\.\., 6\]", lambda: adapter_linear(x[:, :3], weight, form)),
        (ValueError, r"form.A must have shape \[r, 6\]", lambda: adapter_linear(x, weight, form._replace(A=x[:, :3]))),
        (ValueError, r"form.B must have shape \[5, 2\]", lambda: adapter_linear(x, weight, form._replace(B=x))),
        (
            ValueError,
            r"form.mid_scale must have shape \[2\]",
            lambda: adapter_linear(x, weight, form._replace(mid_scale=x[0])),
        ),
        (
            ValueError,
            r"form.base_scale must have shape",
            lambda: adapter_linear(x, weight, form._replace(base_scale=x[0])),
        ),
        (ValueError, r"weight must have shape", lambda: adapter_linear(x, weight[0], form)),
        (ValueError, r"dropout must be in \[0, 1\), got 1", lambda: adapter_linear(x, weight, form, dropout=1.0)),
        (ValueError, "backend must be one of", lambda: adapter_linear(x, weight, form, backend="cuda")),
        (ValueError, "is on meta but x is on", lambda: adapter_linear(x, weight.to("meta"), form)),
        (TypeError, "weight must have x's dtype", lambda: adapter_linear(x.bfloat16(), weight, form)),
        (TypeError, "x must be float16", lambda: adapter_linear(x.int(), weight, form)),
        (TypeError, "no float64 kernels", lambda: adapter_linear(x.double(), weight.double(), form, backend="triton")),
        (ValueError, "weight must be frozen", lambda: adapter_linear(x, weight.clone().requires_grad_(), form)),
        (ValueError, r"lora_B must have shape \[5, 2\]", lambda: weight_norm(weight, values["A"], x, 1.0)),
    ]
    for error, message, call in cases:
        with pytest.raises(error, match=message):
            call()


def test_triton_is_refused_where_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match="needs tensors on a GPU"):
        backends.resolve_backend("triton", torch.ones(1))
    monkeypatch.setattr(backends, "HAS_TRITON", False)
    with pytest.raises(ValueError, match="needs the package triton"):
        backends.resolve_backend("triton", torch.ones(1))
    assert backends.resolve_backend("auto", torch.ones(1)) == "eager"


def test_positions_are_independent_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their gaps are geometric, every position is as likely, and a draw that falls short goes on."""
    torch.manual_seed(0)
    count, p, draws = 50, 0.2, 4000
    hits, pairs = torch.zeros(count), 0
    for _ in range(draws):
        positions = masks._draw_positions(count, p).long()
        assert positions.numel() == 0 or (positions.diff() > 0).all()
        assert positions.numel() == 0 or 0 <= positions[0] <= positions[-1] < count
        hits[positions] += 1
        pairs += int((positions.diff() == 1).sum())
    bound = 4.5 * (p * (1 - p) / draws) ** 0.5
    assert (hits / draws - p).abs().max() < bound
    assert abs(pairs / draws / (count - 1) - p * p) < bound
    monkeypatch.setattr(masks.math, "sqrt", lambda _: -2.0)  # far too few in the first draw
    positions = masks._draw_positions(10_000, p)
    assert abs(positions.numel() / 10_000 - p) < 0.03
    assert positions[-1] > 9_900


MIXED = {
    "ranks": [("lora", 3), ("lora bias", 8), ("lora", 0)],
    "methods": [("dora", 4), ("lora", 4), ("vera", 7)],
    "two": [("all", 5), ("all", 2)],
}


@pytest.mark.parametrize("strategy", ["library", "split", "fused"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("kinds", MIXED)
def test_a_group_is_its_members(kinds: str, p: float, dtype: torch.dtype, strategy: str) -> None:
    """Outputs and every gradient, of widths, ranks and forms that differ; dx is the sum over the members."""
    backend = STRATEGIES[strategy]
    members = [
        operands(19, 24, 16 + 4 * index, rank, dtype, seed=index) for index, (_, rank) in enumerate(MIXED[kinds])
    ]
    x = members[0][0]["x"]
    mask, keep = None, 1.0
    if p > 0:
        torch.manual_seed(3)
        drop = draw_dropout(x, p, backend)
        keep = keep_probability(p, backend)
        mask = masks.dropout_mask(drop, x.shape) if backend == "eager" else dropout_mask(drop, *x.shape, p)

    def run(to: torch.dtype | None) -> dict[str, Tensor]:
        """The group itself, or for a dtype the reference of each member in it."""
        leaf = (x if to is None else x.to(to)).detach().clone().requires_grad_()
        leaves, forms, weights = {"x": leaf}, [], []
        for index, ((values, weight), (name, _)) in enumerate(zip(members, MIXED[kinds], strict=True)):
            own = {
                key: v.detach().clone() if to is None else v.detach().to(to) for key, v in values.items() if key != "x"
            }
            for key in ("A", "B", *(part for part in FORMS[name][0] if part != "tied")):
                leaves[f"{key}{index}"] = own[key].requires_grad_()
            forms.append(form_of(own, *FORMS[name]))
            weights.append(weight if to is None else weight.to(to))
        if to is None:
            torch.manual_seed(3)
            ys = adapter_linear_group(leaf, weights, forms, dropout=p, training=True, strategy=strategy)
        else:
            pairs = zip(weights, forms, strict=True)
            ys = tuple(adapter_linear_reference(leaf, w, f, mask=mask, p=1.0 - keep) for w, f in pairs)
        generator = torch.Generator().manual_seed(4)
        dys = [torch.randn(y.shape, generator=generator).to(y) for y in ys]
        torch.autograd.backward(ys, dys)
        grads = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
        assert grads.keys() == leaves.keys()
        return {**{f"y{index}": y.detach() for index, y in enumerate(ys)}, **grads}

    assert_follows(run(None), run, dtype)


@pytest.mark.parametrize("strategy", ["library", "recompose", "expand", "split"])
def test_members_of_one_down_projection_share_u(strategy: str) -> None:
    values, weight = operands(19, 24, 16, 8, torch.float32)
    x, A, B = values["x"].requires_grad_(), values["A"], values["B"]
    pairs = [(torch.rand(8).to(DEVICE).requires_grad_(), torch.rand(16).to(DEVICE).requires_grad_()) for _ in range(3)]
    leaves = [x, *(leaf for pair in pairs for leaf in pair)]

    def grads(ys: tuple[Tensor, ...]) -> list[Tensor]:
        return [*ys, *torch.autograd.grad([y.square().sum() for y in ys], leaves)]

    # A view of its own for each, as layers make them.
    forms = [AdapterForm(A[:], B, d, h) for d, h in pairs]
    kept = kept_tensors(lambda: torch.cat(adapter_linear_group(x, [weight] * 3, forms, strategy=strategy)), [A, B])
    assert sum(tensor.shape == (19, 8) for tensor in kept) == 1
    together = grads(adapter_linear_group(x, [weight] * 3, forms, strategy=strategy))
    apart = grads(tuple(adapter_linear(x, weight, form, strategy=strategy) for form in forms))
    for a, b in zip(together, apart, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_a_group_keeps_x_and_u_once() -> None:
    values, weight = operands(64, 32, 40, 4, torch.float32)
    x, A, B = (values[name].requires_grad_() for name in ("x", "A", "B"))
    forms = [AdapterForm(A * (index + 1), B) for index in range(3)]
    own = [t for form in forms for t in (form.A, form.B)]
    kept = kept_tensors(lambda: torch.cat(adapter_linear_group(x, [weight] * 3, forms)), [weight, *own])
    assert sorted(t.untyped_storage().nbytes() for t in kept) == [64 * 12 * 4, 64 * 32 * 4]


def test_tuning_measures_once_and_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTADAPT_CACHE", str(tmp_path))
    tuner.forget()
    values, weight = operands(40, 12, 10, 3, torch.float32)
    A, B = (values[name].requires_grad_() for name in ("A", "B"))
    expected = adapter_linear(values["x"], weight, AdapterForm(A, B))
    runs: list[str] = []
    measure = tuner.measure
    monkeypatch.setattr(tuner, "measure", lambda trials, device: runs.extend(trials) or measure(trials, device))
    state = torch.get_rng_state()
    for _ in range(3):
        y = adapter_linear(values["x"], weight, AdapterForm(A, B), strategy="tune", backend="eager")
        torch.testing.assert_close(y, expected)
    assert runs == ["library", "recompose"]
    assert A.grad is None
    assert torch.equal(state, torch.get_rng_state())
    assert len(list(tmp_path.glob("*.json"))) == 1
    tuner.forget()  # another process reads the file
    adapter_linear(values["x"], weight, AdapterForm(A, B), strategy="tune", backend="eager")
    assert len(runs) == 2
    tuner.forget()


def test_strategies_are_refused_where_they_cannot_run() -> None:
    values, weight = operands(9, 12, 10, 3, torch.float32)
    form = AdapterForm(values["A"], values["B"], base_scale=values["base_scale"].requires_grad_())
    x = values["x"]
    cases: list[tuple[str, Callable[[], Any]]] = [
        ("must be one of auto, tune, split", lambda: adapter_linear(x, weight, form, strategy="none")),
        ('runs on backend "triton"', lambda: adapter_linear(x, weight, form, strategy="split", backend="eager")),
        ("base_scale needs the base product", lambda: adapter_linear(x, weight, form, strategy="recompose")),
        ("at least one weight", lambda: adapter_linear_group(x, [], [])),
        ("1 weights and 2 forms", lambda: adapter_linear_group(x, [weight], [form, form])),
        ("and neither A nor B", lambda: adapter_linear(x, weight, form, strategy="expand")),
        (
            "under dropout",
            lambda: adapter_linear(
                x, weight, AdapterForm(values["A"], values["B"]), strategy="recompose", dropout=0.1, training=True
            ),
        ),
        (
            "half-ulp",
            lambda: adapter_linear(
                x.bfloat16(), weight.bfloat16(), AdapterForm(values["A"], values["B"]), strategy="recompose"
            ),
        ),
    ]
    for message, call in cases:
        with pytest.raises(ValueError, match=message):
            call()


def test_the_limit_of_fused_ranks_is_the_kernels() -> None:
    from fastadapt_kernels import configs

    assert strategies._MOST_FUSED_RANKS == configs.MOST_FUSED_RANKS
    values, weight = operands(5, 24, 16, 80, torch.float32)
    form = AdapterForm(values["A"], values["B"])  # few rows: without its rank it would be fused
    y = adapter_linear(values["x"], weight, form, backend="triton")
    torch.testing.assert_close(y, adapter_linear(values["x"], weight, form), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="takes ranks up to 64, got 80"):
        adapter_linear(values["x"], weight, form, strategy="fused")


def _of_each_operator(backend: str, training: bool) -> dict[str, Callable[[Tensor], tuple[Tensor, ...]]]:
    values, weight = operands(1, 12, 12, 3, torch.float32)
    for name in ("A", "B", "mid_scale", "base_scale"):
        values[name].requires_grad_()
    form = AdapterForm(values["A"], values["B"], values["mid_scale"], bias=values["bias"])
    dora = AdapterForm(values["A"], values["B"], None, values["base_scale"], values["base_scale"])
    options: dict[str, Any] = {"dropout": 0.3, "training": training, "backend": backend}
    U, V = torch.randn(12, 2, requires_grad=True), torch.randn(2, 12)
    return {
        "linear": lambda x: (adapter_linear(x, weight, form, **options),),
        "dora": lambda x: (adapter_linear(x, weight, dora, **options),),
        "group": lambda x: adapter_linear_group(x, (weight, weight, weight), (form, dora, form), **options),
        "group, shared A": lambda x: adapter_linear_group(x, (weight, weight), (form, form), **options),
        "hadamard": lambda x: (functional.hadamard_linear(x, weight, U, V, A=form.A, B=form.B, backend=backend),),
        "hadamard form": lambda x: (adapter_linear(x, weight, form._replace(U=U, V=V), **options),),
        "bottleneck": lambda x: (functional.bottleneck(x, form.A, form.B, **options),),
        "bottleneck, residual": lambda x: (functional.bottleneck(x, form.A, form.B, residual=x, **options),),
    }


@pytest.mark.parametrize("shape", [(12,), (4, 12), (2, 3, 12), (2, 1, 3, 12)], ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
@pytest.mark.parametrize("name", _of_each_operator("eager", False))
def test_what_comes_back_can_be_written_in_place(
    name: str, backend: str, training: bool, shape: tuple[int, ...]
) -> None:
    """As ReLU(inplace=True) and `y += residual` do: the same gradients as without, and no other output is touched."""

    def run(in_place: bool) -> list[Tensor]:
        torch.manual_seed(0)
        x = torch.randn(shape, requires_grad=True)
        ys = _of_each_operator(backend, training)[name](x)
        if in_place:
            for y in ys:
                y += 1.0
                torch.relu_(y)
        else:
            ys = tuple([torch.relu(y + 1.0) for y in ys])
        loss = torch.stack([(y * (index + 1)).square().sum() for index, y in enumerate(ys)]).sum()
        loss.backward()
        assert x.grad is not None
        return [*ys, x.grad]

    for actual, expected in zip(run(True), run(False), strict=True):
        assert torch.equal(actual, expected)


def test_a_batch_of_many_dimensions_is_no_copy() -> None:
    """Only the layer's own memory: y as the product made it, seen with x's leading dimensions."""
    values, weight = operands(6, 12, 10, 3, torch.float32)
    form = AdapterForm(values["A"].requires_grad_(), values["B"])
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=False) as profile:
        adapter_linear(values["x"].view(2, 3, 12), weight, form)
    assert not {"aten::clone", "aten::copy_"} & {event.key for event in profile.key_averages()}


@pytest.mark.parametrize("name", functional.__all__)
def test_the_examples_of_the_public_operators_run(name: str) -> None:
    function = getattr(functional, name)
    names = {**vars(functional), **vars(serving), **vars(fastadapt), "torch": torch}
    (example,) = doctest.DocTestFinder(recurse=False).find(function, name, globs=names)
    assert example.examples or name in ("row_squares", "merged_weight")  # one line each, which the others show
    with torch.no_grad():
        result = doctest.DocTestRunner().run(example)
    assert result.failed == 0


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_a_group_that_shares_its_down_projection_takes_no_rows(backend: str) -> None:
    x, A = torch.empty(2, 0, 12, device=DEVICE, requires_grad=True), torch.randn(3, 12, device=DEVICE)
    forms = [
        AdapterForm(A, torch.randn(n, 3, device=DEVICE), torch.randn(3, device=DEVICE, requires_grad=True))
        for n in (10, 7)
    ]
    weights = [torch.randn(n, 12, device=DEVICE) for n in (10, 7)]
    ys = adapter_linear_group(x, weights, forms, backend=backend)
    assert [y.shape for y in ys] == [(2, 0, 10), (2, 0, 7)]
    sum(y.sum() for y in ys).backward()  # type: ignore[union-attr]
    assert x.grad is not None
    assert x.grad.shape == x.shape
    for form in forms:
        assert isinstance(form.mid_scale, Tensor)
        assert form.mid_scale.grad is not None
        assert not form.mid_scale.grad.any()
