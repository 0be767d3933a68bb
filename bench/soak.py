"""A pool that is used by several threads at once for minutes: nobody ever gets another adapter's answer.

Four threads ask for mixed batches of LoRA, DoRA, VeRA and AdaLoRA adapters of ranks 4 to 256, in forward and in
generate, some of which end in an exception from inside; meanwhile they load, replace, remove, evict and pin. Budgets
are 0.3 to 1.2 of what all adapters take. Every answer is compared with the adapter's alone, without any serving code.
What counts: wrong answers; errors that are none of those which the pool documents; bytes in use, and adapters that are
held, when all are done.

Runs in blocks, each written to the JSON file when it is done: a run that was stopped goes on behind them.
"""

from __future__ import annotations

import contextlib
import copy
import json
import random
import tempfile
import threading
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from bench import page, report
from bench.fuzz import tiny_model
from bench.plots import Document
from fastadapt import AdaLoRAConfig, DoRAConfig, LoRAConfig, VeRAConfig, inject, load_adapter, save_adapter
from fastadapt.commands.report import write_json
from fastadapt.progress import progress_bar
from fastadapt.serving import AdapterError, MultiAdapterModel, PoolFullError

SHARES = (0.3, 0.5, 0.7, 0.9, 1.2)
THREADS, ROWS, TOKENS, VERSIONS = 4, 4, 5, 2
COUNTED = ("wrong", "untyped", "leaked_bytes", "lost_holds")


