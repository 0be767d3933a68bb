"""Experts in a batch of many adapters: the operator against its formula, served models against each adapter alone."""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from test_experts import BOTH, deepseek, gpt_oss, old_file, qwen3_moe, theirs
from test_serving import alone, close, save_all
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastadapt import DoRAConfig, LoRAConfig, VeRAConfig, inject, load_adapter, merge
from fastadapt.functional import multi_adapter_expert_block
from fastadapt.layers.experts import stacked_bias, stacked_weight
from fastadapt.operators.expert_linear.segments import Segments
from fastadapt.operators.multi_adapter_linear.experts import ExpertForms, ExpertPart
from fastadapt.reference import (
    ExpertForm,
    adapter_linear_reference,
    expert_block_reference,
    merged_weight_reference,
)
from fastadapt.serving import (
    AdapterBatch,
    AdapterError,
    Limits,
    LoadedAdapter,
    MultiAdapterModel,
    PoolFullError,
    read_adapter,
)

E, K, N, INNER, TOP = 5, 16, 24, 12, 3

MODELS: dict[str, Callable[[], Any]] = {"qwen3_moe": qwen3_moe, "gpt_oss": gpt_oss, "deepseek": deepseek}


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", message=r"The following \w+ keys did not match any targeted module")
        warnings.filterwarnings("ignore", message="target_modules=.all-linear. adapts no")
        yield


# The operator


def gate(rows: Tensor) -> Tensor:
    return rows[:, :INNER] * torch.sigmoid(rows[:, INNER:])


class Side:
    """One product of experts with forms on it: as parts in slots, and whole as the reference takes them."""

    def __init__(self, k: int, n: int, seed: int, biased: bool, dtype: torch.dtype = torch.float32) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.k, self.n = k, n
        self.weight = self.normal(E, n, k, scale=k**-0.5).to(dtype)
        self.bias = self.normal(E, n, scale=3.0).to(dtype) if biased else None
        self.whole: dict[int, ExpertForm] = {}
        self.parts: dict[int, list[ExpertPart]] = {}

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=self.generator) * scale

    def enter(self, slot: int, form: ExpertForm, cuts: Sequence[int] = ()) -> None:
        """cuts: the experts before which the form is cut in parts."""
        added, whole = form.bias, form
        if self.bias is not None:
            whole = form._replace(bias=self.bias if added is None else self.bias + added)
        self.whole[slot] = whole
        ends = [*cuts, E]
        self.parts[slot] = [
            ExpertPart(first, last, cut(form, first, last)) for first, last in zip([0, *cuts], ends, strict=True)
        ]

    def lora(self, r: int, **changes: Any) -> ExpertForm:
        A, B = self.normal(E, r, self.k, scale=self.k**-0.5), self.normal(E, r, self.n)
        return ExpertForm(A, B, scaling=0.7)._replace(**changes)

    def dora(self, r: int) -> ExpertForm:
        g = self.normal(E, self.n)
        g[0, :2] = torch.tensor([0.0, 1e-3])
        return self.lora(r, base_scale=g, out_scale=g)

    def vera(self, r: int) -> ExpertForm:
        A, B = self.normal(1, r, self.k, scale=self.k**-0.5), self.normal(1, r, self.n)
        return ExpertForm(A, B, self.normal(E, r), self.normal(E, self.n))

    @property
    def served(self) -> ExpertForms:
        return ExpertForms(self.weight, self.bias, self.parts)

    def linear(self, slot: int) -> Callable[[Tensor, int], Tensor]:
        weight, bias, whole = self.weight.double(), self.bias, self.whole.get(slot)

        def run(row: Tensor, e: int) -> Tensor:
            if whole is None:
                return row @ weight[e].T if bias is None else row @ weight[e].T + bias[e].double()
            form = whole.of(e, weight[e])
            tied = form.out_scale is form.base_scale
            wide: dict[str, Any] = {n: v.double() for n, v in form._asdict().items() if isinstance(v, Tensor)}
            if tied and form.base_scale is not None:
                wide["out_scale"] = wide["base_scale"]
            return adapter_linear_reference(row, weight[e], form._replace(**wide))

        return run


