"""What every method in the table must do: start as the identity, merge to what it computes, and count as published."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import tiny_models
import torch
from torch import Tensor, nn

from fastadapt import (
    AdaLoRAConfig,
    AdaptFormerConfig,
    DeltaLoRAConfig,
    DoRAConfig,
    GLoRAConfig,
    HiRAConfig,
    LoRAConfig,
    LoRADropConfig,
    NOAHConfig,
    RepAdapterConfig,
    SSFConfig,
    VeRAConfig,
    VPTConfig,
    inject,
    load_adapter,
    merge,
    save_adapter,
    trainable_parameters,
    unmerge,
)
from fastadapt.methods import METHODS, AdapterConfig
from fastadapt.methods.adalora import BudgetAllocator
from fastadapt.model.inject import control, prepare, rebuild
from fastadapt.serving import read_adapter
from fastadapt.staleness import Kept

TARGETS = ["first", "second"]
PARTS = ["weight", "bias"]


class TwoLayers(nn.Module):
    """Two linear layers of different widths, one with a bias large enough to show where it is scaled."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(12, 20)
        self.second = nn.Linear(20, 8, bias=False)
        nn.init.normal_(self.first.bias, std=20)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(torch.tanh(self.first(x) / 20))
        return y


CONFIGS: dict[str, AdapterConfig] = {
    "LoRA": LoRAConfig(r=4, target_modules=TARGETS),
    "rsLoRA": LoRAConfig(r=4, target_modules=TARGETS, use_rslora=True),
    "LoRA, trained biases": LoRAConfig(r=4, target_modules=TARGETS, bias="lora_only", lora_bias=True),
    "LoRA-FA": LoRAConfig(r=4, target_modules=TARGETS, freeze_A=True),
    "LoRA-drop, probe": LoRADropConfig(r=4, target_modules=TARGETS),
    "LoRA-drop": LoRADropConfig(r=4, target_modules=TARGETS, kept=["first"]),
    "Delta-LoRA": DeltaLoRAConfig(r=4, target_modules=TARGETS, anchored=True),
    "Delta-LoRA, before its start": DeltaLoRAConfig(r=4, target_modules=TARGETS),
    "EVA": LoRAConfig(r=4, target_modules=TARGETS, init_lora_weights="eva"),
    "DoRA": DoRAConfig(r=4, target_modules=TARGETS),
    "VeRA": VeRAConfig(r=16, target_modules=TARGETS),
    "VeRA, only the key": VeRAConfig(r=16, target_modules=TARGETS, save_projection=False, projection_prng_key=7),
    "VeRA, trained bias": VeRAConfig(r=16, target_modules=TARGETS, bias="vera_only"),
    "DVoRA": VeRAConfig(r=16, target_modules=TARGETS, use_dora=True),
    "AdaLoRA": AdaLoRAConfig(init_r=6, target_r=4, total_step=20, target_modules=TARGETS),
    "HiRA": HiRAConfig(r=4, target_modules=TARGETS),
    "SSF": SSFConfig(init_std=0.0, target_modules=TARGETS),
    "RepAdapter": RepAdapterConfig(r=4, adapter_dropout=0.0, target_modules=TARGETS),
    "AdaLoRA, trained bias": AdaLoRAConfig(total_step=20, target_modules=TARGETS, bias="lora_only"),
    "GLoRA": GLoRAConfig(r=3, target_modules=TARGETS),
    "GLoRA, vectors": GLoRAConfig(target_modules=TARGETS, config_A_B="vector", config_C="vector", config_D_E="vector"),
    "GLoRA, constants": GLoRAConfig(target_modules=TARGETS, config_A_B="constant", config_C="none"),
    "GLoRA, biases alone": GLoRAConfig(r=2, target_modules=TARGETS, config_A_B="none", create_bias=True),
    "GLoRA, mixed": GLoRAConfig(
        target_modules=TARGETS,
        support_pattern={
            "first": ["lora:2", "vector", "vector", "constant", "none"],
            "second": ["constant", "lora:3", "lora:1", "vector", "vector"],
        },
    ),
    "GLoRA, supernet": GLoRAConfig(supernet=True, ranks=[2, 4], target_modules=TARGETS),
}


