"""What the device counts itself, by Nsight Compute: bytes of its memory and the share of its tensor pipe, by kernel.

`python -m bench.gpu.counters` is what is looked at: one step between two marks.
"""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from bench.cases import AdapterCase
from bench.gpu.job import Desk, Job, Rates
from bench.operators import Layers, OperatorCase, make_operands, prepare
from bench.report import Row
from fastadapt.operators.adapter_linear.cost import Work, works
from fastadapt.operators.adapter_linear.workload import Workload

_METRICS = "dram__bytes_read.sum,dram__bytes_write.sum,gpu__time_duration.sum"
# The tensor pipe's share has a name for each architecture: the section has it, whatever it is called.
_SECTION = "ComputeWorkloadAnalysis"
_SECONDS = 90.0
MIB = 2**20

# Kernel -> the phase of "split" in the cost model, whose bytes are those that `bench traffic` counts.
PHASES = {
    "_shrink_kernel": "shrink",
    "_adapter_linear_kernel": "linear",
    "_output_grads_kernel": "dy",
    "_adapter_linear_dx_kernel": "dx",
    "_input_grads_kernel": "dA",
}


@dataclass(frozen=True)
class Counters(Job):
    """Rows {"kernel", "us", "read_mib", "written_mib", "counted_mib", "tensor_percent"} of one step of "split"."""

    part = "counters"
    case: OperatorCase

    @property
    def label(self) -> str:
        return f"counters {self.case.label}"

    def run(self, desk: Desk) -> list[Row]:
        desk.at("ncu")
        tool = shutil.which("ncu")
        if tool is None or not desk.on_gpu:
            return [skipped("there is no GPU" if not desk.on_gpu else "ncu (Nsight Compute) is not on the PATH")]
        command = [tool, "--profile-from-start", "off", "--clock-control", "none", "--csv", "--page", "raw"]
        command += ["--print-units", "base", "--metrics", _METRICS, "--section", _SECTION]
        command += [sys.executable, "-m", "bench.gpu.counters", json.dumps(asdict(self.case))]
        root = Path(__file__).resolve().parents[2]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        try:
            done = subprocess.run(
                command, cwd=root, env=environment, capture_output=True, text=True, timeout=_SECONDS, check=False
            )
        except subprocess.TimeoutExpired:
            return [skipped(f"ncu did not end in {_SECONDS:.0f} s")]
        rows = parsed(done.stdout, {work.phase: work.bytes for work in self.counted()})
        said = (done.stdout + done.stderr).strip().splitlines()
        wrong = [line for line in said if line.startswith("==ERROR==")] or said[-1:]
        return rows or [skipped(f"ncu counts nothing here: {' '.join(wrong)[:300]}")]

    def counted(self) -> list[Work]:
        """The launches of "split" with the bytes that each moves, as `bench traffic` counts them."""
        m, k, r = self.case.tokens, self.case.layers.in_features, self.case.adapter.r
        outputs = self.case.layers.out_features
        return works("split", Workload(m, k, outputs, (r,) * len(outputs)))

    def expected(self, rates: Rates) -> float:
        return 40.0 if rates.device_type == "cuda" else 0.1


def skipped(note: str) -> Row:
    return {"kernel": None, "status": "skipped", "note": note}


def parsed(output: str, moved: dict[str, float]) -> list[Row]:
    """The kernels of ncu's raw page as CSV, in base units: the second line has the units."""
    lines = [line for line in output.splitlines() if line.startswith('"')]
    rows: list[Row] = []
    for entry in list(csv.DictReader(io.StringIO("\n".join(lines))))[1:]:
        name = entry["Kernel Name"].split("(")[0]
        if not name.startswith("_"):  # PyTorch's own
            continue
        read, written, nanoseconds = (_number(entry.get(metric)) for metric in _METRICS.split(","))
        tensor = [_number(entry[key]) for key in entry if "pipe_tensor" in key and "pct_of_peak" in key]
        counted = moved.get(PHASES.get(name, ""))
        rows.append(
            {
                "kernel": name,
                "status": "ok",
                "note": "",
                "us": None if nanoseconds is None else nanoseconds / 1e3,
                "read_mib": None if read is None else read / MIB,
                "written_mib": None if written is None else written / MIB,
                "counted_mib": None if counted is None else counted / MIB,
                "tensor_percent": max((value for value in tensor if value is not None), default=None),
            }
        )
    return rows


def _number(text: str | None) -> float | None:
    try:
        return float((text or "").replace(",", ""))
    except ValueError:
        return None


def read_case(text: str) -> OperatorCase:
    """The case that `asdict` and JSON have made a text of."""
    fields = json.loads(text)
    name, in_features, out_features = fields.pop("layers")
    adapter = AdapterCase(**fields.pop("adapter"))
    return OperatorCase(adapter=adapter, layers=Layers(name, in_features, tuple(out_features)), **fields)


def main(argv: Sequence[str]) -> None:
    """One step of a case by "split", behind one that compiles it."""
    case = read_case(argv[0])
    run = prepare(case, "split", make_operands(case, torch.device("cuda")))
    run()
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaProfilerStart()
    run()
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaProfilerStop()


if __name__ == "__main__":
    main(sys.argv[1:])
