"""`fastadapt convert`: an adapter from one library's layout into another's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..model.layouts.layout import Spelled
    from ..model.layouts.names import Names

TARGETS = ("peft", "diffusers", "kohya", "lora", "experts")
# Those that are a PEFT directory; in that of "experts" each linear layer of each expert has a LoRA.
DIRECTORIES = ("peft", "lora", "experts")


def convert_to(
    source: Path, output: Path, to: str, model: str | None, component: str | None, force: bool, report: Any
) -> list[str]:
    """Reads an adapter, says it in the other layout, writes that whole or not at all; returns what to tell the user.

    Raises ValueError for what the target cannot hold, FileExistsError for an output that is there unless `force`.
    """
    from ..methods.patterns import time_limit
    from ..model.untrusted import DEFAULT_LIMITS, bounded

    if to not in TARGETS:
        raise ValueError(f"--to must be one of {', '.join(TARGETS)}, got {to!r}")
    file = _output_file(output, to)
    if file.exists() and not force:
        raise FileExistsError(f"{file} exists: choose another place, or replace it with --force")
    # It is a file of strangers, with expressions in its patterns.
    with bounded(source), time_limit(DEFAULT_LIMITS.max_pattern_seconds):
        return _converted(source, output, file, to, model, component, report)


def _converted(
    source: Path, output: Path, file: Path, to: str, model: str | None, component: str | None, report: Any
) -> list[str]:
    from ..files import written_whole
    from ..model.layouts.diffusers import diffusers_file
    from ..model.layouts.kohya import kohya_tensors
    from ..model.saving import write_directory

    report(f"reading {source}")
    adapters = _read(source, model, component, whole=to in ("diffusers", "kohya"))
    report(f"writing {output}")
    if to in DIRECTORIES:
        spelled = _only(adapters, source)
        if to == "experts":
            if not spelled.fields.get("target_parameters"):
                raise ValueError(
                    f"{source} has no stacked experts in target_parameters to take apart: --to peft keeps it as it is"
                )
            return _exported(source, output, spelled, model)
        if to == "lora" and spelled.fields.get("peft_type") != "LORA":
            return _exported(source, output, spelled, model)
        if to == "lora" and spelled.fields.get("use_dora"):
            raise ValueError(
                f"{source} is a DoRA, which scales the base weight, and no low-rank addition can do that: keep it a "
                "DoRA (--to peft), or write it into its base with fastadapt merge"
            )
        write_directory(output, spelled.fields, {name: tensor.contiguous() for name, tensor in spelled.tensors.items()})
    else:
        if to == "diffusers":
            tensors, metadata = diffusers_file(adapters, source)
        else:
            tensors, metadata = kohya_tensors(adapters, source), {"format": "pt"}
        from safetensors.torch import save_file

        file.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(file) as draft:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, draft, metadata=metadata)
    return [f"converted {source} into {file if file.suffix else output}: {_counted(adapters)}"]


def _output_file(output: Path, to: str) -> Path:
    """The file that tells whether the output is there. Raises ValueError for a name that the layout has not."""
    from ..model.layouts.diffusers import FILE
    from ..model.peft_files import TENSOR_FILE

    is_file = output.suffix == ".safetensors"
    if to in DIRECTORIES:
        if is_file:
            raise ValueError(f"OUT must be a directory for --to {to}, which has two files, got {output}")
        return output / TENSOR_FILE
    if to == "diffusers":
        return output if is_file else output / FILE
    if not is_file:
        raise ValueError(f"OUT must be the name of a file that ends in .safetensors for --to {to}, got {output}")
    return output


def _read(source: Path, model: str | None, component: str | None, *, whole: bool) -> dict[str, Spelled]:
    """The adapters of a file by component of a pipeline; whole: whether each must have the name of one."""
    from ..model.layouts.bases import base_names
    from ..model.layouts.layout import Spelled
    from ..model.layouts.source import foreign_file, read_source
    from ..model.peft_files import read_directory

    file = foreign_file(source)
    if file is None:
        parts = read_directory(source)
        found = {"": Spelled(parts.fields, parts.tensors)}
    else:
        read = read_source(file)
        if read.layout.flat and model is None:
            raise ValueError(
                f"{file} is in the layout of {read.layout.title}, whose names have underscores for dots: give --model, "
                "the base model's directory or safetensors file, which has the names"
            )
        names = {} if model is None else base_names(model)
        chosen = [component] if component in read.components else [*read.components]
        if component is not None and component not in read.components and "" not in read.components:
            raise ValueError(f"--component must be one of {', '.join(chosen)} of {file}, got {component}")
        found = dict([_full(read, name, names, model) for name in chosen])
    if "" in found and component is not None:
        found = {component: found[""]}
    if whole and "" in found:
        raise ValueError(
            f"{source} does not say which component of a pipeline it is for: give --component unet, transformer, "
            "text_encoder or the like"
        )
    return found


def _full(read: Any, component: str, names: Mapping[str, Names], model: str | None) -> tuple[str, Spelled]:
    """(component as the base model calls it, its adapter with all fields of a config)."""
    from ..methods import LoRAConfig
    from ..model.layouts.source import spelled

    called = "transformer" if component == "unet" and "unet" not in names and "transformer" in names else component
    known = names.get(called, names.get(""))
    if names and known is None:
        raise ValueError(
            f"{model} must have a directory {called} with the weights that this part of {read.path} adapts"
        )

    def is_embedding(path: str) -> bool:
        if "embed" in (last := path.rsplit(".", 1)[-1]) or last in ("wte", "wpe"):
            raise ValueError(
                f"{read.path}: {path} seems to be an embedding, whose factors PEFT calls otherwise: load it into its "
                "model with load_adapter, and save it from there with save_adapter"
            )
        return False

    found = spelled(read, component, known, lambda paths: {"target_modules": paths}, is_embedding)
    if component not in read.fields:
        fields = LoRAConfig.from_peft(found.fields).to_peft(found.fields["target_modules"])
        found = found._replace(fields=fields)
    return called, found


def _only(adapters: Mapping[str, Spelled], source: Path) -> Spelled:
    if len(adapters) > 1:
        raise ValueError(
            f"{source} holds {', '.join(adapters)}, and a PEFT directory holds one model's adapter: say which, with "
            "--component"
        )
    (spelled,) = adapters.values()
    return spelled


def _exported(source: Path, output: Path, spelled: Spelled, model: str | None) -> list[str]:
    """Writes an adapter of another method as a plain LoRA, where it is one."""
    from ..model.checkpoint import export_lora, load_adapter
    from ..model.peft_files import read_config
    from .merge import base_of
    from .quiet import quiet_transformers

    kind = spelled.fields.get("peft_type")
    if model is None:
        raise ValueError(
            f"{source} is a {kind}, and what is made of it has the sizes of its base model's layers: give --model, the "
            "directory or hub name of a transformers model"
        )
    with quiet_transformers():
        base, _ = base_of(read_config(source), model, source)
    export_lora(load_adapter(base, source), output)
    return [f"converted {source}, a {kind}, into the LoRA {output}, which computes the same"]


def _counted(adapters: Mapping[str, Spelled]) -> str:
    """What was converted, in words."""
    from ..model.adapted import PREFIX

    parts = []
    for component, spelled in adapters.items():
        paths = {name.removeprefix(f"{PREFIX}model.").rpartition(".lora_")[0] for name in spelled.tensors}
        count = len(paths - {""})
        parts.append(f"{count} module{'s' * (count != 1)}{f' of {component}' if component else ''}")
    return ", ".join(parts)
