"""Has the jobs done within a budget of seconds: kernels compiled by many workers, then one job after the other."""

from __future__ import annotations

import os
import queue
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.gpu.crew import Answer, Worker
from bench.gpu.job import GUESSED, Job, Rates
from bench.gpu.journal import Journal
from fastadapt.progress import progress_bar

# A job to be done, or the provider of one whose kernels are to be compiled.
Unit = tuple[Job, str | None]

# Of the budget, for compiling: what is not compiled by then is when its turn comes.
_COMPILING = 0.2
# Kept of the budget for the picture and the tables.
_CLOSING = 4.0


@dataclass
class Plan:
    """jobs, in their order. seconds: the budget. patience: seconds that a job may take beyond three times what it is
    expected to. workers: how many compile, beside each other; 0 for none."""

    jobs: Sequence[Job]
    program: str
    device: str
    seconds: float
    patience: float = 45.0
    workers: int = 0
    timing: float = 0.2
    tune: bool = False
    started: float = field(default_factory=time.monotonic)

    @property
    def device_type(self) -> str:
        return self.device.partition(":")[0]

    @property
    def left(self) -> float:
        """Seconds of the budget that are left for jobs."""
        return self.started + self.seconds - _CLOSING - time.monotonic()


def conduct(plan: Plan, journal: Journal) -> None:
    """Does the jobs, each kept in the journal as soon as it is done; what does not fit is listed as not run.

    Whatever ends it, the journal is whole and no worker is left. Raises StartError where a worker cannot begin.
    """
    waiting = list(plan.jobs)
    crew = [Worker(plan.program, plan.device) for _ in range(max(1, plan.workers))]
    try:
        if plan.workers:
            waiting = _compile(plan, crew, journal)
        for worker in crew[1:]:
            worker.close()
        _work_off(plan, crew[0], journal, waiting)
        journal.document["ended"] = "complete" if not waiting else "out of time"
    except BaseException as problem:
        journal.document["ended"] = f"killed: {type(problem).__name__}"
        raise
    finally:
        for worker in crew:
            worker.close()
        done = {entry["job"] for entry in journal.document["jobs"]}
        for job in plan.jobs:
            if job.label not in done:
                journal.job(job.label, "not run", None, job.expected(_rates(plan, journal)))
        journal.write()


def _rates(plan: Plan, journal: Journal) -> Rates:
    return journal.rates or GUESSED[plan.device_type]


def _request(plan: Plan, journal: Journal, job: Job, left_out: dict[str, str]) -> dict[str, Any]:
    request = {"job": job.label, "seconds": plan.timing, "left_out": left_out, "tune": plan.tune}
    return request | {"wrong": sorted(journal.wrong)}


def _work_off(plan: Plan, worker: Worker, journal: Journal, waiting: list[Job]) -> None:
    """One job after the other, as long as they fit; takes those that ran from `waiting`."""
    pace = _Pace()
    with progress_bar("jobs", len(waiting)) as update:
        for job in list(waiting):
            update(advance=1, description=job.label)
            expected = job.expected(_rates(plan, journal))
            # A cheaper one further down may still fit.
            if pace.of(expected) > plan.left:
                continue
            waiting.remove(job)
            answer = _done(plan, worker, journal, job)
            _keep(plan, journal, job, answer)
            if not answer.broke:
                pace.add(expected, answer.seconds)


class _Pace:
    """How many times as long as expected the jobs of this run take."""

    def __init__(self) -> None:
        self.expected = self.taken = 0.0

    def of(self, expected: float) -> float:
        return expected * max(1.0, self.taken / self.expected if self.expected else 1.0)

    def add(self, expected: float, taken: float) -> None:
        self.expected += expected
        self.taken += taken


def _done(plan: Plan, worker: Worker, journal: Journal, job: Job) -> Answer:
    """Has a job done; where a provider breaks the worker, again without it, so that the others have their rows."""
    left_out: dict[str, str] = {}
    providers = job.providers(plan.device_type)
    while True:
        limit = min(plan.patience + 3 * job.expected(_rates(plan, journal)), max(plan.left, 0.5))
        answer = worker.ask(_request(plan, journal, job, left_out), limit)
        if not answer.broke or answer.at in left_out or answer.at not in providers or plan.left < limit / 4:
            return answer
        left_out[answer.at] = f"{answer.status}: {answer.note}"


