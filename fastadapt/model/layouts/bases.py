"""The modules of a base model as its files name them, found without loading it: the headers of its weights tell."""

from __future__ import annotations

import os
from pathlib import Path

from ..untrusted import Limits, tensor_header
from .names import Names

# Nothing but headers is read, of files of any size.
_LIMITS = Limits(max_file_bytes=2**63)


def base_names(place: str | os.PathLike[str]) -> dict[str, Names]:
    """The modules with a weight that an adapter can go to, by component of a pipeline; "" for a single model.

    place: a safetensors file, a directory of them, or a pipeline's, which has a directory for each component. Raises
    ValueError where there are none, or one is broken.
    """
    path = Path(place)
    if path.is_file():
        return {"": _names([path])}
    files = sorted(path.glob("*.safetensors"))
    if files:
        return {"": _names(files)}
    found = {folder.parent.name: sorted(folder.parent.glob("*.safetensors")) for folder in path.glob("*/*.safetensors")}
    if not found:
        raise ValueError(
            f"{path} must be a safetensors file of the base model, the directory of one, or a pipeline's with a "
            "directory for each component, and none is there: names are read from its weights"
        )
    return {component: _names(files) for component, files in sorted(found.items())}


def _names(files: list[Path]) -> Names:
    paths: list[str] = []
    for file in files:
        for name, entry in tensor_header(file, _LIMITS).tensors.items():
            shape = entry.get("shape") if isinstance(entry, dict) else None
            if name.endswith(".weight") and isinstance(shape, list) and len(shape) in (2, 4):
                paths.append(name.removesuffix(".weight"))
    return Names(paths, str(files[0].parent))
