"""What the eager implementation does for a batch in a layer, made once: a generation asks for it at every step.

Prefill takes each run of tokens by itself. In decoding a run is one token, and calling two products for each takes
longer than they do, so what is alike goes together: adapters with factors of their own in one tensor, adapters that
share a pair (VeRA) as one product with a row of scales for each token. Forms in stacks (FormStacks) lie in such tensors
already, and which of them go together is the same for all layers where they lie alike; others are copied into one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from ..arithmetic import cast, thin_dtype
from .batch import PAGE_RANKS, AdapterBatch, FormEntry, FormTables, Place, Run, SlotForm, SortedTokens, StackedForms
from .eager import FormRun, SharedRuns, StackedRuns, Step, rows_at

# A batch may keep copies of factors up to this many bytes.
_COPIED_BYTES = 1 << 30

# Tokens up to which a run goes with others through the stack that holds its factors, and how many adapters' factors are
# read for each that is asked for.
_FEW_TOKENS = 4
_MOST_READ = 4

# How much larger than the factors their copies may be, for different ranks in one stack.
_MOST_PADDING = 2


class _Plan(NamedTuple):
    """What to do, and the mapping and its entries that this depends on."""

    forms: Mapping[int, SlotForm]
    used: list[tuple[int, SlotForm | None]]
    steps: list[Step]
    copied: int  # bytes


class _Stacked(NamedTuple):
    """Runs, by their numbers, that go through one stack of factors: all of it that does not depend on the layer.

    parts: those that are read. own: the part of each token. The rest is StackedRuns'.
    """

    members: Sequence[int]
    parts: slice
    own: slice | Tensor
    scaled: bool
    biased: bool
    tokens: slice | Tensor
    key: tuple[object, ...]
    places: Tensor | None
    source: Tensor | None

    def step(self, form: SlotForm, _: torch.dtype) -> StackedRuns:
        """What a layer does in which the first of them has this form."""
        stack = form.stack
        assert stack is not None
        assert stack.A is not None
        assert stack.B is not None
        g, beta = stack.base_scale if self.scaled else None, stack.added_bias if self.biased else None
        return StackedRuns(
            self.tokens,
            stack.A[self.parts].transpose(1, 2),
            stack.B[self.parts],
            None if g is None else rows_at(g, self.own),
            None if beta is None else rows_at(beta, self.own),
            self.key,
            self.places,
            self.source,
        )


class _Shared(NamedTuple):
    """Runs, by their numbers, of one pair with their scales in one stack, as _Stacked. own: the part of each row."""

    members: Sequence[int]
    own: slice | Tensor
    scaled: bool
    biased: bool
    tokens: slice | Tensor
    spans: tuple[tuple[int, int], ...]

    def step(self, form: SlotForm, dtype: torch.dtype) -> SharedRuns:
        """What a layer does in which the first of them has this form."""
        stack, A, B = form.stack, cast(form.A[0], dtype), cast(form.B[0], dtype)
        assert stack is not None
        assert stack.mid_scale is not None
        assert stack.out_scale is not None
        g, beta = stack.base_scale if self.scaled else None, stack.added_bias if self.biased else None
        return SharedRuns(
            self.tokens,
            A,
            B,
            rows_at(stack.mid_scale, self.own),
            rows_at(stack.out_scale, self.own),
            _pair_key(A, self.spans),
            None if g is None else rows_at(g, self.own),
            None if beta is None else rows_at(beta, self.own),
        )


Group = _Stacked | _Shared


class _Outline(NamedTuple):
    """What a batch does in layers whose forms in stacks are arranged alike: groups with the slot of one of their runs,
    and the runs that stay by themselves. scales: whether one of them has a g."""

    groups: list[tuple[Group, int]]
    runs: list[Run]
    scales: bool


def plan(batch: AdapterBatch, forms: Mapping[int, SlotForm], dtype: torch.dtype) -> list[Step]:
    """What a layer with these forms does for a batch; kept in the batch for as long as its adapters stay the same."""
    kept: _Plan | None = batch.plans.get((id(forms), dtype))
    if kept is None or kept.forms is not forms or any([forms.get(slot) is not form for slot, form in kept.used]):
        batch.copied -= 0 if kept is None else kept.copied
        left = spare = _COPIED_BYTES - batch.copied
        if isinstance(forms, StackedForms):
            steps = stacked_steps(batch, forms, dtype)
        else:
            runs = [FormRun(start, stop, forms[slot]) for start, stop, slot in batch.runs if slot in forms]
            steps, left = together(runs, batch.tokens, dtype, spare)
        used = [(slot, forms.get(slot)) for slot in {run.slot for run in batch.runs}]
        kept = batch.plans[id(forms), dtype] = _Plan(forms, used, steps, spare - left)
        batch.copied += kept.copied
    return kept.steps


def stacked_steps(batch: AdapterBatch, forms: StackedForms, dtype: torch.dtype) -> list[Step]:
    """What a layer with these forms does for a batch: nothing is copied, and what goes together is found once for all
    layers that are arranged alike."""
    groups, runs, _ = outline(batch, forms)
    steps: list[Step] = [group.step(forms[slot], dtype) for group, slot in groups]
    steps += [FormRun(start, stop, forms[slot]) for start, stop, slot in runs]
    return steps


def outline(batch: AdapterBatch, forms: StackedForms) -> _Outline:
    """What a batch does in layers that are arranged as this one; kept in the batch."""
    found: _Outline | None = batch.gathered.get(forms.arrangement)
    if found is None:
        runs = [run for run in batch.runs if run.slot in forms]
        own = [FormRun(start, stop, forms[slot]) for start, stop, slot in runs]
        groups = _groups(own, batch.tokens)
        taken = {number for group in groups for number in group.members}
        found = batch.gathered[forms.arrangement] = _Outline(
            [(group, runs[group.members[0]].slot) for group in groups],
            [run for number, run in enumerate(runs) if number not in taken],
            any([run.form.base_scale is not None for run in own]),
        )
    return found


def together(
    runs: Sequence[FormRun], tokens: int, dtype: torch.dtype, limit: int = _COPIED_BYTES
) -> tuple[list[Step], int]:
    """The same work in fewer steps, for rows of `tokens` tokens, of forms that are in no stacks; and what is left of
    `limit`, the bytes that copies of factors may take. Those of a pair with a g or a bias stay by themselves."""
    steps: list[Step] = []
    gathered: set[int] = set()
    loose = [run for run in runs if run.form.A]
    single = [run for run in loose if run.stop - run.start == 1 and run.form.mid_scale is None]
    for members in _stacks(single):
        first = members[0].form
        wide = stack_dtype(dtype, first.A[0].device)
        size = len(members) * (first.A[0].shape[1] + first.B[0].shape[1]) * first.rank * wide.itemsize
        if len(members) > 1 and size <= limit:
            limit -= size
            steps.append(_stacked(members, wide))
            gathered.update(run.start for run in members)
    for members in _pairs(loose, tokens):
        steps.append(_shared(members, tokens, dtype))
        gathered.update(run.start for run in members)
    for run in runs:
        if run.start not in gathered:
            widened = _widened(run, dtype)
            size = 0 if widened is run else sum(part.nbytes for part in (*widened.form.A, *widened.form.B))
            steps.append(widened if size <= limit else run)
            limit -= size if size <= limit else 0
    return steps, limit


def _groups(runs: Sequence[FormRun], tokens: int) -> list[Group]:
    """What goes together of the runs whose forms are in stacks; those of many tokens, or of stacks that would be read
    in vain for the most part, do not."""
    stacks: dict[object, list[int]] = {}
    for number, run in enumerate(runs):
        if run.form.place is not None:
            stacks.setdefault(run.form.place.stack, []).append(number)
    found: list[Group] = []
    for members in stacks.values():
        if runs[members[0]].form.mid_scale is not None:
            found += [_shared_group(runs, chain, tokens) for chain in _chains(runs, members, tokens)]
            continue
        members = [number for number in members if runs[number].stop - runs[number].start <= _FEW_TOKENS]
        parts = {place.part for place in _places(runs, members)}
        if len(parts) > 1 and max(parts) - min(parts) < _MOST_READ * len(parts):
            found.append(_stacked_group(runs, members))
    return found


def _places(runs: Sequence[FormRun], members: Sequence[int]) -> list[Place]:
    return [place for number in members if (place := runs[number].form.place) is not None]


def _stacked_group(runs: Sequence[FormRun], members: Sequence[int]) -> _Stacked:
    places = _places(runs, members)
    first, last = (of([place.part for place in places]) for of in (min, max))
    by_part: dict[int, list[int]] = {part: [] for part in range(first, last + 1)}
    tokens: list[int] = []
    parts: list[int] = []
    for number, place in zip(members, places, strict=True):
        own = range(runs[number].start, runs[number].stop)
        by_part[place.part].extend(own)
        tokens.extend(own)
        parts.extend([place.part] * len(own))
    room = max([len(own) for own in by_part.values()])
    # Whatever token is where a part has fewer than another: what comes of it is not read.
    source = [token for own in by_part.values() for token in (*own, *[tokens[0]] * (room - len(own)))]
    where = {token: (part - first) * room + index for part, own in by_part.items() for index, token in enumerate(own)}
    in_order = source == tokens
    return _Stacked(
        members,
        slice(first, last + 1),
        _rows(parts),
        any([place.scaled for place in places]),
        any([place.biased for place in places]),
        _rows(tokens),
        ("x", *source),
        None if in_order else torch.tensor([where[token] for token in tokens]),
        None if in_order else torch.tensor(source),
    )


def _shared_group(runs: Sequence[FormRun], members: Sequence[int], tokens: int) -> _Shared:
    chain = [runs[number] for number in members]
    tokens = _row_length(chain, tokens)
    places = _places(runs, members)
    counts = [(run.stop - run.start) // tokens for run in chain]
    return _Shared(
        members,
        _rows([place.part for place, count in zip(places, counts, strict=True) for _ in range(count)]),
        any([place.scaled for place in places]),
        any([place.biased for place in places]),
        _tokens(chain),
        tuple([(run.start, run.stop) for run in chain]),
    )


def _rows(numbers: Sequence[int]) -> slice | Tensor:
    """The rows of these numbers: a slice, and so a view, where they are neighbours."""
    if all([second == first + 1 for first, second in pairwise(numbers)]):
        return slice(numbers[0], numbers[-1] + 1)
    return torch.tensor(numbers)


def _widened(run: FormRun, dtype: torch.dtype) -> FormRun:
    """The run with copies of its factors in what products of few rows take, where they are not in that."""
    form = run.form
    if form.mid_scale is not None or not form.A or form.A[0].dtype != dtype:
        return run  # a pair that is shared is as large as hundreds of adapters
    thin = thin_dtype(run.stop - run.start, dtype, form.A[0].is_cpu)
    if thin == dtype:
        return run
    A, B = (tuple([part.to(thin) for part in side]) for side in (form.A, form.B))
    return run._replace(form=form._replace(A=A, B=B))


def _pairs(runs: Sequence[FormRun], tokens: int) -> list[list[FormRun]]:
    """The runs that can be one SharedRuns: of one pair, and neighbours unless they are single tokens."""
    found: dict[tuple[object, ...], list[int]] = {}
    for number, (_, _, form) in enumerate(runs):
        plain = form.base_scale is None and form.added_bias is None
        if form.mid_scale is not None and plain and len(form.A) == 1:
            found.setdefault((form.A[0].data_ptr(), form.B[0].data_ptr()), []).append(number)
    chains = [chain for members in found.values() for chain in _chains(runs, members, tokens)]
    return [[runs[number] for number in chain] for chain in chains]


def _chains(runs: Sequence[FormRun], members: Sequence[int], tokens: int) -> list[list[int]]:
    """The runs of one pair, by their numbers, as those that can be one SharedRuns."""
    chains: list[list[int]] = []
    for number in members:
        if chains and _goes_with(runs[number], runs[chains[-1][-1]], tokens):
            chains[-1].append(number)
        else:
            chains.append([number])
    return chains


def _goes_with(run: FormRun, before: FormRun, tokens: int) -> bool:
    """Whether runs of one pair are rows of one length: neighbours, or single tokens from anywhere."""
    if tokens == 1 and max(run.stop - run.start, before.stop - before.start) > _FEW_TOKENS:
        return False  # a prompt among tokens that are decoded: its scales are one row
    return before.stop == run.start or tokens == 1


def _row_length(members: Sequence[FormRun], tokens: int) -> int:
    """Tokens of each row of a SharedRuns: those of a run that is by itself are one row."""
    return members[0].stop - members[0].start if len(members) == 1 and tokens == 1 else tokens


def _stacks(runs: Sequence[FormRun]) -> Iterator[list[FormRun]]:
    """The runs by falling rank, in stacks that are padded to _MOST_PADDING times their size at most."""
    members: list[FormRun] = []
    for run in sorted(runs, key=lambda run: -run.form.rank):
        padded = (len(members) + 1) * (members or [run])[0].form.rank
        if padded > _MOST_PADDING * sum(member.form.rank for member in (*members, run)):
            yield members
            members = []
        members.append(run)
    if members:
        yield members


def stack_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """A CPU's batched products of single rows take five times as long in 16 bits as in fp32."""
    return torch.promote_types(dtype, torch.float32) if device.type == "cpu" else dtype


