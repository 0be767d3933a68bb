"""The ground that every test stands on: which device runs the kernels, a cure for bf16 there, and poisoned memory."""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Callable
from functools import wraps
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    # Triton reads this when it is imported: without a GPU its interpreter runs the kernels on CPU tensors.
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Threads that wait for each other make products as small as the tests' twenty times slower on a busy machine.
torch.set_num_threads(int(os.environ.get("FASTADAPT_TEST_THREADS", "1")))

with contextlib.suppress(ImportError):
    # Inductor imports it, and with it its own distutils, which it takes for Python's where a test has come before.
    import setuptools  # noqa: F401

import numpy as np  # noqa: E402
import triton.language as tl  # noqa: E402
from triton.runtime import interpreter  # noqa: E402
from triton.runtime.interpreter import (  # noqa: E402
    GridExecutor,
    InterpretedFunction,
    InterpreterBuilder,
    ReduceScanOpInterface,
    TensorHandle,
)

# bf16 in the interpreter: it keeps bf16 as uint16 and lets numpy compute with the bit patterns, as if they were
# integers (triton issue 11584), and it truncates where a GPU rounds to nearest even. Every operation that can meet a
# bf16 value is therefore wrapped: decode to fp32, compute, round, encode.


def is_bfloat16(value: object) -> bool:
    return isinstance(value, TensorHandle) and value.dtype.scalar == tl.bfloat16


def decode_bfloat16(handle: Any) -> Any:
    """A bf16 handle as the fp32 handle of the same values; any other as it is."""
    if not is_bfloat16(handle):
        return handle
    return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def encode_bfloat16(values: np.ndarray[Any, Any]) -> Any:
    """fp32 values as a bf16 handle, rounded to nearest even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32).reshape(np.shape(values))
    rounded = (bits + (((bits >> 16) & 1) + 0x7FFF)) >> 16
    return TensorHandle(np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16), tl.bfloat16)


def through_float32(operation: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a builder's arithmetic so that bf16 operands enter as fp32 and the result leaves as bf16."""

    @wraps(operation)
    def wrapped(self: Any, *operands: Any) -> Any:
        if not any(map(is_bfloat16, operands)):
            return operation(self, *operands)
        result = operation(self, *map(decode_bfloat16, operands))
        if result.data.dtype == np.bool_:
            # A comparison: the interpreter labels its result with the type of the operands.
            return TensorHandle(result.data, tl.bfloat16)
        return encode_bfloat16(result.data)

    return wrapped


