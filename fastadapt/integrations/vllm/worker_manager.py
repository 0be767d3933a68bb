"""vLLM's worker-side manager, which reads adapters as fastadapt does: as files of strangers."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from vllm.exceptions import LoRAAdapterNotFoundError
from vllm.logger import init_logger
from vllm.lora.utils import get_adapter_absolute_path
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager
from vllm.platforms import current_platform

from ...model.peft_files import TENSOR_FILE, check_header
from ...model.untrusted import DEFAULT_LIMITS, tensor_header
from ...serving import AdapterError
from .model_manager import FastModelManager

logger = init_logger("vllm.fastadapt")


class FastWorkerManager(LRUCacheWorkerLoRAManager):
    """Reads an adapter with fastadapt's loader; what has weights for an embedding, the head or experts as vLLM does."""

    _manager_cls = FastModelManager

    def __init__(self, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        if vllm_config.lora_config.fully_sharded_loras:
            raise ValueError(
                "fully_sharded_loras must be false with fastadapt, whose adapters are not cut along their ranks: "
                "start without it, or without the plugin (VLLM_PLUGINS without fastadapt)"
            )
        if vllm_config.parallel_config.pipeline_parallel_size > 1 and current_platform.is_cpu():
            # Asserted at the first request in 0.31 to 0.33: what a later stage receives into is made in a warm-up that
            # is left out where nothing is compiled, and with LoRA nothing is.
            raise ValueError(
                "pipeline_parallel_size must be 1 with adapters on a CPU, where vLLM's runner has no room for what one "
                "stage sends to the next: take tensor_parallel_size"
            )
        super().__init__(vllm_config, *args, **kwargs)
        # Not where the plugin is registered: an engine without a server sets its log up after that.
        logger.info_once("fastadapt is on: adapters may be LoRA, DoRA, VeRA and their kin, of any rank", scope="global")

    def _load_adapter(self, lora_request: Any) -> Any:
        manager: Any = self._adapter_manager
        directory = get_adapter_absolute_path(lora_request.lora_path)
        if not os.path.isdir(directory):
            raise LoRAAdapterNotFoundError(lora_request.lora_name, lora_request.lora_path)
        try:
            return manager.read(lora_request.lora_int_id, directory)
        except AdapterError:
            if not self._goes_to_others(directory):
                raise
            return super()._load_adapter(lora_request)

    def _goes_to_others(self, directory: str) -> bool:
        """Whether the adapter has weights for layers that stay vLLM's own."""
        manager: Any = self._adapter_manager
        others = {name.rpartition(".")[2] for name in (*manager.modules, *manager.missing) if name not in manager.fast}
        path = Path(directory, TENSOR_FILE)
        try:
            header = tensor_header(path, DEFAULT_LIMITS)
            check_header(header, path)
        except (ValueError, OSError):
            return False
        return any(
            part in others and not part.isdecimal()  # the number of a block
            for name in header.tensors
            for part in name.split(".")
        )
