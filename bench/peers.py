"""What PEFT, Unsloth, Axolotl and LoRAFusion launch for an adapted layer: a model of each one's sequence of operations.

Read from their sources (PEFT 0.21.2; Unsloth, Axolotl and LoRAFusion as of August 2026, July 2026 and September 2025)
and written down as works of the cost model: every operand of an operation moves once, elementwise operations are not
fused with each other, and autograd adds the gradients of an x with several readers pair by pair.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from fastadapt.operators.adapter_linear.cost import FEW_TOKENS, Work
from fastadapt.operators.adapter_linear.workload import Workload

# Bytes of an element: activations and weights in 16 bit, adapters of PEFT's default, dropout masks.
_HALF, _FULL, _MASK = 2, 4, 1


class Layer(NamedTuple):
    """One linear layer with its adapter: x [M, K], y [M, N], rank R."""

    M: int
    K: int
    N: int
    R: int
    dropout: bool

    @property
    def x(self) -> int:
        return self.M * self.K

    @property
    def y(self) -> int:
        return self.M * self.N

    @property
    def weight(self) -> int:
        return self.N * self.K


class Sequence:
    """The works of a sequence of operations, as they are added."""

    def __init__(self) -> None:
        self.works: list[Work] = []

    def matmul(self, m: int, k: int, n: int, size: int = _HALF, *, adds: bool = False) -> None:
        """[m, k] times [k, n] in elements of `size` bytes; `adds` to an output that is there (addmm_)."""
        moved = size * (m * k + k * n + (2 if adds else 1) * m * n)
        self.works.append(Work("matmul", 2 * m * k * n, moved, 1, "bfloat16" if size == _HALF else "float32"))

    def kernel(self, tokens: int, flops: int, moved: int) -> None:
        """A Triton kernel with matrix products in 16 bit."""
        self.works.append(Work("kernel", flops, moved, 1, "bfloat16", triton=True, few_tokens=tokens <= FEW_TOKENS))

    def elementwise(self, *moved: int) -> None:
        """One operation that reads or writes these bytes."""
        self.works.append(Work("elementwise", 0, sum(moved)))


def _is_dora(w: Workload) -> bool:
    return w.base_scale


def _is_vera(w: Workload) -> bool:
    return not w.trains_A


def _layers(w: Workload) -> list[Layer]:
    return [Layer(w.M, w.K, n, r, w.dropout) for n, r in zip(w.outputs, w.ranks, strict=True)]


def _sum_of_dx(s: Sequence, w: Workload) -> None:
    """Autograd's sum of the members' dx, pair by pair."""
    for _ in w.outputs[1:]:
        s.elementwise(3 * _HALF * w.M * w.K)


def _peft_forward(s: Sequence, layer: Layer, a: int, *, dora: bool, vera: bool) -> None:
    """a: bytes of an adapter's element, 4 by default. Activations are promoted to it and cast back at the end."""
    M, K, N, R = layer.M, layer.K, layer.N, layer.R
    x, y, weight = layer.x, layer.y, layer.weight
    s.matmul(M, K, N)
    if a == _FULL:
        s.elementwise(_HALF * x, a * x)
    if layer.dropout:
        s.elementwise(a * x, a * x, _MASK * x)
    if dora:
        # The norm of the whole weight, B A formed from an identity matrix.
        s.elementwise(a * K * K)
        s.matmul(K, K, R, a)
        s.matmul(K, R, N, a)
        if a == _FULL:
            s.elementwise(_HALF * weight, a * weight)
        s.elementwise(2 * a * weight)
        s.elementwise(3 * a * weight)
        s.elementwise(a * weight)
    s.matmul(M, K, R, a)
    if vera:
        s.elementwise(2 * a * M * R)
    s.matmul(M, R, N, a)
    if dora:
        base = _HALF
        if layer.dropout:
            s.matmul(M, K, N, a)
            base = a
        s.elementwise(base * y, a * y)  # (g - 1) base
        s.elementwise(2 * a * y)  # g lora
        s.elementwise(2 * a * y)  # scaling
        s.elementwise(3 * a * y)
    else:
        s.elementwise(2 * a * y)  # scaling, or λ_b
    s.elementwise(_HALF * y, 2 * a * y)
    if a == _FULL:
        s.elementwise(a * y, _HALF * y)


