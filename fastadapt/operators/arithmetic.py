"""PyTorch products and passes that the eager implementations share: the right dtype, few passes over memory."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

# Elementwise passes over [M, N] run in blocks of rows: that bounds their temporaries, in 16 bit also the fp32 ones that
# PyTorch makes when it multiplies by an fp32 scale.
_BLOCK_ELEMENTS = 1 << 20
# Products of fewer rows than this lose time to reading the weight again.
BLOCK_ROWS = 512

_HALVES = (torch.bfloat16, torch.float16)

# Elements up to which the number of operations is what takes time.
_SMALL = 1 << 15

# Rows whose fp32 copy stays in the cache.
_SUMMED_ROWS = 256

# Rows up to which a CPU multiplies thin matrices in fp32 sooner than in 16 bits, where each product is set up anew.
# Measured on an AMD EPYC with AVX512-BF16, r 16: 8 rows 3 to 6 us beside 12 to 19, 64 rows equal, 512 rows twice.
_THIN_ROWS = 48


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """tensor.to(dtype), sooner where there is nothing to do: a layer's step asks for a dozen such casts."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def sum_dtype(x: Tensor) -> torch.dtype:
    """The dtype of sums over tokens or features of x."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def thin_dtype(rows: int, dtype: torch.dtype, on_cpu: bool) -> torch.dtype:
    """The dtype of products of so many rows of `dtype` with factors of a low rank: theirs or a wider one."""
    return torch.float32 if on_cpu and dtype in _HALVES and rows <= _THIN_ROWS else dtype


def row_blocks(rows: int, columns: int) -> Iterator[slice]:
    size = max(BLOCK_ROWS, _BLOCK_ELEMENTS // max(1, columns))
    for start in range(0, rows, size):
        yield slice(start, min(start + size, rows))


def product(a: Tensor, b: Tensor, alpha: float, out: Tensor | None = None) -> Tensor:
    """alpha · a b. A scalar factor on a tensor would be an operator more, and a small one takes as long as its call."""
    if alpha == 1.0:
        return torch.mm(a, b, out=out)
    return torch.addmm(_ignored(a.dtype, a.device), a, b, beta=0.0, alpha=alpha, out=out)


@functools.cache
def _ignored(dtype: torch.dtype, device: torch.device) -> Tensor:
    """What addmm does not read when beta is 0."""
    return torch.zeros(1, dtype=dtype, device=device)


def add_product(y: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """y + a b, in place; y may be wider than the product."""
    return y.addmm_(a, b) if y.dtype == a.dtype else y.add_(torch.mm(a, b))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight, None if bias is None else cast(bias, x.dtype))


def add_scaled(y: Tensor, z: Tensor, scale: Tensor) -> Tensor:
    """y + scale ⊙ z, in place. Shapes: y and z [M, N]; scale [N]."""
    if scale.dtype == y.dtype:
        return y.addcmul_(z, scale)
    for rows in row_blocks(*y.shape):
        y[rows].add_(z[rows] * scale)
    return y


def scaled(v: Tensor, scale: Tensor, bias: Tensor | None, keep: bool) -> Tensor:
    """scale ⊙ v + bias; in v's memory unless v is to be kept. Shapes: v [M, N]; scale and bias [N]."""
    y = torch.empty_like(v) if keep else v
    if scale.dtype == v.dtype:
        return torch.mul(v, scale, out=y) if bias is None else torch.addcmul(cast(bias, v.dtype), v, scale, out=y)
    for rows in row_blocks(*v.shape):
        block = v[rows] * scale
        y[rows] = block if bias is None else block.add_(bias)
    return y


def scaled_rows(matrix: Tensor, scale: Tensor | None) -> Tensor:
    """diag(scale) matrix. Shapes: matrix [N, R]; scale [N]."""
    return matrix if scale is None else matrix * scale[:, None]


