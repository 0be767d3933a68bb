"""vLLM with fastadapt's adapters: `pip install fastadapt` beside vLLM, and `--enable-lora` takes LoRA, DoRA and VeRA.

    VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 FASTADAPT_VLLM_ADAPTERS=adapters vllm serve MODEL --enable-lora --max-loras 8

Adapters are PEFT directories of any rank (--max-lora-rank bounds vLLM's own alone) and of every method that
fastadapt.serving takes and that does not read the values of the weight. FASTADAPT_VLLM_ADAPTERS: a directory whose
adapters are loaded when a request asks for one by name. --max-loras: how many of them one batch may have.

What vLLM does with an engine it does with this one: `--tensor-parallel-size 3`, several machines by `--nnodes 2
--node-rank 0 --master-addr HOST` on each, Ray Serve LLM, which loads through vLLM. What was run: on CPUs, engines of
one process and of three by tensor parallelism, and a server; not several machines, nor Ray.

On GPUs it is off, as it was never run on one: FASTADAPT_VLLM_GPU=1 turns it on. Adapters lie on pages of slots then, of
ranks up to --max-lora-rank, and torch.compile and CUDA graphs see one operator: paged.py. On a CPU the variable takes
the same way, and all of it but the graphs was run there, the kernels in Triton's interpreter.

Not with --fully-sharded-loras, nor on a CPU with pipeline parallelism, which vLLM itself does not run with adapters
there: both are refused at the start. Adapters on an embedding, the head or experts go vLLM's own way, as plain LoRA.
VLLM_PLUGINS without `fastadapt` leaves all of it out.

Of vLLM itself: on a CPU it takes nearly all memory for its cache, unless VLLM_CPU_KVCACHE_SPACE says how many GiB;
mixtures of experts do not run there with adapters; prompt_logprobs of several prompts stop its server while an adapter
on the head or an embedding is loaded. Its prefix cache knows an adapter by name and path: another in the place of one
(load_inplace) needs another path, or the cache reset. Why an adapter asked for by name was refused is in its log.

vLLM calls `register` in each of its processes, by the entry point that pyproject.toml names. Nothing of vLLM is edited:
seams.py replaces the few names that vLLM looks up when it loads a model.
"""

from __future__ import annotations

from .register import register

__all__ = ["register"]
