"""PEFT's protocol for models trained on MetaMathQA: github.com/huggingface/peft, `method_comparison/MetaMathQA`."""

from decimal import Decimal, DivisionByZero, InvalidOperation
from typing import Any

from sborax.adapters.core import SboraxError
from sborax.evaluate.task import Record, field

PROMPT = "Question: {question} Think step by step.\nAnswer:"
MARKS = ("The answer is: ", "The answer is ", "The final answer is: ", "The final answer is ", "#### ")
"""The first of these that a text holds is what its answer follows, wherever it stands last."""


def parse(text: str) -> str | None:
    """The answer of a text: what follows the mark, to the end of the line, without signs around it."""
    text = text.strip().rstrip(".!?")
    mark = next((mark for mark in MARKS if mark in text), None)
    if mark is None:
        return None
    return text.rpartition(mark)[-1].strip().split("\n", 1)[0].strip(" .!?$%")


def number(text: str) -> float | None:
    """A decimal number or a fraction, None for anything else."""
    try:
        above, slash, below = text.strip().partition("/")
        return float(Decimal(above.strip()) / Decimal(below.strip()) if slash else Decimal(above))
    except (DivisionByZero, InvalidOperation):
        return None


def same(answer: Any, record: Record) -> bool:
    """Whether an answer is that of GSM8K's solution: as numbers where they are numbers.

    Raises SboraxError for a solution without an answer.
    """
    gold = parse(field(record, "answer"))
    if gold is None:
        raise SboraxError(f"the solution {record['answer'][:40]!r} has no answer after '#### '")
    if answer is None:
        return False
    values = [value if number(value) is None else number(value) for value in (answer, gold)]
    return values[0] == values[1]
