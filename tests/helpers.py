"""How results are judged, and how a kernel's reads and writes are watched."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

# NaN with a payload that no computation makes: read, it poisons the result; overwritten, even by NaN, it is missed.
_CANARIES = {
    torch.float64: (torch.int64, 0x7FF8_5EED_5EED_5EED),
    torch.float32: (torch.int32, 0x7FC5_5EED),
    torch.float16: (torch.int16, 0x7E5D),
    torch.bfloat16: (torch.int16, 0x7FD5),
    torch.int64: (torch.int64, 0x5EED_5EED_5EED_5EED),
    torch.int32: (torch.int32, 0x5EED_5EED),
    torch.uint8: (torch.uint8, 0x5E),
}
_MARGIN = 9


class SumsOfSizes(TorchDispatchMode):
    """Inside, a formula and its backward compute Σ|terms| where they would compute Σ terms.

    |x| |W|ᵀ for x Wᵀ, |a| + |b| for a − b, and so on: every operation sees the sizes of its operands, so that nothing
    cancels. Rounding is in proportion to that, whatever the order in which a CPU or a BLAS adds.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs, schema = kwargs or {}, func._schema
        if any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns):
            return func(*args, **kwargs)  # a view holds what it views

        def size(value: Any) -> Any:
            if isinstance(value, Tensor):
                return value.abs() if value.is_floating_point() else value
            return abs(value) if isinstance(value, float) else value

        written = {a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write}
        names = [argument.name for argument in schema.arguments]
        args = tuple(a if name in written else tree_map(size, a) for name, a in zip(names, args, strict=False))
        kwargs = {name: a if name in written else tree_map(size, a) for name, a in kwargs.items()}
        added = {"aten::sub": torch.add, "aten::rsub": torch.add, "aten::neg": torch.abs}
        return added.get(schema.name, func)(*args, **kwargs)


def assert_close(actual: Tensor, exact: Tensor, reference: Tensor, sizes: Tensor) -> None:
    """Hold a result to twice the error that PyTorch makes with the plain formula in the same dtype.

        max|actual − exact| ≤ 2 (max|reference − exact| + eps(dtype) max Σ|terms|), and actual is finite

    exact is the formula in fp64, reference the formula run in the dtype that the result is judged in, sizes the formula
    inside SumsOfSizes.
    """
    assert actual.shape == exact.shape == reference.shape == sizes.shape, (actual.shape, exact.shape, sizes.shape)
    if actual.numel() == 0:
        return
    assert torch.isfinite(actual).all(), f"{int((~torch.isfinite(actual)).sum())} of {actual.numel()} are not finite"
    exact = exact.detach().double()
    error = (actual.detach().double() - exact).abs().max().item()
    reference_error = (reference.detach().double() - exact).abs().max().item()
    allowed = 2 * (reference_error + torch.finfo(reference.dtype).eps * sizes.detach().abs().max().item())
    assert error <= allowed, f"error {error:.3e} > allowed {allowed:.3e}; the reference's own: {reference_error:.3e}"


def assert_follows(
    actual: Mapping[str, Tensor],
    formula: Callable[[torch.dtype], Mapping[str, Tensor]],
    dtype: torch.dtype,
) -> None:
    """Hold results, by name, to a formula that computes all of them in the dtype that it is given: `assert_close`.

    dtype: of the results, for the error that the formula itself makes there.
    """
    exact, reference = formula(torch.float64), formula(dtype)
    with SumsOfSizes():
        sizes = formula(torch.float64)
    for name, value in actual.items():
        try:
            assert_close(value, exact[name], reference[name].to(dtype), sizes[name])
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None


def _canary_buffer(shape: Sequence[int], dtype: torch.dtype, device: Any) -> Tensor:
    integers, pattern = _CANARIES[dtype]
    return torch.full(tuple(shape), pattern, dtype=integers, device=device).view(dtype)


def guarded(tensor: Tensor) -> Tensor:
    """The same values as a strided view into the middle of a larger buffer whose margins hold NaN."""
    buffer = _canary_buffer([size + 2 * _MARGIN for size in tensor.shape], tensor.dtype, tensor.device)
    view = buffer[tuple(slice(_MARGIN, _MARGIN + size) for size in tensor.shape)]
    return view.copy_(tensor)


def margins_intact(view: Tensor) -> bool:
    """Whether everything around a view that guarded() or guarded_outputs() made is as it was made."""
    buffer = view._base
    assert buffer is not None, "not a guarded tensor"
    integers, pattern = _CANARIES[buffer.dtype]
    outside = torch.ones(buffer.shape, dtype=torch.bool, device=buffer.device)
    outside.as_strided(view.shape, view.stride(), view.storage_offset()).fill_(False)
    return bool((buffer.view(integers)[outside] == pattern).all())


@contextmanager
def guarded_outputs() -> Iterator[list[Tensor]]:
    """Inside, torch.empty and torch.empty_like give contiguous tensors between margins of NaN; yields all of them."""
    outputs: list[Tensor] = []

    def guarded_empty(*shape: Any, dtype: torch.dtype, device: Any = "cpu") -> Tensor:
        size = torch.Size(shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape)
        buffer = _canary_buffer([size.numel() + 2 * _MARGIN], dtype, device)
        outputs.append(buffer[_MARGIN : _MARGIN + size.numel()].view(size))
        return outputs[-1]

    def guarded_empty_like(other: Tensor) -> Tensor:
        return guarded_empty(other.shape, dtype=other.dtype, device=other.device)

    with mock.patch.object(torch, "empty", guarded_empty), mock.patch.object(torch, "empty_like", guarded_empty_like):
        yield outputs


def layout_is_told(operator: Any, args: tuple[Any, ...]) -> None:
    """Assert that an operator's fake tells what it returns: shapes, dtypes and strides, which compiled code trusts."""
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        convert = lambda a: mode.from_tensor(a) if isinstance(a, Tensor) else a  # noqa: E731
        fake = operator(*torch.utils._pytree.tree_map(convert, args))
    real = operator(*args)
    for f, r in zip(*((v if isinstance(v, (tuple, list)) else [v]) for v in (fake, real)), strict=True):
        assert (f.shape, f.dtype) == (r.shape, r.dtype)
        assert f.stride() == r.stride() or r.numel() == 0
