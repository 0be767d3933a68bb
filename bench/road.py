"""The road of x through the package: which rooms a call meets from an adapter layer to its product, and back.

A profile of LoRA in eval mode and of DoRA with dropout in training. A room is a folder of the package, an operator's
folder counted as one of its own, or a file that lies directly in it. A call leads up where a function calls one of a
floor above its own: the floors are those of tests/test_architecture.py.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

import fastadapt
from bench import page, report
from bench.plots import Document
from fastadapt.commands.report import write_json

ROOT = Path(fastadapt.__file__).resolve().parent

FLOORS = (
    ("reference", "checks", "files", "environment", "staleness", "progress"),
    ("operators",),
    ("forms", "functional"),
    ("layers",),
    ("methods",),
    ("model",),
    ("training", "serving"),
    ("commands",),
)


def room_of(frame: FrameType) -> str | None:
    """The room of a frame's file, None outside the package."""
    path = Path(frame.f_code.co_filename)
    if ROOT not in path.parents:
        return None
    parts = path.relative_to(ROOT).with_suffix("").parts
    return "/".join(parts[:-1]) or parts[0]


def floor_of(room: str) -> int:
    return next(index for index, names in enumerate(FLOORS) if room.split("/")[0] in names)


def walked(run: Callable[[], object]) -> tuple[list[str], int, int]:
    """(rooms in the order in which they are first met, calls that lead up, calls in all) of a run."""
    rooms: dict[str, None] = {}
    counts = {"up": 0, "calls": 0}

    def watch(frame: FrameType, event: str, _: Any) -> None:
        counts["calls"] += event in ("call", "c_call")
        room = room_of(frame) if event == "call" else None
        if room is None:
            return
        rooms[room] = None
        caller = frame.f_back
        while caller is not None and room_of(caller) is None:
            caller = caller.f_back
        origin = None if caller is None else room_of(caller)
        counts["up"] += origin is not None and floor_of(room) > floor_of(origin)

    sys.setprofile(watch)
    try:
        run()
    finally:
        sys.setprofile(None)
    return list(rooms), counts["up"], counts["calls"]


def cases() -> dict[str, Callable[[], object]]:
    """A forward of LoRA in eval mode, and a training step of DoRA with dropout, on one linear layer."""
    x = torch.randn(8, 64)

    def layer(config: fastadapt.LoRAConfig) -> Any:
        return fastadapt.inject(nn.Sequential(nn.Linear(64, 64)), config)[0]

    lora = layer(fastadapt.LoRAConfig(r=8, target_modules=["0"])).eval()
    dora = layer(fastadapt.DoRAConfig(r=8, lora_dropout=0.1, target_modules=["0"])).train()

    def infer() -> None:
        with torch.no_grad():
            lora(x)

    def train() -> None:
        y: Tensor = dora(x)
        y.backward(torch.ones_like(y))

    return {"LoRA, eval": infer, "DoRA with dropout, training": train}


def main(json_file: Annotated[Path | None, typer.Option("--json", help="Write the rows there.")] = None) -> None:
    """The rooms that x meets from an adapter layer to its product and back, and the calls that lead up."""
    rows = []
    for name, run in cases().items():
        run()  # what is made once is made
        rooms, up, calls = walked(run)
        rows.append({"case": name, "rooms": len(rooms), "up": up, "calls": calls, "met": ", ".join(rooms)})
    columns = {"case": "case", "rooms": "rooms", "up": "calls that lead up", "calls": "calls in all", "met": "met"}
    report.print_table("The road of x", rows, columns)
    if json_file is not None:
        write_json(json_file, "road", rows)


@page.section("road", "The road of x")
def section(document: Document) -> str:
    rows = [f"{row['case']} | {row['rooms']} | {row['up']} | {row['calls']}" for row in document["rows"]]
    return (
        "The rooms of the package that a call of one adapted layer passes, the calls that lead to a floor above, and "
        "all Python calls.\n\n"
    ) + page.table("| rooms | calls that lead up | calls in all", rows)
