"""`linear_cross_entropy`: a head's projection and the cross-entropy of its logits, a chunk of tokens at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..checks import check_device, check_frozen, check_vector, shape_error
from ..reference import AdapterForm
from .adapter_linear.function import adapter_linear
from .arithmetic import cast, linear, sum_dtype
from .calls import (
    applied,
    check_same_dtype,
    compute_dtype,
    once_differentiable,
    requires_grad,
    rows_of,
    without_autocast,
)
from .registry import sees_operators

# Of fp32 logits in a chunk. A CPU's products with SmolLM2's head take the same time a token from 128 rows on, and this
# is 341 of them; of a vocabulary of 256k it is 64.
CHUNK_BYTES = 64 << 20

_REDUCTIONS = ("mean", "sum", "none")


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    form: AdapterForm | None = None,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    num_items: Tensor | float | None = None,
    dropout: float = 0.0,
    training: bool = False,
    chunk_bytes: int = CHUNK_BYTES,
    backend: str = "auto",
    strategy: str = "auto",
) -> Tensor:
    """Cross-entropy of a head's logits, of which no more than a chunk of tokens is ever there:

        y = W0 x + b, or the adapter form on W0 as `adapter_linear` has it        z = c · tanh(scale · y / c)
        loss_t = (1 − ε) (log Σ_v exp z_tv − z_t,label) + ε (log Σ_v exp z_tv − mean_v z_tv)

    with c = softcap (z = scale · y without one) and ε = label_smoothing; z and its sums in fp32, fp64 for fp64. Labels
    are those of x's own positions: whoever predicts the next token shifts them before. Where a label is ignore_index
    its token costs nothing, no projection either.
    On a GPU where liger-kernel is installed its kernel computes what has no form and no scale, under backend "auto".
    The gradients are made beside the loss, chunk by chunk: each of x, of every tensor of the form, and without a form
    of weight and bias where they train, added up in fp32. With "none" the backward makes a chunk's logits again.
    reduction: "mean" over the labels that count, or over num_items in their place; "sum"; "none", one loss a label.
    chunk_bytes: of a chunk's logits in fp32, 64 MiB; two to four tensors of that size are there at a time.
    dropout, training, backend, strategy: as `adapter_linear` takes them; each chunk draws a mask of its own, the same
    in its backward. backend "reference", and compiled code, have all logits at once.
    Shapes: x [..., K]; weight [V, K]; labels [...] of int64; bias [V]; loss [], [...] with "none". Once differentiable.
    Raises ValueError on mismatched shapes or devices, labels outside [0, V), a form beside a bias or beside a weight
    that trains, another reduction; TypeError on other dtypes of labels, and what `adapter_linear` raises.
    Source: Wijmans et al. 2024, arXiv:2411.09009; Hsu et al. 2024, arXiv:2410.10989, section 3.2, which keep W0 alone.

    >>> x, weight, labels = torch.randn(2, 5, 16), torch.randn(100, 16), torch.randint(100, (2, 5))
    >>> form = AdapterForm(A=torch.randn(4, 16), B=torch.randn(100, 4), out_scale=0.5)
    >>> logits = adapter_linear(x, weight, form).flatten(0, 1)
    >>> whole = torch.nn.functional.cross_entropy(logits, labels.flatten())
    >>> torch.testing.assert_close(linear_cross_entropy(x, weight, labels, form=form, chunk_bytes=1200), whole)
    """
    _check(x, weight, labels, form, bias, softcap, label_smoothing, reduction, num_items, chunk_bytes)
    options = {"dropout": dropout, "training": training, "backend": backend, "strategy": strategy}
    head = _Head(None if form is None else options, scale, softcap, label_smoothing)
    operands: tuple[Any, ...] = (bias,) if form is None else form
    rows, targets = rows_of(x), labels.reshape(-1)
    counts = targets != ignore_index
    if backend == "reference" or sees_operators(x):
        losses = head.losses(rows, targets, weight, operands, ignore_index)
    else:
        kept = counts.nonzero().squeeze(1)
        _check_labels(targets[kept], weight.shape[0], ignore_index)
        chunk = max(1, chunk_bytes // (weight.shape[0] * sum_dtype(x).itemsize))
        weight = cast(weight, compute_dtype(x))
        if reduction != "none":
            theirs = backend == "auto" and kept.numel() > 0 and head.is_liger_s(rows)
            summed = _summed_by_liger if theirs else _summed
            total = summed(rows, targets, weight, operands, head, kept, chunk)
            return total if reduction == "sum" else total / (kept.numel() if num_items is None else num_items)
        losses = _one_by_one(rows, targets, weight, operands, head, kept, chunk)
    if reduction == "none":
        return losses.view(labels.shape)
    total = losses.sum()
    return total if reduction == "sum" else total / (counts.sum() if num_items is None else num_items)


class _Head(NamedTuple):
    """What is known beside tensors: how a form runs, None without one, and what comes behind it.

    operands: the fields of the form; without one the bias alone.
    """

    options: dict[str, Any] | None
    scale: float
    softcap: float | None
    label_smoothing: float

    def is_liger_s(self, x: Tensor) -> bool:
        """Whether Liger's kernel is there and computes this."""
        plain = self.options is None and self.scale == 1.0 and x.dtype is not torch.float64
        return plain and x.device.type == "cuda" and find_spec("liger_kernel") is not None

    def output(self, x: Tensor, weight: Tensor, operands: tuple[Any, ...]) -> Tensor:
        """y [M, V] of x [M, K]."""
        if self.options is not None:
            return adapter_linear(x, weight, AdapterForm(*operands), **self.options)
        return linear(x, weight, *operands)

    def logits(self, y: Tensor) -> Tensor:
        """z [M, V]."""
        z = y.to(sum_dtype(y))
        if self.softcap is not None:
            return torch.tanh(z * (self.scale / self.softcap)) * self.softcap
        return z if self.scale == 1.0 else z * self.scale

    def losses(
        self, x: Tensor, targets: Tensor, weight: Tensor, operands: tuple[Any, ...], ignore_index: int = -100
    ) -> Tensor:
        """The loss of each row, in PyTorch's own operations."""
        z = self.logits(self.output(x, weight, operands))
        smoothing = self.label_smoothing
        return F.cross_entropy(z, targets, ignore_index=ignore_index, reduction="none", label_smoothing=smoothing)

    def loss_and_gradient(self, y: Tensor, targets: Tensor, wanted: bool) -> tuple[Tensor, Tensor | None]:
        """(Σ loss, its gradient in y's dtype where it is wanted) of y [M, V], in place where that is ours."""
        z = self.logits(y)
        slope = None
        if self.softcap is not None and wanted:
            slope = (z / self.softcap).square_().neg_().add_(1.0)
        log_p = F.log_softmax(z, -1)
        del z
        eps, places = self.label_smoothing, (torch.arange(len(targets), device=targets.device), targets)
        loss = (eps - 1.0) * log_p[places].sum()
        if eps:
            loss = loss - eps * log_p.mean(1).sum()
        if not wanted:
            return loss, None
        gradient = log_p.exp_()
        if eps:
            gradient.sub_(eps / gradient.shape[1])
        gradient[places] -= 1.0 - eps
        if slope is not None:
            gradient.mul_(slope)
        if self.scale != 1.0:
            gradient.mul_(self.scale)
        return loss, cast(gradient, y.dtype)


