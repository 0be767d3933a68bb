"""A transformers model that serves many adapters in one batch."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from ..layers.siblings import groups
from ..layers.ways import device_of, is_offloaded
from ..model.adapted import adapter_configs, replace_module
from ..model.places import shared_places
from ..model.saving import hook_saving, unhook_saving
from ..model.targets import base_modules
from ..model.wrappers import check_open, inside
from ..operators.backends import check_backend
from .experts import MultiAdapterExperts
from .linear import MultiAdapterLinear, Readers, runs_directly
from .pool import AdapterPool
from .requests import Place, Repeats, Requests, Running
from .routers import MultiAdapterRouter
from .served import ServedLayer
from .trace import is_padded, main_input, trace

DEFAULT_BUDGET = 1 << 30

AdapterIds = Sequence[str | None] | str | None


class MultiAdapterModel:
    """A transformers causal or encoder model in which each row of a batch has an adapter of its own, or none.

        served = MultiAdapterModel(model, budget=2 << 30)
        served.load("adapters/sql")
        served.generate(**tokenizer(prompts, return_tensors="pt", padding=True), adapter_ids=["sql", None])

    The linear layers of `model`, experts whose weights are stacked and routers of these are wrapped in place, its
    parameters frozen and the model put into eval mode; `unwrap` gives it back. Everything else, the generation loop
    among it, is transformers' own. Methods and ranks may be mixed in a batch; before the first such batch a forward of
    three short rows shows how the model keeps rows together. Where it does not, as before experts that are linear
    layers, batches of one adapter run as ever and others are refused. Every thread may have a request of its own; work
    that the model hands to other threads belongs to its only running one.
    budget: bytes for resident adapters, see AdapterPool, which is `pool`. dtype: of their factors, by default the
    model's. backend: "auto", "triton" or "eager". torch.compile of `model` compiles what is between the layers that
    serve, once for all requests.
    Raises ValueError for a model without linear layers, with injected adapters or with weights that are offloaded, or a
    budget that is too small.
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
        if any(isinstance(module, ServedLayer) for module in model.modules()):
            raise ValueError("the model is served already: unwrap() the other MultiAdapterModel first")
        check_open(model)
        self.model: Any = model
        self.backend = backend
        for path, module in model.named_modules():
            away = [
                name for name, parameter in module._parameters.items() if parameter is not None and parameter.is_meta
            ]
            if away and not is_offloaded(module):
                raise ValueError(
                    f"{path}.{away[0]} has no memory: serve a model whose weights are there, or come by accelerate's "
                    "offloading"
                )
        self.pool = AdapterPool(model, base_modules(model), budget=budget, dtype=dtype, backend=backend)
        self.requests = Requests()
        self._traced: set[tuple[str, ...]] = set()
        self._tracing = threading.Lock()
        model.eval().requires_grad_(False)
        self._places: list[Place] = []
        shared = shared_places(model)
        kinds: list[tuple[Callable[..., ServedLayer], dict[str, nn.Module]]] = [
            (MultiAdapterLinear, self.pool.layers),
            (MultiAdapterExperts, self.pool.experts),
            (MultiAdapterRouter, self.pool.routers),
        ]
        for kind, bases in kinds:
            for path, base in bases.items():
                layer = kind(base, self.pool, path, self.requests, backend)
                self._places.append(layer.place)
                replace_module(model, path, layer, shared)
        for readers in groups(inside(model).named_modules(), MultiAdapterLinear):
            together = Readers(readers)
            for reader in readers:
                reader.readers = together
        hook_saving(model, ServedLayer, refuse_saving)

    def load(self, directory: str | Path, name: str | None = None, *, root: str | Path | None = None) -> str:
        """Registers the adapter in a PEFT directory: see AdapterPool.load."""
        return self.pool.load(directory, name, root=root)

    def forward(self, *args: Any, adapter_ids: AdapterIds = None, **kwargs: Any) -> Any:
        """The model's own forward, each row through its adapter.

        adapter_ids: a name for each row of the batch, or None for the base model; one name, or None, for all of them.
        Raises KeyError for a name that was not loaded, ValueError for another number of rows, for rows of several
        adapters that the model regroups before a layer which they adapt, and for a model that was moved.
        """
        with self.running(adapter_ids, args, kwargs):
            return self.model(*args, **kwargs)

    __call__ = forward

    def generate(self, *args: Any, adapter_ids: AdapterIds = None, **kwargs: Any) -> Any:
        """transformers' generate, with all that it can do, each row through its adapter: see forward."""
        with self.running(adapter_ids, args, kwargs, _repeats(self.model, args, kwargs)):
            return self.model.generate(*args, **kwargs)

    def unwrap(self) -> Any:
        """Takes the serving layers out of the model and returns it as it was, frozen."""
        places = shared_places(self.model)
        for path, module in list(inside(self.model).named_modules()):
            if isinstance(module, ServedLayer):
                replace_module(self.model, path, module.base_layer, places)
        unhook_saving(self.model)
        return self.model

    @contextmanager
    def running(
        self,
        adapter_ids: AdapterIds,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] = MappingProxyType({}),
        repeats: Repeats | None = None,
    ) -> Iterator[Running]:
        """Inside, what this thread calls of the model is a request of these adapters; args and kwargs are its inputs.

        Raises as forward does.
        """
        self._check_place()
        rows = main_input(args, kwargs)[1].shape[0]
        if adapter_ids is None or isinstance(adapter_ids, str):
            adapter_ids = [adapter_ids] * rows
        elif len(adapter_ids) != rows:
            raise ValueError(f"adapter_ids must have one entry a row, got {len(adapter_ids)} for {rows} rows")
        with self.pool.hold(adapter_ids) as holding:
            mixed = len(set(adapter_ids)) > 1
            even = mixed and _images_are_even(self.model, rows, kwargs)
            if mixed:
                self._trace(args, kwargs, even)
            request = Running(
                holding,
                direct=runs_directly(self.model, self.backend),
                repeats=repeats,
                even=even,
            )
            with self.requests.running(request):
                yield request

    def _check_place(self) -> None:
        """Raises ValueError where the model has gone from where its adapters are."""
        device = device_of(next(iter(self.pool.layers.values())))
        if device != self.pool.device:
            raise ValueError(
                f"the model's weights are on {device} and its adapters on {self.pool.device}: unwrap() it, move it, "
                "and make a new MultiAdapterModel of it"
            )

    def _trace(self, args: Sequence[Any], kwargs: Mapping[str, Any], even: bool) -> None:
        """Sees to it that layers know how rows lie in what they are called with, once for inputs of this kind."""
        name, value = main_input(args, kwargs)
        padded = "padded" if is_padded(value, kwargs) else ""
        kinds = {(str(name), str(value.dtype), str(value.dim()), padded): False}
        if even:
            kinds[str(name), "images", str(kwargs["pixel_values"].dim()), padded] = True
        with self._tracing:
            for kind, images in kinds.items():
                if kind not in self._traced and trace(
                    self.model, self._places, self.requests, args, kwargs, images=images
                ):
                    self._traced.add(kind)


