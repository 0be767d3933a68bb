"""The bottleneck: its kernels and its eager implementation against the fp64 reference, and what autograd sees of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from fastadapt_kernels import bottleneck as kernels
from fastadapt_kernels import configs, tiles
from helpers import assert_close, assert_follows, guarded, guarded_outputs, layout_is_told, margins_intact
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastadapt.functional import bottleneck
from fastadapt.operators import masks
from fastadapt.operators.bottleneck import function, op
from fastadapt.operators.bottleneck.parameters import BottleneckLayer, Wants
from fastadapt.operators.dropout import draw_dropout, keep_probability
from fastadapt.operators.masks import Dropout
from fastadapt.reference import bottleneck_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ("eager", "triton")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ACTIVATIONS = ("identity", "relu", "gelu", "quick_gelu")


class Case(NamedTuple):
    """A bottleneck. residual: "none", "other", or "v" for v itself."""

    shape: tuple[int, ...]  # of v
    N: int
    H: int
    activation: str = "relu"
    groups: int = 1
    biases: bool = True
    residual: str = "other"
    parameters: torch.dtype | None = torch.float32  # None: as v


CASES = [
    Case((37, 72), 40, 8),  # AdaptFormer
    Case((37, 72), 72, 8, "identity", 2, residual="v"),  # RepAdapter
    Case((37, 72), 72, 100, "quick_gelu", residual="v"),  # NOAH
    Case((1, 100), 33, 1, "gelu", residual="none"),
    Case((7, 33), 100, 5, "quick_gelu", biases=False),
    Case((37, 100), 100, 64, "gelu", 2, residual="v"),
    Case((33, 40), 70, 100, "relu", 5, residual="none", biases=False),
    Case((17, 33), 36, 6, "gelu", 3, parameters=None),
    Case((2, 5, 40), 24, 16, "identity", biases=False, residual="none"),
    Case((3, 0, 24), 16, 4, "gelu", 2),
    Case((2, 3, 4, 24), 24, 128, "relu", residual="v", parameters=None),
]


def operands(case: Case, dtype: torch.dtype) -> dict[str, Any]:
    """v and what goes with it, with a large bias after the product and values on both sides of φ's bend."""
    generator = torch.Generator().manual_seed(0)
    K, own = case.shape[-1], case.parameters or dtype

    def normal(*shape: int, scale: float = 1.0, dtype: torch.dtype = dtype) -> Tensor:
        return (torch.randn(*shape, generator=generator) * scale).to(DEVICE, dtype)

    values = {
        "v": normal(*case.shape),
        "down": normal(case.H, K, scale=K**-0.5, dtype=own),
        "up": normal(case.N, case.H // case.groups, dtype=own),
    }
    if case.biases:
        values["down_bias"] = normal(case.H, dtype=own)
        values["up_bias"] = normal(case.N, scale=20.0, dtype=own)
    if case.residual == "other":
        values["residual"] = normal(*case.shape[:-1], case.N)
    return values


def results(run: Callable[..., Tensor], case: Case, values: dict[str, Tensor], **options: Any) -> dict[str, Tensor]:
    """The output and the gradient of every operand."""
    leaves = {name: value.detach().clone().requires_grad_() for name, value in values.items()}
    v, down, up = (leaves[name] for name in ("v", "down", "up"))
    rest = {name: leaf for name, leaf in leaves.items() if name not in ("v", "down", "up")}
    if case.residual == "v":
        rest["residual"] = v
    out = run(v, down, up, scaling=0.5, activation=case.activation, groups=case.groups, **rest, **options)
    dy = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.device, out.dtype)
    out.backward(dy)
    grads = {}
    for name, leaf in leaves.items():
        assert leaf.grad is not None, name
        grads[name] = leaf.grad
    return {"out": out.detach(), **grads}


