"""`fastadapt generate`: rows of prompts, each with its adapter, answered in mixed batches."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from test_train import tokenizer
from tiny_models import llama, randomise
from typer.testing import CliRunner

from fastadapt import DoRAConfig, LoRAConfig, VeRAConfig, inject, load_adapter, save_adapter
from fastadapt.commands import generate
from fastadapt.commands.cli import app
from fastadapt.commands.generate import Options

CONFIGS: dict[str, Any] = {
    "sql": LoRAConfig(r=3, target_modules="all-linear"),
    "poems": DoRAConfig(r=4, target_modules="all-linear"),
    "jokes": VeRAConfig(r=8, target_modules="all-linear"),
}
NEW = 4


@pytest.fixture(scope="module")
def model() -> Any:
    return llama(bos_token_id=None, eos_token_id=1)


@pytest.fixture(scope="module")
def root(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model's directory and, beside it, a directory of adapters with a damaged one among them."""
    root = tmp_path_factory.mktemp("serving")
    model.save_pretrained(root / "base")
    tokenizer().save_pretrained(root / "base")
    for index, (name, config) in enumerate(CONFIGS.items()):
        torch.manual_seed(index)
        adapted = inject(copy.deepcopy(model), config)
        randomise([parameter for parameter in adapted.parameters() if parameter.requires_grad])
        save_adapter(adapted, root / "adapters" / name)
    broken = root / "adapters" / "broken"
    broken.mkdir()
    (broken / "adapter_config.json").write_text("{")
    return root


def run(root: Path, lines: list[str], *more: str) -> tuple[list[dict[str, Any]], str]:
    """The rows that the command writes, and what it says on stderr."""
    data, output = root / "prompts.jsonl", root / "answers.jsonl"
    data.write_text("\n".join(lines) + "\n", encoding="utf-8")
    arguments = ["generate", str(root / "base"), str(root / "adapters"), str(data), "--output", str(output)]
    result = CliRunner().invoke(app, [*arguments, "--max-new-tokens", str(NEW), *more])
    assert result.exit_code == 0, result.output
    return [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()], result.stderr


def alone(root: Path, model: Any, prompt: str, adapter: str | None) -> str:
    """The answer of one adapter by itself, without any serving code."""
    own = copy.deepcopy(model)
    if adapter is not None:
        load_adapter(own, root / "adapters" / adapter)
    words = tokenizer()
    ids = torch.tensor([words(prompt)["input_ids"]])
    output = own.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False, pad_token_id=1
    )
    text: str = words.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
    return text


@pytest.mark.parametrize("batch", ["8", "3", "1"])
def test_every_row_is_answered_by_its_adapter_in_order(root: Path, model: Any, batch: str) -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": "word1 word2 word3", "adapter": "sql"},
        {"prompt": "word4", "adapter": "poems"},
        {"prompt": "word5 word6", "adapter": None},
        {"prompt": "word7 word8 word9 word10", "adapter": "jokes"},
        {"prompt": "word11 word12"},
        {"prompt": "word13", "adapter": "sql"},
    ]
    found, said = run(root, [json.dumps(row) for row in rows], "--batch-size", batch)
    assert [row["line"] for row in found] == [1, 2, 3, 4, 5, 6]
    for row, answer in zip(rows, found, strict=True):
        assert answer["adapter"] == row.get("adapter")
        assert answer["text"] == alone(root, model, row["prompt"], row.get("adapter"))
        assert 0 <= answer["tokens"] <= NEW
    assert "6 rows, 0 with an error" in said


