"""Adapter directories as other libraries and versions write them: read as PEFT reads them, or refused in words."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import llama, output, tokens
from torch import Tensor, nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from fastadapt import LoRAConfig, export_lora, inject, load_adapter, merge, save_adapter, set_adapter, unload
from fastadapt.methods import METHODS
from fastadapt.model.peft_files import CONFIG_FILE, TENSOR_FILE, read_config
from fastadapt.serving import AdapterError, MultiAdapterModel

# PEFT's and transformers' own, of each other.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*gradient_checkpointing:FutureWarning", "ignore:.*tied layer:UserWarning"
)

START = "base_model.model."


def saved(directory: Path, model: Any = None, **fields: Any) -> Path:
    """PEFT's directory of an adapter that is not zero."""
    config = peft.LoraConfig(r=2, init_lora_weights=False, **{"target_modules": ["q_proj", "v_proj"], **fields})
    torch.manual_seed(7)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft.get_peft_model(llama() if model is None else model, config).save_pretrained(directory)
    return directory


def in_peft(model: Any, directory: Path) -> Tensor:
    return output(peft.PeftModel.from_pretrained(model, directory).eval(), tokens()).detach()


def respelled(directory: Path, spell: Callable[[str], str]) -> None:
    tensors = load_file(directory / TENSOR_FILE)
    save_file({spell(name): value for name, value in tensors.items()}, directory / TENSOR_FILE)


def with_fields(directory: Path, **fields: Any) -> None:
    path = directory / CONFIG_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


SPELLINGS: dict[str, Callable[[str], str]] = {
    "compiled": lambda name: name.replace(START, f"{START}_orig_mod."),
    "compiled, in front": lambda name: f"_orig_mod.{name}",
    "DDP": lambda name: name.replace(START, f"{START}module."),
    "FSDP": lambda name: name.replace(".self_attn.", "._fsdp_wrapped_module.self_attn."),
    "no prefix": lambda name: name.removeprefix(START),
    "half a prefix": lambda name: name.removeprefix("base_model."),
    "a state_dict of PEFT's": lambda name: name.replace(".weight", ".default.weight"),
    "an adapter's own name": lambda name: name.replace(".weight", ".sql.weight"),
    "all at once": lambda name: f"module._orig_mod.{name}".replace(".weight", ".default.weight"),
}


@pytest.mark.parametrize("reader", ["load_adapter", "serving"])
@pytest.mark.parametrize("case", SPELLINGS)
def test_names_with_wrappers_in_them_mean_the_modules_inside(case: str, reader: str, tmp_path: Path) -> None:
    want = in_peft(llama(), saved(tmp_path))
    respelled(tmp_path, SPELLINGS[case])
    if reader == "load_adapter":
        got = output(load_adapter(llama(), tmp_path), tokens())
    else:
        served = MultiAdapterModel(llama())
        served.load(tmp_path, "a")
        got = served(tokens(), adapter_ids="a").logits
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    "fields", [{"target_modules": ["q_proj", "embed_tokens"], "modules_to_save": ["lm_head"]}, {"use_dora": True}]
)
def test_the_spellings_of_other_tensors(fields: dict[str, Any], tmp_path: Path) -> None:
    saved(tmp_path, **fields)
    want = in_peft(llama(), tmp_path)
    names = {".lora_magnitude_vector": ".lora_magnitude_vector.default.weight", "_A.w": "_A.default.w"}
    names |= {"_embedding_B": "_embedding_B.default", "lm_head.w": "lm_head.modules_to_save.default.w"}

    def spell(name: str) -> str:
        for old, new in names.items():
            name = name.replace(old, new)
        return name

    respelled(tmp_path, spell)
    torch.testing.assert_close(output(load_adapter(llama(), tmp_path), tokens()), want)


def llava() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = CLIPVisionConfig(**sizes, image_size=8, patch_size=4)
    text = LlamaConfig(**sizes, vocab_size=67, initializer_range=0.3)
    return LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_index=66)
    ).eval()


@pytest.mark.parametrize("old", ["language_model.model.layers", "model.layers", "layers"])
def test_paths_of_other_times_are_mapped(old: str, tmp_path: Path) -> None:
    want = in_peft(llava(), saved(tmp_path, llava(), target_modules="all-linear"))
    respelled(
        tmp_path,
        lambda name: name.replace("model.language_model.layers", old).replace(f"{START}model.", START),
    )
    torch.testing.assert_close(output(load_adapter(llava(), tmp_path), tokens()), want)