def cut(form: ExpertForm, first: int, last: int) -> ExpertForm:
    """The form of some of the experts."""

    def own(value: Any) -> Any:
        return value[first:last] if isinstance(value, Tensor) and len(value) > 1 else value

    found = form._replace(**{name: own(value) for name, value in form._asdict().items()})
    return found._replace(out_scale=found.base_scale) if form.out_scale is form.base_scale is not None else found


def crowd(biased: bool, dtype: torch.dtype = torch.float32) -> tuple[Side, Side]:
    """Slots of every method and several ranks: 3 is on one of both products alone, 4 in parts, 7 has a β of its own."""
    up, down = Side(K, N, 0, biased, dtype), Side(INNER, K, 1, biased, dtype)
    for side in (up, down):
        side.enter(0, side.lora(4))
        side.enter(1, side.dora(5))
        side.enter(2, side.vera(9))
        side.enter(4, side.dora(3), cuts=(1, 4))
        side.enter(5, side.lora(1, out_scale=side.normal(E, side.n), base_scale=side.normal(E, side.n)))
        side.enter(7, side.lora(6, bias=side.normal(E, side.n)))
    down.enter(3, down.lora(2))
    return up, down


def expected(x: Tensor, experts: Tensor, routing: Tensor, sides: tuple[Side, Side], ids: Sequence[int]) -> Tensor:
    """Each token by itself, in fp64."""
    rows = []
    for token, slot in enumerate(ids):
        up, down = (side.linear(slot) for side in sides)
        own = slice(token, token + 1)
        rows.append(expert_block_reference(x[own].double(), experts[own], routing[own].double(), up, gate, down))
    return torch.cat(rows) if rows else x.double()


