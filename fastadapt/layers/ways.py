"""Which way an adapted layer runs, and how a base layer that can only be called is read.

Fused: the layer's formula and the adapter's form are one operator, on the layer's own weight. Called: the layer does
more than its formula (a forward of its own, hooks, a weight that is made at each access or fetched for each call), so
it is called, and the form goes onto what it gave. Hooks come and go: the way is chosen at each call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks_of_all
from torch.nn.utils.parametrize import type_before_parametrizations

from ..checks import FLOATING
from ..operators.calls import rows_of
from ..operators.dropout import draw_dropout, keep_probability
from ..operators.masks import dropout_mask
from ..staleness import version

# The hooks on every module: they see the base layer where it is called.
_FORWARD_HOOKS, _PRE_HOOKS = hooks_of_all._global_forward_hooks, hooks_of_all._global_forward_pre_hooks


def is_plain(base: nn.Module, forward: Callable[..., Any] | None) -> bool:
    """Whether the layer computes what `forward` does on a parameter of its own, and nothing beside it."""
    own = base.__dict__
    return (
        type(base).forward is forward
        and type(own["_parameters"].get("weight")) is nn.Parameter
        and "forward" not in own
        and not own["_modules"]
        and not own["_buffers"]
        and not own["_forward_hooks"]
        and not own["_forward_pre_hooks"]
        and not own["_backward_hooks"]
        and not own["_backward_pre_hooks"]
        and not _FORWARD_HOOKS
        and not _PRE_HOOKS
    )


def is_packed_linear(base: nn.Module) -> bool:
    """Whether it is a linear layer by what it says of itself, with a weight that it alone can read: GPTQ, AWQ, HQQ."""
    sizes = [getattr(base, name, None) for name in ("in_features", "out_features")]
    if isinstance(base, nn.Linear) or not all([type(size) is int for size in sizes]) or base._modules:
        return False
    tensors = [t for t in (*base._parameters.values(), *base._buffers.values()) if t is not None]
    weight = base._parameters.get("weight")
    return bool(tensors) and (weight is None or weight.dtype not in FLOATING)


def is_hooked(module: nn.Module) -> bool:
    """Whether something runs beside the module's own forward, or in its place."""
    own = module.__dict__
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return "forward" in own or any([own[kind] for kind in kinds]) or bool(_FORWARD_HOOKS or _PRE_HOOKS)


def why_called(base: nn.Module, forward: Callable[..., Any] | None) -> str:
    """In words what `is_plain` finds, "" where it finds nothing."""
    own, name = base.__dict__, type(base).__name__
    if is_plain(base, forward):
        return ""
    if is_offloaded(base):
        return "its weight is offloaded between calls"
    if type(base).forward is not forward:
        return f"{name} has a forward of its own"
    weight = own["_parameters"].get("weight")
    if weight is None:
        return "its weight is made at each access"
    if type(weight) is not nn.Parameter:
        return f"its weight is a {type(weight).__name__}"
    if "forward" in own:
        return "its forward is patched on the instance"
    if own["_modules"] or own["_buffers"]:
        return "it holds more than its parameters"
    return "it has hooks"


def is_offloaded(module: nn.Module) -> bool:
    """Whether accelerate fetches the module's tensors for each call."""
    return "_hf_hook" in module.__dict__ and any([p.is_meta for p in module._parameters.values() if p is not None])


def device_of(module: nn.Module) -> torch.device:
    """Where the module computes, also while accelerate keeps its tensors elsewhere."""
    hook: Any = module.__dict__.get("_hf_hook")
    for part in getattr(hook, "hooks", (hook,)):
        device = getattr(part, "execution_device", None)
        if device is not None:
            return torch.device(device)
    return next(module.parameters()).device


@contextmanager
def at_hand(module: nn.Module) -> Iterator[None]:
    """Inside, the module's tensors have their values, also where accelerate keeps them elsewhere between calls."""
    if not is_offloaded(module):
        yield
        return
    hook: Any = module.__dict__["_hf_hook"]
    hook.pre_forward(module)
    try:
        yield
    finally:
        hook.post_forward(module, torch.empty(0))


@contextmanager
def undisturbed(module: nn.Module) -> Iterator[None]:
    """Inside, the module is in eval mode; afterwards its modes and buffers are as they were before."""
    parts = list(module.modules())
    modes = [part.training for part in parts]
    # Observers replace theirs, and write into them.
    buffers = [{name: None if b is None else b.clone() for name, b in part._buffers.items()} for part in parts]
    unwritten = {id(b): version(b) for part in parts for b in part._buffers.values() if b is not None}
    module.eval()
    try:
        yield
    finally:
        for part, mode, kept in zip(parts, modes, buffers, strict=True):
            part.training = mode
            for name, buffer in kept.items():
                now = part._buffers[name]
                if now is not None and unwritten.get(id(now)) == version(now):  # a write would pass for a change
                    continue
                if buffer is None or now is None or now.shape != buffer.shape:
                    part._buffers[name] = buffer
                else:
                    now.copy_(buffer)


