"""Writes docs/RESULTS.md and its figures from stored results alone."""

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from experiments.studies.claims import RULE, AbstractClaim, Difference, Finding, overall, paired
from experiments.studies.store import Store
from experiments.studies.study import Study, settings
from experiments.studies.tuning import Tuned, progress
from sborax.evaluate.compare.statistics import Interval

PAGE = Path(__file__).resolve().parents[2] / "docs" / "RESULTS.md"
FIGURES = "results"
"""The folder of figures beside the page."""
HEAD = """\
# Results

What papers on adapters claim, tried on small models. Every arm is at its best learning rate, with several seeds and
95 % intervals. `bash scripts/results.sh` makes this page from the stored results in `experiments/studies/results/`;
`python -m experiments.studies run NAME` adds to them ([sweeps](sweeps.md) and [comparisons](compare.md) say how runs
are trained and compared). A small model and a short run are not those of the papers: a verdict is about what was run.
Where a table has the column *forgotten*, it is the loss of text that the base knew, after training minus before.

In a figure of differences the wide line is the interval over items and the thin one that over seeds. Arms have a colour
where both exclude 0, and their trained parameters stand on the right. The axis is logarithmic beyond 0.1.
In a figure of what was forgotten each arm is a line through its learning rates, and its best one is the large point.
"""


@dataclasses.dataclass(frozen=True)
class Answer:
    """A claim with what every setting says about it."""

    study: Study
    claim: AbstractClaim
    findings: tuple[Finding, ...]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """A study with its tuned arms, by setting and name; None for an arm with pending pieces."""

    study: Study
    arms: Mapping[str, Mapping[str, Tuned | None]]
    done: int
    pieces: int
    devices: tuple[str, ...]

    @classmethod
    def of(cls, study: Study, store: Store) -> "Outcome":
        """From the stored results."""
        arms: dict[str, dict[str, Tuned | None]] = collections.defaultdict(dict)
        all_pieces = []
        for arm in study.arms:
            pieces, tuned = progress(study, arm, store)
            all_pieces += pieces
            arms[arm.setting][arm.name] = tuned
        results = [result for piece in all_pieces if (result := store.get(piece)) is not None]
        devices = tuple(sorted({result["device"] for result in results}))
        return cls(study, arms, len(results), len(all_pieces), devices)

    def answers(self) -> list[Answer]:
        """Every claim, judged in each setting that has its arms."""
        answers = []
        for claim in self.study.claims:
            findings = (claim.find(setting, arms) for setting, arms in self.arms.items())
            answers.append(Answer(self.study, claim, tuple(finding for finding in findings if finding is not None)))
        return answers


def page(outcomes: Sequence[Outcome]) -> str:
    """The text of the page."""
    blocks = [HEAD, "## Claims", RULE, *claims_table(outcomes)]
    for outcome in outcomes:
        study = outcome.study
        blocks += [f"## {study.name}: {study.title}", study.protocol.strip().partition("\n\n")[2]]
        blocks.append(state(outcome))
        for setting in settings(study):
            table = methods_table(outcome, setting)
            blocks += [f"### {study.name}, {setting}", "\n".join(table)] if table else []
            blocks += [
                f"![{study.name}, {setting}: {content}]({FIGURES}/{file_name(study, setting, figure)})"
                for figure, content in figures(outcome, setting).items()
            ]
    return "\n\n".join(block.strip() for block in blocks) + "\n"


def state(outcome: Outcome) -> str:
    """How much of a study was run, and on what."""
    rates, seeds = outcome.study.rates, outcome.study.seeds
    text = (
        f"{len(outcome.study.arms)} arms, {len(rates)} learning rates from {rates[0]:g} to {rates[-1]:g}, {len(seeds)} "
        f"seeds. {outcome.done} of {outcome.pieces} known pieces are done"
    )
    return f"{text}, on {' and '.join(outcome.devices)}." if outcome.devices else f"{text}."


def claims_table(outcomes: Sequence[Outcome]) -> list[str]:
    """The table of claims, one row each."""
    rows = [
        "| claim | made in | study | verdict | difference in nats a token, with 95 % intervals |",
        "|---|---|---|---|---|",
    ]
    for answer in [answer for outcome in outcomes for answer in outcome.answers()]:
        findings = [finding for finding in answer.findings if finding.verdict != "not run yet"]
        verdict = overall([finding.verdict for finding in findings])
        numbers = "<br>".join(f"{finding.setting}: {finding.numbers} ({finding.verdict})" for finding in findings)
        left = [finding.setting for finding in answer.findings if finding.verdict == "not run yet"]
        if left:
            verdict = f"{verdict}, so far" if findings else verdict
            command = f"`python -m experiments.studies run {answer.study.name}`"
            numbers += f"{'<br>' if numbers else ''}{', '.join(left)}: not run yet, {command}"
        paper = f"arXiv:{answer.claim.paper}" if answer.claim.paper else ""
        rows.append(f"| {answer.claim.sentence} | {paper} | {answer.study.name} | **{verdict}** | {numbers} |")
    return ["\n".join(rows)]


