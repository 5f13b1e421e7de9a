"""Gradients of a model's un-adapted weights, for initialisations that need them."""

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
    """The mean of dL/dW over `batches`, a `Hint(grad=...)` by path, for the `hints` of `attach`.

    Kernels, which may be whole stacks of layers, are differentiated one at a time: the device holds one gradient at
    once, and the means are NumPy arrays in float32. A quantised kernel is differentiated at its dense value.

    Args:
    - loss: `(params, batch) -> scalar`, the loss of the un-adapted model. It is jitted.
    - params: the parameters of the un-adapted model.
    - patterns: regular expressions; kernels whose module path one of them matches get a hint, as in rules.
    - batches: a few batches, which all weigh the same. Each is used once per kernel, so they are held in a list.

    Raises SboraxError for no match, no batch, and a gradient that is not finite.
    """
    patterns, batches = [patterns] if isinstance(patterns, str) else list(patterns), list(batches)
    paths = [path for path in kernels(params) if any(re.search(pattern, module_path(path)[0]) for pattern in patterns)]
    if not paths:
        raise SboraxError(f"no kernel matches {patterns}; the kernels are {', '.join(kernels(params)) or 'none'}")
    if not batches:
        raise SboraxError("gradient_hints needs at least one batch")
    return {path.removesuffix("/kernel"): Hint(grad=_mean(loss, params, path, batches)) for path in paths}


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
