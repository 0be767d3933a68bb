"""`fastadapt train`: what it reads, what it says of mistakes, how it trains, and that any stop leaves no trace."""

from __future__ import annotations

import csv
import glob
import hashlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from test_cli import is_one_line_error, run
from test_experts import mixtral
from tiny_models import llama

import fastadapt
from fastadapt.commands import base_model, batches
from fastadapt.commands.quiet import quiet_transformers
from fastadapt.commands.train import command as train
from fastadapt.commands.train import data as train_data
from fastadapt.commands.train import loop as train_loop
from fastadapt.commands.train import state as train_state
from fastadapt.commands.train.options import Options, differences
from fastadapt.training.recipes import RECIPES, recipes

WORDS = [f"word{index}" for index in range(50)]
TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'bad' %}{{ raise_exception('no such role') }}{% endif %}"
    "<|{{ message['role'] }}|> {{ message['content'] }} <eos> {% endfor %}"
    "{% if add_generation_prompt %}<|assistant|> {% endif %}"
)


def tokenizer(**special: Any) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: index for index, word in enumerate(["<unk>", "<eos>", "<|user|>", "<|assistant|>", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=words, **{"unk_token": "<unk>", "eos_token": "<eos>", **special})
    fast.chat_template = TEMPLATE
    return fast


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny language model without a padding token."""
    directory = tmp_path_factory.mktemp("models") / "llama"
    llama(bos_token_id=None, eos_token_id=1).save_pretrained(directory)
    tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny masked language model: its checkpoint has neither a classifier nor a pooler."""
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = BertConfig(vocab_size=67, max_position_embeddings=32, **sizes)
    directory = tmp_path_factory.mktemp("models") / "bert"
    BertForMaskedLM(config).save_pretrained(directory)
    tokenizer(pad_token="<unk>").save_pretrained(directory)
    return directory


@pytest.fixture(autouse=True)
def no_picture(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """A picture takes longer than all else that is left behind."""
    if "picture" not in request.fixturenames:
        monkeypatch.setattr(train, "draw", lambda losses, evaluations, unit, path: path.write_bytes(b""))


@pytest.fixture
def picture() -> None:
    """For a test that has it drawn."""


def text_of(generator: random.Random, words: int) -> str:
    return " ".join(generator.choices(WORDS, k=words))


def lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def answers(path: Path, count: int = 12) -> Path:
    """Prompts and completions of different lengths."""
    generator = random.Random(1)
    return lines(
        path,
        [
            {"prompt": text_of(generator, 1 + index % 3), "completion": text_of(generator, 1 + index % 5)}
            for index in range(count)
        ],
    )


def classes(path: Path, count: int = 24) -> Path:
    """Rows whose class is told by one word."""
    generator = random.Random(2)
    rows = [(f"{text_of(generator, 3)} {WORDS[index % 2]}", ["yes", "no"][index % 2]) for index in range(count)]
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *rows])
    return path


def options(model: Path, data: Path, output: Path, **changes: Any) -> Options:
    small: dict[str, Any] = {"r": 4, "dropout": 0.2, "steps": 4, "batch_size": 2, "accumulate": 2, "device": "cpu"}
    if changes.get("method") in ("delta-lora", "glora", "ssf"):  # which refuse it
        small["dropout"] = 0.0
    if changes.get("method") == "ssf":
        small["r"] = None
    return Options(model=str(model), data=data, output=output, **{**small, **changes})


def trained(*arguments: Any, **changes: Any) -> dict[str, Any]:
    return train.run(options(*arguments, **changes), Console(quiet=True))


def digest(output: Path) -> str:
    return hashlib.sha256((output / "adapter_model.safetensors").read_bytes()).hexdigest()


def snapshot(output: Path) -> dict[str, tuple[int, bytes]]:
    """Every file with its content and time."""
    files = [path for path in output.rglob("*") if path.is_file()]
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


# What is read


def encoded(path: Path, **changes: Any) -> train_data.Encoded:
    records = train_data.read_records(path)
    form = train_data.format_of(records[0])
    labels = train_data.label_names(records) if form == "classification" else []
    settings = {"tokenizer": tokenizer(), "max_length": 32, "labels": labels, **changes}
    return train_data.encode(records, form, **settings)


def counted(row: train_data.Row) -> str:
    """The text that the loss counts."""
    assert isinstance(row.labels, list)
    return str(tokenizer().decode([label for label in row.labels if label != batches.IGNORED]))


def test_completions_are_learned_with_their_end(tmp_path: Path) -> None:
    rows = [{"prompt": "word1 word2", "completion": "word3"}, {"prompt": "", "completion": "word4 word5"}]
    first, second = encoded(lines(tmp_path / "data.jsonl", rows)).rows
    assert tokenizer().decode(first.ids) == "word1 word2 word3 <eos>"
    assert counted(first) == "word3 <eos>"
    # Nothing comes before the first token of all.
    assert counted(second) == "word5 <eos>"


