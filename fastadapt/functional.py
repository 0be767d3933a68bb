"""The public operators: each formula in its docstring, in full in reference.py."""

from .forms import merged_weight
from .operators.adapter_linear.function import adapter_linear, adapter_linear_group
from .operators.adapter_update.function import adapter_update
from .operators.bottleneck.function import bottleneck
from .operators.cross_entropy import linear_cross_entropy
from .operators.expert_linear.block import expert_block
from .operators.expert_linear.function import expert_linear
from .operators.hadamard_linear.function import hadamard_linear
from .operators.multi_adapter_linear.experts import multi_adapter_expert_block
from .operators.multi_adapter_linear.function import (
    multi_adapter_linear,
    multi_adapter_linear_group,
    multi_adapter_update,
)
from .operators.weight_norm.function import row_squares, weight_norm, weight_norm_squared

__all__ = [
    "adapter_linear",
    "adapter_linear_group",
    "adapter_update",
    "bottleneck",
    "expert_block",
    "expert_linear",
    "hadamard_linear",
    "linear_cross_entropy",
    "merged_weight",
    "multi_adapter_expert_block",
    "multi_adapter_linear",
    "multi_adapter_linear_group",
    "multi_adapter_update",
    "row_squares",
    "weight_norm",
    "weight_norm_squared",
]