def refuse_saving(module: nn.Module, *args: Any, **kwargs: Any) -> None:
    """The save_pretrained of a served model, whose files from_pretrained could not read. Raises ValueError."""
    raise ValueError("the model is served, and its layers have other names now: unwrap() it before you save it")


def _repeats(model: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Repeats:
    """What generate will make of each row."""
    from transformers import GenerationConfig, GenerationMixin

    given = [value for value in (*args, *kwargs.values()) if isinstance(value, GenerationConfig)]
    configs = [*given, getattr(model, "generation_config", None)]

    def asked(name: str) -> Any:
        values = [kwargs.get(name), *(getattr(config, name, None) for config in configs)]
        return next((value for value in values if value is not None), 1)

    own = (
        getattr(type(model), "generate", None) is not GenerationMixin.generate
        or kwargs.get("custom_generate") is not None
    )
    expand = max(asked("num_beams"), asked("num_return_sequences"))
    return Repeats(expand, guided=asked("guidance_scale") != 1, own=own)


def _images_are_even(model: Any, rows: int, kwargs: Mapping[str, Any]) -> bool:
    """Whether every row has as many image tokens as any other, of images of one size or of patches in one list.

    What a vision tower makes of them is then as many tokens of each row, one row behind the other.
    """
    ids, images = kwargs.get("input_ids"), kwargs.get("pixel_values")
    config = getattr(model, "config", None)
    token = getattr(config, "image_token_id", getattr(config, "image_token_index", None))
    if not (isinstance(ids, Tensor) and isinstance(images, Tensor) and isinstance(token, int)):
        return False
    counts = (ids == token).sum(-1)
    even = bool((counts == counts[0]).all()) and int(counts[0]) > 0
    return even and images.dim() in (2, 4) and images.shape[0] % rows == 0
