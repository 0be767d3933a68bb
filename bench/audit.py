"""Every kernel, compiled offline for real GPUs at every configuration that configs.py can pick: what became of it.

The launchers run on meta tensors and record what they would launch for a GPU with the target's shared memory; Triton
then compiles that for the target, which needs no GPU. The exit status is 1 if a kernel does not compile, spills
registers, does not fit the target's shared (or tensor) memory, leaves a product of 16-bit numbers, or on AMD of fp32
numbers, to anything but the matrix unit, or on the main path makes Hopper's matrix unit wait after every instruction.
NVIDIA's matrix units do not compute in IEEE fp32: there such products are fused multiply-adds by design.

A row is one kernel with one set of tile sizes and operands. `registers`: 32-bit registers of a thread, AMD's
accumulation registers included. `spill_bytes`: what a thread keeps in local memory for want of registers.
`shared_bytes` and `shared_limit`: shared memory of a block, and the most that the target gives to one. `matrix_ops`:
matrix instructions in the code, unrolled ones counted apart. `groups`: groups of Hopper's asynchronous ones that the
code commits, and `waits`: those after which the machine code waits, as many as groups unless ptxas has serialised them
(its warning C7515). `widest_load`, `widest_store`: bits of a thread's widest
access to global memory; tensors on 16-byte boundaries are assumed, as PyTorch allocates them. `code_bytes`: machine
code. `operands`: tensors that were there, with their dtype where it is not the row's, "ᵀ" where columns are contiguous
instead of rows, "…" behind a tensor for each further one of a group; and the sizes and strides that 16 does not divide.
"""

from __future__ import annotations

import functools
import importlib
import os
import re
import struct
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from torch import Tensor

from bench import coverage, page, report
from bench.cases import chosen
from bench.plots import Document
from fastadapt.commands.report import write_json
from fastadapt.progress import progress_bar


class Target(NamedTuple):
    """A GPU to compile for, and the shared memory in bytes that one block may take there."""

    backend: str
    arch: int | str
    warp_size: int
    shared_limit: int


