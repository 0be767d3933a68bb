"""Adapters on quantised bases: PEFT's on the same base as the oracle, DoRA's norm that of the dequantised weight."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from test_train import answers, tokenizer
from tiny_models import llama
from torch import Tensor, nn

import fastadapt
from fastadapt import (
    DoRAConfig,
    HiRAConfig,
    LoRAConfig,
    VeRAConfig,
    inject,
    load_adapter,
    merge,
    save_adapter,
    trainable_parameters,
    unmerge,
)
from fastadapt.commands import base_model
from fastadapt.commands.base_model import load_base
from fastadapt.commands.train import command
from fastadapt.commands.train.options import Options
from fastadapt.layers.dequantize import dequantized, is_quantized
from fastadapt.serving import MultiAdapterModel

pytestmark = pytest.mark.filterwarnings("ignore")  # of the libraries, at import and in 8-bit products


def of_bitsandbytes(layer: nn.Linear, kind: str) -> nn.Module:
    import bitsandbytes as bnb

    sizes = layer.in_features, layer.out_features, layer.bias is not None
    new: nn.Module
    if kind == "nf4":
        new = bnb.nn.Linear4bit(*sizes, compute_dtype=torch.float32, compress_statistics=True, quant_type="nf4")
        new.weight = bnb.nn.Params4bit(
            layer.weight.detach().clone(), requires_grad=False, quant_type="nf4", compress_statistics=True
        )
    else:
        new = bnb.nn.Linear8bitLt(*sizes, has_fp16_weights=False)
        new.weight = bnb.nn.Int8Params(layer.weight.detach().clone(), requires_grad=False, has_fp16_weights=False)
    new.bias = layer.bias
    return new.to("cpu")


def by_bitsandbytes(model: nn.Module, kind: str) -> None:
    for path, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and path != "lm_head":
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, of_bitsandbytes(layer, kind))
    setattr(model, "is_loaded_in_4bit" if kind == "nf4" else "is_loaded_in_8bit", True)  # as from_pretrained does


def by_quanto(model: nn.Module, kind: str) -> None:
    from optimum import quanto

    quanto.quantize(model, weights=getattr(quanto, kind), exclude="lm_head")
    quanto.freeze(model)


def by_torchao(model: nn.Module, kind: str) -> None:
    from torchao import quantization

    quantization.quantize_(
        model,
        getattr(quantization, kind)(),
        filter_fn=lambda module, path: isinstance(module, nn.Linear) and path != "lm_head",
    )


KINDS: dict[str, tuple[Callable[[nn.Module, str], None], str, str]] = {
    "bitsandbytes nf4": (by_bitsandbytes, "nf4", "bitsandbytes"),
    "bitsandbytes int8": (by_bitsandbytes, "int8", "bitsandbytes"),
    "quanto int8": (by_quanto, "qint8", "optimum.quanto"),
    "quanto int4": (by_quanto, "qint4", "optimum.quanto"),
    "torchao int8": (by_torchao, "Int8WeightOnlyConfig", "torchao.quantization"),
    "torchao fp8": (by_torchao, "Float8WeightOnlyConfig", "torchao.quantization"),
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
REFUSED = {("vera", "torchao int8"), ("vera", "torchao fp8"), ("adalora", "quanto int8")}
# What layers compute beside their weight: x in 8 bits, and in bf16 where some CPUs multiply in that.
TOLERANCES = {"bitsandbytes int8": 3e-2, "bitsandbytes nf4": 1e-2}
IDS = torch.randint(3, 67, (2, 9), generator=torch.Generator().manual_seed(3))


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    pytest.importorskip(KINDS[name][2], reason="not installed: pip install 'fastadapt[quantized]'")
    return name


def quantized(kind: str) -> Any:
    model = llama(**SIZES)
    make, how, _ = KINDS[kind]
    make(model, how)
    return model.eval()


def randomised(model: nn.Module, seed: int = 5) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _, parameter in sorted(model.named_parameters()):
        if parameter.requires_grad:
            parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.05)


def plain(model: Any) -> None:
    """Puts plain layers of the dequantised weights into the places of the quantised ones."""
    for path, layer in list(model.named_modules()):
        weight = dequantized(layer)
        if weight is not None:
            parent, _, name = path.rpartition(".")
            new = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
            new.weight = nn.Parameter(weight.float())
            setattr(model.get_submodule(parent), name, new)


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


@pytest.mark.parametrize(
    "config",
    [LoRAConfig(), DoRAConfig(), VeRAConfig(), HiRAConfig()],
    ids=lambda config: type(config).__name__,
)
def test_methods_train(kind: str, config: Any) -> None:
    config = type(config)(r=4, target_modules="all-linear")
    model, twin = quantized(kind), quantized(kind)
    plain(twin)
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
        with pytest.raises(ValueError, match=r"its weight is quantised .* merge\(model, dequantize=True\)"):
            merge(model)
        assert torch.equal(model(input_ids=IDS).logits, before)
        merge(model, dequantize=True)
        layer = model.model.layers[0].mlp.up_proj.base_layer
        assert not is_quantized(layer)
        assert relative(model(input_ids=IDS).logits, before) <= TOLERANCES.get(kind, 1e-5)
        unmerge(model)
        assert torch.equal(model(input_ids=IDS).logits, before)


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
    assert set(found.taken.values()) == {"called"}, str(found)
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
