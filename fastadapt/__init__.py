"""fastadapt: one fused engine for low-rank adapters."""

from . import functional
from .checkpoint import load_adapter, save_adapter
from .inject import (
    disable_adapter,
    inject,
    merge,
    set_adapter,
    trainable_parameters,
    unload,
    unmerge,
)
from .layers import AdapterLinear
from .methods import DoRAConfig, LoRAConfig, VeRAConfig
from .reference import AdapterForm

__all__ = [
    "AdapterForm",
    "AdapterLinear",
    "DoRAConfig",
    "LoRAConfig",
    "VeRAConfig",
    "disable_adapter",
    "functional",
    "inject",
    "load_adapter",
    "merge",
    "save_adapter",
    "set_adapter",
    "trainable_parameters",
    "unload",
    "unmerge",
]
