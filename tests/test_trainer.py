"""Inside transformers' Trainer and TRL's trainers: controls are stepped, saved and taken up, adapters are written."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import VOCAB, llama, output, randomise, tokens
from torch import Tensor, nn

import fastadapt
from fastadapt import integrations
from fastadapt.integrations.transformers import CONTROL_FILE
from fastadapt.methods import AdapterConfig
from fastadapt.model.adapted import adapter_configs, adapter_layers
from fastadapt.model.peft_files import CONFIG_FILE, TENSOR_FILE
from fastadapt.training import deferred

pytest.importorskip("accelerate", reason="a Trainer needs accelerate: pip install 'fastadapt[clients]'")

from transformers import Trainer, TrainingArguments

# These libraries warn of each other.
pytestmark = [pytest.mark.filterwarnings(f"ignore::{kind}") for kind in ("DeprecationWarning", "FutureWarning")] + [
    pytest.mark.filterwarnings("ignore:.*pin_memory")
]

TARGETS = ["q_proj", "v_proj"]
STEPS = 12


def rows(count: int = 16) -> list[dict[str, Tensor]]:
    ids = torch.randint(1, VOCAB, (count, 7), generator=torch.Generator().manual_seed(3))
    return [{"input_ids": row, "labels": row} for row in ids]


def arguments(place: Path, **changes: Any) -> TrainingArguments:
    fields: dict[str, Any] = {
        "output_dir": str(place),
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "save_steps": 4,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return TrainingArguments(**{**fields, **changes})


CONFIGS: dict[str, dict[str, Any]] = {
    "AdaLoRA": {"init_r": 6, "target_r": 3, "total_step": STEPS, "tinit": 2, "tfinal": 3, "deltaT": 2},
    "DeltaLoRA": {"r": 2, "start_step": 6},
    "LoRADrop": {"r": 2},
    "LoRA": {"r": 2},
}


def config(method: str, **changes: Any) -> AdapterConfig:
    made: AdapterConfig = getattr(fastadapt, f"{method}Config")(
        **{"target_modules": TARGETS, **CONFIGS.get(method, {}), **changes}
    )
    return made


def adapted(method: str, **changes: Any) -> Any:
    model = fastadapt.inject(llama(), config(method, **changes))
    randomise([p for p in model.parameters() if p.requires_grad])
    return model


def trained(model: Any) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.state_dict().items() if "adapters" in name}


def by_hand(model: Any, steps: int = STEPS, clip: float = 1.0) -> None:
    """The loop that the README shows, over what a Trainer with these arguments sees."""
    control = fastadapt.control(model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.0)
    model.train()
    data = rows()
    for step in range(steps):
        batch = torch.stack([row["labels"] for row in data[2 * step % 16 :][:2]])
        loss = model(input_ids=batch, labels=batch).loss
        (loss + control.regularizer()).backward()
        torch.nn.utils.clip_grad_norm_(parameters, clip)
        optimizer.step()
        control.step()
        optimizer.zero_grad()


def assert_saved(model: Any, base: Any, place: Path) -> None:
    """That the base with the adapter that is saved there computes what the model does, to the very bits.

    The model's own forward runs under the trainer's autocast from then on.
    """
    read = fastadapt.load_adapter(base, place).eval()
    wanted = llama()
    wanted.model, wanted.lm_head = model.eval().model, model.lm_head
    torch.testing.assert_close(output(read, tokens()), output(wanted, tokens()), rtol=1e-5, atol=1e-6)


def kept(model: Any) -> int:
    return sum(int((layer.adapters["default"].lora_E != 0).sum()) for layer in adapter_layers(model).values())


@pytest.mark.parametrize("method", ["AdaLoRA", "DeltaLoRA"])
def test_a_trainer_does_what_the_loop_by_hand_does(method: str, tmp_path: Path) -> None:
    changes = {"orth_reg_weight": 0.5} if method == "AdaLoRA" else {}
    ours, wanted = adapted(method, **changes), adapted(method, **changes)
    by_hand(wanted)
    given = arguments(tmp_path, lr_scheduler_type="constant", train_sampling_strategy="sequential", save_strategy="no")
    Trainer(ours, given, train_dataset=rows(), callbacks=[integrations.AdapterCallback]).train()
    for name, value in trained(wanted).items():
        torch.testing.assert_close(trained(ours)[name], value, rtol=1e-4, atol=1e-5, msg=name)
    if method == "AdaLoRA":
        assert kept(ours) == kept(wanted) == 3 * 4


@pytest.mark.parametrize("method", ["AdaLoRA", "DeltaLoRA", "LoRADrop"])
@pytest.mark.parametrize("stop", [4, 8])
def test_training_goes_on_to_the_very_bits(method: str, stop: int, tmp_path: Path) -> None:
    whole = adapted(method)
    callbacks = [integrations.AdapterCallback]
    Trainer(whole, arguments(tmp_path), train_dataset=rows(), callbacks=callbacks).train()
    checkpoint = tmp_path / f"checkpoint-{stop}"
    assert {CONFIG_FILE, TENSOR_FILE} <= {path.name for path in checkpoint.iterdir()}
    assert (checkpoint / CONTROL_FILE).exists() == (method != "LoRADrop")
    other = fastadapt.inject(llama(), config(method))
    Trainer(other, arguments(tmp_path), train_dataset=rows(), callbacks=callbacks).train(str(checkpoint))
    found = trained(other)
    assert found.keys() == trained(whole).keys()
    assert all(torch.equal(found[name], value) for name, value in trained(whole).items())
    assert adapter_configs(other) == adapter_configs(whole)


def test_a_supernet_draws_the_sizes_that_it_would_have_drawn(tmp_path: Path) -> None:
    from tiny_models import images, vit

    data = [{"pixel_values": images(1)[0] * (i + 1), "labels": torch.tensor(i % 5)} for i in range(8)]

    def run(**resume: Any) -> Any:
        from transformers import set_seed

        set_seed(0)
        noah = fastadapt.NOAHConfig(supernet=True, dims=[2, 4], depths=[1, 2, 3], patch_size=2)
        model = fastadapt.inject(vit(), noah)
        given = arguments(tmp_path, remove_unused_columns=False, max_steps=6, save_steps=2)
        Trainer(model, given, train_dataset=data, callbacks=[integrations.AdapterCallback]).train(**resume)
        return model

    whole, resumed = run(), run(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert all(torch.equal(trained(resumed)[name], value) for name, value in trained(whole).items())


def test_without_the_callback_a_method_with_a_control_warns_once(tmp_path: Path) -> None:
    given = arguments(tmp_path, save_strategy="no")
    with pytest.warns(UserWarning, match=r"without what AdaLoRA does between the steps.*AdapterCallback") as record:
        Trainer(adapted("AdaLoRA"), given, train_dataset=rows()).train()
    assert len([w for w in record if "between the steps" in str(w.message)]) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        Trainer(adapted("LoRA"), given, train_dataset=rows()).train()
        Trainer(adapted("AdaLoRA"), given, train_dataset=rows(), callbacks=[integrations.AdapterCallback]).train()


def test_it_says_what_it_cannot_go_on_from(tmp_path: Path) -> None:
    callbacks = [integrations.AdapterCallback]
    for seed, place in enumerate(("one", "other")):
        given = arguments(tmp_path / place, max_steps=4, seed=seed)
        Trainer(adapted("DeltaLoRA"), given, train_dataset=rows(), callbacks=callbacks).train()
    elsewhere = tmp_path / "moved"
    (tmp_path / "one").rename(elsewhere)
    checkpoint = elsewhere / "checkpoint-4"

    def resume(output: Path, callback: Any) -> Any:
        model = adapted("DeltaLoRA")
        given = arguments(output, max_steps=5)
        Trainer(model, given, train_dataset=rows(), callbacks=[callback]).train(str(checkpoint))
        return model

    with pytest.raises(ValueError, match=r"has no adapter_control.safetensors.*resume_from"):
        resume(tmp_path / "third", integrations.AdapterCallback())
    with pytest.raises(ValueError, match=r"other.*is not of the checkpoint that the model was loaded from"):
        resume(tmp_path / "other", integrations.AdapterCallback())
    resume(tmp_path / "other", integrations.AdapterCallback(resume_from=checkpoint))


@pytest.mark.parametrize("method", ["AdaLoRA", "DeltaLoRA"])
def test_the_best_checkpoint_brings_its_control_with_it(method: str, tmp_path: Path) -> None:
    """The first is the best: of before the pruning, and of before the anchor."""
    model = adapted(method)
    given = arguments(
        tmp_path,
        load_best_model_at_end=True,
        eval_strategy="steps",
        eval_steps=2,
        save_steps=2,
        metric_for_best_model="turn",
        greater_is_better=False,
    )
    turns = iter(range(100))
    trainer = Trainer(
        model,
        given,
        train_dataset=rows(),
        eval_dataset=rows(2),
        compute_metrics=lambda _: {"turn": next(turns)},
        callbacks=[integrations.AdapterCallback],
    )
    trainer.train()
    assert trainer.state.best_global_step == 2
    trainer.save_model(str(tmp_path / "best"))
    read = fastadapt.load_adapter(llama(), tmp_path / "best")
    torch.testing.assert_close(output(read, tokens()), output(model.eval(), tokens()))
    first = load_file(tmp_path / "checkpoint-2" / TENSOR_FILE)
    assert {name: tuple(t.shape) for name, t in load_file(tmp_path / "best" / TENSOR_FILE).items()} == {
        name: tuple(t.shape) for name, t in first.items()
    }


class Plain(nn.Module):
    """A model that has no save_pretrained."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(4, 3)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        y = self.linear(x)
        return {"loss": nn.functional.cross_entropy(y, labels), "logits": y}


