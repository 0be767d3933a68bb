"""HiRA: every weight scaled by itself, y = (W0 + W0 ⊙ (B A)) x + b0, an update of high rank from two small factors."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..checks import check_probability
from ..layers.layer import Adapter, AdapterLayer, Reads
from ..layers.linear import AdapterLinear
from ..reference import AdapterForm
from .config import AdapterConfig, pattern_value


class HiRAAdapter(Adapter):
    """The factors of one layer: U = hira_B, V = hira_A, without a low-rank path.

    Shapes: hira_A [r, in], hira_B [out, r].
    """

    suffixes: ClassVar[Mapping[str, str]] = {name: name for name in ("hira_A", "hira_B")}

    hira_A: nn.Parameter
    hira_B: nn.Parameter

    def __init__(self, layer: AdapterLayer, config: HiRAConfig, r: int, dtype: torch.dtype) -> None:
        super().__init__(config.hira_dropout)
        weight = layer.weight_matrix
        n, k = weight.shape
        add = partial(self.add_tensor, like=weight, dtype=dtype)
        if config.init_weights is True:  # Kaiming-uniform with a = √5
            add("hira_A", torch.empty(r, k).uniform_(-1 / math.sqrt(k), 1 / math.sqrt(k)))
        else:
            add("hira_A", torch.randn(r, k) / (r if config.init_weights == "gaussian" else 1))
        add("hira_B", torch.zeros(n, r) if config.init_weights else torch.randn(n, r))

    @property
    def reads(self) -> Reads:
        return "values"

    def form(self, weight: Tensor, bias: Tensor | None) -> AdapterForm:
        A, B = self.hira_A.detach()[:0], self.hira_B.detach()[:, :0]
        return AdapterForm(A, B, bias=bias, U=self.hira_B, V=self.hira_A)

    def extra_repr(self) -> str:
        return f"r={self.hira_A.shape[0]}, dropout={self.dropout:g}"


@dataclass
class HiRAConfig(AdapterConfig):
    """HiRA: y = W0 x + (W0 ⊙ (B A)) x̃ + b0. Trains A and B. Fields and defaults are PEFT's.

    r: rank of B A; that of W0 ⊙ (B A) is up to r times W0's.
    hira_dropout: drop probability of x̃, in [0, 1).
    init_weights: True (A uniform(±1/√in), B zero), "gaussian" (A normal(0, 1/r²), B zero), or False (B is not zero).
    rank_pattern: other r for module paths that match `(.*\\.)?(key)$`; the first key wins.
    Linear and Conv1D layers only. It cannot share a batch with other adapters: merge it to serve it.
    Raises ValueError for a value outside its range, by name.
    Source: Huang et al., HiRA: Parameter-Efficient Hadamard High-Rank Adaptation for Large Language Models, ICLR 2025,
    section 3.
    """

    peft_type: ClassVar[str] = "HIRA"
    in_peft: ClassVar[bool] = True
    title: ClassVar[str] = "HiRA"
    rows: ClassVar[tuple[str, ...]] = ("HiRA (ICLR 2025) | `HiRAConfig(r)` | 1 | – | – | b0 | U, V",)
    adapter_classes: ClassVar[tuple[type[Adapter], ...]] = (HiRAAdapter,)
    layer_kinds: ClassVar[tuple[type[AdapterLayer], ...]] = (AdapterLinear,)

    r: int = 32
    hira_dropout: float = 0.0
    init_weights: bool | str = True
    rank_pattern: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_probability("hira_dropout", self.hira_dropout)
        if self.init_weights not in (True, False, "gaussian"):
            raise ValueError(f"init_weights must be True, False or 'gaussian', got {self.init_weights!r}")
        for key, r in self.rank_pattern.items():
            if r <= 0:
                raise ValueError(f"rank_pattern[{key!r}] must be a positive integer, got {r!r}")

    @property
    def dropout(self) -> float:
        return self.hira_dropout

    @classmethod
    def from_peft(cls, fields: dict[str, Any]) -> HiRAConfig:
        neutral = {"init_weights": False, "rank_pattern": {}}  # what PEFT means by null
        return super().from_peft(
            {name: neutral[name] if value is None and name in neutral else value for name, value in fields.items()}
        )

    def to_peft(self, paths: list[str]) -> dict[str, Any]:
        fields = super().to_peft(paths)
        del fields["bias"]  # PEFT's HiRA has no such field
        return fields

    def rank(self, path: str) -> int:
        return pattern_value("rank_pattern", self.rank_pattern, path, self.r)

    def build(self, layers: dict[str, AdapterLayer], dtype_of: Callable[[Tensor], torch.dtype]) -> dict[str, Adapter]:
        return {path: HiRAAdapter(layer, self, self.rank(path), dtype_of(layer.like)) for path, layer in layers.items()}
