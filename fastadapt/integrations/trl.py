"""TRL: the reference of preference training without a second base model, and heads that it never calls."""

from __future__ import annotations

import copy
from contextlib import ExitStack
from typing import Any, TypeVar

from torch import nn

from ..layers.layer import AdapterLayer
from ..model.inject import disable_adapter

ModelType = TypeVar("ModelType", bound=nn.Module)


def reference_model(model: ModelType) -> ModelType:
    """The base model of an adapted one, as a model of its own that shares all tensors: no second copy of the base.

        DPOTrainer(model, ref_model=fastadapt.integrations.reference_model(model), ...)

    TRL's GRPOTrainer takes no ref_model, and with a beta above 0 it loads a second base. Give it one afterwards:

        trainer = GRPOTrainer(model, args=GRPOConfig(beta=0.0, ...), ...)
        trainer.beta, trainer.ref_model = 0.04, fastadapt.integrations.reference_model(model)

    A call of it is a call of `model` inside `disable_adapter(model)`. It takes the mode of `model`, whatever train() or
    eval() is called on it. Make it before a trainer wraps the model, and let nothing shard it (FSDP, ZeRO-3).
    A call raises ValueError while the model is merged.
    """
    reference = copy.copy(model)
    for name, value in model.__dict__.items():
        # What belongs to a module itself; the modules and tensors in it are the model's.
        if name.startswith("_") and isinstance(value, dict):
            reference.__dict__[name] = copy.copy(value)
    disabled: list[ExitStack] = []

    def begin(*_: Any) -> None:
        stack = ExitStack()
        stack.enter_context(disable_adapter(model))
        disabled.append(stack)

    def end(*_: Any) -> None:
        disabled.pop().close()

    reference.register_forward_pre_hook(begin)
    reference.register_forward_hook(end, always_call=True)
    reference.train = lambda mode=True: reference  # type: ignore[method-assign]
    return reference


def check_head_is_called(model: nn.Module) -> None:
    """Raises ValueError for an active adapter on a head whose weight is read and which is not called.

    TRL's trainers of 1.16 make log-probabilities of `lm_head.weight` in a forward that they put onto the model. They
    refuse PEFT's adapters there; ours would be passed by without a word.
    """
    get = getattr(model, "get_output_embeddings", None)
    head = get() if callable(get) else None
    forward: Any = model.__dict__.get("forward")
    while forward is not None and isinstance(head, AdapterLayer) and head.active:
        code = getattr(forward, "__code__", None)
        if code is not None and "fused_lm_head" in code.co_varnames:
            raise ValueError(
                "this trainer of TRL's reads the weight of the model's head and never calls it: the adapter on it "
                "would never train. Leave the head out of target_modules, name it in modules_to_save, or take "
                "transformers' Trainer with fastadapt.chunk_loss(model)"
            )
        forward = getattr(forward, "__wrapped__", None)
