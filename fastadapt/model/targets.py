"""Which modules of a model an adapter goes into: PEFT's rules."""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Iterable, Mapping
from itertools import accumulate
from typing import Any

from torch import nn

from ..layers.experts import AdapterExperts, parameter_keys
from ..layers.kinds import AdapterModule, AdapterParameter
from ..layers.layer import AdapterLayer
from ..layers.linear import AdapterLinear
from ..layers.saved import ModuleToSave
from ..layers.siblings import groups
from ..layers.ways import is_packed_linear
from ..methods import AdapterConfig, patterns
from ..methods.config import path_suffixes
from .bypassed import expert_weights, why_refused
from .wrappers import inside

# The usual attention projections, by transformers' model_type.
DEFAULT_TARGETS: dict[str, list[str] | str] = {
    "bert": ["query", "value"],
    "bloom": ["query_key_value"],
    "deberta-v2": ["query_proj", "value_proj"],
    "distilbert": ["q_lin", "v_lin"],
    "falcon": ["query_key_value"],
    "gemma": ["q_proj", "v_proj"],
    "gemma2": ["q_proj", "v_proj"],
    "gpt2": ["c_attn"],
    "gpt_neox": ["query_key_value"],
    "llama": ["q_proj", "v_proj"],
    "mistral": ["q_proj", "v_proj"],
    "mixtral": ["q_proj", "v_proj"],
    "opt": ["q_proj", "v_proj"],
    "phi3": ["qkv_proj"],
    "qwen2": ["q_proj", "v_proj"],
    "qwen3": ["q_proj", "v_proj"],
    "roberta": ["query", "value"],
    "t5": ["q", "v"],
    "vit": r".*\.(query|value|q_proj|v_proj)",  # before transformers 5 and from it on
}


def base_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The model's modules by path as they were before any injection: an adapter layer stands for its base layer.

    A module that is registered at several paths has the first of them, as in named_modules().
    """
    modules: dict[str, nn.Module] = {}
    seen: set[int] = set()

    def visit(path: str, module: nn.Module) -> None:
        if id(module) in seen:
            return
        seen.add(id(module))
        if path:
            modules[path] = module
        if isinstance(module, AdapterModule):  # what is inside has its own path still
            module = module.base_layer
        if isinstance(module, (AdapterLayer, ModuleToSave)):
            return
        for name, child in module.named_children():
            visit(f"{path}.{name}" if path else name, child)

    visit("", inside(model))
    return modules


def selection_of(model: nn.Module, paths: list[str]) -> dict[str, Any]:
    """The fields of a config that selects just the modules at these paths."""
    chosen = set(paths)
    if not any(path not in chosen and chosen.intersection(path_suffixes(path)) for path in base_modules(model)):
        return {"target_modules": paths}
    # A name in a list also matches every path that ends in it; a regular expression must match the whole.
    pattern = "|".join(map(re.escape, paths))
    return {"target_modules": pattern, "layers_to_transform": None, "layers_pattern": None}


def modules_of(layers: Mapping[str, AdapterLayer], paths: Iterable[str]) -> list[str]:
    """Those of the paths that target_modules can name: not the routers, whose weights are parameters."""
    return [path for path in paths if not isinstance(layers[path], AdapterParameter)]


def _base(module: nn.Module) -> nn.Module:
    return module.base_layer if isinstance(module, AdapterLayer) else module


def is_linear(module: nn.Module) -> bool:
    base = _base(module)
    return isinstance(base, nn.Linear) or type(base).__name__ == "Conv1D" or is_packed_linear(base)


def ends_of(path: str) -> list[str]:
    """What a list of names may hold to mean this path."""
    return [path, *path_suffixes(path)]


def _suffix_match(path: str, names: Collection[str]) -> bool:
    return any(end in names for end in ends_of(path))


def _excluded(path: str, exclude: Collection[str]) -> bool:
    if not exclude:
        return False
    if isinstance(exclude, str):
        return patterns.fullmatch("exclude_modules", exclude, path) is not None
    return _suffix_match(path, exclude)


def is_excluded(path: str, config: AdapterConfig) -> bool:
    """Whether config.exclude_modules leaves out the module at this path, or the one that it is inside of."""
    exclude = config.exclude_modules or []
    parts = path.split(".")
    paths = [".".join(parts[: end + 1]) for end in range(len(parts))]
    return any(_excluded(part, exclude if isinstance(exclude, str) else set(exclude)) for part in paths)


def layer_indices(config: AdapterConfig) -> set[int]:
    """Those of layers_to_transform; none means all."""
    layers = config.layers_to_transform
    return {layers} if isinstance(layers, int) else set(layers or [])


def is_listed(path: str, names: Collection[str], config: AdapterConfig, indices: Collection[int]) -> bool:
    """Whether a list of names takes the module at this path: by the whole of it, or by its end in one of the layers
    with these `indices`."""
    return path in names or (_suffix_match(path, names) and _in_layers(path, config, indices))


def _in_layers(path: str, config: AdapterConfig, indices: Collection[int]) -> bool:
    """Whether the path's layer index is among `indices`, those of layers_to_transform; none of them means all."""
    if not indices:
        return True
    names = [config.layers_pattern] if isinstance(config.layers_pattern, str) else config.layers_pattern
    # The lazy match finds the first index: an expert's own comes later.
    template = r"(?:^|.*?\.){}\.(?P<index>\d+)\." if names else r".*?\.{}\.(?P<index>\d+)\."
    for name in names or [r"[^.]*"]:
        found = patterns.match("layers_pattern", name, path, template)
        if found is not None and found["index"] is not None:  # a pattern may have a | of its own
            return int(found["index"]) in indices
    return False


