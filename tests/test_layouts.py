"""Files of diffusers, kohya and MLX: each computes what its library says, or is refused in words."""

from __future__ import annotations

import json
import os
import random
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import llama, output, tokens
from tiny_pipelines import BLOCK, RESNET, TEXT, Tree, factors, merged, text_encoder, unet
from torch import Tensor, nn

from fastadapt import DoRAConfig, LoRAConfig, inject, load_adapter, save_adapter
from fastadapt.commands.info import describe_adapter
from fastadapt.methods.config import pattern_value
from fastadapt.model.layouts.names import Names
from fastadapt.model.layouts.sgm import sgm_names
from fastadapt.model.peft_files import CONFIG_FILE, TENSOR_FILE
from fastadapt.serving import AdapterError, Limits

# PEFT's and transformers' own, of each other.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*gradient_checkpointing:FutureWarning", "ignore:.*have invalid shape.*lora_B.bias:UserWarning"
)

FILE = "pytorch_lora_weights.safetensors"
Tensors = dict[str, Tensor]


def check_computes(model: Tree, file: Path, want: Tree, **options: Any) -> None:
    base = model(3)
    got, exact = load_adapter(model, file, **options)(3), want(3)
    torch.testing.assert_close(got, exact, rtol=1e-4, atol=1e-4)
    assert (exact - base).abs().max() > 0.1


def kohya(path: str, A: Tensor, B: Tensor, prefix: str = "lora_unet", **others: Tensor) -> Tensors:
    start = f"{prefix}_{path.replace('.', '_')}"
    tensors = {f"{start}.lora_down.weight": A, f"{start}.lora_up.weight": B}
    return tensors | {f"{start}.{name}": value for name, value in others.items()}


def test_kohyas_file_has_a_rank_and_an_alpha_for_each_module(tmp_path: Path) -> None:
    alphas = {
        f"{BLOCK}.to_q": (2, torch.tensor(1.5, dtype=torch.float16)),
        f"{BLOCK}.to_out.0": (3, torch.tensor(6)),  # diffusers writes whole numbers
        f"{RESNET}.conv1": (2, torch.tensor([0.1])),
        f"{RESNET}.time_emb_proj": (3, None),
    }
    tensors: Tensors = {}
    deltas = {}
    for seed, (path, (r, alpha)) in enumerate(alphas.items()):
        A, B = factors(unet().get_submodule(path), r, seed)
        tensors |= kohya(path, A, B, **({} if alpha is None else {"alpha": alpha}))
        deltas[path] = A, B, 1.0 if alpha is None else float(alpha) / r
    save_file(tensors, tmp_path / "style.safetensors")
    check_computes(unet(), tmp_path / "style.safetensors", merged(unet(), deltas, {}))


@pytest.mark.parametrize("shape", [(8,), (8, 1)])
def test_kohyas_doras(shape: tuple[int, ...], tmp_path: Path) -> None:
    path = f"{BLOCK}.to_k"
    A, B = factors(unet().get_submodule(path), 2, 0)
    m = torch.rand(8) + 0.5
    save_file(kohya(path, A, B, alpha=torch.tensor(1.0), dora_scale=m.view(shape)), tmp_path / "dora.safetensors")
    check_computes(unet(), tmp_path / "dora.safetensors", merged(unet(), {path: (A, B, 0.5)}, {path: m}))


def test_stabilitys_names_are_other_names_of_a_unets_modules(tmp_path: Path) -> None:
    A, B = factors(unet().get_submodule(f"{BLOCK}.to_q"), 2, 0)
    C, D = factors(unet().get_submodule(f"{RESNET}.conv1"), 2, 1)
    tensors = kohya("input_blocks.1.1.transformer_blocks.0.attn1.to_q", A, B)
    tensors |= kohya("input_blocks.1.0.in_layers.2", C, D)
    save_file(tensors, tmp_path / "xl.safetensors")
    deltas = {f"{BLOCK}.to_q": (A, B, 1.0), f"{RESNET}.conv1": (C, D, 1.0)}
    check_computes(unet(), tmp_path / "xl.safetensors", merged(unet(), deltas, {}))


