"""The operators that are timed, who provides them, and how a provider is held to the formula.

A case is one operator on one problem; `prepare` makes of a case and a provider a callable that does the work once and
returns everything that it computed. What differs between providers is only how: all of them get the same numbers.

    forward       y of one linear layer or of a group that reads one x, in evaluation (DoRA's norm is a constant there)
    step          forward and backward with gradients to x and all that the method trains, dropout and DoRA's norm
                  included, as in each training step
    weight_norm   DoRA's row norms alone

The operators beside the adapter form run on the arguments of doctor's cases, forward and backward: `prepare_plain`.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.cases import AdapterCase
from fastadapt.commands import doctor
from fastadapt.commands.batch_case import MultiAdapterLinearCase
from fastadapt.commands.case import Case
from fastadapt.functional import (
    adapter_linear,
    adapter_linear_group,
    row_squares,
    weight_norm,
)
from fastadapt.operators import masks
from fastadapt.operators.adapter_linear.strategies import STRATEGIES
from fastadapt.operators.adapter_linear.tuner import Key
from fastadapt.operators.adapter_linear.workload import workload_of
from fastadapt.operators.backends import HAS_TRITON
from fastadapt.operators.dropout import draw_dropout, keep_probability
from fastadapt.reference import AdapterForm, adapter_linear_reference, weight_norm_reference

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

# What stands beside our strategies. "ours" is the strategy that fastadapt takes by itself, "ungrouped" the same without
# what a group shares; "linear" the frozen layers alone, the floor of every adapter.
OTHERS = {
    "ours": "ours",
    "ungrouped": "ours, layer by layer",
    "reference": "formula in PyTorch",
    "compile": "formula, torch.compile",
    "peft": "PEFT",
    "linear": "F.linear alone",
}

# The operators of the registry that each operator of a case runs and times.
COVERS = {
    "forward": ("adapter_linear",),
    "step": ("adapter_linear", "adapter_linear_backward"),
    "weight_norm": ("weight_norm",),
}
_COVERED = {name for names in COVERS.values() for name in names}
PLAIN_CASES = [case for case in doctor.CASES if not _COVERED & set(case.covers) and not case.dropout]

SCALING = 2.0

Outputs = dict[str, Tensor]
Run = Callable[[], Outputs]


class Layers(NamedTuple):
    """Linear layers that read the same x [M, in_features]."""

    name: str
    in_features: int
    out_features: tuple[int, ...]


LLAMA_8B = (
    Layers("qkv", 4096, (4096, 1024, 1024)),
    Layers("o", 4096, (4096,)),
    Layers("gate_up", 4096, (14336, 14336)),
    Layers("down", 14336, (4096,)),
)
SMOLLM2 = (
    Layers("qkv", 576, (576, 192, 192)),
    Layers("o", 576, (576,)),
    Layers("gate_up", 576, (1536, 1536)),
    Layers("down", 1536, (576,)),
)
SMALL = (Layers("qkv", 96, (96, 40, 40)), Layers("o", 96, (80,)))


@dataclass(frozen=True)
class OperatorCase:
    """One operator on one problem. weight_norm is of the first layer."""

    operator: Literal["forward", "step", "weight_norm"]
    adapter: AdapterCase
    layers: Layers
    tokens: int
    dtype: str

    @property
    def label(self) -> str:
        tokens = "" if self.operator == "weight_norm" else f" M{self.tokens}"
        return f"{self.operator} {self.adapter.name} {self.layers.name}{tokens} {self.dtype}"

    @property
    def dropout(self) -> float:
        return self.adapter.dropout if self.operator == "step" else 0.0

    def describe(self) -> dict[str, Any]:
        """The case as flat columns."""
        return {
            "operator": self.operator,
            "case": self.adapter.name,
            "layers": self.layers.name,
            "M": self.tokens,
            "K": self.layers.in_features,
            "N": "+".join(map(str, self.layers.out_features)),
            "r": self.adapter.r,
            "dtype": self.dtype,
        }

    @property
    def flops(self) -> float:
        """Floating-point operations of the formula, two for each multiply-add, the same for every provider.

        A VeRA group shares u = x Aᵀ, and the part of dx that passes through A.
        """
        m, k, r = self.tokens, self.layers.in_features, self.adapter.r
        n, members = sum(self.layers.out_features), len(self.layers.out_features)
        if self.operator == "weight_norm":
            return 2.0 * self.layers.out_features[0] * k * r
        vera = self.adapter.method == "vera"
        thin = r * k * (1 if vera else members)
        products = k * n + thin + r * n
        if self.operator == "step":
            # dx and its low-rank part, q, P; dA where A is trained.
            products += k * n + thin + 2 * r * n + (0 if vera else thin)
        norm = r * k * n if self.adapter.method == "dora" and self.operator == "step" else 0
        return 2.0 * (m * products + norm)

    @property
    def minimum_bytes(self) -> float:
        """Bytes of the tensors that the operator must read or write, each once; of the group's x, and of dx, one.

        The backward reads x again where A is trained, and DoRA's z, which the forward has to write for it.
        """
        m, k, r = self.tokens, self.layers.in_features, self.adapter.r
        n, members = sum(self.layers.out_features), len(self.layers.out_features)
        size = DTYPES[self.dtype].itemsize
        if self.operator == "weight_norm":
            first = self.layers.out_features[0]
            return float(size * k * first + 4 * (r * (k + first) + 2 * first))
        vera = self.adapter.method == "vera"
        factors = 4 * r * (n + k * (1 if vera else members))
        total = size * (m * k + k * n + m * n) + factors
        if self.operator == "step":
            total += size * (m * n + k * n + m * k) + factors
            if not vera:
                total += size * m * k + factors  # x for dA, and the gradients
            if self.adapter.method == "dora":
                total += 2 * size * m * n + size * k * n  # z, and the weight for its norm
        return float(total)


@dataclass(frozen=True)
class Operands:
    """The numbers of a case: what the layers read, what they hold, and the gradients that come back.

    Each of `adapters` maps A, B and, as the method has them, m or lambda_d and lambda_b to tensors; VeRA's A and B
    are the same for all, cut to the layer's width.
    """

    x: Tensor
    weights: list[Tensor]
    adapters: list[dict[str, Tensor]]
    dys: list[Tensor]

    def to(self, base: torch.dtype, adapter: torch.dtype) -> Operands:
        """A copy in other dtypes; the same tensor stays the same."""
        made: dict[int, Tensor] = {}

        def converted(tensor: Tensor) -> Tensor:
            return made.setdefault(id(tensor), tensor.to(adapter))

        return Operands(
            self.x.to(base),
            [weight.to(base) for weight in self.weights],
            [{name: converted(value) for name, value in one.items()} for one in self.adapters],
            [dy.to(base) for dy in self.dys],
        )


# What each method trains.
TRAINED = {"lora": ("A", "B"), "dora": ("A", "B", "m"), "vera": ("lambda_d", "lambda_b")}


def make_operands(case: OperatorCase, device: torch.device, seed: int = 0) -> Operands:
    """Random operands: base in the case's dtype, adapters in fp32 with values that the dtype has too."""
    generator = torch.Generator(device).manual_seed(seed)
    dtype = DTYPES[case.dtype]
    k, r = case.layers.in_features, case.adapter.r

    def normal(*shape: int, std: float = 1.0, mean: float = 0.0) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).mul_(std).add_(mean).to(dtype)

    vera = case.adapter.method == "vera"
    down, up = normal(r, k, std=k**-0.5).float(), normal(max(case.layers.out_features), r, std=0.5 * r**-0.5).float()
    weights, adapters = [], []
    for n in case.layers.out_features:
        weights.append(normal(n, k, std=k**-0.5))
        if vera:
            scales = {"lambda_d": normal(r, std=0.3, mean=0.8).float(), "lambda_b": normal(n, std=0.3).float()}
            adapters.append({"A": down, "B": up[:n], **scales})
            continue
        adapters.append({"A": normal(r, k, std=k**-0.5).float(), "B": normal(n, r, std=0.5 * r**-0.5).float()})
        if case.adapter.method == "dora":
            adapters[-1]["m"] = normal(n, std=0.3, mean=1.5).float()
    dys = [normal(case.tokens, n) for n in case.layers.out_features] if case.operator == "step" else []
    return Operands(normal(case.tokens, k), weights, adapters, dys)


