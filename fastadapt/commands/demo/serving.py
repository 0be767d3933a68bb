"""The demo's last act: all its adapters in one batch, beside each of them alone."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ...serving import MultiAdapterModel
from ..batches import left_padded
from .training import answer, prompt_text, skeleton

SPARE_BYTES = 64 << 20


class Request(NamedTuple):
    """A question to an adapter: the one in this directory, and the model in which it was trained."""

    method: str
    directory: Path
    model: Any
    question: str


def serve_together(
    base: Any, tokenizer: Any, requests: Sequence[Request], new_tokens: int, advance: Callable[[], None]
) -> dict[str, Any]:
    """Answers all requests in one mixed batch, the base model's row last, and each alone by the model that trained it.

    Returns the answers with whether both are equal, and the seconds of each way.
    """
    sizes = [path.stat().st_size for request in requests for path in request.directory.glob("*.safetensors")]
    served = MultiAdapterModel(skeleton(base), budget=SPARE_BYTES + 2 * sum(sizes))
    names: list[str | None] = []
    for request in requests:
        served.load(request.directory, request.method)
        names.append(request.method)
    questions = [*(request.question for request in requests), requests[0].question]
    started = time.perf_counter()
    together = _answers(served, tokenizer, questions, [*names, None], new_tokens)
    seconds = time.perf_counter() - started
    advance()
    alone, seconds_alone = [], 0.0
    for model, question in zip([*(request.model for request in requests), base], questions, strict=True):
        model.eval()
        started = time.perf_counter()
        alone.append(answer(model, tokenizer, question, new_tokens))
        seconds_alone += time.perf_counter() - started
        advance()
    return {
        "rows": [
            {"method": name or "base model", "question": question, "answer": mixed, "equal": mixed == single}
            for name, question, mixed, single in zip([*names, None], questions, together, alone, strict=True)
        ],
        "seconds": seconds,
        "seconds_one_at_a_time": seconds_alone,
        "adapter_bytes": served.pool.used_bytes,
    }


def _answers(
    served: MultiAdapterModel, tokenizer: Any, questions: Sequence[str], names: Sequence[str | None], new_tokens: int
) -> list[str]:
    """The greedy answers in one line each, of one batch padded on the left."""
    rows = [
        tokenizer(prompt_text(tokenizer, question), add_special_tokens=False)["input_ids"] for question in questions
    ]
    batch = left_padded(rows, tokenizer.eos_token_id, served.model.device)
    output = served.generate(
        **batch,
        adapter_ids=names,
        max_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    texts: list[str] = tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return [" ".join(text.split()) for text in texts]
