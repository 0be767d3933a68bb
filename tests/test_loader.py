"""Adapters from strangers: each rule of the loader with the error that names it, and valid adapters as load_adapter
reads them."""

from __future__ import annotations

import json
import os
import pickle
import re
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save, save_file
from torch import Tensor, nn

import fastadapt
from bench import fuzz
from fastadapt import LoRAConfig, VeRAConfig, inject, load_adapter, save_adapter
from fastadapt.methods import patterns
from fastadapt.model import peft_files
from fastadapt.model.adapted import adapter_layers
from fastadapt.model.layouts import kohya
from fastadapt.model.peft_files import CONFIG_FILE, TENSOR_FILE, of_one_save
from fastadapt.model.targets import base_modules
from fastadapt.model.untrusted import TensorFile, parse_header
from fastadapt.serving import AdapterError, Limits, LoadedAdapter, adapter_directory, read_adapter
from fastadapt.serving import loader as loader_module

A = "base_model.model.q.lora_A.weight"
B = "base_model.model.q.lora_B.weight"


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(9, 6)
        self.conv = nn.Conv2d(2, 3, 2)
        self.q = nn.Linear(6, 5)
        self.v = nn.Linear(6, 4, bias=False)


def make(directory: Path, **fields: Any) -> Path:
    config = LoRAConfig(**{"r": 2, "target_modules": ["q", "v"], "init_lora_weights": False, **fields})
    save_adapter(inject(Model(), config), directory)
    return directory


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return make(tmp_path / "root" / "adapter")


def edit_config(**changes: Any) -> Callable[[Path], None]:
    def edit(directory: Path) -> None:
        fields = json.loads((directory / CONFIG_FILE).read_text())
        (directory / CONFIG_FILE).write_text(json.dumps(fields | changes))

    return edit


def edit_text(old: str, new: str) -> Callable[[Path], None]:
    def edit(directory: Path) -> None:
        text = (directory / CONFIG_FILE).read_text()
        assert old in text
        (directory / CONFIG_FILE).write_text(text.replace(old, new, 1))

    return edit


