"""A live PEFT model through our operators: what PEFT computes, and everything else as PEFT has it."""

from __future__ import annotations

import copy
import pickle
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from helpers import assert_follows
from peft.tuners.lora import layer as lora_layer
from tiny_models import gpt2, llama, randomise, tokens
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastadapt
from fastadapt.integrations.peft_layers import Accelerated
from fastadapt.operators.adapter_linear import function

# PEFT asks transformers for what that deprecates, and torch's own forward derivatives are scripted.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::peft.utils.warning.PeftWarning"),
]

QKV = ["q_proj", "k_proj", "v_proj"]
ALL = [*QKV, "o_proj"]


class Attention(nn.Module):
    """Three projections of one input and one of what the last gives: linear, so that sums of sizes go through it."""

    def __init__(self, biased: bool = False) -> None:
        super().__init__()
        self.q_proj = nn.Linear(12, 16, bias=biased)
        self.k_proj = nn.Linear(12, 8, bias=biased)
        self.v_proj = nn.Linear(12, 8, bias=biased)
        self.o_proj = nn.Linear(8, 10, bias=biased)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        return torch.cat([q, k, self.o_proj(v)], dim=-1)


class Scaled(nn.Linear):
    """A base layer that is more than its weight."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


METHODS: dict[str, Callable[..., Any]] = {
    "lora": lambda p: peft.LoraConfig(r=4, lora_alpha=6, lora_dropout=p, target_modules=ALL),
    "ranks": lambda p: peft.LoraConfig(r=4, rank_pattern={"k_proj": 7}, lora_dropout=p, target_modules=ALL),
    "rslora": lambda p: peft.LoraConfig(r=5, lora_alpha=6, use_rslora=True, lora_dropout=p, target_modules=ALL),
    "lora_bias": lambda p: peft.LoraConfig(r=4, lora_bias=True, lora_dropout=p, target_modules=ALL),
    "trained bias": lambda p: peft.LoraConfig(r=4, bias="lora_only", lora_dropout=p, target_modules=ALL),
    "dora": lambda p: peft.LoraConfig(r=4, lora_alpha=6, use_dora=True, lora_dropout=p, target_modules=ALL),
    "vera": lambda p: peft.VeraConfig(r=6, vera_dropout=p, target_modules=ALL),
}
# fp32 and bf16 throughout, adapters in fp32 on a bf16 base, and everything in fp32 under autocast.
PRECISIONS = ("fp32", "bf16", "mixed", "autocast")


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def peft_model(config: Any, biased: bool = True, base: nn.Module | None = None) -> Any:
    torch.manual_seed(0)
    base = Attention(biased) if base is None else base
    for name, parameter in base.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=3.0)
    # PEFT warns where lora_bias could not be merged.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(base, config)
    randomise(trained(model))
    return model


def result(model: Any, x: Tensor, dtype: torch.dtype, autocast: bool = False) -> dict[str, Tensor]:
    """The output and every gradient, by name."""
    model.zero_grad()
    leaf = x.detach().to(dtype, copy=True).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = model(leaf * 1)  # x has a graph, as behind other layers
    y.sum().backward()
    assert leaf.grad is not None
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "dx": leaf.grad, **grads}


def follows(model: Any, act: Callable[[Any], Any], x: Tensor, precision: str = "fp32") -> None:
    """Holds an accelerated model, after `act`, to PEFT's own, of which `model` is a copy without anything of ours."""
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16

    def cast(model: Any, dtype: torch.dtype) -> Any:
        model = copy.deepcopy(model).to(dtype)
        if precision == "mixed" and dtype == torch.bfloat16:
            # VeRA's shared projection too; base layers' trained biases stay what their layers are.
            own = [p for name, p in model.named_parameters() if "base_layer" not in name and p.requires_grad]
            for tensor in (*own, *model.buffers()):
                tensor.data = tensor.data.float()
        return model

    def formula(dtype: torch.dtype) -> dict[str, Tensor]:
        autocast = precision == "autocast" and dtype == torch.bfloat16
        run = torch.float32 if autocast else dtype
        copied = cast(model, run)
        return result(act(copied) or copied, x, run, autocast)

    run = torch.float32 if precision == "autocast" else dtype
    ours = cast(model, run)
    fastadapt.accelerate_peft(ours)
    ours = act(ours) or ours
    actual = result(ours, x, run, precision == "autocast")
    theirs = formula(dtype)
    assert actual.keys() == theirs.keys()
    assert {name: value.dtype for name, value in actual.items()} == {n: v.dtype for n, v in theirs.items()}
    assert_follows(actual, formula, dtype)


