"""A model's own loss from chunks of logits: the same, its gradients too, whatever the model does to its logits."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from test_cross_entropy import note
from tiny_models import SIZES, VOCAB, gpt2, headed, llama, output, randomise, tokens
from torch import Tensor, nn

import fastadapt
from fastadapt import DoRAConfig, LoRAConfig, chunk_loss, inject
from fastadapt.training import deferred

# PEFT's of transformers, and of tied layers.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning", "ignore:.*weight_tying")

CHUNK = 4 * VOCAB * 4  # four rows


def made(name: str, **fields: Any) -> Any:
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{"vocab_size": VOCAB, "pad_token_id": 0, **SIZES, **fields})
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():  # logits that a softcap bends
        model.get_output_embeddings().weight.mul_(20)
    return model


MODELS: dict[str, Callable[[], Any]] = {
    "Llama": llama,
    "Gemma2, a softcap": lambda: made("Gemma2", final_logit_softcapping=2.0, head_dim=8),
    "Granite, divided": lambda: made("Granite", logits_scaling=3.0),
    "Cohere, multiplied": lambda: made("Cohere", logit_scale=0.25),
    "Mixtral, a loss of its router": lambda: made(
        "Mixtral", output_router_logits=True, num_local_experts=2, router_aux_loss_coef=0.5
    ),
    "OPT": lambda: made("OPT", ffn_dim=48, word_embed_proj_dim=32, dropout=0.0, attention_dropout=0.0),
    "GPT-2": gpt2,
    "BERT, masked": lambda: headed("BertForMaskedLM"),
}


def head_of(model: Any) -> str:
    head = model.get_output_embeddings()
    return next(name for name, module in model.named_modules() if module is head)


def config(kind: str, model: Any, other: str = "") -> Any:
    """An adapter on the head, or the head whole; and on some layer inside."""
    inner = next(
        name for name in ("q_proj", "c_attn", "query") if any(name in path for path, _ in model.named_modules())
    )
    head = head_of(model).split(".")[-1]
    fields: dict[str, Any] = {"r": 2, "lora_alpha": 3, "target_modules": [inner]}
    if kind == "whole":
        fields["modules_to_save"] = [head]
    elif kind != "frozen":
        fields["target_modules"] = [inner, head]
    if other == "peft":
        return peft.LoraConfig(use_dora=kind == "DoRA", **fields)
    return (DoRAConfig if kind == "DoRA" else LoRAConfig)(**fields)


def labels() -> Tensor:
    found = tokens()
    found[0, :4] = found[1, 8] = -100
    return found


def results(model: Any, **options: Any) -> dict[str, Tensor]:
    model.zero_grad()
    loss = model(tokens(), labels=labels(), **options).loss
    loss.backward()
    return {
        "loss": loss.detach(),
        **{name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None},
    }


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The losses that are computed in chunks."""
    found: list[Any] = []
    loss = deferred.linear_cross_entropy
    monkeypatch.setattr(deferred, "linear_cross_entropy", lambda *a, **k: found.append(k) or loss(*a, **k))
    return found


def assert_same(model: Any, calls: list[Any], chunked: bool = True, **options: Any) -> None:
    """That the loss and the gradients are the model's own, and the logits are not there."""
    wanted = results(model, **options)
    chunk_loss(model, chunk_bytes=CHUNK)
    calls.clear()
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(note(saved), lambda tensor: tensor):
        found = results(model, **options)
    assert len(calls) == chunked
    whole = labels().numel() * VOCAB  # of logits
    assert any(tensor.shape[-1:] == (VOCAB,) and tensor.numel() == whole for tensor in saved) != chunked
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("kind", ["LoRA", "DoRA", "whole", "frozen"])
@pytest.mark.parametrize("name", MODELS)
def test_it_is_the_model_s_own_loss(name: str, kind: str, calls: list[Any]) -> None:
    model = inject(MODELS[name](), config(kind, MODELS[name]())).train()
    randomise([p for p in model.parameters() if p.requires_grad and p.shape[0] != VOCAB])
    options: dict[str, Any] = {} if name.startswith("BERT") else {"num_items_in_batch": torch.tensor(5)}
    for part in model.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    assert_same(model, calls, **options)


@pytest.mark.parametrize("kind", ["LoRA", "DoRA", "whole", "frozen"])
def test_peft_models(kind: str, calls: list[Any]) -> None:
    """Accelerated, against PEFT's own loss on the same parameters."""
    model = peft.get_peft_model(llama(), config(kind, llama(), "peft")).train()
    randomise([p for p in model.parameters() if p.requires_grad and p.shape[0] != VOCAB])
    wanted = results(model)
    fastadapt.accelerate_peft(model)
    assert_same(model, calls)
    for name, value in results(model).items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-4, atol=1e-6)
    with model.disable_adapter():
        calls.clear()
        base = llama().train()
        torch.testing.assert_close(model(tokens(), labels=labels()).loss, base(tokens(), labels=labels()).loss)


