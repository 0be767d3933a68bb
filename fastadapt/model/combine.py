"""A new LoRA out of several adapters."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..forms import PlainLoRA, plain_lora
from ..layers.layer import AdapterLayer
from ..methods.lora import lora_of
from .adapted import Injection, active_adapters, present
from .inject import attach, check_new, set_adapter
from .targets import modules_of, selection_of

COMBINATIONS = ("svd", "linear", "cat")


def add_weighted_adapter(
    model: nn.Module,
    adapters: Sequence[str],
    weights: Sequence[float],
    adapter_name: str,
    combination_type: str = "svd",
    svd_rank: int | None = None,
) -> None:
    """Puts a new LoRA into the model that is a weighted sum of adapters; what was active stays active.

    combination_type, with ΔWᵢ = sᵢ Bᵢ Aᵢ and weights wᵢ:

        "svd"     the best rank-svd_rank approximation of Σ wᵢ ΔWᵢ; svd_rank is the largest rank of them by default
        "cat"     Σ wᵢ ΔWᵢ exactly, of rank Σ rᵢ
        "linear"  A = Σ ±√|wᵢ sᵢ| Aᵢ, B = Σ √|wᵢ sᵢ| Bᵢ: of equal ranks, and not the sum of the products

    Any adapter without a scale on the base path can take part, LoRA, AdaLoRA or VeRA; the result has scale 1 and does
    not train. A layer gets what those adapters have there that have it. Names and rules are PEFT's
    add_weighted_adapter. Raises ValueError for an unknown name, a number of weights that is not theirs, another
    combination_type, ranks that differ in "linear", and for DoRA, trained biases or modules_to_save, which do not add
    up; the model is then as it was.
    """
    check_new(model, adapter_name)
    if combination_type not in COMBINATIONS:
        raise ValueError(f"combination_type must be one of {', '.join(COMBINATIONS)}, got {combination_type!r}")
    if not adapters or len(adapters) != len(weights):
        raise ValueError(
            f"there must be a weight for each adapter, got {len(adapters)} adapters, {len(weights)} weights"
        )
    if not all(math.isfinite(weight) for weight in weights):
        raise ValueError(f"weights must be finite numbers, got {list(weights)!r}")
    if svd_rank is not None and svd_rank <= 0:
        raise ValueError(f"svd_rank must be a positive integer, got {svd_rank!r}")
    sources = [present(model, name) for name in adapters]
    for source in sources:
        if source.copies:
            raise ValueError(
                f"adapter {source.name!r} has trained {', '.join(source.copies)} (modules_to_save), which cannot add up"
            )
    layers: dict[str, AdapterLayer] = {path: layer for source in sources for path, layer in source.layers.items()}
    if not layers:
        raise ValueError(f"adapters {', '.join(map(repr, adapters))} have no layers to combine")
    with torch.no_grad():
        parts = {path: _parts(path, layer, sources, weights) for path, layer in layers.items()}
        # AdaLoRA may have pruned all of a layer.
        parts = {path: found for path, found in parts.items() if any(part.A.shape[0] for _, part in found)}
        layers = {path: layers[path] for path in parts}
        if combination_type == "svd" and svd_rank is None:
            svd_rank = max(part.A.shape[0] for found in parts.values() for _, part in found)
        combined = {path: _combined(path, found, combination_type, svd_rank) for path, found in parts.items()}
        first = sources[0].config
        config, built = lora_of(
            layers,
            {path: PlainLoRA(A, B, 1.0) for path, (A, B) in combined.items()},
            **selection_of(model, modules_of(layers, layers)),
            task_type=first.task_type,
            base_model_name_or_path=first.base_model_name_or_path,
            revision=first.revision,
            fan_in_fan_out=first.fan_in_fan_out,
        )
    for path, adapter in built.items():
        adapter.train(layers[path].training)
    before = active_adapters(model)
    attach(model, Injection(adapter_name, config, layers, built, {}), trainable=False)
    set_adapter(model, before)


def _parts(
    path: str, layer: AdapterLayer, sources: Sequence[Injection], weights: Sequence[float]
) -> list[tuple[float, PlainLoRA]]:
    """(w, ΔW's factors) of every adapter that this layer has."""
    found = []
    for source, weight in zip(sources, weights, strict=True):
        if path not in source.adapters:
            continue
        form = layer.settled_form(source.adapters[path])
        if form.bias is not layer.base_bias:
            raise ValueError(f"adapter {source.name!r} trains the bias of {path}, which cannot be combined")
        try:
            found.append((weight, plain_lora(form)))
        except ValueError as error:
            raise ValueError(f"adapter {source.name!r} cannot be combined: {path}: {error}") from None
    return found


def _combined(
    path: str, parts: list[tuple[float, PlainLoRA]], kind: str, svd_rank: int | None
) -> tuple[Tensor, Tensor]:
    """A [r, in] and B [out, r] of the new adapter, of scale 1."""
    if kind == "linear":
        ranks = sorted({part.A.shape[0] for _, part in parts})
        if len(ranks) > 1:
            raise ValueError(f'"linear" adds factors of one rank, and {path} has ranks {ranks}: take "svd" or "cat"')
        A = B = None
        for weight, part in parts:
            factor = weight * part.scaling
            root = math.sqrt(abs(factor))
            a, b = math.copysign(root, factor) * part.A, root * part.B
            A, B = (a, b) if A is None or B is None else (A + a, B + b)
        assert A is not None
        assert B is not None
        return A, B
    A = torch.cat([weight * part.scaling * part.A for weight, part in parts])
    B = torch.cat([part.B for _, part in parts], dim=1)
    if kind == "cat":
        return A, B
    assert svd_rank is not None
    return _truncated(A, B, svd_rank)


def _truncated(A: Tensor, B: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """The best rank-r approximation of B A, by the SVD of the small middle of two QRs: B A itself is never made."""
    left, right_t = torch.linalg.qr(B.double()), torch.linalg.qr(A.double().T)
    U, S, Vh = torch.linalg.svd(left.R @ right_t.R.T, full_matrices=False)
    r = min(r, S.shape[0])
    up, down = left.Q @ (U[:, :r] * S[:r]), Vh[:r] @ right_t.Q.T
    return down.to(A.dtype), up.to(B.dtype)
