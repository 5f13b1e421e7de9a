"""What a run says about its data."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from sborax.adapters.core import SboraxError
from sborax.config.codec import LiveObject


def at_least(least: int | float, **values: int | float | None) -> None:
    """Raise SboraxError for a value below `least`."""
    for name, value in values.items():
        if value is not None and value < least:
            raise SboraxError(f"{name} must be at least {least}, got {value}")


def above(bound: int | float, **values: int | float | None) -> None:
    """Raise SboraxError for a value that is not above `bound`."""
    for name, value in values.items():
        if value is not None and not value > bound:
            raise SboraxError(f"{name} must be above {bound}, got {value}")


@dataclasses.dataclass(frozen=True)
class Data:
    """A data set and how its samples become tokens.

    name: a file or directory, a name under `$SBORAX_DATA`, or a hub id. JSON, JSONL, CSV, parquet, text. Cells of
        CSV are the text that they are; numbers and truth values of JSON and parquet are written as Python writes them,
        null as nothing. In Python also a list of records, each a dict of columns, which no `config.json` holds.
    template: "alpaca" (columns instruction, output, maybe input), "llm_adapters" (the same columns, to the letter what
        LLM-Adapters train on, arXiv:2304.01933; they also have loss_on="all", max_length=256, overlong="truncate"),
        "chat" (messages with all their keys, and tools if there are any, or the columns of alpaca, through the
        tokenizer's chat template; one that ignores tools or tool_calls is refused), "text" (column text, loss on all of
        it), a prompt of your own such as "Q: {question}\\nA: " with the columns in braces, or the name of a class of
        yours that extends `sborax.data.template.AbstractTemplate`.
    answer: what follows a prompt of your own, with the columns in braces.
    split: which split, or which file of a directory.
    max_length: longest sample, in tokens, at least 3.
    overlong: longer samples are dropped, truncated, or split into windows; each is counted and printed.
    loss_on: the tokens that count: the answer's, or all.
    packing: several samples in one row, kept apart by segments.
    buckets: row lengths to pad to; empty for quarters of the longest row.
    limit: use only the first so many samples.
    """

    name: str | LiveObject | Sequence[Mapping[str, Any]]
    template: str = "alpaca"
    answer: str = "{output}"
    split: str = "train"
    max_length: int = 512
    overlong: Literal["drop", "truncate", "split"] = "drop"
    loss_on: Literal["answer", "all"] = "answer"
    packing: bool = False
    buckets: tuple[int, ...] = ()
    limit: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str | LiveObject):
            object.__setattr__(self, "name", _records(self.name))
        if self.max_length < 3:
            raise SboraxError(
                f"max_length must be at least 3, got {self.max_length}: attention over a single token trains no q_proj"
            )
        at_least(1, limit=self.limit)
        if any(bucket < 1 for bucket in self.buckets):
            raise SboraxError(f"buckets must be positive, got {list(self.buckets)}")

    def label(self) -> str:
        """The name, or what there is to say of records given in Python."""
        return self.name.label() if isinstance(self.name, LiveObject) else str(self.name)


def _records(given: Sequence[Mapping[str, Any]]) -> LiveObject:
    """Records as a value of the program, told apart by a digest."""
    records = [dict(record) if isinstance(record, Mapping) else record for record in given]
    bad = next((number for number, record in enumerate(records) if not isinstance(record, dict)), None)
    if bad is not None or not records:
        wrong = "there are no records" if bad is None else f"record {bad} is a {type(records[bad]).__name__}"
        raise SboraxError(f"data: {wrong}; give a list of dicts of columns, or a name")
    text = json.dumps(records, sort_keys=True, default=repr)
    many = f"{len(records):,} record{'s' * (len(records) > 1)}"
    return LiveObject(f"{many}, sha256 {hashlib.sha256(text.encode()).hexdigest()[:16]}", records)
