"""AdaLoRA: y = W0 x + b0 + c·P (E ⊙ (Q x̃)), and the budget of triplets that moves between layers as they train."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..checks import check_in_one_piece, check_probability
from ..layers.kinds import AdapterConv2d
from ..layers.layer import Adapter, AdapterLayer
from ..layers.linear import AdapterLinear
from ..operators.calls import without_autocast
from ..reference import AdapterForm
from .config import AdapterConfig, Control
from .lora import LoRAConfig

# Of a state: each holds a tensor for every parameter.
_AVERAGES = ("sensitivity", "uncertainty")


class AdaLoRAAdapter(Adapter):
    """P = lora_B, E = lora_E and Q = lora_A of one layer: d = E, h = c = lora_alpha / (init_r + 1e-5).

    Triplet k is column k of P, E_k and row k of Q. `kept` says which of them a checkpoint holds, None all; c is that of
    init_r however many they are.
    Shapes: lora_A [r, in], lora_E [r, 1], lora_B [out, r], kept [r], bias [out]; for a Conv2d in is in·kh·kw; r may
    be 0.
    """

    suffixes: ClassVar[Mapping[str, str]] = {
        **{name: name for name in ("lora_A", "lora_E", "lora_B")},
        "bias": "base_layer.bias",
    }

    lora_A: nn.Parameter
    lora_E: nn.Parameter
    lora_B: nn.Parameter
    kept: Tensor | None

    def __init__(self, layer: AdapterLayer, config: AdaLoRAConfig, r: int, dtype: torch.dtype) -> None:
        super().__init__(config.lora_dropout)
        weight = layer.weight_matrix
        n, k = weight.shape
        add = partial(self.add_tensor, like=weight, dtype=dtype)
        std = 0.02 if config.init_lora_weights else 1.0
        add("lora_A", std * torch.randn(r, k))
        add("lora_E", torch.zeros(r, 1) if config.init_lora_weights else torch.randn(r, 1))
        add("lora_B", std * torch.randn(n, r))
        alpha = config.lora_alpha if config.lora_alpha > 0 else config.init_r
        self.scaling = alpha / (config.init_r + 1e-5)
        self.register_buffer("kept", None, persistent=False)
        if config.bias == "lora_only" and layer.base_bias is not None:
            add("bias", layer.base_bias)

    @property
    def r(self) -> int:
        """How many triplets there are, pruned ones that may come back included."""
        return self.lora_E.shape[0]

    def checkpoint_tensors(self) -> dict[str, Tensor]:
        tensors = super().checkpoint_tensors()
        if self.kept is not None:
            tensors |= {name: tensors[name][self.kept] for name in ("lora_A", "lora_E")}
            tensors["lora_B"] = tensors["lora_B"][:, self.kept]
        return tensors

    def form(self, weight: Tensor, bias: Tensor | None) -> AdapterForm:
        if self.bias is not None:
            bias = self.bias
        return AdapterForm(self.lora_A, self.lora_B, self.lora_E.view(-1), out_scale=self.scaling, bias=bias)

    def extra_repr(self) -> str:
        return f"r={self.r}, scaling={self.scaling:g}, dropout={self.dropout:g}"


def _pattern_key(path: str) -> str:
    return f"{path}.lora_E"


@dataclass
class AdaLoRAConfig(AdapterConfig):
    """AdaLoRA: y = W0 x + b0 + c·P (E ⊙ (Q x̃)), c = lora_alpha / (init_r + 1e-5). Trains P, E and Q; while it trains,
    the least important triplets of the whole model are pruned down to a budget. Fields and defaults are PEFT's.

    init_r: triplets that each layer starts with. target_r: those that a layer keeps on average (section 3.3).
    tinit, tfinal: steps before the budget begins to fall, and at the end with the triplets settled. deltaT: steps from
        one allocation to the next. total_step: optimizer steps of the whole training, required (all section 3.3).
    beta1, beta2: how much the averages of sensitivity and of uncertainty remember (section 3.2).
    orth_reg_weight: γ of the loss that keeps P and Q near orthogonal (section 3.1).
    rank_pattern: which of a layer's init_r triplets are kept, by "<module path>.lora_E": what the training found, with
        the name that LoRA has for ranks. A config that has it builds layers of just those triplets, with c of init_r.
    lora_alpha: 0 or less stands for init_r, that is c ≈ 1. lora_dropout: drop probability of x̃, in [0, 1).
    init_lora_weights: True (E zero, P and Q normal(0, 0.02²)), or False (all three normal(0, 1)).
    r has no meaning here, nor in PEFT, which also ignores use_rslora, alpha_pattern and lora_bias: what loads such a
    file names them in a warning.
    Training needs `inject.control`: see BudgetAllocator. Linear, Conv1D and Conv2d layers.
    Raises ValueError for a value outside its range, by name.
    Source: Zhang et al. 2023, arXiv:2303.10512, sections 3.1 to 3.3.
    """

    peft_type: ClassVar[str] = "ADALORA"
    in_peft: ClassVar[bool] = True
    title: ClassVar[str] = "AdaLoRA"
    rows: ClassVar[tuple[str, ...]] = (
        "AdaLoRA ([2303.10512](https://arxiv.org/abs/2303.10512)) | "
        "`AdaLoRAConfig(init_r, target_r, total_step)`"
        " | 1 | E | α/r₀ | b0 | P, E, Q; triplets are pruned",
    )
    adapter_classes: ClassVar[tuple[type[Adapter], ...]] = (AdaLoRAAdapter,)
    layer_kinds: ClassVar[tuple[type[AdapterLayer], ...]] = (AdapterLinear, AdapterConv2d)
    bias_choices: ClassVar[tuple[str, ...]] = ("none", "lora_only")
    neutral_fields: ClassVar[dict[str, tuple[Any, ...]]] = {**LoRAConfig.neutral_fields, "use_dora": (None, False)}

    target_r: int = 8
    init_r: int = 12
    tinit: int = 0
    tfinal: int = 0
    deltaT: int = 1
    beta1: float = 0.85
    beta2: float = 0.85
    orth_reg_weight: float = 0.5
    total_step: int | None = None
    rank_pattern: dict[str, list[bool]] | None = None
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    init_lora_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_probability("lora_dropout", self.lora_dropout)
        if self.total_step is None or self.total_step <= 0:
            raise ValueError(
                f"total_step must be a positive integer, got {self.total_step!r}: the number of optimizer steps of the "
                "training, which the budget is planned by"
            )
        for name, least in (("init_r", 1), ("deltaT", 1), ("tinit", 0), ("tfinal", 0), ("orth_reg_weight", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)!r}")
        if not 0 <= self.target_r <= self.init_r:
            raise ValueError(f"target_r must be from 0 to init_r, which is {self.init_r}, got {self.target_r!r}")
        for name in ("beta1", "beta2"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name} must be in (0, 1), got {getattr(self, name)!r}")
        if self.tinit >= self.settled_step:
            raise ValueError(
                f"tinit must be less than total_step - tfinal, which is {self.settled_step}, got {self.tinit}: between "
                "them the budget falls; take a smaller tinit or tfinal, or more steps"
            )
        for key, kept in (self.rank_pattern or {}).items():
            if not key.endswith(_pattern_key("")):
                raise ValueError(f"rank_pattern has a key {key!r}: each must be a module path followed by .lora_E")
            if len(kept) != self.init_r:
                raise ValueError(
                    f"rank_pattern[{key!r}] must say of each of init_r = {self.init_r} triplets whether it is kept, "
                    f"got {len(kept)} values"
                )

    @property
    def settled_step(self) -> int:
        """T − t_f: the step of the last allocation."""
        return (self.total_step or 0) - self.tfinal

    @property
    def dropout(self) -> float:
        return self.lora_dropout

    @classmethod
    def from_peft(cls, fields: dict[str, Any]) -> AdaLoRAConfig:
        # PEFT takes any init that is true for True, and a pattern without entries for none.
        init = bool(fields.get("init_lora_weights", True))
        pattern = fields.get("rank_pattern") or None
        return super().from_peft({**fields, "init_lora_weights": init, "rank_pattern": pattern})

    def to_peft(self, paths: list[str]) -> dict[str, Any]:
        fields = super().to_peft(paths)
        if self.lora_alpha <= 0:  # PEFT would take the triplets that are left for init_r when it loads the file
            fields["lora_alpha"] = self.init_r
        return fields

    def rank(self, path: str) -> int:
        kept = (self.rank_pattern or {}).get(_pattern_key(path))
        return self.init_r if kept is None else sum(kept)

    def build(self, layers: dict[str, AdapterLayer], dtype_of: Callable[[Tensor], torch.dtype]) -> dict[str, Adapter]:
        keys = {_pattern_key(path) for path in layers}
        for key in self.rank_pattern or {}:
            if key not in keys:
                raise ValueError(
                    f"rank_pattern: {key!r} is of no layer that target_modules selects: is this config for another "
                    "model?"
                )
        return {
            path: AdaLoRAAdapter(layer, self, self.rank(path), dtype_of(layer.like)) for path, layer in layers.items()
        }

    def control(self, layers: dict[str, AdapterLayer], adapters: dict[str, Adapter]) -> Control:
        """The adapter's BudgetAllocator; only Orthogonality where it was built with pruned triplets left out."""
        own = {path: adapter for path, adapter in adapters.items() if isinstance(adapter, AdaLoRAAdapter)}
        if any(adapter.r != self.init_r for adapter in own.values()):
            return Orthogonality(self, own)
        allocator = BudgetAllocator(self, own)
        if self.rank_pattern is not None:  # an allocation is over, or is to be taken up with load_state_dict
            allocator.t = self.settled_step
        return allocator


