"""Tasks scored by the likelihood of options."""

import dataclasses
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from sborax.adapters.core import SboraxError
from sborax.data.template import prompt_of, takes_special
from sborax.evaluate.scorer import Pair, Scored, Scorer
from sborax.evaluate.task import AbstractTask, Measured, Metric, Record, cut_remark, mean, of_whole, records


class Question(NamedTuple):
    """prompts: one for all options, or one for each. options: what follows the prompt. gold: which is right.

    names: the options without what joins them to the prompt; their length in characters norms `acc_norm`.
    """

    prompts: tuple[str, ...]
    options: tuple[str, ...]
    names: tuple[str, ...]
    gold: int


def asked(prompt: str, names: Sequence[str], gold: int) -> Question:
    """A question whose options follow a space."""
    return Question((prompt,), tuple(f" {name}" for name in names), tuple(names), gold)


def choose(scored: Sequence[Scored], names: Sequence[str]) -> tuple[int, int]:
    """The likeliest option, and the likeliest for its length in characters."""
    logprobs = np.array([one.logprob for one in scored])
    return int(np.argmax(logprobs)), int(np.argmax(logprobs / [max(len(name), 1) for name in names]))


def f1(items: Sequence[tuple[int, int]]) -> float:
    """2 TP / (2 TP + FP + FN) of label 1, from pairs of what was chosen and what is right."""
    hits = sum(chosen == gold == 1 for chosen, gold in items)
    wrong = sum(chosen != gold for chosen, gold in items)
    return 2 * hits / (2 * hits + wrong) if hits else 0.0


def mcc(items: Sequence[tuple[int, int]]) -> float:
    """Matthews' correlation of chosen and right labels, 0 where one of them never changes."""
    chosen, gold = np.array(items, np.float64).T
    if chosen.std() == 0 or gold.std() == 0:
        return 0.0
    return float(np.corrcoef(chosen, gold)[0, 1])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choice(AbstractTask):
    """The likeliest option of each question. ask: a record as a question. metrics: acc, acc_norm, f1, mcc."""

    ask: Callable[[Record], Question]
    metrics: tuple[str, ...] = ("acc",)
    rows: Callable[[str, str], Sequence[Record]] | None = None
    """Reads data that `sborax.data.source.read` would misread, from a name and a split."""

    def units(self, scorer: Scorer) -> Sequence[Record]:
        """Every record."""
        return records(self.data, self.split) if self.rows is None else self.rows(self.data, self.split)

    def measure(self, units: Sequence[Record], scorer: Scorer, seed: int) -> Measured:
        """Accuracy, plain and by length, and what else `metrics` names."""
        questions = [self._question(number, record, scorer) for number, record in enumerate(units)]
        return _measured(questions, scorer, self.metrics, self.template is None or takes_special(self.template))

    def _question(self, number: int, record: Record, scorer: Scorer) -> Question:
        try:
            if self.template is None:
                return self.ask(record)
            prompt = prompt_of(self.template, record, scorer.model.tokenizer)
            return self.ask(record)._replace(prompts=(prompt,))
        except SboraxError as error:
            raise SboraxError(f"{self.name}: record {number}: {error}") from None


def _pairs(question: Question, scorer: Scorer, special: bool) -> list[Pair]:
    prompts = question.prompts * (len(question.options) if len(question.prompts) == 1 else 1)
    return [scorer.pair(prompt, option, special) for prompt, option in zip(prompts, question.options, strict=True)]


