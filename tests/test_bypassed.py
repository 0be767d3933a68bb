"""What an adapter cannot be right on is refused by name, or left out of "all-linear" with one warning."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import transformers as hf
from test_ways import randomise
from torch import Tensor, nn

import fastadapt
from fastadapt import HiRAConfig, LoRAConfig

SIZES: dict[str, Any] = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1}
MOE: dict[str, Any] = {
    **SIZES,
    "intermediate_size": 24,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_local_experts": 2,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
}


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        y: Tensor = self.head(self.encoder(x, src_key_padding_mask=padding))
        return y


def mamba() -> nn.Module:
    return hf.MambaForCausalLM(hf.MambaConfig(**SIZES, state_size=4))


def phimoe() -> nn.Module:
    return hf.PhimoeForCausalLM(hf.PhimoeConfig(**MOE))


class SomeGroupedLinear(nn.Linear):
    """As DeepSeek V4 has one: a block of the weight for each group of x."""

    def forward(self, x: Tensor) -> Tensor:
        blocks = self.weight.unflatten(0, (2, -1))
        return torch.einsum("...gk,gnk->...gn", x.unflatten(-1, (2, -1)), blocks).flatten(-2)


class Grouped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.grouped, self.head = SomeGroupedLinear(8, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.grouped(x))
        return y


REFUSED = {
    "MultiheadAttention": (
        Encoder,
        ["out_proj"],
        "encoder.layers.0.self_attn.out_proj .* the MultiheadAttention around",
    ),
    "Mamba": (mamba, ["in_proj", "dt_proj"], "mixer.dt_proj cannot take an adapter: the MambaMixer around it reads"),
    "Mamba's out_proj": (mamba, "all.*|.*out_proj", "mixer.out_proj cannot take an adapter"),
    "a linear layer in groups": (Grouped, ["grouped"], "a SomeGroupedLinear has a matrix for each group of its input"),
    "a router that gives a tuple": (phimoe, ["router"], "a PhimoeTopKRouter gives a tuple"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_known_classes_are_refused_when_they_are_named(name: str) -> None:
    make, targets, words = REFUSED[name]
    model = make()
    before = [id(module) for module in model.modules()]
    with pytest.raises(ValueError, match=words) as caught:
        fastadapt.inject(model, LoRAConfig(r=2, target_modules=targets))
    assert "exclude_modules" in str(caught.value)
    assert [id(module) for module in model.modules()] == before


@pytest.mark.parametrize("make", [Encoder, mamba, phimoe, Grouped])
def test_all_linear_leaves_them_out_and_says_so_once(make: Any) -> None:
    torch.manual_seed(0)
    model = make()
    with pytest.warns(UserWarning, match='"all-linear" adapts no ') as told:
        fastadapt.inject(model, LoRAConfig(r=2, target_modules="all-linear"))
    assert len(told) == 1
    assert told[0].filename == __file__
    randomise(model)
    x = torch.randn(2, 3, 16) if make in (Encoder, Grouped) else torch.tensor([[1, 2, 3], [4, 5, 6]])

    def run() -> Tensor:
        y = model(x)
        return getattr(y, "logits", y)

    run().square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    model.eval()
    before = run()
    fastadapt.merge(model)
    torch.testing.assert_close(run(), before, rtol=1e-4, atol=1e-4)


def test_experts_in_one_tensor_are_named() -> None:
    model = hf.MixtralForCausalLM(hf.MixtralConfig(**{**MOE, "num_hidden_layers": 2}))
    with pytest.warns(UserWarning, match=r"model.layers.\*.mlp.experts.gate_up_proj, model.layers.\*.mlp.experts.down"):
        fastadapt.inject(model, HiRAConfig(r=2, target_modules="all-linear"))
    fastadapt.unload(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fastadapt.inject(model, HiRAConfig(r=2, target_modules="all-linear", exclude_modules=["experts"]))
        fastadapt.unload(model)
        fastadapt.inject(model, LoRAConfig(r=2, target_modules="all-linear"))  # which experts can have
        fastadapt.unload(model)
        fastadapt.inject(model, LoRAConfig(r=2, target_modules=["q_proj"]))


def test_encoder_layers_of_torch_call_what_is_adapted() -> None:
    """In eval mode they would run as one operator on the weights of the layers inside; others are left alone."""
    torch.manual_seed(0)
    model, other, x = Encoder().eval(), Encoder().eval(), torch.randn(2, 3, 16)
    padding = torch.tensor([[False, False, False], [False, False, True]])
    fastadapt.inject(model, LoRAConfig(r=2, target_modules=["linear1", "linear2"]))
    randomise(model)
    with torch.no_grad():
        adapted, padded = model(x), model(x, padding)
        with fastadapt.disable_adapter(model):
            assert (model(x) - adapted).abs().max() > 1e-2
        fastadapt.merge(model)
        torch.testing.assert_close(model(x), adapted, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(model(x, padding)[~padding], padded[~padding], rtol=1e-4, atol=1e-5)
    assert torch.backends.mha.get_fastpath_enabled()
    assert other.encoder.use_nested_tensor
    fastadapt.unload(model)
    assert model.encoder.use_nested_tensor
    assert not any(module._forward_pre_hooks for module in model.modules())
