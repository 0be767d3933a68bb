"""EVA here and in PEFT: the same ranks, scales and subspaces; the model otherwise as it was, whatever goes wrong."""

from __future__ import annotations

import sys
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from peft import EvaConfig, LoraConfig, PeftModel, get_eva_state_dict, get_peft_model, initialize_lora_eva_weights
from tiny_models import VOCAB, output, randomise, tokens
from torch import Tensor, nn

import fastadapt
from fastadapt import DoRAConfig, EVAConfig, LoRAConfig, VeRAConfig
from fastadapt.model.adapted import adapter_configs, adapter_layers
from fastadapt.training.eva import eva_factors, initialize_eva

PREFIX = "base_model.model."
QKV = ["q_proj", "k_proj", "v_proj"]


def draw_tokens(seed: int, size: int = 6, length: int = 12) -> Tensor:
    return torch.randint(1, VOCAB, (size, length), generator=torch.Generator().manual_seed(seed))


def make_batches(count: int = 4, **shape: int) -> list[dict[str, Tensor]]:
    """Batches with padding, and labels that leave out a prompt."""
    batches = []
    for seed in range(count):
        ids = draw_tokens(seed, **shape)
        mask = torch.ones_like(ids)
        mask[:2, -3:] = 0
        labels = ids.clone()
        labels[:, :4] = -100
        batches.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return batches


BATCHES = make_batches()


def llama() -> Any:
    """A Llama whose layers see inputs of falling spectra, each of its own: components that stand apart."""
    model = tiny_models.llama()
    with torch.no_grad():
        for index, layer in enumerate(model.model.layers):
            for power, norm in ((0.3, layer.input_layernorm), (0.7, layer.post_attention_layernorm)):
                norm.weight.mul_((1 + torch.arange(32)) ** -(power + 0.3 * index))
    return model


