"""Rows that are sampled and ended each by its own settings, in one batch of transformers' generate."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, StoppingCriteria

from .prompts import Prompt

# A stop text is looked for in the last tokens: as many as it has bytes, and some that only end or begin one.
_SPARE_TOKENS = 8


class Answers:
    """The rows of a batch on their way: `pick` chooses the next tokens, `ends` tells which rows are done, and why.

    width: tokens of the padded prompts. ends: the tokens that end any row. `ended` has "eos", "stop", "length" or, of a
    row whose logits were not numbers, an error.
    """

    def __init__(self, rows: Sequence[Prompt], width: int, ends: Collection[int]) -> None:
        self.rows, self.width = rows, width
        self.ended: list[str | None] = [None] * len(rows)
        self.errors: dict[int, str] = {}
        own = [row.tokenizer.eos_token_id for row in rows]
        self.last = [{*ends, *(() if token is None else (token,))} for token in own]
        self._generators: dict[int, torch.Generator] = {}

    def pick(self, scores: Tensor) -> Tensor:
        """The scores [rows, tokens] with the chosen token of each sampled row in front."""
        broken = ~scores.isfinite().any(-1) | scores.isnan().any(-1) | (scores == torch.inf).any(-1)
        for index in broken.nonzero().flatten().tolist():
            if self.ended[index] is None:
                self.ended[index] = "error"
                self.errors[index] = (
                    "the model's logits are NaN or infinite with this adapter: its weights are too large, or damaged"
                )
            scores = scores.index_fill(0, torch.tensor(index, device=scores.device), 0.0)
        for index, row in enumerate(self.rows):
            if self.ended[index] is None and row.settings.temperature > 0:
                token = self._sampled(index, scores[index])
                scores[index] = -torch.inf
                scores[index, token] = 0.0
        return scores

    def _sampled(self, index: int, scores: Tensor) -> int:
        settings = self.rows[index].settings
        if index not in self._generators:
            self._generators[index] = torch.Generator().manual_seed(settings.seed)
        # In fp64, from the largest down: no temperature makes these infinite.
        shifted = (scores.double() - scores.max().double()).cpu()
        likely = (shifted / settings.temperature).nan_to_num(nan=0.0).softmax(-1)
        # Where 0 / inf and -inf / inf are one: a masked token stays out.
        likely = likely.masked_fill(shifted == -torch.inf, 0.0)
        ordered, tokens = likely.sort(descending=True)
        kept = ordered * (ordered.cumsum(-1) - ordered < settings.top_p * ordered.sum())
        return int(tokens[torch.multinomial(kept, 1, generator=self._generators[index])])

    def ends(self, ids: Tensor) -> Tensor:
        """Which rows are done [rows], with ids [rows, tokens] so far."""
        count = ids.shape[1] - self.width
        for index, token in enumerate(ids[:, -1].tolist()):
            if self.ended[index] is not None:
                continue
            if token in self.last[index]:
                self.ended[index] = "eos"
            elif self._stops(index, ids[index, self.width :]):
                self.ended[index] = "stop"
            elif count >= self.rows[index].settings.max_new_tokens:
                self.ended[index] = "length"
        return torch.tensor([reason is not None for reason in self.ended], device=ids.device)

    def _stops(self, index: int, new: Tensor) -> bool:
        row = self.rows[index]
        if not row.settings.stop:
            return False
        window = max(len(text.encode("utf-8", "replace")) for text in row.settings.stop) + _SPARE_TOKENS
        tail = row.tokenizer.decode(new[-window:].tolist(), skip_special_tokens=True)
        return any(text in tail for text in row.settings.stop)

    def answer(self, index: int, new: list[int]) -> dict[str, Any]:
        """What a row comes to, of the tokens behind its prompt."""
        if index in self.errors:
            return {"error": self.errors[index]}
        row = self.rows[index]
        new = new[: row.settings.max_new_tokens]
        length = next((place for place, token in enumerate(new) if token in self.last[index]), len(new))
        text = row.tokenizer.decode(new[:length], skip_special_tokens=True)
        found = [place for stop in row.settings.stop if (place := text.find(stop)) >= 0]
        ended = "stop" if found else self.ended[index] or "length"
        return {"text": text[: min(found)] if found else text, "tokens": length, "ended": ended}

    def options(self) -> dict[str, Any]:
        """What generate is called with for these rows."""
        return {
            "logits_processor": [_Pick(self)],
            "stopping_criteria": [_Ends(self)],
            "do_sample": False,
            "num_beams": 1,
            "num_return_sequences": 1,
            "max_new_tokens": max(row.settings.max_new_tokens for row in self.rows),
        }


class _Pick(LogitsProcessor):
    def __init__(self, answers: Answers) -> None:
        self.answers = answers

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return self.answers.pick(scores)


class _Ends(StoppingCriteria):
    def __init__(self, answers: Answers) -> None:
        self.answers = answers

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return self.answers.ends(input_ids)
