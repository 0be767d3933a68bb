"""What each strategy of `adapter_linear` costs: FLOPs, bytes and launches of every phase, and the time they predict.

The model is a roofline a launch: max(FLOPs / rate, bytes / bandwidth) + overhead. Bytes are compulsory: every operand
of a launch moves once. It knows nothing of a particular GPU beyond the few numbers of `Device`, so it ranks strategies
where nothing was measured and gives way to a measurement where one was taken.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from .devices import ITEMSIZE, Device
from .workload import Workload

# Up to here a layer is bound by its weight and by its launches: shrinking inside the GEMM saves a launch. Above, it
# spills on some GPUs and was measured at 0.24-0.87x by a peer: not without a measurement.
_DECODE_TOKENS = 64

# Output tiles of the kernels, while decoding and else: inside the GEMM, u is computed anew for each tile of columns.
_DECODE_BLOCK_N, _BLOCK_N = 32, 128

# Each of them reads A anew as well, from an L2 cache that gives about twice what memory gives: beside the weight that
# hides up to these ranks.
_DECODE_RANKS = 16
_CACHE_SPEED = 2

# Up to here a library GEMM splits K or streams where a fixed tile leaves multiprocessors idle in its last wave.
FEW_TOKENS = 2048
_FEW_TOKENS_EFFICIENCY = 0.9

# Share of the frozen pass above which a recomposed weight is kept for the backward instead of remade there: remaking
# costs 2·K·N·r FLOPs against 4·M·K·N, so r / (2 M).
_KEEP_RECOMPOSED_ABOVE = 0.1

# Tokens up to which a strategy that keeps [M, N] of each layer may be chosen.
_EXPAND_TOKENS = 192

# What moving one fp32 element costs in halved FLOPs where memory is the limit: a CPU core does 112 GFLOP/s in products
# and moves 20 GB/s (bench/step.py).
_FLOPS_PER_ELEMENT = 12


class Work(NamedTuple):
    """One launch, or several alike: FLOPs, bytes moved to and from memory, launches; a Triton GEMM or the library's."""

    phase: str
    flops: float
    bytes: float
    launches: int = 1
    dtype: str = "bfloat16"
    triton: bool = False
    few_tokens: bool = False


def predicted_seconds(works: Iterable[Work], device: Device) -> float:
    """The time of these works one after the other: for each max(FLOPs / rate, bytes / bandwidth), plus its launches."""
    bandwidth = device.bandwidth * device.attainable_bandwidth
    seconds = 0.0
    for work in works:
        rate = device.matmul[work.dtype] * device.attainable_matmul
        if work.triton:
            rate *= device.triton * (_FEW_TOKENS_EFFICIENCY if work.few_tokens else 1.0)
        seconds += max(work.flops / rate, work.bytes / bandwidth) + work.launches * device.launch
    return seconds


def break_even(K: int, device: Device, dtype: str = "bfloat16") -> float:
    """The efficiency, relative to the library's, that pays for a GEMM which saves one reading and writing of y.

    base + addmm_ takes 2·M·N·K / rate + 2·M·N·itemsize / bandwidth where the kernel takes 2·M·N·K / (e · rate), so
    e = 1 / (1 + itemsize · rate / (K · bandwidth)): 0.71, 0.91 and 0.97 on an H100 at K = 1024, 4096 and 14336.
    """
    rate = device.matmul[dtype] * device.attainable_matmul
    return 1.0 / (1.0 + ITEMSIZE[dtype] * rate / (K * device.bandwidth * device.attainable_bandwidth))


class _Sizes:
    """Elements and bytes of a workload's tensors."""

    def __init__(self, w: Workload) -> None:
        size = ITEMSIZE[w.dtype]
        self.N = sum(w.outputs)
        self.R = sum(w.ranks)
        # Columns of u: one member's where all share it.
        self.u_ranks = w.ranks[0] if w.shared_A else self.R
        self.up = sum(n * r for n, r in zip(w.outputs, w.ranks, strict=True))  # elements of all B
        self.x = size * w.M * w.K
        self.y = size * w.M * self.N
        self.weight = size * self.N * w.K
        self.u = size * w.M * self.u_ranks
        self.q = size * w.M * self.R
        self.A = 4 * self.u_ranks * w.K
        self.dA = 4 * self.R * w.K
        self.B = 4 * self.up
        self.mask = w.M * w.K
        self.base = 2 * w.M * w.K * self.N  # FLOPs of the base product
        self.expand = 2 * w.M * self.up  # of u Bᵀ, of q and of P
        self.shrink = 2 * w.M * w.K * self.u_ranks  # of u
        self.down = 2 * w.M * w.K * self.R  # of dA and of q A