def judge(case: Case, values: dict[str, Tensor], backend: str, p: float = 0.0) -> None:
    v = values["v"]
    reference: dict[str, Any] = {}
    if p > 0:
        torch.manual_seed(3)
        hidden = torch.zeros(v.numel() // v.shape[-1], case.H, device=DEVICE)
        drop = draw_dropout(hidden, p, backend)
        if backend == "eager":
            mask = masks.dropout_mask(drop, hidden.shape)
        else:
            mask = tiles.dropout_mask(drop, hidden.shape[0], case.H, p)
        reference = {"mask": mask.view(*v.shape[:-1], case.H), "p": 1.0 - keep_probability(p, backend)}
    torch.manual_seed(3)
    actual = results(bottleneck, case, values, dropout=p, training=True, backend=backend)

    def formula(to: torch.dtype) -> dict[str, Tensor]:
        cast = {name: value.to(to) for name, value in values.items()}
        return results(bottleneck_reference, case, cast, **reference)

    assert_follows(actual, formula, v.dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_output_and_every_gradient(case: Case, dtype: torch.dtype, backend: str) -> None:
    judge(case, operands(case, dtype), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("p", "groups", "dtype"), [(0.1, 1, torch.bfloat16), (0.6, 2, torch.float32)])
def test_forward_and_backward_drop_the_same(
    p: float, groups: int, dtype: torch.dtype, activation: str, backend: str
) -> None:
    case = Case((2, 19, 40), 24, 10, activation, groups)
    judge(case, operands(case, dtype), backend, p)


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_strides(backend: str) -> None:
    case = Case((12, 20), 14, 6, "gelu", 2)
    plain = operands(case, torch.float32)
    wide = {name: value.repeat_interleave(2, dim=-1)[..., ::2] for name, value in plain.items()}
    turned = {name: value.T.contiguous().T if value.dim() == 2 else value for name, value in plain.items()}
    expected = bottleneck_reference(**plain, activation="gelu", groups=2)
    for values in (wide, turned):
        torch.testing.assert_close(bottleneck(**values, activation="gelu", groups=2, backend=backend), expected)
    v = torch.randn(3, 4, 20, device=DEVICE).transpose(0, 1)
    parameters = {name: value for name, value in plain.items() if name not in ("v", "residual")}
    expected = bottleneck_reference(v, **parameters, activation="gelu", groups=2)
    torch.testing.assert_close(bottleneck(v, **parameters, activation="gelu", groups=2, backend=backend), expected)
    alone = bottleneck(v[0, 0], **parameters, activation="gelu", groups=2, backend=backend)
    torch.testing.assert_close(alone, expected[0, 0])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("residual", ["v", "other"])
def test_gradient_expanded_from_a_sum(residual: str, backend: str) -> None:
    case = Case((9, 12), 12, 4, "relu", 2, residual=residual)
    values = {name: value.requires_grad_() for name, value in operands(case, torch.float32).items()}
    given = values | ({"residual": values["v"]} if residual == "v" else {})
    found = torch.autograd.grad(bottleneck(**given, groups=2, backend=backend).sum(), list(values.values()))
    expected = torch.autograd.grad(bottleneck_reference(**given, groups=2).sum(), list(values.values()))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("activation", "residual", "groups"),
    [("identity", "v", 2), ("relu", "other", 1), ("gelu", "none", 2), ("quick_gelu", "v", 1)],
)
def test_gradcheck(activation: str, residual: str, groups: int) -> None:
    case = Case((3, 4), 4, 4, activation, groups, residual=residual, parameters=None)
    values = operands(case, torch.float64)
    if activation == "relu":  # away from its bend
        values["down_bias"] = torch.tensor([5.0, -5.0, 6.0, -6.0], dtype=torch.float64, device=DEVICE)
    names = list(values)
    for p in (0.0, 0.4):

        def run(*leaves: Tensor) -> Tensor:
            torch.manual_seed(1)
            given: dict[str, Any] = dict(zip(names, leaves, strict=True))
            if residual == "v":
                given["residual"] = given["v"]
            options: dict[str, Any] = {"scaling": 0.7, "activation": activation, "groups": groups}
            return bottleneck(**given, **options, dropout=p, training=True, backend="eager")  # noqa: B023

        assert torch.autograd.gradcheck(run, [value.requires_grad_() for value in values.values()])


def test_double_backward_is_refused_plainly() -> None:
    values = operands(CASES[0], torch.float32)
    v = values.pop("v").requires_grad_()
    (dv,) = torch.autograd.grad(bottleneck(v, **values).square().sum(), v, create_graph=True)
    with pytest.raises(ValueError, match="can be taken once"):
        dv.sum().backward()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["v", "down", "up", "down_bias", "up_bias", "residual"])
