"""Routers of experts that serve: each token by the weight that its adapter makes of the base's."""

from __future__ import annotations

from copy import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..forms import merged_weight
from ..layers.experts import tensors_of, why_patched
from ..layers.ways import with_parameters
from ..operators.multi_adapter_linear.batch import AdapterBatch, SlotForm
from ..reference import AdapterForm
from .pool import AdapterPool
from .requests import Requests
from .served import EagerLayer
from .trace import Trace


class MultiAdapterRouter(EagerLayer):
    """A router of experts in which each row of a batch goes through the adapter that the running request gave it.

    Its own forward runs once for each adapter in the batch, on all tokens of that one, with W' = diag(g) W0 +
    diag(h) B diag(d) A in the place of its weight W0 [out, in], which is small: W' is made at each call. Its hooks, by
    which transformers records the router's logits, see all tokens at once.
    Shapes: x [tokens, in] or [rows, tokens, in]; each tensor that it gives has an entry a token.
    Raises ValueError where its forward was patched since the adapters were loaded, it is called with more than the
    tokens, or a CUDA graph is captured.
    """

    def __init__(
        self, base_layer: nn.Module, pool: AdapterPool, path: str, requests: Requests, backend: str = "auto"
    ) -> None:
        super().__init__(base_layer, pool, path, pool.forms(path), requests, backend)
        self._forms = pool.forms(path)

    def serve(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        now = self._requests.own.now or self._requests.lent()
        base: Any = self._modules["base_layer"]
        if isinstance(now, Trace):
            now.see(self.place, x)
            return base.forward(x, *args, **kwargs)  # past the hooks of people who look on
        if now is None or now.base_only or not self.adapts(now, x):
            return base(x, *args, **kwargs)
        more = "it is called with more than the tokens" if args or kwargs else ""
        self.check_runs(x, why_patched(base) or more)
        # The hooks of the base layer around what runs in the place of its forward.
        hooked = copy(base)
        hooked.forward = partial(self._routed, batch=now.batch(x, self.place))
        return hooked(x)

    def _routed(self, x: Tensor, batch: AdapterBatch) -> Any:
        ids = batch.adapter_ids
        order = sorted(range(len(ids)), key=ids.__getitem__)
        rows = x.reshape(len(ids), batch.tokens, x.shape[-1])
        found: list[tuple[Tensor, ...]] = []
        kinds: list[type] = []
        for slot in sorted(set(ids)):
            own = rows[[row for row in order if ids[row] == slot]]
            form = self._forms.get(slot)
            tensors = {} if form is None else {"weight": self._weight(form)}
            router = with_parameters(self.base_layer, tensors)
            given = type(router).forward(router, own.flatten(0, 1) if x.dim() == 2 else own)
            kinds.append(type(given))
            found.append(tensors_of(given))
        back = torch.tensor(order, device=x.device).argsort()
        whole = [
            torch.cat(parts).unflatten(0, (len(ids), -1))[back].flatten(0, 1) for parts in zip(*found, strict=True)
        ]
        return tuple(whole) if kinds[0] is tuple else whole[0]

    def _weight(self, form: SlotForm) -> Tensor:
        h = 1.0 if form.out_scale is None else form.out_scale
        A, B = torch.cat(form.A), torch.cat(form.B).T
        whole = AdapterForm(A, B, form.mid_scale, h, form.base_scale, scaling=form.scaling)
        return merged_weight(self.base_layer.weight, whole)
