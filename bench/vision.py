"""Every method on images: a small ViT that knows the digits 0 to 4 learns 5 to 9 from a few images of each.

The protocol is that of the papers on few-shot VTAB: 1, 2, 4, 8 and 16 images of each class, equal steps for all, a
fresh head that is trained with the adapter. A seed draws the images, the head and the adapter, and their order. Each
method's learning rate is the one of its `rates` that does best on validation images, with a seed that is used for
nothing else and at one number of shots. The accuracy is on test images that no choice has seen.

Steps are timed as multiples of the frozen pass (forward, and backward to the pixels), inference as multiples of the
base model: with the adapter beside its weights, and in them. A method that merges must come back to 1.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from torch import Tensor, nn

from bench import measure, page, report
from bench.cases import chosen
from bench.digits import (
    CLASSES,
    HELD_OUT,
    Digits,
    Images,
    accuracy,
    batches,
    draw_shots,
    fresh_head,
    load_base,
    load_digits,
    new_vit,
)
from bench.plots import Document, draw_vision, read
from bench.vision_search import search
from fastadapt.commands.batches import Batch
from fastadapt.commands.demo.training import losses_of_steps, skeleton
from fastadapt.commands.report import write_json
from fastadapt.commands.train.options import SCHEDULES
from fastadapt.methods import (
    AdapterConfig,
    AdaptFormerConfig,
    Control,
    GLoRAConfig,
    HiRAConfig,
    NOAHConfig,
    RepAdapterConfig,
    SSFConfig,
    VPTConfig,
)
from fastadapt.model.adapted import adapter_configs
from fastadapt.model.inject import control, inject, merge, trainable_parameters, unload
from fastadapt.progress import progress_bar
from fastadapt.training.recipes import RECIPES, adamw, nothing

SHOTS = (1, 2, 4, 8, 16)
CHOICE_SHOTS, CHOICE_SEED = 8, 1000
BATCH_ROWS = 16
TIMED_IMAGES = 64
VIT_B_ROUNDS = 3
HEAD = "classifier"

# Puts a method into a model with a fresh head, for a run of so many steps.
Adapt = Callable[[Any, int], object]


@dataclass(frozen=True)
class Method:
    """One row: how the method gets into the model, the rates to choose from (the first without tuning), its training.

    optimizer, prepare: as in fastadapt.recipes.Recipe.
    """

    title: str
    adapt: Adapt
    rates: tuple[float, ...]
    optimizer: Callable[[nn.Module, float, float], torch.optim.Optimizer] = adamw
    prepare: Callable[[nn.Module, Iterable[Batch], str], None] = nothing


def adapter(
    config: Callable[..., AdapterConfig], targets: list[str] | str | None = "all-linear", **fields: Any
) -> Adapt:
    """`config(**fields)` on the modules that `targets` names, None for the method's own, and the head in a copy."""
    return lambda model, steps: inject(model, config(target_modules=targets, modules_to_save=[HEAD], **fields))


def recipe(name: str, rates: tuple[float, ...], rank: int = 8, targets: list[str] | str = "all-linear") -> Method:
    """A method of RECIPES with α = 2r and no dropout."""
    found = RECIPES[name]

    def adapt(model: Any, steps: int) -> object:
        return adapter(partial(found.config, rank, 2 * rank, 0.0, steps), targets)(model, steps)

    return Method(found.title, adapt, rates, found.optimizer, found.prepare)


def head_alone(model: Any, steps: int) -> None:
    """The floor: the features as they are."""
    model.requires_grad_(False)
    model.get_submodule(HEAD).requires_grad_(True)


def everything(model: Any, steps: int) -> None:
    """All weights: what the adapters are to come near to."""
    model.requires_grad_(True)


def noah(model: Any, steps: int) -> object:
    """NOAH's modules in one size everywhere; the sizes that its search finds are in vision_search."""
    sizes = [5] * len(model.vit.layers)
    config = NOAHConfig(prompts=sizes, lora=sizes, adapter=sizes, modules_to_save=[HEAD], patch_size=2)
    return inject(model, config)