def train_a_little(model: nn.Module, x: Tensor) -> None:
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.05)
    for _ in range(5):
        optimizer.zero_grad()
        (model(x) - 1).square().mean().backward()
        optimizer.step()


def test_every_type_in_the_table_is_tested() -> None:
    on_blocks = {"ADAPTFORMER", "VPT", "NOAH"}  # these need a transformer: see test_vision_methods.py
    on_experts = {"VERA_EXPERTS"}  # test_experts.py has them
    assert {config.to_peft([])["peft_type"] for config in CONFIGS.values()} == set(METHODS) - on_blocks - on_experts


@pytest.mark.parametrize("name", CONFIGS)
def test_a_new_adapter_is_the_identity(name: str) -> None:
    model, x = TwoLayers(), torch.randn(5, 12)
    before = model(x)
    torch.testing.assert_close(inject(model, CONFIGS[name])(x), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_merge_equals_forward_and_unmerge_restores_every_bit(name: str, dtype: torch.dtype) -> None:
    model = inject(TwoLayers().to(dtype), CONFIGS[name])
    x = torch.randn(5, 12, dtype=dtype)
    train_a_little(model, x)
    model.eval()
    base = {key: value.clone() for key, value in model.state_dict().items()}
    adapted = model(x)
    merge(model)
    # Merged, the weight itself is rounded to the base's dtype, once.
    torch.testing.assert_close(model(x), adapted, rtol=2e-2, atol=4e-2) if dtype == torch.bfloat16 else (
        torch.testing.assert_close(model(x), adapted)
    )
    merged = model.state_dict()
    assert any(not torch.equal(merged[f"first.base_layer.{part}"], base[f"first.base_layer.{part}"]) for part in PARTS)
    unmerge(model)
    assert base.keys() == model.state_dict().keys()
    assert all(torch.equal(value, base[key]) for key, value in model.state_dict().items())
    assert torch.equal(model(x), adapted)


@pytest.mark.parametrize("name", CONFIGS)
def test_merge_is_exact_in_double_precision(name: str) -> None:
    model, x = inject(TwoLayers().double(), CONFIGS[name]), torch.randn(5, 12, dtype=torch.float64)
    train_a_little(model, x)
    adapted = model.eval()(x)
    merge(model)
    torch.testing.assert_close(model(x), adapted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", CONFIGS)
def test_saved_and_loaded_it_computes_the_same(name: str, tmp_path: Path) -> None:
    model, x = inject(TwoLayers(), CONFIGS[name]), torch.randn(5, 12)
    train_a_little(model, x)
    save_adapter(model, tmp_path)
    loaded = load_adapter(TwoLayers(), tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded.eval()(x), model.eval()(x))
    assert trainable_parameters(loaded).trainable == 0
    again = load_adapter(TwoLayers(), tmp_path, trainable=True)
    if name != "LoRA-FA":  # its file is an ordinary LoRA, of which A trains too
        assert trainable_parameters(again) == trainable_parameters(model)


@pytest.mark.parametrize("name", CONFIGS)
def test_sixteen_bit_bases_get_adapters_of_32(name: str) -> None:
    model = inject(TwoLayers().bfloat16(), CONFIGS[name])
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    x = torch.randn(5, 12, dtype=torch.bfloat16)
    assert model(x).dtype == torch.bfloat16
    same = inject(TwoLayers().bfloat16(), CONFIGS[name], autocast_adapter_dtype=False)
    assert all(p.dtype == torch.bfloat16 for p in same.parameters())
    assert same(x).dtype == torch.bfloat16


def test_layers_of_one_vera_share_the_projection() -> None:
    model = inject(TwoLayers(), CONFIGS["VeRA"])
    first, second = (model.get_submodule(f"{name}.adapters.default.projection") for name in TARGETS)
    assert first is second
    assert tuple(first.vera_A.shape) == (16, 20)  # type: ignore[operator, union-attr]
    assert tuple(first.vera_B.shape) == (20, 16)  # type: ignore[operator, union-attr]


def test_the_dora_norm_is_computed_only_when_it_can_have_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastadapt.methods import row_norm

    calls = []
    compute = row_norm.weight_norm
    monkeypatch.setattr(row_norm, "weight_norm", lambda *a, **k: calls.append(0) or compute(*a, **k))  # type: ignore[func-returns-value]
    kept, weight, A, B = Kept(), torch.randn(6, 5), torch.randn(2, 5), torch.randn(6, 2)

    def norm(changing: bool = False) -> Tensor:
        return row_norm.row_norm(kept, weight, A, B, 0.5, changing=changing)

    def count(changing: bool = False) -> int:
        before = len(calls)
        norm(changing)
        return len(calls) - before

    assert [count(), count(), count()] == [1, 0, 0]
    assert [count(changing=True), count(changing=True)] == [1, 0]
    A.data.add_(1)  # no version tells of it
    assert [count(changing=True), count(changing=True)] == [1, 0]
    A.add_(1)
    assert [count(), count()] == [1, 0]
    weight.mul_(2)
    assert [count(), count()] == [1, 0]
    torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1).step()
    assert [count(), count()] == [1, 0]
    kept.forget()
    assert count() == 1
    torch.testing.assert_close(norm(), (weight + 0.5 * B @ A).norm(dim=1))


def test_no_stale_norm_after_a_fused_optimizer_in_eval_mode() -> None:
    """AdamW(fused=True) writes parameters without raising their version: a cache by version would not see it."""
    model, x = inject(TwoLayers(), CONFIGS["DoRA"]), torch.randn(5, 12)
    model.eval()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.1, fused=True)
    for _ in range(3):
        model(x).square().sum().backward()
        with torch.no_grad():
            model(x)  # fills the cache between backward and step
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            fused = model(x)
            fresh = inject(TwoLayers(), CONFIGS["DoRA"])
            fresh.load_state_dict(model.state_dict())
            torch.testing.assert_close(fused, fresh(x))


