"""Templates: turn a record into text, as pieces that are prompt or answer."""

import abc
import json
import math
import string
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from sborax.adapters.core import SboraxError
from sborax.config.classes import find_class, instance, is_known, load_plugins
from sborax.config.documents import shown
from sborax.data import renderer
from sborax.models.tokenizer import tokens_of

if TYPE_CHECKING:
    from sborax.models.language_model import LanguageModel

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
"""A sample answer, used to find out what a chat template writes after an answer."""
CALLS, TOOLS = "tool_calls", "tools"
"""Keys of a message and of a record that a template must not ignore: the model would learn something else."""
NAMES = ("alpaca", "llm_adapters", "chat", "text")


def _indented(prompt: str, after: str, line: Callable[[str], bool] | None) -> str:
    first, body = prompt.split("\n\n", 1)
    margin = " " * 16
    return f"{first}{after}\n\n{textwrap.indent(body, margin, line)}{margin}"


LLM_ADAPTERS = _indented(ALPACA, "  ", lambda line: True)
LLM_ADAPTERS_INPUT = _indented(ALPACA_INPUT, " ", lambda line: True)
"""LLM-Adapters' prompts in training (arXiv:2304.01933), with the white space of their `finetune.py`."""
LLM_ADAPTERS_ASKED = _indented(ALPACA, " ", None)
LLM_ADAPTERS_ASKED_INPUT = _indented(ALPACA_INPUT, "", None)
"""LLM-Adapters' prompts in evaluation: the white space of `evaluate.py` and `commonsense_evaluate.py` differs."""


class Piece(NamedTuple):
    """A piece of text, and whether it is an answer, which the model learns to write."""

    text: str
    answer: bool


class Rendered(NamedTuple):
    """A sample as text.

    - pieces: in order.
    - special: whether the tokenizer adds its special tokens, and the token that ends the text.
    """

    pieces: list[Piece]
    special: bool = True


class AbstractTemplate(abc.ABC):
    """The base of templates of your own. A class that extends it is found by its name, wherever a template is named."""

    special: ClassVar[bool] = True
    """Whether the tokenizer adds its special tokens, and the token that ends the text."""

    @abc.abstractmethod
    def pieces(self, record: Mapping[str, Any], tokenizer: Any) -> list[Piece]:
        """A record as text, with its answers. Raises SboraxError for a record that lacks a column."""

    def prompt(self, record: Mapping[str, Any], tokenizer: Any) -> str:
        """The prompt for generation: the text before the last answer."""
        pieces = self.pieces(record, tokenizer)
        last = max((number for number, piece in enumerate(pieces) if piece.answer), default=len(pieces))
        return "".join(piece.text for piece in pieces[:last])


