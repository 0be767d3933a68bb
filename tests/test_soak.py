"""A sample of the soak run, and that it would tell."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from bench import soak
from fastadapt.serving import AdapterPool
from fastadapt.serving.pool import Holding


@pytest.fixture(scope="module")
def pool_users(tmp_path_factory: pytest.TempPathFactory) -> soak.Soak:
    return soak.Soak(tmp_path_factory.mktemp("soak"))


@pytest.mark.parametrize("share", [0.4, 1.2])
def test_a_sample_of_the_soak_run(pool_users: soak.Soak, share: float) -> None:
    row = pool_users.block(1, share, 25)
    assert {name: row[name] for name in soak.COUNTED} == dict.fromkeys(soak.COUNTED, 0), row["details"]
    assert row["answers"] > 5
    assert sum(row[name] for name in ("evict", "load", "replace", "remove", "boom")) > 10


def reversed_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    of = Holding.of

    def swapped(self: Holding, rows: Iterable[int], tokens: int) -> Any:
        return of(self, list(rows)[::-1], tokens)

    monkeypatch.setattr(Holding, "of", swapped)


def failing_pin(monkeypatch: pytest.MonkeyPatch) -> None:
    def pin(self: AdapterPool, name: str) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(AdapterPool, "pin", pin)


def forgotten_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    take = AdapterPool._take_hold

    def twice(self: AdapterPool, entry: Any, held: list[Any]) -> Any:
        entry.holders += entry.name == "lora8"
        return take(self, entry, held)

    monkeypatch.setattr(AdapterPool, "_take_hold", twice)


@pytest.mark.parametrize(
    ("plant", "noticed"),
    [(reversed_rows, ["wrong"]), (failing_pin, ["untyped"]), (forgotten_hold, ["lost_holds", "leaked_bytes"])],
)
def test_the_soak_run_tells(
    pool_users: soak.Soak,
    plant: Callable[[pytest.MonkeyPatch], None],
    noticed: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plant(monkeypatch)
    row = pool_users.block(2, 1.2, 25)
    assert all(row[name] > 0 for name in noticed), row


def test_a_stopped_run_goes_on_behind_its_blocks(tmp_path: Path) -> None:
    path = tmp_path / "soak.json"
    assert soak.finished(path, 5) == []
    path.write_text(json.dumps({"rows": [{"seconds": 1.0}], "operations": 5}))
    assert soak.finished(path, 5) == [{"seconds": 1.0}]
    assert soak.finished(path, 6) == []
