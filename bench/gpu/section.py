"""How a GPU's document reads on the page of results."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from bench import measured, page
from bench.gpu.journal import case_of
from bench.plots import Document
from bench.report import Row
from fastadapt.operators.adapter_linear.strategies import STRATEGIES

_OURS = (*STRATEGIES, "ours", "triton", "eager")
# Columns beside ours: provider -> heading.
_LAYERS = {"peft_fp32": "PEFT", "peft": "PEFT, bf16 adapters", "unsloth": "by hand, as Unsloth", "compile": "compiled"}
_BATCHES = {"punica": "two kernels, as Punica", "loop": "adapter by adapter"}


def text(document: Document) -> str:
    """The section: times as multiples of the frozen layers, the counters, and what was not run."""
    rows = [row for row in document["rows"] if row["ms"]]
    found, jobs = document["ceilings"], document["jobs"]
    parts = [
        f"{document['device']['name']}; {found.get('bytes', 0) / 1e12:.3g} TB/s in a copy and "
        f"{found.get('bf16', 0) / 1e12:.3g} TFLOP/s in a bf16 product, measured in the same run. Every time is of an "
        "operator that was held to fp64 on the same operands just before. "
        + ("Replays of CUDA graphs, behind a flush of the L2" if document["device"]["type"] == "cuda" else "Runs")
        + ", interleaved, medians; times as multiples of F.linear on the same layers, or of the formula in PyTorch."
    ]
    for title, chosen, others in (
        ("Forward and backward", [row for row in rows if row["operator"] == "step"], _LAYERS),
        ("Forward of few tokens", [row for row in rows if row["operator"] == "forward"], {"peft": "PEFT"}),
        ("Batches of many adapters", [row for row in rows if row["operator"] == "multi_adapter_linear"], _BATCHES),
        ("Other operators", [row for row in rows if row["baseline"] == "reference"], {"peft": "PEFT"}),
    ):
        if chosen:
            parts += [f"{title}:", _table(chosen, others)]
    counters = [row for row in document["counters"] if row["kernel"]]
    if counters:
        lines = [
            f"`{row['kernel']}` | {page.number(row['us'], 1)} | {page.number(row['read_mib'], 0)} | "
            f"{page.number(row['written_mib'], 0)} | {page.number(row['counted_mib'], 0)} | "
            f"{page.number(row['tensor_percent'], 0)}"
            for row in counters
        ]
        heads = "kernel | µs | MiB read | MiB written | MiB counted by `bench traffic` | tensor pipe, %"
        parts += ["What the device counts itself, by Nsight Compute:", page.table(heads, lines)]
    if "bytes" in found and rows:
        lines = [
            f"{row['provider']} | {row['times']} | {row['median']:.2f} | {row['least']:.2f} | {row['most']:.2f}"
            for row in measured.by_provider(measured.compared(document))
        ]
        table = page.table("measured over predicted | times | median | least | most", lines)
        about = "The cost model, given the ceilings of this run, against its times. "
        parts += [about + measured.verdict(measured.picks(document)), table]
    left = [entry["job"] for entry in jobs if entry["status"] in ("not run", "out of time")]
    failed = [entry for entry in jobs if entry["status"] in ("failed", "crashed", "hung")]
    failed += [row for row in (*document["checks"], *document["rows"]) if row["status"] == "failed"]
    parts.append(
        f"{len(left)} of {len(jobs)} jobs were not run within {document['budget']:.0f} s; "
        f"{len(failed) or 'no'} failures in {len(document['checks'])} checks and {len(document['rows'])} times."
    )
    return "\n\n".join(parts)


def _table(rows: Sequence[Row], others: dict[str, str]) -> str:
    """A line for each case: ours, then others."""
    lines = []
    for _, each in itertools.groupby(sorted(rows, key=_order), key=_order):
        group = {row["provider"]: row for row in each}
        ours = [row for name, row in group.items() if name in _OURS]
        first = next(iter(group.values()))
        name = " ".join(part for part in (first["case"].replace("_", ", "), first["layers"]) if part)
        if first["operator"] in ("hadamard_linear", "bottleneck", "adapter_update", "weight_norm"):
            name = f"{first['operator']} {name}"
        best: Row = min(ours, key=lambda row: row["ms"], default={})
        cells = [name, str(first["M"] or ""), best.get("provider", "–")]
        cells += [page.number(best.get("ms"), 3), page.number(best.get("x"))]
        cells += [page.number(group[key]["x"] if key in group else None) for key in others]
        cells += [page.number(best.get("host_us"), 0), _percent(best.get("of_roofline"))]
        lines.append(" | ".join(cells))
    heads = ["layers", "M", "our fastest", "ms", "ours, x", *(f"{head}, x" for head in others.values())]
    return page.table(" | ".join([*heads, "host, µs", "of the roofline"]), lines)


def _order(row: Row) -> tuple[str, ...]:
    """The rows of one case in a row, also where it was asked for twice."""
    return tuple(str(part).rjust(8) for part in case_of(row))


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.0%}"