def found_names(paths: Iterable[str], config: AdapterConfig) -> list[str]:
    """The names in modules_to_save that one of the module paths ends in, which is how PEFT finds them; each once."""
    names = dict.fromkeys(config.modules_to_save or [])
    lengths = {len(name) for name in names}  # a file may hold very many names
    ends = {path[len(path) - length :] for path in paths for length in lengths if length <= len(path)}
    return [name for name in names if name in ends]


def saved_whole(paths: Collection[str], config: AdapterConfig) -> set[str]:
    """Those of the paths that are modules_to_save or inside one: by their end, or by PEFT's rule for targets.

    The rules differ where a path ends in a name without a dot before it, as DistilBERT's pre_classifier does: PEFT
    trains it whole, and fails where it is a target too.
    """
    names = config.modules_to_save or []
    ends = tuple(found_names(paths, config))
    tops = {path for path in paths if path.endswith(ends)}

    def whole(path: str) -> bool:
        if tops and not tops.isdisjoint(accumulate(path.split("."), "{}.{}".format)):
            return True
        return any(patterns.match("modules_to_save", name, path, r"(^|.*\.){}($|\..*)") for name in names)

    return {path for path in paths if whole(path)}


def output_head(model: nn.Module) -> nn.Module | None:
    """The module that gives a transformers model's logits, without what is around it; None where it has none."""
    get = getattr(inside(model), "get_output_embeddings", None)
    head = get() if callable(get) else None
    return getattr(head, "base_layer", head)  # it may be wrapped


def target_paths(
    model: nn.Module,
    config: AdapterConfig,
    *,
    every_name: bool = True,
    modules: Mapping[str, nn.Module] | None = None,
) -> list[str]:
    """The paths of the modules that `config` adapts, in the model's order.

    A list of names matches whole paths or their last parts; a string is a regular expression for the whole path;
    "all-linear" takes every Linear and Conv1D but the output head and those of which `why_refused` tells why not; None
    takes the architecture's usual projections.
    modules: the model's modules by path as they were before any of them was wrapped; by default `base_modules`.
    Raises ValueError when the whole selection matches nothing or, with `every_name`, one name of the list, and for a
    regular expression that is none or takes too long.
    """
    model = inside(model)
    modules = base_modules(model) if modules is None else modules
    targets, parameters = config.target_modules, parameter_targets(modules, config, every_name=every_name)
    if targets is None and parameters:
        targets = []
    if targets is None:
        model_type = getattr(getattr(model, "config", None), "model_type", None)
        usual = config.usual_targets()
        defaults = usual or DEFAULT_TARGETS
        if model_type not in defaults:
            raise ValueError(
                f"target_modules must be given for architecture {model_type!r}: name the layers"
                + ("" if usual else ", or take 'all-linear'")
            )
        targets = defaults[model_type]
    exclude = config.exclude_modules if isinstance(config.exclude_modules, str) else set(config.exclude_modules or [])
    whole = saved_whole(modules, config)
    paths = [path for path in modules if path not in whole and not _excluded(path, exclude)]
    if not targets and not parameters:
        raise ValueError("target_modules is empty: name the layers, or take 'all-linear'")
    if isinstance(targets, str):
        if targets.lower() == "all-linear":
            head = output_head(model)
            linear = [path for path in paths if is_linear(modules[path]) and _base(modules[path]) is not head]
            chosen = [path for path in linear if not why_refused(path, modules)]
        else:
            chosen = [path for path in paths if patterns.fullmatch("target_modules", targets, path)]
        missing = [] if chosen else [targets]
    else:
        # Sets: a file may hold very many names.
        known = {end for path in modules for end in ends_of(path)}
        missing = [name for name in targets if name not in known]
        if not every_name and len(missing) < len(targets):
            missing = []
        wanted, indices = set(targets), layer_indices(config)
        chosen = [path for path in paths if is_listed(path, wanted, config, indices)]
        if not chosen and not missing:
            missing = [] if parameters else list(targets)
    if missing and not (parameters and not every_name):
        kinds = sorted({path.rsplit(".", 1)[-1] for path in modules if is_linear(modules[path])})
        raise ValueError(
            f"target_modules: nothing in {type(model).__name__} matches {', '.join(map(repr, missing))}"
            " (after exclude_modules, layers_to_transform and modules_to_save); its linear layers are called "
            f"{', '.join(kinds)}{_parameters_called(missing, modules)}"
        )
    return [path for path in modules if path in {*chosen, *parameters}] if parameters else chosen


