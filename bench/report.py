"""The rows of a bench as a table, and how far it has come."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

Row = dict[str, Any]


def print_table(title: str, rows: Sequence[Row], columns: Mapping[str, str]) -> None:
    """Print the columns {key: heading} of the rows."""
    table = Table(title=title)
    for heading in columns.values():
        table.add_column(heading, justify="left" if heading == next(iter(columns.values())) else "right")
    for row in rows:
        table.add_row(*(shown(row.get(key)) for key in columns))
    console = Console()
    # A pipe has no width of its own, and a table folded to 80 columns is not legible.
    (console if console.is_terminal else Console(width=150)).print(table)


def progress() -> Progress:
    """A bar of runs done, with the time that they took and that the rest will take."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )


def shown(value: Any) -> str:
    """A cell: three significant decimals for a ratio, whole numbers for large ones."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.3f}" if abs(value) < 100 else f"{value:.0f}"
    return str(value)
