"""Samples as text: a list of pieces, each either prompt or answer."""

import abc
import string
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import jinja2

from sborax.classes import find_class, instance, is_known, load_plugins
from sborax.core import SboraxError
from sborax.data.clock import within
from sborax.documents import shown

ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
"""Stanford Alpaca's prompts."""
ANSWER = "Yes, indeed."
"""What an assistant might say, to see what a chat template puts after it."""
SECONDS = 3.0
"""Of one conversation in a chat template; a real one takes less than a thousandth."""
NAMES = ("alpaca", "llm_adapters", "chat", "text")


def _indented(prompt: str, after: str, line: Callable[[str], bool] | None) -> str:
    first, rest = prompt.split("\n\n", 1)
    margin = " " * 16
    return f"{first}{after}\n\n{textwrap.indent(rest, margin, line)}{margin}"


LLM_ADAPTERS = _indented(ALPACA, "  ", lambda line: True)
LLM_ADAPTERS_INPUT = _indented(ALPACA_INPUT, " ", lambda line: True)
"""What LLM-Adapters (arXiv:2304.01933) train on, commonsense and arithmetic alike: the white space of `finetune.py`."""
LLM_ADAPTERS_ASKED = _indented(ALPACA, " ", None)
LLM_ADAPTERS_ASKED_INPUT = _indented(ALPACA_INPUT, "", None)
"""What their models are asked: that of `evaluate.py` and `commonsense_evaluate.py`, which is not quite the same."""


class Piece(NamedTuple):
    """A stretch of text, and whether the model is to learn to write it."""

    text: str
    answer: bool


class Rendered(NamedTuple):
    """A sample as text. `special` says whether the tokenizer adds its own special tokens and the end of the text."""

    pieces: list[Piece]
    special: bool = True


class AbstractTemplate(abc.ABC):
    """A template of your own. A class that extends it is one by its name, wherever a template is asked for."""

    special: ClassVar[bool] = True
    """Whether the tokenizer adds its own special tokens and the end of the text."""

    @abc.abstractmethod
    def pieces(self, record: Mapping[str, Any], tokenizer: Any) -> list[Piece]:
        """A record as text, the last answer included. Raises SboraxError for a record without what it needs."""

    def prompt(self, record: Mapping[str, Any], tokenizer: Any) -> str:
        """What a model is given to answer: what comes before the last answer."""
        pieces = self.pieces(record, tokenizer)
        last = max((number for number, piece in enumerate(pieces) if piece.answer), default=len(pieces))
        return "".join(piece.text for piece in pieces[:last])


def template_of(name: str) -> AbstractTemplate | None:
    """The template that a class of the user's is, None for a name of `NAMES` and for a text with columns in braces.

    Raises SboraxError for any other name.
    """
    if name in NAMES or "{" in name:
        return None
    if is_known(AbstractTemplate, name) or (load_plugins() and is_known(AbstractTemplate, name)):
        return instance(find_class(AbstractTemplate, name, "data.template"))
    raise SboraxError(
        f"data.template: {name!r} is not one of {', '.join(NAMES)}, names no {{column}}, and is no class that is "
        "imported and extends AbstractTemplate"
    )


def takes_special(name: str) -> bool:
    """Whether the tokenizer adds its special tokens to a text of this template. Raises SboraxError as `template_of`."""
    own = template_of(name)
    return name != "chat" if own is None else own.special


def render(template: str, answer: str, record: Mapping[str, Any], tokenizer: Any) -> Rendered:
    """One record through a template (see `Data.template`).

    Raises SboraxError for a missing column and for a template that is not known or does not fit the tokenizer.
    """
    if template == "chat":
        return Rendered(_chat(_messages(record), tokenizer), special=False)
    if template == "text":
        return Rendered([Piece(_fill("{text}", record), True)])
    if template == "alpaca":
        prompt = ALPACA_INPUT if record.get("input") else ALPACA
        return Rendered([Piece(_fill(prompt, record), False), Piece(_fill("{output}", record), True)])
    if template == "llm_adapters":
        prompt = LLM_ADAPTERS_INPUT if record.get("input") else LLM_ADAPTERS
        return Rendered([Piece(_fill(prompt, record), False), Piece(_fill("{output}", record), True)])
    own = template_of(template)
    if own is not None:
        return Rendered(own.pieces(record, tokenizer), own.special)
    return Rendered([Piece(_fill(template, record), False), Piece(_fill(answer, record), True)])


def prompt_of(template: str, record: Mapping[str, Any], tokenizer: Any) -> str:
    """The text that a model is given to answer: the pieces before the last answer.

    Raises SboraxError as `render` does.
    """
    if template == "chat":
        messages = _messages(record)
        asked = messages[:-1] if messages[-1]["role"] == "assistant" else messages
        return _apply(tokenizer, asked, generate=True)
    if template == "alpaca":
        return _fill(ALPACA_INPUT if record.get("input") else ALPACA, record)
    if template == "llm_adapters":
        return _fill(LLM_ADAPTERS_ASKED_INPUT if record.get("input") else LLM_ADAPTERS_ASKED, record)
    own = template_of(template)
    if own is not None:
        return own.prompt(record, tokenizer)
    return _fill("{text}" if template == "text" else template, record)


