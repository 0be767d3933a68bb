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

    config = read_config(adapter_dir)
    local = Path(model_dir).exists()
    if local and not (Path(model_dir) / "config.json").is_file():
        raise ValueError(f"{model_dir} must be the directory of a transformers model, but it has no config.json")
    report(f"loading {model_dir}")
    model, missing = _base_of(config, model_dir, adapter_dir)
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


def _base_of(config: Any, model_dir: str, adapter_dir: Path) -> tuple[Any, list[str]]:
    """The base model in the class that the adapter was trained in, and the parameters that it has no weights for."""
    import transformers

    kinds = {
        "SEQ_CLS": transformers.AutoModelForSequenceClassification,
        "TOKEN_CLS": transformers.AutoModelForTokenClassification,
        "QUESTION_ANS": transformers.AutoModelForQuestionAnswering,
    }
    if config.task_type in kinds:
        kind = kinds[config.task_type]
        # `train` leaves the config with its classes beside the adapter, which brings the head along.
        settings = adapter_dir if (adapter_dir / "config.json").is_file() else model_dir
        classes = transformers.AutoConfig.from_pretrained(settings)
        _count_classes(kind, classes, config.task_heads, adapter_dir)
        model, found = kind.from_pretrained(
            model_dir, config=classes, dtype="auto", ignore_mismatched_sizes=True, output_loading_info=True
        )
        return model, sorted({*found["missing_keys"], *(key for key, *_ in found["mismatched_keys"])})
    architectures = transformers.AutoConfig.from_pretrained(model_dir).architectures or []
    # The model's own class, so that the saved model has every part that the base has.
    model_class = getattr(transformers, architectures[0], None) if architectures else None
    return (model_class or transformers.AutoModelForCausalLM).from_pretrained(model_dir, dtype="auto"), []


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
