"""Training on quantised bases: PEFT, accelerated PEFT and injected adapters beside the same base dequantised.

SmolLM2-135M-Instruct with its linear layers but the head in bitsandbytes' NF4 (double quantisation) or int8, on the
batches and from the factors of `bench train`: every round is one step of each side. Bytes that are kept are those of a
whole forward with its graph, wherever they hide; peaks are of processes of their own that take three steps.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch import nn

from bench import measure, page, report, train
from bench.cases import chosen
from bench.plots import Document, draw_train, read
from bench.saved import allocations
from bench.train import Batch, Size, TrainCase, Training
from fastadapt.commands.demo.training import skeleton
from fastadapt.commands.report import write_json
from fastadapt.layers.dequantize import dequantized

KINDS = {"nf4": "NF4", "int8": "int8"}


@dataclass(frozen=True)
class QuantizedCase(TrainCase):
    """A case of `bench train` on a base in so many bits."""

    kind: str = "nf4"

    @property
    def sides(self) -> tuple[str, ...]:
        return ("peft", "accelerated", "injected", "dequantised")

    @property
    def title(self) -> str:
        return f"{super().title} on {KINDS[self.kind]}"


CASES = {
    f"{method}_{kind}": QuantizedCase(f"{method}_{kind}", method, kind=kind)
    for kind in KINDS
    for method in ("lora", "dora")
}


def quantized_layer(layer: nn.Linear, kind: str) -> nn.Module:
    """bitsandbytes' layer of the same weight, which it rounds to NF4 in blocks of 64 or to int8 by rows."""
    import bitsandbytes as bnb

    sizes = layer.in_features, layer.out_features, layer.bias is not None
    weight, options = layer.weight.detach().clone(), {"requires_grad": False}
    new: Any
    if kind == "nf4":
        new = bnb.nn.Linear4bit(*sizes, compute_dtype=torch.float32, compress_statistics=True, quant_type="nf4")
        new.weight = bnb.nn.Params4bit(weight, quant_type="nf4", compress_statistics=True, **options)
    else:
        new = bnb.nn.Linear8bitLt(*sizes, has_fp16_weights=False)
        new.weight = bnb.nn.Int8Params(weight, has_fp16_weights=False, **options)
    new.bias = layer.bias
    made: nn.Module = new.to("cpu")
    return made


def quantize(model: Any, kind: str) -> Any:
    """Puts bitsandbytes' layers into the places of the model's linear ones but the head, as from_pretrained does."""
    for path, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and path != "lm_head":
            model.set_submodule(path, quantized_layer(layer, kind))
    setattr(model, "is_loaded_in_4bit" if kind == "nf4" else "is_loaded_in_8bit", True)
    return model


def base_of(model: Any, kind: str) -> Any:
    """The model quantised, so that several may share its weights."""
    model = quantize(model, kind)
    for part in model.modules():
        if type(part).__name__ == "Linear8bitLt":
            part.init_8bit_state()  # else the first forward of one of them would take the scales of all
    return model


def plain(model: Any) -> Any:
    """A copy with plain layers of the dequantised weights in the places of the quantised ones."""
    model = skeleton(model)
    for path, layer in list(model.named_modules()):
        weight = dequantized(layer)
        if weight is not None:
            new = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
            new.weight = nn.Parameter(weight.float(), requires_grad=False)
            model.set_submodule(path, new)
    for name in ("is_loaded_in_4bit", "is_loaded_in_8bit"):
        model.__dict__.pop(name, None)
    return model


class Step(Training):
    """One side of a case, as `bench train` has it; PEFT's DoRA on int8 is given back what it drops."""

    def __call__(self) -> None:
        self.mend()
        super().__call__()

    def mend(self) -> None:
        """On a CPU PEFT's DoRA replaces an 8-bit weight by one without its scales, with which no forward would go."""
        for part in self.model.modules():
            if type(part).__name__ == "Linear8bitLt" and getattr(part, "state", None) is not None:
                part.weight.CB = None


def training(case: QuantizedCase, side: str, base: Any, batches: Sequence[Batch], size: Size) -> Step:
    """One side over a base that is quantised."""
    own = plain(base) if side == "dequantised" else base
    model = train.adapted(own, case, "injected" if side == "dequantised" else side)
    return Step(model, case, batches, size.threads)


def kept_mb(step: Step, batch: Batch) -> float:
    """What a forward with its graph keeps, in MB."""
    step.mend()
    with allocations() as allocated:
        loss = step.model(**batch, use_cache=False).loss
    del loss
    return allocated.bytes / 1e6


def run_case(
    case: QuantizedCase, base: Any, batches: list[Batch], size: Size, rounds: int, *, peaks: bool
) -> tuple[list[report.Row], dict[str, list[float]]]:
    """(One row a side, the losses by side)."""
    base = base_of(skeleton(base), case.kind)
    sides = {side: training(case, side, base, batches, size) for side in case.sides}
    rows, curves = train.compared(case, sides, rounds)
    for row in rows:
        side = row["side"]
        row["from_dequantised"] = train.difference(curves[side], curves["dequantised"])
        row["kept_mb"] = kept_mb(sides[side], batches[0])
        row["peak_mb"] = peak(case, side, size) if peaks else None
    return [row | asdict(size) for row in rows], curves


