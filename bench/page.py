"""What the stored JSON files say, in Markdown: `bench/results/README.md`, and README's headline numbers.

A bench says beside its code how its document reads: `@section(name, title)` above a function that makes Markdown of
`bench/results/NAME.json`, `@headline(name)` above one that makes a row of README's table. A document that is not there
yet is left out. No number on either page is written by hand.
"""

from __future__ import annotations

import importlib
import textwrap
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from bench.cases import BENCHES
from bench.plots import Document, read
from bench.report import Row

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
README = ROOT / "README.md"
HEADLINES = "measured | fastadapt | PEFT"

Writer = Callable[[Document], str]


class Section(NamedTuple):
    """A heading, what made the document, and what makes Markdown of it."""

    title: str
    command: str
    write: Writer


# By the name of the JSON file, without its ending.
SECTIONS: dict[str, Section] = {}
_HEADLINES: dict[str, list[Writer]] = {}


def section(name: str, title: str, command: str = "") -> Callable[[Writer], Writer]:
    """The decorated function makes the section of NAME.json: text and tables, without heading and picture."""

    def enter(write: Writer) -> Writer:
        SECTIONS[name] = Section(title, command or f"python -m bench {name} --json FILE", write)
        return write

    return enter


def headline(name: str) -> Callable[[Writer], Writer]:
    """The decorated function makes the cells of one row of README's table from NAME.json, with " | " between."""

    def enter(write: Writer) -> Writer:
        _HEADLINES.setdefault(name, []).append(write)
        return write

    return enter


def table(heads: str, rows: Iterable[str]) -> str:
    """A table: heads and rows have their cells with " | " between; the first column is text, the others numbers."""
    columns = heads.count("|")
    return "\n".join([f"| {heads} |", f"|---{'|--:' * columns}|", *(f"| {row} |" for row in rows)])


def span(row: Mapping[str, Any], key: str, low: str, high: str, places: int = 2) -> str:
    """A value and what it lies between, a dash where there is none: 1.17 (1.12–1.72)."""
    if row.get(key) is None:
        return "–"
    return f"{row[key]:.{places}f} ({row[low]:.{places}f}–{row[high]:.{places}f})"


def number(value: float | None, places: int = 2) -> str:
    return "–" if value is None else f"{value:,.{places}f}"


def by_case(document: Document) -> dict[str, Row]:
    return {row["case"]: row for row in document["rows"]}


def provenance(document: Document) -> str:
    """Where the numbers are from."""
    machine, versions = document["machine"], document["versions"]
    packages = [f"{name} {versions[name]}" for name in ("torch", "triton", "transformers", "peft") if versions[name]]
    threads = f"{machine['threads']} thread{'s' if machine['threads'] > 1 else ''}"
    devices = machine["accelerators"] or [f"{machine['cpu']}, {threads}"]
    commit, _, changed = (document["commit"] or "unknown").partition("+")
    where = f"{commit[:9]}{' and changes' if changed else ''}"
    return f"{'; '.join(devices)}. {', '.join(packages)}, Python {versions['python']}. fastadapt at {where}."


Entered = TypeVar("Entered")


def _in_order(
    entered: Mapping[str, Entered], writer: Callable[[Entered], Writer], directory: Path
) -> dict[str, Entered]:
    """What was entered for the documents of a directory, bench by bench, whichever was imported first.

    Every bench enters its own when it is imported; the demo's are apart, since it is no bench.
    """
    modules = [*BENCHES.values(), "bench.demo"]
    for module in modules:
        importlib.import_module(module)

    def place(name: str) -> int:
        module = writer(entered[name]).__module__
        return modules.index(module) if module in modules else len(modules)

    return {name: entered[name] for name in sorted(entered, key=place) if (directory / f"{name}.json").is_file()}


def results(directory: Path = RESULTS) -> str:
    """The page of results, from the JSON files of a directory."""
    there = _in_order(SECTIONS, lambda one: one.write, directory)
    parts = [
        "# Results",
        "Written by `python -m bench report` from the JSON files beside it; each command makes its file again. What is "
        "compared ran interleaved in one process. Numbers in brackets are 95% intervals of the median where it is not "
        "said otherwise; the machines are shared and noisy, so ratios of one round are what to go by.",
        "\n".join(f"* [{one.title}](#{_anchor(one.title)})" for one in there.values()),
    ]
    for name, one in there.items():
        document = read(directory / f"{name}.json")
        parts += [f"## {one.title}", f"`{one.command}`. {provenance(document)}", one.write(document)]
        if (directory / f"{name}.png").is_file():
            parts.append(f"![{one.title}]({name}.png)")
    return "\n\n".join(_wrapped(part) for text in parts for part in text.strip().split("\n\n")) + "\n"


def _wrapped(part: str) -> str:
    """A paragraph in lines of at most 120; what is none stays as it is."""
    return part if part.startswith(("|", "*", "#", "!")) else textwrap.fill(part, 120, break_on_hyphens=False)


def _anchor(title: str) -> str:
    """The name that GitHub gives a heading."""
    kept = "".join(letter for letter in title.lower() if letter.isalnum() or letter in " -_")
    return kept.replace(" ", "-")


def headlines(directory: Path = RESULTS) -> str:
    """README's table of headline numbers, from the JSON files of a directory."""
    there = _in_order(_HEADLINES, lambda writers: writers[0], directory)
    rows = [write(read(directory / f"{name}.json")) for name, writers in there.items() for write in writers]
    return table(HEADLINES, rows)


def with_headlines(text: str, directory: Path = RESULTS) -> str:
    """README's text with the headline numbers in the place of those that it has."""
    start = text.index(f"| {HEADLINES} |")
    return text[:start] + headlines(directory) + text[text.index("\n\n", start) :]


def main() -> None:
    """Writes bench/results/README.md and README's headline numbers anew, from the stored JSON files."""
    (RESULTS / "README.md").write_text(results(RESULTS), encoding="utf-8")
    README.write_text(with_headlines(README.read_text(encoding="utf-8"), RESULTS), encoding="utf-8")
