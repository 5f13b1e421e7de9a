"""What some methods want to know of a model before they start, computed from the run's own data."""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sborax.adapters.core import Hint
from sborax.adapters.hints import gradient_hints
from sborax.adapters.paths import Plan, Site, kernels, module_path
from sborax.adapters.tree import Params
from sborax.data.batches import Batch, Batches
from sborax.models.language_model import LanguageModel
from sborax.train.loss import AbstractLoss, CrossEntropy
from sborax.train.outputs import HEAD, Outputs

Echo = Callable[[str], None]


def promised(params: Params) -> dict[str, Hint]:
    """Hints that say no more than that there will be a gradient for every kernel: enough to plan with."""
    return {
        path.removesuffix("/kernel"): Hint(grad=np.broadcast_to(np.float32(0), weight.shape))
        for path, weight in kernels(params).items()
    }


def first_batches(batches: Batches, count: int) -> list[Batch]:
    """The first microbatches of a run, all padded to the longest of them: one shape is compiled."""
    found: list[Batch] = []
    step = 0
    while len(found) < count:
        batch = batches[step]
        found += [{name: array[i] for name, array in batch.items()} for i in range(len(batch["tokens"]))]
        step += 1
    longest = max(batch["tokens"].shape[1] for batch in found[:count])

    def padded(array: np.ndarray) -> np.ndarray:
        return np.pad(array, ((0, 0), (0, longest - array.shape[1])))

    return [{name: padded(array) for name, array in batch.items()} for batch in found[:count]]


def gradients(
    model: LanguageModel,
    plan: Plan,
    batches: Batches,
    count: int,
    echo: Echo,
    loss: AbstractLoss = CrossEntropy(),
) -> Callable[[Params, Site], Hint]:
    """Computes a site's hint when it is asked for: the mean gradient of the un-adapted model over `count` microbatches.

    A microbatch's loss is the mean over its items. Only one kernel's gradient exists at a time.
    """
    sites = [site.path for site in plan.sites if site.method.needs]
    held = first_batches(batches, count)
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
        return gradient_hints(mean, params, pattern, held)[name]

    return hint
