"""Files of other libraries for a model that is there: the component that it is, its modules, and the config."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from torch import Tensor, nn

from ...methods import AdapterConfig
from ..peft_files import known_config
from ..targets import base_modules, selection_of
from ..untrusted import Limits
from ..wrappers import inside
from .layout import Component, Layer
from .names import Names
from .source import Source, read_source, spelled


class Read(NamedTuple):
    """An adapter for a model, with its tensors by PEFT's names, and the components of the file that are left."""

    config: AdapterConfig
    tensors: dict[str, Tensor]
    others: list[str]


def read_for_model(model: nn.Module, file: Path, component: str | None, limits: Limits) -> Read:
    """What a file of another library holds for this model.

    component: which part of a pipeline the model is; None finds it by the names of its modules, and by their shapes
    where that is not enough. Raises ValueError for a file that is broken, and where no component or more than one is
    for this model.
    """
    source = read_source(file, limits)
    modules = {path: getattr(module, "base_layer", module) for path, module in base_modules(model).items()}
    # What only holds others takes no adapter, and its flat name could be a layer's.
    layers = [path for path, module in modules.items() if next(module.children(), None) is None]
    names = Names(layers, type(inside(model)).__name__)
    chosen = _component(source, component, names, modules)
    found = spelled(
        source,
        chosen,
        names,
        lambda paths: selection_of(model, paths),
        lambda path: isinstance(modules[path], nn.Embedding),
    )
    config = known_config(found.fields, file, limits)
    return Read(config, found.tensors, [name for name in source.components if name != chosen])


def _component(source: Source, wanted: str | None, names: Names, modules: dict[str, nn.Module]) -> str:
    there = [*source.components]
    if wanted is not None:
        if wanted not in there:
            raise ValueError(
                f"component must be one of those of {source.path}, {', '.join(map(repr, there))}, got {wanted!r}"
            )
        return wanted
    if len(there) == 1:
        return there[0]
    found = [name for name in there if _is_for(source, source.components[name], names, None)]
    if len(found) > 1:
        found = [name for name in found if _is_for(source, source.components[name], names, modules)]
    if len(found) != 1:
        say = f"{', '.join(found)} are" if found else "none is"
        raise ValueError(
            f"{source.path} holds {', '.join(there)}, and of these {say} for this {names.owner} by the names and "
            "shapes of its modules: say which, component=..."
        )
    return found[0]


def _is_for(source: Source, layers: Component, names: Names, modules: dict[str, nn.Module] | None) -> bool:
    """Whether the model has all modules of a component; with modules, whether their sizes agree too."""
    for module, layer in layers.items():
        try:
            path = names.find(module, flattened=source.layout.flat)
        except ValueError:
            return False
        if modules is not None and not _fits(layer, modules[path]):
            return False
    return True


def _fits(layer: Layer, module: nn.Module) -> bool:
    inputs, outputs = getattr(module, "in_features", None), getattr(module, "out_features", None)
    weight = getattr(module, "weight", None)
    if "A" not in layer or (inputs is None and not isinstance(weight, Tensor)):
        return True
    A, B = layer["A"].tensor, layer["B"].tensor
    if inputs is not None:
        return A.dim() == 2 and (A.shape[1], B.shape[0]) == (inputs, outputs)
    return isinstance(weight, Tensor) and sorted(weight.shape) == sorted((*A.shape[1:], B.shape[0]))
