"""AdaLoRA's training: the budget, what is pruned and what comes back, step by step as in PEFT, and its files."""

from __future__ import annotations

import io
import json
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_models
import torch
from peft import AdaLoraConfig, PeftModel, get_peft_model
from safetensors.torch import load, load_file, save
from test_peft_parity import our_parameters, peft_parameters, quiet_peft, save_from_peft
from tiny_models import randomise
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fastadapt import AdaLoRAConfig, inject, load_adapter, merge, save_adapter
from fastadapt.methods.adalora import AdaLoRAAdapter, BudgetAllocator, Orthogonality
from fastadapt.model.adapted import adapter_configs, adapter_layers
from fastadapt.model.inject import control

LAYERS = ["conv", "up", "across", "down"]
STEPS = 50


class Net(nn.Module):
    """A strided convolution, Linear and Conv1D; gives its loss as transformers' models do."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(2, 5, (3, 2), stride=(2, 1), padding=1)
        self.up = nn.Linear(15, 24)
        self.across = Conv1D(14, 24)
        self.down = nn.Linear(14, 6, bias=False)
        nn.init.normal_(self.across.weight, std=0.3)

    def forward(self, x: Tensor, target: Tensor) -> SimpleNamespace:
        h = torch.tanh(self.up(torch.tanh(self.conv(x)).flatten(1)))
        y = self.down(torch.tanh(self.across(h)))
        return SimpleNamespace(loss=(y - target).square().mean(), y=y)


def batch(t: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Inputs and targets of step t: another function of the inputs than the model computes."""
    generator = torch.Generator().manual_seed(t)
    x = torch.randn(16, 2, 2, 2, generator=generator, dtype=dtype)[:, :, :1]
    return x, torch.sin(3 * x.flatten(1)).repeat(1, 2)[:, :6]


def fields(**changes: Any) -> dict[str, Any]:
    return {
        "init_r": 4,
        "target_r": 2,
        "tinit": 5,
        "tfinal": 10,
        "deltaT": 3,
        "total_step": 45,
        "orth_reg_weight": 0.3,
        "lora_alpha": 6,
        "target_modules": LAYERS,
        **changes,
    }


def adapters(model: nn.Module) -> dict[str, AdaLoRAAdapter]:
    return {path: layer.adapters["default"] for path, layer in adapter_layers(model).items()}  # type: ignore[misc]


def allocator(model: nn.Module) -> BudgetAllocator:
    found = control(model)
    assert isinstance(found, BudgetAllocator)
    return found


def pattern(model: nn.Module) -> Any:
    return adapter_configs(model)["default"].rank_pattern  # type: ignore[attr-defined]


def in_peft(**more: Any) -> Any:
    with quiet_peft():
        return get_peft_model(Net(), AdaLoraConfig(**fields(**more)))


def train(model: nn.Module, control: BudgetAllocator, optimizer: torch.optim.Optimizer, start: int, stop: int) -> None:
    for t in range(start + 1, stop + 1):
        (model(*batch(t)).loss + control.regularizer()).backward()
        optimizer.step()
        control.step()
        optimizer.zero_grad()


def trained(steps: int, **more: Any) -> Any:
    """A model after so many steps, in evaluation mode."""
    torch.manual_seed(1)
    model = inject(Net(), AdaLoRAConfig(**fields(**more)))
    train(model, allocator(model), torch.optim.AdamW(our_parameters(model).values(), lr=0.02), 0, steps)
    return model.eval()


@cache
def straight() -> Any:
    return trained(STEPS)


def with_gradients(model: nn.Module, sizes: dict[str, float]) -> None:
    """Every parameter of a layer gets a gradient of that value."""
    for path, adapter in adapters(model).items():
        for parameter in adapter.parameters():
            parameter.grad = torch.full_like(parameter, sizes.get(path, 0.0))


def all_ones(model: nn.Module | None = None, **more: Any) -> nn.Module:
    """A model in which all elements, and so all triplets of a layer, are alike."""
    model = inject(model or Net(), AdaLoRAConfig(**fields(**more)))
    with torch.no_grad():
        for parameter in our_parameters(model).values():
            parameter.fill_(1.0)
    return model


