"""Figures of docs/RESULTS.md, as SVG files: differences from the reference, losses by rate and size, forgetting.

They are drawn in the style of `sborax compare`, in colours that a light and a dark page both show. The same numbers
give the same bytes with one version of matplotlib, and carry the same `digest` with all.
"""

import hashlib
import io
import json
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, LogLocator, NullFormatter, NullLocator, StrMethodFormatter

from experiments.studies.claims import Difference, paired
from experiments.studies.tuning import Tuned
from sborax.evaluate.compare.plots import STYLE

GREY = "#808080"
COLOURS = ("#3b82d6", "#d9652b", "#2f9e5b", "#b04fc4", "#c9a017", "#d13f6a", "#1fa3a3", "#8a6d3b")
"""Of the best arms; the others are grey."""
SHADES: dict[Any, Any] = {
    name: GREY
    for name in (
        "axes.edgecolor", "axes.labelcolor", "text.color", "grid.color",
        "xtick.color", "xtick.labelcolor", "ytick.color", "ytick.labelcolor",
    )
}  # fmt: skip
SIZE = (620, 320)
"""Width and height in CSS pixels."""
ROW = 15
"""Height of a row of `differences_figure`, in CSS pixels."""
LINEAR = 0.1
"""Differences up to this size lie on a linear part of the axis, larger ones on a logarithmic one."""
TICKS = (-1.0, -0.3, -0.1, -0.05, 0.0, 0.05, 0.1, 0.3, 1.0, 3.0)


def digest(arms: Sequence[Tuned]) -> str:
    """Sixteen digits for all numbers in the figures of some arms."""
    numbers = [
        [tuned.arm.name, tuned.trained, *(f"{number:.6g}" for number in (*tuned.rates.rates, *tuned.rates.scores))]
        + [f"{number:.6g}" for number in tuned.losses().mean(axis=0)]
        + [f"{number:.6g}" for row in tuned.forgotten_by_rate() for number in row]
        for tuned in arms
    ]
    return hashlib.sha256(json.dumps(numbers).encode()).hexdigest()[:16]


def differences_figure(arms: Sequence[Tuned], reference: Tuned) -> str:
    """The loss of each arm minus the reference's, the best on top, with its trained parameters on the right.

    The wide line is the 95 % interval over items, the thin one that over seeds. An arm has a colour where both exclude
    0: blue below it, orange above.
    """
    others = [tuned for tuned in arms if tuned is not reference]

    def draw(axes: Axes) -> None:
        for row, tuned in enumerate(others):
            gap = paired(tuned, reference)
            colour = COLOURS[0] if gap.below(0.0) else COLOURS[1] if gap.above(0.0) else GREY
            for interval, width in ((gap.items, 4.0), (gap.seeds, 1.2)):
                if interval.low is not None and interval.high is not None:
                    alpha = 0.45 if width > 2 else 1.0
                    axes.hlines(row, interval.low, interval.high, color=colour, linewidth=width, alpha=alpha)
            axes.plot(gap.items.value, row, "o", markersize=4, color=colour)
            beside = {"transform": axes.get_yaxis_transform(), "ha": "right", "va": "center"}
            axes.text(1.12, row, f"{tuned.trained:,}", **beside)
        axes.axvline(0.0, color=GREY, linewidth=0.8)
        axes.set_xscale("symlog", linthresh=LINEAR, linscale=1.5)
        axes.xaxis.set_major_locator(FixedLocator(TICKS))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.set_yticks(range(len(others)), [tuned.arm.name for tuned in others])
        axes.set_ylim(len(others) - 0.4, -0.6)
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel(f"loss minus that of {reference.arm.name}, nats a token")

    return _svg(draw, arms, (SIZE[0], 50 + ROW * len(others)))


