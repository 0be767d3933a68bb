"""Experts of transformers with adapters: PEFT is the oracle for values, gradients and files."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import fastadapt
from fastadapt import DoRAConfig, LoRAConfig, VeRAConfig
from fastadapt.layers.experts import AdapterExperts, why_no_experts
from fastadapt.layers.kinds import AdapterParameter
from fastadapt.model.adapted import adapter_layers, present

peft = pytest.importorskip("peft", minversion="0.21")
transformers = pytest.importorskip("transformers", minversion="5.5")

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
TOKENS = torch.randint(64, (2, 7), generator=torch.Generator().manual_seed(0))
BOTH = ["experts.gate_up_proj", "experts.down_proj"]


def mixtral() -> Any:
    torch.manual_seed(0)
    config = transformers.MixtralConfig(**SIZES, intermediate_size=24, num_local_experts=4)
    return transformers.MixtralForCausalLM(config).eval()


def qwen3_moe(**changes: Any) -> Any:
    torch.manual_seed(0)
    own: dict[str, Any] = {"moe_intermediate_size": 20, "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}
    config = transformers.Qwen3MoeConfig(**SIZES, intermediate_size=48, mlp_only_layers=[], **{**own, **changes})
    return transformers.Qwen3MoeForCausalLM(config).eval()


def gpt_oss() -> Any:
    """Transposed weights, biases, and a gate of its own on interleaved columns."""
    torch.manual_seed(0)
    own: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}
    model = transformers.GptOssForCausalLM(transformers.GptOssConfig(**SIZES, intermediate_size=24, **own)).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_()
    return model


def deepseek() -> Any:
    """A dense layer before one of experts, and an expert that all tokens share."""
    torch.manual_seed(0)
    own: dict[str, Any] = {
        **{"moe_intermediate_size": 20, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
        **{"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "q_lora_rank": 16, "kv_lora_rank": 16},
        **{"qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8},
    }
    sizes = {**SIZES, "num_key_value_heads": 4}
    return transformers.DeepseekV3ForCausalLM(
        transformers.DeepseekV3Config(**sizes, intermediate_size=48, **own)
    ).eval()


MODELS: dict[str, Callable[[], Any]] = {
    "mixtral": mixtral,
    "qwen3_moe": qwen3_moe,
    "gpt_oss": gpt_oss,
    "deepseek": deepseek,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "both weights": {"target_modules": ["o_proj"], "target_parameters": BOTH},
    "one weight, an odd rank": {"target_parameters": ["gate_up_proj"], "target_modules": [], "r": 3},
    "the last weight, rsLoRA": {"target_parameters": ["experts.down_proj"], "target_modules": [], "use_rslora": True},
    "ranks by pattern": {
        "target_parameters": BOTH,
        "target_modules": ["o_proj"],
        "rank_pattern": {r".*\.gate_up_proj": 6},
        "alpha_pattern": {"down_proj": 5},
    },
}


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)
        # PEFT's own: what it says of patterns looks at modules alone, and not at parameters.
        warnings.filterwarnings("ignore", message=r"The following \w+ keys did not match any targeted module")
        warnings.filterwarnings("ignore", message="Unexpected keyword arguments .'fastadapt_lora_dropout'.")
        yield


def logits(model: Any) -> Tensor:
    found: Tensor = model(input_ids=TOKENS).logits
    return found


def randomise(model: nn.Module, stem: str = "lora_") -> None:
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if stem in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)


def theirs(make: Callable[[], Any], **fields: Any) -> Any:
    model = peft.get_peft_model(make(), peft.LoraConfig(**{"r": 4, "lora_alpha": 8, **fields})).eval()
    randomise(model)
    return model


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Of our adapter, by the names in a file."""
    found = {}
    for path, layer in adapter_layers(model).items():
        adapter: Any = layer.adapters["default"]
        for suffix, tensor in adapter.checkpoint_tensors().items():
            found[f"base_model.model.{path}.{suffix}"] = tensor.grad
    return found