def _peft_backward(s: Sequence, layer: Layer, a: int, *, dora: bool, vera: bool) -> None:
    M, K, N, R = layer.M, layer.K, layer.N, layer.R
    x, y = layer.x, layer.y
    if a == _FULL:
        s.elementwise(_HALF * y, a * y)
        s.elementwise(a * y, _HALF * y)  # into the base layer
    if dora:
        base = a if layer.dropout else _HALF
        s.elementwise(2 * a * y)  # through scaling
        s.elementwise(2 * a * y)  # to the low-rank product
        s.elementwise(3 * a * y)  # to g, a product ...
        s.elementwise(a * y)  # ... and its sum
        s.elementwise(a * y, base * y)  # to the base product
        s.elementwise(a * y, base * y, a * y)
        s.elementwise(a * y)
        if layer.dropout:
            s.matmul(M, N, K, a)
        else:
            s.elementwise(3 * _HALF * y)
    else:
        s.elementwise(2 * a * y)
        if vera:  # to λ_b: a product with the saved expand output, and its sum
            s.elementwise(3 * a * y)
            s.elementwise(a * y)
    s.matmul(M, N, R, a)
    if vera:
        s.elementwise(2 * a * M * R)
        s.elementwise(4 * a * M * R)
    else:
        s.matmul(N, M, R, a)
        s.matmul(R, M, K, a)
    s.matmul(M, R, K, a)
    if dora and layer.dropout:
        s.elementwise(3 * a * x)
    if layer.dropout:
        s.elementwise(2 * a * x, _MASK * x)
    if a == _FULL:
        s.elementwise(a * x, _HALF * x)
    s.matmul(M, N, K)
    s.elementwise(3 * _HALF * x)


def _peft(w: Workload, a: int) -> tuple[list[Work], list[Work]]:
    forward, backward = Sequence(), Sequence()
    for layer in _layers(w):
        _peft_forward(forward, layer, a, dora=_is_dora(w), vera=_is_vera(w))
        _peft_backward(backward, layer, a, dora=_is_dora(w), vera=_is_vera(w))
    _sum_of_dx(backward, w)
    return forward.works, backward.works


def peft(w: Workload) -> tuple[list[Work], list[Work]] | None:
    """fp32 adapters beside a 16-bit model: what get_peft_model makes."""
    return _peft(w, _FULL)


def peft_bf16(w: Workload) -> tuple[list[Work], list[Work]] | None:
    """Adapters cast to the model's dtype (autocast_adapter_dtype=False)."""
    return _peft(w, _HALF)


def unsloth(w: Workload) -> tuple[list[Work], list[Work]] | None:
    """fast_lora.py: LoRA_W, LoRA_QKV and LoRA_MLP. Without dropout, DoRA or VeRA, which leave its fast path."""
    if w.dropout or _is_dora(w) or _is_vera(w):
        return None
    forward, backward = Sequence(), Sequence()
    layers = _layers(w)
    for M, K, N, R, _ in layers:
        forward.matmul(M, K, N)
        forward.matmul(M, K, R)
        forward.matmul(M, R, N, adds=True)
    for M, K, N, R, _ in layers:
        backward.matmul(M, N, R)
        backward.matmul(K, M, R)  # dA
        backward.matmul(R, K, M)  # u again
        backward.matmul(R, M, N)  # dB
    for index, (M, K, N, R, _) in enumerate(layers):
        backward.matmul(M, N, K, adds=index > 0)
        backward.matmul(M, N, R)  # q a second time
        backward.matmul(M, R, K, adds=True)
    return forward.works, backward.works


