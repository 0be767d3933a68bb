"""LoRA-drop: layers whose low-rank output matters keep a LoRA of their own, all others share one."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..layers.layer import Adapter, AdapterLayer
from ..layers.linear import AdapterLinear
from ..operators.calls import without_autocast
from .config import AdapterConfig
from .lora import LoRAAdapter, LoRAConfig

Kind = tuple[Any, ...]


@dataclass
class LoRADropConfig(LoRAConfig):
    """LoRA-drop: LoRA whose unimportant layers share one pair (A, B) for each module name and shape.

    threshold: T, the share of the outputs' energy that the layers with a pair of their own must have together.
    top_n: their number instead, for each module name and shape.
    fresh: whether training starts anew after the selection, or goes on from the probed weights (the paper does not say;
        the shared pair then starts as the strongest of those that it replaces).
    freeze_shared: whether the shared pair stays as it is; in the paper it trains, with the gradients summed.
    kept: paths of the layers with a pair of their own; None before `select_layers` has found them: plain LoRA, the
    probe. Files carry peft_type "LORA_DROP" and each layer's lora_A/B.weight, shared ones repeated; `export_lora`
    writes the same for PEFT, and a LoRA file in which layers of one name and shape hold equal pairs is read as
    LoRA-drop. Linear and Conv1D layers only. Raises ValueError for a value outside its range, by name.
    Source: Zhou et al. 2024, arXiv:2402.07721, sections 3.1 to 3.3.
    """

    peft_type: ClassVar[str] = "LORA_DROP"
    title: ClassVar[str] = "LoRA-drop"
    rows: ClassVar[tuple[str, ...]] = (
        "LoRA-drop ([2402.07721](https://arxiv.org/abs/2402.07721)) | "
        "`LoRADropConfig(threshold=0.9)`, and `select_layers(model, batches)`"
        " | 1 | 1 | α/r | b0 | A, B; weak layers share a pair",
    )
    layer_kinds: ClassVar[tuple[type[AdapterLayer], ...]] = (AdapterLinear,)

    threshold: float = 0.9
    top_n: int | None = None
    fresh: bool = True
    freeze_shared: bool = False
    kept: list[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.threshold <= 1:
            raise ValueError(f"threshold must be in (0, 1], got {self.threshold!r}")
        if self.top_n is not None and self.top_n < 0:
            raise ValueError(f"top_n must be at least 0, got {self.top_n!r}")
        if self.freeze_shared and self.fresh:
            raise ValueError(
                "freeze_shared goes with fresh=False: a fresh pair adds nothing, and frozen it would stay so"
            )

    def build(self, layers: dict[str, AdapterLayer], dtype_of: Callable[[Tensor], torch.dtype]) -> dict[str, Adapter]:
        for path in self.kept or []:
            if path not in layers:
                raise ValueError(f"kept must hold paths of adapted layers, and {path!r} is none: give the whole path")
        adapters = super().build(layers, dtype_of)
        for paths in [] if self.kept is None else _dropped(adapters, self.kept).values():
            pair = {name: getattr(adapters[paths[0]], name) for name in ("lora_A", "lora_B")}
            if self.freeze_shared:
                pair = {name: value.detach() for name, value in pair.items()}
            for path in paths:
                for name, value in pair.items():
                    _share(adapters[path], name, value)
        return adapters

    def select(self, energy: Mapping[str, float], adapters: Mapping[str, Adapter]) -> list[str]:
        """The paths of the layers that keep a LoRA: for each module name and shape the fewest whose shares of the
        energy add up to `threshold`, strongest first, or the `top_n` strongest.

        Raises ValueError where all of one kind have no energy: their B are still zero.
        """
        kept: list[str] = []
        for kind, paths in _kinds(adapters).items():
            ordered = sorted(paths, key=lambda path: -energy[path])
            total = sum(energy[path] for path in ordered)
            if not 0 < total < math.inf:
                what = "nothing" if total == 0 else "NaN or infinite values"
                raise ValueError(
                    f"the adapters of {kind[0]} put out {what}, so none of them is more important than another: train "
                    "the probe for a few steps first, at a rate that it bears"
                )
            if self.top_n is not None:
                kept += ordered[: self.top_n]
                continue
            found = 0.0
            for path in ordered:
                if found >= self.threshold * total:
                    break
                kept.append(path)
                found += energy[path]
        return [path for path in adapters if path in kept]


def _kind(path: str, adapter: Adapter) -> Kind:
    """Layers of one kind can share a pair: module name, shapes and scaling."""
    assert isinstance(adapter, LoRAAdapter)
    A, B = adapter.factors
    return path.rpartition(".")[2], tuple(A.shape), tuple(B.shape), adapter.scaling


def _kinds(adapters: Mapping[str, Adapter]) -> dict[Kind, list[str]]:
    kinds: dict[Kind, list[str]] = {}
    for path, adapter in adapters.items():
        kinds.setdefault(_kind(path, adapter), []).append(path)
    return kinds


def _dropped(adapters: Mapping[str, Adapter], kept: list[str]) -> dict[Kind, list[str]]:
    """The layers without a LoRA of their own, by kind."""
    rest = {path: adapter for path, adapter in adapters.items() if path not in kept}
    return _kinds(rest)


def _share(adapter: Adapter, name: str, value: Tensor) -> None:
    """Puts a tensor in the place of the adapter's own: a parameter trains, any other tensor is frozen."""
    delattr(adapter, name)
    if isinstance(value, nn.Parameter):
        adapter.register_parameter(name, value)
    else:
        adapter.register_buffer(name, value)


