"""The kernel tests and the quick audit with an older torch and the Triton that it brings: the oldest by default.

``python tests/oldest_triton.py [DIRECTORY [TORCH]]`` makes a virtual environment in DIRECTORY, or uses the one that is
there, by default a temporary one. TORCH is a version such as 2.11, by default the oldest that pyproject.toml admits. It
is no part of the test suite: such a torch brings several gigabytes of CUDA libraries.
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
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
# The interpreter of old Tritons takes one-element arrays for numbers, which later NumPys refuse.
PACKAGES = ["numpy==2.2.6", "safetensors==0.5.3", "regex==2024.5.15", "pytest==9.2.0", "typer==0.29.2", "rich==15.0.0"]
TESTS = ["tests/test_kernels.py", "tests/test_expert_kernels.py"]
WARNING = "ignore:Conversion of an array:DeprecationWarning"


class Expected(NamedTuple):
    """What a Triton is asked to compile, and the bytes that it is known to spill in a kernel; of others none."""

    chosen: list[str]
    spilled: dict[str, int]


# The wheels of Triton 3.3 have no linker for AMD. Its spills of more than 32 bytes are in fp32.
EXPECTED = {
    "3.3": Expected(
        ["--targets", "sm_80,sm_90"],
        {
            "_adapter_linear_kernel": 208,
            "_adapter_linear_dx_kernel": 8,
            "_expert_product_kernel": 16,
            "_output_grads_kernel": 8,
            "_shrink_kernel": 8,
        },
    ),
    "3.6": Expected(
        ["--targets", "sm_80,sm_86,sm_89,sm_90,sm_100,sm_120,gfx942,gfx950", "--dtypes", "bf16"],
        {
            "_adapter_linear_kernel": 16,
            "_expert_product_kernel": 8,
            "_output_grads_kernel": 8,
            "_row_squares_kernel": 8,
            "_shrink_kernel": 8,
        },
    ),
}


def check(directory: Path, torch: str | None = None) -> None:
    """Make the environment, and run both in it; CalledProcessError or SystemExit if one fails."""
    python = directory / "bin" / "python"
    if not python.exists():
        venv.create(directory, with_pip=True)
    packages = [f"torch=={torch or oldest_torch()}.*", *PACKAGES]
    subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], check=True)
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])

    def run(*command: Any, check: bool = True) -> str:
        done = subprocess.run([python, *command], cwd=ROOT, env=environment, check=check, stdout=subprocess.PIPE)
        return done.stdout.decode()

    found = run("-c", "import torch, triton; print('torch', torch.__version__, 'triton', triton.__version__)")
    print(found, run("-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", WARNING, *TESTS))
    expected = EXPECTED[".".join(found.split()[-1].split(".")[:2])]
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "audit.json"
        # An older compiler may spill: that is no failure by itself.
        run("-m", "bench", "audit", "--quick", *expected.chosen, "--json", file, check=False)
        rows = json.loads(file.read_text(encoding="utf-8"))["rows"]
    wrong = [row for row in rows if "error" in row or row["shared_bytes"] > row["shared_limit"] or row["dots_left"]]
    if wrong:
        raise SystemExit(f"{len(wrong)} of {len(rows)} kernels do not compile, do not fit or miss the matrix unit")
    spills = [row for row in rows if row["spill_bytes"]]
    for row in spills:
        print(f"{row['kernel']} {row['target']} {row['dtype']} [{row['config']}] spills {row['spill_bytes']} bytes")
    if any(row["spill_bytes"] > expected.spilled.get(row["kernel"], 0) for row in spills):
        raise SystemExit(f"more is spilled than is known of it: {expected.spilled}")
    print(f"{len(rows)} kernels compile and fit; {len(spills)} spill what is known of them")


def oldest_torch() -> str:
    """The oldest torch that pyproject.toml admits."""
    floor = re.search(r'"torch>=([\d.]+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    if floor is None:
        raise ValueError("pyproject.toml has no torch>=VERSION")
    return floor[1]


if __name__ == "__main__":
    if len(sys.argv) > 1:
        check(Path(sys.argv[1]).resolve(), *sys.argv[2:3])
    else:
        with tempfile.TemporaryDirectory() as scratch:
            check(Path(scratch))
