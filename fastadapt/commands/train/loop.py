"""The training loop of `fastadapt train`: steps, evaluation, and the state that a stopped run goes on from."""

from __future__ import annotations

import contextlib
import math
import random
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from types import FrameType
from typing import Any, NamedTuple, Protocol

import torch

from ...methods import METHODS, AdapterConfig
from ...model.adapted import adapter_configs
from ...model.inject import control, inject
from ...training.chunked_loss import chunk_loss
from ...training.state import load_tensors, trained_tensors
from ..batches import Batch, Row, collate, epoch_batches, length
from . import state as train_state
from .options import Options
from .world import World

ADAPTER = "default"


class Evaluation(NamedTuple):
    """After `step` steps: mean loss in nats over all targets (tokens or rows), and the share of rows that are right."""

    step: int
    loss: float
    accuracy: float | None


class Interrupted(KeyboardInterrupt):
    """A signal came; the step that it came in was finished and saved."""

    def __init__(self, signum: int, step: int, steps: int) -> None:
        super().__init__(f"stopped after step {step} of {steps}, which is saved: the same command goes on from there")
        self.signum = signum


class Display(Protocol):
    """What is shown while a run goes on."""

    def step(self, step: int, loss: float, rate: float) -> None: ...

    def evaluated(self, evaluation: Evaluation) -> None: ...


@torch.no_grad()
def evaluate(model: Any, rows: Sequence[Row], batch_size: int, padding: int, step: int = 0) -> Evaluation:
    """Mean loss over all targets of `rows`, and the accuracy where they have classes.

    Random numbers are as if it had not been; the model is in eval mode afterwards.
    """
    model.eval()
    device = model.device
    total, targets, right = 0.0, 0, 0
    ordered = sorted(rows, key=length)
    classes = isinstance(ordered[0].labels, int)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        for start in range(0, len(ordered), batch_size):
            part = ordered[start : start + batch_size]
            batch = collate(part, padding, device)
            output = model(**batch)
            counted = sum(row.targets for row in part)
            total += float(output.loss) * counted
            targets += counted
            if classes:
                right += int((output.logits.argmax(-1) == batch["labels"]).sum())
    return Evaluation(step, total / targets, right / targets if classes else None)


