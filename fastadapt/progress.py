"""Bars of progress, all alike, on stderr: stdout is for results. rich draws them, where it is installed."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, ProgressColumn


def progress_bars(*columns: ProgressColumn, console: Console | None = None, transient: bool = False) -> Progress:
    """Bars, one for each task: what it is, how much of it is done, `columns`, the time it took and that which is left.

    console: one that prints while they are there; stderr's by default. transient: they go when all is done. There are
    none where the console is no terminal. Raises ModuleNotFoundError without rich.
    """
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True) if console is None else console
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        *columns,
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=transient,
        disable=not (console.is_terminal or console.is_jupyter),
        # Else rich takes stdout to the bars' console too, and a pipe or a file behind it gets nothing.
        redirect_stdout=sys.stdout.isatty(),
    )


@contextmanager
def progress_bar(
    description: str, total: int | None, *, done: int = 0, wanted: bool = True, transient: bool = False
) -> Iterator[Callable[..., None]]:
    """One bar. Gives what to call with what is new: completed, advance, total or description.

    That does nothing where no bar is wanted or rich is not installed.
    """
    try:
        bars = progress_bars(transient=transient) if wanted else None
    except ModuleNotFoundError:
        bars = None
    if bars is None:
        yield lambda **new: None
        return
    with bars:
        yield partial(bars.update, bars.add_task(description, total=total, completed=done))
