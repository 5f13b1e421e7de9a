"""Tokenizers, as the fast ones of transformers."""

import contextlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import BatchEncoding, PreTrainedTokenizerFast

from sborax.adapters.core import SboraxError
from sborax.config.documents import check_plain, read_object, shown
from sborax.errors import is_panic

ABOUT = "tokenizer_config.json"
ELSEWHERE = ("fast_tokenizer_files", "gguf_file", "init_inputs", "__slow_tokenizer", "tokenizer_object")
"""Keys of `tokenizer_config.json` by which transformers would read another file than `tokenizer.json`."""

MOST_STEPS = 128
"""Of a normalizer or a decoder; real ones have some ten."""
MOST_LETTERS = 4096
"""What a normalizer or a decoder may make of one letter."""


def read_tokenizer(directory: Path) -> PreTrainedTokenizerFast | None:
    """The tokenizer of a model directory with its chat template, or None if the directory has no tokenizer.

    Raises SboraxError for a broken one, for one that is not in `tokenizer.json`, and for one that points elsewhere.
    """
    for pattern in ("*.json", "*.jinja", "additional_chat_templates/*"):
        for file in directory.glob(pattern):
            check_plain(file)
    if not (directory / "tokenizer.json").exists():
        if (directory / "tokenizer.model").exists():
            raise SboraxError(f"{directory}: only tokenizer.model; convert it to tokenizer.json with transformers")
        return None
    if (directory / ABOUT).exists():
        about = read_object(directory / ABOUT)
        if named := next((key for key in ELSEWHERE if about.get(key)), None):
            raise SboraxError(f"{directory / ABOUT}: {named} = {shown(about[named])}: only tokenizer.json is read here")
    whole = read_object(directory / "tokenizer.json")
    try:
        _check_growth("normalizer", whole.get("normalizer"))
        _check_growth("decoder", whole.get("decoder"))
        del whole
        found = PreTrainedTokenizerFast.from_pretrained(directory)
        # Some fields are not looked at before they are used.
        tokens_of(found, "a", return_offsets_mapping=True)
    except BaseException as failure:  # tokenizers raises bare `Exception`, and less
        if not isinstance(failure, Exception) and not is_panic(failure):
            raise
        raise SboraxError(f"{directory / 'tokenizer.json'}: not a readable tokenizer ({failure})") from failure
    given = found.chat_template
    templates = given if isinstance(given, dict) else {} if given is None else {"default": given}
    for name, text in templates.items():
        # Saving a tokenizer makes a file of each name.
        if not isinstance(text, str) or not re.fullmatch(r"[\w-]+", str(name)):
            raise SboraxError(f"{directory}: {shown(name)} is no chat template, or has no plain name")
    return found


def tokens_of(tokenizer: PreTrainedTokenizerFast, text: str | list[str], **options: Any) -> BatchEncoding:
    """What the tokenizer makes of a text or several, without a warning that a text is long.

    Raises SboraxError for a text on which a pattern of the tokenizer gives up.
    """
    with _patience("a text"):
        return tokenizer(text, verbose=False, **options)


def text_of(tokenizer: PreTrainedTokenizerFast, tokens: Sequence[int]) -> str:
    """The text of tokens, special ones left out.

    Raises SboraxError for tokens on which a pattern of the tokenizer gives up.
    """
    with _patience("tokens"):
        return str(tokenizer.decode(list(tokens), skip_special_tokens=True))


@contextlib.contextmanager
def _patience(what: str) -> Iterator[None]:
    try:
        yield
    except BaseException as failure:
        if not is_panic(failure):
            raise
        reason = str(failure).partition("\n")[0]
        raise SboraxError(
            f"the tokenizer gives up on {what}, as a pattern of its tokenizer.json does ({reason})"
        ) from None


def _check_growth(kind: str, described: Any) -> None:
    """Raise SboraxError for a normalizer or decoder whose steps make too much of one letter.

    A letter of a text is replaced by one step. What it is replaced by is in the file: later steps are tried on that.
    """
    steps = list(_steps(described))
    if len(steps) > MOST_STEPS:
        raise SboraxError(f"its {kind} has {len(steps)} steps, more than {MOST_STEPS}")
    applied = [_applied(kind, step) for step in steps]
    for place, step in enumerate(steps):
        text = next((step[key] for key in ("content", "prepend") if isinstance(step.get(key), str)), "")
        for apply in [None, *applied[place + 1 :]]:
            text = text if apply is None or not text else apply(text)
            if len(text) > MOST_LETTERS:
                raise SboraxError(f"its {kind} makes more than {MOST_LETTERS:,} letters of one")


def _steps(described: Any) -> Iterator[dict[str, Any]]:
    inner = [described]
    while inner:
        step = inner.pop(0)
        if not isinstance(step, dict):
            continue
        parts = step.get("normalizers", step.get("decoders"))
        if isinstance(parts, list):
            inner[:0] = parts
        else:
            yield step


def _applied(kind: str, step: dict[str, Any]) -> Callable[[str], str]:
    """One step as a function."""
    bare = {"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": {}, "merges": []}, kind: step}
    made = Tokenizer.from_str(json.dumps(bare))
    return made.normalizer.normalize_str if kind == "normalizer" else lambda text: made.decoder.decode([text])


def check_vocabulary(tokenizer: PreTrainedTokenizerFast, size: int, where: str) -> None:
    """Raise SboraxError for a token beyond a model's vocabulary of this size, in which it would mean another one.

    A token that was added is let pass where nothing adds it by itself: some tokenizers have a mark for padding that
    their model never knew. Whoever meets it in a text refuses that text.
    """
    used = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id)
    may_be_beyond = tokenizer.added_tokens_decoder.keys() - used
    for token, number in tokenizer.get_vocab().items():
        if number >= size and number not in may_be_beyond:
            raise SboraxError(
                f"{where}: the tokenizer's {shown(token)} has id {number}, vocab_size is {size:,}; are the tokenizer "
                "and the model of one make?"
            )


def until(text: str, stop: Sequence[str]) -> str:
    """A text up to the first of the `stop` strings, which is left out. An empty one, as the harness has it, is none."""
    return text[: min((text.index(mark) for mark in stop if mark and mark in text), default=len(text))]


def finished(tokenizer: PreTrainedTokenizerFast, stop: Sequence[str]) -> Callable[[list[list[int]]], list[bool]] | None:
    """Which texts, given as their tokens, hold one of the `stop` strings; None if there are no such strings."""

    def holds(texts: list[list[int]]) -> list[bool]:
        decoded = [text_of(tokenizer, text) for text in texts]
        return [until(text, stop) != text for text in decoded]

    return holds if stop else None