def test_one_gradient_alone(name: str, backend: str) -> None:
    case = CASES[0]
    values = operands(case, torch.float32)
    expected = results(bottleneck_reference, case, values)[name]
    leaf = values[name].requires_grad_()
    out = bottleneck(**values, scaling=0.5, backend=backend)
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE))
    torch.testing.assert_close(leaf.grad, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_v_and_the_parameters_alone_are_kept(backend: str) -> None:
    case = Case((64, 32), 40, 8, "gelu")
    values = operands(case, torch.bfloat16)
    known = {value.untyped_storage().data_ptr(): name for name, value in values.items()}

    def kept(wanted: set[str], **options: Any) -> dict[str, int]:
        leaves = {name: value.detach().requires_grad_(name in wanted) for name, value in values.items()}
        found: dict[str, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            found[known.get(storage.data_ptr(), "drop")] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            bottleneck(**leaves, activation="gelu", backend=backend, **options)
        return found

    parameters = {"down", "down_bias", "up"}
    assert kept(set(values)).keys() == {"v", *parameters}
    assert kept({"residual", "up_bias"}).keys() == parameters
    assert kept(set()) == {}
    dropped = kept(set(values), dropout=0.5, training=True)
    assert dropped.keys() == {"v", "drop", *parameters}
    assert dropped["drop"] == (8 if backend == "triton" else 64 * 8)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_gradient_of_the_residual_is_the_outputs_own(backend: str) -> None:
    values = operands(CASES[0], torch.float32)
    residual = values["residual"].requires_grad_()
    values["down"].requires_grad_()
    seen: list[Tensor] = []
    # A step before the leaf, which would keep a copy.
    stream = residual * 1.0
    stream.register_hook(seen.append)
    out = bottleneck(**{**values, "residual": stream}, backend=backend)
    dy = torch.randn_like(out)
    out.backward(dy)
    assert seen[0].data_ptr() == dy.data_ptr()


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_checkpoint_recomputes_the_same_mask(backend: str, reentrant: bool) -> None:
    values = operands(Case((9, 12), 10, 6, residual="none"), torch.float32)
    v, up = values["v"].requires_grad_(), values["up"].requires_grad_()

    def run(v: Tensor) -> Tensor:
        return bottleneck(**{**values, "v": v}, dropout=0.5, training=True, backend=backend).tanh()

    def gradients(wrapped: Callable[[Tensor], Tensor]) -> tuple[Tensor | None, Tensor | None]:
        v.grad = up.grad = None
        torch.manual_seed(5)
        wrapped(v).sum().backward()
        return v.grad, up.grad

    plain = gradients(run)
    again = gradients(lambda v: checkpoint(run, v, use_reentrant=reentrant))
    for a, b in zip(plain, again, strict=True):
        assert a is not None
        assert b is not None
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_dropout_follows_manual_seed_and_only_while_training(backend: str) -> None:
    values = operands(CASES[0], torch.float32)

    def run(seed: int, training: bool = True) -> Tensor:
        torch.manual_seed(seed)
        return bottleneck(**values, dropout=0.5, training=training, backend=backend)

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))
    assert torch.equal(run(1, training=False), run(2, training=False))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("p", [0.1, 0.6])
