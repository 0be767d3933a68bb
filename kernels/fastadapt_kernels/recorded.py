"""One launch of a kernel as a launcher asks for it: what is run, or noted down and compiled without a GPU."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor
from triton.runtime.jit import mangle_type

Config = dict[str, int]


class Launch(NamedTuple):
    """One kernel launch as a launcher asked for it: kernel, grid, arguments by name and the chosen config."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: Mapping[str, Any]
    config: Config

    def source(self) -> tuple[dict[str, Any], dict[tuple[int, ...], Any], dict[tuple[int, ...], Any]]:
        """(signature, constexprs, attrs) for triton.compiler.ASTSource, specialised as the just-in-time path would.

        The signature of a tuple is a tuple; its entries are known to constexprs and attrs by their path.
        """
        constexprs: dict[tuple[int, ...], Any] = {}
        attrs: dict[tuple[int, ...], Any] = {}

        def specialise(value: Any, path: tuple[int, ...], parameter: Any) -> Any:
            if isinstance(value, tuple) and not parameter.is_constexpr:
                return tuple(specialise(entry, (*path, i), parameter) for i, entry in enumerate(value))
            specialised_integer = isinstance(value, int) and not parameter.do_not_specialize
            if parameter.is_constexpr or value is None or (specialised_integer and value == 1):
                constexprs[path] = value
                return "constexpr"
            if isinstance(value, Tensor) or (specialised_integer and value % 16 == 0):
                attrs[path] = [["tt.divisibility", 16]]
            return mangle_type(value)

        values = {**self.arguments, **self.config}
        parameters = enumerate(self.kernel.params)
        signature = {item.name: specialise(values[item.name], (position,), item) for position, item in parameters}
        return signature, constexprs, attrs
