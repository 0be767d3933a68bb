"""What `fastadapt info` tells of an adapter."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable
from itertools import accumulate
from pathlib import Path
from typing import Any


def describe_adapter(directory: Path) -> dict[str, str]:
    """What `info` shows, in order, of a PEFT directory or of another library's file.

    Raises FileNotFoundError or ValueError where there is no adapter to describe.
    """
    import math

    from ..model.layouts.source import foreign_file
    from ..model.peft_files import CONFIG_FILE, TENSOR_FILE, check_present, read_config, read_fields, read_tensors
    from ..model.untrusted import DEFAULT_LIMITS, AdapterError, bounded, one_line, tensor_header

    with bounded(directory):
        foreign = foreign_file(directory)
    if foreign is not None:
        return _describe_foreign(foreign)
    tensor_file = directory / TENSOR_FILE
    if not directory.is_dir():
        raise FileNotFoundError(
            f"{directory} is not a directory: an adapter directory holds {CONFIG_FILE} and {TENSOR_FILE}"
        )
    with bounded(directory):
        fields = read_fields(directory)
        check_present(directory, TENSOR_FILE)  # it knows the other forms of a checkpoint, and says why each is refused
        header = tensor_header(tensor_file, DEFAULT_LIMITS).tensors
    shapes: dict[str, list[int]] = {}
    dtypes: dict[str, int] = {}
    for name, entry in header.items():
        dtype, shape = (entry.get(key) if isinstance(entry, dict) else None for key in ("dtype", "shape"))
        sizes = shape if isinstance(shape, list) and all(type(size) is int and size >= 0 for size in shape) else None
        if sizes is None:
            raise ValueError(f"{tensor_file} is not a valid safetensors file: {one_line(name)} has no shape")
        shapes[name] = sizes
        dtypes[str(dtype)] = dtypes.get(str(dtype), 0) + 1
    reason = ""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            with bounded(directory):
                read_config(directory)
                read_tensors(directory)
        except AdapterError as error:
            reason = error.reason
        except ValueError as error:
            reason = str(error)
    facts = {
        "method": method_name(fields),
        "r": _ranks(fields),
        "alpha": _ending_in("alpha", fields),
        "dropout": _ending_in("dropout", fields),
        "targets": _targets(fields),
        "modules_to_save": _saved(fields.get("modules_to_save"), shapes),
        "base model": str(fields.get("base_model_name_or_path") or "-"),
        **_tensor_facts(fields, {name: math.prod(shape) for name, shape in shapes.items()}),
        "dtype": ", ".join(f"{dtype} ({count} tensors)" for dtype, count in sorted(dtypes.items())),
        "size": f"{tensor_file.stat().st_size:,} bytes",
        "fastadapt": f"cannot load it: {reason}" if reason else "can load it",
    }
    if caught:
        facts["note"] = "; ".join(str(warning.message) for warning in caught)
    return {name: one_line(value, 2000) for name, value in facts.items()}


def _describe_foreign(file: Path) -> dict[str, str]:
    """What `info` shows of a file of diffusers', kohya's or MLX's, as far as that can be told without a model."""
    from ..model.layouts.layout import rank_of
    from ..model.layouts.source import read_source
    from ..model.untrusted import DEFAULT_LIMITS, AdapterError, bounded, one_line, tensor_header

    with bounded(file):
        header = tensor_header(file, DEFAULT_LIMITS).tensors
    facts = {"tensors": f"{len(header)}", "size": f"{file.stat().st_size:,} bytes"}
    reason = ""
    try:
        with bounded(file):
            source = read_source(file)
    except AdapterError as error:
        reason = error.reason
    except (OSError, ValueError) as error:
        reason = str(error)
    else:
        said = {"layout": source.layout.title}
        for component, layers in source.components.items():
            ranks = {rank_of(layer) for layer in layers.values()}
            dora = any("magnitude" in layer for layer in layers.values())
            between = f"{min(ranks)}" if len(ranks) == 1 else f"{min(ranks)} to {max(ranks)}"
            said[component or "adapter"] = f"{'DoRA' if dora else 'LoRA'} of {len(layers)} layers, r {between}"
        facts = said | facts
    facts["fastadapt"] = f"cannot load it: {reason}" if reason else "can load it, into a model with these modules"
    return {name: one_line(value, 2000) for name, value in facts.items()}


