"""Figures of a comparison as inline SVG, drawn by matplotlib, which `sborax[report]` installs.

Colours are those of the page, as CSS variables, so that one figure serves a light and a dark page. Figures are drawn
at the size at which a narrow screen shows them, so that text stays legible there; a wide screen shows several side by
side.
"""

import html
import io
import re
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from sborax.evaluate.compare.groups import Group, Setting
from sborax.evaluate.compare.rows import HELD_OUT, Curve, lower_is_better
from sborax.evaluate.compare.spectra import Weights, regions, summary
from sborax.evaluate.compare.tables import COSTS, amount, figure, rate

INK, MUTED, GRID, ACCENT, FRONT, PAPER = "#010101", "#020202", "#030303", "#040404", "#050505", "#060606"
VARIABLES = {
    INK: "--ink", MUTED: "--muted", GRID: "--grid", ACCENT: "--accent", FRONT: "--front", PAPER: "--paper",
}  # fmt: skip
"""Stand-ins for the colours of the page, which matplotlib cannot write as CSS variables."""
LARGE, SMALL = (380, 270), (184, 126)
"""Width and height of a figure and of one of many small ones, in CSS pixels."""
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 10.0,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.8,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "text.color": INK,
    "xtick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.color": MUTED,
    "ytick.labelcolor": INK,
}
SMALLER: dict[Any, Any] = {"font.size": 9.0}
OTHERS = 0.6
"""Opacity of the lines of other groups."""
FAR = 3.0
"""Scores farther from the best than this many times the distance of the third quartile are drawn at the edge."""
POINT = "point"
"""Before the number of a group in the id of its mark, which is where its tooltip goes."""


def _draw(size: tuple[int, int]) -> tuple[Figure, Axes]:
    drawing = Figure(figsize=(size[0] / 72, size[1] / 72), dpi=72, layout="constrained")
    return drawing, drawing.add_subplot()


def _svg(drawing: Figure, key: str, label: str, tips: Sequence[str] = ()) -> str:
    """A figure for the page.

    Args:
    - key: goes before every id in the figure, since ids are those of the whole page.
    - label: what a screen reader says.
    - tips: tooltips of the marks with the ids `POINT` and a number.
    """
    buffer = io.StringIO()
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": key}):
        drawing.savefig(buffer, format="svg", transparent=True)
    width, height = drawing.get_size_inches() * 72
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    head = (
        f'<svg viewBox="0 0 {width:g} {height:g}" style="max-width: {1.2 * width:g}px" role="img" '
        f'aria-label="{html.escape(label)}">'
    )
    text = re.sub(r"<svg\b[^>]*>", lambda _: head, text, count=1)
    # In HTML, names of SVG need no namespaces.
    text = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", text).replace("xlink:href", "href")
    text = re.sub(r'(\bid="|href="#|url\(#)', lambda match: f"{match[1]}{key}-", text)
    for colour, variable in VARIABLES.items():
        text = text.replace(colour, f"var({variable})")
    for number, tip in enumerate(tips):
        mark = f'<g id="{key}-{POINT}-{number}">'
        text = text.replace(mark, f"{mark}<title>{html.escape(tip)}</title>")
    return text


def scores_figure(setting: Setting, measure: str, key: str) -> str:
    """Every group's score with its interval, the best on top; its label stands above its line."""
    groups = [group for group in setting.ranked if measure in group.estimates]
    if not lower_is_better(measure) or measure != setting.measures[0]:
        sign = 1.0 if lower_is_better(measure) else -1.0
        groups.sort(key=lambda group: sign * group.estimates[measure].value)
    with matplotlib.rc_context(STYLE):
        drawing, axes = _draw((LARGE[0], 62 + 30 * len(groups)))
        tips = []
        for number, group in enumerate(groups):
            estimate = group.estimates[measure]
            interval = estimate.interval
            if interval.low is not None and interval.high is not None:
                axes.plot([interval.low, interval.high], [number, number], color=ACCENT, linewidth=2.0)
            axes.plot(estimate.value, number, "o", color=ACCENT, markersize=6, gid=f"{POINT}-{number}")
            across = axes.get_yaxis_transform()
            # Lines of the grid and of the reference end at a label.
            behind = {"facecolor": PAPER, "edgecolor": "none", "pad": 1.0}
            axes.text(
                0.0, number - 0.3, _cut(group.label, 62), transform=across, fontsize=9.5, va="bottom", bbox=behind
            )  # fmt: skip
            tips.append(f"{group.label}: {figure(estimate.value)}")
        reference = setting.groups[0].estimates.get(measure)
        if reference is not None and len(groups) > 1:
            axes.axvline(reference.value, color=MUTED, linewidth=0.8, linestyle=(0, (4, 3)), zorder=0)
        axes.set_ylim(len(groups) - 0.5, -0.9)
        axes.yaxis.set_major_locator(NullLocator())
        axes.spines["left"].set_visible(False)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.grid(axis="x")
        axes.set_axisbelow(True)
        axes.set_xlabel(_axis(measure))
    return _svg(drawing, key, f"{measure} of every group with its interval", tips)