@pytest.mark.parametrize("how", ["autocast", "16 bits"])
@pytest.mark.parametrize("name", ["Llama", "Gemma2, a softcap"])
def test_16_bits(name: str, how: str, calls: list[Any]) -> None:
    """As near to the loss in fp32 as the model's own."""
    exact = inject(MODELS[name](), config("DoRA", MODELS[name]())).train()
    randomise([p for p in exact.parameters() if p.requires_grad])
    model = copy.deepcopy(exact)
    if how == "16 bits":
        model.to(torch.bfloat16)
    wanted = results(exact)

    def run() -> dict[str, Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
            return results(model)

    own = run()
    chunk_loss(model, chunk_bytes=CHUNK)
    found = run()
    assert len(calls) == 1
    assert found["loss"].dtype is torch.float32
    for key, value in wanted.items():
        error = (own[key].float() - value).norm()
        assert (found[key].float() - value).norm() <= 1.5 * error + 0.01 * value.norm(), key
        assert found[key].dtype == own[key].dtype


def adapted(kind: str = "DoRA") -> Any:
    model = inject(llama(), config(kind, llama())).train()
    randomise([p for p in model.parameters() if p.requires_grad])
    return model


def test_logits_are_not_returned_unless_they_are_asked_for() -> None:
    model = adapted()
    wanted = model(tokens(), labels=labels())
    chunk_loss(model)
    found = model(tokens(), labels=labels())
    assert found.logits is None
    assert "logits" not in found
    assert [type(part) for part in model(tokens(), labels=labels(), return_dict=False, use_cache=False)] == [Tensor]
    chunk_loss(model, keep_logits=True)
    found = model(tokens(), labels=labels())
    found.loss.backward()
    assert found.logits.shape == wanted.logits.shape
    with torch.no_grad():
        assert torch.equal(found.logits.argmax(-1), wanted.logits.argmax(-1))
    torch.testing.assert_close(found.logits[:, -1], wanted.logits[:, -1])
    # Without labels, without gradients, in evaluation: as ever.
    chunk_loss(model)
    assert model(tokens()).logits is not None
    with torch.no_grad():
        assert torch.equal(model(tokens(), labels=labels()).logits, wanted.logits)
    assert model.eval()(tokens(), labels=labels()).logits is not None


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", MODELS)
def test_evaluation(name: str, mode: Callable[[], Any], calls: list[Any]) -> None:
    model = inject(MODELS[name](), config("LoRA", MODELS[name]()))
    randomise([p for p in model.parameters() if p.requires_grad])
    inputs = {"input_ids": tokens(), "labels": labels()}
    with mode():
        wanted = model.eval()(**inputs)
        chunk_loss(model, evaluation=True, chunk_bytes=CHUNK)
        found = model(**inputs)
        assert len(calls) == 1
        assert "logits" not in found
        torch.testing.assert_close(found.loss, wanted.loss)
        assert model(input_ids=tokens()).logits is not None
        chunk_loss(model, evaluation=True, keep_logits=True)
        found = model(**inputs)
        torch.testing.assert_close(found.logits.float().sum(), wanted.logits.float().sum())
    # With gradients in eval mode, as an attribution method runs: the model's own.
    calls.clear()
    chunk_loss(model, evaluation=True)
    assert model(**inputs).logits is not None
    assert len(calls) == 0
    model.train()
    results(model)
    assert len(calls) == 1


def test_it_is_undone_copied_and_pickled(calls: list[Any]) -> None:
    model = adapted()
    chunk_loss(model)
    chunk_loss(model, chunk_bytes=CHUNK)  # in the place of the first
    assert len(model._forward_hooks) == len(model._forward_pre_hooks) == 1
    for other in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        calls.clear()
        other(tokens(), labels=labels()).loss.backward()
        assert [call["chunk_bytes"] for call in calls] == [CHUNK]
        assert (
            other is model
            or other.lm_head.adapters.default.lora_A.grad is not model.lm_head.adapters.default.lora_A.grad
        )
        chunk_loss(other, enabled=False)
        assert other(tokens(), labels=labels()).logits is not None
        assert not other._forward_hooks
        assert not other._forward_pre_hooks
    chunk_loss(model, enabled=False)


class Curious(nn.Module):
    """A language model that does with its logits what the test says, beside its loss."""

    def __init__(self, extra: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head, self.extra = nn.Embedding(VOCAB, 12), nn.Linear(12, VOCAB), extra

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, ids: Tensor, labels: Tensor | None = None) -> Any:
        logits = self.head(self.embed(ids).tanh())
        loss = None if labels is None else self.extra(logits, labels)
        return {"loss": loss, "logits": logits}


def cross_entropy(logits: Tensor, given: Tensor, columns: int = VOCAB, **options: Any) -> Tensor:
    return nn.functional.cross_entropy(logits.reshape(-1, columns), given.reshape(-1), **options)


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:  # type: ignore[override]
        return dy * 2


# What a model may do, and in how many chunked losses it ends.
DOES: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], int]] = {
    "shifts logits and labels": (lambda z, y: cross_entropy(z[..., :-1, :].contiguous(), y[..., 1:]), 1),
    "shifts in another way": (lambda z, y: cross_entropy(z[:, :-1], y[:, 1:]), 1),
    "takes one row": (lambda z, y: cross_entropy(z[0], y[0]), 1),
    "smooths": (lambda z, y: cross_entropy(z, y, label_smoothing=0.1), 1),
    "one loss a token": (lambda z, y: cross_entropy(z.float(), y, reduction="none").square().sum(), 1),
    "flattens": (lambda z, y: nn.CrossEntropyLoss()(z.flatten(0, 1), y.flatten()), 1),
    "caps twice": (lambda z, y: cross_entropy(2 * torch.tanh(3 * torch.tanh(z / 3) / 2), y), 0),
    "scales before and behind a cap": (lambda z, y: cross_entropy(0.5 * (torch.tanh(z * 1.5) * 4), y), 1),
    "two losses": (lambda z, y: cross_entropy(z, y) + cross_entropy(z / 2, y, reduction="sum"), 2),
    "a loss beside it": (lambda z, y: cross_entropy(z, y) + z.logsumexp(-1).square().mean(), 1),
    "a loss before it": (lambda z, y: z.logsumexp(-1).square().mean() + cross_entropy(z, y), 0),
    "writes into them": (lambda z, y: cross_entropy(z.mul_(0.5), y) + cross_entropy(z, y), 0),
    "a negative cap": (lambda z, y: cross_entropy(torch.tanh(z) * -2, y), 0),
    "another vocabulary": (lambda z, y: cross_entropy(z[..., :60], y % 60, columns=60), 0),
    "weights of classes": (lambda z, y: cross_entropy(z, y, weight=torch.linspace(1, 2, VOCAB)), 0),
    "probabilities": (lambda z, y: nn.functional.cross_entropy(z[0], torch.full((9, VOCAB), 1 / VOCAB)), 0),
    "its own formula": (lambda z, y: -z.log_softmax(-1).gather(-1, y.clamp(min=0)[..., None]).mean(), 0),
    "two sets of rows": (lambda z, y: torch.cat([z, z * 2]).logsumexp(-1).mean(), 0),
    "in double": (lambda z, y: cross_entropy(z.double(), y).float(), 0),
}  # fmt: skip


