"""What names of experts mean, in configs and in older files: PEFT's rule where it has one, and nothing unasked."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from test_experts import BOTH, deepseek, gpt_oss, logits, mixtral, old_file, quiet, qwen3_moe, randomise
from torch import Tensor, nn

import fastadapt
from fastadapt import DoRAConfig, HiRAConfig, LoRAConfig, VeRAConfig
from fastadapt.layers.experts import AdapterExperts
from fastadapt.model.adapted import adapter_layers

peft = pytest.importorskip("peft", minversion="0.21")
transformers = pytest.importorskip("transformers", minversion="5.5")

__all__ = ["quiet"]  # a fixture that is used by itself

SPELLED = r".*\.(q_proj|gate_proj|up_proj|down_proj)"


def adapted(model: nn.Module, name: str = "default") -> set[str]:
    """What an adapter is on, without the model's own path: of experts "layer.name" of each weight."""
    found = set()
    for path, layer in adapter_layers(model).items():
        if name in layer.adapters:
            adapter: Any = layer.adapters[name]
            parts = adapter.parts if isinstance(layer, AdapterExperts) else [""]
            found |= {f"{path}.{part}".removeprefix("model.layers.").rstrip(".") for part in parts}
    return found


def experts_in(*layers: int) -> set[str]:
    return {f"{layer}.mlp.{name}" for layer in layers for name in BOTH}


def rank_of(model: nn.Module, path: str, part: str = "") -> int:
    adapter: Any = adapter_layers(model)[f"model.layers.{path}"].adapters["default"]
    factors: tuple[Tensor, Tensor] = (adapter.part(part) if part else adapter).factors
    return factors[0].shape[-2]


@pytest.mark.parametrize("targets", ["all-linear", SPELLED, ["q_proj", "gate_proj", "up_proj", "down_proj", "gate"]])
def test_a_second_adapter_is_where_the_first_is(targets: Any, tmp_path: Path) -> None:
    """The weights of experts are inside of their layer then."""
    model = fastadapt.inject(qwen3_moe(), LoRAConfig(r=2, target_modules=targets), "first")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fastadapt.inject(model, LoRAConfig(r=2, target_modules=targets), "second")
    assert adapted(model, "second") == adapted(model, "first") > experts_in(0, 1)
    old_file(tmp_path, ("gate_proj", "up_proj", "down_proj"), "mlp", (32, 20))
    fastadapt.load_adapter(model, tmp_path, "third")
    alone = fastadapt.load_adapter(qwen3_moe(), tmp_path)
    assert torch.equal(logits(model), logits(alone))


