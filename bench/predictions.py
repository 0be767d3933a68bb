"""Times that nobody has measured: every strategy and every other library under one model, for GPUs not at hand.

Writes bench/results/PREDICTIONS.md, and its rows as JSON. See operators/adapter_linear/cost.py for the model,
bench/peers.py for the other libraries' operations, bench/l2.py for what leaves L2.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from bench import l2, report
from bench.peers import PEERS, frozen, moved_mib
from bench.plots import read
from fastadapt.commands.report import write_json
from fastadapt.files import written_whole
from fastadapt.operators.adapter_linear.cost import (
    Work,
    backward_works,
    break_even,
    cheapest,
    forward_works,
    predicted_seconds,
    works,
)
from fastadapt.operators.adapter_linear.devices import DEVICES, Device
from fastadapt.operators.adapter_linear.workload import Workload

RESULTS = Path(__file__).resolve().parent / "results"
GPUS = [device for name, device in DEVICES.items() if name != "CPU"]
STRATEGIES = ("split", "fused", "library")
MODELS = {"Llama 8B": (4096, 1024, 14336), "Llama 70B": (8192, 1024, 28672)}
TITLES = {
    "peft": "PEFT",
    "peft_bf16": "PEFT bf16",
    "unsloth": "Unsloth",
    "axolotl": "Axolotl",
    "lorafusion": "LoRAFusion",
}
# Launches of the row norm of one DoRA layer.
_NORM_LAUNCHES = 5


def groups(model: str) -> dict[str, tuple[int, tuple[int, ...]]]:
    """name -> (K, outputs) of the layers of a model that read the same x."""
    hidden, kv, inner = MODELS[model]
    return {
        "q/k/v": (hidden, (hidden, kv, kv)),
        "o": (hidden, (hidden,)),
        "gate/up": (hidden, (inner, inner)),
        "down": (inner, (hidden,)),
    }


def workload(method: str, tokens: int, K: int, outputs: tuple[int, ...], r: int = 16, **more: Any) -> Workload:
    """LoRA, DoRA or VeRA (whose r is 256 unless said) on a group."""
    dora, vera = method == "dora", method == "vera"
    return Workload(
        tokens,
        K,
        outputs,
        (256 if vera else r,) * len(outputs),
        shared_A=vera,
        trains_A=not vera,
        base_scale=dora,
        trains_base=dora,
        dropout_on_base=dora,
        **more,
    )


def row_of(device: Device, name: str, method: str, w: Workload) -> report.Row:
    """FLOPs, MiB, launches and µs of every strategy and every peer."""
    row: report.Row = {"device": device.name, "layers": name, "method": method, "M": w.M, "K": w.K}
    row |= {"outputs": " ".join(map(str, w.outputs)), "r": w.ranks[0], "dropout": w.dropout, "backward": w.backward}
    row["picked"] = cheapest(STRATEGIES, w, device)
    sequences: dict[str, list[Work] | None] = {"frozen": taken(frozen(w), w)}
    sequences |= {strategy: row_norm(w) + works(strategy, w) for strategy in STRATEGIES}
    sequences |= {peer: taken(passes(w), w) for peer, passes in PEERS.items()}
    for key, sequence in sequences.items():
        row[f"{key}_us"] = None if sequence is None else 1e6 * predicted_seconds(sequence, device)
        row[f"{key}_mib"] = None if sequence is None else sum(work.bytes for work in sequence) / 2**20
        row[f"{key}_gflop"] = None if sequence is None else sum(work.flops for work in sequence) / 1e9
        row[f"{key}_launches"] = None if sequence is None else sum(work.launches for work in sequence)
    row["ours_us"] = row[f"{row['picked']}_us"]
    times = {peer: row[f"{peer}_us"] for peer in PEERS if row[f"{peer}_us"] is not None}
    row["best_peer"] = min(times, key=lambda peer: times[peer])
    row["x_best_peer"] = times[row["best_peer"]] / row["ours_us"]
    row["turns_at"] = turning_point(w, device) if w.backward else None
    return row


def row_norm(w: Workload) -> list[Work]:
    """DoRA's norms, which every strategy needs: each weight is read once, with A in two parts."""
    if not w.base_scale:
        return []
    members = zip(w.outputs, w.ranks, strict=True)
    return [Work("norm", 4 * n * w.K * r, 2 * n * w.K, _NORM_LAUNCHES, triton=True) for n, r in members]


