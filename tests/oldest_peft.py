"""accelerate_peft's tests with other PEFTs than the newest: ``python tests/oldest_peft.py [VERSION ...]``.

Each is installed without its dependencies into a temporary folder that comes first on the path; torch and transformers
are those of this environment. It is no part of the test suite, which has one PEFT.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# The oldest whose layers are taken over, and the oldest that imports beside transformers 5: its layers are left alone.
TAKEN, IMPORTS = "0.19.0", "0.18.0"
# What is asked of a PEFT whose layers are left alone.
LEFT = """
import warnings
import fastadapt, peft, torch
model = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 4)), peft.LoraConfig(target_modules=["0"]))
kinds = [type(module) for module in model.modules()]
with warnings.catch_warnings(record=True) as found:
    warnings.simplefilter("always")
    report = fastadapt.accelerate_peft(model)
assert len(found) == 1 and "leaves all layers to PEFT" in str(found[0].message), found
assert not report.taken and [type(module) for module in model.modules()] == kinds
print("PEFT", peft.__version__, "is left alone with one warning")
"""
# What older PEFTs warn of beside what the suite knows.
WARNINGS = ["-W", "ignore::FutureWarning", "-W", "ignore:Model has `tie_word_embeddings:UserWarning"]
TESTS = ["-m", "pytest", "-q", "-p", "no:cacheprovider", *WARNINGS, "tests/test_accelerate_peft.py"]


def check(version: str) -> None:
    """Installs a PEFT and runs what is asked of it; CalledProcessError if that fails."""
    with tempfile.TemporaryDirectory() as folder:
        install = ["-m", "pip", "install", "--quiet", "--no-deps", "--target", folder, f"peft=={version}"]
        subprocess.run([sys.executable, *install], check=True)
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([folder, str(ROOT), str(ROOT / "kernels")])}
        command = ["-c", LEFT] if tuple(map(int, version.split("."))) < tuple(map(int, TAKEN.split("."))) else TESTS
        subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, check=True)


if __name__ == "__main__":
    for version in sys.argv[1:] or [IMPORTS, TAKEN]:
        check(version)
