"""Delta-LoRA: the telescoped form is the algorithm, gradients are LoRA's, and the base is never touched."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from peft import PeftModel
from test_peft_parity import quiet_peft
from tiny_models import tokens
from torch import Tensor, nn

import fastadapt
from fastadapt import DeltaLoRAConfig, LoRAConfig


def train(model: Any, steps: int, start: int = 0, control: Any = None, optimizer: Any = None) -> Any:
    control = control or fastadapt.control(model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = optimizer or torch.optim.AdamW(parameters, lr=0.02, weight_decay=0.01)
    for step in range(start, start + steps):
        x = torch.randn(6, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        (model(x) - 1).square().mean().backward()
        optimizer.step()
        control.step()
        optimizer.zero_grad()
    return control, optimizer


def delta(model: Any = None, **changes: Any) -> Any:
    fields: dict[str, Any] = {"r": 3, "target_modules": ["up", "down"], "delta_lambda": 0.7, "start_step": 10}
    torch.manual_seed(1)
    return fastadapt.inject(model or tiny_models.mlp().double(), DeltaLoRAConfig(**{**fields, **changes}))


@pytest.mark.parametrize("changes", [{}, {"start_step": 0}, {"use_rslora": True, "delta_lambda": 2.0}], ids=str)
def test_telescoped_is_literal(changes: dict[str, Any]) -> None:
    """Fifty steps in fp64 of Algorithm 1, weight moved and weight untouched."""
    literal, telescoped = delta(literal=True, **changes), delta(**changes)
    before = telescoped.up.base_layer.weight.clone()
    train(literal, 50)
    train(telescoped, 50)
    x = torch.randn(9, 20, dtype=torch.float64)
    torch.testing.assert_close(telescoped(x), literal(x), rtol=1e-12, atol=1e-12)
    for name in ("lora_A", "lora_B"):
        one, other = (getattr(model.up.adapters["default"], name) for model in (telescoped, literal))
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    assert torch.equal(telescoped.up.base_layer.weight, before)
    assert not torch.equal(literal.up.base_layer.weight, before)
    plain = fastadapt.inject(tiny_models.mlp().double(), LoRAConfig(r=3, target_modules=["up", "down"]))
    assert not torch.allclose(plain(x), telescoped(x))


def test_literal_follows_the_algorithm_by_hand() -> None:
    model = delta(literal=True, start_step=1)
    control = fastadapt.control(model)
    layer, adapter = model.up, model.up.adapters["default"]
    weight = layer.base_layer.weight.clone()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.3)
    for step in range(1, 4):
        product = (adapter.lora_B @ adapter.lora_A).detach()
        train(model, 1, step, control, optimizer)
        if step > 1:
            weight += 0.7 * adapter.scaling * ((adapter.lora_B @ adapter.lora_A).detach() - product)
        torch.testing.assert_close(layer.base_layer.weight, weight, rtol=1e-13, atol=1e-13)


def test_gradients_have_lora_s_factor() -> None:
    model = delta(start_step=0)
    train(model, 3)
    layer, adapter = model.up, model.up.adapters["default"]
    x = torch.randn(5, 20, dtype=torch.float64)
    y = layer(x)
    dy = torch.randn_like(y)
    dA, dB = torch.autograd.grad(y, (adapter.lora_A, adapter.lora_B), dy)
    dW = dy.T @ x
    torch.testing.assert_close(dA, adapter.scaling * adapter.lora_B.T @ dW)
    torch.testing.assert_close(dB, adapter.scaling * dW @ adapter.lora_A.T)


def test_before_the_start_it_is_lora() -> None:
    model = delta(start_step=4)
    torch.manual_seed(1)
    plain = fastadapt.inject(tiny_models.mlp().double(), LoRAConfig(r=3, target_modules=["up", "down"]))
    x = torch.randn(5, 20, dtype=torch.float64)
    train(model, 4)
    train(plain, 4)
    torch.testing.assert_close(model(x), plain(x), rtol=1e-12, atol=1e-12)  # anchored now, and nothing added yet
    assert model.up.adapters["default"].anchored
    assert model.up.form().A.shape == (6, 20)


def test_saved_merged_and_exported(tmp_path: Path) -> None:
    for steps, rank in ((3, 3), (15, 6)):  # before and after the anchor
        model = delta(tiny_models.llama(), target_modules=["q_proj", "up_proj"], r=3)
        control = fastadapt.control(model)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
        for _ in range(steps):
            model(input_ids=tokens(), labels=tokens()).loss.backward()
            optimizer.step()
            control.step()
            optimizer.zero_grad()
        expected = model(tokens()).logits
        fastadapt.save_adapter(model, tmp_path / "own")
        assert json.loads((tmp_path / "own" / "adapter_config.json").read_text())["peft_type"] == "DELTA_LORA"
        loaded = fastadapt.load_adapter(tiny_models.llama(), tmp_path / "own")
        assert torch.equal(loaded(tokens()).logits, expected)
        fastadapt.export_lora(model, tmp_path / "lora")
        with quiet_peft():
            theirs = PeftModel.from_pretrained(tiny_models.llama(), tmp_path / "lora").eval()
        torch.testing.assert_close(theirs(tokens()).logits, expected, rtol=1e-5, atol=1e-5)
        assert theirs.peft_config["default"].r == rank
        alpha = theirs.peft_config["default"].alpha_pattern
        assert all(value == pytest.approx(8 * rank / 3) for value in alpha.values())  # 2α of rank 2r
        base = model.model.layers[0].mlp.up_proj.base_layer.weight.clone()
        fastadapt.merge(model)
        torch.testing.assert_close(model(tokens()).logits, expected, rtol=1e-4, atol=1e-4)
        fastadapt.unmerge(model)
        assert torch.equal(model.model.layers[0].mlp.up_proj.base_layer.weight, base)


@pytest.mark.parametrize("literal", [False, True])
@pytest.mark.parametrize("stop", [5, 10, 20])
def test_it_goes_on_where_it_stopped(stop: int, literal: bool) -> None:
    whole = delta(literal=literal)
    train(whole, 30)
    part = delta(literal=literal)
    control, optimizer = train(part, stop)
    state = copy.deepcopy((control.state_dict(), part.up.adapters.state_dict(), part.down.adapters.state_dict()))
    moments = copy.deepcopy(optimizer.state_dict())
    rest = delta(literal=literal)
    control = fastadapt.control(rest)
    control.load_state_dict(state[0])
    rest.up.adapters.load_state_dict(state[1])
    rest.down.adapters.load_state_dict(state[2])
    optimizer = torch.optim.AdamW([p for p in rest.parameters() if p.requires_grad], lr=0.02, weight_decay=0.01)
    optimizer.load_state_dict(moments)
    train(rest, 30 - stop, stop, control, optimizer)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, rest.state_dict()[name]), name


def test_small_updates_are_not_lost_in_sixteen_bits() -> None:
    """λ s (B⁺A⁺ − BA) is far below half an ulp of a bf16 weight: the form keeps it, as the literal fp32 copy does."""
    model = fastadapt.inject(
        nn.Sequential(nn.Linear(16, 16, bias=False)).bfloat16(),
        DeltaLoRAConfig(r=2, target_modules=["0"], start_step=0, delta_lambda=1.0),
    )
    fastadapt.control(model)
    adapter = model[0].adapters["default"]
    assert adapter.lora_anchor_B.dtype == torch.float32
    with torch.no_grad():
        adapter.lora_B.fill_(1e-5)
    change: Tensor = fastadapt.functional.merged_weight(torch.zeros(16, 16), adapter.form(torch.zeros(16, 16), None))
    torch.testing.assert_close(change, 2 * adapter.scaling * adapter.lora_B @ adapter.lora_A)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_dropout": 0.1}, "lora_dropout must be 0 with Delta-LoRA, got 0.1"),
        ({"use_dora": True}, "use_dora cannot go with Delta-LoRA"),
        ({"delta_lambda": -1.0}, "delta_lambda must be at least 0"),
        ({"start_step": -1}, "start_step must be at least 0"),
    ],
)
def test_it_refuses(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DeltaLoRAConfig(**changes)


def test_a_moved_base_is_not_saved_as_an_adapter(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="literal Delta-LoRA has moved the base weights"):
        fastadapt.save_adapter(delta(literal=True), tmp_path)


def test_a_moved_base_is_not_exported_either(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="literal Delta-LoRA has moved the base weights"):
        fastadapt.export_lora(delta(literal=True), tmp_path)
