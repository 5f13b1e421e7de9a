"""`sborax recipes`: tables of the papers as experiments, with the published numbers and what a run needs.

A recipe is a file `experiments/PAPER/TABLE.py`. Its first line is the command that runs it. Its docstring names the
paper, the arXiv id and the table. It defines:

- `experiment()`: the run.
- `PUBLISHED`: a tuple of `Row`s with the published numbers and how each row is run.
- `UNKNOWN`: sentences on what the paper and its code do not say, and what is used instead.
- `NEEDS`: sentences on what the reader has to provide, and which parts of the table sborax cannot run.
- `DIFFERS` (optional): sentences on deliberate differences from the authors' runs.
- `SAMPLES` (optional): number of training samples, for runs whose length is given in epochs.
- `SCORED`: tasks for `sborax eval --tasks`; or `HARNESS`: tasks for `--harness`. They are not in `eval.tasks` of the
  experiment, because a run over several hosts refuses that.
"""

import dataclasses
import difflib
import inspect
import json
import math
import shlex
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import sborax
from sborax.adapters.core import AbstractMethod, RankPolicy, SboraxError
from sborax.adapters.paths import as_rules
from sborax.adapters.ranks import LinearRanks
from sborax.cli.columns import aligned
from sborax.cli.facts import methods
from sborax.config.classes import EXPERIMENT, execute
from sborax.config.codec import encode
from sborax.layout.mesh import abstract_mesh
from sborax.models import LlamaConfig, load_config
from sborax.models.published import CONFIGS
from sborax.plans.ahead import Outline, argument_bytes, longest_row, on_mesh, outline
from sborax.plans.estimate import temporary_bytes
from sborax.train.experiment import Experiment
from sborax.train.figures import PEAKS, model_flops
from sborax.train.optimizers import AbstractScheduled, LoRAFA, LoRARITE, Optimizer

EXPERIMENTS = "experiments"
TAGS = ("broken", "contaminated", "unverified", "unknown")
"""First word of a row's note."""

CHIP, MEMORY = "NVIDIA H100 80GB HBM3", 80e9
"""Chip for which devices and hours are estimated, and its memory in bytes."""
UTILISATION = 0.4
"""Assumed model FLOP/s of a step over the chip's peak."""
FILLED = 0.9
"""Largest share of the chip's memory that a step may take."""
MOST_DEVICES = 256
READ_RANK = 64
"""Replaces ranks that depend on the weights, since a plan has no weights."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of a published table.

    - name: model, method and rank, as in the table.
    - scores: published scores by column, in the table's units; empty if they could not be read.
    - source: where the numbers were read: the paper's table, or the authors' repository and commit.
    - parameters: trained parameters as printed, such as "56.1M" or "9,175,040"; "" if the table has none.
    - counted: the true number of trained parameters, if the printed one is wrong; the note says why.
    - changes: `key=value` arguments that turn the recipe into this row; None if sborax cannot run the row.
    - note: one of `TAGS`, a colon and the reason; "" if nothing speaks against the row.
    """

    name: str
    scores: Mapping[str, float]
    source: str
    parameters: str = ""
    counted: str = ""
    changes: tuple[str, ...] | None = ()
    note: str = ""


def by_task(columns: str, *values: int | float | None) -> dict[str, float]:
    """Scores by column. `columns` is separated by commas; a value of None is left out."""
    names = [name.strip() for name in columns.split(",")]
    return {name: float(value) for name, value in zip(names, values, strict=True) if value is not None}


def method_change(method: AbstractMethod) -> str:
    """The change that sets the method of the first rule: `rules.0.method={"type": "LoRA", ...}`."""
    default = {field.name: field.default for field in dataclasses.fields(method)}  # type: ignore[arg-type]
    options = {name: value for name, value in vars(method).items() if value != default[name]}
    config = {"type": type(method).__name__, **{name: encode(value) for name, value in options.items()}}
    return f"rules.0.method={json.dumps(config)}"


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The contents of a recipe's file. `name` is its path below `experiments/` without `.py`."""

    name: str
    command: str
    about: str
    experiment: Experiment
    published: tuple[Row, ...]
    unknown: tuple[str, ...]
    needs: tuple[str, ...]
    differs: tuple[str, ...] = ()
    samples: int | None = None
    scored: str = ""
    harness: str = ""

    @property
    def score_command(self) -> str:
        """The command that scores the run."""
        words = shlex.split(self.command)
        run = words[words.index("--out") + 1]
        best = "/best" if self.experiment.save.best else ""
        tasks = f"--tasks {self.scored}" if self.scored else f"--harness {self.harness}"
        data = "SBORAX_DATA=data " if self.scored else ""
        return f"{data}sborax eval {run}{best} {tasks} --out scores/{Path(run).name}"


@dataclasses.dataclass(frozen=True)
class Cost:
    """Devices of type `CHIP` and hours on them that training takes; None if unknown."""

    devices: int | None
    hours: float | None


