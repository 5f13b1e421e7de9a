"""Writes docs/RESULTS.md from stored results alone."""

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from experiments.studies.claims import RULE, AbstractClaim, Finding, overall, paired
from experiments.studies.store import Store
from experiments.studies.study import Study, settings
from experiments.studies.tuning import Tuned, progress

PAGE = Path(__file__).resolve().parents[2] / "docs" / "RESULTS.md"
HEAD = """\
# Results

What papers on adapters claim, tried on small models. Every arm is at its best learning rate, with several seeds and
95 % intervals. `bash scripts/results.sh` makes this page from the stored results in `experiments/studies/results/`;
`python -m experiments.studies run NAME` adds to them ([sweeps](sweeps.md) and [comparisons](compare.md) say how runs
are trained and compared). A small model and a short run are not those of the papers: a verdict is about what was run.
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
        known = []
        for arm in study.arms:
            pieces, tuned = progress(study, arm, store)
            known += pieces
            arms[arm.setting][arm.name] = tuned
        results = [result for piece in known if (result := store.get(piece)) is not None]
        devices = tuple(sorted({result["device"] for result in results}))
        return cls(study, arms, len(results), len(known), devices)

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
        known = [finding for finding in answer.findings if finding.verdict != "not run yet"]
        verdict = overall([finding.verdict for finding in known])
        numbers = "<br>".join(f"{finding.setting}: {finding.numbers} ({finding.verdict})" for finding in known)
        left = [finding.setting for finding in answer.findings if finding.verdict == "not run yet"]
        if left:
            command = f"`python -m experiments.studies run {answer.study.name}`"
            numbers += f"{'<br>' if numbers else ''}{', '.join(left)}: not run yet, {command}"
        paper = f"arXiv:{answer.claim.paper}" if answer.claim.paper else ""
        rows.append(f"| {answer.claim.sentence} | {paper} | {answer.study.name} | **{verdict}** | {numbers} |")
    return ["\n".join(rows)]


def methods_table(outcome: Outcome, setting: str) -> list[str]:
    """The arms of a setting, best first, each against the reference; empty where none is tuned."""
    arms = [tuned for tuned in outcome.arms[setting].values() if tuned is not None]
    alive = sorted((each for each in arms if each.rates.best is not None), key=lambda each: each.losses().mean())
    if not alive:
        return []
    reference = next((each for each in alive if each.arm.name == outcome.study.reference), None)
    name = outcome.study.reference
    rows = [
        f"| method | trained | best lr | interior | seeds | loss | minus {name}, over items | over seeds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for each in alive:
        gaps = ["", ""]
        if reference is not None and each is not reference:
            gap = paired(each, reference)
            gaps = [
                f"{mean.value:+.4f}" + ("" if mean.low is None else f" ({mean.low:+.4f} .. {mean.high:+.4f})")
                for mean in (gap.items, gap.seeds)
            ]
        inside = "yes" if each.rates.interior else "no"
        inside += f", extended {each.extensions} x" if each.extensions else ""
        rows.append(
            f"| {each.arm.name} | {each.trained:,} | {each.best:g} | {inside} | {len(each.seeds)} "
            f"| {each.losses().mean():.4f} | {gaps[0]} | {gaps[1]} |"
        )
    rows += [f"| {each.arm.name} | | | diverged at every rate | | | | |" for each in arms if each.rates.best is None]
    return rows


def write(outcomes: Sequence[Outcome], place: Path = PAGE) -> None:
    """Write the page."""
    place.write_text(page(outcomes))