def asked(tokens: int, seed: int = 0, experts: int = E) -> tuple[Tensor, Tensor, Tensor]:
    """x, experts and routing of random tokens; the last expert is nobody's."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.rand(tokens, experts - 1, generator=generator).argsort(1)[:, :TOP]
    return torch.randn(tokens, K, generator=generator), chosen, torch.rand(tokens, TOP, generator=generator)


BATCHES: dict[str, tuple[list[int], int]] = {
    "everybody, shuffled": ([3, 0, -1, 7, 1, 4, 2, 0, 5, -1, 1], 3),
    "one token each": ([7, 2, -1, 0, 1, 4], 1),
    "one adapter": ([1, 1], 4),
    "base rows": ([-1, -1, -1], 2),
    "slots that nobody knows": ([9, 0, 9], 2),
    "no row": ([], 1),
}


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("name", BATCHES)
def test_every_token_goes_through_its_own_adapter(name: str, biased: bool) -> None:
    rows, tokens = BATCHES[name]
    sides = crowd(biased)
    values = asked(len(rows) * tokens)
    batch = AdapterBatch(rows, tokens)
    y = multi_adapter_expert_block(*values, sides[0].served, gate, sides[1].served, batch)
    ids = [slot for slot in rows for _ in range(tokens)]
    torch.testing.assert_close(y.double(), expected(*values, sides, ids), rtol=1e-5, atol=1e-5)
    again = multi_adapter_expert_block(*values, sides[0].served, gate, sides[1].served, batch)
    assert torch.equal(again, y)


def test_parts_of_ranks_of_a_shared_pair_add_up() -> None:
    up, down = crowd(True)
    form = up.vera(12)._replace(base_scale=up.normal(E, N))
    up.enter(0, form)
    first, last = (
        form._replace(A=form.A[:, ranks], B=form.B[:, ranks], mid_scale=form.mid_scale[:, ranks])  # type: ignore[index]
        for ranks in (slice(0, 5), slice(5, 12))
    )
    up.parts[0] = [ExpertPart(0, E, first), ExpertPart(0, E, last._replace(base_scale=None))]
    values = asked(6)
    ids = [0, -1, 0, 1, 0, 2]
    y = multi_adapter_expert_block(*values, up.served, gate, down.served, AdapterBatch(ids))
    torch.testing.assert_close(y.double(), expected(*values, (up, down), ids), rtol=1e-5, atol=1e-5)


def test_16_bits_and_transposed_weights() -> None:
    up, down = crowd(True, torch.bfloat16)
    for side in (up, down):
        side.weight = side.weight.mT.contiguous().mT
    x, experts, routing = asked(8)
    ids = [0, 1, 2, 3, 4, 5, 7, -1]
    y = multi_adapter_expert_block(
        x.bfloat16(), experts, routing, up.served, gate, down.served, AdapterBatch(ids)
    ).double()
    exact = expected(x.bfloat16(), experts, routing, (up, down), ids)
    assert ((y - exact).norm() / exact.norm()) < 0.02


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that is made."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        known = {a.untyped_storage().data_ptr() for a in args if isinstance(a, Tensor)}
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in known:
                self.elements = max(self.elements, tensor.numel())
        return out


def test_the_base_product_runs_once_and_nothing_is_as_large_as_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    sides = crowd(True)
    calls: list[int] = []
    product = Segments.product

    def counted(self: Segments, x: Tensor, matrices: Tensor, *, low_rank: bool = False) -> Tensor:
        calls.append(0 if low_rank else len(x))
        return product(self, x, matrices, low_rank=low_rank)

    monkeypatch.setattr(Segments, "product", counted)
    ids = [0, 1, 2, 3, 4, 5, 7, -1]
    with Largest() as largest:
        multi_adapter_expert_block(*asked(8), sides[0].served, gate, sides[1].served, AdapterBatch(ids))
    assert [rows for rows in calls if rows] == [8 * TOP] * 2
    assert largest.elements < E * K * INNER


def test_what_does_not_fit_is_refused() -> None:
    up, down = (side.served for side in crowd(False))
    x, experts, routing = asked(4)
    batch = AdapterBatch([0, 1, 2, -1])

    def run(**changes: Any) -> None:
        values: dict[str, Any] = {"x": x, "experts": experts, "routing": routing, "up": up, "down": down}
        values |= {"gate": gate, "batch": batch, **changes}
        multi_adapter_expert_block(**values)

    run()
    with pytest.raises(ValueError, match=r"x has 4 tokens \(4, 16\) but the batch has 2"):
        run(batch=AdapterBatch([0, 1]))
    with pytest.raises(ValueError, match="x or routing requires grad, but many adapters in one batch"):
        run(x=x.clone().requires_grad_())
    with pytest.raises(ValueError, match='backend "triton" has no kernel of multi_adapter_expert_block'):
        run(backend="triton")
    with pytest.raises(ValueError, match='backend "reference" has no slots'):
        run(backend="reference")
    with pytest.raises(ValueError, match=r"routing must have shape \[4, 3\]"):
        run(routing=routing[:, :2])
    with pytest.raises(TypeError, match=r"down\.weight must have up.weight's dtype"):
        run(down=down._replace(weight=down.weight.bfloat16()))


# Served models


def configs() -> dict[str, Any]:
    both: dict[str, Any] = {"target_parameters": BOTH}
    return {
        "lora": LoRAConfig(r=4, lora_alpha=7, target_modules=r".*\.(q_proj|q_a_proj)", **both),
        "rslora": LoRAConfig(
            r=9, use_rslora=True, target_modules=[], rank_pattern={r".*\.gate_up_proj": 3}, lora_dropout=0.1, **both
        ),
        "half": LoRAConfig(r=16, target_modules=["o_proj"], target_parameters=["experts.down_proj"]),
        "other half": LoRAConfig(r=1, target_modules=[], target_parameters=["gate_up_proj"]),
        "dora": DoRAConfig(r=5, lora_alpha=3, target_modules=["o_proj"], **both),
        "vera": VeRAConfig(r=12, target_modules=["o_proj"], **both),
        "vera2": VeRAConfig(r=12, target_modules=["o_proj"], **both),
        "linear": LoRAConfig(r=3, target_modules=["o_proj"]),
        "all": LoRAConfig(r=4, target_modules="all-linear"),
    }


PEFTS = ["lora", "half", "other half", "linear"]


def inputs(rows: int, tokens: int = 6) -> dict[str, Tensor]:
    """Left-padded rows of random tokens."""
    ids = torch.randint(3, 64, (rows, tokens), generator=torch.Generator().manual_seed(rows))
    mask = torch.ones_like(ids)
    for row in range(0, rows, 3):
        mask[row, : row % tokens] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.fixture(scope="module", params=MODELS)
def base(request: pytest.FixtureRequest) -> Any:
    return MODELS[request.param]()


@pytest.fixture(scope="module")
def directories(base: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return save_all(base, tmp_path_factory.mktemp("adapters"), configs=configs)


def serve(base: Any, directories: dict[str, Path], budget: int = 8 << 20, **options: Any) -> MultiAdapterModel:
    served = MultiAdapterModel(copy.deepcopy(base), budget=budget, **options)
    for name, directory in directories.items():
        assert served.load(directory, name) == served.pool.info(name).identity
    return served


@pytest.fixture
def served(base: Any, directories: dict[str, Path]) -> MultiAdapterModel:
    return serve(base, directories)


def check_rows(served: MultiAdapterModel, base: Any, directories: dict[str, Path], names: Sequence[str | None]) -> None:
    """A batch of these names, each row against its adapter alone."""
    batch = inputs(len(names))
    logits = served(**batch, adapter_ids=list(names)).logits
    for row, name in enumerate(names):
        wanted = alone(base, None if name is None else directories[name], batch)
        used = batch["attention_mask"][row].bool()
        assert close(logits[row][used], wanted[row][used]), name


def test_every_row_equals_its_adapter_alone(served: MultiAdapterModel, base: Any, directories: dict[str, Path]) -> None:
    check_rows(served, base, directories, ["vera", None, "dora", *directories, None, "lora"])


@pytest.mark.parametrize("name", configs())
def test_a_batch_of_one_adapter_equals_it_merged(
    served: MultiAdapterModel, base: Any, directories: dict[str, Path], name: str
) -> None:
    batch = inputs(2)
    model = load_adapter(copy.deepcopy(base), directories[name])
    merge(model)
    with torch.no_grad():
        wanted = model(**batch).logits
    assert close(served(**batch, adapter_ids=name).logits, wanted)


def test_rows_of_the_types_that_peft_has_equal_peft_alone(
    served: MultiAdapterModel, base: Any, directories: dict[str, Path]
) -> None:
    batch = inputs(len(PEFTS))
    logits = served(**batch, adapter_ids=PEFTS).logits
    for row, name in enumerate(PEFTS):
        peft = PeftModel.from_pretrained(copy.deepcopy(base), directories[name]).eval()
        with torch.no_grad():
            wanted = peft(**batch).logits
        used = batch["attention_mask"][row].bool()
        assert close(logits[row][used], wanted[row][used]), name


@pytest.mark.parametrize("model", MODELS)
def test_files_that_peft_writes_are_served(model: str, tmp_path: Path) -> None:
    fields: list[dict[str, Any]] = [
        {"target_parameters": BOTH, "target_modules": ["o_proj"]},
        {"target_parameters": ["gate_up_proj"], "target_modules": [], "r": 3},
        {"target_modules": "all-linear"},
    ]
    batch, wanted = inputs(4), []
    served = MultiAdapterModel(MODELS[model]())
    for number, own in enumerate(fields):
        peft = theirs(MODELS[model], **own)
        peft.save_pretrained(tmp_path / f"{number}")
        served.load(tmp_path / f"{number}")
        with torch.no_grad():
            wanted.append(peft(**batch).logits)
    logits = served(**batch, adapter_ids=["1", "0", None, "2"]).logits
    for row, number in ((0, 1), (1, 0), (3, 2)):
        used = batch["attention_mask"][row].bool()
        assert close(logits[row][used], wanted[number][row][used]), number


def test_files_with_a_lora_for_every_expert_are_served(tmp_path: Path) -> None:
    """The layers of single experts, and the router, as transformers 4 had them."""
    old_file(tmp_path, ("gate_proj", "up_proj", "down_proj"), "mlp", (32, 20))
    base, batch = qwen3_moe(), inputs(2)
    served = serve(base, {"old": tmp_path})
    logits = served(**batch, adapter_ids=[None, "old"]).logits
    assert close(logits[1], alone(base, tmp_path, batch)[1])
    assert close(logits[1], PeftModel.from_pretrained(qwen3_moe(), tmp_path).eval()(**batch).logits[1])


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}])
def test_generate_answers_as_each_adapter_alone(
    served: MultiAdapterModel, base: Any, directories: dict[str, Path], options: dict[str, int]
) -> None:
    names: list[str | None] = ["lora", None, "dora", "vera", "all", "dora", "half"]
    batch = inputs(len(names))
    settings: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    output = served.generate(**batch, adapter_ids=names, **settings, **options)
    for row, name in enumerate(names):
        model = copy.deepcopy(base)
        if name is not None:
            load_adapter(model, directories[name])
        own = {key: value[row : row + 1] for key, value in batch.items()}
        assert torch.equal(output[row : row + 1], model.generate(**own, **settings, **options)), name


def test_the_base_is_as_it_was(served: MultiAdapterModel, base: Any) -> None:
    batch = inputs(3)
    with torch.no_grad():
        wanted = base(**batch).logits
    assert torch.equal(served(**batch).logits, wanted)
    assert torch.equal(served(**batch, adapter_ids=[None] * 3).logits, wanted)
    model = served.unwrap()
    assert [name for name, _ in model.named_modules()] == [name for name, _ in base.named_modules()]
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, wanted)


def test_bytes_are_exact_and_come_back(base: Any, directories: dict[str, Path]) -> None:
    served = MultiAdapterModel(copy.deepcopy(base), budget=8 << 20)
    for name, directory in directories.items():
        before = served.pool.used_bytes
        served.load(directory, name)
        loaded = read_adapter(base, directory)
        count = 0
        for form in (*loaded.forms.values(), *loaded.experts.values()):
            factors = () if loaded.shared is not None else (form.A, form.B)
            vectors = {id(v): v for v in (form.mid_scale, form.out_scale, form.base_scale) if isinstance(v, Tensor)}
            count += sum(4 * tensor.numel() for tensor in (*factors, *vectors.values()))
        assert served.pool.info(name).bytes == count, name
        assert served.pool.used_bytes - before >= count
    for name in directories:
        served.pool.remove(name)
    assert served.pool.used_bytes == 0
    assert not any(served.pool.parts(f"{path}.{weight}") for path in served.pool.experts for weight in ("down_proj",))


def test_an_adapter_that_leaves_room_comes_back(base: Any, directories: dict[str, Path]) -> None:
    roomy = serve(base, directories)
    names = list(directories)
    served = serve(base, directories, budget=int(0.6 * roomy.pool.used_bytes))
    for _ in range(3):
        for first, second in itertools.pairwise(names):
            check_rows(served, base, directories, [first, None, second])
    resident = [served.pool.info(name).resident for name in names]
    assert any(resident)
    assert not all(resident)


def scatter(served: MultiAdapterModel) -> None:
    """Has the pool take pages with gaps between them."""
    take = served.pool.arena.take

    def scattered(size: int, count: int) -> list[int]:
        found = []
        for _ in range(count):
            found += take(size, 1)
            if len(found) % 2 and count > 1:
                take(size, 1)
        return found

    served.pool.arena.take = scattered  # type: ignore[method-assign]


def merged_parts(parts: Sequence[ExpertPart], weight: Tensor) -> tuple[Tensor, Tensor]:
    """W' of every expert and what is added to its bias."""
    whole, added = torch.zeros_like(weight), torch.zeros(weight.shape[:2])
    seen: set[int] = set()
    for start, stop, form in parts:
        for e in range(start, stop):
            before = weight[e] if e in seen else 0.0  # further parts add to what the first makes of the base
            whole[e] += merged_weight_reference(weight[e], form.of(e - start, weight[e])) - before
            added[e] += 0 if form.bias is None else form.bias[e - start]
            seen.add(e)
    return whole, added


