"""Prepared launches hand the driver what Triton's ordinary path would: its real launcher, a driver without a device.

The interpreter, under which the other tests run, launches nothing: the cases run in a process of their own, this file.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent

# Python calls of a call of adapter_linear: a third more than there were, and far fewer than the ordinary launches take.
MOST_CALLS = {"fused": 190, "split": 210, "split_both": 570}


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """What this file says when it is run."""
    from bench import launches

    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    with mock.patch.dict(os.environ, environment, clear=True):
        if reason := launches.obstacle():
            pytest.skip(reason)
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    command = [sys.executable, "-W", "ignore", __file__]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


@pytest.mark.parametrize("case", MOST_CALLS)
def test_a_call_is_few_calls_of_python(case: str, found: dict[str, Any]) -> None:
    assert found["calls"][case] <= MOST_CALLS[case]


LINEAR = ["adapter_linear", "adapter_linear_backward"]
HADAMARD = ["hadamard_linear", "hadamard_linear_backward"]
BOTTLENECK = ["bottleneck", "bottleneck_backward"]
EXPERTS = ["base_products", "expert_linear", "expert_linear_backward"]
# Cases of main() and the launchers that each of them is to prepare.
PREPARED = {
    "plain": LINEAR,
    "scaled group": LINEAR,
    "copies first": LINEAR,
    "shared A": LINEAR,
    "hadamard": HADAMARD,
    "hadamard without A": HADAMARD,
    "bottleneck": BOTTLENECK,
    "bottleneck in groups": BOTTLENECK,
    "weight norm": ["weight_norm"],
    "experts": EXPERTS,
    "experts that share a pair": EXPERTS,
    "many adapters in one memory": ["_add_adapters"],
    "many adapters in two memories": ["_add_adapters"],
}


@pytest.mark.parametrize("case", PREPARED)
def test_the_driver_is_handed_what_the_ordinary_path_hands_it(case: str, found: dict[str, Any]) -> None:
    ordinary, *prepared = found["launches"][case]
    assert len(ordinary) >= 2
    assert prepared == [ordinary] * len(prepared)


@pytest.mark.parametrize("case", PREPARED)
def test_its_launchers_are_prepared(case: str, found: dict[str, Any]) -> None:
    assert found["prepared"][case] == PREPARED[case]


@pytest.mark.parametrize("case", ["inputs", "new memory"])
def test_no_kernel_is_told_of_an_alignment_that_is_not_there(case: str, found: dict[str, Any]) -> None:
    launches, wrong = found["alignment"][case]
    assert launches > 0
    assert wrong == 0


def test_a_key_without_alignment_would_be_noticed(found: dict[str, Any]) -> None:
    assert found["alignment"]["planted"][1] > 0


def test_an_outline_is_prepared_at_its_second_call(found: dict[str, Any]) -> None:
    assert found["programs"] == [0, 1, 1, 1]


def test_a_tensor_with_a_mind_of_its_own_is_launched_as_ever(found: dict[str, Any]) -> None:
    assert found["subclass"] == 0


class Handed(NamedTuple):
    """What one launch hands the driver."""

    kernel: str
    grid: tuple[int, ...]
    types: tuple[Any, ...]
    attributes: dict[tuple[int, ...], Any]
    values: tuple[Any, ...]

    def addresses(self) -> Iterator[tuple[tuple[int, ...], int]]:
        """Where an address is among the arguments, and the address."""

        def inside(kind: Any, value: Any, path: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], int]]:
            if isinstance(kind, tuple):
                for index, pair in enumerate(zip(kind, value, strict=True)):
                    yield from inside(*pair, (*path, index))
            elif kind.startswith("*"):
                yield path, value if isinstance(value, int) else value.data_ptr()

        yield from inside(self.types, self.values, ())

    def wrong(self) -> int:
        """Addresses that the kernel takes for multiples of 16 and that are none."""
        told = {path for path, attributes in self.attributes.items() if ["tt.divisibility", 16] in attributes}
        return sum(path in told and address % 16 != 0 for path, address in self.addresses())

    def readable(self, inputs: list[Tensor]) -> list[Any]:
        """All of it, with addresses as places in the inputs, or "new"."""
        addresses = dict(self.addresses())

        def shown(value: Any, path: tuple[int, ...]) -> Any:
            if path in addresses:
                return self._place(addresses[path], inputs)
            if isinstance(value, tuple):
                return [shown(part, (*path, index)) for index, part in enumerate(value)]
            return value

        return [self.kernel, list(self.grid), shown(self.values, ()), str(self.attributes)]

    @staticmethod
    def _place(address: int, inputs: list[Tensor]) -> str:
        for index, tensor in enumerate(inputs):
            if 0 <= address - tensor.data_ptr() < max(tensor.untyped_storage().nbytes(), 1):
                return f"input {index} + {address - tensor.data_ptr()}"
        return "new"


@contextmanager
def overheard() -> Iterator[list[Handed]]:
    """The launches inside, as Triton's launcher gets them. Only of kernels that are compiled inside."""
    from triton.runtime import driver

    handed: list[Handed] = []
    launcher = driver.active.launcher_cls

    def launcher_cls(source: Any, metadata: Any) -> Callable[..., None]:
        launch = launcher(source, metadata)

        def run(x: int, y: int, z: int, stream: int, function: int, *rest: Any) -> None:
            types = tuple(source.signature.values())
            values = rest[-len(types) :]
            handed.append(Handed(source.fn.fn.__name__, (x, y, z), types, dict(source.attrs), values))
            launch(x, y, z, stream, function, *rest)

        return run

    driver.active.launcher_cls = launcher_cls
    yield handed


