"""Adapters on quantised bases: PEFT's on the same base as the oracle, DoRA's norm that of the dequantised weight."""

from __future__ import annotations

import copy
import json
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from test_accelerate_peft import masks as masks
from test_train import answers, tokenizer
from tiny_models import llama
from torch import Tensor, nn

import fastadapt
from bench import page, train
from bench import quantized as bench_quantized
from bench.__main__ import main
from fastadapt import (
    AdaLoRAConfig,
    DoRAConfig,
    HiRAConfig,
    LoRAConfig,
    VeRAConfig,
    inject,
    load_adapter,
    merge,
    save_adapter,
    trainable_parameters,
    unload,
    unmerge,
)
from fastadapt.commands import base_model
from fastadapt.commands.base_model import load_base
from fastadapt.commands.train import command
from fastadapt.commands.train.options import Options
from fastadapt.layers import dequantize as layers_dequantize
from fastadapt.layers.dequantize import dequantized, is_quantized
from fastadapt.methods import AdapterConfig
from fastadapt.serving import MultiAdapterModel

pytestmark = pytest.mark.filterwarnings("ignore")  # of the libraries, at import and in 8-bit products


def by_quanto(model: nn.Module, kind: str) -> None:
    from optimum import quanto

    quanto.quantize(model, weights=getattr(quanto, kind), exclude="lm_head")
    quanto.freeze(model)


def by_torchao(model: nn.Module, kind: str) -> None:
    from torchao import quantization

    options: dict[str, Any] = {}
    if kind.startswith("Intx"):
        options = {"weight_dtype": torch.int4, "granularity": quantization.PerGroup(32)}
    quantization.quantize_(
        model,
        getattr(quantization, kind)(**options),
        filter_fn=lambda module, path: isinstance(module, nn.Linear) and path != "lm_head",
    )


KINDS: dict[str, tuple[Callable[[Any, str], Any], str, str]] = {
    "bitsandbytes nf4": (bench_quantized.quantize, "nf4", "bitsandbytes"),
    "bitsandbytes int8": (bench_quantized.quantize, "int8", "bitsandbytes"),
    "quanto int8": (by_quanto, "qint8", "optimum.quanto"),
    "quanto int4": (by_quanto, "qint4", "optimum.quanto"),
    "quanto fp8": (by_quanto, "qfloat8_e4m3fn", "optimum.quanto"),
    "quanto fp8 e5m2": (by_quanto, "qfloat8_e5m2", "optimum.quanto"),
    "torchao int8": (by_torchao, "Int8WeightOnlyConfig", "torchao.quantization"),
    "torchao fp8": (by_torchao, "Float8WeightOnlyConfig", "torchao.quantization"),
    "torchao int4": (by_torchao, "IntxWeightOnlyConfig", "torchao.quantization"),
}
# bitsandbytes' blocks want widths of multiples of 64.
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
OTHERS: dict[str, Any] = {
    "lora": peft.LoraConfig(r=4, target_modules=TARGETS),
    "rslora": peft.LoraConfig(r=4, use_rslora=True, target_modules=TARGETS),
    "dora": peft.LoraConfig(r=4, use_dora=True, target_modules=TARGETS),
    "vera": peft.VeraConfig(r=8, target_modules=TARGETS),
    "adalora": peft.AdaLoraConfig(init_r=4, target_r=2, total_step=10, target_modules=TARGETS),
}
# What PEFT itself does not run there.
REFUSED = {
    *[("vera", f"torchao {bits}") for bits in ("int8", "fp8", "int4")],
    *[("adalora", f"quanto {bits}") for bits in ("int8", "fp8", "fp8 e5m2")],
}
# What layers compute beside their weight: x in 8 bits, and in bf16 where some CPUs multiply in that.
TOLERANCES = {"bitsandbytes int8": 3e-2, "bitsandbytes nf4": 1e-2}
BF16 = 3e-2
IDS = torch.randint(3, 67, (2, 9), generator=torch.Generator().manual_seed(3))


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    pytest.importorskip(KINDS[name][2], reason="not installed: pip install 'fastadapt[quantized]'")
    return name