Norm = Callable[[Tensor, Tensor, Tensor], Tensor]


def make_form(adapter: AdapterCase, weight: Tensor, values: dict[str, Tensor], norm: Norm) -> AdapterForm:
    """The adapter form of one layer, as the method makes it in each forward; DoRA's norm is a constant."""
    A, B = values["A"], values["B"]
    if adapter.method == "vera":
        return AdapterForm(A, B, values["lambda_d"], values["lambda_b"])
    if adapter.method == "lora":
        return AdapterForm(A, B, out_scale=SCALING)
    g = values["m"] / norm(weight, A.detach(), B.detach())
    return AdapterForm(A, B, out_scale=g, base_scale=g, dropout_on_base=True, scaling=SCALING)


def _reference_norm(weight: Tensor, A: Tensor, B: Tensor) -> Tensor:
    return weight_norm_reference(weight, A, B, SCALING)


# The outputs of all layers for x and what each layer's adapter holds.
Forward = Callable[[Tensor, list[dict[str, Tensor]]], Sequence[Tensor]]


def _run(case: OperatorCase, operands: Operands, forward: Forward) -> Run:
    """The work of a case with this forward: outputs by name, and in a step the gradients."""
    if case.operator == "forward":

        def evaluate() -> Outputs:
            with torch.no_grad():
                return {f"y{i}": y for i, y in enumerate(forward(operands.x, operands.adapters))}

        return evaluate
    trained = TRAINED[case.adapter.method]
    x = operands.x.detach().requires_grad_()
    adapters = [
        {name: value.detach().requires_grad_() if name in trained else value for name, value in one.items()}
        for one in operands.adapters
    ]
    leaves = {"x": x} | {f"{name}{i}": one[name] for i, one in enumerate(adapters) for name in trained}
    return _step(leaves, operands.dys, lambda: forward(x, adapters))


