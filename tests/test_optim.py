"""LoRA+ and LoRA-FA: groups and gradients against PEFT's and against what they are meant to be."""

from __future__ import annotations

import copy
from typing import Any
from unittest import mock

import pytest
import tiny_models
import torch
from peft import LoraConfig, VeraConfig, get_peft_model
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer
from test_peft_parity import peft_name, quiet_peft
from tiny_models import tokens
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

import fastadapt
from fastadapt import DoRAConfig, LoRAConfig, VeRAConfig
from fastadapt.layers.layer import AdapterLayer
from fastadapt.training.optim import LoRAFAAdamW, parameter_groups


def names_by_rate(groups: list[dict[str, Any]], names: dict[int, str]) -> set[tuple[str, float, float]]:
    return {(names[id(p)], group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}


def our_names(model: nn.Module) -> dict[int, str]:
    names = {}
    for path, module in model.named_modules():
        if isinstance(module, AdapterLayer):
            adapter = module.adapters["default"]
            for name, suffix in adapter.checkpoint_names.items():
                names[id(getattr(adapter, name))] = f"base_model.model.{path}.{suffix}"
        elif type(module).__name__ == "ModuleToSave":
            for name, parameter in module.copies["default"].named_parameters():  # type: ignore[union-attr,operator]
                names[id(parameter)] = f"base_model.model.{path}.{name}"
    return names


@pytest.mark.parametrize(
    ("model", "ours", "peft"),
    [
        (
            tiny_models.mixed,
            LoRAConfig(r=3, target_modules=["embed", "conv", "fc1"], modules_to_save=["norm", "head"]),
            LoraConfig(r=3, target_modules=["embed", "conv", "fc1"], modules_to_save=["norm", "head"]),
        ),
        (
            lambda: tiny_models.llama(attention_bias=True),
            DoRAConfig(r=3, target_modules=["q_proj", "down_proj"], bias="lora_only"),
            LoraConfig(r=3, target_modules=["q_proj", "down_proj"], bias="lora_only", use_dora=True),
        ),
        (
            tiny_models.llama,
            VeRAConfig(r=8, target_modules=["q_proj"]),
            VeraConfig(r=8, target_modules=["q_proj"]),
        ),
    ],
    ids=["lora", "dora", "vera"],
)
def test_loraplus_groups_are_peft_s(model: Any, ours: Any, peft: Any) -> None:
    with quiet_peft():
        theirs = get_peft_model(model(), peft)
        optimizer = create_loraplus_optimizer(
            theirs, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=8, loraplus_weight_decay=0.02
        )
    mine = fastadapt.inject(model(), ours)
    groups = parameter_groups(mine, 1e-3, 8, weight_decay=0.02)
    names = {id(p): peft_name(name) for name, p in theirs.named_parameters()}
    assert names_by_rate(groups, our_names(mine)) == names_by_rate(optimizer.param_groups, names)
    assert all(group["params"] for group in groups)


def test_loraplus_works_with_any_optimizer_and_schedule() -> None:
    for make in (torch.optim.SGD, torch.optim.AdamW, torch.optim.Adagrad):
        model = fastadapt.inject(tiny_models.llama(), LoRAConfig(r=4, target_modules="all-linear"))
        optimizer = make(parameter_groups(model, 1e-3, weight_decay=0.1))
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)
        assert [group["lr"] for group in optimizer.param_groups] == [5e-4, 8e-3]
        model(input_ids=tokens(), labels=tokens()).loss.backward()
        optimizer.step()
        schedule.step()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lr": -1.0}, "lr must be a finite number of at least 0, got -1.0"),
        ({"lr": 1.0, "loraplus_lr_ratio": float("nan")}, "loraplus_lr_ratio must be"),
        ({"lr": 1.0, "weight_decay": -0.1}, "weight_decay must be"),
    ],
)
def test_loraplus_refuses(values: dict[str, float], message: str) -> None:
    model = fastadapt.inject(tiny_models.mlp(), LoRAConfig(r=2, target_modules=["up"]))
    with pytest.raises(ValueError, match=message):
        parameter_groups(model, **values)
    with pytest.raises(ValueError, match="no trainable parameters: inject"):
        parameter_groups(tiny_models.mlp().requires_grad_(False), 1.0)


