"""Every tile size, and how a kernel is launched with it: the only file that knows what a GPU can hold.

Choices depend on dtype, shape and the shared memory that a block may take, never on the name of a device, so that an
unknown GPU runs and a split sum has the same order on every one. They are checked by compiling them offline: the
launchers run under ``recorded_launches`` on meta tensors, and what they would have launched goes to triton.compile.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from .recorded import Config, Launch

# Enough programs to fill every GPU twice (an H100 has 132 multiprocessors, an MI300X 304 compute units).
_WANTED_PROGRAMS = 512

# The widest rank whose u is computed inside the base product's loop, and whose q shares one pass over dy.
MOST_FUSED_RANKS = 64
MOST_ONE_PASS_RANKS = 32

# The widest hidden of a bottleneck: a program holds all of it in registers.
MOST_HIDDEN = 128


# Shared memory of a block, in bytes. At least: sm_90 and sm_100; those and sm_80; sm_86, sm_89 and sm_120.
_HOPPER = 227 * 1024
_LARGE = 160 * 1024
_MEDIUM = 99 * 1024


class Recorder(NamedTuple):
    """Where launches go instead of to a GPU that has this much shared memory a block."""

    launches: list[Launch]
    shared_memory: int


_recorder: ContextVar[Recorder | None] = ContextVar("recorder", default=None)


@contextmanager
def recorded_launches(shared_memory: int) -> Iterator[list[Launch]]:
    """Launchers called inside choose tiles for a GPU with this shared memory and are recorded, not run."""
    launches: list[Launch] = []
    token = _recorder.set(Recorder(launches, shared_memory))
    try:
        yield launches
    finally:
        _recorder.reset(token)


def is_recorded() -> bool:
    """Whether launches are recorded, not run."""
    return _recorder.get() is not None


def rehearsed_launches(device: torch.device) -> AbstractContextManager[list[Launch]]:
    """`recorded_launches` for the shared memory of a device."""
    return recorded_launches(_shared_memory(device))


def launch(kernel: Any, grid: tuple[int, ...], arguments: Mapping[str, Any], config: Config) -> None:
    """Run a kernel on the device of its tensors."""
    # Said rather than left to Triton, whose default is about to change: a fused multiply-add rounds once.
    config = {**config, "enable_fp_fusion": True}
    recorder = _recorder.get()
    if recorder is not None:
        recorder.launches.append(Launch(kernel, grid, arguments, config))
        return
    flat = (entry for value in arguments.values() for entry in (value if isinstance(value, tuple) else (value,)))
    tensor = next(entry for entry in flat if isinstance(entry, Tensor))
    # Triton launches on the current device, which need not be the one that holds the tensors.
    with torch.cuda.device_of(tensor):
        kernel[grid](**arguments, **config)


def _interpreted() -> bool:
    return _recorder.get() is None and os.environ.get("TRITON_INTERPRET") == "1"


def _shared_memory(device: torch.device) -> int:
    recorder = _recorder.get()
    if recorder is not None:
        return recorder.shared_memory
    return _device_shared_memory(device)


@functools.cache
def _device_shared_memory(device: torch.device) -> int:
    if device.type != "cuda":
        return _MEDIUM
    properties = torch.cuda.get_device_properties(device)
    # ROCm has no opt-in limit.
    return int(getattr(properties, "shared_memory_per_block_optin", 0) or properties.shared_memory_per_block)


def _block(size: int, least: int, most: int) -> int:
    """The power of two in [least, most] that covers size, if one does."""
    return max(least, min(most, 1 << max(size - 1, 0).bit_length()))


def _splits(programs: int, steps: int, least_steps: int, wanted: int = _WANTED_PROGRAMS) -> tuple[int, int]:
    """(splits, steps_per_split) of a loop: enough to fill the GPU, none empty or far shorter than least_steps."""
    splits = max(1, min(wanted // programs, steps // least_steps))
    steps_per_split = triton.cdiv(steps, splits)
    return triton.cdiv(steps, steps_per_split), steps_per_split


def shrink(xs: Sequence[Tensor], sizes: Sequence[int], *, masked: bool) -> tuple[Config, int]:
    """Tiles of _shrink_kernel for segments of sizes[i] ranks, of one x [M, K] or of one each, and its splits of K.

    masked: the dropout mask is drawn, in registers that wide tiles would want as well.
    """
    M, K = xs[0].shape[0], max(x.shape[1] for x in xs)
    if _interpreted():
        splits, _ = _splits(_WANTED_PROGRAMS // 2, triton.cdiv(K, 64), 1)
        return {"BLOCK_M": 32, "BLOCK_K": 64, "BLOCK_R": 32}, splits
    # Fewer tokens: smaller tiles, so that more programs stream x.
    config = _shrink(xs[0], _block(M // 256, 16, 64), max(sizes), masked=masked)
    programs = triton.cdiv(M, config["BLOCK_M"]) * sum(triton.cdiv(size, config["BLOCK_R"]) for size in sizes)
    splits, _ = _splits(programs, triton.cdiv(K, config["BLOCK_K"]), 4, wanted=_WANTED_PROGRAMS // 2)
    return config, splits


def _shrink(x: Tensor, block_m: int, widest: int, *, masked: bool) -> Config:
    shared_memory = _shared_memory(x.device)
    if x.dtype == torch.float32:
        block_r = _block(widest, 16, 64)
        # The mask is kept in words of 32 columns.
        block_k, warps = (16 if block_r == 64 and not masked else 32, 8 if block_r == 64 else 4)
        return {"BLOCK_M": block_m, "BLOCK_K": block_k, "BLOCK_R": block_r, "num_warps": warps, "num_stages": 3}
    block_r = _block(widest, 16, 128)
    large = shared_memory >= _LARGE
    block_k = {
        16: 64 if masked else 128,
        32: 128 if large and not masked else 64,
        64: 32 if block_m == 16 else 64,
        128: 32,
    }[block_r]
    stages = 3 if large else 2
    return {"BLOCK_M": block_m, "BLOCK_K": block_k, "BLOCK_R": block_r, "num_warps": 4, "num_stages": stages}


def adapter_linear(
    x: Tensor,
    weights: Sequence[Tensor],
    R: int,
    *,
    fused: bool,
    two_products: bool,
    masked: bool,
    scaled: bool,
    plain: bool,
) -> Config:
    """Tiles of _adapter_linear_kernel for x [M, K], weights [N_i, K] and ranks up to R.

    masked: the dropout mask is drawn in the loop. scaled: the base product has a scale. plain: no operand beside x,
    weights, u and Bs.
    """
    # A third operand in the loop, or vectors behind it: only Hopper's matrix unit leaves registers for the widest tile,
    # and not for masks of ranks as well.
    hopper = _shared_memory(x.device) >= _HOPPER
    few_vectors = hopper and not (fused or scaled) and R % 16 == 0
    plain = not masked and ((plain and (hopper or not fused)) or few_vectors)
    Ns = [weight.shape[0] for weight in weights]
    wide = fused and (R > 32 or two_products)
    config = _product(
        x, x.shape[0], Ns, [x, *weights], two_products=two_products, masked=masked, plain=plain, wide=wide
    )
    if fused:
        # The whole rank at once.
        return {**config, "BLOCK_R": _block(R, 16, MOST_FUSED_RANKS)}
    # On the smaller GPUs, and with few tokens, ptxas holds a tile of 16 ranks to fewer registers than it needs; beside
    # a second product it is the tile of 32 ranks that does not fit.
    few = two_products and (config["BLOCK_N"] == 128 or (hopper and not _aligned([x, *weights])))
    least = 16 if few or (_shared_memory(x.device) >= _LARGE and x.shape[0] > 32) else 32
    return {"BLOCK_R": _block(R, least, 16 if few else 32), **config}


def adapter_linear_dx(
    dx: Tensor,
    dys: Sequence[Tensor],
    weights: Sequence[Tensor],
    R: int,
    *,
    two_products: bool,
    masked: bool,
    plain: bool,
) -> Config:
    """Tiles of _adapter_linear_dx_kernel for dx [M, K], dys [M, N_i], weights [N_i, K] and ranks up to R.

    masked: dropout hits the low-rank product. plain: no operand beside dys, weights, q and As.
    """
    # A loop for each member: only Hopper's matrix unit leaves registers for the widest tile.
    hopper = _shared_memory(dx.device) >= _HOPPER
    plain = not masked and ((plain and (hopper or len(dys) == 1)) or (hopper and R % 16 == 0))
    config = _product(
        dx,
        dx.shape[0],
        [dx.shape[1]],
        [*dys, *weights],
        two_products=two_products,
        masked=masked,
        plain=plain,
        wide=False,
    )
    shared_memory = _shared_memory(dx.device)
    small, short = shared_memory < _LARGE, dx.shape[0] <= 32
    # The widest tile leaves registers for a few ranks, and so does the deepest; a second product but on Hopper; and on
    # the smaller GPUs ptxas trades them for occupancy where tokens are few, on the larger ones of that time beside a
    # mask.
    widest = config["BLOCK_N"] == 256 or (config["BLOCK_K"] == 128 and not short)
    few = widest or (two_products and shared_memory < _HOPPER) or (small and short)
    many = small or short or (masked and shared_memory < _HOPPER and config["BLOCK_M"] == 64)
    return {"BLOCK_R": _block(R, 32 if many and not few else 16, 16 if few else 32), **config}


def _aligned(tensors: Sequence[Tensor]) -> bool:
    """Whether every row, or every column, begins on a boundary of 16 elements, so that a thread loads 16 bytes."""
    return all(stride == 1 or stride % 16 == 0 for tensor in tensors for stride in tensor.stride())


def _product(
    x: Tensor,
    M: int,
    Ns: Sequence[int],
    operands: Sequence[Tensor],
    *,
    two_products: bool,
    masked: bool,
    plain: bool,
    wide: bool,
) -> Config:
    """Tiles of a product of M rows and N_i columns, in x's dtype.

    wide: its loop also has a product of many ranks, or of any ranks beside two others.
    """
    if _interpreted():
        return {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 64, "BLOCK_R": 32, "GROUP_M": 2}

    def programs(block_n: int) -> int:
        count: int = triton.cdiv(M, 128) * sum(triton.cdiv(N, block_n) for N in Ns)
        return count

    shared_memory = _shared_memory(x.device)
    # A multiprocessor must have some 26 KB of the weight under way to keep an H200's memory busy: deep tiles have 32 KB
    # and more.
    deep = shared_memory >= _HOPPER and not (wide or two_products or masked)
    tiles: Config
    if x.dtype == torch.float32:
        # IEEE fp32 has no matrix unit on NVIDIA: the tile is bound by registers.
        tiles = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 16, "BLOCK_R": 16, "num_warps": 8, "num_stages": 2}
    elif not _aligned(operands):
        # Every element has a load, an address and a mask of its own.
        tiles = {"BLOCK_M": 32, "BLOCK_N": 64, "BLOCK_K": 32, "num_warps": 4, "num_stages": 2}
    elif M <= 32:
        # A few tokens: as many programs as it takes to stream the weight.
        block_n = 64 if two_products or programs(64) >= _WANTED_PROGRAMS // 4 else 32
        block_k, stages = 32 if wide or block_n == 64 else 64, 4 if shared_memory >= _MEDIUM else 3
        if deep:
            block_k, stages = 128, 5
        block_m = _block(M, 32 if two_products else 16, 32)
        tiles = {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k, "num_warps": 4, "num_stages": stages}
    elif two_products and wide:
        # A third accumulator.
        tiles = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32, "num_warps": 4, "num_stages": 3}
    elif programs(128) < _WANTED_PROGRAMS // 4:
        block_k, stages = 32 if wide or two_products else 64, 3
        if deep and M <= 64:
            # At most one of its programs runs on a multiprocessor.
            block_k, stages = 128, 4
        tiles = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": block_k, "num_warps": 4, "num_stages": stages}
    elif plain and not two_products and shared_memory >= _LARGE and programs(256) >= _WANTED_PROGRAMS // 2:
        tiles = {"BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3}
    else:
        # Two accumulators and the left operand in registers: only Hopper's matrix unit leaves room for the wider tile.
        block_n = 64 if (two_products or wide) and shared_memory < _HOPPER else 128
        block_k = 64 if shared_memory >= _LARGE else 32
        tiles = {"BLOCK_M": 128, "BLOCK_N": block_n, "BLOCK_K": block_k, "num_warps": 8, "num_stages": 3}
    return {**tiles, "GROUP_M": 16}


def output_grads(dys: Sequence[Tensor], R: int, *, want_q: bool, vector_sums: bool) -> tuple[Config, int, int]:
    """Tiles of _output_grads_kernel for dys [M, N_i], and (splits, steps_per_split) of the loop over tokens.

    With want_q one tile holds all R ranks. Wide tiles keep the parts of q few, long walks those of the other sums.
    """
    M, Ns = dys[0].shape[0], [dy.shape[1] for dy in dys]
    if _interpreted():
        config = {"BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_R": 32}
        return config, *_splits(_WANTED_PROGRAMS // 2, triton.cdiv(M, 16), 1)
    rank, shared_memory = _block(R, 16, 128), _shared_memory(dys[0].device)
    middle = _LARGE <= shared_memory < _HOPPER
    if dys[0].dtype == torch.float32 and want_q:
        stages = 1 if middle and rank == 32 else 2
        config = {"BLOCK_M": 16, "BLOCK_N": 128, "BLOCK_R": rank, "num_warps": 8, "num_stages": stages}
    elif dys[0].dtype == torch.float32:
        stages = 3 if middle else 2
        config = {"BLOCK_M": 32, "BLOCK_N": 64, "BLOCK_R": min(rank, 64), "num_warps": 4, "num_stages": stages}
    elif want_q:
        # The sums of vectors are as large as the tile; and the smallest shared memory goes with the fewest registers.
        block_m = 16 if vector_sums or shared_memory < _MEDIUM else 32
        crowded = vector_sums and (rank > 16 or R % 16 > 0)  # masks of ranks take registers too
        block_n = 256 if crowded or shared_memory < _MEDIUM else 512
        stages = 3 if shared_memory >= _LARGE else 2
        config = {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_R": rank, "num_warps": 8, "num_stages": stages}
    else:
        block_m = 32 if vector_sums else 64
        stages = 2 if vector_sums and (shared_memory < _LARGE or (middle and rank == 64)) else 3
        config = {"BLOCK_M": block_m, "BLOCK_N": 64, "BLOCK_R": rank, "num_warps": 4, "num_stages": stages}
    programs = sum(triton.cdiv(N, config["BLOCK_N"]) for N in Ns) * max(triton.cdiv(R, config["BLOCK_R"]), 1)
    steps = triton.cdiv(M, config["BLOCK_M"])
    return config, *_splits(programs, steps, 4, wanted=_WANTED_PROGRAMS // 4)


def input_grads(x: Tensor, R: int) -> tuple[Config, int, int]:
    """Tiles of _input_grads_kernel for x [M, K] and R ranks, and (splits, steps_per_split) of its loop over tokens.

    BLOCK: the elements of a block of sums that the launch completes.
    """
    M, K = x.shape
    if _interpreted():
        config = {"BLOCK_M": 16, "BLOCK_K": 64, "BLOCK_R": 32, "BLOCK": 256}
        return config, *_splits(1, triton.cdiv(M, 16), 1, wanted=2)
    rank = _block(R, 16, 64)
    # Narrow, so that there are enough programs without a split of the tokens and its second stage.
    block_k = 32 if triton.cdiv(K, 32) * triton.cdiv(R, rank) >= _WANTED_PROGRAMS // 8 else 16
    before_hopper = _shared_memory(x.device) < _HOPPER
    crowded = before_hopper and (block_k == 32 or (rank == 64 and not _aligned([x])))
    # ptxas holds the narrow tile of 32 ranks to fewer registers than three stages of it need.
    fewer = block_k == 16 and rank == 32 and _LARGE <= _shared_memory(x.device) < _HOPPER
    block_m, stages = (32, 2) if x.dtype == torch.float32 else (64 if crowded else 128, 2 if fewer else 3)
    tiles = {"BLOCK_M": block_m, "BLOCK_K": block_k, "BLOCK_R": rank, "BLOCK": 512}
    # Every element of an x that is not aligned has an address of its own: more threads share them.
    warps = 8 if block_m == 128 and rank == 64 and not _aligned([x]) else 4
    programs = triton.cdiv(K, block_k) * triton.cdiv(R, rank)
    splits = _splits(programs, triton.cdiv(M, block_m), 1024 // block_m, wanted=_WANTED_PROGRAMS // 4)
    return {**tiles, "num_warps": warps, "num_stages": stages}, *splits


def expert_shrink(x: Tensor, E: int, R: int) -> Config:
    """Tiles of _expert_shrink_kernel for x [S, K] of E experts and R ranks."""
    if _interpreted():
        return {"BLOCK_M": 16, "BLOCK_K": 64, "BLOCK_R": 32}
    config = _shrink(x, _block(x.shape[0] // max(E, 256), 16, 64), R, masked=False)
    if x.dtype == torch.float32:
        config["num_stages"] = 2  # where an expert begins takes registers as well
    return config


def expert_product(y: Tensor, operands: Sequence[Tensor], E: int, R: int, *, two_products: bool) -> Config:
    """Tiles of _expert_product_kernel for y [S, N] of E experts and R ranks, by the rows that an expert has on average.

    operands: those of the base product, the rows first.
    """
    S, N = y.shape
    config = _product(
        operands[0], max(S // E, 1), [N] * E, operands, two_products=two_products, masked=False, plain=False, wide=False
    )
    # Two accumulators, or no matrix unit: what lies behind the loop takes registers too.
    small = operands[0].dtype == torch.float32 and _shared_memory(y.device) < _HOPPER
    if not _interpreted():
        config["BLOCK_N"] = min(config["BLOCK_N"], 32 if small else 64 if two_products else 128)
    return {"BLOCK_R": _block(R, 16, 32), **config}


def expert_grads(wide: Tensor, R: int, *, vector_sums: bool) -> Config:
    """Tiles of _expert_grads_kernel for wide [S, N] and R ranks."""
    if _interpreted():
        return {"BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_R": 32}
    full, shared_memory = wide.dtype == torch.float32, _shared_memory(wide.device)
    block_m = 32 if vector_sums or full or shared_memory < _LARGE else 64
    # Sums of four kinds: more threads share them. AMD's warps are wider, and its loads would be narrower.
    warps = 4 if shared_memory < _MEDIUM and not full else 8
    tiles = {"BLOCK_M": block_m, "BLOCK_N": 64, "BLOCK_R": _block(R, 16, 32), "num_warps": warps}
    return {**tiles, "num_stages": 3 if shared_memory >= _HOPPER and not full else 2}


def hadamard_linear(x: Tensor, operands: Sequence[Tensor], N: int, Q: int) -> Config:
    """Tiles of _hadamard_linear_kernel for x [M, K], N columns of the product and the rank Q of U V."""
    if _interpreted():
        return {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 64, "BLOCK_Q": 16, "BLOCK_R": 16, "GROUP_M": 2}
    M, shared_memory = x.shape[0], _shared_memory(x.device)
    tiles: Config
    if x.dtype == torch.float32:
        tiles = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32, "num_warps": 8, "num_stages": 2}
    elif not _aligned(operands):
        tiles = {"BLOCK_M": 32, "BLOCK_N": 64, "BLOCK_K": 32, "num_warps": 4, "num_stages": 2}
    elif M <= 32:
        tiles = {"BLOCK_M": _block(M, 16, 32), "BLOCK_N": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 3}
    elif triton.cdiv(M, 128) * triton.cdiv(N, 128) < _WANTED_PROGRAMS // 4:
        tiles = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 3}
    else:
        # The rebuilt tile is in registers: only Hopper's matrix unit, whose right operand is not, leaves them for 64.
        block_k = 64 if shared_memory >= _HOPPER else 32
        tiles = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": block_k, "num_warps": 8, "num_stages": 3}
    # More ranks of U V are taken in steps: fp32 and the smaller shared memories leave room for few.
    small = shared_memory < _LARGE
    most = 16 if x.dtype == torch.float32 else 32 if small else 64
    block_q = _block(Q, 16, most)
    room = 32 * 32 if small else 64 * 32 if shared_memory < _HOPPER else 64 * 64
    if tiles["BLOCK_M"] >= (64 if small else 128) and block_q * tiles["BLOCK_K"] >= room:
        tiles["num_stages"] = 2  # a third does not fit beside U and V, or leaves them too few registers
    return {"BLOCK_Q": block_q, "BLOCK_R": 16, **tiles, "GROUP_M": 16}


def hadamard_grads(x: Tensor, operands: Sequence[Tensor]) -> Config:
    """Tiles of _hadamard_grads_kernel for x [M, K] and dy [M, N]."""
    if _interpreted():
        return {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 64, "BLOCK_Q": 16, "GROUP_N": 2}
    tiles: Config
    if x.dtype == torch.float32:
        tiles = {"BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": 64, "num_warps": 8, "num_stages": 2}
    elif not _aligned(operands):
        tiles = {"BLOCK_M": 32, "BLOCK_N": 64, "BLOCK_K": 32, "num_warps": 4, "num_stages": 2}
    else:
        # Wide tiles keep the parts of both gradients few.
        block_m = 64 if _shared_memory(x.device) >= _LARGE else 32
        tiles = {"BLOCK_M": block_m, "BLOCK_N": 128, "BLOCK_K": 128, "num_warps": 8, "num_stages": 3}
    # More ranks at once do not fit beside the tile of gradients on AMD.
    return {**tiles, "BLOCK_Q": 16, "GROUP_N": 16}


def _bottleneck(v: Tensor, down: Tensor, operands: Sequence[Tensor]) -> Config:
    """Tiles of the bottleneck's kernels, which hold the whole hidden of BLOCK_M tokens."""
    M, block_h = v.shape[0], _block(down.shape[0], 16, MOST_HIDDEN)
    if _interpreted():
        return {"BLOCK_M": 32, "BLOCK_N": 64, "BLOCK_K": 64, "BLOCK_H": block_h}
    # Fewer tokens: smaller tiles, so that more programs stream them.
    block_m = _block(M // 256, 16, 64)
    wide, aligned = block_h == 128, _aligned(operands)
    tiles: Config
    if v.dtype == torch.float32:
        block_m = 16 if wide else min(block_m, 32)
        tiles = {"BLOCK_M": block_m, "BLOCK_N": 32, "BLOCK_K": 16, "num_warps": 8, "num_stages": 2}
    elif wide and aligned and block_m > 16:
        # The hidden, its slope and its gradient are as wide: more threads share them. AMD's matrix unit takes 64 tokens
        # or 16; 32 of them spill.
        tiles = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32, "num_warps": 8, "num_stages": 2}
    elif wide or not aligned:
        # Every element may have a load, an address and a mask of its own.
        block_m, warps = (16, 8) if wide else (min(block_m, 32), 4)
        tiles = {"BLOCK_M": block_m, "BLOCK_N": 32, "BLOCK_K": 32, "num_warps": warps, "num_stages": 2}
    else:
        stages = 3 if _shared_memory(v.device) >= _LARGE else 2
        tiles = {"BLOCK_M": block_m, "BLOCK_N": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": stages}
    return {"BLOCK_H": block_h, **tiles}


def bottleneck(v: Tensor, down: Tensor, up: Tensor, residual: Tensor | None) -> Config:
    """Tiles of _bottleneck_kernel for v [M, K], down [H, K], up [N, H / groups] and residual [M, N]."""
    return _bottleneck(v, down, [v, down, up] if residual is None else [v, down, up, residual])


def bottleneck_backward(dy: Tensor, v: Tensor, down: Tensor, up: Tensor) -> Config:
    """Tiles of _bottleneck_backward_kernel for dy [M, N], v [M, K], down [H, K] and up [N, H / groups]."""
    config = _bottleneck(v, down, [dy, v, down, up])
    if dy.dtype != v.dtype and config["BLOCK_H"] == 64:
        config["BLOCK_M"] = min(config["BLOCK_M"], 32)  # a gradient of 32 bits takes twice the registers
    return config


def weight_norm(R: int) -> Config:
    """Tiles of _weight_norm_kernel for B [N, R]."""
    if _interpreted():
        return {"BLOCK_N": 32, "BLOCK_R": 32}
    block_r = _block(R, 16, 32)
    return {"BLOCK_N": 512 // block_r, "BLOCK_R": block_r, "num_warps": 4, "num_stages": 2}


def row_squares() -> Config:
    """Tiles of _row_squares_kernel."""
    if _interpreted():
        return {"BLOCK_N": 32, "BLOCK_K": 64}
    return {"BLOCK_N": 4, "BLOCK_K": 1024, "num_warps": 4, "num_stages": 2}


def multi_shrink(x: Tensor, block_m: int, max_rank: int) -> tuple[Config, int]:
    """Tiles of _multi_shrink_kernel for x [M, K] cut into block_m places and ranks up to max_rank; its splits of K."""
    M, K = x.shape
    if _interpreted():
        splits, _ = _splits(1, triton.cdiv(K, 64), 1)
        return {"BLOCK_M": block_m, "BLOCK_K": 64, "BLOCK_R": 64}, splits
    if block_m == 1:
        # The sum is taken at the end: until then its parts lie in registers.
        tiles = {"BLOCK_K": 128, "BLOCK_R": 16, "num_warps": 4, "num_stages": 2}
    elif x.dtype == torch.float32:
        # ptxas holds the larger tile to fewer registers than 16 ranks need.
        block_r = _block(max_rank, 16 if block_m == 16 else 32, 32)
        tiles = {"BLOCK_K": 32, "BLOCK_R": block_r, "num_warps": 4, "num_stages": 2}
    else:
        stages = 3 if _shared_memory(x.device) >= _LARGE else 2
        tiles = {"BLOCK_K": 64, "BLOCK_R": _block(max_rank, 16, 64), "num_warps": 4, "num_stages": stages}
    programs = triton.cdiv(M, block_m) * triton.cdiv(max_rank, tiles["BLOCK_R"])
    splits, _ = _splits(programs, triton.cdiv(K, tiles["BLOCK_K"]), 4, wanted=_WANTED_PROGRAMS // 2)
    return {"BLOCK_M": block_m, **tiles}, splits


def multi_expand(y: Tensor, block_m: int) -> Config:
    """Tiles of _multi_expand_kernel for y [M, N] cut into block_m places."""
    if _interpreted():
        return {"BLOCK_M": block_m, "BLOCK_N": 64, "BLOCK_R": 64}
    # Few threads where the tile is small: ptxas holds many to fewer registers than they need, but in fp32 on sm_80.
    if block_m == 1:
        tiles = {"BLOCK_N": 64, "BLOCK_R": 32, "num_warps": 2}
    elif block_m == 16:
        middle = _LARGE <= _shared_memory(y.device) < _HOPPER
        tiles = {"BLOCK_N": 128, "BLOCK_R": 16, "num_warps": 8 if middle and y.dtype == torch.float32 else 4}
    else:
        # Vectors by token are tiles too: few elements a thread leave registers for all of them.
        tiles = {"BLOCK_N": 64, "BLOCK_R": 16 if y.dtype == torch.float32 else 32, "num_warps": 8}
    # With a third stage ptxas grants more registers, where there is room for it.
    deep = block_m == 64 and y.dtype != torch.float32 and _LARGE <= _shared_memory(y.device) < _HOPPER
    return {"BLOCK_M": block_m, **tiles, "num_stages": 3 if deep else 2}


def dropout_mask() -> Config:
    """Tiles of _dropout_mask_kernel."""
    if _interpreted():
        return {"BLOCK_M": 64, "BLOCK_K": 64}
    return {"BLOCK_M": 32, "BLOCK_K": 128, "num_warps": 4, "num_stages": 1}


def sum_partials() -> Config:
    """Tile of _sum_partials_kernel."""
    if _interpreted():
        return {"BLOCK": 256}
    return {"BLOCK": 512, "num_warps": 4, "num_stages": 3}
