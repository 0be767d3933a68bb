"""Many adapters in one batch: the arena, the pool, the served model."""

from __future__ import annotations

import contextlib
import copy
import itertools
import random
import shutil
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import VOCAB, gpt2, llama, randomise
from torch import Tensor

from fastadapt import AdaLoRAConfig, DoRAConfig, LoRAConfig, VeRAConfig, inject, load_adapter, save_adapter, unload
from fastadapt.serving import AdapterError, AdapterPool, MultiAdapterModel, PoolFullError, read_adapter
from fastadapt.serving.arena import Arena, ArenaFullError, QueuedReads, page_bytes
from fastadapt.serving.requests import Running
from fastadapt.serving.tables import PoolTables

ROWS, TOKENS = 8, 6

# Adapters' directories, and a model for each of them alone and, under None, for none.
Crowd = tuple[dict[str, Path], dict[str | None, Any]]


def configs() -> dict[str, Any]:
    common: dict[str, Any] = {"target_modules": "all-linear"}
    return {
        "lora": LoRAConfig(r=4, lora_alpha=7, **common),
        "rslora": LoRAConfig(r=16, use_rslora=True, rank_pattern={"q_proj": 3, "c_attn": 3}, **common),
        "part": LoRAConfig(r=9, target_modules=r".*(q_proj|c_attn)"),
        "dora": DoRAConfig(r=5, lora_alpha=3, **common),
        "vera": VeRAConfig(r=12, **common),
        "vera2": VeRAConfig(r=12, **common),
        "dvora": VeRAConfig(r=12, use_dora=True, **common),
        "other key": VeRAConfig(r=12, projection_prng_key=7, **common),
        "adalora": AdaLoRAConfig(init_r=6, target_r=3, total_step=10, **common),
        "bias": LoRAConfig(r=3, bias="lora_only", lora_bias=True, **common),
    }


def save_all(
    base: Any, root: Path, wanted: list[str] | None = None, configs: Callable[[], dict[str, Any]] = configs
) -> dict[str, Path]:
    """A directory for each config, of random adapters."""
    found = {}
    for index, (name, config) in enumerate(configs().items()):
        if wanted is not None and name not in wanted:
            continue
        torch.manual_seed(index)
        model = inject(copy.deepcopy(base), config)
        randomise([parameter for parameter in model.parameters() if parameter.requires_grad])
        save_adapter(model, root / name)
        found[name] = root / name
    return found


def alone(base: Any, directory: Path | None, inputs: dict[str, Tensor]) -> Tensor:
    """The logits of one adapter by itself, without any serving code."""
    model = copy.deepcopy(base)
    if directory is not None:
        load_adapter(model, directory)
    with torch.no_grad():
        logits: Tensor = model.eval()(**inputs).logits
    return logits


def inputs(rows: int = ROWS, seed: int = 0) -> dict[str, Tensor]:
    """Left-padded rows of random tokens."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (rows, TOKENS), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(0, rows, 3):
        mask[row, : row % TOKENS] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.fixture(scope="module", params=[llama, gpt2], ids=["llama", "gpt2"])
def base(request: pytest.FixtureRequest) -> Any:
    return request.param()


@pytest.fixture(scope="module")
def directories(base: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return save_all(base, tmp_path_factory.mktemp("adapters"))


@pytest.fixture
def served(base: Any, directories: dict[str, Path]) -> MultiAdapterModel:
    model = MultiAdapterModel(copy.deepcopy(base), budget=4 << 20)
    for name, directory in directories.items():
        assert model.load(directory) == model.pool.info(name).identity
    return model


def close(actual: Tensor, expected: Tensor) -> bool:
    return bool((actual - expected).abs().max() <= 2e-5 * expected.abs().max())


@pytest.mark.parametrize("made", [False, True])
def test_what_is_made_in_inference_mode_is_written_outside_of_it(
    base: Any, directories: dict[str, Path], made: bool
) -> None:
    """The pool itself, and its tables where they grow."""
    with torch.inference_mode(made):
        served = MultiAdapterModel(copy.deepcopy(base), budget=8 << 20)
    with torch.inference_mode():
        for number in range(9):
            served.load(directories["rslora"], f"{number}")
    served.pool.remove("3")
    served.load(directories["dora"], "outside")
    batch = inputs(2)
    logits = served(**batch, adapter_ids=["outside", "8"]).logits
    for row, name in enumerate(("dora", "rslora")):
        used = batch["attention_mask"][row].bool()
        assert close(logits[row][used], alone(base, directories[name], batch)[row][used])


@pytest.mark.parametrize("failing", ["_reserve", "_upload"])
def test_tables_that_cannot_be_written_leave_the_pool_as_it_was(
    base: Any, directories: dict[str, Path], failing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the first of them is, and when they all are."""
    served = MultiAdapterModel(copy.deepcopy(base), budget=8 << 20)
    served.load(directories["rslora"], "kept")

    written, broken = getattr(PoolTables, failing), list[str]()

    def once(*args: Any) -> None:
        if broken:
            raise MemoryError(broken.pop())
        written(*args)

    monkeypatch.setattr(PoolTables, failing, once)
    for name in ("dora", "vera"):
        before = served.pool.used_bytes
        broken.append(name)
        with pytest.raises(MemoryError, match=name):
            served.load(directories[name], name)
        assert served.pool.used_bytes == before
        assert name not in served.pool
    # In the slot that the DoRA had whose g was written already.
    served.load(directories["lora"], "next")
    batch = inputs(2)
    logits = served(**batch, adapter_ids=["next", "kept"]).logits
    for row, name in enumerate(("lora", "rslora")):
        used = batch["attention_mask"][row].bool()
        assert close(logits[row][used], alone(base, directories[name], batch)[row][used])


