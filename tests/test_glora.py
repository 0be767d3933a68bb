"""GLoRA: every combination of supports, the same in PEFT, and the supernet whose parts they are."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from peft import GloraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from test_peft_parity import close, our_parameters, peft_parameters, quiet_peft, save_from_peft
from tiny_models import randomise
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import fastadapt
from fastadapt import GLoRAConfig, LoRAConfig, inject, merge
from fastadapt.layers.linear import AdapterLinear
from fastadapt.methods.glora import GLoRAAdapter, Supports

A_B = ("lora", "vector", "constant", "none")
C = ("lora", "vector", "none")
D_E = ("vector", "constant", "none")
LAYERS = ["up", "down"]  # only the first has a bias


def inputs(rows: int = 3, width: int = 20, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(1)).to(dtype)


def adapter_of(model: nn.Module, path: str) -> GLoRAAdapter:
    adapter = model.get_submodule(f"{path}.adapters.default")
    assert isinstance(adapter, GLoRAAdapter)
    return adapter


def filled(model: Any) -> Any:
    for seed, (_, parameter) in enumerate(sorted(our_parameters(model).items())):
        randomise([parameter], seed)
    return model


def peft_files(directory: Path, model: nn.Module) -> Any:
    with quiet_peft():
        return PeftModel.from_pretrained(model, directory).eval()


# PEFT


@pytest.mark.parametrize("supports", list(itertools.product(A_B, C, D_E)), ids="-".join)
def test_it_is_pefts_both_ways(supports: tuple[str, str, str], tmp_path: Path) -> None:
    fields: dict[str, Any] = dict(zip(("config_A_B", "config_C", "config_D_E"), supports, strict=True))
    fields |= {"r": 3, "target_modules": LAYERS}
    ours = filled(inject(tiny_models.mlp(), GLoRAConfig(**fields)))
    with quiet_peft():
        peft = get_peft_model(tiny_models.mlp(), GloraConfig(**fields)).eval()
    mine, other = our_parameters(ours), peft_parameters(peft)
    assert {name: p.shape for name, p in mine.items()} == {name: p.shape for name, p in other.items()}
    with torch.no_grad():
        for name, parameter in other.items():
            parameter.copy_(mine[name])
    y, expected = ours(inputs()), peft(inputs())
    assert close(y, expected)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(2))
    for result in (y, expected) if mine else ():
        (result * weights).sum().backward()
    for name, parameter in other.items():
        gradient = mine[name].grad
        assert parameter.grad is not None
        assert gradient is not None
        assert close(gradient, parameter.grad, 1e-4), name

    fastadapt.save_adapter(ours, tmp_path / "ours")
    save_from_peft(peft, tmp_path / "peft")
    written, theirs = (load_file(tmp_path / side / "adapter_model.safetensors") for side in ("ours", "peft"))
    assert written.keys() == {name for name in theirs if not name.endswith(".zeros")}
    assert close(peft_files(tmp_path / "ours", tiny_models.mlp())(inputs()), expected)
    assert close(fastadapt.load_adapter(tiny_models.mlp(), tmp_path / "peft")(inputs()), expected)
    config = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert config.keys() <= json.loads((tmp_path / "peft" / "adapter_config.json").read_text()).keys()


@pytest.mark.parametrize("fields", [{"exclude_modules": ["down"]}, {"target_modules": r"u."}])
def test_pefts_file_names_the_layers_that_were_chosen(fields: dict[str, Any], tmp_path: Path) -> None:
    ours = filled(inject(tiny_models.mlp(), GLoRAConfig(**{"target_modules": LAYERS, **fields})))
    fastadapt.save_adapter(ours, tmp_path)
    assert close(peft_files(tmp_path, tiny_models.mlp())(inputs()), ours(inputs()))


def test_zeros_that_are_none_are_refused(tmp_path: Path) -> None:
    with quiet_peft():
        peft = get_peft_model(tiny_models.mlp(), GloraConfig(target_modules=LAYERS, config_A_B="none"))
    save_from_peft(peft, tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors["base_model.model.up.glora_A.zeros"][2, 3] = 1
    save_file(tensors, file)
    with pytest.raises(ValueError, match=r"up\.glora_A\.zeros must be zero"):
        fastadapt.load_adapter(tiny_models.mlp(), tmp_path)


# Every combination of supports


def dense(adapter: GLoRAAdapter, layer: AdapterLinear, supports: Supports) -> tuple[Tensor, Tensor]:
    """(W', b') of the published formula, with every term as a matrix of full size."""
    weight, bias = layer.weight_matrix, layer.base_bias
    assert bias is not None
    n, k = weight.shape
    shapes = {"A": (n, k), "B": (n, k), "C": (k, 1), "D": (n,), "E": (n,)}
    terms = {}
    for letter, support in supports._asdict().items():
        stored = {name: p for name, p in adapter.named_parameters() if name.startswith(f"glora_{letter}_")}
        if support == "none":
            terms[letter] = torch.zeros(shapes[letter], dtype=weight.dtype)
        elif "lora" in support:
            r = int(support[-1])
            terms[letter] = stored[f"glora_{letter}_Xd"][:, :r] @ stored[f"glora_{letter}_Xu"][:r]
        else:
            values = stored.get(f"glora_{letter}_Xd", stored.get(f"glora_{letter}_X"))
            assert values is not None
            column = (values[:, :1] if values.dim() == 2 else values) if support == "vector" else values.flatten()[0]
            terms[letter] = column.expand(shapes[letter])
    A, B, C, D, E = (terms[letter] for letter in "ABCDE")
    return weight + weight * A + B, bias + bias * D + E + (weight @ C).squeeze(1)


COMBINATIONS = [
    Supports(*supports)
    for supports in itertools.product(
        ("lora:2", "vector", "constant", "none"),
        ("lora:3", "vector", "constant", "none"),
        ("lora:1", "vector", "none"),
        D_E,
        D_E,
    )
]


def test_all_432_compute_and_merge_to_the_published_formula() -> None:
    x = inputs(5, 6, torch.float64)
    layer = AdapterLinear(nn.Linear(6, 4, dtype=torch.float64).requires_grad_(False))
    nn.init.normal_(layer.base_layer.bias, std=20)
    layer.active = ("default",)
    assert len(COMBINATIONS) == 432
    for supports in COMBINATIONS:
        adapter = GLoRAAdapter(layer, GLoRAConfig(), supports, torch.float64)
        randomise(adapter.parameters())
        layer.adapters["default"] = adapter
        with torch.no_grad():
            weight, bias = dense(adapter, layer, supports)
            exact = nn.functional.linear(x, weight, bias)
            torch.testing.assert_close(layer(x), exact, rtol=1e-12, atol=1e-12)
            layer.merge()
            torch.testing.assert_close(layer(x), exact, rtol=1e-12, atol=1e-12)
        layer.unmerge()


@pytest.mark.parametrize("support", ["lora:2", "vector", "none"])
def test_a_layer_without_a_bias_gets_one_only_if_asked(support: str) -> None:
    supports = ["none", "none", support, "vector", "constant"]
    fields: dict[str, Any] = {"target_modules": ["down"], "support_pattern": {"down": supports}}
    without = filled(inject(tiny_models.mlp(), GLoRAConfig(**fields)))
    assert without.down.form().bias is None
    assert not our_parameters(without)
    model = filled(inject(tiny_models.mlp(), GLoRAConfig(**fields, create_bias=True)))
    tensors = dict(adapter_of(model, "down").named_parameters())
    assert not any("_D_" in name for name in tensors)
    column = {
        "lora:2": lambda: tensors["glora_C_Xd"] @ tensors["glora_C_Xu"],
        "vector": lambda: tensors["glora_C_X"],
        "none": lambda: torch.zeros(28, 1),
    }[support]()
    expected = (model.down.weight @ column)[:, 0] + tensors["glora_E_X"]
    torch.testing.assert_close(model.down.form().bias, expected)


@pytest.mark.parametrize("init", [True, False, "xavier"])
def test_the_terms_start_as_documented(init: bool | str) -> None:
    config = GLoRAConfig(r=64, config_D_E="vector", init_weights=init, target_modules=["0"])
    tensors = dict(adapter_of(inject(nn.Sequential(nn.Linear(300, 500)), config), "0").named_parameters())
    bound = {True: 300**-0.5, False: 300**-0.5, "xavier": (6 / 364) ** 0.5}[init]
    assert bound * 0.99 < tensors["glora_A_Xu"].abs().max() <= bound
    zero = [name for name, tensor in tensors.items() if not tensor.any()]
    assert sorted(zero) == ([] if init is False else [n for n in sorted(tensors) if n.endswith(("Xd", "_X"))])
    if init is False:
        assert 0.99 / 8 < tensors["glora_B_Xd"].abs().max() <= 1 / 8


class _Largest(TorchDispatchMode):
    """The numbers in the largest tensor that is made inside, `weight` and views of it aside."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.numel = 0
        self.weight = weight.untyped_storage().data_ptr()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.untyped_storage().data_ptr() != self.weight:
            self.numel = max(self.numel, result.numel())
        return result


