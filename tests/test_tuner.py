"""The tuner: what it measures, and that no state of its file can do harm."""

from __future__ import annotations

import json
import logging
import math
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastadapt.operators.adapter_linear import tuner
from fastadapt.operators.adapter_linear.tuner import Key
from fastadapt.operators.adapter_linear.workload import Workload, workload_of
from fastadapt.reference import AdapterForm

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
KEY = Key(CPU, Workload(512, 576, (576, 192), (16, 16), "float32"))
OTHER = Key(CPU, KEY.workload._replace(M=1024))
TIMES = {"library": 2e-3, "recompose": 1e-3}


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache directory and a tuner that remembers nothing."""
    place = tmp_path / "cache"
    monkeypatch.setenv("FASTADAPT_CACHE", str(place))
    tuner.forget()
    yield place
    tuner.forget()


def cache_file(directory: Path) -> Path:
    (path,) = directory.glob("*.json")
    return path


def sleeper(seconds: float) -> Callable[[], None]:
    return lambda: time.sleep(seconds)


def fails() -> None:
    raise RuntimeError("out of resources: shared memory")


def test_the_fastest_is_found_measured_once_and_kept(directory: Path) -> None:
    made = []

    def candidates() -> dict[str, Callable[[], None]]:
        made.append(1)
        return {"split": fails, "library": sleeper(3e-3), "recompose": sleeper(1e-3)}

    assert tuner.lookup(KEY) is None
    assert tuner.best(KEY, candidates) == "recompose"
    assert tuner.best(KEY, candidates) == "recompose"
    tuner.forget()  # as a new process would start
    assert tuner.best(KEY, candidates) == "recompose"
    assert len(made) == 1
    assert tuner.lookup(OTHER) is None
    entry = json.loads(cache_file(directory).read_text())["entries"][str(KEY)]
    assert set(entry) == {"library", "recompose"}
    assert 1e-3 < entry["recompose"] < entry["library"]


def test_where_nothing_runs_there_is_no_choice_and_no_second_try(directory: Path) -> None:
    calls = []

    def counted() -> None:
        calls.append(1)
        fails()

    assert tuner.best(KEY, lambda: {"split": counted}) is None
    assert tuner.best(KEY, lambda: {"split": counted}) is None
    assert len(calls) == 1
    assert not directory.exists()
    tuner.record(KEY, TIMES)
    assert tuner.best(KEY, dict) == "recompose"


def test_no_room_for_the_candidates_is_no_error() -> None:
    def too_large() -> dict[str, Callable[[], None]]:
        raise torch.OutOfMemoryError("no room")

    assert tuner.best(KEY, too_large) is None


def test_measuring_leaves_the_random_state_as_it_was() -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    assert set(tuner.measure({"library": lambda: torch.rand(5)}, CPU, rounds=2)) == {"library"}
    assert torch.equal(torch.rand(3), expected)


def test_measuring_interleaves_and_tells_of_failures() -> None:
    order: list[str] = []
    told: dict[str, str] = {}
    late = iter(range(100))

    def fails_late() -> None:
        if next(late) == 5:
            fails()

    times = tuner.measure(
        {"a": lambda: order.append("a"), "b": lambda: order.append("b"), "c": fails_late},
        CPU,
        rounds=7,
        on_failure=lambda name, problem: told.update({name: str(problem)}),
    )
    assert set(times) == {"a", "b"}
    assert told == {"c": "out of resources: shared memory"}
    pairs = [set(order[i : i + 2]) for i in range(0, len(order), 2)]
    assert pairs == [{"a", "b"}] * 10
    assert order != ["a", "b"] * 10
    assert order != ["b", "a"] * 10


def test_measuring_ends_when_its_time_is_up() -> None:
    start = time.monotonic()
    tuner.measure({"a": sleeper(0.01)}, CPU, rounds=10_000, seconds=0.05)
    assert time.monotonic() - start < 2


@pytest.mark.parametrize(
    "times",
    [{}, {"magic": 1.0}, {"split": 0.0}, {"split": -1.0}, {"split": math.nan}, {"split": math.inf}, {"split": "1"}],
)
def test_only_times_of_strategies_are_recorded(times: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="times must map strategies"):
        tuner.record(KEY, times)
    assert tuner.lookup(KEY) is None


@pytest.mark.parametrize(
    "entry",
    [
        *([], {}, None, 3, "split"),
        *({"split": t} for t in (True, None, -1, 0, 10**400, math.nan, math.inf, 1e9)),
        *({"magic": 1.0}, {"split": 1e-3, "magic": 1e-4}),
    ],
)
def test_a_wrong_entry_is_ignored_and_the_others_hold(directory: Path, entry: Any) -> None:
    tuner.record(KEY, TIMES)
    path = cache_file(directory)
    document = json.loads(path.read_text())
    document["entries"][str(OTHER)] = entry
    path.write_text(json.dumps(document))
    tuner.forget()
    assert tuner.lookup(OTHER) is None
    assert tuner.lookup(KEY) == "recompose"
    tuner.record(OTHER, {"library": 1.0})
    assert json.loads(path.read_text())["entries"] == {str(KEY): TIMES, str(OTHER): {"library": 1.0}}


# What json can hold, anywhere in the document.
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


def hold(content: bytes, directory: Path) -> None:
    """The tuner works over a file of this content, and leaves a whole one."""
    tuner.forget()
    tuner.record(KEY, TIMES)
    path = cache_file(directory)
    path.write_bytes(content)
    tuner.forget()
    # A flipped digit is a time like any other.
    assert tuner.lookup(KEY) in (None, "recompose", "library")
    tuner.record(OTHER, {"library": 1.0})
    tuner.forget()
    assert tuner.lookup(OTHER) == "library"


SLOW = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@SLOW
@given(content=st.binary(max_size=200))
def test_random_bytes_are_written_over(directory: Path, content: bytes) -> None:
    hold(content, directory)


@SLOW
@given(cut=st.floats(0, 1), flip=st.integers(0, 255))
def test_a_torn_file_is_written_over(directory: Path, cut: float, flip: int) -> None:
    tuner.forget()
    tuner.record(KEY, TIMES)
    content = cache_file(directory).read_bytes()
    at = int(cut * (len(content) - 1))
    hold(content[:at], directory)
    hold(content[:at] + bytes([flip]) + content[at + 1 :], directory)


@SLOW
@given(document=JSON, entries=JSON)
def test_wrong_types_are_written_over(directory: Path, document: Any, entries: Any) -> None:
    hold(json.dumps(document).encode(), directory)
    right = {"environment": tuner.environment(CPU), "entries": entries}
    hold(json.dumps(right).encode(), directory)


@pytest.mark.parametrize("content", [b"[" * 100_000, b'{"environment": ' * 50_000, b"9" * 10_000, b"\xff\xfe{"])
def test_hostile_json_is_written_over(directory: Path, content: bytes) -> None:
    hold(content, directory)


def test_a_damaged_file_is_told_in_the_log_once(directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    tuner.record(KEY, TIMES)
    cache_file(directory).write_text("{")
    tuner.forget()
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert tuner.lookup(KEY) is None
    assert len(caplog.records) == 1
    assert "written anew" in caplog.text


@pytest.mark.parametrize("what", ["torch", "triton", "fastadapt", "format", "device", "driver"])
def test_another_environment_starts_afresh(directory: Path, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tuner.record(KEY, TIMES)
    assert tuner.lookup(KEY) == "recompose"
    changed = {**tuner.environment(CPU), what: "another"}
    monkeypatch.setattr(tuner, "environment", lambda device: changed)
    tuner.forget()
    assert tuner.lookup(KEY) is None
    tuner.record(KEY, {"library": 1.0})
    assert len(list(directory.glob("*.json"))) == 2
    monkeypatch.undo()
    monkeypatch.setenv("FASTADAPT_CACHE", str(directory))
    tuner.forget()
    assert tuner.lookup(KEY) == "recompose"


def test_the_file_of_another_environment_under_our_name_is_not_believed(directory: Path) -> None:
    tuner.record(KEY, TIMES)
    path = cache_file(directory)
    document = json.loads(path.read_text())
    document["environment"]["device"] = "another"
    path.write_text(json.dumps(document))
    tuner.forget()
    assert tuner.lookup(KEY) is None


def test_the_environment_names_all_that_times_depend_on() -> None:
    assert set(tuner.environment(CPU)) == {"format", "torch", "triton", "fastadapt", "device", "driver"}


@pytest.mark.parametrize(
    ("text", "release"),
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023\nGCC", "535.104.05"),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86  Release Build", "570.86"),
    ],
)
def test_the_driver_is_its_release(text: str, release: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuner, "NVIDIA_RELEASE", tmp_path / "version")
    assert tuner.driver() != release
    (tmp_path / "version").write_text(text)
    assert tuner.driver() == release


@pytest.mark.parametrize("obstacle", ["file in place of the directory", "directory in place of the file", "read-only"])
def test_where_it_cannot_write_it_remembers(
    directory: Path, obstacle: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    if obstacle == "file in place of the directory":
        directory.write_text("")
    elif obstacle == "directory in place of the file":
        tuner.record(KEY, TIMES)
        path = cache_file(directory)
        path.unlink()
        (path / "inside").mkdir(parents=True)
        tuner.forget()
    else:

        def refused(*_: Any, **__: Any) -> Any:  # whoever the tests run as
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(tempfile, "mkdtemp", refused)
    with caplog.at_level(logging.WARNING):
        tuner.record(KEY, TIMES)
        tuner.record(OTHER, {"library": 1.0})
    assert (tuner.lookup(KEY), tuner.lookup(OTHER)) == ("recompose", "library")
    assert sum("cannot be written" in record.message for record in caplog.records) == 1


def test_a_failing_write_leaves_the_file_and_no_litter(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tuner.record(KEY, TIMES)
    before = cache_file(directory).read_bytes()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    tuner.record(OTHER, {"library": 1.0})
    assert cache_file(directory).read_bytes() == before
    assert all(path.suffix in (".json", ".lock") for path in directory.iterdir())
    assert tuner.lookup(OTHER) == "library"


def test_no_home_means_memory_only(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FASTADAPT_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    assert tuner.kept_in() is None
    tuner.record(KEY, TIMES)
    assert tuner.lookup(KEY) == "recompose"


WRITER = """
import sys, torch
from fastadapt.operators.adapter_linear import tuner
from fastadapt.operators.adapter_linear.workload import Workload
for index in range(25):
    key = tuner.Key(torch.device("cpu"), Workload(int(sys.argv[1]) + index, 2, (3,), (4,)))
    tuner.record(key, {"split": 1e-3})