def test_stabilitys_names_count_the_blocks_of_a_side() -> None:
    # SDXL's: three blocks of two layers down and of three up, the attention in the lower ones.
    paths = []
    for side, blocks, layers, sampler in (("down", 3, 2, "downsamplers"), ("up", 3, 3, "upsamplers")):
        for block in range(blocks):
            start = f"{side}_blocks.{block}"
            paths += [start, f"{start}.resnets"]
            for layer in range(layers):
                paths += [f"{start}.resnets.{layer}", f"{start}.resnets.{layer}.conv2"]
                if (side == "down") == (block > 0) or block == 1:
                    paths += [f"{start}.attentions.{layer}", f"{start}.attentions.{layer}.proj_in"]
            if block < 2:
                paths += [f"{start}.{sampler}.0", f"{start}.{sampler}.0.conv"]
    paths += ["mid_block.resnets.1", "mid_block.resnets.1.conv_shortcut", "mid_block.attentions.0.proj_out", "conv_out"]
    names = sgm_names([*paths, "mid_block.attentions.0"])
    assert names["down_blocks.0.downsamplers.0.conv"] == "input_blocks.3.0.op"
    assert names["down_blocks.1.attentions.0.proj_in"] == "input_blocks.4.1.proj_in"
    assert names["down_blocks.2.resnets.1.conv2"] == "input_blocks.8.0.out_layers.3"
    assert names["mid_block.attentions.0.proj_out"] == "middle_block.1.proj_out"
    assert names["mid_block.resnets.1.conv_shortcut"] == "middle_block.2.skip_connection"
    assert names["up_blocks.0.upsamplers.0.conv"] == "output_blocks.2.2.conv"
    assert names["up_blocks.1.resnets.2.conv2"] == "output_blocks.5.0.out_layers.3"
    assert names["conv_out"] == "out.2"
    assert sgm_names(["model.layers.0.self_attn.q_proj", "conv_in"]) == {}


def test_a_flat_name_that_can_be_two_modules_is_refused_with_both() -> None:
    names = Names(["a.b_c", "a_b.c", "a.d"], "Model")
    assert names.find("a_d", flattened=True) == "a.d"
    with pytest.raises(ValueError, match=r"'a_b_c' can be a\.b_c or a_b\.c of Model"):
        names.find("a_b_c", flattened=True)
    with pytest.raises(ValueError, match="no module of Model is called 'a_e'"):
        names.find("a_e", flattened=True)


@pytest.mark.parametrize("start", [TEXT, TEXT.removeprefix("text_model.")])
@pytest.mark.parametrize("prefix", ["lora_te", "lora_te1"])
def test_a_text_encoders_names_with_and_without_what_is_around_it(start: str, prefix: str, tmp_path: Path) -> None:
    A, B = factors(nn.Linear(6, 7), 2, 0)
    save_file(kohya(f"{TEXT}.mlp.fc1", A, B, prefix), tmp_path / "te.safetensors")
    save_file({f"text_encoder.{TEXT}.mlp.fc1.lora_{x}.weight": y for x, y in (("A", A), ("B", B))}, tmp_path / FILE)
    want = merged(text_encoder(start=start), {f"{start}.mlp.fc1": (A, B, 1.0)}, {})
    for file in ("te.safetensors", FILE):
        check_computes(text_encoder(start=start), tmp_path / file, want)


ATTENTION = f"{TEXT}.self_attn"


def test_what_only_holds_others_is_no_second_meaning(tmp_path: Path) -> None:
    model = Tree({"a_b.c": nn.Linear(3, 3), "a.b.c.d": nn.Linear(3, 3), "a.b_c": nn.Identity()})
    A, B = factors(nn.Linear(3, 3), 2, 0)
    save_file(kohya("a_b.c", A, B), tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"can be a_b\.c or a\.b_c of Tree"):
        load_adapter(model, tmp_path / "x.safetensors")
    del model.a.b_c
    load_adapter(model, tmp_path / "x.safetensors")


def test_a_loaded_file_is_an_adapter_like_any_other(tmp_path: Path) -> None:
    save_file(one_pair(), tmp_path / "x.safetensors")
    first = LoRAConfig(r=3, target_modules=["to_q", "conv1"], init_lora_weights=False)
    model = load_adapter(inject(unet(), first, "own"), tmp_path / "x.safetensors", "style", trainable=True)
    assert sum(parameter.requires_grad for parameter in model.parameters()) == 2
    save_adapter(model, tmp_path / "saved", "style")
    want = load_adapter(unet(), tmp_path / "x.safetensors")(3)
    assert torch.equal(load_adapter(unet(), tmp_path / "saved")(3), want)
    assert torch.equal(model(3), want)


