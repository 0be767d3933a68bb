"""PEFT adapter directories, both ways: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from ..files import written_together
from ..forms import PlainLoRA, plain_lora
from ..layers.layer import Adapter
from ..methods import AdapterConfig
from ..methods.glora import glora_of
from ..methods.lora import lora_of
from ..methods.lora_drop import recognised
from ..methods.patterns import time_limit
from .inject import Injection, ModelType, attach, check_unmerged, prepare, present
from .peft_files import CONFIG_FILE, TENSOR_FILE, method_of, read_config, read_tensors
from .targets import selection_of
from .untrusted import DEFAULT_LIMITS, Limits, bounded

PREFIX = "base_model."


def _adapter_tensors(adapters: dict[str, Adapter], config: AdapterConfig) -> Iterator[tuple[str, Tensor]]:
    """(name in the file, tensor) of everything the adapter's own modules keep in a checkpoint."""
    for prefix, module in config.shared_tensors(adapters).items():
        for name, tensor in module.state_dict().items():
            yield f"{PREFIX}{prefix}{name}", tensor
    for path, adapter in adapters.items():
        for suffix, tensor in adapter.checkpoint_tensors().items():
            yield f"{PREFIX}model.{path}.{suffix}", tensor


def _copy_tensors(copies: dict[str, nn.Module]) -> Iterator[tuple[str, Tensor]]:
    for path, module in copies.items():
        for name, tensor in module.state_dict().items():
            yield f"{PREFIX}model.{path}.{name}", tensor


def _named_tensors(injection: Injection) -> dict[str, Tensor]:
    return {
        **dict(_adapter_tensors(injection.adapters, injection.config)),
        **dict(_copy_tensors(injection.copies)),
    }


def save_adapter(model: nn.Module, directory: str | os.PathLike[str], adapter_name: str = "default") -> None:
    """Saves one adapter as a PEFT directory: adapter_config.json and adapter_model.safetensors.

    Both files are written beside their places and then renamed, so that a full disk or any other error leaves an
    adapter that was there before as it was, and a kill never a mixture of two. Their modes are those that the umask
    gives. Raises ValueError for an unknown adapter name, OSError where the directory cannot be written.
    """
    injection = present(model, adapter_name)
    if any(adapter.variant is not None for adapter in injection.adapters.values()):
        warnings.warn(
            f"adapter {adapter_name!r} is saved as the whole supernet, without the supports that are chosen now: "
            "export_glora saves the subnet",
            stacklevel=2,
        )
    _write(model, Path(directory), injection.config.to_peft(list(injection.layers)), _named_tensors(injection))


def export_lora(model: nn.Module, directory: str | os.PathLike[str], adapter_name: str = "default") -> None:
    """Saves an adapter of any method that is low-rank alone as a plain LoRA, which every library reads.

    ΔW is the same: A' = diag(d) A, B' = diag(h) B, with each layer's rank and lora_alpha in the patterns (Delta-LoRA
    has rank 2r, AdaLoRA the triplets that it kept; LoRA-drop's shared pairs are repeated). A layer of rank 0 is left
    out. Raises ValueError for an unknown name, a merged adapter, a moved base (literal Delta-LoRA), a method that
    scales the base path (DoRA, DVoRA) or a bias where the base has none; OSError where the directory cannot be written.
    """
    injection = present(model, adapter_name)
    injection.config.to_peft(list(injection.layers))  # raises for what no adapter file can hold
    check_unmerged(injection.layers.values(), "exporting it")
    factors: dict[str, PlainLoRA] = {}
    biases: dict[str, Tensor] = {}
    with torch.no_grad():
        for path, adapter in injection.adapters.items():
            layer = injection.layers[path]
            form = layer.settled_form(adapter)
            try:
                lora = plain_lora(form)
            except ValueError as error:
                raise ValueError(f"adapter {adapter_name!r} is no LoRA: {path}: {error}") from None
            if form.bias is not None and layer.base_bias is None:
                raise ValueError(f"adapter {adapter_name!r} is no plain LoRA: it adds a bias to {path}, which has none")
            if form.bias is not None and form.bias is not layer.base_bias:
                biases[path] = form.bias
                if not lora.A.shape[0]:  # a layer in the file needs a rank
                    lora = PlainLoRA(lora.A.new_zeros(1, lora.A.shape[1]), lora.B.new_zeros(lora.B.shape[0], 1), 1.0)
            if lora.A.shape[0]:
                factors[path] = lora
        old = injection.config
        config, adapters = lora_of(
            {path: injection.layers[path] for path in factors},
            factors,
            **selection_of(model, list(factors)),
            bias="lora_only" if biases else "none",
            modules_to_save=old.modules_to_save,
            task_type=old.task_type,
            base_model_name_or_path=old.base_model_name_or_path,
            revision=old.revision,
            fan_in_fan_out=old.fan_in_fan_out,
        )
        for path, bias in biases.items():
            adapters[path].get_parameter("bias").copy_(bias)
    exported = injection._replace(config=config, adapters=adapters)
    _write(model, Path(directory), config.to_peft(list(factors)), _named_tensors(exported))