def taken(passes: tuple[list[Work], list[Work]] | None, w: Workload) -> list[Work] | None:
    """The works of the passes that a workload has: the forward, and the backward where one follows."""
    if passes is None:
        return None
    forward, backward = passes
    return forward + backward if w.backward else forward


def turning_point(w: Workload, device: Device) -> float | None:
    """The efficiency of a Triton GEMM relative to the library's from which "split" is the faster; None above 1."""
    library = predicted_seconds(works("library", w), device)
    low, high = 0.2, 1.0
    # A share that is taken for few tokens is part of the efficiency that is looked for.
    plain = [work._replace(few_tokens=False) for work in works("split", w)]
    if predicted_seconds(plain, device._replace(triton=high)) > library:
        return None
    for _ in range(30):
        middle = (low + high) / 2
        slower = predicted_seconds(plain, device._replace(triton=middle)) > library
        low, high = (middle, high) if slower else (low, middle)
    return high


def all_rows() -> list[report.Row]:
    """Training at 8192 and 2048 tokens, decoding at 64, and the other methods at 8192."""
    found = []
    for device in GPUS:
        for model in MODELS:
            for name, (K, outputs) in groups(model).items():
                title = f"{model} {name}"
                for tokens in (8192, 2048):
                    found.append(row_of(device, title, "lora", workload("lora", tokens, K, outputs)))
                decode = workload("lora", 64, K, outputs, backward=False)
                found.append(row_of(device, title, "lora", decode))
        for name, (K, outputs) in groups("Llama 8B").items():
            for method, dropout in (("lora", True), ("dora", False), ("dora", True), ("vera", False)):
                found.append(
                    row_of(device, f"Llama 8B {name}", method, workload(method, 8192, K, outputs, dropout=dropout))
                )
    return found


def counters() -> list[report.Row]:
    """LoRAFusion's DRAM counters beside this model: compulsory bytes, plus what leaves L2."""
    found = []
    h100 = DEVICES["H100-SXM"]
    for K, published in l2.PUBLISHED_GIB.items():
        w = workload("lora", 8192, K, (K,), dropout=True)
        # Their tiles on an H100, and close to a library's: 128 x 256, groups of 8, for both large products.
        reread = 2 * l2.reread_bytes(l2.Gemm(8192, (K,), K, 128, 256, 8), h100) / 2**30
        for title, peer, counter in zip(("PyTorch", "LoRAFusion"), ("peft_bf16", "lorafusion"), published, strict=True):
            compulsory = (moved_mib(PEERS[peer](w)) or 0.0) / 1024
            found.append(
                {
                    "kernels": title,
                    "K": K,
                    "compulsory_gib": compulsory,
                    "model_gib": compulsory + reread,
                    "counter_gib": counter,
                    "x_counter": (compulsory + reread) / counter,
                }
            )
    return found


def speedups(h100: Device) -> dict[str, float]:
    """LoRAFusion over PyTorch's operations, as modelled, over the widths of its evaluation."""
    ratios = []
    for tokens in (2048, 4096, 6144, 8192):
        for K in l2.PUBLISHED_GIB:
            w = workload("lora", tokens, K, (K,), dropout=True)
            torch_time, fused_time = (
                predicted_seconds(taken(PEERS[peer](w), w) or (), h100) for peer in ("peft_bf16", "lorafusion")
            )
            ratios.append(torch_time / fused_time)
    return {"mean": statistics.mean(ratios), "best": max(ratios), "worst": min(ratios)}


def dora_speedups() -> dict[str, tuple[float, float]]:
    """GPU -> (inference, gradient): PEFT's bf16 DoRA over ours at r = 384, averaged over the layers of Llama 8B."""
    found = {}
    for device in GPUS:
        sums = [[0.0, 0.0], [0.0, 0.0]]
        for K, outputs in groups("Llama 8B").values():
            w = workload("dora", 4096, K, outputs, r=384)
            peft = PEERS["peft_bf16"](w)
            assert peft is not None
            split = (row_norm(w) + forward_works("split", w), backward_works("split", w))
            for index, (ours, theirs) in enumerate(zip(split, peft, strict=True)):
                sums[index][0] += predicted_seconds(theirs, device)
                sums[index][1] += predicted_seconds(ours, device)
        (forward, ours_forward), (backward, ours_backward) = sums
        found[device.name] = (forward / ours_forward, (forward + backward) / (ours_forward + ours_backward))
    return found


