"""What the eager implementation does for a batch in a layer, made once: a generation asks for it at every step.

Prefill takes each run of tokens by itself. In decoding a run is one token, and calling two products for each takes
longer than they do, so what is alike goes together: adapters with factors of their own as copies stacked in one tensor,
adapters that share a pair (VeRA) as one product with a row of scales for each token.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from ..arithmetic import cast, thin_dtype
from .batch import PAGE_RANKS, AdapterBatch, FormEntry, FormTables, SlotForm, SortedTokens
from .eager import FormRun, SharedRuns, StackedRuns, Step

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


def plan(batch: AdapterBatch, forms: Mapping[int, SlotForm], dtype: torch.dtype) -> list[Step]:
    """What a layer with these forms does for a batch; kept in the batch for as long as its adapters stay the same."""
    kept: _Plan | None = batch.plans.get((id(forms), dtype))
    if kept is None or kept.forms is not forms or any([forms.get(slot) is not form for slot, form in kept.used]):
        used = {run.slot: forms.get(run.slot) for run in batch.runs}
        found = [(start, stop, used[slot]) for start, stop, slot in batch.runs]
        runs = [FormRun(start, stop, form) for start, stop, form in found if form is not None]
        spare = _COPIED_BYTES - sum(plan.copied for plan in batch.plans.values())
        steps, left = together(runs, batch.tokens, dtype, spare)
        kept = batch.plans[id(forms), dtype] = _Plan(forms, list(used.items()), steps, spare - left)
    return kept.steps


def together(
    runs: Sequence[FormRun], tokens: int, dtype: torch.dtype, limit: int = _COPIED_BYTES
) -> tuple[list[Step], int]:
    """The same work in fewer steps, for rows of `tokens` tokens; and what is left of `limit`, the bytes that copies of
    factors may take.

    Adapters with a bias, or with DoRA's g beside another h, stay by themselves.
    """
    # In fp16 a tied g would come behind a sum that may be beyond it.
    simple = [run for run in runs if run.form.added_bias is None and not (run.form.tied and dtype is torch.float16)]
    steps: list[Step] = []
    gathered: set[int] = set()  # the starts of their runs
    for members in _in_stacks(simple):
        steps.append(_of_stack(members))
        gathered.update(run.start for run in members)
    single = [run for run in simple if run.stop - run.start == 1 and run.form.stack is None and _own_factors(run.form)]
    for members in _stacks(single):
        first = members[0].form
        wide = stack_dtype(dtype, first.A[0].device)
        size = len(members) * (first.A[0].shape[1] + first.B[0].shape[1]) * first.rank * wide.itemsize
        if len(members) > 1 and size <= limit:
            limit -= size
            steps.append(_stacked(members, wide))
            gathered.update(run.start for run in members)
    for members in _pairs(simple, tokens):
        steps.append(_shared(members, tokens, dtype))
        gathered.update(run.start for run in members)
    for run in runs:
        if run.start not in gathered:
            widened = _widened(run, dtype)
            size = 0 if widened is run else sum(part.nbytes for part in (*widened.form.A, *widened.form.B))
            steps.append(widened if size <= limit else run)
            limit -= size if size <= limit else 0
    return steps, limit


def _in_stacks(runs: Sequence[FormRun]) -> Iterator[list[FormRun]]:
    """The runs of few tokens whose factors lie in one stack, where that is read in vain for the least part."""
    found: dict[int, list[FormRun]] = {}
    for run in runs:
        if run.form.stack is not None and run.stop - run.start <= _FEW_TOKENS:
            found.setdefault(id(run.form.stack), []).append(run)
    for members in found.values():
        places = {run.form.place for run in members}
        if len(places) > 1 and max(places) - min(places) < _MOST_READ * len(places):
            yield members


def _of_stack(members: Sequence[FormRun]) -> StackedRuns:
    stack = members[0].form.stack
    assert stack is not None
    first = min(run.form.place for run in members)
    parts = slice(first, max(run.form.place for run in members) + 1)
    tokens, places, room = _rooms(tuple([(run.start, run.stop, run.form.place - first) for run in members]))
    scales = None
    if any(run.form.tied for run in members) and stack.base_scale is not None:
        scales = stack.base_scale[parts].index_select(0, places // room)
    return StackedRuns(tokens, stack.A[parts].transpose(1, 2), stack.B[parts], 1.0, scales, places, room)


@functools.lru_cache(maxsize=1024)
def _rooms(runs: tuple[tuple[int, int, int], ...]) -> tuple[slice | Tensor, Tensor, int]:
    """(tokens, places, room) of runs (start, stop, part): the same for all layers whose stacks are filled alike."""
    counts: dict[int, int] = {}
    tokens, found = [], []
    for start, stop, part in runs:
        for token in range(start, stop):
            tokens.append(token)
            found.append((part, counts.get(part, 0)))
            counts[part] = found[-1][1] + 1
    room = max(counts.values())
    places = torch.tensor([part * room + count for part, count in found])
    if tokens == list(range(tokens[0], tokens[-1] + 1)):
        return slice(tokens[0], tokens[-1] + 1), places, room
    return torch.tensor(tokens), places, room


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
    found: dict[tuple[object, ...], list[list[FormRun]]] = {}
    for run in runs:
        form = run.form
        if form.mid_scale is None or form.base_scale is not None or len(form.A) != 1:
            continue
        chains = found.setdefault((form.A[0].data_ptr(), form.B[0].data_ptr()), [])
        if chains and _goes_with(run, chains[-1][-1], tokens):
            chains[-1].append(run)
        else:
            chains.append([run])
    return [chain for chains in found.values() for chain in chains]


def _goes_with(run: FormRun, before: FormRun, tokens: int) -> bool:
    """Whether runs of one pair are rows of one length: neighbours, or single tokens from anywhere."""
    if tokens == 1 and max(run.stop - run.start, before.stop - before.start) > _FEW_TOKENS:
        return False  # a prompt among tokens that are decoded: its scales are one row
    return before.stop == run.start or tokens == 1


def _own_factors(form: SlotForm) -> bool:
    """Whether it is h · B A x beside g ⊙ (W0 x) with h a number, or tied to g."""
    plain = form.base_scale is None and form.out_scale is None
    return form.mid_scale is None and (plain or form.tied) and bool(form.A)


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
    rank = max(form.rank for form in forms)
    scalings = [form.scaling for form in forms]
    scaling: Tensor | float = scalings[0]
    device = forms[0].A[0].device
    if len(set(scalings)) > 1:
        scaling = torch.tensor(scalings, device=device, dtype=dtype)[:, None, None]
    base_scale = None
    if any(form.base_scale is not None for form in forms):
        ones = torch.ones(forms[0].B[0].shape[1], device=device)
        base_scale = torch.stack([ones if form.base_scale is None else form.base_scale for form in forms])
    tokens = _tokens(members, device)
    A, B = (_padded([getattr(form, side) for form in forms], rank, dtype) for side in ("A", "B"))
    return StackedRuns(tokens, A.transpose(1, 2), B, scaling, base_scale)


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
    if len(members) == 1 and tokens == 1:
        tokens = members[0].stop - members[0].start
    forms = [run.form for run in members for _ in range(run.start, run.stop, tokens)]
    A, B = (cast(side[0], dtype) for side in (forms[0].A, forms[0].B))
    mid = torch.stack([form.mid_scale for form in forms if form.mid_scale is not None])
    ones = torch.ones(B.shape[1], device=B.device)
    out = torch.stack([form.scaling * (ones if form.out_scale is None else form.out_scale) for form in forms])
    key = (A.data_ptr(), A.shape, tuple((run.start, run.stop) for run in members))
    return SharedRuns(_tokens(members, A.device), A, B, mid, out, key)


def _tokens(members: Sequence[FormRun], device: torch.device) -> slice | Tensor:
    """The members' tokens: a slice, and so a view, where they are neighbours."""
    if all(first.stop == second.start for first, second in pairwise(members)):
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


def part_cuts(rank: int, *sides: tuple[Sequence[int], int]) -> list[int]:
    """The ranks at which parts begin, and the last one's end: before each page that, on any side, has a gap before it.

    sides: (pages, stride) of each factor.
    """
    starts = [
        first
        for page, first in enumerate(range(0, rank, PAGE_RANKS))
        if not page or any(pages[page] - pages[page - 1] != PAGE_RANKS * stride for pages, stride in sides)
    ]
    return [*starts, rank]


def rank_rows(memory: Tensor, cuts: Sequence[int], pages: Sequence[int], stride: int, width: int) -> tuple[Tensor, ...]:
    """Rank rows [R, width] as views of the parts between the cuts."""
    offset = memory.storage_offset()
    return tuple(
        memory.as_strided((last - first, width), (stride, 1), offset + pages[first // PAGE_RANKS])
        for first, last in pairwise(cuts)
    )
