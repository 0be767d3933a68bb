"""Model surgery: put adapters into a model, switch between them, merge them, take them out again."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from functools import partial
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from ..layers.dequantize import count_of_values
from ..layers.layer import Adapter, AdapterLayer
from ..layers.linear import AdapterLinear, ProjectionGroup
from ..layers.saved import ModuleToSave
from ..layers.wrap import adapter_layer, parameter_layer
from ..methods import AdapterConfig, Control, LoRAConfig
from ..operators.adapter_linear.strategies import check_strategy
from ..operators.backends import check_backend
from .adapted import (
    Injection,
    adapter_configs,
    adapter_layers,
    base_tensor,
    check_known,
    check_unmerged,
    dtype_around,
    named_modules,
    present,
    replace_module,
    saved_modules,
)
from .bypassed import why_refused
from .experts import unused_ranks, with_experts, with_shared_ranks
from .places import shared_places
from .quantized import half_plain, made_plain, mark_adapted, say_plain, unmark_adapted
from .saving import hook_saving, new_biases, save_pretrained, unhook_saving
from .targets import base_modules, parameter_targets, saved_paths, shared_inputs, target_paths, warn_of_rest
from .tying import tie_adapters, tie_copies, untied, with_ties
from .uncontrolled import unwatch, watch
from .wrappers import check_open, inside

ModelType = TypeVar("ModelType", bound=nn.Module)
PartType = TypeVar("PartType", bound=nn.Module)


class ParameterCount(NamedTuple):
    """Trainable and total parameters of a model. Prints as a sentence."""

    trainable: int
    total: int

    @property
    def share(self) -> float:
        return self.trainable / max(1, self.total)

    def __str__(self) -> str:
        return f"trainable parameters: {self.trainable:,} of {self.total:,} ({100 * self.share:.4f}%)"


def trainable_parameters(model: nn.Module) -> ParameterCount:
    """How many parameters of `model` require grad, and how many there are; shared ones count once.

    Of a quantised weight the values count, not the bytes that they are packed in.
    """
    parameters = list(model.parameters())
    trainable = sum(p.numel() for p in parameters if p.requires_grad)
    return ParameterCount(trainable, sum(map(count_of_values, parameters)))


def check_new(model: nn.Module, name: str) -> None:
    """Raises ValueError for a name that an adapter of `model` has or none can have, and for a merged model."""
    if not isinstance(name, str) or not name or "." in name or hasattr(nn.ModuleDict, name):
        raise ValueError(
            f"adapter_name must be a non-empty name without dots that is no attribute of a module, got {name!r}"
        )
    if name in adapter_configs(model):
        raise ValueError(f"adapter {name!r} is in the model already: take another name, or unload(model) first")
    check_unmerged(adapter_layers(model).values(), "adding another")


def adapter_dtype(weight: Tensor, autocast_adapter_dtype: bool) -> torch.dtype:
    """The dtype of an adapter's parameters beside that base weight."""
    sixteen_bit = weight.dtype in (torch.float16, torch.bfloat16)
    return torch.float32 if sixteen_bit and autocast_adapter_dtype else weight.dtype


def _bare_copy(module: nn.Module) -> nn.Module:
    """A copy of a module as it was before any injection."""
    copied = deepcopy(module.original if isinstance(module, ModuleToSave) else module)
    while isinstance(copied, AdapterLayer):
        copied = copied.base_layer
    for path, layer in adapter_layers(copied).items():
        replace_module(copied, path, layer.base_layer)
    for path, saved in saved_modules(copied).items():
        replace_module(copied, path, saved.original)
    return copied


def layers_at(
    paths: Iterable[str],
    modules: Mapping[str, nn.Module],
    config: AdapterConfig,
    *,
    backend: str = "auto",
    strategy: str = "auto",
) -> dict[str, AdapterLayer]:
    """The adapter layers of the modules at these paths, which are not put in their places yet.

    Raises ValueError for a module of a kind that the method cannot adapt.
    """
    layers: dict[str, AdapterLayer] = {}
    parameters = parameter_targets(modules, config, every_name=False) if config.target_parameters else {}
    for path in paths:
        module = modules[path]
        if path in parameters:
            try:
                layers[path] = parameter_layer(module, parameters[path], backend)
            except ValueError as error:
                raise ValueError(f"target_parameters: {path}: {error}") from None
            layers[path].path = path
            config.check_kind(path, layers[path], modules.values())
            continue
        if why := why_refused(path, modules):
            raise ValueError(f"target_modules: {path} cannot take an adapter: {why}; name it in exclude_modules")
        if isinstance(module, AdapterLayer):
            layers[path] = module
        else:
            try:
                layers[path] = adapter_layer(module, backend, strategy)
            except ValueError as error:
                raise ValueError(f"target_modules: {path}: {error}") from None
            layers[path].path = path
        config.check_kind(path, layers[path], modules.values())
    return layers


