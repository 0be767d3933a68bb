"""The weights of quantised layers in floating point, as the libraries that quantised them have it."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from copy import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import FLOATING
from ..operators.calls import autocast_dtype
from .promise import Promise, can_be_made_again, lent, promised, stored
from .ways import is_hooked, is_packed_linear


def is_quantized(base: nn.Module) -> bool:
    """Whether `dequantized` gives a weight."""
    weight = base._parameters.get("weight")
    if weight is None or type(weight) in (Tensor, nn.Parameter):
        return False
    return _of_bitsandbytes(weight) is not None or type(weight).dequantize is not Tensor.dequantize


def is_packed(base: nn.Module) -> bool:
    """Whether the layer's weight is quantised, be it that `dequantized` reads it or that the layer alone can."""
    return is_quantized(base) or is_packed_linear(base)


def dequantized(base: nn.Module) -> Tensor | None:
    """The weight, in the base layer's own layout, that a quantised layer computes with; None for any other layer.

    A new tensor at each call. bitsandbytes' 4-bit and 8-bit layers, and weights that are tensors of a kind of their own
    which can be dequantised, as torchao's and quanto's are. What an 8-bit layer of bitsandbytes does to x is left out.
    """
    if not is_quantized(base):
        return None
    weight: Any = base._parameters["weight"]
    of_bitsandbytes = _of_bitsandbytes(weight)
    with torch.no_grad():
        if of_bitsandbytes is not None:
            return of_bitsandbytes(base, weight)
        found: Tensor = weight.detach().dequantize()
        return found


def promised_weight(base: nn.Module) -> Tensor:
    """The weight of a layer that `is_quantized`, by its shape: dequantised where somebody asks for its values."""
    weight: Any = base._parameters["weight"]
    rows, columns = getattr(base, "out_features", None), getattr(base, "in_features", None)
    if not isinstance(rows, int) or not isinstance(columns, int):
        rows, columns = weight.shape
    like = torch.empty(0, dtype=_dtype(weight), device=weight.device)
    return promised(rows, columns, like, Promise(tuple(stored([weight])), partial(_values, base)))


def lends(base: nn.Module, x: Tensor | None = None) -> bool:
    """Whether a training forward of the layer is its dequantised weight's and no more, so that this may be lent to it.

    Of bitsandbytes' 4-bit layers, for an x in the dtype of their products, and of 8-bit ones on a CPU, which elsewhere
    round x. A GPU's products in four bits are ahead where x has few rows.
    """
    if type(base).__module__ != "bitsandbytes.nn.modules" or not base.training or not torch.is_grad_enabled():
        return False
    weight: Any = base._parameters["weight"]
    if is_hooked(base) or not is_quantized(base) or not can_be_made_again():
        return False
    if type(weight).__name__ == "Int8Params":
        state: Any = base.state
        return weight.is_cpu and not state.has_fp16_weights and (weight.SCB is not None or state.SCB is not None)
    if weight.quant_state is None or x is None:
        return weight.quant_state is not None
    fits = base.compute_dtype in (None, x.dtype) and autocast_dtype(x) is None
    return fits and (weight.is_cpu or x.numel() >= _FEWEST_ROWS * x.shape[-1])


# Products with packed weights are ahead below this on a GPU, as its peers measured.
_FEWEST_ROWS = 256


def lent_weight(base: nn.Module, dtype: torch.dtype) -> Tensor:
    """The dequantised weight [out, in] of a layer that `lends`, for the time of a call: see `promise.made_again`."""
    weight: Any = base._parameters["weight"]
    make = partial(_values, base, dtype)
    return lent(make(), Promise(tuple(stored([weight])), make))


def _values(base: nn.Module, dtype: torch.dtype | None = None) -> Tensor:
    """The weight of a layer that `is_quantized`, in the dtype that its library gives or in another one."""
    found = dequantized(base)
    assert found is not None
    return found if dtype is None else found.to(dtype)


def count_of_values(weight: Tensor) -> int:
    """How many values a weight has, of which several may be packed into one element."""
    state: Any = getattr(weight, "quant_state", None)
    return weight.numel() if state is None else math.prod(state.shape)