def _stacked(members: Sequence[FormRun], dtype: torch.dtype) -> StackedRuns:
    members = sorted(members, key=lambda run: run.start)
    forms = [run.form for run in members]
    rank = max([form.rank for form in forms])
    device, width = forms[0].A[0].device, forms[0].B[0].shape[1]
    base_scale = _by_form([form.base_scale for form in forms], torch.ones(width, device=device))
    added_bias = _by_form([form.added_bias for form in forms], torch.zeros(width, device=device))
    A, B = (_padded([getattr(form, side) for form in forms], rank, dtype) for side in ("A", "B"))
    for rows, form in zip(B, forms, strict=True):
        if form.out_scale is not None:
            rows.mul_(form.out_scale)
        if form.scaling != 1.0:
            rows.mul_(form.scaling)
    key = ("x", *[run.start for run in members])
    return StackedRuns(_tokens(members, device), A.transpose(1, 2), B, base_scale, added_bias, key)


def _by_form(vectors: Sequence[Tensor | None], absent: Tensor) -> Tensor | None:
    """The vectors, one behind the other, with another one where there is none; None where nobody has any."""
    if all([vector is None for vector in vectors]):
        return None
    return torch.stack([absent if vector is None else vector for vector in vectors])


def _padded(factors: Sequence[Sequence[Tensor]], rank: int, dtype: torch.dtype) -> Tensor:
    """The factors, each in its parts, as one tensor [S, rank, width] with zeros behind them."""
    first = factors[0][0]
    stack = torch.zeros(len(factors), rank, first.shape[1], dtype=dtype, device=first.device)
    for rows, parts in zip(stack, factors, strict=True):
        start = 0
        for part in parts:
            rows[start : start + part.shape[0]].copy_(part)
            start += part.shape[0]
    return stack


