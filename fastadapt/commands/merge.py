"""`fastadapt merge`: a base model with an adapter written into its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def merge_to(model_dir: str, adapter_dir: Path, output_dir: Path, report: Any) -> list[str]:
    """Merges, writes beside output_dir and renames; returns what to tell the user."""
    import transformers

    from ..files import written_whole
    from ..model.adapted import saved_modules
    from ..model.checkpoint import load_adapter
    from ..model.inject import merge as merge_adapter
    from ..model.inject import unload
    from ..model.peft_files import read_config
    from ..model.saving import check_readable

    config = read_config(adapter_dir)
    local = Path(model_dir).exists()
    if local and not (Path(model_dir) / "config.json").is_file():
        raise ValueError(f"{model_dir} must be the directory of a transformers model, but it has no config.json")
    report(f"loading {model_dir}")
    model, missing = base_of(config, model_dir, adapter_dir)
    report(f"merging {adapter_dir}")
    load_adapter(model, adapter_dir)
    brought = tuple(f"{path}." for path in saved_modules(model))
    missing = [key for key in missing if not key.startswith(brought)]
    if missing:
        raise ValueError(
            f"{model_dir} has no weights for {missing[0]} of {type(model).__name__}, and the adapter brings none: "
            "merge it into the model that it was trained on"
        )
    merge_adapter(model)
    check_readable(model)
    unload(model)
    notes = []
    with written_whole(output_dir) as built:
        report("saving")
        model.save_pretrained(built)
        try:
            transformers.AutoTokenizer.from_pretrained(model_dir).save_pretrained(built)
        except (OSError, ValueError):
            notes.append(f"{model_dir} has no tokenizer, so none was saved")
    count = sum(parameter.numel() for parameter in model.parameters())
    return [
        f"merged {type(config).title} adapter {adapter_dir} into {output_dir}: {count:,} parameters, {model.dtype}",
        *notes,
    ]


def base_of(config: Any, model_dir: str, adapter_dir: Path) -> tuple[Any, list[str]]:
    """The base model in the class that the adapter was trained in, and the parameters that it has no weights for."""
    import transformers

    kinds = {
        "SEQ_CLS": transformers.AutoModelForSequenceClassification,
        "TOKEN_CLS": transformers.AutoModelForTokenClassification,
        "QUESTION_ANS": transformers.AutoModelForQuestionAnswering,
    }
    if config.task_type in kinds:
        kind = kinds[config.task_type]
        classes = transformers.AutoConfig.from_pretrained(model_dir)
        _take_labels(classes, model_dir, adapter_dir / "config.json")
        _count_classes(kind, classes, config.task_heads, adapter_dir)
        model, found = kind.from_pretrained(
            model_dir, config=classes, dtype="auto", ignore_mismatched_sizes=True, output_loading_info=True
        )
        return model, sorted({*found["missing_keys"], *(key for key, *_ in found["mismatched_keys"])})
    architectures = transformers.AutoConfig.from_pretrained(model_dir).architectures or []
    # The model's own class, so that the saved model has every part that the base has.
    model_class = getattr(transformers, architectures[0], None) if architectures else None
    return (model_class or transformers.AutoModelForCausalLM).from_pretrained(model_dir, dtype="auto"), []


# What a config says that tells nothing of the shape of its model, or that training changes.
_INCIDENTAL = {"num_labels", "problem_type", "finetuning_task", "dtype", "torch_dtype", "transformers_version"}


def _take_labels(classes: Any, model_dir: str, path: Path) -> None:
    """Gives a base model's config the labels of the one that `train` leaves beside the adapter, which brings the head.

    It is a file of strangers: nothing else of it is used. Raises ValueError where it tells of another base model.
    """
    from ..checks import shown
    from ..model.peft_files import parse_fields
    from ..model.untrusted import DEFAULT_LIMITS, content

    if not path.is_file():
        return
    fields, own = parse_fields(content(path, DEFAULT_LIMITS.max_config_bytes), path), classes.to_dict()
    for name, value in fields.items():
        plain = isinstance(value, (int, float, str)) and not isinstance(value, bool)
        if not plain or name.startswith("_") or name.endswith("_token_id") or name in _INCIDENTAL:
            continue
        if name in own and own[name] != value:
            raise ValueError(
                f"{path} is of a model with {name} {shown(value)}, and {model_dir} has {shown(own[name])}: merge the "
                "adapter into the model that it was trained on"
            )
    names = fields.get("id2label")
    if isinstance(names, dict) and names:
        if not all(key.isdecimal() and isinstance(label, (str, int)) for key, label in names.items()):
            raise ValueError(f"{path}: id2label must have a name for each number of a class, got {shown(names)}")
        classes.id2label = {int(key): str(label) for key, label in names.items()}
        classes.label2id = {label: index for index, label in classes.id2label.items()}
    if isinstance(fields.get("problem_type"), str):
        classes.problem_type = fields["problem_type"]


def _count_classes(kind: Any, classes: Any, heads: tuple[str, ...], adapter_dir: Path) -> None:
    """Gives a transformers config as many classes as the adapter's head has: PEFT's files do not say it."""
    import torch

    from ..model.adapted import PREFIX
    from ..model.peft_files import read_tensors

    with torch.device("meta"):
        parameters = dict(kind.from_config(classes).named_parameters())
    for name, tensor in read_tensors(adapter_dir).items():
        parameter = parameters.get(name.removeprefix(f"{PREFIX}model."))
        in_head = any(f"{head}." in name for head in heads)
        # Of a head's sizes the number of classes alone may differ from that of the base.
        if in_head and parameter is not None and tensor.shape[:1] != parameter.shape[:1]:
            classes.num_labels = len(tensor)
