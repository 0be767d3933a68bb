"""The two files of a PEFT directory, strictly: untrusted, bounded, never executed."""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from ..checks import printable, shown
from ..files import DRAFTS
from ..methods import METHODS, AdapterConfig
from .untrusted import DEFAULT_LIMITS, HEADER_BYTES, Limits, check_fields, content, tensor_content

CONFIG_FILE = "adapter_config.json"


TENSOR_FILE = "adapter_model.safetensors"


PICKLES = ("adapter_model.bin", "adapter_model.pt")


# What the dtypes that an adapter can have are called in a safetensors file.
DTYPES = ("F16", "BF16", "F32", "F64")


# Fields of PEFT's files that say nothing about the function once the adapter is trained.
_SILENT_FIELDS = {
    "auto_mapping",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "loftq_config",
    "lora_ga_config",
    "megatron_core",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "runtime_config",
}


def check_present(directory: str | os.PathLike[str], name: str) -> None:
    """Raises FileNotFoundError where a directory does not hold that one of its two files, ValueError where it holds
    something else by that name, or a pickle in the place of the tensors."""
    path = Path(directory, name)
    if path.is_file():
        return
    if os.path.lexists(path):
        raise ValueError(f"{path} must be a regular file")
    pickles = [pickle for pickle in PICKLES if name == TENSOR_FILE and Path(directory, pickle).exists()]
    if pickles:
        raise ValueError(
            f"{Path(directory, pickles[0])} is a pickle, which can run code when it is loaded: convert it to "
            f"{TENSOR_FILE} with PEFT's save_pretrained(safe_serialization=True)"
        )
    drafts = sorted(found.name for found in Path(directory).glob(f"{DRAFTS}*"))
    killed = f"; {', '.join(drafts)} in it has what a killed save left, the old files and the new" if drafts else ""
    raise FileNotFoundError(
        f"{path} does not exist: an adapter directory holds {CONFIG_FILE} and {TENSOR_FILE}{killed}"
    )


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{shown(name)} is there twice")
        found[name] = value
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")


def _json(text: bytes) -> Any:
    """The value that JSON text stands for. Raises ValueError for text that another reader could read otherwise."""
    try:
        return json.loads(text.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def parse_fields(content: bytes, path: Path) -> dict[str, Any]:
    """The fields that the content of an adapter_config.json, which is at `path`, holds.

    Raises ValueError for JSON that is broken or holds no object.
    """
    try:
        fields = _json(content)
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(fields).__name__}")
    return fields


def read_fields(directory: str | os.PathLike[str], limits: Limits = DEFAULT_LIMITS) -> dict[str, Any]:
    """The fields of a PEFT directory's adapter_config.json, whatever they say.

    Raises FileNotFoundError where there is none, ValueError for JSON that is broken or holds no object.
    """
    check_present(directory, CONFIG_FILE)
    path = Path(directory, CONFIG_FILE)
    return parse_fields(content(path, limits.max_config_bytes), path)


def method_of(fields: Mapping[str, Any]) -> type[AdapterConfig]:
    """The config class of the method that these fields name. Raises ValueError for one that fastadapt does not have."""
    peft_type = fields.get("peft_type")
    if not isinstance(peft_type, str) or peft_type not in METHODS:
        raise ValueError(f"peft_type {shown(peft_type)} is not supported: fastadapt loads {', '.join(METHODS)}")
    return METHODS[peft_type]


def parse_config(fields: dict[str, Any], path: Path) -> tuple[AdapterConfig, list[str]]:
    """The config that the fields of the file at `path` describe, and the names of those that fastadapt does not know
    and that say something.

    Raises ValueError for a peft_type that fastadapt does not have or a field that changes what the adapter computes and
    is not supported.
    """
    try:
        config = method_of(fields).from_peft(fields)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error
    known = {*vars(config), *type(config).neutral_fields, *_SILENT_FIELDS}
    unknown = [name for name, value in fields.items() if name not in known and value not in (None, False, {}, [])]
    return config, sorted(unknown)


def read_config(directory: str | os.PathLike[str], limits: Limits = DEFAULT_LIMITS) -> AdapterConfig:
    """The config of a PEFT directory. Raises as `read_fields`, `check_fields` and `parse_config` do."""
    path = Path(directory, CONFIG_FILE)
    fields = read_fields(directory, limits)
    config, unknown = parse_config(fields, path)
    check_fields(fields, limits)
    if unknown:
        names = printable(", ".join(unknown))
        warnings.warn(f"{path}: ignored fields that fastadapt does not know: {names}", stacklevel=3)
    return config


def parse_header(content: bytes, path: Path, max_tensors: int | None = None) -> dict[str, Any]:
    """What the header of a safetensors file, which is at `path`, says of each tensor: {name: its dtype and shape}.

    Raises ValueError for one that is broken, has more than max_tensors entries, or tells of other than floating-point
    numbers of 16, 32 or 64 bits.
    """
    start = 8
    length = int.from_bytes(content[:start], "little")
    try:
        if len(content) < start + length:
            raise ValueError(f"its header should have {length} bytes, and all of it has {len(content)}")
        if max_tensors is not None and length > max_tensors * HEADER_BYTES:
            raise ValueError(f"its header may have {max_tensors * HEADER_BYTES} bytes, got {length}")
        header = _json(content[start : start + length])
        if not isinstance(header, dict):
            raise ValueError(f"its header must be a JSON object, got {type(header).__name__}")
    except ValueError as error:
        raise ValueError(f"{path} is not a valid safetensors file: {error}") from error
    header.pop("__metadata__", None)
    if max_tensors is not None and len(header) > max_tensors:
        raise ValueError(f"{path} may hold {max_tensors} tensors, got {len(header)}")
    for name, entry in header.items():
        dtype, shape = (entry.get(key) if isinstance(entry, dict) else None for key in ("dtype", "shape"))
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise ValueError(
                f"{path}: {name} must hold floating-point numbers, {', '.join(DTYPES)}, got {shown(dtype)}"
            )
        sizes = shape if isinstance(shape, list) and all(type(size) is int and size >= 0 for size in shape) else None
        # A tensor without elements may claim any other size.
        if sizes is None or math.prod(max(size, 1) for size in sizes) > 2**62:
            raise ValueError(f"{path}: {name} must have a list of sizes for its shape, got {shown(shape)}")
    return header


def parse_tensors(content: bytes, path: Path, max_tensors: int | None = None) -> dict[str, Tensor]:
    """The tensors that the content of a safetensors file, which is at `path`, holds, on the CPU and in its order.

    Raises ValueError as `parse_header` does, for a broken file and for a tensor that is not finite.
    """
    header = parse_header(content, path, max_tensors)
    try:
        loaded = load(content)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a valid safetensors file: {error}") from error
    tensors = {name: loaded[name] for name in header}  # safetensors gives them in any order
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{path}: {name} has NaN or infinite values: the adapter is damaged, save it again")
    return tensors


def read_tensors(directory: str | os.PathLike[str], limits: Limits = DEFAULT_LIMITS) -> dict[str, Tensor]:
    """The tensors of a PEFT directory, on the CPU.

    Raises FileNotFoundError where there are none, ValueError for a pickle and as `parse_tensors` does.
    """
    check_present(directory, TENSOR_FILE)
    path = Path(directory, TENSOR_FILE)
    return parse_tensors(tensor_content(path, limits), path, limits.max_tensors)
