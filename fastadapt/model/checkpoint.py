"""PEFT adapter directories, both ways: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..checks import shown
from ..forms import PlainLoRA, plain_lora
from ..layers.experts import AdapterExperts
from ..methods import AdapterConfig, LoRAConfig
from ..methods.glora import glora_of
from ..methods.lora import lora_of
from ..methods.lora_drop import recognised
from ..methods.patterns import time_limit
from .adapted import PREFIX, Injection, adapter_configs, check_unmerged, present
from .experts import stack_experts, turn_experts
from .inject import ModelType, attach, prepare, replace_base
from .layouts.reading import read_for_model
from .layouts.source import foreign_file
from .matching import check_names, respell
from .peft_files import TENSOR_FILE, method_of, read_directory
from .saving import write_adapter
from .targets import base_modules, modules_of, output_head, selection_of
from .tying import check_equal, tie_adapters, tied_ends
from .unstacked import unstacked
from .untrusted import DEFAULT_LIMITS, Limits, bounded
from .wrappers import inside


def export_lora(model: nn.Module, directory: str | os.PathLike[str], adapter_name: str = "default") -> None:
    """Saves an adapter of any method that is low-rank alone as a plain LoRA, which every library reads.

    ΔW is the same: A' = diag(d) A, B' = diag(h) B, with each layer's rank and lora_alpha in the patterns (Delta-LoRA
    has rank 2r, AdaLoRA the triplets that it kept; LoRA-drop's shared pairs are repeated). A layer of rank 0 is left
    out. Experts, whose weights are stacked, get a LoRA for each linear layer of each of them, by the names that
    transformers 4 had for these: vLLM wants them so for Mixtral, Qwen3-MoE or DeepSeek, while for gpt-oss or Qwen3-VL
    it reads the stacks that save_adapter writes.
    Raises ValueError for an unknown name, a merged adapter, a moved base (literal Delta-LoRA), a method that
    scales the base path (DoRA, DVoRA) or a bias where the base has none; OSError where the directory cannot be written.
    """
    injection = present(model, adapter_name)
    injection.config.to_peft(list(injection.layers))  # raises for what no adapter file can hold
    check_unmerged(injection.layers.values(), "exporting it")
    if any(isinstance(layer, AdapterExperts) for layer in injection.layers.values()):
        write_adapter(model, Path(directory), *unstacked(model, injection))
        return
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
            **selection_of(model, modules_of(injection.layers, factors)),
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
    paths = modules_of(injection.layers, factors)
    write_adapter(model, Path(directory), config.to_peft(paths), exported.named_tensors)


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
    write_adapter(model, Path(directory), config.to_peft(paths), exported.named_tensors)


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


def check_tensors(
    injection: Injection,
    tensors: dict[str, Tensor],
    source: Path,
    modules: Mapping[str, nn.Module],
    head: nn.Module | None = None,
) -> dict[str, Tensor]:
    """Raises ValueError unless the file's tensors are those of the built adapter, in name and shape.

    Gives old and other libraries' names the spelling of today, and takes out the base weights that PEFT adds. modules:
    the model's, by path as they were before any injection. head: that which gives its logits. Returns those base
    weights, by "path.weight", that are not the model's own: of embeddings that were trained, or had grown, before the
    adapter was saved.
    """
    wanted = injection.named_tensors
    stack_experts(tensors, wanted)
    for name in [name for name in tensors if name not in wanted]:
        # PEFT before 0.21 wrote the trained base bias under the layer's own path.
        layered = name.removesuffix(".bias") + ".base_layer.bias"
        if name.endswith(".bias") and layered in wanted:
            tensors[layered] = tensors.pop(name)
    ends = _base_tensors(injection, modules, head)
    stems = {suffix.split(".")[0] for kind in injection.config.adapter_classes for suffix in kind.suffixes.values()}
    respell(tensors, {*wanted, *ends, *_zeros(injection)}, stems)
    changed = _changed(ends, tensors, source)
    for name in _zeros(injection):
        if name in tensors and tensors.pop(name).any():
            raise ValueError(f"{source}: {name} must be zero: the adapter is damaged, save it again")
    check_names(tensors, wanted, source)
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
    return changed


def fill(injection: Injection, tensors: dict[str, Tensor], source: Path) -> None:
    """Copies the file's tensors, which have been checked, into the built adapter.

    Raises ValueError where the adapter's dtype cannot hold a value.
    """
    with torch.no_grad():
        for name, parameter in injection.named_tensors.items():
            value = tensors[name].to(parameter.dtype)
            if value is not tensors[name] and not torch.isfinite(value).all():
                raise ValueError(f"{source}: {name} has values that {parameter.dtype} cannot hold")
            parameter.copy_(value)


def _zeros(injection: Injection) -> list[str]:
    """What PEFT's GLoRA saves as zeros of full size where it does not have it."""
    return [f"{PREFIX}model.{path}.{suffix}" for path in injection.layers for suffix in injection.config.zero_tensors]


