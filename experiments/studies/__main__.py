"""Run studies of adapters, and write what they decide: python -m experiments.studies list | run | repeat | report

`list` tells how many pieces of each study are done. `run` runs the pending pieces of a study in order, and stores a
small file for each. It starts no piece that would not end in time. Several processes may run one study at once. Models
are found under $SBORAX_MODELS and data under $SBORAX_DATA, as by `sborax train`. `repeat NAME CLAIM` trains the arms of
a claim again and says whether the difference lies in the stored intervals. `report` writes docs/RESULTS.md and
docs/choosing.md from the stored files alone.
"""

import argparse
import dataclasses
import importlib
import os
import pkgutil
import shutil
import sys
import time
from pathlib import Path

import jax
from etils import epath

from experiments import studies
from experiments.studies.choosing import choosing
from experiments.studies.pieces import measure_base, run_piece
from experiments.studies.repeat import claim_of, repeat
from experiments.studies.report import PAGE, Outcome, write
from experiments.studies.store import RESULTS, Store
from experiments.studies.study import Base, Study, settings
from experiments.studies.tuning import pending
from sborax.adapters.core import SboraxError
from sborax.records.claim import InUse, locked
from sborax.train.read import Echo, silent
from sborax.train.stop import Stopped

CHOOSING = PAGE.parent / "choosing.md"
WORK = Path("runs/studies")
MARGIN = 1.2
"""The time reserved for a piece, over that of the slowest of the latest pieces."""
BEFORE = 5
"""The number of latest pieces whose times count."""


def names() -> list[str]:
    """The modules beside this one that declare a study, in the order of the alphabet."""
    folder = Path(studies.__file__).parent
    return sorted(
        module.name
        for module in pkgutil.iter_modules([str(folder)])
        if "\ndef study() -> Study:" in (folder / f"{module.name}.py").read_text()
    )


def declared(name: str) -> Study:
    """The study of that name. Raises SboraxError if there is none."""
    if name not in names():
        raise SboraxError(f"{name}: no such study; there are {', '.join(names())}")
    return importlib.import_module(f"experiments.studies.{name}").study()


def run(
    study: Study,
    store: Store,
    work: Path,
    seconds: float,
    setting: str | None = None,
    echo: Echo = print,
    detail: Echo = silent,
) -> int:
    """Run pending pieces until there is none, or until the next would not end within `seconds`. Returns their number.

    Pieces that another process runs over the same `work` are left to it, so several processes share a study.

    - setting: run the arms of this setting alone; None for all.
    - work: a folder for run directories, which are removed once their result is stored.
    - detail: gets the lines of each run.
    """
    if setting is not None:
        arms = tuple(arm for arm in study.arms if arm.setting == setting)
        if not arms:
            raise SboraxError(f"{setting}: no setting of {study.name}; it has {', '.join(settings(study))}")
        study = dataclasses.replace(study, arms=arms)
    began, count = time.monotonic(), 0
    elsewhere: set[str] = set()
    while queue := pending(study, store):
        free = [piece for piece in queue if piece.digest not in elsewhere]
        if not free:
            echo(f"the {len(queue)} known pieces that are left are run by other processes")
            break
        piece, left = free[0], seconds - (time.monotonic() - began)
        needed = MARGIN * max(store.seconds[-BEFORE:], default=0.0)
        if needed > left:
            echo(f"{len(queue)} pieces are pending; the next would take {needed:.0f} s, {max(left, 0):.0f} s are left")
            break
        base = Base.of(piece.arm)
        if base is not None and store.get(base) is None:
            store.add(base, measure_base(base))
            echo(f"{base.label}: measured")
        claim = work / "claims" / piece.digest
        claim.mkdir(parents=True, exist_ok=True)
        try:
            with locked(epath.Path(claim)):
                # Another process may have ended it since.
                if store.get(piece):
                    continue
                result = run_piece(piece, work, detail)
                store.add(piece, result)
                shutil.rmtree(work / piece.digest)
        except InUse:
            elsewhere.add(piece.digest)
            continue
        except Stopped:
            echo(f"{piece.label}: stopped; run it again to continue from there")
            break
        count += 1
        best = min(result["members"], key=lambda member: member.get("items_loss", float("inf")))
        echo(
            f"{piece.label}: {result['seconds']:.0f} s, lowest loss {best.get('items_loss')} at {best['lr']:g}; "
            f"{len(queue) - 1} known pieces are left"
        )
    return count


def provide(study: Study, work: Path) -> None:
    """Let a study write its data sets below `work`, and add their folder to `$SBORAX_DATA`."""
    if study.prepare is not None:
        folder = work.absolute() / "data"
        study.prepare(folder)
        os.environ["SBORAX_DATA"] = os.pathsep.join([*filter(None, [os.environ.get("SBORAX_DATA")]), str(folder)])


def outcomes(results: Path = RESULTS) -> list[Outcome]:
    """Every study with its stored results."""
    studies = [declared(name) for name in names()]
    return [Outcome.of(study, Store(study, results)) for study in studies]


def listed() -> list[str]:
    """A line for each study."""
    lines = []
    for outcome in outcomes():
        name, pieces, done = outcome.study.name, outcome.pieces, outcome.done
        lines.append(f"{name}: {done} of {pieces} pieces done, {pieces - done} pending: {outcome.study.title}")
    return lines


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="pieces done and pending")
    runs = commands.add_parser("run", help="run what is pending of a study")
    runs.add_argument("name")
    runs.add_argument("--minutes", type=float, default=float("inf"), help="begin no piece that would end later")
    runs.add_argument("--setting", help="run this setting alone, so that others can run in another process")
    runs.add_argument("--work", type=Path, default=WORK, help=f"folder for run directories (default {WORK})")
    repeats = commands.add_parser("repeat", help="measure the difference of a claim again")
    repeats.add_argument("name")
    repeats.add_argument("claim", help="words of its sentence, such as 'SBoRA-FB beats LoRA'")
    repeats.add_argument("--seeds", type=int, nargs="+", default=(), help="other seeds than the stored ones")
    repeats.add_argument("--work", type=Path, default=WORK / "repeat", help="folder for run directories")
    commands.add_parser("report", help="write docs/RESULTS.md, its figures and docs/choosing.md")
    arguments = parser.parse_args()
    try:
        if arguments.command == "list":
            print("\n".join(listed()))
        elif arguments.command == "report":
            by_study = {outcome.study.name: outcome for outcome in outcomes()}
            write(list(by_study.values()))
            CHOOSING.write_text(choosing(by_study["atlas"]))
        else:
            # Pieces of one arm are one program.
            jax.config.update("jax_compilation_cache_dir", str(arguments.work.absolute() / "programs"))
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
            study = declared(arguments.name)
            provide(study, arguments.work)
            if arguments.command == "repeat":
                gaps = repeat(study, claim_of(study, arguments.claim), Store(study), arguments.work, arguments.seeds)
                return 0 if all(repeated.inside for repeated in gaps) else 1
            limit = 60 * arguments.minutes
            run(study, Store(study), arguments.work, limit, arguments.setting, lambda line: print(line, flush=True))
    except SboraxError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
