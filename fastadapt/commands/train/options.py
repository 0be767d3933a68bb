"""What `fastadapt train` can be told, and which of it two runs must share to be the same run."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ...checks import check_probability
from ...files import sha256_of
from ...training.recipes import Recipe, recipes
from ..base_model import DTYPES, QUANTIZED, tokenizer_digest, weights_digest

# The share of the learning rate that is left when a share of the steps behind the warmup is done.
SCHEDULES: dict[str, Callable[[float], float]] = {
    "linear": lambda done: 1.0 - done,
    "constant": lambda done: 1.0,
    "cosine": lambda done: 0.5 + 0.5 * math.cos(math.pi * done),
}
EPOCHS = 3.0
EVAL_SHARE = 0.1
# These may change between a run and its continuation.
_FREE = ("output", "save_every", "keep", "overwrite", "json")


def _at_least(name: str, value: float | None, least: float, *, above: bool = False) -> None:
    if value is None or (math.isfinite(value) and (value > least if above else value >= least)):
        return
    raise ValueError(f"{name} must be {'above' if above else 'at least'} {least:g}, got {value:g}")


def flag(name: str) -> str:
    """The name of an option on the command line."""
    return name.upper() if name in ("model", "data") else "--" + name.replace("_", "-")


@dataclass(frozen=True)
class Options:
    """What the command line sets; None stands for a default that depends on the rest.

    model: directory or hub name; data, eval: .jsonl or .csv files; output: directory; json: one more place for
    train.json. r, lr: the recipe's; alpha: 2r; steps: those of so many epochs; device: cuda where there is one;
    quantize: nf4 or int8, the base's linear layers; dtype is then of nf4's products. max_length: the model's, 1024 at
    most; eval_every, save_every: a tenth of the steps.
    Raises ValueError for a value outside its range, by its name on the command line.
    """

    model: str
    data: Path
    output: Path
    method: str = "lora"
    r: int | None = None
    alpha: float | None = None
    dropout: float = 0.0
    target_modules: str = "all-linear"
    steps: int | None = None
    epochs: float | None = None
    batch_size: int = 8
    accumulate: int = 1
    lr: float | None = None
    weight_decay: float = 0.0
    warmup: float = 0.05
    schedule: str = "linear"
    max_grad_norm: float = 1.0
    seed: int = 0
    device: str | None = None
    dtype: str = "float32"
    quantize: str | None = None
    max_length: int | None = None
    eval: Path | None = None
    eval_share: float | None = None
    eval_every: int | None = None
    save_every: int | None = None
    keep: int = 1
    overwrite: bool = False
    json: Path | None = None

    def __post_init__(self) -> None:
        for name, known in (("method", recipes()), ("schedule", SCHEDULES), ("dtype", DTYPES)):
            if getattr(self, name) not in known:
                raise ValueError(f"{flag(name)} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        if self.quantize is not None and self.quantize not in QUANTIZED:
            raise ValueError(f"--quantize must be one of {', '.join(QUANTIZED)}, got {self.quantize!r}")
        if self.quantize == "int8" and self.dtype != "float32":
            raise ValueError(
                f"--quantize int8 multiplies in eight bits, beside float32, got --dtype {self.dtype}: leave it out, or "
                "take --quantize nf4"
            )
        for name in ("r", "steps", "batch_size", "accumulate", "eval_every", "save_every", "keep"):
            _at_least(flag(name), getattr(self, name), 1)
        for name in ("alpha", "epochs", "lr"):
            _at_least(flag(name), getattr(self, name), 0, above=True)
        for name in ("weight_decay", "warmup", "max_grad_norm", "seed", "eval_share"):
            _at_least(flag(name), getattr(self, name), 0)
        _at_least("--max-length", self.max_length, 2)
        check_probability("--dropout", self.dropout)
        for name, value in (("--warmup", self.warmup), ("--eval-share", self.eval_share or 0.0)):
            if value >= 1:
                raise ValueError(f"{name} must be a share below 1, got {value:g}")
        for one, other in (("steps", "epochs"), ("eval", "eval_share")):
            if getattr(self, one) is not None and getattr(self, other) is not None:
                raise ValueError(f"{flag(one)} and {flag(other)} say the same thing twice: give one of them")
        if not self.targets:
            raise ValueError('--target-modules must be names with commas between them, or "all-linear"')

    @property
    def recipe(self) -> Recipe:
        return recipes()[self.method]

    @property
    def rank(self) -> int:
        return self.r if self.r is not None else self.recipe.rank

    @property
    def scale(self) -> float:
        """lora_alpha."""
        return self.alpha if self.alpha is not None else 2 * self.rank

    @property
    def learning_rate(self) -> float:
        return self.lr if self.lr is not None else self.recipe.learning_rate

    @property
    def targets(self) -> list[str] | str:
        """target_modules as a config takes it."""
        names = [name.strip() for name in self.target_modules.split(",") if name.strip()]
        return "all-linear" if names == ["all-linear"] else names

    @property
    def held_share(self) -> float:
        """The share of DATA to hold out."""
        if self.eval is not None:
            return 0.0
        return EVAL_SHARE if self.eval_share is None else self.eval_share

    @property
    def torch_device(self) -> torch.device:
        """Raises ValueError for a device that is not there."""
        name = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        try:
            return torch.empty(0, device=name).device
        except (RuntimeError, AssertionError) as error:  # the latter is how torch says that it was built without CUDA
            raise ValueError(f"--device {name!r} cannot be used: {str(error).splitlines()[0]}") from error

    def steps_of(self, steps_an_epoch: int) -> int:
        """How many optimizer steps the run takes."""
        return self.steps or max(1, math.ceil((self.epochs or EPOCHS) * steps_an_epoch))

    def rate_at(self, step: int, steps: int) -> float:
        """The share of the learning rate in the step of this index: a linear warmup, then the schedule."""
        warm = round(self.warmup * steps)
        if step < warm:
            return (step + 1) / warm
        return SCHEDULES[self.schedule]((step - warm) / max(1, steps - warm))

    def settings(self) -> dict[str, Any]:
        """Everything that the trained weights depend on, as plain values; files by their sha256, the model's by what
        `weights_digest` and `tokenizer_digest` read of them."""
        chosen = {name: value for name, value in asdict(self).items() if name not in _FREE}
        return {
            **chosen,
            "weights": weights_digest(self.model),
            "tokenizer": tokenizer_digest(self.model),
            "data": sha256_of(self.data),
            "eval": None if self.eval is None else sha256_of(self.eval),
            "r": self.rank,
            "alpha": self.scale,
            "lr": self.learning_rate,
            "epochs": None if self.steps else self.epochs or EPOCHS,
            "eval_share": self.held_share,
            "device": str(self.torch_device),
        }


def differences(settings: dict[str, Any], former: dict[str, Any]) -> list[str]:
    """How a run's settings differ from those that it was begun with, as one says it; empty where they do not."""
    found = []
    for name in sorted(settings.keys() | former.keys()):
        now, then = settings.get(name), former.get(name)
        if name in ("weights", "tokenizer") and None in (now, then):
            continue  # of a run that did not note them
        if now != then and name == "weights":
            found.append(f"{flag('model')} has other weights")
        elif now != then and name == "tokenizer":
            found.append(f"{flag('model')} has another tokenizer")
        elif now != then and name == "processes":
            found.append(f"{now or 1} processes, then {then or 1}: start torchrun with as many")
        elif now != then:
            text = f"{flag(name)} {now}, then {then}"
            found.append(f"{flag(name)} has another content" if name in ("data", "eval") and now and then else text)
    return found
