"""`sborax merge`: a run, or several adapters with a weight each, as a dense model with its card."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from sborax.adapters.core import SboraxError
from sborax.adapters.tree import merge as merge_tree
from sborax.adapters.weighted import Weighted, merge_weighted
from sborax.cli.approximate import approximated
from sborax.cli.facts import facts, methods
from sborax.cli.targets import Target, find_run, is_best, is_run, load_run, load_target
from sborax.config.terminal import say
from sborax.interop.card import check_card, model_card, write_card
from sborax.interop.peft import load_peft
from sborax.interop.peft_layout import CONFIG
from sborax.models import save_hf
from sborax.records.adapter import fingerprint, load_adapter, read_adapter


def merge(target: str, out: str, approximate: str | None = None, added: Sequence[str] = ()) -> None:
    """approximate: "inputs" or "weights" for what `procedures.reslora` merges, its error printed.

    added: NAME=WEIGHT, runs and PEFT adapters whose change of the base is added that many times.
    """
    check_card(out)
    terms = [_term(word) for word in added]
    if not terms:
        own = load_run(target)
        merged: Any = approximated(own, approximate) if approximate else merge_tree(own.params, own.adapters)
        made = f"{target} merged into its base{', approximately, by its ' + approximate if approximate else ''}"
    elif approximate:
        raise SboraxError("--approximate merges one run; leave --add out")
    else:
        own = load_target(target)
        parts = [] if own.experiment is None else [Weighted(1.0, own.adapters, own.params)]
        prints = fingerprint(own.model.params)
        parts += [_part(own, prints, target, name, weight) for name, weight in terms]
        merged = merge_weighted(own.model.params, parts)
        terms = ([] if own.experiment is None else [(target, 1.0)]) + terms
        made = "the base plus " + " plus ".join(f"{weight:g} times the change by {name}" for name, weight in terms)
    runs = [name for name in (target, *dict(terms)) if is_run(name) or is_best(name)]
    card = _card(target if own.experiment is None else own.experiment.model, made, list(dict.fromkeys(runs)))
    save_hf(out, own.model, merged)
    write_card(out, card)
    say(f"{out}: a dense model, {made}; transformers and `sborax generate {out}` load it")


def _card(base: str, made: str, runs: Sequence[str]) -> str:
    found, told = [], {}
    for run in runs:
        found += methods(find_run(run)[0])
        before = f"{run}: " if len(runs) > 1 else ""
        told |= {f"{before}{title}": fact for title, fact in facts(run).items()}
    return model_card(f"Made by `sborax merge`: {made}.", found, base, told)


def _term(word: str) -> tuple[str, float]:
    name, _, number = word.rpartition("=")
    try:
        weight = float(number)
    except ValueError:
        weight = math.nan
    if not name or not math.isfinite(weight):
        raise SboraxError(f"--add {word}: give a run or a PEFT adapter and its weight, such as runs/two=0.5")
    return name, weight


def _part(onto: Target, prints: Mapping[str, str], target: str, name: str, weight: float) -> Weighted:
    """What is added; its base must be that of `onto`, which has these fingerprints."""
    if (epath.Path(name) / CONFIG).exists():
        params, adapters = load_peft(name, onto.model)
        return Weighted(weight, adapters, params)
    if not (is_run(name) or is_best(name)):
        raise SboraxError(f"--add {name}: neither a run nor a PEFT adapter directory")
    experiment, adapter = find_run(name)
    model = onto.model
    for path, print_ in read_adapter(adapter).base.items():
        # Quantised leaves have no fingerprint.
        if prints.get(path, print_) != print_:
            raise SboraxError(f"--add {name}: was trained on another base model than {target} has ({path} differs)")
    quantised = experiment.quant or (onto.experiment is not None and onto.experiment.quant)
    if not quantised and experiment.precision == model.module.dtype.name:
        # The base is in memory once.
        params, adapters = load_adapter(adapter, model.params)
        return Weighted(weight, adapters, params)
    run = load_run(name)
    return Weighted(weight, run.adapters, run.params, run.model.params)
