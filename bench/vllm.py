"""Inside vLLM: an engine with fastadapt's adapters and one with vLLM's own LoRA, in multiples of one without adapters.

To be run by the interpreter of vLLM's environment (tests/in_vllm/environment.py). SmolLM2-135M in three offline
engines, each in a process of its own that stays alive; they are asked for one piece of work after the other, so that
exactly one of them computes at any time. A round asks every engine for everything once, in a shuffled order; ratios are
to the engine without adapters in the same round. One thread, no compilation (on a CPU vLLM compiles nothing with LoRA).

* prefill: 64 tokens of each of 8 rows in one step; decode: the steps behind it;
* 1_lora, 8_lora: rank 16 on the seven projections, one for all rows or one for each; 8_mixed: four LoRA, two DoRA and
  two VeRA of rank 256, which vLLM refuses;
* churn: 32 requests of unequal length over the 8 LoRA in 8 rows, whose batch keeps changing.

Adapters are in their slots when the clock starts.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from rich.console import Console

from bench import measure, page, report
from bench.cases import AdapterCase
from bench.measure import Parts, Timing
from bench.plots import Document, draw_vllm, read
from fastadapt.commands.demo.assets import load_model
from fastadapt.commands.report import write_json

ROWS, PROMPT, RANK, VERA_RANK = 8, 64, 16, 256
SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# What a row gets after its prompt: the steps that are timed as decoding.
STEPS = 16
REQUESTS = 32
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
# The engine without adapters is asked twice a round, since every ratio has its noise.
BASES = ("base", "base, second")
METHODS = ["lora"] * ROWS + ["dora"] * 2 + ["vera"] * 2
NAMES = [f"{method} {place}" for place, method in enumerate(METHODS)]
ADAPTERS = {
    "1_lora": NAMES[:1] * ROWS,
    "8_lora": NAMES[:ROWS],
    "8_mixed": NAMES[:4] + NAMES[ROWS:],
    "churn": [NAMES[place % ROWS] for place in range(REQUESTS)],
}
# What is asked of each case in fp32 and in bf16.
ASKED = {
    "prefill_1_lora": (1.10, 1.15),
    "prefill_8_lora": (1.15, 1.30),
    "prefill_8_mixed": (1.40, 1.50),
    "decode_1_lora": (1.12, 1.40),
    "decode_8_lora": (1.35, 1.50),
    "decode_8_mixed": (1.60, 2.00),
    "churn": (1.40, None),
}
# Before vLLM is imported: one process for each engine, a small cache, one thread, nothing sent anywhere.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
}


class Work(NamedTuple):
    """Requests that are there at once: their prompts, how many tokens follow each, and their adapters."""

    prompts: Sequence[Sequence[int]]
    tokens: Sequence[int]
    adapters: Sequence[str]


def works(vocabulary: int, prompt: int = PROMPT, steps: int = STEPS) -> dict[str, Work]:
    """What the engines are asked for, by the names of ADAPTERS."""
    drawn = random.Random(0)

    def text(length: int) -> list[int]:
        return [drawn.randrange(1, vocabulary) for _ in range(length)]

    found = {}
    for name, adapters in ADAPTERS.items():
        ragged = name == "churn"
        prompts = [text(drawn.randint(max(1, prompt // 8), prompt) if ragged else prompt) for _ in adapters]
        # The first of the tokens is the prefill's.
        tokens = [1 + (drawn.randint(1, steps) if ragged else steps) for _ in adapters]
        found[name] = Work(prompts, tokens, adapters)
    return found


def save_adapters(model: Any, root: Path) -> dict[str, str]:
    """PEFT's directories of adapters that do something, by name."""
    import peft

    found = {}
    for seed, (name, method) in enumerate(zip(NAMES, METHODS, strict=True)):
        rank = VERA_RANK if method == "vera" else RANK
        torch.manual_seed(seed)
        adapted = peft.get_peft_model(model, AdapterCase(name, method, rank).peft_config(SEVEN))  # type: ignore[arg-type]
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter), alpha=0.02)
        found[name] = str(root / name)
        adapted.save_pretrained(found[name])
        model = adapted.unload()
    return found