@contextmanager
def quiet_peft() -> Iterator[None]:
    """PEFT advises another way to load, and calls what transformers deprecates."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "lora with eva initialization used with low_cpu_mem_usage=False", UserWarning)
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        yield


def in_peft(model: Any, eva: dict[str, Any], **fields: Any) -> Any:
    with quiet_peft():
        return get_peft_model(model, LoraConfig(init_lora_weights="eva", eva_config=EvaConfig(**eva), **fields)).eval()


def in_ours(model: Any, eva: dict[str, Any] | None = None, **fields: Any) -> Any:
    fields.pop("fan_in_fan_out", None)
    config = LoRAConfig(init_lora_weights="eva", eva_config=EVAConfig(**(eva or {})), **fields)
    return fastadapt.inject(model, config)


def peft_layers(model: Any) -> dict[str, Any]:
    return {
        name.removeprefix(PREFIX): module
        for name, module in model.named_modules()
        if hasattr(module, "lora_A") and hasattr(module, "base_layer")
    }


def adapter(model: nn.Module, path: str, name: str = "default") -> Any:
    return adapter_layers(model)[path].adapters[name]


CASES: dict[str, tuple[Callable[[], Any], dict[str, Any], dict[str, Any]]] = {
    "rho 1": (llama, {"rho": 1.0}, {"r": 4, "lora_alpha": 6, "target_modules": "all-linear"}),
    "rho 2": (llama, {"rho": 2.0}, {"r": 4, "lora_alpha": 6, "target_modules": "all-linear"}),
    "rho 3, no labels": (
        llama,
        {"rho": 3.0, "use_label_mask": False},
        {"r": 2, "target_modules": "all-linear", "use_rslora": True},
    ),
    "another label": (llama, {"label_mask_value": 5}, {"r": 3, "target_modules": [*QKV, "down_proj"]}),
    "whiten": (llama, {"whiten": True}, {"r": 4, "target_modules": ["o_proj", "q_proj", "down_proj"]}),
    "alpha as it is": (
        llama,
        {"adjust_scaling_factors": False},
        {"r": 4, "lora_alpha": 6, "target_modules": "all-linear"},
    ),
    "patterns": (
        llama,
        {"rho": 1.5},
        {
            "r": 4,
            "lora_alpha": 6,
            "target_modules": [*QKV, "up_proj", "down_proj"],
            "rank_pattern": {r".*\.1\..*q_proj": 2, "up_proj": 7, "v_proj": 6},
            "alpha_pattern": {"model.layers.0.mlp.up_proj": 11, "q_proj": 2},
        },
    ),
    "dora": (llama, {"rho": 2.0}, {"r": 4, "target_modules": "all-linear", "use_dora": True}),
    "gpt2": (
        tiny_models.gpt2,
        {"rho": 2.0},
        {"r": 3, "target_modules": ["c_attn", "c_fc", "c_proj"], "fan_in_fan_out": True},
    ),
    "some layers": (
        llama,
        {"rho": 2.0},
        {"r": 3, "target_modules": [*QKV, "o_proj", "up_proj", "down_proj"], "layers_to_transform": [1]},
    ),
}
each_case = pytest.mark.parametrize("case", [pytest.param(case, id=name) for name, case in CASES.items()])

Case = tuple[Callable[[], Any], dict[str, Any], dict[str, Any]]


def both(case: Case) -> tuple[Any, Any]:
    """The same adapter of the same model, started by both."""
    model, eva, fields = case
    ours, peft = in_ours(model(), eva, **fields), in_peft(model(), eva, **fields)
    initialize_eva(ours, BATCHES, progress=False)
    with quiet_peft():
        initialize_lora_eva_weights(peft, BATCHES, show_progress_bar=False)
    return ours, peft


def same_rows(ours: Tensor, theirs: Tensor) -> bool:
    """The same directions, row by row, up to their sign and length."""
    cosines = torch.nn.functional.cosine_similarity(ours.double(), theirs.double())
    return bool((cosines.abs() > 1 - 1e-6).all())


@each_case
def test_ranks_scales_and_subspaces_are_pefts(case: Case) -> None:
    ours, peft = both(case)
    config, theirs = adapter_configs(ours)["default"], peft.peft_config["default"]
    assert isinstance(config, LoRAConfig)
    assert config.rank_pattern == theirs.rank_pattern
    assert config.alpha_pattern == pytest.approx(theirs.alpha_pattern)
    layers = peft_layers(peft)
    assert set(config.target_modules or ()) == adapter_layers(ours).keys() == layers.keys()
    for path, layer in layers.items():
        mine = adapter(ours, path)
        assert mine.lora_A.shape == layer.lora_A["default"].weight.shape, path
        assert mine.scaling == pytest.approx(layer.scaling["default"]), path
        assert not mine.lora_B.any()
        assert same_rows(mine.lora_A, layer.lora_A["default"].weight), path
        if config.use_dora:
            assert torch.allclose(mine.lora_magnitude_vector, layer.lora_magnitude_vector["default"].weight)
    if case[1].get("rho", 2.0) > 1:
        assert len({len(adapter(ours, path).lora_A) for path in layers}) > 1, "this case deals out nothing"


@pytest.mark.parametrize("name", ["rho 2", "patterns", "dora", "gpt2", "some layers"])
def test_started_here_and_trained_peft_loads_it_and_back(name: str, tmp_path: Path) -> None:
    model, eva, fields = CASES[name]
    ours = in_ours(model(), eva, **fields)
    initialize_eva(ours, BATCHES, progress=False)
    assert torch.allclose(output(ours, tokens()), output(model(), tokens()), atol=1e-5)
    randomise(p for p in ours.parameters() if p.requires_grad)
    expected = output(ours, tokens())
    fastadapt.save_adapter(ours, tmp_path / "ours")
    again = fastadapt.load_adapter(model(), tmp_path / "ours", trainable=True)
    assert torch.equal(output(again, tokens()), expected)
    assert adapter_configs(again)["default"] == adapter_configs(ours)["default"]
    with quiet_peft():
        peft = PeftModel.from_pretrained(model(), tmp_path / "ours").eval()
        assert peft_layers(peft).keys() == adapter_layers(ours).keys()
        assert torch.allclose(output(peft, tokens()), expected, rtol=1e-4, atol=1e-4)
        peft.save_pretrained(tmp_path / "peft")
    back = fastadapt.load_adapter(model(), tmp_path / "peft")
    assert torch.allclose(output(back, tokens()), expected, rtol=1e-4, atol=1e-4)


def test_what_peft_starts_loads_here(tmp_path: Path) -> None:
    _, peft = both(CASES["rho 2"])
    randomise([p for p in peft.parameters() if p.requires_grad])
    with quiet_peft():
        peft.save_pretrained(tmp_path)
    ours = fastadapt.load_adapter(llama(), tmp_path)
    assert torch.allclose(output(ours, tokens()), output(peft, tokens()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["rho 2", "dora"])
def test_factors_of_either_library_start_the_other(name: str) -> None:
    model, eva, fields = CASES[name]
    ours, peft = in_ours(model(), eva, **fields), in_peft(model(), eva, **fields)
    mine = eva_factors(ours, BATCHES, progress=False)
    with quiet_peft():
        theirs = get_eva_state_dict(peft, BATCHES, show_progress_bar=False)
        initialize_lora_eva_weights(peft, eva_state_dict={PREFIX + path: f.clone() for path, f in mine.items()})
    assert theirs.keys() == {PREFIX + path for path in mine}
    for path, layer in peft_layers(peft).items():
        assert torch.equal(layer.lora_A["default"].weight, mine[path])
    initialize_eva(ours, factors=theirs)
    for path in adapter_layers(ours):
        assert torch.equal(adapter(ours, path).lora_A, theirs[PREFIX + path].float())
    plain = in_ours(model(), eva, **fields)
    initialize_eva(plain, factors=mine)
    for path in adapter_layers(plain):
        assert torch.equal(adapter(plain, path).lora_A, mine[path])


def test_whitened_rows_are_divided_by_the_root_of_their_singular_value() -> None:
    """PEFT divides in place, so its layers that are fed alike divide one tensor again and again: o_proj is alone."""
    fields = {"r": 4, "target_modules": [*QKV, "o_proj"]}
    plain, white = (
        eva_factors(in_ours(llama(), {"whiten": on}, **fields), BATCHES, progress=False) for on in (False, True)
    )
    with quiet_peft():
        peft = get_eva_state_dict(in_peft(llama(), {"whiten": True}, **fields), BATCHES, show_progress_bar=False)
    for path, rows in white.items():
        torch.testing.assert_close(torch.nn.functional.normalize(rows, dim=1), plain[path], rtol=1e-4, atol=1e-5)
        if path.endswith("o_proj"):
            torch.testing.assert_close(rows, peft[PREFIX + path].float(), rtol=1e-3, atol=1e-4)
    q, k = (white[f"model.layers.0.self_attn.{name}"] for name in ("q_proj", "k_proj"))
    assert len(k) > 0
    assert torch.equal(q[: len(k)], k)


def test_rows_of_a_are_orthonormal_and_layers_fed_alike_share_them() -> None:
    factors = eva_factors(in_ours(llama(), r=4, target_modules="all-linear"), BATCHES, progress=False)
    for path, rows in factors.items():
        torch.testing.assert_close(rows @ rows.T, torch.eye(len(rows)), rtol=0, atol=1e-5)
        names = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}
        parent, _, name = path.rpartition(".")
        if name in names:
            leader = factors[f"{parent}.{names[name]}"]
            assert len(rows) <= len(leader)
            assert torch.equal(rows, leader[: len(rows)])
    assert len({rows.untyped_storage().data_ptr() for rows in factors.values() if len(rows)}) == sum(
        bool(len(rows)) for rows in factors.values()
    )
    assert sum(map(len, factors.values())) == 4 * 14
    assert max(map(len, factors.values())) <= 8


def test_layers_fed_alike_have_one_decomposition(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastadapt.training.incremental_pca import IncrementalPCA

    made = []
    build = IncrementalPCA.__init__
    monkeypatch.setattr(IncrementalPCA, "__init__", lambda self, n: (made.append(n), build(self, n))[1])
    eva_factors(in_ours(llama(), r=4, target_modules="all-linear"), BATCHES, progress=False)
    assert len(made) == 8  # qkv, o, gate and up, down, twice
    made.clear()
    fields = {"target_modules": QKV, "rank_pattern": {"v_proj": 6, "k_proj": 1}}
    eva_factors(in_ours(llama(), {"rho": 1.5}, r=2, **fields), BATCHES, progress=False)
    assert made == [9, 9]  # what the largest of them may need


def test_a_rank_of_zero_takes_the_adapter_out(tmp_path: Path) -> None:
    model = in_ours(llama(), {"rho": 4.0}, r=1, target_modules="all-linear")
    paths = list(adapter_layers(model))
    initialize_eva(model, BATCHES, progress=False)
    peft = in_peft(llama(), {"rho": 4.0}, r=1, target_modules="all-linear")
    with quiet_peft():
        initialize_lora_eva_weights(peft, BATCHES, show_progress_bar=False)
    left = adapter_layers(model)
    assert left.keys() == peft_layers(peft).keys()
    gone = [path for path in paths if path not in left]
    assert gone, "no layer came out of this"
    assert all(type(model.get_submodule(path)) is nn.Linear for path in gone)
    assert not any(p.requires_grad for path in gone for p in model.get_submodule(path).parameters())
    randomise(p for p in model.parameters() if p.requires_grad)
    fastadapt.save_adapter(model, tmp_path)
    again = fastadapt.load_adapter(llama(), tmp_path)
    assert adapter_layers(again).keys() == left.keys()
    assert torch.allclose(output(again, tokens()), output(model, tokens()), atol=1e-5)
    fastadapt.unload(model)
    assert torch.equal(output(model, tokens()), output(llama(), tokens()))


def test_groups_follow_the_layers_that_remain() -> None:
    model = in_ours(llama(), r=4, target_modules="all-linear")
    factors = eva_factors(model, BATCHES, progress=False)
    first, second = (f"model.layers.{index}.self_attn" for index in (0, 1))
    for path in (f"{first}.k_proj", f"{second}.k_proj", f"{second}.v_proj"):
        factors[path] = factors[path][:0]
    initialize_eva(model, factors=factors)
    layers = adapter_layers(model)
    q, v = layers[f"{first}.q_proj"], layers[f"{first}.v_proj"]
    assert q.group is v.group
    assert q.group.layers == [q, v]
    assert layers[f"{second}.q_proj"].group is None
    randomise(p for p in model.parameters() if p.requires_grad)
    grouped = output(model, tokens())
    for layer in layers.values():
        layer.group = None
    torch.testing.assert_close(output(model, tokens()), grouped)


def test_another_adapter_of_the_layer_stays(tmp_path: Path) -> None:
    model = fastadapt.inject(llama(), LoRAConfig(r=3, target_modules=QKV), "other")
    randomise(p for p in model.parameters() if p.requires_grad)
    expected = output(model, tokens())
    fastadapt.inject(model, LoRAConfig(r=4, target_modules=QKV, init_lora_weights="eva"), "mine")
    fastadapt.set_adapter(model, "other")
    factors = eva_factors(model, BATCHES, "mine", progress=False)
    path = "model.layers.0.self_attn.v_proj"
    factors[path] = factors[path][:0]
    initialize_eva(model, None, "mine", factors=factors)
    assert set(adapter_layers(model)[path].adapters) == {"other"}
    assert torch.equal(output(model, tokens()), expected)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        name for name, p in model.named_parameters() if ".other." in name
    }
    fastadapt.set_adapter(model, "mine")
    assert torch.allclose(output(model, tokens()), output(llama(), tokens()), atol=1e-5)
    bare = eva_factors(in_ours(llama(), r=4, target_modules=QKV), BATCHES, progress=False)
    for name, rows in factors.items():
        torch.testing.assert_close(rows, bare[name][: len(rows)])  # the other adapter was off


@pytest.mark.parametrize("config", [LoRAConfig, DoRAConfig])
def test_it_trains_from_there(config: Any) -> None:
    model = fastadapt.inject(
        llama(), config(r=4, target_modules="all-linear", init_lora_weights="eva", lora_dropout=0.1)
    ).train()
    initialize_eva(model, BATCHES, progress=False)
    assert all(module.training for module in model.modules())
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer, losses = torch.optim.AdamW(parameters, lr=0.02), []
    for _ in range(8):
        loss = model(**BATCHES[0]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1


def test_a_frozen_a_stays_a_buffer_and_biases_stay_trained() -> None:
    model = in_ours(llama(), r=4, target_modules=QKV, freeze_A=True)
    initialize_eva(model, BATCHES, progress=False)
    one = adapter(model, "model.layers.0.self_attn.q_proj")
    assert "lora_A" in dict(one.named_buffers())
    assert one.lora_B.requires_grad
    torch.testing.assert_close(one.lora_A @ one.lora_A.T, torch.eye(len(one.lora_A)), rtol=0, atol=1e-5)
    model = in_ours(tiny_models.gpt2(), r=2, target_modules=["c_attn"], bias="lora_only", lora_bias=True)
    initialize_eva(model, BATCHES, progress=False)
    assert len(adapter_layers(model)) == 2
    for layer in adapter_layers(model).values():
        names = {name for name, p in layer.adapters["default"].named_parameters() if p.requires_grad}
        assert names == {"lora_A", "lora_B", "lora_B_bias", "bias"}
    assert torch.allclose(output(model, tokens()), output(tiny_models.gpt2(), tokens()), atol=1e-5)


def test_sixteen_bit_models(tmp_path: Path) -> None:
    model = in_ours(llama().bfloat16(), r=4, target_modules="all-linear")
    initialize_eva(model, BATCHES, progress=False)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    exact = eva_factors(in_ours(llama(), r=4, target_modules="all-linear"), BATCHES, progress=False)
    q = "model.layers.0.self_attn.q_proj"
    mine = adapter(model, q).lora_A
    assert (mine[0] * exact[q][0]).sum().abs() > 0.99
    k = adapter_layers(model).get("model.layers.0.self_attn.k_proj")
    assert k is None or torch.equal(k.adapters["default"].lora_A, mine[: len(k.adapters["default"].lora_A)])


# What is left as it was.


def modes(model: nn.Module) -> list[bool]:
    return [module.training for module in model.modules()]


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def test_modes_activity_hooks_and_random_numbers_are_as_before() -> None:
    model = in_ours(llama(), r=4, target_modules=QKV, rank_pattern={"v_proj": 2}).train()
    model.model.layers[1].eval()
    fastadapt.set_adapter(model, None)
    torch.manual_seed(3)
    before, state = modes(model), torch.get_rng_state()
    factors = eva_factors(model, BATCHES, progress=False)
    assert modes(model) == before
    initialize_eva(model, BATCHES, progress=False)
    assert torch.equal(torch.get_rng_state(), state)
    assert hooks(model) == 0
    assert all(layer.active == () for layer in adapter_layers(model).values())
    assert not any(p.requires_grad for p in model.parameters())
    for path, layer in adapter_layers(model).items():
        assert {module.training for module in layer.modules()} == {".layers.0." in path}
        assert torch.equal(layer.adapters["default"].lora_A, factors[path])


@pytest.mark.parametrize("calls", [0, 1, 3])
def test_an_error_in_the_model_leaves_everything_as_it_was(calls: int) -> None:
    model = in_ours(llama(), r=4, target_modules="all-linear").train()
    model.model.norm.eval()
    before, tensors, state = modes(model), dict(model.state_dict()), deepcopy(adapter_configs(model))
    done = []

    def forward(model: nn.Module, batch: dict[str, Any]) -> None:
        done.append(batch)
        assert not any(layer.active for layer in adapter_layers(model).values())
        assert not any(modes(model))
        if len(done) > calls:
            raise RuntimeError("out of order")
        model(**batch)

    with pytest.raises(RuntimeError, match="out of order"):
        initialize_eva(model, BATCHES, forward=forward, progress=False)
    assert hooks(model) == 0
    assert modes(model) == before
    assert adapter_configs(model) == state
    assert all(layer.active == ("default",) for layer in adapter_layers(model).values())
    assert all(torch.equal(value, tensors[name]) for name, value in model.state_dict().items())


class Stream:
    """Batches that are made when they are asked for; counts how many are alive at once."""

    def __init__(self, count: int) -> None:
        self.count, self.made, self.most = count, 0, 0
        self.alive: list[weakref.ref[Tensor]] = []

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for seed in range(self.count):
            self.most = max(self.most, sum(ref() is not None for ref in self.alive))
            ids = draw_tokens(seed)
            self.alive.append(weakref.ref(ids))
            self.made += 1
            yield {"input_ids": ids}


def test_neither_batches_nor_activations_are_kept() -> None:
    model, stream = in_ours(llama(), {"tau": 0.999}, r=4, target_modules="all-linear"), Stream(5)
    inputs: list[weakref.ref[Tensor]] = []
    before_each: list[int] = []

    def forward(model: nn.Module, batch: dict[str, Any]) -> None:
        before_each.append(sum(ref() is not None for ref in inputs))
        handles = [
            layer.base_layer.register_forward_pre_hook(lambda _, args: inputs.append(weakref.ref(args[0])))
            for layer in adapter_layers(model).values()
        ]
        model(**batch)
        for handle in handles:
            handle.remove()

    initialize_eva(model, stream, forward=forward, progress=False)
    assert stream.made > 2 * stream.count, "this must take several passes"
    assert stream.most <= 2  # the stream's own, and the one that has just been used
    assert len(inputs) > 14 * stream.count
    assert max(before_each) == 0
    assert not any(ref() is not None for ref in inputs)


def test_converged_layers_are_not_observed_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastadapt.training.incremental_pca import IncrementalPCA

    model, stream = in_ours(llama(), r=4, target_modules="all-linear"), Stream(4)
    fits = []
    fit = IncrementalPCA.partial_fit
    monkeypatch.setattr(IncrementalPCA, "partial_fit", lambda self, x: (fits.append(id(self)), fit(self, x))[1])
    initialize_eva(model, stream, progress=False)
    counts = [fits.count(one) for one in set(fits)]
    assert len(counts) == 8
    assert min(counts) < max(counts) == stream.made


# Batches.


def test_a_data_loader_a_long_iterator_and_a_forward_of_ones_own_serve_as_well() -> None:
    from torch.utils.data import DataLoader

    rows = [{name: tensor[row] for name, tensor in batch.items()} for batch in BATCHES for row in range(6)]
    model = in_ours(llama(), r=4, target_modules=QKV)
    expected = eva_factors(model, BATCHES, progress=False)

    def forward(model: Any, batch: dict[str, Any]) -> None:
        model.model(batch["input_ids"], batch["attention_mask"])

    for found in (
        eva_factors(model, DataLoader(rows, batch_size=6), progress=False),  # type: ignore[arg-type]
        eva_factors(model, iter(BATCHES * 30), progress=False),
        eva_factors(model, BATCHES, forward=forward, progress=False),
    ):
        assert found.keys() == expected.keys()
        for path in expected:
            torch.testing.assert_close(found[path], expected[path])


def test_masked_tokens_do_not_count() -> None:
    model = in_ours(llama(), r=4, target_modules=["q_proj"])
    expected = eva_factors(model, BATCHES, progress=False)
    changed = []
    for batch in BATCHES:
        mask = batch["attention_mask"].bool() & (batch["labels"] != -100)
        causal = batch["input_ids"].clone()
        causal[:2, -3:] = 7  # padding is last, so that no counted token attends to it
        changed.append({**batch, "input_ids": causal})
        assert not mask[:2, -3:].any()
    found = eva_factors(model, changed, progress=False)
    assert all(torch.equal(found[path], rows) for path, rows in expected.items())
    plain = [{"input_ids": batch["input_ids"]} for batch in BATCHES]
    ones = [{**batch, "attention_mask": torch.ones_like(batch["input_ids"])} for batch in plain]
    without, with_ones = (eva_factors(model, each, progress=False) for each in (plain, ones))
    for path, rows in without.items():
        torch.testing.assert_close(with_ones[path], rows)
        assert not torch.allclose(expected[path][: len(rows)], rows[: len(expected[path])], atol=1e-3)


def test_labels_of_whole_sequences_mask_nothing() -> None:
    model = in_ours(llama(), r=2, target_modules=["q_proj"])
    plain = [{"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]} for batch in BATCHES]
    labelled = [{**batch, "labels": torch.full((6,), -100)} for batch in plain]

    def forward(model: nn.Module, batch: dict[str, Any]) -> None:
        model(batch["input_ids"], batch["attention_mask"])

    found = eva_factors(model, labelled, forward=forward, progress=False)
    assert all(torch.equal(found[path], rows) for path, rows in eva_factors(model, plain, progress=False).items())


def test_batches_with_too_few_tokens_are_skipped() -> None:
    short = [{"input_ids": draw_tokens(seed, 1, 3)} for seed in (7, 8, 9)]
    mixed = [short[0], BATCHES[0], short[1], *BATCHES[1:], short[2]]
    model = in_ours(llama(), {"rho": 1.0}, r=4, target_modules=QKV)
    found, expected = (eva_factors(model, each, progress=False) for each in (mixed, BATCHES))
    peft = in_peft(llama(), {"rho": 1.0}, r=4, target_modules=QKV)
    with quiet_peft():
        theirs = get_eva_state_dict(peft, mixed, show_progress_bar=False)
    for path, rows in found.items():
        torch.testing.assert_close(rows, expected[path], rtol=1e-3, atol=1e-4)
        assert same_rows(rows, theirs[PREFIX + path])


def test_a_first_batch_without_tokens_that_count_makes_no_layers_alike() -> None:
    """Nothing is equal to nothing: PEFT takes all layers for fed alike then."""
    empty = {**BATCHES[0], "attention_mask": torch.zeros_like(BATCHES[0]["attention_mask"])}
    model = in_ours(llama(), r=4, target_modules=QKV)
    found, expected = (eva_factors(model, each, progress=False) for each in ([empty, *BATCHES], BATCHES))
    assert all(torch.equal(found[path], rows) for path, rows in expected.items())


def test_the_rank_of_a_layer_is_at_most_its_width() -> None:
    model = in_ours(tiny_models.mlp(), {"rho": 10.0}, r=6, target_modules=["up", "down"])
    initialize_eva(model, [{"x": torch.randn(64, 20)}], progress=False)
    config = adapter_configs(model)["default"]
    assert isinstance(config, LoRAConfig)
    assert sum(config.rank(path) for path in adapter_layers(model)) == 12
    assert all(config.rank(path) <= 28 for path in adapter_layers(model))


def test_inputs_of_low_rank_converge_too() -> None:
    x = torch.randn(40, 2) @ torch.randn(2, 20)
    model = in_ours(tiny_models.mlp(), {"rho": 1.0, "whiten": True}, r=6, target_modules=["up"])
    initialize_eva(model, [{"x": x}], progress=False)
    A = adapter(model, "up").lora_A
    assert A.isfinite().all()
    assert A.norm(dim=1)[2:].allclose(torch.ones(4))  # no scale to take out


# A bar.


def test_the_bar_is_for_those_who_have_rich(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = in_ours(llama(), r=2, target_modules=["q_proj"])
    monkeypatch.setattr("fastadapt.progress.is_live", lambda console: True)
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes the captured stderr for a terminal
    eva_factors(model, BATCHES)
    shown = capsys.readouterr()
    assert "layers that have converged" in shown.err
    assert "2/2" in shown.err
    assert shown.out == ""
    eva_factors(model, BATCHES, progress=False)
    for name in [name for name in sys.modules if name.partition(".")[0] == "rich"]:
        monkeypatch.setitem(sys.modules, name, None)
    eva_factors(model, BATCHES)
    assert capsys.readouterr() == ("", "")


# Paths that end in other paths.


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(10, 12)
        self.block = nn.ModuleDict({"fc": nn.Linear(12, 9)})

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.block["fc"](torch.tanh(self.fc(x)))
        return y


@pytest.mark.parametrize("ranks", [(3, 5), (5, 3), (3, 4), (4, 3), (3, 0), (0, 3)], ids=str)
def test_patterns_and_targets_tell_apart_paths_that_end_alike(ranks: tuple[int, int], tmp_path: Path) -> None:
    model = in_ours(Nested(), r=4, target_modules=["fc"])
    first, second = (torch.linalg.qr(torch.randn(width, r))[0].T for width, r in zip((10, 12), ranks, strict=True))
    initialize_eva(model, factors={"fc": first, "block.fc": second})
    kept = {path: r for path, r in zip(("fc", "block.fc"), ranks, strict=True) if r}
    assert adapter_layers(model).keys() == kept.keys()
    config = adapter_configs(model)["default"]
    assert isinstance(config, LoRAConfig)
    for path, r in kept.items():
        assert config.rank(path) == r
        assert adapter(model, path).scaling == pytest.approx(2)
    randomise(p for p in model.parameters() if p.requires_grad)
    x = torch.randn(4, 10)
    fastadapt.save_adapter(model, tmp_path)
    assert torch.equal(fastadapt.load_adapter(Nested(), tmp_path, trainable=True)(x), model(x))
    with quiet_peft():
        peft = PeftModel.from_pretrained(Nested(), tmp_path).eval()
    torch.testing.assert_close(peft(x), model(x))


# Layers that EVA does not start.


def test_an_embedding_and_a_convolution_keep_their_start() -> None:
    model = in_ours(tiny_models.mixed(), r=3, target_modules=["embed", "conv", "fc1", "fc2"], rank_pattern={"conv": 2})
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    batch = {"tokens": torch.randint(1, VOCAB, (30, 4))}
    with pytest.warns(UserWarning, match="embed, conv keep the random start that they had"):
        initialize_eva(model, [batch], progress=False)
    for name, tensor in model.state_dict().items():
        if "embed" in name or "conv" in name:
            assert torch.equal(tensor, before[name]), name
    config = adapter_configs(model)["default"]
    assert isinstance(config, LoRAConfig)
    assert config.rank("conv") == 2
    assert config.rank("fc1") + config.rank("fc2") == 6
    assert {"embed", "conv"} < set(config.target_modules or ())


# Refusals.


def one_shot() -> Any:
    return iter(BATCHES[:1])


def unlabelled() -> list[dict[str, Tensor]]:
    return [{**batch, "labels": torch.full_like(batch["labels"], -100)} for batch in BATCHES]


def infinite(model: nn.Module, batch: dict[str, Any]) -> None:
    ids = batch["input_ids"]
    with torch.no_grad():
        model(inputs_embeds=torch.full((*ids.shape, 32), float("inf")))  # type: ignore[operator]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, ValueError, "takes either batches or factors, got neither"),
        ({"batches": BATCHES, "factors": {}}, ValueError, "takes either batches or factors, got both"),
        ({"batches": []}, ValueError, "batches is empty: give at least one batch"),
        ({"batches": iter([])}, ValueError, "batches is empty"),
        ({"batches": one_shot}, ValueError, r"ended after 1 with 0 of 6 layers converged.*give a list or a DataLoader"),
        ({"batches": BATCHES[0]}, TypeError, "batches must be a list.*got dict: put a single batch into a list"),
        ({"batches": 3}, TypeError, "batches must be a list, a DataLoader.*got int"),
        ({"batches": [draw_tokens(0)]}, TypeError, "must hold mappings of the model's keyword arguments.*got Tensor"),
        (
            {"batches": make_batches(3, size=1, length=8)},
            ValueError,
            r"0.self_attn.q_proj \(and 1 more layers\) needs batches of at least 8 tokens that count.*largest had 1",
        ),
        ({"batches": unlabelled}, ValueError, "no batch has a token that counts.*use_label_mask to False"),
        (
            {"batches": BATCHES, "forward": lambda model, batch: model(batch["input_ids"][:, :5])},
            ValueError,
            r"q_proj: the layer's input must have shape \[6, 12, in\].*got \(6, 5, 32\).*exclude_modules",
        ),
        ({"batches": BATCHES, "forward": lambda model, batch: None}, ValueError, r"\(and 5 more layers\) was not run"),
        ({"batches": BATCHES, "forward": infinite}, ValueError, "q_proj: x has NaN or infinite values"),
        ({"batches": BATCHES, "adapter_name": "mine"}, ValueError, "adapter 'mine' is not in the model"),
    ],
)
def test_what_cannot_start_it_is_refused_with_the_cure(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    model = in_ours(llama(), r=4, target_modules=QKV)
    before = dict(model.named_parameters())
    batches = arguments.get("batches")
    with pytest.raises(error, match=message):
        initialize_eva(model, **{**arguments, "batches": batches() if callable(batches) else batches}, progress=False)
    assert hooks(model) == 0
    assert all(value is before[name] for name, value in model.named_parameters())


def replaced(**changes: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda factors: {**factors, **{name.replace("/", "."): value for name, value in changes.items()}}


Q = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda f: {path: rows for path, rows in f.items() if path != Q},
            f"has none for {Q}: find them with eva_factors",
        ),
        (lambda f: {path: rows for path, rows in f.items() if "q_proj" not in path}, r"has none for .*\(and 1 more\)"),
        (lambda f: {**f, "lm_head": torch.ones(2, 32)}, "has one for lm_head"),
        (lambda f: {**f, PREFIX + Q: f[Q]}, "names a layer twice"),
        (lambda f: {**f, Q: torch.ones(3, 31)}, r"q_proj'\] must have shape \[r, 32\], got \(3, 31\)"),
        (lambda f: {**f, Q: torch.ones(32)}, r"must have shape \[r, 32\], got \(32,\)"),
        (lambda f: {**f, Q: torch.full((2, 32), torch.nan)}, "has NaN or infinite values"),
        (lambda f: {**f, Q: torch.ones(2, 32, dtype=torch.int64)}, "floating-point numbers, got torch.int64"),
        (lambda f: {**f, Q: [1.0]}, "must be a tensor of floating-point numbers, got list"),
        (lambda f: {path: rows[:0] for path, rows in f.items()}, "every layer rank 0"),
    ],
)
def test_factors_that_do_not_fit_leave_the_model_as_it_was(change: Any, message: str) -> None:
    model = in_ours(llama(), r=4, target_modules=QKV)
    factors = {path: torch.linalg.qr(torch.randn(32, 5))[0].T for path in adapter_layers(model)}
    modules, config = dict(model.named_modules()), deepcopy(adapter_configs(model))
    with pytest.raises(ValueError, match=message):
        initialize_eva(model, factors=change(factors))
    assert dict(model.named_modules()) == modules
    assert adapter_configs(model) == config
    initialize_eva(model, factors=factors)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LoRAConfig(r=2, target_modules=QKV), 'must have init_lora_weights="eva", got init_lora_weights=True'),
        (VeRAConfig(r=2, target_modules=QKV), 'must have init_lora_weights="eva", got VERA'),
        (LoRAConfig(r=2, target_modules=["embed_tokens"], init_lora_weights="eva"), "has no linear layer"),
    ],
)
def test_adapters_that_are_not_evas_are_refused(config: Any, message: str) -> None:
    model = fastadapt.inject(llama(), config)
    for call in (eva_factors, initialize_eva):
        with pytest.raises(ValueError, match=message):
            call(model, BATCHES)


def test_a_merged_model_is_refused() -> None:
    model = in_ours(llama(), r=4, target_modules=QKV)
    fastadapt.merge(model)
    with pytest.raises(ValueError, match=r"call unmerge\(model\) before initialize_eva"):
        initialize_eva(model, BATCHES)