def front_figure(setting: Setting, cost: str, flags: Sequence[bool], key: str) -> str:
    """The main score against a cost, the Pareto front joined, and points numbered as in the tables."""
    measure, (words, value) = setting.measures[0], COSTS[cost]
    points = []
    for number, (group, on) in enumerate(zip(setting.ranked, flags, strict=True), start=1):
        spent = value(group)
        if measure in group.estimates and spent is not None:
            points.append((spent, group.estimates[measure], number, on, group.label))
    with matplotlib.rc_context(STYLE):
        drawing, axes = _draw(LARGE)
        spread = [point[0] for point in points]
        if min(spread) > 0 and max(spread) > 8 * min(spread):
            axes.set_xscale("log")
        joined = sorted((spent, estimate.value) for spent, estimate, _, on, _ in points if on)
        axes.plot(*zip(*joined, strict=True), drawstyle="steps-post", color=FRONT, linewidth=1.2, zorder=1)
        for at, (spent, estimate, _, on, _) in enumerate(points):
            interval, colour = estimate.interval, FRONT if on else MUTED
            if interval.low is not None and interval.high is not None:
                axes.vlines(spent, interval.low, interval.high, color=colour, linewidth=1.2, alpha=0.6, zorder=2)
            fill = colour if on else "none"
            axes.plot(
                spent, estimate.value, "o", markersize=7, markerfacecolor=fill, markeredgecolor=colour, zorder=3,
                gid=f"{POINT}-{at}",
            )  # fmt: skip
        axes.xaxis.set_major_formatter(FuncFormatter(lambda spent, _: _short(cost, spent)))
        axes.xaxis.set_minor_locator(NullLocator())
        if axes.get_xscale() == "linear":
            axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.margins(0.1)
        axes.grid()
        axes.set_axisbelow(True)
        axes.set_xlabel(words)
        axes.set_ylabel(_axis(measure))
        front_first = sorted(points, key=lambda point: not point[3])
        _number_points(axes, [(spent, estimate.value, str(number)) for spent, estimate, number, _, _ in front_first])
    tips = [
        f"{number}. {label}: {figure(estimate.value)}, {amount(cost, spent)}"
        for spent, estimate, number, _, label in points
    ]
    return _svg(drawing, key, f"{measure} against {words}", tips)


def _number_points(axes: Axes, points: Sequence[tuple[int | float, float, str]]) -> None:
    """Numbers beside points, where they overlap neither each other nor a point; numbers without room are left out.

    - points: x, y and number, those to be numbered first in front.
    """
    axes.figure.draw_without_rendering()  # type: ignore[union-attr]
    places = axes.transData.transform([(x, y) for x, y, _ in points]) if points else np.zeros((0, 2))
    boxes: list[tuple[float, float, float, float]] = [(x - 4, y - 4, x + 4, y + 4) for x, y in places]
    for (x, y), (left, up, text) in zip(places, points, strict=True):
        width, height = 6.0 * len(text), 9.0
        for across, above in ((5, 5), (-5 - width, 5), (5, -5 - height), (-5 - width, -5 - height)):
            box = (x + across, y + above, x + across + width, y + above + height)
            if not any(box[0] < o[2] and o[0] < box[2] and box[1] < o[3] and o[1] < box[3] for o in boxes):
                axes.annotate(
                    text, (left, up), xytext=(across, above), textcoords="offset pixels", fontsize=9.5, va="bottom"
                )  # fmt: skip
                boxes.append(box)
                break


def curves_of(group: Group) -> list[Curve]:
    """The losses of a group's runs at its learning rate: held-out ones, or where there are none those of training."""
    held_out = [row.held_out for row in group.best if len(row.held_out) > 1]
    return held_out or [_smooth(row.losses) for row in group.best if row.losses]


def curves_are_held_out(setting: Setting) -> bool:
    """Whether `curves_of` gives held-out losses for every group."""
    return all(len(row.held_out) > 1 for group in setting.groups for row in group.best)


def _smooth(curve: Curve, points: int = 40) -> Curve:
    """Means of so many equal parts of a training curve, each at its last step."""
    parts = np.array_split(np.array(curve), min(points, len(curve)))
    return tuple((int(part[-1, 0]), float(part[:, 1].mean())) for part in parts)