"""


def test_processes_that_write_at_once_lose_nothing(directory: Path) -> None:
    pythonpath = os.pathsep.join((str(ROOT), str(ROOT / "kernels")))
    environment = {**os.environ, "PYTHONPATH": pythonpath}
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(start)], env=environment, cwd=ROOT) for start in (0, 1000)
    ]
    assert [writer.wait(timeout=120) for writer in writers] == [0, 0]
    entries = json.loads(cache_file(directory).read_text())["entries"]
    assert len(entries) == 50


def test_a_held_lock_delays_and_does_not_stop(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fcntl = pytest.importorskip("fcntl")
    monkeypatch.setattr(tuner, "_LOCK_SECONDS", 0.05)
    tuner.record(KEY, TIMES)
    with open(cache_file(directory).with_suffix(".lock"), "a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        tuner.record(OTHER, {"library": 1.0})
    assert len(json.loads(cache_file(directory).read_text())["entries"]) == 2


def test_threads_measure_a_key_once(directory: Path) -> None:
    made = []

    def candidates() -> dict[str, Callable[[], None]]:
        made.append(1)
        return {"library": sleeper(1e-3)}

    found: list[str | None] = []
    threads = [threading.Thread(target=lambda: found.append(tuner.best(KEY, candidates))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == ["library"] * 4
    assert len(made) == 1


def form(r: int, **parts: Any) -> AdapterForm:
    return AdapterForm(torch.ones(r, 6, requires_grad=True), torch.ones(5, r), **parts)


def key_of(
    x: torch.Tensor,
    weights: list[torch.Tensor],
    forms: list[AdapterForm],
    dtype: torch.dtype = torch.float32,
    *,
    dropout: bool = False,
    backward: bool = True,
) -> Key:
    """The key of a call, in no_grad where no backward follows."""
    with torch.set_grad_enabled(backward):
        return Key.of(workload_of(x, weights, forms, dtype, dropout), x.device)


@pytest.mark.parametrize(("rows", "bucket"), [(0, 1), (1, 1), (2, 2), (3, 4), (512, 512), (513, 1024)])
def test_rows_are_rounded_up_to_a_power_of_two(rows: int, bucket: int) -> None:
    key = key_of(torch.ones(rows, 6), [torch.ones(5, 6)], [form(3)], backward=False)
    plain = dict.fromkeys(("trains_A", "trains_B", "trains_up", "backward", "wants_dx"), False)
    assert key == Key(CPU, Workload(bucket, 6, (5,), (3,), "float32", **plain))
    assert str(key) == f"m{bucket} k6 n5 r3 float32 plain"


def test_the_key_tells_apart_what_costs_apart() -> None:
    x, weight = torch.ones(2, 4, 6), torch.ones(5, 6)
    scale = torch.ones(5)
    forms = [
        form(3),
        form(4),
        form(3, bias=scale),
        form(3, out_scale=scale),
        form(3, base_scale=scale),
        form(3, base_scale=scale, dropout_on_base=True),
        form(3, mid_scale=torch.ones(3)),
    ]
    keys = {
        key_of(x, [weight], [one], dtype, dropout=dropout, backward=backward)
        for one in forms
        for dropout in (False, True)
        for backward in (False, True)
        for dtype in (torch.float32, torch.bfloat16)
    }
    # dropout_on_base is no difference without dropout.
    assert len(keys) == len({str(key) for key in keys}) == 8 * len(forms) - 4
    # Nor is what trains where nothing does.
    trained = [
        form(3, **{part: torch.ones(size, requires_grad=True)})
        for part, size in (("bias", 5), ("out_scale", 5), ("base_scale", 5), ("mid_scale", 3))
    ]
    assert all(key_of(x, [weight], [one], backward=False) in keys for one in trained)
    more = [key_of(x, [weight], [one]) for one in trained]
    frozen = form(3)._replace(A=torch.ones(3, 6))
    wants_dx = x.clone().requires_grad_()
    more += [
        key_of(wants_dx, [weight], [form(3)]),
        key_of(wants_dx, [weight], [frozen]),
        key_of(x, [weight], [form(3)._replace(B=torch.ones(5, 3, requires_grad=True))]),
    ]
    assert not keys & set(more)
    assert len({str(key) for key in more}) == len(more)
    shared = key_of(wants_dx, [weight] * 2, [frozen, frozen])
    apart = key_of(wants_dx, [weight] * 2, [frozen, form(3)])
    assert shared.features == ("shared_A", "backward", "wants_dx")
    assert apart.workload.outputs == (5, 5)
    assert apart.features == ("trains_A", "backward", "wants_dx")


@pytest.mark.parametrize("flag", [name for name, value in KEY.workload._asdict().items() if isinstance(value, bool)])
def test_every_flag_of_a_workload_is_in_the_name_of_its_key(flag: str) -> None:
    off, on = (Key.of(KEY.workload._replace(**{flag: value}), CPU) for value in (False, True))
    assert flag in str(on).split()[-1].split("+")
    assert str(on) != str(off)


def test_a_file_of_older_keys_is_not_read(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuner, "FORMAT", 1)
    tuner.record(KEY, TIMES)
    monkeypatch.undo()
    monkeypatch.setenv("FASTADAPT_CACHE", str(directory))
    tuner.forget()
    assert tuner.lookup(KEY) is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="events need a GPU")
def test_a_gpu_is_timed_by_events() -> None:
    device = torch.device("cuda", 0)
    small, large = (torch.ones(n, n, device=device) for n in (64, 4096))
    times = tuner.measure({"small": lambda: small @ small, "large": lambda: large @ large}, device)
    assert 0 < times["small"] < times["large"] < 1
