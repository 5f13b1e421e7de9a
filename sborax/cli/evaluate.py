"""`sborax eval`: the scores of a model or a run."""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from etils import epath

from sborax.adapters.core import SboraxError
from sborax.cli.layout import read_mesh
from sborax.cli.several import labels, load_several, say_batches
from sborax.cli.targets import Target, find_run, load_run, load_target
from sborax.config.classes import load_plugins
from sborax.config.terminal import say
from sborax.data.samples import load_samples
from sborax.data.source import find, read
from sborax.evaluate import AbstractTask, Scorer, chosen, evaluate
from sborax.evaluate.run import read_scores
from sborax.evaluate.scorer import scorers
from sborax.layout.hosts import several
from sborax.records.disk import SCORE_FOLDER
from sborax.train.experiment import Experiment
from sborax.train.read import end_token
from sborax.train.resume import rename_scores


def score(arguments: argparse.Namespace) -> None:
    """Score the target on tasks, and on those of lm-evaluation-harness with `--harness`.

    Raises SboraxError for a task that is not known, an option that does not fit it, or data that is not found.
    """
    if not arguments.tasks and not arguments.harness:
        raise SboraxError("give --tasks, --harness, or both; `sborax tasks` lists what --tasks takes")
    if not arguments.tasks and (arguments.data or arguments.template is not None):
        raise SboraxError("--data and --template are for --tasks; the harness has its own data and prompts")
    if arguments.include and not arguments.harness:
        raise SboraxError("--include is for --harness; give the names of your tasks there")
    tasks = _tasks(arguments) if arguments.tasks else []
    sizes = read_mesh(arguments.mesh)
    for task in tasks:
        task.check()
    target = load_target(arguments.target, arguments.adapter)
    scorer = Scorer.of(target.model, target.params, target.adapters, mesh=sizes, budget=arguments.batch_tokens)
    out = arguments.out or f"runs/eval-{Path(arguments.target).name}"
    about = {"target": arguments.target, "adapter": arguments.adapter}
    if tasks:
        evaluate(
            tasks, scorer, limit=arguments.limit, seed=arguments.seed, out=out, trained_on=_trained_on(target),
            about=about,
        )  # fmt: skip
    if arguments.harness:
        _harness(arguments, scorer, out)
    say(f"{out}: the scores, and every item")


def score_several(arguments: argparse.Namespace) -> None:
    """`score` for several runs of one base, each into a folder of its own in `--out`.

    The first of those that share a batch computes for all of them.
    """
    if not arguments.tasks:
        raise SboraxError("give --tasks; `sborax tasks` lists what it takes")
    tasks = _tasks(arguments)
    for task in tasks:
        task.check()
    targets = load_several(arguments.targets)
    say_batches(arguments.targets, targets)
    params, adapters = [target.params for target in targets], [target.adapters for target in targets]
    place = Path(arguments.out or f"runs/eval-{Path(arguments.target).name}-{len(targets)}")
    for target, source, name, scorer in zip(
        targets,
        arguments.targets,
        labels(arguments.targets),
        scorers(targets[0].model, params, adapters, arguments.batch_tokens),
        strict=True,
    ):
        say(f"{name}:")
        evaluate(
            tasks, scorer, limit=arguments.limit, seed=arguments.seed, out=place / name,
            trained_on=_trained_on(target), about={"target": source, "adapter": None},
        )  # fmt: skip
    say(f"{place}: the scores of each, and every item")


def check_tasks(experiment: Experiment) -> None:
    """Raise SboraxError if `eval.tasks` names a task that could not be scored at the end of the run."""
    if not experiment.eval.tasks:
        return
    if several():
        raise SboraxError("eval.tasks: one process scores; leave it empty and use `sborax eval RUN_DIR` afterwards")
    for task in chosen(",".join(experiment.eval.tasks)):
        task.check()


def score_run(run: str) -> None:
    """Score a finished run on the `eval.tasks` of its experiment, into `scores/` of its directory.

    If these tasks have scores of all their items already, nothing is done. Other scores there are renamed.
    Raises SboraxError for a task that is not known or data that is not found.
    """
    experiment, place = find_run(run)[0], Path(run) / SCORE_FOLDER
    tasks = chosen(",".join(experiment.eval.tasks))
    stored = {(score["task"], score.get("data"), score.get("limit")) for score in read_scores(place)}
    if stored == {(task.name, task.data, None) for task in tasks}:
        say(f"{place}: is scored already")
        return
    target = load_run(run)
    rename_scores(epath.Path(run), "they are of other tasks, or incomplete", say)
    scorer = Scorer.of(target.model, target.params, target.adapters, mesh=experiment.mesh)
    evaluate(tasks, scorer, out=place, trained_on=_trained_on(target), about={"target": run})
    say(f"{place}: the scores, and every item")


def _tasks(arguments: argparse.Namespace) -> list[AbstractTask]:
    tasks = {task.name: task for task in chosen(arguments.tasks)}
    for option in arguments.data:
        name, equals, place = option.partition("=")
        if not equals or name not in tasks:
            raise SboraxError(f"--data {option}: write TASK=PATH, with a task that --tasks names")
        tasks[name] = dataclasses.replace(tasks[name], data=place)
    if arguments.template is not None:
        fixed = next((task.name for task in tasks.values() if task.template is None), None)
        if fixed is not None:
            raise SboraxError(f"--template: {fixed} has a prompt of its own; name it in another call")
        tasks = {name: dataclasses.replace(task, template=arguments.template) for name, task in tasks.items()}
    return list(tasks.values())


def _trained_on(target: Target) -> list[Any] | None:
    """The records that a run was trained on; None for a model, and for data that is not found."""
    if target.experiment is None:
        return None
    data = target.experiment.data
    try:
        if isinstance(data.name, str) and "/" not in data.name and find(data.name, data.split) is None:
            # Names on the hub have an organisation. Without a network it takes long to find out that one is missing.
            raise SboraxError(f"{data.name}: not under $SBORAX_DATA")
        records = list(read(data.name, data.split))
        if data.limit is None:
            return records
        model = target.model
        report = load_samples(data, model.tokenizer, end_token(model), model.config.context)[1]
        return records[: report.records]
    except SboraxError as error:
        say(f"the run's training data cannot be read, so items are not compared with it ({error})")
        return None


def _harness(arguments: argparse.Namespace, scorer: Scorer, out: str) -> None:
    try:
        from sborax.evaluate.harness import run_harness
    except ImportError as error:
        raise SboraxError(f"--harness: {error}; pip install 'sborax[eval]'") from None
    run_harness(
        arguments.harness.split(","), scorer, limit=arguments.limit, include=arguments.include, out=out,
        seed=arguments.seed,
    )  # fmt: skip


def tasks() -> str:
    """`sborax tasks`: a line for every name that `--tasks` takes, with its protocol."""
    from sborax.evaluate import GROUPS, every_task

    load_plugins()
    all_tasks = every_task()
    width = max(len(name) for name in (*GROUPS, *(task.name for task in all_tasks)))
    lines = [f"{task.name:{width}}  {task.about}" for task in all_tasks]
    return "\n".join([*lines, *(f"{name:{width}}  = {', '.join(members)}" for name, members in GROUPS.items())])
