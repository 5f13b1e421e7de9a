"""Run the arms of a claim again, and compare the difference with the stored one."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

from experiments.studies.claims import Beats, Difference, paired
from experiments.studies.pieces import run_piece
from experiments.studies.store import Store
from experiments.studies.study import Arm, Piece, Study, settings
from experiments.studies.tuning import Tuned, progress
from sborax.adapters.core import SboraxError


@dataclasses.dataclass(frozen=True)
class Repeated:
    """A difference of two arms, as it is stored and as it was measured again.

    - seeds: those of the second measurement.
    """

    setting: str
    stored: Difference
    again: Difference
    seeds: tuple[int, ...]

    @property
    def inside(self) -> bool:
        """Whether the mean of the second measurement lies in every interval of the first."""
        value = self.again.seeds.value
        return not any(
            interval.low is None or interval.high is None or not interval.low <= value <= interval.high
            for interval in self.stored.intervals
        )

    def __str__(self) -> str:
        place = "inside the stored intervals" if self.inside else "OUTSIDE the stored intervals"
        seeds = ", ".join(map(str, self.seeds))
        return f"{self.setting}: stored {self.stored}; again {self.again}, seeds {seeds}: {place}"


def claim_of(study: Study, text: str) -> Beats:
    """The claim about a difference whose sentence holds a text.

    Raises SboraxError if none or several do.
    """
    claims = [claim for claim in study.claims if isinstance(claim, Beats) and text.lower() in claim.sentence.lower()]
    # A sentence that is the text itself goes before longer ones.
    claims = [claim for claim in claims if claim.sentence.lower() == text.lower()] or claims
    if len(claims) != 1:
        sentences = "; ".join(claim.sentence for claim in claims or study.claims if isinstance(claim, Beats))
        raise SboraxError(f"{text!r}: {'several claims' if claims else 'no claim'} of {study.name}: {sentences}")
    return claims[0]


def repeat(
    study: Study,
    claim: Beats,
    store: Store,
    work: Path,
    seeds: Sequence[int] = (),
    echo: Callable[[str], None] = print,
) -> list[Repeated]:
    """Train both arms of a claim at their stored best rates, in every setting with results.

    - store: the results to compare with; nothing is added.
    - work: a folder for run directories.
    - seeds: by default those of the stored results.

    Raises SboraxError if no setting has results of both arms.
    """
    repeated = []
    for setting in settings(study):
        arms = {arm.name: arm for arm in study.arms if arm.setting == setting}
        tuned = {name: progress(study, arms[name], store)[1] for name in claim.needs(tuple(arms))}
        stored = [entry for entry in tuned.values() if entry is not None and entry.rates.best is not None]
        if len(stored) < 2:
            continue
        arm_seeds = tuple(seeds) or tuple(seed for seed in stored[0].seeds if seed in stored[1].seeds)
        second = [_measured(entry.arm, entry.best, arm_seeds, work, echo) for entry in stored]
        gaps = paired(stored[0], stored[1], claim.kind), paired(second[0], second[1], claim.kind)
        repeated.append(Repeated(setting, *gaps, arm_seeds))
        echo(str(repeated[-1]))
    if not repeated:
        raise SboraxError(f"{claim.sentence!r}: no setting has results of both arms; run the study first")
    return repeated


def _measured(arm: Arm, rate: float, seeds: Sequence[int], work: Path, echo: Callable[[str], None]) -> Tuned:
    """An arm at one rate, with every seed."""
    members, digests = {}, ""
    for seed in seeds:
        piece = Piece(arm, (rate,), seed)
        result = run_piece(piece, work, lambda _: None)
        members[seed], digests = result["members"][0], result["items_digests"]
        if "items_loss" not in members[seed]:
            raise SboraxError(f"{piece.label}: diverged at the rate {rate:g}, which had been the best")
        echo(f"{piece.label}: {result['seconds']:.0f} s, loss {members[seed].get('items_loss')}")
    return Tuned(arm, {rate: members}, tuple(seeds), 0, digests)
