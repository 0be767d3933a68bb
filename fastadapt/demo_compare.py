"""The demo's measurements beside PEFT: step time, saved activations and outputs, from one saved directory."""

from __future__ import annotations

import itertools
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from .checkpoint import load_adapter
from .demo_assets import quiet_transformers
from .demo_training import skeleton
from .train_data import Batch


def ours(base: nn.Module, directory: Path) -> Any:
    """The saved adapter on a skeleton of `base`, through fastadapt, trainable."""
    return load_adapter(skeleton(base), directory, trainable=True)


def peft(base: nn.Module, directory: Path) -> Any:
    """The saved adapter on a skeleton of `base`, through PEFT, trainable."""
    from peft import PeftModel

    with quiet_transformers():
        return PeftModel.from_pretrained(skeleton(base), str(directory), is_trainable=True)


@torch.no_grad()
def largest_difference(first: Any, second: Any, batch: Batch) -> float:
    """max |a − b| / max |b| of two models' logits at the tokens that are not padding."""
    real = batch["attention_mask"].bool()
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    a, b = (model.eval()(**inputs).logits[real] for model in (first, second))
    return float((a - b).abs().max() / b.abs().max())


def saved_bytes(model: Any, batch: Batch) -> int:
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


def training_step(model: Any, batch: Batch) -> Callable[[], None]:
    """Forward, backward and AdamW on what requires grad.

    A model where nothing does is the frozen pass: forward, and backward to the embeddings.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # A rate of zero leaves the adapters as they were saved, and costs the same.
    optimizer = torch.optim.AdamW(parameters, lr=0.0, weight_decay=0.0, fused=True) if parameters else None
    embed = model.get_input_embeddings()

    def step() -> None:
        embedded = embed(batch["input_ids"]).detach().requires_grad_()
        inputs = {name: batch[name] for name in ("attention_mask", "labels")}
        model(inputs_embeds=embedded, **inputs).loss.backward()
        if optimizer is not None:
            optimizer.step()
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


def compare(
    base: nn.Module,
    directories: dict[str, Path],
    batch: Batch,
    *,
    rounds: int,
    seed: int,
    progress: Callable[[int, int], None],
) -> dict[str, dict[str, float]]:
    """For each saved adapter its step time, saved bytes and outputs beside PEFT's, on one batch of the same weights.

    `progress(done, total)` is called after each step.
    """
    models = {(name, "ours"): ours(base, path) for name, path in directories.items()}
    models |= {(name, "peft"): peft(base, path) for name, path in directories.items()}
    results: dict[str, dict[str, float]] = {}
    for name in directories:
        mine, theirs = models[name, "ours"], models[name, "peft"]
        results[name] = {
            "saved_bytes": saved_bytes(mine, batch),
            "peft_saved_bytes": saved_bytes(theirs, batch),
            "difference_from_peft": largest_difference(mine, theirs, batch),
        }
    steps = {f"{name} {side}": training_step(model.train(), batch) for (name, side), model in models.items()}
    steps["frozen"] = training_step(skeleton(base).train(), batch)
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
