"""PEFT's LoRA and VeRA layers with a forward of ours: subclasses that a live layer is given as its class.

They are classes of a module, so that a model with them can be pickled. Nothing of PEFT's is replaced: what a forward of
ours does not cover goes to PEFT's own, which comes next in the order of the classes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from peft.tuners.lora import dora, variants
from peft.tuners.lora import layer as lora
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.tuners.vera import VeraModel
from peft.tuners.vera import layer as vera
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import CheckpointFunction

from ..checks import FLOATING
from ..forms import stacked
from ..layers.dequantize import is_quantized, lends, lent_weight, promised_weight
from ..layers.linear import ProjectionGroup, kind_of_lent, kind_of_weight, plain_forward
from ..layers.promise import made_again
from ..layers.sharing import makers
from ..layers.ways import is_hooked, is_plain
from ..methods.row_norm import row_norm
from ..operators.adapter_linear.function import adapter_linear
from ..operators.adapter_update.function import adapter_update
from ..operators.calls import autocast_dtype
from ..reference import AdapterForm
from ..staleness import Kept

_LINEAR, _MAGNITUDE = nn.Linear.forward, dora.DoraLinearLayer.forward

# What runs while a reentrant checkpoint runs its part again.
_REENTRANT: Any = vars(CheckpointFunction)["_backward_cls"]

# How often PEFT has written base weights past their versions: several layers may have the same one.
_base_writes = 0


class Accelerated(nn.Module):
    """What a layer of PEFT's runs by in the place of its own forward, as long as `why_left` has no reason.

    The way is chosen at each call, from PEFT's own state: on a plain base layer its formula and the adapters' form are
    one operator, together with the siblings that read the same x; on any other the form goes onto what it gives.
    Shapes: x [..., in]; y [..., out].
    """

    backend = strategy = "auto"
    group: ProjectionGroup | None = None
    mixed_batches = False

    # PEFT's.
    base_layer: Any
    active_adapters: Any
    merged_adapters: Any
    disable_adapters: Any

    def start(self, mixed_batches: bool) -> None:
        """Takes up the work, with nothing kept."""
        self.norms: dict[str, Kept] = {}
        self.writes_seen = _base_writes
        self.group = None
        self.mixed_batches = mixed_batches

    def stop(self) -> None:
        """Gives the layer back to PEFT, as it was."""
        for name in ("norms", "writes_seen", "group", "mixed_batches"):
            self.__dict__.pop(name, None)
        self.__class__ = self._of_peft  # type: ignore[assignment]

    @property
    def _of_peft(self) -> type[nn.Module]:
        """The class of PEFT's that this one stands for."""
        return next(kind for kind, own in ACCELERATED.items() if own is type(self))

    def _get_name(self) -> str:
        return self._of_peft.__name__  # it prints as PEFT's own, which people and tests look for

    def forget(self) -> None:
        """Drops norms and the outputs that siblings wait for."""
        self.norms.clear()
        if self.group is not None:
            self.group.forget()

    def train(self, mode: bool = True) -> Any:
        self.forget()
        return super().train(mode)

    # PEFT writes base weights through .data, which no version tells, in these three: the inits of some adapters too.
    def merge(self, *args: Any, **kwargs: Any) -> Any:
        return self._writing("merge", *args, **kwargs)

    def unmerge(self, *args: Any, **kwargs: Any) -> Any:
        return self._writing("unmerge", *args, **kwargs)

    def update_layer(self, *args: Any, **kwargs: Any) -> Any:
        return self._writing("update_layer", *args, **kwargs)

    def _writing(self, name: str, *args: Any, **kwargs: Any) -> Any:
        global _base_writes
        try:
            return getattr(super(), name)(*args, **kwargs)
        finally:
            _base_writes += 1

    # What the two methods of PEFT's say of one adapter.

    def _inside(self, name: str) -> Any:
        return self._modules[name]

    @property
    def _factors(self) -> Any:
        """Something by the names of the adapters that the layer has."""
        raise NotImplementedError

    def _dropout_module(self, name: str) -> Any:
        raise NotImplementedError

    def _tensors(self, name: str) -> list[Any]:
        """The tensors that the adapter's form is made of."""
        raise NotImplementedError

    def _why_left(self, name: str, plain: bool, alone: bool) -> str:
        """`why_left` for one adapter; plain: whether the base layer is; alone: whether x goes through no other one."""
        raise NotImplementedError

    def _form(self, name: str, weight: Tensor | None, bias: Tensor | None) -> AdapterForm:
        """The adapter's form on a base weight [out, in] and bias; without a weight on what the base layer gives."""
        raise NotImplementedError

    def _scales_base(self, name: str) -> bool:
        """Whether the adapter's form asks for the base layer's weight and bias, also on what that gives."""
        return False

    # A forward.

    @property
    def _names(self) -> list[str]:
        """The active adapters that the layer has."""
        has = self._factors
        return [name for name in self.active_adapters if name in has]

    def why_left(self) -> str:
        """Why a forward is PEFT's own, as things are; "" where it is ours."""
        return self._why_left_with(self._names) or ("" if self._names else "no adapter is active")

    def _why_left_with(self, names: Sequence[str]) -> str:
        """`why_left` with these adapters active."""
        if self.disable_adapters or self.merged_adapters:
            return "disabled" if self.disable_adapters else "merged"
        base: Any = self._modules["base_layer"]
        plain = is_plain(base, plain_forward(base))
        if not plain and is_hooked(base):
            return "the base layer has hooks"
        # In training without a graph too: a checkpoint runs it again with one, and by the same masks.
        if plain and (self.training or torch.is_grad_enabled()) and base._parameters["weight"].requires_grad:
            return "the base weight trains"
        if not getattr(self, "cast_input_dtype_enabled", True):
            return "PEFT's casting of inputs is off"
        drops = set()
        for name in names:
            dropout = self._dropout_module(name)
            p = _active(dropout)
            if p is None or (p and dropout.training != self.training):
                return "a dropout of another kind"
            drops.add(p)
            why = self._why_left(name, plain, len(names) == 1)
            if why:
                return why
        return "the dropouts of the active adapters differ" if len(drops) > 1 and plain else ""

    @property
    def way(self) -> str:
        """How a forward runs that is ours: "grouped", "fused" or "called"."""
        if not is_plain(self.base_layer, plain_forward(self.base_layer)) and not self._borrows(None):
            return "called"
        return "fused" if self.group is None else "grouped"

    def _fits(self, x: Any, names: Sequence[str]) -> bool:
        """Whether x is one that our operators take; PEFT's own forward takes others, or says why not."""
        if not isinstance(x, Tensor) or x.dim() == 0 or x.dtype not in FLOATING or x.is_nested:
            return False
        if not torch.compiler.is_compiling() and is_transformed():
            return False
        weight: Any = self.base_layer._parameters.get("weight")
        dtypes = {x.dtype} if weight is None or weight.dtype not in FLOATING else {x.dtype, weight.dtype}
        # Autocast takes both to its own dtype, but leaves float64 alone.
        if len(dtypes) > 1 and (autocast_dtype(x) is None or torch.float64 in dtypes):
            return False
        device = x.device
        tensors = [tensor for name in names for tensor in self._tensors(name) if tensor is not None]
        return (
            x.layout is torch.strided
            and x.shape[-1] == self.in_features
            and (weight is None or weight.device == device)
            and all([tensor.device == device and tensor.dtype in FLOATING for tensor in tensors])
        )

    def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        if self.mixed_batches and not args and kwargs.keys() == {"adapter_names"} and kwargs["adapter_names"]:
            return self._mixed(x, kwargs["adapter_names"])
        if args or kwargs or self.why_left() or not self._fits(x, self._names):
            return super().forward(x, *args, **kwargs)
        base: Any = self._modules["base_layer"]
        if not is_plain(base, plain_forward(base)) and not self._borrows(x):
            y = base(x)
            for name in self._names:
                y = self._on_output(base, name, x, y)
            return y
        found = None
        # What is compiled runs one by one, and x.grad_fn would break its graph.
        if self.group is not None and not torch.compiler.is_compiling() and not self._may_be_differentiated_alone(x):
            found = self.group.output(self, x)
        if found is not None:
            return found
        weight, form = self.operands(x.dtype)
        with made_again(weight):
            return adapter_linear(
                x,
                weight,
                form,
                dropout=self.dropout,
                training=self.training,
                backend=self.backend,
                strategy=self.strategy,
            )

    def _mixed(self, x: Any, adapter_names: Sequence[str]) -> Any:
        """Each row of x through the adapter that it names; "__base__", or one that the layer has not, for none.

        The base layer runs once on all rows; what an adapter adds, once for all of its rows.
        """
        if self.disable_adapters:
            return super().forward(x)
        has = self._factors
        given = [name if name in has else "" for name in adapter_names]
        sizes = sorted(Counter(given).items())
        names = [name for name, _ in sizes if name]
        why = next(filter(None, [self._why_left_with([name]) for name in names]), "")
        if why or not self._fits(x, names) or len(x) != len(given):
            return self._left_mixed(x, adapter_names, why)
        base: Any = self._modules["base_layer"]
        y = base(x)
        if not names:
            return y
        rows = sorted(range(len(given)), key=given.__getitem__)
        order = None if given == sorted(given) else torch.tensor(rows, device=x.device)
        if order is not None:
            x, y = x.index_select(0, order), y.index_select(0, order)
        counts = [count for _, count in sizes]
        parts = zip(sizes, x.split(counts), y.split(counts), strict=True)
        y = torch.cat([self._on_output(base, name, *part) if name else part[1] for (name, _), *part in parts])
        return y if order is None else y.index_select(0, order.argsort())

    def _on_output(self, base: Any, name: str, x: Tensor, y: Tensor) -> Tensor:
        """y = base(x) with what one adapter makes of it."""
        x_dropped = self._dropout_module(name)(x)
        plain = is_plain(base, plain_forward(base))
        if not plain and not self._scales_base(name):
            return adapter_update(y, x_dropped, self._form(name, None, None))
        bias = base._parameters["bias"]
        form = self._form(name, self.operand if plain else promised_weight(base), bias)
        y_dropped = base(x_dropped) if form.dropout_on_base and x_dropped is not x else None
        return adapter_update(y, x_dropped, form, base_bias=bias, y_dropped=y_dropped)

    def _left_mixed(self, x: Any, adapter_names: Sequence[str], why: str) -> Any:
        """A mixed batch that `_mixed` does not cover; why: a reason, "" where it is x."""
        return super().forward(x, adapter_names=adapter_names)

    def _may_be_differentiated_alone(self, x: Tensor) -> bool:
        """Whether each sibling may get a backward of its own, as in PEFT: a group has one graph, which serves once.

        An x with a graph of its own does not: that would serve once as well. Nor does what a reentrant checkpoint runs
        again: without a graph the siblings ran as a group, whose one mask the gradients need.
        """
        if x.grad_fn is not None or not torch.is_grad_enabled() or not (x.requires_grad or self._trains):
            return False
        return not isinstance(torch._C._current_autograd_node(), _REENTRANT)

    @property
    def _trains(self) -> bool:
        tensors = [self.base_layer.bias, *[tensor for name in self._names for tensor in self._tensors(name)]]
        return any([tensor is not None and tensor.requires_grad for tensor in tensors])

    # What a group asks of its members.

    @property
    def dropout(self) -> float:
        return _active(self._dropout_module(self._names[0])) or 0.0

    def kind(self) -> tuple[Any, ...] | None:
        base: Any = self._modules["base_layer"]
        plain = is_plain(base, plain_forward(base))
        if self.why_left() or not (plain or self._borrows(None)):
            return None
        kind = kind_of_weight(self.operand) if plain else kind_of_lent(base)
        # A member that does not train must not get a graph from one that does.
        return *kind, type(self), self.dropout, self.training, self._trains

    def makers(self) -> list[Any]:
        names = self._names
        tensors = [tensor for name in names for tensor in self._tensors(name)]
        own = self.base_layer._parameters
        return [
            self.training,
            tuple(names),
            *[self._scaling(name) for name in names],
            *makers((), own["weight"], own["bias"], *tensors),
        ]

    @property
    def operand(self) -> Tensor:
        """The base weight as a view [out, in]."""
        base: Any = self._modules["base_layer"]
        weight: Tensor = base._parameters["weight"]
        return weight if isinstance(base, nn.Linear) else weight.T

    def _borrows(self, x: Tensor | None) -> bool:
        """Whether a forward runs on the dequantised weight, which its base layer lends; x: what it is given."""
        return lends(self.base_layer, x) and len({_active(self._dropout_module(name)) for name in self._names}) == 1

    def operands(self, dtype: torch.dtype) -> tuple[Tensor, AdapterForm]:
        base: Any = self._modules["base_layer"]
        # A call that a layer with a weight of its own is spared, as in AdapterLinear.
        lent = type(base._parameters["weight"]) is not nn.Parameter and lends(base)
        weight, bias = lent_weight(base, dtype) if lent else self.operand, base._parameters["bias"]
        return weight, stacked([self._form(name, weight, bias) for name in self._names], bias)

    def _scaling(self, name: str) -> Any:
        return None


