"""What a layer keeps between its forward and its backward, beside the least that its gradients need.

K = N = 1024, M = 2048, in units of M·K elements of the activation dtype; adapter parameters are fp32. Two counts that
know nothing of each other: `saved_units` sums the storages that autograd was handed (saved_tensors_hooks) and still
holds after the forward, without parameters, base weights and buffers; `alive_units` sums what the allocators gave out
during the forward and did not get back when everything but the graph was dropped, wherever it hides: in autograd, on a
ctx, on a module. An integer dropout mask is listed apart as `mask_units`, and is in neither of the two. `handed_units`
also has what went with a part of the graph that the forward itself dropped (PEFT's DoRA forms B·A through an identity
matrix and detaches it).
"""

from __future__ import annotations

import gc
import itertools
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch import Tensor, nn
from torch.autograd.profiler import profile
from torch.multiprocessing.reductions import StorageWeakRef

from bench import page, report
from bench.cases import SAVED_CASES, AdapterCase, chosen
from bench.plots import Document
from fastadapt.commands.report import write_json

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class OneLinear(nn.Module):
    """The smallest model that can be adapted."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.proj = nn.Linear(in_features, out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.proj(x)
        return y


@dataclass
class Kept:
    """Bytes between forward and backward."""

    saved: int
    handed: int
    alive: int
    mask: int
    output: bool


class Allocated:
    """Bytes that torch's and NumPy's allocators gave out in a region and did not get back."""

    bytes = 0


@contextmanager
def allocations() -> Iterator[Allocated]:
    """Count the region's net allocations, on the CPU."""
    found = Allocated()
    numpy_only = tracemalloc.DomainFilter(True, np.lib.tracemalloc_domain)
    # The youngest generation alone: it has the region's own garbage, and nothing older may go meanwhile.
    gc.disable()
    gc.collect(0)
    tracemalloc.start()
    try:
        with profile(use_kineto=False, profile_memory=True) as profiler:
            yield found
            gc.collect(0)
        traces = tracemalloc.take_snapshot().filter_traces([numpy_only]).traces
        numpy_bytes = sum(trace.size for trace in traces)
    finally:
        tracemalloc.stop()
        gc.enable()
    found.bytes = sum(event.self_cpu_memory_usage for event in profiler.function_events or ()) + numpy_bytes


