"""The cases of `fastadapt doctor` with many adapters in one batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..functional import multi_adapter_linear, multi_adapter_update
from ..methods.lora import LoRAConfig
from ..operators.multi_adapter_linear.batch import AdapterBatch, LayerForms
from ..operators.multi_adapter_linear.captured import CapturedUpdate, PagedColumns, TokenBuffers
from ..operators.multi_adapter_linear.form_pages import FormPages
from ..reference import AdapterForm, multi_adapter_linear_reference
from ..serving.loader import LoadedAdapter
from ..serving.pool import AdapterPool
from .case import Case, Normal, Sizes, Values


@dataclass(frozen=True)
class MultiAdapterLinearCase(Case):
    """Adapters of several methods in one batch with the base model, as they lie in a pool.

    decodes: whether a row has one token.
    """

    operator = "multi_adapter_linear"
    covers = ("multi_adapter_linear",)
    kernels = ("multi_shrink", "multi_expand")
    in_dtype = ("x", "weight", "bias")
    has_gradients = False
    rows: ClassVar[tuple[str | None, ...]] = ("LoRA", None, "VeRA", "DoRA", "other VeRA", "trained bias", "LoRA")

    decodes: bool = False

    def values(self, normal: Normal, sizes: Sizes) -> Values:
        m, k, n, r = sizes
        return {
            "x": normal(len(self.rows), 1 if self.decodes else m // len(self.rows), k),
            "weight": normal(n, k, std=k**-0.5),
            "bias": normal(n),
            "A": normal(r, k, std=k**-0.5),
            "B": normal(n, r, std=r**-0.5),
            # Of another rank, and shared.
            "vera_A": normal(2 * r - 3, k, std=k**-0.5),
            "vera_B": normal(n, 2 * r - 3, std=r**-0.5),
            "vera_d": normal(2 * r - 3),
            "g": normal(n, std=0.3, mean=0.8),
            "h": normal(n),
            "trained": normal(n),
        }

    def _forms(self, values: Values, bias: Tensor) -> dict[str, AdapterForm]:
        A, B, g, h, d = (values[name] for name in ("A", "B", "g", "h", "vera_d"))
        shared = values["vera_A"], values["vera_B"]
        return {
            "LoRA": AdapterForm(A, B, bias=bias, scaling=0.5),
            "DoRA": AdapterForm(A[:-1], B[:, :-1], out_scale=g, base_scale=g, bias=bias, scaling=0.5),
            "VeRA": AdapterForm(*shared, d, h, bias=bias),
            "other VeRA": AdapterForm(*shared, d.flip(0), g, bias=bias),
            "trained bias": AdapterForm(A, B, bias=values["trained"]),
        }

    def pool(self, values: Values) -> AdapterPool:
        """The adapters in a pool of one layer, named "layer"."""
        weight, bias = (nn.Parameter(values[name], requires_grad=False) for name in ("weight", "bias"))
        layer = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
        layer.weight, layer.bias = weight, bias
        pool = AdapterPool(layer, {"layer": layer}, budget=2**24)
        shared = values["vera_A"], values["vera_B"]
        for name, form in self._forms(values, bias).items():
            pair = shared if "VeRA" in name else None
            pool.add(name, LoadedAdapter(LoRAConfig(), {"layer": form}, pair, identity=name, bytes=0))
        return pool

    def ours(self, values: Values, backend: str) -> Tensor:
        pool = self.pool(values)
        with pool.hold(self.rows) as held:
            return self.call(values, held.batch(values["x"].shape[1]), pool.layer("layer"), backend)

    def call(self, values: Values, batch: AdapterBatch, layer: LayerForms, backend: str) -> Tensor:
        x, weight, bias = (values[name] for name in ("x", "weight", "bias"))
        return multi_adapter_linear(x, weight, bias, batch, layer, backend=backend)

    def reference(self, values: Values, mask: Tensor | None, p: float) -> Tensor:
        forms = self._forms(values, values["bias"])
        ids = self._slots(forms)
        return multi_adapter_linear_reference(values["x"], values["weight"], values["bias"], list(forms.values()), ids)

    def _slots(self, forms: dict[str, AdapterForm]) -> list[int]:
        """Of each row the place of its form, -1 for the base model."""
        return [-1 if name is None else list(forms).index(name) for name in self.rows]


@dataclass(frozen=True)
class MultiAdapterUpdateCase(MultiAdapterLinearCase):
    """The same on the product of a layer that is a slice of a packed one, in place."""

    operator = "multi_adapter_update"
    covers = ("multi_adapter_update",)

    def call(self, values: Values, batch: AdapterBatch, layer: LayerForms, backend: str) -> Tensor:
        x, weight, bias = (values[name] for name in ("x", "weight", "bias"))
        packed = F.linear(x, torch.cat([weight[:8], weight]))
        y = packed[..., 8:]
        multi_adapter_update([y], x, [bias], batch, [layer], backend=backend)
        return y


@dataclass(frozen=True)
class CapturedUpdateCase(MultiAdapterUpdateCase):
    """The same with forms on pages, as an engine has them; on a GPU by a CUDA graph that was captured for others."""

    def ours(self, values: Values, backend: str) -> Tensor:
        x, weight, bias = (values[name] for name in ("x", "weight", "bias"))
        (n, k), tokens = weight.shape, x.shape[1]
        forms = self._forms(values, bias)
        pages = FormPages((n, k), len(forms), max(form.A.shape[0] for form in forms.values()), x.dtype, x.device)
        buffers = TokenBuffers(len(self.rows) * tokens + 5, len(forms), x.device)
        rows, packed, packed_bias = x.reshape(-1, k), torch.cat([weight[:8], weight]), torch.cat([bias[:8], bias])
        product = F.linear(rows, packed)
        y = product.clone()
        update = CapturedUpdate([PagedColumns(8, 8 + n, pages)], buffers, backend)

        def run() -> None:
            update(y, rows, packed_bias)

        again = _captured(run) if x.is_cuda else run
        for slot, form in enumerate(forms.values()):
            pages.write(slot, form, base_bias=bias)
        buffers.write([slot for slot in self._slots(forms) for _ in range(tokens)])
        y.copy_(product)
        again()
        return y[:, 8:].view(*x.shape[:-1], n)


def _captured(call: Callable[[], None]) -> Callable[[], None]:
    """The call's work on the GPU as a CUDA graph, after it ran twice: the first compiles, the second prepares."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def batch_cases() -> list[Case]:
    """Prompts and single tokens, of a layer and of a slice of one."""
    return [
        kind(name, decodes=decodes)
        for kind in (MultiAdapterLinearCase, MultiAdapterUpdateCase)
        for name, decodes in (("prefill", False), ("decoding", True))
    ]


def captured_cases() -> list[Case]:
    """What engines do of that, which is no operator of the registry: for who has a GPU."""
    return [CapturedUpdateCase("captured prefill"), CapturedUpdateCase("captured decoding", decodes=True)]