def engine_process(
    connection: Any, log: str, side: str, fields: Mapping[str, Any], adapters: Mapping[str, str]
) -> None:
    """An engine of one side ("base", "ours", "vllm") that does what it is sent and sends back its times."""
    # vLLM writes on both.
    with open(log, "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    # An allow list, read when vLLM is imported.
    os.environ["VLLM_PLUGINS"] = "fastadapt" if side == "ours" else ""
    from vllm import LLM
    from vllm.lora.request import LoRARequest

    torch.set_num_threads(1)
    lora: dict[str, Any] = {"enable_lora": True, "max_loras": ROWS, "max_cpu_loras": len(NAMES)}
    lora |= {"max_lora_rank": RANK, "lora_target_modules": SEVEN}
    llm = LLM(
        skip_tokenizer_init=True,
        enforce_eager=True,
        enable_prefix_caching=False,
        max_num_seqs=ROWS,
        **fields,
        **({} if side == "base" else lora),
    )
    requests = {name: LoRARequest(name, 1 + place, path) for place, (name, path) in enumerate(adapters.items())}
    engine = llm.llm_engine
    connection.send("ready")
    while (work := connection.recv()) is not None:
        ask = partial(steps_of, engine, requests={} if side == "base" else requests)
        ask(Work([[1]] * len(work.prompts), [1] * len(work.prompts), work.adapters))
        connection.send(ask(work))


def steps_of(engine: Any, work: Work, requests: Mapping[str, Any]) -> list[Timing]:
    """The times of an engine's steps until all is done."""
    from vllm import SamplingParams

    for place, (prompt, tokens, name) in enumerate(zip(*work, strict=True)):
        parameters = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        engine.add_request(str(place), {"prompt_token_ids": prompt}, parameters, lora_request=requests.get(name))
    found = []
    while engine.has_unfinished_requests():
        wall, cpu = time.perf_counter(), time.process_time()
        engine.step()
        found.append(Timing(time.perf_counter() - wall, time.process_time() - cpu))
    return found


class Engine:
    """The other end of an engine's process."""

    def __init__(self, side: str, log: Path, fields: Mapping[str, Any], adapters: Mapping[str, str]) -> None:
        self.side, self.log = side, log
        spawn = multiprocessing.get_context("spawn")
        self.connection, theirs = spawn.Pipe()
        self.process = spawn.Process(target=engine_process, args=(theirs, str(log), side, fields, adapters))
        self.process.start()
        theirs.close()

    def reply(self) -> Any:
        try:
            return self.connection.recv()
        except EOFError:
            said = self.log.read_text(encoding="utf-8", errors="replace")[-3000:]
            raise RuntimeError(f"the engine {self.side!r} ended: {said}") from None

    def run(self, name: str, work: Work) -> Parts:
        """The times of the work's first step and of the others, of churn together."""
        self.connection.send(work)
        steps: list[Timing] = self.reply()
        if name == "churn":
            return Parts({"whole": _sum(steps)})
        if len(steps) != work.tokens[0]:
            raise RuntimeError(f"{name} must take {work.tokens[0]} steps, the first for all prompts, got {len(steps)}")
        return Parts({"prefill": steps[0], "decode": _sum(steps[1:])})

    def close(self) -> None:
        with suppress(OSError):  # of one that has ended
            self.connection.send(None)
        self.process.join()


def _sum(steps: Sequence[Timing]) -> Timing:
    return Timing(sum(step.wall for step in steps), sum(step.cpu for step in steps))


@contextmanager
def engines(
    sides: Sequence[str], fields: Mapping[str, Any], adapters: Mapping[str, str], scratch: Path
) -> Iterator[dict[str, Engine]]:
    """An engine for each side, all of them ready."""
    with ExitStack() as stack:
        found = {}
        for side in sides:
            found[side] = Engine(side, scratch / f"{side}.log", fields, adapters)
            stack.callback(found[side].close)
        for engine in found.values():
            engine.reply()
        yield found


def run(
    dtype: str,
    model: str,
    adapters: Mapping[str, str],
    asked: Mapping[str, Work],
    rounds: int,
    vllm_rounds: int,
    scratch: Path,
) -> list[report.Row]:
    """Measures in one dtype; one row a case."""
    longest = max(len(prompt) + tokens for work in asked.values() for prompt, tokens, _ in zip(*work, strict=True))
    fields = {"model": model, "dtype": DTYPES[dtype], "max_model_len": longest}
    fields["max_num_batched_tokens"] = max(longest, ROWS * max(len(prompt) for prompt in asked["8_lora"].prompts))
    with engines(("base", "ours", "vllm"), fields, adapters, scratch) as found:
        variants: dict[str, Any] = {}
        # All rows of a kind have the same base pass.
        for name in ("8_lora", "churn"):
            for side in BASES:
                variants[f"{side} {name}"] = partial(found["base"].run, name, asked[name])
        for name, work in asked.items():
            variants[f"ours {name}"] = partial(found["ours"].run, name, work)
        theirs = {
            f"vllm {name}": partial(found["vllm"].run, name, work) for name, work in asked.items() if name != "8_mixed"
        }
        # vLLM's own takes several times as long as all others together.
        results = measure.interleave(variants | theirs, vllm_rounds)
        if rounds > vllm_rounds:
            results += measure.interleave(variants, rounds - vllm_rounds, seed=1, warm=True)
    return [row_of(dtype, case, results) for case in ASKED]


def row_of(dtype: str, case: str, results: list[dict[str, Timing]]) -> report.Row:
    """The ratios of both to the engine without adapters."""
    phase, _, name = case.partition("_")
    part = phase if name else "whole"
    bases = [f"{side} {'8_lora' if name else case} {part}" for side in BASES]
    row: report.Row = {"case": case if dtype == "fp32" else f"{dtype}_{case}"}
    row["asked"] = ASKED[case][list(DTYPES).index(dtype)]
    for side, prefix in (("ours", ""), ("vllm", "vllm_")):
        variant = f"{side} {name or case} {part}"
        there = [timings for timings in results if variant in timings]
        if there:
            wall, cpu = measure.compare(there, variant, bases)
            row |= {f"{prefix}x_base": wall.median, f"{prefix}x_low": wall.low, f"{prefix}x_high": wall.high}
            row |= {f"{prefix}x_cpu": cpu.median, f"{prefix}rounds": len(there)}
    return row


def main(
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the rows there, a PNG beside it.")] = None,
    rounds: Annotated[int, typer.Option(help="Counted rounds.")] = 8,
    vllm_rounds: Annotated[int, typer.Option(help="Rounds in which vLLM's own LoRA takes part.")] = 2,
    dtypes: Annotated[str, typer.Option(help="Of these, separated by commas.")] = ",".join(DTYPES),
    prompt: Annotated[int, typer.Option(help="Tokens of a row's prompt.")] = PROMPT,
    steps: Annotated[int, typer.Option(help="Decoding steps behind it.")] = STEPS,
) -> None:
    """Engines of vLLM's with its own LoRA and with fastadapt's adapters, as a multiple of one without adapters."""
    # Inherited by the engines.
    os.environ.update(ENVIRONMENT)
    try:
        from vllm import __version__ as version
    except ImportError as error:
        cure = "run it with the interpreter that tests/in_vllm/environment.py makes"
        raise typer.BadParameter(f"{error}: {cure}") from None
    torch.set_num_threads(1)
    console = Console(stderr=True)
    start = time.perf_counter()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        model, _ = load_model(None, console.print)
        adapters = save_adapters(model, scratch)
        asked, directory = works(model.config.vocab_size, prompt, steps), model.name_or_path
        del model
        for dtype in dtypes.split(","):
            console.print(f"starting three engines in {dtype}")
            rows += run(dtype, directory, adapters, asked, rounds, min(rounds, vllm_rounds), scratch)
            if json_file is not None:
                write_json(json_file, "vllm", rows, vllm=version, prompt=prompt, steps=steps)
                draw_vllm(read(json_file), json_file.with_suffix(".png"))
    columns = {
        "case": "case",
        "x_base": "x base",
        "x_low": "95% from",
        "x_high": "to",
        "x_cpu": "CPU time",
        "asked": "asked",
        "vllm_x_base": "vLLM",
        "vllm_x_low": "95% from",
        "vllm_x_high": "to",
    }
    minutes = (time.perf_counter() - start) / 60
    report.print_table(f"Inside vLLM {version}, {rounds} rounds, {minutes:.1f} minutes", rows, columns)


_TITLES = {
    "prefill_1_lora": "prefill, one LoRA",
    "prefill_8_lora": "prefill, 8 LoRA",
    "prefill_8_mixed": "prefill, 8 of mixed methods",
    "decode_1_lora": "decode, one LoRA",
    "decode_8_lora": "decode, 8 LoRA",
    "decode_8_mixed": "decode, 8 of mixed methods",
    "churn": "churn, 8 LoRA",
}


@page.section("vllm", "Inside vLLM")
def section(document: Document) -> str:
    found = page.by_case(document)
    rows = []
    for case, title in _TITLES.items():
        cells = [title]
        for row in (found.get(f"{prefix}{case}", {}) for prefix in ("", "bf16_")):
            cells.append(page.span(row, "x_base", "x_low", "x_high"))
            cells.append(page.number(row.get("asked")))
            cells.append(page.span(row, "vllm_x_base", "vllm_x_low", "vllm_x_high"))
        rows.append(" | ".join(cells))
    first = document["rows"][0]
    return (
        f"SmolLM2-135M-Instruct in offline engines of vLLM {document['vllm']}, {ROWS} rows of {document['prompt']} "
        f"tokens, one thread, no compilation, as a multiple of the engine without adapters, medians of "
        f"{first['rounds']} rounds, of {first['vllm_rounds']} with vLLM's own LoRA, which gets the seven projections "
        f"alone. LoRA of rank {RANK} on all of them; mixed: four LoRA, two DoRA, two VeRA of rank {VERA_RANK}, which "
        f"vLLM refuses. Prefill is one step, decode the {document['steps']} behind it; churn: {REQUESTS} requests of "
        "unequal length whose batch keeps changing. Asked: what the ratio must not exceed.\n\n"
    ) + page.table("| fp32 | asked | vLLM's LoRA | bf16 | asked | vLLM's LoRA", rows)
