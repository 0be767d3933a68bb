"""The command line: one sub-command for each bench of ``bench.cases.BENCHES``."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

import typer

from bench.cases import BENCHES
from bench.measure import restart_with_tunables

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__)
for name, module in BENCHES.items():
    app.command(name)(importlib.import_module(module).main)


@app.callback()
def _group() -> None:
    """Ratios between variants that ran interleaved in one process; every bench writes --json FILE."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the bench that argv names, as ``python -m bench`` does, without leaving the process."""
    app(args=None if argv is None else list(argv), standalone_mode=argv is None)


if __name__ == "__main__":
    restart_with_tunables()
    main()
