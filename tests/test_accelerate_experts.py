"""PEFT's LoRA on stacked weights of experts through our operators: what PEFT computes, on PEFT's own parameters."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_experts import BOTH, CONFIGS, MODELS, Stacked, gpt_oss, logits, mixtral, quiet, qwen3_moe, randomise, theirs
from torch import Tensor, nn
from torch.autograd import forward_ad

import fastadapt
from fastadapt.integrations.peft_layers import Accelerated

peft = pytest.importorskip("peft", minversion="0.19.1")
pytest.importorskip("transformers", minversion="5.5")
lora_layer = pytest.importorskip("peft.tuners.lora.layer")

assert quiet  # the fixture of test_experts, which is in force here as well
# torch's own forward derivatives are scripted.
pytestmark = [
    pytest.mark.filterwarnings("ignore::peft.utils.warning.PeftWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning"),
]

MODEL = "base_model.model.model"


@pytest.fixture
def blocks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """For each block of ours that ran, how many of its two products had a form."""
    from fastadapt.integrations import peft_experts

    found: list[int] = []
    run = peft_experts.experts_output

    def counted(module: Any, args: Any, form_of: Any, **named: Any) -> Tensor:
        forms = [form_of(name) for name in ("gate_up_proj", "down_proj")]
        found.append(sum(form is not None for form in forms))
        return run(module, args, form_of, **named)

    monkeypatch.setattr(peft_experts, "experts_output", counted)
    return found


def experts_of(model: Any, layer: int = 0) -> Any:
    """The outermost of PEFT's layers around the experts."""
    return model.base_model.model.model.layers[layer].mlp.experts


def step(model: Any) -> dict[str, Tensor]:
    """Logits and gradients, that of the hidden states among them."""
    model.zero_grad()
    seen: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        leaf = output.detach().requires_grad_()
        seen.append(leaf)
        return leaf

    handle = model.get_input_embeddings().register_forward_hook(keep)
    y = logits(model)
    handle.remove()
    y.sin().sum().backward()
    assert seen[0].grad is not None
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": y.detach(), "hidden": seen[0].grad, **grads}


def check_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        assert (found[name] - value).norm() <= 1e-5 * value.norm(), name


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("config", CONFIGS)
def test_a_step_is_pefts(model: str, config: str, blocks: list[int]) -> None:
    theirs_ = theirs(MODELS[model], **CONFIGS[config])
    expected, state = step(theirs_), theirs_.state_dict()
    layers = [module for module in theirs_.modules() if isinstance(module, lora_layer.ParamWrapper)]
    report = fastadapt.accelerate_peft(theirs_)
    assert not report.left
    assert set(report.taken.values()) == {"fused"}
    assert blocks == []
    check_equal(step(theirs_), expected)
    depth = len(CONFIGS[config]["target_parameters"])
    assert blocks == [depth] * (len(layers) // depth)
    # The very same parameters, by the same names.
    after = theirs_.state_dict()
    assert list(after) == list(state)
    assert all(after[name].data_ptr() == tensor.data_ptr() for name, tensor in state.items())
    assert [repr(layer).split("\n")[0] for layer in layers] == ["lora.ParamWrapper("] * len(layers)
    fastadapt.restore_peft(theirs_)
    assert all(type(layer) is lora_layer.ParamWrapper for layer in layers)
    check_equal(step(theirs_), expected)


def second(model: Any) -> None:
    config = copy.deepcopy(model.peft_config["default"])
    config.r, config.lora_alpha, config.inference_mode = 3, 7, False
    model.add_adapter("second", config)
    randomise(model)
    fastadapt.accelerate_peft(model)


def both_active(model: Any) -> None:
    second(model)
    model.base_model.set_adapter(["default", "second"])


def switched(model: Any) -> None:
    second(model)
    model.set_adapter("second")


def deleted(model: Any) -> None:
    switched(model)
    model.delete_adapter("default")


def merged(model: Any) -> None:
    model.merge_adapter()


def merged_and_back(model: Any) -> None:
    model.merge_adapter()
    model.unmerge_adapter()


def merged_inside(model: Any) -> None:
    """One of the two layers that are nested: then the other one runs alone, or in PEFT's own way."""
    experts_of(model, 0).merge()
    experts_of(model, 1).base_layer.merge()


def disabled(model: Any) -> None:
    model.base_model.disable_adapter_layers()


def enabled_again(model: Any) -> None:
    disabled(model)
    model.base_model.enable_adapter_layers()


def copied(model: Any) -> Any:
    return copy.deepcopy(model)


def pickled(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))


