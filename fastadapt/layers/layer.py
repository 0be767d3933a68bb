"""Layers that carry adapters: a frozen base layer, named adapters beside it, none, one or several of them active.

An `Adapter` is one adapter of one layer: its parameters and the form that they fill in. An `AdapterLayer` wraps a base
layer and applies the form of the active adapters; AdapterLinear (nn.Linear, transformers' Conv1D), AdapterEmbedding,
AdapterConv2d and AdapterNorm differ only in how they see the base weight as a matrix [out, in] and how they apply a
form. An adapter that is no form works on the stream of tokens instead, on what a module reads or gives (`around`).
AdapterModule carries such adapters over any other module.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..forms import merged_weight, stacked
from ..operators.adapter_linear.strategies import STRATEGIES
from ..reference import AdapterForm
from ..staleness import Kept


class Adapter(nn.Module):
    """The parameters of one adapter of one layer. A method subclasses it and says what they mean in `form`.

    `suffixes` maps every tensor that the class can have to its suffix in a PEFT checkpoint, `checkpoint_names` those
    that this adapter has; what is frozen is a buffer, the rest are parameters. `bias` is the adapter's own copy of the
    base bias where it trains one. `scaling` and `variant` are what the form depends on beside the tensors. `memo` has
    what was made of them and of the base weight, until `forget`.

    merges: whether `form` is all that the adapter does, so that a weight can hold it.
    """

    merges: bool = True
    suffixes: ClassVar[Mapping[str, str]] = {}

    bias: nn.Parameter | None
    lora_magnitude_vector: nn.Parameter | None
    scaling: float = 1.0
    variant: Any = None

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.memo = Kept()
        self.checkpoint_names: dict[str, str] = {}
        self.register_parameter("lora_magnitude_vector", None)
        self.register_parameter("bias", None)

    def add_tensor(self, name: str, value: Tensor, like: Tensor, dtype: torch.dtype, *, frozen: bool = False) -> None:
        """Registers a copy of `value`, on like's device, by a name that is in `suffixes`."""
        value = value.detach().to(like.device, dtype, copy=True)
        if frozen:
            self.register_buffer(name, value)
        else:
            self.register_parameter(name, nn.Parameter(value))
        self.checkpoint_names[name] = self.suffixes[name]

    def checkpoint_tensors(self) -> dict[str, Tensor]:
        """The tensors that a checkpoint holds of this adapter, by their suffix in it."""
        return {suffix: getattr(self, name) for name, suffix in self.checkpoint_names.items()}

    def forget(self) -> None:
        """Drops what was made of tensors and kept."""
        self.memo.forget()

    def train(self, mode: bool = True) -> Adapter:
        super().train(mode)
        self.forget()
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Adapter:
        self.forget()
        super()._apply(fn, recurse)
        return self

    def _load_from_state_dict(self, *args: Any) -> None:
        self.forget()
        super()._load_from_state_dict(*args)

    def form(self, weight: Tensor, bias: Tensor | None) -> AdapterForm:
        """The adapter form for the base weight [out, in] and bias [out], differentiable in the parameters."""
        raise TypeError(f"{type(self).__name__} does not say its form")

    def on_stream(self, layer: AdapterLayer) -> bool:
        """Whether a forward of the layer goes through `around`, in the place of applying `form`."""
        return False

    def around(self, layer: AdapterLayer, run: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """What the layer gives for x in the place of run(x, *args, **kwargs), which is all that is inside of it."""
        return run(x, *args, **kwargs)

    def extra_repr(self) -> str:
        return f"dropout={self.dropout}" if self.dropout else ""


class StreamAdapter(Adapter):
    """An adapter that is no form: no weight can hold what it does to the stream of tokens."""

    merges = False

    def on_stream(self, layer: AdapterLayer) -> bool:
        return True

    def form(self, weight: Tensor, bias: Tensor | None) -> AdapterForm:
        raise ValueError(f"{type(self).__name__} works on the stream of tokens: it has no form")


class BaseLayerWrapper(nn.Module):
    """A module over `base_layer`, which answers for every attribute that the module does not have itself."""

    base_layer: Any

    def __getattr__(self, name: str) -> Any:
        # Model code asks its layers for `weight`, `in_features`, `kernel_size`, ...: the base layer answers.
        try:
            return super().__getattr__(name)
        except AttributeError:
            # Python's own names (__deepcopy__) are this module's or nobody's.
            if name == "base_layer" or name.startswith("__"):
                raise
            return getattr(self.base_layer, name)

    def _misfit(self) -> dict[str, Tensor]:
        """A tensor by the plain name of one of the base layer's, in a shape that is never its own.

        A reader who knows the model without wrappers finds none of the names that it has now, and would make what is
        missing anew, at random. It stops at this one.
        """
        for name, parameter in self.base_layer.named_parameters():
            return {name.replace("base_layer.", ""): torch.zeros((1,) * (parameter.dim() + 2))}
        return {}

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.update({prefix + name: tensor for name, tensor in self._misfit().items()})

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        for name, tensor in self._misfit().items():
            if prefix + name in unexpected_keys and state_dict[prefix + name].shape == tensor.shape:
                unexpected_keys.remove(prefix + name)


class AdapterLayer(BaseLayerWrapper):
    """A frozen base layer with named adapters. `active` has the names of those that run; without any the base does.

    While merged, the base layer's own tensors hold the active adapters; `unmerge` puts the untouched ones back.
    """

    def __init__(self, base_layer: nn.Module, backend: str = "auto", strategy: str = "auto") -> None:
        super().__init__()
        self.base_layer = base_layer
        self.adapters = nn.ModuleDict()
        self.active: tuple[str, ...] = ()
        self.backend = backend
        self.strategy = strategy
        self._unmerged: tuple[nn.Parameter, nn.Parameter | None] | None = None
        # Not by train(), which would give this mode to all that is inside of the base layer.
        self.training = self.adapters.training = base_layer.training

    @property
    def merged(self) -> bool:
        return self._unmerged is not None

    @property
    def active_adapters(self) -> list[Adapter]:
        adapters: Any = self._modules["adapters"]
        return [adapters._modules[name] for name in self.active]

    @property
    def dropout(self) -> float:
        """The drop probability of the active adapters' forms.

        Raises ValueError where they differ and the layer is in training.
        """
        adapters = self.active_adapters
        if len(adapters) == 1:
            return adapters[0].dropout
        probabilities = {adapter.dropout for adapter in adapters if not adapter.on_stream(self)}
        if len(probabilities) > 1 and self.training:
            raise ValueError(
                f"adapters {', '.join(map(repr, self.active))} have different dropout, {sorted(probabilities)}, and "
                "one mask serves all that are active together: give them the same, or call eval()"
            )
        return max(probabilities, default=0.0)

    @property
    def on_stream(self) -> bool:
        """Whether an active adapter works on what the layer reads or gives."""
        return any([adapter.on_stream(self) for adapter in self.active_adapters])

    @property
    def weight_matrix(self) -> Tensor:
        """The base weight as a view [out, in]."""
        weight: Tensor = self.base_layer.weight
        return weight

    @property
    def like(self) -> Tensor:
        """A tensor of the base layer's device and dtype."""
        weight: Tensor = self.base_layer.weight
        return weight

    @property
    def base_bias(self) -> nn.Parameter | None:
        return getattr(self.base_layer, "bias", None)

    def form(self) -> AdapterForm:
        """The form that the active adapters have in a forward. Raises ValueError when none is active."""
        adapters = self.active_adapters
        if not adapters:
            raise ValueError("no adapter is active on this layer: call set_adapter(model, name) first")
        weight, bias = self.weight_matrix, self.base_bias
        if len(adapters) == 1:
            return adapters[0].form(weight, bias)
        return stacked([adapter.form(weight, bias) for adapter in adapters if not adapter.on_stream(self)], bias)

    def settled_form(self, adapter: Adapter) -> AdapterForm:
        """The form that an adapter has on this layer in eval mode, whatever its mode is."""
        training = adapter.training
        adapter.eval()
        try:
            return adapter.form(self.weight_matrix, self.base_bias)
        finally:
            adapter.train(training)

    def merged_tensors(self) -> tuple[Tensor, Tensor | None]:
        """(W' as a matrix [out, in], b') of the active adapters.

        Raises ValueError where they are not finite, or more than a form.
        """
        for name, adapter in zip(self.active, self.active_adapters, strict=True):
            if not adapter.merges:
                raise ValueError(
                    f"adapter {name!r} cannot be merged: {type(adapter).__name__} works on the stream of tokens, and "
                    "no weight of this layer can hold that; serve it unmerged"
                )
        with torch.no_grad():
            form = stacked([self.settled_form(adapter) for adapter in self.active_adapters], self.base_bias)
            weight = merged_weight(self.weight_matrix, form)
            if not torch.isfinite(weight).all() or (form.bias is not None and not torch.isfinite(form.bias).all()):
                names = ", ".join(map(repr, self.active))
                raise ValueError(f"adapter {names} cannot be merged: the merged weight has NaN or infinite values")
            return weight, None if form.bias is None else form.bias.to(weight.dtype).clone()

    def from_matrix(self, matrix: Tensor) -> Tensor:
        """A weight matrix [out, in] in the base layer's own layout: the inverse of `weight_matrix`."""
        return matrix

    def merge(self) -> None:
        """Writes the active adapters into the base layer: W' = diag(g) W0 + W0 ⊙ (U V) + diag(h) B diag(d) A, b' = β.

        The base layer gets new parameters; the old ones are set aside untouched for `unmerge`, so that whoever shares
        them (a tied head) is not changed.
        """
        if self.merged or not self.active:
            return
        weight, bias = self.merged_tensors()
        base = self.base_layer
        if "weight" not in base._parameters:
            raise ValueError(
                f"the weight of this {type(base).__name__} is made anew at each access (parametrized, pruned): nothing "
                "can be written into it; make it plain first (torch.nn.utils.parametrize.remove_parametrizations)"
            )
        old = base.weight, self.base_bias
        base.weight = nn.Parameter(self.from_matrix(weight), requires_grad=False)
        if bias is not None:
            base.bias = nn.Parameter(bias, requires_grad=False)
        self._unmerged = old

    def unmerge(self) -> None:
        """Puts back the parameters that `merge` set aside, bit for bit."""
        if self._unmerged is None:
            return
        base = self.base_layer
        for name, parameter in zip(("weight", "bias"), self._unmerged, strict=True):
            if parameter is not None:  # the model may have been moved meanwhile
                parameter.data = parameter.data.to(base.weight.device, base.weight.dtype)
            if hasattr(base, name):
                setattr(base, name, parameter)
        self._unmerged = None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.merged or not self.active:
            return self.base_layer(x, *args, **kwargs)
        if not self.on_stream:
            return self.adapted(x)
        run: Callable[..., Any] = self.with_forms
        for adapter in reversed(self.active_adapters):
            if adapter.on_stream(self):
                run = partial(adapter.around, self, run)
        return run(x, *args, **kwargs)

    def with_forms(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The base layer with the forms alone of the active adapters applied to x."""
        if not self.merged and not all([adapter.on_stream(self) for adapter in self.active_adapters]):
            return self.adapted(x)
        return self.base_layer(x, *args, **kwargs)

    def adapted(self, x: Tensor) -> Tensor:
        """The base layer with the form of the active adapters applied to x."""
        raise TypeError(f"{type(self).__name__} does not say how it applies a form")

    def _low_rank_form(self) -> AdapterForm:
        """The form of the active adapters on a layer that has a low-rank path alone, in eager PyTorch."""
        if self.backend == "triton" or STRATEGIES.get(self.strategy) == "triton":
            raise ValueError(
                f'{type(self).__name__} has no Triton kernel: leave backend and strategy "auto" to run this layer in '
                "eager PyTorch"
            )
        form = self.form()
        if form.U is not None:
            raise ValueError(
                f"{type(self).__name__} cannot scale every weight by itself (U and V), only linear layers can: merge "
                "this adapter, or name only linear layers in target_modules"
            )
        return form

    def extra_repr(self) -> str:
        return f"active={self.active!r}, merged={self.merged}"
