"""What a model saves by save_pretrained while it carries adapters, or is served: read again it is right, or loud."""

from __future__ import annotations

import copy
import json
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import headed, llama, output, randomise, tokens
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

from fastadapt import LoRAConfig, SSFConfig, inject, merge, save_adapter, set_adapter, unload, unmerge
from fastadapt.model.peft_files import CONFIG_FILE, TENSOR_FILE
from fastadapt.serving import MultiAdapterModel

# What a trainer passes, by which it says that it will load the file back by load_state_dict.
TRAINERS: dict[str, Any] = {"state_dict": None, "is_main_process": True}


@pytest.fixture
def model(tmp_path: Path) -> Any:
    """A model that came from a directory, with a trained adapter."""
    llama().save_pretrained(tmp_path / "base")
    return adapted(LlamaForCausalLM.from_pretrained(tmp_path / "base"))


def adapted(model: Any, **fields: Any) -> Any:
    inject(model, LoRAConfig(r=2, **{"target_modules": ["q_proj", "v_proj"], **fields}))
    randomise([parameter for parameter in model.parameters() if parameter.requires_grad])
    return model.eval()


def differs(model: Any, read: Any) -> float:
    return float((output(read.eval(), tokens()) - output(model, tokens())).detach().abs().max())


@pytest.fixture(params=["with PEFT", "without PEFT"])
def peft(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether transformers finds PEFT, which alone reads adapters."""
    there: bool = request.param == "with PEFT"
    if not there:
        for place in ("integrations.peft", "models.auto.auto_factory"):
            monkeypatch.setattr(f"transformers.{place}.is_peft_available", lambda: False)
    return there


@pytest.mark.parametrize("passed", [{}, TRAINERS], ids=["a person", "a trainer"])
@pytest.mark.parametrize("reader", [AutoModelForCausalLM, LlamaForCausalLM])
def test_an_active_adapter_is_saved_as_one_and_read_on_its_base(
    reader: Any, passed: dict[str, Any], peft: bool, model: Any, tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path / "saved", **passed)
    assert {path.name for path in (tmp_path / "saved").iterdir()} == {
        CONFIG_FILE,
        TENSOR_FILE,
        *(["model.safetensors"] if passed else []),
    }
    if peft:
        assert differs(model, reader.from_pretrained(tmp_path / "saved")) < 1e-5
    elif not (passed and reader is LlamaForCausalLM):  # the class would first make a model of its own default sizes
        with pytest.raises((ValueError, OSError, RuntimeError)):
            reader.from_pretrained(tmp_path / "saved")


def test_the_state_of_a_training_is_nobodys_model(model: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "saved", **TRAINERS)
    state = load_file(tmp_path / "saved" / "model.safetensors")
    with pytest.raises(RuntimeError, match=r"size mismatch for model\.layers\.0\.self_attn\.q_proj\.weight"):
        llama().load_state_dict(state, strict=False)
    (tmp_path / "saved" / CONFIG_FILE).unlink()
    model.config.save_pretrained(tmp_path / "saved")
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        LlamaForCausalLM.from_pretrained(tmp_path / "saved")
    other = adapted(llama())
    result = other.load_state_dict(state, strict=False)
    assert not result.unexpected_keys
    assert set(result.missing_keys) <= {"lm_head.weight"}  # tied
    assert differs(model, other) == 0


def test_a_model_without_a_name_is_read_by_nobody(tmp_path: Path) -> None:
    adapted(llama()).save_pretrained(tmp_path)
    with pytest.raises((OSError, ValueError, TypeError)):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("given", [False, True], ids=["its own state", "a state that is passed"])
def test_merged_it_is_a_plain_model(given: bool, peft: bool, model: Any, tmp_path: Path) -> None:
    merge(model)
    before = output(model, tokens())
    config = model.config.to_dict()
    gathered = {name: 2 * value for name, value in model.state_dict().items()}
    model.save_pretrained(tmp_path / "saved", **({"state_dict": gathered} if given else {}))
    state = load_file(tmp_path / "saved" / "model.safetensors")
    assert state.keys() == load_file(tmp_path / "base" / "model.safetensors").keys()
    if given:
        merged = model.model.layers[0].self_attn.q_proj.base_layer.weight
        assert torch.equal(state["model.layers.0.self_attn.q_proj.weight"], 2 * merged)
    else:
        assert differs(model, LlamaForCausalLM.from_pretrained(tmp_path / "saved")) == 0
    assert torch.equal(output(model, tokens()), before)
    assert model.config.to_dict() | {"dtype": None} == config | {"dtype": None}
    unmerge(model)
    assert differs(model, adapted(llama())) < 1e-5


def test_with_no_adapter_active_it_is_the_base(model: Any, tmp_path: Path) -> None:
    set_adapter(model, None)
    model.save_pretrained(tmp_path / "saved")
    ours, base = (load_file(tmp_path / name / "model.safetensors") for name in ("saved", "base"))
    assert ours.keys() == base.keys()
    assert all(torch.equal(ours[name], base[name]) for name in base)


def test_a_merged_model_is_saved_with_what_it_trains_whole(tmp_path: Path) -> None:
    model = adapted(headed("BertForSequenceClassification"), target_modules=["query"], task_type="SEQ_CLS")
    want = output(model, tokens())
    merge(model)
    model.save_pretrained(tmp_path)
    read = type(model).from_pretrained(tmp_path).eval()
    torch.testing.assert_close(output(read, tokens()), want)


def test_copies_save_themselves_and_unload_ends_it(model: Any, tmp_path: Path) -> None:
    for name, other in {"copy": copy.deepcopy(model), "pickle": pickle.loads(pickle.dumps(model))}.items():
        with torch.no_grad():
            for parameter in other.parameters():
                if parameter.requires_grad:
                    parameter.mul_(2)
        other.save_pretrained(tmp_path / name)
        assert differs(other, AutoModelForCausalLM.from_pretrained(tmp_path / name)) < 1e-5
        assert differs(model, other) > 1e-3
    unload(model)
    assert "save_pretrained" not in model.__dict__
    assert "save_pretrained" not in model.model.__dict__
    model.save_pretrained(tmp_path / "plain")
    assert differs(model, LlamaForCausalLM.from_pretrained(tmp_path / "plain")) == 0


def test_a_model_inside_saves_its_own_part(model: Any, tmp_path: Path) -> None:
    model.model.save_pretrained(tmp_path / "inner")
    read = AutoModel.from_pretrained(tmp_path / "inner").eval()
    want, got = (part(tokens()).last_hidden_state for part in (model.model, read))
    torch.testing.assert_close(got, want)
    merge(model)
    model.model.save_pretrained(tmp_path / "merged")
    torch.testing.assert_close(AutoModel.from_pretrained(tmp_path / "merged").eval()(tokens()).last_hidden_state, want)


class Sentences(nn.Module):
    """Saves itself by what its part saves, as SentenceTransformer does."""

    def __init__(self, auto_model: nn.Module) -> None:
        super().__init__()
        self.auto_model = auto_model

    def save_pretrained(self, path: Path) -> None:
        self.auto_model.save_pretrained(path / "0")  # type: ignore[operator]
        (path / "modules.json").write_text("[]")


def test_a_model_that_saves_by_its_parts_goes_on_doing_so(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "base")
    whole = Sentences(AutoModel.from_pretrained(tmp_path / "base"))
    adapted(whole)
    (tmp_path / "saved").mkdir()
    whole.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "modules.json").exists()
    read = AutoModel.from_pretrained(tmp_path / "saved" / "0").eval()
    want: Any = whole.auto_model
    torch.testing.assert_close(read(tokens()).last_hidden_state, want(tokens()).last_hidden_state)


class Hub(nn.Module):
    """Writes its state and reads what it finds, as many classes with a save_pretrained do."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.v_proj = nn.Linear(4, 4), nn.Linear(4, 4)

    def save_pretrained(self, path: Path) -> None:
        path.mkdir()
        save_file(self.state_dict(), path / "weights.safetensors")


def test_other_classes_save_an_adapter_or_the_plain_model(tmp_path: Path) -> None:
    model = adapted(Hub())
    model.save_pretrained(tmp_path / "adapter")
    assert {path.name for path in (tmp_path / "adapter").iterdir()} == {CONFIG_FILE, TENSOR_FILE}
    merge(model)
    model.save_pretrained(tmp_path / "plain")
    Hub().load_state_dict(load_file(tmp_path / "plain" / "weights.safetensors"))


def test_what_saves_around_the_adapted_part_is_never_read_at_random(tmp_path: Path) -> None:
    model = llama()
    adapted(model.model)  # nobody can know of what is around it
    model.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        LlamaForCausalLM.from_pretrained(tmp_path)


def second(model: Any) -> None:
    inject(model, LoRAConfig(r=2, target_modules=["q_proj"], init_lora_weights=False), "second")
    set_adapter(model, ["default", "second"])


def unfrozen(model: Any) -> None:
    model.model.norm.requires_grad_(True)


UNSAID: dict[str, tuple[Callable[[Any], None], str]] = {
    "several": (second, "'default', 'second' are active together"),
    "trained beside it": (unfrozen, r"model\.norm\.weight is trained beside adapter 'default'"),
}


@pytest.mark.parametrize("case", UNSAID)
def test_what_no_adapter_directory_holds_is_refused_or_is_a_training_alone(
    case: str, model: Any, tmp_path: Path
) -> None:
    change, message = UNSAID[case]
    change(model)
    with pytest.raises(ValueError, match=message):
        model.save_pretrained(tmp_path / "person")
    with pytest.warns(UserWarning, match=message):
        model.save_pretrained(tmp_path / "trainer", **TRAINERS)
    assert [path.name for path in (tmp_path / "trainer").iterdir()] == ["model.safetensors"]
    with pytest.raises((ValueError, OSError)):
        AutoModelForCausalLM.from_pretrained(tmp_path / "trainer")


def test_an_adapter_and_a_plain_model_do_not_share_a_directory(model: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds a model, .* or take config\.json out"):
        model.save_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    merge(model)
    with pytest.raises(ValueError, match=r"holds an adapter, .* or take adapter_config\.json out"):
        model.save_pretrained(tmp_path / "adapter")


def test_other_processes_write_nothing_and_the_hub_takes_directories(model: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "saved", is_main_process=False)
    assert not (tmp_path / "saved").exists()
    with pytest.raises(ValueError, match="push_to_hub needs a plain model"):
        model.save_pretrained(tmp_path / "saved", push_to_hub=True)


def test_a_state_that_was_gathered_is_what_is_saved(model: Any, tmp_path: Path) -> None:
    state = {name: value + 1 if "lora" in name else value for name, value in model.state_dict().items()}
    model.save_pretrained(tmp_path / "saved", state_dict=state | {"v_head.weight": torch.ones(2)})
    ours = load_file(tmp_path / "saved" / TENSOR_FILE)["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"]
    assert torch.equal(ours, model.model.layers[0].self_attn.q_proj.adapters["default"].lora_A + 1)
    assert "v_head.weight" in load_file(tmp_path / "saved" / "model.safetensors")


def rows() -> list[dict[str, Tensor]]:
    return [{"input_ids": row, "labels": row} for row in tokens(batch=16)]


def trainer(base: Path, output_dir: Path, **arguments: Any) -> Trainer:
    torch.manual_seed(3)  # another A than that of the run before
    model = inject(LlamaForCausalLM.from_pretrained(base), LoRAConfig(r=2, lora_dropout=0.1, target_modules=["q_proj"]))
    fields = {"per_device_train_batch_size": 4, "learning_rate": 0.05, "report_to": [], "seed": 1, "use_cpu": True}
    return Trainer(
        model,
        TrainingArguments(str(output_dir), disable_tqdm=True, **fields, **arguments),
        train_dataset=rows(),
        eval_dataset=rows()[:4],
    )


def trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def test_a_trainers_checkpoint_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "base")
    whole = trainer(tmp_path / "base", tmp_path / "run", max_steps=4, save_steps=2)
    whole.train()
    again = trainer(tmp_path / "base", tmp_path / "run", max_steps=4, save_steps=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, on resuming its scheduler
        again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    want, got = trained(whole.model), trained(again.model)
    assert want.keys() == got.keys()
    assert all(torch.equal(want[name], got[name]) for name in want)
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint-4")
    assert differs(whole.model.eval(), read) < 1e-5


def test_a_trainer_ends_with_the_best_model(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "base")
    run = trainer(
        tmp_path / "base",
        tmp_path / "run",
        max_steps=4,
        save_steps=1,
        eval_steps=1,
        eval_strategy="steps",
        load_best_model_at_end=True,
        greater_is_better=True,  # the first is the worst one, so the best by this
        metric_for_best_model="loss",
    )
    run.train()
    best = run.state.best_model_checkpoint
    assert best is not None
    assert not best.endswith("-4")
    assert differs(run.model.eval(), AutoModelForCausalLM.from_pretrained(best)) < 1e-5


def test_a_served_model_is_unwrapped_before_it_is_saved(tmp_path: Path) -> None:
    model = llama()
    served = MultiAdapterModel(model)
    for part in (served.model, served.model.model):
        with pytest.raises(ValueError, match=r"unwrap\(\) it before you save it"):
            part.save_pretrained(tmp_path / "served")
    save_file({k: v.clone() for k, v in model.state_dict().items()}, tmp_path / "state")
    with pytest.raises(RuntimeError, match="size mismatch"):
        llama().load_state_dict(load_file(tmp_path / "state"), strict=False)
    served.unwrap().save_pretrained(tmp_path / "plain")
    assert differs(model, LlamaForCausalLM.from_pretrained(tmp_path / "plain")) == 0


def bart() -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": 67, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "decoder_ffn_dim": 16}
    return BartForConditionalGeneration(BartConfig(**sizes, **heads, max_position_embeddings=32, init_std=0.3)).eval()


def bert() -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": 67, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return BertForMaskedLM(BertConfig(**sizes, intermediate_size=16, initializer_range=0.3)).eval()


# The model, its adapted layers, and whether its config still says tied when they are merged.
TIED: dict[str, tuple[Callable[[], Any], str, bool]] = {
    "the head of a decoder": (lambda: llama(tie_word_embeddings=True), "lm_head", False),
    "the embeddings of a decoder": (lambda: llama(tie_word_embeddings=True), "embed_tokens", False),
    "the head of an encoder and a decoder": (bart, "lm_head", True),
    "the embeddings of an encoder": (bart, r"model\.encoder\.embed_tokens", True),
    "what all others were tied to": (bart, r"model\.shared", False),
    "a head whose bias is tied too": (bert, r"cls\.predictions\.decoder", False),
}


@pytest.mark.parametrize("case", TIED)
@pytest.mark.parametrize("unloaded", [True, False])
def test_merging_one_of_the_tied_leaves_the_others_tied(case: str, unloaded: bool, tmp_path: Path) -> None:
    make, name, still = TIED[case]
    model = make()
    adapted(model, target_modules=name if "\\" in name else [name])
    want = output(model, tokens())
    merge(model)
    if unloaded:
        unload(model)
    torch.testing.assert_close(output(model, tokens()), want)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text()).get("tie_word_embeddings", True) is still
    assert model.config.tie_word_embeddings is (still if unloaded else True)
    read, found = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not found["missing_keys"]
    torch.testing.assert_close(output(read.eval(), tokens()), want)


def test_a_save_that_is_not_the_models_own_is_left_alone(tmp_path: Path) -> None:
    model = llama()
    model.save_pretrained = lambda path: path
    adapted(model)
    assert model.save_pretrained(tmp_path) == tmp_path
    unload(model)
    assert model.save_pretrained(tmp_path) == tmp_path


def test_save_adapter_and_save_pretrained_write_the_same(model: Any, tmp_path: Path) -> None:
    save_adapter(model, tmp_path / "a")
    model.save_pretrained(tmp_path / "b")
    for name in (CONFIG_FILE, TENSOR_FILE):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.parametrize(
    "config", [SSFConfig(), LoRAConfig(r=2, lora_bias=True)], ids=lambda config: type(config).__name__
)
def test_a_bias_that_only_the_merge_made_is_not_lost_in_silence(config: Any, tmp_path: Path) -> None:
    config.target_modules = ["q_proj"]
    model = inject(llama(), config)
    randomise([parameter for parameter in model.parameters() if parameter.requires_grad])
    merge(model)
    with pytest.raises(ValueError, match=r"q_proj \(and 1 more\) has a bias since the merge.*unmerge\(model\)"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
    unmerge(model)
    model.save_pretrained(tmp_path)
    merge(model)
    message = r"q_proj \(and 1 more\) has a bias since the merge, which LlamaForCausalLM does not have there: of what"
    with pytest.warns(UserWarning, match=message):
        unload(model)
    plain = inject(nn.Sequential(nn.Linear(4, 4, bias=False)), config.__class__(target_modules=["0"]))
    merge(plain)
    unload(plain)  # whose state_dict no class would take a part of