def forward_works(strategy: str, w: Workload) -> list[Work]:
    """The launches of the forward pass under a strategy."""
    return _FORWARD[strategy](w, _Sizes(w))


def backward_works(strategy: str, w: Workload) -> list[Work]:
    """The launches of the backward pass under a strategy."""
    return _BACKWARD[strategy](w, _Sizes(w)) if w.backward else []


def works(strategy: str, w: Workload) -> list[Work]:
    """The launches of the forward and, where one follows, of the backward pass under a strategy."""
    return forward_works(strategy, w) + backward_works(strategy, w)


def _triton(w: Workload, phase: str, flops: float, moved: float) -> Work:
    return Work(phase, flops, moved, 1, w.dtype, True, w.M <= FEW_TOKENS)


def _library(w: Workload, phase: str, flops: float, moved: float, launches: int = 1) -> Work:
    return Work(phase, flops, moved, launches, w.dtype)


def _split_forward(w: Workload, s: _Sizes) -> list[Work]:
    z = s.y if w.trains_base and w.backward else 0
    products = (2 if w.two_products else 1) * s.base + s.expand
    bits = s.mask / 8 if w.two_products else 0  # the mask, drawn once
    return [
        _triton(w, "shrink", s.shrink, s.x + s.A + s.u + bits),
        _triton(w, "linear", products, s.x + s.weight + s.u + s.B + s.y + z + bits),
    ]