def folder() -> Path:
    """The directory of the recipes: beside the imported package, else in the current directory.

    Raises SboraxError if neither has recipes.
    """
    for place in (Path(sborax.__file__).parents[1], Path.cwd()):
        if any(map(_is_recipe, (place / EXPERIMENTS).glob("*/*.py"))):
            return place / EXPERIMENTS
    raise SboraxError("no recipes found; they are part of sborax's repository: run this inside a checkout of it")


def _is_recipe(file: Path) -> bool:
    return "\nPUBLISHED" in file.read_text()


def names() -> dict[str, Path]:
    """The file of every recipe by its name. Raises SboraxError as `folder` does."""
    place = folder()
    files = filter(_is_recipe, sorted(place.glob("*/*.py")))
    return {file.relative_to(place).with_suffix("").as_posix(): file for file in files}


def read_recipe(name: str) -> Recipe:
    """The recipe of that name or in that file; the name of a paper will do if it has only one recipe.

    Raises SboraxError for an unknown name, and for a file that does not define what a recipe defines.
    """
    if name.endswith(".py"):
        if not Path(name).is_file():
            raise SboraxError(f"there is no recipe {name}; `sborax recipes` lists those there are")
        return _recipe(name.removesuffix(".py").removeprefix(f"{EXPERIMENTS}/"), Path(name))
    files = names()
    of_paper = [label for label in files if label.partition("/")[0] == name]
    if name not in files and len(of_paper) == 1:
        name = of_paper[0]
    if name not in files:
        close = of_paper or difflib.get_close_matches(name, files, n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(close)}?" if close else "`sborax recipes` lists them"
        raise SboraxError(f"there is no recipe {name!r}; {hint}")
    return _recipe(name, files[name])


def _recipe(name: str, file: Path) -> Recipe:
    module = vars(execute(file, f"{EXPERIMENT}{file.stem}"))
    missing = [field for field in ("experiment", "PUBLISHED", "UNKNOWN", "NEEDS") if field not in module]
    missing += [] if "SCORED" in module or "HARNESS" in module else ["SCORED"]
    if missing:
        raise SboraxError(f"{file}: a recipe has to define {missing[0]}")
    return Recipe(
        name=name,
        command=file.read_text().partition("\n")[0].removeprefix("# "),
        about=inspect.cleandoc(module["__doc__"] or ""),
        experiment=module["experiment"](),
        published=module["PUBLISHED"],
        unknown=module["UNKNOWN"],
        needs=module["NEEDS"],
        differs=module.get("DIFFERS", ()),
        samples=module.get("SAMPLES"),
        scored=module.get("SCORED", ""),
        harness=module.get("HARNESS", ""),
    )


def config_of(model: str) -> LlamaConfig:
    """The config of a model: from `CONFIGS` without a network, otherwise by `load_config`."""
    return LlamaConfig.from_hf(CONFIGS[model], model) if model in CONFIGS else load_config(model)


def plannable(experiment: Experiment) -> Experiment:
    """The experiment with rank `READ_RANK` wherever the rank depends on the weights."""

    def with_rank(method: AbstractMethod | None) -> AbstractMethod | None:
        rank = getattr(method, "rank", None)
        if method is None or not isinstance(rank, RankPolicy) or isinstance(rank, LinearRanks):
            return method
        return dataclasses.replace(method, rank=READ_RANK)  # type: ignore[call-arg]

    rules = tuple(dataclasses.replace(rule, method=with_rank(rule.method)) for rule in as_rules(experiment.rules))
    return dataclasses.replace(experiment, rules=rules)


def cost(experiment: Experiment, samples: int | None) -> Cost:
    """Devices and hours of training on `CHIP`: hours = F T / (n P u 3600).

    - F: model FLOPs per token: 4N, or 6N if the base is trained (`model_flops`). Attention is left out.
    - T: tokens: steps x rows per step x longest row. An upper bound, since most samples are shorter.
    - n: devices: the smallest power of two that divides `batch_size` and on which base, trained leaves, optimiser,
      batch and the estimated temporaries of a step take at most `FILLED` of the memory, cut along "fsdp".
    - P: peak FLOP/s, from `PEAKS`.
    - u: `UTILISATION`.

    Args:
    - experiment: the run.
    - samples: size of the training data, for a run whose length is given in epochs; without it hours are None.
    """
    config = config_of(experiment.model)
    step = outline(plannable(experiment), config)
    devices = _devices(step, experiment.batch_size)
    rows = experiment.batch_size * experiment.accumulate
    steps = experiment.steps
    if steps is None and samples is not None:
        steps = math.ceil(samples / rows) * (experiment.epochs or 0)
    if devices is None or steps is None:
        return Cost(devices, None)
    tokens = steps * rows * longest_row(experiment, config)
    rate = devices * PEAKS[CHIP] * 1e12 * UTILISATION
    return Cost(devices, model_flops(config, step.parts) * tokens / rate / 3600)


