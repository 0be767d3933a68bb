"""fastadapt: one fused engine for low-rank adapters."""

from . import functional, integrations, optim
from .environment import __version__
from .integrations.peft import accelerate_peft, restore_peft
from .layers.linear import AdapterLinear
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
from .model.adapted import adapted_layers
from .model.checkpoint import export_glora, export_lora, load_adapter
from .model.combine import add_weighted_adapter
from .model.inject import (
    control,
    disable_adapter,
    forget,
    inject,
    merge,
    set_adapter,
    trainable_parameters,
    unload,
    unmerge,
)
from .model.saving import save_adapter
from .operators.expert_linear.block import ExpertProjection
from .reference import AdapterForm, ExpertForm
from .training.chunked_loss import chunk_loss
from .training.eva import initialize_eva
from .training.search import evolve
from .training.search_spaces import GLoRASpace, NOAHSpace
from .training.selection import select_layers

__all__ = [
    "AdaLoRAConfig",
    "AdaptFormerConfig",
    "AdapterForm",
    "AdapterLinear",
    "DeltaLoRAConfig",
    "DoRAConfig",
    "EVAConfig",
    "ExpertForm",
    "ExpertProjection",
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
    "__version__",
    "accelerate_peft",
    "adapted_layers",
    "add_weighted_adapter",
    "chunk_loss",
    "control",
    "disable_adapter",
    "evolve",
    "export_glora",
    "export_lora",
    "forget",
    "functional",
    "initialize_eva",
    "inject",
    "integrations",
    "load_adapter",
    "merge",
    "optim",
    "restore_peft",
    "save_adapter",
    "select_layers",
    "set_adapter",
    "trainable_parameters",
    "unload",
    "unmerge",
]
