"""Times that were measured beside those that the model predicts for the same device, and how wrong the model was.

The model is given the ceilings that the run measured, so that what is left is its own: what it assumes of a Triton GEMM
and of launches, and what it leaves out.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from bench import report
from bench.cases import SAVED_CASES
from bench.peers import PEERS, frozen
from bench.plots import Document
from bench.predictions import row_norm, taken, workload
from bench.report import Row
from fastadapt.operators.adapter_linear.cost import Work, cheapest, predicted_seconds, works
from fastadapt.operators.adapter_linear.devices import DEVICES, Device
from fastadapt.operators.adapter_linear.strategies import STRATEGIES
from fastadapt.operators.adapter_linear.workload import Workload

_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
# Provider of `bench gpu` -> peer of the model.
_PEERS = {"peft_fp32": "peft", "peft": "peft_bf16", "unsloth": "unsloth"}


def device_of(document: Document) -> Device:
    """The device of a document by its measured ceilings; launches and Triton's share are those of the nearest known."""
    name, found = str(document["device"]["name"]), document["ceilings"]
    known = DEVICES["CPU" if document["device"]["type"] == "cpu" else "H100-SXM"]
    known = next((device for key, device in DEVICES.items() if key.split("-")[0] in name.upper()), known)
    matmul = {**known.matmul, **{_DTYPES[key]: rate for key, rate in found.items() if key in _DTYPES}}
    return known._replace(
        name=name, matmul=matmul, bandwidth=found["bytes"], attainable_matmul=1.0, attainable_bandwidth=1.0
    )


def workload_of(row: Row) -> Workload:
    """What the case of a row asks for, as the model sees it."""
    adapter = SAVED_CASES[row["case"]]
    outputs = tuple(int(n) for n in row["N"].split("+"))
    step = row["operator"] == "step"
    options = {"dropout": step and adapter.dropout > 0, "backward": step, "dtype": _DTYPES[row["dtype"]]}
    return workload(adapter.method, row["M"], row["K"], outputs, row["r"], **options)


def predicted(provider: str, w: Workload) -> list[Work] | None:
    """The launches of a provider; None for one that the model does not know, or that cannot do it."""
    if provider == "linear":
        return taken(frozen(w), w)
    if provider in _PEERS:
        return taken(PEERS[_PEERS[provider]](w), w)
    if provider not in STRATEGIES:
        return None
    # In evaluation DoRA's norm is a constant.
    return (row_norm(w) if w.backward else []) + works(provider, w)


def compared(document: Document) -> list[Row]:
    """A row for each time that the model has a prediction for; x: measured over predicted."""
    device = device_of(document)
    rows = []
    for row in document["rows"]:
        if row["operator"] not in ("step", "forward") or not row["ms"]:
            continue
        sequence = predicted(row["provider"], workload_of(row))
        if sequence is None:
            continue
        seconds = predicted_seconds(sequence, device)
        columns = {key: row[key] for key in ("operator", "case", "layers", "M", "dtype", "provider")}
        rows.append(columns | {"measured_us": row["ms"] * 1e3, "predicted_us": seconds * 1e6})
        rows[-1]["x"] = row["ms"] / 1e3 / seconds
    return rows


def by_provider(rows: Sequence[Row]) -> list[Row]:
    """For each provider, steps and few tokens apart: how many times as long as predicted, median and extremes."""
    groups: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        groups.setdefault((row["provider"], row["operator"]), []).append(row["x"])
    return [
        {
            "provider": f"{provider}, {operator}",
            "times": len(found),
            "median": statistics.median(found),
            "least": min(found),
            "most": max(found),
        }
        for (provider, operator), found in sorted(groups.items())
    ]


def picks(document: Document) -> list[Row]:
    """For each case with several strategies: what the model picks of them, the fastest, and what the pick costs."""
    device = device_of(document)
    cases: dict[tuple[object, ...], dict[str, Row]] = {}
    for row in document["rows"]:
        if row["provider"] in STRATEGIES and row["operator"] in ("step", "forward") and row["ms"]:
            key = tuple(row[name] for name in ("operator", "case", "layers", "M", "dtype"))
            cases.setdefault(key, {})[row["provider"]] = row
    found = []
    for group in cases.values():
        if len(group) < 2:
            continue
        row = next(iter(group.values()))
        fastest = min(group, key=lambda name: group[name]["ms"])
        picked = cheapest(group, workload_of(row), device)
        case = f"{row['operator']} {row['case']} {row['layers']} M{row['M']}"
        times = {"case": case, "picked": picked, "fastest": fastest}
        found.append(times | {"x": group[picked]["ms"] / group[fastest]["ms"]})
    return found


def verdict(chosen: Sequence[Mapping[str, float]]) -> str:
    """How often the model picks the fastest, and the mean and the worst of what its picks cost."""
    if not chosen:
        return "No case has two strategies to choose from."
    costs = [row["x"] for row in chosen]
    right = sum(cost == 1.0 for cost in costs)
    return (
        f"The model picks the fastest strategy in {right} of {len(costs)} cases; its picks take "
        f"{statistics.fmean(costs):.3f} times the fastest's time in the mean, {max(costs):.2f} at worst."
    )


def show(document: Document) -> list[Row]:
    """Prints measured beside predicted, and how wrong the model was; gives the rows."""
    rows, chosen = compared(document), picks(document)
    lines = [
        {**row, "name": f"{row['operator']} {row['case']} {row['layers']} M{row['M']} {row['provider']}"}
        for row in rows
    ]
    heads = {
        "name": "case",
        "measured_us": "measured, µs",
        "predicted_us": "predicted, µs",
        "x": "measured / predicted",
    }
    report.print_table(f"{document['device']['name']}: measured beside predicted", lines, heads)
    heads = {"provider": "provider", "times": "times", "median": "median", "least": "least", "most": "most"}
    report.print_table("Measured over predicted", by_provider(rows), heads)
    wrong = [row for row in chosen if row["x"] > 1.0]
    if wrong:
        heads = {"case": "case", "picked": "picked", "fastest": "fastest", "x": "x the fastest"}
        report.print_table("Where the model picks a slower one", wrong, heads)
    print(verdict(chosen))
    return rows
