"""The names of vLLM that the plugin replaces, all of which vLLM looks up when it loads a model."""

from __future__ import annotations

from typing import Any

from vllm.lora import utils
from vllm.platforms import current_platform
from vllm.v1.worker import lora_model_runner_mixin

from .layers import LINEAR, FastLinear, StackedLinear, fast_class
from .worker_manager import FastWorkerManager

_ROOM = "fastadapt.integrations.vllm"


def replace(*, paged: bool) -> None:
    """Replaces them, once a process. paged: whether adapters lie as GPUs read them."""
    if lora_model_runner_mixin.LRUCacheWorkerLoRAManager is FastWorkerManager:
        return
    fast: type[FastLinear] = StackedLinear
    punica = f"{_ROOM}.punica.FastPunica"
    if paged:
        from .paged import PagedLinear

        fast = PagedLinear
        punica = f"{_ROOM}.paged_punica.{'PagedPunicaOnCPU' if current_platform.is_cpu() else 'PagedPunica'}"
    utils._all_lora_classes = fast_classes(fast)
    lora_model_runner_mixin.LRUCacheWorkerLoRAManager = FastWorkerManager
    type(current_platform).get_punica_wrapper = classmethod(lambda cls: punica)


def fast_classes(fast: type[FastLinear]) -> tuple[type, ...]:
    """vLLM's kinds of layers with LoRA, and before each linear one a fast kind of it."""
    classes: list[Any] = []
    for kind in utils._all_lora_classes:
        # Before the class itself: what that takes and ours does not, such as a subclass of a layer, stays its own.
        classes += [fast_class(kind, fast), kind] if kind.__name__ in LINEAR else [kind]
    return tuple(classes)
