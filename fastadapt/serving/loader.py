"""Adapter directories as what they are to a server: files of strangers. One is taken whole, or refused by its reason.

Nothing of a file is believed before it is checked: where it lies, that it is a file, its size, its syntax, that every
field which changes the maths is honoured, that tensors, config and model agree in every name and size. Memory is taken
only for what the files really hold.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path, PureWindowsPath
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from ..checks import FLOATING
from ..layers.experts import (
    AdapterExperts,
    ExpertsAdapter,
    parameter_keys,
    routers_of,
    why_not_by_token,
    why_not_run,
    without_memory,
)
from ..layers.kinds import AdapterParameter
from ..layers.layer import Adapter, AdapterLayer
from ..layers.linear import AdapterLinear
from ..layers.ways import plain_kind, with_tensors
from ..methods import AdapterConfig, DeltaLoRAConfig
from ..methods.patterns import time_limit
from ..model.adapted import Injection, adapter_layers, check_unmerged
from ..model.checkpoint import check_tensors, fill
from ..model.experts import turn_experts, with_experts
from ..model.inject import adapter_dtype, layers_at
from ..model.peft_files import (
    CONFIG_FILE,
    TENSOR_FILE,
    check_present,
    of_one_save,
    parse_config,
    parse_fields,
    parse_tensors,
    tensor_stamp,
)
from ..model.targets import base_modules, found_names, output_head, target_paths
from ..model.untrusted import (
    DEFAULT_LIMITS,
    AdapterError,
    Limits,
    check_fields,
    contained,
    content,
    refused,
    tensor_content,
)
from ..reference import AdapterForm, ExpertForm

T = TypeVar("T")
Form = TypeVar("Form", AdapterForm, ExpertForm)


class LoadedAdapter(NamedTuple):
    """An adapter as it is served.

    forms: by module path, detached; where the adapter has no bias of its own, `bias` is the very tensor of the base
    layer, and DoRA's out_scale is its base_scale. shared: VeRA's pair (A [r, largest in], B [largest out, r]), of which
    the forms' A and B are slices; None for other methods. identity: sha256 of the content of both files, in hex: equal
    for equal adapters, another after any change. bytes: the size of both files. experts: the forms of weights of
    experts, by the path of the parameter.
    """

    config: AdapterConfig
    forms: dict[str, AdapterForm]
    shared: tuple[Tensor, Tensor] | None
    identity: str
    bytes: int
    experts: Mapping[str, ExpertForm] = MappingProxyType({})


def adapter_directory(root: str | os.PathLike[str], name: str) -> Path:
    """The directory, inside `root` and free of symlinks, of the adapter called `name`: names with / between them.

    Symlinks are followed as long as they, and those of the two files inside, end inside root. Raises AdapterError for
    any other name, and where there is no such directory.
    """
    if not isinstance(name, str) or not name:
        raise AdapterError(repr(name), "its name must be text and not empty")
    windows = PureWindowsPath(name)
    if (
        not name.isprintable()
        or "\\" in name
        or windows.drive
        or windows.root
        or any(part in ("", ".", "..") for part in name.split("/"))
    ):
        raise AdapterError(
            repr(name), "its name must be a path inside the adapters' directory, without .., backslashes and the like"
        )
    with refused(name):
        directory = contained(root, Path(root, name))
        if not directory.is_dir():
            raise NotADirectoryError(f"it must be a directory that holds {CONFIG_FILE} and {TENSOR_FILE}")
        for file in (CONFIG_FILE, TENSOR_FILE):
            if os.path.lexists(directory / file):
                contained(root, directory / file)
    return directory


def _refuse_unserved(config: AdapterConfig, modules: Mapping[str, nn.Module]) -> None:
    """Raises ValueError for what no batch of many adapters computes."""
    # Where the model has none of them, only tensors without a place could tell of them, and these are refused.
    whole = found_names(modules, config)
    if whole:
        raise ValueError(
            f"modules_to_save must name no module of this model, got {', '.join(whole)}: it was trained whole, a head "
            "for example, and rows of other adapters cannot share it; merge the adapter into its base (fastadapt "
            "merge), or load it alone with load_adapter"
        )
    if not config.has_forms:
        raise ValueError(
            f"peft_type {config.peft_type} works on the stream of tokens, which adapters of other rows cannot share: "
            "serve it alone"
        )
    if isinstance(config, DeltaLoRAConfig) and config.literal:
        raise ValueError(
            "literal must be false: literal Delta-LoRA has moved the base weights themselves, which no adapter file "
            "holds; train it with literal=False, or serve its model alone"
        )


def _selected(
    model: nn.Module, config: AdapterConfig, modules: Mapping[str, nn.Module], limits: Limits
) -> dict[str, AdapterLayer]:
    """The layers that the config adapts, wrapped apart from the model, which is not changed.

    Raises ValueError for one that no batch of many adapters goes through, or that is to have more ranks than the limit.
    """
    # PEFT's files may name modules that only other models have: the tensors decide.
    paths = target_paths(model, config, every_name=False, modules=modules)
    bases = {path: part.base_layer if isinstance(part, AdapterLayer) else part for path, part in modules.items()}
    layers, routers = layers_at(paths, bases, config), routers_of(bases)
    for path, layer in layers.items():
        keys, why = [path], ""
        if isinstance(layer, (AdapterExperts, AdapterParameter)):
            keys = [key for key in parameter_keys(path, layer.base_layer) if config.names_parameter(key)]
        if isinstance(layer, AdapterExperts):
            why = why_not_run(layer.base_layer)
        elif isinstance(layer, AdapterParameter) and path in routers:
            why = why_not_by_token(layer.base_layer)
        elif not isinstance(layer, AdapterLinear):
            raise ValueError(
                f"target_modules: {path} is a {type(layer.base_layer).__name__}, and only Linear and Conv1D layers, "
                "stacked experts and their routers can serve many adapters: merge this adapter or serve it alone"
            )
        if why:
            raise ValueError(
                f"target_parameters: {path} cannot serve many adapters: {why}; merge this adapter or serve it alone"
            )
        if isinstance(modules.get(path.rpartition(".")[0]), nn.MultiheadAttention):
            raise ValueError(
                f"target_modules: {path} is inside of torch's MultiheadAttention, which reads its weight and never "
                "calls it: nothing can be added to it; leave it out, or merge the adapter"
            )
        for key in keys:
            if config.rank(key) > limits.max_rank:
                raise ValueError(
                    f"the rank of {key} may be {limits.max_rank}, got {config.rank(key)}: export it with a smaller "
                    "rank, or raise the limit"
                )
    return layers


def _without_memory(layer: AdapterLayer) -> AdapterLayer:
    """A layer of the same sizes that stands for this one while its adapter is built."""
    if isinstance(layer, AdapterExperts):
        return without_memory(layer)
    own, bias = layer.base_layer._parameters.get("weight"), getattr(layer.base_layer, "bias", None)
    # A weight of its own need not be fetched where it is offloaded; one of whole numbers has a shape of its own.
    weight = layer.base_weight if own is None or own.dtype not in FLOATING else own
    base = with_tensors(
        layer.base_layer,
        nn.Parameter(weight.detach().to("meta"), requires_grad=False),
        None if bias is None else nn.Parameter(bias.detach().to("meta"), requires_grad=False),
        plain_kind(layer.base_layer, layer.plain_forward),
    )
    return type(layer)(base)


def _give_memory(module: nn.Module, device: torch.device) -> None:
    # As to_empty does, without the detour of empty_like that takes a hundred times as long for tensors like these.
    module._apply(lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype, device=device), recurse=False)


def _filled(
    config: AdapterConfig,
    fields: Mapping[str, Any],
    layers: dict[str, AdapterLayer],
    tensors: dict[str, Tensor],
    source: Path,
    modules: Mapping[str, nn.Module],
    head: nn.Module | None,
    device: torch.device | None,
) -> dict[str, Adapter]:
    """The adapters with the file's tensors. Raises ValueError where these are not what config and layers ask for.

    They are built without memory, which costs nothing for any size and draws no random numbers, and get theirs when
    all names and shapes have turned out right: on `device`, by default each on its layer's.
    """
    empty = {path: _without_memory(layer) for path, layer in layers.items()}
    with torch.device("meta"):
        adapters = config.build(empty, lambda weight: adapter_dtype(weight, True))
    injection = Injection("", config, layers, adapters, {})
    turn_experts(injection, tensors, fields, source)
    changed = check_tensors(injection, tensors, source, modules, head)
    if changed:
        raise ValueError(
            f"{source} holds another {', '.join(changed)} than this model has, trained or grown before the adapter "
            "was, which rows of other adapters cannot share: give the model that weight, merge the adapter into its "
            "base (fastadapt merge), or load it alone with load_adapter"
        )
    for path, adapter in adapters.items():
        for part in adapter.parts.values() if isinstance(adapter, ExpertsAdapter) else [adapter]:
            _give_memory(part, device or layers[path].like.device)
        adapter.requires_grad_(False).eval()
    for shared in config.shared_tensors(adapters).values():
        _give_memory(shared, device or next(iter(layers.values())).like.device)
        if not shared.state_dict():
            shared.draw()
    fill(injection, tensors, source)
    return adapters


def _detached(form: Form, base_bias: Tensor | None) -> Form:
    """The form without a graph; tensors that are one stay one, and the base layer's bias stays itself."""
    plain: dict[int, Tensor] = {} if base_bias is None else {id(base_bias): base_bias}

    def detached(part: T) -> T:
        return plain.setdefault(id(part), part.detach()) if isinstance(part, Tensor) else part  # type: ignore[return-value]

    return form._replace(**{name: detached(part) for name, part in form._asdict().items()})


