"""LoRA, rsLoRA and DoRA: y = g ⊙ (W0 x) + h ⊙ B A x̃ + β."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..checks import check_probability, partition_error
from ..forms import PlainLoRA
from ..layers.experts import AdapterExperts, ExpertsAdapter
from ..layers.kinds import AdapterConv2d, AdapterEmbedding, AdapterParameter
from ..layers.layer import Adapter, AdapterLayer, Reads
from ..layers.linear import AdapterLinear
from ..reference import AdapterForm
from .config import AdapterConfig, pattern_of, pattern_value
from .experts import ExpertLoRA, chosen_parameters
from .row_norm import row_norm

INITS = (True, False, "gaussian", "eva")


# The dropout of an adapter of parameters in a file of ours.
DROPOUT = "fastadapt_lora_dropout"

_SMALL = ("bias", "lora_B_bias", "lora_magnitude_vector")


class LoRAAdapter(Adapter):
    """A and B of one layer, DoRA's magnitude m where there is one, and the trained biases.

        LoRA   h = s, g = 1                               s = α / r, rsLoRA α / √r
        DoRA   h = s · g, g = m / n, n = ‖W0 + s·B·A‖     β is not scaled

    Shapes: lora_A [r, in], lora_B [out, r], lora_magnitude_vector [out], lora_B_bias [out], bias [out]; for an
    embedding lora_embedding_A [r, V], lora_embedding_B [D, r]; for a Conv2d lora_A [r, in, kh, kw] and
    lora_B [out, r, 1, 1].
    """

    suffixes: ClassVar[Mapping[str, str]] = {
        "lora_A": "lora_A.weight",
        "lora_B": "lora_B.weight",
        "lora_embedding_A": "lora_embedding_A",
        "lora_embedding_B": "lora_embedding_B",
        "lora_B_bias": "lora_B.bias",
        "lora_magnitude_vector": "lora_magnitude_vector",
        "bias": "base_layer.bias",
    }

    lora_B_bias: nn.Parameter | None

    def __init__(self, layer: AdapterLayer, config: LoRAConfig, r: int, alpha: float, dtype: torch.dtype) -> None:
        super().__init__(config.lora_dropout)
        weight = layer.weight_matrix
        n, k = weight.shape
        add = partial(self.add_tensor, like=weight, dtype=dtype)
        self.scaling = alpha / (math.sqrt(r) if config.use_rslora else r)
        in_embedding = isinstance(layer, AdapterEmbedding)
        A, B = _initial(config.init_lora_weights, r, k, n, embedding=in_embedding)
        if isinstance(layer, AdapterConv2d):
            A, B = A.unflatten(1, layer.base_weight.shape[1:]), B[:, :, None, None]
        self._names = ("lora_embedding_A", "lora_embedding_B") if in_embedding else ("lora_A", "lora_B")
        for name, value in zip(self._names, (A, B), strict=True):
            frozen = config.freeze_A and name == "lora_A"
            add(name, value, frozen=frozen)
        self.register_parameter("lora_B_bias", None)
        if config.lora_bias:
            add("lora_B_bias", torch.zeros(n))
        if config.use_dora:
            add("lora_magnitude_vector", self._norm(layer.weight_for("norms")))
        if config.bias == "lora_only" and layer.base_bias is not None:
            add("bias", layer.base_bias)

    @property
    def reads(self) -> Reads:
        return "shape" if self.lora_magnitude_vector is None else "norms"

    @property
    def up(self) -> nn.Parameter:
        """B, in the shape that it has in a file."""
        up: nn.Parameter = getattr(self, self._names[1])
        return up

    @property
    def freezes_A(self) -> bool:  # noqa: N802 (A is the factor's name)
        """Whether A is a constant and B a parameter (LoRA-FA)."""
        A, B = self._names
        return A in self._buffers and B in self._parameters

    @property
    def factors(self) -> tuple[Tensor, Tensor]:
        """A [r, in] and B [out, r] as matrices."""
        A, B = self._names
        down, up = self.tensor(A), self.tensor(B)
        if down.dim() == 2:
            return down, up
        if error := partition_error(A, down):
            raise error
        return down.flatten(1), up.flatten(1)

    def _norm(self, weight: Tensor) -> Tensor:
        return row_norm(self.memo, weight, *self.factors, self.scaling, changing=self.training)

    def form(self, weight: Tensor, bias: Tensor | None) -> AdapterForm:
        A, B = self.factors
        parameters = self._parameters
        own_bias, bias_of_B, magnitude = [parameters[name] for name in _SMALL]
        if own_bias is not None:
            bias = own_bias
        if bias_of_B is not None:
            added = self.scaling * bias_of_B
            bias = added if bias is None else bias + added
        if magnitude is None:
            return AdapterForm(A, B, None, self.scaling, None, bias)
        g = magnitude / self._norm(weight)
        return AdapterForm(A, B, out_scale=g, base_scale=g, bias=bias, dropout_on_base=True, scaling=self.scaling)

    def extra_repr(self) -> str:
        return f"r={self.factors[0].shape[0]}, scaling={self.scaling:g}, dropout={self.dropout:g}"


class TiedLoRAAdapter(LoRAAdapter):
    """The adapter of a head whose weight is an embedding's: that of the embedding, A = Bₑᵀ and B = Aₑᵀ.

    It has no parameters of its own but a trained bias.
    """

    def __init__(self, source: LoRAAdapter, own: LoRAAdapter) -> None:
        Adapter.__init__(self, own.dropout)
        self.scaling = own.scaling
        # In a tuple it is no module inside of this one, whose parameters would be there twice.
        self._source = (source,)
        self._names = ("lora_A", "lora_B")
        self.register_parameter("lora_B_bias", None)
        self.register_parameter("bias", own.bias)
        self.checkpoint_names = dict(own.checkpoint_names)

    @property
    def lora_A(self) -> Tensor:  # noqa: N802 (A is the factor's name)
        return self._source[0].factors[1].T

    @property
    def lora_B(self) -> Tensor:  # noqa: N802
        return self._source[0].factors[0].T


def _initial(init: bool | str, r: int, k: int, n: int, *, embedding: bool) -> tuple[Tensor, Tensor]:
    """A [r, k] and B [n, r] at the start: one of them zero (not with init False, which PEFT has for its tests)."""
    if embedding and init is not False:
        return torch.zeros(r, k), torch.randn(n, r)
    if init == "gaussian":
        return torch.randn(r, k) / r, torch.zeros(n, r)
    # Kaiming-uniform with a = √5 is U(±1/√fan_in).
    A = torch.empty(r, k).uniform_(-1 / math.sqrt(k), 1 / math.sqrt(k))
    return A, torch.randn(n, r) if init is False else torch.zeros(n, r)


@dataclass
class EVAConfig:
    """How `initialize_eva` finds A and the ranks from activations. Fields and defaults are PEFT's.

    rho: ranks may grow up to rho times a layer's own; 1 keeps them uniform. tau: cosine similarity of a component
    before and after a batch from which on it counts as converged. use_label_mask, label_mask_value: leave out the
    tokens whose label is that value. whiten: divide each row of A by the square root of its singular value.
    adjust_scaling_factors: a layer's lora_alpha grows with its rank, so that s stays what it was.
    Raises ValueError for a value outside its range, by name.
    Source: Paischer et al. 2024, arXiv:2410.07170, sections 3.2 and 3.3.
    """

    rho: float = 2.0
    tau: float = 0.99
    use_label_mask: bool = True
    label_mask_value: int = -100
    whiten: bool = False
    adjust_scaling_factors: bool = True

    def __post_init__(self) -> None:
        if not self.rho >= 1.0:
            raise ValueError(f"rho must be at least 1, got {self.rho!r}")
        if not 0.0 <= self.tau <= 1.0:
            raise ValueError(f"tau must be in [0, 1], got {self.tau!r}")


@dataclass
class LoRAConfig(AdapterConfig):
    """LoRA: y = W0 x + b0 + s·B A x̃, s = lora_alpha / r. Trains A and B. Fields and defaults are PEFT's.

    r: rank of B A; its default and lora_alpha's are 8, as in PEFT.
    lora_dropout: drop probability of x̃, in [0, 1).
    use_rslora: s = lora_alpha / √r (Kalajdzievski 2023, arXiv:2312.03732).
    use_dora: magnitude and direction apart, y = (m/n) ⊙ (W0 + s·B A) x + b0 (Liu et al. 2024, arXiv:2402.09353); the
        norm n is a constant for the gradient, and active dropout follows the authors' rule.
    lora_bias: a bias behind B, trained.
    rank_pattern, alpha_pattern: other r and lora_alpha for module paths that match `(.*\\.)?(key)$`; the first key
    wins. init_lora_weights: True (A uniform(±1/√in), B zero), "gaussian" (A normal(0, 1/r²)), "eva" (like True until
    `initialize_eva` is called, which goes by eva_config), or False (B is not zero).
    freeze_A: LoRA-FA, A stays as it was drawn, so that nothing needs to keep x for a backward (Zhang et al. 2023,
        arXiv:2308.03303); its optimizer is optim.LoRAFAAdamW. An adapter file does not say it: it is an ordinary LoRA.
    share_rank: weights of experts have rank max(1, ⌊r / k⌋), k the experts that the router gives each token to, so that
        a token meets about r ranks in all (Schulman et al. 2025, doi:10.64434/tml.20250929); lora_alpha stays. A key of
        rank_pattern that names such a weight goes before it. A file has the ranks in rank_pattern, and not this.
    ensure_weight_tying: what target_modules or modules_to_save name of tied embeddings and heads stands for all of
        them: they are adapted by the same parameters, a head by those of the embedding turned round.
    Linear and Conv1D layers; Embedding and Conv2d without use_dora and lora_bias, Embedding without freeze_A too. By
    target_parameters the stacked weights of experts, each expert with an A, a B and, with use_dora, a norm of its own,
    without lora_bias; and the weights of routers, on whose input no dropout acts. lora_dropout draws one
    mask a token before the experts and one a row between their products. In models whose experts PEFT has a rule for,
    "all-linear", and names and expressions of the layers that an expert had, stand for them, in rank_pattern too.
    Raises ValueError for a value outside its range, by name.
    Source: Hu et al. 2021, arXiv:2106.09685, section 4.1.
    """

    peft_type: ClassVar[str] = "LORA"
    in_peft: ClassVar[bool] = True
    title: ClassVar[str] = "LoRA"
    rows: ClassVar[tuple[str, ...]] = (
        "LoRA ([2106.09685](https://arxiv.org/abs/2106.09685)) | `LoRAConfig(r, lora_alpha)` | 1 | 1 | α/r | b0 | A, B",
        "LoRA+ ([2402.12354](https://arxiv.org/abs/2402.12354)) | "
        "LoRA's, and `optim.parameter_groups(model, lr)`"
        " | 1 | 1 | α/r | b0 | A, B: B 16 times faster",
        "LoRA-FA ([2308.03303](https://arxiv.org/abs/2308.03303)) | "
        "`LoRAConfig(freeze_A=True)`, and `optim.LoRAFAAdamW(model)`"
        " | 1 | 1 | α/r | b0 | B; nothing keeps x",
        "EVA ([2410.07170](https://arxiv.org/abs/2410.07170)) | "
        '`LoRAConfig(init_lora_weights="eva")`, and `initialize_eva(model, batches)`'
        " | 1 | 1 | α/r | b0 | A, B; A and ranks from activations",
        "rsLoRA ([2312.03732](https://arxiv.org/abs/2312.03732)) | "
        "`LoRAConfig(use_rslora=True)`"
        " | 1 | 1 | α/√r | b0 | A, B",
        "DoRA ([2402.09353](https://arxiv.org/abs/2402.09353)) | "
        "`DoRAConfig(r, lora_alpha)`"
        " | m/n | 1 | s·m/n | b0 | m, A, B",
    )
    adapter_classes: ClassVar[tuple[type[LoRAAdapter]]] = (LoRAAdapter,)
    bias_choices: ClassVar[tuple[str, ...]] = ("none", "lora_only")
    layer_kinds: ClassVar[tuple[type[AdapterLayer], ...]] = (
        AdapterLinear,
        AdapterEmbedding,
        AdapterConv2d,
        AdapterExperts,
        AdapterParameter,
    )
    # freeze_A: an embedding's A starts at zero.
    narrowing_options: ClassVar[dict[str, tuple[type[AdapterLayer], ...]]] = {
        "use_dora": (AdapterLinear, AdapterExperts, AdapterParameter),
        "lora_bias": (AdapterLinear,),
        "freeze_A": (AdapterLinear, AdapterConv2d, AdapterExperts, AdapterParameter),
    }
    neutral_fields: ClassVar[dict[str, tuple[Any, ...]]] = {
        name: (None, False, {}, [])
        for name in (
            "layer_replication",
            "trainable_token_indices",
            "use_qalora",
            "alora_invocation_tokens",
            "use_bdlora",
            "arrow_config",
            "velora_config",
            "monteclora_config",
            "megatron_config",
            "kasa_config",
            # Of PEFT's first versions: which parts of a fused projection have a LoRA.
            "enable_lora",
        )
    }

    lora_alpha: float = 8
    lora_dropout: float = 0.0
    use_rslora: bool = False
    use_dora: bool = False
    lora_bias: bool = False
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    init_lora_weights: bool | str = True
    eva_config: EVAConfig | None = None
    freeze_A: bool = False
    ensure_weight_tying: bool = False
    share_rank: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_probability("lora_dropout", self.lora_dropout)
        if self.init_lora_weights not in INITS:
            raise ValueError(
                f"init_lora_weights must be True, False, 'gaussian' or 'eva', got {self.init_lora_weights!r}; an init "
                "that changes the base weight (pissa, olora, corda, lora_ga) must be converted with PEFT first"
            )
        if self.use_dora and self.lora_bias:
            raise ValueError("lora_bias cannot go with use_dora: DoRA does not scale a bias")
        if self.eva_config is not None and self.init_lora_weights != "eva":
            raise ValueError('eva_config goes with init_lora_weights="eva"')
        if self.init_lora_weights == "eva" and self.eva_config is None:
            self.eva_config = EVAConfig()
        for key, r in self.rank_pattern.items():
            if r <= 0:
                raise ValueError(f"rank_pattern[{key!r}] must be a positive integer, got {r!r}")

    @classmethod
    def named(cls, fields: dict[str, Any]) -> str:
        name = cls.title.replace("LoRA", "DoRA") if fields.get("use_dora") else cls.title
        if fields.get("use_rslora"):
            name += " with rsLoRA's scaling"
        return f"{name}, started by EVA" if fields.get("init_lora_weights") == "eva" else name

    @property
    def dropout(self) -> float:
        return self.lora_dropout

    @classmethod
    def from_peft(cls, fields: dict[str, Any]) -> LoRAConfig:
        eva = fields.get("eva_config")
        if DROPOUT in fields:
            fields = {**fields, "lora_dropout": fields[DROPOUT]}
        if fields.get("init_lora_weights") == "orthogonal":  # it leaves the base weight as it is
            fields = {**fields, "init_lora_weights": True}
        if isinstance(eva, dict):
            known = {field.name for field in dataclasses.fields(EVAConfig)}
            eva = EVAConfig(**{name: value for name, value in eva.items() if name in known})
        if fields.get("init_lora_weights") != "eva":
            eva = None
        return super().from_peft({**fields, "eva_config": eva})

    def to_peft(self, paths: list[str]) -> dict[str, Any]:
        fields = super().to_peft(paths)
        del fields["freeze_A"], fields["share_rank"]
        if self.target_parameters and self.lora_dropout:
            # PEFT refuses a dropout beside parameters, though it means nothing once the adapter is trained.
            fields |= {"lora_dropout": 0.0, DROPOUT: self.lora_dropout}
        return fields

    def rank(self, path: str) -> int:
        return pattern_value("rank_pattern", self.rank_pattern, path, self.r)

    def alpha(self, path: str) -> float:
        """The lora_alpha of the module at this path."""
        return pattern_value("alpha_pattern", self.alpha_pattern, path, self.lora_alpha)

    def build(self, layers: dict[str, AdapterLayer], dtype_of: Callable[[Tensor], torch.dtype]) -> dict[str, Adapter]:
        (kind,) = self.adapter_classes
        found: dict[str, Adapter] = {}
        for path, layer in layers.items():
            dtype = dtype_of(layer.like)
            if isinstance(layer, AdapterExperts):
                parts = {
                    name: ExpertLoRA(layer.weight(name), self, self.rank(key), self.alpha(key), dtype)
                    for name in chosen_parameters(self, path, layer)
                    for key in [f"{path}.{name}"]
                }
                found[path] = ExpertsAdapter(parts, self.lora_dropout)
            else:
                key = pattern_key(path, layer)
                found[path] = kind(layer, self, self.rank(key), self.alpha(key), dtype)
        return found


@dataclass
class DoRAConfig(LoRAConfig):
    """LoRAConfig with use_dora: y = (m/n) ⊙ (W0 + s·B A) x + b0, n the row norms of W0 + s·B A. Trains m, A and B.

    m starts at the row norms of W0, so that the adapter starts as the identity.
    Source: Liu et al. 2024, arXiv:2402.09353, section 4.
    """

    use_dora: bool = True


def pattern_key(path: str, layer: AdapterLayer) -> str:
    """What the patterns of ranks call the layer at a path: a router's by its weight, as target_parameters does."""
    return f"{path}.weight" if isinstance(layer, AdapterParameter) else path


