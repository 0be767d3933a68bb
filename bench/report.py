"""The rows of a bench as a table, and how far it has come."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

from rich.console import Console
from rich.table import Table

from fastadapt.progress import progress_bar

Row = dict[str, Any]
T = TypeVar("T")


WIDTH = 80


def print_table(title: str, rows: Sequence[Row], columns: Mapping[str, str]) -> None:
    """Print the columns {key: heading} of the rows: several tables where they do not fit into 80 characters.

    Each begins with the first column, which says what the row is.
    """
    console = Console()
    console = console if console.is_terminal else Console(width=WIDTH)
    cells = {key: [heading, *(shown(row.get(key)) for row in rows)] for key, heading in columns.items()}
    widths = {key: max(map(len, texts)) + 3 for key, texts in cells.items()}
    first, *others = columns
    blocks: list[list[str]] = [[first]]
    for key in others:
        if len(blocks[-1]) > 1 and sum(widths[one] for one in (*blocks[-1], key)) + 1 > console.width:
            blocks.append([first])
        blocks[-1].append(key)
    for block in blocks:
        table = Table(title=title if block is blocks[0] else None)
        for key in block:
            table.add_column(columns[key], justify="left" if key == first else "right", overflow="fold")
        for row in range(1, len(rows) + 1):
            table.add_row(*(cells[key][row] for key in block))
        console.print(table)


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
