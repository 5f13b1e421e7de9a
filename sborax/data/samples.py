"""Tokenises the records of a data set, marks the tokens that count, and reports samples that are dropped or cut."""

import dataclasses
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Int32

from sborax.adapters.core import SboraxError
from sborax.config.documents import shown
from sborax.data.options import Data
from sborax.data.source import read, where
from sborax.data.template import Rendered, render
from sborax.models.tokenizer import tokens_of

_CHUNK = 1000
"""Records that are read at once."""
_LETTERS = 1 << 19
"""The most letters that are tokenised at once, except for a longer single record. Each takes up to 450 bytes."""


@dataclasses.dataclass(frozen=True)
class Sample:
    """A sequence of tokens, and which of them enter the loss.

    - joined: whether some token holds the end of a prompt and the beginning of its answer.
    """

    tokens: Int32[np.ndarray, " length"]
    counts: Bool[np.ndarray, " length"]
    joined: bool = False


@dataclasses.dataclass(frozen=True)
class Report:
    """What became of the records that were read.

    - records: read; with `Data.limit`, only as many as were needed.
    - samples: kept.
    - too_long: longer than `Data.max_length`.
    - without_answer: dropped, since none of their tokens counts.
    - joined: kept with a token that spans prompt and answer. After the prompt alone a model begins with another one.
    - data: what was read.
    """

    records: int
    samples: int
    too_long: int
    without_answer: int
    joined: int
    data: Data

    def __str__(self) -> str:
        """One line for the user."""
        action = {"drop": "dropped", "truncate": "truncated", "split": "split into windows"}[self.data.overlong]
        parts = [f"{self.samples:,} samples of {self.records:,} records", f"{self.too_long:,} too long ({action})"]
        if self.without_answer:
            parts.append(f"{self.without_answer:,} without an answer (dropped)")
        if self.joined:
            is_movable = self.data.template.endswith(" ")
            advice = " (move the space from the end of the template to the beginning of answer)" if is_movable else ""
            parts.append(f"{self.joined:,} with a token that spans prompt and answer{advice}")
        return ", ".join(parts)


def load_samples(data: Data, tokenizer: Any, end: int | None, context: int) -> tuple[list[Sample], Report]:
    """The samples of a data set, in its order.

    - end: the token that ends a text, or None.
    - context: the model's, in tokens.

    Raises SboraxError for unusable data, and if no sample is left.
    """
    if tokenizer is None:
        raise SboraxError("this model has no tokenizer.json beside it; put one into its directory")
    if data.max_length > context:
        raise SboraxError(f"data.max_length: {data.max_length} is more than the model's context of {context} tokens")
    records = read(data.name, data.split)
    samples: list[Sample] = []
    start = count = too_long = without_answer = joined = 0
    limit = sys.maxsize if data.limit is None else data.limit
    while start < len(records) and len(samples) < limit:
        # Records beyond the last sample that is needed are not read.
        stop = min(start + _CHUNK, start + limit - len(samples), len(records))
        chunk, first, start = [records[index] for index in range(start, stop)], start, stop
        for sample in _tokenise(chunk, first, data, tokenizer, end):
            if len(samples) >= limit:
                break
            count += 1
            fitting = [sample]
            if len(sample.tokens) > data.max_length:
                too_long += 1
                fitting = _shorten(sample, data)
            # The first token is never predicted.
            answered = [part for part in fitting if part.counts[1:].any()]
            without_answer += not answered and bool(fitting)
            joined += sample.joined and bool(answered)
            samples += answered
    if not samples:
        raise SboraxError(
            f"{data.label()}: no sample is left of {count}: {too_long} are longer than data.max_length = "
            f"{data.max_length} tokens, {without_answer} have no answer; raise data.max_length or set data.overlong"
        )
    samples = samples[:limit]
    return samples, Report(count, len(samples), too_long, without_answer, joined, data)


