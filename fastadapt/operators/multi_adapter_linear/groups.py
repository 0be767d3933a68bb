"""Which runs of a batch go together through stacks of factors, and through pairs, and what that is in each layer.

It is the same for all layers whose forms are arranged alike, and found once for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..arithmetic import cast
from .batch import AdapterBatch, FormStack, Place, Run, SlotForm, StackedForms
from .eager import BagRuns, Bags, FormRun, PlainRun, SharedRuns, StackedRuns, Step, rows_at

# Tokens up to which a run goes with others through the stack that holds its factors, and how many adapters' factors are
# read for each that is asked for.
_FEW_TOKENS = 4
_MOST_READ = 4

# The same where each token reads its factors by itself, out of a cache from the second one on: a run of 8 tokens takes
# 30 to 39 us beside 40 in two products (an AMD EPYC, r 16), one of 16 as long or longer. Of a pair of rank 256 two
# tokens take two thirds of two products, four as long.
_FEW_BAGS = 8
_FEW_OF_A_PAIR = 3


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
        A, B, vectors = stack.A[self.parts], stack.B[self.parts], _vectors(stack, self)
        return StackedRuns(self.tokens, A, B, *vectors, self.key, self.places, self.source)


class _Shared(NamedTuple):
    """Runs, by their numbers, of one pair with their scales in one stack, as _Stacked. own: the part of each row."""

    members: Sequence[int]
    own: slice | Tensor
    scaled: bool
    biased: bool
    tokens: slice | Tensor
    key: tuple[object, ...]

    def step(self, form: SlotForm, dtype: torch.dtype) -> SharedRuns:
        """What a layer does in which the first of them has this form."""
        stack, A, B = form.stack, cast(form.A[0], dtype), cast(form.B[0], dtype)
        assert stack is not None
        assert stack.mid_scale is not None
        assert stack.out_scale is not None
        mid, out = (rows_at(scale, self.own) for scale in (stack.mid_scale, stack.out_scale))
        return SharedRuns(self.tokens, A, B, mid, out, pair_key(A, self.key), *_vectors(stack, self))


class _Bagged(NamedTuple):
    """Runs, by their numbers, that go through one stack or pair as sums of its rows, as _Stacked. own: the part of each
    token. bags: those of bags_of, as many as layers have widths and ranks."""

    members: Sequence[int]
    own: slice | Tensor
    scaled: bool
    biased: bool
    tokens: slice | Tensor
    key: tuple[object, ...]
    parts: list[int]
    bags: dict[Any, Any]

    def step(self, form: SlotForm, _: torch.dtype) -> BagRuns:
        """What a layer does in which the first of them has this form."""
        stack = form.stack
        assert stack is not None
        vectors = _vectors(stack, self)
        if stack.A is not None and stack.B is not None:
            A, B = stack.A.flatten(0, 1), stack.B.flatten(0, 1)
            down, up = (bags_of(self.parts, side.shape[1], self.bags) for side in (stack.A, stack.B))
            return BagRuns(self.tokens, A, B, down, up, self.key, None, None, None, *vectors)
        A, B = form.A[0].T, form.B[0]
        assert stack.mid_scale is not None
        assert stack.out_scale is not None
        mid, out = (rows_at(scale, self.own).to(A.dtype) for scale in (stack.mid_scale, stack.out_scale))
        down, up = (bags_of(self.parts, side.shape[0], self.bags) for side in (A, B))
        return BagRuns(self.tokens, A, B, down, up, self.key, pair_key(form.A[0], self.key), mid, out, *vectors)


Group = _Stacked | _Shared | _Bagged


def _vectors(stack: FormStack, group: Group) -> tuple[Tensor | None, Tensor | None]:
    """The rows of g and β that a group has of a stack, None for one that nobody in it has."""
    g, beta = stack.base_scale if group.scaled else None, stack.added_bias if group.biased else None
    return None if g is None else rows_at(g, group.own), None if beta is None else rows_at(beta, group.own)


def bags_of(parts: Sequence[int], rows: int, kept: dict[Any, Any]) -> Bags:
    """For each token all rows of its part of a table, of so many rows a part; made once for all that keep them here."""
    key = ("bags", *parts, rows)
    found: Bags | None = kept.get(key)
    if found is None:
        first = torch.tensor(parts, dtype=torch.int32)[:, None] * rows
        places = first + torch.arange(rows, dtype=torch.int32)
        found = kept[key] = Bags(places.view(-1), torch.arange(len(parts), dtype=torch.int32) * rows)
    return found


class _Outline(NamedTuple):
    """What a batch does in layers whose forms in stacks are arranged alike: groups with the slot of one of their runs,
    and the runs that stay by themselves, those that are PlainRuns and others. scales: whether one of all has a g."""

    groups: list[tuple[Group, int]]
    plain: list[Run]
    runs: list[Run]
    scales: bool


def stacked_steps(batch: AdapterBatch, forms: StackedForms, dtype: torch.dtype) -> list[Step]:
    """What a layer with these forms does for a batch: nothing is copied, and what goes together is found once for all
    layers that are arranged alike."""
    groups, plain, runs, _ = outline(batch, forms, dtype)
    steps: list[Step] = [group.step(forms[slot], dtype) for group, slot in groups]
    steps += [_plain(start, stop, forms[slot]) for start, stop, slot in plain]
    steps += [FormRun(start, stop, forms[slot]) for start, stop, slot in runs]
    return steps


def _plain(start: int, stop: int, form: SlotForm) -> PlainRun:
    return PlainRun(start, stop, form.A[0].T, form.B[0], form.base_scale, form.added_bias)


def outline(batch: AdapterBatch, forms: StackedForms, dtype: torch.dtype) -> _Outline:
    """What a batch of tokens of this dtype does in layers that are arranged as this one; kept in the batch."""
    key = (forms.arrangement, dtype)
    found: _Outline | None = batch.gathered.get(key)
    if found is None:
        runs = [run for run in batch.runs if run.slot in forms]
        own = [FormRun(start, stop, forms[slot]) for start, stop, slot in runs]
        groups = _groups(own, batch.tokens, dtype)
        taken = {number for group in groups for number in group.members}
        alone: dict[bool, list[Run]] = {True: [], False: []}
        for number, run in enumerate(runs):
            if number not in taken:
                alone[_holds(forms[run.slot], dtype)].append(run)
        found = batch.gathered[key] = _Outline(
            [(group, runs[group.members[0]].slot) for group in groups],
            alone[True],
            alone[False],
            any([run.form.base_scale is not None for run in own]),
        )
    return found


def _holds(form: SlotForm, dtype: torch.dtype) -> bool:
    """Whether a form has factors of its own in a stack that x of this dtype loses nothing in: it is cast to theirs."""
    own = form.place is not None and form.mid_scale is None
    return own and torch.promote_types(form.A[0].dtype, dtype) == form.A[0].dtype


def _groups(runs: Sequence[FormRun], tokens: int, dtype: torch.dtype) -> list[Group]:
    """What goes together of the runs whose forms are in stacks; those of many tokens, or of stacks that would be read
    in vain for the most part or are of a dtype that cannot hold x's, do not."""
    stacks: dict[object, list[int]] = {}
    for number, run in enumerate(runs):
        if run.form.place is not None:
            stacks.setdefault(run.form.place.stack, []).append(number)
    found: list[Group] = []
    for members in stacks.values():
        first = runs[members[0]].form
        if first.mid_scale is not None:
            for chain in chains(runs, members, tokens):
                bagged = few_of_a_pair([runs[number] for number in chain])
                tables = first.A[0].T, first.B[0]
                bagged = bagged and all([table.dtype == dtype and table.is_contiguous() for table in tables])
                found.append(_bagged_group(runs, chain) if bagged else _shared_group(runs, chain, tokens))
            continue
        if not _holds(first, dtype):
            continue
        bagged = in_bags(first.A[0])
        few_tokens = _FEW_BAGS if bagged else _FEW_TOKENS
        members = [number for number in members if runs[number].stop - runs[number].start <= few_tokens]
        if bagged and members:
            found.append(_bagged_group(runs, members))
            continue
        parts = {place.part for place in _places(runs, members)}
        if len(parts) > 1 and max(parts) - min(parts) < _MOST_READ * len(parts):
            found.append(_stacked_group(runs, members))
    return found