def _active(dropout: nn.Module) -> float | None:
    """The probability with which a module of PEFT's drops now; None where it is not known to."""
    if type(dropout) is nn.Identity:
        return 0.0
    if type(dropout) is not nn.Dropout or dropout.inplace or is_hooked(dropout):
        return None
    p = float(dropout.p) if dropout.training else 0.0
    return p if p < 1.0 else None


def is_transformed() -> bool:
    """Whether somebody traces, or differentiates by other means than a backward."""
    level: int = forward_ad._current_level
    return torch._C._are_functorch_transforms_active() or level >= 0 or torch._C._get_tracing_state() is not None


class LoraParts(Accelerated):
    """What a LoRA layer of PEFT's has, whatever its base layer is.

    PEFT's LoRA, rsLoRA and DoRA: s = scaling, β = b0 + s·b_B; with a magnitude g = m / ‖W0 + s·B·A‖, h = s·g.
    """

    # PEFT's.
    scaling: Any
    lora_variant: Any
    ephemeral_gpu_offload: bool

    @property
    def _factors(self) -> Any:
        return self._inside("lora_A")._modules

    def _dropout_module(self, name: str) -> Any:
        return self._inside("lora_dropout")._modules[name]

    def _part(self, part: str, name: str) -> Any:
        return self._inside(part)._modules.get(name)

    def _tensors(self, name: str) -> list[Any]:
        B, magnitude = self._part("lora_B", name), self._part("lora_magnitude_vector", name)
        return [
            self._part("lora_A", name).weight,
            *B._parameters.values(),
            None if magnitude is None else magnitude.weight,
        ]

    def _scaling(self, name: str) -> Any:
        return self.scaling[name]

    def _why_left(self, name: str, plain: bool, alone: bool) -> str:
        A, B = self._part("lora_A", name), self._part("lora_B", name)
        if not is_plain(A, _LINEAR) or not is_plain(B, _LINEAR) or A.bias is not None:
            return "lora_A or lora_B is more than a linear layer"
        if type(self.scaling[name]) not in (float, int):
            return "its scaling is a tensor"
        variant = self.lora_variant.get(name)
        if variant is None:
            return ""
        if type(variant) is not variants.DoraLinearVariant:
            return f"{type(variant).__name__} is a variant that PEFT alone has"
        if not plain and not is_quantized(self.base_layer):
            return "DoRA on a base layer that is more than its weight"
        if not alone:
            return "DoRA is active together with another adapter"
        magnitude, turned = self._part("lora_magnitude_vector", name), not isinstance(self.base_layer, nn.Linear)
        odd = B.bias is not None or magnitude.fan_in_fan_out != turned or self.ephemeral_gpu_offload
        return "DoRA of another kind" if odd or not is_plain(magnitude, _MAGNITUDE) else ""

    def _scales_base(self, name: str) -> bool:
        return name in self.lora_variant

    def _form(self, name: str, weight: Tensor | None, bias: Tensor | None) -> AdapterForm:
        B = self._part("lora_B", name)
        down, up, s = self._part("lora_A", name).weight, B.weight, self.scaling[name]
        if B.bias is not None:
            added = s * B.bias
            bias = added if bias is None else bias + added
        if weight is None or name not in self.lora_variant:
            return AdapterForm(down, up, None, s, None, bias)
        kept = Kept()
        # Compiled code keeps nothing, and must not depend on whether this layer has.
        if not torch.compiler.is_compiling():
            if self.writes_seen != _base_writes:
                self.norms.clear()
                self.writes_seen = _base_writes
            kept = self.norms.setdefault(name, kept)
        # PEFT's hot swap, and people's averages of weights, write factors through .data, in eval mode too.
        norm = row_norm(kept, weight, down, up, s, changing=True)
        g = self._part("lora_magnitude_vector", name).weight / norm
        return AdapterForm(down, up, out_scale=g, base_scale=g, bias=bias, dropout_on_base=True, scaling=s)


