"""Rows in groups that are compared: equal conditions in one setting, seeds and learning rates in one group."""

import collections
import dataclasses
import hashlib
import json
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sborax.adapters.core import AbstractComposite, AbstractMethod, SboraxError
from sborax.adapters.paths import as_rules
from sborax.adapters.vectors import by_module
from sborax.evaluate.compare.rows import HELD_OUT, TRAINING, Measurement, Row, lower_is_better
from sborax.evaluate.compare.statistics import (
    Interval,
    over_items,
    over_seeds,
    seed_difference,
)
from sborax.records.report import method_line
from sborax.sweep.rates import LR, SEEDS, Sensitivity, sensitivity
from sborax.train.experiment import Experiment
from sborax.train.figures import label

METHOD = ("rules", "procedure", "optimizer", "train_base", "train_also", "train_tokens", "hint_batches")
"""Keys of a config that `--by method` stands for: what is trained, from which start, and by which updates."""
FREE = ("log", "save", "imports", "eval.every", "eval.tasks", "model", *SEEDS)
"""Keys in which runs of one setting may differ. They change no number that is compared, with two exceptions: runs of
other seeds are replicates, and base models are told apart by their fingerprints, not by `model`."""
RATES_OF = "learning rates of"
"""The condition that a run was resumed with another number of steps."""


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What a group's runs at its learning rate say about one measurement.

    - value: mean over seeds.
    - items: its interval over items; None where items were not stored or differ among runs.
    - seeds: its interval over seeds.
    - gap_items, gap_seeds: intervals of the difference from the reference group; None in that group itself.
    """

    value: float
    items: Interval | None
    seeds: Interval
    gap_items: Interval | None = None
    gap_seeds: Interval | None = None

    @property
    def interval(self) -> Interval:
        """The interval over items where it is known, else that over seeds."""
        return self.items or self.seeds

    @property
    def gap(self) -> Interval | None:
        """The interval of the difference: over items where it is known, else over seeds."""
        return self.gap_items or self.gap_seeds

    @property
    def differs(self) -> bool | None:
        """Whether every known interval of the difference excludes 0; None where no interval is known."""
        gaps = [gap for gap in (self.gap_items, self.gap_seeds) if gap is not None and gap.low is not None]
        return all(gap.excludes_zero for gap in gaps) if gaps else None


@dataclasses.dataclass(frozen=True, eq=False)
class Group:
    """Runs that differ in learning rate and seeds alone.

    - label: what tells it from the other groups of its setting.
    - rows: all runs.
    - lr: the learning rate at which the group is compared, its best; None without learning rates.
    - best: the runs at this learning rate, one a seed.
    - rates: the score by learning rate by which `lr` was chosen.
    - estimates: by measurement.
    """

    label: str
    rows: tuple[Row, ...]
    lr: float | None
    best: tuple[Row, ...]
    rates: Sensitivity | None
    estimates: Mapping[str, Estimate]

    @property
    def trained(self) -> int:
        """Trained parameters."""
        return max(row.trained for row in self.rows)

    @property
    def memory(self) -> int | None:
        """Bytes, the most of its runs; None where no run tells."""
        return max((row.memory for row in self.best if row.memory is not None), default=None)

    @property
    def step_seconds(self) -> float | None:
        """The median over its runs; None where no run tells."""
        times = [row.step_seconds for row in self.best if row.step_seconds is not None]
        return statistics.median(times) if times else None

    @property
    def diverged(self) -> int:
        """How many runs were stopped because their loss was not finite."""
        return sum(row.diverged is not None for row in self.rows)


@dataclasses.dataclass(frozen=True, eq=False)
class Setting:
    """Groups under equal conditions: one base, data and budget.

    - title: the conditions that tell it from other settings; empty for a single one.
    - conditions: by dotted key.
    - groups: in the order of the first run of each. The first one is the reference of differences.
    - measures: names of measurements, the first being the main one.
    - chosen_by: the measurement by which each group's learning rate was chosen.
    - notes: what has to be known to read the numbers.
    """

    title: str
    conditions: Mapping[str, Any]
    groups: tuple[Group, ...]
    measures: tuple[str, ...]
    chosen_by: str | None
    notes: tuple[str, ...]

    @property
    def ranked(self) -> list[Group]:
        """The groups by their main score, the best first; those without one last."""
        if not self.measures:
            return list(self.groups)
        main = self.measures[0]
        sign = 1.0 if lower_is_better(main) else -1.0

        def order(group: Group) -> float:
            estimate = group.estimates.get(main)
            return math.inf if estimate is None or math.isnan(estimate.value) else sign * estimate.value

        return sorted(self.groups, key=order)

    @property
    def same_device(self) -> bool:
        """Whether all runs had the same kind of device, without which memory and step time cannot be compared."""
        return len({row.device for group in self.groups for row in group.rows}) == 1


def compare(rows: Sequence[Row], by: Sequence[str] = ("method",)) -> list[Setting]:
    """Rows in settings and groups, with the statistics of each group.

    Runs of one setting are equal in everything but what `by` names, the learning rate, the seeds and `FREE`; runs that
    are unequal in anything else are put into settings of their own, and are never averaged or subtracted.

    Args:
    - rows: as `read_rows` gives them. The group of the first row of a setting is its reference.
    - by: what groups differ in: "method" (see `METHOD`) or dotted keys of a config, such as "batch_size".

    Raises SboraxError for a key that no run has, for rows that are the same run, and where nothing is left to compare.
    """
    if not rows:
        raise SboraxError("nothing to compare: give the directories of runs or sweeps")
    prefixes = tuple(prefix for key in by for prefix in (METHOD if key == "method" else (key,)))
    for key in prefixes:
        if key not in METHOD and not any(_below(name, (key,)) for row in rows for name in row.config):
            raise SboraxError(f"--by {key}: no run has such a key; write method, or a key of config.json: batch_size")
    bases = _bases(rows)
    settings: dict[str, list[Row]] = collections.defaultdict(list)
    conditions: dict[str, dict[str, Any]] = {}
    for row, base in zip(rows, bases, strict=True):
        equal = {
            name: value
            for name, value in row.config.items()
            if not _below(name, (*prefixes, *(key for key in FREE if key not in prefixes))) and name != LR
        }
        # What is compared is no condition, nor what follows from it.
        if not _below("model", prefixes):
            equal["base"] = base
        if not any(_below(prefix, ("data",)) for prefix in prefixes):
            equal["samples"] = row.samples
        if row.lengths:
            equal[RATES_OF] = row.lengths
        text = json.dumps(equal, sort_keys=True)
        settings[text].append(row)
        conditions[text] = equal
    differing = [key for key in _varying(list(conditions.values())) if key not in ("base", "samples")]
    return [
        _setting(members, prefixes, conditions[text], _title(members, conditions[text], differing, conditions.values()))
        for text, members in settings.items()
    ]


def _below(name: str, keys: Sequence[str]) -> bool:
    """Whether a dotted name is one of the keys, or below one."""
    return any(name == key or name.startswith(f"{key}.") for key in keys)


def _varying(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Keys in which some config differs from the first."""
    keys = dict.fromkeys(key for config in configs for key in config)
    return [key for key in keys if any(config.get(key) != configs[0].get(key) for config in configs[1:])]


