"""Writes docs/peft_fields.md: what is done with every field of every config class of the installed PEFT.

    python -m scripts.peft_fields

The page is made of PEFT's own classes and of `sborax/interop/peft_table.py`. A kind or a field of PEFT that is in no
row there is an error.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import peft
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from sborax.interop.peft_base import KINDS
from sborax.interop.peft_biases import BIAS
from sborax.interop.peft_table import INERT, SELECTING, TABLE, UNREAD

PAGE = Path(__file__).resolve().parents[1] / "docs" / "peft_fields.md"
HEAD = """# Every field of PEFT's configs

What is done with each field of an adapter that PEFT {version} has saved. `python -m scripts.peft_fields` makes this
page from PEFT's config classes and the rows of `sborax/interop/peft_table.py`; a test fails if PEFT has a kind or a
field that is not here. [PEFT's format](peft.md) has the methods, [From PEFT and back](from_peft.md) their names here.

- **equal**: the field is read. `tests/peft_matrix.py` has a cell in which PEFT saves an adapter with another value than
  its default. The logits are PEFT's here, and PEFT's again after writing, to 1e-4. "equal for" lists values, of which
  others are refused.
- **inert**: the field does not change the function of a saved adapter, and any value is read. The reason is given.
- **refused**: another value than the default is an error of one line that names the field. "equal, but for" means that
  some values are read, and that others are refused.

## Kinds that are not read

`load_peft` refuses them with the reason.

{unread}

## Fields of all kinds

{common}

## Fields of one kind

"""


class Class(NamedTuple):
    """How a field is read: "equal", "inert" or "refused"; the reason if it is not always equal."""

    kind: str
    reason: str = ""

    def __str__(self) -> str:
        if self.kind == "equal":
            return f"equal, but for: {self.reason}" if self.reason else "equal"
        return f"{self.kind}: {self.reason}"


def fields_of(kind: str) -> dict[str, dataclasses.Field]:
    """The fields of PEFT's config class of a kind."""
    return {field.name: field for field in dataclasses.fields(PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(kind)])}


def classes_of(kind: str) -> dict[str, Class]:
    """The class of every field that a row names, but not of those of all kinds."""
    equal: set[str] = set()
    inert: dict[str, str] = {}
    refused: dict[str, str] = {}
    for row in TABLE:
        if row.peft_type == kind:
            equal |= row.known_by.keys() | row.defaults.keys() | set(row.patterns.values()) | row.reads
            equal |= {BIAS} & row.constants.keys()
            inert |= row.inert
            refused |= row.refused
            # A boolean has one other value.
            equal -= {name for name in row.refused if isinstance(row.defaults.get(name), bool)}
    for entry in KINDS:
        if entry.peft_type == kind:
            equal |= entry.reads
            inert |= entry.inert
            refused |= dict.fromkeys({"modules_to_save"} & fields_of(kind).keys(), "this kind changes the base itself")
    classes = {name: Class("refused", reason) for name, reason in refused.items()}
    classes |= {name: Class("inert", reason) for name, reason in inert.items()}
    return classes | {name: Class("equal", refused.get(name, "")) for name in equal}


def read_kinds() -> list[str]:
    """PEFT's kinds that are read, in PEFT's order."""
    kinds = {row.peft_type for row in TABLE} | {entry.peft_type for entry in KINDS}
    return [kind.value for kind in peft.PeftType if kind.value in kinds]


def problems() -> list[str]:
    """What PEFT has and no row names, and the reverse: a line for each."""
    theirs = [kind.value for kind in peft.PeftType]
    wrong = [f"{kind}: no row, and no reason in UNREAD" for kind in theirs if kind not in {*read_kinds(), *UNREAD}]
    wrong += [f"{kind}: in UNREAD, and PEFT has no such kind" for kind in UNREAD if kind not in theirs]
    wrong += [f"{kind}: in UNREAD, and read" for kind in UNREAD if kind in read_kinds()]
    common = SELECTING | INERT.keys()
    all_fields: set[str] = set()
    for kind in read_kinds():
        fields, classes = fields_of(kind), classes_of(kind)
        all_fields |= fields.keys()
        wrong += [f"{kind}: field {name} is in no row" for name in fields if name not in common | classes.keys()]
        wrong += [f"{kind}: PEFT has no field {name}" for name in classes if name not in fields]
    return wrong + [f"no kind of PEFT has the field {name}" for name in sorted(common - all_fields)]


def table(head: str, rows: Iterable[tuple[Any, ...]]) -> str:
    lines = [" | ".join(map(str, row)).replace("\n", " ") for row in rows]
    return "\n".join([f"| {head} |", "|" + "---|" * (head.count("|") + 1), *(f"| {line} |" for line in lines)])


def accepted(kind: str) -> Mapping[str, str]:
    """The values of the fields of which rows name values."""
    values: dict[str, dict[str, None]] = {}
    for row in TABLE:
        if row.peft_type == kind:
            for name, options in row.known_by.items():
                values.setdefault(name, {}).update(dict.fromkeys(map(repr, options)))
    return {name: ", ".join(options) for name, options in values.items()}


def section(kind: str) -> str:
    classes, values = classes_of(kind), accepted(kind)
    rows = []
    for name in fields_of(kind):
        if name in classes:
            text = str(classes[name])
            if name in values and not text.startswith("equal, but"):
                text = f"equal for {values[name]}"
            rows.append((f"`{name}`", text))
    return f"### {kind}\n\n" + (table("field | class", rows) if rows else "None.") + "\n"


def page() -> str:
    """The text of the page. Raises ValueError for anything in PEFT that no row names."""
    if wrong := problems():
        raise ValueError("sborax/interop/peft_table.py and PEFT disagree:\n" + "\n".join(wrong))
    unread = table("kind | reason", ((f"`{kind.value}`", UNREAD[kind]) for kind in peft.PeftType if kind in UNREAD))
    classes = {name: Class("equal") for name in sorted(SELECTING)}
    classes |= {name: Class("inert", INERT[name]) for name in sorted(INERT)}
    common = table("field | class", ((f"`{name}`", text) for name, text in classes.items()))
    head = HEAD.format(version=peft.__version__, unread=unread, common=common)
    return head + "\n".join(map(section, read_kinds()))


if __name__ == "__main__":
    PAGE.write_text(page())
