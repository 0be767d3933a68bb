"""Training on real data: PEFT, accelerated PEFT and injected adapters, step by step on the same batches.

SmolLM2-135M-Instruct on question/answer pairs, packed to rows of one length, and MiniLM on movie-review sentences; rank
16 on every linear layer but the head ("head": on that too), AdamW, no dropout, the same first factors. Every round is
one training step of each side on the same batch, so that a run gives the losses, their differences from PEFT's, and the
ratios of the times. fp32; bf16 autocast over fp32 weights; bf16 weights with adapters in fp32. Peaks are of processes
of their own that take three steps.
"""

from __future__ import annotations

import copy
import itertools
import json
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch import Tensor, nn

import fastadapt
from bench import measure, page, report
from bench.cases import AdapterCase, chosen
from bench.plots import Document, draw_train, read
from bench.sentiment import load_minilm, load_sentences
from fastadapt.commands.demo.assets import load_model, load_topic
from fastadapt.commands.demo.training import prompt_text, skeleton
from fastadapt.commands.report import write_json
from fastadapt.model.adapted import adapter_layers

TOPICS = ("tech_support", "trivia", "coding", "science", "psychology", "ai")
RATE = 5e-4
# What curves in fp32 may differ by, in nats a token. In 16 bits it is what PEFT's own differ by on other threads; that
# is nothing where products add in one order on any number of threads, and the distance from fp32 tells more.
ASKED = 1e-3

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class TrainCase:
    """What is trained, how, and which sides there are beside PEFT's."""

    name: str
    method: str = "lora"
    mode: str = "fp32"
    checkpointing: bool = False
    head: bool = False
    model: str = "smollm2"

    @property
    def sides(self) -> tuple[str, ...]:
        more = ("chunked",) if self.head else ()
        return ("peft", "accelerated", "injected", *more)

    @property
    def title(self) -> str:
        parts = [{"lora": "LoRA", "dora": "DoRA"}[self.method] + (" on the head too" if self.head else "")]
        parts += ["MiniLM"] * (self.model == "minilm") + [_MODES[self.mode]] * (self.mode != "fp32")
        return ", ".join([*parts, "checkpointing"][: len(parts) + self.checkpointing])

    def configs(self) -> tuple[Any, Any]:
        """(ours, PEFT's)."""
        names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]
        if self.model == "minilm":
            names = ["query", "key", "value", "dense"]
        case = AdapterCase(self.name, "dora" if self.method == "dora" else "lora", 16)
        targets: Any = names if self.head or self.model == "minilm" else "all-linear"
        return case.config(targets), case.peft_config(targets)


_MODES = {"fp32": "fp32", "autocast": "bf16 autocast", "bf16": "bf16 base"}
CASES = {
    case.name: case
    for case in (
        TrainCase("lora_fp32"),
        TrainCase("lora_fp32_checkpointed", checkpointing=True),
        TrainCase("lora_autocast", mode="autocast"),
        TrainCase("lora_autocast_checkpointed", mode="autocast", checkpointing=True),
        TrainCase("lora_bf16", mode="bf16"),
        TrainCase("lora_bf16_checkpointed", mode="bf16", checkpointing=True),
        TrainCase("dora_fp32", "dora"),
        TrainCase("dora_autocast", "dora", "autocast"),
        TrainCase("head_fp32", head=True),
        TrainCase("minilm_fp32", model="minilm"),
    )
}
CURVES = "lora_fp32,lora_autocast,lora_bf16"


@dataclass(frozen=True)
class Size:
    """How large a step is."""

    layers: int = 30
    batch: int = 4
    length: int = 64
    threads: int = 2


