"""What can be measured: the benches, and the adapters that they compare with PEFT's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypeVar

Case = TypeVar("Case")

# Name on the command line -> module whose `main` is the command.
BENCHES = {
    "step": "bench.step",
    "train": "bench.train",
    "quantized": "bench.quantized",
    "saved": "bench.saved",
    "audit": "bench.audit",
    "traffic": "bench.traffic",
    "predictions": "bench.predictions",
    "gpu": "bench.gpu.command",
    "microbench": "bench.microbench",
    "methods": "bench.methods",
    "vision": "bench.vision",
    "glora": "bench.glora",
    "serve": "bench.serve",
    "pool": "bench.pool",
    "fuzz": "bench.fuzz",
    "calls": "bench.calls",
    "experts": "bench.experts",
    "launches": "bench.launches",
    "soak": "bench.soak",
    "road": "bench.road",
    "vllm": "bench.vllm",
    "tables": "bench.tables",
    "report": "bench.page",
}


@dataclass(frozen=True)
class AdapterCase:
    """One adapter, configured alike for fastadapt and for PEFT."""

    name: str
    method: Literal["lora", "dora", "vera"]
    r: int
    dropout: float = 0.0
    longer: int = 1  # times as many tokens as the other cases of its bench
    dtype: str = "float32"  # of the base model; the adapters are in fp32

    @property
    def title(self) -> str:
        """The case in a table; of rank 16 unless it says so."""
        method = {"lora": "LoRA", "dora": "DoRA", "vera": "VeRA"}[self.method]
        parts = [method if self.r == 16 else f"{method} r{self.r}"]
        parts += ["dropout"] * bool(self.dropout) + [f"{self.longer} times the tokens"] * (self.longer > 1)
        parts += [f"{self.dtype} base"] * (self.dtype != "float32")
        return ", ".join(parts)

    def config(self, target_modules: str | list[str]) -> Any:
        """The fastadapt config."""
        from fastadapt import DoRAConfig, LoRAConfig, VeRAConfig

        if self.method == "vera":
            return VeRAConfig(r=self.r, target_modules=target_modules, vera_dropout=self.dropout)
        lora = DoRAConfig if self.method == "dora" else LoRAConfig
        return lora(r=self.r, lora_alpha=2 * self.r, lora_dropout=self.dropout, target_modules=target_modules)

    def peft_config(self, target_modules: str | list[str]) -> Any:
        """The same config for PEFT."""
        from peft import LoraConfig, VeraConfig

        if self.method == "vera":
            return VeraConfig(r=self.r, target_modules=target_modules, vera_dropout=self.dropout)
        return LoraConfig(
            r=self.r,
            lora_alpha=2 * self.r,
            lora_dropout=self.dropout,
            target_modules=target_modules,
            use_dora=self.method == "dora",
        )


STEP_CASES = {
    case.name: case
    for case in (
        AdapterCase("lora", "lora", 16),
        AdapterCase("dora", "dora", 16),
        AdapterCase("vera", "vera", 256),
        AdapterCase("dora_dropout", "dora", 16, dropout=0.05),
        AdapterCase("vera_4096", "vera", 256, longer=8),
        AdapterCase("lora_bf16", "lora", 16, dtype="bfloat16"),
        AdapterCase("dora_bf16", "dora", 16, dtype="bfloat16"),
        AdapterCase("vera_bf16", "vera", 256, dtype="bfloat16"),
    )
}

SAVED_CASES = {
    case.name: case
    for case in (
        AdapterCase("lora", "lora", 16),
        AdapterCase("lora_dropout", "lora", 16, dropout=0.1),
        AdapterCase("dora", "dora", 16),
        AdapterCase("dora_dropout", "dora", 16, dropout=0.1),
        AdapterCase("vera", "vera", 256),
        AdapterCase("vera_dropout", "vera", 256, dropout=0.1),
    )
}


def chosen(cases: dict[str, Case], names: str) -> list[Case]:
    """The cases that a comma-separated list names, all of them for an empty list."""
    wanted = [name.strip() for name in names.split(",") if name.strip()] or list(cases)
    unknown = [name for name in wanted if name not in cases]
    if unknown:
        raise ValueError(f"unknown case {unknown[0]!r}: choose from {', '.join(cases)}")
    return [cases[name] for name in wanted]