def test_what_could_be_two_modules_is_neither_and_the_nearest_are_named(tmp_path: Path) -> None:
    saved(tmp_path)
    tensors = load_file(tmp_path / TENSOR_FILE)
    name = f"{START}model.layers.0.self_attn.q_proj.lora_A.weight"
    twice = name.replace("layers", "module.layers")
    save_file({**tensors, twice: tensors[name].clone()}, tmp_path / TENSOR_FILE)
    with pytest.raises(ValueError, match=f"{twice} does not belong .*; the model has '{name}', "):
        load_adapter(llama(), tmp_path)
    del tensors[name]
    save_file(tensors | {twice: torch.ones(2, 32), twice + "x": torch.ones(2)}, tmp_path / TENSOR_FILE)
    save_file(
        tensors
        | {"a.q_proj.lora_A.weight": torch.ones(2, 32), twice: torch.ones(2, 32), f"module.{twice}": torch.ones(1)},
        tmp_path / TENSOR_FILE,
    )
    with pytest.raises(ValueError, match=f"{name} is missing: .*; the file has '.*{twice}', '.*{twice}', 'a.q_proj"):
        load_adapter(llama(), tmp_path)


def grown(rows: int = 70, seed: int = 0) -> Any:
    model = llama()
    torch.manual_seed(seed)
    model.resize_token_embeddings(rows)
    return model


# What PEFT is told to save with the adapter, and what the adapter is on.
WHOLE = {
    "beside it": ["q_proj"],
    "under it": ["q_proj", "embed_tokens", "lm_head"],
}


def with_embeddings(directory: Path, model: Any, case: str) -> Path:
    torch.manual_seed(7)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=WHOLE[case], init_lora_weights=False))
    adapted.save_pretrained(directory, save_embedding_layers=True)
    return directory


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("case", WHOLE)
def test_embeddings_that_are_the_bases_are_dropped(case: str, tied: bool, tmp_path: Path) -> None:
    def make() -> Any:
        return llama(tie_word_embeddings=tied)

    want = in_peft(make(), with_embeddings(tmp_path, make(), case))
    model = make()
    embedding = model.model.embed_tokens.weight
    before = embedding.clone()
    torch.testing.assert_close(output(load_adapter(model, tmp_path), tokens()), want)
    assert torch.equal(embedding, before)


@pytest.mark.parametrize("case", WHOLE)
def test_embeddings_that_are_others_are_the_models_until_unload(case: str, tmp_path: Path) -> None:
    with_embeddings(tmp_path / "a", grown(seed=1), case)
    want = in_peft(grown(seed=2), tmp_path / "a")
    model = grown(seed=2)
    base = output(model, tokens())
    with pytest.warns(UserWarning, match=r"another .*embed_tokens\.weight, lm_head\.weight than this model had"):
        load_adapter(model, tmp_path / "a")
    torch.testing.assert_close(output(model, tokens()), want)
    for save, name in ((save_adapter, "b"), (export_lora, "c")):
        save(model, tmp_path / name)
        torch.testing.assert_close(in_peft(grown(seed=3), tmp_path / name), want)
        other = grown(seed=3)
        with pytest.warns(UserWarning, match="trained or grown"):
            torch.testing.assert_close(output(load_adapter(other, tmp_path / name), tokens()), want)
    merge(other)
    torch.testing.assert_close(output(unload(other), tokens()), want)
    assert torch.equal(output(unload(model), tokens()), base)


@pytest.mark.parametrize("case", WHOLE)
def test_embeddings_that_cannot_be_taken_are_refused_in_their_own_words(case: str, tmp_path: Path) -> None:
    with_embeddings(tmp_path, grown(seed=1), case)
    small = llama()
    with pytest.raises(ValueError, match=r"this model's has \(67, 32\): the vocabulary had grown .*embeddings\(70\)"):
        load_adapter(small, tmp_path)
    several = inject(grown(), LoRAConfig(r=2, target_modules=["v_proj"]), "first")
    with pytest.raises(ValueError, match="the adapters that are in the model already go with its own"):
        load_adapter(several, tmp_path)
    tied = llama(tie_word_embeddings=True)
    tied.resize_token_embeddings(70)
    with pytest.raises(ValueError, match="must be equal, since they are one weight in this model"):
        load_adapter(tied, tmp_path)
    with pytest.raises(AdapterError, match="embed_tokens"):
        MultiAdapterModel(grown()).load(tmp_path, "a")


