"""What is in a model that has adapters: their layers, modules and configs by path, and one adapter as a whole."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from ..checks import FLOATING
from ..layers.fast_path import mind_wrappers
from ..layers.kinds import AdapterModule
from ..layers.layer import Adapter, AdapterLayer
from ..layers.saved import ModuleToSave
from ..methods import AdapterConfig
from .places import Places
from .wrappers import inside

PartType = TypeVar("PartType", bound=nn.Module)

# What the names of tensors begin with in a PEFT file.
PREFIX = "base_model."


def adapter_configs(model: nn.Module) -> dict[str, AdapterConfig]:
    """The configs of the adapters in `model`, by name; empty for a model without."""
    configs: dict[str, AdapterConfig] = inside(model).__dict__.get("adapter_configs", {})
    return configs


def named_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of `model` by path, those inside of an AdapterModule by the path that they had before it came."""
    modules = dict(inside(model).named_modules())
    around = [f"{path}.base_layer." for path, module in modules.items() if isinstance(module, AdapterModule)]
    if not around:
        return modules
    found: dict[str, nn.Module] = {}
    for path, module in modules.items():
        for prefix in reversed(around):  # the inner ones first
            if path.startswith(prefix):
                path = prefix.removesuffix("base_layer.") + path.removeprefix(prefix)
        found[path] = module
    return found


def adapter_layers(model: nn.Module) -> dict[str, AdapterLayer]:
    """The adapter layers of `model` by module path."""
    return {path: module for path, module in named_modules(model).items() if isinstance(module, AdapterLayer)}


def dtype_around(model: nn.Module) -> torch.dtype | None:
    """The dtype of the first parameter in floating point that is no adapter's: of what quantised layers stand among."""
    ours = {id(p) for layer in adapter_layers(model).values() for p in layer.adapters.parameters()}
    return next((p.dtype for p in model.parameters() if p.dtype in FLOATING and id(p) not in ours), None)


def saved_modules(model: nn.Module) -> dict[str, ModuleToSave]:
    """The modules of modules_to_save of `model` by module path."""
    return {path: module for path, module in named_modules(model).items() if isinstance(module, ModuleToSave)}


def check_unmerged(layers: Iterable[AdapterLayer], before: str) -> None:
    """Raises ValueError where one of the layers is merged; `before` says what unmerge has to come before."""
    if any(layer.merged for layer in layers):
        raise ValueError(f"the model has a merged adapter: call unmerge(model) before {before}")


def check_known(model: nn.Module, name: str) -> None:
    """Raises ValueError for a name that no adapter in `model` has."""
    configs = adapter_configs(model)
    if name not in configs:
        inner = [
            path
            for path, part in inside(model).named_modules()
            if path and name in part.__dict__.get("adapter_configs", ())
        ]
        cure = f"; {inner[0]}, inside of this {type(model).__name__}, has it: give that" if inner else ""
        raise ValueError(
            f"adapter {name!r} is not in the model: it has {', '.join(map(repr, configs)) or 'none'}{cure}"
        )


def replace_module(model: nn.Module, path: str, module: nn.Module, places: Places | None = None) -> None:
    """Puts a module in the place that `path` names, and in the others of the one that is there, by `shared_places`."""
    parent_path, _, name = path.rpartition(".")
    parent = inside(model).get_submodule(parent_path)
    while isinstance(parent, AdapterLayer):
        parent = parent.base_layer
    for other, key in (places or {}).get(id(getattr(parent, name)), ()):
        setattr(other, key, module)
    setattr(parent, name, module)
    mind_wrappers(inside(model), path)


def base_tensor(model: nn.Module, name: str) -> Tensor:
    """The tensor that the base model has by this name, whatever has come around its layers."""
    path, _, leaf = name.rpartition(".")
    module: Any = named_modules(model)[path]
    tensor: Tensor = getattr(module.original if isinstance(module, ModuleToSave) else module, leaf)
    return tensor


def _by_base_path(model: nn.Module, parts: Mapping[str, PartType]) -> dict[str, PartType]:
    """Adapter layers or saved modules by the path that they had before others came to be saved whole around them."""
    found = {}
    around = list(saved_modules(model))
    for path, part in parts.items():
        for outer in reversed(around):  # the inner ones first
            original = f"{outer}.original"
            if path == original or path.startswith(f"{original}."):
                path = outer + path.removeprefix(original)
        found[path] = part
    return found


class Injection(NamedTuple):
    """An adapter that is built but not yet in the model: what `attach` puts in."""

    name: str
    config: AdapterConfig
    layers: dict[str, AdapterLayer]
    adapters: dict[str, Adapter]
    copies: dict[str, nn.Module]

    @property
    def module_paths(self) -> list[str]:
        """The paths of the layers that target_modules stands for: not those that target_parameters names."""
        named = self.config.names_parameter
        return [
            path for path, layer in self.layers.items() if not any(named(f"{path}.{n}") for n in layer.parameter_names)
        ]

    @property
    def named_tensors(self) -> dict[str, Tensor]:
        """The adapter's tensors by their name in a PEFT file."""
        return {**dict(_adapter_tensors(self.adapters, self.config)), **dict(_copy_tensors(self.copies))}


def _adapter_tensors(adapters: dict[str, Adapter], config: AdapterConfig) -> Iterator[tuple[str, Tensor]]:
    """(name in the file, tensor) of everything the adapter's own modules keep in a checkpoint."""
    for prefix, module in config.shared_tensors(adapters).items():
        for name, tensor in module.state_dict(keep_vars=True).items():
            yield f"{PREFIX}{prefix}{name}", tensor
    for path, adapter in adapters.items():
        for suffix, tensor in adapter.checkpoint_tensors().items():
            yield f"{PREFIX}model.{path}.{suffix}", tensor


def _copy_tensors(copies: dict[str, nn.Module]) -> Iterator[tuple[str, Tensor]]:
    for path, module in copies.items():
        for name, tensor in module.state_dict(keep_vars=True).items():
            yield f"{PREFIX}model.{path}.{name}", tensor


def part_of(model: nn.Module, adapter_name: str, config: AdapterConfig) -> Injection:
    """What an adapter of this name and config has in `model`, as an Injection."""
    layers = {path: layer for path, layer in adapter_layers(model).items() if adapter_name in layer.adapters}
    layers = _by_base_path(model, layers)
    adapters: dict[str, Adapter] = {path: layer.adapters[adapter_name] for path, layer in layers.items()}  # type: ignore[misc]
    saved = {path: module for path, module in saved_modules(model).items() if adapter_name in module.copies}
    copies = {path: module.copies[adapter_name] for path, module in _by_base_path(model, saved).items()}
    return Injection(adapter_name, config, layers, adapters, copies)


def present(model: nn.Module, adapter_name: str) -> Injection:
    """An adapter that is in the model, as an Injection. Raises ValueError for an unknown name."""
    check_known(model, adapter_name)
    return part_of(model, adapter_name, adapter_configs(model)[adapter_name])


def active_adapters(model: nn.Module, names: Iterable[str] | None = None) -> list[str]:
    """The names of the active adapters, in the order in which they were added to the model.

    names: those of all of its adapters, for a module inside of the model that `inject` was given.
    """
    parts = [*(layer.active for layer in adapter_layers(model).values())]
    parts += [(module.active,) for module in saved_modules(model).values() if module.active is not None]
    active = {name for names in parts for name in names}
    return [name for name in (adapter_configs(model) if names is None else names) if name in active]


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