def _bases(rows: Sequence[Row]) -> list[str]:
    """A digest of each row's base model, from the fingerprints of the leaves that all rows have.

    Methods that rewrite the base of a 4-bit run have fingerprints of more leaves than others. A run that diverged has
    none: its base is that of another run with the same model, or known by name.
    """
    prints = [row.prints for row in rows if row.prints]
    common = sorted(set.intersection(*map(set, prints))) if prints else []

    def digest(row: Row) -> str | None:
        if not row.prints:
            return None
        text = json.dumps([[path, row.prints[path]] for path in common or sorted(row.prints)])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    digests = [digest(row) for row in rows]
    models = [str(row.config["model"]) for row in rows]
    by_model = {model: base for model, base in zip(models, digests, strict=True) if base is not None}
    return [base or by_model.get(model, model) for model, base in zip(models, digests, strict=True)]


def _title(rows: Sequence[Row], equal: Mapping[str, Any], differing: Sequence[str], conditions: Any) -> str:
    """The conditions in which a setting differs from others."""
    parts = [f"{key}={_text(equal.get(key))}" for key in differing]
    if len({other.get("base") for other in conditions}) > 1:
        parts.insert(0, f"model={rows[0].config['model']}")
    if not parts and len({other.get("samples") for other in conditions}) > 1:
        parts.append(f"data: {rows[0].samples}")
    return ", ".join(parts)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _setting(rows: Sequence[Row], prefixes: Sequence[str], conditions: Mapping[str, Any], title: str) -> Setting:
    notes: list[str] = []
    rows = _shown_apart(rows, notes)
    members: dict[str, list[Row]] = collections.defaultdict(list)
    treatments: dict[str, dict[str, Any]] = {}
    for row in rows:
        treatment = {name: value for name, value in row.config.items() if _below(name, prefixes) and name != LR}
        if LR in prefixes:
            treatment[LR] = row.config.get(LR)
        text = json.dumps(treatment, sort_keys=True)
        members[text].append(row)
        treatments[text] = treatment
    labels = _labels([group[0] for group in members.values()], list(treatments.values()), prefixes)
    replicates = [_replicates(named, group, notes) for named, group in zip(labels, members.values(), strict=True)]
    measures = _measures([row for group in replicates for row in group])
    chosen_by = measures[0] if measures else None
    choices = [_choose(group, measures) for group in replicates]
    best = [
        tuple(row for row in group if row.lr == lr and row.diverged is None)
        for group, (lr, _, _) in zip(replicates, choices, strict=True)
    ]
    estimates = _estimates(best, measures)
    groups = tuple(
        Group(named, tuple(group), lr, at_best, rates if by == chosen_by else None, values)
        for named, group, (lr, rates, by), at_best, values in zip(
            labels, replicates, choices, best, estimates, strict=True
        )
    )
    notes += [
        f"{group.label}: has no {chosen_by}, so that its learning rate was chosen by its {by}"
        for group, (_, rates, by) in zip(groups, choices, strict=True)
        if by != chosen_by and rates is not None and len(rates.rates) > 1
    ]
    return Setting(title, conditions, groups, tuple(measures), chosen_by, (*notes, *_remarks(groups, chosen_by)))


