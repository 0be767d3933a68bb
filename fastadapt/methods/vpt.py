"""VPT: trained tokens in front of a vision transformer's own, for its first block (shallow) or for each (deep)."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..checks import check_probability
from ..layers.kinds import AdapterModule, AdapterNorm
from ..layers.layer import Adapter, AdapterLayer, StreamAdapter
from ..layers.linear import AdapterLinear
from .blocks import norm_of, width
from .config import AdapterConfig


class Prompts(StreamAdapter):
    """The prompt tokens of one block, at the norm that they pass through; they change nothing in the stream itself.

    Shapes: prompt_embeddings [tokens, d].
    """

    suffixes: ClassVar[Mapping[str, str]] = {"prompt_embeddings": "prompt_embeddings"}

    prompt_embeddings: nn.Parameter

    def __init__(self, layer: AdapterLayer, tokens: int, patch_size: int, dropout: float, dtype: torch.dtype) -> None:
        super().__init__(dropout)
        d = width(layer)
        bound = math.sqrt(6 / (3 * patch_size**2 + d))
        self.add_tensor("prompt_embeddings", torch.empty(tokens, d).uniform_(-bound, bound), layer.like, dtype)

        self._dropped: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:  # copies and pickles start empty
        return {**self.__dict__, "_dropped": None}

    def around(self, layer: AdapterLayer, run: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.training and self.dropout:  # once a forward: keys and values have one mask
            self._dropped = nn.functional.dropout(self.prompt_embeddings, self.dropout)
        return run(x, *args, **kwargs)

    def tokens(self, like: Tensor) -> Tensor:
        """The prompts [tokens, d] in the dtype of `like`, dropped while training."""
        dropped = self._dropped if self.training and self.dropout else None
        tokens: Tensor = self.prompt_embeddings if dropped is None else dropped
        return tokens.to(like.dtype)


class ShallowPrompts(Prompts):
    """Prompt tokens behind the first of the tokens that a module gives (CLS), in front of all others."""

    def around(self, layer: AdapterLayer, run: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any) -> Any:
        y = super().around(layer, run, x, *args, **kwargs)
        return torch.cat([y[:, :1], self.tokens(y).expand(y.shape[0], -1, -1), y[:, 1:]], 1)


# More tokens, or hidden features, than any model has: a file that asks for them is none to make memory for.
MOST = 2**16

# What an attention module must have: transformers' names.
PARTS = ("q_proj", "k_proj", "v_proj", "o_proj", "head_dim", "scaling", "config")


class Prefix(StreamAdapter):
    """A block's prompts as keys and values more of its attention: W_k norm(P) + b_k and W_v norm(P) + b_v.

    What becomes of deep prompts behind the attention is replaced by the next block's, so their queries, MLP and output
    projection are never computed. Outside training keys and values are kept. Raises ValueError for an attention module
    that has not transformers' parts.
    """

    def __init__(self, path: str, attention: AdapterLayer, norm: AdapterLayer, prompts: Prompts) -> None:
        super().__init__(0.0)
        missing = [name for name in PARTS if not hasattr(attention.base_layer, name)]
        if missing:
            raise ValueError(
                f"target_modules: {path}, a {type(attention.base_layer).__name__}, has no {', '.join(missing)}: "
                "prompts need an attention module with transformers' names of its parts"
            )
        # In a tuple, so that they are no submodules: their own places in the model have them.
        self._source = (norm, prompts)

    def around(self, layer: AdapterLayer, run: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.attended(layer.base_layer, x, *args, **kwargs)

    def attended(self, attention: Any, x: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        """(output [batch, tokens, d], weights or None) of the attention over the tokens of x and the prompts."""
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        def heads(y: Tensor) -> Tensor:
            split: Tensor = y.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
            return split

        keys, values = (
            torch.cat([self._projected(attention, name, x).expand(x.shape[0], -1, -1), getattr(attention, name)(x)], 1)
            for name in ("k_proj", "v_proj")
        )
        if attention_mask is not None:  # every token sees the prompts
            prompts = keys.shape[1] - x.shape[1]
            visible = 1.0 if attention_mask.dtype == torch.bool else 0.0
            attention_mask = nn.functional.pad(attention_mask, (prompts, 0), value=visible)
        # Each of transformers' models has its own eager attention, beside the module.
        eager = getattr(sys.modules[type(attention).__module__], "eager_attention_forward", None)
        interface = ALL_ATTENTION_FUNCTIONS.get_interface(
            attention.config._attn_implementation, eager or ALL_ATTENTION_FUNCTIONS["sdpa"]
        )
        output, weights = interface(
            attention,
            heads(attention.q_proj(x)),
            heads(keys),
            heads(values),
            attention_mask,
            dropout=attention.attention_dropout if attention.training else 0.0,
            scaling=attention.scaling,
            **kwargs,
        )
        return attention.o_proj(output.reshape(*x.shape[:-1], -1)), weights

    def _projected(self, attention: Any, name: str, like: Tensor) -> Tensor:
        """What a projection makes of the prompts. Shapes: [tokens, out]."""
        norm, prompts = self._source
        projection = getattr(attention, name)
        tokens = prompts.tokens(like)

        def make() -> Tensor:
            normed = norm.with_forms(tokens)
            # Apart, as q is not to be computed.
            projected: Tensor = (
                projection.apart(normed) if isinstance(projection, AdapterLinear) else projection(normed)
            )
            return projected.to(like.dtype)

        layers = [part for part in (projection, norm) if isinstance(part, AdapterLayer) and not part.merged]
        alone = all([isinstance(adapter, Prompts) for layer in layers for adapter in layer.active_adapters])
        if not alone or prompts.training:  # other adapters, or a dropout mask, make another prefix each time
            return make()
        parts = (getattr(projection, "base_layer", projection), norm.base_layer)
        if not all([isinstance(getattr(part, "weight", None), Tensor) for part in parts]):
            return make()  # a container or a quantised layer, which does not say what it depends on
        own = [getattr(part, name, None) for part in parts for name in ("weight", "bias")]
        sources = [prompts.prompt_embeddings, *own]
        kind = like.device.type
        autocast = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind)
        return self.memo(name, sources, make, tokens.shape, like.dtype, autocast)


@dataclass
class VPTConfig(AdapterConfig):
    """VPT: num_virtual_tokens trained tokens a prompted block, without position embedding. Trains them alone.

    deep: every block has prompts of its own in the place of what became of the last block's. They are exactly keys and
        values more, W_k norm(P) and W_v norm(P), which are kept between calls outside training. The targets are the
        attention of each block and the norm in front of it. Otherwise (shallow) the tokens join those of the
        embeddings, behind the first (CLS), and go through all blocks; the target is the module that gives the
        embeddings.
    prompt_dropout: drop probability of the prompts. patch_size: P, by which they start: uniform(±√(6 / (3P² + d))).
    Cannot be merged. r is not used. target_modules: None is those of a ViT. PEFT has no such type: its files carry
    peft_type "VPT". Raises ValueError for a value outside its range, by name.
    Source: Jia et al. 2022, arXiv:2203.12119, section 3.2.
    """

    peft_type: ClassVar[str] = "VPT"
    title: ClassVar[str] = "VPT"
    rows: ClassVar[tuple[str, ...]] = (
        "VPT ([2203.12119](https://arxiv.org/abs/2203.12119)) | "
        "`VPTConfig(num_virtual_tokens, deep)`"
        " | trained tokens in front of the first block, or of every block"
        " | deep: keys and values more, kept at inference",
    )
    adapter_classes: ClassVar[tuple[type[Adapter], ...]] = (Prompts,)
    uses_r: ClassVar[bool] = False
    has_forms: ClassVar[bool] = False
    layer_kinds: ClassVar[tuple[type[AdapterLayer], ...]] = (AdapterModule, AdapterNorm)

    num_virtual_tokens: int = 5
    deep: bool = False
    prompt_dropout: float = 0.0
    patch_size: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        check_probability("prompt_dropout", self.prompt_dropout)
        for name in ("num_virtual_tokens", "patch_size"):
            if not 0 < getattr(self, name) <= MOST:
                raise ValueError(f"{name} must be an integer from 1 to {MOST}, got {getattr(self, name)!r}")

    @property
    def dropout(self) -> float:
        return self.prompt_dropout

    def usual_targets(self) -> dict[str, list[str] | str]:
        return {"vit": r"(.*\.)?(attention|layernorm_before)" if self.deep else r"(.*\.)?embeddings"}

    def build(self, layers: dict[str, AdapterLayer], dtype_of: Callable[[Tensor], torch.dtype]) -> dict[str, Adapter]:
        def made(kind: type[Prompts], layer: AdapterLayer) -> Prompts:
            return kind(layer, self.num_virtual_tokens, self.patch_size, self.prompt_dropout, dtype_of(layer.like))

        if not self.deep:
            if len(layers) > 1:
                raise ValueError(
                    f"target_modules must be one module without deep=True, the one that gives the embeddings, got "
                    f"{', '.join(layers)}"
                )
            return {path: made(ShallowPrompts, layer) for path, layer in layers.items()}
        prompts = {path: made(Prompts, layer) for path, layer in layers.items() if isinstance(layer, AdapterNorm)}
        found: dict[str, Adapter] = dict(prompts)
        for path, layer in layers.items():
            if path not in prompts:
                norm = norm_of(path, prompts)
                found[path] = Prefix(path, layer, layers[norm], prompts[norm])
        return {path: found[path] for path in layers}
