"""What is asked of a device, in this order: what matters most first, so that a run that ends early has that."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from bench.cases import SAVED_CASES, AdapterCase
from bench.gpu.ceilings import Ceilings
from bench.gpu.checks import DoctorCheck, GroupCheck
from bench.gpu.counters import Counters
from bench.gpu.job import Job
from bench.gpu.served import BatchTimes
from bench.gpu.timed import LayerTimes, PlainTimes
from bench.operators import LLAMA_8B, SMALL, SMOLLM2, Layers, OperatorCase
from fastadapt.commands.batch_case import captured_cases
from fastadapt.commands.case import Sizes
from fastadapt.commands.doctor import CASES

ODD = (*SMALL, Layers("odd", 200, (328, 136)))
GATE = Layers("gate", 4096, (14336,))
BY_NAME = {layers.name: layers for layers in LLAMA_8B}

PLAIN = [case for case in CASES if case.operator in ("hadamard_linear", "bottleneck", "adapter_update")]
ALONE = [case for case in PLAIN if not case.dropout]
ADAPTERS = [SAVED_CASES[name] for name in ("lora", "dora", "vera", "lora_dropout", "dora_dropout", "vera_dropout")]


def program(device_type: str) -> list[Job]:
    """The jobs of a GPU, or small ones of the same kinds."""
    return list(_gpu() if device_type == "cuda" else _cpu())


def step(adapter: AdapterCase, layers: Layers, tokens: int, dtype: str) -> LayerTimes:
    """Forward and backward. "fused" is for few tokens; who writes LoRA's backward by hand has no dropout."""
    asked = ["split", "library", "ours", *["ungrouped"] * (len(layers.out_features) > 1), "peft_fp32", "peft"]
    asked += ["unsloth"] * (adapter.name == "lora")
    return LayerTimes(OperatorCase("step", adapter, layers, tokens, dtype), (*asked, "linear"))


def forward(adapter: AdapterCase, layers: Layers, tokens: int, dtype: str) -> LayerTimes:
    """A few tokens in evaluation. VeRA's rank is too wide to be fused."""
    asked = [*["fused"] * (adapter.r <= 64), "split", "library", "ours"]
    asked += [*["ungrouped"] * (len(layers.out_features) > 1), "peft", "linear"]
    return LayerTimes(OperatorCase("forward", adapter, layers, tokens, dtype), tuple(asked))


def norm(layers: Layers, dtype: str) -> LayerTimes:
    """DoRA's row norms."""
    return LayerTimes(OperatorCase("weight_norm", SAVED_CASES["dora"], layers, 0, dtype), ("ours", "reference", "peft"))


def compiled(adapter: AdapterCase, layers: Layers, tokens: int, dtype: str) -> LayerTimes:
    """The formula through torch.compile, which takes longer than all else."""
    return LayerTimes(OperatorCase("step", adapter, layers, tokens, dtype), ("compile", "linear"))


def group_checks(dtype: str, groups: tuple[Layers, ...]) -> Iterator[GroupCheck]:
    """A layer and groups under every strategy, in evaluation and in training."""
    for layers, adapter in itertools.product(groups, ADAPTERS):
        yield GroupCheck(OperatorCase("step", adapter, layers, 300, dtype))
        if not adapter.dropout:
            # So few that "fused" is for them.
            yield GroupCheck(OperatorCase("forward", adapter, layers, 37, dtype))


def _gpu() -> Iterator[Job]:
    for case in (*CASES, *captured_cases()):
        yield DoctorCheck(case, "bf16")
    yield from group_checks("bf16", ODD)
    yield Ceilings(1 << 30, 8192)
    for tokens in (8192, 2048):
        for adapter, layers in itertools.product(ADAPTERS, LLAMA_8B):
            yield step(adapter, layers, tokens, "bf16")
    for adapter, tokens, layers in itertools.product(ADAPTERS[:3], (8, 1, 64), LLAMA_8B):
        yield forward(adapter, layers, tokens, "bf16")
    for adapters, layers in itertools.product((8, 64, 256), (BY_NAME["o"], GATE, BY_NAME["down"])):
        yield BatchTimes(layers, adapters, 1, 16, "bf16")
    for adapters in (8, 64):
        yield BatchTimes(BY_NAME["o"], adapters, 256, 16, "bf16")
    for layers in LLAMA_8B:
        yield norm(layers, "bf16")
    for plain in ALONE:
        sizes = Sizes(8192, 768, 768, 64) if plain.operator == "bottleneck" else Sizes(2048, 4096, 4096, 16)
        yield PlainTimes(plain, sizes, "bf16")
    yield Counters(OperatorCase("step", SAVED_CASES["lora"], BY_NAME["o"], 8192, "bf16"))
    for case, dtype in itertools.product(CASES, ("fp16", "fp32")):
        yield DoctorCheck(case, dtype)
    for dtype in ("fp16", "fp32"):
        yield from group_checks(dtype, ODD[:1])
    for adapter, name in itertools.product(ADAPTERS[:3], ("qkv", "down")):
        yield compiled(adapter, BY_NAME[name], 8192, "bf16")


def _cpu() -> Iterator[Job]:
    for case in (*CASES, *captured_cases()):
        yield DoctorCheck(case, "fp32")
    yield from group_checks("bf16", SMALL)
    yield Ceilings(1 << 25, 512)
    for adapter, layers in itertools.product(ADAPTERS, SMALL):
        yield step(adapter, layers, 64, "fp32")
    for adapter, tokens in itertools.product(ADAPTERS[:3], (8, 1)):
        yield forward(adapter, SMALL[0], tokens, "fp32")
    for adapters in (3, 5):
        yield BatchTimes(SMALL[1], adapters, 1, 16, "fp32")
    yield BatchTimes(SMALL[1], 3, 32, 16, "fp32")
    yield norm(SMALL[0], "fp32")
    for plain in ALONE:
        yield PlainTimes(plain, Sizes(64, 96, 80, 16), "fp32")
    yield Counters(OperatorCase("step", SAVED_CASES["lora"], SMALL[1], 64, "fp32"))
    for layers in SMOLLM2[:2]:
        yield step(SAVED_CASES["lora"], layers, 512, "fp32")
    yield compiled(SAVED_CASES["lora"], SMALL[0], 64, "fp32")