class AcceleratedLora(LoraParts, lora.Linear):
    """A LoRA layer of PEFT's on a layer in floating point, or on weights that are tensors of a kind of their own."""


class AcceleratedVera(Accelerated, vera.Linear):
    """PEFT's VeRA: d = λ_d, h = λ_b, on the projection that its layers share. y has x's dtype, under autocast too."""

    @property
    def _factors(self) -> Any:
        return self._inside("vera_lambda_d")._parameters

    def _dropout_module(self, name: str) -> Any:
        return self._inside("vera_dropout")._modules[name]

    def _tensors(self, name: str) -> list[Any]:
        lambdas = [self._inside(part)._parameters[name] for part in ("vera_lambda_d", "vera_lambda_b")]
        return [*lambdas, *[self._inside(part)._buffers[name] for part in ("vera_A", "vera_B")]]

    def _why_left(self, name: str, plain: bool, alone: bool) -> str:
        d, _, A, B = self._tensors(name)
        fits = d.shape == (A.shape[0],) == (B.shape[1],) and d.dtype == A.dtype == B.dtype
        return "" if fits else "its vectors do not go with the projection"

    def _form(self, name: str, weight: Tensor | None, bias: Tensor | None) -> AdapterForm:
        d, b, A, B = self._tensors(name)
        return AdapterForm(A[:, : self.in_features], B[: self.out_features], d, b, bias=bias)

    def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        y = super().forward(x, *args, **kwargs)
        return y.to(x.dtype)

    def _left_mixed(self, x: Any, adapter_names: Sequence[str], why: str) -> Any:
        if not why and isinstance(x, Tensor) and x.dim() and len(x) != len(adapter_names):
            why = f"there are {len(adapter_names)} names for the {len(x)} rows of x"
        raise ValueError(
            f"a mixed batch of VeRA adapters cannot run, and PEFT has none: {why or 'x is of another kind'}. Mend "
            "that, or run the rows of each adapter by themselves, after set_adapter"
        )


