"""Saving: adapters as PEFT directories, by `save_adapter` and by the save_pretrained of the model that carries them."""

from __future__ import annotations

import inspect
import json
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from ..files import sha256_of, written_together, written_whole
from ..layers.layer import AdapterLayer
from ..layers.saved import ModuleToSave
from ..methods import AdapterConfig
from .adapted import PREFIX, Injection, active_adapters, adapter_layers, base_tensor, part_of, present
from .experts import lost_in_peft
from .peft_files import CONFIG_FILE, OWN_CONFIG, REPLACED, TENSOR_FILE
from .quantized import half_plain, made_plain, saved_as_they_are
from .sharded import is_first, is_sharded, whole
from .targets import selection_of
from .tying import untied
from .wrappers import inside

# What transformers calls a model's own two files.
MODEL_CONFIG, MODEL_TENSORS = "config.json", "model.safetensors"


def save_adapter(model: nn.Module, directory: str | os.PathLike[str], adapter_name: str = "default") -> None:
    """Saves one adapter as a PEFT directory: adapter_config.json and adapter_model.safetensors.

    Both files are written beside their places and then renamed, so that a full disk or any other error leaves an
    adapter that was there before as it was, and a kill never a mixture of two. Their modes are those that the umask
    gives. Under FSDP2 every rank has to call this, to put the pieces together, and rank 0 writes. Raises ValueError for
    an unknown adapter name or an adapter that ZeRO-3 has cut, OSError where the directory cannot be written.
    """
    _save(model, Path(directory), present(model, adapter_name))


def _save(model: nn.Module, target: Path, injection: Injection) -> None:
    if any(adapter.variant is not None for adapter in injection.adapters.values()):
        warnings.warn(
            f"adapter {injection.name!r} is saved as the whole supernet, without the supports that are chosen now: "
            "export_glora saves the subnet",
            stacklevel=3,
        )
    if lost := lost_in_peft(model, injection):
        warnings.warn(
            f"adapter {injection.name!r} is on {lost[0]}{' and others like it' if len(lost) > 1 else ''}, which PEFT "
            "leaves out when it reads the file: it takes the name for that of the experts; name such layers in "
            "exclude_modules where PEFT is to read it",
            stacklevel=3,
        )
    write_adapter(model, target, injection.config.to_peft(injection.module_paths), injection.named_tensors)


