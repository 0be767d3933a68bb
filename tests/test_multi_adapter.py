"""Many adapters in one batch: both backends against the reference, and who is in the batch changes no launch."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from cProfile import Profile
from itertools import groupby
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from fastadapt_kernels import configs, multi_adapter
from helpers import assert_follows, guarded, guarded_outputs, margins_intact
from test_ops import layout_is_told
from torch import Tensor

from fastadapt import AdapterForm, functional
from fastadapt.operators.multi_adapter_linear import eager, op, plan
from fastadapt.operators.multi_adapter_linear.batch import (
    PAGE_RANKS,
    AdapterBatch,
    FormEntry,
    FormTables,
    LayerForms,
    Run,
    SlotForm,
    SortedTokens,
    places_of_a_tile,
    sort_tokens,
)
from fastadapt.operators.multi_adapter_linear.eager import BagRuns, FormRun, SharedRuns
from fastadapt.operators.multi_adapter_linear.pages import slot_form
from fastadapt.reference import multi_adapter_linear_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
BACKENDS = ("eager", "triton")
# A GPU to record launches for: what a block of sm_80 may take.
LARGE = 166_912


class Spec(NamedTuple):
    """An adapter to be made. Those of one pair share its factors and its rank."""

    method: str
    R: int
    pair: int | None = None


class Resident(NamedTuple):
    """A layer, its adapters as the reference takes them and as they lie in memory; groups by slot."""

    weight: Tensor
    bias: Tensor | None
    forms: list[AdapterForm]
    layer: LayerForms
    groups: list[int]
    K: int

    def batch(self, ids: Sequence[int], tokens: int) -> AdapterBatch:
        return AdapterBatch(ids, tokens, [self.groups[slot] if slot >= 0 else -1 for slot in ids])


class Arena:
    """A flat buffer full of NaN, with pages and vectors at random places that do not adjoin."""

    def __init__(self, dtype: torch.dtype, seed: int, multiple: int) -> None:
        self.random, self.multiple, self.dtype = random.Random(seed), multiple, dtype
        self.chunks: list[tuple[list[Tensor], int]] = []

    def keep(self, rows: Sequence[Tensor], stride: int) -> int:
        """Takes note of rows with a stride of bytes; the number by which `place` will know where they lie."""
        self.chunks.append((list(rows), stride))
        return len(self.chunks) - 1

    def place(self) -> tuple[Tensor, list[int]]:
        """(the buffer as bytes, where each chunk begins)."""
        starts, end = [0] * len(self.chunks), 0
        for index in self.random.sample(range(len(self.chunks)), len(self.chunks)):
            end += self.multiple * self.random.randint(1, 3)
            starts[index] = end
            rows, stride = self.chunks[index]
            end += -(-len(rows) * stride // self.multiple) * self.multiple
        buffer = torch.full((end // 4 + 16,), float("nan"), dtype=torch.float32).view(torch.uint8)
        for start, (rows, stride) in zip(starts, self.chunks, strict=True):
            for i, row in enumerate(rows):
                found = row.contiguous().view(torch.uint8)
                buffer[start + i * stride : start + i * stride + len(found)] = found
        return buffer.to(DEVICE), starts


def make_resident(
    specs: Sequence[Spec],
    K: int,
    N: int,
    dtype: torch.dtype,
    *,
    bias: bool = False,
    pages_dtype: torch.dtype | None = None,
    aligned: bool = False,
) -> Resident:
    """A layer with an adapter in each slot; "absent" is none in this layer, although others may have one."""
    generator = torch.Generator().manual_seed(K + 1000 * N + len(specs))
    kept = pages_dtype or dtype

    def normal(*shape: int, std: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
        return (torch.randn(*shape, generator=generator) * std).to(dtype)

    arena = Arena(kept, len(specs), 64 if aligned else 16)
    weight = normal(N, K, std=K**-0.5, dtype=dtype)
    b0 = normal(N, std=20.0, dtype=dtype) if bias else None

    def factor(R: int, width: int, std: float, wider: int) -> tuple[Tensor, list[int], int]:
        """(rows [R, width], the numbers of its pages, stride)."""
        stride = -(-(width + wider) // 16) * 16 if aligned else width + wider
        rows = normal(R, width, std=std, dtype=kept)
        pages = [arena.keep(rows[i : i + PAGE_RANKS], stride * kept.itemsize) for i in range(0, R, PAGE_RANKS)]
        return rows, pages, stride

    def vector(values: Tensor) -> tuple[Tensor, int]:
        return values, arena.keep([values], 4 * len(values))

    def scales(near: float = 0.0, std: float = 1.0) -> tuple[Tensor, int]:
        values = near + normal(N, std=std)
        values[0], values[N // 2], values[-1] = 0.0, 1e-3, -1.0
        return vector(values)

    pairs: dict[int, Any] = {}
    slots: list[dict[str, Any]] = []
    for slot, spec in enumerate(specs):
        group = slot if spec.pair is None else len(specs) + spec.pair
        R = 0 if spec.method == "absent" else spec.R
        if group not in pairs:
            wider = 0 if spec.pair is None else 8
            pairs[group] = factor(R, K, K**-0.5, wider), factor(R, N, max(R, 1) ** -0.5, wider // 2)
        entry: dict[str, Any] = {"group": group, "scaling": 0.5 + slot % 3}
        if spec.method == "dora":
            entry["g"] = entry["h"] = scales(1.0, 2e-3)
        elif spec.method == "vera":
            entry |= {"d": vector(normal(R)), "h": scales()}
        elif spec.method == "dvora":
            entry |= {"d": vector(normal(R)), "h": scales(), "g": scales(1.0, 2e-3)}
        elif spec.method == "zero":
            entry["g"] = vector(torch.zeros(N))
        if spec.method == "bias":
            entry["beta"] = vector(normal(N, std=3.0))
        slots.append(entry)

    memory, starts = arena.place()
    pages, vectors = memory.view(kept), memory.view(torch.float32)

    def parts(numbers: list[int], R: int, width: int, stride: int) -> tuple[Tensor, ...]:
        return tuple(
            pages[starts[number] // kept.itemsize :].as_strided(
                (min(PAGE_RANKS, R - PAGE_RANKS * i), width), (stride, 1)
            )
            for i, number in enumerate(numbers)
        )

    def view(entry: dict[str, Any], name: str) -> Tensor | None:
        if name not in entry:
            return None
        values, number = entry[name]
        return vectors[starts[number] // 4 :][: len(values)]

    forms, slot_forms = [], {}
    for slot, (spec, entry) in enumerate(zip(specs, slots, strict=True)):
        (A, A_pages, A_stride), (B, B_pages, B_stride) = pairs[entry["group"]]
        g, h = view(entry, "g"), view(entry, "h")
        if entry.get("g") is entry.get("h"):
            h = g
        beta = view(entry, "beta")
        form = AdapterForm(
            A.to(DEVICE, torch.float64),
            B.T.to(DEVICE, torch.float64),
            None if "d" not in entry else entry["d"][0].to(DEVICE, torch.float64),
            1.0 if h is None else h.double(),
            None if g is None else g.double(),
            None if b0 is None else b0.to(DEVICE, torch.float64),
            scaling=entry["scaling"],
        )
        if beta is not None:
            form = form._replace(bias=beta.double() if form.bias is None else form.bias + beta.double())
        forms.append(form)
        if spec.method != "absent":
            slot_forms[slot] = SlotForm(
                parts(A_pages, len(A), K, A_stride),
                parts(B_pages, len(B), N, B_stride),
                entry["scaling"],
                view(entry, "d"),
                h,
                g,
                beta,
            )

    most = max((len(pair[0][1]) for pair in pairs.values()), default=0)
    count = 1 + max(pairs)

    def page_table(side: int) -> Tensor:
        table = torch.full((count, max(most, 1)), -(2**40), dtype=torch.int64)
        for group, pair in pairs.items():
            for i, number in enumerate(pair[side][1]):
                table[group, i] = starts[number] // kept.itemsize
        return table.to(DEVICE)

    def by_group(of: Callable[[Any], int]) -> Tensor:
        table = torch.zeros(count, dtype=torch.int32)
        for group, pair in pairs.items():
            table[group] = of(pair)
        return table.to(DEVICE)

    def vector_table(name: str) -> Tensor | None:
        if not any(name in entry for entry in slots):
            return None
        entries = [starts[entry[name][1]] // 4 if name in entry else -1 for entry in slots]
        return torch.tensor(entries, dtype=torch.int64, device=DEVICE)

    tables = FormTables(
        pages,
        vectors,
        by_group(lambda pair: len(pair[0][0])),
        page_table(0),
        page_table(1),
        by_group(lambda pair: pair[0][2]),
        by_group(lambda pair: pair[1][2]),
        torch.tensor([entry["scaling"] for entry in slots], dtype=torch.float32, device=DEVICE),
        *(vector_table(name) for name in ("d", "h", "g", "beta")),
    )
    layer = LayerForms(slot_forms, tables, max((len(pair[0][0]) for pair in pairs.values()), default=0))
    groups = [entry["group"] for entry in slots]
    return Resident(weight.to(DEVICE), None if b0 is None else b0.to(DEVICE), forms, layer, groups, K)


def cast_form(form: AdapterForm, dtype: torch.dtype) -> AdapterForm:
    return AdapterForm(*(value.to(dtype) if isinstance(value, Tensor) else value for value in form))


def check(
    resident: Resident, ids: Sequence[int], tokens: int, dtype: torch.dtype, backend: str, *, flat: bool = False
) -> None:
    """Every row against the reference, and base rows against F.linear bit for bit where that is promised."""
    generator = torch.Generator().manual_seed(len(ids))
    x = torch.randn(len(ids), tokens, resident.K, generator=generator).to(DEVICE, dtype)
    weight, bias = resident.weight, resident.bias
    given = x.flatten(0, 1) if flat else x
    y = functional.multi_adapter_linear(
        given, weight, bias, resident.batch(ids, tokens), resident.layer, backend=backend
    )
    assert y.shape == (*given.shape[:-1], len(weight))
    assert y.dtype == dtype
    y = y.view(len(ids), tokens, len(weight))
    base = F.linear(x.flatten(0, 1), weight, bias).view(y.shape)

    def formula(to: torch.dtype) -> dict[str, Tensor]:
        forms = [cast_form(form, to) for form in resident.forms]
        beta = None if bias is None else bias.to(to)
        rows = multi_adapter_linear_reference(x.to(to), weight.to(to), beta, forms, ids)
        return {f"row {row}": of_row for row, of_row in enumerate(rows)}

    assert_follows({f"row {row}": of_row for row, of_row in enumerate(y)}, formula, dtype)
    if backend == "eager" or bias is None or resident.layer.tables.base_scales is None:
        for row, slot in enumerate(ids):
            assert slot >= 0 or torch.equal(y[row], base[row])


def ids_of(popularity: str, slots: int, rows: int) -> list[int]:
    """The adapter of each row, -1 for the base model."""
    chosen = random.Random(rows)
    if popularity == "identical":
        return [slots - 1] * rows
    if popularity == "distinct":
        return [*chosen.sample(range(slots), slots), -1]
    if popularity == "uniform":
        return [chosen.randrange(-1, slots) for _ in range(rows)]
    if popularity == "zipf 1.5":
        weights = [(slot + 1) ** -1.5 for slot in range(slots)]
        return [*chosen.choices(range(slots), weights, k=rows - 1), -1]
    if popularity == "skewed":
        return [0] * (rows - 3) + [slots - 1, -1, 0]
    return [-1] * rows


MIXED_RANKS = (1, 4, 5, 8, 64, 256)
MIXED = [
    Spec("lora", 5),
    Spec("dora", 8),
    Spec("vera", 20, pair=0),
    Spec("absent", 0),
    Spec("vera", 20, pair=0),
    Spec("dvora", 4),
    Spec("bias", 1),
    Spec("bias", 0),
    Spec("dora", 0),
    Spec("zero", 3),
    Spec("lora", 64),
    Spec("vera", 9, pair=1),
]
SETS = {
    "mixed": MIXED,
    "lora": [Spec("lora", 8)] * 4,
    "lora of all ranks": [Spec("lora", R) for R in MIXED_RANKS],
    "dora": [Spec("dora", 5), Spec("dora", 8), Spec("dora", 5)],
    "vera": [Spec("vera", 20, pair=0)] * 5,
    "dvora": [Spec("dvora", 12, pair=0), Spec("dvora", 12, pair=0), Spec("dvora", 3)],
    "bias": [Spec("bias", 4), Spec("bias", 0), Spec("absent", 0)],
    "rank 0": [Spec("lora", 0), Spec("absent", 0)],
}


class Case(NamedTuple):
    """Adapters, who asks for them, and the shapes."""

    adapters: str
    popularity: str
    tokens: int
    rows: int
    K: int
    N: int
    bias: bool = False


# Pairs of conditions rather than all of them at once: each value of each axis is met in some case.
CASES = [
    Case("mixed", "identical", 17, 2, 20, 36, bias=True),
    Case("mixed", "distinct", 3, 13, 100, 36),
    Case("mixed", "distinct", 1, 13, 36, 100, bias=True),
    Case("mixed", "uniform", 1, 20, 100, 20),
    Case("mixed", "uniform", 3, 8, 36, 20, bias=True),
    Case("mixed", "zipf 1.5", 17, 5, 36, 100),
    Case("mixed", "skewed", 1, 9, 20, 20, bias=True),
    Case("mixed", "all base", 3, 4, 20, 36, bias=True),
    Case("mixed", "all base", 1, 4, 20, 36),
    Case("lora", "uniform", 1, 34, 20, 36),  # one token a row, but too many rows for programs of their own
    Case("lora", "zipf 1.5", 3, 9, 100, 20, bias=True),
    Case("lora of all ranks", "distinct", 3, 7, 100, 36),
    Case("lora of all ranks", "distinct", 1, 7, 36, 100, bias=True),
    Case("lora of all ranks", "identical", 1, 3, 20, 36),
    Case("dora", "uniform", 17, 4, 36, 20),
    Case("dora", "uniform", 1, 8, 36, 20, bias=True),
    Case("vera", "skewed", 17, 6, 100, 36),
    Case("vera", "uniform", 1, 10, 36, 20, bias=True),
    Case("dvora", "uniform", 3, 6, 36, 36, bias=True),
    Case("bias", "uniform", 3, 6, 20, 36, bias=True),
    Case("bias", "uniform", 1, 6, 20, 36),
    Case("rank 0", "uniform", 3, 4, 20, 20, bias=True),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("case", "dtype"),
    [(case, dtype) for case in CASES for dtype in DTYPES if case.adapters == "mixed" or dtype != torch.float16],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, Case) else str(value),
)
def test_every_row_is_its_adapters(case: Case, dtype: torch.dtype, backend: str) -> None:
    resident = make_resident(SETS[case.adapters], case.K, case.N, dtype, bias=case.bias)
    ids = ids_of(case.popularity, len(resident.forms), case.rows)
    check(resident, ids, case.tokens, dtype, backend, flat=case.tokens == 1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("pages_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_factors_in_another_dtype(pages_dtype: torch.dtype, tokens: int, backend: str) -> None:
    """fp32 adapters under a 16-bit model, and the other way round, at starts and strides that a GPU loads widely."""
    dtype = torch.bfloat16 if pages_dtype == torch.float32 else torch.float32
    resident = make_resident(SETS["mixed"], 48, 32, dtype, pages_dtype=pages_dtype, aligned=True)
    check(resident, ids_of("distinct", 12, 13), tokens, dtype, backend)


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_few_rows_in_16_bits_go_through_fp32_factors(method: str, dtype: torch.dtype) -> None:
    """Kept once a batch, and one rounding of the low-rank path where 16-bit products have two."""
    resident = make_resident([Spec(method, 16)], 64, 48, dtype)
    batch = resident.batch([0] * 8, 1)
    (step,) = plan.plan(batch, resident.layer.forms, dtype)
    assert isinstance(step, FormRun)
    assert {part.dtype for part in (*step.form.A, *step.form.B)} == {torch.float32}
    assert plan.plan(batch, resident.layer.forms, dtype)[0] is step
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    form, weight = resident.forms[0], torch.zeros_like(resident.weight)
    y = eager.multi_adapter_linear(x, weight, None, [step])
    exact = multi_adapter_linear_reference(x.double(), weight.double(), None, [cast_form(form, torch.float64)], [0] * 8)
    # y and, with a g, its product.
    assert (y - exact).abs().max() <= (2 if method == "dora" else 1) * torch.finfo(dtype).eps * exact.abs().max()
    long = resident.batch([0], 64)
    (step,) = plan.plan(long, resident.layer.forms, dtype)
    assert isinstance(step, FormRun)
    assert step.form.A[0].dtype is dtype


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rows_of_many_adapters_in_16_bits_are_sums_of_rows(dtype: torch.dtype) -> None:
    """Copies of factors in 16 bits, rounded once, and of a pair as tables that layers share."""
    own = make_resident([Spec("lora", 16), Spec("dora", 8)], 64, 48, dtype)
    (step,) = plan.plan(own.batch([0, 1], 1), own.layer.forms, dtype)
    assert isinstance(step, BagRuns)
    assert {step.A.dtype, step.B.dtype} == {dtype}
    for row, form in own.layer.forms.items():
        up = torch.cat(form.B).double() * form.scaling * (1.0 if form.out_scale is None else form.out_scale)
        copied = step.B.view(2, -1, 48)[row, : up.shape[0]]
        torch.testing.assert_close(copied.double(), up, rtol=0.51 * torch.finfo(dtype).eps, atol=1e-7)

    pair = make_resident([Spec("vera", 8, 0), Spec("vera", 8, 0)], 64, 48, dtype)
    batch = pair.batch([0, 1], 1)
    first, second = (plan.plan(batch, dict(pair.layer.forms), dtype)[0] for _ in range(2))
    assert isinstance(first, BagRuns)
    assert isinstance(second, BagRuns)
    assert first.A is second.A
    assert first.down is second.down
    (step,) = plan.plan(pair.batch([0, 1, 0, 1], 1), pair.layer.forms, dtype)
    assert isinstance(step, SharedRuns)


def pair_layer(
    seed: int, dtype: torch.dtype, K: int = 64, N: int = 48
) -> tuple[LayerForms, Callable[[Tensor], Tensor]]:
    """A layer with an adapter of a pair of its own, and what it gives for x exactly."""
    generator = torch.Generator().manual_seed(seed)
    A, B = (torch.randn(8, width, generator=generator).to(dtype) for width in (K, N))
    form = SlotForm((A,), (B,), mid_scale=torch.ones(8), out_scale=torch.ones(N))
    return LayerForms({0: form}, None, 8), lambda x: x.double() @ A.double().T @ B.double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layers_of_one_x_with_pairs_of_their_own(dtype: torch.dtype) -> None:
    """What layers know of one x is of one pair, also where what was made of others has given its memory back."""
    layers = [pair_layer(seed, torch.bfloat16) for seed in range(8)]
    x = torch.randn(1, 64, generator=torch.Generator().manual_seed(9)).to(dtype)
    ys = [x.new_zeros(1, 48) for _ in layers]
    functional.multi_adapter_update(
        ys, x, [None] * 8, AdapterBatch([0]), [layer for layer, _ in layers], backend="eager"
    )
    for y, (_, exact) in zip(ys, layers, strict=True):
        assert (y - exact(x)).abs().max() <= 4 * torch.finfo(dtype).eps * exact(x).abs().max()


@pytest.mark.parametrize("inference", [False, True])
def test_a_pair_in_the_place_of_another_is_copied_anew(inference: bool) -> None:
    """By layers that the batch has seen, and by others."""
    dtype = torch.bfloat16
    with torch.inference_mode(inference):
        layer, exact = pair_layer(0, dtype)
    other, batch = LayerForms(dict(layer.forms), None, 8), AdapterBatch([0])
    x = torch.randn(1, 64, generator=torch.Generator().manual_seed(9)).to(dtype)
    for read in ([layer], [other, layer]):
        for one in read:
            y = x.new_zeros(1, 48)
            functional.multi_adapter_update([y], x, [None], batch, [one], backend="eager")
            assert (y - exact(x)).abs().max() <= 4 * torch.finfo(dtype).eps * exact(x).abs().max()
        form = layer.forms[0]
        with torch.inference_mode(inference):
            form.A[0].mul_(-2)
        for one in (layer, other):
            one.forms[0] = form._replace()  # type: ignore[index]


def test_tables_of_a_pair_keep_to_the_limit_of_copies() -> None:
    layer, _ = pair_layer(0, torch.bfloat16)
    run, size, kept = FormRun(0, 1, layer.forms[0]), 8 * 64 * 2, {}  # type: ignore[var-annotated]
    (step,), left = plan.together([run], 1, torch.bfloat16, size - 1, kept)
    assert (type(step), left, kept) == (SharedRuns, size - 1, {})
    for expected in (1, size + 1):  # the second layer finds A's; B lies as it is read
        (step,), left = plan.together([run], 1, torch.bfloat16, size + 1, kept)
        assert (type(step), left) == (BagRuns, expected)
    batch = AdapterBatch([0])
    plan.plan(batch, layer.forms, torch.bfloat16)
    assert batch.copied == size


def test_layers_that_read_one_x_cast_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    resident = make_resident([Spec("lora", 16)], 64, 48, torch.bfloat16)
    steps = plan.plan(resident.batch([0] * 8, 1), resident.layer.forms, torch.bfloat16)
    x, memory, cast = torch.ones(8, 64, dtype=torch.bfloat16), {}, []  # type: ignore[var-annotated]
    to = torch.Tensor.to
    monkeypatch.setattr(torch.Tensor, "to", lambda own, *args: cast.append(own.shape) or to(own, *args))
    for _ in range(3):
        eager.multi_adapter_linear(x, resident.weight, None, steps, memory)
    assert cast.count(x.shape) == 1


def test_copies_of_factors_keep_to_their_limit() -> None:
    resident = make_resident([Spec("lora", 16)], 64, 48, torch.bfloat16)
    run = FormRun(0, 8, resident.layer.forms[0])
    size = 16 * (64 + 48) * 4
    for limit, left, dtype in ((size, 0, torch.float32), (size - 1, size - 1, torch.bfloat16)):
        (step,), found = plan.together([run], 1, torch.bfloat16, limit)
        assert isinstance(step, FormRun)
        assert found == left
        assert step.form.A[0].dtype is dtype


@pytest.mark.parametrize("backend", BACKENDS)
def test_nobody_is_there(backend: str) -> None:
    resident = make_resident(SETS["lora"], 20, 36, torch.float32, bias=True)
    for rows, tokens in ((0, 1), (0, 3), (2, 0)):
        check(resident, [0, -1][:rows], tokens, torch.float32, backend)


def place(guard: Callable[[Tensor], Tensor], resident: Resident) -> Resident:
    """The layer and the tables with each tensor where `guard` puts it, but the memory, whose gaps are NaN as it is."""
    own = {"pages": resident.layer.tables.pages, "vectors": resident.layer.tables.vectors}
    tables = FormTables(*(None if table is None else guard(table) for table in resident.layer.tables))
    return resident._replace(
        weight=guard(resident.weight),
        bias=None if resident.bias is None else guard(resident.bias),
        layer=resident.layer._replace(tables=tables._replace(**own)),
    )


def moved(tokens: SortedTokens, to: Callable[[Tensor], Tensor]) -> SortedTokens:
    return SortedTokens(*map(to, tokens[:-1]), tokens.block)


def run(resident: Resident, x: Tensor, tokens: SortedTokens) -> Tensor:
    """The launcher by itself, with a base product in memory of torch.empty's.

    That product sees contiguous operands: oneDNN's in bf16 reads what lies between the rows of others.
    """
    layer = resident.layer

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        product = F.linear(x.contiguous(), weight.contiguous(), bias)
        return torch.empty(product.shape, dtype=x.dtype, device=DEVICE).copy_(product)

    with mock.patch.object(multi_adapter, "F", mock.Mock(linear=linear)):
        (y,) = multi_adapter.multi_adapter_linear(
            x, [resident.weight], [resident.bias], [layer.tables], tokens, layer.max_rank
        )
    return y


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_outside_the_tensors_is_read_or_written(dtype: torch.dtype, tokens: int) -> None:
    resident = make_resident(SETS["mixed"], 100, 36, dtype, bias=True)
    batch = resident.batch([4, -1, 0, 2, 11, 10, 4, 5], tokens)
    x = torch.randn(len(batch), 100, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)
    expected = run(resident, x, batch.sorted(x.device))
    memory = resident.layer.tables.vectors.view(torch.int32)
    before = memory.clone()
    operands: list[Tensor] = []

    def guard(tensor: Tensor) -> Tensor:
        operands.append(guarded(tensor))
        return operands[-1]

    placed, placed_x, placed_tokens = (
        place(guard, resident),
        guard(x),
        moved(batch.sorted(x.device), guard),
    )
    with guarded_outputs() as written:
        actual = run(placed, placed_x, placed_tokens)
    assert len(written) == 3  # y, u and the partial sums
    # Bit for bit: a NaN that was read from a margin would show.
    assert torch.equal(actual, expected)
    for tensor in operands + written:
        assert margins_intact(tensor)
    assert torch.equal(memory, before)


@pytest.mark.parametrize("tokens", [1, 3])
def test_only_the_true_ranks_columns_of_u_are_touched(tokens: int) -> None:
    resident = make_resident(SETS["lora of all ranks"], 36, 20, torch.float32)
    batch = resident.batch([3, -1, 0, 4, 2], tokens)
    x = torch.randn(len(batch), 36, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    with guarded_outputs() as written:
        run(resident, x, batch.sorted(x.device))
    u = written[1][0]
    ranks = torch.tensor([0, 1, 5, 8, 64], device=DEVICE).repeat_interleave(tokens)  # sorted by slot
    inside = torch.arange(256, device=DEVICE) < ranks[:, None]
    assert torch.equal(u.isfinite(), inside)
    assert margins_intact(u)


@pytest.mark.parametrize("tokens", [1, 3])
def test_the_order_of_programs_does_not_matter(tokens: int, request: pytest.FixtureRequest) -> None:
    resident = make_resident(SETS["mixed"], 100, 36, torch.float32, bias=True)
    batch = resident.batch([4, -1, 0, 2, 11, 10, 4, 5], tokens)
    x = torch.randn(len(batch), 100, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    expected = run(resident, x, batch.sorted(x.device))
    request.getfixturevalue("shuffled_programs")
    assert torch.equal(run(resident, x, batch.sorted(x.device)), expected)


def shown(arguments: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value.shape if isinstance(value, Tensor) else value for name, value in arguments.items()}


@pytest.mark.parametrize(("rows", "tokens"), [(8, 1), (64, 1), (6, 17), (4, 512)])
def test_launches_do_not_depend_on_who_is_in_the_batch(rows: int, tokens: int) -> None:
    """So a captured CUDA graph serves every batch of its size: grids, buffers, tiles and every number are the same."""
    resident = make_resident(SETS["mixed"], 100, 36, torch.float32)
    meta = place(lambda tensor: tensor.to("meta"), resident)
    tables = FormTables(*(None if table is None else table.to("meta") for table in resident.layer.tables))
    meta = meta._replace(layer=meta.layer._replace(tables=tables))
    x = torch.empty(rows * tokens, 100, device="meta")
    found = set()
    for popularity in ("identical", "uniform", "zipf 1.5", "skewed", "all base"):
        batch = resident.batch(ids_of(popularity, 12, rows), tokens)
        on_meta = moved(batch.sorted(torch.device("cpu")), lambda tensor: tensor.to("meta"))
        with configs.recorded_launches(LARGE) as launches:
            multi_adapter.multi_adapter_linear(
                x, [meta.weight], [None], [meta.layer.tables], on_meta, meta.layer.max_rank
            )
        assert len(launches) == 2
        found.add(str([(launch.grid, launch.config, shown(launch.arguments)) for launch in launches]))
    assert len(found) == 1


def test_a_layer_without_adapters_launches_nothing() -> None:
    resident = make_resident(SETS["rank 0"], 20, 36, torch.float32)
    batch = resident.batch([0, 1, -1], 3)
    with configs.recorded_launches(LARGE) as launches:
        run(resident, torch.zeros(9, 20, device=DEVICE), batch.sorted(torch.device(DEVICE)))
    assert launches == []


def test_buffers_of_a_batch_serve_the_next() -> None:
    """What a captured CUDA graph reads."""
    resident = make_resident(SETS["mixed"], 36, 20, torch.float32)
    device = torch.device(DEVICE)
    first, second = resident.batch([0, 2, -1, 4], 3), resident.batch([5, 5, 1, 10], 3)
    buffers = first.sorted(device)
    expected = [tensor.clone() for tensor in second.sorted(device)[:-1]]
    second.write(buffers)
    assert second.sorted(device) is buffers
    for buffer, value in zip(buffers, expected, strict=False):
        assert torch.equal(buffer, value)
    x = torch.randn(12, 36, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    y = run(resident, x, buffers)
    torch.testing.assert_close(
        y, functional.multi_adapter_linear(x, resident.weight, None, second, resident.layer, backend="eager")
    )


def test_a_batch_in_runs_and_sorted() -> None:
    batch = AdapterBatch([3, 3, -1, 0, 3], tokens=2, groups=[1, 1, -1, 4, 1])
    assert len(batch) == 10
    assert batch.runs == [Run(0, 4, 3), Run(6, 8, 0), Run(8, 10, 3)]
    tokens = batch.sorted(torch.device("cpu"))
    assert tokens is batch.sorted(torch.device("cpu"))
    assert all(tensor.dtype == torch.int32 for tensor in tokens[:-1])
    assert tokens.order.tolist() == [4, 5, 0, 1, 2, 3, 8, 9, 6, 7]
    assert tokens.adapters.tolist() == [-1] * 2 + [3] * 6 + [0] * 2
    assert tokens.groups.tolist() == [-1] * 2 + [1] * 6 + [4] * 2
    assert tokens.block == 16
    assert tokens.tiles.tolist() == [[0, 2, -1], [2, 8, 1], [8, 10, 4], *[[10, 10, -1]] * 3]


@pytest.mark.parametrize(
    ("A_pages", "B_pages", "ranks"),
    [
        ([0, 24, 48], [400, 440, 480], [20]),
        ([0, 24, 100], [400, 440, 480], [16, 4]),
        ([0, 24, 48], [400, 480, 520], [8, 12]),
        ([0, 24, 100], [400, 480, 520], [8, 8, 4]),
        ([48, 24, 0], [400, 440, 480], [8, 8, 4]),
        ([], [], []),
    ],
)
def test_factors_are_cut_where_either_has_a_gap(A_pages: list[int], B_pages: list[int], ranks: list[int]) -> None:
    pages = torch.arange(600.0)
    form = slot_form(pages, pages, (5, 3), FormEntry(sum(ranks), A_pages, B_pages, 3, 5))
    for parts, starts, width in ((form.A, A_pages, 3), (form.B, B_pages, 5)):
        assert [part.shape for part in parts] == [(rank, width) for rank in ranks]
        rows = [pages[start : start + PAGE_RANKS * width].view(-1, width) for start in starts]
        assert not ranks or torch.equal(torch.cat(parts), torch.cat(rows)[: sum(ranks)])


def tiles_by_hand(groups: Sequence[int], tokens: int, block: int) -> list[list[int]]:
    """The tiles of rows of these groups, one run after another."""
    found, start = [], 0
    for group, members in groupby(sorted(groups)):
        end = start + tokens * len(list(members))
        found += [[first, end, group] for first in range(start, end, block)]
        start = end
    return found


@pytest.mark.parametrize(
    ("rows", "tokens"), [(1, 1), (5, 1), (33, 1), (40, 3), (9, 17), (6, 33), (3, 200), (2, 0), (0, 3)]
)
def test_tiles_are_of_one_group_each(rows: int, tokens: int) -> None:
    chosen = random.Random(rows)
    for most in (-1, 0, 3, 40):
        groups = [chosen.randrange(-1, most + 1) for _ in range(rows)]
        slots = [group if group < 0 else group * 2 + chosen.randrange(2) for group in groups]
        sorted_tokens = AdapterBatch(slots, tokens, groups).sorted(torch.device("cpu"))
        tiles, block, M = sorted_tokens.tiles.tolist(), sorted_tokens.block, rows * tokens
        assert len(tiles) == (M if block == 1 else -(-M // block) + rows)
        expected = tiles_by_hand(groups, tokens, block)
        if block == 1:  # tiles of one token know no run
            expected = [[place, place + 1, group] for place, _, group in expected]
        assert tiles[: len(expected)] == expected
        assert tiles[len(expected) :] == [[M, M, -1]] * (len(tiles) - len(expected))
        order = sorted_tokens.order.tolist()
        assert sorted(order) == list(range(M))
        assert sorted_tokens.adapters.tolist() == [slots[token // tokens] for token in order]
        assert sorted_tokens.groups.tolist() == [groups[token // tokens] for token in order]


@pytest.mark.parametrize(("rows", "tokens"), [(8, 1), (64, 1), (6, 17), (8, 2048)])
def test_the_sort_asks_for_no_value(rows: int, tokens: int) -> None:
    """So a CUDA graph can capture it: tensors without data go through it, and their sizes are those of the batch's."""
    batch = AdapterBatch([row % 3 - 1 for row in range(rows)], tokens)
    found = sort_tokens(batch.rows(torch.device("meta")), tokens)
    for tensor, value in zip(found[:-1], batch.sorted(torch.device("cpu"))[:-1], strict=True):
        assert tensor.is_meta
        assert (tensor.shape, tensor.dtype) == (value.shape, value.dtype)