# Module, and what its factors are called in the spellings of diffusers' versions.
SPELLINGS = {
    "PEFT's": (unet, f"{BLOCK}.to_q", f"unet.{BLOCK}.to_q.lora_{{A,B}}.weight"),
    "lora.down": (unet, f"{BLOCK}.to_out.0", f"unet.{BLOCK}.to_out.0.lora.{{down,up}}.weight"),
    "processor": (unet, f"{BLOCK}.to_out.0", f"{BLOCK}.processor.to_out_lora.{{down,up}}.weight"),
    "processor of a unet": (unet, f"{BLOCK}.to_v", f"unet.{BLOCK}.processor.to_v_lora.{{down,up}}.weight"),
    "no component": (unet, f"{RESNET}.conv1", f"{RESNET}.conv1.lora_{{A,B}}.weight"),
    "transformer": (unet, f"{BLOCK}.to_k", f"transformer.{BLOCK}.to_k.lora_{{A,B}}.weight"),
    "old text": (text_encoder, f"{ATTENTION}.out_proj", f"text_encoder.{ATTENTION}.to_out_lora.{{down,up}}.weight"),
    "text": (text_encoder, f"{TEXT}.mlp.fc1", f"text_encoder.{TEXT}.mlp.fc1.lora_linear_layer.{{down,up}}.weight"),
}  # fmt: skip


@pytest.mark.parametrize("alpha", [None, 5.0])
@pytest.mark.parametrize("case", SPELLINGS)
def test_the_spellings_of_diffusers_versions(case: str, alpha: float | None, tmp_path: Path) -> None:
    model, path, name = SPELLINGS[case]
    A, B = factors(model().get_submodule(path), 3, 0)
    start, down, up, end = re.split("[{,}]", name)
    tensors = {f"{start}{down}{end}": A, f"{start}{up}{end}": B}
    if alpha is not None:
        stem = re.sub(r"\.(lora|lora_linear_layer)\.$|\.lora_$", "", start).removesuffix(".")
        tensors[f"{stem}.alpha"] = torch.tensor(alpha)
    save_file(tensors, tmp_path / FILE)
    want = merged(model(), {path: (A, B, (alpha or 3.0) / 3)}, {})
    check_computes(model(), tmp_path, want)


def diffusers_file(model: nn.Module, file: Path, config: peft.LoraConfig, prefix: str, *, metadata: bool = True) -> Any:
    """PEFT's adapter in a model, in a file as diffusers saves it; returns the model."""
    torch.manual_seed(5)
    with_adapter = peft.inject_adapter_in_model(config, model)
    tensors = {f"{prefix}{name}": value for name, value in peft.get_peft_model_state_dict(model).items()}
    fields = {f"{prefix}{name}": sorted(v) if isinstance(v, set) else v for name, v in config.to_dict().items()}
    about = {"format": "pt"}
    if metadata:
        about["lora_adapter_metadata"] = json.dumps(fields, indent=2, sort_keys=True)
    file.parent.mkdir(exist_ok=True)
    save_file(tensors, file, metadata=about)
    return with_adapter.eval()


CONFIGS: dict[str, dict[str, Any]] = {
    "scaled": {"lora_alpha": 7},
    "rank-stabilised": {"use_rslora": True, "rank_pattern": {"to_k": 3}, "alpha_pattern": {"to_q": 5}},
    "DoRA": {"use_dora": True},
    "biases of B": {"lora_bias": True},
    "convolutions": {"target_modules": ["conv_in", "conv1", "to_q"]},
}


@pytest.mark.parametrize("prefix", ["", "unet."])
@pytest.mark.parametrize("case", CONFIGS)
def test_the_metadata_of_a_newer_file_are_its_config(case: str, prefix: str, tmp_path: Path) -> None:
    fields = {"r": 2, "target_modules": ["to_q", "to_k", "to_out.0"], **CONFIGS[case]}
    config = peft.LoraConfig(init_lora_weights=False, **fields)
    check_computes(unet(), tmp_path, diffusers_file(unet(), tmp_path / FILE, config, prefix))


