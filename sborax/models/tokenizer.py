"""Tokenizers, as the fast ones of transformers."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from sborax.core import SboraxError
from sborax.documents import read_object, shown

ABOUT = "tokenizer_config.json"
ELSEWHERE = ("fast_tokenizer_files", "gguf_file", "init_inputs", "__slow_tokenizer", "tokenizer_object")
"""Keys of `tokenizer_config.json` by which transformers would read another file than `tokenizer.json`."""


def read_tokenizer(directory: Path) -> PreTrainedTokenizerFast | None:
    """The tokenizer of a model directory with its chat template, or None if the directory has no tokenizer.

    Raises SboraxError for a broken one, for one that is not in `tokenizer.json`, and for one that points elsewhere.
    """
    if not (directory / "tokenizer.json").exists():
        if (directory / "tokenizer.model").exists():
            raise SboraxError(f"{directory}: only tokenizer.model; convert it to tokenizer.json with transformers")
        return None
    if (directory / ABOUT).exists():
        about = read_object(directory / ABOUT)
        if named := next((key for key in ELSEWHERE if about.get(key)), None):
            raise SboraxError(f"{directory / ABOUT}: {named} = {shown(about[named])}: only tokenizer.json is read here")
    try:
        found = PreTrainedTokenizerFast.from_pretrained(directory)
        # Some fields are not looked at before they are used.
        found("a", return_offsets_mapping=True)
    except Exception as failure:  # tokenizers raises bare `Exception`
        raise SboraxError(f"{directory / 'tokenizer.json'}: not a readable tokenizer ({failure})") from failure
    given = found.chat_template
    templates = given if isinstance(given, dict) else {} if given is None else {"default": given}
    for name, text in templates.items():
        # Saving a tokenizer makes a file of each name.
        if not isinstance(text, str) or not re.fullmatch(r"[\w-]+", str(name)):
            raise SboraxError(f"{directory}: {shown(name)} is no chat template, or has no plain name")
    return found


def until(text: str, stop: Sequence[str]) -> str:
    """A text up to the first of the `stop` strings, which is left out. An empty one, as the harness has it, is none."""
    return text[: min((text.index(mark) for mark in stop if mark and mark in text), default=len(text))]


def finished(tokenizer: PreTrainedTokenizerFast, stop: Sequence[str]) -> Callable[[list[list[int]]], list[bool]] | None:
    """Which texts, given as their tokens, hold one of the `stop` strings; None if there are no such strings."""

    def holds(texts: list[list[int]]) -> list[bool]:
        decoded = tokenizer.batch_decode(texts, skip_special_tokens=True)
        return [until(text, stop) != text for text in decoded]

    return holds if stop else None
