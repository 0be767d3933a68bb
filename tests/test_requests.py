"""Whose a token is: rows that models regroup, several models, several threads."""

from __future__ import annotations

import copy
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from test_serving import alone, close, inputs, save_all
from tiny_models import VOCAB, gpt2, llama, randomise
from torch import Tensor, nn

from fastadapt import DoRAConfig, LoRAConfig, inject, load_adapter, save_adapter
from fastadapt.serving import AdapterError, MultiAdapterModel
from fastadapt.serving.requests import Repeats

WIDTH = 16


def saved(base: Any, root: Path, targets: Any = "all-linear", names: Sequence[str] = ("a", "b")) -> dict[str, Path]:
    """Directories of random LoRA adapters for a model of any kind."""
    found = {}
    for seed, name in enumerate(names):
        model = inject(copy.deepcopy(base), LoRAConfig(r=3, target_modules=targets))
        randomise([parameter for parameter in model.parameters() if parameter.requires_grad], seed=seed)
        save_adapter(model, root / name)
        found[name] = root / name
    return found


def serve(base: Any, directories: dict[str, Path]) -> MultiAdapterModel:
    served = MultiAdapterModel(copy.deepcopy(base), budget=4 << 20)
    for name, directory in directories.items():
        served.load(directory, name)
    return served


def oracle(base: Any, directory: Path | None) -> Any:
    model = copy.deepcopy(base)
    return (model if directory is None else load_adapter(model, directory)).eval()


class Net(nn.Module):
    """Embedded tokens through `inner`, on their way made something else of by a test's own `regroup`."""

    def __init__(self, inner: nn.Module, regroup: Any = None) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.inner = inner
        self.head = nn.Linear(WIDTH, 5)
        self.regroup = regroup

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        x = self.inner(x) if self.regroup is None else self.regroup(self.inner, x)
        y: Tensor = self.head(x)
        return y


def net(regroup: Any = None, inner: nn.Module | None = None) -> Net:
    torch.manual_seed(0)
    found = Net(nn.Linear(WIDTH, WIDTH) if inner is None else inner, regroup)
    randomise(list(found.parameters()))
    return found.eval().requires_grad_(False)


def flattened(inner: nn.Module, x: Tensor) -> Tensor:
    y: Tensor = inner(x.flatten(0, 1)).view(x.shape)
    return y


def sequence_first(inner: nn.Module, x: Tensor) -> Tensor:
    y: Tensor = inner(x.transpose(0, 1)).transpose(0, 1)
    return y


