"""What a training step costs, in multiples of the same pass over the frozen model.

SmolLM2-135M's dimensions with random fp32 weights (the values make no difference to the time), rank 16 (VeRA 256) on
every linear layer but the head, 4 × 128 tokens (vera_4096: 4 × 1024). Frozen: forward and backward to the embeddings,
no adapter, no optimizer. An adapter's step is the same pass plus its own work, AdamW and zero_grad; norms are fresh in
every step, since the optimizer has just changed what they depend on. All variants share one set of base weights.
"""

from __future__ import annotations

import copy
import itertools
import json
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from torch import nn

from bench import measure, page, report
from bench.cases import STEP_CASES, AdapterCase, chosen
from bench.plots import Document
from fastadapt.commands.report import write_json

Side = Literal["frozen", "ours", "peft"]

HIDDEN, FFN, HEADS, KV_HEADS, VOCAB, LAYERS = 576, 1536, 9, 3, 49152, 30
KV = HIDDEN // HEADS * KV_HEADS

# (in, out) of one layer's linears, and the widths of their distinct inputs: q, k and v read one, gate and up another.
LINEARS = [(HIDDEN, HIDDEN), (HIDDEN, KV), (HIDDEN, KV), (HIDDEN, HIDDEN), (HIDDEN, FFN), (HIDDEN, FFN), (FFN, HIDDEN)]
INPUTS = [HIDDEN, HIDDEN, HIDDEN, FFN]

# The frozen pass runs three times a round, since every ratio has its noise.
FROZEN = ("frozen", "frozen, second", "frozen, third")

# What a byte moved costs in floating-point operations, for passes that no product can hide. One core of the CPU that
# bench/results come from does 112 GFLOP/s in these products and moves 20 GB/s in an in-place scaling.
FLOPS_PER_BYTE = 6.0


@dataclass(frozen=True)
class Shape:
    """How large the measured step is."""

    layers: int = LAYERS
    batch: int = 4
    length: int = 128
    threads: int = 2
    dtype: str = "float32"


def floor(case: AdapterCase, shape: Shape) -> tuple[float, float]:
    """The least multiple of the frozen pass that the case's formula allows: in FLOPs and bytes, and in FLOPs alone.

    Counted in multiply-adds a token. Frozen: every linear and the head twice (y and dx), and causal attention 3.5
    times its forward (its backward recomputes the scores).

    * LoRA: u, its expansion, q, dA, dB and the low-rank part of dx: three times r (K + N).
    * DoRA: LoRA, and a norm a step: W0 Aᵀ, r·K·N over its tokens. Two passes of 8 bytes over an output:
      the scaling of dy, and dy with the saved product for the gradient of the magnitude.
    * DoRA with dropout: besides, the second base product that the published rule asks for, in y and in dx.
    * VeRA: u once for each distinct input, and the cheaper of two ways: W recomposed once a step, r·K·N over its
      tokens, and dyᵀu; or, for few tokens, u expanded and kept, q, and its part of dx once for each distinct input.
    """
    tokens = shape.batch * shape.length
    weights = sum(k * n for k, n in LINEARS)
    outputs = sum(n for _, n in LINEARS)
    attention = HIDDEN * (shape.length + 1)
    frozen = shape.layers * (2 * weights + 3.5 * attention) + 2 * HIDDEN * VOCAB
    moved = 0.0
    if case.method == "vera":
        added = case.r * (sum(INPUTS) + outputs + min(weights / tokens, outputs + sum(INPUTS)))
    else:
        added = 3.0 * case.r * sum(k + n for k, n in LINEARS)
    if case.method == "dora":
        added += case.r * weights / tokens
        moved = 2 * 8.0 * outputs
        if case.dropout:
            added += 2 * weights
    flops = 1 + shape.layers * added / frozen
    return flops + shape.layers * moved * FLOPS_PER_BYTE / 2 / frozen, flops


