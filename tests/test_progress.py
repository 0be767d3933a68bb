"""The bars: on stderr, for terminals, and never in the way of results."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fastadapt.progress import progress_bar, progress_bars

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


def test_without_a_terminal_there_is_no_bar() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, cwd=ROOT, text=True, check=True)
    assert done.stderr == ""
    assert done.stdout.count("\n") == 6


def test_a_bar_says_what_it_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
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
