"""An adapter of another library: where it lies, whose layout it is in, told from the names of its tensors, and what it
comes to in PEFT's spelling."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ...checks import shown
from ..peft_files import CONFIG_FILE, TENSOR_FILE, parse_fields, parse_tensors
from ..untrusted import DEFAULT_LIMITS, Limits, content, tensor_content
from . import diffusers, mlx
from .diffusers import DIFFUSERS, metadata_fields
from .kohya import KOHYA
from .layout import Component, Layout, Spelled, components_of, listed, lora_fields, peft_tensors
from .mlx import MLX
from .names import Names

# PEFT's own names, which mean nothing without the config beside them.
PEFT = Layout("PEFT", re.compile(r"^base_model\."), lambda name: None)

# A name is of the first layout whose mark it has.
LAYOUTS = (KOHYA, PEFT, MLX, DIFFUSERS)


class Source(NamedTuple):
    """What a file of another library holds.

    path: of the file with the tensors. components: the layers of each component of a pipeline, with the modules as the
    file spells them; "" is the only one of a file that names none. fields: of an adapter_config.json, by component, as
    far as the file has them.
    """

    path: Path
    layout: Layout
    components: dict[str, Component]
    fields: dict[str, dict[str, Any]]


def foreign_file(place: str | os.PathLike[str]) -> Path | None:
    """The file with the tensors of an adapter of another library, at this path or in this directory; None for PEFT's.

    Raises ValueError for a directory with the files of more than one library, none of them PEFT's.
    """
    path = Path(place)
    if path.is_file():
        return path
    there = [path / name for name in (diffusers.FILE, mlx.FILE) if (path / name).is_file()]
    if not there or os.path.lexists(path / TENSOR_FILE):
        return None
    if len(there) > 1:
        raise ValueError(
            f"{path} must hold one adapter, got {' and '.join(file.name for file in there)}: name the file"
        )
    return there[0]


def layout_of(names: Mapping[str, object], source: Path) -> Layout:
    """Whose layout the names of a file's tensors are in. Raises ValueError for none, more than one, and PEFT's."""
    found: dict[str, tuple[Layout, str]] = {}
    for name in names:
        layout = next((layout for layout in LAYOUTS if layout.mark.search(name)), None)
        if layout is not None:
            found.setdefault(layout.title, (layout, name))
    if not found:
        first = f", got {shown(next(iter(names)))}" if names else ", got no tensors"
        raise ValueError(
            f"{source} must hold an adapter in the layout of {listed(layout.title for layout in LAYOUTS)}{first}: save "
            "it with one of these libraries"
        )
    if len(found) > 1:
        which = " and ".join(f"{shown(name)} ({title})" for title, (_, name) in found.items())
        raise ValueError(f"{source} must hold tensors of one layout, got {which}: keep them in files of their own")
    ((layout, _),) = found.values()
    if layout is PEFT:
        raise ValueError(
            f"{source} holds an adapter in PEFT's layout, which needs its {CONFIG_FILE}: give the directory that holds "
            f"that and {TENSOR_FILE}"
        )
    return layout


def read_source(file: Path, limits: Limits = DEFAULT_LIMITS) -> Source:
    """What a file of another library holds, strictly: every tensor has a place, pairs are whole, shapes go together.

    Raises ValueError for anything else, OSError where it cannot be read.
    """
    found = tensor_content(file, limits)
    tensors = parse_tensors(found, file, counts=True)
    layout = layout_of(tensors, file)
    if layout is MLX:
        tensors = mlx.turned(tensors, file)
    components = components_of(layout, tensors, file)
    fields: dict[str, dict[str, Any]] = {}
    if layout is MLX:
        config = file.with_name(CONFIG_FILE)
        if not config.is_file():
            raise FileNotFoundError(f"{config} does not exist: it says the scale of MLX's {file.name}")
        said = parse_fields(content(config, limits.max_config_bytes), config)
        components = {name: mlx.with_scale(layers, said, config) for name, layers in components.items()}
    if layout is DIFFUSERS:
        fields = metadata_fields(found.header.metadata, components, file, limits)
        _check_alphas(components, fields, file)
    return Source(file, layout, components, fields)


def _check_alphas(components: Mapping[str, Component], fields: Mapping[str, object], source: Path) -> None:
    """Raises ValueError for scales that diffusers itself reads in one way here and in another there."""
    for name, layers in components.items():
        having = [module for module, layer in layers.items() if "alpha" in layer]
        if having and name in fields:
            raise ValueError(
                f"{source}: the scale must be said once, and both {shown(layers[having[0]]['alpha'].name)} and the "
                f"metadata ({diffusers.METADATA}) say it: take one of them out"
            )
        if having and len(having) < len(layers):
            lacking = next(module for module in layers if module not in having)
            raise ValueError(
                f"{source}: all modules of {name or 'the file'} must have an alpha or none, got one for "
                f"{shown(having[0])} and none for {shown(lacking)}: save the adapter again"
            )


def spelled(
    source: Source,
    component: str,
    names: Names | None,
    selection: Callable[[list[str]], Mapping[str, Any]],
    is_embedding: Callable[[str], bool],
) -> Spelled:
    """One component of the file as a PEFT adapter.

    names: the model's modules; None where there is no model, and the file's whole paths are the model's. selection: the
    fields of a config that selects modules by path. is_embedding: whether the module at a path is one. Raises
    ValueError for modules that the model does not have or has more than one of by that name, and where a layout without
    whole paths has no model to look them up in.
    """
    layers: Component = {}
    for module, layer in source.components[component].items():
        path = module
        if names is not None:
            try:
                path = names.find(module, flattened=source.layout.flat)
            except ValueError as error:
                raise ValueError(f"{source.path}: {error}") from None
        if path in layers:
            first = next(iter(layers[path].values())).name
            second = next(iter(layer.values())).name
            raise ValueError(f"{source.path}: {shown(first)} and {shown(second)} are both of {path}: take one out")
        layers[path] = mlx.as_embedding(layer) if source.layout is MLX and is_embedding(path) else layer
    fields = source.fields.get(component)
    if fields is None:
        fields = lora_fields(layers, source.path, selection([*layers]))
    elif fields.get("peft_type") != "LORA":
        raise ValueError(f"{source.path}: peft_type must be LORA in a file of LoRAs, got {shown(fields['peft_type'])}")
    return Spelled(fields, peft_tensors(layers))
