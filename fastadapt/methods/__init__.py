"""The table of methods: every config by the `peft_type` that its files carry.

A new linear method is one file beside these (its config, its parameters and their start, its `form`) and one line here.
"""

from __future__ import annotations

from .config import AdapterConfig
from .lora import DoRAConfig, LoRAConfig
from .vera import VeRAConfig

METHODS: dict[str, type[AdapterConfig]] = {
    "LORA": LoRAConfig,
    "VERA": VeRAConfig,
    "DVORA": VeRAConfig,
}

__all__ = ["METHODS", "AdapterConfig", "DoRAConfig", "LoRAConfig", "VeRAConfig"]
