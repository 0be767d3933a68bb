"""What a model's adapted layers do: a report."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from .inject import adapter_configs, adapter_layers


class AdaptedLayer(NamedTuple):
    """A layer with adapters: where it is, their methods, what a forward does now, and why.

    way: "fused", the base layer's formula and the adapters' form in one operator; "called", the form on what the base
    layer gave; "stream", around what it reads or gives; "merged"; or "base", without an active adapter. reason: why the
    base layer has to be called, whatever is active; "" for a plain one.
    """

    path: str
    method: str
    way: str
    reason: str


def adapted_layers(model: nn.Module) -> list[AdaptedLayer]:
    """The layers of `model` that have adapters, in its order: see AdaptedLayer. Hooks come and go, and the ways too.

    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    >>> handle = model[1].register_forward_hook(lambda *_: None)
    >>> model = fastadapt.inject(model, fastadapt.LoRAConfig(target_modules=["0", "1"]))
    >>> [tuple(layer) for layer in fastadapt.adapted_layers(model)]
    [('0', 'LoRA', 'fused', ''), ('1', 'LoRA', 'called', 'it has hooks')]
    """
    names = {name: type(config).named(vars(config)) for name, config in adapter_configs(model).items()}
    return [
        AdaptedLayer(path, ", ".join([names[name] for name in layer.adapters]), layer.way, layer.reason)
        for path, layer in adapter_layers(model).items()
    ]
