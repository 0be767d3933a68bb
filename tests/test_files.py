"""Files: whole or not at all, with the modes that the umask gives; and the one place of the cache."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from stat import S_IMODE
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from fastadapt import files, inject, save_adapter
from fastadapt.commands.train import state as train_state
from fastadapt.files import cache_directory, sha256_of, written_together, written_whole
from fastadapt.methods import LoRAConfig

POSIX = pytest.mark.skipif(os.name != "posix", reason="modes and links of POSIX")


@pytest.fixture(params=[0o022, 0o027, 0o077], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def modes(root: Path) -> dict[str, int]:
    """The mode of everything in a directory, by its path there."""
    return {str(path.relative_to(root)): S_IMODE(path.stat().st_mode) for path in root.rglob("*")}


def content(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def adapted() -> Any:
    return inject(torch.nn.Sequential(torch.nn.Linear(4, 3)), LoRAConfig(r=2, target_modules=["0"]))


class Killed(BaseException):
    """Stands for an end that nobody catches."""


def write(kind: str, target: Path, end: BaseException | None = None) -> None:
    """A new file, or a directory with one in it, at `target`; `end` comes when half of it is written."""
    with written_whole(target) as draft:
        if kind == "directory":
            draft.mkdir()
            draft = draft / "part"
        draft.write_text("new")
        if end is not None:
            raise end


# Modes


@POSIX
def test_a_file_has_the_mode_of_new_files_whoever_wrote_it(tmp_path: Path, umask: int) -> None:
    for name, write in {
        "text": lambda draft: draft.write_text("text"),
        "own.safetensors": lambda draft: save_file({"a": torch.ones(2)}, draft),
        "closed": lambda draft: os.close(os.open(draft, os.O_CREAT, 0o600)),
    }.items():
        with written_whole(tmp_path / "new" / name) as draft:
            write(draft)
    assert modes(tmp_path) == {
        "new": 0o777 & ~umask,
        **{f"new/{name}": 0o666 & ~umask for name in ("text", "own.safetensors", "closed")},
    }


@POSIX
def test_a_directory_has_the_modes_of_new_ones_all_through(tmp_path: Path, umask: int) -> None:
    with written_whole(tmp_path / "model") as draft:
        (draft / "inner").mkdir(parents=True, mode=0o700)
        save_file({"a": torch.ones(2)}, draft / "inner" / "a.safetensors")
    assert modes(tmp_path) == {
        "model": 0o777 & ~umask,
        "model/inner": 0o777 & ~umask,
        "model/inner/a.safetensors": 0o666 & ~umask,
    }


@POSIX
def test_adapters_and_checkpoints_are_for_whom_the_umask_says(tmp_path: Path, umask: int) -> None:
    save_adapter(adapted(), tmp_path)
    train_state.save(tmp_path, 3, {"weights": torch.ones(2)})
    found = modes(tmp_path)
    assert found.pop("checkpoint-3") == 0o777 & ~umask
    assert len(found) == 5
    assert set(found.values()) == {0o666 & ~umask}


@POSIX
def test_writing_leaves_the_umask_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the whole process's: another thread would make its files with ours."""
    monkeypatch.setattr(os, "umask", lambda mask: pytest.fail("the umask was changed"))
    with written_whole(tmp_path / "file") as draft:
        draft.write_text("text")


# Whole or not at all


def test_what_is_written_takes_the_place_of_what_was_there(tmp_path: Path) -> None:
    for text in ("one", "two"):
        with written_whole(tmp_path / "file") as draft:
            draft.write_text(text)
            assert not (tmp_path / "file").exists() or (tmp_path / "file").read_text() == "one"
        with written_whole(tmp_path / "directory") as draft:
            draft.mkdir()
            (draft / text).write_text(text)
    assert content(tmp_path) == {"file": b"two", os.path.join("directory", "two"): b"two"}


