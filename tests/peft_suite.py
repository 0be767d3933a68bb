"""PEFT's own tests with and without accelerate_peft: ``python tests/peft_suite.py [PYTEST ARGUMENT ...]``.

The tests are those of the source archive of the PEFT that is installed. They run twice, the second time with every
layer that PEFT makes taken over at once; what passes without and does not with it is named, and the exit status is 1.
They import diffusers, datasets, scipy and parameterized besides; those that want the hub fail or are skipped in both.
It is no part of the test suite: thousands of tests twice, about half an hour.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
# A plugin of pytest: whatever adds an adapter to a model goes through inject_adapter.
TAKES_OVER = """
import functools
import warnings
import fastadapt
from peft.tuners.tuners_utils import BaseTuner

own, taken = BaseTuner.inject_adapter, [0]

@functools.wraps(own)
def inject_adapter(self, model, *args, **kwargs):
    own(self, model, *args, **kwargs)
    taken[0] += len(fastadapt.accelerate_peft(model).taken)

BaseTuner.inject_adapter = inject_adapter

def pytest_terminal_summary(terminalreporter):
    terminalreporter.write_line(f"layers taken over: {taken[0]}")
"""
# The files whose models are made on the spot; the others want the hub.
CHOSEN = [
    f"tests/test_{name}.py" for name in ("custom_models", "low_level_api", "mixed", "lora_variants", "vera", "other")
]
CHOSEN += ["-k", "lora or dora or vera"]


def outcomes(source: Path, plugin: str | None, arguments: list[str]) -> dict[str, str]:
    """What became of each test: passed, skipped, failure, error."""
    report = source / f"{plugin}.xml"
    path = os.pathsep.join([str(source), str(ROOT), str(ROOT / "kernels")])
    command = [sys.executable, "-m", "pytest", "-q", "--tb=no", "--no-header", "-p", "no:cacheprovider"]
    command += [
        "-W",
        "default",
        "-o",
        "addopts=",
        f"--junit-xml={report}",
        *(["-p", plugin] if plugin else []),
        *arguments,
    ]
    # Beside other models the suite wants those of the hub: they are not asked for.
    environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=source, env=environment, stdout=sys.stderr)
    found = {}
    for case in ElementTree.parse(report).iter("testcase"):
        kinds = [child.tag for child in case if child.tag in ("skipped", "failure", "error")]
        found[f"{case.get('classname')}::{case.get('name')}"] = kinds[0] if kinds else "passed"
    return found


def main(arguments: list[str]) -> int:
    peft = f"peft=={version('peft')}"
    with tempfile.TemporaryDirectory() as folder:
        download = ["download", "--quiet", "--no-deps", "--no-binary", "peft", "--dest", folder, peft]
        subprocess.run([sys.executable, "-m", "pip", *download], check=True)
        (archive,) = Path(folder).glob("*.tar.gz")
        with tarfile.open(archive) as files:
            files.extractall(folder, filter="data")
        (source,) = [path for path in Path(folder).iterdir() if path.is_dir()]
        (source / "takes_over.py").write_text(TAKES_OVER)
        # The archive has the tests without what makes them a package, and its own PEFT is not what is installed.
        (source / "tests" / "__init__.py").touch()
        (source / "src").rename(source / "not_imported")
        without = outcomes(source, None, arguments)
        taken = outcomes(source, "takes_over", arguments)
    lost = sorted(name for name, outcome in without.items() if outcome == "passed" != taken.get(name))
    for outcome in ("passed", "skipped", "failure", "error"):
        counts = [sum(value == outcome for value in found.values()) for found in (without, taken)]
        print(f"{outcome}: {counts[0]} without, {counts[1]} with accelerate_peft")
    for name in lost:
        print("passes without, not with:", name)
    if "passed" not in without.values():
        raise SystemExit("no test passes without accelerate_peft either: is what PEFT's tests import installed?")
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or CHOSEN))
