"""What every adapter config says: where the adapter goes, and what PEFT's file of it means."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from types import UnionType
from typing import Any, ClassVar, Literal, TypeVar, get_args, get_origin, get_type_hints

import torch
from torch import Tensor, nn

from ..checks import shown
from ..layers.experts import AdapterExperts, is_experts, projections
from ..layers.kinds import AdapterConv2d, AdapterEmbedding, AdapterModule, AdapterNorm, AdapterParameter
from ..layers.layer import Adapter, AdapterLayer
from ..layers.linear import AdapterLinear
from ..layers.wrap import adapter_layer
from . import patterns

T = TypeVar("T")

# A key of a pattern that has nothing of an expression but the dots.
_PLAIN_KEY = re.compile(r"[\w.]+")

# Every method's config by the peft_type that its files carry. A config class enters it by being defined.
METHODS: dict[str, type[AdapterConfig]] = {}

# Those that PEFT has too: it reads their directories.
PEFT_TYPES: set[str] = set()

# The heads that a task type has `inject` train whole, by the names that PEFT looks for. A model need have only one.
TASK_HEADS: dict[str, tuple[str, ...]] = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}

# The usual names of the layers of each kind.
KINDS: dict[type[AdapterLayer], tuple[str, ...]] = {
    AdapterLinear: ("Linear", "Conv1D"),
    AdapterEmbedding: ("Embedding",),
    AdapterConv2d: ("Conv2d",),
    AdapterNorm: ("LayerNorm",),
    AdapterModule: ("modules of several layers",),
    AdapterExperts: ("experts",),
    AdapterParameter: ("routers",),
}


def pattern_value(field: str, pattern: dict[str, T], path: str, default: T) -> T:
    """The value of the first key that matches the module path as PEFT matches it: `(.*\\.)?(key)$` from the start.

    field: what the config calls the pattern, for errors.
    """
    for key, value in pattern.items():
        plain = _PLAIN_KEY.fullmatch(key)
        if _ends_in(key, path) if plain else patterns.match(field, key, path, r"(.*\.)?({})$"):
            return value
    return default


def _ends_in(key: str, path: str) -> bool:
    """What the expression says of a key that is a path itself, of which a file may have one for each module: there its
    dots stand for any letter."""
    start = len(path) - len(key)
    if start < 0 or (start and path[start - 1] != ".") or not path.endswith(key.rpartition(".")[2]):
        return False
    return all(mine in (theirs, ".") for mine, theirs in zip(key, path[start:], strict=True))


def path_suffixes(path: str) -> list[str]:
    """The proper ends of a module path, at its dots."""
    parts = path.split(".")
    return [".".join(parts[index:]) for index in range(1, len(parts))]


def pattern_of(values: dict[str, T], default: T) -> dict[str, T]:
    """A rank_pattern or alpha_pattern that gives each module path its value, and all others the default."""
    pattern = {path: value for path, value in values.items() if value != default}
    if not any(suffix in pattern for path in values for suffix in path_suffixes(path)):
        return pattern
    # A key matches every path that ends in it, and the first that matches wins: all are named, the longest first.
    return {path: values[path] for path in sorted(values, key=len, reverse=True)}


def _is_a(value: object, hint: Any) -> bool:
    """Whether a value that may come from a JSON file has the type that a field is annotated with."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Literal:
        return any(value == choice and type(value) is type(choice) for choice in inner)
    if origin is UnionType:
        return any(_is_a(value, part) for part in inner)
    if origin is list:
        return isinstance(value, (list, tuple, set)) and all(_is_a(item, inner[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(_is_a(k, inner[0]) and _is_a(v, inner[1]) for k, v in value.items())
    if hint in (int, float):
        return isinstance(value, (int, hint)) and not isinstance(value, bool)
    return isinstance(value, hint)


@cache
def _hints(config: type) -> dict[str, Any]:
    return get_type_hints(config)


def _spell(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) and not get_args(hint) else str(hint)


def _names(kinds: tuple[type[AdapterLayer], ...], modules: Iterable[nn.Module]) -> list[str]:
    """What the layers of these kinds are called among `modules`, and in general where there are none."""
    single = tuple(kind for kind in kinds if kind is not AdapterModule)
    found = set()
    for module in modules:
        if next(module.children(), None) is None:
            with contextlib.suppress(ValueError):  # no kind takes it
                if isinstance(adapter_layer(module), single):
                    found.add(type(module).__name__)
    names = sorted(found) or [name for kind in single for name in KINDS[kind]]
    return names + list(KINDS[AdapterModule] if AdapterModule in kinds else ())


def _register(config: type[AdapterConfig]) -> None:
    """Enters a class whose own body sets peft_type into METHODS.

    One that inherits it (DoRAConfig) is a variant of the same method. A class of the same qualified name, from a module
    that is loaded again or a notebook's cell that is run again, takes the place of the former. Raises ValueError, and
    enters nothing, for a peft_type, an alias or a title that is no text or another class's.
    """
    own = vars(config)
    if "peft_type" not in own:
        return
    who, title, aliases = _qualified(config), getattr(config, "title", None), own.get("aliases", ())
    if not isinstance(aliases, tuple):
        raise ValueError(f"{who}: aliases must be a tuple of names, got {shown(aliases)}")
    types = (config.peft_type, *aliases)
    for name in (*types, title):
        if not isinstance(name, str) or not name:
            raise ValueError(
                f"{who}: peft_type, aliases and title must be text and not empty, got {shown(name)}: set them in the "
                "class's body"
            )
    others = {name: other for name, other in METHODS.items() if _qualified(other) != who}
    for name in types:
        if name in others:
            raise ValueError(
                f"{who}: peft_type {name!r} is taken by {_qualified(others[name])}: give the class another one, or "
                "leave it out of its body where it is a variant of that method"
            )
    for other in others.values():
        if other.title.lower() == str(title).lower():
            raise ValueError(f"{who}: title {title!r} is taken by {_qualified(other)}: give the class another one")
    METHODS.update(dict.fromkeys(types, config))
    PEFT_TYPES.discard(config.peft_type)
    if own.get("in_peft", False):
        PEFT_TYPES.add(config.peft_type)


def _qualified(config: type) -> str:
    return f"{config.__module__}.{config.__qualname__}"


class SharedTensors(nn.Module):
    """Tensors that the layers of one adapter share: buffers, in the state_dict as far as a checkpoint holds them."""

    def draw(self) -> None:
        """Fills them with what they hold where no checkpoint says it."""


class Control:
    """What a method does between the steps of training. This one, of most methods, does nothing.

        (loss + control.regularizer()).backward(); optimizer.step(); control.step(); optimizer.zero_grad()

    Its state goes into a checkpoint of the training, so that it can go on as if it had not stopped.
    """

    def regularizer(self) -> Tensor | float:
        """What the method adds to the loss: a scalar."""
        return 0.0

    def step(self) -> None:
        """Call once after each optimizer step, while the parameters still have the gradients of that step."""

    def state_dict(self) -> dict[str, Any]:
        """Everything that `step` goes by beside the parameters: tensors, and numbers, strings, lists, dicts of them."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes what `state_dict` gave."""


@dataclass
class AdapterConfig:
    """Fields that all methods share, with PEFT's names, defaults and rules.

    target_modules: names or suffixes of modules, a regular expression that must match the whole path, "all-linear", or
        None for the usual attention projections of a known architecture.
    target_parameters: names or suffixes of parameters, for weights that are no layer's: those of experts, three-
        dimensional, and of routers ("mlp.experts.gate_up_proj", "gate.weight"). LoRA, DoRA and VeRA alone.
    exclude_modules: modules to leave out, by the same rules.
    layers_to_transform: indices of the layers to adapt; layers_pattern names the list they count in ("layers", "h").
        What target_parameters names is adapted in all layers, as in PEFT: write their paths there.
    modules_to_save: modules that are trained whole, in a copy of each adapter's own: those whose path ends in a name.
    task_type: PEFT's. "SEQ_CLS" and "TOKEN_CLS" train the model's classifier or score whole too, "QUESTION_ANS" its
        qa_outputs: `inject` adds these names to modules_to_save, as PEFT does. Where the model has none of them and
        modules_to_save names no other head, it raises ValueError, where PEFT would train none and not say so.
    bias: "none", or the method's "…_only": the bias of every adapted layer is trained in a copy of the adapter's own.
    fan_in_fan_out: whether the base weight is stored as [in, out]; found out by itself, kept for the file.
    """

    # What the method's files carry; a class that sets it in its own body is a method of its own, found in METHODS.
    peft_type: ClassVar[str]
    # More types that its files may carry, in the same body.
    aliases: ClassVar[tuple[str, ...]] = ()
    # Whether PEFT has the peft_type too, in the same body.
    in_peft: ClassVar[bool] = False
    # What the method is called.
    title: ClassVar[str]
    # Its lines in the table of methods (see table.py), in the same body: a variant has one of its own.
    rows: ClassVar[tuple[str, ...]] = ()
    # The adapters whose tensors a file of the method holds, by layer.
    adapter_classes: ClassVar[tuple[type[Adapter], ...]]
    # What a file holds of `shared_tensors`, by the names there.
    shared_names: ClassVar[tuple[str, ...]] = ()
    # Whether r means anything.
    uses_r: ClassVar[bool] = True
    bias_choices: ClassVar[tuple[str, ...]] = ("none",)
    # Whether its adapters are forms, which many adapters in one batch can be.
    has_forms: ClassVar[bool] = True
    # The layers that the method can adapt, and which of them are left where an option is on.
    layer_kinds: ClassVar[tuple[type[AdapterLayer], ...]] = (AdapterLinear, AdapterEmbedding, AdapterConv2d)
    narrowing_options: ClassVar[dict[str, tuple[type[AdapterLayer], ...]]] = {}
    # Fields of PEFT's file that would change the function, and the values at which they do not.
    neutral_fields: ClassVar[dict[str, tuple[Any, ...]]] = {}
    # Tensors of a layer in PEFT's file, by their suffix, that hold nothing but zeros.
    zero_tensors: ClassVar[tuple[str, ...]] = ()

    r: int = 8
    target_modules: list[str] | str | None = None
    target_parameters: list[str] | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    bias: str = "none"
    fan_in_fan_out: bool = False
    task_type: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        _register(cls)

    def __post_init__(self) -> None:
        hints = _hints(type(self))  # type: ignore[arg-type]  # a class has a hash, though its instances have none
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not _is_a(value, hints[field.name]):
                raise ValueError(f"{field.name} must be {_spell(hints[field.name])}, got {shown(value)}")
            numbers = value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]
            for number in numbers:
                if isinstance(number, float) and not math.isfinite(number):
                    raise ValueError(f"{field.name} must be a finite number, got {number!r}")
                if isinstance(number, int) and not -(2**63) <= number < 2**64:
                    raise ValueError(f"{field.name} must be a number of 64 bits, got {shown(number)}")
        if self.r <= 0:
            raise ValueError(f"r must be a positive integer, got {self.r!r}")
        if self.bias not in self.bias_choices:
            raise ValueError(
                f"bias must be one of {', '.join(self.bias_choices)}, got {self.bias!r}; to train other biases, name "
                "their modules in modules_to_save"
            )
        if self.target_parameters and AdapterExperts not in self.layer_kinds:
            raise ValueError(
                f"target_parameters goes with LoRA, DoRA and VeRA alone, and this is {type(self).__name__}: take one "
                "of these, or leave target_parameters out"
            )
        for name in ("target_modules", "target_parameters", "exclude_modules", "modules_to_save"):
            value = getattr(self, name)
            if isinstance(value, (set, tuple)):
                setattr(self, name, sorted(value))
        if self.layers_to_transform is not None and isinstance(self.target_modules, str):
            raise ValueError(
                "layers_to_transform goes with a list of target_modules, not with a string: write the layers into it"
            )
        if self.layers_pattern is not None and self.layers_to_transform is None:
            raise ValueError("layers_pattern says where layers_to_transform counts: give layers_to_transform too")

    @classmethod
    def named(cls, fields: dict[str, Any]) -> str:
        """What the adapter that the fields of an adapter_config.json describe is called."""
        return cls.title

    def names_parameter(self, key: str) -> bool:
        """Whether target_parameters names the parameter of this name, with the path of its module: PEFT's rule."""
        return any(key == name or key.endswith(f".{name}") for name in self.target_parameters or ())

    @property
    def task_heads(self) -> tuple[str, ...]:
        """The names of heads that the task type brings; most bring none."""
        return TASK_HEADS.get(self.task_type or "", ())

    def with_task_heads(self: ConfigType) -> ConfigType:
        """The config with the task type's heads behind the user's own modules_to_save, as PEFT completes it."""
        if not self.task_heads:
            return self
        names = dict.fromkeys((*(self.modules_to_save or ()), *self.task_heads))
        return dataclasses.replace(self, modules_to_save=list(names))

    @property
    def dropout(self) -> float:
        """Drop probability of the adapter's input."""
        raise TypeError(f"{type(self).__name__} does not say its dropout")

    def usual_targets(self) -> dict[str, list[str] | str]:
        """What target_modules=None means, by transformers' model_type; empty for the usual attention projections."""
        return {}

    def check_kind(self, path: str, layer: AdapterLayer, modules: Iterable[nn.Module]) -> None:
        """Raises ValueError for a layer of a kind that the method cannot adapt, with those of `modules` that it can.

        It comes before `build`, for every layer.
        """
        options = {name: kinds for name, kinds in self.narrowing_options.items() if getattr(self, name)}
        kinds = tuple(kind for kind in self.layer_kinds if all(kind in left for left in options.values()))
        if isinstance(layer, kinds):
            return
        who, cure = type(self).__name__, "and others in modules_to_save to train them whole"
        if isinstance(layer, self.layer_kinds):
            option = next(name for name, left in options.items() if not isinstance(layer, left))
            who, cure = f"{who} with {option}=True", f"or set {option}=False"
        elif AdapterExperts in kinds and is_experts(layer.base_layer):
            weights = ", ".join(f"{path.rpartition('.')[2]}.{name}" for name in projections(layer.base_layer))
            cure = f"and the weights of experts in target_parameters ({weights})"
        raise ValueError(
            f"target_modules: {path}: {type(layer.base_layer).__name__} cannot take an adapter of {who}: only "
            f"{', '.join(_names(kinds, modules))} can; name only those, {cure}"
        )

    def build(self, layers: dict[str, AdapterLayer], dtype_of: Callable[[Tensor], torch.dtype]) -> dict[str, Adapter]:
        """One new adapter for each module path.

        The layers are of kinds that `check_kind` lets through. `dtype_of(weight)` is the dtype that the adapter's
        parameters take beside that base weight. Raises ValueError for a setting that does not go with a layer; nothing
        is attached before all adapters are built.
        """
        raise TypeError(f"{type(self).__name__} does not say how its adapters are built")

    def rank(self, path: str) -> int:
        """How many ranks `build` gives the module at this path."""
        return self.r

    def control(self, layers: dict[str, AdapterLayer], adapters: dict[str, Adapter]) -> Control:
        """What happens between the steps of training to these adapters, each in the layer of the same path."""
        return Control()

    @property
    def is_controlled(self) -> bool:
        """Whether the method's control does anything."""
        return type(self).control is not AdapterConfig.control

    def shared_tensors(self, adapters: dict[str, Adapter]) -> dict[str, SharedTensors]:
        """Modules whose tensors all layers share, by the prefix of their names in a checkpoint; most have none."""
        return {}

    def shared_factors(self, adapters: dict[str, Adapter]) -> tuple[Tensor, Tensor] | None:
        """(A [r, largest in], B [largest out, r]) where the forms of all layers have slices of one pair, else None."""
        return None

    def to_peft(self, paths: list[str]) -> dict[str, Any]:
        """The fields of adapter_config.json for an adapter of the modules at these paths."""
        fields = dataclasses.asdict(self)
        if not self.target_parameters:
            del fields["target_parameters"]
        if self.target_modules is None or str(self.target_modules).lower() == "all-linear":
            fields["target_modules"] = paths  # what they mean depends on the reader's tables
        return {**fields, "peft_type": self.peft_type, "inference_mode": True}

    @classmethod
    def from_peft(cls: type[ConfigType], fields: dict[str, Any]) -> ConfigType:
        """The config that adapter_config.json describes.

        Raises ValueError for a field that would change the function and is not supported, by its name.
        """
        for name, neutral in cls.neutral_fields.items():
            if name in fields and not _says_nothing(fields[name]) and fields[name] not in neutral:
                raise ValueError(
                    f"{name}={fields[name]!r} changes what the adapter computes and is not supported by fastadapt: "
                    "load this adapter with PEFT, or merge it there"
                )
        known = {field.name for field in dataclasses.fields(cls) if field.init}
        hints = _hints(cls)  # type: ignore[arg-type]
        said: dict[str, Any] = {}
        for name in known.intersection(fields):
            value = fields[name]
            if _says_nothing(value) and name != "target_modules":
                if _is_a(None, hints[name]):
                    value = None
                elif hints[name] is bool:
                    value = False
                elif value is None and name.startswith("init_"):  # of no account once the adapter is trained
                    continue
            said[name] = value
        return cls(**said)


def _says_nothing(value: Any) -> bool:
    """Whether a field's value is null or empty, which PEFT takes for a field that is not there."""
    return value is None or (isinstance(value, (str, list, dict)) and not value)


ConfigType = TypeVar("ConfigType", bound=AdapterConfig)