def in_bags(factor: Tensor) -> bool:
    """Whether sums of rows are faster than products of few tokens: in 16 bits on a CPU."""
    return factor.dtype.itemsize == 2 and factor.is_cpu


def few_of_a_pair(chain: Sequence[FormRun]) -> bool:
    """Whether these runs of one pair should be BagRuns."""
    return sum([run.stop - run.start for run in chain]) <= _FEW_OF_A_PAIR and in_bags(chain[0].form.A[0])


def _bagged_group(runs: Sequence[FormRun], members: Sequence[int]) -> _Bagged:
    chain = [runs[number] for number in members]
    places = _places(runs, members)
    parts = [place.part for run, place in zip(chain, places, strict=True) for _ in range(run.start, run.stop)]
    of_pair = chain[0].form.mid_scale is not None
    return _Bagged(
        members,
        rows_of(parts),
        any([place.scaled for place in places]),
        any([place.biased for place in places]),
        tokens_of(chain),
        rows_key(chain),
        [0] * len(parts) if of_pair else parts,
        {},
    )


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
        rows_of(parts),
        any([place.scaled for place in places]),
        any([place.biased for place in places]),
        rows_of(tokens),
        ("x", runs[members[0]].form.A[0].dtype, *source),
        None if in_order else torch.tensor([where[token] for token in tokens]),
        None if in_order else torch.tensor(source),
    )


