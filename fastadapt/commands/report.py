"""The JSON that every measurement is kept as: what was found, and on which machine, versions and commit."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..environment import commit, machine, versions
from ..files import written_whole


def new_figure(width: float, height: float) -> Any:
    """A matplotlib figure of that many inches that needs no display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Any, path: Path, dpi: int = 120) -> None:
    """Writes a figure as a picture, whole or not at all."""
    with written_whole(path) as draft:
        figure.savefig(draft, dpi=dpi)


def provenance() -> dict[str, Any]:
    """Where numbers come from: {"machine", "versions", "commit"}."""
    return {"machine": machine(), "versions": versions(), "commit": commit()}


def write_json(path: Path, name: str, rows: Sequence[dict[str, Any]], **more: Any) -> None:
    """Writes {"name", "machine", "versions", "commit", "rows", ...} whole or not at all."""
    write_document(path, {"name": name, **provenance(), "rows": list(rows), **more})


def write_document(path: Path, document: dict[str, Any]) -> None:
    """Writes a document whole or not at all."""
    with written_whole(path) as draft:
        draft.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
