"""Which modules an adapter goes to, and with which rank and scale: PEFT's rules, compared with PEFT itself."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import tiny_models
import torch
from peft import LoraConfig, VeraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

import fastadapt


def ours(model: nn.Module, config: Any) -> dict[str, Any]:
    """{path: adapted layer} after inject."""
    fastadapt.inject(model, config)
    return {name: m for name, m in model.named_modules() if hasattr(m, "adapters") and hasattr(m, "active")}


def theirs(model: nn.Module, config: Any) -> dict[str, Any]:
    """{path: tuner layer} after get_peft_model."""
    with warnings.catch_warnings():
        # Advice about fan_in_fan_out and tied weights, which does not touch what is matched.
        warnings.simplefilter("ignore")
        base = get_peft_model(model, config).base_model.model
    return {name: m for name, m in base.named_modules() if isinstance(m, BaseTunerLayer)}


LLAMA_TARGETS: dict[str, dict[str, Any]] = {
    "suffixes": {"target_modules": ["q_proj", "v_proj"]},
    "set": {"target_modules": {"up_proj", "o_proj"}},
    "longer suffix": {"target_modules": ["self_attn.k_proj", "0.mlp.gate_proj"]},
    "full path": {"target_modules": ["model.layers.1.mlp.down_proj"]},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "regex": {"target_modules": r".*\.self_attn\.(q|k)_proj"},
    "regex of one layer": {"target_modules": r"model\.layers\.1\..*(proj)"},
    "all-linear": {"target_modules": "all-linear"},
    "all-linear, other case": {"target_modules": "All-Linear"},
    "default for llama": {"target_modules": None},
    "exclude suffix": {"target_modules": "all-linear", "exclude_modules": ["down_proj", "k_proj"]},
    "exclude path": {"target_modules": ["q_proj"], "exclude_modules": ["model.layers.0.self_attn.q_proj"]},
    "exclude regex": {"target_modules": ["q_proj", "v_proj"], "exclude_modules": r".*layers\.0\..*"},
    "exclude regex must match all": {"target_modules": ["q_proj"], "exclude_modules": r"q_proj"},
    "one layer": {"target_modules": ["q_proj"], "layers_to_transform": 1},
    "layer zero": {"target_modules": ["q_proj"], "layers_to_transform": 0},
    "layers": {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [0, 1]},
    "empty layers": {"target_modules": ["q_proj"], "layers_to_transform": []},
    "layers pattern": {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
    "layers patterns": {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": ["h", "layers"]},
    "layers and head": {"target_modules": ["q_proj", "lm_head"], "layers_to_transform": [1]},
    "modules_to_save is not adapted": {"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["lm_head"]},
    "all-linear and modules_to_save": {"target_modules": "all-linear", "modules_to_save": ["mlp"]},
}


@pytest.mark.parametrize("name", LLAMA_TARGETS)
def test_same_modules_as_peft_on_llama(name: str) -> None:
    fields = LLAMA_TARGETS[name]
    matched = ours(tiny_models.llama(), fastadapt.LoRAConfig(**fields))
    assert set(matched) == set(theirs(tiny_models.llama(), LoraConfig(**fields)))
    assert matched


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": "all-linear"},
        {"target_modules": None},
        {"target_modules": ["c_attn", "c_proj"]},
        {"target_modules": ["attn.c_proj"], "layers_to_transform": [1], "layers_pattern": "h"},
        {"target_modules": r".*mlp\.c_(fc|proj)"},
    ],
    ids=str,
)
def test_same_modules_as_peft_on_gpt2(fields: dict[str, Any]) -> None:
    matched = ours(tiny_models.gpt2(), fastadapt.LoRAConfig(**fields))
    expected = theirs(tiny_models.gpt2(), LoraConfig(**fields, fan_in_fan_out=True))
    assert set(matched) == set(expected)
    for path, layer in matched.items():
        assert layer.adapters["default"].lora_A.shape == expected[path].lora_A["default"].weight.shape


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["embed", "conv", "fc1", "fc2"]},
        {"target_modules": ["fc1", "head"], "exclude_modules": ["head"]},
        {"target_modules": r"fc\d|conv"},
        {"target_modules": ["fc1", "head"], "modules_to_save": ["head", "norm"]},
    ],
    ids=str,
)
def test_same_modules_as_peft_on_a_plain_module(fields: dict[str, Any]) -> None:
    matched = ours(tiny_models.mixed(), fastadapt.LoRAConfig(**fields))
    assert set(matched) == set(theirs(tiny_models.mixed(), LoraConfig(**fields)))


@pytest.mark.parametrize("fields", [{"target_modules": "all-linear"}, {"target_modules": None}], ids=str)
def test_same_modules_as_peft_for_vera(fields: dict[str, Any]) -> None:
    matched = ours(tiny_models.llama(), fastadapt.VeRAConfig(r=6, **fields))
    assert set(matched) == set(theirs(tiny_models.llama(), VeraConfig(r=6, **fields)))


class Experts(nn.Module):
    """Layers at the top of the model, with numbered experts inside: two indices in a path."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"q": nn.Linear(4, 4), "experts": self.experts()}) for _ in range(3))
        self.body = nn.ModuleDict(
            {"layers": nn.ModuleList(nn.ModuleDict({"experts": self.experts()}) for _ in range(3))}
        )

    @staticmethod
    def experts() -> nn.ModuleList:
        return nn.ModuleList(nn.ModuleDict({"q": nn.Linear(4, 4)}) for _ in range(2))


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("pattern", [None, "layers", "experts", ["missing", "layers"]])
def test_layers_to_transform_counts_the_index_that_peft_counts(pattern: Any, layer: int) -> None:
    fields = {"target_modules": ["q"], "layers_to_transform": [layer], "layers_pattern": pattern}
    if pattern == "experts" and layer == 2:
        with pytest.raises(ValueError, match="layers_to_transform"):
            ours(Experts(), fastadapt.LoRAConfig(**fields))
    else:
        assert set(ours(Experts(), fastadapt.LoRAConfig(**fields))) == set(theirs(Experts(), LoraConfig(**fields)))


