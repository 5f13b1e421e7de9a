"""LLM-Adapters' instructions (arXiv:2304.01933): their prompt, the answers they look for, and their options read back.

Prompts and extraction are those of github.com/AGI-Edgerunners/LLM-Adapters, `commonsense_evaluate.py` and
`evaluate.py`; DoRA's and SBoRA's evaluations use the same files.
"""

import math
import re
from collections.abc import Callable
from typing import Any

from sborax.adapters.core import SboraxError
from sborax.evaluate.choice import Question, asked
from sborax.evaluate.task import Record, field

END = "### Response:"
"""Their script takes what stands between the first and the second of these."""
TOLERANCE = 1e-3
"""Between a number and the right one (their `miss`)."""


def first(pattern: str) -> Callable[[str], str]:
    """A function that returns the first match of `pattern` in a text, or ""."""

    def found(text: str) -> str:
        match = re.search(pattern, text.strip())
        return match[0] if match else ""

    return found


BOOLQ = first("true|false")
PIQA = first("solution1|solution2")
ANSWER = first("answer1|answer2|answer3|answer4|answer5")
ENDING = first("ending1|ending2|ending3|ending4")
OPTION = first("option1|option2")
LETTER = first("A|B|C|D|E")


def last_number(text: str) -> float | None:
    """The last number of a text, commas dropped."""
    found = re.findall(r"-?\d+\.?\d*", text.replace(",", ""))
    return float(found[-1]) if found else None


def same_word(answer: Any, record: Record) -> bool:
    """Whether the answer is the record's, letter by letter."""
    return answer == field(record, "answer")


def same_number(answer: Any, record: Record) -> bool:
    """Whether the answer is the record's number, to `TOLERANCE`."""
    return answer is not None and math.fabs(float(field(record, "answer")) - answer) <= TOLERANCE


def parse(instruction: str) -> tuple[str, dict[str, str]]:
    """What a commonsense instruction asks, and its options by the names that answers go by.

    Raises SboraxError for an instruction of another form.
    """
    match = re.fullmatch(r"(?s)Please [^:]*?: ?(.*?)\s*Answer format: ?(\S+)\s*", instruction)
    if match is None:
        raise SboraxError(f"not an instruction of LLM-Adapters' commonsense sets: {instruction[:60]!r}")
    names = match[2].split("/")
    if names == ["true", "false"]:
        return match[1], {name: name for name in names}
    word = re.sub(r"\d+$", "", names[0]).capitalize()
    # A question may hold the word itself: the options are the last ones.
    marks = [rf"\s*\b{word}{number + 1}: ?(.*?)" for number in range(len(names))]
    found = re.fullmatch(rf"(?s)(.*){''.join(marks)}", match[1])
    if found is None:
        raise SboraxError(f"no options {', '.join(names)} in the instruction {instruction[:60]!r}")
    return found[1].strip(), dict(zip(names, (text.strip() for text in found.groups()[1:]), strict=True))


def labels(record: Record) -> Question:
    """Which answer would be written: "the correct answer is ..." with each option's name, as in the training sets."""
    _, options = parse(field(record, "instruction"))
    names = tuple(options)
    return Question((), tuple(f"the correct answer is {name}" for name in names), names, _gold(record, names))


def _gold(record: Record, names: tuple[str, ...]) -> int:
    answer = field(record, "answer")
    if answer not in names:
        raise SboraxError(f"the answer {answer!r} is none of {', '.join(names)}")
    return names.index(answer)


def cloze(pattern: str) -> Callable[[Record], Question]:
    """A function that asks with `pattern` around the question, each option's text being a continuation."""

    def ask(record: Record) -> Question:
        question, options = parse(field(record, "instruction"))
        return asked(pattern.format(question=question), list(options.values()), _gold(record, tuple(options)))

    return ask


def yes_no(record: Record) -> Question:
    """BoolQ without its passage, which LLM-Adapters leave out: " no" or " yes"."""
    question, options = parse(field(record, "instruction"))
    return asked(f"Question: {question}\nAnswer:", ("no", "yes"), int(field(record, "answer") == list(options)[0]))


def blank(record: Record) -> Question:
    """WinoGrande: the rest of the sentence after either option in the blank's place."""
    sentence, options = parse(field(record, "instruction"))
    before, mark, after = sentence.partition("_")
    if not mark:
        raise SboraxError(f"no blank in the sentence {sentence[:60]!r}")
    rest = f" {after.strip()}"
    prompts = tuple(before + option for option in options.values())
    return Question(prompts, (rest,) * len(prompts), tuple(options.values()), _gold(record, tuple(options)))
