"""`fastadapt doctor`: no operator is left out, no kernel is named that is none, and what is wrong is found."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from test_cli import run, unwrapped
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastadapt.commands import doctor
from fastadapt.commands.batch_case import captured_cases
from fastadapt.commands.doctor import Case, Normal, Sizes, Values
from fastadapt.operators import registry
from fastadapt.operators.adapter_linear import plain, plan
from fastadapt.operators.adapter_linear.strategies import STRATEGIES
from fastadapt.operators.multi_adapter_linear import op as multi
from fastadapt.operators.multi_adapter_linear.captured import CapturedUpdate
from fastadapt.operators.registry import OPERATORS

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ROOT = Path(__file__).parent.parent
SMALL = Sizes(7, 24, 20, 4)
# A GPU to record launches for: what a block of sm_80 may take.
LARGE = 166_912
BY_OPERATOR = {operator: [case for case in doctor.CASES if case.operator == operator] for operator in doctor.OPERATORS}


class Seen(TorchDispatchMode):
    """Takes note of the operators of fastadapt that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "fastadapt":
            self.names.add(func._schema.name.removeprefix("fastadapt::"))
        return func(*args, **(kwargs or {}))


def kernels_of_the_package() -> set[str]:
    """The names of the kernels in fastadapt_kernels, without _ and _kernel."""
    found = set()
    for path in (ROOT / "kernels" / "fastadapt_kernels").glob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel"):
                found.add(node.name.removeprefix("_").removesuffix("_kernel"))
    return found


def run_small(case: Case, backend: str, sizes: Sizes = SMALL) -> Values:
    """The results of a case, forward and backward."""
    values = {name: value.to(DEVICE) for name, value in doctor.values_of(case, torch.float32, sizes).items()}
    return doctor._run(case, values, lambda leaves: doctor._ours(case, backend, leaves), torch.float32)


def test_every_registered_operator_is_tested() -> None:
    registered = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("fastadapt::")}
    assert {f"fastadapt::{name}" for name in OPERATORS} == registered
    assert len(OPERATORS) == len(registered)
    assert doctor.untested() == []


