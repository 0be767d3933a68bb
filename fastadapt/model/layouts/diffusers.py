"""diffusers' layout: pytorch_lora_weights.safetensors, the components of a pipeline in one file.

    unet.<path>.lora_A.weight, .lora_B.weight      as PEFT has them, behind the name of the component
    unet.<path>.lora.down.weight, .lora.up.weight  before 0.29; text_encoder.<path>.lora_linear_layer.down.weight
    <path>.processor.to_q_lora.down.weight         before 0.22, of attention: to_q, to_k, to_v, to_out.0
    <path>.alpha                                   the scale is alpha / r; it is 1 where there is none

A newer file has each component's adapter_config.json in its metadata. Source: huggingface/diffusers
`loaders/lora_base.py`, `loaders/peft.py`, `utils/state_dict_utils.py`, `utils/peft_utils.py`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ...checks import shown
from ..adapted import PREFIX
from ..peft_files import parse_fields
from ..untrusted import Limits
from .layout import SUFFIXES, Layout, Named, Spelled, layers_of_peft, listed

FILE = "pytorch_lora_weights.safetensors"

COMPONENTS = (
    "unet",
    "transformer",
    "transformer_2",
    "prior",
    "connectors",
    "text_encoder",
    "text_encoder_2",
    "text_encoder_3",
)

# What the metadata call each component's adapter_config.json, all in one object.
METADATA = "lora_adapter_metadata"

_ROLES = {
    **{suffix: role for role, suffix in SUFFIXES.items()},
    "lora_magnitude_vector.weight": "magnitude",
    "lora.down.weight": "A",
    "lora.up.weight": "B",
    "lora.up.bias": "bias",
    "lora_linear_layer.down.weight": "A",
    "lora_linear_layer.up.weight": "B",
    "alpha": "alpha",
}

# The old spelling says the projection of an attention: of a U-Net's and of a text encoder's.
_OLD = re.compile(r"(.*\.)to_(q|k|v|out)_lora\.(?:(down|up)\.weight|alpha)")
_PROJECTIONS = {"q": "to_q", "k": "to_k", "v": "to_v", "out": "to_out.0"}
_TEXT_PROJECTIONS = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "out": "out_proj"}


def _named(name: str) -> Named | None:
    first, _, rest = name.partition(".")
    component, path = (first, rest) if first in COMPONENTS else ("", name)
    path = path.replace(".processor.", ".")
    if old := _OLD.fullmatch(path):
        projections = _TEXT_PROJECTIONS if component.startswith("text_encoder") else _PROJECTIONS
        return Named(component, old[1] + projections[old[2]], {"down": "A", "up": "B"}.get(old[3], "alpha"))
    for suffix, role in _ROLES.items():
        if path.endswith(f".{suffix}"):
            return Named(component, path.removesuffix(f".{suffix}"), role)
    return None


DIFFUSERS = Layout(
    "diffusers",
    re.compile(r"\.lora_(A|B|embedding_A|embedding_B)\b|\.lora\.(down|up)\.|_lora\.(down|up)\.|\.lora_linear_layer\."),
    _named,
    {"dora_scale": "it is DoRA's scale as kohya's layout has it, and these names are not kohya's: save it in one"},
)


def metadata_fields(
    metadata: Mapping[str, str], components: Collection[str], source: Path, limits: Limits
) -> dict[str, dict[str, Any]]:
    """The fields of adapter_config.json of each component that a file's metadata tell of; none for an older file.

    Raises ValueError for metadata that are no JSON object, that tell of components which the file has no tensors of, or
    that may not be so long.
    """
    if METADATA not in metadata:
        return {}
    text = metadata[METADATA].encode()
    if len(text) > limits.max_config_bytes:
        raise ValueError(f"{source}: its {METADATA} may have {limits.max_config_bytes} bytes, got {len(text)}")
    found: dict[str, dict[str, Any]] = {}
    for name, value in parse_fields(text, Path(f"{source}: {METADATA}")).items():
        component, _, field = ("", "", name) if "" in components else name.partition(".")
        if component not in components:
            raise ValueError(
                f"{source}: {METADATA} tells {shown(name)} of a component that the file has no tensors of, it has "
                f"{listed(components)}: the adapter is damaged, save it again"
            )
        found.setdefault(component, {"peft_type": "LORA"})[field] = value
    return found


def diffusers_file(adapters: Mapping[str, Spelled], source: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, metadata) of the adapters of a pipeline's components in diffusers' layout, with all that their configs
    say in the metadata.

    Raises ValueError for what the layout cannot hold: another method than LoRA and DoRA, modules that were trained
    whole, base weights, and names that are no components.
    """
    tensors: dict[str, Tensor] = {}
    fields: dict[str, Any] = {}
    for component, spelled in adapters.items():
        if component not in COMPONENTS:
            raise ValueError(
                f"{source}: component must be one of {listed(COMPONENTS)} for diffusers' layout, got {shown(component)}"
            )
        layers_of_peft(spelled, source, "diffusers")
        start = f"{PREFIX}model."
        tensors |= {f"{component}.{name.removeprefix(start)}": tensor for name, tensor in spelled.tensors.items()}
        fields |= {f"{component}.{name}": value for name, value in sorted(spelled.fields.items())}
    # Not sorted within: of the patterns the first that matches wins.
    return tensors, {"format": "pt", METADATA: json.dumps(fields, indent=2)}
