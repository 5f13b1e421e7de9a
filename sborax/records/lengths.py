"""The file of a run that was resumed with another number of steps: for which lengths its learning rates were made."""

import json
from collections.abc import Mapping

from etils import epath

from sborax.adapters.core import SboraxError
from sborax.config.documents import read_object
from sborax.records.disk import replace, writing

LENGTHS = "lengths.json"


def read_lengths(run: epath.Path) -> dict[int, int]:
    """By the step after which it holds, the number of steps for which learning rates were made, in order.

    Empty if all steps of the run had the rates of its own length. Raises SboraxError for a damaged file.
    """
    place = run / LENGTHS
    if not place.exists():
        return {}
    lengths = read_object(place)
    if "0" not in lengths or not all(start.isdecimal() and type(length) is int for start, length in lengths.items()):
        raise SboraxError(f"{place}: is no table of steps; restore it from a copy")
    return {int(start): lengths[start] for start in sorted(lengths, key=int)}


def write_lengths(run: epath.Path, lengths: Mapping[int, int]) -> None:
    """Write what `read_lengths` reads; without lengths, remove the file. Raises SboraxError if that fails."""
    place = run / LENGTHS
    if lengths:
        replace(place, json.dumps({str(start): length for start, length in lengths.items()}) + "\n")
        return
    with writing(place):
        place.unlink(missing_ok=True)
