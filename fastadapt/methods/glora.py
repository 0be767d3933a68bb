"""GLoRA: the weight and the bias scaled and shifted, each by a support of its own; and the supernet of all supports."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ..checks import shown
from ..layers.layer import Adapter, AdapterLayer, Reads
from ..layers.linear import AdapterLinear
from ..operators.calls import without_autocast
from ..reference import AdapterForm
from .config import AdapterConfig, pattern_value

_LORA = re.compile(r"lora:[1-9][0-9]{0,8}")
_PLAIN = {
    "A": ("vector", "constant", "none"),
    "B": ("vector", "constant", "none"),
    "C": ("vector", "none"),
    "D": ("vector", "constant", "none"),
    "E": ("vector", "constant", "none"),
}
_LOW_RANK = "ABC"


class Supports(NamedTuple):
    """What each of GLoRA's five terms is made of: "lora:<rank>", "vector", "constant" or "none".

    C has no constant, D and E no LoRA.
    """

    A: str
    B: str
    C: str
    D: str
    E: str

    @classmethod
    def checked(cls, name: str, values: Sequence[str]) -> Supports:
        """The supports that `values` name. Raises ValueError, with `name`, for what is no support of its term."""
        if len(values) != len(cls._fields):
            raise ValueError(f"{name} must hold five supports, of A, B, C, D and E, got {shown(values)}")
        for letter, value in zip(cls._fields, values, strict=True):
            low_rank = letter in _LOW_RANK
            if value not in _PLAIN[letter] and not (low_rank and _LORA.fullmatch(value)):
                choices = [*(["lora:<rank>"] if low_rank else []), *_PLAIN[letter]]
                raise ValueError(f"{name}: {letter} must be {', '.join(choices)}, got {shown(value)}")
        return cls(*values)


def lora_rank(support: str) -> int:
    """The rank of "lora:<rank>", 0 for every other support."""
    return int(support.removeprefix("lora:")) if support.startswith("lora:") else 0


def _size(letter: str, n: int, k: int) -> tuple[int, int]:
    """(rows, columns) of a term in a layer of weight [n, k]; D and E have no columns."""
    return {"A": (n, k), "B": (n, k), "C": (k, 1)}.get(letter, (n, 0))


class GLoRAAdapter(Adapter):
    """The five terms of one layer, each on its support.

        y = (W0 + W0 ⊙ A + B) x + β        β = b0 + b0 ⊙ D + E + W0 C

        A    lora: U = Xd, V = Xu; vector, constant: g = 1 + a
        B    lora: Xd Xu; vector, constant: b ⊗ 1, of rank 1

    Shapes of A, B [out, in]: glora_A_Xd [out, r], glora_A_Xu [r, in], or glora_A_X [out, 1]; of C [in, 1]:
    glora_C_Xd [in, r], glora_C_Xu [r, 1], or glora_C_X [in, 1]; of D, E [out]: glora_D_X [out]; a constant [1].

    A supernet has the tensors of the largest support alone. A smaller one is a part of them: rank r the slices
    Xd[:, :r] and Xu[:r], a vector the first column of Xd, a constant the first element. `options` are the supports that
    each term can have, `variant` those that it has now.
    """

    suffixes: ClassVar[Mapping[str, str]] = {
        f"glora_{letter}_{name}": f"glora_{letter}.{name}" for letter in Supports._fields for name in ("Xd", "Xu", "X")
    }

    def __init__(self, layer: AdapterLayer, config: GLoRAConfig, supports: Supports, dtype: torch.dtype) -> None:
        super().__init__(0.0)
        self.supports = supports
        self.ranks = config.ranks or [] if config.supernet else None
        n, k = layer.weight_matrix.shape
        self.shape = n, k
        for letter, support in supports._asdict().items():
            for name, value in _initial(_size(letter, n, k), support, config.init_weights).items():
                self.add_tensor(f"glora_{letter}_{name}", value, layer.weight_matrix, dtype)

    @property
    def options(self) -> dict[str, list[str]]:
        """The supports that each term can have."""
        found = {}
        for letter, support in self.supports._asdict().items():
            found[letter] = [support]
            if self.ranks is not None and support != "none":  # in a layer without a bias C, D and E may be absent
                low_rank = [f"lora:{rank}" for rank in self.ranks] if letter in _LOW_RANK else []
                found[letter] = [*low_rank, *_PLAIN[letter]]
        return found

    def choose(self, supports: Sequence[str] | None) -> None:
        """Makes a supernet compute with these supports, in training too; None: as it was at the start.

        Raises ValueError for a support that is not among `options`.
        """
        if supports is not None:
            supports = Supports.checked("supports", supports)
            for (letter, options), value in zip(self.options.items(), supports, strict=True):
                if value not in options:
                    raise ValueError(f"supports: {letter} must be {' or '.join(options)} in this layer, got {value!r}")
        self.variant = supports

    @property
    def chosen(self) -> Supports:
        """The supports that are set, or else the largest."""
        return self.variant or self.supports

    def parameters_of(self, supports: Supports) -> int:
        """How many numbers the terms have on these supports."""
        count = 0
        for letter, support in supports._asdict().items():
            rows, columns = _size(letter, *self.shape)
            count += {"none": 0, "constant": 1, "vector": rows}.get(support, lora_rank(support) * (rows + columns))
        return count

    def _current(self) -> Supports:
        if self.ranks is None or self.variant is not None or not self.training:
            return self.chosen
        # Drawn by the generator that gradient checkpointing sets back, so that a recomputed forward is the same.
        draws = torch.rand(len(self.supports), device="cpu").tolist()
        return Supports(*[o[int(u * len(o))] for u, o in zip(draws, self.options.values(), strict=True)])

    def factors(self, letter: str, r: int) -> tuple[Tensor, Tensor]:
        """Xd [rows, r] and Xu [r, columns] of a term."""
        return getattr(self, f"glora_{letter}_Xd")[:, :r], getattr(self, f"glora_{letter}_Xu")[:r]

    def column(self, letter: str, support: str) -> Tensor:
        """A term that is a vector, [rows], or a constant, [1]."""
        stored = getattr(self, f"glora_{letter}_Xd", None)
        values: Tensor = getattr(self, f"glora_{letter}_X").flatten() if stored is None else stored[:, 0]
        return values[:1] if support == "constant" else values

    @property
    def reads(self) -> Reads:
        # A supernet may draw any.
        largest = self.supports if self.ranks is not None else self.chosen
        return "values" if lora_rank(largest.A) or largest.C != "none" else "shape"

    def form(self, weight: Tensor, bias: Tensor | None) -> AdapterForm:
        supports = self._current()
        n, k = weight.shape
        U = V = base_scale = None
        if lora_rank(supports.A):
            U, V = self.factors("A", lora_rank(supports.A))
        elif supports.A != "none":
            base_scale = 1 + self.column("A", supports.A).expand(n)
        if lora_rank(supports.B):
            B, A = self.factors("B", lora_rank(supports.B))
        elif supports.B != "none":
            B = self.column("B", supports.B).expand(n).contiguous()[:, None]
            A = B.new_ones(1, k)
        else:
            A, B = weight.new_zeros(0, k), weight.new_zeros(n, 0)
        return AdapterForm(A, B, base_scale=base_scale, bias=self._bias(weight, bias, supports), U=U, V=V)

    def _bias(self, weight: Tensor, bias: Tensor | None, supports: Supports) -> Tensor | None:
        """β = b0 + b0 ⊙ D + E + W0 C: vectors alone, one product with W0 a step where there is a C."""
        terms: list[Tensor] = []
        if bias is not None and supports.D != "none":
            terms.append(bias * self.column("D", supports.D))
        if supports.E != "none":
            terms.append(self.column("E", supports.E).expand(weight.shape[0]))
        if supports.C != "none":
            r = lora_rank(supports.C)
            Xd, Xu = self.factors("C", r) if r else (self.column("C", supports.C)[:, None], None)
            with without_autocast(weight):  # it would make a copy of W0
                column = Xd if Xu is None else Xd @ Xu
                terms.append((weight @ column.to(weight.dtype)).squeeze(1).to(column.dtype))
        for term in terms:
            bias = term if bias is None else bias + term
        return bias

    @torch.no_grad()
    def fill_from(self, other: GLoRAAdapter) -> None:
        """Takes over what `other` computes, this adapter's terms being (lora, lora, lora, vector, vector) or absent:

        a vector or constant is a column of Xd beside a row of ones, what is left over is zero.
        """
        for letter, support in other.chosen._asdict().items():
            tensors = {name: tensor for name, tensor in self.named_parameters() if name.startswith(f"glora_{letter}_")}
            for tensor in tensors.values():
                tensor.zero_()
            if not tensors or support == "none":
                continue
            r = lora_rank(support)
            if r:
                for part, value in zip(self.factors(letter, r), other.factors(letter, r), strict=True):
                    part.copy_(value)
            else:
                self.column(letter, "vector").copy_(other.column(letter, support))
                if letter in _LOW_RANK:
                    self.factors(letter, 1)[1].fill_(1)

    def extra_repr(self) -> str:
        return ", ".join(f"{letter}={support}" for letter, support in self.chosen._asdict().items())


def _initial(size: tuple[int, int], support: str, init: bool | str) -> dict[str, Tensor]:
    """The tensors of a term at the start, by PEFT's names: zero altogether unless init is False."""
    rows, columns = size
    r = lora_rank(support)

    def uniform(*shape: int, fan: int) -> Tensor:
        bound = 1 / math.sqrt(fan)  # Kaiming-uniform with a = √5
        return torch.empty(shape).uniform_(-bound, bound)

    if r:
        # Xavier-uniform is U(±√(6 / (in + out))).
        fan = (r + columns) / 6 if init == "xavier" else columns
        Xu = torch.empty(r, columns).uniform_(-1 / math.sqrt(fan), 1 / math.sqrt(fan))
        return {"Xd": torch.zeros(rows, r) if init else uniform(rows, r, fan=r), "Xu": Xu}
    if support == "vector":
        shape = (rows, 1) if columns else (rows,)
        return {"X": torch.zeros(shape) if init else uniform(*shape, fan=1 if columns else rows)}
    if support == "constant":
        return {"X": torch.zeros(1) if init else 0.02 * torch.randn(1)}
    return {}