def _measured(questions: Sequence[Question], scorer: Scorer, metrics: Sequence[str], special: bool = True) -> Measured:
    found = scorer.options([_pairs(question, scorer, special) for question in questions])
    items, chosen = [], []
    for question, scored in zip(questions, found, strict=True):
        plain, normed = choose(scored, question.names)
        chosen.append((plain, normed, question.gold))
        items.append(
            {
                "prompt": question.prompts[0] if len(question.prompts) == 1 else list(question.prompts),
                "options": list(question.options),
                "logprobs": [one.logprob for one in scored],
                "tokens": [one.tokens for one in scored],
                "chosen": plain,
                "chosen_by_length": normed,
                "gold": question.gold,
            }
        )
    known: dict[str, Callable[[], Metric]] = {
        "acc": lambda: mean([float(plain == gold) for plain, _, gold in chosen]),
        "acc_norm": lambda: mean([float(normed == gold) for _, normed, gold in chosen]),
        "f1": lambda: of_whole([(plain, gold) for plain, _, gold in chosen], f1),
        "mcc": lambda: of_whole([(plain, gold) for plain, _, gold in chosen], mcc),
    }
    remarks = cut_remark([max(one.cut for one in scored) for scored in found])
    return Measured({name: known[name]() for name in metrics}, items, remarks)


LETTERS = "ABCD"


def mmlu_item(record: Record, answered: bool) -> str:
    """A question with its lettered choices, as the authors of MMLU print it."""
    lines = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, record["choices"], strict=True)]
    text = "\n".join([record["question"], *lines, "Answer:"])
    return f"{text} {LETTERS[record['answer']]}\n\n" if answered else text


def mmlu_prompt(record: Record, shots: Sequence[Record]) -> str:
    """Some answered questions of the subject, then the question. The two blanks before the subject are the authors'."""
    subject = "".join(f" {word}" for word in record["subject"].split("_"))
    head = f"The following are multiple choice questions (with answers) about {subject}.\n\n"
    return head + "".join(mmlu_item(shot, True) for shot in shots) + mmlu_item(record, False)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mmlu(AbstractTask):
    """The likeliest of four letters after answered questions of the subject; the mean over subjects.

    shots_split, shots: where they are from, and how many: as many as fit the context.
    """

    shots_split: str = "dev"
    shots: int = 5

    def measure(self, units: Sequence[Record], scorer: Scorer, seed: int) -> Measured:
        """Accuracy as a mean over subjects, and over items."""
        known: dict[str, list[Record]] = defaultdict(list)
        for shot in records(self.data, self.shots_split):
            known[shot["subject"]].append(shot)
        missing = next((one["subject"] for one in units if one["subject"] not in known), None)
        if missing is not None:
            raise SboraxError(f"{self.name}: split {self.shots_split!r} of {self.data} has no subject {missing!r}")
        questions, fewer = [], 0
        for record in units:
            prompt, shots = self._fitting(record, known[record["subject"]], scorer)
            fewer += shots < min(self.shots, len(known[record["subject"]]))
            questions.append(asked(prompt, LETTERS, record["answer"]))
        done = _measured(questions, scorer, ("acc",))
        right: dict[str, list[float]] = defaultdict(list)
        for record, item in zip(units, done.items, strict=True):
            right[record["subject"]].append(float(item["chosen"] == item["gold"]))
        items = [{"subject": record["subject"], **item} for record, item in zip(units, done.items, strict=True)]
        remarks = (f"{fewer:,} of {len(units):,} prompts hold fewer shots, to fit the context",)
        each = {f"acc of {subject}": mean(values) for subject, values in sorted(right.items())}
        metrics = {"acc over subjects": _macro(list(right.values())), "acc": done.metrics["acc"], **each}
        return Measured(metrics, items, done.remarks + (remarks if fewer else ()))

    def _fitting(self, record: Record, known: Sequence[Record], scorer: Scorer) -> tuple[str, int]:
        for shots in range(min(self.shots, len(known)), 0, -1):
            prompt = mmlu_prompt(record, known[:shots])
            if len(scorer.encode(prompt)) <= scorer.model.config.context:
                return prompt, shots
        return mmlu_prompt(record, ()), 0


def _macro(groups: Sequence[Sequence[float]]) -> Metric:
    """The mean of the means of groups; its error is that of the items in each, not that of a choice of groups."""
    each = [mean(group) for group in groups]
    known: list[Any] = [one.stderr for one in each if one.stderr is not None]
    error = math.sqrt(sum(one**2 for one in known)) / len(each) if len(known) == len(each) else None
    return Metric(float(np.mean([one.value for one in each])), error)
