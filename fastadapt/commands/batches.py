"""Rows of tokens and batches of them, in an order that a seed fixes."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

IGNORED = -100


Batch = dict[str, Tensor]


class Row(NamedTuple):
    """Token ids, and a label for each, IGNORED where the loss does not count it; or one class for the whole row."""

    ids: list[int]
    labels: list[int] | int

    @property
    def targets(self) -> int:
        """How many terms of the loss come from this row."""
        return 1 if isinstance(self.labels, int) else sum(label != IGNORED for label in self.labels)


def length(row: Row) -> int:
    return len(row.ids)


def joined(pieces: Sequence[tuple[list[int], bool]]) -> Row:
    """A row of pieces of token ids, each with whether the loss counts it.

    Its first token is not counted, since nothing comes before it to predict it from.
    """
    ids = [token for piece, _ in pieces for token in piece]
    labels = [token if counted else IGNORED for piece, counted in pieces for token in piece]
    return Row(ids, [IGNORED, *labels[1:]])


def collate(rows: Sequence[Row], padding: int, device: torch.device) -> Batch:
    """input_ids and attention_mask [rows, longest row], padded on the right, and labels of that shape, or [rows]."""
    width = max(map(length, rows))
    ids = torch.full((len(rows), width), padding)
    mask = torch.zeros((len(rows), width), dtype=torch.int64)
    labels = torch.full((len(rows), width), IGNORED)
    for i, row in enumerate(rows):
        ids[i, : length(row)] = torch.tensor(row.ids)
        mask[i, : length(row)] = 1
        labels[i, : length(row)] = torch.tensor(row.labels)
    if rows and isinstance(rows[0].labels, int):
        labels = labels[:, 0]
    return {
        name: value.to(device) for name, value in (("input_ids", ids), ("attention_mask", mask), ("labels", labels))
    }


def left_padded(rows: Sequence[Sequence[int]], padding: int, device: torch.device | str) -> Batch:
    """input_ids and attention_mask [rows, longest row], padded on the left: generation goes on at the right."""
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), padding)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, width - len(row) :] = torch.tensor(row)
        mask[i, width - len(row) :] = 1
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


def shuffled_batches(lengths: Sequence[int], size: int, generator: random.Random) -> list[list[int]]:
    """Every row's index once, in batches of `size` in a random order.

    Rows of like length go together, within pools of a few batches: padding would cost a fifth of the time.
    """
    shuffled = generator.sample(range(len(lengths)), len(lengths))
    pools = [shuffled[start : start + 4 * size] for start in range(0, len(shuffled), 4 * size)]
    ordered = [index for pool in pools for index in sorted(pool, key=lengths.__getitem__)]
    batches = [ordered[start : start + size] for start in range(0, len(ordered), size)]
    generator.shuffle(batches)
    return batches


def epoch_batches(lengths: Sequence[int], size: int, seed: int, epoch: int) -> list[list[int]]:
    """The batches of one epoch: they depend on these arguments alone, so that a resumed run finds its place."""
    return shuffled_batches(lengths, size, random.Random(f"{seed} epoch {epoch}"))
