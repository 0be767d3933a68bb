"""Logits that nobody has computed yet."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from ..checks import FLOATING
from ..operators.calls import AS_IT_IS, autocast_dtype, compute_dtype
from ..operators.cross_entropy import linear_cross_entropy


class Head(NamedTuple):
    """What a head computes with: weight [V, K], and options of linear_cross_entropy: a form or a bias, dropout."""

    weight: Tensor
    options: dict[str, Any]

    def takes(self, x: Tensor) -> bool:
        """Whether linear_cross_entropy does: the head's own forward says what is wrong with any other x."""
        dtypes = {x.dtype, self.weight.dtype}
        mixes = autocast_dtype(x) is not None and torch.float64 not in dtypes
        fits = x.dim() > 1 and x.shape[-1] == self.weight.shape[1] and x.device == self.weight.device
        return fits and dtypes <= set(FLOATING) and (len(dtypes) == 1 or mixes)


class DeferredLogits(Tensor):
    """Logits as far as their shape, dtype and device: what reads their values has them computed, in full.

    Casts to wider types, slices and views that leave the vocabulary whole, products with a number and a tanh give
    further ones of the kind; torch.nn.functional.cross_entropy of classes gives the loss from chunks of them. The
    values are those that the head and the operations give, and what is in the graph is as if they had run at once.
    """

    _rows: Tensor  # x [..., K]
    _head: Head
    _chunk_bytes: int
    _scale: float
    _softcap: float | None
    _compute: Callable[[], Tensor]
    _kept: Tensor | None
    _root: DeferredLogits | None  # what these were made of at first; no reference to themselves
    _autocast: torch.dtype | None

    @classmethod
    def of(cls, x: Tensor, compute: Callable[[], Tensor], head: Head, chunk_bytes: int) -> DeferredLogits:
        """Those of rows x [..., K] of a head; compute gives their values. With gradients where x is asked with them."""
        made = cls._made(x, head.weight.shape[0], compute_dtype(x))
        made._rows, made._head, made._chunk_bytes, made._compute = x, head, chunk_bytes, compute
        made._scale, made._softcap, made._root, made._autocast = 1.0, None, None, autocast_dtype(x)
        return made

    @classmethod
    def _made(cls, x: Tensor, columns: int, dtype: torch.dtype) -> DeferredLogits:
        make: Any = Tensor._make_wrapper_subclass
        graph, shape = torch.is_grad_enabled(), (*x.shape[:-1], columns)
        made: DeferredLogits = make(cls, shape, dtype=dtype, device=x.device, requires_grad=graph)
        made._kept = None
        if graph:
            with torch._C.DisableTorchFunctionSubclass():
                made.register_hook(_refuse)
        return made

    def _like(self, made_by: Callable[[Tensor], Tensor], **changes: Any) -> DeferredLogits:
        """What an operation makes of these."""
        x, dtype = changes.get("_rows", self._rows), changes.pop("dtype", self.dtype)
        made = self._made(x, self._head.weight.shape[0], dtype)
        root = self if self._root is None else self._root
        made.__dict__.update({**self.__dict__, **changes, "_kept": None, "_root": root})
        made._compute = lambda: made_by(self.values())
        return made

    def values(self) -> Tensor:
        """The logits, computed at most once; with their graph, whoever asks."""
        if self._kept is None:
            with torch.set_grad_enabled(self.requires_grad), self._as_then():
                self._kept = self._compute()
        return self._kept

    def _applies(self) -> bool:
        """Whether a rule does: nobody has read the values, and gradients are asked for as they were at the head.

        Where they are no longer, somebody may be inside of a Function of his own.
        """
        return not self._was_read and torch.is_grad_enabled() == self.requires_grad

    @property
    def _was_read(self) -> bool:
        """Whether the values are there, which may have been written into since."""
        return self._kept is not None or (self._root is not None and self._root._kept is not None)

    def _as_then(self) -> AbstractContextManager[Any]:
        """In the autocast mode that the head was called in."""
        if autocast_dtype(self._rows) == self._autocast:
            return AS_IT_IS
        return torch.autocast(self._rows.device.type, self._autocast, enabled=self._autocast is not None)

    def __repr__(self) -> str:  # type: ignore[override]
        return f"DeferredLogits(shape={tuple(self.shape)}, dtype={self.dtype})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, func.__name__
        if name == "__get__":
            name = getattr(func.__self__, "__name__", "")
        if name in _FACTS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        first = args[0] if args else None
        if name in _RULES and isinstance(first, DeferredLogits) and first._applies():
            found = _RULES[name](first, func, *args[1:], **kwargs)
            if found is not None:
                return found
        args, kwargs = tree_map(_computed, (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise ValueError(_REFUSAL)


def _computed(value: Any) -> Any:
    return value.values() if isinstance(value, DeferredLogits) else value


_REFUSAL = (
    "something other than PyTorch's own functions reads logits that are not computed (fastadapt.chunk_loss): call "
    "chunk_loss(model, enabled=False) for the model's own loss"
)


def _refuse(gradient: Tensor) -> None:
    """A Function of somebody's took the logits for a leaf: what led to them would get no gradient."""
    raise ValueError(_REFUSAL)


# What is known without the values.
_FACTS = {
    *("shape", "dtype", "device", "ndim", "layout", "requires_grad", "size", "dim", "numel", "nelement", "ndimension"),
    *("element_size", "get_device", "is_floating_point", "is_complex", "is_cuda", "is_cpu", "is_mps", "is_xpu"),
    *("is_meta", "is_sparse", "is_nested", "is_quantized", "__len__", "__hash__"),
}


def _cast(logits: DeferredLogits, func: Any, *args: Any, **kwargs: Any) -> DeferredLogits | None:
    """float() and to(dtype): of 16 bits to 32, or nothing at all."""
    if func.__name__ == "float":
        dtype: Any = torch.float32
    else:
        given = [*args, *kwargs.values()]
        dtype = given[0] if len(given) == 1 and set(kwargs) <= {"dtype"} else None
    if dtype is logits.dtype:
        return logits
    if dtype is not torch.float32 or logits.dtype is torch.float64:
        return None
    return logits._like(lambda values: func(values, *args, **kwargs), dtype=dtype)


def _same(logits: DeferredLogits, func: Any, *args: Any, **kwargs: Any) -> DeferredLogits | None:
    return None if args or kwargs else logits


def _viewed(logits: DeferredLogits, func: Any, *args: Any, **kwargs: Any) -> DeferredLogits | None:
    """A view whose rows are these, in order."""
    shape = func(torch.empty(logits.shape, device="meta"), *args, **kwargs).shape
    if shape[-1:] != logits.shape[-1:]:
        return None
    rows = logits._rows.reshape(*shape[:-1], logits._rows.shape[-1])
    # What is a view of other rows than all is none to PyTorch, whose own error that would be.
    return logits._like(lambda values: values.reshape(shape), _rows=rows)


def _sliced(logits: DeferredLogits, func: Any, index: Any) -> DeferredLogits | None:
    parts = index if isinstance(index, tuple) else (index,)
    if not all([part is Ellipsis or type(part) in (int, slice) for part in parts]):
        return None
    to_the_last = Ellipsis in parts or len(parts) >= logits.dim()
    if to_the_last and parts[-1] is not Ellipsis and parts[-1] != slice(None):
        return None
    rows = logits._rows[index]
    return logits._like(lambda values: func(values, index), _rows=rows)


def _times(logits: DeferredLogits, func: Any, factor: Any, **kwargs: Any) -> DeferredLogits | None:
    """A product with a number, or a quotient: c · tanh(scale · y / c) times f has c f and scale f in their places."""
    if type(factor) not in (int, float) or kwargs:
        return None
    divides = "div" in func.__name__  # truediv, true_divide
    if divides and not factor:
        return None
    size = 1.0 / factor if divides else factor
    cap = None if logits._softcap is None else logits._softcap * size
    if cap is not None and cap <= 0.0:
        return None
    return logits._like(lambda values: func(values, factor), _scale=logits._scale * size, _softcap=cap)


def _tanh(logits: DeferredLogits, func: Any, **kwargs: Any) -> DeferredLogits | None:
    return None if logits._softcap is not None or kwargs else logits._like(func, _softcap=1.0)


def _cross_entropy(
    logits: DeferredLogits,
    func: Any,
    target: Any,
    weight: Any = None,
    size_average: Any = None,
    ignore_index: int = -100,
    reduce: Any = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor | None:
    others = weight is not None or size_average is not None or reduce is not None
    if others or logits.dim() != 2 or target.dtype != torch.int64 or target.shape != logits.shape[:1]:
        return None
    if target.device != logits.device:
        return None
    with logits._as_then():
        return linear_cross_entropy(
            logits._rows,
            logits._head.weight,
            target,
            scale=logits._scale,
            softcap=logits._softcap,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            reduction=reduction,
            chunk_bytes=logits._chunk_bytes,
            **logits._head.options,
        )


_RULES: dict[str, Callable[..., Tensor | None]] = {
    "float": _cast,
    "to": _cast,
    "contiguous": _same,
    "view": _viewed,
    "reshape": _viewed,
    "flatten": _viewed,
    "__getitem__": _sliced,
    "mul": _times,
    "__mul__": _times,
    "__rmul__": _times,
    "div": _times,
    "true_divide": _times,
    "__truediv__": _times,
    "__div__": _times,
    "tanh": _tanh,
    "cross_entropy": _cross_entropy,
}