def load(name: str, size: Size) -> tuple[Any, list[Batch]]:
    """(The model with so many of its layers, in fp32 and frozen; its batches in the order in which all train)."""
    if name == "minilm":
        model, tokenizer = load_minilm()
        sentences = load_sentences().train[:4096]
        options: dict[str, Any] = {"padding": "max_length", "truncation": True, "max_length": size.length}
        data = dict(tokenizer([text for text, _ in sentences], return_tensors="pt", **options))
        data["labels"] = torch.tensor([label for _, label in sentences])
        del model.bert.encoder.layer[size.layers :]
    else:
        model, tokenizer = load_model(None, lambda _: None)
        pairs = [pair for topic in TOPICS for pair in load_topic(topic, 0).train]
        texts = [prompt_text(tokenizer, pair.question) + pair.answer + tokenizer.eos_token for pair in pairs]
        tokens = itertools.chain.from_iterable(tokenizer(texts, add_special_tokens=False)["input_ids"])
        ids = torch.tensor(list(tokens))
        ids = ids[: ids.numel() // size.length * size.length].view(-1, size.length)
        ids = ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))]
        data = {"input_ids": ids, "labels": ids}
        del model.model.layers[size.layers :]
        model.config.num_hidden_layers = len(model.model.layers)
    for part in model.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    starts = range(0, len(data["labels"]) - size.batch + 1, size.batch)
    return model, [{key: value[start : start + size.batch] for key, value in data.items()} for start in starts]


def in_mode(base: Any, mode: str) -> Any:
    """The base in the dtype of a mode; the same one where that is its own."""
    return copy.deepcopy(base).to(torch.bfloat16) if mode == "bf16" else base


def adapted(base: Any, case: TrainCase, side: str) -> Any:
    """A model of its own over the base's weights, with the factors that PEFT draws."""
    import peft

    ours, theirs = case.configs()
    torch.manual_seed(0)
    with warnings.catch_warnings():
        # PEFT asks transformers for a property that the newest renames, and warns of an adapter on one tied layer.
        warnings.simplefilter("ignore")
        model: Any = peft.get_peft_model(skeleton(base), theirs)
    if side == "accelerated":
        fastadapt.accelerate_peft(model)
    elif side in ("injected", "chunked"):
        drawn, model = model, fastadapt.inject(skeleton(base), ours)
        for path, layer in adapter_layers(model).items():
            factor: Any = layer.adapters["default"]
            with torch.no_grad():
                factor.lora_A.copy_(drawn.get_submodule(f"base_model.model.{path}").lora_A["default"].weight)
        if side == "chunked":
            fastadapt.chunk_loss(model)
    if case.checkpointing:
        inner = model if isinstance(model, type(base)) else model.get_base_model()
        inner.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


class Training:
    """One side of a case: each call is a step on the next batch; `losses` has what came of it."""

    def __init__(self, model: Any, case: TrainCase, batches: Sequence[Batch], threads: int) -> None:
        self.model, self.case, self.threads = model, case, threads
        self.batches: Iterator[Batch] = itertools.cycle(batches)
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(parameters, lr=RATE, fused=True)
        self.losses: list[float] = []

    def __call__(self) -> None:
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.case.mode == "autocast"):
            options = {"use_cache": False} if self.case.model == "smollm2" else {}
            loss = self.model(**next(self.batches), **options).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.losses.append(loss.item())
        torch.set_num_threads(before)


def difference(one: Sequence[float], other: Sequence[float]) -> float:
    """The largest difference of two curves at any step."""
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


def peak(case: TrainCase, side: str, size: Size) -> float:
    """The peak resident set of a process that trains this one side, in MB."""
    return float(measure.run_apart("bench.train", {"case": case.name, "side": side, "size": asdict(size)}))


def run_case(
    case: TrainCase, base: Any, batches: list[Batch], size: Size, rounds: int, *, spread: bool, peaks: bool
) -> tuple[list[report.Row], dict[str, list[float]]]:
    """(One row a side, the losses by side) of one case; spread: trains PEFT a second time on other threads."""
    own = in_mode(base, case.mode)
    sides = {side: Training(adapted(own, case, side), case, batches, size.threads) for side in case.sides}
    if spread:
        sides["peft_again"] = Training(adapted(own, case, "peft"), case, batches, 1 if size.threads > 1 else 2)
    rows, curves = compared(case, sides, rounds)
    asked = difference(curves["peft"], curves["peft_again"]) if spread else ASKED if case.mode == "fp32" else None
    for row in rows:
        row["asked"] = asked
        row["kept"] = None if asked is None else row["max_difference"] <= asked
        row["peak_mb"] = peak(case, row["side"], size) if peaks else None
    return [row | asdict(size) for row in rows if row["side"] != "peft_again"], curves