class Blocks(nn.Module):
    """Linear layers of given (in, out) in each of `count` blocks, without memory."""

    def __init__(self, count: int, layers: dict[str, tuple[int, int]], bias: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ModuleDict({name: nn.Linear(k, n, bias=bias, device="meta") for name, (k, n) in layers.items()})
            for _ in range(count)
        )


def qv(width: int) -> dict[str, tuple[int, int]]:
    return {"q": (width, width), "v": (width, width)}


def llama(width: int, hidden: int, *names: str) -> dict[str, tuple[int, int]]:
    layers = {name: (width, width) for name in ("q", "k", "v", "o")}
    layers |= {"gate": (width, hidden), "up": (width, hidden), "down": (hidden, width)}
    return {name: layers[name] for name in names or layers}


DEBERTA = {name: (768, 768) for name in ("q", "k", "v", "o")} | {"in": (768, 3072), "out": (3072, 768)}
DORA = ("q", "k", "v", "up", "down")


@pytest.mark.parametrize(
    ("method", "r", "count", "layers", "expected"),
    [
        ("LoRA", 8, 12, qv(768), 294_912),  # RoBERTa-base and ViT-B/16
        ("LoRA", 8, 24, qv(1024), 786_432),  # RoBERTa-large
        ("LoRA", 16, 48, qv(1536), 4_718_592),  # DeBERTa-L
        ("LoRA", 1, 96, qv(12288), 4_718_592),  # GPT-3
        ("LoRA", 8, 96, qv(12288), 37_748_736),
        ("LoRA", 16, 96, qv(12288), 75_497_472),
        ("LoRA", 4, 24, qv(1024), 393_216),  # GPT-2 M
        ("LoRA", 4, 36, qv(1280), 737_280),  # GPT-2 L
        ("LoRA", 64, 32, llama(4096, 11008), 159_907_840),  # LLaMA-7B
        ("LoRA", 64, 40, llama(5120, 13824), 250_347_520),  # LLaMA-13B
        ("LoRA", 8, 12, DEBERTA, 1_327_104),  # DeBERTaV3-base
        ("LoRA", 2, 12, DEBERTA, 331_776),
        ("VeRA", 1024, 12, qv(768), 43_008),  # RoBERTa-base
        ("VeRA", 256, 24, qv(1024), 61_440),  # RoBERTa-large and ViT-L
        ("VeRA", 1024, 24, qv(1024), 98_304),  # GPT-2 M
        ("VeRA", 1024, 36, qv(1280), 165_888),  # GPT-2 L
        ("VeRA", 1024, 32, llama(4096, 11008), 1_589_248),  # LLaMA-7B
        ("VeRA", 1024, 40, llama(5120, 13824), 2_416_640),  # LLaMA-13B
        ("VeRA", 256, 32, llama(4096, 11008), 1_417_216),
        ("VeRA", 256, 12, qv(768), 24_576),  # ViT-B
        ("VeRA", 16, 96, qv(12288), 2_362_368),  # GPT-3
        ("LoRA-FA", 8, 12, qv(768), 147_456),  # RoBERTa-base
        ("DoRA", 32, 32, llama(4096, 11008, *DORA), 56_975_360),  # LLaMA-7B
        ("DoRA", 16, 32, llama(4096, 11008, *DORA), 28_925_952),
        ("HiRA", 32, 32, llama(4096, 11008, *DORA), 56_098_816),  # as LoRA of this rank
    ],
)
def test_published_parameter_counts(
    method: str, r: int, count: int, layers: dict[str, tuple[int, int]], expected: int
) -> None:
    methods = {"LoRA": LoRAConfig, "VeRA": VeRAConfig, "DoRA": DoRAConfig, "HiRA": HiRAConfig}
    config = methods[method.removesuffix("-FA")](r=r, target_modules=list(layers))
    if method == "LoRA-FA":
        config.freeze_A = True
    assert trainable_parameters(inject(Blocks(count, layers), config)).trainable == expected