def export_glora(model: nn.Module, directory: str | os.PathLike[str], adapter_name: str = "default") -> None:
    """Saves a GLoRA adapter with any supports, that which a supernet computes with in eval mode too, as one that PEFT
    reads: every layer's A, B and C of one rank, its D and E vectors.

    Exact: a vector a is the first column of Xd beside a row of ones in Xu, a constant a column of equal numbers, a
    smaller rank is filled up with zeros. PEFT's GLoRA takes nn.Linear alone. Raises ValueError for an unknown name, an
    adapter of another method, a merged adapter or a bias where the base has none; OSError where the directory cannot be
    written.
    """
    injection = present(model, adapter_name)
    check_unmerged(injection.layers.values(), "exporting it")
    old, paths = injection.config, list(injection.layers)
    config, adapters = glora_of(
        injection.layers,
        injection.adapters,
        **selection_of(model, paths),
        modules_to_save=old.modules_to_save,
        task_type=old.task_type,
        base_model_name_or_path=old.base_model_name_or_path,
        revision=old.revision,
    )
    exported = injection._replace(config=config, adapters=adapters)
    _write(model, Path(directory), config.to_peft(paths), _named_tensors(exported))


def _write(model: nn.Module, target: Path, fields: dict[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Writes both files of a PEFT directory, whole or not at all."""
    if fields.get("base_model_name_or_path") is None:
        fields["base_model_name_or_path"] = getattr(model, "name_or_path", None) or None
    # Shared tensors are cloned: a safetensors file has no aliases.
    tensors = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    # A directory without a config is no adapter.
    with written_together(target, TENSOR_FILE, CONFIG_FILE) as drafts:
        try:
            save_file(tensors, drafts / TENSOR_FILE, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(
                f"the adapter could not be written to {target}, what was there is unchanged: {error}"
            ) from error
        # Sorted at the top alone: of the patterns in it the first that matches wins.
        text = json.dumps(dict(sorted(fields.items())), indent=2) + "\n"
        (drafts / CONFIG_FILE).write_text(text, encoding="utf-8")


class Contents(NamedTuple):
    """The names of a file's tensors by what they belong to.

    layers: the adapters, by module path. shared: what all of these share. saved: the copies of modules_to_save. others:
    none of these, such as the base weight of an embedding that PEFT adds.
    """

    layers: dict[str, list[str]]
    shared: list[str]
    saved: list[str]
    others: list[str]


def contents(fields: Mapping[str, Any], names: Iterable[str]) -> Contents:
    """What the tensors of these names are in a file with these fields, as the method of its peft_type names them.

    A layer whose adapter has no tensors, such as the norm that AdaptFormer reads from, is not in a file. Raises
    ValueError for a peft_type that fastadapt does not have.
    """
    method = method_of(fields)
    shared = {f"{PREFIX}{name}" for name in method.shared_names}
    suffixes = [f".{suffix}" for kind in method.adapter_classes for suffix in kind.suffixes.values()]
    copied = fields.get("modules_to_save")
    found = Contents({}, [], [], [])
    for name in names:
        path = name.removeprefix(f"{PREFIX}model.")
        suffix = next((suffix for suffix in suffixes if path != name and path.endswith(suffix)), None)
        if name in shared:
            found.shared.append(name)
        elif suffix is not None:
            found.layers.setdefault(path.removesuffix(suffix), []).append(name)
        # Those that end in one of its names are copied, as `saved_paths` has it.
        elif isinstance(copied, list) and any(f"{module}." in path for module in copied):
            found.saved.append(name)
        else:
            found.others.append(name)
    return found


def check_tensors(injection: Injection, tensors: dict[str, Tensor], source: Path) -> None:
    """Raises ValueError unless the file's tensors are those of the built adapter, in name and shape.

    Takes out of them the base weights that PEFT adds, and gives old names their new spelling.
    """
    wanted = _named_tensors(injection)
    for name in [name for name in tensors if name not in wanted]:
        # PEFT before 0.21 wrote the trained base bias under the layer's own path.
        layered = name.removesuffix(".bias") + ".base_layer.bias"
        if name.endswith(".bias") and layered in wanted:
            tensors[layered] = tensors.pop(name)
    _drop_base_weights(injection, tensors, source)
    _drop_zeros(injection, tensors, source)
    missing, surplus = sorted(wanted.keys() - tensors.keys()), sorted(tensors.keys() - wanted.keys())
    for kind, names in (("is missing", missing), ("does not belong to this config and model", surplus)):
        if names:
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            raise ValueError(f"{source}: tensor {names[0]} {kind}{more}: is this adapter for another model?")
    for name, parameter in wanted.items():
        if tensors[name].shape != parameter.shape:
            raise ValueError(
                f"{source}: {name} must have shape {tuple(parameter.shape)} for this config and model, got "
                f"{tuple(tensors[name].shape)}: is this adapter for another model?"
            )
    first: dict[int, str] = {}
    for name, parameter in wanted.items():
        same = first.setdefault(id(parameter), name)
        if not torch.equal(tensors[same], tensors[name]):
            raise ValueError(f"{source}: {same} and {name} must be equal: their layers share one tensor")


def fill(injection: Injection, tensors: dict[str, Tensor], source: Path) -> None:
    """Copies the file's tensors, which have been checked, into the built adapter.

    Raises ValueError where the adapter's dtype cannot hold a value.
    """
    with torch.no_grad():
        for name, parameter in _named_tensors(injection).items():
            value = tensors[name].to(parameter.dtype)
            if value is not tensors[name] and not torch.isfinite(value).all():
                raise ValueError(f"{source}: {name} has values that {parameter.dtype} cannot hold")
            parameter.copy_(value)


def _drop_base_weights(injection: Injection, tensors: dict[str, Tensor], source: Path) -> None:
    """PEFT saves the base weight of an adapted embedding or head too: it must be the one that the model has."""
    for path, layer in injection.layers.items():
        name = f"{PREFIX}model.{path}.base_layer.weight"
        if name not in tensors:
            continue
        weight, saved = layer.base_layer.weight, tensors.pop(name)
        if saved.shape != weight.shape or not torch.equal(saved.to(weight.device, weight.dtype), weight):
            raise ValueError(
                f"{source}: {name} is not the base weight of this model: the adapter was saved with a trained or "
                "resized embedding; give the model that weight first"
            )


def _drop_zeros(injection: Injection, tensors: dict[str, Tensor], source: Path) -> None:
    """PEFT's GLoRA saves what it does not have as zeros of full size."""
    for path in injection.layers:
        for suffix in injection.config.zero_tensors:
            name = f"{PREFIX}model.{path}.{suffix}"
            if name in tensors and tensors.pop(name).any():
                raise ValueError(f"{source}: {name} must be zero: the adapter is damaged, save it again")


def load_adapter(
    model: ModelType,
    directory: str | os.PathLike[str],
    adapter_name: str = "default",
    trainable: bool = False,
    *,
    backend: str = "auto",
    autocast_adapter_dtype: bool = True,
    limits: Limits = DEFAULT_LIMITS,
) -> ModelType:
    """Loads a PEFT directory into `model` in place as an adapter of that name, activates it and freezes the base.

    The file is taken whole or not at all: every tensor must belong to the config and the model, have the right shape
    and be finite. Ranks and scales follow the config with its patterns. Of the heads that its task type brings into
    modules_to_save the model may lack those that the file has no tensors of. trainable: whether the adapter's
    parameters require grad. limits: what the files may ask for, as in serving. Returns the model. Raises
    FileNotFoundError or ValueError that names the file, the tensor or the field and the cure, an AdapterError where it
    asks for more than there is; the model is then as it was.
    """
    with bounded(directory), time_limit(limits.max_pattern_seconds):
        tensors = read_tensors(directory, limits)
        config = recognised(read_config(directory, limits), tensors)
        injection = prepare(
            model,
            config,
            adapter_name,
            backend=backend,
            autocast_adapter_dtype=autocast_adapter_dtype,
            from_file=True,  # whose tensors decide
        )
        source = Path(directory, TENSOR_FILE)
        check_tensors(injection, tensors, source)
        fill(injection, tensors, source)
    attach(model, injection, trainable=trainable)
    return model
