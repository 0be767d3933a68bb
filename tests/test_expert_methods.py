"""What beside plain LoRA goes onto experts: LoRA-FA, EVA, ranks by experts a token; lists of experts as layers."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_experts import BOTH, MODELS, gpt_oss, logits, mixtral, quiet, qwen3_moe, randomise
from torch import Tensor, nn

import fastadapt
from fastadapt import DoRAConfig, EVAConfig, LoRAConfig
from fastadapt.layers.experts import AdapterExperts
from fastadapt.methods import METHODS, AdapterConfig, experts
from fastadapt.model.adapted import adapter_configs, adapter_layers
from fastadapt.optim import LoRAFAAdamW
from fastadapt.training.eva import eva_factors, initialize_eva

peft = pytest.importorskip("peft", minversion="0.21")
pytest.importorskip("transformers", minversion="5.5")

assert quiet  # the fixture of test_experts, which is in force here as well

EXPERTS = "model.layers.0.mlp.experts"


def part(model: Any, name: str, path: str = EXPERTS) -> Any:
    adapter: Any = adapter_layers(model)[path].adapters["default"]
    return adapter.part(name)


# DoRA's norm.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_norm_that_cannot_be_kept_is_made_with_the_product(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In eval with gradients, and compiled, as in training: and not by a product of its own at each step."""
    model = fastadapt.inject(mixtral().to(dtype), DoRAConfig(r=4, target_modules=[], target_parameters=BOTH))
    randomise(model)
    calls: list[int] = []
    alone = experts.base_products
    monkeypatch.setattr(experts, "base_products", lambda *args: calls.append(1) or alone(*args))

    def run(call: Callable[[Any], Tensor] = logits) -> tuple[Tensor, list[Tensor]]:
        model.zero_grad()
        y = call(model)
        if y.requires_grad:
            y.float().square().mean().backward()
        return y.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]

    trained = run()
    model.eval()
    in_eval, again = run(), run()
    compiled = torch.compile(logits, backend="eager")
    with torch.no_grad():
        run(compiled)
        assert not calls
        kept, _ = run()
        run()
    torch._dynamo.reset()
    assert len(calls) == 2 * len(model.model.layers)
    assert all(torch.equal(one, other) for one, other in zip(in_eval[1], trained[1], strict=True))
    assert torch.equal(again[0], in_eval[0])
    assert torch.equal(in_eval[0], trained[0])
    assert (kept - in_eval[0]).float().norm() <= (1e-5 if dtype is torch.float32 else 0.03) * kept.float().norm()


# LoRA-FA.


def kept_by(model: Any, x: Tensor) -> set[int]:
    """The memory of what the first experts keep for their backward."""
    places: set[int] = set()

    def pack(tensor: Tensor) -> Tensor:
        places.add(tensor.untyped_storage().data_ptr())
        return tensor

    chosen = torch.rand(len(x), 4).argsort(1)[:, :2]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        adapter_layers(model)[EXPERTS](x, chosen, torch.rand(len(x), 2, requires_grad=True)).sum()
    return places


@pytest.mark.parametrize("config", [LoRAConfig, DoRAConfig])
def test_a_frozen_a_of_experts_stays_and_nothing_keeps_x(config: Any, tmp_path: Path) -> None:
    model = fastadapt.inject(qwen3_moe(), config(r=4, target_parameters=BOTH, freeze_A=True)).train()
    up, x = part(model, "gate_up_proj"), torch.randn(9, 32, requires_grad=True)
    assert up.freezes_A
    assert x.untyped_storage().data_ptr() not in kept_by(model, x)
    whole = fastadapt.inject(qwen3_moe(), config(r=4, target_parameters=BOTH)).train()
    assert x.untyped_storage().data_ptr() in kept_by(whole, x)
    A = up.lora_A.clone()
    optimizer = LoRAFAAdamW(model, lr=1e-2)
    losses = []
    for _ in range(4):
        loss = logits(model).float().logsumexp(-1).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert torch.equal(up.lora_A, A)
    assert up.lora_B.any()
    fastadapt.save_adapter(model.eval(), tmp_path)
    torch.testing.assert_close(logits(fastadapt.load_adapter(qwen3_moe(), tmp_path)), logits(model))
    if config is LoRAConfig:
        back = peft.PeftModel.from_pretrained(qwen3_moe(), tmp_path).eval()
        torch.testing.assert_close(logits(back), logits(model), rtol=1e-5, atol=1e-6)


