"""AdaptFormer: a bottleneck beside, or behind, the MLP of a transformer block."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ..checks import check_probability
from ..layers.kinds import AdapterModule, AdapterNorm
from ..layers.layer import Adapter, AdapterLayer, StreamAdapter
from ..layers.linear import AdapterLinear
from ..operators.bottleneck.function import bottleneck
from .blocks import norm_of, width
from .config import AdapterConfig


class Tap(StreamAdapter):
    """Holds what a module reads for the adapter that needs it later in the same forward."""

    def __init__(self) -> None:
        super().__init__(0.0)
        self._held: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:  # copies and pickles start empty
        return {**self.__dict__, "_held": None}

    def around(self, layer: AdapterLayer, run: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any) -> Any:
        self._held = x
        return run(x, *args, **kwargs)

    def take(self) -> Tensor:
        """The tensor, once. Raises RuntimeError where the module has not run before."""
        held, self._held = self._held, None
        if held is None:
            raise RuntimeError(
                "the norm in front of the MLP has not run before it in this forward: take branch_input='normed', which "
                "reads what the MLP reads"
            )
        return held


class AdaptFormerAdapter(StreamAdapter):
    """The branch of one block: out = z + s (U dropout(relu(D v + a)) + c), z what the MLP gives.

    Shapes: down [r, d], down_bias [r], up [d, r], up_bias [d].
    """

    suffixes: ClassVar[Mapping[str, str]] = {
        "down": "adaptmlp.down_proj.weight",
        "down_bias": "adaptmlp.down_proj.bias",
        "up": "adaptmlp.up_proj.weight",
        "up_bias": "adaptmlp.up_proj.bias",
    }

    down: nn.Parameter
    down_bias: nn.Parameter
    up: nn.Parameter
    up_bias: nn.Parameter

    def __init__(self, layer: AdapterLayer, config: AdaptFormerConfig, tap: Tap | None, dtype: torch.dtype) -> None:
        super().__init__(config.adapter_dropout)
        self.scaling, self.branch_input = config.scaling, config.branch_input
        # In a list, so that it is no submodule: the norm's adapter layer has it.
        self._tap = [tap]
        d, r = width(layer), config.r
        add = partial(self.add_tensor, like=layer.like, dtype=dtype)
        add("down", torch.empty(r, d).uniform_(-1 / math.sqrt(d), 1 / math.sqrt(d)))
        add("down_bias", torch.zeros(r))
        add("up", torch.zeros(d, r))
        add("up_bias", torch.zeros(d))

    def around(self, layer: AdapterLayer, run: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any) -> Any:
        y = run(x, *args, **kwargs)
        (tap,) = self._tap
        v = tap.take() if tap is not None else y if self.branch_input == "output" else x
        return bottleneck(
            v,
            self.down,
            self.up,
            down_bias=self.down_bias,
            up_bias=self.up_bias,
            residual=y,
            scaling=self.scaling,
            activation="relu",
            dropout=self.dropout,
            training=self.training,
            backend=layer.backend,
        )


@dataclass
class AdaptFormerConfig(AdapterConfig):
    """AdaptFormer: out = z + s (U dropout(relu(D v + a)) + c) for the output z of each target MLP. Trains D, a, U, c.

    r: hidden features. scaling: s. adapter_dropout: drop probability of the hidden features.
    branch_input: what v is: "residual", what the norm in front of the MLP reads (the authors' code), so that the norms
        must be among the targets; "normed", what the MLP reads (the paper's figure); "output", z, which makes the
        branch follow the MLP (the paper's sequential variant).
    Starts as the identity. Cannot be merged. target_modules: None is the MLPs of a ViT, and their norms where they are
    needed. PEFT has no such type: its files carry peft_type "ADAPTFORMER".
    Raises ValueError for a value outside its range, by name.
    Source: Chen et al. 2022, arXiv:2205.13535, section 3.2.
    """

    peft_type: ClassVar[str] = "ADAPTFORMER"
    title: ClassVar[str] = "AdaptFormer"
    rows: ClassVar[tuple[str, ...]] = (
        "AdaptFormer ([2205.13535](https://arxiv.org/abs/2205.13535)) | "
        "`AdaptFormerConfig(r=64, scaling=0.1, branch_input)`"
        " | MLP(x) + s (U relu(D v + a) + c) beside or behind the MLP"
        " | `functional.bottleneck`: hidden features never kept",
    )
    adapter_classes: ClassVar[tuple[type[Adapter], ...]] = (AdaptFormerAdapter,)
    has_forms: ClassVar[bool] = False
    layer_kinds: ClassVar[tuple[type[AdapterLayer], ...]] = (AdapterModule, AdapterLinear, AdapterNorm)

    r: int = 64
    scaling: float = 0.1
    adapter_dropout: float = 0.1
    branch_input: Literal["residual", "normed", "output"] = "residual"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_probability("adapter_dropout", self.adapter_dropout)

    @property
    def dropout(self) -> float:
        return self.adapter_dropout

    def usual_targets(self) -> dict[str, list[str] | str]:
        return {"vit": r"(.*\.)?(mlp|layernorm_after)" if self.branch_input == "residual" else r"(.*\.)?mlp"}

    def build(self, layers: dict[str, AdapterLayer], dtype_of: Callable[[Tensor], torch.dtype]) -> dict[str, Adapter]:
        norms = {path: layer for path, layer in layers.items() if isinstance(layer, AdapterNorm)}
        if norms and self.branch_input != "residual":
            raise ValueError(
                f"target_modules must hold no norm with branch_input={self.branch_input!r}, got {next(iter(norms))}"
            )
        taps = {path: Tap() for path in norms}
        built: dict[str, Adapter] = dict(taps)
        for path, layer in layers.items():
            if path not in norms:
                tap = taps[norm_of(path, norms)] if self.branch_input == "residual" else None
                built[path] = AdaptFormerAdapter(layer, self, tap, dtype_of(layer.like))
        return {path: built[path] for path in layers}