def test_a_step_makes_vectors_and_nothing_of_the_weights_size() -> None:
    layer = nn.Linear(40, 60)
    model = inject(nn.Sequential(layer), GLoRAConfig(r=2, config_D_E="vector", target_modules=["0"]))
    with _Largest(layer.weight) as made:
        with torch.autocast("cpu", torch.bfloat16):
            form = adapter_of(model, "0").form(layer.weight, layer.bias)
        assert form.bias is not None
        form.bias.sum().backward()
    assert made.numel == 60 * 2
    assert form.bias.dtype == torch.float32


# The supernet


def supernet(**fields: Any) -> Any:
    config = GLoRAConfig(**{"supernet": True, "ranks": [2, 4], "target_modules": LAYERS, **fields})
    return filled(inject(tiny_models.mlp(), config))


def test_small_supports_are_parts_of_the_large() -> None:
    model = supernet().double()
    adapter, layer, x = adapter_of(model, "up"), model.up, inputs(dtype=torch.float64)
    for supports in list(itertools.product(*adapter.options.values()))[::7]:
        adapter.choose(supports)
        weight, bias = dense(adapter, layer, Supports(*supports))
        torch.testing.assert_close(layer(x), nn.functional.linear(x, weight, bias), rtol=1e-12, atol=1e-12)