METHODS: dict[str, Method] = {
    "probe": Method("linear probe", head_alone, (3e-2, 1e-2, 1e-1)),
    "full": Method("full fine-tuning", everything, (1e-3, 3e-4, 3e-3)),
    "lora": recipe("lora", (3e-3, 1e-3, 1e-2)),
    "lora+": recipe("lora+", (1e-2, 3e-3, 3e-2)),
    "lora-fa": recipe("lora-fa", (3e-3, 1e-3, 1e-2)),
    "adalora": recipe("adalora", (1e-2, 3e-3, 3e-2)),
    "eva": recipe("eva", (3e-3, 1e-3, 1e-2)),
    "dora": recipe("dora", (3e-3, 1e-3, 1e-2)),
    "vera": recipe("vera", (3e-2, 1e-2, 1e-1), rank=256),
    "hira": Method("HiRA", adapter(HiRAConfig, r=8), (1e-2, 3e-3, 3e-2)),
    "glora": Method("GLoRA", adapter(GLoRAConfig, r=4, config_D_E="vector"), (1e-2, 3e-3, 3e-2)),
    "ssf": Method("SSF", adapter(SSFConfig, None), (1e-2, 3e-3, 3e-2)),
    "repadapter": Method("RepAdapter", adapter(RepAdapterConfig, None), (1e-2, 3e-3, 3e-2)),
    "adaptformer": Method("AdaptFormer", adapter(AdaptFormerConfig, None, r=16), (1e-2, 3e-3, 3e-2)),
    "vpt-shallow": Method(
        "VPT-shallow", adapter(VPTConfig, None, num_virtual_tokens=10, patch_size=2), (3e-2, 1e-2, 1e-1)
    ),
    "vpt-deep": Method(
        "VPT-deep", adapter(VPTConfig, None, num_virtual_tokens=10, patch_size=2, deep=True), (3e-2, 1e-2, 1e-1)
    ),
    "noah": Method("NOAH, size 5", noah, (3e-3, 1e-3, 1e-2)),
}


class Plan(NamedTuple):
    """What is run: numbers of images of each class, runs of each, steps of a run, whether rates are chosen."""

    shots: tuple[int, ...] = SHOTS
    seeds: int = 3
    steps: int = 80
    tune: bool = True

    @property
    def choice_shots(self) -> int:
        """The number of shots that rates are chosen at."""
        return max((shots for shots in self.shots if shots <= CHOICE_SHOTS), default=min(self.shots))

    def runs(self, methods: Sequence[Method]) -> int:
        tried = sum(len(method.rates) for method in methods) if self.tune else 0
        return tried + len(methods) * len(self.shots) * self.seeds


def adapted(base: Any, method: Method, images: Images, steps: int, seed: int) -> Any:
    """The method in a copy of the base, ready for its first step. The head is the same for every method of a seed."""
    torch.manual_seed(seed)
    model = copy.deepcopy(base)
    fresh_head(model)
    method.adapt(model, steps)
    method.prepare(model, list(batches(images, 16, seed, BATCH_ROWS)), "default")
    return model


def between(model: Any) -> Control:
    """What the method does between steps; nothing where there is no adapter."""
    return control(model) if adapter_configs(model) else Control()


def trained(base: Any, method: Method, images: Images, rate: float, steps: int, seed: int) -> Any:
    """The method after AdamW with a tenth of the steps to warm up and a cosine's descent to zero."""
    model = adapted(base, method, images, steps, seed)
    optimizer = method.optimizer(model, rate, 0.0)
    chosen = batches(images, steps, seed, BATCH_ROWS)
    for _ in losses_of_steps(model, chosen, steps, optimizer, between(model), schedule=SCHEDULES["cosine"]):
        pass
    return model


def adapter_parameters(model: Any) -> int:
    """How many parameters are trained beside the head's, which is the same for every method."""
    head: int = CLASSES * (model.config.hidden_size + 1)
    return trainable_parameters(model).trainable - head


def merged(model: Any) -> Any | None:
    """A copy of the model with the adapter in its weights and nothing of it beside them; None where it cannot merge."""
    plain = copy.deepcopy(model)
    if adapter_configs(plain):
        try:
            merge(plain)
        except ValueError:
            return None
    return unload(plain)


@torch.no_grad()
def largest_difference(first: Any, second: Any, images: Images) -> float:
    """max |a − b| / max |b| of two models' logits."""
    a, b = (model.eval()(pixel_values=images.pixels).logits for model in (first, second))
    return float((a - b).abs().max() / b.abs().max())