def factor_products(dy: Tensor, u: Tensor, scaling: float) -> Tensor:
    """P = scaling · dyᵀ u [N, R]. With many more rows than columns of u, MKL is faster with the transposed product."""
    if 8 * u.shape[1] < dy.shape[0]:
        return cast(product(u.t(), dy, scaling).t().contiguous(), sum_dtype(dy))
    return cast(product(dy.t(), u, scaling), sum_dtype(dy))


def factor_grads(
    P: Tensor,
    B: Tensor,
    mid_scale: Tensor | None,
    out_scale: Tensor | None,
    wants_B: bool,
    wants_mid: bool,
    wants_out: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dB = h ⊙ P ⊙ d, dd = colsum(h ⊙ B ⊙ P) and dh = rowsum(B ⊙ P ⊙ d), those that are wanted.

    h is out_scale, its vector part: the scalar part is in P = scaling · dyᵀ u. An absent scale is 1.
    Shapes: P and B [N, R]; mid_scale d [R]; out_scale h [N].
    """
    dB = dmid = dout = None
    if wants_B:
        dB = scaled_rows(P if mid_scale is None else P * mid_scale, out_scale)
    if wants_mid or wants_out:
        PB = P * B
        if wants_mid:
            dmid = PB.sum(0) if out_scale is None else cast(out_scale, PB.dtype) @ PB
        if wants_out:
            dout = PB.sum(1) if mid_scale is None else PB @ cast(mid_scale, PB.dtype)
    return dB, dmid, dout


def columns_of(u: Tensor, ranks: Sequence[int], chosen: Sequence[int]) -> Tensor:
    """The columns of u [M, ΣR] that belong to the chosen members of a group."""
    parts = torch.split_with_sizes(u, ranks, 1)
    return torch.cat([parts[index] for index in chosen], 1)


def column_sums(dy: Tensor) -> Tensor:
    """Σ_m dy [N]."""
    dtype = sum_dtype(dy)
    if dy.device.type != "cpu" or dy.dtype == dtype:
        return dy.sum(0, dtype=dtype)
    # A CPU would make an fp32 copy of all of dy, which takes twice as long as one of a few rows after the other.
    sums = dy.new_zeros(dy.shape[1], dtype=dtype)
    for rows in dy.split(_SUMMED_ROWS):
        sums += rows.sum(0, dtype=dtype)
    return sums


def column_dots(dy: Tensor, z: Tensor) -> Tensor:
    """Σ_m dy ⊙ z [N]."""
    dtype = sum_dtype(dy)
    if dy.dtype == dtype and dy.numel() <= _SMALL:
        return (dy * z).sum(0)
    if dy.device.type == "cpu" and dy.dtype == dtype and dy.shape[0] > 0:  # on one thread it adds in 16 bits
        # It is the gain's gradient of a layer norm whose mean is 0 and whose deviation is 1: PyTorch has that in one
        # pass without a product of size [M, N], in half the time of multiplying and summing.
        n = dy.shape[1]
        mean, deviation = dy.new_zeros(dy.shape[0], 1, dtype=dtype), dy.new_ones(dy.shape[0], 1, dtype=dtype)
        gain, only_gain = dy.new_ones(n, dtype=dtype), [False, True, False]
        backward = torch.ops.aten.native_layer_norm_backward
        dots: Tensor = backward(dy, z, [n], mean, deviation, gain, None, only_gain)[1]
        return dots
    dots = dy.new_zeros(dy.shape[1], dtype=dtype)
    for rows in row_blocks(*dy.shape):
        dots += (dy[rows].to(dtype) * z[rows]).sum(0)
    return dots


# The least fp32 number above zero.
_LEAST = 2.0**-149


def divisor(norm: Tensor) -> Tensor:
    """Norms by rows as m is divided by them: a row of zeros, as a head has that is tied to an embedding with padding,
    has the least norm there is in the place of none. Of an m that is zero as well, m / n is then zero, and of another
    one infinite."""
    return norm.clamp(min=_LEAST)
