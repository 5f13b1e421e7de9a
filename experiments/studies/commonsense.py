"""One training set and one test set of commonsense questions, from the files of LLM-Adapters (arXiv:2304.01933)."""

import json
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import Any

from sborax.data.source import read

FOLDER = "commonsense"
SETS = ("ARC-Easy", "openbookqa", "social_i_qa", "boolq")
BALANCED = "boolq"
"""The set with unequal answers: 62 % of them are "true"."""


def write(folder: Path) -> None:
    """Write `train.json` and `test.json` below `folder`, unless they are there. The four sets have equal shares.

    Training records alternate between the sets, so that the first ones are an equal share, too. Test records are in
    blocks, so that evenly spaced items are.

    Raises SboraxError if a set is not found under `$SBORAX_DATA`.
    """
    for split in ("train", "test"):
        file = folder / FOLDER / f"{split}.json"
        if file.exists():
            continue
        sets = [balanced(read(f"{name}/{split}.json"), name) for name in SETS]
        shortest = min(map(len, sets))
        cut = [records[:shortest] for records in sets]
        joint = list(chain.from_iterable(zip(*cut, strict=True) if split == "train" else cut))
        file.parent.mkdir(parents=True, exist_ok=True)
        # Another process may read it.
        partial = file.with_suffix(".partial")
        partial.write_text(json.dumps(joint))
        partial.rename(file)


def balanced(records: Iterable[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    """The records; of `BALANCED`, as many of each answer, in turn."""
    records = list(records)
    if name != BALANCED:
        return records
    by_answer = [[record for record in records if record["answer"] == answer] for answer in ("true", "false")]
    return list(chain.from_iterable(zip(*by_answer, strict=False)))