def test_the_mask_hits_the_hidden_at_the_promised_rate(p: float, backend: str) -> None:
    """With D = 0, a = 1 and U = 1 the output is the scaled mask itself."""
    M, H = 200, 32
    eye, nothing = torch.eye(H, device=DEVICE), torch.zeros(H, 4, device=DEVICE)
    torch.manual_seed(0)
    out = bottleneck(
        torch.ones(M, 4, device=DEVICE),
        nothing,
        eye,
        down_bias=torch.ones(H, device=DEVICE),
        dropout=p,
        training=True,
        backend=backend,
    )
    kept = out != 0
    torch.testing.assert_close(out[kept], torch.full_like(out[kept], 1 / keep_probability(p, backend)))
    assert abs(kept.float().mean().item() - (1 - p)) < 4 * (p * (1 - p) / (M * H)) ** 0.5
    for rates in (kept.float().mean(0), kept.float().mean(1)):  # no token and no feature is spared
        assert (rates < 1).any()
        assert rates.std() < 3 * (p * (1 - p) * rates.numel() / (M * H)) ** 0.5


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("residual", ["v", "none"])
def test_autocast(residual: str, backend: str) -> None:
    """The products are in 16 bits, the stream keeps its dtype, as in the plain formula."""
    case = Case((9, 24), 24, 8, "gelu", residual=residual)
    values = operands(case, torch.float32)

    def under_autocast(run: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def wrapped(*args: Any, **kwargs: Any) -> Tensor:
            with torch.autocast(DEVICE, dtype=torch.bfloat16):
                return run(*args, **kwargs)

        return wrapped

    actual = results(under_autocast(bottleneck), case, values, backend=backend)

    def formula(to: torch.dtype) -> dict[str, Tensor]:
        if to == torch.bfloat16:
            return results(under_autocast(bottleneck_reference), case, values)
        return results(bottleneck_reference, case, {name: value.to(to) for name, value in values.items()})

    assert actual["out"].dtype == (torch.float32 if residual == "v" else torch.bfloat16)
    assert all(name == "out" or value.dtype == torch.float32 for name, value in actual.items())
    assert_follows(actual, formula, torch.bfloat16)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("groups", [1, 2])
def test_a_stream_in_fp32_is_not_rounded(groups: int, backend: str) -> None:
    case = Case((9, 24), 16, 8, groups=groups)
    options: dict[str, Any] = {"activation": "gelu", "groups": groups}
    values = operands(case, torch.bfloat16) | {"up_bias": torch.zeros(16, device=DEVICE)}
    stream = 1e4 + torch.randn(9, 16, device=DEVICE)
    without = bottleneck_reference(**{name: v.double() for name, v in values.items()}, **options)
    plain = bottleneck_reference(**{name: v.bfloat16() for name, v in values.items()}, **options)
    branch, plain_branch = without - values["residual"].double(), plain - values["residual"]
    values["residual"] = stream
    out = bottleneck(**values, **options, backend=backend)
    assert out.dtype == torch.float32
    # What fp32 at 10,000 adds to the error of the branch.
    assert_close(out.double() - stream, branch, plain_branch.double() + 1e-3, branch)
    leaves = {name: value.requires_grad_() for name, value in values.items()}
    dy = torch.randn(9, 16, device=DEVICE)
    grads = torch.autograd.grad(bottleneck(**leaves, **options, backend=backend), list(leaves.values()), dy)
    assert all(grad.dtype == leaf.dtype for grad, leaf in zip(grads, leaves.values(), strict=True))

    def formula(to: torch.dtype) -> dict[str, Tensor]:
        own = {name: value.detach().to(to).requires_grad_() for name, value in values.items()}
        wanted = torch.autograd.grad(bottleneck_reference(**own, **options), list(own.values()), dy.to(to))
        return dict(zip(own, wanted, strict=True))

    assert_follows(dict(zip(leaves, grads, strict=True)), formula, torch.bfloat16)


def calls(backend: str) -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """A call of each operator, with and without what is optional."""
    forward, backward = op.bottleneck, op.bottleneck_backward
    values = operands(Case((9, 20), 20, 6, groups=2), torch.float32)
    v, down, up, down_bias, up_bias, residual = values.values()
    drop = Dropout(draw_dropout(torch.zeros(9, 6, device=DEVICE), 0.3, backend), 0.3)
    layer = BottleneckLayer(down, up, down_bias, up_bias, 0.5, "gelu", 2)
    bare = BottleneckLayer(down, torch.cat([up, up], 1), None, None, 1.0, "relu", 1)
    linear = layer._replace(down_bias=None, activation="identity")
    quick = layer._replace(down_bias=None, activation="quick_gelu")
    none, everything = Dropout(), Wants(True, True, True, True, True)
    to_up, to_bias = Wants(False, False, True, False, True), Wants(False, False, False, False, True)
    return {
        "forward": (forward, (v, bare, None, none, backend)),
        "forward in full": (forward, (v, layer, residual, drop, backend)),
        "forward of a stream of its own": (forward, (v, linear, v, none, backend)),
        "backward": (backward, (residual, v, layer, drop, True, everything, backend)),
        "backward to the up-projection": (
            backward,
            (residual.T.contiguous().T, v, quick, none, False, to_up, backend),
        ),
        "backward to the last bias": (backward, (residual, None, layer, none, False, to_bias, backend)),
    }


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", calls("eager"))
def test_opcheck(name: str, backend: str) -> None:
    operator, args = calls(backend)[name]
    torch.library.opcheck(operator.registered, operator.flat(*args))
    layout_is_told(operator.registered, operator.flat(*args))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("residual", "dropout"), [("v", 0.3), ("other", 0.0)])
