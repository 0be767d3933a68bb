"""A layer whose weights are scaled by themselves, W0 ⊙ (1 + U V), beside the dense recomposition that PyTorch would do.

Dense: F.linear(x, W0 * (1 + U @ V)) under autograd, which makes and keeps matrices of W0's size. Ours: hadamard_linear
in eager PyTorch, fp32. `forward_x` and `step_x` are its time over the dense one's, in the same round: forward alone,
and forward with the gradients of x, U and V. `peak_mb` is the most that one step has allocated at once beside its
operands, in MB of 10^6 bytes: the running sum of every block that PyTorch's CPU allocator gave out and took back, as
its profiler reports them. The columns of `bench traffic` for the kernels' bytes follow where `traffic` is on.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
import torch.nn.functional as F
import typer
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from bench import measure, page, report, traffic
from bench.cases import chosen
from bench.plots import Document
from fastadapt.commands.report import write_json
from fastadapt.functional import hadamard_linear

Layer = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class Shape(NamedTuple):
    """Tokens through a square layer, and the rank of U V."""

    tokens: int
    width: int
    r: int


CASES = {
    "wide": Shape(512, 4096, 8),
    "narrow": Shape(512, 576, 8),
}


def dense(x: Tensor, weight: Tensor, U: Tensor, V: Tensor) -> Tensor:
    """The formula as one would write it."""
    return F.linear(x, weight * (1 + U @ V))


def ours(x: Tensor, weight: Tensor, U: Tensor, V: Tensor) -> Tensor:
    return hadamard_linear(x, weight, U, V, backend="eager")


LAYERS: dict[str, Layer] = {"ours": ours, "dense": dense}


def operands(shape: Shape) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x, weight, U, V and dy, in fp32; all but weight and dy train."""
    generator = torch.Generator().manual_seed(0)
    m, k, r = shape
    sizes = ((m, k), (k, k), (k, r), (r, k), (m, k))
    x, weight, U, V, dy = (torch.randn(*size, generator=generator) * 0.1 for size in sizes)
    return x.requires_grad_(), weight, U.requires_grad_(), V.requires_grad_(), dy


def forward(layer: Layer, x: Tensor, weight: Tensor, U: Tensor, V: Tensor, dy: Tensor) -> None:
    layer(x, weight, U, V)


def step(layer: Layer, x: Tensor, weight: Tensor, U: Tensor, V: Tensor, dy: Tensor) -> None:
    torch.autograd.grad(layer(x, weight, U, V), (x, U, V), dy)


def peak_bytes(run: Callable[[], object]) -> int:
    """The most that was allocated at once while `run` ran, on the CPU."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    now = most = 0
    for event in sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


def run(names: list[str], rounds: int, *, with_traffic: bool) -> list[report.Row]:
    """Measure; one row a case."""
    rows = []
    for name in names:
        shape = CASES[name]
        values = operands(shape)
        passes = {"forward": forward, "step": step}
        variants = {
            f"{side} {kind}": lambda call=call, layer=layer, values=values: call(layer, *values)
            for side, layer in LAYERS.items()
            for kind, call in passes.items()
        }
        peaks = {variant: peak_bytes(call) / 1e6 for variant, call in variants.items()}
        timings = measure.interleave(variants, rounds)
        row: report.Row = {"case": name, "M": shape.tokens, "K": shape.width, "N": shape.width, "r": shape.r}
        for kind in passes:
            wall, cpu = measure.compare(timings, f"ours {kind}", [f"dense {kind}"])
            row |= {f"{kind}_x": wall.median, f"{kind}_x_low": wall.low, f"{kind}_x_high": wall.high}
            row |= {
                f"{kind}_x_cpu": cpu.median,
                f"{kind}_x_best": measure.best_ratio(timings, f"ours {kind}", [f"dense {kind}"]),
            }
            row |= {f"{kind}_peak_mb": peaks[f"ours {kind}"], f"{kind}_dense_peak_mb": peaks[f"dense {kind}"]}
            row[f"{kind}_x_peak"] = peaks[f"dense {kind}"] / peaks[f"ours {kind}"]
        row |= {"rounds": rounds, "threads": torch.get_num_threads()}
        if with_traffic:
            bytes_moved = traffic.hadamard_row(name, shape.r, shape.tokens, "H100-SXM", shape.width)
            row |= {key: value for key, value in bytes_moved.items() if key not in row}
        rows.append(row)
    return rows


def main(
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the rows there.")] = None,
    cases: Annotated[str, typer.Option(help=f"Comma-separated, of {', '.join(CASES)}; all by default.")] = "",
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of the timing.")] = 15,
    threads: Annotated[int, typer.Option(min=1, help="Threads of PyTorch.")] = 2,
    with_traffic: Annotated[bool, typer.Option("--traffic/--no-traffic", help="The kernels' bytes as well.")] = True,
) -> None:
    """W0 ⊙ (1 + U V) rebuilt block by block beside the dense recomposition: time, and peak memory of a step."""
    if with_traffic:
        traffic.restart_in_interpreter()
    torch.set_num_threads(threads)
    names = [name for name, shape in CASES.items() if shape in chosen(CASES, cases)]
    rows = run(names, rounds, with_traffic=with_traffic)
    columns = {
        "case": "case",
        "forward_x": "forward x dense",
        "step_x": "step x dense",
        "step_peak_mb": "peak MB",
        "step_dense_peak_mb": "dense peak MB",
        "step_x_peak": "dense / ours",
        "forward_mib": "kernels: forward MiB",
        "forward_minimum_mib": "least",
        "dx_mib": "dx MiB",
        "grads_mib": "dU, dV MiB",
        "weight_writes_mib": "writes of W0's size",
    }
    report.print_table(f"W0 ⊙ (1 + U V), fp32, {threads} threads, {rounds} rounds", rows, columns)
    if json_file is not None:
        write_json(json_file, "glora", rows)


@page.section("glora", "W0 ⊙ (1 + U V)")
def section(document: Document) -> str:
    first = document["rows"][0]
    rows = [
        f"{row['N']} × {row['K']} | {page.span(row, 'forward_x', 'forward_x_low', 'forward_x_high')} | "
        f"{page.span(row, 'step_x', 'step_x_low', 'step_x_high')} | {row['step_peak_mb']:.1f} | "
        f"{row['step_dense_peak_mb']:.1f} | {row['step_x_peak']:.1f}"
        for row in document["rows"]
    ]
    return (
        f"`hadamard_linear` in eager PyTorch, {first['M']} tokens, rank {first['r']}, fp32, as a multiple of the dense "
        "recomposition under autograd: time, and the most that a step allocates beside its operands. Where one block "
        "holds the whole weight there is little to save. The kernels move what the formula must, and write "
        f"{first['weight_writes_mib']:.0f} MiB of W0's size.\n\n"
    ) + page.table("| forward | step | peak MB | dense | times less", rows)
