"""SSF, RepAdapter, AdaptFormer, VPT and NOAH on a vision transformer: what they compute, count, merge and save."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification

from fastadapt import (
    AdaptFormerConfig,
    DoRAConfig,
    LoRAConfig,
    NOAHConfig,
    RepAdapterConfig,
    SSFConfig,
    VPTConfig,
    export_lora,
    functional,
    inject,
    load_adapter,
    merge,
    save_adapter,
    set_adapter,
    trainable_parameters,
    unload,
    unmerge,
)
from fastadapt.methods import AdapterConfig
from fastadapt.methods.noah import NOAHControl, parameters_of, sizes_of
from fastadapt.model.adapted import adapter_layers, present
from fastadapt.model.inject import control
from fastadapt.serving import AdapterError, read_adapter
from tests.tiny_models import images, randomise, vit

D = 32
SIZES: dict[str, Any] = {"prompts": [4, 0, 3], "lora": [2, 1, 0], "adapter": [5, 0, 1]}
CONFIGS: dict[str, AdapterConfig] = {
    "SSF": SSFConfig(),
    "RepAdapter": RepAdapterConfig(r=4, adapter_dropout=0.0),
    "RepAdapter, dense": RepAdapterConfig(r=3, groups=1, scaling=0.5, adapter_dropout=0.0),
    "AdaptFormer": AdaptFormerConfig(r=6, adapter_dropout=0.0),
    "AdaptFormer, normed": AdaptFormerConfig(r=6, adapter_dropout=0.0, branch_input="normed"),
    "AdaptFormer, sequential": AdaptFormerConfig(r=6, adapter_dropout=0.0, branch_input="output"),
    "VPT-shallow": VPTConfig(num_virtual_tokens=3, patch_size=2),
    "VPT-deep": VPTConfig(num_virtual_tokens=3, patch_size=2, deep=True),
    "NOAH": NOAHConfig(**SIZES, patch_size=2),
}
MERGING = ("SSF", "RepAdapter", "RepAdapter, dense")


def logits(model: Any, x: Tensor) -> Tensor:
    result: Tensor = model(x).logits
    return result


def adapted(config: AdapterConfig, dtype: torch.dtype = torch.float32) -> Any:
    """A ViT with an adapter whose parameters are random."""
    model = inject(vit().to(dtype), config)
    randomise([p for p in model.parameters() if p.requires_grad])
    return model


@pytest.mark.parametrize("name", CONFIGS)
def test_it_trains_saves_loads_and_leaves_no_trace(name: str, tmp_path: Path) -> None:
    x, base = images(), vit()
    model = adapted(CONFIGS[name])
    trained = [p for p in model.parameters() if p.requires_grad]
    logits(model.train(), x).square().sum().backward()
    unused = {"NOAH": 1}.get(name, 0)  # the prompts of a block without any
    assert sum(p.grad is None or not p.grad.any() for p in trained if p.numel()) == 0
    assert sum(not p.numel() for p in trained) >= unused
    with torch.no_grad():
        y = logits(model.eval(), x)
        assert not torch.allclose(y, logits(base, x), atol=1e-3)
        save_adapter(model, tmp_path)
        loaded = load_adapter(vit(), tmp_path)
        assert torch.equal(logits(loaded, x), y)
        assert trainable_parameters(load_adapter(vit(), tmp_path, trainable=True)) == trainable_parameters(model)
        assert torch.equal(logits(copy.deepcopy(model), x), y)
        set_adapter(model, None)
        assert torch.equal(logits(model, x), logits(base, x))
        unload(model)
    assert torch.equal(logits(model, x), logits(base, x))
    assert model.state_dict().keys() == base.state_dict().keys()


@pytest.mark.parametrize("name", ["RepAdapter", "AdaptFormer", "AdaptFormer, normed", "AdaptFormer, sequential"])
def test_it_starts_as_the_identity(name: str) -> None:
    x, base = images(), vit()
    model = inject(vit(), CONFIGS[name])
    for training in (False, True):
        torch.testing.assert_close(logits(model.train(training), x), logits(base, x))


def test_ssf_starts_beside_the_identity() -> None:
    model = inject(vit(), SSFConfig())
    scales = torch.cat([p.detach() for name, p in model.named_parameters() if "ssf_scale" in name])
    shifts = torch.cat([p.detach() for name, p in model.named_parameters() if "ssf_shift" in name])
    assert abs(scales.mean() - 1) < 0.005
    assert abs(shifts.mean()) < 0.005
    for values in (scales, shifts):
        assert 0.015 < values.std() < 0.025
    x = images()
    # Not to the bit: the bias comes behind the product, in which CPUs may have it.
    torch.testing.assert_close(logits(inject(vit(), SSFConfig(init_std=0.0)), x), logits(vit(), x))


@pytest.mark.parametrize("name", MERGING)
def test_merging_is_exact_in_double_precision_and_undone_bit_for_bit(name: str) -> None:
    x, model = images().double(), adapted(CONFIGS[name], torch.float64)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        y = logits(model, x)
        merge(model)
        torch.testing.assert_close(logits(model, x), y, rtol=1e-12, atol=1e-12)
        unmerge(model)
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
        merge(model)
        unload(model)
        torch.testing.assert_close(logits(model, x), y, rtol=1e-12, atol=1e-12)
    assert model.state_dict().keys() == vit().state_dict().keys()


@pytest.mark.parametrize("name", [name for name in CONFIGS if name not in MERGING])
def test_what_no_weight_can_hold_is_not_merged(name: str, tmp_path: Path) -> None:
    model = adapted(CONFIGS[name])
    x = images()
    y = logits(model, x)
    with pytest.raises(ValueError, match=r"cannot be merged: \w+ works on the stream of tokens"):
        merge(model)
    assert torch.equal(logits(model, x), y)
    with pytest.raises(ValueError, match="stream of tokens"):
        export_lora(model, tmp_path)


@pytest.mark.parametrize("groups", [1, 2])
def test_repadapter_in_training_is_what_it_folds_into(groups: int) -> None:
    """The bottleneck in front of the layers equals W' = W0 (I + s G D), b' = b0 + s W0 (G a + c)."""
    config = RepAdapterConfig(r=4, groups=groups, scaling=2.0, adapter_dropout=0.0)
    x, model = images().double(), adapted(config, torch.float64)
    trained = [p for p in model.parameters() if p.requires_grad]
    results = []
    for training in (True, False):
        y = logits(model.train(training), x)
        results.append([y, *torch.autograd.grad(y.square().sum(), trained)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def test_repadapter_densified() -> None:
    model = adapted(RepAdapterConfig(r=4, scaling=0.5, adapter_dropout=0.0, target_modules=["fc1"]), torch.float64)
    layer = adapter_layers(model)["vit.layers.1.mlp.fc1"]
    adapter: Any = layer.adapters["default"]
    G = torch.block_diag(*adapter.conv_B[..., 0].chunk(2))
    x = torch.randn(3, D, dtype=torch.float64)
    inner = x @ adapter.conv_A[..., 0].T + adapter.conv_A_bias
    expected = layer.base_layer(x + 0.5 * (inner @ G.T + adapter.conv_B_bias))
    torch.testing.assert_close(layer(x), expected)


def test_the_readers_of_one_x_share_one_adapter_and_one_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastadapt.methods import repadapter

    calls: list[Tensor] = []
    compute = functional.bottleneck

    def counted(v: Tensor, *args: Any, **kwargs: Any) -> Any:
        calls.append(v)
        return compute(v, *args, **kwargs)

    monkeypatch.setattr(repadapter, "bottleneck", counted)
    model = adapted(RepAdapterConfig(r=4, adapter_dropout=0.5)).train()
    layers = adapter_layers(model)
    q, k, v = (layers[f"vit.layers.0.attention.{name}_proj"] for name in "qkv")
    assert q.adapters["default"] is k.adapters["default"] is v.adapters["default"]
    assert q.adapters["default"] is not layers["vit.layers.0.mlp.fc1"].adapters["default"]
    logits(model, images())
    assert len(calls) == 6
    calls.clear()
    x = torch.randn(2, 5, D)
    reads: list[Tensor] = []
    for layer in (q, k, v):
        layer.base_layer.register_forward_pre_hook(lambda _, args: reads.append(args[0]))
        layer(x)
    assert len(calls) == 1
    assert reads[0] is reads[1] is reads[2]
    q(x)  # a second round
    q(x)  # and a third: k and v never came
    assert len(calls) == 3
    copy.deepcopy(model)
    k(x)
    assert len(calls) == 3
    x.mul_(2)
    v(x)
    assert len(calls) == 4


@pytest.mark.parametrize("branch_input", ["residual", "normed", "output"])
def test_adaptformer_is_its_formula(branch_input: Any) -> None:
    config = AdaptFormerConfig(r=6, scaling=0.3, adapter_dropout=0.0, branch_input=branch_input)
    model = adapted(config, torch.float64)
    block = model.vit.layers[1]
    adapter: Any = adapter_layers(model)["vit.layers.1.mlp"].adapters["default"]
    x = torch.randn(2, 7, D, dtype=torch.float64)
    base = vit().double().vit.layers[1]
    attended, _ = base.attention(base.layernorm_before(x))
    stream = x + attended
    normed = base.layernorm_after(stream)
    z = base.mlp(normed)
    v = {"residual": stream, "normed": normed, "output": z}[branch_input]
    branch = torch.relu(v @ adapter.down.T + adapter.down_bias) @ adapter.up.T + adapter.up_bias
    torch.testing.assert_close(block(x), stream + z + 0.3 * branch)


def concatenated(model: Any, prompts: list[Tensor | None], x: Tensor) -> Tensor:
    """The published procedure: prompts behind CLS, replaced wherever a block has its own; logits.

    All queries, MLPs and projections of the prompts are computed.
    """
    vision, hidden, inserted = model.vit, model.vit.embeddings(x), 0
    for block, own in zip(vision.layers, prompts, strict=True):
        if own is not None:
            own = own.expand(hidden.shape[0], -1, -1)
            hidden = torch.cat([hidden[:, :1], own, hidden[:, 1 + inserted :]], 1)
            inserted = own.shape[1]
        hidden = block(hidden)
    result: Tensor = model.classifier(vision.layernorm(hidden)[:, 0])
    return result


def prompts_of(model: Any, blocks: int = 3) -> list[Tensor | None]:
    """Each block's prompts, as the adapters hold them."""
    adapters = present(model, "default").adapters
    found: list[Tensor | None] = []
    for index in range(blocks):
        prompts: Any = adapters.get(f"vit.layers.{index}.layernorm_before")
        found.append(None if prompts is None or not len(prompts.prompt_embeddings) else prompts.prompt_embeddings)
    return found


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_deep_prompts_are_keys_and_values(implementation: str) -> None:
    model, x = adapted(CONFIGS["VPT-deep"], torch.float64), images().double()
    base = vit().double()
    for each in (model, base):
        each.set_attn_implementation(implementation)
    y, expected = logits(model, x), concatenated(base, prompts_of(model), x)
    tolerance = 1e-12 if implementation == "sdpa" else 1e-6  # the eager softmax is in fp32
    torch.testing.assert_close(y, expected, rtol=tolerance, atol=tolerance)
    prompts = [p for p in prompts_of(model) if p is not None]
    for a, b in zip(*(torch.autograd.grad(out.square().sum(), prompts) for out in (y, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=10 * tolerance, atol=10 * tolerance)


def test_shallow_prompts_are_tokens() -> None:
    model, x = adapted(CONFIGS["VPT-shallow"], torch.float64), images().double()
    adapter: Any = present(model, "default").adapters["vit.embeddings"]
    expected = concatenated(vit().double(), [adapter.prompt_embeddings, None, None], x)
    torch.testing.assert_close(logits(model, x), expected, rtol=1e-12, atol=1e-12)


def test_prompts_start_as_published_and_are_dropped_alike() -> None:
    model = inject(vit(), VPTConfig(num_virtual_tokens=200, deep=True, patch_size=4, prompt_dropout=0.5)).train()
    prompts: Any = present(model, "default").adapters["vit.layers.0.layernorm_before"]
    bound = (6 / (3 * 16 + D)) ** 0.5
    values = prompts.prompt_embeddings
    assert 0.98 * bound < values.abs().max() <= bound
    assert abs(values.std() - bound / 3**0.5) < 0.01
    logits(model, images())
    dropped = prompts.tokens(values)
    assert dropped is prompts.tokens(values)  # of keys and of values
    assert 0.4 < (dropped == 0).float().mean() < 0.6
    copy.deepcopy(model)


def test_the_prefix_is_kept_until_it_can_have_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = adapted(CONFIGS["VPT-deep"]), images()
    key = model.vit.layers[1].attention.k_proj
    calls: list[torch.Size] = []
    key.register_forward_pre_hook(lambda _, args: calls.append(args[0].shape))

    def prefixes() -> int:
        """How often the prompts are projected in one forward; it must give what a forward from scratch gives."""
        calls.clear()
        with torch.no_grad():
            y = logits(model, x)
            count = sum(len(shape) == 2 for shape in calls)
            assert torch.equal(y, logits(copy.deepcopy(model), x))
        return count

    assert [prefixes(), prefixes()] == [1, 0]
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.1, fused=True)  # it does not raise the versions of what it writes
    logits(model, x).square().sum().backward()
    optimizer.step()
    assert [prefixes(), prefixes()] == [1, 0]
    key.weight.data.add_(1.0)
    key.weight.add_(0.0)
    assert [prefixes(), prefixes()] == [1, 0]


def test_prompts_see_other_adapters_and_queries_of_prompts_are_never_computed() -> None:
    model = inject(vit(), LoRAConfig(r=2, target_modules=["q_proj", "k_proj", "v_proj"]), "lora")
    inject(model, CONFIGS["VPT-deep"], "vpt")
    set_adapter(model, ["lora", "vpt"])
    randomise([p for p in model.parameters() if p.requires_grad])
    model, x = model.double(), images().double()
    queries: list[torch.Size] = []
    model.vit.layers[0].attention.q_proj.register_forward_pre_hook(lambda _, args: queries.append(args[0].shape))
    y = logits(model, x)
    assert queries == [torch.Size([2, 17, D])]
    norms = [layer for path, layer in adapter_layers(model).items() if path.endswith("layernorm_before")]
    prompts: list[Any] = [norm.adapters["vpt"] for norm in norms]
    set_adapter(model, ["lora"])
    torch.testing.assert_close(
        y, concatenated(model, [each.prompt_embeddings for each in prompts], x), rtol=1e-12, atol=1e-12
    )


def test_attention_masks_grow_with_the_prompts() -> None:
    """A mask that lets every token see all others changes nothing."""
    model, x = adapted(CONFIGS["VPT-deep"]), torch.randn(2, 7, D)
    attention = model.vit.layers[0].attention
    plain, _ = attention(x)
    for mask in (torch.ones(2, 1, 7, 7, dtype=torch.bool), torch.zeros(2, 1, 7, 7)):
        torch.testing.assert_close(attention(x, mask)[0], plain)


def noah_by_hand(model: Any, base: Any, sizes: dict[str, list[int]], x: Tensor) -> Tensor:
    """NOAH's published forward on the plain blocks, with the parameters of `model`."""
    layers = adapter_layers(model)
    hidden, inserted = base.vit.embeddings(x), 0
    for index, block in enumerate(base.vit.layers):
        path = f"vit.layers.{index}"
        count = sizes["prompts"][index]
        if count:
            own: Any = layers[f"{path}.layernorm_before"].adapters["default"]
            hidden = hidden[:, : hidden.shape[1] - inserted]
            hidden = torch.cat([hidden, own.prompt_embeddings[:count].expand(len(hidden), -1, -1)], 1)
            inserted = count
        block = copy.deepcopy(block)
        for name in ("q_proj", "k_proj", "v_proj"):
            lora: Any = layers[f"{path}.attention.{name}"].adapters["default"]
            h = sizes["lora"][index]
            getattr(block.attention, name).weight.data += lora.lora_B[:, :h] @ lora.lora_A[:h]
        stream = hidden + block.attention(block.layernorm_before(hidden))[0]
        z = block.mlp(block.layernorm_after(stream))
        h = sizes["adapter"][index]
        if h:
            part: Any = layers[f"{path}.mlp"].adapters["default"]
            inner = z @ part.down[:h].T + part.down_bias[:h]
            z = z + (inner * torch.sigmoid(1.702 * inner)) @ part.up[:, :h].T + part.up_bias
        hidden = stream + z
    result: Tensor = base.classifier(base.vit.layernorm(hidden)[:, 0])
    return result


@pytest.mark.parametrize("prompts", [[4, 0, 3], [4, 2, 0], [0, 0, 3], [3, 0, 0], [1, 2, 3], [0, 0, 0]])
def test_noah_is_its_formula(prompts: list[int]) -> None:
    sizes = {**SIZES, "prompts": prompts}
    model, x = adapted(NOAHConfig(**sizes, patch_size=2), torch.float64), images().double()
    with torch.no_grad():
        expected = noah_by_hand(model, vit().double(), sizes, x)
        torch.testing.assert_close(logits(model, x), expected, rtol=1e-12, atol=1e-12)


def test_noahs_supernet_runs_slices_and_draws_a_choice_a_step() -> None:
    torch.manual_seed(0)
    config = NOAHConfig(supernet=True, dims=[1, 2, 5], depths=[1, 2, 3], patch_size=2)
    model, x = adapted(config, torch.float64), images().double()
    sizes = sizes_of(present(model, "default").adapters)
    assert sizes.current == {name: [5, 5, 5] for name in SIZES}
    sizes.set({"prompts": [2, 0, 0], "lora": [1, 5, 2], "adapter": [0, 5, 1]})
    with torch.no_grad():
        expected = noah_by_hand(model, vit().double(), sizes.current, x)
        torch.testing.assert_close(logits(model, x), expected, rtol=1e-12, atol=1e-12)
    steps = control(model)
    assert isinstance(steps, NOAHControl)
    seen = set()
    for _ in range(60):
        steps.step()
        for drawn in sizes.current.values():
            depth = sum(size > 0 for size in drawn)
            assert all(size in (1, 2, 5) for size in drawn[:depth])
            assert not any(drawn[depth:])
            seen.add((depth, drawn[0]))
    assert seen == {(depth, size) for depth in (1, 2, 3) for size in (1, 2, 5)}
    state = copy.deepcopy(steps.state_dict())
    steps.step()
    following = sizes.current
    other = adapted(config)
    resumed = control(other)
    resumed.load_state_dict(state)
    resumed.step()
    assert sizes_of(present(other, "default").adapters).current == following
    with pytest.raises(ValueError, match="prompts must have 3 sizes of at most"):
        sizes.set({**SIZES, "prompts": [6, 0, 0]})
    assert sizes.current is following


@pytest.mark.parametrize("name", CONFIGS)
def test_checkpointed_blocks_give_the_same_gradients(name: str) -> None:
    x = images()
    results = []
    for checkpointed in (False, True):
        model = adapted(CONFIGS[name]).train()
        if checkpointed:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # transformers has another name for it now
                model.gradient_checkpointing_enable()
        logits(model, x).square().sum().backward()
        results.append([p.grad for p in model.parameters() if p.requires_grad and p.grad is not None])
    assert len(results[0]) == len(results[1])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", CONFIGS)
def test_sixteen_bit_bases(name: str) -> None:
    model = inject(vit().bfloat16(), CONFIGS[name])
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    randomise([p for p in model.parameters() if p.requires_grad])
    y = logits(model.train(), images().bfloat16())
    assert y.dtype == torch.bfloat16
    exact = logits(adapted(CONFIGS[name], torch.float64).train(), images().bfloat16().double())
    assert (y.double() - exact).abs().max() < 0.1 * exact.abs().max()


def vit_b(labels: int = 10) -> nn.Module:
    with torch.device("meta"):
        return ViTForImageClassification(ViTConfig.from_dict({"num_labels": labels}))


HEAD: dict[str, Any] = {"modules_to_save": ["classifier"]}


@pytest.mark.parametrize(
    ("config", "labels", "expected"),
    [
        (SSFConfig(), 10, 205_824),
        (SSFConfig(**HEAD), 100, 282_724),
        (SSFConfig(**HEAD), 1000, 974_824),
        (RepAdapterConfig(r=8, groups=2), 10, 239_808),
        (AdaptFormerConfig(r=64), 10, 1_189_632),
        (AdaptFormerConfig(r=8), 10, 156_768),
        (AdaptFormerConfig(r=1), 10, 27_660),
        (AdaptFormerConfig(r=64, **HEAD), 100, 1_266_532),
        (VPTConfig(num_virtual_tokens=50, deep=True), 10, 460_800),
        (VPTConfig(num_virtual_tokens=50, deep=True, **HEAD), 1000, 1_229_800),
        (VPTConfig(num_virtual_tokens=50), 10, 38_400),
        (LoRAConfig(r=8), 10, 294_912),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, AdapterConfig) else str(value),
)
def test_published_parameter_counts_of_vit_b(config: Any, labels: int, expected: int) -> None:
    assert trainable_parameters(inject(vit_b(labels), config)).trainable == expected


def test_repadapter_counts_without_its_biases() -> None:
    model = inject(vit_b(), RepAdapterConfig(r=8, groups=2))
    weights = {id(p): p.numel() for name, p in model.named_parameters() if name.endswith(("conv_A", "conv_B"))}
    assert sum(weights.values()) == 221_184


def test_the_published_noah_subnets() -> None:
    """The CIFAR-100 subnet has 74 adapter dimensions in 12 blocks, 47 of LoRA and 69 prompts."""
    sizes = {
        "adapter": [10] * 6 + [5] * 2 + [1] * 4,
        "lora": [10] * 4 + [5, 1, 1] + [0] * 5,
        "prompts": [10] * 6 + [5, 1, 1, 1, 1, 0],
    }
    assert [sum(values) for values in sizes.values()] == [74, 47, 69]
    nothing = [0] * 12
    published = {"adapter": 122_954, "lora": 144_384, "prompts": 52_992}
    for name, expected in published.items():
        alone: dict[str, Any] = {other: sizes[other] if other == name else nothing for other in sizes}
        assert trainable_parameters(inject(vit_b(), NOAHConfig(**alone))).trainable == expected
        assert parameters_of(alone, 768) == expected


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (lambda: SSFConfig(init_std=-1.0), "init_std must be at least 0, got -1.0"),
        (lambda: RepAdapterConfig(r=3), "groups must be positive and divide r, 3, got 2"),
        (lambda: RepAdapterConfig(adapter_dropout=1.0), r"adapter_dropout must be in \[0, 1\)"),
        (lambda: AdaptFormerConfig(branch_input="raw"), "branch_input must be"),  # type: ignore[arg-type]
        (lambda: VPTConfig(num_virtual_tokens=0), "num_virtual_tokens must be an integer from 1 to 65536"),
        (lambda: VPTConfig(prompt_dropout=1.5), r"prompt_dropout must be in \[0, 1\)"),
        (lambda: NOAHConfig(prompts=[-1]), "prompts must hold sizes from 0 to 65536"),
        (lambda: NOAHConfig(lora=[2**64]), "lora must be a number of 64 bits"),
        (lambda: NOAHConfig(prompts=[1], supernet=True), "prompts goes with supernet=False"),
        (lambda: NOAHConfig(dims=[]), "dims must hold integers from 1 to 65536"),
    ],
)
def test_configs_refuse_what_they_cannot_mean(config: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            LoRAConfig(target_modules=["layernorm_before"]),
            "LayerNorm cannot take an adapter of LoRAConfig: only Conv2d, Linear can",
        ),
        (DoRAConfig(target_modules=["mlp"]), "ViTMLP cannot take an adapter of DoRAConfig: only Linear"),
        (
            SSFConfig(target_modules=["mlp"]),
            "of SSFConfig: only Conv2d, LayerNorm, Linear can; name",
        ),
        (AdaptFormerConfig(target_modules=["mlp"]), "has no norm in its block among the targets"),
        (AdaptFormerConfig(target_modules=["mlp", "layernorm_after"], branch_input="normed"), "must hold no norm"),
        (VPTConfig(target_modules=["embeddings", "layernorm"]), "must be one module without deep=True"),
        (VPTConfig(target_modules=["mlp", "layernorm_before"], deep=True), "has no q_proj"),
        (VPTConfig(target_modules=[r"dropout"], layers_to_transform=[0]), "Dropout has no parameters"),
        (RepAdapterConfig(target_modules=["fc1"], groups=3, r=3), "must divide the features"),
        (NOAHConfig(prompts=[1], lora=[1], adapter=[1]), "prompts must have a size for each of the 3 blocks"),
        (NOAHConfig(supernet=True, target_modules=["layernorm_before"]), "must hold the block vit.layers.0"),
    ],
    ids=str,
)
def test_targets_that_a_method_cannot_adapt(config: AdapterConfig, message: str) -> None:
    model, base = vit(), vit()
    with pytest.raises(ValueError, match=message):
        inject(model, config)
    assert model.state_dict().keys() == base.state_dict().keys()


