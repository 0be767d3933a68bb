"""The kernel whose launch is the unit of `python -m bench launches`."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def store_index(
    x,  # [n] int32
    n,
    BLOCK: tl.constexpr,
):
    index = tl.arange(0, BLOCK)
    tl.store(x + index, index, mask=index < n)
