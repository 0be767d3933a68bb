"""The `fastadapt::` operators: for each its schema, its fake, its eager implementation and its Triton one.

An operator takes its backend as its last argument, already resolved ("eager" or "triton"), because dispatch by device
could reach neither Triton on CPU tensors (the interpreter) nor the eager path on CUDA ones. None of them knows
autograd: functional.py builds the Functions from them.

Letters: x [M, K], weight [N, K], A [R, K], B [N, R], u [M, R], y and dy [M, N], q [M, R] = (h ⊙ dy) B. The low-rank
output scale is h = scaling · out_scale. `drop` is what makes the dropout mask of x: on the eager backend the positions
of the dropped elements or the mask itself, one byte an element at most (true = kept); on Triton a seed of one int64,
from which every kernel draws the same mask.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

_library = torch.library.Library("fastadapt", "DEF")

# Elementwise passes over [M, N] run in blocks of rows: that bounds their temporaries, in 16 bit also the fp32 ones that
# PyTorch makes when it multiplies by an fp32 scale.
_BLOCK_ELEMENTS = 1 << 20
# Products of fewer rows than this lose time to reading the weight again.
_BLOCK_ROWS = 512

_DROPOUT_LEVELS = 1 << 16

# The rank below which a factor is so thin that the products with it are bound by memory.
_THIN = 64

# The p up to which positions, 4·p bytes an element, take no more memory than a mask of one byte.
_POSITIONS_UP_TO = 0.25


def _kernels(module: str) -> ModuleType:
    return importlib.import_module(f"fastadapt_kernels.{module}")


def keep_probability(p: float, backend: str) -> float:
    """The probability that an element is kept: 1 − p, as the threshold of the random integers rounds it."""
    if backend == "triton":
        keep: float = _kernels("tiles").keep_probability(p)
        return keep
    if p <= _POSITIONS_UP_TO:
        return 1.0 - p
    return 1.0 - round(p * _DROPOUT_LEVELS) / _DROPOUT_LEVELS


def draw_dropout(x: Tensor, p: float, backend: str) -> Tensor:
    """What `drop` is for x [M, K], from PyTorch's generator, so that torch.manual_seed and checkpointing govern it.

    On a CPU a small p takes the positions of the dropped elements, from the geometric gaps between them: their number
    is what drawing and applying costs, a fifth of a mask's time at p = 0.05. Otherwise a mask.
    """
    if backend == "triton":
        return torch.randint(torch.iinfo(torch.int64).max, (1,), device=x.device)
    if torch.compiler.is_compiling():  # neither the count of positions nor the view of a draw can be traced
        return torch.rand(x.shape, device=x.device) >= 1.0 - keep_probability(p, backend)
    if x.device.type == "cpu" and p <= _POSITIONS_UP_TO:
        return _draw_positions(x.numel(), p)
    # Four 16-bit integers from each 64-bit draw compared with a threshold: a fifth of the time of `bernoulli_`.
    count = x.numel()
    words = torch.empty((count + 3) // 4, dtype=torch.int64, device=x.device).random_(
        torch.iinfo(torch.int64).min, None
    )
    threshold = round(p * _DROPOUT_LEVELS) - _DROPOUT_LEVELS // 2
    return (words.view(torch.int16)[:count] >= threshold).view(x.shape)


def _draw_positions(count: int, p: float) -> Tensor:
    """Which of `count` elements independent draws of probability p would take, in order; int32 where that suffices."""
    expected = count * p
    size = int(expected + 8 * math.sqrt(expected) + 16)  # eight standard deviations: the loop below ends at once
    drawn, end = [], -1
    while end < count:
        gaps = torch.rand(size).neg_().log1p_().mul_(1.0 / math.log1p(-p)).floor_().to(torch.int64).add_(1)
        drawn.append(gaps.cumsum_(0).add_(end))
        end = int(drawn[-1][-1])
    positions = torch.cat(drawn) if len(drawn) > 1 else drawn[0]
    inside = positions[: int(torch.searchsorted(positions, count))]
    return inside.to(torch.int32 if count < 1 << 31 else torch.int64, copy=True)


def dropout_mask(drop: Tensor, shape: torch.Size) -> Tensor:
    """The mask, true where an element is kept, that an eager `drop` stands for."""
    return _zero_dropped(torch.ones(shape, dtype=torch.bool, device=drop.device), drop)


def _zero_dropped(x: Tensor, drop: Tensor) -> Tensor:
    """Sets the dropped elements of a contiguous x to zero, in place."""
    if drop.dtype == torch.bool:
        return x.mul_(drop)
    x.view(-1).index_fill_(0, drop.long(), 0)
    return x


def _dropped(x: Tensor, drop: Tensor | None, p: float) -> Tensor:
    """x̃ = mask ⊙ x / (1 − p)."""
    if drop is None:
        return x
    scaled = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return _zero_dropped(torch.mul(x, 1.0 / keep_probability(p, "eager"), out=scaled), drop)


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """tensor.to(dtype), sooner where there is nothing to do: a layer's step asks for a dozen such casts."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def _row_blocks(rows: int, columns: int) -> Iterator[slice]:
    size = max(_BLOCK_ROWS, _BLOCK_ELEMENTS // max(1, columns))
    for start in range(0, rows, size):
        yield slice(start, min(start + size, rows))


def _scaled_up(B: Tensor, out_scale: Tensor | None, scaling: float, dtype: torch.dtype) -> tuple[Tensor, float]:
    """h ⊙ B as a matrix in `dtype` and a factor for the product: the scalar part rides on `alpha` for nothing."""
    return cast(B if out_scale is None else B * out_scale[:, None], dtype), scaling


def _define(
    name: str, schema: str, eager: Callable[..., Any], triton: Callable[..., Any], fake: Callable[..., Any]
) -> Callable[..., Any]:
    """Registers `fastadapt::name`, whose schema ends in `str backend`, and returns what calls it.

    In plain eager mode that is the implementation itself: the dispatcher would add ten microseconds to each of seven
    operators in the step of a DoRA layer. Compiled code sees the operator.
    """

    def implementation(*args: Any) -> Any:
        *operands, backend = args
        return triton(*operands) if backend == "triton" else eager(*operands)

    _library.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastadapt::{name}", lambda *args: fake(*args[:-1]), lib=_library)
    operator: Callable[..., Any] = getattr(torch.ops.fastadapt, name).default

    def call(*args: Any) -> Any:
        if args[-1] == "eager" and not torch.compiler.is_compiling():
            return eager(*args[:-1])
        return operator(*args)

    return call


def _shrink_eager(x: Tensor, A: Tensor, drop: Tensor | None, p: float) -> Tensor:
    return _dropped(x, drop, p) @ cast(A, x.dtype).T


def _shrink_triton(x: Tensor, A: Tensor, drop: Tensor | None, p: float) -> Tensor:
    result: Tensor = _kernels("shrink").shrink(x, A, seed=drop, p=p)
    return result


shrink = _define(
    "shrink",
    "(Tensor x, Tensor A, Tensor? drop, float p, str backend) -> Tensor",
    _shrink_eager,
    _shrink_triton,
    lambda x, A, drop, p: x.new_empty(x.shape[0], A.shape[0]),
)


def _shrink_grad_eager(dy: Tensor, B: Tensor, out_scale: Tensor | None, scaling: float) -> Tensor:
    up, alpha = _scaled_up(B, out_scale, scaling, dy.dtype)
    q = dy @ up
    return q if alpha == 1.0 else q.mul_(alpha)


def _shrink_grad_triton(dy: Tensor, B: Tensor, out_scale: Tensor | None, scaling: float) -> Tensor:
    result: Tensor = _kernels("shrink").shrink_grad(dy, B, out_scale=out_scale, scaling=scaling)
    return result


shrink_grad = _define(
    "shrink_grad",
    "(Tensor dy, Tensor B, Tensor? out_scale, float scaling, str backend) -> Tensor",
    _shrink_grad_eager,
    _shrink_grad_triton,
    lambda dy, B, out_scale, scaling: dy.new_empty(dy.shape[0], B.shape[1]),
)


def _scale_and_shift(z: Tensor, scale: Tensor, bias: Tensor | None, y: Tensor) -> Tensor:
    """y = scale ⊙ z + bias in z's dtype; y may be z. Shapes: z and y [M, N]; scale and bias [N]."""
    if scale.dtype == z.dtype:
        return torch.mul(z, scale, out=y) if bias is None else torch.addcmul(bias, z, scale, out=y)
    for rows in _row_blocks(*z.shape):
        block = z[rows] * scale
        y[rows] = block if bias is None else block.add_(bias)
    return y


def _base_product_eager(
    x: Tensor,
    weight: Tensor,
    base_scale: Tensor | None,
    bias: Tensor | None,
    drop: Tensor | None,
    p: float,
    dropout_on_base: bool,
    keep_base: bool,
) -> tuple[Tensor, Tensor]:
    """(y without its low-rank part, z); z is meant only with keep_base, and otherwise may share y's memory."""
    bias = None if bias is None else cast(bias, x.dtype)
    if base_scale is None:
        y = x @ weight.T if bias is None else torch.addmm(bias, x, weight.T)
        return y, y
    if dropout_on_base and drop is not None:
        z = _dropped(x, drop, p) @ weight.T
        y = x @ weight.T if bias is None else torch.addmm(bias, x, weight.T)
        if base_scale.dtype == y.dtype:
            return y.addcmul_(z, base_scale - 1), z
        for rows in _row_blocks(*y.shape):
            y[rows] += z[rows] * (base_scale - 1)
        return y, z
    z = x @ weight.T
    return _scale_and_shift(z, base_scale, bias, torch.empty_like(z) if keep_base else z), z


def _adapter_form_eager(
    keep_base: bool,
    x: Tensor,
    weight: Tensor,
    u: Tensor,
    B: Tensor,
    mid_scale: Tensor | None,
    out_scale: Tensor | None,
    scaling: float,
    base_scale: Tensor | None,
    bias: Tensor | None,
    drop: Tensor | None,
    p: float,
    dropout_on_base: bool,
) -> tuple[Tensor, Tensor]:
    y, z = _base_product_eager(x, weight, base_scale, bias, drop, p, dropout_on_base, keep_base)
    if u.shape[1] > 0:
        up, alpha = _scaled_up(B, out_scale, scaling, x.dtype)
        y.addmm_(u if mid_scale is None else u * cast(mid_scale, u.dtype), up.T, alpha=alpha)
    return y, z


def _adapter_linear_eager(*operands: Any) -> Tensor:
    return _adapter_form_eager(False, *operands)[0]


def _adapter_linear_keep_base_eager(*operands: Any) -> tuple[Tensor, Tensor]:
    return _adapter_form_eager(True, *operands)


# The launcher's keywords, in the schema's order.
_FORM = ("mid_scale", "out_scale", "scaling", "base_scale", "bias", "seed", "p", "dropout_on_base")


def _adapter_linear_triton(x: Tensor, weight: Tensor, u: Tensor, B: Tensor, *form: Any) -> Tensor:
    named = dict(zip(_FORM, form, strict=True))
    y: Tensor = _kernels("adapter_linear").adapter_linear(x, weight, u, B, **named)
    return y


def _adapter_linear_keep_base_triton(
    x: Tensor, weight: Tensor, u: Tensor, B: Tensor, *form: Any
) -> tuple[Tensor, Tensor]:
    named = dict(zip(_FORM, form, strict=True))
    y, z = _kernels("adapter_linear").adapter_linear(x, weight, u, B, keep_base=True, **named)
    return y, z


_ADAPTER_LINEAR_OPERANDS = (
    "(Tensor x, Tensor weight, Tensor u, Tensor B, Tensor? mid_scale, Tensor? out_scale, float scaling, "
    "Tensor? base_scale, Tensor? bias, Tensor? drop, float p, bool dropout_on_base, str backend)"
)

adapter_linear = _define(
    "adapter_linear",
    f"{_ADAPTER_LINEAR_OPERANDS} -> Tensor",
    _adapter_linear_eager,
    _adapter_linear_triton,
    lambda x, weight, *_: x.new_empty(x.shape[0], weight.shape[0]),
)

# The same product, which also hands out z, what base_scale multiplies: its gradient needs it. It takes a base_scale.
adapter_linear_keep_base = _define(
    "adapter_linear_keep_base",
    f"{_ADAPTER_LINEAR_OPERANDS} -> (Tensor, Tensor)",
    _adapter_linear_keep_base_eager,
    _adapter_linear_keep_base_triton,
    lambda x, weight, *_: (x.new_empty(x.shape[0], weight.shape[0]), x.new_empty(x.shape[0], weight.shape[0])),
)


def _scaled_dx(dy: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """(scale ⊙ dy) W0 in blocks of rows, which bound the scaled copy of dy."""
    blocks = list(_row_blocks(*dy.shape))
    if len(blocks) == 1:
        return cast(dy * scale, dy.dtype) @ weight
    dx = dy.new_empty(dy.shape[0], weight.shape[1])
    for rows in blocks:
        torch.mm(cast(dy[rows] * scale, dy.dtype), weight, out=dx[rows])
    return dx


def _adapter_linear_dx_eager(
    dy: Tensor,
    weight: Tensor,
    q: Tensor,
    A: Tensor,
    mid_scale: Tensor | None,
    base_scale: Tensor | None,
    drop: Tensor | None,
    p: float,
    dropout_on_base: bool,
) -> Tensor:
    down = cast(A, dy.dtype)
    dq = q if mid_scale is None else q * cast(mid_scale, q.dtype)
    if drop is None:
        dx = dy @ weight if base_scale is None else _scaled_dx(dy, weight, base_scale)
        return dx.addmm_(dq, down) if q.shape[1] > 0 else dx
    masked = dq @ down
    if base_scale is None:
        dx = dy @ weight
    elif dropout_on_base:
        dx = dy @ weight
        masked += _scaled_dx(dy, weight, base_scale - 1)
    else:
        dx = _scaled_dx(dy, weight, base_scale)
    return dx.add_(_zero_dropped(masked, drop), alpha=1.0 / keep_probability(p, "eager"))


_DX_FORM = ("mid_scale", "base_scale", "seed", "p", "dropout_on_base")


def _adapter_linear_dx_triton(dy: Tensor, weight: Tensor, q: Tensor, A: Tensor, *form: Any) -> Tensor:
    named = dict(zip(_DX_FORM, form, strict=True))
    dx: Tensor = _kernels("adapter_linear").adapter_linear_dx(dy, weight, q, A, **named)
    return dx


adapter_linear_dx = _define(
    "adapter_linear_dx",
    "(Tensor dy, Tensor weight, Tensor q, Tensor A, Tensor? mid_scale, Tensor? base_scale, Tensor? drop, float p, "
    "bool dropout_on_base, str backend) -> Tensor",
    _adapter_linear_dx_eager,
    _adapter_linear_dx_triton,
    lambda dy, weight, *_: dy.new_empty(dy.shape[0], weight.shape[1]),
)


def _sum_dtype(dy: Tensor) -> torch.dtype:
    return torch.float64 if dy.dtype == torch.float64 else torch.float32


def _output_grads_eager(dy: Tensor, u: Tensor | None, z: Tensor | None, want_bias: bool) -> list[Tensor]:
    grads = []
    dtype = _sum_dtype(dy)
    if u is not None:
        # For a thin u the transposed product is twice as fast in MKL, and its transposition is cheap.
        P = (u.T @ dy).T if u.shape[1] < _THIN else dy.T @ u
        grads.append(cast(P, dtype).contiguous())
    if want_bias:
        grads.append(dy.sum(0, dtype=dtype))
    if z is not None:
        grads.append(_column_dots(dy, z, dtype))
    return grads


def _column_dots(dy: Tensor, z: Tensor, dtype: torch.dtype) -> Tensor:
    """Σ_m dy ⊙ z [N] in `dtype`."""
    if dy.device.type == "cpu" and dy.shape[0] > 0:
        # It is the gain's gradient of a layer norm whose mean is 0 and whose deviation is 1: PyTorch has that in one
        # pass without a product of size [M, N], in half the time of multiplying and summing.
        n = dy.shape[1]
        mean, deviation = dy.new_zeros(dy.shape[0], 1, dtype=dtype), dy.new_ones(dy.shape[0], 1, dtype=dtype)
        gain, only_gain = dy.new_ones(n, dtype=dtype), [False, True, False]
        backward = torch.ops.aten.native_layer_norm_backward
        dots: Tensor = backward(dy, z, [n], mean, deviation, gain, None, only_gain)[1]
        return dots
    dots = dy.new_zeros(dy.shape[1], dtype=dtype)
    for rows in _row_blocks(*dy.shape):
        dots += (dy[rows].to(dtype) * z[rows]).sum(0)
    return dots


def _output_grads_triton(dy: Tensor, u: Tensor | None, z: Tensor | None, want_bias: bool) -> list[Tensor]:
    grads = _kernels("adapter_grads").output_grads(dy, u, z, want_bias=want_bias)
    return [grad for grad in grads if grad is not None]


def _output_grads_fake(dy: Tensor, u: Tensor | None, z: Tensor | None, want_bias: bool) -> list[Tensor]:
    dtype = _sum_dtype(dy)
    n = dy.shape[1]
    product = [] if u is None else [dy.new_empty(n, u.shape[1], dtype=dtype)]
    return product + [dy.new_empty(n, dtype=dtype) for wanted in (want_bias, z is not None) if wanted]


# The reductions over tokens in one pass over dy, those that are asked for, in this order and in fp32:
# P [N, R] = dyᵀ u where u is given, dβ [N] = Σ dy where want_bias, dg [N] = Σ dy ⊙ z where z is given.
output_grads = _define(
    "output_grads",
    "(Tensor dy, Tensor? u, Tensor? z, bool want_bias, str backend) -> Tensor[]",
    _output_grads_eager,
    _output_grads_triton,
    _output_grads_fake,
)


def _input_grads_eager(x: Tensor, q: Tensor, mid_scale: Tensor | None, drop: Tensor | None, p: float) -> Tensor:
    dq = q if mid_scale is None else q * cast(mid_scale, q.dtype)
    return (dq.T @ _dropped(x, drop, p)).to(_sum_dtype(x))


def _input_grads_triton(x: Tensor, q: Tensor, mid_scale: Tensor | None, drop: Tensor | None, p: float) -> Tensor:
    result: Tensor = _kernels("adapter_grads").input_grads(x, q, mid_scale=mid_scale, seed=drop, p=p)
    return result


input_grads = _define(
    "input_grads",
    "(Tensor x, Tensor q, Tensor? mid_scale, Tensor? drop, float p, str backend) -> Tensor",
    _input_grads_eager,
    _input_grads_triton,
    lambda x, q, *_: x.new_empty(q.shape[1], x.shape[1], dtype=_sum_dtype(x)),
)


def _weight_norm_eager(
    weight: Tensor, A: Tensor, B: Tensor, scaling: float, base_squared: Tensor
) -> tuple[Tensor, Tensor]:
    dtype = _sum_dtype(weight)
    A, B = cast(A, dtype), cast(B, dtype)
    if weight.dtype == dtype:
        WA = weight @ A.T
    else:  # never an fp32 copy of the whole weight
        WA = torch.empty(weight.shape[0], A.shape[0], dtype=dtype, device=weight.device)
        for rows in _row_blocks(*weight.shape):
            torch.mm(weight[rows].to(dtype), A.T, out=WA[rows])
    inner = torch.addmm(WA, B, A @ A.T, beta=2.0 * scaling, alpha=scaling * scaling)
    squared = (inner * B).sum(1).add_(base_squared)
    return squared.clamp_(min=0.0).sqrt_(), WA


def _weight_norm_triton(
    weight: Tensor, A: Tensor, B: Tensor, scaling: float, base_squared: Tensor
) -> tuple[Tensor, Tensor]:
    result: tuple[Tensor, Tensor] = _kernels("weight_norm").weight_norm(weight, A, B, scaling, base_squared)
    return result


def _weight_norm_fake(
    weight: Tensor, A: Tensor, B: Tensor, scaling: float, base_squared: Tensor
) -> tuple[Tensor, Tensor]:
    n, dtype = weight.shape[0], _sum_dtype(weight)
    return weight.new_empty(n, dtype=dtype), weight.new_empty(n, A.shape[0], dtype=dtype)


# (n [N], W0 Aᵀ [N, R]) in fp32; base_squared [N] = ‖W0‖² by rows, a constant that its caller keeps.
weight_norm = _define(
    "weight_norm",
    "(Tensor weight, Tensor A, Tensor B, float scaling, Tensor base_squared, str backend) -> (Tensor, Tensor)",
    _weight_norm_eager,
    _weight_norm_triton,
    _weight_norm_fake,
)


def _row_squares_eager(weight: Tensor) -> Tensor:
    dtype = _sum_dtype(weight)
    norms: Tensor = torch.linalg.vector_norm(weight, dim=1, dtype=dtype)
    return norms.square_()


def _row_squares_triton(weight: Tensor) -> Tensor:
    result: Tensor = _kernels("weight_norm").row_squares(weight)
    return result


# ‖W0‖² by rows: [N] in fp32.
row_squares = _define(
    "row_squares",
    "(Tensor weight, str backend) -> Tensor",
    _row_squares_eager,
    _row_squares_triton,
    lambda weight: weight.new_empty(weight.shape[0], dtype=_sum_dtype(weight)),
)