def _fused_forward(w: Workload, s: _Sizes) -> list[Work]:
    _, linear = _split_forward(w, s)
    block_n = _DECODE_BLOCK_N if w.M <= _DECODE_TOKENS else _BLOCK_N
    # Each tile of columns needs its own member's part of u; the weight tile beside it is read anyway.
    ranks_again = sum(r * -(-n // block_n) for n, r in zip(w.outputs, w.ranks, strict=True))
    once = linear.bytes + s.A
    moved = max(once, (linear.bytes + 4 * w.K * ranks_again) / _CACHE_SPEED)
    return [_triton(w, "linear", linear.flops + 2 * w.M * w.K * ranks_again, moved)]


def _split_backward(w: Workload, s: _Sizes) -> list[Work]:
    wants_q = w.wants_dx or w.trains_A
    sums = [
        (s.expand, s.B + s.q, wants_q),
        (s.expand, s.B + s.u, w.trains_up),
        (0, s.y, w.trains_base),
        (0, s.y, w.base_scale and w.wants_dx),  # g ⊙ dy, for dx
    ]
    found = []
    if any(wanted for *_, wanted in sums):
        flops = sum(flops for flops, _, wanted in sums if wanted)
        found.append(_triton(w, "dy", flops, s.y + sum(moved for _, moved, wanted in sums if wanted)))
    if w.wants_dx:
        products = (2 if w.two_products else 1) * s.base + s.down
        dys = (2 if w.two_products else 1) * s.y
        found.append(_triton(w, "dx", products, dys + s.weight + s.q + s.A + s.x))
    if w.trains_A:
        found.append(_triton(w, "dA", s.down, s.x + s.q + s.dA))
    return found


def _library_forward(w: Workload, s: _Sizes) -> list[Work]:
    members = len(w.outputs)
    found = []
    if w.dropout:
        found.append(_library(w, "dropout", 0, 2 * s.x + s.mask, 2))
    found.append(_library(w, "shrink", s.shrink, s.x + s.A + s.u))
    found.append(_library(w, "base", s.base, members * s.x + s.weight + s.y, members))
    if w.two_products:
        found.append(_library(w, "base of dropped x", s.base, members * s.x + s.weight + s.y, members))
        found.append(_library(w, "scale", 0, 3 * s.y, members))
    elif w.base_scale:
        found.append(_library(w, "scale", 0, 2 * s.y, members))
    found.append(_library(w, "expand", s.expand, members * s.u + s.B + 2 * s.y, members))
    return found


def _library_backward(w: Workload, s: _Sizes) -> list[Work]:
    members = len(w.outputs)
    found = []
    if w.wants_dx or w.trains_A:
        found.append(_library(w, "q", s.expand, s.y + s.B + s.q, members))
    if w.trains_up:
        found.append(_library(w, "P", s.expand, s.y + members * s.u + s.B, members))
    if w.trains_base:
        found.append(_library(w, "dg", 0, 2 * s.y, members))
    if w.trains_A:
        if w.dropout:
            found.append(_library(w, "dropout", 0, 2 * s.x + s.mask))
        found.append(_library(w, "dA", s.down, s.x + s.q + s.dA))
    if w.wants_dx:
        if w.base_scale:
            found.append(_library(w, "scaled dy", 0, 2 * s.y, members))
        products = 2 if w.two_products else 1
        for _ in range(products):
            # Every product after a group's first adds to what is there.
            moved = s.y + s.weight + (2 * members - 1) * s.x
            found.append(_library(w, "dx", s.base, moved, members))
        if w.dropout:
            found.append(_library(w, "masked dx", s.down, s.q + s.A + (1 + 2 + 3) * s.x + s.mask, 3))
        else:
            found.append(_library(w, "low-rank dx", s.down, s.q + s.A + 2 * s.x))
    return found


def _expand_forward(w: Workload, s: _Sizes) -> list[Work]:
    return [*_library_forward(w, s), _library(w, "scale", 0, 3 * s.y, len(w.outputs))]


def _expand_backward(w: Workload, s: _Sizes) -> list[Work]:
    members = len(w.outputs)
    scales = [_library(w, "scaled dy", 0, 2 * s.y, members), _library(w, "dd and dh", 0, 2 * s.y, 2 * members)]
    return scales + _library_backward(w._replace(trains_up=False), s)


def _recompose_forward(w: Workload, s: _Sizes) -> list[Work]:
    members = len(w.outputs)
    found = [_library(w, "recompose", 2 * w.K * s.up, 2 * s.weight + s.B + s.A, 2 * members)]
    if w.backward and w.trains_up:
        found.append(_library(w, "shrink", s.shrink, s.x + s.A + s.u))
    found.append(_library(w, "linear", s.base, members * s.x + s.weight + s.y, members))
    return found


def _recompose_backward(w: Workload, s: _Sizes) -> list[Work]:
    members = len(w.outputs)
    found = []
    if w.trains_up:
        found.append(_library(w, "P", s.expand, s.y + members * s.u + s.B, members))
    if w.wants_dx:
        if not keeps_made("recompose", w):
            found.append(_library(w, "recompose", 2 * w.K * s.up, 2 * s.weight + s.B + s.A, 2 * members))
        found.append(_library(w, "dx", s.base, s.y + s.weight + (2 * members - 1) * s.x, members))
    return found


_FORWARD = {
    "split": _split_forward,
    "fused": _fused_forward,
    "library": _library_forward,
    "recompose": _recompose_forward,
    "expand": _expand_forward,
}
_BACKWARD = {
    "split": _split_backward,
    "fused": _split_backward,
    "library": _library_backward,
    "recompose": _recompose_backward,
    "expand": _expand_backward,
}


def cannot_recompose(w: Workload) -> str | None:
    """Why W' = W0 + diag(h) B diag(d) A cannot take the place of the two paths, or None where it can."""
    if w.dtype not in ("float32", "float64"):
        return f"in {w.dtype} a recomposed weight would round away deltas below its half-ulp"
    if w.dropout:
        return "under dropout the low-rank path does not read x itself"
    if w.trains_base:
        return "the gradient of base_scale needs the base product by itself"
    return None


def cannot_expand(w: Workload) -> str | None:
    """Why (d ⊙ u) Bᵀ cannot be kept for the gradients of d and h, or None where it can."""
    if w.dtype not in ("float32", "float64"):
        return f"in {w.dtype} what is kept would round the gradients of the scales"
    if w.trains_A or w.trains_B or not w.trains_up:
        return "it is for forms of which mid_scale and out_scale train, and neither A nor B"
    if w.base_scale:
        return "a base_scale scales the base product besides"
    return None


def refusal(strategy: str, w: Workload) -> str | None:
    """Why a strategy cannot run a workload, or None where it can."""
    refuses = {"recompose": cannot_recompose, "expand": cannot_expand}.get(strategy)
    return None if refuses is None else refuses(w)


def keeps_made(strategy: str, w: Workload) -> bool:
    """Whether what a strategy makes of each member is held until the backward.

    (d ⊙ u) Bᵀ always. W' where remaking it would add more than a tenth of the frozen pass; not where A trains: x is
    kept for dA already, and with W' beside it a layer would keep more than a plain one.
    """
    if strategy == "expand":
        return w.backward
    kept = w.backward and w.wants_dx and not w.trains_A
    return strategy == "recompose" and kept and max(w.ranks) > 2 * w.M * _KEEP_RECOMPOSED_ABOVE


def _beside_base(strategy: str, w: Workload) -> float:
    """Halved FLOPs of an eager strategy beside the base products.

    library: u, (d ⊙ u) Bᵀ and, in the backward, P, q and q A. expand: the same without P, and passes over y and dy.
    recompose: W' in K·N·r, twice where the backward makes it again; u and P besides where they are wanted. Passes over
    memory that no product hides count with them, which decides at a low rank: y or dx written once more, or W0 read
    and W' written.
    """
    s = _Sizes(w)
    passes = _FLOPS_PER_ELEMENT * w.M
    u = w.M * w.K * s.u_ranks
    P = w.M * s.up if w.backward and w.trains_up else 0
    q = w.M * s.up if w.backward and w.trains_A else 0
    if strategy == "recompose":
        times = 2 if w.backward and w.wants_dx and not keeps_made(strategy, w) else 1
        weight = w.K * s.up + 2 * _FLOPS_PER_ELEMENT * w.K * s.N
        return (u if w.backward and w.trains_up else 0) + P + q + times * weight
    if w.backward and (w.wants_dx or strategy == "expand"):
        q = w.M * s.up
    dx = w.M * w.K * s.u_ranks + passes * w.K if w.backward and w.wants_dx else 0
    if strategy == "expand":
        return u + w.M * s.up + q + dx + 3 * passes * s.N
    return u + w.M * s.up + P + q + dx + passes * s.N


def library_for_now(strategies: Sequence[str], w: Workload) -> bool:
    """Whether the library has a workload until a measurement says otherwise: two products with the base weight."""
    return w.two_products and "library" in strategies


def cheapest(strategies: Iterable[str], w: Workload, device: Device) -> str:
    """The strategy of those given that the model expects to be fastest; ValueError where none of them can run.

    What no roofline says is a rule: "fused" only for decoding (M <= 64, r <= 16); "recompose" and "expand" exactly
    where they spare the library products, "expand" for few tokens alone, since it keeps [M, N], and where no kernel can
    run; no kernel for two products with the base weight until a measurement says so. Large K, few tokens and a pass
    without a backward favour the library by the numbers.
    """
    names = list(strategies)
    expands = w.backward and w.M <= _EXPAND_TOKENS and not {"split", "fused"} & set(names)
    made = [name for name in ("recompose", "expand") if name in names and refusal(name, w) is None]
    made = [name for name in made if any(w.ranks) and (name != "expand" or expands)]
    best = "library"
    for name in made:
        if _beside_base(name, w) < _beside_base(best, w):
            best = name
    if best != "library":
        return best
    if library_for_now(names, w):
        return "library"
    rules = ("recompose", "expand")
    decoding = w.M <= _DECODE_TOKENS and max(w.ranks) <= _DECODE_RANKS
    candidates = [name for name in names if name not in rules and (name != "fused" or decoding)]
    if not candidates:
        raise ValueError(f"no strategy of {', '.join(names) or 'none'} can be chosen for {w}")
    if len(candidates) == 1:
        return candidates[0]
    return min(candidates, key=lambda name: predicted_seconds(works(name, w), device))