def kept(model: nn.Module) -> dict[str, int]:
    return {path: sum(pattern(model)[f"{path}.lora_E"]) for path in LAYERS}


# As in PEFT.


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"tinit": 0, "tfinal": 0, "deltaT": 1, "total_step": 40},
        {"beta1": 0.6, "beta2": 0.95, "tfinal": 1, "target_r": 1, "lora_alpha": 0, "orth_reg_weight": 0},
    ],
    ids=["three phases", "as by default", "other settings"],
)
def test_training_is_pefts_step_by_step(more: dict[str, Any]) -> None:
    ours, peft = inject(Net().double(), AdaLoRAConfig(**fields(**more))), in_peft(**more).double().train()
    mine, theirs = our_parameters(ours), peft_parameters(peft)
    assert mine.keys() == theirs.keys()
    with torch.no_grad():
        for name, parameter in mine.items():
            theirs[name].copy_(parameter)
    allocated, seen = allocator(ours), set()
    optimizers = [torch.optim.AdamW([side[name] for name in mine], lr=0.02) for side in (mine, theirs)]
    for t in range(1, STEPS + 1):
        # A PeftModel without a task type goes round its AdaLoraModel, which adds the regularizer.
        outputs, expected = ours(*batch(t, torch.float64)), peft.base_model(*batch(t, torch.float64))
        torch.testing.assert_close(outputs.y, expected.y, rtol=1e-7, atol=1e-9)
        loss = outputs.loss + allocated.regularizer()
        torch.testing.assert_close(loss, expected.loss, rtol=1e-9, atol=0)
        for total, optimizer in zip((loss, expected.loss), optimizers, strict=True):
            total.backward()
            optimizer.step()
        allocated.step()
        peft.base_model.update_and_allocate(t)
        for optimizer in optimizers:
            optimizer.zero_grad()
        assert allocated.budget(t) == peft.base_model.rankallocator.budget_schedule(t)[0]
        theirs_kept = peft.peft_config["default"].rank_pattern
        if pattern(ours) is None:
            assert theirs_kept is None
        else:
            assert {f"model.{name}.default": value for name, value in pattern(ours).items()} == {
                f"model.{name.removeprefix('model.')}": value for name, value in theirs_kept.items()
            }
            seen.add(tuple(kept(ours).items()))
        for name, parameter in mine.items():
            assert torch.allclose(parameter, theirs[name], rtol=1e-6, atol=1e-8), (t, name)
    assert len(seen) > 3, "the allocation hardly changes here"
    assert sum(kept(ours).values()) == allocated.target_budget


@pytest.mark.parametrize("more", [{}, {"bias": "lora_only", "lora_alpha": 0}], ids=["plain", "trained bias, no alpha"])
def test_a_pruned_adapter_goes_to_peft_and_comes_back(more: dict[str, Any], tmp_path: Path) -> None:
    model = trained(STEPS, **more)
    expected = model(*batch(0)).y
    assert set(kept(model).values()) != {2}, "all layers keep the same here"
    save_adapter(model, tmp_path / "ours")
    with quiet_peft():
        peft = PeftModel.from_pretrained(Net(), tmp_path / "ours").eval()
    torch.testing.assert_close(peft(*batch(0)).y, expected)
    save_from_peft(peft, tmp_path / "peft")
    for source in ("ours", "peft"):
        loaded = load_adapter(Net(), tmp_path / source)
        torch.testing.assert_close(loaded(*batch(0)).y, expected)
        assert {path: adapter.r for path, adapter in adapters(loaded).items()} == kept(model)
        save_adapter(loaded, tmp_path / "again")
        tensors, first = (load_file(tmp_path / side / "adapter_model.safetensors") for side in ("again", "ours"))
        assert tensors.keys() == first.keys()
        assert all(torch.equal(tensor, first[name]) for name, tensor in tensors.items())
        written = [
            json.loads((tmp_path / side / "adapter_config.json").read_text()) for side in ("again", "ours", "peft")
        ]
        assert written[0]["rank_pattern"] == written[1]["rank_pattern"] == written[2]["rank_pattern"] == pattern(model)
    merge(loaded)
    torch.testing.assert_close(loaded(*batch(0)).y, expected)


