"""`fastadapt doctor`: what this machine has, the backend of each operator here, and whether it is right."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..functional import (
    adapter_linear,
    adapter_update,
    hadamard_linear,
    row_squares,
    weight_norm,
)
from ..operators import masks
from ..operators.backends import HAS_TRITON, resolve_backend
from ..operators.bottleneck.function import bottleneck
from ..operators.dropout import draw_dropout, keep_probability
from ..operators.registry import not_covered
from ..reference import (
    AdapterForm,
    adapter_linear_reference,
    adapter_update_reference,
    bottleneck_reference,
    hadamard_linear_reference,
    row_squares_reference,
    weight_norm_reference,
)
from .batch_case import batch_cases
from .case import Case, Normal, Sizes, Values
from .expert_case import expert_cases

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

DROPOUT = 0.2


def interprets() -> bool:
    """Whether Triton kernels run in its interpreter, on CPU tensors."""
    return HAS_TRITON and os.environ.get("TRITON_INTERPRET") == "1"


@dataclass(frozen=True)
class AdapterLinearCase(Case):
    """parts: what the adapter form has beside A and B. tied: whether base_scale multiplies the sum of both paths.

    strategy: which one runs on Triton, where "auto" would leave the kernels of the other untested.
    """

    operator = "adapter_linear"
    covers = ("adapter_linear", "adapter_linear_backward")
    kernels: ClassVar[tuple[str, ...]] = (
        "shrink",
        "adapter_linear",
        "output_grads",
        "adapter_linear_dx",
        "input_grads",
        "sum_partials",
    )
    limits = "PyTorch's own product where that is expected, or was measured, to be faster"

    parts: tuple[str, ...] = ()
    tied: bool = False
    dropout_on_base: bool = False
    strategy: str = "split"

    def values(self, normal: Normal, sizes: Sizes) -> Values:
        m, k, n, r = sizes
        lengths = {"mid_scale": r, "out_scale": n, "base_scale": n, "bias": n}
        return {
            "weight": normal(n, k, std=k**-0.5),
            "A": normal(r, k, std=k**-0.5),
            "B": normal(n, r, std=r**-0.5),
            "x": normal(m, k),
            **{part: normal(lengths[part], std=0.3, mean=0.8) for part in self.parts},
        }

    def _form(self, values: Values) -> AdapterForm:
        base_scale = values.get("base_scale")
        return AdapterForm(
            values["A"],
            values["B"],
            values.get("mid_scale"),
            base_scale if self.tied and base_scale is not None else values.get("out_scale", 1.0),
            base_scale,
            values.get("bias"),
            self.dropout_on_base,
            scaling=0.5,
        )

    def ours(self, values: Values, backend: str) -> Tensor:
        return adapter_linear(
            values["x"],
            values["weight"],
            self._form(values),
            dropout=self.dropout,
            training=True,
            backend=backend,
            strategy=self.strategy if backend == "triton" else "auto",
        )

    def reference(self, values: Values, mask: Tensor | None, p: float) -> Tensor:
        return adapter_linear_reference(values["x"], values["weight"], self._form(values), mask=mask, p=p)


@dataclass(frozen=True)
class AdapterUpdateCase(AdapterLinearCase):
    """The same form on what a base layer has given: y, and with dropout_on_base what it gave for a dropped input."""

    operator = "adapter_update"
    covers = ("adapter_update", "adapter_update_backward")
    kernels = ()
    in_dtype = ("x", "y", "y_dropped")

    def values(self, normal: Normal, sizes: Sizes) -> Values:
        values = super().values(normal, sizes)
        del values["weight"]
        values["base_bias"] = normal(sizes.N, std=3.0)
        outputs = ("y", "y_dropped") if self.dropout_on_base else ("y",)
        return {**values, **{name: normal(sizes.M, sizes.N, std=3.0) for name in outputs}}

    def _arguments(self, values: Values) -> dict[str, Any]:
        named: dict[str, Any] = {name: values[name] for name in ("y", "x", "base_bias", "y_dropped") if name in values}
        return {**named, "form": self._form(values)}

    def ours(self, values: Values, backend: str) -> Tensor:
        return adapter_update(**self._arguments(values), backend="eager")

    def reference(self, values: Values, mask: Tensor | None, p: float) -> Tensor:
        return adapter_update_reference(**self._arguments(values))


@dataclass(frozen=True)
class HadamardLinearCase(Case):
    """low_rank: whether there are an A, a B and a bias. base: whether W0 x is part of y."""

    operator = "hadamard_linear"
    covers = ("hadamard_linear", "hadamard_linear_backward")
    kernels = ("shrink", "hadamard_linear", "hadamard_grads", "output_grads", "input_grads", "sum_partials")

    low_rank: bool = False
    base: bool = True

    def values(self, normal: Normal, sizes: Sizes) -> Values:
        m, k, n, r = sizes
        values = {
            "x": normal(m, k),
            "weight": normal(n, k, std=k**-0.5),
            "U": normal(n, r),
            "V": normal(r, k, std=r**-0.5),
        }
        if self.low_rank:
            values |= {"A": normal(r, k, std=k**-0.5), "B": normal(n, r), "bias": normal(n, std=3.0)}
        return values

    def ours(self, values: Values, backend: str) -> Tensor:
        return hadamard_linear(**values, base=self.base, backend=backend)

    def reference(self, values: Values, mask: Tensor | None, p: float) -> Tensor:
        return hadamard_linear_reference(**values, base=self.base)


@dataclass(frozen=True)
class BottleneckCase(Case):
    """adds_v: whether the residual is v itself, or else a tensor of its own."""

    operator = "bottleneck"
    covers = ("bottleneck", "bottleneck_backward")
    kernels = ("bottleneck", "bottleneck_backward", "output_grads", "input_grads", "sum_partials")
    limits = "eager beyond 128 hidden features"
    in_dtype = ("v", "residual")

    activation: str = "relu"
    groups: int = 1
    adds_v: bool = True

    def values(self, normal: Normal, sizes: Sizes) -> Values:
        m, k, n, h = sizes
        if self.adds_v:
            n = k
        a = normal(h)
        values = {
            "v": normal(m, k),
            "down": normal(h, k, std=k**-0.5),
            # Far from ReLU's bend, where rounding would decide the gradient.
            "down_bias": 8.0 * a.sign() if self.activation == "relu" else a,
            "up": normal(n, h // self.groups, std=h**-0.5),
            "up_bias": normal(n),
        }
        return values if self.adds_v else {**values, "residual": normal(m, n)}

    def dropped(self, values: Values) -> Tensor:
        return values["v"].new_empty(()).expand(len(values["v"]), len(values["down"]))

    def _arguments(self, values: Values) -> dict[str, Any]:
        options = {"scaling": 0.5, "activation": self.activation, "groups": self.groups}
        return {**values, "residual": values["v" if self.adds_v else "residual"], **options}

    def ours(self, values: Values, backend: str) -> Tensor:
        return bottleneck(**self._arguments(values), dropout=self.dropout, training=True, backend=backend)

    def reference(self, values: Values, mask: Tensor | None, p: float) -> Tensor:
        return bottleneck_reference(**self._arguments(values), mask=mask, p=p)


@dataclass(frozen=True)
class WeightNormCase(Case):
    operator = "weight_norm"
    covers = ("weight_norm", "row_squares")
    kernels = ("row_squares", "weight_norm", "shrink", "sum_partials")

    def values(self, normal: Normal, sizes: Sizes) -> Values:
        _, k, n, r = sizes
        return {
            "weight": normal(n, k, std=k**-0.5),
            "A": normal(r, k, std=k**-0.5),
            "B": normal(n, r, std=r**-0.5),
        }

    def ours(self, values: Values, backend: str) -> Tensor:
        return weight_norm(values["weight"], values["A"], values["B"], 0.5, backend=backend)

    def reference(self, values: Values, mask: Tensor | None, p: float) -> Tensor:
        return weight_norm_reference(values["weight"], values["A"], values["B"], 0.5)


@dataclass(frozen=True)
class RowSquaresCase(Case):
    operator = "row_squares"
    covers = ("row_squares",)
    kernels = ("row_squares",)
    has_gradients = False

    def values(self, normal: Normal, sizes: Sizes) -> Values:
        return {"weight": normal(sizes.N, sizes.K)}

    def ours(self, values: Values, backend: str) -> Tensor:
        return row_squares(values["weight"], backend=backend)

    def reference(self, values: Values, mask: Tensor | None, p: float) -> Tensor:
        return row_squares_reference(values["weight"])


CASES: list[Case] = [
    AdapterLinearCase("LoRA", parts=("bias",)),
    AdapterLinearCase("LoRA, dropout", dropout=DROPOUT, strategy="fused"),
    AdapterLinearCase("DoRA", parts=("base_scale", "bias"), tied=True, strategy="fused"),
    AdapterLinearCase("DoRA, dropout", parts=("base_scale",), tied=True, dropout=DROPOUT, dropout_on_base=True),
    AdapterLinearCase("VeRA", parts=("mid_scale", "out_scale"), frozen=("A", "B")),
    AdapterLinearCase(
        "every part", parts=("mid_scale", "out_scale", "base_scale", "bias"), dropout=DROPOUT, strategy="fused"
    ),
    AdapterUpdateCase("LoRA", parts=("bias",)),
    AdapterUpdateCase("DoRA, dropout", parts=("base_scale", "bias"), tied=True, dropout_on_base=True),
    AdapterUpdateCase("every part", parts=("mid_scale", "out_scale", "base_scale", "bias")),
    HadamardLinearCase("HiRA"),
    HadamardLinearCase("GLoRA", low_rank=True),
    HadamardLinearCase("without W0 x", base=False),
    BottleneckCase("AdaptFormer, dropout", activation="relu", adds_v=False, dropout=DROPOUT),
    BottleneckCase("RepAdapter", activation="identity", groups=2),
    BottleneckCase("NOAH", activation="quick_gelu"),
    BottleneckCase("GELU", activation="gelu", adds_v=False),
    WeightNormCase("DoRA"),
    RowSquaresCase("DoRA"),
    *batch_cases(),
    *expert_cases(DROPOUT),
]

# Each operator that has a case, and what all of its cases have in common.
OPERATORS: dict[str, type[Case]] = {case.operator: type(case) for case in CASES}


def untested() -> list[str]:
    """The registered operators that run in no case."""
    return not_covered([name for case in CASES for name in case.covers])


def choices(device: torch.device) -> list[dict[str, Any]]:
    """For each operator the backend that "auto" takes on this device, and why."""
    probe = torch.empty(0, device=device)
    backend = resolve_backend("auto", probe)
    if backend == "triton":
        why = "the tensors are on a GPU and Triton is installed"
    elif not HAS_TRITON:
        why = 'Triton is not installed (pip install "fastadapt[triton]" where torch brings none)'
    elif device.type == "cpu":
        why = "Triton kernels need a GPU"
        if interprets():
            why += '; TRITON_INTERPRET=1 lets an explicit backend="triton" run in the interpreter'
    else:
        why = f"there are no Triton kernels for {device.type}"
    return [
        {
            "operator": operator,
            "kernels": ", ".join(case.kernels),
            "device": str(device),
            "backend": backend if case.kernels else "eager",
            "why": f"{why}; {case.limits}" if case.limits and backend == "triton" else why,
        }
        for operator, case in OPERATORS.items()
    ]


def testable(device: torch.device) -> list[str]:
    """The backends that can run on this device."""
    triton = HAS_TRITON and (device.type == "cuda" or (device.type == "cpu" and interprets()))
    return ["eager", "triton"] if triton else ["eager"]


@dataclass
class Verdict:
    """Errors of one case, each as max|ours − exact| / max|exact|; `failed` names what exceeds its bound or says why."""

    errors: dict[str, float]
    failed: list[str]

    @property
    def ok(self) -> bool:
        return not self.failed

    @property
    def worst(self) -> float:
        return max(self.errors.values(), default=math.nan)


def values_of(case: Case, dtype: torch.dtype, sizes: Sizes) -> Values:
    """Random arguments on the CPU: those of the case's `in_dtype` in `dtype`, the others in fp32, all exact in both."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, std: float = 1.0, mean: float = 0.0) -> Tensor:
        return (mean + std * torch.randn(shape, generator=generator)).to(dtype).float()

    values = case.values(normal, sizes)
    return {name: value.to(dtype) if name in case.in_dtype else value for name, value in values.items()}


