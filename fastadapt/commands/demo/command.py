"""`fastadapt demo`: adapters of several methods, each trained on a topic of its own, measured beside PEFT."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import Progress, TextColumn

from ...methods import PEFT_TYPES, Control, EVAConfig
from ...model.checkpoint import export_lora, load_adapter
from ...model.inject import control, inject, set_adapter, trainable_parameters
from ...model.peft_files import read_fields
from ...model.saving import save_adapter
from ...progress import progress_bars, working
from ...training.recipes import Recipe, recipes
from ..batches import Row, collate, length
from ..quiet import quiet_transformers
from ..report import write_json
from . import compare as compare
from . import training as training
from .assets import Topic, load_model, load_topic
from .serving import Request, serve_together
from .show import draw_curves, print_served, print_table, print_trained

ANSWER_TOKENS = 20
# What LoRA-drop's probe and EVA see of a topic before the first step: batches like those of training, and fewer.
OBSERVED_BATCHES = 6


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


PLANS = (Plan("lora", "trivia"), Plan("dora", "emotion"), Plan("vera", "psychology"))
# With --all. What differs from LoRA in training alone learns the same as it does.
MORE_PLANS = (
    Plan("rslora", "ai"),
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
    """What the command line sets.

    model: directory or hub name, None for SmolLM2-135M; json: file to write, or None; all: every method.
    """

    output: Path = Path("fastadapt-demo")
    json: Path | None = None
    model: str | None = None
    all: bool = False
    steps: int = 10
    seed: int = 0
    rounds: int = 3
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
    with working("looking for the model", console) as say:
        base, tokenizer = load_model(options.model, say)
        base.to(options.device)
    parameters = sum(parameter.numel() for parameter in base.parameters())
    console.print(
        f"base model: {options.model or 'SmolLM2-135M-Instruct'}, {parameters:,} parameters, frozen, fp32\n",
        highlight=False,
    )
    clock = Clock()
    trained: list[Trained] = []
    answers: list[dict[str, str]] = []
    with progress_bars(TextColumn("{task.fields[note]}")) as progress, quiet_transformers():
        # All adapters in one model, loaded back from their directories: what answers is what was saved.
        asked = training.skeleton(base)
        for plan in PLANS + MORE_PLANS * options.all:
            with clock("training"):
                trained.append(train_one(plan, base, tokenizer, options, progress))
            with clock("answers"):
                first = plan.topic not in {entry["topic"] for entry in answers}
                found = answer(asked, tokenizer, trained[-1]) if first else []
            answers += found
            adapter = trained[-1]
            print_trained(plan.method, plan.topic, adapter.trainable, adapter.curve, options.steps, found, console)
        with clock("beside PEFT"):
            rows = measure(base, tokenizer, trained, options, progress)
        print_table(rows, options.rounds, options.device, console)
        with clock("serving"):
            served = serve(base, tokenizer, trained, progress)
        print_served(served, console)

    json_file = options.json or options.output / "demo.json"
    picture = json_file.with_suffix(".png")
    draw_curves(((f"{one.plan.method} on {one.plan.topic}", one.curve) for one in trained), picture)
    settings = {name: getattr(options, name) for name in ("all", "steps", "seed", "rounds", "device")}
    write_json(
        json_file,
        "demo",
        rows,
        **clock.found(),
        settings=settings,
        answers=answers,
        served=served,
        curves={one.plan.method: {"train": one.curve.train, "heldout": one.curve.heldout} for one in trained},
    )
    for what, where in (("adapters", f"{options.output}/<method>, readable by PEFT"), ("rows", json_file)):
        console.print(f"{what:<9} {where}", highlight=False, soft_wrap=True)
    console.print(f"curves    {picture}", highlight=False, soft_wrap=True)
    console.print(f"{clock.found()['seconds']:.0f} s since the model was loaded: {clock}", highlight=False)
    return rows


class Clock:
    """Seconds by part, on the wall and of processor time."""

    def __init__(self) -> None:
        self.parts: dict[str, float] = {}
        self.wall, self.cpu = time.perf_counter(), time.process_time()

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.parts[part] = self.parts.get(part, 0.0) + time.perf_counter() - started

    def __str__(self) -> str:
        return ", ".join(f"{part} {seconds:.0f}" for part, seconds in self.parts.items())

    def found(self) -> dict[str, Any]:
        return {
            "seconds": round(time.perf_counter() - self.wall, 1),
            "cpu_seconds": round(time.process_time() - self.cpu, 1),
            "parts": {part: round(seconds, 1) for part, seconds in self.parts.items()},
        }


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
    observed = [
        collate(batch, padding, model.device) for batch in training.seeded_batches(rows, OBSERVED_BATCHES, options.seed)
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


def answer(asked: Any, tokenizer: Any, adapter: Trained) -> list[dict[str, str]]:
    """Two questions of the adapter's topic, one held out and one from training, before and after.

    `asked` gets the adapter beside those that it has, loaded back from its directory, and switches.
    """
    load_adapter(asked, adapter.directory, adapter.plan.name)
    answers = []
    for kind, pair in (("held out", adapter.topic.heldout[0]), ("trained on", adapter.topic.train[0])):
        entry = {"topic": adapter.topic.name, "kind": kind, "question": pair.question, "corpus": pair.answer}
        for key, name in (("base", None), ("adapter", adapter.plan.name)):
            set_adapter(asked, name)
            entry[key] = training.answer(asked, tokenizer, pair.question, ANSWER_TOKENS)
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
