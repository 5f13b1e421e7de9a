"""What a run says about its data."""

import dataclasses
from typing import Literal

from sborax.core import SboraxError


def at_least(least: int | float, **values: int | float | None) -> None:
    """Raise SboraxError for a value below `least`."""
    for name, value in values.items():
        if value is not None and value < least:
            raise SboraxError(f"{name} must be at least {least}, got {value}")


@dataclasses.dataclass(frozen=True)
class Data:
    """A data set and how its samples become tokens.

    name: a file or directory, a name under `$SBORAX_DATA`, or a hub id. JSON, JSONL, CSV, parquet, text. Cells of
        CSV are the text that they are; numbers and truth values of JSON and parquet are written as Python writes them,
        null as nothing.
    template: "alpaca" (columns instruction, output, maybe input), "llm_adapters" (the same columns, to the letter what
        LLM-Adapters train on, arXiv:2304.01933; they also have loss_on="all", max_length=256, overlong="truncate"),
        "chat" (messages with all their keys, and tools if there are any, or the columns of alpaca, through the
        tokenizer's chat template; one that ignores tools or tool_calls is refused), "text" (column text, loss on all of
        it), or a prompt of your own such as "Q: {question}\\nA: " with the columns in braces.
    answer: what follows a prompt of your own, with the columns in braces.
    split: which split, or which file of a directory.
    max_length: longest sample, in tokens.
    overlong: longer samples are dropped, truncated, or split into windows; each is counted and printed.
    loss_on: the tokens that count: the answer's, or all.
    packing: several samples in one row, kept apart by segments.
    buckets: row lengths to pad to; empty for quarters of the longest row.
    limit: use only the first so many samples.
    """

    name: str
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
        at_least(2, max_length=self.max_length)
        at_least(1, limit=self.limit)
        if any(bucket < 1 for bucket in self.buckets):
            raise SboraxError(f"buckets must be positive, got {list(self.buckets)}")
