"""vLLM's manager of the adapters of a model, with forms in its slots."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.distributed import tensor_model_parallel_all_reduce
from vllm.lora.lora_model import LoRAModel
from vllm.lora.model_manager import LRUCacheLoRAModelManager
from vllm.model_executor.models.utils import PPMissingLayer

from ...model.untrusted import refused
from .adapters import Pairs, SharedPair, SliceForms, local_forms, read
from .layers import FastLinear, outside_inference
from .names import elsewhere, naming_of


class FastLoRA(LoRAModel):
    """An adapter that fastadapt has read: forms of this process's parts, by vLLM's layer."""

    def __init__(self, lora_model_id: int, forms: dict[str, SliceForms], pair: SharedPair | None) -> None:
        super().__init__(lora_model_id, 0, forms)
        self.pair = pair  # alive for as long as somebody uses it


class FastModelManager(LRUCacheLoRAModelManager):
    """Its layers are FastLinear where vLLM's are linear; embeddings, the head and experts stay vLLM's own."""

    def __init__(self, model: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(model, *args, **kwargs)
        self.fast = {name: module for name, module in self.modules.items() if isinstance(module, FastLinear)}
        dtype = torch.get_default_dtype()
        context = kwargs["vllm_config"].compilation_config.static_forward_context
        for name, layer in self.fast.items():
            dtype = layer.base_layer.params_dtype
            layer.bind(name, self.packed_modules.get(name) or [self._unpacked(name)], dtype, context)
        self._pairs = Pairs(dtype)
        mapper = getattr(model, "hf_to_vllm_mapper", None)
        if mapper is not None and hasattr(mapper, "get_rename_mapper"):
            mapper = mapper.get_rename_mapper()
        # What other stages of a pipeline have.
        self.missing = [name for name, module in model.named_modules() if isinstance(module, PPMissingLayer)]
        shapes = {part.path: part.shape for layer in self.fast.values() for part in layer.slices}
        self._shapes = elsewhere(shapes, self.missing) | shapes
        self._namings = list(naming_of(self._shapes, mapper))

    def _unpacked(self, name: str) -> str:
        """The path in an adapter's model of a layer that is not packed, or under another name."""
        parent, _, last = name.rpartition(".")
        (only,) = self.packed_modules_mapping.get(last) or [last]
        return f"{parent}.{only}" if parent else only

    @outside_inference
    def read(self, lora_id: int, directory: str) -> FastLoRA:
        """Raises AdapterError for whatever is wrong with the adapter."""
        adapter, naming = read(directory, self._shapes, self._namings)
        with refused(directory):
            forms, pair = local_forms(adapter, naming, self.fast, self._pairs, _add_up)
            for name, slices in forms.items():
                self.fast[name].check(slices.lora_a)
        return FastLoRA(lora_id, forms, pair)

    def activate_adapter(self, lora_id: int) -> bool:
        activated: bool = super().activate_adapter(lora_id)
        self._see_others()
        return activated

    def remove_all_adapters(self) -> None:
        super().remove_all_adapters()
        for layer in self.fast.values():
            # Processes without requests do this at every step of the others: only where somebody is.
            for slot in {slot for part in layer.slices for slot in part.forms.forms}:
                layer.reset_lora(slot)
            layer.forget()
        self._see_others()

    def _deactivate_adapter(self, lora_id: int) -> None:
        if lora_id in self.lora_index_to_id:
            slot = self.lora_index_to_id.index(lora_id)
            for layer in self.fast.values():
                layer.reset_lora(slot)
        super()._deactivate_adapter(lora_id)
        self._see_others()

    def _create_merged_loras_inplace(self, lora_model: Any) -> None:
        if not isinstance(lora_model, FastLoRA):  # which comes packed
            super()._create_merged_loras_inplace(lora_model)

    def _see_others(self) -> None:
        adapters = self._registered_adapters.cache
        resident = [adapters[name] for name in self.lora_index_to_id if name in adapters]
        others = any(set(adapter.loras) - set(self.fast) for adapter in resident)
        for punica in self.punica_wrapper_mapping.values():
            punica.others = others


def _add_up(partial: Tensor) -> Tensor:
    total: Tensor = tensor_model_parallel_all_reduce(partial)
    return total
