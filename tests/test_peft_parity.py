"""The same adapter here and in PEFT: outputs, gradients, and directories that each loads from the other."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from helpers import assert_close
from peft import AdaLoraConfig, GloraConfig, HiraConfig, LoraConfig, PeftModel, VeraConfig, get_peft_model
from safetensors.torch import load_file
from tiny_models import output, randomise, tokens
from torch import Tensor, nn

import fastadapt
from fastadapt import AdaLoRAConfig, DoRAConfig, GLoRAConfig, HiRAConfig, LoRAConfig, VeRAConfig


@dataclass(frozen=True)
class Case:
    """One adapter on one model, described once for both libraries."""

    model: Callable[[], Any]
    fields: dict[str, Any]
    method: str = "lora"

    def ours(self, **more: Any) -> Any:
        config = OURS[self.method]
        return config(**{**self.fields, **more})

    def peft(self, **more: Any) -> Any:
        fields = copy.deepcopy({**self.fields, **more})  # PEFT changes the list in modules_to_save
        if self.model is tiny_models.gpt2:
            fields["fan_in_fan_out"] = True
        if self.method == "dora":
            fields["use_dora"] = True
        return PEFTS.get(self.method, LoraConfig)(**fields)


OURS = {
    "lora": LoRAConfig,
    "dora": DoRAConfig,
    "vera": VeRAConfig,
    "adalora": AdaLoRAConfig,
    "glora": GLoRAConfig,
    "hira": HiRAConfig,
}
PEFTS = {"vera": VeraConfig, "adalora": AdaLoraConfig, "glora": GloraConfig, "hira": HiraConfig}
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
BIASED_LLAMA = {"attention_bias": True}


def biased_llama() -> Any:
    model = tiny_models.llama(**BIASED_LLAMA)
    randomise([p for name, p in model.named_parameters() if name.endswith("bias")])
    return model


def headed(name: str, task: str, method: str = "lora", **fields: Any) -> Case:
    """A case of a model whose head the task type has trained whole."""
    sizes = {"init_r": 4, "target_r": 2, "total_step": 9} if method == "adalora" else {"r": 4}
    targets = ["q_proj", "v_proj"] if name.startswith("Llama") else ["query", "value"]
    targets = ["q_lin", "v_lin"] if name.startswith("DistilBert") else targets
    return Case(
        partial(tiny_models.headed, name), {**sizes, "target_modules": targets, "task_type": task, **fields}, method
    )


CASES = {
    "lora": Case(tiny_models.llama, {"r": 4, "lora_alpha": 6, "target_modules": "all-linear"}),
    "rslora": Case(tiny_models.llama, {"r": 5, "lora_alpha": 6, "target_modules": ATTENTION, "use_rslora": True}),
    "lora_bias": Case(biased_llama, {"r": 4, "lora_alpha": 6, "target_modules": "all-linear", "lora_bias": True}),
    "lora_only": Case(biased_llama, {"r": 4, "lora_alpha": 6, "target_modules": "all-linear", "bias": "lora_only"}),
    "patterns": Case(
        tiny_models.llama,
        {
            "r": 4,
            "lora_alpha": 6,
            "target_modules": ["q_proj", "up_proj"],
            "rank_pattern": {r".*\.1\..*q_proj": 3, "up_proj": 7},
            "alpha_pattern": {"model.layers.0.mlp.up_proj": 11, "q_proj": 2},
        },
    ),
    "patterns, rslora, dora": Case(
        tiny_models.llama,
        {"r": 4, "target_modules": ["q_proj", "up_proj"], "rank_pattern": {"q_proj": 2}, "use_rslora": True},
        "dora",
    ),
    "some layers": Case(
        tiny_models.llama,
        {"r": 4, "target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
    ),
    "regex": Case(tiny_models.llama, {"r": 4, "target_modules": r".*\.(up|down)_proj"}),
    "head": Case(tiny_models.llama, {"r": 4, "target_modules": ["lm_head", "embed_tokens", "q_proj"]}),
    "modules_to_save": Case(
        tiny_models.llama, {"r": 4, "target_modules": ATTENTION, "modules_to_save": ["lm_head", "input_layernorm"]}
    ),
    "dora": Case(biased_llama, {"r": 4, "lora_alpha": 6, "target_modules": "all-linear"}, "dora"),
    "dora, trained bias": Case(biased_llama, {"r": 4, "target_modules": ATTENTION, "bias": "lora_only"}, "dora"),
    "vera": Case(tiny_models.llama, {"r": 12, "target_modules": "all-linear"}, "vera"),
    "vera, settings": Case(
        biased_llama,
        {"r": 40, "target_modules": ATTENTION, "projection_prng_key": 17, "d_initial": 0.02, "bias": "vera_only"},
        "vera",
    ),
    "vera, modules_to_save": Case(
        tiny_models.llama, {"r": 8, "target_modules": ["up_proj"], "modules_to_save": ["lm_head"]}, "vera"
    ),
    "vera, no projection": Case(
        tiny_models.llama, {"r": 12, "target_modules": "all-linear", "save_projection": False}, "vera"
    ),
    "adalora": Case(
        biased_llama,
        {"init_r": 4, "target_r": 2, "total_step": 9, "lora_alpha": 6, "target_modules": "all-linear"},
        "adalora",
    ),
    "adalora, trained bias": Case(
        biased_llama,
        {"init_r": 4, "target_r": 2, "total_step": 9, "target_modules": ATTENTION, "bias": "lora_only"},
        "adalora",
    ),
    "glora": Case(biased_llama, {"r": 3, "target_modules": ATTENTION}, "glora"),
    "glora, vectors": Case(
        biased_llama,
        {"target_modules": ATTENTION, "config_A_B": "vector", "config_C": "vector", "config_D_E": "vector"},
        "glora",
    ),
    "hira": Case(biased_llama, {"r": 4, "target_modules": "all-linear"}, "hira"),
    "hira, settings": Case(
        tiny_models.llama,
        {
            "r": 4,
            "target_modules": ["q_proj", "up_proj"],
            "init_weights": "gaussian",
            "modules_to_save": ["lm_head"],
        },
        "hira",
    ),
    "gpt2 lora": Case(tiny_models.gpt2, {"r": 4, "lora_alpha": 6, "target_modules": "all-linear"}),
    "gpt2 lora_bias": Case(tiny_models.gpt2, {"r": 4, "target_modules": ["c_attn", "c_proj"], "lora_bias": True}),
    "gpt2 lora_only": Case(tiny_models.gpt2, {"r": 4, "target_modules": ["c_attn"], "bias": "lora_only"}),
    "gpt2 dora": Case(tiny_models.gpt2, {"r": 4, "lora_alpha": 6, "target_modules": ["c_attn", "c_fc"]}, "dora"),
    "gpt2 vera": Case(tiny_models.gpt2, {"r": 12, "target_modules": ["c_attn", "c_fc", "c_proj"]}, "vera"),
    "gpt2 adalora": Case(
        tiny_models.gpt2, {"init_r": 4, "target_r": 2, "total_step": 9, "target_modules": ["c_attn", "c_fc"]}, "adalora"
    ),
    "gpt2 hira": Case(tiny_models.gpt2, {"r": 3, "target_modules": ["c_attn", "c_fc", "c_proj"]}, "hira"),
    "mixed lora": Case(tiny_models.mixed, {"r": 3, "lora_alpha": 6, "target_modules": ["embed", "conv", "fc1", "fc2"]}),
    "mixed, patterns": Case(
        tiny_models.mixed,
        {
            "r": 3,
            "target_modules": ["embed", "conv", "fc1"],
            "rank_pattern": {"conv": 2},
            "alpha_pattern": {"embed": 5},
        },
    ),
    "mixed, modules_to_save": Case(
        tiny_models.mixed, {"r": 3, "target_modules": ["fc1", "conv"], "modules_to_save": ["head", "norm"]}
    ),
    "mixed dora": Case(tiny_models.mixed, {"r": 3, "target_modules": ["fc1", "fc2", "head"]}, "dora"),
    "mixed adalora": Case(
        tiny_models.mixed,
        {"init_r": 3, "target_r": 2, "total_step": 9, "target_modules": ["conv", "fc1", "fc2"]},
        "adalora",
    ),
    "bert classifier": headed("BertForSequenceClassification", "SEQ_CLS"),
    "bert classifier, all-linear": headed("BertForSequenceClassification", "SEQ_CLS", target_modules="all-linear"),
    "bert classifier, head as target": headed(
        "BertForSequenceClassification", "SEQ_CLS", target_modules=["query", "classifier"]
    ),
    "bert classifier, more saved": headed(
        "BertForSequenceClassification", "SEQ_CLS", modules_to_save=["pooler.dense", "LayerNorm"]
    ),
    "bert classifier, saved by name": headed(
        "BertForSequenceClassification", "SEQ_CLS", "dora", modules_to_save=["classifier"]
    ),
    "bert tokens": headed("BertForTokenClassification", "TOKEN_CLS", "glora"),
    "bert answers": headed("BertForQuestionAnswering", "QUESTION_ANS"),
    "distilbert classifier": headed("DistilBertForSequenceClassification", "SEQ_CLS"),
    "distilbert tokens": headed("DistilBertForTokenClassification", "TOKEN_CLS"),
    "distilbert answers": headed("DistilBertForQuestionAnswering", "QUESTION_ANS", "adalora"),
    "roberta classifier, parts as targets": headed(
        "RobertaForSequenceClassification", "SEQ_CLS", target_modules=["query", "dense", "out_proj"]
    ),
    "llama classifier": headed("LlamaForSequenceClassification", "SEQ_CLS", target_modules="all-linear"),
    "llama classifier, vera": headed("LlamaForSequenceClassification", "SEQ_CLS", "vera"),
    "llama tokens": headed("LlamaForTokenClassification", "TOKEN_CLS", "hira"),
    "llama answers": headed("LlamaForQuestionAnswering", "QUESTION_ANS"),
}
each_case = pytest.mark.parametrize("case", [pytest.param(case, id=name) for name, case in CASES.items()])


@contextmanager
def quiet_peft() -> Iterator[None]:
    """PEFT advises (fan_in_fan_out, tied weights, models without a hub name) and calls what transformers deprecates."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def in_peft(case: Case, **more: Any) -> Any:
    with quiet_peft():
        return get_peft_model(case.model(), case.peft(**more)).eval()


