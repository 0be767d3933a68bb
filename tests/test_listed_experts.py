"""Mixtures whose experts are lists of linear layers, as older models and code from the hub have them."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_requests import oracle, saved, serve
from test_serving import close
from tiny_models import VOCAB, llama, randomise
from torch import Tensor, nn

from fastadapt import DoRAConfig, LoRAConfig, VeRAConfig, inject, load_adapter, merge, save_adapter

HIDDEN, INNER = 32, 24


class Expert(nn.Module):
    def __init__(self, width: int, names: tuple[str, str, str]) -> None:
        super().__init__()
        self.names = names
        for name, shape in zip(names, ((width, INNER), (width, INNER), (INNER, width)), strict=True):
            self.add_module(name, nn.Linear(*shape, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        gate, up, down = map(self.get_submodule, self.names)
        y: Tensor = down(F.silu(gate(x)) * up(x))
        return y


class Looped(nn.Module):
    """As Mixtral was: each expert is called with its tokens, those that it is the first choice of before the others.

    idle: whether experts without tokens are called.
    """

    def __init__(self, width: int = HIDDEN, count: int = 8, top: int = 2, idle: bool = False) -> None:
        super().__init__()
        self.gate = nn.Linear(width, count, bias=False)
        self.experts = nn.ModuleList(Expert(width, ("w1", "w3", "w2")) for _ in range(count))
        self.top, self.idle = top, idle

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        weights, chosen = self.gate(rows).softmax(-1).topk(self.top, -1)
        y = torch.zeros_like(rows)
        for number, expert in enumerate(self.experts):
            rank, token = torch.where(torch.eq(chosen.T, number))
            if len(token) or self.idle:
                y = y.index_add(0, token, expert(rows[token]) * weights[token, rank, None])
        return y.view(x.shape)


class Sorted(nn.Module):
    """As DeepSeek's is: tokens sorted by expert, beside an expert that all tokens go to."""

    def __init__(self, width: int = HIDDEN, count: int = 8, top: int = 2) -> None:
        super().__init__()
        names = ("gate_proj", "up_proj", "down_proj")
        self.weight = nn.Parameter(torch.empty(count, width))
        self.experts = nn.ModuleList(Expert(width, names) for _ in range(count))
        self.shared_experts = Expert(width, names)
        self.top = top

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        weights, chosen = F.linear(rows, self.weight).softmax(-1).topk(self.top, -1)
        order = chosen.flatten().argsort(stable=True)
        sizes = chosen.flatten().bincount(minlength=len(self.experts)).tolist()
        parts = (rows[order // self.top]).split(sizes)
        done = torch.cat([e(part) if len(part) else part for e, part in zip(self.experts, parts, strict=True)])
        y = (done[order.argsort()].view(*weights.shape, -1) * weights[..., None]).sum(1)
        return y.view(x.shape) + self.shared_experts(x)


MIXTURES = {"looped": Looped, "sorted": Sorted, "idle experts called": lambda: Looped(idle=True)}


def mixture(kind: str) -> Any:
    """A Llama with mixtures in the place of its MLPs."""
    model = llama()
    for layer in model.model.layers:
        layer.mlp = MIXTURES[kind]()
        randomise(layer.mlp.parameters())
        with torch.no_grad():  # steep routers would make much of rounding
            next(layer.mlp.parameters()).mul_(0.3)
    return model.eval()


def tokens(rows: int, columns: int, seed: int = 1) -> Tensor:
    return torch.randint(1, VOCAB, (rows, columns), generator=torch.Generator().manual_seed(seed))


def logits(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=ids).logits
    return found


CONFIGS = {
    "LoRA": LoRAConfig(r=3, target_modules="all-linear"),
    "LoRA, dropout": LoRAConfig(r=3, lora_dropout=0.3, target_modules="all-linear"),
    "DoRA": DoRAConfig(r=3, target_modules="all-linear"),
    "DoRA, dropout": DoRAConfig(r=3, lora_dropout=0.3, target_modules="all-linear"),
    "VeRA": VeRAConfig(r=8, target_modules=["w1", "w3"]),
}


@pytest.mark.parametrize("kind", ["looped", "idle experts called"])
@pytest.mark.parametrize("name", CONFIGS)
def test_experts_train_on_their_tokens_alone(name: str, kind: str, tmp_path: Path) -> None:
    base = mixture(kind)
    model = inject(copy.deepcopy(base), CONFIGS[name]).train()
    trained = {key: p for key, p in model.named_parameters() if p.requires_grad}
    randomise([p for key, p in trained.items() if "magnitude" not in key])
    called: dict[str, int] = {}
    for path, module in model.named_modules():
        if isinstance(module, Expert):
            module.register_forward_pre_hook(
                lambda _, args, path=path: called.__setitem__(path, called.get(path, 0) + len(args[0]))
            )
    before = {key: p.detach().clone() for key, p in trained.items()}
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2, weight_decay=0.0)
    model(input_ids=tokens(1, 4)).logits.square().sum().backward()
    optimizer.step()
    experts = [key for key in trained if ".experts." in key]
    idle = [key for key in experts if not called.get(key.partition(".w")[0])]
    assert 0 < len(idle) < len(experts)
    for key in experts:
        grad, moved = trained[key].grad, not torch.equal(trained[key], before[key])
        assert moved == (key not in idle), key
        if key in idle and kind == "looped":
            assert grad is None, key
        else:
            assert grad is not None, key
            assert torch.isfinite(grad).all(), key
            assert bool(grad.any()) == (key not in idle), key
    expected = logits(model.eval(), tokens(3, 5))
    assert not close(expected, logits(base, tokens(3, 5)))
    save_adapter(model, tmp_path / "adapter")
    assert torch.equal(logits(load_adapter(copy.deepcopy(base), tmp_path / "adapter").eval(), tokens(3, 5)), expected)
    merge(model)
    assert close(logits(model, tokens(3, 5)), expected)


def test_names_find_the_layers_of_every_expert() -> None:
    model = inject(mixture("looped"), LoRAConfig(r=2, target_modules=["w1"]))
    found = {key.partition(".adapters")[0] for key, p in model.named_parameters() if p.requires_grad}
    assert found == {f"model.layers.{layer}.mlp.experts.{e}.w1" for layer in range(2) for e in range(8)}


@pytest.mark.parametrize("columns", [1, 4, 16])
@pytest.mark.parametrize("kind", ["looped", "sorted"])
def test_served_are_rows_of_one_adapter_and_what_leaves_experts_alone(kind: str, columns: int, tmp_path: Path) -> None:
    base = mixture(kind)
    directories = saved(base, tmp_path) | saved(base, tmp_path, r".*(q_proj|\.gate)", ("q",))
    directories |= saved(base, tmp_path, r".*(v_proj|shared_experts\.\w+)", ("shared",))
    served, ids = serve(base, directories), tokens(4, columns)
    alone = {name: logits(oracle(base, directory), ids) for name, directory in directories.items()}
    alone[None] = logits(base, ids)  # type: ignore[index]
    for name, expected in alone.items():
        assert close(served(ids, adapter_ids=name).logits, expected)
    mixed = served(ids, adapter_ids=["q", None, "shared", "q"]).logits
    for row, name in enumerate(("q", None, "shared", "q")):
        assert close(mixed[row], alone[name][row])  # type: ignore[index]
    for names in (["a", "b", "a", "b"], ["a", None, "a", "a"], ["q", "q", "q", "b"]):
        with pytest.raises(ValueError, match=r"experts\.\d.* regroups its rows .*; ask for one adapter at a time"):
            served(ids, adapter_ids=names)


class Favourite(Looped):
    """Tokens go to the first expert, all but those whose first feature is large."""

    def __init__(self) -> None:
        super().__init__(count=2, top=1)
        self.gate = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        large = rows[:, 0] > 1.0
        y = torch.empty_like(rows)
        for expert, mask in zip(self.experts, (~large, large), strict=True):
            if mask.any():
                y[mask] = expert(rows[mask])
        return y.view(x.shape)


def test_an_expert_that_all_tokens_of_the_trace_go_to(tmp_path: Path) -> None:
    """What is told from them, that tokens come in their order, would be wrong for a batch where some go elsewhere."""
    base = mixture("looped")
    for layer in base.model.layers:
        layer.mlp = Favourite()
        randomise(layer.mlp.parameters())
    # A token that the config names is none that the trace draws.
    special = base.config.eos_token_id
    with torch.no_grad():
        base.model.embed_tokens.weight.mul_(0.1)[special, 0] = 5.0
        for layer in base.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.post_attention_layernorm.weight[0] = 0.3
    directories = saved(base, tmp_path, ["w1", "w2"])
    served, ids = serve(base, directories), tokens(2, 4)
    ids[ids == special] = special + 1
    ids[0, :2] = special
    with pytest.raises(ValueError, match=r"experts\.0\.w1 .* regroups its rows"):
        served(ids, adapter_ids=["a", "b"])
    assert close(served(ids, adapter_ids="a").logits, logits(oracle(base, directories["a"]), ids))


def with_images(part: str) -> Any:
    """A Llava with a mixture in its language model, which refuses what is not finite, or in its vision tower."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    class Strict(Looped):
        def forward(self, x: Tensor) -> Tensor:
            if not x.isfinite().all():
                raise RuntimeError("not finite")
            return super().forward(x)

    sizes: dict[str, Any] = {"num_hidden_layers": 1, "num_attention_heads": 2}
    vision = CLIPVisionConfig(hidden_size=16, intermediate_size=24, image_size=8, patch_size=4, **sizes)
    text = LlamaConfig(vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=48, num_key_value_heads=2, **sizes)
    torch.manual_seed(0)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=66, vision_feature_layer=-1)
    model = LlavaForConditionalGeneration(config).eval()
    mlp = Strict(HIDDEN, 2, 1) if part == "language_model" else Looped(16, 2, 1)
    randomise(mlp.parameters())
    blocks: list[Any] = [block for path, block in model.named_modules() if re.search(rf"{part}.*layers\.0$", path)]
    blocks[0].mlp = mlp
    return model


@pytest.mark.parametrize("part", ["language_model", "vision_tower"])
def test_images_do_not_make_experts_tokens_lie_in_order(part: str, tmp_path: Path) -> None:
    base = with_images(part)
    served = serve(base, saved(base, tmp_path))
    for seed in range(4):  # in some of them an expert has an even number of tokens, as of two rows in their order
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(3, 60, (2, 16), generator=generator)
        ids[:, 1:5] = 66
        images = torch.randn(2, 3, 8, 8, generator=generator)
        with pytest.raises(ValueError, match=rf"{part}.*experts\.\d\.w1 was called"):
            served(input_ids=ids, pixel_values=images, adapter_ids=["a", "b"])