def normals(seed: int, factors: torch.dtype = torch.float32) -> Callable[..., Tensor]:
    """Makes tensors of a shape, in `factors` or another dtype."""
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape, dtype=factors: torch.randn(shape, generator=generator).to(dtype)


def layer(seed: int, n: int = 32, r: int = 16, factors: torch.dtype = torch.float32, scaled: bool = False) -> Any:
    from fastadapt_kernels.adapter_linear import Member

    normal = normals(seed, factors)
    weight, A, B = normal(n, 64, dtype=torch.bfloat16), normal(r, 64), normal(n, r)
    if not scaled:
        return Member(weight, A, B, None, None, 2.0, None, None)
    # A vector with gaps is copied before the launch.
    return Member(weight, A, B, normal(r), normal(n), 0.5, normal(n), normal(2 * n)[::2])


def steps(x: Tensor, members: list[Any], **options: Any) -> list[Tensor]:
    """A forward and a backward; gives their inputs."""
    from fastadapt_kernels import adapter_linear as kernels

    ys, u, zs = kernels.adapter_linear(x, members, keep_base=True, **options)
    dys = [torch.ones_like(y) for y in ys]
    grads = kernels.adapter_linear_backward(dys, members, x=x, u=u, zs=zs, want_bias=True, **options)
    for result, like in zip([*ys, *(grads.P or [])], [*dys, *[m.B for m in members]], strict=True):
        assert result.shape == like.shape
    return [x, *tensors_of(members)]


def tensors_of(value: Any) -> list[Tensor]:
    """The tensors in nested tuples and lists."""
    if isinstance(value, (tuple, list)):
        return [tensor for part in value for tensor in tensors_of(part)]
    return [value] if isinstance(value, Tensor) else []


def recomposed_steps(x: Tensor, low_rank: bool) -> list[Tensor]:
    """A forward and a backward of W0 ⊙ (1 + U V); gives their inputs."""
    from fastadapt_kernels import hadamard_linear as kernels

    normal = normals(20)
    A, B = (normal(16, 64), normal(48, 16)) if low_rank else (None, None)
    weight = normal(48, 64, dtype=x.dtype)
    layer = kernels.HadamardLayer(weight, normal(48, 8), normal(8, 64), A, B, normal(96)[::2])
    y, u = kernels.hadamard_linear(x, layer)
    dy = torch.ones_like(y)
    grads = kernels.hadamard_linear_backward(dy, layer, x, u, kernels.Wants(bias=True))
    assert [None if grad is None else grad.shape for grad in grads] == [
        None if like is None else like.shape for like in (x, layer.U, layer.V, A, B, layer.bias)
    ]
    return [x, *tensors_of(layer)]