@contextmanager
def output_energy(
    layers: Mapping[str, AdapterLayer], adapter_name: str, mask: Callable[[], Tensor | None]
) -> Iterator[dict[str, Tensor]]:
    """Inside, every forward adds Σ ‖s B A x‖² over its tokens to each layer's entry: {path: scalar, fp32}.

        Σ_x ‖s B u‖² = s² ⟨BᵀB, Σ u uᵀ⟩, u = A x

    so that nothing larger than u is made. `mask()` gives the batch's mask of real tokens, [...] as x without its last
    dimension, or None.
    """
    energy = {path: torch.zeros((), device=layer.weight_matrix.device) for path, layer in layers.items()}

    def watch(path: str, layer: AdapterLayer) -> Callable[..., None]:
        def add(module: nn.Module, arguments: tuple[Any, ...]) -> None:
            adapter = layer.adapters[adapter_name]
            assert isinstance(adapter, LoRAAdapter)
            x = arguments[0].detach()
            real = mask()
            rows = x[real] if real is not None and real.shape == x.shape[:-1] else x.flatten(0, -2)
            A, B = (factor.detach() for factor in adapter.factors)
            with without_autocast(x):
                u = (rows @ A.T.to(rows.dtype)).float()
                up = B.float()
                energy[path] += adapter.scaling**2 * ((up.T @ up) * (u.T @ u)).sum()

        return add

    handles = [layer.register_forward_pre_hook(watch(path, layer)) for path, layer in layers.items()]
    try:
        yield energy
    finally:
        for handle in handles:
            handle.remove()


def recognised(config: AdapterConfig, tensors: Mapping[str, Tensor]) -> AdapterConfig:
    """`config`, or LoRA-drop's where the tensors of a LoRA file are a LoRA-drop: of one module name and shape, some
    layers hold one and the same pair, and it is not zero. A file with more than pairs of matrices is none."""
    pair_names = (".lora_A.weight", ".lora_B.weight")
    matrices = all(tensor.dim() == 2 for name, tensor in tensors.items() if name.endswith(pair_names))
    others = any("lora_" in name and not name.endswith(pair_names) for name in tensors)
    if type(config) is not LoRAConfig or not matrices or others:
        return config
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    for name, A in tensors.items():
        B = tensors.get(name.replace("lora_A", "lora_B"))
        if name.endswith(".lora_A.weight") and B is not None and A.dim() == 2:
            pairs[name.removesuffix(".lora_A.weight").removeprefix("base_model.model.")] = (A, B)
    kept: list[str] = []
    kinds: dict[Kind, list[str]] = {}
    for path, (A, B) in pairs.items():
        kinds.setdefault((path.rpartition(".")[2], A.shape, B.shape), []).append(path)
    for paths in kinds.values():
        classes: list[list[str]] = []
        for path in paths:
            same = next((found for found in classes if _equal(pairs[found[0]], pairs[path])), None)
            if same is None:
                classes.append([path])
            else:
                same.append(path)
        repeated = [found for found in classes if len(found) > 1]
        if len(repeated) > 1 or any(not bool(factor.any()) for found in repeated for factor in pairs[found[0]]):
            return config
        kept += [path for path in paths if not repeated or path not in repeated[0]]
    if len(kept) == len(pairs):
        return config
    own = {field.name: getattr(config, field.name) for field in fields(config) if field.init}
    return LoRADropConfig(**own, kept=kept)


def _equal(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> bool:
    return torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])
