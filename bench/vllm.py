"""Inside vLLM: its linear layers with its own LoRA and with fastadapt's adapters, beside the same layers without any.

To be run by the interpreter of vLLM's environment (tests/in_vllm/environment.py). The packed linear layers of decoder
blocks (q with k and v, o, gate with up, down; by default SmolLM2-135M's sizes) are called one after the other in one
process, without attention, scheduler or sampling: what an engine adds is the same for all. A round times every variant
once, in a shuffled order; ratios are to the layers without adapters of the same round.

* one, eight: LoRA of rank 16 on all seven projections, of every token or token by token of eight adapters;
* mixed: four LoRA, two DoRA and two VeRA of rank 256, which vLLM refuses;
* decode: one token of each of eight rows, whose order changes at each step, as it does when rows come and go;
  prefill: 64 tokens each.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, ClassVar, NamedTuple

import torch
import typer
from torch import nn

from bench import measure, report
from fastadapt.commands.report import write_json
from fastadapt.reference import AdapterForm

ROWS, PROMPT, RANK, VERA_RANK = 8, 64, 16, 256
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# So many decoding steps make one timing.
STEPS = 8


class Sizes(NamedTuple):
    """SmolLM2-135M's."""

    hidden: int = 576
    head: int = 64
    heads: int = 9
    keys: int = 3
    inner: int = 1536


@contextmanager
def engine_process(lora_config: Any) -> Iterator[Any]:
    """vLLM's settings and process groups, for one process, with the plugin on."""
    from vllm.config import DeviceConfig, VllmConfig, set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel

    from fastadapt.integrations.vllm import register

    config = VllmConfig(device_config=DeviceConfig("cpu"))
    config.lora_config = lora_config
    with tempfile.TemporaryDirectory() as scratch, set_current_vllm_config(config):
        init_distributed_environment(1, 0, f"file://{scratch}/store", 0, backend="gloo")
        initialize_model_parallel(1, 1)
        register()
        yield config