def test_each_experts_gradient_imitates_that_of_its_whole_weight() -> None:
    model = fastadapt.inject(qwen3_moe(), LoRAConfig(r=4, lora_alpha=6, target_parameters=BOTH, freeze_A=True))
    optimizer = LoRAFAAdamW(model)
    for name, (n, k) in {"gate_up_proj": (40, 32), "down_proj": (32, 20)}.items():
        adapter = part(model, name)
        A, _ = adapter.factors
        gradient = torch.randn(4, n, k)  # of the weights
        # By columns of lora_B, k·E + e, what the chain rule makes of it.
        adapter.lora_B.grad = (adapter.scaling * gradient @ A.mT).permute(1, 2, 0).flatten(1)
        corrected = optimizer._corrected_grad(adapter.lora_B)
        assert corrected.shape == adapter.lora_B.shape
        imitated = adapter.scaling * corrected.unflatten(1, (4, 4)).permute(2, 0, 1) @ A
        for mine, row, whole in zip(imitated, A, gradient, strict=True):
            best = torch.linalg.lstsq(row.T, whole.T).solution.T @ row
            torch.testing.assert_close(mine, best, rtol=1e-3, atol=1e-4)


# EVA.


def batches(count: int = 4, size: int = 8, length: int = 12, changed: int = 0) -> list[dict[str, Tensor]]:
    """changed: the seed of the tokens that do not count."""
    found = []
    for seed in range(count):
        ids = torch.randint(1, 64, (size, length), generator=torch.Generator().manual_seed(seed))
        other = torch.randint(1, 64, (size, length), generator=torch.Generator().manual_seed(100 + changed + seed))
        mask = torch.ones_like(ids)
        mask[:, -3:] = 0
        found.append({"input_ids": torch.where(mask.bool(), ids, other), "attention_mask": mask})
    return found


def with_eva(make: Callable[[], Any], config: Any = LoRAConfig, tau: float = 0.99, **fields: Any) -> Any:
    fields = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "o_proj"], "target_parameters": BOTH, **fields}
    return fastadapt.inject(make(), config(init_lora_weights="eva", eva_config=EVAConfig(tau=tau), **fields))


def inputs_of_experts(model: Any, given: list[dict[str, Tensor]]) -> dict[str, list[Tensor]]:
    """What each expert of the first layer is given, token by token, in the base model's own words."""
    experts = model.model.layers[0].mlp.experts
    rows: dict[str, list[list[Tensor]]] = {name: [[] for _ in range(4)] for name in ("gate_up_proj", "down_proj")}

    def hook(module: Any, args: Any) -> None:
        x, chosen, _ = args
        counts = mask.reshape(-1).bool()
        for row, ids in zip(x[counts], chosen[counts].tolist(), strict=True):
            for e in ids:
                h = row @ (module.gate_up_proj[e] if module.is_transposed else module.gate_up_proj[e].T)
                h = h + module.gate_up_proj_bias[e] if module.has_bias else h
                rows["gate_up_proj"][e].append(row)
                rows["down_proj"][e].append(module._apply_gate(h[None])[0])

    handle = experts.register_forward_pre_hook(hook)
    with torch.no_grad():
        for batch in given:
            mask = batch["attention_mask"]
            model(**batch)
    handle.remove()
    return {name: [torch.stack(each) if each else torch.empty(0, 0) for each in every] for name, every in rows.items()}


def explained(rows: Tensor, A: Tensor) -> float:
    """The share of the rows' variance that lies in the span of A's."""
    centred = rows - rows.mean(0)
    basis = torch.linalg.qr(A.T).Q
    return float((centred @ basis).square().sum() / centred.square().sum())