def test_a_module_inside_of_an_adapted_one_keeps_its_path(tmp_path: Path) -> None:
    """An adapter on the MLP wraps it; LoRA on the layers inside is found, saved and taken out by its usual path."""
    x, base = images(), vit()
    model = inject(vit(), AdaptFormerConfig(r=4, adapter_dropout=0.0), "around")
    inject(model, LoRAConfig(r=2, target_modules=["fc1", "fc2"]), "inside")
    set_adapter(model, ["around", "inside"])
    randomise([p for p in model.parameters() if p.requires_grad])
    assert "vit.layers.0.mlp.fc1" in adapter_layers(model)
    y = logits(model, x)
    for name in ("around", "inside"):
        save_adapter(model, tmp_path / name, name)
    other = load_adapter(vit(), tmp_path / "inside", "inside")  # the other way round
    load_adapter(other, tmp_path / "around", "around")
    set_adapter(other, ["around", "inside"])
    assert torch.equal(logits(other, x), y)
    set_adapter(model, "inside")
    z = logits(model, x)
    merge(model)
    torch.testing.assert_close(logits(model, x), z)
    unmerge(model)
    for each in (model, other):
        unload(each)
        assert each.state_dict().keys() == base.state_dict().keys()
        assert torch.equal(logits(each, x), logits(base, x))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_repadapter_adds_up_with_others_in_training_as_in_eval(dropout: float) -> None:
    model = inject(vit().double(), LoRAConfig(r=2, target_modules=["q_proj", "fc1"]), "lora")
    inject(model, RepAdapterConfig(r=4, adapter_dropout=dropout), "rep")
    set_adapter(model, ["lora", "rep"])
    randomise([p for p in model.parameters() if p.requires_grad])
    x = images().double()
    y = logits(model, x)
    if dropout:
        with pytest.raises(ValueError, match="cannot train together with another adapter on the same layer"):
            logits(model.train(), x)
        return
    torch.testing.assert_close(logits(model.train(), x), y, rtol=1e-11, atol=1e-11)
    merge(model)
    torch.testing.assert_close(logits(model, x), y, rtol=1e-11, atol=1e-11)


