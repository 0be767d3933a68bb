"""The adapter layer that goes over a base layer."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn

from .experts import AdapterExperts
from .kinds import AdapterConv2d, AdapterEmbedding, AdapterModule, AdapterNorm, AdapterParameter
from .layer import AdapterLayer
from .linear import AdapterLinear
from .ways import is_packed_linear


def adapter_layer(base_layer: nn.Module, backend: str = "auto", strategy: str = "auto") -> AdapterLayer:
    """The adapter layer for a base layer. Raises ValueError for a Conv2d of several groups."""
    if isinstance(base_layer, nn.Linear) or type(base_layer).__name__ == "Conv1D" or is_packed_linear(base_layer):
        return AdapterLinear(base_layer, backend, strategy)
    if isinstance(base_layer, nn.Embedding):
        return AdapterEmbedding(base_layer, backend, strategy)
    if isinstance(base_layer, nn.Conv2d):
        if base_layer.groups != 1:
            raise ValueError(f"a Conv2d of {base_layer.groups} groups cannot take an adapter: only groups=1 can")
        return AdapterConv2d(base_layer, backend, strategy)
    # A subclass may compute something else.
    is_norm = isinstance(base_layer, nn.LayerNorm) and type(base_layer).forward is nn.LayerNorm.forward
    if is_norm and getattr(base_layer.weight, "ndim", 0) == 1:
        return AdapterNorm(base_layer, backend, strategy)
    return AdapterModule(base_layer, backend, strategy)


def parameter_layer(base_layer: nn.Module, names: Collection[str], backend: str = "auto") -> AdapterLayer:
    """The adapter layer for parameters of a module by their names: weights of experts, or the weight of any module.

    Raises ValueError for a module, or a parameter of it, that no adapter goes onto.
    """
    weights = {name: base_layer._parameters[name] for name in names}
    if any(weight is not None and weight.dim() == 3 for weight in weights.values()):
        return AdapterExperts(base_layer, backend)
    if set(names) != {"weight"}:
        others = ", ".join(sorted(set(names) - {"weight"}))
        raise ValueError(f"{type(base_layer).__name__}.{others} takes no adapter: only a weight of two dimensions does")
    layer = adapter_layer(base_layer, backend)
    return AdapterParameter(base_layer) if isinstance(layer, AdapterModule) else layer