class Layers(nn.Module):
    """Blocks of linear layers, with what vLLM's managers ask of a model."""

    config = None
    packed_modules_mapping: ClassVar = {
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList()

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError("there are no embeddings")


def packed_layers(blocks: int, sizes: Sizes, dtype: torch.dtype) -> Any:
    """The linear layers of so many decoder blocks, as vLLM has them, with weights and no bias."""
    from vllm.model_executor.layers.linear import MergedColumnParallelLinear, QKVParallelLinear, RowParallelLinear

    model: Any = Layers()
    hidden, head, heads, keys, inner = sizes
    for number in range(blocks):
        fields: dict[str, Any] = {"bias": False, "params_dtype": dtype}
        block: Any = nn.Module()
        block.qkv_proj = QKVParallelLinear(hidden, head, heads, keys, prefix=f"{number}.qkv", **fields)
        block.o_proj = RowParallelLinear(heads * head, hidden, prefix=f"{number}.o", **fields)
        block.gate_up_proj = MergedColumnParallelLinear(hidden, [inner, inner], prefix=f"{number}.gu", **fields)
        block.down_proj = RowParallelLinear(inner, hidden, prefix=f"{number}.d", **fields)
        for layer in block.children():
            with torch.no_grad():
                layer.weight.normal_(std=0.02)
            layer.quant_method.process_weights_after_loading(layer)
        model.blocks.append(block)
    return model


def managed(model: Any, config: Any, *, ours: bool) -> Any:
    """The model's manager, which has wrapped its layers in vLLM's own or in fastadapt's."""
    from vllm.lora import utils
    from vllm.lora.model_manager import LRUCacheLoRAModelManager

    from fastadapt.integrations.vllm.layers import FastLinear
    from fastadapt.integrations.vllm.model_manager import FastModelManager

    everything = utils._all_lora_classes
    if not ours:
        utils._all_lora_classes = tuple(kind for kind in everything if not issubclass(kind, FastLinear))
    try:
        kind = FastModelManager if ours else LRUCacheLoRAModelManager
        return kind(
            model,
            max_num_seqs=ROWS,
            max_num_batched_tokens=ROWS * PROMPT,
            vocab_size=100,
            lora_config=config.lora_config,
            device=torch.device("cpu"),
            vllm_config=config,
        )
    finally:
        utils._all_lora_classes = everything


def load(manager: Any, methods: list[str]) -> None:
    """Adapters 1, 2, ... of these methods in the slots."""
    pair = None
    for number, method in enumerate(methods, 1):
        adapter = manager.create_dummy_lora(number, RANK, {})
        for weights in adapter.loras.values():
            for side in (weights.lora_a, weights.lora_b):
                for factor in side if isinstance(side, list) else [side]:
                    factor.normal_(std=0.02)
        manager.add_adapter(adapter)
        manager.activate_adapter(number)
        if method == "lora":
            continue
        layers = list(manager.fast.values())
        if pair is None:
            k, n = (max([part.stacks.shape[side] for layer in layers for part in layer.slices]) for side in (1, 0))
            pair = manager._pairs.of(0.02 * torch.randn(VERA_RANK, k), 0.02 * torch.randn(n, VERA_RANK))
        for layer in layers:
            layer.set_lora(number - 1, [_form(method, part.stacks.shape, pair) for part in layer.slices], None)


def _form(method: str, shape: tuple[int, int], pair: Any) -> AdapterForm:
    n, k = shape
    if method == "dora":
        g = 1 + 0.01 * torch.randn(n)
        return AdapterForm(0.02 * torch.randn(RANK, k), 0.02 * torch.randn(n, RANK), out_scale=g, base_scale=g)
    d, h = torch.randn(VERA_RANK), torch.randn(n)
    return AdapterForm(pair.A[:, :k], pair.B[:n], mid_scale=d, out_scale=h)


def runner(model: Any, manager: Any, names: list[int], tokens: int, dtype: torch.dtype) -> Callable[[], None]:
    """Steps through all layers in which row i has `tokens` tokens of adapter names[i], in an order that changes."""
    from vllm.lora.layers import LoRAMapping

    layers = [layer for block in model.blocks for layer in block.children()]
    inputs = {width: torch.randn(ROWS * tokens, width, dtype=dtype) for width in {one.input_size for one in layers}}
    turn = 0

    def run() -> None:
        nonlocal turn
        for _ in range(STEPS if tokens == 1 else 1):
            turn += 1
            if manager is not None:
                order = names[turn % ROWS :] + names[: turn % ROWS]
                ids = tuple(name for name in order for _ in range(tokens))
                manager.set_adapter_mapping(LoRAMapping(ids, tuple(order), is_prefill=True))
            with torch.inference_mode():
                for layer in layers:
                    layer(inputs[layer.input_size])

    return run


def case(dtype_name: str, phase: str, adapters: str, blocks: int, rounds: int, config: Any) -> report.Row:
    """One row: the ratios of both to the layers without adapters."""
    dtype, tokens = DTYPES[dtype_name], 1 if phase == "decode" else PROMPT
    config.lora_config.lora_dtype = dtype
    methods = ["lora"] * ROWS if adapters != "mixed" else ["lora"] * 4 + ["dora"] * 2 + ["vera"] * 2
    names = [1] * ROWS if adapters == "one" else list(range(1, ROWS + 1))
    variants: dict[str, Callable[[], object]] = {}
    sizes = Sizes()
    for side in ("base", "base, second", "ours", "vllm"):
        if side == "vllm" and adapters == "mixed":
            continue
        torch.manual_seed(0)
        model = packed_layers(blocks, sizes, dtype)
        manager = None
        if not side.startswith("base"):
            manager = managed(model, config, ours=side == "ours")
            load(manager, methods)
        variants[side] = runner(model, manager, names, tokens, dtype)
    results = measure.interleave(variants, rounds)
    row: report.Row = {"case": f"{dtype_name} {phase}, {adapters}"}
    for side in ("ours", "vllm"):
        if side in variants:
            wall, cpu = measure.compare(results, side, ("base", "base, second"))
            row |= {side: wall.median, f"{side}_low": wall.low, f"{side}_high": wall.high, f"{side}_cpu": cpu.median}
    return row


def main(
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the rows there.")] = None,
    rounds: Annotated[int, typer.Option(help="Rounds of each case.")] = 10,
    blocks: Annotated[int, typer.Option(help="Decoder blocks; 30 is SmolLM2-135M.")] = 30,
    dtypes: Annotated[str, typer.Option(help="Of these, separated by commas.")] = "fp32,bf16",
) -> None:
    """vLLM's linear layers with its own LoRA and with fastadapt's, beside the same layers without adapters."""
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    try:
        from vllm.config.lora import LoRAConfig
    except ImportError as error:
        cure = "run it with the interpreter that tests/in_vllm/environment.py makes"
        raise typer.BadParameter(f"{error}: {cure}") from None
    torch.set_num_threads(1)
    settings = LoRAConfig(max_loras=ROWS, max_lora_rank=RANK, lora_dtype=torch.float32)
    rows = []
    with engine_process(settings) as config:
        for name in dtypes.split(","):
            for phase in ("decode", "prefill"):
                for adapters in ("one", "eight", "mixed"):
                    rows.append(case(name, phase, adapters, blocks, rounds, config))
                    if json_file is not None:
                        write_json(json_file, "vllm", rows, blocks=blocks, rounds=rounds)
    columns = {"case": "case", "ours": "fastadapt", "ours_cpu": "its CPU time", "vllm": "vLLM"}
    columns["vllm_cpu"] = "its CPU time"
    report.print_table(f"x {blocks} blocks of vLLM's layers without adapters", rows, columns)