def _step(leaves: dict[str, Tensor], dys: list[Tensor], forward: Callable[[], Sequence[Tensor]]) -> Run:
    def step() -> Outputs:
        ys = forward()
        grads = torch.autograd.grad(ys, list(leaves.values()), dys)
        return {f"y{i}": y.detach() for i, y in enumerate(ys)} | dict(
            zip((f"d{name}" for name in leaves), grads, strict=True)
        )

    return step


def _ours(case: OperatorCase, operands: Operands, strategy: str, grouped: bool) -> Run:
    weights = operands.weights
    squares = {id(weight): row_squares(weight) for weight in weights}
    constants: dict[int, Tensor] = {}

    def norm(weight: Tensor, A: Tensor, B: Tensor) -> Tensor:
        if case.operator == "forward" and id(weight) in constants:
            return constants[id(weight)]
        n = weight_norm(weight, A, B, SCALING, base_squared=squares[id(weight)])
        return constants.setdefault(id(weight), n) if case.operator == "forward" else n

    if case.operator == "weight_norm":
        adapter = operands.adapters[0]
        return lambda: {"n": norm(weights[0], adapter["A"], adapter["B"])}
    options: dict[str, Any] = {"dropout": case.dropout, "training": case.operator == "step", "strategy": strategy}

    def forward(x: Tensor, adapters: list[dict[str, Tensor]]) -> Sequence[Tensor]:
        forms = [make_form(case.adapter, weight, one, norm) for weight, one in zip(weights, adapters, strict=True)]
        if grouped and len(weights) > 1:
            return adapter_linear_group(x, weights, forms, **options)
        return [adapter_linear(x, weight, form, **options) for weight, form in zip(weights, forms, strict=True)]

    return _run(case, operands, forward)


def _reference(
    case: OperatorCase, operands: Operands, *, mask: Tensor | None = None, p: float = 0.0, compiled: bool = False
) -> Run:
    """The formula in the dtype of `operands`. Without a mask each call draws one where the case has dropout."""
    weights = operands.weights
    if case.operator == "weight_norm":
        adapter = operands.adapters[0]
        norm = torch.compile(_reference_norm, fullgraph=True, dynamic=False) if compiled else _reference_norm
        return lambda: {"n": norm(weights[0], adapter["A"], adapter["B"])}

    def forward(x: Tensor, adapters: list[dict[str, Tensor]]) -> Sequence[Tensor]:
        drawn, probability = mask, p
        if mask is None and case.dropout:
            drawn, probability = torch.rand_like(x) >= case.dropout, case.dropout
        return [
            adapter_linear_reference(
                x, weight, make_form(case.adapter, weight, one, _reference_norm), mask=drawn, p=probability
            )
            for weight, one in zip(weights, adapters, strict=True)
        ]

    return _run(case, operands, torch.compile(forward, fullgraph=True, dynamic=False) if compiled else forward)


def _linear(case: OperatorCase, operands: Operands) -> Run:
    """The frozen layers: their outputs, and in a step the gradient of x."""
    x, weights = operands.x, operands.weights
    if case.operator == "forward":
        return _run(case, operands, lambda x, _: [F.linear(x, weight) for weight in weights])
    x = x.detach().requires_grad_()
    return _step({"x": x}, operands.dys, lambda: [F.linear(x, weight) for weight in weights])


