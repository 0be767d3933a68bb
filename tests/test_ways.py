"""Base layers that are not plain: a fresh adapter is the base to the bit, adapted is merged, and PEFT's is ours."""

from __future__ import annotations

import copy
import pickle
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import fastadapt
from fastadapt import DoRAConfig, GLoRAConfig, HiRAConfig, LoRAConfig, RepAdapterConfig, SSFConfig, VeRAConfig
from fastadapt.layers import ways
from fastadapt.methods import AdapterConfig
from fastadapt.model.inject import adapter_layers

K, N = 12, 8


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return F.linear(x, 3 * self.weight, self.bias)


class Quantised(nn.Linear):
    """BitNet's: ternary weights, activations of 8 bits."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        size = self.weight.abs().mean()
        weight = (self.weight / size).round().clamp(-1, 1) * size
        largest = x.abs().amax(-1, keepdim=True) / 127
        return F.linear((x / largest).round() * largest, weight, self.bias)


class Integers(nn.Linear):
    """A weight of 8 bits and a scale for each row: there is none in floating point."""

    def __init__(self, k: int, n: int) -> None:
        super().__init__(k, n)
        weight = self.weight.detach()
        scale = weight.abs().amax(1, keepdim=True) / 127
        self.register_buffer("scale", scale)
        self.weight = nn.Parameter((weight / scale).round().to(torch.int8), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return F.linear(x, self.weight * self.scale, self.bias)


def hooked(layer: nn.Linear) -> nn.Linear:
    layer.register_forward_hook(lambda module, args, y: 2 * y)
    return layer


def prehooked(layer: nn.Linear) -> nn.Linear:
    layer.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    return layer


def looked_at(layer: nn.Linear) -> nn.Linear:
    layer.seen = []
    layer.register_forward_hook(lambda module, args, y: module.seen.append(1))
    return layer


def patched(layer: nn.Linear) -> nn.Linear:
    forward = layer.forward
    layer.forward = lambda x: forward(x) * 2  # type: ignore[method-assign]
    return layer


def parametrized(layer: nn.Linear) -> nn.Linear:
    return parametrizations.weight_norm(layer)


def spectral(layer: nn.Linear) -> nn.Linear:
    return parametrizations.spectral_norm(layer)


def old_norm(layer: nn.Linear) -> nn.Linear:
    with pytest.warns(FutureWarning):
        return nn.utils.weight_norm(layer)


def pruned(layer: nn.Linear) -> nn.Linear:
    return prune.l1_unstructured(layer, "weight", 0.5)


class Kind:
    """How a layer is made, why it is called, and why what is written into it would not come out, "" where it would."""

    def __init__(self, make: Callable[[], nn.Linear], reason: str, unmerged: str = "", peft: bool = True) -> None:
        self.make, self.reason, self.unmerged, self.peft = make, reason, unmerged, peft


def linear() -> nn.Linear:
    return nn.Linear(K, N)


MADE = "its weight is made at each access"
# PEFT looks for a bias in a layer's parametrizations.
KINDS = {
    "scaled": Kind(lambda: Scaled(K, N), "Scaled has a forward of its own"),
    "quantised": Kind(lambda: Quantised(K, N), "Quantised has a forward of its own", "forward of its own"),
    "integers": Kind(lambda: Integers(K, N), "Integers has a forward of its own", peft=False),
    "hook": Kind(lambda: hooked(linear()), "it has hooks"),
    "pre-hook": Kind(lambda: prehooked(linear()), "it has hooks"),
    "hook that looks": Kind(lambda: looked_at(linear()), "it has hooks"),
    "patched": Kind(lambda: patched(linear()), "its forward is patched on the instance"),
    "parametrized": Kind(lambda: parametrized(linear()), MADE, peft=False),
    "spectral norm": Kind(lambda: spectral(linear()), MADE, peft=False),
    "old weight norm": Kind(lambda: old_norm(linear()), MADE, "made by a hook"),
    "pruned": Kind(lambda: pruned(linear()), MADE, "made by a hook"),
}


def model_of(name: str) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(OrderedDict(fc=KINDS[name].make(), out=nn.Linear(N, N)))


def inputs() -> Tensor:
    return torch.randn(5, K, generator=torch.Generator().manual_seed(1))


def randomise(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)


TARGETS: dict[str, Any] = {"target_modules": ["fc"]}
METHODS: dict[str, Callable[[], AdapterConfig]] = {
    "LoRA": lambda: LoRAConfig(r=2, lora_bias=True, **TARGETS),
    "DoRA": lambda: DoRAConfig(r=2, **TARGETS),
    "VeRA": lambda: VeRAConfig(r=4, **TARGETS),
    "HiRA": lambda: HiRAConfig(r=2, **TARGETS),
    "GLoRA": lambda: GLoRAConfig(r=2, **TARGETS),
    "SSF": lambda: SSFConfig(init_std=0.0, **TARGETS),
    "RepAdapter": lambda: RepAdapterConfig(r=2, **TARGETS),
}
READS_VALUES = {"HiRA", "GLoRA"}
# What is in their merged weight beside the base layer's own.
READS_W0 = {*READS_VALUES, "RepAdapter"}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("training", [False, True])
def test_a_fresh_adapter_is_the_base_to_the_bit(name: str, method: str, training: bool) -> None:
    model, x = model_of(name).train(training), inputs()
    want = model_of(name).train(training)(x)
    fastadapt.inject(model, METHODS[method]())
    if name == "integers" and method in READS_VALUES:
        with pytest.raises(ValueError, match=r"fc \(Integers\) has no weight in floating point"):
            model(x)
        return
    y = model(x)
    # The norms of a weight that a step of the iteration changes are not those that the magnitudes started at.
    moves = training and name == "spectral norm" and method == "DoRA"
    if method == "RepAdapter" or moves:  # x' = x + 0
        torch.testing.assert_close(y, want)
    else:
        assert torch.equal(y, want)
    (layer,) = fastadapt.adapted_layers(model)
    assert layer.path == "fc"
    assert layer.reason == KINDS[name].reason
    assert layer.way == ("stream" if method == "RepAdapter" else "called")
    y.square().sum().backward()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", KINDS)
def test_adapted_is_merged_or_a_merge_is_refused(name: str, method: str) -> None:
    model, x = model_of(name).eval(), inputs()
    fastadapt.inject(model, METHODS[method]())
    if name == "integers" and method in READS_W0:
        return
    randomise(model)
    before, tensors = model(x), {key: value.clone() for key, value in model.state_dict().items()}
    base = model[0].base_layer
    if KINDS[name].unmerged or (method in READS_W0 and not _linear_in_w0(name)):
        with pytest.raises(ValueError, match=f"^fc: .*{KINDS[name].unmerged}"):
            fastadapt.merge(model)
    else:
        fastadapt.merge(model)
        assert fastadapt.adapted_layers(model)[0].way == "merged"
        torch.testing.assert_close(model(x), before, rtol=1e-5, atol=2e-5)
        fastadapt.unmerge(model)
    assert model[0].base_layer is base
    assert torch.equal(model(x), before)
    assert model.state_dict().keys() == tensors.keys()
    assert all(torch.equal(value, tensors[key]) for key, value in model.state_dict().items())


def _linear_in_w0(name: str) -> bool:
    """Whether the layer's own parameter, or what is made of it, is what it multiplies x by."""
    return name in ("hook that looks", "parametrized", "spectral norm")


