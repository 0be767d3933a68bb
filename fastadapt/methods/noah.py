"""NOAH: prompts, LoRA and an adapter in every block of a vision transformer, in sizes that a search finds."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..layers.kinds import AdapterModule, AdapterNorm
from ..layers.layer import Adapter, AdapterLayer, StreamAdapter
from ..layers.linear import AdapterLinear
from ..operators.bottleneck.function import bottleneck
from ..reference import AdapterForm
from .blocks import block_of, norm_of, width
from .config import AdapterConfig, Control
from .vpt import MOST, Prefix, Prompts

MODULES = ("prompts", "lora", "adapter")
Sizes = dict[str, list[int]]


class NOAHSizes:
    """How much of each module runs in each block now: {"prompts" | "lora" | "adapter": a size for each block}.

    All adapters of one injection hold the same one, so that a search sets the sizes of a model in one place.
    """

    def __init__(self, largest: Mapping[str, Sequence[int]]) -> None:
        self.largest: Sizes = {name: list(largest[name]) for name in MODULES}
        self.current: Sizes = {name: list(sizes) for name, sizes in self.largest.items()}

    def set(self, sizes: Mapping[str, Sequence[int]]) -> None:
        """Takes other sizes. Raises ValueError where they are not between 0 and the largest, one for each block."""
        for name in MODULES:
            given, largest = sizes.get(name), self.largest[name]
            if (
                given is None
                or len(given) != len(largest)
                or any(not 0 <= size <= most for size, most in zip(given, largest, strict=True))
            ):
                raise ValueError(f"{name} must have {len(largest)} sizes of at most {largest}, got {given!r}")
        self.current = {name: list(sizes[name]) for name in MODULES}

    def is_replaced(self, block: int) -> bool:
        """Whether nothing ever reads what becomes of a block's prompts: the next has its own, or there is none."""
        prompts = self.current["prompts"]
        return block + 1 == len(prompts) or prompts[block + 1] > 0


class NOAHPrompts(Prompts):
    """A block's prompts, of which the first run."""

    def __init__(self, layer: AdapterLayer, sizes: NOAHSizes, block: int, patch_size: int, dtype: torch.dtype) -> None:
        super().__init__(layer, sizes.largest["prompts"][block], patch_size, 0.0, dtype)
        self.sizes, self.block = sizes, block

    def tokens(self, like: Tensor) -> Tensor:
        return self.prompt_embeddings[: self.sizes.current["prompts"][self.block]].to(like.dtype)


class NOAHPrefix(Prefix):
    """A block's prompts as keys and values, where the next block has its own."""

    def around(self, layer: AdapterLayer, run: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any) -> Any:
        _, prompts = self._source
        assert isinstance(prompts, NOAHPrompts)
        sizes, block = prompts.sizes, prompts.block
        if not sizes.current["prompts"][block] or not sizes.is_replaced(block):
            return run(x, *args, **kwargs)
        return super().around(layer, run, x, *args, **kwargs)


class NOAHProjection(Adapter):
    """LoRA of scale 1 on q, k or v, whose A is that of its siblings; the first of its ranks run.

    Shapes: lora_A [r, in], lora_B [out, r].
    """

    suffixes: ClassVar[Mapping[str, str]] = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight"}

    lora_A: nn.Parameter
    lora_B: nn.Parameter

    def __init__(
        self, layer: AdapterLayer, sizes: NOAHSizes, block: int, A: nn.Parameter | None, dtype: torch.dtype
    ) -> None:
        super().__init__(0.0)
        self.sizes, self.block = sizes, block
        n, k = layer.weight_matrix.shape
        r = sizes.largest["lora"][block]
        add = partial(self.add_tensor, like=layer.like, dtype=dtype)
        add("lora_A", torch.empty(r, k).uniform_(-1 / math.sqrt(k), 1 / math.sqrt(k)))
        add("lora_B", torch.zeros(n, r))
        if A is not None:
            self.lora_A = A

    def form(self, weight: Tensor, bias: Tensor | None) -> AdapterForm:
        r = self.sizes.current["lora"][self.block]
        return AdapterForm(self.lora_A[:r], self.lora_B[:, :r], bias=bias)


