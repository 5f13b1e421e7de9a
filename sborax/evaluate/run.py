"""Tasks on a model: scores with their errors, and files with what became of every item."""

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
    """What a task gave. n: items scored, of `there`. overlap: of those, how many the run was trained on, if known."""

    task: AbstractTask
    metrics: Mapping[str, Metric]
    n: int
    there: int
    seed: int
    limit: int | None
    overlap: int | None
    remarks: tuple[str, ...]
    seconds: float

    def notes(self) -> list[str]:
        """All that has to be known to read the score."""
        said = []
        if self.limit is not None and self.n < self.there:
            said.append(f"--limit {self.limit}: {self.n:,} of {self.there:,} items, drawn with seed {self.seed}")
        if self.task.full is not None and self.there != self.task.full:
            said.append(f"this copy has {self.there:,} items, the published set {self.task.full:,}: not its score")
        if self.overlap:
            said.append(f"{self.overlap:,} of {self.n:,} items are in the data that the run was trained on")
        return [*said, *self.task.notes, *self.remarks]

    def __str__(self) -> str:
        """A line of the score, one of the protocol, and the notes."""
        told = ", ".join(f"{name} {_number(metric)}" for name, metric in list(self.metrics.items())[:5])
        lines = [f"{self.task.name}: {told} (n {self.n:,}, seed {self.seed})", f"  {self.task.about}"]
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes())])

    def record(self) -> dict[str, Any]:
        """The score as JSON."""
        metrics = {name: {"value": one.value, "stderr": one.stderr} for name, one in self.metrics.items()}
        return {
            "task": self.task.name,
            "data": self.task.data,
            "split": self.task.split,
            "protocol": self.task.about,
            "metrics": metrics,
            "n": self.n,
            "items": self.there,
            "limit": self.limit,
            "seed": self.seed,
            "in_training_data": self.overlap,
            "notes": self.notes(),
            "seconds": round(self.seconds, 3),
        }


def _number(metric: Metric) -> str:
    error = "no error of one item" if metric.stderr is None else f"{metric.stderr:.4f}"
    return f"{metric.value:.4f} ± {error}"


def drawn(count: int, limit: int | None, seed: int) -> list[int]:
    """Which of `count` items are scored: all, or `limit` drawn with `seed`, in their order."""
    if limit is None or limit >= count:
        return list(range(count))
    return sorted(np.random.default_rng(seed).choice(count, limit, replace=False).tolist())


def normalised(text: str) -> str:
    """A text without capitals, punctuation and doubled blanks."""
    return " ".join(re.sub(r"[^\w\s]", " ", text.lower()).split())


def texts_of(record: Record) -> Iterable[str]:
    """What a record asks: its columns of text, or turns of a conversation, long enough to be no coincidence."""
    turns = record.get("messages") or ()
    skipped = ("output", "answer", "subject", "text")
    found = [value for name, value in record.items() if name not in skipped]
    found += [turn.get("content") for turn in turns if turn.get("role") == "user"]
    return [normalised(text) for text in found if isinstance(text, str) and len(text) > 40]


def overlap(units: Sequence[Record], trained_on: Iterable[Record]) -> int:
    """How many units hold a text that, but for capitals and punctuation, is in the training data."""
    seen = {text for record in trained_on for text in texts_of(record)}
    return sum(any(text in seen for text in texts_of(unit)) for unit in units)


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

    limit: at most so many items of each, drawn with `seed`. out: where `scores.json` and one JSONL file of items a
    task go; they are written after every task. trained_on: data to look for the items in. about: kept in `scores.json`.
    Raises SboraxError for a limit below 1, a directory that holds scores, and as the tasks do.
    """
    if limit is not None and limit < 1:
        raise SboraxError(f"--limit {limit}: at least 1")
    place = None if out is None else _claim(epath.Path(out), tasks)
    scores: list[Score] = []
    for task in tasks:
        began = time.monotonic()
        everything = task.units(scorer)
        order = drawn(len(everything), limit, seed)
        units = [everything[i] for i in order]
        done = task.measure(units, scorer, seed)
        seen = None if trained_on is None else overlap(units, trained_on)
        seconds = time.monotonic() - began
        score = Score(task, done.metrics, len(units), len(everything), seed, limit, seen, done.remarks, seconds)
        scores.append(score)
        echo(str(score))
        if place is not None:
            items = ({"item": number, **item} for number, item in zip(order, done.items, strict=True))
            (place / f"{task.name}.jsonl").write_text("".join(f"{json.dumps(item)}\n" for item in items))
            whole = {**(about or {}), "versions": versions(), "scores": [one.record() for one in scores]}
            (place / SCORES).write_text(json.dumps(whole, indent=2) + "\n")
    return scores


def read_scores(place: epath.PathLike) -> list[dict[str, Any]]:
    """The scores that `evaluate` left in a directory, as `Score.record` has them; none if there are none.

    Raises SboraxError for a file that it did not write.
    """
    file = epath.Path(place) / SCORES
    if not file.exists():
        return []
    scores = read_object(file).get("scores")
    if not isinstance(scores, list) or not all(
        isinstance(one, dict) and isinstance(one.get("task"), str) for one in scores
    ):
        raise SboraxError(f"{file}: holds no scores of sborax; delete it")
    return scores


def in_words(score: Mapping[str, Any]) -> str:
    """A score of `read_scores` in words: its first metric with its error, how many items, and its notes.

    Raises SboraxError for a record that `evaluate` did not write.
    """
    try:
        metric, found = next(iter(score["metrics"].items()))
        number = _number(Metric(float(found["value"]), None if found["stderr"] is None else float(found["stderr"])))
        notes = "".join(f"; {note}" for note in score["notes"])
        return f"{metric} {number}, n {int(score['n']):,}, seed {int(score['seed'])}{notes}"
    except (KeyError, TypeError, ValueError, AttributeError, StopIteration, OverflowError):
        raise SboraxError(f"{SCORES}: {shown(score)} is no score of sborax; delete it") from None


def _claim(place: epath.Path, tasks: Sequence[AbstractTask]) -> epath.Path:
    """The directory, made. Raises SboraxError if something in it would be overwritten."""
    taken = next((name for name in (SCORES, *(f"{t.name}.jsonl" for t in tasks)) if (place / name).exists()), None)
    if taken is not None:
        raise SboraxError(f"{place / taken}: exists; choose another --out")
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SboraxError(f"{place}: cannot write scores there ({error})") from error
    return place
