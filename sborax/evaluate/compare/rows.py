"""Runs as rows, read from the directories of runs and sweeps without loading a model."""

import dataclasses
import hashlib
import json
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Float

from sborax.adapters.core import SboraxError
from sborax.config.codec import encode
from sborax.config.documents import check_plain, is_number, parse, read_object, shown
from sborax.evaluate.run import SCORES, read_scores
from sborax.records.adapter import PLAN
from sborax.records.disk import ADAPTER, CONFIG, SCORE_FOLDER
from sborax.records.eval_losses import EVAL_LOSSES
from sborax.records.lengths import read_lengths
from sborax.records.report import METRICS, SUMMARY, Summary
from sborax.sweep.rates import LR, SEEDS
from sborax.sweep.results import SWEEP, read_members
from sborax.train.experiment import Experiment, load_experiment

HELD_OUT = "held-out loss"
TRAINING = "training loss"
LAST = 10
"""Steps whose mean is the training loss of a run."""
Curve = tuple[tuple[int, float], ...]
"""Losses in nats a token by step."""


@dataclasses.dataclass(frozen=True, eq=False)
class Measurement:
    """A score of a run.

    - value: its mean over items.
    - items: one value an item, in the order of the items; None where only the mean was stored.
    - identity: a digest of the protocol and the items; measurements with equal ones can be paired by item. Empty
        where items were not kept.
    """

    value: float
    items: Float[np.ndarray, " items"] | None = None
    identity: str = ""


@dataclasses.dataclass(frozen=True, eq=False)
class Row:
    """A run that has ended.

    - run: its directory.
    - experiment: what it was.
    - config: the experiment as JSON values by dotted key.
    - trained: trained parameters.
    - steps: that it made.
    - lengths: for which its learning rates were made, in words, if it was resumed with another number of steps.
    - samples: what became of its data, in words.
    - device: how many of which kind.
    - memory: the most bytes held, of the device or, on a CPU, of the process; None for a member of a sweep.
    - step_seconds: median of a step, those that compiled left out; None for a member of a sweep.
    - losses, held_out: training and held-out loss by step.
    - diverged: the step at which a member of a sweep was stopped because its loss was not finite.
    - prints: fingerprints of the base by path; empty where no adapter was written.
    - measurements: by name, such as "held-out loss" or "arc_easy acc".
    """

    run: str
    experiment: Experiment
    config: Mapping[str, Any]
    trained: int
    steps: int
    lengths: str
    samples: str
    device: str
    memory: int | None
    step_seconds: float | None
    losses: Curve
    held_out: Curve
    diverged: int | None
    prints: Mapping[str, str]
    measurements: Mapping[str, Measurement]

    @property
    def lr(self) -> float | None:
        """The peak learning rate; None for an optimiser without a field `lr`."""
        rate = self.config.get(LR)
        return float(rate) if isinstance(rate, int | float) else None

    @property
    def seeds(self) -> tuple[int, int]:
        """Of the data's order and of the adapter's start."""
        return self.config[SEEDS[0]], self.config[SEEDS[1]]


def lower_is_better(measure: str) -> bool:
    """Whether a lower value of this measurement is the better one: losses and perplexities."""
    return measure.endswith(("loss", "perplexity"))


def read_rows(places: Sequence[str]) -> list[Row]:
    """The rows of run directories and of all members of sweep directories, in this order.

    Raises SboraxError for a directory that is neither, a run that has not ended, a run that is given twice, and damaged
    files.
    """
    rows: dict[str, Row] = {}
    for place in places:
        for run, diverged in _runs(epath.Path(place)):
            resolved = str(run.resolve())
            if resolved in rows:
                raise SboraxError(f"{run}: is given twice; leave it out once")
            rows[resolved] = _read_row(run, diverged)
    return list(rows.values())


Member = tuple[epath.Path, Mapping[str, Any] | None]
"""The directory of a run, and what its sweep says of it, if it is a member of one."""


def _runs(place: epath.Path) -> Iterator[Member]:
    if (place / SWEEP).exists():
        for member in _members(place):
            # What halving has stopped was not trained to the end.
            if not member.get("stopped"):
                yield place / member["name"], member
    elif (place / CONFIG).exists():
        above = place.resolve().parent
        members = _members(above) if (above / SWEEP).exists() else []
        yield place, next((member for member in members if member["name"] == place.resolve().name), None)
    else:
        raise SboraxError(f"{place}: neither a run nor a sweep; give a directory that holds {CONFIG} or {SWEEP}")


def _members(place: epath.Path) -> list[dict[str, Any]]:
    """The members of a sweep, whose names are directories beside its file."""
    members = read_members(place)
    if not all(_is_plain(member["name"]) for member in members):
        raise SboraxError(f"{place / SWEEP}: holds no members of a sweep; restore it from a copy")
    return members


def _is_plain(name: str) -> bool:
    """Whether a name stays inside its directory."""
    return name not in ("", ".", "..") and "/" not in name and "\\" not in name