class NOAHAdapter(StreamAdapter):
    """z + U quick_gelu(D z + a) + c behind the MLP, of whose hidden features the first run.

    Shapes: down [r, d], down_bias [r], up [d, r], up_bias [d].
    """

    suffixes: ClassVar[Mapping[str, str]] = {name: name for name in ("down", "down_bias", "up", "up_bias")}

    down: nn.Parameter
    down_bias: nn.Parameter
    up: nn.Parameter
    up_bias: nn.Parameter

    def __init__(self, layer: AdapterLayer, sizes: NOAHSizes, block: int, dtype: torch.dtype) -> None:
        super().__init__(0.0)
        self.sizes, self.block = sizes, block
        d, r = width(layer), sizes.largest["adapter"][block]
        add = partial(self.add_tensor, like=layer.like, dtype=dtype)
        for name, shape in (("down", (r, d)), ("up", (d, r))):
            add(name, nn.init.xavier_uniform_(torch.empty(shape)) if r else torch.empty(shape))
            add(f"{name}_bias", 1e-6 * torch.randn(shape[0] if r else 0))

    def around(self, layer: AdapterLayer, run: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any) -> Any:
        y = run(x, *args, **kwargs)
        r = self.sizes.current["adapter"][self.block]
        if not r:
            return y
        return bottleneck(
            y,
            self.down[:r],
            self.up[:, :r],
            down_bias=self.down_bias[:r],
            up_bias=self.up_bias,
            residual=y,
            activation="quick_gelu",
            backend=layer.backend,
        )


class NOAHTokens(StreamAdapter):
    """A block's prompts as ordinary tokens, behind all others, where the next block has none to replace them with.

    They stay until a block that has prompts again, and to the end otherwise.
    """

    def __init__(self, sizes: NOAHSizes, block: int, prompts: Prompts, previous: NOAHTokens | None) -> None:
        super().__init__(0.0)
        self.sizes, self.block = sizes, block
        # In a tuple, so that they are no submodules: their own places in the model have them.
        self._others = (prompts, previous)
        self.appended = 0

    def around(self, layer: AdapterLayer, run: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any) -> Any:
        prompts, previous = self._others
        self.appended = 0 if previous is None else previous.appended
        if self.sizes.current["prompts"][self.block]:
            x = x[:, : x.shape[1] - self.appended]
            self.appended = 0
            if not self.sizes.is_replaced(self.block):
                tokens = prompts.tokens(x)
                self.appended = tokens.shape[0]
                x = torch.cat([x, tokens.expand(x.shape[0], -1, -1)], 1)
        return run(x, *args, **kwargs)


class NOAHControl(Control):
    """The supernet's training: another choice of sizes for each step, the same for the whole model."""

    def __init__(self, config: NOAHConfig, sizes: NOAHSizes) -> None:
        self.config, self.sizes = config, sizes
        self.generator = torch.Generator().manual_seed(int(torch.randint(2**31, ())))
        self.step()

    def step(self) -> None:
        """Draws the sizes of the next step: for each module its depth, and a size for each block that it reaches."""
        config, blocks = self.config, len(self.sizes.largest["lora"])

        def one_of(values: Sequence[int]) -> int:
            return values[int(torch.randint(len(values), (), generator=self.generator))]

        drawn: Sizes = {}
        for name in MODULES:
            depth = min(one_of(config.depths), blocks)
            drawn[name] = [one_of(config.dims) if block < depth else 0 for block in range(blocks)]
        self.sizes.set(drawn)

    def state_dict(self) -> dict[str, Any]:
        return {"generator": self.generator.get_state(), "sizes": self.sizes.current}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.generator.set_state(state["generator"])
        self.sizes.set(state["sizes"])