@pytest.mark.parametrize("gaps", [False, True])
@pytest.mark.parametrize("kind", ["own", "tied", "shared"])
def test_every_part_of_a_form_comes_back_from_the_pool(kind: str, gaps: bool) -> None:
    served = MultiAdapterModel(gpt_oss(), budget=8 << 20)
    if gaps:
        scatter(served)
    (path, experts), *_ = served.pool.experts.items()
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    forms, pair = {}, (normal(20, 40), normal(60, 20)) if kind == "shared" else None
    for name in ("gate_up_proj", "down_proj"):
        weight, bias = stacked_weight(experts, name), stacked_bias(experts, name)
        count, n, k = weight.shape
        assert bias is not None
        A, B = (
            (normal(count, 11, k), normal(count, 11, n))
            if pair is None
            else (pair[0][None, :, :k], pair[1][:n].T[None])
        )
        form = ExpertForm(A, B, None, 1.0, normal(count, n), bias + normal(count, n), scaling=0.7)
        if kind == "tied":
            forms[f"{path}.{name}"] = form._replace(out_scale=form.base_scale)
        else:
            forms[f"{path}.{name}"] = form._replace(mid_scale=normal(count, A.shape[1]), out_scale=normal(count, n))
    served.pool.add("one", LoadedAdapter(LoRAConfig(), {}, pair, "identity", 0, forms))
    for key, form in forms.items():
        weight, bias = (of(experts, key.rpartition(".")[2]) for of in (stacked_weight, stacked_bias))
        (parts,) = served.pool.parts(key).values()
        assert (len(parts) > 1) == gaps
        whole, added = merged_parts(parts, weight)
        for e in range(len(weight)):
            torch.testing.assert_close(whole[e], merged_weight_reference(weight[e], form.of(e, weight[e])))
        torch.testing.assert_close(added, form.bias - bias, rtol=1e-5, atol=1e-6)