@pytest.fixture
def masks(monkeypatch: pytest.MonkeyPatch) -> None:
    """One and the same mask for an x of the same shape, in PEFT's dropout and in ours."""

    def mask(x: Tensor) -> Tensor:
        rows, columns = x.numel() // x.shape[-1], x.shape[-1]
        return torch.rand(rows, columns, generator=torch.Generator().manual_seed(columns)) >= 0.5

    def dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        return x * (mask(x).view(x.shape).to(x.dtype) / (1 - p)) if training else x

    monkeypatch.setattr(torch.nn.functional, "dropout", dropout)
    monkeypatch.setattr(function, "draw_dropout", lambda x, p, backend: mask(x))


@pytest.fixture
def sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many layers each of our calls ran, in order."""
    from fastadapt.integrations import peft_layers
    from fastadapt.layers import linear

    found: list[int] = []
    alone, group, update = peft_layers.adapter_linear, linear.adapter_linear_group, peft_layers.adapter_update
    monkeypatch.setattr(peft_layers, "adapter_linear", lambda *args, **named: found.append(1) or alone(*args, **named))
    monkeypatch.setattr(peft_layers, "adapter_update", lambda *args, **named: found.append(0) or update(*args, **named))
    monkeypatch.setattr(
        linear, "adapter_linear_group", lambda *args, **named: found.append(len(args[1])) or group(*args, **named)
    )
    return found


def as_it_is(model: Any) -> None:
    pass


@pytest.mark.usefixtures("masks")
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_a_step_is_pefts(method: str, biased: bool, p: float, precision: str, sizes: list[int]) -> None:
    if method in ("lora_bias", "trained bias") and not biased:
        pytest.skip("the base layers have no bias")
    model = peft_model(METHODS[method](p), biased).train()
    follows(model, as_it_is, torch.randn(3, 5, 12), precision)
    assert sizes == [3, 1]  # q k v, o


def with_other(model: Any, method: str) -> None:
    model.add_adapter("other", METHODS[method](0.0))
    randomise([p for name, p in model.named_parameters() if ".other" in name], seed=11)
    model.to(next(model.parameters()).dtype)


def two_active(model: Any, method: str) -> None:
    with_other(model, method)
    model.base_model.set_adapter(["default", "other"])


def switched(model: Any, method: str) -> None:
    with_other(model, method)
    model.set_adapter("other")


def deleted(model: Any, method: str) -> None:
    with_other(model, method)
    model.set_adapter("other")
    model.delete_adapter("default")


def merged_and_back(model: Any, method: str) -> None:
    model(torch.zeros(1, 12, dtype=next(model.parameters()).dtype))
    model.merge_adapter()
    model(torch.zeros(1, 12, dtype=next(model.parameters()).dtype))
    model.unmerge_adapter()


def merged(model: Any, method: str) -> None:
    model.merge_adapter()


def disabled(model: Any, method: str) -> None:
    model.base_model.disable_adapter_layers()
    model(torch.zeros(1, 12, dtype=next(model.parameters()).dtype))


def enabled_again(model: Any, method: str) -> None:
    with model.disable_adapter():
        model(torch.zeros(1, 12, dtype=next(model.parameters()).dtype))


def unloaded(model: Any, method: str) -> Any:
    return model.merge_and_unload()


def copied(model: Any, method: str) -> Any:
    model(torch.zeros(1, 12, dtype=next(model.parameters()).dtype))
    return copy.deepcopy(model)


def pickled(model: Any, method: str) -> Any:
    return pickle.loads(pickle.dumps(model))


def rescaled(model: Any, method: str) -> None:
    for layer in model.modules():
        if isinstance(layer, lora_layer.Linear):
            layer.scale_layer(3.0)


def written_past_versions(model: Any, method: str) -> None:
    model(torch.zeros(1, 12, dtype=next(model.parameters()).dtype))
    for parameter in trained(model):
        parameter.data.mul_(2)


ACTS = [two_active, switched, deleted, merged_and_back, merged, disabled, enabled_again, unloaded, copied, pickled]
ACTS += [rescaled, written_past_versions]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("method", ["lora", "rslora", "lora_bias", "dora", "vera"])
def test_what_peft_does_to_a_model_goes_on(method: str, act: Callable[..., Any], training: bool) -> None:
    model = peft_model(METHODS[method](0.0)).train(training)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("base_layer" not in name and act is not unloaded)
    follows(model, lambda m: act(m, method), torch.randn(3, 5, 12))


@pytest.mark.parametrize("method", ["lora", "lora_bias", "dora", "vera"])
def test_files_go_both_ways(method: str, tmp_path: Path) -> None:
    model, x = peft_model(METHODS[method](0.0)).eval(), torch.randn(4, 12)
    with torch.no_grad():
        expected = model(x)
    model.save_pretrained(str(tmp_path / "theirs"))
    names = set(model.state_dict())
    fastadapt.accelerate_peft(model)
    assert set(model.state_dict()) == names
    model.save_pretrained(str(tmp_path / "ours"))
    for folder in ("theirs", "ours"):
        loaded = peft.PeftModel.from_pretrained(copy.deepcopy(model).unload(), str(tmp_path / folder)).eval()
        if folder == "theirs":
            fastadapt.accelerate_peft(loaded)
        with torch.no_grad():
            torch.testing.assert_close(loaded(x), expected)
    model.load_adapter(str(tmp_path / "theirs"), adapter_name="again")
    model.set_adapter("again")
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("name", ["llama lora", "llama dora", "llama vera", "gpt2 lora", "gpt2 dora", "gpt2 vera"])
def test_a_language_model_trains_and_generates_as_with_peft(name: str) -> None:
    family, method = name.split()
    targets: Any = "all-linear" if family == "llama" else ["c_attn", "c_fc", "c_proj"]
    kind = peft.VeraConfig if method == "vera" else peft.LoraConfig
    config = kind(r=4, target_modules=targets, fan_in_fan_out=family == "gpt2")
    if method == "dora":
        config.use_dora = True
    model = peft.get_peft_model(llama() if family == "llama" else gpt2(), config)
    for step in trained(model):
        torch.nn.init.normal_(step, std=0.1)
    theirs, ids = copy.deepcopy(model), tokens()
    report = fastadapt.accelerate_peft(model)
    assert not report.left
    ways = ["grouped"] * 10 + ["fused"] * 4 if family == "llama" else ["fused"] * 8
    assert sorted(report.taken.values(), reverse=True) == ways
    losses = []
    for tried in (model, theirs):
        optimizer = torch.optim.AdamW(trained(tried), lr=1e-3, fused=True)
        for _ in range(3):
            loss = tried(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.detach())
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-5)
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(input_ids=ids, **options), theirs.generate(input_ids=ids, **options))


# What runs here and what is left.


def layer_of(model: Any, name: str = "q_proj") -> Any:
    return model.base_model.model.get_submodule(name)


def test_twice_is_harmless_and_restoring_gives_all_back() -> None:
    model = peft_model(METHODS["dora"](0.0))
    before = [(type(module), set(module.__dict__)) for module in model.modules()]
    printed = repr(model)
    first = fastadapt.accelerate_peft(model)
    assert repr(model) == printed
    model(torch.randn(2, 12))
    assert fastadapt.accelerate_peft(model) == first
    assert str(first) == "4 of 4 layers of PEFT's run through fastadapt: 3 grouped, 1 fused"
    assert isinstance(layer_of(model), lora_layer.Linear)
    fastadapt.restore_peft(model)
    fastadapt.restore_peft(model)
    assert [(type(module), set(module.__dict__)) for module in model.modules()] == before


def test_a_second_call_takes_what_came_later() -> None:
    model = peft_model(peft.LoraConfig(r=2, target_modules=["q_proj"]))
    assert len(fastadapt.accelerate_peft(model).taken) == 1
    model.add_adapter("more", peft.LoraConfig(r=2, target_modules=["q_proj", "o_proj"]))
    model.set_adapter("more")
    assert len(fastadapt.accelerate_peft(model).taken) == 2


def test_a_model_without_layers_of_pefts_is_refused() -> None:
    with pytest.raises(ValueError, match=r"get_peft_model"):
        fastadapt.accelerate_peft(Attention())


def hook_on(path: str) -> Callable[[Any], Any]:
    return lambda layer: layer.get_submodule(path).register_forward_hook(lambda *_: None)


def trained_base(layer: Any) -> None:
    layer.base_layer.weight.requires_grad_()


def tensor_scaling(layer: Any) -> None:
    layer.scaling["default"] = torch.tensor(2.0)


def no_casting(layer: Any) -> None:
    layer.cast_input_dtype_enabled = False


def own_dropout(layer: Any) -> None:
    layer.lora_dropout["default"] = nn.AlphaDropout(0.5)


def another_variant(layer: Any) -> None:
    class Variant(type(layer.lora_variant["default"])):  # type: ignore[misc]
        pass

    layer.lora_variant["default"] = Variant()


LEFT: dict[str, tuple[Callable[[Any], Any], str]] = {
    "a hook on the base layer": (hook_on("base_layer"), "has hooks"),
    "a hook on A": (hook_on("lora_A.default"), "more than a linear"),
    "a hook on B": (hook_on("lora_B.default"), "more than a linear"),
    "a hook on the magnitude": (hook_on("lora_magnitude_vector.default"), "DoRA of another kind"),
    "a trained base": (trained_base, "base weight trains"),
    "a scaling that is a tensor": (tensor_scaling, "scaling is a tensor"),
    "no casting of inputs": (no_casting, "casting"),
    "another dropout": (own_dropout, "dropout of another kind"),
    "another variant": (another_variant, "Variant is a variant"),
    "merged": (lambda layer: layer.merge(), "merged"),
    "disabled": (lambda layer: layer.enable_adapters(False), "disabled"),
    "nothing active": (lambda layer: layer.set_adapter([]), "no adapter"),
}


@pytest.mark.parametrize("accelerated_before", [False, True])
@pytest.mark.parametrize("name", LEFT)
def test_what_is_left_to_peft_says_why(name: str, accelerated_before: bool, sizes: list[int]) -> None:
    change, why = LEFT[name]
    model, x = peft_model(METHODS["dora"](0.0)).eval(), torch.randn(4, 12)
    if accelerated_before:
        fastadapt.accelerate_peft(model)
    change(layer_of(model))
    report = fastadapt.accelerate_peft(model)
    assert why in report.left["base_model.model.q_proj"]
    assert len(report.left) == 1
    assert why in str(report)
    y = model(x)
    assert sizes == [1, 1, 1]  # k and v, whose x is a leaf, and o
    fastadapt.restore_peft(model)
    torch.testing.assert_close(y, model(x))


def test_layers_of_other_kinds_are_left() -> None:
    model = peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"]))
    report = fastadapt.accelerate_peft(model)
    assert report.left == {"base_model.model.model.embed_tokens": "lora.Embedding has a forward of its own"}


def test_dropouts_that_differ_and_dora_beside_another_are_left() -> None:
    model = peft_model(METHODS["lora"](0.5)).train()
    model.add_adapter("other", METHODS["lora"](0.1))
    model.base_model.set_adapter(["default", "other"])
    assert "dropouts" in str(fastadapt.accelerate_peft(model))
    assert not fastadapt.accelerate_peft(model.eval()).left
    model.add_adapter("dora", METHODS["dora"](0.0))
    model.base_model.set_adapter(["default", "dora"])
    assert "together with another" in str(fastadapt.accelerate_peft(model))


def test_a_base_layer_that_is_more_than_its_weight_is_called(sizes: list[int]) -> None:
    base = Attention(True)
    for name in QKV:
        old: Any = base.get_submodule(name)
        scaled = Scaled(old.in_features, old.out_features)
        setattr(base, name, scaled)
    for method in ("lora", "lora_bias", "vera"):
        model = peft_model(METHODS[method](0.0), base=copy.deepcopy(base))
        sizes.clear()
        follows(model, as_it_is, torch.randn(3, 5, 12))
        assert sizes == [0, 0, 0, 1]
    model = peft_model(METHODS["dora"](0.0), base=base)
    assert "more than its weight" in str(fastadapt.accelerate_peft(model))


def test_a_peft_that_does_more_is_left_alone_with_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    model = peft_model(METHODS["lora"](0.0))

    def forward(self: Any, x: Tensor) -> Tensor:
        return self.novelty(x)  # type: ignore[no-any-return]

    monkeypatch.setattr(lora_layer.Linear, "forward", forward)
    with pytest.warns(UserWarning, match="novelty") as found:
        report = fastadapt.accelerate_peft(model)
    assert len(found) == 1
    assert (report.taken, len(report.left)) == ({}, 4)
    assert type(layer_of(model)) is lora_layer.Linear


def test_mixed_batches_are_pefts() -> None:
    model, x = peft_model(METHODS["lora"](0.0)).eval(), torch.randn(3, 12)
    with_other(model, "lora")
    names = ["default", "other", "__base__"]
    with torch.no_grad():
        expected = model(x, adapter_names=names)
        fastadapt.accelerate_peft(model)
        torch.testing.assert_close(model(x, adapter_names=names), expected)


NAMES = ["other", "default", "__base__", "default", "third", "other", "__base__"]


def all_train(model: Any) -> None:
    """All adapters require grad: set_adapter freezes all but one."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("base_layer" not in name)


