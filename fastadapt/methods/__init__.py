"""The table of methods: every config by the `peft_type` that its files carry.

A new linear method is one file beside these (its config, its parameters and their start, its `form`) and one line here.
"""

from __future__ import annotations

from .adalora import AdaLoRAConfig
from .config import AdapterConfig, Control
from .delta_lora import DeltaLoRAConfig
from .hira import HiRAConfig
from .lora import DoRAConfig, EVAConfig, LoRAConfig
from .lora_drop import LoRADropConfig
from .vera import VeRAConfig

METHODS: dict[str, type[AdapterConfig]] = {
    "LORA": LoRAConfig,
    "LORA_DROP": LoRADropConfig,
    "DELTA_LORA": DeltaLoRAConfig,
    "VERA": VeRAConfig,
    "DVORA": VeRAConfig,
    "ADALORA": AdaLoRAConfig,
    "HIRA": HiRAConfig,
}

# Those that PEFT has too: it reads their directories.
PEFT_TYPES = ("LORA", "VERA", "ADALORA", "HIRA")

__all__ = [
    "METHODS",
    "PEFT_TYPES",
    "AdaLoRAConfig",
    "AdapterConfig",
    "Control",
    "DeltaLoRAConfig",
    "DoRAConfig",
    "EVAConfig",
    "HiRAConfig",
    "LoRAConfig",
    "LoRADropConfig",
    "VeRAConfig",
]
