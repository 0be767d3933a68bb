"""SSF: a scale and a shift behind every operation, y = γ ⊙ z + β."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..layers.kinds import AdapterConv2d, AdapterNorm
from ..layers.layer import Adapter, AdapterLayer
from ..layers.linear import AdapterLinear
from ..reference import AdapterForm
from .config import AdapterConfig


class SSFAdapter(Adapter):
    """γ and β of one operation: g = γ, bias γ ⊙ b0 + β, and no low-rank path.

    Shapes: ssf_scale [out], ssf_shift [out].
    """

    suffixes: ClassVar[Mapping[str, str]] = {name: name for name in ("ssf_scale", "ssf_shift")}

    ssf_scale: nn.Parameter
    ssf_shift: nn.Parameter

    def __init__(self, layer: AdapterLayer, config: SSFConfig, dtype: torch.dtype) -> None:
        super().__init__(0.0)
        n = layer.weight_matrix.shape[0]
        for name, mean in (("ssf_scale", 1.0), ("ssf_shift", 0.0)):
            self.add_tensor(name, torch.full((n,), mean) + config.init_std * torch.randn(n), layer.like, dtype)

    def form(self, weight: Tensor, bias: Tensor | None) -> AdapterForm:
        shift = self.ssf_shift if bias is None else torch.addcmul(self.ssf_shift, self.ssf_scale, bias.detach())
        n, k = weight.shape
        return AdapterForm(weight.new_empty(0, k), weight.new_empty(n, 0), base_scale=self.ssf_scale, bias=shift)


@dataclass
class SSFConfig(AdapterConfig):
    """SSF: z' = γ ⊙ z + β behind linear layers, convolutions and LayerNorms. Trains γ and β.

    Merges exactly: W' = diag(γ) W, b' = γ ⊙ b + β. init_std: γ starts at normal(1, init_std²) and β at
    normal(0, init_std²), which is not the identity; 0 makes it one. r is not used. target_modules: None is every such
    layer of a ViT but the head. PEFT has no such type: its files carry peft_type "SSF".
    Raises ValueError for a value outside its range, by name.
    Source: Lian et al. 2022, arXiv:2210.08823, section 3.2.
    """

    peft_type: ClassVar[str] = "SSF"
    title: ClassVar[str] = "SSF"
    rows: ClassVar[tuple[str, ...]] = (
        "SSF ([2210.08823](https://arxiv.org/abs/2210.08823)) | "
        "`SSFConfig()`"
        " | γ | – | – | γ⊙b0+β | γ, β; behind convolutions and LayerNorms too",
    )
    adapter_classes: ClassVar[tuple[type[Adapter], ...]] = (SSFAdapter,)
    uses_r: ClassVar[bool] = False
    layer_kinds: ClassVar[tuple[type[AdapterLayer], ...]] = (AdapterLinear, AdapterConv2d, AdapterNorm)

    init_std: float = 0.02

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.init_std < 0:
            raise ValueError(f"init_std must be at least 0, got {self.init_std!r}")

    @property
    def dropout(self) -> float:
        return 0.0

    def usual_targets(self) -> dict[str, list[str] | str]:
        return {"vit": r"(.*\.)?(projection|[qkvo]_proj|fc[12]|layernorm(_before|_after)?)"}

    def rank(self, path: str) -> int:
        return 0

    def build(self, layers: dict[str, AdapterLayer], dtype_of: Callable[[Tensor], torch.dtype]) -> dict[str, Adapter]:
        return {path: SSFAdapter(layer, self, dtype_of(layer.like)) for path, layer in layers.items()}