def _shared(members: Sequence[FormRun], tokens: int, dtype: torch.dtype) -> SharedRuns:
    tokens = _row_length(members, tokens)
    forms = [run.form for run in members for _ in range(run.start, run.stop, tokens)]
    A, B = (cast(side[0], dtype) for side in (forms[0].A, forms[0].B))
    mid = torch.stack([form.mid_scale for form in forms if form.mid_scale is not None])
    ones = torch.ones(B.shape[1], device=B.device)
    out = torch.stack([form.scaling * (ones if form.out_scale is None else form.out_scale) for form in forms])
    key = _pair_key(A, tuple([(run.start, run.stop) for run in members]))
    return SharedRuns(_tokens(members, A.device), A, B, mid, out, key)


def _pair_key(A: Tensor, spans: tuple[tuple[int, int], ...]) -> tuple[object, ...]:
    return (A.data_ptr(), A.shape, spans)


def _tokens(members: Sequence[FormRun], device: torch.device | None = None) -> slice | Tensor:
    """The members' tokens: a slice, and so a view, where they are neighbours."""
    if all([first.stop == second.start for first, second in pairwise(members)]):
        return slice(members[0].start, members[-1].stop)
    return torch.tensor([token for run in members for token in range(run.start, run.stop)], device=device)


def runs_of(tables: FormTables, tokens: SortedTokens, shape: tuple[int, int]) -> list[FormRun]:
    """The runs that the kernels' tables describe, for compiled code: it carries tensors alone. `shape` is [N, K]."""
    slots = torch.empty_like(tokens.adapters)
    slots[tokens.order] = tokens.adapters
    groups = dict(zip(tokens.adapters.tolist(), tokens.groups.tolist(), strict=True))
    found, start = [], 0
    for slot, members in groupby(slots.tolist()):
        stop = start + sum(1 for _ in members)
        if slot >= 0:
            found.append(FormRun(start, stop, _form(tables, slot, groups[slot], shape)))
        start = stop
    return found


