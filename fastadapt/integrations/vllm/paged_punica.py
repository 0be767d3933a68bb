"""vLLM's keepers of who is in a batch, with the tokens where captured graphs find them."""

from __future__ import annotations

from typing import Any

from vllm.lora.punica_wrapper.punica_gpu import PunicaWrapperGPU

from ...serving import TokenBuffers
from .punica import FastPunica, slots_of


class _Buffered:
    """What comes before a keeper of vLLM's. tokens: the slot of each token of a step."""

    def __init__(self, max_num_batched_tokens: int, max_batches: int, device: Any, **kwargs: Any) -> None:
        super().__init__(max_num_batched_tokens, max_batches, device, **kwargs)  # type: ignore[call-arg]
        self.tokens = TokenBuffers(max_num_batched_tokens, kwargs["lora_config"].max_loras, device)

    def update_metadata(self, mapping: Any, lora_index_to_id: Any, *args: Any, **kwargs: Any) -> None:
        super().update_metadata(mapping, lora_index_to_id, *args, **kwargs)  # type: ignore[misc]
        self.tokens.write(slots_of(mapping, lora_index_to_id))


class PagedPunica(_Buffered, PunicaWrapperGPU):
    """On GPUs. Embeddings, the head and experts stay with vLLM."""


class PagedPunicaOnCPU(_Buffered, FastPunica):
    """The same where there is no GPU, for tests."""
