"""The options of a run's data."""

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from sborax.adapters.core import SboraxError
from sborax.config.codec import LiveObject


def at_least(least: int | float, **values: int | float | None) -> None:
    """Raise SboraxError for a value below `least`, and for one that is not finite."""
    for name, value in values.items():
        if value is not None and not value >= least:
            raise SboraxError(f"{name} must be at least {least}, got {value}")
        _check_finite(name, value)


def above(bound: int | float, **values: int | float | None) -> None:
    """Raise SboraxError for a value at or below `bound`, and for one that is not finite."""
    for name, value in values.items():
        if value is not None and not value > bound:
            raise SboraxError(f"{name} must be above {bound}, got {value}")
        _check_finite(name, value)


def _check_finite(name: str, value: int | float | None) -> None:
    if value == math.inf:
        raise SboraxError(f"{name} must be a finite number, got {value}")


@dataclasses.dataclass(frozen=True)
class Data:
    """A data set, and how its records become tokens.

    Args:
    - name: a file or directory (JSON, JSONL, CSV, TSV, parquet, text), a name under `$SBORAX_DATA`, or a hub id. Cells
      of CSV stay text; numbers and truth values of JSON and parquet become text as Python prints them, and null the
      empty text. In Python also a list of records, each a dict of columns, which a `config.json` cannot hold.
    - template: how a record becomes text:
      - "alpaca": Stanford Alpaca's prompt; columns instruction, output, and maybe input.
      - "llm_adapters": the same columns in exactly the prompt that LLM-Adapters train on (arXiv:2304.01933); they also
        have loss_on="all", max_length=256, overlong="truncate".
      - "chat": the tokenizer's chat template; columns messages, with all their keys, and maybe tools, or a pair of
        columns: instruction and output, prompt and completion, question and answer. A template that ignores tools or
        tool_calls is refused.
      - "text": column text, with loss on all of it.
      - a prompt of your own, with columns in braces, such as "Q: {question}\\nA:".
      - the name of a class of yours that extends `sborax.data.template.AbstractTemplate`.
    - answer: the text after a prompt of your own, with columns in braces, such as " {output}". A space between the two
      belongs here: most tokenizers join it to the word that follows.
    - split: the split to read; of a directory, the name of the file. A directory's only data file may have any name but
      that of another split.
    - max_length: the longest sample, in tokens, at least 3.
    - overlong: whether longer samples are dropped, truncated, or split into windows. Their number is printed.
    - loss_on: the tokens that enter the loss: the answer's, or all.
    - packing: put several samples into a row. They stay separate segments, which do not attend to each other.
    - buckets: row lengths to pad to, in tokens; empty (default) for quarters of the longest row.
    - limit: the number of samples to use, from the first on; None (default) for all.

    Raises SboraxError for a value out of range, and for records that are no dicts.
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
        """The name, or a description of records given in Python."""
        return self.name.label() if isinstance(self.name, LiveObject) else str(self.name)


def _records(name: Sequence[Mapping[str, Any]]) -> LiveObject:
    """Records given in Python, described by their number and a digest."""
    records = [dict(record) if isinstance(record, Mapping) else record for record in name]
    bad = next((number for number, record in enumerate(records) if not isinstance(record, dict)), None)
    if bad is not None or not records:
        problem = "there are no records" if bad is None else f"record {bad} is a {type(records[bad]).__name__}"
        raise SboraxError(f"data: {problem}; give a list of dicts of columns, or a name")
    text = json.dumps(records, sort_keys=True, default=repr)
    count = f"{len(records):,} record{'s' * (len(records) > 1)}"
    return LiveObject(f"{count}, sha256 {hashlib.sha256(text.encode()).hexdigest()[:16]}", records)
