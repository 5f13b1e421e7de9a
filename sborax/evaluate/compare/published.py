"""Published scores beside those of a comparison. They are shown, and enter no statistic."""

import dataclasses
import math
from collections.abc import Mapping, Sequence

from sborax.evaluate.compare.groups import Estimate, Group, Setting
from sborax.evaluate.compare.tables import Beside, Table, figure

COLUMNS = {
    "ARC-e": "arc_easy", "ARC-c": "arc_challenge", "SIQA": "social_i_qa", "OBQA": "openbookqa",
    "WikiText-2": "wikitext2", "GSM8K %": "gsm8k", "BLEU": "e2e_nlg",
}  # fmt: skip
"""Tasks of columns whose name is not that of the task in capitals, without the prefix of a protocol."""


@dataclasses.dataclass(frozen=True)
class PublishedRow:
    """A row of a published table.

    - name, source, note: as the recipe has them. The first word of a note is its tag: "broken: ...".
    - scores: by column, in the table's units.
    - group: the label of the group with the same method; None where there is none.
    """

    name: str
    scores: Mapping[str, float]
    source: str
    note: str
    group: str | None


@dataclasses.dataclass(frozen=True)
class Published:
    """The published table of a recipe, for one setting.

    - recipe: its name.
    - tasks: that the recipe scores. Scores of other tasks have another protocol and are not set beside it.
    - rows: of the table.
    """

    recipe: str
    tasks: tuple[str, ...]
    rows: tuple[PublishedRow, ...]

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns with a score, in the order of the table."""
        return tuple(dict.fromkeys(column for row in self.rows for column in row.scores))

    @property
    def _text(self) -> str:
        sentences = [
            "Scores as printed, under the group whose method is the same but for numbers such as the rank; rows of "
            "other methods come last. They are other runs, on the authors' machines, often of another model, and enter "
            "no interval and no difference."
        ]
        sentences += [f"[{number}] {source}." for number, source in enumerate(self._sources, start=1)]
        sentences += [f"{note[:1].upper()}{note[1:]}." for note in dict.fromkeys(row.note for row in self.rows) if note]
        return " ".join(sentences)

    def measure(self, setting: Setting, column: str) -> str | None:
        """The measurement of a setting that a column is set beside: that of the task, by the recipe's protocol."""
        name = COLUMNS.get(column, "".join(letter for letter in column.lower() if letter.isalnum()))
        for task in self.tasks:
            if task == name or task.endswith(f"_{name}"):
                return next((measure for measure in setting.measures if measure.startswith(f"{task} ")), None)
        return None

    def shared(self, setting: Setting) -> list[str]:
        """The columns that a setting has a measurement for."""
        return [column for column in self.columns if self.measure(setting, column) is not None]

    def beside(self, setting: Setting) -> Beside | None:
        """Each group's scores, and below them the published ones of its method; None if no column is shared."""
        if not self.shared(setting):
            return None
        rows: list[tuple[str, ...]] = []
        for group in setting.ranked:
            rows.append((group.label, *(self._ours(setting, group, column) for column in self.columns), "ours", ""))
            rows += [self._printed(row) for row in self.rows if row.group == group.label]
        rows += [self._printed(row) for row in self.rows if row.group not in {group.label for group in setting.groups}]
        header = ("method", *self.columns, "source", "tag")
        numbers = (False, *[True] * len(self.columns), False, False)
        return Beside(Table(f"Published: {self.recipe}", header, tuple(rows), numbers), self._text)

    @property
    def _sources(self) -> Sequence[str]:
        return list(dict.fromkeys(row.source for row in self.rows if row.source))

    def _printed(self, row: PublishedRow) -> tuple[str, ...]:
        cells = (f"{row.scores[column]:g}" if column in row.scores else "" for column in self.columns)
        source = f"[{self._sources.index(row.source) + 1}]" if row.source else ""
        return (f"published: {row.name}", *cells, source, row.note.partition(":")[0])

    def _ours(self, setting: Setting, group: Group, column: str) -> str:
        measure = self.measure(setting, column)
        estimate = None if measure is None else group.estimates.get(measure)
        if measure is None or estimate is None:
            return ""
        return _in_units_of(estimate, measure, [row.scores[column] for row in self.rows if column in row.scores])


def _in_units_of(estimate: Estimate, measure: str, printed: Sequence[float]) -> str:
    """A score of ours in the units of a column: tables print shares as percentages, and perplexities for losses."""
    if measure.endswith(" loss"):
        # A loss that no float can hold the exponential of is no model.
        return f"{math.exp(min(estimate.value, 700.0)):.2f}"
    if max(printed) > 1.0 >= abs(estimate.value):
        return f"{100 * estimate.value:.2f}"
    return figure(estimate.value)