def table(rows: Iterable[Mapping[str, Any]], columns: Mapping[str, str]) -> str:
    """Markdown: {key: heading} of the rows."""
    lines = ["| " + " | ".join(columns.values()) + " |", "|---" * len(columns) + "|"]
    lines += ["| " + " | ".join(_cell(row.get(key)) for key in columns) + " |" for row in rows]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if not isinstance(value, float):
        return str(value)
    return f"{value:.2f}" if abs(value) < 10 else f"{value:.0f}"


def document(rows: Sequence[report.Row]) -> str:
    """PREDICTIONS.md."""
    lora = [row for row in rows if row["method"] == "lora" and not row["dropout"]]
    training = [row for row in lora if row["backward"]]
    parts = [
        _INTRODUCTION,
        "## Assumptions",
        _assumptions(),
        _ABOUT_ASSUMPTIONS,
        "## Calibration against what others published",
        *_calibration(),
        "## LoRA: FLOPs, bytes and launches, M 8192",
        f"Forward and backward, on any device: {' / '.join(TITLES.get(key, key) for key in _AMOUNTS)}. `split` and "
        "`library` are ours. Partial buffers, about 3% of the bytes of `split`, are left out.",
        _amounts(row for row in training if row["device"] == GPUS[0].name and row["M"] == 8192),
    ]
    for device in GPUS:
        parts += [
            f"## LoRA, forward and backward, {device.name}: predicted µs",
            table((row for row in training if row["device"] == device.name), _TIMES),
        ]
    parts += [
        "`picked`: what the cost model chooses of ours. `split from`: the speed of a Triton GEMM, relative to the "
        "library's, from which `split` would be the faster. A peer's ratio below 1 is a loss.",
        "## Decoding, Llama 8B, M 64, forward only: predicted µs",
        "Bound by the weights and by launches. `fused` / `split` / `library` / Unsloth / frozen.",
        _by_gpu(
            (row for row in lora if not row["backward"] and row["layers"].startswith("Llama 8B")),
            ("fused", "split", "library", "unsloth", "frozen"),
        ),
        "## Dropout, DoRA and VeRA, Llama 8B, M 8192, forward and backward: predicted µs",
        "`split` / `library` / best peer. DoRA's row norm is in all of them; VeRA's u is shared within a group.",
        _by_gpu((row for row in rows if row["method"] != "lora" or row["dropout"]), ("split", "library", "best_peer")),
        "## Where the model says that we do not win",
        *_losses(rows, training),
        "## Limits",
        _LIMITS,
    ]
    return "\n\n".join(parts) + "\n"


_AMOUNTS = ("frozen", "split", "library", "peft_bf16", "unsloth", "axolotl", "lorafusion")
_TIMES = {
    "layers": "layers",
    "M": "M",
    "frozen_us": "frozen",
    "split_us": "split",
    "library_us": "library",
    "picked": "picked",
    **{f"{peer}_us": title for peer, title in TITLES.items()},
    "x_best_peer": "best peer / ours",
    "turns_at": "split from",
}
_INTRODUCTION = """\
# Predictions

**Nobody has measured any time on this page**: it was written without a GPU. The times come from a roofline model,
in which each launch takes the longer of FLOPs / rate and bytes / bandwidth, plus a fixed overhead. Our strategies
and the other libraries' sequences of operations go through the same model, so their order says more than their
size.

`python -m bench gpu` measures; `python -m bench predictions` writes this page. Code:
`fastadapt/operators/adapter_linear/cost.py` (the model), `fastadapt/operators/adapter_linear/devices.py` (the devices
and the sources of their numbers), `bench/peers.py` (the other libraries' operations), `bench/l2.py` (what leaves L2),
`bench/traffic.py` (our bytes, counted)."""
_ABOUT_ASSUMPTIONS = """\
The two columns on the right decide nearly everything. A fused GEMM saves readings and writings of y, and pays with
whatever it is slower than the library's; it must reach the last column's share to be worth it. What it reaches is
assumed, and lower where a matrix unit wants more than plain loads to be fed. For M <= 2048 it is taken to lose
another tenth. bf16; LoRA and DoRA at r 16, VeRA at r 256, our adapters in fp32."""
_LIMITS = """\
* The attainable shares and the Triton ratio are assumptions. A ratio off by 0.05 moves a compute-bound time by 5%,
  which is more than most differences above.
* Every operand moves once a launch. Re-reads past L2 are in the calibration only: they hide behind the matrix unit
  as long as a GEMM is bound by it.
* A launch costs the same whoever makes it. Triton's launcher takes more of the host than PyTorch's operators; where
  the host is the limit (small M), CUDA graphs decide.
* Occupancy, clocks under load and what surrounds a layer (casts, copies, the allocator) are left out.
* The peers' operations are read from their sources, for weights that are not quantised; a later version may differ."""


