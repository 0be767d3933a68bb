"""VeRA: one frozen random pair (A, B) for all layers, two trained vectors a layer; and DVoRA, VeRA with a magnitude."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..checks import check_probability
from ..layers.experts import AdapterExperts, ExpertsAdapter
from ..layers.layer import Adapter, AdapterLayer, Reads
from ..layers.linear import AdapterLinear
from ..reference import AdapterForm
from .config import AdapterConfig, SharedTensors
from .experts import ExpertVeRA, chosen_parameters
from .row_norm import row_norm


class VeRAProjection(SharedTensors):
    """The frozen pair that the layers of one adapter share; a layer uses A[:, :in] and B[:out, :].

    Regenerated bit for bit from the key: one CPU generator seeded with it draws A, then B, each uniform(±√(6/fan_in))
    in fp32. Shapes: vera_A [r, largest in], vera_B [largest out, r].
    """

    vera_A: Tensor
    vera_B: Tensor

    def __init__(self, r: int, k: int, n: int, key: int, persistent: bool) -> None:
        super().__init__()
        self.key = key
        for name, shape in (("vera_A", (r, k)), ("vera_B", (n, r))):
            self.register_buffer(name, torch.empty(shape), persistent=persistent)
        self.draw()

    @torch.no_grad()
    def draw(self) -> None:
        generator = torch.Generator("cpu").manual_seed(self.key)
        for factor in (self.vera_A, self.vera_B):
            bound = math.sqrt(6.0 / factor.shape[1])
            if not factor.is_meta:
                factor.copy_(torch.empty(factor.shape).uniform_(-bound, bound, generator=generator))


class VeRAAdapter(Adapter):
    """λ_b and λ_d of one layer: d = λ_d, h = λ_b. With a magnitude (DVoRA) g = m / n, h = g ⊙ λ_b.

    Shapes: vera_lambda_b [out], vera_lambda_d [r], lora_magnitude_vector [out], bias [out].
    """

    suffixes: ClassVar[Mapping[str, str]] = {
        **{name: name for name in ("vera_lambda_b", "vera_lambda_d", "lora_magnitude_vector")},
        "bias": "base_layer.bias",
    }

    vera_lambda_b: nn.Parameter
    vera_lambda_d: nn.Parameter

    def __init__(self, layer: AdapterLayer, config: VeRAConfig, projection: VeRAProjection, dtype: torch.dtype) -> None:
        super().__init__(config.vera_dropout)
        weight = layer.weight_matrix
        n = weight.shape[0]
        add = partial(self.add_tensor, like=weight, dtype=dtype)
        self.projection = projection
        add("vera_lambda_b", torch.zeros(n) if config.init_weights else torch.randn(n))
        add("vera_lambda_d", torch.full((config.r,), config.d_initial))
        if config.use_dora:
            add("lora_magnitude_vector", self._norm(layer.weight_for("norms")))
        if config.bias == "vera_only" and layer.base_bias is not None:
            add("bias", layer.base_bias)

    @property
    def reads(self) -> Reads:
        return "shape" if self.lora_magnitude_vector is None else "norms"

    def factors(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        n, k = weight.shape
        return self.projection.vera_A[:, :k], self.projection.vera_B[:n]

    def _norm(self, weight: Tensor) -> Tensor:
        A, B = self.factors(weight)
        up = (self.vera_lambda_b[:, None] * B * self.vera_lambda_d).detach()  # a new tensor each call: never kept
        return row_norm(self.memo, weight, A, up, 1.0, changing=True)

    def form(self, weight: Tensor, bias: Tensor | None) -> AdapterForm:
        A, B = self.factors(weight)
        if self.bias is not None:
            bias = self.bias
        out_scale: Tensor = self.vera_lambda_b
        if self.lora_magnitude_vector is None:
            return AdapterForm(A, B, mid_scale=self.vera_lambda_d, out_scale=out_scale, bias=bias)
        g = self.lora_magnitude_vector / self._norm(weight)
        return AdapterForm(A, B, self.vera_lambda_d, g * out_scale, g, bias, dropout_on_base=True)


@dataclass
class VeRAConfig(AdapterConfig):
    """VeRA: y = W0 x + b0 + λ_b ⊙ (B (λ_d ⊙ (A x̃))). Trains λ_b and λ_d; A and B are random, frozen, shared.

    Fields and defaults are PEFT's. r: rank, larger than LoRA's (256 to 1024 in the paper). projection_prng_key: seed
    of A and B. save_projection: whether a saved adapter holds A and B, or only the key they are regenerated from.
    vera_dropout: drop probability of x̃. d_initial: λ_d at the start. init_weights: whether λ_b starts at zero.
    use_dora: DVoRA, a trained magnitude m over VeRA's direction, y = (m/n) ⊙ (W0 + diag(λ_b) B diag(λ_d) A) x + b0
    (Liu et al. 2024, arXiv:2402.09353, section 5.4); PEFT has no such type, so its files carry peft_type "DVORA".
    Linear and Conv1D layers, and by target_parameters experts, each with vectors of its own; PEFT has no such adapters,
    so their files carry peft_type "VERA_EXPERTS".
    Raises ValueError for a value outside its range, by name.
    Source: Kopiczko et al. 2023, arXiv:2310.11454, section 3.
    """

    peft_type: ClassVar[str] = "VERA"
    aliases: ClassVar[tuple[str, ...]] = ("DVORA", "VERA_EXPERTS")
    in_peft: ClassVar[bool] = True
    title: ClassVar[str] = "VeRA"
    rows: ClassVar[tuple[str, ...]] = (
        "VeRA ([2310.11454](https://arxiv.org/abs/2310.11454)) | `VeRAConfig(r=256)` | 1 | λ_d | λ_b | b0 | λ_b, λ_d",
        "DVoRA (2402.09353, §5.4) | `VeRAConfig(use_dora=True)` | m/n | λ_d | g⊙λ_b | b0 | m, λ_b, λ_d",
    )
    adapter_classes: ClassVar[tuple[type[Adapter], ...]] = (VeRAAdapter,)
    shared_names: ClassVar[tuple[str, ...]] = ("vera_A", "vera_B")
    layer_kinds: ClassVar[tuple[type[AdapterLayer], ...]] = (AdapterLinear, AdapterExperts)
    narrowing_options: ClassVar[dict[str, tuple[type[AdapterLayer], ...]]] = {"use_dora": (AdapterLinear,)}
    bias_choices: ClassVar[tuple[str, ...]] = ("none", "vera_only")

    r: int = 256
    projection_prng_key: int = 0
    save_projection: bool = True
    vera_dropout: float = 0.0
    d_initial: float = 0.1
    init_weights: bool = True
    use_dora: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_probability("vera_dropout", self.vera_dropout)

    @classmethod
    def named(cls, fields: dict[str, Any]) -> str:
        dvora = fields.get("peft_type") == "DVORA" or fields.get("use_dora")
        return "DVoRA (VeRA with a magnitude)" if dvora else cls.title

    @property
    def dropout(self) -> float:
        return self.vera_dropout

    def build(self, layers: dict[str, AdapterLayer], dtype_of: Callable[[Tensor], torch.dtype]) -> dict[str, Adapter]:
        chosen = {
            path: chosen_parameters(self, path, layer)
            for path, layer in layers.items()
            if isinstance(layer, AdapterExperts)
        }
        shapes = [
            weight.shape[-2:]
            for path, layer in layers.items()
            for weight in (
                [layer.weight(name) for name in chosen[path]]
                if isinstance(layer, AdapterExperts)
                else [layer.weight_matrix]
            )
        ]
        k, n = max(shape[1] for shape in shapes), max(shape[0] for shape in shapes)
        first = next(iter(layers.values())).like
        projection = VeRAProjection(self.r, k, n, self.projection_prng_key, self.save_projection)
        projection.to(first.device, dtype_of(first))
        found: dict[str, Adapter] = {}
        for path, layer in layers.items():
            dtype = dtype_of(layer.like)
            if isinstance(layer, AdapterExperts):
                weights = {name: layer.weight(name) for name in chosen[path]}
                parts = {name: ExpertVeRA(weight, self, projection, dtype) for name, weight in weights.items()}
                found[path] = ExpertsAdapter(parts, self.vera_dropout)
            else:
                found[path] = VeRAAdapter(layer, self, projection, dtype)
        return found

    def shared_tensors(self, adapters: dict[str, Adapter]) -> dict[str, SharedTensors]:
        """{"": projection} where a file holds the projection: its tensors are named vera_A and vera_B."""
        first: Any = next(iter(adapters.values()), None)
        if isinstance(first, ExpertsAdapter):
            first = next(iter(first.parts.values()))
        return {"": first.projection} if isinstance(first, (VeRAAdapter, ExpertVeRA)) else {}

    def shared_factors(self, adapters: dict[str, Adapter]) -> tuple[Tensor, Tensor] | None:
        projection = next(iter(self.shared_tensors(adapters).values()), None)
        return (projection.vera_A, projection.vera_B) if isinstance(projection, VeRAProjection) else None

    def to_peft(self, paths: list[str]) -> dict[str, Any]:
        fields = super().to_peft(paths)
        if fields.pop("exclude_modules"):  # PEFT's VeRA has no such field: the paths say the same
            fields["target_modules"] = paths
        if self.target_parameters:
            fields["peft_type"] = "VERA_EXPERTS"
        if self.use_dora:
            fields["peft_type"] = "DVORA"
        else:
            del fields["use_dora"]
        return fields

    @classmethod
    def from_peft(cls, fields: dict[str, Any]) -> VeRAConfig:
        return super().from_peft(
            {**fields, "use_dora": fields.get("peft_type") == "DVORA" or fields.get("use_dora") or False}
        )
