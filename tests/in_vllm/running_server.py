"""`vllm serve` in processes of its own on a loopback port."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from shared_memory import held_by
from tiny_served import PROMPTS, TOKENS, Served

START_SECONDS = 300


class Server:
    """It starts at once with the adapter "lora" and finds the others by their names; slots: how many at a time."""

    def __init__(self, served: Served, log: Path, slots: int = 3, kept: int = 4) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.served, self.log = served, log
        command = [Path(sys.executable).with_name("vllm"), "serve", served.model, "--host", "127.0.0.1"]
        command += ["--port", self.port, "--dtype", "float32", "--enforce-eager", "--max-model-len", 64]
        command += ["--enable-lora", "--max-loras", slots, "--max-cpu-loras", kept, "--served-model-name", "base"]
        command += ["--lora-modules", f"lora={served.directories['lora']}"]
        environment = {key: value for key, value in os.environ.items() if key != "VLLM_ENABLE_V1_MULTIPROCESSING"}
        environment |= {
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
            "FASTADAPT_VLLM_ADAPTERS": str(served.directories["lora"].parent),
        }
        with log.open("wb") as out:
            self.process = subprocess.Popen(
                [str(part) for part in command],
                env=environment,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
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
        try:
            found = self.ask(path, **fields)
        except urllib.error.HTTPError as error:
            with error as answer:
                return answer.code, answer.read().decode()
        raise AssertionError(f"{path} {fields} must be refused, got {found}")

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

    def kill(self) -> None:
        """At once, with all of its processes, as a machine that runs out of memory would."""
        shared = held_by(self.process.pid)
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for left in shared:  # nobody is there to give it back
            left.unlink(missing_ok=True)

    def close(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.kill()