def train(model: Any, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for step in range(steps):
        inputs = torch.randint(1, tiny_models.VOCAB, (3, 8), generator=torch.Generator().manual_seed(step))
        model(input_ids=inputs, labels=inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def test_lora_fa_is_peft_s_after_twenty_steps() -> None:
    fields: dict[str, Any] = {
        "r": 4,
        "lora_alpha": 6,
        "target_modules": ["q_proj", "up_proj", "down_proj"],
        "rank_pattern": {"up_proj": 3},
        "alpha_pattern": {"q_proj": 9},
    }
    with quiet_peft():
        theirs = get_peft_model(tiny_models.llama(), LoraConfig(**fields))
    mine = fastadapt.inject(tiny_models.llama(), LoRAConfig(freeze_A=True, **fields))
    copy_factors(theirs, mine)
    with quiet_peft():
        reference = create_lorafa_optimizer(theirs, r=4, lora_alpha=6, lr=3e-3, weight_decay=0.1)
    optimizer = LoRAFAAdamW(mine, lr=3e-3, weight_decay=0.1)
    # PEFT makes this one product under bf16 autocast wherever the machine has bf16.
    with mock.patch("peft.optimizers.lorafa.is_bf16_available", return_value=False):
        train(theirs, reference, 20)
    train(mine, optimizer, 20)
    theirs_by_name = {peft_name(name): p for name, p in theirs.named_parameters()}
    moved = 0
    for identity, name in our_names(mine).items():
        parameter = next(t for t in (*mine.parameters(), *mine.buffers()) if id(t) == identity)
        torch.testing.assert_close(parameter, theirs_by_name[name], rtol=2e-3, atol=2e-5)
        moved += int("lora_B" in name and bool(parameter.abs().max() > 0.01))
    assert moved == 6


def copy_factors(theirs: nn.Module, mine: nn.Module) -> None:
    values = {peft_name(name): p for name, p in theirs.named_parameters()}
    tensors = {id(t): t for t in (*mine.parameters(), *mine.buffers())}
    with torch.no_grad():
        for identity, name in our_names(mine).items():
            tensors[identity].copy_(values[name])


def test_the_corrected_gradient_is_the_best_imitation_of_the_full_one() -> None:
    """dL/dW − s·g'A is orthogonal to the rows of A, in every layer of any rank and scale."""
    config = LoRAConfig(r=4, freeze_A=True, target_modules=["up", "down"], rank_pattern={"down": 24}, lora_alpha=3)
    model = fastadapt.inject(tiny_models.mlp().double(), config)
    optimizer = LoRAFAAdamW(model)
    x = torch.randn(50, 20, dtype=torch.float64)
    fastadapt.inject(model, LoRAConfig(r=1, target_modules=["up"]), "other")
    fastadapt.set_adapter(model, "default")
    for name in ("up", "down"):
        weight = model.get_submodule(name).base_layer.weight
        dense = tiny_models.mlp().double().requires_grad_(True)
        dense(x).square().sum().backward()
        full = dense.get_submodule(name).weight.grad
        assert full is not None
        assert torch.equal(weight, dense.get_submodule(name).weight)  # B is zero: the same function
        model.zero_grad()
        model(x).square().sum().backward()
        adapter = model.get_submodule(name).adapters["default"]
        g = optimizer._corrected_grad(adapter.lora_B)
        A = adapter.lora_A
        residual = full - adapter.scaling * g @ A
        assert (residual @ A.T).abs().max() < 1e-6 * (full @ A.T).abs().max()


@pytest.mark.parametrize("method", [LoRAConfig, DoRAConfig])
def test_only_u_is_kept_where_the_first_factor_is_frozen(method: Any) -> None:
    """The layer input of 40 × 20 floats is not among the saved tensors; u of 40 × 4 is, and DoRA's z."""
    kept = {}
    for freeze in (False, True):
        model = fastadapt.inject(tiny_models.mlp(), method(r=4, target_modules=["up"], freeze_A=freeze))
        own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
        x = torch.randn(40, 20)
        saved: list[tuple[StorageWeakRef, torch.Size]] = []

        def pack(tensor: Tensor, own: set[int] = own, saved: Any = saved) -> Tensor:
            if tensor.untyped_storage().data_ptr() not in own:
                saved.append((StorageWeakRef(tensor.untyped_storage()), tensor.shape))
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            y = model.up(x)
        kept[freeze] = {tuple(shape) for storage, shape in saved if not storage.expired() and shape[0] == 40}
        del y
    z = {(40, 28)} if method is DoRAConfig else set()
    assert kept[True] == {(40, 4)} | z
    assert kept[False] == {(40, 4), (40, 20)} | z


def test_lora_fa_with_dora_and_everything_else_that_trains() -> None:
    config = DoRAConfig(r=4, freeze_A=True, target_modules=["q_proj", "up_proj"], modules_to_save=["lm_head"])
    model = fastadapt.inject(tiny_models.llama(), config)
    count = fastadapt.trainable_parameters(model).trainable
    assert count == 2 * (4 * 32 + 4 * 48 + 32 + 48) + 67 * 32
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = LoRAFAAdamW(model, lr=1e-2, weight_decay=0.01)
    train(model, optimizer, 3)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == trained
    state = optimizer.state_dict()
    again = LoRAFAAdamW(model, lr=1e-2)
    again.load_state_dict(state)
    assert again.state_dict()["param_groups"] == state["param_groups"]


def test_the_inverse_is_computed_once_and_again_for_another_factor() -> None:
    model = fastadapt.inject(tiny_models.llama(), LoRAConfig(r=4, freeze_A=True, target_modules=["q_proj"]))
    optimizer = LoRAFAAdamW(model)
    with mock.patch.object(torch.linalg, "pinv", wraps=torch.linalg.pinv) as pinv:
        train(model, optimizer, 3)
        assert pinv.call_count == 2
        model.model.layers[0].self_attn.q_proj.adapters["default"].lora_A.mul_(2)
        train(model, optimizer, 2)
        assert pinv.call_count == 3


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lr": -1.0}, "lr must be"),
        ({"betas": (0.9, 1.0)}, r"betas must be in \[0, 1\)"),
        ({"eps": float("inf")}, "eps must be"),
    ],
)
def test_lora_fa_refuses(values: dict[str, Any], message: str) -> None:
    model = fastadapt.inject(tiny_models.mlp(), LoRAConfig(r=2, freeze_A=True, target_modules=["up"]))
    with pytest.raises(ValueError, match=message):
        LoRAFAAdamW(model, **values)
    with pytest.raises(ValueError, match=r"no active adapter has a frozen A: .*freeze_A=True"):
        LoRAFAAdamW(fastadapt.inject(tiny_models.mlp(), LoRAConfig(r=2, target_modules=["up"])))
    with pytest.raises(ValueError, match="embed: Embedding cannot take an adapter of LoRAConfig with freeze_A=True"):
        fastadapt.inject(tiny_models.mixed(), LoRAConfig(r=2, freeze_A=True, target_modules=["embed"]))


