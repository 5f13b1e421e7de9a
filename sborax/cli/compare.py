"""`sborax compare`: runs and sweeps in one report."""

import importlib.util
from collections.abc import Iterator, Sequence
from pathlib import Path

from etils import epath

from sborax.adapters.core import SboraxError
from sborax.cli.columns import aligned
from sborax.cli.recipes import Recipe, kind, read_recipe
from sborax.cli.recipes import Row as PrintedRow
from sborax.cli.targets import load_run
from sborax.config.codec import override
from sborax.config.terminal import say
from sborax.evaluate.compare.groups import Setting
from sborax.evaluate.compare.groups import compare as grouped
from sborax.evaluate.compare.published import Published, PublishedRow
from sborax.evaluate.compare.rows import Measurement, Row, read_measurements, read_rows
from sborax.evaluate.compare.spectra import Change, Spectra, Weights, ranks
from sborax.evaluate.compare.tables import Beside, conditions, costs_table, csv_text, markdown, scores_table
from sborax.evaluate.tasks import chosen
from sborax.models import load_model

REPORT = "report"
"""The name of the files in the output directory, without their ending."""


def compare(
    runs: Sequence[str],
    by: str,
    out: str,
    spectra: bool = False,
    base: str | None = None,
    published: str | None = None,
) -> None:
    """Compare runs and sweeps, print the main table of each setting, and write the report into `out`.

    An earlier report there is replaced.

    Args:
    - runs: directories of runs and sweeps; the first run of a setting is in its reference group.
    - by: what groups differ in, with commas between keys.
    - out: where `report.md`, `report.csv` and `report.html` go, the last where matplotlib is installed.
    - base: a directory with scores of the base model, for each group's difference from it; None for none.
    - spectra: whether to load each group's base and adapter and measure what training changed.
    - published: a recipe, by name or file, whose published scores go beside those of the runs; None for none.

    Raises SboraxError as `read_rows` and `sborax.evaluate.compare.groups.compare` do, as loading a base and a recipe
    does, and for a recipe without a published score beside one of the runs'.
    """
    recipe = None if published is None else read_recipe(published)
    settings = grouped(read_rows(runs), [key.strip() for key in by.split(",") if key.strip()])
    beside = [None] * len(settings) if recipe is None else published_beside(recipe, settings)
    for setting in settings:
        for line in _lines(setting):
            say(line)
    loader = _Loader() if spectra else None
    weights = [_weights(setting, loader) for setting in settings]
    scores = {} if base is None else _base_scores(base)
    contents = {"md": markdown(settings, weights, scores, beside), "csv": csv_text(settings)}
    if importlib.util.find_spec("matplotlib") is None:
        say(f"{REPORT}.html needs matplotlib; pip install 'sborax[report]'")
    else:
        from sborax.evaluate.compare.page import page

        contents["html"] = page(settings, weights, scores, beside)
    place = Path(out)
    place.mkdir(parents=True, exist_ok=True)
    for ending, text in contents.items():
        (place / f"{REPORT}.{ending}").write_text(text, encoding="utf-8")
    say(f"{place}: {', '.join(f'{REPORT}.{ending}' for ending in contents)}")


def published_beside(recipe: Recipe, settings: Sequence[Setting]) -> list[Beside | None]:
    """The published scores of a recipe, for every setting that has a score to set beside them; None for others.

    Raises SboraxError if there are no published scores, or no setting has a score to set beside them.
    """
    if not any(row.scores for row in recipe.published):
        raise SboraxError(
            f"--published {recipe.name}: holds no published scores; `sborax recipes {recipe.name}` says why"
        )
    tasks = tuple(task.name for task in chosen(recipe.scored)) if recipe.scored else tuple(recipe.harness.split(","))
    tables = [_published(recipe, tasks, setting) for setting in settings]
    beside = [table.beside(setting) for table, setting in zip(tables, settings, strict=True)]
    if not any(beside):
        advice = (
            f"score them by `sborax eval RUN --tasks {recipe.scored} --out RUN/scores`"
            if recipe.scored
            else f"it is scored by --harness {recipe.harness}, whose scores are not compared"
        )
        raise SboraxError(f"--published {recipe.name}: no run has a score for {', '.join(tables[0].columns)}; {advice}")
    return beside


def _published(recipe: Recipe, tasks: tuple[str, ...], setting: Setting) -> Published:
    groups = {kind(group.rows[0].experiment): group.label for group in reversed(setting.groups)}

    def of_group(row: PrintedRow) -> str | None:
        return None if row.changes is None else groups.get(kind(override(recipe.experiment, row.changes)))

    rows = (PublishedRow(row.name, row.scores, row.source, row.note, of_group(row)) for row in recipe.published)
    return Published(recipe.name, tasks, tuple(rows))


def _base_scores(place: str) -> dict[str, Measurement]:
    scores = read_measurements(epath.Path(place))
    if not scores:
        raise SboraxError(f"--base {place}: holds no scores; write them by `sborax eval MODEL --out {place}`")
    return scores


class _Loader:
    """Loads what runs changed, and each base once."""

    def __init__(self) -> None:
        self._key, self._spectra = None, None

    def changes(self, row: Row) -> list[Change]:
        """The changes of a run. Raises SboraxError for a method without a merged form, and as `load_run` does."""
        experiment = row.experiment
        key = experiment.model, experiment.precision, experiment.quant
        if self._spectra is None or key != self._key:
            # The last base goes before the next one comes.
            self._spectra = None
            base = load_model(experiment.model, experiment.precision, quant=experiment.quant)
            self._key, self._spectra = key, Spectra(base.params)
        target = load_run(row.run)
        return list(self._spectra.changes(target.params, target.adapters))


def _weights(setting: Setting, loader: _Loader | None) -> Weights:
    """What the adapters of a setting say, of the first run of each group; with a loader also what they changed."""
    changes, declared, notes = {}, {}, []
    for group in setting.groups:
        if not group.best:
            continue
        row = group.best[0]
        declared[group.label] = ranks(epath.Path(row.run))
        if loader is None:
            continue
        say(f"spectra of {row.run}")
        try:
            changes[group.label] = loader.changes(row)
        except SboraxError as error:
            notes.append(f"{group.label}: no spectrum: {error}")
    return Weights(changes, declared, tuple(notes))


def _lines(setting: Setting) -> Iterator[str]:
    """A setting on the terminal: its main score, costs and notes."""
    yield f"{setting.title or 'all runs'} ({'; '.join(conditions(setting))})"
    for table in (*(scores_table(setting, measure) for measure in setting.measures[:1]), costs_table(setting)):
        yield from (f"  {line}" for line in aligned([table.header, *table.rows], table.numbers))
    yield from (f"  note: {note}" for note in setting.notes)