def edit_tensors(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    def edit(directory: Path) -> None:
        tensors = load_file(directory / TENSOR_FILE)
        change(tensors)
        save_file(tensors, directory / TENSOR_FILE)

    return edit


def edit_header(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def edit(directory: Path) -> None:
        content = (directory / TENSOR_FILE).read_bytes()
        stop = 8 + int.from_bytes(content[:8], "little")
        header = change(content[8:stop])
        (directory / TENSOR_FILE).write_bytes(len(header).to_bytes(8, "little") + header + content[stop:])

    return edit


def replaced(name: str, change: Callable[[Path], object]) -> Callable[[Path], None]:
    def edit(directory: Path) -> None:
        (directory / name).unlink()
        change(directory / name)

    return edit


def poison(value: float, dtype: torch.dtype = torch.float32) -> Callable[[Path], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[A] = tensors[A].to(dtype)
        tensors[A][0, 0] = value

    return edit_tensors(change)


def other(name: str, **fields: Any) -> Callable[[Path], object]:
    return lambda directory: make(directory, target_modules=[name], **fields)


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    # Files.
    "no config": (lambda d: (d / CONFIG_FILE).unlink(), "adapter_config.json does not exist: an adapter directory"),
    "no tensors": (lambda d: (d / TENSOR_FILE).unlink(), "adapter_model.safetensors does not exist"),
    "a directory": (replaced(TENSOR_FILE, lambda p: p.mkdir()), "must be a regular file"),
    "a FIFO": (replaced(TENSOR_FILE, os.mkfifo), "must be a regular file"),
    "a FIFO for a config": (replaced(CONFIG_FILE, os.mkfifo), "must be a regular file"),
    "a device": (replaced(CONFIG_FILE, lambda p: p.symlink_to("/dev/zero")), "leads out of the adapters' directory"),
    "a pickle": (
        replaced(TENSOR_FILE, lambda p: p.with_name("adapter_model.bin").write_bytes(pickle.dumps({}))),
        "is a pickle, which can run code when it is loaded: convert it",
    ),
    "a link to nothing": (replaced(TENSOR_FILE, lambda p: p.symlink_to("gone")), "must be a regular file"),
    "a link to itself": (replaced(TENSOR_FILE, lambda p: p.symlink_to(p.name)), "[Ss]ymbolic links"),
    "much config": (
        lambda d: (d / CONFIG_FILE).write_text(" " * 2**21),
        "adapter_config.json may have 1048576 bytes, got 2097152: raise the limit",
    ),
    "much of tensors": (
        lambda d: os.truncate(d / TENSOR_FILE, 2**33),
        "adapter_model.safetensors may have 4294967296 bytes, got 8589934592: raise the limit",
    ),
    # JSON.
    "not JSON": (lambda d: (d / CONFIG_FILE).write_text("{"), "is not valid JSON"),
    "a list": (lambda d: (d / CONFIG_FILE).write_text("[]"), "must hold a JSON object, got list"),
    "twice": (edit_text("{", '{"r": 4,'), "is not valid JSON: 'r' is there twice"),
    "NaN": (edit_text('"lora_dropout": 0.0', '"lora_dropout": NaN'), "is not valid JSON: NaN is no number of JSON"),
    "Infinity": (edit_text('"lora_alpha": 8', '"lora_alpha": Infinity'), "Infinity is no number of JSON"),
    "infinite in the end": (edit_text('"lora_alpha": 8', '"lora_alpha": 1e999'), "lora_alpha must be a finite number"),
    "infinite in a pattern": (edit_text('"alpha_pattern": {', '"alpha_pattern": {"q": 1e999'), "alpha_pattern must be"),
    "nested": (edit_text("{", '{"x": ' + "[" * 9999 + "]" * 9999 + ","), "is not valid JSON: it is nested too deeply"),
    "not UTF-8": (lambda d: (d / CONFIG_FILE).write_bytes(b'{"r": "\xff"}'), "is not valid JSON: 'utf-8' codec"),
    "many digits": (edit_text('"r": 2', '"r": ' + "9" * 5000), "is not valid JSON: Exceeds the limit"),
    "64 bits": (edit_text('"lora_alpha": 8', '"lora_alpha": ' + "9" * 400), "lora_alpha must be a number of 64 bits"),
    # Fields.
    "type of a field": (edit_config(target_modules=3), "target_modules must be .*got 3"),
    "a long value": (edit_config(r=["x" * 10_000]), r"r must be int, got \['xxx.*\.\.\.$"),
    "no known type": (edit_config(peft_type="BOFT"), "peft_type 'BOFT' is not supported: fastadapt loads LORA"),
    "no type at all": (edit_config(peft_type=["LORA"]), r"peft_type \['LORA'\] is not supported"),
    "changed maths": (edit_config(use_qalora=True), "use_qalora=True changes what the adapter computes"),
    "changed base": (edit_config(init_lora_weights="pissa"), "init_lora_weights must be"),
    "unknown field": (edit_config(brand_new=1), "only fields that fastadapt knows, got brand_new: .*take them out"),
    "modules_to_save": (
        edit_config(modules_to_save=["v"]),
        "modules_to_save must name no module of this model, got v: .*merge the adapter .* or load it",
    ),
    "literal Delta-LoRA": (
        edit_config(peft_type="DELTA_LORA", literal=True),
        "literal must be false: .*serve its",
    ),
    "an embedding": (other("embed"), "embed is a Embedding, and only Linear and Conv1D .*merge this adapter or serve"),
    "a convolution": (other("conv"), "conv is a Conv2d, and only Linear and Conv1D"),
    "an embedding for what no method can put there": (
        lambda d: (other("embed")(d), edit_config(use_dora=True)(d)),
        r"target_modules: embed: Embedding cannot take an adapter of LoRAConfig with use_dora=True: only Linear can",
    ),
    "an unknown module": (edit_config(target_modules=["k"]), "nothing in Model matches 'k'"),
    # Patterns.
    "no expression": (edit_config(target_modules="("), r"target_modules: '\(' is not a regular expression"),
    "rank pattern": (edit_config(rank_pattern={"(": 4}), r"rank_pattern: '\(' is not a regular expression"),
    "alpha pattern": (edit_config(alpha_pattern={"[": 4}), r"alpha_pattern: '\[' is not a regular expression"),
    "fuzzy": (edit_config(target_modules="(?:q){e<=1}"), "must be written with a backslash"),
    "many repetitions": (edit_config(target_modules="((.{0,99}){99}){99}"), "repetitions may multiply to 100"),
    "long expression": (edit_config(target_modules="q|" * 40_000), "at most 65536 characters, got 80000"),
    # Sizes.
    "a billion ranks": (edit_config(r=10**9), "r may be 512, got 1000000000: export"),
    "a billion by pattern": (edit_config(rank_pattern={"q": 10**9}), "rank_pattern.* may be 512, got 1000000000"),
    "another rank": (
        edit_config(r=3),
        r"lora_A.weight must have shape \(3, 6\) for this config and model, got \(2, 6\)",
    ),
    "another rank by pattern": (edit_config(rank_pattern={"v": 3}), r"v.lora_A.weight must have shape \(3, 6\)"),
    "many tensors": (
        edit_tensors(lambda t: t.update({f"x{i}": torch.zeros(1) for i in range(99)})),
        "may hold 50 tensors, got 103",
    ),
    "a long header": (edit_header(lambda h: h[:-1] + b" " * 30_000 + b"}"), "its header may have 25600 bytes"),
    # Tensors.
    "missing": (edit_tensors(lambda t: t.pop(A)), f"tensor {A} is missing"),
    "surplus": (edit_tensors(lambda t: t.update(more=torch.ones(1))), "tensor more does not belong to this config"),
    "misshapen": (edit_tensors(lambda t: t.update({A: t[A].T.contiguous()})), r"must have shape \(2, 6\)"),
    "of no size": (
        edit_tensors(lambda t: t.update({A: torch.zeros(0, 6)})),
        r"must have shape \(2, 6\).* got \(0, 6\)",
    ),
    "integers": (edit_tensors(lambda t: t.update({A: t[A].long()})), "must hold floating-point numbers, .* got 'I64'"),
    "float8": (edit_tensors(lambda t: t.update({A: t[A].to(torch.float8_e4m3fn)})), "floating-point .* got 'F8_E4M3'"),
    "NaN in a tensor": (poison(float("nan")), f"{A} has NaN or infinite values: .*save it again"),
    "too large for fp32": (poison(1e300, torch.float64), f"{A} has values that torch.float32 cannot hold"),
    "a tensor twice": (edit_header(lambda h: h.rstrip()[:-1] + b',"' + A.encode() + b'":{}}'), "is there twice"),
    "a shape of text": (edit_header(lambda h: h.replace(b"[2,6]", b'"ab"')), "must have a list of sizes for its shape"),
    "a shape of nothing": (edit_header(lambda h: h.replace(b"[2,6]", b"[0,9999999999,9999999999]")), "a list of sizes"),
    "nested header": (edit_header(lambda h: b"[" * 9999), "not a valid safetensors file: it is nested too deeply"),
    "no header": (edit_header(lambda h: b"[]"), "its header must be a JSON object, got list"),
    "offsets": (edit_header(lambda h: re.sub(rb"\[0,\d+\]", b"[0,9999]", h)), "is not a valid safetensors file"),
    "cut": (lambda d: os.truncate(d / TENSOR_FILE, 100), "not a valid safetensors file: its header should have"),
    "empty": (lambda d: os.truncate(d / TENSOR_FILE, 0), "is not a valid safetensors file"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_adapter_is_refused_by_its_reason_alone(case: str, saved: Path) -> None:
    damage, message = BAD[case]
    damage(saved)
    limits = Limits(max_tensors=50, max_pattern_seconds=0.2)
    model = Model()
    before, modules = {k: v.clone() for k, v in model.state_dict().items()}, dict(model.named_modules())
    drawn, start = torch.get_rng_state(), time.process_time()
    with pytest.raises(AdapterError, match=message) as caught:
        read_adapter(model, saved, root=saved.parent, limits=limits)
    assert time.process_time() - start < 2
    assert str(saved) in str(caught.value)
    assert caught.value.adapter == str(saved)
    assert len(str(caught.value)) < 1300
    assert dict(model.named_modules()) == modules
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), drawn)


def test_a_trained_head_is_refused_by_the_name_that_the_model_has(saved: Path) -> None:
    fields = {"task_type": "SEQ_CLS", "modules_to_save": ["classifier", "score"]}
    edit_config(**fields)(saved)
    model = Model()
    assert read_adapter(model, saved).forms  # neither the model nor the file has one
    model.score = nn.Linear(5, 3)
    with pytest.raises(AdapterError, match=r"of this model, got score: .*fastadapt merge.* with load_adapter"):
        read_adapter(model, saved)
    edit_tensors(lambda tensors: tensors.update({"base_model.model.score.weight": torch.ones(3, 5)}))(saved)
    with pytest.raises(AdapterError, match=r"score\.weight does not belong to this config and model"):
        read_adapter(Model(), saved)


NAMES = ["", ".", "..", "../outside", "adapter/..", "adapter/../adapter", "/etc", "//adapter", "adapter/", "./adapter"]
NAMES += ["..\\outside", "adapter\\..\\..", "C:\\adapter", "C:adapter", "a\0b", "adapter\n", "\ud800"]


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_names_stay_inside_the_root(name: str, saved: Path) -> None:
    make(saved.parent.parent / "outside")
    with pytest.raises(AdapterError, match="its name must be") as caught:
        adapter_directory(saved.parent, name)
    assert "\n" not in str(caught.value)


def test_names_of_nothing(saved: Path) -> None:
    with pytest.raises(AdapterError, match="No such file or directory"):
        adapter_directory(saved.parent, "other")
    with pytest.raises(AdapterError, match="File name too long"):
        adapter_directory(saved.parent, "x" * 300)
    with pytest.raises(AdapterError, match="must be a directory that holds"):
        adapter_directory(saved.parent, f"adapter/{CONFIG_FILE}")
    with pytest.raises(AdapterError, match="its name must be text"):
        adapter_directory(saved.parent, 3)  # type: ignore[arg-type]


def test_nested_names_and_links_inside_the_root_are_followed(saved: Path) -> None:
    root = saved.parent
    deep = make(root / "blobs" / "one")
    (root / "linked").symlink_to("blobs/one")
    (root / "files").mkdir()
    for name in (CONFIG_FILE, TENSOR_FILE):
        (root / "files" / name).symlink_to(deep / name)
    assert adapter_directory(root, "blobs/one") == adapter_directory(root, "linked") == deep.resolve()
    identities = {
        read_adapter(Model(), adapter_directory(root, name), root=root).identity
        for name in ("blobs/one", "linked", "files")
    }
    assert len(identities) == 1


@pytest.mark.parametrize("absolute", [True, False])
def test_links_that_leave_the_root_are_not_followed(saved: Path, absolute: bool) -> None:
    root, outside = saved.parent, make(saved.parent.parent / "outside")
    (root / "whole").symlink_to(outside if absolute else "../outside")
    with pytest.raises(AdapterError, match="leads out of the adapters' directory: put the adapter itself there"):
        adapter_directory(root, "whole")
    with pytest.raises(AdapterError, match="leads out"):
        read_adapter(Model(), outside, root=root)
    for name in (CONFIG_FILE, TENSOR_FILE):
        part = make(root / f"part {name}")
        (part / name).unlink()
        (part / name).symlink_to(outside / name if absolute else f"../../outside/{name}")
        with pytest.raises(AdapterError, match="leads out"):
            adapter_directory(root, part.name)
        with pytest.raises(AdapterError, match="leads out"):
            read_adapter(Model(), part, root=root)
        assert read_adapter(Model(), part).forms  # without a root the caller answers for the place


def test_a_link_that_comes_after_the_check_is_not_followed(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, outside = saved.parent, make(saved.parent.parent / "outside")
    resolve = os.path.realpath

    def resolve_then_swap(path: Any, strict: bool = False) -> Any:
        real = resolve(path, strict=strict)
        if str(path).endswith(CONFIG_FILE):
            saved.rename(root / "moved")
            saved.symlink_to(outside)
        return real

    monkeypatch.setattr(os.path, "realpath", resolve_then_swap)
    with pytest.raises(AdapterError, match=r"Not a directory|symbolic links"):
        read_adapter(Model(), saved, root=root)


def test_what_is_hashed_is_what_is_parsed(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once both files have been found to be of one save nothing is read again: an exchange after that is not seen."""
    first = read_adapter(Model(), saved)

    def exchanged(*args: Any) -> tuple[bytes, TensorFile]:
        found = of_one_save(*args)
        for name in (CONFIG_FILE, TENSOR_FILE):
            (saved / name).write_bytes(b"other")
        return found

    monkeypatch.setattr(loader_module, "of_one_save", exchanged)
    again = read_adapter(Model(), saved)
    assert again.identity == first.identity
    assert torch.equal(again.forms["q"].A, first.forms["q"].A)


def test_a_file_that_grows_while_it_is_read_is_refused(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    status = os.fstat

    def grow(descriptor: int) -> os.stat_result:
        found = status(descriptor)
        if found.st_ino == (saved / TENSOR_FILE).stat().st_ino:
            with open(saved / TENSOR_FILE, "ab") as file:
                file.write(b"more")
        return found

    monkeypatch.setattr(os, "fstat", grow)
    with pytest.raises(AdapterError, match="changed while it was read: write adapters beside their place"):
        read_adapter(Model(), saved)


def test_the_identity_is_of_the_content(saved: Path, tmp_path: Path) -> None:
    first = read_adapter(Model(), saved)
    assert re.fullmatch("[0-9a-f]{64}", first.identity)
    assert first.bytes == sum((saved / name).stat().st_size for name in (CONFIG_FILE, TENSOR_FILE))
    saved.rename(tmp_path / "elsewhere")
    assert read_adapter(Model(), tmp_path / "elsewhere").identity == first.identity
    edit_config(lora_alpha=9)(tmp_path / "elsewhere")
    changed = read_adapter(Model(), tmp_path / "elsewhere").identity
    edit_tensors(lambda t: t[B].add_(1))(tmp_path / "elsewhere")
    assert len({first.identity, changed, read_adapter(Model(), tmp_path / "elsewhere").identity}) == 3


def assert_same_forms(loaded: LoadedAdapter, model: Any, directory: Path) -> None:
    """The forms are those that load_adapter's layers have."""
    bases = {path: getattr(module, "bias", None) for path, module in base_modules(model).items()}
    layers = adapter_layers(load_adapter(model, directory).eval())
    assert list(loaded.forms) == list(layers)
    with torch.no_grad():
        for path, layer in layers.items():
            form, expected = loaded.forms[path], layer.form()
            for name, part in expected._asdict().items():
                if isinstance(part, Tensor):
                    got = getattr(form, name)
                    torch.testing.assert_close(got, part.detach(), rtol=0, atol=0)
                    assert got is bases[path] or not got.requires_grad
                else:
                    assert getattr(form, name) == part
            assert (form.out_scale is form.base_scale) == (expected.out_scale is expected.base_scale)


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory) -> fuzz.Harness:
    return fuzz.Harness(tmp_path_factory.mktemp("fuzz"))


METHODS = [*fuzz.METHOD_CONFIGS, "eva"]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_loads_as_load_adapter_does(method: str, harness: fuzz.Harness) -> None:
    directory = harness.root / harness.write(fuzz.Case("", method, []))
    before = harness.state()
    loaded = read_adapter(harness.model, directory, root=harness.root)
    assert harness.state() == before
    assert_same_forms(loaded, fuzz.tiny_model(), directory)
    assert (loaded.shared is not None) == ("vera" in method or "dvora" in method)
    if loaded.shared is not None:
        for form in loaded.forms.values():
            for factor, whole in zip((form.A, form.B), loaded.shared, strict=True):
                assert factor.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()


def test_a_bf16_gpt2_and_its_biases(tmp_path: Path) -> None:
    """Conv1D, a base bias that stays itself or is replaced, and fp32 adapters beside 16-bit weights."""
    for bias, pruned in (("none", False), ("lora_only", True)):
        model = inject(tiny_models.gpt2().bfloat16(), LoRAConfig(r=3, target_modules=["c_attn", "c_fc"], bias=bias))
        tiny_models.randomise([p for p in model.parameters() if p.requires_grad])
        save_adapter(model, tmp_path / bias)
        base = tiny_models.gpt2().bfloat16()
        loaded = read_adapter(base, tmp_path / bias)
        assert {form.A.dtype for form in loaded.forms.values()} == {torch.float32}
        for path, form in loaded.forms.items():
            assert (form.bias is base.get_submodule(path).bias) != pruned
        assert_same_forms(loaded, base, tmp_path / bias)


@pytest.mark.parametrize("kind", ["lora", "dora", "vera", "adalora"])
def test_peft_writes_what_is_loaded(kind: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    config = {
        "lora": lambda: peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"], rank_pattern={"q_proj": 2}),
        "dora": lambda: peft.LoraConfig(r=4, target_modules="all-linear", use_dora=True),
        "vera": lambda: peft.VeraConfig(r=8, target_modules=["q_proj", "up_proj"]),
        "adalora": lambda: peft.AdaLoraConfig(init_r=4, target_r=2, total_step=9, target_modules=["q_proj"]),
    }[kind]()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(tiny_models.llama(), config)
        tiny_models.randomise([p for p in model.parameters() if p.requires_grad])
        model.save_pretrained(tmp_path)
    assert_same_forms(read_adapter(tiny_models.llama(), tmp_path), tiny_models.llama(), tmp_path)


class Wrapper(nn.Module):
    """A layer of a serving model as the loader meets it: the base layer is below the path that it had."""

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "down_proj"]], ids=str)
def test_a_wrapped_model_loads_by_the_modules_it_had(targets: Any, tmp_path: Path) -> None:
    save_adapter(inject(tiny_models.llama(), LoRAConfig(r=2, target_modules=targets)), tmp_path)
    model = tiny_models.llama()
    modules = base_modules(model)
    expected = read_adapter(model, tmp_path)
    for path, module in modules.items():
        if isinstance(module, nn.Linear):
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, Wrapper(module))
    loaded = read_adapter(model, tmp_path, modules=modules)
    assert list(loaded.forms) == list(expected.forms)
    assert loaded.identity == expected.identity


