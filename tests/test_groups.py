"""Layers that read the same x run as one, and a guess that was wrong never changes a result."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from tiny_models import llama, randomise, tokens
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastadapt
from fastadapt import DoRAConfig, LoRAConfig, VeRAConfig
from fastadapt.layers import linear
from fastadapt.layers.linear import AdapterLinear
from fastadapt.model.targets import shared_inputs
from fastadapt.operators.adapter_linear import function

QKV = ("q_proj", "k_proj", "v_proj")


class Attention(nn.Module):
    """Three projections of one input, as models write them; `keys` may take the place of x for k and v."""

    def __init__(self, biased: bool = False) -> None:
        super().__init__()
        self.q_proj = nn.Linear(12, 16, bias=biased)
        self.k_proj = nn.Linear(12, 8, bias=biased)
        self.v_proj = nn.Linear(12, 8, bias=biased)

    def forward(self, x: Tensor, keys: Tensor | None = None) -> Tensor:
        keys = x if keys is None else keys
        return torch.cat([self.q_proj(x), self.k_proj(keys), self.v_proj(keys)], dim=-1)


def attention(config: Any = None, **named: Any) -> Any:
    torch.manual_seed(0)
    model = Attention(**named).eval()
    fastadapt.inject(model, config or LoRAConfig(r=4, target_modules=list(QKV)))
    randomise(p for p in model.parameters() if p.requires_grad)
    return model


def ungrouped(model: Any) -> Any:
    """A copy whose layers know of no group."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, AdapterLinear):
            module.group = None
    return model