def test_factors_that_lie_apart(base: Any, directories: dict[str, Path]) -> None:
    """Others that come and go leave gaps: some forms are in several parts, of experts and of the shared pair."""
    served = MultiAdapterModel(copy.deepcopy(base), budget=8 << 20)
    scatter(served)
    for name, directory in directories.items():
        served.load(directory, name)
    counts = [
        len(parts)
        for path in served.pool.experts
        for weight in ("gate_up_proj", "down_proj")
        for parts in served.pool.parts(f"{path}.{weight}").values()
    ]
    assert max(counts) > 1
    with served.pool.hold(["vera", "dora"]) as held:
        path = next(iter(served.pool.experts))
        vera, dora = (served.pool.parts(f"{path}.down_proj")[slot] for slot in held.slots)
    assert [part.start for part in vera] == [0] * len(vera)
    assert len(vera) > 1
    assert sum(part.stop - part.start for part in dora) == 4
    check_rows(served, base, directories, ["vera", None, "dora", *directories])


def test_a_changed_adapter_is_another_one_and_the_old_one_is_finished(tmp_path: Path) -> None:
    base = qwen3_moe()
    found = save_all(base, tmp_path / "a", ["lora", "dora"], configs=configs)
    served = serve(base, {"x": found["lora"]})
    with served.pool.hold(["x"]) as held:
        path = f"{next(iter(served.pool.experts))}.down_proj"
        before = served.pool.parts(path)[held.slots[0]][0].form.A.clone()
        with pytest.warns(UserWarning, match="is .* from now on"):
            served.load(found["dora"], "x")
        assert torch.equal(served.pool.parts(path)[held.slots[0]][0].form.A, before)
    assert list(served.pool.parts(path)) != held.slots
    check_rows(served, base, {"x": found["dora"]}, ["x", None])


