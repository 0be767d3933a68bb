"""`bench vllm` on a tiny model: three real engines, each in a process of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("vllm.lora", reason="vLLM has an environment of its own: tests/in_vllm/environment.py")

from tiny_served import MODELS, VOCABULARY
from transformers import AutoModelForCausalLM

from bench import vllm


def test_every_case_is_measured_with_the_plugin_on_one_side_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in vllm.ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    model = AutoModelForCausalLM.from_config(MODELS["llama"])
    model.save_pretrained(tmp_path / "model")
    adapters = vllm.save_adapters(model, tmp_path / "adapters")
    asked = vllm.works(VOCABULARY, prompt=8, steps=2)
    rows = vllm.run("fp32", str(tmp_path / "model"), adapters, asked, 2, 1, tmp_path)
    assert [row["case"] for row in rows] == list(vllm.ASKED)
    for row in rows:
        assert 0 < row["x_low"] <= row["x_base"] <= row["x_high"]
        assert row["rounds"] == 2
        assert row.get("vllm_rounds") == (None if "mixed" in row["case"] else 1)
    on = {side: "fastadapt is on" in (tmp_path / f"{side}.log").read_text() for side in ("base", "ours", "vllm")}
    assert on == {"base": False, "ours": True, "vllm": False}
