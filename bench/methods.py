"""Every method on one real task: all-MiniLM-L6-v2 on movie-review sentences, several seeds, equal steps.

Each method adapts every linear layer of the encoder but the pooler and trains the classifier's head in its own copy.
Its learning rate is the one of RATES times its recipe's that does best on validation sentences, with a seed that is
used for nothing else. The accuracy is on test sentences that no choice has seen. Steps are timed interleaved, as
multiples of the frozen pass.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn

from bench import measure, page, report
from bench.cases import chosen
from bench.plots import Document, draw_methods, read
from bench.sentiment import Split, load_minilm, load_sentences
from fastadapt.commands.batches import Batch, Row, collate
from fastadapt.commands.demo.compare import saved_bytes, training_step
from fastadapt.commands.demo.training import losses_of_steps, seeded_batches, skeleton
from fastadapt.commands.report import write_json
from fastadapt.commands.train.loop import evaluate
from fastadapt.commands.train.options import SCHEDULES
from fastadapt.model.adapted import saved_modules
from fastadapt.model.inject import control, inject, trainable_parameters
from fastadapt.progress import progress_bar
from fastadapt.training.recipes import Recipe, recipes

BATCH_ROWS = 16
MAX_TOKENS = 48
RANK = {"vera": 256, "dvora": 256}
RATES = (1.0, 4.0)
CHOICE_SEED = 1000


def batches(rows: list[Row], padding: int, steps: int, seed: int) -> Iterator[Batch]:
    """`steps` batches in a shuffled order."""
    for batch in seeded_batches(rows, steps, seed, BATCH_ROWS):
        yield collate(batch, padding, torch.device("cpu"))


def adapted(base: Any, name: str, recipe: Recipe, rows: list[Row], steps: int, seed: int) -> Any:
    """The method's adapter on a skeleton of the base, ready for its first step."""
    rank = RANK.get(name, 8)
    torch.manual_seed(seed)
    config = recipe.config(
        rank,
        2 * rank,
        0.0,
        steps,
        target_modules="all-linear",
        # It reads one token a row: EVA's mask of tokens does not fit it.
        exclude_modules=["pooler.dense"],
        task_type="SEQ_CLS",
        modules_to_save=["classifier"],
    )
    model = inject(skeleton(base), config)
    recipe.prepare(model, list(batches(rows, base.config.pad_token_id, 16, seed)), "default")
    return model


def train(model: Any, recipe: Recipe, rate: float, rows: list[Row], steps: int, seed: int) -> None:
    """A tenth of the steps to warm up, then a linear descent to zero."""
    optimizer = recipe.optimizer(model, rate, 0.0)
    chosen = batches(rows, model.config.pad_token_id, steps, seed)
    for _ in losses_of_steps(model, chosen, steps, optimizer, control(model), schedule=SCHEDULES["linear"]):
        pass


def counts(model: nn.Module) -> dict[str, int]:
    """Trained parameters of the adapters and of the head."""
    head = sum(p.numel() for module in saved_modules(model).values() for p in module.copies.parameters())
    return {"trainable": trainable_parameters(model).trainable - head, "head": head}