@pytest.mark.parametrize("method", ["LoRA", "DoRA"])
@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if kind.peft])
def test_it_is_what_peft_has(name: str, method: str, tmp_path: Path) -> None:
    config = peft.LoraConfig(r=2, use_dora=method == "DoRA", init_lora_weights=False, **TARGETS)
    torch.manual_seed(3)
    theirs = peft.get_peft_model(model_of(name), config).eval()
    theirs.save_pretrained(str(tmp_path), save_embedding_layers=False)
    mine = fastadapt.load_adapter(model_of(name).eval(), tmp_path)
    torch.testing.assert_close(mine(inputs()), theirs(inputs()))
    assert not torch.equal(mine(inputs()), model_of(name).eval()(inputs()))


def test_a_merge_keeps_the_hooks_that_look() -> None:
    model = model_of("hook that looks").eval()
    fastadapt.inject(model, METHODS["LoRA"]())
    randomise(model)
    seen = model[0].base_layer.seen
    for change in (None, fastadapt.merge, fastadapt.unmerge):
        if change is not None:
            change(model)
        seen.clear()
        model(inputs())
        assert len(seen) == 1


def test_what_is_merged_stays_after_unload() -> None:
    for name in ("scaled", "hook", "parametrized", "integers"):
        model = model_of(name).eval()
        fastadapt.inject(model, METHODS["DoRA"]())
        randomise(model)
        want = model(inputs())
        fastadapt.merge(model)
        fastadapt.unload(model)
        assert type(model[0]) is nn.Linear
        torch.testing.assert_close(model(inputs()), want, rtol=1e-5, atol=2e-5)
        assert set(model.state_dict()) == {"fc.weight", "fc.bias", "out.weight", "out.bias"}


