"""The rows of a bench as a table, and how far it has come."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

from rich.console import Console
from rich.table import Table

from fastadapt.progress import progress_bar

Row = dict[str, Any]
T = TypeVar("T")


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


def tracked(items: Sequence[T], what: str) -> Iterator[T]:
    """The items one by one, with a bar of those that are done."""
    with progress_bar(what, len(items)) as update:
        for item in items:
            yield item
            update(advance=1)


def shown(value: Any) -> str:
    """A cell: three significant decimals for a ratio, whole numbers for large ones."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.3f}" if abs(value) < 100 else f"{value:.0f}"
    return str(value)
