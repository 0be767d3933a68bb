"""The row norms of an adapted weight, recomputed only when they can have changed."""

from __future__ import annotations

import torch
from torch import Tensor

from ..operators.weight_norm.function import row_squares, weight_norm
from ..staleness import Kept


def row_norm(kept: Kept, weight: Tensor, A: Tensor, B: Tensor, scaling: float, *, changing: bool) -> Tensor:
    """n_j = ‖(W0 + s·B·A)_j‖ in fp32, detached, with ‖W0‖² and, outside training, n itself in `kept`.

    changing: whether A or B may have been written untold, or is a new tensor each time: n is then made anew. ‖W0‖² is
    made once of a W0 that stays as it is. Shapes: weight [N, K]; A [R, K]; B [N, R]; n [N].
    Source: Liu et al. 2024, arXiv:2402.09353, section 4.3 (the norm is a constant for the gradient).
    """
    if weight.is_meta:  # an adapter is being built without memory: its norms have a shape and no values
        return torch.empty(weight.shape[0], device="meta")

    def make() -> Tensor:
        base_squared = kept("squares", (weight,), lambda: row_squares(weight.detach()), trained=False)
        return weight_norm(weight.detach(), A.detach(), B.detach(), scaling, base_squared=base_squared)

    return make() if changing else kept("norm", (weight, A, B), make, scaling)
