"""Every method on one real task: all-MiniLM-L6-v2 on movie-review sentences, several seeds, equal steps.

Each method adapts every linear layer of the encoder and trains the classifier's head in its own copy. Its learning rate
is the one of RATES times its recipe's that does best on validation sentences, with a seed that is used for nothing
else. The accuracy is on test sentences that no choice has seen. Steps are timed interleaved, as multiples of the
frozen pass.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn

from bench import measure, report
from bench.cases import chosen
from bench.plots import draw_methods, read
from bench.sentiment import Split, load_minilm, load_sentences
from fastadapt.demo_compare import saved_bytes
from fastadapt.demo_training import skeleton
from fastadapt.inject import adapter_layers, control, inject
from fastadapt.recipes import RECIPES, Recipe
from fastadapt.report import write_json

BATCH_ROWS = 16
MAX_TOKENS = 48
RANK = {"vera": 256, "dvora": 256}
RATES = (1.0, 4.0)
CHOICE_SEED = 1000

Batch = dict[str, Tensor]
Rows = list[tuple[list[int], int]]


def collate(rows: Rows) -> Batch:
    """input_ids and attention_mask [rows, longest], labels [rows]."""
    width = max(len(ids) for ids, _ in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for index, (row, _) in enumerate(rows):
        ids[index, : len(row)] = torch.tensor(row)
        mask[index, : len(row)] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([label for _, label in rows])}


def batches(rows: Rows, steps: int, seed: int) -> Iterator[Batch]:
    """`steps` batches in a shuffled order, rows of like length together within pools of eight batches."""
    shuffler = random.Random(seed)
    ready: list[Rows] = []
    for _ in range(steps):
        if not ready:
            shuffled = shuffler.sample(rows, len(rows))
            pool = 8 * BATCH_ROWS
            ordered = [
                row
                for start in range(0, len(rows), pool)
                for row in sorted(shuffled[start : start + pool], key=lambda row: len(row[0]))
            ]
            ready = [ordered[start : start + BATCH_ROWS] for start in range(0, len(rows), BATCH_ROWS)]
            shuffler.shuffle(ready)
        yield collate(ready.pop())


@torch.no_grad()
def accuracy(model: Any, rows: Rows) -> float:
    """Share of rows that the model classifies rightly."""
    model.eval()
    ordered = sorted(rows, key=lambda row: len(row[0]))
    right = 0
    for start in range(0, len(ordered), 4 * BATCH_ROWS):
        batch = collate(ordered[start : start + 4 * BATCH_ROWS])
        labels = batch.pop("labels")
        right += int((model(**batch).logits.argmax(-1) == labels).sum())
    return right / len(rows)


def adapted(base: nn.Module, name: str, recipe: Recipe, rows: Rows, steps: int, seed: int) -> Any:
    """The method's adapter on a skeleton of the base, ready for its first step."""
    rank = RANK.get(name, 8)
    torch.manual_seed(seed)
    config = recipe.config(
        rank, 2 * rank, 0.0, steps, target_modules="all-linear", task_type="SEQ_CLS", modules_to_save=["classifier"]
    )
    model = inject(skeleton(base), config)
    recipe.prepare(model, list(batches(rows, 16, seed)), "default")
    return model


def train(model: Any, recipe: Recipe, rate: float, rows: Rows, steps: int, seed: int) -> None:
    """A tenth of the steps to warm up, then a linear descent to zero."""
    optimizer = recipe.optimizer(model, rate, 0.0)
    warm = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: (step + 1) / warm if step < warm else 1 - (step - warm) / max(1, steps - warm)
    )
    between = control(model)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.train()
    for batch in batches(rows, steps, seed):
        (model(**batch).loss + between.regularizer()).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        between.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)


def counts(model: nn.Module) -> dict[str, int]:
    """Trained parameters of the adapters and of the head."""
    own = {id(p): p.numel() for layer in adapter_layers(model).values() for p in layer.parameters() if p.requires_grad}
    every = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {"trainable": sum(own.values()), "head": every - sum(own.values())}


def step(model: Any, recipe: Recipe, batch: Batch) -> Callable[[], None]:
    """Forward, backward, optimizer and what the method does between steps, with a rate of zero."""
    optimizer = recipe.optimizer(model, 0.0, 0.0)
    between = control(model)

    def run() -> None:
        (model(**batch).loss + between.regularizer()).backward()
        optimizer.step()
        between.step()
        optimizer.zero_grad(set_to_none=True)

    return run


def frozen(base: Any, batch: Batch) -> Callable[[], None]:
    """Forward, and backward to the embeddings' output, without any adapter."""
    model = skeleton(base).train()

    def run() -> None:
        embedded = model.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()
        model(inputs_embeds=embedded, attention_mask=batch["attention_mask"], labels=batch["labels"]).loss.backward()

    return run


def run(
    names: list[str], split: Split, steps: int, seeds: int, rates: tuple[float, ...], rounds: int
) -> list[report.Row]:
    """Measure; one row a method."""
    base, tokenizer = load_minilm()

    def encode(rows: list[tuple[str, int]]) -> Rows:
        ids = tokenizer([text for text, _ in rows], truncation=True, max_length=MAX_TOKENS)["input_ids"]
        return list(zip(ids, [label for _, label in rows], strict=True))

    rows, validation, test = (encode(part) for part in split)
    positive = statistics.mean([label for _, label in test])
    found: list[report.Row] = []
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns) as progress:
        task = progress.add_task("", total=len(names) * (seeds + (len(rates) if len(rates) > 1 else 0)))
        for name in names:
            recipe = RECIPES[name]

            def result(
                factor: float, seed: int, part: Rows, name: str = name, recipe: Recipe = recipe
            ) -> tuple[float, Any]:
                progress.update(task, description=f"{recipe.title}, rate x{factor:g}, seed {seed}")
                model = adapted(base, name, recipe, rows, steps, seed)
                train(model, recipe, factor * recipe.learning_rate, rows, steps, seed)
                progress.advance(task)
                return accuracy(model, part), model

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
    batch = next(iter(batches(rows, 1, 0)))
    variants: dict[str, Callable[[], object]] = {"frozen": frozen(base, batch), "frozen, second": frozen(base, batch)}
    for row in found:
        recipe = RECIPES[row["case"]]
        # As trained from the first step on: with the weak layers sharing, the ranks redistributed.
        model = adapted(base, row["case"], recipe, rows, steps, 0)
        row["saved_mb"] = saved_bytes(model, batch) / 1e6
        variants[row["case"]] = step(model.train(), recipe, batch)
    timings = measure.interleave(variants, rounds)
    for row in found:
        wall, cpu = measure.compare(timings, row["case"], ["frozen", "frozen, second"])
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
    cases: Annotated[str, typer.Option(help=f"Comma-separated, of {', '.join(RECIPES)}; all by default.")] = "",
    steps: Annotated[int, typer.Option(min=1, help="Training steps of each run.")] = 80,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each method.")] = 3,
    tune: Annotated[bool, typer.Option(help="Choose each method's rate on validation sentences first.")] = True,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of the timing.")] = 8,
) -> None:
    """Accuracy, parameters, step time and memory of every method on movie-review sentences."""
    names = [recipe for recipe in RECIPES if RECIPES[recipe] in chosen(RECIPES, cases)]
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