def _band(curves: Sequence[Curve]) -> tuple[np.ndarray, np.ndarray]:
    """Steps that all curves have, and the losses there, one row a curve."""
    by_step = [dict(curve) for curve in curves]
    steps = sorted(set.intersection(*map(set, by_step)))
    return np.array(steps), np.array([[losses[step] for step in steps] for losses in by_step])


def curve_figures(setting: Setting, key: str) -> list[tuple[Group, str]]:
    """The losses of each group over the others' in grey: the mean over seeds and a band from the least to the most."""
    bands = {id(group): _band(curves) for group in setting.ranked if (curves := curves_of(group))}
    bands = {group: band for group, band in bands.items() if band[0].size}
    if not bands:
        return []
    all_losses = [losses for _, losses in bands.values()]
    low, high = min(losses.min() for losses in all_losses), max(np.median(losses[:, 0]) for losses in all_losses)
    pad = 0.05 * (high - low) or 0.05
    figures = []
    for number, group in enumerate(setting.ranked):
        if id(group) not in bands:
            continue
        with matplotlib.rc_context(STYLE | SMALLER):
            drawing, axes = _draw(SMALL)
            for other, (steps, losses) in bands.items():
                if other != id(group):
                    axes.plot(steps, losses.mean(0), color=MUTED, alpha=OTHERS, linewidth=1.0)
            steps, losses = bands[id(group)]
            axes.fill_between(steps, losses.min(0), losses.max(0), color=ACCENT, alpha=0.25, linewidth=0)
            axes.plot(steps, losses.mean(0), color=ACCENT, linewidth=1.6)
            axes.set_ylim(low - pad, high + pad)
            axes.xaxis.set_major_locator(MaxNLocator(3, integer=True))
            axes.yaxis.set_major_locator(MaxNLocator(4))
            axes.set_xlabel("step")
            axes.set_ylabel("loss")
        figures.append((group, _svg(drawing, f"{key}-{number}", f"loss of {group.label} by step")))
    return figures


def rate_figures(setting: Setting, key: str) -> list[tuple[Group, str]]:
    """Each group's score by learning rate over the others' in grey. Its best is ringed; crosses on top diverged."""
    swept = [group for group in setting.ranked if group.rates is not None and len(group.rates.rates) > 1]
    lines = {id(group): _rates(group) for group in swept}
    finite = np.concatenate([scores[np.isfinite(scores)] for _, scores in lines.values()] or [np.zeros(0)])
    if not finite.size or setting.chosen_by is None:
        return []
    lower = lower_is_better(setting.chosen_by)
    best = [scores[np.isfinite(scores)] for _, scores in lines.values()]
    tops = [(part.min() if lower else part.max()) for part in best if part.size]
    # Rates that are worse by far would flatten everything else: they are drawn at the edge.
    worst = max(np.quantile(finite, 0.75), max(tops)) if lower else min(np.quantile(finite, 0.25), min(tops))
    last, top = (finite.max(), min(tops)) if lower else (finite.min(), max(tops))
    worst = last if abs(last - top) <= FAR * abs(worst - top) else worst
    low, high = (min(tops), worst) if lower else (worst, max(tops))
    pad = 0.08 * (high - low) or 0.05
    edge = high + pad if lower else low - pad
    all_rates = sorted({lr for rates, _ in lines.values() for lr in rates})
    figures = []
    for number, group in enumerate(swept):
        assert group.rates is not None
        with matplotlib.rc_context(STYLE | SMALLER):
            drawing, axes = _draw(SMALL)
            for other, (rates, scores) in lines.items():
                if other != id(group):
                    axes.plot(rates, np.clip(scores, low - pad, high + pad), color=MUTED, alpha=OTHERS, linewidth=1.0)
            rates, scores = lines[id(group)]
            points = np.clip(scores, low - pad, high + pad)
            axes.plot(rates, points, "o-", color=ACCENT, linewidth=1.6, markersize=3.5, clip_on=False)
            mask = ~np.isfinite(scores)
            axes.plot(rates[mask], np.full(mask.sum(), edge), "x", color=FRONT, markersize=6, clip_on=False, zorder=4)
            if group.rates.best is not None:
                at = group.rates.rates.index(group.rates.best)
                axes.plot(rates[at], scores[at], "o", markersize=8, markerfacecolor="none", markeredgecolor=FRONT)
            axes.set_xscale("log")
            axes.set_xlim(all_rates[0] / 1.5, all_rates[-1] * 1.5)
            axes.set_ylim(low - pad, high + pad)
            axes.set_xticks([all_rates[0], all_rates[-1]], [rate(all_rates[0]), rate(all_rates[-1])])
            axes.set_xticks(all_rates, [""] * len(all_rates), minor=True)
            axes.yaxis.set_major_locator(MaxNLocator(4))
            axes.set_xlabel("learning rate")
            axes.set_ylabel(setting.chosen_by.rpartition(" ")[2])
        label = f"{setting.chosen_by} of {group.label} by learning rate"
        figures.append((group, _svg(drawing, f"{key}-{number}", label)))
    return figures