def write_adapter(model: nn.Module, target: Path, fields: dict[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Writes both files of a PEFT directory, whole or not at all; of a sharded adapter on one rank, called on all."""
    model = inside(model)
    if fields.get("base_model_name_or_path") is None:
        fields["base_model_name_or_path"] = getattr(model, "name_or_path", None) or None
    for name in model.__dict__.get("replaced_base", ()):
        path, _, leaf = name.rpartition(".")
        layered = any(other.startswith(f"{PREFIX}model.{path}.") for other in tensors)
        spelled = f"{PREFIX}model.{path}.{'base_layer.' if layered else ''}{leaf}"
        tensors = {spelled: base_tensor(model, name), **tensors}
    # Shared tensors are cloned: a safetensors file has no aliases.
    sharded = any(map(is_sharded, tensors.values()))
    tensors = {name: whole(name, tensor).detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    if not sharded or is_first():
        write_directory(target, fields, tensors)


def write_directory(target: Path, fields: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Writes both files of a PEFT directory, whole or not at all. Raises OSError where that cannot be."""
    # Sorted at the top alone: of the patterns in it the first that matches wins.
    text = json.dumps(dict(sorted(fields.items())), indent=2) + "\n"
    metadata = {"format": "pt"}
    old = target / CONFIG_FILE
    if old.is_file() and old.read_bytes() != text.encode():
        metadata |= {OWN_CONFIG: text, REPLACED: sha256_of(old)}
    with written_together(target, TENSOR_FILE, CONFIG_FILE) as drafts:
        try:
            save_file(dict(tensors), drafts / TENSOR_FILE, metadata=metadata)
        except SafetensorError as error:
            raise OSError(
                f"the adapter could not be written to {target}, what was there is unchanged: {error}"
            ) from error
        (drafts / CONFIG_FILE).write_bytes(text.encode())


def hook_saving(model: nn.Module, kind: type[nn.Module], save: Callable[..., Any]) -> None:
    """Has the modules of `model` that have a save_pretrained and layers of this kind save by save(module, ...).

    That of their class would write the tensors by the names that they have now, which from_pretrained does not know.
    """
    for module in model.modules():
        carries = any(isinstance(part, kind) for part in module.modules())
        if carries and "save_pretrained" not in module.__dict__ and _saves_itself(module):
            # A partial of a function is copied and pickled with the module, and is then the copy's.
            module.__dict__["save_pretrained"] = Hook(save, module)


def unhook_saving(model: nn.Module) -> None:
    """Gives the modules of `model` the save_pretrained of their classes back."""
    for module in model.modules():
        if isinstance(module.__dict__.get("save_pretrained"), Hook):
            del module.__dict__["save_pretrained"]


class Hook(partial[Any]):
    """A save_pretrained that `hook_saving` has put into a module."""


def _saves_itself(module: nn.Module) -> bool:
    """Whether the save_pretrained of a module's class writes its tensors, and does not leave that to its parts."""
    if not callable(getattr(type(module), "save_pretrained", None)):
        return False
    if any(base.__name__ == "PreTrainedModel" for base in type(module).__mro__):
        return True
    return not any(callable(getattr(type(part), "save_pretrained", None)) for part in [*module.modules()][1:])


def save_pretrained(
    configs: dict[str, AdapterConfig],
    module: nn.Module,
    save_directory: str | os.PathLike[str],
    *args: Any,
    **kwargs: Any,
) -> Any:
    """The save_pretrained of a module while it carries the adapters of these configs.

    Where none is active, or they are merged, it is that of the module's class, of the plain model. Otherwise it saves
    the active adapter as a PEFT directory, which transformers' from_pretrained reads on top of the base model that it
    names. Who passes a state_dict, if only None, as trainers do, gets the whole state beside it, by the names that
    load_state_dict takes back; no from_pretrained takes it for a model's.
    Raises ValueError where no adapter directory can hold what the module computes (only warns beside a state_dict), for
    a directory in which the other kind lies already, and for push_to_hub.
    """
    save = type(module).save_pretrained  # type: ignore[attr-defined]
    bound = inspect.signature(save).bind(module, save_directory, *args, **kwargs)
    given, target = bound.arguments, Path(save_directory)
    merged = any(layer.merged for layer in adapter_layers(module).values())
    active = [] if merged else active_adapters(module, configs)
    if not active:
        _check_free(target, CONFIG_FILE, "an adapter, which would be taken for one of this model")
        check_readable(module)
        names = _names(module)
        with _plain(module):
            if given.get("state_dict") is not None:
                given["state_dict"] = _renamed(given["state_dict"], names, _names(module))
            return save(*bound.args, **bound.kwargs)
    # The other ranks are here for their pieces, where nobody has put the state together.
    sharded = given.get("state_dict") is None and any(map(is_sharded, module.parameters()))
    if not given.get("is_main_process", True) and not sharded:
        return None
    if given.get("push_to_hub"):
        raise ValueError("push_to_hub needs a plain model: save the adapter first, and upload its directory")
    state: Mapping[str, Any] | None = given.get("state_dict")
    try:
        injection = _alone(module, configs, active)
        fields = injection.config.to_peft(injection.module_paths)
    except ValueError as error:
        _check_free(target, CONFIG_FILE, "an adapter, which this one cannot replace")
        if "state_dict" not in given:
            raise
        warnings.warn(f"{target} gets the state of the training alone, and no adapter: {error}", stacklevel=2)
    else:
        if "state_dict" not in given:
            _check_free(target, MODEL_CONFIG, "a model, which would be taken for the base of this adapter")
        if module.__dict__.get("adapter_configs") is not configs:
            fields |= selection_of(module, list(injection.layers))
        own = _names(module)
        gathered = {
            name: (state or {}).get(own.get(id(tensor), ""), tensor) for name, tensor in injection.named_tensors.items()
        }
        write_adapter(module, target, fields, gathered)
    if "state_dict" in given:
        _write_state(target / MODEL_TENSORS, module.state_dict() if state is None else state)
    return None


def new_biases(module: nn.Module) -> str:
    """In words which layers have a bias since a merge that the plain model's class has no place for; "" for none."""
    biased = [path for path, layer in adapter_layers(module).items() if layer.has_new_bias]
    if not biased:
        return ""
    others = f" (and {len(biased) - 1} more)" if len(biased) > 1 else ""
    return f"{biased[0]}{others} has a bias since the merge, which {type(inside(module)).__name__} does not have there"


def check_readable(module: nn.Module) -> None:
    """Raises ValueError where a merge has made of the model what its class would not read again."""
    cure = "unmerge(model), and save the adapter with save_adapter"
    if biases := new_biases(module):
        raise ValueError(f"{biases}: from_pretrained would leave it out; {cure}")
    if half := half_plain(module, adapter_layers(module)):
        raise ValueError(f"{half}: from_pretrained takes all for quantised; {cure}")


def _check_free(target: Path, name: str, what: str) -> None:
    if (target / name).exists():
        raise ValueError(f"{target} holds {what}: save into another directory, or take {name} out of this one")


def _alone(module: nn.Module, configs: Mapping[str, AdapterConfig], active: list[str]) -> Injection:
    """The one active adapter of a module. Raises ValueError where that is not all by which it differs from its base."""
    if len(active) > 1:
        raise ValueError(
            f"adapters {', '.join(map(repr, active))} are active together, and a directory holds one: save each"
            " with save_adapter, make one of them with add_weighted_adapter, or merge(model) first"
        )
    injection = part_of(module, active[0], configs[active[0]])
    ours = {id(p) for part in (*injection.adapters.values(), *injection.copies.values()) for p in part.parameters()}
    others = [name for name, p in module.named_parameters() if p.requires_grad and id(p) not in ours]
    if others:
        raise ValueError(
            f"{others[0]} is trained beside adapter {active[0]!r}, whose directory would not hold it: name its module "
            "in modules_to_save when you inject, or merge(model) first to save a plain model"
        )
    return injection


@contextmanager
def _plain(module: nn.Module) -> Iterator[None]:
    """The module without adapters inside the `with` block: base layers, merged ones too, in their places."""
    places = [
        (parent, name, child)
        for parent in [*module.modules()]
        for name, child in parent._modules.items()
        if isinstance(child, (AdapterLayer, ModuleToSave))
    ]
    untying: list[Any] = []
    plain = bool(made_plain(adapter_layers(module)))
    try:
        for parent, name, child in places:
            parent._modules[name] = _inside(child)
        untying = untied(module)
        for config in untying:
            config.tie_word_embeddings = False
        with saved_as_they_are(module, plain=plain):
            yield
    finally:
        for config in untying:
            config.tie_word_embeddings = True
        for parent, name, child in places:
            parent._modules[name] = child


def _inside(module: nn.Module) -> nn.Module:
    while isinstance(module, (AdapterLayer, ModuleToSave)):
        module = module.current if isinstance(module, ModuleToSave) else module.base_layer
    return module


def _names(module: nn.Module) -> dict[int, str]:
    """The name of each tensor in the state of a module, by its id; FSDP's own wrappers are in none of them."""
    tensors = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    return {id(tensor): name.replace("_fsdp_wrapped_module.", "") for name, tensor in reversed(tensors)}


def _renamed(state: Mapping[str, Any], old: Mapping[int, str], new: Mapping[int, str]) -> dict[str, Any]:
    """The state by the new names of its tensors; of the old ones only those that have one, and what is neither's."""
    known = set(old.values())
    found = {name: value for name, value in state.items() if name not in known}
    return {**found, **{name: state[old[key]] for key, name in new.items() if old.get(key) in state}}


def _write_state(path: Path, state: Mapping[str, Any]) -> None:
    """Writes tensors as a safetensors file, each once as it has no aliases, and none that is elsewhere (meta)."""
    tensors: dict[str, Tensor] = {}
    seen = set()
    sharded = False
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor) or tensor.is_meta:
            continue
        if is_sharded(tensor):
            sharded, tensor = True, whole(name, tensor)
        place = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if tensor.numel() and place in seen:
            continue
        seen.add(place)
        shares = tensor.untyped_storage().nbytes() != tensor.numel() * tensor.element_size()
        tensors[name] = tensor.clone() if shares else tensor.contiguous()
    if sharded and not is_first():
        return
    with written_whole(path) as draft:
        try:
            save_file(tensors, draft, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(f"{path} could not be written, what was there is unchanged: {error}") from error