def test_compiles_in_one_graph_forward_and_backward(backend: str, residual: str, dropout: float) -> None:
    case = Case((2, 5, 20), 20, 6, "gelu", 2, residual=residual)
    values = {name: value.requires_grad_() for name, value in operands(case, torch.float32).items()}

    def run(leaves: dict[str, Any]) -> Tensor:
        given = leaves | ({"residual": leaves["v"]} if residual == "v" else {})
        return bottleneck(**given, activation="gelu", groups=2, dropout=dropout, training=True, backend=backend)

    def found(function: Callable[..., Tensor]) -> list[Tensor]:
        torch.manual_seed(0)
        out = function(values)
        return [out, *torch.autograd.grad(out.square().sum(), list(values.values()))]

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    plain, traced = found(run), found(compiled)
    if dropout and backend == "eager":  # compiled, the mask is another draw of the same generator
        assert torch.equal(traced[0], found(compiled)[0])
        return
    for a, b in zip(plain, traced, strict=True):
        torch.testing.assert_close(a, b)


def launch_all(
    case: Case, dtype: torch.dtype, place: Callable[[Tensor], Tensor] = lambda tensor: tensor
) -> list[Tensor]:
    """Forward and backward by the kernels with everything on; `place` sees each operand first."""
    values = {name: place(value) for name, value in operands(case, dtype).items()}
    seed = place(torch.tensor([2**40 + 7], device=DEVICE))
    v, down, up, down_bias, up_bias, residual = values.values()
    layer = kernels.BottleneckLayer(down, up, down_bias, up_bias, 0.5, case.activation, case.groups)
    out = kernels.bottleneck(v, layer, residual, seed, 0.3)
    dy = place(residual.contiguous())
    return [out, *kernels.bottleneck_backward(dy, v, layer, seed, 0.3, True, kernels.Wants())]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [Case((37, 100), 100, 24, "gelu", 2), Case((37, 33), 33, 5, "quick_gelu")], ids=str)
def test_nothing_outside_the_tensors_is_read_or_written(case: Case, dtype: torch.dtype) -> None:
    expected = launch_all(case, dtype)
    given: list[Tensor] = []

    def place(tensor: Tensor) -> Tensor:
        given.append(guarded(tensor))
        return given[-1]

    with guarded_outputs() as written:
        outputs = launch_all(case, dtype, place)
    assert written
    for actual, plain in zip(outputs, expected, strict=True):
        assert torch.equal(actual, plain)
        assert torch.isfinite(actual).all()
    for tensor in given + written:
        assert margins_intact(tensor)


def test_the_order_of_programs_does_not_matter(request: pytest.FixtureRequest) -> None:
    case = Case((70, 40), 40, 10, "gelu", 2)
    expected = launch_all(case, torch.float32)
    request.getfixturevalue("shuffled_programs")
    for actual, plain in zip(launch_all(case, torch.float32), expected, strict=True):
        assert torch.equal(actual, plain)