def prepare(
    model: nn.Module,
    config: AdapterConfig,
    adapter_name: str,
    *,
    backend: str,
    autocast_adapter_dtype: bool,
    strategy: str = "auto",
    from_file: bool = False,
) -> Injection:
    """Builds the adapter for `model` and changes nothing.

    from_file: whether a file says the config. It may name modules that only other models have, as long as one name in
    target_modules matches, and its modules_to_save are complete. Raises ValueError as `inject` does.
    """
    check_open(model)
    check_new(model, adapter_name)
    if not from_file:
        config = config.with_task_heads()
    check_backend(backend)
    check_strategy(strategy, backend)
    modules = named_modules(model)
    ends: list[str] = []
    if isinstance(config, LoRAConfig) and config.ensure_weight_tying:
        config, ends = with_ties(model, config)
    config = with_shared_ranks(model, with_experts(model, config), config)
    paths = target_paths(model, config, every_name=not from_file)
    if str(config.target_modules).lower() == "all-linear" and not from_file:
        warn_of_rest({"": inside(model), **base_modules(model)}, config)
    layers = layers_at(paths, modules, config, backend=backend, strategy=strategy)
    if isinstance(config, LoRAConfig) and config.target_parameters and not from_file:
        for field, keys in unused_ranks(model, config, layers, base_modules(model)).items():
            warnings.warn(
                f"{field}: no layer that the adapter is on is called {', '.join(map(repr, keys))}: a key is the end of "
                "a module's path, or of that of a parameter that target_parameters names (experts.down_proj)",
                stacklevel=3,
            )
    adapters = config.build(layers, lambda weight: adapter_dtype(weight, autocast_adapter_dtype))
    for path, adapter in adapters.items():
        adapter.train(layers[path].training)
    copies: dict[str, nn.Module] = {}
    for path in saved_paths(model, config, needs_head=not from_file):
        copies[path] = _bare_copy(modules[path])
    tie_copies(copies, ends)
    if not from_file:  # whose numbers may differ
        tie_adapters(adapters, ends)
    config = replace(
        config,
        fan_in_fan_out=any(isinstance(layer, AdapterLinear) and layer.fan_in_fan_out for layer in layers.values()),
    )
    return Injection(adapter_name, config, layers, adapters, copies)


def attach(model: nn.Module, injection: Injection, *, trainable: bool) -> None:
    """Puts a built adapter into the model, freezes the base and activates the adapter."""
    model = inside(model)
    configs = adapter_configs(model)
    if not configs:
        model.requires_grad_(False)
        model.__dict__["adapter_configs"] = configs
    modules = named_modules(model)
    there, places = {id(layer) for layer in adapter_layers(model).values()}, shared_places(model)
    for path, layer in injection.layers.items():
        if id(layer) not in there:
            replace_module(model, path, layer, places)
        layer.adapters[injection.name] = injection.adapters[path]
    _group(model)
    for path, copy in injection.copies.items():
        module = modules[path]
        if not isinstance(module, ModuleToSave):
            module = ModuleToSave(module)
            module.train(module.original.training)
            replace_module(model, path, module)
        module.copies[injection.name] = copy
    configs[injection.name] = replace(injection.config, inference_mode=not trainable)
    hook_saving(model, AdapterLayer, partial(save_pretrained, configs))
    mark_adapted(model)
    set_adapter(model, injection.name)
    if trainable and injection.config.is_controlled:
        watch(injection.name, injection.config, injection.adapters.values())