def few_shot(base: Any, digits: Digits, names: Sequence[str], plan: Plan) -> tuple[list[report.Row], dict[str, Any]]:
    """(a row of accuracies for each method, its model of the last seed with the most images)."""
    rows: list[report.Row] = []
    models: dict[str, Any] = {}
    with progress_bar("", plan.runs([METHODS[name] for name in names])) as update:
        for name in names:
            method = METHODS[name]

            def run(shots: int, rate: float, seed: int, method: Method = method) -> Any:
                update(description=f"{method.title}, {shots} shots, rate {rate:g}, seed {seed}")
                images = draw_shots(digits.pool, shots, seed)
                model = trained(base, method, images, rate, plan.steps, seed)
                update(advance=1)
                return model

            tried: dict[float, float] = {}
            for rate in method.rates if plan.tune else ():
                tried[rate] = accuracy(run(plan.choice_shots, rate, CHOICE_SEED), digits.validation)
            rate = max(tried, key=lambda rate: tried[rate]) if tried else method.rates[0]
            scores: dict[int, list[float]] = {}
            for shots in plan.shots:
                scores[shots] = []
                for seed in range(plan.seeds):
                    models[name] = run(shots, rate, seed)
                    scores[shots].append(accuracy(models[name], digits.test))
            seeds = [statistics.mean(of_seed) for of_seed in zip(*scores.values(), strict=True)]
            rows.append(
                {
                    "case": name,
                    "method": method.title,
                    **spread(seeds),
                    "few_shot": [{"shots": shots, **spread(found)} for shots, found in scores.items()],
                    "trainable": adapter_parameters(models[name]),
                    "learning_rate": rate,
                    "tried": {f"{rate:g}": score for rate, score in tried.items()},
                    "steps": plan.steps,
                    "seeds": plan.seeds,
                }
            )
    return rows, models


def spread(scores: list[float]) -> dict[str, Any]:
    """Mean, lowest and highest accuracy of the seeds, and all of them."""
    return {
        "accuracy": statistics.mean(scores),
        "accuracy_low": min(scores),
        "accuracy_high": max(scores),
        "accuracies": scores,
    }


def inference(model: Any, pixels: Tensor) -> Callable[[], None]:
    """A forward pass without gradients."""
    model.eval()

    @torch.no_grad()
    def forward() -> None:
        model(pixel_values=pixels)

    return forward


def training_step(
    model: Any, batch: Batch, optimizer: torch.optim.Optimizer | None = None, between: Control | None = None
) -> Callable[[], None]:
    """One step; without an optimizer the frozen pass: forward, and backward to the pixels."""
    between = between or Control()
    pixels = batch["pixel_values"].clone().requires_grad_(optimizer is None)

    def step() -> None:
        (model(pixel_values=pixels, labels=batch["labels"]).loss + between.regularizer()).backward()
        if optimizer is not None:
            optimizer.step()
            between.step()
            optimizer.zero_grad(set_to_none=True)
        pixels.grad = None

    return step


def ratio(rounds: list[dict[str, measure.Timing]], name: str, baselines: Sequence[str], key: str) -> report.Row:
    """The median ratio to the baselines under `key`, with its interval, and that of processor time."""
    wall, cpu = measure.compare(rounds, name, baselines)
    return {key: wall.median, f"{key}_low": wall.low, f"{key}_high": wall.high, f"cpu_{key}": cpu.median}