def test_the_sort_makes_nothing_of_each_token_by_itself() -> None:
    """Its calls are as many for 8 rows of 2048 tokens as for 8 of 64."""

    def calls(tokens: int) -> int:
        batch = AdapterBatch(list(range(8)), tokens)
        with Profile() as profile:
            batch.sorted(torch.device("cpu"))
        return sum(entry.callcount for entry in profile.getstats())

    calls(64)
    assert calls(64) == calls(2048)


def test_the_tiles_are_those_of_the_kernels_configs() -> None:
    for rows, tokens in ((1, 1), (32, 1), (33, 1), (2, 32), (2, 33), (8, 2048)):
        x = torch.empty(rows * tokens, 64, dtype=torch.bfloat16, device="meta")
        with configs.recorded_launches(LARGE):
            block = AdapterBatch([0] * rows, tokens).sorted(torch.device("cpu")).block
            found = {configs.multi_shrink(x, block, 8)[0]["BLOCK_M"], configs.multi_expand(x, block)["BLOCK_M"]}
        assert found == {places_of_a_tile(rows, tokens)}


def test_a_group_is_sorted_by_adapter() -> None:
    tokens = AdapterBatch([2, 0, 2, 1], groups=[7, 7, 7, 3]).sorted(torch.device("cpu"))
    assert tokens.order.tolist() == [3, 1, 0, 2]
    assert tokens.adapters.tolist() == [1, 0, 2, 2]
    assert tokens.block == 1
    assert tokens.tiles.tolist() == [[0, 1, 3], [1, 2, 7], [2, 3, 7], [3, 4, 7]]


