"""An engine in this process: many adapters and base rows in one batch answer as the merged models do."""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("vllm.lora", reason="vLLM has an environment of its own: tests/in_vllm/environment.py")

import peft
from offline_engine import GREEDY, engine, wrong
from tiny_served import ADAPTERS, MODELS, PAGED, PROMPTS, SIZES, Served, save
from transformers import GPTNeoXConfig
from vllm import LLM
from vllm.lora import utils
from vllm.lora.request import LoRARequest

from fastadapt.integrations.vllm.layers import LINEAR


@pytest.fixture(scope="module", params=MODELS)
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Served:
    return save(tmp_path_factory.mktemp(request.param), request.param, ADAPTERS)


@pytest.fixture(scope="module")
def llm(served: Served) -> Iterator[LLM]:
    llm = engine(served.model)
    yield llm
    del llm
    gc.collect()


def test_the_adapters_do_something(served: Served) -> None:
    assert [name for name, tokens in served.tokens.items() if name and tokens == served.tokens[""]] == []


def test_adapters_lie_as_they_were_asked_to(llm: LLM) -> None:
    from fastadapt.integrations.vllm.layers import StackedLinear
    from fastadapt.integrations.vllm.paged import PagedLinear

    ours = [kind for kind in utils._all_lora_classes if issubclass(kind, PagedLinear if PAGED else StackedLinear)]
    assert len(ours) == len(LINEAR)


def test_adapters_of_all_kinds_and_base_rows_in_one_batch(llm: LLM, served: Served) -> None:
    assert wrong(llm, served, ["", "lora", "rslora", "dora", "vera", "vera of the same key"]) == []


def test_more_adapters_than_slots_come_and_go(llm: LLM, served: Served) -> None:
    assert wrong(llm, served, ["", "a bias of B", "a bias of its own", "dora"]) == []
    assert wrong(llm, served, ["lora", "", "vera"]) == []
    assert wrong(llm, served, [*served.directories, ""]) == []


def test_base_rows_alone(llm: LLM, served: Served) -> None:
    assert wrong(llm, served, [""]) == []


def test_a_bad_adapter_is_refused_and_the_others_go_on(llm: LLM, served: Served, tmp_path: Path) -> None:
    shutil.copytree(served.directories["dora"], tmp_path / "bad")
    config = json.loads((tmp_path / "bad/adapter_config.json").read_text())
    (tmp_path / "bad/adapter_config.json").write_text(json.dumps(config | {"r": 6}))
    with pytest.raises(Exception, match=r"lora_A.weight must have shape \(6, 192\) for this config and model"):
        llm.llm_engine.add_lora(LoRARequest("bad", 99, str(tmp_path / "bad")))
    assert 99 not in llm.llm_engine.list_loras()
    assert wrong(llm, served, ["", "dora"]) == []


def test_another_adapter_in_the_place_of_one(llm: LLM, served: Served) -> None:
    replaced = LoRARequest("changing", 50, str(served.directories["lora"]))
    assert llm.llm_engine.add_lora(replaced)
    replaced = LoRARequest("changing", 50, str(served.directories["vera"]), load_inplace=True)
    assert llm.llm_engine.add_lora(replaced)
    prompts = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
    same = LoRARequest("changing", 50, str(served.directories["vera"]))
    found = llm.generate(prompts, GREEDY, lora_request=same, use_tqdm=False)
    assert [list(output.outputs[0].token_ids) for output in found] == served.tokens["vera"]


def test_the_head_stays_with_vllm_and_base_rows_stay_the_base_models(tmp_path: Path) -> None:
    adapters = {"head": peft.LoraConfig(r=4, target_modules=["q_proj", "lm_head"]), "dora": ADAPTERS["dora"]}
    served = save(tmp_path, "llama", adapters)
    llm = engine(served.model, max_loras=2)
    assert wrong(llm, served, ["", "head"]) == []
    assert wrong(llm, served, ["dora", ""]) == []
    assert wrong(llm, served, ["dora", "", "head"]) == []


def test_a_model_of_transformers_whose_layers_have_another_prefix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """gpt_neox.layers there is model.layers in vLLM, by a regular expression."""
    sizes = {name: value for name, value in SIZES.items() if name != "num_key_value_heads"}
    monkeypatch.setitem(MODELS, "gpt_neox", GPTNeoXConfig(**sizes, tie_word_embeddings=False))
    layers = ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]
    adapters = {"lora": peft.LoraConfig(r=8, target_modules=layers)}
    adapters["dora"] = peft.LoraConfig(r=5, use_dora=True, target_modules=layers)
    served = save(tmp_path, "gpt_neox", adapters)
    assert served.tokens[""] not in (served.tokens["lora"], served.tokens["dora"])
    assert wrong(engine(served.model, max_loras=2), served, ["", "lora", "dora"]) == []


def test_fully_sharded_loras_are_refused_at_the_start(served: Served) -> None:
    with pytest.raises(ValueError, match="fully_sharded_loras must be false with fastadapt"):
        engine(served.model, fully_sharded_loras=True)