def _devices(step: Outline, rows: int) -> int | None:
    counts = [2**power for power in range(MOST_DEVICES.bit_length()) if rows % 2**power == 0]
    for count in counts:
        try:
            placed = step if count == 1 else on_mesh(step, abstract_mesh({"fsdp": count}))
        except SboraxError:
            continue
        if sum(argument_bytes(placed).values()) + temporary_bytes(placed) <= FILLED * MEMORY:
            return count
    return None


def overview() -> str:
    """`sborax recipes`: every recipe with its base model, method, devices, hours and data."""
    rows = [("recipe", "model", "method", "devices", "hours", "data")]
    for recipe in map(read_recipe, names()):
        experiment, spent = recipe.experiment, cost(recipe.experiment, recipe.samples)
        hours = "?" if spent.hours is None else f"{spent.hours:.2g}"
        data = experiment.data.label()
        rows.append((recipe.name, experiment.model, _method(experiment), str(spent.devices or "?"), hours, data))
    return "\n".join([*aligned(rows), "", *_assumed(), "`sborax recipes NAME` prints one with its published numbers."])


def _assumed() -> list[str]:
    return textwrap.wrap(
        f"Devices: the fewest {CHIP} on which a step fits, as `sborax plan` estimates it. Hours: training on those "
        f"devices at {UTILISATION:.0%} of {PEAKS[CHIP]:g} TFLOP/s with every row as long as the longest; ? if the size "
        "of the data is unknown.",
        width=120,
    )


def _method(experiment: Experiment) -> str:
    optimizer, procedure = experiment.optimizer, experiment.procedure
    parts = methods(experiment) or ["full fine-tuning"]
    parts += [] if procedure is None else [type(procedure).__name__]
    rule = optimizer.rule if isinstance(optimizer, Optimizer) else optimizer
    parts += ["LoRA-RITE"] * isinstance(rule, LoRARITE) + ["LoRA-FA"] * isinstance(rule, LoRAFA)
    parts += ["LoRA+"] if isinstance(rule, AbstractScheduled) and rule.b_ratio != 1.0 else []
    return " + ".join([*parts, *([experiment.quant] if experiment.quant else [])])


def kind(experiment: Experiment) -> str:
    """What is trained, without numbers such as ranks: two rows of a kind are the same method at different sizes."""
    options = [
        f"{name}={value}"
        for rule in as_rules(experiment.rules)
        if rule.method is not None
        for name, value in vars(rule.method).items()
        if isinstance(value, str | bool)
    ]
    return ", ".join([_method(experiment), *dict.fromkeys(options)])


def describe(name: str) -> str:
    """`sborax recipes NAME`: one recipe with its published numbers. Raises SboraxError as `read_recipe` does."""
    recipe = read_recipe(name)
    spent = cost(recipe.experiment, recipe.samples)
    hours = "an unknown time" if spent.hours is None else f"about {spent.hours:.2g} hours"
    lines = [recipe.name, "", recipe.about, "", f"  {recipe.command}", f"  {recipe.score_command}", ""]
    lines += [f"Trains on {spent.devices or '?'} x {CHIP} for {hours}; model {recipe.experiment.model}."]
    for title, sentences in (("Needs", recipe.needs), ("Unknown", recipe.unknown), ("Differs", recipe.differs)):
        lines += ["", f"{title}:", *map(_listed, sentences)] if sentences else []
    return "\n".join([*lines, "", "Published:", *_published(recipe.published)])


def _listed(sentence: str) -> str:
    return textwrap.fill(
        sentence, width=118, initial_indent="- ", subsequent_indent="  ", break_on_hyphens=False, break_long_words=False
    )


def _published(published: Sequence[Row]) -> list[str]:
    columns = tuple(dict.fromkeys(column for row in published for column in row.scores))
    table = [("", "trained", *columns, "")]
    for row in published:
        trained = f"{row.parameters or '-'} (true: {row.counted})" if row.counted else row.parameters or "-"
        scores = [f"{row.scores[column]:g}" if column in row.scores else "-" for column in columns]
        table.append((row.name, trained, *scores, row.note.partition(":")[0]))
    lines = aligned(table)
    for note in dict.fromkeys(row.note for row in published if row.note):
        rows = [row.name for row in published if row.note == note]
        where = f" ({'; '.join(rows)})" if len(rows) < len(published) else ""
        lines += [_listed(f"{note}{where}")]
    sources = dict.fromkeys(row.source for row in published if row.source)
    lines += ["", "Sources:", *map(_listed, sources)] if sources else []
    lines += ["", "Arguments that turn the command into each row:"]
    for row in published:
        changes = "sborax cannot run this row" if row.changes is None else " ".join(map(shlex.quote, row.changes))
        lines += [f"- {row.name}: {changes or 'none'}"]
    return lines
