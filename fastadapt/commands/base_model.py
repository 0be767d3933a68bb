"""The base model that `fastadapt train` begins with: its dtype, its head, what is new in it."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

MAX_LENGTH = 1024


class Base(NamedTuple):
    """The model to adapt, its tokenizer, and the modules that must be trained whole because they start at random."""

    model: Any
    tokenizer: Any
    new_modules: list[str]

    @property
    def padding(self) -> int:
        """The token that fills rows up; the attention mask hides it."""
        for token in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id):
            if token is not None:
                return int(token)
        return 0

    def positions(self, wanted: int | None) -> int | None:
        """How many tokens a prompt and its answer may have, None where nothing limits them.

        Raises ValueError where the model has fewer positions than are wanted.
        """
        config = self.model.config
        limit = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
        if not isinstance(limit, int) or limit < 1:
            limit = None
        if wanted is not None and limit is not None and wanted > limit:
            raise ValueError(f"--max-length must be at most {limit}, the model's positions, got {wanted}")
        return wanted or limit

    def max_length(self, wanted: int | None) -> int:
        """The longest row in tokens. Raises ValueError where the model has fewer positions than are wanted."""
        limits = (getattr(self.model.config, "max_position_embeddings", None), self.tokenizer.model_max_length)
        limit = min((value for value in limits if isinstance(value, int) and value > 0), default=MAX_LENGTH)
        if wanted is not None and wanted > limit:
            raise ValueError(f"--max-length must be at most {limit}, the model's positions, got {wanted}")
        return wanted or min(limit, MAX_LENGTH)


def load_base(
    name: str, dtype: str, labels: Sequence[str], quantize: str | None = None, device: torch.device | None = None
) -> Base:
    """A causal language model, or with labels a classifier of these classes, and its tokenizer.

    quantize: its linear layers but the head in "nf4", with their scales quantised as well and products in `dtype`, or
    in "int8", by bitsandbytes and straight onto `device`. The rest (norms, embeddings, head) is then in fp32, and
    training checkpoints: as QLoRA has it (Dettmers et al. 2023, arXiv:2305.14314).
    Raises ValueError where it cannot be loaded, or lacks weights that nothing would train.
    """
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    if Path(name).exists() and not (Path(name) / "config.json").is_file():
        raise ValueError(f"{name} must be the directory of a transformers model, but it has no config.json")
    kind: Any = AutoModelForSequenceClassification if labels else AutoModelForCausalLM
    classes: dict[str, Any] = {
        "id2label": dict(enumerate(labels)),
        "label2id": {label: index for index, label in enumerate(labels)},
        "problem_type": "single_label_classification",
        "ignore_mismatched_sizes": True,  # a head for other classes gives way to a new one
    }
    options: dict[str, Any] = {"dtype": DTYPES[dtype], **(classes if labels else {})}
    if quantize is not None:
        options |= _quantized(quantize, dtype, device)
    try:
        model, found = kind.from_pretrained(name, output_loading_info=True, **options)
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot load the model {name}: {str(error).strip().splitlines()[0]}") from error
    missing = sorted({*found["missing_keys"], *(key for key, *_ in found["mismatched_keys"])})
    if missing and not labels:
        raise ValueError(
            f"{name} has no weights for {missing[0]} of {type(model).__name__}: choose a model for text generation, or "
            "give DATA the columns text and label to train a classifier"
        )
    if quantize is not None:
        _prepare_quantized(model)
    model.config.use_cache = False  # it would copy keys and values for tokens that are never generated
    base = Base(model, tokenizer, _new_modules(model, missing) if labels else [])
    if labels:
        model.config.pad_token_id = base.padding  # decoders read the class at the last token before the padding
    return base


def _quantized(kind: str, dtype: str, device: torch.device | None) -> dict[str, Any]:
    """What `from_pretrained` is told to quantise. Raises ValueError where a library for it is missing."""
    missing = [library for library in ("bitsandbytes", "accelerate") if importlib.util.find_spec(library) is None]
    if missing:
        raise ValueError(
            f"quantising to {kind} needs {' and '.join(missing)}, not installed: pip install 'fastadapt[quantized]'"
        )
    from transformers import BitsAndBytesConfig

    if kind == "nf4":
        how = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=DTYPES[dtype],
        )
    else:
        how = BitsAndBytesConfig(load_in_8bit=True)
    place = {"": device or torch.device("cpu")}
    return {"quantization_config": how, "device_map": place, "dtype": torch.float32}


def _prepare_quantized(model: Any) -> None:
    """Training checkpoints, and evaluation on a CPU leaves the weights as they are.

    On some CPUs bitsandbytes packs a 4-bit weight for bf16 products when it is first read in eval mode, its scales in
    bf16 from then on, and a backward through it fails.
    """
    if model.supports_gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for module in model.modules():
        if hasattr(module, _PACKS):
            setattr(module, _PACKS, False)


_PACKS = "support_avx512bf16_for_cpu"


def _new_modules(model: Any, missing: list[str]) -> list[str]:
    """The classifier's own modules beside the base model, and whatever else the checkpoint has no weights for."""
    heads = [
        name
        for name, child in model.named_children()
        if model.base_model is not model and child is not model.base_model and any(True for _ in child.parameters())
    ]
    others = {key.rpartition(".")[0] for key in missing if key.split(".", 1)[0] not in heads}
    return sorted({*heads, *others})


# A file of weights up to this many bytes is hashed whole; of a larger one so many blocks, spread over all of it.
_WHOLE_BYTES = 64 << 20
_BLOCKS, _BLOCK_BYTES = 256, 64 << 10

_WEIGHTS = ("config.json", "*.safetensors", "*.bin", "*.safetensors.index.json")
_TOKENIZER = ("tokenizer*", "vocab*", "merges.txt", "*.model", "special_tokens_map.json", "added_tokens.json", "chat_*")


def weights_digest(name: str) -> str | None:
    """A hash by which other weights at the same place are noticed: of a local model's config and of its files' sizes,
    headers and contents, of large ones in blocks spread over them; of a hub's the commit. None where nothing tells."""
    return _digest(name, _WEIGHTS)


def tokenizer_digest(name: str) -> str | None:
    """The same for the tokenizer's files."""
    return _digest(name, _TOKENIZER)


def _digest(name: str, patterns: Sequence[str]) -> str | None:
    directory = Path(name)
    if not directory.is_dir():
        from transformers import AutoConfig

        try:
            return getattr(AutoConfig.from_pretrained(name), "_commit_hash", None)
        except (OSError, ValueError):
            return None  # loading the model will say why
    digest = hashlib.sha256()
    for path in sorted({path for pattern in patterns for path in directory.glob(pattern) if path.is_file()}):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            if size <= _WHOLE_BYTES:
                digest.update(file.read())
                continue
            for block in range(_BLOCKS):  # the first has the header
                file.seek(block * (size - _BLOCK_BYTES) // (_BLOCKS - 1))
                digest.update(file.read(_BLOCK_BYTES))
    return digest.hexdigest()


# What --quantize takes.
QUANTIZED = ("nf4", "int8")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