def _form(tables: FormTables, slot: int, group: int, shape: tuple[int, int]) -> SlotForm:
    vectors = (tables.mid_scales, tables.out_scales, tables.base_scales, tables.added_biases)
    entry = FormEntry(
        int(tables.ranks[group]),
        tables.A_pages[group].tolist(),
        tables.B_pages[group].tolist(),
        int(tables.A_strides[group]),
        int(tables.B_strides[group]),
        float(tables.scalings[slot]),
        *(-1 if vector is None else int(vector[slot]) for vector in vectors),
    )
    return slot_form(tables.pages, tables.vectors, shape, entry)


def slot_form(pages: Tensor, vectors: Tensor, shape: tuple[int, int], entry: FormEntry) -> SlotForm:
    """The form at an entry, as views. `shape` is the weight's, [N, K]."""
    n, k = shape
    rank, A_pages, B_pages, A_stride, B_stride, scaling, *places = entry
    mid, h, g, beta = (
        None if first < 0 else vectors[first : first + size]
        for first, size in zip(places, (rank, n, n, n), strict=True)
    )
    # One adapter's pages of A and of B are of different sizes and have their gaps at different ranks: what reads the
    # parts multiplies one by the other.
    cuts = part_cuts(rank, (A_pages, A_stride), (B_pages, B_stride))
    return SlotForm(
        rank_rows(pages, cuts, A_pages, A_stride, k),
        rank_rows(pages, cuts, B_pages, B_stride, n),
        scaling,
        mid,
        g if entry.out_scale == entry.base_scale else h,
        g,
        beta,
    )


def part_cuts(rank: int, *sides: tuple[Sequence[int], int], page_ranks: int = PAGE_RANKS) -> list[int]:
    """The ranks at which parts begin, and the last one's end: before each page that, on any side, has a gap before it.

    sides: (pages, stride) of each factor. page_ranks: rank rows of a page.
    """
    starts = [
        first
        for page, first in enumerate(range(0, rank, page_ranks))
        if not page or any(pages[page] - pages[page - 1] != page_ranks * stride for pages, stride in sides)
    ]
    return [*starts, rank]


def rank_rows(
    memory: Tensor, cuts: Sequence[int], pages: Sequence[int], stride: int, width: int, page_ranks: int = PAGE_RANKS
) -> tuple[Tensor, ...]:
    """Rank rows [R, width] as views of the parts between the cuts."""
    offset = memory.storage_offset()
    return tuple(
        memory.as_strided((last - first, width), (stride, 1), offset + pages[first // page_ranks])
        for first, last in pairwise(cuts)
    )
