"""Adapters on experts: forward and backward, what is kept between them, and decoding, in multiples of the frozen model.

A Qwen3-MoE of four layers (hidden 512, experts of 256, 64 of them, top 4, random fp32 weights): A and B on both stacked
weights of every layer's experts and on q_proj. Forward and backward without an optimizer, to the embeddings; a decoding
step is a forward of one token a row in eval mode, without gradients. PEFT refuses DoRA and dropout there. Served: a
forward of eight rows, each with an adapter of its own of several methods and ranks. Zipf: experts are drawn as often as
1/1, 1/2, 1/3, ..., where random weights use them more alike. Qwen3-30B-A3B: one layer of that model's dimensions
(hidden 2048, experts of 768, 128 of them, top 8), in a third of the rounds, as are rows of 512 tokens.
"""

from __future__ import annotations

import itertools
import json
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

from bench import measure, page, report
from bench.cases import chosen
from bench.plots import Document
from fastadapt.commands.demo.compare import saved_bytes
from fastadapt.commands.demo.training import skeleton
from fastadapt.commands.report import write_json
from fastadapt.serving import MultiAdapterModel

VOCAB = 1024
TARGETS: dict[str, list[str]] = {
    "target_modules": ["q_proj"],
    "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
}
# The frozen pass runs three times a round, since every ratio has its noise.
FROZEN = ("frozen", "frozen, second", "frozen, third")


@dataclass(frozen=True)
class ExpertCase:
    """One adapter on experts."""

    name: str
    title: str
    r: int = 8
    dropout: float = 0.0
    dora: bool = False
    served: int = 0  # rows, where a forward of many adapters is measured and no training
    adamw: bool = False  # whether the step has an optimizer
    zipf: bool = False
    wide: bool = False  # on the layer of Qwen3-30B-A3B

    @property
    def in_peft(self) -> bool:
        return not self.dora and not self.dropout and not self.served

    def takes(self, length: int) -> bool:
        """Whether there is something to measure with rows of so many tokens."""
        return not (self.wide and length > _LONG) and not (self.adamw and length == 1)

    def adapted(self, base: nn.Module, side: str) -> nn.Module:
        """A model of its own with the adapter, whose frozen weights are the base's own tensors."""
        model: nn.Module = skeleton(base)
        if self.served:
            return Served(model, self.served)
        torch.manual_seed(0)
        given: dict[str, Any] = {"r": self.r, "lora_alpha": 2 * self.r, **TARGETS}
        if side == "ours":
            import fastadapt

            config = fastadapt.LoRAConfig(**given, lora_dropout=self.dropout, use_dora=self.dora)
            return fastadapt.inject(model, config)
        from peft import LoraConfig, get_peft_model

        with warnings.catch_warnings():
            # PEFT asks transformers for a property that the newest transformers renames.
            warnings.filterwarnings("ignore", category=FutureWarning, message="`is_gradient_checkpointing`")
            found: nn.Module = get_peft_model(model, LoraConfig(**given))
            return found


# Methods and ranks of the adapters in one batch.
_MIXED = ("lora", 8), ("lora", 16), ("lora", 16), ("lora", 32), ("dora", 16), ("dora", 16), ("vera", 64), ("vera", 64)


class Served(nn.Module):
    """A model that serves random adapters of several methods, each row another one."""

    def __init__(self, base: nn.Module, rows: int) -> None:
        import fastadapt

        super().__init__()
        self.inner = MultiAdapterModel(skeleton(base), budget=1 << 28)
        self.names = [str(row % len(_MIXED)) for row in range(rows)]
        for name, (method, r) in enumerate(_MIXED):
            kind: Any = {"lora": fastadapt.LoRAConfig, "dora": fastadapt.DoRAConfig, "vera": fastadapt.VeRAConfig}[
                method
            ]
            torch.manual_seed(name)
            model = fastadapt.inject(skeleton(base), kind(r=r, **TARGETS))
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.data.normal_(std=0.02)
            with tempfile.TemporaryDirectory() as directory:
                fastadapt.save_adapter(model, directory)
                self.inner.load(directory, str(name))
                self.inner.pool.pin(str(name))

    def get_input_embeddings(self) -> nn.Module:
        found: nn.Module = self.inner.model.get_input_embeddings()
        return found

    def forward(self, **inputs: Any) -> Any:
        return self.inner(**inputs, adapter_ids=self.names)