def lora_of(
    layers: dict[str, AdapterLayer], factors: Mapping[str, PlainLoRA], **fields: Any
) -> tuple[LoRAConfig, dict[str, Adapter]]:
    """(config, adapters) of the LoRA that has these factors, of any rank and scale, at these module paths.

    `fields` are more of LoRAConfig's, target_modules among them; the weights of routers get into target_parameters.
    Raises ValueError for no layers.
    """
    if not factors:
        raise ValueError("the adapter adds nothing to any layer: there is no LoRA to make of it")
    keys = {path: pattern_key(path, layers[path]) for path in factors}
    ranks = {keys[path]: lora.A.shape[0] for path, lora in factors.items()}
    r = max(ranks.values())
    alphas = {keys[path]: lora.scaling * lora.A.shape[0] for path, lora in factors.items()}
    config = LoRAConfig(
        r=r,
        rank_pattern=pattern_of(ranks, r),
        alpha_pattern=pattern_of(alphas, 8.0),
        target_parameters=[key for path, key in keys.items() if key != path] or None,
        **fields,
    )
    dtypes = {id(layers[path].like): lora.A.dtype for path, lora in factors.items()}
    adapters = config.build(layers, lambda weight: dtypes[id(weight)])
    with torch.no_grad():
        for path, lora in factors.items():
            adapter = adapters[path]
            assert isinstance(adapter, LoRAAdapter)
            for parameter, value in zip(adapter.factors, (lora.A, lora.B), strict=True):
                parameter.copy_(value)
    return config, adapters
