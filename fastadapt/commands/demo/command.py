"""`fastadapt demo`: adapters of several methods, each trained on a topic of its own, measured beside PEFT."""

from __future__ import annotations

import random
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import Progress, TextColumn
from rich.table import Table
from rich.text import Text

from ...methods import PEFT_TYPES, Control, EVAConfig
from ...model.checkpoint import export_lora, load_adapter
from ...model.inject import control, inject, set_adapter, trainable_parameters
from ...model.peft_files import read_fields
from ...model.saving import save_adapter
from ...progress import progress_bars
from ...training.recipes import Recipe, recipes
from ..batches import Row, collate, length
from ..quiet import quiet_transformers
from ..report import new_figure, save_figure, write_json
from . import compare as compare
from . import training as training
from .assets import Topic, load_model, load_topic
from .serving import Request, serve_together

ANSWER_TOKENS = 20
# What LoRA-drop's probe and EVA see of a topic before the first step.
OBSERVED_BATCHES, OBSERVED_ROWS = 6, 24


class Plan(NamedTuple):
    """One adapter of the demo: its method, by the name of its recipe, the topic that it learns, more of its config."""

    name: str
    topic: str
    settings: Mapping[str, Any] = MappingProxyType({})

    @property
    def recipe(self) -> Recipe:
        return recipes()[self.name]

    @property
    def method(self) -> str:
        return self.recipe.title


PLANS = (
    Plan("lora", "trivia"),
    Plan("rslora", "ai"),
    Plan("dora", "emotion"),
    Plan("vera", "psychology"),
    # What differs from LoRA in training alone learns the same as it does.
    Plan("lora+", "trivia"),
    Plan("lora-fa", "trivia"),
    Plan("lora-drop", "trivia"),
    Plan("adalora", "trivia"),
    Plan("delta-lora", "trivia"),
    # Answers alone have too few tokens for as many components: the questions count too.
    Plan("eva", "trivia", {"eva_config": EVAConfig(tau=0.9, use_label_mask=False)}),
)


@dataclass
class Options:
    """What the command line sets. model: directory or hub name, None for SmolLM2-135M; json: file to write, or None."""

    output: Path = Path("fastadapt-demo")
    json: Path | None = None
    model: str | None = None
    steps: int = 16
    seed: int = 0
    rounds: int = 4
    device: str = "cpu"


@dataclass
class Trained:
    """An adapter after training: where it is saved, and what is known about it."""

    plan: Plan
    topic: Topic
    heldout: list[Row]
    directory: Path
    trainable: int
    curve: training.Curve
    model: Any
    between: Control


def run(options: Options, console: Console) -> list[dict[str, Any]]:
    """Runs the whole demo, prints it on `console` and returns the rows of its table.

    Raises AssetError (a ValueError) where the model or the data cannot be had.
    """
    try:
        torch.empty(0, device=options.device)
    except (RuntimeError, AssertionError) as error:  # the latter is how torch says that it was built without CUDA
        raise ValueError(f"device {options.device!r} cannot be used: {str(error).splitlines()[0]}") from error
    options.output.mkdir(parents=True, exist_ok=True)
    with console.status("looking for the model") as status:
        base, tokenizer = load_model(options.model, lambda text: status.update(text))
        base.to(options.device)
    started = time.perf_counter()
    parameters = sum(parameter.numel() for parameter in base.parameters())
    console.print(f"base model: {options.model or 'SmolLM2-135M-Instruct'}, {parameters:,} parameters, frozen, fp32")
    with progress_bars(TextColumn("{task.fields[note]}")) as progress, quiet_transformers():
        trained = [train_one(plan, base, tokenizer, options, progress) for plan in PLANS]
        answers = answer_all(base, tokenizer, trained, progress)
        rows = measure(base, tokenizer, trained, options, progress)
        served = serve(base, tokenizer, trained, progress)
    seconds = time.perf_counter() - started

    json_file = options.json or options.output / "demo.json"
    picture = json_file.with_suffix(".png")
    draw_curves(trained, picture)
    curves = {
        adapter.plan.method: {"train": adapter.curve.train, "heldout": adapter.curve.heldout} for adapter in trained
    }
    settings = {"steps": options.steps, "seed": options.seed, "rounds": options.rounds, "device": options.device}
    write_json(
        json_file,
        "demo",
        rows,
        seconds=round(seconds, 1),
        settings=settings,
        answers=answers,
        served=served,
        curves=curves,
    )
    print_answers(answers, console)
    print_table(rows, options, console)
    print_served(served, console)
    console.print(f"adapters  {options.output}/<method>, readable by PEFT", highlight=False, soft_wrap=True)
    console.print(f"rows      {json_file}", highlight=False, soft_wrap=True)
    console.print(f"curves    {picture}", highlight=False, soft_wrap=True)
    console.print(f"{seconds:.0f} s after the model was loaded", highlight=False)
    return rows


