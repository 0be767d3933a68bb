"""Autocast over a base of any dtype: every method, alone and in a group, and every kind of layer."""

from __future__ import annotations

from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_follows
from tiny_models import randomise
from torch import Tensor, nn

import fastadapt
from fastadapt import AdapterForm, functional, inject
from fastadapt.methods import AdapterConfig
from fastadapt.serving import MultiAdapterModel

SIXTEEN = (torch.bfloat16, torch.float16)
BASES = (torch.float32, *SIXTEEN)
TARGETS = ["q_proj", "k_proj", "v_proj"]

CONFIGS: dict[str, AdapterConfig] = {
    "LoRA": fastadapt.LoRAConfig(r=4),
    "LoRA, biases": fastadapt.LoRAConfig(r=4, bias="lora_only", lora_bias=True),
    "LoRA-FA": fastadapt.LoRAConfig(r=4, freeze_A=True),
    "LoRA-drop": fastadapt.LoRADropConfig(r=4),
    "Delta-LoRA": fastadapt.DeltaLoRAConfig(r=4, anchored=True),
    "DoRA": fastadapt.DoRAConfig(r=4),
    "VeRA": fastadapt.VeRAConfig(r=16),
    "DVoRA": fastadapt.VeRAConfig(r=16, use_dora=True),
    "AdaLoRA": fastadapt.AdaLoRAConfig(init_r=6, target_r=4, total_step=20),
    "HiRA": fastadapt.HiRAConfig(r=4),
    "SSF": fastadapt.SSFConfig(),
    "RepAdapter": fastadapt.RepAdapterConfig(r=4, adapter_dropout=0.0),
    "GLoRA": fastadapt.GLoRAConfig(r=3),
    "GLoRA, vectors": fastadapt.GLoRAConfig(config_A_B="vector", config_C="vector", config_D_E="vector"),
}


class Attention(nn.Module):
    """Three layers that read one x, which under autocast comes in the base's dtype, autocast's, or fp32."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(12, 16), nn.Linear(12, 16), nn.Linear(12, 16, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], -1)


def adapted(name: str, dtype: torch.dtype, **options: Any) -> nn.Module:
    config = deepcopy(CONFIGS[name])
    config.target_modules = TARGETS
    model = inject(Attention().to(dtype), config, **options)
    randomise([parameter for parameter in model.parameters() if parameter.requires_grad])
    return model


def results(model: nn.Module, x: Tensor, autocast: torch.dtype | None) -> dict[str, Tensor]:
    """The output, and the gradients of x and of all parameters that train."""
    x = x.detach().clone().requires_grad_()
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        y = model(x)
    # Powers of two: the plain formula's y may be in fp32, and its gradient must be no finer.
    exponents = torch.randint(-3, 1, y.shape, generator=torch.Generator().manual_seed(3))
    y.backward(torch.where(exponents % 2 == 0, 2.0, -2.0).pow(exponents).to(y.dtype))
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    found = {"y": y.detach()}
    for name, leaf in {"x": x, **trained}.items():
        assert leaf.grad is not None, name
        found[name] = leaf.grad
    return found


def formula(plain: nn.Module, x: Tensor, autocast: torch.dtype, to: torch.dtype) -> dict[str, Tensor]:
    """The results of a model on the reference backend: under autocast, or whole in fp64."""
    return results(plain, x, autocast) if to == autocast else results(deepcopy(plain).to(to), x.to(to), None)


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("autocast", SIXTEEN, ids=str)
@pytest.mark.parametrize("base", BASES, ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_every_method_over_every_base(name: str, base: torch.dtype, autocast: torch.dtype, training: bool) -> None:
    """Held to the plain formula under the same autocast: outputs and all gradients, whatever dtype x comes in."""
    for given in dict.fromkeys((base, autocast, torch.float32)):
        x = torch.randn(3, 5, 12, generator=torch.Generator().manual_seed(2)).to(given)
        model = adapted(name, base).train(training)
        plain = adapted(name, base, backend="reference").train(training)
        actual = results(model, x, autocast)
        assert actual["y"].dtype == autocast
        assert_follows(actual, partial(formula, plain, x, autocast), autocast)


@pytest.mark.parametrize("autocast", SIXTEEN, ids=str)
@pytest.mark.parametrize("weight_dtype", BASES, ids=str)
@pytest.mark.parametrize("x_dtype", BASES, ids=str)
@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_every_pair_of_dtypes(
    backend: str, x_dtype: torch.dtype, weight_dtype: torch.dtype, autocast: torch.dtype
) -> None:
    x, weight = torch.randn(7, 12).to(x_dtype), torch.randn(10, 12).to(weight_dtype)
    A, B, U, V = torch.randn(3, 12), torch.randn(10, 3), torch.randn(10, 2), torch.randn(2, 12)
    with torch.autocast("cpu", autocast):
        y = functional.adapter_linear(x, weight, AdapterForm(A, B), backend=backend)
        scaled = functional.hadamard_linear(x, weight, U, V, backend=backend)
        out = functional.bottleneck(x, A, B, backend=backend)
        stream = functional.bottleneck(x, A, torch.randn(12, 3), residual=x, backend=backend)
    assert {y.dtype, scaled.dtype, out.dtype} == {autocast}
    # As PyTorch adds: two of one dtype keep it, two of different dtypes are float32.
    assert stream.dtype == torch.promote_types(x_dtype, autocast)
    cast = x.to(autocast), weight.to(autocast)
    assert torch.equal(y, functional.adapter_linear(*cast, AdapterForm(A, B), backend=backend))
    assert torch.equal(scaled, functional.hadamard_linear(*cast, U, V, backend=backend))


def test_what_autocast_leaves_alone_is_not_mixed() -> None:
    x, form = torch.randn(4, 12), AdapterForm(torch.randn(3, 12), torch.randn(10, 3))
    weight = torch.randn(10, 12)
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(TypeError, match=r"weight must have x's dtype torch.float64, got torch.float32"):
            functional.adapter_linear(x.double(), weight, form)
        with pytest.raises(TypeError, match=r"weight must have x's dtype torch.float32, got torch.float64"):
            functional.adapter_linear(x, weight.double(), form)
    with pytest.raises(TypeError, match=r"weight must have x's dtype torch.bfloat16, got torch.float32"):
        functional.adapter_linear(x.bfloat16(), weight, form)


@pytest.mark.parametrize("name", ["LoRA", "DoRA", "VeRA", "RepAdapter"])
def test_compiles_whole(name: str) -> None:
    model = adapted(name, torch.float32)
    x = torch.randn(3, 5, 12).bfloat16()
    actual = results(torch.compile(model, fullgraph=True, backend="aot_eager"), x, torch.bfloat16)
    actual = {key.removeprefix("_orig_mod."): value for key, value in actual.items()}
    plain = adapted(name, torch.float32, backend="reference")
    assert_follows(actual, partial(formula, plain, x, torch.bfloat16), torch.bfloat16)


@pytest.mark.parametrize("autocast", SIXTEEN, ids=str)
@pytest.mark.parametrize("base", BASES, ids=str)
@pytest.mark.parametrize("kind", ["embedding", "conv", "norm"])
def test_other_layers(kind: str, base: torch.dtype, autocast: torch.dtype) -> None:
    """Beside their base layers' own dtypes; float16 convolutions have no kernel on every CPU, so they go with bf16."""
    torch.manual_seed(0)
    layer, x = {
        "embedding": (nn.Embedding(9, 12), torch.arange(9)),
        "conv": (nn.Conv2d(3, 4, 2), torch.randn(2, 3, 5, 5).to(base)),
        "norm": (nn.LayerNorm(12), torch.randn(4, 12).to(base)),
    }[kind]
    model = nn.Sequential(layer).to(base)
    with torch.autocast("cpu", autocast):
        before = model(x)
    config = (fastadapt.SSFConfig if kind == "norm" else fastadapt.LoRAConfig)(target_modules=["0"])
    inject(model, config)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    randomise(trained)
    with torch.autocast("cpu", autocast):
        y = model(x)
    assert y.dtype == before.dtype
    y.float().square().sum().backward()
    assert all(parameter.grad is not None and torch.isfinite(parameter.grad).all() for parameter in trained)