def test_what_peft_pruned_loads_here(tmp_path: Path) -> None:
    peft = in_peft().train()
    optimizer = torch.optim.AdamW(peft_parameters(peft).values(), lr=0.02)
    for t in range(1, STEPS + 1):
        peft.base_model(*batch(t)).loss.backward()
        optimizer.step()
        peft.base_model.update_and_allocate(t)
        optimizer.zero_grad()
    expected = peft.eval()(*batch(0)).y
    save_from_peft(peft, tmp_path)
    loaded = load_adapter(Net(), tmp_path)
    torch.testing.assert_close(loaded(*batch(0)).y, expected)
    assert sum(adapter.r for adapter in adapters(loaded).values()) == 8


def test_what_peft_ignores_is_named_and_ignored(tmp_path: Path) -> None:
    ignored = {"use_rslora": True, "alpha_pattern": {"up": 20}, "lora_bias": True}
    peft = in_peft(**ignored).eval()
    randomise(peft_parameters(peft).values())
    save_from_peft(peft, tmp_path)
    with pytest.warns(UserWarning, match="alpha_pattern, lora_bias, use_rslora"):
        loaded = load_adapter(Net(), tmp_path)
    torch.testing.assert_close(loaded(*batch(0)).y, peft(*batch(0)).y)


# The budget.


@pytest.mark.parametrize(
    ("t", "budget"),
    [(0, 16), (100, 16), (101, 15), (300, 11), (500, 9), (700, 8), (899, 8), (900, 8), (901, 8), (1000, 8), (2000, 8)],
)
def test_the_budget_falls_with_the_cube_of_the_rest(t: int, budget: int) -> None:
    model = inject(Net(), AdaLoRAConfig(**fields(tinit=100, tfinal=100, total_step=1000)))
    assert allocator(model).budget(t) == budget


def test_exactly_as_many_are_pruned_as_the_budget_says_even_where_all_tie() -> None:
    alike = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))
    paths = list("0123")
    model = all_ones(alike, target_modules=paths, tinit=0, tfinal=0, deltaT=1, total_step=20)
    budgets = allocator(model)
    for t in range(1, 21):
        with_gradients(model, dict.fromkeys(paths, 1.0))
        budgets.step()
        with torch.no_grad():
            for adapter in adapters(model).values():
                adapter.lora_E.fill_(1.0)
        pruned = 16 - budgets.budget(t)
        flags = [flag for path in paths for flag in pattern(model)[f"{path}.lora_E"]]
        assert flags == [False] * pruned + [True] * (16 - pruned)


def test_nothing_is_pruned_where_the_target_is_the_start() -> None:
    model = trained(STEPS, target_r=4)
    assert kept(model) == dict.fromkeys(LAYERS, 4)
    assert all(adapter.lora_E.all() for adapter in adapters(model).values())


def test_pruned_triplets_come_back_as_their_importance_grows() -> None:
    model = all_ones(tinit=0, tfinal=0, deltaT=1, total_step=40)
    budgets, parameters = allocator(model), adapters(model)
    history = []
    for t in range(1, 41):
        early, late = {"conv": 1.0, "up": 1.0}, {"across": 5.0, "down": 5.0}
        with_gradients(model, early if t <= 10 else late)
        budgets.step()
        history.append(kept(model))
        with torch.no_grad():  # what an optimizer's momentum does to pruned triplets
            for adapter in parameters.values():
                assert t == 40 or not adapter.kept.all() or adapter.lora_E.all()  # type: ignore[union-attr]
                adapter.lora_E.fill_(1.0)
    assert history[9]["across"] < 4
    assert history[39] == {"conv": 0, "up": 0, "across": 4, "down": 4}


