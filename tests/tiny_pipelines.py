"""Models with the module paths that diffusers' pipelines have, each layer on an input of its own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
RESNET = "down_blocks.0.resnets.0"
TEXT = "text_model.encoder.layers.0"


class Tree(nn.Module):
    """Layers at paths. Its output is that of every layer, in order, as one vector."""

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        super().__init__()
        for path, layer in layers.items():
            *around, name = path.split(".")
            parent: nn.Module = self
            for part in around:
                if part not in parent._modules:
                    parent.add_module(part, nn.Module())
                parent = parent.get_submodule(part)
            parent.add_module(name, layer)
        self.paths = list(layers)

    def forward(self, seed: int) -> Tensor:
        return torch.cat([self.get_submodule(path)(sample(self, path, seed)).flatten() for path in self.paths])


def sample(model: nn.Module, path: str, seed: int) -> Tensor:
    """The input of the layer at a path."""
    layer = model.get_submodule(path)
    layer = getattr(layer, "base_layer", layer)
    generator = torch.Generator().manual_seed(seed)
    if isinstance(layer, nn.Conv2d):
        return torch.randn(2, layer.in_channels, 5, 5, generator=generator)
    if isinstance(layer, nn.Embedding):
        return torch.arange(layer.num_embeddings)
    assert isinstance(layer, nn.Linear)
    return torch.randn(3, layer.in_features, generator=generator)


def unet() -> Tree:
    torch.manual_seed(0)
    layers: dict[str, nn.Module] = {"conv_in": nn.Conv2d(2, 4, 3, padding=1)}
    layers |= {f"{BLOCK}.{name}": nn.Linear(6, 8) for name in ("to_q", "to_k", "to_v", "to_out.0")}
    layers |= {f"{RESNET}.conv1": nn.Conv2d(4, 6, 3), f"{RESNET}.time_emb_proj": nn.Linear(5, 6)}
    return Tree(layers).eval()


def text_encoder(width: int = 6, start: str = TEXT) -> Tree:
    torch.manual_seed(1)
    names = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "mlp.fc1")
    return Tree({f"{start}.{name}": nn.Linear(width, width + 1) for name in names}).eval()


def save_weights(model: nn.Module, file: Path) -> Path:
    """A base model's own file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, file)
    return file


def factors(layer: nn.Module, r: int, seed: int) -> tuple[Tensor, Tensor]:
    """A and B of a layer, in PEFT's shapes."""
    generator = torch.Generator().manual_seed(seed)
    if isinstance(layer, nn.Conv2d):
        A = torch.randn(r, *layer.weight.shape[1:], generator=generator)
        return A, torch.randn(layer.out_channels, r, 1, 1, generator=generator)
    weight = layer.get_parameter("weight")
    if isinstance(layer, nn.Embedding):
        weight = weight.T
    return torch.randn(r, weight.shape[1], generator=generator), torch.randn(weight.shape[0], r, generator=generator)


def merged(model: Tree, deltas: Mapping[str, tuple[Tensor, Tensor, float]], magnitudes: Mapping[str, Tensor]) -> Tree:
    """The model with s · B A in the weights at these paths, and rows of these norms: what an adapter computes."""
    with torch.no_grad():
        for path, (A, B, scale) in deltas.items():
            weight = model.get_submodule(path).get_parameter("weight")
            delta = scale * (B.double().flatten(1) @ A.double().flatten(1))
            whole = weight.double() + (delta.T if delta.shape != weight.flatten(1).shape else delta).view_as(weight)
            if path in magnitudes:
                whole = F.normalize(whole.flatten(1), dim=1).view_as(whole) * magnitudes[path].double()[:, None]
            weight.copy_(whole)
    return model
