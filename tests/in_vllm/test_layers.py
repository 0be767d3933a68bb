"""Packed layers without an engine: their manager, slots and forms against the formula, one layer at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("vllm.lora", reason="vLLM has an environment of its own: tests/in_vllm/environment.py")

from packed_model import METHODS, WIDTH, Plain, Stage, check, load, manager_of
from torch import nn
from vllm.config import VllmConfig
from vllm.lora.layers import LoRAMapping

from fastadapt import AdapterForm, LoRAConfig, inject, save_adapter
from fastadapt.integrations.vllm import register
from fastadapt.integrations.vllm.adapters import Pairs
from fastadapt.serving import AdapterError

# Not in a conftest: the folder around has one, which its tests import by that name.
pytest_plugins = ["one_process"]
pytestmark = pytest.mark.usefixtures("alone")


@pytest.mark.parametrize("name", METHODS)
def test_each_method_beside_base_rows(name: str, manager: Any, directories: dict[str, Path]) -> None:
    check(manager, ["", name, name, ""], directories)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_each_method_in_16_bits(dtype: torch.dtype, alone: VllmConfig, directories: dict[str, Path]) -> None:
    manager = manager_of(alone, dtype)
    for name in METHODS:
        check(manager, ["", name, name, ""], directories)
    check(manager, ["LoRA", "", "DoRA", "VeRA", "LoRA"], directories)


def test_methods_beside_each_other_in_slots_that_change_hands(manager: Any, directories: dict[str, Path]) -> None:
    check(manager, ["LoRA", "", "DoRA", "VeRA", "LoRA"], directories)
    check(manager, ["DVoRA", "AdaLoRA", ""], directories)
    check(manager, ["partly", "SSF", "VeRA", ""], directories)
    check(manager, ["DoRA, partly", "a bias of B", "a bias of its own"], directories)


def test_adapters_come_in_the_middle_of_a_step_and_between_steps(manager: Any, directories: dict[str, Path]) -> None:
    with torch.inference_mode():
        check(manager, ["LoRA", "DoRA", "VeRA"], directories)
    for layer in manager.modules.values():
        assert not any(
            tensor is not None and tensor.is_inference()
            for part in layer.slices
            for form in part.forms.layer.forms.values()
            for tensor in (*form.A, *form.B, form.mid_scale, form.out_scale, form.base_scale)
        )
    manager.remove_all_adapters()
    check(manager, ["partly", "DoRA, partly", "LoRA"], directories)
    with torch.inference_mode():
        check(manager, ["DoRA", "DVoRA", "LoRA"], directories)
    check(manager, ["LoRA", "SSF", "VeRA"], directories)


def test_rows_that_fill_up_a_batch_are_the_base_models(manager: Any, directories: dict[str, Path]) -> None:
    layer, x = manager.modules["attn.qkv_proj"], torch.randn(5, WIDTH)
    base = layer(x)[0]
    numbers = load(manager, ["DoRA"], directories)
    manager.set_adapter_mapping(LoRAMapping((numbers["DoRA"],) * 3, (numbers["DoRA"],), is_prefill=True))
    y = layer(x)[0]
    torch.testing.assert_close(y[3:], base[3:])
    assert (y[:3] - base[:3]).abs().max() > 0.1


def test_slots_of_nobody_hold_nothing(manager: Any, directories: dict[str, Path]) -> None:
    numbers = load(manager, ["LoRA", "DoRA"], directories)
    layers = [module for module in manager.modules.values() for part in module.slices if part.forms.bytes]
    assert len(layers) == 7
    manager.remove_adapter(numbers["LoRA"])
    manager.remove_all_adapters()
    assert not any(part.forms.bytes for module in manager.modules.values() for part in module.slices)


def test_adapters_of_one_key_share_their_pair(manager: Any, directories: dict[str, Path]) -> None:
    first, second = (manager.read(number, str(directories["VeRA"])) for number in (1, 2))
    assert first.pair is second.pair
    A, B = first.pair.A, first.pair.B
    assert A.is_contiguous()
    assert B.T.is_contiguous()  # by rank rows, which is how products read them
    for forms in first.loras.values():
        for form in forms.lora_a:
            assert form.A.untyped_storage().data_ptr() == A.untyped_storage().data_ptr()
            assert form.B.untyped_storage().data_ptr() == B.untyped_storage().data_ptr()


def test_a_layer_gets_its_own_rows_of_a_pair() -> None:
    """Neighbours or not, as in a packed layer that is shared out among processes, and as many as another layer has."""
    pair = Pairs(torch.bfloat16).of(torch.randn(4, 6), torch.randn(10, 4))
    for rows in (torch.tensor([6, 7, 2, 3]), slice(0, 4), torch.tensor([0, 1, 4, 5]), slice(2, 6), slice(0, 4)):
        form = pair.laid_out(AdapterForm(pair.A, pair.B[rows]))
        assert torch.equal(form.B, pair.B[rows])
        assert form.B.T.is_contiguous()


def test_what_is_wrong_with_an_adapter_is_said(manager: Any, directories: dict[str, Path], tmp_path: Path) -> None:
    wider = nn.ModuleDict({"attn": nn.ModuleDict({"q_proj": nn.Linear(WIDTH + 1, 9)})})
    save_adapter(inject(wider, LoRAConfig(r=2, target_modules=["q_proj"])), tmp_path)
    with pytest.raises(AdapterError, match=r"lora_A.weight must have shape \(2, 48\) for this config and model"):
        manager.read(1, str(tmp_path))


def test_a_form_without_a_bias_of_its_own_goes_into_the_stacks(manager: Any, directories: dict[str, Path]) -> None:
    check(manager, ["LoRA", "DoRA", ""], directories)
    assert any(layer.base_layer.bias is not None for layer in manager.fast.values())
    forms = [
        form for layer in manager.fast.values() for part in layer.slices for form in part.forms.layer.forms.values()
    ]
    assert all(form.added_bias is None and form.stack is not None for form in forms)


@pytest.mark.parametrize("name", ["LoRA", "DoRA", "VeRA", "a bias of its own"])
def test_a_stage_of_a_pipeline_takes_its_own_part(name: str, alone: VllmConfig, tmp_path: Path) -> None:
    """Of an adapter for all blocks: what an engine of one process has for these blocks."""
    plains = nn.ModuleDict({"layers": nn.ModuleList([Plain(), Plain(), Plain()])})
    model = inject(plains, METHODS[name])
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    save_adapter(model, tmp_path)
    whole, first, last = (manager_of(alone, model=Stage(plains["layers"], here)) for here in ({0, 1, 2}, {0}, {1, 2}))
    expected = whole.read(1, str(tmp_path)).loras
    for stage, blocks in ((first, "0"), (last, "12")):
        found = stage.read(1, str(tmp_path)).loras
        assert found.keys() == {path for path in expected if path.split(".")[1] in blocks}
        for path, forms in found.items():
            for form, same in zip(forms.lora_a, expected[path].lora_a, strict=True):
                torch.testing.assert_close(form._asdict(), same._asdict(), rtol=0, atol=0)


def test_a_stage_of_a_pipeline_refuses_what_no_stage_has(alone: VllmConfig, tmp_path: Path) -> None:
    plains = nn.ModuleList([Plain(), Plain()])
    more = nn.ModuleDict({"layers": nn.ModuleList([*plains, Plain()])})
    save_adapter(inject(more, METHODS["LoRA"]), tmp_path)
    with pytest.raises(AdapterError, match=r"layers\.2"):
        manager_of(alone, model=Stage(plains, {0})).read(1, str(tmp_path))


def test_a_second_registration_changes_nothing() -> None:
    from vllm.lora import utils

    before = utils._all_lora_classes
    register()
    assert utils._all_lora_classes is before