def test_settled_triplets_stay_pruned_whatever_their_gradients() -> None:
    model = all_ones()
    budgets = allocator(model)
    for t in range(1, 60):
        with_gradients(model, {"conv": 1.0, "up": 1.0} if t < 36 else {"across": 9.0, "down": 9.0})
        budgets.step()
        if t >= 35:
            assert kept(model) == {"conv": 4, "up": 4, "across": 0, "down": 0}
            assert not adapters(model)["across"].lora_E.any()
        with torch.no_grad():
            for adapter in adapters(model).values():
                adapter.lora_E.fill_(1.0)
                adapter.lora_E.grad = None if t >= 35 else adapter.lora_E.grad  # no longer needed
    assert budgets.t == 59


def test_between_allocations_nothing_is_masked() -> None:
    model = all_ones()
    budgets = allocator(model)
    allocated = []
    for t in range(1, 35):
        with_gradients(model, dict.fromkeys(LAYERS, 1.0))
        budgets.step()
        if not all(adapter.lora_E.all() for adapter in adapters(model).values()):
            allocated.append(t)
        with torch.no_grad():
            for adapter in adapters(model).values():
                adapter.lora_E.fill_(1.0)
    assert allocated == list(range(6, 35, 3))


def test_layers_without_triplets_are_the_base_and_are_saved(tmp_path: Path) -> None:
    model = all_ones(tinit=0, tfinal=0, deltaT=1, total_step=5)
    budgets = allocator(model)
    for _ in range(5):
        with_gradients(model, {"across": 1.0, "down": 2.0})
        budgets.step()
    assert kept(model) == {"conv": 0, "up": 0, "across": 4, "down": 4}
    save_adapter(model, tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert tensors["base_model.model.conv.lora_A"].shape == (0, 12)
    assert tensors["base_model.model.up.lora_B"].shape == (24, 0)
    loaded = load_adapter(Net(), tmp_path, trainable=True)
    expected = model.eval()(*batch(0)).y
    torch.testing.assert_close(loaded(*batch(0)).y, expected)
    with quiet_peft():
        peft = PeftModel.from_pretrained(Net(), tmp_path).eval()
    torch.testing.assert_close(peft(*batch(0)).y, expected)
    (loaded(*batch(0)).loss + control(loaded).regularizer()).backward()
    assert adapters(loaded)["down"].lora_E.grad is not None
    merge(loaded)
    torch.testing.assert_close(loaded(*batch(0)).y, expected, rtol=1e-5, atol=1e-4)
    assert torch.equal(loaded.conv.base_layer.weight, Net().conv.weight)


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_siblings_of_different_ranks_run_as_a_group(backend: str, tmp_path: Path) -> None:
    ranks = {"q_proj": 3, "k_proj": 0, "v_proj": 1}
    paths = [f"model.layers.{layer}.self_attn.{name}" for layer in (0, 1) for name in ranks]
    kept = {f"{path}.lora_E": [i < ranks[path.rpartition(".")[2]] for i in range(4)] for path in paths}
    config = AdaLoRAConfig(**fields(target_modules=list(ranks), rank_pattern=kept))
    model = inject(tiny_models.llama(), config, backend=backend)
    randomise([p for p in model.parameters() if p.requires_grad])
    expected = tiny_models.output(model, tiny_models.tokens())
    expected.square().mean().backward()
    parts = {name: p for name, p in model.named_parameters() if ".adapters." in name and p.numel()}
    assert parts
    assert all(p.grad is not None and p.grad.any() for p in parts.values())
    save_adapter(model, tmp_path)
    with quiet_peft():
        peft = PeftModel.from_pretrained(tiny_models.llama(), tmp_path).eval()
    torch.testing.assert_close(tiny_models.output(peft, tiny_models.tokens()), expected, rtol=1e-4, atol=1e-5)


def test_a_pruned_adapter_trains_on_with_the_triplets_that_it_has(tmp_path: Path) -> None:
    model = trained(STEPS)
    save_adapter(model, tmp_path)
    loaded = load_adapter(Net(), tmp_path, trainable=True)
    ranks = {path: adapter.r for path, adapter in adapters(loaded).items()}
    follower = control(loaded)
    assert type(follower) is Orthogonality
    for _ in range(3):
        follower.step()
    assert follower.state_dict() == {}
    follower.load_state_dict({})
    assert {path: adapter.r for path, adapter in adapters(loaded).items()} == ranks
    with pytest.raises(ValueError, match="inject it with the config that the training began with"):
        follower.load_state_dict(allocator(model).state_dict())


def test_16_bit_adapters_are_allocated() -> None:
    model = inject(Net().bfloat16(), AdaLoRAConfig(**fields()), autocast_adapter_dtype=False)
    budgets = allocator(model)
    for t in range(1, 37):
        (model(*batch(t, torch.bfloat16)).loss + budgets.regularizer()).backward()
        with torch.no_grad():
            for parameter in our_parameters(model).values():
                parameter.sub_(0.1 * parameter.grad)
        budgets.step()
        model.zero_grad()
    assert sum(kept(model).values()) == 8


# To stop and to go on.


def to_bytes(state: dict[str, Any]) -> tuple[str, bytes]:
    """The state as JSON and safetensors can keep it."""
    tensors = {
        f"{key}/{name}": value
        for key, values in state.items()
        if isinstance(values, dict)
        for name, value in values.items()
        if isinstance(value, Tensor)
    }
    kinds = {name.split("/")[0] for name in tensors}
    return json.dumps({key: {} if key in kinds else value for key, value in state.items()}), save(tensors)


def from_bytes(text: str, tensors: bytes) -> dict[str, Any]:
    state = json.loads(text)
    for name, tensor in load(tensors).items():
        key, _, rest = name.partition("/")
        state[key][rest] = tensor
    return state


@pytest.mark.parametrize("stop", [0, 3, 20, 35, 40])
def test_a_resumed_training_is_the_same_bit_for_bit(stop: int, tmp_path: Path) -> None:
    torch.manual_seed(1)
    stopped = inject(Net(), AdaLoRAConfig(**fields()))
    budgets, optimizer = allocator(stopped), torch.optim.AdamW(our_parameters(stopped).values(), lr=0.02)
    train(stopped, budgets, optimizer, 0, stop)
    state, moments = to_bytes(budgets.state_dict()), io.BytesIO()
    torch.save(optimizer.state_dict(), moments)
    values = {name: parameter.detach().clone() for name, parameter in our_parameters(stopped).items()}
    expected = pattern(stopped)
    train(stopped, budgets, optimizer, stop, STEPS)  # must leave what was kept alone

    resumed = inject(Net(), AdaLoRAConfig(**fields()))
    budgets, optimizer = allocator(resumed), torch.optim.AdamW(our_parameters(resumed).values(), lr=0.02)
    budgets.load_state_dict(from_bytes(*state))
    with torch.no_grad():
        for name, parameter in our_parameters(resumed).items():
            parameter.copy_(values[name])
    moments.seek(0)
    optimizer.load_state_dict(torch.load(moments))
    assert budgets.t == stop
    assert pattern(resumed) == expected
    train(resumed, budgets, optimizer, stop, STEPS)
    for model in (stopped, resumed):
        assert pattern(model) == pattern(straight())
        for name, parameter in our_parameters(model).items():
            assert torch.equal(parameter, our_parameters(straight())[name]), name
    for side, model in (("straight", straight()), ("resumed", resumed)):
        save_adapter(model, tmp_path / side)
    first, second = (load_file(tmp_path / side / "adapter_model.safetensors") for side in ("straight", "resumed"))
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_a_file_saved_during_the_training_computes_the_same(tmp_path: Path) -> None:
    model = trained(12)
    assert 8 < sum(kept(model).values()) < 16
    save_adapter(model, tmp_path)
    torch.testing.assert_close(load_adapter(Net(), tmp_path)(*batch(0)).y, model(*batch(0)).y)
    assert all(adapter.r == 4 for adapter in adapters(model).values())


def test_the_config_that_was_injected_is_not_written_to() -> None:
    config = AdaLoRAConfig(**fields())
    model = inject(Net(), config)
    train(model, allocator(model), torch.optim.AdamW(our_parameters(model).values()), 0, 10)
    assert pattern(model) is not None
    assert config.rank_pattern is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("t"), r"got one without \['t'\]"),
        (
            lambda state: state["sensitivity"].pop("up.lora_E"),
            r"sensitivity of up.lora_E must have shape \(4, 1\), got None",
        ),
        (
            lambda state: state["uncertainty"].update({"q.lora_A": torch.ones(2)}),
            "uncertainty of q.lora_A must have shape None",
        ),
        (
            lambda state: state["uncertainty"].update({"up.lora_E": torch.ones(3, 1)}),
            r"must have shape \(4, 1\), got \(3, 1\)",
        ),
        (
            lambda state: state["rank_pattern"].update({"up.lora_E": [True]}),
            r"rank_pattern of up.lora_E must have shape \(4,\)",
        ),
    ],
)
def test_a_state_of_another_model_is_refused(change: Any, message: str) -> None:
    model = trained(20)
    torch.manual_seed(1)
    source = inject(Net(), AdaLoRAConfig(**fields()))
    budgets = allocator(source)
    train(source, budgets, torch.optim.AdamW(our_parameters(source).values()), 0, 20)
    state = from_bytes(*to_bytes(budgets.state_dict()))
    change(state)
    target, before = allocator(model), pattern(model)
    at = target.t
    with pytest.raises(ValueError, match=message):
        target.load_state_dict(state)
    assert target.t == at
    assert pattern(model) is before


