"""Several adapters at once: active together, combined into a new one, exported as a plain LoRA. PEFT is the oracle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from test_peft_parity import quiet_peft
from tiny_models import randomise, tokens
from torch import Tensor, nn

import fastadapt
from fastadapt import AdaLoRAConfig, AdapterForm, DoRAConfig, LoRAConfig, VeRAConfig, functional
from fastadapt.forms import plain_lora, stacked
from fastadapt.methods import AdapterConfig
from fastadapt.model.adapted import active_adapters, adapter_configs, adapter_layers
from fastadapt.reference import adapter_linear_reference, merged_weight_reference

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


def adapters_of(model: nn.Module, name: str) -> list[nn.Parameter]:
    return [p for key, p in model.named_parameters() if f".adapters.{name}." in key or f".copies.{name}." in key]


def with_adapters(model: Any, **configs: AdapterConfig) -> Any:
    for seed, (name, config) in enumerate(configs.items(), 3):
        fastadapt.inject(model, config, name)
        randomise(adapters_of(model, name), seed)
    return model


def grads(model: Any, inputs: Tensor) -> list[Tensor]:
    model.zero_grad()
    model(inputs).logits.square().mean().backward()
    return [p.grad.clone() for p in model.parameters() if p.requires_grad and p.grad is not None]


def in_peft(**configs: Any) -> Any:
    """A PEFT model with the same adapters, of the same values."""
    names = list(configs)
    with quiet_peft():
        model = get_peft_model(tiny_models.llama(), configs[names[0]], names[0])
        for name in names[1:]:
            model.add_adapter(name, configs[name])
    return model.eval()


def fill_alike(ours: Any, peft: Any, names: list[str]) -> None:
    for name in names:
        fastadapt.set_adapter(ours, name)
        values = {}
        for path, layer in adapter_layers(ours).items():
            if name in layer.adapters:
                for suffix, tensor in layer.adapters[name].checkpoint_tensors().items():
                    values[f"base_model.model.{path}.{suffix}"] = tensor
        with torch.no_grad():
            for key, parameter in peft.named_parameters():
                segments = key.split(".")
                if name in segments:
                    plain = ".".join(segment for segment in segments if segment != name)
                    if plain not in values:  # DoRA's magnitude has no suffix in a file
                        plain = plain.removesuffix(".weight")
                    parameter.copy_(values[plain])


def test_two_active_adapters_are_peft_s_two_active_adapters() -> None:
    ours = with_adapters(
        tiny_models.llama(),
        a=LoRAConfig(r=4, lora_alpha=6, target_modules="all-linear"),
        b=LoRAConfig(r=3, lora_alpha=2, target_modules=["q_proj", "up_proj"], use_rslora=True),
    )
    peft = in_peft(
        a=LoraConfig(r=4, lora_alpha=6, target_modules="all-linear"),
        b=LoraConfig(r=3, lora_alpha=2, target_modules=["q_proj", "up_proj"], use_rslora=True),
    )
    fill_alike(ours, peft, ["a", "b"])
    fastadapt.set_adapter(ours, ["a", "b"])
    peft.base_model.set_adapter(["a", "b"])
    torch.testing.assert_close(ours(tokens()).logits, peft(tokens()).logits, rtol=1e-5, atol=1e-5)
    assert active_adapters(ours) == ["a", "b"]
    norms = [sorted(float(g.norm()) for g in grads(model, tokens())) for model in (ours, peft)]
    torch.testing.assert_close(torch.tensor(norms[0]), torch.tensor(norms[1]), rtol=1e-4, atol=1e-6)


def test_two_active_doras_are_peft_s() -> None:
    ours = with_adapters(
        tiny_models.llama(), a=DoRAConfig(r=4, target_modules=ATTENTION), b=LoRAConfig(r=2, target_modules=["q_proj"])
    )
    peft = in_peft(
        a=LoraConfig(r=4, use_dora=True, target_modules=ATTENTION), b=LoraConfig(r=2, target_modules=["q_proj"])
    )
    fill_alike(ours, peft, ["a", "b"])
    fastadapt.set_adapter(ours, ["a", "b"])
    peft.base_model.set_adapter(["a", "b"])
    torch.testing.assert_close(ours(tokens()).logits, peft(tokens()).logits, rtol=1e-5, atol=2e-5)


def some_forms(weight: Tensor, bias: Tensor | None) -> list[AdapterForm]:
    n, k = weight.shape
    make = torch.Generator().manual_seed(3)

    def r(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=make, dtype=torch.float64)

    own = r(n) if bias is None else bias + r(n)
    g = 1 + 0.1 * r(n)
    return [
        AdapterForm(r(3, k), r(n, 3), bias=bias, scaling=0.5),
        AdapterForm(r(2, k), r(n, 2), mid_scale=r(2), out_scale=r(n), bias=own),
        AdapterForm(r(4, k), r(n, 4), out_scale=g, base_scale=g, bias=bias, dropout_on_base=True, scaling=0.7),
        AdapterForm(r(1, k), r(n, 1), out_scale=torch.tensor(0.3, dtype=torch.float64), bias=bias),
        AdapterForm(r(0, k), r(n, 0), base_scale=1 + 0.1 * r(n), bias=bias, dropout_on_base=True),
    ]


@pytest.mark.parametrize("with_bias", [True, False])
def test_stacked_forms_add_up(with_bias: bool) -> None:
    weight = torch.randn(6, 5, dtype=torch.float64)
    bias = torch.randn(6, dtype=torch.float64) if with_bias else None
    x = torch.randn(7, 5, dtype=torch.float64)
    mask = torch.rand(7, 5) > 0.3
    base = x @ weight.T + (0 if bias is None else bias)
    forms = some_forms(weight, bias)
    for chosen in (forms[:1], forms[:2], forms[1:3], forms):
        for kept, p in ((None, 0.0), (mask, 0.3)):
            added = [adapter_linear_reference(x, weight, form, mask=kept, p=p) - base for form in chosen]
            together = adapter_linear_reference(x, weight, stacked(chosen, bias), mask=kept, p=p)
            torch.testing.assert_close(together, base + sum(added), rtol=1e-12, atol=1e-12)
    one = stacked(forms[:1], bias)
    assert one is forms[0]
    with pytest.raises(ValueError, match="must agree on dropout_on_base"):
        stacked([forms[2], forms[2]._replace(dropout_on_base=False)], bias)


def test_a_plain_lora_of_a_form_has_its_product() -> None:
    weight = torch.randn(6, 5, dtype=torch.float64)
    for form in some_forms(weight, None):
        if form.base_scale is not None:
            with pytest.raises(ValueError, match="scales the base weight"):
                plain_lora(form)
            continue
        A, B, scaling = plain_lora(form)
        torch.testing.assert_close(weight + scaling * B @ A, merged_weight_reference(weight, form))
    pruned = some_forms(weight, None)[1]._replace(mid_scale=torch.tensor([0.0, 2.0], dtype=torch.float64))
    A, B, scaling = plain_lora(pruned)
    assert A.shape == (1, 5)
    torch.testing.assert_close(weight + scaling * B @ A, merged_weight_reference(weight, pruned))


def test_everything_works_with_several() -> None:
    """Merge, disabling, groups, gradients and switching back, of methods that have nothing in common."""
    model = with_adapters(
        tiny_models.llama(attention_bias=True),
        a=LoRAConfig(r=4, target_modules=ATTENTION),
        b=VeRAConfig(r=12, target_modules=["q_proj", "v_proj", "up_proj"]),
        c=DoRAConfig(r=3, target_modules=["k_proj", "down_proj", "q_proj"]),
    )
    x = tokens()
    names = ["a", "b", "c"]
    fastadapt.set_adapter(model, names)
    assert model.model.layers[0].self_attn.q_proj.active == ("a", "b", "c")
    assert model.model.layers[0].mlp.down_proj.active == ("c",)
    assert model.model.layers[0].mlp.gate_proj.__class__ is nn.Linear
    together = model(x).logits
    trained = {key for key, p in model.named_parameters() if p.requires_grad}
    assert {name for name in names if any(f".{name}." in key for key in trained)} == set(names)
    assert all(g.abs().sum() > 0 for g in grads(model, x))
    for layer in model.model.layers:
        layer.self_attn.q_proj.group = layer.self_attn.k_proj.group = layer.self_attn.v_proj.group = None
    torch.testing.assert_close(model(x).logits, together, rtol=1e-5, atol=1e-5)
    with fastadapt.disable_adapter(model):
        assert not torch.allclose(model(x).logits, together)
        assert active_adapters(model) == []
    assert active_adapters(model) == names
    fastadapt.merge(model)
    torch.testing.assert_close(model(x).logits, together, rtol=1e-4, atol=1e-4)
    fastadapt.unmerge(model)
    fastadapt.set_adapter(model, "b")
    assert active_adapters(model) == ["b"]
    fastadapt.set_adapter(model, None)
    assert active_adapters(model) == []


def test_dropout_must_agree_where_it_acts() -> None:
    model = with_adapters(
        tiny_models.llama(),
        a=LoRAConfig(r=2, target_modules=["q_proj"], lora_dropout=0.5),
        b=LoRAConfig(r=2, target_modules=["q_proj"]),
    )
    fastadapt.set_adapter(model, ["a", "b"])
    model(tokens())
    with pytest.raises(ValueError, match=r"'a', 'b' have different dropout, \[0.0, 0.5\].*the same"):
        model.train()(tokens())


def test_what_cannot_be_active_together_is_named() -> None:
    model = with_adapters(
        tiny_models.llama(),
        a=LoRAConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]),
        b=LoRAConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]),
    )
    with pytest.raises(ValueError, match="'a', 'b' both replace lm_head"):
        fastadapt.set_adapter(model, ["a", "b"])
    with pytest.raises(ValueError, match="'a' is named twice"):
        fastadapt.set_adapter(model, ["a", "a"])
    with pytest.raises(ValueError, match="'z' is not in the model"):
        fastadapt.set_adapter(model, ["a", "z"])
    assert active_adapters(model) == ["b"]


@pytest.mark.parametrize(("kind", "ranks"), [("linear", (4, 4)), ("cat", (4, 3)), ("svd", (4, 3)), ("svd 2", (4, 3))])
def test_combined_adapters_are_peft_s(kind: str, ranks: tuple[int, int]) -> None:
    kind, _, svd_rank = kind.partition(" ")
    fields: list[dict[str, Any]] = [
        {"r": ranks[0], "lora_alpha": 6, "target_modules": ["q_proj", "up_proj", "embed_tokens"]},
        {"r": ranks[1], "lora_alpha": 2, "target_modules": ["q_proj", "down_proj"], "use_rslora": True},
    ]
    ours = with_adapters(tiny_models.llama(), a=LoRAConfig(**fields[0]), b=LoRAConfig(**fields[1]))
    peft = in_peft(a=LoraConfig(**fields[0]), b=LoraConfig(**fields[1]))
    fill_alike(ours, peft, ["a", "b"])
    more = {"svd_rank": int(svd_rank)} if svd_rank else {}
    with quiet_peft():
        peft.add_weighted_adapter(["a", "b"], [0.7, -0.4], "c", combination_type=kind, **more)
    fastadapt.add_weighted_adapter(ours, ["a", "b"], [0.7, -0.4], "c", kind, **more)  # type: ignore[arg-type]
    assert active_adapters(ours) == ["b"]
    assert not any(p.requires_grad for p in adapters_of(ours, "c"))
    fastadapt.set_adapter(ours, "c")
    peft.set_adapter("c")
    torch.testing.assert_close(ours(tokens()).logits, peft(tokens()).logits, rtol=1e-4, atol=1e-5)
    if svd_rank:
        assert adapter_configs(ours)["c"].r == 2


def test_cat_is_the_exact_sum_for_any_low_rank_method(tmp_path: Path) -> None:
    model = with_adapters(
        tiny_models.llama(), a=LoRAConfig(r=4, target_modules=ATTENTION), b=VeRAConfig(r=12, target_modules=ATTENTION)
    )
    fastadapt.add_weighted_adapter(model, ["a", "b"], [1.0, 1.0], "c", "cat")
    fastadapt.set_adapter(model, ["a", "b"])
    together = model(tokens()).logits
    fastadapt.set_adapter(model, "c")
    torch.testing.assert_close(model(tokens()).logits, together, rtol=1e-5, atol=1e-5)
    fastadapt.save_adapter(model, tmp_path, "c")
    with quiet_peft():
        loaded = PeftModel.from_pretrained(tiny_models.llama(), tmp_path).eval()
    torch.testing.assert_close(loaded(tokens()).logits, together, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((["a"], [1.0], "b"), "'b' is in the model already"),
        ((["a", "z"], [1.0, 1.0], "new"), "'z' is not in the model"),
        ((["a"], [1.0, 2.0], "new"), "a weight for each adapter, got 1 adapters, 2 weights"),
        (([], [], "new"), "a weight for each adapter"),
        ((["a"], [float("nan")], "new"), "finite"),
        ((["a"], [1.0], "new", "ties"), "must be one of svd, linear, cat, got 'ties'"),
        ((["a"], [1.0], "new", "svd", 0), "svd_rank must be a positive integer"),
        ((["a", "b"], [1.0, 1.0], "new", "linear"), r"q_proj has ranks \[2, 3\]"),
        ((["dora"], [1.0], "new"), "'dora' cannot be combined: .*q_proj: it scales the base weight"),
        ((["head"], [1.0], "new"), "'head' has trained lm_head"),
        ((["bias"], [1.0], "new"), "'bias' trains the bias of .*q_proj"),
    ],
)
def test_what_cannot_be_combined_is_named(arguments: Any, message: str) -> None:
    model = with_adapters(
        tiny_models.llama(attention_bias=True),
        a=LoRAConfig(r=2, target_modules=["q_proj"]),
        b=LoRAConfig(r=3, target_modules=["q_proj"]),
        dora=DoRAConfig(r=2, target_modules=["q_proj"]),
        head=LoRAConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]),
        bias=LoRAConfig(r=2, target_modules=["q_proj"], bias="lora_only"),
    )
    before = list(model.state_dict())
    with pytest.raises(ValueError, match=message):
        fastadapt.add_weighted_adapter(model, *arguments)
    assert list(model.state_dict()) == before
    assert active_adapters(model) == ["bias"]


@pytest.mark.parametrize(
    "config",
    [
        LoRAConfig(r=4, lora_alpha=6, target_modules="all-linear", use_rslora=True, rank_pattern={"q_proj": 2}),
        VeRAConfig(r=12, target_modules="all-linear"),
        LoRAConfig(r=3, target_modules=ATTENTION, bias="lora_only", modules_to_save=["lm_head"]),
    ],
    ids=["rslora", "vera", "bias"],
)
def test_peft_runs_what_is_exported(config: AdapterConfig, tmp_path: Path) -> None:
    model = with_adapters(tiny_models.llama(attention_bias=True), default=config)
    expected = model(tokens()).logits
    fastadapt.export_lora(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "LORA"
    with quiet_peft():
        loaded = PeftModel.from_pretrained(tiny_models.llama(attention_bias=True), tmp_path).eval()
    torch.testing.assert_close(loaded(tokens()).logits, expected, rtol=1e-5, atol=1e-5)
    back = fastadapt.load_adapter(tiny_models.llama(attention_bias=True), tmp_path)
    torch.testing.assert_close(back(tokens()).logits, expected, rtol=1e-5, atol=1e-5)


def test_embeddings_and_convolutions_are_exported_and_combined(tmp_path: Path) -> None:
    model = tiny_models.mixed()
    for seed, name in enumerate("ab", 3):
        fastadapt.inject(model, LoRAConfig(r=seed, target_modules=["embed", "conv", "fc1"]), name)
        randomise(adapters_of(model, name), seed)
    fastadapt.set_adapter(model, ["a", "b"])
    together = model(tokens(2, 5))
    fastadapt.add_weighted_adapter(model, ["a", "b"], [1.0, 1.0], "c", "cat")
    fastadapt.set_adapter(model, "c")
    torch.testing.assert_close(model(tokens(2, 5)), together, rtol=1e-5, atol=1e-5)
    fastadapt.export_lora(model, tmp_path, "c")
    loaded = fastadapt.load_adapter(tiny_models.mixed(), tmp_path)
    torch.testing.assert_close(loaded(tokens(2, 5)), together, rtol=1e-5, atol=1e-5)


def test_what_is_no_lora_is_not_exported(tmp_path: Path) -> None:
    model = with_adapters(tiny_models.llama(), default=DoRAConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"'default' is no LoRA: .*q_proj: it scales the base weight"):
        fastadapt.export_lora(model, tmp_path)
    model = with_adapters(tiny_models.llama(), default=LoRAConfig(r=2, target_modules=["q_proj"], lora_bias=True))
    with pytest.raises(ValueError, match=r"adds a bias to .*q_proj, which has none"):
        fastadapt.export_lora(model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_vera_and_lora_together_through_the_functional_form() -> None:
    """What layers stack is what the operator gets: one call, one pass."""
    model = with_adapters(
        tiny_models.mlp(), a=LoRAConfig(r=4, target_modules=["up"]), b=VeRAConfig(r=6, target_modules=["up"])
    )
    fastadapt.set_adapter(model, ["a", "b"])
    form = model.up.form()
    assert form.A.shape == (10, 20)
    x = torch.randn(3, 20)
    torch.testing.assert_close(functional.adapter_linear(x, model.up.weight, form), model.up(x))


class Suffixes(nn.Module):
    """Paths of which one ends in the other: `fc`, and `block.fc`."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(6, 6)
        self.block = nn.ModuleDict({"fc": nn.Linear(6, 6)})

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.block["fc"](torch.tanh(self.fc(x)))
        return y


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["fc"], "rank_pattern": {"block.fc": 3}},
        {"target_modules": ["fc"], "alpha_pattern": {"block.fc": 32.0, "fc": 4.0}},
        {"target_modules": "fc"},
    ],
    ids=str,
)
def test_paths_that_end_in_another_are_told_apart(fields: dict[str, Any], tmp_path: Path) -> None:
    """In our files, in exported ones, in combined adapters, and in PEFT that reads them."""
    model = fastadapt.inject(Suffixes(), LoRAConfig(r=2, lora_alpha=1, **fields))
    randomise(adapters_of(model, "default"))
    x = torch.randn(5, 6)
    expected = model(x)
    fastadapt.add_weighted_adapter(model, ["default"], [1.0], "copy", "cat")
    fastadapt.save_adapter(model, tmp_path / "own")
    fastadapt.export_lora(model, tmp_path / "exported")
    fastadapt.save_adapter(model, tmp_path / "combined", "copy")
    fastadapt.set_adapter(model, "copy")
    torch.testing.assert_close(model(x), expected)
    for directory in ("own", "exported", "combined"):
        torch.testing.assert_close(fastadapt.load_adapter(Suffixes(), tmp_path / directory)(x), expected)
        with quiet_peft():
            torch.testing.assert_close(PeftModel.from_pretrained(Suffixes(), tmp_path / directory)(x), expected)


