"""Stored results: one JSON file a piece, by study and digest."""

import json
from pathlib import Path
from typing import Any

from experiments.studies.study import Base, Piece, Study

RESULTS = Path(__file__).parent / "results"
LARGEST = 60_000
"""Bytes of a result, at most."""


class Store:
    """The results in a folder, by digest of their piece. A piece that another study has run need not run again.

    - seconds: how long each piece of this study took, in the order in which they were added to this object.
    """

    def __init__(self, study: Study, folder: Path = RESULTS) -> None:
        self.folder = folder / study.name
        self._results: dict[str, dict[str, Any]] = {}
        self.seconds: list[float] = []
        for file in sorted(folder.glob("*/*.json")):
            result = json.loads(file.read_text())
            self._results[file.stem] = result
            if file.parent == self.folder:
                self.seconds.append(result["seconds"])

    def get(self, piece: Piece | Base) -> dict[str, Any] | None:
        """The result of a piece; None if it is pending."""
        if piece.digest not in self._results:
            # Another process may have added it.
            for file in self.folder.parent.glob(f"*/{piece.digest}.json"):
                self._results[piece.digest] = json.loads(file.read_text())
        return self._results.get(piece.digest)

    def add(self, piece: Piece | Base, result: dict[str, Any]) -> Path:
        """Write a result. Raises ValueError for one that is too large to be kept in a repository."""
        text = json.dumps(result, separators=(",", ":"))
        if len(text) > LARGEST:
            raise ValueError(f"{piece.label}: a result of {len(text):,} bytes; fewer items or rates make it smaller")
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / f"{piece.digest}.json"
        partial = file.with_suffix(".partial")
        partial.write_text(text + "\n")
        partial.rename(file)
        self._results[piece.digest] = result
        self.seconds.append(result["seconds"])
        return file