def test_texts_are_learned_whole_and_cut_to_length(tmp_path: Path) -> None:
    found = encoded(lines(tmp_path / "data.jsonl", [{"text": "word1 word2"}, {"text": "word1 " * 9}]), max_length=5)
    assert [counted(row) for row in found.rows] == ["word2 <eos>", "word1 word1 word1 word1"]
    assert found.truncated == 1
    assert found.dropped == 0


def test_every_turn_of_the_assistant_is_learned(tmp_path: Path) -> None:
    roles = ["user", "assistant", "user", "assistant", "user"]
    messages = [{"role": role, "content": WORDS[index]} for index, role in enumerate(roles)]
    (row,) = encoded(lines(tmp_path / "data.jsonl", [{"messages": messages}])).rows
    assert counted(row) == "word1 <eos> word3 <eos>"
    assert tokenizer().decode(row.ids).endswith("word3 <eos>")  # what follows the last answer is no use


def test_a_template_that_rewrites_earlier_answers_leaves_the_last(tmp_path: Path) -> None:
    words = tokenizer()
    # As templates do that show the thoughts of the last answer alone, and ask for an answer with a word of their own.
    words.chat_template = (
        "{% for message in messages %}{{ message['role'] == 'user' and '<|user|>' or '<|assistant|>' }} "
        "{% if message['role'] == 'user' or loop.last %}{{ message['content'] }}{% endif %} <eos> {% endfor %}"
        "{% if add_generation_prompt %}<|assistant|> word9 {% endif %}"
    )
    messages = [{"role": role, "content": role} for role in ("user", "assistant", "user")]
    messages.append({"role": "assistant", "content": "word7"})
    (row,) = encoded(lines(tmp_path / "data.jsonl", [{"messages": messages}]), tokenizer=words).rows
    assert counted(row) == "<|assistant|> word7 <eos>"


def test_classes_are_numbered_in_order(tmp_path: Path) -> None:
    found = encoded(classes(tmp_path / "data.csv"))
    assert {row.labels for row in found.rows} == {0, 1}
    records = [train_data.Record("", {"label": value}) for value in (10, "2", 1, 10)]
    assert train_data.label_names(records) == ["1", "2", "10"]
    assert train_data.label_names([*records, train_data.Record("", {"label": "b"})]) == ["1", "10", "2", "b"]


def test_long_answers_are_left_out(tmp_path: Path) -> None:
    rows = [{"prompt": "word1", "completion": "word2"}, {"prompt": "word1", "completion": "word2 " * 9}]
    found = encoded(lines(tmp_path / "data.jsonl", rows), max_length=5)
    assert len(found.rows) == 1
    assert found.dropped == 1
    with pytest.raises(ValueError, match=r"line 1 .*more than 2 tokens.*--max-length"):
        encoded(tmp_path / "data.jsonl", max_length=2)