def test_options_and_counts_are_those_of_fixed_adapters() -> None:
    adapters = {path: adapter_of(supernet(), path) for path in LAYERS}
    low_rank, plain = ["lora:4", "lora:2"], ["vector", "constant", "none"]
    wide = {"A": low_rank + plain, "B": low_rank + plain}
    assert adapters["up"].options == {**wide, "C": [*low_rank, "vector", "none"], "D": plain, "E": plain}
    assert adapters["down"].options == {**wide, "C": ["none"], "D": ["none"], "E": ["none"]}
    for supports in COMBINATIONS[::7]:
        fixed = inject(tiny_models.mlp(), GLoRAConfig(target_modules=["up"], support_pattern={"up": list(supports)}))
        assert adapters["up"].parameters_of(supports) == sum(p.numel() for p in our_parameters(fixed).values())


def test_in_training_every_layer_draws_for_itself_and_evenly() -> None:
    model = supernet(target_modules=["up"]).train()
    adapter = adapter_of(model, "up")
    torch.manual_seed(3)
    drawn = [adapter._current() for _ in range(2000)]
    torch.manual_seed(3)
    assert [adapter._current() for _ in range(5)] == drawn[:5]
    for index, options in enumerate(adapter.options.values()):
        counts = Counter(supports[index] for supports in drawn)
        assert set(counts) == set(options)
        expected = 2000 / len(options)
        assert all(abs(count - expected) < 5 * expected**0.5 for count in counts.values())
    pairs = Counter((supports.A, supports.B) for supports in drawn)
    assert len(pairs) == 25  # A and B apart

    both = supernet().train()
    drawn_together = {(adapter_of(both, "up")._current().A, adapter_of(both, "down")._current().A) for _ in range(400)}
    assert len(drawn_together) == 25


def test_in_eval_the_largest_runs_and_a_choice_runs_in_both() -> None:
    model, x = supernet(), inputs()
    adapter = adapter_of(model, "up")
    assert adapter.chosen == ("lora:4", "lora:4", "lora:4", "vector", "vector")
    largest = model(x)
    assert torch.equal(model(x), largest)
    model.train()
    assert len({model(x).sum().item() for _ in range(9)}) > 5
    choices = {
        "up": ["vector", "lora:2", "none", "constant", "none"],
        "down": ["none", "constant", "none", "none", "none"],
    }
    for path, supports in choices.items():
        adapter_of(model, path).choose(supports)
    in_training = model(x)
    assert torch.equal(model(x), in_training)
    assert torch.equal(model.eval()(x), in_training)
    assert not close(in_training, largest, 1e-3)
    for path in choices:
        adapter_of(model, path).choose(None)
    assert torch.equal(model(x), largest)