def _replicates(named: str, rows: Sequence[Row], notes: list[str]) -> list[Row]:
    """The rows of a group without those that say nothing new: a second seed that changed no number is no second draw.

    Raises SboraxError for two rows with the same seeds and learning rate.
    """
    replicates: list[Row] = []
    for row in rows:
        for other in replicates:
            if (row.lr, row.seeds) == (other.lr, other.seeds):
                raise SboraxError(f"{other.run} and {row.run} are the same run; leave one out")
        same_rate = [other for other in replicates if other.lr == row.lr]
        twin = next((other for other in same_rate if row.losses and other.losses == row.losses), None)
        if twin is None:
            replicates.append(row)
        else:
            notes.append(f"{named}: seeds {row.seeds} made the same losses as {twin.seeds}, so they count once")
    return replicates


def from_base(setting: Setting, base: Mapping[str, Measurement]) -> dict[str, dict[str, Interval]]:
    """Differences of each group from the base model, paired by item: by measurement, then by label of the group.

    Only of measurements whose items were kept and are the same, under the same protocol. The interval is that over
    items, for the group's seeds.

    Args:
    - base: the measurements of the base model, by the same names.
    """
    gaps: dict[str, dict[str, Interval]] = {}
    for measure, measured in base.items():
        for group in setting.groups:
            items = [
                score.items
                for row in group.best
                for other, score in row.measurements.items()
                if score.items is not None and _APART.sub(" ", other) == measure and score.identity == measured.identity
            ]
            if measured.items is not None and items:
                values = np.stack([measured.items, np.mean(items, axis=0)])
                gaps.setdefault(measure, {})[group.label] = over_items(values, reference=0)[1][1]
    return gaps


_APART = re.compile(r" \(\d+\) ")
"""What `_shown_apart` puts into a name."""


