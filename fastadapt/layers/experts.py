"""Experts of transformers, whose weights are stacked in one parameter a product, with adapters."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import FLOATING
from ..forms import merged_weight, stacked_experts
from ..operators.expert_linear.block import ExpertProjection, expert_block
from ..reference import ExpertForm
from .layer import Adapter, AdapterLayer
from .ways import agree, is_hooked, sample

# What transformers' decorator of experts says of a module, by the names of attributes.
_TRAITS = ("has_gate", "has_bias", "is_transposed", "has_post_expert_norm", "_is_expert_parallel")


def is_experts(module: nn.Module) -> bool:
    """Whether a module's forward is that of transformers' decorator of experts, whatever its class computes in it."""
    forward = type(module).forward
    return "experts_interface" in getattr(getattr(forward, "__code__", None), "co_freevars", ())


def why_no_experts(module: nn.Module) -> str:
    """Why AdapterExperts cannot go over a module with stacked weights, "" where it can."""
    name = type(module).__name__
    if not is_experts(module):
        return f"{name} has a forward of its own, and is none of the experts that transformers decorates"
    if missing := [trait for trait in _TRAITS if trait not in module.__dict__]:
        return f"{name} does not say {', '.join(missing)}"
    if getattr(module, "_is_expert_parallel", False):
        return "its experts are shared out among processes"
    if getattr(module, "has_post_expert_norm", False):
        return f"{name} norms what each expert gives"
    names = projections(module)
    weights = [module._parameters.get(n) for n in names]
    if any(not isinstance(weight, nn.Parameter) or weight.dim() != 3 for weight in weights):
        return f"{name} has no {' and '.join(names)} of three dimensions"
    return _why_not_in_floating_point(names, weights)


def _why_not_in_floating_point(names: Sequence[str], weights: Sequence[Any]) -> str:
    """Why products with weights of experts cannot be ours: they are quantised, or of two dtypes."""
    for name, weight in zip(names, weights, strict=True):
        if weight.dtype not in FLOATING or type(weight).dequantize is not Tensor.dequantize:
            return f"its {name} is quantised ({type(weight).__name__}, {weight.dtype})"
    first, second = (weight.dtype for weight in weights)
    return "" if first == second else f"its {names[0]} is {first} and its {names[1]} is {second}"


def why_not_run(module: Any) -> str:
    """Why experts cannot run as one operator as they are now, "" where they can."""
    if not module._parameters.keys() >= {*projections(module)}:
        return "its weights are parametrized"
    if module._is_expert_parallel:
        return "its experts are shared out among processes"
    return "it has hooks" if is_hooked(module) else ""


def projections(module: Any) -> tuple[str, str]:
    """The names of the weights of the two products of experts, in the order in which they run."""
    return "gate_up_proj" if module.has_gate else "up_proj", "down_proj"


def stacked_weight(module: Any, name: str) -> Tensor:
    """A weight of experts as a view [E, out, in]."""
    stored: Tensor = module._parameters[name]
    return stored.mT if module.is_transposed else stored


def stacked_bias(module: Any, name: str) -> Tensor | None:
    """The bias [E, out] that goes with a weight of experts, None where they have none."""
    found: Tensor | None = module._parameters[f"{name}_bias"] if module.has_bias else None
    return found


def gate_of(module: Any) -> Callable[[Tensor], Tensor]:
    """What experts do between their two products."""
    gate: Callable[[Tensor], Tensor] = module._apply_gate if module.has_gate else module.act_fn
    return gate


def experts_output(
    module: Any,
    args: Sequence[Any],
    form_of: Callable[[str], ExpertForm | None],
    *,
    dropout: float = 0.0,
    training: bool = False,
    backend: str = "auto",
) -> Tensor:
    """What experts give for args, (x, the experts of each token, their weights), with a form on each of their products.

    form_of: the form by the name of the product, bias included; None for the frozen product alone.
    """
    x, experts, routing = args
    sides = []
    for name in projections(module):
        form = form_of(name)
        bias = stacked_bias(module, name) if form is None else None
        sides.append(ExpertProjection(stacked_weight(module, name), form, bias, dropout))
    up, down = sides
    return expert_block(x, experts, routing, up, gate_of(module), down, training=training, backend=backend)


class ExpertsAdapter(Adapter):
    """One adapter of experts: an adapter for each of their weights that it adapts, by the weight's name.

    A part is an Adapter that has `expert_form` in the place of `form`. In a file the part of the weight that PEFT wraps
    last has the module's own path, and the other one is inside of it.
    """

    def __init__(self, parts: Mapping[str, Adapter], dropout: float) -> None:
        super().__init__(dropout)
        self.parts = nn.ModuleDict(dict(parts))

    def part(self, name: str) -> Any:
        """The adapter of the weight of that name."""
        return self.parts[name]

    @property
    def prefixes(self) -> dict[str, str]:
        """What PEFT's names of a part's tensors begin with: wrappers nest in the order of the module's parameters, the
        last of them outermost."""
        return {name: "base_layer." * depth for depth, name in enumerate(reversed(list(self.parts)))}

    def checkpoint_tensors(self) -> dict[str, Tensor]:
        """By PEFT's names."""
        return {
            prefix + suffix: tensor
            for name, prefix in self.prefixes.items()
            for suffix, tensor in self.part(name).checkpoint_tensors().items()
        }

    def forget(self) -> None:
        super().forget()
        for part in self.parts.values():
            part.forget()  # type: ignore[operator]


