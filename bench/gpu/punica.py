"""A pair of Triton kernels for many LoRA adapters in one batch, as the papers of Punica and S-LoRA describe it.

Tokens are sorted by adapter. The grid has an axis of adapters, and programs beyond an adapter's tokens leave at once;
u = x Aᵀ is summed over splits of K by atomics into fp32, then y += s u Bᵀ is added in place. All adapters have one
rank and lie in one stack. Punica: arXiv:2310.18547, S-LoRA: arXiv:2311.03285. Written for this bench.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK_M, _BLOCK_K, _BLOCK_N = 16, 128, 128
_SPLITS = 8


class Segments(NamedTuple):
    """The tokens of a batch by adapter: order [M], starts [adapters + 1], and the most that one adapter has."""

    order: Tensor
    starts: Tensor
    longest: int

    @classmethod
    def of(cls, adapter_of_token: Sequence[int], adapters: int, device: torch.device) -> Segments:
        ids = torch.tensor(adapter_of_token)
        counts = torch.bincount(ids, minlength=adapters)
        starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        order = torch.argsort(ids, stable=True)
        return cls(order.to(device, torch.int32), starts.to(device, torch.int32), int(counts.max()))


@triton.jit
def _tokens(order, starts, BLOCK_M: tl.constexpr):
    """(places, tokens, inside) of this program's tile of its adapter's tokens."""
    adapter = tl.program_id(2)
    places = tl.load(starts + adapter) + tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = places < tl.load(starts + adapter + 1)
    return places, tl.load(order + places, mask=inside, other=0).to(tl.int64), inside


@triton.jit
def _shrink_kernel(
    x,  # [M, K]
    A,  # [adapters, R, K]
    u,  # [M, R], zeros, by place
    order,
    starts,
    K,
    R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLITS: tl.constexpr,
):
    places, tokens, inside = _tokens(order, starts, BLOCK_M)
    if tl.max(inside.to(tl.int32), 0) == 0:
        return
    ranks = tl.arange(0, R)
    own = A + tl.program_id(2).to(tl.int64) * R * K
    acc = tl.zeros((BLOCK_M, R), dtype=tl.float32)
    for start in range(tl.program_id(1) * BLOCK_K, K, SPLITS * BLOCK_K):
        columns = start + tl.arange(0, BLOCK_K)
        x_tile = tl.load(
            x + tokens[:, None] * K + columns[None, :], mask=inside[:, None] & (columns < K)[None, :], other=0.0
        )
        A_tile = tl.load(own + ranks[None, :] * K + columns[:, None], mask=(columns < K)[:, None], other=0.0)
        acc = tl.dot(x_tile, A_tile, acc)
    tl.atomic_add(u + places[:, None] * R + ranks[None, :], acc, mask=inside[:, None])


@triton.jit
def _expand_kernel(
    u,
    B,  # [adapters, N, R]
    y,  # [M, N]
    order,
    starts,
    scaling,
    N,
    R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    places, tokens, inside = _tokens(order, starts, BLOCK_M)
    if tl.max(inside.to(tl.int32), 0) == 0:
        return
    ranks = tl.arange(0, R)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    own = B + tl.program_id(2).to(tl.int64) * N * R
    u_tile = tl.load(u + places[:, None] * R + ranks[None, :], mask=inside[:, None], other=0.0)
    B_tile = tl.load(own + columns[None, :] * R + ranks[:, None], mask=(columns < N)[None, :], other=0.0)
    added = tl.dot(u_tile.to(B_tile.dtype), B_tile) * scaling
    target = y + tokens[:, None] * N + columns[None, :]
    mask = inside[:, None] & (columns < N)[None, :]
    tl.store(target, tl.load(target, mask=mask, other=0.0) + added.to(y.dtype.element_ty), mask=mask)


def add_adapters(y: Tensor, x: Tensor, A: Tensor, B: Tensor, segments: Segments, scaling: float) -> Tensor:
    """y [M, N] plus s B_a A_a x of every token's adapter a, in place; x [M, K], A [adapters, R, K], B [adapters, N, R].

    R must be a power of two, 16 at least.
    """
    adapters, R, K = A.shape
    N = B.shape[1]
    u = torch.zeros(x.shape[0], R, dtype=torch.float32, device=x.device)
    tiles = triton.cdiv(segments.longest, _BLOCK_M)
    _shrink_kernel[tiles, _SPLITS, adapters](
        x, A, u, segments.order, segments.starts, K, R, _BLOCK_M, _BLOCK_K, _SPLITS
    )
    _expand_kernel[tiles, triton.cdiv(N, _BLOCK_N), adapters](
        u, B, y, segments.order, segments.starts, scaling, N, R, _BLOCK_M, _BLOCK_N
    )
    return y