# The regularizer.


def test_the_regularizer_is_the_mean_of_unsquared_norms() -> None:
    model = inject(Net(), AdaLoRAConfig(**fields()))
    with torch.no_grad():
        for parameter in our_parameters(model).values():
            parameter.zero_()
    assert control(model).regularizer().item() == pytest.approx(0.3 * 2)  # ‖−I‖ = √4
    with torch.no_grad():
        adapters(model)["up"].lora_A[0, 3] = 2.0  # its gram is diag(4, 0, 0, 0)
    value = control(model).regularizer()
    assert value.item() == pytest.approx(0.3 * (7 * 2 + (9 + 3) ** 0.5) / 8)
    value.backward()  # type: ignore[union-attr]
    assert adapters(model)["up"].lora_A.grad is not None
    assert all(adapter.lora_E.grad is None for adapter in adapters(model).values())


def test_the_regularizer_rests_at_orthogonal_factors_and_runs_in_full_precision() -> None:
    model = inject(Net(), AdaLoRAConfig(**fields()))
    with torch.no_grad():
        for adapter in adapters(model).values():
            adapter.lora_A.copy_(torch.eye(*adapter.lora_A.shape))
            adapter.lora_B.copy_(torch.eye(*adapter.lora_B.shape))
    value = control(model).regularizer()
    assert value == 0
    value.backward()  # type: ignore[union-attr]
    assert all(not adapter.lora_A.grad.any() for adapter in adapters(model).values())  # type: ignore[union-attr]
    with torch.no_grad():
        adapters(model)["up"].lora_A[0, 0] += 1e-4
    exact = control(model).regularizer()
    assert exact > 0
    with torch.autocast("cpu", torch.bfloat16):
        assert control(model).regularizer() == exact


