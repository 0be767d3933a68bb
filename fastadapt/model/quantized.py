"""What transformers knows of quantised models: that adapters train on them, and that a merge has made them plain."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..layers.dequantize import is_packed
from ..layers.layer import AdapterLayer
from ..layers.linear import AdapterLinear

# By which a Trainer tells a quantised model with adapters from one on which there is nothing to train.
_HAS_ADAPTERS = "_hf_peft_config_loaded"

# What says that a model is quantised: of its own, and of its config.
_OWN = ("hf_quantizer", "quantization_method", "is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit")
_OF_CONFIG = "quantization_config"


def mark_adapted(model: nn.Module) -> None:
    """Tells a Trainer that there are adapters on the quantised models in `model`, which it refuses otherwise.

    Not of those whose layers have no backward: these it is to refuse.
    """
    for part in _quantized_models(model):
        if part.__dict__["hf_quantizer"].is_trainable:
            part.__dict__[_HAS_ADAPTERS] = True


def unmark_adapted(model: nn.Module) -> None:
    """Takes back what `mark_adapted` told."""
    for part in _quantized_models(model):
        part.__dict__.pop(_HAS_ADAPTERS, None)


def made_plain(layers: Mapping[str, AdapterLayer]) -> list[str]:
    """The paths of the layers in whose places a merge has put plain ones."""
    return [path for path, layer in layers.items() if isinstance(layer, AdapterLinear) and layer.made_plain]


def half_plain(model: nn.Module, layers: Mapping[str, AdapterLayer]) -> str:
    """In words why a model cannot be saved in which a merge has made some layers plain, and not all; "" where it can.

    What says that the model is quantised says it of all of its layers.
    """
    plain = made_plain(layers)
    if not plain or not _quantized_models(model):
        return ""
    packed = next((path for path, part in model.named_modules() if is_packed(part)), "").removesuffix(".base_layer")
    return f"{plain[0]} is plain since the merge, and {packed} is quantised" if packed else ""


def say_plain(model: nn.Module) -> None:
    """Has the models in `model` say no more that they are quantised, as transformers' own `dequantize` does."""
    for part in _quantized_models(model):
        for name in _OWN:
            part.__dict__.pop(name, None)
        part.config.__dict__.pop(_OF_CONFIG, None)


@contextmanager
def saved_as_they_are(model: nn.Module, *, plain: bool) -> Iterator[None]:
    """Inside, the quantised models in `model` save themselves without a thought of adapters; plain: as plain models."""
    kept: list[tuple[dict[str, Any], dict[str, Any]]] = []
    for part in _quantized_models(model):
        own, of_config = part.__dict__, part.config.__dict__
        kept += [(own, own.copy()), (of_config, of_config.copy())]
    unmark_adapted(model)
    if plain:
        say_plain(model)
    try:
        yield
    finally:
        for now, before in kept:
            now |= {name: before[name] for name in (_HAS_ADAPTERS, *_OWN, _OF_CONFIG) if name in before}


def _quantized_models(model: nn.Module) -> list[nn.Module]:
    return [part for part in model.modules() if part.__dict__.get("hf_quantizer") is not None]