def test_an_expression_names_experts_as_in_peft(tmp_path: Path) -> None:
    theirs = peft.get_peft_model(qwen3_moe(), peft.LoraConfig(r=4, lora_alpha=8, target_modules=SPELLED)).eval()
    randomise(theirs)
    ours = fastadapt.inject(qwen3_moe(), LoRAConfig(r=4, lora_alpha=8, target_modules=SPELLED))
    assert adapted(ours) == experts_in(0, 1) | {"0.self_attn.q_proj", "1.self_attn.q_proj"}
    assert rank_of(ours, "0.mlp.experts", "gate_up_proj") == 8
    theirs.save_pretrained(tmp_path / "theirs")
    fastadapt.load_adapter(ours, tmp_path / "theirs", "theirs")
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-5, atol=1e-6)
    fastadapt.save_adapter(ours, tmp_path / "ours")
    randomise(ours)
    fastadapt.set_adapter(ours, "default")
    fastadapt.save_adapter(ours, tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(qwen3_moe(), tmp_path / "ours").eval()
    torch.testing.assert_close(logits(back), logits(ours), rtol=1e-5, atol=1e-6)
    # Experts alone, of one layer, and by the number of one of them.
    for pattern in (r".*(gate|up|down)_proj", r".*experts\.\d+\..*proj"):
        assert adapted(fastadapt.inject(qwen3_moe(), LoRAConfig(target_modules=pattern))) == experts_in(0, 1)
    one = fastadapt.inject(qwen3_moe(), LoRAConfig(target_modules=r".*layers\.1\..*(gate|up|down)_proj"))
    assert adapted(one) == experts_in(1)
    with pytest.raises(ValueError, match=r"nothing in Qwen3MoeForCausalLM matches '\.\*wrong'"):
        fastadapt.inject(qwen3_moe(), LoRAConfig(target_modules=r".*wrong"))


def test_a_file_of_an_expression_that_names_experts_is_read(tmp_path: Path) -> None:
    old_file(tmp_path, ("w1", "w3", "w2"), "block_sparse_moe", (32, 24))
    expected = logits(fastadapt.load_adapter(mixtral(), tmp_path))
    fields = json.loads((tmp_path / "adapter_config.json").read_text())
    for pattern in (
        r".*\.(q_proj|gate|w1|w2|w3)",
        r".*(q_proj|block_sparse_moe\.gate)|.*\.block_sparse_moe\.experts\.[0-9]+\.w\d",
    ):
        (tmp_path / "adapter_config.json").write_text(json.dumps({**fields, "target_modules": pattern}))
        assert torch.equal(logits(fastadapt.load_adapter(mixtral(), tmp_path)), expected)


def test_names_with_a_path_mean_what_is_there() -> None:
    """Shared experts, and the layers of a dense block, are no routed experts."""
    names = ["gate_proj", "up_proj", "down_proj"]
    shared = [f"shared_experts.{name}" for name in names]
    assert adapted(fastadapt.inject(deepseek(), LoRAConfig(target_modules=shared))) == {f"1.mlp.{t}" for t in shared}
    one = LoRAConfig(target_modules=["shared_experts.gate_proj"], target_parameters=["experts.down_proj"])
    assert adapted(fastadapt.inject(deepseek(), one)) == {"1.mlp.shared_experts.gate_proj", "1.mlp.experts.down_proj"}
    paths = [f"model.layers.1.mlp.experts.{e}.{name}" for e in range(4) for name in names]
    assert adapted(fastadapt.inject(qwen3_moe(), LoRAConfig(target_modules=paths))) == experts_in(1)
    old = [f"layers.1.block_sparse_moe.experts.0.{name}" for name in ("w1", "w3", "w2")]
    assert adapted(fastadapt.inject(mixtral(), LoRAConfig(target_modules=old))) == experts_in(1)
    of_router = LoRAConfig(target_modules=["model.layers.0.block_sparse_moe.gate"])
    assert adapted(fastadapt.inject(mixtral(), of_router)) == {"0.mlp.gate"}


def test_what_is_left_out_is_left_out_of_experts() -> None:
    names = ["q_proj", "gate_proj", "up_proj", "down_proj"]
    attention = {f"{layer}.self_attn.{name}_proj" for layer in (0, 1) for name in "qkvo"}
    last = {"1.mlp.gate", *experts_in(1)}
    for fields, expected in (
        ({"target_modules": "all-linear", "exclude_modules": ["experts"]}, attention | {"0.mlp.gate", "1.mlp.gate"}),
        ({"target_modules": "all-linear", "exclude_modules": ["experts", "gate"]}, attention),
        ({"target_modules": "all-linear", "exclude_modules": r".*layers\.0\.mlp\..*"}, attention | last),
        ({"target_modules": "all-linear", "modules_to_save": ["0.mlp"]}, attention | last),
        ({"target_modules": names, "layers_to_transform": [1]}, {"1.self_attn.q_proj"} | experts_in(1)),
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert adapted(fastadapt.inject(qwen3_moe(), LoRAConfig(**fields))) == expected, fields
    with pytest.warns(UserWarning, match=r"adapts no model.layers.\*.mlp.experts.gate_up_proj:"):
        model = fastadapt.inject(mixtral(), LoRAConfig(target_modules="all-linear", exclude_modules=["w1", "w3"]))
    assert experts_in(0, 1) & adapted(model) == {"0.mlp.experts.down_proj", "1.mlp.experts.down_proj"}
    with pytest.raises(ValueError, match=r"names w3 without w1, .*, model.layers.0.mlp.experts.gate_up_proj: name"):
        fastadapt.inject(mixtral(), LoRAConfig(target_modules="all-linear", exclude_modules=["w1"]))


def test_ranks_of_old_names() -> None:
    names = ["q_proj", "gate_proj", "up_proj", "down_proj", "gate"]
    config = LoRAConfig(
        r=2,
        lora_alpha=2,
        target_modules=names,
        rank_pattern={"gate_proj": 4, "up_proj": 4, "layers.0.mlp.gate": 3},
        alpha_pattern={"up_proj": 6, "gate_proj": 6},
    )
    model = fastadapt.inject(qwen3_moe(), config)
    assert (rank_of(model, "0.mlp.experts", "gate_up_proj"), rank_of(model, "0.mlp.experts", "down_proj")) == (8, 2)
    assert (rank_of(model, "0.mlp.gate"), rank_of(model, "1.mlp.gate")) == (3, 2)
    experts: Any = adapter_layers(model)["model.layers.1.mlp.experts"].adapters["default"]
    assert experts.part("gate_up_proj").scaling == 12 / 8
    with pytest.raises(ValueError, match=r"rank_pattern gives gate_proj 4, up_proj 2, and they are one weight"):
        fastadapt.inject(qwen3_moe(), LoRAConfig(r=2, target_modules=names, rank_pattern={"gate_proj": 4}))
    shared = LoRAConfig(r=8, share_rank=True, target_modules="all-linear", rank_pattern={"w1": 3, "w3": 3})
    model = fastadapt.inject(mixtral(), shared)
    assert (rank_of(model, "0.mlp.experts", "gate_up_proj"), rank_of(model, "0.mlp.experts", "down_proj")) == (6, 4)


def test_parameters_that_are_saved_whole_take_no_adapter() -> None:
    """Else the adapter would be on what does not run."""
    for saved in (["mlp"], ["experts"]):
        with pytest.raises(ValueError, match=r"is called 'experts.down_proj' \(after exclude_modules and modules_to_s"):
            fastadapt.inject(mixtral(), LoRAConfig(target_parameters=["experts.down_proj"], modules_to_save=saved))
    model = fastadapt.inject(mixtral(), LoRAConfig(target_parameters=["experts.down_proj"], modules_to_save=["0.mlp"]))
    assert adapted(model) == {"1.mlp.experts.down_proj"}
    model.train()
    logits(model).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_no_name_is_passed_over() -> None:
    with pytest.raises(
        ValueError, match=r"GptOssExperts.gate_up_proj_bias takes no adapter: only gate_up_proj and down"
    ):
        fastadapt.inject(gpt_oss(), LoRAConfig(target_parameters=[*BOTH, "experts.gate_up_proj_bias"]))
    model = fastadapt.inject(gpt_oss(), LoRAConfig(target_parameters=BOTH))
    with pytest.raises(ValueError, match=r"GptOssExperts.gate_up_proj_bias takes no adapter"):
        fastadapt.inject(model, LoRAConfig(target_parameters=[*BOTH, "experts.gate_up_proj_bias"]), "second")


def test_a_layers_weight_whose_file_peft_has_otherwise_is_refused() -> None:
    for targets in (None, ["embed_tokens"]):
        model = mixtral()
        if targets:
            fastadapt.inject(model, LoRAConfig(target_modules=targets), "first")
        with pytest.raises(
            ValueError, match=r"model.embed_tokens: the weight of Embedding takes an adapter by target_mo"
        ):
            fastadapt.inject(model, LoRAConfig(target_parameters=["embed_tokens.weight"]))
    sizes = {"vocab_size": 64, "n_embd": 32, "n_layer": 1, "n_head": 4}
    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes))
    with pytest.raises(ValueError, match=r"attn.c_proj: the weight of Conv1D takes an adapter by target_modules alone"):
        fastadapt.inject(gpt2, LoRAConfig(target_parameters=["attn.c_proj.weight"]))
    fastadapt.inject(mixtral(), LoRAConfig(target_parameters=["o_proj.weight"]))