def crowd() -> dict[str, Any]:
    """Adapters that mix: ranks from 4 to 256, of all layers or of two."""
    two, every = ["q_proj", "down_proj"], "all-linear"
    found: dict[str, Any] = {
        f"lora{r}": LoRAConfig(r=r, target_modules=two if place % 2 else every)
        for place, r in enumerate((4, 8, 24, 64, 100, 256))
    }
    found |= {f"dora{r}": DoRAConfig(r=r, target_modules=every) for r in (5, 33, 128)}
    found |= {f"adalora{r}": AdaLoRAConfig(init_r=r, target_r=4, total_step=9, target_modules=two) for r in (12, 48)}
    found |= {f"vera{key}": VeRAConfig(r=64, projection_prng_key=key // 2, target_modules=every) for key in range(4)}
    return found


class BoomError(Exception):
    """What goes wrong inside of a generate."""


class _Breaking(LogitsProcessor):
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        raise BoomError


class Soak:
    """Adapters in `root`, in two versions each, and what each of them answers by itself."""

    def __init__(self, root: Path) -> None:
        self.base = tiny_model().requires_grad_(False)
        self.ids = torch.randint(3, 60, (ROWS, TOKENS), generator=torch.Generator().manual_seed(0))
        self.directories: dict[str, list[Path]] = {}
        self.answers: dict[str | None, list[Tensor]] = {None: [self._answer(None)]}
        for name, config in crowd().items():
            self.directories[name] = [root / f"{name}-{version}" for version in range(VERSIONS)]
            for version, directory in enumerate(self.directories[name]):
                model = inject(copy.deepcopy(self.base), copy.deepcopy(config))
                generator = torch.Generator().manual_seed(version)
                with torch.no_grad():
                    for parameter in model.parameters():
                        if parameter.requires_grad:
                            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
                save_adapter(model, directory)
            self.answers[name] = [self._answer(directory) for directory in self.directories[name]]
        roomy = MultiAdapterModel(copy.deepcopy(self.base), budget=64 << 20)
        for name, versions in self.directories.items():
            roomy.load(versions[0], name)
        self.bytes = roomy.pool.used_bytes

    def _answer(self, directory: Path | None) -> Tensor:
        model = copy.deepcopy(self.base)
        if directory is not None:
            load_adapter(model, directory)
        with torch.no_grad():
            logits: Tensor = model.eval()(input_ids=self.ids).logits
        return logits

    def block(self, seed: int, share: float, operations: int) -> report.Row:
        """So many operations of each thread on a new pool of this share of all bytes; what came of them."""
        served = MultiAdapterModel(copy.deepcopy(self.base), budget=int(share * self.bytes))
        counts: Counter[str] = Counter()
        details: list[str] = []
        start = time.perf_counter()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*from now on, and was")
            for name, versions in self.directories.items():
                with contextlib.suppress(PoolFullError):  # the largest do not fit into the smallest pool
                    served.load(versions[0], name)
            users = [_Thread(self, served, f"{seed} {index}", counts, details) for index in range(THREADS)]
            threads = [threading.Thread(target=user.run, args=(operations,)) for user in users]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        counts["lost_holds"] += sum(served.pool.info(name).in_use for name in served.pool.names)
        for name in served.pool.names:
            served.pool.unpin(name)
            try:
                served.pool.evict(name)
            except ValueError as error:
                details.append(str(error))
        counts["leaked_bytes"] += max(served.pool.used_bytes, served.pool.held_bytes)
        row: report.Row = {"case": f"block {seed}", "budget": share, "seconds": time.perf_counter() - start}
        row |= {name: counts[name] for name in (*_Thread.KINDS, "answers", "full", *COUNTED)}
        return row | {"details": details[:5]}


class _Thread:
    """One of those that use a pool."""

    KINDS = ("forward", "generate", "boom", "load", "replace", "evict", "pin", "remove")
    WEIGHTS = (8, 3, 2, 2, 2, 3, 1, 1)

    def __init__(
        self, soak: Soak, served: MultiAdapterModel, seed: str, counts: Counter[str], details: list[str]
    ) -> None:
        self.soak, self.served, self.counts, self.details = soak, served, counts, details
        self.random = random.Random(seed)
        self.names = list(soak.directories)

    def run(self, operations: int) -> None:
        for kind in self.random.choices(self.KINDS, self.WEIGHTS, k=operations):
            try:
                getattr(self, kind)()
                self.counts[kind] += 1
            except PoolFullError:
                self.counts["full"] += 1
            except Exception:
                self.counts["untyped"] += 1
                self.details.append(traceback.format_exc())

    def _ask(self, call: Callable[[list[str | None]], Tensor | None]) -> None:
        names = [self.random.choice([*self.names, None]) for _ in range(ROWS)]
        try:
            logits = call(names)
        except KeyError as error:  # one that another thread has just removed
            if "not in the pool" not in str(error):
                raise
            return
        if logits is None:
            return
        self.counts["answers"] += 1
        versions: dict[str | None, int] = {}
        for row, name in enumerate(names):
            answers = self.soak.answers[name]
            fitting = [version for version, answer in enumerate(answers) if _close(logits[row], answer[row])]
            # Whoever asks while an adapter is replaced gets either, and one of them for all its rows.
            if not fitting or versions.setdefault(name, fitting[0]) not in fitting:
                self.counts["wrong"] += 1
                self.details.append(f"row {row} of {names}")

    def forward(self) -> None:
        def call(names: list[str | None]) -> Tensor:
            logits: Tensor = self.served(input_ids=self.soak.ids, adapter_ids=names).logits
            return logits[:, -1]

        self._ask(call)

    def generate(self, breaking: bool = False) -> None:
        def call(names: list[str | None]) -> Tensor | None:
            try:
                output = self.served.generate(
                    input_ids=self.soak.ids,
                    attention_mask=torch.ones_like(self.soak.ids),
                    adapter_ids=names,
                    max_new_tokens=2,
                    do_sample=False,
                    pad_token_id=0,
                    output_logits=True,
                    return_dict_in_generate=True,
                    logits_processor=LogitsProcessorList([_Breaking()] if breaking else []),
                )
            except BoomError:
                return None
            logits: Tensor = output.logits[0]
            return logits

        self._ask(call)

    def boom(self) -> None:
        self.generate(breaking=True)

    def load(self, version: int | None = None) -> None:
        name = self.random.choice(self.names)
        version = self.random.randrange(VERSIONS) if version is None else version
        self.served.load(self.soak.directories[name][version], name)

    def replace(self) -> None:
        self.load(1)
        self.load(0)

    def evict(self) -> None:
        self._allowing(("is in use", "is pinned", "not in the pool"), self.served.pool.evict)

    def pin(self) -> None:
        name = self.random.choice(self.names)
        self._allowing(("not in the pool",), self.served.pool.pin, name)
        self.forward()
        self._allowing(("not in the pool",), self.served.pool.unpin, name)

    def remove(self) -> None:
        name = self.random.choice(self.names)
        self._allowing(("not in the pool",), self.served.pool.remove, name)
        self.served.load(self.soak.directories[name][self.random.randrange(VERSIONS)], name)

    def _allowing(self, messages: tuple[str, ...], call: Callable[[str], object], name: str | None = None) -> None:
        try:
            call(self.random.choice(self.names) if name is None else name)
        except (ValueError, KeyError) as error:
            if isinstance(error, AdapterError) or not any(message in str(error) for message in messages):
                raise


def _close(actual: Tensor, expected: Tensor) -> bool:
    last = expected[-1]
    return bool((actual - last).abs().max() <= 5e-5 * last.abs().max())


def finished(json_file: Path | None, operations: int) -> list[report.Row]:
    """The blocks that a stopped run with as many operations has written."""
    if json_file is None or not json_file.is_file():
        return []
    document = json.loads(json_file.read_text(encoding="utf-8"))
    return document["rows"] if document.get("operations") == operations else []


def main(
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the blocks there, and go on behind them.")
    ] = None,
    seconds: Annotated[float, typer.Option(help="All blocks together.")] = 600.0,
    operations: Annotated[int, typer.Option(help="Of each thread in a block.")] = 150,
) -> None:
    """Several threads on one pool, each answer compared; exit code 1 for anything wrong, untyped or left behind."""
    torch.set_num_threads(1)
    rows = finished(json_file, operations)
    with tempfile.TemporaryDirectory() as root, progress_bar("seconds", int(seconds)) as update:
        soak = Soak(Path(root))
        while (done := sum(row["seconds"] for row in rows)) < seconds:
            update(completed=int(done))
            rows.append(soak.block(len(rows), SHARES[len(rows) % len(SHARES)], operations))
            if json_file is not None:
                write_json(json_file, "soak", rows, operations=operations)
    groups = {f"budget {share}": [row for row in rows if row["budget"] == share] for share in SHARES} | {"all": rows}
    names = ("seconds", *_Thread.KINDS, "answers", "full", *COUNTED)
    sums: list[report.Row] = [
        {"case": case} | {name: sum(row[name] for row in members) for name in names} for case, members in groups.items()
    ]
    columns = {"case": "case"} | {name: name.replace("_", " ") for name in names}
    report.print_table(f"{THREADS} threads on one pool, {len(rows)} blocks", sums, columns)
    if any(sums[-1][name] for name in COUNTED):
        raise typer.Exit(1)


@page.section("soak", "Threads on one pool of adapters")
def section(document: Document) -> str:
    rows = []
    for share in SHARES:
        members = [row for row in document["rows"] if row["budget"] == share]
        counts = [sum(row[name] for row in members) for name in ("answers", *COUNTED)]
        rows.append(" | ".join([f"budget {share}", *[f"{count:,}" for count in counts]]))
    return page.table(" | ".join(["", "answers", *[name.replace("_", " ") for name in COUNTED]]), rows)
