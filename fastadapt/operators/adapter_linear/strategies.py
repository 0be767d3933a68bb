"""Which implementation runs an adapter form: the backends, the strategies on them, and the choice among these.

* split: Triton; u = x̃ Aᵀ, then one GEMM that adds the low-rank product, scales and bias to its accumulator
* fused: Triton; u computed inside that GEMM, one launch
* library: PyTorch's GEMM on top of the low-rank product, with addmm_
* recompose: W0 + diag(h) B diag(d) A made once, then PyTorch's GEMM: where that takes fewer FLOPs; fp32 and fp64

"auto" takes what was measured for this problem on this GPU, or else what the cost model expects to be the fastest;
"tune" measures first, where nothing was, and keeps the result on disk (see tuner.py).
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ..backends import resolve_backend
from . import cost
from .devices import DEVICES, device_of
from .workload import Workload

# The kernels' own limit (fastadapt_kernels.configs), which is not imported where there is no Triton.
_MOST_FUSED_RANKS = 64

# Every way to run an adapter form, and the backend that does it.
STRATEGIES = {"split": "triton", "fused": "triton", "library": "eager", "recompose": "eager"}


def check_strategy(strategy: str, backend: str) -> None:
    """Raises ValueError for a name that is no strategy, or one that does not run on this backend."""
    if strategy in ("auto", "tune"):
        return
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy must be one of auto, tune, {', '.join(STRATEGIES)}, got {strategy!r}")
    if backend not in ("auto", STRATEGIES[strategy]):
        raise ValueError(
            f'strategy "{strategy}" runs on backend "{STRATEGIES[strategy]}", got backend={backend!r}: leave one of '
            'them "auto"'
        )


_cached_cheapest = functools.lru_cache(maxsize=4096)(cost.cheapest)


def candidates(workload: Workload, backend: str, x: Tensor, *tensors: Tensor) -> tuple[str, ...]:
    """The strategies that could run a workload on these tensors, on the backend that was asked for.

    Backend "auto" has all of them on a GPU that Triton supports, the eager ones elsewhere. Raises as `resolve_backend`.
    """
    resolved = resolve_backend(backend, x, *tensors)
    everything = backend == "auto" and resolved == "triton"
    names = {name for name, runs_on in STRATEGIES.items() if everything or runs_on == resolved}
    if max(workload.ranks) > _MOST_FUSED_RANKS:
        names.discard("fused")
    if "recompose" in names and cost.cannot_recompose(workload) is not None:
        names.discard("recompose")
    return tuple([name for name in STRATEGIES if name in names])


def check_explicit(strategy: str, workload: Workload, x: Tensor, *tensors: Tensor) -> None:
    """Raises ValueError or TypeError where a strategy that was asked for by name cannot run."""
    resolve_backend(STRATEGIES[strategy], x, *tensors)
    refusal = cost.cannot_recompose(workload) if strategy == "recompose" else None
    if refusal is not None:
        raise ValueError(f'strategy "recompose" cannot run here: {refusal}; leave strategy="auto"')


def cheapest(names: tuple[str, ...], workload: Workload, device: torch.device) -> str:
    """The one of these strategies that the cost model takes to be the fastest."""
    if torch.compiler.is_compiling():  # sizes may be symbols, which no cache can hold
        kernels = STRATEGIES[names[0]] == "triton" and not cost.library_for_now(names, workload)
        return names[0] if kernels else cost.cheapest(names, workload, DEVICES["CPU"])
    return _cached_cheapest(names, workload, device_of(device))
