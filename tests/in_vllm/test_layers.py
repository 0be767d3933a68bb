"""Packed layers without an engine: their manager, slots and forms against the formula, one layer at a time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm.lora", reason="vLLM has an environment of its own: tests/in_vllm/environment.py")

import tiny_served  # noqa: F401  (sets the environment)
import torch
from torch import Tensor, nn
from vllm.config import DeviceConfig, VllmConfig, set_current_vllm_config
from vllm.config.lora import LoRAConfig as EngineConfig
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.lora.layers import LoRAMapping
from vllm.model_executor.layers.linear import MergedColumnParallelLinear, QKVParallelLinear, RowParallelLinear

from fastadapt import AdaLoRAConfig, DoRAConfig, LoRAConfig, SSFConfig, VeRAConfig, inject, save_adapter
from fastadapt.integrations.vllm import register
from fastadapt.methods import AdapterConfig
from fastadapt.reference import adapter_linear_reference
from fastadapt.serving import AdapterError, read_adapter

WIDTH, HEAD, HEADS, KEYS, INNER, SLOTS = 48, 8, 6, 2, 80, 3
NAMES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
METHODS: dict[str, AdapterConfig] = {
    "LoRA": LoRAConfig(r=3, target_modules=NAMES),
    "partly": LoRAConfig(r=40, target_modules=["k_proj", "up_proj"]),
    "a bias of B": LoRAConfig(r=3, lora_bias=True, target_modules=NAMES),
    "a bias of its own": LoRAConfig(r=3, bias="lora_only", target_modules=NAMES),
    "DoRA": DoRAConfig(r=3, target_modules=NAMES),
    "DoRA, partly": DoRAConfig(r=3, target_modules=["v_proj"]),
    "VeRA": VeRAConfig(r=32, target_modules=NAMES),
    "DVoRA": VeRAConfig(r=32, use_dora=True, target_modules=NAMES),
    "AdaLoRA": AdaLoRAConfig(init_r=4, target_r=2, total_step=10, target_modules=NAMES),
    "SSF": SSFConfig(target_modules=NAMES),
}


class Plain(nn.Module):
    """What adapters are trained on."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.attn, self.mlp = nn.Module(), nn.Module()
        for name, heads in (("q_proj", HEADS), ("k_proj", KEYS), ("v_proj", KEYS)):
            self.attn.add_module(name, nn.Linear(WIDTH, heads * HEAD))
        self.attn.o_proj = nn.Linear(HEADS * HEAD, WIDTH)
        self.mlp.gate_proj, self.mlp.up_proj = (nn.Linear(WIDTH, INNER, bias=False) for _ in range(2))
        self.mlp.down_proj = nn.Linear(INNER, WIDTH)


class Packed(nn.Module):
    """The same layers as an engine has them."""

    supports_lora, config = True, None
    embedding_modules: dict[str, str] = {}  # noqa: RUF012
    packed_modules_mapping = {"qkv_proj": NAMES[:3], "gate_up_proj": NAMES[4:6]}  # noqa: RUF012

    def __init__(self, plain: Plain) -> None:
        super().__init__()
        self.attn, self.mlp = nn.Module(), nn.Module()
        self.attn.qkv_proj = QKVParallelLinear(WIDTH, HEAD, HEADS, KEYS, params_dtype=torch.float32, prefix="a.qkv")
        self.attn.o_proj = RowParallelLinear(HEADS * HEAD, WIDTH, params_dtype=torch.float32, prefix="a.o")
        self.mlp.gate_up_proj = MergedColumnParallelLinear(
            WIDTH, [INNER, INNER], bias=False, params_dtype=torch.float32, prefix="m.gu"
        )
        self.mlp.down_proj = RowParallelLinear(INNER, WIDTH, params_dtype=torch.float32, prefix="m.d")
        parts = {"attn.qkv_proj": NAMES[:3], "attn.o_proj": NAMES[3:4], "mlp.gate_up_proj": NAMES[4:6]}
        for path, names in (parts | {"mlp.down_proj": NAMES[6:]}).items():
            layer, room = self.get_submodule(path), plain.get_submodule(path.partition(".")[0])
            ours = [room.get_submodule(name) for name in names]
            with torch.no_grad():
                layer.weight.copy_(torch.cat([one.weight for one in ours]))
                if layer.bias is not None:
                    layer.bias.copy_(torch.cat([one.bias for one in ours]))
            layer.quant_method.process_weights_after_loading(layer)  # where a CPU's kernel takes the weight away


@pytest.fixture(scope="module", autouse=True)
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmConfig]:
    """One process, as vLLM starts it."""
    config = VllmConfig(device_config=DeviceConfig("cpu"))
    config.lora_config = EngineConfig(
        max_loras=SLOTS, max_lora_rank=8, max_cpu_loras=len(METHODS), lora_dtype=torch.float32
    )
    with set_current_vllm_config(config):
        init_distributed_environment(1, 0, f"file://{tmp_path_factory.mktemp('store') / 'it'}", 0, backend="gloo")
        initialize_model_parallel(1, 1)
        register()
        yield config


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root, found = tmp_path_factory.mktemp("adapters"), {}
    for name, config in METHODS.items():
        model = inject(Plain(), config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter), alpha=0.3)
        found[name] = root / name
        save_adapter(model, found[name])
    return found