def test_no_regularizer_at_weight_zero() -> None:
    assert control(inject(Net(), AdaLoRAConfig(**fields(orth_reg_weight=0)))).regularizer() == 0.0


# Refusals.


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"total_step": None}, "total_step must be a positive integer, got None"),
        ({"total_step": 0}, "total_step must be a positive integer, got 0"),
        ({"tinit": 35}, "tinit must be less than total_step - tfinal, which is 35, got 35"),
        ({"tinit": -1}, "tinit must be at least 0, got -1"),
        ({"tfinal": -1}, "tfinal must be at least 0, got -1"),
        ({"deltaT": 0}, "deltaT must be at least 1, got 0"),
        ({"init_r": 0, "target_r": 0}, "init_r must be at least 1, got 0"),
        ({"target_r": 5}, "target_r must be from 0 to init_r, which is 4, got 5"),
        ({"target_r": -1}, "target_r must be from 0 to init_r"),
        ({"orth_reg_weight": -0.1}, "orth_reg_weight must be at least 0, got -0.1"),
        ({"beta1": 1.0}, r"beta1 must be in \(0, 1\), got 1.0"),
        ({"beta2": 0.0}, r"beta2 must be in \(0, 1\), got 0.0"),
        ({"lora_dropout": 1.0}, r"lora_dropout must be in \[0, 1\)"),
        ({"bias": "all"}, "bias must be one of none, lora_only"),
        ({"rank_pattern": {"up": [True] * 4}}, "each must be a module path followed by .lora_E"),
        ({"rank_pattern": {"up.lora_E": [True]}}, "init_r = 4 triplets whether it is kept, got 1 values"),
        ({"rank_pattern": {"up.lora_E": 3}}, "rank_pattern must be"),
        ({"init_lora_weights": "gaussian"}, "init_lora_weights must be bool"),
    ],
)
def test_configs_refuse_what_they_cannot_mean(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AdaLoRAConfig(**fields(**change))


def test_a_pattern_of_another_model_is_refused() -> None:
    config = AdaLoRAConfig(**fields(rank_pattern={"q.lora_E": [True] * 4}))
    with pytest.raises(ValueError, match=r"'q.lora_E' is of no layer that target_modules selects"):
        inject(Net(), config)


def test_embeddings_are_refused_by_name() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(5, 3)})
    with pytest.raises(
        ValueError, match="embed: Embedding cannot take an adapter of AdaLoRAConfig: only Linear, Conv1D, Conv2d can"
    ):
        inject(model, AdaLoRAConfig(target_modules=["embed"], total_step=10))