def test_mixed_ranks_share_a_full_pool(root: Path, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = (4, 40, 8, 24, 16, 33, 64, 12)
    for r in ranks:
        torch.manual_seed(r)
        adapted = inject(copy.deepcopy(model), LoRAConfig(r=r, target_modules=["q_proj", "down_proj"]))
        randomise([parameter for parameter in adapted.parameters() if parameter.requires_grad])
        save_adapter(adapted, root / "adapters" / f"r{r}")
    # A flag of whole MiB would hold them all.
    monkeypatch.setattr("fastadapt.commands.generate._budget", lambda options: 160_000)
    chosen = random.Random(0)
    rows = [{"prompt": f"word{i}", "adapter": f"r{chosen.choice(ranks)}"} for i in range(30)]
    found, _ = run(root, [json.dumps(row) for row in rows], "--batch-size", "3")
    for row, answer in zip(rows, found, strict=True):
        assert answer.get("text") == alone(root, model, row["prompt"], row["adapter"]), (row, answer)


def test_a_bad_row_is_an_error_of_that_row_alone(root: Path, model: Any) -> None:
    good = {"prompt": "word1 word2", "adapter": "sql"}
    bad = {
        "{": "not JSON",
        "[1]": "must be a JSON object",
        json.dumps({"adapter": "sql"}): "must have a prompt",
        json.dumps({"prompt": "word1", "adapter": 3}): "adapter must be a name",
        json.dumps({"prompt": "word1", "adapter": "missing"}): "missing",
        json.dumps({"prompt": "word1", "adapter": "../base"}): "base",
        json.dumps({"prompt": "word1", "adapter": "broken"}): "broken",
        json.dumps({"prompt": "word1 " * 40, "adapter": "sql"}): "40 tokens",
        json.dumps({"messages": [{"role": "bad", "content": "x"}]}): "no such role",
        json.dumps({"prompt": ""}): "no tokens",
    }
    lines = [line for text in bad for line in (json.dumps(good), text)]
    found, said = run(root, lines)
    expected = alone(root, model, "word1 word2", "sql")
    for index, (text, message) in enumerate(bad.items()):
        assert found[2 * index]["text"] == expected
        assert message in found[2 * index + 1]["error"], text
    assert f"{2 * len(bad)} rows, {len(bad)} with an error" in said


def test_messages_go_through_the_chat_template(root: Path, model: Any) -> None:
    found, _ = run(root, [json.dumps({"messages": [{"role": "user", "content": "word1 word2"}], "adapter": "poems"})])
    assert found[0]["text"] == alone(root, model, "<|user|> word1 word2 <eos> <|assistant|>", "poems")


def test_adapters_that_do_not_fit_together_run_apart(root: Path, model: Any) -> None:
    names = [*CONFIGS, *CONFIGS]
    rows = [json.dumps({"prompt": "word1 word2", "adapter": name}) for name in names]
    found, _ = run(root, rows, "--budget", "1", "--batch-size", "6")
    assert [row["text"] for row in found] == [alone(root, model, "word1 word2", name) for name in names]


def test_sampling_follows_the_seed(root: Path) -> None:
    rows = [json.dumps({"prompt": "word1 word2", "adapter": "sql"})] * 3
    first, _ = run(root, rows, "--temperature", "2", "--seed", "5")
    again, _ = run(root, rows, "--temperature", "2", "--seed", "5")
    assert first == again
    assert len({row["text"] for row in first}) > 1


def command(root: Path, base: str, output: str) -> Any:
    arguments = ["generate", root / base, root / "adapters", root / "prompts.jsonl", "--output", root / output]
    return CliRunner().invoke(app, [*map(str, arguments), "--batch-size", "1", "--max-new-tokens", str(NEW)])


def test_a_model_that_is_none_costs_no_older_results(root: Path) -> None:
    run(root, [json.dumps({"prompt": "word1"})] * 3)
    before = (root / "answers.jsonl").read_text(encoding="utf-8")
    assert command(root, "nowhere", "answers.jsonl").exit_code == 2
    assert (root / "answers.jsonl").read_text(encoding="utf-8") == before


def test_what_is_answered_stays_when_a_later_batch_fails(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found, _ = run(root, [json.dumps({"prompt": f"word{index}"}) for index in range(3)], "--batch-size", "1")
    answer, calls = generate._answer, list[int]()

    def breaking(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise ValueError("the device is gone")
        return answer(*arguments)

    monkeypatch.setattr(generate, "_answer", breaking)
    assert command(root, "base", "answers.jsonl").exit_code == 2
    lines = (root / "answers.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["line"] for line in lines] == [row["line"] for row in found[:2]]


def test_results_do_not_take_the_place_of_their_prompts(root: Path) -> None:
    run(root, [json.dumps({"prompt": "word1"})])
    before = (root / "prompts.jsonl").read_text(encoding="utf-8")
    result = command(root, "base", "prompts.jsonl")
    assert result.exit_code == 2
    assert "--output must be another file than DATA" in result.stderr
    assert (root / "prompts.jsonl").read_text(encoding="utf-8") == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_new_tokens": 0}, "--max-new-tokens must be at least 1"),
        ({"batch_size": 0}, "--batch-size must be at least 1"),
        ({"temperature": -1.0}, "--temperature must be 0"),
        ({"top_p": 0.0}, "--top-p must be in"),
        ({"budget": 0}, "--budget must be at least 1 MiB"),
        ({"dtype": "int8"}, "--dtype must be float32 or bfloat16"),
        ({"adapters": Path("nowhere")}, "no directory"),
        ({"data": Path("nowhere.jsonl")}, "not a file"),
    ],
)
def test_options_outside_their_range_are_named(root: Path, changes: dict[str, Any], message: str) -> None:
    data = root / "some.jsonl"
    data.write_text("")
    with pytest.raises(ValueError, match=message):
        Options(**{"model": "m", "adapters": root / "adapters", "data": data, **changes})