class _SameInput(nn.Module):
    """Linear layers on given weights that read one x."""

    def __init__(self, weights: list[Tensor]) -> None:
        super().__init__()
        self.count = len(weights)
        for index, weight in enumerate(weights):
            layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
            layer.weight = nn.Parameter(weight, requires_grad=False)
            self.add_module(f"layer{index}", layer)

    def layers(self) -> list[Any]:
        return [getattr(self, f"layer{index}") for index in range(self.count)]

    def forward(self, x: Tensor) -> list[Tensor]:
        return [layer(x) for layer in self.layers()]


def _peft(case: OperatorCase, operands: Operands, *, upcast: bool = False) -> Run:
    """PEFT's layers with the same numbers; in evaluation with its cache of DoRA's norms on.

    Adapters are in the dtype of the base; `upcast`: in fp32, PEFT's default, with which it casts x as well.
    """
    from peft import get_peft_model
    from peft.tuners.lora import dora

    if case.operator == "weight_norm":
        layer, adapter = dora.DoraLinearLayer(fan_in_fan_out=False), operands.adapters[0]
        weight, A, B = operands.weights[0], adapter["A"], adapter["B"]
        return lambda: {"n": layer.get_weight_norm(weight, B @ A, SCALING)}
    module = _SameInput(operands.weights)
    names = [name for name, _ in module.named_children()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(module, case.adapter.peft_config(names), autocast_adapter_dtype=upcast)
    model.to(operands.x.device, None if upcast else operands.x.dtype).train(case.operator == "step")
    leaves = {}
    for index, (layer, values) in enumerate(zip(module.layers(), operands.adapters, strict=True)):
        if case.adapter.method == "vera":
            layer.vera_A["default"].data.copy_(values["A"])
            layer.vera_B["default"].data[: len(values["B"])].copy_(values["B"])
            parameters = {"lambda_d": layer.vera_lambda_d["default"], "lambda_b": layer.vera_lambda_b["default"]}
        else:
            parameters = {"A": layer.lora_A["default"].weight, "B": layer.lora_B["default"].weight}
        if case.adapter.method == "dora":
            parameters["m"] = layer.lora_magnitude_vector["default"].weight
        for name, parameter in parameters.items():
            parameter.data.copy_(values[name])
            leaves[f"{name}{index}"] = parameter
    if case.operator == "forward":
        keeps_norms = case.adapter.method == "dora"

        def forward(x: Tensor, _: Any) -> Sequence[Tensor]:
            before, dora.ENABLE_DORA_CACHING = dora.ENABLE_DORA_CACHING, keeps_norms
            try:
                return list(model(x))
            finally:
                dora.ENABLE_DORA_CACHING = before

        return _run(case, operands, forward)
    x = operands.x.detach().requires_grad_()
    return _step({"x": x, **leaves}, operands.dys, lambda: list(model(x)))


def prepare(case: OperatorCase, provider: str, operands: Operands) -> Run:
    """The work of a case as a provider does it: a strategy by its name, or one of OTHERS.

    Raises ValueError where a strategy refuses the case, ImportError where PEFT is not installed; a compiler's errors
    come with the first call.
    """
    dtype = DTYPES[case.dtype]
    if provider in STRATEGIES:
        return _ours(case, operands, provider, grouped=True)
    if provider in ("ours", "ungrouped"):
        return _ours(case, operands, "auto", grouped=provider == "ours")
    if provider == "linear":
        return _linear(case, operands)
    same_dtype = operands.to(dtype, dtype)
    if provider in ("peft", "peft_fp32"):
        return _peft(case, same_dtype, upcast=provider == "peft_fp32")
    if provider == "compile":
        # Its cache is by function: other cases' would count as recompilations of this one.
        torch.compiler.reset()
    return _reference(case, same_dtype, compiled=provider == "compile")


def prepare_plain(case: Case, provider: str, values: Outputs) -> Run:
    """A case of doctor's on a backend or as "reference": y, and the gradients of all that trains in it."""
    if provider == "reference":  # the formula does not mix dtypes
        dtype = next(values[name].dtype for name in case.in_dtype if name in values)
        values = {name: value.to(dtype) for name, value in values.items()}
    elif isinstance(case, MultiAdapterLinearCase):
        return _prepare_batch(case, provider, values)
    values = {name: value.detach().requires_grad_(case.trains(name)) for name, value in values.items()}
    leaves = {name: value for name, value in values.items() if value.requires_grad}

    def forward() -> Sequence[Tensor]:
        return [case.reference(values, None, 0.0) if provider == "reference" else case.ours(values, provider)]

    if not leaves:
        return lambda: {"y0": forward()[0]}
    (y,) = forward()
    return _step(leaves, [torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)], forward)


