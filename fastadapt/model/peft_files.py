"""The two files of a PEFT directory, strictly: untrusted, bounded, never executed."""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from ..checks import printable, shown
from ..files import DRAFTS
from ..methods import METHODS, AdapterConfig
from ..methods.lora import DROPOUT
from .untrusted import (
    DEFAULT_LIMITS,
    Header,
    Limits,
    TensorFile,
    check_fields,
    content,
    strict_json,
    tensor_content,
    tensor_header,
)

CONFIG_FILE = "adapter_config.json"


TENSOR_FILE = "adapter_model.safetensors"


PICKLES = ("adapter_model.bin", "adapter_model.pt", "pytorch_lora_weights.bin")


# What the dtypes that an adapter can have are called in a safetensors file.
DTYPES = ("F16", "BF16", "F32", "F64")


# Those of a single number in other libraries' files beside these.
COUNTS = ("I32", "I64")


# What the metadata of a tensor file hold that fastadapt writes over another config's: the text of the config that goes
# with it, and the hash of that which was in its place. Without one the same adapter is the same bytes.
OWN_CONFIG, REPLACED = "fastadapt_config", "fastadapt_replaces"


# Fields of PEFT's files that say nothing about the function once the adapter is trained.
_SILENT_FIELDS = {
    "auto_mapping",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "loftq_config",
    "lora_ga_config",
    "megatron_core",
    "merge_weights",
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


def parse_fields(content: bytes, path: Path) -> dict[str, Any]:
    """The fields that the content of an adapter_config.json, which is at `path`, holds.

    Raises ValueError for JSON that is broken or holds no object.
    """
    try:
        fields = strict_json(content)
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(fields).__name__}")
    return fields


def of_one_save(
    read_config: Callable[[], bytes], read_tensors: Callable[[], TensorFile], stamp: Callable[[], object]
) -> tuple[bytes, TensorFile]:
    """The content of a directory's config and tensor file as one save wrote them, though it may be written meanwhile.

    A save of fastadapt replaces the tensors first and then the config, and tensors that replace another config's say
    which that was and which is theirs: where the old one is there still, theirs counts. One that was edited since
    counts as it is. Of the tensors the header is enough. stamp: what changes when the tensor file is replaced. Raises
    what the two readers do, and ValueError where a writer never ceases.
    """
    for _ in range(100):
        before = stamp()
        config, tensors = read_config(), read_tensors()
        own, replaced = (tensors.header.metadata.get(name) for name in (OWN_CONFIG, REPLACED))
        if own is not None and config == own.encode():
            return config, tensors
        if own is not None and replaced == hashlib.sha256(config).hexdigest():
            return own.encode(), tensors
        # Edited since, or never another one's; unless both have been replaced between the reads.
        if read_config() == config and stamp() == before:
            return config, tensors
    raise ValueError(
        f"{CONFIG_FILE} and {TENSOR_FILE} change each time that they are read: load them when all is saved"
    )


def tensor_stamp(directory: str | os.PathLike[str]) -> object:
    """What changes when a directory's tensor file is replaced; None where there is none."""
    with contextlib.suppress(OSError):
        status = Path(directory, TENSOR_FILE).stat()
        return status.st_ino, status.st_size, status.st_mtime_ns
    return None


def _config(directory: str | os.PathLike[str], limits: Limits) -> bytes:
    check_present(directory, CONFIG_FILE)
    return content(Path(directory, CONFIG_FILE), limits.max_config_bytes)


def _tensors(directory: str | os.PathLike[str], limits: Limits) -> TensorFile:
    check_present(directory, TENSOR_FILE)
    return tensor_content(Path(directory, TENSOR_FILE), limits)


def _beginning(directory: str | os.PathLike[str], limits: Limits) -> TensorFile:
    """The tensor file by its header alone; one that says nothing where there is none, or a broken one."""
    header = Header({}, {})
    with contextlib.suppress(OSError, ValueError):  # whoever reads the tensors is told
        header = tensor_header(Path(directory, TENSOR_FILE), limits)
    return TensorFile(b"", header)


