"""`fastadapt doctor`: what this machine has, the backend of each operator here, and whether it is right."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import eager, ops
from .functional import adapter_linear, weight_norm
from .reference import AdapterForm, adapter_linear_reference, weight_norm_reference
from .report import machine
from .strategies import HAS_TRITON, resolve_backend

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

# Public operator -> the kernels behind it, forward and backward.
OPERATORS = {
    "adapter_linear": "shrink, adapter_linear, shrink_grad, adapter_linear_dx, output_grads, input_grads",
    "weight_norm": "row_squares, weight_norm",
}

DROPOUT = 0.2


def devices() -> list[torch.device]:
    """The CPU and every accelerator that PyTorch sees."""
    found = [torch.device("cpu")]
    found += [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    return [*found, torch.device("mps")] if torch.backends.mps.is_available() else found


def describe(device: torch.device) -> str:
    """The device in words."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        memory = properties.total_memory / 2**30
        return f"{properties.name}, {memory:.0f} GiB, capability {properties.major}.{properties.minor}"
    if device.type == "cpu":
        return f"{machine()['cpu']}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    return "Apple GPU"


def interprets() -> bool:
    """Whether Triton kernels run in its interpreter, on CPU tensors."""
    return HAS_TRITON and os.environ.get("TRITON_INTERPRET") == "1"


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
        {"operator": operator, "kernels": kernels, "device": str(device), "backend": backend, "why": why}
        for operator, kernels in OPERATORS.items()
    ]


def testable(device: torch.device) -> list[str]:
    """The backends that can run on this device."""
    triton = HAS_TRITON and (device.type == "cuda" or (device.type == "cpu" and interprets()))
    return ["eager", "triton"] if triton else ["eager"]


class Case(NamedTuple):
    """A filling of an operator's arguments. parts: what the adapter form has; frozen: what takes no gradient."""

    operator: str
    name: str
    parts: tuple[str, ...] = ()
    frozen: tuple[str, ...] = ()
    dropout: float = 0.0
    dropout_on_base: bool = False


CASES = [
    Case("adapter_linear", "LoRA", ("bias",)),
    Case("adapter_linear", "LoRA, dropout", (), dropout=DROPOUT),
    Case("adapter_linear", "DoRA", ("out_scale", "base_scale", "bias")),
    Case("adapter_linear", "DoRA, dropout", ("out_scale", "base_scale"), dropout=DROPOUT, dropout_on_base=True),
    Case("adapter_linear", "VeRA", ("mid_scale", "out_scale"), frozen=("A", "B")),
    Case("adapter_linear", "every part", ("mid_scale", "out_scale", "base_scale", "bias"), dropout=DROPOUT),
    Case("weight_norm", "DoRA"),
]


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


Values = dict[str, Tensor]


def _values(case: Case, dtype: torch.dtype, sizes: tuple[int, int, int, int]) -> Values:
    """Random arguments on the CPU: x and weight in `dtype`, the adapter's in fp32, all exact in both."""
    m, k, n, r = sizes
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, std: float = 1.0, mean: float = 0.0) -> Tensor:
        return (mean + std * torch.randn(shape, generator=generator)).to(dtype).float()

    shapes = {"mid_scale": r, "out_scale": n, "base_scale": n, "bias": n}
    values = {
        "weight": normal(n, k, std=k**-0.5).to(dtype),
        "A": normal(r, k, std=k**-0.5),
        "B": normal(n, r, std=r**-0.5),
    }
    if case.operator == "adapter_linear":
        values["x"] = normal(m, k).to(dtype)
        values |= {part: normal(shapes[part], std=0.3, mean=0.8) for part in case.parts}
    return values


