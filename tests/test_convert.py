"""`fastadapt convert`: the way there and back gives the same bytes, and what a layout cannot hold is refused."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_layouts import kohya, mlx_directory
from tiny_models import llama, output, randomise, tokens
from tiny_pipelines import BLOCK, RESNET, TEXT, Tree, factors, save_weights, text_encoder, unet
from torch import Tensor, nn
from typer.testing import CliRunner

from fastadapt import AdaLoRAConfig, DoRAConfig, LoRAConfig, VeRAConfig, inject, load_adapter, save_adapter
from fastadapt.commands import convert as convert_module
from fastadapt.commands.cli import app
from fastadapt.methods import patterns
from fastadapt.model.peft_files import CONFIG_FILE, TENSOR_FILE
from fastadapt.serving import Limits

FILE = "pytorch_lora_weights.safetensors"


def convert(*arguments: Any) -> str:
    """What the command prints, which must succeed."""
    result = CliRunner().invoke(app, ["convert", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    return " ".join(result.output.split())


def refused(*arguments: Any) -> str:
    """The one line that the command ends with."""
    result = CliRunner().invoke(app, ["convert", *map(str, arguments)])
    assert result.exit_code == 2, result.output
    last = result.output.splitlines()[-1]
    assert last.startswith("error: "), result.output
    return last


def files(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def saved(directory: Path, config: Any, model: Any = None) -> Path:
    model = inject(unet() if model is None else model, config)
    torch.manual_seed(3)
    randomise([parameter for parameter in model.parameters() if parameter.requires_grad])
    save_adapter(model, directory)
    return directory


TO_Q = ["to_q", "to_k", "to_out.0"]
CONFIGS: dict[str, Callable[[], LoRAConfig]] = {
    "LoRA": lambda: LoRAConfig(r=2, lora_alpha=3, target_modules=TO_Q),
    # Of two keys that match, the first wins: their order must survive.
    "patterns": lambda: LoRAConfig(
        r=2, target_modules=TO_Q, rank_pattern={"to_q": 4, "attn1.to_q": 3, "to_k": 1}, alpha_pattern={"to_k": 5}
    ),
    "rsLoRA": lambda: LoRAConfig(r=3, target_modules=TO_Q, use_rslora=True),
    "DoRA": lambda: DoRAConfig(r=2, target_modules=TO_Q),
    "convolutions": lambda: LoRAConfig(r=2, target_modules=["conv1", "conv_in", "to_q"]),
    "an expression": lambda: LoRAConfig(r=2, target_modules=r".*\.to_[qk]"),
    "biases of B": lambda: LoRAConfig(r=2, target_modules=TO_Q, lora_bias=True, lora_dropout=0.1),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_from_peft_to_diffusers_and_back_are_the_same_bytes(case: str, tmp_path: Path) -> None:
    there = saved(tmp_path / "peft", CONFIGS[case]())
    convert(there, tmp_path / "diffusers", "--to", "diffusers", "--component", "unet")
    assert [*files(tmp_path / "diffusers")] == [FILE]
    convert(tmp_path / "diffusers", tmp_path / "back", "--to", "peft")
    assert files(tmp_path / "back") == files(there)
    got, want = load_adapter(unet(), tmp_path / "diffusers")(3), load_adapter(unet(), there)(3)
    assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("through", ["peft", "diffusers"])
def test_from_kohya_and_back_are_the_same_bytes(through: str, dora: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    base = save_weights(unet(), tmp_path / "base" / "model.safetensors")
    tensors: dict[str, Tensor] = {}
    for seed, (name, r, alpha) in enumerate([("to_q", 2, 1.0), ("to_out.0", 3, 0.1), ("to_k", 2, 8.0)]):
        path = f"{BLOCK}.{name}"
        A, B = factors(unet().get_submodule(path), r, seed)
        others = {"alpha": torch.tensor(alpha)} | ({"dora_scale": torch.rand(8, 1) + 0.5} if dora else {})
        tensors |= kohya(path, A, B, **others)
    if not dora:
        A, B = factors(unet().get_submodule(f"{RESNET}.conv1"), 2, 9)
        tensors |= kohya(f"{RESNET}.conv1", A, B, alpha=torch.tensor(4.0))
    there = tmp_path / "there.safetensors"
    save_file({name: value.to(dtype) for name, value in tensors.items()}, there, metadata={"format": "pt"})
    between = tmp_path / "between"
    convert(there, between, "--to", through, "--model", base)
    convert(between, tmp_path / "back.safetensors", "--to", "kohya", *(["--component", "unet"] * (through == "peft")))
    assert (tmp_path / "back.safetensors").read_bytes() == there.read_bytes()
    want = load_adapter(unet(), there)(3)
    assert torch.equal(load_adapter(unet(), between)(3), want)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if through == "peft":  # and PEFT reads it
            theirs = peft.PeftModel.from_pretrained(unet(), between).eval()
            torch.testing.assert_close(theirs(3).detach(), want, rtol=1e-4, atol=1e-4)


def test_a_pipelines_components_go_together(tmp_path: Path) -> None:
    models = {"unet": (unet, f"{BLOCK}.to_q"), "text_encoder": (text_encoder, f"{TEXT}.mlp.fc1")}
    models["text_encoder_2"] = (lambda: text_encoder(9), f"{TEXT}.mlp.fc1")
    prefixes = {"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}
    tensors: dict[str, Tensor] = {}
    for name, (model, path) in models.items():
        save_weights(model(), tmp_path / "pipeline" / name / "model.safetensors")
        A, B = factors(model().get_submodule(path), 2, len(name))
        tensors |= kohya(path, A, B, prefixes[name], alpha=torch.tensor(3.0))
    there = tmp_path / "there.safetensors"
    save_file(tensors, there, metadata={"format": "pt"})
    between, back = tmp_path / "x.safetensors", tmp_path / "back.safetensors"
    said = convert(there, between, "--to", "diffusers", "--model", tmp_path / "pipeline")
    assert said.endswith("1 module of text_encoder, 1 module of text_encoder_2, 1 module of unet")
    convert(between, back, "--to", "kohya")
    assert back.read_bytes() == there.read_bytes()
    for name, (model, _) in models.items():
        convert(between, tmp_path / name, "--to", "peft", "--component", name)
        want = load_adapter(model(), there, component=name)(3)
        assert torch.equal(load_adapter(model(), tmp_path / name)(3), want)
    said = refused(between, tmp_path / "one", "--to", "peft")
    assert "holds text_encoder, text_encoder_2, unet, and a PEFT directory holds one model's adapter" in said
    assert not (tmp_path / "one").exists()
    assert "--component must be one of text_encoder, text_encoder_2, unet" in refused(
        between, tmp_path / "one", "--to", "peft", "--component", "prior"
    )
    (tmp_path / "pipeline" / "text_encoder_2" / "model.safetensors").unlink()
    said = refused(there, tmp_path / "y.safetensors", "--to", "diffusers", "--model", tmp_path / "pipeline")
    assert "must have a directory text_encoder_2" in said


def test_a_transformers_place_in_a_pipeline_is_its_directory(tmp_path: Path) -> None:
    save_weights(unet(), tmp_path / "pipeline" / "transformer" / "model.safetensors")
    A, B = factors(unet().get_submodule(f"{BLOCK}.to_q"), 2, 0)
    save_file(kohya(f"{BLOCK}.to_q", A, B), tmp_path / "k.safetensors")
    convert(tmp_path / "k.safetensors", tmp_path / "d", "--to", "diffusers", "--model", tmp_path / "pipeline")
    assert sorted(load_file(tmp_path / "d" / FILE))[0] == f"transformer.{BLOCK}.to_q.lora_A.weight"
    convert(tmp_path / "d", tmp_path / "back.safetensors", "--to", "kohya")
    assert {name.split(".")[0] for name in load_file(tmp_path / "back.safetensors")} == {
        f"lora_unet_{BLOCK.replace('.', '_')}_to_q"
    }


def test_an_rslora_keeps_its_scale_in_kohyas_layout(tmp_path: Path) -> None:
    there = saved(tmp_path / "peft", LoRAConfig(r=5, lora_alpha=7, target_modules=TO_Q, use_rslora=True))
    convert(there, tmp_path / "k.safetensors", "--to", "kohya", "--component", "unet")
    torch.testing.assert_close(
        load_adapter(unet(), tmp_path / "k.safetensors")(3), load_adapter(unet(), there)(3), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("through", ["peft", "diffusers", "kohya"])
def test_a_whole_number_stays_one(through: str, tmp_path: Path) -> None:
    """diffusers writes alpha as an int64, kohya as a float in the dtype of the factors."""
    base = save_weights(unet(), tmp_path / "base" / "model.safetensors")
    for alphas in ((4, 7), (4.0, 7.5)):
        tensors: dict[str, Tensor] = {}
        for seed, (name, alpha) in enumerate(zip(["to_q", "to_k"], alphas, strict=True)):
            A, B = factors(unet().get_submodule(f"{BLOCK}.{name}"), 2, seed)
            tensors |= kohya(f"{BLOCK}.{name}", A, B, alpha=torch.tensor(alpha))
        there, back = tmp_path / "there.safetensors", tmp_path / "back.safetensors"
        save_file(tensors, there, metadata={"format": "pt"})
        between = tmp_path / f"between {alphas[0]}{'.safetensors' * (through == 'kohya')}"
        convert(there, between, "--to", through, "--model", base)
        more = {"peft": ["--component", "unet"], "diffusers": [], "kohya": ["--model", base]}[through]
        convert(between, back, "--to", "kohya", "--force", *more)
        assert back.read_bytes() == there.read_bytes()


def test_an_alpha_that_the_dtype_cannot_hold_is_kept_in_a_wider_one(tmp_path: Path) -> None:
    there = saved(tmp_path / "peft", LoRAConfig(r=2, lora_alpha=0.1, target_modules=["to_q"]))
    convert(there, tmp_path / "k.safetensors", "--to", "kohya", "--component", "unet")
    (alpha,) = (value for name, value in load_file(tmp_path / "k.safetensors").items() if name.endswith(".alpha"))
    assert alpha.item() == 0.1
    assert alpha.shape == ()


def test_mlxs_adapter_as_a_peft_directory(tmp_path: Path) -> None:
    A, B = factors(nn.Linear(32, 32, bias=False), 2, 0)
    pair = {"lora_a": A.T.contiguous(), "lora_b": B.T.contiguous()}
    name = "model.layers.0.self_attn.q_proj"
    there = mlx_directory(tmp_path / "mlx", {f"{name}.{leaf}": value for leaf, value in pair.items()})
    convert(there, tmp_path / "peft", "--to", "lora")
    got = output(load_adapter(llama(), tmp_path / "peft"), tokens())
    assert torch.equal(got, output(load_adapter(llama(), there), tokens()))
    embedding = {f"model.embed_tokens.{leaf}": value for leaf, value in pair.items()}
    mlx_directory(tmp_path / "mlx", embedding)
    assert "seems to be an embedding" in refused(there, tmp_path / "x", "--to", "peft")


@pytest.mark.parametrize("save_projection", [True, False])
def test_a_vera_as_the_lora_that_it_is(save_projection: bool, tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "base")
    config = VeRAConfig(r=8, target_modules=["q_proj", "down_proj"], save_projection=save_projection)
    there = saved(tmp_path / "vera", config, llama())
    convert(there, tmp_path / "lora", "--to", "lora", "--model", tmp_path / "base")
    assert json.loads((tmp_path / "lora" / CONFIG_FILE).read_text())["peft_type"] == "LORA"
    want = output(load_adapter(llama(), there), tokens())
    got = output(load_adapter(llama(), tmp_path / "lora"), tokens())
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert (want - output(llama(), tokens())).abs().max() > 1e-3


CANNOT: dict[str, tuple[Callable[[], Any], str, str]] = {
    "DoRA as LoRA": (lambda: DoRAConfig(r=2, target_modules=TO_Q), "lora", "is a DoRA, which scales the base weight"),
    "VeRA without its base": (lambda: VeRAConfig(r=4, target_modules=["to_q"]), "lora", "is a VERA.* give --model"),
    "VeRA for diffusers": (
        lambda: VeRAConfig(r=4, target_modules=["to_q"]),
        "diffusers",
        "peft_type must be LORA .* with --to lora",
    ),
    "AdaLoRA for kohya": (
        lambda: AdaLoRAConfig(init_r=3, target_r=2, total_step=10, target_modules=["to_q"]),
        "kohya",
        "peft_type must be LORA",
    ),
    "modules_to_save for diffusers": (
        lambda: LoRAConfig(r=2, target_modules=["to_q"], modules_to_save=["conv1"]),
        "diffusers",
        "conv1.bias has no place in the layout of diffusers",
    ),
    "biases for diffusers": (
        lambda: LoRAConfig(r=2, target_modules=["to_q"], bias="lora_only"),
        "diffusers",
        "base_layer.bias has no place in the layout of diffusers",
    ),
    "biases of B for kohya": (
        lambda: LoRAConfig(r=2, target_modules=["to_q"], lora_bias=True),
        "kohya",
        "lora_B.bias.* has no place in kohya's layout, which holds no embeddings and no biases",
    ),
}


@pytest.mark.parametrize("case", CANNOT)
def test_what_a_layout_cannot_hold_is_refused_and_nothing_is_written(case: str, tmp_path: Path) -> None:
    config, to, message = CANNOT[case]
    there = saved(tmp_path / "peft", config())
    out = tmp_path / "out" / "x.safetensors" if to == "kohya" else tmp_path / "out"
    said = refused(there, out, "--to", to, *(["--component", "unet"] * (to != "lora")))
    assert re.search(message, said), said
    assert not (tmp_path / "out").exists()


def test_embeddings_and_equal_names_have_no_place_in_kohyas_layout(tmp_path: Path) -> None:
    model = Tree({"a.b_c": nn.Linear(3, 3), "a_b.c": nn.Linear(3, 3), "embed": nn.Embedding(4, 3)})
    there = saved(tmp_path / "one", LoRAConfig(r=2, target_modules=["embed"]), model)
    out = tmp_path / "out.safetensors"
    assert "lora_embedding_A' has no place in kohya's" in refused(there, out, "--to", "kohya", "--component", "unet")
    convert(there, tmp_path / "diffusers", "--to", "diffusers", "--component", "unet")
    model = Tree({"a.b_c": nn.Linear(3, 3), "a_b.c": nn.Linear(3, 3)})
    there = saved(tmp_path / "two", LoRAConfig(r=2, target_modules="all-linear"), model)
    assert "both come to the name 'lora_unet_a_b_c'" in refused(there, out, "--to", "kohya", "--component", "unet")
    assert not out.exists()


def test_what_the_command_needs_is_said(tmp_path: Path) -> None:
    there = saved(tmp_path / "peft", LoRAConfig(r=2, target_modules=["to_q"]))
    out = tmp_path / "out"
    listed = "--to must be one of peft, diffusers, kohya, lora, experts, got"
    assert f"{listed} 'comfy'" in refused(there, out, "--to", "comfy")
    assert "give --component unet" in refused(there, out, "--to", "diffusers")
    assert "must be one of 'unet'" in refused(there, out, "--to", "diffusers", "--component", "vae")
    file = tmp_path / "k.safetensors"
    assert "must be one of 'unet'" in refused(there, file, "--to", "kohya", "--component", "prior")
    assert "must be the name of a file that ends in .safetensors" in refused(there, out, "--to", "kohya")
    assert "must be a directory for --to peft" in refused(there, file, "--to", "peft")
    convert(there, file, "--to", "kohya", "--component", "unet")
    assert "whose names have underscores for dots: give --model" in refused(file, out, "--to", "peft")
    assert "none is there: names are read from its weights" in refused(
        file, out, "--to", "peft", "--model", there / "x"
    )
    other = save_weights(text_encoder(), tmp_path / "other.safetensors")
    assert "is this adapter for another model?" in refused(file, out, "--to", "peft", "--model", other)
    assert "does not exist" in refused(tmp_path / "nowhere", out, "--to", "peft")
    assert not out.exists()


def test_what_is_there_is_replaced_on_demand_and_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = saved(tmp_path / "first", LoRAConfig(r=2, target_modules=["to_q"]))
    second = saved(tmp_path / "second", LoRAConfig(r=3, target_modules=["to_k"]))
    options = ("--to", "kohya", "--component", "unet")
    for to, out in (("peft", tmp_path / "a"), ("diffusers", tmp_path / "b"), ("kohya", tmp_path / "c.safetensors")):
        options = ("--to", to, *(["--component", "unet"] * (to != "peft")))
        convert(first, out, *options)
        old = out.read_bytes() if out.is_file() else files(out)
        assert "exists: choose another place, or replace it with --force" in refused(second, out, *options)
        with monkeypatch.context() as patch:

            def full(tensors: Any, path: Path, **_: Any) -> None:
                Path(path).write_bytes(b"half")
                raise OSError("No space left on device")

            patch.setattr("safetensors.torch.save_file", full)
            patch.setattr("fastadapt.model.saving.save_file", full)
            assert "No space left on device" in refused(second, out, *options, "--force")
        assert (out.read_bytes() if out.is_file() else files(out)) == old
        convert(second, out, *options, "--force")
        assert (out.read_bytes() if out.is_file() else files(out)) != old
        assert torch.equal(load_adapter(unet(), out)(3), load_adapter(unet(), second)(3))
    assert files(first)[TENSOR_FILE] != files(second)[TENSOR_FILE]


def test_a_file_of_strangers_takes_bounded_time_and_ends_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = saved(tmp_path / "peft", LoRAConfig(r=2, target_modules=TO_Q))

    def greedy(*args: Any, **kwargs: Any) -> Any:
        assert patterns._left.get() == [Limits().max_pattern_seconds]
        raise MemoryError("no room\nat all")

    monkeypatch.setattr(convert_module, "_read", greedy)
    assert "there is no room for what it asks for: no room" in refused(there, tmp_path / "out", "--to", "peft")


def test_stacked_experts_as_the_layers_that_they_were(tmp_path: Path) -> None:
    from test_experts import logits, qwen3_moe

    qwen3_moe().save_pretrained(tmp_path / "base")
    both = ["experts.gate_up_proj", "experts.down_proj"]
    there = saved(tmp_path / "lora", LoRAConfig(r=2, target_modules=["q_proj"], target_parameters=both), qwen3_moe())
    said = convert(there, tmp_path / "layers", "--to", "experts", "--model", tmp_path / "base")
    assert "converted" in said
    names = load_file(tmp_path / "layers" / TENSOR_FILE)
    assert "base_model.model.model.layers.1.mlp.experts.3.up_proj.lora_B.weight" in names
    want = logits(load_adapter(qwen3_moe(), there))
    torch.testing.assert_close(logits(load_adapter(qwen3_moe(), tmp_path / "layers")), want, rtol=1e-4, atol=1e-5)
    assert (want - logits(qwen3_moe())).abs().max() > 1e-3
    assert "give --model" in refused(there, tmp_path / "x", "--to", "experts")
    plain = saved(tmp_path / "plain", LoRAConfig(r=2, target_modules=["q_proj"]), llama())
    assert "has no stacked experts in target_parameters" in refused(plain, tmp_path / "x", "--to", "experts")
