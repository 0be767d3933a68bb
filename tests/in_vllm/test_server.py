"""`vllm serve` on a loopback port: adapters are listed, loaded, resolved and unloaded, and bad ones refused."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm.lora", reason="vLLM has an environment of its own: tests/in_vllm/environment.py")

from tiny_served import ADAPTERS, PROMPTS, TOKENS, Served, save, save_tokenizer

START_SECONDS = 300


class Server:
    def __init__(self, served: Served, log: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.served, self.log = served, log
        command = [Path(sys.executable).with_name("vllm"), "serve", served.model, "--host", "127.0.0.1"]
        command += ["--port", self.port, "--dtype", "float32", "--enforce-eager", "--max-model-len", 64]
        command += ["--enable-lora", "--max-loras", 3, "--max-cpu-loras", 4, "--served-model-name", "base"]
        command += ["--lora-modules", f"lora={served.directories['lora']}"]
        environment = {key: value for key, value in os.environ.items() if key != "VLLM_ENABLE_V1_MULTIPROCESSING"}
        environment |= {
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
            "FASTADAPT_VLLM_ADAPTERS": str(served.directories["lora"].parent),
        }
        with log.open("wb") as out:
            self.process = subprocess.Popen(
                [str(part) for part in command], env=environment, stdout=out, stderr=subprocess.STDOUT
            )

    def wait(self) -> None:
        stop = time.monotonic() + START_SECONDS
        while time.monotonic() < stop and self.process.poll() is None:
            try:
                self.ask("/health")
                return
            except OSError:
                time.sleep(1)
        raise RuntimeError(f"the server did not start: {self.log.read_text()[-4000:]}")

    def ask(self, path: str, **fields: Any) -> Any:
        """The server's answer: JSON, or text where it is none."""
        data = json.dumps(fields).encode() if fields else None
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}", data, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=120) as answer:
            text = answer.read().decode()
        return json.loads(text) if text[:1] in "{[" and text else text

    def refusal(self, path: str, **fields: Any) -> tuple[int, str]:
        """(status, text) of an answer that says no."""
        with pytest.raises(urllib.error.HTTPError) as caught:
            self.ask(path, **fields)
        with caught.value as answer:
            return answer.code, answer.read().decode()

    def tokens(self, model: str, prompt: list[int]) -> list[int]:
        fields = {"prompt": prompt, "max_tokens": TOKENS, "temperature": 0}
        answer = self.ask("/v1/completions", model=model, ignore_eos=True, return_token_ids=True, **fields)
        found: list[int] = answer["choices"][0]["token_ids"]
        return found

    def names(self) -> set[str]:
        return {model["id"] for model in self.ask("/v1/models")["data"]}

    def check(self, model: str) -> None:
        tokens = self.served.tokens["" if model == "base" else model]
        assert [self.tokens(model, prompt) for prompt in PROMPTS] == tokens

    def close(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()


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
