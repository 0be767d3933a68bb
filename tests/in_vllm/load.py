"""Many clients at once over many adapters, while others are loaded and unloaded; every answer is compared.

``python tests/in_vllm/load.py`` starts `vllm serve` on a loopback port with 50 adapters of distinct answers and sends
1,000 requests, first to the base model alone, then to all of them: it prints latencies, and fails if one answer is not
the merged model's. ``--smollm2``: SmolLM2-135M in the place of a tiny model.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from typing import NamedTuple

from running_server import Server
from tiny_served import ADAPTERS, PROMPTS, Served, save, save_tokenizer, served_by, smollm2

METHODS = ("lora", "dora", "vera", "rslora")


class Outcome(NamedTuple):
    """Seconds of each answer, of the base model's rows and of the adapters'; what went wrong; loads and unloads."""

    base: list[float]
    adapters: list[float]
    faults: list[str]
    changes: int


def several(number: int) -> dict[str, str]:
    """The method of each of so many adapters by its name; the first is called "lora"."""
    methods = [METHODS[place % len(METHODS)] for place in range(number)]
    return {method if place < len(METHODS) else f"{method}-{place}": method for place, method in enumerate(methods)}


def load(server: Server, names: Sequence[str], requests: int, clients: int) -> Outcome:
    """Sends the requests, a fifth of them to the base model, and with adapters loads and unloads guests beside."""
    drawn = random.Random(0)
    outcome: tuple[list[float], list[float], list[str]] = ([], [], [])
    base, adapters, faults = outcome
    done = threading.Event()

    def ask(model: str, index: int) -> None:
        start = time.perf_counter()
        try:
            tokens = server.tokens(model, PROMPTS[index])
        except OSError as error:
            faults.append(f"{model}: {error}")
            return
        (base if model == "base" else adapters).append(time.perf_counter() - start)
        if tokens != server.served.tokens["" if model == "base" else model][index]:
            faults.append(f"{model}: the answer to {PROMPTS[index]} is {tokens}")

    def change() -> int:
        """A guest comes, answers as what it was loaded from, becomes another in its place, and is gone."""
        for turn in count():
            guest = f"guest-{turn}"
            for place, name in enumerate(drawn.sample(names, 2)):
                path = str(server.served.directories[name])
                server.ask("/v1/load_lora_adapter", lora_name=guest, lora_path=path, load_inplace=place > 0)
                if server.tokens(guest, PROMPTS[0]) != server.served.tokens[name][0]:
                    faults.append(f"{guest} does not answer as {name}")
            server.ask("/v1/unload_lora_adapter", lora_name=guest)
            status, _ = server.refusal("/v1/completions", model=guest, prompt=[1], max_tokens=1)
            if status != 404:
                faults.append(f"{guest} is gone, and its status is {status}")
            if done.is_set():
                return 3 * (turn + 1)
        raise AssertionError

    order = random.Random(1)
    work = [
        (order.choice(names) if names and place % 5 else "base", order.randrange(len(PROMPTS)))
        for place in range(requests)
    ]
    with ThreadPoolExecutor(1) as other, ThreadPoolExecutor(clients) as threads:
        changing = other.submit(change) if names else None
        try:
            list(threads.map(lambda one: ask(*one), work))
        finally:
            done.set()
        return Outcome(*outcome, changing.result() if changing is not None else 0)


def percentiles(seconds: Sequence[float]) -> str:
    cuts = statistics.quantiles(seconds, n=100)
    return ", ".join(f"{share}% {1000 * cuts[share - 1]:.0f} ms" for share in (50, 90, 95, 99))


def _served(root: Path, adapters: int, real: bool) -> Served:
    """The model and its adapters, no two of which answer alike."""
    configs = {name: ADAPTERS[method] for name, method in several(adapters).items()}
    if real:
        found = served_by(smollm2(), root / "adapters", configs, size=0.03)
    else:
        found = save(root, "llama", configs)
        save_tokenizer(found.model)
    if len(set(map(str, found.tokens.values()))) != len(found.tokens):
        raise ValueError(f"{adapters} adapters must have distinct answers, got two that answer alike")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, value in (("requests", 1000), ("adapters", 50), ("clients", 8), ("slots", 8), ("kept", 16)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--smollm2", action="store_true")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        print(f"{given.adapters} adapters and transformers' answers are made", file=sys.stderr)
        served = _served(root, given.adapters, given.smollm2)
        server = Server(served, root / "log", given.slots, given.kept)
        try:
            server.wait()
            print("the server is there", file=sys.stderr)
            faults = []
            for title, names in (("the base model alone", []), ("all", list(served.directories))):
                start = time.perf_counter()
                outcome = load(server, names, given.requests, given.clients)
                seconds = time.perf_counter() - start
                print(f"{title}: {given.requests} requests of {given.clients} clients in {seconds:.1f} s")
                print(f"  base rows: {percentiles(outcome.base)}")
                if names:
                    print(f"  adapters: {percentiles(outcome.adapters)}; {outcome.changes} loads and unloads beside")
                faults += outcome.faults
        finally:
            server.close()
    print(f"{len(faults)} wrong answers or errors", *faults[:20], sep="\n")
    if faults:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
