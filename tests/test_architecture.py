"""The floor plan holds: imports point one way, and importing the package is free of Triton and devices."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Each layer may import the layers before it.
LAYERS = [
    {"fastadapt_kernels"},
    {"files", "progress", "reference", "report", "versions", "checks", "patterns"},
    {"operators"},
    {"forms", "functional", "groups", "layers"},
    {"methods"},
    {"targets", "inject", "checkpoint", "combine", "selection", "optim", "incremental_pca", "eva"}
    | {"search", "search_spaces"},
    {"recipes"},
    {"serving", "integrations", "doctor", "demo", "demo_assets", "demo_compare", "demo_serving"}
    | {"demo_training", "cli"}
    | {"train", "train_data", "train_loop", "train_options", "train_report", "train_state"},
]


def rank(module: str) -> int:
    for index, names in enumerate(LAYERS):
        if module in names:
            return index
    raise AssertionError(f"{module} has no place in the floor plan")


def imported(path: Path) -> set[str]:
    """First components below fastadapt (or fastadapt_kernels) that a file imports, relative imports resolved."""
    package = path.relative_to(ROOT).with_suffix("").parts
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            targets = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level]) if node.level else []
            base += (node.module or "").split(".") if node.module else []
            targets = [[*base, alias.name] for alias in node.names]
        else:
            continue
        for target in targets:
            if target[0] == "fastadapt" and len(target) > 1 and target[1] not in ("__init__",):
                names.add(target[1])
            elif target[0] == "fastadapt_kernels":
                names.add("fastadapt_kernels")
    return names


FILES = [
    path for path in (ROOT / "fastadapt").rglob("*.py") if path.name != "__init__.py" or path.parent.name != "fastadapt"
]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path: Path) -> None:
    own = path.relative_to(ROOT / "fastadapt").with_suffix("").parts[0]
    for name in imported(path):
        if any(name in names for names in LAYERS):
            assert rank(name) <= rank(own), f"{own} must not import {name}"


def test_the_kernels_know_nothing_above_them() -> None:
    for path in (ROOT / "kernels" / "fastadapt_kernels").glob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        modules = {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        modules |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        assert not any(module.split(".")[0] == "fastadapt" for module in modules), path
        assert "torch.autograd" not in path.read_text(encoding="utf-8"), path


def test_importing_the_package_takes_neither_triton_nor_the_extras() -> None:
    program = (
        "import sys, torch\n"
        "for name in ('triton', 'typer', 'transformers', 'peft', 'rich', 'fastadapt_kernels'):\n"
        "    sys.modules[name] = None  # as if it were not installed\n"
        "import fastadapt\n"
        "assert not torch.cuda.is_initialized()\n"
        "layer = torch.nn.Linear(4, 3)\n"
        "model = fastadapt.inject(torch.nn.Sequential(layer), fastadapt.DoRAConfig(r=2, target_modules=['0']))\n"
        "model(torch.ones(2, 4)).sum().backward()\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


def test_the_top_level_holds_only_what_it_should() -> None:
    names = {path.name for path in ROOT.iterdir() if not path.name.startswith(".")}
    generated = {"build", "dist", "fastadapt.egg-info", "__pycache__", "fastadapt-demo"}
    assert names - generated <= {"pyproject.toml", "README.md", "fastadapt", "kernels", "tests", "bench"}
