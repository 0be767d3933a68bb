"""What a pool of thousands of adapters costs: throughput, memory, and whether it stays right while they come and go.

* scale: batches of 8 distinct LoRA r8 adapters in bf16, drawn anew for each from 2,000 registered ones and from 8; a
  prefill of 64 tokens and some steps of decoding. The throughput of the former over the latter's.
* memory: VeRA adapters of r256 that share their pair: bytes held for each over those of its own two vectors a layer,
  and all that the process grew by.
* churn: loads, replacements and evictions while requests run in another thread; every answer is compared.
"""

from __future__ import annotations

import random
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import Annotated, Any

import psutil
import torch
import typer

from bench import measure, page, report
from bench.cases import chosen
from bench.plots import Document
from bench.serve import PROMPT, adapter_bytes, random_adapter
from bench.step import LAYERS, VOCAB, Shape, base_model
from fastadapt import LoRAConfig, inject, save_adapter
from fastadapt.commands.demo.training import skeleton
from fastadapt.commands.report import write_json
from fastadapt.serving import MultiAdapterModel

CASES = {name: name for name in ("scale", "memory", "churn")}
DECODED = 16


def scale(registered: int, rounds: int, layers: int) -> report.Row:
    """Throughput with many registered adapters over that with 8."""
    base = base_model(Shape(layers=layers)).to(torch.bfloat16).eval()
    size = int(adapter_bytes("lora", 8) / 2 * layers / LAYERS)
    served = {}
    for count in (8, registered):
        served[count] = MultiAdapterModel(skeleton(base), budget=int(1.05 * count * size) + (64 << 20))
        linears = {path: layer for path, layer in served[count].pool.layers.items() if path != "lm_head"}
        like = random_adapter(linears, "lora", 8, 0)
        for index in report.tracked(range(count), f"registering {count}"):
            served[count].pool.add(f"{index}", like._replace(identity=f"{index}"))
    shuffler = random.Random(0)
    ids = torch.randint(VOCAB, (8, PROMPT), generator=torch.Generator().manual_seed(0))

    def request(count: int) -> None:
        names = shuffler.sample(served[count].pool.names, 8)
        served[count].generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            adapter_ids=names,
            max_new_tokens=DECODED,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=None,
        )

    variants = {"few": lambda: request(8), "few, second": lambda: request(8), "many": lambda: request(registered)}
    results = measure.interleave(variants, rounds)
    wall, cpu = measure.compare(results, "many", ("few", "few, second"))
    pool = served[registered].pool
    seconds = statistics.median(timing["many"].wall for timing in results)
    return {
        "case": f"scale_{registered}",
        "throughput": 1 / wall.median,
        "throughput_low": 1 / wall.high,
        "throughput_high": 1 / wall.low,
        "throughput_cpu": 1 / cpu.median,
        "tokens_per_s": 8 * (PROMPT + DECODED) / seconds,
        "registered": registered,
        "bytes_each": pool.held_bytes / registered,
        "held_over_true": pool.held_bytes / sum(pool.info(name).bytes for name in pool.names),
    }


def memory(count: int, layers: int) -> report.Row:
    """Bytes of each of many VeRA adapters."""
    base = base_model(Shape(layers=layers)).eval()
    size = adapter_bytes("vera", 256) * layers / LAYERS
    served = MultiAdapterModel(base, budget=int(1.04 * count * size) + (64 << 20))
    linears = {path: layer for path, layer in served.pool.layers.items() if path != "lm_head"}
    like = random_adapter(linears, "vera", 256, 0)
    assert like.shared is not None
    pair = sum(factor.numel() for factor in like.shared) * 4
    served.pool.add("0", like)
    process = psutil.Process()
    before, held = process.memory_info().rss, served.pool.held_bytes
    for index in report.tracked(range(1, count), f"registering {count}"):
        served.pool.add(f"{index}", like._replace(identity=f"{index}"))
    true = served.pool.info("1").bytes
    return {
        "case": f"memory_{count}_vera",
        "registered": count,
        "bytes_each": (served.pool.held_bytes - held) / (count - 1),
        "true_bytes_each": true,
        "held_over_true": served.pool.held_bytes / (count * true + pair),
        "process_over_true": (process.memory_info().rss - before) / ((count - 1) * true),
        "shared_bytes": pair,
    }


