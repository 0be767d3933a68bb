"""What serving many adapters in one batch costs, in multiples of the base model on the same batch.

SmolLM2-135M's dimensions with random fp32 weights; adapters on every linear layer but the head. Prefill: rows of 64
tokens, logits of the last one, as generate asks for. Decode: one token a row behind 64 in the cache. All variants run
interleaved in one process. The floor says what the formula cannot do without, over the base model's: the adapters'
FLOPs in prefill, the bytes of the distinct adapters in decode.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from bench import measure, page, report
from bench.cases import chosen
from bench.plots import Document, draw_serve, read
from bench.step import FROZEN, HIDDEN, LAYERS, LINEARS, VOCAB, Shape, base_model
from fastadapt.commands.demo.training import skeleton
from fastadapt.commands.report import write_json
from fastadapt.methods import LoRAConfig
from fastadapt.reference import AdapterForm
from fastadapt.serving.loader import LoadedAdapter
from fastadapt.serving.model import MultiAdapterModel

PROMPT = 64
RANK = 16
VERA_RANK = 256


@dataclass(frozen=True)
class ServeCase:
    """A batch: the method and rank of the adapter of each row; rows of the same entry share one adapter if `shared`."""

    name: str
    adapters: tuple[tuple[str, int], ...]
    phase: str
    rows: int = 8
    peft: bool = True
    dtype: str = "float32"  # of the base model and of the adapters that are served


_LOW_RANK = (("lora", 8), ("lora", 16), ("lora", 16), ("lora", 32), ("dora", 16), ("dora", 16))
_MIXED = (*_LOW_RANK, ("vera", VERA_RANK), ("vera", VERA_RANK))

CASES = {
    case.name: case
    for phase in ("prefill", "decode")
    for case in (
        ServeCase(f"{phase}_1_lora", (("lora", RANK),), phase),
        ServeCase(f"{phase}_8_lora", (("lora", RANK),) * 8, phase),
        ServeCase(f"{phase}_1_dora", (("dora", RANK),), phase),
        # PEFT refuses DoRA in a mixed batch and gives VeRA rows the wrong adapter.
        ServeCase(f"{phase}_8_mixed", _MIXED, phase, peft=False),
        ServeCase(f"{phase}_1_lora_bf16", (("lora", RANK),), phase, dtype="bfloat16"),
        ServeCase(f"{phase}_8_lora_bf16", (("lora", RANK),) * 8, phase, dtype="bfloat16"),
        ServeCase(f"{phase}_8_mixed_bf16", _MIXED, phase, peft=False, dtype="bfloat16"),
    )
} | {"decode_64_lora": ServeCase("decode_64_lora", (("lora", 8),) * 64, "decode", rows=64)}


def adapter_bytes(method: str, r: int) -> float:
    """fp32 bytes of an adapter; of VeRA what is its own, and the shared pair apart in floor()."""
    outputs = sum(n for _, n in LINEARS)
    if method == "vera":
        return 4.0 * LAYERS * (outputs + r * len(LINEARS))
    return 4.0 * LAYERS * (sum(r * (k + n) for k, n in LINEARS) + (outputs if method == "dora" else 0))


def floor(case: ServeCase) -> tuple[float, float]:
    """(FLOPs, bytes) of the adapters over the base model's in this batch."""
    weights = LAYERS * sum(k * n for k, n in LINEARS)
    tokens = PROMPT if case.phase == "prefill" else 1
    base = case.rows * (tokens * weights + HIDDEN * VOCAB)
    per_row = [case.adapters[row % len(case.adapters)] for row in range(case.rows)]
    flops = sum(tokens * LAYERS * sum(r * (k + n) for k, n in LINEARS) for _, r in per_row)
    moved = sum(adapter_bytes(method, r) for method, r in case.adapters)
    if any(method == "vera" for method, _ in case.adapters):
        moved += 4.0 * VERA_RANK * (max(k for k, _ in LINEARS) + max(n for _, n in LINEARS))
    return flops / base, moved / (4.0 * (weights + HIDDEN * VOCAB))


