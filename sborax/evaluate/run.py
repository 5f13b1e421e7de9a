"""Scores a model on tasks, and writes the scores and every item to files."""

import dataclasses
import json
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from sborax.adapters.core import SboraxError
from sborax.config.documents import read_object, shown
from sborax.config.terminal import say
from sborax.evaluate.scorer import Scorer
from sborax.evaluate.task import AbstractTask, Metric, Record
from sborax.records.report import versions

SCORES = "scores.json"


@dataclasses.dataclass(frozen=True)
class Score:
    """The score of a task.

    - n: items scored.
    - available: items of the data.
    - overlap: how many of the scored items are in the run's training data; None if that is not known.
    - remarks: of the task, on this score.
    """

    task: AbstractTask
    metrics: Mapping[str, Metric]
    n: int
    available: int
    seed: int
    limit: int | None
    overlap: int | None
    remarks: tuple[str, ...]
    seconds: float

    def notes(self) -> list[str]:
        """Everything that one must know to interpret the score."""
        notes = []
        if self.limit is not None and self.n < self.available:
            notes.append(f"--limit {self.limit}: {self.n:,} of {self.available:,} items, drawn with seed {self.seed}")
        if self.task.full is not None and self.available != self.task.full:
            notes.append(f"this copy has {self.available:,} items, the published set {self.task.full:,}: not its score")
        if self.overlap:
            notes.append(f"{self.overlap:,} of {self.n:,} items are in the data that the run was trained on")
        return [*notes, *self.task.notes, *self.remarks]

    def __str__(self) -> str:
        """A line with the score, one with the protocol, and the notes."""
        metrics = ", ".join(f"{name} {_number(metric)}" for name, metric in list(self.metrics.items())[:5])
        lines = [f"{self.task.name}: {metrics} (n {self.n:,}, seed {self.seed})", f"  {self.task.about}"]
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes())])

    def record(self) -> dict[str, Any]:
        """The score as JSON."""
        metrics = {name: {"value": metric.value, "stderr": metric.stderr} for name, metric in self.metrics.items()}
        return {
            "task": self.task.name,
            "data": self.task.data,
            "split": self.task.split,
            "protocol": self.task.about,
            "metrics": metrics,
            "n": self.n,
            "items": self.available,
            "limit": self.limit,
            "seed": self.seed,
            "in_training_data": self.overlap,
            "notes": self.notes(),
            "seconds": round(self.seconds, 3),
        }


def _number(metric: Metric) -> str:
    error = "no error of one item" if metric.stderr is None else f"{metric.stderr:.4f}"
    return f"{metric.value:.4f} ± {error}"


def draw_indices(count: int, limit: int | None, seed: int) -> list[int]:
    """The indices of the items to score: all, or `limit` drawn with `seed`, ascending."""
    if limit is None or limit >= count:
        return list(range(count))
    return sorted(np.random.default_rng(seed).choice(count, limit, replace=False).tolist())


def normalised(text: str) -> str:
    """A text in lower case, without punctuation and repeated white space."""
    return " ".join(re.sub(r"[^\w\s]", " ", text.lower()).split())


def texts_of(record: Record) -> list[str]:
    """The texts that identify a record, normalised: columns of questions, or user turns, of more than 40 letters.

    A shorter text may be in two data sets by coincidence.
    """
    turns = record.get("messages") or ()
    skipped = ("output", "answer", "subject", "text")
    texts = [value for name, value in record.items() if name not in skipped]
    texts += [turn.get("content") for turn in turns if turn.get("role") == "user"]
    return [normalised(text) for text in texts if isinstance(text, str) and len(text) > 40]


def overlap(units: Sequence[Record], trained_on: Iterable[Record]) -> int | None:
    """How many units contain a text of the training data, capitals and punctuation aside.

    None where units or training data have no text to know them by, such as windows of a corpus.
    """
    trained_texts = {text for record in trained_on for text in texts_of(record)}
    unit_texts = [texts_of(unit) for unit in units]
    if not trained_texts or not any(unit_texts):
        return None
    return sum(any(text in trained_texts for text in texts) for texts in unit_texts)