def _shown_apart(rows: Sequence[Row], notes: list[str]) -> list[Row]:
    """The rows with names of measurements that say of which items they are, where these differ among the rows."""
    identities: dict[str, dict[str, None]] = collections.defaultdict(dict)
    for row in rows:
        for measure, measured in row.measurements.items():
            # Runs of earlier versions did not keep the losses of held-out samples.
            if measured.identity:
                identities[measure][measured.identity] = None
    apart = {measure: list(ways) for measure, ways in identities.items() if len(ways) > 1}
    for measure, ways in apart.items():
        notes.append(f"{measure}: runs were scored in {len(ways)} ways (items, data or protocol), shown apart")

    def renamed(measure: str, measured: Measurement) -> str:
        if measure not in apart or not measured.identity:
            return measure
        task, _, metric = measure.partition(" ")
        return f"{task} ({apart[measure].index(measured.identity) + 1}) {metric}"

    return [
        dataclasses.replace(row, measurements={renamed(key, score): score for key, score in row.measurements.items()})
        for row in rows
    ]


def _measures(rows: Sequence[Row]) -> list[str]:
    """Names of the measurements, the main one first: that of the most runs; ties: the held-out loss.

    The training loss is one of them only where there is no other.
    """
    counts = collections.Counter(measure for row in rows for measure in row.measurements)
    if len(counts) > 1:
        counts.pop(TRAINING, None)
    return sorted(counts, key=lambda measure: (-counts[measure], measure != HELD_OUT))


def _choose(rows: Sequence[Row], measures: Sequence[str]) -> tuple[float | None, Sensitivity | None, str | None]:
    """The best learning rate of a group, the scores by which it is the best, and the measurement of these scores.

    The measurement is the first of `measures` that a run of the group has. A rate counts as tried if it has a score, or
    a seed that diverged. Rates are compared on the seeds that all of them have, if there are any.
    """
    rates = dict.fromkeys(row.lr for row in rows)
    scored = (name for name in measures if any(name in row.measurements for row in rows))
    measure = next(scored, measures[0] if measures and any(row.diverged is not None for row in rows) else None)
    if None in rates or measure is None:
        return (rows[0].lr if len(rates) == 1 else None), None, None
    lower = lower_is_better(measure)
    by_rate: dict[float, dict[tuple[int, int], float]] = collections.defaultdict(dict)
    for row in rows:
        if row.lr is not None and row.diverged is not None:
            # A rate at which a seed diverged is no rate to recommend.
            by_rate[row.lr][row.seeds] = math.inf if lower else -math.inf
        elif row.lr is not None and measure in row.measurements:
            by_rate[row.lr][row.seeds] = row.measurements[measure].value
    common = set.intersection(*map(set, by_rate.values()))
    scores = {
        rate: statistics.fmean(value for seeds, value in by_seed.items() if seeds in common or not common)
        for rate, by_seed in by_rate.items()
    }
    lost = {rate for rate, by_seed in by_rate.items() if not all(map(math.isfinite, by_seed.values()))}
    rates = sensitivity(scores | dict.fromkeys(lost, math.inf if lower else -math.inf), lower)
    return rates.best, rates, measure


def _estimates(groups: Sequence[Sequence[Row]], measures: Sequence[str]) -> list[dict[str, Estimate]]:
    """The estimates of every group, the first being the reference."""
    estimates: list[dict[str, Estimate]] = [{} for _ in groups]
    for measure in measures:
        by_seed = [
            {row.seeds: row.measurements[measure] for row in rows if measure in row.measurements} for rows in groups
        ]
        measured = [number for number, values in enumerate(by_seed) if values]
        items, gaps = _over_items(by_seed, measured)
        for number in measured:
            values = {seeds: score.value for seeds, score in by_seed[number].items()}
            reference = {seeds: score.value for seeds, score in by_seed[0].items()}
            gap = seed_difference(values, reference) if number and reference else None
            estimates[number][measure] = Estimate(
                statistics.fmean(values.values()),
                items.get(number),
                over_seeds(list(values.values())),
                gaps.get(number) if number else None,
                gap,
            )
    return estimates


def _over_items(
    by_seed: Sequence[Mapping[tuple[int, int], Measurement]], measured: Sequence[int]
) -> tuple[dict[int, Interval], dict[int, Interval]]:
    """Intervals over items by group, and those of differences from the first group, where all have the same items."""
    scores = [score for number in measured for score in by_seed[number].values()]
    if not scores or any(score.items is None for score in scores) or len({score.identity for score in scores}) > 1:
        return {}, {}
    values = np.stack([
        np.mean([score.items for score in by_seed[number].values() if score.items is not None], axis=0)
        for number in measured
    ])  # fmt: skip
    means, gaps = over_items(values, reference=0 if measured[0] == 0 else None)
    return dict(zip(measured, means, strict=True)), dict(zip(measured, gaps, strict=False))


