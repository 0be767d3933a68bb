"""Row norms of W0 + s B A from products of size [N, r] and [r, r]: B A is never formed."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .launch import prepared
from .shrink import contract
from .tiles import load_tile


@triton.jit
def _row_squares_kernel(
    weight,  # [N, K]
    squares,  # [N]
    N,
    K,
    stride_wn,
    stride_wk,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
    for start in range(0, K, BLOCK_K):
        columns = start + tl.arange(0, BLOCK_K)
        tile = load_tile(weight, rows, columns, N, K, stride_wn, stride_wk).to(tl.float32)  # [BLOCK_N, BLOCK_K]
        acc += tile * tile
    tl.store(squares + rows, tl.sum(acc, axis=1), mask=rows < N)


@triton.jit
def _weight_norm_kernel(
    base_squared,  # [N]
    WA,  # [N, R], contiguous
    B,  # [N, R]
    gram,  # [R, R], contiguous: A Aᵀ
    norm,  # [N]
    N,
    R,
    stride_bn,
    stride_br,
    scaling,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    cross = tl.zeros((BLOCK_N,), dtype=tl.float32)
    square = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for start in range(0, R, BLOCK_R):
        ranks = start + tl.arange(0, BLOCK_R)
        B_tile = load_tile(B, rows, ranks, N, R, stride_bn, stride_br).to(tl.float32)  # [BLOCK_N, BLOCK_R]
        WA_tile = load_tile(WA, rows, ranks, N, R, R, 1)
        cross += tl.sum(B_tile * WA_tile, axis=1)
        # This step's columns of B (A Aᵀ).
        product = tl.zeros((BLOCK_N, BLOCK_R), dtype=tl.float32)
        for inner_start in range(0, R, BLOCK_R):
            inner = inner_start + tl.arange(0, BLOCK_R)
            B_inner = load_tile(B, rows, inner, N, R, stride_bn, stride_br).to(tl.float32)
            gram_tile = load_tile(gram, inner, ranks, R, R, R, 1)  # [BLOCK_R, BLOCK_R]
            product = tl.dot(B_inner, gram_tile, product, input_precision="ieee")
        square += tl.sum(product * B_tile, axis=1)
    total = tl.load(base_squared + rows, mask=rows < N, other=0.0) + scaling * (2.0 * cross + scaling * square)
    # Rounding can leave a row that the adapter cancels slightly below 0. Unlike a maximum, this keeps NaN.
    tl.store(norm + rows, tl.sqrt_rn(tl.where(total < 0.0, 0.0, total)), mask=rows < N)


def row_squares(weight: Tensor) -> Tensor:
    """Σ_k weight², row by row, in fp32: the constant of weight_norm.

    Shapes: weight [N, K], any strides; result [N] fp32.
    """
    N, K = weight.shape
    squares = torch.empty(N, dtype=torch.float32, device=weight.device)
    if N > 0:
        config = configs.row_squares()
        arguments = {
            "weight": weight,
            "squares": squares,
            "N": N,
            "K": K,
            "stride_wn": weight.stride(0),
            "stride_wk": weight.stride(1),
        }
        configs.launch(_row_squares_kernel, (triton.cdiv(N, config["BLOCK_N"]),), arguments, config)
    return squares


@prepared
def weight_norm(weight: Tensor, A: Tensor, B: Tensor, scaling: float, base_squared: Tensor) -> tuple[Tensor, Tensor]:
    """(n, WA): n_j = ‖(W0 + s·B·A)_j‖₂ and WA = W0 Aᵀ, which the gradient of n needs as well.

    n² = base_squared + 2 s rowsum(B ⊙ WA) + s² rowsum((B (A Aᵀ)) ⊙ B), clamped at 0. A 16-bit weight does not cost
    accuracy: A then enters the dot as two 16-bit parts.
    Shapes: weight [N, K]; A [R, K] and B [N, R], fp32 or weight's dtype; base_squared [N] fp32 from row_squares; n [N]
    fp32; WA [N, R] fp32. Any strides; R may be 0.
    """
    N = weight.shape[0]
    R = A.shape[0]
    norm = torch.empty(N, dtype=torch.float32, device=weight.device)
    WA = contract(weight, A, out_dtype=torch.float32, exact_A=True)
    gram = contract(A, A, out_dtype=torch.float32)
    if N > 0:
        config = configs.weight_norm(R)
        arguments = {
            "base_squared": base_squared.contiguous(),
            "WA": WA,
            "B": B,
            "gram": gram,
            "norm": norm,
            "N": N,
            "R": R,
            "stride_bn": B.stride(0),
            "stride_br": B.stride(1),
            "scaling": scaling,
        }
        configs.launch(_weight_norm_kernel, (triton.cdiv(N, config["BLOCK_N"]),), arguments, config)
    return norm, WA