def check_parity(make: Callable[[], Any], model: Any, directory: Path) -> None:
    """Forward, gradients, files both ways, and merging, against a model of PEFT's."""
    model.save_pretrained(directory / "theirs")
    ours = fastadapt.load_adapter(make(), directory / "theirs", trainable=True)
    expected, found = logits(model), logits(ours)
    assert (expected - logits(make())).abs().max() > 1e-3
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    expected.sin().sum().backward()
    found.sin().sum().backward()
    grads = gradients(ours)
    wanted = {n.replace(".default", ""): p.grad for n, p in model.named_parameters() if "lora_" in n}
    assert grads.keys() == wanted.keys()
    for name, grad in wanted.items():
        assert ((grads[name] - grad).norm() / grad.norm()) < 1e-5, name
    fastadapt.save_adapter(ours, directory / "ours")
    back = peft.PeftModel.from_pretrained(make(), directory / "ours").eval()
    torch.testing.assert_close(logits(back), expected, rtol=1e-6, atol=1e-7)
    files = [load_file(directory / side / "adapter_model.safetensors") for side in ("ours", "theirs")]
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(files[0][name], files[1][name]) for name in files[0])


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("config", CONFIGS)
def test_peft_is_the_oracle(model: str, config: str, tmp_path: Path) -> None:
    check_parity(MODELS[model], theirs(MODELS[model], **CONFIGS[config]), tmp_path)


@pytest.mark.parametrize("model", ["mixtral", "qwen3_moe"])
def test_all_linear_follows_pefts_rule(model: str, tmp_path: Path) -> None:
    """gate and up with twice the rank and lora_alpha, down, and the router."""
    make = MODELS[model]
    check_parity(make, theirs(make, target_modules="all-linear"), tmp_path)
    ours = fastadapt.inject(make(), LoRAConfig(r=4, lora_alpha=8, target_modules="all-linear"))
    fields = json.loads((tmp_path / "theirs" / "adapter_config.json").read_text())
    config = ours.adapter_configs["default"]
    assert config.target_parameters == sorted(fields["target_parameters"])
    assert (config.rank_pattern, config.alpha_pattern) == (fields["rank_pattern"], fields["alpha_pattern"])
    layers = adapter_layers(ours)
    assert isinstance(layers["model.layers.0.mlp.experts"], AdapterExperts)
    assert isinstance(layers["model.layers.0.mlp.gate"], AdapterParameter)
    randomise(ours)
    fastadapt.save_adapter(ours, tmp_path / "saved")
    back = peft.PeftModel.from_pretrained(make(), tmp_path / "saved").eval()
    torch.testing.assert_close(logits(back), logits(ours), rtol=1e-5, atol=1e-6)


def test_old_names_of_experts_mean_their_weights() -> None:
    names = ["q_proj", "gate_proj", "up_proj", "down_proj"]
    config = fastadapt.inject(qwen3_moe(), LoRAConfig(r=4, target_modules=names)).adapter_configs["default"]
    assert config.target_modules == ["q_proj"]
    assert config.target_parameters == ["down_proj", "gate_up_proj"]
    # Layers of these names that are no experts' keep their adapters.
    layers = adapter_layers(fastadapt.inject(deepseek(), LoRAConfig(target_modules=names[1:])))
    assert {path.partition("mlp.")[2] for path in layers} == {
        *("gate_proj", "up_proj", "down_proj", "experts"),
        *(f"shared_experts.{name}" for name in names[1:]),
    }
    with pytest.raises(ValueError, match="names gate_proj without up_proj"):
        fastadapt.inject(qwen3_moe(), LoRAConfig(target_modules=["q_proj", "gate_proj"]))


