"""Files made to harm end early, by name, wherever an adapter's directory is read."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import llama, randomise
from typer.testing import CliRunner

from fastadapt import LoRAConfig, inject, load_adapter, save_adapter
from fastadapt.commands.cli import app
from fastadapt.commands.info import describe_adapter
from fastadapt.model import untrusted
from fastadapt.model.peft_files import CONFIG_FILE, TENSOR_FILE, read_tensors
from fastadapt.model.untrusted import AdapterError, Limits, bounded, refused, tensor_content
from fastadapt.serving import read_adapter

Attack = Callable[[Path], object]


def edit(**changes: Any) -> Attack:
    def attack(directory: Path) -> None:
        path = directory / CONFIG_FILE
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return attack


def truncated(name: str, size: int) -> Attack:
    return lambda directory: os.truncate(directory / name, size)


def written(name: str, content: bytes) -> Attack:
    return lambda directory: (directory / name).write_bytes(content)


def header(text: str, length: int | None = None) -> Attack:
    content = text.encode()
    return written(TENSOR_FILE, struct.pack("<Q", len(content) if length is None else length) + content)


def metadata(entries: int) -> Attack:
    def attack(directory: Path) -> None:
        tensors = load_file(directory / TENSOR_FILE)
        save_file(tensors, directory / TENSOR_FILE, metadata={str(index): "x" for index in range(entries)})

    return attack


def many_tensors(directory: Path) -> None:
    entry = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    header(json.dumps({str(index): entry for index in range(70_000)}))(directory)


def sparse(directory: Path) -> None:
    """Three gigabytes behind the tensors that the header tells of."""
    truncated(TENSOR_FILE, 3 << 30)(directory)


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12345\n"

# How each ends, in the words of its refusal.
ATTACKS: dict[str, tuple[Attack, str]] = {
    "sparse": (sparse, "its tensors should end at byte"),
    "sparse, too large": (truncated(TENSOR_FILE, 8 << 40), "may have 4294967296 bytes"),
    "sparse config": (truncated(CONFIG_FILE, 6 << 30), "may have 1048576 bytes"),
    "header of many bytes": (header("{}", 2**63), "its header should have"),
    "nested header": (header('{"a":' * 100_000), "nested too deeply"),
    "empty": (written(TENSOR_FILE, b""), "not a valid safetensors file"),
    "tensors": (many_tensors, "may hold 65536 tensors, got 70000"),
    "metadata": (metadata(5000), "may have 4096 entries of metadata, got 5000"),
    "lfs tensors": (written(TENSOR_FILE, LFS), "git-lfs pointer"),
    "lfs config": (written(CONFIG_FILE, LFS), "git-lfs pointer"),
    "rank": (edit(r=10**7), "r may be 512, got 10000000"),
    "rank beyond torch": (edit(r=2**63 - 1), "r may be 512"),
    "rank pattern": (edit(rank_pattern={"q_proj": 10**7}), r"rank_pattern\['q_proj'\] may be 512"),
    "another method's rank": (edit(peft_type="VERA", r=50_000_000), "may be 512"),
    "rank of another type": (edit(init_r=[1]), "init_r must be a number"),
    "alpha": (edit(lora_alpha=1e39), "lora_alpha must be finite in fp32, got 1e.39"),
    "alpha pattern": (edit(alpha_pattern={"q_proj": -1e300}), "must be finite in fp32"),
    "long name": (edit(target_modules=["x" * 10**5]), r"nothing in .* matches.*\.\.\.$"),
    "slow patterns": (
        edit(rank_pattern={f"(a|aa)+{i}$|([a-z._0-9]+)+!{i}": 4 for i in range(2000)}),
        "takes? too long",
    ),
}
READERS: dict[str, Callable[[Any, Path], object]] = {
    "load_adapter": lambda model, directory: load_adapter(model, directory, limits=QUICK),
    "serving": lambda model, directory: read_adapter(model, directory, limits=QUICK),
    "info": lambda model, directory: _info(directory),
}
QUICK = Limits(max_pattern_seconds=0.2)


def _info(directory: Path) -> None:
    said = describe_adapter(directory)["fastadapt"]
    if said.startswith("cannot load it: "):
        raise AdapterError(directory, said)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("adapters") / "good"
    model = inject(llama(), LoRAConfig(r=4, target_modules=["q_proj"]))
    randomise([parameter for parameter in model.parameters() if parameter.requires_grad])
    save_adapter(model, directory)
    return directory


@pytest.fixture
def adapter(saved: Path, tmp_path: Path) -> Path:
    directory = tmp_path / "adapter"
    shutil.copytree(saved, directory)
    return directory


@pytest.fixture(scope="module")
def model() -> Any:
    return llama()


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("name", ATTACKS)
def test_files_made_to_harm_are_refused(
    adapter: Path, model: Any, name: str, reader: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    attack, message = ATTACKS[name]
    attack(adapter)
    if reader == "info" and name in ("long name", "slow patterns"):
        pytest.skip("it has no model to match names with")
    modules, random = [name for name, _ in model.named_modules()], torch.get_rng_state()
    read = 0

    def counting(descriptor: int, count: int, real: Any = os.read) -> bytes:
        nonlocal read
        found: bytes = real(descriptor, count)
        read += len(found)
        return found

    monkeypatch.setattr(untrusted.os, "read", counting)
    with pytest.raises(ValueError, match=message) as caught:
        READERS[reader](model, adapter)
    assert len(str(caught.value)) < 1000
    assert read < 16 << 20
    assert [name for name, _ in model.named_modules()] == modules
    assert torch.equal(torch.get_rng_state(), random)


def test_limits_can_be_raised(adapter: Path, model: Any) -> None:
    larger = inject(llama(), LoRAConfig(r=600, target_modules=["q_proj"]))
    save_adapter(larger, adapter)
    with pytest.raises(ValueError, match="r may be 512, got 600"):
        load_adapter(llama(), adapter)
    load_adapter(llama(), adapter, limits=Limits(max_rank=600))


@pytest.mark.parametrize(
    ("error", "typed"),
    [
        (MemoryError(), True),
        (RecursionError("too deep"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 5 bytes"), True),
        (RuntimeError("Storage size calculation overflowed with sizes=[9223372036854775807]"), True),
        (OverflowError("int too large to convert to float"), True),
        (RuntimeError("a bug"), False),
    ],
)
@pytest.mark.parametrize("wall", [refused, bounded])
def test_what_a_file_does_to_its_reader_is_said_of_the_file(wall: Any, error: Exception, typed: bool) -> None:
    with pytest.raises(AdapterError if typed else type(error)), wall("adapter"):
        raise error


def test_long_and_unprintable_messages_are_bounded() -> None:
    with pytest.raises(AdapterError) as caught, bounded("adapter"):
        raise ValueError("\x1b[31m" + "x" * 10_000)
    assert len(str(caught.value)) < 700
    assert "\x1b" not in str(caught.value)
    with pytest.raises(ValueError, match=r"^as it was$") as short, bounded("adapter"):
        raise ValueError("as it was")
    assert type(short.value) is ValueError


def test_info_says_what_load_adapter_does(adapter: Path) -> None:
    tensors = load_file(adapter / TENSOR_FILE)
    for change, message in [(torch.nan, "NaN"), (None, "F8_E4M3")]:
        changed = {
            name: value.to(torch.float8_e4m3fn) if change is None else value * change for name, value in tensors.items()
        }
        save_file(changed, adapter / TENSOR_FILE)
        with pytest.raises(ValueError, match=message):
            read_tensors(adapter)
        assert message in describe_adapter(adapter)["fastadapt"]


ESCAPES = "\x1b]0;pwned\x07\x1b[2J"


@pytest.mark.filterwarnings("ignore:.*ignored fields:UserWarning")
def test_escapes_of_a_file_never_reach_the_terminal(adapter: Path, tmp_path: Path) -> None:
    edit(**{"base_model_name_or_path": f"x{ESCAPES}", "target_modules": ["q_proj", ESCAPES], f"field{ESCAPES}": 1})(
        adapter
    )
    tensors = load_file(adapter / TENSOR_FILE)
    save_file({**tensors, f"base{ESCAPES}": torch.zeros(1)}, adapter / TENSOR_FILE)
    llama().save_pretrained(tmp_path / "base")
    for arguments in (["info", str(adapter)], ["merge", str(tmp_path / "base"), str(adapter), str(tmp_path / "m")]):
        result = CliRunner().invoke(app, arguments)
        assert "pwned" in result.output
        assert not set(ESCAPES) & set("\x1b\x07") & set(result.output), result.output
    with pytest.warns(UserWarning, match="ignored fields") as caught, pytest.raises(ValueError, match="base"):
        load_adapter(llama(), adapter)
    assert "\x1b" not in str(caught[0].message)


def test_a_regular_file_is_read_once_and_whole(saved: Path) -> None:
    assert tensor_content(saved / TENSOR_FILE, Limits()).content == (saved / TENSOR_FILE).read_bytes()


def test_a_header_is_parsed_once(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parsed: list[Path] = []
    parse = untrusted.parse_header
    monkeypatch.setattr(untrusted, "parse_header", lambda *args: parsed.append(args[1]) or parse(*args))
    for read in (load_adapter, read_adapter):
        parsed.clear()
        read(llama(), adapter)
        assert parsed == [adapter / TENSOR_FILE]