def load_in_peft(case: Case, directory: Path) -> Any:
    with quiet_peft():
        return PeftModel.from_pretrained(case.model(), directory).eval()


def save_from_peft(model: Any, directory: Path) -> None:
    with quiet_peft():
        model.save_pretrained(directory)


def in_ours(case: Case, **more: Any) -> Any:
    return fastadapt.inject(case.model(), case.ours(**more))


def peft_name(name: str) -> str:
    """A parameter of a PeftModel by its name in a checkpoint."""
    name = name.replace(".modules_to_save.default.", ".").replace(".default", "")
    return name.removesuffix(".weight") if name.endswith("lora_magnitude_vector.weight") else name


def our_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """What trains in our model, by the names in a checkpoint."""
    found = {}
    for path, module in model.named_modules():
        if hasattr(module, "adapters") and hasattr(module, "active"):
            adapter = module.adapters["default"]
            for name, suffix in adapter.checkpoint_names.items():
                found[f"base_model.model.{path}.{suffix}"] = adapter.get_parameter(name)
        elif hasattr(module, "copies") and hasattr(module, "active"):
            for name, parameter in module.copies["default"].named_parameters():
                found[f"base_model.model.{path}.{name}"] = parameter
    assert {id(p) for p in found.values()} == {id(p) for p in model.parameters() if p.requires_grad}
    return found


