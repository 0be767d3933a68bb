"""Layers that carry adapters: a frozen base layer, named adapters beside it, none, one or several of them active.

An `Adapter` is one adapter of one layer: its parameters and the form that they fill in. An `AdapterLayer` wraps a base
layer and applies the form of the active adapters; AdapterLinear (nn.Linear, transformers' Conv1D), AdapterEmbedding,
AdapterConv2d and AdapterNorm differ only in how they see the base weight as a matrix [out, in] and how they apply a
form. An adapter that is no form works on the stream of tokens instead, on what a module reads or gives (`around`).
AdapterModule carries such adapters over any other module.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ..checks import FLOATING
from ..forms import merged_weight, stacked
from ..operators.adapter_linear.strategies import STRATEGIES
from ..operators.calls import without_autocast
from ..reference import AdapterForm
from ..staleness import Kept
from .dequantize import dequantized, is_packed, requantized, would_round
from .ways import (
    agree,
    at_hand,
    bias_of,
    device_of,
    is_offloaded,
    is_plain,
    plain_kind,
    plain_layer,
    sample,
    undisturbed,
    weight_of,
    why_called,
    with_tensors,
)
from .wrapper import BaseLayerWrapper

# How much of the base weight: its shape, the norms of its rows as well, or its values.
Reads = Literal["shape", "norms", "values"]


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

    def tensor(self, name: str) -> Tensor:
        """The parameter or buffer of that name, sooner than as an attribute."""
        found: Tensor | None = self._parameters.get(name)
        return getattr(self, name) if found is None else found

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

    @property
    def reads(self) -> Reads:
        """How much of the base weight `form` and the operator need: a layer that is called has no more at hand."""
        return "shape"

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


class AdapterLayer(BaseLayerWrapper):
    """A frozen base layer with named adapters. `active` has the names of those that run; without any the base does.

    A plain base layer is fused with the form of the active adapters (`adapted`); any other is called, and the form goes
    onto what it gave (`called`): see ways.py. While merged, the base layer's own tensors hold the active adapters, or
    a plain layer stands in the place of one that could not; `unmerge` puts the untouched ones back.
    """

    # The forward of torch's that `adapted` stands for; None where there is none.
    plain_forward: Any = None
    # The parameters of the base layer that an adapter can be on, by name.
    parameter_names: tuple[str, ...] = ("weight",)
    # Where the layer is in the model that it was injected into, for errors.
    path: str = ""

    def __init__(self, base_layer: nn.Module, backend: str = "auto", strategy: str = "auto") -> None:
        super().__init__()
        self.base_layer = base_layer
        self.adapters = nn.ModuleDict()
        self.active: tuple[str, ...] = ()
        self.backend = backend
        self.strategy = strategy
        # The base layer, and its own weight and bias where these were replaced.
        self._unmerged: tuple[nn.Module, nn.Parameter | None, nn.Parameter | None] | None = None
        self._like: Tensor | None = None  # of a weight that is another tensor at each access
        # Not by train(), which would give this mode to all that is inside of the base layer.
        self.training = self.adapters.training = base_layer.training

    @property
    def merged(self) -> bool:
        return self._unmerged is not None

    @property
    def active_adapters(self) -> list[Adapter]:
        adapters: Any = self._modules["adapters"]
        modules = adapters._modules
        return [modules[name] for name in self.active]

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
        adapters = self.active_adapters
        if len(adapters) == 1:  # sooner than by a generator
            return adapters[0].on_stream(self)
        return any(adapter.on_stream(self) for adapter in adapters)

    @property
    def reason(self) -> str:
        """Why the base layer is called; "" where its formula is fused with the adapters' form."""
        return why_called(self.base_layer, self.plain_forward)

    @property
    def way(self) -> str:
        """What a forward does now: "base", "merged", "stream", "called" or "fused"."""
        if self.merged or not self.active:
            return "merged" if self.merged else "base"
        if self.on_stream:
            return "stream"
        return "called" if self.reason else "fused"

    @property
    def base_weight(self) -> Tensor:
        """The weight that the base layer says it computes with, in its layout, fetched where it is offloaded.

        Where it has none of floating point, a matrix of its shape without values.
        """
        base: Any = self._modules["base_layer"]
        weight = base._parameters.get("weight")
        if type(weight) is nn.Parameter and weight.dtype in FLOATING and not weight.is_meta:
            return weight
        found = weight_of(base)
        return self.no_weight() if found is None else found

    def no_weight(self) -> Tensor:
        """What stands for the weight of a layer that has none in floating point: its shape, in the layer's layout."""
        raise ValueError(f"{self.name} has no weight in floating point, which an adapter needs here: leave it out")

    @property
    def weight_matrix(self) -> Tensor:
        """The base weight as a view [out, in]."""
        return self.base_weight

    @property
    def like(self) -> Tensor:
        """A tensor of the base layer's device and dtype: the same one each time."""
        base: Any = self._modules["base_layer"]
        own: Tensor | None = base._parameters.get("weight")
        if own is None or not is_offloaded(base):
            found = self.base_weight
            if found is own:
                return found
            device, dtype = found.device, found.dtype
        else:  # without fetching it
            device, dtype = device_of(base), own.dtype
        kept: Tensor | None = self._like
        if kept is None or (kept.device, kept.dtype) != (device, dtype):
            self._like = kept = torch.empty(0, dtype=dtype, device=device)
        return kept

    @property
    def base_bias(self) -> nn.Parameter | None:
        base: Any = self._modules["base_layer"]
        parameters = base._parameters
        bias: nn.Parameter | None = parameters["bias"] if "bias" in parameters else getattr(base, "bias", None)
        return bias_of(base) if bias is not None and bias.is_meta else bias

    @property
    def name(self) -> str:
        """The layer in the words of an error."""
        kind = type(self.base_layer).__name__
        return f"{self.path} ({kind})" if self.path else kind

    @property
    def reads(self) -> Reads:
        """How much of the base weight the active adapters need."""
        found = {adapter.reads for adapter in self.active_adapters}
        return "values" if "values" in found else "norms" if "norms" in found else "shape"

    def form(self) -> AdapterForm:
        """The form that the active adapters have in a forward. Raises ValueError when none is active."""
        return self._form(self.weight_matrix, self.base_bias)

    def form_on(self, weight: Tensor, bias: Tensor | None) -> AdapterForm:
        """The form that the active adapters have on a weight [out, in] and bias, also where they are offloaded."""
        with ExitStack() as stack:
            for adapter in self.active_adapters:
                stack.enter_context(at_hand(adapter))
            return self._form(weight, bias)

    def _form(self, weight: Tensor, bias: Tensor | None) -> AdapterForm:
        adapters = self.active_adapters
        if not adapters:
            raise ValueError("no adapter is active on this layer: call set_adapter(model, name) first")
        if len(adapters) == 1:
            return adapters[0].form(weight, bias)
        return stacked([adapter.form(weight, bias) for adapter in adapters if not adapter.on_stream(self)], bias)

    def weight_for(self, reads: Reads) -> Tensor:
        """The base weight [out, in] with so much of it. Raises ValueError where the layer does not have that."""
        return self.weight_matrix

    def settled_form(self, adapter: Adapter) -> AdapterForm:
        """The form that an adapter has on this layer in eval mode, whatever its mode is."""
        training = adapter.training
        adapter.eval()
        try:
            with at_hand(adapter):
                return adapter.form(self.weight_for(adapter.reads), self.base_bias)
        finally:
            adapter.train(training)

    def merged_form(self) -> AdapterForm:
        """The form of all active adapters in eval mode. Raises ValueError where one of them is more than a form."""
        for name, adapter in zip(self.active, self.active_adapters, strict=True):
            if not adapter.merges:
                raise ValueError(
                    f"adapter {name!r} cannot be merged: {type(adapter).__name__} works on the stream of tokens, and "
                    "no weight of this layer can hold that; serve it unmerged"
                )
        with torch.no_grad():
            return stacked([self.settled_form(adapter) for adapter in self.active_adapters], self.base_bias)

    def merged_tensors(self, weight: Tensor, form: AdapterForm) -> tuple[Tensor, Tensor | None]:
        """(W' as a matrix [out, in], b') of a form on a weight [out, in]. Raises ValueError unless they are finite."""
        with torch.no_grad():
            weight = merged_weight(weight, form)
            if not torch.isfinite(weight).all() or (form.bias is not None and not torch.isfinite(form.bias).all()):
                names = ", ".join(map(repr, self.active))
                raise ValueError(f"adapter {names} cannot be merged: the merged weight has NaN or infinite values")
            return weight, None if form.bias is None else form.bias.to(weight.dtype).clone()

    def from_matrix(self, matrix: Tensor) -> Tensor:
        """A weight matrix [out, in] in the base layer's own layout: the inverse of `weight_matrix`."""
        return matrix

    def merge(self, *, dequantize: bool = False, requantize: bool = False) -> float:
        """Writes the active adapters into the base layer: W' = diag(g) W0 + W0 ⊙ (U V) + diag(h) B diag(d) A, b' = β.

        The base layer gets new parameters; the old ones are set aside untouched for `unmerge`, so that whoever shares
        them (a tied head) is not changed. A layer that could not give back what is written into it makes way for a
        plain one, so does a quantised one with dequantize. requantize: W' is rounded; returns by what share.
        Raises ValueError where there is no such weight; the layer is then as it was.
        """
        if self.merged or not self.active:
            return 0.0
        form = self.merged_form()
        if not self.reason:
            self._write(form)
            return 0.0
        if is_offloaded(self.base_layer):
            raise ValueError("its weight is offloaded between calls: merge the adapter into a model that is in memory")
        if "weight" in self.base_layer.__dict__:
            raise ValueError(
                "its weight is made by a hook before each call: make it a parameter first "
                "(torch.nn.utils.remove_weight_norm, remove_spectral_norm, prune.remove)"
            )
        if is_packed(self.base_layer):
            if not dequantize and not requantize:
                raise would_round(self.base_layer, self.like.dtype)
            return self._replace(form, requantize)
        x = self.trial()
        with torch.no_grad(), without_autocast(x):
            with undisturbed(self):
                want = self.forward(x)
            if self._keeps_what_is_written(form):
                self._write(form)
            else:
                self._replace(form)
            with undisturbed(self):
                same = agree(self.forward(x), want)
        if not same:
            self.unmerge()
            raise self._unmergeable()
        return 0.0

    @property
    def has_new_bias(self) -> bool:
        """Whether merging has given the base layer a bias that it does not have by itself."""
        if self._unmerged is None:
            return False
        base, _, bias = self._unmerged
        before = bias if base is self.base_layer else getattr(base, "bias", None)
        return before is None and getattr(self.base_layer, "bias", None) is not None

    def _write(self, form: AdapterForm) -> None:
        """Merges by new parameters of the base layer."""
        base = self.base_layer
        weight, bias = self.merged_tensors(self.weight_matrix, form)
        old = base, base.weight, self.base_bias
        base.weight = nn.Parameter(self.from_matrix(weight), requires_grad=False)
        if bias is not None:
            base.bias = nn.Parameter(bias, requires_grad=False)
        self._unmerged = old

    def _replace(self, form: AdapterForm, requantize: bool = False) -> float:
        """Merges by another layer in the base layer's place, plain or quantised as that; returns what that rounded."""
        base, (weight, shift) = self.base_layer, self._effective(form)
        if shift is not None:
            form = form._replace(bias=shift if form.bias is None else form.bias + shift)
        weight, bias = self.merged_tensors(weight, form)
        beta = None if bias is None else nn.Parameter(bias, requires_grad=False)
        if requantize:
            layer, rounded = requantized(base, weight, beta)
        else:
            layer, rounded = plain_layer(base, self.from_matrix(weight), beta, self.plain_forward), 0.0
        self.base_layer, self._unmerged = layer, (base, None, None)
        return rounded

    def _unmergeable(self) -> ValueError:
        return ValueError(
            f"an adapter cannot be merged into this layer: {self.reason}, and no weight of a plain one computes the "
            "same; serve it unmerged"
        )

    def _keeps_what_is_written(self, form: AdapterForm) -> bool:
        """Whether what is added to the base layer's parameters comes out as the layer's formula has it.

        Not where they are scaled or quantised on the way, or a hook changes what comes out; for a form that scales the
        base path, of which a hook's own part is none, all of it has to.
        """
        base: Any = self.base_layer
        own = {name: parameter for name, parameter in base._parameters.items() if parameter is not None}
        if type(own.get("weight")) is not nn.Parameter or own["weight"].dtype not in FLOATING:
            return False
        if getattr(base, "bias", None) is not own.get("bias"):  # a buffer, or made at each access
            return False
        changes = {}
        for seed, (name, parameter) in enumerate(own.items()):
            size = parameter.detach().square().mean().sqrt().clamp(min=1e-3)
            changes[name] = sample(*parameter.shape, like=parameter, seed=seed) * size
        x = self.trial()
        with torch.no_grad(), undisturbed(base), without_autocast(x):
            before = self.base_output(x)
            if form.base_scale is not None and not agree(before, self.formula(x, own["weight"], own.get("bias"))):
                return False
            try:
                base._parameters.update({name: nn.Parameter(own[name] + change) for name, change in changes.items()})
                after = self.base_output(x)
            finally:
                base._parameters.update(own)
            return agree(after - before, self.formula(x, changes["weight"], changes.get("bias")))

    def _effective(self, form: AdapterForm) -> tuple[Tensor, Tensor | None]:
        """(E [out, in], what β lacks): the weight that a plain layer computes the base layer's output with.

        Raises ValueError where there is none.
        """
        base, x = self.base_layer, self.trial()
        weight = dequantized(base)
        if weight is not None:  # what a library does to x on the way, if anything, is none of its weight
            return weight.to(self.like.dtype), None
        weight = weight_of(base)
        if weight is not None:
            with undisturbed(base), without_autocast(x):
                if agree(self.base_output(x), self.formula(x, weight, self.base_bias)):
                    return self.weight_matrix, None
        raise self._unmergeable()

    def trial(self) -> Tensor:
        """An input to try the base layer with."""
        raise TypeError(f"{type(self).__name__} does not say how its base layer is tried")

    def formula(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """What a plain layer with these tensors, in the base layer's layout, gives for x."""
        y: Tensor = with_tensors(self.base_layer, weight, bias, plain_kind(self.base_layer, self.plain_forward))(x)
        return y

    def unmerge(self) -> None:
        """Puts back what `merge` set aside, bit for bit."""
        if self._unmerged is None:
            return
        base, *parameters = self._unmerged
        merged = self.base_layer
        if base is not merged:
            like = weight_of(base)
            if like is not None and (like.device, like.dtype) != (merged.weight.device, merged.weight.dtype):
                base.to(merged.weight.device, merged.weight.dtype)
            self.base_layer = base
        else:
            for name, parameter in zip(("weight", "bias"), parameters, strict=True):
                if parameter is not None:  # the model may have been moved meanwhile
                    parameter.data = parameter.data.to(base.weight.device, base.weight.dtype)
                if hasattr(base, name):
                    setattr(base, name, parameter)
        self._unmerged = None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self._unmerged is not None or not self.active:
            return self.base_layer(x, *args, **kwargs)
        if not self.on_stream:
            return self.with_form(x, *args, **kwargs)
        run: Callable[..., Any] = self.with_forms
        for adapter in reversed(self.active_adapters):
            if adapter.on_stream(self):
                run = partial(adapter.around, self, run)
        return run(x, *args, **kwargs)

    def with_forms(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The base layer with the forms alone of the active adapters applied to x."""
        if not self.merged and not all([adapter.on_stream(self) for adapter in self.active_adapters]):
            return self.with_form(x, *args, **kwargs)
        return self.base_layer(x, *args, **kwargs)

    def with_form(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base layer with the form of the active adapters, in the way that it can run now."""
        if args or kwargs or not is_plain(self._modules["base_layer"], self.plain_forward):  # type: ignore[arg-type]
            return self.called(x, *args, **kwargs)
        return self.grouped(x)

    def base_output(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """What the base layer gives. Raises ValueError where that is not one tensor."""
        y = self.base_layer(x, *args, **kwargs)
        if not isinstance(y, Tensor):
            raise ValueError(
                f"{self.name} gives a {type(y).__name__}, and an adapter's form goes onto one tensor: name it in "
                "exclude_modules"
            )
        return y

    def called(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The form of the active adapters on what the base layer gives for x."""
        raise TypeError(f"{type(self).__name__} does not say how a form goes onto what its base layer gives")

    def grouped(self, x: Tensor) -> Tensor:
        """`adapted`, together with layers that read the same x where that pays."""
        return self.adapted(x)

    def adapted(self, x: Tensor) -> Tensor:
        """The formula of a plain base layer with the form of the active adapters, for x."""
        raise TypeError(f"{type(self).__name__} does not say how it applies a form")

    def _low_rank_form(self) -> AdapterForm:
        """The form of the active adapters on a layer that has a low-rank path alone, in eager PyTorch."""
        if self.backend == "triton" or STRATEGIES.get(self.strategy) == "triton":
            raise ValueError(
                f'{type(self).__name__} has no Triton kernel: leave backend and strategy "auto" to run this layer in '
                "eager PyTorch"
            )
        form = self.form_on(self.weight_matrix, self.base_bias)
        if form.U is not None:
            raise ValueError(
                f"{type(self).__name__} cannot scale every weight by itself (U and V), only linear layers can: merge "
                "this adapter, or name only linear layers in target_modules"
            )
        return form

    def extra_repr(self) -> str:
        reason = self.reason
        return f"active={self.active!r}, way={self.way}" + (f" ({reason})" if reason else "")
