"""Methods of other packages, which name the modules that define them in the entry point group `fastadapt.methods`."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import entry_points

GROUP = "fastadapt.methods"


def load_methods() -> Iterator[str]:
    """Imports what the installed packages name; yields what to warn of for each that cannot be, and goes on."""
    for entry in entry_points(group=GROUP):
        try:
            entry.load()
        # Whatever somebody else's module does when it is imported, SystemExit too.
        except (Exception, SystemExit) as error:
            package = f"{entry.dist.name} {entry.dist.version}" if entry.dist else "an unknown package"
            yield (
                f"entry point {entry.name!r} ({GROUP}) of {package} could not be loaded, its methods are missing: "
                f"{type(error).__name__}: {error}; update that package or uninstall it"
            )