def _parameters_called(names: Iterable[str], modules: Mapping[str, nn.Module]) -> str:
    """What there is to add where some of the names are those of experts' weights."""
    weights = expert_weights(modules)
    found = [name for name in names if any(path.endswith(f".{name}") for path in weights)]
    return f"; {', '.join(found)}: weights of experts go into target_parameters" if found else ""


def parameter_targets(
    modules: Mapping[str, nn.Module], config: AdapterConfig, *, every_name: bool = True
) -> dict[str, list[str]]:
    """The names of the parameters that config.target_parameters names, by the paths of their modules.

    modules: the model's by path, as they were before any of them was wrapped. Raises ValueError where a name, or with
    `every_name` False all of them, matches nothing of two or three dimensions.
    """
    found: dict[str, list[str]] = {}
    names = config.target_parameters or ()
    keys: list[str] = []
    whole = saved_whole(modules, config) if names and config.modules_to_save else set()
    for path, module in modules.items():
        if names and path not in whole and not is_excluded(path, config):
            own = parameter_keys(path, _base(module))
            keys += own
            if chosen := [key.rpartition(".")[2] for key in own if config.names_parameter(key)]:
                found[path] = chosen
    missing = [name for name in names if not any(key == name or key.endswith(f".{name}") for key in keys)]
    if missing and (every_name or not found):
        raise ValueError(
            f"target_parameters: no parameter of two or three dimensions is called {', '.join(map(repr, missing))} "
            f"(after exclude_modules and modules_to_save); {_spelled(expert_weights(modules))}"
        )
    return found


def _spelled(weights: list[str]) -> str:
    """A sentence on the weights of experts at these paths."""
    names = list(dict.fromkeys(_starred(path) for path in weights))
    if any(".parametrizations." in path for path in weights):
        return f"the experts' weights are parametrized, as when they are quantised, and take no adapter: {names[0]}"
    if not names:
        return "no experts have weights that are stacked in one parameter"
    return f"the weights of experts are called {', '.join(names[:4])}"


def _starred(path: str) -> str:
    return re.sub(r"\.\d+\.", ".*.", path)


def warn_of_rest(modules: Mapping[str, nn.Module], config: AdapterConfig) -> None:
    """One warning that names what "all-linear" does not reach although it multiplies like a linear layer."""
    refused = {path: why_refused(path, modules) for path, module in modules.items() if is_linear(module)}
    rest = [*expert_weights(modules), *(path for path, why in refused.items() if why)]
    whole = saved_whole(modules, config)
    rest = [path for path in rest if not is_excluded(path, config) and not config.names_parameter(path)]
    rest = [path for path in rest if path not in whole and path.rpartition(".")[0] not in whole]
    if rest:
        takes = AdapterExperts in config.layer_kinds
        names = dict.fromkeys(_starred(path) for path in rest)
        warnings.warn(
            f'target_modules="all-linear" adapts no {", ".join(names)}: expert weights that are stacked in one tensor '
            f"{'have to be named in target_parameters' if takes else 'take none of this method'}, and layers whose "
            "forward does not run, gives a tuple or has a matrix for each group take no adapter",
            stacklevel=4,
        )


def saved_paths(model: nn.Module, config: AdapterConfig, *, needs_head: bool = True) -> list[str]:
    """The paths of modules_to_save: those that end in one of its names and are not inside another of them.

    Of the names that the task type brings the model need have only one, and none beside the user's own or without
    needs_head. Raises ValueError for any other name that matches nothing.
    """
    model = inside(model)
    modules = base_modules(model)
    names, found = config.modules_to_save or [], set(found_names(modules, config))
    for name in names:
        if name not in found and name not in config.task_heads:
            raise ValueError(f"modules_to_save: no module of {type(model).__name__} is called {name!r}")
    if names and not found and needs_head:
        raise ValueError(
            f"task_type {config.task_type} trains the model's head, and no module of {type(model).__name__} is called "
            f"{' or '.join(map(repr, names))}: name its head in modules_to_save, or leave task_type out to train none"
        )
    chosen: list[str] = []
    for path in modules:  # parents come first
        if path.endswith(tuple(found)) and not any(path.startswith(f"{parent}.") for parent in chosen):
            chosen.append(path)
    return chosen


def shared_inputs(model: nn.Module) -> list[list[AdapterLinear]]:
    """The adapter layers of `model` in groups that read the same input: see siblings.groups."""
    # An AdapterModule answers with its base layer's children, which come next.
    named = inside(model).named_modules()
    return groups(((path, part) for path, part in named if not isinstance(part, AdapterModule)), AdapterLinear)
