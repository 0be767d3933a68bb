"""Bars of progress, all alike, on stderr: stdout is for results. rich draws them, where it is installed.

A log is never drawn over: there a bar is a few lines.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, ProgressColumn


def is_live(console: Console) -> bool:
    """Whether a console can be drawn over: a terminal or a notebook. A log is none, though it may ask for colours."""
    return console.is_jupyter or (console.is_interactive and console.file.isatty())


def progress_bars(
    *columns: ProgressColumn, console: Console | None = None, transient: bool = False, lines: int = 4
) -> Progress:
    """Bars, one for each task: what it is, how much of it is done, `columns`, the time it took and that which is left.

    console: one that prints while they are there; stderr's by default. transient: they go when all is done. Where the
    console is no terminal, each task leaves `lines` lines in its course, none if transient: what it is, how much is
    done, its field "note". Raises ModuleNotFoundError without rich.
    """
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TaskID,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True) if console is None else console
    live = is_live(console)

    class Bars(Progress):
        """rich's, or lines in their place."""

        def __init__(self, *columns: ProgressColumn, **options: Any) -> None:
            super().__init__(*columns, **options)
            self.said: dict[TaskID, int] = {}

        def add_task(self, *args: Any, **options: Any) -> TaskID:
            task = super().add_task(*args, **options)
            self.said[task] = self.due(task)
            return task

        def update(self, task_id: TaskID, **new: Any) -> None:
            super().update(task_id, **new)
            self.say(task_id)

        def advance(self, task_id: TaskID, advance: float = 1) -> None:
            super().advance(task_id, advance)
            self.say(task_id)

        def due(self, task_id: TaskID) -> int:
            """How many lines a task should have left by now."""
            task = self._tasks[task_id]
            return int(lines * task.completed / task.total) if task.total else 0

        def say(self, task_id: TaskID) -> None:
            if live or transient or self.due(task_id) <= self.said[task_id]:
                return
            self.said[task_id] = self.due(task_id)
            task = self._tasks[task_id]
            parts = [f"{task.description} {task.completed:g}/{task.total:g}", task.fields.get("note", "")]
            self.console.print("  ".join(filter(None, parts)), highlight=False, markup=False, soft_wrap=True)

    return Bars(
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        *columns,
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=transient,
        disable=not live,
        # A terminal may be somebody's log.
        refresh_per_second=2,
        # Else rich takes stdout to the bars' console too, and a pipe or a file behind it gets nothing.
        redirect_stdout=sys.stdout.isatty(),
    )


@contextmanager
def working(text: str, console: Console, *, log: bool = True) -> Iterator[Callable[[str], None]]:
    """A spinner with what is being done; gives what to call with what is done next.

    Where the console is no terminal each text is a line, or nothing without `log`.
    """
    if is_live(console):
        with console.status(text, refresh_per_second=4) as status:
            yield status.update
        return

    def say(text: str) -> None:
        if log:
            console.print(text, highlight=False, markup=False, soft_wrap=True)

    say(text)
    yield say


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
