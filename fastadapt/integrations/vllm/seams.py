"""The names of vLLM that the plugin replaces, all of which vLLM looks up when it loads a model."""

from __future__ import annotations

from typing import Any

from vllm.lora import utils
from vllm.platforms import current_platform
from vllm.v1.worker import lora_model_runner_mixin

from .layers import LINEAR, fast_class
from .worker_manager import FastWorkerManager

_PUNICA = "fastadapt.integrations.vllm.punica.FastPunica"


def replace() -> None:
    """Replaces them, once a process."""
    if lora_model_runner_mixin.LRUCacheWorkerLoRAManager is FastWorkerManager:
        return
    classes: list[Any] = []
    for kind in utils._all_lora_classes:
        # Before the class itself: what that takes and ours does not, such as a subclass of a layer, stays its own.
        classes += [fast_class(kind), kind] if kind.__name__ in LINEAR else [kind]
    utils._all_lora_classes = tuple(classes)
    lora_model_runner_mixin.LRUCacheWorkerLoRAManager = FastWorkerManager
    type(current_platform).get_punica_wrapper = classmethod(lambda cls: _PUNICA)