@pytest.mark.parametrize("task_type", [None, "SEQ_CLS"])
def test_all_linear_on_a_classifier(task_type: str | None) -> None:
    from transformers import LlamaConfig, LlamaForSequenceClassification

    def classifier() -> nn.Module:
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
        model: nn.Module = LlamaForSequenceClassification(LlamaConfig(vocab_size=11, **sizes))
        return model

    fields = {"target_modules": "all-linear", "task_type": task_type}
    assert set(ours(classifier(), fastadapt.LoRAConfig(**fields))) == set(theirs(classifier(), LoraConfig(**fields)))


def trained(model: nn.Module) -> set[str]:
    """The paths, in the base model, of the modules that are trained whole."""
    return {name for name, module in model.named_modules() if hasattr(module, "copies")}


HEADS = {
    "BertForSequenceClassification": ("SEQ_CLS", {"classifier"}),
    "BertForTokenClassification": ("TOKEN_CLS", {"classifier"}),
    "BertForQuestionAnswering": ("QUESTION_ANS", {"qa_outputs"}),
    "DistilBertForSequenceClassification": ("SEQ_CLS", {"pre_classifier", "classifier"}),
    "RobertaForSequenceClassification": ("SEQ_CLS", {"classifier"}),
    "LlamaForSequenceClassification": ("SEQ_CLS", {"score"}),
    "LlamaForTokenClassification": ("TOKEN_CLS", {"score"}),
}