def compared(
    case: TrainCase, sides: Mapping[str, Training], rounds: int
) -> tuple[list[report.Row], dict[str, list[float]]]:
    """(One row a side, the losses by side) of trainings that take a step each in every round, beside PEFT's."""
    results = measure.interleave(sides, rounds)
    curves = {side: training.losses for side, training in sides.items()}
    rows: list[report.Row] = []
    for side, losses in curves.items():
        wall, cpu = measure.compare(results, side, ["peft"])
        last = max(1, rounds // 10)
        row: report.Row = {"variant": f"{case.name} {side}", "case": case.name, "side": side}
        row |= {"x_peft": wall.median, "x_low": wall.low, "x_high": wall.high, "x_cpu": cpu.median}
        row["step_s"] = sorted(round_[side].wall for round_ in results)[rounds // 2]
        row |= {"loss_first": losses[0], "loss_last": sum(losses[-last:]) / last}
        row |= {"max_difference": difference(losses, curves["peft"]), "steps": rounds + 1, "rate": RATE}
        rows.append(row)
    return rows, curves


def predicted_minutes(cases: list[TrainCase], step: float, rounds: int, *, spread: bool, peaks: bool) -> float:
    """How long a run will take, from the seconds of one step of PEFT's in fp32."""
    seconds = 0.0
    for case in cases:
        own = step * (1.35 if case.checkpointing else 1.0) * (0.15 if case.model == "minilm" else 1.0)
        sides = len(case.sides) + (spread and case.mode != "fp32")
        seconds += sides * (rounds + 1) * own + peaks * len(case.sides) * (3 * own + 12)
    return seconds / 60


def run(
    cases: list[TrainCase], size: Size, rounds: int, *, spread: bool = False, peaks: bool = True
) -> tuple[list[report.Row], dict[str, list[float]]]:
    """(Rows, curves by "case side"); says first how long it will take."""
    torch.set_num_threads(size.threads)
    rows: list[report.Row] = []
    curves: dict[str, list[float]] = {}
    for model in dict.fromkeys(case.model for case in cases):
        base, batches = load(model, size)
        if not rows:
            trial = Training(adapted(base, cases[0], "peft"), TrainCase("trial", model=model), batches, size.threads)
            trial()
            start = time.perf_counter()
            trial()
            minutes = predicted_minutes(cases, time.perf_counter() - start, rounds, spread=spread, peaks=peaks)
            Console(stderr=True).print(f"about {minutes:.0f} minutes")
            del trial
        for case in cases:
            if case.model != model:
                continue
            again = spread and case.mode != "fp32"
            found, own = run_case(case, base, batches, size, rounds, spread=again, peaks=peaks)
            rows += found
            curves |= {f"{case.name} {side}": losses for side, losses in own.items()}
    for row in rows:
        exact = curves.get(f"{CASES[row['case']].method}_fp32 peft")
        halves = CASES[row["case"]].mode != "fp32"
        row["from_fp32"] = None if exact is None or not halves else difference(curves[row["variant"]], exact)
    return rows, curves


def main(
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the rows there, a PNG beside it.")] = None,
    rounds: Annotated[int, typer.Option(help="Counted rounds: training steps of each side.")] = 15,
    cases: Annotated[str, typer.Option(help=f"Comma-separated, of {', '.join(CASES)}; all by default.")] = "",
    curves: Annotated[int, typer.Option(help=f"So many steps of {CURVES} alone, PEFT's twice in 16 bits.")] = 0,
    layers: int = Size.layers,
    batch: Annotated[int, typer.Option(help="Rows; 0: 4, with --curves 2.")] = 0,
    length: Annotated[int, typer.Option(help="Tokens a row; 0: 64, with --curves 32.")] = 0,
    threads: int = Size.threads,
    peaks: Annotated[bool, typer.Option(help="Take each side's peak memory in a process of its own.")] = True,
) -> None:
    """Training on real data: losses, step time and memory of injected adapters and accelerated PEFT beside PEFT."""
    # A quarter of the tokens for many steps: with all of them 200 would take three quarters of an hour.
    half = 2 if curves else 1
    size = Size(layers, batch or Size.batch // half, length or Size.length // half, threads)
    wanted = chosen(CASES, cases or (CURVES if curves else ""))
    rows, losses = run(wanted, size, curves or rounds, spread=curves > 0, peaks=peaks and not curves)
    columns = {
        "variant": "case and side",
        "x_peft": "x PEFT",
        "x_low": "95% from",
        "x_high": "to",
        "x_cpu": "CPU time",
        "step_s": "seconds",
        "peak_mb": "peak MB",
        "loss_first": "loss",
        "loss_last": "at the end",
        "max_difference": "differs by",
        "asked": "asked",
        "from_fp32": "from fp32",
    }
    report.print_table(
        f"Training, {size.batch} x {size.length} tokens, {layers} layers, {rows[0]['steps']} steps", rows, columns
    )
    if json_file is not None:
        write_json(json_file, "train", rows, curves=losses)
        draw_train(read(json_file), json_file.with_suffix(".png"))


_SIDES = {"accelerated": "accelerated PEFT", "injected": "injected", "chunked": "injected, loss in chunks"}


@page.section("train", "Training on real data")
@page.section("train-curves", "Losses over many steps", "python -m bench train --curves 200 --json FILE")
def section(document: Document) -> str:
    rows = [
        f"{CASES[row['case']].title}: {_SIDES[row['side']]} | {page.span(row, 'x_peft', 'x_low', 'x_high')} | "
        f"{page.number(row['peak_mb'], 0)} | {page.number(theirs['peak_mb'], 0)} | {row['loss_first']:.2f} → "
        f"{row['loss_last']:.2f} | {row['max_difference']:.0e} | "
        f"{_tiny(row['asked'])} | {_tiny(row['from_fp32'])} | {_tiny(theirs['from_fp32'])}"
        for row in document["rows"]
        for theirs in document["rows"]
        if row["side"] != "peft" and (theirs["case"], theirs["side"]) == (row["case"], "peft")
    ]
    first = document["rows"][0]
    return (
        f"SmolLM2-135M-Instruct ({first['layers']} layers) on question/answer pairs, MiniLM on movie-review sentences: "
        f"{first['batch']} × {first['length']} tokens, rank 16 on every linear layer but the head, AdamW, no dropout, "
        f"{first['steps']} steps of each side on the same batches, from the same factors. Step as a multiple of PEFT's "
        "in the same round; losses in nats, how far they are from PEFT's at any step, and what is asked: in fp32 "
        f"{ASKED:.0e}, in 16 bits what PEFT's own differ by on another number of threads; last, how far 16 bits are "
        "from PEFT's losses in fp32.\n\n"
    ) + page.table("| step, x PEFT | peak MB | PEFT's | loss | differs by | asked | from fp32 | PEFT's", rows)


def _tiny(value: float | None) -> str:
    return "–" if value is None else f"{value:.0e}"


def report_peak(arguments: dict[str, Any]) -> None:
    """In a process of its own: train one side for three steps and print the peak resident set."""
    # Its output is one number; what libraries warn about was shown by the process that started this one.
    warnings.simplefilter("ignore")
    case, size = CASES[arguments["case"]], Size(**arguments["size"])
    torch.set_num_threads(size.threads)
    base, batches = load(case.model, size)
    base = in_mode(base, case.mode)
    training = Training(adapted(base, case, arguments["side"]), case, batches, size.threads)
    for _ in range(3):
        training()
    print(measure.peak_mb())


if __name__ == "__main__":
    report_peak(json.loads(sys.argv[1]))