class BaseTensor(NamedTuple):
    """A tensor of the base model that PEFT saves with an adapter.

    key: "path.weight". is_end: whether it is an embedding's or the head's.
    """

    key: str
    value: Tensor
    is_end: bool


def _base_tensors(
    injection: Injection, modules: Mapping[str, nn.Module], head: nn.Module | None
) -> dict[str, BaseTensor]:
    """The tensors of embeddings, the head and adapted layers, by the names that PEFT's files have for them."""
    wanted, found = injection.named_tensors, {}
    for path, module in modules.items():
        module = getattr(module, "base_layer", module)
        layered = path in injection.layers
        is_end = isinstance(module, nn.Embedding) or module is head
        for leaf in ("weight", "bias"):
            value = getattr(module, leaf, None) if layered or is_end else None
            name = f"{PREFIX}model.{path}.{'base_layer.' if layered else ''}{leaf}"
            if isinstance(value, Tensor) and name not in wanted:
                found[name] = BaseTensor(f"{path}.{leaf}", value, is_end)
    return found


def _changed(ends: Mapping[str, BaseTensor], tensors: dict[str, Tensor], source: Path) -> dict[str, Tensor]:
    """Takes the base model's tensors out of the file's, and returns those that this model has otherwise."""
    changed: dict[str, Tensor] = {}
    places: dict[int, str] = {}
    for name, (key, value, is_end) in ends.items():
        if name not in tensors:
            continue
        saved = tensors.pop(name)
        given = saved.to(value.device, value.dtype)
        if not is_end and not (saved.shape == value.shape and torch.equal(given, value)):
            raise ValueError(
                f"{source}: {name} is not the base weight of this model: the adapter was trained on another model"
            )
        if saved.shape != value.shape:
            raise ValueError(
                f"{source}: {name} is an embedding or a head of shape {tuple(saved.shape)}, and this model's has "
                f"{tuple(value.shape)}: the vocabulary had grown before the adapter was trained; call "
                f"resize_token_embeddings({saved.shape[0]}) on this model first"
            )
        same = places.setdefault(id(value), name)
        if same != name and not torch.equal(changed.get(ends[same].key, value), given):
            raise ValueError(
                f"{source}: {same} and {name} must be equal, since they are one weight in this model: untie it first "
                "(tie_word_embeddings=False)"
            )
        if not torch.isfinite(given).all():
            raise ValueError(f"{source}: {name} has values that {value.dtype} cannot hold")
        if not torch.equal(given, value):
            changed[key] = given
    return changed


