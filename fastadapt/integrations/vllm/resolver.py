"""Adapters by name from one directory, which no name leads out of."""

from __future__ import annotations

import os

from vllm.logger import init_logger
from vllm.lora.request import LoRARequest
from vllm.lora.resolver import LoRAResolver, LoRAResolverRegistry

from ...serving import AdapterError, adapter_directory

# Names the directory; without it there is no resolver.
VARIABLE = "FASTADAPT_VLLM_ADAPTERS"
_NAME = "fastadapt"

logger = init_logger("vllm.fastadapt")


class DirectoryResolver(LoRAResolver):
    """Answers for the names of directories inside of `root`, as serving.adapter_directory finds them."""

    def __init__(self, root: str) -> None:
        self.root = root

    async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None:
        try:
            directory = adapter_directory(self.root, lora_name)
        except AdapterError as error:
            logger.info("no adapter: %s", error)
            return None
        # vLLM gives it a number of its own.
        return LoRARequest(lora_name, 1, str(directory))


def register_resolver() -> None:
    """Registers it where the variable names a directory. Raises ValueError where that is none."""
    root = os.environ.get(VARIABLE)
    if not root or _NAME in LoRAResolverRegistry.get_supported_resolvers():
        return
    if not os.path.isdir(root):
        raise ValueError(f"{VARIABLE} must name a directory of adapters, got {root!r}")
    LoRAResolverRegistry.register_resolver(_NAME, DirectoryResolver(root))
