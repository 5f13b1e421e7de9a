"""`sborax generate`: texts after prompts, and a conversation over standard input."""

import argparse
import dataclasses
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from sborax.adapters.core import SboraxError
from sborax.cli.layout import read_mesh
from sborax.cli.several import labels, load_several, say_batches
from sborax.cli.targets import Target, load_target
from sborax.config.classes import is_known
from sborax.config.terminal import print_text, say
from sborax.data.template import NAMES, AbstractTemplate, answer_ends, prompt_of, takes_special
from sborax.layout.mesh import make_mesh
from sborax.layout.sharding import Layout
from sborax.models import generate as write
from sborax.models.by_row import generate_by_row
from sborax.models.tokenizer import finished, prompt_tokens, text_of, tokens_of, until


def generate(arguments: argparse.Namespace) -> None:
    """`sborax generate --prompt`."""
    target, tokenizer = _load(arguments)
    prompts = [encode(prompt, arguments.template, tokenizer) for prompt in arguments.prompt]
    key, stopped = jax.random.key(arguments.seed), finished(tokenizer, arguments.stop)
    ends = answer_ends(arguments.template, target.model)
    _print_texts(
        prompts, _write(target, prompts, arguments.max_new_tokens, ends, key, stopped, arguments), tokenizer, arguments
    )


def generate_several(arguments: argparse.Namespace) -> None:
    """`sborax generate --prompt` with several runs: the texts of each, after its name, in the order of the targets."""
    targets = load_several(arguments.targets)
    model = targets[0].model
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise SboraxError(f"{arguments.target}: has no tokenizer.json, so text cannot become tokens")
    prompts = [encode(prompt, arguments.template, tokenizer) for prompt in arguments.prompt]
    say_batches(arguments.targets, targets)
    outputs = generate_by_row(
        model,
        [target.params for target in targets],
        [target.adapters for target in targets],
        prompts * len(targets),
        [number for number in range(len(targets)) for _ in prompts],
        arguments.max_new_tokens,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        key=jax.random.key(arguments.seed),
        eos=answer_ends(arguments.template, model),
        finished=finished(tokenizer, arguments.stop),
    )
    for number, name in enumerate(labels(arguments.targets)):
        say(f"{name}:")
        _print_texts(prompts, outputs[number * len(prompts) : (number + 1) * len(prompts)], tokenizer, arguments)


def _print_texts(
    prompts: Sequence[list[int]], outputs: Sequence[list[int]], tokenizer: Any, arguments: argparse.Namespace
) -> None:
    for prompt, new in zip(prompts, outputs, strict=True):
        # A wrapped prompt is not printed.
        printed = [] if arguments.template else prompt
        start = len(text_of(tokenizer, printed))
        text = text_of(tokenizer, [*printed, *new])
        print_text(f"{text[:start]}{until(text[start:], arguments.stop)}\n")


def encode(prompt: str, template: str | None, tokenizer: Any) -> list[int]:
    """Token ids of a prompt, through a template if one is given.

    Raises SboraxError for a template that does not fit the tokenizer.
    """
    if template is None:
        return prompt_tokens(tokenizer, prompt)
    if template not in NAMES and "{instruction}" not in template and not is_known(AbstractTemplate, template):
        raise SboraxError(f"--template {template!r}: is not one of {', '.join(NAMES)} and has no {{instruction}} in it")
    text = prompt_of(template, {"instruction": prompt, "input": "", "output": "", "text": prompt}, tokenizer)
    return prompt_tokens(tokenizer, text, takes_special(template))