def test_hooks_come_and_go() -> None:
    """The way is chosen at each call."""
    model, x = nn.Sequential(OrderedDict(fc=nn.Linear(K, N))).eval(), inputs()
    fastadapt.inject(model, METHODS["LoRA"]())
    randomise(model)
    base, want = model[0].base_layer, model(x)
    plain = base(x)
    assert fastadapt.adapted_layers(model)[0][2:] == ("fused", "")
    handle = base.register_forward_hook(lambda module, args, y: y + 1)
    torch.testing.assert_close(model(x), want + 1)
    assert fastadapt.adapted_layers(model)[0][2:] == ("called", "it has hooks")
    assert "way=called (it has hooks)" in repr(model)
    handle.remove()
    assert torch.equal(model(x), want)
    everywhere = nn.modules.module.register_module_forward_hook(
        lambda module, args, y: 2 * y if type(module) is nn.Linear else None
    )
    torch.testing.assert_close(model(x), want + plain)
    everywhere.remove()
    assert torch.equal(model(x), want)


def test_a_forward_that_is_replaced_in_its_class(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels of others come in this way, before and after an adapter does."""
    model, x = nn.Sequential(OrderedDict(fc=nn.Linear(K, N))).eval(), inputs()
    fastadapt.inject(model, METHODS["LoRA"]())
    randomise(model)
    want, base = model(x), model[0].base_layer(x)
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: 2 * F.linear(x, self.weight, self.bias))
    torch.testing.assert_close(model(x), want + base)
    assert fastadapt.adapted_layers(model)[0].reason == "Linear has a forward of its own"
    with pytest.raises(ValueError, match="fc: an adapter cannot be merged into this layer"):
        fastadapt.merge(model)
    torch.testing.assert_close(model(x), want + base)


def test_a_hook_on_one_of_a_group_takes_it_out() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q_proj, self.k_proj, self.v_proj = (nn.Linear(K, K) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            return self.q_proj(x) + 10 * self.k_proj(x) + 100 * self.v_proj(x)

    torch.manual_seed(0)
    model, x = Attention(), inputs()
    fastadapt.inject(model, LoRAConfig(r=2, target_modules=["q_proj", "k_proj", "v_proj"]))
    randomise(model)
    want = model(x)
    base = model.k_proj.base_layer(x)
    model.k_proj.base_layer.register_forward_hook(lambda module, args, y: 2 * y)
    for _ in range(3):
        torch.testing.assert_close(model(x), want + 10 * base)
    assert {way for _, _, way, _ in fastadapt.adapted_layers(model)} == {"fused", "called"}


def test_a_plain_layer_is_not_called(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(OrderedDict(fc=nn.Linear(K, N)))
    fastadapt.inject(model, METHODS["LoRA"]())
    monkeypatch.setattr(nn.Linear, "__call__", lambda *_: pytest.fail("called"))
    model[0].forward(inputs())


@pytest.mark.parametrize("name", ["scaled", "hook", "parametrized"])
def test_dropout(name: str) -> None:
    """The mask follows the seed; DoRA's rule needs what the layer gives for the dropped input."""
    model, x = model_of(name).train(), inputs()
    fastadapt.inject(model, DoRAConfig(r=2, lora_dropout=0.5, **TARGETS))
    randomise(model)

    def run() -> Tensor:
        torch.manual_seed(7)
        y: Tensor = model[0](x)
        return y

    y = run()
    assert torch.equal(run(), y)
    torch.manual_seed(7)
    x_dropped = ways.dropped(x, 0.5)
    assert set((x_dropped == 0).flatten().tolist()) == {True, False}
    layer = model[0]
    form, base = layer.form(), layer.base_layer
    assert form.base_scale is not None
    low_rank = form.scaling * form.base_scale * (x_dropped @ form.A.T @ form.B.T)
    bias = 0 if base.bias is None else base.bias
    torch.testing.assert_close(y, base(x) + (form.base_scale - 1) * (base(x_dropped) - bias) + low_rank)
    assert torch.equal(model.eval()[0](x), model[0](x))


def test_norms_without_a_weight_are_those_of_what_the_layer_computes() -> None:
    model = model_of("integers").eval()
    base = model[0]
    weight = base.weight * base.scale
    fastadapt.inject(model, DoRAConfig(r=2, **TARGETS))
    magnitude = model[0].adapters["default"].lora_magnitude_vector
    torch.testing.assert_close(magnitude.detach(), weight.norm(dim=1))
    randomise(model)
    plain = nn.Sequential(OrderedDict(fc=nn.Linear(K, N), out=model[1])).eval()
    plain[0].load_state_dict({"weight": weight, "bias": base.bias})
    want = fastadapt.inject(plain, DoRAConfig(r=2, **TARGETS))
    want[0].adapters["default"].load_state_dict(model[0].adapters["default"].state_dict())
    torch.testing.assert_close(model(inputs()), want(inputs()))


def test_reading_a_weight_leaves_no_trace() -> None:
    """A spectral norm in training makes a step of its iteration at each access."""
    one, other = model_of("spectral norm").train(), model_of("spectral norm").train()
    x = inputs()
    fastadapt.inject(one, DoRAConfig(r=2, **TARGETS))
    for _ in range(3):
        torch.testing.assert_close(one(x), other(x))
    state = one[0].base_layer.parametrizations.weight[0]._u
    assert torch.equal(state, other[0].parametrizations.weight[0]._u)


def test_a_merge_that_is_tried_leaves_no_trace() -> None:
    class Counting(nn.Linear):
        def __init__(self) -> None:
            super().__init__(K, N)
            self.register_buffer("calls", torch.zeros(1))

        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            self.calls += 1
            return super().forward(x).tanh()

    model = nn.Sequential(Counting()).train()
    fastadapt.inject(model, LoRAConfig(r=2, target_modules=["0"]))
    with pytest.raises(ValueError, match="0: an adapter cannot be merged into this layer: Counting has a forward"):
        fastadapt.merge(model)
    assert model[0].base_layer.calls == 0
    assert model[0].base_layer.training


def test_a_layer_that_gives_more_than_a_tensor_is_refused_at_its_first_call() -> None:
    class Router(nn.Linear):
        def forward(self, x: Tensor) -> Any:  # type: ignore[override]
            return super().forward(x), x

    model = nn.Sequential(Router(K, N))
    fastadapt.inject(model, LoRAConfig(r=2, target_modules=["0"]))
    with pytest.raises(ValueError, match=r"0 \(Router\) gives a tuple, .* exclude_modules"):
        model(inputs())


def test_copies_and_pickles_go_the_same_way() -> None:
    model, x = nn.Sequential(Scaled(K, N)), inputs()
    fastadapt.inject(model, LoRAConfig(r=2, target_modules=["0"]))
    randomise(model)
    assert torch.equal(copy.deepcopy(model)(x), model(x))
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), model(x))


