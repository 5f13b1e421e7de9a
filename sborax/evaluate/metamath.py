"""PEFT's protocol for models trained on MetaMathQA: github.com/huggingface/peft, `method_comparison/MetaMathQA`."""

from decimal import Decimal, DivisionByZero, InvalidOperation
from typing import Any

from sborax.adapters.core import SboraxError
from sborax.evaluate.task import Record, field

PROMPT = "Question: {question} Think step by step.\nAnswer:"
MARKS = ("The answer is: ", "The answer is ", "The final answer is: ", "The final answer is ", "#### ")
"""The answer of a text follows the last occurrence of the first of these that the text contains."""


def parse(text: str) -> str | None:
    """The answer of a text: what follows the mark, to the end of the line, without punctuation; None without a mark."""
    text = text.strip().rstrip(".!?")
    mark = next((mark for mark in MARKS if mark in text), None)
    if mark is None:
        return None
    return text.rpartition(mark)[-1].strip().split("\n", 1)[0].strip(" .!?$%")


def number(text: str) -> float | None:
    """A decimal number or a fraction; None for anything else."""
    try:
        numerator, slash, denominator = text.strip().partition("/")
        return float(Decimal(numerator.strip()) / Decimal(denominator.strip()) if slash else Decimal(numerator))
    except (DivisionByZero, InvalidOperation):
        return None


def same(answer: Any, record: Record) -> bool:
    """Whether an answer equals that of GSM8K's solution. Numbers are compared as numbers.

    Raises SboraxError for a solution without an answer.
    """
    gold = parse(field(record, "answer"))
    if gold is None:
        raise SboraxError(f"the solution {record['answer'][:40]!r} has no answer after '#### '")
    if answer is None:
        return False
    values = [value if number(value) is None else number(value) for value in (answer, gold)]
    return values[0] == values[1]