def test_a_file_that_diffusers_itself_wrote(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    sizes: dict[str, Any] = {"block_out_channels": (8, 16), "layers_per_block": 1, "cross_attention_dim": 16}
    sizes |= {"attention_head_dim": 4, "norm_num_groups": 4, "sample_size": 8}
    sizes |= {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D")}
    sizes |= {"up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")}

    def model() -> Any:
        torch.manual_seed(0)
        return diffusers.UNet2DConditionModel(**sizes).eval()

    def run(net: Any) -> Tensor:
        torch.manual_seed(2)
        return net(torch.randn(1, 4, 8, 8), torch.tensor([3]), torch.randn(1, 5, 16)).sample.detach()

    theirs = model()
    theirs.add_adapter(peft.LoraConfig(r=3, lora_alpha=5, init_lora_weights=False, target_modules=["to_q", "conv1"]))
    theirs.save_lora_adapter(tmp_path / "model")
    torch.testing.assert_close(run(load_adapter(model(), tmp_path / "model")), run(theirs.eval()))
    layers = peft.get_peft_model_state_dict(theirs)
    diffusers.StableDiffusionPipeline.save_lora_weights(tmp_path / "pipeline", unet_lora_layers=layers)
    again = model()
    again.load_lora_adapter(load_file(tmp_path / "pipeline" / FILE), prefix="unet")
    torch.testing.assert_close(run(load_adapter(model(), tmp_path / "pipeline")), run(again.eval()))


def test_a_model_takes_its_own_component_of_a_pipelines_file(tmp_path: Path) -> None:
    config = {"r": 2, "init_lora_weights": False}
    parts = {
        "unet": (unet, peft.LoraConfig(target_modules=["to_q"], **config)),
        "text_encoder": (text_encoder, peft.LoraConfig(target_modules=["fc1"], **config)),
        "text_encoder_2": (lambda: text_encoder(9), peft.LoraConfig(target_modules=["fc1"], **config)),
    }
    tensors: Tensors = {}
    wanted = {}
    for name, (model, part) in parts.items():
        wanted[name] = diffusers_file(model(), tmp_path / "part.safetensors", part, f"{name}.", metadata=False)
        for layer in wanted[name].modules():
            if hasattr(layer, "scaling"):
                layer.scaling["default"] = 1.0
        tensors |= load_file(tmp_path / "part.safetensors")
    save_file(tensors, tmp_path / FILE)
    for name, (model, _) in parts.items():
        with pytest.warns(UserWarning, match="which are other models' parts of it"):
            check_computes(model(), tmp_path / FILE, wanted[name])
        check_computes(model(), tmp_path / FILE, wanted[name], component=name)
    with pytest.raises(ValueError, match=r"component must be one of those of .*, got 'prior'"):
        load_adapter(unet(), tmp_path / FILE, component="prior")
    with pytest.raises(ValueError, match="of these none is for this Tree"):
        load_adapter(Tree({"conv_in": nn.Conv2d(2, 4, 3)}), tmp_path / FILE)
    twice = {name.replace("text_encoder_2", "text_encoder_3"): value.clone() for name, value in tensors.items()}
    save_file(tensors | twice, tmp_path / FILE)
    with pytest.raises(ValueError, match="text_encoder_2, text_encoder_3 are for this Tree"):
        load_adapter(text_encoder(9), tmp_path / FILE)


def mlx_directory(directory: Path, tensors: Tensors, **changes: Any) -> Path:
    fields = {"fine_tune_type": "lora", "num_layers": 16, "model": "mlx-community/x", "iters": 100}
    fields |= {"lora_parameters": {"rank": 8, "scale": 20.0, "dropout": 0.0}, **changes}
    directory.mkdir(exist_ok=True)
    (directory / CONFIG_FILE).write_text(json.dumps(fields))
    save_file(tensors, directory / "adapters.safetensors", metadata={"format": "mlx"})
    return directory


@pytest.mark.parametrize("dora", [False, True])
def test_mlxs_factors_are_turned_round_and_scaled_by_its_config(dora: bool, tmp_path: Path) -> None:
    model = lambda: Tree({"model.layers.0.self_attn.q_proj": nn.Linear(6, 8), "model.embed_tokens": nn.Embedding(9, 6)})  # noqa: E731
    torch.manual_seed(0)
    base, again = model().eval(), model().eval()
    again.load_state_dict(base.state_dict())
    tensors, deltas, magnitudes = {}, {}, {}
    for path in base.paths[: 1 if dora else 2]:
        A, B = factors(base.get_submodule(path), 3, 0)
        tensors |= {f"{path}.lora_a": A.T.contiguous(), f"{path}.lora_b": B.T.contiguous()}
        deltas[path] = A, B, 0.3
        if dora:
            magnitudes[path] = tensors[f"{path}.m"] = torch.rand(8) + 0.5
    directory = mlx_directory(
        tmp_path / "mlx",
        tensors,
        fine_tune_type="dora" if dora else "lora",
        lora_parameters={"rank": 3, "scale": 0.3, "dropout": 0.0},
    )
    check_computes(base, directory, merged(again, deltas, magnitudes))


def test_an_mlx_adapter_of_a_language_model(tmp_path: Path) -> None:
    theirs = peft.get_peft_model(
        llama(), peft.LoraConfig(r=2, lora_alpha=3, init_lora_weights=False, target_modules=["q_proj", "down_proj"])
    )
    tensors = {}
    for name, value in peft.get_peft_model_state_dict(theirs).items():
        path, kind = re.fullmatch(r"base_model\.model\.(.*)\.lora_([AB])\.weight", name).groups()  # type: ignore[union-attr]
        tensors[f"{path}.lora_{kind.lower()}"] = value.T.contiguous()
    mlx_directory(tmp_path, tensors, lora_parameters={"rank": 2, "scale": 1.5})
    torch.testing.assert_close(output(load_adapter(llama(), tmp_path), tokens()), output(theirs.eval(), tokens()))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fine_tune_type": "full"}, "fine_tune_type must be lora or dora, got 'full'"),
        ({"fine_tune_type": "dora"}, "fine_tune_type must be dora where"),
        ({"lora_parameters": {"rank": 8}}, "lora_parameters must have a scale, a number other than 0, got None"),
        ({"lora_parameters": {"scale": True}}, "must have a scale"),
        ({"lora_parameters": {"scale": "20"}}, "must have a scale"),
        ({"lora_parameters": {"scale": 1.0, "alpha": 16.0}}, "must have no alpha beside the scale"),
        ({"lora_parameters": [1]}, "must have a scale"),
        ({"lora_parameters": {"scale": 1e308}}, "must be finite|NaN or infinite|a number other than 0"),
    ],
)
def test_what_mlxs_config_must_say(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = f"{BLOCK}.to_q"
    A, B = factors(unet().get_submodule(path), 2, 0)
    pair = {f"{path}.lora_a": A.T.contiguous(), f"{path}.lora_b": B.T.contiguous()}
    model = unet()
    with pytest.raises(ValueError, match=message):
        load_adapter(model, mlx_directory(tmp_path, pair, **changes))
    assert all(type(part).__module__.startswith(("torch", "tiny")) for part in model.modules())


def test_experts_of_mlx_and_a_missing_config_are_refused(tmp_path: Path) -> None:
    stacked = {"experts.lora_a": torch.zeros(2, 2, 4), "experts.lora_b": torch.zeros(2, 4, 2)}
    with pytest.raises(ValueError, match="adapters of experts, which MLX stacks"):
        load_adapter(unet(), mlx_directory(tmp_path, stacked))
    pair = {"a.lora_a": torch.zeros(4, 2), "a.lora_b": torch.zeros(2, 4)}
    (mlx_directory(tmp_path, pair) / CONFIG_FILE).unlink()
    with pytest.raises(FileNotFoundError, match="it says the scale of MLX's"):
        load_adapter(unet(), tmp_path)


def one_pair() -> Tensors:
    A, B = factors(unet().get_submodule(f"{BLOCK}.to_q"), 2, 0)
    return kohya(f"{BLOCK}.to_q", A, B, alpha=torch.tensor(2.0))


FLAT = f"lora_unet_{BLOCK.replace('.', '_')}_to_q"
DOWN, UP, ALPHA = f"{FLAT}.lora_down.weight", f"{FLAT}.lora_up.weight", f"{FLAT}.alpha"
WHOLE, TO_K = f"unet.{BLOCK}.to_q", f"unet.{BLOCK}.to_k"


def renamed(old: str, new: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name.replace(old, new): value for name, value in tensors.items()}


def changed(name: str, value: Tensor) -> Callable[[Tensors], Tensors]:
    return lambda tensors: tensors | {name: value}


def lacking(name: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {key: value for key, value in tensors.items() if key != name}


def in_diffusers(change: Callable[[Tensors], Tensors]) -> Callable[[Tensors], Tensors]:
    names = {DOWN: f"{WHOLE}.lora_A.weight", UP: f"{WHOLE}.lora_B.weight", ALPHA: f"{WHOLE}.alpha"}
    return lambda tensors: change({names[name]: value for name, value in tensors.items()})


HOSTILE: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "no up": (lacking(UP), r"must have B \(lora_B, up\) of its module beside it"),
    "no down": (lacking(DOWN), r"must have A \(lora_A, down\) of its module beside it"),
    "an alpha alone": (lambda tensors: {ALPHA: tensors[ALPHA]}, "must have A"),
    "other ranks": (changed(UP, torch.zeros(8, 3)), r"must have shape \[out, 2\] beside .*, got \(8, 3\)"),
    "rank 0": (lambda _: {DOWN: torch.zeros(0, 6), UP: torch.zeros(8, 0)}, r"must have shape \[r, in\]"),
    "a vector": (changed(DOWN, torch.zeros(12)), r"must have shape \[r, in\].*got \(12,\)"),
    "a kernel above": (changed(UP, torch.zeros(8, 2, 3, 3)), r"must have shape \[out, 2\]"),
    "wrong outputs": (changed(UP, torch.zeros(9, 2)), r"must have shape \(8, 2\) for this config and model"),
    "wrong inputs": (changed(DOWN, torch.zeros(2, 7)), r"must have shape \(2, 6\) for this config and model"),
    "a convolution's": (
        lambda _: {DOWN: torch.zeros(2, 6, 1, 1), UP: torch.zeros(8, 2, 1, 1)},
        r"must have shape \(2, 6\)",
    ),
    "NaN": (changed(UP, torch.full((8, 2), torch.nan)), "has NaN or infinite values"),
    "NaN for alpha": (changed(ALPHA, torch.tensor(torch.nan)), "has NaN or infinite values"),
    "two alphas": (changed(ALPHA, torch.ones(2)), r"must be one number, got a tensor of shape \(2,\)"),
    "a matrix for alpha": (changed(ALPHA, torch.ones(1, 1)), "must be one number"),
    "alpha 0": (changed(ALPHA, torch.tensor(0.0)), "must be a number other than 0"),
    "alpha beyond fp32": (changed(ALPHA, torch.tensor(1e300, dtype=torch.float64)), "must be finite in fp32"),
    "whole numbers": (changed(DOWN, torch.zeros(2, 6, dtype=torch.int64)), "must hold floating-point numbers"),
    "no module": (renamed("to_q", "to_x"), "no module of Tree is called .*to_x.*; it has"),
    "another prefix": (renamed("lora_unet", "lora_vae"), "must hold an adapter in the layout of"),
    "unknown key": (changed(f"{FLAT}.extra", torch.zeros(1)), "cannot be read in the layout of kohya"),
    "no key": (lambda _: {"x": torch.zeros(1)}, "must hold an adapter in the layout of 'kohya', 'PEFT'"),
    "nothing": (lambda _: {}, "got no tensors"),
    "LoHa": (renamed("lora_up.weight", "hada_w1_a"), "it is a LoHa's, which fastadapt does not compute"),
    "LoKr": (renamed("lora_up.weight", "lokr_w1"), "it is a LoKr's"),
    "Tucker": (changed(f"{FLAT}.lora_mid.weight", torch.zeros(2, 2, 3, 3)), "a convolution in Tucker's form"),
    "a difference": (changed(f"{FLAT}.diff", torch.zeros(8, 6)), "a whole difference of weights"),
    "DoRA of inputs": (changed(f"{FLAT}.dora_scale", torch.ones(1, 6)), r"\[8\] or \[8, 1\].*wd_on_out=False"),
    "part DoRA": (
        lambda tensors: (
            tensors
            | renamed("to_q", "to_k")(tensors)
            | {f"{FLAT.replace('to_q', 'to_k')}.dora_scale": torch.ones(8, 1)}
        ),
        "all modules must have DoRA's scale or none",
    ),
    "DoRA of a convolution": (
        lambda _: kohya(
            f"{RESNET}.conv1",
            *factors(unet().get_submodule(f"{RESNET}.conv1"), 2, 0),
            dora_scale=torch.ones(6, 1, 1, 1),
        ),
        "Conv2d cannot take an adapter of LoRAConfig with use_dora=True",
    ),
    "two layouts": (
        lambda tensors: tensors | {f"{WHOLE}.lora_A.weight": tensors[DOWN], f"{WHOLE}.lora_B.weight": tensors[UP]},
        r"must hold tensors of one layout, got .*\(kohya\) and .*\(diffusers\)",
    ),
    "PEFT's own": (renamed(FLAT, "base_model.model.x"), f"in PEFT's layout, which needs its {CONFIG_FILE}"),
    "a path": (renamed(FLAT, f"lora_unet_{'../' * 9}etc/passwd"), "must hold an adapter|cannot be read|no module"),
    "two spellings": (
        in_diffusers(lambda tensors: tensors | {f"{WHOLE}.lora.down.weight": tensors[f"{WHOLE}.lora_A.weight"]}),
        r"are both A \(lora_A, down\) of one module",
    ),
    "two names of a module": (
        in_diffusers(lambda tensors: tensors | renamed("unet.", "unet.model.")(tensors)),
        f"are both of {BLOCK}.to_q",
    ),
    "part alphas": (
        in_diffusers(lambda tensors: tensors | lacking(f"{TO_K}.alpha")(renamed("to_q", "to_k")(tensors))),
        "all modules of unet must have an alpha or none",
    ),
    "part biases": (
        in_diffusers(
            lambda tensors: (
                lacking(f"{WHOLE}.alpha")(tensors)
                | lacking(f"{TO_K}.alpha")(renamed("to_q", "to_k")(tensors))
                | {f"{WHOLE}.lora_B.bias": torch.zeros(8)}
            )
        ),
        "all modules must have a bias of B or none",
    ),
    "a bias of another size": (in_diffusers(changed(f"{WHOLE}.lora_B.bias", torch.zeros(7))), r"must have shape \[8\]"),
    "an embedding's magnitude": (
        lambda _: {
            "unet.e.lora_embedding_A": torch.zeros(2, 4),
            "unet.e.lora_embedding_B": torch.zeros(4, 2),
            "unet.e.lora_magnitude_vector": torch.zeros(4),
        },
        "cannot be DoRA's scale of an embedding's adapter",
    ),
    "kohya's scale": (in_diffusers(changed(f"{WHOLE}.dora_scale", torch.ones(8, 1))), "as kohya's layout has it"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_broken_file_is_refused_by_name_and_leaves_the_model(case: str, tmp_path: Path) -> None:
    change, message = HOSTILE[case]
    file = tmp_path / "x.safetensors"
    save_file({name: value.clone() for name, value in change(one_pair()).items()}, file)
    model = unet()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=message) as caught:
        load_adapter(model, file)
    assert str(caught.value).isprintable()
    assert {name: value.tolist() for name, value in model.state_dict().items()} == {
        name: value.tolist() for name, value in before.items()
    }
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_the_unbroken_file_of_these_loads(tmp_path: Path) -> None:
    for name, tensors in {"kohya": one_pair(), "diffusers": in_diffusers(lambda tensors: tensors)(one_pair())}.items():
        save_file(tensors, tmp_path / f"{name}.safetensors")
        load_adapter(unet(), tmp_path / f"{name}.safetensors")


@pytest.mark.parametrize("size", [0, 7, 40, 300, -1])
def test_a_file_that_is_cut_off(size: int, tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    save_file(one_pair(), file)
    os.truncate(file, file.stat().st_size + size if size < 0 else size)
    with pytest.raises(ValueError, match="is not a valid safetensors file"):
        load_adapter(unet(), file)


METADATA: dict[str, tuple[str, str]] = {
    "no JSON": ("{", "is not valid JSON"),
    "no object": ("[1]", "must hold a JSON object"),
    "twice": ('{"unet.r": 2, "unet.r": 3}', "is there twice"),
    "another component": ('{"text_encoder.r": 2}', "of a component that the file has no tensors of"),
    "another method": ('{"unet.peft_type": "VERA"}', "peft_type must be LORA in a file of LoRAs, got 'VERA'"),
    "another rank": ('{"unet.r": 5, "unet.target_modules": ["to_q"]}', r"must have shape \(5, 6\)"),
    "more modules": ('{"unet.r": 2, "unet.target_modules": ["to_q", "to_k"]}', "to_k.* is missing"),
    "what changes it": ('{"unet.r": 2, "unet.use_qalora": true}', "use_qalora=True changes what the adapter computes"),
    "a rank beyond the limit": ('{"unet.r": 4096, "unet.target_modules": ["to_q"]}', "r may be 512"),
    "slow": ('{"unet.r": 2, "unet.target_modules": "(.*.*)*x!"}', "takes too long|matches"),
    "long": (json.dumps({"unet.r": "x" * 2**20}), "may have 1048576 bytes"),
}


@pytest.mark.parametrize("case", METADATA)
def test_metadata_that_do_not_go_with_the_file_are_refused(case: str, tmp_path: Path) -> None:
    text, message = METADATA[case]
    tensors = lacking(f"{WHOLE}.alpha")(in_diffusers(lambda tensors: tensors)(one_pair()))
    save_file(tensors, tmp_path / FILE, metadata={"lora_adapter_metadata": text})
    with pytest.raises(ValueError, match=message):
        load_adapter(unet(), tmp_path)


def test_a_scale_that_is_said_twice_is_refused(tmp_path: Path) -> None:
    tensors = in_diffusers(lambda tensors: tensors)(one_pair())
    text = '{"unet.r": 2, "unet.target_modules": ["to_q"]}'
    save_file(tensors, tmp_path / FILE, metadata={"lora_adapter_metadata": text})
    with pytest.raises(ValueError, match="the scale must be said once"):
        load_adapter(unet(), tmp_path)


def test_limits_hold_for_these_files_too(tmp_path: Path) -> None:
    save_file(one_pair(), tmp_path / "x.safetensors")
    for limits, message in (
        (Limits(max_rank=1), "r may be 1"),
        (Limits(max_tensors=2), "may hold 2 tensors"),
        (Limits(max_file_bytes=100), "may have 100 bytes"),
    ):
        with pytest.raises(ValueError, match=message):
            load_adapter(unet(), tmp_path / "x.safetensors", limits=limits)


def test_which_file_of_a_directory_is_read(tmp_path: Path) -> None:
    model = inject(unet(), LoRAConfig(r=2, target_modules=["to_q"]))
    save_adapter(model, tmp_path)
    save_file(one_pair(), tmp_path / FILE)
    assert "adapter 'default'" not in str(load_adapter(unet(), tmp_path))  # PEFT's goes first
    with pytest.raises(ValueError, match=rf"give the directory that holds that and {TENSOR_FILE}"):
        load_adapter(unet(), tmp_path / TENSOR_FILE)
    with pytest.raises(ValueError, match="component goes with a file of a pipeline"):
        load_adapter(unet(), tmp_path, component="unet")
    (tmp_path / TENSOR_FILE).unlink()
    save_file({"a.lora_a": torch.zeros(2, 2)}, tmp_path / "adapters.safetensors")
    with pytest.raises(ValueError, match=r"must hold one adapter, got pytorch_lora_weights\.safetensors and adapters"):
        load_adapter(unet(), tmp_path)
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "pytorch_lora_weights.bin").write_bytes(b"\x80\x04N.")
    (tmp_path / "pickled" / CONFIG_FILE).write_text("{}")
    with pytest.raises(ValueError, match="is a pickle, which can run code"):
        load_adapter(unet(), tmp_path / "pickled")


def test_a_rank_and_an_alpha_for_each_of_many_modules_are_found_in_time(tmp_path: Path) -> None:
    model = lambda: Tree({f"blocks.{i}.attn.{name}": nn.Linear(3, 3) for i in range(180) for name in "qkvo"})  # noqa: E731
    tensors: Tensors = {}
    for index, path in enumerate(model().paths):
        tensors |= kohya(
            path, torch.ones(1 + index % 3, 3), torch.ones(3, 1 + index % 3), alpha=torch.tensor(1.0 + index)
        )
    save_file(tensors, tmp_path / "x.safetensors")
    loaded: Any = load_adapter(model(), tmp_path / "x.safetensors", limits=Limits(max_pattern_seconds=0.5))
    assert loaded.get_submodule("blocks.179.attn.o").adapters["default"].scaling == 720 / (1 + 719 % 3)


def test_a_key_that_is_a_path_matches_as_its_expression_does() -> None:
    draw = random.Random(0)
    for _ in range(3000):
        key = "".join(draw.choices("ab._", k=draw.randint(1, 5)))
        path = "".join(draw.choices("ab._", k=draw.randint(0, 8)))
        want = re.match(rf"(.*\.)?({key})$", path) is not None
        assert pattern_value("rank_pattern", {key: True}, path, False) is want, (key, path)


# Unsloth's own words for "all linear layers of the language model".
UNSLOTH = (
    r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?"
    r"(?:q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj).*?)|"
    r"(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense)\."
    r"(?:(?:q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)))"
)


def test_unsloths_directory_is_pefts_with_fields_of_its_own(tmp_path: Path) -> None:
    theirs = peft.get_peft_model(llama(), peft.LoraConfig(r=2, init_lora_weights=False, target_modules=UNSLOTH))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.save_pretrained(tmp_path)
    path = tmp_path / CONFIG_FILE
    mapping = {"base_model_class": "LlamaForCausalLM", "parent_library": "transformers", "unsloth_fixed": True}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_mapping": mapping}))
    torch.testing.assert_close(output(load_adapter(llama(), tmp_path), tokens()), output(theirs.eval(), tokens()))


def test_the_fields_of_pefts_first_versions(tmp_path: Path) -> None:
    save_adapter(inject(llama(), DoRAConfig(r=2, target_modules=["q_proj"])), tmp_path)
    path = tmp_path / CONFIG_FILE
    fields = json.loads(path.read_text())
    path.write_text(json.dumps(fields | {"merge_weights": True, "enable_lora": None}))
    load_adapter(llama(), tmp_path)
    path.write_text(json.dumps(fields | {"enable_lora": [True, False, True]}))
    with pytest.raises(ValueError, match=r"enable_lora=\[True, False, True\] changes what the adapter computes"):
        load_adapter(llama(), tmp_path)


def test_a_long_message_is_an_adapter_error(tmp_path: Path) -> None:
    name = f"lora_unet_{'x' * 5000}"
    save_file(
        {f"{name}.lora_down.weight": torch.zeros(2, 2), f"{name}.lora_up.weight": torch.zeros(2, 2)}, tmp_path / "x"
    )
    with pytest.raises((AdapterError, ValueError)) as caught:
        load_adapter(unet(), tmp_path / "x")
    assert len(str(caught.value)) < 2500


def test_info_tells_of_a_file_without_a_model(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    A, B = factors(unet().get_submodule(f"{BLOCK}.to_k"), 3, 0)
    save_file(one_pair() | kohya(f"{BLOCK}.to_k", A, B), file)
    facts = describe_adapter(file)
    assert facts["layout"] == "kohya"
    assert facts["unet"] == "LoRA of 2 layers, r 2 to 3"
    assert facts["fastadapt"].startswith("can load it")
    save_file(lacking(UP)(one_pair()), file)
    assert "cannot load it: " in describe_adapter(file)["fastadapt"]
    os.truncate(file, 30)
    with pytest.raises(ValueError, match="is not a valid safetensors file"):
        describe_adapter(file)