class AdapterExperts(AdapterLayer):
    """Adapters over experts whose weights are stacked: both products, the gate and the routing in one operator.

    parameter_names: of the weights that adapters can be on, in the order in which they run.
    Raises ValueError for a module that it cannot go over, with the reason.
    """

    def __init__(self, base_layer: nn.Module, backend: str = "auto", strategy: str = "auto") -> None:
        if why := why_no_experts(base_layer):
            raise ValueError(f"{why}, which no adapter goes over")
        super().__init__(base_layer, backend, strategy)
        self.parameter_names = projections(base_layer)
        self._signature = inspect.signature(type(base_layer).forward)

    def stored(self, name: str) -> nn.Parameter:
        found: nn.Parameter = self.base_layer._parameters[name]
        return found

    def weight(self, name: str) -> Tensor:
        """A weight of the experts as a view [E, out, in]."""
        return stacked_weight(self.base_layer, name)

    def bias(self, name: str) -> Tensor | None:
        """The bias [E, out] that goes with a weight."""
        return stacked_bias(self.base_layer, name)

    @property
    def like(self) -> Tensor:
        return self.stored(self.parameter_names[-1])

    @property
    def weight_matrix(self) -> Tensor:
        raise ValueError(f"{self.name} has a weight for each expert, and no one matrix")

    @property
    def base_bias(self) -> None:
        return None

    @property
    def reason(self) -> str:
        return ""

    def settled_form(self, adapter: Adapter) -> Any:
        raise ValueError(
            f"{self.name} has a form for each expert, and not one that could be combined or exported with others: name "
            "it in exclude_modules, or merge the adapters one after the other"
        )

    def expert_form(self, name: str) -> ExpertForm | None:
        """The form that the active adapters have on a weight, None where none of them is on it."""
        adapters: list[Any] = self.active_adapters
        parts = [adapter.part(name) for adapter in adapters if name in adapter.parts]
        if not parts:
            return None
        weight, bias = self.weight(name), self.bias(name)
        return stacked_experts([part.expert_form(weight, bias) for part in parts], bias)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        base = self.base_layer
        if self._unmerged is not None or not self.active:
            return base(*args, **kwargs)
        if why := why_not_run(base):
            raise ValueError(f"{self.name} cannot run with an adapter: {why}; name it in exclude_modules, or merge")
        if torch.is_grad_enabled() and any([self.stored(name).requires_grad for name in self.parameter_names]):
            raise ValueError(
                f"{self.name}: its own weights must be frozen, and require grad: set requires_grad to False"
            )
        given = self.given(args, kwargs)
        return experts_output(
            base, given, self.expert_form, dropout=self.dropout, training=self.training, backend=self.backend
        )

    def given(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        """The arguments of a call in their order: x, the experts of each token, their weights."""
        return self._signature.bind(self.base_layer, *args, **kwargs).args[1:] if kwargs else args

    def merge(self, *, dequantize: bool = False, requantize: bool = False) -> float:
        """Writes the active adapters into the weights of the experts: W'[e] = diag(g) W0[e] + diag(h) B diag(d) A.

        Returns 0: no weight is rounded to fewer bits. Raises ValueError where a merged weight would not be finite; the
        layer is then as it was.
        """
        if self.merged or not self.active:
            return 0.0
        modes = [adapter.training for adapter in self.active_adapters]
        new: dict[str, nn.Parameter] = {}
        try:
            for adapter in self.active_adapters:
                adapter.eval()
            with torch.no_grad():
                for name in self.parameter_names:
                    if (form := self.expert_form(name)) is not None:
                        new |= self._merged(name, form)
        finally:
            for adapter, mode in zip(self.active_adapters, modes, strict=True):
                adapter.train(mode)
        self._kept = {name: self.stored(name) for name in new}
        self.base_layer._parameters.update(new)
        self._unmerged = self.base_layer, None, None
        return 0.0

    def _merged(self, name: str, form: ExpertForm) -> dict[str, nn.Parameter]:
        weight = self.weight(name)
        stored = torch.empty_like(self.stored(name))
        view = stored.mT if self.base_layer.is_transposed else stored
        for e, matrix in enumerate(weight):
            view[e] = merged_weight(matrix, form.of(e, matrix))
        tensors = {name: stored}
        if form.bias is not None and form.bias is not self.bias(name):
            tensors[f"{name}_bias"] = form.bias.to(weight.dtype).clone()
        if not all([torch.isfinite(tensor).all() for tensor in tensors.values()]):
            names = ", ".join(map(repr, self.active))
            raise ValueError(f"adapter {names} cannot be merged: the merged weight has NaN or infinite values")
        return {key: nn.Parameter(tensor, requires_grad=False) for key, tensor in tensors.items()}

    @property
    def has_new_bias(self) -> bool:
        return False

    def unmerge(self) -> None:
        """Puts back what `merge` set aside, bit for bit."""
        if self._unmerged is None:
            return
        for name, parameter in self._kept.items():
            now = self.stored(name)  # the model may have been moved meanwhile
            parameter.data = parameter.data.to(now.device, now.dtype)
            self.base_layer._parameters[name] = parameter
        self._unmerged = None


def without_memory(layer: AdapterExperts) -> AdapterExperts:
    """A layer of the same sizes that stands for this one while its adapter is built."""
    base = copy(layer.base_layer)
    base._parameters = {
        name: None if p is None else nn.Parameter(p.detach().to("meta"), requires_grad=False)
        for name, p in base._parameters.items()
    }
    return AdapterExperts(base)


def routers_of(modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """The routers of experts, by path: modules beside those with a weight [out, in] of their own, and nothing inside.

    modules: the model's by path, as they were before any of them was wrapped.
    """
    blocks = {path.rpartition(".")[0] for path, module in modules.items() if is_experts(module)}

    def routes(module: nn.Module) -> bool:
        weight = module._parameters.get("weight")
        own = isinstance(weight, nn.Parameter) and weight.dim() == 2 and not module._modules
        return own and not isinstance(module, (nn.Linear, nn.Embedding))

    return {path: module for path, module in modules.items() if path.rpartition(".")[0] in blocks and routes(module)}


def why_patched(router: nn.Module) -> str:
    """Why the forward of its class is not all that a router does beside its hooks, "" where it is."""
    return "its forward is patched on the instance" if "forward" in router.__dict__ else ""


def why_not_by_token(router: nn.Module) -> str:
    """Why the tokens that a router is given cannot come from several batches, "" where it treats each by itself."""
    weight: Any = router._parameters["weight"]
    if why := why_patched(router):
        return why
    x = sample(6, weight.shape[1], like=weight, seed=0)
    try:
        with torch.no_grad():
            whole, *parts = (tensors_of(type(router).forward(router, rows)) for rows in (x, x[:2], x[2:]))
    except Exception as error:  # a forward of any kind, which may want more, and say so in any way
        return f"its forward does not run on tokens alone ({type(error).__name__}: {error})"
    for tensor, *others in zip(whole, *parts, strict=True):
        together = torch.cat(others)
        same = agree(tensor, together) if tensor.is_floating_point() else torch.equal(tensor, together)
        if len(tensor) != len(x) or not same:
            return "what it gives for a token depends on others"
    return ""


def tensors_of(given: Any) -> tuple[Tensor, ...]:
    """What a module gives, one tensor or several."""
    return given if isinstance(given, tuple) else (given,)


# Where a model's config says how many experts the router gives each token to.
_ACTIVE = ("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts")


def experts_per_token(module: Any) -> int:
    """How many experts the router gives each token to. Raises ValueError where their config does not say it."""
    for name in _ACTIVE:
        found = getattr(getattr(module, "config", None), name, None)
        if type(found) is int and found > 0:
            return found
    raise ValueError(
        f"{type(module).__name__}'s config does not say how many experts a token goes to (one number by the name of "
        f"{' or '.join(_ACTIVE)}): leave share_rank out, and give the ranks in rank_pattern"
    )


def parameter_keys(path: str, module: nn.Module) -> Sequence[str]:
    """The names, behind the module's path, of its parameters of two or three dimensions: an adapter can be on them."""
    return [f"{path}.{n}" for n, p in module._parameters.items() if p is not None and p.dim() in (2, 3)]