def test_a_base_weight_that_is_no_embeddings_must_be_the_models(tmp_path: Path) -> None:
    saved(tmp_path)
    name = f"{START}model.layers.0.self_attn.q_proj.base_layer.weight"
    tensors, weight = load_file(tmp_path / TENSOR_FILE), llama().model.layers[0].self_attn.q_proj.weight.detach()
    save_file(tensors | {name: weight.clone()}, tmp_path / TENSOR_FILE)
    load_adapter(llama(), tmp_path)
    save_file(tensors | {name: weight + 1}, tmp_path / TENSOR_FILE)
    with pytest.raises(ValueError, match="is not the base weight of this model"):
        load_adapter(llama(), tmp_path)


NOTHING: dict[str, Any] = {
    "layers_pattern": ["", []],
    "layers_to_transform": [[]],
    "exclude_modules": ["", []],
    "modules_to_save": [[]],
    "use_rslora": [None],
    "use_dora": [None],
    "lora_bias": [None],
    "fan_in_fan_out": [None],
    "init_lora_weights": [None],
    "revision": [""],
    "base_model_name_or_path": [""],
    "target_parameters": [[], None, ""],
    "some_other_field": ["", None, [], {}],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name in NOTHING for value in NOTHING[name]])
def test_a_field_that_says_nothing_is_not_there(name: str, value: Any, tmp_path: Path) -> None:
    plain = read_config(saved(tmp_path))
    with_fields(tmp_path, **{name: value})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = read_config(tmp_path)
    assert config == plain or (name == "init_lora_weights" and config.init_lora_weights is True)


@pytest.mark.parametrize("peft_type", METHODS)
def test_null_is_no_error_of_any_methods_switches(peft_type: str) -> None:
    kind = METHODS[peft_type]
    switches = [name for name, value in vars(kind).items() if value is False and name in kind.__dataclass_fields__]
    kind.from_peft({"peft_type": peft_type, "total_step": 10, **dict.fromkeys(switches)})


@pytest.mark.parametrize("value", [None, [], ""])
def test_targets_of_nothing_stay_what_they_are(value: Any, tmp_path: Path) -> None:
    saved(tmp_path)
    with_fields(tmp_path, target_modules=value)
    if value is None:  # the usual ones of a Llama
        load_adapter(llama(), tmp_path)
    else:
        with pytest.raises(ValueError, match="target_modules is empty"):
            load_adapter(llama(), tmp_path)


def test_a_byte_order_mark_is_none_of_the_content(tmp_path: Path) -> None:
    path = saved(tmp_path) / CONFIG_FILE
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    load_adapter(llama(), tmp_path)


def test_another_base_models_name_is_a_warning(tmp_path: Path) -> None:
    saved(tmp_path)
    for theirs, ours in (("org/tiny", "/models/tiny/"), ("C:\\models\\Tiny", "tiny"), ("", "tiny"), ("tiny", "")):
        with_fields(tmp_path, base_model_name_or_path=theirs)
        model = llama()
        model.name_or_path = ours
        load_adapter(model, tmp_path)
    with_fields(tmp_path, base_model_name_or_path="org/other")
    model = llama()
    model.name_or_path = "tiny"
    with pytest.warns(UserWarning, match="was trained on 'org/other', and this model is 'tiny'"):
        load_adapter(model, tmp_path)


@pytest.mark.parametrize("adapter", ["lora", "dora", "vera"])
def test_loading_leaves_the_callers_random_numbers_alone(adapter: str, tmp_path: Path) -> None:
    from fastadapt import DoRAConfig, VeRAConfig

    config: Any = {"lora": LoRAConfig, "dora": DoRAConfig, "vera": VeRAConfig}[adapter](r=2, target_modules=["q_proj"])
    save_adapter(inject(llama(), config), tmp_path)
    model = llama()
    torch.manual_seed(11)
    want = torch.rand(3)
    torch.manual_seed(11)
    load_adapter(model, tmp_path)
    assert torch.equal(torch.rand(3), want)


def test_a_module_that_is_called_like_a_wrapper_is_a_module(tmp_path: Path) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.q = nn.Linear(4, 4)
            self.module = nn.ModuleDict({"q": nn.Linear(4, 4)})

        def forward(self, x: Tensor) -> Tensor:
            return self.module["q"](self.q(x))

    model = inject(Two(), LoRAConfig(r=2, target_modules=["q"], init_lora_weights=False))
    save_adapter(model, tmp_path)
    x = torch.ones(1, 4)
    other = load_adapter(Two(), tmp_path)
    torch.testing.assert_close(other(x), model(x))
    set_adapter(other, None)
    respelled(tmp_path, lambda name: name.replace("module.q", "q.q"))
    with pytest.raises(ValueError, match="is missing"):
        load_adapter(Two(), tmp_path)