def train_one(plan: Plan, base: Any, tokenizer: Any, options: Options, progress: Progress) -> Trained:
    """Trains one adapter on its topic and saves it."""
    topic = load_topic(plan.topic, options.seed)
    rows, heldout = (training.encode(tokenizer, pairs) for pairs in (topic.train, topic.heldout))
    torch.manual_seed(options.seed)
    recipe = plan.recipe
    common = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    config = recipe.config(recipe.rank, 2 * recipe.rank, 0.0, options.steps, **common, **plan.settings)
    model = inject(training.skeleton(base), config)
    task = progress.add_task(f"{plan.method} on {plan.topic}", total=options.steps, note="held-out rows, before")
    padding = tokenizer.eos_token_id
    shuffled = random.Random(options.seed).sample(rows, len(rows))
    observed = [
        collate(shuffled[start : start + OBSERVED_ROWS], padding, model.device)
        for start in range(0, min(len(rows), OBSERVED_BATCHES * OBSERVED_ROWS), OBSERVED_ROWS)
    ]
    recipe.prepare(model, observed, "default")
    between = control(model)
    curve = training.train(
        model,
        rows,
        heldout,
        padding=padding,
        steps=options.steps,
        optimizer=recipe.optimizer(model, recipe.learning_rate, 0.0),
        between=between,
        seed=options.seed,
        report=lambda step, loss: progress.update(task, completed=step, note=f"loss {loss:.2f}"),
    )
    progress.update(task, note=f"held-out loss {curve.heldout[0][1]:.2f} -> {curve.heldout[-1][1]:.2f}")
    progress.stop_task(task)
    directory = options.output / plan.name
    save_adapter(model, directory)
    return Trained(plan, topic, heldout, directory, trainable_parameters(model).trainable, curve, model, between)


def answer_all(base: Any, tokenizer: Any, trained: list[Trained], progress: Progress) -> list[dict[str, str]]:
    """Two questions of each topic, one held out and one from training, answered by the base and by the first adapter
    that learned it.

    One model holds all adapters, loaded back from their directories, and switches between them.
    """
    model = training.skeleton(base)
    for adapter in trained:
        load_adapter(model, adapter.directory, adapter.plan.name)
    trained = list({adapter.topic.name: adapter for adapter in reversed(trained)}.values())[::-1]
    task = progress.add_task("answers", total=4 * len(trained), note="")
    answers = []
    for adapter in trained:
        for kind, pair in (("held out", adapter.topic.heldout[0]), ("trained on", adapter.topic.train[0])):
            entry = {"topic": adapter.topic.name, "kind": kind, "question": pair.question, "corpus": pair.answer}
            for key, name in (("base", None), ("adapter", adapter.plan.name)):
                set_adapter(model, name)
                entry[key] = training.answer(model, tokenizer, pair.question, ANSWER_TOKENS)
                progress.advance(task)
            answers.append({"method": adapter.plan.method, **entry})
    return answers


