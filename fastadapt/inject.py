"""Model surgery: put adapters into a model, switch between them, merge them, take them out again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from .groups import ProjectionGroup
from .layers import Adapter, AdapterLayer, AdapterLinear, ModuleToSave, adapter_layer
from .methods import AdapterConfig
from .strategies import check_backend, check_strategy
from .targets import saved_paths, shared_inputs, target_paths

ModelType = TypeVar("ModelType", bound=nn.Module)


class ParameterCount(NamedTuple):
    """Trainable and total parameters of a model. Prints as a sentence."""

    trainable: int
    total: int

    @property
    def share(self) -> float:
        return self.trainable / max(1, self.total)

    def __str__(self) -> str:
        return f"trainable parameters: {self.trainable:,} of {self.total:,} ({100 * self.share:.4f}%)"


def adapter_configs(model: nn.Module) -> dict[str, AdapterConfig]:
    """The configs of the adapters in `model`, by name; empty for a model without."""
    configs: dict[str, AdapterConfig] = model.__dict__.get("adapter_configs", {})
    return configs


def adapter_layers(model: nn.Module) -> dict[str, AdapterLayer]:
    """The adapter layers of `model` by module path."""
    return {path: module for path, module in model.named_modules() if isinstance(module, AdapterLayer)}


def saved_modules(model: nn.Module) -> dict[str, ModuleToSave]:
    """The modules of modules_to_save of `model` by module path."""
    return {path: module for path, module in model.named_modules() if isinstance(module, ModuleToSave)}


def trainable_parameters(model: nn.Module) -> ParameterCount:
    """How many parameters of `model` require grad, and how many there are; shared ones count once."""
    parameters = list(model.parameters())
    return ParameterCount(sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters))


def _check_name(name: str) -> None:
    if not isinstance(name, str) or not name or "." in name or hasattr(nn.ModuleDict, name):
        raise ValueError(
            f"adapter_name must be a non-empty name without dots that is no attribute of a module, got {name!r}"
        )


def check_known(model: nn.Module, name: str) -> None:
    """Raises ValueError for a name that no adapter in `model` has."""
    configs = adapter_configs(model)
    if name not in configs:
        raise ValueError(f"adapter {name!r} is not in the model: it has {', '.join(map(repr, configs)) or 'none'}")


def _adapter_dtype(weight: Tensor, autocast_adapter_dtype: bool) -> torch.dtype:
    sixteen_bit = weight.dtype in (torch.float16, torch.bfloat16)
    return torch.float32 if sixteen_bit and autocast_adapter_dtype else weight.dtype


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


class Injection(NamedTuple):
    """An adapter that is built but not yet in the model: what `attach` puts in."""

    name: str
    config: AdapterConfig
    layers: dict[str, AdapterLayer]
    adapters: dict[str, Adapter]
    copies: dict[str, nn.Module]


def prepare(
    model: nn.Module,
    config: AdapterConfig,
    adapter_name: str,
    *,
    backend: str,
    autocast_adapter_dtype: bool,
    strategy: str = "auto",
    every_target: bool = True,
) -> Injection:
    """Builds the adapter for `model` and changes nothing.

    every_target: whether each name in target_modules must match a module, or only one of them. Raises ValueError as
    `inject` does.
    """
    _check_name(adapter_name)
    check_backend(backend)
    check_strategy(strategy, backend)
    if adapter_name in adapter_configs(model):
        raise ValueError(f"adapter {adapter_name!r} is in the model already: take another name, or unload(model) first")
    if any(layer.merged for layer in adapter_layers(model).values()):
        raise ValueError("the model has a merged adapter: call unmerge(model) before adding another")
    modules = dict(model.named_modules())
    layers: dict[str, AdapterLayer] = {}
    for path in target_paths(model, config, every_name=every_target):
        module = modules[path]
        try:
            layers[path] = module if isinstance(module, AdapterLayer) else adapter_layer(module, backend, strategy)
        except ValueError as error:
            raise ValueError(f"target_modules: {path}: {error}") from None
    adapters = config.build(layers, lambda weight: _adapter_dtype(weight, autocast_adapter_dtype))
    for path, adapter in adapters.items():
        adapter.train(layers[path].training)
    copies: dict[str, nn.Module] = {}
    for path in saved_paths(model, config):
        module = modules[path]
        copies[path] = deepcopy(module.original if isinstance(module, ModuleToSave) else module)
    config = replace(
        config,
        fan_in_fan_out=any(isinstance(layer, AdapterLinear) and layer.fan_in_fan_out for layer in layers.values()),
    )
    return Injection(adapter_name, config, layers, adapters, copies)


def attach(model: nn.Module, injection: Injection, *, trainable: bool) -> None:
    """Puts a built adapter into the model, freezes the base and activates the adapter."""
    configs = adapter_configs(model)
    if not configs:
        model.requires_grad_(False)
        model.__dict__["adapter_configs"] = configs
    modules = dict(model.named_modules())
    for path, layer in injection.layers.items():
        if modules[path] is not layer:
            _replace(model, path, layer)
        layer.adapters[injection.name] = injection.adapters[path]
    for layers in shared_inputs(model):
        group = ProjectionGroup(layers)
        for member in layers:
            member.group = group
    for path, copy in injection.copies.items():
        module = modules[path]
        if not isinstance(module, ModuleToSave):
            module = ModuleToSave(module)
            module.train(module.original.training)
            _replace(model, path, module)
        module.copies[injection.name] = copy
    configs[injection.name] = replace(injection.config, inference_mode=not trainable)
    set_adapter(model, injection.name)


def inject(
    model: ModelType,
    config: AdapterConfig,
    adapter_name: str = "default",
    *,
    backend: str = "auto",
    strategy: str = "auto",
    autocast_adapter_dtype: bool = True,
) -> ModelType:
    """Puts a new adapter into `model` in place, activates it and freezes everything else.

    The layers that config.target_modules selects become adapter layers; layers that are ones already get one adapter
    more. Layers that read the same input (q, k, v; gate, up) run as a group. backend: "auto", "triton" or "eager", and
    strategy: "auto" or one of strategies.STRATEGIES, for all new layers. autocast_adapter_dtype: adapter parameters are
    fp32 on a 16-bit base, as in PEFT; otherwise they have the base weight's dtype.
    Returns the model. Raises ValueError for a target that matches nothing or cannot be adapted, a name that is taken or
    a merged model; the model is then as it was.
    """
    injection = prepare(
        model,
        config,
        adapter_name,
        backend=backend,
        strategy=strategy,
        autocast_adapter_dtype=autocast_adapter_dtype,
    )
    attach(model, injection, trainable=True)
    return model


def _switch(model: nn.Module, name: str | None) -> None:
    for layer in adapter_layers(model).values():
        layer.active = name if name is not None and name in layer.adapters else None
    for module in saved_modules(model).values():
        module.active = name


def set_adapter(model: nn.Module, adapter_name: str | None) -> None:
    """Activates one adapter, or none for None.

    Only the active adapter's parameters require grad, and not if it was loaded with trainable=False. Raises ValueError
    for an unknown name or a merged model.
    """
    if adapter_name is not None:
        check_known(model, adapter_name)
    if any(layer.merged for layer in adapter_layers(model).values()):
        raise ValueError("the model has a merged adapter: call unmerge(model) before switching adapters")
    _switch(model, adapter_name)
    configs = adapter_configs(model)
    layers, modules = adapter_layers(model).values(), saved_modules(model).values()
    for parts in (*(layer.adapters for layer in layers), *(module.copies for module in modules)):
        for name, part in parts.items():
            part.requires_grad_(name == adapter_name and not configs[name].inference_mode)


@contextmanager
def disable_adapter(model: nn.Module) -> Iterator[None]:
    """The base model alone inside the `with` block; then the adapter that was active is active again.

    Raises ValueError for a merged model: its base weights hold the adapter.
    """
    layers, modules = adapter_layers(model), saved_modules(model)
    if any(layer.merged for layer in layers.values()):
        raise ValueError("the model has a merged adapter: call unmerge(model) before disabling it")
    parts = [*layers.values(), *modules.values()]
    active = [part.active for part in parts]
    _switch(model, None)
    try:
        yield
    finally:
        for part, name in zip(parts, active, strict=True):
            part.active = name


def merge(model: nn.Module) -> None:
    """Writes the active adapter into the base weights: W' = diag(g) W0 + diag(h) B diag(d) A, b' = β.

    Exact up to the rounding of the base dtype. The base weights are set aside for `unmerge`. Raises ValueError when no
    adapter is active, or when a merged weight would have NaN or infinite values; the model is then as it was.
    """
    layers = adapter_layers(model)
    if any(layer.merged for layer in layers.values()):
        return
    if not any(part.active for part in (*layers.values(), *saved_modules(model).values())):
        raise ValueError("no adapter is active, so there is nothing to merge: call set_adapter(model, name) first")
    done: list[AdapterLayer] = []
    try:
        for path, layer in layers.items():
            try:
                layer.merge()
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from None
            done.append(layer)
    except BaseException:
        for layer in done:
            layer.unmerge()
        raise


def unmerge(model: nn.Module) -> None:
    """Puts the base weights back, bit for bit; the adapter that was merged is active again."""
    for layer in adapter_layers(model).values():
        layer.unmerge()


def unload(model: nn.Module) -> nn.Module:
    """Takes all adapters out of `model` in place and returns it.

    A merged model keeps the merged weights, and the active copies of modules_to_save; otherwise the base comes back as
    it was before `inject`, frozen.
    """
    layers, modules = adapter_layers(model), saved_modules(model)
    merged = any(layer.merged for layer in layers.values())
    for path, layer in layers.items():
        _replace(model, path, layer.base_layer)
    for path, module in modules.items():
        _replace(model, path, module.current if merged else module.original)
    model.__dict__.pop("adapter_configs", None)
    if merged:
        _untie(model)
    return model


def _untie(model: nn.Module) -> None:
    """Tells a transformers config when merging has given input and output embeddings different weights."""
    get_input, get_output = (getattr(model, f"get_{side}_embeddings", None) for side in ("input", "output"))
    config = getattr(model, "config", None)
    if config is None or not getattr(config, "tie_word_embeddings", False) or get_input is None or get_output is None:
        return
    head = get_output()
    if head is not None and head.weight is not get_input().weight:
        config.tie_word_embeddings = False
