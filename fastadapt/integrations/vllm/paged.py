"""vLLM's linear layers on GPUs: the forms on pages at fixed addresses, and an operator that compilers do not look into.

torch.compile traces `apply` once, and CUDA graphs capture what it launches once; who is in a step comes later. So
nothing of that is in the arguments: the operator finds its layer by name, and kernels find adapters and tokens in
memory that stays where it is.

The layer's bias b0 goes into vLLM's product, whose kernel may keep it in an order of its own (Marlin does), and not
behind it. A g scales it then too, which what such a form adds to the bias makes up for: (1 − g) ⊙ b0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from vllm.forward_context import get_forward_context, is_forward_context_available
from vllm.utils.torch_utils import LayerNameType, _encode_layer_name, _resolve_layer_name, direct_register_custom_op

from ...reference import AdapterForm
from ...serving import CapturedUpdate, FormPages, PagedColumns
from .layers import FastLinear, Slice, outside_inference


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
        context[self.name] = _LAYERS[self.name] = self

    def check(self, forms: Sequence[AdapterForm | None]) -> None:
        for part, form in zip(self.slices, forms, strict=True):
            if form is not None and isinstance(part.forms, FormPages):
                try:
                    part.forms.check(form)
                except ValueError as error:
                    raise ValueError(f"{part.path}: {error}: start the engine with a larger max_lora_rank") from error

    @outside_inference
    def set_lora(self, index: int, lora_a: Any, lora_b: Any) -> None:
        if lora_b is None:
            lora_a = [form and self._over_bias(form, part) for part, form in zip(self.slices, lora_a, strict=True)]
        super().set_lora(index, lora_a, lora_b)

    def _over_bias(self, form: AdapterForm, part: Slice) -> AdapterForm:
        """The form of a product that b0 is in."""
        g, b0 = form.base_scale, self.base_bias() if self.adds_bias and not self.base_layer.skip_bias_add else None
        if g is None or b0 is None:
            return form
        rest = (1.0 - g.float()) * b0[part.start : part.stop].float()
        return form._replace(bias=rest if form.bias is None else rest.add_(form.bias))

    def apply(self, x: Tensor, bias: Tensor | None = None) -> Tensor:  # type: ignore[override]
        base: Any = self._modules["base_layer"]
        product: Callable[..., Tensor] = base.quant_method.apply
        y = product(base, x, bias)
        # No view where there need not be one: of what is written through a view, compilers may make a copy.
        flat = y.dim() == 2
        rows, tokens = (y, x) if flat else (y.view(-1, y.shape[-1]), x.reshape(-1, x.shape[-1]))
        torch.ops.vllm.fastadapt_update(rows, tokens, _encode_layer_name(self.name))
        return y

    def update(self, y: Tensor, x: Tensor) -> None:
        """What the step's adapters make of y = x W0ᵀ + b0, in place."""
        if self._update is not None:
            self._update(y, x)


# By name, of the engine that came last: where there is no step, as in an image model's tower.
_LAYERS: WeakValueDictionary[str, PagedLinear] = WeakValueDictionary()


def _update(y: Tensor, x: Tensor, layer_name: LayerNameType) -> None:
    layers = get_forward_context().no_compile_layers if is_forward_context_available() else _LAYERS
    layer: PagedLinear = layers[_resolve_layer_name(layer_name)]
    layer.update(y, x)


def _no_update(y: Tensor, x: Tensor, layer_name: LayerNameType) -> None:
    """Its outline: y is what it was, with other values."""


direct_register_custom_op("fastadapt_update", _update, mutates_args=["y"], fake_impl=_no_update)