def test_a_model_that_cannot_save_itself_gets_its_adapter_saved(tmp_path: Path) -> None:
    model = fastadapt.inject(Plain(), config("LoRA", target_modules=["linear"]))
    data = [{"x": torch.randn(4), "labels": torch.tensor(1)} for _ in range(4)]
    given = arguments(tmp_path, max_steps=4)
    Trainer(model, given, train_dataset=data, callbacks=[integrations.AdapterCallback]).train()
    read = fastadapt.load_adapter(Plain(), tmp_path / "checkpoint-4")
    x = torch.randn(2, 4)
    assert torch.equal(read.linear(x), model.linear(x))


def test_mixed_precision_and_an_adapter_directory(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "base")
    from transformers import LlamaForCausalLM

    model = fastadapt.inject(LlamaForCausalLM.from_pretrained(tmp_path / "base"), config("LoRA"))
    given = arguments(tmp_path / "run", bf16=True, gradient_checkpointing=True, max_steps=4)
    trainer = Trainer(model, given, train_dataset=rows())
    trainer.train()
    trainer.save_model(str(tmp_path / "run"))
    fields = json.loads((tmp_path / "run" / CONFIG_FILE).read_text())
    assert fields["base_model_name_or_path"] == str(tmp_path / "base")
    assert_saved(model, LlamaForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "run")