def test_a_file_with_dora_is_refused_by_name(tmp_path: Path) -> None:
    save_adapter(inject(Net(), AdaLoRAConfig(**fields())), tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "use_dora": True}))
    with pytest.raises(ValueError, match="use_dora=True changes what the adapter computes"):
        load_adapter(Net(), tmp_path)


def test_a_step_without_gradients_says_when_to_call_it() -> None:
    model = inject(Net(), AdaLoRAConfig(**fields()))
    budgets = allocator(model)
    with pytest.raises(ValueError, match=r"conv.lora_A must have its gradient .* before optimizer.zero_grad\(\)"):
        budgets.step()
    assert budgets.t == 0


def test_a_layer_that_a_batch_does_not_use_counts_as_one_with_gradients_of_zero() -> None:
    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: Tensor, both: bool) -> Tensor:
            y: Tensor = self.one(x)
            return y + self.other(x) if both else y

    def trained(zeros: bool) -> nn.Module:
        torch.manual_seed(0)
        model = inject(Halves(), AdaLoRAConfig(**fields(target_modules=["one", "other"], orth_reg_weight=0.0)))
        budgets, x = allocator(model), torch.randn(4, 6)
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.SGD(parameters, 0.01)
        for step in range(45):
            model(x, step % 3 > 0).square().mean().backward()
            for parameter in parameters:
                if zeros and parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
            optimizer.step()
            budgets.step()
            optimizer.zero_grad()
        return model

    model, same = trained(False), trained(True)
    assert pattern(model) == pattern(same)
    assert sum(map(sum, pattern(model).values())) == 4
    for one, other in zip(model.parameters(), same.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_training_too_short_to_measure_importance_is_refused() -> None:
    model = inject(Net(), AdaLoRAConfig(**fields(tinit=0, tfinal=44)))
    with pytest.raises(ValueError, match="total_step - tfinal must be at least 2 to train, got 1"):
        control(model)


def test_control_of_a_finished_allocation_keeps_its_mask() -> None:
    """A second control() on an adapter whose budget has been dealt out goes on masking, and does not begin anew."""
    config = AdaLoRAConfig(init_r=3, target_r=1, total_step=4, target_modules=["up", "down"])
    model = inject(tiny_models.mlp(), config)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.05)

    def steps(count: int) -> None:
        between = control(model)
        for _ in range(count):
            model(torch.ones(3, 20)).square().sum().backward()
            optimizer.step()
            between.step()
            optimizer.zero_grad()

    steps(4)
    pattern = adapter_configs(model)["default"].rank_pattern  # type: ignore[attr-defined]
    steps(3)
    assert adapter_configs(model)["default"].rank_pattern == pattern  # type: ignore[attr-defined]
    for name in ("up", "down"):
        adapter = model.get_submodule(name).adapters["default"]
        assert (adapter.lora_E[~adapter.kept] == 0).all()
