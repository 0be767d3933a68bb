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


def parameter_layer(module: nn.Module, names: Collection[str], backend: str = "auto") -> AdapterLayer:
    """The adapter layer for parameters of a module by their names: weights of experts, or the weight of any module.

    Of a module that is one already, itself. Raises ValueError for a module, or a parameter of it, that no adapter goes
    onto, or onto which one goes by target_modules alone.
    """
    base = module.base_layer if isinstance(module, AdapterLayer) else module
    kind, weights = type(base).__name__, [base._parameters[name] for name in names]
    if any(weight is not None and weight.dim() == 3 for weight in weights):
        layer: AdapterLayer = module if isinstance(module, AdapterExperts) else AdapterExperts(base, backend)
        if others := ", ".join(sorted(set(names).difference(layer.parameter_names))):
            raise ValueError(f"{kind}.{others} takes no adapter: only {' and '.join(layer.parameter_names)} do")
        return layer
    if set(names) != {"weight"}:
        others = ", ".join(sorted(set(names) - {"weight"}))
        raise ValueError(f"{kind}.{others} takes no adapter: only a weight of two dimensions does")
    layer = module if isinstance(module, AdapterLayer) else adapter_layer(base, backend)
    if isinstance(layer, AdapterModule):
        return AdapterParameter(base)
    if isinstance(layer, AdapterParameter) or (isinstance(layer, AdapterLinear) and not layer.fan_in_fan_out):
        return layer
    # Files of PEFT's have other tensors for it as a parameter than as a layer.
    raise ValueError(f"the weight of {kind} takes an adapter by target_modules alone: name the module there")