def ranked(outcome: Outcome, setting: str) -> list[Tuned]:
    """The tuned arms of a setting that did not diverge at every rate, best first."""
    arms = (tuned for tuned in outcome.arms[setting].values() if tuned is not None and tuned.rates.best is not None)
    return sorted(arms, key=lambda entry: entry.losses().mean())


def reference_of(outcome: Outcome, setting: str) -> Tuned | None:
    """The arm that the others of a setting are compared to; None where it is not tuned."""
    tuned = outcome.arms[setting].get(outcome.study.reference)
    return None if tuned is None or tuned.rates.best is None else tuned


def figures(outcome: Outcome, setting: str) -> dict[str, str]:
    """The figures of a setting, each with what it shows; empty where no arm is tuned."""
    arms = ranked(outcome, setting)
    if not arms:
        return {}
    shown = {"rates": "loss by learning rate", "sizes": "loss by trained parameters"}
    lost = [values.mean() for tuned in arms if (values := tuned.forgotten()) is not None]
    if len(lost) == len(arms) and max(lost) > 0:
        shown["forgetting"] = "what was forgotten by loss, a point for each learning rate"
    if len(arms) > 1 and reference_of(outcome, setting) is not None:
        shown = {"differences": f"difference from {outcome.study.reference}", **shown}
    return shown


def file_name(study: Study, setting: str, figure: str) -> str:
    """The file of a figure, in the folder `FIGURES`."""
    return f"{study.name}-{setting}-{figure}.svg"


def methods_table(outcome: Outcome, setting: str) -> list[str]:
    """The arms of a setting, best first, each against the reference; empty where none is tuned."""
    arms = [tuned for tuned in outcome.arms[setting].values() if tuned is not None]
    alive = ranked(outcome, setting)
    if not alive:
        return []
    reference, name = reference_of(outcome, setting), outcome.study.reference
    lost = {entry.arm.name: values for entry in alive if (values := entry.forgotten()) is not None}
    rows = [
        f"| method | trained | best lr | interior | seeds | loss | minus {name}, over items | over seeds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    if lost:
        rows = [f"{rows[0]} forgotten, over items |", f"{rows[1]}---|"]
    for entry in alive:
        gaps = ["", ""]
        if reference is not None and entry is not reference:
            gap = paired(entry, reference)
            gaps = [signed(gap.items), signed(gap.seeds)]
        inside = "yes" if entry.rates.interior else "no"
        inside += f", extended {entry.extensions} x" if entry.extensions else ""
        forgotten = signed(Difference.of(lost[entry.arm.name]).items) if entry.arm.name in lost else ""
        rows.append(
            f"| {entry.arm.name} | {entry.trained:,} | {entry.best:g} | {inside} | {len(entry.seeds)} "
            f"| {entry.losses().mean():.4f} | {gaps[0]} | {gaps[1]} |" + (f" {forgotten} |" if lost else "")
        )
    end = " | | | | |" + " |" * bool(lost)
    rows += [f"| {entry.arm.name} | | | diverged at every rate{end}" for entry in arms if entry.rates.best is None]
    return rows


def signed(mean: Interval, decimals: int = 4) -> str:
    """A mean with its interval."""
    numbers = [f"{number:+.{decimals}f}" for number in (mean.value, mean.low, mean.high) if number is not None]
    return numbers[0] if mean.low is None else f"{numbers[0]} ({numbers[1]} .. {numbers[2]})"


def write(outcomes: Sequence[Outcome], place: Path = PAGE) -> None:
    """Write the page and its figures, and remove figures that it does not show. They need matplotlib."""
    from experiments.studies.plots import differences_figure, forgetting_figure, rates_figure, sizes_figure

    place.write_text(page(outcomes))
    folder = place.parent / FIGURES
    for file in folder.glob("*.svg"):
        file.unlink()
    for outcome in outcomes:
        for setting in settings(outcome.study):
            arms, reference = ranked(outcome, setting), reference_of(outcome, setting)
            for figure in figures(outcome, setting):
                folder.mkdir(exist_ok=True)
                if figure == "differences":
                    assert reference is not None
                    text = differences_figure(arms, reference)
                else:
                    draw = {"rates": rates_figure, "sizes": sizes_figure, "forgetting": forgetting_figure}[figure]
                    text = draw(arms)
                (folder / file_name(outcome.study, setting, figure)).write_text(text)
