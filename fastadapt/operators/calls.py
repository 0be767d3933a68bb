"""What every public function does around its operator: rows, dtypes under autocast, what needs a gradient."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from .arithmetic import cast


def rows_of(x: Tensor) -> Tensor:
    """x [..., K] as [M, K]."""
    return x.reshape(-1, x.shape[-1]) if x.dim() != 2 else x


def with_leading(y: Tensor, x_shape: torch.Size) -> Tensor:
    """y [M, N] with the leading dimensions of x: [..., N].

    Autograd must not take it for a view: what a Function returns as a view cannot be written in place, which modules
    behind a layer do (ReLU(inplace=True), a residual that is added with +=).
    """
    return y if len(x_shape) == 2 else torch.ops.aten._unsafe_view(y, [*x_shape[:-1], y.shape[1]])


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype of the products: autocast's where it is on for x's device, else x's own."""
    dtype = autocast_dtype(x)
    return x.dtype if dtype is None or x.dtype == torch.float64 else dtype


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Autocast off for x's device inside the `with` block: for products whose dtype is chosen already."""
    return AS_IT_IS if autocast_dtype(x) is None else torch.autocast(x.device.type, enabled=False)


AS_IT_IS = nullcontext()


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype of autocast on x's device, None where it is off."""
    # A device's `type` is a string that is made at each access.
    kind = "cpu" if x.is_cpu else "cuda" if x.is_cuda else x.device.type
    if kind not in ("cpu", "cuda") and not torch.amp.is_autocast_available(kind):
        return None
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def check_same_dtype(x: Tensor, weight: Tensor) -> None:
    # Autocast takes both to its own dtype, but leaves float64 alone.
    mixes = autocast_dtype(x) is not None and torch.float64 not in (x.dtype, weight.dtype)
    if x.dtype != weight.dtype and not mixes:
        raise TypeError(
            f"weight must have x's dtype {x.dtype}, got {weight.dtype}: cast one of them or use torch.autocast"
        )


def in_widest(formula: Callable[..., Tensor], x: Tensor, *others: Any, **named: Any) -> Tensor:
    """A reference formula on tensors of several dtypes, in the widest of them: plain PyTorch mixes none."""
    tensors = [value for value in _tensors((x, *others, *named.values())) if value.is_floating_point()]
    dtype = functools.reduce(torch.promote_types, [tensor.dtype for tensor in tensors])
    result = compute_dtype(x)
    with without_autocast(x):
        found = formula(
            _widened(x, dtype),
            *(_widened(value, dtype) for value in others),
            **{name: _widened(value, dtype) for name, value in named.items()},
        )
    return cast(found, result)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple):
        for part in value:
            yield from _tensors(part)


def _widened(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor):
        return cast(value, dtype) if value.is_floating_point() else value
    if isinstance(value, tuple):
        parts = [_widened(part, dtype) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return value


def applied(function: type[torch.autograd.Function], *args: Any) -> Any:
    """What a Function gives. Raises ValueError where a transform of torch.func is at work, which PyTorch refuses."""
    try:
        return function.apply(*args)
    except RuntimeError as error:
        if not torch._C._are_functorch_transforms_active():
            raise
        raise ValueError(
            "torch.func's transforms (vmap, grad, jvp) cannot look into this operator: use torch.autograd.grad, or "
            'backend="reference", which is plain PyTorch'
        ) from error


def once_differentiable(backward: Callable[..., tuple[Tensor | None, ...]]) -> Callable[..., Any]:
    """As torch's own, for the backward of a Function, with an error that says what it is about.

    It is raised where a gradient is differentiated again, and never passed by: a gradient without a graph would count
    as a constant there.
    """

    @functools.wraps(backward)
    def run(ctx: Any, *grads: Any) -> Any:
        with torch.no_grad():
            found = backward(ctx, *grads)
        if not torch.is_grad_enabled():  # create_graph was not asked for
            return found
        start = torch.zeros((), requires_grad=True)
        return tuple([None if grad is None else _Last.apply(grad, start) for grad in found])

    return run


class _Last(torch.autograd.Function):
    """A gradient that has no gradient of its own."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, start: Tensor) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, again: Tensor) -> Any:
        raise ValueError(
            "the gradients of this operator can be taken once and not be differentiated again, as a gradient penalty "
            'or a Hessian needs: use backend="reference", which is plain PyTorch'
        )


def of_members_with_a_loss(
    backward: Callable[..., tuple[Tensor | None, ...]],
    part: Callable[[Any, Sequence[int]], tuple[Any, Sequence[int]]],
    leading: int,
) -> Callable[..., tuple[Tensor | None, ...]]:
    """The backward of a group's Function, run for the members that have a loss; the others' inputs get no gradient.

    The Function does not materialize gradients: those of members without a loss are None. part: of its context and the
    members that have one, what `backward` reads of these alone, and the places of their tensors among the group's.
    leading: the Function's inputs before the members' tensors, x first.
    """

    def run(ctx: Any, *dys: Tensor | None) -> tuple[Tensor | None, ...]:
        called = [index for index, dy in enumerate(dys) if dy is not None]
        if len(called) == len(dys):
            return backward(ctx, *dys)
        found: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
        if called:
            own, slots = part(ctx, called)
            dx, *grads = backward(own, *[dys[index] for index in called])
            found[0] = dx
            for slot, grad in zip(slots, grads[leading - 1 :], strict=True):
                found[leading + slot] = grad
        return tuple(found)

    return run


def requires_grad(value: Tensor | float | None) -> bool:
    return isinstance(value, Tensor) and value.requires_grad