def peak(case: QuantizedCase, side: str, size: Size) -> float:
    """The peak resident set of a process that trains this one side, in MB."""
    return float(measure.run_apart("bench.quantized", {"case": case.name, "side": side, "size": asdict(size)}))


def run(
    cases: list[QuantizedCase], size: Size, rounds: int, *, peaks: bool = True
) -> tuple[list[report.Row], dict[str, list[float]]]:
    """(Rows, curves by "case side"); says first how long it will take."""
    torch.set_num_threads(size.threads)
    rows: list[report.Row] = []
    curves: dict[str, list[float]] = {}
    base, batches = train.load("smollm2", size)
    trial = training(cases[0], "dequantised", base, batches, size)
    trial()
    start = time.perf_counter()
    trial()
    steps: list[TrainCase] = [case for case in cases for _ in case.sides]
    minutes = train.predicted_minutes(steps, time.perf_counter() - start, rounds, spread=False, peaks=peaks) / 3
    Console(stderr=True).print(f"about {minutes:.0f} minutes")
    del trial
    for case in cases:
        found, own = run_case(case, base, batches, size, rounds, peaks=peaks)
        rows += found
        curves |= {f"{case.name} {side}": losses for side, losses in own.items()}
    return rows, curves


def main(
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the rows there, a PNG beside it.")] = None,
    rounds: Annotated[int, typer.Option(help="Counted rounds: training steps of each side.")] = 7,
    cases: Annotated[str, typer.Option(help=f"Comma-separated, of {', '.join(CASES)}; all by default.")] = "",
    layers: int = Size.layers,
    batch: Annotated[int, typer.Option(help="Rows.")] = Size.batch,
    length: Annotated[int, typer.Option(help="Tokens a row.")] = Size.length,
    threads: int = Size.threads,
    peaks: Annotated[bool, typer.Option(help="Take each side's peak memory in a process of its own.")] = True,
) -> None:
    """Training on NF4 and int8: step time, memory and losses of ours beside PEFT's and the dequantised base."""
    size = Size(layers, batch, length, threads)
    rows, losses = run(chosen(CASES, cases), size, rounds, peaks=peaks)
    columns = {
        "variant": "case and side",
        "x_peft": "x PEFT",
        "x_low": "95% from",
        "x_high": "to",
        "x_cpu": "CPU time",
        "step_s": "seconds",
        "peak_mb": "peak MB",
        "kept_mb": "kept MB",
        "loss_last": "loss at the end",
        "max_difference": "from PEFT's",
        "from_dequantised": "from dequantised",
    }
    report.print_table(f"Quantised bases, {batch} x {length} tokens, {layers} layers", rows, columns)
    if json_file is not None:
        write_json(json_file, "quantized", rows, curves=losses)
        draw_train(read(json_file), json_file.with_suffix(".png"))


_SIDES = {"accelerated": "accelerated PEFT", "injected": "injected", "dequantised": "injected, dequantised base"}


@page.section("quantized", "Training on quantised bases")
def section(document: Document) -> str:
    rows = [
        f"{CASES[row['case']].title}: {_SIDES[row['side']]} | {page.span(row, 'x_peft', 'x_low', 'x_high')} | "
        f"{page.number(row['peak_mb'], 0)} | {page.number(theirs['peak_mb'], 0)} | {page.number(row['kept_mb'], 0)} | "
        f"{page.number(theirs['kept_mb'], 0)} | {row['max_difference']:.0e} | {row['from_dequantised']:.0e}"
        for row in document["rows"]
        for theirs in document["rows"]
        if row["side"] != "peft" and (theirs["case"], theirs["side"]) == (row["case"], "peft")
    ]
    first = document["rows"][0]
    return (
        f"SmolLM2-135M-Instruct ({first['layers']} layers) with its linear layers but the head in bitsandbytes' NF4 "
        f"(double quantisation) or int8, products in fp32, {first['batch']} × {first['length']} tokens, rank 16, "
        f"AdamW, {first['steps']} steps of each side on the same batches. Step as a multiple of PEFT's in the same "
        "round; kept: by a forward with its graph, wherever it hides; losses in nats, how far they are at any step "
        "from PEFT's and from those on the same base dequantised. On a CPU PEFT's DoRA on int8 fails after its "
        "first step: here it is given back the scales that it drops.\n\n"
    ) + page.table("| step, x PEFT | peak MB | PEFT's | kept MB | PEFT's | from PEFT | from dequantised", rows)


def report_peak(arguments: dict[str, Any]) -> None:
    """In a process of its own: train one side for three steps and print the peak resident set."""
    # Its output is one number; what libraries warn about was shown by the process that started this one.
    warnings.simplefilter("ignore")
    case, size = CASES[arguments["case"]], Size(**arguments["size"])
    torch.set_num_threads(size.threads)
    base, batches = train.load("smollm2", size)
    step = training(case, arguments["side"], base_of(base, case.kind), batches, size)
    del base
    measure.forget_peak()
    for _ in range(3):
        step()
    print(measure.peak_mb())


if __name__ == "__main__":
    report_peak(json.loads(sys.argv[1]))
