"""torch.compile: one graph for inputs of all lengths, forward and backward, and no more breaks than PEFT's layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from tiny_models import llama, randomise, tokens
from torch import Tensor, nn
from torch._dynamo.utils import counters

import fastadapt
from fastadapt.methods import AdapterConfig

# The first is compiled as it is; torch makes a second graph, for all sizes, when it meets the next.
GRAPHS = 2
LENGTHS = (5, 33, 64, 100, 257, 700, 1500)
TARGETS = ["q_proj", "k_proj", "v_proj"]

CONFIGS: dict[str, Callable[[], AdapterConfig]] = {
    "LoRA": lambda: fastadapt.LoRAConfig(r=4, target_modules=TARGETS),
    "LoRA, dropout": lambda: fastadapt.LoRAConfig(r=4, lora_dropout=0.1, target_modules=TARGETS),
    "LoRA-FA": lambda: fastadapt.LoRAConfig(r=4, freeze_A=True, target_modules=TARGETS),
    "Delta-LoRA": lambda: fastadapt.DeltaLoRAConfig(r=4, anchored=True, target_modules=TARGETS),
    "DoRA": lambda: fastadapt.DoRAConfig(r=4, target_modules=TARGETS),
    "DoRA, dropout": lambda: fastadapt.DoRAConfig(r=4, lora_dropout=0.1, target_modules=TARGETS),
    "VeRA": lambda: fastadapt.VeRAConfig(r=16, target_modules=TARGETS),
    "AdaLoRA": lambda: fastadapt.AdaLoRAConfig(init_r=6, target_r=4, total_step=20, target_modules=TARGETS),
    "HiRA": lambda: fastadapt.HiRAConfig(r=4, target_modules=TARGETS),
    "SSF": lambda: fastadapt.SSFConfig(target_modules=TARGETS),
    "RepAdapter": lambda: fastadapt.RepAdapterConfig(r=4, adapter_dropout=0.0, target_modules=TARGETS),
    "GLoRA": lambda: fastadapt.GLoRAConfig(r=3, target_modules=TARGETS),
}


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()
    counters.clear()


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(24, 16), nn.Linear(24, 8), nn.Linear(24, 16, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], -1)


def adapted(model: Any, config: AdapterConfig) -> Any:
    fastadapt.inject(model, config)
    randomise([p for p in model.parameters() if p.requires_grad])
    return model


PEFT_CONFIGS: dict[str, Callable[[float], Any]] = {
    "LoRA": lambda p: peft.LoraConfig(r=4, lora_alpha=6, lora_dropout=p, target_modules=TARGETS),
    "DoRA": lambda p: peft.LoraConfig(r=4, use_dora=True, lora_dropout=p, target_modules=TARGETS),
    "VeRA": lambda p: peft.VeraConfig(r=16, vera_dropout=p, target_modules=TARGETS),
}


def of_peft(model: Any, config: Any, accelerated: bool) -> Any:
    wrapped = peft.get_peft_model(model, config)
    randomise([p for p in wrapped.parameters() if p.requires_grad])
    if accelerated:
        assert not fastadapt.accelerate_peft(wrapped).left
    return wrapped


def graphs(
    model: nn.Module,
    backend: Any = "aot_eager",
    dtype: torch.dtype | None = None,
    marked: bool = False,
    **options: Any,
) -> int:
    """How many graphs are made for forward and backward over all lengths; marked: told that these differ."""
    compiled = torch.compile(model, fullgraph=True, backend=backend, **options)
    for length in LENGTHS:
        x = torch.randn(2, length, 24, requires_grad=True)
        if marked:
            torch._dynamo.mark_dynamic(x, 1)
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            y = compiled(x)
        y.float().square().sum().backward()
        assert x.grad is not None
    assert not counters["graph_break"]
    return int(counters["stats"]["unique_graphs"])


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["fp32", "autocast"])
@pytest.mark.parametrize("name", CONFIGS)
def test_one_graph_serves_all_lengths(name: str, dtype: torch.dtype | None) -> None:
    assert graphs(adapted(Attention(), CONFIGS[name]()).train(), dtype=dtype) == GRAPHS


@pytest.mark.parametrize(
    ("name", "told"),
    [*[(name, {"dynamic": True}) for name in CONFIGS], *[(name, {"marked": True}) for name in ("LoRA", "DoRA")]],
)
def test_told_that_lengths_differ_one_graph_is_all(name: str, told: dict[str, Any]) -> None:
    """GRAPHS are two for torch's own sake: the first length that it meets is a constant to it until the next comes."""
    assert graphs(adapted(Attention(), CONFIGS[name]()).train(), **told) == 1


@pytest.mark.parametrize("told", [{}, {"dynamic": True}], ids=["", "dynamic"])
@pytest.mark.parametrize("name", PEFT_CONFIGS)
def test_accelerated_layers_are_one_graph_as_well(name: str, told: dict[str, Any]) -> None:
    """PEFT's own DoRA breaks the graph."""
    model = of_peft(Attention(), PEFT_CONFIGS[name](0.1), accelerated=True).train()
    assert graphs(model, **told) == (1 if told else GRAPHS)


def breaks(model: Any) -> int:
    """How often the graph of a checkpointed language model's loss breaks."""
    torch._dynamo.reset()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    ids = tokens()
    found: int = torch._dynamo.explain(model.train())(input_ids=ids, labels=ids, use_cache=False).graph_break_count
    return found


@pytest.mark.filterwarnings("ignore")  # what tracing meets in transformers
def test_checkpointing_breaks_no_graph_that_pefts_layers_leave_whole() -> None:
    """Both breaks are at the hook that makes the checkpoints' inputs require grad, which is the model's."""
    theirs = breaks(of_peft(llama(), PEFT_CONFIGS["LoRA"](0.0), accelerated=False))
    assert breaks(adapted(llama(), CONFIGS["LoRA"]())) <= theirs
    for name in ("LoRA", "DoRA"):
        assert breaks(of_peft(llama(), PEFT_CONFIGS[name](0.0), accelerated=True)) <= theirs


@pytest.mark.parametrize("strategy", ["library", "recompose"])
def test_a_strategy_by_name_is_one_graph_as_well(strategy: str) -> None:
    model = fastadapt.inject(Attention(), CONFIGS["LoRA-FA"](), strategy=strategy)
    assert graphs(model.train()) == GRAPHS


def test_peft_needs_as_many() -> None:
    model = peft.get_peft_model(Attention(), peft.LoraConfig(r=4, target_modules=TARGETS))
    assert graphs(model.train()) == GRAPHS


@pytest.mark.parametrize("name", CONFIGS)
def test_nothing_in_a_graph_waits_for_a_value(name: str) -> None:
    """What asks a GPU for a number, or for the size of a result, makes the host wait."""
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    called: set[str] = set()

    def note(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        called.update(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return make_boxed_func(graph.forward)

    graphs(adapted(Attention(), CONFIGS[name]()).train(), backend=aot_autograd(fw_compiler=note, bw_compiler=note))
    assert any(name.startswith("fastadapt.") for name in called)
    waits = ("_local_scalar_dense", "nonzero", "masked_select", "unique")
    assert [name for name in called if any(word in name for word in waits)] == []
