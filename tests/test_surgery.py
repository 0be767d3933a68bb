"""Models with adapters in them: switching, merging, copying, moving, training, taking the adapters out again."""

from __future__ import annotations

import copy
import io
import pickle
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from tiny_models import output, randomise
from torch import Tensor, nn

import fastadapt
from fastadapt import DoRAConfig, LoRAConfig, VeRAConfig
from fastadapt.model.adapted import adapter_configs, adapter_layers
from fastadapt.model.inject import exchange

CONFIGS: dict[str, Callable[..., Any]] = {
    "lora": lambda **fields: LoRAConfig(r=4, lora_alpha=6, **fields),
    "rslora": lambda **fields: LoRAConfig(r=4, lora_alpha=6, use_rslora=True, **fields),
    "lora_bias": lambda **fields: LoRAConfig(r=4, lora_alpha=6, lora_bias=True, **fields),
    "bias": lambda **fields: LoRAConfig(r=4, lora_alpha=6, bias="lora_only", **fields),
    "dora": lambda **fields: DoRAConfig(r=4, lora_alpha=6, **fields),
    "vera": lambda **fields: VeRAConfig(r=6, **fields),
    "dvora": lambda **fields: VeRAConfig(r=6, use_dora=True, **fields),
}
MLP_TARGETS = ["up", "down"]


def adapter_parameters(model: nn.Module, adapter_name: str = "default") -> dict[str, nn.Parameter]:
    """Parameters of one adapter by name."""
    return {name: p for name, p in model.named_parameters() if f".adapters.{adapter_name}." in f".{name}"}


def adapted_mlp(
    method: str = "lora", *names: str, dtype: torch.dtype = torch.float32, **fields: Any
) -> tiny_models.MLP:
    """An MLP with random adapters of these names, the last active."""
    model = tiny_models.mlp().to(dtype)
    for seed, name in enumerate(names or ("default",)):
        fastadapt.inject(model, CONFIGS[method](target_modules=MLP_TARGETS, **fields), name)
        randomise(adapter_parameters(model, name).values(), seed)
    return model


