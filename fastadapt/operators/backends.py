"""The backends: Triton kernels, eager PyTorch, the reference; which of them tensors run on."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from types import ModuleType

import torch
from torch import Tensor

BACKENDS = ("auto", "triton", "eager", "reference")

# Finding out does not import it.
HAS_TRITON = importlib.util.find_spec("triton") is not None


@functools.cache
def kernels(module: str) -> ModuleType:
    """A module of the kernels, which imports Triton."""
    return importlib.import_module(f"fastadapt_kernels.{module}")


def check_backend(backend: str) -> None:
    """Raises ValueError for a name that is no backend."""
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")


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
