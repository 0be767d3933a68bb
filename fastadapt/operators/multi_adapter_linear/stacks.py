"""A layer's adapters by slot with their factors and vectors in stacks, for engines on CPUs whose batches change at
every step.

What a batch needs of them are indices then: no factor is copied, padded or cast for it. A stack holds the adapters of
ranks up to a power of two, or those that share a pair, and grows and goes with them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...reference import AdapterForm
from .batch import Arrangement, FormStack, LayerForms, Place, SlotForm, StackedForms, added_bias

_LEAST_RANK = 8


class FormStacks:
    """The adapter forms of one layer, or of one slice of a packed layer, by slot: `layer` is what operators read.

    shape: (N, K) of the layer. dtype: of x, in which factors are copied into stacks. A pair with scales between and
    behind it (VeRA) is kept as it comes, so that adapters that share one share its memory, and only those scales are in
    a stack; few rows of it are read fastest where A lies by columns and B by rank rows, without gaps. Vectors are kept
    in fp32. Not thread-safe.
    """

    def __init__(self, shape: tuple[int, int], dtype: torch.dtype) -> None:
        self.shape = shape
        self.dtype = dtype
        self._forms = StackedForms()
        self._layer = LayerForms(self._forms, None, 0)
        self._stacks: dict[object, FormStack] = {}  # by name
        self._free: dict[object, list[int]] = {}  # parts of a stack

    @property
    def forms(self) -> StackedForms:
        """By slot."""
        return self._forms

    @property
    def layer(self) -> LayerForms:
        """The forms as they are now and will be: it need not be asked for again."""
        return self._layer

    @property
    def bytes(self) -> int:
        """Of stacks and vectors; not of pairs, which may be shared."""
        tensors = {id(tensor): tensor for stack in self._stacks.values() for tensor in stack if tensor is not None}
        for form in self._forms.values():
            if form.place is None:
                vectors = (form.mid_scale, form.out_scale, form.base_scale, form.added_bias)
                tensors.update({id(vector): vector for vector in vectors if vector is not None})
        return sum([tensor.nbytes for tensor in tensors.values()])

    def write(self, slot: int, form: AdapterForm, *, base_bias: Tensor | None = None) -> None:
        """Enters an adapter in a slot, in the place of another that was there.

        base_bias: the layer's b0, of which the form's β = b0 + what the adapter adds has its part.
        Raises ValueError for a slot below 0, a form with U and V, or factors that do not fit; nothing is changed then.
        """
        if slot < 0:
            raise ValueError(f"slot must be 0 or more, got {slot}")
        # Tensors of inference mode could not be written outside of it.
        with torch.inference_mode(False), torch.no_grad():
            entry = entry_of(self.shape, form, base_bias)
            self.clear(slot)
            self._forms[slot] = self._stacked(entry) if entry.rank else entry
            self._forms.arrangement = Arrangement(self._forms)

    def clear(self, slot: int) -> None:
        """Makes a slot the base model's."""
        form = self._forms.pop(slot, None)
        if form is not None and form.place is not None:
            name = form.place.stack
            self._free[name].append(form.place.part)
            if len(self._free[name]) == _size(self._stacks[name]):  # nobody is left
                del self._stacks[name], self._free[name]
        if form is not None:
            self._forms.arrangement = Arrangement(self._forms)

    def _stacked(self, entry: SlotForm) -> SlotForm:
        """The form as a part of the stack that it goes into, which grows for it where it is full."""
        name, own = self._part(entry)
        before = self._stacks.get(name, FormStack())
        size, free = _size(before), self._free.setdefault(name, [])
        if not free:
            free.extend(range(max(1, 2 * size) - 1, size - 1, -1))
            size = max(1, 2 * size)
        stack = self._stacks[name] = _grown(before, own, size)
        place = Place(name, free.pop(), own.base_scale is not None, own.added_bias is not None)
        for field, whole, value in zip(FormStack._fields, stack, own, strict=True):
            if whole is not None:
                whole[place.part] = _absent(field) if value is None else value
        if stack is not before:
            for slot, form in self._forms.items():
                if form.place is not None and form.stack is before:
                    self._forms[slot] = _placed(form, stack, form.place)
        return _placed(entry, stack, place)

    def _part(self, entry: SlotForm) -> tuple[object, FormStack]:
        """The name of the stack that a form goes into, and what it has in it, without the dimension of the parts."""
        (A,), (B,), scaling, d, h, g, beta, *_ = entry
        if d is not None:
            h = torch.full(self.shape[:1], scaling) if h is None else h * scaling
            # All that decides how a batch goes through it: layers of several widths take beginnings of the same rows.
            sides = [(side.data_ptr(), side.dtype, side.stride(), side.is_contiguous()) for side in (A.T, B)]
            return ("pair", *sides, entry.rank), FormStack(None, None, d, h, g, beta)
        rank = max(_LEAST_RANK, 1 << (entry.rank - 1).bit_length())
        wide = torch.promote_types(self.dtype, torch.float32)
        up = B.to(wide) * (scaling if h is None else h * scaling)
        down, up = (_padded(side, rank, self.dtype) for side in (A, up))
        return (self.dtype, rank), FormStack(down.T, up, None, None, g, beta)


