"""A layer's adapters by slot with their factors in stacks, for engines on CPUs whose batches change at every step.

What a batch needs of them are indices then: no factor is copied, padded or cast for it. A stack holds the adapters of
ranks up to a power of two, and grows and goes with them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...reference import AdapterForm
from .batch import FactorStack, LayerForms, SlotForm, added_bias
from .plan import stack_dtype

_LEAST_RANK = 8


class FormStacks:
    """The adapter forms of one layer, or of one slice of a packed layer, by slot: `layer` is what operators read.

    shape: (N, K) of the layer. dtype: of x. Factors are copied into stacks, in fp32 where x has 16 bits: a CPU's
    products of few rows are faster so. A pair with scales between and behind it (VeRA) is kept as it comes, so that
    adapters that share one share its memory. Vectors are kept in fp32. Not thread-safe.
    """

    def __init__(self, shape: tuple[int, int], dtype: torch.dtype) -> None:
        self.shape = shape
        self.dtype = stack_dtype(dtype, torch.device("cpu"))
        self._forms: dict[int, SlotForm] = {}
        self._stacks: dict[int, FactorStack] = {}  # by rank
        self._free: dict[int, list[int]] = {}  # places of a stack

    @property
    def layer(self) -> LayerForms:
        """The forms as they are now and will be: it need not be asked for again."""
        return LayerForms(self._forms, None, 0)

    @property
    def bytes(self) -> int:
        """Of stacks and vectors; not of pairs, which may be shared."""
        tensors = {id(tensor): tensor for stack in self._stacks.values() for tensor in stack if tensor is not None}
        for form in self._forms.values():
            vectors = (form.mid_scale, form.out_scale, form.base_scale, form.added_bias)
            tensors.update({id(vector): vector for vector in vectors if vector is not None and vector._base is None})
        return sum([tensor.nbytes for tensor in tensors.values()])

    def write(self, slot: int, form: AdapterForm, *, base_bias: Tensor | None = None) -> None:
        """Enters an adapter in a slot, in the place of another that was there.

        base_bias: the layer's b0, of which the form's β = b0 + what the adapter adds has its part.
        Raises ValueError for a slot below 0, a form with U and V, or factors that do not fit; nothing is changed then.
        """
        N, K = self.shape
        if slot < 0:
            raise ValueError(f"slot must be 0 or more, got {slot}")
        if form.U is not None:
            raise ValueError("a form with U and V scales every weight by itself, which rows of others cannot share")
        if form.A.dim() != 2 or form.A.shape[1] != K or form.B.shape != (N, form.A.shape[0]):
            raise ValueError(
                f"A and B must be [r, {K}] and [{N}, r], got {tuple(form.A.shape)} and {tuple(form.B.shape)}"
            )
        with torch.no_grad():
            entry = _entry(form, base_bias)
            self.clear(slot)
            own = entry.mid_scale is None and (entry.tied or (entry.out_scale is None and entry.base_scale is None))
            self._forms[slot] = self._stacked(entry) if own and entry.rank else entry

    def clear(self, slot: int) -> None:
        """Makes a slot the base model's."""
        form = self._forms.pop(slot, None)
        if form is not None and form.stack is not None:
            rank = form.stack.A.shape[1]
            self._free[rank].append(form.place)
            if len(self._free[rank]) == form.stack.A.shape[0]:  # nobody is left
                del self._stacks[rank], self._free[rank]

    def _stacked(self, entry: SlotForm) -> SlotForm:
        """The form with its factors copied into the stack of their rank, which grows for it where it is full."""
        rank = max(_LEAST_RANK, 1 << (entry.rank - 1).bit_length())
        stack = self._stacks.get(rank) or self._new(0, rank)
        free = self._free.setdefault(rank, [])
        changed = stack
        if not free:
            size = stack.A.shape[0]
            more = self._new(max(1, size), rank, stack.base_scale is not None)
            scales = None
            if stack.base_scale is not None and more.base_scale is not None:
                scales = torch.cat([stack.base_scale, more.base_scale])
            changed = FactorStack(torch.cat([stack.A, more.A]), torch.cat([stack.B, more.B]), scales)
            free.extend(range(changed.A.shape[0] - 1, size - 1, -1))
        if entry.tied and changed.base_scale is None:
            changed = changed._replace(base_scale=torch.ones(changed.A.shape[0], self.shape[0]))
        self._stacks[rank] = changed
        if changed is not stack:
            for slot, form in self._forms.items():
                if form.stack is stack:
                    self._forms[slot] = _placed(form, changed, form.place)
        place = free.pop()
        for rows, factor in ((changed.A[place], entry.A[0]), (changed.B[place], entry.B[0] * entry.scaling)):
            rows[: entry.rank] = factor
            rows[entry.rank :] = 0
        if changed.base_scale is not None:
            changed.base_scale[place] = 1.0 if entry.base_scale is None else entry.base_scale
        return _placed(entry._replace(scaling=1.0), changed, place)

    def _new(self, size: int, rank: int, scaled: bool = False) -> FactorStack:
        N, K = self.shape
        A, B = (torch.zeros(size, rank, width, dtype=self.dtype) for width in (K, N))
        return FactorStack(A, B, torch.ones(size, N) if scaled else None)


def _placed(form: SlotForm, stack: FactorStack, place: int) -> SlotForm:
    A, B = (side[place, : form.rank] for side in (stack.A, stack.B))
    g = stack.base_scale[place] if form.tied and stack.base_scale is not None else None
    return form._replace(A=(A,), B=(B,), out_scale=g, base_scale=g, stack=stack, place=place)


def _entry(form: AdapterForm, base_bias: Tensor | None) -> SlotForm:
    """The form with its vectors in fp32, and the scalar part of h in `scaling`."""

    def vector(value: Tensor | float | None) -> Tensor | None:
        return value.detach().float().clone() if isinstance(value, Tensor) and value.dim() else None

    g = vector(form.base_scale)
    h = g if form.out_scale is form.base_scale else vector(form.out_scale)
    scaling = form.scaling if h is not None else form.scaling * float(form.out_scale)
    A, B = form.A.detach(), form.B.detach().T
    return SlotForm((A,), (B,), scaling, vector(form.mid_scale), h, g, vector(added_bias(form.bias, base_bias)))
