"""Tokenizers, as the fast ones of transformers."""

from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from sborax.core import SboraxError


def read_tokenizer(directory: Path) -> PreTrainedTokenizerFast | None:
    """The tokenizer of a model directory with its chat template, or None if the directory has no tokenizer.

    Raises SboraxError for a broken one and for one that is not in `tokenizer.json`.
    """
    if not (directory / "tokenizer.json").exists():
        if (directory / "tokenizer.model").exists():
            raise SboraxError(f"{directory}: only tokenizer.model; convert it to tokenizer.json with transformers")
        return None
    try:
        return PreTrainedTokenizerFast.from_pretrained(directory)
    except Exception as failure:  # tokenizers raises bare `Exception`
        raise SboraxError(f"{directory / 'tokenizer.json'}: not a readable tokenizer ({failure})") from failure


def until(text: str, stop: Sequence[str]) -> str:
    """A text up to the first of the `stop` strings, which is left out."""
    return text[: min((text.index(mark) for mark in stop if mark in text), default=len(text))]