def random_adapter(layers: dict[str, Any], method: str, r: int, seed: int) -> LoadedAdapter:
    """An adapter of random values as a loader would give it; VeRA's of one rank share their pair."""
    generator = torch.Generator().manual_seed(seed)
    pair = None
    if method == "vera":
        shared = torch.Generator().manual_seed(0)
        k = max(layer.in_features for layer in layers.values())
        n = max(layer.out_features for layer in layers.values())
        pair = (torch.randn(r, k, generator=shared) / 16, torch.randn(n, r, generator=shared) / 16)
    forms = {}
    for path, layer in layers.items():
        n, k = layer.weight.shape
        if pair is not None:
            d, h = torch.rand(r, generator=generator) / 10, torch.rand(n, generator=generator) / 10
            forms[path] = AdapterForm(pair[0][:, :k], pair[1][:n], mid_scale=d, out_scale=h)
            continue
        A, B = torch.randn(r, k, generator=generator) / 24, torch.randn(n, r, generator=generator) / 100
        if method == "dora":
            g = 1 + torch.rand(n, generator=generator) / 100
            forms[path] = AdapterForm(A, B, out_scale=g, base_scale=g, scaling=2.0)
        else:
            forms[path] = AdapterForm(A, B, scaling=2.0)
    return LoadedAdapter(LoRAConfig(r=r), forms, pair, f"{method}-{r}-{seed}", 0)


def one_pass(call: Callable[..., Any], base: Any, case: ServeCase) -> Callable[[], None]:
    """One prefill, or one decoding step behind a cache that is cut back to where it was."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(VOCAB, (case.rows, PROMPT), generator=generator)
    if case.phase == "prefill":

        def prefill() -> None:
            with torch.no_grad():
                call(input_ids=ids, logits_to_keep=1, use_cache=True)

        return prefill
    with torch.no_grad():
        cache = base(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values

    def decode() -> None:
        with torch.no_grad():
            call(input_ids=ids[:, :1], past_key_values=cache, use_cache=True)
        cache.crop(-1)

    return decode


def ours(base: Any, cases: list[ServeCase]) -> tuple[MultiAdapterModel, dict[str, list[str]]]:
    """A served model with the adapters of all cases, and the name of each row's adapter by case."""
    wanted: dict[str, tuple[str, int, int]] = {}
    rows: dict[str, list[str]] = {}
    for case in cases:
        names = []
        for index, (method, r) in enumerate(case.adapters):
            name = f"{method}-{r}-{index}"
            wanted[name] = (method, r, index)
            names.append(name)
        rows[case.name] = [names[row % len(names)] for row in range(case.rows)]
    budget = int(1.1 * sum(adapter_bytes(method, r) for method, r, _ in wanted.values())) + (64 << 20)
    served = MultiAdapterModel(skeleton(base), budget=budget)
    layers = {path: layer for path, layer in served.pool.layers.items() if path != "lm_head"}
    for name, (method, r, seed) in wanted.items():
        served.pool.add(name, random_adapter(layers, method, r, seed))
    return served, rows


def peft_call(base: Any, case: ServeCase) -> Callable[..., Any]:
    """PEFT's model with the same adapters: one active, or one named for each row."""
    from peft import LoraConfig, get_peft_model

    model: Any = None
    names = [f"a{index}" for index in range(len(case.adapters))]
    with warnings.catch_warnings():
        # PEFT asks transformers for a property that the newest transformers renames.
        warnings.filterwarnings("ignore", category=FutureWarning, message="`is_gradient_checkpointing`")
        for name, (method, r) in zip(names, case.adapters, strict=True):
            config = LoraConfig(
                r=r,
                lora_alpha=2 * r,
                target_modules="all-linear",
                use_dora=method == "dora",
                init_lora_weights=False,
                task_type="CAUSAL_LM",
            )
            if model is None:
                model = get_peft_model(skeleton(base), config, adapter_name=name)
            else:
                model.add_adapter(name, config)
    model.eval()
    if len(names) == 1:
        return lambda **inputs: model(**inputs)
    rows = [names[row % len(names)] for row in range(case.rows)]
    return lambda **inputs: model(**inputs, adapter_names=rows)


def run(
    cases: list[ServeCase], rounds: int, repeats: int, *, layers: int = LAYERS, peft: bool = True
) -> list[report.Row]:
    """Measure; one row a case. Cases with the same base pass run among themselves."""
    rows: list[report.Row] = []
    for phase, count, dtype in sorted({(case.phase, case.rows, case.dtype) for case in cases}, reverse=True):
        alike = [case for case in cases if (case.phase, case.rows, case.dtype) == (phase, count, dtype)]
        base = base_model(Shape(layers=layers, dtype=dtype)).eval()
        served, names = ours(base, alike)
        variants: dict[str, Callable[[], None]] = dict.fromkeys(FROZEN, one_pass(base, base, alike[0]))
        for case in alike:
            variants[f"{case.name} ours"] = one_pass(_held(served, names[case.name]), base, case)
            if peft and case.peft:
                variants[f"{case.name} peft"] = one_pass(peft_call(base, case), base, case)
        repeated = {
            name: measure.repeated(variant, 1 if phase == "prefill" else repeats) for name, variant in variants.items()
        }
        results = measure.interleave(repeated, rounds)
        for case in alike:
            flops, moved = floor(case)
            row: report.Row = {"case": case.name, "floor_flops": 1 + flops, "floor_bytes": 1 + moved}
            row["floor"] = 1 + (flops if phase == "prefill" else moved)
            for side, prefix in (("ours", ""), ("peft", "peft_")):
                if f"{case.name} {side}" not in variants:
                    continue
                wall, cpu = measure.compare(results, f"{case.name} {side}", FROZEN)
                row |= {f"{prefix}x_base": wall.median, f"{prefix}x_low": wall.low, f"{prefix}x_high": wall.high}
                row[f"{prefix}x_cpu"] = cpu.median
                row[f"{prefix}x_best"] = measure.best_ratio(results, f"{case.name} {side}", FROZEN)
            rows.append(row | {"rows": count, "rounds": rounds, "layers": layers, "adapters": len(case.adapters)})
    return rows


