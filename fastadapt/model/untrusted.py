"""Files of strangers: what an adapter may ask for, read so that no more is taken than that.

Whoever reads an adapter's directory comes by here: load_adapter, merge, info and the server.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from stat import S_ISREG
from typing import Any, NamedTuple

import torch

from ..checks import printable, shown

# How the file begins that git-lfs leaves in the place of one that was not fetched.
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"

# What torch says, in a RuntimeError, of sizes that there is no memory for or that no number counts.
_NO_ROOM = re.compile(r"alloc|out of memory|not enough memory|overflow|Storage size", re.IGNORECASE)

# Fields that say how large an adapter's tensors are, whatever its method.
_SIZES = ("r", "init_r", "target_r", "num_virtual_tokens", "prompts", "lora", "adapter")

# Those of a supernet, which may have another one in each block.
_OF_EACH_BLOCK = ("prompts", "lora", "adapter")

# More bytes than the header of a safetensors file has for one tensor.
HEADER_BYTES = 512


class AdapterError(ValueError):
    """An adapter that cannot be served, and why: what is wrong, what is required, what came, and the cure.

    adapter: its name or directory. It is an error of this adapter alone. What the files say is quoted in one line and
    not at length, so that it can be logged.
    """

    def __init__(self, adapter: str | os.PathLike[str], reason: str) -> None:
        self.adapter = one_line(str(adapter))
        self.reason = one_line(reason)
        super().__init__(f"adapter {self.adapter}: {self.reason}")

    def __reduce__(self) -> tuple[type[AdapterError], tuple[str, str]]:
        return AdapterError, (self.adapter, self.reason)


def one_line(text: str, longest: int = 600) -> str:
    """Text of a file as one line that can be shown and logged."""
    line = printable(text[: 10 * longest])
    return line if max(len(text), len(line)) <= longest else f"{line[: longest - 4]} ..."


class Limits(NamedTuple):
    """What one adapter may ask for.

    max_rank: of any layer. max_file_bytes: of the tensor file. max_config_bytes: of the config. max_tensors: in the
    file. max_metadata: entries of its metadata. max_pattern_seconds: for matching all regular expressions of the config
    with all modules.
    """

    max_rank: int = 512
    max_file_bytes: int = 4 * 2**30
    max_config_bytes: int = 2**20
    max_tensors: int = 65536
    max_metadata: int = 4096
    max_pattern_seconds: float = 5.0


DEFAULT_LIMITS = Limits()


@contextmanager
def refused(adapter: str | os.PathLike[str]) -> Iterator[None]:
    """Turns what a file can be refused for elsewhere, or do to those that read it, into AdapterError."""
    try:
        yield
    except AdapterError:
        raise
    except (ValueError, OverflowError) as error:
        raise AdapterError(adapter, str(error)) from error
    except OSError as error:
        reason = str(error) if error.errno is None else f"{error.strerror}: {error.filename}"
        raise AdapterError(adapter, reason) from error
    except (MemoryError, RuntimeError) as error:
        if not (reason := _no_room(error)):
            raise
        raise AdapterError(adapter, reason) from error


@contextmanager
def bounded(adapter: str | os.PathLike[str]) -> Iterator[None]:
    """As `refused`, for those that say more of an error by its type: only what has none, or is long, changes."""
    try:
        yield
    except OverflowError as error:
        raise AdapterError(adapter, str(error)) from error
    except (MemoryError, RuntimeError) as error:
        if not (reason := _no_room(error)):
            raise
        raise AdapterError(adapter, reason) from error
    except ValueError as error:
        if str(error) == one_line(str(error), 2000):
            raise
        raise AdapterError(adapter, str(error)) from error


def _no_room(error: Exception) -> str:
    """What to say where a file asks for more than there is room for; empty for any other error, a mistake of ours."""
    if not isinstance(error, (MemoryError, RecursionError)) and not _NO_ROOM.search(str(error)):
        return ""
    what = (str(error) or type(error).__name__).splitlines()[0]
    return f"there is no room for what it asks for: {what}"


def contained(root: str | os.PathLike[str], path: Path) -> Path:
    """The path without symlinks. Raises ValueError for one outside root, OSError for one that is not there."""
    top, real = Path(os.path.realpath(root, strict=True)), Path(os.path.realpath(path, strict=True))
    if not real.is_relative_to(top):
        raise ValueError(f"{path} leads out of the adapters' directory: put the adapter itself there, not a link")
    return real


def _open(path: Path, root: str | os.PathLike[str] | None) -> int:
    """A descriptor of the file, opened so that no FIFO or device makes it wait.

    Inside root it is reached from there step by step, no step a symlink any more: a link that somebody puts into the
    place of a directory after the check is not followed.
    """
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
    if root is None or os.open not in os.supports_dir_fd:
        return os.open(path if root is None else contained(root, path), flags)
    top = os.path.realpath(root, strict=True)
    *directories, name = contained(root, path).relative_to(top).parts
    here = os.open(top, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for step in directories:
            below = os.open(step, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW, dir_fd=here)
            os.close(here)
            here = below
        return os.open(name, flags | os.O_NOFOLLOW, dir_fd=here)
    finally:
        os.close(here)


class Header(NamedTuple):
    """What a safetensors file says at its beginning: dtype, shape and place of each tensor, and of itself in words."""

    tensors: dict[str, Any]
    metadata: dict[str, str]


class TensorFile(NamedTuple):
    """What a safetensors file holds, all of it, and what its header says."""

    content: bytes
    header: Header


def content(path: Path, limit: int, root: str | os.PathLike[str] | None = None) -> bytes:
    """What a regular file of at most `limit` bytes holds, read once. Raises ValueError or OSError."""
    with _regular(path, limit, root) as (descriptor, size):
        return _all(descriptor, path, b"", size)


def tensor_content(path: Path, limits: Limits, root: str | os.PathLike[str] | None = None) -> TensorFile:
    """What a safetensors file holds, read once, and no more than its header before that has turned out right.

    Raises ValueError or OSError.
    """
    with _regular(path, limits.max_file_bytes, root) as (descriptor, size):
        begin = _beginning(descriptor, path, size, limits)
        header = parse_header(begin, path, size, limits)
        return TensorFile(_all(descriptor, path, begin, size), header)


def tensor_header(path: Path, limits: Limits) -> Header:
    """The header of a safetensors file, of which nothing else is read. Raises ValueError or OSError."""
    with _regular(path, limits.max_file_bytes, None) as (descriptor, size):
        return parse_header(_beginning(descriptor, path, size, limits), path, size, limits)


@contextmanager
def _regular(path: Path, limit: int, root: str | os.PathLike[str] | None) -> Iterator[tuple[int, int]]:
    """A descriptor of a regular file and its size."""
    descriptor = _open(path, root)
    try:
        status = os.fstat(descriptor)
        if not S_ISREG(status.st_mode):
            raise ValueError(f"{path} must be a regular file")
        if status.st_size > limit:
            raise ValueError(
                f"{path} may have {limit} bytes, got {status.st_size}: raise the limit, or save it smaller"
            )
        yield descriptor, status.st_size
    finally:
        os.close(descriptor)


def _beginning(descriptor: int, path: Path, size: int, limits: Limits) -> bytes:
    """The bytes of a safetensors file of this size up to the end of its header."""
    begin = os.read(descriptor, 64)
    if begin.startswith(_LFS_POINTER):
        raise ValueError(f"{path} is a git-lfs pointer, and not the file itself: fetch that with `git lfs pull`")
    length = int.from_bytes(begin[:8], "little")
    most = limits.max_tensors * HEADER_BYTES
    broken = f"{path} is not a valid safetensors file"
    if len(begin) < 8 or length > size - 8:
        raise ValueError(f"{broken}: its header should have {length} bytes, and all of it has {size}")
    if length > most:
        raise ValueError(f"{broken}: its header may have {most} bytes, got {length}")
    return begin + _read(descriptor, max(0, 8 + length - len(begin)))


def parse_header(begin: bytes, path: Path, size: int, limits: Limits = DEFAULT_LIMITS) -> Header:
    """What the header of the safetensors file of this size at `path` says; begin: the file, at least up to its end.

    Raises ValueError for one that is broken, or has more entries than the limits.
    """
    broken = f"{path} is not a valid safetensors file"
    length = int.from_bytes(begin[:8], "little")
    try:
        header = strict_json(begin[8 : 8 + length])
    except ValueError as error:
        raise ValueError(f"{broken}: {error}") from error
    if not isinstance(header, dict):
        raise ValueError(f"{broken}: its header must be a JSON object, got {type(header).__name__}")
    said = header.pop("__metadata__", None) or {}
    metadata = said if isinstance(said, dict) else {}
    if len(metadata) > limits.max_metadata:
        raise ValueError(f"{path} may have {limits.max_metadata} entries of metadata, got {len(metadata)}")
    if len(header) > limits.max_tensors:
        raise ValueError(f"{path} may hold {limits.max_tensors} tensors, got {len(header)}")
    ends = [entry.get("data_offsets") for entry in header.values() if isinstance(entry, dict)]
    end = max(
        (pair[1] for pair in ends if isinstance(pair, list) and len(pair) == 2 and type(pair[1]) is int), default=0
    )
    if 8 + length + end != size:
        raise ValueError(f"{broken}: its tensors should end at byte {8 + length + end}, and it has {size}")
    return Header(header, {name: text for name, text in metadata.items() if isinstance(text, str)})


def strict_json(text: bytes) -> Any:
    """The value that JSON text stands for. Raises ValueError for text that another reader could read otherwise."""
    try:
        return json.loads(text.decode("utf-8-sig"), object_pairs_hook=_unique, parse_constant=_no_constant)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{shown(name)} is there twice")
        found[name] = value
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")


def _read(descriptor: int, count: int) -> bytes:
    parts = []
    while count and (part := os.read(descriptor, min(count, 1 << 30))):
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def _all(descriptor: int, path: Path, begin: bytes, size: int) -> bytes:
    """All of a file of this size, of which `begin` has been read."""
    found = begin + _read(descriptor, size + 1 - len(begin))
    if len(found) != size:
        raise ValueError(f"{path} changed while it was read: write adapters beside their place and rename them")
    if found.startswith(_LFS_POINTER):
        raise ValueError(f"{path} is a git-lfs pointer, and not the file itself: fetch that with `git lfs pull`")
    return found


def check_fields(fields: Mapping[str, Any], limits: Limits) -> None:
    """Raises ValueError for fields of a config that ask for more than the limits, or for numbers beyond fp32."""
    patterns = {name: fields.get(name) for name in ("rank_pattern", "alpha_pattern")}
    sizes = [(name, fields.get(name)) for name in _SIZES if fields.get(name) is not None]
    alphas = [(name, value) for name, value in fields.items() if name.endswith("alpha")]
    for name, pattern in patterns.items():
        into = sizes if name == "rank_pattern" else alphas
        for key, value in pattern.items() if isinstance(pattern, dict) else ():
            into.append((f"{name}[{shown(key)}]", value))
    for name, value in sizes:
        if isinstance(value, list) and all(isinstance(part, bool) for part in value) and "rank_pattern" in name:
            value = len(value)  # AdaLoRA's: which of the ranks are in use
        elif isinstance(value, list) and name in _OF_EACH_BLOCK and all(isinstance(part, int) for part in value):
            value = max(value, default=0)
        if not isinstance(value, (int, float)):
            raise ValueError(f"{name} must be a number, got {shown(value)}")
        if value > limits.max_rank:
            raise ValueError(
                f"{name} may be {limits.max_rank}, got {shown(value)}: export the adapter with a smaller rank, or "
                "raise the limit"
            )
    for name, value in alphas:
        if isinstance(value, (int, float)) and not abs(value) <= torch.finfo(torch.float32).max:
            raise ValueError(f"{name} must be finite in fp32, got {shown(value)}")
