"""What stands around a model that is given to our functions: seen through where that is right, else named."""

from __future__ import annotations

from torch import nn

from ..checks import partition_error

# Classes that call the one module inside of them as it is, by name, and where they keep it: torch.compile's, and those
# that train it on several devices.
_SEEN_THROUGH = {
    "OptimizedModule": "_orig_mod",
    "DataParallel": "module",
    "DistributedDataParallel": "module",
    "DeepSpeedEngine": "module",
}

_PEFTS = "PEFT's own adapters are in it: take them out with merge_and_unload() or unload(), and give what that returns"
_REFUSED = {
    "FullyShardedDataParallel": "FSDP has cut its parameters into pieces: call this before it wraps the model, or on "
    "model.module inside of FullyShardedDataParallel.summon_full_params",
    "PeftModel": _PEFTS,
    "PeftMixedModel": _PEFTS,
}


def _classes(module: nn.Module) -> set[str]:
    return {kind.__name__ for kind in type(module).__mro__}


def inside(model: nn.Module) -> nn.Module:
    """The model inside of what torch.compile, DDP and the like have put around it, whose paths its adapters have.

    Raises ValueError where a model cannot be taken out of what is around it.
    """
    while True:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        classes = _classes(model)
        for name in sorted(classes.intersection(_REFUSED)):
            raise ValueError(f"the model is a {name}: {_REFUSED[name]}")
        place = next((_SEEN_THROUGH[name] for name in classes.intersection(_SEEN_THROUGH)), None)
        inner = None if place is None else getattr(model, place, None)
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def check_open(model: nn.Module) -> None:
    """Raises ValueError for a model into which nothing new can come, because of what is around it or in it already."""
    bare = inside(model)
    for around in model.modules():
        if around is bare:
            break
        if {"DistributedDataParallel", "DeepSpeedEngine"}.intersection(_classes(around)):
            raise ValueError(
                f"the model is in a {type(around).__name__}, which knows the parameters that it had then and no "
                "others: put adapters into the model first, and then the model into it"
            )
    for path, module in bare.named_modules():
        classes = _classes(module)
        if "BaseTunerLayer" in classes:
            raise ValueError(
                f"{path} has an adapter of PEFT's: take it out first, with merge_and_unload() of the PeftModel or "
                "delete_adapter() of the model"
            )
        if "ServedLayer" in classes:
            raise ValueError("the model is served by a MultiAdapterModel: unwrap() it first")
    for name, parameter in bare.named_parameters():
        if error := partition_error(name, parameter):
            raise error
        if type(parameter).__name__ == "DTensor" or type(parameter.data).__name__ == "DTensor":
            raise ValueError(f"{name} is cut into pieces (DTensor): put adapters into the model before fully_shard")
