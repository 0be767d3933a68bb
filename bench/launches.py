"""What the host does for a call on a GPU, where few tokens leave the GPU waiting for it: Triton's own launcher, no GPU.

Triton's just-in-time path and launcher run as they are, into a driver that does nothing (stub_cuda.c, compiled here):
kernels are compiled for sm_90 and never run, CPU tensors stand for device memory. Calls of `adapter_linear` are
compared with the launch of a kernel that has two arguments, in the same round: a machine's speed falls out of the
ratio. The processor time counts, not the clock's. Python calls are counted by a profile.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal
from unittest import mock

import torch
import typer
from torch import Tensor

from bench import measure, page, report
from bench.cases import chosen
from bench.plots import Document
from bench.road import walked
from fastadapt.commands.report import write_json
from fastadapt.functional import adapter_linear_group
from fastadapt.operators.adapter_linear import strategies
from fastadapt.reference import AdapterForm

SOURCE = Path(__file__).with_name("stub_cuda.c")
LIBRARY = "libcuda.so.1"
BARE = "a bare launch"

# Small, so that the products of the backward that PyTorch does on the CPU in a GPU's place take no time.
TOKENS, FEATURES, RANK = 16, 64, 16


@dataclass(frozen=True)
class LaunchCase:
    """A call of adapter_linear on one layer, or on q, k and v as a group."""

    name: str
    strategy: Literal["fused", "split"]
    layers: int = 1
    backward: bool = False


CASES = {
    case.name: case
    for case in (
        LaunchCase("fused", "fused"),
        LaunchCase("split", "split"),
        LaunchCase("fused_both", "fused", backward=True),
        LaunchCase("split_both", "split", backward=True),
        LaunchCase("qkv_fused", "fused", layers=3),
        LaunchCase("qkv_split", "split", layers=3),
        LaunchCase("qkv_both", "split", layers=3, backward=True),
    )
}


def compiler() -> str | None:
    """The C compiler that Triton would take, None where there is none."""
    names = [os.environ.get("CC", ""), "gcc", "clang", "cc"]
    return next((found for name in names if name and (found := shutil.which(name))), None)


def obstacle() -> str | None:
    """Why Triton cannot be run into a stub here, None where it can."""
    if sys.platform != "linux":
        return "Triton's launcher runs on Linux alone"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "TRITON_INTERPRET=1 runs kernels without a launcher"
    return None if compiler() else "no C compiler (set CC, or install gcc or clang)"


def built(directory: Path) -> Path:
    """The stub of CUDA's driver as a library in a directory."""
    library = directory / LIBRARY
    flags = ["-shared", "-fPIC", "-O2", f"-Wl,-soname,{LIBRARY}"]
    subprocess.run([str(compiler()), *flags, "-o", str(library), str(SOURCE)], check=True)
    return library


@contextmanager
def stub() -> Iterator[Any]:
    """Triton launches into the stub inside, on tensors of the CPU; gives the library. Once in a process.

    Raises RuntimeError where `obstacle` names a reason.
    """
    if reason := obstacle():
        raise RuntimeError(f"launches cannot be measured here: {reason}")
    with tempfile.TemporaryDirectory() as scratch:
        path = built(Path(scratch))
        # The launcher asks for the library by its name: it finds the one that is loaded.
        library = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
        library.stub_launches.restype = ctypes.c_uint64
        with mock.patch.dict(os.environ, TRITON_LIBCUDA_PATH=scratch):
            from triton.backends.nvidia.driver import CudaDriver
            from triton.runtime import driver

            active: Any = CudaDriver()
            active.get_current_device = lambda: 0
            active.get_current_stream = lambda device: 0
            active.get_device_capability = lambda device: (9, 0)
            driver.set_active(active)
            with mock.patch.object(strategies, "resolve_backend", return_value="triton"):
                yield library


