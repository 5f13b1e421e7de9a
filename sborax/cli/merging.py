"""`sborax merge`: writes a run, or a weighted sum of adapters, as a dense model with a model card."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from etils import epath

from sborax.adapters.combination import Combination
from sborax.adapters.core import SboraxError
from sborax.adapters.tree import merge as merge_tree
from sborax.adapters.weighted import Weighted, merge_weighted
from sborax.cli.approximate import merge_approximately
from sborax.cli.facts import facts, methods
from sborax.cli.targets import Target, find_run, is_best, is_run, load_onto, load_run, load_target
from sborax.config.terminal import say
from sborax.interop.card import check_card, model_card, write_card
from sborax.interop.peft import load_peft
from sborax.interop.peft_layout import CONFIG
from sborax.models import save_hf
from sborax.records.adapter import fingerprint, read_adapter


def merge(
    target: str,
    out: str,
    approximate: str | None = None,
    added: Sequence[str] = (),
    combination: Combination = Combination(),
    seed: int = 0,
) -> None:
    """Write a dense model and its card to `out`.

    - target: a run; with `added`, also a model without an adapter.
    - approximate: "inputs" or "weights", a merge of `sborax.interop.reslora`, whose error is printed; None for an exact
      merge.
    - added: `NAME=WEIGHT`: runs and PEFT adapters whose change of the base is added, times WEIGHT.
    - combination: how the changes are combined, if there is any `added`.
    - seed: of what the combination draws.

    Raises SboraxError for adapters that do not merge, or were trained on another base.
    """
    check_card(out)
    terms = [_term(word) for word in added]
    if not terms and combination != Combination():
        raise SboraxError(f"--combination {combination.kind}: combines several changes; give them with --add")
    if not terms:
        source = load_run(target)
        merged: Any = (
            merge_approximately(source, approximate) if approximate else merge_tree(source.params, source.adapters)
        )
        origin = f"{target} merged into its base{', approximately, by its ' + approximate if approximate else ''}"
    elif approximate:
        raise SboraxError("--approximate merges one run; leave --add out")
    else:
        source = load_target(target)
        parts = [] if source.experiment is None else [Weighted(1.0, source.adapters, source.params)]
        prints = fingerprint(source.model.params)
        parts += [_part(source, prints, target, name, weight) for name, weight in terms]
        merged = merge_weighted(source.model.params, parts, combination, jax.random.key(seed))
        terms = ([] if source.experiment is None else [(target, 1.0)]) + terms
        origin = "the base plus " + " plus ".join(f"{weight:g} times the change by {name}" for name, weight in terms)
        origin += "" if combination.kind == "cat" else f", combined by {combination.described}"
    runs = [name for name in (target, *dict(terms)) if is_run(name) or is_best(name)]
    card = _card(target if source.experiment is None else source.experiment.model, origin, list(dict.fromkeys(runs)))
    save_hf(out, source.model, merged)
    write_card(out, card)
    say(f"{out}: a dense model, {origin}; transformers and `sborax generate {out}` load it")


def _card(base: str, origin: str, runs: Sequence[str]) -> str:
    names, lines = [], {}
    for run in runs:
        names += methods(find_run(run)[0])
        prefix = f"{run}: " if len(runs) > 1 else ""
        lines |= {f"{prefix}{title}": fact for title, fact in facts(run).items()}
    return model_card(f"Made by `sborax merge`: {origin}.", names, base, lines)


def _term(word: str) -> tuple[str, float]:
    """Name and weight of a word of `--add`."""
    name, _, number = word.rpartition("=")
    try:
        weight = float(number)
    except ValueError:
        weight = math.nan
    if not name or not math.isfinite(weight):
        raise SboraxError(f"--add {word}: give a run or a PEFT adapter and its weight, such as runs/two=0.5")
    return name, weight


def _part(source: Target, prints: Mapping[str, str], target: str, name: str, weight: float) -> Weighted:
    """The adapter to add. It must have been trained on the base of `source`, which has these fingerprints."""
    if (epath.Path(name) / CONFIG).exists():
        params, adapters = load_peft(name, source.model)
        return Weighted(weight, adapters, params)
    if not (is_run(name) or is_best(name)):
        raise SboraxError(f"--add {name}: neither a run nor a PEFT adapter directory")
    experiment, adapter = find_run(name)
    model = source.model
    for path, print_ in read_adapter(adapter).base.items():
        # Quantised leaves have no fingerprint.
        if prints.get(path, print_) != print_:
            raise SboraxError(f"--add {name}: was trained on another base model than {target} has ({path} differs)")
    quantised = experiment.quant or (source.experiment is not None and source.experiment.quant)
    if not quantised and experiment.precision == model.module.dtype.name:
        # The bases are the same arrays, so the base is in memory once.
        run = load_onto(model, experiment, adapter)
        return Weighted(weight, run.adapters, run.params)
    run = load_run(name)
    return Weighted(weight, run.adapters, run.params, run.model.params)
