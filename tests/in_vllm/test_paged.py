"""The way of GPUs on a CPU: adapters on pages, tokens in buffers, one operator that compilers do not look into."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("vllm.lora", reason="vLLM has an environment of its own: tests/in_vllm/environment.py")

from packed_model import METHODS, PACKED, WIDTH, Plain, check, load, manager_of
from vllm import envs
from vllm.config import VllmConfig
from vllm.forward_context import set_forward_context
from vllm.lora import utils
from vllm.lora.layers import LoRAMapping
from vllm.platforms import current_platform

from fastadapt import LoRAConfig, inject, save_adapter
from fastadapt.integrations.vllm import register, seams
from fastadapt.integrations.vllm.layers import FastLinear
from fastadapt.integrations.vllm.paged import PagedLinear
from fastadapt.integrations.vllm.register import VARIABLE
from fastadapt.integrations.vllm.seams import fast_classes
from fastadapt.serving import AdapterError

# Triton asks for it when it is imported.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

pytest_plugins = ["one_process"]
pytestmark = pytest.mark.usefixtures("alone")


@pytest.fixture
def paged(alone: VllmConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `replace(paged=True)` does, for one test."""
    own = tuple(kind for kind in utils._all_lora_classes if not issubclass(kind, FastLinear))
    monkeypatch.setattr(utils, "_all_lora_classes", own)
    monkeypatch.setattr(utils, "_all_lora_classes", fast_classes(PagedLinear))
    punica = "fastadapt.integrations.vllm.paged_punica.PagedPunicaOnCPU"
    monkeypatch.setattr(type(current_platform), "get_punica_wrapper", classmethod(lambda cls: punica))
    monkeypatch.setattr(alone.lora_config, "max_lora_rank", 64)  # which bounds all adapters here


@pytest.fixture
def manager(alone: VllmConfig, paged: None, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(PagedLinear, "backend", "triton" if INTERPRETED else "eager")
    found = manager_of(alone)
    assert all(isinstance(layer, PagedLinear) for layer in found.fast.values())
    return found


@pytest.fixture
def context(alone: VllmConfig) -> Iterator[None]:
    with set_forward_context(None, alone):
        yield


@pytest.mark.skipif(INTERPRETED, reason="this is that process")
def test_the_same_with_the_kernels_in_tritons_interpreter() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    some = "change_hands or fill_up or (base_rows and (DVoRA or own))"  # it is slow
    pytest_of_them = [sys.executable, "-m", "pytest", "-q", __file__, "-k", some]
    done = subprocess.run(pytest_of_them, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:]


@pytest.mark.parametrize("name", METHODS)
def test_each_method_beside_base_rows(name: str, manager: Any, directories: dict[str, Path], context: None) -> None:
    check(manager, ["", name, name, ""], directories)


def test_layers_outside_of_a_step(manager: Any, directories: dict[str, Path]) -> None:
    """As in an image model's tower."""
    check(manager, ["", "DoRA", "LoRA"], directories)


def test_methods_beside_each_other_in_slots_that_change_hands(
    manager: Any, directories: dict[str, Path], context: None
) -> None:
    with torch.inference_mode():
        check(manager, ["LoRA", "", "DoRA", "VeRA", "LoRA"], directories)
    check(manager, ["DVoRA", "AdaLoRA", ""], directories)
    with torch.inference_mode():
        check(manager, ["partly", "SSF", "VeRA", ""], directories)
    manager.remove_all_adapters()
    check(manager, ["DoRA, partly", "a bias of B", "a bias of its own"], directories)
    check(manager, ["", ""], directories)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_each_method_in_16_bits(
    dtype: torch.dtype, alone: VllmConfig, paged: None, directories: dict[str, Path], context: None
) -> None:
    manager = manager_of(alone, dtype)
    for name in METHODS:
        check(manager, ["", name, name, ""], directories)


class Shuffled:
    """A way to quantise whose kernel wants the bias padded and in an order of its own, as Marlin's does."""

    def __init__(self, plain: Any, layer: Any) -> None:
        self.plain, self.order = plain, torch.randperm(len(layer.bias))
        padded = torch.full((len(layer.bias) + 8,), torch.nan, dtype=layer.bias.dtype)
        padded[self.order] = layer.bias.detach()
        layer.bias = torch.nn.Parameter(padded, requires_grad=False)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        y: Tensor = self.plain.apply(layer, x, None)
        return y if bias is None else y + bias[self.order]


@pytest.mark.parametrize("name", METHODS)
def test_a_kernel_that_keeps_its_bias_in_another_order(
    name: str, alone: VllmConfig, paged: None, directories: dict[str, Path], context: None
) -> None:
    manager = manager_of(alone)
    for layer in manager.fast.values():
        if layer.base_layer.bias is not None:
            layer.base_layer.quant_method = Shuffled(layer.base_layer.quant_method, layer.base_layer)
    check(manager, ["", name, name, ""], directories)
    check(manager, ["", ""], directories)


class Static8:
    """Inputs of 8 bits with one scale for all, which was found on activations that are small."""

    def __init__(self, plain: Any, layer: Any) -> None:
        self.plain = plain
        layer.input_scale = torch.nn.Parameter(torch.tensor(0.3 / 448), requires_grad=False)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        steps = (x / layer.input_scale).clamp(-448, 448).to(torch.float8_e4m3fn)
        y: Tensor = self.plain.apply(layer, steps.to(x.dtype) * layer.input_scale, bias)
        return y


def test_norms_of_a_kernel_with_one_scale_for_all_inputs(manager: Any) -> None:
    layer, weight = manager.modules["attn.o_proj"], Plain().attn.o_proj.weight.detach()
    layer.base_layer.quant_method = Static8(layer.base_layer.quant_method, layer.base_layer)
    torch.testing.assert_close(layer.squares(), weight.square().sum(1), rtol=1e-5, atol=0.0)
    for size in (1e-3, 1.0, 30.0):
        A = size * torch.randn(4, weight.shape[1])
        A[2] = 0
        exact = weight @ A.T
        assert (layer.products(A) - exact).norm() < 0.04 * exact.norm()


def test_rows_that_fill_up_a_step_are_nobodys(manager: Any, directories: dict[str, Path], context: None) -> None:
    """And the base model's, also where there are more than a step may have."""
    layer = manager.modules["attn.qkv_proj"]
    numbers = load(manager, ["DoRA"], directories)
    manager.set_adapter_mapping(LoRAMapping((numbers["DoRA"],) * 3, (numbers["DoRA"],), is_prefill=True))
    for rows in (5, 70):
        x = torch.randn(rows, WIDTH)
        y, base = layer(x)[0], layer.base_layer(x)[0]
        assert (y[:3] - base[:3]).abs().max() > 0.1
        assert torch.equal(y[3:], base[3:])


def test_what_is_compiled_once_serves_whoever_comes(
    alone: VllmConfig, paged: None, directories: dict[str, Path], context: None
) -> None:
    manager = manager_of(alone)
    for path in PACKED:
        layer = manager.model.get_submodule(path)
        layer.forward = torch.compile(layer.forward, fullgraph=True)
    torch._dynamo.reset()
    check(manager, ["", "", "", ""], directories)  # 1 + 2 + 3 + 1 tokens
    with torch.compiler.set_stance("fail_on_recompile"):
        check(manager, ["LoRA", "", "DoRA", "VeRA"], directories)
        check(manager, ["DVoRA", "AdaLoRA", "", "SSF"], directories)
        check(manager, ["", "a bias of B", "a bias of its own", "partly"], directories)


def test_what_is_compiled_outside_of_a_step_serves_whoever_comes(
    alone: VllmConfig, paged: None, directories: dict[str, Path]
) -> None:
    """As an image model's tower is, before the first image."""
    manager = manager_of(alone)
    torch._dynamo.reset()
    for path in PACKED:
        layer = manager.model.get_submodule(path)
        layer.forward = torch.compile(layer.forward, fullgraph=True)
        layer(torch.randn(7, layer.base_layer.input_size))
    with torch.compiler.set_stance("fail_on_recompile"):
        check(manager, ["LoRA", "", "DoRA", "VeRA"], directories)
        check(manager, ["", "", "", ""], directories)


def test_no_name_of_a_layer_is_in_what_is_compiled(alone: VllmConfig, paged: None, context: None) -> None:
    """It is an input: layers of one kind are compiled once for all."""
    manager = manager_of(alone)
    graphs: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph.code)
        return graph.forward

    layer = manager.model.get_submodule("attn.o_proj")
    torch._dynamo.reset()
    torch.compile(layer.forward, fullgraph=True, backend=backend)(torch.randn(3, layer.base_layer.input_size))
    (code,) = graphs
    assert "fastadapt_update" in code
    assert layer.name not in code


