"""`vllm serve` on a loopback port: adapters are listed, loaded, resolved and unloaded, and bad ones refused."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("vllm.lora", reason="vLLM has an environment of its own: tests/in_vllm/environment.py")

from running_server import Server
from tiny_served import ADAPTERS, PROMPTS, save, save_tokenizer


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    root = tmp_path_factory.mktemp("server")
    served = save(root, "llama", {name: ADAPTERS[name] for name in ("lora", "rslora", "dora", "vera")})
    save_tokenizer(served.model)
    server = Server(served, root / "log")
    try:
        server.wait()
        yield server
    finally:
        server.close()


def test_it_says_that_it_is_on(server: Server) -> None:
    assert "fastadapt is on" in server.log.read_text()


def test_what_it_started_with(server: Server) -> None:
    assert server.names() >= {"base", "lora"}
    server.check("base")
    server.check("lora")


def test_loading_and_unloading(server: Server) -> None:
    server.ask("/v1/load_lora_adapter", lora_name="dora", lora_path=str(server.served.directories["dora"]))
    assert "dora" in server.names()
    server.check("dora")
    server.ask("/v1/unload_lora_adapter", lora_name="dora")
    assert "dora" not in server.names()


def test_an_adapter_that_is_asked_for_by_name(server: Server) -> None:
    server.check("vera")
    assert "vera" in server.names()


@pytest.mark.parametrize("name", ["../adapters/vera", "..", "/etc", "vera/../lora", "gone"])
def test_no_name_leads_out_of_the_directory(server: Server, name: str) -> None:
    status, _ = server.refusal("/v1/completions", model=name, prompt=[1], max_tokens=1)
    assert status == 404


def test_a_bad_adapter_is_refused_and_the_server_goes_on(server: Server, tmp_path: Path) -> None:
    shutil.copytree(server.served.directories["dora"], tmp_path / "bad")
    (tmp_path / "bad" / "adapter_config.json").write_text("{")
    status, text = server.refusal("/v1/load_lora_adapter", lora_name="bad", lora_path=str(tmp_path / "bad"))
    assert status in (400, 500)
    assert "is not valid JSON" in text
    assert "bad" not in server.names()
    server.check("base")
    server.check("lora")


def test_everybody_at_once(server: Server) -> None:
    rows = [(name, index) for index in range(len(PROMPTS)) for name in ("base", "lora", "vera")]
    with ThreadPoolExecutor(len(rows)) as threads:
        found = list(threads.map(lambda row: server.tokens(row[0], PROMPTS[row[1]]), rows))
    assert found == [server.served.tokens["" if name == "base" else name][index] for name, index in rows]


def test_another_method_in_the_place_of_one(server: Server) -> None:
    paths = server.served.directories
    server.ask("/v1/load_lora_adapter", lora_name="changing", lora_path=str(paths["lora"]))
    server.ask("/v1/load_lora_adapter", lora_name="changing", lora_path=str(paths["vera"]), load_inplace=True)
    assert [server.tokens("changing", prompt) for prompt in PROMPTS] == server.served.tokens["vera"]