def bare_launch() -> Callable[[], object]:
    """The launch of a kernel that does next to nothing."""
    # Here, because Triton reads the source of a kernel: it must be in a file, which may be imported without Triton.
    from bench.bare_kernel import store_index

    x = torch.empty(64, dtype=torch.int32)
    return lambda: store_index[(1,)](x, 64, BLOCK=64)


def call_of(case: LaunchCase) -> Callable[[], object]:
    """LoRA on bf16 layers: a forward where nothing trains, or a forward and a backward to x, A and B."""
    torch.manual_seed(0)
    x = torch.randn(TOKENS, FEATURES, dtype=torch.bfloat16)
    weights = [torch.randn(FEATURES, FEATURES, dtype=torch.bfloat16) for _ in range(case.layers)]
    forms = [AdapterForm(torch.randn(RANK, FEATURES), torch.randn(FEATURES, RANK), scaling=2.0) for _ in weights]

    def forward() -> tuple[Tensor, ...]:
        return adapter_linear_group(x, weights, forms, strategy=case.strategy)

    if not case.backward:
        return forward
    trained = [x, *[tensor for form in forms for tensor in (form.A, form.B)]]
    for tensor in trained:
        tensor.requires_grad_()
    dys = [torch.randn(TOKENS, FEATURES, dtype=torch.bfloat16) for _ in weights]
    return lambda: torch.autograd.grad(forward(), trained, dys)


def run(cases: Sequence[LaunchCase], rounds: int, repeats: int) -> list[report.Row]:
    """Measure; one row a case, behind one of the bare launch. Inside `stub`."""
    import triton

    calls = {BARE: bare_launch(), **{case.name: call_of(case) for case in cases}}
    for call in report.tracked(list(calls.values()), "kernels compiled for"):
        for _ in range(20):
            call()
    results = measure.interleave({name: measure.repeated(call, repeats) for name, call in calls.items()}, rounds)
    rows: list[report.Row] = []
    for name, call in calls.items():
        ratio = measure.compare(results, name, [BARE])[1]
        rows.append(
            {
                "case": name,
                "us_cpu": statistics.median(t[name].cpu for t in results) / repeats * 1e6,
                "x_bare": ratio.median,
                "x_bare_low": ratio.low,
                "x_bare_high": ratio.high,
                "python_calls": walked(call)[2],
                "triton": triton.__version__,
                "rounds": rounds,
                "repeats": repeats,
            }
        )
    return rows


@page.section("launches", "The host's part of a call on a GPU")
def _section(document: Document) -> str:
    rows = []
    for row in document["rows"]:
        numbers = [page.number(row["us_cpu"], 1), page.span(row, "x_bare", "x_bare_low", "x_bare_high")]
        rows.append(" | ".join([row["case"], *numbers, str(row["python_calls"])]))
    return (
        "Processor time of a call of `adapter_linear` with LoRA of rank 16 at 16 tokens, kernels launched by Triton "
        "into a driver that does nothing, over that of a bare launch in the same round.\n\n"
    ) + page.table("| µs | over a bare launch | Python calls", rows)


def main(
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the rows there.")] = None,
    rounds: Annotated[int, typer.Option(help="Counted rounds.")] = 30,
    repeats: Annotated[int, typer.Option(help="Calls in a round.")] = 100,
    cases: Annotated[str, typer.Option(help=f"Comma-separated, of {', '.join(CASES)}; all by default.")] = "",
) -> None:
    """The host's part of a call on a GPU, in launches of an empty kernel; without a GPU."""
    torch.set_num_threads(1)
    if reason := obstacle():
        typer.echo(f"launches cannot be measured here: {reason}", err=True)
        raise typer.Exit(1)
    with stub():
        rows = run(chosen(CASES, cases), rounds, repeats)
    columns = {
        "case": "case",
        "us_cpu": "us",
        "x_bare": "x bare",
        "x_bare_low": "95% from",
        "x_bare_high": "to",
        "python_calls": "calls",
    }
    report.print_table(f"A call on a GPU, the host's part, {rounds} rounds of {repeats}", rows, columns)
    if json_file is not None:
        write_json(json_file, "launches", rows)