@pytest.mark.filterwarnings("ignore:.*keep their random start")
@pytest.mark.parametrize("model", ["qwen3_moe", "gpt_oss"])
def test_each_expert_starts_from_its_own_inputs(model: str) -> None:
    def make() -> Any:
        made = MODELS[model]()
        for name, parameter in made.named_parameters():
            if name.endswith("bias") and ".experts." not in name:
                parameter.data.zero_()  # beside which one token would be like another
        return made

    given = batches()
    factors = eva_factors(with_eva(make, tau=0.999), given, progress=False)
    rows = inputs_of_experts(make(), given)
    for name, every in rows.items():
        A = factors[f"{EXPERTS}.{name}"]
        assert A.shape == (4, 4, {"gate_up_proj": 32, "down_proj": 24 if model == "gpt_oss" else 20}[name])
        seen = [e for e in range(4) if len(every[e]) >= 4]
        assert len(seen) > 1
        for e in seen:
            torch.testing.assert_close(A[e] @ A[e].T, torch.eye(4), rtol=0, atol=1e-5)
            _, sizes, _ = torch.linalg.svd(every[e] - every[e].mean(0), full_matrices=False)
            best = float(sizes[:4].square().sum() / sizes.square().sum())
            assert explained(every[e], A[e]) > 0.96 * best
            assert explained(every[e], A[e]) > max(explained(every[e], A[o]) for o in seen if o != e)


def test_tokens_that_are_masked_do_not_count() -> None:
    first, second = (eva_factors(with_eva(qwen3_moe), batches(changed=seed), progress=False) for seed in (0, 50))
    for name, factor in first.items():
        torch.testing.assert_close(factor, second[name], rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"must have \d+ rows to go with the batch's attention_mask"):
        eva_factors(
            with_eva(qwen3_moe, target_modules=[]),
            batches(),
            forward=lambda model, batch: model(input_ids=batch["input_ids"][:, 1:]),
            progress=False,
        )


@pytest.mark.parametrize("config", [LoRAConfig, DoRAConfig])
def test_started_by_eva_it_is_an_ordinary_adapter(config: Any, tmp_path: Path) -> None:
    fields = {"rank_pattern": {"experts.gate_up_proj": 6}, "alpha_pattern": {"experts.down_proj": 3}}
    model = with_eva(qwen3_moe, config, **fields)
    before = {name: part(model, name) for name in ("gate_up_proj", "down_proj")}
    factors = eva_factors(model, batches(), progress=False)
    initialize_eva(model, factors={f"base_model.model.{name}": factor for name, factor in factors.items()})
    torch.testing.assert_close(logits(model), logits(qwen3_moe()), rtol=1e-5, atol=1e-5)
    for name, old in before.items():
        new = part(model, name)
        assert new is not old
        assert (new.r, new.scaling) == (old.r, old.scaling)
        assert torch.equal(new.factors[0], factors[f"{EXPERTS}.{name}"])
        assert not new.lora_B.any()
        assert new.lora_A.requires_grad
    now = adapter_configs(model)["default"]
    assert isinstance(now, LoRAConfig)
    assert set(now.target_modules or ()) == {
        f"model.layers.{i}.self_attn.{name}" for i in range(2) for name in ("q_proj", "o_proj")
    }
    assert now.rank(f"{EXPERTS}.gate_up_proj") == 6
    assert now.alpha(f"{EXPERTS}.down_proj") == 3
    randomise(model)
    fastadapt.save_adapter(model, tmp_path)
    torch.testing.assert_close(logits(fastadapt.load_adapter(qwen3_moe(), tmp_path)), logits(model))
    if config is LoRAConfig:
        back = peft.PeftModel.from_pretrained(qwen3_moe(), tmp_path).eval()
        torch.testing.assert_close(logits(back), logits(model), rtol=1e-5, atol=1e-5)