# Rows that are longer take a third of the rounds, and those of the wide layer are no longer: PEFT's copies of its
# weights take gigabytes as it is.
_LONG = 128
# Of a batch, for which a router has drawn.
_MOST_TOKENS = 4096

CASES = {
    case.name: case
    for case in (
        ExpertCase("lora", "LoRA"),
        ExpertCase("dora", "DoRA", dora=True),
        ExpertCase("lora_dropout", "LoRA, dropout 0.1", dropout=0.1),
        ExpertCase("lora_r64", "LoRA r64", r=64),
        ExpertCase("dora_r64", "DoRA r64", r=64, dora=True),
        ExpertCase("lora_adamw", "LoRA, AdamW's step in it", adamw=True),
        ExpertCase("lora_zipf", "LoRA, zipf", zipf=True),
        ExpertCase("dora_zipf", "DoRA, zipf", dora=True, zipf=True),
        ExpertCase("lora_wide", "LoRA, Qwen3-30B-A3B", wide=True),
        ExpertCase("dora_wide", "DoRA, Qwen3-30B-A3B", dora=True, wide=True),
        ExpertCase("served", "8 adapters in one batch", r=0, served=8),
    )
}


_SMALL: dict[str, int] = {
    **{"hidden_size": 512, "intermediate_size": 1024, "moe_intermediate_size": 256, "head_dim": 64},
    **{"num_attention_heads": 8, "num_key_value_heads": 4, "num_experts": 64, "num_experts_per_tok": 4},
}
_WIDE: dict[str, int] = {
    **{"hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768, "head_dim": 128},
    **{"num_attention_heads": 32, "num_key_value_heads": 4, "num_experts": 128, "num_experts_per_tok": 8},
}


def base_model(layers: int, *, zipf: bool = False, wide: bool = False) -> Any:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    sizes: Any = {**(_WIDE if wide else _SMALL), "num_hidden_layers": 1 if wide else layers}
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(vocab_size=VOCAB, mlp_only_layers=[], **sizes)).requires_grad_(False)
    if zipf:
        for layer in model.model.layers:
            layer.mlp.gate = ZipfRouter(layer.mlp.gate)
    return model


