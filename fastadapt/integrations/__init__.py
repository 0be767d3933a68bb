"""Adapters where other libraries train: what needs one of them is imported when it is asked for."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .transformers import AdapterCallback
    from .trl import reference_model

__all__ = ["AdapterCallback", "reference_model"]

_HOMES = {"AdapterCallback": "transformers", "reference_model": "trl"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
