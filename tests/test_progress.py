"""The bars: on stderr, for terminals, and never in the way of results."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fastadapt.progress import progress_bar, progress_bars, working

ROOT = Path(__file__).parent.parent

PROGRAM = """
import sys
from fastadapt.progress import progress_bar
with progress_bar("rows", 3) as update:
    for row in range(3):
        print(f"result {row}")
        sys.stdout.write("[bold]as it is[/bold]" + 100 * "-" + "\\n")
        update(advance=1)
"""


def test_results_reach_a_pipe_while_a_bar_is_on_the_terminal() -> None:
    pty = pytest.importorskip("pty")
    ours, theirs = pty.openpty()
    try:
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, stderr=theirs, cwd=ROOT, text=True, check=True
        )
        shown = os.read(ours, 1 << 16).decode()
    finally:
        os.close(ours)
        os.close(theirs)
    assert done.stdout == "".join(f"result {row}\n[bold]as it is[/bold]{100 * '-'}\n" for row in range(3))
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown)
    assert "rows" in plain
    assert "3/3" in plain
    assert "result" not in plain


@pytest.mark.parametrize("colours", [{}, {"FORCE_COLOR": "1"}, {"FORCE_COLOR": "1", "TERM": "dumb"}])
def test_a_log_gets_a_line_a_step_at_most(colours: dict[str, str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, cwd=ROOT, text=True, check=True, env=os.environ | colours
    )
    assert done.stderr == "rows 1/3\nrows 2/3\nrows 3/3\n"
    assert done.stdout.count("\n") == 6


def shown_in_a_log(steps: int, **options: Any) -> list[str]:
    log = Console(file=io.StringIO(), width=80)
    with progress_bars(console=log, **options) as bars:
        task = bars.add_task("step", total=steps, completed=steps // 4, note="")
        for step in range(steps // 4, steps):
            bars.update(task, completed=step + 1, note=f"[loss] {step + 1}")
            bars.update(task, description="steps")
    return log.file.getvalue().splitlines()


def test_a_bar_leaves_as_many_lines_in_a_log_as_it_is_told() -> None:
    assert shown_in_a_log(1000) == [f"step{'s' * (n > 1)} {n * 250}/1000  [loss] {n * 250}" for n in (2, 3, 4)]
    assert len(shown_in_a_log(1000, lines=10)) == 8
    assert shown_in_a_log(1000, transient=True) == []
    assert shown_in_a_log(0) == []


def test_a_bar_without_an_end_leaves_nothing_in_a_log(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar("rows", None) as update:
        update(advance=3)
        update(total=4, completed=4)
    assert capsys.readouterr() == ("", "rows 4/4\n")


def test_a_terminal_is_not_drawn_over_more_often_than_it_can_be_read() -> None:
    terminal = Console(file=Terminal(), force_terminal=True, width=80)
    with progress_bars(console=terminal) as bars:
        task = bars.add_task("step", total=1000)
        for _ in range(1000):
            bars.advance(task)
        assert bars.live.refresh_per_second <= 2
    assert terminal.file.getvalue().count("1000/1000") < 5


def test_what_is_being_done_is_a_line_in_a_log() -> None:
    log = Console(file=io.StringIO(), width=80)
    with working("loading", log) as say:
        say("converting [once]")
    with working("self-test", log, log=False) as say:
        say("case 1")
    assert log.file.getvalue() == "loading\nconverting [once]\n"
    terminal = Console(file=Terminal(), force_terminal=True, width=80)
    with working("loading", terminal) as say:
        say("converting")
    assert "converting" in terminal.file.getvalue()
    assert "loading\n" not in terminal.file.getvalue()


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_bar_says_what_it_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("fastadapt.progress.is_live", lambda console: True)
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes the captured stderr for a terminal
    with progress_bar("rows", None, done=2) as update:
        update(total=7, completed=4, description="generation 3")
    shown = capsys.readouterr()
    assert "generation 3" in shown.err
    assert "4/7" in shown.err
    assert shown.out == ""
    with progress_bar("rows", 7, wanted=False) as update:
        update(completed=4)
    assert capsys.readouterr() == ("", "")


def test_without_rich_there_is_no_bar_and_no_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    for name in [name for name in sys.modules if name.partition(".")[0] == "rich"]:
        monkeypatch.setitem(sys.modules, name, None)
    with progress_bar("rows", 3) as update:
        update(advance=1, description="generation 3")
    assert capsys.readouterr() == ("", "")
    with pytest.raises(ModuleNotFoundError, match="rich"):
        progress_bars()


def test_all_bars_are_made_in_one_place() -> None:
    sources = [*(ROOT / "fastadapt").rglob("*.py"), *(ROOT / "bench").rglob("*.py")]
    texts = {path.name: path.read_text(encoding="utf-8") for path in sources}
    makers = {name for name, text in texts.items() if re.search(r"\b(Progress|track)\(|BarColumn", text)}
    assert makers == {"progress.py"}