class ZipfRouter(nn.Module):
    """A router of Qwen3-MoE's that adds to the logits what draws experts as often as 1/1, 1/2, 1/3, ..."""

    drawn: Tensor

    def __init__(self, router: Any) -> None:
        super().__init__()
        self.weight, self.top = router.weight, router.top_k
        generator = torch.Generator().manual_seed(0)
        gumbel = -(-torch.rand(_MOST_TOKENS, len(self.weight), generator=generator).log()).log()
        self.register_buffer("drawn", gumbel - torch.arange(1, len(self.weight) + 1).float().log())

    def forward(self, states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        states = states.reshape(-1, states.shape[-1])
        logits = nn.functional.linear(states, self.weight) + self.drawn[: len(states)]
        scores, chosen = torch.topk(logits.softmax(-1), self.top, dim=-1)
        return logits, scores / scores.sum(-1, keepdim=True), chosen


def inputs(model: Any, rows: int, length: int) -> tuple[Tensor, Tensor]:
    """Fixed random tokens, and a leaf that has their embeddings."""
    tokens = torch.randint(VOCAB, (rows, length), generator=torch.Generator().manual_seed(0))
    return tokens, model.get_input_embeddings()(tokens).detach()


def make_step(model: Any, rows: int, length: int, *, adamw: bool = False) -> Callable[[], None]:
    """A forward and a backward, after which no gradient is left; a step of the optimizer where a parameter trains."""
    tokens, embeddings = inputs(model, rows, length)
    embeddings.requires_grad_()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    leaves = [embeddings, *trained]
    optimizer = torch.optim.AdamW(trained, lr=1e-5) if adamw and trained else None
    model.train()

    def step() -> None:
        model(inputs_embeds=embeddings, labels=tokens, use_cache=False).loss.backward()
        if optimizer is not None:
            optimizer.step()
        for leaf in leaves:
            leaf.grad = None

    return step


def make_forward(model: Any, rows: int, length: int) -> Callable[[], None]:
    """A forward without gradients: of one token a row, a step of decoding."""
    _, embeddings = inputs(model, rows, length)
    model.eval()

    def forward() -> None:
        with torch.no_grad():
            model(inputs_embeds=embeddings, use_cache=False)

    return forward


def kept_bytes(model: Any, rows: int, length: int) -> int:
    """What autograd holds between the forward and the backward, without parameters and buffers."""
    tokens, embeddings = inputs(model, rows, length)
    return saved_bytes(model, {"inputs_embeds": embeddings.requires_grad_(), "labels": tokens, "use_cache": False})


def peak(case: ExpertCase, side: str, rows: int, length: int, layers: int) -> float:
    """The peak resident set of a process that trains this one side, in MB."""
    arguments = {"case": case.name, "side": side, "rows": rows, "length": length, "layers": layers}
    found: float = measure.run_apart("bench.experts", arguments)
    return found


def run(
    cases: list[ExpertCase], lengths: list[int], rows: int, rounds: int, layers: int, *, peft: bool, peaks: bool = False
) -> Any:
    """Measure; one row a case and length, of which 1 stands for decoding."""
    found: list[report.Row] = []
    for kind in dict.fromkeys((case.zipf, case.wide) for case in cases):
        base = base_model(layers, zipf=kind[0], wide=kind[1])
        for length, case in itertools.product(lengths, cases):
            if (case.zipf, case.wide) == kind and case.takes(length):
                count = max(3, rounds // 3) if case.wide or length > _LONG else rounds
                found.append(measured(base, case, length, rows, count, peft=peft))
                if peaks and "kept_mb" in found[-1]:
                    found[-1] |= peaks_of(case, rows, length, layers, peft=peft)
    return found


def peaks_of(case: ExpertCase, rows: int, length: int, layers: int, *, peft: bool) -> report.Row:
    """The peaks of the frozen model's training step, ours and PEFT's."""
    sides = {"frozen_": "frozen", "": "ours"} | ({"peft_": "peft"} if peft and case.in_peft else {})
    return {f"{prefix}peak_mb": peak(case, side, rows, length, layers) for prefix, side in sides.items()}


def measured(base: Any, case: ExpertCase, length: int, rows: int, rounds: int, *, peft: bool) -> report.Row:
    """One case on a base model with rows of so many tokens."""
    trains, count = length > 1 and not case.served, case.served or rows
    make: Any = partial(make_step, adamw=case.adamw) if trains else make_forward
    sides = ["ours", "peft"] if peft and case.in_peft else ["ours"]
    models = {side: case.adapted(base, side) for side in sides}
    variants = {name: make(base, count, length) for name in FROZEN}
    variants |= {side: make(model, count, length) for side, model in models.items()}
    results = measure.interleave(variants, rounds)
    row: report.Row = {"case": case.name, "rows": count, "length": length, "r": case.r, "rounds": rounds}
    if trains:
        row["frozen_kept_mb"] = kept_bytes(base, rows, length) / 1e6
    for side, model in models.items():
        prefix = "" if side == "ours" else "peft_"
        wall, cpu = measure.compare(results, side, FROZEN)
        row |= {f"{prefix}x_frozen": wall.median, f"{prefix}x_low": wall.low, f"{prefix}x_high": wall.high}
        row |= {f"{prefix}x_cpu": cpu.median, f"{prefix}x_best": measure.best_ratio(results, side, FROZEN)}
        if trains:
            row[f"{prefix}kept_mb"] = kept_bytes(model, rows, length) / 1e6
    return row


def main(
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the rows there.")] = None,
    rounds: Annotated[int, typer.Option(help="Counted rounds; under 10, 0.04 is not resolved.")] = 15,
    cases: Annotated[str, typer.Option(help=f"Comma-separated, of {', '.join(CASES)}; all by default.")] = "",
    lengths: Annotated[str, typer.Option(help="Tokens a row; 1 is decoding.")] = "128,16,512,1",
    batch: int = 4,
    layers: int = 4,
    threads: int = 1,
    peft: Annotated[bool, typer.Option(help="Measure PEFT beside.")] = True,
    peaks: Annotated[bool, typer.Option(help="Take each side's peak memory in a process of its own.")] = True,
) -> None:
    """Adapters on experts, in multiples of the frozen model: LoRA, DoRA, dropout, and served; ours and PEFT's."""
    torch.set_num_threads(threads)
    wanted, tokens = chosen(CASES, cases), [int(length) for length in lengths.split(",")]
    rows = run(wanted, tokens, batch, rounds, layers, peft=peft, peaks=peaks)
    columns = {
        "case": "case",
        "length": "tokens a row",
        "x_frozen": "x frozen",
        "x_low": "95% from",
        "x_high": "to",
        "x_cpu": "CPU time",
        "x_best": "fastest",
        "peft_x_frozen": "PEFT",
        "frozen_kept_mb": "kept, frozen, MB",
        "kept_mb": "ours",
        "peft_kept_mb": "PEFT",
        "frozen_peak_mb": "peak, frozen, MB",
        "peak_mb": "ours",
        "peft_peak_mb": "PEFT",
    }
    report.print_table(f"Adapters on experts, {batch} rows, {layers} layers, {rounds} rounds", rows, columns)
    if json_file is not None:
        write_json(json_file, "experts", rows)


@page.section("experts", "Adapters on experts")
def section(document: Document) -> str:
    first = document["rows"][0]
    rows = []
    for row in document["rows"]:
        what = "decoding" if row["length"] == 1 else f"{row['rows']} × {row['length']} tokens"
        names = [f"{side}{what}_mb" for what in ("kept", "peak") for side in ("", "peft_", "frozen_")]
        memory = " | ".join(page.number(row.get(name), 0) for name in names)
        rows.append(
            f"{CASES[row['case']].title}, {what} | {page.span(row, 'x_frozen', 'x_low', 'x_high')} | "
            f"{page.span(row, 'peft_x_frozen', 'peft_x_low', 'peft_x_high')} | {memory}"
        )
    return (
        "A Qwen3-MoE of four layers, 64 experts, top 4, fp32: an adapter on both weights of the experts and on q_proj, "
        "forward and backward without an optimizer as a multiple of the frozen model's, or a forward of one token a "
        f"row; medians of {first['rounds']} rounds. PEFT takes neither DoRA nor dropout there. "
        "Served: a forward, LoRA of rank 8, 16, 16 and 32, two DoRA of 16, two VeRA of 64. Zipf: experts as popular as "
        "1/1, 1/2, 1/3, ...; Qwen3-30B-A3B: one layer of its dimensions, 128 experts of 768, top 8.\n\n"
    ) + page.table("| ours | PEFT | kept, MB | PEFT's | frozen | peak, MB | PEFT's | frozen", rows)


@page.headline("experts")
def headline(document: Document) -> str:
    row = next(row for row in document["rows"] if (row["case"], row["length"]) == ("lora", 128))
    ours, theirs = (page.number(row[name], 2) for name in ("x_frozen", "peft_x_frozen"))
    return f"LoRA on a mixture's experts, forward and backward, x the frozen pass | {ours} | {theirs}"


def report_peak(arguments: dict[str, Any]) -> None:
    """In a process of its own: train one side for three steps and print the peak resident set."""
    # Its output is one number; what libraries warn about was shown by the process that started this one.
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    case, side = CASES[arguments["case"]], arguments["side"]
    model = base_model(arguments["layers"], zipf=case.zipf, wide=case.wide)
    if side != "frozen":
        model = case.adapted(model, side)
    step = make_step(model, arguments["rows"], arguments["length"], adamw=case.adamw)
    for _ in range(3):
        step()
    print(measure.peak_mb())


if __name__ == "__main__":
    report_peak(json.loads(sys.argv[1]))