def quantized(kind: str, dtype: torch.dtype = torch.float32, **sizes: Any) -> Any:
    model = llama(**{**SIZES, **sizes}).to(dtype)
    make, how, _ = KINDS[kind]
    make(model, how)
    for layer in model.modules():
        if hasattr(layer, "compute_dtype"):
            layer.compute_dtype = dtype
    return model.eval()


def randomised(model: nn.Module, seed: int = 5) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _, parameter in sorted(model.named_parameters()):
        if parameter.requires_grad:
            parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.05)


def losses(model: Any, config: Any) -> list[float]:
    """Of eight steps."""
    torch.manual_seed(0)
    inject(model, config)
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    found = []
    for _ in range(8):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(float(loss.detach()))
    return found


@pytest.fixture(scope="module")
def on_disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny language model, its tokenizer, and rows to train on."""
    directory = tmp_path_factory.mktemp("train")
    llama(**SIZES, bos_token_id=None, eos_token_id=1).save_pretrained(directory / "model")
    tokenizer().save_pretrained(directory / "model")
    answers(directory / "rows.jsonl")
    return directory


def trained(model: Path, output: Path, **changes: Any) -> list[float]:
    """The losses of a run of `fastadapt train`."""
    rate = {"dora": 1e-2, "vera": 0.1, "lora+": 1e-2, "adalora": 0.1}.get(changes["method"], 2e-2)
    options = Options(
        model=str(model),
        data=model.parent / "rows.jsonl",
        output=output,
        **{"r": 4, "lr": rate, "steps": 6, "eval_share": 0.0, "device": "cpu", **changes},
    )
    command.run(options, Console(quiet=True))
    return list(json.loads((output / command.JSON_FILE).read_text())["curve"]["train"])


@pytest.mark.parametrize("how", ["nf4", "int8"])
def test_train_quantises_the_base(how: str, on_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every recipe learns on a quantised base what it learns on that base dequantised."""
    pytest.importorskip("bitsandbytes", reason="not installed: pip install 'fastadapt[quantized]'")
    monkeypatch.setattr(command, "draw", lambda losses, evaluations, unit, path: path.write_bytes(b""))
    base = load_base(str(on_disk / "model"), "float32", (), how).model
    assert base.is_gradient_checkpointing
    twin = llama(**SIZES, bos_token_id=None, eos_token_id=1)
    with torch.no_grad():
        for path, layer in base.named_modules():
            weight = dequantized(layer)
            if weight is not None:
                twin.get_submodule(path).weight.copy_(weight)
    assert trainable_parameters(base).total == trainable_parameters(twin).total
    plain_model = on_disk / f"plain-{how}"
    twin.save_pretrained(plain_model)
    tokenizer().save_pretrained(plain_model)
    for method in ("lora", "rslora", "lora-fa", "lora+", "dora", "vera", "adalora", "eva"):
        ours = trained(on_disk / "model", tmp_path / f"{method}-{how}", method=method, quantize=how)
        theirs = trained(plain_model, tmp_path / method, method=method)
        assert theirs[-1] < 0.99 * theirs[0], method
        # EVA looks at the data in eval mode, where an 8-bit layer rounds x.
        assert ours == pytest.approx(theirs, rel=1e-2 if method == "eva" else 1e-3), method


