"""What stands around the layers, without an engine: requests, the warm-up, what stays vLLM's own, the resolver."""

from __future__ import annotations

import asyncio
import json
import logging
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm.lora", reason="vLLM has an environment of its own: tests/in_vllm/environment.py")

import vllm
from packed_model import SLOTS, Packed, Plain, check
from safetensors.torch import load_file, save_file
from vllm.config import VllmConfig
from vllm.exceptions import LoRAAdapterNotFoundError
from vllm.lora import utils
from vllm.lora.layers import LoRAMapping
from vllm.lora.request import LoRARequest
from vllm.lora.resolver import LoRAResolverRegistry
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager
from vllm.platforms import current_platform

from fastadapt.integrations.vllm import register, resolver
from fastadapt.integrations.vllm.layers import FastLinear
from fastadapt.integrations.vllm.punica import FastPunica
from fastadapt.integrations.vllm.worker_manager import FastWorkerManager
from fastadapt.serving import AdapterError

# Not in a conftest: the folder around has one, which its tests import by that name.
pytest_plugins = ["one_process"]
pytestmark = pytest.mark.usefixtures("alone")


def settings(alone: VllmConfig, **fields: Any) -> Any:
    """What a worker's manager reads of vLLM's settings."""
    text = SimpleNamespace(max_position_embeddings=64)
    model = SimpleNamespace(
        get_vocab_size=lambda: 100,
        hf_config=SimpleNamespace(get_text_config=lambda: text),
        is_encoder_decoder=False,
    )
    parts = {
        "lora_config": alone.lora_config,
        "scheduler_config": SimpleNamespace(max_num_seqs=16, max_num_batched_tokens=64),
        "parallel_config": SimpleNamespace(pipeline_parallel_size=1, enable_expert_parallel=False),
        "model_config": model,
        "compilation_config": alone.compilation_config,
    }
    return SimpleNamespace(**parts | fields)


@pytest.fixture
def worker(alone: VllmConfig) -> FastWorkerManager:
    found = FastWorkerManager(settings(alone), torch.device("cpu"), {})
    found.create_lora_manager(Packed(Plain()), settings(alone))
    return found


def test_requests_load_adapters_and_change_them_in_place(worker: Any, directories: dict[str, Path]) -> None:
    assert worker.add_adapter(LoRARequest("a", 7, str(directories["DoRA"])))
    assert worker.list_adapters() == {7}
    layer = worker._adapter_manager.modules["attn.qkv_proj"]
    assert layer.slices[0].forms.layer.forms[0].base_scale is not None
    assert worker.add_adapter(LoRARequest("a", 7, str(directories["VeRA"]), load_inplace=True))
    assert layer.slices[0].forms.layer.forms[0].rank == 32
    assert worker.remove_adapter(7)
    assert not layer.slices[0].forms.layer.forms