def _keep(plan: Plan, journal: Journal, job: Job, answer: Answer) -> None:
    status, note = answer.status, answer.note
    if status == "hung" and plan.left <= 0:
        status = "out of time"  # it is not known to hang
    if answer.broke and answer.at:
        note = f"{answer.at}: {note}"
    journal.add(job.part, answer.rows)
    journal.job(job.label, status, answer.seconds, job.expected(_rates(plan, journal)), note)
    journal.write()


def _compile(plan: Plan, crew: list[Worker], journal: Journal) -> list[Job]:
    """Fills Triton's cache by many workers, which do the checks as well; gives the jobs that are left, in their order.

    A cache that was brought along is found there, and nothing is compiled again.
    """
    checks = [job for job in plan.jobs if job.part == "checks"]
    first = next((index for index, job in enumerate(plan.jobs) if job.part != "checks"), 0)
    idle: queue.SimpleQueue[Worker] = queue.SimpleQueue()
    for worker in crew:
        idle.put(worker)
    started, end = time.monotonic(), time.monotonic() + _COMPILING * plan.seconds
    report: dict[str, Any] = {"workers": len(crew), "cached_before": cached_kernels(), "failed": []}

    def task(job: Job, provider: str | None) -> Answer | None:
        if time.monotonic() > end:
            return None
        worker = idle.get()
        try:
            request = _request(plan, journal, job, {})
            if provider is None:
                return _done(plan, worker, journal, job)
            return worker.ask(request | {"compile": provider}, plan.patience)
        finally:
            idle.put(worker)

    # Nothing is timed before the first checks; the others can wait for the kernels of the times.
    units: list[Unit] = [(job, None) for job in checks[:first]]
    timed = [job for job in plan.jobs if job not in checks]
    units += [(job, provider) for job in timed for provider in job.to_compile(plan.device_type)]
    units += [(job, None) for job in checks[first:]]
    left = list(plan.jobs)
    for (job, provider), answer in _side_by_side(units, task, len(crew), crew):
        if answer is None:  # there was no time
            continue
        if provider is None:
            left.remove(job)
            _keep(plan, journal, job, answer)
        elif answer.status != "ok":
            report["failed"].append(f"{job.label} {provider}: {answer.status}: {answer.note}")
    report |= {"seconds": time.monotonic() - started, "cached_after": cached_kernels()}
    journal.document["compiling"] = report
    journal.write()
    return left


def _side_by_side(
    units: Sequence[Unit], task: Callable[[Job, str | None], Answer | None], count: int, crew: Sequence[Worker]
) -> Iterator[tuple[Unit, Answer | None]]:
    """What becomes of each, as they end. Left before, it stops the workers, for which threads would wait."""
    with _threads(count, crew) as pool, progress_bar("compiling", len(units)) as update:
        futures: dict[Future[Answer | None], Unit] = {pool.submit(task, *unit): unit for unit in units}
        waiting = set(futures)
        while waiting:
            # Not for ever: a signal must come through.
            ended, waiting = wait(waiting, timeout=0.5, return_when=FIRST_COMPLETED)
            for future in ended:
                job, provider = futures[future]
                update(advance=1, description=f"compiling {job.label} {provider or ''}")
                yield (job, provider), future.result()


@contextmanager
def _threads(count: int, crew: Sequence[Worker]) -> Iterator[ThreadPoolExecutor]:
    pool = ThreadPoolExecutor(count)
    try:
        yield pool
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        for worker in crew:
            worker.close()
        raise
    finally:
        pool.shutdown()


def cached_kernels() -> int:
    """The compiled kernels in Triton's cache."""
    place = Path(os.environ.get("TRITON_CACHE_DIR") or Path.home() / ".triton" / "cache")
    return sum(1 for _ in place.rglob("*.cubin")) + sum(1 for _ in place.rglob("*.hsaco"))
