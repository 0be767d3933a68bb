"""Modules that an adapter trains whole."""

from __future__ import annotations

from typing import Any

from torch import nn


class ModuleToSave(nn.Module):
    """A module with a trained copy for each adapter that names it in modules_to_save; the active one runs."""

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.original = original
        self.copies = nn.ModuleDict()
        self.active: str | None = None

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # Python's own names (__deepcopy__) are this module's or nobody's.
            if name in ("original", "copies") or name.startswith("__"):
                raise
            return getattr(self.current, name)

    @property
    def current(self) -> nn.Module:
        return self.copies[self.active] if self.active is not None and self.active in self.copies else self.original

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.current(*args, **kwargs)