def axolotl(w: Workload) -> tuple[list[Work], list[Work]] | None:
    """kernels/lora.py: LoRA_O, LoRA_QKV and LoRA_QK, with dropout and DoRA.

    Without VeRA, and without DoRA's published rule under dropout (`dropout_on_base`): its own drops the low-rank path
    alone, which takes one base product instead of two.
    """
    if _is_vera(w) or w.two_products:
        return None
    forward, backward = Sequence(), Sequence()
    layers = _layers(w)
    x = _HALF * w.M * w.K
    dora = _is_dora(w)
    if w.dropout:
        forward.elementwise(2 * x, _MASK * w.M * w.K)
    for layer in layers:
        M, K, N, R, _ = layer
        y = _HALF * layer.y
        forward.matmul(M, K, N)
        if dora:
            forward.elementwise(2 * x)  # scaling x
            forward.matmul(M, K, R)
            forward.matmul(M, R, N)
            # The weight's norm, kept until the optimizer steps: a Triton kernel that forms rows of B A.
            forward.kernel(M, 2 * N * R * K, _HALF * layer.weight)
            forward.elementwise(3 * y)
            forward.elementwise(2 * y)
            if len(layers) > 1:
                forward.elementwise(3 * y)  # the sum again, to be saved
        else:
            forward.matmul(M, K, R)
            forward.matmul(M, R, N, adds=True)
    for layer in layers:
        M, K, N, R, _ = layer
        y = _HALF * layer.y
        if dora:
            backward.elementwise(3 * y)
            backward.elementwise(y)
            backward.elementwise(2 * y)
        backward.matmul(M, N, R)
        backward.matmul(K, M, R)  # dA
        backward.matmul(R, K, M)  # u again
        backward.matmul(R, M, N)  # dB
    for index, (M, K, N, _, _) in enumerate(layers):
        backward.matmul(M, N, K, adds=index > 0)
    if w.dropout and len(layers) > 1:
        backward.elementwise(x)  # zeros to add to
    for M, K, _, R, _ in layers:
        backward.matmul(M, R, K, adds=not w.dropout or len(layers) > 1)
    if w.dropout:
        if len(layers) == 1:
            backward.elementwise(2 * x)  # scaling
        backward.elementwise(2 * x, _MASK * w.M * w.K)
        backward.elementwise(3 * x)
    return forward.works, backward.works


def lorafusion(w: Workload) -> tuple[list[Work], list[Work]] | None:
    """ops/lora_v1.py at its defaults, layer by layer. Without DoRA and VeRA."""
    if _is_dora(w) or _is_vera(w):
        return None
    forward, backward = Sequence(), Sequence()
    for layer in _layers(w):
        M, K, N, R, dropout = layer
        x, y, weight, u = (_HALF * count for count in (layer.x, layer.y, layer.weight, M * R))
        mask = _MASK * layer.x if dropout else 0
        if dropout:
            forward.elementwise(2 * x, mask)
        forward.matmul(M, K, R)
        forward.kernel(M, 2 * M * N * (K + R), x + weight + u + _HALF * N * R + y)
        # dB and ds are cleared, then added to atomically, in fp32; the casts that follow are small.
        backward.kernel(M, 4 * M * N * R, y + u + _HALF * N * R + 3 * _FULL * R * (M + N))
        backward.elementwise((_FULL + _HALF) * R * (M + N))
        backward.matmul(R, M, K)
        backward.kernel(M, 2 * M * K * (N + R), y + weight + u + _HALF * R * K + mask + x)
    _sum_of_dx(backward, w)
    return forward.works, backward.works


# Name -> (forward, backward) works of a workload, or None where the peer cannot do it.
PEERS: dict[str, Callable[[Workload], tuple[list[Work], list[Work]] | None]] = {
    "peft": peft,
    "peft_bf16": peft_bf16,
    "unsloth": unsloth,
    "axolotl": axolotl,
    "lorafusion": lorafusion,
}


def moved_mib(passes: tuple[list[Work], list[Work]] | None) -> float | None:
    """MiB that the two passes move."""
    return None if passes is None else sum(work.bytes for works in passes for work in works) / 2**20


def frozen(w: Workload) -> tuple[list[Work], list[Work]]:
    """The same layers without an adapter: the floor under every strategy."""
    forward, backward = Sequence(), Sequence()
    for M, K, N, _, _ in _layers(w):
        forward.matmul(M, K, N)
        backward.matmul(M, N, K)
    _sum_of_dx(backward, w)
    return forward.works, backward.works