def _tensor_facts(fields: dict[str, Any], numbers: dict[str, int]) -> dict[str, str]:
    """How many layers and parameters a file holds, by what they belong to. numbers: the elements of each tensor."""
    from ..model.checkpoint import contents

    try:
        found = contents(fields, numbers)
    except ValueError:
        unknown = "unknown: fastadapt does not know how this method names its tensors"
        return {"layers": unknown, "parameters": f"{sum(numbers.values()):,}"}
    parts = {
        " of the frozen shared projection": found.shared,
        " of modules_to_save": found.saved,
        " in other tensors": found.others,
    }
    counts = [f"{sum(numbers[name] for names in found.layers.values() for name in names):,}"]
    counts += [f"{sum(numbers[name] for name in names):,}{what}" for what, names in parts.items() if names]
    facts = {"layers": f"{len(found.layers)}", "parameters": ", and ".join(counts)}
    if found.others:
        more = f" (and {len(found.others) - 1} more)" if len(found.others) > 1 else ""
        facts["other tensors"] = f"{found.others[0]}{more}"
    return facts


def method_name(fields: dict[str, Any]) -> str:
    """The method that adapter_config.json describes, by its usual name, or the file's own where it is none of ours."""
    from ..model.peft_files import method_of

    try:
        return method_of(fields).named(fields)
    except ValueError:
        return str(fields.get("peft_type"))


def _ending_in(word: str, fields: dict[str, Any]) -> str:
    """The value of the field that a method calls lora_alpha, vera_dropout or the like; "-" where it has none."""
    return str(next((value for name, value in fields.items() if f"_{name}".endswith(f"_{word}")), "-"))


def _ranks(fields: dict[str, Any]) -> str:
    """The rank, or the ranks of the layers where they differ; "-" where the method has none."""
    from ..model.peft_files import method_of

    with contextlib.suppress(ValueError):
        if not method_of(fields).uses_r:
            return "-"
    pattern = fields.get("rank_pattern")
    values = [
        sum(value) if isinstance(value, list) and all(isinstance(part, int) for part in value) else value
        for value in (pattern.values() if isinstance(pattern, dict) else ())
    ]
    r = fields.get("init_r", fields.get("r", "-"))
    if not all(isinstance(value, int) for value in values) or not values:
        return str(r)
    others = str(min(values)) if len(set(values)) == 1 else f"{min(values)} to {max(values)}"
    return f"{r}, and {others} where rank_pattern says so"


def _saved(names: Any, tensors: Iterable[str]) -> str:
    """modules_to_save: the names of what the file has tensors of, then those that only other models have."""
    if not isinstance(names, list):
        return _listed(names)
    paths = {path for name in tensors for path in accumulate(name.split(".")[:-1], "{}.{}".format)}
    unique = sorted({str(name) for name in names})
    there = [name for name in unique if any(path.endswith(name) for path in paths)]
    absent = [name for name in unique if name not in there]
    return ", ".join(there or ["-"]) + (f" (no tensors of {', '.join(absent)})" if absent else "")


def _targets(fields: dict[str, Any]) -> str:
    """What target_modules and target_parameters name."""
    modules, parameters = fields.get("target_modules"), fields.get("target_parameters")
    if not isinstance(parameters, list) or not parameters:
        return _listed(modules)
    names = sorted({".".join(str(name).split(".")[-2:]) for name in parameters})
    return ", ".join([*([_listed(modules)] if modules else []), f"the parameters {', '.join(names)}"])


def _listed(value: Any) -> str:
    if isinstance(value, list):
        # Whole module paths, as they are saved for "all-linear", say more by their last parts.
        names = sorted({str(item).rsplit(".", 1)[-1] for item in value})
        return ", ".join(names) + (f" ({len(value)} modules by path)" if len(names) < len(value) else "")
    return "-" if value is None else str(value)
