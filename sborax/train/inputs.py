"""Statistics of the inputs of a model's projections, from which some methods start, on a run's own data."""

import dataclasses
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from sborax.adapters.core import Hint, SboraxError
from sborax.adapters.hints import is_joint, statistics
from sborax.adapters.informed import Inputs
from sborax.adapters.paths import Plan, RuleLike, Site, plan
from sborax.adapters.tree import Params
from sborax.models.language_model import LanguageModel
from sborax.models.names import TABLE, unlayered
from sborax.train.hints import Echo, promised
from sborax.train.outputs import HEAD


def input_hints(
    model: LanguageModel, rules: Iterable[RuleLike], batches: Iterable[Mapping[str, Any]]
) -> dict[str, Hint]:
    """Statistics of the inputs of a model's projections, a `Hint(inputs=...)` by path, for the `hints` of `attach`.

    Every batch is a forward pass of the model without adapters for each kernel, or for all kernels at once where a
    method compares them, as `EVA` does. Such a method may take the batches again and again. The hints of `EVA` also
    hold the ranks of all weights; `plan` and `attach` give them to the adapters.

    Args:
    - model: with its un-adapted parameters.
    - rules: which kernels get which method, as for `attach`. Only methods that need statistics of inputs count.
    - batches: dicts with `tokens` (batch, seq) and, optionally, `segments`, 0 at padding, and `counts`, True where the
      next token belongs to an answer. By default nothing is padding, and every token is an answer's. They are held in
      a list.

    Raises SboraxError as `plan` does, for no batch, and for kernels of experts, whose inputs are not collected.
    """
    planned = plan(model.params, rules, hints=promised(model.params))
    return _hints(model, model.params, _sites(planned), list(batches))


class Statistics:
    """The statistics for the sites of a plan, in a run."""

    def __init__(self, model: LanguageModel, chosen: Plan, microbatches: Sequence[Mapping[str, Any]], echo: Echo):
        """- microbatches: dicts as for `input_hints`.
        - echo: told what is computed.
        """
        self.model = dataclasses.replace(model, params={})
        self.microbatches, self.echo, self.sites = list(microbatches), echo, _sites(chosen)

    def joint(self, params: Params) -> dict[str, Hint]:
        """The hints of the sites that are compared with each other, which may hold ranks."""
        together = [site for site in self.sites if is_joint(site)]
        if together:
            self.echo(f"inputs of {len(together)} kernels over {len(self.microbatches)} batches")
        return _hints(self.model, params, together, self.microbatches) if together else {}

    def of_site(self, params: Params, site: Site) -> Hint:
        """The hint of another site."""
        name = site.path.removesuffix("/kernel")
        self.echo(f"inputs of {name} over {len(self.microbatches)} batches")
        return _hints(self.model, params, [site], self.microbatches)[name]


def _sites(run_plan: Plan) -> list[Site]:
    """The sites that need statistics of inputs, in the order of the model's modules."""
    order = {row.ours: number for number, row in enumerate(TABLE)}
    sites = [site for site in run_plan.sites if "inputs" in site.method.needs]
    return sorted(sites, key=lambda site: order.get(unlayered(site.path)[0], len(order)))


def _hints(
    model: LanguageModel, params: Params, sites: Sequence[Site], batches: Sequence[Mapping[str, Any]]
) -> dict[str, Hint]:
    if not batches:
        raise SboraxError("statistics of inputs need at least one batch")

    def observe(paths: Collection[str]) -> list[Callable[[], Inputs]]:
        compute = jax.jit(lambda params, tokens, segments: _rows(model, params, tokens, segments, paths))

        def inputs_of(batch: Mapping[str, Any]) -> Inputs:
            tokens = np.asarray(batch["tokens"])
            segments = np.asarray(batch.get("segments", np.ones_like(tokens)))
            rows = compute(params, jnp.asarray(tokens), jnp.asarray(segments))
            return Inputs(rows, segments > 0, _answers(batch, tokens))

        return [lambda batch=batch: inputs_of(batch) for batch in batches]

    return statistics(sites, observe)


def _rows(
    model: LanguageModel, params: Params, tokens: Array, segments: Array, paths: Collection[str]
) -> dict[str, Float[Array, "weights batch seq in"]]:
    """The inputs of the kernels at `paths`."""
    hidden, collected = model.collect(params, None, tokens, ["rows"], segment_ids=segments)
    rows = {**collected.rows, HEAD: hidden}
    hidden_away = [path for path in paths if path not in rows]
    if hidden_away:
        raise SboraxError(f"{hidden_away[0]}: the model does not show its inputs, so no method can start from them")
    return {path: rows[path].reshape(-1, *rows[path].shape[-3:]) for path in paths}


def _answers(batch: Mapping[str, Any], tokens: np.ndarray) -> Bool[np.ndarray, "batch seq"]:
    """Which tokens belong to an answer: those that the position before counts as its target."""
    if "counts" not in batch:
        return np.ones(tokens.shape, bool)
    return np.pad(np.asarray(batch["counts"], bool), ((0, 0), (1, 0)))[:, :-1]
