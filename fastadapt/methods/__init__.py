"""The methods: METHODS has every config by the `peft_type` that its files carry.

A new linear method is one file (its config, its parameters and their start, its `form`), and is in the table as soon as
its config is defined. Those that lie beside this file are imported here; one of another package may lie anywhere.
"""

from __future__ import annotations

from .adalora import AdaLoRAConfig
from .adaptformer import AdaptFormerConfig
from .config import METHODS, PEFT_TYPES, AdapterConfig, Control
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
