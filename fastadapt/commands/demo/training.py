"""The demo's training loop: chat prompts, loss on the answers alone, held-out rows apart."""

from __future__ import annotations

import contextlib
import copy
import random
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from ...methods import Control
from ..batches import Batch, Row, collate, joined, length, shuffled_batches
from ..train.loop import evaluate
from .assets import Pair

BATCH_ROWS = 6
MAX_TOKENS = 64


def prompt_text(tokenizer: Any, question: str) -> str:
    text: str = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
    )
    return text


def encode(tokenizer: Any, pairs: list[Pair]) -> list[Row]:
    """Rows of at most MAX_TOKENS tokens; longer ones are left out, since cut answers would teach to stop anywhere."""
    rows = [
        joined(
            [
                (tokenizer(prompt_text(tokenizer, pair.question), add_special_tokens=False)["input_ids"], False),
                (tokenizer(pair.answer + tokenizer.eos_token, add_special_tokens=False)["input_ids"], True),
            ]
        )
        for pair in pairs
    ]
    return [row for row in rows if length(row) <= MAX_TOKENS]


def skeleton(model: nn.Module) -> Any:
    """A copy of `model` that shares its weights: fresh modules to inject into, at no cost in memory."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


def seeded_batches(rows: list[Row], steps: int, seed: int, size: int = BATCH_ROWS) -> Iterator[list[Row]]:
    """`steps` batches of `size` rows in a shuffled order, epoch after epoch."""
    generator = random.Random(seed)
    batches: list[list[int]] = []
    for _ in range(steps):
        if not batches:
            batches = shuffled_batches([length(row) for row in rows], size, generator)
        yield [rows[index] for index in batches.pop()]


def heldout_loss(model: Any, rows: list[Row], padding: int) -> float:
    """Mean cross-entropy in nats over all answer tokens of `rows`."""
    return evaluate(model, rows, BATCH_ROWS, padding).loss


class Curve(NamedTuple):
    """Losses over a run, in nats a token: `train` one a step, `heldout` as (step, loss)."""

    train: list[float]
    heldout: list[tuple[int, float]]


def losses_of_steps(
    model: Any,
    batches: Iterable[Batch],
    steps: int,
    optimizer: torch.optim.Optimizer,
    between: Control,
    *,
    schedule: Callable[[float], float],
) -> Iterator[float]:
    """Takes an optimizer step on each of `steps` batches, and what the method does between them; yields each loss.

    The rate rises over a tenth of the steps; when a share of the others is done, `schedule(share)` of it is left.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    warm = max(1, steps // 10)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: (step + 1) / warm if step < warm else schedule((step - warm) / max(1, steps - warm)),
    )
    for batch in batches:
        model.train()
        loss = model(**batch).loss
        (loss + between.regularizer()).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        between.step()
        scheduler.step()
        optimizer.zero_grad(set_to_none=True)
        yield loss.item()


def train(
    model: Any,
    rows: list[Row],
    heldout: list[Row],
    *,
    padding: int,
    steps: int,
    optimizer: torch.optim.Optimizer,
    between: Control,
    seed: int,
    report: Callable[[int, float], None],
) -> Curve:
    """`steps` steps of the optimizer, with a descent to a tenth of the rate.

    The held-out rows are measured before the first step and after the last.
    """
    curve = Curve([], [(0, heldout_loss(model, heldout, padding))])
    batches = (collate(batch, padding, model.device) for batch in seeded_batches(rows, steps, seed))
    losses = losses_of_steps(model, batches, steps, optimizer, between, schedule=lambda done: 1.0 - 0.9 * done)
    for step, loss in enumerate(losses, start=1):
        curve.train.append(loss)
        report(step, loss)
    curve.heldout.append((steps, heldout_loss(model, heldout, padding)))
    model.eval()
    return curve


@torch.no_grad()
def answer(model: Any, tokenizer: Any, question: str, new_tokens: int) -> str:
    """The model's greedy answer in one line."""
    encoded = tokenizer(prompt_text(tokenizer, question), add_special_tokens=False, return_tensors="pt")
    ids = encoded["input_ids"].to(model.device)
    with contextlib.redirect_stderr(None):
        output = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=tokenizer.eos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    text: str = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
    return " ".join(text.split())
