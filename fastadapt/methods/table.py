"""The tables of methods in Markdown, made of what the registered configs say of themselves."""

from __future__ import annotations

from .config import METHODS, AdapterConfig

# How a method fills in the form; what one does that is no form.
FORMS = "method | config | g | d | h | β | trains"
STREAMS = "method | config | what it does | operator"


def _rows(config: type[AdapterConfig], heads: str) -> tuple[str, ...]:
    rows: tuple[str, ...] = config.__dict__.get("rows", ())
    return rows or (f"{config.title} | `{config.__name__}`" + " | –" * (heads.count("|") - 1),)


def markdown(heads: str) -> str:
    """The table with these heads, FORMS or STREAMS: a line for each method and variant, in the order of METHODS."""
    configs = [config for config in dict.fromkeys(METHODS.values()) if config.has_forms == (heads == FORMS)]
    rows = [row for config in configs for row in _rows(config, heads)]
    rule = "|".join(["---"] * (heads.count("|") + 1))
    return "\n".join([f"| {heads} |", f"|{rule}|", *[f"| {row} |" for row in rows]])