def rescaled(model: Any) -> None:
    for layer in model.modules():
        if isinstance(layer, lora_layer.ParamWrapper):
            layer.scale_layer(1.5)


ACTS = [second, both_active, switched, deleted, merged, merged_and_back, merged_inside, disabled, enabled_again]
ACTS += [copied, pickled, rescaled]


@pytest.mark.parametrize("act", ACTS)
def test_what_peft_does_to_a_model_goes_on(act: Callable[[Any], Any], blocks: list[int]) -> None:
    model = theirs(qwen3_moe, target_parameters=BOTH, target_modules=["o_proj"])
    own = copy.deepcopy(model)
    fastadapt.accelerate_peft(model)
    model, own = act(model) or model, act(own) or own
    fastadapt.restore_peft(own)
    blocks.clear()
    with torch.no_grad():
        found, expected = logits(model), logits(own)
    assert (found - expected).norm() <= 1e-5 * expected.norm()
    ours = {merged: [], disabled: [], merged_inside: [1]}.get(act, [2, 2])
    assert blocks == ours
    if act not in (merged, disabled):
        check_equal(step(model), step(own))


def test_files_go_both_ways(tmp_path: Path, blocks: list[int]) -> None:
    model = theirs(gpt_oss, target_parameters=BOTH, target_modules=["o_proj"])
    expected = logits(model)
    fastadapt.accelerate_peft(model)
    model.save_pretrained(tmp_path)
    back = peft.PeftModel.from_pretrained(gpt_oss(), tmp_path).eval()
    torch.testing.assert_close(logits(back), expected)
    # Loaded into layers that run through ours, they are what the next forward computes with.
    other = theirs(gpt_oss, target_parameters=BOTH, target_modules=["o_proj"])
    fastadapt.accelerate_peft(other)
    with torch.no_grad():
        for parameter in other.parameters():
            if parameter.requires_grad:
                parameter.zero_()
        assert not torch.equal(logits(other), logits(model))
        other.load_adapter(tmp_path, "default", is_trainable=True)
        blocks.clear()
        torch.testing.assert_close(logits(other), expected)
    assert blocks == [2, 2]
    torch.testing.assert_close(logits(fastadapt.load_adapter(gpt_oss(), tmp_path)), expected)
    torch.testing.assert_close(logits(model.merge_and_unload()), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["kept", "checkpoint", "reentrant"])
def test_training_goes_as_pefts(checkpointing: bool | None, blocks: list[int]) -> None:
    models = [theirs(qwen3_moe, target_parameters=BOTH, target_modules=["o_proj"]) for _ in range(2)]
    fastadapt.accelerate_peft(models[1])
    losses: list[list[float]] = []
    for model in models:
        if checkpointing is not None:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        model.train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        losses.append([])
        for _ in range(4):
            loss = logits(model).float().logsumexp(-1).mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.item())
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=0)
    assert losses[1][-1] < losses[1][0]
    assert len(blocks) == 4 * 2 * (1 if checkpointing is None else 2)