def test_train_on_nf4_in_bf16_goes_on_bit_for_bit(
    on_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An evaluation in between leaves base and adapter as they are."""
    pytest.importorskip("bitsandbytes", reason="not installed: pip install 'fastadapt[quantized]'")
    monkeypatch.setattr(command, "draw", lambda losses, evaluations, unit, path: path.write_bytes(b""))
    found = []
    for eval_every in (1, 6):
        output = tmp_path / str(eval_every)
        changes: dict[str, Any] = {"eval_share": 0.2, "eval_every": eval_every, "dtype": "bfloat16"}
        trained(on_disk / "model", output, method="dora", quantize="nf4", **changes)
        found.append(load_file(output / "adapter_model.safetensors"))
    assert all(torch.equal(found[0][name], value) for name, value in found[1].items())


def test_what_train_cannot_quantise_is_named(on_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="--quantize must be one of nf4, int8, got 'int4'"):
        trained(on_disk / "model", tmp_path, method="lora", quantize="int4")
    with pytest.raises(ValueError, match=r"--quantize int8 multiplies in eight bits, .* got --dtype bfloat16"):
        trained(on_disk / "model", tmp_path, method="lora", quantize="int8", dtype="bfloat16")
    monkeypatch.setattr(base_model.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs bitsandbytes and accelerate, .* pip install 'fastadapt\[quantized\]'"):
        trained(on_disk / "model", tmp_path, method="lora", quantize="nf4")


def relative(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm().clamp(min=1e-12))


@pytest.mark.parametrize("method", OTHERS)
def test_outputs_and_gradients_are_pefts(kind: str, method: str, tmp_path: Path) -> None:
    if (method, kind) in REFUSED:
        pytest.skip("PEFT does not run it")
    other = peft.get_peft_model(quantized(kind), copy.deepcopy(OTHERS[method]))
    randomised(other)
    other.save_pretrained(tmp_path)
    model = quantized(kind)
    load_adapter(model, tmp_path, trainable=True)
    # In eval mode some CPUs pack a 4-bit weight anew, which PEFT takes for the old one.
    model.train()
    other.train()
    ours, theirs = (run(input_ids=IDS, labels=IDS) for run in (model, other))
    assert relative(ours.logits, theirs.logits) <= 1e-5
    ours.loss.backward()
    theirs.loss.backward()
    found, expected = (
        sorted(float(parameter.grad.norm()) for parameter in of.parameters() if parameter.grad is not None)
        for of in (model, other)
    )
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-7)


METHODS: dict[str, AdapterConfig] = {
    "LoRA": LoRAConfig(r=4),
    "rsLoRA": LoRAConfig(r=4, use_rslora=True),
    "LoRA-FA": LoRAConfig(r=4, freeze_A=True),
    "DoRA": DoRAConfig(r=4),
    "VeRA": VeRAConfig(r=8),
    "AdaLoRA": AdaLoRAConfig(init_r=4, target_r=2, total_step=10),
}


def adapted(model: Any, method: str) -> Any:
    torch.manual_seed(0)
    inject(model, replace(METHODS[method], target_modules="all-linear"))
    randomised(model)
    return model


@pytest.mark.parametrize("method", METHODS)
def test_outputs_and_gradients_are_the_dequantised_weights(kind: str, method: str, tmp_path: Path) -> None:
    """In training, and in eval mode those of an adapter that was saved and loaded again."""
    model, twin = adapted(quantized(kind), method), adapted(bench_quantized.plain(quantized(kind)), method)
    found = [run.train()(input_ids=IDS, labels=IDS) for run in (model, twin)]
    assert relative(found[0].logits, found[1].logits) <= 1e-5
    for run in found:
        run.loss.backward()
    ours, theirs = ({name: p.grad for name, p in of.named_parameters() if p.requires_grad} for of in (model, twin))
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        assert relative(ours[name], gradient) <= 1e-4, name
    save_adapter(model, tmp_path)
    loaded = load_adapter(quantized(kind), tmp_path)
    with torch.no_grad():
        outputs = [of.eval()(input_ids=IDS).logits for of in (loaded, model, twin)]
    assert relative(outputs[0], outputs[1]) <= 1e-6
    assert relative(outputs[0], outputs[2]) <= TOLERANCES.get(kind, 1e-5)


@pytest.mark.parametrize("method", ["LoRA", "DoRA", "VeRA"])
def test_a_16_bit_model(kind: str, method: str, tmp_path: Path) -> None:
    """It trains adapters in fp32, is merged and serves as the dequantised one in fp32 does, up to its own rounding."""
    # quanto has products of its own for groups of 128 columns in bf16.
    sizes = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
    model = adapted(quantized(kind, torch.bfloat16, **sizes), method).train()
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    twin = adapted(bench_quantized.plain(quantized(kind, torch.bfloat16, **sizes)).float(), method).train()
    found = [run(input_ids=IDS, labels=IDS) for run in (model, twin)]
    assert relative(found[0].logits.float(), found[1].logits) <= BF16
    for run in found:
        run.loss.backward()
    for (name, ours), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
        if ours.requires_grad:
            assert relative(ours.grad, theirs.grad) <= 2 * BF16, name
    save_adapter(model, tmp_path / "saved")
    with torch.no_grad():
        exact = twin.eval()(input_ids=IDS).logits
        assert relative(model.eval()(input_ids=IDS).logits.float(), exact) <= BF16
        merge(model, dequantize=True)
        assert relative(model(input_ids=IDS).logits.float(), exact) <= BF16
        assert {p.dtype for p in unload(model).parameters()} == {torch.bfloat16}
        bare, twice = quantized(kind, torch.bfloat16, **sizes).eval(), IDS[:1].expand(2, -1)
        base = bare(input_ids=twice).logits
        served = MultiAdapterModel(bare, budget=4 << 20)
        served.load(tmp_path / "saved")
        logits = served(input_ids=twice, adapter_ids=["saved", None]).logits
    assert served.pool.dtype == torch.bfloat16
    assert relative(logits[:1].float(), exact[:1]) <= BF16
    assert torch.equal(logits[1:], base[1:])
    assert relative(base[:1].float(), exact[:1]) > BF16


@pytest.mark.parametrize(
    "config",
    [LoRAConfig(), DoRAConfig(), VeRAConfig(), HiRAConfig()],
    ids=lambda config: type(config).__name__,
)
def test_methods_train(kind: str, config: Any) -> None:
    config = type(config)(r=4, target_modules="all-linear")
    model, twin = quantized(kind), bench_quantized.plain(quantized(kind))
    falls = [losses(of, copy.deepcopy(config)) for of in (model, twin)]
    assert falls[1][-1] < 0.995 * falls[1][0]
    assert falls[0] == pytest.approx(falls[1], rel=TOLERANCES.get(kind, 1e-4))


def test_doras_norm_is_the_dequantised_weights(kind: str) -> None:
    model = quantized(kind)
    inject(model, DoRAConfig(r=4, target_modules="all-linear"))
    for layer in model.model.layers:
        projection = layer.mlp.up_proj
        weight = dequantized(projection.base_layer)
        assert weight is not None
        assert is_quantized(projection.base_layer)
        magnitude = next(p for name, p in projection.named_parameters() if "magnitude" in name)
        assert torch.allclose(magnitude.float().flatten(), weight.float().norm(dim=1), rtol=1e-6)
        # What the layer computes with is that weight, but for an 8-bit layer's rounding of x.
        x = torch.randn(5, weight.shape[1], generator=torch.Generator().manual_seed(0))
        y = projection.base_layer(x)
        assert relative(y, x @ weight.float().T) <= TOLERANCES.get(kind, 1e-5)


@pytest.mark.parametrize("config", [LoRAConfig, DoRAConfig])
def test_merging(kind: str, config: Any) -> None:
    model = quantized(kind)
    inject(model, config(r=4, target_modules="all-linear"))
    randomised(model)
    with torch.no_grad():
        before = model(input_ids=IDS).logits
        with pytest.raises(
            ValueError, match=r"its weight is quantised .* merge\(model, dequantize=True\).* requantize=True"
        ):
            merge(model)
        assert torch.equal(model(input_ids=IDS).logits, before)
        merge(model, dequantize=True)
        layer = model.model.layers[0].mlp.up_proj.base_layer
        assert not is_quantized(layer)
        assert relative(model(input_ids=IDS).logits, before) <= TOLERANCES.get(kind, 1e-5)
        unmerge(model)
        assert torch.equal(model(input_ids=IDS).logits, before)


def test_a_weight_is_made_for_a_call_and_its_backward_alone(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In training once for each of the two, norm included; in eval mode not at all; nothing of it is kept between."""
    if "bitsandbytes" not in kind:
        pytest.skip("other libraries' layers are called")
    model = quantized(kind)
    inject(model, DoRAConfig(r=4, target_modules="all-linear"))
    randomised(model)
    made: list[weakref.ref[Tensor]] = []
    make = layers_dequantize.dequantized

    def counted(base: nn.Module) -> Tensor | None:
        found = make(base)
        if found is not None:
            made.append(weakref.ref(found))
        return found

    monkeypatch.setattr(layers_dequantize, "dequantized", counted)
    model.train()
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        made.clear()
        loss = model(input_ids=IDS, labels=IDS).loss
        assert len(made) == 14
        assert not any(weight() is not None for weight in made)
        loss.backward()
        # The first projections read an embedding that does not train: their dx, and weight, is nobody's.
        assert 14 + 11 <= len(made) - 14 * checkpointing <= 28
    model.eval()
    with torch.no_grad():
        model(input_ids=IDS)
        made.clear()
        model(input_ids=IDS)
    assert not made


def test_merging_into_as_few_bits(kind: str) -> None:
    model = quantized(kind)
    inject(model, DoRAConfig(r=4, target_modules="all-linear"))
    randomised(model)
    with torch.no_grad():
        before = model(input_ids=IDS).logits
        if "torchao" in kind:
            with pytest.raises(ValueError, match=r"does not tell how it was quantised.* dequantize=True"):
                merge(model, requantize=True)
            return
        with pytest.raises(ValueError, match="dequantize=True or requantize=True, got both"):
            merge(model, dequantize=True, requantize=True)
        rounded = merge(model, requantize=True)
        layer = model.model.layers[0].mlp.up_proj
        assert len(rounded) == 14
        assert type(layer.base_layer) is type(layer._unmerged[0])
        assert is_quantized(layer.base_layer)
        assert not any(p.requires_grad for p in layer.base_layer.parameters())
        bits = 8 if "int8" in kind else 4  # of eight bits in floating point few are digits
        assert all(2.0**-bits / 4 < share < 3 * 2.0**-bits for share in rounded.values())
        after = model(input_ids=IDS).logits
        unmerge(model)
        assert relative(model(input_ids=IDS).logits, before) <= 1e-6
        merge(model, dequantize=True)
        exact = model(input_ids=IDS).logits
    assert 0 < relative(after, exact) <= 0.5


def test_serving(kind: str, tmp_path: Path) -> None:
    alone: dict[str | None, Tensor] = {None: quantized(kind)(input_ids=IDS[:1]).logits.detach()}
    for seed, config in enumerate((LoRAConfig, DoRAConfig, VeRAConfig)):
        model = quantized(kind)
        inject(model, config(r=4, target_modules="all-linear"))
        randomised(model, seed)
        name = config.__name__
        save_adapter(model, tmp_path / name)
        alone[name] = model(input_ids=IDS[:1]).logits.detach()
    served = MultiAdapterModel(quantized(kind), budget=4 << 20)
    names = list(alone)
    for name in names[1:]:
        served.load(tmp_path / str(name))
    with torch.no_grad():
        logits = served(input_ids=IDS[:1].expand(len(names), -1), adapter_ids=names).logits
    for row, name in zip(logits, names, strict=True):
        assert relative(row, alone[name][0]) <= TOLERANCES.get(kind, 1e-5), name


@pytest.mark.usefixtures("masks")
@pytest.mark.parametrize("method", ["lora", "rslora", "dora", "dora with dropout", "vera"])
def test_accelerated_peft_is_peft(kind: str, method: str, tmp_path: Path) -> None:
    if (method, kind) in REFUSED:
        pytest.skip("PEFT does not run it")
    config = copy.deepcopy(OTHERS[method.removesuffix(" with dropout")])
    if method.endswith("dropout"):
        config.lora_dropout = 0.5

    def built() -> Any:
        torch.manual_seed(0)
        model = peft.get_peft_model(quantized(kind), copy.deepcopy(config))
        randomised(model)
        return model.train()

    def run(model: Any) -> dict[str, Tensor]:
        torch.manual_seed(0)
        model.zero_grad()
        found = model(input_ids=IDS, labels=IDS)
        found.loss.backward()
        grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        return {"logits": found.logits.detach(), **grads}

    model = built()
    before = model.state_dict().keys()
    found = fastadapt.accelerate_peft(model)
    if "torchao" in kind:  # PEFT's layer on it is a kind of its own
        assert not found.taken
        assert set(found.left.values()) == {"lora.TorchaoLoraLinear has a forward of its own"}
        return
    theirs = run(built())
    ways = {"grouped", "fused"} if "bitsandbytes" in kind else {"called"}
    assert set(found.taken.values()) == ways, str(found)
    assert len(found.taken) == 14
    ours = run(model)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert relative(ours[name], value) <= 1e-5, name
    assert model.state_dict().keys() == before
    with model.disable_adapter(), torch.no_grad():
        assert not torch.equal(model(input_ids=IDS).logits, ours["logits"])
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(quantized(kind), tmp_path).train()
    torch.manual_seed(0)
    assert relative(loaded(input_ids=IDS).logits, ours["logits"]) <= 1e-5
    fastadapt.restore_peft(model)
    restored = run(model)
    assert all(torch.equal(restored[name], value) for name, value in theirs.items())


def test_accelerated_peft_mixes_a_batch(kind: str) -> None:
    if kind != "bitsandbytes nf4":
        pytest.skip("one library's is enough")
    model = peft.get_peft_model(quantized(kind), copy.deepcopy(OTHERS["dora"]), adapter_name="one")
    model.add_adapter("other", copy.deepcopy(OTHERS["lora"]))
    randomised(model)
    names = ["one", "other", "__base__"]
    alone = []
    with torch.no_grad():
        model(input_ids=IDS)  # the first in eval mode packs the weights for this CPU
        fastadapt.accelerate_peft(model.eval(), mixed_batches=True)
        for name in names[:2]:
            model.set_adapter(name)
            alone.append(model(input_ids=IDS[:1]).logits)
        with model.disable_adapter():
            alone.append(model(input_ids=IDS[:1]).logits)
        mixed = model(input_ids=IDS[:1].expand(3, -1), adapter_names=names).logits
    for row, one in zip(mixed, alone, strict=True):
        assert relative(row, one[0]) <= TOLERANCES[kind]
    assert relative(alone[0], alone[1]) > 2 * TOLERANCES[kind]


class Packed(nn.Module):
    """The shape of a GPTQ layer: integers in 32-bit words, scales and zeros by groups of columns, and no weight."""

    def __init__(self, layer: nn.Linear, group: int = 16) -> None:
        super().__init__()
        self.in_features, self.out_features, self.group = layer.in_features, layer.out_features, group
        groups = layer.weight.detach().reshape(layer.out_features, -1, group)
        low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
        scales = (high - low) / 15
        words = ((groups - low) / scales).round().int().reshape(layer.out_features, -1, 8)
        self.register_buffer("qweight", (words << torch.arange(0, 32, 4, dtype=torch.int32)).sum(-1, dtype=torch.int32))
        self.register_buffer("scales", scales)
        self.register_buffer("zeros", low)
        self.bias = layer.bias

    def unpacked(self) -> Tensor:
        words = (self.qweight[..., None] >> torch.arange(0, 32, 4, dtype=torch.int32)) & 15
        groups = words.reshape(self.out_features, -1, self.group) * self.scales + self.zeros
        return groups.reshape(self.out_features, self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.unpacked().to(x.dtype), self.bias)


class Awq(Packed):
    """The shape of an AWQ layer: an autograd Function of its own."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _Product.apply(x, self.unpacked())
        return y if self.bias is None else y + self.bias


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return x @ weight.T

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return dy @ ctx.saved_tensors[0], None


class Hqq(Packed):
    """The shape of an HQQ layer: its integers are a parameter without a gradient."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer)
        packed = self.qweight
        del self.qweight
        self.W_q = nn.Parameter(packed, requires_grad=False)

    @property
    def qweight(self) -> Tensor:
        return self.W_q

    @qweight.deleter
    def qweight(self) -> None:
        del self._buffers["qweight"]


@pytest.mark.parametrize("packing", [Packed, Awq, Hqq])
@pytest.mark.parametrize("config", [LoRAConfig, DoRAConfig, VeRAConfig])
def test_layers_that_alone_can_read_their_weight(packing: Any, config: Any, tmp_path: Path) -> None:
    """They are adapted, trained, saved, loaded and merged as the layers of the weight that they multiply with."""

    def models() -> tuple[Any, Any]:
        torch.manual_seed(0)
        packed = nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 16, bias=False))
        packed[0], packed[2] = packing(packed[0]), packing(packed[2])
        twin = nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 16, bias=False))
        for place in (0, 2):
            twin[place].weight = nn.Parameter(packed[place].unpacked())
        twin[0].bias = packed[0].bias
        return packed, twin

    x = torch.randn(7, 32, generator=torch.Generator().manual_seed(1))

    def steps(model: Any) -> list[float]:
        torch.manual_seed(0)
        inject(model, config(r=4, target_modules="all-linear"))
        model.train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        found = []
        for _ in range(4):
            loss = model(x).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(float(loss.detach()))
        return found

    packed, twin = models()
    ours = steps(packed)
    assert ours == pytest.approx(steps(twin), rel=1e-5)
    assert ours[-1] < ours[0]
    assert packed[0].way == "called"
    packed.eval()
    y = packed(x).detach()
    save_adapter(packed, tmp_path)
    again = models()[0]
    load_adapter(again, tmp_path)
    assert relative(again.eval()(x), y) <= 1e-6
    with pytest.raises(ValueError, match=rf"its weight is quantised \({packing.__name__}\)"):
        merge(packed)
    with pytest.raises(ValueError, match=rf"its weight \({packing.__name__}\) does not tell how it was quantised"):
        merge(packed, requantize=True)
    merge(packed, dequantize=True)
    assert type(packed[0].base_layer) is nn.Linear
    assert relative(packed(x), y) <= 1e-5
    unmerge(packed)
    assert torch.equal(packed(x), y)