def read_fields(directory: str | os.PathLike[str], limits: Limits = DEFAULT_LIMITS) -> dict[str, Any]:
    """The fields of a PEFT directory's adapter_config.json, whatever they say, as `of_one_save` finds it.

    Raises FileNotFoundError where there is none, ValueError for JSON that is broken or holds no object.
    """
    read = partial(_config, directory, limits), partial(_beginning, directory, limits)
    config, _ = of_one_save(*read, partial(tensor_stamp, directory))
    return parse_fields(config, Path(directory, CONFIG_FILE))


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
    known = {*vars(config), *type(config).neutral_fields, *_SILENT_FIELDS, DROPOUT}
    unknown = [name for name, value in fields.items() if name not in known and value not in (None, False, {}, [], "")]
    return config, sorted(unknown)


def read_config(directory: str | os.PathLike[str], limits: Limits = DEFAULT_LIMITS) -> AdapterConfig:
    """The config of a PEFT directory. Raises as `read_fields`, `check_fields` and `parse_config` do."""
    return known_config(read_fields(directory, limits), Path(directory, CONFIG_FILE), limits)


def known_config(fields: dict[str, Any], path: Path, limits: Limits) -> AdapterConfig:
    """The config that the fields of the file at `path` describe, which asks for no more than the limits.

    Warns of fields that fastadapt does not know. Raises ValueError as `parse_config` and `check_fields` do.
    """
    config, unknown = parse_config(fields, path)
    check_fields(fields, limits)
    if unknown:
        names = printable(", ".join(unknown))
        warnings.warn(f"{path}: ignored fields that fastadapt does not know: {names}", stacklevel=4)
    return config


class Parts(NamedTuple):
    """What a PEFT directory holds: the config, the fields of the file that says it, and the tensors."""

    config: AdapterConfig
    fields: dict[str, Any]
    tensors: dict[str, Tensor]


def read_directory(directory: str | os.PathLike[str], limits: Limits = DEFAULT_LIMITS) -> Parts:
    """What a PEFT directory holds, of one save. Raises as `read_config` and `read_tensors` do."""
    read = partial(_config, directory, limits), partial(_tensors, directory, limits)
    found, tensors = of_one_save(*read, partial(tensor_stamp, directory))
    config_path, tensor_path = Path(directory, CONFIG_FILE), Path(directory, TENSOR_FILE)
    fields = parse_fields(found, config_path)
    config = known_config(fields, config_path, limits)
    return Parts(config, fields, parse_tensors(tensors, tensor_path))


def check_header(header: Header, path: Path, *, counts: bool = False) -> None:
    """Raises ValueError where the header of the safetensors file at `path` tells of other than floating-point numbers
    of 16, 32 or 64 bits; counts: whether a tensor of one element may be a whole number.
    """
    for name, entry in header.tensors.items():
        dtype, shape = (entry.get(key) if isinstance(entry, dict) else None for key in ("dtype", "shape"))
        known = (*DTYPES, *COUNTS) if counts and shape in ([], [1]) else DTYPES
        if not isinstance(dtype, str) or dtype not in known:
            raise ValueError(
                f"{path}: {name} must hold floating-point numbers, {', '.join(DTYPES)}, got {shown(dtype)}"
            )
        sizes = shape if isinstance(shape, list) and all(type(size) is int and size >= 0 for size in shape) else None
        # A tensor without elements may claim any other size.
        if sizes is None or math.prod(max(size, 1) for size in sizes) > 2**62:
            raise ValueError(f"{path}: {name} must have a list of sizes for its shape, got {shown(shape)}")


def parse_tensors(file: TensorFile, path: Path, *, counts: bool = False) -> dict[str, Tensor]:
    """The tensors that the safetensors file at `path` holds, on the CPU and in its order.

    Raises ValueError as `check_header` does, for a broken file and for a tensor that is not finite.
    """
    check_header(file.header, path, counts=counts)
    try:
        loaded = load(file.content)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a valid safetensors file: {error}") from error
    tensors = {name: loaded[name] for name in file.header.tensors}  # safetensors gives them in any order
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{path}: {name} has NaN or infinite values: the adapter is damaged, save it again")
    return tensors


def read_tensors(directory: str | os.PathLike[str], limits: Limits = DEFAULT_LIMITS) -> dict[str, Tensor]:
    """The tensors of a PEFT directory, on the CPU.

    Raises FileNotFoundError where there are none, ValueError for a pickle and as `parse_tensors` does.
    """
    path = Path(directory, TENSOR_FILE)
    return parse_tensors(_tensors(directory, limits), path)
