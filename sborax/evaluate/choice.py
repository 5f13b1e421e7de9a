"""Tasks scored by the likelihood of options."""

import dataclasses
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from sborax.adapters.core import SboraxError
from sborax.data.source import find
from sborax.data.template import prompt_of, takes_special
from sborax.evaluate.scorer import Pair, Scored, Scorer
from sborax.evaluate.task import (
    AbstractTask,
    Measured,
    Metric,
    Record,
    check_there,
    cut_remark,
    jackknife,
    mean,
    records,
)


class Question(NamedTuple):
    """A multiple-choice question.

    - prompts: one for all options, or one for each.
    - options: the continuations of the prompt.
    - names: the options without the space that joins them to the prompt. `acc_norm` divides by their length in letters.
    - gold: the index of the right option.
    """

    prompts: tuple[str, ...]
    options: tuple[str, ...]
    names: tuple[str, ...]
    gold: int


def make_question(prompt: str, names: Sequence[str], gold: int) -> Question:
    """A question with one prompt, whose options are joined to it by a space."""
    return Question((prompt,), tuple(f" {name}" for name in names), tuple(names), gold)


def choose(scored: Sequence[Scored], names: Sequence[str]) -> tuple[int, int]:
    """The indices of the likeliest option and of the likeliest per character of its name."""
    logprobs = np.array([option.logprob for option in scored])
    return int(np.argmax(logprobs)), int(np.argmax(logprobs / [max(len(name), 1) for name in names]))


def f1(items: Sequence[tuple[int, int]]) -> float:
    """F1 of label 1, 2 TP / (2 TP + FP + FN), from pairs of the chosen and the right label."""
    true_positives = sum(choice == gold == 1 for choice, gold in items)
    errors = sum(choice != gold for choice, gold in items)
    return 2 * true_positives / (2 * true_positives + errors) if true_positives else 0.0


def mcc(items: Sequence[tuple[int, int]]) -> float:
    """Matthews' correlation of the chosen and the right labels; 0 where either is constant."""
    choices, gold = np.array(items, np.float64).T
    if choices.std() == 0 or gold.std() == 0:
        return 0.0
    return float(np.corrcoef(choices, gold)[0, 1])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choice(AbstractTask):
    """Scores the likeliest option of each question.

    - ask: makes a question of a record.
    - metrics: of acc, acc_norm, f1 and mcc.
    - rows: reads the data from a name and a split, where `sborax.data.source.read` would misread it.
    """

    ask: Callable[[Record], Question]
    metrics: tuple[str, ...] = ("acc",)
    rows: Callable[[str, str], Sequence[Record]] | None = None

    def units(self, scorer: Scorer) -> Sequence[Record]:
        """Every record."""
        return records(self.data, self.split) if self.rows is None else self.rows(self.data, self.split)

    def measure(self, units: Sequence[Record], scorer: Scorer, seed: int) -> Measured:
        """The metrics that `metrics` names."""
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
    scores = scorer.options([_pairs(question, scorer, special) for question in questions])
    items, choices = [], []
    for question, scored in zip(questions, scores, strict=True):
        plain, normed = choose(scored, question.names)
        choices.append((plain, normed, question.gold))
        items.append(
            {
                "prompt": question.prompts[0] if len(question.prompts) == 1 else list(question.prompts),
                "options": list(question.options),
                "logprobs": [option.logprob for option in scored],
                "tokens": [option.tokens for option in scored],
                "chosen": plain,
                "chosen_by_length": normed,
                "gold": question.gold,
            }
        )
    formulas: dict[str, Callable[[], Metric]] = {
        "acc": lambda: mean([float(plain == gold) for plain, _, gold in choices]),
        "acc_norm": lambda: mean([float(normed == gold) for _, normed, gold in choices]),
        "f1": lambda: jackknife([(plain, gold) for plain, _, gold in choices], f1),
        "mcc": lambda: jackknife([(plain, gold) for plain, _, gold in choices], mcc),
    }
    remarks = cut_remark([max(option.cut for option in scored) for scored in scores])
    return Measured({name: formulas[name]() for name in metrics}, items, remarks)


LETTERS = "ABCD"


