"""A live PEFT model whose layers run through our operators, on PEFT's own parameters."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from torch import nn

from ..layers.linear import ProjectionGroup
from ..layers.siblings import groups

# What the forwards of PEFT's classes speak of in 0.21.2. One that speaks of more does more: then all is left to PEFT.
_KNOWN = {
    "lora.layer:Linear": "_check_forward_args pop VARIANT_KWARG_KEYS disable_adapters merged unmerge base_layer "
    "_mixed_batch_forward dtype lora_A keys active_adapters lora_B lora_dropout scaling _cast_input_dtype weight "
    "lora_variant forward to",
    "lora.variants:DoraLinearVariant": "lora_A lora_B lora_dropout scaling isinstance nn Identity training "
    "lora_magnitude_vector get_base_layer",
    "lora.dora:DoraLinearLayer": "get_lora_weight to dtype weight dequantize_module_weight get_weight_norm detach view "
    "bias F linear transpose fan_in_fan_out",
    "vera.layer:Linear": "dtype disable_adapters merged unmerge base_layer quantization_backend "
    "maybe_clone_base_result active_adapters vera_lambda_d keys vera_lambda_b vera_A vera_B in_features to device "
    "out_features vera_dropout _cast_input_dtype F linear",
}
# The same of the layers on bitsandbytes' weights, which are there only where that library is.
_BITSANDBYTES = "peft.tuners.lora.bnb"
_KNOWN_ON_BITSANDBYTES = dict.fromkeys(
    ("lora.bnb:Linear8bitLt", "lora.bnb:Linear4bit"),
    "_check_forward_args pop VARIANT_KWARG_KEYS disable_adapters merged unmerge base_layer _mixed_batch_forward clone "
    "active_adapters lora_A keys lora_B lora_dropout scaling torch is_autocast_enabled dtype _cast_input_dtype weight "
    "lora_variant to forward",
)

# The same of those on weights of experts: where they do more they are left alone, and no others with them.
_KNOWN_ON_EXPERTS = {
    "lora.layer:ParamWrapper": "_check_forward_args pop disable_adapters merged unmerge base_layer get ValueError "
    "__class__ __name__ _activate_lora active_adapters",
}


class PeftReport(NamedTuple):
    """What `accelerate_peft` did with PEFT's layers, by their paths in the model. Prints as a sentence.

    taken: how they run, "grouped" with others that read the same input, "fused" with their base layer, or "called", the
    form on what their base layer gives. left: why they run as PEFT has them. Both are what they are now: a layer that
    is merged, disabled or switched to what only PEFT computes is PEFT's until that ends.
    """

    taken: Mapping[str, str]
    left: Mapping[str, str]

    def __str__(self) -> str:
        def listed(found: Mapping[str, str], between: str) -> str:
            return between.join([f"{count} {word}" for word, count in Counter(found.values()).most_common()])

        text = f"{len(self.taken)} of {len(self.taken) + len(self.left)} layers of PEFT's run through fastadapt"
        text += f": {listed(self.taken, ', ')}" if self.taken else ""
        return f"{text}; left to PEFT: {listed(self.left, '; ')}" if self.left else text


def accelerate_peft(model: nn.Module, *, mixed_batches: bool = False) -> PeftReport:
    """Runs the LoRA, rsLoRA, DoRA and VeRA layers of a live PEFT model through our operators, in place.

    Only the class of each layer changes, to a subclass with a forward of ours on PEFT's own parameters: saving and
    loading, merging, switching, disabling, mixed batches, optimizers, Trainer and TRL go on unchanged. Projections that
    read the same input (q, k and v; gate and up) run as one. On quantised weights (bitsandbytes', quanto's) the form
    goes onto what the base layer gives, DoRA's with the norm of the dequantised weight. LoRA on the stacked weights of
    experts (target_parameters) goes onto the rows of each expert, where PEFT adds it to all of every expert's weights
    in each forward; experts that transformers does not decorate stay PEFT's. What a forward does not cover is PEFT's
    own, call by call: merged and disabled layers, adapter_names without mixed_batches, aLoRA and the other
    variants, DoRA together with other adapters, dropouts that differ, a base weight that trains, hooks on the base
    layer or the factors.
    Call it again after PEFT has made new layers (add_adapter, load_adapter), and after a write to a base weight that
    only `.data` or NumPy knows of: DoRA's norms of base weights are kept. Such a write to a parameter or to x between
    the calls of two siblings is not seen either: k and v are what they were when q was called. A sibling that nobody
    calls keeps x alive until the next x, twice at most; then its layers run one by one. `restore_peft` undoes it.
    Outputs and gradients are PEFT's up to rounding; dropout masks are drawn by other means, one for a whole group and
    for all that are active in a layer. Gradients cannot be differentiated again (gradient penalties): restore first.
    mixed_batches: a forward or generate in eval mode with adapter_names, for each row the name of its adapter or
    "__base__", is ours as well, with DoRA, which PEFT refuses in it, and VeRA, whose names PEFT drops. The base layer
    runs once, each adapter on its rows; gradients go to each row's adapter. Siblings are not grouped then.
    model: a PeftModel, or one with PEFT's layers in it. Returns which layers are taken, and which are left and why.
    Warns, and leaves all to PEFT, where a version of it does more in these layers than the ones known here.
    Raises ValueError for a model without layers of PEFT's.

    >>> config = peft.LoraConfig(target_modules=["0", "1"])
    >>> model = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)), config)
    >>> print(fastadapt.accelerate_peft(model))
    2 of 2 layers of PEFT's run through fastadapt: 2 fused
    """
    from peft import __version__
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers: dict[str, Any] = {path: part for path, part in model.named_modules() if isinstance(part, BaseTunerLayer)}
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no layers of PEFT's: make them first, with peft.get_peft_model, or take "
            "fastadapt.inject for adapters of our own"
        )
    unknown = _unknown(_KNOWN | (_KNOWN_ON_BITSANDBYTES if _BITSANDBYTES in sys.modules else {}))
    more = f"in PEFT {__version__} they do more than is known here"
    if unknown:
        why = f"{more} ({', '.join(sorted(unknown))})"
        warnings.warn(f"accelerate_peft leaves all layers to PEFT: {why}", stacklevel=2)
        return PeftReport({}, dict.fromkeys(layers, why))

    from .peft_layers import ACCELERATED, Accelerated

    if _BITSANDBYTES in sys.modules:
        importlib.import_module(f"{__package__}.peft_bitsandbytes")
    unknown = _unknown(_KNOWN_ON_EXPERTS)
    if not unknown:
        importlib.import_module(f"{__package__}.peft_experts")
    left_whole = {path for path, layer in layers.items() if unknown and type(layer).__name__ == "ParamWrapper"}
    for path, layer in layers.items():
        kind = ACCELERATED.get(type(layer))
        if kind is not None and path not in left_whole:
            layer.__class__ = kind
    for own in _accelerated(model):
        own.start(mixed_batches)
    _hand_on_names(model, mixed_batches)
    for members in groups(model.named_modules(), Accelerated):
        group = ProjectionGroup(members)
        for member in members:
            member.group = group
    taken, left = {}, {}
    for path, layer in layers.items():
        if isinstance(layer, Accelerated):
            why = layer.why_left()
        elif path in left_whole:
            why = f"{more} ({', '.join(sorted(unknown))})"
        else:
            why = f"{_name(layer)} has a forward of its own"
        if why:
            left[path] = why
        elif isinstance(layer, Accelerated):
            taken[path] = layer.way
    return PeftReport(taken, left)


def restore_peft(model: nn.Module) -> None:
    """Gives the layers that `accelerate_peft` has taken back their own class: the model is PEFT's alone again.

    Does nothing to a model without such layers.
    """
    for layer in _accelerated(model):
        layer.stop()
    _hand_on_names(model, False)


def _unknown(classes: Mapping[str, str]) -> set[str]:
    """What PEFT's forwards, as they are now, speak of that is not known of these classes."""
    found = set()
    for path, known in classes.items():
        module, name = path.split(":")
        try:
            kind = getattr(importlib.import_module(f"peft.tuners.{module}"), name)
        except (ImportError, AttributeError):
            found.add(f"no {module}.{name}")
            continue
        code = getattr(kind.forward, "__code__", None)
        found |= {"a forward that is replaced"} if code is None else set(code.co_names).difference(known.split())
    return found


def _accelerated(model: nn.Module) -> Iterator[Any]:
    from .peft_layers import Accelerated

    return (part for part in model.modules() if isinstance(part, Accelerated))


def _hand_on_names(model: nn.Module, wanted: bool) -> None:
    """Whether a VeraModel of PEFT's gives its layers the adapter_names of a call; by itself it drops them."""
    from peft.tuners.vera import VeraModel

    from .peft_layers import MixedVeraModel

    kinds = VeraModel, MixedVeraModel
    tuners: list[Any] = [part for part in model.modules() if type(part) in kinds]
    for tuner in tuners:
        tuner.__class__ = kinds[wanted]


def _name(layer: nn.Module) -> str:
    """The layer's class in the words of PEFT's users: lora.Embedding."""
    return ".".join([*type(layer).__module__.split(".")[-2:-1], type(layer).__name__])
