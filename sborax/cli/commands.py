"""The commands that load a model."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from sborax.cli.targets import load_run, load_target
from sborax.core import SboraxError
from sborax.data.template import NAMES, prompt_of
from sborax.interop.peft import save_peft
from sborax.models import generate as write
from sborax.models import save_hf
from sborax.train.experiment import load_experiment
from sborax.train.loop import train as fine_tune
from sborax.tree import merge as merge_tree


def train(source: str, changes: Sequence[str], out: str | None, resume: bool) -> bool:
    """`sborax train`: whether the run came to its end."""
    experiment = load_experiment(source, changes)
    return fine_tune(experiment, out or f"runs/{Path(source).stem}", resume=resume).finished


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


def merge(run: str, out: str) -> None:
    """`sborax merge`."""
    target = load_run(run)
    save_hf(out, target.model, merge_tree(target.params, target.adapters))
    print(f"{out}: a dense model; transformers and `sborax generate {out}` load it")


def export(run: str, out: str, form: Any) -> None:
    """`sborax export`."""
    target = load_run(run)
    assert target.experiment is not None
    try:
        done = save_peft(out, target.model, target.params, target.adapters, as_=form, base=target.experiment.model)
    except SboraxError as error:
        raise SboraxError(str(error).replace("as_='lora'", "--as lora")) from error
    print(f"{out}: {done}")
