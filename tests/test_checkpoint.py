"""Adapter directories as untrusted input: taken whole or refused with the reason, the model left as it was."""

from __future__ import annotations

import copy
import itertools
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastadapt import DoRAConfig, LoRAConfig, VeRAConfig, inject, load_adapter, save_adapter
from fastadapt.commands.info import describe_adapter
from fastadapt.model import saving
from fastadapt.model.adapted import adapter_configs
from fastadapt.model.peft_files import CONFIG_FILE, TENSOR_FILE, of_one_save, read_fields
from fastadapt.model.untrusted import TensorFile, parse_header
from fastadapt.serving.loader import read_adapter

A = "base_model.model.q.lora_A.weight"


class Model(nn.Module):
    def __init__(self, width: int = 6) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q = nn.Linear(width, 5)
        self.v = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.q(x), self.v(x)], -1)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_adapter(
        inject(Model(), LoRAConfig(r=2, target_modules=["q", "v"], init_lora_weights=False)), tmp_path / "adapter"
    )
    return tmp_path / "adapter"


def edit_config(**changes: Any) -> Callable[[Path], None]:
    def edit(directory: Path) -> None:
        fields = json.loads((directory / CONFIG_FILE).read_text())
        (directory / CONFIG_FILE).write_text(json.dumps(fields | changes))

    return edit