@pytest.fixture
def manager(alone: VllmConfig) -> Any:
    from fastadapt.integrations.vllm.model_manager import FastModelManager

    return FastModelManager(
        Packed(Plain()),
        max_num_seqs=16,
        max_num_batched_tokens=64,
        vocab_size=100,
        lora_config=alone.lora_config,
        device=torch.device("cpu"),
        vllm_config=alone,
    )


PACKED = {"attn.qkv_proj": NAMES[:3], "attn.o_proj": NAMES[3:4], "mlp.gate_up_proj": NAMES[4:6]}
PACKED["mlp.down_proj"] = NAMES[6:]


def expected(path: str, rows: list[tuple[str, Tensor]], directories: dict[str, Path]) -> Tensor:
    """Each token by itself, in fp64: through the layers of the model that adapters are trained on."""
    plain, room = Plain(), path.partition(".")[0]
    forms = {name: read_adapter(plain, directories[name]).forms for name, _ in rows if name}
    outputs = []
    for name, x in rows:
        ys = []
        for own in PACKED[path]:
            layer = plain.get_submodule(f"{room}.{own}").double()
            form = forms[name].get(f"{room}.{own}") if name else None
            if form is None:
                ys.append(layer(x.double()))
                continue
            wide = {k: v.double() for k, v in form._asdict().items() if isinstance(v, Tensor)}
            ys.append(adapter_linear_reference(x.double(), layer.weight, form._replace(**wide)))
        outputs.append(torch.cat(ys))
    return torch.stack(outputs).detach()


def load(manager: Any, names: list[str], directories: dict[str, Path]) -> dict[str, int]:
    """Reads and activates them; the number of each."""
    numbers = {name: 1 + list(METHODS).index(name) for name in names if name}
    for name, number in numbers.items():
        manager.add_adapter(manager.read(number, str(directories[name])))
        manager.activate_adapter(number)
    return numbers | {"": 0}


def check(manager: Any, names: list[str], directories: dict[str, Path]) -> None:
    """A ragged batch: runs of several tokens, single ones, the base model's between them."""
    numbers = load(manager, sorted(set(names)), directories)
    tokens = [name for row, name in enumerate(names) for _ in range(1 + row % 3)]
    ids = tuple(numbers[name] for name in tokens)
    manager.set_adapter_mapping(LoRAMapping(ids, tuple(numbers[name] for name in names), is_prefill=True))
    for path in PACKED:
        layer = manager.model.get_submodule(path)
        x = torch.randn(len(tokens), layer.input_size)
        y, _ = layer(x)
        exact = expected(path, list(zip(tokens, x, strict=True)), directories)
        torch.testing.assert_close(y.double(), exact, rtol=1e-4, atol=1e-4 * exact.abs().max().item())


@pytest.mark.parametrize("name", METHODS)
def test_each_method_beside_base_rows(name: str, manager: Any, directories: dict[str, Path]) -> None:
    check(manager, ["", name, name, ""], directories)


def test_methods_beside_each_other_in_slots_that_change_hands(manager: Any, directories: dict[str, Path]) -> None:
    check(manager, ["LoRA", "", "DoRA", "VeRA", "LoRA"], directories)
    check(manager, ["DVoRA", "AdaLoRA", ""], directories)
    check(manager, ["partly", "SSF", "VeRA", ""], directories)
    check(manager, ["DoRA, partly", "a bias of B", "a bias of its own"], directories)


def test_slots_of_nobody_hold_nothing(manager: Any, directories: dict[str, Path]) -> None:
    numbers = load(manager, ["LoRA", "DoRA"], directories)
    layers = [module for module in manager.modules.values() for part in module.slices if part.stacks.bytes]
    assert len(layers) == 7
    manager.remove_adapter(numbers["LoRA"])
    manager.remove_all_adapters()
    assert not any(part.stacks.bytes for module in manager.modules.values() for part in module.slices)


def test_adapters_of_one_key_share_their_pair(manager: Any, directories: dict[str, Path]) -> None:
    first, second = (manager.read(number, str(directories["VeRA"])) for number in (1, 2))
    assert first.pair is second.pair
    A, B = first.pair.A, first.pair.B
    for forms in first.loras.values():
        for form in forms.lora_a:
            assert form.A.untyped_storage().data_ptr() == A.untyped_storage().data_ptr()
            assert form.B.untyped_storage().data_ptr() == B.untyped_storage().data_ptr()


def test_what_is_wrong_with_an_adapter_is_said(manager: Any, directories: dict[str, Path], tmp_path: Path) -> None:
    wider = nn.ModuleDict({"attn": nn.ModuleDict({"q_proj": nn.Linear(WIDTH + 1, 9)})})
    save_adapter(inject(wider, LoRAConfig(r=2, target_modules=["q_proj"])), tmp_path)
    with pytest.raises(AdapterError, match=r"lora_A.weight must have shape \(2, 48\) for this config and model"):
        manager.read(1, str(tmp_path))


def test_a_second_registration_changes_nothing() -> None:
    from vllm.lora import utils

    before = utils._all_lora_classes
    register()
    assert utils._all_lora_classes is before