def test_norms_and_merged_weights_are_not_made_in_sixteen_bits() -> None:
    weight, A, B = torch.randn(10, 12), torch.randn(3, 12), torch.randn(10, 3)
    form = AdapterForm(A, B)
    norm, merged = functional.weight_norm(weight, A, B, 0.5), functional.merged_weight(weight, form)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(functional.weight_norm(weight, A, B, 0.5), norm)
        assert torch.equal(functional.merged_weight(weight, form), merged)


@pytest.mark.parametrize("autocast", SIXTEEN, ids=str)
@pytest.mark.parametrize("base", BASES, ids=str)
def test_rows_of_many_adapters(base: torch.dtype, autocast: torch.dtype, tmp_path: Path) -> None:
    """Base rows are the base's to the bit, and every row has the dtype that the base has under autocast."""
    for name in ("LoRA", "DoRA"):
        fastadapt.save_adapter(adapted(name, torch.float32), tmp_path / name)
    model = Attention().to(base)
    x = torch.randn(3, 5, 12, generator=torch.Generator().manual_seed(2)).to(base)
    with torch.autocast("cpu", autocast), torch.no_grad():
        expected = model(x)
        alone = fastadapt.load_adapter(Attention().to(base), tmp_path / "DoRA")(x)
    served = MultiAdapterModel(model, budget=1 << 20)
    for name in ("LoRA", "DoRA"):
        served.load(tmp_path / name)
    with torch.autocast("cpu", autocast):
        y = served(x, adapter_ids=["LoRA", None, "DoRA"])
    assert y.dtype == expected.dtype
    assert torch.equal(y[1], expected[1])
    assert (y[2] - alone[2]).abs().max() <= 4 * torch.finfo(autocast).eps * alone[2].abs().max()


def test_a_stream_that_is_its_own_residual_compiles() -> None:
    v, down, up = torch.randn(4, 12, requires_grad=True), torch.randn(3, 12), torch.randn(12, 3)

    def run(v: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return functional.bottleneck(v, down, up, residual=v)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(v), run(v))
