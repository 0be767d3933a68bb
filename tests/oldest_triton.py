"""The kernel tests and the quick audit with the oldest torch that pyproject.toml admits and the Triton that it brings.

``python tests/oldest_triton.py [DIRECTORY]`` makes a virtual environment in DIRECTORY, or uses the one that is there,
by default a temporary one. It is no part of the test suite: that torch brings several gigabytes of CUDA libraries.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# The interpreter of old Tritons takes one-element arrays for numbers, which later NumPys refuse.
PACKAGES = ["numpy==2.2.6", "safetensors==0.5.3", "pytest==9.2.0", "typer==0.29.2", "rich==15.0.0"]
WARNING = "ignore:Conversion of an array:DeprecationWarning"
# The wheels of old Tritons have no linker for AMD.
TARGETS = "sm_80,sm_90"


def check(directory: Path) -> None:
    """Make the environment, and run both in it; CalledProcessError if one fails."""
    floor = re.search(r'"torch>=([\d.]+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    if floor is None:
        raise ValueError("pyproject.toml has no torch>=VERSION")
    python = directory / "bin" / "python"
    if not python.exists():
        venv.create(directory, with_pip=True)
    torch = f"torch=={floor[1]}.*"
    subprocess.run([python, "-m", "pip", "install", "--quiet", torch, *PACKAGES], check=True)
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    for command in (
        ["-c", "import torch, triton; print('torch', torch.__version__, 'triton', triton.__version__)"],
        ["-m", "pytest", "-p", "no:cacheprovider", "-W", WARNING, "tests/test_kernels.py"],
    ):
        subprocess.run([python, *command], cwd=ROOT, env=environment, check=True)
    with tempfile.TemporaryDirectory() as scratch:
        found = Path(scratch) / "audit.json"
        audit = [python, "-m", "bench", "audit", "--quick", "--targets", TARGETS, "--json", found]
        subprocess.run(audit, cwd=ROOT, env=environment, check=False)  # an older compiler may spill: that is no failure
        rows = json.loads(found.read_text(encoding="utf-8"))["rows"]
    wrong = [row for row in rows if "error" in row or row["shared_bytes"] > row["shared_limit"] or row["dots_left"]]
    if wrong:
        raise SystemExit(f"{len(wrong)} of {len(rows)} kernels do not compile, do not fit or miss the matrix unit")
    print(f"{len(rows)} kernels compile and fit; {sum(row['spill_bytes'] > 0 for row in rows)} spill a little")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        check(Path(sys.argv[1]).resolve())
    else:
        with tempfile.TemporaryDirectory() as scratch:
            check(Path(scratch))
