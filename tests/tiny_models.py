"""Small random models of the architectures that the tests adapt, and values that hide no mistake."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

VOCAB = 67
# What a tiny Llama and its likes take, beside their vocabulary.
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}


def llama(**changes: Any) -> Any:
    """A Llama of two layers with grouped keys and values: no two of its widths are equal."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        **{"vocab_size": VOCAB, **SIZES, **changes},
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


def gpt2(**changes: Any) -> Any:
    """A GPT-2 of two layers: its linear layers are Conv1D, which store their weight as [in, out], with a bias."""
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes: dict[str, Any] = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32}
    sizes |= {"bos_token_id": 0, "eos_token_id": 0}
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(**{**sizes, **changes})).eval()
    randomise([p for name, p in model.named_parameters() if name.endswith("bias")])
    return model


class Mixed(nn.Module):
    """An embedding, a strided and padded convolution and linear layers with bias; takes token indices."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, 12, padding_idx=0)
        self.conv = nn.Conv2d(2, 5, (3, 2), stride=(2, 1), padding=1)
        self.fc1 = nn.Linear(15, 24)
        self.norm = nn.LayerNorm(24)
        self.fc2 = nn.Linear(24, 7, bias=False)
        self.head = nn.Linear(7, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens).unflatten(-1, (2, 2, 3)).flatten(0, 1)
        x = torch.relu(self.conv(x)).flatten(1)[:, :15]
        y: Tensor = self.head(torch.tanh(self.fc2(self.norm(self.fc1(x)))))
        return y


def mixed() -> Mixed:
    torch.manual_seed(0)
    return Mixed().eval()


class MLP(nn.Module):
    """Two linear layers, one with a bias of large values."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(20, 28)
        self.down = nn.Linear(28, 20, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(torch.tanh(self.up(x)))
        return y


def mlp() -> Any:
    torch.manual_seed(0)
    model = MLP().eval()
    with torch.no_grad():
        model.up.bias.normal_(std=3.0)
    return model


def tokens(batch: int = 2, length: int = 9) -> Tensor:
    return torch.randint(1, VOCAB, (batch, length), generator=torch.Generator().manual_seed(1))


# One layer each, by the start of their models' names in transformers.
FAMILIES: dict[str, dict[str, Any]] = {
    "Bert": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48},
    "DistilBert": {"dim": 32, "n_layers": 1, "n_heads": 4, "hidden_dim": 48},
    "Llama": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48},
    "Roberta": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48},
}


def headed(name: str, **changes: Any) -> Any:
    """A model of one layer by its name in transformers, BertForTokenClassification for example, of five classes; biases
    are not zero."""
    import transformers

    family = name.partition("For")[0].removesuffix("Model")
    sizes = {"vocab_size": VOCAB, "pad_token_id": 0, "num_labels": 2 if name.endswith("QuestionAnswering") else 5}
    config = getattr(transformers, f"{family}Config")(**{**FAMILIES[family], **sizes, **changes})
    torch.manual_seed(0)
    model = getattr(transformers, name)(config).eval()
    randomise([p for name, p in model.named_parameters() if name.endswith("bias")])
    return model


def output(model: Any, inputs: Tensor) -> Tensor:
    """The model's logits, those of a span's start and end in one, or what it returns where that is a tensor."""
    result = model(inputs)
    if hasattr(result, "start_logits"):
        return torch.stack([result.start_logits, result.end_logits], -1)
    logits: Tensor = result if isinstance(result, Tensor) else result.logits
    return logits


def randomise(parameters: Iterable[Tensor], seed: int = 5) -> None:
    """Fill with normal values of the parameter's own seed: an adapter at its start would hide most mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)


def vit(**changes: Any) -> Any:
    """A ViT for images of 8 x 8 with 16 patches, three blocks and a head for five classes; biases are not zero."""
    from transformers import ViTConfig, ViTForImageClassification

    sizes: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
    sizes |= {"intermediate_size": 48, "image_size": 8, "patch_size": 2, "num_channels": 1, "num_labels": 5}
    sizes["initializer_range"] = 0.2  # so that every part shows in the output
    torch.manual_seed(0)
    model = ViTForImageClassification(ViTConfig(**{**sizes, **changes})).eval()
    randomise([p for name, p in model.named_parameters() if name.endswith("bias")])
    return model


def images(batch: int = 2) -> Tensor:
    return torch.randn(batch, 1, 8, 8, generator=torch.Generator().manual_seed(1))
