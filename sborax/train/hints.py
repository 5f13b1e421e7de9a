"""What some methods want to know of a model before they start, computed from the run's own data."""

import re
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sborax.adapters.core import Hint, dense
from sborax.adapters.hints import gradient_hints
from sborax.adapters.paths import Plan, Site, kernels, module_path
from sborax.adapters.tree import Params
from sborax.data.batches import Batch, Batches
from sborax.models.language_model import LanguageModel
from sborax.train.head_loss import frozen_head_loss, trained_head_loss
from sborax.train.outputs import HEAD

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
    model: LanguageModel, plan: Plan, batches: Batches, count: int, echo: Echo
) -> Callable[[Params, Site], Hint]:
    """Computes a site's hint when it is asked for: the mean gradient of the un-adapted model over `count` microbatches.

    A microbatch's loss is the mean over its tokens that count. Only one kernel's gradient exists at a time.
    """
    sites = [site.path for site in plan.sites if site.method.needs]
    held = first_batches(batches, count)

    def loss(params: Params, batch: dict[str, Any]) -> Float[Array, ""]:
        hidden = model.hidden(params, None, batch["tokens"], segment_ids=batch["segments"])
        flat = hidden.reshape(-1, hidden.shape[-1])
        targets, counts = batch["targets"].reshape(-1), batch["counts"].reshape(-1)
        total: Any
        if HEAD in sites:
            # The other loss gives no gradient of the head's kernel.
            total = trained_head_loss(lambda own: model.head(params, None, own[None])[0], flat, targets, counts)
        else:
            total = frozen_head_loss(flat, dense(model.head_kernel(params)), targets, counts, False)
        return total / jnp.maximum(jnp.sum(counts, dtype=jnp.int32), 1).astype(jnp.float32)

    def hint(params: Params, site: Site) -> Hint:
        name = site.path.removesuffix("/kernel")
        echo(f"gradient of {name} over {count} batches ({sites.index(site.path) + 1} of {len(sites)})")
        pattern = f"^{re.escape(module_path(site.path)[0])}$"
        return gradient_hints(loss, params, pattern, held)[name]

    return hint