def peft_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {peft_name(name): p for name, p in model.named_parameters() if p.requires_grad}


def fill_alike(ours: nn.Module, peft: nn.Module) -> None:
    """Random values in every trained parameter of both models."""
    mine, other = our_parameters(ours), peft_parameters(peft)
    assert mine.keys() == other.keys()
    for seed, name in enumerate(sorted(mine)):
        assert mine[name].shape == other[name].shape, name
        randomise([mine[name]], seed)
        with torch.no_grad():
            # Magnitudes stay near the norms that they start from, as they do in training.
            if name.endswith("magnitude_vector"):
                mine[name].add_(other[name])
            other[name].copy_(mine[name])


def close(ours: Tensor, theirs: Tensor, tolerance: float = 2e-5) -> bool:
    """Within `tolerance` of the largest value."""
    return bool((ours - theirs).abs().max() <= tolerance * theirs.abs().max().clamp_min(1e-6))


@each_case
def test_outputs_and_gradients_are_pefts(case: Case) -> None:
    ours, peft = in_ours(case), in_peft(case)
    fill_alike(ours, peft)
    y, expected = output(ours, tokens()), output(peft, tokens())
    assert not close(expected, output(case.model(), tokens()), 1e-3), "this adapter changes nothing"
    assert close(y, expected)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2))
    (y * weights).sum().backward()
    (expected * weights).sum().backward()
    mine, other = our_parameters(ours), peft_parameters(peft)
    for name, parameter in other.items():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), f"{name} gets no gradient here"
        gradient = mine[name].grad
        assert gradient is not None
        assert close(gradient, parameter.grad, 1e-4), name


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["lora", "dora", "vera", "adalora", "glora", "hira", "mixed lora"])
def test_under_autocast_no_further_from_the_truth_than_peft(name: str, base: torch.dtype) -> None:
    """Output and gradient as Trainer(bf16=True) makes them, from a base in either dtype."""
    case = CASES[name]
    ours, peft = in_ours(case), in_peft(case)
    fill_alike(ours, peft)
    exact = deepcopy(ours).double()

    def step(model: Any, parameters: dict[str, nn.Parameter], autocast: bool) -> tuple[Tensor, Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = output(model, tokens())
        y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).bfloat16().to(y.dtype))
        grads = [grad for _, p in sorted(parameters.items()) if (grad := p.grad) is not None]
        assert len(grads) == len(parameters)
        return y.detach(), torch.cat([grad.flatten() for grad in grads])

    wanted = step(exact, our_parameters(exact), autocast=False)
    actual = step(ours.to(base), our_parameters(ours), autocast=True)
    theirs = step(peft.to(base), peft_parameters(peft), autocast=True)
    for mine, truth, other in zip(actual, wanted, theirs, strict=True):
        assert mine.dtype == other.dtype
        assert_close(mine, truth, other.bfloat16(), truth)