def bottleneck_steps(x: Tensor, groups: int) -> list[Tensor]:
    """A forward and a backward under dropout; gives their inputs."""
    from fastadapt_kernels import bottleneck as kernels

    normal = normals(21)
    seed, residual = torch.tensor([7]), normal(len(x), 64)
    layer = kernels.BottleneckLayer(normal(32, 64), normal(64, 32 // groups), normal(32), None, 0.1, "gelu", groups)
    y = kernels.bottleneck(x, layer, residual, seed, 0.25)
    dy = torch.ones_like(y)
    grads = kernels.bottleneck_backward(dy, x, layer, seed, 0.25, True, kernels.Wants())
    assert [grad.shape for grad in tensors_of(grads)] == [x.shape, (32, 64), (64, 32 // groups), (32,), (64,)]
    return [x, residual, seed, *tensors_of(layer)]


def norm_steps(weight: Tensor) -> list[Tensor]:
    """Row norms; gives what they are of."""
    from fastadapt_kernels import weight_norm as kernels

    normal = normals(22)
    A, B, squares = normal(16, 64), normal(len(weight), 16), normal(len(weight))
    norm, WA = kernels.weight_norm(weight, A, B, 2.0, squares)
    assert (norm.shape, WA.shape) == (squares.shape, B.shape)
    return [weight, A, B, squares]


def served_steps(x: Tensor, memories: int) -> list[Tensor]:
    """Two layers with many adapters, in one memory or in one each; gives their inputs."""
    from fastadapt_kernels import multi_adapter as kernels

    from fastadapt.operators.multi_adapter_linear.batch import AdapterBatch, FormTables

    normal = normals(23, x.dtype)
    pages, vectors = [normal(4096) for _ in range(memories)], [normal(64, dtype=torch.float32) for _ in range(memories)]

    def tables(index: int) -> FormTables:
        starts, of_groups = torch.zeros(4, 2, dtype=torch.int64), torch.full((3, 4), 16, dtype=torch.int32)
        (scalings,), places = normal(1, 4, dtype=torch.float32), torch.zeros(4, dtype=torch.int64)
        return FormTables(
            pages[index % memories], vectors[index % memories], of_groups[0], starts, starts.clone(), *of_groups[1:],
            scalings, None, places, places.clone() if index else None, None,
        )  # fmt: skip

    both, weights = [tables(0), tables(1)], [normal(48, 64), normal(32, 64)]
    tokens = AdapterBatch([2, 0, 2, -1], len(x) // 4).sorted(x.device)
    ys = kernels.multi_adapter_linear(x, weights, [normal(48), normal(32)], both, tokens, 16)
    assert [y.shape for y in ys] == [(len(x), 48), (len(x), 32)]
    return [x, *tensors_of([weights, both, tokens])]


def expert_steps(x: Tensor, shared: bool) -> list[Tensor]:
    """A forward and a backward of experts, and their norm's products; gives their inputs."""
    from fastadapt_kernels import expert_linear as kernels

    from fastadapt.operators.expert_linear.parameters import Experts, Keep, Saved, Wants

    normal, E, N, r = normals(24), 3, 48, 16
    pairs = 1 if shared else E
    # A table with gaps is copied before the launch.
    tables = normal(E, r), None if shared else normal(E, N), normal(E, N), normal(E, 2 * N)[:, ::2]
    weight, A, B = normal(E, N, 64, dtype=x.dtype), normal(pairs, r, 64), normal(pairs, r, N)
    experts: Any = Experts(weight, A, B, *tables, None, 0.5, shared, False)
    offsets, low = torch.tensor([5, 5, len(x)], dtype=torch.int32), x.clone()
    products = kernels.base_products(weight, A)
    y, u, z = kernels.expert_linear(x, low, offsets, experts, Keep(True, True))
    dy, row_scale = torch.ones_like(y), torch.ones(len(x))
    wants = Wants(True, True, True, True, True, not shared, True, True)
    grads = kernels.expert_linear_backward(dy, offsets, experts, Saved(low, u, z, row_scale), wants)
    likes = [like for like in (x, x, A, B, *tables) if like is not None]
    assert [grad.shape for grad in tensors_of(grads)] == [like.shape for like in likes]
    assert products.shape == (E, r, N)
    return [x, low, offsets, row_scale, *tensors_of(experts)]


def launchers() -> list[tuple[Any, str]]:
    """Module and name of every launcher that is prepared."""
    from fastadapt_kernels import (
        adapter_linear,
        bottleneck,
        expert_linear,
        hadamard_linear,
        launch,
        multi_adapter,
        weight_norm,
    )

    prepared = launch.prepared(list).__code__
    modules: list[Any] = [adapter_linear, bottleneck, expert_linear, hadamard_linear, multi_adapter, weight_norm]
    return [
        (module, name)
        for module in modules
        for name, value in vars(module).items()
        if getattr(value, "__code__", None) is prepared
    ]


@contextmanager
def unprepared() -> Iterator[None]:
    """Launchers do inside what they did before they were prepared."""
    with ExitStack() as stack:
        for module, name in launchers():
            stack.enter_context(mock.patch.object(module, name, getattr(module, name).__wrapped__))
        yield


def main() -> dict[str, Any]:
    from fastadapt_kernels import adapter_linear as kernels
    from fastadapt_kernels import launch

    from bench import launches
    from bench.road import walked

    found: dict[str, Any] = {"calls": {}, "alignment": {}}
    with launches.stub(), overheard() as handed:

        def of(run: Callable[[], list[Tensor]]) -> list[Handed]:
            handed.clear()
            run()
            return handed.copy()

        def programs(module: Any = kernels, name: str = "adapter_linear") -> int:
            kept: Any = [cell.cell_contents for cell in getattr(module, name).__closure__ or ()]
            return sum(p is not None for cell in kept if isinstance(cell, dict) for p in cell.values())

        x = torch.randn(16, 64).bfloat16()
        counts = []
        for _ in range(4):
            kernels.adapter_linear(x, [layer(0)])
            counts.append(programs())
        found["programs"] = counts

        seed = torch.tensor([7])
        mixed = [layer(1), layer(2, factors=torch.bfloat16)]
        scaled = [layer(4, scaled=True), layer(5, n=48, scaled=True)]
        shared = [member._replace(A=mixed[0].A) for member in (layer(6), layer(7))]
        cases: dict[str, Callable[[], list[Tensor]]] = {
            "plain": lambda: steps(x, [layer(3)]),
            "scaled group": lambda: steps(x, scaled, seed=seed, p=0.3),
            "copies first": lambda: steps(x, mixed),
            "shared A": lambda: steps(x, shared, shared_A=True),
            "hadamard": lambda: recomposed_steps(x, True),
            "hadamard without A": lambda: recomposed_steps(x, False),
            "bottleneck": lambda: bottleneck_steps(x, 1),
            "bottleneck in groups": lambda: bottleneck_steps(x, 2),
            "weight norm": lambda: norm_steps(mixed[0].weight),
            "experts": lambda: expert_steps(x, False),
            "experts that share a pair": lambda: expert_steps(x, True),
            "many adapters in one memory": lambda: served_steps(x, 1),
            "many adapters in two memories": lambda: served_steps(x, 2),
        }

        def shown(call: Callable[[], list[Tensor]]) -> list[Any]:
            inputs: list[Tensor] = []
            got = of(lambda: inputs.extend(call()) or inputs)  # type: ignore[func-returns-value]
            return [one.readable(inputs) for one in got]

        found["launches"], found["prepared"] = {}, {}
        for name, call in cases.items():
            with unprepared():
                ordinary = shown(call)
            before = {launcher: programs(*launcher) for launcher in launchers()}
            found["launches"][name] = [ordinary, *[shown(call) for _ in range(3)]]
            found["prepared"][name] = sorted(
                launcher[1] for launcher, count in before.items() if programs(*launcher) > count
            )

        def shifted(tensor: Tensor) -> Tensor:
            """The same numbers, one element behind a multiple of 16 bytes."""
            memory = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)
            return memory[1:].view(tensor.shape).copy_(tensor)

        def at_odd_places() -> list[Handed]:
            """Aligned tensors and others in turn."""
            member = layer(8)
            odd = [(shifted(x), member), (x, member._replace(A=shifted(member.A), weight=shifted(member.weight)))]
            got: list[Handed] = []
            for _ in range(4):
                for one, its in [(x, member), *odd]:
                    got += of(lambda one=one, its=its: steps(one, [its]))  # type: ignore[misc]
            return got

        def judged(got: list[Handed]) -> tuple[int, int]:
            return len(got), sum(one.wrong() for one in got)

        found["alignment"]["inputs"] = judged(at_odd_places())

        def shifted_memory(shape: Any, stride: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
            size = torch.Size(shape)
            return torch.empty(size.numel() + 1, dtype=dtype, device=device)[1:].view(size)

        with mock.patch.object(torch, "empty_strided", shifted_memory):
            found["alignment"]["new memory"] = judged(at_odd_places())
        with mock.patch.object(launch, "_ALIGNMENT", 1):
            # As if a key did not hold it.
            member = layer(9, n=64)
            got = [one for _ in range(3) for one in of(lambda: steps(x, [member]))]
            found["alignment"]["planted"] = judged(got + of(lambda: steps(shifted(x), [member])))

        class Own(Tensor):
            pass

        before = programs()
        for _ in range(3):
            kernels.adapter_linear(x.as_subclass(Own), [layer(0, n=16)])
        found["subclass"] = programs() - before

        for name in MOST_CALLS:
            call = launches.call_of(launches.CASES[name])
            for _ in range(4):
                call()
            found["calls"][name] = walked(call)[2]
    return found


if __name__ == "__main__":
    print(json.dumps(main()))
