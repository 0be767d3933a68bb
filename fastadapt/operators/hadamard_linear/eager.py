"""The eager product with a recomposed weight W0 ⊙ (1 + U V), rebuilt block by block: nothing of size [N, K] is made.

A block is rebuilt in memory that the next one reuses and that stays in the cache until its product has read it: rows of
W0 forward, columns backward, so that no sum over features is cut into blocks.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ..arithmetic import cast, factor_products, sum_dtype
from .parameters import Grads, HadamardLayer, Outputs, Wants

# What the block of a recomposed weight may take, and the fewest rows or columns of it that a product runs well with.
_BLOCK_BYTES = 8 << 20
_LEAST_BLOCK = 64


def _blocks(count: int, length: int, dtype: torch.dtype) -> Iterator[slice]:
    """Slices of `count` rows (or columns) that have `length` elements each."""
    size = max(_LEAST_BLOCK, _BLOCK_BYTES // max(1, length * dtype.itemsize))
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def _rebuilt(weight: Tensor, U: Tensor, V: Tensor, base: bool, memory: Tensor) -> Tensor:
    """(weight or 0) + weight ⊙ (U V) in weight's dtype, computed in `memory`, which has at least its size."""
    block = torch.mm(U, V, out=memory[: U.shape[0] * V.shape[1]].view(U.shape[0], V.shape[1]))
    if base:
        return torch.addcmul(weight, weight, block, out=block)
    return cast(block.mul_(weight), weight.dtype)


def _adds_base(weight: Tensor, base: bool) -> bool:
    """Whether the blocks contain W0 itself: in 16 bits W0 (1 + U V) is W0 wherever U V is below half an ulp of 1."""
    return base and weight.dtype == sum_dtype(weight)


def _block_memory(weight: Tensor, blocks: list[slice], length: int) -> Tensor:
    size = max([block.stop - block.start for block in blocks], default=0)
    return torch.empty(size * length, dtype=sum_dtype(weight), device=weight.device)


def hadamard_linear(x: Tensor, layer: HadamardLayer) -> Outputs:
    """y = ((W0 or 0) + W0 ⊙ (U V)) x + B u + β and u = A x, None without A."""
    weight, U, V, A, B, bias, base = layer
    n, k = weight.shape
    u = None
    if A is not None and B is not None:
        u = F.linear(x, cast(A, x.dtype))
        y = F.linear(u, cast(B, x.dtype), None if bias is None else cast(bias, x.dtype))
    else:
        y = torch.zeros(x.shape[0], n, dtype=x.dtype, device=x.device)
        if bias is not None:
            y += bias
    inside = _adds_base(weight, base)
    if base and not inside:
        y.addmm_(x, weight.T)
    U, V = cast(U, sum_dtype(x)), cast(V, sum_dtype(x))
    blocks = list(_blocks(n, k, U.dtype))
    memory = _block_memory(weight, blocks, k)
    for rows in blocks:
        y[:, rows].addmm_(x, _rebuilt(weight[rows], U[rows], V, inside, memory).T)
    return Outputs(y, u)


def _add_factor_grads(
    dU: Tensor, dV: Tensor, dy: Tensor, x: Tensor, weight: Tensor, U: Tensor, V: Tensor, memory: Tensor
) -> None:
    """dU += (G ⊙ W0) Vᵀ and dV = Uᵀ (G ⊙ W0) with G = dyᵀ x, for some columns of x, W0 and V; G is in `memory`."""
    if dy.dtype == memory.dtype:
        grad = torch.mm(dy.T, x, out=memory[: weight.numel()].view(weight.shape))
    else:
        grad = cast(dy.T @ x, memory.dtype)
    grad.mul_(weight)
    dU.addmm_(grad, V.T)
    torch.mm(U.T, grad, out=dV)


def _begun_input_grad(dy: Tensor, q: Tensor | None, layer: HadamardLayer, inside: bool) -> Tensor:
    """dx as far as it does not go through the blocks: q A, and dy W0 where that is not part of them."""
    if q is not None and layer.A is not None:
        dx = q @ cast(layer.A, dy.dtype)
    else:
        dx = torch.zeros(dy.shape[0], layer.weight.shape[1], dtype=dy.dtype, device=dy.device)
    return dx.addmm_(dy, layer.weight) if layer.base and not inside else dx


def hadamard_linear_backward(
    dy: Tensor, layer: HadamardLayer, x: Tensor | None, u: Tensor | None, wants: Wants
) -> Grads:
    """The gradients that are wanted, dB where u is given. One pass over the blocks of W0 serves dx, dU and dV."""
    weight, U, V, A, B, _, base = layer
    dtype, inside = sum_dtype(dy), _adds_base(weight, base)
    q = dy @ cast(B, dy.dtype) if A is not None and B is not None and (wants.x or wants.A) else None
    dx = _begun_input_grad(dy, q, layer, inside) if wants.x else None
    dU = torch.zeros(U.shape, dtype=dtype, device=dy.device) if wants.factors else None
    dV = torch.empty(V.shape, dtype=dtype, device=dy.device) if wants.factors else None
    U, V = cast(U, dtype), cast(V, dtype)
    blocks = list(_blocks(weight.shape[1], weight.shape[0], dtype)) if wants.x or wants.factors else []
    memory = _block_memory(weight, blocks, weight.shape[0])
    for columns in blocks:
        block = weight[:, columns]
        if dx is not None:
            dx[:, columns].addmm_(dy, _rebuilt(block, U, V[:, columns], inside, memory))
        if dU is not None and dV is not None and x is not None:
            # What was rebuilt has been read: its memory is free for G.
            _add_factor_grads(dU, dV[:, columns], dy, x[:, columns], block, U, V[:, columns], memory)
    return Grads(
        dx,
        dU,
        dV,
        cast(q.T @ x, dtype) if wants.A and q is not None and x is not None else None,
        factor_products(dy, u, 1.0) if u is not None else None,
        dy.sum(0, dtype=dtype) if wants.bias else None,
    )
