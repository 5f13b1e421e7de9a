"""Makes everything that a run needs before its first step: plan, adapters, optimiser, random streams.

    prepared = prepare(experiment, model, steps)
    parts = prepared.adapt(model.params)
    state = prepared.start(parts)
    step = prepared.make_step()
    state, numbers = step(state, parts.frozen, parts.base, batch)

Training calls these functions directly, `sborax plan` under `jax.eval_shape`.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import optax
from etils import epath

from sborax.adapters.core import Adapter, Hint
from sborax.adapters.paths import Plan, Site, allotted, plan
from sborax.adapters.tree import Adapters, Params
from sborax.layout.sharding import Layout
from sborax.layout.state import Parts, TrainState, start, take_apart
from sborax.models.language_model import LanguageModel
from sborax.procedures import Run
from sborax.train.active import ActiveProcedure
from sborax.train.base import adapt
from sborax.train.experiment import Experiment
from sborax.train.hints import promised
from sborax.train.optimizer import halves, make_optimizer
from sborax.train.step import make_evaluation, make_step
from sborax.train.streams import Streams


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A run without its arrays.

    - model: without its parameters.
    - steps: length of the run, on which learning rates and procedures depend.
    - streams: random keys.
    - procedure: acts between steps; None without one.
    """

    experiment: Experiment
    model: LanguageModel
    plan: Plan
    steps: int
    streams: Streams
    procedure: ActiveProcedure | None

    @functools.cached_property
    def tx(self) -> optax.GradientTransformation:
        """The optimiser. `adapt` or `take_apart` comes first: there the procedure checks that it can watch the run."""
        return make_optimizer(self.experiment.optimizer, self.steps, self.procedure)

    @property
    def observe(self) -> bool:
        """Whether the procedure needs norms of inputs."""
        return self.procedure is not None and self.procedure.method.observes

    @property
    def differentiated(self) -> tuple[str, ...]:
        """Paths of the base kernels whose gradients the procedure needs."""
        return () if self.procedure is None else self.procedure.differentiated

    @property
    def folded(self) -> list[str]:
        """Paths of the base kernels that the procedure changes."""
        return [] if self.procedure is None else self.procedure.folded

    def replanned(self, hints: Mapping[str, Hint]) -> "Prepared":
        """The run with the ranks that hints give."""
        run_plan, procedure = allotted(self.plan, hints), self.procedure
        if procedure is not None:
            procedure = dataclasses.replace(procedure, run=dataclasses.replace(procedure.run, plan=run_plan))
        return dataclasses.replace(self, plan=run_plan, procedure=procedure)

    def adapt(
        self,
        params: Params,
        hint: Callable[[Params, Site], Hint] | None = None,
        begun: Mapping[str, Adapter] | None = None,
    ) -> Parts:
        """`attach`, then `take_apart`."""
        return self.take_apart(*self.attach(params, hint, begun))

    def attach(
        self,
        params: Params,
        hint: Callable[[Params, Site], Hint] | None = None,
        begun: Mapping[str, Adapter] | None = None,
    ) -> tuple[Params, Adapters]:
        """The base and its adapters: `sx.attach`, on a base that may be quantised.

        Args:
        - params: of the model; methods that rewrite the base change them.
        - hint: gives `init` the hint of a site whose method needs one.
        - begun: adapters that were made before, by path.

        Raises SboraxError as `sx.attach` does.
        """
        params, adapters = adapt(self.streams.adapters, params, self.plan, self.experiment.quant, hint, begun)
        self.model.check_adapters(adapters)
        return params, adapters

    def take_apart(self, params: Params, adapters: Adapters) -> Parts:
        """What is trained and what is constant, once the procedure has made its start.

        Raises SboraxError as `sborax.layout.state.take_apart` does, and if the procedure cannot act on the run.
        """
        experiment = self.experiment
        split = halves(experiment.optimizer)
        also, tokens = experiment.train_also, experiment.train_tokens
        parts = take_apart(params, adapters, experiment.train_base, also, split, tokens)
        return parts if self.procedure is None else self.procedure.start(parts)

    def start(self, parts: Parts) -> TrainState:
        """The state before the first step."""
        return start(parts, self.tx)

    def make_step(self, shardings: TrainState | None = None) -> Callable[..., tuple[TrainState, dict[str, Any]]]:
        """The compiled step, see `sborax.train.step.make_step`."""
        key, loss = self.streams.dropout, self.experiment.loss
        return make_step(self.model, self.tx, key, self.observe, shardings, loss, self.differentiated, self.folded)

    def make_evaluation(self) -> Callable[..., tuple[Any, Any, Any]]:
        """The compiled evaluation, see `sborax.train.step.make_evaluation`."""
        return make_evaluation(self.model, self.experiment.loss, self.folded)


def prepare(
    experiment: Experiment,
    model: LanguageModel,
    steps: int,
    place: epath.Path = epath.Path(),
    layout: Layout = Layout(),
) -> Prepared:
    """The run of `experiment` on `model`, before its adapters are made.

    Args:
    - model: its parameters may be shapes, unless a rank policy reads weights.
    - steps: length of the run.
    - place: the run directory, where a procedure keeps the adapters that it replaces.
    - layout: of the run on its devices.

    Raises SboraxError as planning does.
    """
    run_plan = plan(model.params, experiment.rules, hints=promised(model.params))
    streams = Streams.of(experiment.seed_adapter)
    procedure = None
    if experiment.procedure is not None:
        run = Run(run_plan, steps, model.config.num_key_value_heads)
        split = halves(experiment.optimizer)
        procedure = ActiveProcedure(experiment.procedure, run, streams.procedure, place, split, layout)
    # Without parameters: a second reference would keep a rewritten or trained base alive.
    return Prepared(experiment, dataclasses.replace(model, params={}), run_plan, steps, streams, procedure)
