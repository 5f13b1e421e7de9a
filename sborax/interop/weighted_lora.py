"""Several adapters combined into one plain LoRA, as PEFT's `add_weighted_adapter` makes it."""

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Key

from sborax.adapters.combination import Combination
from sborax.adapters.core import Adapter, structure
from sborax.adapters.leaves import nest
from sborax.adapters.tree import Adapters, Params
from sborax.adapters.weighted import Weighted, thin_changes
from sborax.methods import LoRA


def weighted_lora(
    params: Params,
    parts: Sequence[Weighted],
    combination: Combination = Combination("svd"),
    key: Key[Array, ""] | None = None,
) -> Adapters:
    """LoRA on `params` whose change is a combination of those of the parts: PEFT's `add_weighted_adapter`.

    - "cat" and the kinds that combine factors take parts of plain LoRA. "cat" is exact and has the sum of their ranks.
    - The kinds in "svd" take any method that merges, and keep the leading singular vectors.

        sx.save_peft("both", model, params, sx.weighted_lora(params, parts, sx.Combination("ties", density=0.2)))

    Args:
    - params: the base that the adapters are for.
    - parts: adapters, each with its weight and, if they are not `params`, the parameters that go with it.
    - combination: how they are combined, and the rank of the result. Default: "svd", as PEFT.
    - key: for a combination that drops entries at random.

    Raises SboraxError as `merge_weighted`.
    """
    adapters = {}
    for path, change in thin_changes(params, parts, combination, key).items():
        method = structure(LoRA(rank=change.a.shape[-1]))
        scale = jnp.ones(change.a.shape[:-2], jnp.float32)
        adapters[path] = Adapter({"a": change.a, "b": change.b}, {"scale": scale}, method, change.node.in_axes)
    return nest(adapters)
