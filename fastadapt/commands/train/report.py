"""What `fastadapt train` shows: progress while it runs, then a table and a picture of the losses."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import TextColumn
from rich.table import Table

from ...progress import progress_bars
from ..report import new_figure, save_figure
from .loop import Evaluation


class Bar:
    """A live bar with step, loss, learning rate and the time that is left; ten lines where there is no terminal."""

    def __init__(self, console: Console, done: int, steps: int) -> None:
        self.console = console
        # What is printed meanwhile, the evaluations, goes to the same console.
        self.progress = progress_bars(TextColumn("{task.fields[note]}"), console=console, lines=10)
        self.task = self.progress.add_task("step", total=steps, completed=done, note="")

    def __enter__(self) -> Bar:
        self.progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.progress.stop()

    def step(self, step: int, loss: float, rate: float) -> None:
        note = f"loss {loss:.4f}  rate {rate:.2e}"
        self.progress.update(self.task, completed=step, note=note)

    def evaluated(self, evaluation: Evaluation) -> None:
        accuracy = "" if evaluation.accuracy is None else f", accuracy {evaluation.accuracy:.1%}"
        self.console.print(
            f"evaluation after step {evaluation.step}: loss {evaluation.loss:.4f}{accuracy}", highlight=False
        )


def draw(losses: Sequence[float], evaluations: Sequence[Evaluation], unit: str, path: Path) -> None:
    """A picture of the losses, and of the accuracy where there is one, written whole or not at all."""
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    accuracies = [evaluation.accuracy for evaluation in evaluations if evaluation.accuracy is not None]
    figure = new_figure(9, 8 if accuracies else 5)
    axes = figure.subplots(2 if accuracies else 1, 1, sharex=True, squeeze=False)[:, 0]
    axes[0].plot(range(1, len(losses) + 1), losses, alpha=0.5, linewidth=1, label="training step")
    steps = [evaluation.step for evaluation in evaluations]
    if evaluations:
        held = [evaluation.loss for evaluation in evaluations]
        axes[0].plot(steps, held, marker="o", linewidth=2, label="held-out rows")
    axes[0].set_ylabel(f"loss (nats per {unit})")
    axes[0].set_ylim(bottom=0)
    axes[0].legend()
    if accuracies:
        axes[1].plot(steps, accuracies, marker="o", linewidth=2, color="C1")
        axes[1].set_ylabel("accuracy on held-out rows")
        axes[1].set_ylim(0, 1.02)
        axes[1].yaxis.set_major_formatter(PercentFormatter(1.0))
    axes[-1].set_xlabel("step")
    for part in axes:
        part.xaxis.set_major_locator(MaxNLocator(integer=True))
        part.grid(alpha=0.3)
    save_figure(figure, path)


def summary(row: dict[str, Any]) -> Table:
    """The table at the end, from the row of train.json."""
    table = Table(show_header=False, title=f"{row['title']} on {row['data']}")

    def change(before: float, after: float, form: str) -> str:
        return f"{before:{form}} -> {after:{form}}"

    held = f" ({row['eval_rows']:,} held-out rows)"
    if row["eval_rows"]:
        table.add_row("loss", change(row["loss_before"], row["loss_after"], ".4f") + held)
    else:
        table.add_row("loss", change(row["first_loss"], row["last_loss"], ".4f") + " (first and last training step)")
    if row["accuracy_after"] is not None:
        table.add_row("accuracy", change(row["accuracy_before"], row["accuracy_after"], ".1%") + held)
    table.add_row("trainable", f"{row['trainable']:,} of {row['parameters']:,} parameters")
    speed = f"{row['tokens_per_second']:,.0f} tokens a second"
    table.add_row("time", f"{row['seconds']:.1f} s for {row['steps']:,} steps, {speed}")
    return table
