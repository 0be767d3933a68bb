"""vLLM's linear layers on GPUs: the forms on pages at fixed addresses, and an operator that compilers do not look into.

torch.compile traces `apply` once, and CUDA graphs capture what it launches once; who is in a step comes later. So
nothing of that is in the arguments: the operator finds its layer by name, and kernels find adapters and tokens in
memory that stays where it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from vllm.forward_context import get_forward_context, is_forward_context_available
from vllm.utils.torch_utils import direct_register_custom_op

from ...reference import AdapterForm
from ...serving import CapturedUpdate, FormPages, PagedColumns
from .layers import FastLinear


class PagedLinear(FastLinear):
    """Slots have room for ranks up to the engine's max_lora_rank, as vLLM's own have; kernels read what is there."""

    backend = "auto"
    name = ""
    _slots = 0
    _max_rank = 0
    _update: CapturedUpdate | None = None

    def create_lora_weights(self, max_loras: int, lora_config: Any, *args: Any, **kwargs: Any) -> None:
        super().create_lora_weights(max_loras, lora_config, *args, **kwargs)
        self._slots, self._max_rank = max_loras, lora_config.max_lora_rank

    def rooms(self, shapes: Sequence[tuple[int, int]], dtype: torch.dtype) -> list[FormPages]:
        return FormPages.packed(shapes, self._slots, self._max_rank, dtype, self.device)

    def bind(self, name: str, paths: Sequence[str], dtype: torch.dtype, context: dict[str, Any]) -> None:
        super().bind(name, paths, dtype, context)
        columns = [
            PagedColumns(part.start, part.stop, part.forms) for part in self.slices if isinstance(part.forms, FormPages)
        ]
        if columns:
            self._update = CapturedUpdate(columns, self.punica_wrapper.tokens, self.backend)
        self.name = f"{name}.fastadapt"
        context[self.name] = self

    def check(self, forms: Sequence[AdapterForm | None]) -> None:
        for part, form in zip(self.slices, forms, strict=True):
            if form is not None and isinstance(part.forms, FormPages):
                try:
                    part.forms.check(form)
                except ValueError as error:
                    raise ValueError(f"{part.path}: {error}: start the engine with a larger max_lora_rank") from error

    def apply(self, x: Tensor, bias: Tensor | None = None) -> Tensor:  # type: ignore[override]
        base: Any = self._modules["base_layer"]
        product: Callable[..., Tensor] = base.quant_method.apply
        # A g scales the product alone: the bias comes behind it.
        y = product(base, x, None)
        rows, tokens = y.view(-1, y.shape[-1]), x.reshape(-1, x.shape[-1])
        if is_forward_context_available():
            torch.ops.vllm.fastadapt_update(rows, tokens, bias, self.name)
        else:  # as in an image model's tower
            self.update(rows, tokens, bias)
        return y

    def update(self, y: Tensor, x: Tensor, bias: Tensor | None) -> None:
        """What the step's adapters and the bias make of y = x W0ᵀ, in place."""
        if self._update is not None:
            self._update(y, x, bias)
        elif bias is not None:
            y.add_(bias)


def _update(y: Tensor, x: Tensor, bias: Tensor | None, layer_name: str) -> None:
    layer: PagedLinear = get_forward_context().no_compile_layers[layer_name]
    layer.update(y, x, bias)


def _no_update(y: Tensor, x: Tensor, bias: Tensor | None, layer_name: str) -> None:
    """Its outline: y is what it was, with other values."""


direct_register_custom_op("fastadapt_update", _update, mutates_args=["y"], fake_impl=_no_update)
