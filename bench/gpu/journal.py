"""The document of a run, written whole after every job: whatever happens then, what was found is kept."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.gpu.job import Rates
from bench.report import Row
from fastadapt.commands.report import provenance, write_document

PARTS = ("rows", "checks", "counters")


class Journal:
    """rows: times. checks, counters; ceilings by name; jobs: what became of each, in order, those not run among them.

    Without a path nothing is written.
    """

    def __init__(self, path: Path | None, **facts: Any) -> None:
        self.path = path
        self.document: dict[str, Any] = {"name": "gpu", **provenance(), **facts, "ended": "running", "ceilings": {}}
        self.document |= {part: [] for part in PARTS} | {"jobs": []}

    @property
    def rates(self) -> Rates | None:
        """The ceilings, once they are measured."""
        found = self.document["ceilings"]
        return Rates.of(self.document["device"]["type"], found) if "bytes" in found and "fp64" in found else None

    def add(self, part: str, rows: Sequence[Row]) -> None:
        """Enters the rows of a job."""
        if part == "ceilings":
            self.document["ceilings"] |= {row["name"]: row["rate"] for row in rows}
        elif part == "rows":
            self.document[part] += [row | shares(row, self.rates) for row in rows]
        else:
            self.document[part] += rows

    def job(self, label: str, status: str, seconds: float | None, expected: float, note: str = "") -> None:
        """Enters what became of a job."""
        entry = {"job": label, "status": status, "seconds": seconds, "expected": expected, "note": note}
        self.document["jobs"].append(entry)

    def write(self) -> None:
        """Writes the document."""
        if self.path is not None:
            write_document(self.path, self.document)

    @property
    def wrong(self) -> frozenset[str]:
        """The strategies that failed a check anywhere."""
        rows = (*self.document["checks"], *self.document["rows"])
        return frozenset(row["provider"] for row in rows if row["status"] == "failed")

    def failures(self) -> list[str]:
        """What makes the run a failure, a line each: wrong results, what must run and did not, jobs that broke."""
        found = []
        for row in (*self.document["checks"], *self.document["rows"]):
            if row["status"] == "failed":
                name = " ".join(str(part) for part in (*case_of(row), row["provider"]) if part)
                found.append(f"{name}: {row['note']}")
        broke = [entry for entry in self.document["jobs"] if entry["status"] in ("failed", "crashed", "hung")]
        return found + [f"{entry['job']}: {entry['status']}: {entry['note']}" for entry in broke]


def shares(row: Row, rates: Rates | None) -> Row:
    """The formula's work by time, absolute and of the ceilings: what a provider does beyond it shows as lost speed.

    The frozen layers do less than the formula's work, and have none.
    """
    names = ("gbytes_s", "tflops", "of_bandwidth", "of_flops", "of_roofline")
    if row["ms"] is None or row["provider"] == "linear" or rates is None:
        return dict.fromkeys(names)
    moved, operations = row["minimum_mib"] * 2**20 * 1e3 / row["ms"], row["gflop"] * 1e12 / row["ms"]
    of_bandwidth, of_flops = moved / rates.bytes, operations / rates.flops[row["dtype"]]
    values = (moved / 1e9, operations / 1e12, of_bandwidth, of_flops, max(of_bandwidth, of_flops))
    return dict(zip(names, values, strict=True))


def case_of(row: Row) -> tuple[Any, ...]:
    """What the rows of one case have in common."""
    return tuple(row[name] for name in ("operator", "case", "layers", "M", "dtype"))