def mmlu_item(record: Record, answered: bool) -> str:
    """A question with lettered choices, and its answer if `answered`, as MMLU's authors print it."""
    lines = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, record["choices"], strict=True)]
    text = "\n".join([record["question"], *lines, "Answer:"])
    return f"{text} {LETTERS[record['answer']]}\n\n" if answered else text


def mmlu_prompt(record: Record, shots: Sequence[Record]) -> str:
    """Answered questions of the subject, then the question. The two spaces before the subject are the authors'."""
    subject = "".join(f" {word}" for word in record["subject"].split("_"))
    head = f"The following are multiple choice questions (with answers) about {subject}.\n\n"
    return head + "".join(mmlu_item(shot, True) for shot in shots) + mmlu_item(record, False)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mmlu(AbstractTask):
    """Scores the likeliest of four letters after answered questions of the same subject (few-shot).

    - shots_split: the split of the answered questions.
    - shots: how many; fewer where they do not fit the context.
    """

    shots_split: str = "dev"
    shots: int = 5

    def check(self) -> None:
        """Raise SboraxError for data that is not found, and for answered questions that are the items themselves."""
        super().check()
        check_there(self.data, self.shots_split)
        items, shots = find(self.data, self.split), find(self.data, self.shots_split)
        if self.split == self.shots_split or (items is not None and shots is not None and items.samefile(shots)):
            raise SboraxError(
                f"{self.name}: {items or self.data} is both the questions and the answered examples; name a folder "
                f"with a file for each of {self.split} and {self.shots_split}"
            )

    def measure(self, units: Sequence[Record], scorer: Scorer, seed: int) -> Measured:
        """The accuracy as a mean over subjects, over items, and of each subject. Raises SboraxError as `check` does."""
        self.check()
        by_subject: dict[str, list[Record]] = defaultdict(list)
        for shot in records(self.data, self.shots_split):
            by_subject[shot["subject"]].append(shot)
        missing = next((unit["subject"] for unit in units if unit["subject"] not in by_subject), None)
        if missing is not None:
            raise SboraxError(f"{self.name}: split {self.shots_split!r} of {self.data} has no subject {missing!r}")
        questions, fewer = [], 0
        for record in units:
            prompt, shots = self._fitted_prompt(record, by_subject[record["subject"]], scorer)
            fewer += shots < min(self.shots, len(by_subject[record["subject"]]))
            questions.append(make_question(prompt, LETTERS, record["answer"]))
        measured = _measured(questions, scorer, ("acc",))
        right: dict[str, list[float]] = defaultdict(list)
        for record, item in zip(units, measured.items, strict=True):
            right[record["subject"]].append(float(item["chosen"] == item["gold"]))
        items = [{"subject": record["subject"], **item} for record, item in zip(units, measured.items, strict=True)]
        remarks = (f"{fewer:,} of {len(units):,} prompts hold fewer shots, to fit the context",)
        of_subjects = {f"acc of {subject}": mean(values) for subject, values in sorted(right.items())}
        metrics = {"acc over subjects": _macro(list(right.values())), "acc": measured.metrics["acc"], **of_subjects}
        return Measured(metrics, items, measured.remarks + (remarks if fewer else ()))

    def _fitted_prompt(self, record: Record, answered: Sequence[Record], scorer: Scorer) -> tuple[str, int]:
        """The prompt with as many shots as fit the context, and how many these are."""
        for shots in range(min(self.shots, len(answered)), 0, -1):
            prompt = mmlu_prompt(record, answered[:shots])
            if len(scorer.encode(prompt)) <= scorer.model.config.context:
                return prompt, shots
        return mmlu_prompt(record, ()), 0


def _macro(groups: Sequence[Sequence[float]]) -> Metric:
    """The mean of the groups' means. Its error comes from the items of each group; the groups count as fixed."""
    means = [mean(group) for group in groups]
    errors: list[Any] = [metric.stderr for metric in means if metric.stderr is not None]
    error = math.sqrt(sum(stderr**2 for stderr in errors)) / len(means) if len(errors) == len(means) else None
    return Metric(float(np.mean([metric.value for metric in means])), error)
