"""The state of a training as plain values and tensors, and the tensors of an adapter that are part of it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..model.adapted import adapter_layers, saved_modules
from ..model.sharded import fill, whole


def pack(value: Any, tensors: dict[str, Tensor], name: str = "") -> Any:
    """`value` as JSON can say it; its tensors go into `tensors` by their path in it.

    Raises TypeError for what is neither a tensor, a plain value nor a dict, list or tuple of such.
    """
    if isinstance(value, Tensor):
        tensors[name] = whole(name, value).detach().cpu().contiguous().clone()  # safetensors refuses shared storage
        return {"#tensor": name}
    if isinstance(value, dict):
        # Optimizers number their parameters, and JSON has no numbers for keys.
        plain = all(isinstance(key, str) and not key.startswith("#") for key in value)
        items = [(key, pack(item, tensors, f"{name}/{key}")) for key, item in value.items()]
        return dict(items) if plain else {"#items": [list(item) for item in items]}
    if isinstance(value, (list, tuple)):
        packed = [pack(item, tensors, f"{name}/{index}") for index, item in enumerate(value)]
        return packed if isinstance(value, list) else {"#tuple": packed}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(
        f"{name.lstrip('/')} cannot go into a checkpoint: it must be a tensor or a plain value, got {value!r}"
    )


def unpack(value: Any, tensors: dict[str, Tensor]) -> Any:
    """The inverse of `pack`."""
    if isinstance(value, list):
        return [unpack(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if "#tensor" in value:
        return tensors[value["#tensor"]].clone()  # its own memory, where the file may go
    if "#tuple" in value:
        return tuple([unpack(item, tensors) for item in value["#tuple"]])
    if "#items" in value:
        return {key: unpack(item, tensors) for key, item in value["#items"]}
    return {key: unpack(item, tensors) for key, item in value.items()}


def trained_tensors(model: nn.Module, adapter_name: str) -> dict[str, Tensor]:
    """Everything that an adapter keeps, by module path, and each tensor once: methods may share them among layers."""
    parts = {
        path: layer.adapters[adapter_name]
        for path, layer in adapter_layers(model).items()
        if adapter_name in layer.adapters
    }
    parts |= {
        path: module.copies[adapter_name]
        for path, module in saved_modules(model).items()
        if adapter_name in module.copies
    }
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for path, part in parts.items():
        for name, tensor in part.state_dict(keep_vars=True).items():
            if id(tensor) not in seen:
                seen.add(id(tensor))
                found[f"{path}.{name}"] = tensor
    return found


def load_tensors(model: nn.Module, adapter_name: str, tensors: dict[str, Tensor], cure: str = "or start anew") -> None:
    """Copies what `trained_tensors` gave into the model. Raises ValueError unless names and shapes are the same."""
    wanted = trained_tensors(model, adapter_name)
    cure = f"put the model back that it was trained on, {cure}"
    for name in sorted(wanted.keys() ^ tensors.keys()):
        what = "is missing in the checkpoint" if name in wanted else "does not belong to this model"
        raise ValueError(f"tensor {name} {what}: {cure}")
    for name, tensor in wanted.items():
        if tensors[name].shape != tensor.shape:
            raise ValueError(
                f"tensor {name} must have shape {tuple(tensor.shape)} for this model, the checkpoint has "
                f"{tuple(tensors[name].shape)}: {cure}"
            )
    for name, tensor in wanted.items():
        fill(tensor, tensors[name])
