"""The bytes that the kernels move, operand by operand, beside the least that they could and a model of the field.

Counted in Triton's interpreter, by address and under the mask, at two small shapes: what part of each operand a launch
touches. It must come out the same at both, and then holds at every shape. The launches of the full shape are recorded
on meta tensors with the tiles that configs.py picks for the GPU, so that sizes, partial buffers and launches are the
real ones. Values do not matter here: the count runs in fp16, which has bf16's size and which the interpreter knows.

* mib: compulsory bytes, forward and backward. An operand counts once in each launch that touches it; tensors that
  live only within a pass (partial sums, q) are apart in partials_mib. For DoRA norm_mib of it are for the row norm.
* minimum_mib: every tensor once a pass. split_target_mib: what the design costs, x twice and dy twice.
* reread_mib: what the GEMMs read again because it has left L2 (bench/l2.py), in the order that the kernels have, and in
  row-major order. The other launches stream their large operand once; their small ones stay in L2.

Batches of many adapters, whose names begin with "many", are counted behind the library's base product, K = N:

* factors_mib: of A and B, in both launches; factors_minimum_mib: the true ranks of the factor groups that are in the
  batch, once; factors_padded_mib: the same padded to the largest rank.
* mib: x, y, factors and vectors; minimum_mib: those once, y twice, of the tokens that have an adapter alone. Left out:
  u and its partial sums, which live within the call, and the tables, which are a few bytes a token.

Layers whose weights are scaled by themselves, whose names begin with "hadamard", M tokens through K = N:

* forward_mib, dx_mib, grads_mib and their minimum: every tensor of that pass once. partials_mib: of dU and dV.
* weight_writes_mib: written to anything of W0's size, which is what these kernels are there to avoid.

Bottlenecks, whose names begin with "bottleneck", forward and backward: mib and minimum_mib as above; split_target_mib
has v and dy twice in the backward pass, whose sums over tokens are launches of their own.

Experts, whose names begin with "experts", forward and backward of one linear layer of theirs, M tokens at several
experts each: mib and minimum_mib as above, norm_mib apart; split_target_mib has x twice in the forward pass, and in the
backward dy three times.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple
from unittest import mock

import numpy as np
import torch
import typer
from torch import Tensor

from bench import coverage, l2, page, report
from bench.peers import PEERS, moved_mib
from bench.plots import Document
from fastadapt.commands.report import write_json
from fastadapt.operators.adapter_linear.cost import works
from fastadapt.operators.adapter_linear.devices import DEVICES
from fastadapt.operators.adapter_linear.workload import Workload

MIB = 2**20

# Shared memory in bytes that one block may take, by device of the cost model: configs.py chooses tiles by it.
SHARED_MEMORY = {
    "A100-SXM4-80GB": 166_912,
    "H100-SXM": 232_448,
    "H200-SXM": 232_448,
    "B200": 232_448,
    "MI300X": 65_536,
}

# Tokens, K and the width of the narrowest output, for the two counts: small, odd, with several tiles each way. The
# narrowest output has two of the interpreter's tiles, as k and v have two of a GPU's in the pass over dy.
_SMALL = ((40, 72, 128), (50, 104, 118))
_DROPOUT = 0.1
# Operands that one launch makes for another, and no part of a split sum: they live within a pass, and count.
_PASSED_ON = {"scaled_dys": "scaled_dy", "scaled": "scaled_dy", "kept": "mask"}
# Widths of the square layer for the two counts of a batch of many adapters.
_NARROW = (72, 104)


class TrafficCase(NamedTuple):
    """Layers of one width that read the same x, adapted alike; separate runs them as layers by themselves."""

    method: str
    outputs: tuple[int, ...] = (4096,)
    dropout: bool = False
    separate: bool = False
    K: int = 4096

    def workload(self, tokens: int) -> Workload:
        """The case as the cost model sees it."""
        dora, vera = self.method == "dora", self.method == "vera"
        return Workload(
            tokens,
            self.K,
            self.outputs,
            (256 if vera else 16,) * len(self.outputs),
            dtype="float16",
            shared_A=vera,
            base_scale=dora,
            trains_base=dora,
            trains_A=not vera,
            dropout=self.dropout,
            dropout_on_base=dora,
        )


# Llama 8B: q, k, v and gate, up.
_QKV, _GATE_UP = (4096, 1024, 1024), (14336, 14336)
CASES = {
    "lora": TrafficCase("lora"),
    "lora_dropout": TrafficCase("lora", dropout=True),
    "dora": TrafficCase("dora"),
    "dora_dropout": TrafficCase("dora", dropout=True),
    "vera": TrafficCase("vera"),
    "vera_dropout": TrafficCase("vera", dropout=True),
    "lora_qkv_group": TrafficCase("lora", _QKV),
    "lora_qkv_separate": TrafficCase("lora", _QKV, separate=True),
    "lora_dropout_qkv_group": TrafficCase("lora", _QKV, dropout=True),
    "dora_qkv_group": TrafficCase("dora", _QKV),
    "vera_qkv_group": TrafficCase("vera", _QKV),
    "lora_gate_up_group": TrafficCase("lora", _GATE_UP),
}


class Adapter(NamedTuple):
    """An adapter of rank R with its vectors, as the audit names them; those of one pair share its factors."""

    R: int
    vectors: str = ""
    pair: int | None = None


class BatchCase(NamedTuple):
    """Rows of tokens, each through the adapter that `ids` has for it, -1 for none."""

    adapters: tuple[Adapter, ...]
    ids: tuple[int, ...]
    tokens: int = 1

    @property
    def groups(self) -> list[int]:
        """The factor group of each adapter."""
        pairs = len(self.adapters)
        return [slot if own.pair is None else pairs + own.pair for slot, own in enumerate(self.adapters)]


_RANKS = (1, 4, 5, 8, 64, 256)
_LORAS = tuple(Adapter(R) for R in _RANKS)
_MIXED = (Adapter(8), Adapter(16, "hg"), *(Adapter(64, "dh", pair=0) for _ in range(4)), Adapter(256), Adapter(0, "b"))
BATCHES = {
    "many_ranks_decode": BatchCase(_LORAS, (*range(6), -1, -1)),
    "many_ranks_prefill": BatchCase(_LORAS, (2, 4, 3, -1), tokens=17),
    "many_small_decode": BatchCase(_LORAS, (0, 1, 2, 3, 3, 2, -1, 0)),
    "many_methods_decode": BatchCase(_MIXED, (*range(8), 3, -1)),
    "many_base_decode": BatchCase(_LORAS, (-1,) * 8),
}


class BottleneckCase(NamedTuple):
    """A bottleneck of H features with biases on a stream of width K, its parameters in fp32."""

    H: int
    groups: int = 1
    on_itself: bool = False  # v is the residual too
    dropout: bool = True
    K: int = 768


BOTTLENECKS = {
    "bottleneck_adaptformer": BottleneckCase(64),
    "bottleneck_noah": BottleneckCase(50, on_itself=True, dropout=False),
    "bottleneck_repadapter": BottleneckCase(8, groups=2, on_itself=True),
}


class Placed(NamedTuple):
    """Tokens that each go to `top` of as many experts as `experts` says, through one linear layer of theirs."""

    dora: bool = False
    experts: int = 128
    top: int = 8
    K: int = 2048
    N: int = 1536
    R: int = 16


# Qwen3's mixture of experts: the product of gate and up.
EXPERTS = {"experts_lora": Placed(), "experts_dora": Placed(dora=True)}

# Ranks of U V.
HADAMARD = {"hadamard_8": 8, "hadamard_32": 32}

# The cases of each operator of the registry; DoRA's have the row norm.
COVERS: dict[str, Mapping[str, Any]] = {
    "adapter_linear": CASES,
    "adapter_linear_backward": CASES,
    "weight_norm": CASES,
    "multi_adapter_linear": BATCHES,
    "multi_adapter_update": BATCHES,  # the same launches, behind a product of its own
    "bottleneck": BOTTLENECKS,
    "bottleneck_backward": BOTTLENECKS,
    "hadamard_linear": HADAMARD,
    "hadamard_linear_backward": HADAMARD,
    "expert_linear": EXPERTS,
    "expert_linear_backward": EXPERTS,
}
_NAMES = list(dict.fromkeys([name for cases in COVERS.values() for name in cases]))


@dataclass
class Count:
    """Bytes of one operand in one launch: under the mask, and the distinct ones among them."""

    size: int
    read: int = 0
    written: int = 0
    first_read: int = 0
    first_written: int = 0


def tensors_of(arguments: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of every operand; members of a tuple are named by index, and a tensor is named once."""
    seen = set()
    for name, value in arguments.items():
        for index, tensor in enumerate(value if isinstance(value, tuple) else (value,)):
            if isinstance(tensor, Tensor) and storage(tensor) not in seen:
                seen.add(storage(tensor))
                yield (f"{name}[{index}]" if isinstance(value, tuple) else name), tensor


