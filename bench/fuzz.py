"""Malformed adapter directories by the thousand: each is refused by an AdapterError or loaded right, and leaves
nothing.

A case is a valid adapter of some method with a few edits, all of them plain data, so that a finding can be replayed.
The edits know the format (fields and patterns of the config, JSON text, names, shapes, dtypes and values of the
tensors, the header, links and pipes in the place of files, names of directories) or only its bytes. A finding is
whatever else happens: another exception, a refusal that our own checks did not make, a form that does not fit its
layer, a file from outside the root, too much time or memory, and files, threads, random numbers or a model that are
not as they were. Every case goes through the server's loader, load_adapter, merge, info and convert. Some are files of
diffusers, kohya and MLX, which load_adapter reads too and the server refuses.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import regex
import torch
import typer
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from rich.markup import escape
from safetensors import SafetensorError
from safetensors.torch import save, save_file
from torch import Tensor, nn

import fastadapt
from bench import page, report
from bench.measure import peak_mb
from bench.plots import Document
from fastadapt import (
    AdaLoRAConfig,
    DeltaLoRAConfig,
    DoRAConfig,
    GLoRAConfig,
    LoRAConfig,
    LoRADropConfig,
    RepAdapterConfig,
    SSFConfig,
    VeRAConfig,
    save_adapter,
)
from fastadapt.commands.convert import convert_to
from fastadapt.commands.info import describe_adapter
from fastadapt.commands.report import write_json
from fastadapt.methods import METHODS
from fastadapt.model.adapted import adapter_layers
from fastadapt.model.layouts import diffusers, mlx
from fastadapt.model.layouts.diffusers import METADATA
from fastadapt.model.peft_files import CONFIG_FILE, TENSOR_FILE
from fastadapt.progress import progress_bars
from fastadapt.serving import AdapterError, Limits, LoadedAdapter, adapter_directory, read_adapter

# Expressions that take too long end after a tenth of a second here.
LIMITS = Limits(max_file_bytes=2**24, max_pattern_seconds=0.1)
SECONDS = 5.0
MEGABYTES = 100.0
BATCH = 500

# What a refusal may go back to beside our own checks: what the parsers that we call refuse.
LIBRARY_ERRORS = (OSError, json.JSONDecodeError, UnicodeError, SafetensorError, re.error, regex.error)
PARSER_ERRORS = (OverflowError, RecursionError)

TARGETS = ["q_proj", "v_proj", "down_proj"]
BYTES_OF = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1}
TORCH_OF = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

Edit = list[Any]


class Case(NamedTuple):
    """A valid adapter of that method with these edits, [name, argument, ...] each; `kind` is for the summary."""

    kind: str
    method: str
    edits: list[Edit]


class Outcome(NamedTuple):
    """What came of a case: "refused" and why, "loaded", or "finding" and what."""

    result: str
    detail: str
    seconds: float


class Entry:
    """One tensor of a draft: what the header says of it, and its bytes."""

    def __init__(self, name: str, dtype: str, shape: list[int], data: bytes) -> None:
        self.name, self.data = name, data
        self.said: Any = {"dtype": dtype, "shape": shape}
        self.offsets: list[int] | None = None


class Draft:
    """A directory before it is written: fields and tensors, then the bytes of the files, then what lies where."""

    def __init__(self, fields: dict[str, Any], entries: list[Entry]) -> None:
        self.fields = fields
        self.entries = entries
        self.metadata: Any = {"format": "pt"}
        self.header_length: int | None = None
        self.contents: dict[str, bytes] = {}

    def freeze(self) -> None:
        """From fields and tensors to bytes."""
        if self.contents:
            return
        start, parts = 0, []
        for entry in self.entries:
            said = entry.said
            if isinstance(said, dict):
                stop = start + len(entry.data)
                said = {**said, "data_offsets": entry.offsets or [start, stop]}
            parts.append(f"{json.dumps(entry.name)}:{json.dumps(said)}")
            start += len(entry.data)
        header = "{" + ",".join([f'"__metadata__":{json.dumps(self.metadata)}', *parts]) + "}"
        text = header.encode()
        length = len(text) if self.header_length is None else self.header_length
        data = b"".join(entry.data for entry in self.entries)
        self.contents = {
            CONFIG_FILE: json.dumps(self.fields).encode(),
            TENSOR_FILE: length.to_bytes(8, "little") + text + data,
        }


# Edits of the config.


def _field(draft: Draft, name: str, value: Any) -> None:
    draft.fields[name] = value
    if isinstance(draft.metadata, dict) and METADATA in draft.metadata:
        draft.metadata[METADATA] = json.dumps(json.loads(draft.metadata[METADATA]) | {f"text_encoder.{name}": value})


def _without(draft: Draft, name: str) -> None:
    draft.fields.pop(name, None)


def _pattern(draft: Draft, field: str, text: str) -> None:
    if field.endswith("_pattern") and field != "layers_pattern":
        draft.fields[field] = {text: 4, **(draft.fields.get(field) or {})}
    elif field == "layers_pattern":
        draft.fields |= {"layers_pattern": [text], "layers_to_transform": [0, 1]}
    else:
        draft.fields[field] = [text] if field == "modules_to_save" else text


JSON_TEXTS: dict[str, Callable[[bytes, int], bytes]] = {
    "twice": lambda text, n: text[:-1] + b', "r": %d}' % n,
    "constant": lambda text, n: text[:-1] + b', "lora_alpha": %s}' % [b"NaN", b"Infinity", b"-Infinity"][n % 3],
    "overflow": lambda text, n: text[:-1] + b', "alpha_pattern": {"q_proj": 1e%d}}' % (n * 40),
    "nested": lambda text, n: text[:-1] + b', "more": ' + b"[" * (n * 500) + b"]" * (n * 500) + b"}",
    "nested objects": lambda text, n: b'{"a":' * (n * 500) + text + b"}" * (n * 500),
    "digits": lambda text, n: text[:-1] + b', "more": ' + b"9" * (n * 500) + b"}",
    "not UTF-8": lambda text, n: text[:-1] + b', "more": "\xff\xfe"}',
    "UTF-16": lambda text, n: text.decode().encode("utf-16"),
    "BOM": lambda text, n: b"\xef\xbb\xbf" + text,
    "list": lambda text, n: b"[" + text + b"]",
    "nothing": lambda text, n: b" " * n,
    "more": lambda text, n: text + b"{}",
    "long": lambda text, n: text[:-1] + b', "more": "' + b"x" * (n * 50_000) + b'"}',
    "names": lambda text, n: text[:-1] + b', "exclude_modules": [' + b'"x",' * (n * 3000) + b'"y"]}',
    "NUL": lambda text, n: text[:-1] + b', "r\x00": 1}',
}


def _json_text(draft: Draft, how: str, n: int) -> None:
    draft.freeze()
    draft.contents[CONFIG_FILE] = JSON_TEXTS[how](draft.contents[CONFIG_FILE], n)


# Edits of the tensors.


def _entry(draft: Draft, index: int) -> Entry:
    return draft.entries[index % len(draft.entries)]


def _rename(draft: Draft, index: int, name: str) -> None:
    _entry(draft, index).name = name


def _leave_out(draft: Draft, index: int) -> None:
    if len(draft.entries) > 1:
        draft.entries.remove(_entry(draft, index))


def _copy(draft: Draft, index: int, name: str) -> None:
    entry = _entry(draft, index)
    draft.entries.append(Entry(name, entry.said["dtype"], list(entry.said["shape"]), entry.data))


def _shape(draft: Draft, index: int, shape: list[int], honest: bool) -> None:
    entry = _entry(draft, index)
    entry.said["shape"] = shape
    size = BYTES_OF.get(entry.said["dtype"], 4)
    for length in shape:
        size *= length
    if honest and 0 <= size <= 2**20:
        entry.data = (entry.data * (size // max(1, len(entry.data)) + 1))[:size]


def _dtype(draft: Draft, index: int, dtype: str, honest: bool) -> None:
    entry = _entry(draft, index)
    values = _values(entry)
    if honest and values is not None:
        if dtype in TORCH_OF:
            entry.data = values.to(TORCH_OF[dtype]).view(torch.uint8).numpy().tobytes()
        else:
            entry.data = bytes(BYTES_OF.get(dtype, 4) * len(values))
    entry.said["dtype"] = dtype


def _values(entry: Entry) -> Tensor | None:
    """The tensor's values, flat; None for one that has none or lies about them."""
    dtype = entry.said["dtype"]
    if dtype not in TORCH_OF or not entry.data or len(entry.data) % BYTES_OF[dtype]:
        return None
    return torch.frombuffer(bytearray(entry.data), dtype=TORCH_OF[dtype])


