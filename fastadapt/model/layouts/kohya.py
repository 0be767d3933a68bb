"""kohya's layout, which LyCORIS and most programs that draw images share: flat names, a scalar alpha for each module.

    lora_unet_<path, underscores for dots>.lora_down.weight   A [r, in] or [r, in, height, width]
                                          .lora_up.weight     B [out, r] or [out, r, 1, 1]
                                          .alpha              the scale is alpha / r; r where there is none
                                          .dora_scale         DoRA's magnitude, [out, 1]

Source: kohya-ss/sd-scripts `networks/lora.py`, KohakuBlueleaf/LyCORIS `modules/locon.py`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ...checks import shown
from ...methods import LoRAConfig
from .layout import Layout, Named, Spelled, layers_of_peft, listed
from .names import flat

_NAME = re.compile(r"lora_(unet|te[123]?)_([^.]+)\.(.+)")

_ROLES = {"lora_down.weight": "A", "lora_up.weight": "B", "alpha": "alpha", "dora_scale": "magnitude"}

_COMPONENTS = {
    "unet": "unet",
    "te": "text_encoder",
    "te1": "text_encoder",
    "te2": "text_encoder_2",
    "te3": "text_encoder_3",
}


def _named(name: str) -> Named | None:
    said = _NAME.fullmatch(name)
    role = _ROLES.get(said[3]) if said else None
    return Named(_COMPONENTS[said[1]], said[2], role) if said and role else None


_CURE = "which fastadapt does not compute: merge it with the program that made it"

KOHYA = Layout(
    "kohya",
    re.compile(r"^lora_(unet|te[123]?)_"),
    _named,
    {
        ".lora_mid.": f"lora_mid is of a convolution in Tucker's form, {_CURE}",
        ".hada_": f"it is a LoHa's, {_CURE}",
        ".lokr_": f"it is a LoKr's, {_CURE}",
        ".oft_": f"it is an OFT's, {_CURE}",
        ".diff": f"it is a whole difference of weights, {_CURE}",
        ".scalar": f"it is a trained scale, {_CURE}",
    },
    flat=True,
)


def kohya_tensors(adapters: Mapping[str, Spelled], source: Path) -> dict[str, Tensor]:
    """The adapters of a pipeline's components in kohya's layout, which diffusers and the programs for images read.

    Modules have the paths that diffusers has for them, flat. Raises ValueError for what the layout cannot hold:
    another method than LoRA and DoRA, embeddings, biases, components that it has no prefix for, and paths that come to
    the same name.
    """
    found: dict[str, Tensor] = {}
    for component, spelled in adapters.items():
        prefix = _prefix(component, adapters, source)
        layers = layers_of_peft(spelled, source, "kohya")
        config = LoRAConfig.from_peft(spelled.fields)
        for path, layer in layers.items():
            if others := {*layer} - {"A", "B", "magnitude"}:
                raise ValueError(
                    f"{source}: {shown(layer[min(others)].name)} has no place in kohya's layout, which holds no "
                    "embeddings and no biases: write diffusers' layout, or merge the adapter into its model instead"
                )
            start = f"{prefix}_{flat(path)}"
            if f"{start}.alpha" in found:
                raise ValueError(f"{source}: {shown(path)} and another module both come to the name {shown(start)}")
            A, B = layer["A"].tensor, layer["B"].tensor
            if config.rank(path) != A.shape[0]:
                raise ValueError(
                    f"{source}: {shown(layer['A'].name)} must have the {config.rank(path)} rows that its config says, "
                    f"got {A.shape[0]}"
                )
            alpha = config.alpha(path) * (math.sqrt(A.shape[0]) if config.use_rslora else 1)
            found |= {f"{start}.lora_down.weight": A, f"{start}.lora_up.weight": B, f"{start}.alpha": _exact(alpha, A)}
            if "magnitude" in layer:
                ones = [1] * (A.dim() - 1)
                found[f"{start}.dora_scale"] = layer["magnitude"].tensor.reshape(-1, *ones)
    return found


def _exact(alpha: float, like: Tensor) -> Tensor:
    """A number as a tensor of no dimensions: an int as one of whole numbers, as diffusers writes it, a float in the
    dtype of the others where that holds it, else in a wider one.
    """
    if isinstance(alpha, int) and abs(alpha) < 2**63:
        return torch.tensor(alpha)
    tensors = [torch.tensor(float(alpha), dtype=dtype) for dtype in (like.dtype, torch.float32, torch.float64)]
    return next((tensor for tensor in tensors if tensor.item() == alpha), tensors[-1])


def _prefix(component: str, components: Mapping[str, object], source: Path) -> str:
    if component in ("unet", "transformer") and not {"unet", "transformer"} <= {*components}:
        return "lora_unet"
    if component == "text_encoder":
        return "lora_te1" if "text_encoder_2" in components else "lora_te"
    if component in ("text_encoder_2", "text_encoder_3"):
        return f"lora_te{component[-1]}"
    known = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3")
    raise ValueError(
        f"{source}: component must be one of {listed(known)} for kohya's layout, which has prefixes for no others, got "
        f"{shown(component)}"
    )
