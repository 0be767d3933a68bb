"""Evolutionary search for the best candidate of a space: the configurations of a supernet, or anything else.

The search itself is deterministic, and a fitness costs far more than everything else. So the state of an interrupted
search is no more than the fitness of each candidate so far: it is run again from its start, and looks those up.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from ..checks import shown
from ..files import written_whole
from ..progress import progress_bar

FORMAT = 1
# As in the published searches: so many tries for each candidate that is wanted.
TRIES = 10


class SearchSpace(Protocol):
    """What can be searched. A candidate is a JSON value: lists and dicts of strings and numbers.

    All randomness must come from `rng`; a candidate that is given must not be changed.
    """

    def sample(self, rng: random.Random) -> Any:
        """Any candidate."""

    def mutate(self, rng: random.Random, candidate: Any, probability: float) -> Any:
        """A candidate each of whose genes is another with that probability."""

    def cross(self, rng: random.Random, a: Any, b: Any) -> Any:
        """A candidate that has each gene from one of the two."""

    def parameters(self, candidate: Any) -> int:
        """How many parameters a candidate has."""

    def apply(self, candidate: Any) -> None:
        """Makes the model compute as this candidate."""


class Scored(NamedTuple):
    """A candidate that was evaluated, and in which generation."""

    candidate: Any
    parameters: int
    fitness: float
    generation: int


class Result(NamedTuple):
    """What a search found: the best candidate, the best few, and all in the order of their evaluation."""

    best: Scored
    archive: list[Scored]
    history: list[Scored]


class _Breeder:
    """New legal candidates: each is drawn once in a search."""

    def __init__(self, space: SearchSpace, limits: tuple[int, int], seed: int) -> None:
        self.space = space
        self.limits = limits
        self.rng = random.Random(seed)
        self.seen: set[str] = set()

    def breed(self, count: int, make: Callable[[random.Random], Any]) -> list[tuple[Any, int]]:
        """(candidate, parameters) of up to `count` candidates, as many as are found in ten times as many tries."""
        found: list[tuple[Any, int]] = []
        low, high = self.limits
        for _ in range(TRIES * count):
            if len(found) == count:
                break
            candidate = make(self.rng)
            name = _name(candidate)
            if name in self.seen:
                continue
            parameters = self.space.parameters(candidate)
            if low <= parameters <= high:
                self.seen.add(name)
                found.append((candidate, parameters))
        return found

    def population(
        self, size: int, parents: list[Any], mutants: int, crossovers: int, probability: float
    ) -> list[tuple[Any, int]]:
        """(candidate, parameters) of a generation: mutants and crossovers where there are parents, the rest random."""
        space = self.space

        def mutant(rng: random.Random) -> Any:
            return space.mutate(rng, rng.choice(parents), probability)

        def crossing(rng: random.Random) -> Any:
            return space.cross(rng, rng.choice(parents), rng.choice(parents))

        found = self.breed(mutants, mutant) + self.breed(crossovers, crossing) if parents else []
        return found + self.breed(size - len(found), space.sample)


def _name(candidate: Any) -> str:
    """A name that equal candidates share. Raises TypeError for one that is no JSON value."""
    try:
        text = json.dumps(candidate, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise TypeError(f"a candidate must be a JSON value, lists and dicts of strings and numbers: {error}") from None
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class _Record:
    """The fitness of each candidate so far, in a file where one is given, which is replaced after each."""

    def __init__(self, path: Path | None, settings: dict[str, Any]) -> None:
        self.path = path
        self.settings = settings
        self.scores: list[tuple[str, float]] = []
        if path is not None and path.exists():
            self.scores = self._read(path)

    def _read(self, path: Path) -> list[tuple[str, float]]:
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            form, settings = document["format"], document["search"]
            scores = [(str(name), float(fitness)) for name, fitness in document["scores"]]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"state_file {path} holds no search ({error}): name another file") from None
        if form != FORMAT:
            raise ValueError(f"state_file {path} has format {form}, and this version of fastadapt has {FORMAT}")
        changed = [name for name in self.settings if settings.get(name) != self.settings[name]]
        if changed:
            what = "; ".join(f"{name}: {settings.get(name)} there, {self.settings[name]} here" for name in changed)
            raise ValueError(f"state_file {path} is of another search ({what}): name another file")
        return scores

    def known(self, index: int, candidate: Any) -> float | None:
        """The fitness of the candidate that comes at this place, None where it has not been evaluated yet."""
        if index >= len(self.scores):
            return None
        name, fitness = self.scores[index]
        if name != _name(candidate):
            raise ValueError(
                f"state_file {self.path} is of a search in another space: its candidate {index} is another one; name "
                "another file"
            )
        return fitness

    def add(self, candidate: Any, fitness: float) -> None:
        self.scores.append((_name(candidate), fitness))
        if self.path is None:
            return
        document = {"format": FORMAT, "search": self.settings, "scores": self.scores}
        with written_whole(self.path) as draft:
            draft.write_text(json.dumps(document), encoding="utf-8")


def _check(name: str, value: int, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")


def evolve(
    space: SearchSpace,
    fitness: Callable[[Any], float],
    *,
    population: int = 50,
    generations: int = 20,
    archive: int = 10,
    mutants: int = 25,
    crossovers: int = 25,
    mutation_probability: float = 0.2,
    parameter_limit: tuple[int, int] = (0, 1_000_000),
    seed: int = 0,
    state_file: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Result:
    """Evolutionary search: the candidate of `space` with the largest fitness among those that are legal.

    The first of `generations` populations is random; each later one has `mutants` of the archive, `crossovers` of two
    of the archive, and is filled up with random candidates. The archive holds the best of all so far. A candidate is
    legal where parameter_limit[0] <= parameters <= parameter_limit[1], and none is drawn twice; where ten times as many
    tries as are needed do not find enough, a population stays smaller. space.apply(candidate) comes before
    fitness(candidate), and the best is applied at the end. Of equals the first is better.

    seed: the search is deterministic, as far as fitness is. state_file: keeps what is known after each candidate, so
    that the same call goes on after a kill at any moment, and ends as if there had been none; more generations may
    be asked for then. progress: a bar, where rich is installed.
    Raises ValueError for a number outside its range, limits that no candidate of the first population keeps, a fitness
    that is not finite, or a state_file of another search; TypeError for a candidate that is no JSON value.
    Source: Chavan et al. 2023, arXiv:2306.07967, section 3.4; Zhang et al. 2022, arXiv:2206.04673, section 3.3.
    """
    for name, value, least in (
        ("population", population, 1),
        ("generations", generations, 1),
        ("archive", archive, 1),
        ("mutants", mutants, 0),
        ("crossovers", crossovers, 0),
    ):
        _check(name, value, least)
    if mutants + crossovers > population:
        raise ValueError(
            f"mutants and crossovers must fit into the population, {population}, got {mutants} + {crossovers}"
        )
    if not 0 <= mutation_probability <= 1:
        raise ValueError(f"mutation_probability must be in [0, 1], got {mutation_probability!r}")
    low, high = parameter_limit
    if low > high:
        raise ValueError(f"parameter_limit must be (least, most), got ({low}, {high})")

    settings = {
        "population": population,
        "archive": archive,
        "mutants": mutants,
        "crossovers": crossovers,
        "mutation_probability": mutation_probability,
        "parameter_limit": [low, high],
        "seed": seed,
    }
    record = _Record(None if state_file is None else Path(state_file), settings)
    breeder = _Breeder(space, (low, high), seed)
    history: list[Scored] = []
    best: list[Scored] = []

    def evaluated(candidate: Any) -> float:
        space.apply(candidate)
        score = float(fitness(candidate))
        if not math.isfinite(score):
            raise ValueError(f"fitness must be a finite number, got {score} for candidate {shown(candidate)}")
        record.add(candidate, score)
        return score

    with progress_bar("search", population * generations, done=len(record.scores), wanted=progress) as update:
        for generation in range(generations):
            parents = [scored.candidate for scored in best]
            found = breeder.population(population, parents, mutants, crossovers, mutation_probability)
            if not found and not generation:
                raise ValueError(
                    f"parameter_limit: none of {TRIES * population} random candidates has from {low:,} to {high:,} "
                    "parameters: widen the limits"
                )
            for candidate, parameters in found:
                known = record.known(len(history), candidate)
                score = evaluated(candidate) if known is None else known
                history.append(Scored(candidate, parameters, score, generation))
                best = sorted([*best, history[-1]], key=lambda scored: -scored.fitness)[:archive]
                if known is None:
                    update(advance=1, description=f"generation {generation}, best {best[0].fitness:.4g}")
    space.apply(best[0].candidate)
    return Result(best[0], best, history)
