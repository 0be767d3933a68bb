"""What LoRA+ and LoRA-FA are beside LoRA: groups of learning rates, and a corrected gradient."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..layers.experts import ExpertsAdapter
from ..layers.kinds import AdapterEmbedding
from ..methods.experts import ExpertLoRA
from ..methods.lora import LoRAAdapter
from ..model.adapted import adapter_layers
from ..operators.calls import without_autocast


def parameter_groups(
    model: nn.Module,
    lr: float,
    loraplus_lr_ratio: float = 16.0,
    loraplus_lr_embedding: float = 1e-6,
    weight_decay: float = 0.0,
) -> list[dict[str, Any]]:
    """LoRA+: the trainable parameters of `model` in groups for any torch optimizer, B learning faster than A.

        η_A = lr,  η_B = lr · loraplus_lr_ratio

    Groups, by PEFT's rules: "A" is everything that is in no other; "embedding", what belongs to an adapter of an
    embedding, at loraplus_lr_embedding; "B", parameters called lora_B and every vector (DoRA's magnitude and VeRA's
    vectors are vectors too); "B_no_decay", those of "B" that are biases or belong to a LayerNorm: their weight decay is
    0. Empty groups are left out. Raises ValueError for a rate, ratio or decay below zero, or a model without trainable
    parameters.
    Source: Hayou et al. 2024, arXiv:2402.12354, sections 4 and 5 (ratio 2⁴; a harder task wants a lower lr).
    """
    for name, value in (
        ("lr", lr),
        ("loraplus_lr_ratio", loraplus_lr_ratio),
        ("loraplus_lr_embedding", loraplus_lr_embedding),
        ("weight_decay", weight_decay),
    ):
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} must be a finite number of at least 0, got {value!r}")
    groups: dict[str, dict[str, Any]] = {
        "A": {"lr": lr, "weight_decay": weight_decay},
        "embedding": {"lr": loraplus_lr_embedding, "weight_decay": weight_decay},
        "B": {"lr": lr * loraplus_lr_ratio, "weight_decay": weight_decay},
        "B_no_decay": {"lr": lr * loraplus_lr_ratio, "weight_decay": 0.0},
    }
    members: dict[str, list[nn.Parameter]] = {name: [] for name in groups}
    modules = dict(model.named_modules())
    embeddings = tuple(
        f"{path}.adapters." for path, layer in adapter_layers(model).items() if isinstance(layer, AdapterEmbedding)
    )
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if name.startswith(embeddings):
            group = "embedding"
        elif "lora_B" in name or parameter.dim() == 1:
            decays = "bias" not in name and not isinstance(modules[name.rpartition(".")[0]], nn.LayerNorm)
            group = "B" if decays else "B_no_decay"
        else:
            group = "A"
        members[group].append(parameter)
    if not any(members.values()):
        raise ValueError("the model has no trainable parameters: inject an adapter first, or activate one that trains")
    return [{"params": members[name], "name": name, **rates} for name, rates in groups.items() if members[name]]


class LoRAFAAdamW(torch.optim.Optimizer):
    """AdamW for LoRA-FA: where A is frozen, B's gradient is the one that best imitates the full weight's.

        g' = g_B (A Aᵀ)⁻¹ / s²      so that s·g' A is the least-squares projection of dL/dW onto the rows of A

    The inverse is computed once, in fp32, since A does not change; each expert has one of its own. Other trainable
    parameters (DoRA's magnitude, biases, modules_to_save) get plain AdamW. Bias correction is on; the decay follows the
    step, by lr · weight_decay.
    `model` has an active adapter with LoRAConfig(freeze_A=True). Raises ValueError where it has none, and for values
    outside their range.
    Source: Zhang et al. 2023, arXiv:2308.03303, version 2, section 3.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
    ) -> None:
        for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
            if not 0 <= value < math.inf:
                raise ValueError(f"{name} must be a finite number of at least 0, got {value!r}")
        for beta in betas:
            if not 0 <= beta < 1:
                raise ValueError(f"betas must be in [0, 1), got {betas!r}")
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._model = model
        self._adapters = self._with_frozen_A()
        if not any(parameter in self._adapters for parameter in parameters):
            raise ValueError("no active adapter has a frozen A: inject one with LoRAConfig(freeze_A=True) first")
        super().__init__(parameters, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def _with_frozen_A(self) -> dict[nn.Parameter, LoRAAdapter | ExpertLoRA]:  # noqa: N802
        """The adapters whose A is frozen, by their B."""
        adapters = [adapter for layer in adapter_layers(self._model).values() for adapter in layer.adapters.values()]
        experts = [
            part for adapter in adapters if isinstance(adapter, ExpertsAdapter) for part in adapter.parts.values()
        ]
        return {
            adapter.up: adapter
            for adapter in (*adapters, *experts)
            if isinstance(adapter, (LoRAAdapter, ExpertLoRA)) and adapter.freezes_A
        }

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        self._adapters = self._with_frozen_A()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_model": self._model, "_adapters": self._adapters}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step. `closure` may compute the loss anew; its value is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not parameters:
                continue
            for parameter in parameters:
                state = self.state[parameter]
                if not state:
                    state |= {"step": 0, "exp_avg": torch.zeros_like(parameter)}
                    state["exp_avg_sq"] = torch.zeros_like(parameter)
                state["step"] += 1
            states = [self.state[parameter] for parameter in parameters]
            grads = [self._corrected_grad(parameter) for parameter in parameters]
            averages, squares = ([state[name] for state in states] for name in ("exp_avg", "exp_avg_sq"))
            beta1, beta2 = group["betas"]
            torch._foreach_mul_(averages, beta1)
            torch._foreach_add_(averages, grads, alpha=1 - beta1)
            torch._foreach_mul_(squares, beta2)
            torch._foreach_addcmul_(squares, grads, grads, 1 - beta2)
            denominators = torch._foreach_sqrt(squares)
            torch._foreach_add_(denominators, group["eps"])
            sizes = [
                -group["lr"] * math.sqrt(1 - beta2 ** state["step"]) / (1 - beta1 ** state["step"]) for state in states
            ]
            torch._foreach_addcdiv_(parameters, averages, denominators, sizes)
            if group["weight_decay"] > 0:
                torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        return loss

    def _corrected_grad(self, parameter: nn.Parameter) -> Tensor:
        grad = parameter.grad
        assert grad is not None
        adapter = self._adapters.get(parameter)
        if adapter is None:
            return grad
        A = adapter.factors[0]

        def make() -> Tensor:
            rows = A.double()
            # A may have more rows than columns: what it does not span must not answer to the rounding of the gradient.
            inverse: Tensor = torch.linalg.pinv(rows @ rows.mT, hermitian=True, rtol=1e-6) / adapter.scaling**2
            return inverse.to(torch.float64 if A.dtype == torch.float64 else torch.float32)

        inverse = adapter.memo("inverse", (A,), make, adapter.scaling, trained=False)
        with without_autocast(grad):  # a step inside an autocast block
            if A.dim() == 2:
                corrected: Tensor = grad.flatten(1).to(inverse.dtype) @ inverse
                return corrected.to(grad.dtype).view_as(grad)
            # [out, r·E], the rank first, as [E, r, out]: the inverse is symmetric.
            stack = grad.T.unflatten(0, (A.shape[1], A.shape[0])).transpose(0, 1)
            corrected = (inverse @ stack.to(inverse.dtype)).to(grad.dtype)
            return corrected.transpose(0, 1).flatten(0, 1).T
