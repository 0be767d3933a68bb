"""A method of another package is one file: defined, it is trained, saved, loaded, merged, served and told like ours."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any, ClassVar
from unittest import mock

import pytest

from fastadapt import DoRAConfig, LoRAConfig, VeRAConfig
from fastadapt.methods import METHODS, PEFT_TYPES, AdapterConfig, hira
from fastadapt.model.peft_files import method_of


@pytest.fixture(autouse=True)
def the_table_is_put_back() -> Iterator[None]:
    with mock.patch.dict(METHODS):
        yield


def defined(name: str = "Foreign", base: type[AdapterConfig] = AdapterConfig, **body: Any) -> type[AdapterConfig]:
    """A class of this name that such a body defines in a module of somebody else's."""
    found: type[AdapterConfig] = type(name, (base,), {"__module__": "theirs", "__qualname__": name, **body})
    return found


def test_a_class_that_sets_its_peft_type_is_in_the_table() -> None:
    foreign = defined(peft_type="FOREIGN", title="Foreign", aliases=("FOREIGN_TWO",))
    assert METHODS["FOREIGN"] is METHODS["FOREIGN_TWO"] is foreign
    assert method_of({"peft_type": "FOREIGN_TWO"}) is foreign
    assert "FOREIGN" not in PEFT_TYPES


def test_a_class_that_inherits_its_peft_type_is_a_variant() -> None:
    defined("Variant", LoRAConfig)
    assert METHODS["LORA"] is LoRAConfig
    assert DoRAConfig not in METHODS.values()
    assert METHODS["VERA"] is METHODS["DVORA"] is VeRAConfig
    # What it inherits beside it does not count either.
    defined("Other", VeRAConfig, peft_type="OTHER", title="Other")
    assert METHODS["DVORA"] is VeRAConfig
    assert "OTHER" not in PEFT_TYPES


def test_peft_types_are_those_that_peft_has() -> None:
    import peft

    known = {str(getattr(kind, "value", kind)) for kind in peft.PeftType}
    assert set(METHODS) & known == PEFT_TYPES


def test_the_same_name_replaces() -> None:
    former = defined(peft_type="FOREIGN", title="Foreign")
    again = defined(peft_type="FOREIGN", title="Foreign")
    assert METHODS["FOREIGN"] is again is not former
    before = METHODS["HIRA"]
    with mock.patch.dict(vars(hira)):
        importlib.reload(hira)
        assert METHODS["HIRA"] is hira.HiRAConfig is not before
    assert "HIRA" in PEFT_TYPES


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a taken type": (
        {"peft_type": "LORA", "title": "Mine"},
        r"theirs\.Foreign: peft_type 'LORA' is taken by fastadapt\.methods\.lora\.LoRAConfig: give the class another",
    ),
    "a taken alias": (
        {"peft_type": "MINE", "title": "Mine", "aliases": ("DVORA",)},
        r"'DVORA' is taken by .*VeRAConfig",
    ),
    "a taken title": ({"peft_type": "MINE", "title": "lora"}, r"title 'lora' is taken by .*LoRAConfig: give the class"),
    "an inherited title": ({"peft_type": "MINE", "base": LoRAConfig}, r"title 'LoRA' is taken by .*LoRAConfig"),
    "no title": ({"peft_type": "MINE"}, "peft_type, aliases and title must be text and not empty, got None: set them"),
    "an empty type": ({"peft_type": "", "title": "Mine"}, "must be text and not empty, got ''"),
    "aliases that are no tuple": (
        {"peft_type": "MINE", "title": "Mine", "aliases": "MINE_TWO"},
        "theirs.Foreign: aliases must be a tuple of names, got 'MINE_TWO'",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_enter_the_table_says_why(case: str) -> None:
    body, reason = REFUSED[case]
    before = dict(METHODS)
    with pytest.raises(ValueError, match=reason):
        defined(**body)
    assert before == METHODS


def test_a_class_body_in_a_notebook_is_enough() -> None:
    class Notebook(LoRAConfig):
        peft_type: ClassVar[str] = "NOTEBOOK"
        title: ClassVar[str] = "Notebook"

    assert METHODS["NOTEBOOK"] is Notebook
