"""The evolutionary search, its spaces, and the way from a supernet to a file of PEFT's."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from peft import PeftModel
from test_peft_parity import close, quiet_peft
from torch import Tensor, nn

import fastadapt
from fastadapt import GLoRAConfig, GLoRASpace, LoRAConfig, NOAHSpace, evolve, inject
from fastadapt.training.search import Result

SMALL: dict[str, Any] = {"population": 12, "generations": 4, "archive": 4, "mutants": 5, "crossovers": 5}
SMALL |= {"parameter_limit": (10, 40), "progress": False}


class Digits:
    """Lists of ten digits, whose sum is the number of parameters."""

    def __init__(self) -> None:
        self.applied: list[Any] = []

    def sample(self, rng: random.Random) -> Any:
        return [rng.randrange(10) for _ in range(10)]

    def mutate(self, rng: random.Random, candidate: Any, probability: float) -> Any:
        return [rng.randrange(10) if rng.random() < probability else digit for digit in candidate]

    def cross(self, rng: random.Random, a: Any, b: Any) -> Any:
        return [rng.choice(pair) for pair in zip(a, b, strict=True)]

    def parameters(self, candidate: Any) -> int:
        return sum(candidate)

    def apply(self, candidate: Any) -> None:
        self.applied.append(candidate)


def descent(candidate: Any) -> float:
    """Largest where the digits fall from 9 to 0."""
    return -float(sum(abs(digit - (9 - place)) for place, digit in enumerate(candidate)))


def test_it_is_deterministic_by_its_seed() -> None:
    one, same, other = (evolve(Digits(), descent, **SMALL, seed=seed) for seed in (1, 1, 2))
    assert one == same
    assert one.history != other.history


def test_it_finds_the_optimum_of_a_small_space() -> None:
    space = Digits()
    found = evolve(space, descent, parameter_limit=(0, 90), population=100, generations=60, progress=False)
    assert found.best.candidate == [9, 8, 7, 6, 5, 4, 3, 2, 1, 0]
    assert space.applied[-1] == found.best.candidate
    beginning = max(scored.fitness for scored in found.history if scored.generation == 0)
    assert beginning < found.best.fitness == 0


def test_all_are_legal_and_none_is_drawn_twice() -> None:
    found = evolve(Digits(), descent, **SMALL)
    assert len(found.history) == 4 * 12
    assert all(10 <= scored.parameters <= 40 for scored in found.history)
    assert all(scored.parameters == sum(scored.candidate) for scored in found.history)
    assert max(Counter(tuple(scored.candidate) for scored in found.history).values()) == 1
    assert [scored.generation for scored in found.history] == [g for g in range(4) for _ in range(12)]


def test_the_archive_is_the_best_of_all_that_came() -> None:
    found = evolve(Digits(), descent, **SMALL)
    ordered = sorted(found.history, key=lambda scored: -scored.fitness)  # stable: the first of equals stays first
    assert found.archive == ordered[:4]
    assert found.best == found.archive[0]


def test_generations_are_mutants_crossings_and_random_ones() -> None:
    class Watched(Digits):
        calls: list[str]

        def __init__(self) -> None:
            super().__init__()
            self.calls = []
            self.parents: set[tuple[int, ...]] = set()

        def sample(self, rng: random.Random) -> Any:
            self.calls.append("sample")
            return super().sample(rng)

        def mutate(self, rng: random.Random, candidate: Any, probability: float) -> Any:
            assert probability == 0.2
            self.calls.append("mutate")
            self.parents.add(tuple(candidate))
            return super().mutate(rng, candidate, probability)

        def cross(self, rng: random.Random, a: Any, b: Any) -> Any:
            self.calls.append("cross")
            return super().cross(rng, a, b)

    space = Watched()
    settings = {**SMALL, "parameter_limit": (0, 90), "generations": 2}
    found = evolve(space, descent, **settings)
    first = sorted(found.history[:12], key=lambda scored: -scored.fitness)[:4]
    assert space.parents <= {tuple(scored.candidate) for scored in first}
    assert space.calls.count("sample") == 12 + 2  # the odds of a duplicate among 10¹⁰ are nil
    assert space.calls.count("mutate") >= 5
    assert space.calls.count("cross") >= 5


def test_a_space_that_runs_out_ends_the_search_early() -> None:
    class Few(Digits):
        def sample(self, rng: random.Random) -> Any:
            return [rng.randrange(3)]

        mutate = lambda self, rng, candidate, probability: self.sample(rng)  # noqa: E731

    found = evolve(Few(), lambda candidate: float(candidate[0]), population=6, generations=5, progress=False, **FEW)
    assert sorted(scored.candidate[0] for scored in found.history) == [0, 1, 2]
    assert found.best.candidate == [2]


FEW: dict[str, Any] = {"mutants": 2, "crossovers": 2, "archive": 2}


# Kills


class Killed(BaseException):
    """Stands for a kill: nothing catches it."""


@pytest.mark.parametrize("place", ["fitness", "write"])
def test_killed_anywhere_it_ends_as_if_it_had_not_been(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = evolve(Digits(), descent, **SMALL)
    sync = os.fsync
    for point in range(0, len(whole.history), 11):
        state, before, after = tmp_path / f"{point}.json", list[Any](), list[Any]()

        def killed(value: Any, before: list[Any] = before, point: int = point) -> Any:
            if len(before) > point:
                raise Killed
            return sync(value) if place == "write" else descent(value)

        fitness = _counted(before, descent if place == "write" else killed)
        with monkeypatch.context() as patch:
            if place == "write":
                patch.setattr(os, "fsync", killed)
            with pytest.raises(Killed):
                evolve(Digits(), fitness, **SMALL, state_file=state)
        assert evolve(Digits(), _counted(after), **SMALL, state_file=state) == whole
        assert len(before) == point + 1
        assert len(after) == len(whole.history) - point
        assert sorted(path.name for path in tmp_path.glob("*")) == sorted(path.name for path in tmp_path.glob("*.json"))


def _counted(calls: list[Any], score: Callable[[Any], float] = descent) -> Callable[[Any], float]:
    def fitness(candidate: Any) -> float:
        calls.append(candidate)
        return score(candidate)

    return fitness


PROGRAM = """
import json, random, sys, time
from fastadapt import NOAHSpace, evolve

