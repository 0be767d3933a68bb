"""Which operators of the registry a bench leaves out: one rule for all, so that a new operator cannot be forgotten."""

from __future__ import annotations

from collections.abc import Iterable

# It brings every operator into the registry.
import fastadapt.functional  # noqa: F401
from fastadapt.operators import registry

# What a bench leaves out on purpose, and why.
_NO_KERNEL = "has no kernel: PyTorch's own products and passes"
_EAGER = ("adapter_update", "adapter_update_backward")
LEFT_OUT: dict[str, dict[str, str]] = {
    "audit": dict.fromkeys(_EAGER, _NO_KERNEL),
    "traffic": {
        **dict.fromkeys(_EAGER, _NO_KERNEL),
        "row_squares": "reads W0 once when a layer is adapted, in no pass",
    },
    "gpu": {},
    "microbench": {},
}


def not_covered(bench: str, covers: Iterable[str]) -> dict[str, str]:
    """The operators that no case of a bench runs, each with the reason, "" for one that was forgotten; printed too."""
    missing = {name: LEFT_OUT[bench].get(name, "") for name in registry.not_covered(covers)}
    for name, reason in missing.items():
        print(f"not covered: {name}, {reason or 'without a reason'}")
    return missing
