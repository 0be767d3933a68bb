"""Layers as an engine packs and shares them out, beside those that adapters are trained on; and what is expected."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tiny_served  # noqa: F401  (sets the environment)
import torch
from torch import Tensor, nn
from vllm.config import DeviceConfig, VllmConfig, set_current_vllm_config
from vllm.config.lora import LoRAConfig as EngineConfig
from vllm.distributed import (
    destroy_distributed_environment,
    destroy_model_parallel,
    init_distributed_environment,
    initialize_model_parallel,
)
from vllm.lora.layers import LoRAMapping
from vllm.model_executor.layers.linear import MergedColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from vllm.model_executor.models import SupportsLoRA
from vllm.model_executor.models.utils import PPMissingLayer

from fastadapt import AdaLoRAConfig, DoRAConfig, LoRAConfig, SSFConfig, VeRAConfig, inject, save_adapter
from fastadapt.integrations.vllm import register
from fastadapt.methods import AdapterConfig
from fastadapt.reference import adapter_linear_reference
from fastadapt.serving import read_adapter

# Processes that are forked cannot use the threads of the one before.
torch.set_num_threads(1)

WIDTH, HEAD, HEADS, KEYS, INNER, SLOTS = 48, 8, 8, 2, 80, 3
NAMES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PACKED = {
    "attn.qkv_proj": NAMES[:3],
    "attn.o_proj": NAMES[3:4],
    "mlp.gate_up_proj": NAMES[4:6],
    "mlp.down_proj": NAMES[6:],
}
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


class Packed(nn.Module, SupportsLoRA):
    """The same layers as an engine has them."""

    config = None
    embedding_modules: dict[str, str] = {}  # noqa: RUF012
    packed_modules_mapping = {"qkv_proj": NAMES[:3], "gate_up_proj": NAMES[4:6]}  # noqa: RUF012

    def __init__(self, plain: Plain, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.attn, self.mlp = nn.Module(), nn.Module()
        self.attn.qkv_proj = QKVParallelLinear(WIDTH, HEAD, HEADS, KEYS, params_dtype=dtype, prefix="a.qkv")
        self.attn.o_proj = RowParallelLinear(HEADS * HEAD, WIDTH, params_dtype=dtype, prefix="a.o")
        self.mlp.gate_up_proj = MergedColumnParallelLinear(
            WIDTH, [INNER, INNER], bias=False, params_dtype=dtype, prefix="m.gu"
        )
        self.mlp.down_proj = RowParallelLinear(INNER, WIDTH, params_dtype=dtype, prefix="m.d")
        for path, names in PACKED.items():
            layer, room = self.get_submodule(path), plain.get_submodule(path.partition(".")[0])
            for number, name in enumerate(names):
                # What vLLM calls the parts of a packed layer.
                which = () if len(names) == 1 else (name[0],) if len(names) == 3 else (number,)
                own = room.get_submodule(name)
                layer.weight_loader(layer.weight, own.weight.detach(), *which)
                if layer.bias is not None:
                    layer.weight_loader(layer.bias, own.bias.detach(), *which)
            layer.quant_method.process_weights_after_loading(layer)  # where a CPU's kernel takes the weight away


class Stage(nn.Module, SupportsLoRA):
    """Of a model of several blocks those that one stage of a pipeline has."""

    config = None
    embedding_modules: dict[str, str] = {}  # noqa: RUF012
    packed_modules_mapping = Packed.packed_modules_mapping

    def __init__(self, plains: nn.ModuleList, here: set[int]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            Packed(plain) if place in here else PPMissingLayer()  # type: ignore[arg-type]
            for place, plain in enumerate(plains)
        )


@contextmanager
def process_group(rank: int, processes: int, store: Path) -> Iterator[VllmConfig]:
    """This process as one of an engine's, with settings of its own inside."""
    # Of another name in each process: then vLLM takes no shared memory, which nobody would give back.
    os.environ["VLLM_DIST_IDENT"] = f"{store.name} of {rank}"
    config = VllmConfig(device_config=DeviceConfig("cpu"))
    with set_current_vllm_config(config):
        init_distributed_environment(processes, rank, f"file://{store}", rank, backend="gloo")
        initialize_model_parallel(processes, 1)
        yield config
        destroy_model_parallel()
        destroy_distributed_environment()