def test_no_rank_takes_memory_before_it_is_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even those below the limit: a small file whose names are right and whose shapes are not builds nothing."""
    save_adapter(inject(Model(), VeRAConfig(r=4, target_modules=["q"], save_projection=False)), tmp_path)
    edit_config(r=10**9)(tmp_path)
    with pytest.raises(AdapterError, match="r may be 512, got 1000000000"):
        read_adapter(Model(), tmp_path)
    edit_config(r=10**6)(tmp_path)

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("memory was taken")

    monkeypatch.setattr("fastadapt.serving.loader._give_memory", refuse)
    with pytest.raises(AdapterError, match=r"vera_lambda_d must have shape \(1000000,\)"):
        read_adapter(Model(), tmp_path, limits=Limits(max_rank=10**6))


def test_a_scale_that_is_not_finite_in_the_end_is_refused(tmp_path: Path) -> None:
    save_adapter(inject(Model(), fastadapt.DoRAConfig(r=2, target_modules=["q"])), tmp_path)
    model = Model()
    with torch.no_grad():
        model.q.weight[0] = 0
    with pytest.raises(AdapterError, match="q gets NaN or infinite values in out_scale"):
        read_adapter(model, tmp_path)


def test_a_merged_model_is_the_callers_mistake(saved: Path) -> None:
    model = load_adapter(Model(), saved)
    fastadapt.merge(model)
    with pytest.raises(ValueError, match="call unmerge") as caught:
        read_adapter(model, saved)
    assert not isinstance(caught.value, AdapterError)


def test_accidents_are_not_taken_for_bad_adapters(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(peft_files, "load", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        read_adapter(Model(), saved)


def test_an_error_is_one_short_line_and_can_be_pickled() -> None:
    error = AdapterError("name\nERROR", "tensor \x1b[31m" + "x" * 10_000)
    assert "\n" not in str(error)
    assert "\x1b" not in str(error)
    assert len(str(error)) < 1300
    again = pickle.loads(pickle.dumps(error))
    assert str(again) == str(error)
    assert (again.adapter, again.reason) == (error.adapter, error.reason)


ENDLESS = r"(?:.|.)*[^!-~]"


@pytest.mark.parametrize(
    ("field", "fields"),
    [
        ("target_modules", {"target_modules": ENDLESS}),
        ("exclude_modules", {"exclude_modules": ENDLESS}),
        ("rank_pattern", {"rank_pattern": {ENDLESS: 2}}),
        ("alpha_pattern", {"alpha_pattern": {ENDLESS: 2}}),
        ("layers_pattern", {"layers_to_transform": [0, 1], "layers_pattern": [ENDLESS]}),
    ],
)
def test_an_expression_that_would_run_for_years_is_refused_in_time(
    field: str, fields: dict[str, Any], tmp_path: Path
) -> None:
    save_adapter(inject(tiny_models.llama(), LoRAConfig(r=2, target_modules=["q_proj"])), tmp_path)
    edit_config(**fields)(tmp_path)
    model, start = tiny_models.llama(), time.process_time()
    with pytest.raises(AdapterError, match=rf"{field}: .* takes too long on .*write it without repetitions"):
        read_adapter(model, tmp_path, limits=Limits(max_pattern_seconds=0.2))
    assert time.process_time() - start < 1


def test_a_layers_pattern_may_be_wrong_too(tmp_path: Path) -> None:
    save_adapter(inject(tiny_models.llama(), LoRAConfig(r=2, target_modules=["q_proj"])), tmp_path)
    for wrong, message in (
        ("*)", r"layers_pattern: '\*\)' is not a regular"),
        ("no|h", "nothing in .* matches 'q_proj'"),
    ):
        edit_config(layers_to_transform=[0, 1], layers_pattern=[wrong])(tmp_path)
        with pytest.raises(AdapterError, match=message):
            read_adapter(tiny_models.llama(), tmp_path)


@settings(max_examples=300, deadline=None)
@given(
    st.text(r"().*+?|[]\^$aq_.0{}:i=!<P-,", max_size=12) | st.from_regex(r"\(?(a|q|\.|\*|\?|[0-9])+\)?[*+?]?"),
    st.sampled_from(["q", "a.q", "layers.0.q_proj", "aq0"]),
)
def test_patterns_mean_what_re_means(pattern: str, path: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            found = patterns.match("field", pattern, path, r"(.*\.)?({})$")
        except ValueError as error:
            assert str(error).startswith("field: ")  # noqa: PT017
            return
        expected = re.match(rf"(.*\.)?({pattern})$", path)
    assert (found is None) == (expected is None)


def test_patterns_together_have_a_time_too() -> None:
    with (
        patterns.time_limit(0),
        pytest.raises(ValueError, match="patterns take too long together, time ran out at 'a'"),
    ):
        patterns.match("rank_pattern", "a", "a")
    assert patterns.fullmatch("rank_pattern", "a", "a")


def test_very_many_names_are_matched_in_linear_time(saved: Path) -> None:
    names = [f"n{index}" for index in range(60_000)]
    edit_config(target_modules=["q", "v", *names], exclude_modules=names)(saved)
    start = time.process_time()
    assert read_adapter(Model(), saved, limits=Limits(max_config_bytes=2**21)).forms
    assert time.process_time() - start < 2


def test_a_sample_of_the_fuzz_run() -> None:
    findings: list[str] = []
    rows = fuzz.run(300, 0, lambda case, outcome: findings.append(f"{outcome.detail}\n{case}"))
    assert findings == []
    assert rows[-1]["cases"] == 300
    assert rows[-1]["refused"] > 150
    assert rows[-1]["loaded"] > 10


def test_the_fuzz_run_reads_by_every_road(harness: fuzz.Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    case = fuzz.Case("bytes", "lora", [])
    for name in fuzz.READERS:
        for fault, message in [
            (KeyError("oh"), "KeyError"),
            (ValueError("x" * 3000), "no short line"),
            (OSError("\x1b[2J"), "no short line"),
        ]:

            def failing(model: Any, directory: Path, fault: Exception = fault) -> bool:
                raise fault

            with monkeypatch.context() as patch:
                patch.setitem(fuzz.READERS, name, failing)
                result, detail, _ = harness.judge(case)
            assert result == "finding"
            assert detail.startswith(f"{name}: ")
            assert message in detail
    with monkeypatch.context() as patch:
        patch.setitem(fuzz.READERS, "info", lambda model, directory: False)
        assert "what load_adapter loads cannot be loaded" in harness.judge(case).detail
    with monkeypatch.context() as patch:
        patch.setitem(fuzz.READERS, "merge", lambda model, directory: bool(load_adapter(model, directory)))
        assert "not as before: modules, parameters" in harness.judge(case).detail
    fastadapt.unload(harness.model)
    assert harness.judge(case)[:2] == ("loaded", "")


@pytest.mark.parametrize("method", ["lora", *fuzz.FOREIGN])
def test_the_fuzz_run_compares_what_is_converted(
    method: str, harness: fuzz.Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = fuzz.Case("bytes", method, [])
    assert harness.judge(case)[:2] == ("loaded", "")
    exact = kohya._exact
    monkeypatch.setattr(kohya, "_exact", lambda alpha, like: exact(alpha, like) + 1)
    outcome = harness.judge(case)
    assert outcome.result == "finding"
    assert outcome.detail.startswith("convert: ")


def test_the_fuzz_run_tells_findings(harness: fuzz.Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it is there to see, it sees: another exception, an accident, a hang, a change, a form that does not fit."""
    case = fuzz.Case("bytes", "lora", [])
    assert harness.judge(case)[:2] == ("loaded", "")
    monkeypatch.setattr(fuzz, "SECONDS", 0.2)
    original = fuzz.read_adapter

    def failing(*_: Any, **__: Any) -> Any:
        raise KeyError("oh")

    def accidental(*args: Any, **__: Any) -> Any:
        try:
            return int("x")
        except ValueError as error:
            raise AdapterError("a", "b") from error

    def endless(*_: Any, **__: Any) -> Any:
        time.sleep(5)

    def drawing(*args: Any, **kwargs: Any) -> Any:
        torch.rand(1)
        return original(*args, **kwargs)

    def misshapen(*args: Any, **kwargs: Any) -> Any:
        loaded = original(*args, **kwargs)
        path, form = next(iter(loaded.forms.items()))
        return loaded._replace(forms={path: form._replace(A=form.B)})

    for broken, detail in (
        (failing, "KeyError: 'oh'"),
        (accidental, "refused by accident"),
        (endless, "still running after 0.2 s"),
        (drawing, "not as before: random numbers"),
        (misshapen, "A has shape"),
    ):
        monkeypatch.setattr(fuzz, "read_adapter", broken)
        outcome = harness.judge(case)
        assert outcome.result == "finding"
        assert detail in outcome.detail


def test_the_header_is_checked_as_safetensors_writes_it() -> None:
    content = save({"a": torch.zeros(2, 3), "b": torch.zeros(0, dtype=torch.bfloat16)}, {"format": "pt"})
    header = parse_header(content, Path("x"), len(content))
    assert {name: said["shape"] for name, said in header.tensors.items()} == {"a": [2, 3], "b": [0]}
    assert header.metadata == {"format": "pt"}
    assert peft_files.parse_tensors(TensorFile(content, header), Path("x"))["b"].dtype == torch.bfloat16