class MixedVeraModel(VeraModel):
    """PEFT's VeraModel that hands `adapter_names` to its layers, as PEFT's LoraModel does; PEFT's own drops them."""

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        names = kwargs.get("adapter_names")
        beams = kwargs.get("num_beams") or 1
        with ExitStack() as hooks:
            if names is not None:
                for module in self._called_with_names(names):
                    hooks.enter_context(module.register_forward_pre_hook(_Named(names, beams), with_kwargs=True))
            yield

    def _called_with_names(self, names: Sequence[str]) -> list[nn.Module]:
        """The layers that need the names. Raises ValueError where a batch cannot be mixed."""
        if self.training:
            raise ValueError("adapter_names are for inference, and the model is in training mode: call model.eval()")
        layers: list[Any] = [module for module in self.modules() if isinstance(module, BaseTunerLayer)]
        unable = next((layer for layer in layers if not isinstance(layer, AcceleratedVera)), None)
        if unable is not None:
            raise ValueError(
                f"adapter_names: a layer of the model, {type(unable).__name__}, is not accelerated and would leave "
                "them out: call accelerate_peft(model, mixed_batches=True) again, or run each adapter by itself"
            )
        missing = {*names} - {"__base__"}.union(*[layer._factors for layer in layers])
        if missing:
            raise ValueError(f"adapter_names must be adapters of the model or '__base__', got {sorted(missing)}")
        return [*layers, *[module for module in self.modules() if isinstance(module, AuxiliaryTrainingWrapper)]]


class _Named:
    """A hook that gives a layer the names of its rows' adapters; a beam search has each row `beams` times, but only
    once in an encoder."""

    def __init__(self, names: Sequence[str], beams: int) -> None:
        self.names, self.beams = names, beams

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        names = self.names
        if len(args[0]) == len(names) * self.beams:
            names = [name for name in names for _ in range(self.beams)]
        return args, {**kwargs, "adapter_names": names}


# Layers of just these classes: their subclasses have forwards of their own. peft_bitsandbytes.py adds its own.
ACCELERATED: dict[type[nn.Module], type[Accelerated]] = {lora.Linear: AcceleratedLora, vera.Linear: AcceleratedVera}
