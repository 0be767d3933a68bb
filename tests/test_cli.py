"""The commands doctor, info and merge, and what a user sees of an error; test_demo.py has the demo."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from tiny_models import llama, output, randomise, tokens
from typer.testing import CliRunner

import fastadapt
from fastadapt import doctor
from fastadapt.cli import app, method_name, require_writable

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
    assert "FAILED: weight_norm" not in result.stdout


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
        "from fastadapt.cli import main\n"
        "main()\n"
    )
    for package in ("typer", "rich", "transformers"):
        done = subprocess.run([sys.executable, "-c", program.format(package=package)], capture_output=True, text=True)
        assert done.returncode == 2, done.stderr
        assert done.stderr.count("\n") == 1, done.stderr
        assert package in done.stderr
        assert 'pip install "fastadapt[demo]"' in done.stderr


def test_help_lists_the_commands() -> None:
    result = run("--help")
    assert result.exit_code == 0
    assert all(command in result.stdout for command in ("demo", "doctor", "info", "merge"))
