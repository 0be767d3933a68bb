"""vLLM with fastadapt's adapters: `pip install fastadapt` beside vLLM, and `--enable-lora` takes LoRA, DoRA and VeRA.

vLLM calls `register` in each of its processes, by the entry point that pyproject.toml names. Nothing of vLLM is edited:
register.py replaces the few names that vLLM looks up when it loads a model.
"""

from __future__ import annotations

from .register import register

__all__ = ["register"]
