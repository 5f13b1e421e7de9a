"""A comparison as tables: Markdown to read, CSV to compute with."""

import csv
import dataclasses
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from sborax.config.terminal import visible
from sborax.evaluate.compare.groups import RATES_OF, Estimate, Group, Setting, from_base
from sborax.evaluate.compare.rows import Measurement, lower_is_better
from sborax.evaluate.compare.spectra import LEADING, SIMILAR, Weights, summary
from sborax.evaluate.compare.statistics import Interval, front

COSTS: dict[str, tuple[str, Callable[[Group], int | float | None]]] = {
    "trained": ("trained parameters", lambda group: group.trained),
    "memory": ("memory", lambda group: group.memory),
    "step": ("step time", lambda group: group.step_seconds),
}
"""What a score is weighed against, by a short name: its name in words, and its value for a group."""
CONDITIONS = {
    "model": "base",
    "quant": "quantised",
    "precision": "precision",
    "data.name": "data",
    "data.name.given_in_python": "data",
    "data.limit": "samples",
    "eval.data.name": "held-out data",
    "eval.data.name.given_in_python": "held-out data",
    "steps": "steps",
    "epochs": "epochs",
    "batch_size": "rows of a batch",
    "accumulate": "batches of a step",
}
"""Keys of a config that a report names where all its runs agree, and what it calls them."""


@dataclasses.dataclass(frozen=True)
class Table:
    """Text in rows and columns. numbers: whether each column holds numbers, which are set flush right."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    numbers: tuple[bool, ...]


@dataclasses.dataclass(frozen=True)
class Beside:
    """A table of scores that are none of the runs', and the text that goes with it."""

    table: Table
    text: str


def conditions(setting: Setting) -> list[str]:
    """What all runs of a setting have in common, in words."""
    rows = [row for group in setting.groups for row in group.rows]
    shared = []
    for key, words in CONDITIONS.items():
        values = {json.dumps(row.config.get(key)) for row in rows}
        value = rows[0].config.get(key)
        if len(values) == 1 and value is not None:
            shared.append(f"{words} {value:,}" if type(value) is int else f"{words} {value}")
    if RATES_OF in setting.conditions:
        shared.append(f"{RATES_OF} {setting.conditions[RATES_OF]}")
    devices = dict.fromkeys(row.device for row in rows)
    return [*shared, f"device {'; '.join(devices)}"]


def fronts(setting: Setting) -> dict[str, list[bool]]:
    """By cost, which groups of `setting.ranked` are on the Pareto front of the main score and that cost.

    Costs that no group tells are left out, and so are memory and step time where devices differ.
    """
    if not setting.measures:
        return {}
    main, ranked = setting.measures[0], setting.ranked
    measured = [group for group in ranked if main in group.estimates]
    on = {}
    for cost, (_, value) in COSTS.items():
        if cost != "trained" and not setting.same_device:
            continue
        costs = [value(group) for group in measured]
        if any(cost is not None for cost in costs):
            flags = front([group.estimates[main].value for group in measured], costs, lower_is_better(main))
            on[cost] = [*flags, *[False] * (len(ranked) - len(measured))]
    return on


def verdict(estimate: Estimate, measure: str) -> str:
    """The difference from the reference in a word: "better", "worse", "unclear", or nothing where it is not known."""
    if estimate.gap is None or estimate.differs is None:
        return ""
    if not estimate.differs:
        return "unclear"
    return "better" if (estimate.gap.value < 0) == lower_is_better(measure) else "worse"


def scores_table(setting: Setting, measure: str) -> Table:
    """The groups by one measurement, with intervals and differences from the reference."""
    estimates = [(group, group.estimates.get(measure)) for group in setting.ranked]
    by_items = any(estimate is not None and estimate.items is not None for _, estimate in estimates)
    several = len(setting.groups) > 1
    header = ["", "group", measure]
    header += ["95 % over items"] * by_items + ["95 % over seeds", "seeds"]
    if several:
        header += ["difference"] + ["95 % over items"] * by_items + ["95 % over seeds", ""]
    rows = []
    for number, (group, estimate) in enumerate(estimates, start=1):
        row = [str(number), group.label]
        if estimate is None:
            rows.append((*row, "not scored", *[""] * (len(header) - 3)))
            continue
        row += [figure(estimate.value), *[ends(estimate.items)] * by_items, ends(estimate.seeds)]
        row += [str(estimate.seeds.draws)]
        if several:
            gap = "" if estimate.gap is None else figure(estimate.gap.value, sign=True)
            row += ["reference" if group is setting.groups[0] else gap]
            row += [*[ends(estimate.gap_items, sign=True)] * by_items, ends(estimate.gap_seeds, sign=True)]
            row += [verdict(estimate, measure)]
        rows.append(tuple(row))
    numbers = (True, False, *(name != "" for name in header[2:]))
    return Table(measure, tuple(header), tuple(rows), numbers)


