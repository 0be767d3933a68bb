"""The demo's measurements beside PEFT: step time, saved activations and outputs, from one saved directory."""

from __future__ import annotations

import itertools
import random
import statistics
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from ...methods import Control
from ...model.checkpoint import load_adapter
from ..batches import Batch
from ..quiet import quiet_transformers
from .training import skeleton


def ours(base: nn.Module, directory: Path) -> Any:
    """The saved adapter on a skeleton of `base`, through fastadapt, trainable."""
    return load_adapter(skeleton(base), directory, trainable=True)


def peft(base: nn.Module, directory: Path) -> Any:
    """The saved adapter on a skeleton of `base`, through PEFT, trainable."""
    from peft import PeftModel

    with quiet_transformers(), warnings.catch_warnings():
        # PEFT takes the names in its own AdaLoRA files for names that match nothing.
        warnings.filterwarnings("ignore", "The following rank_pattern keys", RuntimeWarning)
        return PeftModel.from_pretrained(skeleton(base), str(directory), is_trainable=True)


@torch.no_grad()
def largest_difference(first: Any, second: Any, batch: Batch) -> float:
    """max |a − b| / max |b| of two models' logits at the tokens that are not padding."""
    real = batch["attention_mask"].bool()
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    a, b = (model.eval()(**inputs).logits[real] for model in (first, second))
    return float((a - b).abs().max() / b.abs().max())


def saved_bytes(model: Any, batch: Mapping[str, Any]) -> int:
    """Bytes that autograd holds between a training forward of `model` on `batch` and its backward.

    Storages count once, whatever views of them are saved. The model's own parameters and buffers do not count: they are
    there anyway.
    """
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    # Weak references, so that what the forward itself drops again is not counted.
    saved: dict[StorageWeakRef, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[StorageWeakRef(storage)] = storage.nbytes()
        return tensor

    model.train()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(**batch).loss
    held = sum(size for storage, size in saved.items() if not storage.expired())
    del loss
    return held


def training_step(
    model: Any, batch: Batch, optimizer: torch.optim.Optimizer | None = None, between: Control | None = None
) -> Callable[[], None]:
    """Forward, backward, the optimizer (AdamW on what requires grad by default) and what the method does between steps.

    A model where nothing requires grad is the frozen pass: forward, and backward to the embeddings.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if optimizer is None and parameters:
        # A rate of zero leaves the adapters as they were saved, and costs the same.
        optimizer = torch.optim.AdamW(parameters, lr=0.0, weight_decay=0.0, fused=True)
    between = between or Control()
    embed = model.get_input_embeddings()

    def step() -> None:
        embedded = embed(batch["input_ids"]).detach().requires_grad_()
        inputs = {name: batch[name] for name in ("attention_mask", "labels")}
        (model(inputs_embeds=embedded, **inputs).loss + between.regularizer()).backward()
        if optimizer is not None:
            optimizer.step()
            between.step()
            optimizer.zero_grad(set_to_none=True)
        if embedded.device.type == "cuda":
            torch.cuda.synchronize()

    return step


def step_ratios(
    steps: dict[str, Callable[[], None]],
    pairs: list[tuple[str, str]],
    rounds: int,
    seed: int,
    advance: Callable[[], None],
) -> dict[tuple[str, str], float]:
    """For each pair, the median over the rounds of the first step's time as a multiple of the second's.

    Every round runs every step once in a new order, and a ratio is taken within its round: the machine's drift, larger
    than the differences that are looked for, is common to both. An uncounted round warms up.
    """
    shuffler = random.Random(seed)
    samples: dict[tuple[str, str], list[float]] = {pair: [] for pair in pairs}
    for round_number in range(rounds + 1):
        seconds = {}
        for name in shuffler.sample(list(steps), len(steps)):
            start = time.perf_counter()
            steps[name]()
            seconds[name] = time.perf_counter() - start
            advance()
        if round_number:
            for first, second in pairs:
                samples[first, second].append(seconds[first] / seconds[second])
    return {pair: statistics.median(values) for pair, values in samples.items()}


def rounds_of(count: int, rounds: int) -> int:
    """How many steps `step_ratios` runs for `count` variants."""
    return count * (rounds + 1)


class Adapted(NamedTuple):
    """A trained model, how it is trained, and the directory that PEFT reads the same adapter from."""

    model: Any
    optimizer: torch.optim.Optimizer
    between: Control
    directory: Path


def compare(
    base: nn.Module,
    adapted: dict[str, Adapted],
    batch: Batch,
    *,
    rounds: int,
    seed: int,
    progress: Callable[[int, int], None],
) -> dict[str, dict[str, float]]:
    """For each adapter its step time, saved bytes and outputs beside PEFT's, on one batch of the same weights.

    `progress(done, total)` is called after each step.
    """
    directories = {name: one.directory for name, one in adapted.items()}
    results: dict[str, dict[str, float]] = {}
    steps = {"frozen": training_step(skeleton(base).train(), batch)}
    for name, one in adapted.items():
        theirs = peft(base, one.directory)
        results[name] = {
            "saved_bytes": saved_bytes(one.model, batch),
            "peft_saved_bytes": saved_bytes(theirs, batch),
            "difference_from_peft": largest_difference(one.model, theirs, batch),
        }
        steps[f"{name} ours"] = training_step(one.model.train(), batch, one.optimizer, one.between)
        steps[f"{name} peft"] = training_step(theirs.train(), batch)
    pairs = [(f"{name} ours", "frozen") for name in directories]
    for name in directories:
        pairs += [(f"{name} peft", "frozen"), (f"{name} ours", f"{name} peft")]
    counter = itertools.count(1)
    total = rounds_of(len(steps), rounds)
    ratios = step_ratios(steps, pairs, rounds, seed, lambda: progress(next(counter), total))
    for name, result in results.items():
        result["x_frozen"] = ratios[f"{name} ours", "frozen"]
        result["peft_x_frozen"] = ratios[f"{name} peft", "frozen"]
        result["x_peft"] = ratios[f"{name} ours", f"{name} peft"]
    return results