def _assumptions() -> str:
    rows = [
        {
            "name": device.name,
            "rate": f"{device.matmul['bfloat16'] / 1e12:.0f}",
            "bandwidth": f"{device.bandwidth / 1e12:.2f}",
            "attainable": f"{device.attainable_matmul:.2f} / {device.attainable_bandwidth:.2f}",
            "launch": f"{device.launch * 1e6:.0f}",
            "triton": f"{device.triton:.2f}",
            "turns": " / ".join(f"{break_even(K, device):.2f}" for K in (1024, 4096, 14336)),
        }
        for device in GPUS
    ]
    headings = {"name": "GPU", "rate": "bf16 TFLOP/s", "bandwidth": "TB/s", "attainable": "attainable shares"}
    headings |= {"launch": "launch, µs", "triton": "Triton GEMM / library's (assumed)"}
    return table(rows, headings | {"turns": "needed for one y, K 1024 / 4096 / 14336"})


def _calibration() -> list[str]:
    h100 = DEVICES["H100-SXM"]
    assumed, equal = speedups(h100), speedups(h100._replace(triton=1.0))
    dora = [f"{name} {forward:.1f}x, {both:.1f}x" for name, (forward, both) in dora_speedups().items()]
    headings = {"kernels": "operations", "K": "K = N", "compulsory_gib": "compulsory, GiB"}
    headings |= {"model_gib": "with re-reads, GiB", "counter_gib": "counter, GiB", "x_counter": "model / counter"}
    return [
        "DRAM bytes of one LoRA layer with dropout, forward and backward, M 8192, on an H100, as LoRAFusion's "
        "authors counted them (arXiv:2510.00206). The model is compulsory bytes plus GEMM tiles re-read past L2, at "
        "LoRAFusion's tiles (128 x 256, groups of 8); PyTorch's GEMMs are taken to have the same.",
        table(counters(), headings),
        "LoRAFusion's speed over PyTorch's operations on an H100: published 1.27x in the mean and 1.39x at best. The "
        f"model says {assumed['mean']:.2f}x and {assumed['best']:.2f}x over the same widths and 2048 to 8192 tokens, "
        f"and {equal['mean']:.2f}x and {equal['best']:.2f}x for a Triton GEMM as fast as the library's. So either "
        "theirs is (it loads by TMA in the forward pass, ours by plain loads), or the model underrates fusion "
        "elsewhere: elementwise operations reach less of the bandwidth than it grants them, and a host leaves gaps.",
        "DoRA at r 384 in bf16 on whole vision-language models of 8 to 32B (arXiv:2603.22276): fused kernels "
        "1.5-2.0x as fast as PEFT in inference and 1.5-1.9x in gradients, on an RTX 6000 PRO, an H200 and a B200. "
        "The model's ratio of PEFT to our `split`, for the linear layers of Llama 8B alone at 4096 tokens, forward, "
        f"then both passes: {'; '.join(dora)}. Those are other kernels in whole models: the order of size agrees, no "
        "more.",
    ]


def _amounts(rows: Iterable[report.Row]) -> str:
    def joined(row: report.Row, unit: str) -> str:
        return " / ".join("-" if row[f"{key}_{unit}"] is None else f"{row[f'{key}_{unit}']:.0f}" for key in _AMOUNTS)

    units = {"gflop": "GFLOP", "mib": "MiB", "launches": "launches"}
    cells = [{"layers": row["layers"], **{unit: joined(row, unit) for unit in units}} for row in rows]
    return table(cells, {"layers": "layers", **units})


