"""Gradients from which some methods start, computed on the run's own data."""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sborax.adapters.core import Hint
from sborax.adapters.hints import gradient_hints
from sborax.adapters.informed import blank_hint
from sborax.adapters.paths import Plan, Site, kernels, module_path
from sborax.adapters.tree import Params
from sborax.data.batches import Batch, Batches
from sborax.models.language_model import LanguageModel
from sborax.train.loss import AbstractLoss, CrossEntropy
from sborax.train.outputs import HEAD, Outputs

Echo = Callable[[str], None]


def promised(params: Params) -> dict[str, Hint]:
    """Placeholders for planning, by kernel: hints with a zero gradient and no statistics, which are computed later."""
    return {
        path.removesuffix("/kernel"): Hint(grad=np.broadcast_to(np.float32(0), weight.shape), inputs={})
        for path, weight in kernels(params).items()
    }


def zeros(params: Params, site: Site) -> Hint:
    """The hint of a site in form alone, for shapes of what `init` makes."""
    blank = blank_hint(site.method, site.shape)
    inputs = {name: jnp.zeros((*site.stack, *leaf.shape)) for name, leaf in (blank.inputs or {}).items()}
    return Hint(grad=jnp.zeros(kernels(params)[site.path].shape), inputs=inputs)


def first_batches(batches: Batches, count: int) -> list[Batch]:
    """The first `count` microbatches of a run, padded to the longest of them, so that one shape is compiled."""
    microbatches: list[Batch] = []
    step = 0
    while len(microbatches) < count:
        batch = batches[step]
        microbatches += [{name: array[i] for name, array in batch.items()} for i in range(len(batch["tokens"]))]
        step += 1
    longest = max(batch["tokens"].shape[1] for batch in microbatches[:count])

    def padded(array: np.ndarray) -> np.ndarray:
        return np.pad(array, ((0, 0), (0, longest - array.shape[1])))

    return [{name: padded(array) for name, array in batch.items()} for batch in microbatches[:count]]


def gradients(
    model: LanguageModel,
    plan: Plan,
    batches: Batches,
    count: int,
    echo: Echo,
    loss: AbstractLoss = CrossEntropy(),
) -> Callable[[Params, Site], Hint]:
    """A function that computes the hint of a site: the mean gradient of the model without adapters over microbatches.

    The loss of a microbatch is the mean over its items. Only one kernel's gradient exists at a time.

    Args:
    - count: how many microbatches, the first ones of the run.
    - echo: told which gradient is computed.
    """
    sites = [site.path for site in plan.sites if "grad" in site.method.needs]
    microbatches = first_batches(batches, count)
    # A head that is not named here is a constant of the loss.
    trained = frozenset({HEAD} & set(sites))

    def mean(params: Params, batch: dict[str, Any]) -> Float[Array, ""]:
        batch = jax.tree.map(jnp.asarray, batch)
        hidden = model.hidden(params, None, batch["tokens"], segment_ids=batch["segments"])
        total, items = loss(Outputs(hidden, batch, model, params, {}, trained))
        return total / jnp.maximum(items, 1).astype(jnp.float32)

    def hint(params: Params, site: Site) -> Hint:
        name = site.path.removesuffix("/kernel")
        echo(f"gradient of {name} over {count} batches ({sites.index(site.path) + 1} of {len(sites)})")
        pattern = f"^{re.escape(module_path(site.path)[0])}$"
        return gradient_hints(mean, params, pattern, microbatches)[name]

    return hint
