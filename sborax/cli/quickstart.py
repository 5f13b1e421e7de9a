"""`sborax quickstart`: fine-tunes SmolLM2-135M with SBoRA on short conversations."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from sborax.adapters.paths import Rule
from sborax.cli.fetch import conversations, smollm2
from sborax.config.codec import override
from sborax.config.terminal import say
from sborax.data.options import Data
from sborax.data.source import read
from sborax.data.template import answer_ends, prompt_of, takes_special
from sborax.methods import SBoRA
from sborax.models import LanguageModel, generate, load_model
from sborax.models.tokenizer import prompt_tokens, text_of
from sborax.records.adapter import load_adapter
from sborax.records.disk import ADAPTER
from sborax.records.report import METRICS, SUMMARY, clock
from sborax.train.experiment import Eval, Experiment, Optimizer, Save
from sborax.train.loop import train

QUESTIONS = 3
NEW_TOKENS = 40
FEW = 10
"""Steps over which a printed loss is averaged: between batches this small it varies more than a step improves it."""


def experiment(model: str, data: str, held_out: bool) -> Experiment:
    """The experiment of the quickstart. Rows of 64 tokens keep a step to a few seconds on two cores."""
    rows = Data(name=data, template="chat", max_length=64, buckets=(64,))
    return Experiment(
        model=model,
        data=rows,
        rules=(Rule(r"self_attn/|mlp/", SBoRA(rank=64)),),
        optimizer=Optimizer(lr=1e-3, schedule="cosine", warmup=0.05),
        steps=60,
        batch_size=8,
        eval=Eval(
            data=Data(name=data, template="chat", split="test", max_length=64, buckets=(64,)) if held_out else None
        ),
        save=Save(every=30),
    )


def quickstart(changes: Sequence[str], out: str | None) -> bool:
    """Download the model and the data unless `changes` name others, fine-tune, print answers before and after.

    Returns whether the run made all its steps.
    Raises SboraxError as downloading and training do.
    """
    values = {key: value for key, _, value in (change.partition("=") for change in changes)}
    model_path = values.get("model") or str(smollm2())
    data_path = values.get("data.name") or str(conversations())
    settled = override(experiment(model_path, data_path, "data.name" not in values), changes)
    run = out or _unused(Path("runs/quickstart"))

    model = load_model(settled.model, settled.precision)
    questions = _questions(settled.eval.data or settled.data)
    before = _answers(model, model.params, None, settled.data.template, questions)
    del model

    if not train(settled, run).finished:
        return False

    model = load_model(settled.model, settled.precision)
    params, adapters = load_adapter(Path(run) / ADAPTER, model.params)
    after = _answers(model, params, adapters, settled.data.template, questions)
    say(_summary(run, questions, before, after))
    return True


def _unused(run: Path) -> str:
    """`run`, or the first of `run-2`, `run-3`, ... that does not exist."""
    number, place = 1, run
    while place.exists():
        number += 1
        place = run.with_name(f"{run.name}-{number}")
    return str(place)


def _questions(data: Data) -> Sequence[Mapping[str, Any]]:
    """Records spread over the data, with different questions."""
    records = read(data.name, data.split)
    distinct = list({record.get("instruction"): record for record in records}.values())
    stride = max(1, len(distinct) // QUESTIONS)
    return distinct[stride // 2 :: stride][:QUESTIONS]


def _answers(
    model: LanguageModel, params: Any, adapters: Any, template: str, questions: Sequence[Mapping[str, Any]]
) -> list[str]:
    tokenizer = model.tokenizer
    texts = [prompt_of(template, record, tokenizer) for record in questions]
    prompts = [prompt_tokens(tokenizer, text, takes_special(template)) for text in texts]
    outputs = generate(model, params, adapters, prompts, NEW_TOKENS, eos=answer_ends(template, model))
    lines = [" ".join(text_of(tokenizer, new).split()) for new in outputs]
    return [text + " ..." * (len(new) == NEW_TOKENS) for text, new in zip(lines, outputs, strict=True)]


def _summary(run: str, questions: Sequence[Mapping[str, Any]], before: Sequence[str], after: Sequence[str]) -> str:
    """The answers before and after, the losses, and what to do next."""
    summary = json.loads((Path(run) / SUMMARY).read_text())
    metrics = [json.loads(line) for line in (Path(run) / METRICS).read_text().splitlines()]
    losses = [line["loss"] for line in metrics if "loss" in line]
    lines = [""]
    for record, old, new in zip(questions, before, after, strict=True):
        lines += [f"{record.get('instruction')}", f"  before: {old}", f"  after:  {new}", ""]
    span = min(FEW, len(losses))
    held_out = "" if summary["eval_loss"] is None else f"; {summary['eval_loss']:.3f} on questions that were held out"
    lines += [
        f"loss {fmean(losses[:span]):.3f} in the first {span} steps, {fmean(losses[-span:]):.3f} in the last{held_out}",
        f"{summary['steps']} steps in {clock(summary['seconds'])} minutes; "
        f"{summary['peak_memory'] / 1e9:.1f} GB of memory at most",
        f"{summary['trainable_parameters']:,} of {summary['base_parameters']:,} parameters were trained; "
        f"the adapter is in {run}/{ADAPTER}/",
        "",
        f'ask it something: sborax generate {run} --template chat --prompt "Who are you?"',
        f"a dense model:    sborax merge {run} merged/",
        f"for PEFT:         sborax export {run} peft/",
    ]
    return "\n".join(lines)
