"""A method of another package is one file: defined, it is trained, saved, loaded, merged, served and told like ours."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import pytest
import torch
from test_train import answers, tokenizer
from tiny_models import llama, output, randomise, tokens
from torch import Tensor

from bench import tables as tables_bench
from fastadapt import DoRAConfig, LoRAConfig, VeRAConfig, inject, load_adapter, merge, save_adapter, unmerge
from fastadapt.commands import plugins
from fastadapt.commands.train.options import Options
from fastadapt.methods import METHODS, PEFT_TYPES, AdapterConfig, hira, table
from fastadapt.model.inject import control
from fastadapt.model.peft_files import method_of
from fastadapt.serving import MultiAdapterModel
from fastadapt.training.recipes import RECIPES, recipes

ROOT = Path(__file__).parent.parent

# The whole of somebody else's method.
SCALAR_LORA = '''
"""Scalar LoRA: y = W0 x + b0 + s·B A x̃, the scalar s trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from fastadapt import AdapterForm
from fastadapt.checks import check_probability
from fastadapt.layers.kinds import AdapterConv2d, AdapterEmbedding
from fastadapt.layers.layer import Adapter
from fastadapt.layers.linear import AdapterLinear
from fastadapt.methods import AdapterConfig


class ScalarLoRAAdapter(Adapter):
    suffixes = {name: name for name in ("scalar_A", "scalar_B", "scalar_s")}

    def __init__(self, layer, config, dtype):
        super().__init__(config.scalar_dropout)
        weight = layer.weight_matrix
        n, k = weight.shape
        start = {
            "scalar_A": torch.randn(config.r, k) / config.r,
            "scalar_B": torch.zeros(n, config.r),
            "scalar_s": torch.tensor(config.scalar_alpha / config.r),
        }
        for name, value in start.items():
            self.add_tensor(name, value, weight, dtype)

    def form(self, weight, bias):
        return AdapterForm(self.scalar_A, self.scalar_B, out_scale=self.scalar_s, bias=bias)


@dataclass
class ScalarLoRAConfig(AdapterConfig):
    peft_type: ClassVar[str] = "SCALAR_LORA"
    title: ClassVar[str] = "Scalar LoRA"
    adapter_classes = (ScalarLoRAAdapter,)
    layer_kinds = (AdapterLinear,)

    r: int = 4
    scalar_alpha: float = 8
    scalar_dropout: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        check_probability("scalar_dropout", self.scalar_dropout)

    @property
    def dropout(self):
        return self.scalar_dropout

    def build(self, layers, dtype_of):
        return {path: ScalarLoRAAdapter(layer, self, dtype_of(layer.like)) for path, layer in layers.items()}