@pytest.mark.parametrize("what", DOES)
def test_whatever_a_model_does_to_its_logits(what: str, calls: list[Any]) -> None:
    extra, count = DOES[what]
    model = Curious(extra).train()
    with torch.no_grad():
        model.head.weight.mul_(5)
    gradients = []
    for chunked in (False, True):
        chunk_loss(model, enabled=chunked, chunk_bytes=CHUNK)
        model.zero_grad()
        loss = model(tokens(), labels=labels())["loss"]
        loss.backward()
        gradients.append([loss.detach(), *[p.grad.clone() for p in model.parameters()]])  # type: ignore[union-attr]
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-6)
    assert len(calls) == count


def test_a_function_of_somebody_s_is_refused() -> None:
    model = Curious(lambda z, y: Doubled.apply(z).sum()).train()
    chunk_loss(model)
    with pytest.raises(ValueError, match=r"chunk_loss\(model, enabled=False\)"):
        model(tokens(), labels=labels())["loss"].backward()


def test_an_error_inside_leaves_the_head_as_it_was() -> None:
    def fails(z: Tensor, y: Tensor) -> Tensor:
        raise KeyError("inside")

    model = Curious(fails).train()
    chunk_loss(model)
    with pytest.raises(KeyError, match="inside"):
        model(tokens(), labels=labels())
    assert "forward" not in model.head.__dict__
    assert type(model(tokens())["logits"]) is Tensor