def test_what_vllm_has_compiled_without_the_plugin_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seams, "replace", lambda *, paged: None)
    monkeypatch.setattr(envs, "environment_variables", dict(envs.environment_variables))
    monkeypatch.setenv(VARIABLE, "0")
    register()
    without = envs.compile_factors()
    monkeypatch.setenv(VARIABLE, "1")
    register()
    assert envs.compile_factors() == without | {VARIABLE: "1"}


def test_no_address_changes(manager: Any, directories: dict[str, Path], context: None) -> None:
    """A captured graph goes on reading what it read."""

    def addresses() -> list[int]:
        tables = [table for layer in manager.fast.values() for part in layer.slices for table in part.forms.tables]
        tokens = manager.modules["attn.qkv_proj"].punica_wrapper.tokens.of(7)[:-1]
        return [tensor.data_ptr() for tensor in (*tables, *tokens) if tensor is not None]

    before = addresses()
    check(manager, ["LoRA", "", "DoRA", "VeRA", "LoRA"], directories)
    check(manager, ["DVoRA", "SSF", "partly"], directories)
    manager.remove_all_adapters()
    assert addresses() == before


def test_a_rank_that_has_no_room_is_refused(manager: Any, directories: dict[str, Path], tmp_path: Path) -> None:
    save_adapter(inject(Plain(), LoRAConfig(r=65, target_modules=["k_proj"])), tmp_path)
    with pytest.raises(
        AdapterError, match=r"attn.k_proj: r must be at most 64, which is what slots have room for, got 65: start the"
    ):
        manager.read(1, str(tmp_path))


def test_the_adapters_of_the_warm_up_are_taken(manager: Any, directories: dict[str, Path], context: None) -> None:
    for number in range(1, manager.lora_slots + 1):
        manager.add_adapter(manager.create_dummy_lora(number, 8, {}))
        manager.activate_adapter(number)
    assert all(len(part.forms.forms) == manager.lora_slots for layer in manager.fast.values() for part in layer.slices)
    manager.remove_all_adapters()
    check(manager, ["DoRA", "", "LoRA"], directories)
