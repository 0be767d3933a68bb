"""The command line: one sub-command for each bench of ``bench.cases.BENCHES``."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from bench.cases import BENCHES
from bench.gpu import needs
from bench.tunables import restart_with_tunables


def main(argv: Sequence[str] | None = None) -> None:
    """Run the bench that argv names, as ``python -m bench`` does, without leaving the process."""
    import typer

    app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__)

    @app.callback()
    def _group() -> None:
        """Ratios between variants that ran interleaved in one process; every bench writes --json FILE."""

    # What one bench needs is not to be imported, nor to be there, for another.
    named = (sys.argv[1:] if argv is None else argv)[:1]
    for name, module in BENCHES.items():
        if name in named or not set(named) & set(BENCHES):
            app.command(name)(importlib.import_module(module).main)
    app(args=None if argv is None else list(argv), standalone_mode=argv is None)


if __name__ == "__main__":
    if sys.argv[1:2] == ["gpu"] and (lacking := needs.missing()) is not None:
        sys.exit(lacking)
    restart_with_tunables()
    main()