def churn(operations: int, layers: int) -> report.Row:
    """Wrong answers and lost pages after loads, replacements and evictions under a running workload."""
    torch.manual_seed(0)
    base = base_model(Shape(layers=layers)).eval()
    ids = torch.randint(VOCAB, (4, 8), generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as scratch:
        directories: list[Path] = []
        for index in report.tracked(range(8), "making adapters"):
            model = inject(
                skeleton(base), LoRAConfig(r=4 + index, target_modules="all-linear", use_dora=index % 2 == 1)
            )
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if "lora_B" in name:
                        parameter.normal_(std=0.02)
            directories.append(Path(scratch, f"{index}"))
            save_adapter(model, directories[-1])
        one = MultiAdapterModel(skeleton(base), budget=1 << 30)
        expected: list[Any] = []
        for directory in directories:
            one.load(directory)
            expected.append(one(input_ids=ids, adapter_ids=directory.name).logits)
        # Two names for each directory; room for about half of all.
        budget = max(one.pool.held_bytes, 1 << 24)
        served = MultiAdapterModel(skeleton(base), budget=budget)
        names = [f"{index}{half}" for index in range(8) for half in "ab"]
        for name in names:
            served.load(directories[int(name[0])], name)
        wrong, answers, stop = 0, 0, threading.Event()

        def work() -> None:
            nonlocal wrong, answers
            shuffler = random.Random(1)
            while not stop.is_set():
                rows = shuffler.sample(names, 4)
                logits = served(input_ids=ids, adapter_ids=rows).logits
                for row, name in enumerate(rows):
                    answers += 1
                    exact = expected[int(name[0])][row]
                    wrong += not torch.allclose(logits[row], exact, atol=1e-4 * float(exact.abs().max()))

        thread = threading.Thread(target=work)
        thread.start()
        shuffler, evictions, loads = random.Random(2), 0, 0
        for _ in report.tracked(range(operations), "churning"):
            name = shuffler.choice(names)
            try:
                served.pool.evict(name)
                evictions += 1
            except ValueError:  # in use: then load it over
                pass
            served.load(directories[int(name[0])], name)
            loads += 1
        stop.set()
        thread.join()
        for name in names:
            served.pool.evict(name)
        return {
            "case": f"churn_{operations}",
            "loads": loads,
            "evictions": evictions,
            "answers": answers,
            "wrong": wrong,
            "bytes_left": served.pool.used_bytes + served.pool.held_bytes,
        }


def main(
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the rows there.")] = None,
    cases: Annotated[str, typer.Option(help=f"Comma-separated, of {', '.join(CASES)}; all by default.")] = "",
    registered: Annotated[int, typer.Option(help="LoRA adapters of the case scale.")] = 2000,
    veras: Annotated[int, typer.Option(help="VeRA adapters of the case memory.")] = 10000,
    operations: Annotated[int, typer.Option(help="Loads of the case churn.")] = 1000,
    rounds: Annotated[int, typer.Option(help="Rounds of the case scale.")] = 20,
    layers: int = LAYERS,
    threads: int = 2,
) -> None:
    """A pool of thousands of adapters: throughput, memory for each, and answers while they come and go."""
    torch.set_num_threads(threads)
    calls = {
        "scale": lambda: scale(registered, rounds, layers),
        "memory": lambda: memory(veras, layers),
        "churn": lambda: churn(operations, min(layers, 2)),
    }
    rows = []
    for case in chosen(CASES, cases):
        start = time.perf_counter()
        rows.append({**calls[case](), "seconds": time.perf_counter() - start})
    for row in rows:
        report.print_table(row["case"], [row], {key: key for key in row if key != "case"})
    if json_file is not None:
        write_json(json_file, "pool", rows)


@page.section("pool", "A pool of thousands of adapters")
def section(document: Document) -> str:
    scaled, kept, churned = (_row(document, name) for name in CASES)
    low, high = scaled["throughput_low"], scaled["throughput_high"]
    return "\n".join(
        [
            f"* Batches of 8 distinct LoRA (rank 8, bf16) drawn from {scaled['registered']:,} registered ones run at "
            f"{scaled['throughput']:.1%} ({low:.1%}–{high:.1%}) of the throughput of such batches drawn from 8, at "
            f"{scaled['bytes_each'] / 1e6:.2f} MB each.",
            f"* {kept['registered']:,} VeRA adapters take {kept['bytes_each'] / 1e3:.0f} kB each in the arena, "
            f"{kept['held_over_true']:.3f} of their true sizes ({kept['process_over_true']:.3f} counting all that the "
            "process grew by).",
            f"* {churned['loads']:,} loads and {churned['evictions']:,} evictions under a running workload: "
            f"{churned['wrong']:,} of {churned['answers']:,} answers wrong, {churned['bytes_left']:,} bytes left.",
        ]
    )


def _row(document: Document, case: str) -> report.Row:
    return next(row for row in document["rows"] if row["case"].startswith(f"{case}_"))


@page.headline("pool")
def headline(document: Document) -> str:
    row = _row(document, "scale")
    return f"throughput with {row['registered']:,} adapters registered, of that with 8 | {row['throughput']:.1%} | –"