class Packed(Tensor):
    """A weight that a library has quantised, and makes the values of where they are asked for."""

    values: Tensor

    @staticmethod
    def __new__(cls, values: Tensor) -> Packed:
        return torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=torch.float32)

    def __init__(self, values: Tensor) -> None:
        self.values = values

    def dequantize(self) -> Tensor:
        return self.values.float()

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten.detach.default:
            return Packed(args[0].values)
        raise NotImplementedError(f"no {function}")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda weight: weight.to(torch.int8), r"its gate_up_proj is quantised \(Parameter, torch.int8\)"),
        (lambda weight: weight.to(torch.float8_e4m3fn), r"its gate_up_proj is quantised \(Parameter, torch.float8_e4"),
        (lambda weight: Packed(weight.to(torch.int8)), r"its gate_up_proj is quantised \(Packed, torch.float32\)"),
        (lambda weight: weight.bfloat16(), r"its gate_up_proj is torch.bfloat16 and its down_proj is torch.float32"),
    ],
)
def test_quantised_experts_are_refused_when_an_adapter_is_put_on(change: Any, said: str) -> None:
    model = mixtral()
    experts = model.model.layers[1].mlp.experts
    experts.gate_up_proj = nn.Parameter(change(experts.gate_up_proj.detach()), requires_grad=False)
    for config in (LoRAConfig(target_parameters=BOTH), DoRAConfig(target_parameters=["experts.down_proj"])):
        with pytest.raises(ValueError, match=f"target_parameters: model.layers.1.mlp.experts: {said}"):
            fastadapt.inject(model, config)
    assert not adapter_layers(model)