def test_what_peft_would_leave_out_of_a_file_is_told(tmp_path: Path) -> None:
    """It takes the names of the dense layer and of shared experts for those of experts."""
    model = fastadapt.inject(deepseek(), LoRAConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    with pytest.warns(UserWarning, match=r"layers.0.mlp.gate_proj and others like it, which PEFT leaves out"):
        fastadapt.save_adapter(model, tmp_path / "all")
    back = fastadapt.load_adapter(deepseek(), tmp_path / "all")
    torch.testing.assert_close(logits(back), logits(model))
    left = r".*\.(layers\.0\.mlp|shared_experts)\..*"
    config = LoRAConfig(r=4, target_modules="all-linear", exclude_modules=left, init_lora_weights=False)
    model = fastadapt.inject(deepseek(), config)
    fastadapt.save_adapter(model, tmp_path / "read")
    theirs = peft.PeftModel.from_pretrained(deepseek(), tmp_path / "read").eval()
    torch.testing.assert_close(logits(theirs), logits(model), rtol=1e-5, atol=1e-6)


def old_file(directory: Path, names: tuple[str, str, str], block: str, sizes: tuple[int, int]) -> None:
    """An adapter as transformers 4 had it: a LoRA for each linear layer of each expert, and the router."""
    generator = torch.Generator().manual_seed(1)
    tensors, (hidden, inner) = {}, sizes

    def add(path: str, k: int, n: int) -> None:
        stem = f"base_model.model.model.layers.{path}"
        tensors[f"{stem}.lora_A.weight"] = torch.randn(2, k, generator=generator)
        tensors[f"{stem}.lora_B.weight"] = torch.randn(n, 2, generator=generator)

    for layer in range(2):
        add(f"{layer}.self_attn.q_proj", hidden, 32)
        add(f"{layer}.{block}.gate", hidden, 4)
        for e in range(4):
            add(f"{layer}.{block}.experts.{e}.{names[0]}", hidden, inner)
            add(f"{layer}.{block}.experts.{e}.{names[1]}", hidden, inner)
            add(f"{layer}.{block}.experts.{e}.{names[2]}", inner, hidden)
    save_file(tensors, directory / "adapter_model.safetensors")
    fields = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "gate", *names]}
    (directory / "adapter_config.json").write_text(json.dumps(fields))


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_files_with_a_lora_for_every_expert_are_stacked(kind: str, tmp_path: Path) -> None:
    if kind == "mixtral":
        old_file(tmp_path, ("w1", "w3", "w2"), "block_sparse_moe", (32, 24))
    else:
        old_file(tmp_path, ("gate_proj", "up_proj", "down_proj"), "mlp", (32, 20))
    make = MODELS[kind]
    ours = fastadapt.load_adapter(make(), tmp_path)
    expected = logits(peft.PeftModel.from_pretrained(make(), tmp_path).eval())
    torch.testing.assert_close(logits(ours), expected, rtol=1e-5, atol=1e-5)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    lost = next(name for name in tensors if ".experts.3." in name)
    del tensors[lost]
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"experts"):
        fastadapt.load_adapter(make(), tmp_path)


CASES: dict[str, Any] = {
    "LoRA": LoRAConfig(r=4, target_parameters=BOTH, init_lora_weights=False),
    "DoRA": DoRAConfig(r=4, target_parameters=BOTH, init_lora_weights=False),
    "DoRA of one weight": DoRAConfig(r=3, target_parameters=BOTH[1:], init_lora_weights=False),
    "VeRA": VeRAConfig(r=6, target_parameters=BOTH, init_weights=False),
}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("case", CASES)
def test_merged_is_adapted_and_unmerged_the_base(model: str, case: str, tmp_path: Path) -> None:
    adapted = fastadapt.inject(MODELS[model](), CASES[case])
    for name, parameter in adapted.named_parameters():
        if "magnitude" in name:
            parameter.data.mul_(1.0 + 0.1 * torch.randn_like(parameter))
    before = {name: p.clone() for name, p in adapted.named_parameters() if ".base_layer." in name}
    expected = logits(adapted)
    assert (expected - logits(MODELS[model]())).abs().max() > 0.01
    fastadapt.merge(adapted)
    torch.testing.assert_close(logits(adapted), expected, rtol=1e-4, atol=1e-5)
    fastadapt.unmerge(adapted)
    assert torch.equal(logits(adapted), expected)
    after = dict(adapted.named_parameters())
    assert all(torch.equal(after[name], value) for name, value in before.items())
    with fastadapt.disable_adapter(adapted):
        assert torch.equal(logits(adapted), logits(MODELS[model]()))
    fastadapt.save_adapter(adapted, tmp_path)
    torch.testing.assert_close(logits(fastadapt.load_adapter(MODELS[model](), tmp_path)), expected)


