"""`fastadapt generate`: rows of prompts, each with its adapter, answered in mixed batches."""

from __future__ import annotations

import copy
import json
import os
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


def alone(root: Path, model: Any, prompt: str, adapter: str | None, new: int = NEW) -> str:
    """The answer of one adapter by itself, without any serving code."""
    own = copy.deepcopy(model)
    if adapter is not None:
        load_adapter(own, root / "adapters" / adapter)
    words = tokenizer()
    ids = torch.tensor([words(prompt)["input_ids"]])
    output = own.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, pad_token_id=1
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


def test_rows_have_settings_of_their_own(root: Path, model: Any) -> None:
    row = {"prompt": "word1 word2", "adapter": "poems"}
    whole = alone(root, model, "word1 word2", "poems")
    words = whole.split()
    rows: list[dict[str, Any]] = [
        row,
        row | {"max_new_tokens": 1},
        row | {"stop": words[1]},
        row | {"stop": ["nothing", f"{words[2]}"]},
        row | {"temperature": 1e-40},
        row | {"temperature": 1e-320, "top_p": 1e-9},
        row | {"temperature": 5.0, "seed": 3},
        row | {"temperature": 5.0, "seed": 3},
        row | {"temperature": 5.0, "seed": 4},
    ]
    found, _ = run(root, [json.dumps(row) for row in rows])
    assert [answer["text"] for answer in found[:2]] == [whole, alone(root, model, "word1 word2", "poems", 1)]
    assert found[2]["text"] == whole[: whole.index(words[1])]
    assert found[3]["text"] == whole[: whole.index(words[2])]
    assert [answer["text"] for answer in found[4:6]] == [whole, whole]
    assert found[6]["text"] == found[7]["text"] != found[8]["text"]
    assert [answer["ended"] for answer in found] == ["length", "length", "stop", "stop", *["length"] * 5]
    # Whoever is beside it: the same random numbers.
    apart, _ = run(root, [json.dumps(rows[6])], "--batch-size", "1")
    assert apart[0]["text"] == found[6]["text"]


def test_an_answer_that_ends_by_itself_says_so(root: Path, model: Any, tmp_path: Path) -> None:
    """Of a model that only ever says <eos>, as a chat model does after a bare prompt."""
    ending = copy.deepcopy(model)
    with torch.no_grad():
        ending.lm_head.weight.zero_()[1] = 0.0
        ending.lm_head.bias = torch.nn.Parameter(torch.eye(ending.lm_head.weight.shape[0])[1])
    from transformers import AutoModelForCausalLM

    (answer,), _ = run(root, [json.dumps({"prompt": "word1"})])
    assert answer["ended"] == "length"
    monkey = pytest.MonkeyPatch()
    with monkey.context() as patch:
        load = AutoModelForCausalLM.from_pretrained
        patch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *a, **k: (ending, load(*a, **k)[1]))
        (answer,), _ = run(root, [json.dumps({"prompt": "word1"})])
    assert answer == {"line": 1, "adapter": None, "text": "", "tokens": 0, "ended": "eos"}