'''


@pytest.fixture(autouse=True)
def the_tables_are_put_back() -> Iterator[None]:
    with mock.patch.dict(METHODS), mock.patch.dict(RECIPES):
        yield


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder as pip leaves it: the method's file, and a dist-info whose entry point names it."""
    return installed(tmp_path / "site", "scalar_lora", SCALAR_LORA)


def installed(site: Path, name: str, code: str) -> Path:
    info = site / f"{name}-0.3.dist-info"
    info.mkdir(parents=True)
    (site / f"{name}.py").write_text(code, encoding="utf-8")
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: 0.3\n")
    (info / "entry_points.txt").write_text(f"[fastadapt.methods]\n{name} = {name}\n")
    return site


@pytest.fixture
def scalar(site: Path) -> Iterator[type[AdapterConfig]]:
    """The config that the method's file defines."""
    spec = importlib.util.spec_from_file_location("scalar_lora", site / "scalar_lora.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with mock.patch.dict(sys.modules, {"scalar_lora": module}):  # dataclass asks for it there
        spec.loader.exec_module(module)
        yield module.ScalarLoRAConfig


def command(*arguments: Any, site: Path) -> subprocess.CompletedProcess[str]:
    """`fastadapt` in a process of its own, with the packages in this folder beside those that are installed."""
    paths = os.pathsep.join([str(site), str(ROOT), str(ROOT / "kernels")])
    program = "from fastadapt.commands.cli import main; main()"
    return subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": paths, "COLUMNS": "150"},
        capture_output=True,
        text=True,
    )


def trained(model: Any, steps: int = 8) -> list[float]:
    """The losses of a few steps on the same tokens."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer, between, inputs = torch.optim.AdamW(parameters, lr=0.02), control(model), tokens()
    losses = []
    for _ in range(steps):
        loss = model(inputs, labels=inputs).loss
        (loss + between.regularizer()).backward()
        optimizer.step()
        between.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    return losses


@pytest.mark.parametrize("backend", ["eager", "reference"])
def test_it_trains_and_every_parameter_moves(scalar: type[AdapterConfig], backend: str) -> None:
    model = llama()
    before = output(model, tokens())
    inject(model, scalar(target_modules="all-linear"), backend=backend)
    torch.testing.assert_close(output(model, tokens()), before)
    start = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    assert {name.rpartition(".")[2] for name in start} == {"scalar_A", "scalar_B", "scalar_s"}
    losses = trained(model.train())
    assert losses[-1] < losses[0]
    assert all(not torch.equal(p, start[name]) for name, p in model.named_parameters() if name in start)


def test_it_is_saved_loaded_and_merged(scalar: type[AdapterConfig], tmp_path: Path) -> None:
    model = inject(llama(), scalar(target_modules=["q_proj", "down_proj"]))
    trained(model.train())
    save_adapter(model, tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["peft_type"] == "SCALAR_LORA"
    expected = output(model, tokens())
    assert torch.equal(output(load_adapter(llama(), tmp_path / "adapter"), tokens()), expected)
    merge(model)
    torch.testing.assert_close(output(model, tokens()), expected)
    unmerge(model)
    assert torch.equal(output(model, tokens()), expected)


def test_it_shares_a_batch_with_others(scalar: type[AdapterConfig], tmp_path: Path) -> None:
    configs = {"ours": LoRAConfig(r=3, target_modules="all-linear"), "theirs": scalar(target_modules="all-linear")}
    alone: dict[str | None, Tensor] = {None: output(llama(), tokens(5))}
    for index, (name, config) in enumerate(configs.items()):
        model = inject(llama(), config)
        randomise([parameter for parameter in model.parameters() if parameter.requires_grad], seed=index)
        save_adapter(model, tmp_path / name)
        alone[name] = output(model, tokens(5))
    served = MultiAdapterModel(llama(), budget=1 << 24)
    for name in configs:
        served.load(tmp_path / name, name=name)
    names = ["theirs", None, "ours", "theirs", "ours"]
    logits = served(input_ids=tokens(5), adapter_ids=names).logits
    for row, name in enumerate(names):
        torch.testing.assert_close(logits[row], alone[name][row])
    assert torch.equal(logits[1], alone[None][1])
    assert not torch.allclose(alone["theirs"], alone[None], atol=1e-3)


def test_the_command_line_trains_and_tells_it(site: Path, tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    data = answers(tmp_path / "data.jsonl")
    help_text = command("train", "--help", site=site)
    assert "scalar-lora" in help_text.stdout
    assert "hira" in help_text.stdout
    arguments = ["train", tmp_path / "base", data, tmp_path / "out", "--method", "scalar-lora", "--steps", 4, "--r", 3]
    done = command(*arguments, "--dropout", 0.1, "--alpha", 5, "--device", "cpu", site=site)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr
    fields = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert {name: fields[name] for name in ("peft_type", "r", "scalar_alpha", "scalar_dropout")} == {
        "peft_type": "SCALAR_LORA",
        "r": 3,
        "scalar_alpha": 5,
        "scalar_dropout": 0.1,
    }
    again = command(*arguments, "--dropout", 0.1, "--alpha", 5, "--device", "cpu", site=site)
    assert "is finished: 4 steps" in again.stdout
    told = command("info", tmp_path / "out", site=site)
    assert told.returncode == 0, told.stderr
    text = " ".join(told.stdout.replace("│", " ").split())
    for words in ("method Scalar LoRA", "layers 14 ", "r 3 ", "alpha 5", "dropout 0.1", "can load it"):
        assert words in text
    merged = command("merge", tmp_path / "base", tmp_path / "out", tmp_path / "merged", site=site)
    assert merged.returncode == 0, merged.stderr
    # Without its package it is a method that nobody knows.
    unknown = command("info", tmp_path / "out", site=tmp_path / "nowhere")
    assert "peft_type 'SCALAR_LORA' is not supported" in " ".join(unknown.stdout.replace("│", " ").split())


BROKEN = {
    "an import that fails": ("import no_such_module_at_all", "ModuleNotFoundError: No module named"),
    "any error": ("raise KeyError('of several\\nlines')", "KeyError: 'of several"),
    "one that wants to leave": ("import sys; sys.exit('enough')", "SystemExit: enough"),
    "a taken type": (SCALAR_LORA.replace('"SCALAR_LORA"', '"LORA"'), "peft_type 'LORA' is taken by fastadapt.methods"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_package_is_a_warning(site: Path, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    code, reason = BROKEN[case]
    installed(site, "broken_method", code)
    monkeypatch.syspath_prepend(str(site))
    with mock.patch.dict(sys.modules):
        (warning,) = plugins.load_methods()
        for words in ("entry point 'broken_method' (fastadapt.methods) of broken-method 0.3 could not", reason):
            assert words in warning
        assert METHODS["SCALAR_LORA"].title == "Scalar LoRA"  # the others are there
        assert METHODS["LORA"] is LoRAConfig


def test_a_command_warns_in_one_line_and_goes_on(site: Path) -> None:
    installed(site, "broken_method", "raise ValueError('of several\\nlines')")
    done = command("train", "--help", site=site)
    (line,) = done.stderr.splitlines()
    assert line.startswith("warning: entry point 'broken_method'")
    assert "of several lines" in line
    assert done.returncode == 0
    assert "scalar-lora" in done.stdout


def test_the_library_loads_nobodys_methods(site: Path) -> None:
    installed(site, "broken_method", "raise SystemExit(3)")
    program = "import fastadapt, fastadapt.serving; from fastadapt.methods import METHODS; assert 'LORA' in METHODS"
    paths = os.pathsep.join([str(site), str(ROOT)])
    subprocess.run([sys.executable, "-c", program], check=True, env={**os.environ, "PYTHONPATH": paths})


def test_every_form_can_be_trained_by_name(scalar: type[AdapterConfig]) -> None:
    found = recipes()
    assert RECIPES.items() <= found.items()
    assert found.keys() - RECIPES.keys() == {"hira", "ssf", "repadapter", "scalar-lora"}
    assert (found["scalar-lora"].title, found["scalar-lora"].rank) == ("Scalar LoRA", 4)
    config = found["scalar-lora"].config(2, 3.0, 0.1, 10, target_modules=["x"], task_type="CAUSAL_LM")
    assert config == scalar(r=2, scalar_alpha=3.0, scalar_dropout=0.1, target_modules=["x"], task_type="CAUSAL_LM")
    defined(peft_type="STREAM", title="Of the stream", has_forms=False)
    assert recipes().keys() == found.keys()


UNTAKEN = {
    "hira": ((8, 5.0, 0.0), "HiRA has no alpha, got 5: leave it 16"),
    "vera": ((8, 5.0, 0.0), "VeRA has no alpha, got 5: leave it 16"),
    "glora": ((8, 16, 0.1), "GLoRA has no dropout, got 0.1: leave it 0"),
    "ssf": ((4, 8, 0.0), "SSF has no r, got 4: leave it 8"),
}


@pytest.mark.parametrize("name", UNTAKEN)
def test_an_option_that_a_method_has_not_is_refused(name: str) -> None:
    values, reason = UNTAKEN[name]
    with pytest.raises(ValueError, match=f"^{reason}$"):
        recipes()[name].config(*values, 10)


def test_a_package_may_bring_a_recipe_of_its_own(scalar: type[AdapterConfig], tmp_path: Path) -> None:
    RECIPES["scalar-lora"] = recipe = RECIPES["lora+"]
    assert recipes()["scalar-lora"] is recipe
    options = Options(model="m", data=tmp_path, output=tmp_path, method="scalar-lora")
    assert options.learning_rate == recipe.learning_rate


def defined(name: str = "Foreign", base: type[AdapterConfig] = AdapterConfig, **body: Any) -> type[AdapterConfig]:
    """A class of this name that such a body defines in a module of somebody else's."""
    found: type[AdapterConfig] = type(name, (base,), {"__module__": "theirs", "__qualname__": name, **body})
    return found


def test_a_class_that_sets_its_peft_type_is_in_the_table() -> None:
    foreign = defined(peft_type="FOREIGN", title="Foreign", aliases=("FOREIGN_TWO",))
    assert METHODS["FOREIGN"] is METHODS["FOREIGN_TWO"] is foreign
    assert method_of({"peft_type": "FOREIGN_TWO"}) is foreign
    assert "FOREIGN" not in PEFT_TYPES


def test_a_class_that_inherits_its_peft_type_is_a_variant() -> None:
    defined("Variant", LoRAConfig)
    assert METHODS["LORA"] is LoRAConfig
    assert DoRAConfig not in METHODS.values()
    assert METHODS["VERA"] is METHODS["DVORA"] is VeRAConfig
    # What it inherits beside it does not count either.
    defined("Other", VeRAConfig, peft_type="OTHER", title="Other")
    assert METHODS["DVORA"] is VeRAConfig
    assert "OTHER" not in PEFT_TYPES


def test_peft_types_are_those_that_peft_has() -> None:
    import peft

    known = {str(getattr(kind, "value", kind)) for kind in peft.PeftType}
    assert set(METHODS) & known == PEFT_TYPES


def test_the_same_name_replaces() -> None:
    former = defined(peft_type="FOREIGN", title="Foreign")
    again = defined(peft_type="FOREIGN", title="Foreign")
    assert METHODS["FOREIGN"] is again is not former
    before = METHODS["HIRA"]
    with mock.patch.dict(vars(hira)):
        importlib.reload(hira)
        assert METHODS["HIRA"] is hira.HiRAConfig is not before
    assert "HIRA" in PEFT_TYPES


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a taken type": (
        {"peft_type": "LORA", "title": "Mine"},
        r"theirs\.Foreign: peft_type 'LORA' is taken by fastadapt\.methods\.lora\.LoRAConfig: give the class another",
    ),
    "a taken alias": (
        {"peft_type": "MINE", "title": "Mine", "aliases": ("DVORA",)},
        r"'DVORA' is taken by .*VeRAConfig",
    ),
    "a taken title": ({"peft_type": "MINE", "title": "lora"}, r"title 'lora' is taken by .*LoRAConfig: give the class"),
    "an inherited title": ({"peft_type": "MINE", "base": LoRAConfig}, r"title 'LoRA' is taken by .*LoRAConfig"),
    "no title": ({"peft_type": "MINE"}, "peft_type, aliases and title must be text and not empty, got None: set them"),
    "an empty type": ({"peft_type": "", "title": "Mine"}, "must be text and not empty, got ''"),
    "aliases that are no tuple": (
        {"peft_type": "MINE", "title": "Mine", "aliases": "MINE_TWO"},
        "theirs.Foreign: aliases must be a tuple of names, got 'MINE_TWO'",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_enter_the_table_says_why(case: str) -> None:
    body, reason = REFUSED[case]
    before = dict(METHODS)
    with pytest.raises(ValueError, match=reason):
        defined(**body)
    assert before == METHODS


def test_a_class_body_in_a_notebook_is_enough() -> None:
    class Notebook(LoRAConfig):
        peft_type: ClassVar[str] = "NOTEBOOK"
        title: ClassVar[str] = "Notebook"

    assert METHODS["NOTEBOOK"] is Notebook


def test_the_readme_names_every_method() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    tables = readme.partition("\n## Methods\n")[2].partition("\n## ")[0].splitlines()
    rows = {line.split("|")[1].partition("(")[0].strip() for line in tables if line.startswith("| ")}
    assert {known.title for known in (*METHODS.values(), *RECIPES.values())} - rows == set()
    assert tables_bench.with_tables(readme) == readme, "python -m bench tables writes them anew"
    listed = readme.partition("`--method` is any row")[2].partition("OUTPUT")[0]
    assert [name for name in recipes() if f"`{name}`" not in listed] == []


def test_a_method_that_says_no_row_has_one_all_the_same() -> None:
    class Wordless(LoRAConfig):
        peft_type: ClassVar[str] = "WORDLESS"
        title: ClassVar[str] = "Wordless"

    assert "| Wordless | `Wordless` | – | – | – | – | – |" in table.markdown(table.FORMS).splitlines()