def _value(draft: Draft, index: int, place: int, value: float, everywhere: bool) -> None:
    entry = _entry(draft, index)
    values = _values(entry)
    if values is not None:
        chosen = slice(None) if everywhere else place % len(values)
        values[chosen] = torch.tensor(value, dtype=torch.float64).to(values.dtype)
        entry.data = values.view(torch.uint8).numpy().tobytes()


def _swap(draft: Draft, index: int, other: int) -> None:
    one, two = _entry(draft, index), _entry(draft, other)
    one.name, two.name = two.name, one.name


# Edits of the header.


def _offsets(draft: Draft, index: int, start: int, stop: int) -> None:
    _entry(draft, index).offsets = [start, stop]


def _said(draft: Draft, index: int, value: Any) -> None:
    _entry(draft, index).said = value


def _metadata(draft: Draft, value: Any) -> None:
    draft.metadata = value


def _header_length(draft: Draft, length: int) -> None:
    draft.header_length = length


def _same_name(draft: Draft, index: int, other: int) -> None:
    _entry(draft, index).name = _entry(draft, other).name


# Edits of the bytes.


def _flip(draft: Draft, file: str, place: int, bit: int) -> None:
    _splice(draft, file, place, lambda rest: bytes([rest[0] ^ 1 << bit]) + rest[1:])


def _cut(draft: Draft, file: str, place: int) -> None:
    _splice(draft, file, place, lambda rest: b"")


def _insert(draft: Draft, file: str, place: int, text: str) -> None:
    _splice(draft, file, place, lambda rest: text.encode("latin-1") + rest)


def _overwrite(draft: Draft, file: str, place: int, text: str) -> None:
    _splice(draft, file, place, lambda rest: text.encode("latin-1") + rest[len(text) :])


def _remove(draft: Draft, file: str, place: int, length: int) -> None:
    _splice(draft, file, place, lambda rest: rest[length:])


def _splice(draft: Draft, file: str, place: int, change: Callable[[bytes], bytes]) -> None:
    draft.freeze()
    content = draft.contents[file]
    if content:
        place %= len(content)
        draft.contents[file] = content[:place] + change(content[place:])


