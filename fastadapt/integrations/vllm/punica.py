"""vLLM's keeper of who is in a batch, with the batch as fastadapt's operators take it."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

from ...serving import AdapterBatch


def slots_of(mapping: Any, lora_index_to_id: Any) -> list[int]:
    """The slot of each token of a step, -1 for the base model."""
    slots = {name: slot for slot, name in enumerate(lora_index_to_id) if name is not None}
    slots[0] = -1
    return [slots[name] for name in mapping.index_mapping]


class FastPunica(PunicaWrapperCPU):
    """batch: the slot of each token. others: whether a resident adapter has weights for an embedding, the head or
    experts, which stay with vLLM; where none has, these cost nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.batch = AdapterBatch(())
        self.others = False

    def update_metadata(self, mapping: Any, lora_index_to_id: Any, *args: Any, **kwargs: Any) -> None:
        super().update_metadata(mapping, lora_index_to_id, *args, **kwargs)
        self.batch = AdapterBatch(slots_of(mapping, lora_index_to_id))

    def add_lora_embedding(self, y: Tensor, x: Tensor, *args: Any, **kwargs: Any) -> None:
        if self.others:
            self._but_for_base_rows(y, self.token_lora_indices < 0, super().add_lora_embedding, x, *args, **kwargs)

    def add_lora_logits(self, y: Tensor, x: Tensor, *args: Any, **kwargs: Any) -> None:
        if self.others:
            self._but_for_base_rows(y, self.sampler_indices < 0, super().add_lora_logits, x, *args, **kwargs)

    @staticmethod
    def _but_for_base_rows(y: Tensor, base: Tensor, update: Any, x: Tensor, *args: Any, **kwargs: Any) -> None:
        """vLLM's operations take slot -1 for the last one, and give base rows that adapter."""
        rows = y.view(-1, y.shape[-1])[: base.shape[0]]
        kept = rows[base]
        update(y, x, *args, **kwargs)
        rows[base] = kept
