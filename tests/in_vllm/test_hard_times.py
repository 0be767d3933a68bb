"""A server under load, with adapters that are hostile, and killed while one is loaded."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import suppress
from hashlib import sha256
from itertools import cycle
from pathlib import Path

import pytest

pytest.importorskip("vllm.lora", reason="vLLM has an environment of its own: tests/in_vllm/environment.py")

from load import load, several
from running_server import Server
from shared_memory import held_by
from tiny_served import ADAPTERS, PROMPTS, Served, save, save_tokenizer


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Served:
    found = save(
        tmp_path_factory.mktemp("hard"), "llama", {name: ADAPTERS[method] for name, method in several(6).items()}
    )
    save_tokenizer(found.model)
    assert len(set(map(str, found.tokens.values()))) == 7
    return found


@pytest.fixture(scope="module")
def server(served: Served) -> Iterator[Server]:
    server = Server(served, served.model.parent / "log")
    try:
        server.wait()
        yield server
    finally:
        server.close()


def test_no_answer_is_another_adapters_while_adapters_come_and_go(server: Server, served: Served) -> None:
    outcome = load(server, list(served.directories), 60, clients=6)
    assert outcome.faults == []
    assert len(outcome.base) + len(outcome.adapters) == 60
    assert outcome.changes > 0


def test_what_the_load_looks_for_is_found(server: Server, served: Served) -> None:
    """Told that two adapters answer as each other, it says so."""
    names = list(served.directories)[:2]
    crossed = dict(zip(names, (served.tokens[name] for name in reversed(names)), strict=True))
    server.served = served._replace(tokens=served.tokens | crossed)
    try:
        faults = load(server, names, 10, clients=2).faults
    finally:
        server.served = served
    assert any(fault.startswith(f"{names[0]}: the answer to") for fault in faults)
    assert any("does not answer as" in fault for fault in faults)


def _hostile(kind: str, good: Path, bad: Path) -> None:
    shutil.copytree(good, bad)
    config, tensors = bad / "adapter_config.json", bad / "adapter_model.safetensors"
    if kind == "cut off":
        os.truncate(tensors, tensors.stat().st_size // 2)
    elif kind == "a header that goes on for ever":
        tensors.write_bytes((2**62).to_bytes(8, "little") + tensors.read_bytes()[8:])
    elif kind == "a pipe that nobody writes to":
        config.unlink()
        os.mkfifo(config)
    elif kind == "a directory for a file":
        tensors.unlink()
        tensors.mkdir()
    elif kind == "a pickle":
        tensors.rename(bad / "adapter_model.bin")
    elif kind == "a rank of a thousand million":
        config.write_text(json.dumps(json.loads(config.read_text()) | {"r": 10**9}))
    elif kind == "lists in lists":
        config.write_text("[" * 100_000)
    else:
        tensors.unlink()
        tensors.symlink_to("/dev/zero")


# What the refusal says, from vLLM without the path.
KINDS = {
    "cut off": "is not a valid safetensors file",
    "a header that goes on for ever": "is not a valid safetensors file",
    "a pipe that nobody writes to": "must be a regular file",
    "a directory for a file": "must be a regular file",
    "a pickle": "is a pickle",
    "a rank of a thousand million": "r may be 512, got 1000000000",
    "lists in lists": "is not valid JSON",
    "a device without an end": "must be a regular file",
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_hostile_directory_is_refused_and_the_server_goes_on(kind: str, server: Server, tmp_path: Path) -> None:
    _hostile(kind, server.served.directories["dora"], tmp_path / "bad")
    status, text = server.refusal("/v1/load_lora_adapter", lora_name="bad", lora_path=str(tmp_path / "bad"))
    assert status in (400, 500)
    assert KINDS[kind] in text
    assert "bad" not in server.names()
    server.check("base")
    server.check("dora")


def _contents(root: Path) -> dict[str, str]:
    return {str(path): sha256(path.read_bytes()).hexdigest() for path in root.rglob("*") if path.is_file()}


def test_killed_while_it_loads_it_serves_everything_again(server: Server, served: Served, tmp_path: Path) -> None:
    root = served.directories["lora"].parent
    before, loads, enough = _contents(root), 0, threading.Event()

    def go_on_loading() -> None:
        nonlocal loads
        with suppress(OSError):  # which is how it ends
            for name in cycle(served.directories):
                fields = {"lora_path": str(served.directories[name]), "load_inplace": True}
                server.ask("/v1/load_lora_adapter", lora_name="changing", **fields)
                loads += 1
                if loads == 5:
                    enough.set()

    thread = threading.Thread(target=go_on_loading)
    thread.start()
    assert enough.wait(120)
    shared = held_by(server.process.pid)
    server.kill()
    thread.join(120)
    assert not thread.is_alive()
    assert _contents(root) == before
    assert shared
    assert not any(path.exists() for path in shared)
    again = Server(served, tmp_path / "log")
    try:
        again.wait()
        for name in ("base", *served.directories):
            again.check(name)
        shutil.copytree(served.directories["vera"], tmp_path / "new")
        again.ask("/v1/load_lora_adapter", lora_name="changing", lora_path=str(tmp_path / "new"))
        assert [again.tokens("changing", prompt) for prompt in PROMPTS] == served.tokens["vera"]
    finally:
        again.close()