def check_finite(forms: Mapping[str, AdapterForm | ExpertForm]) -> None:
    """Raises ValueError for a form that is not finite, though all that it is made of is."""
    checked: set[tuple[int, torch.Size]] = set()  # VeRA's layers share most of theirs
    for path, form in forms.items():
        for name, part in form._asdict().items():
            if isinstance(part, Tensor):
                key = (part.data_ptr(), part.shape)
                finite = key in checked or bool(torch.isfinite(part).all())
                checked.add(key)
            else:
                finite = part is None or math.isfinite(part)
            if not finite:
                raise ValueError(
                    f"{path} gets NaN or infinite values in {name}: a scale is too large, or a magnitude is divided by "
                    "the norm of a row of zeros; save the adapter again"
                )


class CheckedAdapter(NamedTuple):
    """What both files of an adapter turned out to be: the adapters by module path, filled, over their layers."""

    config: AdapterConfig
    layers: dict[str, AdapterLayer]
    adapters: dict[str, Adapter]
    identity: str
    bytes: int


def check_adapter(
    model: nn.Module,
    directory: Path,
    modules: Mapping[str, nn.Module],
    *,
    root: str | os.PathLike[str] | None,
    limits: Limits,
    device: torch.device | None = None,
) -> CheckedAdapter:
    """Reads the directory for these modules, as `read_adapter` says. device: of the adapters, by default the layers'.

    Raises ValueError and OSError for whatever is wrong; it is to be called inside of `refused` and `time_limit`.
    """
    config_file, tensor_file = directory / CONFIG_FILE, directory / TENSOR_FILE

    try:
        config_content, found = of_one_save(
            partial(content, config_file, limits.max_config_bytes, root),
            partial(tensor_content, tensor_file, limits, root),
            partial(tensor_stamp, directory),
        )
    except FileNotFoundError:
        for name in (CONFIG_FILE, TENSOR_FILE):
            check_present(directory, name)
        raise
    if len(config_content) > limits.max_config_bytes:
        raise ValueError(f"{tensor_file} may hold a config of {limits.max_config_bytes} bytes")
    size = len(config_content) + len(found.content)
    # The length keeps a byte that moves from one file to the other from going unseen.
    identity = hashlib.sha256(len(config_content).to_bytes(8, "little"))
    identity.update(config_content)
    identity.update(found.content)
    fields = parse_fields(config_content, config_file)
    config, unknown = parse_config(fields, config_file)
    check_fields(fields, limits)
    if unknown:
        raise ValueError(
            f"{config_file} must hold only fields that fastadapt knows, got {', '.join(unknown)}: they may "
            "change what the adapter computes; merge it with the library that wrote it, or take them out"
        )
    config = with_experts(model, config, modules)
    _refuse_unserved(config, modules)
    layers = _selected(model, config, modules, limits)
    tensors = parse_tensors(found, tensor_file)
    del found
    adapters = _filled(config, fields, layers, tensors, tensor_file, modules, output_head(model), device)
    return CheckedAdapter(config, layers, adapters, identity.hexdigest(), size)


