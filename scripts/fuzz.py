"""Hostile files for everything that sborax reads. Every case must end in success or in a one-line error.

python scripts/fuzz.py                          # all readers
python scripts/fuzz.py gguf peft --cases 10000 --seed 0
python scripts/fuzz.py gguf --only 4711 --keep there/   # one case, its files kept, its traceback shown
"""

import argparse
import collections
import re
import shutil
import sys
import tempfile
import time
from pathlib import Path
from random import Random

from fuzzing.runner import SECONDS, child, furnish, fuzz


def main() -> int:
    """Fuzz the chosen readers. Returns the exit code, 1 if a case failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("readers", nargs="*", metavar="READER", help="default: all")
    parser.add_argument("--cases", type=int, default=10_000, metavar="N", help="cases of each reader (default: 10000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, metavar="NUMBER", help="run one case in this process, unguarded")
    parser.add_argument("--keep", metavar="DIR", help="with --only: copy the case's files there")
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--last", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument(
        "--seconds", type=float, default=SECONDS, metavar="S", help="time limit of a case; more on a busy machine"
    )
    parser.add_argument("--child", metavar="JAIL", help=argparse.SUPPRESS)
    words = parser.parse_args()
    if words.child:
        child(words.readers[0], words.seed, Path(words.child), words.first, words.last, words.seconds)
        return 0
    from fuzzing.readers import READERS

    if words.only is not None:
        return run_case(words.readers[0], words.seed, words.only, words.keep)
    failed = False
    for reader in words.readers or READERS:
        began = time.monotonic()
        tally = fuzz(reader, words.cases, words.seed, words.first, words.seconds)
        seconds = time.monotonic() - began
        print(f"{reader}: {tally.done} cases in {seconds:.0f} s: {tally.fine} read, {tally.refused} refused in "
              f"{len(tally.lines)} ways, {len(tally.wrong)} failed", flush=True)  # fmt: skip
        for line, times in tally.lines.most_common(12):
            print(f"  {times:6}  {line}")
        kinds = collections.defaultdict(list)
        for number, problem in tally.wrong:
            kinds[re.sub(r"\d{3,}|'.*", "_", problem.partition("\n")[0])].append((number, problem))
        for failures in sorted(kinds.values(), key=len, reverse=True):
            print(f"  FAILED {len(failures)} times, case {failures[0][0]}: {failures[0][1]}")
        failed |= bool(tally.wrong)
    return int(failed)


def run_case(reader: str, seed: int, number: int, keep: str | None) -> int:
    """Run one case, whose exceptions are raised."""
    from fuzzing.readers import READERS

    with tempfile.TemporaryDirectory() as scratch:
        jail = Path(scratch) / "jail"
        furnish(jail)
        call = READERS[reader](jail / "home")(Random(f"{reader} {seed} {number}"), jail / "case")
        if keep is not None:
            shutil.copytree(jail / "case", keep)
        print(call())
    return 0


if __name__ == "__main__":
    sys.exit(main())