def mixed(model: Any, method: str, mixed_batches: bool = True) -> None:
    """Three adapters, of two ranks where they have one, ready for mixed batches."""
    with_other(model, method)
    more = peft.VeraConfig(r=6, target_modules=ALL) if method == "vera" else METHODS[method](0.0)
    if method != "vera":
        more.r = 3
    model.add_adapter("third", more)
    randomise([p for name, p in model.named_parameters() if ".third" in name], seed=12)
    model.to(next(model.parameters()).dtype)
    all_train(model)
    fastadapt.accelerate_peft(model, mixed_batches=mixed_batches)


def rows_alone(model: Any, x: Tensor, names: list[str]) -> Tensor:
    """Each row through PEFT's own layers with its adapter alone."""
    ys = []
    for row, name in zip(x.split(1), names, strict=True):
        if name == "__base__":
            with model.disable_adapter():
                ys.append(model(row))
            continue
        model.set_adapter(name)
        all_train(model)
        ys.append(model(row))
    all_train(model)
    return torch.cat(ys)


@pytest.mark.parametrize("names", [NAMES, sorted(NAMES), ["third"] * 7, ["__base__"] * 7], ids=len)
@pytest.mark.parametrize("called", [False, True], ids=["plain", "called"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "autocast"])
@pytest.mark.parametrize("method", ["lora", "lora_bias", "dora", "vera"])
def test_each_row_of_a_mixed_batch_is_its_adapter_alone(
    method: str, precision: str, called: bool, names: list[str]
) -> None:
    if called and method == "dora":
        pytest.skip("DoRA needs its base layer's weight")
    base = Attention(True)
    if called:
        base.q_proj, base.o_proj = Scaled(12, 16), Scaled(8, 10)
    model = peft_model(METHODS[method](0.0), base=base).eval()
    mixed(model, method)
    x, autocast = torch.randn(7, 5, 12), precision == "autocast"
    run = torch.bfloat16 if precision == "bf16" else torch.float32

    def through(model: Any, dtype: torch.dtype, forward: Callable[[Any, Tensor], Tensor]) -> dict[str, Tensor]:
        model.zero_grad()
        leaf = x.to(dtype, copy=True).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast and dtype == run):
            y = forward(model, leaf)
        y.sum().backward()
        assert leaf.grad is not None
        own = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        return {"y": y.detach(), "dx": leaf.grad, **own}

    def formula(dtype: torch.dtype) -> dict[str, Tensor]:
        dtype = run if autocast and dtype == torch.bfloat16 else dtype
        theirs = copy.deepcopy(model).to(dtype)
        fastadapt.restore_peft(theirs)
        return through(theirs, dtype, lambda m, x: rows_alone(m, x, names))

    ours = copy.deepcopy(model).to(run)
    actual = through(ours, run, lambda m, x: m(x, adapter_names=names))
    assert_follows(actual, formula, torch.bfloat16 if precision != "fp32" else run)
    grads = {name.split(".")[-2 if "lora" in name else -1] for name in actual if name not in ("y", "dx")}
    assert grads == {*names} - {"__base__"}