@contextmanager
def engine_process(rank: int, processes: int, store: Path) -> Iterator[VllmConfig]:
    """The same with room for adapters and the plugin on."""
    with process_group(rank, processes, store) as config:
        config.lora_config = EngineConfig(
            max_loras=SLOTS, max_lora_rank=8, max_cpu_loras=len(METHODS), lora_dtype=torch.float32
        )
        register()
        yield config


def manager_of(config: VllmConfig, dtype: torch.dtype = torch.float32, model: nn.Module | None = None) -> Any:
    from fastadapt.integrations.vllm.model_manager import FastModelManager

    return FastModelManager(
        Packed(Plain(), dtype) if model is None else model,
        max_num_seqs=16,
        max_num_batched_tokens=64,
        vocab_size=100,
        lora_config=config.lora_config,
        device=torch.device("cpu"),
        vllm_config=config,
    )


def save_adapters(root: Path) -> dict[str, Path]:
    """One of each method that does something, by its name."""
    found = {}
    for name, config in METHODS.items():
        model = inject(Plain(), config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter), alpha=0.3)
        found[name] = root / name
        save_adapter(model, found[name])
    return found


def expected(path: str, rows: list[tuple[str, Tensor]], directories: dict[str, Path]) -> list[Tensor]:
    """What the layers that are packed in this one give for each token by itself, in fp64."""
    plain, room = Plain(), path.partition(".")[0]
    forms = {name: read_adapter(plain, directories[name]).forms for name, _ in rows if name}
    outputs = []
    for own in PACKED[path]:
        layer, ys = plain.get_submodule(f"{room}.{own}").double(), []
        for name, x in rows:
            form = forms[name].get(f"{room}.{own}") if name else None
            if form is None:
                ys.append(layer(x.double()))
                continue
            wide = {k: v.double() for k, v in form._asdict().items() if isinstance(v, Tensor)}
            ys.append(adapter_linear_reference(x.double(), layer.weight, form._replace(**wide)))
        outputs.append(torch.stack(ys).detach())
    return outputs


def load(manager: Any, names: list[str], directories: dict[str, Path]) -> dict[str, int]:
    """Reads and activates them; the number of each."""
    numbers = {name: 1 + list(METHODS).index(name) for name in names if name}
    for name, number in numbers.items():
        manager.add_adapter(manager.read(number, str(directories[name])))
        manager.activate_adapter(number)
    return numbers | {"": 0}


def check(manager: Any, names: list[str], directories: dict[str, Path]) -> None:
    """A ragged batch through every layer: runs of several tokens, single ones, the base model's between them."""
    numbers = load(manager, sorted(set(names)), directories)
    tokens = [name for row, name in enumerate(names) for _ in range(1 + row % 3)]
    ids = tuple(numbers[name] for name in tokens)
    manager.set_adapter_mapping(LoRAMapping(ids, tuple(numbers[name] for name in names), is_prefill=True))
    for path in PACKED:
        layer = manager.model.get_submodule(path)
        torch.manual_seed(len(tokens))  # the same in every process
        x = torch.randn(len(tokens), layer.base_layer.input_size).to(layer.base_layer.params_dtype)
        y, _ = layer(x[:, layer.slices[0].shard.columns])
        for part, exact in zip(
            layer.slices, expected(path, list(zip(tokens, x, strict=True)), directories), strict=True
        ):
            actual, exact = y[:, part.start : part.stop].double(), exact[:, part.shard.rows]
            # Of 16-bit layers the weights, the norms' products and y are rounded.
            tolerance = 1e-4 if x.dtype == torch.float32 else 8 * torch.finfo(x.dtype).eps
            torch.testing.assert_close(actual, exact, rtol=tolerance, atol=tolerance * exact.abs().max().item())