@pytest.mark.parametrize(
    ("supports", "message"),
    [
        (["lora:3", "none", "none", "none", "none"], "A must be lora:4 or lora:2 or vector or constant or none"),
        (["none", "none", "vector", "none", "none"], "C must be none in this layer, got 'vector'"),
        (["none"] * 4, "must hold five supports"),
        (["none", "none", "constant", "none", "none"], "C must be lora:<rank>, vector, none, got 'constant'"),
    ],
)
def test_a_choice_that_the_layer_does_not_have_is_refused(supports: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        adapter_of(supernet(), "down").choose(supports)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_recomputed_forward_draws_the_same(use_reentrant: bool) -> None:
    gradients = []
    for recompute in (False, True):
        model, x = supernet().train(), inputs().requires_grad_()
        torch.manual_seed(11)
        total = torch.zeros(())
        for _ in range(6):
            y = checkpoint(model, x, use_reentrant=use_reentrant) if recompute else model(x)
            total = total + y.square().sum()
        total.backward()
        gradients.append([x.grad, *(p.grad for p in our_parameters(model).values())])
    for plain, recomputed in zip(*gradients, strict=True):
        assert (plain is None) == (recomputed is None)
        assert plain is None or close(recomputed, plain)


def test_layers_that_run_as_a_group_heed_a_new_choice() -> None:
    model = tiny_models.llama()
    inject(model, GLoRAConfig(supernet=True, ranks=[2], target_modules=["q_proj", "k_proj"]))
    filled(model)
    attention, x = model.model.layers[0].self_attn, torch.randn(1, 3, 32)
    attention.q_proj(x)  # k_proj's output is made with it
    adapter = attention.k_proj.adapters["default"]
    adapter.choose(["none"] * 5)
    with torch.no_grad():
        expected = nn.functional.linear(x, attention.k_proj.weight)
    torch.testing.assert_close(attention.k_proj(x), expected)


def test_a_supernet_is_saved_whole_in_a_type_of_its_own(tmp_path: Path) -> None:
    model, x = supernet(), inputs()
    fastadapt.save_adapter(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["peft_type"], config["ranks"], config["supernet"]) == ("GLORA_MIXED", [4, 2], True)
    loaded = fastadapt.load_adapter(tiny_models.mlp(), tmp_path)
    for some in (model, loaded):
        for path in LAYERS:
            adapter_of(some, path).choose(["lora:2", "vector", "none", "none", "none"])
    assert close(loaded(x), model(x))


# Any supports as the uniform GLoRA that PEFT has


@pytest.mark.parametrize("supports", COMBINATIONS[::23], ids="-".join)
def test_any_supports_go_to_peft_exactly(supports: Supports, tmp_path: Path) -> None:
    fields: dict[str, Any] = {
        "support_pattern": {"up": list(supports), "down": list(supports[::-1][3:]) + 3 * ["none"]}
    }
    ours = filled(inject(tiny_models.mlp(), GLoRAConfig(target_modules=LAYERS, **fields)))
    fastadapt.export_glora(ours, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "GLORA"
    assert close(peft_files(tmp_path, tiny_models.mlp())(inputs()), ours(inputs()))
    assert close(fastadapt.load_adapter(tiny_models.mlp(), tmp_path)(inputs()), ours(inputs()))


def test_a_subnet_goes_to_peft_as_it_was_chosen(tmp_path: Path) -> None:
    model = supernet().train()
    adapter_of(model, "up").choose(["vector", "lora:2", "vector", "constant", "vector"])
    adapter_of(model, "down").choose(["lora:2", "constant", "none", "none", "none"])
    fastadapt.export_glora(model, tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert tensors["base_model.model.up.glora_A.Xd"].shape == (28, 2)  # the largest rank in use
    expected = model(inputs())
    assert close(peft_files(tmp_path, tiny_models.mlp())(inputs()), expected)
    assert "default" in model.up.adapters  # and is there still
    assert torch.equal(model(inputs()), expected)


def test_what_no_uniform_glora_says_is_refused(tmp_path: Path) -> None:
    creates = filled(inject(tiny_models.mlp(), GLoRAConfig(target_modules=LAYERS, create_bias=True)))
    with pytest.raises(ValueError, match="down has no bias and its adapter creates one"):
        fastadapt.export_glora(creates, tmp_path)
    lora = inject(tiny_models.mlp(), LoRAConfig(target_modules=LAYERS))
    with pytest.raises(ValueError, match="up has no GLoRA adapter but a LoRAAdapter"):
        fastadapt.export_glora(lora, tmp_path)
    assert not list(tmp_path.iterdir())


def test_layers_that_are_not_linear_are_refused() -> None:
    with pytest.raises(ValueError, match="embed: Embedding cannot take an adapter of GLoRAConfig: only Linear can"):
        inject(tiny_models.mixed(), GLoRAConfig(target_modules=["embed"]))


def test_merging_a_supernet_in_training_writes_what_eval_computes() -> None:
    config = GLoRAConfig(supernet=True, ranks=[1, 2], target_modules=["0"])
    model = inject(torch.nn.Sequential(torch.nn.Linear(6, 5)), config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    x = torch.randn(3, 6)
    y = model.eval()(x)
    merge(model.train())
    torch.testing.assert_close(model(x), y)
