"""Tasks scored by an answer that is extracted from generated text."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from sborax.adapters.core import SboraxError
from sborax.data.template import answer_ends, prompt_of, takes_special
from sborax.evaluate.scorer import Scorer
from sborax.evaluate.task import AbstractTask, Measured, Record, cut_remark, mean
from sborax.models.tokenizer import text_of, until


def texts(
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    stop: Sequence[str],
    scorer: Scorer,
    beams: int = 1,
    eos: Sequence[int] | None = None,
) -> list[str]:
    """The text generated after each prompt, without special tokens, up to the first of the `stop` strings.

    - eos: as `Scorer.write` takes it.
    """
    generated = scorer.write(prompts, new_tokens, beams=beams, stop=stop, eos=eos)
    return [until(text_of(scorer.model.tokenizer, tokens), stop) for tokens in generated]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Written(AbstractTask):
    """Scores the share of generated answers that are right.

    - new_tokens: the most tokens of a text.
    - beams: of the search; 1 for greedy text.
    - stop: strings that end a text.
    - extract: the answer in a text; "" or None if there is none.
    - right: whether an answer is the record's.
    """

    new_tokens: int
    beams: int = 1
    stop: tuple[str, ...] = ()
    extract: Callable[[str], Any]
    right: Callable[[Any, Record], bool]

    def measure(self, units: Sequence[Record], scorer: Scorer, seed: int) -> Measured:
        """The accuracy, and the share of texts that contain an answer."""
        prompts = [self._prompt(number, record, scorer) for number, record in enumerate(units)]
        ids = [self._ids(prompt, scorer) for prompt in prompts]
        items, ends = [], answer_ends(self.template, scorer.model)
        generated = texts(ids, self.new_tokens, self.stop, scorer, self.beams, ends)
        for prompt, text, record in zip(prompts, generated, units, strict=True):
            answer = self.extract(text)
            right = self.right(answer, record)
            items.append({"prompt": prompt, "text": text, "answer": answer, "gold": record["answer"], "right": right})
        room = scorer.model.config.context - self.new_tokens
        metrics = {
            "acc": mean([float(item["right"]) for item in items]),
            "answered": mean([float(item["answer"] not in ("", None)) for item in items]),
        }
        return Measured(metrics, items, cut_remark([max(0, len(prompt) - room) for prompt in ids]))

    def _prompt(self, number: int, record: Record, scorer: Scorer) -> str:
        assert self.template is not None
        try:
            return prompt_of(self.template, record, scorer.model.tokenizer)
        except SboraxError as error:
            raise SboraxError(f"{self.name}: record {number}: {error}") from None

    def _ids(self, prompt: str, scorer: Scorer) -> list[int]:
        return scorer.encode(prompt, special=self.template is None or takes_special(self.template))