@dataclass
class GLoRAConfig(AdapterConfig):
    """GLoRA: y = (W0 + W0 ⊙ A + B) x + β with β = b0 + b0 ⊙ D + E + W0 C. Trains the five terms, which start at zero.

    r: rank of the terms that are "lora". config_A_B: "lora" (Xd Xu), "vector" (a number for each output feature),
        "constant" or "none", for A and B; config_C: "lora", "vector" or "none"; config_D_E: "vector", "constant" or
        "none". init_weights: whether the terms start at zero, Xu Kaiming-uniform; "xavier", as the authors draw it.
        Fields so far and their defaults are PEFT's.
    support_pattern: the supports of A, B, C, D and E, each "lora:<rank>", "vector", "constant" or "none", for module
        paths that match `(.*\\.)?(key)$`; the first key wins, {".*": [...]} is for all layers.
    supernet: every layer has one set of tensors, of the largest support, of which the smaller supports are parts. In
        training each forward draws the supports of each layer at random; `search_spaces.GLoRASpace` sets them, and in
        eval mode, and merged, the largest run where none are set. A file holds the whole supernet; `export_glora` saves
        what is set. ranks: those to draw from, [r] by default; r becomes the largest of them. config_A_B, config_C and
        config_D_E say nothing then.
    create_bias: whether C and E give a layer without a bias one, as the authors have it. Otherwise such a layer has no
        C, D and E, as in PEFT.
    Linear and Conv1D layers. There is no dropout. Files carry peft_type "GLORA", or "GLORA_MIXED" where one of the last
    four fields says what PEFT cannot; `export_glora` writes the same for PEFT. Raises ValueError for a value outside
    its range, by name.
    Source: Chavan et al. 2023, arXiv:2306.07967, sections 3.2 to 3.4.
    """

    peft_type: ClassVar[str] = "GLORA"
    aliases: ClassVar[tuple[str, ...]] = ("GLORA_MIXED",)
    in_peft: ClassVar[bool] = True
    title: ClassVar[str] = "GLoRA"
    rows: ClassVar[tuple[str, ...]] = (
        "GLoRA ([2306.07967](https://arxiv.org/abs/2306.07967)) | "
        "`GLoRAConfig(r, config_A_B, config_C, config_D_E)`"
        " | 1+a | 1 | 1 | b0⊙(1+D)+E+W0C | A, B, C, D, E; a LoRA-shaped A is U V below",
    )
    adapter_classes: ClassVar[tuple[type[Adapter], ...]] = (GLoRAAdapter,)
    layer_kinds: ClassVar[tuple[type[AdapterLayer], ...]] = (AdapterLinear,)
    zero_tensors: ClassVar[tuple[str, ...]] = tuple(f"glora_{letter}.zeros" for letter in Supports._fields)

    config_A_B: str = "lora"
    config_C: str = "lora"
    config_D_E: str = "constant"
    init_weights: bool | str = True
    support_pattern: dict[str, list[str]] = field(default_factory=dict)
    supernet: bool = False
    ranks: list[int] | None = None
    create_bias: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, letter in (("config_A_B", "A"), ("config_C", "C"), ("config_D_E", "D")):
            choices = [*(["lora"] if letter in _LOW_RANK else []), *_PLAIN[letter]]
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {shown(getattr(self, name))}")
        if self.init_weights not in (True, False, "xavier"):
            raise ValueError(f"init_weights must be True, False or 'xavier', got {shown(self.init_weights)}")
        for key, supports in self.support_pattern.items():
            Supports.checked(f"support_pattern[{shown(key)}]", supports)
        if self.ranks is not None and not self.supernet:
            raise ValueError("ranks are those that a supernet draws from: give supernet=True too, or r alone")
        if self.supernet:
            if self.support_pattern:
                raise ValueError("support_pattern cannot go with supernet, which has all supports in every layer")
            self.ranks = sorted(set([self.r] if self.ranks is None else self.ranks), reverse=True)
            if not self.ranks or self.ranks[-1] <= 0 or self.ranks[0] >= 10**9:
                raise ValueError(f"ranks must be positive integers, at least one, got {shown(self.ranks)}")
            self.r = self.ranks[0]

    @classmethod
    def named(cls, fields: dict[str, Any]) -> str:
        if fields.get("supernet"):
            return f"{cls.title}, a supernet"
        return f"{cls.title}, supports by layer" if fields.get("support_pattern") else cls.title

    @property
    def dropout(self) -> float:
        return 0.0

    def supports(self, path: str) -> Supports:
        """The supports of the module at this path, where it has a bias."""
        if self.supernet:
            low_rank = f"lora:{self.r}"
            return Supports(low_rank, low_rank, low_rank, "vector", "vector")
        A, C = (f"lora:{self.r}" if kind == "lora" else kind for kind in (self.config_A_B, self.config_C))
        default = [A, A, C, self.config_D_E, self.config_D_E]
        return Supports(*pattern_value("support_pattern", self.support_pattern, path, default))

    def rank(self, path: str) -> int:
        supports = self.supports(path)
        return max([int(supports.B != "none"), *map(lora_rank, supports)])

    def build(self, layers: dict[str, AdapterLayer], dtype_of: Callable[[Tensor], torch.dtype]) -> dict[str, Adapter]:
        adapters: dict[str, Adapter] = {}
        for path, layer in layers.items():
            supports = self.supports(path)
            if layer.base_bias is None:
                absent = ("D",) if self.create_bias else ("C", "D", "E")
                supports = supports._replace(**dict.fromkeys(absent, "none"))
            adapters[path] = GLoRAAdapter(layer, self, supports, dtype_of(layer.like))
        return adapters

    def to_peft(self, paths: list[str]) -> dict[str, Any]:
        fields = super().to_peft(paths)
        if self.support_pattern or self.supernet or self.create_bias:
            return {**fields, "peft_type": "GLORA_MIXED"}
        # PEFT's GLoRA has none of these: the paths say the same.
        selected = [fields.pop(name) for name in ("exclude_modules", "layers_to_transform", "layers_pattern")]
        if any(value is not None for value in selected):
            fields["target_modules"] = paths
        for name in ("fan_in_fan_out", "support_pattern", "supernet", "ranks", "create_bias"):
            del fields[name]
        return {**fields, "init_weights": bool(self.init_weights)}