def test_csv_lines_are_counted_as_an_editor_counts_them(tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    path.write_bytes('\ufefftext,label\n"two\nlines",a\n\nword1,b\nword2,""\n'.encode())
    records = train_data.read_records(path)
    assert [record.where for record in records] == [f"{path}, line {number}" for number in (2, 5, 6)]
    assert records[0].fields == {"text": "two\nlines", "label": "a"}


MISTAKES: dict[str, tuple[str, str, list[str]]] = {
    "suffix": ("data.txt", "", [".jsonl", ".csv", "'.txt'"]),
    "no rows": ("data.jsonl", "\n", ["no rows"]),
    "no json": ("data.jsonl", '{"text": "a"}\nnonsense\n', ["line 2", "not JSON", "one object a line"]),
    "no object": ("data.jsonl", "[1]\n", ["line 1", "must be a JSON object", "got list"]),
    "columns": ("data.jsonl", '{"question": 1, "answer": 2}\n', ["line 1", "question, answer", "rename"]),
    "missing": ("data.jsonl", '{"text": "a"}\n\n{"txt": "b"}\n', ["line 3", "'text' is missing"]),
    "no text": ("data.jsonl", '{"prompt": "a", "completion": 5}\n', ["line 1", "'completion'", "int 5", "quotes"]),
    "empty": ("data.csv", "prompt,completion\na,\n", ["line 2", "'completion' is empty", "fill it in"]),
    "cells": ("data.csv", "text,label\na,b\nc,d,e\n", ["line 3", "2 cells", "got 3", "double quotes"]),
    "quotes": ("data.csv", 'text,label\n"a,b\n', ["line 2", "not CSV"]),
    "one class": ("data.csv", "text,label\na,b\nc,b\n", ["'label'", "two classes", "got b"]),
    "float class": ("data.jsonl", '{"text": "a", "label": 0.5}\n', ["line 1", "'label'", "float 0.5"]),
    "no list": ("data.jsonl", '{"messages": "hello"}\n', ["line 1", "'messages'", "list", 'str "hello"']),
    "no role": ("data.jsonl", '{"messages": [{"content": "a"}]}\n', ["line 1", "role and a content"]),
    "no answer": ("data.jsonl", '{"messages": [{"role": "user", "content": "a"}]}\n', ["line 1", "no turn of the ass"]),
    "template": (
        "data.jsonl",
        '{"messages": [{"role": "bad", "content": "a"}, {"role": "assistant", "content": "a"}]}\n',
        ["line 1", "no such role"],
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_in_data_are_named(tmp_path: Path, mistake: str) -> None:
    name, content, said = MISTAKES[mistake]
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError) as error:  # noqa: PT011 (the words are checked one by one)
        encoded(tmp_path / name)
    assert str(tmp_path / name) in str(error.value)
    assert all(word in str(error.value) for word in said), error.value


def test_data_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.csv is not a file"):
        train_data.read_records(tmp_path / "nowhere.csv")
    (tmp_path / "latin.jsonl").write_bytes(b'{"text": "\xe9"}')
    with pytest.raises(ValueError, match="UTF-8"):
        train_data.read_records(tmp_path / "latin.jsonl")
    data = answers(tmp_path / "data.jsonl")
    with pytest.raises(ValueError, match="end-of-sequence"):
        encoded(data, tokenizer=tokenizer(eos_token=None))
    words = tokenizer()
    words.chat_template = None
    lines(data, [{"messages": [{"role": "assistant", "content": "word1"}]}])
    with pytest.raises(ValueError, match="chat template"):
        encoded(data, tokenizer=words)


def test_epochs_have_every_row_once_and_an_order_of_their_own() -> None:
    lengths = [index % 7 for index in range(30)]
    first, second = (batches.epoch_batches(lengths, 4, 0, epoch) for epoch in (0, 1))
    assert sorted(index for batch in first for index in batch) == list(range(30))
    assert first != second
    assert second == batches.epoch_batches(lengths, 4, 0, 1)
    assert first != batches.epoch_batches(lengths, 4, 1, 0)


def test_the_split_goes_by_the_seed() -> None:
    rows = [train_data.Row([index], [index]) for index in range(20)]
    kept, held = train_data.split(rows, 0.1, 0)
    assert len(held) == 2
    assert sorted(kept + held) == rows
    assert train_data.split(rows, 0.1, 0) == (kept, held)
    assert train_data.split(rows, 0.1, 1) != (kept, held)
    assert train_data.split(rows, 0.0, 0) == (rows, [])
    assert train_data.split(rows[:1], 0.5, 0) == (rows[:1], [])
    assert len(train_data.split(rows[:2], 0.1, 0)[1]) == 1


# What is trained


def test_what_is_left_behind(base: Path, tmp_path: Path, picture: None) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    data, output = answers(tmp_path / "data.jsonl"), tmp_path / "out"
    result = run(
        *("train", base, data, output, "--steps", 12, "--r", 4, "--batch-size", 4, "--lr", 0.02, "--device", "cpu"),
        *("--json", tmp_path / "copy.json"),
    )
    assert result.exit_code == 0, result.output
    for said in ("LoRA", "step 12/12", "evaluation after step 0", f"fastadapt merge {base} {output} {output}-merged"):
        assert said in result.stdout
    left = ["adapter_config.json", "adapter_model.safetensors", "checkpoint-12", "train.json", "train.png"]
    assert sorted(path.name for path in output.iterdir()) == left
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy.json", "data.jsonl", "out"]
    document = json.loads((output / "train.json").read_text())
    assert (tmp_path / "copy.json").read_bytes() == (output / "train.json").read_bytes()
    (row,) = document["rows"]
    assert row["loss_after"] == document["curve"]["eval"][-1]["loss"]
    assert len(document["curve"]["train"]) == 12
    assert row["last_loss"] < row["first_loss"]
    assert row["tokens_per_second"] > 0
    assert document["settings"]["lr"] == 0.02
    assert (output / "train.png").read_bytes().startswith(b"\x89PNG")
    sums = subprocess.run(["sha256sum", "-c", "sha256"], cwd=output / "checkpoint-12", capture_output=True, text=True)
    assert sums.returncode == 0, sums.stderr

    model = fastadapt.load_adapter(AutoModelForCausalLM.from_pretrained(base), output).eval()
    with quiet_transformers():
        theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(output)).eval()
    ids = torch.arange(4, 14)[None]
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)
    result = run("merge", base, output, tmp_path / "merged")
    assert result.exit_code == 0, result.output


def test_a_classifier_is_trained_and_merged_with_its_classes(encoder: Path, tmp_path: Path, picture: None) -> None:
    from peft import PeftModel
    from transformers import AutoConfig, AutoModelForSequenceClassification

    data, output = classes(tmp_path / "data.csv"), tmp_path / "out"
    row = trained(encoder, data, output, steps=30, lr=0.02, dropout=0.0, batch_size=8, accumulate=1, eval=data)
    assert row["accuracy_after"] > 0.9
    assert row["loss_after"] < row["loss_before"]
    config = json.loads((output / "adapter_config.json").read_text())
    # The checkpoint has no pooler: one that stayed at random would be another one at every loading.
    assert config["modules_to_save"] == ["bert.pooler.dense", "classifier", "score"]
    assert config["task_type"] == "SEQ_CLS"
    result = run("merge", encoder, output, tmp_path / "merged")
    assert result.exit_code == 0, result.output
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    assert merged.config.id2label == {0: "no", 1: "yes"}
    ids = torch.arange(4, 14)[None]
    classes_of = AutoConfig.from_pretrained(output)
    models = [AutoModelForSequenceClassification.from_pretrained(encoder, config=classes_of) for _ in range(2)]
    ours = fastadapt.load_adapter(models[0], output).eval()
    with quiet_transformers():
        theirs = PeftModel.from_pretrained(models[1], str(output)).eval()
    with torch.no_grad():
        for model in (merged, theirs):
            torch.testing.assert_close(model(ids).logits, ours(ids).logits, rtol=1e-4, atol=1e-5)


