"""The `fastadapt::` operators: each is made of an implementation and an outline of its results.

Schema and flattening follow from the implementation's annotations. What travels together is a NamedTuple: it is handed
on whole, and taken apart only where PyTorch's dispatcher must see every tensor by itself. So are results: a NamedTuple
of tensors, lists of tensors and None, of which the dispatcher sees the tensors in a list. The outline, a function of
the same arguments, says how they are put together again, and what a fake is to make: it has (*sizes, dtype) in the
place of each tensor, all of which are contiguous.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from types import NoneType, UnionType
from typing import Any, Generic, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

_library = torch.library.Library("fastadapt", "DEF")

# Every operator, by name: `Operator` fills it in, and what must cover all operators asks it.
OPERATORS: dict[str, Operator[Any]] = {}

Results = TypeVar("Results")

_WORDS = {Tensor: "Tensor", float: "float", int: "int", bool: "bool", str: "str"}


def _is_record(hint: Any) -> bool:
    """Whether a type is a NamedTuple."""
    return isinstance(hint, type) and issubclass(hint, tuple) and hasattr(hint, "_fields")


def _items(hint: Any) -> Any:
    """The type of a sequence's items, None for another type."""
    origin = get_origin(hint)
    return get_args(hint)[0] if isinstance(origin, type) and issubclass(origin, Sequence) else None


def _word(hint: Any) -> str:
    """A type in the words of a schema."""
    if hint in _WORDS:
        return _WORDS[hint]
    if get_origin(hint) in (UnionType, Union):
        (inner,) = [part for part in get_args(hint) if part is not NoneType]
        return f"{_word(inner)}?"
    return f"{_word(_items(hint))}[]"


class _Layout(NamedTuple):
    """How an argument is taken apart: a record into its fields, a sequence of records into a list of each field."""

    words: tuple[str, ...]  # the schema of each part
    record: Any = None
    fields: tuple[_Layout, ...] = ()
    columns: int = 0
    sequence: bool = False


def _layout(name: str, hint: Any) -> _Layout:
    item = _items(hint)
    if _is_record(hint):
        fields = tuple([_layout(f"{name}_{field}", inner) for field, inner in get_type_hints(hint).items()])
        return _Layout(tuple([word for field in fields for word in field.words]), hint, fields)
    if _is_record(item):
        words = tuple([f"{_word(inner)}[] {name}_{field}" for field, inner in get_type_hints(item).items()])
        return _Layout(words, item, columns=len(words))
    return _Layout((f"{_word(hint)} {name}",), sequence=item is not None)


def _flatten(value: Any, layout: _Layout) -> list[Any]:
    if layout.fields:
        return [part for field, inner in zip(value, layout.fields, strict=True) for part in _flatten(field, inner)]
    if layout.columns:
        return [[record[index] for record in value] for index in range(layout.columns)]
    return [list(value) if layout.sequence else value]


def _unflatten(layout: _Layout, values: Iterator[Any]) -> Any:
    if layout.fields:
        return layout.record(*[_unflatten(field, values) for field in layout.fields])
    if layout.columns:
        columns = [next(values) for _ in range(layout.columns)]
        return [layout.record(*fields) for fields in zip(*columns, strict=True)]
    return next(values)


def _tensors(results: Any) -> list[Tensor]:
    """The tensors of a result, in order."""
    if isinstance(results, Tensor):
        return [results]
    return [] if results is None else [tensor for part in results for tensor in _tensors(part)]


def _is_leaf(outline: Any) -> bool:
    return isinstance(outline, tuple) and not hasattr(outline, "_fields")


def _leaves(outline: Any) -> list[Any]:
    """The (*sizes, dtype) of an outline, in order."""
    if outline is None or _is_leaf(outline):
        return [] if outline is None else [outline]
    return [leaf for part in outline for leaf in _leaves(part)]


def _filled(outline: Any, tensors: Iterator[Tensor]) -> Any:
    """The results of an outline, from its tensors in order."""
    if outline is None or _is_leaf(outline):
        return None if outline is None else next(tensors)
    parts = [_filled(part, tensors) for part in outline]
    return type(outline)(*parts) if hasattr(outline, "_fields") else parts


def _apart(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors with memory of their own each, from its start: compiled code takes that for granted."""
    seen: set[int] = set()
    found = []
    for tensor in tensors:
        storage = tensor.untyped_storage().data_ptr()
        found.append(tensor.clone() if storage in seen or tensor.storage_offset() else tensor)
        seen.add(storage)
    return found


_PLAIN = (Tensor, torch.nn.Parameter)


def sees_operators(x: Tensor) -> bool:
    """Whether who runs x sees operators: compiled code, and subclasses of Tensor such as those without data."""
    return type(x) not in _PLAIN or torch.compiler.is_compiling()


class Operator(Generic[Results]):
    """`fastadapt::name`, the name being the implementation's own.

    Its last argument is what runs it, already resolved: a strategy or a backend, because dispatch by device could reach
    neither Triton on CPU tensors (the interpreter) nor the eager path on CUDA ones. It knows no autograd.
    """

    def __init__(self, run: Callable[..., Results], outline: Callable[..., Any]) -> None:
        self.run, self.outline = run, outline
        self.name = run.__name__
        hints = get_type_hints(run)
        hints.pop("return")
        self._layouts = [_layout(name, hint) for name, hint in hints.items()]
        schema = ", ".join([word for layout in self._layouts for word in layout.words])
        _library.define(f"{self.name}({schema}) -> Tensor[]", tags=(torch.Tag.pt2_compliant_tag,))
        _library.impl(self.name, self._flat_run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"fastadapt::{self.name}", self._flat_fake, lib=_library)
        self.registered: Callable[..., list[Tensor]] = getattr(torch.ops.fastadapt, self.name).default
        OPERATORS[self.name] = self

    def _flat_run(self, *flat: Any) -> list[Tensor]:
        return _apart(_tensors(self.run(*self._records(flat))))

    def _flat_fake(self, *flat: Any) -> list[Tensor]:
        first: Tensor = flat[0] if isinstance(flat[0], Tensor) else flat[0][0]
        leaves = _leaves(self.outline(*self._records(flat)))
        return [first.new_empty(sizes, dtype=dtype) for *sizes, dtype in leaves]

    def flat(self, *args: Any) -> list[Any]:
        """The arguments as the dispatcher sees them."""
        pairs = zip(args, self._layouts, strict=True)
        return [part for value, layout in pairs for part in _flatten(value, layout)]

    def _records(self, flat: Sequence[Any]) -> list[Any]:
        values = iter(flat)
        return [_unflatten(layout, values) for layout in self._layouts]

    def __call__(self, *args: Any) -> Results:
        # Directly where nobody watches: the dispatcher would add ten microseconds to each operator of a layer's step.
        if not sees_operators(args[0] if isinstance(args[0], Tensor) else args[0][0]):
            return self.run(*args)
        results: Results = _filled(self.outline(*args), iter(self.registered(*self.flat(*args))))
        return results


def not_covered(covers: Iterable[str]) -> list[str]:
    """The operators that are not among these names."""
    covered = set(covers)
    return [name for name in OPERATORS if name not in covered]


def operator(outline: Callable[..., Any]) -> Callable[[Callable[..., Results]], Operator[Results]]:
    """Makes an operator of the implementation below it."""
    return lambda run: Operator(run, outline)
