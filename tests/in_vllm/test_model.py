"""A whole model of vLLM's without an engine: every token anew through all layers, attention in plain PyTorch.

What an engine adds is scheduling and a cache. Names, packed layers, the head and the runner's own steps are the real
ones, and many adapters and base rows in one batch must answer as transformers does with each adapter merged.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("vllm.lora", reason="vLLM has an environment of its own: tests/in_vllm/environment.py")

import peft
from packed_model import process_group
from tiny_served import ADAPTERS, MAX_RANK, MODELS, PROMPTS, TOKENS, Served, save
from torch import Tensor
from vllm.config import set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.forward_context import set_forward_context
from vllm.lora.request import LoRARequest
from vllm.model_executor.layers.attention.attention import Attention
from vllm.model_executor.model_loader import get_model
from vllm.plugins import load_general_plugins
from vllm.v1.worker.cpu_model_runner import _set_torch_accelerator_to_noop
from vllm.v1.worker.lora_model_runner_mixin import LoRAModelRunnerMixin

SLOTS = 5


class Runner(LoRAModelRunnerMixin):
    """A model runner's part that has to do with adapters, over a model that starts anew at each step."""

    def __init__(self, model: Path, **fields: Any) -> None:
        given = {"max_loras": SLOTS, "max_lora_rank": MAX_RANK, "max_model_len": 64, "max_num_seqs": 64} | fields
        arguments = EngineArgs(
            str(model), skip_tokenizer_init=True, dtype="float32", enforce_eager=True, enable_lora=True, **given
        )
        self.config = arguments.create_engine_config()
        self.lora_config = self.config.lora_config
        self.lengths: list[int] = []
        with set_current_vllm_config(self.config):
            self.model = get_model(vllm_config=self.config)
            self.load_lora_model(self.model, self.config, torch.device("cpu"))
            # As an engine's start does it.
            with self.maybe_setup_dummy_loras(self.lora_config):
                pass

    def attention(self, layer: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Each prompt's own, causal."""
        outputs = []
        for start, stop in pairwise([0, *accumulate(self.lengths)]):
            q, k, v = (
                part[start:stop].view(stop - start, heads, -1).transpose(0, 1)
                for part, heads in ((query, layer.num_heads), (key, layer.num_kv_heads), (value, layer.num_kv_heads))
            )
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True, scale=layer.impl.scale)
            outputs.append(y.transpose(0, 1).flatten(1))
        return torch.cat(outputs)

    def answers(self, rows: list[tuple[LoRARequest | None, list[int]]]) -> list[list[int]]:
        """The tokens that follow each prompt, greedily."""
        texts = [list(prompt) for _, prompt in rows]
        numbers = [0 if request is None else request.lora_int_id for request, _ in rows]
        requests = {request for request, _ in rows if request is not None}
        for _ in range(TOKENS):
            self.lengths = [len(text) for text in texts]
            of_tokens = [number for number, length in zip(numbers, self.lengths, strict=True) for _ in range(length)]
            self._set_active_loras(tuple(numbers), tuple(of_tokens), requests)
            positions = torch.cat([torch.arange(length) for length in self.lengths])
            with torch.inference_mode(), set_forward_context(None, self.config):
                hidden = self.model(torch.tensor([token for text in texts for token in text]), positions, None, None)
                last = torch.tensor(list(accumulate(self.lengths))) - 1
                logits = self.model.compute_logits(hidden[last])
            # Of several processes the first may have them alone.
            found = None if logits is None else logits.argmax(-1).tolist()
            if torch.distributed.get_world_size() > 1:
                shared = [found]
                torch.distributed.broadcast_object_list(shared)
                (found,) = shared
            for text, token in zip(texts, found, strict=True):
                text.append(token)
        return [text[len(prompt) :] for text, (_, prompt) in zip(texts, rows, strict=True)]


@contextmanager
def plugged_in(rank: int, processes: int, store: Path) -> Iterator[None]:
    """With the plugin by its entry point, as vLLM finds it."""
    with process_group(rank, processes, store):
        load_general_plugins()
        _set_torch_accelerator_to_noop()  # as vLLM's runner does on a CPU
        yield


@pytest.fixture(scope="module", autouse=True)
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with plugged_in(0, 1, tmp_path_factory.mktemp("store") / "model"):
        yield


@pytest.fixture(scope="module", params=MODELS)
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Served:
    return save(tmp_path_factory.mktemp(request.param), request.param, ADAPTERS)


@pytest.fixture(scope="module")
def runner(served: Served) -> Runner:
    return Runner(served.model)


def wrong(runner: Runner, served: Served, names: list[str]) -> list[Any]:
    """(adapter, prompt, tokens, transformers' tokens) where these differ, of every prompt with every adapter."""
    known = list(served.directories)
    requests = {
        name: LoRARequest(name, 1 + known.index(name), str(served.directories[name])) if name else None
        for name in names
    }
    rows = [(name, index) for index in range(len(PROMPTS)) for name in names]
    forward = lambda layer, *args, **kwargs: runner.attention(layer, *args, **kwargs)  # noqa: E731
    with mock.patch.object(Attention, "forward", forward):
        found = runner.answers([(requests[name], PROMPTS[index]) for name, index in rows])
    return [
        (name, PROMPTS[index], tokens, served.tokens[name][index])
        for (name, index), tokens in zip(rows, found, strict=True)
        if tokens != served.tokens[name][index]
    ]


def test_adapters_of_all_kinds_and_base_rows_in_one_batch(runner: Runner, served: Served) -> None:
    assert [name for name, tokens in served.tokens.items() if name and tokens == served.tokens[""]] == []
    assert wrong(runner, served, [""]) == []
    names = ["", "lora", "rslora", "dora", "vera", "vera of the same key"]
    assert wrong(runner, served, names) == []


def test_more_adapters_than_slots_come_and_go(runner: Runner, served: Served) -> None:
    assert wrong(runner, served, ["", "a bias of B", "a bias of its own", "dora"]) == []
    assert wrong(runner, served, ["lora", "", "vera", "rslora"]) == []


def test_the_head_stays_with_vllm_and_base_rows_stay_the_base_models(tmp_path: Path) -> None:
    adapters = {"head": peft.LoraConfig(r=4, target_modules=["q_proj", "lm_head"]), "dora": ADAPTERS["dora"]}
    served = save(tmp_path, "llama", adapters)
    runner = Runner(served.model, max_loras=2)
    assert wrong(runner, served, ["", "head"]) == []
    assert wrong(runner, served, ["dora", ""]) == []
    assert wrong(runner, served, ["dora", "", "head"]) == []