@pytest.mark.parametrize("kind", ["file", "directory"])
@pytest.mark.parametrize("place", ["in the block", "on the way to the disk", "at the rename"])
def test_after_an_error_the_old_is_there_and_no_draft(
    kind: str, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "target"
    old = target if kind == "file" else target / "part"
    old.parent.mkdir(exist_ok=True)
    old.write_text("old")
    replace, moved = os.replace, list[Any]()

    def failing(source: Path, to: Path) -> None:
        if Path(to) == target and not moved:
            moved.append(to)
            raise Killed
        replace(source, to)

    def killed(_: int) -> None:
        raise Killed

    if place == "at the rename":
        monkeypatch.setattr(os, "replace", failing)
    if place == "on the way to the disk":
        monkeypatch.setattr(os, "fsync", killed)
    with pytest.raises(Killed):
        write(kind, target, Killed() if place == "in the block" else None)
    assert content(tmp_path) == {str(old.relative_to(tmp_path)): b"old"}
    assert list(tmp_path.iterdir()) == [target]


def test_a_draft_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sync, replace, order = os.fsync, os.replace, list[str]()
    monkeypatch.setattr(os, "fsync", lambda handle: (order.append("sync"), sync(handle)))
    monkeypatch.setattr(os, "replace", lambda source, place: (order.append("name"), replace(source, place)))
    with written_whole(tmp_path / "file") as draft:
        draft.write_text("text")
    assert order.index("sync") < order.index("name")


@pytest.mark.parametrize("kind", ["file", "directory"])
def test_a_file_never_takes_the_place_of_a_directory_nor_the_other_way_round(kind: str, tmp_path: Path) -> None:
    target = tmp_path / "target"
    if kind == "file":
        (target / "precious").mkdir(parents=True)
    else:
        target.write_text("precious")
    with pytest.raises(FileExistsError, match=f"target must be a {kind} to be replaced by one"):
        write(kind, target)
    assert target.is_dir() == (kind == "file")
    assert (target / "precious").is_dir() or target.read_text() == "precious"
    assert list(tmp_path.iterdir()) == [target]


@POSIX
def test_links_are_followed_and_pipes_written_into(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "far" / "file")
    with written_whole(tmp_path / "link") as draft:
        draft.write_text("text")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "far" / "file").read_text() == "text"
    # Not /dev/null: should this fail, root would lose it.
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    (tmp_path / "way").symlink_to(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    for path in (pipe, tmp_path / "way"):
        with written_whole(path) as draft:
            draft.write_text("text")
        assert os.read(reader, 100) == b"text"
    assert pipe.is_fifo()
    assert (tmp_path / "way").is_symlink()
    os.close(reader)


NAMES = ("tensors", "config")


def no_links(*_: object) -> None:
    raise OSError(1, "Operation not permitted")


@pytest.mark.parametrize("old", [True, False], ids=["over an old pair", "into nothing"])
@pytest.mark.parametrize("links", [True, False])
@pytest.mark.parametrize("point", range(3))
def test_files_that_belong_together_are_never_mixed(
    old: bool, point: int, links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever rename fails, the old pair is there; whichever a kill follows, the first is the newer one."""
    if old:
        for name in NAMES:
            (tmp_path / name).write_text("old")
    before = content(tmp_path)
    replace, steps = os.replace, list[dict[str, str]]()

    def watched(source: Path, place: Path) -> None:
        if len(steps) == point:
            steps.append({})
            raise OSError(5, "Input/output error")
        replace(source, place)
        steps.append({name: (tmp_path / name).read_text() for name in NAMES if (tmp_path / name).exists()})

    def write() -> None:
        with written_together(tmp_path, *NAMES) as drafts:
            for name in NAMES:
                (drafts / name).write_text("new")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", watched)
        if not links:
            patch.setattr(os, "link", no_links)
        if point < 2:
            with pytest.raises(OSError, match="Input/output"):
                write()
            assert content(tmp_path) == before
        else:
            write()
            assert content(tmp_path) == dict.fromkeys(NAMES, b"new")
    assert [step for step in steps if step][:1] in ([{"tensors": "new"} | ({"config": "old"} if old else {})], [])
    assert {path.name for path in tmp_path.iterdir()} <= set(NAMES)


def test_an_adapter_that_cannot_take_its_place_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_adapter(adapted(), tmp_path)
    (tmp_path / "README.md").write_text("of its owner")
    before = content(tmp_path)
    replace = os.replace

    def refused(source: Path, place: Path) -> None:
        if Path(place) == tmp_path / "adapter_config.json" and "new" in Path(source).parts:
            raise PermissionError(13, "Permission denied")
        replace(source, place)

    monkeypatch.setattr(os, "replace", refused)
    with pytest.raises(PermissionError):
        save_adapter(adapted(), tmp_path)
    assert content(tmp_path) == before


# Hashes and the cache


def test_a_hash_is_that_of_the_content(tmp_path: Path) -> None:
    data = os.urandom((1 << 20) + 17)
    (tmp_path / "file").write_bytes(data)
    assert sha256_of(tmp_path / "file") == hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize(
    ("platform", "variables", "expected"),
    [
        ("linux", {"FASTADAPT_CACHE": "chosen", "XDG_CACHE_HOME": "xdg"}, "chosen"),
        ("linux", {"XDG_CACHE_HOME": "xdg"}, "xdg/fastadapt"),
        ("linux", {"XDG_CACHE_HOME": ""}, "home/.cache/fastadapt"),
        ("linux", {}, "home/.cache/fastadapt"),
        ("darwin", {"XDG_CACHE_HOME": "xdg"}, "home/Library/Caches/fastadapt"),
        ("win32", {"LOCALAPPDATA": "local"}, "local/fastadapt"),
        ("win32", {}, "home/AppData/Local/fastadapt"),
        ("win32", {"FASTADAPT_CACHE": "chosen", "LOCALAPPDATA": "local"}, "chosen"),
    ],
)
def test_the_cache_is_where_the_variable_or_the_platform_says(
    platform: str, variables: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("FASTADAPT_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(files.sys, "platform", platform)
    monkeypatch.setattr(Path, "home", lambda: Path("home"))
    assert cache_directory() == Path(expected)


def test_without_a_home_the_cure_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FASTADAPT_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    with pytest.raises(FileNotFoundError, match="no home directory: set FASTADAPT_CACHE"):
        cache_directory()


def test_the_tuner_and_the_demo_keep_their_files_in_one_place(tmp_path: Path) -> None:
    tuner = "from fastadapt.operators.adapter_linear.tuner import kept_in"
    assets = "from fastadapt.files import cache_directory"
    program = f"{tuner}; {assets}; print(kept_in(), cache_directory())"
    environment = {**os.environ, "FASTADAPT_CACHE": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(tmp_path)] * 2


def test_drafts_are_made_in_one_place() -> None:
    root = Path(__file__).parent.parent
    sources = [*(root / "fastadapt").rglob("*.py"), *(root / "bench").rglob("*.py")]
    texts = {path.name: path.read_text(encoding="utf-8") for path in sources}
    makers = {name for name, text in texts.items() if "os.replace" in text or "mkstemp" in text}
    assert makers == {"files.py"}
