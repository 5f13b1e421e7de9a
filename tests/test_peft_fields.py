"""docs/peft_fields.md is true: every field of PEFT's configs is in it, and every claim has a cell of the matrix."""

import dataclasses
import functools
import warnings
from typing import Any

import pytest
from pages import DOCS, ROOT
from peft_matrix import OPTIONS, Option

import sborax as sx
from sborax.interop.peft_table import INERT, SELECTING, UNREAD, row_for
from scripts.peft_fields import classes_of, fields_of, page, problems, read_kinds

WRITTEN_BY_PEFT = {"peft_type", "peft_version", "inference_mode"}
"""Fields that have another value than the default in every file."""
ELSEWHERE = {("LORA", "target_parameters"): "test_peft_experts.py"}
"""Fields of models that the matrix lacks, and the test that compares logits with PEFT's."""
KINDS = read_kinds()


def default_of(field: dataclasses.Field) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def changed(option: Option) -> set[str]:
    """The fields that are saved with another value than PEFT's default."""
    config = option.config
    fields = fields_of(config.peft_type.value).items()
    names = {name for name, field in fields if getattr(config, name) != default_of(field)} - WRITTEN_BY_PEFT
    return {*names, *option.stored, *([] if option.prepare is None else ["rank_pattern"])}


@functools.cache
def cells() -> dict[str, list[tuple[Option, set[str]]]]:
    """The options of every kind, with the fields that they change."""
    options: dict[str, list[tuple[Option, set[str]]]] = {}
    with warnings.catch_warnings():
        # PEFT's advice.
        warnings.simplefilter("ignore")
        for option in OPTIONS:
            options.setdefault(option.config.peft_type.value, []).append((option, changed(option)))
    return options


def fields_of_class(kind: str, category: str) -> set[str]:
    common = dict.fromkeys(SELECTING, "equal") | dict.fromkeys(INERT, "inert")
    classes = {name: common[name] for name in fields_of(kind) if name in common}
    classes |= {name: entry.kind for name, entry in classes_of(kind).items()}
    return {name for name, entry in classes.items() if entry == category} - WRITTEN_BY_PEFT


def test_every_kind_and_field_of_peft_is_in_a_row():
    """Else say in `sborax/interop/peft_table.py`, or in the kind's row, what is done with it."""
    assert problems() == []


def test_a_new_kind_and_a_new_field_are_noticed(monkeypatch):
    monkeypatch.delitem(UNREAD, "POLY")
    monkeypatch.delitem(INERT, "revision")
    assert "POLY: no row, and no reason in UNREAD" in problems()
    assert "LORA: field revision is in no row" in problems()
    with pytest.raises(ValueError, match="POLY: no row"):
        page()


def test_the_page_is_that_of_this_peft():
    """Else `python -m scripts.peft_fields` writes it again."""
    assert (DOCS / "peft_fields.md").read_text() == page()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("category", ["equal", "inert"])
def test_fields_have_cells_in_which_peft_saves_other_values(category, kind):
    compared = set().union(*(fields for option, fields in cells()[kind] if option.refused is None))
    for (of, name), test in ELSEWHERE.items():
        if of == kind and name in (ROOT / "tests" / test).read_text():
            compared.add(name)
    assert sorted(fields_of_class(kind, category) - compared) == []


@pytest.mark.parametrize("kind", KINDS)
def test_fields_that_are_refused_have_cells_or_a_line(kind):
    """A cell for fields of which some values are read, and for the others a line that names the field."""
    cell_fields = set().union(*(fields for option, fields in cells()[kind] if option.refused or option.in_families))
    for name, entry in classes_of(kind).items():
        if name in cell_fields or not (entry.kind == "refused" or entry.reason and entry.kind == "equal"):
            continue
        with pytest.raises(sx.SboraxError) as caught:
            row_for({"peft_type": kind, name: "some"})
        assert str(caught.value) == f"option {name}=some is not supported: {entry.reason}"


@pytest.mark.parametrize("kind", UNREAD)
def test_kinds_that_are_not_read_are_refused_with_the_reason(kind):
    with pytest.raises(sx.SboraxError) as caught:
        row_for({"peft_type": kind})
    assert str(caught.value) == f"peft_type {kind!r} is not supported: {UNREAD[kind]}"
