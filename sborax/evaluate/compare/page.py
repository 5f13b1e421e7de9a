"""A comparison as one HTML page that needs no other file and no network."""

import dataclasses
import importlib.resources
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType

import jinja2
from markupsafe import Markup

from sborax.config.terminal import visible
from sborax.evaluate.compare import plots
from sborax.evaluate.compare.groups import Group, Setting
from sborax.evaluate.compare.rows import Measurement
from sborax.evaluate.compare.spectra import Weights
from sborax.evaluate.compare.tables import (
    CHANGES,
    READING,
    STARS,
    Beside,
    Table,
    base_table,
    conditions,
    costs_table,
    fronts,
    interior,
    rate,
    rates_table,
    scores_table,
    weights_table,
)

TITLE = "Comparison"
FEW = 8
"""Groups up to which every measurement has a figure beside its table."""


@dataclasses.dataclass(frozen=True)
class Block:
    """A part of a section: a heading with text, a table and figures with captions.

    - figures: (caption, SVG). small: whether they are small ones, many to a row.
    """

    title: str
    text: str = ""
    table: Table | None = None
    figures: Sequence[tuple[str, Markup]] = ()
    small: bool = False


@dataclasses.dataclass(frozen=True)
class Section:
    """One setting of the page."""

    title: str
    conditions: str
    blocks: Sequence[Block]
    notes: Sequence[str]


def page(
    settings: Sequence[Setting],
    weights: Sequence[Weights],
    base: Mapping[str, Measurement] = MappingProxyType({}),
    beside: Sequence[Beside | None] | None = None,
) -> str:
    """The page, with figures inline.

    Args:
    - weights: of each setting.
    - base: the measurements of the base model.
    - beside: published scores, of each setting; None for none.
    """
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string((importlib.resources.files("sborax.evaluate.compare") / "page.html").read_text())
    sections = [
        Section(
            setting.title or "All runs",
            "; ".join(conditions(setting)),
            [
                *_blocks(setting, base, f"s{number}"),
                *([] if printed is None else [Block(printed.table.title, printed.text, printed.table)]),
                *_weight_blocks(setting, changed, f"s{number}"),
            ],
            (*setting.notes, *changed.notes),
        )
        for number, (setting, changed, printed) in enumerate(
            zip(settings, weights, beside or [None] * len(settings), strict=True)
        )
    ]
    return visible(template.render(title=TITLE, reading=READING, stars=STARS, sections=sections))


def _blocks(setting: Setting, base: Mapping[str, Measurement], key: str) -> Iterator[Block]:
    if setting.measures:
        main = setting.measures[0]
        yield Block(
            _title(main), table=scores_table(setting, main), figures=list(_main_figures(setting, f"{key}-main"))
        )
    yield Block("Costs", table=costs_table(setting))
    if (differences := base_table(setting, base)) is not None:
        yield Block(differences.title, table=differences)
    curves = plots.curve_figures(setting, f"{key}-curve")
    if curves:
        kind = "Held-out loss" if plots.curves_are_held_out(setting) else "Loss"
        text = (
            "Mean over seeds at the group's learning rate; the band reaches from the least to the most. Others in grey."
        )
        figures = [(_numbered(setting, group), Markup(drawing)) for group, drawing in curves]
        yield Block(f"{kind} by step", text, figures=figures, small=True)
    rates = plots.rate_figures(setting, f"{key}-rate")
    if rates:
        text = "Ringed: the best. Crosses on the edge: runs that diverged. Scores beyond the edge are drawn on it."
        figures = [(f"{_numbered(setting, group)}: {_best(group)}", Markup(drawing)) for group, drawing in rates]
        yield Block(f"{_title(setting.chosen_by or '')} by learning rate", text, rates_table(setting), figures, True)
    for number, measure in enumerate(setting.measures[1:]):
        charts = [("", Markup(plots.scores_figure(setting, measure, f"{key}-m{number}")))] if _few(setting) else []
        yield Block(_title(measure), table=scores_table(setting, measure), figures=charts)


def _weight_blocks(setting: Setting, weights: Weights, key: str) -> Iterator[Block]:
    if (table := weights_table(setting, weights)) is not None:
        spectra = plots.spectrum_figures(setting, weights, f"{key}-spectrum")
        captions = [(_numbered(setting, group), Markup(drawing)) for group, drawing in spectra]
        text = f"{CHANGES} Figures: singular values of the change over the norm of the weight, medians over matrices."
        yield Block(table.title, text, table, captions, small=True)
    if maps := plots.region_figures(setting, weights, f"{key}-region"):
        text = "Inputs (rows) and outputs (columns) of each layer that training changed; the others kept every bit."
        yield Block("Regions that moved", text, figures=[(caption, Markup(map_)) for caption, map_ in maps], small=True)
    if ranks := plots.rank_figures(setting, weights, f"{key}-rank"):
        yield Block("Ranks by layer", figures=[(caption, Markup(bars)) for caption, bars in ranks], small=True)


def _main_figures(setting: Setting, key: str) -> Iterator[tuple[str, Markup]]:
    main = setting.measures[0]
    caption = "Dashed: the reference." if len(setting.groups) > 1 else ""
    yield caption, Markup(plots.scores_figure(setting, main, key))
    for cost, flags in fronts(setting).items():
        if any(flags):
            drawing = plots.front_figure(setting, cost, flags, f"{key}-{cost}")
            yield "Filled and joined: the Pareto front. Numbers as in the table.", Markup(drawing)


def _few(setting: Setting) -> bool:
    return len(setting.groups) <= FEW


def _title(measure: str) -> str:
    return measure[:1].upper() + measure[1:]


def _numbered(setting: Setting, group: Group) -> str:
    return f"{setting.ranked.index(group) + 1}. {group.label}"


def _best(group: Group) -> str:
    return f"{rate(group.lr)}, {interior(group)}" if group.lr is not None else "every rate diverged"
