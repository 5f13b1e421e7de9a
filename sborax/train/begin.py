"""The adapters of a run before its first step, some of them from gradients or inputs on the run's own data."""

from collections.abc import Callable, Sequence

import numpy as np
from etils import epath
from jaxtyping import Int32

from sborax.adapters.core import Hint, SboraxError
from sborax.adapters.invocation import Tokens, invocations
from sborax.adapters.leaves import nest
from sborax.adapters.paths import Site
from sborax.adapters.tree import Params, nodes
from sborax.data.batches import Batches
from sborax.data.samples import Sample
from sborax.layout.hosts import several
from sborax.layout.state import Parts, parameters
from sborax.models.language_model import LanguageModel
from sborax.records.adapter import PLAN, read_adapter, save_adapter
from sborax.records.claim import START
from sborax.records.report import plan_lines
from sborax.train.experiment import save_experiment
from sborax.train.hints import first_batches, gradients
from sborax.train.inputs import Statistics
from sborax.train.prepare import Prepared
from sborax.train.read import Echo

RANKS = "ranks"
"""The entry of a start's `plan.json` with the ranks that the data chose, by path."""


def begin(
    prepared: Prepared, model: LanguageModel, batches: Batches, run: epath.Path, echo: Echo
) -> tuple[Prepared, Parts]:
    """`Prepared.adapt` on the parameters of `model`, with gradients and statistics of inputs where a method needs them.

    Adapters that start from data are kept in the run directory: what is computed anew could differ in the last bit, and
    singular vectors would then differ in every bit. The run comes back with the ranks that the data chose.
    Raises SboraxError as `Prepared.adapt` does, if several processes would have to compute hints, and for adapters that
    act from some tokens on if no sample has these.
    """
    for line in ["adapting:"] * bool(prepared.plan.sites) + plan_lines(prepared.plan):
        echo(line)
    for invocation in invocations(site.method for site in prepared.plan.sites):
        echo(_invocation_line(invocation, batches.rows.samples))
    paths = sorted(site.path for site in prepared.plan.sites if site.method.needs)
    begun, hint, ranked = {}, None, {}
    if paths and (run / START / PLAN).exists():
        saved = read_adapter(run / START)
        begun = nodes(saved.adapters)
        ranked = {path: Hint(ranks=tuple(ranks)) for path, ranks in saved.about.get(RANKS, {}).items()}
    elif paths and several():
        raise SboraxError(
            f"{paths[0]}: starts from data, which only one process can read; begin the run with one process, then "
            "--resume it with all"
        )
    elif paths:
        hint, ranked = _hints(prepared, model, batches, echo)
    if ranked:
        prepared = prepared.replanned(ranked)
        for line in ["ranks by these inputs:", *plan_lines(prepared.plan)]:
            echo(line)
    total = parameters(model.params)
    params, adapters = prepared.attach(model.params, hint, begun)
    if hint is not None:
        # They are valid for this config alone, so it is written first.
        save_experiment(prepared.experiment, run)
        # Before the procedure's start, which a resumed run makes again.
        start = {path: node for path, node in nodes(adapters).items() if path in paths}
        about = {RANKS: {path: hint.ranks for path, hint in ranked.items()}} if ranked else {}
        save_adapter(run / START, nest(start), about=about)
    parts = prepared.take_apart(params, adapters)
    echo(f"trainable: {parts.count:,} parameters, {100 * parts.count / total:.3f} % of {total:,}")
    return prepared, parts


def _invocation_line(invocation: Tokens, samples: Sequence[Sample]) -> str:
    """A line that tells how many samples have the tokens of an invocation. Raises SboraxError if there is none."""
    # The last token of a sample is a target only.
    count = sum(_occurs(invocation, sample.tokens[:-1]) for sample in samples)
    if not count:
        raise SboraxError(
            f"no sample of the data has the tokens {invocation} that an adapter acts from, so it would not be trained; "
            "put their text into the template or the records, and use the ids that the tokenizer gives that text"
        )
    note = "" if count == len(samples) else "; the others do not train its adapters"
    return f"invocation {invocation}: in {count:,} of {len(samples):,} samples{note}"


def _occurs(invocation: Tokens, tokens: Int32[np.ndarray, " length"]) -> bool:
    if len(tokens) < len(invocation):
        return False
    return bool((np.lib.stride_tricks.sliding_window_view(tokens, len(invocation)) == invocation).all(axis=1).any())


def _hints(
    prepared: Prepared, model: LanguageModel, batches: Batches, echo: Echo
) -> tuple[Callable[[Params, Site], Hint], dict[str, Hint]]:
    """A function that gives the hint of a site, and the hints with ranks, by path."""
    experiment = prepared.experiment
    gradient = gradients(model, prepared.plan, batches, experiment.hint_batches, echo, experiment.loss)
    microbatches = first_batches(batches, experiment.hint_batches)
    inputs = Statistics(model, prepared.plan, microbatches, echo)
    joint = inputs.joint(model.params)

    def hint(params: Params, site: Site) -> Hint:
        needs, name = site.method.needs, site.path.removesuffix("/kernel")
        grad = gradient(params, site).grad if "grad" in needs else None
        of_inputs = joint.get(name) or (inputs.of_site(params, site) if "inputs" in needs else Hint())
        return Hint(grad=grad, inputs=of_inputs.inputs)

    return hint, {name: hint for name, hint in joint.items() if hint.ranks is not None}