def replace_base(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Gives parameters of the base model, by "path.weight", other values until `unload`."""
    kept = inside(model).__dict__.setdefault("replaced_base", {})
    with torch.no_grad():
        for name, value in tensors.items():
            parameter = base_tensor(model, name)
            kept[name] = parameter.detach().clone()
            parameter.copy_(value)


def _group(model: nn.Module) -> None:
    """Groups the linear adapter layers that read the same input, from scratch."""
    for layer in adapter_layers(model).values():
        if isinstance(layer, AdapterLinear):
            layer.group = None
    for layers in shared_inputs(model):
        group = ProjectionGroup(layers)
        for member in layers:
            member.group = group


def exchange(
    model: nn.Module, adapter_name: str, config: AdapterConfig, adapters: Mapping[str, Adapter | None]
) -> None:
    """Puts other adapters of that name into the layers at these paths, and their config into the model.

    None takes the adapter out of the layer, and a layer without another one gives its place back to its base layer.
    What is active stays active.
    """
    layers = present(model, adapter_name).layers
    paths, places = {id(layer): path for path, layer in adapter_layers(model).items()}, shared_places(model)
    for path, adapter in adapters.items():
        layer = layers[path]
        if adapter is not None:
            layer.adapters[adapter_name] = adapter
            continue
        del layer.adapters[adapter_name]
        layer.active = tuple([name for name in layer.active if name != adapter_name])
        if not layer.adapters:
            replace_module(model, paths[id(layer)], layer.base_layer, places)
    adapter_configs(model)[adapter_name] = config
    _group(model)


def rebuild(model: nn.Module, adapter_name: str, config: AdapterConfig) -> dict[str, Adapter]:
    """Puts new adapters, made by `config`, in the place of those of that name. Returns them by module path.

    Their dtype, mode and requires_grad are those of the old ones. Raises what config.check_kind and config.build raise;
    the model is then as it was.
    """
    old = present(model, adapter_name)
    for path, layer in old.layers.items():
        config.check_kind(path, layer, model.modules())
    dtypes = {id(layer.like): _dtype(old.adapters[path]) for path, layer in old.layers.items()}
    adapters = config.build(old.layers, lambda weight: dtypes[id(weight)])
    for path, layer in old.layers.items():
        adapters[path].train(old.adapters[path].training)
        adapters[path].requires_grad_(adapter_name in layer.active and not config.inference_mode)
    exchange(model, adapter_name, config, adapters)
    return adapters


def _dtype(adapter: Adapter) -> torch.dtype:
    return next(tensor.dtype for tensor in adapter.checkpoint_tensors().values())


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
    fp32 on a 16-bit base, as in PEFT; otherwise they have the base weight's dtype. What config.modules_to_save and
    config.task_type name is trained whole, in a copy, and takes no adapter, nor does what is inside.
    Returns the model. Raises ValueError for a name that matches nothing, a target that cannot be adapted, a task type
    whose head the model does not have, a name that is taken or a merged model; the model is then as it was.
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


def _switch(model: nn.Module, names: Sequence[str]) -> None:
    for layer in adapter_layers(model).values():
        layer.active = tuple([name for name in names if name in layer.adapters])
    for module in saved_modules(model).values():
        module.active = next((name for name in names if name in module.copies), None)


def set_adapter(model: nn.Module, adapter_name: str | Sequence[str] | None) -> None:
    """Activates one adapter, several at once, or none for None.

    Adapters that are active together add up: their forms are stacked along r and run in one pass, under one dropout
    mask. Only active adapters' parameters require grad, and not of those that were loaded with trainable=False. Raises
    ValueError for an unknown name or one named twice, for two adapters that both replace a module (modules_to_save),
    and for a merged model.
    """
    names = [] if adapter_name is None else [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
    for name in names:
        check_known(model, name)
        if names.count(name) > 1:
            raise ValueError(f"adapter {name!r} is named twice: each can be active once")
    layers, modules = adapter_layers(model).values(), saved_modules(model)
    check_unmerged(layers, "switching adapters")
    for path, module in modules.items():
        owners = [name for name in names if name in module.copies]
        if len(owners) > 1:
            raise ValueError(
                f"adapters {', '.join(map(repr, owners))} both replace {path} (modules_to_save): only one of them can "
                "be active"
            )
    _switch(model, names)
    configs = adapter_configs(model)
    for parts in (*(layer.adapters for layer in layers), *(module.copies for module in modules.values())):
        for name, part in parts.items():
            part.requires_grad_(name in names and not configs[name].inference_mode)


def control(model: nn.Module, adapter_name: str = "default") -> Control:
    """What the adapter's method does between the steps of training: see methods.Control.

    Its `step` follows the optimizer's, before gradients are zeroed, and `regularizer` is added to the loss; for most
    methods both do nothing, so that one training loop serves all. Raises ValueError for an unknown name.
    """
    found = present(model, adapter_name)
    unwatch(found.adapters.values())
    return found.config.control(found.layers, found.adapters)


@contextmanager
def disable_adapter(model: nn.Module) -> Iterator[None]:
    """The base model alone inside the `with` block; then the adapters that were active are active again.

    Raises ValueError for a merged model: its base weights hold the adapter.
    """
    layers, modules = adapter_layers(model), saved_modules(model)
    check_unmerged(layers.values(), "disabling it")
    parts = [*layers.values(), *modules.values()]
    active = [part.active for part in parts]
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    _switch(model, ())
    try:
        yield
    finally:
        for part, names in zip(parts, active, strict=True):
            part.active = names
        for parameter, requires_grad in trained:  # set_adapter may have been called inside
            parameter.requires_grad_(requires_grad)


@contextmanager
def in_mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    """The model in training or eval mode inside the `with` block; then each module is in its own mode again."""
    modes = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def forget(model: nn.Module) -> None:
    """Drops what the adapters of `model` keep between calls; the next forward makes it anew.

    DoRA's row norms, RepAdapter's folded factors, deep prompts as keys and values, LoRA-FA's inverses: all are made
    again when a tensor that they depend on is replaced, moved, loaded or written, when an optimizer steps, and at each
    train() and eval(). The one change that cannot be seen is a write past autograd, through `.data` or a NumPy view,
    between two forwards in the same mode: call this after it.
    """
    for layer in adapter_layers(model).values():
        adapters: Iterable[Adapter] = layer.adapters.values()  # type: ignore[assignment]
        for adapter in adapters:
            adapter.forget()
        if isinstance(layer, AdapterLinear) and layer.group is not None:
            layer.group.forget()


def merge(model: nn.Module, *, dequantize: bool = False, requantize: bool = False) -> dict[str, float]:
    """Writes the active adapters into the base weights: W' = diag(g) W0 + diag(h) B diag(d) A, b' = β.

    Exact up to the rounding of the base dtype. The base weights are set aside for `unmerge`. dequantize: whether plain
    layers in floating point may stand in the places of quantised ones (bitsandbytes', torchao's, quanto's), which are
    refused otherwise: what is merged would be rounded to their few bits. They compute with the dequantised weight; what
    an 8-bit layer of bitsandbytes rounds of x, they do not. requantize: whether bitsandbytes' and quanto's layers are
    quantised anew with what is merged, at the cost of that rounding: a small adapter may drown in it.
    Returns ‖W_q − W'‖ / ‖W'‖ of each layer that was rounded so, by its path.
    Raises ValueError when no adapter is active, for both of them, or when a merged weight would have NaN or infinite
    values; the model is then as it was.
    """
    if dequantize and requantize:
        raise ValueError("merge takes dequantize=True or requantize=True, got both: leave one out")
    layers = adapter_layers(model)
    rounded: dict[str, float] = {}
    if any(layer.merged for layer in layers.values()):
        return rounded
    if not any(part.active for part in (*layers.values(), *saved_modules(model).values())):
        raise ValueError("no adapter is active, so there is nothing to merge: call set_adapter(model, name) first")
    around = dtype_around(model)
    done: list[AdapterLayer] = []
    try:
        for path, layer in layers.items():
            if isinstance(layer, AdapterLinear):
                layer.around = around
            try:
                rounding = layer.merge(dequantize=dequantize, requantize=requantize)
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from None
            done.append(layer)
            if rounding:
                rounded[path] = rounding
    except BaseException:
        for layer in done:
            layer.unmerge()
        raise
    return rounded


def unmerge(model: nn.Module) -> None:
    """Puts the base weights back, bit for bit; the adapters that were merged are active again."""
    for layer in adapter_layers(model).values():
        layer.unmerge()


def unload(model: nn.Module) -> nn.Module:
    """Takes all adapters out of `model` in place and returns it.

    A merged model keeps the merged weights, and the active copies of modules_to_save; otherwise the base comes back as
    it was before `inject`, frozen. Warns where the model's class would not read again what the merge has made of it: a
    new bias, or plain layers beside quantised ones.
    """
    layers, modules = adapter_layers(model), saved_modules(model)
    merged, places = any(layer.merged for layer in layers.values()), shared_places(model)
    plain, half = made_plain(layers), half_plain(model, layers)
    if any(hasattr(type(part), "from_pretrained") for part in model.modules()):
        _warn_of_unreadable(new_biases(model), half)
    for path, layer in layers.items():
        replace_module(model, path, layer.base_layer, places)
    for path, module in reversed(modules.items()):  # the inner ones first
        replace_module(model, path, module.current if merged else module.original)
    inside(model).__dict__.pop("adapter_configs", None)
    unhook_saving(model)
    unmark_adapted(model)
    if plain and not half:
        say_plain(model)
    for name, value in reversed(inside(model).__dict__.pop("replaced_base", {}).items()):
        if not merged:
            with torch.no_grad():
                base_tensor(model, name).copy_(value)
    if merged:
        for config in untied(model):
            config.tie_word_embeddings = False
    return model


def _warn_of_unreadable(biases: str, half: str) -> None:
    cure = "use the model as it is, or save the adapter with save_adapter before it is merged"
    if biases:
        warnings.warn(
            f"{biases}: of what save_pretrained writes from now on from_pretrained leaves it out; {cure}", stacklevel=3
        )
    if half:
        warnings.warn(
            f"{half}: from_pretrained, which takes all for quantised, does not read what save_pretrained writes from "
            f"now on; {cure}",
            stacklevel=3,
        )