EDITS: dict[str, Callable[..., None]] = {
    "field": _field,
    "without": _without,
    "pattern": _pattern,
    "json": _json_text,
    "rename": _rename,
    "leave out": _leave_out,
    "copy": _copy,
    "shape": _shape,
    "dtype": _dtype,
    "value": _value,
    "swap": _swap,
    "offsets": _offsets,
    "said": _said,
    "metadata": _metadata,
    "header length": _header_length,
    "same name": _same_name,
    "flip": _flip,
    "cut": _cut,
    "insert": _insert,
    "overwrite": _overwrite,
    "remove": _remove,
}


# Edits of what lies where: after the files are written, on root/adapter and on the directory beside root.


def _nothing(path: Path, outside: Path) -> None:
    path.unlink()


def _directory(path: Path, outside: Path) -> None:
    path.unlink()
    path.mkdir()


def _fifo(path: Path, outside: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _link_inside(path: Path, outside: Path) -> None:
    path.rename(path.with_suffix(".moved"))
    path.symlink_to(path.with_suffix(".moved").name)


def _link_outside(path: Path, outside: Path) -> None:
    path.rename(outside / path.name)
    path.symlink_to(outside / path.name)


def _link_up(path: Path, outside: Path) -> None:
    path.rename(outside / path.name)
    path.symlink_to(Path("..", "..", outside.name, path.name))


def _link_to_nothing(path: Path, outside: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


def _link_to_itself(path: Path, outside: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


def _link_to_device(path: Path, outside: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def _pickle(path: Path, outside: Path) -> None:
    path.unlink()
    path.with_name("adapter_model.bin").write_bytes(b"\x80\x04N.")


def _sparse(path: Path, outside: Path) -> None:
    os.truncate(path, 2**33)


def _whole_link_outside(path: Path, outside: Path) -> None:
    path.parent.rename(outside / "adapter")
    path.parent.symlink_to(outside / "adapter")


def _whole_link_inside(path: Path, outside: Path) -> None:
    path.parent.rename(path.parent.with_name("moved"))
    path.parent.symlink_to("moved")


def _whole_file(path: Path, outside: Path) -> None:
    shutil.rmtree(path.parent)
    path.parent.write_bytes(b"{}")


PLACES: dict[str, Callable[[Path, Path], None]] = {
    "nothing": _nothing,
    "directory": _directory,
    "fifo": _fifo,
    "link inside": _link_inside,
    "link outside": _link_outside,
    "link up": _link_up,
    "link to nothing": _link_to_nothing,
    "link to itself": _link_to_itself,
    "link to device": _link_to_device,
    "pickle": _pickle,
    "sparse": _sparse,
    "whole link outside": _whole_link_outside,
    "whole link inside": _whole_link_inside,
    "whole file": _whole_file,
}
HARMLESS_PLACES = ("link inside", "whole link inside")
NAMES = ["", ".", "..", "../root/adapter", "../outside", "/etc", "//adapter", "adapter/", "adapter/.", "./adapter"]
NAMES += ["adapter\0", "adapter\n", "adapter\\..\\adapter", "C:\\adapter", "C:adapter", "\\\\host\\share", "x" * 300]
NAMES += ["adapter/..", "adapter/../adapter", "\ud800", "~", "no such", "adapter/adapter_config.json", "a/" * 3000]

# Strategies.

BACKTRACKING = [
    "(a|a)*$",
    "(.*)*x",
    "((a+)+)+$",
    r"(\w+\.?)+!|(\w|\w)+#",
    "(?:[a-z_.]|[a-z_.0-9])*0?Z|Y",
    "(.?){60}.{60}",
]
BACKTRACKING += [r"(.*\.)*.*(.*\.)*.*(.*\.)*@|[@]?(.|.)*\1", r"^(([a-z_])+.)+[A-Z]([a-z])+$|model(.|\w)*?\3{9}"]
EXPRESSIONS = ["(", ")", "[", "a{9999999999}", "(?P<x>", "(?i)q_proj", "*", "\\", "(" * 300 + ")" * 300, "q_proj|", ""]
EXPRESSIONS += [
    "(?:q_proj){e<=2}",
    "[[:alpha:]]+",
    r"\p{L}+",
    "(?R)",
    r"(?P<index>\d)",
    "(?<=a+)b",
    ".*q_proj",
    "a" * 70000,
]
EXPRESSIONS += [
    "(a)|b",
    "(?L)a",
    "(?(1)a|b)",
    "x{,}",
    "(?#",
    r"\N{nothing}",
    "(?i:Q_PROJ)",
    ".*",
    "((((.{0,99}){99}){99}){99})",
]
NUMBERS = [0, -1, 1, 2, 3, 4, 5, 8, 12, 512, 513, 10**6, 10**9, 2**31, 2**63, 2**64, -(2**63) - 1, 10**30, 10**400]
FLOATS = [
    0.0,
    -0.0,
    -1.0,
    0.5,
    1.0,
    4.0,
    1e-45,
    1e-320,
    3.4e38,
    1e300,
    1.7e308,
    float("nan"),
    float("inf"),
    -float("inf"),
]
WORDS = [
    "none",
    "lora_only",
    "vera_only",
    "all",
    "eva",
    "gaussian",
    "pissa",
    "orthogonal",
    "all-linear",
    "q_proj",
    "\ud800",
]
WORDS += [
    *TARGETS,
    *METHODS,
    "model.layers.0.self_attn.q_proj",
    "model.layers.1.mlp.down_proj",
    "lm_head",
    "embed_tokens",
]
WORDS += ["model.layers.0.self_attn.q_proj.lora_E", "norm", "../x", "a\nb", "", "CAUSAL_LM", "SEQ_CLS"]
SILENT = [
    "loftq_config",
    "eva_config",
    "runtime_config",
    "megatron_core",
    "qalora_group_size",
    "brand_new",
    "__class__",
]
FIELDS = sorted(
    {name for config in METHODS.values() for name in (*config.__dataclass_fields__, *config.neutral_fields)}
)
FIELDS += [*SILENT, "peft_type", "peft_type", "lora_parameters", "fine_tune_type"]
TENSOR_NAMES = [
    "",
    "x",
    "base_model.model.x",
    "base_model.vera_A",
    "__metadata__",
    "base_model.model.lm_head.lora_A.weight",
]
TENSOR_NAMES += [f"base_model.model.model.layers.{i}.self_attn.q_proj.{end}" for i in (0, 1, 2) for end in (
    "lora_A.weight", "lora_B.weight", "lora_B.bias", "lora_magnitude_vector", "lora_E", "base_layer.weight", "bias",
    "base_layer.bias", "lora_A.default.weight", "vera_lambda_d", "lora_embedding_A", "lora_anchor_A.weight",
)]  # fmt: skip
FLAT, PATH = "lora_unet_model_layers_0_self_attn_q_proj", "model.layers.0.self_attn.q_proj"
TENSOR_NAMES += [f"{FLAT}.{end}" for end in (
    "lora_up.weight", "lora_down.weight", "alpha", "dora_scale", "lora_mid.weight", "hada_w1_a", "diff", "lora_up.0",
)]  # fmt: skip
TENSOR_NAMES += [f"{start}{PATH}.{end}" for start in ("", "unet.", "text_encoder.") for end in (
    "lora.down.weight", "lora_A.weight", "lora_B.weight", "lora_B.bias", "alpha", "lora_magnitude_vector", "lora_a",
)]  # fmt: skip
TENSOR_NAMES += [
    "lora_te_x.alpha",
    "lora_unet_.alpha",
    "unet.to_q_lora.down.weight",
    f"{PATH}.processor.to_q_lora.alpha",
]

index = st.integers(0, 63)
number = st.sampled_from(NUMBERS)
word = st.sampled_from(WORDS) | st.text(max_size=8)
scalar = st.none() | st.booleans() | number | st.sampled_from(FLOATS) | word
value = st.recursive(
    scalar, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(word, inner, max_size=3), max_leaves=5
)
expression = (
    st.sampled_from(EXPRESSIONS)
    | st.sampled_from(EXPRESSIONS)
    | st.text("()[]{}|*+?.\\^$aq_0:,-<=!iPx", max_size=16)
    | st.sampled_from(BACKTRACKING)
)
PATTERN_FIELDS = [
    "target_modules",
    "exclude_modules",
    "layers_pattern",
    "rank_pattern",
    "alpha_pattern",
    "modules_to_save",
]
size = st.sampled_from([0, 1, 2, 3, 4, 8, 31, 32, 48, 2**31, 2**62, 2**64]) | st.integers(-1, 64)
dtype = st.sampled_from([*BYTES_OF, "F8_E5M2", "F4", "C64", "U16", "float32", "", "f32"])
file = st.sampled_from([CONFIG_FILE, TENSOR_FILE, TENSOR_FILE])
place = st.integers(0, 700) | st.integers(0, 7) | st.integers(0, 20_000)
some_bytes = st.text([chr(code) for code in range(256)], min_size=1, max_size=9)
offset = st.sampled_from([0, 1, 4, 128, 512, 4096, 2**31, 2**63, 2**64, -1]) | st.integers(0, 6000)
length = st.sampled_from([0, 1, 2, 8, 100, 2**20, 2**25, 2**31, 2**63, 2**64 - 1]) | st.integers(0, 4000)


def edit(name: str, *arguments: Any) -> Any:
    return st.tuples(st.just(name), *arguments).map(list)


CONFIG_EDITS = edit("field", st.sampled_from(FIELDS), value) | edit("without", st.sampled_from(FIELDS))
TENSOR_EDITS = (
    edit("rename", index, st.sampled_from(TENSOR_NAMES) | st.text(max_size=8))
    | edit("leave out", index)
    | edit("copy", index, st.sampled_from(TENSOR_NAMES))
    | edit("shape", index, st.lists(size, max_size=5), st.booleans())
    | edit("dtype", index, dtype, st.booleans())
    | edit("value", index, index, st.sampled_from(FLOATS), st.booleans())
    | edit("swap", index, index)
)
HEADER_EDITS = (
    edit("offsets", index, offset, offset)
    | edit("said", index, value)
    | edit("metadata", value)
    | edit("header length", length)
    | edit("same name", index, index)
)
BYTE_EDITS = (
    edit("flip", file, place, st.integers(0, 7))
    | edit("cut", file, place)
    | edit("insert", file, place, some_bytes)
    | edit("overwrite", file, place, some_bytes)
    | edit("remove", file, place, st.integers(1, 64))
)
KINDS: dict[str, Any] = {
    "config field": st.lists(CONFIG_EDITS, min_size=1, max_size=2),
    "pattern": st.lists(edit("pattern", st.sampled_from(PATTERN_FIELDS), expression), min_size=1, max_size=2),
    "JSON text": st.lists(edit("json", st.sampled_from(sorted(JSON_TEXTS)), st.integers(0, 9)), min_size=1, max_size=1),
    "tensors": st.lists(TENSOR_EDITS, min_size=1, max_size=2),
    "header": st.lists(HEADER_EDITS, min_size=1, max_size=2),
    "config and tensors": st.tuples(CONFIG_EDITS, TENSOR_EDITS).map(list),
    "bytes": st.lists(BYTE_EDITS, min_size=1, max_size=3),
    "layout": st.lists(edit("place", file, st.sampled_from(sorted(PLACES))), min_size=1, max_size=1),
    "name": st.lists(edit("name", st.sampled_from(NAMES) | st.text(max_size=12)), min_size=1, max_size=1),
}
# Fields and tensors have the most to go wrong.
WEIGHTED = ["config field"] * 5 + ["tensors"] * 5 + ["bytes"] * 3 + ["config and tensors", "header"] * 2 + [*KINDS]


def cases_of(methods: list[str]) -> Any:
    """The strategy of all cases."""
    return st.sampled_from(WEIGHTED).flatmap(
        lambda kind: st.builds(Case, st.just(kind), st.sampled_from(methods), KINDS[kind])
    )


def tiny_model() -> Any:
    """A Llama of two layers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes: dict[str, Any] = {"vocab_size": 67, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32}
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**sizes)).eval()


def _eva(model: nn.Module) -> None:
    fastadapt.inject(model, LoRAConfig(r=4, target_modules=TARGETS, init_lora_weights="eva"))
    generator = torch.Generator().manual_seed(3)
    factors = {}
    for rank, (path, layer) in enumerate(adapter_layers(model).items(), start=2):
        factors[path] = torch.randn(rank, layer.weight_matrix.shape[1], generator=generator)
    fastadapt.initialize_eva(model, factors=factors)


PRUNED = {f"model.layers.{index}.self_attn.q_proj.lora_E": [index == 0, False, False] for index in (0, 1)}
METHOD_CONFIGS: dict[str, Any] = {
    "lora": lambda: LoRAConfig(r=4, target_modules=TARGETS, rank_pattern={"q_proj": 3}, alpha_pattern={"v_proj": 6}),
    "rslora": lambda: LoRAConfig(r=4, target_modules="all-linear", use_rslora=True, lora_bias=True),
    "dora": lambda: DoRAConfig(r=4, target_modules=TARGETS),
    "vera": lambda: VeRAConfig(r=8, target_modules=TARGETS),
    "vera of a key": lambda: VeRAConfig(r=8, target_modules=TARGETS, save_projection=False),
    "dvora": lambda: VeRAConfig(r=8, target_modules=TARGETS, use_dora=True),
    "adalora": lambda: AdaLoRAConfig(init_r=3, target_r=2, total_step=10, target_modules=TARGETS, rank_pattern=PRUNED),
    "delta_lora": lambda: DeltaLoRAConfig(r=4, target_modules=TARGETS, anchored=True),
    "lora_drop": lambda: LoRADropConfig(r=4, target_modules=TARGETS, kept=["model.layers.0.self_attn.q_proj"]),
    "ssf": lambda: SSFConfig(target_modules=TARGETS),
    "repadapter": lambda: RepAdapterConfig(r=4, target_modules=TARGETS),
    "glora": lambda: GLoRAConfig(config_A_B="vector", target_modules=TARGETS),
    "glora_mixed": lambda: GLoRAConfig(
        config_A_B="none",
        target_modules=TARGETS,
        support_pattern={
            "q_proj": ["constant", "lora:3", "none", "none", "none"],
            "v_proj": ["none", "constant", "none", "none", "none"],
        },
    ),
}


# The weights of the tiny model, beside the root, whose names tell its modules.
BASE = "base.safetensors"

# Layouts of other libraries, and the names of their files.
FOREIGN = {
    "kohya": diffusers.FILE,
    "kohya's dora": diffusers.FILE,
    "diffusers": diffusers.FILE,
    "diffusers with its config": diffusers.FILE,
    "mlx": mlx.FILE,
    "mlx's dora": mlx.FILE,
}


def foreign_files() -> dict[str, tuple[bytes, bytes]]:
    """A valid file of each layout, and the config beside it, for the tiny model."""
    model, generator = tiny_model(), torch.Generator().manual_seed(2)
    found = {}
    for method in FOREIGN:
        tensors: dict[str, Tensor] = {}
        for rank, path in enumerate(("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"), start=2):
            n, k = model.get_submodule(path).weight.shape
            A, B = torch.rand(rank, k, generator=generator), torch.rand(n, rank, generator=generator)
            m = torch.rand(n, generator=generator) + 0.5
            if method.startswith("kohya"):
                start = f"lora_unet_{path.replace('.', '_')}"
                tensors |= {f"{start}.lora_down.weight": A, f"{start}.lora_up.weight": B}
                tensors[f"{start}.alpha"] = torch.tensor(4) if rank == 2 else torch.tensor(1.5)
                tensors |= {f"{start}.dora_scale": m[:, None]} if "dora" in method else {}
            elif method == "diffusers":
                tensors |= {f"unet.{path}.lora.down.weight": A, f"unet.{path}.lora.up.weight": B}
                tensors[f"unet.{path}.alpha"] = torch.tensor(4.0)
            elif method.startswith("diffusers"):
                tensors |= {f"text_encoder.{path}.lora_A.weight": A, f"text_encoder.{path}.lora_B.weight": B}
            else:
                tensors |= {f"{path}.lora_a": A.T.contiguous(), f"{path}.lora_b": B.T.contiguous()}
                tensors |= {f"{path}.m": m} if "dora" in method else {}
        fields: dict[str, Any] = {}
        metadata = {"format": "pt"}
        if method.startswith("mlx"):
            fields = {"fine_tune_type": "dora" if "dora" in method else "lora", "lora_parameters": {"scale": 2.0}}
        elif method == "diffusers with its config":
            said = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "rank_pattern": {"down_proj": 3}}
            said |= {"target_modules": ["layers.0.self_attn.q_proj", "layers.1.mlp.down_proj"], "use_rslora": True}
            metadata[METADATA] = json.dumps({f"text_encoder.{name}": value for name, value in said.items()})
        found[method] = json.dumps(fields).encode(), save(tensors, metadata)
    return found


class TooSlow(BaseException):
    """A case over its time."""


@contextlib.contextmanager
def alarm(seconds: float) -> Iterator[None]:
    """Inside, TooSlow is raised after that time; where nothing listens to it, the process ends with a traceback."""

    def ring(*_: Any) -> None:
        raise TooSlow

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    faulthandler.dump_traceback_later(10 * seconds, exit=True, file=2)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Harness:
    """A model, one valid adapter of each method, and a directory to break them in."""

    def __init__(self, scratch: Path) -> None:
        self.model = tiny_model().requires_grad_(False)
        self.root, self.outside, self.running = scratch / "root", scratch / "outside", scratch / "running"
        self.valid: dict[str, tuple[bytes, bytes]] = {}
        for method in (*METHOD_CONFIGS, "eva"):
            model = tiny_model()
            if method == "eva":
                _eva(model)
            else:
                fastadapt.inject(model, METHOD_CONFIGS[method]())
            with torch.no_grad():
                generator = torch.Generator().manual_seed(1)
                for parameter in model.parameters():
                    if parameter.requires_grad:
                        parameter.add_(0.1 * torch.rand(parameter.shape, generator=generator))
            self.root.mkdir(exist_ok=True)
            save_adapter(model, self.root / "saved")
            self.valid[method] = tuple((self.root / "saved" / name).read_bytes() for name in (CONFIG_FILE, TENSOR_FILE))  # type: ignore[assignment]
            read_adapter(self.model, self.root / "saved")  # warms up, too
        self.valid |= foreign_files()
        save_file(self.model.state_dict(), scratch / BASE)

    def draft(self, method: str) -> Draft:
        config, tensors = self.valid[method]
        stop = 8 + int.from_bytes(tensors[:8], "little")
        header = json.loads(tensors[8:stop])
        metadata = header.pop("__metadata__", None)
        entries = [
            Entry(
                name,
                said["dtype"],
                said["shape"],
                tensors[stop + said["data_offsets"][0] : stop + said["data_offsets"][1]],
            )
            for name, said in sorted(header.items(), key=lambda item: item[1]["data_offsets"])
        ]
        draft = Draft(json.loads(config), entries)
        draft.metadata = metadata
        return draft

    def write(self, case: Case) -> str:
        """Puts the case into root/adapter; returns the name that the adapter is asked for by."""
        for directory in (self.root, self.outside):
            shutil.rmtree(directory, ignore_errors=True)
            directory.mkdir()
        draft = self.draft(case.method)
        for name, *arguments in case.edits:
            if name in EDITS:
                EDITS[name](draft, *arguments)
        draft.freeze()
        adapter = self.root / "adapter"
        adapter.mkdir()
        names = {TENSOR_FILE: FOREIGN.get(case.method, TENSOR_FILE), CONFIG_FILE: CONFIG_FILE}
        for name, content in draft.contents.items():
            (adapter / names[name]).write_bytes(content)
        asked = "adapter"
        for name, *arguments in case.edits:
            if name == "place":
                PLACES[arguments[1]](adapter / names[arguments[0]], self.outside)
            elif name == "name":
                asked = arguments[0]
        return asked

    def state(self) -> tuple[Any, ...]:
        """Everything that a refusal and a load must leave alone."""
        modules = [(path, id(module), module.training) for path, module in self.model.named_modules()]
        parameters = [(id(p), p.data_ptr(), p._version, p.requires_grad) for p in self.model.parameters()]
        files = sorted(str(path) for directory in (self.root, self.outside) for path in directory.rglob("*"))
        descriptors = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
        random = torch.get_rng_state().numpy().tobytes()
        return modules, parameters, files, descriptors, threading.active_count(), random

    def judge(self, case: Case) -> Outcome:
        """Runs one case: the server's loader, and whatever else reads such a directory."""
        asked = self.write(case)
        self.running.write_text(replayed(case), encoding="utf-8")
        found = self._serving(case, asked)
        seconds, loads = found.seconds, dict[str, bool]()
        for name, read in READERS.items():
            if found.result == "finding":
                break
            other = self._reading(name, read)
            seconds, loads[name] = seconds + other.seconds, other.result == "loaded"
            found = other if other.result == "finding" else found
        if found.result != "finding" and loads["load_adapter"] and not loads["info"]:
            found = Outcome("finding", "info: says that what load_adapter loads cannot be loaded", seconds)
        if found.result == "refused" and case.method in FOREIGN and loads["load_adapter"]:
            found = Outcome("loaded", "", seconds)
        return found._replace(seconds=seconds)

    def _serving(self, case: Case, asked: str) -> Outcome:
        def run() -> tuple[str, str]:
            try:
                directory = adapter_directory(self.root, asked)
                loaded = read_adapter(self.model, directory, root=self.root, limits=LIMITS)
            except AdapterError as error:
                return "refused", foreign_cause(error) or _unbounded(error, 1500)
            return "loaded", self.misfit(case, loaded)

        return self._watched(run)

    def _reading(self, name: str, read: Callable[[nn.Module, Path], bool]) -> Outcome:
        def run() -> tuple[str, str]:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                try:
                    result = "loaded" if read(self.model, self.root / "adapter") else "refused"
                except (ValueError, OSError) as error:
                    return "refused", _unbounded(error, 2500)
                return result, next(filter(None, (_unbounded(warning.message, 2500) for warning in caught)), "")

        # What is built and then refused may have drawn random numbers.
        outcome = self._watched(run, but=("random numbers",))
        return outcome._replace(detail=f"{name}: {outcome.detail}" if outcome.detail else "")

    def _watched(self, run: Callable[[], tuple[str, str]], but: tuple[str, ...] = ()) -> Outcome:
        """What a reading comes to, with all that it must leave alone compared."""
        before, memory, start = self.state(), peak_mb(), time.perf_counter()
        result, detail = "refused", ""
        try:
            with alarm(SECONDS):
                result, detail = run()
        except TooSlow:
            detail = f"still running after {SECONDS:g} s"
        except Exception:
            detail = traceback.format_exc()
        seconds = time.perf_counter() - start
        changed = [
            name
            for name, was, now in zip(
                ("modules", "parameters", "files", "descriptors", "threads", "random numbers"),
                before,
                self.state(),
                strict=True,
            )
            if was != now and name not in but
        ]
        if not detail and changed:
            detail = f"not as before: {', '.join(changed)}"
        if not detail and peak_mb() - memory > MEGABYTES:
            detail = f"took {peak_mb() - memory:.0f} MB"
        return Outcome("finding" if detail else result, detail, seconds)

    def misfit(self, case: Case, loaded: LoadedAdapter) -> str:
        """Why the loaded adapter is none for this model; empty where it is one."""
        for name, *arguments in case.edits:
            if (name == "place" and arguments[1] not in HARMLESS_PLACES) or (
                name == "name" and arguments[0] != "adapter"
            ):
                return "loaded from a place that holds no adapter of this root"
        modules = dict(self.model.named_modules())
        if not loaded.forms:
            return "loaded without a form"
        for path, form in loaded.forms.items():
            n, k = modules[path].weight.shape
            r = form.A.shape[0]
            wanted = {"A": (r, k), "B": (n, r), "mid_scale": (r,), "base_scale": (n,), "bias": (n,)}
            for name, part in form._asdict().items():
                if not isinstance(part, Tensor):
                    continue
                if part.dim() and part.shape != wanted.get(name, (n,)):
                    return f"{path}: {name} has shape {tuple(part.shape)}"
                if not torch.isfinite(part).all():
                    return f"{path}: {name} is not finite"
                if part.requires_grad and part is not modules[path].bias:
                    return f"{path}: {name} requires grad"
        return ""


def _loaded(model: nn.Module, directory: Path) -> bool:
    fastadapt.load_adapter(model, directory, limits=LIMITS)
    fastadapt.unload(model)
    return True


def _merged(model: nn.Module, directory: Path) -> bool:
    fastadapt.load_adapter(model, directory, limits=LIMITS)
    try:
        fastadapt.merge(model)
        fastadapt.unmerge(model)
    finally:
        fastadapt.unload(model)
    return True


def _described(model: nn.Module, directory: Path) -> bool:
    facts = describe_adapter(directory)
    for name, fact in facts.items():
        if not fact.isprintable() or len(fact) > 2500:
            raise AssertionError(f"{name} is no short line: {fact[:200]!r}")
    return facts["fastadapt"].startswith("can load it")


def _converted(model: nn.Module, directory: Path) -> bool:
    """Into PEFT's layout, and from there into kohya's and back, where that holds it: all load as the same function."""
    base = str(directory.parent.parent / BASE)
    with tempfile.TemporaryDirectory(dir=directory.parent.parent) as scratch:
        peft, kohya, again = (Path(scratch, name) for name in ("peft", "kohya.safetensors", "again"))
        convert_to(directory, peft, "peft", base, None, False, _silent)
        wanted = _merged_weights(model, directory)
        found = [peft]
        with contextlib.suppress(ValueError):
            convert_to(peft, kohya, "kohya", None, "unet", False, _silent)
        if kohya.exists():
            convert_to(kohya, again, "peft", base, None, False, _silent)
            found.append(again)
        for place in found:
            weights = _merged_weights(model, place)
            if wanted.keys() != weights.keys():
                raise AssertionError(f"{place.name} has other layers: {', '.join(wanted.keys() ^ weights.keys())}")
            for path, weight in wanted.items():
                torch.testing.assert_close(weights[path], weight, rtol=1e-4, atol=1e-5 * float(weight.abs().max()))
    return True


def _merged_weights(model: nn.Module, directory: Path) -> dict[str, Tensor]:
    fastadapt.load_adapter(model, directory, limits=LIMITS)
    try:
        layers = adapter_layers(model)
        return {
            path: layer.merged_tensors(layer.weight_matrix, layer.merged_form())[0] for path, layer in layers.items()
        }
    finally:
        fastadapt.unload(model)


def _silent(message: str) -> None:
    """What a command would tell of its progress."""


# Whether what reads a directory takes it; the model is as it was afterwards.
READERS: dict[str, Callable[[nn.Module, Path], bool]] = {
    "load_adapter": _loaded,
    "merge": _merged,
    "info": _described,
    "convert": _converted,
}


def _unbounded(error: object, longest: int) -> str:
    """What is wrong with a message; empty for a short line."""
    return "" if str(error).isprintable() and len(str(error)) <= longest else "the message is no short line"


def foreign_cause(error: BaseException) -> str:
    """A refusal that goes back to an accident rather than to a check; empty for others."""
    package = str(Path(fastadapt.__file__).parent)
    cause = error.__cause__
    while cause is not None:
        frames = traceback.extract_tb(cause.__traceback__)
        own = bool(frames) and frames[-1].filename.startswith(package) and type(cause) is ValueError
        parser = bool(frames) and f"{os.sep}json{os.sep}" in frames[-1].filename
        if not own and not parser and not isinstance(cause, (*LIBRARY_ERRORS, *PARSER_ERRORS)):
            return "refused by accident:\n" + "".join(traceback.format_exception(cause))
        cause = cause.__cause__
    return ""


def scratch_directory() -> tempfile.TemporaryDirectory[str]:
    """In memory, where the system has such a place: a case is two files."""
    memory = Path("/dev/shm")
    return tempfile.TemporaryDirectory(prefix="fuzz-", dir=memory if os.access(memory, os.W_OK) else None)


def run(cases: int, start: int = 0, found: Callable[[Case, Outcome], None] | None = None) -> list[report.Row]:
    """Runs that many cases; one row a kind and one for all. `found` hears of each finding."""
    counts: dict[str, Counter[str]] = {kind: Counter() for kind in KINDS}
    seconds: Counter[str] = Counter()
    with scratch_directory() as scratch, progress_bars() as progress:
        harness = Harness(Path(scratch))
        task = progress.add_task("cases", total=cases)
        progress.console.print(f"Should this process die, the case that kills it is in {harness.running}")

        def one(case: Case) -> None:
            outcome = harness.judge(case)
            counts[case.kind][outcome.result] += 1
            counts[case.kind]["longest"] = max(counts[case.kind]["longest"], round(1000 * outcome.seconds))
            seconds[case.kind] += outcome.seconds  # type: ignore[assignment]
            progress.advance(task)
            if outcome.result == "finding":
                progress.console.print(
                    f"[red]finding[/red]: {escape(outcome.detail)}\n  --replay {escape(replayed(case))}"
                )
                if found is not None:
                    found(case, outcome)

        # In batches: what is remembered of past cases, so as not to repeat them, grows with each.
        for first in range(0, cases, BATCH):
            batch = settings(
                max_examples=min(BATCH, cases - first),
                database=None,
                deadline=None,
                phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )
            seed(start * 1_000_003 + first)(batch(given(cases_of(list(harness.valid)))(one)))()
    rows: list[report.Row] = []
    total: Counter[str] = Counter()
    for kind, count in counts.items():
        rows.append(_row(kind, count, seconds[kind]))
        total += Counter({name: count[name] for name in ("refused", "loaded", "finding")})
        total["longest"] = max(total["longest"], count["longest"])
    return [*rows, _row("all", total, sum(seconds.values()))]


def _row(kind: str, count: Counter[str], seconds: float) -> report.Row:
    cases = count["refused"] + count["loaded"] + count["finding"]
    return {
        "case": kind,
        "cases": cases,
        "refused": count["refused"],
        "loaded": count["loaded"],
        "findings": count["finding"],
        "cases_per_second": cases / seconds if seconds else 0.0,
        "longest_ms": count["longest"],
    }


def replayed(case: Case) -> str:
    """The case as the argument of --replay."""
    text = json.dumps(case)
    return "'" + text.replace("'", "'\\''") + "'"


def main(
    cases: Annotated[int, typer.Option(help="How many malformed directories.")] = 20_000,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the rows there.")] = None,
    start: Annotated[int, typer.Option("--seed", help="Other cases for another number.")] = 0,
    replay: Annotated[str, typer.Option(help="Run this one case, as a finding printed it.")] = "",
) -> None:
    """Malformed adapter directories: each refused by AdapterError or loaded right; exit code 1 for anything else."""
    if replay:
        with scratch_directory() as scratch:
            outcome = Harness(Path(scratch)).judge(Case(*json.loads(replay)))
        sys.stdout.write(f"{outcome.result} in {outcome.seconds:.3f} s {outcome.detail}\n")
        raise typer.Exit(int(outcome.result == "finding"))
    findings: list[report.Row] = []
    clock = time.perf_counter()
    rows = run(
        cases, start, lambda case, outcome: findings.append({"replay": replayed(case), "detail": outcome.detail})
    )
    elapsed = time.perf_counter() - clock
    columns = {
        "case": "edited",
        "cases": "cases",
        "refused": "refused",
        "loaded": "loaded",
        "findings": "findings",
        "cases_per_second": "cases/s in the loader",
        "longest_ms": "longest ms",
    }
    report.print_table(f"{rows[-1]['cases']} malformed adapter directories, {elapsed:.0f} s", rows, columns)
    if json_file is not None:
        write_json(json_file, "fuzz", rows, seed=start, seconds=elapsed, findings=findings)
    if findings:
        raise typer.Exit(1)


@page.section("fuzz", "Malformed adapter directories")
def section(document: Document) -> str:
    rows = [
        f"{row['case']} | {row['cases']:,} | {row['refused']:,} | {row['loaded']:,} | {row['findings']} | "
        f"{row['longest_ms']}"
        for row in document["rows"]
    ]
    return (
        "What is edited in directories that load. A finding is anything but a loaded adapter or an AdapterError with a "
        "reason: another exception, a changed base, values that are not finite, too much time or memory.\n\n"
    ) + page.table("edited | cases | refused | loaded | findings | longest ms", rows)


@page.headline("fuzz")
def headline(document: Document) -> str:
    row = page.by_case(document)["all"]
    return f"findings in {row['cases']:,} malformed adapter directories | {row['findings']} | –"