def template_of(name: str) -> AbstractTemplate | None:
    """An instance of the user's class of that name; None for a name in `NAMES` and for a text with columns in braces.

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
    """Whether the tokenizer adds special tokens to a text of this template.

    Raises SboraxError as `template_of` does.
    """
    template = template_of(name)
    return name != "chat" if template is None else template.special


def render(template: str, answer: str, record: Mapping[str, Any], tokenizer: Any) -> Rendered:
    """A record as text with its answers.

    - template: as `Data.template`.
    - answer: as `Data.answer`.

    Raises SboraxError for a missing column, and for a template that is unknown or does not fit the tokenizer.
    """
    if template == "chat":
        return Rendered(_chat(_messages(record), _tools(record), tokenizer), special=False)
    if template == "text":
        return Rendered([Piece(_fill("{text}", record), True)])
    if template == "alpaca":
        prompt = ALPACA_INPUT if record.get("input") else ALPACA
        return Rendered([Piece(_fill(prompt, record), False), Piece(_fill("{output}", record), True)])
    if template == "llm_adapters":
        prompt = LLM_ADAPTERS_INPUT if record.get("input") else LLM_ADAPTERS
        return Rendered([Piece(_fill(prompt, record), False), Piece(_fill("{output}", record), True)])
    custom = template_of(template)
    if custom is not None:
        return Rendered(custom.pieces(record, tokenizer), custom.special)
    return Rendered([Piece(_fill(template, record), False), Piece(_fill(answer, record), True)])


def prompt_of(template: str, record: Mapping[str, Any], tokenizer: Any) -> str:
    """The prompt for generation: the text of a record before the last answer.

    Raises SboraxError as `render` does.
    """
    if template == "chat":
        messages = _messages(record)
        turns = messages[:-1] if messages[-1]["role"] == "assistant" else messages
        return apply(tokenizer, turns, _tools(record), generate=True)
    if template == "alpaca":
        return _fill(ALPACA_INPUT if record.get("input") else ALPACA, record)
    if template == "llm_adapters":
        return _fill(LLM_ADAPTERS_ASKED_INPUT if record.get("input") else LLM_ADAPTERS_ASKED, record)
    custom = template_of(template)
    if custom is not None:
        return custom.prompt(record, tokenizer)
    return _fill("{text}" if template == "text" else template, record)


def _fill(pattern: str, record: Mapping[str, Any]) -> str:
    """A format string with its columns filled in. Raises SboraxError for a missing column or one that is no text."""
    try:
        parts = list(string.Formatter().parse(pattern))
    except ValueError as error:
        raise SboraxError(f"data.template: {pattern!r} is not a format string ({error})") from None
    text = []
    for literal, name, form, conversion in parts:
        text.append(literal)
        if name is None:
            continue
        # A format specification could make a text of any length.
        if form or conversion:
            raise SboraxError(f"data.template: {pattern!r}: braces may hold only the name of a column")
        if name not in record:
            raise SboraxError(f"there is no column {name!r}; the columns are {', '.join(record)}")
        text.append(_cell(record, name))
    return "".join(text)


def _cell(record: Mapping[str, Any], name: str) -> str:
    """A column as text; null is the empty text. Raises SboraxError for a column that is no text."""
    _check_text(f"column {name!r}", record[name])
    return "" if record[name] is None else str(record[name])


def _check_text(subject: str, value: Any) -> None:
    if value is not None and not isinstance(value, (str, int, float)):
        raise SboraxError(f"{subject} holds a {type(value).__name__}, where text belongs")
    if isinstance(value, float) and not math.isfinite(value):
        raise SboraxError(f"{subject} holds {value}, where text belongs")


def _messages(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The turns of a conversation, with all their keys, from `messages` or from an instruction with its output."""
    if "messages" in record:
        value = record["messages"]
        turns: list[Any] = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else []
        if not turns or not all(isinstance(turn, Mapping) and "role" in turn for turn in turns):
            raise SboraxError('column "messages" must be a list of {"role": ..., "content": ...}')
        for number, turn in enumerate(turns):
            if not isinstance(turn["role"], str):
                raise SboraxError(f"the role of a message is text, not {shown(turn['role'])}")
            if turn.get("content") is None and not turn.get(CALLS):
                raise SboraxError(f"message {number}, of role {shown(turn['role'])}, has no content and no {CALLS}")
            _check_text("the content of a message", turn.get("content"))
        return [dict(turn) for turn in turns]
    for question, answer in (("instruction", "output"), ("prompt", "completion"), ("question", "answer")):
        if question in record and answer in record:
            input_text = f"\n{record['input']}" if record.get("input") else ""
            return [
                {"role": "user", "content": f"{_cell(record, question)}{input_text}"},
                {"role": "assistant", "content": _cell(record, answer)},
            ]
    raise SboraxError(
        f"a chat needs column 'messages' (or instruction and output); the columns are {', '.join(record)}"
    )


def _tools(record: Mapping[str, Any]) -> list[Mapping[str, Any]] | None:
    """The tools of a record's conversation, a list or the JSON of one; None if there are none."""
    tools = record.get(TOOLS) if "messages" in record else None
    if isinstance(tools, str) and tools:
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError) as error:
            raise SboraxError(f"column {TOOLS!r} is text that is not JSON ({error})") from None
    if not tools:
        return None
    if not isinstance(tools, Sequence) or not all(isinstance(tool, Mapping) for tool in tools):
        raise SboraxError(f"column {TOOLS!r} must be a list of objects, got {shown(tools)}")
    return list(tools)


