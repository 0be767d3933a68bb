"""Which implementation runs an adapter form: the backends, the strategies on them, and the choice among these.

split       Triton: u = x̃ Aᵀ, then one GEMM that adds the low-rank product, scales and bias to its accumulator
fused       Triton: u computed inside that GEMM, one launch
library     PyTorch's GEMM, the low-rank product added with addmm_
recompose   W0 + diag(h) B diag(d) A made once, then PyTorch's GEMM: where that takes fewer FLOPs; fp32 and fp64
"""

from __future__ import annotations

import importlib.util
import os
from typing import NamedTuple

import torch
from torch import Tensor

from .ops import STRATEGIES

BACKENDS = ("auto", "triton", "eager", "reference")

# Finding out does not import it.
HAS_TRITON = importlib.util.find_spec("triton") is not None

# Share of the frozen pass above which the recomposed weight is kept for the backward instead of remade there:
# remaking costs 2·K·N·r FLOPs against 4·M·K·N, so r / (2 M).
_KEEP_RECOMPOSED_ABOVE = 0.1


class Problem(NamedTuple):
    """What the choice of a strategy depends on: a group of linear layers on the same M rows of x.

    trains_A, trains_scale: whether A and base_scale get gradients. backward: whether there will be one.
    """

    rows: int
    in_features: int
    out_features: tuple[int, ...]
    ranks: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    trains_A: bool
    trains_scale: bool
    dropout: bool
    backward: bool


def check_backend(backend: str) -> None:
    """Raises ValueError for a name that is no backend."""
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")


def check_strategy(strategy: str, backend: str) -> None:
    """Raises ValueError for a name that is no strategy, or one that does not run on this backend."""
    if strategy == "auto":
        return
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy must be one of auto, {', '.join(STRATEGIES)}, got {strategy!r}")
    if backend not in ("auto", STRATEGIES[strategy]):
        raise ValueError(
            f'strategy "{strategy}" runs on backend "{STRATEGIES[strategy]}", got backend={backend!r}: leave one of '
            'them "auto"'
        )


def resolve_backend(backend: str, *tensors: Tensor) -> str:
    """The backend that these tensors run on: "triton", "eager" or "reference".

    "auto" takes Triton for 16- and 32-bit tensors on a GPU that it supports, else eager. An explicit choice is never
    replaced: where it cannot run it raises ValueError (unknown name, no Triton, tensors not on a GPU) or TypeError
    (a dtype without a kernel). Under TRITON_INTERPRET=1 an explicit "triton" takes CPU tensors too.
    """
    kind = tensors[0].device.type
    if backend == "auto":
        on_gpu = kind == "cuda" and HAS_TRITON and all(t.dtype != torch.float64 for t in tensors)
        return "triton" if on_gpu else "eager"
    check_backend(backend)
    if backend == "triton":
        if not HAS_TRITON:
            raise ValueError('backend "triton" needs the package triton: pip install "fastadapt[triton]"')
        if kind != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
            raise ValueError(
                f'backend "triton" needs tensors on a GPU, got {kind}: move them, take backend="eager", '
                "or set TRITON_INTERPRET=1 to run the kernels in the interpreter"
            )
        if any(t.dtype == torch.float64 for t in tensors):
            raise TypeError('backend "triton" has no float64 kernels: take backend="eager"')
    return backend


def _refusal(problem: Problem) -> str | None:
    """Why the weight cannot be recomposed, or None where it can."""
    if problem.dtype not in (torch.float32, torch.float64):
        return f"in {problem.dtype} a recomposed weight would round away deltas below its half-ulp"
    if problem.dropout:
        return "under dropout the low-rank path does not read x itself"
    if problem.trains_scale:
        return "the gradient of base_scale needs the base product by itself"
    return None


def keeps_weight(problem: Problem) -> bool:
    """Whether a recomposed weight is kept for the backward: [N, K], where remaking it would cost over a tenth of it."""
    return problem.backward and max(problem.ranks) > 2 * problem.rows * _KEEP_RECOMPOSED_ABOVE


def _recomposing_is_cheaper(problem: Problem) -> bool:
    """Whether W' costs fewer FLOPs than the products that it saves.

    Per 2·r FLOPs it saves M·N (expand) and, in the backward, M·K (q A) and M·N (q, unless dA needs it); it takes K·N,
    twice where the backward makes it again. u and P = dyᵀu are needed either way.
    """
    m, k = problem.rows, problem.in_features
    times = 2 if problem.backward and not keeps_weight(problem) else 1
    gain = 0
    for n, r in zip(problem.out_features, problem.ranks, strict=True):
        saved = m * n + (m * (k + (0 if problem.trains_A else n)) if problem.backward else m * k)
        gain += r * (saved - times * k * n)
    return gain > 0


def choose(problem: Problem, strategy: str, backend: str) -> str:
    """The strategy for a problem on a resolved backend ("triton" or "eager").

    An explicit strategy is returned as it is, or refused with ValueError where it cannot run.
    """
    refusal = _refusal(problem)
    if strategy == "recompose" and refusal is not None:
        raise ValueError(f'strategy "recompose" cannot run here: {refusal}; leave strategy="auto"')
    if strategy != "auto":
        return strategy
    if backend == "triton":
        return "split"
    return "recompose" if refusal is None and _recomposing_is_cheaper(problem) else "library"
