"""The commands doctor, info and merge, and what a user sees of an error; test_demo.py has the demo."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import test_experts
import test_methods
import test_vision_methods
import torch
import typer
from safetensors.torch import load_file, save_file
from tiny_models import headed, llama, mixed, output, randomise, tokens, vit
from typer.testing import CliRunner

import fastadapt
from fastadapt.commands import doctor
from fastadapt.commands.cli import app, require_writable
from fastadapt.commands.info import describe_adapter, method_name
from fastadapt.methods import METHODS, AdapterConfig
from fastadapt.model.adapted import present

TARGETS = ["q_proj", "down_proj"]
CONFIGS = {
    "LoRA": fastadapt.LoRAConfig(r=4, lora_alpha=6, target_modules=TARGETS, task_type="CAUSAL_LM"),
    "DoRA": fastadapt.DoRAConfig(r=4, target_modules=TARGETS),
    "VeRA": fastadapt.VeRAConfig(r=8, target_modules=TARGETS),
    "DVoRA": fastadapt.VeRAConfig(r=8, target_modules=TARGETS, use_dora=True),
}


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def is_one_line_error(result: Any, *words: str) -> bool:
    """Exit code 2, and one line on stderr that has these words."""
    lines = result.stderr.splitlines()
    return result.exit_code == 2 and len(lines) == 1 and all(word in lines[0] for word in ("error: ", *words))


def unwrapped(text: str) -> str:
    """The words of a table, whatever lines they were wrapped into."""
    return " ".join(text.replace("│", " ").split())


@pytest.fixture
def base(tmp_path: Path) -> Path:
    llama().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def saved_adapter(directory: Path, config: Any) -> Any:
    """A tiny Llama with a random adapter, saved at `directory`."""
    torch.manual_seed(3)
    model = fastadapt.inject(llama(), config)
    randomise([parameter for parameter in model.parameters() if parameter.requires_grad])
    fastadapt.save_adapter(model, directory)
    return model


def edit_config(directory: Path, **changes: Any) -> None:
    file = directory / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize("method", CONFIGS)
def test_info_describes_an_adapter(tmp_path: Path, method: str) -> None:
    model = saved_adapter(tmp_path / "adapter", CONFIGS[method])
    result = run("info", tmp_path / "adapter")
    assert result.exit_code == 0, result.output
    text = unwrapped(result.stdout)
    assert method in text
    assert "can load it" in text
    assert "down_proj, q_proj" in text
    assert f"{fastadapt.trainable_parameters(model).trainable:,}" in text
    assert "F32" in text
    assert "layers 4 " in text
    assert ("of the frozen shared projection" in text) == ("VeRA" in method or "DVoRA" in method)
    assert f"{(tmp_path / 'adapter' / 'adapter_model.safetensors').stat().st_size:,} bytes" in text


def test_info_names_the_parameters_that_an_adapter_is_on(tmp_path: Path) -> None:
    for fields, said in (
        ({"target_parameters": test_experts.BOTH}, "the parameters experts.down_proj, experts.gate_up_proj"),
        ({"target_modules": ["q_proj"], "target_parameters": ["gate.weight"]}, "q_proj, the parameters gate.weight"),
    ):
        model = fastadapt.inject(test_experts.mixtral(), fastadapt.LoRAConfig(**fields))
        fastadapt.save_adapter(model, tmp_path)
        assert describe_adapter(tmp_path)["targets"] == said


class Saved(NamedTuple):
    """An adapter to save, of a model that has a head beside the layers that it adapts."""

    model: Callable[[], Any]
    config: AdapterConfig
    head: str


ADAPTERS = {
    **{
        name: Saved(test_methods.TwoLayers, replace(config, target_modules=["first"]), "second")
        for name, config in test_methods.CONFIGS.items()
    },
    **{f"{name}, ViT": Saved(vit, config, "classifier") for name, config in test_vision_methods.CONFIGS.items()},
    "LoRA, every kind": Saved(mixed, fastadapt.LoRAConfig(target_modules=["embed", "conv", "fc1"]), "head"),
    "SSF, every kind": Saved(mixed, fastadapt.SSFConfig(target_modules=["conv", "norm", "fc1"]), "head"),
    "VeRA, experts": Saved(
        test_experts.qwen3_moe,
        fastadapt.VeRAConfig(r=4, target_modules=["q_proj"], target_parameters=["experts.down_proj"]),
        "lm_head",
    ),
    "DVoRA, trained biases": Saved(
        vit, fastadapt.VeRAConfig(r=4, use_dora=True, bias="vera_only", target_modules=["q_proj", "fc1"]), "classifier"
    ),
}


def test_info_is_tested_with_every_method() -> None:
    assert {adapter.config.to_peft([])["peft_type"] for adapter in ADAPTERS.values()} == set(METHODS)


def numbers_of(text: str) -> list[int]:
    return [int(number.replace(",", "")) for number in re.findall(r"[\d,]*\d", text)]


@pytest.mark.parametrize("name", ADAPTERS)
def test_info_counts_the_layers_whatever_the_method(name: str, tmp_path: Path) -> None:
    adapter = ADAPTERS[name]
    with_head = replace(adapter.config, modules_to_save=[adapter.head])
    for config in (adapter.config, with_head):
        model = fastadapt.inject(adapter.model(), config)
        fastadapt.save_adapter(model, tmp_path)
        injection = present(model, "default")
        # An adapter without tensors, such as what hands AdaptFormer the input of a norm, leaves nothing in a file.
        tensors = [found for found in (a.checkpoint_tensors() for a in injection.adapters.values()) if found]
        shared = [module.state_dict() for module in config.shared_tensors(injection.adapters).values()]
        copies = [module.state_dict() for module in injection.copies.values()]
        facts = describe_adapter(tmp_path)
        assert facts["layers"] == str(len(tensors)) != "0"
        sizes = [sum(t.numel() for found in kind for t in found.values()) for kind in (tensors, shared, copies)]
        assert numbers_of(facts["parameters"]) == [sizes[0], *(size for size in sizes[1:] if size)]
        assert ("shared projection" in facts["parameters"]) == bool(sizes[1])
        assert ("modules_to_save" in facts["parameters"]) == (config is with_head)
        assert "other tensors" not in facts


def test_info_shows_the_dropout_of_each_method_and_no_rank_where_there_is_none(tmp_path: Path) -> None:
    for config in (
        fastadapt.HiRAConfig(r=3, hira_dropout=0.25, target_modules=["first"]),
        fastadapt.RepAdapterConfig(r=3, groups=1, adapter_dropout=0.25, target_modules=["first"]),
        fastadapt.LoRAConfig(r=3, lora_dropout=0.25, target_modules=["first"]),
    ):
        saved = fastadapt.inject(test_methods.TwoLayers(), config)
        fastadapt.save_adapter(saved, tmp_path)
        facts = describe_adapter(tmp_path)
        assert (facts["r"], facts["dropout"]) == ("3", "0.25")
    fastadapt.save_adapter(fastadapt.inject(test_methods.TwoLayers(), test_methods.CONFIGS["SSF"]), tmp_path)
    facts = describe_adapter(tmp_path)
    assert (facts["r"], facts["dropout"]) == ("-", "-")


def test_info_counts_no_layer_for_what_belongs_to_none(tmp_path: Path) -> None:
    saved_adapter(tmp_path, CONFIGS["LoRA"])
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    extra = {"base_model.model.model.embed_tokens.base_layer.weight": 6, "base_model.vera_A": 5, "lora_A.weight": 4}
    before = describe_adapter(tmp_path)
    save_file({**tensors, **{name: torch.zeros(size) for name, size in extra.items()}}, file)
    facts = describe_adapter(tmp_path)
    assert facts["layers"] == before["layers"] == "4"
    assert facts["parameters"] == f"{before['parameters']}, and 15 in other tensors"
    assert "(and 2 more)" in facts["other tensors"]


def test_info_says_that_it_cannot_count_the_layers_of_a_method_that_it_does_not_know(tmp_path: Path) -> None:
    saved_adapter(tmp_path, CONFIGS["LoRA"])
    total = numbers_of(describe_adapter(tmp_path)["parameters"])
    for peft_type in ("LOHA", None, ["LORA"]):
        edit_config(tmp_path, peft_type=peft_type)
        facts = describe_adapter(tmp_path)
        assert facts["method"] == str(peft_type)
        assert facts["layers"].startswith("unknown: ")
        assert numbers_of(facts["parameters"]) == total
        assert facts["fastadapt"].startswith("cannot load it: ")


def test_info_says_why_an_adapter_cannot_be_loaded(tmp_path: Path) -> None:
    saved_adapter(tmp_path, CONFIGS["LoRA"])
    edit_config(tmp_path, use_qalora=True)
    result = run("info", tmp_path)
    assert result.exit_code == 0
    assert "cannot load it: " in result.stdout
    assert "use_qalora=True" in result.stdout
    edit_config(tmp_path, use_qalora=False, peft_type="SOMETHING")
    result = run("info", tmp_path)
    assert "SOMETHING" in result.stdout
    assert "cannot load it" in result.stdout


def test_info_shows_what_loading_would_warn_of(tmp_path: Path) -> None:
    saved_adapter(tmp_path, CONFIGS["LoRA"])
    edit_config(tmp_path, some_new_field=7)
    result = run("info", tmp_path)
    assert result.exit_code == 0
    assert "some_new_field" in result.stdout


def test_info_names_what_is_missing_or_broken(tmp_path: Path) -> None:
    assert is_one_line_error(run("info", tmp_path / "nowhere"), str(tmp_path / "nowhere"))
    assert is_one_line_error(run("info", tmp_path), "adapter_config.json")
    saved_adapter(tmp_path / "a", CONFIGS["LoRA"])
    tensors = tmp_path / "a" / "adapter_model.safetensors"
    tensors.write_bytes(b"no header")
    assert is_one_line_error(run("info", tmp_path / "a"))
    tensors.unlink()
    assert is_one_line_error(run("info", tmp_path / "a"), "adapter_model.safetensors")
    (tmp_path / "a" / "adapter_model.bin").write_bytes(b"")
    assert is_one_line_error(run("info", tmp_path / "a"), "pickle")
    for text in ("{", "[]"):
        (tmp_path / "a" / "adapter_config.json").write_text(text)
        assert is_one_line_error(run("info", tmp_path / "a"), "adapter_config.json")


def test_method_names() -> None:
    assert method_name({"peft_type": "LORA"}) == "LoRA"
    assert method_name({"peft_type": "LORA", "use_rslora": True}) == "LoRA with rsLoRA's scaling"
    assert method_name({"peft_type": "LORA", "use_dora": True}) == "DoRA"
    assert method_name({"peft_type": "ADALORA"}) == "AdaLoRA"
    assert method_name({"peft_type": "LORA", "init_lora_weights": "eva"}) == "LoRA, started by EVA"
    assert method_name({"peft_type": "LOHA"}) == "LOHA"
    own = {peft_type: method_name({"peft_type": peft_type}) for peft_type in METHODS}
    assert own == {
        "LORA": "LoRA",
        "LORA_DROP": "LoRA-drop",
        "DELTA_LORA": "Delta-LoRA",
        "VERA": "VeRA",
        "VERA_EXPERTS": "VeRA",
        "DVORA": "DVoRA (VeRA with a magnitude)",
        "ADALORA": "AdaLoRA",
        "GLORA": "GLoRA",
        "GLORA_MIXED": "GLoRA",
        "HIRA": "HiRA",
        "SSF": "SSF",
        "REPADAPTER": "RepAdapter",
        "ADAPTFORMER": "AdaptFormer",
        "VPT": "VPT",
        "NOAH": "NOAH",
    }
    assert method_name({"peft_type": "GLORA_MIXED", "supernet": True}) == "GLoRA, a supernet"
    pattern = {".*": ["none"] * 5}
    assert method_name({"peft_type": "GLORA_MIXED", "support_pattern": pattern}) == "GLoRA, supports by layer"


@pytest.mark.parametrize("method", CONFIGS)
def test_merge_writes_a_plain_model_with_the_adapter_in_it(base: Path, tmp_path: Path, method: str) -> None:
    from transformers import AutoModelForCausalLM

    adapted = saved_adapter(tmp_path / "adapter", CONFIGS[method]).eval()
    result = run("merge", base, tmp_path / "adapter", tmp_path / "merged")
    assert result.exit_code == 0, result.output
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        torch.testing.assert_close(output(merged, tokens()), output(adapted, tokens()), rtol=1e-4, atol=1e-5)
    assert "has no tokenizer" in result.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base", "merged"]


@pytest.mark.parametrize(
    ("base_name", "name", "task", "head"),
    [
        ("LlamaForCausalLM", "LlamaForSequenceClassification", "SEQ_CLS", "score"),
        ("DistilBertModel", "DistilBertForSequenceClassification", "SEQ_CLS", "classifier"),
        ("BertForMaskedLM", "BertForTokenClassification", "TOKEN_CLS", "classifier"),
        ("RobertaModel", "RobertaForQuestionAnswering", "QUESTION_ANS", "qa_outputs"),
    ],
)
def test_merge_and_info_of_a_head_from_peft(tmp_path: Path, base_name: str, name: str, task: str, head: str) -> None:
    import transformers
    from peft import LoraConfig, get_peft_model

    headed(base_name, num_labels=2).save_pretrained(tmp_path / "base")
    kind, labels = getattr(transformers, name), 2 if task == "QUESTION_ANS" else 5
    start = kind.from_pretrained(tmp_path / "base", num_labels=labels)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT calls what transformers deprecates
        theirs = get_peft_model(start, LoraConfig(r=2, target_modules=r".*(q_proj|q_lin|query)", task_type=task)).eval()
        randomise([parameter for parameter in theirs.parameters() if parameter.requires_grad])
        theirs.save_pretrained(tmp_path / "adapter")
    result = run("info", tmp_path / "adapter")
    other = f"(no tensors of {'classifier' if head == 'score' else 'score'})" if labels == 5 else ""
    assert f"modules_to_save {head} {other}".strip() in unwrapped(result.stdout)
    assert "can load it" in unwrapped(result.stdout)
    result = run("merge", tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    assert result.exit_code == 0, result.output
    merged = kind.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        torch.testing.assert_close(output(merged, tokens()), output(theirs, tokens()), rtol=1e-4, atol=1e-5)


def test_merge_takes_labels_alone_from_the_adapters_config(tmp_path: Path) -> None:
    import transformers

    headed("LlamaForCausalLM").save_pretrained(tmp_path / "base")
    names = {0: "no", 1: "yes", 2: "perhaps"}
    start = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", id2label=names)
    config = fastadapt.LoRAConfig(r=2, target_modules=["q_proj"], task_type="SEQ_CLS", modules_to_save=["score"])
    adapted = fastadapt.inject(start, config)
    fastadapt.save_adapter(adapted, tmp_path / "adapter")
    written = {**start.config.to_dict(), "architectures": ["Other"], "auto_map": {"AutoConfig": "evil.Config"}}
    path = tmp_path / "adapter" / "config.json"
    path.write_text(json.dumps(written | {"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}}))
    result = run("merge", tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    assert result.exit_code == 0, result.output
    merged = transformers.AutoConfig.from_pretrained(tmp_path / "merged")
    assert merged.id2label == names
    assert merged.rope_parameters == start.config.rope_parameters
    for change in ({"hidden_act": "relu"}, {"intermediate_size": 56}, {"vocab_size": 10**9}, {"model_type": "evil"}):
        path.write_text(json.dumps(written | change))
        result = run("merge", tmp_path / "base", tmp_path / "adapter", tmp_path / "other")
        assert is_one_line_error(result, next(iter(change)), "merge the adapter into the model that it was trained on")
    path.write_text(json.dumps(written | {"id2label": {"x": 1}}))
    assert is_one_line_error(run("merge", tmp_path / "base", tmp_path / "adapter", tmp_path / "other"), "id2label")


def test_merge_refuses_a_head_that_nobody_trained(tmp_path: Path) -> None:
    headed("BertForMaskedLM").save_pretrained(tmp_path / "base")
    model = headed("BertForSequenceClassification")
    config = fastadapt.LoRAConfig(r=2, target_modules=["query"], task_type="SEQ_CLS")
    fastadapt.save_adapter(fastadapt.inject(model, config), tmp_path / "adapter")
    result = run("merge", tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    assert is_one_line_error(result, "no weights for bert.pooler.dense.bias", "the adapter brings none")


def test_merge_takes_the_tokenizer_along(base: Path, tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<unk>": 0, "hello": 1}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(base)
    saved_adapter(tmp_path / "adapter", CONFIGS["LoRA"])
    assert run("merge", base, tmp_path / "adapter", tmp_path / "merged").exit_code == 0
    assert AutoTokenizer.from_pretrained(tmp_path / "merged")("hello")["input_ids"] == [1]


def test_merge_keeps_the_dtype_of_the_base(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    llama().to(torch.bfloat16).save_pretrained(tmp_path / "base")
    saved_adapter(tmp_path / "adapter", CONFIGS["LoRA"])
    assert run("merge", tmp_path / "base", tmp_path / "adapter", tmp_path / "merged").exit_code == 0
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto").dtype == torch.bfloat16


def test_merge_replaces_an_existing_directory_only_when_told(base: Path, tmp_path: Path) -> None:
    saved_adapter(tmp_path / "adapter", CONFIGS["LoRA"])
    merged = tmp_path / "merged"
    merged.mkdir()
    (merged / "precious").write_text("kept")
    assert is_one_line_error(run("merge", base, tmp_path / "adapter", merged), str(merged), "--force")
    assert (merged / "precious").read_text() == "kept"
    assert run("merge", base, tmp_path / "adapter", merged, "--force").exit_code == 0
    assert not (merged / "precious").exists()
    assert (merged / "model.safetensors").is_file()


def test_merge_leaves_everything_as_it_was_when_it_fails(base: Path, tmp_path: Path) -> None:
    saved_adapter(tmp_path / "adapter", CONFIGS["LoRA"])
    merged = tmp_path / "merged"
    shutil.copytree(base, merged)
    llama(hidden_size=64).save_pretrained(tmp_path / "other")
    before = sorted(path.name for path in tmp_path.iterdir())
    result = run("merge", tmp_path / "other", tmp_path / "adapter", merged, "--force")
    assert is_one_line_error(result, "another model")
    assert is_one_line_error(run("merge", tmp_path / "adapter", tmp_path / "adapter", merged, "--force"), "config.json")
    assert is_one_line_error(run("merge", base, tmp_path / "none", merged, "--force"), "adapter_config.json")
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert (merged / "model.safetensors").read_bytes() == (base / "model.safetensors").read_bytes()


@pytest.mark.parametrize("umask", [0o022, 0o027], ids=oct)
def test_a_merged_model_is_for_whom_the_umask_says(
    base: Path, tmp_path: Path, umask: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import PreTrainedModel

    save = PreTrainedModel.save_pretrained

    def sharded(model: Any, directory: Path) -> None:
        save(model, directory, max_shard_size="20KB")

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", sharded)
    saved_adapter(tmp_path / "adapter", CONFIGS["LoRA"])
    before = os.umask(umask)
    try:
        assert run("merge", base, tmp_path / "adapter", tmp_path / "merged").exit_code == 0
    finally:
        os.umask(before)
    files = list((tmp_path / "merged").iterdir())
    assert len([path for path in files if path.suffix == ".safetensors"]) > 1
    assert {path.stat().st_mode & 0o777 for path in files} == {0o666 & ~umask}
    assert (tmp_path / "merged").stat().st_mode & 0o777 == 0o777 & ~umask


def test_a_merge_that_dies_while_it_saves_leaves_the_old_model(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import LlamaConfig

    saved_adapter(tmp_path / "adapter", CONFIGS["LoRA"])
    merged = tmp_path / "merged"
    shutil.copytree(base, merged)
    before = {path.relative_to(tmp_path): path.read_bytes() for path in tmp_path.rglob("*.*")}

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(LlamaConfig, "save_pretrained", full)
    assert is_one_line_error(run("merge", base, tmp_path / "adapter", merged, "--force"), "No space left")
    assert {path.relative_to(tmp_path): path.read_bytes() for path in tmp_path.rglob("*.*")} == before


def test_doctor_tests_every_operator_and_writes_the_same_as_json(tmp_path: Path) -> None:
    result = run("doctor", "--json", tmp_path / "doctor.json")
    assert result.exit_code == 0, result.output
    document = json.loads((tmp_path / "doctor.json").read_text())
    rows = document["rows"]
    assert all(row["ok"] for row in rows)
    assert {row["operator"] for row in rows} == set(doctor.OPERATORS)
    assert {row["dtype"] for row in rows} == set(doctor.DTYPES)
    # The tests run Triton's kernels too, through the interpreter or on a GPU.
    assert {row["backend"] for row in rows} == {"eager", "triton"}
    everything = next(row for row in rows if row["case"] == "every part")
    gradients = {"dx", "dA", "dB", "dmid_scale", "dout_scale", "dbase_scale", "dbias"}
    assert {name.removeprefix("error_") for name in everything if name.startswith("error_")} == gradients | {"y"}
    assert {choice["operator"] for choice in document["backends"]} == set(doctor.OPERATORS)
    assert "torch" in result.stdout
    assert "all operators agree" in result.stdout


def test_doctor_without_triton_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "HAS_TRITON", False)
    monkeypatch.setattr(doctor, "CASES", doctor.CASES[:1])
    result = run("doctor")
    assert result.exit_code == 0, result.output
    assert "Triton is not installed" in " ".join(result.stdout.split())


def wrong(*arguments: Any, **named: Any) -> torch.Tensor:
    return 1.01 * fastadapt.functional.adapter_linear(*arguments, **named)


def broken(*arguments: Any, **named: Any) -> torch.Tensor:
    raise RuntimeError("the kernel does not compile")


def not_finite(*arguments: Any, **named: Any) -> torch.Tensor:
    return float("nan") * fastadapt.functional.adapter_linear(*arguments, **named)


@pytest.mark.parametrize(("operator", "said"), [(wrong, "y; dA"), (broken, "does not compile"), (not_finite, "y; dA")])
def test_doctor_finds_an_operator_that_is_wrong(monkeypatch: pytest.MonkeyPatch, operator: Any, said: str) -> None:
    monkeypatch.setattr(doctor, "adapter_linear", operator)
    monkeypatch.setattr(doctor, "HAS_TRITON", False)
    monkeypatch.setattr(doctor, "CASES", [doctor.CASES[0], doctor.CASES[-1]])
    result = run("doctor")
    assert result.exit_code == 1
    assert "FAILED: adapter_linear, LoRA, cpu, eager, fp32: " in result.stdout
    assert said in " ".join(result.stdout.split())
    assert f"FAILED: {doctor.CASES[-1].operator}" not in result.stdout


def test_a_json_file_that_cannot_be_written_is_refused_at_once(tmp_path: Path) -> None:
    assert is_one_line_error(run("doctor", "--json", tmp_path), "is a directory")
    (tmp_path / "file").write_text("")
    assert is_one_line_error(run("demo", "--json", tmp_path / "file" / "out.json"), str(tmp_path / "file"))


def test_results_may_go_into_a_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)  # as /dev is for most users
    require_writable(Path(os.devnull))
    with pytest.raises(typer.Exit):
        require_writable(tmp_path / "out.json")


def test_a_missing_extra_is_one_line_that_says_the_cure() -> None:
    program = (
        "import sys\n"
        "sys.modules[{package!r}] = None  # an import of it now fails as if it were not installed\n"
        "sys.argv = ['fastadapt', 'merge', 'a', 'b', 'c']\n"
        "from fastadapt.commands.cli import main\n"
        "main()\n"
    )
    for package, extra in {"typer": "cli", "rich": "cli", "transformers": "train"}.items():
        done = subprocess.run([sys.executable, "-c", program.format(package=package)], capture_output=True, text=True)
        assert done.returncode == 2, done.stderr
        assert done.stderr.count("\n") == 1, done.stderr
        assert package in done.stderr
        assert f'pip install "fastadapt[{extra}]"' in done.stderr


def test_help_lists_the_commands() -> None:
    result = run("--help")
    assert result.exit_code == 0
    assert all(command in result.stdout for command in ("demo", "doctor", "info", "merge"))