def _run(case: Case, values: Values, function: Callable[[Values], Tensor], dy: Tensor) -> Values:
    """The result and every gradient of `function` for the output gradient dy."""
    leaves = {
        name: value.detach().clone().requires_grad_(name != "weight" and name not in case.frozen)
        for name, value in values.items()
    }
    y = function(leaves)
    y.backward(dy.to(y))
    grads = {f"d{name}": leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    return {"y": y.detach(), **grads}


def _form(case: Case, values: Values) -> AdapterForm:
    return AdapterForm(
        values["A"],
        values["B"],
        values.get("mid_scale"),
        values.get("out_scale", 0.5),
        values.get("base_scale"),
        values.get("bias"),
        case.dropout_on_base,
    )


def _mask(case: Case, x: Tensor, backend: str) -> Tensor | None:
    """The dropout mask that the operator draws for x right after torch.manual_seed(0)."""
    if not case.dropout:
        return None
    torch.manual_seed(0)
    drop = ops.draw_dropout(x, case.dropout, backend)
    if backend != "triton":
        return eager.dropout_mask(drop, x.shape)
    from fastadapt_kernels.tiles import dropout_mask

    return dropout_mask(drop, x.shape[0], x.shape[1], case.dropout)


def _ours(case: Case, backend: str, values: Values) -> Tensor:
    if case.operator == "weight_norm":
        return weight_norm(values["weight"], values["A"], values["B"], 0.5, backend=backend)
    torch.manual_seed(0)
    form = _form(case, values)
    return adapter_linear(values["x"], values["weight"], form, dropout=case.dropout, training=True, backend=backend)


def _reference(case: Case, mask: Tensor | None, p: float, values: Values) -> Tensor:
    if case.operator == "weight_norm":
        return weight_norm_reference(values["weight"], values["A"], values["B"], 0.5)
    return adapter_linear_reference(values["x"], values["weight"], _form(case, values), mask=mask, p=p)


def check(case: Case, device: torch.device, backend: str, dtype: torch.dtype) -> Verdict:
    """Runs one case forward and backward and holds it to the reference.

    Each result must be finite and within twice the error that the reference formula itself has in `dtype` on this
    device, both against the reference in fp64: max|ours − exact| ≤ 2 (max|reference − exact| + eps max|exact|).
    """
    # The interpreter is slow, so its case is small; neither size is a multiple of a tile.
    small = backend == "triton" and device.type == "cpu"
    sizes = (37, 72, 56, 8) if small else (300, 576, 200, 16)
    try:
        values = {name: value.to(device) for name, value in _values(case, dtype, sizes).items()}
        rows, _, n, _ = sizes
        shape = (n,) if case.operator == "weight_norm" else (rows, n)
        dy = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        mask = _mask(case, values["x"], backend) if case.dropout else None
        p = 1.0 - ops.keep_probability(case.dropout, backend) if case.dropout else 0.0
        mine = _run(case, values, functools.partial(_ours, case, backend), dy.to(device))
        rounded = {name: value.to(dtype) for name, value in values.items()}
        plain = _run(case, rounded, functools.partial(_reference, case, mask, p), dy.to(device))
        # fp64 runs on the CPU: not every accelerator has it.
        wide = {name: value.cpu().double() for name, value in values.items()}
        exact = _run(case, wide, functools.partial(_reference, case, None if mask is None else mask.cpu(), p), dy)
    except Exception as problem:  # a self-test reports whatever breaks, and goes on with the next case
        return Verdict({}, [f"{type(problem).__name__}: {problem}".splitlines()[0]])
    errors, failed = {}, []
    for name, right in exact.items():
        largest = right.abs().max().item()
        error, reference_error = ((side[name].cpu().double() - right).abs().max().item() for side in (mine, plain))
        errors[name] = error / largest
        # `not <=` rather than `>`: NaN must fail.
        if not error <= 2 * (reference_error + torch.finfo(dtype).eps * largest):
            failed.append(name)
    return Verdict(errors, failed)


def self_test(targets: Iterable[torch.device], report: Callable[[str], None]) -> list[dict[str, Any]]:
    """Checks every operator on every device, backend and dtype; one flat row each."""
    rows = []
    for device in targets:
        for backend in testable(device):
            for case in CASES:
                for dtype_name, dtype in DTYPES.items():
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
