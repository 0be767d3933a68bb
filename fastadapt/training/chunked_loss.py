"""A language model's own loss without its logits: the head's are deferred until something asks for more than a loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..layers.dequantize import lends
from ..layers.linear import AdapterLinear, plain_forward
from ..layers.saved import ModuleToSave
from ..layers.ways import is_hooked, is_plain
from ..operators.cross_entropy import CHUNK_BYTES
from .deferred import DeferredLogits, Head


def chunk_loss(
    model: nn.Module,
    *,
    enabled: bool = True,
    evaluation: bool = False,
    keep_logits: bool = False,
    chunk_bytes: int = CHUNK_BYTES,
) -> None:
    """Has a transformers model compute its training loss from chunks of its logits: they are never all there.

        fastadapt.chunk_loss(model)  # before Trainer(model, ...)

    In training, with gradients and `labels=`, the head gives logits that nobody has computed. What the model does to
    them on the way to its loss (casts, slices, a scale as Granite's, a softcap as Gemma's, the shift of labels,
    num_items_in_batch) is noted, and torch.nn.functional.cross_entropy then is `functional.linear_cross_entropy`: the
    same loss and gradients up to rounding, with adapters on the head, one that trains whole, or a frozen one. Anything
    else that reads the logits gets them, computed in full, and the loss is the model's own.
    So it is, too, in compiled code, and while the head is more than a linear layer with our adapters:
    hooks, quantised or sharded weights.
    model: what will be called, adapted before or after; also a PeftModel, whose head, if it has an adapter, must be one
    that `accelerate_peft` has taken. It is changed in place; enabled=False undoes it.
    evaluation: whether the loss without gradients, in eval mode, is computed so as well; Trainer's metrics want logits.
    keep_logits: where the loss is computed so the output's logits are None; True gives what is computed once somebody
    reads it, under dropout on the head with another mask than the loss.
    chunk_bytes: as `functional.linear_cross_entropy` takes it.
    Raises ValueError for a model whose head is not such a layer: its loss stays as it is.
    """
    for hooks in (model._forward_pre_hooks, model._forward_hooks):
        for key in [key for key, hook in hooks.items() if isinstance(getattr(hook, "__self__", None), _ChunkedLoss)]:
            for own in (hooks, *[getattr(model, name) for name in _KINDS_OF_HOOKS]):
                own.pop(key, None)
    if not enabled:
        return
    found = _head_of(model)
    if isinstance(found, str):
        raise ValueError(f"the loss of {type(model).__name__} cannot be computed in chunks: {found}")
    if chunk_bytes < 1:
        raise ValueError(f"chunk_bytes must be at least 1, got {chunk_bytes}")
    loss = _ChunkedLoss(evaluation, keep_logits, chunk_bytes)
    model.register_forward_pre_hook(loss.begin, with_kwargs=True)
    model.register_forward_hook(loss.end, always_call=True)


_KINDS_OF_HOOKS = ("_forward_pre_hooks_with_kwargs", "_forward_hooks_with_kwargs", "_forward_hooks_always_called")


class _ChunkedLoss:
    """The hooks on a model: its head defers while the model's own forward runs."""

    def __init__(self, evaluation: bool, keep_logits: bool, chunk_bytes: int) -> None:
        self.evaluation, self.keep_logits, self.chunk_bytes = evaluation, keep_logits, chunk_bytes
        self.deferring: nn.Module | None = None
        self.graph = False  # whether the model was called with gradients

    def begin(self, model: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
        trains, graph = model.training, torch.is_grad_enabled()
        wanted = (trains and graph) or (self.evaluation and not trains and not graph)
        if not wanted or kwargs.get("labels") is None or torch.compiler.is_compiling():
            return
        found = _head_of(model)
        if not isinstance(found, str):
            # For as long as the model runs: copies, pickles and whoever asks for hooks never see it.
            found.module.__dict__["forward"] = partial(self._forward, found.module.forward, found)
            self.deferring, self.graph = found.module, graph

    def _forward(self, run: Callable[..., Tensor], found: _Found, x: Any, *args: Any, **kwargs: Any) -> Any:
        head = found.head
        asked = torch.is_grad_enabled() == self.graph
        fits = asked and not args and not kwargs and type(x) in (Tensor, nn.Parameter)
        if not fits or not head.takes(x):
            return run(x, *args, **kwargs)
        return DeferredLogits.of(x, partial(run, x), head, self.chunk_bytes)

    def end(self, model: nn.Module, args: Any, output: Any) -> Any:
        if self.deferring is None:
            return None
        self.deferring.__dict__.pop("forward", None)
        self.deferring = None
        return None if self.keep_logits or output is None else _without_logits(output)


def _without_logits(output: Any) -> Any:
    """The output of a model without logits that nobody has computed."""
    if isinstance(output, Mapping):
        return type(output)(**{key: value for key, value in output.items() if not isinstance(value, DeferredLogits)})
    if type(output) is tuple:
        return tuple([value for value in output if not isinstance(value, DeferredLogits)])
    return output


class _Found(NamedTuple):
    """The module whose forward makes the logits, and what it computes with."""

    module: nn.Module
    head: Head


def _head_of(model: nn.Module) -> _Found | str:
    """The head as it is now, or why its logits cannot be deferred."""
    get = getattr(model, "get_output_embeddings", None)
    if not callable(get):
        return f"a {type(model).__name__} does not say which layer its head is: give the transformers model itself"
    module: Any = get()
    if module is None:
        return "it has no head that gives logits of a vocabulary"
    around = module
    if isinstance(module, ModuleToSave):
        module = module.current
    elif type(module).__name__ == "ModulesToSaveWrapper":  # PEFT's, which need not be installed
        names = [] if module.disable_adapters else module.active_adapters
        module = module.modules_to_save[names[0]] if names else module.original_module
    name = type(module).__name__
    if is_hooked(around) or is_hooked(module):
        return f"its head ({name}) has hooks or a patched forward"
    options: dict[str, Any] = {}
    if _adapts(module) and module.kind() is not None and not lends(module.base_layer):
        weight, form = module.operands(module.base_layer.weight.dtype)
        options = {"form": form, "dropout": module.dropout, "training": module.training}
        options |= {"backend": module.backend, "strategy": module.strategy}
        return _Found(module, Head(weight, options))
    base = module
    if isinstance(module, AdapterLinear) and (module.merged or not module.active):
        base = module.base_layer
    if _adapts(base):
        return f"its head ({name}) does not run as one operator now"
    if not isinstance(base, nn.Linear) or not is_plain(base, plain_forward(base)):
        cure = ": accelerate_peft(model) takes one of PEFT's over" if hasattr(module, "lora_A") else ""
        return f"its head ({name}) is more than a linear layer{cure}"
    return _Found(module, Head(base.weight, {"bias": base.bias}))


def _adapts(module: nn.Module) -> bool:
    """Whether it is a layer of ours, or one of PEFT's that runs through our operators."""
    return isinstance(module, AdapterLinear) or hasattr(module, "why_left")
