"""vLLM's keepers of who is in a batch, with the tokens where captured graphs find them."""

from __future__ import annotations

from typing import Any

from vllm.lora.punica_wrapper.punica_gpu import PunicaWrapperGPU

from ...serving import TokenBuffers
from .punica import FastPunica, slots_of


class PagedPunica(PunicaWrapperGPU):
    """On GPUs. tokens: the slot of each token of a step. Embeddings, the head and experts stay with vLLM."""

    def __init__(self, max_num_batched_tokens: int, max_batches: int, device: Any, **kwargs: Any) -> None:
        super().__init__(max_num_batched_tokens, max_batches, device, **kwargs)
        self.tokens = TokenBuffers(max_num_batched_tokens, kwargs["lora_config"].max_loras, device)

    def update_metadata(self, mapping: Any, lora_index_to_id: Any, *args: Any, **kwargs: Any) -> None:
        super().update_metadata(mapping, lora_index_to_id, *args, **kwargs)
        self.tokens.write(slots_of(mapping, lora_index_to_id))


class PagedPunicaOnCPU(FastPunica):
    """The same where there is no GPU, for tests."""

    def __init__(self, max_num_batched_tokens: int, max_batches: int, device: Any, **kwargs: Any) -> None:
        super().__init__(max_num_batched_tokens, max_batches, device, **kwargs)
        self.tokens = TokenBuffers(max_num_batched_tokens, kwargs["lora_config"].max_loras, device)

    def update_metadata(self, mapping: Any, lora_index_to_id: Any, *args: Any, **kwargs: Any) -> None:
        super().update_metadata(mapping, lora_index_to_id, *args, **kwargs)
        self.tokens.write(self.batch.adapter_ids)
