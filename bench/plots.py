"""Pictures of stored results: each from its JSON alone, so that it can be drawn again anywhere."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.operators import OTHERS
from bench.report import Row
from fastadapt.commands.report import new_figure, save_figure
from fastadapt.operators.adapter_linear.strategies import STRATEGIES

Document = dict[str, Any]

COLORS = {
    "fastest": "#1f4e9c",
    "split": "#1f4e9c",
    "fused": "#173a70",
    "library": "#3c78c8",
    "recompose": "#2f9fb5",
    "expand": "#57b8a5",
    "triton": "#1f4e9c",
    "eager": "#3c78c8",
    "ours": "#6fa8dc",
    "ungrouped": "#b9cfe6",
    "peft": "#e07b39",
    "peft_fp32": "#a8501a",
    "unsloth": "#c9a227",
    "punica": "#7b4fa3",
    "loop": "#b9a5cf",
    "compile": "#5a9e4b",
    "reference": "#9a9a9a",
    "linear": "#222222",
    "accelerated": "#2f9fb5",
    "injected": "#1f4e9c",
    "chunked": "#7b4fa3",
    "peft_again": "#eebb99",
    "vllm": "#c9a227",
    "dequantised": "#9a9a9a",
}
MARKERS = ("o", "s", "^", "D", "v")
LABELS = {
    **OTHERS,
    "peft_fp32": "PEFT, fp32 adapters",
    "unsloth": "LoRA by hand, as Unsloth",
    "punica": "two kernels, as Punica",
    "loop": "adapter by adapter",
    **{name: f"ours: {name}" for name in STRATEGIES},
    "triton": "ours: Triton",
    "eager": "ours: eager",
    "ours": "ours: automatic choice",
    "fastest": "ours: fastest strategy",
    "accelerated": "PEFT, accelerated",
    "injected": "ours: injected",
    "chunked": "ours: injected, loss in chunks",
    "dequantised": "ours: injected, dequantised base",
    "peft_again": "PEFT on other threads",
    "vllm": "vLLM's own LoRA",
}


def read(path: Path) -> Document:
    """A document that fastadapt.commands.report.write_json wrote."""
    document: Document = json.loads(path.read_text(encoding="utf-8"))
    return document


def _provenance(document: Document) -> str:
    versions = document["versions"]
    packages = ", ".join(f"{name} {versions[name]}" for name in ("torch", "triton", "peft") if versions.get(name))
    commit = (document["commit"] or "unknown")[:9]
    return f"fastadapt at {commit}, {packages}"


def _grouped_bars(
    axes: Any,
    groups: Sequence[str],
    values: Mapping[str, Sequence[float | None]],
    notes: Mapping[str, Sequence[str]] | None = None,
    spans: Mapping[str, Sequence[tuple[float, float] | None]] | None = None,
) -> None:
    """For each group a bar of each provider, above it its number and note; None leaves a gap that says so.

    Bars that dwarf the others are cut, and say so beside their numbers. spans: intervals, drawn over the bars.
    """
    width = 0.84 / max(len(values), 1)
    known = [value for series in values.values() for value in series if value is not None] or [1.0]
    top = min(max(known), 4 * statistics.median(known))
    for index, (name, series) in enumerate(values.items()):
        places = [group - 0.42 + (index + 0.5) * width for group in range(len(groups))]
        heights = [min(value or 0.0, top) for value in series]
        axes.bar(places, heights, width * 0.94, color=COLORS[name])
        for group, (place, value) in enumerate(zip(places, series, strict=True)):
            note = notes[name][group] if notes and name in notes else ""
            cut = "(cut)" if value is not None and value > top else ""
            text = "none" if value is None else " ".join(filter(None, (f"{value:.2f}", cut, note)))
            height = heights[group]
            span = spans[name][group] if spans else None
            if span is not None and not cut:
                low, high = span[0], min(span[1], top)
                axes.plot([place, place], [low, high], color="#444444", linewidth=0.8, solid_capstyle="butt")
                height = max(height, high)
            height += top * 0.015
            axes.text(place, height, text, ha="center", va="bottom", rotation=90, fontsize=7, clip_on=True)
    axes.set_xticks(range(len(groups)), groups, fontsize=9)
    axes.set_xlim(-0.6, len(groups) - 0.4)
    axes.set_ylim(0, top * (1.3 if notes or max(known) > top else 1.16))
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)


def _legend(figure: Any, providers: Sequence[str]) -> None:
    """One legend for all bars, below them."""
    from matplotlib.patches import Patch

    handles = [Patch(color=COLORS[name], label=LABELS[name]) for name in providers]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=9, frameon=False)


def _best(rows: Sequence[Row]) -> Row | None:
    """The fastest of ours among the rows of one case."""
    ours = (*STRATEGIES, "ours", "triton", "eager")
    timed = [row for row in rows if row["provider"] in ours and row["ms"] is not None]
    return min(timed, key=lambda row: row["ms"], default=None)


def _cases(rows: Sequence[Row], *names: str) -> dict[tuple[Any, ...], list[Row]]:
    """The rows by the values of these columns, in order."""
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row[name] for name in names), []).append(row)
    return found


def draw_gpu(document: Document, path: Path) -> None:
    """What `python -m bench gpu` found: the roofline, and bars for every number of tokens, forward and step; then many
    adapters in one batch, and the other operators."""
    main_dtype = next(row["dtype"] for row in document["rows"])
    known = [row for row in document["rows"] if row["dtype"] == main_dtype and row["status"] != "skipped"]
    rows = [row for row in known if row["operator"] in ("forward", "step")]
    tokens = sorted({row["M"] for row in rows})
    panels: dict[tuple[str, str], list[Row]] = {}
    # Forward and step side by side, dropout below.
    for row in sorted(rows, key=lambda row: ("dropout" in row["case"], row["M"], row["operator"])):
        kind = "forward" if row["operator"] == "forward" else "forward + backward"
        dropout = ", with dropout" if "dropout" in row["case"] else ""
        panels.setdefault((f"{kind}{dropout}, {row['M']} tokens", LABELS["linear"]), []).append(row)
    for row in known:
        if row["operator"] == "multi_adapter_linear":
            panels.setdefault(("many adapters in one batch", LABELS["linear"]), []).append(row)
        elif row not in rows:
            panels.setdefault(("other operators", LABELS["reference"]), []).append(row)
    lines = (len(panels) + 1) // 2
    figure = new_figure(16, 5.5 + 4.3 * lines)
    device = document["device"]
    runtime = f", runtime {device['runtime']}, driver {device['driver']}" if "driver" in device else ""
    how = "replays of CUDA graphs" if device["type"] == "cuda" else "no GPU: the eager strategies on a CPU"
    figure.suptitle(f"{device['name']}{runtime}\n{main_dtype}, {how}, medians; {_provenance(document)}", fontsize=11)
    grid = figure.add_gridspec(1 + lines, 2, height_ratios=[1.25, *[1.0] * lines])
    _roofline(figure.add_subplot(grid[0, :]), document["ceilings"], rows, main_dtype, tokens)
    others = ("ours", "peft_fp32", "peft", "unsloth", "compile", "punica", "loop", "reference")
    shown = ["fastest", *(name for name in others if _was_timed(known, name))]
    for index, ((title, baseline), group) in enumerate(panels.items()):
        axes = figure.add_subplot(grid[1 + index // 2, index % 2])
        _case_bars(axes, group, [name for name in shown if name == "fastest" or _was_timed(group, name)])
        axes.set_title(title, fontsize=10)
        axes.set_ylabel(f"time, x of {baseline}")
    _legend(figure, shown)
    save_figure(figure, path, dpi=110)


def _was_timed(rows: Sequence[Row], provider: str) -> bool:
    return any(row["provider"] == provider and row["ms"] is not None for row in rows)


def _case_bars(axes: Any, rows: Sequence[Row], shown: Sequence[str]) -> None:
    cases = _cases(rows, "case", "layers", "M")
    values: dict[str, list[float | None]] = {name: [] for name in shown}
    notes: list[str] = []
    for group in cases.values():
        best = _best(group)
        notes.append(best["provider"] if best else "")
        for name in shown:
            found = best if name == "fastest" else next((row for row in group if row["provider"] == name), None)
            values[name].append(found["x"] if found else None)
    labels = [f"{case.removesuffix('_dropout')}\n{layers}" for case, layers, _ in cases]
    _grouped_bars(axes, labels, values, {"fastest": notes})
    axes.tick_params(axis="x", labelsize=7 if len(labels) > 8 else 9)
    axes.axhline(1.0, color=COLORS["linear"], linewidth=1, linestyle="--")


def _roofline(axes: Any, ceilings: Mapping[str, float], rows: Sequence[Row], dtype: str, tokens: Sequence[int]) -> None:
    """Achieved rate of the formula's operations over its arithmetic intensity, under the measured ceilings."""
    providers = ("fastest", "peft", "unsloth", "compile", "reference")
    points: dict[tuple[str, int, str], list[tuple[float, float]]] = {}
    for (operator, _, _, count), group in _cases(rows, "operator", "case", "layers", "M").items():
        best = _best(group)
        for name in providers:
            row = best if name == "fastest" else next((row for row in group if row["provider"] == name), None)
            if row is not None and row["tflops"] is not None:
                intensity = row["gflop"] * 1e9 / (row["minimum_mib"] * 2**20)
                points.setdefault((name, count, operator), []).append((intensity, row["tflops"]))
    from matplotlib.lines import Line2D
    from matplotlib.ticker import FuncFormatter

    intensities = [x for found in points.values() for x, _ in found] or [1.0]
    unit, name_of_unit = (1e12, "TFLOP/s") if ceilings[dtype] >= 1e12 else (1e9, "GFLOP/s")
    bandwidth, peak = ceilings["bytes"] / unit, ceilings[dtype] / unit
    ridge = peak / bandwidth
    low, high = min(*intensities, ridge) / 2, max(*intensities, ridge) * 2
    roof = [low, ridge, high]
    axes.plot(roof, [min(x * bandwidth, peak) for x in roof], color="#444444", linewidth=2)
    axes.annotate(
        f"copy: {ceilings['bytes'] / 1e9:,.0f} GB/s",
        (low, low * bandwidth),
        xytext=(14, -4),
        textcoords="offset points",
    )
    axes.annotate(
        f"{dtype} product: {peak:,.3g} {name_of_unit}",
        (high, peak),
        xytext=(-6, 6),
        textcoords="offset points",
        ha="right",
    )
    for (name, count, operator), found in points.items():
        color = COLORS[name]
        axes.scatter(
            [intensity for intensity, _ in found],
            [rate * 1e12 / unit for _, rate in found],
            marker=MARKERS[tokens.index(count) % len(MARKERS)],
            s=42,
            facecolors=color if operator == "step" else "none",
            edgecolors=color,
            linewidths=1.3,
            alpha=0.85,
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("arithmetic intensity of the formula (FLOP per byte of its tensors, each moved once)")
    axes.set_ylabel(f"{name_of_unit} of the formula's work")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(FuncFormatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "25" else ""))
    axes.set_title("Roofline between the ceilings measured on this device", fontsize=10)
    axes.grid(which="both", alpha=0.2)
    entries = [
        Line2D([], [], color=COLORS[name], marker="o", linestyle="", label=LABELS[name])
        for name in providers
        if any(key[0] == name for key in points)
    ]
    for index, count in enumerate(tokens):
        marker = MARKERS[index % len(MARKERS)]
        entries.append(Line2D([], [], color="#666666", marker=marker, linestyle="", label=f"{count} tokens"))
    for label, fill in (("forward", "none"), ("forward + backward", "#666666")):
        entries.append(Line2D([], [], color="#666666", marker="o", markerfacecolor=fill, linestyle="", label=label))
    axes.legend(handles=entries, fontsize=8, loc="lower right", ncols=2)