def _held(served: MultiAdapterModel, names: list[str]) -> Callable[..., Any]:
    """The model under a request that goes on, as in generate."""
    ids = torch.zeros(len(names), 16, dtype=torch.int64)
    context = served.running(names, (), {"input_ids": ids})
    request = context.__enter__()

    def call(**inputs: Any) -> Any:
        with served.requests.running(request):
            return served.model(**inputs)

    call.context = context  # type: ignore[attr-defined]  # which would end the request
    return call


def main(
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the rows there, a PNG beside it.")] = None,
    rounds: Annotated[int, typer.Option(help="Counted rounds.")] = 10,
    repeats: Annotated[int, typer.Option(help="Decoding steps in a round.")] = 5,
    cases: Annotated[str, typer.Option(help=f"Comma-separated, of {', '.join(CASES)}; all by default.")] = "",
    layers: int = LAYERS,
    threads: int = 2,
    peft: Annotated[bool, typer.Option(help="Measure PEFT beside.")] = True,
) -> None:
    """Serving many adapters in one batch, as a multiple of the base model: prefill and decode; ours and PEFT's."""
    torch.set_num_threads(threads)
    rows = run(chosen(CASES, cases), rounds, repeats, layers=layers, peft=peft)
    columns = {
        "case": "case",
        "x_base": "x base",
        "x_low": "95% from",
        "x_high": "to",
        "x_cpu": "CPU time",
        "x_best": "fastest",
        "floor": "floor",
        "peft_x_base": "PEFT",
        "peft_x_low": "95% from",
        "peft_x_high": "to",
    }
    report.print_table(f"Serving, {layers} layers, {threads} threads, {rounds} rounds", rows, columns)
    if json_file is not None:
        write_json(json_file, "serve", rows)
        draw_serve(read(json_file), json_file.with_suffix(".png"))


@page.section("serve", "Serving many adapters in one batch")
def section(document: Document) -> str:
    found = page.by_case(document)
    rows = []
    for name in dict.fromkeys(CASES[case].name.partition("_")[2] for case in found):
        cells = [_TITLES[name]]
        for row in (found.get(f"{phase}_{name}", {}) for phase in ("prefill", "decode")):
            cells.append(page.span(row, "x_base", "x_low", "x_high"))
            cells.append(page.span(row, "peft_x_base", "peft_x_low", "peft_x_high"))
            cells.append(page.number(row.get("floor")))
        rows.append(" | ".join(cells))
    first = document["rows"][0]
    return (
        "SmolLM2-135M's dimensions, fp32 where nothing else is said, 8 rows, as a multiple of the base model on the "
        f"same batch, medians of {first['rounds']} rounds; prefill of {PROMPT} tokens, decoding one token behind "
        f"them. Of rank {RANK}; mixed: LoRA of rank 8, 16, 16 and 32, two DoRA of 16, two VeRA of 256; 64 rows of LoRA "
        "of rank 8. The "
        "floor counts the adapters' FLOPs in prefill and the bytes of the distinct adapters in decoding as the "
        "machine's memory would move them; its caches do better. PEFT refuses DoRA in a mixed batch and gives VeRA "
        "rows the wrong adapter.\n\n"
    ) + page.table("| prefill | PEFT | floor | decode | PEFT | floor", rows)


_TITLES = {
    "1_lora": "one LoRA",
    "8_lora": "8 LoRA",
    "1_dora": "one DoRA",
    "8_mixed": "8 of mixed methods",
    "64_lora": "64 LoRA, 64 rows",
    "1_lora_bf16": "one LoRA, bf16",
    "8_lora_bf16": "8 LoRA, bf16",
    "8_mixed_bf16": "8 of mixed methods, bf16",
}


@page.headline("serve")
def headline(document: Document) -> str:
    row = page.by_case(document)["decode_8_lora"]
    return f"decoding 8 LoRA in one batch, x the base model | {row['x_base']:.2f} | {row['peft_x_base']:.2f}"
