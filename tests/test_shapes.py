"""Adapters for layers known by their shapes: the same forms as for a model, and parts that make up the whole."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_loader import BAD, make
from torch import Tensor, nn

from fastadapt import AdaLoRAConfig, DoRAConfig, HiRAConfig, LoRAConfig, SSFConfig, VeRAConfig, inject, save_adapter
from fastadapt.functional import row_squares, weight_norm, weight_norm_squared
from fastadapt.methods import AdapterConfig
from fastadapt.reference import AdapterForm, adapter_linear_reference
from fastadapt.serving import AdapterError, Limits, PartForm, Shard, read_adapter, read_adapter_by_shapes

NAMES = ["q", "v"]
METHODS: dict[str, AdapterConfig] = {
    "LoRA": LoRAConfig(r=3, target_modules=NAMES),
    "rsLoRA by pattern": LoRAConfig(r=2, use_rslora=True, rank_pattern={"v": 5}, target_modules=NAMES),
    "a bias of B": LoRAConfig(r=3, lora_bias=True, target_modules=NAMES),
    "a bias of its own": LoRAConfig(r=3, bias="lora_only", target_modules=NAMES),
    "DoRA": DoRAConfig(r=3, target_modules=NAMES),
    "VeRA": VeRAConfig(r=6, projection_prng_key=7, target_modules=NAMES),
    "VeRA by its key": VeRAConfig(r=6, save_projection=False, target_modules=NAMES),
    "DVoRA": VeRAConfig(r=6, use_dora=True, target_modules=NAMES),
    "AdaLoRA": AdaLoRAConfig(init_r=4, target_r=2, total_step=10, target_modules=NAMES),
    "SSF": SSFConfig(target_modules=NAMES),
}


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q = nn.Linear(12, 10)
        self.inner = nn.ModuleDict({"v": nn.Linear(12, 8, bias=False), "o": nn.Linear(8, 12)})


SHAPES = {
    path: (layer.out_features, layer.in_features, layer.bias is not None)
    for path, layer in Model().named_modules()
    if isinstance(layer, nn.Linear)
}


def save(directory: Path, config: AdapterConfig) -> Path:
    model = inject(Model(), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    save_adapter(model, directory)
    return directory


@pytest.fixture(params=METHODS)
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return save(tmp_path / "adapter", METHODS[request.param])


def layer_at(path: str) -> nn.Linear:
    layer = Model().get_submodule(path)
    assert isinstance(layer, nn.Linear)
    return layer


def finished(part: PartForm, weight: Tensor) -> AdapterForm:
    return part.finished(weight_norm(weight, part.form.A, part.form.whole_up(), 1.0))


def test_the_whole_is_what_a_model_gets(saved: Path) -> None:
    model = Model()
    expected, actual = read_adapter(model, saved), read_adapter_by_shapes(SHAPES, saved)
    assert actual.paths == list(expected.forms) == ["q", "inner.v"]
    assert actual.identity == expected.identity
    for path, form in expected.forms.items():
        layer = layer_at(path)
        part = finished(actual.part(path, bias=layer.bias), layer.weight)
        for one, other in zip(part[:6], form[:6], strict=True):
            torch.testing.assert_close(one, other)
        assert part.settled(layer.out_features)[0] == form.settled(layer.out_features)[0]
        assert (part.out_scale is part.base_scale) == (form.out_scale is form.base_scale)


def test_a_row_of_zeros_is_divided_by_as_in_a_model(tmp_path: Path) -> None:
    """As the rows of a padding token in a tied head: their m is zero as well, and m / n is zero, not NaN."""
    model = Model()
    with torch.no_grad():
        model.q.weight[2:4] = 0
    injected = inject(Model(), DoRAConfig(r=3, target_modules=["q"]))
    adapter = injected.q.adapters["default"]
    with torch.no_grad():
        adapter.lora_magnitude_vector[2:4] = 0
    save_adapter(injected, tmp_path)
    expected = read_adapter(model, tmp_path).forms["q"]
    part = finished(read_adapter_by_shapes(SHAPES, tmp_path).part("q", bias=model.q.bias), model.q.weight)
    assert part.base_scale is not None
    assert part.base_scale[2:4].tolist() == [0.0, 0.0]
    torch.testing.assert_close(part.base_scale, expected.base_scale)


def run(form: AdapterForm, x: Tensor, weight: Tensor) -> Tensor:
    return adapter_linear_reference(x, weight, form)


@pytest.mark.parametrize(
    "cuts", [[slice(0, 4), slice(4, None)], [torch.tensor([0, 1, 4, 7]), torch.tensor([2, 3, 5, 6])]]
)
def test_rows_are_shared_out(saved: Path, cuts: list[slice | Tensor]) -> None:
    adapter, x = read_adapter_by_shapes(SHAPES, saved), torch.randn(5, 12)
    for path in ("q", "inner.v"):
        layer = layer_at(path)
        bias = None if layer.bias is None else layer.bias.detach()
        whole = run(finished(adapter.part(path, bias=bias), layer.weight), x, layer.weight)
        for rows in cuts:
            weight = layer.weight[rows]
            part = adapter.part(path, Shard(rows=rows), bias=None if bias is None else bias[rows])
            torch.testing.assert_close(run(finished(part, weight), x, weight), whole[:, rows])


def test_columns_add_up_with_norms_that_are_added_first(saved: Path) -> None:
    adapter, x = read_adapter_by_shapes(SHAPES, saved), torch.randn(5, 12)
    for path in ("q", "inner.v"):
        layer = layer_at(path)
        bias = None if layer.bias is None else layer.bias.detach()
        whole = run(finished(adapter.part(path, bias=bias), layer.weight), x, layer.weight)
        cuts = [slice(0, 5), slice(5, 12)]
        parts = [adapter.part(path, Shard(columns=columns), bias=bias) for columns in cuts]
        squares = []
        for part, columns in zip(parts, cuts, strict=True):
            weight, A = layer.weight[:, columns], part.form.A
            squares.append(weight_norm_squared(row_squares(weight), weight @ A.T, A, part.form.whole_up(), 1.0))
        norm = torch.stack(squares).sum(0).sqrt()
        ys = []
        for first, (part, columns) in enumerate(zip(parts, cuts, strict=True)):
            form = part.finished(norm)
            ys.append(
                run(form._replace(bias=form.bias if not first else None), x[:, columns], layer.weight[:, columns])
            )
        torch.testing.assert_close(ys[0] + ys[1], whole)


def test_the_base_bias_stays_the_tensor_that_it_is(tmp_path: Path) -> None:
    adapter = read_adapter_by_shapes(SHAPES, save(tmp_path / "a", METHODS["DoRA"]))
    bias = torch.ones(4)
    assert adapter.part("q", Shard(rows=slice(4, 8)), bias=bias).form.bias is bias
    assert adapter.part("q").form.bias is None


def test_a_part_of_vera_is_a_view_of_its_pair(tmp_path: Path) -> None:
    adapter = read_adapter_by_shapes(SHAPES, save(tmp_path / "a", METHODS["VeRA"]))
    assert adapter.shared is not None
    assert adapter.shared[0].shape == (6, 12)
    assert adapter.shared[1].shape == (10, 6)
    own = tuple(tensor.clone() for tensor in adapter.shared)
    adapter.shared = own
    form = adapter.part("inner.v", Shard(slice(2, 6), slice(3, 9))).form
    assert form.A.untyped_storage().data_ptr() == own[0].untyped_storage().data_ptr()
    torch.testing.assert_close(form.A, own[0][:, 3:9])
    torch.testing.assert_close(form.B, own[1][2:6])
    assert form.B.untyped_storage().data_ptr() == own[1].untyped_storage().data_ptr()


def test_a_magnitude_asks_for_its_norm(tmp_path: Path) -> None:
    part = read_adapter_by_shapes(SHAPES, save(tmp_path / "a", METHODS["DoRA"])).part("q")
    with pytest.raises(ValueError, match=r"norm must be given for .*weight_norm_squared"):
        part.finished(None)
    with pytest.raises(ValueError, match=r"norm must have shape \[10\], got \(9,\)"):
        part.finished(torch.ones(9))


def test_what_reads_the_weight_is_refused(tmp_path: Path) -> None:
    directory = save(tmp_path / "a", HiRAConfig(r=3, target_modules=NAMES))
    with pytest.raises(AdapterError, match="HIRA computes with the values of the weight of q, which are not at hand"):
        read_adapter_by_shapes(SHAPES, directory)


def test_a_layer_that_is_left_out_takes_no_adapter(tmp_path: Path) -> None:
    directory = save(tmp_path / "a", METHODS["LoRA"])
    with pytest.raises(AdapterError, match=r"inner\.v"):
        read_adapter_by_shapes({"q": SHAPES["q"]}, directory)


def test_another_size_is_refused(tmp_path: Path) -> None:
    directory = save(tmp_path / "a", METHODS["LoRA"])
    with pytest.raises(AdapterError, match=r"must have shape \(3, 13\) for this config and model"):
        read_adapter_by_shapes(SHAPES | {"q": (10, 13, True)}, directory)


@pytest.mark.parametrize("case", BAD)
def test_a_bad_adapter_is_refused_as_for_a_model(case: str, tmp_path: Path) -> None:
    directory = make(tmp_path / "adapter")
    shapes = {"q": (5, 6, True), "v": (4, 6, False)}
    assert read_adapter_by_shapes(shapes, directory, root=tmp_path).paths == ["q", "v"]
    BAD[case][0](directory)
    drawn = torch.get_rng_state()
    with pytest.raises(AdapterError) as caught:
        read_adapter_by_shapes(shapes, directory, root=tmp_path, limits=Limits(max_tensors=50, max_pattern_seconds=0.2))
    assert caught.value.adapter == str(directory)
    assert torch.equal(torch.get_rng_state(), drawn)
