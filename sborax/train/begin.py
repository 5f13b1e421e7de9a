"""The adapters of a run before its first step, some of them from gradients of the run's own data."""

from etils import epath

from sborax.adapters.core import SboraxError
from sborax.adapters.leaves import nest
from sborax.adapters.tree import nodes
from sborax.data.batches import Batches
from sborax.layout.hosts import several
from sborax.layout.state import Parts, parameters
from sborax.models.language_model import LanguageModel
from sborax.records.adapter import PLAN, read_adapter, save_adapter
from sborax.records.claim import START
from sborax.records.report import plan_lines
from sborax.train.experiment import save_experiment
from sborax.train.hints import gradients
from sborax.train.prepare import Prepared
from sborax.train.read import Echo


def begin(prepared: Prepared, model: LanguageModel, batches: Batches, run: epath.Path, echo: Echo) -> Parts:
    """`Prepared.adapt` on the parameters of `model`, with gradients where a method starts from them.

    Adapters that start from gradients are kept in the run directory: gradients computed anew could differ in the last
    bit, and singular vectors would then differ in every bit.
    Raises SboraxError as `Prepared.adapt` does, and if several processes would have to compute gradients.
    """
    for line in ["adapting:"] * bool(prepared.plan.sites) + plan_lines(prepared.plan):
        echo(line)
    paths = sorted(site.path for site in prepared.plan.sites if site.method.needs)
    begun, hint = {}, None
    if paths and (run / START / PLAN).exists():
        begun = nodes(read_adapter(run / START).adapters)
    elif paths and several():
        raise SboraxError(
            f"{paths[0]}: starts from gradients, which one process computes; begin the run on one, and --resume on all"
        )
    elif paths:
        experiment = prepared.experiment
        hint = gradients(model, prepared.plan, batches, experiment.hint_batches, echo, experiment.loss)
    total = parameters(model.params)
    params, adapters = prepared.attach(model.params, hint, begun)
    if hint is not None:
        # They are valid for this config alone, so it is written first.
        save_experiment(prepared.experiment, run)
        # Before the procedure's start, which a resumed run makes again.
        save_adapter(run / START, nest({path: nodes(adapters)[path] for path in paths}))
    parts = prepared.take_apart(params, adapters)
    echo(f"trainable: {parts.count:,} parameters, {100 * parts.count / total:.3f} % of {total:,}")
    return parts