def _rates(group: Group) -> tuple[np.ndarray, np.ndarray]:
    assert group.rates is not None
    return np.array(group.rates.rates), np.array(group.rates.scores)


def spectrum_figures(setting: Setting, weights: Weights, key: str) -> list[tuple[Group, str]]:
    """Each group's singular values of the change, median over matrices, over the others' in grey."""
    groups = [group for group in setting.ranked if weights.changes.get(group.label)]
    lines = {id(group): summary(weights.changes[group.label]).spectrum for group in groups}
    if not lines:
        return []
    top = max(float(values.max()) for values in lines.values())
    low = top * 1e-4
    longest = max(len(values) for values in lines.values())
    figures = []
    for number, group in enumerate(groups):
        with matplotlib.rc_context(STYLE | SMALLER):
            drawing, axes = _draw(SMALL)
            for other, values in lines.items():
                sizes = np.where(values > low, values, np.nan)
                if other != id(group):
                    axes.plot(np.arange(1, len(values) + 1), sizes, color=MUTED, alpha=OTHERS, linewidth=1.0)
                else:
                    axes.plot(np.arange(1, len(values) + 1), sizes, ".-", color=ACCENT, linewidth=1.6, zorder=3)
            axes.set_yscale("log")
            axes.set_ylim(low, 2 * top)
            axes.set_xlim(0, longest + 1)
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: rate(value)))
            axes.yaxis.set_minor_locator(NullLocator())
            axes.xaxis.set_major_locator(MaxNLocator(3, integer=True))
            axes.set_xlabel("singular value")
            axes.set_ylabel("size")
        figures.append((group, _svg(drawing, f"{key}-{number}", f"spectrum of the change by {group.label}")))
    return figures


def region_figures(setting: Setting, weights: Weights, key: str) -> list[tuple[str, str]]:
    """Maps of the rows or columns that moved, for groups that leave some alone; with captions."""
    figures = []
    for place, group in enumerate(setting.ranked):
        for number, (kernel, mask) in enumerate(regions(weights.changes.get(group.label, ())).items()):
            with matplotlib.rc_context(STYLE | SMALLER):
                drawing, axes = _draw((SMALL[0], 74 + min(120, 8 * len(mask))))
                share = _binned(mask, 120)
                # A picture has no CSS variables: one colour that stands out on both papers, as opaque as rows moved.
                picture = np.empty((*share.shape, 4))
                picture[..., :3], picture[..., 3] = np.array([0x3B, 0x82, 0xD6]) / 255, 0.12 + 0.88 * share
                extent = (0, mask.shape[1], len(mask) - 0.5, -0.5)
                axes.imshow(picture, aspect="auto", interpolation="nearest", extent=extent)
                axes.xaxis.set_major_locator(MaxNLocator(3, integer=True))
                axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
                axes.set_xlabel(kernel.rpartition(", ")[2])
                axes.set_ylabel("layer")
            caption = f"{group.label}: {kernel}, {100 * mask.mean():.3g} % moved"
            figures.append((caption, _svg(drawing, f"{key}-{place}-{number}", caption)))
    return figures


def _binned(mask: np.ndarray, most: int) -> np.ndarray:
    """Shares of entries that moved in at most so many equal parts of each row."""
    parts = np.array_split(np.arange(mask.shape[1]), min(most, mask.shape[1]))
    return np.stack([mask[:, part].mean(axis=1) for part in parts], axis=1)


def rank_figures(setting: Setting, weights: Weights, key: str) -> list[tuple[str, str]]:
    """Ranks by layer of groups whose layers differ in rank; with captions."""
    figures = []
    for place, group in enumerate(setting.ranked):
        for number, (kernel, ranks) in enumerate(weights.ranks.get(group.label, {}).items()):
            with matplotlib.rc_context(STYLE | SMALLER):
                drawing, axes = _draw(SMALL)
                axes.bar(range(len(ranks)), ranks, color=ACCENT, width=0.8)
                axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
                axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
                axes.set_xlabel("layer")
                axes.set_ylabel("rank")
            caption = f"{group.label}: {kernel}, {sum(ranks):,} in all"
            figures.append((caption, _svg(drawing, f"{key}-{place}-{number}", caption)))
    return figures


def _axis(measure: str) -> str:
    if measure.endswith("loss"):
        return f"{measure}, nats a token" if measure != HELD_OUT else "held-out loss, nats a token"
    return measure


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _short(cost: str, value: int | float) -> str:
    """A tick of an axis of costs."""
    if cost != "trained":
        return amount(cost, value)
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"
