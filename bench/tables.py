"""README's tables of methods, written from the registry."""

from __future__ import annotations

from pathlib import Path

from fastadapt.methods import table

README = Path(__file__).resolve().parent.parent / "README.md"


def with_tables(text: str) -> str:
    """README's text with the tables of methods in the places of those that it has."""
    for heads in (table.FORMS, table.STREAMS):
        start = text.index(f"| {heads} |")
        text = text[:start] + table.markdown(heads) + text[text.index("\n\n", start) :]
    return text


def main() -> None:
    """Writes README's tables of methods anew, from what the registered methods say of themselves."""
    README.write_text(with_tables(README.read_text(encoding="utf-8")), encoding="utf-8")
