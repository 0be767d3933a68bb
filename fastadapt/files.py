"""Files: written whole or not at all, with the modes that new files get here; their hashes; and where the cache is."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from stat import S_IMODE

# What the directories of drafts begin with: a killed process leaves them.
DRAFTS = ".writing-"


def cache_directory() -> Path:
    """Where downloads and measurements are kept: $FASTADAPT_CACHE, or fastadapt/ in the platform's directory of caches.

    That is $XDG_CACHE_HOME or ~/.cache on Linux, ~/Library/Caches on macOS, %LOCALAPPDATA% on Windows.
    Raises FileNotFoundError where the user has no home directory.
    """
    if chosen := os.environ.get("FASTADAPT_CACHE"):
        return Path(chosen)
    try:
        if sys.platform == "win32":
            caches = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
        elif sys.platform == "darwin":
            caches = Path.home() / "Library" / "Caches"
        else:
            caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:
        raise FileNotFoundError(
            "the cache must have a place, and this user has no home directory: set FASTADAPT_CACHE to a directory"
        ) from None
    return caches / "fastadapt"


def sha256_of(path: Path) -> str:
    """The sha256 of what a file holds, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Gives the path of a draft, a file or a directory to be made, which takes the place of `path` when the block ends.

    After an error what was at `path` is there still, and nothing is left of the draft. It is on the disk before it gets
    its name, and all that is in it has the modes that new files and directories get here. Links are followed; what is
    no file and no directory, such as a pipe or /dev/null, is given itself.
    Raises FileExistsError for a directory in the place of a file, or a file in that of a directory.
    """
    if path.exists() and not (path.is_file() or path.is_dir()):
        yield path
        return
    path = Path(os.path.realpath(path))
    with written_together(path.parent, path.name) as drafts:
        yield drafts / path.name


@contextlib.contextmanager
def written_together(directory: Path, *names: str) -> Iterator[Path]:
    """Gives a directory for the drafts of files that belong together, which take these names in `directory` at the end.

    As `written_whole` does, for all of them: after an error the old ones are there still. They take their places in the
    order of the names, each in one step: a kill between them leaves new ones beside old ones, and so whoever reads them
    must know by the first whether the others go with it.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory, prefix=DRAFTS, ignore_cleanup_errors=True) as scratch:
        drafts, aside = Path(scratch, "new"), Path(scratch, "old")
        for place in (drafts, aside):
            place.mkdir()
        yield drafts
        _settle(drafts)
        _exchange(drafts, directory, aside, names)
    _sync_directory(directory)


def _exchange(drafts: Path, directory: Path, aside: Path, names: tuple[str, ...]) -> None:
    """Moves the drafts into their places, and what was there aside; after an error it is as it was."""
    there = [name for name in names if os.path.lexists(directory / name)]
    for name in there:
        if (directory / name).is_dir() != (drafts / name).is_dir():
            what = "a directory" if (drafts / name).is_dir() else "a file"
            raise FileExistsError(f"{directory / name} must be {what} to be replaced by one: choose another place")
    moves = [(directory / name, aside / name) for name in there if (directory / name).is_dir()]
    moves += [(drafts / name, directory / name) for name in names]
    # A single file is replaced in one step.
    kept = {directory / name: aside / name for name in there if len(names) > 1 and (directory / name).is_file()}
    for path, place in kept.items():
        _keep(path, place)
    done: list[tuple[Path, Path]] = []
    try:
        for source, place in moves:
            os.replace(source, place)
            done.append((source, place))
    except BaseException:
        for source, place in reversed(done):
            if place in kept:
                os.replace(kept[place], place)
            else:
                os.replace(place, source)
        raise


def _keep(path: Path, place: Path) -> None:
    """A second name for a file, or a second file where the system has no second names."""
    try:
        os.link(path, place)
    except OSError:
        shutil.copy2(path, place)


def _settle(drafts: Path) -> None:
    """Gives all drafts the modes of new files and directories, and waits until they are on the disk."""
    # Some writers make files for their owner alone. The umask cannot be read without changing it for all threads, and a
    # directory's default ACL goes before it: what is new here tells.
    new = drafts.parent / "mode"
    new.touch()
    file_mode, directory_mode = (S_IMODE(place.stat().st_mode) for place in (new, drafts))
    for root, _, files in os.walk(drafts, topdown=False):
        for name in files:
            os.chmod(Path(root, name), file_mode)
            _sync(Path(root, name))
        os.chmod(root, directory_mode)
        _sync_directory(Path(root))


def _sync(path: Path) -> None:
    """Waits until what is at `path` is on the disk."""
    handle = os.open(path, os.O_RDWR if sys.platform == "win32" else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sync_directory(path: Path) -> None:
    """Waits until the names in a directory are on the disk, where the system knows how to."""
    with contextlib.suppress(OSError):
        _sync(path)
