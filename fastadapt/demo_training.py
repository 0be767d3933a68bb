"""The demo's training loop: chat prompts, loss on the answers alone, held-out rows apart."""

from __future__ import annotations

import contextlib
import copy
import random
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .demo_assets import Pair

BATCH_ROWS = 6
MAX_TOKENS = 64
IGNORED = -100


class Row(NamedTuple):
    """Token ids of a prompt and its answer; the loss counts the answer alone."""

    prompt: list[int]
    answer: list[int]


Batch = dict[str, Tensor]


def length(row: Row) -> int:
    return len(row.prompt) + len(row.answer)


def prompt_text(tokenizer: Any, question: str) -> str:
    text: str = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
    )
    return text


def encode(tokenizer: Any, pairs: list[Pair]) -> list[Row]:
    """Rows of at most MAX_TOKENS tokens; longer ones are left out, since cut answers would teach to stop anywhere."""
    rows = [
        Row(
            tokenizer(prompt_text(tokenizer, pair.question), add_special_tokens=False)["input_ids"],
            tokenizer(pair.answer + tokenizer.eos_token, add_special_tokens=False)["input_ids"],
        )
        for pair in pairs
    ]
    return [row for row in rows if length(row) <= MAX_TOKENS]


def collate(rows: list[Row], padding: int, device: torch.device) -> Batch:
    """input_ids, attention_mask and labels, each [rows, longest row], padded on the right."""
    width = max(map(length, rows))
    ids = torch.full((len(rows), width), padding)
    labels = torch.full((len(rows), width), IGNORED)
    mask = torch.zeros((len(rows), width), dtype=torch.int64)
    for i, (prompt, answer) in enumerate(rows):
        end = len(prompt) + len(answer)
        ids[i, :end] = torch.tensor(prompt + answer)
        labels[i, len(prompt) : end] = torch.tensor(answer)
        mask[i, :end] = 1
    return {
        name: value.to(device) for name, value in (("input_ids", ids), ("attention_mask", mask), ("labels", labels))
    }


def skeleton(model: nn.Module) -> Any:
    """A copy of `model` that shares its weights: fresh modules to inject into, at no cost in memory."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


def seeded_batches(rows: list[Row], steps: int, seed: int) -> Iterator[list[Row]]:
    """`steps` batches of BATCH_ROWS rows in a shuffled order, epoch after epoch.

    Rows of like length go together, within pools of a few batches: padding would cost a fifth of the time.
    """
    generator = random.Random(seed)
    batches: list[list[Row]] = []
    for _ in range(steps):
        if not batches:
            shuffled = generator.sample(rows, len(rows))
            pools = [shuffled[start : start + 4 * BATCH_ROWS] for start in range(0, len(rows), 4 * BATCH_ROWS)]
            ordered = [row for pool in pools for row in sorted(pool, key=length)]
            batches = [ordered[start : start + BATCH_ROWS] for start in range(0, len(rows), BATCH_ROWS)]
            generator.shuffle(batches)
        yield batches.pop()


@torch.no_grad()
def heldout_loss(model: Any, rows: list[Row], padding: int) -> float:
    """Mean cross-entropy in nats over all answer tokens of `rows`."""
    model.eval()
    total, tokens = 0.0, 0
    ordered = sorted(rows, key=length)
    for start in range(0, len(ordered), BATCH_ROWS):
        part = ordered[start : start + BATCH_ROWS]
        counted = sum(len(row.answer) for row in part)
        total += float(model(**collate(part, padding, model.device)).loss) * counted
        tokens += counted
    return total / tokens


class Curve(NamedTuple):
    """Losses over a run, in nats a token: `train` one a step, `heldout` as (step, loss)."""

    train: list[float]
    heldout: list[tuple[int, float]]


def train(
    model: Any,
    rows: list[Row],
    heldout: list[Row],
    *,
    padding: int,
    steps: int,
    learning_rate: float,
    seed: int,
    report: Callable[[int, float], None],
) -> Curve:
    """AdamW on what requires grad, with a tenth of the steps to warm up and a linear descent to a tenth of the rate.

    The held-out rows are measured before the first step, after half of the steps and after the last.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0, fused=True)
    warm = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: (step + 1) / warm if step < warm else 1 - 0.9 * (step - warm) / max(1, steps - warm)
    )
    curve = Curve([], [(0, heldout_loss(model, heldout, padding))])
    for step, batch in enumerate(seeded_batches(rows, steps, seed), start=1):
        model.train()
        loss = model(**collate(batch, padding, model.device)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        curve.train.append(loss.item())
        if step == steps or step == steps // 2:
            curve.heldout.append((step, heldout_loss(model, heldout, padding)))
        report(step, curve.train[-1])
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