def measure(
    base: Any, tokenizer: Any, trained: list[Trained], options: Options, progress: Progress
) -> list[dict[str, Any]]:
    """One flat row for each adapter: what the table shows and the JSON holds."""
    # Four rows of middling length, the same for all: the ratios need a typical step, not a long one.
    everything = sorted((row for adapter in trained for row in adapter.heldout), key=length)
    middle = max(0, len(everything) // 2 - 2)
    batch = collate(everything[middle : middle + 4], tokenizer.eos_token_id, base.device)
    task = progress.add_task("steps beside PEFT", total=None, note="in shuffled order")

    def advance(done: int, total: int) -> None:
        progress.update(task, completed=done, total=total)

    measured = compare.compare(
        base,
        {adapter.plan.method: adapted(adapter) for adapter in trained},
        batch,
        rounds=options.rounds,
        seed=options.seed,
        progress=advance,
    )
    progress.stop_task(task)
    rows = []
    for adapter in trained:
        reloaded = compare.ours(base, adapter.directory)
        rows.append(
            {
                "method": adapter.plan.method,
                "topic": adapter.topic.name,
                "train_rows": len(adapter.topic.train),
                "heldout_rows": len(adapter.heldout),
                "learning_rate": adapter.plan.recipe.learning_rate,
                "trainable": adapter.trainable,
                "loss_before": adapter.curve.heldout[0][1],
                "loss_after": adapter.curve.heldout[-1][1],
                **measured[adapter.plan.method],
                "difference_from_trained": compare.largest_difference(reloaded, adapter.model, batch),
                "batch_tokens": batch["input_ids"].numel(),
            }
        )
    return rows


def serve(base: Any, tokenizer: Any, trained: list[Trained], progress: Progress) -> dict[str, Any]:
    """All adapters in one batch, each asked a question of its topic that it has not seen."""
    task = progress.add_task("one mixed batch", total=len(trained) + 2, note="then each adapter alone")
    requests = [
        Request(
            adapter.plan.method,
            adapter.directory,
            adapter.model,
            adapter.topic.heldout[index % len(adapter.topic.heldout)].question,
        )
        for index, adapter in enumerate(trained)
    ]
    return serve_together(base, tokenizer, requests, ANSWER_TOKENS, lambda: progress.advance(task))


def print_served(served: dict[str, Any], console: Console) -> None:
    """What became of the mixed batch, in one paragraph, and the rows that differ."""
    rows = served["rows"]
    equal = sum(row["equal"] for row in rows)
    console.print(
        f"\nOne batch of {len(rows)} rows, each with another adapter and one with none: {equal} of them have the "
        f"answer of their adapter alone; {served['seconds']:.1f} s together, "
        f"{served['seconds_one_at_a_time']:.1f} s one by one; adapters of {served['adapter_bytes'] / 1e6:.0f} MB",
        highlight=False,
    )
    for row in rows:
        if not row["equal"]:
            console.print(Text(f"  {row['method']} differs: {row['question']} -> {row['answer']}", style="red"))


def adapted(adapter: Trained) -> compare.Adapted:
    """What `compare` needs; what PEFT has no type for is exported to it as the plain LoRA that it amounts to."""
    directory = adapter.directory
    if read_fields(directory)["peft_type"] not in PEFT_TYPES:
        directory = directory / "lora"
        export_lora(adapter.model, directory)
    # A rate of zero leaves the adapter as it was saved, and costs the same.
    return compare.Adapted(
        adapter.model, adapter.plan.recipe.optimizer(adapter.model, 0.0, 0.0), adapter.between, directory
    )


def draw_curves(trained: list[Trained], path: Path) -> None:
    """A picture of all loss curves, written whole or not at all."""
    from matplotlib.ticker import MaxNLocator

    figure = new_figure(9, 5.5)
    axes = figure.add_subplot()
    for index, adapter in enumerate(trained):
        label, color = f"{adapter.plan.method} on {adapter.topic.name}", f"C{index}"
        losses = adapter.curve.train
        axes.plot(range(1, len(losses) + 1), losses, color=color, alpha=0.4, linewidth=1)
        steps, heldout = zip(*adapter.curve.heldout, strict=True)
        axes.plot(steps, heldout, color=color, marker="o", linewidth=2, label=label)
    axes.set_xlabel("training step")
    axes.set_ylabel("loss (nats per answer token)")
    axes.set_title("Loss: thin, each training batch; thick with dots, held-out rows")
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend()
    save_figure(figure, path)


def print_answers(answers: list[dict[str, str]], console: Console) -> None:
    """Each question with the corpus' answer, the base model's and the adapter's."""
    console.print("\nAnswers, greedy; every adapter was loaded back from its directory", style="bold")
    for entry in answers:
        console.print(Text(f"{entry['topic']}, {entry['kind']}: {entry['question']}", style="cyan"))
        for label, key in (("corpus", "corpus"), ("base", "base"), (entry["method"], "adapter")):
            console.print(Text(f"  {label:<7} {entry[key]}"))


def print_table(rows: list[dict[str, Any]], options: Options, console: Console) -> None:
    """The one table, under the lines that say what its columns mean."""
    tokens = rows[0]["batch_tokens"]
    console.print(
        "\nloss: mean over the answer tokens of held-out rows, before and after training. step: time of forward, "
        "backward and AdamW as a multiple of the frozen pass (forward and backward to the embeddings, no adapter) and "
        f"of PEFT's step, medians of {options.rounds} interleaved rounds on {tokens} tokens ({options.device}). saved: "
        "what autograd keeps for the backward, whole model. differs: largest difference of our logits from those of "
        "PEFT, which loads our directory, relative to the largest logit.",
        highlight=False,
    )
    table = Table()
    for heading in ("method", "topic"):
        table.add_column(heading, no_wrap=True)
    for heading in (
        "trainable",
        "loss\nbefore",
        "loss\nafter",
        "step x\nfrozen",
        "PEFT x\nfrozen",
        "ours x\nPEFT",
        "saved\nMB",
        "PEFT\nMB",
        "saved x\nPEFT",
        "differs\nfrom PEFT",
    ):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            row["method"],
            row["topic"],
            f"{row['trainable']:,}",
            f"{row['loss_before']:.2f}",
            f"{row['loss_after']:.2f}",
            f"{row['x_frozen']:.2f}",
            f"{row['peft_x_frozen']:.2f}",
            f"{row['x_peft']:.2f}",
            f"{row['saved_bytes'] / 1e6:.1f}",
            f"{row['peft_saved_bytes'] / 1e6:.1f}",
            f"{row['saved_bytes'] / row['peft_saved_bytes']:.2f}",
            f"{row['difference_from_peft']:.1e}",
        )
    console.print(table)