def chosen(inner: nn.Module, x: Tensor) -> Tensor:
    """An expert's share of the tokens, in the order in which it likes them."""
    flat = x.flatten(0, 1).clone()
    order = flat[:, 0].argsort()[: len(flat) // 2]
    flat[order] = inner(flat[order])
    return flat.view(x.shape)


def permuted(inner: nn.Module, x: Tensor) -> Tensor:
    """All tokens, and as many as there are rows in decoding, sorted by what they hold."""
    flat = x.flatten(0, 1)
    order = flat[:, 0].argsort()
    y: Tensor = inner(flat[order])[order.argsort()].view(x.shape)
    return y


def doubled(inner: nn.Module, x: Tensor) -> Tensor:
    y: Tensor = inner(torch.cat([x, -x]))[: len(x)]
    return y


def windows(inner: nn.Module, x: Tensor) -> Tensor:
    y: Tensor = inner(x.reshape(x.shape[0] * 2, -1, x.shape[-1])).view(x.shape)
    return y


NAMES = ["a", "b", None, "b"]


def check(base: Net, directories: dict[str, Path], names: Sequence[str | None], tokens: int = 4) -> None:
    """Every row is its adapter's."""
    served = serve(base, directories)
    ids = torch.randint(VOCAB, (len(names), tokens), generator=torch.Generator().manual_seed(2))
    y = served(ids, adapter_ids=names)
    for row, name in enumerate(names):
        expected = oracle(base, None if name is None else directories[name])(ids)[row]
        assert close(y[row], expected), (row, name)


@pytest.mark.parametrize("regroup", [None, flattened, windows])
@pytest.mark.parametrize("tokens", [4, 16])
def test_rows_that_stay_together_are_served_mixed(tmp_path: Path, regroup: Any, tokens: int) -> None:
    base = net(regroup)
    check(base, saved(base, tmp_path), NAMES, tokens)


@pytest.mark.parametrize("regroup", [sequence_first, chosen, permuted, doubled])
def test_regrouped_rows_are_refused_mixed_and_served_alike(tmp_path: Path, regroup: Any) -> None:
    base = net(regroup)
    directories = saved(base, tmp_path)
    for tokens in (1, 2, 4):  # with one token, as in decoding, there are as many tokens as rows
        served = serve(base, directories)
        ids = torch.randint(VOCAB, (4, tokens), generator=torch.Generator().manual_seed(2))
        with pytest.raises(ValueError, match=r"inner was called with a tensor \(.*; ask for one adapter at a time"):
            served(ids, adapter_ids=NAMES)
        for name in ("a", "b", None):
            assert close(served(ids, adapter_ids=name), oracle(base, None if name is None else directories[name])(ids))


def test_a_model_with_more_positions_than_tokens(tmp_path: Path) -> None:
    base = gpt2(n_positions=4 * VOCAB)
    directories = save_all(base, tmp_path, ["lora", "dora"])
    served, batch = serve(base, directories), inputs(2)
    mixed = served(**batch, adapter_ids=["lora", "dora"]).logits
    for row, name in enumerate(directories):
        assert close(mixed[row], alone(base, directories[name], batch)[row])


class Unpadded(Net):
    """A model that leaves out what a mask says is padding, as encoders do for speed."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.embed(input_ids)
        real = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        y = torch.zeros(*input_ids.shape, 5)
        y[real.bool()] = self.head(self.inner(x[real.bool()]))
        return y


def test_rows_whose_padding_a_model_leaves_out(tmp_path: Path) -> None:
    base = net()
    base.__class__ = Unpadded
    directories = saved(base, tmp_path)
    check(base, directories, NAMES)
    served, ids = serve(base, directories), torch.randint(VOCAB, (2, 5), generator=torch.Generator().manual_seed(2))
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 0, 0, 0, 0]])  # six tokens: two equal parts of no row
    served(ids, adapter_ids=["a", "b"])
    with pytest.raises(ValueError, match=r"inner was called with a tensor \(6, .* regroups its rows"):
        served(ids, attention_mask=mask, adapter_ids=["a", "b"])
    found = served(ids, attention_mask=mask, adapter_ids="a")
    assert close(found, oracle(base, directories["a"])(ids, attention_mask=mask))


def test_layers_that_no_adapter_of_the_request_touches_are_the_base(tmp_path: Path) -> None:
    base = net(permuted)
    directories = saved(base, tmp_path, ["head"]) | saved(base, tmp_path / "all", names=("all",))
    check(base, directories, NAMES)


def test_a_model_that_cannot_be_traced_is_served_one_adapter_at_a_time(tmp_path: Path) -> None:
    def refuse_nan(inner: nn.Module, x: Tensor) -> Tensor:
        if not x.isfinite().all():
            raise RuntimeError("not finite")
        y: Tensor = inner(x)
        return y

    base = net(refuse_nan)
    directories = saved(base, tmp_path)
    served = serve(base, directories)
    ids = torch.randint(VOCAB, (2, 3))
    said = "could not be followed to this layer.*three short rows ended in RuntimeError: not finite"
    with pytest.raises(ValueError, match=said):
        served(ids, adapter_ids=["a", "b"])
    assert close(served(ids, adapter_ids="a"), oracle(base, directories["a"])(ids))


def test_a_mixture_of_experts_of_transformers(tmp_path: Path) -> None:
    from transformers import SwitchTransformersConfig, SwitchTransformersForConditionalGeneration

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": VOCAB, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_heads": 4}
    layers: dict[str, Any] = {"num_layers": 2, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1}
    config = SwitchTransformersConfig(**sizes, **layers, num_experts=4, initializer_factor=1.0)
    base = SwitchTransformersForConditionalGeneration(config).eval()
    directories = saved(base, tmp_path) | saved(base, tmp_path / "attention", ["q", "v"], ("qv", "qv2"))
    served = serve(base, directories)
    ids = torch.randint(3, VOCAB, (3, 5), generator=torch.Generator().manual_seed(1))
    batch = {"input_ids": ids, "decoder_input_ids": ids[:, :3]}
    for name in ("a", "qv"):
        assert close(served(**batch, adapter_ids=name).logits, alone(base, directories[name], batch))
    with pytest.raises(ValueError, match="experts"):
        served(**batch, adapter_ids=["a", "b", "a"])
    mixed = served(**batch, adapter_ids=["qv", None, "qv2"]).logits
    for row, name in enumerate(("qv", None, "qv2")):
        expected = alone(base, None if name is None else directories[name], batch)
        assert close(mixed[row], expected[row])


def test_images_that_are_not_as_many_in_every_row(tmp_path: Path) -> None:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )
    text = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=66, vision_feature_layer=-1)
    base = LlavaForConditionalGeneration(config).eval()
    directories = saved(base, tmp_path) | saved(base, tmp_path / "text", ".*language_model.*q_proj", ("text",))
    served = serve(base, directories)
    images = torch.randn(4, 3, 8, 8)

    def row(count: int) -> Tensor:
        ids = torch.randint(3, 60, (16,))
        ids[1 : 1 + 4 * count] = 66
        return ids

    def call(model: Any, ids: Tensor, pixels: Tensor, **more: Any) -> Tensor:
        with torch.no_grad():
            logits: Tensor = model(input_ids=ids, **({"pixel_values": pixels} if len(pixels) else {}), **more).logits
        return logits

    for counts, names in [((1, 1), ["a", "b"]), ((2, 2), ["b", "a"]), ((2, 0), ["text", None])]:
        ids, start = torch.stack([row(count) for count in counts]), 0
        logits = call(served, ids, images[: sum(counts)], adapter_ids=names)
        for index, (count, name) in enumerate(zip(counts, names, strict=True)):
            model = oracle(base, None if name is None else directories[name])
            expected = call(model, ids[index : index + 1], images[start : start + count])[0]
            assert close(logits[index], expected), (counts, index)
            start += count
    for counts in ((2, 0), (1, 3), (1, 2)):
        ids = torch.stack([row(count) for count in counts])
        with pytest.raises(ValueError, match="as with several images a row"):
            call(served, ids, images[: sum(counts)], adapter_ids=["a", "b"])
        assert torch.isfinite(call(served, ids, images[: sum(counts)], adapter_ids="a")).all()


def test_images_that_lie_in_one_row_of_a_vision_model(tmp_path: Path) -> None:
    """Its attention hides them from each other, of which NaN times zero shows nothing: no reason to refuse a batch."""
    from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, PixtralVisionConfig

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"num_hidden_layers": 1, "num_attention_heads": 2}
    vision = PixtralVisionConfig(hidden_size=16, intermediate_size=24, image_size=8, patch_size=4, **sizes)
    text = LlamaConfig(vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_key_value_heads=2, **sizes)
    features: dict[str, Any] = {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"}
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=66, **features)
    base = LlavaForConditionalGeneration(config).eval()
    directories = saved(base, tmp_path)
    ids = torch.randint(3, 60, (2, 8))
    ids[:, 1:5] = 66
    batch = {"input_ids": ids, "pixel_values": torch.randn(2, 3, 8, 8), "image_sizes": torch.full((2, 2), 8)}
    mixed = serve(base, directories)(**batch, adapter_ids=["a", "b"]).logits
    for row, name in enumerate("ab"):
        assert close(mixed[row], alone(base, directories[name], batch)[row])


@pytest.mark.parametrize(
    ("repeats", "called", "expected"),
    [
        (Repeats(), 2, [0, 1]),
        (Repeats(), 0, []),
        (Repeats(), 4, None),
        (Repeats(), 3, None),
        (Repeats(3), 6, [0, 0, 0, 1, 1, 1]),
        (Repeats(3), 2, [0, 1]),
        (Repeats(3), 4, None),
        (Repeats(guided=True), 2, [0, 1]),
        (Repeats(guided=True), 4, [0, 1, 0, 1]),
        (Repeats(2, guided=True), 4, None),
        (Repeats(2, guided=True), 8, [0, 0, 1, 1, 0, 0, 1, 1]),
        (Repeats(2, own=True), 2, None),
        (Repeats(own=True), 2, [0, 1]),
    ],
)
def test_what_generate_makes_of_rows(repeats: Repeats, called: int, expected: list[int] | None) -> None:
    assert repeats.rows(2, called) == expected


def test_guidance_that_doubles_rows(tmp_path: Path) -> None:
    """A model whose generate runs its rows once more behind all rows, as those for music and images do."""
    base = llama()
    directories = save_all(base, tmp_path, ["lora", "dora"])

    class Guided(type(base)):  # type: ignore[misc]
        def generate(self, input_ids: Tensor, guidance_scale: float = 1.0) -> Tensor:
            if guidance_scale == 1.0:
                both: Tensor = self(input_ids).logits
                return both
            first, second = self(torch.cat([input_ids, input_ids.flip(1)])).logits.chunk(2)
            return second + guidance_scale * (first - second)

    def guided(model: Any) -> Any:
        model = copy.deepcopy(model)
        model.__class__ = Guided
        return model.eval()

    served = MultiAdapterModel(guided(base), budget=4 << 20)
    for name, directory in directories.items():
        served.load(directory, name)
    ids = inputs(3)["input_ids"]
    names = ["lora", None, "dora"]
    for scale in (1.0, 3.0):
        logits = served.generate(input_ids=ids, adapter_ids=names, guidance_scale=scale)
        for row, name in enumerate(names):
            model = oracle(base, None if name is None else directories[name])
            with torch.no_grad():
                expected = guided(model).generate(ids[row : row + 1], scale)[0]
            assert close(logits[row], expected), (scale, name)


# Threads and other models


def test_a_request_is_its_models_alone(tmp_path: Path) -> None:
    base = llama()
    directories = save_all(base, tmp_path, ["lora", "dora"])
    first, second = (serve(base, {name: directory}) for name, directory in directories.items())
    batch, seen = inputs(2), {}
    expected = second(**batch).logits

    class Guide:
        def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
            seen["base"] = second.model(**batch).logits
            seen["own"] = second(**batch, adapter_ids=["dora", None]).logits
            return scores

    from transformers import LogitsProcessorList

    guide: Any = LogitsProcessorList([Guide()])  # type: ignore[list-item]
    settings: dict[str, Any] = {"max_new_tokens": 2, "do_sample": False, "pad_token_id": 0}
    guided = first.generate(**batch, adapter_ids="lora", logits_processor=guide, **settings)
    assert torch.equal(seen["base"], expected)
    assert close(seen["own"][0], alone(base, directories["dora"], batch)[0])
    assert torch.equal(guided, first.generate(**batch, adapter_ids="lora", **settings))


def test_a_request_inside_of_another_one(tmp_path: Path) -> None:
    base = llama()
    directories = save_all(base, tmp_path, ["lora", "dora"])
    served, batch = serve(base, directories), inputs(2)
    with served.running("lora", (), batch):
        assert close(served(**batch, adapter_ids="dora").logits, alone(base, directories["dora"], batch))
        assert close(served(**batch).logits, alone(base, None, batch))
        with pytest.raises(KeyError):
            served(**batch, adapter_ids="nobody")
        assert close(served.model(**batch).logits, alone(base, directories["lora"], batch))
    assert close(served.model(**batch).logits, alone(base, None, batch))


class Halves(nn.Module):
    """A model that hands its work to another thread."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, input_ids: Tensor) -> Tensor:
        with ThreadPoolExecutor(1) as pool:
            logits: Tensor = pool.submit(lambda: self.inner(input_ids=input_ids).logits).result()
        return logits


def test_threads_that_a_model_hands_its_work_to(tmp_path: Path) -> None:
    base = llama()
    halves = Halves(copy.deepcopy(base))
    directories = saved(halves, tmp_path)
    served, batch = serve(halves, directories), inputs(2)
    ids = batch["input_ids"]
    assert close(served(ids, adapter_ids="a"), oracle(halves, directories["a"])(ids))
    mixed = served(ids, adapter_ids=["a", None])
    assert close(mixed[0], oracle(halves, directories["a"])(ids)[0])
    assert close(mixed[1], halves(ids)[1])
    # Nothing tells whose it is while another request runs.
    entered, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with served.running("b", (ids,)):
            entered.set()
            leave.wait(60)

    other = threading.Thread(target=hold)
    other.start()
    entered.wait(60)
    try:
        with pytest.raises(ValueError, match="in a thread without a request of its own while 2 requests run"):
            served(ids, adapter_ids="a")
    finally:
        leave.set()
        other.join()
    assert close(served(ids, adapter_ids="a"), oracle(halves, directories["a"])(ids))


# Models that move, that are compiled, that are in fp16


def test_a_model_that_has_gone_elsewhere_is_refused(tmp_path: Path) -> None:
    base = net()
    served = serve(base, saved(base, tmp_path))
    ids = torch.randint(VOCAB, (2, 4))
    served.model.to("meta")
    for names in ("a", None):
        with pytest.raises(ValueError, match=r"weights are on meta and its adapters on cpu: unwrap\(\) it"):
            served(ids, adapter_ids=names)
    with pytest.raises(ValueError, match="has no memory: serve a model whose weights are there"):
        MultiAdapterModel(net().to("meta"))


def test_a_compiled_model_takes_each_requests_adapters(tmp_path: Path) -> None:
    base = net()
    directories = saved(base, tmp_path)
    served = serve(base, directories)
    ids = torch.randint(VOCAB, (2, 4), generator=torch.Generator().manual_seed(0))
    served.model.forward = torch.compile(served.model.forward, backend="eager")
    for names in (["a", "b"], ["b", "a"], ["a", None], [None, None], ["b", "b"]):
        y = served(ids, adapter_ids=names)
        for row, name in enumerate(names):
            expected = oracle(base, None if name is None else directories[name])(ids)[row]
            assert close(y[row], expected), names
    torch._dynamo.reset()


@pytest.mark.parametrize("tokens", [1, 5])
def test_dora_in_fp16_is_served_without_an_overflow_before_its_scale(tmp_path: Path, tokens: int) -> None:
    base = net()
    model = inject(copy.deepcopy(base), DoRAConfig(r=3, lora_alpha=3000, target_modules=["inner"]))
    randomise([p for name, p in model.named_parameters() if "lora_" in name and "magnitude" not in name])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("lora_A", "lora_B")):
                parameter.mul_(30)
    save_adapter(model, tmp_path / "dora")
    served = MultiAdapterModel(copy.deepcopy(base).half(), budget=1 << 20)
    for name in ("one", "two"):
        served.load(tmp_path / "dora", name)
    ids = torch.randint(VOCAB, (2, tokens), generator=torch.Generator().manual_seed(0))
    expected = oracle(base, tmp_path / "dora")(ids)
    for names in ("one", ["one", "two"]):
        y = served(ids, adapter_ids=names).float()
        assert (y - expected).abs().max() <= 2e-2 * expected.abs().max()