class Orthogonality(Control):
    """What keeps P and Q near orthogonal, so that E can stand for singular values.

        R = orth_reg_weight · mean of ‖PᵀP − I‖_F and ‖QQᵀ − I‖_F over the layers

    The norms are not squared and their mean is taken, as by the authors' code and PEFT; the paper adds up squares.
    It is all that an adapter needs that was built from a rank_pattern: its triplets have been allocated, and further
    training keeps them.
    Source: Zhang et al. 2023, arXiv:2303.10512, section 3.1.
    """

    def __init__(self, config: AdaLoRAConfig, adapters: dict[str, AdaLoRAAdapter]) -> None:
        self.config = config
        self.adapters = adapters

    def check_whole(self) -> None:
        """Raises ValueError for triplets in pieces."""
        for path, adapter in self.adapters.items():
            check_in_one_piece(f"{path}.lora_E", adapter.lora_E, "AdaLoRA compares triplets of the whole model")

    def regularizer(self) -> Tensor | float:
        self.check_whole()
        if self.config.orth_reg_weight == 0:
            return 0.0
        adapters = self.adapters.values()
        # Without triplets a norm is 0.
        rows = [side for adapter in adapters if adapter.r for side in (adapter.lora_A, adapter.lora_B.T)]
        if not rows:
            return 0.0
        home = rows[0].device
        # In 16 bits, as autocast would have the products, QQᵀ − I is mostly rounding.
        with without_autocast(rows[0]):
            grams = [side @ side.T for side in rows]
            identities = [torch.eye(len(gram), dtype=gram.dtype, device=gram.device) for gram in grams]
            norms = torch._foreach_norm(torch._foreach_sub(grams, identities))
            total = torch.stack([norm.to(home) for norm in norms]).sum()
            return total * (self.config.orth_reg_weight / (2 * len(adapters)))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state:
            raise ValueError(
                "state is of an allocation that goes on, but this adapter was built with pruned triplets left out: "
                "inject it with the config that the training began with, without rank_pattern"
            )


