"""Reads data sets: local files and directories, names under `$SBORAX_DATA`, and the Hugging Face hub."""

import csv
import io
import itertools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

import fsspec

from sborax.adapters.core import SboraxError
from sborax.config.codec import LiveObject
from sborax.config.documents import check_plain
from sborax.config.places import candidates

LONGEST = 1 << 24
"""The most letters of a record in JSON, JSONL or CSV, more than fit any model's context."""
SPLITS = ("train", "dev", "valid", "validation", "test", "eval")
"""Beginnings of the names of files that hold a split."""
READERS = {".json": "json", ".jsonl": "jsonl", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".txt": "text"}


Named = str | LiveObject | Sequence[Mapping[str, Any]]
"""The type of `Data.name`."""


@runtime_checkable
class Records(Protocol):
    """Records by number, each a dict of columns: a list, or what `datasets` maps from disk."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[dict[str, Any]]: ...

    def __getitem__(self, index: int, /) -> dict[str, Any]: ...


def find(name: str, split: str) -> Path | None:
    """The local file that `name` means; None if it may only be on the hub.

    A directory means the file named like the split. Its only data file need not be, unless its name begins like that of
    another split (`SPLITS`): a directory with nothing but `test.jsonl` has no split `train`.
    Raises SboraxError for a path that is missing or ambiguous.
    """
    for place in candidates(name, "SBORAX_DATA"):
        if place.is_dir():
            return _choose(place, split)
        if place.exists():
            if place.suffix not in READERS:
                raise SboraxError(f"{place}: unknown kind of data; known: {', '.join(READERS)}")
            return place
    if name.startswith((".", "/", "~")) or Path(name).suffix in READERS or name.count("/") > 1:
        unset = "" if os.environ.get("SBORAX_DATA") else " ($SBORAX_DATA is not set)"
        raise SboraxError(f"{name}: no such data file or directory{unset}")
    return None


def check_named(name: Named, split: str) -> None:
    """Raise SboraxError for a path that is missing or ambiguous, and for records that another program was given.

    Names that may be on the hub are not looked up.
    """
    if isinstance(name, str):
        find(name, split)
    elif isinstance(name, LiveObject):
        name.require("data.name")


def _choose(place: Path, split: str) -> Path:
    files = sorted(file for file in place.iterdir() if file.suffix in READERS)
    if not files:
        raise SboraxError(f"{place}: no data file in it; known: {', '.join(READERS)}")
    named = [file for file in files if file.stem == split] or [file for file in files if file.stem.startswith(split)]
    matches = files if len(files) == 1 and not _names_another(files[0].stem, split) else named
    if len(matches) != 1:
        problem = f"several files could be split {split!r}" if matches else f"no file is named like split {split!r}"
        raise SboraxError(f"{place}: {problem}; name one: {', '.join(file.name for file in matches or files)}")
    return matches[0]


def _names_another(stem: str, split: str) -> bool:
    """Whether the name of a file begins like that of a split, and not of this one."""
    stem, split = stem.lower(), split.lower()
    return stem.startswith(SPLITS) and not stem.startswith(split) and not split.startswith(stem)


def read(name: Named, split: str = "train") -> Records:
    """The records of a data set, each a dict of columns.

    Raises SboraxError for data that is missing, unreadable (a JSONL error names its line) or empty.
    """
    if not isinstance(name, str):
        return name.require("data.name") if isinstance(name, LiveObject) else [dict(record) for record in name]
    path = find(name, split)
    if path is None:
        records = _from_hub(name, split)
    else:
        records = _from_file(path)
    if not len(records):
        raise SboraxError(f"{path or name}: the data set is empty")
    return records


def where(name: Named, split: str, number: int) -> str:
    """The place of record `number` of a data set, for an error: the line of a JSONL file, else its number."""
    if not isinstance(name, str):
        return f"data: record {number}"
    path = find(name, split)
    if path is None or READERS[path.suffix] != "jsonl":
        return f"{path or name}: record {number}"
    lines = [line for line, text in enumerate(_text(path).split("\n"), start=1) if text.strip()]
    return f"{path}: line {lines[number]}"


def _from_hub(name: str, split: str) -> Records:
    # It takes seconds to import, which records in JSON do not need.
    import datasets
    from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

    try:
        builder = datasets.load_dataset_builder(name)
        options = _as_text(builder.config) if builder.name == "csv" and builder.info.features is None else {}
        return cast(Records, datasets.load_dataset(name, split=split, **options))
    except (DatasetNotFoundError, DatasetGenerationError, ValueError, OSError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise SboraxError(
            f"{name}: no such file, not under $SBORAX_DATA, and not available from the hub ({reason})"
        ) from error


def _as_text(config: Any) -> dict[str, Any]:
    """Options with which `datasets` reads every cell of CSV files as text."""
    import datasets

    first = next(file for files in config.data_files.values() for file in files)
    with fsspec.open(first, "rt", encoding="utf-8-sig", newline="", compression="infer") as lines:
        names = config.names or next(csv.reader(lines, delimiter=config.sep), [])
    return {
        "features": datasets.Features({name: datasets.Value("string") for name in names}),
        "keep_default_na": False,
    }


def _from_file(path: Path) -> Records:
    check_plain(path)
    if path.stat().st_size == 0:
        return []
    kind = READERS[path.suffix]
    if kind in ("json", "jsonl"):
        return _from_json(path, kind)
    if kind == "text":
        return [{"text": _text(path)}]
    if kind == "csv":
        return _from_csv(path, "\t" if path.suffix == ".tsv" else ",")
    import datasets
    from datasets.exceptions import DatasetGenerationError

    try:
        dataset = datasets.load_dataset(kind, data_files=str(path), split="train")
    except (DatasetGenerationError, ValueError, OSError) as error:
        reason = str(error.__cause__ or error).strip().partition("\n")[0]
        raise SboraxError(f"{path}: not readable as {kind} ({reason})") from error
    return cast(Records, dataset)


def _text(path: Path, newline: str | None = None) -> str:
    try:
        with path.open(encoding="utf-8", newline=newline) as file:
            return file.read()
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise SboraxError(f"{path}: line {line} is not UTF-8 text (byte {error.object[error.start]:#x})") from error


def _from_csv(path: Path, delimiter: str) -> Records:
    """The records of a CSV file. Every cell stays text, also `007`, `NA` and `true`.

    Cells that are missing at the end of a line are empty.
    """
    before = csv.field_size_limit(LONGEST)
    lines = csv.reader(io.StringIO(_text(path, "").removeprefix("\ufeff"), ""), delimiter=delimiter, strict=True)
    records = []
    try:
        rows = (row for row in lines if row)
        head = next(rows, [])
        named = [name for name in head if name]
        if len(set(named)) < len(named):
            raise SboraxError(f"{path}: line {lines.line_num} names a column twice")
        for row in rows:
            if len(row) > len(head):
                raise SboraxError(f"{path}: line {lines.line_num} has {len(row)} cells, the first line {len(head)}")
            records.append(dict(itertools.zip_longest(head, row, fillvalue="")))
    except csv.Error as error:
        raise SboraxError(f"{path}: line {lines.line_num} is not CSV ({error})") from None
    finally:
        csv.field_size_limit(before)
    return records


def _from_json(path: Path, kind: str) -> Records:
    text = _text(path)
    if kind == "json":
        try:
            value = json.loads(text)
        except json.JSONDecodeError as error:
            if not text.lstrip().startswith("{"):
                raise SboraxError(f"{path}: line {error.lineno} is not JSON ({error.msg})") from None
        except (ValueError, RecursionError) as error:
            raise SboraxError(f"{path}: {_reason(error)}") from None
        else:
            records = value if isinstance(value, list) else [value]
            bad = next((i for i, record in enumerate(records) if not isinstance(record, dict)), None)
            if bad is not None:
                raise SboraxError(f"{path}: entry {bad} is not an object with columns")
            for i, record in enumerate(records):
                if any(isinstance(value, str) and len(value) > LONGEST for value in record.values()):
                    raise SboraxError(f"{path}: entry {i} has a text of more than {LONGEST:,} letters; cut it up")
            return records
    return list(_lines(path, text))


def _lines(path: Path, text: str) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        if len(line) > LONGEST:
            raise SboraxError(f"{path}: line {number} has {len(line):,} letters, more than {LONGEST:,}; cut it up")
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise SboraxError(f"{path}: line {number} is not JSON ({error.msg})") from None
        except (ValueError, RecursionError) as error:
            raise SboraxError(f"{path}: line {number}: {_reason(error)}") from None
        if not isinstance(record, dict):
            raise SboraxError(f"{path}: line {number} is not an object with columns")
        yield record


def _reason(error: Exception) -> str:
    """The reason of an error that is not a JSONDecodeError."""
    return "is nested too deeply" if isinstance(error, RecursionError) else f"has a number of too many digits ({error})"