def refused(served: MultiAdapterModel, directory: Path, match: str) -> None:
    """Loading it is refused by name, and the pool is as it was."""
    before = served.pool.names, served.pool.used_bytes
    with pytest.raises(AdapterError, match=match):
        served.load(directory, "refused")
    assert (served.pool.names, served.pool.used_bytes) == before


def test_what_cannot_be_served_is_refused_by_name(tmp_path: Path) -> None:
    base = qwen3_moe()
    found = save_all(base, tmp_path, ["lora", "all", "half"], configs=configs)
    served = serve(base, {"half": found["half"]})
    experts: Any = next(iter(served.pool.experts.values()))
    handle = experts.register_forward_hook(lambda *_: None)
    refused(served, found["lora"], "layers.0.mlp.experts cannot serve many adapters: it has hooks")
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.experts cannot run with adapters: it has hooks"):
        served(**inputs(2), adapter_ids=["half", None])
    handle.remove()
    router: Any = next(iter(served.pool.routers.values()))
    router.forward = router.forward
    refused(served, found["all"], "layers.0.mlp.gate cannot serve many adapters: its forward is patched on the inst")
    served.load(found["lora"])
    del router.forward
    served.load(found["all"])
    router.forward = router.forward
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.gate cannot run with adapters: its forward is patched"):
        served(**inputs(2), adapter_ids=["all", None])
    del router.forward
    with pytest.raises(AdapterError, match="may be 3, got 4"):
        read_adapter(base, found["lora"], limits=Limits(max_rank=3))
    by_triton = MultiAdapterModel(copy.deepcopy(base), backend="triton")
    refused(by_triton, found["lora"], 'backend "triton" has no kernel for weights of experts')
    small = MultiAdapterModel(copy.deepcopy(base), budget=1 << 12)
    with pytest.raises(PoolFullError, match="does not fit"):
        small.load(found["lora"])
    assert small.pool.used_bytes == 0


