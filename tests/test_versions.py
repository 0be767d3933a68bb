"""What is kept is what would be made now: the one rule for everything that outlives a call."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastadapt
from fastadapt import DoRAConfig, LoRAConfig, RepAdapterConfig, VeRAConfig, inject
from fastadapt.staleness import Kept


class Counted:
    """Twice a tensor, kept, and how often that was computed."""

    def __init__(self, **options: Any) -> None:
        self.kept, self.options, self.calls = Kept(), options, 0

    def __call__(self, source: Tensor, *more: Any, **options: Any) -> Tensor:
        def make() -> Tensor:
            self.calls += 1
            return 2 * source

        y = self.kept("double", (source, None), make, *more, **self.options, **options)
        torch.testing.assert_close(y, 2 * source)
        return y

    def made(self, *args: Any, **options: Any) -> int:
        before = self.calls
        self(*args, **options)
        return self.calls - before


def step() -> None:
    parameter = nn.Parameter(torch.ones(1))
    parameter.grad = torch.ones(1)
    torch.optim.SGD([parameter], lr=0.1).step()


def test_made_once_of_what_stays_the_same() -> None:
    double, source = Counted(), torch.randn(3)
    assert [double.made(source), double.made(source), double.made(source.view(3))] == [1, 0, 0]
    assert [double.made(source, "other"), double.made(source, "other")] == [1, 0]
    source.add_(1)
    assert [double.made(source), double.made(source)] == [1, 0]
    assert [double.made(source.clone()), double.made(source)] == [1, 1]
    step()
    assert [double.made(source), double.made(source)] == [1, 0]
    double.kept.forget()
    assert double.made(source) == 1
    for again in (copy.deepcopy(double), pickle.loads(pickle.dumps(double))):
        assert again.made(source) == 1


def test_frozen_tensors_outlast_an_optimizers_steps() -> None:
    double, source = Counted(trained=False), torch.randn(3)
    double(source)
    step()
    assert double.made(source) == 0


def test_what_will_be_differentiated_is_made_anew() -> None:
    double, source = Counted(), torch.randn(3, requires_grad=True)
    assert [double.made(source), double.made(source)] == [1, 1]
    double(source).sum().backward()
    with torch.no_grad():
        assert [double.made(source), double.made(source)] == [1, 0]
    # And what was made without a graph has none to give.
    assert double(source).requires_grad


def test_what_inference_mode_made_stays_there() -> None:
    double, source, x = Counted(), torch.randn(3), torch.randn(3, requires_grad=True)
    with torch.inference_mode():
        double(source)
    (double(source) * x).sum().backward()  # an inference tensor could not be saved for it


def test_another_tensor_at_the_old_address_is_another_tensor() -> None:
    double, parameter = Counted(), nn.Parameter(torch.randn(1 << 16), requires_grad=False)
    addresses = set()
    for _ in range(20):  # the allocator soon gives the first memory again
        parameter.data = parameter.data * 2
        parameter.data = parameter.data + 0.01
        addresses.add(parameter.data_ptr())
        assert double.made(parameter) == 1
    assert len(addresses) < 20


def test_sources_are_not_kept_alive() -> None:
    double, source = Counted(), torch.randn(1 << 16)
    double(source)
    storage = weakref.ref(source.untyped_storage())
    alive = weakref.ref(source)
    del source
    gc.collect()
    assert alive() is None
    assert storage() is None


def test_only_the_latest_names_stay() -> None:
    kept, sources = Kept(most=2), [torch.randn(2) for _ in range(3)]
    made: list[int] = []
    for index in (0, 1, 0, 1, 2, 0):
        kept(index, (sources[index],), lambda: made.append(index))  # noqa: B023
    assert made == [0, 1, 2, 0]


def test_threads_share_what_is_kept() -> None:
    model = inject(nn.Sequential(nn.Linear(16, 16)), DoRAConfig(r=2, target_modules=["0"])).eval()
    x, errors = torch.randn(2, 16), []
    with torch.no_grad():
        expected = model(x)

    def run(forget: bool) -> None:
        try:
            with torch.no_grad():
                for _ in range(200):
                    if forget:
                        fastadapt.forget(model)
                    torch.testing.assert_close(model(x), expected)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(index % 2 == 0,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


def weight_of(model: nn.Sequential) -> Any:
    return model[0].base_layer.weight


def assign_twice(model: nn.Sequential) -> None:
    weight = weight_of(model)
    weight.data = weight.data * 2
    weight.data = weight.data + 0.01


def loads(assign: bool) -> Callable[[nn.Sequential], None]:
    def load(model: nn.Sequential) -> None:
        state = {name: 2 * value if "base" in name else value.clone() for name, value in model.state_dict().items()}
        model.load_state_dict(state, assign=assign)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("adapters" in name)

    return load


# What says that memory may have changed: nothing at all, a mode, or the caller.
WRITES: dict[str, Callable[[nn.Sequential], Any]] = {
    "in place, then eval() and train()": lambda model: (weight_of(model).data.mul_(3), model.eval(), model.train()),
    "+= on .data, then train()": lambda model: (weight_of(model).data.__iadd__(3.0), model.train()),
    "NumPy, then train()": lambda model: (weight_of(model).detach().numpy().__imul__(3), model.train()),
    "in place, then forget": lambda model: (weight_of(model).data.copy_(torch.ones(1)), fastadapt.forget(model)),
    "in place and told": lambda model: weight_of(model).mul_(3),
    "two assignments": assign_twice,
    "transposed in place": lambda model: setattr(weight_of(model), "data", weight_of(model).data.t()),
    "half and back": lambda model: model.half().float(),
    "bfloat16 and back": lambda model: model.to(torch.bfloat16).to(torch.float32),
    "double": lambda model: model.double().float(),
    "state": loads(assign=False),
    "state, assigned": loads(assign=True),
    "another parameter": lambda model: setattr(
        model[0].base_layer, "weight", nn.Parameter(3 * weight_of(model), requires_grad=False)
    ),
}


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize(
    "config",
    [
        DoRAConfig(r=4),
        VeRAConfig(r=4, use_dora=True),
        RepAdapterConfig(r=4, adapter_dropout=0.0),
    ],
    ids=["DoRA", "DVoRA", "RepAdapter"],
)
def test_a_new_base_weight_is_seen(config: Any, write: str, training: bool) -> None:
    """Outputs and gradients are those of a copy of the model, which starts with nothing kept."""
    torch.manual_seed(0)
    config = copy.deepcopy(config)
    config.target_modules = ["0"]
    model = inject(nn.Sequential(nn.Linear(64, 64)), config).train(training)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    x = torch.randn(4, 64)

    def results(of: nn.Module) -> list[Tensor]:
        of.zero_grad()
        with torch.no_grad():
            kept = of(x)
        y = of(x)
        y.square().sum().backward()
        return [kept, y.detach(), *[p.grad for p in of.parameters() if p.grad is not None]]

    results(model)
    WRITES[write](model)
    model.train(model.training if "train()" in write else training)
    for actual, expected in zip(results(model), results(copy.deepcopy(model)), strict=True):
        torch.testing.assert_close(actual, expected)


def test_forgetting_reaches_every_adapter_and_group() -> None:
    model = nn.ModuleDict({name: nn.Linear(8, 8) for name in ("q_proj", "k_proj", "v_proj")})
    inject(model, DoRAConfig(r=2, target_modules=["q_proj", "k_proj", "v_proj"])).eval()
    inject(model, LoRAConfig(r=2, target_modules=["q_proj", "k_proj"]), "other")
    fastadapt.set_adapter(model, "default")
    x = torch.randn(2, 8)
    with torch.no_grad():
        [model[name](x) for name in model]
        model["q_proj"](x)  # its siblings' outputs wait
        for parameter in model.parameters():
            parameter.data.mul_(1.5)
        fastadapt.forget(model)
        expected = copy.deepcopy(model)
        for name in model:
            torch.testing.assert_close(model[name](x), expected[name](x.clone()))
