"""Launchers prepared: what a launcher does for arguments of one outline is found out once, and then repeated.

At few tokens the host takes longer to launch a kernel than the GPU to run it: tiles and strides in Python, and Triton's
look at fifty arguments. All of it follows from the outline of what the launcher is given: of each tensor shape,
strides, dtype, device and what its address leaves divided by 16, for which Triton compiles kernels of their own; and
plain values as they are. So at the second call of an outline the launcher rehearses: it runs on tensors without data
and leaves a list of the memory it takes, the kernels it launches and whatever PyTorch does beside. Later calls repeat
that list with the addresses of their own tensors, through `compiled[grid](*arguments)` of the kernels that Triton's
just-in-time path gave at the first launch.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, ParamSpec, TypeVar, cast

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import driver

from . import configs
from .recorded import Launch

# Programs are small; a launcher that has met more outlines than this starts anew.
_MOST = 4096

# Triton compiles kernels of their own for addresses that are multiples of this.
_ALIGNMENT = 16

# On AMD it also tells storages of more than 2^31 bytes from smaller ones.
_ON_AMD = torch.version.hip is not None

# The interpreter, which is chosen when kernels are imported, launches nothing.
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

_VALUES = frozenset({type(None), bool, int, float, str})

_aten = torch.ops.aten
_NEW_MEMORY = {
    _aten.empty.memory_format,
    _aten.empty_like.default,
    _aten.empty_strided.default,
    _aten.new_empty.default,
    _aten.new_empty_strided.default,
}

P = ParamSpec("P")
Result = TypeVar("Result")


def prepared(launcher: Callable[P, Result]) -> Callable[P, Result]:
    """The launcher, whose work is prepared from the second call of an outline on.

    Everything that it does has to follow from the outline: it must not look at what tensors hold, nor at what is
    neither argument nor constant, and returns tensors in tuples, lists and NamedTuples.
    """
    programs: dict[Any, _Program | None] = {}

    @functools.wraps(launcher)
    def run(*args: P.args, **options: P.kwargs) -> Result:
        key: list[Any] = [*options]
        tensors: list[Tensor] = []
        addresses: list[int] = []
        if (
            configs.is_recorded()
            or not _look(args, key, tensors, addresses)
            or not _look(options.values(), key, tensors, addresses)
        ):
            return launcher(*args, **options)
        outline = tuple(key)
        program = programs.get(outline)
        if program is None:
            # An outline that comes once, such as a prompt of a length of its own, is not worth a rehearsal.
            if outline not in programs:
                if len(programs) >= _MOST:
                    programs.clear()
                programs[outline] = None
                return launcher(*args, **options)
            if any([tensor.data_ptr() % tensor.element_size() for tensor in tensors]):
                return launcher(*args, **options)
            program = programs[outline] = _Program(launcher, args, options, tensors[0].device)
        return cast(Result, program(tensors, addresses))

    return launcher if _INTERPRETED else run


def _look(values: Iterable[Any], key: list[Any], tensors: list[Tensor], addresses: list[int]) -> bool:
    """Adds the outline of nested values to a key, and their tensors and these tensors' addresses to the lists.

    False where a tensor is of a class of its own, which may do other things.
    """
    for value in values:
        kind = value.__class__
        if kind in _VALUES:
            key.append(value)
        elif kind is Tensor or kind is Parameter:
            address = value.data_ptr()
            key += value.shape, value.stride(), value.dtype, value.get_device(), address % _ALIGNMENT
            if _ON_AMD:
                key.append(value.untyped_storage().nbytes() >= 1 << 31)
            tensors.append(value)
            addresses.append(address)
        elif isinstance(value, (tuple, list)):
            key.append(len(value))
            if not _look(value, key, tensors, addresses):
                return False
        elif isinstance(value, Tensor):
            return False
        else:
            key.append(value)
    return True


class _Place(NamedTuple):
    """A tensor of a rehearsal: the source-th tensor that a program has, or a view of it."""

    source: int
    offset: int  # of its address, in bytes
    view: tuple[Any, ...] | None  # shape, strides, and the offset in elements


def _mapped(change: Callable[[Any], Any], value: Any) -> Any:
    """A nested value with its leaves changed."""
    if isinstance(value, list):
        return [_mapped(change, part) for part in value]
    if isinstance(value, tuple) and not isinstance(value, _Place):
        parts = [_mapped(change, part) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return change(value)


def _filled(value: Any, tensors: Sequence[Tensor]) -> Any:
    """A nested value with tensors in the place of places."""
    kind = value.__class__
    if kind is _Place:
        whole, view = tensors[value.source], value.view
        return whole if view is None else whole.as_strided(view[0], view[1], whole.storage_offset() + view[2])
    if kind is list:
        return [_filled(part, tensors) for part in value]
    if isinstance(value, tuple):
        parts = [_filled(part, tensors) for part in value]
        return kind(*parts) if hasattr(kind, "_fields") else tuple(parts)
    return value


def _flat(value: Any) -> list[Any]:
    if isinstance(value, (list, tuple)) and not isinstance(value, _Place):
        return [leaf for part in value for leaf in _flat(part)]
    return [value]


class _Launched:
    """A launch of a program."""

    def __init__(self, launch: Launch, placed: Callable[[Any], Any]) -> None:
        self.kernel, self.config = launch.kernel, launch.config
        self.grid = (*launch.grid, 1, 1)[:3]
        self.arguments = {name: _mapped(placed, value) for name, value in launch.arguments.items()}
        named = {**self.arguments, **self.config}
        # What the kernel takes, in its order, and where addresses go into it: by themselves, and inside of tuples.
        self.values = [named[name] for name in self.kernel.arg_names]
        places = [(position, value) for position, value in enumerate(self.values) if isinstance(value, _Place)]
        self.single = [(position, place.source, place.offset) for position, place in places]
        self.grouped = [
            (position, [(part.source, part.offset) if isinstance(part, _Place) else (None, part) for part in value])
            for position, value in enumerate(self.values)
            if type(value) is tuple and any(isinstance(part, _Place) for part in value)
        ]
        self.compiled: Callable[..., object] | None = None

    def __call__(self, tensors: list[Tensor], addresses: list[int], aligned: bool, stream: int) -> bool:
        if self.compiled is None or not aligned:
            arguments = {name: _filled(value, tensors) for name, value in self.arguments.items()}
            compiled = self.kernel[self.grid](**arguments, **self.config)
            # Where it cannot be called again, as when a hook kept Triton from compiling, the next call does the same.
            if aligned and hasattr(compiled, "__getitem__"):
                self.compiled = compiled[self.grid]
            return aligned
        values = self.values.copy()
        for position, source, offset in self.single:
            values[position] = addresses[source] + offset
        for position, parts in self.grouped:
            values[position] = tuple([part if source is None else addresses[source] + part for source, part in parts])
        self.compiled(*values, stream=stream)
        return True


class _Computed(NamedTuple):
    """An operation of PyTorch in a program; `made`: which of its results are new tensors."""

    operation: Callable[..., Any]
    args: Any
    options: dict[str, Any]
    made: list[int]

    def __call__(self, tensors: list[Tensor], addresses: list[int], aligned: bool, stream: int) -> bool:
        options = {name: _filled(value, tensors) for name, value in self.options.items()}
        results = _flat(self.operation(*_filled(self.args, tensors), **options))
        found = [results[index] for index in self.made]
        tensors += found
        addresses += [tensor.data_ptr() for tensor in found]
        return aligned and not any([tensor.data_ptr() % _ALIGNMENT for tensor in found])


class _Rehearsal(TorchDispatchMode):
    """Notes what PyTorch does for a launcher whose tensors have no data and storages of their own each."""

    def __init__(self, inputs: Sequence[Tensor], device: torch.device, steps: list[Any]) -> None:
        super().__init__()
        self.device, self.steps = device, steps
        # Whole tensors by storage. All that there were are kept: a storage's number would be given again.
        self.inputs = {_storage(tensor): tensor for tensor in inputs}
        self.memory: dict[int, Tensor] = {}
        self.made: dict[int, Tensor] = {}
        self.kept: list[Any] = []

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = kwargs or {}
        results = operation(*args, **options)
        flat = _flat(results)
        self.kept += flat
        known = {*self.inputs, *self.memory, *self.made}
        new = {_storage(tensor): index for index, tensor in enumerate(flat) if _storage(tensor) not in known}
        if operation in _NEW_MEMORY and results.is_contiguous():
            self.memory |= {storage: flat[index] for storage, index in new.items()}
        elif new or operation._schema.is_mutable:
            self.made |= {storage: flat[index] for storage, index in new.items()}
            self.steps.append(_Computed(operation, args, options, [*new.values()]))
        return results

    def placed(self, value: Any) -> Any:
        """The place of a tensor, and the device in the place of none; anything else as it is."""
        if isinstance(value, torch.device):
            return self.device
        if not isinstance(value, Tensor):
            return value
        wholes = self.inputs | self.memory | self.made
        storage = _storage(value)
        whole = wholes[storage]
        view = None
        if (value.shape, value.stride(), value.data_ptr()) != (whole.shape, whole.stride(), whole.data_ptr()):
            view = tuple(value.shape), value.stride(), value.storage_offset() - whole.storage_offset()
        return _Place([*wholes].index(storage), value.data_ptr() - whole.data_ptr(), view)


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _stand_in(tensor: Tensor) -> Tensor:
    """A tensor without data of the same outline. Where there is no data, addresses begin at 0."""
    first = tensor.data_ptr() % _ALIGNMENT // tensor.element_size()
    count = 1 + sum([(length - 1) * stride for length, stride in zip(tensor.shape, tensor.stride(), strict=True)])
    whole = torch.empty(first + max(count, 0), dtype=tensor.dtype, device="meta")
    return whole.as_strided(tensor.shape, tensor.stride(), first)


class _Program:
    """What a launcher does for arguments of one outline."""

    def __init__(self, launcher: Callable[..., Any], args: Any, options: dict[str, Any], device: torch.device) -> None:
        self.device = device
        inputs: list[Tensor] = []

        def stand_in(value: Any) -> Any:
            if isinstance(value, Tensor):
                value = _stand_in(value)
                inputs.append(value)
            return value

        stand_ins = _mapped(stand_in, args)
        named = {name: _mapped(stand_in, value) for name, value in options.items()}
        with configs.rehearsed_launches(device) as noted:
            steps: list[Any] = noted
            with _Rehearsal(inputs, device, steps) as rehearsal:
                result = launcher(*stand_ins, **named)
        placed = rehearsal.placed
        self.memory = [(new.shape, new.stride(), new.dtype) for new in rehearsal.memory.values()]
        self.steps = [
            _Launched(step, placed)
            if isinstance(step, Launch)
            else step._replace(
                args=_mapped(placed, step.args),
                options={name: _mapped(placed, value) for name, value in step.options.items()},
            )
            for step in steps
        ]
        self.result = _mapped(placed, result)

    def __call__(self, tensors: list[Tensor], addresses: list[int]) -> Any:
        """What the launcher gives for its tensors, in their order."""
        active = driver.active
        current = active.get_current_device()
        if self.device.index not in (None, current):
            # Triton launches on the current device, which need not be the one that holds the tensors.
            with torch.cuda.device(self.device):
                return self._run(tensors, addresses, active.get_current_stream(self.device.index))
        return self._run(tensors, addresses, active.get_current_stream(current))

    def _run(self, tensors: list[Tensor], addresses: list[int], stream: int) -> Any:
        aligned, device = True, self.device
        for shape, stride, dtype in self.memory:
            # PyTorch takes half as long as for a new tensor whose strides it has to find out.
            new = torch.empty_strided(shape, stride, dtype=dtype, device=device)
            address = new.data_ptr()
            aligned = aligned and address % _ALIGNMENT == 0
            tensors.append(new)
            addresses.append(address)
        for step in self.steps:
            aligned = step(tensors, addresses, aligned, stream)
        return _filled(self.result, tensors)