def test_heads_that_are_more_keep_the_model_s_own_loss(calls: list[Any]) -> None:
    model = adapted()
    chunk_loss(model)
    handle = model.lm_head.register_forward_hook(lambda module, args, y: y * 2)
    doubled = model(tokens(), labels=labels()).loss
    handle.remove()
    wanted = adapted()
    wanted.lm_head.register_forward_hook(lambda module, args, y: y * 2)
    torch.testing.assert_close(doubled, wanted(tokens(), labels=labels()).loss)
    assert calls == []
    for model, words in {
        nn.Linear(2, 2): "does not say which layer its head is",
        headed("BertForSequenceClassification"): "it has no head that gives logits of a vocabulary",
        wanted: r"its head \(AdapterLinear\) has hooks or a patched forward",
        peft.get_peft_model(
            llama(), config("LoRA", llama(), "peft")
        ): r"accelerate_peft\(model\) takes one of PEFT's over",
    }.items():
        with pytest.raises(ValueError, match=rf"the loss of \w+ cannot be computed in chunks: .*{words}"):
            chunk_loss(model)
        assert not model._forward_hooks
    with pytest.raises(ValueError, match="chunk_bytes must be at least 1"):
        chunk_loss(llama(), chunk_bytes=0)


def test_compiled_models_have_their_own_loss(calls: list[Any]) -> None:
    model = adapted()
    wanted = results(model)
    chunk_loss(model)
    run = torch.compile(model, backend="aot_eager")
    model.zero_grad()
    loss = run(tokens(), labels=labels()).loss
    loss.backward()
    assert calls == []
    torch.testing.assert_close(loss, wanted["loss"])
    torch.testing.assert_close(model.lm_head.adapters.default.lora_B.grad, wanted[_B], rtol=1e-4, atol=1e-6)


_B = "lm_head.adapters.default.lora_B"


def test_merged_and_disabled_heads(calls: list[Any]) -> None:
    """The base layer alone is what runs then."""
    for change in (fastadapt.merge, lambda model: fastadapt.set_adapter(model, [])):
        model = adapted("LoRA")
        model.model.embed_tokens.weight.requires_grad_()  # so that there is something to train
        change(model)
        assert_same(model, calls)


def test_both_ends_of_a_tie_under_one_adapter(calls: list[Any]) -> None:
    fields = {"r": 2, "target_modules": ["embed_tokens", "lm_head"], "ensure_weight_tying": True}
    model = inject(llama(tie_word_embeddings=True), LoRAConfig(**fields)).train()
    randomise([p for p in model.parameters() if p.requires_grad])
    assert_same(model, calls)


def test_several_adapters_on_a_head(calls: list[Any]) -> None:
    model = adapted("LoRA")
    inject(model, config("DoRA", llama()), adapter_name="second")
    randomise([p for p in model.parameters() if p.requires_grad])
    fastadapt.set_adapter(model, ["default", "second"])
    assert_same(model, calls)


TIED = {
    "LoRA": {},
    "rsLoRA": {"use_rslora": True, "lora_dropout": 0.3},
    "DoRA": {"use_dora": True},
}


@pytest.mark.parametrize("how", TIED)
def test_an_adapter_on_a_tied_head(how: str, calls: list[Any], tmp_path: Path) -> None:
    """It trains by itself; saved, loaded by PEFT, merged and saved whole it computes the same; the embedding stays."""
    fields: dict[str, Any] = {"r": 2, "lora_alpha": 3, "target_modules": ["lm_head"], **TIED[how]}
    base = llama(tie_word_embeddings=True, pad_token_id=0)  # whose row is zero
    before, bare = base.model.embed_tokens.weight.detach().clone(), output(base, tokens()).detach()
    model = inject(base, LoRAConfig(**fields)).train()
    chunk_loss(model, chunk_bytes=CHUNK)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    losses = []
    for _ in range(4):
        loss = model(tokens(), labels=tokens()).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert len(calls) == 4
    assert losses[-1] < losses[0]
    assert torch.equal(model.model.embed_tokens.weight, before)
    want = output(model.eval(), tokens())
    assert not torch.allclose(want, bare, atol=1e-3)

    fastadapt.save_adapter(model, tmp_path / "adapter")
    for read in (peft.PeftModel.from_pretrained, fastadapt.load_adapter):
        other = read(llama(tie_word_embeddings=True, pad_token_id=0), tmp_path / "adapter").eval()
        if how == "DoRA" and read is peft.PeftModel.from_pretrained:  # PEFT divides by the norm of the zero row
            torch.testing.assert_close(output(other, tokens())[..., 1:], want[..., 1:])
        else:
            torch.testing.assert_close(output(other, tokens()), want)
    fastadapt.merge(model)
    torch.testing.assert_close(output(model, tokens()), want, rtol=1e-4, atol=1e-5)
    assert torch.equal(model.model.embed_tokens.weight, before)
    model.save_pretrained(tmp_path / "merged")
    read = type(base).from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(output(read, tokens()), want, rtol=1e-4, atol=1e-5)
    assert torch.equal(read.model.embed_tokens.weight, before)
    fastadapt.unmerge(model)
    assert model.lm_head.base_layer.weight is model.model.embed_tokens.weight