def load_adapter(
    model: ModelType,
    directory: str | os.PathLike[str],
    adapter_name: str = "default",
    trainable: bool = False,
    *,
    backend: str = "auto",
    autocast_adapter_dtype: bool = True,
    limits: Limits = DEFAULT_LIMITS,
    component: str | None = None,
    swapped_experts: bool | None = None,
) -> ModelType:
    """Loads an adapter into `model` in place under that name, activates it and freezes the base.

    directory: a PEFT directory; or a file of diffusers' (pytorch_lora_weights.safetensors), kohya's or MLX's, or the
    directory that holds one, whose layout is told from the names of its tensors. The file is taken whole or not at all:
    every tensor must belong to the config and the model, have the right shape and be finite. Ranks and scales follow
    the config with its patterns, in a file without one the shapes and alphas. Of the heads that its task type brings
    into modules_to_save the model may lack those that the file has no tensors of. trainable: whether the adapter's
    parameters require grad. limits: what the files may ask for, as in serving. component: which part of a pipeline
    ("unet", "text_encoder") this model is, in a file that holds several; None takes the one whose modules it has, and
    warns of the others. swapped_experts: whether A and B of experts are in each other's places, as PEFT before 0.19.1
    had them; None tells by their shapes, of square matrices by the file's peft_version. Returns the model. Raises
    FileNotFoundError or ValueError that names the file, the tensor or the field and the cure, an AdapterError where it
    asks for more than there is; the model is then as it was.
    """
    cuda = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    # What is drawn at random is overwritten: the caller's own numbers go on as if nothing had been drawn.
    with bounded(directory), time_limit(limits.max_pattern_seconds), torch.random.fork_rng(cuda):
        file, others, fields = foreign_file(directory), list[str](), dict[str, Any]()
        if file is not None:
            config, tensors, others = read_for_model(model, file, component, limits)
        elif component is None:
            config, fields, tensors = read_directory(directory, limits)
        else:
            raise ValueError(f"component goes with a file of a pipeline, and {directory} is PEFT's: leave it out")
        config = recognised(config, tensors)
        injection = prepare(
            model,
            config,
            adapter_name,
            backend=backend,
            autocast_adapter_dtype=autocast_adapter_dtype,
            from_file=True,  # whose tensors decide
        )
        source = Path(directory, TENSOR_FILE) if file is None else file
        turn_experts(injection, tensors, fields, source, swapped_experts)
        changed = check_tensors(injection, tensors, source, base_modules(model), output_head(model))
        if changed and adapter_configs(model):
            raise ValueError(
                f"{source} holds another {', '.join(changed)} than this model has, trained or grown before the adapter "
                "was, and the adapters that are in the model already go with its own: unload(model) first"
            )
        fill(injection, tensors, source)
        if trainable and isinstance(config, LoRAConfig) and config.ensure_weight_tying:
            ends = tied_ends(model)
            check_equal(injection.adapters, ends)
            tie_adapters(injection.adapters, ends)
    attach(model, injection, trainable=trainable)
    _warn_of_another_base(model, config)
    if others and component is None:
        warnings.warn(
            f"{source} holds {', '.join(others)} too, which are other models' parts of it: load it into these as well, "
            "or say component=... here",
            stacklevel=2,
        )
    if changed:
        replace_base(model, changed)
        warnings.warn(
            f"{source} holds another {', '.join(changed)} than this model had, trained or grown before the adapter "
            "was: the model has that one until unload(model)",
            stacklevel=2,
        )
    return model


def _warn_of_another_base(model: nn.Module, config: AdapterConfig) -> None:
    """Warns where an adapter was trained on a model of another name; the same one may lie elsewhere here."""
    model = inside(model)
    theirs, ours = [
        str(name or "").rstrip("/\\").replace("\\", "/").split("/")[-1]
        for name in (config.base_model_name_or_path, getattr(model, "name_or_path", None))
    ]
    if theirs and ours and theirs.lower() != ours.lower():
        warnings.warn(
            f"the adapter was trained on {shown(config.base_model_name_or_path)}, and this model is "
            f"{shown(model.name_or_path)}: its shapes fit, whether its weights do nobody can see",
            stacklevel=3,
        )