def costs(base: Any, digits: Digits, rows: list[report.Row], models: dict[str, Any], plan: Plan, rounds: int) -> None:
    """Adds to each row what a step and an inference cost, and whether merging changes the logits."""
    frozen = ("frozen", "frozen, second")
    images = draw_shots(digits.pool, max(plan.shots), 0)
    batch = next(batches(images, 1, 0, BATCH_ROWS))
    steps = {name: training_step(copy.deepcopy(base).train(), batch) for name in frozen}
    for name in models:
        # As trained from the first step on. A rate of zero leaves the adapter as it is, and costs the same.
        model = adapted(base, METHODS[name], images, plan.steps, 0).train()
        steps[name] = training_step(model, batch, METHODS[name].optimizer(model, 0.0, 0.0), between(model))
    timings = measure.interleave(steps, rounds)
    for row in rows:
        row |= ratio(timings, row["case"], frozen, "x_frozen")

    plain = ("base", "base, second")
    pixels = digits.test.pixels[:TIMED_IMAGES]
    passes = {name: inference(copy.deepcopy(base), pixels) for name in plain}
    for row in rows:
        model = models[row["case"]]
        passes[row["case"]] = inference(model, pixels)
        alone = merged(model)
        row["merges"] = alone is not None
        if alone is not None:
            row["merge_difference"] = largest_difference(alone, model, digits.test)
            passes[f"{row['case']}, merged"] = inference(alone, pixels)
    timings = measure.interleave(passes, rounds)
    for row in rows:
        row |= ratio(timings, row["case"], plain, "x_base")
        if row["merges"]:
            row |= ratio(timings, f"{row['case']}, merged", plain, "merged_x_base")


def count_vit_b(rows: list[report.Row], steps: int) -> None:
    """Adds to each row the trained parameters at ViT-B's dimensions, without memory for one."""
    with torch.device("meta"):
        for row in rows:
            model = new_vit()
            METHODS[row["case"]].adapt(model, steps)
            row["vit_b_trainable"] = adapter_parameters(model)


def time_vit_b(rows: list[report.Row], steps: int) -> None:
    """Adds to each adapter's row the inference of one image at ViT-B's dimensions; one at a time, to spare memory."""
    plain = ("base", "base, second")
    base = new_vit().requires_grad_(False)
    pixels = torch.randn(1, 3, 224, 224)
    for row in rows:
        model = skeleton(base)
        METHODS[row["case"]].adapt(model, steps)
        if not adapter_configs(model):
            continue
        passes = {name: inference(skeleton(base), pixels) for name in plain} | {"adapted": inference(model, pixels)}
        alone = merged(model) if row["merges"] else None
        if alone is not None:
            passes["merged"] = inference(alone, pixels)
        timings = measure.interleave(passes, VIT_B_ROUNDS)
        row |= ratio(timings, "adapted", plain, "vit_b_x_base")
        if alone is not None:
            row |= ratio(timings, "merged", plain, "vit_b_merged_x_base")


def counts_of_shots(text: str) -> tuple[int, ...]:
    """The numbers of a comma-separated list. Raises typer.BadParameter for others than a class has images to draw."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and 0 < int(part) <= HELD_OUT for part in parts):
        raise typer.BadParameter(f"must be numbers from 1 to {HELD_OUT} with commas between them, got {text!r}")
    return tuple(map(int, parts))


def print_results(rows: list[report.Row], searched: list[report.Row], plan: Plan) -> None:
    """One table of accuracies, one of costs, one at ViT-B's dimensions, one of the searches."""
    title = f"Digits 5 to 9, {plan.steps} steps of {BATCH_ROWS}, {plan.seeds} seeds"
    shots = {f"at {shots}": f"{shots} shots" for shots in plan.shots}
    flat = [row | {f"at {found['shots']}": found["accuracy"] for found in row["few_shot"]} for row in rows]
    for row in flat:
        if row["merges"]:
            row["merge_difference"] = f"{row['merge_difference']:.0e}"
    spans = {"accuracy": "mean", "accuracy_low": "lowest", "accuracy_high": "highest", "learning_rate": "rate"}
    report.print_table(f"{title}: accuracy", flat, {"method": "method", **shots, **spans})
    costs = {"x_base": "inference x base", "merged_x_base": "merged x base"}
    merges = {"merges": "merges", "merge_difference": "logits differ"}
    columns = {"method": "method", "trainable": "parameters", "x_frozen": "step x frozen", **costs, **merges}
    report.print_table("Costs beside the frozen pass and the base model", flat, columns)
    large = {f"vit_b_{key}": heading for key, heading in {"trainable": "parameters", **costs}.items()}
    report.print_table("ViT-B, one image", flat, {"method": "method", **large})
    if searched:
        spans = {"parameters": "parameters", "validation": "validation", "accuracy": "test", "accuracy_low": "lowest"}
        columns = {"case": "supernet", "subnet": "subnet", **spans, "accuracy_high": "highest"}
        report.print_table(f"Searches, {searched[0]['shots']} shots", searched, columns)