def inputs(model: Any, tokens: int = 9) -> tuple[Tensor, Tensor, Tensor]:
    """What experts are given: hidden states, two experts for each token, and their weights."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(tokens, 32, generator=generator).to(model.dtype)
    chosen = torch.rand(tokens, 4, generator=generator).argsort(1)[:, :2]
    return x, chosen, torch.rand(tokens, 2, generator=generator).to(model.dtype)


@pytest.mark.parametrize("autocast", [False, True])
def test_in_16_bits_it_is_as_near_to_the_formula_as_pefts(autocast: bool, blocks: list[int]) -> None:
    # 20 columns are none that transformers' own product takes in 16 bits.
    model = theirs(lambda: qwen3_moe(moe_intermediate_size=24), target_parameters=BOTH, target_modules=[])
    exact = experts_of(model)(*inputs(model))
    if not autocast:
        model = model.bfloat16()
    given = inputs(model)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected = experts_of(model)(*given)
        fastadapt.accelerate_peft(model)
        found = experts_of(model)(*given)
    assert blocks == [2]
    assert found.dtype == expected.dtype
    largest = exact.abs().max() * torch.finfo(torch.bfloat16).eps
    assert (found - exact).abs().max() <= 2 * ((expected - exact).abs().max() + largest)


def kept_bytes(run: Callable[[], Tensor], frozen: nn.Module) -> tuple[int, set[int]]:
    """The bytes that a forward keeps for its backward beside parameters, and the memory of all that it keeps."""
    known = {p.untyped_storage().data_ptr() for p in frozen.parameters()}
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = run()
    assert y.requires_grad
    return sum(size for place, size in found.items() if place not in known), set(found)


def test_nothing_of_the_size_of_the_weights_is_made_and_a_is_not_copied() -> None:
    model = theirs(qwen3_moe, target_parameters=BOTH, target_modules=[], r=2)
    layer = experts_of(model)
    x, chosen, routing = inputs(model, 3)
    x.requires_grad_()
    before, _ = kept_bytes(lambda: layer(x, chosen, routing), model)
    fastadapt.accelerate_peft(model)
    after, places = kept_bytes(lambda: layer(x, chosen, routing), model)
    weights = sum(p.nbytes for p in layer.get_base_layer().parameters())
    up, down = layer.base_layer, layer
    copies = sum(part.lora_B["default"].weight.nbytes for part in (up, down))
    assert before > weights
    # x, the rows of up's product and u of both, one copy of each B, and the dispatch.
    assert after < x.nbytes + 6 * (40 + 2 + 2) * 4 + copies + 200
    assert {part.lora_A["default"].weight.untyped_storage().data_ptr() for part in (up, down)} <= places
    # A step of decoding copies no B at all.
    _, places = kept_bytes(lambda: layer(x[:1], chosen[:1], routing[:1]), model)
    assert {part.lora_B["default"].weight.untyped_storage().data_ptr() for part in (up, down)} <= places


@pytest.mark.parametrize("tokens", [0, 1, 2])
def test_few_rows_are_pefts(tokens: int, blocks: list[int]) -> None:
    """Of fewer rows than experts B is read where it lies; 0 rows go through as well."""
    model = theirs(qwen3_moe, target_parameters=BOTH, target_modules=[])
    layer, (x, chosen, routing) = experts_of(model), inputs(model, tokens)
    leaves = [x.requires_grad_(), *[p for p in layer.parameters() if p.requires_grad]]
    results = []
    for _ in range(2):
        y = layer(x, chosen, routing)
        results.append([y, *torch.autograd.grad(y.sin().sum(), leaves)])
        fastadapt.accelerate_peft(model)
    assert blocks == [2]
    for mine, other in zip(results[1], results[0], strict=True):
        assert (mine - other).norm() <= 1e-5 * other.norm()


def test_experts_that_are_called_by_name_and_calls_of_other_kinds(blocks: list[int]) -> None:
    model = theirs(qwen3_moe, target_parameters=BOTH, target_modules=[])
    own = copy.deepcopy(model)
    fastadapt.accelerate_peft(model)
    x, chosen, routing = inputs(model)
    expected = experts_of(own)(x, chosen, routing)
    torch.testing.assert_close(experts_of(model)(x, top_k_weights=routing, top_k_index=chosen), expected)
    assert blocks == [2]
    for wrong in ((x, chosen), (x, chosen, routing, 1)):
        with pytest.raises(TypeError):
            experts_of(model)(*wrong)
    with pytest.raises(ValueError, match="mixed adapter batches"):
        experts_of(model)(x, chosen, routing, adapter_names=["default"])
    own.set_experts_implementation("eager")
    model.set_experts_implementation("eager")
    tangents = []
    for layer in (experts_of(own), experts_of(model)):
        with forward_ad.dual_level():
            y = layer(forward_ad.make_dual(x, x.sin()), chosen, routing)
            tangents.append(forward_ad.unpack_dual(y).tangent)
    torch.testing.assert_close(tangents[1], tangents[0])
    assert blocks == [2]


def trained_base(layer: Any) -> None:
    layer.get_base_layer().down_proj.requires_grad_()


def hook_on(path: str) -> Callable[[Any], None]:
    return lambda layer: layer.get_submodule(path).register_forward_hook(lambda *_: None) and None


def parallel(layer: Any) -> None:
    layer.get_base_layer()._is_expert_parallel = True


def normed(layer: Any) -> None:
    layer.get_base_layer().has_post_expert_norm = True


def tensor_scaling(layer: Any) -> None:
    layer.base_layer.scaling["default"] = torch.tensor(2.0)


def reversed_in_peft(layer: Any) -> None:
    layer.base_layer._did_swap_in_out_features = False


def one_dtype(layer: Any) -> None:
    layer.get_base_layer().down_proj.data = layer.get_base_layer().down_proj.data.bfloat16()


class Special(Tensor):
    """A tensor that may compute something else, as those of sharding and quantising libraries do."""


def special(layer: Any) -> None:
    experts = layer.get_base_layer()
    own = experts.down_proj.data.as_subclass(Special)
    experts.down_proj = nn.Parameter(own, requires_grad=False)


LEFT: dict[str, Callable[[Any], None]] = {
    "the base weight trains": trained_base,
    "the experts have hooks": hook_on("base_layer.base_layer"),
    "a layer inside of it has hooks": hook_on("base_layer"),
    "lora_A or lora_B is more than a linear layer": hook_on("base_layer.lora_A.default"),
    "its experts are shared out among processes": parallel,
    "Qwen3MoeExperts norms what each expert gives": normed,
    "its scaling is a tensor": tensor_scaling,
    "A reads what the experts give, and not what they are given": reversed_in_peft,
    "its gate_up_proj is torch.float32 and its down_proj is torch.bfloat16": one_dtype,
    "the experts' weights are tensors of a kind of their own": special,
    "disabled": lambda layer: layer.base_layer.enable_adapters(False),
    "merged": lambda layer: layer.base_layer.merge(),
    "no adapter is active": lambda layer: [part.set_adapter([]) for part in (layer, layer.base_layer)] and None,
}


@pytest.mark.parametrize("why", LEFT)
def test_what_is_left_to_peft_says_why(why: str) -> None:
    model = theirs(qwen3_moe, target_parameters=BOTH, target_modules=[])
    LEFT[why](experts_of(model))
    report = fastadapt.accelerate_peft(model)
    path = f"{MODEL}.layers.0.mlp.experts"
    assert report.left.get(path, "").endswith(why)
    assert f"{MODEL}.layers.1.mlp.experts" in report.taken


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = Stacked()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.experts(self.fc(x))
        return y


def test_what_is_no_decorated_experts_stays_pefts() -> None:
    model = peft.get_peft_model(Block(), peft.LoraConfig(target_modules=["fc"], target_parameters=["gate_up_proj"]))
    x = torch.randn(2, 4)
    randomise(model)
    expected = model(x)
    report = fastadapt.accelerate_peft(model)
    assert report.left == {
        "base_model.model.experts": "Stacked has a forward of its own, and is none of the experts that transformers "
        "decorates"
    }
    torch.testing.assert_close(model(x), expected)
    router = theirs(mixtral, target_modules="all-linear")
    report = fastadapt.accelerate_peft(router)
    assert {path.rpartition(".")[2] for path in report.left} == {"gate"}
    one = theirs(lambda: qwen3_moe(num_experts=1, num_experts_per_tok=1), target_parameters=BOTH, target_modules=[])
    assert set(fastadapt.accelerate_peft(one).left.values()) == {"there is one expert alone"}


def test_a_peft_that_does_more_on_experts_keeps_these_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = theirs(qwen3_moe, target_parameters=BOTH, target_modules=["o_proj"])

    def forward(self: Any, x: Tensor, *args: Any) -> Tensor:
        return self.novelty(x)  # type: ignore[no-any-return]

    monkeypatch.setattr(lora_layer.ParamWrapper, "forward", forward)
    report = fastadapt.accelerate_peft(model)
    assert len(report.taken) == 2
    assert len(report.left) == 4
    assert all("more than is known here (novelty)" in why for why in report.left.values())
    assert not isinstance(experts_of(model), Accelerated)


def test_compiled_in_one_graph() -> None:
    model = theirs(qwen3_moe, target_parameters=BOTH, target_modules=[])
    fastadapt.accelerate_peft(model)
    layer, (x, chosen, routing) = experts_of(model), inputs(model)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    leaves = [x.requires_grad_(), *(p for p in layer.parameters() if p.requires_grad)]
    found, expected = (run(x, chosen, routing) for run in (compiled, layer))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    for mine, other in zip(*(torch.autograd.grad(y.sin().sum(), leaves) for y in (found, expected)), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)
