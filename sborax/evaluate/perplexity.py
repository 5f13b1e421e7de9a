"""Perplexity over windows of a text."""

import dataclasses
import math
from collections.abc import Sequence

from sborax.adapters.core import SboraxError
from sborax.evaluate.scorer import Pair, Scorer
from sborax.evaluate.task import AbstractTask, Measured, Metric, Record, field, mean, records


def windows(tokens: Sequence[int], size: int) -> list[Pair]:
    """Consecutive windows of `size` tokens. A shorter rest is dropped; the first token of each is not predicted.

    Raises SboraxError for a size below 2, and for a text that fills no window.
    """
    if size < 2:
        raise SboraxError(f"a window of {size} tokens predicts none; use 2 or more")
    starts = range(0, len(tokens) - size + 1, size)
    if not starts:
        raise SboraxError(f"a text of {len(tokens)} tokens does not fill a window of {size}")
    return [Pair(tokens[start : start + 1], tokens[start + 1 : start + size]) for start in starts]


def paragraphs(text: str) -> list[str]:
    """The rows of a WikiText file as `datasets` makes them: lines with their line breaks, blank ones empty."""
    return [f"{line}\n" if line.strip() else "" for line in text.removesuffix("\n").split("\n")]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Perplexity(AbstractTask):
    """Scores exp(mean loss of a token) over windows of one text.

    - window: tokens.
    - column: of the records, with the text.
    - between: what joins the records.
    """

    window: int
    column: str = "text"
    between: str = "\n\n"

    def units(self, scorer: Scorer) -> Sequence[Record]:
        """Every window of the text."""
        rows = [str(field(record, self.column)) for record in records(self.data, self.split)]
        rows = paragraphs(rows[0]) if len(rows) == 1 else rows
        text = self.between.join(rows)
        if self.window > scorer.model.config.context:
            raise SboraxError(
                f"{self.name}: windows of {self.window} tokens, the model's context has {scorer.model.config.context}"
            )
        unknown = "<unk>" in text
        pairs = windows(scorer.encode(text), self.window)
        return [{"window": i, "pair": pair, "unknown": unknown} for i, pair in enumerate(pairs)]

    def measure(self, units: Sequence[Record], scorer: Scorer, seed: int) -> Measured:
        """The perplexity; each window is an item."""
        scored = scorer.continuations([unit["pair"] for unit in units])
        loss = mean([-score.logprob / score.tokens for score in scored])
        value = math.exp(loss.value)
        error = None if loss.stderr is None else value * loss.stderr
        items = [
            {"window": unit["window"], "tokens": score.tokens, "logprob": score.logprob}
            for unit, score in zip(units, scored, strict=True)
        ]
        unknown = any(unit["unknown"] for unit in units)
        remarks = ("the text holds <unk>: it is the tokenised version, not the raw one",) if unknown else ()
        return Measured({"perplexity": Metric(value, error), "loss": loss}, items, remarks)