def _chunks(kept: Tensor, chunk: int) -> Iterator[Tensor]:
    """The places of tokens in chunks of at most so many, as equal as can be."""
    if kept.numel():
        yield from kept.tensor_split(-(-kept.numel() // chunk))


def _summed(
    x: Tensor, targets: Tensor, weight: Tensor, operands: tuple[Any, ...], head: _Head, kept: Tensor, chunk: int
) -> Tensor:
    """Σ loss over the tokens that are kept."""
    tensors = {id(value): value for value in operands if isinstance(value, Tensor)}  # one that is in two places is one
    if torch.is_grad_enabled() and any([requires_grad(tensor) for tensor in (x, weight, *tensors.values())]):
        order = list(tensors)
        places = [order.index(id(value)) if isinstance(value, Tensor) else None for value in operands]
        call = _Call(head, tuple(zip(places, operands, strict=True)), chunk)
        total: Tensor = applied(LinearCrossEntropyFunction, x, weight, targets, kept, call, *tensors.values())
        return total
    found = x.new_zeros((), dtype=sum_dtype(x))
    with without_autocast(x):
        for rows in _chunks(kept, chunk):
            y = head.output(cast(x[rows], weight.dtype), weight, operands)
            found += head.loss_and_gradient(y, targets[rows], wanted=False)[0]
    return found


def _summed_by_liger(
    x: Tensor, targets: Tensor, weight: Tensor, operands: tuple[Any, ...], head: _Head, kept: Tensor, chunk: int
) -> Tensor:
    """The same by Liger's kernel, whose chunks are its own."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    total: Tensor = liger_fused_linear_cross_entropy(
        cast(x[kept], weight.dtype),
        weight,
        targets[kept],
        *operands,
        label_smoothing=head.label_smoothing,
        reduction="sum",
        softcap=head.softcap,
        accum_dtype=torch.float32,
    )
    return total


def _one_by_one(
    x: Tensor, targets: Tensor, weight: Tensor, operands: tuple[Any, ...], head: _Head, kept: Tensor, chunk: int
) -> Tensor:
    """The loss of each token; of what is kept for the backward no logits are a part."""
    run: Callable[..., Tensor] = head.losses
    parts = [x.new_zeros(0, dtype=sum_dtype(x))]
    with without_autocast(x):
        for rows in _chunks(kept, chunk):
            own = cast(x[rows], weight.dtype), targets[rows], weight, operands
            parts.append(checkpoint(run, *own, use_reentrant=False) if torch.is_grad_enabled() else run(*own))
    return x.new_zeros(x.shape[0], dtype=sum_dtype(x)).index_copy(0, kept, torch.cat(parts))


class _Call(NamedTuple):
    """What the Function is told beside tensors; of each operand its place among the tensors, None for other values."""

    head: _Head
    operands: tuple[tuple[int | None, Any], ...]
    chunk: int


class LinearCrossEntropyFunction(torch.autograd.Function):
    """Σ loss with the gradients of x [M, K], of the weight and of a form's tensors, which the forward makes.

    They are all that is kept for the backward, which scales them by dloss.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, kept: Tensor, call: _Call, *tensors: Tensor
    ) -> Tensor:
        needs_x, needs_weight, _, _, _, *needed = ctx.needs_input_grad
        head, dtype = call.head, sum_dtype(x)
        weight = weight.detach().requires_grad_(needs_weight)
        leaves = [tensor.detach().requires_grad_(need) for tensor, need in zip(tensors, needed, strict=True)]
        operands = tuple([value if place is None else leaves[place] for place, value in call.operands])
        trained = [leaf for leaf in (weight, *leaves) if leaf.requires_grad]
        total = x.new_zeros((), dtype=dtype)
        dx = x.new_zeros(x.shape, dtype=weight.dtype) if needs_x else None
        sums = [leaf.new_zeros(leaf.shape, dtype=sum_dtype(leaf)) for leaf in trained]
        with without_autocast(x):
            for rows in _chunks(kept, call.chunk):
                part = cast(x[rows], weight.dtype).detach().requires_grad_(needs_x)
                with torch.enable_grad():
                    y = head.output(part, weight, operands)
                loss, gradient = head.loss_and_gradient(y.detach(), targets[rows], wanted=True)
                total += loss
                inputs = [part, *trained] if needs_x else trained
                found = list(torch.autograd.grad(y, inputs, gradient, allow_unused=True))
                del y, gradient
                if dx is not None:
                    dx[rows] = found.pop(0)
                for own, grad in zip(sums, found, strict=True):
                    if grad is not None:
                        own += grad
        ctx.save_for_backward(dx, *sums)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        dx, *sums = ctx.saved_tensors
        needs_x, needs_weight, _, _, _, *needed = ctx.needs_input_grad
        # In other dtypes than their tensors' the gradients are sums in fp32: autograd casts them.
        scaled = iter([own * dloss for own in sums])
        dx = dx * dloss if needs_x else None
        dweight = next(scaled) if needs_weight else None
        return dx, dweight, None, None, None, *[next(scaled) if need else None for need in needed]


def _check(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    form: AdapterForm | None,
    bias: Tensor | None,
    softcap: float | None,
    label_smoothing: float,
    reduction: str,
    num_items: Any,
    chunk_bytes: int,
) -> None:
    """Raises ValueError or TypeError for what `adapter_linear` does not see."""
    if weight.dim() != 2:
        raise shape_error("weight", "[V, K]", weight)
    if x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        raise shape_error("x", f"[..., {weight.shape[1]}] to go with weight {tuple(weight.shape)}", x)
    if labels.shape != x.shape[:-1]:
        raise shape_error("labels", f"{list(x.shape[:-1])}, one for each row of x", labels)
    if labels.dtype != torch.int64:
        raise TypeError(f"labels must be of torch.int64, got {labels.dtype}: probabilities of classes have no chunks")
    for name, value in (("weight", weight), ("labels", labels)):
        check_device(name, value, x.device)
    check_same_dtype(x, weight)
    if form is None:
        check_vector("bias", bias, weight.shape[0], x.device)
    elif bias is not None:
        raise ValueError("bias goes without a form, whose own bias is the whole β: give it as form.bias")
    else:
        check_frozen(weight)
    if reduction not in _REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(_REDUCTIONS)}, got {reduction!r}")
    if num_items is not None and reduction != "mean":
        raise ValueError(f'num_items is what reduction "mean" divides by, got reduction={reduction!r}: leave it out')
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing must be in [0, 1], got {label_smoothing}")
    if softcap is not None and softcap <= 0.0:
        raise ValueError(f"softcap must be above 0, got {softcap}: None leaves it out")
    if chunk_bytes < 1:
        raise ValueError(f"chunk_bytes must be at least 1, got {chunk_bytes}")


def _check_labels(labels: Tensor, columns: int, ignore_index: int) -> None:
    if labels.numel():
        low, high = (int(value) for value in labels.aminmax())
        if low < 0 or high >= columns:
            wrong = low if low < 0 else high
            raise ValueError(f"labels must lie in [0, {columns}) or be ignore_index {ignore_index}, got {wrong}")