def run(
    names: list[str], split: Split, steps: int, seeds: int, rates: tuple[float, ...], rounds: int
) -> list[report.Row]:
    """Measure; one row a method."""
    base, tokenizer = load_minilm()

    def encode(rows: list[tuple[str, int]]) -> list[Row]:
        ids = tokenizer([text for text, _ in rows], truncation=True, max_length=MAX_TOKENS)["input_ids"]
        return [Row(row, label) for row, (_, label) in zip(ids, rows, strict=True)]

    rows, validation, test = (encode(part) for part in split)
    padding = base.config.pad_token_id
    positive = statistics.mean([label for _, label in split.test])
    found: list[report.Row] = []
    with progress_bar("", len(names) * (seeds + (len(rates) if len(rates) > 1 else 0))) as update:
        for name in names:
            recipe = recipes()[name]

            def result(
                factor: float, seed: int, part: list[Row], name: str = name, recipe: Recipe = recipe
            ) -> tuple[float, Any]:
                update(description=f"{recipe.title}, rate x{factor:g}, seed {seed}")
                model = adapted(base, name, recipe, rows, steps, seed)
                train(model, recipe, factor * recipe.learning_rate, rows, steps, seed)
                update(advance=1)
                score = evaluate(model, part, 4 * BATCH_ROWS, padding).accuracy
                assert score is not None
                return score, model

            tried = {factor: result(factor, CHOICE_SEED, validation)[0] for factor in rates} if len(rates) > 1 else {}
            factor = max(tried, key=lambda factor: tried[factor]) if tried else rates[0]
            outcomes = [result(factor, seed, test) for seed in range(seeds)]
            scores = [score for score, _ in outcomes]
            found.append(
                {
                    "case": name,
                    "method": recipe.title,
                    "accuracy": statistics.mean(scores),
                    "accuracy_low": min(scores),
                    "accuracy_high": max(scores),
                    "accuracies": scores,
                    **counts(outcomes[-1][1]),
                    "learning_rate": factor * recipe.learning_rate,
                    "tried": {str(key): value for key, value in tried.items()},
                    "majority": max(positive, 1 - positive),
                    "steps": steps,
                    "seeds": seeds,
                }
            )
    batch = next(batches(rows, padding, 1, 0))
    frozen = ("frozen", "frozen, second")
    variants = {name: training_step(skeleton(base).train(), batch) for name in frozen}
    for row in found:
        recipe = recipes()[row["case"]]
        # As trained from the first step on: with the weak layers sharing, the ranks redistributed.
        model = adapted(base, row["case"], recipe, rows, steps, 0)
        row["saved_mb"] = saved_bytes(model, batch) / 1e6
        # A rate of zero leaves the adapter as it is, and costs the same.
        variants[row["case"]] = training_step(model.train(), batch, recipe.optimizer(model, 0.0, 0.0), control(model))
    timings = measure.interleave(variants, rounds)
    for row in found:
        wall, cpu = measure.compare(timings, row["case"], frozen)
        row |= {
            "x_frozen": wall.median,
            "x_frozen_low": wall.low,
            "x_frozen_high": wall.high,
            "cpu_x_frozen": cpu.median,
        }
        row["tokens"] = batch["input_ids"].numel()
    return found


def main(
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the rows there, a PNG beside it.")] = None,
    cases: Annotated[str, typer.Option(help=f"Comma-separated, of {', '.join(recipes())}; all by default.")] = "",
    steps: Annotated[int, typer.Option(min=1, help="Training steps of each run.")] = 80,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each method.")] = 3,
    tune: Annotated[bool, typer.Option(help="Choose each method's rate on validation sentences first.")] = True,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of the timing.")] = 8,
) -> None:
    """Accuracy, parameters, step time and memory of every method on movie-review sentences."""
    known = recipes()
    names = [name for name, recipe in known.items() if recipe in chosen(known, cases)]
    rows = run(names, load_sentences(), steps, seeds, RATES if tune else (1.0,), rounds)
    columns = {
        "method": "method",
        "accuracy": "accuracy",
        "accuracy_low": "lowest",
        "accuracy_high": "highest",
        "trainable": "parameters",
        "learning_rate": "rate",
        "x_frozen": "step x frozen",
        "saved_mb": "saved MB",
    }
    report.print_table(f"Movie reviews, MiniLM, {steps} steps of {BATCH_ROWS}, {seeds} seeds", rows, columns)
    if json_file is not None:
        write_json(json_file, "methods", rows)
        draw_methods(read(json_file), json_file.with_suffix(".png"))


@page.section("methods", "The methods compared")
def section(document: Document) -> str:
    first = document["rows"][0]
    rows = [
        f"{row['method']} | {page.span(row, 'accuracy', 'accuracy_low', 'accuracy_high', 3)} | {row['trainable']:,} | "
        f"{row['learning_rate']:g} | {page.span(row, 'x_frozen', 'x_frozen_low', 'x_frozen_high')} | "
        f"{row['saved_mb']:.0f}"
        for row in document["rows"]
    ]
    return (
        f"all-MiniLM-L6-v2 on movie-review sentences, every linear layer, rank 8 (VeRA 256), {first['steps']} steps of "
        f"{BATCH_ROWS} sentences, each method at the better of two rates by validation; accuracy on 1,000 test "
        f"sentences, mean of {first['seeds']} seeds (worst–best; the larger class is {first['majority']:.3f}); step as "
        f"a multiple of the frozen pass at {first['tokens']} tokens. A short training of a small model: the spread "
        "between seeds is as large as most differences, and the table ranks no method for good. LoRA-drop drops "
        "nothing here: on six layers of even energy its threshold keeps all.\n\n"
    ) + page.table("| accuracy | trained | rate | step, x frozen | kept, MB", rows)
