"""Adapters by slot in stacks, and the update of what any layer gave, for batches whose rows have any lengths."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_follows
from test_multi_adapter import BACKENDS, DEVICE, SETS, cast_form, ids_of, make_resident
from torch import Tensor

from fastadapt import AdapterForm, functional
from fastadapt.operators.multi_adapter_linear import groups, plan
from fastadapt.operators.multi_adapter_linear.batch import AdapterBatch
from fastadapt.operators.multi_adapter_linear.eager import BagRuns, FormRun, PlainRun, SharedRuns, StackedRuns
from fastadapt.operators.multi_adapter_linear.packed import Columns, PackedUpdate
from fastadapt.operators.multi_adapter_linear.stacks import FormStacks
from fastadapt.reference import multi_adapter_linear_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# How many tokens of which adapter come one behind the other: decoding, prompts, both, and one adapter in many places.
BATCHES: dict[str, list[tuple[int, int]]] = {
    "decoding": [(slot, 1) for slot in (3, -1, 0, 1, 2, 4, 5, 0, 6, 7)],
    "prompts": [(0, 9), (5, 7), (-1, 3), (5, 6), (6, 11)],
    "both": [(0, 1), (5, 8), (1, 1), (6, 1), (5, 1), (-1, 2), (2, 12), (8, 2), (1, 2), (0, 3)],
    "one": [(2, 1), (-1, 1), (2, 1), (2, 5)],
    "scales": [(9, 1), (10, 1), (0, 1), (11, 2), (5, 1), (7, 1), (9, 1), (-1, 1)],
    "prompts of scales": [(9, 6), (10, 7), (11, 5)],
    "base": [(-1, 4)],
    "nobody": [],
}


def normal(*shape: int, seed: int, std: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * std


def make_forms(N: int, K: int, bias: Tensor | None, pair_dtype: torch.dtype | None = None) -> list[AdapterForm]:
    """LoRA of three ranks, DoRA of two, VeRA twice of one pair, DoRA with another h and of rank 0, LoRA with a bias,
    and of the pair once more one with a g and one with a bias. pair_dtype: of a pair that is laid out as tables."""
    pair = normal(12, K, seed=1, std=K**-0.5), normal(N, 12, seed=2, std=12**-0.5)
    if pair_dtype is not None:
        A, B = (side.to(pair_dtype).T.contiguous().T for side in pair)
        pair = A, B

    def factors(r: int) -> tuple[Tensor, Tensor]:
        return normal(r, K, seed=r, std=K**-0.5), normal(N, r, seed=100 + r, std=max(r, 1) ** -0.5)

    g = [1 + normal(N, seed=seed, std=0.1) for seed in range(4)]
    own: list[dict[str, Any]] = [
        {"A": factors(4)[0], "B": factors(4)[1], "scaling": 2.0},
        {"A": factors(7)[0], "B": factors(7)[1], "out_scale": 0.5},
        {"A": factors(5)[0], "B": factors(5)[1], "out_scale": g[0], "base_scale": g[0], "scaling": 1.5},
        {"A": factors(16)[0], "B": factors(16)[1]},
        {"A": factors(9)[0], "B": factors(9)[1], "out_scale": g[1], "base_scale": g[1]},
        {"A": pair[0], "B": pair[1], "mid_scale": normal(12, seed=5), "out_scale": normal(N, seed=6)},
        {"A": pair[0], "B": pair[1], "mid_scale": normal(12, seed=7), "out_scale": normal(N, seed=8)},
        {"A": factors(3)[0], "B": factors(3)[1], "out_scale": g[2], "base_scale": g[3]},
        {"A": factors(0)[0], "B": factors(0)[1], "base_scale": g[3]},
        {"A": factors(6)[0], "B": factors(6)[1], "bias": normal(N, seed=9) + (0 if bias is None else bias)},
        {"A": pair[0], "B": pair[1], "mid_scale": normal(12, seed=10), "out_scale": g[0], "base_scale": g[1]},
        {"A": pair[0], "B": pair[1], "mid_scale": normal(12, seed=11), "scaling": 0.7}
        | {"bias": normal(N, seed=12) + (0 if bias is None else bias)},
    ]
    return [AdapterForm(**{"bias": bias, **fields}) for fields in own]


def stacked(forms: Sequence[AdapterForm], shape: tuple[int, int], dtype: torch.dtype) -> FormStacks:
    stacks = FormStacks(shape, dtype)
    for slot, form in enumerate(forms):
        stacks.write(slot, form, base_bias=form.bias if forms[0].bias is form.bias else forms[0].bias)
    return stacks


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("tables", [False, True], ids=["pair", "tables"])
def test_every_token_is_its_adapters(tables: bool, batch: str, dtype: torch.dtype, bias: bool) -> None:
    N, K = 20, 24
    ids = [slot for slot, tokens in BATCHES[batch] for _ in range(tokens)]
    weight, x = normal(N, K, seed=20, std=K**-0.5).to(dtype), normal(len(ids), K, seed=21).to(dtype)
    b0 = normal(N, seed=22, std=20.0).to(dtype) if bias else None
    forms = make_forms(N, K, b0, dtype if tables else None)
    stacks = stacked(forms, (N, K), dtype)
    packed = torch.full((len(ids), N + 9), torch.nan, dtype=dtype)
    y = packed[:, 5 : 5 + N]
    y.copy_(x @ weight.T)
    functional.multi_adapter_update([y], x, [b0], AdapterBatch(ids), [stacks.layer])

    def formula(to: torch.dtype) -> dict[str, Tensor]:
        beta = None if b0 is None else b0.to(to)
        own = [cast_form(form, to) for form in forms]
        return dict(enumerate(multi_adapter_linear_reference(x.to(to), weight.to(to), beta, own, ids)))  # type: ignore[arg-type]

    assert_follows(dict(enumerate(y)), formula, dtype)  # type: ignore[arg-type]
    assert packed[:, :5].isnan().all()
    assert packed[:, 5 + N :].isnan().all()
    for token, slot in enumerate(ids):
        if slot < 0:
            assert torch.equal(y[token], F.linear(x, weight)[token] + (0 if b0 is None else b0))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_slices_of_one_product_on_pages(bias: bool, dtype: torch.dtype, backend: str, shuffled_programs: None) -> None:
    """What multi_adapter_linear makes of the layers, whose products lie side by side in one tensor."""
    residents = [make_resident(SETS["mixed"], 36, N, dtype, bias=bias) for N in (20, 36)]
    ids = ids_of("distinct", 12, 13)
    batch = residents[0].batch(ids, 2)
    x = normal(len(ids), 2, 36, seed=0).to(DEVICE, dtype)
    packed = F.linear(x, torch.cat([resident.weight for resident in residents]))
    ys = list(packed.split([20, 36], -1))
    layers, biases = [resident.layer for resident in residents], [resident.bias for resident in residents]
    functional.multi_adapter_update(ys, x, biases, batch, layers, backend=backend)
    for y, resident in zip(ys, residents, strict=True):
        of_rows = dict(enumerate(y))

        def formula(to: torch.dtype, resident: Any = resident) -> dict[Any, Tensor]:
            forms = [cast_form(form, to) for form in resident.forms]
            beta = None if resident.bias is None else resident.bias.to(to)
            return dict(enumerate(multi_adapter_linear_reference(x.to(to), resident.weight.to(to), beta, forms, ids)))

        assert_follows(of_rows, formula, dtype)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch", BATCHES)
def test_what_is_found_beforehand_gives_the_same(batch: str, dtype: torch.dtype) -> None:
    """Two layers of one product, called twice for one batch; an engine fills it up with rows of nobody."""
    N, K, spare = (20, 28), 24, 3
    ids = [slot for slot, tokens in BATCHES[batch] for _ in range(tokens)]
    found = AdapterBatch(ids)
    stacks = [stacked(make_forms(n, K, None), (n, K), dtype) for n in N]
    stacks[1].clear(0)
    x = normal(len(ids) + spare, K, seed=21).to(dtype)
    before = x @ normal(K, sum(N), seed=20, std=K**-0.5).to(dtype)
    b0 = normal(sum(N), seed=22).to(dtype)
    update = PackedUpdate(found, [Columns(0, 20, stacks[0]), Columns(20, 48, stacks[1])], dtype)
    assert update.idle == (not set(ids) - {-1})
    assert update.scales == bool(set(ids) & {2, 4, 7, 8, 10})
    for _ in range(2):
        y, expected = before.clone(), before.clone()
        update(y, x, b0)
        ys = expected[: len(ids)].split(N, 1)
        functional.multi_adapter_update(ys, x[: len(ids)], [None, None], found, [part.layer for part in stacks])
        assert torch.equal(y, expected + b0)
    if ids:
        with pytest.raises(ValueError, match=f"x has {len(ids) - 1} tokens .* but the batch has {len(ids)}"):
            update(y[1:], x[: len(ids) - 1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_new_batch_copies_no_factor(dtype: torch.dtype) -> None:
    N, K = 20, 24
    stacks = stacked(make_forms(N, K, None, dtype), (N, K), dtype)
    factors = [factor for stack in stacks._stacks.values() for factor in (stack.A, stack.B) if factor is not None]
    kept = {factor.untyped_storage().data_ptr() for factor in factors}
    pair = {stacks._forms[5].A[0].untyped_storage().data_ptr(), stacks._forms[5].B[0].untyped_storage().data_ptr()}
    kinds = set()
    for batch in BATCHES.values():
        ids = [slot for slot, tokens in batch for _ in range(tokens)]
        for step in plan.plan(AdapterBatch(ids), stacks.layer.forms, dtype):
            factors = [*step.form.A, *step.form.B] if isinstance(step, FormRun) else [step.A, step.B]
            owned = {part.untyped_storage().data_ptr() for part in factors if part.numel()}
            assert owned <= kept | pair
            kinds.add(type(step))
    assert kinds == {FormRun, PlainRun, SharedRuns, StackedRuns if dtype is torch.float32 else BagRuns}


def test_a_new_batch_stacks_no_vector_and_looks_once_for_what_goes_together(monkeypatch: pytest.MonkeyPatch) -> None:
    N, K = 20, 24
    forms = make_forms(N, K, None)
    layers = [stacked(forms, (N, K), torch.float32).layer for _ in range(3)]
    looked = []
    found = groups._groups
    monkeypatch.setattr(groups, "_groups", lambda *args: looked.append(args) or found(*args))
    for name in ("stack", "cat", "ones", "zeros"):
        monkeypatch.delattr(torch, name)
    for batch in (AdapterBatch([0, 5, 2, 1, 6, 10, 9, 11, 7]), AdapterBatch([5, 2, 1, 6, 10, 9, 11, 7, 0])):
        looked.clear()
        for layer in layers:
            steps = plan.plan(batch, layer.forms, torch.float32)
            assert sorted(type(step).__name__ for step in steps) == ["SharedRuns", "StackedRuns"]
        assert len(looked) == 1


def test_few_tokens_in_16_bits_are_sums_of_rows() -> None:
    """Of one stack however they come; of a pair where it lies as tables. What takes longer so is left to products."""
    N, K, dtype = 20, 24, torch.bfloat16
    forms = make_forms(N, K, None, dtype)
    stacks = stacked(forms, (N, K), dtype)
    plain = stacked(make_forms(N, K, None), (N, K), dtype)

    def kinds(ids: list[int], stacks: FormStacks = stacks) -> list[type]:
        return [type(step) for step in plan.plan(AdapterBatch(ids), stacks.layer.forms, dtype)]

    assert kinds([0, 3, 1, 0]) == [BagRuns, BagRuns]  # of two stacks
    assert kinds([0] * 8) == [BagRuns]
    assert kinds([0] * 9) == [PlainRun]
    assert kinds([5, 6, 5]) == [BagRuns]
    assert kinds([5, 6, 5, 6]) == [SharedRuns]
    assert kinds([5, 6, 5], plain) == [SharedRuns]


def test_layers_that_read_one_x_take_its_tokens_once(monkeypatch: pytest.MonkeyPatch) -> None:
    N, K = 20, 24
    layers = [stacked(make_forms(N, K, None), (N, K), torch.bfloat16) for _ in range(3)]
    x, y = normal(8, K, seed=21).bfloat16(), torch.zeros(8, 3 * N, dtype=torch.bfloat16)
    columns = [Columns(place * N, place * N + N, layer) for place, layer in enumerate(layers)]
    taken: list[torch.Size] = []
    select = Tensor.index_select
    monkeypatch.setattr(Tensor, "index_select", lambda own, *args: taken.append(own.shape) or select(own, *args))
    for some in (columns[:1], columns):
        update = PackedUpdate(AdapterBatch([0, -1, 1, 0, -1, 1, 1, 0]), some, torch.bfloat16)
        taken.clear()
        update(y, x)
        assert taken.count(x.shape) == 1


def test_layers_that_differ_are_looked_at_each() -> None:
    """What goes together in one of them does not in another: a form more, another pair, another part of a stack."""
    N, K, ids = 20, 24, [0, 1, 2, 5, 6]
    forms, batch = make_forms(N, K, None), AdapterBatch(ids)
    x, weight = normal(len(ids), K, seed=21), normal(N, K, seed=20, std=K**-0.5)
    for order in ([0, 1, 2, 5, 6], [6, 5, 2, 1, 0], [0, 2, 5, 6], [1, 0, 2, 5], [0, 1]):
        stacks, there = FormStacks((N, K), torch.float32), dict.fromkeys(range(7), AdapterForm(x[:0], weight[:, :0]))
        for slot in order:
            there[slot] = forms[slot]
            stacks.write(slot, forms[slot])
        y = x @ weight.T
        functional.multi_adapter_update([y], x, [None], batch, [stacks.layer])

        def formula(to: torch.dtype, own: Sequence[AdapterForm] = [*there.values()]) -> dict[Any, Tensor]:
            forms = [cast_form(form, to) for form in own]
            return dict(enumerate(multi_adapter_linear_reference(x.to(to), weight.to(to), None, forms, ids)))

        assert_follows(dict(enumerate(y)), formula, torch.float32)  # type: ignore[arg-type]


@pytest.mark.parametrize("ids", [[0], [0, 1, 3], [5, 6], [0] * 9], ids=str)
@pytest.mark.parametrize("kept", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_x_of_another_dtype_than_the_stacks(dtype: torch.dtype, kept: torch.dtype, ids: list[int]) -> None:
    """Factors are rounded to what they are kept in; x is to nothing that it does not fit into."""
    N, K = 20, 24
    forms = [cast_form(form, kept) for form in make_forms(N, K, None, kept)]
    forms = [form._replace(scaling=1.0, out_scale=1.0) if form.mid_scale is None else form for form in forms]
    stacks, x = stacked(forms, (N, K), kept), normal(len(ids), K, seed=21).to(dtype)
    weight = normal(N, K, seed=20, std=K**-0.5).to(dtype)
    if dtype is torch.bfloat16:
        x = x * 2.0**20  # beyond fp16
    y = x @ weight.T
    functional.multi_adapter_update([y], x, [None], AdapterBatch(ids), [stacks.layer])

    def formula(to: torch.dtype) -> dict[Any, Tensor]:
        own = [cast_form(form, to) for form in forms]
        return dict(enumerate(multi_adapter_linear_reference(x.to(to), weight.to(to), None, own, ids)))

    assert_follows(dict(enumerate(y)), formula, dtype)  # type: ignore[arg-type]


def test_layers_of_one_product_whose_stacks_differ_in_dtype() -> None:
    """Whichever is looked at first, and whatever it knows of x."""
    N, K, ids = 20, 24, [0, 3, 1, 0]
    forms = make_forms(N, K, None)
    for kept in ([torch.float32, torch.float64], [torch.bfloat16, torch.float32], [torch.float32, torch.bfloat16]):
        layers = [stacked(forms, (N, K), dtype) for dtype in kept]
        dtype = torch.bfloat16 if torch.bfloat16 in kept else torch.float32
        x, y = normal(4, K, seed=21).to(dtype), torch.zeros(4, 2 * N, dtype=dtype)
        columns = [Columns(place * N, place * N + N, layer) for place, layer in enumerate(layers)]
        PackedUpdate(AdapterBatch(ids), columns, dtype)(y, x)
        for column in columns:
            alone = torch.zeros(4, N, dtype=dtype)
            functional.multi_adapter_update([alone], x, [None], AdapterBatch(ids), [column.stacks.layer])
            assert torch.equal(y[:, column.start : column.stop], alone)


@pytest.mark.parametrize("widths", [(20, 12), (12, 20)], ids=str)
def test_layers_of_several_widths_take_the_beginnings_of_one_pair(widths: tuple[int, int]) -> None:
    """Sums of rows where these have no gaps, products where they have, whichever layer comes first."""
    K, dtype, batch = 24, torch.bfloat16, AdapterBatch([0, -1, 0])
    A, B = normal(8, K, seed=1).to(dtype).T.contiguous().T, normal(20, 8, seed=2).to(dtype).T.contiguous().T
    x = normal(3, K, seed=3).to(dtype)
    for N in widths:
        form = AdapterForm(A, B[:N], mid_scale=normal(8, seed=4), out_scale=normal(N, seed=5))
        layer = stacked([form], (N, K), dtype).layer
        (step,) = plan.plan(batch, layer.forms, dtype)
        assert type(step) is (BagRuns if N == 20 else SharedRuns)
        y = torch.zeros(3, N, dtype=dtype)
        functional.multi_adapter_update([y], x, [None], batch, [layer])

        def formula(to: torch.dtype, N: int = N, form: AdapterForm = form) -> dict[Any, Tensor]:
            weight, own = torch.zeros(N, K, dtype=to), [cast_form(form, to)]
            return dict(enumerate(multi_adapter_linear_reference(x.to(to), weight, None, own, [0, -1, 0])))

        assert_follows(dict(enumerate(y)), formula, dtype)  # type: ignore[arg-type]


def test_the_scales_of_a_prompt_are_one_row() -> None:
    N, K = 20, 24
    stacks = stacked(make_forms(N, K, None), (N, K), torch.float32)
    steps = plan.plan(AdapterBatch([5] * 40 + [6] * 50), stacks.layer.forms, torch.float32)
    assert [len(step.out_scale) for step in steps if isinstance(step, SharedRuns)] == [1, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_adapters_come_and_go(dtype: torch.dtype) -> None:
    """Whatever was written, rewritten and cleared, and whichever stacks grew: each token goes through what is there."""
    N, K = 20, 24
    chosen = random.Random(0)
    forms = make_forms(N, K, None)
    weight = normal(N, K, seed=20, std=K**-0.5).to(dtype)
    stacks = FormStacks((N, K), dtype)
    there: dict[int, AdapterForm] = {}
    batch = AdapterBatch([0, 1, 2, 3, 4, 5, -1, 3])  # whose plan has to follow
    x = normal(len(batch), K, seed=21).to(dtype)
    layer = stacks.layer
    for _ in range(60):
        slot = chosen.randrange(6)
        if chosen.random() < 0.3:
            stacks.clear(slot)
            there.pop(slot, None)
        else:
            there[slot] = chosen.choice(forms)
            stacks.write(slot, there[slot])
        y = x @ weight.T
        functional.multi_adapter_update([y], x, [None], batch, [layer])
        ids = [slot if slot in there else -1 for slot in batch.adapter_ids]

        def formula(to: torch.dtype, ids: Sequence[int] = ids) -> dict[Any, Tensor]:
            own = [cast_form(there[slot], to) if slot in there else cast_form(forms[0], to) for slot in range(6)]
            return dict(enumerate(multi_adapter_linear_reference(x.to(to), weight.to(to), None, own, ids)))

        assert_follows(dict(enumerate(y)), formula, dtype)  # type: ignore[arg-type]
    for slot in range(6):
        stacks.clear(slot)
    assert stacks.bytes == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("ids", [[0], [0, 1], [5], [5, 6], [10, 8]], ids=str)
def test_rows_without_tokens(ids: list[int], dtype: torch.dtype) -> None:
    N, K = 20, 24
    layer, batch = stacked(make_forms(N, K, None), (N, K), dtype).layer, AdapterBatch(ids, 0)
    x, y = torch.zeros(len(ids), 0, K, dtype=dtype), torch.zeros(len(ids), 0, N, dtype=dtype)
    functional.multi_adapter_update([y], x, [None], batch, [layer])
    pairs = make_resident(SETS["mixed"], K, N, dtype)
    for row in ids, [2, 4]:  # of one pair
        x = torch.zeros(len(row), 0, K, device=DEVICE, dtype=dtype)
        found = functional.multi_adapter_linear(
            x, pairs.weight, pairs.bias, pairs.batch(row, 0), pairs.layer, backend="eager"
        )
        assert found.shape == (len(row), 0, N)


def test_bytes_of_stacks() -> None:
    N, K = 20, 24
    stacks = FormStacks((N, K), torch.bfloat16)
    forms = make_forms(N, K, None)
    stacks.write(0, forms[0])  # rank 4 in a stack of rank 8
    assert stacks.bytes == 8 * (N + K) * 2
    stacks.write(1, forms[1])
    assert stacks.bytes == 2 * 8 * (N + K) * 2
    stacks.write(7, forms[2])  # of a DoRA, for whose g all have a row
    assert stacks.bytes == 4 * (8 * (N + K) * 2 + N * 4)
    stacks.write(3, forms[5])  # VeRA: d and h
    stacks.write(4, forms[6])
    assert stacks.bytes == 4 * (8 * (N + K) * 2 + N * 4) + 2 * (12 + N) * 4


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda of: of | {"ys": []}, ValueError, "one entry a layer, one at least, got 0, 1 and 1"),
        (lambda of: of | {"ys": [of["ys"][0].T.contiguous().T]}, ValueError, "y must be rows .* got strides"),
        (lambda of: of | {"ys": [of["ys"][0].double()]}, TypeError, "y must have the dtype of x, torch.float32"),
        (lambda of: of | {"ys": [of["ys"][0][:2]]}, ValueError, r"y must have shape \[3, 'out'\]"),
        (lambda of: of | {"x": of["x"][:2]}, ValueError, "x has 2 tokens .* but the batch has 3"),
        (lambda of: of | {"biases": [torch.zeros(3)]}, ValueError, r"bias must have shape \[8\], got \(3,\)"),
        (lambda of: of | {"backend": "triton"}, ValueError, "layers must be an AdapterPool's for Triton"),
        (lambda of: of | {"x": of["x"].requires_grad_()}, ValueError, "x or y requires grad"),
    ],
)
def test_what_an_update_refuses(change: Callable[[Any], Any], error: type[Exception], message: str) -> None:
    stacks = FormStacks((8, 16), torch.float32)
    given = {
        "ys": [torch.zeros(3, 8)],
        "x": torch.zeros(3, 16),
        "biases": [None],
        "batch": AdapterBatch([0, 1, -1]),
        "layers": [stacks.layer],
        "backend": "eager",
    }
    with pytest.raises(error, match=message):
        functional.multi_adapter_update(**change(given))


def test_stacks_are_written_in_any_mode() -> None:
    stacks = FormStacks((8, 16), torch.float32)
    forms = [AdapterForm(normal(4, 16, seed=seed), normal(8, 4, seed=seed)) for seed in range(4)]
    for slot, mode in enumerate((torch.inference_mode(), torch.no_grad(), torch.inference_mode(), torch.enable_grad())):
        with mode:
            stacks.write(slot, forms[slot])
    for slot, form in enumerate(forms):
        assert torch.equal(stacks.forms[slot].A[0], form.A)


def test_what_stacks_refuse() -> None:
    stacks, form = FormStacks((8, 16), torch.float32), AdapterForm(torch.ones(4, 16), torch.ones(8, 4))
    stacks.write(0, form)
    with pytest.raises(ValueError, match="slot must be 0 or more, got -1"):
        stacks.write(-1, form)
    with pytest.raises(ValueError, match=r"A and B must be \[r, 16\] and \[8, r\], got \(4, 15\) and \(8, 4\)"):
        stacks.write(0, form._replace(A=torch.ones(4, 15)))
    with pytest.raises(ValueError, match="a form with U and V"):
        stacks.write(0, form._replace(U=torch.ones(8, 1), V=torch.ones(1, 16)))
    assert set(stacks.layer.forms) == {0}