@pytest.mark.parametrize("operator", doctor.OPERATORS)
def test_a_case_runs_the_operators_that_it_claims(operator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (registry, multi, plan):  # so that the dispatcher sees every operator
        monkeypatch.setattr(module, "sees_operators", lambda x: True)
    for case in BY_OPERATOR[operator]:
        with Seen() as seen:
            run_small(case, "eager")
        assert seen.names == set(case.covers), case.name


def test_an_operator_without_a_case_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planted = ["row_squares", "brand_new_linear", "brand_new_linear_backward"]
    monkeypatch.setattr(registry, "OPERATORS", dict.fromkeys(planted))
    monkeypatch.setattr(doctor, "CASES", BY_OPERATOR["row_squares"])
    result = run("doctor", "--json", tmp_path / "doctor.json")
    assert result.exit_code == 0, result.output
    table, _, end = result.stdout.partition("Self-test")[2].partition("all operators")
    rows = [line for line in table.splitlines() if "brand_new_linear" in line]
    assert len(rows) == 2
    assert all("untested" in row and "ok" not in row for row in rows)
    assert unwrapped(end).startswith("with a self-test agree")
    assert "UNTESTED, without a self-test: brand_new_linear, brand_new_linear_backward" in unwrapped(end)
    document = json.loads((tmp_path / "doctor.json").read_text())
    assert document["untested"] == ["brand_new_linear", "brand_new_linear_backward"]


def test_every_kernel_that_is_named_exists_and_every_kernel_is_named() -> None:
    named = {kernel for case in doctor.CASES for kernel in case.kernels}
    assert named == kernels_of_the_package() - {"dropout_mask"}  # no operator's: it shows the mask that the others draw


@pytest.mark.parametrize("operator", doctor.OPERATORS)
def test_an_operator_launches_the_kernels_that_it_names(operator: str) -> None:
    from fastadapt_kernels import configs

    with configs.recorded_launches(LARGE) as launches:
        for case in BY_OPERATOR[operator]:
            run_small(case, "triton", Sizes(300, 576, 200, 16))
    launched = {launch.kernel.fn.__name__ for launch in launches}
    assert launched == {f"_{name}_kernel" for name in doctor.OPERATORS[operator].kernels}


@pytest.mark.parametrize("backend", ["eager", "triton"])
@pytest.mark.parametrize("case", captured_cases(), ids=lambda case: case.name)
def test_what_engines_capture_is_right(case: Case, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `bench gpu` asks it of a GPU; and what is wrong is found."""
    assert doctor.check(case, DEVICE, backend, torch.float32).ok
    right = CapturedUpdate.__call__

    def wrong(self: CapturedUpdate, y: Any, *args: Any) -> None:
        right(self, y, *args)
        y.mul_(1.001)

    monkeypatch.setattr(CapturedUpdate, "__call__", wrong)
    assert doctor.check(case, DEVICE, backend, torch.float32).failed


def test_both_strategies_of_triton_are_tested() -> None:
    tested = {case.strategy for case in doctor.CASES if isinstance(case, doctor.AdapterLinearCase)}
    assert tested == {name for name, backend in STRATEGIES.items() if backend == "triton"}


@pytest.mark.parametrize("operator", doctor.OPERATORS)
def test_each_operator_that_is_wrong_is_found(operator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules[doctor.OPERATORS[operator].__module__]
    right = getattr(module, operator)
    assert all(doctor.check(case, DEVICE, "eager", torch.float32).ok for case in BY_OPERATOR[operator])

    def wrong(*args: Any, **named: Any) -> Any:
        y = right(*args, **named)
        return args[0][0].mul_(1.001) if y is None else 1.001 * y  # in place, or not

    monkeypatch.setattr(module, operator, wrong)
    assert all("y" in doctor.check(case, DEVICE, "eager", torch.float32).failed for case in BY_OPERATOR[operator])


GRADIENTS = {
    "adapter_linear": {"x", "A", "B", "mid_scale", "out_scale", "base_scale", "bias"},
    "adapter_update": {
        *("y", "y_dropped", "x", "base_bias"),
        *("A", "B", "mid_scale", "out_scale", "base_scale", "bias"),
    },
    "expert_linear": {"x", "A", "B", "mid_scale", "out_scale", "base_scale", "bias"},
    "hadamard_linear": {"x", "U", "V", "A", "B", "bias"},
    "bottleneck": {"v", "down", "down_bias", "up", "up_bias", "residual"},
    "weight_norm": {"A", "B"},
    "row_squares": set(),
    "multi_adapter_linear": set(),
    "multi_adapter_update": set(),
}


@pytest.mark.parametrize("operator", doctor.OPERATORS)
def test_every_gradient_is_held_to_the_reference(operator: str) -> None:
    found = set().union(*[run_small(case, "eager") for case in BY_OPERATOR[operator]])
    assert found == {"y"} | {f"d{name}" for name in GRADIENTS[operator]}


@pytest.mark.parametrize("operator", ["adapter_linear", "adapter_update", "hadamard_linear", "bottleneck"])
def test_a_wrong_backward_is_found(operator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module(f"fastadapt.operators.{operator}.op")
    right = getattr(module, f"{operator}_backward")

    def wrong(*arguments: Any) -> Any:
        found = right(*arguments)
        return type(found)(1.001 * found[0], *found[1:])

    monkeypatch.setattr(module, f"{operator}_backward", wrong)
    monkeypatch.setattr(plan, "sees_operators", lambda x: True)  # no short way beside the operator
    for case in BY_OPERATOR[operator]:
        first = "dv" if operator == "bottleneck" else "dx"
        assert doctor.check(case, DEVICE, "eager", torch.float32).failed == [first], case.name


def test_a_wrong_backward_of_lora_by_itself_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = plain._backward
    monkeypatch.setattr(plain, "_backward", lambda ctx, dy: (1.001 * right(ctx, dy)[0], *right(ctx, dy)[1:]))
    found = [doctor.check(case, DEVICE, "eager", torch.float32).failed for case in BY_OPERATOR["adapter_linear"]]
    assert ["dx"] in found


@dataclasses.dataclass(frozen=True)
class Difference(Case):
    """A small difference of large terms, off by so many times eps · Σ|terms|."""

    operator = "difference"
    covers = ()
    kernels = ()
    has_gradients = False

    off: float = 0.0

    def values(self, normal: Normal, sizes: Sizes) -> Values:
        return {"x": torch.tensor([4096.0, -4095.0])}

    def ours(self, values: Values, backend: str) -> Tensor:
        return values["x"].sum(0, keepdim=True) + self.off * 2.0**-23 * 8191

    def reference(self, values: Values, mask: Tensor | None, p: float) -> Tensor:
        return values["x"].sum(0, keepdim=True)


def test_the_bound_is_twice_eps_times_the_sum_of_the_terms() -> None:
    for off, failed in ((0.0, []), (1.9, []), (2.1, ["y"]), (-2.1, ["y"]), (float("nan"), ["y"])):
        verdict = doctor.check(Difference("difference", off=off), torch.device("cpu"), "eager", torch.float32)
        assert verdict.failed == failed, off


def test_on_a_gpu_it_says_where_auto_takes_another_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "resolve_backend", lambda *_: "triton")
    why = {choice["operator"]: choice["why"] for choice in doctor.choices(torch.device("cpu"))}
    assert "beyond 128 hidden features" in why["bottleneck"]
    assert "PyTorch's own product" in why["adapter_linear"]
    assert why["weight_norm"] == "the tensors are on a GPU and Triton is installed"