def _read_row(run: epath.Path, member: Mapping[str, Any] | None) -> Row:
    if not (run / CONFIG).exists():
        raise SboraxError(f"{run}: no {CONFIG} in it, the sweep has not begun this member; resume the sweep")
    experiment, summary = load_experiment(str(run)), Summary.read(run)
    diverged = None if member is None else member.get("diverged")
    diverged = diverged if type(diverged) is int else None
    if summary is None:
        raise SboraxError(f"{run}: no readable {SUMMARY}, the run has not ended; --resume continues it")
    if member is not None and member.get("stopped"):
        raise SboraxError(f"{run}: its sweep's halving has stopped it after step {summary.steps:,}; leave it out")
    if not summary.finished and diverged is None:
        raise SboraxError(f"{run}: was stopped after step {summary.steps:,}; --resume continues it, or leave it out")
    lines = list(_metrics(run))
    last_step = max((line["step"] for line in lines), default=summary.steps)
    if diverged is None and (last_step > summary.steps or experiment.steps not in (None, summary.steps)):
        raise SboraxError(
            f"{run}: ended after step {summary.steps:,}, was continued and has not ended again; --resume continues it, "
            "or leave it out"
        )
    alone = member is None
    return Row(
        run=str(run),
        experiment=experiment,
        config=dotted(encode(experiment)),
        trained=summary.trainable_parameters,
        steps=summary.steps,
        lengths=", then ".join(f"{length:,} after step {start:,}" for start, length in read_lengths(run).items()),
        samples=summary.samples,
        device=summary.device,
        memory=summary.peak_memory if alone else None,
        step_seconds=_step_seconds(lines) if alone else None,
        losses=_curve(lines, "loss"),
        held_out=_curve(lines, "eval_loss"),
        diverged=diverged,
        prints=_prints(run),
        measurements={} if diverged is not None else _measurements(run, lines, summary.steps),
    )


def dotted(value: Any, where: str = "") -> dict[str, Any]:
    """A config's JSON values by dotted key: `{"data.limit": 10, "rules.0.method.rank": 8}`."""
    if isinstance(value, dict) and value:
        parts = value.items()
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        parts = ((str(number), item) for number, item in enumerate(value))
    else:
        return {where: value}
    return {
        key: leaf for name, part in parts for key, leaf in dotted(part, f"{where}.{name}" if where else name).items()
    }


def _metrics(run: epath.Path) -> Iterator[dict[str, Any]]:
    """The lines of `metrics.jsonl`, checked."""
    for where, line in _lines(run / METRICS):
        if not isinstance(line, dict) or type(line.get("step")) is not int:
            raise SboraxError(f"{where} has no step; restore the file from a copy")
        for name in ("loss", "eval_loss", "seconds"):
            if not is_number(line.get(name, 0.0)):
                raise SboraxError(f"{where}: {name} is {shown(line[name])}, not a number")
        yield line


def _lines(file: epath.Path) -> Iterator[tuple[str, Any]]:
    """Every line of a JSONL file, with its place for errors; nothing without the file."""
    if not file.exists():
        return
    check_plain(file)
    for number, text in enumerate(file.read_bytes().splitlines(), start=1):
        where = f"{file}: line {number}"
        yield where, parse(text, where)


def _curve(lines: Sequence[Mapping[str, Any]], name: str) -> Curve:
    return tuple((line["step"], float(line[name])) for line in lines if name in line)


def _step_seconds(lines: Sequence[Mapping[str, Any]]) -> float | None:
    seconds = [float(line["seconds"]) for line in lines if "seconds" in line and line.get("compiled") is False]
    return statistics.median(seconds) if seconds else None


def _prints(run: epath.Path) -> dict[str, str]:
    plan = run / ADAPTER / PLAN
    prints = read_object(plan).get("base") if plan.exists() else {}
    if not isinstance(prints, dict) or not all(isinstance(digest, str) for digest in prints.values()):
        raise SboraxError(f"{plan}: base is missing, or of another kind")
    return prints


def _measurements(run: epath.Path, lines: Sequence[Mapping[str, Any]], steps: int) -> dict[str, Measurement]:
    measured = {}
    held_out = _curve(lines, "eval_loss")
    # A run that went on without held-out data has losses of an earlier adapter alone.
    if held_out and held_out[-1][0] == steps:
        measured[HELD_OUT] = _held_out(run / EVAL_LOSSES, held_out[-1][1])
    measured |= read_measurements(run / SCORE_FOLDER)
    if losses := _curve(lines, "loss")[-LAST:]:
        measured[TRAINING] = Measurement(statistics.fmean(loss for _, loss in losses))
    return measured