def _by_gpu(rows: Iterable[report.Row], keys: Sequence[str]) -> str:
    """One line for the same layers on every GPU, with several times in a cell."""
    lines: dict[tuple[str, str], dict[str, str]] = {}
    for row in rows:
        case = row["method"] + (" dropout" if row["dropout"] else "")
        times = [row[f"{row['best_peer'] if key == 'best_peer' else key}_us"] for key in keys]
        line = lines.setdefault((row["layers"], case), {"layers": row["layers"], "case": case})
        line[row["device"]] = " / ".join(_cell(time) for time in times)
        if "best_peer" in keys and TITLES[row["best_peer"]] not in line.get("peer", ""):
            line["peer"] = " or ".join(filter(None, (line.get("peer"), TITLES[row["best_peer"]])))
    columns = {"layers": "layers", "case": "case", **{device.name: device.name for device in GPUS}}
    return table(lines.values(), columns | ({"peer": "best peer"} if "best_peer" in keys else {}))


def _losses(rows: Sequence[report.Row], training: Sequence[report.Row]) -> list[str]:
    kernels = [row for row in training if row["picked"] == "split"]
    behind = [row for row in rows if row["x_best_peer"] < 1.0]
    h100 = DEVICES["H100-SXM"]
    own_rule = workload("dora", 8192, *groups("Llama 8B")["o"], dropout=True)._replace(dropout_on_base=False)
    axolotl = predicted_seconds(taken(PEERS["axolotl"](own_rule), own_rule) or (), h100)
    ours = predicted_seconds(row_norm(own_rule) + works("split", own_rule._replace(dropout_on_base=True)), h100)
    named = "; ".join(f"{row['device']} {row['layers'].removeprefix('Llama ')} M {row['M']}" for row in kernels)
    ahead = "; ".join(
        f"{TITLES[row['best_peer']]}, {row['device']}, {row['layers']}, {row['method']}"
        f"{' dropout' if row['dropout'] else ''}, M {row['M']} ({row['x_best_peer']:.3f})"
        for row in behind
    )
    lines = [
        f"* Of {len(training)} rows of LoRA training without dropout, `split` is picked in {len(kernels)}: "
        f"{named or 'none'}. In the others PyTorch's GEMM and addmm_ (`library`) are faster by the model, and what is "
        "won over the peers is the order of operations alone: u and q once, one x and one shrink for a group. Beside "
        "the best peer that is 1-5% for a single layer.",
        "* `split` gains most at small K, with dropout, with DoRA and for several outputs of one x; it loses most at "
        "large K and for VeRA at r 256, whose products are no longer small.",
        f"* A peer is ahead of what is picked in {len(behind)} of {len(rows)} rows{': ' + ahead if behind else ''}. "
        "LoRAFusion without dropout is the same design as `split` for a single layer: a tie by construction.",
        "* Axolotl's DoRA under dropout drops the low-rank path alone. The published rule, which we keep, takes a "
        f"second base product: {ours * 1e6:.0f} µs where its own rule takes {axolotl * 1e6:.0f} (4096 x 4096, M 8192, "
        "H100).",
    ]
    return ["\n".join(lines)]


def main(
    markdown: Annotated[Path, typer.Option(help="The page.")] = RESULTS / "PREDICTIONS.md",
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the rows there.")] = None,
    measured: Annotated[
        Path | None, typer.Option(help="A document of `bench gpu`: put its times beside the predicted ones instead.")
    ] = None,
) -> None:
    """Predicted times of our strategies and of other libraries on GPUs, marked as such; writes a page."""
    if measured is not None:
        from bench.measured import show

        found = show(read(measured))
        if json_file is not None:
            write_json(json_file, "measured", found)
        return
    rows = all_rows()
    with written_whole(markdown) as draft:
        draft.write_text(document(rows), encoding="utf-8")
    shown = [row for row in rows if row["method"] == "lora" and row["M"] == 8192 and not row["dropout"]]
    columns = {"device": "GPU", "layers": "layers", "picked": "picked", "frozen_us": "frozen", "ours_us": "ours"}
    columns |= {f"{peer}_us": title for peer, title in TITLES.items()}
    report.print_table("Predicted, not measured: LoRA, M 8192, forward and backward, µs", shown, columns)
    if json_file is not None:
        write_json(json_file, "predictions", rows)
