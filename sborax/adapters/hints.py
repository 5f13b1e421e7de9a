"""What some initialisations want to know about a model: gradients of its own, un-adapted weights."""

import re
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sborax.adapters.core import Hint, SboraxError, dense
from sborax.adapters.leaves import replace_leaves
from sborax.adapters.paths import kernels, module_path
from sborax.adapters.tree import Params


def gradient_hints(
    loss: Callable[[Params, Any], Float[Array, ""]],
    params: Params,
    patterns: str | Iterable[str],
    batches: Iterable[Any],
) -> dict[str, Hint]:
    """The mean of dL/dW over `batches` for every kernel that a pattern matches: `Hint(grad)` by path, for `attach`.

    loss: `(params, batch) -> scalar`, of the un-adapted model, jit-able.
    patterns: regular expressions over module paths, as in rules.
    batches: a few; every one weighs the same. They are read once a kernel, so the list is held.

    One kernel (a whole stack of layers) at a time: one gradient is on the device at once, the sum is kept on the host
    in float32. A quantised kernel is differentiated at its dense value.
    Raises SboraxError for no match, no batch, and a gradient that is not finite.
    """
    wanted = [patterns] if isinstance(patterns, str) else list(patterns)
    found = {
        path: weight
        for path, weight in kernels(params).items()
        if any(re.search(pattern, module_path(path)[0]) for pattern in wanted)
    }
    if not found:
        raise SboraxError(f"no kernel matches {wanted}; the kernels are {', '.join(kernels(params)) or 'none'}")
    held = list(batches)
    if not held:
        raise SboraxError("gradient_hints needs at least one batch")
    return {path.removesuffix("/kernel"): Hint(grad=_mean(loss, params, path, held)) for path in found}


def _mean(loss: Callable[..., Any], params: Params, path: str, batches: list[Any]) -> Float[np.ndarray, "..."]:
    def of_kernel(weight: Array, params: Params, batch: Any) -> Float[Array, ""]:
        return loss(replace_leaves(params, {path: weight}), batch)

    weight = dense(kernels(params)[path])
    gradient = jax.jit(jax.grad(of_kernel))
    total = np.zeros(weight.shape, np.float32)
    for batch in batches:
        total += np.asarray(gradient(weight, params, batch).astype(jnp.float32))
    if not np.isfinite(total).all():
        raise SboraxError(f"{path}: its gradient is not finite; check the loss and the batches")
    return total / np.float32(len(batches))