VIT_B = {"qkv": (768, 2304), "proj": (768, 768), "fc1": (768, 3072), "fc2": (3072, 768)}


@pytest.mark.parametrize(("r", "expected"), [(2, 884_832), (4, 1_603_776), (8, 3_041_664)])
def test_glora_supernets_of_vit_b(r: int, expected: int) -> None:
    model = Blocks(12, VIT_B, bias=True)
    config = GLoRAConfig(supernet=True, ranks=[r], target_modules=list(VIT_B))
    assert trainable_parameters(inject(model, config)).trainable == expected


def test_glora_of_one_layer() -> None:
    model = Blocks(1, {"qkv": VIT_B["qkv"]}, bias=True)
    config = GLoRAConfig(r=4, config_D_E="vector", target_modules=["qkv"])
    assert trainable_parameters(inject(model, config)).trainable == 32_260


def test_gpt3_vera_with_its_shared_factors() -> None:
    model = inject(Blocks(96, qv(12288)), VeRAConfig(r=16, target_modules=["q", "v"]))
    projection = model.get_submodule("blocks.0.q.adapters.default.projection")
    shared = sum(buffer.numel() for buffer in projection.buffers())
    assert trainable_parameters(model).trainable + shared == 2_755_584


def test_adalora_on_deberta_with_its_budgets() -> None:
    """DeBERTaV3-base, all six matrices of a block."""
    model = inject(Blocks(12, DEBERTA), AdaLoRAConfig(target_modules=list(DEBERTA), total_step=100))
    assert trainable_parameters(model).trainable == 1_991_520
    allocator = control(model)
    assert isinstance(allocator, BudgetAllocator)
    assert (allocator.budget(0), allocator.budget(100)) == (864, 576)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (lambda: LoRAConfig(r=0), "r must be a positive integer, got 0"),
        (lambda: LoRAConfig(r=-3), "r must be a positive integer, got -3"),
        (lambda: VeRAConfig(r=0), "r must be a positive integer, got 0"),
        (lambda: LoRAConfig(lora_dropout=1.0), r"lora_dropout must be in \[0, 1\), got 1.0"),
        (lambda: VeRAConfig(vera_dropout=-0.1), r"vera_dropout must be in \[0, 1\)"),
        (lambda: LoRAConfig(bias="all"), "bias must be one of none, lora_only"),
        (lambda: LoRAConfig(init_lora_weights="pissa"), "changes the base weight"),
        (lambda: DoRAConfig(lora_bias=True), "lora_bias cannot go with use_dora"),
        (lambda: LoRAConfig(rank_pattern={"q": 0}), r"rank_pattern\['q'\] must be a positive integer"),
        (lambda: LoRAConfig(lora_alpha=float("nan")), "lora_alpha must be a finite number"),
        (lambda: LoRAConfig(use_dora=1), "use_dora must be bool, got 1"),
        (lambda: LoRAConfig(target_modules=[3]), "target_modules must be"),
        (lambda: LoRAConfig(layers_pattern="h"), "give layers_to_transform too"),
        (lambda: GLoRAConfig(config_A_B="matrix"), "config_A_B must be one of lora, vector, constant, none, got"),
        (lambda: GLoRAConfig(config_C="constant"), "config_C must be one of lora, vector, none, got 'constant'"),
        (lambda: GLoRAConfig(config_D_E="lora"), "config_D_E must be one of vector, constant, none, got 'lora'"),
        (lambda: GLoRAConfig(init_weights="svd"), "init_weights must be True, False or 'xavier'"),
        (lambda: GLoRAConfig(ranks=[2]), "give supernet=True too"),
        (lambda: GLoRAConfig(ranks=[2, 0], supernet=True), "ranks must be positive integers"),
        (lambda: GLoRAConfig(ranks=[], supernet=True), "ranks must be positive integers"),
        (lambda: GLoRAConfig(supernet=True, support_pattern={"q": ["none"] * 5}), "cannot go with supernet"),
        (lambda: GLoRAConfig(support_pattern={"q": ["none"]}), r"support_pattern\['q'\] must hold five supports"),
        (lambda: GLoRAConfig(support_pattern={"q": ["lora"] + 4 * ["none"]}), "A must be lora:<rank>, vector"),
        (lambda: GLoRAConfig(support_pattern={"q": ["lora:0"] + 4 * ["none"]}), "A must be lora:<rank>, vector"),
        (lambda: GLoRAConfig(support_pattern={"q": 4 * ["none"] + ["lora:2"]}), "E must be vector, constant, none"),
    ],
)
def test_configs_refuse_what_they_cannot_mean(config: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config()  # type: ignore[operator]


class EveryKind(nn.Module):
    """A layer of each kind that a method may take."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.embed = nn.Embedding(5, 4)
        self.conv = nn.Conv2d(4, 4, 1)
        self.norm = nn.LayerNorm(4)
        self.several = nn.Sequential(nn.Linear(4, 4), nn.ReLU())


KIND_OF = {
    "linear": "Linear",
    "embed": "Embedding",
    "conv": "Conv2d",
    "norm": "LayerNorm",
    "several": "modules of several layers",
}
TAKES: dict[str, tuple[Callable[..., AdapterConfig], set[str]]] = {
    "LORA": (LoRAConfig, {"linear", "embed", "conv"}),
    "LORA_DROP": (LoRADropConfig, {"linear"}),
    "DELTA_LORA": (DeltaLoRAConfig, {"linear", "embed", "conv"}),
    "VERA": (VeRAConfig, {"linear"}),
    "DVORA": (partial(VeRAConfig, use_dora=True), {"linear"}),
    "VERA_EXPERTS": (VeRAConfig, {"linear"}),
    "ADALORA": (partial(AdaLoRAConfig, total_step=10), {"linear", "conv"}),
    "HIRA": (HiRAConfig, {"linear"}),
    "SSF": (SSFConfig, {"linear", "conv", "norm"}),
    "REPADAPTER": (RepAdapterConfig, {"linear"}),
    "GLORA": (GLoRAConfig, {"linear"}),
    "GLORA_MIXED": (partial(GLoRAConfig, create_bias=True), {"linear"}),
    "ADAPTFORMER": (AdaptFormerConfig, {"linear", "norm", "several"}),
    "VPT": (VPTConfig, {"norm", "several"}),
    "NOAH": (NOAHConfig, {"linear", "norm", "several"}),
}
# Options of a method, and what is left with them on.
LEFT: dict[str, tuple[Callable[..., AdapterConfig], str, set[str]]] = {
    "use_dora": (partial(LoRAConfig, use_dora=True), "use_dora", {"linear"}),
    "DoRA": (DoRAConfig, "use_dora", {"linear"}),
    "lora_bias": (partial(LoRAConfig, lora_bias=True), "lora_bias", {"linear"}),
    "freeze_A": (partial(DeltaLoRAConfig, freeze_A=True), "freeze_A", {"linear", "conv"}),
}


def refusal(
    path: str, who: str, takes: set[str], cure: str = "and others in modules_to_save to train them whole"
) -> str:
    """The one wording, with the names that EveryKind's layers have."""
    base = getattr(EveryKind(), path)
    layers = sorted(KIND_OF[kind] for kind in takes - {"several"})
    names = ", ".join(layers + [KIND_OF[kind] for kind in takes & {"several"}])
    kind = type(base).__name__
    return f"target_modules: {path}: {kind} cannot take an adapter of {who}: only {names} can; name only those, {cure}"


def test_every_type_says_which_layers_it_takes() -> None:
    assert TAKES.keys() == METHODS.keys()


@pytest.mark.parametrize("path", KIND_OF)
@pytest.mark.parametrize("peft_type", TAKES)
def test_a_layer_that_a_method_cannot_take_is_refused_in_one_voice(
    peft_type: str, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, takes = TAKES[peft_type]
    config = make(target_modules=["linear", path] if "linear" in takes else [path])
    model = EveryKind()
    built: list[AdapterConfig] = []
    monkeypatch.setattr(type(config), "build", lambda config, *_: built.append(config) or {})
    if path in takes:
        # What a method asks of its layers together is not asked here.
        prepare(model, config, "default", backend="auto", autocast_adapter_dtype=True)
        assert built
        return
    with pytest.raises(ValueError, match=re.escape(refusal(path, type(config).__name__, takes)) + "$"):
        inject(model, config)
    assert not built
    assert {name: type(part) for name, part in model.named_modules()} == {
        name: type(part) for name, part in EveryKind().named_modules()
    }


@pytest.mark.parametrize("path", ["embed", "conv", "norm"])
@pytest.mark.parametrize("name", LEFT)
def test_an_option_that_leaves_fewer_layers_says_so(name: str, path: str) -> None:
    make, option, takes = LEFT[name]
    config = make(r=2, target_modules=[path])
    if path in takes:
        inject(EveryKind(), config)
        return
    who, said = type(config).__name__, refusal(path, type(config).__name__, takes)
    if path != "norm":  # LoRA takes it without the option
        said = refusal(path, f"{who} with {option}=True", takes, f"or set {option}=False")
    with pytest.raises(ValueError, match=re.escape(said) + "$"):
        inject(EveryKind(), config)


def test_every_road_refuses_in_that_voice(tmp_path: Path) -> None:
    model = inject(EveryKind(), LoRAConfig(r=2, target_modules=["embed"]))
    before = model.state_dict().keys()
    said = re.escape(refusal("embed", "DoRAConfig with use_dora=True", {"linear"}, "or set use_dora=False"))
    with pytest.raises(ValueError, match=said):
        rebuild(model, "default", DoRAConfig(r=2, target_modules=["embed"]))
    assert model.state_dict().keys() == before
    save_adapter(model, tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "use_dora": True}))
    said = said.replace("DoRAConfig", "LoRAConfig")
    for road in (load_adapter, read_adapter):
        with pytest.raises(ValueError, match=said):
            road(EveryKind(), tmp_path)
    with pytest.raises(ValueError, match=said):  # its layers are wrapped already
        load_adapter(model, tmp_path, "other")