def base_model(shape: Shape) -> Any:
    """A Llama with SmolLM2-135M's dimensions and random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=FFN,
        num_hidden_layers=shape.layers,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).to(getattr(torch, shape.dtype)).requires_grad_(False).train()


def adapted(base: nn.Module, case: AdapterCase, side: Side) -> nn.Module:
    """A model of its own with the case's adapter, whose frozen weights are the base's own tensors."""
    shared = {id(tensor): tensor for tensor in itertools.chain(base.parameters(), base.buffers())}
    model = copy.deepcopy(base, shared)
    torch.manual_seed(0)
    if side == "ours":
        import fastadapt

        model = fastadapt.inject(model, case.config("all-linear"))
    elif side == "peft":
        from peft import get_peft_model

        with warnings.catch_warnings():
            # PEFT asks transformers for a property that the newest transformers renames.
            warnings.filterwarnings("ignore", category=FutureWarning, message="`is_gradient_checkpointing`")
            model = get_peft_model(model, case.peft_config("all-linear"))
    return model.train()


def trained(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that the optimizer gets."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def make_step(model: Any, shape: Shape) -> Callable[[], None]:
    """One step on fixed random tokens; with an optimizer where the model has something to train."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(VOCAB, (shape.batch, shape.length), generator=generator)
    embeddings = model.get_input_embeddings()(tokens).detach().requires_grad_()
    parameters = trained(model)
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True) if parameters else None

    def step() -> None:
        model(inputs_embeds=embeddings, labels=tokens, use_cache=False).loss.backward()
        embeddings.grad = None
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return step


def peak(case: AdapterCase, side: Side, shape: Shape) -> float:
    """The peak resident set of a process that trains this one variant, in MB."""
    return float(measure.run_apart("bench.step", {"case": case.name, "side": side, "shape": asdict(shape)}))