def rates_figure(arms: Sequence[Tuned]) -> str:
    """The loss of the selecting items by learning rate, a line each. arms: the best first, none without a best rate."""
    lines = [(np.array(tuned.rates.rates), np.array(tuned.rates.scores)) for tuned in arms]
    finite = np.concatenate([scores[np.isfinite(scores)] for _, scores in lines])
    low, high = float(finite.min()), max(float(np.quantile(finite, 0.75)), max(scores.min() for _, scores in lines))
    pad = 0.05 * (high - low) or 0.05

    def draw(axes: Axes) -> None:
        for place in reversed(range(len(arms))):
            rates, scores = lines[place]
            points = np.where(np.isfinite(scores), scores, np.nan)
            axes.plot(rates, points, "o-", markersize=3.5, **_look(arms, place))
        _log_axis(axes, "{x:g}", (1.0, 3.0))
        # Rates that are worse by far would flatten everything else.
        axes.set_ylim(low - pad, high + pad)
        axes.set_xlabel("learning rate")
        axes.set_ylabel("loss of selecting items, nats a token")

    return _svg(draw, arms)


def sizes_figure(arms: Sequence[Tuned]) -> str:
    """The loss of the reported items by trained parameters, with 95 % intervals over items. arms: the best first."""

    def draw(axes: Axes) -> None:
        for place in reversed(range(len(arms))):
            mean, look = Difference.of(arms[place].losses()).items, _look(arms, place)
            axes.plot(arms[place].trained, mean.value, "o", markersize=5, **look)
            if mean.low is not None and mean.high is not None:
                axes.vlines(arms[place].trained, mean.low, mean.high, **{**look, "label": None})
        _log_axis(axes, "{x:,.0f}", (1.0, 2.0, 5.0))
        axes.set_xlabel("trained parameters")
        axes.set_ylabel("loss, nats a token")

    return _svg(draw, arms)


def forgetting_figure(arms: Sequence[Tuned]) -> str:
    """What an arm forgets by its loss, a point for each learning rate, the best one large. arms: the best first."""
    lines = [np.array(tuned.forgotten_by_rate()).T for tuned in arms]
    at_best = [line[1:, line[0] == tuned.best] for line, tuned in zip(lines, arms, strict=True)]
    low, high = (bound(float(loss[0]) for loss, _ in at_best) for bound in (min, max))

    def draw(axes: Axes) -> None:
        for place in reversed(range(len(arms))):
            look = _look(arms, place)
            axes.plot(*lines[place][1:], "o-", markersize=3, **look)
            axes.plot(*at_best[place], "o", markersize=7, color=look["color"], zorder=look["zorder"] + 1)
        axes.set_yscale("symlog", linthresh=LINEAR, linscale=0.5)
        axes.yaxis.set_major_locator(FixedLocator((0.0, 0.1, 0.3, 1.0, 3.0, 10.0)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        # Rates that are worse by far would flatten everything else.
        axes.set_xlim(low - 0.5 * (high - low), high + 1.5 * (high - low))
        axes.set_xlabel("loss, nats a token")
        axes.set_ylabel("forgotten, nats a token")

    return _svg(draw, arms)


def _log_axis(axes: Axes, form: str, digits: Sequence[float]) -> None:
    """A logarithmic axis with plain numbers at powers of ten times `digits`."""
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=digits))
    axes.xaxis.set_major_formatter(StrMethodFormatter(form))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _look(arms: Sequence[Tuned], place: int) -> dict[str, Any]:
    if place >= len(COLOURS):
        return {"color": GREY, "alpha": 0.45, "linewidth": 1.0, "zorder": 1}
    return {"color": COLOURS[place], "linewidth": 1.5, "zorder": 2, "label": arms[place].arm.name}


def _svg(draw: Any, arms: Sequence[Tuned], size: tuple[int, int] = SIZE) -> str:
    """A figure, with a legend of the arms that are drawn with a label."""
    buffer, mark = io.StringIO(), digest(arms)
    with matplotlib.rc_context({**STYLE, **SHADES, "svg.hashsalt": mark}):
        drawing = Figure(figsize=(size[0] / 72, size[1] / 72), dpi=72, layout="constrained")
        axes = drawing.add_subplot()
        draw(axes)
        axes.grid(alpha=0.3)
        handles, labels = axes.get_legend_handles_labels()
        if labels:
            # Drawn in the reverse order, so that the best lie on top.
            drawing.legend(handles[::-1], labels[::-1], loc="outside right upper", frameon=False)
        metadata = {"Date": None, "Creator": None, "Description": mark}
        drawing.savefig(buffer, format="svg", transparent=True, metadata=metadata)
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines()) + "\n"
