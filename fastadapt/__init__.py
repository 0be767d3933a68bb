"""fastadapt: one fused engine for low-rank adapters."""

from . import functional, optim
from .checkpoint import export_glora, export_lora, load_adapter, save_adapter
from .combine import add_weighted_adapter
from .eva import initialize_eva
from .inject import control, disable_adapter, forget, inject, merge, set_adapter, trainable_parameters, unload, unmerge
from .layers import AdapterLinear
from .methods import (
    AdaLoRAConfig,
    AdaptFormerConfig,
    DeltaLoRAConfig,
    DoRAConfig,
    EVAConfig,
    GLoRAConfig,
    HiRAConfig,
    LoRAConfig,
    LoRADropConfig,
    NOAHConfig,
    RepAdapterConfig,
    SSFConfig,
    VeRAConfig,
    VPTConfig,
)
from .reference import AdapterForm
from .search import evolve
from .search_spaces import GLoRASpace, NOAHSpace
from .selection import select_layers

__all__ = [
    "AdaLoRAConfig",
    "AdaptFormerConfig",
    "AdapterForm",
    "AdapterLinear",
    "DeltaLoRAConfig",
    "DoRAConfig",
    "EVAConfig",
    "GLoRAConfig",
    "GLoRASpace",
    "HiRAConfig",
    "LoRAConfig",
    "LoRADropConfig",
    "NOAHConfig",
    "NOAHSpace",
    "RepAdapterConfig",
    "SSFConfig",
    "VPTConfig",
    "VeRAConfig",
    "add_weighted_adapter",
    "control",
    "disable_adapter",
    "evolve",
    "export_glora",
    "export_lora",
    "forget",
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