@pytest.mark.parametrize("case", CASES)
def test_a_new_adapter_changes_nothing_and_training_is_evaluation(case: str) -> None:
    """Without dropout: in training DoRA's norm is made with the product, in evaluation it is kept."""
    fields = {**vars(CASES[case]), "init_lora_weights": True, "init_weights": True}
    config = type(CASES[case])(**{name: value for name, value in fields.items() if name in vars(CASES[case])})
    new = fastadapt.inject(qwen3_moe(), config)
    torch.testing.assert_close(logits(new), logits(qwen3_moe()))
    adapted = fastadapt.inject(qwen3_moe(), CASES[case])
    expected = logits(adapted)
    adapted.train()
    torch.testing.assert_close(logits(adapted), expected, rtol=1e-4, atol=1e-5)
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):
        logits(adapted).square().mean().backward()
        assert all(p.grad is not None for p in adapted.parameters() if p.requires_grad)
        optimizer.step()
        optimizer.zero_grad()
    trained = logits(adapted)
    adapted.eval()
    torch.testing.assert_close(logits(adapted), trained, rtol=1e-4, atol=1e-5)
    assert (trained - expected).abs().max() > 1e-3


@pytest.mark.parametrize("config", [LoRAConfig, DoRAConfig])
def test_dropout_trains_and_its_file_is_read_by_peft(config: Any, tmp_path: Path) -> None:
    model = fastadapt.inject(qwen3_moe(), config(r=4, target_parameters=BOTH, lora_dropout=0.5))
    randomise(model, "lora_B")
    kept = logits(model)
    model.train()
    torch.manual_seed(1)
    first = logits(model)
    torch.manual_seed(1)
    assert torch.equal(first, logits(model))
    assert not torch.equal(first, logits(model))
    first.square().sum().backward()
    model.eval()
    fastadapt.save_adapter(model, tmp_path)
    if config is LoRAConfig:  # PEFT has no DoRA of experts, and says so
        torch.testing.assert_close(logits(peft.PeftModel.from_pretrained(qwen3_moe(), tmp_path).eval()), kept)
    else:
        with pytest.raises(ValueError, match="use_dora"):
            peft.PeftModel.from_pretrained(qwen3_moe(), tmp_path)
    loaded = fastadapt.load_adapter(qwen3_moe(), tmp_path)
    assert loaded.adapter_configs["default"].lora_dropout == 0.5
    torch.testing.assert_close(logits(loaded), kept)


def test_adapters_that_are_active_together_add_up() -> None:
    model = fastadapt.inject(qwen3_moe(), LoRAConfig(r=4, target_parameters=BOTH, init_lora_weights=False), "one")
    fastadapt.inject(model, VeRAConfig(r=5, target_parameters=BOTH[:1], init_weights=False), "two")
    weights = {}
    for names in (["one"], ["two"], ["one", "two"]):
        fastadapt.set_adapter(model, names)
        fastadapt.merge(model)
        experts = adapter_layers(model)["model.layers.1.mlp.experts"].base_layer
        weights[len(weights)] = experts.gate_up_proj.clone()
        fastadapt.unmerge(model)
    together = logits(model)
    base = adapter_layers(model)["model.layers.1.mlp.experts"].base_layer.gate_up_proj
    torch.testing.assert_close(weights[2] - base, weights[0] - base + weights[1] - base)
    fastadapt.merge(model)
    torch.testing.assert_close(logits(model), together, rtol=1e-4, atol=1e-5)


def test_the_base_comes_back() -> None:
    model = fastadapt.unload(fastadapt.inject(qwen3_moe(), LoRAConfig(target_modules="all-linear")))
    assert not adapter_layers(model)
    assert torch.equal(logits(model), logits(qwen3_moe()))
    assert model.state_dict().keys() == qwen3_moe().state_dict().keys()


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_it_computes_what_each_implementation_does(implementation: str) -> None:
    """An adapter that adds nothing, beside the layer as transformers runs it."""
    model = qwen3_moe()
    model.set_experts_implementation(implementation)
    expected = logits(model)
    torch.testing.assert_close(logits(fastadapt.inject(model, LoRAConfig(target_parameters=BOTH))), expected)


