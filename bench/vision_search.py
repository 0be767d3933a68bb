"""The searches on images: subnets of a supernet that evolution finds, beside the uniform ones of the same supernet.

A supernet is trained on a seed's shots, in each step with another choice of its parts; candidates are judged by
validation images with the published population and generations, under a limit that the uniform middle one just keeps.
GLoRA's subnets run with the supernet's weights, and are exported for PEFT and read back; NOAH's are trained again from
the start, as published. All accuracies are on test images that neither training nor search has seen.
"""

from __future__ import annotations

import copy
import statistics
import tempfile
from collections.abc import Callable
from typing import Any

import torch

from bench import report
from bench.digits import Digits, Images, accuracy, batches, draw_shots, fresh_head
from fastadapt import GLoRAConfig, GLoRASpace, NOAHConfig, NOAHSpace, evolve, inject, load_adapter
from fastadapt.commands.demo.training import losses_of_steps
from fastadapt.commands.train.options import SCHEDULES
from fastadapt.model.checkpoint import export_glora
from fastadapt.model.inject import control
from fastadapt.training.recipes import adamw

BATCH_ROWS = 16
# A supernet shares its steps among many subnets.
SUPERNET_TIMES = 4
RANKS = [8, 4, 2]
UNIFORM_GLORA = {
    **{f"LoRA {rank} everywhere": [f"lora:{rank}"] * 3 + ["vector", "vector"] for rank in RANKS},
    "vectors everywhere": ["vector"] * 5,
    "constants everywhere": ["constant", "constant", "none", "constant", "constant"],
}
GLORA_LIMIT = "LoRA 2 everywhere"
DIMS = [1, 5, 10]
NOAH_LIMIT = 5
RATE = 3e-3


def _fresh(base: Any, config: Any, seed: int) -> Any:
    """The config's adapter in a copy of the base with a new head."""
    torch.manual_seed(seed)
    model = copy.deepcopy(base)
    fresh_head(model)
    return inject(model, config)


def _train(model: Any, images: Images, steps: int, seed: int) -> None:
    chosen = batches(images, steps, seed, BATCH_ROWS)
    optimizer = adamw(model, RATE, 0.0)
    for _ in losses_of_steps(model, chosen, steps, optimizer, control(model), schedule=SCHEDULES["cosine"]):
        pass
    model.eval()


def _judge(model: Any, images: Images) -> Callable[[Any], float]:
    return lambda _: accuracy(model, images)


def glora(base: Any, digits: Digits, shots: int, steps: int, seed: int, **search: Any) -> list[report.Row]:
    """One seed: the subnet that evolution finds in GLoRA's supernet, and the uniform ones."""
    images = draw_shots(digits.pool, shots, seed)
    config = GLoRAConfig(supernet=True, ranks=RANKS, target_modules="all-linear", modules_to_save=["classifier"])
    model = _fresh(base, config, seed)
    _train(model, images, SUPERNET_TIMES * steps, seed)
    space = GLoRASpace(model)
    uniform = {name: space.uniform(supports) for name, supports in UNIFORM_GLORA.items()}
    limit = space.parameters(uniform[GLORA_LIMIT])
    found = evolve(space, _judge(model, digits.validation), parameter_limit=(0, limit), seed=seed, **search)
    rows = []
    for name, candidate in {"found by evolution": found.best.candidate, **uniform}.items():
        space.apply(candidate)
        row = {"case": "glora", "subnet": name, "parameters": space.parameters(candidate), "limit": limit}
        row |= {"validation": accuracy(model, digits.validation), "accuracy": accuracy(model, digits.test)}
        rows.append(row)
    space.apply(found.best.candidate)
    with tempfile.TemporaryDirectory() as directory, torch.no_grad():
        export_glora(model, directory)
        again = load_adapter(copy.deepcopy(base), directory).eval()
        pixels = digits.test.pixels
        difference = (again(pixels).logits - model(pixels).logits).abs().max()
    rows[0]["exported_difference"] = float(difference)
    return rows


def noah(base: Any, digits: Digits, shots: int, steps: int, seed: int, **search: Any) -> list[report.Row]:
    """One seed: the sizes that evolution finds in NOAH's supernet, and the uniform ones, all trained from the start."""
    images, blocks = draw_shots(digits.pool, shots, seed), base.config.num_hidden_layers
    depths = sorted({-(-blocks * quarter // 4) for quarter in (1, 2, 3, 4)})
    common: dict[str, Any] = {"modules_to_save": ["classifier"], "patch_size": base.config.patch_size}
    model = _fresh(base, NOAHConfig(supernet=True, dims=DIMS, depths=depths, **common), seed)
    _train(model, images, SUPERNET_TIMES * steps, seed)
    space = NOAHSpace.of(model)
    uniform = {f"{dim} everywhere": space.uniform(dim) for dim in DIMS}
    limit = space.parameters(uniform[f"{NOAH_LIMIT} everywhere"])
    found = evolve(space, _judge(model, digits.validation), parameter_limit=(0, limit), seed=seed, **search)
    rows = []
    for name, sizes in {"found by evolution": found.best.candidate, **uniform}.items():
        alone = _fresh(base, NOAHConfig(**sizes, **common), seed)
        _train(alone, images, steps, seed)
        row = {"case": "noah", "subnet": name, "parameters": space.parameters(sizes), "limit": limit}
        row |= {"validation": accuracy(alone, digits.validation), "accuracy": accuracy(alone, digits.test)}
        rows.append(row)
    return rows


def search(base: Any, digits: Digits, shots: int, steps: int, seeds: int, **settings: Any) -> list[report.Row]:
    """A row for each subnet of both methods: its accuracy over the seeds. `settings` are evolve's."""
    rows = []
    for run in (glora, noah):
        outcomes = [run(base, digits, shots, steps, seed, **settings) for seed in range(seeds)]
        for same in zip(*outcomes, strict=True):
            scores = [row["accuracy"] for row in same]
            rows.append(
                {
                    **same[-1],
                    "shots": shots,
                    "parameters": round(statistics.mean([row["parameters"] for row in same])),
                    "validation": statistics.mean([row["validation"] for row in same]),
                    "accuracy": statistics.mean(scores),
                    "accuracy_low": min(scores),
                    "accuracy_high": max(scores),
                    "accuracies": scores,
                }
            )
    return rows