def costs_table(setting: Setting) -> Table:
    """The groups by what they cost, with their learning rate; a star marks the Pareto front of the main score."""
    on = fronts(setting)
    columns = [cost for cost in COSTS if cost in on or cost == "trained"]
    header = ["", "group", "lr", "best lr is", "runs", *(COSTS[cost][0] for cost in columns)]
    rows = []
    for number, group in enumerate(setting.ranked, start=1):
        row = [str(number), group.label, rate(group.lr), interior(group), str(len(group.rows))]
        for cost in columns:
            star = " *" if cost in on and on[cost][number - 1] else ""
            row.append(amount(cost, COSTS[cost][1](group)) + star)
        rows.append(tuple(row))
    return Table("Costs", tuple(header), tuple(rows), tuple(name not in ("group", "best lr is") for name in header))


def rates_table(setting: Setting) -> Table | None:
    """Scores by learning rate; None where no group has several."""
    swept = [group for group in setting.ranked if group.rates is not None and len(group.rates.rates) > 1]
    if not swept:
        return None
    rates = sorted({lr for group in swept if group.rates is not None for lr in group.rates.rates})
    rows = []
    for group in swept:
        assert group.rates is not None
        scores = dict(zip(group.rates.rates, group.rates.scores, strict=True))
        cells = ["" if lr not in scores else _starred(figure(scores[lr]), lr == group.rates.best) for lr in rates]
        rows.append((group.label, *cells))
    title = f"{setting.chosen_by} by learning rate"
    return Table(title, ("group", *map(rate, rates)), tuple(rows), (False, *[True] * len(rates)))


def weights_table(setting: Setting, weights: Weights) -> Table | None:
    """What training changed in the weights of each group; None where it is not known of any."""
    rows = []
    for group in setting.ranked:
        if changes := weights.changes.get(group.label):
            means = summary(changes)
            numbers = f"{means.size:.3g}", f"{means.rank:.1f}", f"{means.intruders:.2f}"
            shares = f"{100 * means.moved_rows:.3g} %", f"{100 * means.moved_columns:.3g} %"
            rows.append((group.label, *numbers, *shares, str(means.matrices)))
    header = (
        "group", "size of the change", "rank of the change", f"intruders among {LEADING}", "inputs moved",
        "outputs moved", "matrices",
    )  # fmt: skip
    return Table("Changes of the weights", header, tuple(rows), (False, *[True] * 6)) if rows else None


CHANGES = (
    "Means over the matrices that changed, of the first run of each group. Size: the Frobenius norm of the change over "
    f"that of the weight. Intruders: of the {LEADING} leading singular vectors of the changed weight, how many have a "
    f"cosine below {SIMILAR} with every original one (arXiv:2410.21228)."
)


def base_table(setting: Setting, base: Mapping[str, Measurement]) -> Table | None:
    """Each group's difference from the base model; None where no measurement has the same items."""
    gaps = from_base(setting, base)
    if not gaps:
        return None
    rows = []
    for group in setting.ranked:
        cells = [gaps[measure].get(group.label) for measure in gaps]
        rows.append((
            group.label,
            *("" if gap is None else f"{figure(gap.value, sign=True)} {ends(gap, sign=True)}" for gap in cells),
        ))  # fmt: skip
    return Table("Difference from the base, over items", ("group", *gaps), tuple(rows), (False, *[True] * len(gaps)))


def _starred(text: str, star: bool) -> str:
    return f"{text} *" if star else text


def figure(value: float, sign: bool = False) -> str:
    """A score; one that is not finite is of a run that diverged."""
    if value in (float("inf"), float("-inf")):
        return "diverged"
    return f"{value:+.4f}" if sign else f"{value:.4f}"


def ends(interval: Interval | None, sign: bool = False) -> str:
    """The ends of an interval; empty where it is not known."""
    if interval is None or interval.low is None or interval.high is None:
        return ""
    return f"[{figure(interval.low, sign)}, {figure(interval.high, sign)}]"