def test_a_decoder_classifies_in_batches(base: Path, tmp_path: Path) -> None:
    data = classes(tmp_path / "data.csv")
    trained(base, data, tmp_path / "out", batch_size=4)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["score", "classifier"]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["pad_token_id"] == 1
    assert run("merge", base, tmp_path / "out", tmp_path / "merged").exit_code == 0


@pytest.mark.parametrize("form", ["completion", "classification"])
def test_accumulation_equals_a_larger_batch(base: Path, tmp_path: Path, form: str) -> None:
    from safetensors.torch import load_file

    data = answers(tmp_path / "data.jsonl", 14) if form == "completion" else classes(tmp_path / "data.csv", 14)
    found = []
    for batch_size, accumulate in ((4, 1), (1, 4), (3, 2), (6, 1)):
        output = tmp_path / f"{batch_size}-{accumulate}"
        # Fourteen rows: the last step of an epoch has fewer.
        trained(base, data, output, batch_size=batch_size, accumulate=accumulate, dropout=0.0, eval_share=0.0)
        curve = json.loads((output / "train.json").read_text())["curve"]["train"]
        found.append((curve, load_file(output / "adapter_model.safetensors")))
    for (curve, tensors), (other, others) in (found[:2], found[2:]):
        assert curve == pytest.approx(other, rel=1e-5)
        for name, tensor in tensors.items():
            torch.testing.assert_close(tensor, others[name], rtol=1e-3, atol=1e-5)


def test_evaluation_leaves_training_as_it_was(base: Path, tmp_path: Path) -> None:
    data = answers(tmp_path / "data.jsonl")
    for every in (1, 4):
        trained(base, data, tmp_path / str(every), eval=data, eval_every=every)
    assert digest(tmp_path / "1") == digest(tmp_path / "4")


def test_it_says_what_peft_makes_of_the_adapter(tmp_path: Path) -> None:
    mixtral().save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    for method, said in (("dora", "not readable by PEFT, which has no DoRA on experts"), ("lora", "readable by PEFT")):
        arguments = tmp_path / "model", answers(tmp_path / "rows.jsonl"), tmp_path / method
        result = run("train", *arguments, "--method", method, "--epochs", 1)
        assert result.exit_code == 0, result.output
        assert f"{method}, {said}" in " ".join(result.output.split())


def test_schedules() -> None:
    def rates(**changes: Any) -> list[float]:
        chosen = options(Path("m"), Path("d"), Path("o"), **changes)
        return [chosen.rate_at(step, 10) for step in range(10)]

    assert rates(warmup=0.0, schedule="constant") == [1.0] * 10
    assert rates(warmup=0.2) == pytest.approx([0.5, 1.0, *(1 - step / 8 for step in range(8))])
    assert rates(warmup=0.0, schedule="cosine")[5] == pytest.approx(0.5)