def test_the_reference_is_the_base_and_shares_its_tensors() -> None:
    model = adapted("LoRA")
    base, x = output(llama(), tokens()), tokens()
    reference = integrations.reference_model(model)
    model.train()
    assert torch.equal(output(reference, x), base)
    assert not torch.equal(output(model, x), base)
    reference.eval()
    assert all(module.training for module in model.modules())
    assert {id(p) for p in reference.parameters()} == {id(p) for p in model.parameters()}
    active = [layer.active for layer in adapter_layers(model).values()]
    with pytest.raises(TypeError):
        reference("no tokens")
    assert [layer.active for layer in adapter_layers(model).values()] == active


@pytest.mark.parametrize(
    "changes", [{}, {"bf16": True, "gradient_checkpointing": True, "gradient_accumulation_steps": 2}]
)
def test_a_chunked_loss_trains_alike(changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the adapter on the head too; and where a Trainer makes the loss of the logits itself, with all of them."""
    calls = []
    loss = deferred.linear_cross_entropy
    monkeypatch.setattr(deferred, "linear_cross_entropy", lambda *a, **k: calls.append(k) or loss(*a, **k))
    for smoothing in (0.0, 0.1):
        models = [adapted("LoRA", target_modules=["q_proj", "lm_head"]) for _ in range(2)]
        fastadapt.chunk_loss(models[0])
        for model in models:
            given = arguments(tmp_path, save_strategy="no", label_smoothing_factor=smoothing, max_steps=4, **changes)
            Trainer(model, given, train_dataset=rows()).train()
        for name, value in trained(models[1]).items():
            close = {"rtol": 0.05, "atol": 5e-3} if changes else {"rtol": 1e-3, "atol": 1e-5}
            torch.testing.assert_close(
                trained(models[0])[name], value, **close, msg=lambda text, n=name: f"{n}: {text}"
            )
        assert len(calls) == 4 * given.gradient_accumulation_steps
        assert models[0].eval()(tokens(), labels=tokens()).logits is not None


# TRL's trainers.


def tokenizer() -> Any:
    """Of single letters."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: index for index, word in enumerate(["<pad>", "<eos>", "<unk>", *"abcdefghijklmnopqrstuvwxyz "])}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


@pytest.fixture
def trl() -> Any:
    return pytest.importorskip("trl", reason="TRL is not installed: pip install 'fastadapt[clients]'")


def from_disk(place: Path) -> Any:
    from transformers import LlamaForCausalLM

    llama().save_pretrained(place)
    return LlamaForCausalLM.from_pretrained(place)


def test_sft_with_its_defaults(trl: Any, tmp_path: Path) -> None:
    """bf16 and gradient checkpointing, which are TRL's defaults."""
    from datasets import Dataset

    model = fastadapt.inject(from_disk(tmp_path / "base"), config("AdaLoRA"))
    given = trl.SFTConfig(
        output_dir=str(tmp_path / "run"), max_steps=STEPS, per_device_train_batch_size=2, use_cpu=True, save_steps=8,
        report_to="none", disable_tqdm=True, learning_rate=1e-2,
    )  # fmt: skip
    assert given.bf16
    assert given.gradient_checkpointing
    trainer = trl.SFTTrainer(
        model,
        given,
        train_dataset=Dataset.from_dict({"text": ["a cab", "bad cab", "dab", "fab ace"] * 6}),
        processing_class=tokenizer(),
        callbacks=[integrations.AdapterCallback],
    )
    trainer.train()
    trainer.save_model()
    for place in (tmp_path / "run", tmp_path / "run" / "checkpoint-8"):
        assert {CONFIG_FILE, TENSOR_FILE} <= {path.name for path in place.iterdir()}
    assert kept(model) == 3 * 4
    assert_saved(model, from_disk(tmp_path / "base"), tmp_path / "run")


def test_an_adapter_on_a_head_that_sft_never_calls_is_refused(trl: Any, tmp_path: Path) -> None:
    from datasets import Dataset

    def run(**fields: Any) -> Any:
        model = fastadapt.inject(from_disk(tmp_path / "base"), config("LoRA", **fields))
        given = trl.SFTConfig(
            output_dir=str(tmp_path / "run"), max_steps=2, per_device_train_batch_size=2, use_cpu=True,
            save_strategy="no", report_to="none", disable_tqdm=True,
        )  # fmt: skip
        data, callback = Dataset.from_dict({"text": ["a cab", "bad cab"] * 4}), integrations.AdapterCallback
        trainer = trl.SFTTrainer(model, given, train_dataset=data, processing_class=tokenizer(), callbacks=[callback])
        trainer.train()
        return model

    with pytest.raises(ValueError, match="reads the weight of the model's head and never calls it"):
        run(target_modules=["q_proj", "lm_head"])
    model = run(modules_to_save=["lm_head"])
    assert not torch.equal(model.lm_head.current.weight, model.lm_head.original.weight)


def test_grpo_is_given_the_disabled_adapter_for_its_reference(
    trl: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from datasets import Dataset
    from trl.trainer import grpo_trainer

    data, loaded = Dataset.from_dict({"prompt": ["ab", "cd"] * 2}), []
    create = grpo_trainer.create_model_from_path
    monkeypatch.setattr(grpo_trainer, "create_model_from_path", lambda *a, **k: loaded.append(a) or create(*a, **k))

    def run(beta: float, shared: bool) -> dict[str, Tensor]:
        model = fastadapt.inject(from_disk(tmp_path / "base"), config("LoRA"))
        randomise([p for p in model.parameters() if p.requires_grad])
        given = trl.GRPOConfig(
            output_dir=str(tmp_path / "run"), max_steps=2, per_device_train_batch_size=2, num_generations=2,
            max_completion_length=4, use_cpu=True, bf16=False, report_to="none", disable_tqdm=True, learning_rate=1e-2,
            beta=0.0 if shared else beta,
        )  # fmt: skip
        trainer = trl.GRPOTrainer(
            model, args=given, train_dataset=data, processing_class=tokenizer(),
            reward_funcs=lambda completions, **_: [float(len(set(text))) for text in completions],
        )  # fmt: skip
        if shared:
            trainer.beta, trainer.ref_model = beta, integrations.reference_model(model)
        trainer.train()
        return trained(model)

    ours, without = run(0.5, True), run(0.0, False)
    assert loaded == []
    wanted = run(0.5, False)
    assert len(loaded) == 1
    for name, value in wanted.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-3, atol=1e-4)
    assert any(not torch.allclose(ours[name], value, rtol=1e-3, atol=1e-4) for name, value in without.items())


def test_dpo_takes_the_disabled_adapter_for_its_reference(
    trl: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from datasets import Dataset
    from trl.trainer import dpo_trainer

    data = Dataset.from_dict({"prompt": ["a", "b"] * 4, "chosen": ["cab", "dab"] * 4, "rejected": ["bad", "fad"] * 4})
    loaded = []
    create = dpo_trainer.create_model_from_path
    monkeypatch.setattr(dpo_trainer, "create_model_from_path", lambda *a, **k: loaded.append(a) or create(*a, **k))

    def run(**reference: Any) -> dict[str, Tensor]:
        model = fastadapt.inject(from_disk(tmp_path / "base"), config("LoRA"))
        randomise([p for p in model.parameters() if p.requires_grad])
        if reference:
            reference["ref_model"] = integrations.reference_model(model)
        given = trl.DPOConfig(
            output_dir=str(tmp_path / "run"), max_steps=4, per_device_train_batch_size=2, use_cpu=True,
            report_to="none", disable_tqdm=True, learning_rate=1e-2,
        )  # fmt: skip
        trainer = trl.DPOTrainer(model, args=given, train_dataset=data, processing_class=tokenizer(), **reference)
        trainer.train()
        return trained(model)

    ours = run(ref_model=None)
    assert loaded == []
    wanted = run()
    assert len(loaded) == 1
    assert all(torch.equal(ours[name], value) for name, value in wanted.items())
