"""PEFT's `layer_replication`: adapters of a model that PEFT makes of copies of the base's layers."""

from collections.abc import Collection
from typing import Any

from sborax.adapters.core import SboraxError
from sborax.interop.peft_row import Row
from sborax.models.language_model import LanguageModel
from sborax.models.replication import Ranges, check_replicated

REPLICATION = "layer_replication"
"""The config field."""


def check_replication(row: Row, ranges: Any, model: LanguageModel) -> None:
    """Raise SboraxError unless `model` may be the one that PEFT makes by `ranges`, and PEFT's adapter of it is ours.

    - row: of the kind.
    - ranges: the value of the field.
    """
    if REPLICATION not in row.reads:
        raise SboraxError(
            f"PEFT's {row.peft_type} has no {REPLICATION}; leave it out, and write the deeper model itself with save_hf"
        )
    if row.method.rewrites_base and not row.keeps_base:
        raise SboraxError(
            f"{REPLICATION}: in PEFT copies of a layer share one weight, and each takes its start out of what the one "
            f"before left of it; {row.method.__name__} cannot be read or written with it"
        )
    check_replicated(model, ranges, REPLICATION)


def written_replication(row: Row, ranges: Ranges, model: LanguageModel, biases: Collection[str]) -> list[list[int]]:
    """The value of the field for a file.

    - biases: the trained biases that the file has.

    Raises SboraxError as `check_replication` does, and for trained biases, which copies share in PEFT.
    """
    check_replication(row, ranges, model)
    if biases:
        raise SboraxError(f"{REPLICATION}: biases were trained, which copies of a layer share in PEFT; leave it out")
    return [list(pair) for pair in ranges]