# Layers that read one x: alike, as in a pool; and as different as they can be.
GROUPS = {
    "alike": [("mixed", 36, True), ("mixed", 100, True), ("mixed", 20, True)],
    "different": [("lora", 20, True), ("dora", 36, False), ("bias", 36, True), ("rank 0", 20, True)],
    "without a rank": [("rank 0", 36, False), ("bias", 20, False)],
    "two of which one has no bias": [("dora", 36, False), ("dora", 36, True)],
}


def make_group(name: str, dtype: torch.dtype) -> list[Resident]:
    """The layers of a group, which hold the adapters of one batch in slots of the same numbers."""
    return [make_resident(SETS[kind][:3], 36, N, dtype, bias=bias) for kind, N, bias in GROUPS[name]]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", GROUPS)
def test_a_group_gives_what_its_layers_give(
    name: str, dtype: torch.dtype, tokens: int, backend: str, shuffled_programs: None
) -> None:
    residents = make_group(name, dtype)
    # Each has groups of its own in truth: here they are the slots, of which all layers know as many.
    ids = [1, -1, 0, 0, 1] if name == "different" else [1, -1, 0, 2 if name == "alike" else 1, 1]
    residents = [resident._replace(groups=residents[0].groups) for resident in residents]
    batch = residents[0].batch(ids, tokens)
    x = torch.randn(len(ids), tokens, 36, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)
    ys = functional.multi_adapter_linear_group(
        x,
        [resident.weight for resident in residents],
        [resident.bias for resident in residents],
        batch,
        [resident.layer for resident in residents],
        backend=backend,
    )
    for resident, y in zip(residents, ys, strict=True):
        alone = functional.multi_adapter_linear(
            x, resident.weight, resident.bias, batch, resident.layer, backend=backend
        )
        assert torch.equal(y, alone)


