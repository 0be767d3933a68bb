"""The plugin's door: whether it can be on here, and if so the names of vLLM that it replaces."""

from __future__ import annotations

import os
import re

# Tried with 0.32; of the others what the plugin replaces was compared.
FIRST, LAST = (0, 31), (0, 33)

# Set to 1, adapters are on where there is a GPU; on a CPU they lie as on one, for tests.
VARIABLE = "FASTADAPT_VLLM_GPU"


def is_supported(version: str) -> bool:
    """Whether a vLLM of that version has the seams as they are expected."""
    found = re.match(r"(\d+)\.(\d+)", version)
    return found is not None and FIRST <= (int(found[1]), int(found[2])) <= LAST


def register() -> None:
    """Puts fastadapt's adapters into the vLLM of this process; a second call changes nothing.

    Where it cannot, one line says so, and vLLM goes on without it.
    """
    import vllm
    from vllm import envs
    from vllm.logger import init_logger
    from vllm.platforms import current_platform

    logger = init_logger("vllm.fastadapt")
    if not is_supported(vllm.__version__):
        logger.warning("fastadapt is off: it needs vLLM %d.%d to %d.%d, got %s", *FIRST, *LAST, vllm.__version__)
        return
    paged = os.environ.get(VARIABLE) == "1"
    if not (current_platform.is_cpu() or current_platform.is_cuda_alike()):
        logger.warning("fastadapt is off: inside vLLM it serves on CPUs, got %s", current_platform.device_name)
        return
    if not (current_platform.is_cpu() or paged):
        logger.warning("fastadapt is off: inside vLLM it was never run on a GPU; %s=1 turns it on", VARIABLE)
        return
    from .resolver import register_resolver
    from .seams import replace

    if paged:
        # vLLM keeps what it has compiled by its own variables: what is compiled with these layers is no use without.
        envs.environment_variables[VARIABLE] = lambda: os.environ.get(VARIABLE)
    replace(paged=paged)
    register_resolver()