def requantized(base: nn.Module, weight: Tensor, bias: nn.Parameter | None) -> tuple[nn.Module, float]:
    """(A layer like the quantised one that holds this weight, ‖W_q − W‖ / ‖W‖). bitsandbytes' and quanto's.

    Raises ValueError for a layer that does not tell how it was quantised.
    """
    layer, old = copy(base), base._parameters.get("weight")
    layer._parameters = {**base._parameters, "bias": bias}
    ours = type(old).__module__.partition(".")[0] == "bitsandbytes"
    requantize = _REQUANTIZED.get(type(old).__name__) if ours else _by_quanto if hasattr(base, "freeze") else None
    if requantize is None:
        raise ValueError(
            f"its weight ({type(base if old is None else old).__name__}) does not tell how it was quantised: "
            "merge(model, dequantize=True) puts a plain layer in its place"
        )
    with torch.no_grad():
        requantize(layer, old, weight)
        found = _values(layer)
        return layer, float((found - weight).norm() / weight.norm().clamp(min=torch.finfo(weight.dtype).tiny))


def _to_4_bits(layer: Any, old: Any, weight: Tensor) -> None:
    options = {name: getattr(old, name) for name in ("quant_type", "blocksize", "compress_statistics", "quant_storage")}
    like = weight.to("cpu", old.quant_state.dtype)
    layer.weight = type(old)(like, requires_grad=False, module=layer, **options).to(old.device)


def _to_8_bits(layer: Any, old: Any, weight: Tensor) -> None:
    layer.state = copy(layer.state)
    layer.state.reset_grads()
    layer.weight = type(old)(weight.cpu(), requires_grad=False, has_fp16_weights=False).to(old.device)


def _by_quanto(layer: Any, old: Any, weight: Tensor) -> None:
    layer.weight = nn.Parameter(weight, requires_grad=False)
    layer.freeze()
    layer.weight.requires_grad_(False)  # the parameter that it makes would train


def would_round(base: nn.Module, dtype: torch.dtype) -> ValueError:
    """What to raise where something is to be written into a quantised weight; dtype: of a plain layer in its place."""
    weight = base._parameters.get("weight")
    name = type(base if weight is None else weight).__name__
    return ValueError(
        f"its weight is quantised ({name}), and would round what is merged into it to its few bits: "
        f"merge(model, dequantize=True) puts a plain layer in {str(dtype).removeprefix('torch.')} in its place, "
        "with the memory that this takes; merge(model, requantize=True) rounds and tells by how much; or serve it "
        "unmerged"
    )


def _dtype(weight: Any) -> torch.dtype:
    """What the library dequantises to."""
    state = getattr(weight, "quant_state", None)
    dtype: torch.dtype = weight.dtype if state is None else state.dtype
    return dtype if dtype in FLOATING else torch.float32


def _of_bitsandbytes(weight: Tensor) -> Callable[[nn.Module, Any], Tensor | None] | None:
    ours = type(weight).__module__.partition(".")[0] == "bitsandbytes"
    return _BITSANDBYTES.get(type(weight).__name__) if ours else None


def _of_4_bits(base: nn.Module, weight: Any) -> Tensor | None:
    state = weight.quant_state
    if state is None:  # it is quantised when it is moved to its device
        return None
    library, packed = sys.modules["bitsandbytes"].functional, weight.data
    if getattr(state, "packing_format_for_cpu", False):
        # The first inference on some CPUs packs the weight anew, with its scales in bf16. What takes it apart again
        # writes into the state, and would quantise the scales a second time.
        unpack = getattr(library, "_convert_weight_packed_for_cpu_inverse", None)
        if unpack is None:
            return None
        state, scales = copy(state), state.absmax.T.reshape(-1).float()
        state.original_nested = False
        packed, state = unpack(packed, state)
        state.absmax = scales
    found: Tensor = library.dequantize_4bit(packed, state)
    return found


def _of_8_bits(base: nn.Module, weight: Any) -> Tensor | None:
    """W = CB · SCB / 127, which the first forward moves from the weight to the layer's state."""
    state: Any = base.__dict__.get("state")
    scales = weight.SCB if weight.SCB is not None else getattr(state, "SCB", None)
    rows = weight.data if getattr(state, "CB", None) is None else state.CB
    return None if scales is None or rows is None else rows.float().mul_((scales.float() / 127)[:, None])


_BITSANDBYTES: dict[str, Callable[[nn.Module, Any], Tensor | None]] = {
    "Params4bit": _of_4_bits,
    "Int8Params": _of_8_bits,
}
_REQUANTIZED: dict[str, Callable[[Any, Any, Tensor], None]] = {"Params4bit": _to_4_bits, "Int8Params": _to_8_bits}