def inputs(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(3, 5, 20, generator=torch.Generator().manual_seed(3)).to(dtype)


def base_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the base tensors, under the names that they have without adapters."""
    found = {}
    for name, tensor in model.state_dict().items():
        if ".adapters." not in name:
            found[name.replace(".base_layer.", ".")] = tensor.detach().clone()
    return found


def assert_same_bits(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert ours.keys() == expected.keys()
    for name, tensor in expected.items():
        assert ours[name].dtype == tensor.dtype
        assert torch.equal(ours[name], tensor), name


# Adapters beside each other.


def test_inject_starts_as_the_identity_and_freezes_the_base() -> None:
    for method in ("lora", "rslora", "dora", "vera", "dvora"):
        model = tiny_models.mlp()
        expected = model(inputs())
        returned = fastadapt.inject(model, CONFIGS[method](target_modules=MLP_TARGETS))
        assert returned is model
        assert torch.allclose(model(inputs()), expected, atol=1e-5), method
        trainable = {name for name, p in model.named_parameters() if p.requires_grad}
        assert trainable == set(adapter_parameters(model)), method
        assert isinstance(model.up, fastadapt.AdapterLinear)
        assert isinstance(model.up.base_layer, nn.Linear)
        assert model.up.active == ("default",)


def test_parameters_have_the_names_and_shapes_that_peft_gives_them() -> None:
    adapter = adapted_mlp("dora").up.adapters["default"]
    assert adapter.lora_A.shape == (4, 20)
    assert adapter.lora_B.shape == (28, 4)
    assert adapter.lora_magnitude_vector.shape == (28,)
    adapter = adapted_mlp("vera").up.adapters["default"]
    assert adapter.vera_lambda_b.shape == (28,)
    assert adapter.vera_lambda_d.shape == (6,)


def test_several_adapters_one_active() -> None:
    model = adapted_mlp("lora", "first", "second")
    fastadapt.inject(model, DoRAConfig(r=3, target_modules=["down"]), "third")
    randomise(adapter_parameters(model, "third").values(), 9)
    results = {}
    for name in ("first", "second", "third", None):
        fastadapt.set_adapter(model, name)
        results[name] = model(inputs())
        trainable = {parameter for parameter, p in model.named_parameters() if p.requires_grad}
        assert trainable == (set() if name is None else set(adapter_parameters(model, name)))
    assert model.up.active == ()
    assert torch.equal(results[None], tiny_models.mlp()(inputs()))
    values = list(results.values())
    assert all(not torch.allclose(a, b) for i, a in enumerate(values) for b in values[:i])
    for name in ("second", "first"):
        fastadapt.set_adapter(model, name)
        assert torch.equal(model(inputs()), results[name])


def test_a_layer_without_the_active_adapter_is_the_base_layer() -> None:
    model = adapted_mlp("lora", "everywhere")
    fastadapt.inject(model, LoRAConfig(r=2, target_modules=["down"]), "down")
    randomise(adapter_parameters(model, "down").values())
    alone = tiny_models.mlp()
    fastadapt.inject(alone, LoRAConfig(r=2, target_modules=["down"]), "down")
    randomise(adapter_parameters(alone, "down").values())
    assert torch.equal(model(inputs()), alone(inputs()))
    with fastadapt.disable_adapter(model):
        pass
    assert torch.equal(model(inputs()), alone(inputs()))


def test_disable_adapter_is_the_base_model_and_ends() -> None:
    model = adapted_mlp("dora", "first", "second")
    fastadapt.set_adapter(model, "first")
    adapted = model(inputs())
    with fastadapt.disable_adapter(model):
        assert torch.equal(model(inputs()), tiny_models.mlp()(inputs()))
    assert torch.equal(model(inputs()), adapted)
    with pytest.raises(RuntimeError, match="inside"), fastadapt.disable_adapter(model):
        raise RuntimeError("inside")
    assert torch.equal(model(inputs()), adapted)
    assert all(p.requires_grad for p in adapter_parameters(model, "first").values())


def test_all_modules_to_save_follow_the_active_adapter() -> None:
    model = tiny_models.mixed()
    expected = output(model, tiny_models.tokens())
    original_head, original_norm = model.head, model.norm
    for name in ("first", "second"):
        fastadapt.inject(model, LoRAConfig(r=2, target_modules=["fc1"], modules_to_save=["head", "norm"]), name)
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert {p.shape for p in trainable} == {(2, 15), (24, 2), (4, 7), (4,), (24,)}
    randomise(trainable)
    changed = output(model, tiny_models.tokens())
    assert not torch.allclose(changed, expected)
    fastadapt.set_adapter(model, "first")
    assert torch.equal(output(model, tiny_models.tokens()), expected)
    fastadapt.set_adapter(model, "second")
    with fastadapt.disable_adapter(model):
        assert torch.equal(output(model, tiny_models.tokens()), expected)
    assert torch.equal(output(model, tiny_models.tokens()), changed)
    fastadapt.unload(model)
    assert model.head is original_head
    assert model.norm is original_norm


def test_embedding_and_convolution_take_lora() -> None:
    model = tiny_models.mixed()
    expected = output(model, tiny_models.tokens())
    fastadapt.inject(model, LoRAConfig(r=3, lora_alpha=6, target_modules=["embed", "conv"]))
    assert torch.allclose(output(model, tiny_models.tokens()), expected, atol=1e-6)
    parameters = adapter_parameters(model)
    assert {tuple(p.shape) for p in parameters.values()} == {(3, 67), (12, 3), (3, 2, 3, 2), (5, 3, 1, 1)}
    randomise(parameters.values())
    adapted = output(model, tiny_models.tokens())
    assert not torch.allclose(adapted, expected)
    adapted.sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in parameters.values())
    fastadapt.merge(model)
    assert torch.allclose(output(model, tiny_models.tokens()), adapted, atol=1e-5)
    fastadapt.unmerge(model)
    assert torch.equal(output(model, tiny_models.tokens()), adapted)


# Merging.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", CONFIGS)
def test_merge_equals_forward_and_unmerge_restores_every_bit(method: str, dtype: torch.dtype) -> None:
    model = adapted_mlp(method, dtype=dtype)
    before, names = base_tensors(model), [name for name, _ in model.named_parameters()]
    pointers = {name: p.data_ptr() for name, p in model.named_parameters()}
    adapted = model(inputs(dtype))
    fastadapt.merge(model)
    merged = model(inputs(dtype))
    assert not torch.equal(model.up.base_layer.weight, before["up.weight"])
    # One rounding of the weight, and of everything behind it.
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    assert (merged - adapted).abs().max() <= tolerance * adapted.abs().max()
    assert set(names) <= {name for name, _ in model.named_parameters()}
    fastadapt.merge(model)
    assert torch.equal(model(inputs(dtype)), merged)
    fastadapt.unmerge(model)
    assert_same_bits(base_tensors(model), before)
    assert [name for name, _ in model.named_parameters()] == names
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == pointers
    assert torch.equal(model(inputs(dtype)), adapted)
    fastadapt.unmerge(model)
    assert_same_bits(base_tensors(model), before)


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_merge_on_conv1d(method: str) -> None:
    model = tiny_models.gpt2()
    before = base_tensors(model)
    fastadapt.inject(model, CONFIGS[method](target_modules="all-linear"))
    randomise(adapter_parameters(model).values())
    adapted = output(model, tiny_models.tokens())
    fastadapt.merge(model)
    assert torch.allclose(output(model, tiny_models.tokens()), adapted, atol=1e-4)
    fastadapt.unmerge(model)
    assert_same_bits(base_tensors(model), before)


def test_merging_a_tied_embedding_leaves_the_head_alone() -> None:
    model = tiny_models.llama(tie_word_embeddings=True)
    fastadapt.inject(model, LoRAConfig(r=2, target_modules=["embed_tokens"]))
    randomise(adapter_parameters(model).values())
    adapted = output(model, tiny_models.tokens())
    fastadapt.merge(model)
    assert torch.allclose(output(model, tiny_models.tokens()), adapted, atol=1e-4)
    fastadapt.unmerge(model)
    assert torch.equal(output(model, tiny_models.tokens()), adapted)
    assert model.lm_head.weight is model.get_input_embeddings().weight


def test_a_merged_model_refuses_what_would_mix_adapters() -> None:
    model = adapted_mlp("lora", "first", "second")
    fastadapt.merge(model)
    for forbidden in (
        lambda: fastadapt.set_adapter(model, "first"),
        lambda: fastadapt.inject(model, CONFIGS["lora"](target_modules=["up"]), "third"),
        lambda: fastadapt.disable_adapter(model).__enter__(),
    ):
        with pytest.raises(ValueError, match="merged"):
            forbidden()
    fastadapt.unmerge(model)
    fastadapt.set_adapter(model, "first")


def test_merge_of_an_adapter_with_nan_changes_nothing() -> None:
    model = adapted_mlp("lora")
    before = base_tensors(model)
    with torch.no_grad():
        model.down.adapters["default"].lora_A[0, 0] = float("nan")
    with pytest.raises(ValueError, match="down"):
        fastadapt.merge(model)
    assert_same_bits(base_tensors(model), before)
    assert not model.up.merged


@pytest.mark.parametrize("method", CONFIGS)
def test_unload_gives_the_original_modules_back(method: str) -> None:
    model = tiny_models.mlp()
    modules, before = dict(model.named_modules()), model.state_dict()
    before = {name: tensor.clone() for name, tensor in before.items()}
    fastadapt.inject(model, CONFIGS[method](target_modules=MLP_TARGETS))
    randomise(adapter_parameters(model).values())
    assert fastadapt.unload(model) is model
    assert dict(model.named_modules()) == modules
    assert_same_bits(dict(model.state_dict()), before)
    fastadapt.inject(model, LoRAConfig(r=2, target_modules=["up"]))
    assert list(model.up.adapters) == ["default"]


@pytest.mark.parametrize("method", CONFIGS)
def test_unload_of_a_merged_model_keeps_the_merged_weights(method: str) -> None:
    model = adapted_mlp(method)
    adapted = model(inputs())
    fastadapt.merge(model)
    fastadapt.unload(model)
    assert type(model.up) is nn.Linear
    assert torch.allclose(model(inputs()), adapted, atol=1e-5)


# Copying, moving, storing.


@pytest.mark.parametrize("method", CONFIGS)
def test_deepcopy_is_independent(method: str) -> None:
    model = adapted_mlp(method)
    expected = model(inputs())
    other = copy.deepcopy(model)
    assert torch.equal(other(inputs()), expected)
    randomise(adapter_parameters(other).values(), 77)
    assert not torch.allclose(other(inputs()), expected)
    assert torch.equal(model(inputs()), expected)
    fastadapt.inject(other, LoRAConfig(r=2, target_modules=["up"]), "more")
    with pytest.raises(ValueError, match="more"):
        fastadapt.set_adapter(model, "more")
    originals = {t.data_ptr() for t in (*model.parameters(), *model.buffers())}
    assert not originals & {t.data_ptr() for t in (*other.parameters(), *other.buffers())}


def projection_pointers(model: nn.Module) -> dict[str, set[int]]:
    """Where the storages of VeRA's projections are, over all layers."""
    found: dict[str, set[int]] = {"vera_A": set(), "vera_B": set()}
    for module in model.modules():
        for name in found:
            if name in module._buffers:
                found[name].add(module.get_buffer(name).data_ptr())
    return found


@pytest.mark.parametrize("transfer", ["deepcopy", "pickle", "double", "save"])
def test_vera_projections_stay_shared(transfer: str) -> None:
    model = adapted_mlp("vera")
    before = projection_pointers(model)
    assert all(len(pointers) == 1 for pointers in before.values())
    if transfer == "deepcopy":
        model = copy.deepcopy(model)
    elif transfer == "pickle":
        model = pickle.loads(pickle.dumps(model))
    elif transfer == "double":
        model = model.double()
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        model = torch.load(file, weights_only=False)
    after = projection_pointers(model)
    assert all(len(pointers) == 1 for pointers in after.values())
    assert after != before
    counted = sum(b.numel() for b in model.buffers())
    assert counted == 6 * 28 + 28 * 6


@pytest.mark.parametrize("method", CONFIGS)
def test_pickle_and_state_dict_round_trip(method: str) -> None:
    model = adapted_mlp(method, "first", "second")
    expected = model(inputs())
    restored = pickle.loads(pickle.dumps(model))
    assert torch.equal(restored(inputs()), expected)
    fastadapt.set_adapter(restored, "first")
    assert [p.requires_grad for p in adapter_parameters(restored, "first").values()]

    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    randomise(p for p in model.parameters())
    assert not torch.allclose(model(inputs()), expected)
    assert not any(model.load_state_dict(state))
    assert torch.equal(model(inputs()), expected)


@pytest.mark.parametrize("method", CONFIGS)
def test_to_moves_everything(method: str) -> None:
    model = adapted_mlp(method)
    expected = model(inputs())
    model.double()
    assert all(t.dtype == torch.float64 for t in (*model.parameters(), *model.buffers()))
    assert torch.allclose(model(inputs(torch.float64)).float(), expected, atol=1e-5)
    model.float()
    assert torch.allclose(model(inputs()), expected, atol=1e-5)
    model.to("meta")
    assert all(t.is_meta for t in (*model.parameters(), *model.buffers()))
    assert model(inputs().to("meta")).shape == (3, 5, 20)


@pytest.mark.parametrize("method", CONFIGS)
def test_inject_on_the_meta_device(method: str) -> None:
    model = tiny_models.MLP().to("meta")
    fastadapt.inject(model, CONFIGS[method](target_modules=MLP_TARGETS))
    assert all(p.is_meta for p in model.parameters())
    assert model(inputs().to("meta")).shape == (3, 5, 20)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("method", ["lora", "dora", "vera"])
def test_adapters_are_fp32_on_a_16_bit_base_unless_told(method: str, dtype: torch.dtype) -> None:
    model = adapted_mlp(method, dtype=dtype)
    assert {p.dtype for p in adapter_parameters(model).values()} == {torch.float32}
    assert model(inputs(dtype)).dtype == dtype
    model = tiny_models.mlp().to(dtype)
    fastadapt.inject(model, CONFIGS[method](target_modules=MLP_TARGETS), autocast_adapter_dtype=False)
    assert {p.dtype for p in adapter_parameters(model).values()} == {dtype}
    model(inputs(dtype)).sum().backward()
    assert {p.grad.dtype for p in adapter_parameters(model).values() if p.grad is not None} == {dtype}


def test_train_and_eval_reach_the_adapters() -> None:
    model = adapted_mlp("lora", lora_dropout=0.5)
    assert not model.up.adapters["default"].training
    assert torch.equal(model(inputs()), model(inputs()))
    model.train()
    assert not torch.equal(model(inputs()), model(inputs()))
    torch.manual_seed(4)
    first = model(inputs())
    torch.manual_seed(4)
    assert torch.equal(model(inputs()), first)
    model.eval()
    assert torch.equal(model(inputs()), model(inputs()))
    training = tiny_models.mlp().train()
    fastadapt.inject(training, CONFIGS["lora"](target_modules=MLP_TARGETS))
    assert all(module.training for module in training.modules())


# Training.


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("method", ["lora", "dora", "vera"])
def test_gradient_checkpointing_gives_the_same_gradients(method: str, use_reentrant: bool) -> None:
    dropout = {"vera_dropout" if method == "vera" else "lora_dropout": 0.3}

    def gradients(checkpointing: bool) -> dict[str, Tensor]:
        model = tiny_models.llama().train()
        fastadapt.inject(model, CONFIGS[method](target_modules="all-linear", **dropout))
        randomise(adapter_parameters(model).values())
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        torch.manual_seed(11)
        output(model, tiny_models.tokens()).square().mean().backward()
        return {name: p.grad for name, p in adapter_parameters(model).items() if p.grad is not None}

    plain, checkpointed = gradients(False), gradients(True)
    assert plain.keys() == checkpointed.keys()
    assert len(plain) == len(
        adapter_parameters(fastadapt.inject(tiny_models.llama(), CONFIGS[method](target_modules="all-linear")))
    )
    for name, gradient in plain.items():
        assert torch.allclose(checkpointed[name], gradient, rtol=1e-5, atol=1e-7), name


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("method", ["dora", "dvora"])
def test_norms_are_fresh_after_an_optimizer_that_bumps_no_version(method: str, fused: bool) -> None:
    """AdamW(fused=True) writes parameters without raising their version: a norm kept by version would be stale."""
    model = adapted_mlp(method)
    parameters = list(adapter_parameters(model).values())
    optimizer = torch.optim.AdamW(parameters, lr=0.1, fused=fused)
    for _ in range(3):
        with torch.no_grad():  # fills whatever is kept between calls in eval mode
            model(inputs())
        model(inputs()).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            kept = model(inputs())
            fresh = pickle.loads(pickle.dumps(model))(inputs())
        assert torch.allclose(kept, fresh, atol=1e-6)


@pytest.mark.parametrize("write", ["copy", "load_state_dict", "data", "base"])
def test_norms_are_fresh_after_a_write(write: str) -> None:
    model = adapted_mlp("dora")
    with torch.no_grad():
        model(inputs())
    if write == "copy":
        randomise(adapter_parameters(model).values(), 99)
    elif write == "load_state_dict":
        model.load_state_dict({name: tensor * 1.5 for name, tensor in model.state_dict().items()})
    elif write == "data":
        for parameter in adapter_parameters(model).values():
            parameter.data = parameter.data * 1.5
    else:
        randomise([model.up.base_layer.weight], 99)
    with torch.no_grad():
        assert torch.allclose(model(inputs()), pickle.loads(pickle.dumps(model))(inputs()), atol=1e-6)


def test_norms_are_fresh_in_training_after_a_write_through_data() -> None:
    model = adapted_mlp("dora").train()
    model(inputs()).sum().backward()
    model.up.adapters["default"].lora_B.data.mul_(2.0)
    assert torch.allclose(model(inputs()), pickle.loads(pickle.dumps(model))(inputs()), atol=1e-6)
    with torch.no_grad():
        model.eval()(inputs())
    model.up.adapters["default"].lora_B.data.mul_(2.0)
    model.train()
    with torch.no_grad():
        model.eval()
        assert torch.allclose(model(inputs()), pickle.loads(pickle.dumps(model))(inputs()), atol=1e-6)


@pytest.mark.parametrize("method", CONFIGS)
def test_training_lowers_the_loss_and_leaves_the_base(method: str) -> None:
    model = tiny_models.mlp().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    target = tiny_models.MLP()(inputs()).detach()
    fastadapt.inject(model, CONFIGS[method](target_modules=MLP_TARGETS))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(30):
        loss = (model(inputs()) - target).square().mean()
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.9 * losses[0]
    assert_same_bits(base_tensors(model), before)


def test_a_second_method_on_the_same_model() -> None:
    model = adapted_mlp("lora", "lora")
    lora = model(inputs())
    fastadapt.inject(model, CONFIGS["vera"](target_modules=MLP_TARGETS), "vera")
    assert torch.allclose(model(inputs()), tiny_models.mlp()(inputs()), atol=1e-5)
    fastadapt.inject(model, CONFIGS["dora"](target_modules="all-linear"), "dora")
    randomise(adapter_parameters(model, "dora").values(), 4)
    dora = model(inputs())
    fastadapt.set_adapter(model, "lora")
    assert torch.equal(model(inputs()), lora)
    fastadapt.set_adapter(model, "dora")
    assert torch.equal(model(inputs()), dora)
    alone = tiny_models.mlp()
    fastadapt.inject(alone, CONFIGS["dora"](target_modules="all-linear"), "dora")
    randomise(adapter_parameters(alone, "dora").values(), 4)
    assert torch.equal(alone(inputs()), dora)


def test_generate_with_a_cache_is_greedy_forward() -> None:
    model = tiny_models.llama()
    fastadapt.inject(model, CONFIGS["dora"](target_modules="all-linear"))
    randomise(adapter_parameters(model).values())
    prompt = tiny_models.tokens(1, 4)
    generated = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=5,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
    )
    sequence = prompt
    for _ in range(5):
        sequence = torch.cat([sequence, model(sequence).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(generated, sequence)


def test_trainable_parameters_counts_and_prints() -> None:
    model = adapted_mlp("lora")
    counted = fastadapt.trainable_parameters(model)
    adapters = 4 * (20 + 28) * 2
    total = adapters + 20 * 28 * 2 + 28
    assert (counted.trainable, counted.total) == (adapters, total)
    assert f"{adapters:,}" in str(counted)
    assert f"{total:,}" in str(counted)
    assert "%" in str(counted)


# Bad input: the thing is named and the model is as it was.


@pytest.mark.parametrize(
    ("config", "fields", "named"),
    [
        (LoRAConfig, {"r": 0}, "r must"),
        (LoRAConfig, {"r": -2}, "-2"),
        (LoRAConfig, {"r": 2.5}, "2.5"),
        (LoRAConfig, {"r": True}, "True"),
        (LoRAConfig, {"lora_dropout": 1.0}, "lora_dropout"),
        (LoRAConfig, {"lora_dropout": -0.1}, "-0.1"),
        (LoRAConfig, {"lora_dropout": float("nan")}, "nan"),
        (DoRAConfig, {"r": 0}, "r must"),
        (VeRAConfig, {"r": 0}, "r must"),
        (VeRAConfig, {"vera_dropout": 1.5}, "vera_dropout"),
        (LoRAConfig, {"bias": "some"}, "bias"),
        (LoRAConfig, {"rank_pattern": {"up": 0}}, "up"),
        (LoRAConfig, {"init_lora_weights": "pissa"}, "pissa"),
    ],
    ids=str,
)
def test_configs_refuse_values_out_of_range(config: Any, fields: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        config(target_modules=["up"], **fields)


@pytest.mark.parametrize("name", ["", "a.b", None, 3, "keys"])
def test_adapter_names_that_no_module_can_have(name: Any) -> None:
    model = tiny_models.mlp()
    with pytest.raises((ValueError, TypeError), match="adapter_name"):
        fastadapt.inject(model, CONFIGS["lora"](target_modules=["up"]), name)
    assert type(model.up) is nn.Linear


def test_a_taken_or_unknown_name_is_named() -> None:
    model = adapted_mlp("lora", "mine")
    expected = model(inputs())
    with pytest.raises(ValueError, match="'mine'"):
        fastadapt.inject(model, CONFIGS["dora"](target_modules=["up"]), "mine")
    with pytest.raises(ValueError, match=r"'other'.*'mine'"):
        fastadapt.set_adapter(model, "other")
    assert model.up.active == ("mine",)
    assert torch.equal(model(inputs()), expected)


def test_nothing_to_merge_is_said() -> None:
    with pytest.raises(ValueError, match="set_adapter"):
        fastadapt.merge(tiny_models.mlp())
    model = adapted_mlp("lora")
    fastadapt.set_adapter(model, None)
    with pytest.raises(ValueError, match="set_adapter"):
        fastadapt.merge(model)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (DoRAConfig(r=2, target_modules=["fc1", "conv"]), "conv"),
        (DoRAConfig(r=2, target_modules=["fc1", "embed"]), "embed"),
        (LoRAConfig(r=2, target_modules=["fc1", "embed"], lora_bias=True), "embed"),
        (VeRAConfig(r=2, target_modules=["fc1", "conv"]), "conv"),
        (LoRAConfig(r=2, target_modules=["fc1", "norm"]), "norm"),
    ],
    ids=["dora conv", "dora embed", "lora_bias embed", "vera conv", "layer norm"],
)
def test_layers_that_a_method_cannot_adapt_are_named(config: Any, named: str) -> None:
    model = tiny_models.mixed()
    modules = {name: id(module) for name, module in model.named_modules()}
    with pytest.raises(ValueError, match=named):
        fastadapt.inject(model, config)
    assert {name: id(module) for name, module in model.named_modules()} == modules
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("refused", [True, False])
def test_a_module_that_is_wrapped_keeps_the_modes_inside(refused: bool) -> None:
    model = nn.ModuleDict({"block": nn.Sequential(nn.Linear(4, 4), nn.Dropout())}).train()
    model["block"][1].eval()
    modes = {id(module): module.training for module in model.modules()}
    if refused:
        with pytest.raises(ValueError, match="Sequential cannot take an adapter of LoRAConfig"):
            fastadapt.inject(model, LoRAConfig(r=2, target_modules=["block"]))
    else:
        fastadapt.inject(model, fastadapt.VPTConfig(target_modules=["block"]))
    assert {id(module): module.training for module in model.modules() if id(module) in modes} == modes


def test_grouped_convolutions_are_refused_by_name() -> None:
    model = nn.ModuleDict({"conv": nn.Conv2d(4, 4, 3, groups=2)})
    with pytest.raises(ValueError, match=r"conv.*groups"):
        fastadapt.inject(model, LoRAConfig(r=2, target_modules=["conv"]))


def test_an_unknown_backend_is_refused_before_the_model_changes() -> None:
    model = tiny_models.mlp()
    with pytest.raises(ValueError, match="cuda_kernels"):
        fastadapt.inject(model, CONFIGS["lora"](target_modules=["up"]), backend="cuda_kernels")
    assert type(model.up) is nn.Linear


def test_a_config_is_not_the_models_once_injected() -> None:
    config = LoRAConfig(r=2, target_modules=["up"])
    model = tiny_models.mlp()
    fastadapt.inject(model, config)
    config.r = 9
    other = copy.deepcopy(model)
    fastadapt.unload(model)
    assert other.up.adapters["default"].lora_A.shape[0] == 2


def test_wrong_input_shapes_and_devices_are_named() -> None:
    model = adapted_mlp("lora")
    with pytest.raises(ValueError, match="20"):
        model(torch.randn(2, 21))
    with pytest.raises((ValueError, TypeError), match="weight"):
        model(inputs(torch.bfloat16))
    with pytest.raises(ValueError, match=r"device|meta"):
        model(inputs().to("meta"))


def test_a_module_to_save_is_copied_without_the_adapters_of_others(tmp_path: Path) -> None:
    model = adapted_mlp("lora", "first")
    fastadapt.inject(model, LoRAConfig(r=2, target_modules=["up"], modules_to_save=["down"]), "second")
    assert not any(".copies.second.adapters" in name for name, _ in model.named_parameters())
    fastadapt.save_adapter(model, tmp_path, "second")
    fastadapt.load_adapter(tiny_models.mlp(), tmp_path)


def test_adapters_inside_of_what_another_saves_whole_keep_their_paths(tmp_path: Path) -> None:
    def headed() -> Any:
        return tiny_models.headed("RobertaForSequenceClassification")

    configs = {
        "adapted": LoRAConfig(r=2, target_modules=["query", "classifier.dense"], init_lora_weights=False),
        "other": LoRAConfig(r=2, target_modules=["classifier.dense"], init_lora_weights=False),
        "part": LoRAConfig(r=2, target_modules=["query"], modules_to_save=["classifier.out_proj"]),
        "whole": LoRAConfig(r=2, target_modules=["query"], modules_to_save=["classifier"]),
    }
    model = headed()
    original = model.classifier
    for name, config in configs.items():
        fastadapt.inject(model, config, name)
        fastadapt.set_adapter(model, name)
        randomise(p for p in model.parameters() if p.requires_grad)
    # Layers inside can still be added to and taken away.
    fastadapt.add_weighted_adapter(model, ["adapted", "other"], [1.0, 0.5], "sum")
    for name in (*configs, "sum"):
        fastadapt.set_adapter(model, name)
        expected = output(model, tiny_models.tokens())
        fastadapt.save_adapter(model, tmp_path / name, name)
        again = fastadapt.load_adapter(headed(), tmp_path / name)
        assert torch.allclose(output(again, tiny_models.tokens()), expected, atol=1e-5), name
    with fastadapt.disable_adapter(model):
        assert torch.equal(output(model, tiny_models.tokens()), output(headed(), tiny_models.tokens()))
    unloaded = fastadapt.unload(model)
    assert unloaded.classifier is original
    assert not any(isinstance(module, fastadapt.AdapterLinear) for module in unloaded.modules())
    assert type(unloaded.classifier.out_proj) is type(unloaded.classifier.dense) is nn.Linear


def test_a_layer_inside_of_what_another_saves_whole_can_be_left_out() -> None:
    model = adapted_mlp("lora", "first")
    fastadapt.inject(model, LoRAConfig(r=2, target_modules=["up"], modules_to_save=["down"]), "second")
    exchange(model, "first", adapter_configs(model)["first"], {"down": None})
    assert type(model.down.original) is nn.Linear
    assert list(model.down.copies) == ["second"]


def test_a_layer_at_two_paths_is_adapted_once() -> None:
    shared = nn.Linear(6, 6)
    model = nn.Sequential(shared, nn.Tanh(), shared)
    fastadapt.inject(model, LoRAConfig(r=2, target_modules=["0"]))
    assert isinstance(model[0], fastadapt.AdapterLinear)


@pytest.mark.parametrize("kind", ["adapter", "saved whole"])
def test_a_copy_keeps_the_adapters_whatever_the_base_layer_says_of_copies(kind: str) -> None:
    """A parametrization gives its layer a __deepcopy__ of its own."""
    model = nn.Sequential(OrderedDict(fc=nn.Linear(8, 8), head=nn.Linear(8, 4)))
    nn.utils.parametrizations.weight_norm(model.fc if kind == "adapter" else model.head)
    config = LoRAConfig(r=2, target_modules=["fc"], modules_to_save=None if kind == "adapter" else ["head"])
    fastadapt.inject(model, config)
    randomise([parameter for parameter in model.parameters() if parameter.requires_grad])
    x = torch.randn(3, 8)
    torch.testing.assert_close(copy.deepcopy(model)(x), model(x))


def test_a_merge_that_fails_on_a_layer_leaves_all_as_they_were() -> None:
    model = nn.Sequential(OrderedDict((name, nn.Linear(8, 8)) for name in ("one", "two", "three")))
    # No weight of a plain layer computes what the hook makes of it.
    model.two.register_forward_hook(lambda module, args, y: y.tanh())
    fastadapt.inject(model, LoRAConfig(r=2, target_modules=["one", "two", "three"]))
    randomise([parameter for parameter in model.parameters() if parameter.requires_grad])
    x = torch.randn(3, 8)
    before = model(x)
    with pytest.raises(ValueError, match="two: an adapter cannot be merged into this layer: it has hooks"):
        fastadapt.merge(model)
    assert not any(layer.merged for layer in adapter_layers(model).values())
    assert torch.equal(model(x), before)