def run(
    cases: list[AdapterCase], shape: Shape, rounds: int, *, peft: bool = True, peaks: bool = True
) -> list[report.Row]:
    """Measure; one row a case. Those of one length and dtype run among themselves, of more tokens in fewer rounds."""
    rows: list[report.Row] = []
    for longer, dtype in sorted({(case.longer, case.dtype) for case in cases}, reverse=True):
        chosen = [case for case in cases if (case.longer, case.dtype) == (longer, dtype)]
        own_shape = replace(shape, length=shape.length * longer, dtype=dtype)
        fewer = rounds if longer == 1 else max(3, rounds // longer)
        rows += _run_shape(chosen, own_shape, fewer, peft=peft, peaks=peaks)
    rows.sort(key=lambda row: list(STEP_CASES).index(row["case"]))
    return rows


def _run_shape(cases: list[AdapterCase], shape: Shape, rounds: int, *, peft: bool, peaks: bool) -> list[report.Row]:
    torch.set_num_threads(shape.threads)
    sides: list[Side] = ["ours", "peft"] if peft else ["ours"]
    # Before this process holds models of its own: at many tokens both would not fit.
    frozen_peak = peak(cases[0], "frozen", shape) if peaks else None
    pairs = list(itertools.product(cases, sides))
    peak_of = {(case.name, side): peak(case, side, shape) if peaks else None for case, side in pairs}
    base = base_model(shape)
    variants = dict.fromkeys(FROZEN, make_step(base, shape))
    trainable = {}
    for case, side in pairs:
        model = adapted(base, case, side)
        trainable[case.name, side] = sum(parameter.numel() for parameter in trained(model))
        variants[f"{case.name} {side}"] = make_step(model, shape)
    results = measure.interleave(variants, rounds)

    rows: list[report.Row] = []
    for case in cases:
        with_bytes, flops = floor(case, shape)
        row: report.Row = {"case": case.name, "floor": with_bytes, "floor_flops": flops}
        for side in sides:
            prefix = "" if side == "ours" else "peft_"
            wall, cpu = measure.compare(results, f"{case.name} {side}", FROZEN)
            row[f"{prefix}x_best"] = measure.best_ratio(results, f"{case.name} {side}", FROZEN)
            row |= {f"{prefix}x_frozen": wall.median, f"{prefix}x_low": wall.low, f"{prefix}x_high": wall.high}
            row |= {f"{prefix}x_cpu": cpu.median, f"{prefix}x_cpu_low": cpu.low, f"{prefix}x_cpu_high": cpu.high}
            row[f"{prefix}peak_mb"] = peak_of[case.name, side]
            row[f"{prefix}step_s"] = sorted(round_[f"{case.name} {side}"].wall for round_ in results)[rounds // 2]
            row[f"{prefix}trainable"] = trainable[case.name, side]
        row |= {"frozen_peak_mb": frozen_peak, "r": case.r, "dropout": case.dropout, "rounds": rounds} | asdict(shape)
        rows.append(row)
    return rows


def main(
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the rows there.")] = None,
    rounds: Annotated[int, typer.Option(help="Counted rounds; under 10, 0.04 is not resolved.")] = 10,
    cases: Annotated[str, typer.Option(help=f"Comma-separated, of {', '.join(STEP_CASES)}; all by default.")] = "",
    layers: Annotated[int, typer.Option(help="Decoder layers; 30 is the whole model.")] = LAYERS,
    batch: int = 4,
    length: int = 128,
    threads: int = 2,
    peft: Annotated[bool, typer.Option(help="Measure PEFT beside.")] = True,
    peaks: Annotated[bool, typer.Option(help="Take each variant's peak memory in a process of its own.")] = True,
) -> None:
    """A training step as a multiple of the frozen pass: LoRA, DoRA, VeRA, DoRA with dropout; ours and PEFT's."""
    shape = Shape(layers, batch, length, threads)
    rows = run(chosen(STEP_CASES, cases), shape, rounds, peft=peft, peaks=peaks)
    columns = {
        "case": "case",
        "x_frozen": "x frozen",
        "x_low": "95% from",
        "x_high": "to",
        "x_cpu": "CPU time",
        "x_best": "fastest",
        "peft_x_frozen": "PEFT",
        "peft_x_low": "95% from",
        "peft_x_high": "to",
        "peft_x_cpu": "CPU time",
        "peft_x_best": "fastest",
        "floor": "floor",
        "peak_mb": "peak MB",
        "peft_peak_mb": "PEFT's",
    }
    report.print_table(f"Training step, {batch} x {length} tokens, {layers} layers, {rounds} rounds", rows, columns)
    if json_file is not None:
        write_json(json_file, "step", rows)


@page.section("step", "A training step")
def section(document: Document) -> str:
    first = document["rows"][0]
    rows = [
        f"{STEP_CASES[row['case']].title} | {page.span(row, 'x_frozen', 'x_low', 'x_high')} | "
        f"{page.span(row, 'peft_x_frozen', 'peft_x_low', 'peft_x_high')} | {row['floor']:.2f} | "
        f"{page.number(row['peak_mb'], 0)} | {page.number(row['peft_peak_mb'], 0)}"
        for row in document["rows"]
    ]
    return (
        f"SmolLM2-135M's dimensions, rank 16 (VeRA 256) on all {7 * first['layers']} linear layers, {first['batch']} × "
        f"{first['length']} tokens, fp32 where nothing else is said, AdamW included, as a multiple of the frozen "
        f"forward and backward; medians of {first['rounds']} rounds (fewer for more tokens), and the least that the "
        "formula allows.\n\n"
    ) + page.table("| ours | PEFT | floor | peak MB | PEFT's", rows)


@page.headline("step")
def headline(document: Document) -> str:
    row = page.by_case(document)["dora"]
    return f"a training step of DoRA, x the frozen pass | {row['x_frozen']:.2f} | {row['peft_x_frozen']:.2f}"


def report_peak(arguments: dict[str, Any]) -> None:
    """In a process of its own: train one variant for three steps and print the peak resident set."""
    # Its output is one number; what libraries warn about was shown by the process that started this one.
    warnings.simplefilter("ignore")
    shape = Shape(**arguments["shape"])
    torch.set_num_threads(shape.threads)
    model = base_model(shape)
    if arguments["side"] != "frozen":
        model = adapted(model, STEP_CASES[arguments["case"]], arguments["side"])
    step = make_step(model, shape)
    for _ in range(3):
        step()
    print(measure.peak_mb())


if __name__ == "__main__":
    report_peak(json.loads(sys.argv[1]))