def _shared_group(runs: Sequence[FormRun], members: Sequence[int], tokens: int) -> _Shared:
    chain = [runs[number] for number in members]
    tokens = row_length(chain, tokens)
    places = _places(runs, members)
    counts = [(run.stop - run.start) // tokens for run in chain]
    return _Shared(
        members,
        rows_of([place.part for place, count in zip(places, counts, strict=True) for _ in range(count)]),
        any([place.scaled for place in places]),
        any([place.biased for place in places]),
        tokens_of(chain),
        rows_key(chain),
    )


def rows_of(numbers: Sequence[int]) -> slice | Tensor:
    """The rows of these numbers: a slice, and so a view, where they are neighbours."""
    if all([second == first + 1 for first, second in pairwise(numbers)]):
        return slice(numbers[0], numbers[-1] + 1)
    return torch.tensor(numbers)


def chains(runs: Sequence[FormRun], members: Sequence[int], tokens: int) -> list[list[int]]:
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


def row_length(members: Sequence[FormRun], tokens: int) -> int:
    """Tokens of each row of a SharedRuns: those of a run that is by itself are one row."""
    return members[0].stop - members[0].start if len(members) == 1 and tokens == 1 else tokens


def rows_key(members: Sequence[FormRun]) -> tuple[object, ...]:
    """Equal for the same tokens in the same order."""
    return ("rows", *[(run.start, run.stop) for run in members])


def pair_key(A: Tensor, rows: tuple[object, ...]) -> tuple[object, ...]:
    """Equal for what is the same A x of the same tokens, of that key."""
    return (A.data_ptr(), A.shape, rows)


def tokens_of(members: Sequence[FormRun], device: torch.device | None = None) -> slice | Tensor:
    """The members' tokens: a slice, and so a view, where they are neighbours."""
    if all([first.stop == second.start for first, second in pairwise(members)]):
        return slice(members[0].start, members[-1].stop)
    return torch.tensor([token for run in members for token in range(run.start, run.stop)], device=device)