def _run(
    case: Case, values: Values, function: Callable[[Values], Tensor], dtype: torch.dtype, *, absolute: bool = False
) -> Values:
    """The result and every gradient of `function` for an output gradient that `dtype` can hold.

    absolute: for the absolute values of everything instead, so that what is added up are the sizes of the terms.
    """
    leaves = {}
    for name, value in values.items():
        leaves[name] = (value.abs() if absolute else value).detach().clone()
        leaves[name].requires_grad_(case.trains(name))
    y = function(leaves)
    if y.requires_grad:
        dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        y.backward((dy.abs() if absolute else dy).to(y))
    grads = {f"d{name}": leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    return {"y": y.detach(), **grads}


def _ours(case: Case, backend: str, values: Values) -> Tensor:
    torch.manual_seed(0)
    return case.ours(values, backend)


def _mask(case: Case, values: Values, backend: str) -> tuple[Tensor | None, float]:
    """The dropout mask that the operator draws right after torch.manual_seed(0), and its exact probability."""
    if not case.dropout:
        return None, 0.0
    if not case.draws_in_kernels:
        backend = "eager"
    p = 1.0 - keep_probability(case.dropout, backend)
    dropped = case.dropped(values)
    torch.manual_seed(0)
    drop = draw_dropout(dropped, case.dropout, backend)
    if backend != "triton":
        return masks.dropout_mask(drop, dropped.shape), p
    from fastadapt_kernels.tiles import dropout_mask

    return dropout_mask(drop, dropped.shape[0], dropped.shape[1], case.dropout), p


def check(case: Case, device: torch.device, backend: str, dtype: torch.dtype) -> Verdict:
    """Runs one case, forward and backward where there is one, and holds it to the reference.

    Each result must be finite and within twice the error that the reference formula itself has in `dtype` on this
    device, both against the reference in fp64: max|ours − exact| ≤ 2 (max|reference − exact| + eps · size), where size
    is the largest sum of |terms|, that is the formula on absolute values, or of the result.
    """
    # The interpreter is slow, so its case is small.
    small = backend == "triton" and device.type == "cpu"
    sizes = Sizes(37, 72, 56, 8) if small else Sizes(300, 576, 200, 16)
    try:
        values = {name: value.to(device) for name, value in values_of(case, dtype, sizes).items()}
        mask, p = _mask(case, values, backend)
        mine = _run(case, values, functools.partial(_ours, case, backend), dtype)
        rounded = {name: value.to(dtype) for name, value in values.items()}
        plain = _run(case, rounded, lambda leaves: case.reference(leaves, mask, p), dtype)
        # fp64 runs on the CPU: not every accelerator has it.
        wide = {name: value.cpu().double() for name, value in values.items()}
        wide_mask = None if mask is None else mask.cpu()
        exact, terms = (
            _run(case, wide, lambda leaves: case.reference(leaves, wide_mask, p), dtype, absolute=absolute)
            for absolute in (False, True)
        )
    except Exception as problem:  # a self-test reports whatever breaks, and goes on with the next case
        return Verdict({}, [f"{type(problem).__name__}: {problem}".splitlines()[0]])
    errors, failed = {}, []
    for name, right in exact.items():
        largest = right.abs().max().item()
        # What the formula subtracts (the 1 of g − 1) makes the sum smaller than it is.
        size = max(largest, terms[name].abs().max().item())
        error, reference_error = ((side[name].cpu().double() - right).abs().max().item() for side in (mine, plain))
        errors[name] = error / largest
        # `not <=` rather than `>`: NaN must fail.
        if not error <= 2 * (reference_error + torch.finfo(dtype).eps * size):
            failed.append(name)
    return Verdict(errors, failed)


def self_test(targets: Iterable[torch.device], report: Callable[[str], None]) -> list[dict[str, Any]]:
    """Runs every case on every device, backend and dtype; one flat row each."""
    rows = []
    for device in targets:
        for backend in testable(device):
            for case in CASES:
                for dtype_name, dtype in DTYPES.items():
                    if backend == "triton" and not case.kernels:
                        continue
                    # The interpreter computes with the bit patterns of bf16 (triton issue 11584).
                    if backend == "triton" and device.type == "cpu" and dtype == torch.bfloat16:
                        continue
                    report(f"{device}, {backend}: {case.operator}, {case.name}, {dtype_name}")
                    verdict = check(case, device, backend, dtype)
                    rows.append(
                        {
                            "operator": case.operator,
                            "case": case.name,
                            "device": str(device),
                            "backend": backend,
                            "dtype": dtype_name,
                            "max_error": verdict.worst if verdict.errors else None,
                            "ok": verdict.ok,
                            "failed": "; ".join(verdict.failed),
                            **{f"error_{name}": error for name, error in verdict.errors.items()},
                        }
                    )
    return rows