def test_parametrized_experts_are_refused() -> None:
    """As bitsandbytes quantises them."""
    model = mixtral()
    for layer in model.model.layers:
        for name in ("gate_up_proj", "down_proj"):
            nn.utils.parametrize.register_parametrization(layer.mlp.experts, name, nn.Identity())
    with pytest.raises(ValueError, match=r"'experts.gate_up_proj', .* the experts' weights are parametrized, as when"):
        fastadapt.inject(model, LoRAConfig(target_parameters=BOTH))
    model = fastadapt.inject(mixtral(), LoRAConfig(target_parameters=BOTH))
    nn.utils.parametrize.register_parametrization(
        model.model.layers[1].mlp.experts.base_layer, "down_proj", nn.Identity()
    )
    with pytest.raises(ValueError, match=r"layers.1.mlp.experts .* cannot run with an adapter: its weights are param"):
        logits(model)


def test_errors_say_what_weights_of_experts_are_called() -> None:
    with pytest.raises(ValueError, match=r"'experts.w1' .*; the weights of experts are called model.layers.\*.mlp.exp"):
        fastadapt.inject(mixtral(), LoRAConfig(target_parameters=["experts.w1"]))
    with pytest.raises(ValueError, match="; no experts have weights that are stacked"):
        fastadapt.inject(nn.Sequential(nn.Linear(2, 2)), LoRAConfig(target_parameters=["gate_up_proj"]))
    with pytest.raises(
        ValueError, match=r"matches 'gate_up_proj' .*; gate_up_proj: weights of experts go into target_p"
    ):
        fastadapt.inject(gpt_oss(), LoRAConfig(target_modules=["gate_up_proj"]))
    cure = r"and the weights of experts in target_parameters \(experts.gate_up_proj, experts.down_proj\)"
    with pytest.raises(ValueError, match=rf"MixtralExperts cannot take an adapter of LoRAConfig: .*{cure}"):
        fastadapt.inject(mixtral(), LoRAConfig(target_modules=["experts"]))
    with pytest.raises(ValueError, match="and others in modules_to_save"):
        fastadapt.inject(mixtral(), HiRAConfig(target_modules=["experts"]))
    with pytest.warns(UserWarning, match="take none of this method"):
        fastadapt.inject(mixtral(), HiRAConfig(target_modules="all-linear"))
    with pytest.warns(UserWarning, match="have to be named in target_parameters"):
        fastadapt.inject(mixtral(), VeRAConfig(target_modules="all-linear"))


def test_a_rank_that_is_of_nothing_is_told() -> None:
    """It would be passed over: an adapter is on weights of experts, and not on experts."""
    fields: dict[str, Any] = {"target_parameters": BOTH, "target_modules": ["q_proj"]}
    for pattern in ({"experts": 4}, {"mlp.experts.gate_proj": 4}, {"v_proj": 4}):
        with pytest.warns(
            UserWarning, match=f"rank_pattern: no layer that the adapter is on is called '{next(iter(pattern))}'"
        ):
            fastadapt.inject(gpt_oss(), LoRAConfig(**fields, rank_pattern=pattern))
    with pytest.warns(UserWarning, match=r"alpha_pattern: .* called 'a', 'b': a key is the end of") as told:
        fastadapt.inject(mixtral(), LoRAConfig(**fields, alpha_pattern={"a": 1, "q_proj": 2, "b": 3}))
    assert told[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for pattern in ({"experts.down_proj": 4, "q_proj": 2}, {r".*layers\.1\..*": 4}):
            fastadapt.inject(gpt_oss(), LoRAConfig(**fields, rank_pattern=pattern))
        every = LoRAConfig(target_modules="all-linear", rank_pattern={"w2": 4, "gate": 2, "0.mlp.gate.weight": 3})
        fastadapt.inject(mixtral(), every)