def test_prompts_pass_through_a_repadapter_too() -> None:
    model = inject(vit(), RepAdapterConfig(r=4, adapter_dropout=0.0), "rep")
    inject(model, CONFIGS["VPT-deep"], "vpt")
    set_adapter(model, ["rep", "vpt"])
    randomise([p for p in model.parameters() if p.requires_grad])
    model, x = model.double(), images().double()
    norms = [layer for path, layer in adapter_layers(model).items() if path.endswith("layernorm_before")]
    prompts: list[Any] = [norm.adapters["vpt"] for norm in norms]
    results = [logits(model.train(training), x) for training in (True, False)]
    set_adapter(model, "rep")
    expected = concatenated(model, [each.prompt_embeddings for each in prompts], x)
    for y in results:
        torch.testing.assert_close(y, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", ["RepAdapter", "VPT-deep"])
def test_what_is_kept_is_never_stale(name: str) -> None:
    model, x = adapted(CONFIGS[name]), images()

    def check() -> None:
        """A forward gives what a copy gives, which starts with nothing kept."""
        with torch.no_grad():
            torch.testing.assert_close(logits(model, x), logits(copy.deepcopy(model), x))

    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits(model, x)
    check()
    trained = [
        (module, key)
        for module in model.modules()
        for key, p in module._parameters.items()
        if p is not None and p.requires_grad
    ]
    for _ in range(4):  # other tensors, which may come to lie where the old ones lay
        for module, key in trained:
            setattr(module, key, nn.Parameter(torch.randn_like(getattr(module, key))))
        check()
    for module, key in trained:
        getattr(module, key).data.mul_(2.0)
    model.eval()
    check()
    with torch.inference_mode():
        fresh = adapted(CONFIGS[name])
        logits(fresh, x)
        for parameter in fresh.parameters():
            parameter.mul_(1.5)
        y = logits(fresh, x)
        torch.testing.assert_close(y, logits(copy.deepcopy(fresh), x))


def test_noahs_kept_prefix_follows_its_sizes() -> None:
    targets = r"(.*\.)?(layers\.\d+|layernorm_before|attention|mlp)"
    model = adapted(NOAHConfig(supernet=True, dims=[2, 4], depths=[3], patch_size=2, target_modules=targets))
    sizes, x = sizes_of(present(model, "default").adapters), images()
    with torch.no_grad():
        for prompts in ([4, 4, 4], [2, 4, 2], [4, 4, 4]):
            sizes.set({"prompts": prompts, "lora": [0] * 3, "adapter": [0] * 3})
            expected = concatenated(vit(), [p[:n] for p, n in zip(prompts_of(model), prompts, strict=True)], x)  # type: ignore[index]
            torch.testing.assert_close(logits(model, x), expected)


def test_a_norm_that_computes_something_else_is_no_norm() -> None:
    class Other(nn.LayerNorm):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    with pytest.raises(ValueError, match="Other cannot take an adapter of SSFConfig"):
        inject(nn.Sequential(Other(4)), SSFConfig(target_modules=["0"]))


@pytest.mark.parametrize("name", ["AdaptFormer", "VPT-deep", "NOAH"])
def test_no_batch_of_many_adapters_takes_them(name: str, tmp_path: Path) -> None:
    save_adapter(adapted(CONFIGS[name]), tmp_path)
    with pytest.raises(AdapterError, match="works on the stream of tokens"):
        read_adapter(vit(), tmp_path)


def test_queries_of_a_cross_attention_read_another_input() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cross_attn = nn.ModuleDict({f"{name}_proj": nn.Linear(4, 4) for name in "qkv"})

    model = inject(Block(), RepAdapterConfig(r=2, target_modules=["q_proj", "k_proj", "v_proj"]))
    q, k, v = (layer.adapters["default"] for layer in adapter_layers(model).values())
    assert q is not k
    assert k is v


def test_repadapter_exports_as_a_lora_with_biases(tmp_path: Path) -> None:
    model, x = adapted(CONFIGS["RepAdapter"]), images()
    export_lora(model, tmp_path)
    torch.testing.assert_close(logits(load_adapter(vit(), tmp_path), x), logits(model, x))


def test_the_convolution_and_the_norms_are_scaled_by_ssf() -> None:
    model = adapted(SSFConfig(target_modules=["projection", "layernorm"]), torch.float64)
    base, x = vit().double(), images().double()
    tokens = torch.randn(3, D, dtype=torch.float64)
    for path, inputs in (("vit.embeddings.patch_embeddings.projection", x), ("vit.layernorm", tokens)):
        layer: Any = adapter_layers(model)[path]
        adapter = layer.adapters["default"]
        shape = (-1, 1, 1) if inputs.dim() == 4 else (-1,)
        expected = adapter.ssf_scale.view(shape) * base.get_submodule(path)(inputs) + adapter.ssf_shift.view(shape)
        torch.testing.assert_close(layer(inputs), expected, rtol=1e-12, atol=1e-12)
