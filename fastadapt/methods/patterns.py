"""Regular expressions that come from adapter files: what `re` means by them, in a bounded time.

An expression of a few characters can keep `re` busy for years. These run in the `regex` package, which can be told when
to stop; only what `re` accepts too is taken, so that nothing gets a meaning that PEFT would not give it.
"""

from __future__ import annotations

import math
import re
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from typing import Any

import regex

from ..checks import shown

# For one expression on one module path: thousands of times what an honest one takes.
SECONDS = 0.5
MAX_LENGTH = 65536

# Where both packages accept an expression and read it differently: approximate matching, `x{e<=1}`, and POSIX classes.
_AMBIGUOUS = re.compile(r"(?<!\\)(?:\\\\)*\{(?!\d*,?\d*\})|\[:")

# Counted repetitions, of groups that may stand in each other and of single characters. In the midst of very many of
# them `regex` looks at no clock, `((a|())+){999}`, or takes a gigabyte in a moment, `((.{0,99}){99}){99}`.
MAX_REPETITIONS = 100
_COUNTED = re.compile(r"(\)?)\{(\d*),?(\d*)\}")

# The seconds that are left for matching, where they are limited.
_left: ContextVar[list[float] | None] = ContextVar("left", default=None)


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Inside, all matching together, of any number of expressions and paths, may take that long."""
    token = _left.set([seconds])
    try:
        yield
    finally:
        _left.reset(token)


def match(field: str, pattern: str, path: str, template: str = "{}") -> Any:
    """The match of template.format(pattern) at the start of a module path, or None.

    Raises ValueError that names the config's field and the pattern, for one that is no regular expression or takes too
    long.
    """
    return _run("match", field, pattern, path, template)


def fullmatch(field: str, pattern: str, path: str) -> Any:
    """The match of a pattern with a whole module path, or None. Raises ValueError as `match` does."""
    return _run("fullmatch", field, pattern, path, "{}")


def _run(how: str, field: str, pattern: str, path: str, template: str) -> Any:
    left = _left.get() or [math.inf]
    if left[0] <= 0:
        raise ValueError(f"{field}: the patterns take too long together, time ran out at {shown(pattern)}: write fewer")
    start = time.perf_counter()
    try:
        expression = _compiled(template.format(pattern))
    except (ValueError, OverflowError, RecursionError, re.error, regex.error) as error:
        raise ValueError(f"{field}: {shown(pattern)} is not a regular expression that can be used: {error}") from error
    try:
        return getattr(expression, how)(path, timeout=min(SECONDS, left[0]))
    except (TimeoutError, MemoryError):
        raise ValueError(
            f"{field}: {shown(pattern)} takes too long on {path!r}, which it can match in very many ways: write it "
            "without repetitions inside repetitions, or name the modules in a list"
        ) from None
    finally:
        left[0] -= time.perf_counter() - start


@lru_cache(maxsize=1024)
def _compiled(expression: str) -> Any:
    if len(expression) > MAX_LENGTH:
        raise ValueError(f"it must have at most {MAX_LENGTH} characters, got {len(expression)}")
    if _AMBIGUOUS.search(expression):
        raise ValueError("a brace that is no repetition and a class like [:alpha:] must be written with a backslash")
    if _repetitions(expression) > MAX_REPETITIONS:
        raise ValueError(f"its counted repetitions may multiply to {MAX_REPETITIONS}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about sets that may mean something else in the future
        re.compile(expression)
        return regex.compile(expression, cache_pattern=False)


def _repetitions(expression: str) -> int:
    """At most how often the counts in braces make the same part of an expression run, `*` and `+` apart."""
    groups, characters = 1, 1
    for closing, *counts in _COUNTED.findall(expression):
        count = max(int(digits[:9] or 1) for digits in counts)
        if closing:
            groups = min(groups * max(count, 1), 10**9)
        else:
            characters = max(characters, count)
    return groups * characters
