"""GLUE by the likelihood of labels, with lm-evaluation-harness' prompts."""

import csv
from collections.abc import Callable, Sequence

from sborax.adapters.core import SboraxError
from sborax.config.documents import check_plain
from sborax.data.source import find, read
from sborax.evaluate.choice import Question, make_question
from sborax.evaluate.task import Record, field


def rows(name: str, split: str) -> Sequence[Record]:
    """The records of a data set. In GLUE's tab-separated files, quotation marks are plain characters.

    Raises SboraxError as `sborax.data.source.read` does, and for a line with another number of columns.
    """
    path = find(name, split)
    if path is None or path.suffix not in (".tsv", ".txt"):
        return list(read(name, split))
    check_plain(path)
    with path.open(encoding="utf-8-sig", newline="") as file:
        head, *lines = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
    for number, line in enumerate(lines, start=2):
        if len(line) != len(head):
            raise SboraxError(f"{path}: line {number} has {len(line)} columns, not {len(head)}")
    return [dict(zip(head, line, strict=True)) for line in lines]


def asking(pattern: str, options: tuple[str, ...], label: str, labels: tuple[str, ...]) -> Callable[[Record], Question]:
    """A function that makes a question of a record.

    - pattern: the prompt, with columns in braces.
    - options: the continuation for each label.
    - label: the column with the right label: one of `labels`, or its number.
    """

    def ask(record: Record) -> Question:
        gold = str(field(record, label))
        numbers = tuple(str(number) for number in range(len(labels)))
        names = labels if gold in labels else numbers
        if gold not in names:
            raise SboraxError(f"the label {gold!r} is none of {', '.join(labels)}")
        columns = {name: str(value).strip() for name, value in record.items()}
        try:
            return make_question(pattern.format(**columns), options, names.index(gold))
        except KeyError as error:
            raise SboraxError(f"there is no column {error}; the columns are {', '.join(record)}") from None

    return ask