@each_case
def test_what_we_save_peft_loads(case: Case, tmp_path: Path) -> None:
    ours = in_ours(case)
    for seed, (_, parameter) in enumerate(sorted(our_parameters(ours).items())):
        randomise([parameter], seed)
    expected = output(ours, tokens())
    fastadapt.save_adapter(ours, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert close(output(load_in_peft(case, tmp_path), tokens()), expected)
    again = fastadapt.load_adapter(case.model(), tmp_path, trainable=True)
    assert torch.equal(output(again, tokens()), expected)
    # Without gradients to come, the products may be associated in another order.
    frozen = fastadapt.load_adapter(case.model(), tmp_path)
    assert close(output(frozen, tokens()), expected)
    assert not any(p.requires_grad for p in frozen.parameters())


@each_case
def test_what_peft_saves_we_load(case: Case, tmp_path: Path) -> None:
    peft = in_peft(case)
    for seed, (_, parameter) in enumerate(sorted(peft_parameters(peft).items())):
        randomise([parameter], seed)
    expected = output(peft, tokens())
    save_from_peft(peft, tmp_path)
    ours = fastadapt.load_adapter(case.model(), tmp_path, trainable=True)
    assert close(output(ours, tokens()), expected)
    assert our_parameters(ours).keys() == peft_parameters(peft).keys()
    fastadapt.merge(ours)
    assert close(output(ours, tokens()), expected, 1e-4)


@each_case
def test_both_write_the_same_tensors_and_settings(case: Case, tmp_path: Path) -> None:
    ours, peft = in_ours(case), in_peft(case)
    fill_alike(ours, peft)
    fastadapt.save_adapter(ours, tmp_path / "ours")
    save_from_peft(peft, tmp_path / "peft")
    mine = load_file(tmp_path / "ours" / "adapter_model.safetensors")
    other = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    # PEFT also writes an embedding layer that it takes for resized, whole, when one is targeted; it is the base's own.
    surplus = {name for name in other.keys() - mine.keys() if ".base_layer.weight" not in name}
    assert not surplus
    assert not mine.keys() - other.keys()
    for name, tensor in mine.items():
        assert torch.equal(tensor, other[name]), name
    configs = [json.loads((tmp_path / side / "adapter_config.json").read_text()) for side in ("ours", "peft")]
    for config in configs:
        if isinstance(config["target_modules"], list):
            config["target_modules"].sort()
        if config.get("modules_to_save"):
            config["modules_to_save"] = list(dict.fromkeys(config["modules_to_save"]))  # PEFT repeats names
    told = {"peft_type", "inference_mode", "r", "use_dora", "modules_to_save"} & configs[1].keys()
    for field in set(case.fields) | told:
        assert configs[0].get(field, False) == configs[1][field], field


# VeRA's projections.


@pytest.mark.parametrize("key", [0, 17])
@pytest.mark.parametrize(
    ("model", "targets"),
    [(tiny_models.llama, "all-linear"), (tiny_models.llama, ["q_proj"]), (tiny_models.gpt2, ["c_fc"])],
)
def test_vera_projections_are_pefts_bit_for_bit(
    model: Callable[[], Any], targets: Any, key: int, tmp_path: Path
) -> None:
    case = Case(model, {"r": 9, "target_modules": targets, "projection_prng_key": key}, "vera")
    peft = in_peft(case)
    fastadapt.save_adapter(in_ours(case), tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert torch.equal(tensors["base_model.vera_A"], peft.base_model.vera_A["default"])
    assert torch.equal(tensors["base_model.vera_B"], peft.base_model.vera_B["default"])


@pytest.mark.parametrize("save_projection", [True, False])
def test_vera_projections_in_the_file_or_from_the_key(save_projection: bool, tmp_path: Path) -> None:
    case = Case(tiny_models.llama, {"r": 9, "target_modules": ATTENTION, "save_projection": save_projection}, "vera")
    ours, peft = in_ours(case), in_peft(case)
    fill_alike(ours, peft)
    fastadapt.save_adapter(ours, tmp_path / "ours")
    save_from_peft(peft, tmp_path / "peft")
    for side in ("ours", "peft"):
        names = load_file(tmp_path / side / "adapter_model.safetensors").keys()
        assert {"base_model.vera_A", "base_model.vera_B"} <= names or not save_projection
        assert save_projection or not any("vera_A" in name for name in names)
    expected = output(peft, tokens())
    assert close(output(fastadapt.load_adapter(case.model(), tmp_path / "peft"), tokens()), expected)
    assert close(output(load_in_peft(case, tmp_path / "ours"), tokens()), expected)


def test_a_vera_file_whose_projection_is_not_the_keys_is_honoured(tmp_path: Path) -> None:
    """The saved tensors rule, not the key: that is what save_projection is for."""
    case = Case(tiny_models.llama, {"r": 9, "target_modules": ATTENTION}, "vera")
    peft = in_peft(case)
    randomise(peft_parameters(peft).values())
    randomise([peft.base_model.vera_A["default"], peft.base_model.vera_B["default"]], 8)
    expected = output(peft, tokens())
    save_from_peft(peft, tmp_path)
    assert close(output(fastadapt.load_adapter(case.model(), tmp_path), tokens()), expected)


# 16-bit bases, dropout, several adapters.


@pytest.mark.parametrize("name", ["lora", "dora", "vera", "gpt2 dora", "hira"])
def test_bf16_models_agree_to_bf16(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    exact = in_ours(case)
    for seed, (_, parameter) in enumerate(sorted(our_parameters(exact).items())):
        randomise([parameter], seed)
    with torch.no_grad():  # trained adapters move an output by less than its size
        for name, parameter in our_parameters(exact).items():
            if "lora_B" in name or "lambda_b" in name or "hira_B" in name:
                parameter.mul_(0.2)
    fastadapt.save_adapter(exact, tmp_path)
    with quiet_peft():
        peft = PeftModel.from_pretrained(case.model().bfloat16(), tmp_path).eval()
    ours = fastadapt.load_adapter(case.model().bfloat16(), tmp_path)
    assert {p.dtype for p in our_parameters_or_none(ours)} == {torch.float32}
    expected = output(exact, tokens())
    theirs = (output(peft, tokens()).float() - expected).abs().max()
    mine = (output(ours, tokens()).float() - expected).abs().max()
    assert mine <= 2 * theirs + torch.finfo(torch.bfloat16).eps * expected.abs().max()


def our_parameters_or_none(model: nn.Module) -> list[nn.Parameter]:
    """The adapter's parameters, trained or not."""
    return [p for name, p in model.named_parameters() if ".adapters." in name]


@pytest.mark.parametrize("name", ["lora", "vera", "dora", "hira"])
def test_dropout_is_pefts_on_average(name: str) -> None:
    """Masks differ, so means over many draws are compared: the same expectation, and for DoRA the published rule."""
    case = CASES[name]
    field = f"{case.method}_dropout" if case.method in ("vera", "hira") else "lora_dropout"
    case = Case(tiny_models.mlp, {**case.fields, "target_modules": ["up"], field: 0.4}, case.method)
    ours, peft = in_ours(case), in_peft(case)
    fill_alike(ours, peft)
    x = torch.randn(1, 20, generator=torch.Generator().manual_seed(6)).expand(4000, 20)
    layers = ours.up, peft.base_model.model.up
    means, spreads = [], []
    for layer in layers:
        torch.manual_seed(0)
        y = layer.train()(x).detach()
        means.append(y.mean(0))
        spreads.append(y.std(0))
    assert (means[0] - means[1]).abs().max() <= 6 * spreads[1].max() / 4000**0.5
    assert torch.allclose(spreads[0], spreads[1], rtol=0.15, atol=1e-4)
    assert spreads[0].min() > 0


def test_two_adapters_of_two_types_beside_each_other(tmp_path: Path) -> None:
    expected = {}
    for name in ("lora", "vera"):
        peft = in_peft(CASES[name])
        randomise(peft_parameters(peft).values())
        expected[name] = output(peft, tokens())
        save_from_peft(peft, tmp_path / name)
    model = tiny_models.llama()
    for name in expected:
        fastadapt.load_adapter(model, tmp_path / name, name)
    for name, logits in expected.items():
        fastadapt.set_adapter(model, name)
        assert close(output(model, tokens()), logits)


def test_a_named_adapter_of_peft_loads(tmp_path: Path) -> None:
    case = CASES["lora"]
    with quiet_peft():
        peft = get_peft_model(case.model(), case.peft(), adapter_name="poems").eval()
    randomise([p for p in peft.parameters() if p.requires_grad])
    expected = output(peft, tokens())
    save_from_peft(peft, tmp_path)
    ours = fastadapt.load_adapter(case.model(), tmp_path / "poems", "verse")
    assert close(output(ours, tokens()), expected)
    fastadapt.save_adapter(ours, tmp_path / "back", "verse")
    assert close(output(load_in_peft(case, tmp_path / "back"), tokens()), expected)


def test_two_classifiers_of_peft_beside_each_other(tmp_path: Path) -> None:
    case = CASES["bert classifier"]
    model = case.model()
    base, expected = output(model, tokens()), {}
    for seed, name in enumerate(("first", "second")):
        peft = in_peft(case)
        randomise(peft_parameters(peft).values(), seed)
        expected[name] = output(peft, tokens())
        save_from_peft(peft, tmp_path / name)
        fastadapt.load_adapter(model, tmp_path / name, name, trainable=True)
    for name, logits in expected.items():
        fastadapt.set_adapter(model, name)
        assert close(output(model, tokens()), logits)
        assert {p.requires_grad for p in model.classifier.copies[name].parameters()} == {True}
    with fastadapt.disable_adapter(model):
        assert torch.equal(output(model, tokens()), base)
    with pytest.raises(ValueError, match="both replace classifier"):
        fastadapt.set_adapter(model, ["first", "second"])
    fastadapt.set_adapter(model, "first")
    fastadapt.merge(model)
    merged = fastadapt.unload(model)
    assert type(merged.classifier) is nn.Linear
    assert close(output(merged, tokens()), expected["first"], 1e-4)


def test_what_peft_has_loaded_and_saved_again_we_load(tmp_path: Path) -> None:
    case = CASES["llama classifier"]
    peft = in_peft(case)
    randomise(peft_parameters(peft).values())
    save_from_peft(peft, tmp_path / "once")
    save_from_peft(load_in_peft(case, tmp_path / "once"), tmp_path / "twice")
    fields = json.loads((tmp_path / "twice" / "adapter_config.json").read_text())
    assert fields["modules_to_save"] == ["classifier", "score"] * 2
    assert close(output(fastadapt.load_adapter(case.model(), tmp_path / "twice"), tokens()), output(peft, tokens()))


def test_targets_in_a_file_that_match_nothing_are_pefts_to_ignore(tmp_path: Path) -> None:
    """PEFT takes lists in which some names match nothing, so such adapters exist and must load."""
    case = Case(tiny_models.llama, {"r": 4, "target_modules": ["q_proj", "query"]})
    peft = in_peft(case)
    randomise(peft_parameters(peft).values())
    save_from_peft(peft, tmp_path)
    assert close(output(fastadapt.load_adapter(case.model(), tmp_path), tokens()), output(peft, tokens()))


def test_the_old_name_of_a_trained_bias_is_accepted(tmp_path: Path) -> None:
    """PEFT before 0.21 would have written <path>.bias; both spellings mean the trained bias."""
    from safetensors.torch import save_file

    case = CASES["lora_only"]
    peft = in_peft(case)
    randomise(peft_parameters(peft).values())
    save_from_peft(peft, tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = {name.replace(".base_layer.bias", ".bias"): tensor for name, tensor in load_file(file).items()}
    save_file(tensors, file)
    assert close(output(fastadapt.load_adapter(case.model(), tmp_path), tokens()), output(peft, tokens()))


@pytest.mark.parametrize(
    "fields",
    [
        {"layer_replication": [[0, 2], [1, 2]]},
        {"trainable_token_indices": [1]},
        {"use_qalora": True},
        {"alora_invocation_tokens": [3]},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "olora"},
        {"bias": "all"},
        {"megatron_config": {"a": 1}},
        {"arrow_config": {"top_k": 2}},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_settings_that_change_the_function_are_refused_by_name(fields: dict[str, Any], tmp_path: Path) -> None:
    fastadapt.save_adapter(in_ours(CASES["lora"]), tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    model = tiny_models.llama()
    modules = {name: id(module) for name, module in model.named_modules()}
    with pytest.raises(ValueError, match=next(iter(fields))):
        fastadapt.load_adapter(model, tmp_path)
    assert {name: id(module) for name, module in model.named_modules()} == modules
    assert all(p.requires_grad for p in model.parameters())