def chat(arguments: argparse.Namespace) -> None:
    """`sborax generate --chat`: answer every line of standard input as a turn of one conversation."""
    target, tokenizer = _load(arguments)
    if not tokenizer.chat_template:
        raise SboraxError(
            f"{arguments.target}: its tokenizer has no chat template; use --prompt and --template instead"
        )
    ends, key = answer_ends("chat", target.model), jax.random.key(arguments.seed)
    system = [] if arguments.system is None else [{"role": "system", "content": arguments.system}]
    turns: list[dict[str, str]] = []
    for number, line in enumerate(_lines()):
        turns.append({"role": "user", "content": line})
        ids, dropped = _fitted(system, turns, arguments.max_new_tokens, target, tokenizer)
        if dropped:
            say(f"the context is full: {dropped} earlier turns are forgotten", file=sys.stderr)
        turns = turns[dropped:]
        room = min(arguments.max_new_tokens, target.model.config.context - len(ids))
        printer = AnswerPrinter(tokenizer, arguments.stop)
        (new,) = _write(target, [ids], room, ends, jax.random.fold_in(key, number), printer, arguments)
        answer = until(text_of(tokenizer, new), arguments.stop)
        print_text(f"{answer[printer.length :]}\n")
        turns.append({"role": "assistant", "content": answer})


class AnswerPrinter:
    """Prints an answer while it is generated, up to the last word that later tokens cannot change.

    - length: letters printed so far.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str]) -> None:
        self.length, self._tokenizer, self._stop = 0, tokenizer, stop

    def __call__(self, texts: list[list[int]]) -> list[bool]:
        """Print what is certain of the only text; whether it contains a stop string."""
        text = text_of(self._tokenizer, texts[0])
        # The last word may be incomplete, and the end of the text may begin a stop string.
        certain = max(0, len(text) - max(map(len, self._stop), default=0))
        answer = until(text, self._stop)
        length = max(self.length, answer.rfind(" ", 0, certain))
        print_text(text[self.length : length])
        self.length = length
        return [answer != text]


def _lines() -> Iterator[str]:
    """The lines of standard input, without empty ones."""
    while True:
        if sys.stdin.isatty():
            say("> ", end="", file=sys.stderr)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.rstrip("\n")


def _fitted(
    system: list[dict[str, str]], turns: list[dict[str, str]], new: int, target: Target, tokenizer: Any
) -> tuple[list[int], int]:
    """The conversation as tokens, and how many of its earliest turns were dropped so that an answer fits.

    - new: tokens of the answer.

    Raises SboraxError if the last turn alone is too long.
    """
    context, dropped = target.model.config.context, 0
    while True:
        text = prompt_of("chat", {"messages": [*system, *turns[dropped:]]}, tokenizer)
        # The template writes the tokens that begin a text.
        ids = tokens_of(tokenizer, text, add_special_tokens=False)["input_ids"]
        alone = dropped == len(turns) - 1
        if len(ids) + new <= context or (alone and len(ids) < context):
            return ids, dropped
        if alone:
            raise SboraxError(f"a turn of {len(ids)} tokens does not fit the context of {context}")
        dropped += 2


def _load(arguments: argparse.Namespace) -> tuple[Target, Any]:
    layout = _layout(arguments)
    target = load_target(arguments.target, arguments.adapter)
    if target.model.tokenizer is None:
        raise SboraxError(f"{arguments.target}: has no tokenizer.json, so text cannot become tokens")
    params, adapters = layout.model(target.params, target.adapters, target.model.config)
    return dataclasses.replace(target, params=params, adapters=adapters), target.model.tokenizer


def _layout(arguments: argparse.Namespace) -> Layout:
    sizes = read_mesh([] if arguments.mesh is None else [arguments.mesh])
    return Layout(make_mesh(sizes) if sizes else None)


def _write(
    target: Target,
    prompts: list[list[int]],
    new: int,
    ends: Sequence[int],
    key: Any,
    stopped: Callable[[list[list[int]]], Sequence[bool]] | None,
    arguments: argparse.Namespace,
) -> list[list[int]]:
    with _layout(arguments).context():
        return write(
            target.model,
            target.params,
            target.adapters,
            prompts,
            new,
            temperature=arguments.temperature,
            top_k=arguments.top_k,
            top_p=arguments.top_p,
            key=key,
            eos=ends,
            finished=stopped,
        )