def storage(tensor: Tensor) -> int:
    """The identity of a tensor's memory, also where it has none (meta), as long as the tensor lives."""
    return int(tensor.untyped_storage()._cdata)


class Counted(NamedTuple):
    """One launch in the interpreter."""

    kernel: str
    operands: dict[str, Count]


class _Watch:
    """The distinct elements of one operand's storage that a launch touches."""

    def __init__(self, count: Count, tensor: Tensor) -> None:
        memory = tensor.untyped_storage()
        self.count, self.itemsize = count, tensor.itemsize
        self.start, self.end = memory.data_ptr(), memory.data_ptr() + memory.nbytes()
        self.read = np.zeros(memory.nbytes() // tensor.itemsize, dtype=bool)
        self.written = np.zeros_like(self.read)

    def add(self, addresses: np.ndarray[Any, Any], *, store: bool) -> None:
        (self.written if store else self.read)[(addresses - self.start) // self.itemsize] = True
        moved = addresses.size * self.itemsize
        if store:
            self.count.written += moved
        else:
            self.count.read += moved

    def close(self) -> None:
        self.count.first_read = int(self.read.sum()) * self.itemsize
        self.count.first_written = int(self.written.sum()) * self.itemsize


@contextmanager
def metered() -> Iterator[list[Counted]]:
    """Inside, every launch in the interpreter is counted."""
    from fastadapt_kernels import configs
    from triton.runtime.interpreter import InterpreterBuilder

    launches: list[Counted] = []
    watches: list[_Watch] = []
    launch, load, store = configs.launch, InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def add(pointers: Any, mask: Any, *, is_store: bool) -> None:
        addresses = np.atleast_1d(pointers.data)[np.atleast_1d(mask.data)].astype(np.int64)
        # One access may choose among several operands, lane by lane.
        for watch in watches:
            inside = (addresses >= watch.start) & (addresses < watch.end)
            if inside.any():
                watch.add(addresses[inside], store=is_store)

    def counted_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        add(pointers, mask, is_store=False)
        return load(self, pointers, mask, *rest)

    def counted_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        add(pointers, mask, is_store=True)
        return store(self, pointers, value, mask, *rest)

    def counted_launch(kernel: Any, grid: Any, arguments: Mapping[str, Any], config: Any) -> None:
        operands = {}
        for name, tensor in tensors_of(arguments):
            operands[name] = Count(tensor.numel() * tensor.itemsize)
            watches.append(_Watch(operands[name], tensor))
        launches.append(Counted(kernel.fn.__name__, operands))
        try:
            launch(kernel, grid, arguments, config)
        finally:
            for watch in watches:
                watch.close()
            watches.clear()

    with (
        mock.patch.object(configs, "launch", counted_launch),
        mock.patch.object(InterpreterBuilder, "create_masked_load", counted_load),
        mock.patch.object(InterpreterBuilder, "create_masked_store", counted_store),
    ):
        yield launches


@contextmanager
def recorded(shared_memory: int) -> Iterator[list[Any]]:
    """Inside, launches on meta tensors choose the tiles of a GPU with this shared memory, and are recorded."""
    import triton
    from fastadapt_kernels import configs

    with triton.knobs.runtime.scope():
        triton.knobs.runtime.interpret = False
        with configs.recorded_launches(shared_memory) as launches:
            yield launches


class Passes(NamedTuple):
    """Where each phase of a layer or group begins in the list of launches, and what its tensors are."""

    phases: list[tuple[str, int]]
    roles: dict[int, str]
    kept: list[Tensor]

    def known(self, role: str, *tensors: Tensor | None) -> None:
        """Gives the tensors a role, and keeps them: their memory is what the role belongs to."""
        for tensor in tensors:
            if tensor is not None:
                self.roles.setdefault(storage(tensor), role)
                self.kept.append(tensor)


# Runs the launchers on a device; each call adds to the launches.
Run = Callable[[str, list[Any]], Passes]


def run_bottleneck(case: BottleneckCase, tokens: int, K: int, device: str, launches: list[Any]) -> Passes:
    """Call the launchers for one forward and one backward pass of a bottleneck; each call adds to `launches`."""
    from fastadapt_kernels.bottleneck import BottleneckLayer, Wants, bottleneck, bottleneck_backward

    passes = Passes([("forward", len(launches))], {}, [])

    def new(role: str, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        tensor = torch.zeros(shape, dtype=dtype, device=device)
        passes.known(role, tensor)
        return tensor

    v = new("v", tokens, K, dtype=torch.float16)
    residual = v if case.on_itself else new("residual", tokens, K, dtype=torch.float16)
    dy = new("dy", tokens, K, dtype=torch.float16)
    down, up = new("down", case.H, K), new("up", K, case.H // case.groups)
    down_bias, up_bias = new("vector", case.H), new("vector", K)
    seed = new("seed", 1, dtype=torch.int64) if case.dropout else None
    layer = BottleneckLayer(down, up, down_bias, up_bias, 0.5, "gelu", case.groups)
    p = _DROPOUT if case.dropout else 0.0
    passes.known("out", bottleneck(v, layer, residual, seed, p))
    passes.phases.append(("backward", len(launches)))
    dv, *grads = bottleneck_backward(dy, v, layer, seed, p, case.on_itself, Wants())
    passes.known("dv", dv)
    passes.known("gradient", *grads)
    return passes


def run_passes(w: Workload, device: str, launches: list[Any]) -> Passes:
    """Call the launchers for one forward and one backward pass; each call adds to `launches`."""
    from fastadapt_kernels.adapter_linear import Member, adapter_linear, adapter_linear_backward
    from fastadapt_kernels.weight_norm import weight_norm

    passes = Passes([("norm", len(launches))], {}, [])
    known, phases = passes.known, passes.phases

    def new(role: str, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        tensor = torch.zeros(shape, dtype=dtype, device=device)
        known(role, tensor)
        return tensor

    half = getattr(torch, w.dtype)
    x = new("x", w.M, w.K, dtype=half)
    dys = [new("dy", w.M, n, dtype=half) for n in w.outputs]
    seed = new("seed", 1, dtype=torch.int64) if w.dropout else None
    shared = new("A", w.ranks[0], w.K) if w.shared_A else None
    vera = not w.trains_A
    members = [
        Member(
            weight=new("weight", n, w.K, dtype=half),
            A=new("A", r, w.K) if shared is None else shared,
            B=new("B", n, r),
            mid_scale=new("vector", r) if vera else None,
            out_scale=new("vector", n) if vera or w.base_scale else None,
            scaling=1.0,
            base_scale=new("vector", n) if w.base_scale else None,
            bias=None,
            dropout_on_base=w.dropout_on_base,
        )
        for n, r in zip(w.outputs, w.ranks, strict=True)
    ]
    if w.base_scale:
        for member in members:
            squares = new("vector", member.weight.shape[0])
            known("norm", *weight_norm(member.weight, member.A, member.B, member.scaling, squares))
    phases.append(("forward", len(launches)))
    drop: dict[str, Any] = {"seed": seed, "p": _DROPOUT if w.dropout else 0.0, "shared_A": w.shared_A}
    ys, u, zs = adapter_linear(x, members, keep_base=w.trains_base, **drop)
    known("y", *ys)
    known("u", u)
    known("z", *zs)
    phases.append(("backward", len(launches)))
    grads = adapter_linear_backward(dys, members, x=x if w.trains_A else None, u=u, zs=zs, **drop)
    known("dx", grads.dx)
    known("gradient", *(grads.dA or ()), *(grads.P or ()), *grads.dbase)
    return passes


class Touched(NamedTuple):
    """One operand of one launch at the full shape, in bytes."""

    phase: str
    kernel: str
    operand: str
    role: str
    shape: tuple[int, ...]
    read: float
    written: float


# Kernel -> for each of its launches in turn: operand -> the parts of it that are read and written.
Parts = dict[str, list[dict[str, tuple[float, float]]]]


def small_runs(case: TrafficCase) -> list[Run]:
    """The passes of a case at the shapes at which they are counted."""
    workloads = []
    for tokens, K, width in _SMALL:
        w = case.workload(tokens)
        workloads.append(w._replace(K=K, outputs=tuple(n // min(w.outputs) * width for n in w.outputs)))
    return [functools.partial(run_passes, w) for w in workloads]


def counted_parts(runs: Sequence[Run]) -> Parts:
    """The part of each operand that each kernel reads and writes: counted at two shapes, the same at both."""
    found: list[Parts] = []
    for run in runs:
        with metered() as launches:
            run("cpu", launches)
        parts: Parts = {}
        for launch in launches:
            touched = {name: (c.first_read / c.size, c.first_written / c.size) for name, c in launch.operands.items()}
            parts.setdefault(launch.kernel, []).append(touched)
        found.append(parts)
    first, second = found
    if first != second:
        raise RuntimeError(f"the parts that the launches touch depend on the shape:\n{first}\n{second}")
    return first


def gemm_of(launch: Any) -> l2.Gemm | None:
    """The product that a recorded launch computes, or None where its large operands stream by once."""
    a, config = launch.arguments, launch.config
    tiles = {"block_m": config.get("BLOCK_M"), "block_n": config.get("BLOCK_N"), "group_m": config.get("GROUP_M")}
    name = launch.kernel.fn.__name__
    if name == "_adapter_linear_kernel":
        return l2.Gemm(a["M"], a["Ns"], a["K"], **tiles, outputs=1 if a["zs"] is None else 2)
    if name == "_adapter_linear_dx_kernel":
        return l2.Gemm(a["M"], (a["K"],), sum(a["Ns"]), **tiles)
    return None


class Traffic(NamedTuple):
    """What a case moves at the full shape."""

    touched: list[Touched]
    launches: dict[str, int]
    gemms: list[l2.Gemm]


def measure(small: Sequence[Run], full: Run, shared_memory: int) -> Traffic:
    """The traffic of one group: parts from the interpreter, sizes from the launches of the full shape."""
    parts = counted_parts(small)
    with recorded(shared_memory) as launches:
        passes = full("meta", launches)
    for launch in launches:
        for name, tensor in tensors_of(launch.arguments):
            if name.split("[")[0] in _PASSED_ON:
                passes.known(_PASSED_ON[name.split("[")[0]], tensor)
    turns = {kernel: iter(launched) for kernel, launched in parts.items()}
    touched, counts = [], {name: 0 for name, _ in passes.phases}
    for index, launch in enumerate(launches):
        kernel = launch.kernel.fn.__name__
        # The small shapes may add up partial sums that the full one does not have, but miss none of its launches.
        part = next(turns[kernel])
        phase = next(name for name, start in reversed(passes.phases) if index >= start)
        counts[phase] += 1
        for name, tensor in tensors_of(launch.arguments):
            size = tensor.numel() * tensor.itemsize
            read, written = part[name]
            role = passes.roles.get(storage(tensor), "scratch")
            touched.append(Touched(phase, kernel, name, role, tuple(tensor.shape), read * size, written * size))
    return Traffic(touched, counts, [gemm for gemm in map(gemm_of, launches) if gemm is not None])


def count_batch(case: BatchCase, width: int) -> dict[str, int]:
    """Distinct bytes that the launches of a batch touch, by operand, on a layer of this width in 16 bit."""
    from fastadapt_kernels.multi_adapter import multi_adapter_linear

    from fastadapt.operators.multi_adapter_linear.batch import PAGE_RANKS, AdapterBatch, FormTables

    groups, most = case.groups, max(own.R for own in case.adapters)
    ranks = [0] * (1 + max(groups))
    for group, own in zip(groups, case.adapters, strict=True):
        ranks[group] = own.R
    pages_each = -(-most // PAGE_RANKS)
    # Room for A's pages of every group, then for B's.
    first = torch.arange(2 * len(ranks) * pages_each).view(2, len(ranks), pages_each) * PAGE_RANKS * width
    pages = torch.zeros(first.numel() * PAGE_RANKS * width, dtype=torch.float16)
    strides = torch.full((len(ranks),), width, dtype=torch.int32)

    def starts(kind: int, vector: str) -> Tensor | None:
        has = [vector in own.vectors for own in case.adapters]
        places = [(4 * slot + kind) * max(width, most) if own else -1 for slot, own in enumerate(has)]
        return torch.tensor(places, dtype=torch.int64) if any(has) else None

    tables = FormTables(
        pages,
        torch.zeros(4 * len(groups) * max(width, most)),
        torch.tensor(ranks, dtype=torch.int32),
        first[0],
        first[1],
        strides,
        strides,
        torch.ones(len(groups)),
        *(starts(kind, vector) for kind, vector in enumerate("dhgb")),
    )
    batch = AdapterBatch(case.ids, case.tokens, [groups[slot] if slot >= 0 else -1 for slot in case.ids])
    x = torch.zeros(len(batch), width, dtype=torch.float16)
    weight = torch.zeros(width, width, dtype=torch.float16)
    with metered() as launches:
        multi_adapter_linear(x, [weight], [None], [tables], batch.sorted(x.device), most)
    found = dict.fromkeys(("pages", "vectors", "x", "y"), 0)
    for launch in launches:
        for operand, count in launch.operands.items():
            name = operand.removesuffix("[0]")  # of the only layer
            if name in found:
                found[name] += count.first_read + count.first_written
    return found


def batch_row(name: str, case: BatchCase, width: int = 4096) -> report.Row:
    """The row of a batch: counted at two widths, of which all but mid scales are a multiple, and told for `width`."""
    small, large = (count_batch(case, narrow) for narrow in _NARROW)
    of_width = {key: (large[key] - small[key]) / (_NARROW[1] - _NARROW[0]) for key in small}
    moved = {key: small[key] + (width - _NARROW[0]) * each for key, each in of_width.items()}
    present = sorted({slot for slot in case.ids if slot >= 0})
    held = {case.groups[slot]: case.adapters[slot].R for slot in present}
    adapted = [case.adapters[slot] for slot in case.ids if slot >= 0]
    factor_bytes = 2 * 2 * width
    least = {
        "pages": sum(held.values()) * factor_bytes,
        "vectors": sum(
            4 * (case.adapters[slot].R if vector == "d" else width)
            for slot in present
            for vector in case.adapters[slot].vectors
        ),
        "x": sum(own.R > 0 for own in adapted) * case.tokens * 2 * width,
        "y": 2 * sum(own.R > 0 or bool(set("gb") & set(own.vectors)) for own in adapted) * case.tokens * 2 * width,
    }
    return {
        "case": name,
        "factors_mib": moved["pages"] / MIB,
        "factors_minimum_mib": least["pages"] / MIB,
        "factors_padded_mib": len(held) * max(own.R for own in case.adapters) * factor_bytes / MIB,
        "mib": sum(moved.values()) / MIB,
        "minimum_mib": sum(least.values()) / MIB,
        "M": len(case.ids) * case.tokens,
        "K": width,
        "rows": len(case.ids),
        "adapters": len(present),
        "ranks": " ".join(str(R) for R in held.values()),
    }


def run_hadamard(M: int, K: int, N: int, Q: int, device: str, launches: list[Any]) -> Passes:
    """Call the launchers of W0 ⊙ (1 + U V): forward, then dx, then the gradients of the factors."""
    from fastadapt_kernels.hadamard_linear import HadamardLayer, Wants, hadamard_linear, hadamard_linear_backward

    shapes = {"x": (M, K), "dy": (M, N), "weight": (N, K)}
    tensors = {name: torch.zeros(shape, dtype=torch.float16, device=device) for name, shape in shapes.items()}
    tensors |= {"U": torch.zeros(N, Q, device=device), "V": torch.zeros(Q, K, device=device)}
    x, dy, layer = tensors["x"], tensors["dy"], HadamardLayer(tensors["weight"], tensors["U"], tensors["V"])
    phases = [("forward", len(launches))]
    tensors["y"], _ = hadamard_linear(x, layer)
    phases.append(("dx", len(launches)))
    dx = hadamard_linear_backward(dy, layer, None, None, Wants(factors=False)).dx
    phases.append(("grads", len(launches)))
    grads = hadamard_linear_backward(dy, layer, x, None, Wants(x=False))
    made = {"dx": dx, "dU": grads.dU, "dV": grads.dV}
    tensors |= {name: tensor for name, tensor in made.items() if tensor is not None}
    return Passes(phases, {storage(tensor): name for name, tensor in tensors.items()}, list(tensors.values()))


def hadamard_row(name: str, Q: int, tokens: int, device: str, width: int = 4096) -> report.Row:
    """The row of a layer whose weights are scaled by themselves."""
    smalls = [partial(run_hadamard, small, K, N, Q) for small, K, N in _SMALL]
    traffic = measure(smalls, partial(run_hadamard, tokens, width, width, Q), SHARED_MEMORY[device])
    factors = 4 * 2 * width * Q
    activation, weight = 2 * tokens * width, 2 * width * width
    least = {
        "forward": 2 * activation + weight + factors,
        "dx": 2 * activation + weight + factors,
        "grads": 2 * activation + weight + 2 * factors,
    }
    row: report.Row = {"case": name}
    for phase, minimum in least.items():
        moved = [o.read + o.written for o in traffic.touched if o.phase == phase and o.role != "scratch"]
        row |= {f"{phase}_mib": sum(moved) / MIB, f"{phase}_minimum_mib": minimum / MIB}
        row[f"launches_{phase}"] = traffic.launches[phase]
    scratch = sum(o.read + o.written for o in traffic.touched if o.role == "scratch")
    whole = sum(o.written for o in traffic.touched if o.shape[-2:] == (width, width))
    row |= {"partials_mib": scratch / MIB, "weight_writes_mib": whole / MIB}
    return row | {"device": device, "M": tokens, "K": width, "r": Q}


def minimum_bytes(w: Workload) -> float:
    """Every tensor once a pass: what no design can avoid."""
    split = works("split", w)
    # The target's launches, less what two of them share: x in the forward pass, dy and z's neighbours in the backward.
    return sum(work.bytes for work in split) - 2 * w.M * (w.K + sum(w.outputs))


def row_of(name: str, case: TrafficCase, tokens: int, device: str) -> tuple[report.Row, list[Touched]]:
    """The row of a case, and its operands."""
    alone = [case._replace(outputs=(n,)) for n in case.outputs] if case.separate else [case]
    groups = [
        measure(small_runs(group), functools.partial(run_passes, group.workload(tokens)), SHARED_MEMORY[device])
        for group in alone
    ]
    # Autograd adds the dx of layers by themselves pair by pair.
    sums = len(groups) - 1
    touched = [operand for group in groups for operand in group.touched]
    w = case.workload(tokens)

    def mib(*, scratch: bool, phase: str = "") -> float:
        chosen = (o for o in touched if (o.role == "scratch") is scratch and phase in ("", o.phase))
        return sum(o.read + o.written for o in chosen) / MIB

    gemms = [gemm for group in groups for gemm in group.gemms]
    known = DEVICES[device]
    row_major = [gemm._replace(group_m=1) for gemm in gemms]
    large = sorted({o.role for o in touched if tokens in o.shape and {w.K, *w.outputs} & set(o.shape)})
    row = {
        "case": name,
        "mib": mib(scratch=False) + sums * 3 * 2 * tokens * case.K / MIB,
        "minimum_mib": minimum_bytes(w) / MIB,
        "split_target_mib": sum(work.bytes for work in works("split", w)) / MIB,
        "norm_mib": mib(scratch=False, phase="norm"),
        "partials_mib": mib(scratch=True),
        "reread_mib": sum(l2.reread_bytes(gemm, known) for gemm in gemms) / MIB,
        "reread_row_major_mib": sum(l2.reread_bytes(gemm, known) for gemm in row_major) / MIB,
        "launches_norm": sum(group.launches["norm"] for group in groups),
        "launches_forward": sum(group.launches["forward"] for group in groups),
        "launches_backward": sum(group.launches["backward"] for group in groups) + sums,
        "large_tensors": " ".join(large),
        "device": device,
        "M": tokens,
        "K": case.K,
        "outputs": " ".join(map(str, case.outputs)),
        "r": w.ranks[0],
    }
    return row | {f"{peer}_mib": moved_mib(passes(w)) for peer, passes in PEERS.items()}, touched


def bottleneck_row(name: str, case: BottleneckCase, tokens: int, device: str) -> tuple[report.Row, list[Touched]]:
    """The row of a bottleneck, and its operands."""
    small = [functools.partial(run_bottleneck, case, M, K) for M, K, _ in _SMALL]
    found = measure(small, functools.partial(run_bottleneck, case, tokens, case.K), SHARED_MEMORY[device])
    moved = {
        scratch: sum(o.read + o.written for o in found.touched if (o.role == "scratch") is scratch) / MIB
        for scratch in (False, True)
    }
    large = sorted({o.role for o in found.touched if o.shape == (tokens, case.K)})
    # Factors and biases, in fp32, are read in both passes, and their gradients written.
    parameters = 3 * 4 * (case.H * case.K + case.K * case.H // case.groups + case.H + case.K)
    stream = 2 * tokens * case.K
    # v, out and any other residual; v, dy and dv.
    minimum = stream * (5 if case.on_itself else 6) + parameters
    return {
        "case": name,
        "mib": moved[False],
        "minimum_mib": minimum / MIB,
        "split_target_mib": (minimum + 2 * stream) / MIB,
        "partials_mib": moved[True],
        "launches_forward": found.launches["forward"],
        "launches_backward": found.launches["backward"],
        "large_tensors": " ".join(large),
        "device": device,
        "M": tokens,
        "K": case.K,
        "r": case.H,
    }, found.touched


def run_experts(case: Placed, S: int, E: int, K: int, N: int, device: str, launches: list[Any]) -> Passes:
    """Call the launchers for one forward and one backward pass of S rows on E experts; each adds to `launches`."""
    from fastadapt_kernels.expert_linear import base_products, expert_linear, expert_linear_backward

    from fastadapt.operators.expert_linear.parameters import Experts, Keep, Saved, Wants

    passes = Passes([("norm", len(launches))], {}, [])

    def new(role: str, *shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
        tensor = torch.zeros(shape, dtype=dtype, device=device)
        passes.known(role, tensor)
        return tensor

    x, dy, weight = new("x", S, K), new("dy", S, N), new("weight", E, N, K)
    A, B = (new("factor", E, case.R, width, dtype=torch.float32) for width in (K, N))
    g = new("vector", E, N, dtype=torch.float32) if case.dora else None
    experts = Experts(weight, A, B, None, None, g, None, None, 1.0, case.dora, case.dora)
    offsets = (torch.arange(1, E + 1, device=device) * S // E).int()
    if case.dora:
        base_products(weight, A)
    passes.phases.append(("forward", len(launches)))
    y, u, z = expert_linear(x, None, offsets, experts, Keep(True, case.dora))
    for role, tensor in (("y", y), ("u", u), ("z", z)):
        passes.known(role, tensor)
    passes.phases.append(("backward", len(launches)))
    wants = Wants(True, False, True, True, False, False, case.dora, False)
    grads = expert_linear_backward(dy, offsets, experts, Saved(x, u, z, None), wants)
    passes.known("dx", grads.dx)
    passes.known("gradient", *grads[1:])
    return passes


def experts_row(name: str, case: Placed, tokens: int, device: str) -> tuple[report.Row, list[Touched]]:
    """The row of a layer of experts, and its operands."""
    S, K, N = tokens * case.top, case.K, case.N
    small = [partial(run_experts, case, rows, 4, narrow, width) for rows, narrow, width in _SMALL]
    found = measure(small, partial(run_experts, case, S, case.experts, K, N), SHARED_MEMORY[device])
    moved = {
        phase: sum(o.read + o.written for o in found.touched if o.phase == phase and o.role != "scratch") / MIB
        for phase in found.launches
    }
    weight = 2 * case.experts * N * K
    # In fp32 A and B are read in both passes and their gradients written, and so is g.
    parameters = 3 * 4 * case.experts * (case.R * (K + N) + case.dora * N)
    # x and y; z, which is kept; dy, dx and x again.
    rows = 2 * S * ((K + N) + 2 * case.dora * N + (2 * K + N) + 2 * 2 * case.R)
    # The shrink's x; dy for q, for dB and for dx, g ⊙ dy in its place.
    again = 2 * S * (K + 2 * N + case.dora * N)
    minimum = 2 * weight + parameters + rows
    return {
        "case": name,
        "mib": moved["forward"] + moved["backward"],
        "minimum_mib": minimum / MIB,
        "split_target_mib": (minimum + again) / MIB,
        "norm_mib": moved["norm"],
        "partials_mib": sum(o.read + o.written for o in found.touched if o.role == "scratch") / MIB,
        "launches_norm": found.launches["norm"],
        "launches_forward": found.launches["forward"],
        "launches_backward": found.launches["backward"],
        "device": device,
        "M": tokens,
        "K": K,
        "r": case.R,
    }, found.touched


def restart_in_interpreter() -> None:
    """Replace this process by one in which Triton interprets its kernels: it decides when it is imported."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, "TRITON_INTERPRET": "1"})


def main(
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the rows there.")] = None,
    cases: Annotated[str, typer.Option(help=f"Comma-separated, of {', '.join(_NAMES)}; all by default.")] = "",
    tokens: Annotated[int, typer.Option(help="M.")] = 8192,
    device: Annotated[str, typer.Option(help=f"Whose L2 and tiles: {', '.join(SHARED_MEMORY)}.")] = "H100-SXM",
    operands: Annotated[bool, typer.Option("--operands", help="A table of every operand as well.")] = False,
) -> None:
    """Bytes that the kernels move, counted in the interpreter, beside the minimum and the models of other libraries."""
    restart_in_interpreter()
    if device not in SHARED_MEMORY:
        raise ValueError(f"unknown device {device!r}: choose from {', '.join(SHARED_MEMORY)}")
    names = [name.strip() for name in cases.split(",") if name.strip()] or _NAMES
    rows, bottlenecks, experts = [], [], []
    for name in names:
        if name in BOTTLENECKS:
            row, touched = bottleneck_row(name, BOTTLENECKS[name], tokens, device)
            bottlenecks.append(row)
        elif name in EXPERTS:
            row, touched = experts_row(name, EXPERTS[name], tokens, device)
            experts.append(row)
        elif name in CASES:
            row, touched = row_of(name, CASES[name], tokens, device)
            rows.append(row)
        else:
            continue
        if operands:
            report.print_table(name, [operand_row(operand) for operand in touched], _OPERAND_COLUMNS)
    batches = [batch_row(name, BATCHES[name]) for name in names if name in BATCHES]
    hadamard = [hadamard_row(name, HADAMARD[name], tokens, device) for name in names if name in HADAMARD]
    if rows:
        report.print_table(f"Device memory, MiB, M {tokens}, 16 bit, tiles and L2 of {device}", rows, _COLUMNS)
    if batches:
        report.print_table("Many adapters behind one base product, MiB, 16 bit", batches, _BATCH_COLUMNS)
    if bottlenecks:
        report.print_table(f"Bottlenecks, MiB, M {tokens}, 16 bit, tiles of {device}", bottlenecks, _BOTTLENECK_COLUMNS)
    if experts:
        report.print_table(
            f"A layer of experts, MiB, {tokens} tokens, 16 bit, tiles of {device}", experts, _EXPERT_COLUMNS
        )
    if hadamard:
        report.print_table(f"W0 ⊙ (1 + U V), MiB, M {tokens}, 16 bit, tiles of {device}", hadamard, _HADAMARD_COLUMNS)
    missing = coverage.not_covered("traffic", COVERS)
    if json_file is not None:
        every = rows + batches + bottlenecks + experts + hadamard
        write_json(json_file, "traffic", every, not_covered=missing)


def operand_row(operand: Touched) -> report.Row:
    """An operand's row of the table."""
    return {
        "phase": operand.phase,
        "kernel": operand.kernel.removeprefix("_").removesuffix("_kernel"),
        "operand": operand.operand,
        "role": operand.role,
        "shape": " x ".join(map(str, operand.shape)),
        "read": operand.read / MIB,
        "written": operand.written / MIB,
    }


_OPERAND_COLUMNS = {key: key for key in ("phase", "kernel", "operand", "role", "shape", "read", "written")}
_COLUMNS = {
    "case": "case",
    "mib": "moved",
    "minimum_mib": "least",
    "split_target_mib": "target",
    "partials_mib": "partials",
    "reread_mib": "re-read",
    "reread_row_major_mib": "row-major",
    "launches_forward": "fwd",
    "launches_backward": "bwd",
    "lorafusion_mib": "LoRAFusion",
    "axolotl_mib": "Axolotl",
    "unsloth_mib": "Unsloth",
    "peft_bf16_mib": "PEFT bf16",
    "peft_mib": "PEFT",
}
_BOTTLENECK_COLUMNS = {
    "case": "case",
    "r": "hidden",
    "mib": "moved",
    "minimum_mib": "least",
    "split_target_mib": "target",
    "partials_mib": "partials",
    "launches_forward": "fwd",
    "launches_backward": "bwd",
}
_EXPERT_COLUMNS = {
    "case": "case",
    "mib": "moved",
    "minimum_mib": "least",
    "split_target_mib": "target",
    "norm_mib": "norm",
    "partials_mib": "partials",
    "launches_forward": "fwd",
    "launches_backward": "bwd",
}
_BATCH_COLUMNS = {
    "case": "case",
    "M": "M",
    "ranks": "ranks",
    "factors_mib": "factors",
    "factors_minimum_mib": "least",
    "factors_padded_mib": "padded",
    "mib": "moved",
    "minimum_mib": "least",
}
_HADAMARD_COLUMNS = {
    "case": "case",
    "forward_mib": "forward",
    "forward_minimum_mib": "least",
    "dx_mib": "dx",
    "dx_minimum_mib": "least",
    "grads_mib": "dU, dV",
    "grads_minimum_mib": "least",
    "partials_mib": "partials",
    "weight_writes_mib": "writes of W0's size",
}


@page.section("traffic", "Bytes to and from a GPU's memory")
def section(document: Document) -> str:
    layers = [row for row in document["rows"] if row["case"] in CASES]
    rows = []
    for row in layers:
        others = [row.get(f"{name}_mib") for name in ("lorafusion", "axolotl", "unsloth", "peft_bf16")]
        cells = [row["mib"], row["minimum_mib"], row["partials_mib"], row["reread_mib"]]
        numbers = " | ".join(page.number(cell, 0) for cell in cells)
        peers = " | ".join(page.number(cell, 0) for cell in others)
        rows.append(
            f"{row['case'].replace('_', ' ')} | {numbers} | {row['launches_forward']} + {row['launches_backward']} | "
            f"{peers}"
        )
    first = layers[0]
    said = (
        "One layer, or a group that reads one input, forward and backward, counted in the interpreter: "
        f"M {first['M']}, K {first['K']}, 16 bit (VeRA r 256, else r 16), in MiB, tiles and L2 of {first['device']}; "
        "of the other libraries a model of their operations. Re-reads are what the L2 loses of the tiles, modelled. "
        "DoRA's norm is in its bytes, and its launches are apart. What this predicts for four GPUs is in "
        "[PREDICTIONS.md](PREDICTIONS.md); nobody has measured it.\n\n"
    )
    columns = "| moved | least | partial sums | re-read | launches | LoRAFusion | Axolotl | Unsloth | PEFT, bf16"
    experts = [row for row in document["rows"] if row["case"] in EXPERTS]
    return said + page.table(columns, rows) + _of_experts(experts)


def _of_experts(rows: Sequence[report.Row]) -> str:
    """A sentence on the product of gate and up of experts, "" where nobody has counted it."""
    if not rows:
        return ""
    first = rows[0]
    parts = [
        f"{_TITLES[row['case']]} moves {row['mib']:,.0f} of at least {row['minimum_mib']:,.0f}"
        + (f", the norm's {row['norm_mib']:,.0f} beside" if row["norm_mib"] else "")
        for row in rows
    ]
    launches = f"{first['launches_forward']} + {first['launches_backward']} launches"
    return (
        f"\n\nExperts' gate and up, {first['M']} tokens at {Placed().top} of {Placed().experts} experts, "
        f"K {first['K']}: {'; '.join(parts)}; {launches}."
    )


_TITLES = {"experts_lora": "LoRA", "experts_dora": "DoRA"}


@page.headline("traffic")
def headline(document: Document) -> str:
    row = page.by_case(document)["lora_qkv_group"]
    what = f"GPU memory moved by LoRA on q, k and v, MiB, of at least {row['minimum_mib']:.0f}; counted, PEFT modelled"
    return f"{what} | {row['mib']:,.0f} | {row['peft_bf16_mib']:,.0f}"
