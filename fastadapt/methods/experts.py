"""LoRA, DoRA and VeRA on weights of experts that are stacked in one parameter: an adapter for each of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..layers.experts import AdapterExperts
from ..layers.layer import Adapter
from ..operators.expert_linear.eager import base_products, expert_norm
from ..operators.expert_linear.function import experts_of
from ..reference import ExpertForm


class ExpertLoRA(Adapter):
    """A and B of every expert's matrix in one stacked weight, DoRA's magnitude m where there is one.

        LoRA   h = s, g = 1        DoRA   h = s · g, g[e] = m[e] / ‖W0[e] + s·B[e] A[e]‖, for each expert

    Shapes: lora_A [E·r, in], row e·r + k that of expert e; lora_B [out, r·E], column k·E + e: PEFT's, and B lies in
    memory the other way round, so that an expert's B has whole rows; lora_magnitude_vector [E, out].
    """

    suffixes: ClassVar[Mapping[str, str]] = {
        "lora_A": "lora_A.weight",
        "lora_B": "lora_B.weight",
        "lora_magnitude_vector": "lora_magnitude_vector",
    }

    lora_A: Tensor
    lora_B: Tensor

    def __init__(self, weight: Tensor, config: Any, r: int, alpha: float, dtype: torch.dtype) -> None:
        super().__init__(config.lora_dropout)
        self.count, n, k = weight.shape
        self.r = r
        self.scaling = alpha / (math.sqrt(r) if config.use_rslora else r)
        add = partial(self.add_tensor, like=weight, dtype=dtype)
        init, rows = config.init_lora_weights, r * self.count
        if init == "gaussian":
            A = torch.randn(rows, k) / r
        else:
            A = torch.empty(rows, k).uniform_(-1 / math.sqrt(k), 1 / math.sqrt(k))
        add("lora_A", A, frozen=config.freeze_A)
        add("lora_B", (torch.randn(rows, n) if init is False else torch.zeros(rows, n)).T)
        if config.use_dora:
            add("lora_magnitude_vector", self._norm(weight.detach()))

    @property
    def up(self) -> nn.Parameter:
        """B, in the shape that it has in a file."""
        up: nn.Parameter = self.get_parameter("lora_B")
        return up

    @property
    def freezes_A(self) -> bool:  # noqa: N802 (A is the factor's name)
        """Whether A is a constant and B a parameter (LoRA-FA)."""
        return "lora_A" in self._buffers and "lora_B" in self._parameters

    @property
    def factors(self) -> tuple[Tensor, Tensor]:
        """A [E, r, in] and B [E, r, out], as views."""
        A = self.tensor("lora_A").unflatten(0, (self.count, self.r))
        return A, self.tensor("lora_B").T.unflatten(0, (self.r, self.count)).transpose(0, 1)

    def _squares(self, weight: Tensor) -> Tensor:
        def make() -> Tensor:
            dtype = torch.promote_types(weight.dtype, torch.float32)
            norms: Tensor = torch.linalg.vector_norm(weight, dim=2, dtype=dtype)
            return norms.square_()

        return self.memo("squares", (weight,), make, trained=False)

    def _norm(self, weight: Tensor) -> Tensor:
        if weight.is_meta:  # an adapter is being built without memory: its norms have a shape and no values
            return torch.empty(weight.shape[:2], device="meta")
        base, A, B = weight.detach(), self.tensor("lora_A"), self.tensor("lora_B")

        @torch.no_grad()
        def make() -> Tensor:
            form = ExpertForm(*self.factors, scaling=self.scaling)
            products = base_products(base, form.A)
            return expert_norm(experts_of(base, form, None), self._squares(base), products)

        return self.memo("norm", (base, A, B), make, self.scaling)

    @property
    def _makes_norm(self) -> bool:
        """Whether each forward makes DoRA's norm: while A and B train, in eval as well, and in compiled code, which
        keeps nothing."""
        trains = any(self.tensor(name).requires_grad for name in ("lora_A", "lora_B"))
        return self.training or torch.compiler.is_compiling() or (trains and torch.is_grad_enabled())

    def expert_form(self, weight: Tensor, bias: Tensor | None) -> ExpertForm:
        """The form for a weight [E, out, in] and the layer's bias [E, out], differentiable in the parameters."""
        A, B = self.factors
        m = self._parameters["lora_magnitude_vector"]
        if m is None:
            return ExpertForm(A, B, bias=bias, scaling=self.scaling)
        if self._makes_norm:  # together with the product, which reads every weight as well
            squares = self._squares(weight.detach())
            return ExpertForm(A, B, None, m, m, bias, True, self.scaling, squares)
        g = m / self._norm(weight)
        return ExpertForm(A, B, None, g, g, bias, True, self.scaling)

    def extra_repr(self) -> str:
        return f"experts={self.count}, r={self.r}, scaling={self.scaling:g}, dropout={self.dropout:g}"


class ExpertVeRA(Adapter):
    """λ_b and λ_d of every expert's matrix in one stacked weight, beside the one frozen pair of all layers.

    Shapes: vera_lambda_b [E, out], vera_lambda_d [E, r].
    """

    suffixes: ClassVar[Mapping[str, str]] = {name: name for name in ("vera_lambda_b", "vera_lambda_d")}

    vera_lambda_b: nn.Parameter
    vera_lambda_d: nn.Parameter

    def __init__(self, weight: Tensor, config: Any, projection: Any, dtype: torch.dtype) -> None:
        super().__init__(config.vera_dropout)
        count, n, _ = weight.shape
        add = partial(self.add_tensor, like=weight, dtype=dtype)
        self.projection = projection
        add("vera_lambda_b", torch.zeros(count, n) if config.init_weights else torch.randn(count, n))
        add("vera_lambda_d", torch.full((count, config.r), config.d_initial))

    def expert_form(self, weight: Tensor, bias: Tensor | None) -> ExpertForm:
        """The form for a weight [E, out, in] and the layer's bias [E, out], differentiable in the parameters."""
        _, n, k = weight.shape
        A, B = self.projection.vera_A[None, :, :k], self.projection.vera_B[:n].T[None]
        return ExpertForm(A, B, self.vera_lambda_d, self.vera_lambda_b, bias=bias)


def chosen_parameters(config: Any, path: str, layer: AdapterExperts) -> list[str]:
    """The names of the layer's weights that config.target_parameters names.

    Raises ValueError for a bias to be trained, which experts have in no file of PEFT's.
    """
    if config.bias != "none":
        raise ValueError(f"target_parameters: {path}: bias={config.bias!r} does not go with experts: take bias='none'")
    return [name for name in layer.parameter_names if config.names_parameter(f"{path}.{name}")]