def test_a_norm_asks_a_layer_for_rows_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """DoRA's norm takes as many rows as A has in training, and nothing in eval mode once it is there."""
    model = nn.Sequential(Packed(nn.Linear(64, 48)))
    inject(model, DoRAConfig(r=4, target_modules="all-linear"))
    rows: list[int] = []
    forward = Packed.forward
    monkeypatch.setattr(Packed, "forward", lambda self, x: rows.append(len(x)) or forward(self, x))
    model.train()
    x = torch.randn(5, 64)
    model(x).sum().backward()
    assert sum(rows) == 5 + 64 + 1 + 4 + 1  # ‖W0‖ once, by unit vectors and zero; then A, and zero
    rows.clear()
    model(x).sum().backward()
    model[0].adapters["default"].lora_A.data += 0.1
    model(x)
    assert rows == [5, 5, 4, 1]
    model.eval()
    with torch.no_grad():
        model(x)
        rows.clear()
        model(x)
    assert rows == [5]


def test_the_bench_compares_every_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("bitsandbytes", reason="not installed: pip install 'fastadapt[quantized]'")

    def load(name: str, size: Any) -> tuple[Any, list[dict[str, Tensor]]]:
        return llama(**SIZES).requires_grad_(False), [{"input_ids": IDS, "labels": IDS}]

    monkeypatch.setattr(train, "load", load)
    threads = torch.get_num_threads()
    options = ["--rounds", "2", "--threads", "1", "--layers", "2", "--no-peaks"]
    main(["quantized", "--json", str(tmp_path / "quantized.json"), *options])
    torch.set_num_threads(threads)
    rows = json.loads((tmp_path / "quantized.json").read_text())["rows"]
    assert [(row["case"], row["side"]) for row in rows] == [
        (name, side) for name, case in bench_quantized.CASES.items() for side in case.sides
    ]
    for row in rows:
        assert 0 < row["x_low"] <= row["x_peft"] <= row["x_high"]
        assert row["kept_mb"] > 0
        assert max(row["max_difference"], row["from_dequantised"]) <= 1e-4
    assert "Training on quantised bases" in page.results(tmp_path)
    assert (tmp_path / "quantized.png").read_bytes().startswith(b"\x89PNG")