def _absent(field: str) -> float:
    """What a stack holds for an adapter that has nothing there."""
    return 1.0 if field == "base_scale" else 0.0


def _size(stack: FormStack) -> int:
    """The number of parts."""
    return next((len(field) for field in stack if field is not None), 0)


def _grown(stack: FormStack, own: FormStack, size: int) -> FormStack:
    """The stack with room for so many parts, and with the fields that one of them will have: itself where it has."""
    fields: list[Tensor | None] = []
    for name, there, value in zip(FormStack._fields, stack, own, strict=True):
        like = value if there is None else there[0]
        if like is None or (there is not None and len(there) == size):
            fields.append(there)
            continue
        whole = torch.full((size, *like.shape), _absent(name), dtype=like.dtype)
        if there is not None:
            whole[: len(there)] = there
        fields.append(whole)
    same = all([new is old for new, old in zip(fields, stack, strict=True)])
    return stack if same else FormStack(*fields)


def _padded(factor: Tensor, rank: int, dtype: torch.dtype) -> Tensor:
    """The factor [R, width] with zeros behind its rows."""
    rows = torch.zeros(rank, factor.shape[1], dtype=dtype)
    rows[: factor.shape[0]] = factor
    return rows


def _placed(form: SlotForm, stack: FormStack, place: Place) -> SlotForm:
    """The form as views of its part of a stack."""
    A, B, d, h, g, beta = (None if field is None else field[place.part] for field in stack)
    if A is not None and B is not None:
        form = form._replace(A=(A.T[: form.rank],), B=(B[: form.rank],))
    return SlotForm(
        form.A,
        form.B,
        mid_scale=d,
        out_scale=h,
        base_scale=g if place.scaled else None,
        added_bias=beta if place.biased else None,
        stack=stack,
        place=place,
    )


def entry_of(shape: tuple[int, int], form: AdapterForm, base_bias: Tensor | None) -> SlotForm:
    """A form for a layer of this shape (N, K) with its vectors in fp32, and the scalar part of h in `scaling`.

    Raises ValueError for a form with U and V, or factors that do not fit.
    """
    N, K = shape
    if form.U is not None:
        raise ValueError("a form with U and V scales every weight by itself, which rows of others cannot share")
    if form.A.dim() != 2 or form.A.shape[1] != K or form.B.shape != (N, form.A.shape[0]):
        raise ValueError(f"A and B must be [r, {K}] and [{N}, r], got {tuple(form.A.shape)} and {tuple(form.B.shape)}")

    def vector(value: Tensor | float | None) -> Tensor | None:
        return value.detach().float().clone() if isinstance(value, Tensor) and value.dim() else None

    g = vector(form.base_scale)
    h = g if form.out_scale is form.base_scale else vector(form.out_scale)
    scaling = form.scaling if h is not None else form.scaling * float(form.out_scale)
    A, B = form.A.detach(), form.B.detach().T
    return SlotForm((A,), (B,), scaling, vector(form.mid_scale), h, g, vector(added_bias(form.bias, base_bias)))