def check_ids(name: str, samples: Sequence[Sample], tokenizer: Any, vocabulary: int) -> None:
    """Raise SboraxError for a token outside the model's vocabulary, which an embedding would silently replace."""
    for number, sample in enumerate(samples):
        outside = sample.tokens[(sample.tokens < 0) | (sample.tokens >= vocabulary)]
        if outside.size:
            raise SboraxError(
                f"{name}: sample {number} has token {outside[0]} ({shown(tokenizer.decode([outside[0]]))}), the model "
                f"has only {vocabulary:,} tokens; take that text out of the data, or use this model's own tokenizer"
            )


def _shorten(sample: Sample, data: Data) -> list[Sample]:
    if data.overlong == "drop":
        return []
    if data.overlong == "truncate":
        return [Sample(sample.tokens[: data.max_length], sample.counts[: data.max_length])]
    # Windows share one token, since the first of a window is never predicted.
    starts = range(0, len(sample.tokens) - 1, data.max_length - 1)
    cuts = [slice(start, start + data.max_length) for start in starts]
    return [Sample(sample.tokens[cut], sample.counts[cut]) for cut in cuts]


def _tokenise(
    records: Sequence[Mapping[str, Any]], start: int, data: Data, tokenizer: Any, end: int | None
) -> Iterator[Sample]:
    """A sample for each record. Few enough are tokenised at once that the memory for it is bounded."""
    group, letters = [], 0
    for number, record in enumerate(records, start=start):
        try:
            rendered = render(data.template, data.answer, record, tokenizer)
            text = "".join(piece.text for piece in rendered.pieces)
            text.encode()
        except UnicodeEncodeError as error:
            raise SboraxError(f"{where(data.name, data.split, number)}: not text ({error.reason})") from None
        except SboraxError as error:
            raise SboraxError(f"{where(data.name, data.split, number)}: {error}") from None
        if letters + len(text) > _LETTERS:
            yield from _encode(group, data, tokenizer, end)
            group, letters = [], 0
        group.append((rendered, text))
        letters += len(text)
    yield from _encode(group, data, tokenizer, end)


def _encode(group: Sequence[tuple[Rendered, str]], data: Data, tokenizer: Any, end: int | None) -> Iterator[Sample]:
    if not group:
        return
    encoded = tokens_of(
        tokenizer,
        [text for _, text in group],
        add_special_tokens=group[0][0].special,
        return_offsets_mapping=True,
        return_attention_mask=False,
    )
    for (rendered, _), tokens, offsets in zip(group, encoded["input_ids"], encoded["offset_mapping"], strict=True):
        yield _mark(rendered, tokens, offsets, data.loss_on, end)


def _mark(text: Rendered, tokens: list[int], offsets: list[tuple[int, int]], loss_on: str, end: int | None) -> Sample:
    """The sample with its tokens that count. A token belongs to the piece of text in which it ends."""
    if text.special and end is not None and (not tokens or tokens[-1] != end):
        length = sum(len(piece.text) for piece in text.pieces)
        tokens, offsets = [*tokens, end], [*offsets, (length, length)]
    ids = np.asarray(tokens, np.int32)
    if loss_on == "all":
        return Sample(ids, np.ones(len(ids), bool))
    starts, ends = np.array(offsets, np.int64).reshape(-1, 2).T
    # Some tokenizers leave the white space before a word out of the offsets of the token that holds both.
    starts = np.minimum(starts, np.roll(ends, 1))
    counts = np.zeros(len(ids), bool)
    position, after_prompt, joined = 0, False, False
    for piece in (piece for piece in text.pieces if piece.text):
        after = position + len(piece.text)
        if piece.answer:
            counts |= (ends > position) & (ends <= after)
            joined |= after_prompt and bool(((starts < position) & (position < ends)).any())
        position, after_prompt = after, not piece.answer
    if text.special and end is not None and text.pieces[-1].answer and text.pieces[-1].text:
        counts[-1] = True
    return Sample(ids, counts, joined)