def test_a_16_bit_base_trains_adapters_of_32(base: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    trained(base, answers(tmp_path / "data.jsonl"), tmp_path / "out", dtype="bfloat16")
    assert {t.dtype for t in load_file(tmp_path / "out" / "adapter_model.safetensors").values()} == {torch.float32}


# What a stop leaves


@pytest.mark.parametrize("method", recipes())
def test_every_recipe_goes_on_from_every_step_bit_for_bit(base: Path, tmp_path: Path, method: str) -> None:
    data, whole = answers(tmp_path / "data.jsonl", 14), tmp_path / "whole"
    changes: dict[str, Any] = {"method": method, "save_every": 1, "keep": 9, "eval_every": 3}
    trained(base, data, whole, **changes)
    curve = json.loads((whole / "train.json").read_text())["curve"]
    assert list(train_state.checkpoints(whole)) == [0, 1, 2, 3, 4]
    for step, checkpoint in train_state.checkpoints(whole).items():
        output = tmp_path / f"from-{step}"
        shutil.copytree(checkpoint, output / checkpoint.name)
        torch.manual_seed(99)  # the state of a new process is any
        random.seed(99)
        trained(base, data, output, **changes)
        assert digest(output) == digest(whole), step
        assert json.loads((output / "train.json").read_text())["curve"] == curve, step


def test_a_classifier_goes_on_bit_for_bit(encoder: Path, tmp_path: Path) -> None:
    data, whole, output = classes(tmp_path / "data.csv"), tmp_path / "whole", tmp_path / "stopped"
    trained(encoder, data, whole, save_every=2, keep=9)
    shutil.copytree(whole / "checkpoint-2", output / "checkpoint-2")
    trained(encoder, data, output, save_every=2, keep=9)
    assert digest(output) == digest(whole)


def test_prepare_runs_once_and_sees_the_first_epoch(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import dataclasses

    seen: list[list[Any]] = []

    def prepare(model: Any, batches: Any, name: str) -> None:
        rows = [list(batches) for _ in range(2)]
        assert all(torch.equal(a["labels"], b["labels"]) for a, b in zip(*rows, strict=True))
        assert sum(len(batch["input_ids"]) for batch in rows[0]) == 12
        seen.append(rows[0])

    monkeypatch.setitem(RECIPES, "lora", dataclasses.replace(RECIPES["lora"], prepare=prepare))
    data, output = answers(tmp_path / "data.jsonl"), tmp_path / "out"
    trained(base, data, output, keep=9, eval_share=0.0)
    shutil.copytree(output / "checkpoint-0", tmp_path / "again" / "checkpoint-0")
    trained(base, data, tmp_path / "again", keep=9, eval_share=0.0)
    assert len(seen) == 1
    assert digest(tmp_path / "again") == digest(output)


# Imports take longer than these runs: one process has them done and forks a child for each run. Steps and saves are
# slow enough to be met.
PROGRAM = """
import json, os, sys, time, torch
torch.set_num_threads(1)
import transformers.models.llama.modeling_llama
from transformers import AutoModelForCausalLM, AutoTokenizer
from fastadapt.commands.train import command as train, loop as train_loop
from fastadapt.commands.cli import main
sync, take_step = os.fsync, train_loop.Training.take_step
def slowly(handle):
    time.sleep(0.05)
    sync(handle)
def waiting(self):
    time.sleep(0.05)
    return take_step(self)
os.fsync, train_loop.Training.take_step = slowly, waiting
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        os.dup2(2, 1)
        sys.argv = ["fastadapt", *json.loads(line)]
        main()
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def until(happened: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < deadline, "the moment did not come"
        time.sleep(0.001)


def test_killed_at_any_moment_the_same_command_ends_with_the_same_weights(base: Path, tmp_path: Path) -> None:
    data, output = answers(tmp_path / "data.jsonl"), tmp_path / "out"
    chosen = options(base, data, output, steps=8, save_every=2)
    given = ("--steps", 8, "--save-every", 2, "--r", 4, "--dropout", 0.2, "--batch-size", 2, "--accumulate", 2)

    def drafts(name: str) -> list[str]:
        return glob.glob(str(output / ".writing-*" / "new" / name))

    moments: list[Callable[[], object]] = [
        lambda: drafts("checkpoint-0"),  # in the first save: nothing is there to go on from
        lambda: drafts("checkpoint-4/state.safetensors"),  # in a save, with an earlier checkpoint
        lambda: (output / "checkpoint-6").is_dir(),  # as a save is done, or between saves
    ]
    root = Path(__file__).parent.parent
    paths = {"PYTHONPATH": os.pathsep.join([str(root), str(root / "kernels")])}
    command = json.dumps([str(part) for part in ("train", base, data, output, *given, "--device", "cpu")])
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        env={**os.environ, **paths},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as server:
        assert server.stdin is not None
        assert server.stdout is not None
        for number, moment in enumerate(moments):
            server.stdin.write(command + "\n")
            server.stdin.flush()
            child = int(server.stdout.readline())
            until(moment)
            os.kill(child, signal.SIGKILL)
            assert int(server.stdout.readline()) == -signal.SIGKILL
            if number == 1:
                assert list(train_state.checkpoints(output)) == [2]
                assert drafts("checkpoint-4")
        server.stdin.close()
    train.run(chosen, Console(quiet=True))
    trained(base, data, tmp_path / "whole", steps=8)
    assert digest(output) == digest(tmp_path / "whole")
    assert not [path.name for path in output.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_a_step_changes_nothing_in_the_end(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, signum: signal.Signals
) -> None:
    data = answers(tmp_path / "data.jsonl")
    take_step = train_loop.Training.take_step

    def signalled(self: train_loop.Training) -> float:
        if self.step == 1:
            signal.raise_signal(signum)
        return take_step(self)

    given = ("--steps", 4, "--r", 4, "--dropout", 0.2, "--batch-size", 2, "--accumulate", 2, "--device", "cpu")
    trained(base, data, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(train_loop.Training, "take_step", signalled)
        result = run("train", base, data, tmp_path / "out", *given)
    assert result.exit_code == 128 + signum
    assert "stopped after step 2 of 4, which is saved: the same command goes on from there" in result.stdout
    assert list(train_state.checkpoints(tmp_path / "out")) == [2]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    trained(base, data, tmp_path / "out")
    assert digest(tmp_path / "out") == digest(tmp_path / "whole")


def test_a_second_interrupt_does_not_wait() -> None:
    with train_loop.noted_signals() as noted:
        signal.raise_signal(signal.SIGINT)
        assert noted == [signal.SIGINT]
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def state(step: int) -> dict[str, Any]:
    return {"step": step, "tensors": {"a": torch.full((3,), float(step))}}


@pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")
def test_a_save_that_is_killed_at_any_call_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    events = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.listdir", "os.scandir")
    last, died = None, 0
    for number in range(200):
        output = tmp_path / str(number)
        with train_state.owned(output):
            train_state.save(output, 1, state(1))
        child = os.fork()
        if child == 0:
            calls = 0

            def count(event: str, arguments: Any, number: int = number) -> None:
                nonlocal calls
                if event in events:
                    calls += 1
                    if calls > number:
                        os._exit(9)

            sys.addaudithook(count)
            train_state.save(output, 2, state(2))
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        with train_state.owned(output):
            said: list[str] = []
            last = train_state.load_last(output, said.append)
            assert not said
            assert last is not None
            assert torch.equal(last["tensors"]["a"], torch.full((3,), float(last["step"])))
            assert not list(output.glob(".*"))
            train_state.save(output, 2, state(2))  # the run comes here again
            assert list(train_state.checkpoints(output)) == [2]
        if code == 0:
            break
        died += 1
    assert code == 0
    assert died > 10
    assert last == {"step": 2, "tensors": last["tensors"]}


def test_states_come_back_as_they_were(tmp_path: Path) -> None:
    shared = torch.arange(6.0)
    value = {
        "tensors": [shared, shared.view(2, 3).T, shared[:0], torch.tensor(3), torch.tensor([True]), shared.bfloat16()],
        "numbers": {0: 0.1, 1: float("inf"), "#x": None},
        "tuple": (1, (2.5, "text"), []),
        "random": random.Random(3).getstate(),
    }
    train_state.save(tmp_path, 0, value)
    found = train_state.load(tmp_path / "checkpoint-0")
    for old, new in zip(value.pop("tensors"), found.pop("tensors"), strict=True):  # type: ignore[call-overload]
        assert old.dtype == new.dtype
        assert torch.equal(old, new)
    assert found == value
    with pytest.raises(TypeError, match="optimizer/0 cannot go into a checkpoint"):
        train_state.save(tmp_path, 1, {"optimizer": [object()]})
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-0"]


def stopped(base: Path, tmp_path: Path, step: int = 2, **changes: Any) -> tuple[Path, Path, str]:
    """(data, output of a run that stopped after a step, the digest of what it comes to)."""
    data, whole, output = answers(tmp_path / "data.jsonl"), tmp_path / "whole", tmp_path / "stopped"
    trained(base, data, whole, save_every=1, keep=9, **changes)
    shutil.copytree(whole / f"checkpoint-{step}", output / f"checkpoint-{step}")
    return data, output, digest(whole)


def test_a_run_does_not_go_on_with_another_base_model(base: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(base, model)
    data, output, whole = stopped(model, tmp_path)
    (weights,) = model.glob("*.safetensors")
    tensors, words = load_file(weights), (model / "tokenizer.json").read_text()
    save_file({name: value + 1e-3 for name, value in tensors.items()}, weights, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="MODEL has other weights"):
        trained(model, data, output, save_every=1, keep=9)
    save_file(tensors, weights, metadata={"format": "pt"})
    (model / "tokenizer.json").write_text(words.replace('"word1":', '"word0":'))
    with pytest.raises(ValueError, match="MODEL has another tokenizer"):
        trained(model, data, output, save_every=1, keep=9)
    (model / "tokenizer.json").write_text(words)
    (model / "README.md").write_text("of no matter")
    trained(model, data, output, save_every=1, keep=9)
    assert digest(output) == whole


def test_large_files_of_weights_are_compared_by_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base_model, "_WHOLE_BYTES", 1000)
    monkeypatch.setattr(base_model, "_BLOCK_BYTES", 16)
    weights = tmp_path / "model.safetensors"
    values = torch.arange(5000.0)
    digests = []
    for change in (0.0, 1.0):
        save_file({"a": values + change}, weights)
        digests.append(base_model.weights_digest(str(tmp_path)))
    weights.write_bytes(weights.read_bytes() + b" ")
    digests.append(base_model.weights_digest(str(tmp_path)))
    assert len(set(digests)) == 3
    assert base_model.weights_digest("no/such-model") is None


def test_a_run_goes_on_with_the_threads_that_it_had(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, output, whole = stopped(base, tmp_path)
    now, seen, take_step = torch.get_num_threads(), list[int](), train_loop.Training.take_step

    def counting(self: train_loop.Training) -> float:
        seen.append(torch.get_num_threads())
        return take_step(self)

    monkeypatch.setattr(train_loop.Training, "take_step", counting)
    torch.set_num_threads(now + 1)
    try:
        with Console(quiet=False, file=io.StringIO(), width=200) as console:
            train.run(options(base, data, output, save_every=1, keep=9), console)
        assert torch.get_num_threads() == now + 1
    finally:
        torch.set_num_threads(now)
    assert set(seen) == {now}
    assert digest(output) == whole
    assert f"going on with {now} threads as before" in console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json", "train.json"])
def test_a_damaged_file_of_a_finished_run_is_written_again(base: Path, tmp_path: Path, name: str) -> None:
    data, output = answers(tmp_path / "data.jsonl"), tmp_path / "out"
    trained(base, data, output)
    before = (output / name).read_bytes()
    (output / name).write_bytes(before[:-20])
    trained(base, data, output)
    after = (output / name).read_bytes()
    if name == "train.json":
        assert json.loads(after)["rows"][0]["steps"] == json.loads(before)["rows"][0]["steps"]
    else:
        assert after == before


def test_no_leftover_blocks_a_run_or_leads_it_elsewhere(base: Path, tmp_path: Path) -> None:
    data, output, whole = stopped(base, tmp_path)
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").write_text("kept")
    for name in (".writing-note", ".removing-checkpoint-0"):
        (output / name).write_text("a file")
    (output / ".removing-link").symlink_to(precious)
    (output / ".writing-link").symlink_to(precious / "file")
    trained(base, data, output, save_every=1, keep=9)
    assert digest(output) == whole
    assert not list(output.glob(".*"))
    assert (precious / "file").read_text() == "kept"


def test_a_state_of_other_types_is_a_damaged_one(base: Path, tmp_path: Path) -> None:
    data, output, _ = stopped(base, tmp_path)
    checkpoint = output / "checkpoint-2"
    states = ['{"settings": 5}', "[]", '{"step": "x"}']
    for text in [*(f'{{"format": 1, "state": {state}}}' for state in states), "[]"]:
        (checkpoint / "state.json").write_text(text)
        names = ("state.json", "state.safetensors")
        sums = {name: hashlib.sha256((checkpoint / name).read_bytes()).hexdigest() for name in names}
        (checkpoint / "sha256").write_text("".join(f"{value}  {name}\n" for name, value in sums.items()))
        with pytest.raises(ValueError, match=r"cannot be used.*--overwrite"):
            trained(base, data, output, save_every=1, keep=9)


def test_a_run_waits_for_the_lock_of_one_that_was_just_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    calls, flock = list[int](), fcntl.flock

    def late(handle: int, how: int) -> None:
        calls.append(how)
        if len(calls) < 3:
            raise BlockingIOError
        flock(handle, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with train_state.owned(tmp_path):
        assert len(calls) == 3


def test_a_damaged_checkpoint_gives_way_to_the_one_before(base: Path, tmp_path: Path) -> None:
    data, whole = answers(tmp_path / "data.jsonl"), tmp_path / "whole"
    trained(base, data, whole, save_every=1, keep=3)
    assert list(train_state.checkpoints(whole)) == [2, 3, 4]
    for name in ("state.json", "state.safetensors", "sha256"):
        output = tmp_path / name
        for step in (2, 3):
            shutil.copytree(whole / f"checkpoint-{step}", output / f"checkpoint-{step}")
        file = output / "checkpoint-3" / name
        file.write_bytes(file.read_bytes()[:-7] + b"damaged")
        console = Console(record=True, width=300, quiet=False, file=open(os.devnull, "w"))  # noqa: SIM115
        train.run(options(base, data, output, save_every=1, keep=3), console)
        text = console.export_text()
        assert "checkpoint-3 cannot be used" in text
        assert "going on from checkpoint-2" in text
        assert digest(output) == digest(whole)
        console.file.close()
        assert list(train_state.checkpoints(output)) == [2, 3, 4]
    for path in train_state.checkpoints(output).values():
        (path / "state.json").unlink()
    with pytest.raises(ValueError, match=r"state.json is missing.*no whole one.*--overwrite"):
        trained(base, data, output, save_every=1, keep=3)
    trained(base, data, output, save_every=1, keep=3, overwrite=True)
    assert digest(output) == digest(whole)


def test_a_checkpoint_of_another_model_is_refused(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # As of runs that did not note the weights.
    monkeypatch.setattr("fastadapt.commands.train.options.weights_digest", lambda name: None)
    data, model = answers(tmp_path / "data.jsonl"), tmp_path / "model"
    shutil.copytree(base, model)
    trained(model, data, tmp_path / "out", keep=9)
    shutil.rmtree(tmp_path / "out" / "checkpoint-4")
    llama(hidden_size=64, bos_token_id=None, eos_token_id=1).save_pretrained(model)
    with pytest.raises(ValueError, match=r"tensor .* must have shape .* put the model back"):
        trained(model, data, tmp_path / "out", keep=9)
    llama(num_hidden_layers=1, bos_token_id=None, eos_token_id=1).save_pretrained(model)
    with pytest.raises(ValueError, match=r"tensor .* does not belong to this model"):
        trained(model, data, tmp_path / "out", keep=9)


def test_a_finished_run_is_left_alone(base: Path, tmp_path: Path) -> None:
    data, output = answers(tmp_path / "data.jsonl"), tmp_path / "out"
    row = trained(base, data, output)
    before = snapshot(output)
    assert trained(base, data, output, overwrite=True, save_every=3) == row
    assert snapshot(output) == before
    # What is lost of the results comes back from the checkpoint.
    (output / "adapter_model.safetensors").unlink()
    trained(base, data, output)
    assert (output / "adapter_model.safetensors").read_bytes() == before[str(output / "adapter_model.safetensors")][1]


def test_other_options_are_named(base: Path, tmp_path: Path) -> None:
    data, output = answers(tmp_path / "data.jsonl"), tmp_path / "out"
    trained(base, data, output)
    before = snapshot(output)
    with pytest.raises(ValueError, match=r"other options \(--lr 0.01, then 0.0005; --r 2, then 4\).*--overwrite"):
        trained(base, data, output, lr=0.01, r=2, alpha=8.0)
    answers(data, 13)
    with pytest.raises(ValueError, match="DATA has another content"):
        trained(base, data, output)
    assert snapshot(output) == before
    (output / "notes").write_text("kept")
    trained(base, data, output, overwrite=True, r=2)
    trained(base, data, tmp_path / "fresh", r=2)
    assert digest(output) == digest(tmp_path / "fresh")
    assert (output / "notes").read_text() == "kept"


def test_what_a_default_stands_for_is_no_difference(base: Path, tmp_path: Path) -> None:
    data = answers(tmp_path / "data.jsonl")
    plain = Options(model=str(base), data=data, output=tmp_path, device="cpu")
    said = Options(
        model=str(base), data=data, output=tmp_path, device="cpu", r=16, alpha=32, lr=5e-4, epochs=3.0, eval_share=0.1
    )
    assert differences(plain.settings(), said.settings()) == []


def test_an_output_that_is_something_else_is_kept(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, output = answers(tmp_path / "data.jsonl"), tmp_path / "out"
    output.mkdir()
    (output / "adapter_model.safetensors").write_text("precious")
    with pytest.raises(FileExistsError, match=r"adapter_model.safetensors.*--overwrite"):
        trained(base, data, output)
    model = tmp_path / "model"
    shutil.copytree(base, model)
    with pytest.raises(FileExistsError, match="directory of a model"):
        trained(model, data, model, overwrite=True)
    assert snapshot(model).keys() == {str(model / path.name) for path in base.iterdir()}
    monkeypatch.setattr(train_state, "LOCK_SECONDS", 0.0)
    with train_state.owned(tmp_path / "busy"), pytest.raises(BlockingIOError, match="another run"):
        trained(base, data, tmp_path / "busy")


def test_a_loss_that_is_not_finite_stops_the_run(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, output = answers(tmp_path / "data.jsonl"), tmp_path / "out"
    take_step = train_loop.Training.take_step

    def poisoned(self: train_loop.Training) -> float:
        if self.step == 3:
            with torch.no_grad():
                next(p for p in self.model.parameters() if p.requires_grad).fill_(float("nan"))
        return take_step(self)

    monkeypatch.setattr(train_loop.Training, "take_step", poisoned)
    with pytest.raises(ValueError, match=r"step 4: the loss is nan.*checkpoint-2 is kept.*--lr below 0.0005"):
        trained(base, data, output, save_every=2)
    assert list(train_state.checkpoints(output)) == [2]


# What the command line says


def test_mistakes_on_the_command_line_are_one_line(base: Path, encoder: Path, tmp_path: Path) -> None:
    data, output = answers(tmp_path / "data.jsonl"), tmp_path / "out"

    def fails(*arguments: Any, said: tuple[str, ...], model: Any = base, rows: Path = data) -> None:
        result = run("train", model, rows, output, *arguments)
        assert is_one_line_error(result, *said), result.output

    fails("--method", "magic", said=("--method", "lora", "dora", "'magic'"))
    fails("--schedule", "square", said=("--schedule", "linear", "cosine"))
    fails("--dtype", "int8", said=("--dtype", "bfloat16"))
    fails("--r", 0, said=("--r must be at least 1", "got 0"))
    fails("--lr", 0, said=("--lr must be above 0",))
    fails("--dropout", 1, said=("--dropout",))
    fails("--warmup", 1.5, said=("--warmup", "below 1"))
    fails("--max-length", 99, said=("--max-length must be at most 32", "got 99"))
    fails("--steps", 1, "--epochs", 1, said=("--steps and --epochs",))
    fails("--eval", data, "--eval-share", 0.5, said=("--eval and --eval-share",))
    fails("--target-modules", ",", said=("--target-modules",))
    fails("--target-modules", "nothing", "--device", "cpu", said=("'nothing'", "q_proj"))
    fails("--device", "toaster", said=("--device 'toaster'",))
    fails("--json", tmp_path, said=("is a directory",))
    fails(model=tmp_path / "nobody", said=("cannot load the model", "nobody"))
    fails(model=tmp_path, said=("no config.json",))
    fails(rows=tmp_path / "none.jsonl", said=("none.jsonl is not a file",))
    lines(tmp_path / "eval.jsonl", [{"text": "word1"}])
    fails("--eval", tmp_path / "eval.jsonl", said=("eval.jsonl, line 1", "'prompt' is missing"))
    csv_file = classes(tmp_path / "data.csv")
    (tmp_path / "eval.csv").write_text("text,label\nword1,maybe\n")
    fails("--eval", tmp_path / "eval.csv", rows=csv_file, said=("eval.csv, line 2", "'maybe'", "no, yes"))


def test_help_lists_the_options() -> None:
    result = run("train", "--help")
    assert result.exit_code == 0
    assert "--accumulate" in result.stdout
