"""Engines whose adapters lie as on a GPU: the tests of others, with the plugin told so."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("vllm.lora", reason="vLLM has an environment of its own: tests/in_vllm/environment.py")

from tiny_served import PAGED

HERE = Path(__file__).parent


# The plugin is registered once a process.
@pytest.mark.skipif(PAGED, reason="this is that process")
@pytest.mark.parametrize("name", ["test_offline", "test_tensor_parallel"])
def test_what_others_are_asked(name: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", HERE / f"{name}.py"],
        env=os.environ | {"FASTADAPT_VLLM_GPU": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:]