def test_the_forward_is_one_launch_and_the_backward_five() -> None:
    v = torch.empty(8192, 768, dtype=torch.bfloat16, device="meta")
    down, up = (torch.empty(*shape, device="meta") for shape in ((64, 768), (768, 64)))
    a, c = (torch.empty(size, device="meta") for size in (64, 768))
    layer = kernels.BottleneckLayer(down, up, a, c, 1.0, "relu", 1)
    with configs.recorded_launches(232_448) as launches:
        kernels.bottleneck(v, layer, v, None, 0.0)
    assert len(launches) == 1
    with configs.recorded_launches(232_448) as launches:
        kernels.bottleneck_backward(v, v, layer, None, 0.0, True, kernels.Wants())
    assert len(launches) == 5  # one adds up what the splits of the tokens left of a factor's gradient


def test_nan_is_not_hidden_by_relu() -> None:
    values = operands(CASES[0], torch.float32)
    values["v"][3, 4] = float("nan")
    for backend in BACKENDS:
        out = bottleneck(**values, backend=backend)
        assert out[3].isnan().all()
        assert torch.isfinite(out[2]).all()


def test_bad_arguments_are_named() -> None:
    values = operands(Case((4, 6), 8, 4, groups=2), torch.float32)
    v, down, up, residual = values["v"], values["down"], values["up"], values["residual"]
    cases: list[tuple[type[Exception], str, dict[str, Any]]] = [
        (ValueError, r"v must have shape \[\.\.\., 6\] to go with down \(4, 6\)", {"v": v[:, :3]}),
        (ValueError, r"down must have shape \[H, K\], both at least 1, got \(0, 6\)", {"down": down[:0]}),
        (ValueError, r"up must have shape \[N, 2\].*groups=2, got \(8, 1\)", {"up": up[:, :1]}),
        (ValueError, "groups must divide the 4 hidden features of down, got 3", {"groups": 3}),
        (ValueError, "groups must divide the 4 hidden features of down, got 0", {"groups": 0}),
        (ValueError, "groups must divide the 7 output features of up, got 2", {"up": up[:7]}),
        (ValueError, r"down_bias must have shape \[4\]", {"down_bias": up[0]}),
        (ValueError, r"up_bias must have shape \[8\]", {"up_bias": up[0]}),
        (ValueError, r"residual must have shape \[4, 8\], got \(8,\)", {"residual": residual[0]}),
        (ValueError, "activation must be one of identity, relu, gelu, quick_gelu, got 'silu'", {"activation": "silu"}),
        (ValueError, r"dropout must be in \[0, 1\), got 1", {"dropout": 1.0}),
        (ValueError, "backend must be one of", {"backend": "cuda"}),
        (ValueError, "up is on meta but v is on", {"up": up.to("meta")}),
        (ValueError, "up_bias is on meta but v is on", {"up_bias": values["up_bias"].to("meta")}),
        (TypeError, "v must be float16", {"v": v.int()}),
        (TypeError, "residual must have the dtype of the products, torch.float32", {"residual": residual.half()}),
        (TypeError, "no float64 kernels", {"v": v.double(), "residual": residual.double(), "backend": "triton"}),
    ]
    for error, message, changes in cases:
        with pytest.raises(error, match=message):
            bottleneck(**{**values, "groups": 2, **changes})


def test_more_hidden_features_than_the_kernels_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    assert function._MOST_HIDDEN == configs.MOST_HIDDEN
    values = operands(Case((4, 6), 8, 129), torch.float32)
    with pytest.raises(ValueError, match='up to 128 hidden features, got 129: take backend="eager"'):
        bottleneck(**values, backend="triton")
    layer = kernels.BottleneckLayer(values["down"], values["up"], None, None, 1.0, "relu", 1)
    with pytest.raises(ValueError, match="up to 128 hidden features, got 129"):
        kernels.bottleneck(values["v"], layer, None, None, 0.0)
    monkeypatch.setattr(function, "resolve_backend", lambda backend, *tensors: "triton")
    wide = BottleneckLayer(values["down"], values["up"], None, None, 1.0, "relu", 1)
    assert function._resolved("auto", values["v"], wide._replace(down=values["down"][:128])) == "triton"
    assert function._resolved("auto", values["v"], wide) == "eager"
