"""The device's own ceilings: a large copy, and large products."""

from __future__ import annotations

import functools
import statistics
from dataclasses import dataclass

import torch

from bench.gpu.job import Desk, Job, Rates
from bench.operators import DTYPES
from bench.report import Row
from fastadapt.operators.adapter_linear.stopwatch import sampled

_DTYPES = {**DTYPES, "fp64": torch.float64}


@dataclass(frozen=True)
class Ceilings(Job):
    """Rows {"name", "rate"}: "bytes" read and written a second in a copy, operations a second in a product by dtype."""

    part = "ceilings"
    copy_bytes: int
    size: int

    @property
    def label(self) -> str:
        return "ceilings"

    def run(self, desk: Desk) -> list[Row]:
        # Of zeros and of ones a device can make more than of data.
        source = torch.randint(-128, 128, (self.copy_bytes,), dtype=torch.int8, device=desk.device)
        target = torch.empty_like(source)
        seconds = 3 * desk.seconds
        desk.at("copy")
        times = sampled({"copy": functools.partial(target.copy_, source)}, desk.device, seconds=seconds)
        rows: list[Row] = [{"name": "bytes", "rate": 2 * self.copy_bytes / statistics.median(times["copy"].seconds)}]
        del source, target
        for name, dtype in _DTYPES.items():
            desk.at(name)
            square = torch.randn(self.size, self.size, device=desk.device).to(dtype)
            times = sampled({name: functools.partial(torch.mm, square, square)}, desk.device, seconds=seconds)
            rows.append({"name": name, "rate": 2.0 * self.size**3 / statistics.median(times[name].seconds)})
        return rows

    def expected(self, rates: Rates) -> float:
        return 2.0 + sum(10 * 2.0 * self.size**3 / rates.flops[name] for name in _DTYPES)