def _held_out(file: epath.Path, value: float) -> Measurement:
    """The last held-out loss, by sample where the run kept these.

    The loss R is a ratio: nats over tokens, summed over samples. A sample of l_i nats and t_i tokens has the value
    R + (l_i - R t_i) / mean(t). The mean of these values is R, and they spread as R does when other samples are drawn,
    to first order.
    """
    samples = []
    for where, line in _lines(file):
        if not _is_sample(line):
            raise SboraxError(f"{where} is no loss of a held-out sample; delete the file, then only means are compared")
        samples.append((line["digest"], line["tokens"], line["loss"]))
    if not samples or not math.isfinite(value):
        return Measurement(value)
    tokens, losses = (np.array([sample[part] for sample in samples], np.float64) for part in (1, 2))
    ratio = float(losses.sum() / tokens.sum())
    if abs(ratio - value) > 1e-5 * max(1.0, abs(value)):
        raise SboraxError(
            f"{file}: its mean is {ratio:.6g}, {METRICS} ends with {value:.6g}; delete the file, then only means are "
            "compared"
        )
    questions = json.dumps([sample[:2] for sample in samples])
    # The bits of the value are those of the run; the samples are added up in another order.
    items = value + (losses - ratio * tokens) / tokens.mean()
    return Measurement(value, items, hashlib.sha256(questions.encode()).hexdigest()[:16])


def _is_sample(line: Any) -> bool:
    return (
        isinstance(line, dict)
        and isinstance(line.get("digest"), str)
        and type(line.get("tokens")) is int
        and 0 < line["tokens"] < 2**53
        and is_number(line.get("loss"))
        and math.isfinite(line["loss"])
    )


def read_measurements(place: epath.Path) -> dict[str, Measurement]:
    """The scores in a directory that `sborax eval` wrote, by task and metric; none if there are none.

    Raises SboraxError for damaged files.
    """
    measured = {}
    for score in read_scores(place):
        measured |= _of_task(place, score)
    return measured


Item = Mapping[str, Any]


def _accuracy(item: Item) -> float:
    return float(item["right"] if "right" in item else item["chosen"] == item["gold"])


def _accuracy_by_length(item: Item) -> float:
    return float(item["chosen_by_length"] == item["gold"])


def _loss(item: Item) -> float:
    return -item["logprob"] / item["tokens"]


def _answer_loss(item: Item) -> float:
    return -item["logprobs"][item["gold"]] / item["tokens"][item["gold"]]


PER_ITEM: dict[str, Callable[[Item], float]] = {
    "acc": _accuracy,
    "acc_norm": _accuracy_by_length,
    "loss": _loss,
    "answer loss": _answer_loss,
}
"""By measurement, how the value of an item follows from what a task keeps of it. Others are looked up by their name."""
ASKED = ("item", "prompt", "options", "gold", "references", "window", "subject")
"""Keys of an item that say what was asked, as opposed to what a model made of it."""


def _of_task(place: epath.Path, score: Mapping[str, Any]) -> dict[str, Measurement]:
    """The measurements of a task: its score, and whatever its items give."""
    task, metrics = score["task"], score.get("metrics")
    if not _is_plain(task) or not isinstance(metrics, dict) or not metrics:
        raise SboraxError(f"{place / SCORES}: {shown(task)} has no metrics; score the run anew")
    values = {name: metric.get("value") for name, metric in metrics.items() if isinstance(metric, dict)}
    protocol = {name: score.get(name) for name in ("data", "split", "protocol", "n", "limit", "seed")}
    items = list(_items(place / f"{task}.jsonl"))
    questions = [{name: item[name] for name in ASKED if name in item} for item in items]
    identity = hashlib.sha256(json.dumps([protocol, questions], sort_keys=True).encode()).hexdigest()[:16]
    first = next(iter(metrics))
    measured = {}
    for name in dict.fromkeys((first, "acc", "loss", "answer loss")):
        item_values = _values(name, items)
        value = values.get(name)
        if item_values is not None:
            mean = float(item_values.mean())
            if is_number(value) and abs(mean - float(value)) > 1e-6 * max(1.0, abs(mean)):
                file = place / f"{task}.jsonl"
                raise SboraxError(f"{file}: its {name} is {mean:.6g}, {SCORES} says {value:.6g}; score the run anew")
            measured[f"{task} {name}"] = Measurement(mean, item_values, identity)
        elif is_number(value):
            measured[f"{task} {name}"] = Measurement(float(value), None, identity)
    # The loss says the same, by item.
    if f"{task} loss" in measured:
        measured.pop(f"{task} perplexity", None)
    return measured


def _values(name: str, items: Sequence[Item]) -> Float[np.ndarray, " items"] | None:
    """The values of a measurement by item; None if the items do not tell it."""
    value = PER_ITEM.get(name, lambda item: float(item[name]))
    try:
        values = np.array([value(item) for item in items], np.float64)
    except (KeyError, TypeError, ValueError, IndexError, ZeroDivisionError):
        return None
    return values if values.size and np.isfinite(values).all() else None


def _items(file: epath.Path) -> Iterator[dict[str, Any]]:
    for where, item in _lines(file):
        if not isinstance(item, dict):
            raise SboraxError(f"{where} is no item of a task; score the run anew")
        yield item
