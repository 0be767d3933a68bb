"""RepAdapter: a linear bottleneck before frozen layers, which merges into all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ..checks import check_probability
from ..layers.layer import Adapter, AdapterLayer, Reads
from ..layers.linear import AdapterLinear
from ..layers.sharing import MadeOf, circumstances, is_consumed, makers
from ..layers.siblings import siblings
from ..operators.bottleneck.function import bottleneck
from ..operators.calls import without_autocast
from ..reference import AdapterForm
from ..staleness import Kept
from .config import AdapterConfig


class _Read(NamedTuple):
    """x' for one x in some circumstances, and the layers that have fetched it."""

    result: Tensor
    given: tuple[Any, ...]
    served: list[AdapterLayer]


class RepAdapter(Adapter):
    """D, a, G and c before the layers that read one x: x' = x + s (G dropout(D x + a) + c).

    While training the layers read x', which is made once for all of them. Otherwise each has it in a form:

        B = W0 G     A = D     h = s     bias = b0 + s W0 (G a + c)

    Shapes: conv_A [r, in, 1], conv_A_bias [r], conv_B [in, r / groups, 1], conv_B_bias [in]: G is block-diagonal, its
    g-th block maps the g-th slice of the hidden features to the g-th slice of x.
    """

    suffixes: ClassVar[Mapping[str, str]] = {
        "conv_A": "conv_A.weight",
        "conv_A_bias": "conv_A.bias",
        "conv_B": "conv_B.weight",
        "conv_B_bias": "conv_B.bias",
    }

    conv_A: nn.Parameter
    conv_A_bias: nn.Parameter
    conv_B: nn.Parameter
    conv_B_bias: nn.Parameter

    def __init__(self, layer: AdapterLayer, config: RepAdapterConfig, readers: int, dtype: torch.dtype) -> None:
        super().__init__(config.adapter_dropout)
        self.scaling, self.groups, self.readers = config.scaling, config.groups, readers
        k = layer.weight_matrix.shape[1]
        if k % config.groups:
            raise ValueError(f"groups must divide the features of what the layer reads, {k}, got {config.groups}")
        add = partial(self.add_tensor, like=layer.like, dtype=dtype)
        add("conv_A", nn.init.xavier_uniform_(torch.empty(config.r, k, 1)))
        add("conv_A_bias", torch.zeros(config.r))
        add("conv_B", torch.zeros(k, config.r // config.groups, 1))
        add("conv_B_bias", torch.zeros(k))
        self.memo = Kept(most=readers)
        self._read: MadeOf | None = None

    def __getstate__(self) -> dict[str, Any]:  # copies and pickles start empty
        return {**self.__dict__, "_read": None}

    def forget(self) -> None:
        super().forget()
        self._read = None

    @property
    def reads(self) -> Reads:
        return "values"

    def on_stream(self, layer: AdapterLayer) -> bool:
        # What a layer that is called does with x' only the layer itself can say.
        if not self.training and not layer.reason:
            return False
        if len(layer.active) == 1:
            return True
        # Adapters that are active together add up, which only forms do.
        if self.dropout:
            raise ValueError(
                f"RepAdapter drops its hidden features, adapter_dropout={self.dropout}, and so cannot train together "
                "with another adapter on the same layer: give it adapter_dropout=0.0, or activate it alone"
            )
        return False

    def around(self, layer: AdapterLayer, run: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return run(self._before(layer, x), *args, **kwargs)

    def _read_by(self, layer: AdapterLayer, x: Tensor) -> Tensor:
        """x' for x."""
        return bottleneck(
            x,
            self.conv_A[..., 0],
            self.conv_B[..., 0],
            down_bias=self.conv_A_bias,
            up_bias=self.conv_B_bias,
            residual=x,
            scaling=self.scaling,
            activation="identity",
            groups=self.groups,
            dropout=self.dropout,
            training=self.training,
            backend=layer.backend,
        )

    def _before(self, layer: AdapterLayer, x: Tensor) -> Tensor:
        if self.readers == 1:
            return self._read_by(layer, x)
        # One bottleneck, and so one dropout mask, for all that read x: each of them fetches it once.
        current, given = self._read, (*circumstances(x), *makers([self]))
        read: _Read | None = current.made if current is not None and current.of(x) else None
        again = read is not None and (is_consumed(read.result) or any([other is layer for other in read.served]))
        if read is None or read.given != given or again:
            read = _Read(self._read_by(layer, x), given, [])
            current = MadeOf(x, read, self._drop)
        read.served.append(layer)
        self._read = current if len(read.served) < self.readers else None
        return read.result

    def _drop(self, old: MadeOf) -> None:
        if self._read is old:
            self._read = None

    def _into(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """(W0 G without the zeros of G, W0 (G a + c)). Shapes: weight [out, in]; results [out, r] and [out]."""
        with without_autocast(weight):
            parts = weight.to(self.conv_B.dtype).chunk(self.groups, 1)
            blocks = zip(parts, self.conv_B[..., 0].chunk(self.groups), strict=True)
            B = torch.cat([part @ block for part, block in blocks], 1)
            shifts = zip(parts, self.conv_B_bias.chunk(self.groups), strict=True)
            return B, sum([part @ shift for part, shift in shifts], B @ self.conv_A_bias)

    def form(self, weight: Tensor, bias: Tensor | None) -> AdapterForm:
        weight = weight.detach()
        sources = (weight, self.conv_A_bias, self.conv_B, self.conv_B_bias)
        # By weight: each layer that reads x has its own.
        B, shift = self.memo(weight.data_ptr(), sources, lambda: self._into(weight))
        beta = self.scaling * shift if bias is None else torch.add(bias.detach(), shift, alpha=self.scaling)
        return AdapterForm(self.conv_A[..., 0], B, out_scale=self.scaling, bias=beta)


@dataclass
class RepAdapterConfig(AdapterConfig):
    """RepAdapter: the target layers read x' = x + s (G dropout(D x + a) + c) in the place of x. Trains D, a, G and c.

    r: hidden features. groups: diagonal blocks of G. scaling: s, which the paper searches in 0.1 to 10.
    adapter_dropout: drop probability of the hidden features. Target layers that are siblings (q, k and v) read one x
    and share one adapter. Starts as the identity. Merges exactly: W' = W0 (I + s G D), b' = b0 + s W0 (G a + c).
    target_modules: None is q, k, v and the first layer of the MLP of a ViT; without the latter it is the paper's
    variant for attention alone. PEFT has no such type: its files carry peft_type "REPADAPTER", and `export_lora` makes
    a LoRA with biases of it. Linear and Conv1D layers only.
    Raises ValueError for a value outside its range, by name.
    Source: Luo et al. 2023, arXiv:2302.08106, sections 3.2 and 3.3.
    """

    peft_type: ClassVar[str] = "REPADAPTER"
    title: ClassVar[str] = "RepAdapter"
    rows: ClassVar[tuple[str, ...]] = (
        "RepAdapter ([2302.08106](https://arxiv.org/abs/2302.08106)) | "
        "`RepAdapterConfig(r, groups, scaling)`"
        " | 1 | 1 | s | b0+sW0(Ga+c) | D, a, G, c; A = D, B = W0G",
    )
    adapter_classes: ClassVar[tuple[type[Adapter], ...]] = (RepAdapter,)
    layer_kinds: ClassVar[tuple[type[AdapterLayer], ...]] = (AdapterLinear,)

    groups: int = 2
    scaling: float = 1.0
    adapter_dropout: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_probability("adapter_dropout", self.adapter_dropout)
        if self.groups <= 0 or self.r % self.groups:
            raise ValueError(f"groups must be positive and divide r, {self.r}, got {self.groups!r}")

    @property
    def dropout(self) -> float:
        return self.adapter_dropout

    def usual_targets(self) -> dict[str, list[str] | str]:
        return {"vit": r"(.*\.)?([qkv]_proj|fc1)"}

    def build(self, layers: dict[str, AdapterLayer], dtype_of: Callable[[Tensor], torch.dtype]) -> dict[str, Adapter]:
        readers: dict[tuple[str, tuple[str, ...]], list[str]] = {}
        for path in layers:
            readers.setdefault((path.rpartition(".")[0], siblings(path)), []).append(path)
        built: dict[str, Adapter] = {}
        for paths in readers.values():
            first = layers[paths[0]]
            try:
                adapter = RepAdapter(first, self, len(paths), dtype_of(first.like))
            except ValueError as error:
                raise ValueError(f"{paths[0]}: {error}") from None
            built |= dict.fromkeys(paths, adapter)
        return {path: built[path] for path in layers}