def test_a_frozen_a_is_eva_s_too_and_experts_alone_are_enough() -> None:
    model = with_eva(qwen3_moe, target_modules=[], freeze_A=True)
    initialize_eva(model, batches(), progress=False)
    adapter = part(model, "down_proj")
    assert adapter.freezes_A
    A, _ = adapter.factors
    torch.testing.assert_close(A @ A.mT, torch.eye(4).expand(4, -1, -1), rtol=0, atol=1e-5)
    layer = adapter_layers(model)[EXPERTS]
    assert not layer._forward_pre_hooks


def test_whitened_rows_have_the_length_of_their_singular_value() -> None:
    plain = eva_factors(with_eva(qwen3_moe, target_modules=[]), batches(), progress=False)
    config = LoRAConfig(
        r=4, target_parameters=BOTH, init_lora_weights="eva", eva_config=EVAConfig(whiten=True), lora_alpha=6
    )
    white = eva_factors(fastadapt.inject(qwen3_moe(), config), batches(), progress=False)
    for name, rows in white.items():
        torch.testing.assert_close(nn.functional.normalize(rows, dim=2), plain[name], rtol=1e-4, atol=1e-4)
        assert (rows.norm(dim=2).diff(dim=1) > 0).all()  # the largest variance comes first


def test_experts_with_too_few_rows_keep_their_start() -> None:
    given = batches(1, size=3, length=11)
    model = with_eva(qwen3_moe, target_modules=[], r=11)
    rows = inputs_of_experts(qwen3_moe(), given)["gate_up_proj"]
    few = [e for e, each in enumerate(rows) if len(each) < 11]
    assert few
    assert len(few) < 4
    start = part(model, "gate_up_proj").factors[0].clone()
    with pytest.warns(UserWarning, match=r"\d+ of 16 experts' matrices keep their random start"):
        A = eva_factors(model, given, progress=False)[f"{EXPERTS}.gate_up_proj"]
    for e in range(4):
        assert torch.equal(A[e], start[e]) == (e in few)


def test_what_eva_cannot_do_on_experts_says_so() -> None:
    with pytest.raises(ValueError, match=r"down_proj: EVA needs a rank of at most 20, .* got 24"):
        eva_factors(with_eva(qwen3_moe, r=24), batches(), progress=False)
    model = with_eva(qwen3_moe)
    factors = eva_factors(model, batches(), progress=False)
    key = f"{EXPERTS}.gate_up_proj"
    for wrong in (factors[key][:, :3], factors[key].flatten(0, 1)):
        with pytest.raises(ValueError, match=r"gate_up_proj'\] must have shape \[4, 4, 32\]"):
            initialize_eva(model, factors={**factors, key: wrong})
    with pytest.raises(ValueError, match=rf"has none for {key}"):
        initialize_eva(model, factors={name: factor for name, factor in factors.items() if name != key})
    with pytest.warns(UserWarning, match=r"mlp.gate.* keep the random start"):
        initialize_eva(with_eva(qwen3_moe, target_modules="all-linear", target_parameters=None), batches())


@pytest.mark.parametrize("config", sorted(set(METHODS.values()), key=lambda kind: kind.__name__))
def test_other_methods_are_refused_on_experts_by_their_name(config: type[AdapterConfig]) -> None:
    if AdapterExperts in config.layer_kinds:
        return
    with pytest.raises(ValueError, match=f"target_parameters goes with LoRA, DoRA and VeRA alone.*{config.__name__}"):
        config(target_parameters=BOTH)


# Ranks by experts a token.