def edit_tensors(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    def edit(directory: Path) -> None:
        tensors = load_file(directory / TENSOR_FILE)
        change(tensors)
        save_file(tensors, directory / TENSOR_FILE)

    return edit


def pickled(directory: Path) -> None:
    (directory / TENSOR_FILE).unlink()
    (directory / "adapter_model.bin").write_bytes(pickle.dumps({}))


def poisoned(tensors: dict[str, Tensor]) -> None:
    tensors[A][0, 0] = float("nan")


BAD: dict[str, tuple[Callable[[Path], object], type[Exception], str]] = {
    "no config": (lambda d: (d / CONFIG_FILE).unlink(), FileNotFoundError, "adapter_config.json does not exist"),
    "no tensors": (lambda d: (d / TENSOR_FILE).unlink(), FileNotFoundError, "adapter_model.safetensors does not exist"),
    "broken JSON": (lambda d: (d / CONFIG_FILE).write_text("{"), ValueError, "is not valid JSON"),
    "JSON of no object": (
        lambda d: (d / CONFIG_FILE).write_text("[]"),
        ValueError,
        "must hold a JSON object, got list",
    ),
    "unknown type": (
        edit_config(peft_type="BOFT"),
        ValueError,
        "peft_type 'BOFT' is not supported: fastadapt loads LORA",
    ),
    "no type": (edit_config(peft_type=None), ValueError, "peft_type None is not supported"),
    "r of 0": (edit_config(r=0), ValueError, "r must be a positive integer, got 0"),
    "dropout": (edit_config(lora_dropout=2), ValueError, r"lora_dropout must be in \[0, 1\)"),
    "type of a field": (edit_config(rank_pattern=3), ValueError, "rank_pattern"),
    "changed maths": (edit_config(use_qalora=True), ValueError, "use_qalora=True changes what the adapter computes"),
    "changed base": (edit_config(init_lora_weights="pissa"), ValueError, "init_lora_weights must be"),
    "all biases": (edit_config(bias="all"), ValueError, "bias must be one of none, lora_only"),
    "not safetensors": (
        lambda d: (d / TENSOR_FILE).write_bytes(b"\x80\x04"),
        ValueError,
        "not a valid safetensors file",
    ),
    "a pickle": (pickled, ValueError, "is a pickle, which can run code"),
    "NaN": (edit_tensors(poisoned), ValueError, f"{A} has NaN or infinite values"),
    "missing": (edit_tensors(lambda t: t.pop(A)), ValueError, f"tensor {A} is missing"),
    "surplus": (edit_tensors(lambda t: t.update(more=torch.ones(1))), ValueError, "tensor more does not belong"),
    "integers": (
        edit_tensors(lambda t: t.update({A: torch.ones(2, 6, dtype=torch.int64)})),
        ValueError,
        "floating-point",
    ),
    "another rank": (edit_config(r=3), ValueError, r"must have shape \(3, 6\) for this config and model, got \(2, 6\)"),
    "other targets": (edit_config(target_modules=["k"]), ValueError, "nothing in Model matches 'k'"),
    "fewer targets": (edit_config(target_modules=["q"]), ValueError, "does not belong to this config and model"),
    "DoRA without m": (edit_config(use_dora=True), ValueError, "lora_magnitude_vector is missing"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_directories_are_refused_and_the_model_is_left_alone(case: str, saved: Path) -> None:
    damage, error, message = BAD[case]
    damage(saved)
    model = Model()
    before, modules = {k: v.clone() for k, v in model.state_dict().items()}, dict(model.named_modules())
    with pytest.raises(error, match=message):
        load_adapter(model, saved)
    assert dict(model.named_modules()) == modules
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())


def test_an_adapter_for_another_model_is_refused(saved: Path) -> None:
    with pytest.raises(ValueError, match="is this adapter for another model"):
        load_adapter(Model(width=7), saved)


def test_unknown_fields_are_ignored_with_a_warning(saved: Path) -> None:
    edit_config(brand_new=1)(saved)
    with pytest.warns(UserWarning, match="ignored fields that fastadapt does not know: brand_new"):
        load_adapter(Model(), saved)


def test_both_spellings_of_a_trained_bias_are_read(tmp_path: Path) -> None:
    model = inject(Model(), LoRAConfig(r=2, target_modules=["q"], bias="lora_only"))
    with torch.no_grad():
        model.q.adapters["default"].bias.fill_(3)
    save_adapter(model, tmp_path)
    name = "base_model.model.q.base_layer.bias"
    assert name in load_file(tmp_path / TENSOR_FILE)
    edit_tensors(lambda t: t.update({"base_model.model.q.bias": t.pop(name)}))(tmp_path)
    x = torch.randn(3, 6)
    assert torch.equal(load_adapter(Model(), tmp_path)(x), model(x))


def test_a_full_disk_leaves_the_old_adapter(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors import SafetensorError

    def full(*_: Any, **__: Any) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    model = load_adapter(Model(), saved)
    monkeypatch.setattr(saving, "save_file", full)
    with pytest.raises(OSError, match=r"what was there is unchanged: .*No space left"):
        save_adapter(model, saved)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before


def test_a_disk_that_is_really_full(saved: Path) -> None:
    """/dev/full answers every write with ENOSPC."""
    if not os.path.exists("/dev/full"):
        pytest.skip("this system has no /dev/full")
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    model = load_adapter(Model(), saved)

    def onto_full(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
        os.symlink("/dev/full", path)
        with open(path, "wb", buffering=0) as file:
            file.write(b"x")

    original = saving.save_file
    saving.save_file = onto_full  # type: ignore[assignment]
    try:
        with pytest.raises(OSError, match="No space left"):
            save_adapter(model, saved)
    finally:
        saving.save_file = original  # type: ignore[assignment]
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before


KILLED = """
import os, signal, sys, torch
from fastadapt import LoRAConfig, inject, save_adapter
model = inject(torch.nn.Sequential(torch.nn.Linear(4, 4)), LoRAConfig(r=2, lora_alpha=64, target_modules=["0"]))
replace, point = os.replace, int(sys.argv[2])
def counted(*paths):
    global point
    if point == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(*paths)
    point -= 1
os.replace = counted
save_adapter(model, sys.argv[1])
"""


def killed(directory: Path, point: int) -> None:
    """A save of a scaling of 32 into the directory that is killed before that step, the third being the end."""
    root = Path(__file__).parent.parent
    paths = {"PYTHONPATH": os.pathsep.join([str(root), str(root / "kernels")])}
    done = subprocess.run([sys.executable, "-c", KILLED, str(directory), str(point)], env={**os.environ, **paths})
    assert (done.returncode == 0) == (point == 2)


@pytest.mark.parametrize("point", range(3))
def test_a_save_that_is_killed_leaves_the_old_adapter_or_the_new(point: int, tmp_path: Path) -> None:
    """New tensors under the old config would load, and compute something else."""
    new = nn.Sequential(nn.Linear(4, 4))
    old = inject(copy.deepcopy(new), LoRAConfig(r=2, lora_alpha=2, target_modules=["0"]))
    save_adapter(old, tmp_path)
    (tmp_path / "README.md").write_text("of its owner")
    killed(tmp_path, point)
    loaded = load_adapter(copy.deepcopy(new), tmp_path)[0].adapters["default"]
    A = old[0].adapters["default"].lora_A
    assert loaded.scaling == (1 if point == 0 else 32)
    assert torch.equal(loaded.lora_A, A) == (point == 0)
    served = read_adapter(new, tmp_path)
    assert served.forms["0"].out_scale == loaded.scaling
    assert torch.equal(served.forms["0"].A, loaded.lora_A)
    assert read_fields(tmp_path)["lora_alpha"] == 2 * loaded.scaling
    assert describe_adapter(tmp_path)["alpha"] == str(read_fields(tmp_path)["lora_alpha"])
    assert (tmp_path / "README.md").read_text() == "of its owner"
    save_adapter(old, tmp_path)  # over what is left
    assert load_adapter(new, tmp_path)[0].adapters["default"].scaling == 1


@pytest.mark.parametrize("point", range(2))
def test_a_first_save_that_is_killed_is_no_adapter(point: int, tmp_path: Path) -> None:
    killed(tmp_path, point)
    with pytest.raises(FileNotFoundError, match=r"adapter_\S+ does not exist: .*; \.writing-\S+ in it has"):
        load_adapter(nn.Sequential(nn.Linear(4, 4)), tmp_path)


@pytest.mark.parametrize("between", [False, True])
def test_a_config_that_was_edited_counts(between: bool, saved: Path) -> None:
    if between:  # after a save over another config
        save_adapter(inject(Model(), LoRAConfig(r=2, lora_alpha=4, target_modules=["q", "v"])), saved)
    edit_config(lora_alpha=6)(saved)
    assert load_adapter(Model(), saved).q.adapters["default"].scaling == 3
    assert read_adapter(Model(), saved).forms["q"].out_scale == 3
    assert read_fields(saved)["lora_alpha"] == 6


def parsed(content: bytes) -> TensorFile:
    return TensorFile(content, parse_header(content, Path("x"), len(content)))


def test_what_is_read_while_it_is_written_is_of_one_save(tmp_path: Path) -> None:
    """Whichever of six saves, of two configs, one of them twice, and a third, each step of a reader falls between."""
    model = inject(Model(), LoRAConfig(r=2, target_modules=["q", "v"]))
    states: list[dict[str, bytes]] = []
    versions: dict[bytes, bytes] = {}
    for number, alpha in enumerate([2, 4, 4, 2, 6, 2]):
        adapter_configs(model)["default"].lora_alpha = alpha
        with torch.no_grad():
            model.q.adapters["default"].lora_B.fill_(number)
        save_adapter(model, tmp_path)
        new = {name: (tmp_path / name).read_bytes() for name in (CONFIG_FILE, TENSOR_FILE)}
        versions[new[TENSOR_FILE]] = new[CONFIG_FILE]
        if states:
            states.append({**states[-1], TENSOR_FILE: new[TENSOR_FILE]})
        states.append(new)
    assert len(versions) == 6
    for times in itertools.combinations_with_replacement(range(len(states)), 5):
        clock = iter([*times, *[len(states) - 1] * 10])
        config, tensors = of_one_save(
            lambda clock=clock: states[next(clock)][CONFIG_FILE],
            lambda clock=clock: parsed(states[next(clock)][TENSOR_FILE]),
            lambda clock=clock: states[next(clock)][TENSOR_FILE],
        )
        assert config == versions[tensors.content]


def test_the_same_adapter_is_the_same_bytes(saved: Path, tmp_path: Path) -> None:
    model = load_adapter(Model(), saved)
    for name in "ab":
        save_adapter(model, tmp_path / name)
    save_adapter(model, tmp_path / "b")
    assert (tmp_path / "a" / TENSOR_FILE).read_bytes() == (tmp_path / "b" / TENSOR_FILE).read_bytes()


def test_a_directory_that_never_rests_is_refused_at_last(saved: Path) -> None:
    numbers = itertools.count()
    config, tensors = (saved / CONFIG_FILE).read_bytes(), parsed((saved / TENSOR_FILE).read_bytes())
    with pytest.raises(ValueError, match="change each time that they are read"):
        of_one_save(lambda: config, lambda: tensors, lambda: next(numbers))


def test_peft_reads_what_says_its_own_config(saved: Path) -> None:
    import peft

    model = inject(Model(), LoRAConfig(r=3, lora_alpha=5, target_modules=["q"], init_lora_weights=False))
    save_adapter(model, saved)
    x = torch.randn(2, 6)
    torch.testing.assert_close(peft.PeftModel.from_pretrained(Model(), saved)(x), model(x))


def test_saving_over_an_adapter_replaces_it_whole(saved: Path) -> None:
    model = inject(Model(), DoRAConfig(r=3, target_modules=["q"]))
    save_adapter(model, saved)
    assert sorted(path.name for path in saved.iterdir()) == [CONFIG_FILE, TENSOR_FILE]
    x = torch.randn(2, 6)
    assert torch.equal(load_adapter(Model(), saved)(x), model(x))


def test_unknown_adapter_names_are_named(saved: Path) -> None:
    model = load_adapter(Model(), saved)
    with pytest.raises(ValueError, match="adapter 'other' is not in the model: it has 'default'"):
        save_adapter(model, saved, "other")
    with pytest.raises(ValueError, match="adapter 'default' is in the model already"):
        load_adapter(model, saved)


def test_vera_is_regenerated_from_its_key(tmp_path: Path) -> None:
    model = inject(Model(), VeRAConfig(r=8, target_modules=["q", "v"], projection_prng_key=3))
    save_adapter(model, tmp_path)
    tensors = load_file(tmp_path / TENSOR_FILE)
    edit_config(save_projection=False)(tmp_path)
    edit_tensors(lambda t: (t.pop("base_model.vera_A"), t.pop("base_model.vera_B")))(tmp_path)
    projection = load_adapter(Model(), tmp_path).q.adapters["default"].projection
    assert torch.equal(projection.vera_A, tensors["base_model.vera_A"])
    assert torch.equal(projection.vera_B, tensors["base_model.vera_B"])


# Heads that a task type brings.

HEADS: dict[str, Any] = {"task_type": "SEQ_CLS", "modules_to_save": ["classifier", "score"]}


class Classifier(Model):
    def __init__(self) -> None:
        super().__init__()
        self.score = nn.Linear(9, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.score(super().forward(x))
        return y


@pytest.fixture
def classifier(tmp_path: Path) -> Path:
    config = LoRAConfig(r=2, target_modules=["q", "v"], init_lora_weights=False, task_type="SEQ_CLS")
    save_adapter(inject(Classifier(), config), tmp_path / "classifier")
    return tmp_path / "classifier"


def test_a_task_without_its_head_loads_where_the_file_has_none(saved: Path) -> None:
    x = torch.randn(2, 6)
    expected = load_adapter(Model(), saved)(x)
    edit_config(**HEADS)(saved)
    assert torch.equal(load_adapter(Model(), saved)(x), expected)
    edit_config(modules_to_save=["classifier", "score", "head"])(saved)
    with pytest.raises(ValueError, match="modules_to_save: no module of Model is called 'head'"):
        load_adapter(Model(), saved)


def test_a_head_in_the_file_must_have_its_place(classifier: Path) -> None:
    with pytest.raises(ValueError, match=r"base_model\.model\.score\.bias does not belong to this config and model"):
        load_adapter(Model(), classifier)
    edit_tensors(lambda tensors: tensors.pop("base_model.model.score.weight"))(classifier)
    with pytest.raises(ValueError, match=r"base_model\.model\.score\.weight is missing"):
        load_adapter(Classifier(), classifier)


def test_a_file_that_does_not_name_the_tasks_head_leaves_it_alone(saved: Path) -> None:
    edit_config(task_type="SEQ_CLS")(saved)
    model = load_adapter(Classifier(), saved)
    assert type(model.score) is nn.Linear
    save_adapter(model, saved)
    load_adapter(Classifier(), saved)
