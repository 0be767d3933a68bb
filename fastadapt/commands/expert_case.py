"""The cases of `fastadapt doctor`'s self-test for experts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..functional import expert_linear
from ..reference import ExpertForm, expert_linear_reference
from .case import Case, Normal, Sizes, Values

# How the rows lie on the experts, in shares of all: one of them has none.
_SHARES = (0.3, 0.0, 0.5, 0.2)


@dataclass(frozen=True)
class ExpertLinearCase(Case):
    """parts: what the form has beside A and B. shared: one pair of factors for all experts. dora: its norm is made."""

    operator = "expert_linear"
    covers = ("expert_linear", "expert_linear_backward")
    kernels = ("expert_shrink", "expert_product", "expert_grads")
    draws_in_kernels = False

    parts: tuple[str, ...] = ()
    shared: bool = False
    dora: bool = False

    def values(self, normal: Normal, sizes: Sizes) -> Values:
        m, k, n, r = sizes
        count = len(_SHARES)
        pairs = 1 if self.shared else count
        lengths = {"mid_scale": r, "out_scale": n, "base_scale": n, "bias": n}
        return {
            "weight": normal(count, n, k, std=k**-0.5),
            "A": normal(pairs, r, k, std=k**-0.5),
            "B": normal(pairs, r, n, std=r**-0.5),
            "x": normal(m, k),
            **{part: normal(count, lengths[part], std=0.3, mean=0.8) for part in self.parts},
        }

    def _form(self, values: Values) -> ExpertForm:
        g = values.get("base_scale")
        out_scale = g if self.dora and g is not None else values.get("out_scale", 1.0)
        squares = values["weight"].float().square().sum(2) if self.dora else None
        return ExpertForm(
            values["A"],
            values["B"],
            values.get("mid_scale"),
            out_scale,
            g,
            values.get("bias"),
            self.dora,
            0.5,
            squares,
        )

    def _ends(self, values: Values) -> list[int]:
        ends = [round(sum(_SHARES[: index + 1]) * len(values["x"])) for index in range(len(_SHARES))]
        return [*ends[:-1], len(values["x"])]

    def ours(self, values: Values, backend: str) -> Tensor:
        offsets = torch.tensor(self._ends(values), dtype=torch.int32, device=values["x"].device)
        return expert_linear(
            values["x"], values["weight"], self._form(values), offsets, dropout=self.dropout, backend=backend
        )

    def reference(self, values: Values, mask: Tensor | None, p: float) -> Tensor:
        form, ends = self._form(values), self._ends(values)
        return expert_linear_reference(values["x"], values["weight"], form, ends, mask=mask, p=p)


def expert_cases(dropout: float) -> list[Case]:
    """LoRA, DoRA and VeRA on experts, and all parts of the form at once."""
    return [
        ExpertLinearCase("LoRA, dropout", parts=("bias",), dropout=dropout),
        ExpertLinearCase("DoRA", parts=("base_scale", "bias"), dora=True),
        ExpertLinearCase("VeRA", parts=("mid_scale", "out_scale"), shared=True, frozen=("A", "B")),
        ExpertLinearCase("every part", parts=("mid_scale", "out_scale", "base_scale", "bias")),
    ]
