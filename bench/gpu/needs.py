"""What the bench needs to be there, told in the first second: PyTorch is not imported yet."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

_FROM_THE_CLONE = "run it from the clone with PYTHONPATH=.:kernels, or install the clone (pip install -e .)"

# Package -> what brings it. matplotlib, peft and ncu are looked for when their turn comes.
NEEDED = {
    "torch": 'pip install "fastadapt[cli]"',
    "typer": 'pip install "fastadapt[cli]"',
    "rich": 'pip install "fastadapt[cli]"',
    "fastadapt": _FROM_THE_CLONE,
    "fastadapt_kernels": _FROM_THE_CLONE,
}


def there(package: str) -> bool:
    """Whether a package can be found, without importing it."""
    try:
        return importlib.util.find_spec(package) is not None
    except ValueError:  # what sys.modules has without a specification
        return False


def missing(found: Callable[[str], bool] = there) -> str | None:
    """The packages that are not there, each with its cure; None where all are."""
    lacking = [f"{name}: {cure}" for name, cure in NEEDED.items() if not found(name)]
    if not lacking:
        return None
    return "python -m bench gpu needs packages that cannot be imported here\n  " + "\n  ".join(lacking)