def test_literal_delta_lora_needs_a_weight_that_it_can_write() -> None:
    model = model_of("parametrized")
    config = fastadapt.DeltaLoRAConfig(r=2, literal=True, **TARGETS)
    fastadapt.inject(model, config)
    with pytest.raises(ValueError, match="literal Delta-LoRA writes the base weights, and fc is called"):
        fastadapt.control(model)


def test_a_stored_number_reaches_the_layer_at_its_arguments() -> None:
    """What a layer takes beside x goes to it."""

    class Shifted(nn.Linear):
        def forward(self, x: Tensor, shift: float, *, times: float = 1.0) -> Tensor:  # type: ignore[override]
            return super().forward(x) * times + shift

    layer, x = Shifted(K, N), inputs()
    model = nn.ModuleDict({"fc": layer})
    want = layer(x, 2.0, times=3.0)
    fastadapt.inject(model, LoRAConfig(r=2, target_modules=["fc"]))
    assert torch.equal(model["fc"](x, 2.0, times=3.0), want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(hooked(nn.Linear(64, 48))).to(dtype).eval(), torch.randn(9, 64).to(dtype)
    base = model(x)
    fastadapt.inject(model, DoRAConfig(r=4, target_modules=["0"]))
    assert torch.equal(model(x), base)
    randomise(model)
    y = model(x)
    assert y.dtype == dtype
    exact = copy.deepcopy(model).double()(x.double())
    assert (y - exact).abs().max() <= 8 * torch.finfo(dtype).eps * exact.abs().max()
    fastadapt.merge(model)
    assert (model(x) - exact).abs().max() <= 16 * torch.finfo(dtype).eps * exact.abs().max()


def test_compiled_in_one_graph() -> None:
    for name in ("scaled", "hook", "patched"):
        model, x = model_of(name).eval(), inputs()
        fastadapt.inject(model, METHODS["DoRA"]())
        randomise(model)
        torch._dynamo.reset()
        torch.testing.assert_close(torch.compile(model, backend="aot_eager", fullgraph=True)(x), model(x))


def test_a_layer_in_two_places_is_adapted_in_both() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Linear(K, K)
            self.inner = nn.ModuleDict({"two": self.one})

        def forward(self, x: Tensor) -> Tensor:
            return self.inner["two"](self.one(x).relu())  # type: ignore[no-any-return]

    torch.manual_seed(0)
    model, x = Twice().eval(), inputs()
    base = model.one
    fastadapt.inject(model, LoRAConfig(r=2, target_modules=["one"]))
    assert model.inner["two"] is model.one
    assert len(adapter_layers(model)) == 1
    randomise(model)
    want = model(x)
    fastadapt.merge(model)
    torch.testing.assert_close(model(x), want)
    fastadapt.unmerge(model)
    fastadapt.unload(model)
    assert model.inner["two"] is model.one is base


class Tripled(nn.Module):
    def forward(self, value: Tensor) -> Tensor:
        return value * 3


class BiasInABuffer(nn.Linear):
    def __init__(self, k: int, n: int) -> None:
        super().__init__(k, n)
        bias = self.bias.detach()
        del self.bias
        self.register_buffer("bias", bias)


def with_parametrized_bias() -> nn.Linear:
    layer = nn.Linear(6, 5)
    nn.utils.parametrize.register_parametrization(layer, "bias", Tripled())
    return layer


@pytest.mark.parametrize("made", [with_parametrized_bias, lambda: BiasInABuffer(6, 5)], ids=["parametrized", "buffer"])
def test_a_bias_that_is_no_parameter_is_merged_or_left(made: Any) -> None:
    torch.manual_seed(0)
    whole: Any = nn.Module()
    whole.up = made()
    fastadapt.inject(whole, LoRAConfig(r=2, target_modules=["up"])).eval()
    model = whole.up
    x = torch.randn(3, 6)
    with torch.no_grad():
        model.adapters["default"].lora_B.normal_()
        y = model(x)
        try:
            fastadapt.merge(whole)
        except ValueError:
            assert not model.merged
        torch.testing.assert_close(model(x), y)
        fastadapt.unmerge(whole)
        assert torch.equal(model(x), y)


def test_an_embedding_that_is_brought_down_to_a_norm_is_not_merged() -> None:
    model = nn.Sequential(nn.Embedding(7, 6, max_norm=1.0))
    fastadapt.inject(model, LoRAConfig(r=2, target_modules=["0"]))
    with pytest.raises(ValueError, match="max_norm"):
        fastadapt.merge(model)
    assert not model[0].merged
