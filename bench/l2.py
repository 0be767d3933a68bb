"""What a GEMM moves past L2: its tiles in the order of its programs, through a least-recently-used cache.

As many programs as there are multiprocessors run at once and in step: along the contraction, each wave touches the
tiles of every row and column that it holds, then writes its outputs. Calibrated against the published counters of
LoRAFusion, whose two GEMMs have the tiles and the order modelled here: see PUBLISHED_GIB and tests/test_traffic.py.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import NamedTuple

from fastadapt.operators.adapter_linear.devices import Device

# What a GEMM may hold of L2 beside what streams through it.
_SHARE = 0.75

# Tiles along the contraction are followed in chunks of this many elements: finer ones change nothing but the time.
_CHUNK = 256

# DRAM reads and writes of one LoRA layer, forward and backward with dropout, in GiB, as LoRAFusion's authors counted
# them on an H100 (benchmarks_paper/plots/evaluation-fig-7-kernel-ncu-profile.py of its repository; arXiv:2510.00206):
# 8192 tokens, K = N -> (PyTorch's operations, LoRAFusion's kernels).
PUBLISHED_GIB = {4096: (2.008, 1.258), 5120: (2.771, 1.836), 8192: (5.289, 4.044)}


class Gemm(NamedTuple):
    """A GEMM as it is launched: [M, K] times [K, N], tiles of block_m x block_n, tile rows in groups of group_m.

    columns: N of each of the outputs that stand side by side. group_m = 1 is row-major order.
    """

    M: int
    columns: tuple[int, ...]
    K: int
    block_m: int
    block_n: int
    group_m: int
    itemsize: int = 2
    outputs: int = 1

    def order(self) -> Iterator[tuple[int, int]]:
        """(row tile, column tile) of every program, in the order of the kernels' `grouped_tile`."""
        tiles_m = -(-self.M // self.block_m)
        tiles_n = sum(-(-n // self.block_n) for n in self.columns)
        for first in range(0, tiles_m, self.group_m):
            rows = range(first, min(first + self.group_m, tiles_m))
            for column in range(tiles_n):
                for row in rows:
                    yield row, column

    @property
    def compulsory(self) -> int:
        """Bytes of both operands and of the output."""
        N = sum(self.columns)
        return self.itemsize * (self.M * self.K + N * self.K + self.outputs * self.M * N)


def reread_bytes(gemm: Gemm, device: Device) -> int:
    """Bytes that the operands are read beyond once each, because they have left L2 in between."""
    capacity = int(device.l2 * _SHARE)
    held: OrderedDict[tuple[str, int, int], int] = OrderedDict()
    size = read = 0

    def touch(key: tuple[str, int, int], count: int) -> int:
        nonlocal size
        if key in held:
            held.move_to_end(key)
            return 0
        held[key] = count
        size += count
        while size > capacity:
            size -= held.popitem(last=False)[1]
        return count

    programs = list(gemm.order())
    # Tiles that hang over an edge are counted at the size of their part inside.
    heights = _sizes((gemm.M,), gemm.block_m)
    widths = _sizes(gemm.columns, gemm.block_n)
    for start in range(0, len(programs), device.multiprocessors):
        wave = programs[start : start + device.multiprocessors]
        rows, columns = sorted({row for row, _ in wave}), sorted({column for _, column in wave})
        for inner in range(0, gemm.K, _CHUNK):
            depth = gemm.itemsize * min(_CHUNK, gemm.K - inner)
            read += sum(touch(("left", row, inner), heights[row] * depth) for row in rows)
            read += sum(touch(("right", column, inner), widths[column] * depth) for column in columns)
        for row, column in wave:
            touch(("out", row, column), gemm.outputs * gemm.itemsize * heights[row] * widths[column])
    return read - gemm.itemsize * gemm.K * (gemm.M + sum(gemm.columns))


def _sizes(extents: tuple[int, ...], block: int) -> list[int]:
    return [min(block, extent - start) for extent in extents for start in range(0, extent, block)]
