"""A transformers model that serves many adapters in one batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..model.adapted import adapter_configs, replace_module
from ..model.places import shared_places
from ..model.saving import hook_saving, unhook_saving
from ..model.targets import base_modules
from ..model.wrappers import check_open, inside
from ..operators.backends import check_backend
from .linear import MultiAdapterLinear, Running, running, runs_directly
from .pool import AdapterPool

DEFAULT_BUDGET = 1 << 30

AdapterIds = Sequence[str | None] | str | None


class MultiAdapterModel:
    """A transformers causal or encoder model in which each row of a batch has an adapter of its own, or none.

        served = MultiAdapterModel(model, budget=2 << 30)
        served.load("adapters/sql")
        served.generate(**tokenizer(prompts, return_tensors="pt", padding=True), adapter_ids=["sql", None])

    The linear layers of `model` are wrapped in place, its parameters frozen and the model put into eval mode; `unwrap`
    gives it back. Everything else, the generation loop among it, is transformers' own. Methods and ranks may be mixed
    in a batch. budget: bytes for resident adapters, see AdapterPool, which is `pool`. dtype: of their factors, by
    default the model's. backend: "auto", "triton" or "eager".
    Raises ValueError for a model without linear layers or with injected adapters, or a budget that is too small.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        budget: int = DEFAULT_BUDGET,
        dtype: torch.dtype | None = None,
        backend: str = "auto",
    ) -> None:
        check_backend(backend)
        if adapter_configs(model):
            raise ValueError("the model has injected adapters: unload(model) first, and load them here by directory")
        if any(isinstance(module, MultiAdapterLinear) for module in model.modules()):
            raise ValueError("the model is served already: unwrap() the other MultiAdapterModel first")
        check_open(model)
        self.model: Any = model
        self.backend = backend
        self.pool = AdapterPool(model, base_modules(model), budget=budget, dtype=dtype)
        model.eval().requires_grad_(False)
        places = shared_places(model)
        for path, layer in self.pool.layers.items():
            replace_module(model, path, MultiAdapterLinear(layer, self.pool, path, backend), places)
        hook_saving(model, MultiAdapterLinear, refuse_saving)

    def load(self, directory: str | Path, name: str | None = None, *, root: str | Path | None = None) -> str:
        """Registers the adapter in a PEFT directory: see AdapterPool.load."""
        return self.pool.load(directory, name, root=root)

    def forward(self, *args: Any, adapter_ids: AdapterIds = None, **kwargs: Any) -> Any:
        """The model's own forward, each row through its adapter.

        adapter_ids: a name for each row of the batch, or None for the base model; one name, or None, for all of them.
        Raises KeyError for a name that was not loaded, ValueError for another number of rows.
        """
        with self._running(adapter_ids, args, kwargs):
            return self.model(*args, **kwargs)

    __call__ = forward

    def generate(self, *args: Any, adapter_ids: AdapterIds = None, **kwargs: Any) -> Any:
        """transformers' generate, with all that it can do, each row through its adapter: see forward."""
        with self._running(adapter_ids, args, kwargs):
            return self.model.generate(*args, **kwargs)

    def unwrap(self) -> Any:
        """Takes the serving layers out of the model and returns it as it was, frozen."""
        places = shared_places(self.model)
        for path, module in list(inside(self.model).named_modules()):
            if isinstance(module, MultiAdapterLinear):
                replace_module(self.model, path, module.base_layer, places)
        unhook_saving(self.model)
        return self.model

    @contextmanager
    def _running(self, adapter_ids: AdapterIds, args: Sequence[Any], kwargs: dict[str, Any]) -> Iterator[None]:
        rows = _rows(args, kwargs)
        if adapter_ids is None or isinstance(adapter_ids, str):
            adapter_ids = [adapter_ids] * rows
        elif len(adapter_ids) != rows:
            raise ValueError(f"adapter_ids must have one entry a row, got {len(adapter_ids)} for {rows} rows")
        with self.pool.hold(adapter_ids) as holding:
            token = running.set(Running(holding, direct=runs_directly(self.model, self.backend)))
            try:
                yield
            finally:
                running.reset(token)


def refuse_saving(module: nn.Module, *args: Any, **kwargs: Any) -> None:
    """The save_pretrained of a served model, whose files from_pretrained could not read. Raises ValueError."""
    raise ValueError("the model is served, and its layers have other names now: unwrap() it before you save it")


def _rows(args: Sequence[Any], kwargs: dict[str, Any]) -> int:
    """How many rows the inputs of a forward or of generate have. Raises ValueError where none is a batch."""
    named = [kwargs.get(name) for name in ("input_ids", "inputs_embeds", "inputs", "pixel_values", "input_features")]
    for value in (*args, *named, *kwargs.values()):
        if isinstance(value, Tensor) and value.dim() > 1:
            return int(value.shape[0])
    raise ValueError("adapter_ids need a batch to go with: pass input_ids [rows, tokens], or another input with rows")