def test_a_group_is_two_launches() -> None:
    residents = make_group("alike", torch.float32)
    tokens = residents[0].batch([1, -1, 0], 3).sorted(torch.device(DEVICE))
    x = torch.zeros(9, 36, device=DEVICE)
    with configs.recorded_launches(LARGE) as launches:
        multi_adapter.multi_adapter_linear(
            x,
            [resident.weight for resident in residents],
            [resident.bias for resident in residents],
            [resident.layer.tables for resident in residents],
            tokens,
            residents[0].layer.max_rank,
        )
    assert [launch.kernel.__name__ for launch in launches] == ["_multi_shrink_kernel", "_multi_expand_kernel"]


def test_what_a_group_refuses() -> None:
    one = make_resident(SETS["lora"], 20, 36, torch.float32)
    other = make_resident(SETS["lora"], 20, 36, torch.float32, pages_dtype=torch.bfloat16)
    batch, x = one.batch([0, -1], 1), torch.zeros(2, 20, device=DEVICE)
    call = functional.multi_adapter_linear_group
    with pytest.raises(ValueError, match="one entry a layer, one at least, got 0, 0 and 0"):
        call(x, [], [], batch, [])
    with pytest.raises(ValueError, match="one entry a layer, one at least, got 1, 2 and 1"):
        call(x, [one.weight], [None, None], batch, [one.layer])
    with pytest.raises(ValueError, match=r"in one dtype, got torch\.bfloat16 and torch\.float32"):
        call(x, [one.weight, other.weight], [None, None], batch, [one.layer, other.layer])