def dot_through_float32(create_dot: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap create_dot: the operands enter as fp32, the result keeps the accumulator's type."""

    @wraps(create_dot)
    def wrapped(self: Any, a: Any, b: Any, acc: Any, *options: Any) -> Any:
        result = create_dot(self, decode_bfloat16(a), decode_bfloat16(b), decode_bfloat16(acc), *options)
        return encode_bfloat16(result.data) if is_bfloat16(acc) else result

    return wrapped


def cast_with_rounding(cast: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a cast: from bf16 by way of fp32, to bf16 by way of fp32 with rounding to nearest even."""

    @wraps(cast)
    def wrapped(self: Any, source: Any, target_type: Any, *rounding: Any) -> Any:
        if is_bfloat16(source):
            source = decode_bfloat16(source)
            if target_type.scalar == tl.float32:
                return source
        if target_type.scalar == tl.bfloat16:
            return encode_bfloat16(source.data.astype(np.float32))
        return cast(self, source, target_type, *rounding)

    return wrapped


def refuse_bfloat16(apply: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap reductions and scans: a kernel has no reason to run one in bf16, and the interpreter would do it wrongly."""

    @wraps(apply)
    def wrapped(self: Any, inputs: Any) -> Any:
        tensors = inputs if isinstance(inputs, tuple) else (inputs,)
        if any(is_bfloat16(tensor.handle) for tensor in tensors):
            raise TypeError("reduce in float32: a bfloat16 reduction is wrong in the interpreter and inexact on a GPU")
        return apply(self, inputs)

    return wrapped


def cure_bfloat16() -> None:
    for name in ("binary_op", "unary_op", "ternary_op", "create_fma", "create_rsqrt"):
        setattr(InterpreterBuilder, name, through_float32(getattr(InterpreterBuilder, name)))
    InterpreterBuilder.create_dot = dot_through_float32(InterpreterBuilder.create_dot)
    for name in ("cast_impl", "create_fp_to_fp"):
        setattr(InterpreterBuilder, name, cast_with_rounding(getattr(InterpreterBuilder, name)))
    ReduceScanOpInterface.apply = refuse_bfloat16(ReduceScanOpInterface.apply)
    # Triton before 3.5 has no constants in bf16.
    InterpreterBuilder.get_bf16 = lambda self, value: encode_bfloat16(np.array([value], dtype=np.float32))


cure_bfloat16()


def patch_language_once() -> None:
    """Patch triton.language for the interpreter once a kernel, not at every call of a device function inside it.

    The patching takes a third of the interpreter's time and changes nothing after its first call for a module.
    """
    patched: set[tuple[int, ...]] = set()
    run_grid, call_function = GridExecutor.__call__, InterpretedFunction.__call__

    @wraps(run_grid)
    def run_grid_afresh(self: Any, *args: Any, **kwargs: Any) -> Any:
        patched.clear()
        return run_grid(self, *args, **kwargs)

    @wraps(call_function)
    def call_without_patching(self: Any, *args: Any, **kwargs: Any) -> Any:
        languages = tuple(id(value) for value in self.fn.__globals__.values() if value is tl or value is tl.core)
        if languages not in patched:
            interpreter._patch_lang(self.fn)
            patched.add(languages)
        return self.rewrite()(*args, **kwargs)

    GridExecutor.__call__ = run_grid_afresh
    InterpretedFunction.__call__ = call_without_patching


patch_language_once()


# torch remembers its constructors when `torch.device` is first entered: it must not be the poisoned ones.
with torch.device("cpu"):
    torch.empty(0)


def fill_with_nan(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @wraps(allocate)
    def wrapped(*args: Any, **kwargs: Any) -> torch.Tensor:
        tensor = allocate(*args, **kwargs)
        if tensor.is_floating_point():
            with torch.no_grad():
                tensor.fill_(float("nan"))
        return tensor

    return wrapped


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uninitialised floating-point memory holds NaN: what a kernel forgets to write, or reads too early, shows."""
    monkeypatch.setattr(torch, "empty", fill_with_nan(torch.empty))
    monkeypatch.setattr(torch, "empty_like", fill_with_nan(torch.empty_like))
    monkeypatch.setattr(torch, "empty_strided", fill_with_nan(torch.empty_strided))
    monkeypatch.setattr(torch.Tensor, "new_empty", fill_with_nan(torch.Tensor.new_empty))


@pytest.fixture
def shuffled_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter runs the programs of every grid in a random order, from here to the end of the test.

    The order is an illusion kept up by the indices: the loop counts as ever, and each step is told a shuffled index.
    """
    if not interpreter_runs():
        pytest.skip("a GPU orders its programs itself")
    generator = random.Random(0)
    builder = interpreter.interpreter_builder
    order: dict[tuple[int, int, int], tuple[int, int, int]] = {}
    set_grid_dim, set_grid_idx = builder.set_grid_dim, builder.set_grid_idx

    def set_shuffled_dim(nx: int, ny: int, nz: int) -> None:
        set_grid_dim(nx, ny, nz)
        indices = [(x, y, z) for x in range(nx) for y in range(ny) for z in range(nz)]
        order.clear()
        order.update(zip(indices, generator.sample(indices, len(indices)), strict=True))

    monkeypatch.setattr(builder, "set_grid_dim", set_shuffled_dim)
    monkeypatch.setattr(builder, "set_grid_idx", lambda x, y, z: set_grid_idx(*order[x, y, z]))


def interpreter_runs() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"