def served_form(path: str, config: AdapterConfig, adapter: Adapter, weight: Tensor, bias: Tensor | None) -> AdapterForm:
    """The adapter's form, detached. Raises ValueError for one that no batch of many adapters computes."""
    with torch.no_grad():
        form = adapter.form(weight, bias)
    if form.U is not None:
        raise ValueError(
            f"{config.peft_type} scales every weight of {path} by itself, which tokens of other adapters "
            "cannot share: merge it, or serve it alone"
        )
    return _detached(form, bias)


def _expert_forms(path: str, layer: AdapterExperts, adapter: Any) -> dict[str, ExpertForm]:
    """The forms of the weights that it adapts, by the path of each, detached, with DoRA's g of its norm."""
    found = {}
    with torch.no_grad():
        for name in adapter.parts:
            weight, bias = layer.weight(name), layer.bias(name)
            found[f"{path}.{name}"] = _detached(adapter.part(name).expert_form(weight, bias), bias)
    return found


def read_adapter(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    root: str | os.PathLike[str] | None = None,
    limits: Limits = DEFAULT_LIMITS,
    modules: Mapping[str, nn.Module] | None = None,
) -> LoadedAdapter:
    """The adapter in a PEFT directory, as forms for the layers of `model`, which is not changed.

    What is hashed is what is parsed: the content of both files of one save, see `of_one_save`. root: the directory that
    they must lie in, symlinks resolved; None where the caller answers for `directory`, whose links are then followed.
    modules: the model's modules by path as they were before any was wrapped to serve adapters; by default
    `targets.base_modules`.
    Forms have the dtype that `load_adapter` gives them: fp32 beside a 16-bit weight.
    Raises AdapterError for whatever is wrong with the adapter, ValueError for a merged model.
    """
    check_unmerged(adapter_layers(model).values(), "reading an adapter for it")
    modules = base_modules(model) if modules is None else modules
    path = Path(directory)
    with refused(path), time_limit(limits.max_pattern_seconds):
        found = check_adapter(model, path, modules, root=root, limits=limits)
        forms: dict[str, AdapterForm] = {}
        experts: dict[str, ExpertForm] = {}
        for name, adapter in found.adapters.items():
            layer = found.layers[name]
            if isinstance(layer, AdapterExperts):
                experts |= _expert_forms(name, layer, adapter)
                continue
            form = served_form(name, found.config, adapter, layer.weight_for(adapter.reads), layer.base_bias)
            if isinstance(layer, AdapterParameter) and form.bias is not layer.base_bias:
                raise ValueError(f"the bias of {name} is trained, and no batch of many adapters has one for each there")
            forms[name] = form
        check_finite({**forms, **experts})
    shared = found.config.shared_factors(found.adapters)
    return LoadedAdapter(found.config, forms, shared, found.identity, found.bytes, experts)
