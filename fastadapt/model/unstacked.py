"""An adapter on stacked weights of experts as a LoRA for each linear layer of each expert, which older files have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..forms import PlainLoRA, plain_lora
from ..layers.experts import AdapterExperts, stacked_weight
from ..layers.kinds import AdapterParameter
from ..layers.linear import AdapterLinear
from ..methods import LoRAConfig
from ..methods.config import pattern_of
from .adapted import PREFIX, Injection
from .experts import FUSED, names_in_layers, old_layers, old_path
from .targets import base_modules, saved_whole
from .wrappers import inside


@torch.no_grad()
def unstacked(model: nn.Module, injection: Injection) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(fields, tensors) of a PEFT directory with a LoRA for every expert's layers, by the names that they had.

        A[e] for gate and up alike, the halves of B[e]'s rows for one and the other; s in B

    What an expert's layers add is the same. All of them, and the routers, have one rank, the largest, filled up with
    zeros: by that they are stacked again. So are those of blocks that the adapter is not on, since PEFT takes a name
    for that of all blocks, and those of down beside gate and up.
    Raises ValueError for a model whose experts never had such names, a DoRA, and adapters on layers of other kinds.
    """
    names = names_in_layers(model)
    if not names:
        kind = getattr(getattr(inside(model), "config", None), "model_type", type(model).__name__)
        raise ValueError(
            f"adapter {injection.name!r} is on experts, and in models of type {kind} their layers have no names of "
            "their own: save it as stacks, with save_adapter"
        )
    # Experts and routers, which have other names here and in the pattern of ranks of a newer transformers.
    renamed: dict[str, PlainLoRA] = {}
    others: dict[str, PlainLoRA] = {}
    for path, layer in injection.layers.items():
        try:
            if isinstance(layer, AdapterExperts):
                renamed |= _of_experts(old_path(path, names), layer, injection.adapters[path], names)
            elif isinstance(layer, AdapterParameter):
                renamed[old_path(path, names)] = plain_lora(layer.settled_form(injection.adapters[path]))
            elif isinstance(layer, AdapterLinear):
                others[path] = plain_lora(layer.settled_form(injection.adapters[path]))
            else:
                raise ValueError(f"{type(layer.base_layer).__name__} is no linear layer")
        except ValueError as error:
            raise ValueError(f"adapter {injection.name!r} is no LoRA of linear layers: {path}: {error}") from None
    renamed |= _without_adapter(model, injection, names, renamed)
    r = max(lora.A.shape[0] for lora in renamed.values())
    old = injection.config
    config = LoRAConfig(
        r=r,
        lora_alpha=r,
        rank_pattern=pattern_of({path: lora.A.shape[0] for path, lora in others.items()}, r),
        alpha_pattern=pattern_of({path: lora.scaling * lora.A.shape[0] for path, lora in others.items()}, float(r)),
        target_modules=sorted({*others, *[path[max(path.find("experts."), 0) :] for path in renamed]}),
        modules_to_save=old.modules_to_save,
        task_type=old.task_type,
        base_model_name_or_path=old.base_model_name_or_path,
        revision=old.revision,
    )
    tensors = dict(injection._replace(config=config, layers={}, adapters={}).named_tensors)
    for path, (A, B, scaling) in (renamed | others).items():
        if path in renamed:
            missing = r - A.shape[0]
            A, B = F.pad(A, (0, 0, 0, missing)), F.pad(B * scaling, (0, missing))
        tensors |= {f"{PREFIX}model.{path}.lora_A.weight": A, f"{PREFIX}model.{path}.lora_B.weight": B}
    return config.to_peft([]), tensors


def _without_adapter(
    model: nn.Module, injection: Injection, names: dict[str, str], adapted: Mapping[str, PlainLoRA]
) -> dict[str, PlainLoRA]:
    """Nothing, as a LoRA, for layers of blocks that the adapter is not on, by the names that it has in others."""
    modules = base_modules(model)
    whole, used = saved_whole(modules, injection.config), {path.rpartition(".")[2] for path in adapted}
    if any(names[old] == FUSED for old in used):  # which PEFT looks for inside of another
        used |= {old for old, new in names.items() if new == "down_proj"}
    found: dict[str, PlainLoRA] = {}
    for old in old_layers(names, modules):
        path, _, leaf = old.key.rpartition(".")
        paths = [f"{old_path(path, names)}.{e}.{old.name}" for e in range(old.experts)] or [old_path(path, names)]
        if old.name not in used or paths[0] in adapted or path in whole:
            continue
        base: Any = getattr(modules[path], "base_layer", modules[path])
        weight = stacked_weight(base, leaf)[0] if old.experts else base._parameters[leaf]
        (n, k), parts = weight.shape, sum(new == names[old.name] for new in names.values())
        A = torch.zeros(1, k, device=weight.device)
        found |= dict.fromkeys(paths, PlainLoRA(A, torch.zeros(n // parts, 1, device=weight.device), 1.0))
    return found


def _of_experts(path: str, layer: AdapterExperts, adapter: Any, names: dict[str, str]) -> dict[str, PlainLoRA]:
    found = {}
    for name in adapter.parts:
        form = adapter.part(name).expert_form(layer.weight(name), layer.bias(name))
        if form.base_scale is not None:
            raise ValueError("it scales the base weights (DoRA), which no low-rank addition can do")
        count, n, _ = layer.weight(name).shape
        A, B = form.A, form.B.mT
        if form.mid_scale is not None:
            A = A * form.mid_scale[:, :, None]
        scaling = form.scaling
        if isinstance(form.out_scale, Tensor):
            B = B * form.out_scale[:, :, None]
        else:
            scaling *= form.out_scale
        layers = [old for old, new in names.items() if new == name]
        size = n // len(layers) if name == FUSED else n
        for e in range(count):
            down, up = (factor[e if len(factor) > 1 else 0] for factor in (A, B))
            for old, rows in zip(layers, up.split(size), strict=True):
                found[f"{path}.{e}.{old}"] = PlainLoRA(down, rows, scaling)
    return found