def weight_of(base: nn.Module) -> Tensor | None:
    """The weight that the layer says it computes with, in its own layout; None where it has none in floating point.

    Reading leaves no trace: a spectral norm in training makes a step of its iteration at each access.
    """
    made = base._modules.get("parametrizations")
    parts = [] if made is None else [part for part in made.modules() if part.training]
    for part in parts:
        part.training = False
    try:
        with at_hand(base):
            weight = getattr(base, "weight", None)
    finally:
        for part in parts:
            part.training = True
    return weight if isinstance(weight, Tensor) and weight.dtype in FLOATING else None


def bias_of(base: nn.Module) -> nn.Parameter | None:
    """The layer's own bias, fetched where it is offloaded."""
    with at_hand(base):
        bias: nn.Parameter | None = getattr(base, "bias", None)
    return bias


def shape_alone(rows: int, columns: int, like: Tensor) -> Tensor:
    """A matrix that tells its shape, device and dtype and has no values: all of it is one NaN."""
    return like.new_full((), float("nan")).expand(rows, columns)


def plain_kind(base: nn.Module, forward: Callable[..., Any] | None) -> type[nn.Module]:
    """The class of torch's that the layer is a kind of: the one whose forward that is; its own where there is none."""
    own: type[nn.Module] = type_before_parametrizations(base)
    if forward is not None and is_packed_linear(base):
        return nn.Linear
    return next((kind for kind in own.__mro__ if forward is not None and kind.__dict__.get("forward") is forward), own)


def with_tensors(base: nn.Module, weight: Tensor, bias: Tensor | None, kind: type[nn.Module] | None = None) -> Any:
    """The layer as its class is, with these tensors: without hooks, patches and parametrizations.

    With a `kind` the layer as that class is, without what the layer holds inside. The layer itself is not touched, so
    that threads may call it meanwhile.
    """
    fresh = nn.Module().__dict__
    own = {name: value for name, value in base.__dict__.items() if name not in _OF_THE_INSTANCE}
    dropped = [name for name in fresh if name.endswith("_hooks") or (kind is not None and name in _INSIDE)]
    kind = type_before_parametrizations(base) if kind is None else kind
    layer = kind.__new__(kind)
    layer.__dict__ = {**own, **{name: fresh[name] for name in dropped}, "_parameters": {"weight": weight, "bias": bias}}
    return layer


def with_parameters(module: nn.Module, tensors: Mapping[str, Tensor]) -> Any:
    """The module, its hooks among it, with these tensors in the places of parameters of its own.

    The module itself is not touched, so that threads may call it meanwhile: functional_call would show them, and could
    leave behind, the tensors of this call.
    """
    twin: Any = copy(module)
    twin._parameters = {**module._parameters, **tensors}
    return twin


def plain_layer(base: nn.Module, weight: Tensor, bias: Tensor | None, forward: Callable[..., Any] | None) -> Any:
    """A plain layer with these tensors for the base layer's place, of the class that its model has there.

    transformers quantises a Conv1D as a Linear, and says so on it.
    """
    source: Any = getattr(base, "source_cls", None)
    if bias is None or getattr(source, "__name__", "") != "Conv1D":
        return with_tensors(base, nn.Parameter(weight, requires_grad=False), bias, plain_kind(base, forward))
    layer = with_tensors(base, nn.Parameter(weight.T.contiguous(), requires_grad=False), bias, source)
    layer.nf, layer.nx = weight.shape
    return layer


# What is put onto a layer beside what its class gives it, and what a layer holds beside its parameters.
_OF_THE_INSTANCE = ("forward", "weight", "bias", "_hf_hook", "_old_forward")
_INSIDE = ("_modules", "_buffers", "_non_persistent_buffers_set")


def dropped(x: Tensor, p: float) -> Tensor:
    """x̃: each element of x zero with probability p, the others divided by what that leaves."""
    with torch.no_grad():
        rows = rows_of(x)
        mask = dropout_mask(draw_dropout(rows, p, "eager"), rows.shape).view(x.shape)
    return torch.where(mask, x / keep_probability(p, "eager"), 0.0)


def sample(*shape: int, like: Tensor, seed: int) -> Tensor:
    """Normal values that a layer is tried with, the same each time, from a generator of their own."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(like.device, like.dtype)


def agree(one: Tensor, other: Tensor) -> bool:
    """Whether two results are the same up to the rounding of their dtype."""
    if one.shape != other.shape:
        return False
    tolerance = max(1e-4, 8 * torch.finfo(one.dtype).eps)
    return bool((one - other).abs().max() <= tolerance * other.abs().max().clamp(min=1e-6))