def measure_kept(model: nn.Module, tokens: int, width: int, dtype: torch.dtype) -> Kept:
    """Run the model's first training forward on a fresh activation, drop all but the graph, and count."""
    excluded = {t.untyped_storage().data_ptr() for t in itertools.chain(model.parameters(), model.buffers())}
    leaf = torch.randn(tokens, width, dtype=dtype, requires_grad=True)
    # Weak references to storages, so that the count itself keeps nothing, with their sizes.
    handed: dict[StorageWeakRef, int] = {}
    masks: dict[StorageWeakRef, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in excluded:
            # Seeds and counters are no masks: a mask has at least a bit for each element of the activation.
            is_mask = not tensor.is_floating_point() and storage.nbytes() >= tokens * width // 8
            (masks if is_mask else handed)[StorageWeakRef(storage)] = storage.nbytes()
        return tensor

    model.train()
    with allocations() as allocated:
        # Not a leaf: a leaf would be kept by its own gradient accumulator, whether the layer saves it or not.
        x = leaf.clone()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            y = model(x)
        output = StorageWeakRef(y.untyped_storage())
        graph = y.grad_fn
        del x, y
    saved = sum(size for storage, size in handed.items() if not storage.expired())
    mask = sum(size for storage, size in masks.items() if not storage.expired())
    kept = Kept(saved, sum(handed.values()), allocated.bytes - mask, mask, not output.expired())
    del graph
    return kept


def minimum_units(case: AdapterCase, width: int, out_features: int) -> float:
    """What the gradients need at least, in units of one activation (kept u has r columns, z has N).

    LoRA: x and u. DoRA: besides z = x W0ᵀ, for the magnitude. VeRA: u alone, since A and B are frozen. Dropout adds
    nothing to the formula: a mask can be drawn again from its seed.
    """
    units = case.r / width
    if case.method != "vera":
        units += 1
    if case.method == "dora":
        units += out_features / width
    return units


def build(case: AdapterCase, width: int, out_features: int, dtype: torch.dtype, side: str) -> nn.Module:
    """One adapted linear layer. PEFT's has fp32 adapters by default, as ours; "peft_cast" keeps them in dtype."""
    torch.manual_seed(0)
    model: nn.Module = OneLinear(width, out_features).to(dtype)
    if side == "ours":
        import fastadapt

        adapted: nn.Module = fastadapt.inject(model, case.config(["proj"]))
    else:
        from peft import get_peft_model

        adapted = get_peft_model(model, case.peft_config(["proj"]), autocast_adapter_dtype=side == "peft")
        if side == "peft_cast":
            adapted = adapted.to(dtype)
    return adapted


def run(cases: list[AdapterCase], tokens: int, width: int, out_features: int, *, peft: bool = True) -> list[report.Row]:
    """Measure; one row a case and dtype."""
    rows: list[report.Row] = []
    for case, (dtype_name, dtype) in itertools.product(cases, DTYPES.items()):
        unit = tokens * width * dtype.itemsize
        minimum = minimum_units(case, width, out_features)
        row: report.Row = {"case": case.name, "dtype": dtype_name, "minimum_units": minimum}
        sides = {"ours": ""}
        if peft:
            sides["peft"] = "peft_"
            if dtype != torch.float32:
                sides["peft_cast"] = "peft_cast_"
        for side, prefix in sides.items():
            kept = measure_kept(build(case, width, out_features, dtype, side), tokens, width, dtype)
            row |= {
                f"{prefix}saved_units": kept.saved / unit,
                f"{prefix}handed_units": kept.handed / unit,
                f"{prefix}alive_units": kept.alive / unit,
                f"{prefix}mask_units": kept.mask / unit,
                f"{prefix}mask_bytes": kept.mask,
                f"{prefix}output_kept": kept.output,
            }
        row["x_minimum"] = row["saved_units"] / minimum
        rows.append(row | {"r": case.r, "dropout": case.dropout, "M": tokens, "K": width, "N": out_features})
    return rows


def main(
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the rows there.")] = None,
    cases: Annotated[str, typer.Option(help=f"Comma-separated, of {', '.join(SAVED_CASES)}; all by default.")] = "",
    tokens: Annotated[int, typer.Option(help="M.")] = 2048,
    width: Annotated[int, typer.Option(help="K, the layer's inputs.")] = 1024,
    out_features: Annotated[int, typer.Option(help="N, the layer's outputs.")] = 1024,
    peft: Annotated[bool, typer.Option(help="Measure PEFT beside.")] = True,
) -> None:
    """Activations kept between forward and backward, in units of the layer's input; ours, the minimum, PEFT's."""
    rows = run(chosen(SAVED_CASES, cases), tokens, width, out_features, peft=peft)
    columns: dict[str, Any] = {
        "case": "case",
        "dtype": "dtype",
        "saved_units": "saved",
        "alive_units": "alive",
        "minimum_units": "minimum",
        "mask_units": "mask apart",
        "output_kept": "y kept",
        "peft_saved_units": "PEFT",
        "peft_cast_saved_units": "PEFT, cast adapters",
    }
    report.print_table(f"Kept for backward, M {tokens}, K {width}, N {out_features}", rows, columns)
    if json_file is not None:
        write_json(json_file, "saved", rows)


@page.section("saved", "Kept between forward and backward")
def section(document: Document) -> str:
    found = {(row["case"], row["dtype"]): row for row in document["rows"]}
    first = document["rows"][0]
    rows = []
    for name in dict.fromkeys(row["case"] for row in document["rows"]):
        single, half = found[name, "fp32"], found[name, "bf16"]
        cells = [single["saved_units"], single["peft_saved_units"], half["saved_units"], half["peft_saved_units"]]
        masks = f"{single['mask_units']:.2f} / {half['mask_units']:.2f}"
        numbers = " | ".join(f"{cell:.2f}" for cell in (*cells, single["minimum_units"]))
        rows.append(f"{SAVED_CASES[name].title} | {numbers} | {masks}")
    return (
        f"One layer, K {first['K']}, N {first['N']}, {first['M']} tokens, in units of its input; everything counts, on "
        "ctx and on modules. A CPU's dropout mask is apart.\n\n"
    ) + page.table("| fp32 | PEFT | bf16 | PEFT | minimum | mask fp32 / bf16", rows)


@page.headline("saved")
def headline(document: Document) -> str:
    row = next(row for row in document["rows"] if (row["case"], row["dtype"]) == ("dora", "bf16"))
    return f"kept for DoRA's backward, bf16, x the input | {row['saved_units']:.2f} | {row['peft_saved_units']:.2f}"