def _rendered(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None,
    generate: bool,
    cuts: Sequence[tuple[int, bool]] = (),
) -> renderer.Rendered:
    if not tokenizer.chat_template:
        raise SboraxError("data.template: this model's tokenizer has no chat template; use another template")
    heeded = [CALLS] * any(message.get(CALLS) for message in messages) + [TOOLS] * (tools is not None)
    try:
        result = renderer.render(tokenizer, messages, tools, generate, cuts, heeded)
    except renderer.Failed as failure:
        if failure.refused:
            raise SboraxError(
                f"data.template: the chat template refuses this conversation ({failure}); where it has no system role, "
                "put that text at the head of the first user turn"
            ) from None
        raise SboraxError(f"data.template: the tokenizer's chat template failed ({failure})") from failure
    if result.ignored:
        raise SboraxError(
            f"data.template: the tokenizer's chat template ignores {result.ignored[0]}; use a model whose template "
            f"knows tools, or write them into the text of the messages and take {result.ignored[0]} out"
        )
    return result


def apply(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None = None,
    *,
    generate: bool,
) -> str:
    """Render a conversation with the tokenizer's chat template.

    - generate: whether to append the beginning of an answer.

    Raises SboraxError for a template that fails, or that ignores tools or tool calls.
    """
    return _rendered(tokenizer, messages, tools, generate).text


def chat_ends(tokenizer: Any) -> list[int]:
    """The tokens that end a turn: the tokenizer's end token, and the mark that its template writes after an answer.

    Raises SboraxError if there is no chat template.
    """
    turns = [{"role": "user", "content": "Well?"}, {"role": "assistant", "content": ANSWER}]
    after = apply(tokenizer, turns, generate=False).rpartition(ANSWER)[2]
    mark = tokens_of(tokenizer, after, add_special_tokens=False)["input_ids"][:1]
    ends = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return [*ends, *(token for token in mark if token in tokenizer.added_tokens_decoder and token not in ends)]


def answer_ends(template: str | None, model: "LanguageModel") -> tuple[int, ...]:
    """The tokens that end a text after a prompt of a template, or without one (None).

    These are the model's `end_tokens`; an answer of the template "chat" also ends where its turn does.
    Raises SboraxError as `chat_ends` does.
    """
    turn = chat_ends(model.tokenizer) if template == "chat" else []
    return tuple(dict.fromkeys([*model.end_tokens, *turn]))


def _says(message: Mapping[str, Any]) -> bool:
    """Whether a message has anything but its role, such as content, calls of tools or reasoning."""
    return any(value not in (None, "", [], {}) for key, value in message.items() if key != "role")


def _chat(
    messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None, tokenizer: Any
) -> list[Piece]:
    """The rendered conversation in pieces. The assistant's texts, with their end marks, are answers.

    The end mark of an empty turn does not count, since a model that learnt it would answer with nothing.
    """
    if messages[0]["role"] == "assistant":
        raise SboraxError("the first message is the assistant's; a conversation begins with another turn")
    answers = [turn for turn, message in enumerate(messages) if message["role"] == "assistant" and _says(message)]
    cuts = [cut for turn in answers for cut in ((turn, True), (turn + 1, False))]
    text, ends, _ = _rendered(tokenizer, messages, tools, False, cuts)
    pieces, position = [], 0
    for begin, end in zip(ends[::2], ends[1::2], strict=True):
        if begin is None or end is None:
            raise SboraxError(
                "data.template: this chat template rewrites earlier turns, so the loss on answers is not defined; give "
                "conversations with one answer"
            )
        # A line break after the end mark belongs to the template, not to the answer.
        stop = len(text[:end].rstrip("\n"))
        pieces += [Piece(text[position:begin], False), Piece(text[begin:stop], True)]
        position = stop
    return [*pieces, Piece(text[position:], False)]