def test_where_the_model_has_none_the_usual_names_are_told() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(5, 4), "conv": nn.Conv2d(4, 4, 3, groups=2)})
    with pytest.raises(ValueError, match="of SSFConfig: only Linear, Conv1D, Conv2d, LayerNorm can"):
        inject(model, SSFConfig(target_modules=["embed"]))
    gpt2 = tiny_models.gpt2()
    with pytest.raises(ValueError, match="Embedding cannot take an adapter of HiRAConfig: only Conv1D, Linear can"):
        inject(gpt2, HiRAConfig(target_modules=["wte"]))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_with_adapters_compiles_in_one_graph(name: str) -> None:
    model, x = inject(TwoLayers(), CONFIGS[name]), torch.randn(5, 12)
    train_a_little(model, x)
    if name == "GLoRA, supernet":  # in training it draws what it computes
        model.eval()
    parameters = [p for p in model.parameters() if p.requires_grad]

    def results(function: nn.Module) -> list[Tensor]:
        y = function(x)
        return [y, *torch.autograd.grad(y.square().sum(), parameters)]

    torch._dynamo.reset()  # the table has more methods than one function may be compiled for in a process
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for a, b in zip(results(model), results(compiled), strict=True):  # type: ignore[arg-type]
        torch.testing.assert_close(a, b)