def _prepare_batch(case: MultiAdapterLinearCase, backend: str, values: Outputs) -> Run:
    """Many adapters in one batch: the pool and the batch's tables are made once, as for all layers of a model."""
    pool = case.pool(values)
    held = contextlib.ExitStack().enter_context(pool.hold(case.rows))
    batch, layer = held.batch(values["x"].shape[1]), pool.layer("layer")
    return lambda: {"y0": case.call(values, batch, layer, backend)}


def runnable_strategies(device: torch.device) -> list[str]:
    """The strategies that a device can run. Interpreted kernels have no time worth knowing."""
    triton = HAS_TRITON and device.type == "cuda"
    return [name for name, backend in STRATEGIES.items() if triton or backend == "eager"]


def providers(case: OperatorCase, device: torch.device) -> list[str]:
    """Who can be asked for a case on a device."""
    if case.operator == "weight_norm":  # it has no strategies
        return ["ours", "reference", "compile", "peft"]
    others = [name for name in OTHERS if name != "ungrouped" or len(case.layers.out_features) > 1]
    return [*runnable_strategies(device), *others]


def refusal(problem: Exception) -> str | None:
    """What the exception says if it only means that this provider is not for this case or not installed here."""
    text = str(problem)
    if isinstance(problem, ImportError):
        return text
    return text if isinstance(problem, ValueError) and text.startswith(('strategy "', 'backend "')) else None


class Verdict(NamedTuple):
    """The outcome of a check. worst: the largest error as a share of what is allowed; failed: what exceeds it."""

    worst: float
    failed: list[str]


def judge(actual: Outputs, exact: Outputs, reference: Outputs) -> Verdict:
    """Holds results to twice the error of the plain formula in the same dtype, and to be finite:

        max|actual − exact| ≤ 2 (max|reference − exact| + eps(dtype) max|exact|)

    exact is the formula in fp64; the dtype is the reference's.
    """
    worst, failed = 0.0, []
    for name, right in exact.items():
        if right.numel() == 0:
            continue
        mine, plain = actual[name], reference[name]
        error, reference_error = ((side.double() - right).abs().max().item() for side in (mine, plain))
        allowed = 2 * (reference_error + torch.finfo(plain.dtype).eps * right.abs().max().item())
        # `not <=` rather than `>`: NaN must fail.
        if not error <= allowed:
            failed.append(f"{name}: error {error:.2e} > {allowed:.2e}")
        worst = max(worst, error / allowed) if error == error else float("inf")
    return Verdict(worst, failed)


def check(case: OperatorCase, provider: str, device: torch.device) -> Verdict:
    """Runs a case once and holds everything that it returns to the formula in fp64 on the same device.

    Under dropout only a strategy can be checked: its backend says which mask it draws.
    """
    operands = make_operands(case, device)
    run = prepare(case, provider, operands)
    torch.manual_seed(0)
    actual = run()
    exact, plain = formula(case, operands, STRATEGIES.get(provider, "eager"))
    return judge(actual, {name: exact[name] for name in actual}, plain)


def formula(case: OperatorCase, operands: Operands, backend: str) -> tuple[Outputs, Outputs]:
    """What the formula makes of a case in fp64 and in its dtype, with the mask that a backend draws after seed 0."""
    mask, p = _mask(operands.x, case.dropout, backend) if case.dropout else (None, 0.0)
    dtypes = torch.float64, DTYPES[case.dtype]
    exact, plain = (_reference(case, operands.to(dtype, dtype), mask=mask, p=p)() for dtype in dtypes)
    return exact, plain


def _mask(x: Tensor, p: float, backend: str) -> tuple[Tensor, float]:
    """The dropout mask that fastadapt draws for x right after torch.manual_seed(0), and its real probability."""
    torch.manual_seed(0)
    drop = draw_dropout(x, p, backend)
    dropped = 1.0 - keep_probability(p, backend)
    if backend != "triton":
        return masks.dropout_mask(drop, x.shape), dropped
    from fastadapt_kernels.tiles import dropout_mask

    return dropout_mask(drop, x.shape[0], x.shape[1], p), dropped


def tuner_key(case: OperatorCase, operands: Operands) -> Key:
    """Where the tuner keeps what is measured for this case."""
    step = case.operator == "step"
    trained = TRAINED[case.adapter.method] if step else ()
    x = operands.x.detach().requires_grad_(step)
    forms = []
    for weight, values in zip(operands.weights, operands.adapters, strict=True):
        leaves = {name: v.detach().requires_grad_() if name in trained else v for name, v in values.items()}
        forms.append(make_form(case.adapter, weight, leaves, _reference_norm))
    return Key.of(workload_of(x, operands.weights, forms, x.dtype, case.dropout > 0.0), x.device)