def rate(lr: float | None) -> str:
    """A learning rate as short as it can be said: `3e-4`."""
    if lr is None:
        return ""
    mantissa, _, exponent = f"{lr:.3e}".partition("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def interior(group: Group) -> str:
    """Where the best learning rate lies among those that were tried."""
    rates = group.rates
    if rates is None or rates.best is None or rates.interior is None:
        several = len({row.lr for row in group.rows}) > 1
        return "" if group.lr is None or (several and rates is None) else "one scored" if several else "one tried"
    if rates.interior:
        return "interior"
    return "the lowest tried" if rates.best == rates.rates[0] else "the highest tried"


def amount(cost: str, value: int | float | None) -> str:
    """A cost with its unit."""
    if value is None:
        return ""
    if cost == "trained":
        return f"{value:,.0f}"
    if cost == "memory":
        return f"{value / 2**30:,.2f} GiB" if value >= 2**30 else f"{value / 2**20:,.1f} MiB"
    return f"{value:.3g} s" if value >= 1.0 else f"{1000 * value:.3g} ms"


READING = (
    "Intervals hold 95 %. Over items: other items, the same seeds; the bootstrap draws the same items for all groups, "
    "so that differences are paired. Over seeds: other seeds, by Student's t; differences are paired where the seeds "
    "are the same. A difference is called better or worse where every interval that is known excludes 0, and unclear "
    "elsewhere. No correction is made for how many groups are compared."
)
STARS = "A star marks the Pareto front: no group is as good for less."


def tables(setting: Setting, weights: Weights, base: Mapping[str, Measurement] = MappingProxyType({})) -> list[Table]:
    """All tables of a setting. base: the measurements of the base model."""
    optional = (base_table(setting, base), rates_table(setting), weights_table(setting, weights))
    return [
        *(scores_table(setting, measure) for measure in setting.measures),
        costs_table(setting),
        *(table for table in optional if table is not None),
    ]


def markdown(
    settings: Sequence[Setting],
    weights: Sequence[Weights],
    base: Mapping[str, Measurement] = MappingProxyType({}),
    beside: Sequence[Beside | None] | None = None,
) -> str:
    """The report as Markdown.

    Args:
    - weights: of each setting.
    - base: the measurements of the base model.
    - beside: published scores, of each setting; None for none.
    """
    lines = ["# Comparison", "", READING, STARS, ""]
    for setting, changed, printed in zip(settings, weights, beside or [None] * len(settings), strict=True):
        lines += [f"## {_escaped(setting.title or 'All runs')}", "", _escaped("; ".join(conditions(setting))), ""]
        for table in tables(setting, changed, base):
            lines += [f"### {_escaped(table.title)}", "", *_markdown_rows(table), ""]
        if changed.changes:
            lines += [_escaped(CHANGES), ""]
        if printed is not None:
            lines += [f"### {_escaped(printed.table.title)}", "", *_markdown_rows(printed.table), ""]
            lines += [_escaped(printed.text), ""]
        if notes := (*setting.notes, *changed.notes):
            lines += ["### Notes", "", *(f"- {_escaped(note)}" for note in notes), ""]
    return "\n".join(lines)


def _markdown_rows(table: Table) -> Iterator[str]:
    yield f"| {' | '.join(map(_escaped, table.header))} |"
    yield "|" + "".join("--:|" if number else "---|" for number in table.numbers)
    for row in table.rows:
        yield f"| {' | '.join(map(_escaped, row))} |"


def _escaped(text: str) -> str:
    """Text for a cell or a line: what Markdown would obey is written out. Names may be anybody's."""
    text = " ".join(visible(text).split())
    for letter in "\\`*_[]<>|":
        text = text.replace(letter, f"\\{letter}")
    return text


COLUMNS = (
    "setting", "group", "reference", "measure", "value", "items", "low_items", "high_items", "seeds", "low_seeds",
    "high_seeds", "difference", "difference_low_items", "difference_high_items", "difference_low_seeds",
    "difference_high_seeds", "verdict", "lr", "lr_interior", "runs", "diverged", "trained_parameters", "memory_bytes",
    "step_seconds", "front_trained", "front_memory", "front_step",
)  # fmt: skip


def csv_text(settings: Sequence[Setting]) -> str:
    """The report as CSV: one line for every group and measurement."""
    buffer = io.StringIO()
    writer: csv.DictWriter[str] = csv.DictWriter(buffer, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for setting in settings:
        on = fronts(setting)
        for number, group in enumerate(setting.ranked):
            about = {
                "setting": setting.title,
                "group": group.label,
                "reference": setting.groups[0].label,
                "lr": group.lr,
                "lr_interior": None if group.rates is None else group.rates.interior,
                "runs": len(group.rows),
                "diverged": group.diverged,
                "trained_parameters": group.trained,
                "memory_bytes": group.memory,
                "step_seconds": group.step_seconds,
                **{f"front_{cost}": flags[number] for cost, flags in on.items()},
            }
            for measure, estimate in group.estimates.items():
                writer.writerow(about | {"measure": measure, **_numbers(estimate, measure)})
            if not group.estimates:
                writer.writerow(about)
    return buffer.getvalue()


def _numbers(estimate: Estimate, measure: str) -> dict[str, Any]:
    numbers: dict[str, Any] = {"value": estimate.value, "verdict": verdict(estimate, measure)}
    if estimate.gap is not None:
        numbers["difference"] = estimate.gap.value
    for prefix, intervals in (
        ("", (estimate.items, estimate.seeds)),
        ("difference_", (estimate.gap_items, estimate.gap_seeds)),
    ):
        for over, interval in zip(("items", "seeds"), intervals, strict=True):
            if interval is not None:
                numbers |= {f"{prefix}low_{over}": interval.low, f"{prefix}high_{over}": interval.high}
    numbers["seeds"] = estimate.seeds.draws
    numbers["items"] = None if estimate.items is None else estimate.items.draws
    return numbers