def test_a_lora_fa_file_is_an_ordinary_lora(tmp_path: Any) -> None:
    model = fastadapt.inject(tiny_models.mlp(), LoRAConfig(r=2, freeze_A=True, target_modules=["up"]))
    fastadapt.save_adapter(model, tmp_path)
    again = fastadapt.load_adapter(tiny_models.mlp(), tmp_path, trainable=True)
    assert fastadapt.trainable_parameters(again).trainable == 2 * (20 + 28)
    assert torch.equal(again.up.adapters["default"].lora_A, model.up.adapters["default"].lora_A)


def test_more_ranks_than_inputs_do_not_amplify_rounding() -> None:
    """r = 16 on 8 inputs: the corrected gradient answers to what A spans, in fp32 as in fp64."""
    model = fastadapt.inject(nn.Sequential(nn.Linear(8, 12)), LoRAConfig(r=16, freeze_A=True, target_modules=["0"]))
    optimizer = LoRAFAAdamW(model)
    adapter: Any = model[0].adapters["default"]  # type: ignore[union-attr]
    model(torch.randn(20, 8)).square().sum().backward()
    A, grad = adapter.lora_A.double(), adapter.lora_B.grad.double()
    exact = grad @ torch.linalg.pinv(A @ A.T, rtol=1e-9) / adapter.scaling**2
    found = optimizer._corrected_grad(adapter.lora_B)
    assert (found - exact).abs().max() < 1e-4 * exact.abs().max()


def test_copies_and_later_groups_keep_the_correction() -> None:
    model = fastadapt.inject(tiny_models.mlp(), LoRAConfig(r=2, freeze_A=True, target_modules=["up"]))
    optimizer = LoRAFAAdamW(model)
    twin, other = copy.deepcopy((model, optimizer))
    for network, stepped in ((model, optimizer), (twin, other)):
        network(torch.ones(3, 20)).square().sum().backward()
        stepped.step()
    assert torch.equal(model.up.adapters["default"].lora_B, twin.up.adapters["default"].lora_B)
    fastadapt.inject(model, LoRAConfig(r=2, freeze_A=True, target_modules=["down"]), "second")
    later = model.down.adapters["second"].lora_B
    optimizer.add_param_group({"params": [later]})
    model(torch.ones(3, 20)).square().sum().backward()
    assert not torch.allclose(optimizer._corrected_grad(later), later.grad)
