"""fastadapt: one fused engine for low-rank adapters."""

from . import functional, optim
from .checkpoint import export_lora, load_adapter, save_adapter
from .combine import add_weighted_adapter
from .eva import initialize_eva
from .inject import (
    control,
    disable_adapter,
    inject,
    merge,
    set_adapter,
    trainable_parameters,
    unload,
    unmerge,
)
from .layers import AdapterLinear
from .methods import (
    AdaLoRAConfig,
    DeltaLoRAConfig,
    DoRAConfig,
    EVAConfig,
    HiRAConfig,
    LoRAConfig,
    LoRADropConfig,
    VeRAConfig,
)
from .reference import AdapterForm
from .selection import select_layers

__all__ = [
    "AdaLoRAConfig",
    "AdapterForm",
    "AdapterLinear",
    "DeltaLoRAConfig",
    "DoRAConfig",
    "EVAConfig",
    "HiRAConfig",
    "LoRAConfig",
    "LoRADropConfig",
    "VeRAConfig",
    "add_weighted_adapter",
    "control",
    "disable_adapter",
    "export_lora",
    "functional",
    "initialize_eva",
    "inject",
    "load_adapter",
    "merge",
    "optim",
    "save_adapter",
    "select_layers",
    "set_adapter",
    "trainable_parameters",
    "unload",
    "unmerge",
]
