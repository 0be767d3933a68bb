"""What the demo prints, in 80 columns, and its picture."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from ..report import new_figure, save_figure
from .training import Curve


def print_trained(
    title: str, topic: str, trainable: int, curve: Curve, steps: int, answers: list[dict[str, str]], console: Console
) -> None:
    """One adapter, as soon as it is there: what was trained, and answers before and after."""
    before, after = curve.heldout[0][1], curve.heldout[-1][1]
    heading = Text(f"{title} on {topic}", style="bold") + Text(
        f": {trainable:,} parameters, {steps} steps, held-out loss {before:.2f} -> {after:.2f}", style="not bold"
    )
    console.print(heading)
    for entry in answers:
        question = Text(f"{entry['kind']}: {entry['question']}", style="cyan")
        console.print(Padding(question, (0, 0, 0, 2), expand=False))
        texts = Table.grid(padding=(0, 1))
        for label, key in (("corpus", "corpus"), ("before", "base"), ("after", "adapter")):
            texts.add_row("  ", label, Text(entry[key]))
        console.print(texts)


def print_table(rows: list[dict[str, Any]], rounds: int, device: str, console: Console) -> None:
    """The one table, under the lines that say what its columns mean."""
    console.print(
        "\nBeside PEFT, on the same weights. step: forward, backward and optimizer as a multiple of the frozen pass "
        f"(no adapter, backward to the embeddings), medians of {rounds} interleaved rounds, {device}, "
        f"{rows[0]['batch_tokens']} tokens. kept: MB that autograd holds for the backward. diff: largest difference "
        "of our logits from those of PEFT, which loads our directory, relative to the largest.",
        highlight=False,
    )
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("method", no_wrap=True)
    for heading in ("trained", "loss", "step", "PEFT", "kept", "PEFT", "diff"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            row["method"],
            f"{row['trainable']:,}",
            f"{row['loss_before']:.2f} -> {row['loss_after']:.2f}",
            f"{row['x_frozen']:.2f}",
            f"{row['peft_x_frozen']:.2f}",
            f"{row['saved_bytes'] / 1e6:.0f}",
            f"{row['peft_saved_bytes'] / 1e6:.0f}",
            f"{row['difference_from_peft']:.0e}",
        )
    console.print()
    console.print(table)
    console.print()


def print_served(served: dict[str, Any], console: Console) -> None:
    """What became of the mixed batch, in one paragraph, and the rows that differ."""
    rows = served["rows"]
    equal = sum(row["equal"] for row in rows)
    console.print(
        f"One batch of {len(rows)} rows, each with another adapter and one with none: {equal} of them have the "
        f"answer of their adapter alone; {served['seconds']:.1f} s together, "
        f"{served['seconds_one_at_a_time']:.1f} s one by one; adapters of {served['adapter_bytes'] / 1e6:.0f} MB.",
        highlight=False,
    )
    for row in rows:
        if not row["equal"]:
            console.print(Text(f"  {row['method']} differs: {row['question']} -> {row['answer']}", style="red"))


def draw_curves(curves: Iterable[tuple[str, Curve]], path: Path) -> None:
    """A picture of all loss curves, each with its label, written whole or not at all."""
    from matplotlib.ticker import MaxNLocator

    figure = new_figure(9, 5.5)
    axes = figure.add_subplot()
    for index, (label, curve) in enumerate(curves):
        color = f"C{index}"
        axes.plot(range(1, len(curve.train) + 1), curve.train, color=color, alpha=0.4, linewidth=1)
        steps, heldout = zip(*curve.heldout, strict=True)
        axes.plot(steps, heldout, color=color, marker="o", linewidth=2, label=label)
    axes.set_xlabel("training step")
    axes.set_ylabel("loss (nats per answer token)")
    axes.set_title("Loss: thin, each training batch; thick with dots, held-out rows")
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right center", frameon=False)  # beside the curves, which it would hide
    save_figure(figure, path)