class BudgetAllocator(Orthogonality):
    """Prunes the least important triplets of the model down to a budget that falls over the training.

    After step t, for every element w of P, E and Q with gradient ∇w, until the triplets settle at T − t_f,

        I = |w·∇w|,  Ī ← β1·Ī + (1 − β1)·I,  Ū ← β2·Ū + (1 − β2)·|I − Ī|,  s = Ī·Ū

    and triplet k counts S_k = s(E_k) + mean_j s(Q_kj) + mean_j s(P_jk). Every deltaT steps while the budget falls, and
    at T − t_f, E is set to zero for the b0 − b(t) triplets of the smallest S. P, Q and the optimizer's moments stay, so
    a triplet may come back until then; from then on the same ones are set to zero after each step. The config's
    rank_pattern and the adapters' `kept` say what was kept last; a file that is saved between two allocations leaves
    out what has begun to come back.

    Where PEFT differs: it prunes every triplet that ties with the last one, this exactly b0 − b(t), the first in the
    order of layers and triplets; and it fails where b0 = b(t) (target_r = init_r), where this prunes none.
    Memory: Ī and Ū, like the parameters, until the triplets settle.
    Raises ValueError where total_step − tfinal leaves no step to measure importance in.
    Source: Zhang et al. 2023, arXiv:2303.10512, sections 3.2 and 3.3, algorithm 1.
    """

    def __init__(self, config: AdaLoRAConfig, adapters: dict[str, AdaLoRAAdapter]) -> None:
        super().__init__(config, adapters)
        if config.settled_step < 2:
            raise ValueError(
                f"total_step - tfinal must be at least 2 to train, got {config.settled_step}: importance is measured "
                "in the steps before"
            )
        self.t = 0
        self.initial_budget = sum(adapter.r for adapter in adapters.values())
        self.target_budget = config.target_r * len(adapters)
        self._sensitivity: dict[str, Tensor] = {}
        self._uncertainty: dict[str, Tensor] = {}

    def budget(self, t: int) -> int:
        """How many triplets the model may have after step t.

            b(t) = ⌊b_T + (b0 − b_T)(1 − (t − t_i)/(T − t_i − t_f))³⌋ for t_i < t ≤ T − t_f

        before that b0, the sum of init_r over the layers, and afterwards b_T, that of target_r. The paper prints
        t − t_i − t_f in the numerator, which is more than b0 at t_i; its code computes this.
        """
        config = self.config
        if t <= config.tinit:
            return self.initial_budget
        if t > config.settled_step:
            return self.target_budget
        rest = 1 - (t - config.tinit) / (config.settled_step - config.tinit)
        return int((self.initial_budget - self.target_budget) * rest**3 + self.target_budget)

    @torch.no_grad()
    def step(self) -> None:
        """Call once after each optimizer step that was made, not after one that a GradScaler skipped.

        A layer that the step did not use, which has no gradients, counts as one with gradients of zero. Raises
        ValueError where no layer has any; nothing has changed then.
        """
        self.check_whole()
        config, t = self.config, self.t + 1
        settled = t >= config.settled_step
        if not settled:
            self._update_importance()
        allocates = t == config.settled_step or (config.tinit < t and not settled and t % config.deltaT == 0)
        if allocates:
            self._allocate(self.budget(t))
        if allocates or settled:
            for adapter in self.adapters.values():
                if adapter.kept is not None:
                    adapter.lora_E.masked_fill_(~adapter.kept[:, None], 0)
        if settled:
            self._sensitivity, self._uncertainty = {}, {}
        self.t = t

    def _weights(self) -> dict[str, Tensor]:
        return {
            f"{path}.{name}": getattr(adapter, name)
            for path, adapter in self.adapters.items()
            for name in ("lora_A", "lora_E", "lora_B")
        }

    def _update_importance(self) -> None:
        weights = self._weights()
        if weights and all(weight.grad is None for weight in weights.values()):
            raise ValueError(
                f"{next(iter(weights))} must have its gradient when step is called, or one of the others must, got "
                "None: call it after optimizer.step() and before optimizer.zero_grad()"
            )
        # Of a layer that the batch did not go through a step has no gradient: as if it were zero.
        gradients = [torch.zeros_like(weight) if weight.grad is None else weight.grad for weight in weights.values()]
        if not self._sensitivity:
            self._sensitivity = {name: torch.zeros_like(weight) for name, weight in weights.items()}
            self._uncertainty = {name: torch.zeros_like(weight) for name, weight in weights.items()}
        sensitivity, uncertainty = list(self._sensitivity.values()), list(self._uncertainty.values())
        importance = torch._foreach_mul(list(weights.values()), gradients)
        torch._foreach_abs_(importance)
        torch._foreach_lerp_(sensitivity, importance, 1 - self.config.beta1)
        torch._foreach_sub_(importance, sensitivity)
        torch._foreach_abs_(importance)
        torch._foreach_lerp_(uncertainty, importance, 1 - self.config.beta2)

    def _scores(self) -> Tensor:
        """S of all triplets, [b0], in the order of the layers."""
        elements = torch._foreach_mul(list(self._sensitivity.values()), list(self._uncertainty.values()))
        home = elements[0].device
        sides = zip(elements[::3], elements[1::3], elements[2::3], strict=True)
        return torch.cat([(E.view(-1) + A.mean(1) + B.mean(0)).to(home) for A, E, B in sides])

    def _allocate(self, budget: int) -> None:
        ascending = self._scores().sort(stable=True).indices
        flags = torch.ones(self.initial_budget, dtype=torch.bool, device=ascending.device)
        flags[ascending[: self.initial_budget - budget]] = False
        kept = iter(flags.tolist())
        pattern = {}
        for path, adapter in self.adapters.items():
            pattern[_pattern_key(path)] = [next(kept) for _ in range(adapter.r)]
        self._keep(pattern)

    def _keep(self, pattern: dict[str, list[bool]] | None) -> None:
        for path, adapter in self.adapters.items():
            kept = None if pattern is None else torch.tensor(pattern[_pattern_key(path)], dtype=torch.bool)
            adapter.kept = kept if kept is None else kept.to(adapter.lora_E.device)
        self.config.rank_pattern = pattern

    def state_dict(self) -> dict[str, Any]:
        """t, rank_pattern, and Ī and Ū by parameter. The tensors are the allocator's own, as an optimizer's are."""
        return {
            "t": self.t,
            "rank_pattern": self.config.rank_pattern,
            "sensitivity": self._sensitivity,
            "uncertainty": self._uncertainty,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a copy of that state; the config and the adapters get its rank_pattern.

        The adapters have all init_r triplets and their own tensors are no part of it: load them too.
        Raises ValueError for a state of other layers, by name; nothing has changed then.
        """
        if missing := {"t", "rank_pattern", *_AVERAGES} - state.keys():
            raise ValueError(f"state must be what BudgetAllocator.state_dict gave, got one without {sorted(missing)}")
        weights, pattern = self._weights(), state["rank_pattern"]
        for name in _AVERAGES:
            if state[name]:
                _check_alike(name, {key: tuple(weight.shape) for key, weight in weights.items()}, state[name])
        if pattern is not None:
            _check_alike("rank_pattern", {_pattern_key(path): (a.r,) for path, a in self.adapters.items()}, pattern)
        self._sensitivity, self._uncertainty = (
            {key: state[name][key].to(weight, copy=True) for key, weight in weights.items() if state[name]}
            for name in _AVERAGES
        )
        self._keep(pattern)
        self.t = state["t"]


def _check_alike(name: str, shapes: dict[str, tuple[int, ...]], saved: dict[str, Any]) -> None:
    """Raises ValueError unless `saved` has values of just these keys and shapes."""
    found = {key: tuple(value.shape) if isinstance(value, Tensor) else (len(value),) for key, value in saved.items()}
    for key in {**shapes, **found}:
        if found.get(key) != shapes.get(key):
            raise ValueError(
                f"state: {name} of {key} must have shape {shapes.get(key)}, got {found.get(key)}: is it of another "
                "model?"
            )