def slow(candidate):
    time.sleep(0.01)
    return float(sum(candidate["lora"]))

space = NOAHSpace(12, parameters=lambda c: 1, apply=lambda c: None)
evolve(space, slow, **json.loads(sys.argv[1]), state_file=sys.argv[2])
print("whole", flush=True)
"""


def test_a_real_kill_leaves_a_state_to_go_on_from(tmp_path: Path) -> None:
    state = tmp_path / "search.json"
    settings = {**SMALL, "parameter_limit": (0, 1)}
    arguments = [sys.executable, "-c", PROGRAM, json.dumps(settings), str(state)]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, cwd=Path(__file__).parent.parent)
    try:
        deadline = time.monotonic() + 120
        while not state.exists() and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(0.05)
    finally:
        process.kill()
        output, _ = process.communicate()
    assert b"whole" not in output
    known = len(json.loads(state.read_text())["scores"])
    again: list[Any] = []
    space = noah(parameters=lambda candidate: 1)
    resumed = evolve(space, _counted(again, width), **settings, state_file=state)
    assert resumed == evolve(space, width, **settings)
    assert 0 < known < len(resumed.history) == known + len(again)


def width(candidate: Any) -> float:
    return float(sum(candidate["lora"]))


def test_a_search_can_be_made_longer(tmp_path: Path) -> None:
    state, again = tmp_path / "search.json", list[Any]()
    evolve(Digits(), descent, **{**SMALL, "generations": 2}, state_file=state)
    assert evolve(Digits(), _counted(again), **SMALL, state_file=state) == evolve(Digits(), descent, **SMALL)
    assert len(again) == 2 * 12


def test_the_state_of_another_search_is_refused(tmp_path: Path) -> None:
    state = tmp_path / "search.json"
    evolve(Digits(), descent, **SMALL, state_file=state)
    before = state.read_bytes()
    with pytest.raises(ValueError, match=r"of another search \(seed: 0 there, 3 here\)"):
        evolve(Digits(), descent, **SMALL, seed=3, state_file=state)
    with pytest.raises(ValueError, match=r"parameter_limit: \[10, 40\] there, \[0, 40\] here"):
        evolve(Digits(), descent, **{**SMALL, "parameter_limit": (0, 40)}, state_file=state)
    with pytest.raises(ValueError, match="another space: its candidate 0 is another one"):
        evolve(noah(parameters=lambda candidate: 10), width, **SMALL, state_file=state)
    assert state.read_bytes() == before
    for content in ("", "{}", "[1]", before.decode()[:-20]):
        state.write_text(content)
        with pytest.raises(ValueError, match="holds no search"):
            evolve(Digits(), descent, **SMALL, state_file=state)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"population": 0}, "population must be an integer of at least 1, got 0"),
        ({"generations": 1.5}, "generations must be an integer of at least 1, got 1.5"),
        ({"mutants": 9}, "must fit into the population, 12, got 9"),
        ({"mutation_probability": 1.2}, r"mutation_probability must be in \[0, 1\], got 1.2"),
        ({"parameter_limit": (5, 4)}, r"parameter_limit must be \(least, most\), got \(5, 4\)"),
        ({"parameter_limit": (1000, 2000)}, "none of 120 random candidates has from 1,000 to 2,000 parameters"),
    ],
)
def test_what_cannot_be_searched_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evolve(Digits(), descent, **{**SMALL, **changes})


def test_a_fitness_or_candidate_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="fitness must be a finite number, got nan for candidate"):
        evolve(Digits(), lambda candidate: float("nan"), **SMALL)

    class Sets(Digits):
        def sample(self, rng: random.Random) -> Any:
            return {1, 2}

    with pytest.raises(TypeError, match="a candidate must be a JSON value"):
        evolve(Sets(), descent, **SMALL)


def test_the_bar_says_where_the_search_is(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("fastadapt.progress.is_live", lambda console: True)
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes the captured stderr for a terminal
    evolve(Digits(), descent, **{**SMALL, "progress": True})
    shown = capsys.readouterr()
    assert "generation 3, best" in shown.err
    assert shown.out == ""
    evolve(Digits(), descent, **SMALL)
    assert capsys.readouterr() == ("", "")


# The published spaces


def searched(**fields: Any) -> Any:
    config = GLoRAConfig(**{"supernet": True, "ranks": [4, 2, 1], "target_modules": ["up", "down"], **fields})
    return inject(tiny_models.mlp(), config)


def test_glora_candidates_have_the_published_genes() -> None:
    space, rng = GLoRASpace(searched(), ranks=[4, 2]), random.Random(0)
    candidates = [space.sample(rng) for _ in range(2000)]
    low_rank, plain = {"lora:4", "lora:2"}, {"vector", "constant", "none"}
    expected = [low_rank | plain, low_rank | plain, low_rank | {"vector", "none"}, plain, plain]
    for index, options in enumerate(expected):
        counts = Counter(candidate["up"][index] for candidate in candidates)
        assert set(counts) == options
        assert min(counts.values()) > 0.85 * 2000 / len(options)
    assert {tuple(candidate["down"][2:]) for candidate in candidates} == {("none", "none", "none")}


def test_glora_mutants_resample_and_crossings_mix_each_gene() -> None:
    space, rng = GLoRASpace(searched()), random.Random(0)
    parent = space.uniform(["none", "none", "none", "none", "none"])
    mutants = [space.mutate(rng, parent, 0.2) for _ in range(3000)]
    # A gene that is drawn anew may be what it was: one of six options for A and B.
    for index, options in enumerate((6, 6, 5, 3, 3)):
        changed = sum(mutant["up"][index] != "none" for mutant in mutants) / 3000
        assert changed == pytest.approx(0.2 * (1 - 1 / options), abs=0.025)
    assert [mutant for mutant in mutants[:50] if space.mutate(rng, mutant, 0.0) != mutant] == []
    other = space.uniform(["vector", "vector", "vector", "vector", "vector"])
    crossings = [space.cross(rng, parent, other) for _ in range(3000)]
    for index in range(5):
        share = sum(crossing["up"][index] == "vector" for crossing in crossings) / 3000
        assert share == pytest.approx(0.5, abs=0.04)
    assert len({str(crossing) for crossing in crossings}) == 2**7  # five genes, and two without a bias
    assert parent == space.uniform(["none"] * 5)


def test_glora_candidates_are_applied_and_counted() -> None:
    model = searched()
    space = GLoRASpace(model)
    candidate = space.uniform(["lora:2", "vector", "vector", "constant", "vector"])
    assert candidate["down"] == ["lora:2", "vector", "none", "none", "none"]
    space.apply(candidate)
    assert model.up.adapters["default"].chosen == tuple(candidate["up"])
    assert space.parameters(candidate) == (2 * 48 + 28 + 20 + 1 + 28) + (2 * 48 + 20)
    largest = space.uniform(["lora:4", "lora:4", "lora:4", "vector", "vector"])
    assert space.parameters(largest) == fastadapt.trainable_parameters(model).trainable


def test_only_a_supernet_has_a_space() -> None:
    fixed = inject(tiny_models.mlp(), GLoRAConfig(target_modules=["up"]))
    with pytest.raises(ValueError, match=r"must be GLoRAConfig\(supernet=True\)"):
        GLoRASpace(fixed)
    with pytest.raises(ValueError, match=r"must be GLoRAConfig\(supernet=True\)"):
        GLoRASpace(inject(tiny_models.mlp(), LoRAConfig(target_modules=["up"])))
    with pytest.raises(ValueError, match=r"ranks must be some of the supernet's, \[4, 2, 1\], got \[3\]"):
        GLoRASpace(searched(), ranks=[3])


def noah(**changes: Any) -> NOAHSpace:
    settings = {"parameters": lambda c: sum(map(sum, c.values())), "apply": lambda c: None, **changes}
    return NOAHSpace(12, **settings)


def depth(dims: list[int]) -> int:
    active = sum(1 for dim in dims if dim)
    assert dims[active:] == [0] * (12 - active)
    assert set(dims[:active]) <= {1, 5, 10}
    return active


def test_noah_candidates_are_first_blocks_of_some_dims() -> None:
    space, rng = noah(), random.Random(0)
    candidates = [space.sample(rng) for _ in range(800)]
    for name in ("prompts", "lora", "adapter"):
        counts = Counter(depth(candidate[name]) for candidate in candidates)
        assert set(counts) == {3, 6, 9, 12}
        assert min(counts.values()) > 150
    assert len({tuple(depth(candidate[name]) for name in candidate) for candidate in candidates}) == 4**3


def test_noah_mutants_extend_or_truncate_and_crossings_swap_lists() -> None:
    space, rng = noah(), random.Random(0)
    parent, other = space.sample(random.Random(1)), space.sample(random.Random(2))
    changed = 0
    for _ in range(4000):
        mutant = space.mutate(rng, parent, 0.2)
        for name, dims in mutant.items():
            common = min(depth(dims), depth(parent[name]))
            assert dims[:common] == parent[name][:common]
            changed += depth(dims) != depth(parent[name])
    # In 0.2 · 0.4 of the lists a depth is drawn, one of four of which is the old one.
    assert changed / 12000 == pytest.approx(0.2 * 0.4 * 3 / 4, abs=0.01)
    crossings = [space.cross(rng, parent, other) for _ in range(200)]
    assert {str(crossing[name]) for crossing in crossings for name in crossing} <= {
        str(candidate[name]) for candidate in (parent, other) for name in parent
    }
    assert len({str(crossing) for crossing in crossings}) == 8


def test_noah_is_searched_by_the_same_searcher() -> None:
    applied: list[Any] = []
    space = noah(apply=applied.append)
    found = evolve(space, lambda c: float(sum(c["lora"]) - sum(c["prompts"])), **{**SMALL, "parameter_limit": (0, 200)})
    assert found.best.fitness > max(scored.fitness for scored in found.history[:12])
    assert applied[-1] == found.best.candidate


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"dims": (0, 5)}, "dims must be positive"), ({"depths": (3, 13)}, "depths must be from 0 to 12")],
)
def test_a_noah_that_cannot_be_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        noah(**changes)


# From a supernet to a file


def teacher_data(rows: int, seed: int) -> tuple[Tensor, Tensor]:
    """Inputs and what an MLP with another bias and another scale of its features makes of them."""
    teacher = tiny_models.mlp()
    with torch.no_grad():
        teacher.up.bias.add_(1.5)
        teacher.down.weight.mul_(torch.linspace(-1, 2, 20)[:, None])
        x = torch.randn(rows, 20, generator=torch.Generator().manual_seed(seed))
        return x, teacher(x)


def test_from_a_trained_supernet_to_an_adapter_that_peft_loads(tmp_path: Path) -> None:
    model: Any = searched(ranks=[4, 2]).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    x, y = teacher_data(64, 1)
    torch.manual_seed(0)
    for _ in range(250):
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()
    model.eval()
    space = GLoRASpace(model)
    validation, target = teacher_data(64, 2)

    @torch.no_grad()
    def fitness(candidate: Any) -> float:
        return -float((model(validation) - target).square().mean())

    with torch.no_grad(), fastadapt.disable_adapter(model):
        start = fitness(None)
    uniform = []
    for kind in ("lora:4", "lora:2", "vector", "constant"):
        candidate = space.uniform([kind, kind, "vector" if kind == "constant" else kind, *_vectors(kind)])
        if space.parameters(candidate) <= 600:
            space.apply(candidate)
            uniform.append(fitness(candidate))
    settings: dict[str, Any] = {"parameter_limit": (0, 600), "population": 20, "generations": 6, "archive": 6}
    found: Result = evolve(space, fitness, **settings, mutants=8, crossovers=8, progress=False)
    assert found.best.fitness >= max(uniform) > start
    assert fitness(None) == found.best.fitness  # the best is set
    fastadapt.export_glora(model, tmp_path)
    with quiet_peft():
        peft = PeftModel.from_pretrained(tiny_models.mlp(), tmp_path).eval()
    assert close(peft(validation), model(validation))


def _vectors(kind: str) -> list[str]:
    return [kind if kind == "constant" else "vector"] * 2


def test_a_head_is_not_counted() -> None:
    model = inject(
        nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)),
        GLoRAConfig(supernet=True, ranks=[1], target_modules=["0"], modules_to_save=["1"]),
    )
    space = GLoRASpace(model)
    assert space.parameters(space.uniform(["lora:1", "none", "none", "none", "constant"])) == 7 + 1