@contextlib.contextmanager
def noted_signals() -> Iterator[list[int]]:
    """The first SIGINT or SIGTERM inside the block is noted in the list that this yields; another one interrupts."""
    noted: list[int] = []

    def note(signum: int, frame: FrameType | None) -> None:
        if noted:
            raise KeyboardInterrupt
        noted.append(signum)

    if threading.current_thread() is not threading.main_thread():
        yield noted  # only the main thread may set handlers
        return
    former = {signum: signal.signal(signum, note) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield noted
    finally:
        for signum, handler in former.items():
            signal.signal(signum, handler)


class _Batches:
    """The first epoch's batches, as often as they are asked for."""

    def __init__(self, training: Training) -> None:
        self.training = training

    def __iter__(self) -> Iterator[Batch]:
        for step in range(self.training.steps_an_epoch):
            for rows in self.training.parts(step):
                yield collate(rows, self.training.padding, self.training.model.device)


class Training:
    """A model, the adapter that is trained in it, and how far that has come: `begin` or `resume`, then `run`."""

    def __init__(
        self,
        model: Any,
        options: Options,
        settings: dict[str, Any],
        rows: list[Row],
        heldout: list[Row],
        padding: int,
        world: World | None = None,
    ) -> None:
        self.world = World() if world is None else world
        self.model, self.options, self.settings, self.padding = model, options, settings, padding
        self.rows, self.heldout = rows, heldout
        self.lengths = [length(row) for row in rows]
        # The rows of a step: each process has a batch of its own.
        self.step_rows = options.batch_size * options.accumulate * self.world.size
        self.steps_an_epoch = math.ceil(len(rows) / self.step_rows)
        self.steps = options.steps_of(self.steps_an_epoch)
        self.eval_every = options.eval_every or max(1, self.steps // 10)
        self.save_every = options.save_every or max(1, self.steps // 10)
        self.step = 0
        self.losses: list[float] = []
        self.evaluations: list[Evaluation] = []
        self.tokens = 0
        self.seconds = self.step_seconds = 0.0
        self._epoch: tuple[int, list[list[int]]] = (-1, [])

    def begin(self, **fields: Any) -> None:
        """Puts a new adapter into the model and saves checkpoint-0. fields: what its config says beside the options."""
        options = self.options
        random.seed(options.seed)
        torch.manual_seed(options.seed)
        config = options.recipe.config(
            options.rank, options.scale, options.dropout, self.steps, target_modules=options.targets, **fields
        )
        inject(self.model, config, ADAPTER)
        options.recipe.prepare(self.model, _Batches(self), ADAPTER)
        self.world.same(list(trained_tensors(self.model, ADAPTER).values()))
        # What is dropped differs from process to process.
        if self.world.size > 1:
            torch.manual_seed(options.seed * self.world.size + self.world.rank)
        self._chunk_loss()
        # Training may change the config: what a resumed run must build first is this one.
        config = adapter_configs(self.model)[ADAPTER]
        self.config = {**asdict(config), "peft_type": config.peft_type}
        self.control = control(self.model, ADAPTER)
        self._make_optimizer()
        self.save()

    def resume(self, state: dict[str, Any]) -> None:
        """Puts the adapter of a checkpoint into the model and takes up its state."""
        self.config = state["config"]
        method: type[AdapterConfig] = METHODS[self.config["peft_type"]]
        inject(self.model, method.from_peft(self.config), ADAPTER)
        # A method that gives ranks away may shape its tensors by its state.
        self.control = control(self.model, ADAPTER)
        self.control.load_state_dict(state["control"])
        load_tensors(self.model, ADAPTER, state["tensors"], "or use --overwrite")
        self._chunk_loss()
        self._make_optimizer()
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        for name in ("step", "losses", "tokens", "seconds", "step_seconds"):
            setattr(self, name, state[name])
        self.evaluations = [Evaluation(*values) for values in state["evaluations"]]
        generators = state["random"][self.world.rank] if self.world.size > 1 else state["random"]
        random.setstate(generators["python"])
        torch.set_rng_state(generators["torch"])
        if "cuda" in generators:
            torch.cuda.set_rng_state(generators["cuda"], self.model.device)

    def _chunk_loss(self) -> None:
        """All logits of a batch are never there: of 8 rows of 1,024 tokens SmolLM2's alone are 1.6 GB."""
        # A classifier's logits are few, and a head that is more than a linear layer keeps its model's own loss.
        with contextlib.suppress(ValueError):
            chunk_loss(self.model, evaluation=True)

    def _make_optimizer(self) -> None:
        options = self.options
        self.optimizer = options.recipe.optimizer(self.model, options.learning_rate, options.weight_decay)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: options.rate_at(step, self.steps)
        )

    def state(self) -> dict[str, Any]:
        """Everything that the rest of the run depends on beside the base model and the data."""
        generators: dict[str, Any] = {"python": random.getstate(), "torch": torch.get_rng_state()}
        if self.model.device.type == "cuda":
            generators["cuda"] = torch.cuda.get_rng_state(self.model.device)
        return {
            "settings": self.settings,
            "threads": torch.get_num_threads(),
            "config": self.config,
            "tensors": trained_tensors(self.model, ADAPTER),
            "control": self.control.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "random": self.world.gathered(generators) if self.world.size > 1 else generators,
            "steps": self.steps,
            "step": self.step,
            "losses": self.losses,
            "evaluations": [list(evaluation) for evaluation in self.evaluations],
            "tokens": self.tokens,
            "seconds": self.seconds,
            "step_seconds": self.step_seconds,
        }

    def save(self) -> None:
        """Writes a checkpoint; what differs from process to process is in it by rank."""
        state, options = self.state(), self.options
        self.world.decided(lambda: train_state.save(options.output, self.step, state, options.keep))

    def parts(self, step: int) -> list[list[Row]]:
        """The rows of the step of this index, in micro-batches, of all processes.

        A step has batch_size · accumulate rows a process however they are divided, so that a run does not depend on it.
        """
        size = self.options.batch_size
        epoch, place = divmod(step, self.steps_an_epoch)
        if self._epoch[0] != epoch:
            order = epoch_batches(self.lengths, self.step_rows, self.options.seed, epoch)
            self._epoch = (epoch, order)
        indices = self._epoch[1][place]
        return [[self.rows[index] for index in indices[start : start + size]] for start in range(0, len(indices), size)]

    def take_step(self) -> float:
        """One optimizer step; returns its loss, the mean over all targets of its rows.

        Each micro-batch's loss is the mean over its own targets, so it counts by how many of the step's it has. Each
        process takes its share of them; the sum of their gradients is that of all.
        Raises ValueError where the loss or the gradient is not finite; the parameters are then as before.
        """
        parts = self.parts(self.step)
        counts = [sum(row.targets for row in part) for part in parts]
        mean = 0.0
        world = self.world
        for index in range(world.rank, len(parts), world.size):
            part, share = parts[index], counts[index] / sum(counts)
            loss = self.model(**collate(part, self.padding, self.model.device)).loss
            # The regularizer depends on the parameters alone, so once a step is enough.
            (loss * share if index else loss * share + self.control.regularizer()).backward()
            mean += share * loss.item()
        self.tokens += sum([length(row) for part in parts for row in part])
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        world.sum_gradients(parameters)
        (mean,) = world.sum([mean], self.model.device)
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.options.max_grad_norm or math.inf)
        if not math.isfinite(mean) or not math.isfinite(norm):
            what = f"loss is {mean}" if not math.isfinite(mean) else f"gradient's norm is {float(norm)}"
            kept = max(train_state.checkpoints(self.options.output), default=0)
            raise ValueError(
                f"step {self.step + 1}: the {what}, and training cannot go on; checkpoint-{kept} is kept. Start anew "
                f"with a --lr below {self.options.learning_rate:g} or more --warmup, and --overwrite; if that does not "
                "help, look for a damaged row in DATA or take --dtype float32"
            )
        self.optimizer.step()
        self.control.step()
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.losses.append(mean)
        return mean

    def evaluate(self, display: Display) -> None:
        """Evaluates the rows held out, where there are any, and puts the model back into training mode."""
        if self.heldout:
            found = evaluate(self.model, self.heldout, self.options.batch_size, self.padding, self.step)
            self.evaluations.append(found)
            display.evaluated(found)
        self.model.train()

    def run(self, display: Display) -> None:
        """Takes the steps that are left. Raises Interrupted, with everything saved, after a signal."""
        with noted_signals() as signals:
            mark = time.perf_counter()
            self.model.train()
            if not self.evaluations:
                self.evaluate(display)
            while self.step < self.steps:
                started, rate = time.perf_counter(), self.schedule.get_last_lr()[0]
                loss = self.take_step()
                self.step_seconds += time.perf_counter() - started
                display.step(self.step, loss, float(rate))
                done = self.step == self.steps
                if done or self.step % self.eval_every == 0:
                    self.evaluate(display)
                self.seconds, mark = self.seconds + time.perf_counter() - mark, time.perf_counter()
                # A signal may have come to one process alone.
                signum = max(self.world.gathered(signals[0] if signals else 0))
                if done or signum or self.step % self.save_every == 0:
                    self.save()
                if signum and not done:
                    raise Interrupted(signum, self.step, self.steps)
            self.model.eval()