def test_odd_rows_are_errors_that_name_their_adapter(root: Path, model: Any) -> None:
    odd: dict[str, str] = {
        '{"prompt": "word1 \\ud800", "adapter": "sql"}': "lone surrogates",
        '{"messages": [{"role": "user", "content": "\\ud800"}], "adapter": "sql"}': "surrogates",
        json.dumps({"prompt": "word1", "adapter": "sql", "adaptor": "poems"}): "got 'adaptor'",
        '{"prompt": "word1", "prompt": "word2", "adapter": "sql"}': "'prompt' must be there once",
        json.dumps({"prompt": "word1", "adapter": "sql", "max_new_tokens": 0}): "max_new_tokens must be at least 1",
        json.dumps({"prompt": "word1", "adapter": "sql", "max_new_tokens": True}): "must be a whole number",
        json.dumps({"prompt": "word1", "adapter": "sql", "max_new_tokens": 32}): "the model's positions",
        json.dumps({"prompt": "word1", "adapter": "sql", "temperature": -1}): "temperature must be 0",
        '{"prompt": "word1", "adapter": "sql", "temperature": NaN}': "temperature must be 0",
        json.dumps({"prompt": "word1", "adapter": "sql", "temperature": "hot"}): "temperature must be a number",
        json.dumps({"prompt": "word1", "adapter": "sql", "top_p": 0}): "top_p must be in",
        json.dumps({"prompt": "word1", "adapter": "sql", "seed": -1}): "seed must be in",
        json.dumps({"prompt": "word1", "adapter": "sql", "stop": [""]}): "stop must be a text",
        json.dumps({"prompt": ["word1"], "adapter": "sql"}): "must have a prompt",
        '{"adapter": "sql", "messages": ' + "[" * 500 + "]" * 500 + "}": "chat template refuses",
    }
    bare = {"[" * 100_000: "not JSON", '{"prompt": "word1", "adapter": "\\ud800"}': "its name must be a path"}
    good = json.dumps({"prompt": "word1 word2", "adapter": "sql"})
    found, _ = run(root, [good, *odd, *bare, good], "--batch-size", "30")
    expected = alone(root, model, "word1 word2", "sql")
    assert found[0]["text"] == found[-1]["text"] == expected
    for (text, message), answer in zip((odd | bare).items(), found[1:-1], strict=True):
        assert message in answer["error"], (text[:80], answer)
        assert text not in odd or answer["adapter"] == "sql"


@pytest.mark.parametrize("temperature", ["0", "1"])
def test_logits_that_are_no_numbers_are_that_rows_error(root: Path, model: Any, temperature: str) -> None:
    huge = inject(copy.deepcopy(model), CONFIGS["sql"])
    randomise([parameter for parameter in huge.parameters() if parameter.requires_grad])
    with torch.no_grad():
        for parameter in huge.parameters():
            if parameter.requires_grad:
                parameter.mul_(1e18)
    save_adapter(huge, root / "adapters" / "huge")
    rows = [{"prompt": "word1 word2", "adapter": name} for name in ("sql", "huge", "poems")]
    found, _ = run(root, [json.dumps(row) for row in rows], "--temperature", temperature)
    assert "NaN or infinite" in found[1]["error"]
    assert found[1]["adapter"] == "huge"
    if temperature == "0":
        for index in (0, 2):
            assert found[index]["text"] == alone(root, model, "word1 word2", rows[index]["adapter"])
    else:
        assert all("text" in found[index] for index in (0, 2))


def test_infinite_heat_still_leaves_masked_tokens_out(model: Any) -> None:
    from fastadapt.commands.answers import Answers
    from fastadapt.commands.prompts import Prompt, Settings

    rows = [Prompt(1, None, [1], Settings(1, float("inf"), 1.0, seed), tokenizer()) for seed in range(20)]
    scores = torch.full((1, 8), -torch.inf)
    scores[0, 3], scores[0, 5] = 0.0, 90.0
    chosen = {int(Answers([row], 1, []).pick(scores.clone()).argmax()) for row in rows}
    assert chosen == {3, 5}


def test_no_cap_but_the_models_positions(root: Path, tmp_path: Path) -> None:
    long = llama(bos_token_id=None, eos_token_id=1, max_position_embeddings=1600)
    long.save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    (tmp_path / "adapters").symlink_to(root / "adapters")
    rows = [json.dumps({"prompt": "word1 " * count, "adapter": "sql"}) for count in (1500, 1599)]
    found, _ = run(tmp_path, rows)
    assert found[0]["tokens"] == NEW
    assert "it may have 1600" in found[1]["error"]
    found, _ = run(tmp_path, rows, "--max-length", "1000")
    assert "it may have 1000" in found[0]["error"]
    result = CliRunner().invoke(app, ["generate", *map(str, _arguments(tmp_path)), "--max-length", "1601"])
    assert result.exit_code == 2
    assert "--max-length must be at most 1600, the model's positions, got 1601" in " ".join(result.stderr.split())


def _arguments(root: Path) -> list[Path]:
    return [root / "base", root / "adapters", root / "prompts.jsonl"]


