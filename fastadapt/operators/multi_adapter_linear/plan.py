"""What the eager implementation does for a batch in a layer, made once: a generation asks for it at every step.

Prefill takes each run of tokens by itself. In decoding a run is one token, and calling two products for each takes
longer than they do, so what is alike goes together: adapters with factors of their own in one tensor, adapters that
share a pair (VeRA) as one product with a row of scales for each token. Forms in stacks (FormStacks) lie in such tensors
already, and which of them go together is the same for all layers where they lie alike (groups.py); others are copied
into one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...staleness import version
from ..arithmetic import cast, thin_dtype
from .batch import AdapterBatch, SlotForm, StackedForms
from .eager import BagRuns, FormRun, SharedRuns, StackedRuns, Step
from .groups import bags_of, chains, few_of_a_pair, in_bags, pair_key, row_length, rows_key, stacked_steps, tokens_of

# A batch may keep copies of factors up to this many bytes.
_COPIED_BYTES = 1 << 30

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
        batch.copied -= 0 if kept is None else kept.copied
        left = spare = _COPIED_BYTES - batch.copied
        if isinstance(forms, StackedForms):
            steps = stacked_steps(batch, forms, dtype)
        else:
            runs = [FormRun(start, stop, forms[slot]) for start, stop, slot in batch.runs if slot in forms]
            steps, left = together(runs, batch.tokens, dtype, spare, batch.gathered)
        used = [(slot, forms.get(slot)) for slot in {run.slot for run in batch.runs}]
        kept = batch.plans[id(forms), dtype] = _Plan(forms, used, steps, spare - left)
        batch.copied += kept.copied
    return kept.steps


def together(
    runs: Sequence[FormRun],
    tokens: int,
    dtype: torch.dtype,
    limit: int = _COPIED_BYTES,
    kept: dict[Any, Any] | None = None,
) -> tuple[list[Step], int]:
    """The same work in fewer steps, for rows of `tokens` tokens, of forms that are in no stacks; and what is left of
    `limit`, the bytes that copies of factors may take. Those of a pair with a g or a bias stay by themselves.

    kept: what layers have in common, the tables of a pair among it, which count in the layer that copies them.
    """
    steps: list[Step] = []
    kept = {} if kept is None else kept
    gathered: set[int] = set()
    loose = [run for run in runs if run.form.A]
    single = [run for run in loose if run.stop - run.start == 1 and run.form.mid_scale is None]
    for members in _stacks(single):
        first = members[0].form
        size = len(members) * (first.A[0].shape[1] + first.B[0].shape[1]) * first.rank * dtype.itemsize
        if len(members) > 1 and size <= limit:
            limit -= size
            steps.append(_stacked(members, dtype, kept))
            gathered.update(run.start for run in members)
    for members in _pairs(loose, tokens):
        bagged = few_of_a_pair(members)
        size = _missing(members[0].form, dtype, kept) if bagged else 0
        if bagged and size <= limit:
            limit -= size
            steps.append(_bagged(members, dtype, kept))
        else:
            steps.append(_shared(members, tokens, dtype))
        gathered.update(run.start for run in members)
    for run in runs:
        if run.start not in gathered:
            widened = _widened(run, dtype)
            size = 0 if widened is run else sum(part.nbytes for part in (*widened.form.A, *widened.form.B))
            steps.append(widened if size <= limit else run)
            limit -= size if size <= limit else 0
    return steps, limit


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
    gathered = [chain for members in found.values() for chain in chains(runs, members, tokens)]
    return [[runs[number] for number in chain] for chain in gathered]


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


def _stacked(members: Sequence[FormRun], dtype: torch.dtype, kept: dict[Any, Any]) -> StackedRuns | BagRuns:
    members = sorted(members, key=lambda run: run.start)
    forms = [run.form for run in members]
    rank = max([form.rank for form in forms])
    device, width = forms[0].A[0].device, forms[0].B[0].shape[1]
    base_scale = _by_form([form.base_scale for form in forms], torch.ones(width, device=device))
    added_bias = _by_form([form.added_bias for form in forms], torch.zeros(width, device=device))
    A = _padded([form.A for form in forms], rank, dtype, transposed=True)
    # B is rounded with h and scaling in it.
    wide = torch.promote_types(dtype, torch.float32) if in_bags(A) else dtype
    B = _padded([form.B for form in forms], rank, wide, transposed=False)
    for rows, form in zip(B, forms, strict=True):
        if form.out_scale is not None:
            rows.mul_(form.out_scale)
        if form.scaling != 1.0:
            rows.mul_(form.scaling)
    tokens = tokens_of(members, device)
    if not in_bags(A):
        return StackedRuns(tokens, A, B, base_scale, added_bias, ("x", dtype, *[run.start for run in members]))
    down, up = (bags_of(range(len(members)), stack.shape[1], kept) for stack in (A, B))
    tables = A.flatten(0, 1), B.to(dtype).flatten(0, 1)
    return BagRuns(tokens, *tables, down, up, rows_key(members), base_scale=base_scale, added_bias=added_bias)


class _Copy(NamedTuple):
    """A table without gaps, and the one that it was made of: while that is kept, nobody else has its memory."""

    source: Tensor
    version: int
    table: Tensor


def _copied(table: Tensor, dtype: torch.dtype, kept: dict[Any, Any]) -> Tensor | None:
    """The table in this dtype without gaps, where it is so or was copied and not written since; None where not."""
    if table.dtype == dtype and table.is_contiguous():
        return table
    copy: _Copy | None = kept.get(_name(table, dtype))
    # An inference tensor does not tell whether it was written.
    known = copy is not None and not table.is_inference() and copy.version == version(table)
    return copy.table if copy is not None and known else None


def _name(table: Tensor, dtype: torch.dtype) -> tuple[object, ...]:
    return ("table", table.data_ptr(), table.dtype, table.shape, table.stride(), dtype)


def _missing(form: SlotForm, dtype: torch.dtype, kept: dict[Any, Any]) -> int:
    """Bytes of the tables of a pair that are still to be copied."""
    missing = [table for table in (form.A[0].T, form.B[0]) if _copied(table, dtype, kept) is None]
    return sum([table.numel() for table in missing]) * dtype.itemsize


def _tables(form: SlotForm, dtype: torch.dtype, kept: dict[Any, Any]) -> list[Tensor]:
    """A pair as tables without gaps, A by its columns; copied once for all layers that have these parts of it."""
    tables = []
    for source in (form.A[0].T, form.B[0]):
        table = _copied(source, dtype, kept)
        if table is None:
            table = source.to(dtype).contiguous()
            kept[_name(source, dtype)] = _Copy(source, version(source), table)
        tables.append(table)
    return tables


def _by_form(vectors: Sequence[Tensor | None], absent: Tensor) -> Tensor | None:
    """The vectors, one behind the other, with another one where there is none; None where nobody has any."""
    if all([vector is None for vector in vectors]):
        return None
    return torch.stack([absent if vector is None else vector for vector in vectors])


def _padded(factors: Sequence[Sequence[Tensor]], rank: int, dtype: torch.dtype, transposed: bool) -> Tensor:
    """The factors, each in its parts, as one tensor [S, rank, width] with zeros behind them, or [S, width, rank]."""
    first = factors[0][0]
    shape = (first.shape[1], rank) if transposed else (rank, first.shape[1])
    stack = torch.zeros(len(factors), *shape, dtype=dtype, device=first.device)
    for rows, parts in zip(stack.transpose(1, 2) if transposed else stack, factors, strict=True):
        start = 0
        for part in parts:
            rows[start : start + part.shape[0]].copy_(part)
            start += part.shape[0]
    return stack


def _shared(members: Sequence[FormRun], tokens: int, dtype: torch.dtype) -> SharedRuns:
    A, B = (cast(side[0], dtype) for side in (members[0].form.A, members[0].form.B))
    mid, out = _scales(members, row_length(members, tokens))
    return SharedRuns(tokens_of(members, A.device), A, B, mid, out, pair_key(A, rows_key(members)))


def _bagged(members: Sequence[FormRun], dtype: torch.dtype, kept: dict[Any, Any]) -> BagRuns:
    mid, out = _scales(members, 1)
    A, B = _tables(members[0].form, dtype, kept)
    down, up = (bags_of([0] * len(mid), table.shape[0], kept) for table in (A, B))
    key = rows_key(members)
    # By the table, which stays where it is for as long as this step does.
    return BagRuns(tokens_of(members), A, B, down, up, key, pair_key(A, key), mid.to(dtype), out.to(dtype))


def _scales(members: Sequence[FormRun], tokens: int) -> tuple[Tensor, Tensor]:
    """mid_scale and out_scale of each row of so many tokens, with the scalings in it."""
    forms = [run.form for run in members for _ in range(run.start, run.stop, tokens)]
    ones = torch.ones(forms[0].B[0].shape[1], device=forms[0].B[0].device)
    mid = torch.stack([form.mid_scale for form in forms if form.mid_scale is not None])
    return mid, torch.stack([form.scaling * (ones if form.out_scale is None else form.out_scale) for form in forms])