def test_what_a_batch_refuses() -> None:
    with pytest.raises(ValueError, match="or -1 for the base model, got -2"):
        AdapterBatch([0, -2])
    with pytest.raises(ValueError, match="one entry a row, got 1 for 2"):
        AdapterBatch([0, 1], groups=[0])


def test_what_the_function_refuses() -> None:
    resident = make_resident(SETS["lora"], 20, 36, torch.float32)
    batch, layer, weight = resident.batch([0, -1], 3), resident.layer, resident.weight
    x = torch.zeros(2, 3, 20, device=DEVICE)
    call = functional.multi_adapter_linear
    refused: list[tuple[type[Exception], str, tuple[Any, ...]]] = [
        (ValueError, r"weight must have shape \[out, in\]", (x, weight[0], None)),
        (ValueError, r"x must have shape \[..., 20\]", (x[..., 1:], weight, None)),
        (ValueError, r"x has 3 tokens \(1, 3, 20\) but the batch has 6", (x[:1], weight, None)),
        (ValueError, r"bias must have shape \[36\]", (x, weight, weight[0])),
        (ValueError, "x requires grad", (x.clone().requires_grad_(), weight, None)),
        (ValueError, "weight is on meta but x is on", (x, weight.to("meta"), None)),
        (TypeError, "x must be float16", (x.int(), weight, None)),
    ]
    for error, words, operands in refused:
        with pytest.raises(error, match=words):
            call(*operands, batch, layer)
    with pytest.raises(ValueError, match="has no pages"):
        call(x, weight, None, batch, layer, backend="reference")
    with pytest.raises(ValueError, match="backend must be one of"):
        call(x, weight, None, batch, layer, backend="fast")
    with pytest.raises(TypeError, match="no float64 kernels"):
        call(x.double(), weight.double(), None, batch, layer, backend="triton")
    with torch.no_grad():
        call(x.clone().requires_grad_(), weight, None, batch, layer, backend="eager")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["mixed", "lora"])
def test_opcheck_and_the_fakes_layout(name: str, backend: str) -> None:
    resident = make_resident(SETS[name], 20, 36, torch.float32, bias=name == "mixed")
    ids = ids_of("uniform", len(resident.forms), 4)
    x = torch.randn(12, 20, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    operator = op.multi_adapter_linear
    layer, tokens = resident.layer, resident.batch(ids, 3).sorted(x.device)
    args = operator.flat(x, [resident.weight], [resident.bias], [layer.tables], tokens, layer.max_rank, backend)
    torch.library.opcheck(operator.registered, args)
    layout_is_told(operator.registered, args)


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_in_one_graph(backend: str) -> None:
    resident = make_resident(SETS["mixed"], 20, 36, torch.float32, bias=True)
    batch = resident.batch(ids_of("uniform", 12, 6), 3)
    x = torch.randn(6, 3, 20, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    batch.sorted(x.device)

    def call(x: Tensor) -> Tensor:
        return functional.multi_adapter_linear(
            2 * x, resident.weight, resident.bias, batch, resident.layer, backend=backend
        ).relu()

    torch.testing.assert_close(torch.compile(call, fullgraph=True, backend="aot_eager")(x), call(x))
