"""Times of a batch of many LoRA adapters on one layer, beside the pair of kernels that serving engines have."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.gpu.timed import Exact, Timed
from bench.operators import DTYPES, SCALING, Layers, Outputs, Run
from bench.report import Row
from fastadapt import LoRAConfig
from fastadapt.functional import multi_adapter_linear
from fastadapt.reference import AdapterForm, multi_adapter_linear_reference
from fastadapt.serving.loader import LoadedAdapter
from fastadapt.serving.pool import AdapterPool


class Batch(NamedTuple):
    """x [rows, tokens, K], W [N, K], A [adapters, R, K], B [adapters, N, R]; row i goes through adapter i."""

    x: Tensor
    weight: Tensor
    A: Tensor
    B: Tensor

    def to(self, dtype: torch.dtype) -> Batch:
        return Batch(*(tensor.to(dtype) for tensor in self))

    def forms(self) -> list[AdapterForm]:
        return [AdapterForm(A, B, scaling=SCALING) for A, B in zip(self.A, self.B, strict=True)]


@dataclass(frozen=True)
class BatchTimes(Timed):
    """So many adapters of rank R, each with `tokens` tokens in a row of its own."""

    baseline = "linear"

    layer: Layers
    adapters: int
    tokens: int
    R: int
    dtype: str

    @property
    def label(self) -> str:
        return f"time multi_adapter_linear {self.layer.name} {self.columns()['case']} {self.dtype}"

    @property
    def covers(self) -> tuple[str, ...]:
        return ("multi_adapter_linear",)

    def columns(self) -> Row:
        each = f", {self.tokens} tokens each" if self.tokens > 1 else ""
        columns: Row = {"operator": "multi_adapter_linear", "case": f"{self.adapters} adapters{each}"}
        columns |= {"layers": self.layer.name, "M": self.adapters * self.tokens, "K": self.layer.in_features}
        return columns | {"N": str(self.layer.out_features[0]), "r": self.R, "dtype": self.dtype}

    @property
    def amounts(self) -> tuple[float, float]:
        m, k, n = self.adapters * self.tokens, self.layer.in_features, self.layer.out_features[0]
        moved = DTYPES[self.dtype].itemsize * (m * (k + n) + k * n + self.adapters * self.R * (k + n))
        return 2.0 * m * (k * n + self.R * (k + n)), float(moved)

    def providers(self, device_type: str) -> list[str]:
        return ["triton", "punica", "loop", "linear"] if device_type == "cuda" else ["eager", "loop", "linear"]

    def operands(self, device: torch.device, seed: int) -> Batch:
        generator = torch.Generator(device).manual_seed(seed)

        def normal(*shape: int, std: float = 1.0) -> Tensor:
            drawn = torch.randn(shape, generator=generator, device=device, dtype=torch.float32)
            return drawn.mul_(std).to(DTYPES[self.dtype])

        k, n, r = self.layer.in_features, self.layer.out_features[0], self.R
        return Batch(
            normal(self.adapters, self.tokens, k),
            normal(n, k, std=k**-0.5),
            normal(self.adapters, r, k, std=k**-0.5),
            normal(self.adapters, n, r, std=0.5 * r**-0.5),
        )

    def prepare(self, provider: str, operands: Any) -> Run:
        makers: dict[str, Callable[[Batch], Callable[[], Tensor]]] = {
            "punica": _punica,
            "loop": _loop,
            "linear": lambda batch: lambda: F.linear(batch.x, batch.weight),
        }
        make = makers.get(provider) or (lambda batch: _pooled(batch, provider))
        call = make(operands)

        def run() -> Outputs:
            with torch.no_grad():
                return {"y": call()}

        return run

    def standard(self, provider: str, operands: Any) -> tuple[str, Callable[[], Exact]] | None:
        def formula(dtype: torch.dtype) -> Outputs:
            own = operands.to(dtype)
            ids = list(range(self.adapters))
            return {"y": multi_adapter_linear_reference(own.x, own.weight, None, own.forms(), ids)}

        return None if provider == "linear" else ("", lambda: (formula(torch.float64), formula(DTYPES[self.dtype])))


def _pooled(batch: Batch, backend: str) -> Callable[[], Tensor]:
    """Ours: the pool and the batch's tables are made once, as for all layers of a model."""
    n, k = batch.weight.shape
    layer = nn.Linear(k, n, bias=False, device="meta")
    layer.weight = nn.Parameter(batch.weight, requires_grad=False)
    # Whole pages, of the wider side.
    budget = 2 * len(batch.A) * 2 * (batch.A.shape[1] + 8) * max(n, k) * batch.weight.itemsize
    pool = AdapterPool(layer, {"layer": layer}, budget=budget)
    names = [f"adapter {index}" for index in range(len(batch.A))]
    for name, form in zip(names, batch.forms(), strict=True):
        pool.add(name, LoadedAdapter(LoRAConfig(), {"layer": form}, None, identity=name, bytes=0))
    held = contextlib.ExitStack().enter_context(pool.hold(names))
    rows, forms = held.batch(batch.x.shape[1]), pool.layer("layer")
    return lambda: multi_adapter_linear(batch.x, batch.weight, None, rows, forms, backend=backend)


def _punica(batch: Batch) -> Callable[[], Tensor]:
    from bench.gpu.punica import Segments, add_adapters

    adapters, tokens, k = batch.x.shape
    ids = [adapter for adapter in range(adapters) for _ in range(tokens)]
    segments = Segments.of(ids, adapters, batch.x.device)
    rows = batch.x.reshape(-1, k)

    def call() -> Tensor:
        y = F.linear(rows, batch.weight)
        return add_adapters(y, rows, batch.A, batch.B, segments, SCALING).view(adapters, tokens, -1)

    return call


def _loop(batch: Batch) -> Callable[[], Tensor]:
    """One adapter after the other."""

    def call() -> Tensor:
        y = F.linear(batch.x, batch.weight)
        for row, x, A, B in zip(y, batch.x, batch.A, batch.B, strict=True):
            row.add_(F.linear(F.linear(x, A), B), alpha=SCALING)
        return y

    return call
