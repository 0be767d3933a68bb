"""Models inside of what compiles, trains or adapts them: our functions see through it, or say what to give instead."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from tiny_models import llama, output, randomise, tokens
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DataParallel, DistributedDataParallel

from fastadapt import (
    LoRAConfig,
    add_weighted_adapter,
    control,
    disable_adapter,
    export_lora,
    forget,
    inject,
    load_adapter,
    merge,
    save_adapter,
    set_adapter,
    trainable_parameters,
    unload,
    unmerge,
)
from fastadapt.model.adapted import active_adapters, adapter_layers
from fastadapt.model.peft_files import TENSOR_FILE
from fastadapt.serving import MultiAdapterModel

# PEFT's of transformers, and FSDP's of a single process.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning", "ignore:FSDP is switching")

CONFIG: dict[str, Any] = {"r": 2, "target_modules": ["q_proj"], "init_lora_weights": False}


def compiled(model: nn.Module) -> Any:
    return torch.compile(model, backend="eager")


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


WRAPPERS: dict[str, Callable[[nn.Module], Any]] = {
    "compiled": compiled,
    "DataParallel": DataParallel,
    "DDP": DistributedDataParallel,
    "DDP of a compiled one": lambda model: DistributedDataParallel(compiled(model)),
}


@pytest.mark.parametrize("case", WRAPPERS)
def test_every_function_means_the_model_inside(case: str, group: None, tmp_path: Path) -> None:
    model = inject(llama(), LoRAConfig(**CONFIG)).eval()
    inject(model, LoRAConfig(**CONFIG), "second")
    set_adapter(model, "default")
    base = output(llama(), tokens())
    want = output(model, tokens())
    outer = WRAPPERS[case](model)

    assert trainable_parameters(outer) == trainable_parameters(model)
    assert adapter_layers(outer).keys() == adapter_layers(model).keys()
    save_adapter(outer, tmp_path / "a")
    save_adapter(model, tmp_path / "b")
    export_lora(outer, tmp_path / "c")
    for name in "bc":
        assert load_file(tmp_path / name / TENSOR_FILE).keys() == load_file(tmp_path / "a" / TENSOR_FILE).keys()
    torch.testing.assert_close(output(load_adapter(llama(), tmp_path / "a"), tokens()), want)
    set_adapter(outer, "second")
    assert active_adapters(outer) == active_adapters(model) == ["second"]
    set_adapter(outer, "default")
    control(outer).step()
    forget(outer)
    with disable_adapter(outer):
        torch.testing.assert_close(output(model, tokens()), base)
    add_weighted_adapter(outer, ["default", "second"], [1.0, 1.0], "sum")
    merge(outer)
    torch.testing.assert_close(output(model, tokens()), want)
    unmerge(outer)
    assert unload(outer) is outer
    assert not adapter_layers(model)
    assert "adapter_configs" not in model.__dict__
    torch.testing.assert_close(output(model, tokens()), base)


@pytest.mark.parametrize("case", ["compiled", "DataParallel"])
def test_adapters_come_into_what_calls_the_model_as_it_is(case: str, tmp_path: Path) -> None:
    torch._dynamo.reset()
    outer = WRAPPERS[case](llama())
    before = output(outer, tokens())
    assert inject(outer, LoRAConfig(**CONFIG)) is outer
    want = output(outer, tokens())
    assert not torch.allclose(want, before)
    save_adapter(outer, tmp_path)
    torch.testing.assert_close(output(peft.PeftModel.from_pretrained(llama(), tmp_path).eval(), tokens()), want)
    other = load_adapter(WRAPPERS[case](llama()), tmp_path)
    torch.testing.assert_close(output(other, tokens()), want)
    assert unload(outer) is outer
    torch.testing.assert_close(output(outer, tokens()), before)


def test_ddp_would_not_know_of_new_parameters(group: None, tmp_path: Path) -> None:
    save_adapter(inject(llama(), LoRAConfig(**CONFIG)), tmp_path)
    outer = DistributedDataParallel(llama())
    for put in (lambda: inject(outer, LoRAConfig(**CONFIG)), lambda: load_adapter(outer, tmp_path)):
        with pytest.raises(
            ValueError, match=r"DistributedDataParallel, which knows the parameters .* and then the model"
        ):
            put()
    assert all(parameter.requires_grad for parameter in outer.parameters())


def test_a_model_in_pieces_is_named(group: None, tmp_path: Path) -> None:
    whole = FullyShardedDataParallel(
        inject(llama(), LoRAConfig(**CONFIG)), device_id=torch.device("cpu"), use_orig_params=True
    )
    for call in (merge, control, unload, lambda model: save_adapter(model, "nowhere")):
        with pytest.raises(ValueError, match=r"FullyShardedDataParallel: FSDP has cut .*summon_full_params"):
            call(whole)
    model = fully_shard(llama(), mesh=torch.distributed.init_device_mesh("cpu", (1,)))
    with pytest.raises(ValueError, match=r"weight is cut into pieces \(DTensor\): put adapters .* before fully_shard"):
        inject(model, LoRAConfig(**CONFIG))
    save_adapter(inject(llama(), LoRAConfig(**CONFIG)), tmp_path)
    with pytest.raises(ValueError, match=r"weight is cut into pieces \(DTensor\): put adapters .* before fully_shard"):
        load_adapter(model, tmp_path)


def through_transformers() -> Any:
    model = llama()
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["q_proj"]))
    return model


PEFTS: dict[str, tuple[Callable[[], Any], str]] = {
    "PeftModel": (
        lambda: peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules=["q_proj"])),
        "is a PeftModel",
    ),
    "a prompt": (
        lambda: peft.get_peft_model(llama(), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)),
        "is a PeftModel.*: PEFT's own adapters are in it: .*merge_and_unload",
    ),
    "transformers' add_adapter": (through_transformers, r"q_proj has an adapter of PEFT's: .*delete_adapter\(\)"),
}


@pytest.mark.parametrize("target", ["q_proj", "down_proj"])
@pytest.mark.parametrize("case", PEFTS)
def test_a_model_with_adapters_of_pefts_is_refused(case: str, target: str, tmp_path: Path) -> None:
    save_adapter(inject(llama(), LoRAConfig(r=2, target_modules=[target])), tmp_path)
    make, message = PEFTS[case]
    model = make()
    before = [name for name, _ in model.named_modules()]
    calls = [
        lambda: inject(model, LoRAConfig(r=2, target_modules=[target])),
        lambda: load_adapter(model, tmp_path),
        lambda: MultiAdapterModel(model),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=message):
            call()
    assert [name for name, _ in model.named_modules()] == before
    if case == "PeftModel":
        inject(model.unload(), LoRAConfig(r=2, target_modules=[target]))


def test_a_served_model_takes_no_adapters_of_its_own() -> None:
    served = MultiAdapterModel(llama())
    with pytest.raises(ValueError, match=r"served by a MultiAdapterModel: unwrap\(\) it first"):
        inject(served.model, LoRAConfig(**CONFIG))
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module, got MultiAdapterModel"):
        inject(served, LoRAConfig(**CONFIG))  # type: ignore[type-var]
    inject(served.unwrap(), LoRAConfig(**CONFIG))


class Policy(nn.Module):
    def __init__(self, actor: nn.Module) -> None:
        super().__init__()
        self.actor = actor


def test_a_module_around_it_is_told_what_to_give() -> None:
    outer = Policy(inject(llama(), LoRAConfig(**CONFIG)))
    with pytest.raises(ValueError, match="it has none; actor, inside of this Policy, has it: give that"):
        save_adapter(outer, "nowhere")


def test_a_compiled_model_is_served(tmp_path: Path) -> None:
    torch._dynamo.reset()
    model = inject(llama(), LoRAConfig(**CONFIG))
    randomise([parameter for parameter in model.parameters() if parameter.requires_grad])
    save_adapter(model, tmp_path)
    want = output(model, tokens())
    served = MultiAdapterModel(compiled(llama()))
    served.load(tmp_path, "a")
    torch.testing.assert_close(served(tokens(), adapter_ids="a").logits, want)
    assert pickle.dumps(served.unwrap()._orig_mod)