@dataclass
class NOAHConfig(AdapterConfig):
    """NOAH: in every block prompts (as VPT's deep ones), LoRA of scale 1 on q, k and v with one A, and an adapter
    z + U quick_gelu(D z + a) + c behind the MLP. Trains all three.

    prompts, lora, adapter: the sizes in each block; a block without prompts keeps the last prompts as ordinary tokens.
    supernet: the sizes are instead the largest of `dims` everywhere, and `control(model).step()` draws those of the
        next training step: for each module one of `depths` (how many of the first blocks have it) and for each of these
        blocks one of `dims`. `search.evolve` finds the best of them; `sizes_of` is where they are set.
    patch_size: by which the prompts start, see VPTConfig. The adapter does not start as the identity (Xavier). Cannot
    be merged: only its LoRA is a form. r is not used. target_modules: of each block the block itself, the norm in front
    of the attention, the attention, its q, k and v, and the MLP; None is those of a ViT. PEFT has no such type: its
    files carry peft_type "NOAH". Raises ValueError for a value outside its range, by name.
    Source: Zhang et al. 2022, arXiv:2206.04673, sections 3.2 and 3.3.
    """

    peft_type: ClassVar[str] = "NOAH"
    title: ClassVar[str] = "NOAH"
    rows: ClassVar[tuple[str, ...]] = (
        "NOAH ([2206.04673](https://arxiv.org/abs/2206.04673)) | "
        "`NOAHConfig(prompts, lora, adapter)`"
        " | all three in every block, in sizes of its own | the three above",
    )
    adapter_classes: ClassVar[tuple[type[Adapter], ...]] = (NOAHPrompts, NOAHProjection, NOAHAdapter)
    uses_r: ClassVar[bool] = False
    has_forms: ClassVar[bool] = False
    layer_kinds: ClassVar[tuple[type[AdapterLayer], ...]] = (AdapterModule, AdapterLinear, AdapterNorm)

    prompts: list[int] = field(default_factory=list)
    lora: list[int] = field(default_factory=list)
    adapter: list[int] = field(default_factory=list)
    supernet: bool = False
    dims: list[int] = field(default_factory=lambda: [1, 5, 10])
    depths: list[int] = field(default_factory=lambda: [3, 6, 9, 12])
    patch_size: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.patch_size <= 0:
            raise ValueError(f"patch_size must be a positive integer, got {self.patch_size!r}")
        for name in MODULES:
            if any(not 0 <= size <= MOST for size in getattr(self, name)):
                raise ValueError(f"{name} must hold sizes from 0 to {MOST}, got {getattr(self, name)!r}")
            if self.supernet and getattr(self, name):
                raise ValueError(f"{name} goes with supernet=False: the supernet has the largest of dims everywhere")
        for name in ("dims", "depths"):
            if not getattr(self, name) or any(not 0 < value <= MOST for value in getattr(self, name)):
                raise ValueError(f"{name} must hold integers from 1 to {MOST}, got {getattr(self, name)!r}")

    @property
    def dropout(self) -> float:
        return 0.0

    def usual_targets(self) -> dict[str, list[str] | str]:
        return {"vit": r"(.*\.)?(layers\.\d+|layernorm_before|attention|[qkv]_proj|mlp)"}

    def build(self, layers: dict[str, AdapterLayer], dtype_of: Callable[[Tensor], torch.dtype]) -> dict[str, Adapter]:
        norms: dict[str, AdapterLayer] = {p: layer for p, layer in layers.items() if isinstance(layer, AdapterNorm)}
        blocks = [block_of(path) for path in norms]
        for path in blocks:
            if path not in layers:
                raise ValueError(f"target_modules must hold the block {path or 'itself'} of each norm")
        sizes = NOAHSizes({name: self._sizes(name, len(blocks)) for name in MODULES})
        found: dict[str, Adapter] = {}
        prompts: dict[str, NOAHPrompts] = {}
        tokens: NOAHTokens | None = None
        for index, (path, layer) in enumerate(norms.items()):
            prompts[path] = NOAHPrompts(layer, sizes, index, self.patch_size, dtype_of(layer.like))
            tokens = NOAHTokens(sizes, index, prompts[path], tokens)
            found |= {path: prompts[path], blocks[index]: tokens}
        shared: dict[int, nn.Parameter] = {}
        for path, layer in layers.items():
            if path in found:
                continue
            norm = norm_of(path, norms)
            index, dtype = blocks.index(block_of(norm)), dtype_of(layer.like)
            if isinstance(layer, AdapterLinear):
                projection = NOAHProjection(layer, sizes, index, shared.get(index), dtype)
                shared[index] = projection.lora_A
                found[path] = projection
            elif hasattr(layer.base_layer, "q_proj"):
                found[path] = NOAHPrefix(path, layer, layers[norm], prompts[norm])
            else:
                found[path] = NOAHAdapter(layer, sizes, index, dtype)
        return {path: found[path] for path in layers}

    def _sizes(self, name: str, blocks: int) -> list[int]:
        if self.supernet:
            return [max(self.dims)] * blocks
        sizes = getattr(self, name)
        if len(sizes) != blocks:
            raise ValueError(f"{name} must have a size for each of the {blocks} blocks, got {sizes!r}")
        return list(sizes)

    def control(self, layers: dict[str, AdapterLayer], adapters: dict[str, Adapter]) -> Control:
        return NOAHControl(self, sizes_of(adapters)) if self.supernet else Control()

    @property
    def is_controlled(self) -> bool:
        return self.supernet


def sizes_of(adapters: Mapping[str, Adapter]) -> NOAHSizes:
    """The sizes that all of one NOAH's adapters go by. Raises ValueError where there are none."""
    for adapter in adapters.values():
        if isinstance(adapter, (NOAHProjection, NOAHAdapter, NOAHTokens)):
            return adapter.sizes
    raise ValueError("these adapters are no NOAH's")


def parameters_of(sizes: Mapping[str, Sequence[int]], d: int) -> int:
    """Trained parameters of a choice of sizes at width d: prompts p·d, LoRA h(d + 3d), adapter 2dh + h + d."""
    adapters = sum(2 * d * h + h + d for h in sizes["adapter"] if h)
    return adapters + 4 * d * sum(sizes["lora"]) + d * sum(sizes["prompts"])
