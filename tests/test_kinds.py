"""Embeddings, convolutions and norms that are not plain, in models as they are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from test_ways import randomise
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import fastadapt
from fastadapt import LoRAConfig, SSFConfig

SEQ2SEQ: dict[str, Any] = {
    **dict.fromkeys(("encoder_layers", "decoder_layers"), 1),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 2),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "d_model"), 16),
    "vocab_size": 40,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "scale_embedding": True,
}
GEMMA: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
}
# Models whose embeddings scale what they look up, or count positions: the layers, and whether PEFT has the same.
EMBEDDINGS: dict[str, tuple[Callable[[], Any], list[str], bool]] = {
    "Gemma": (lambda: hf.GemmaForCausalLM(hf.GemmaConfig(**GEMMA)), ["embed_tokens"], True),
    "Gemma2": (lambda: hf.Gemma2ForCausalLM(hf.Gemma2Config(**GEMMA)), ["embed_tokens"], True),
    "Gemma3": (lambda: hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**GEMMA)), ["embed_tokens"], True),
    "BART": (
        lambda: hf.BartForConditionalGeneration(hf.BartConfig(**SEQ2SEQ, decoder_start_token_id=1)),
        ["embed_positions"],
        False,
    ),
    "M2M100": (lambda: hf.M2M100ForConditionalGeneration(hf.M2M100Config(**SEQ2SEQ)), ["encoder.embed_tokens"], True),
    "NLLB": (
        lambda: hf.NllbMoeForConditionalGeneration(hf.NllbMoeConfig(**SEQ2SEQ, num_experts=2)),
        ["encoder.embed_tokens"],
        True,
    ),
    "OPT": (
        lambda: hf.OPTForCausalLM(
            hf.OPTConfig(
                vocab_size=40,
                hidden_size=16,
                word_embed_proj_dim=16,
                ffn_dim=24,
                num_hidden_layers=1,
                num_attention_heads=2,
                max_position_embeddings=32,
            )
        ),
        ["embed_positions"],
        False,
    ),
}


def built(name: str) -> Any:
    torch.manual_seed(0)
    return EMBEDDINGS[name][0]().eval()


def logits(model: Any) -> Tensor:
    ids = torch.tensor([[5, 3, 9, 2, 7], [4, 8, 1, 6, 3]])
    base = getattr(model, "config", None)
    more = {"decoder_input_ids": ids} if getattr(base, "is_encoder_decoder", False) else {}
    found: Tensor = model(input_ids=ids, **more).logits
    return found


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`", "ignore:.*is_gradient_checkpointing")
@pytest.mark.parametrize("name", EMBEDDINGS)
def test_embeddings_that_do_more_than_look_up(name: str, tmp_path: Path) -> None:
    _, targets, in_peft = EMBEDDINGS[name]
    base = logits(built(name))
    model = fastadapt.inject(built(name), LoRAConfig(r=4, target_modules=targets))
    assert torch.equal(logits(model), base)
    assert {layer.way for layer in fastadapt.adapted_layers(model)} == {"called"}
    randomise(model)
    want = logits(model)
    assert (want - base).abs().max() > 1e-3
    want.square().sum().backward()
    grads = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
    assert all(grad is not None and grad.abs().max() > 0 for grad in grads)
    fastadapt.merge(model)
    torch.testing.assert_close(logits(model), want, rtol=1e-4, atol=1e-4)
    fastadapt.unmerge(model)
    assert torch.equal(logits(model), want)
    fastadapt.save_adapter(model, tmp_path)
    if in_peft:
        theirs = peft.PeftModel.from_pretrained(built(name), str(tmp_path)).eval()
        torch.testing.assert_close(logits(theirs), want, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits(fastadapt.load_adapter(built(name), tmp_path)), want)


class Model(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Any:
        return self.layer(x)


def test_an_embedding_that_normalises_is_refused() -> None:
    class Normed(nn.Embedding):
        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            return F.normalize(super().forward(x), dim=-1)

    model = fastadapt.inject(Model(Normed(10, 6)), LoRAConfig(r=2, target_modules=["layer"]))
    randomise(model)
    with pytest.raises(ValueError, match=r"layer \(Normed\) does more than look rows of its weight up"):
        model(torch.tensor([[1, 2]]))


def test_an_embedding_that_lets_no_gradient_through_is_refused() -> None:
    class Constant(nn.Embedding):
        @torch.no_grad()
        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(x)

    model = fastadapt.inject(Model(Constant(10, 6)), LoRAConfig(r=2, target_modules=["layer"]))
    with pytest.raises(ValueError, match=r"layer \(Constant\) lets no gradient through"):
        model(torch.tensor([[1, 2]]))


class Doubled(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def hooked(layer: nn.Module) -> nn.Module:
    layer.register_forward_hook(lambda module, args, y: y + 1)
    return layer


def looked_at(layer: nn.Module) -> nn.Module:
    layer.register_forward_hook(lambda module, args, y: None)
    return layer


def patched(layer: nn.Module) -> nn.Module:
    forward = layer.forward
    layer.forward = lambda x: 2 * forward(x)
    return layer


def conv(kind: type[nn.Conv2d] = nn.Conv2d) -> nn.Conv2d:
    return kind(3, 5, 3, padding=1, stride=2)


TOKENS = torch.tensor([[1, 2, 3], [4, 0, 1]])
IMAGES = torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(3))
ROWS = torch.randn(4, 6, generator=torch.Generator().manual_seed(3))
LORA: dict[str, Any] = {"r": 2, "target_modules": ["layer"]}
# How a layer is made, an input, the config, and whether a merge can write what comes out as it is.
LAYERS: dict[str, tuple[Callable[[], nn.Module], Tensor, Any, bool]] = {
    "conv of its own": (lambda: conv(Doubled), IMAGES, LoRAConfig(**LORA), False),
    "conv with a hook": (lambda: hooked(conv()), IMAGES, LoRAConfig(**LORA), True),
    "conv, patched": (lambda: patched(conv()), IMAGES, LoRAConfig(**LORA), False),
    "conv, parametrized": (lambda: parametrizations.weight_norm(conv()), IMAGES, LoRAConfig(**LORA), True),
    "conv, scaled behind": (lambda: looked_at(conv()), IMAGES, SSFConfig(init_std=0, target_modules=["layer"]), True),
    "embedding with a hook": (lambda: hooked(nn.Embedding(10, 6)), TOKENS, LoRAConfig(**LORA), True),
    "embedding, patched": (lambda: patched(nn.Embedding(10, 6)), TOKENS, LoRAConfig(**LORA), False),
    "embedding, parametrized": (
        lambda: parametrizations.weight_norm(nn.Embedding(10, 6)),
        TOKENS,
        LoRAConfig(**LORA),
        True,
    ),
    "norm with a hook": (lambda: hooked(nn.LayerNorm(6)), ROWS, SSFConfig(init_std=0, target_modules=["layer"]), False),
    "norm that is looked at": (
        lambda: looked_at(nn.LayerNorm(6)),
        ROWS,
        SSFConfig(init_std=0, target_modules=["layer"]),
        True,
    ),
}


def made(name: str) -> Model:
    torch.manual_seed(0)
    model = Model(LAYERS[name][0]()).eval()
    if isinstance(model.layer, nn.LayerNorm):
        nn.init.normal_(model.layer.weight)
        nn.init.normal_(model.layer.bias)
    return model


@pytest.mark.parametrize("name", LAYERS)
def test_other_kinds_of_layers(name: str) -> None:
    _, x, config, merges = LAYERS[name]
    base, model = made(name)(x), made(name)
    own = model.layer
    fastadapt.inject(model, config)
    assert torch.equal(model(x), base)
    (layer,) = fastadapt.adapted_layers(model)
    assert layer.way == "called"
    assert layer.reason
    randomise(model)
    want = model(x)
    assert (want - base).abs().max() > 1e-2
    want.square().sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    if merges:
        fastadapt.merge(model)
        torch.testing.assert_close(model(x), want, rtol=1e-5, atol=1e-5)
        fastadapt.unmerge(model)
    else:
        with pytest.raises(ValueError, match="layer: an adapter cannot be merged into this layer"):
            fastadapt.merge(model)
    assert torch.equal(model(x), want)
    fastadapt.unload(model)
    assert model.layer is own
    assert torch.equal(model(x), base)


def test_a_convolution_that_pads_by_itself_is_refused() -> None:
    class Same(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(F.pad(x, (1, 1, 1, 1)))

    model = fastadapt.inject(Model(Same(3, 5, 3)), LoRAConfig(r=2, target_modules=["layer"]))
    with pytest.raises(ValueError, match=r"layer \(Same\) gives \[2, 5, 9, 9\] where its kernel"):
        model(IMAGES)