def draw_microbench(document: Document, path: Path) -> None:
    """What the microbenchmarks found: each operator's providers as multiples of the baseline of their case."""
    rows = [row for row in document["rows"] if row["operator"] in ("forward", "step")]
    panels: list[tuple[str, dict[tuple[Any, ...], list[Row]], str]] = []
    for (operator, layers), group in _cases(rows, "operator", "layers").items():
        what = "forward + backward" if operator == "step" else "forward"
        shape = f"M {group[0]['M']}, K {group[0]['K']}, N {group[0]['N']}"
        panels.append((f"{what}, {layers} ({shape})", _cases(group, "case"), "F.linear on the same layers"))
    norms = [row for row in document["rows"] if row["operator"] == "weight_norm"]
    others = [row for row in document["rows"] if row not in rows and row not in norms]
    if norms:
        panels.append(("DoRA's row norms", _cases(norms, "layers"), LABELS["reference"]))
    if others:
        panels.append(("Operators beside the adapter form", _cases(others, "operator", "case"), LABELS["reference"]))
    height = (len(panels) + 1) // 2
    figure = new_figure(15, 3.7 * height + 0.8)
    first = document["rows"][0]
    machine = document["machine"]
    device = first["device"]
    threads = f"{machine['threads']} thread{'s' if machine['threads'] > 1 else ''}"
    where = f"{machine['cpu']}, {threads}" if device == "cpu" else machine["accelerators"][0]
    figure.suptitle(
        f"Microbenchmarks on {where}, {first['dtype']}, {first['rounds']} interleaved rounds, "
        f"{'processor time' if first['clock'] == 'cpu' else 'time'}, medians with 95% intervals; "
        f"{_provenance(document)}",
        fontsize=11,
    )
    grid = figure.add_gridspec(height, 2)
    order = [*STRATEGIES, "triton", "eager", "ours", "ungrouped", "peft", "reference"]
    for index, (title, cases, baseline) in enumerate(panels):
        axes = figure.add_subplot(grid[index // 2, index % 2])
        found = [{row["provider"]: row for row in group} for group in cases.values()]
        present = [name for name in order if any(name in group and group[name]["baseline"] != name for group in found)]
        values = {name: [group[name]["x"] if name in group else None for group in found] for name in present}
        spans = {
            name: [(group[name]["x_low"], group[name]["x_high"]) if name in group else None for group in found]
            for name in present
        }
        _grouped_bars(axes, ["\n".join(key).replace("_", "\n") for key in cases], values, spans=spans)
        axes.axhline(1.0, color=COLORS["linear"], linewidth=1, linestyle="--")
        axes.set_title(title, fontsize=10)
        axes.set_ylabel(f"x {baseline}")
    _legend(figure, [name for name in order if any(row["provider"] == name for row in document["rows"])])
    save_figure(figure, path, dpi=110)


def _accuracy_over_size(axes: Any, rows: Sequence[Row]) -> list[dict[str, Any]]:
    """A dot for each row's mean accuracy over its trained parameters, a line from its worst to its best seed.

    A method that trains the head alone has no place on the axis and is a line across. Gives colour and marker of each.
    """
    from matplotlib import colormaps
    from matplotlib.ticker import PercentFormatter

    colors = colormaps["tab10"]
    sizes: list[int] = []
    styles = []
    for index, row in enumerate(rows):
        style = {"color": colors(index % 10), "marker": MARKERS[index // 10 % len(MARKERS)]}
        styles.append(style)
        low, high = row["accuracy"] - row["accuracy_low"], row["accuracy_high"] - row["accuracy"]
        label = f"{row['method']}, {row['accuracy']:.1%}"
        if not row["trainable"]:
            axes.axhline(row["accuracy"], color=style["color"], linestyle="--", label=label)
            continue
        # Methods of like size would hide each other: each stands a little to the right of those before it.
        neighbours = sum(0.9 < size / row["trainable"] < 1.1 for size in sizes)
        sizes.append(row["trainable"])
        x = row["trainable"] * 1.03**neighbours
        axes.errorbar(x, row["accuracy"], [[low], [high]], capsize=3, label=label, **style)
    axes.set_xscale("log")
    axes.set_xlabel("trained parameters in the adapters (the head apart)")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)
    return styles


def _by_accuracy(document: Document) -> list[Row]:
    return sorted(document["rows"], key=lambda row: row["accuracy"], reverse=True)


def draw_methods(document: Document, path: Path) -> None:
    """Accuracy against trained parameters."""
    rows = _by_accuracy(document)
    figure = new_figure(9, 6)
    axes = figure.add_subplot()
    _accuracy_over_size(axes, rows)
    axes.set_ylabel("accuracy on 1,000 test sentences")
    figure.suptitle(
        f"Movie-review sentences, MiniLM, {rows[0]['steps']} steps, {rows[0]['seeds']} seeds: mean, worst and best\n"
        f"{_provenance(document)}",
        fontsize=10,
    )
    figure.legend(loc="outside right center", fontsize=9, frameon=False, title="mean", alignment="left")
    save_figure(figure, path, dpi=110)


def draw_serve(document: Document, path: Path) -> None:
    """Time of a mixed batch as a multiple of the base model's, ours and PEFT's, for each case of a phase."""
    figure = new_figure(11, 4.6)
    rows = document["rows"]
    machine = document["machine"]
    figure.suptitle(
        f"Many adapters in one batch on {machine['cpu']}, {machine['threads']} threads; {_provenance(document)}",
        fontsize=10,
    )
    for index, phase in enumerate(("prefill", "decode")):
        group = [row for row in rows if row["case"].startswith(phase)]
        if not group:
            continue
        axes = figure.add_subplot(1, 2, index + 1)
        names = [row["case"].removeprefix(f"{phase}_").replace("_", "\n") for row in group]
        values = {"ours": [row["x_base"] for row in group], "peft": [row.get("peft_x_base") for row in group]}
        _grouped_bars(axes, names, values)
        axes.axhline(1.0, color=COLORS["linear"], linewidth=1, linestyle="--")
        axes.set_title(phase, fontsize=10)
        axes.set_ylabel("time, x of the base model on the same batch")
    _legend(figure, ["ours", "peft"])
    save_figure(figure, path, dpi=110)


def draw_vllm(document: Document, path: Path) -> None:
    """Time of an engine with adapters as a multiple of one without, ours and vLLM's own, a panel for each dtype."""
    groups = {
        dtype: [row for row in document["rows"] if row["case"].startswith("bf16_") is (dtype == "bf16")]
        for dtype in ("fp32", "bf16")
    }
    shown = {dtype: rows for dtype, rows in groups.items() if rows}
    figure = new_figure(7 * len(shown), 4.4)
    figure.suptitle(
        f"Inside vLLM {document['vllm']} on {document['machine']['cpu']}, one thread; {_provenance(document)}",
        fontsize=10,
    )
    for index, (dtype, rows) in enumerate(shown.items(), 1):
        axes = figure.add_subplot(1, len(shown), index)
        names = [row["case"].removeprefix("bf16_").replace("_", "\n", 1).replace("_", " ") for row in rows]
        keys = {"ours": "", "vllm": "vllm_"}
        values = {side: [row.get(f"{prefix}x_base") for row in rows] for side, prefix in keys.items()}
        spans = {
            side: [(row[f"{prefix}x_low"], row[f"{prefix}x_high"]) if f"{prefix}x_low" in row else None for row in rows]
            for side, prefix in keys.items()
        }
        _grouped_bars(axes, names, values, spans=spans)
        axes.axhline(1.0, color=COLORS["linear"], linewidth=1, linestyle="--")
        axes.set_title(dtype, fontsize=10)
        axes.set_ylabel("time, x of the engine without adapters")
    _legend(figure, ["ours", "vllm"])
    save_figure(figure, path, dpi=90)


def draw_train(document: Document, path: Path) -> None:
    """Step time over PEFT's and losses over the steps, of each case; below, how far the losses are from PEFT's."""
    rows, curves = document["rows"], document["curves"]
    cases = list(dict.fromkeys(row["case"] for row in rows))
    sides = [
        side
        for side in ("accelerated", "injected", "chunked", "dequantised")
        if any(row["side"] == side for row in rows)
    ]
    figure = new_figure(14, 8)
    above, *below = figure.subplot_mosaic([["bars", "bars"], ["losses", "differences"]]).values()
    found = {(row["case"], row["side"]): row["x_peft"] for row in rows}
    values = {side: [found.get((case, side)) for case in cases] for side in sides}
    _grouped_bars(above, [case.replace("_", "\n") for case in cases], values)
    above.axhline(1.0, color=COLORS["peft"], linewidth=1, linestyle="--")
    above.set_ylabel("a training step, x PEFT's")
    losses, differences = below
    for name, curve in curves.items():
        case, _, side = name.partition(" ")
        style = {"color": COLORS[side], "linestyle": ("-", "--", ":", "-.")[cases.index(case) % 4], "linewidth": 1}
        losses.plot(range(1, len(curve) + 1), curve, **style)
        if side != "peft":
            apart = [max(abs(a - b), 1e-9) for a, b in zip(curve, curves[f"{case} peft"], strict=True)]
            differences.semilogy(range(1, len(curve) + 1), apart, **style)
    losses.set_ylabel("loss, nats; a kind of line for each case")
    differences.set_ylabel("difference from PEFT's loss")
    for axes in below:
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
    machine = document["machine"]
    figure.suptitle(
        f"Training on {machine['cpu']}, {rows[0]['threads']} threads, {rows[0]['layers']} layers, {rows[0]['batch']} x "
        f"{rows[0]['length']} tokens; {_provenance(document)}",
        fontsize=10,
    )
    again = ["peft_again"] if any(name.endswith(" peft_again") for name in curves) else []
    _legend(figure, ["peft", *sides, *again])
    save_figure(figure, path, dpi=110)


def draw_vision(document: Document, path: Path) -> None:
    """Accuracy against trained parameters, the mean over all numbers of images, and against the images of each class:
    a colour and marker for each method."""
    from matplotlib.ticker import PercentFormatter

    rows = _by_accuracy(document)
    figure = new_figure(14, 6)
    left, right = figure.subplots(1, 2, sharey=False)
    for row, style in zip(rows, _accuracy_over_size(left, rows), strict=True):
        found = row["few_shot"]
        right.plot(
            [point["shots"] for point in found],
            [point["accuracy"] for point in found],
            label=f"{row['method']}, {row['accuracy']:.1%}",
            linestyle="-" if row["trainable"] else "--",
            **style,
        )
    left.set_ylabel("accuracy on the test images, mean over the numbers of shots")
    right.set_xscale("log", base=2)
    shots = [point["shots"] for point in rows[0]["few_shot"]]
    right.set_xticks(shots, [str(count) for count in shots])
    right.set_xlabel("images of each class to train on")
    right.set_ylabel("accuracy on the test images")
    right.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    right.grid(alpha=0.3)
    right.set_axisbelow(True)
    figure.suptitle(
        f"A ViT that knows the digits 0 to 4 learns 5 to 9: {rows[0]['steps']} steps, {rows[0]['seeds']} seeds; "
        f"{_provenance(document)}",
        fontsize=11,
    )
    handles, labels = right.get_legend_handles_labels()
    place = {"loc": "outside right center", "title": "mean over shots", "alignment": "left"}
    figure.legend(handles, labels, fontsize=9, frameon=False, **place)
    save_figure(figure, path, dpi=110)
