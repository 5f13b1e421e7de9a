"""`sborax train`, `sborax slim` and `sborax export`."""

import argparse
import dataclasses
import math
from pathlib import Path
from typing import Any

import jax

from sborax.adapters.core import SboraxError
from sborax.cli.evaluate import check_tasks, score_run
from sborax.cli.facts import facts, methods
from sborax.cli.layout import with_mesh
from sborax.cli.targets import load_run
from sborax.config.terminal import say
from sborax.interop.card import check_card, model_card, write_card
from sborax.interop.peft import save_peft
from sborax.interop.slim import slim as cut
from sborax.layout.state import parameters
from sborax.models import save_hf
from sborax.models.families import UNEQUAL
from sborax.train.experiment import load_experiment
from sborax.train.loop import train as fine_tune
from sborax.train.measure import loss_on
from sborax.train.read import read_held_out


def train(arguments: argparse.Namespace) -> bool:
    """`sborax train`. Returns whether the run made all its steps."""
    changes = with_mesh(arguments.changes, arguments.mesh)
    experiment = load_experiment(arguments.experiment, changes, arguments.imports)
    if arguments.compile_cache is not None:
        jax.config.update("jax_compilation_cache_dir", arguments.compile_cache)
        # By default JAX does not keep programs that took less than a second to compile.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    out = arguments.out or f"runs/{Path(arguments.experiment).stem}"
    check_tasks(experiment)
    finished = fine_tune(experiment, out, resume=arguments.resume, profile=arguments.profile).finished
    if finished and experiment.eval.tasks:
        score_run(out)
    return finished


def slim(run: str, out: str) -> None:
    """`sborax slim`."""
    check_card(out)
    target = load_run(run)
    experiment, model = target.experiment, target.model
    assert experiment is not None
    # Before the data is read: it fails if there is nothing to cut.
    small = cut(model, target.params, target.adapters)
    if experiment.eval.data is None:
        say("the experiment has no eval.data: perplexity is that of the training data")
        experiment = dataclasses.replace(experiment, eval=dataclasses.replace(experiment.eval, data=experiment.data))
    batches = read_held_out(experiment, model, say)
    say("perplexity:")
    for title, measured, params, adapters in (
        ("before training", model, model.params, None),
        ("pruned, heads and channels masked", model, target.params, target.adapters),
        ("pruned, heads and channels cut out", small, small.params, None),
    ):
        loss = loss_on(measured, params, adapters, batches)
        say(f"  {title}: {math.exp(loss):.4f} (loss {loss:.4f}), {parameters(params):,} parameters")
    origin = f"Made by `sborax slim` from {run}: heads and channels that LoRAPrune pruned are cut out."
    uniform = not small.config.model_type.startswith(UNEQUAL)
    card = model_card(origin, [*methods(experiment), "pruned"], experiment.model, facts(run), hf=uniform)
    save_hf(out, small, small.params)
    write_card(out, card)
    if uniform:
        say(f"{out}: a smaller model; transformers and `sborax generate {out}` load it")
    else:
        say(
            f"{out}: a smaller model for `sborax generate {out}`; transformers cannot load it, since its layers have "
            "different numbers of heads and channels; with protect=0 all layers are pruned equally"
        )


def export(
    run: str,
    out: str,
    form: Any,
    rank: int | None = None,
    overwrite: bool = False,
    save_embedding_layers: bool = False,
) -> None:
    """`sborax export`.

    - form: "native" or "lora".
    - rank: of what is truncated; None for the method's own.
    - overwrite: whether `out` may hold files; those of an earlier export are replaced.
    - save_embedding_layers: whether the embedding and the head of the base are stored, too.
    """
    if rank is not None and (form == "native" or rank < 1):
        raise SboraxError(f"--rank {rank}: must be 1 or more, and goes with --as lora, which may truncate")
    place = Path(out)
    if place.exists() and not place.is_dir():
        raise SboraxError(f"{out}: exists and is not a directory; choose another OUT_DIR")
    if place.exists() and any(place.iterdir()) and not overwrite:
        raise SboraxError(
            f"{out}: exists and is not an empty directory; choose another OUT_DIR, or --overwrite an earlier export"
        )
    target = load_run(run)
    assert target.experiment is not None
    try:
        exported = save_peft(
            out, target.model, target.params, target.adapters, as_=form, rank=rank, base=target.experiment.model,
            facts=facts(run), save_embedding_layers=save_embedding_layers,
        )  # fmt: skip
    except SboraxError as error:
        # The options as the command line spells them.
        message = str(error).replace("as_='lora'", "--as lora").replace("say rank=...", "say --rank N")
        message = message.replace("give save_embedding_layers=True", "give --save-embedding-layers")
        raise SboraxError(message) from error
    say(f"{out}: {exported}")