def test_in_16_bits_the_adapters_are_in_32() -> None:
    model = fastadapt.inject(qwen3_moe().bfloat16(), DoRAConfig(r=4, target_parameters=BOTH, init_lora_weights=False))
    tensors = present(model, "default").named_tensors
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    found = logits(model).float()
    model.train()
    torch.testing.assert_close(logits(model).float(), found, rtol=0.1, atol=0.1)
    logits(model).float().square().mean().backward()


def test_what_stays_frozen_is_named() -> None:
    """PEFT's rule has none for gpt-oss."""
    with pytest.warns(UserWarning, match=r"experts\.gate_up_proj.*have to be named in target_parameters"):
        model = fastadapt.inject(gpt_oss(), LoRAConfig(target_modules="all-linear"))
    assert not any(isinstance(layer, AdapterExperts) for layer in adapter_layers(model).values())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fastadapt.inject(gpt_oss(), LoRAConfig(target_modules="all-linear", target_parameters=BOTH))


class Stacked(nn.Module):
    """Experts as nobody decorates them."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(3, 8, 4))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.gate_up_proj[0].T


def test_refused_by_name() -> None:
    with pytest.raises(ValueError, match="target_parameters: experts: Stacked has a forward of its own"):
        fastadapt.inject(nn.ModuleDict({"experts": Stacked()}), LoRAConfig(target_parameters=["gate_up_proj"]))
    model = qwen3_moe()
    model.model.layers[1].mlp.experts._is_expert_parallel = True
    with pytest.raises(ValueError, match=r"layers.1.mlp.experts: its experts are shared out among processes"):
        fastadapt.inject(model, LoRAConfig(target_parameters=BOTH))
    with pytest.raises(ValueError, match="no parameter of two or three dimensions is called 'gates'"):
        fastadapt.inject(qwen3_moe(), LoRAConfig(target_parameters=["gates"]))
    with pytest.raises(ValueError, match="goes with LoRA, DoRA and VeRA alone"):
        fastadapt.HiRAConfig(target_parameters=BOTH)
    with pytest.raises(ValueError, match="cannot take an adapter of LoRAConfig with lora_bias"):
        fastadapt.inject(qwen3_moe(), LoRAConfig(target_parameters=BOTH, lora_bias=True))
    with pytest.raises(ValueError, match="bias='lora_only' does not go with experts"):
        fastadapt.inject(qwen3_moe(), LoRAConfig(target_parameters=BOTH, bias="lora_only"))
    adapted = fastadapt.inject(qwen3_moe(), LoRAConfig(target_parameters=BOTH))
    handle = adapted.model.layers[0].mlp.experts.base_layer.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="it has hooks"):
        logits(adapted)
    handle.remove()
    logits(adapted)
    own = adapted.model.layers[1].mlp.experts.base_layer.down_proj.requires_grad_()
    with pytest.raises(ValueError, match=r"layers.1.mlp.experts .*: its own weights must be frozen"):
        logits(adapted)
    with torch.no_grad():
        logits(adapted)
    own.requires_grad_(False)
    logits(adapted)


def test_every_decorated_experts_module_of_a_kind_is_taken() -> None:
    for make in MODELS.values():
        (experts, *_) = [m for m in make().modules() if type(m).__name__.endswith("Experts")]
        assert why_no_experts(experts) == ""


def test_compiled_in_one_graph() -> None:
    model = fastadapt.inject(qwen3_moe(), LoRAConfig(r=4, target_parameters=BOTH, init_lora_weights=False))
    experts: Any = adapter_layers(model)["model.layers.0.mlp.experts"]
    x = torch.randn(5, 32, requires_grad=True)
    chosen = torch.rand(5, 4).argsort(1)[:, :2]
    routing = torch.rand(5, 2)
    compiled = torch.compile(experts, fullgraph=True, backend="aot_eager")
    leaves = [x, *(p for p in experts.adapters.parameters())]
    found, expected = (run(x, chosen, routing) for run in (compiled, experts))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    for mine, other in zip(*(torch.autograd.grad(y.sin().sum(), leaves) for y in (found, expected)), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)
