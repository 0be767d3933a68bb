"""The row norms of an adapted weight, recomputed only when they can have changed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..functional import row_squares, weight_norm
from ..versions import identity, optimizer_steps


class RowNorm:
    """n_j = ‖(W0 + s·B·A)_j‖ in fp32, detached, with ‖W0‖² and, outside training, n itself kept between calls.

    n is computed anew in every forward that could precede a backward; elsewhere it is kept until A, B or W0 is another
    tensor or was written, an optimizer has stepped, or `forget` is called. Shapes: n [N].
    Source: Liu et al. 2024, arXiv:2402.09353, section 4.3 (the norm is a constant for the gradient).
    """

    def __init__(self) -> None:
        self._squares: tuple[tuple[Any, ...], Tensor] | None = None
        self._norm: tuple[tuple[Any, ...], Tensor] | None = None

    def __reduce__(self) -> tuple[Any, ...]:  # copies and pickles start empty
        return RowNorm, ()

    def forget(self) -> None:
        self._norm = None

    def __call__(self, weight: Tensor, A: Tensor, B: Tensor, scaling: float, *, changing: bool) -> Tensor:
        """n for these tensors; `changing` says that a backward may follow or the parameters may be written untold."""
        if weight.is_meta:  # an adapter is being built without memory: its norms have a shape and no values
            return torch.empty(weight.shape[0], device="meta")
        weight, A, B = weight.detach(), A.detach(), B.detach()
        if torch.compiler.is_compiling():  # tensors have no identity while they are traced
            return weight_norm(weight, A, B, scaling)
        if changing:
            self._norm = None
            return weight_norm(weight, A, B, scaling, base_squared=self._base_squared(weight))
        key = (*identity(weight), *identity(A), *identity(B), scaling, optimizer_steps())
        if self._norm is None or self._norm[0] != key:
            self._norm = (key, weight_norm(weight, A, B, scaling, base_squared=self._base_squared(weight)))
        return self._norm[1]

    def _base_squared(self, weight: Tensor) -> Tensor:
        key = identity(weight)
        if self._squares is None or self._squares[0] != key:
            self._squares = (key, row_squares(weight))
        return self._squares[1]
