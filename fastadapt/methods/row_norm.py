"""The row norms of an adapted weight, recomputed only when they can have changed."""

from __future__ import annotations

import torch
from torch import Tensor

from ..layers.promise import PROMISE, Promise
from ..operators.arithmetic import divisor
from ..operators.registry import sees_operators
from ..operators.weight_norm.function import row_squares, weight_norm, weight_norm_squared
from ..staleness import Kept, content


def row_norm(kept: Kept, weight: Tensor, A: Tensor, B: Tensor, scaling: float, *, changing: bool) -> Tensor:
    """n_j = ‖(W0 + s·B·A)_j‖ in fp32, detached, with ‖W0‖² and, outside training, n itself in `kept`.

    changing: whether A or B may have been written untold. On a CPU their content is then looked at, so that gradient
    accumulation and recomputed forwards find n again; elsewhere, where that would wait for the device, n is made anew.
    ‖W0‖² is made once of a W0 that stays as it is; a weight that is promised, as a quantised layer's is, is made when
    there is a norm to make, and no sooner. n is a divisor: never zero.
    Shapes: weight [N, K]; A [R, K]; B [N, R]; n [N].
    Source: Liu et al. 2024, arXiv:2402.09353, section 4.3 (the norm is a constant for the gradient).
    """
    if weight.is_meta:  # an adapter is being built without memory: its norms have a shape and no values
        return torch.empty(weight.shape[0], device="meta")

    down, up = A.detach(), B.detach()
    # A weight that has values is its own promise.
    promise: Promise = getattr(weight, PROMISE, None) or Promise((weight.detach(),), weight.detach)

    def make() -> Tensor:
        if promise.products is not None:
            squares = kept("squares", promise.sources, lambda: row_squares(promise.make()), trained=False)
            squared = weight_norm_squared(squares, promise.products, down, up, scaling)
            return divisor(squared.clamp(min=0).sqrt())
        base = weight.detach() if promise.lent else promise.make()
        base_squared = kept("squares", promise.sources, lambda: row_squares(base), trained=False)
        norm = weight_norm(base, down, up, scaling, base_squared=base_squared)
        return divisor(norm)

    if not changing:
        return kept("norm", (*promise.sources, A, B), make, scaling)
    if not weight.is_cpu or sees_operators(weight):
        return make()

    return kept("norm in training", (*promise.sources, down, up), make, scaling, content(down), content(up))