# The arena


def test_pages_never_overlap_and_all_come_back() -> None:
    arena = Arena(1 << 20, 3000)
    rng = random.Random(0)
    live: list[tuple[int, list[int]]] = []
    for step in range(4000):
        if live and rng.random() < 0.5:
            arena.give_back(*live.pop(rng.randrange(len(live))))
        else:
            size, count = rng.choice([64, 300, 1000, 3000]), rng.choice([1, 2, 5, 40])
            try:
                live.append((size, arena.take(size, count)))
            except ArenaFullError:
                continue
        if step % 100 == 0:
            spans = sorted((first, first + page_bytes(size)) for size, pages in live for first in pages)
            assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))
            assert not spans or spans[-1][1] <= arena.budget
            assert arena.used_bytes == sum(end - start for start, end in spans)
            assert arena.used_bytes <= arena.held_bytes <= arena.budget
    for pages in live:
        arena.give_back(*pages)
    assert arena.used_bytes == arena.held_bytes == 0


def test_pages_lie_together_where_they_can() -> None:
    arena = Arena(1 << 21, 1024)
    first = arena.take(1024, 5)
    assert first == [1024 * index for index in range(5)]
    second = arena.take(1024, 10)
    arena.give_back(1024, first)
    assert arena.take(1024, 3) == [0, 1024, 2048]
    assert second == [1024 * index for index in range(5, 15)]


def test_a_full_arena_takes_nothing() -> None:
    arena = Arena(64 * 20, 64 * 20)
    arena.take(64, 15)
    with pytest.raises(ArenaFullError, match="6 pages of 64 bytes do not fit"):
        arena.take(64, 6)
    assert arena.used_bytes == 15 * 64
    assert len(arena.take(64, 5)) == 5
    with pytest.raises(ValueError, match="budget must be at least"):
        Arena(100, 128)


