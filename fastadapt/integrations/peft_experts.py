"""PEFT's LoRA on weights of experts with a forward of ours: the outermost of nested layers runs the whole block."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.lora import layer as lora
from torch import Tensor, nn

from ..checks import FLOATING
from ..forms import stacked_experts
from ..layers.experts import experts_output, projections, stacked_bias, stacked_weight, why_no_experts
from ..layers.ways import is_hooked
from ..reference import ExpertForm
from .peft_layers import ACCELERATED, LoraParts, is_transformed


class AcceleratedExperts(LoraParts, lora.ParamWrapper):
    """PEFT's LoRA on a weight of experts, which PEFT adds to all of them, s·B[e] A[e], in each forward.

    Here A[e] and B[e] go onto the rows of expert e alone, in one operator for both products, the gate and the routing.
    PEFT nests a layer for each weight: the outermost runs the block, with the factors of those inside of it.
    Shapes, PEFT's: lora_A [E·r, in], row e·r + k that of expert e; lora_B [out, r·E], column k·E + e. A is read where
    it lies. B is, too, by the few rows of a step of decoding; otherwise it is copied once, for its rows to be whole:
    E·r·out values in the place of PEFT's E·out·in.
    """

    parameter_name: str  # PEFT's

    @property
    def nested(self) -> list[Any]:
        """This layer and those inside of it, from the outermost on."""
        found: list[Any] = [self]
        while isinstance(inner := found[-1]._modules["base_layer"], lora.ParamWrapper):
            found.append(inner)
        return found

    @property
    def way(self) -> str:
        return "fused"

    def why_left(self) -> str:
        nested = self.nested
        experts = nested[-1]._modules["base_layer"]
        if why := why_no_experts(experts) or self._why_experts_left(experts):
            return why
        for layer in nested:
            if not isinstance(layer, AcceleratedExperts):
                return "a layer inside of it has a forward of its own"
            if layer is not self and is_hooked(layer):
                return "a layer inside of it has hooks"
            if why := layer._why_left_alone(experts):
                return str(why)
        return "" if any(layer._names for layer in nested) else "no adapter is active"

    def _why_experts_left(self, experts: Any) -> str:
        if is_hooked(experts):
            return "the experts have hooks"
        weights = [experts._parameters[name] for name in projections(experts)]
        if any([type(weight) is not nn.Parameter for weight in weights]):
            return "the experts' weights are tensors of a kind of their own"
        if len(weights[0]) == 1:
            return "there is one expert alone"
        # In training without a graph too: a checkpoint runs it again with one.
        if (self.training or torch.is_grad_enabled()) and any([weight.requires_grad for weight in weights]):
            return "the base weight trains"
        return ""

    def _why_left_alone(self, experts: Any) -> str:
        """`why_left`, by what this layer is itself."""
        if self.disable_adapters or self.merged_adapters:
            return "disabled" if self.disable_adapters else "merged"
        if self.parameter_name not in projections(experts):
            return f"{self.parameter_name} is no weight of the experts' products"
        # PEFT 0.19.0 has them so.
        if getattr(self, "_did_swap_in_out_features", False) == experts.is_transposed:
            return "A reads what the experts give, and not what they are given"
        return next(filter(None, [self._why_left(name, True, True) for name in self._names]), "")

    def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        nested = self.nested
        experts = nested[-1]._modules["base_layer"]
        given = None if self.why_left() else _given(experts, (x, *args), kwargs)
        if given is None or not _fits(x, nested):
            return lora.ParamWrapper.forward(self, x, *args, **kwargs)
        layers = {layer.parameter_name: layer for layer in nested}
        # Fewer rows than experts: each takes a copy of its own expert's B, sooner than there is one of all. What is
        # compiled is not to depend on how many they are.
        few = not torch.compiler.is_compiling() and given[1].numel() < self.num_experts

        def form_of(name: str) -> ExpertForm | None:
            return layers[name].expert_form(experts, few) if name in layers else None

        return experts_output(experts, given, form_of)

    def expert_form(self, experts: Any, few: bool) -> ExpertForm | None:
        """The form of the active adapters on this layer's weight, None where none is."""
        bias = stacked_bias(experts, self.parameter_name)
        count = len(stacked_weight(experts, self.parameter_name))
        forms = []
        for name in self._names:
            A, up = self._part("lora_A", name).weight, self._part("lora_B", name).weight.T
            B = up if few else up.contiguous()
            B = B.unflatten(0, (-1, count)).transpose(0, 1)
            forms.append(ExpertForm(A.unflatten(0, (count, -1)), B, bias=bias, scaling=self.scaling[name]))
        return stacked_experts(forms, bias) if forms else None


def _fits(x: Any, nested: Sequence[Any]) -> bool:
    """Whether x, and the factors of the active adapters, are such as our operator takes."""
    if not isinstance(x, Tensor) or x.dim() != 2 or x.is_nested or x.layout is not torch.strided:
        return False
    if not torch.compiler.is_compiling() and is_transformed():
        return False
    factors = [tensor for layer in nested for name in layer._names for tensor in layer._tensors(name)]
    tensors = [x, nested[0].get_param(), *[tensor for tensor in factors if tensor is not None]]
    return all([tensor.device == x.device and tensor.dtype in FLOATING for tensor in tensors])


def _given(experts: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...] | None:
    """The arguments of the experts' own forward in its order, None where they are others."""
    if not kwargs and len(args) == 3:
        return args
    try:
        found: tuple[Any, ...] = inspect.signature(type(experts).forward).bind(experts, *args, **kwargs).args[1:]
    except TypeError:
        return None
    return found if len(found) == 3 else None


# PEFT knows its own class by this name where another adapter is added. Pickles go by the qualified one.
AcceleratedExperts.__name__ = lora.ParamWrapper.__name__
ACCELERATED[lora.ParamWrapper] = AcceleratedExperts