def test_a_merged_model_is_not_exported(tmp_path: Path) -> None:
    model = with_adapters(tiny_models.mlp(), default=LoRAConfig(r=2, target_modules=["up"], lora_bias=True))
    fastadapt.merge(model)
    with pytest.raises(ValueError, match=r"call unmerge\(model\) before exporting"):
        fastadapt.export_lora(model, tmp_path)


@pytest.mark.parametrize("bias", ["none", "lora_only"])
def test_layers_that_adalora_pruned_whole(bias: str, tmp_path: Path) -> None:
    config = AdaLoRAConfig(init_r=3, target_r=2, total_step=10, target_modules=["up", "down"], bias=bias)
    model = with_adapters(tiny_models.mlp(), default=config)
    with torch.no_grad():
        model.up.adapters["default"].lora_E.zero_()
    x = torch.randn(4, 20)
    expected = model(x)
    fastadapt.export_lora(model, tmp_path)
    torch.testing.assert_close(fastadapt.load_adapter(tiny_models.mlp(), tmp_path)(x), expected)
    if bias == "none":
        for kind in ("svd", "cat", "linear"):
            fastadapt.add_weighted_adapter(model, ["default"], [1.0], kind, kind)
            fastadapt.set_adapter(model, kind)
            torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
            fastadapt.set_adapter(model, "default")


def test_disabling_leaves_what_trains_as_it_was() -> None:
    model = with_adapters(
        tiny_models.mlp(), a=LoRAConfig(r=2, target_modules=["up"]), b=LoRAConfig(r=2, target_modules=["up"])
    )
    fastadapt.set_adapter(model, "a")
    before = {name for name, p in model.named_parameters() if p.requires_grad}
    with fastadapt.disable_adapter(model):
        fastadapt.set_adapter(model, "b")
        fastadapt.add_weighted_adapter(model, ["a", "b"], [1.0, 1.0], "c", "cat")
    assert active_adapters(model) == ["a"]
    assert {name for name, p in model.named_parameters() if p.requires_grad} == before