class Mixing(nn.Module):
    """A router in which the tokens of a batch share what they get."""

    def __init__(self, router: Any) -> None:
        super().__init__()
        self.weight = router.weight
        self.top_k = router.top_k

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = (x @ self.weight.T).softmax(0)
        scores, chosen = logits.topk(self.top_k, dim=-1)
        return logits, scores, chosen


def test_a_router_in_which_tokens_depend_on_each_other_is_refused(tmp_path: Path) -> None:
    base = qwen3_moe()
    found = save_all(base, tmp_path, ["lora", "all"], configs=configs)
    for layer in base.model.layers:
        layer.mlp.gate = Mixing(layer.mlp.gate)
    served = serve(base, {"lora": found["lora"]})
    refused(served, found["all"], "mlp.gate cannot serve many adapters: what it gives for a token depends on others")


class Asking(nn.Module):
    """A router that is called with more than the tokens."""

    def __init__(self, router: Any) -> None:
        super().__init__()
        self.router = router.forward
        self.weight = router.weight

    def forward(self, x: Tensor, bias: Tensor) -> Any:
        return self.router(x + bias)


def test_a_router_that_wants_more_than_tokens_is_refused(tmp_path: Path) -> None:
    base = qwen3_moe()
    found = save_all(base, tmp_path, ["all"], configs=configs)
    for layer in base.model.layers:
        layer.mlp.gate = Asking(layer.mlp.gate)
    refused(serve(base, {}), found["all"], r"mlp\.gate cannot serve many adapters: its forward does not run .*'bias'")


def weights_meanwhile(router: Any, run: Callable[[], Any]) -> list[Tensor]:
    """The weight that a router has for other threads, at each forward of its kind that a run makes."""
    found: list[Tensor] = []
    kind = type(router)
    forward = kind.forward

    def watched(self: Any, *args: Any) -> Any:
        found.append(router.weight)
        return forward(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kind, "forward", watched)
        run()
    return found


def test_a_router_keeps_its_weight_for_other_threads_while_adapters_run(tmp_path: Path) -> None:
    base = qwen3_moe()
    found = save_all(base, tmp_path, ["all"], configs=configs)
    served, alone = serve(base, found), load_adapter(copy.deepcopy(base), found["all"]).eval()
    router, own = served.pool.routers["model.layers.0.mlp.gate"], alone.model.layers[0].mlp.gate.base_layer
    weight, batch = router.weight, inputs(2)
    served(**batch, adapter_ids=["all", None])  # the trace
    seen = weights_meanwhile(router, lambda: served(**batch, adapter_ids=["all", None]))
    assert len(seen) == 4
    assert all(one is weight for one in seen)
    weight = own.weight
    seen = weights_meanwhile(own, lambda: alone(**batch))
    assert len(seen) == 2
    assert all(one is weight for one in seen)


def test_routers_tell_their_logits(served: MultiAdapterModel, base: Any, directories: dict[str, Path]) -> None:
    """By hooks of transformers', which stay on them from then on."""
    names = ["all", None, "lora"]
    batch = inputs(len(names))
    output = served(**batch, adapter_ids=names, output_router_logits=True, output_hidden_states=True)
    assert len(output.router_logits) == len(served.pool.routers)
    for row, name in enumerate(names):
        model = copy.deepcopy(base)
        if name is not None:
            load_adapter(model, directories[name])
        with torch.no_grad():
            wanted = model(**batch, output_router_logits=True).router_logits
        used = batch["attention_mask"][row].bool()
        for mine, other in zip(output.router_logits, wanted, strict=True):
            rows = (logits.unflatten(0, (len(names), -1))[row][used] for logits in (mine, other))
            assert close(*rows), name
    served.load(directories["all"], "later")
    check_rows(served, base, {**directories, "later": directories["all"]}, ["later", None, "all"])