@pytest.mark.parametrize("model", ["qwen3_moe", "mixtral"])
def test_ranks_are_shared_among_the_experts_of_a_token(model: str, tmp_path: Path) -> None:
    make = MODELS[model]
    ours = fastadapt.inject(make(), LoRAConfig(r=6, lora_alpha=8, target_modules="all-linear", share_rank=True))
    # Two experts a token; gate and up, which are one weight, have twice the rank and lora_alpha together.
    assert (part(ours, "gate_up_proj").r, part(ours, "down_proj").r) == (6, 3)
    assert (part(ours, "gate_up_proj").scaling, part(ours, "down_proj").scaling) == (16 / 6, 8 / 3)
    q: Any = adapter_layers(ours)["model.layers.0.self_attn.q_proj"].adapters["default"]
    assert q.factors[0].shape[0] == 6
    randomise(ours)
    fastadapt.save_adapter(ours, tmp_path)
    fields = json.loads((tmp_path / "adapter_config.json").read_text())
    assert "share_rank" not in fields
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert tensors[f"base_model.model.{EXPERTS}.lora_A.weight"].shape[0] == 4 * 3
    back = peft.PeftModel.from_pretrained(make(), tmp_path).eval()
    torch.testing.assert_close(logits(back), logits(ours), rtol=1e-5, atol=1e-5)
    again = fastadapt.load_adapter(make(), tmp_path)
    torch.testing.assert_close(logits(again), logits(ours))
    assert part(again, "down_proj").r == 3


def test_a_shared_rank_is_at_least_one_and_named_ranks_stay() -> None:
    fields: dict[str, Any] = {"target_parameters": BOTH, "target_modules": [], "share_rank": True}
    one = fastadapt.inject(gpt_oss(), LoRAConfig(r=1, **fields))
    assert part(one, "down_proj").r == 1
    pattern = {"layers.0.mlp.experts.down_proj": 5}
    model = fastadapt.inject(gpt_oss(), DoRAConfig(r=8, rank_pattern=pattern, **fields))
    other = "model.layers.1.mlp.experts"
    ranks = [part(model, name, path).r for path in (EXPERTS, other) for name in ("gate_up_proj", "down_proj")]
    assert ranks == [4, 5, 4, 4]
    # A config that has been through it once goes on as it is.
    config = adapter_configs(model)["default"]
    again = fastadapt.inject(gpt_oss(), config)
    assert [part(again, "gate_up_proj").r, part(again, "down_proj").r] == [4, 5]


def test_a_rank_that_cannot_be_shared_is_refused() -> None:
    with pytest.raises(ValueError, match="share_rank is for weights of experts, and target_parameters, None, names"):
        fastadapt.inject(qwen3_moe(), LoRAConfig(target_modules=["q_proj"], share_rank=True))
    model = qwen3_moe()
    model.model.layers[0].mlp.experts.config = SimpleNamespace(num_experts_per_tok=[2, 2])
    with pytest.raises(ValueError, match=r"Qwen3MoeExperts's config does not say how many experts .*rank_pattern"):
        fastadapt.inject(model, LoRAConfig(target_parameters=BOTH, share_rank=True))


# Routers.


def test_a_router_is_exported_and_combined_by_its_weight(tmp_path: Path) -> None:
    names = {"target_modules": ["q_proj"], "target_parameters": ["mlp.gate.weight"], "init_lora_weights": False}
    model = fastadapt.inject(qwen3_moe(), LoRAConfig(r=3, rank_pattern={"q_proj": 5}, **names), "one")
    expected = logits(model)
    fastadapt.export_lora(model, tmp_path / "one", "one")
    fastadapt.inject(model, LoRAConfig(r=2, **names), "two")
    fastadapt.add_weighted_adapter(model, ["one", "two"], [1.0, 0.0], "both", "cat")
    fastadapt.set_adapter(model, "both")
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
    fastadapt.save_adapter(model, tmp_path / "both", "both")
    for directory in ("one", "both"):
        for back in (
            fastadapt.load_adapter(qwen3_moe(), tmp_path / directory),
            peft.PeftModel.from_pretrained(qwen3_moe(), tmp_path / directory).eval(),
        ):
            torch.testing.assert_close(logits(back), expected, rtol=1e-4, atol=1e-5)
    fastadapt.inject(model, LoRAConfig(r=2, target_parameters=BOTH), "experts")
    with pytest.raises(ValueError, match=r"experts \(Qwen3MoeExperts\) has a form for each expert.*exclude_modules"):
        fastadapt.add_weighted_adapter(model, ["one", "experts"], [1.0, 1.0], "all")