def evaluate(
    tasks: Sequence[AbstractTask],
    scorer: Scorer,
    *,
    limit: int | None = None,
    seed: int = 0,
    out: str | epath.PathLike | None = None,
    trained_on: Sequence[Record] | None = None,
    about: Mapping[str, Any] | None = None,
    echo: Callable[[str], None] = say,
) -> list[Score]:
    """Score a model on tasks.

    Args:
    - tasks: as `chosen` returns them.
    - scorer: the model with its adapters.
    - limit: the most items of each task, drawn with `seed`; None (default) for all.
    - seed: of what is drawn.
    - out: a directory for `scores.json` and a JSONL file with the items of each task, written after every task.
    - trained_on: training data in which to look for the items.
    - about: further entries of `scores.json`.
    - echo: prints a score.

    Raises SboraxError for a limit below 1, a seed outside of [0, 2^32), a directory with scores in it, and as the tasks
    do.
    """
    if limit is not None and limit < 1:
        raise SboraxError(f"--limit {limit}: at least 1")
    if not 0 <= seed < 2**32:
        raise SboraxError(f"--seed {seed}: must lie in 0..2**32 - 1")
    place = None if out is None else _claim(epath.Path(out), tasks)
    scores: list[Score] = []
    for task in tasks:
        began = time.monotonic()
        available = task.units(scorer)
        order = draw_indices(len(available), limit, seed)
        units = [available[i] for i in order]
        measured = task.measure(units, scorer, seed)
        shared = None if trained_on is None else overlap(units, trained_on)
        seconds = time.monotonic() - began
        score = Score(
            task, measured.metrics, len(units), len(available), seed, limit, shared, measured.remarks, seconds
        )  # fmt: skip
        scores.append(score)
        echo(str(score))
        if place is not None:
            items = ({"item": number, **item} for number, item in zip(order, measured.items, strict=True))
            (place / f"{task.name}.jsonl").write_text("".join(f"{json.dumps(item)}\n" for item in items))
            content = {**(about or {}), "versions": versions(), "scores": [score.record() for score in scores]}
            (place / SCORES).write_text(json.dumps(content, indent=2) + "\n")
    return scores


def read_scores(place: epath.PathLike) -> list[dict[str, Any]]:
    """The scores that `evaluate` wrote to a directory, in the form of `Score.record`; an empty list without a file.

    Raises SboraxError for a file that it did not write.
    """
    file = epath.Path(place) / SCORES
    if not file.exists():
        return []
    scores = read_object(file).get("scores")
    if not isinstance(scores, list) or not all(
        isinstance(score, dict) and isinstance(score.get("task"), str) for score in scores
    ):
        raise SboraxError(f"{file}: holds no scores of sborax; delete it")
    return scores


def in_words(score: Mapping[str, Any]) -> str:
    """A score of `read_scores` as a line: its first metric with the error, the number of items, and its notes.

    Raises SboraxError for a record that `evaluate` did not write.
    """
    try:
        name, metric = next(iter(score["metrics"].items()))
        number = _number(Metric(float(metric["value"]), None if metric["stderr"] is None else float(metric["stderr"])))
        notes = "".join(f"; {note}" for note in score["notes"])
        return f"{name} {number}, n {int(score['n']):,}, seed {int(score['seed'])}{notes}"
    except (KeyError, TypeError, ValueError, AttributeError, StopIteration, OverflowError):
        raise SboraxError(f"{SCORES}: {shown(score)} is no score of sborax; delete it") from None


def _claim(place: epath.Path, tasks: Sequence[AbstractTask]) -> epath.Path:
    """Make the directory. Raises SboraxError if a file in it would be overwritten."""
    existing = next((name for name in (SCORES, *(f"{t.name}.jsonl" for t in tasks)) if (place / name).exists()), None)
    if existing is not None:
        raise SboraxError(f"{place / existing}: exists; choose another --out")
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SboraxError(f"{place}: cannot write scores there ({error})") from error
    return place