def grads(model: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def step(model: Any, x: Tensor, *more: Tensor) -> dict[str, Tensor]:
    leaf = x.clone().requires_grad_()
    y = model(leaf, *more)
    y.square().sum().backward()
    assert leaf.grad is not None
    return {"y": y.detach(), "dx": leaf.grad, **grads(model)}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        torch.testing.assert_close(value, expected[name], rtol=2e-5, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.fixture
def sizes(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many layers each run of the operator had, in order."""
    found: list[int] = []
    run = function.adapter_linear_group

    def counted(x: Tensor, weights: Any, forms: Any, **named: Any) -> tuple[Tensor, ...]:
        found.append(len(weights))
        return run(x, weights, forms, **named)

    monkeypatch.setattr(function, "adapter_linear_group", counted)
    monkeypatch.setattr(linear, "adapter_linear_group", counted)
    alone = linear.adapter_linear
    monkeypatch.setattr(linear, "adapter_linear", lambda *args, **named: found.append(1) or alone(*args, **named))
    return found


CONFIGS = {
    "LoRA": LoRAConfig(r=4, target_modules=list(QKV)),
    "ranks that differ": LoRAConfig(r=4, rank_pattern={"k_proj": 7}, target_modules=list(QKV)),
    "DoRA": DoRAConfig(r=4, target_modules=list(QKV)),
    "VeRA": VeRAConfig(r=5, target_modules=list(QKV)),
    "DVoRA": VeRAConfig(r=5, use_dora=True, target_modules=list(QKV)),
    "two of three": LoRAConfig(r=4, target_modules=["q_proj", "v_proj"]),
}


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_group_gives_what_its_layers_give(name: str, biased: bool, sizes: list[int]) -> None:
    model = attention(copy.deepcopy(CONFIGS[name]), biased=biased)
    x = torch.randn(3, 5, 12)
    together = step(model, x)
    assert sizes == [2 if name == "two of three" else 3]
    assert_same(together, step(ungrouped(model), x))
    with torch.no_grad():
        torch.testing.assert_close(model(x), ungrouped(model)(x))


@pytest.mark.parametrize("config", [LoRAConfig(r=4), DoRAConfig(r=4), VeRAConfig(r=8)], ids=lambda c: type(c).__name__)
def test_a_language_model_runs_grouped(config: Any, sizes: list[int]) -> None:
    config.target_modules = "all-linear"
    model = fastadapt.inject(llama(), config)
    randomise(p for p in model.parameters() if p.requires_grad)
    alone = ungrouped(model)
    ids = tokens()
    model(ids, labels=ids).loss.backward()
    assert sizes == [3, 1, 2, 1] * 2  # q k v, o, gate up, down
    together = grads(model)
    alone(ids, labels=ids).loss.backward()
    assert sizes[8:] == [1] * 14
    assert_same(together, grads(alone))
    with torch.no_grad():
        generated = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
        assert torch.equal(generated, alone.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0))


def without_adapter(model: Any) -> None:
    model.k_proj.active = ()


def merged(model: Any) -> None:
    model.k_proj.merge()


def other_mode(model: Any) -> None:
    model.k_proj.train()


def other_device(model: Any) -> None:
    model.k_proj.to("meta")


@pytest.mark.parametrize("change", [without_adapter, merged, other_mode, other_device])
def test_a_member_that_differs_stays_out(change: Callable[[Any], None], sizes: list[int]) -> None:
    model = attention()
    x = torch.randn(5, 12)
    expected = {name: ungrouped(model).get_submodule(name)(x) for name in QKV}
    change(model)
    sizes.clear()
    for name in ("q_proj", "v_proj"):
        torch.testing.assert_close(model.get_submodule(name)(x), expected[name])
    assert sizes == [2]
    if change is not other_device:
        y = model.k_proj(x)
        torch.testing.assert_close(y, model.k_proj.base_layer(x) if change is without_adapter else expected["k_proj"])


def test_another_x_is_never_taken_for_the_same(sizes: list[int]) -> None:
    model = attention()
    alone = ungrouped(model)
    x, keys = torch.randn(5, 12), torch.randn(5, 12)
    for _ in range(3):
        assert_same(step(model, x, keys), step(alone, x, keys))
    assert sizes[-3:] == [1, 1, 1], "the guess was wrong: no more groups"
    fresh = attention()
    q = fresh.q_proj(x)
    x.mul_(2)  # written in place between the layers
    torch.testing.assert_close(fresh.k_proj(x), alone.k_proj(x))
    torch.testing.assert_close(q, alone.q_proj(x / 2))


@pytest.mark.parametrize(
    "change", ["parameter", "weight", "bias", "scaling", "adapter", "grad mode", "optimizer", "autocast"]
)
def test_what_changed_between_the_layers_counts(change: str) -> None:
    model = attention()
    x = torch.randn(5, 12)
    model.q_proj(x)
    with torch.no_grad():
        if change == "parameter":
            model.k_proj.adapters["default"].lora_B.add_(1)
        elif change == "weight":
            model.k_proj.base_layer.weight.add_(1)
        elif change == "bias":
            model.k_proj.base_layer.bias = nn.Parameter(torch.ones(8), requires_grad=False)
        elif change == "scaling":
            model.k_proj.adapters["default"].scaling *= 2
        elif change == "adapter":
            model.k_proj.active = ()
        elif change == "grad mode":
            assert not model.k_proj(x).requires_grad
    if change == "optimizer":  # a fused one raises no version counter
        parameters = list(model.k_proj.adapters.parameters())
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        torch.optim.AdamW(parameters, lr=0.5, fused=True).step()
    with torch.autocast("cpu", enabled=change == "autocast", dtype=torch.bfloat16):
        y = model.k_proj(x)
        torch.testing.assert_close(y, ungrouped(model).k_proj(x))
        assert y.dtype == (torch.bfloat16 if change == "autocast" else torch.float32)


def test_outputs_that_nobody_fetches_die_with_x() -> None:
    model = attention()
    x = torch.randn(5, 12)
    with torch.no_grad():
        model.q_proj(x)
        (output, _), *_ = model.q_proj.group._round.made[1].values()
        alive = weakref.ref(output)
        del output
        assert alive() is not None
        del x
        gc.collect()
    assert alive() is None
    assert model.q_proj.group._round is None


def test_a_layer_that_is_never_called_ends_the_group(sizes: list[int]) -> None:
    model = attention()
    for _ in range(4):
        x = torch.randn(5, 12)
        model.q_proj(x)
        del x
    assert sizes == [3, 3, 1, 1]


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_checkpointing_recomputes_the_group(reentrant: bool, p: float, sizes: list[int]) -> None:
    model = attention(LoRAConfig(r=4, lora_dropout=p, target_modules=list(QKV))).train()
    x = torch.randn(5, 12)
    torch.manual_seed(3)
    plain = step(model, x)
    torch.manual_seed(3)
    assert_same(
        step(lambda_module(model, reentrant), x), {f"model.{n}" if "." in n else n: v for n, v in plain.items()}
    )
    assert sizes == [3, 3, 3]


def lambda_module(model: Any, reentrant: bool) -> Any:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Any:
            return checkpoint(self.model, x, use_reentrant=reentrant)

    return Checkpointed()


def test_a_meta_model_runs_grouped(sizes: list[int]) -> None:
    model = attention().to("meta")
    assert model(torch.empty(5, 12, device="meta")).shape == (5, 32)
    assert sizes == [3]


def test_one_mask_serves_the_group() -> None:
    model = attention(LoRAConfig(r=4, lora_dropout=0.5, target_modules=list(QKV))).train()
    with torch.no_grad():
        for name in QKV[1:]:  # the same layer three times
            layer, first = model.get_submodule(name), model.q_proj
            layer.base_layer.weight.copy_(first.base_layer.weight[:8])
            layer.adapters["default"].lora_A.copy_(first.adapters["default"].lora_A)
            layer.adapters["default"].lora_B.copy_(first.adapters["default"].lora_B[:8])
    x = torch.randn(5, 12)
    q, k, v = model(x).split([16, 8, 8], dim=-1)
    torch.testing.assert_close(k, q[:, :8])
    torch.testing.assert_close(v, k)


def test_copies_and_pickles_are_groups_of_their_own(sizes: list[int]) -> None:
    model = attention()
    x = torch.randn(5, 12)
    model.q_proj(x)  # leaves outputs behind
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.q_proj.group is other.k_proj.group is not model.q_proj.group
        sizes.clear()
        torch.testing.assert_close(other(x), model(x))
        assert sizes[0] == 3
    lonely = copy.deepcopy(model.k_proj)
    torch.testing.assert_close(lonely(x), model.k_proj(x))


def test_inference_mode_and_compile_leave_groups_alone(sizes: list[int]) -> None:
    model = attention()
    with torch.inference_mode():
        x = torch.randn(5, 12)
        torch.testing.assert_close(model(x), ungrouped(model)(x))
    assert set(sizes) == {1}
    x = torch.randn(5, 12)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), ungrouped(model)(x))


def test_cross_attention_groups_keys_and_values() -> None:
    model = nn.ModuleDict({"encoder_attn": Attention(), "self_attn": Attention()})
    fastadapt.inject(model, LoRAConfig(r=2, target_modules=list(QKV)))
    found = [[model_path(model, layer) for layer in layers] for layers in shared_inputs(model)]
    assert found == [
        ["encoder_attn.k_proj", "encoder_attn.v_proj"],
        ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    ]
    x, keys = torch.randn(5, 12), torch.randn(5, 12)
    cross: Any = model["encoder_attn"]
    torch.testing.assert_close(cross(x, keys), ungrouped(model)["encoder_attn"](x, keys))


def model_path(model: nn.Module, wanted: nn.Module) -> str:
    return next(path for path, module in model.named_modules() if module is wanted)


GROUPED = {
    "LoRA": LoRAConfig(r=4, target_modules=list(QKV)),
    "RepAdapter": fastadapt.RepAdapterConfig(r=4, adapter_dropout=0.0, target_modules=list(QKV)),
}


@pytest.mark.parametrize("change", ["autocast", "parameter", "frozen", "scaling", "mode"])
@pytest.mark.parametrize("name", GROUPED)
def test_what_one_layer_made_serves_no_other_case(name: str, change: str) -> None:
    """k after q on the same x, when something has changed between the two, is k on an x of its own."""
    model, x = attention(GROUPED[name]).train(), torch.randn(5, 12)
    adapter = model.k_proj.adapters["default"]
    with torch.autocast("cpu", torch.bfloat16, enabled=change == "autocast"):
        model.q_proj(x)
    if change == "parameter":
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.mul_(2)
    elif change == "frozen":
        model.requires_grad_(False)
    elif change == "scaling":
        adapter.scaling *= 2
    elif change == "mode":
        model.eval()
    y, alone = model.k_proj(x), model.k_proj(x.clone())
    torch.testing.assert_close(y, alone)
    assert y.requires_grad == alone.requires_grad


@pytest.mark.parametrize("backward", [True, False])
@pytest.mark.parametrize("name", GROUPED)
def test_a_sibling_that_never_comes_does_not_keep_x(name: str, backward: bool) -> None:
    model, x = attention(GROUPED[name]).train(), torch.randn(5, 12)
    alive = weakref.ref(x)
    with torch.set_grad_enabled(backward):
        y = model.q_proj(x)
        if backward:
            y.sum().backward()
    del x, y
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize("name", GROUPED)
def test_a_backward_between_siblings_does_not_use_up_the_others_graph(name: str) -> None:
    """Each layer's own backward, as layers that share nothing have it: the second one runs by itself then."""
    model, x = attention(GROUPED[name]).train(), torch.randn(5, 12)
    for layer in (model.q_proj, model.k_proj, model.v_proj):
        layer(x).sum().backward()
    together = grads(model)
    alone = ungrouped(model)
    for layer in (alone.q_proj, alone.k_proj, alone.v_proj):
        layer(x.clone()).sum().backward()
    assert_same(together, grads(alone))


@pytest.mark.parametrize("wrapped", [("q_proj",), ("k_proj",), ("q_proj", "k_proj"), ("k_proj", "v_proj"), QKV])
@pytest.mark.parametrize("name", GROUPED)
def test_single_layers_may_be_checkpointed(name: str, wrapped: tuple[str, ...]) -> None:
    model, x = attention(GROUPED[name]).train(), torch.randn(5, 12, requires_grad=True)

    def run(checkpointed: tuple[str, ...]) -> list[Tensor]:
        ys = [
            checkpoint(model.get_submodule(name), x, use_reentrant=False)
            if name in checkpointed
            else model.get_submodule(name)(x)
            for name in QKV
        ]
        x.grad = None
        torch.cat(ys, -1).square().sum().backward()
        return [*ys, x.grad, *grads(model).values()]  # type: ignore[list-item]

    for actual, expected in zip(run(wrapped), run(()), strict=True):
        torch.testing.assert_close(actual, expected)


def test_what_inference_mode_made_is_not_fetched_outside() -> None:
    model, x = attention(), torch.randn(5, 12)
    with torch.inference_mode():
        model.q_proj(x)
    with torch.no_grad():
        assert not model.k_proj(x).is_inference()


def test_a_mode_ends_what_waits() -> None:
    model, x = attention(), torch.randn(5, 12)
    model.q_proj(x)
    assert model.q_proj.group._round is not None
    model.train()
    assert model.q_proj.group._round is None


@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("used", [("q_proj",), ("k_proj",), ("q_proj", "v_proj")])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_member_without_a_loss_has_no_gradient(name: str, used: tuple[str, ...], p: float, sizes: list[int]) -> None:
    """As by itself: not zeros, which an optimizer would take for a step of its momentum and its weight decay."""
    config = copy.deepcopy(CONFIGS[name])
    setattr(config, "vera_dropout" if isinstance(config, VeRAConfig) else "lora_dropout", p)
    model, x = attention(config, biased=True).train(), torch.randn(5, 12)
    found = []
    for tried in (model, ungrouped(model)):
        leaf = x.clone().requires_grad_()
        torch.manual_seed(3)  # of a group all have the mask of its first
        ys = {projection: tried.get_submodule(projection)(leaf) for projection in QKV}
        if p and tried is not model:
            ys = {}
            for projection in QKV:
                torch.manual_seed(3)
                ys[projection] = tried.get_submodule(projection)(leaf)
        sum(ys[projection].square().sum() for projection in used).backward()  # type: ignore[union-attr]
        assert leaf.grad is not None
        found.append({"dx": leaf.grad, **grads(tried)})
    assert sizes[0] == (2 if name == "two of three" else 3)
    assert_same(*found)


@pytest.mark.parametrize("name", ["LoRA", "DoRA", "VeRA"])
def test_a_kept_graph_serves_one_member_after_the_other(name: str) -> None:
    model, x = attention(copy.deepcopy(CONFIGS[name])), torch.randn(5, 12)
    ys = [model.get_submodule(projection)(x) for projection in QKV]
    for y in ys:
        y.square().sum().backward(retain_graph=True)
    one_by_one = grads(model)
    model(x).square().sum().backward()
    assert_same(one_by_one, grads(model))
