"""What is installed: the wheel, its extras, and what everything says of versions."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import oldest_triton
import pytest
import tomllib
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import fastadapt
from bench import audit
from fastadapt.commands.cli import EXTRAS
from fastadapt.environment import versions

ROOT = Path(__file__).parent.parent
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
OPTIONAL: dict[str, list[str]] = PROJECT["project"]["optional-dependencies"]


def run(*command: object, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, env=os.environ | environment
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_old_tritons_are_tried_with_all_that_the_package_needs() -> None:
    pinned = {name: version for name, version in (package.split("==") for package in oldest_triton.PACKAGES)}
    needed = [Requirement(text) for text in (*PROJECT["project"]["dependencies"], *OPTIONAL["cli"])]
    for requirement in needed:
        version = pinned.get(requirement.name, "") if requirement.name != "torch" else oldest_triton.oldest_torch()
        assert version, f"{requirement.name} is not installed"
        assert version in requirement.specifier


def test_old_tritons_interpret_every_file_of_kernel_tests() -> None:
    assert {Path(path).name for path in oldest_triton.TESTS} == {
        path.name for path in ROOT.glob("tests/test_*kernels.py")
    }


def test_old_tritons_compile_for_targets_that_the_audit_knows() -> None:
    for expected in oldest_triton.EXPECTED.values():
        chosen = dict(zip(expected.chosen[::2], expected.chosen[1::2], strict=True))
        assert set(chosen["--targets"].split(",")) <= set(audit.TARGETS)
        assert set(chosen.get("--dtypes", "bf16").split(",")) <= set(audit.DTYPES)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this checkout, built from a copy: a build leaves its folders beside the sources."""
    pytest.importorskip("pip")
    place = tmp_path_factory.mktemp("wheel")
    source = place / "source"
    for folder in ("fastadapt", "kernels"):
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, source)
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--disable-pip-version-check")
    run("-m", "pip", "wheel", *options, "--wheel-dir", place, source)
    (built,) = place.glob("*.whl")
    return built


def test_the_wheel_holds_the_package_its_kernels_and_nothing_else(wheel: Path) -> None:
    assert wheel.name == f"fastadapt-{fastadapt.__version__}-py3-none-any.whl"
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.partition("/")[0] for name in names} == {
        "fastadapt",
        "fastadapt_kernels",
        f"fastadapt-{fastadapt.__version__}.dist-info",
    }
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "fastadapt").rglob("*.py")}
    sources |= {str(path.relative_to(ROOT / "kernels")) for path in (ROOT / "kernels").rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == sources
    assert "fastadapt/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_an_installed_wheel_works_outside_the_checkout(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "site"
    run("-m", "pip", "install", "--no-deps", "--no-index", "--quiet", "--target", target, wheel)
    program = (
        "import fastadapt, fastadapt_kernels, torch\n"
        "from importlib.metadata import entry_points, version\n"
        f"assert fastadapt.__file__.startswith({str(target)!r}), fastadapt.__file__\n"
        f"assert fastadapt_kernels.__file__.startswith({str(target)!r})\n"
        "assert version('fastadapt') == fastadapt.__version__\n"
        "model = torch.nn.Sequential(torch.nn.Linear(4, 3))\n"
        "fastadapt.inject(model, fastadapt.DoRAConfig(r=2, target_modules=['0']))\n"
        "model(torch.ones(2, 4)).sum().backward()\n"
        "fastadapt.save_adapter(model, 'adapter')\n"
        "import sys; sys.argv = ['fastadapt', 'info', 'adapter']\n"
        "(command,) = [e for e in entry_points(group='console_scripts') if e.name == 'fastadapt']\n"
        "command.load()()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(target)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "DoRA" in done.stdout


def test_one_version_everywhere() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", fastadapt.__version__)
    assert versions()["fastadapt"] == fastadapt.__version__
    assert "__version__" in fastadapt.__all__


def requirements(extra: str) -> dict[str, Requirement]:
    """An extra's requirements by name, those of the extras that it takes included."""
    found: dict[str, Requirement] = {}
    for requirement in map(Requirement, OPTIONAL[extra]):
        if requirement.name == "fastadapt":
            for other in requirement.extras:
                found |= requirements(other)
        else:
            found[requirement.name] = requirement
    return found


def pinned(requirement: Requirement) -> bool:
    return [part.operator for part in requirement.specifier] == ["=="]


def test_ranges_replace_nobodys_torch_and_the_two_commands_are_pinned() -> None:
    for extra in ("cli", "train"):
        assert "torch" not in requirements(extra)
        assert not any(map(pinned, requirements(extra).values()))
        assert all(requirement.specifier for requirement in requirements(extra).values())
    for extra in ("demo", "test"):
        assert all(map(pinned, requirements(extra).values()))
        assert "torch" in requirements(extra)
    # What is pinned lies in the ranges, so one environment does for both.
    tested = requirements("test")
    for extra in ("cli", "train"):
        for name, requirement in requirements(extra).items():
            (pin,) = tested[name].specifier
            assert requirement.specifier.contains(pin.version), name
    for requirement in map(Requirement, PROJECT["project"]["dependencies"]):
        assert not pinned(requirement)


def test_the_extra_that_is_named_has_what_is_missing() -> None:
    for module, extra in EXTRAS.items():
        assert module in requirements(extra) if extra != "triton" else OPTIONAL["triton"]


def test_the_pythons_agree() -> None:
    oldest = PROJECT["project"]["requires-python"].removeprefix(">=")
    assert PROJECT["tool"]["mypy"]["python_version"] == oldest
    assert PROJECT["tool"]["ruff"]["target-version"] == f"py{oldest.replace('.', '')}"
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert f"takes any Python from {oldest}" in readme
    torch = next(Requirement(text) for text in PROJECT["project"]["dependencies"] if text.startswith("torch"))
    assert torch.specifier == SpecifierSet(f">={re.findall(r'torch from ([0-9.]+[0-9])', readme)[0]}")