@pytest.mark.parametrize("name", HEADS)
def test_all_linear_beside_a_head_that_the_task_trains(name: str) -> None:
    task, heads = HEADS[name]
    model = tiny_models.headed(name)
    linear = {path for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    config = fastadapt.LoRAConfig(r=2, target_modules="all-linear", task_type=task)
    adapted = set(ours(model, config))
    assert trained(model) == heads
    assert adapted == {path for path in linear if path.split(".")[0] not in heads}
    assert config.modules_to_save is None
    try:
        expected = set(theirs(tiny_models.headed(name), LoraConfig(r=2, target_modules="all-linear", task_type=task)))
    except TypeError:  # PEFT adapts this head before it finds that it is to be trained whole
        pass
    else:
        assert adapted == expected


def test_a_part_of_a_head_that_is_trained_whole_is_trained_once() -> None:
    model = tiny_models.headed("RobertaForSequenceClassification")
    fields: dict[str, Any] = {"modules_to_save": ["out_proj"], "task_type": "SEQ_CLS"}
    fastadapt.inject(model, fastadapt.LoRAConfig(r=2, target_modules=["query"], **fields))
    assert trained(model) == {"classifier"}
    copies = [name for name, parameter in model.named_parameters() if ".copies." in name]
    assert len(copies) == len(list(model.classifier.original.parameters()))


def test_a_task_without_its_head_needs_another_by_name() -> None:
    fields: dict[str, Any] = {"r": 2, "target_modules": ["q_proj"]}
    for task in ("SEQ_CLS", "QUESTION_ANS"):
        model = tiny_models.llama()
        looked_for = "'classifier' or 'score'" if task == "SEQ_CLS" else "'qa_outputs'"
        with pytest.raises(ValueError, match=f"task_type {task} .*LlamaForCausalLM is called {looked_for}: name its"):
            fastadapt.inject(model, fastadapt.LoRAConfig(**fields, task_type=task))
        assert all(parameter.requires_grad for parameter in model.parameters())
        fastadapt.inject(model, fastadapt.LoRAConfig(**fields, task_type=task, modules_to_save=["norm"]))
        assert "model.norm" in trained(model)


def test_a_name_of_the_users_must_match_beside_the_tasks() -> None:
    model = tiny_models.headed("LlamaForSequenceClassification")
    fields: dict[str, Any] = {"r": 2, "target_modules": ["q_proj"], "task_type": "SEQ_CLS"}
    with pytest.raises(ValueError, match=r"modules_to_save: no module of .* is called 'lm_head'"):
        fastadapt.inject(model, fastadapt.LoRAConfig(**fields, modules_to_save=["norm", "lm_head"]))
    fastadapt.inject(model, fastadapt.LoRAConfig(**fields, modules_to_save=["classifier"]))
    assert trained(model) == {"score"}


PATTERNS: dict[str, tuple[dict[str, int], dict[str, int]]] = {
    "suffix": ({"q_proj": 3}, {"up_proj": 5}),
    "path": ({"model.layers.1.self_attn.q_proj": 2}, {"layers.0.mlp.up_proj": 7}),
    "partial segment matches nothing": ({"proj": 3}, {"_proj": 3}),
    "regex": ({r"layers\.1\..*_proj": 4}, {r".*mlp.*": 2}),
    "anchored": ({r"^model\.layers\.0\.self_attn\.q_proj": 4}, {r"^q_proj": 9}),
    "first key wins": ({r".*q_proj": 2, "q_proj": 7, "up_proj": 3}, {r".*\.1\..*": 4, "q_proj": 6}),
    "alternatives": ({"q_proj|up_proj": 5}, {"(q|up)_proj": 3}),
}


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("name", PATTERNS)
def test_rank_and_alpha_patterns(name: str, use_rslora: bool) -> None:
    ranks, alphas = PATTERNS[name]
    fields: dict[str, Any] = {
        "r": 6,
        "lora_alpha": 10,
        "target_modules": ["q_proj", "up_proj"],
        "use_rslora": use_rslora,
    }
    fields |= {"rank_pattern": ranks, "alpha_pattern": alphas}
    found = {
        path: (layer.adapters["default"].lora_A.shape[0], pytest.approx(float(layer.form().out_scale)))
        for path, layer in ours(tiny_models.llama(), fastadapt.LoRAConfig(**fields)).items()
    }
    expected = {
        path: (layer.lora_A["default"].weight.shape[0], layer.scaling["default"])
        for path, layer in theirs(tiny_models.llama(), LoraConfig(**fields)).items()
    }
    assert expected == found


def parameters_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"target_modules": ["c_attn"]}, "c_attn"),
        ({"target_modules": ["proj"]}, "proj"),
        ({"target_modules": ["q_proj", "query"]}, "'query'"),
        ({"target_modules": "layers[.]9[.].*"}, "layers[.]9[.].*"),
        ({"target_modules": []}, "target_modules"),
        ({"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]}, "exclude_modules"),
        ({"target_modules": ["q_proj"], "layers_to_transform": [7]}, "layers_to_transform"),
        ({"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "blocks"}, "layers_to_transform"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["classifier"]}, "classifier"),
        ({"target_modules": ["input_layernorm"]}, "input_layernorm"),
        ({"target_modules": ["q_proj", "input_layernorm"]}, "input_layernorm"),
        ({"target_modules": ["self_attn"]}, "self_attn"),
    ],
    ids=str,
)
def test_targets_that_cannot_be_are_named(fields: dict[str, Any], named: str) -> None:
    model = tiny_models.llama()
    modules = {name: id(module) for name, module in model.named_modules()}
    requires_grad = {name: p.requires_grad for name, p in model.named_parameters()}
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the name is looked for literally below
        fastadapt.inject(model, fastadapt.LoRAConfig(**fields))
    assert named in str(caught.value)
    assert {name: id(module) for name, module in model.named_modules()} == modules
    assert {name: p.requires_grad for name, p in model.named_parameters()} == requires_grad


def test_no_default_targets_for_an_unknown_architecture() -> None:
    with pytest.raises(ValueError, match="target_modules"):
        fastadapt.inject(tiny_models.mlp(), fastadapt.LoRAConfig())


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": r".*q_proj", "layers_to_transform": [1]},
        {"target_modules": ["q_proj"], "layers_pattern": "layers"},
    ],
    ids=str,
)
def test_contradicting_fields_are_refused_as_in_peft(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="layers_"):
        LoraConfig(**fields)
    with pytest.raises(ValueError, match="layers_"):
        fastadapt.LoRAConfig(**fields)
