"""Tokenizers: the fast ones of transformers."""

import contextlib
import functools
import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

from sborax.adapters.core import SboraxError
from sborax.config.documents import check_plain, read_object, shown
from sborax.errors import is_panic

if TYPE_CHECKING:
    from transformers import BatchEncoding, PreTrainedTokenizerFast

CONFIG = "tokenizer_config.json"
ELSEWHERE = ("fast_tokenizer_files", "gguf_file", "init_inputs", "__slow_tokenizer", "tokenizer_object")
"""Keys of `tokenizer_config.json` that make transformers read another file than `tokenizer.json`."""

MOST_STEPS = 128
"""Bound of the steps of a normalizer or a decoder. Real ones have about ten."""
MOST_LETTERS = 4096
"""Bound of the letters that a normalizer or a decoder makes of one."""


def read_tokenizer(directory: Path) -> "PreTrainedTokenizerFast | None":
    """The tokenizer of a model directory with its chat template, or None if the directory has no tokenizer.

    Raises SboraxError for a tokenizer that is broken, not in `tokenizer.json`, or refers to other files.
    """
    # It takes seconds to import, which a plan of a run does not need.
    from transformers import PreTrainedTokenizerFast

    for pattern in ("*.json", "*.jinja", "additional_chat_templates/*"):
        for file in directory.glob(pattern):
            check_plain(file)
    if not (directory / "tokenizer.json").exists():
        if (directory / "tokenizer.model").exists():
            raise SboraxError(f"{directory}: only tokenizer.model; convert it to tokenizer.json with transformers")
        return None
    if (directory / CONFIG).exists():
        config = read_object(directory / CONFIG)
        if key := next((key for key in ELSEWHERE if config.get(key)), None):
            raise SboraxError(f"{directory / CONFIG}: {key} = {shown(config[key])}: only tokenizer.json is read here")
    content = read_object(directory / "tokenizer.json")
    try:
        _check_growth("normalizer", content.get("normalizer"))
        _check_growth("decoder", content.get("decoder"))
        del content
        tokenizer = PreTrainedTokenizerFast.from_pretrained(directory)
        # Some fields are checked only when they are used.
        tokens_of(tokenizer, "a", return_offsets_mapping=True)
    except BaseException as failure:  # tokenizers raises bare `Exception`, and panics, which are none
        if not isinstance(failure, Exception) and not is_panic(failure):
            raise
        raise SboraxError(f"{directory / 'tokenizer.json'}: not a readable tokenizer ({failure})") from failure
    template = tokenizer.chat_template
    templates = template if isinstance(template, dict) else {} if template is None else {"default": template}
    for name, text in templates.items():
        # Saving a tokenizer writes a file of this name.
        if not isinstance(text, str) or not re.fullmatch(r"[\w-]+", str(name)):
            raise SboraxError(f"{directory}: {shown(name)} is no chat template, or has no plain name")
    return tokenizer


def tokens_of(tokenizer: "PreTrainedTokenizerFast", text: str | list[str], **options: Any) -> "BatchEncoding":
    """The tokens of a text or several, without a warning that a text is long.

    Raises SboraxError for a text on which a pattern of the tokenizer gives up.
    """
    with _patience("a text"):
        return tokenizer(text, verbose=False, **options)


def prompt_tokens(tokenizer: "PreTrainedTokenizerFast", text: str, special: bool = True) -> list[int]:
    """The tokens of a text that something follows: with the tokenizer's special tokens before it, but none after it.

    Some tokenizers append the token that ends a text. A model would go on after it, and nothing follows it in training.

    - special: whether to add special tokens at all.

    Raises SboraxError as `tokens_of` does.
    """
    ids = list(tokens_of(tokenizer, text, add_special_tokens=special)["input_ids"])
    return ids[: len(ids) - _appended(tokenizer)] if special else ids


@functools.lru_cache(maxsize=8)
def _appended(tokenizer: "PreTrainedTokenizerFast") -> int:
    """The number of special tokens that a tokenizer puts after a text, whichever it is."""
    with_special, bare = (tokens_of(tokenizer, "a", add_special_tokens=flag)["input_ids"] for flag in (True, False))
    places = range(len(with_special) - len(bare) + 1)
    start = next((place for place in places if with_special[place : place + len(bare)] == bare), None)
    return 0 if start is None else len(with_special) - len(bare) - start


def text_of(tokenizer: "PreTrainedTokenizerFast", tokens: Sequence[int]) -> str:
    """The text of tokens, without special ones.

    Raises SboraxError for tokens on which a pattern of the tokenizer gives up.
    """
    with _patience("tokens"):
        return str(tokenizer.decode(list(tokens), skip_special_tokens=True))


@contextlib.contextmanager
def _patience(subject: str) -> Iterator[None]:
    try:
        yield
    except BaseException as failure:
        if not is_panic(failure):
            raise
        reason = str(failure).partition("\n")[0]
        raise SboraxError(
            f"the tokenizer gives up on {subject}, because a pattern in its tokenizer.json fails ({reason})"
        ) from None


def _check_growth(kind: str, described: Any) -> None:
    """Raise SboraxError for a normalizer or decoder that makes too many letters of one.

    One step replaces a letter of a text. Its replacement is in the file, so later steps are tried on that.
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
    tokenizer = Tokenizer.from_str(json.dumps(bare))
    return tokenizer.normalizer.normalize_str if kind == "normalizer" else lambda text: tokenizer.decoder.decode([text])


def check_vocabulary(tokenizer: "PreTrainedTokenizerFast", size: int, where: str) -> None:
    """Raise SboraxError for a token beyond a model's vocabulary of this size. It would mean another token there.

    An added token passes if the tokenizer does not add it by itself: some tokenizers have a padding token that their
    model does not know. Texts with such a token are refused where they are read.
    """
    special_ids = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id)
    may_be_beyond = tokenizer.added_tokens_decoder.keys() - special_ids
    for token, number in tokenizer.get_vocab().items():
        if number >= size and number not in may_be_beyond:
            raise SboraxError(
                f"{where}: the tokenizer's {shown(token)} has id {number}, vocab_size is {size:,}; do the tokenizer "
                "and the model belong together?"
            )


def until(text: str, stop: Sequence[str]) -> str:
    """A text before the first of the `stop` strings. An empty string, which the harness may give, stops nothing."""
    return text[: min((text.index(mark) for mark in stop if mark and mark in text), default=len(text))]


def finished(
    tokenizer: "PreTrainedTokenizerFast", stop: Sequence[str]
) -> Callable[[list[list[int]]], list[bool]] | None:
    """A function that says which texts, given as tokens, hold one of the `stop` strings; None if there are none."""

    def holds(texts: list[list[int]]) -> list[bool]:
        decoded = [text_of(tokenizer, text) for text in texts]
        return [until(text, stop) != text for text in decoded]

    return holds if stop else None