def glora_of(
    layers: dict[str, AdapterLayer], adapters: Mapping[str, Adapter], **fields: Any
) -> tuple[GLoRAConfig, dict[str, Adapter]]:
    """(config, adapters) of the uniform GLoRA (lora, lora, vector) that computes what these adapters do, in eval mode.

    Its rank is the largest in use. `fields` are more of GLoRAConfig's. Raises ValueError for an adapter of another
    method, and for a bias where the layer has none, which a uniform GLoRA cannot add.
    """
    found: dict[str, GLoRAAdapter] = {}
    for path, adapter in adapters.items():
        if not isinstance(adapter, GLoRAAdapter):
            raise ValueError(f"{path} has no GLoRA adapter but a {type(adapter).__name__}: export_lora may do")
        if layers[path].base_bias is None and {adapter.chosen.C, adapter.chosen.E} != {"none"}:
            raise ValueError(f"{path} has no bias and its adapter creates one, which PEFT's GLoRA cannot: merge it")
        found[path] = adapter
    r = max([1, *(lora_rank(support) for adapter in found.values() for support in adapter.chosen)])
    config = GLoRAConfig(r=r, config_D_E="vector", **fields)
    weights = {id(layers[path].like): adapter for path, adapter in found.items()}
    new = config.build(layers, lambda weight: next(weights[id(weight)].parameters(), weight).dtype)
    for path, uniform in new.items():
        assert isinstance(uniform, GLoRAAdapter)
        uniform.fill_from(found[path])
    return config, new