def test_what_cannot_be_loaded_leaves_nothing_behind(worker: Any, directories: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(LoRAAdapterNotFoundError):
        worker.add_adapter(LoRARequest("a", 7, str(tmp_path / "gone")))
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    with pytest.raises(AdapterError, match=r"adapter_model\.safetensors does not exist"):
        worker.add_adapter(LoRARequest("a", 7, str(tmp_path)))
    assert worker.list_adapters() == set()
    assert worker.add_adapter(LoRARequest("b", 8, str(directories["LoRA"])))


def test_a_form_that_is_not_finite_is_refused(worker: Any, directories: dict[str, Path], tmp_path: Path) -> None:
    """The magnitude is finite, and m / n is not."""
    for file in directories["DoRA, partly"].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    tensors["base_model.model.attn.v_proj.lora_A.weight"].fill_(0)
    tensors["base_model.model.attn.v_proj.lora_magnitude_vector"].fill_(3e38)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match=r"v_proj gets NaN or infinite values in"):
        worker.add_adapter(LoRARequest("a", 7, str(tmp_path)))
    assert worker.list_adapters() == set()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lora_config": SimpleNamespace(fully_sharded_loras=True)}, "fully_sharded_loras must be false"),
        ({"parallel_config": SimpleNamespace(pipeline_parallel_size=2)}, "pipeline_parallel_size must be 1"),
    ],
)
def test_what_is_refused_at_the_start(alone: VllmConfig, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FastWorkerManager(settings(alone, **fields), torch.device("cpu"), {})


def test_the_adapters_of_the_warm_up_are_taken(worker: Any, directories: dict[str, Path]) -> None:
    manager = worker._adapter_manager
    for number in range(1, SLOTS + 1):
        assert worker.add_dummy_lora(LoRARequest("warm-up", number, "nowhere"), rank=8)
        manager.activate_adapter(number)
    assert all(len(part.forms.layer.forms) == SLOTS for layer in manager.fast.values() for part in layer.slices)
    manager.remove_all_adapters()
    check(manager, ["DoRA", "", "LoRA"], directories)


def test_vllms_stacks_take_no_memory(manager: Any) -> None:
    for layer in manager.modules.values():
        assert isinstance(layer, FastLinear)
        assert all(stack.is_meta for stack in (*layer.lora_a_stacked, *layer.lora_b_stacked))


def test_a_subclass_of_a_layer_stays_vllms_own(alone: VllmConfig) -> None:
    from vllm.model_executor.layers.linear import ReplicatedLinear

    class Own(ReplicatedLinear):
        pass

    for kind, ours in ((ReplicatedLinear, True), (Own, False)):
        layer = kind(8, 4, params_dtype=torch.float32)
        found = utils.from_layer(layer, SLOTS, alone.lora_config, [])
        assert isinstance(found, FastLinear) is ours
        assert type(found).__name__.endswith("ReplicatedLinearWithLoRA")


def test_another_version_of_vllm_goes_on_without_the_plugin(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    before = utils._all_lora_classes
    monkeypatch.setattr(vllm, "__version__", "0.30.1")
    monkeypatch.setattr("vllm.logger._configure_vllm_root_logger", lambda: None, raising=False)
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    register()
    assert "fastadapt is off: it needs vLLM 0.31 to 0.33, got 0.30.1" in caplog.text
    assert utils._all_lora_classes is before


@pytest.mark.parametrize(
    ("is_gpu", "line"),
    [
        (True, "fastadapt is off: inside vLLM it was never run on a GPU; FASTADAPT_VLLM_GPU=1 turns it on"),
        (False, "fastadapt is off: inside vLLM it serves on CPUs, got "),
    ],
)
def test_other_devices_go_on_without_the_plugin(
    is_gpu: bool, line: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    before = utils._all_lora_classes
    monkeypatch.delenv("FASTADAPT_VLLM_GPU", raising=False)
    monkeypatch.setattr(type(current_platform), "is_cpu", lambda self: False)
    monkeypatch.setattr(type(current_platform), "is_cuda_alike", lambda self: is_gpu)
    monkeypatch.setattr("vllm.logger._configure_vllm_root_logger", lambda: None, raising=False)
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    register()
    assert line in caplog.text
    assert utils._all_lora_classes is before


def test_names_are_found_in_the_directory_alone(directories: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    root = directories["LoRA"].parent
    monkeypatch.setenv(resolver.VARIABLE, str(root))
    monkeypatch.setattr(LoRAResolverRegistry, "resolvers", {})
    register()
    register()
    found = LoRAResolverRegistry.get_resolver("fastadapt")

    def path_of(name: str) -> str | None:
        request = asyncio.run(found.resolve_lora("any", name))
        return None if request is None else request.lora_path

    assert path_of("VeRA") == os.path.realpath(root / "VeRA")
    (root.parent / "outside").mkdir()
    (root / "out").symlink_to(root.parent / "outside")
    for name in ("gone", "../outside", "out", "/etc", "VeRA/../LoRA", "", "."):
        assert path_of(name) is None


def test_a_resolver_of_no_directory_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(resolver.VARIABLE, str(tmp_path / "gone"))
    monkeypatch.setattr(LoRAResolverRegistry, "resolvers", {})
    with pytest.raises(ValueError, match="FASTADAPT_VLLM_ADAPTERS must name a directory of adapters, got"):
        register()


def test_base_rows_beside_an_adapter_on_the_head_stay_the_base_models() -> None:
    """vLLM's own operations give them the adapter in the last slot."""
    punica = FastPunica(64, 16, device="cpu")
    ids = (5, 0, 5, 0)
    punica.update_metadata(LoRAMapping(ids, ids, is_prefill=True), [None, 5], 3, 100)
    assert punica.batch.adapter_ids == (1, -1, 1, -1)
    x, A, B = torch.randn(4, 6), torch.randn(2, 1, 3, 6), torch.randn(2, 1, 9, 3)
    A[0], B[0] = 0, 0
    start = torch.randn(4, 9)
    y = start.clone()
    punica.add_lora_logits(y, x, A, B, 1.0)
    assert torch.equal(y, start)  # no resident adapter has weights for the head
    punica.others = True
    punica.add_lora_logits(y, x, A, B, 1.0)
    assert torch.equal(y[1::2], start[1::2])
    torch.testing.assert_close(y[::2], start[::2] + x[::2] @ A[1, 0].T @ B[1, 0].T)
    hidden = torch.randn(4, 3)
    y = start.clone()
    punica.add_lora_embedding(y, hidden, B)
    assert torch.equal(y[1::2], start[1::2])
    torch.testing.assert_close(y[::2], start[::2] + hidden[::2] @ B[1, 0].T)


def test_an_adapter_with_weights_for_other_layers_goes_vllms_way(
    worker: Any, directories: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for file in directories["LoRA"].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    tensors["base_model.model.lm_head.lora_A.weight"] = torch.ones(3, 48)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match="lm_head"):  # this model has no such layer
        worker.add_adapter(LoRARequest("a", 7, str(tmp_path)))
    asked: list[str] = []
    monkeypatch.setitem(worker._adapter_manager.modules, "lm_head", torch.nn.Identity())
    monkeypatch.setattr(LRUCacheWorkerLoRAManager, "_load_adapter", lambda self, request: asked.append(request.name))
    assert worker._load_adapter(LoRARequest("a", 7, str(tmp_path))) is None
    assert asked == ["a"]
    for file in directories["partly"].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    os.truncate(tmp_path / "adapter_model.safetensors", 100)
    with pytest.raises(AdapterError, match="not a valid safetensors file"):
        worker._load_adapter(LoRARequest("a", 7, str(tmp_path)))
