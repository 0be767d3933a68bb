"""The table of methods: every config by the `peft_type` that its files carry.

A new linear method is one file beside these (its config, its parameters and their start, its `form`) and one line here.
"""

from __future__ import annotations

from .adalora import AdaLoRAConfig
from .adaptformer import AdaptFormerConfig
from .config import AdapterConfig, Control
from .delta_lora import DeltaLoRAConfig
from .glora import GLoRAConfig
from .hira import HiRAConfig
from .lora import DoRAConfig, EVAConfig, LoRAConfig
from .lora_drop import LoRADropConfig
from .noah import NOAHConfig
from .repadapter import RepAdapterConfig
from .ssf import SSFConfig
from .vera import VeRAConfig
from .vpt import VPTConfig

METHODS: dict[str, type[AdapterConfig]] = {
    "LORA": LoRAConfig,
    "LORA_DROP": LoRADropConfig,
    "DELTA_LORA": DeltaLoRAConfig,
    "VERA": VeRAConfig,
    "DVORA": VeRAConfig,
    "ADALORA": AdaLoRAConfig,
    "GLORA": GLoRAConfig,
    "GLORA_MIXED": GLoRAConfig,
    "HIRA": HiRAConfig,
    "SSF": SSFConfig,
    "REPADAPTER": RepAdapterConfig,
    "ADAPTFORMER": AdaptFormerConfig,
    "VPT": VPTConfig,
    "NOAH": NOAHConfig,
}

# Those that PEFT has too: it reads their directories.
PEFT_TYPES = ("LORA", "VERA", "ADALORA", "GLORA", "HIRA")

__all__ = [
    "METHODS",
    "PEFT_TYPES",
    "AdaLoRAConfig",
    "AdaptFormerConfig",
    "AdapterConfig",
    "Control",
    "DeltaLoRAConfig",
    "DoRAConfig",
    "EVAConfig",
    "GLoRAConfig",
    "HiRAConfig",
    "LoRAConfig",
    "LoRADropConfig",
    "NOAHConfig",
    "RepAdapterConfig",
    "SSFConfig",
    "VPTConfig",
    "VeRAConfig",
]