def test_an_adapter_of_a_shape_of_its_own_is_refused(tmp_path: Path) -> None:
    other = save_all(qwen3_moe(num_experts=3), tmp_path, ["lora"], configs=configs)
    refused(serve(qwen3_moe(), {}), other["lora"], "must have shape")


class Turned:
    """What comes before the class of a block that gives its experts the tokens in an order of its own."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = super().forward(x.transpose(0, 1).contiguous()).transpose(0, 1)  # type: ignore[misc]
        return y


def test_rows_in_another_order_than_the_models_are_refused_mixed(tmp_path: Path) -> None:
    base = qwen3_moe()
    found = save_all(base, tmp_path, ["lora", "dora", "linear"], configs=configs)
    for layer in base.model.layers:
        layer.mlp.__class__ = type("TurnedBlock", (Turned, type(layer.mlp)), {})
    served = serve(base, found)
    with pytest.raises(ValueError, match=r"mlp\.experts was called with .* the model regroups its rows"):
        served(**inputs(3), adapter_ids=["lora", "dora", None])
    mixed = served(**inputs(2), adapter_ids=["linear", None]).logits
    assert mixed.isfinite().all()


def test_a_compiled_model_takes_each_requests_adapters(tmp_path: Path) -> None:
    """Those on experts and routers as well that came after it was compiled."""
    base = qwen3_moe()
    found = save_all(base, tmp_path, ["linear", "lora", "dora", "all"], configs=configs)
    served = serve(base, {"linear": found["linear"]})
    ids = inputs(2)["input_ids"]
    served.model.forward = torch.compile(served.model.forward, backend="eager")
    for names in (["linear", None], ["lora", "dora"], ["dora", "lora"], ["all", None], [None, None], ["dora", "all"]):
        for name in set(names) - set(served.pool.names) - {None}:
            served.load(found[name], name)
        y = served(input_ids=ids, adapter_ids=names).logits
        for row, name in enumerate(names):
            wanted = alone(base, None if name is None else found[name], {"input_ids": ids})
            assert close(y[row], wanted[row]), names
    torch._dynamo.reset()


def test_a_model_is_compiled_once_for_all_requests(tmp_path: Path) -> None:
    base = qwen3_moe()
    found = save_all(base, tmp_path, ["lora", "dora", "all", "linear"], configs=configs)
    served, graphs = serve(base, found), list[Any]()

    def counted(graph: Any, example: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    served.model.forward = torch.compile(served.model.forward, backend=counted)
    batch = {"input_ids": inputs(2)["input_ids"]}
    served(**batch, adapter_ids=["lora", None])
    first = len(graphs)
    assert first > 1
    for names in itertools.permutations(found, 2):
        served(**batch, adapter_ids=list(names))
    assert len(graphs) == first
    torch._dynamo.reset()


def test_a_cuda_graph_takes_no_adapters_of_experts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = qwen3_moe()
    found = save_all(base, tmp_path, ["linear", "lora", "all"], configs=configs)
    served = serve(base, {"linear": found["linear"]})
    monkeypatch.setattr("fastadapt.serving.served._is_captured", lambda x: True)
    batch = inputs(2)
    assert served(**batch, adapter_ids=["linear", None]).logits.isfinite().all()
    served.load(found["all"], "all")
    with pytest.raises(ValueError, match=r"mlp\.gate cannot run with adapters: a CUDA graph would keep"):
        served(**batch, adapter_ids=["linear", None])
    served.pool.remove("all")
    served.load(found["lora"], "lora")
    with pytest.raises(ValueError, match=r"mlp\.experts cannot run with adapters: a CUDA graph would keep"):
        served(**batch, adapter_ids=["linear", None])


def test_a_served_model_takes_no_other_adapters() -> None:
    served = MultiAdapterModel(qwen3_moe())
    with pytest.raises(ValueError, match="served by a MultiAdapterModel"):
        inject(served.model, LoRAConfig(target_modules=["q_proj"]))