# Layers that torch would pass by


def encoder(nested: bool) -> Net:
    layer = nn.TransformerEncoderLayer(WIDTH, 4, 24, batch_first=True)
    return net(inner=nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("nested", [False, True])
def test_torchs_fused_encoder_layers_do_not_pass_adapters_by(tmp_path: Path, nested: bool) -> None:
    base = encoder(nested)
    directories = saved(base, tmp_path, ["linear1", "linear2"])
    ids = torch.randint(VOCAB, (2, 5), generator=torch.Generator().manual_seed(1))
    mask = torch.tensor([[False] * 5, [False] * 3 + [True] * 2, [False] * 5])
    base.regroup = lambda inner, x: inner(x, src_key_padding_mask=mask[: len(x), : x.shape[1]])
    plain = base(ids)
    served = serve(base, directories)
    y = served(ids, adapter_ids=["a", None])
    trained = oracle(base, directories["a"]).train()  # which calls its layers
    for module in trained.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.0
    expected = trained(ids)
    assert not close(expected[0], plain[0])
    assert close(y[0], expected[0])
    assert close(y[1][:3], plain[1][:3])
    assert close(oracle(base, directories["a"])(ids)[0], expected[0])
    served.unwrap()
    assert torch.equal(served.model(ids), plain)


def test_what_torchs_attention_never_calls_is_refused(tmp_path: Path) -> None:
    base = encoder(False)
    served = serve(base, {})
    directory = saved(base, tmp_path, ["linear1"], ("a",))["a"]
    config = directory / "adapter_config.json"
    config.write_text(config.read_text().replace("linear1", "out_proj"))
    with pytest.raises(AdapterError, match="reads its weight and never calls it"):
        served.load(directory)