# Experts as lists of modules, which models with code of their own have.


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(32, 20, bias=False)
        self.up_proj = nn.Linear(32, 20, bias=False)
        self.down_proj = nn.Linear(20, 32, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))
        return y


class Listed(nn.Module):
    """A block of experts as older models have it: each one runs on the tokens that choose it, if there are any."""

    def __init__(self, top: int = 2) -> None:
        super().__init__()
        self.gate = nn.Linear(32, 4, bias=False)
        self.experts = nn.ModuleList([Expert() for _ in range(4)])
        self.top = top

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, 32)
        routing, chosen = self.gate(rows).softmax(-1).topk(self.top)
        y = torch.zeros_like(rows)
        for e, expert in enumerate(self.experts):
            tokens, place = torch.where(chosen == e)
            if len(tokens):
                y = y.index_add(0, tokens, expert(rows[tokens]) * routing[tokens, place, None])
        return y.view(x.shape)


def listed(kind: Callable[[], Any] = mixtral) -> Any:
    model = kind()
    torch.manual_seed(4)
    for layer in model.model.layers:
        layer.mlp = Listed()
    return model.eval()


def all_linear(kind: Callable[[], Any]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return fastadapt.inject(listed(kind), LoRAConfig(r=4, lora_alpha=8, target_modules="all-linear"))


def test_listed_experts_are_ordinary_layers(tmp_path: Path) -> None:
    theirs = peft.get_peft_model(listed(), peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")).eval()
    paths = {name.removeprefix("base_model.model.") for name, m in theirs.named_modules() if hasattr(m, "lora_A")}
    assert adapter_layers(all_linear(mixtral)).keys() == paths
    assert sum(".experts." in path for path in paths) == 2 * 4 * 3
    randomise(theirs)
    theirs.save_pretrained(tmp_path)
    ours = fastadapt.load_adapter(listed(), tmp_path, trainable=True)
    expected = logits(theirs)
    torch.testing.assert_close(logits(ours), expected, rtol=1e-5, atol=1e-5)
    expected.sin().sum().backward()
    logits(ours).sin().sum().backward()
    grads = {name.replace(".default", ""): p.grad for name, p in theirs.named_parameters() if "lora_" in name}
    for path, layer in adapter_layers(ours).items():
        adapter: Any = layer.adapters["default"]
        for suffix, tensor in adapter.checkpoint_tensors().items():
            theirs_grad = grads[f"base_model.model.{path}.{suffix}"]
            assert (tensor.grad - theirs_grad).norm() <= 1e-4 * theirs_grad.norm() + 1e-7, path
    fastadapt.merge(ours)
    torch.testing.assert_close(logits(ours), expected, rtol=1e-4, atol=1e-5)


def test_listed_experts_of_a_model_whose_stacks_have_their_names(tmp_path: Path) -> None:
    """PEFT looks for stacks in models of this type, and adapts no experts where there are none."""
    ours = all_linear(qwen3_moe)
    assert sum(".experts." in path for path in adapter_layers(ours)) == 2 * 4 * 3
    assert "model.layers.0.mlp.gate" in adapter_layers(ours)
    randomise(ours)
    with pytest.warns(UserWarning, match="layers.0.mlp.gate and others like it, which PEFT leaves out"):
        fastadapt.save_adapter(ours, tmp_path)
    torch.testing.assert_close(logits(fastadapt.load_adapter(listed(qwen3_moe), tmp_path)), logits(ours))


def test_a_listed_expert_without_tokens_does_not_stop_training() -> None:
    model = fastadapt.inject(Listed(top=1), LoRAConfig(r=2, target_modules="all-linear", exclude_modules=["gate"]))
    x = torch.randn(1, 2, 32)
    model(x).sum().backward()
    grads = [p.grad for p in model.parameters() if p.requires_grad]
    assert any(grad is None for grad in grads)
    assert any(grad is not None for grad in grads)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    optimizer.step()
    model(torch.randn(3, 5, 32)).sum().backward()