def test_rows_that_go_on_for_longer_than_their_neighbours_have_positions(root: Path, model: Any) -> None:
    rows = [{"prompt": "word1 " * 30, "max_new_tokens": 2}, {"prompt": "word2 word3", "max_new_tokens": 9}]
    found, _ = run(root, [json.dumps(row | {"adapter": "sql"}) for row in rows])
    assert [answer["text"] for answer in found] == [
        alone(root, model, "word1 " * 30, "sql", 2),
        alone(root, model, "word2 word3", "sql", 9),
    ]


def test_prompts_go_through_the_template_where_that_is_asked_for(root: Path, model: Any) -> None:
    templated = "<|user|> word1 word2 <eos> <|assistant|>"
    (answer,), _ = run(root, [json.dumps({"prompt": "word1 word2"})], "--chat")
    assert answer["text"] == alone(root, model, templated, None) != alone(root, model, "word1 word2", None)


def test_an_adapters_own_template_and_tokenizer(root: Path, model: Any) -> None:
    template = "{% for message in messages %}word30 {{ message['content'] }} {% endfor %}word31"
    for name, change in (("templated", "template"), ("looped", "loop"), ("worded", "words"), ("larger", "more")):
        directory = root / "adapters" / name
        save_adapter(load_adapter(copy.deepcopy(model), root / "adapters" / "sql"), directory)
        if change == "template":
            (directory / "chat_template.jinja").write_text(template)
        elif change == "loop":
            loops = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
            (directory / "tokenizer_config.json").write_text(json.dumps({"chat_template": loops}))
        else:
            own = tokenizer()
            own.add_tokens([*(f"new{index}" for index in range(20)), "brandnew"])
            if change == "words":  # that the model has had a row for all along
                text = json.loads(own.backend_tokenizer.to_str())
                text["added_tokens"] = []
                text["model"]["vocab"] = {
                    ("brandnew" if word == "word40" else word): index for word, index in text["model"]["vocab"].items()
                }
                from tokenizers import Tokenizer
                from transformers import PreTrainedTokenizerFast

                own = PreTrainedTokenizerFast(
                    tokenizer_object=Tokenizer.from_str(json.dumps(text)), unk_token="<unk>", eos_token="<eos>"
                )
            own.save_pretrained(directory)
    messages = [{"role": "user", "content": "word1"}]
    rows = [
        {"messages": messages, "adapter": "templated"},
        {"messages": messages, "adapter": "sql"},
        {"prompt": "word1 brandnew", "adapter": "worded"},
        {"prompt": "word1 brandnew", "adapter": "larger"},
        {"messages": messages, "adapter": "looped"},
    ]
    found, _ = run(root, [json.dumps(row) for row in rows])
    assert found[0]["text"] == alone(root, model, "word30 word1 word31", "sql")
    assert found[1]["text"] == alone(root, model, "<|user|> word1 <eos> <|assistant|>", "sql")
    assert found[2]["text"].replace("brandnew", "word40") == alone(root, model, "word1 word40", "sql")
    assert "the adapter's tokenizer gives token" in found[3]["error"]
    assert "takes longer than" in found[4]["error"]
    outside = root / "secret.jinja"
    outside.write_text("word30")
    (root / "adapters" / "templated" / "chat_template.jinja").unlink()
    (root / "adapters" / "templated" / "chat_template.jinja").symlink_to(outside)
    (answer,), _ = run(root, [json.dumps(rows[0])])
    assert "leads out of the adapters' directory" in answer["error"]


def test_a_sparse_file_takes_no_memory(root: Path) -> None:
    sparse = root / "adapters" / "sparse"
    sparse.mkdir()
    (sparse / "adapter_model.safetensors").touch()
    (sparse / "adapter_config.json").write_text("{}")
    data = root / "sparse.jsonl"
    data.write_text(json.dumps({"prompt": "word1", "adapter": "sparse"}))
    options = Options(model="m", adapters=root / "adapters", data=data)
    for size in (1 << 30, 8 << 40):
        os.truncate(sparse / "adapter_model.safetensors", size)
        assert generate._budget(options) == generate.SPARE_BYTES


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
        ({"max_length": 1}, "--max-length must be at least 2"),
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
