"""LLM-Adapters' instructions (arXiv:2304.01933): extracting answers from texts, and parsing options from instructions.

Prompts and extraction are those of github.com/AGI-Edgerunners/LLM-Adapters, `commonsense_evaluate.py` and
`evaluate.py`; DoRA's and SBoRA's evaluations use the same files.
"""

import math
import re
from collections.abc import Callable
from typing import Any

from sborax.adapters.core import SboraxError
from sborax.evaluate.choice import Question, make_question
from sborax.evaluate.task import Record, field

END = "### Response:"
"""Their script takes the text between the first and the second of these."""
TOLERANCE = 1e-3
"""Largest difference of a right number from the reference (their `miss`)."""


def first(pattern: str) -> Callable[[str], str]:
    """A function that returns the first match of `pattern` in a text, or ""."""

    def extract(text: str) -> str:
        match = re.search(pattern, text.strip())
        return match[0] if match else ""

    return extract


BOOLQ = first("true|false")
PIQA = first("solution1|solution2")
ANSWER = first("answer1|answer2|answer3|answer4|answer5")
ENDING = first("ending1|ending2|ending3|ending4")
OPTION = first("option1|option2")
LETTER = first("A|B|C|D|E")


def last_number(text: str) -> float | None:
    """The last number of a text, without commas; None if there is none."""
    numbers = re.findall(r"-?\d+\.?\d*", text.replace(",", ""))
    return float(numbers[-1]) if numbers else None


def same_word(answer: Any, record: Record) -> bool:
    """Whether the answer equals the record's exactly."""
    return answer == field(record, "answer")


def same_number(answer: Any, record: Record) -> bool:
    """Whether the answer is the record's number, within `TOLERANCE`."""
    return answer is not None and math.fabs(float(field(record, "answer")) - answer) <= TOLERANCE


def parse(instruction: str) -> tuple[str, dict[str, str]]:
    """The question of a commonsense instruction, and its options by the names that answers use.

    Raises SboraxError for an instruction of another form.
    """
    match = re.fullmatch(r"(?s)Please [^:]*?: ?(.*?)\s*Answer format: ?(\S+)\s*", instruction)
    if match is None:
        raise SboraxError(f"not an instruction of LLM-Adapters' commonsense sets: {instruction[:60]!r}")
    names = match[2].split("/")
    if names == ["true", "false"]:
        return match[1], {name: name for name in names}
    word = re.sub(r"\d+$", "", names[0]).capitalize()
    # The question may contain such a word too; the options are the last ones.
    marks = [rf"\s*\b{word}{number + 1}: ?(.*?)" for number in range(len(names))]
    parts = re.fullmatch(rf"(?s)(.*){''.join(marks)}", match[1])
    if parts is None:
        raise SboraxError(f"no options {', '.join(names)} in the instruction {instruction[:60]!r}")
    return parts[1].strip(), dict(zip(names, (text.strip() for text in parts.groups()[1:]), strict=True))


def labels(record: Record) -> Question:
    """A question whose options are "the correct answer is NAME", as the training sets have it."""
    _, options = parse(field(record, "instruction"))
    names = tuple(options)
    return Question((), tuple(f"the correct answer is {name}" for name in names), names, _gold(record, names))


def _gold(record: Record, names: tuple[str, ...]) -> int:
    answer = field(record, "answer")
    if answer not in names:
        raise SboraxError(f"the answer {answer!r} is none of {', '.join(names)}")
    return names.index(answer)


def cloze(pattern: str) -> Callable[[Record], Question]:
    """A function that makes a question of a record: `pattern` around its question, then the text of an option."""

    def ask(record: Record) -> Question:
        question, options = parse(field(record, "instruction"))
        return make_question(pattern.format(question=question), list(options.values()), _gold(record, tuple(options)))

    return ask


def yes_no(record: Record) -> Question:
    """BoolQ without its passage, which LLM-Adapters leave out: " no" or " yes"."""
    question, options = parse(field(record, "instruction"))
    return make_question(
        f"Question: {question}\nAnswer:", ("no", "yes"), int(field(record, "answer") == list(options)[0])
    )


def blank(record: Record) -> Question:
    """WinoGrande: the likelihood of the rest of the sentence, after either option in place of the blank."""
    sentence, options = parse(field(record, "instruction"))
    before, mark, after = sentence.partition("_")
    if not mark:
        raise SboraxError(f"no blank in the sentence {sentence[:60]!r}")
    ending = f" {after.strip()}"
    prompts = tuple(before + option for option in options.values())
    return Question(prompts, (ending,) * len(prompts), tuple(options.values()), _gold(record, tuple(options)))
