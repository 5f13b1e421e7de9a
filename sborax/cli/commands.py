"""The commands that load a model."""

import argparse
import dataclasses
import math
from pathlib import Path
from typing import Any

import jax

from sborax.cli.approximate import approximated
from sborax.cli.evaluate import check_tasks, score_run
from sborax.cli.targets import load_run, load_target
from sborax.core import SboraxError
from sborax.data.template import NAMES, prompt_of
from sborax.interop.peft import save_peft
from sborax.models import generate as write
from sborax.models import save_hf
from sborax.models.slim import slim as cut
from sborax.train.experiment import load_experiment
from sborax.train.loop import read_held_out
from sborax.train.loop import train as fine_tune
from sborax.train.measure import loss_on
from sborax.train.state import parameters
from sborax.tree import merge as merge_tree


def train(arguments: argparse.Namespace) -> bool:
    """`sborax train`: whether the run came to its end."""
    experiment = load_experiment(arguments.experiment, arguments.changes)
    if arguments.compile_cache is not None:
        jax.config.update("jax_compilation_cache_dir", arguments.compile_cache)
        # By default JAX keeps no program that took less than a second.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    out = arguments.out or f"runs/{Path(arguments.experiment).stem}"
    check_tasks(experiment)
    finished = fine_tune(experiment, out, resume=arguments.resume, profile=arguments.profile).finished
    if finished and experiment.eval.tasks:
        score_run(out)
    return finished


def generate(arguments: argparse.Namespace) -> None:
    """`sborax generate`."""
    target = load_target(arguments.target, arguments.adapter)
    tokenizer = target.model.tokenizer
    if tokenizer is None:
        raise SboraxError(f"{arguments.target}: has no tokenizer.json, so text cannot become tokens")
    prompts = [encode(prompt, arguments.template, tokenizer) for prompt in arguments.prompt]
    written = write(
        target.model,
        target.params,
        target.adapters,
        prompts,
        arguments.max_new_tokens,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        key=jax.random.key(arguments.seed),
    )
    for prompt, new in zip(prompts, written, strict=True):
        shown = new if arguments.template else [*prompt, *new]
        print(tokenizer.decode(shown, skip_special_tokens=True))


def encode(prompt: str, template: str | None, tokenizer: Any) -> list[int]:
    """Token ids of a prompt, through a template if one is given.

    Raises SboraxError for a template that does not fit the tokenizer.
    """
    if template is None:
        return tokenizer(prompt)["input_ids"]
    if template not in NAMES and "{instruction}" not in template:
        raise SboraxError(f"--template {template!r}: is not one of {', '.join(NAMES)} and has no {{instruction}} in it")
    text = prompt_of(template, {"instruction": prompt, "input": "", "output": "", "text": prompt}, tokenizer)
    return tokenizer(text, add_special_tokens=template != "chat")["input_ids"]


def merge(run: str, out: str, approximate: str | None = None) -> None:
    """`sborax merge`; approximate: "inputs" or "weights" for what `procedures.reslora` merges, its error printed."""
    target = load_run(run)
    merged = approximated(target, approximate) if approximate else merge_tree(target.params, target.adapters)
    save_hf(out, target.model, merged)
    print(f"{out}: a dense model; transformers and `sborax generate {out}` load it")


def slim(run: str, out: str) -> None:
    """`sborax slim`."""
    target = load_run(run)
    experiment, model = target.experiment, target.model
    assert experiment is not None
    # Fails first if there is nothing to cut.
    small = cut(model, target.params, target.adapters)
    if experiment.eval.data is None:
        print("the experiment has no eval.data: perplexity is that of the training data")
        experiment = dataclasses.replace(experiment, eval=dataclasses.replace(experiment.eval, data=experiment.data))
    batches = read_held_out(experiment, model, print)
    print("perplexity:")
    for what, own, params, adapters in (
        ("before training", model, model.params, None),
        ("pruned, heads and channels masked", model, target.params, target.adapters),
        ("pruned, heads and channels cut out", small, small.params, None),
    ):
        loss = loss_on(own, params, adapters, batches)
        print(f"  {what}: {math.exp(loss):.4f} (loss {loss:.4f}), {parameters(params):,} parameters")
    save_hf(out, small, small.params)
    if small.config.layer_sizes:
        print(
            f"{out}: a smaller model for `sborax generate {out}`; transformers cannot load it, since its layers keep "
            "different numbers of heads and channels, which no config.json of its can say; protect=0 prunes all alike"
        )
    else:
        print(f"{out}: a smaller model; transformers and `sborax generate {out}` load it")


def export(run: str, out: str, form: Any) -> None:
    """`sborax export`."""
    target = load_run(run)
    assert target.experiment is not None
    try:
        done = save_peft(out, target.model, target.params, target.adapters, as_=form, base=target.experiment.model)
    except SboraxError as error:
        raise SboraxError(str(error).replace("as_='lora'", "--as lora")) from error
    print(f"{out}: {done}")
