"""Serving rows of many adapters where a base layer can only be called, and layers that are offloaded."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from test_ways import Scaled, hooked, looked_at, parametrized, patched, randomise
from tiny_models import llama
from torch import Tensor, nn

import fastadapt
from fastadapt import DoRAConfig, LoRAConfig, VeRAConfig
from fastadapt.serving import MultiAdapterModel

accelerate = pytest.importorskip("accelerate")
IDS = torch.tensor([[5, 3, 9, 2, 7], [4, 8, 1, 6, 3], [7, 7, 2, 1, 9]])


class Net(nn.Module):
    """Layers of several kinds, rows of tokens in and out."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 12)
        self.scaled = Scaled(12, 12)
        self.hooked = hooked(nn.Linear(12, 12))
        self.patched = patched(nn.Linear(12, 12))
        self.made = parametrized(nn.Linear(12, 12, bias=False))
        self.plain = nn.Linear(12, 12)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for layer in (self.scaled, self.hooked, self.patched, self.made, self.plain):
            x = x + layer(x).tanh()
        return x


def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


LAYERS = ["scaled", "hooked", "patched", "made", "plain"]
CONFIGS = {
    "lora": LoRAConfig(r=3, target_modules=LAYERS),
    "dora": DoRAConfig(r=2, target_modules=LAYERS),
    "vera": VeRAConfig(r=4, target_modules=LAYERS),
    "bias": LoRAConfig(r=2, bias="lora_only", target_modules=["hooked", "plain"]),
    "plain": LoRAConfig(r=2, target_modules=["plain"]),
}


@torch.no_grad()
def test_each_row_has_its_adapter(tmp_path: Path) -> None:
    alone = {}
    for name, config in CONFIGS.items():
        model = fastadapt.inject(net(), copy.deepcopy(config))
        randomise(model)
        fastadapt.save_adapter(model, tmp_path / name)
        alone[name] = model.eval()(IDS[:1])
    base = net()(IDS[:1])
    served = MultiAdapterModel(net(), budget=1 << 22)
    for name in CONFIGS:
        served.load(tmp_path / name, name)
    names = ["lora", None, "dora", "vera", "bias", None, "plain", "lora"]
    y = served(IDS[:1].expand(len(names), -1), adapter_ids=names)
    for row, name in zip(y, names, strict=True):
        if name is None:
            torch.testing.assert_close(row, base[0])
        else:
            torch.testing.assert_close(row, alone[name][0], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_layers_without_an_adapter_and_base_rows_are_the_layers_own(tmp_path: Path) -> None:
    model = fastadapt.inject(net(), copy.deepcopy(CONFIGS["plain"]))
    randomise(model)
    fastadapt.save_adapter(model, tmp_path / "plain")
    seen: list[Tensor] = []
    watched = net()
    looked_at(watched.scaled)
    watched.made.register_forward_hook(lambda module, args, y: seen.append(y))
    served = MultiAdapterModel(watched, budget=1 << 22)
    served.load(tmp_path / "plain", "plain")
    own: list[Tensor] = []
    base = net()
    base.made.register_forward_hook(lambda module, args, y: own.append(y))
    base(IDS)
    served(IDS, adapter_ids=["plain", None, "plain"])
    assert torch.equal(seen[0], own[0])
    assert len(watched.scaled.base_layer.seen) == 1


def test_a_router_that_no_adapter_touches(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = hf.PhimoeConfig(vocab_size=20, hidden_size=16, intermediate_size=24, num_local_experts=2, **sizes)
    model = hf.PhimoeForCausalLM(config).eval()
    adapted = fastadapt.inject(copy.deepcopy(model), LoRAConfig(r=2, target_modules=["q_proj", "v_proj"]))
    randomise(adapted)
    fastadapt.save_adapter(adapted, tmp_path)
    with torch.no_grad():
        want, base = adapted.eval()(IDS).logits, model(IDS).logits
        served = MultiAdapterModel(model, budget=1 << 22)
        served.load(tmp_path, "a")
        y = served(IDS, adapter_ids=["a", None, "a"]).logits
    torch.testing.assert_close(y[[0, 2]], want[[0, 2]], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(y[1], base[1], rtol=1e-4, atol=1e-5)


def offloaded(kind: str, folder: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if kind == "cpu":
            return accelerate.cpu_offload(llama(), execution_device=torch.device("cpu"))
        return accelerate.disk_offload(llama(), str(folder / "weights"), execution_device=torch.device("cpu"))


@pytest.mark.parametrize("kind", ["cpu", "disk"])
@pytest.mark.parametrize("method", ["LoRA", "DoRA", "HiRA"])
@torch.no_grad()
def test_offloaded_weights(kind: str, method: str, tmp_path: Path) -> None:
    """On meta between calls; DoRA's norms and HiRA's product need what is fetched."""
    targets: dict[str, Any] = {"r": 2, "target_modules": ["q_proj", "k_proj", "down_proj", "embed_tokens"]}
    if method != "LoRA":
        targets["target_modules"] = targets["target_modules"][:3]
    config = getattr(fastadapt, f"{method}Config")(**targets)
    plain = fastadapt.inject(llama(), copy.deepcopy(config))
    randomise(plain)
    want = plain.eval()(IDS).logits
    fastadapt.save_adapter(plain, tmp_path)
    model = offloaded(kind, tmp_path)
    base = llama()(IDS).logits
    fastadapt.inject(model, config)
    assert torch.equal(model(IDS).logits, base)
    assert all(p.device.type == "cpu" for name, p in model.named_parameters() if ".adapters." in name)
    assert {layer.reason for layer in fastadapt.adapted_layers(model)} == {"its weight is offloaded between calls"}
    fastadapt.unload(model)
    fastadapt.load_adapter(model, tmp_path)
    torch.testing.assert_close(model(IDS).logits, want)
    assert model.model.layers[0].self_attn.q_proj.weight.is_meta
    with pytest.raises(ValueError, match="its weight is offloaded between calls: merge"):
        fastadapt.merge(model)
    torch.testing.assert_close(model(IDS).logits, want)


@torch.no_grad()
def test_what_is_offloaded_with_its_adapters() -> None:
    model = fastadapt.inject(llama(), DoRAConfig(r=2, target_modules=["q_proj", "v_proj"]))
    randomise(model)
    want = model.eval()(IDS).logits
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    torch.testing.assert_close(model(IDS).logits, want)


@pytest.mark.parametrize("kind", ["cpu", "disk"])
@torch.no_grad()
def test_serving_an_offloaded_model(kind: str, tmp_path: Path) -> None:
    adapted = fastadapt.inject(llama(), DoRAConfig(r=2, target_modules=["q_proj", "down_proj"]))
    randomise(adapted)
    fastadapt.save_adapter(adapted, tmp_path / "a")
    served = MultiAdapterModel(offloaded(kind, tmp_path), budget=1 << 22)
    served.load(tmp_path / "a", "a")
    y = served(IDS, adapter_ids=["a", None, "a"]).logits
    torch.testing.assert_close(y[[0, 2]], adapted.eval()(IDS).logits[[0, 2]])
    torch.testing.assert_close(y[1], llama()(IDS).logits[1])