def test_one_event_a_stream_however_many_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever writes waits for the last that each stream was given to read, and so does the next writer."""
    now = [""]

    class Event:
        made: ClassVar[list[Event]] = []

        def __init__(self) -> None:
            self.made.append(self)
            self.waiting: list[str] = []

        def record(self, stream: str) -> None:
            self.stream = stream

        def wait(self, stream: str) -> None:
            self.waiting.append(stream)

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: now[0])
    monkeypatch.setattr(torch.cuda, "Event", Event)
    reads = QueuedReads(torch.device("cuda", 1))
    for now[:] in (["one"], ["two"], ["one"]) * 100:
        reads.note()
    assert [event.stream for event in Event.made] == ["one", "two"]
    for now[:] in (["three"], ["four"]):
        reads.wait()
    assert all(event.waiting == ["three", "four"] for event in Event.made)
    of_a_cpu = QueuedReads(torch.device("cpu"))
    of_a_cpu.note()
    of_a_cpu.wait()
    assert len(Event.made) == 2


def test_a_pool_notes_what_is_read_and_waits_before_it_writes(
    base: Any, directories: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    monkeypatch.setattr(QueuedReads, "note", lambda self: done.append("note"))
    monkeypatch.setattr(QueuedReads, "wait", lambda self: done.append("wait"))
    pool = MultiAdapterModel(copy.deepcopy(base), budget=4 << 20).pool
    pool.load(directories["lora"])
    with pool.hold(["lora", None]):
        assert done == ["wait"]
    pool.evict("lora")
    with pool.hold(["lora"]):
        pass
    assert done == ["wait", "note", "wait", "note"]


# The model


def test_every_row_equals_its_adapter_alone(served: MultiAdapterModel, base: Any, directories: dict[str, Path]) -> None:
    names = [*directories, None]
    random.Random(0).shuffle(names)
    batch = inputs(len(names))
    logits = served(**batch, adapter_ids=names).logits
    for row, name in enumerate(names):
        expected = alone(base, None if name is None else directories[name], batch)
        used = batch["attention_mask"][row].bool()
        assert close(logits[row][used], expected[row][used]), name


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore:.*rank_pattern:RuntimeWarning")
def test_rows_of_the_types_that_peft_has_equal_peft_alone(
    served: MultiAdapterModel, base: Any, directories: dict[str, Path]
) -> None:
    from peft import PeftModel

    names = [name for name in directories if name != "dvora"]
    batch = inputs(len(names))
    logits = served(**batch, adapter_ids=names).logits
    for row, name in enumerate(names):
        peft = PeftModel.from_pretrained(copy.deepcopy(base), directories[name]).eval()
        with torch.no_grad():
            expected = peft(**batch).logits
        used = batch["attention_mask"][row].bool()
        assert close(logits[row][used], expected[row][used]), name


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"num_beams": 3, "num_return_sequences": 2}])
def test_generate_answers_as_each_adapter_alone(
    served: MultiAdapterModel, base: Any, directories: dict[str, Path], options: dict[str, int]
) -> None:
    names: list[str | None] = ["lora", None, "dora", "vera", "vera2", "dora", "adalora", "bias"]
    batch = inputs()
    settings: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    output = served.generate(**batch, adapter_ids=names, **settings, **options)
    each = options.get("num_return_sequences", 1)
    for row, name in enumerate(names):
        model = copy.deepcopy(base)
        if name is not None:
            load_adapter(model, directories[name])
        own = {key: value[row : row + 1] for key, value in batch.items()}
        expected = model.generate(**own, **settings, **options)
        assert torch.equal(output[row * each : (row + 1) * each], expected), name


def test_base_rows_are_the_base_models_to_the_bit(served: MultiAdapterModel, base: Any) -> None:
    batch = inputs()
    with torch.no_grad():
        expected = base(**batch).logits
    assert torch.equal(served(**batch).logits, expected)
    assert torch.equal(served(**batch, adapter_ids=[None] * ROWS).logits, expected)


def test_one_name_stands_for_all_rows(served: MultiAdapterModel, base: Any, directories: dict[str, Path]) -> None:
    batch = inputs()
    assert close(served(**batch, adapter_ids="dora").logits, alone(base, directories["dora"], batch))


def test_what_cannot_be_asked(served: MultiAdapterModel) -> None:
    batch = inputs()
    with pytest.raises(KeyError, match="adapter 'x' is not in the pool; it has 'lora'"):
        served(**batch, adapter_ids=["x"] * ROWS)
    with pytest.raises(ValueError, match="one entry a row, got 2 for 8"):
        served(**batch, adapter_ids=["lora", None])
    with pytest.raises(ValueError, match="need a batch"):
        served.generate(adapter_ids="lora")


def test_wrapping_and_unwrapping(base: Any) -> None:
    model = copy.deepcopy(base)
    names = [name for name, _ in model.named_modules()]
    served = MultiAdapterModel(model, budget=1 << 20)
    with pytest.raises(ValueError, match="served already"):
        MultiAdapterModel(model)
    assert served.unwrap() is model
    assert [name for name, _ in model.named_modules()] == names
    adapted = inject(model, LoRAConfig(target_modules="all-linear"))
    with pytest.raises(ValueError, match="has injected adapters"):
        MultiAdapterModel(adapted)
    unload(adapted)
    with pytest.raises(ValueError, match="no linear layers"):
        MultiAdapterModel(torch.nn.ReLU())


# The pool


def test_vera_adapters_of_one_key_share_their_pair(served: MultiAdapterModel) -> None:
    pool = served.pool
    with pool.hold(["vera", "vera2", "dvora", "other key", "lora"]) as holding:
        assert len(set(holding.slots)) == 5
        assert len(set(holding.groups[:3])) == 1
        assert len(set(holding.groups)) == 3
    before = pool.used_bytes
    pool.remove("vera2")
    freed = before - pool.used_bytes
    pool.remove("vera")
    pool.remove("dvora")
    assert before - pool.used_bytes > 3 * freed  # with its last user the pair goes


def test_bytes_are_exact(base: Any, directories: dict[str, Path]) -> None:
    served = MultiAdapterModel(copy.deepcopy(base), budget=4 << 20)
    pool = served.pool
    assert pool.used_bytes == pool.held_bytes == 0
    for name, directory in directories.items():
        before = pool.used_bytes
        served.load(directory)
        assert pool.used_bytes - before >= pool.info(name).bytes > 0
    for name in directories:
        pool.evict(name)
        assert not pool.info(name).resident
    assert pool.used_bytes == pool.held_bytes == 0
    assert len(pool) == len(directories)


def test_the_least_recently_used_makes_room(base: Any, tmp_path: Path) -> None:
    served = MultiAdapterModel(copy.deepcopy(base), budget=4 << 20)
    directory = save_all(base, tmp_path, ["lora"])["lora"]
    served.load(directory, "0")
    each = served.pool.held_bytes
    served = MultiAdapterModel(copy.deepcopy(base), budget=4 * each)
    pool, resident = served.pool, lambda: {name for name in pool.names if pool.info(name).resident}
    count = 0
    while resident() == set(pool.names):  # fill it
        served.load(_changed(directory, tmp_path / str(count), count), str(count))
        count += 1
    last = count - 1
    assert count > 2
    assert resident() == {str(index) for index in range(1, count)}
    pool.pin("1")
    with pool.hold(["2"]):
        served.load(_changed(directory, tmp_path / "new", 99), "new")
        if count > 3:
            assert resident() == {str(index) for index in range(1, count)} - {"3"} | {"new"}
        with pytest.raises(ValueError, match="adapter '2' is in use"):
            pool.evict("2")
    with pytest.raises(ValueError, match="adapter '1' is pinned"):
        pool.evict("1")
    pool.unpin("1")
    # An evicted one comes back by itself, and answers as before.
    assert close(served(**inputs(), adapter_ids="0").logits, alone(base, tmp_path / "0", inputs()))
    with pytest.raises(PoolFullError, match="raise the budget"), pool.hold([str(index) for index in range(last + 1)]):
        pass


def _changed(directory: Path, target: Path, seed: int) -> Path:
    """The same adapter with other values."""
    from safetensors.torch import load_file, save_file

    target.mkdir(parents=True)
    tensors = load_file(directory / "adapter_model.safetensors")
    generator = torch.Generator().manual_seed(seed)
    changed = {name: value + torch.randn(value.shape, generator=generator) / 10 for name, value in tensors.items()}
    save_file(changed, target / "adapter_model.safetensors", metadata={"format": "pt"})
    (target / "adapter_config.json").write_bytes((directory / "adapter_config.json").read_bytes())
    return target


@pytest.mark.filterwarnings("ignore:.*from now on, and was:UserWarning")
def test_a_changed_adapter_is_another_one(base: Any, tmp_path: Path) -> None:
    directory = save_all(base, tmp_path, ["dora"])["dora"]
    served = MultiAdapterModel(copy.deepcopy(base), budget=1 << 20)
    first = served.load(directory)
    assert served.load(directory) == first
    batch, used = inputs(), served.pool.used_bytes
    old = alone(base, directory, batch)
    with served.pool.hold(["dora"]) as holding:
        changed = _changed(directory, tmp_path / "changed", 1)
        second = served.load(changed, "dora")
        assert second != first
        assert served.pool.used_bytes == 2 * used
        # Whoever held the old one still has it.
        request = Running(holding._replace(slots=holding.slots * ROWS, groups=holding.groups * ROWS))
        with served.requests.running(request):
            assert close(served.model(**batch).logits, old)
        assert close(served(**batch, adapter_ids="dora").logits, alone(base, changed, batch))
    assert served.pool.used_bytes == used
    served.pool.evict("dora")
    _overwrite(changed, directory)
    with pytest.raises(AdapterError, match="has changed since it was loaded"):
        served(**batch, adapter_ids="dora")


def _overwrite(target: Path, source: Path) -> None:
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())


def test_directories_of_one_name_are_told_apart(base: Any, tmp_path: Path) -> None:
    one = save_all(base, tmp_path, ["lora"])["lora"]
    paths = [tmp_path / part for part in ("sql/checkpoint-5", "poems/checkpoint-5", "old/poems/checkpoint-5")]
    for seed, path in enumerate(paths):
        _changed(one, path, seed)
    served = MultiAdapterModel(copy.deepcopy(base), budget=4 << 20)
    identities = [served.load(path) for path in paths]
    names = ["checkpoint-5", "poems/checkpoint-5", "old/poems/checkpoint-5"]
    assert served.pool.names == names
    assert [served.pool.info(name).identity for name in names] == identities
    # Loaded again, however it is written, a directory has the name that it had.
    assert served.load(tmp_path / "sql" / ".." / "poems" / "checkpoint-5") == identities[1]
    assert served.pool.names == names
    batch = inputs(3)
    logits = served(**batch, adapter_ids=names).logits
    for row, path in enumerate(paths):
        assert close(logits[row], alone(base, path, batch)[row])


def test_links_keep_their_own_names(base: Any, tmp_path: Path) -> None:
    one = save_all(base, tmp_path, ["lora"])["lora"]
    for name in ("sql-live", "poems-live"):
        (tmp_path / name).symlink_to(one)
    served = MultiAdapterModel(copy.deepcopy(base), budget=4 << 20)
    for name in ("sql-live", "poems-live"):
        served.load(tmp_path / name)
    assert served.pool.names == ["sql-live", "poems-live"]


def test_a_name_that_another_directory_takes_over_is_said(base: Any, tmp_path: Path) -> None:
    one = save_all(base, tmp_path, ["lora"])["lora"]
    other = _changed(one, tmp_path / "other", 1)
    served = MultiAdapterModel(copy.deepcopy(base), budget=4 << 20)
    served.load(one, "live")
    with pytest.warns(UserWarning, match=f"'live' is {other} from now on, and was {one}"):
        served.load(other, "live")
    _overwrite(other, one)
    served.load(other, "live")  # changed in its own place, as new versions are
    served.pool.add("memory", read_adapter(base, one))
    with pytest.warns(UserWarning, match=r"and was an adapter without a directory"):
        served.load(_changed(one, tmp_path / "third", 3), "memory")


@pytest.mark.filterwarnings("ignore:.*from now on, and was:UserWarning")
def test_a_pin_goes_with_the_name(base: Any, tmp_path: Path) -> None:
    directory = save_all(base, tmp_path, ["lora"])["lora"]
    served = MultiAdapterModel(copy.deepcopy(base), budget=1 << 20)
    served.load(directory)
    served.pool.pin("lora")
    served.load(_changed(directory, tmp_path / "changed", 1), "lora")
    assert served.pool.info("lora").pinned


def test_what_comes_back_still_has_to_lie_in_its_root(base: Any, tmp_path: Path) -> None:
    outside = save_all(base, tmp_path / "outside", ["lora"])["lora"]
    inside = tmp_path / "root" / "lora"
    shutil.copytree(outside, inside)
    served = MultiAdapterModel(copy.deepcopy(base), budget=1 << 20)
    served.load(inside, root=tmp_path / "root")
    served.pool.evict("lora")
    shutil.rmtree(inside)
    inside.symlink_to(outside)
    with pytest.raises(AdapterError):
        served(**inputs(), adapter_ids="lora")
    assert served.pool.used_bytes == 0


def test_a_bad_adapter_leaves_nothing(served: MultiAdapterModel, tmp_path: Path) -> None:
    used, names = served.pool.used_bytes, served.pool.names
    (tmp_path / "bad").mkdir()
    with pytest.raises(AdapterError):
        served.load(tmp_path / "bad")
    with pytest.raises(AdapterError):
        served.load(tmp_path / "missing")
    assert (served.pool.used_bytes, served.pool.names) == (used, names)


def test_values_that_the_pools_dtype_cannot_hold_are_refused(base: Any, tmp_path: Path) -> None:
    directory = save_all(base, tmp_path, ["lora"])["lora"]
    large = copy.deepcopy(base)
    load_adapter(large, directory)
    with torch.no_grad():
        next(p for name, p in large.named_parameters() if "lora_A" in name).fill_(1e30)
    save_adapter(large, tmp_path / "large")
    served = MultiAdapterModel(copy.deepcopy(base), budget=1 << 20, dtype=torch.float16)
    with pytest.raises(AdapterError, match=r"values that torch\.float16 cannot hold"):
        served.load(tmp_path / "large")
    assert served.pool.used_bytes == 0


@pytest.mark.parametrize("seed", range(2))
def test_churn_under_a_running_workload(base: Any, tmp_path: Path, seed: int) -> None:
    """Loads, evictions and replacements in one thread, requests in others: no wrong answer, no page lost."""
    root = save_all(base, tmp_path / "source", ["lora", "dora", "vera"])
    directories = {
        f"{name}-{index}": _changed(directory, tmp_path / f"{name}-{index}", index)
        for name, directory in root.items()
        for index in range(3)
    }
    batch = inputs(4, seed)
    expected = {name: alone(base, directory, batch) for name, directory in directories.items()}
    served = MultiAdapterModel(copy.deepcopy(base), budget=1 << 19)
    for name, directory in directories.items():
        served.load(directory, name)
    failures: list[str] = []
    stop = threading.Event()

    def request(thread: int) -> None:
        rng = random.Random(100 * seed + thread)
        while not stop.is_set():
            names = [rng.choice([*directories, None]) for _ in range(4)]
            try:
                logits = served(**batch, adapter_ids=names).logits
            except PoolFullError:
                continue
            except Exception as error:
                failures.append(repr(error))
                return
            for row, name in enumerate(names):
                if name is not None and not close(logits[row], expected[name][row]):
                    failures.append(f"row {row} of {names}")

    threads = [threading.Thread(target=request, args=(thread,)) for thread in range(2)]
    for thread in threads:
        thread.start()
    rng = random.Random(seed)
    for _ in range(60):
        name = rng.choice(list(directories))
        if rng.random() < 0.5:
            served.load(directories[name], name)
        else:
            with contextlib.suppress(ValueError):  # in use
                served.pool.evict(name)
    stop.set()
    for thread in threads:
        thread.join()
    assert not failures, failures[:3]
    for name in directories:
        served.pool.evict(name)
    assert served.pool.used_bytes == served.pool.held_bytes == 0


def test_the_pool_tells_what_it_has(served: MultiAdapterModel) -> None:
    pool: AdapterPool = served.pool
    assert "lora" in pool
    assert "x" not in pool
    assert len(pool) == len(pool.names)
    for call in (pool.info, pool.evict, pool.remove, pool.pin, pool.unpin):
        with pytest.raises(KeyError, match="not in the pool"):
            call("x")
    with pool.hold(["lora"]):
        assert pool.info("lora").in_use
    assert not pool.info("lora").in_use


# Full pools, in which the pages of an adapter lie where there was room


def crowd() -> dict[str, Any]:
    """Adapters of all methods that mix, of ranks from 4 to 64, which adapt all layers or two."""
    two, every = ["q_proj", "down_proj"], "all-linear"
    ranks = enumerate((4, 64, 8, 24, 16, 40, 5, 32))
    found: dict[str, Any] = {f"lora{r}": LoRAConfig(r=r, target_modules=two if i % 3 else every) for i, r in ranks}
    found |= {f"dora{r}": DoRAConfig(r=r, target_modules=every) for r in (9, 33)}
    found |= {f"adalora{r}": AdaLoRAConfig(init_r=r, target_r=4, total_step=10, target_modules=two) for r in (12, 48)}
    found |= {f"vera{i}": VeRAConfig(r=40, projection_prng_key=i // 2, target_modules=every) for i in range(4)}
    return found


@pytest.fixture(scope="module")
def crowded(tmp_path_factory: pytest.TempPathFactory) -> Crowd:
    base = llama(num_hidden_layers=1)
    directories = save_all(base, tmp_path_factory.mktemp("crowd"), configs=crowd)
    models: dict[str | None, Any] = {None: base}
    for name, directory in directories.items():
        if name.startswith("adalora"):  # its budget went to every third rank
            tensors = load_file(directory / "adapter_model.safetensors")
            for key in [key for key in tensors if "lora_E" in key]:
                tensors[key][torch.arange(len(tensors[key])) % 3 > 0] = 0.0
            save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
        models[name] = copy.deepcopy(base)
        load_adapter(models[name], directory)
        models[name].eval()
    return directories, models


def full_pool(base: Any, directories: dict[str, Path], share: float, backend: str = "eager") -> MultiAdapterModel:
    """A served model that has room for a share of the adapters and in which they have come and gone."""
    roomy = MultiAdapterModel(copy.deepcopy(base), budget=4 << 20)
    for name, directory in directories.items():
        roomy.load(directory, name)
    served = MultiAdapterModel(copy.deepcopy(base), budget=int(share * roomy.pool.used_bytes), backend=backend)
    rng = random.Random(share)
    for name, directory in directories.items():
        served.load(directory, name)
    for _ in range(15):
        with contextlib.suppress(PoolFullError), served.pool.hold(rng.sample(list(directories), 2)):
            pass
    return served


def gaps(parts: Sequence[Tensor]) -> list[int]:
    """The ranks before which a factor has a gap in memory."""
    found, rank = [], 0
    for part, following in itertools.pairwise(parts):
        rank += part.shape[0]
        if following.storage_offset() != part.storage_offset() + part.shape[0] * part.stride(0):
            found.append(rank)
    return found


def unlike(pool: AdapterPool) -> int:
    """How many forms have gaps in A and B at different ranks."""
    forms = [form for path in pool.layers for form in pool.forms(path).values()]
    return sum(gaps(form.A) != gaps(form.B) for form in forms)


@pytest.mark.parametrize(
    ("backend", "share", "batches"),
    [("eager", 0.3, 12), ("eager", 0.5, 12), ("eager", 0.7, 12), ("eager", 1.0, 12), ("triton", 0.7, 2)],
)
def test_every_batch_runs_in_a_full_pool(crowded: Crowd, backend: str, share: float, batches: int) -> None:
    directories, models = crowded
    served = full_pool(models[None], directories, share, backend)
    rng = random.Random(share)
    prompts, ran, seen = inputs()["input_ids"][:, None], 0, 0
    for turn in range(batches):
        names = [*rng.sample(list(directories), 3), None]
        rng.shuffle(names)
        prompt = prompts[turn % len(prompts)]
        try:
            for ids in (prompt, prompt[:, :1]):  # prefill, and decoding's single tokens
                logits = served(input_ids=ids.expand(len(names), -1), adapter_ids=names).logits
                for row, name in enumerate(names):
                    assert close(logits[row], models[name](input_ids=ids).logits[0]), (names, name, ids.shape)
        except PoolFullError:
            continue
        ran, seen = ran + 1, seen + unlike(served.pool)
    assert seen > 0  # else this shows nothing
    assert ran >= batches / 2


def test_what_does_not_fit_leaves_the_pool_as_it_was(crowded: Crowd, tmp_path: Path) -> None:
    directories, models = crowded
    base = models[None]
    served = full_pool(base, directories, 0.4)
    too_large = {"large": LoRAConfig(r=256, target_modules="all-linear")}
    save_all(base, tmp_path, configs=lambda: too_large)
    tensors = load_file(directories["lora64"] / "adapter_model.safetensors")
    next(value for name, value in tensors.items() if "lora_B" in name)[:] = 1e30
    bad = _changed(directories["lora64"], tmp_path / "bad", 0)
    save_file(tensors, bad / "adapter_model.safetensors", metadata={"format": "pt"})
    half = MultiAdapterModel(copy.deepcopy(base), budget=24_000, dtype=torch.float16)
    half.load(directories["lora4"])

    def state(pool: AdapterPool) -> tuple[Any, ...]:
        return pool.used_bytes, pool.held_bytes, [pool.info(name) for name in pool.names]

    before = state(served.pool), state(half.pool)
    with pytest.raises(PoolFullError, match=r"it needs 475,136 bytes.*; 0 of 128,640 are pinned or in use: raise"):
        served.load(tmp_path / "large")
    with pytest.raises(AdapterError, match="values that"):
        half.load(bad)
    assert (state(served.pool), state(half.pool)) == before
    with pytest.raises(PoolFullError), served.pool.hold(list(directories)):
        pass
    assert served.pool.names == list(directories)
    assert not any(served.pool.info(name).in_use for name in directories)
    prompt = inputs(1)["input_ids"]
    for name in directories:
        assert close(served(input_ids=prompt, adapter_ids=name).logits, models[name](input_ids=prompt).logits), name
    for name in directories:
        served.pool.evict(name)
    assert served.pool.used_bytes == served.pool.held_bytes == 0
