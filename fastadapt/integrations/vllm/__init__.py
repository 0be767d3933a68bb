"""vLLM with fastadapt's adapters: `pip install fastadapt` beside vLLM, and `--enable-lora` takes LoRA, DoRA and VeRA.

    VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 FASTADAPT_VLLM_ADAPTERS=adapters vllm serve MODEL --enable-lora --max-loras 8

Adapters are PEFT directories of any rank (--max-lora-rank bounds vLLM's own alone) and of every method that
fastadapt.serving takes and that does not read the values of the weight. FASTADAPT_VLLM_ADAPTERS: a directory whose
adapters are loaded when a request asks for one by name. --max-loras: how many of them one batch may have.

On CPUs, with tensor parallelism; not with --fully-sharded-loras, nor with pipeline parallelism, which vLLM itself does
not run with adapters there: both are refused at the start. Adapters on an embedding, the head or experts go vLLM's own
way, as plain LoRA. VLLM_PLUGINS without `fastadapt` leaves all of it out.

vLLM calls `register` in each of its processes, by the entry point that pyproject.toml names. Nothing of vLLM is edited:
seams.py replaces the few names that vLLM looks up when it loads a model.
"""

from __future__ import annotations

from .register import register

__all__ = ["register"]
