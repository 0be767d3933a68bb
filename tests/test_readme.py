"""The front door: README is short, its blocks run, and its numbers and the page of results are those of the JSON."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch

import fastadapt
from bench import page
from bench.__main__ import main
from fastadapt.commands.report import write_json

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
ANEW = "python -m bench report writes it anew"


def test_the_readme_is_short_and_its_links_lead_somewhere() -> None:
    assert len(README.splitlines()) <= 150
    targets = [target.partition("#")[0] for target in re.findall(r"\]\(([^)]+)\)", README)]
    assert [t for t in targets if not t.startswith("https://") and not (ROOT / t).is_file()] == []


def test_the_numbers_are_those_of_the_stored_documents() -> None:
    assert page.with_headlines(README) == README, ANEW
    assert page.headlines().count("\n") == 8, "seven rows"
    assert page.results() == (page.RESULTS / "README.md").read_text(encoding="utf-8"), ANEW


def test_every_stored_document_is_on_the_page() -> None:
    page.results()
    assert {path.stem for path in page.RESULTS.glob("*.json")} - page.SECTIONS.keys() == set()
    pictures = {path.name for path in page.RESULTS.glob("*.png")}
    assert pictures == set(re.findall(r"!\[.*?\]\((.*?)\)", page.results()))


def test_another_bench_is_one_function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, parts in (("SECTIONS", {}), ("_HEADLINES", {}), ("RESULTS", tmp_path), ("README", tmp_path / "R.md")):
        monkeypatch.setattr(page, name, parts)
    monkeypatch.setattr(page, "BENCHES", {})

    @page.section("planted", "A planted bench (new)")
    def section(document: dict[str, Any]) -> str:
        return page.table(
            "| us", [f"{row['case']} | {page.span(row, 'us', 'low', 'high')}" for row in document["rows"]]
        )

    @page.headline("planted")
    def headline(document: dict[str, Any]) -> str:
        return f"calls | {document['rows'][0]['us']:.1f} | –"

    # Before it was run it is on no page.
    assert "planted" not in page.results(tmp_path)
    assert page.headlines(tmp_path).count("\n") == 1
    write_json(tmp_path / "planted.json", "planted", [{"case": "one", "us": 3.0, "low": 2.5, "high": 4.0}])
    (tmp_path / "planted.png").touch()
    page.README.write_text(f"before\n\n| {page.HEADLINES} |\n|---|\n| old | 1 | 2 |\n\nafter\n")
    main(["report"])
    written = (tmp_path / "README.md").read_text()
    assert "* [A planted bench (new)](#a-planted-bench-new)" in written
    assert "`python -m bench planted --json FILE`" in written
    assert f"torch {torch.__version__}" in written
    assert "| one | 3.00 (2.50–4.00) |\n\n![A planted bench (new)](planted.png)\n" in written
    rows = f"| {page.HEADLINES} |\n|---|--:|--:|\n| calls | 3.0 | – |"
    assert page.README.read_text() == f"before\n\n{rows}\n\nafter\n"


def test_what_was_not_measured_is_a_dash() -> None:
    assert page.span({}, "x", "low", "high") == page.number(None) == "–"
    assert page.number(1234.5, 1) == "1,234.5"


class Tokenizer:
    """As much of one as the blocks use."""

    def __call__(self, prompts: list[str], **_: Any) -> dict[str, torch.Tensor]:
        ids = torch.arange(1, 5).repeat(len(prompts), 1)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def test_every_block_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """In the order in which a reader meets them; what a reader has besides, a model and data, is small here."""
    from transformers import AutoModelForCausalLM

    monkeypatch.chdir(tmp_path)
    named: list[str] = []

    def from_pretrained(name: str) -> Any:
        named.append(name)
        return tiny_models.llama()

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", from_pretrained)
    # "train as ever": a step that a control takes part in.
    adapted = fastadapt.inject(tiny_models.llama(), fastadapt.AdaLoRAConfig(total_step=10, target_modules="all-linear"))
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.1)
    supernet = fastadapt.inject(
        tiny_models.llama(), fastadapt.GLoRAConfig(r=2, supernet=True, target_modules=["q_proj"])
    )
    for name, config in (("sql", fastadapt.LoRAConfig(r=2)), ("poems", fastadapt.DoRAConfig(r=3))):
        config.target_modules = "all-linear"
        fastadapt.save_adapter(fastadapt.inject(tiny_models.llama(), config), f"adapters/{name}")
    ids = torch.arange(8).reshape(2, 4)
    scores: list[float] = []

    def validation_accuracy(model: Any) -> float:
        scores.append(1.0 / (1 + len(scores)))
        return scores[-1]

    reader: list[dict[str, Any]] = [
        {},
        {"model": adapted, "loss": adapted(input_ids=ids, labels=ids).loss, "optimizer": optimizer},
        {"model": supernet, "validation_accuracy": validation_accuracy},
        {"model": tiny_models.llama(), "tokenizer": Tokenizer(), "prompts": ["a", "b", "c"]},
    ]
    assert len(BLOCKS) == len(reader)
    namespace: dict[str, Any] = {}
    for block, has in zip(BLOCKS, reader, strict=True):
        namespace.update(has)
        exec(compile(block, "README.md", "exec"), namespace)
    assert named == ["HuggingFaceTB/SmolLM2-135M-Instruct"]
    assert "trainable" in capsys.readouterr().out
    assert json.loads((tmp_path / "my-adapter" / "adapter_config.json").read_text())["use_dora"]
    assert namespace["found"] is not None
    assert scores
    assert set(namespace["served"].pool.names) == {"sql", "poems"}