TARGETS = {
    "sm_80": Target("cuda", 80, 32, 166_912),
    "sm_86": Target("cuda", 86, 32, 101_376),
    "sm_89": Target("cuda", 89, 32, 101_376),
    "sm_90": Target("cuda", 90, 32, 232_448),
    "sm_100": Target("cuda", 100, 32, 232_448),
    "sm_120": Target("cuda", 120, 32, 101_376),
    "gfx942": Target("hip", "gfx942", 64, 65_536),
    "gfx950": Target("hip", "gfx950", 64, 163_840),
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
DTYPE_NAMES |= {torch.int32: "int32", torch.int64: "int64", torch.uint8: "uint8"}
QUICK_PAIRS = ["sm_80:bf16", "sm_90:fp16", "sm_90:fp32", "gfx942:bf16"]

COLUMNS = {
    "kernel": "kernel",
    "target": "target",
    "compiled": "compiled",
    "registers": "registers",
    "spill_bytes": "spilled",
    "shared": "shared / limit",
    "matrix_ops": "least matrix ops",
    "widest_load": "widest load",
    "widest_store": "widest store",
    "code_bytes": "code",
}

# Arguments that are sizes of tensors: where 16 divides them, rows begin on 16-byte boundaries.
SIZES = {"M", "N", "K", "Q", "R", "S", "Ns", "Rs", "Ks"}

# The kernels of a training step's products: here a matrix unit that stands still is a fault; elsewhere it is shown.
MAIN_PATH = (
    "_adapter_linear_kernel",
    "_adapter_linear_dx_kernel",
    "_shrink_kernel",
    "_expert_product_kernel",
    "_expert_shrink_kernel",
)

# Columns of tensor memory that one block may take on sm_100.
TENSOR_MEMORY = 512


class Form(NamedTuple):
    """What an adapter form has beside A and B, and what is kept from it."""

    vectors: str = ""  # d: mid_scale, h: out_scale, g: base_scale, b: bias
    dropout: bool = False
    on_base: bool = False
    frozen_A: bool = False  # VeRA: one A for all members, without a gradient
    parameters: torch.dtype | None = torch.float32  # None: as the activations


LORA = Form()
VERA = Form("dhb", frozen_A=True)
EVERYTHING = Form("dhgb", dropout=True)
BUT_DROPOUT = Form("dhgb")
ON_BASE = Form("dhgb", dropout=True, on_base=True)
FORMS = [LORA, Form(parameters=None), Form(dropout=True), VERA, Form("g"), EVERYTHING, ON_BASE]


class Group(NamedTuple):
    """Layers that read the same x: its features, and the features and rank of each."""

    K: int
    Ns: tuple[int, ...]
    Rs: tuple[int, ...]

    @classmethod
    def square(cls, R: int) -> Group:
        return cls(4096, (4096,), (R,))

    @classmethod
    def qkv(cls, R: int) -> Group:
        return cls(4096, (4096, 1024, 1024), (R, R, R))


TOKENS = (16384, 8192, 512, 64, 32, 16)
RANKS = (16, 32, 64, 128, 256)
Case = tuple[int, Group, Form]

# Every branch of configs.py. What is compiled is the first launch with a config, so the one with most operands.
BY_CONFIG: list[Case] = [
    *((M, Group.qkv(R), form) for form in (ON_BASE, EVERYTHING) for M in TOKENS for R in RANKS),
    *((M, Group.square(R), form) for form in (BUT_DROPOUT, LORA) for M in TOKENS for R in RANKS),
    *((8192, Group.qkv(R), BUT_DROPOUT) for R in RANKS),
    # More tokens than a decoding step has, and still too few for wide tiles.
    *((256, Group.square(R), BUT_DROPOUT) for R in RANKS),
    # Few tokens of so wide an x that narrow tiles are not needed to have enough programs.
    *((M, Group(16384, (4096,), (R,)), BUT_DROPOUT) for M in (32, 16) for R in RANKS),
    # A narrow model; and widths that divide by nothing.
    *((8192, Group(576, (576,), (R,)), EVERYTHING) for R in RANKS),
    *((M, Group(577, (577, 193, 1), (R, R, R)), form) for form in (ON_BASE, EVERYTHING) for M in TOKENS for R in RANKS),
    # Few tokens through wide layers; ranks that 16 does not divide.
    *((M, Group(16384, (16384,), (R,)), EVERYTHING) for M in (32, 16) for R in RANKS),
    *((M, Group.square(R), EVERYTHING) for M in (8192, 16) for R in (8, 24, 40, 100, 200)),
]
# Every combination of operands that the methods need, in bf16 only: other dtypes take no other branch for them.
BY_OPERANDS: list[Case] = [
    *((8192, Group.square(16), form) for form in FORMS),
    *((8192, Group.qkv(256), form) for form in (LORA, VERA)),
    (8192, Group(4096, (14336, 14336), (64, 64)), LORA),
    (16, Group.square(16), LORA),
    (8192, Group.square(8), EVERYTHING),
    # Widths and ranks that divide by nothing, and a member without a rank.
    (1, Group(577, (577,), (3,)), EVERYTHING),
    (4099, Group(577, (577, 193, 1), (3, 100, 0)), ON_BASE),
]


class Batch(NamedTuple):
    """Rows of tokens for many adapters of ranks up to R on one layer, and which vectors some of them have."""

    rows: int
    tokens: int
    K: int = 4096
    N: int = 4096
    R: int = 16
    vectors: str = "dhgb"  # as a form's
    bias: bool = True
    factors: torch.dtype | None = None  # None: as the activations
    layers: int = 1  # that read the same x


# A token a row, few and many rows; prefill.
BATCH_ROWS = ((8, 1), (256, 1), (4, 2048))
BATCHES_BY_CONFIG: list[Batch] = [
    *(Batch(rows, tokens, R=R) for rows, tokens in BATCH_ROWS for R in RANKS),
    *(Batch(rows, tokens, K=576, N=576, R=R) for rows, tokens in BATCH_ROWS for R in RANKS),
]
BATCHES_BY_OPERANDS: list[Batch] = [
    *(Batch(rows, tokens, R=64, vectors="", bias=False) for rows, tokens in BATCH_ROWS),
    *(Batch(rows, tokens, layers=3) for rows, tokens in BATCH_ROWS),
    *(Batch(rows, tokens, vectors="hgb", layers=3) for rows, tokens in BATCH_ROWS),
    *(Batch(rows, tokens, R=256, vectors="dh", factors=torch.float32) for rows, tokens in BATCH_ROWS),
    # Widths and ranks that divide by nothing; vectors without a rank.
    *(Batch(rows, tokens, 577, 193, R) for rows, tokens in ((8, 1), (4, 2048)) for R in (5, 0)),
]
QUICK_BATCHES = [Batch(8, 1, vectors="", layers=3), Batch(16, 32, R=64)]


class Bottleneck(NamedTuple):
    """A bottleneck of H features on a stream of K, with biases; `stream` is its residual's dtype, None: as v's."""

    M: int
    K: int
    H: int
    activation: str = "gelu"
    groups: int = 1
    dropout: bool = True
    stream: torch.dtype | None = None
    parameters: torch.dtype | None = torch.float32  # None: as v


HIDDEN = (16, 32, 64, 128)
BOTTLENECKS_BY_CONFIG: list[Bottleneck] = [
    *(Bottleneck(M, K, H) for K in (768, 577) for M in TOKENS for H in HIDDEN),
    # Hidden features that 16 does not divide.
    *(Bottleneck(M, 768, H) for M in TOKENS for H in (8, 24, 50, 100)),
]
BOTTLENECKS_BY_OPERANDS: list[Bottleneck] = [
    *(Bottleneck(1576, 768, 64, activation) for activation in ("identity", "relu", "gelu", "quick_gelu")),
    *(Bottleneck(16384, 768, H, dropout=False, parameters=None) for H in HIDDEN),
    *(Bottleneck(16384, 768, H, groups=2) for H in (8, 128)),
    *(Bottleneck(16384, 768, H, stream=torch.float32) for H in HIDDEN),
    *(Bottleneck(4099, 577, H) for H in (50, 100)),
]
QUICK_BOTTLENECKS = [Bottleneck(1576, 768, 64, "relu"), Bottleneck(16384, 768, 8, "identity", groups=2)]
QUICK: list[Case] = [
    (8192, Group.qkv(16), LORA),
    *((8192, Group.square(16), form) for form in (LORA, Form("g"))),
    (8192, Group.square(64), ON_BASE),
]


class Recomposed(NamedTuple):
    """Tokens through W0 ⊙ (1 + U V), U V of rank Q, beside a low-rank path of rank R."""

    tokens: int
    K: int = 4096
    N: int = 4096
    Q: int = 16
    R: int = 16
    bias: bool = True
    base: bool = True
    factors: torch.dtype | None = torch.float32  # None: as the activations
    transposed: bool = False  # stored as [in, out]


RECOMPOSED_BY_CONFIG: list[Recomposed] = [
    *(Recomposed(M, Q=Q) for M in TOKENS for Q in (16, 32, 64)),
    # Widths that divide by nothing.
    *(Recomposed(M, 577, 193, Q) for M in TOKENS for Q in (16, 32, 64)),
]
RECOMPOSED_BY_OPERANDS: list[Recomposed] = [
    *(Recomposed(8192, Q=Q, R=R, bias=False) for Q, R in ((16, 0), (64, 0), (8, 8), (160, 40))),
    *(Recomposed(8192, Q=Q, base=False) for Q in (16, 64)),
    *(Recomposed(M, Q=64, transposed=True) for M in (8192, 16)),
    Recomposed(8192, factors=None),
    Recomposed(1, 577, 193, 3, 0),
    Recomposed(4099, 577, 193, 40, 5, transposed=True),
]
QUICK_RECOMPOSED = [Recomposed(8192), Recomposed(16, Q=64, R=0, bias=False)]


class Segmented(NamedTuple):
    """Layers of `experts` with a form, each with `rows` rows on average; `dropped`: x̃ is a tensor of its own."""

    rows: int
    R: int = 16
    vectors: str = "dhgb"  # as a form's
    dropped: bool = False
    on_base: bool = False
    tied: bool = False  # h is s · g
    shared: bool = False  # one pair of factors for all
    experts: int = 64
    K: int = 2048
    N: int = 1536
    parameters: torch.dtype | None = torch.float32  # None: as the activations
    transposed: bool = False  # stored as [E, in, out]


EXPERT_ROWS = (512, 128, 32, 16)
SEGMENTED_BY_CONFIG: list[Segmented] = [
    *(
        Segmented(rows, R, dropped=drops, on_base=drops)
        for drops in (True, False)
        for rows in EXPERT_ROWS
        for R in RANKS
    ),
    # Few experts of narrow layers; a single one.
    *(
        Segmented(rows, R, dropped=drops, on_base=drops, experts=E, K=768, N=768)
        for drops in (True, False)
        for E, rows in ((8, 64), (8, 16), (1, 64), (1, 16))
        for R in RANKS
    ),
    # Widths and ranks that divide by nothing.
    *(
        Segmented(rows, R, dropped=drops, on_base=drops, K=577, N=193)
        for drops in (True, False)
        for rows in (512, 16)
        for R in RANKS
    ),
    *(Segmented(rows, R) for rows in (512, 16) for R in (8, 24, 40, 100, 200)),
]
SEGMENTED_BY_OPERANDS: list[Segmented] = [
    *(Segmented(rows, vectors="", parameters=None) for rows in (512, 16)),
    *(Segmented(rows, vectors="b", dropped=True) for rows in (512, 16)),
    *(
        Segmented(rows, vectors="gb", tied=True, on_base=drops, dropped=drops)
        for rows in (512, 16)
        for drops in (False, True)
    ),
    *(Segmented(rows, 256, "dh", shared=True) for rows in (512, 16)),
    *(Segmented(rows, vectors="b", transposed=True) for rows in (512, 16)),
    Segmented(0, 3, "dhgb", K=577, N=193, shared=True),
]
QUICK_SEGMENTED = [Segmented(512, vectors=""), Segmented(16, 8, "gb", tied=True)]


def launch_group(dtype: torch.dtype, case: Case) -> None:
    """Forward by every strategy, and backward, of M tokens through a group."""
    from fastadapt_kernels import configs
    from fastadapt_kernels.adapter_linear import Member, adapter_linear, adapter_linear_backward

    def tensor(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    M, group, form = case
    own = form.parameters or dtype
    x = tensor(M, group.K)
    members = [
        Member(
            weight=tensor(N, group.K),
            A=tensor(R, group.K, dtype=own),
            B=tensor(N, R, dtype=own),
            mid_scale=tensor(R, dtype=own) if "d" in form.vectors else None,
            out_scale=tensor(N, dtype=own) if "h" in form.vectors else None,
            scaling=2.0,
            base_scale=tensor(N, dtype=torch.float32) if "g" in form.vectors else None,
            bias=tensor(N) if "b" in form.vectors else None,
            dropout_on_base=form.on_base,
        )
        for N, R in zip(group.Ns, group.Rs, strict=True)
    ]
    options: dict[str, Any] = {"shared_A": form.frozen_A}
    if form.dropout:
        options |= {"seed": tensor(1, dtype=torch.int64), "p": 0.1}
    for strategy in ("split", "fused") if max(group.Rs) <= configs.MOST_FUSED_RANKS else ("split",):
        ys, u, zs = adapter_linear(x, members, keep_base="g" in form.vectors, strategy=strategy, **options)
        if "g" in form.vectors:  # where no g trains
            adapter_linear(x, members, strategy=strategy, **options)
    if form.frozen_A:
        adapter_linear_backward(ys, members, u=u, zs=zs, want_bias="b" in form.vectors, **options)
    else:
        for want_dx in (True, False):
            adapter_linear_backward(
                ys, members, x=x, u=u, zs=zs, want_bias="b" in form.vectors, want_dx=want_dx, **options
            )


def launch_parameters(dtype: torch.dtype, R: int) -> None:
    """The launchers that see no tokens."""
    from fastadapt_kernels.tiles import dropout_mask
    from fastadapt_kernels.weight_norm import row_squares, weight_norm

    weight = torch.empty(4096, 4096, dtype=dtype, device="meta")
    A, B = torch.empty(R, 4096, device="meta"), torch.empty(4096, R, device="meta")
    weight_norm(weight, A, B, 2.0, row_squares(weight))
    dropout_mask(torch.empty(1, dtype=torch.int64, device="meta"), 8192, 4096, 0.1)


def launch_batch(dtype: torch.dtype, batch: Batch) -> None:
    """Many adapters on one layer; how many there are is no matter."""
    from fastadapt_kernels.multi_adapter import multi_adapter_linear

    from fastadapt.operators.multi_adapter_linear.batch import PAGE_RANKS, FormTables, SortedTokens, places_of_a_tile

    def tensor(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    def integers(*shape: int) -> Tensor:
        return tensor(*shape, dtype=torch.int32)

    M, adapters = batch.rows * batch.tokens, 8
    pages = tensor(adapters, max(1, -(-batch.R // PAGE_RANKS)), dtype=torch.int64)
    starts = tensor(adapters, dtype=torch.int64)
    tables = FormTables(
        tensor(batch.R * (batch.K + batch.N), dtype=batch.factors or dtype),
        tensor(batch.N, dtype=torch.float32),
        integers(adapters),
        pages,
        pages,
        integers(adapters),
        integers(adapters),
        tensor(adapters, dtype=torch.float32),
        *(starts if vector in batch.vectors else None for vector in "dhgb"),
    )
    block = places_of_a_tile(batch.rows, batch.tokens)
    tiles = M if block == 1 else -(-M // block) + batch.rows
    tokens = SortedTokens(integers(M), integers(M), integers(M), integers(tiles, 3), block)
    bias = tensor(batch.N) if batch.bias else None
    x, weights = tensor(M, batch.K), [tensor(batch.N, batch.K) for _ in range(batch.layers)]
    multi_adapter_linear(x, weights, [bias] * batch.layers, [tables] * batch.layers, tokens, batch.R)


def launch_recomposed(dtype: torch.dtype, case: Recomposed) -> None:
    """Forward and backward, all gradients."""
    from fastadapt_kernels.hadamard_linear import HadamardLayer, Wants, hadamard_linear, hadamard_linear_backward

    def tensor(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    own = case.factors or dtype
    x, dy = tensor(case.tokens, case.K), tensor(case.tokens, case.N)
    weight = tensor(case.K, case.N).T if case.transposed else tensor(case.N, case.K)
    U, V = tensor(case.N, case.Q, dtype=own), tensor(case.Q, case.K, dtype=own)
    A, B = (tensor(case.R, case.K, dtype=own), tensor(case.N, case.R, dtype=own)) if case.R else (None, None)
    bias = tensor(case.N, dtype=own) if case.bias else None
    layer = HadamardLayer(weight, U, V, A, B, bias, case.base)
    _, u = hadamard_linear(x, layer)
    hadamard_linear_backward(dy, layer, x, u, Wants(bias=case.bias))


def launch_bottleneck(dtype: torch.dtype, case: Bottleneck) -> None:
    """Forward and backward of a bottleneck, with all that they can be asked for."""
    from fastadapt_kernels.bottleneck import BottleneckLayer, Wants, bottleneck, bottleneck_backward

    def tensor(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    M, K, H, own = case.M, case.K, case.H, case.parameters or dtype
    v, residual = tensor(M, K), tensor(M, K, dtype=case.stream or dtype)
    down, up = tensor(H, K, dtype=own), tensor(K, H // case.groups, dtype=own)
    down_bias, up_bias = tensor(H, dtype=own), tensor(K, dtype=own)
    seed = tensor(1, dtype=torch.int64) if case.dropout else None
    layer = BottleneckLayer(down, up, down_bias, up_bias, 0.5, case.activation, case.groups)
    p = 0.1 if case.dropout else 0.0
    out = bottleneck(v, layer, residual, seed, p)
    bottleneck_backward(out, v, layer, seed, p, case.stream is None, Wants())


def launch_experts(dtype: torch.dtype, case: Segmented) -> None:
    """Forward and backward of layers of experts, with all that they can be asked for, and DoRA's products."""
    from fastadapt_kernels.expert_linear import base_products, expert_linear, expert_linear_backward

    from fastadapt.operators.expert_linear.parameters import Experts, Keep, Saved, Wants

    def tensor(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    rows, E, R, K, N, own = case.rows, case.experts, case.R, case.K, case.N, case.parameters or dtype
    S, pairs = max(rows * E, 1), 1 if case.shared else E

    def table(vector: str, width: int) -> Tensor | None:
        return tensor(E, width, dtype=own) if vector in case.vectors else None

    weight = tensor(E, K, N).mT if case.transposed else tensor(E, N, K)
    A, B = tensor(pairs, R, K, dtype=own), tensor(pairs, R, N, dtype=own)
    vectors = table("d", R), None if case.tied else table("h", N), table("g", N), table("b", N)
    experts = Experts(weight, A, B, *vectors, None, 2.0, case.tied, case.on_base)
    d, h, g, b = (vector is not None for vector in vectors)
    offsets, x, dy = tensor(E, dtype=torch.int32), tensor(S, K), tensor(S, N)
    _, u, z = expert_linear(x, tensor(S, K) if case.dropped else None, offsets, experts, Keep(True, g))
    expert_linear(x, tensor(S, K) if case.dropped else None, offsets, experts, Keep(False, False))
    wants = Wants(True, case.dropped, True, True, d, h, g, b)
    # The rows of a block's second product are weighted by its routing.
    for row_scale in (tensor(S), None):
        expert_linear_backward(dy, offsets, experts, Saved(x, u, z, row_scale), wants)
    base_products(weight, A)


class Suite(NamedTuple):
    """What launches a kind of cases, the operators of the registry that it stands for, and the cases."""

    covers: tuple[str, ...]
    launch: Callable[[torch.dtype, Any], None]
    by_config: Sequence[Any]
    by_operands: Sequence[Any]
    quick: Sequence[Any]


def ranks_of(cases: Sequence[Case]) -> list[int]:
    """The largest rank of each group, once."""
    return sorted({max(group.Rs) for _, group, _ in cases})


SUITES = (
    Suite(("adapter_linear", "adapter_linear_backward"), launch_group, BY_CONFIG, BY_OPERANDS, QUICK),
    Suite(("weight_norm", "row_squares"), launch_parameters, *map(ranks_of, (BY_CONFIG, BY_OPERANDS, QUICK))),
    Suite(
        ("multi_adapter_linear", "multi_adapter_update"),
        launch_batch,
        BATCHES_BY_CONFIG,
        BATCHES_BY_OPERANDS,
        QUICK_BATCHES,
    ),
    Suite(
        ("hadamard_linear", "hadamard_linear_backward"),
        launch_recomposed,
        RECOMPOSED_BY_CONFIG,
        RECOMPOSED_BY_OPERANDS,
        QUICK_RECOMPOSED,
    ),
    Suite(
        ("bottleneck", "bottleneck_backward"),
        launch_bottleneck,
        BOTTLENECKS_BY_CONFIG,
        BOTTLENECKS_BY_OPERANDS,
        QUICK_BOTTLENECKS,
    ),
    Suite(
        ("expert_linear", "expert_linear_backward"),
        launch_experts,
        SEGMENTED_BY_CONFIG,
        SEGMENTED_BY_OPERANDS,
        QUICK_SEGMENTED,
    ),
)


class Job(NamedTuple):
    """One kernel to compile for one target, in plain values that travel to another process."""

    target: str
    dtype: str
    kernel: tuple[str, str]  # module and name
    source: tuple[dict[str, Any], ...]  # signature, constexprs and attrs, as triton.compiler.ASTSource takes them
    options: dict[str, int]
    config: str
    operands: str


def jobs(pairs: Sequence[str], *, quick: bool) -> list[Job]:
    """The distinct kernels that the launchers launch for each TARGET:DTYPE."""
    from fastadapt_kernels import configs

    @functools.cache
    def recorded(dtype: str, shared_memory: int) -> list[Any]:
        def launched(kind: str) -> list[Any]:
            with configs.recorded_launches(shared_memory) as launches:
                for suite in SUITES:
                    for case in getattr(suite, kind):
                        suite.launch(DTYPES[dtype], case)
            return launches

        distinct: dict[tuple[Any, str], Any] = {}
        for launch in launched("quick" if quick else "by_config"):
            distinct.setdefault((config_of(launch), shown_operands(launch, dtype) if quick else ""), launch)
        for launch in launched("by_operands") if dtype == "bf16" and not quick else []:
            distinct.setdefault((config_of(launch), shown_operands(launch, dtype)), launch)
        return list({(config_of(launch), str(launch.source())): launch for launch in distinct.values()}.values())

    return [
        Job(
            target,
            dtype,
            (launch.kernel.__module__, launch.kernel.__name__),
            launch.source(),
            # Tile sizes are constexprs of the kernel; what else a config says is an option of the compiler.
            {key: value for key, value in launch.config.items() if not key.isupper()},
            config_of(launch)[1],
            shown_operands(launch, dtype),
        )
        for target, dtype in (pair.split(":") for pair in pairs)
        for launch in recorded(dtype, TARGETS[target].shared_limit)
    ]


def compiled(job: Job) -> report.Row:
    """Compile one kernel, and read from what the compiler made what became of it."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    target = TARGETS[job.target]
    module, name = job.kernel
    row: report.Row = {
        "kernel": name,
        "target": job.target,
        "dtype": job.dtype,
        "config": job.config,
        "operands": job.operands,
    }
    source = ASTSource(getattr(importlib.import_module(module), name), *job.source)
    try:
        kernel = triton.compile(source, target=GPUTarget(*target[:3]), options=job.options)
    except Exception as error:  # Whatever the compiler raises, the other kernels are still to be looked at.
        return row | {"error": f"{type(error).__name__}: {error}"}
    binary = kernel.asm["cubin" if target.backend == "cuda" else "hsaco"]
    assembly = kernel.asm["ptx" if target.backend == "cuda" else "amdgcn"]
    dots_wanted, dots_left = dots(kernel.asm["ttir"], kernel.asm["ttgir"], fp32_unit=target.backend == "hip")
    registers, spill_bytes = nvidia_registers(binary) if target.backend == "cuda" else amd_registers(assembly)
    groups = assembly.count("wgmma.commit_group")
    return row | {
        "registers": registers,
        "spill_bytes": spill_bytes,
        "shared_bytes": kernel.metadata.shared,
        "shared_limit": target.shared_limit,
        "tensor_memory": getattr(kernel.metadata, "tmem_size", None) or 0,
        "matrix_ops": matrix_ops(assembly),
        "groups": groups,
        "waits": waiting(nvidia_tool("nvdisasm", "--print-code", binary=binary)) if groups else 0,
        "dots_wanted": dots_wanted,
        "dots_left": dots_left,
        "widest_load": widest(assembly, "load"),
        "widest_store": widest(assembly, "store"),
        "code_bytes": code_bytes(binary),
    }


def config_of(launch: Any) -> tuple[str, str]:
    """The kernel's name, and its tile sizes and compiler options."""
    config = " ".join(f"{key}={value}" for key, value in launch.config.items() if key != "enable_fp_fusion")
    return launch.kernel.__name__, config


def shown_operands(launch: Any, dtype: str) -> str:
    """The operands of a launch in a line; see the module's docstring."""
    tensors, odd = [], []
    for name, value in launch.arguments.items():
        members = value if isinstance(value, tuple) else (value,)
        present = [member for member in members if isinstance(member, Tensor)]
        if present:
            first = present[0]
            own = DTYPE_NAMES[first.dtype]
            mark = "ᵀ" if first.ndim > 1 and first.stride(-1) != 1 else ""
            tensors.append(name + mark + (f":{own}" if own != dtype else "") + "…" * (len(present) - 1))
        elif name in SIZES and any(member % 16 for member in members):
            odd.append(name)
    return " ".join(tensors + [f"({' '.join(odd)} odd)"] * bool(odd))


def nvidia_tool(name: str, option: str, *, binary: bytes) -> str:
    """What a tool that comes with Triton prints about a cubin."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        return subprocess.run([str(tool), option, file.name], capture_output=True, text=True, check=True).stdout


def nvidia_registers(cubin: bytes) -> tuple[int, int]:
    """(registers of a thread, bytes that it spills), as cuobjdump reads them."""
    return resource_usage(nvidia_tool("cuobjdump", "--dump-resource-usage", binary=cubin))


def resource_usage(dump: str) -> tuple[int, int]:
    """(registers, bytes of stack and local memory) in cuobjdump's account of a kernel."""
    found = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", dump)}
    return found["REG"], found["STACK"] + found["LOCAL"]


def amd_registers(amdgcn: str) -> tuple[int, int]:
    """(vector registers, bytes of scratch memory) in the metadata at the end of AMD's assembly."""
    found = {key: int(value) for key, value in re.findall(r"\.(\w+):\s+(\d+)", amdgcn)}
    return found["vgpr_count"], max(found["private_segment_fixed_size"], 4 * found["vgpr_spill_count"])


def matrix_ops(assembly: str) -> int:
    """How many instructions go to the matrix unit, in PTX or amdgcn."""
    return len(re.findall(r"\b(?:wgmma\.mma_async\.|mma\.sync\.|tcgen05\.mma\.|v_mfma_)", assembly))


def waiting(sass: str) -> int:
    """How many of Hopper's matrix instructions signal their end, for which the code then waits, in machine code."""
    return len(re.findall(r"\bHGMMA\.[^;]*\bgsb0\b", sass))


# Bits of an AMD memory instruction without a count of dwords.
_AMD_BITS = {"ubyte": 8, "sbyte": 8, "byte": 8, "ushort": 16, "sshort": 16, "short": 16, "dword": 32}


def widest(assembly: str, direction: str) -> int:
    """Bits of the widest load from, or store to, global memory that one thread makes, in PTX or amdgcn."""
    ptx = re.findall(
        rf"\b{'ld' if direction == 'load' else 'st'}\.global(?:\.[A-Za-z]\w*(?:::\w+)*)*?(?:\.v(\d))?\.[bfsu](\d+)\b",
        assembly,
    )
    found = [int(count or 1) * int(bits) for count, bits in ptx]
    if direction == "load":
        copies = re.findall(r"\bcp\.async\.c[ag]\.shared\.global[^;]*?\],[^;]*?\], *(\w+)", assembly)
        found += [8 * int(size, 0) for size in copies]
    amd = re.findall(rf"\b(?:global|buffer|flat)_{direction}_(?:lds_)?({'|'.join(_AMD_BITS)})(?:x(\d))?", assembly)
    found += [_AMD_BITS[unit] * int(count or 1) for unit, count in amd]
    return max(found, default=0)


def dots(ttir: str, ttgir: str, *, fp32_unit: bool) -> tuple[int, int]:
    """(products that a matrix unit can make, those of them that were left to other units), in Triton's own IR."""
    kinds = re.findall(r"\btt\.dot .*?: tensor<[\dx]*x(\w+)>", ttir)
    wanted = sum(kind in ("f16", "bf16") or (fp32_unit and kind == "f32") for kind in kinds)
    # A layout of a matrix unit is called #mma; #blocked is that of ordinary arithmetic.
    scalar = len(re.findall(r"\btt\.dot .*-> tensor<[^>]*#blocked\d*>", ttgir))
    return wanted, scalar if wanted == len(kinds) else 0


def code_bytes(elf: bytes) -> int:
    """The machine code in an ELF file (cubin or hsaco): its executable sections."""
    offset, entry_size, count = struct.unpack_from("<Q10xHH", elf, 40)
    total = 0
    for section in range(count):
        _, _, flags, _, _, size = struct.unpack_from("<IIQQQQ", elf, offset + section * entry_size)
        total += size if flags & 4 else 0
    return total


def violations(row: report.Row) -> list[str]:
    """What is wrong with a kernel, in words."""
    if "error" in row:
        return [str(row["error"])]
    found = []
    if row["spill_bytes"]:
        found.append(f"spills {row['spill_bytes']} bytes")
    if row["shared_bytes"] > row["shared_limit"]:
        found.append(f"needs {row['shared_bytes']} bytes of shared memory, there are {row['shared_limit']}")
    if row["tensor_memory"] > TENSOR_MEMORY:
        found.append(f"needs {row['tensor_memory']} columns of tensor memory, there are {TENSOR_MEMORY}")
    if row["dots_left"] or (row["dots_wanted"] and not row["matrix_ops"]):
        found.append("has a product that is not made by the matrix unit")
    # Results of before they were counted have neither.
    groups, waits = row.get("groups", 0), row.get("waits", 0)
    if waits > groups and row["kernel"] in MAIN_PATH:
        found.append(f"waits after {waits} matrix instructions that it commits as {groups} groups")
    return found


def compile_all(pairs: Sequence[str], *, quick: bool) -> list[report.Row]:
    """The row of every distinct kernel of each TARGET:DTYPE, compiled by two processes."""
    todo = jobs(pairs, quick=quick)
    rows = []
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool, progress_bar("kernels", len(todo)) as update:
        for row in pool.map(compiled, todo, chunksize=4):
            update(advance=1, description=f"{row['target']} {row['dtype']}")
            rows.append(row)
    return rows


def worst(rows: Sequence[report.Row], *by: str) -> list[report.Row]:
    """Of each group that has the same values of `by` how many there are, and the largest of every number."""
    return [
        dict(zip(by, values, strict=True))
        | {"compiled": len(group), "shared_limit": group[0]["shared_limit"]}
        | {key: max(_of(group, key)) for key in ("registers", "spill_bytes", "shared_bytes", "code_bytes")}
        | {"serialised": sum(row.get("waits", 0) > row.get("groups", 0) for row in group)}
        for values, group in _groups(rows, by)
    ]


def summary(rows: Sequence[report.Row]) -> list[report.Row]:
    """The worst of every kernel and target, as a table has it."""
    by = ("kernel", "target")
    found = worst(rows, *by)
    for row, (_, group) in zip(found, _groups(rows, by), strict=True):
        row["shared"] = f"{row['shared_bytes']} / {row['shared_limit']}"
        row["matrix_ops"] = min((own["matrix_ops"] for own in group if own["dots_wanted"]), default=None)
        for key in ("widest_load", "widest_store"):
            row[key] = f"{min(_of(group, key))}-{max(_of(group, key))}"
    return found


def _groups(rows: Sequence[report.Row], by: Sequence[str]) -> list[tuple[tuple[str, ...], list[report.Row]]]:
    """The kernels that compiled, by these of their values, sorted."""
    groups: dict[tuple[str, ...], list[report.Row]] = {}
    for row in rows:
        if "error" not in row:
            groups.setdefault(tuple([str(row[key]) for key in by]), []).append(row)
    return sorted(groups.items(), key=lambda item: item[0])


def names(known: Iterable[str], wanted: str) -> list[str]:
    """The known names that a comma-separated list has, all of them for an empty list."""
    return chosen({name: name for name in known}, wanted)


def main(
    json: Annotated[
        Path | None,
        typer.Option(
            help="Write to this file: the worst of each kernel, target and dtype, and what is wrong; with --quick all."
        ),
    ] = None,
    quick: Annotated[
        bool, typer.Option(help="A few shapes, on a few targets and dtypes unless both are named.")
    ] = False,
    targets: Annotated[str, typer.Option(help=f"Comma-separated, of {', '.join(TARGETS)}.")] = "",
    dtypes: Annotated[str, typer.Option(help=f"Comma-separated, of {', '.join(DTYPES)}.")] = "",
) -> None:
    """Compile every kernel for real GPUs, offline: registers, spills, shared memory, matrix unit."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise typer.BadParameter("Triton's interpreter does not compile: unset TRITON_INTERPRET")
    pairs = [f"{target}:{dtype}" for target in names(TARGETS, targets) for dtype in names(DTYPES, dtypes)]
    if quick and not (targets and dtypes):
        pairs = [pair for pair in QUICK_PAIRS if pair in pairs]
    start = time.perf_counter()
    rows = compile_all(pairs, quick=quick)
    seconds = round(time.perf_counter() - start)
    report.print_table(
        f"{len(rows)} kernels in {seconds} s: the worst of each kernel on each target", summary(rows), COLUMNS
    )
    wrong = [(row, found) for row in rows if (found := violations(row))]
    for row, found in wrong:
        print(
            f"{row['kernel']} {row['target']} {row['dtype']} [{row['config']}] ({row['operands']}): {'; '.join(found)}"
        )
    print(f"{len(wrong)} of {len(rows)} kernels with something wrong")
    missing = coverage.not_covered("audit", [name for suite in SUITES for name in suite.covers])
    if json is not None:
        stored = rows if quick else worst(rows, "kernel", "target", "dtype")
        write_json(json, "audit", stored, wrong=[row for row, _ in wrong], seconds=seconds, not_covered=missing)
    if wrong:
        raise typer.Exit(1)


@page.section("audit", "The kernels, compiled offline for real GPUs")
def section(document: Document) -> str:
    kernels = document["rows"]
    wrong = [
        f"`{row['kernel']}` {row['target']} {row['dtype']} [{row['config']}] {' and '.join(violations(row))}"
        for row in document["wrong"]
    ]
    targets = {target: [row for row in kernels if row["target"] == target] for target in TARGETS}
    rows = [
        f"{target} | {sum(_of(group, 'compiled')):,} | {len({row['kernel'] for row in group})} | "
        f"{max(_of(group, 'registers'))} | {max(_of(group, 'spill_bytes'))} | "
        f"{max(_of(group, 'shared_bytes')):,} of {group[0]['shared_limit']:,} | {sum(_of(group, 'serialised')) or '–'}"
        for target, group in targets.items()
        if group
    ]
    dtypes = ", ".join(dict.fromkeys(row["dtype"] for row in kernels))
    columns = "target | compiled | kernels | registers | spilled bytes | shared memory | wait after every instruction"
    return "\n\n".join(
        [
            f"{sum(_of(kernels, 'compiled')):,} kernels: every configuration that `configs.py` could pick at that "
            f"commit, in {dtypes}; registers, spilled bytes and shared memory, the worst of each target. A spill, a "
            "tile that does not fit, a 16-bit product off the matrix unit or, on the main path, one that waits after "
            f"every instruction is wrong, and so are {len(wrong) or 'none'}"
            + ("." if not wrong else ":\n\n* " + "\n* ".join(wrong)),
            page.table(columns, rows),
        ]
    )


def _of(rows: Sequence[report.Row], key: str) -> list[int]:
    return [row.get(key, 0) for row in rows]