def _fill(pattern: str, record: Mapping[str, Any]) -> str:
    try:
        stretches = list(string.Formatter().parse(pattern))
    except ValueError as error:
        raise SboraxError(f"data.template: {pattern!r} is not a format string ({error})") from None
    text = []
    for literal, name, form, conversion in stretches:
        text.append(literal)
        if name is None:
            continue
        # A form could ask for a text of any length.
        if form or conversion:
            raise SboraxError(f"data.template: {pattern!r}: nothing but a column's name belongs into braces")
        if name not in record:
            raise SboraxError(f"there is no column {name!r}; the columns are {', '.join(record)}")
        _check_text(f"column {name!r}", record[name])
        text.append("" if record[name] is None else str(record[name]))
    return "".join(text)


def _check_text(what: str, value: Any) -> None:
    if value is not None and not isinstance(value, (str, int, float)):
        raise SboraxError(f"{what} holds a {type(value).__name__}, where text belongs")


def _messages(record: Mapping[str, Any]) -> list[dict[str, str]]:
    """Turns as `{"role", "content"}`, from `messages` or from an instruction with its output."""
    if "messages" in record:
        turns = record["messages"]
        wrong = not isinstance(turns, Sequence) or not turns
        if wrong or not all(isinstance(turn, Mapping) and {"role", "content"} <= turn.keys() for turn in turns):
            raise SboraxError('column "messages" must be a list of {"role": ..., "content": ...}')
        for turn in turns:
            _check_text("the content of a message", turn["content"])
            if not isinstance(turn["role"], str):
                raise SboraxError(f"the role of a message is text, not {shown(turn['role'])}")
        return [{"role": turn["role"], "content": turn["content"]} for turn in turns]
    for asked, said in (("instruction", "output"), ("prompt", "completion"), ("question", "answer")):
        if asked in record and said in record:
            for name in (asked, said):
                _check_text(f"column {name!r}", record[name])
            more = f"\n{record['input']}" if record.get("input") else ""
            return [
                {"role": "user", "content": f"{record[asked]}{more}"},
                {"role": "assistant", "content": str(record[said])},
            ]
    raise SboraxError(
        f"a chat needs column 'messages' (or instruction and output); the columns are {', '.join(record)}"
    )


def _apply(tokenizer: Any, messages: Sequence[Mapping[str, str]], *, generate: bool) -> str:
    if not tokenizer.chat_template:
        raise SboraxError("data.template: this model's tokenizer has no chat template; use another template")
    try:
        with within(SECONDS):
            return tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=generate)
    except Exception as failure:  # a template is a program, out of whose sandbox any error may come
        reason = str(failure).partition("\n")[0]
        # What a template raises itself; jinja's own errors are of classes below.
        if type(failure) is jinja2.TemplateError:
            raise SboraxError(
                f"data.template: the chat template refuses this conversation ({reason}); where it has no system role, "
                "put that text at the head of the first user turn"
            ) from None
        raise SboraxError(f"data.template: the tokenizer's chat template failed ({reason})") from failure


def chat_ends(tokenizer: Any) -> list[int]:
    """The tokens that end a turn: the tokenizer's own, and the mark that its chat template puts after an answer.

    Raises SboraxError if there is no chat template.
    """
    turns = [{"role": "user", "content": "Well?"}, {"role": "assistant", "content": ANSWER}]
    after = _apply(tokenizer, turns, generate=False).rpartition(ANSWER)[2]
    mark = tokenizer(after, add_special_tokens=False)["input_ids"][:1]
    own = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return [*own, *(token for token in mark if token in tokenizer.added_tokens_decoder and token not in own)]


def _chat(messages: Sequence[Mapping[str, str]], tokenizer: Any) -> list[Piece]:
    """The rendered conversation, cut so that what the assistant writes, its end mark included, is answer."""
    whole = _apply(tokenizer, messages, generate=False)
    pieces, done = [], 0
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = _apply(tokenizer, messages[:turn], generate=True)
        after = _apply(tokenizer, messages[: turn + 1], generate=False)
        if not whole.startswith(before) or not whole.startswith(after):
            raise SboraxError(
                "data.template: this chat template rewrites earlier turns; loss on answers is not defined: give "
                "conversations of one answer"
            )
        # A line break after the end mark belongs to the template, not to the answer.
        end = len(after.rstrip("\n")) if after.endswith("\n") else len(after)
        pieces += [Piece(whole[done : len(before)], False), Piece(whole[len(before) : end], True)]
        done = end
    return [*pieces, Piece(whole[done:], False)]
