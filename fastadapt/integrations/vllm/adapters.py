"""From an adapter's directory to the forms of this process's parts of the layers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from ...functional import weight_norm_squared
from ...operators.multi_adapter_linear.batch import added_bias
from ...operators.multi_adapter_linear.groups import in_bags
from ...reference import AdapterForm
from ...serving import AdapterError, LayerShape, PartForm, ShapedAdapter, read_adapter_by_shapes
from ...serving.entries import pair_key
from ...serving.loader import check_finite
from .layers import FastLinear, Slice

# Of each layer of an adapter's model, vLLM's name for it.
Naming = Mapping[str, str]


class SliceForms(NamedTuple):
    """What vLLM takes for the weights of one layer: a form a slice, None for those that stay the base model's."""

    lora_a: list[AdapterForm | None]
    lora_b: None = None


class SharedPair:
    """VeRA's frozen pair in the engine's dtype, once for all adapters that have it."""

    def __init__(self, A: Tensor, B: Tensor) -> None:
        self.A, self.B = A, B
        self._whole: dict[tuple[int, int], Tensor] = {}

    def laid_out(self, form: AdapterForm) -> AdapterForm:
        """A form whose A and B are slices of the pair, as its rows are read fastest.

        In 16 bits FormStacks wants tables without gaps: layers of one width share one. In fp32 it is best that all
        layers read the beginnings of the same rows. A B of rows that are no neighbours is no slice but a copy, the
        layer's own.
        """
        if not in_bags(self.A):
            return form
        B = form.B
        if B.untyped_storage().data_ptr() != self.B.untyped_storage().data_ptr():
            return form._replace(B=B.T.contiguous().T)
        key = (int(B.storage_offset()), B.shape[0])
        if key not in self._whole:
            self._whole[key] = B.T.contiguous().T
        return form._replace(B=self._whole[key])


class Pairs:
    """The pairs that are in use, by their content. In the host's memory, as all forms that are in no slot."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._pairs: WeakValueDictionary[object, SharedPair] = WeakValueDictionary()

    def of(self, A: Tensor, B: Tensor) -> SharedPair:
        key = pair_key(A, B)
        pair = self._pairs.get(key)
        if pair is None:
            A, B = (side.to(self._dtype) for side in (A, B))
            # B by rank rows, of which every layer takes the beginnings: products of few rows read them so in half the
            # time. A in 16 bits by columns, of which every layer takes the first ones: see laid_out.
            pair = SharedPair(A.T.contiguous().T if in_bags(A) else A, B.T.contiguous().T)
            self._pairs[key] = pair
        return pair


def read(directory: str, shapes: Mapping[str, LayerShape], namings: Iterable[Naming]) -> tuple[ShapedAdapter, Naming]:
    """The adapter in a directory and, of the ways to name the layers, the one that it uses.

    shapes: of all layers of the model by their paths, those of other processes too. Raises AdapterError for whatever is
    wrong with the adapter, as the first way has it.
    """
    first: AdapterError | None = None
    for naming in namings:
        try:
            known = {theirs: shapes[path] for theirs, path in naming.items()}
            return read_adapter_by_shapes(known, directory), naming
        except AdapterError as error:
            first = first or error
    assert first is not None
    raise first


def local_forms(
    adapter: ShapedAdapter,
    naming: Naming,
    layers: Mapping[str, FastLinear],
    pairs: Pairs,
    add_up: Callable[[Tensor], Tensor],
) -> tuple[dict[str, SliceForms], SharedPair | None]:
    """The forms of this process by the path of vLLM's layer, and the pair that they share.

    add_up: sums a vector over the processes that have partial sums. It is called once where a layer's weight is cut by
    its inputs and the adapter has a magnitude, and by all processes, whatever they find. Raises ValueError for a form
    that is not finite.
    """
    pair = None
    if adapter.shared is not None:
        pair = pairs.of(*adapter.shared)
        adapter.shared = (pair.A, pair.B)
    theirs = {path: name for name, path in naming.items()}
    adapted = set(adapter.paths)
    places = [
        (name, layer, part, theirs[part.path])
        for name, layer in layers.items()
        for part in layer.slices
        if theirs[part.path] in adapted
    ]
    # Once: that a form has the base layer's bias and none of its own shows by its being that very tensor.
    biases = {part.path: _bias(layer, part) for _, layer, part, _ in places}
    found = {part.path: adapter.part(own, part.shard, bias=biases[part.path]) for _, _, part, own in places}
    norms = _norms({part.path: (layer, part, found[part.path]) for _, layer, part, _ in places}, add_up)
    forms: dict[str, AdapterForm] = {}
    for _, layer, part, _ in places:
        form = found[part.path].finished(norms.get(part.path))
        if form.bias is not None:
            # From here on what it adds to the base layer's, which one process does.
            form = form._replace(bias=added_bias(form.bias, biases[part.path]) if layer.adds_bias else None)
        forms[part.path] = _own(form) if pair is None else pair.laid_out(form)
    check_finite(forms)
    by_layer = {
        name: SliceForms([forms.get(part.path) for part in layer.slices])
        for name, layer in layers.items()
        if any(part.path in forms for part in layer.slices)
    }
    return by_layer, pair


def _bias(layer: FastLinear, part: Slice) -> Tensor | None:
    bias = layer.base_bias()
    return None if bias is None else bias[part.start : part.stop]


def _own(form: AdapterForm) -> AdapterForm:
    """The form with factors that hold no more memory than they need, and d inside A."""
    A = form.A if form.mid_scale is None else form.A * form.mid_scale[:, None]
    A, B = (side.clone() if side.nbytes < side.untyped_storage().nbytes() else side for side in (A, form.B))
    return form._replace(A=A, B=B, mid_scale=None)


def _norms(
    parts: Mapping[str, tuple[FastLinear, Slice, PartForm]], add_up: Callable[[Tensor], Tensor]
) -> dict[str, Tensor]:
    """The norms of the rows whose form has a magnitude, by path."""
    squares: dict[str, Tensor] = {}
    partial: list[str] = []
    for path, (layer, part, (form, magnitude)) in parts.items():
        if magnitude is None:
            continue
        A, B = (side.to(layer.device) for side in (form.A.float(), form.whole_up()))  # where the weight is
        rows = slice(part.start, part.stop)
        squares[path] = weight_norm_squared(layer.squares()[rows], layer.products(A)[rows], A, B, 1.0)
        if layer.norms_are_partial:
            partial.append(path)
    if partial:
        # In one call: each waits for all processes.
        sums = add_up(torch.cat([squares[path] for path in partial]))
        squares |= zip(partial, sums.split([len(squares[path]) for path in partial]), strict=True)
    return {path: value.clamp(min=0.0).sqrt().cpu() for path, value in squares.items()}