def main(
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the rows there, a PNG beside it.")] = None,
    cases: Annotated[str, typer.Option(help=f"Comma-separated, of {', '.join(METHODS)}; all by default.")] = "",
    shots: Annotated[str, typer.Option(help="Images of each class, comma-separated.")] = ",".join(map(str, SHOTS)),
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each method and number of shots.")] = 3,
    steps: Annotated[int, typer.Option(min=1, help="Training steps of each run.")] = 80,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of the timing.")] = 12,
    tune: Annotated[bool, typer.Option(help="Choose each method's rate on validation images first.")] = True,
    searches: Annotated[bool, typer.Option("--search/--no-search", help="Run GLoRA's and NOAH's searches.")] = True,
    large: Annotated[bool, typer.Option("--vit-b/--no-vit-b", help="Time inference at ViT-B's dimensions.")] = True,
) -> None:
    """Accuracy, parameters, step time, inference and merging of every method on a ViT and few images of digits."""
    names = [name for name in METHODS if METHODS[name] in chosen(METHODS, cases)]
    plan = Plan(counts_of_shots(shots), seeds, steps, tune)
    digits = load_digits()
    base = load_base(digits)
    rows, models = few_shot(base, digits, names, plan)
    costs(base, digits, rows, models, plan, rounds)
    count_vit_b(rows, steps)
    if large:
        time_vit_b(rows, steps)
    searched = search(base, digits, max(plan.shots), steps, seeds) if searches else []
    print_results(rows, searched, plan)
    if json_file is not None:
        learned = accuracy(base, digits.base_test)
        write_json(json_file, "vision", rows, base_accuracy=learned, searched=searched)
        draw_vision(read(json_file), json_file.with_suffix(".png"))


@page.section("vision", "Images")
def section(document: Document) -> str:
    first = document["rows"][0]
    shots = [point["shots"] for point in first["few_shot"]]
    shown = [0, len(shots) // 2, len(shots) - 1]
    few, vit_b = [], []
    for row in document["rows"]:
        points = [page.span(row["few_shot"][index], *_ACCURACY, 3) for index in shown]
        # What trains the model's own weights has nothing to merge.
        merges = row["case"] not in ("probe", "full")
        costs = [row["x_frozen"], row["x_base"], row.get("merged_x_base") if merges else None]
        few.append(f"{row['method']} | {row['trainable']:,} | {' | '.join(points)} | {_numbers(costs)}")
        if row.get("vit_b_x_base") is not None:
            costs = [row["vit_b_x_base"], row.get("vit_b_merged_x_base")]
            vit_b.append(f"{row['method']} | {row['vit_b_trainable']:,} | {_numbers(costs)}")
    differences = [row["merge_difference"] for row in document["rows"] if row.get("merge_difference") is not None]
    found = [
        f"{_SPACES[row['case']]} | {row['subnet']} | {row['parameters']:,} | {row['validation']:.3f} | "
        f"{page.span(row, *_ACCURACY, 3)}"
        for row in document["searched"]
    ]
    heads = " | ".join(f"{shots[index]} a class" for index in shown)
    return "\n\n".join(
        [
            f"A small ViT trained on the digits 0 to 4 (test accuracy {document['base_accuracy']:.3f}) learns 5 to 9 "
            f"from a few images of each; {first['steps']} steps for every method, each at the best of three rates by "
            f"validation; accuracy on test images, mean of {first['seeds']} seeds (worst–best); step as a multiple of "
            "the frozen pass, inference of the base model, beside its weights and merged into them.",
            page.table(f"| trained | {heads} | step | inference | merged", few),
            f"At ViT-B's dimensions, one image. Merging changes no logit by more than {max(differences):.0e}.",
            page.table("| trained | inference | merged", vit_b),
            f"The searches, {document['searched'][0]['shots']} images a class, published population and generations, "
            "fitness on validation images, a limit that the middle uniform subnet just keeps; GLoRA's subnets run with "
            "the supernet's weights, NOAH's are trained again:",
            page.table("supernet | subnet | parameters | validation | test", found),
        ]
    )


_SPACES = {"glora": "GLoRA", "noah": "NOAH"}
_ACCURACY = ("accuracy", "accuracy_low", "accuracy_high")


def _numbers(values: list[float | None]) -> str:
    return " | ".join(map(page.number, values))