@pytest.mark.parametrize("method", ["lora", "dora", "vera"])
def test_the_base_layer_runs_once_in_a_mixed_batch(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, called = peft_model(METHODS[method](0.0)).eval(), []
    mixed(model, method)
    linear = torch.nn.functional.linear
    monkeypatch.setattr(torch.nn.functional, "linear", lambda x, *rest: called.append(len(x)) or linear(x, *rest))
    with torch.no_grad():
        y = model(torch.randn(7, 12), adapter_names=NAMES)
    assert called == [7, 2, 2, 1] * 4  # then x Aᵀ of default, other and third
    assert y.shape == (7, 34)


@pytest.mark.parametrize("method", ["lora", "dora", "vera"])
def test_base_rows_of_a_mixed_batch_are_the_disabled_models(method: str) -> None:
    model, x = peft_model(METHODS[method](0.0)).eval(), torch.randn(7, 5, 12)
    mixed(model, method)
    with torch.no_grad():
        q = layer_of(model)
        y = q(x, adapter_names=NAMES)
        base = q.base_layer(x)
        assert torch.equal(y[[2, 6]], base[[2, 6]])
        with model.disable_adapter():
            assert torch.equal(q(x, adapter_names=NAMES), base)


@pytest.mark.parametrize("again", [fastadapt.restore_peft, fastadapt.accelerate_peft])
def test_mixed_batches_are_opted_into_and_end(again: Callable[[Any], Any]) -> None:
    x = torch.randn(7, 12)
    for method, refused in (("lora", False), ("dora", True)):
        model = peft_model(METHODS[method](0.0)).eval()
        mixed(model, method)
        again(model)
        if refused:
            with pytest.raises(ValueError, match="DoRA is enabled"):
                model(x, adapter_names=NAMES)
        else:
            model(x, adapter_names=NAMES)
    model = peft_model(METHODS["vera"](0.0)).eval()
    mixed(model, "vera")
    copied = pickle.loads(pickle.dumps(model))
    torch.testing.assert_close(copied(x, adapter_names=NAMES), model(x, adapter_names=NAMES))
    again(model)
    assert type(model.base_model) is peft.VeraModel


MISTAKES: dict[str, tuple[Callable[[Any], Any], list[str], str]] = {
    "training": (lambda model: model.train(), NAMES, "training mode: call model.eval"),
    "an unknown name": (as_it_is, ["others"] * 7, r"'__base__', got \['others'\]"),
    "too few names": (as_it_is, ["other"] * 3, "3 names for the 7 rows"),
    "a layer that is left": (lambda model: hook_on("base_layer")(layer_of(model)), NAMES, "base layer has hooks"),
    "merged": (lambda model: model.merge_adapter(), NAMES, "merged"),
    "a layer that came later": (
        lambda model: setattr(layer_of(model), "__class__", type(layer_of(model)).__mro__[2]),
        NAMES,
        "Linear, is not accelerated",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_what_a_mixed_batch_of_vera_adapters_cannot_be(name: str) -> None:
    change, names, said = MISTAKES[name]
    model = peft_model(METHODS["vera"](0.0)).eval()
    mixed(model, "vera")
    change(model)
    with pytest.raises(ValueError, match=said):
        model(torch.randn(7, 12), adapter_names=names)
    assert not layer_of(model)._forward_pre_hooks


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("method", ["lora", "dora", "vera"])
def test_a_mixed_batch_is_generated_from(method: str, beams: int) -> None:
    kind = peft.VeraConfig if method == "vera" else peft.LoraConfig
    config = kind(r=4, target_modules="all-linear")
    if method == "dora":
        config.use_dora = True
    model = peft.get_peft_model(llama(), config).eval()
    model.add_adapter("other", config)
    randomise([p for name, p in model.named_parameters() if ".default" in name or ".other" in name])
    fastadapt.accelerate_peft(model, mixed_batches=True)
    ids, names = tokens(3), ["other", "__base__", "default"]
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "num_beams": beams}
    found = model.generate(input_ids=ids, adapter_names=names, **options)
    fastadapt.restore_peft(model)
    for row, name in enumerate(names):
        if name == "__base__":
            with model.disable_adapter():
                alone = model.generate(input_ids=ids[[row]], **options)
        else:
            model.set_adapter(name)
            alone = model.generate(input_ids=ids[[row]], **options)
        assert torch.equal(found[[row], : alone.shape[1]], alone)


# Gradients, as PEFT has them.


@pytest.mark.parametrize("method", ["lora", "dora", "vera"])
def test_each_sibling_may_have_a_backward_of_its_own(method: str) -> None:
    model, x = peft_model(METHODS[method](0.0)), torch.randn(5, 12)
    theirs = copy.deepcopy(model)
    fastadapt.accelerate_peft(model)
    for tried in (model, theirs):
        for y in [layer_of(tried, name)(x) for name in QKV]:
            y.square().sum().backward()
    for (name, one), other in zip(model.named_parameters(), theirs.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None), name
        if one.grad is not None:
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("base_trains", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("method", ["lora", "dora", "vera"])
def test_a_checkpoint_runs_again_by_the_same_masks(method: str, reentrant: bool, base_trains: bool) -> None:
    model = peft_model(METHODS[method](0.5)).train()
    fastadapt.accelerate_peft(model)
    layer_of(model, "k_proj").base_layer.weight.requires_grad_(base_trains)
    # The projections read what the checkpoint is given: where it runs again, that is a leaf.
    x = torch.randn(5, 12, requires_grad=True)
    ys = []
    for tried in (x, torch.zeros(5, 12, requires_grad=True)):
        torch.manual_seed(3)
        ys.append(checkpoint(model, tried, use_reentrant=reentrant).sum())
    ys[0].backward()
    assert x.grad is not None
    # The model is linear, and so is what x does to it what its gradient says, mask by mask.
    torch.testing.assert_close((x.grad * x).sum(), ys[0] - ys[1], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("method", ["lora", "dora", "vera"])
def test_a_sibling_without_a_loss_has_no_gradient(method: str, sizes: list[int]) -> None:
    model, x = peft_model(METHODS[method](0.0)), torch.randn(5, 12, requires_grad=True) * 1
    fastadapt.accelerate_peft(model)
    q, *_ = [layer_of(model, name)(x) for name in QKV]
    q.square().sum().backward()
    assert sizes == [3]
    found = {name.split(".")[2] for name, p in model.named_parameters() if p.grad is not None}
    assert found == {"q_proj"}


def test_a_sibling_that_does_not_train_gets_no_graph() -> None:
    model, x = peft_model(METHODS["lora"](0.0)), torch.randn(5, 12)
    fastadapt.accelerate_peft(model)
    layer_of(model, "k_proj").requires_grad_(False)
    assert [layer_of(model, name)(x).requires_grad for name in QKV] == [True, False, True]


def test_functional_transforms_and_forward_derivatives_are_pefts() -> None:
    model, x = peft_model(METHODS["lora"](0.0)).eval(), torch.randn(5, 12)
    theirs = copy.deepcopy(model)
    fastadapt.accelerate_peft(model)
    for run in (
        lambda m: torch.func.vmap(m)(x),
        lambda m: torch.func.jvp(m, (x,), (x,))[1],
        lambda m: torch.func.grad(lambda x: m(x).sum())(x),
    ):
        torch.testing.assert_close(run(model), run(theirs))


def test_doras_gradients_in_bf16_are_no_worse_than_pefts() -> None:
    """Over cases whose sums cancel: a single one may be luck, at rank 1 the error is mostly one number's."""
    errors: dict[str, list[tuple[float, float]]] = {}
    for case in range(50):
        torch.manual_seed(case)
        k, n, rows = torch.randint(8, 96, (3,)).tolist()
        config = peft.LoraConfig(r=1, lora_alpha=2, use_dora=True, target_modules=["0"])
        model = peft_model(config, base=nn.Sequential(nn.Linear(k, n))).bfloat16()
        x, dy = torch.randn(rows, k), torch.randn(rows, n)
        x = x + 10 if case % 5 == 0 else x
        dy = dy - dy.mean(0) if case % 3 == 0 else dy

        def gradients(model: Any, dtype: torch.dtype, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
            leaf = x.bfloat16().to(dtype).requires_grad_()
            model(leaf).backward(dy.bfloat16().to(dtype))
            assert leaf.grad is not None
            return {"dx": leaf.grad, **{name: p.grad for name, p in model.named_parameters() if p.grad is not None}}

        ours = copy.deepcopy(model)
        fastadapt.accelerate_peft(ours)
        exact = gradients(copy.deepcopy(model).double(), torch.float64, x, dy)
        found = [gradients(tried, torch.bfloat16, x, dy) for tried in (ours, model)]
        for name, value in exact.items():
            off = [float((one[name].double() - value).norm() / value.norm()) for one in found]
            errors.setdefault(name, []).append((off[0], off[1]))
    assert len(errors) == 4
    for name, pairs in errors.items():
        ours_error, theirs = (sum(error**2 for error in side) ** 0.5 for side in zip(*pairs, strict=True))
        assert ours_error <= 1.5 * theirs, name


@pytest.mark.parametrize("method", ["lora", "dora", "vera"])
def test_outputs_that_no_sibling_fetches_keep_an_x_for_a_short_while(method: str) -> None:
    model = peft_model(METHODS[method](0.0)).train()
    fastadapt.accelerate_peft(model)
    seen = []
    for _ in range(4):  # only q is called, and nothing runs backward
        x = torch.randn(5, 12, requires_grad=True) * 1
        seen.append(weakref.ref(x))
        layer_of(model)(x)
        del x
    # Never more than the last one's, and none once the guess has failed twice.
    assert [ref() is not None for ref in seen] == [False] * 4
    model = peft_model(METHODS[method](0.0)).train()
    fastadapt.accelerate_peft(model)
    x = torch.randn(5, 12, requires_grad=True) * 1
    kept = weakref.ref(x)
    layer_of(model)(x).sum().backward()
    del x
    assert kept() is None


# DoRA's norms are never stale.


def base_written_by_another_init(model: Any) -> None:
    model.add_adapter("olora", peft.LoraConfig(r=2, target_modules=ALL, init_lora_weights="olora"))


def base_merged_elsewhere(model: Any) -> None:
    """Two layers on one base weight: what is merged into one is in the other's as well."""
    q: Any = layer_of(model)
    twin = copy.deepcopy(q)
    twin.base_layer = q.base_layer
    twin.merge()


@pytest.mark.parametrize("change", [base_written_by_another_init, base_merged_elsewhere])
def test_a_base_weight_that_peft_writes_has_new_norms(change: Callable[[Any], None]) -> None:
    model, x = peft_model(METHODS["dora"](0.0)).eval(), torch.randn(5, 12)
    fastadapt.accelerate_peft(model)
    with torch.no_grad():
        before = model(x)
        change(model)
        model.set_adapter("default")
        model.eval()
        for layer in model.modules():  # as training leaves it: eval() drops nothing then
            if isinstance(layer, Accelerated):
                layer.training = False
        y = model(x)
        fastadapt.restore_peft(model)
        assert not torch.allclose(before, y)
        torch.testing.assert_close(y, model(x))