def _remarks(groups: Sequence[Group], chosen_by: str | None) -> list[str]:
    """What a reader of the numbers has to know."""
    remarks = []
    for group in groups:
        rates = group.rates
        if rates is not None and rates.interior is False and rates.best is not None:
            end = "lowest" if rates.best == rates.rates[0] else "highest"
            remarks.append(
                f"{group.label}: the best learning rate, {rates.best:g}, is the {end} that was tried; extend the sweep"
            )
        if group.diverged:
            remarks.append(f"{group.label}: {group.diverged} of {len(group.rows)} runs diverged")
        orders = {row.seeds[0] for row in group.best}
        if len(group.best) > 1 and len(orders) == 1:
            remarks.append(f"{group.label}: its {len(group.best)} seeds share one order of the data")
    counts = {len(group.best) for group in groups}
    if len(counts) > 1:
        remarks.append(f"groups have between {min(counts)} and {max(counts)} seeds")
    tuned = {1 if group.rates is None else len(group.rates.rates) for group in groups}
    if len(tuned) > 1:
        remarks.append(f"learning rates tried: between {min(tuned)} and {max(tuned)} a group, so tuning was unequal")
    if max(tuned, default=0) > 1 and chosen_by is not None:
        remarks.append(
            f"each group is shown at the learning rate with its best {chosen_by}, which makes that score optimistic"
        )
    return remarks


def method_label(experiment: Experiment) -> str:
    """A run's method in a few words: `SBoRA(rank=16)`, `self_attn: LoRA(rank=8); mlp: Bone(rank=8), COLA`."""
    rules = [(rule.pattern, rule.method) for rule in as_rules(experiment.rules) if rule.method is not None]
    named = [(pattern, _named(method)) for pattern, method in rules]
    distinct = list(dict.fromkeys(method for _, method in named))
    parts = distinct if len(distinct) == 1 else ["; ".join(f"{pattern}: {method}" for pattern, method in named)]
    parts = [part for part in parts if part]
    if experiment.train_base:
        parts.append("full fine-tuning")
    if experiment.train_also:
        parts.append(f"{', '.join(experiment.train_also)} trained")
    if tokens := by_module(experiment.train_tokens):
        parts.append(f"{sum(map(len, tokens.values()))} vectors of tokens trained")
    if experiment.procedure is not None:
        parts.append(type(experiment.procedure).__name__)
    return ", ".join(parts)


def _named(method: AbstractMethod) -> str:
    return label(method) if isinstance(method, AbstractComposite) else method_line(method)


def _labels(rows: Sequence[Row], treatments: Sequence[Mapping[str, Any]], prefixes: Sequence[str]) -> list[str]:
    """Labels that tell groups apart: methods in words, then keys whose value is not the usual one."""
    in_words = set(METHOD) <= set(prefixes)
    spoken = ("rules", "procedure", "train_base", "train_also") if in_words else ()
    labels = [method_label(row.experiment) if in_words else "" for row in rows]
    varying = [key for key in _varying(treatments) if not _below(key, spoken)]
    for key in varying:
        texts = [_text(treatment.get(key)) for treatment in treatments]
        usual = collections.Counter(texts).most_common(1)[0][0]
        # A key of METHOD is worth a word where it is unusual, another one always: groups are there to differ in it.
        always = not _below(key, METHOD)
        labels = [
            _joined(named, f"{key}={text}") if always or text != usual else named
            for named, text in zip(labels, texts, strict=True)
        ]
    for named, count in collections.Counter(labels).items():
        if count > 1:
            numbers = [number for number, other in enumerate(labels) if other == named]
            for key in _varying([treatments[number] for number in numbers]):
                for number in numbers:
                    labels[number] = _joined(labels[number], f"{key}={_text(treatments[number].get(key))}")
    return [named or "all runs" for named in labels]


def _joined(*parts: str) -> str:
    return ", ".join(part for part in parts if part)
