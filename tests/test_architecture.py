"""The floor plan holds: imports point one way, folder by folder and file by file; importing the package is free of
Triton and devices."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Each floor may import those before it: a folder of fastadapt, or a file that lies directly in it.
FLOORS = [
    {"reference", "checks", "files", "environment", "staleness", "progress"},
    {"operators"},
    {"forms", "functional"},
    {"layers"},
    {"methods"},
    {"model"},
    {"training", "serving"},
    {"integrations"},
    {"optim"},
    {"__init__"},
    {"commands"},
]

# The operators that are eager alone: there is no kernel for them.
EAGER_ALONE = {"adapter_update"}

# What every operator's folder has.
ROOMS = {"__init__.py", "checks.py", "eager.py", "op.py", "function.py"}


def modules(root: Path) -> dict[str, Path]:
    """The files of the package by dotted name; a folder's own is its __init__."""
    found = {}
    for path in sorted((root / "fastadapt").rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(name: str, path: Path, known: dict[str, Path]) -> Iterator[str]:
    """The modules that a file imports, wherever in it: inside of functions and for type checkers as well."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            base = ".".join(parts[: len(parts) - node.level + 1]) if node.level else ""
            source = ".".join(filter(None, (base, node.module)))
            for alias in node.names:
                whole = f"{source}.{alias.name}"
                yield whole if whole in known else source


def graph(root: Path) -> dict[str, set[str]]:
    """Which module imports which, inside the package."""
    known = modules(root)
    return {
        name: {other for other in imported(name, path, known) if other in known and other != name}
        for name, path in known.items()
    }


def floor(name: str) -> int:
    room = [*name.split("."), "__init__"][1]
    for index, rooms in enumerate(FLOORS):
        if room in rooms:
            return index
    raise AssertionError(f"{name} has no place in the floor plan")


def against_the_floors(root: Path) -> list[str]:
    """Imports from a floor above, and of the command line by one of its commands."""
    found = []
    for name, others in graph(root).items():
        found += [f"{name} imports {other}, which lies above it" for other in others if floor(other) > floor(name)]
        if "fastadapt.commands.cli" in others:
            found.append(f"{name} imports the command line, which knows all commands")
        if name != "fastadapt" and "fastadapt" in others and floor(name) < floor("fastadapt"):
            found.append(f"{name} imports the package itself")
    return found


def circles(root: Path) -> list[set[str]]:
    """Modules that import each other in a circle, of two and more."""
    edges = graph(root)

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        waiting = [start]
        while waiting:
            for other in edges[waiting.pop()] - seen:
                seen.add(other)
                waiting.append(other)
        return seen

    reach = {name: reached(name) for name in edges}
    return [{name, *(other for other in seen if name in reach[other])} for name, seen in reach.items() if name in seen]


def unfurnished(root: Path) -> list[str]:
    """Folders of operators without one of their rooms, their reference or their kernels."""
    found = []
    reference = (root / "fastadapt" / "reference.py").read_text(encoding="utf-8")
    for folder in sorted((root / "fastadapt" / "operators").iterdir()):
        if not folder.is_dir() or folder.name == "__pycache__":
            continue
        missing = ROOMS - {path.name for path in folder.iterdir()}
        found += [f"{folder.name} has no {name}" for name in sorted(missing)]
        if f"def {folder.name}_reference(" not in reference:
            found.append(f"{folder.name} has no {folder.name}_reference")
        kernels = root / "kernels" / "fastadapt_kernels"
        if folder.name not in EAGER_ALONE and not any(
            f"def {folder.name}(" in path.read_text(encoding="utf-8") for path in kernels.glob("*.py")
        ):
            found.append(f"{folder.name} has no launcher among the kernels")
    return found


RULES: list[Callable[[Path], object]] = [against_the_floors, circles, unfurnished]


@pytest.mark.parametrize("rule", RULES)
def test_the_house_follows_its_rules(rule: Callable[[Path], object]) -> None:
    assert rule(ROOT) == []


def late_import(of: str) -> Callable[[Path], None]:
    return lambda path: (
        path.write_text(f"{path.read_text()}\ndef _late():\n    import {of}\n    return {of}\n") and None
    )


VIOLATIONS: dict[str, tuple[Callable[[Path], object], str, Callable[[Path], object]]] = {
    "the specification imports an operator": (
        against_the_floors,
        "reference.py",
        late_import("fastadapt.operators.multi_adapter_linear.plan"),
    ),
    "serving imports a command": (against_the_floors, "serving/pool.py", late_import("fastadapt.commands.report")),
    "a command imports the command line": (
        against_the_floors,
        "commands/merge.py",
        late_import("fastadapt.commands.cli"),
    ),
    "an operator imports the layers": (
        against_the_floors,
        "operators/masks.py",
        late_import("fastadapt.layers.layer"),
    ),
    "two files of one folder": (
        circles,
        "operators/adapter_linear/member.py",
        late_import("fastadapt.operators.adapter_linear.eager"),
    ),
    "two files of two floors' folders": (circles, "layers/layer.py", late_import("fastadapt.layers.wrap")),
    "a missing room": (unfurnished, "operators/bottleneck/checks.py", Path.unlink),
}


@pytest.mark.parametrize("name", VIOLATIONS)
def test_a_planted_violation_is_noticed(name: str, tmp_path: Path) -> None:
    rule, file, plant = VIOLATIONS[name]
    for folder in ("fastadapt", "kernels"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    assert rule(tmp_path) == []
    plant(tmp_path / "fastadapt" / file)
    assert rule(tmp_path) != []


def test_few_files_lie_in_the_hall_and_none_is_long() -> None:
    assert len(list((ROOT / "fastadapt").glob("*.py"))) <= 10
    lengths = {
        path.relative_to(ROOT): len(path.read_text(encoding="utf-8").splitlines())
        for folder in ("fastadapt", "kernels")
        for path in (ROOT / folder).rglob("*.py")
    }
    assert {path: length for path, length in lengths.items() if length > 550} == {}


def test_the_kernels_know_nothing_above_them() -> None:
    for path in (ROOT / "kernels" / "fastadapt_kernels").glob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        names |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        assert not any(name.split(".")[0] == "fastadapt" for name in names), path
        assert "torch.autograd" not in path.read_text(encoding="utf-8"), path


def test_importing_the_package_takes_neither_triton_nor_the_extras() -> None:
    program = (
        "import sys, torch\n"
        "for name in ('triton', 'typer', 'transformers', 'trl', 'peft', 'rich', 'fastadapt_kernels'):\n"
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
    assert names - generated <= {"pyproject.toml", "README.md", "LICENSE", "fastadapt", "kernels", "tests", "bench"}
